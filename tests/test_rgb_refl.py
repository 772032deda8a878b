"""The pixel-space baseline against plain PyTorch."""

import math

import pytest
import torch
from torch import nn

from prfl_fast.rgb_refl import RGBReFL
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.trajectory import rollout

SHAPE = (2, 4, 3, 4, 4)


def make_noise(seed=1, dtype=torch.float64):
    return torch.randn(
        SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


class Model(nn.Module):
    """A model no adapter knows; ``velocity`` is what is passed on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(4, 4, 3, padding=1).double()
        self.calls = 0

    def velocity(self, x, timestep, conditions):
        self.calls += 1
        return torch.tanh(self.conv(x.double()) * (1 + timestep.view(-1, 1, 1, 1, 1) / 1000)).to(
            x.dtype
        )


class Decoder(nn.Module):
    """A linear codec shaped like Wan's VAE: F latent frames → 1 + 4·(F-1) frames."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.spatial = (
            nn.ConvTranspose3d(4, 3, (1, 8, 8), stride=(1, 8, 8)).double().requires_grad_(False)
        )

    def forward(self, latents):
        frames = self.spatial(latents.double())
        return torch.cat([frames[:, :, :1], frames[:, :, 1:].repeat_interleave(4, dim=2)], dim=2)


def pixel_reward(frames):
    return torch.sigmoid(
        frames.diff(dim=-1).square().mean((1, 2, 3, 4)) - frames[:, 0].mean((1, 2, 3))
    )


def textbook(model, noise, index, scheduler, steps, first):
    """One ReFL gradient: ``(gradients, rewards, loss, estimate)``."""
    x = rollout(model.velocity, noise, {}, scheduler, steps, stop=index)
    scheduler.set_timesteps(steps)
    t = scheduler.timesteps[index].double().expand(len(x))
    clean = x - scheduler.sigmas[index].double() * model.velocity(x, t, {})
    r = pixel_reward(Decoder()(clean[:, :, :1] if first else clean))
    loss = 0.1 * torch.clamp(2 - r, min=0).mean()
    return (
        torch.autograd.grad(loss, list(model.parameters())),
        r.detach(),
        loss.detach(),
        clean.detach(),
    )


@pytest.mark.parametrize("frames", ["all", "first"])
@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler])
def test_gradient_equals_the_textbook(scheduler, frames):
    model, noise = Model(), make_noise()
    step = RGBReFL(model.velocity, Decoder(), pixel_reward, scheduler(), num_steps=8, frames=frames)
    for index in (0, 6, 7):
        model.zero_grad()
        output = step(noise, {}, indices=(index,))
        expected, r, loss, clean = textbook(model, noise, index, scheduler(), 8, frames == "first")
        for parameter, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(output.rewards, r[None], rtol=1e-9, atol=0)
        torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(output.latents, clean, rtol=1e-9, atol=1e-9)
        assert output.indices == (index,) and output.timesteps == (0.0,) and output.finite
        assert not (
            output.loss.requires_grad
            or output.rewards.requires_grad
            or output.latents.requires_grad
        )


def test_the_first_frame_sees_one_latent_frame_and_one_pixel_frame():
    seen = []

    def decode(latents):
        seen.append(latents.shape)
        return latents

    RGBReFL(
        Model().velocity,
        decode,
        lambda f: f.mean((1, 2, 3, 4)),
        FlowEuler(),
        num_steps=4,
        frames="first",
    )(make_noise(), {})
    assert seen == [(2, 4, 1, 4, 4)]


@pytest.mark.parametrize(
    "num_steps,last_steps,window",
    [(40, None, 10), (8, 3, 3), (5, None, 2), (4, 4, 4), (1, None, 1)],
)
def test_the_draw_is_uniform_over_the_late_window(num_steps, last_steps, window):
    step = RGBReFL(
        lambda x, t, c: x,
        lambda x: x,
        lambda f: f,
        FlowEuler(),
        num_steps=num_steps,
        last_steps=last_steps,
    )
    generator, state = torch.Generator().manual_seed(0), torch.get_rng_state()
    drawn = [step._indices(None, generator)[0] for _ in range(2000)]
    assert torch.equal(state, torch.get_rng_state())
    assert set(drawn) == set(range(num_steps - window, num_steps))
    for index in set(drawn):
        assert abs(drawn.count(index) / 2000 - 1 / window) < 5 * (1 / window / 2000) ** 0.5


def test_one_forward_per_step_and_loss_scale():
    model, noise = Model(), make_noise()
    step = RGBReFL(model.velocity, Decoder(), pixel_reward, FlowUniPC(), num_steps=8)
    full = step(noise, {}, indices=(6,))
    assert model.calls == 7
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for _ in range(2):
        assert torch.equal(step(noise, {}, indices=(6,), loss_scale=0.5).loss, full.loss)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-12, atol=0)


def test_bf16_latents():
    output = RGBReFL(Model().velocity, Decoder(), pixel_reward, FlowUniPC(), num_steps=4)(
        make_noise(dtype=torch.bfloat16), {}
    )
    assert output.latents.dtype == torch.bfloat16 and output.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_reward_is_reported_and_not_differentiated(bad):
    model = Model()
    step = RGBReFL(
        model.velocity, Decoder(), lambda f: pixel_reward(f) + bad, FlowUniPC(), num_steps=4
    )
    assert not step(make_noise(), {}).finite and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"frames": "last"}, "frames is 'last'"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"last_steps": 0}, "last_steps is 0"),
        ({"last_steps": 9}, "last_steps is 9"),
        ({"weight": math.nan}, "weight is"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        RGBReFL(
            Model().velocity, Decoder(), pixel_reward, FlowUniPC(), **{"num_steps": 8, **kwargs}
        )


def test_bad_callables_and_inputs_are_refused():
    velocity, noise = Model().velocity, make_noise()
    with pytest.raises(TypeError, match="supported"):
        RGBReFL(Model(), Decoder(), pixel_reward, FlowUniPC())
    with pytest.raises(TypeError, match="decode is NoneType"):
        RGBReFL(velocity, None, pixel_reward, FlowUniPC())
    with pytest.raises(TypeError, match="pixel_reward is str"):
        RGBReFL(velocity, Decoder(), "clip", FlowUniPC())
    with pytest.raises(ValueError, match="trainable parameters"):
        RGBReFL(velocity, Decoder().requires_grad_(True), pixel_reward, FlowUniPC())(noise, {})
    with pytest.raises(ValueError, match="no graph"):
        RGBReFL(velocity, lambda x: x.detach(), pixel_reward, FlowUniPC(), num_steps=4)(noise, {})
    with pytest.raises(ValueError, match="expected one score per sample"):
        RGBReFL(velocity, Decoder(), lambda f: f.mean(), FlowUniPC(), num_steps=4)(noise, {})
    with pytest.raises(ValueError, match="decode returned"):
        RGBReFL(velocity, lambda x: [x], pixel_reward, FlowUniPC(), num_steps=4)(noise, {})
    step = RGBReFL(velocity, Decoder(), pixel_reward, FlowUniPC(), num_steps=4)
    for indices, message in (
        ((1, 2), "expected one index"),
        ((4,), "indices is"),
        ((), "indices is"),
    ):
        with pytest.raises(ValueError, match=message):
            step(noise, {}, indices=indices)
    with pytest.raises(ValueError, match="noise has 96 NaN"):
        step(noise.index_fill(1, torch.tensor([2]), math.nan), {})
