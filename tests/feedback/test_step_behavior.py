"""PRFL: graphs, histories, dtypes and draws of a step; the supervised loss."""

import math

import pytest
import torch
from plan_world import worst_error
from prfl_world import (
    CONDITIONS,
    SHAPE,
    SOLVERS,
    Affine,
    TinyReward,
    diffusers_euler,
    diffusers_unipc,
    gradients,
    make_noise,
    make_wan,
    mean,
    run,
    velocity_of,
)
from torch import nn

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC, training_sigmas
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.training.losses import sft_loss


def test_gradients_accumulate_and_loss_scale_scales_only_them():
    model, reward, noise = make_wan(), TinyReward(), make_noise(6)
    step = PRFL(model, reward, FlowUniPC(), num_inference_steps=5)
    full, grads = run(step, model, noise, CONDITIONS, indices=(2,))
    model.zero_grad()
    for _ in range(4):
        part = step(noise, CONDITIONS, indices=(2,), loss_scale=0.25)
        assert torch.equal(part.loss, full.loss)
    assert worst_error(gradients(model), grads) <= 1e-12


def test_only_the_transformer_receives_gradients():
    model, reward = make_wan(), TinyReward()
    noise = make_noise().requires_grad_()
    output, grads = run(
        PRFL(model, reward, FlowUniPC(), GradientPlan.prfl(2), num_inference_steps=5),
        model,
        noise,
        CONDITIONS,
    )
    assert noise.grad is None and all(p.grad is None for p in reward.parameters())
    assert any(g.abs().max() > 0 for g in grads)
    assert not any(t.requires_grad for t in (output.loss, output.rewards, output.latents))
    frozen = make_wan().requires_grad_(False)
    frozen.blocks[1].ffn.requires_grad_(True)
    PRFL(frozen, reward, FlowUniPC(), num_inference_steps=5)(noise, CONDITIONS)
    assert [n for n, p in frozen.named_parameters() if p.grad is not None] == [
        n for n, p in frozen.named_parameters() if n.startswith("blocks.1.ffn.")
    ]


def test_a_plain_function_serves_as_transformer():
    model = Affine()
    step = PRFL(model.velocity, mean, FlowEuler(), num_inference_steps=4)
    output = step(make_noise(), {}, indices=(1,))
    assert (
        model.seen == [(False, torch.float64, False), (True, torch.float64, False)]
        and model.a.grad is not None
    )
    assert output.latents.shape == SHAPE


@pytest.mark.parametrize("scheduler", [FlowUniPC, diffusers_unipc])
def test_one_graph_is_alive_at_a_time_and_none_afterwards(scheduler):
    model, alive = Affine(), []

    def reward(x, t, c):
        alive.append(model.graphs_alive())
        return x.mean((1, 2, 3, 4))

    step = PRFL(model.velocity, reward, scheduler(), num_inference_steps=6)
    output = step(make_noise(), {}, indices=(0, 2, 3, 4))
    assert alive == [1, 1, 1, 1] and model.graphs_alive() == 0
    assert (
        len(model.seen) == 5 and len(output.indices) == 4
    )  # no forward beyond the last gradient step


@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc, diffusers_euler])
def test_the_callers_scheduler_is_not_touched_and_nothing_leaks_between_calls(scheduler):
    original = scheduler()
    before = original.timesteps.clone()
    model = Affine()
    step = PRFL(
        model.velocity,
        mean,
        original,
        GradientPlan.prfl(2),
        num_inference_steps=6,
    )
    results = []
    for _ in range(2):
        model.a.grad = None
        results.append((step(make_noise(), {}, indices=(1, 3)), model.a.grad.clone()))
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(
        results[0][0].latents, results[1][0].latents
    )
    assert torch.equal(original.timesteps, before) and original.step_index is None


@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc, diffusers_euler])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_latents_keep_the_noises_dtype(dtype, scheduler):
    model = Affine()
    step = PRFL(model.velocity, mean, scheduler(), num_inference_steps=4)
    output = step(make_noise(dtype=dtype), {}, indices=(1, 2))
    assert output.latents.dtype == dtype and output.finite
    assert output.rewards.dtype == output.loss.dtype == torch.float32
    assert {entry[1] for entry in model.seen} == {dtype}


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_transformer_is_left_alone(mode):
    model = make_wan().train(mode)
    PRFL(model, TinyReward(), FlowUniPC(), num_inference_steps=3)(make_noise(), CONDITIONS)
    assert model.training == mode


def test_gradients_come_even_inside_no_grad():
    model = Affine()
    with torch.no_grad():
        PRFL(model.velocity, mean, FlowUniPC(), num_inference_steps=3)(make_noise(), {})
    assert model.a.grad is not None


