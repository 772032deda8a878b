"""Rewards on pixels and ensembles, and RGB ReFL made of them, against plain PyTorch."""

import functools
import math
import weakref

import pytest
import textbook
import torch
from torch import nn
from toy_flow import gaussian

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.rewards.functions import PixelReward, RewardEnsemble, check_frozen
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC

SHAPE = (2, 4, 3, 4, 4)


def make_noise(dtype=torch.float64):
    return gaussian(*SHAPE).to(dtype)


class Model(nn.Module):
    """A model no adapter knows; ``velocity`` is what is passed on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(4, 4, 3, padding=1).double()
        self.calls = 0

    def velocity(self, x, timestep, conditions):
        self.calls += 1
        level = 1 + timestep.view(-1, 1, 1, 1, 1) / 1000
        return torch.tanh(self.conv(x.double()) * level).to(x.dtype)


def grads_of(model):
    return [p.grad for p in model.parameters()]


class Decoder(nn.Module):
    """A linear codec shaped like Wan's VAE: F latent frames → 1 + 4·(F-1) frames."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.spatial = nn.ConvTranspose3d(4, 3, (1, 8, 8), stride=(1, 8, 8)).double()
        self.requires_grad_(False)

    def forward(self, latents):
        frames = self.spatial(latents.double())
        return torch.cat([frames[:, :, :1], frames[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)


def pixel_score(frames):
    smooth = frames.diff(dim=-1).square().mean((1, 2, 3, 4))
    return torch.sigmoid(smooth - frames[:, 0].mean((1, 2, 3)))


def rgb_refl(velocity, scheduler=FlowUniPC, *, steps=8, frames="all", score=pixel_score):
    reward = PixelReward(Decoder(), score, frames)
    return PRFL(velocity, reward, scheduler(), GradientPlan.refl(), num_inference_steps=steps)


@pytest.mark.parametrize("frames", ["all", "first"])
@pytest.mark.parametrize("name", ["UniPC", "Euler"])
def test_rgb_refl_has_the_textbooks_gradient(name, frames):
    model, noise = Model(), make_noise()
    scheduler = {"UniPC": FlowUniPC, "Euler": FlowEuler}[name]
    step = rgb_refl(model.velocity, scheduler, frames=frames)

    def velocity(x, t):
        return model.velocity(x, torch.full((2,), t, dtype=torch.float64), {})

    for index in (0, 6, 7):
        model.zero_grad()
        output = step(noise, {}, indices=(index,))
        grads, solver = grads_of(model), getattr(textbook, name)(8)
        x = textbook.sample(textbook.World(velocity, None), solver, noise, 0, index)
        clean = x - solver.sigmas[index] * velocity(x, solver.timesteps[index])
        r = pixel_score(Decoder()(clean[:, :, :1] if frames == "first" else clean))
        loss = 0.1 * torch.clamp(2 - r, min=0).mean()
        expected = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(grads, list(expected), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output.rewards, r[None], rtol=1e-9, atol=0)
        torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(output.latents, clean, rtol=1e-9, atol=1e-9)
        assert output.indices == (index,) and output.timesteps == (0.0,) and output.finite
        tensors = (output.loss, output.rewards, output.latents)
        assert not any(tensor.requires_grad for tensor in tensors)


def test_rgb_refl_takes_one_forward_per_step_and_a_loss_scale():
    model, noise = Model(), make_noise()
    step = rgb_refl(model.velocity)
    full = step(noise, {}, indices=(6,))
    assert model.calls == 7
    grads = grads_of(model)
    model.zero_grad()
    for _ in range(2):
        assert torch.equal(step(noise, {}, indices=(6,), loss_scale=0.5).loss, full.loss)
    torch.testing.assert_close(grads_of(model), grads, rtol=1e-12, atol=0)


def test_rgb_refl_draws_from_the_late_window():
    step = rgb_refl(Model().velocity, steps=8)
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    drawn = {step(make_noise(), {}, generator=generator).indices for _ in range(12)}
    assert drawn == {(6,), (7,)} and torch.equal(state, torch.get_rng_state())


def test_rgb_refl_on_bf16_latents():
    output = rgb_refl(Model().velocity, steps=4)(make_noise(dtype=torch.bfloat16), {})
    assert output.latents.dtype == torch.bfloat16 and output.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_pixel_reward_is_reported_and_not_differentiated(bad):
    model = Model()
    step = rgb_refl(model.velocity, steps=4, score=lambda f: pixel_score(f) + bad)
    assert not step(make_noise(), {}).finite and all(p.grad is None for p in model.parameters())


def test_the_first_frame_sees_one_latent_frame():
    seen = []

    def decode(latents):
        seen.append(latents.shape)
        return latents

    reward = PixelReward(decode, lambda f: f.mean((1, 2, 3, 4)), "first")
    x = make_noise()
    assert torch.equal(reward(x, torch.zeros(2), {}), x[:, :, :1].mean((1, 2, 3, 4)))
    assert seen == [(2, 4, 1, 4, 4)]


def test_bad_pixel_rewards_are_refused():
    velocity, noise = Model().velocity, make_noise()
    for arguments, error, message in (
        ((Decoder(), pixel_score, "last"), ValueError, "frames is 'last', expected one of 'all', "),
        ((None, pixel_score), TypeError, "decode is NoneType, expected a callable"),
        ((Decoder(), "clip"), TypeError, "reward is str"),
    ):
        with pytest.raises(error, match=message):
            PixelReward(*arguments)
    for decode, score, message in (
        (Decoder().requires_grad_(True), pixel_score, "Decoder has 2 trainable parameters"),
        (lambda x: x.detach(), pixel_score, "no graph"),
        (Decoder(), lambda f: f.mean(), "expected one score per sample"),
        (lambda x: [x], pixel_score, "output of decode is"),
    ):
        plan = GradientPlan.refl()
        with pytest.raises(ValueError, match=message):
            reward = PixelReward(decode, score)
            PRFL(velocity, reward, FlowUniPC(), plan, num_inference_steps=4)(noise, {})


class Holder:
    def __init__(self, **parts):
        self.__dict__.update(parts)

    def __call__(self, x, timestep, conditions):
        return x.mean((1, 2, 3, 4))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        lambda m: m.forward,
        lambda m: functools.partial(m, None),
        lambda m: Holder(model=m),
        lambda m: Holder(members=[m]),
        lambda m: PixelReward(lambda x: x, m),
        lambda m: PixelReward(m.forward, pixel_score).__call__,
        lambda m: RewardEnsemble([Holder(), PixelReward(lambda x: x, Holder(model=m))]),
    ],
)
def test_trainable_parameters_are_found_wherever_they_are(wrap):
    with pytest.raises(ValueError, match="Linear has 2 trainable parameters .first: weight."):
        check_frozen(wrap(nn.Linear(2, 2)))
    check_frozen(wrap(nn.Linear(2, 2).requires_grad_(False)))


