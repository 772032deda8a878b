"""A tiny float64 Wan with and without adapters, and scores, for the tests of gradient plans."""

import copy

import pytest
import textbook
import torch
from torch import nn

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.registry import patch
from prfl_fast.rollout.schedulers import FlowUniPC

diffusers = pytest.importorskip("diffusers")


STEPS = 6


SHAPE = (2, 16, 3, 4, 4)


SEEDS = (0, 1)  # of draws; they give different steps and depths for every random plan


LIMIT = 1e-12  # of every parameter's gradient, relative; 2e-14 was seen, 1e-6 is promised


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOISE, DATA = normal(1), normal(2)


TEXT = {"encoder_hidden_states": normal(3, (2, 3, 12))}


def make_wan(seed=0):
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=12,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).double()
    for parameter in model.parameters():  # biases start at zero, which would hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def with_lora(model):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "to_k"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at zero, which would leave A without gradient
            parameter.data = 0.3 * torch.randn_like(parameter, dtype=torch.float64)
    return model


class Score(nn.Module):
    """A frozen score in (0, 1): nonlinear in latents, timestep and text, no two frames alike."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape):
            return nn.Parameter(
                torch.randn(shape, generator=generator, dtype=torch.float64), requires_grad=False
            )

        self.filters, self.head, self.text = weight(6, 16, 1, 3, 3), weight(6), weight(12)

    def forward(self, x, timestep, conditions):
        t = (timestep / 1000).to(x.dtype)
        h = nn.functional.conv3d(x, 0.1 * self.filters, padding=(0, 1, 1))
        h = torch.tanh(h + t.view(-1, 1, 1, 1, 1) * self.head.view(1, -1, 1, 1, 1))
        h = h * (1 + 0.5 * torch.cos(torch.arange(x.shape[2], dtype=x.dtype)))[:, None, None]
        text = conditions["encoder_hidden_states"].mean(1) @ self.text
        return torch.sigmoid((h + h**2).mean((2, 3, 4)) @ self.head * (1 + t) + text)


REWARD = Score(5)


def velocity_of(model, conditions=TEXT):
    def velocity(x, timestep):
        batch = torch.full((x.shape[0],), timestep, dtype=torch.float64)
        return model(x, batch, conditions["encoder_hidden_states"], return_dict=False)[0]

    return velocity


def score_of(reward, conditions=TEXT):
    def score(x, timestep):
        return reward(x, torch.full((x.shape[0],), timestep, dtype=torch.float64), conditions)

    return score


def loss_of(reward=REWARD, target=2.0, weight=0.1):
    return textbook.hinge({"reward": score_of(reward)}, {"reward": 1.0}, target, weight)


def world_of(model):
    return textbook.World(velocity_of(model), loss_of())


def pair():
    """Return the same model twice: as it is for the textbook, and patched for us."""
    theirs = make_wan()
    return theirs, patch(copy.deepcopy(theirs))


def prfl(model, plan, scheduler=None, reward=REWARD, **options):
    scheduler = FlowUniPC() if scheduler is None else scheduler
    return PRFL(model, reward, scheduler, plan, num_inference_steps=STEPS, **options)


def seeded(seed=SEEDS[0]):
    return torch.Generator().manual_seed(seed)


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(loss, model):
    return torch.autograd.grad(loss, trained(model))


def run(step, model, *args, **kwargs):
    """One call, and the gradients it left; they are cleared before and after."""
    model.zero_grad(set_to_none=True)
    output = step(*args, **kwargs)
    assert output.finite
    found = [p.grad for p in trained(model)]
    assert all(gradient is not None for gradient in found)
    model.zero_grad(set_to_none=True)
    return output, found


def worst_error(ours, theirs):
    """Largest error over the parameters, each relative to its own largest entry."""
    scale = max(t.abs().max().item() for t in theirs)
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        # A gradient that is zero in exact arithmetic (the key bias under softmax) is rounding on
        # both sides.
        size = max(b.abs().max().item(), 1e-9 * scale)
        errors.append((a - b).abs().max().item() / size)
    return max(errors)


# The constructor, and its paper's loss at one drawn point: (world, solver, point) → loss.
METHODS = {
    "prfl": (GradientPlan.prfl(), lambda w, s, p: textbook.prfl(w, s, NOISE, p.step)),
    "prfl-3": (GradientPlan.prfl(3), lambda w, s, p: textbook.prfl(w, s, NOISE, p.step)),
    "prfl-independent": (
        GradientPlan.prfl(4, "independent"),
        lambda w, s, p: textbook.prfl(w, s, NOISE, p.step),
    ),
    "refl": (GradientPlan.refl(0.5), lambda w, s, p: textbook.refl(w, s, NOISE, p.step)),
    "draft-1": (GradientPlan.draft(), lambda w, s, p: textbook.draft(w, s, NOISE, 1)),
    "draft-3": (GradientPlan.draft(3), lambda w, s, p: textbook.draft(w, s, NOISE, 3)),
    "draft": (GradientPlan.draft(None), lambda w, s, p: textbook.draft(w, s, NOISE, STEPS)),
    "alignprop": (
        GradientPlan.alignprop(2, 5),
        lambda w, s, p: textbook.alignprop(w, s, NOISE, p.depth),
    ),
    "controlnet++": (
        GradientPlan.controlnet_plus_plus(0.4),
        lambda w, s, p: textbook.one_step(w, s, DATA, NOISE, p.step),
    ),
    "rg-lcd": (GradientPlan.rg_lcd(), lambda w, s, p: textbook.one_step(w, s, DATA, NOISE, p.step)),
    "instructvideo-1": (
        GradientPlan.instruct_video(0.6, 1, segments=None),
        lambda w, s, p: textbook.instruct_video(w, s, DATA, NOISE, 2, 1),
    ),
    "instructvideo-3": (
        GradientPlan.instruct_video(0.6, 3, segments=None),
        lambda w, s, p: textbook.instruct_video(w, s, DATA, NOISE, 2, 3),
    ),
}


def data_of(plan):
    return {"latents": DATA} if plan.start == "data" else {}
