"""A tiny float64 Wan with and without adapters, frozen scores, and steps, for tests of PRFL."""

import copy
import weakref

import pytest
import textbook
import torch
from torch import nn
from wan import tiny_wan

from prfl_fast.feedback.step import PRFL
from prfl_fast.models.registry import patch
from prfl_fast.rollout.schedulers import FlowUniPC

diffusers = pytest.importorskip("diffusers")

STEPS = 6
SHAPE = (2, 16, 3, 4, 4)


def normal(seed=1, shape=SHAPE, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


NOISE, DATA = normal(1), normal(2)
TEXT = {"encoder_hidden_states": normal(3, (2, 3, 12))}


def make_wan(seed=0):
    return tiny_wan(seed=seed, text_dim=12, ffn_dim=64).double()


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
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(drawn, requires_grad=False)

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


def prfl(model, plan=None, scheduler=None, reward=REWARD, steps=STEPS, **options):
    scheduler = FlowUniPC() if scheduler is None else scheduler
    return PRFL(model, reward, scheduler, plan, num_inference_steps=steps, **options)


def seeded(seed=0):
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


class DiffusersSolver:
    """A sampler of diffusers with the textbook's methods."""

    def __init__(self, scheduler, count, wide=False):
        self.scheduler, self.count = scheduler, count
        scheduler.set_timesteps(count)
        if wide:
            scheduler.sigmas = scheduler.sigmas.double()
        self.timesteps = [*scheduler.timesteps.tolist(), 0.0]

    def step(self, i, v, x):
        return self.scheduler.step(v, self.scheduler.timesteps[i], x, return_dict=False)[0]


def diffusers_unipc(shift=5.0, order=2):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return diffusers.UniPCMultistepScheduler(**flow, flow_shift=shift, solver_order=order)


def skip_older_unipc():
    """Skip a test where diffusers' UniPC (0.35) has another schedule, that of official Wan."""
    scheduler = diffusers_unipc()
    scheduler.set_timesteps(7)
    if scheduler.sigmas[0] < 0.9999:
        pytest.skip("diffusers' UniPC starts at another noise level")


def diffusers_euler(shift=5.0):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def mean(x, timestep, conditions):
    """Return a reward for steps whose velocity is a plain function."""
    return x.mean((1, 2, 3, 4))


class Token:
    """Mark a graph node, to test if it was freed."""


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, x, nodes):
        ctx.save_for_backward(x)
        ctx.token = Token()
        nodes.append(weakref.ref(ctx.token))
        return a.to(x.dtype) * x

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).sum().double(), None, None


class Affine(nn.Module):
    """Provide a model without an adapter; its bound method is the velocity."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.nodes, self.seen = [], []

    def velocity(self, x, timestep, conditions):
        assert timestep.shape == (x.shape[0],)
        level = 1 + timestep.to(x.dtype).view(-1, 1, 1, 1, 1) / 1000
        v = Scale.apply(self.a, x * level, self.nodes)
        self.seen.append((v.requires_grad, x.dtype, x.requires_grad))
        return v

    def graphs_alive(self):
        return sum(node() is not None for node in self.nodes)