def member(seed, calls=None):
    weight = gaussian(*SHAPE[1:], seed=seed)

    def score(x, timestep, conditions):
        if calls is not None:
            calls.append((seed, tuple(timestep.tolist()), conditions["a"]))
        return torch.tanh((x * weight).sum((1, 2, 3, 4)) / 20 + conditions["a"] * timestep)

    return score


def combined(scores, mode, coefficient):
    """Combine the scores by the formulas, sample by sample."""
    out = []
    for column in zip(*scores, strict=True):
        mean = sum(column) / len(column)
        spread = sum((r - mean) ** 2 for r in column) / len(column)
        worst = min(column, key=lambda r: float(r.detach()))
        out.append({"mean": mean, "worst": worst, "uncertainty": mean - coefficient * spread}[mode])
    return torch.stack(out)


@pytest.mark.parametrize("mode", ["mean", "worst", "uncertainty"])
def test_an_ensemble_and_its_gradient(mode):
    x = make_noise().requires_grad_()
    timestep = torch.tensor([0.3, 0.7], dtype=torch.float64)
    conditions = {"a": torch.tensor([0.2, -0.4], dtype=torch.float64)}
    members = [member(seed) for seed in range(3)]
    weights = torch.tensor([0.5, -2.0], dtype=torch.float64)
    out = RewardEnsemble(members, mode, coefficient=0.7)(x, timestep, conditions)
    (gradient,) = torch.autograd.grad((out * weights).sum(), x)
    expected = combined([m(x, timestep, conditions) for m in members], mode, 0.7)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(RewardEnsemble(members, mode, 0.7)(x, timestep, conditions), out)


def test_members_of_an_ensemble_run_one_after_the_other():
    """When a member starts, nothing of the graph of the one before is alive."""
    graphs = []

    def score(x, timestep, conditions):
        assert all(graph() is None for graph in graphs)
        kept = x.square()
        graphs.append(weakref.ref(kept))
        return kept.sum((1, 2, 3, 4)).exp().log()

    x = make_noise().requires_grad_()
    RewardEnsemble([score] * 3)(x, torch.zeros(2), {}).sum().backward()
    assert len(graphs) == 3
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_an_ensemble_scores_in_float32_whatever_its_members_give():
    x = make_noise(dtype=torch.bfloat16).requires_grad_()
    members = [lambda x, t, c: x.mean((1, 2, 3, 4)), lambda x, t, c: x.float().mean((1, 2, 3, 4))]
    out = RewardEnsemble(members)(x, torch.zeros(2), {})
    out.sum().backward()
    assert out.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad.float(), torch.full(SHAPE, 1 / 192), rtol=1e-2, atol=0)


def test_an_ensemble_in_a_step_gives_the_gradient_of_its_formula():
    members = [member(seed) for seed in range(2)]

    def plain(x, timestep, conditions):
        scores = torch.stack([m(x, timestep, conditions) for m in members])
        return scores.mean(0) - 0.5 * scores.var(0, correction=0)

    gradients = []
    for reward in (plain, RewardEnsemble(members, "uncertainty", 0.5)):
        model = Model()
        step = PRFL(model.velocity, reward, FlowUniPC(), num_inference_steps=4)
        step(make_noise(), {"a": torch.tensor([1e-3, -2e-3])}, indices=(1,))
        gradients.append(grads_of(model))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-14)
    assert all(gradient.any() for gradient in gradients[0])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ([[member(0)]], ValueError, "of members is 1, expected an integer of at least 2"),
        ([[member(0), "b"]], TypeError, r"members\[1\] is str, expected a"),
        ([[member(0)] * 2, "min"], ValueError, "mode is 'min', expected"),
        ([[member(0)] * 2, "uncertainty", -1], ValueError, "coefficient is -1, expected"),
        ([[member(0)] * 2, "mean", math.nan], ValueError, "coefficient is nan"),
    ],
)
def test_bad_ensembles_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RewardEnsemble(*arguments)


@pytest.mark.parametrize("differentiated", [False, True])
def test_bad_scores_of_a_member_are_refused(differentiated):
    x = make_noise().requires_grad_(differentiated)
    with pytest.raises(ValueError, match="output of a member is .*expected one score per sample"):
        RewardEnsemble([lambda x, t, c: x.mean()] * 2)(x, torch.zeros(2), {})
    if differentiated:
        blind = RewardEnsemble([lambda x, t, c: x.detach().mean((1, 2, 3, 4))] * 2)
        with pytest.raises(ValueError, match="no graph to its input"):
            blind(x, torch.zeros(2), {})