def test_rewards_above_the_target_give_no_gradient():
    model = Affine()
    step = PRFL(
        model.velocity, lambda x, t, c: x.mean((1, 2, 3, 4)) + 5, FlowEuler(), num_inference_steps=3
    )
    output = step(make_noise(), {})
    assert output.loss == 0 and model.a.grad == 0 and output.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_is_reported_and_not_differentiated(bad):
    model, calls = Affine(), []

    def reward(x, t, c):
        calls.append(None)
        r = x.mean((1, 2, 3, 4))
        return r + (torch.tensor([0.0, bad]) if len(calls) == 2 else 0)

    step = PRFL(model.velocity, reward, FlowUniPC(), num_inference_steps=6)
    output = step(make_noise(), {}, indices=(0, 2, 4))
    assert not output.finite and len(calls) == 2 and output.indices == (0, 2, 4)
    assert torch.isfinite(output.rewards[0]).all() and output.rewards[2].isnan().all()
    first = model.a.grad.clone()
    model.a.grad = None
    calls.clear()
    step(make_noise(), {}, indices=(0,), loss_scale=1 / 3)
    torch.testing.assert_close(model.a.grad, first, rtol=1e-12, atol=0)


def test_draws_come_from_the_generator_alone():
    step = PRFL(
        Affine().velocity,
        mean,
        FlowEuler(),
        GradientPlan.prfl(3),
        num_inference_steps=20,
    )
    state = torch.get_rng_state()
    drawn = [
        step(make_noise(), {}, generator=torch.Generator().manual_seed(s)).indices
        for s in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    step(make_noise(), {}, indices=(0, 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["unipc", "euler", "diffusers-unipc"])
def test_rollout_equals_the_textbook_and_stops_where_told(name, capsys):
    ours, theirs = SOLVERS[name]
    model, noise = make_wan(), make_noise()
    solver, x, states = theirs(5), noise, [noise]
    with torch.no_grad():
        for i, t in enumerate(solver.timesteps[:5]):
            x = solver.step(i, velocity_of(model, x, t, CONDITIONS), x)
            states.append(x)
    for stop in (0, 2, None):
        out = rollout(model, noise, CONDITIONS, ours(), 5, stop=stop, progress=stop is None)
        torch.testing.assert_close(out, states[5 if stop is None else stop], rtol=1e-9, atol=1e-9)
        assert not out.requires_grad
    assert "sampling" in capsys.readouterr().err


def test_rollout_refuses_a_stop_outside_the_schedule():
    for stop in (-1, 6):
        with pytest.raises(ValueError, match="stop is"):
            rollout(Affine().velocity, make_noise(), {}, FlowEuler(), 5, stop=stop)


def test_sft_loss_and_gradient_equal_the_textbook():
    model, x0, noise, sigma = (
        make_wan(),
        make_noise(7),
        make_noise(8),
        torch.tensor([0.2, 0.9], dtype=torch.float64),
    )
    loss = sft_loss(model, x0, CONDITIONS, noise=noise, sigma=sigma)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    s = sigma.view(2, 1, 1, 1, 1)
    v = model(
        (1 - s) * x0 + s * noise,
        1000 * sigma,
        CONDITIONS["encoder_hidden_states"],
        return_dict=False,
    )[0]
    plain = nn.functional.mse_loss(v, noise - x0)
    theirs = torch.autograd.grad(plain, list(model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    assert worst_error(ours, theirs) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sft_draws_from_the_generator_and_noises_in_float32(dtype):
    seen = []

    def velocity(x, timestep, conditions):
        seen.append((x, timestep))
        return torch.zeros_like(x)

    x0 = make_noise(9, (4, 2, 1, 4, 4), dtype)
    state = torch.get_rng_state()
    losses = [
        sft_loss(velocity, x0, {}, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[2] != losses[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for x, timestep in seen:
        assert x.dtype == losses[0].dtype == wide and timestep.shape == (4,)
        assert (
            torch.isclose(
                timestep[:, None] / 1000, training_sigmas().to(wide)[None], rtol=1e-6, atol=0
            )
            .any(1)
            .all()
        )
    assert torch.equal(seen[0][0], seen[2][0]) and len(seen[0][1].unique()) > 1


def test_sft_sigmas_are_uniform_over_the_schedule():
    seen = []

    def velocity(x, timestep, conditions):
        seen.append(timestep)
        return x

    sft_loss(
        velocity, torch.zeros(40000, 1, 1, 1, 1), {}, generator=torch.Generator().manual_seed(0)
    )
    s = seen[0] / 1000
    even = s / (5 - 4 * s)  # the shift undone
    assert even.min() >= 0.0009 and even.max() <= 1
    histogram = torch.histc(even, 10, 0, 1) / len(even)
    assert (histogram - 0.1).abs().max() < 5 * (0.09 / len(even)) ** 0.5


@pytest.mark.parametrize("sigma", [0, 0.0, 1.0, torch.tensor(0.5)])
def test_sft_takes_one_sigma_for_the_batch(sigma):
    x0, noise = make_noise(1), make_noise(2)
    out = sft_loss(lambda x, t, c: x, x0, {}, noise=noise, sigma=sigma)
    x = (1 - sigma) * x0 + sigma * noise
    torch.testing.assert_close(out, (x - (noise - x0)).square().mean())
