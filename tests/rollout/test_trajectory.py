"""Trajectories against loops written here: guidance, chains, starts inside, fewer steps."""

import math

import pytest
import torch
from torch import nn
from wan import inputs, tiny_wan

from prfl_fast.models.velocity import ModelCall, model_of
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC, schedule_sigmas, strided_steps
from prfl_fast.rollout.trajectory import Trajectory, rollout

diffusers = pytest.importorskip("diffusers")
FlowMatchEulerDiscreteScheduler = diffusers.FlowMatchEulerDiscreteScheduler
UniPCMultistepScheduler = diffusers.UniPCMultistepScheduler

SHAPE = (2, 16, 2, 4, 4)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


NOISE, TEXT, NEGATIVE = randn(*SHAPE), randn(2, 3, seed=1), randn(2, 3, seed=2)
CONDITIONS = {"text": TEXT}
WEIGHT = (0.3 * randn(16, 16, seed=3)).requires_grad_()


def field(x, timestep, conditions):
    """Return a velocity that mixes channels and depends on all its arguments, sample by sample."""
    turned = torch.einsum("oc,bcfhw->bofhw", WEIGHT, x)
    shift = conditions["text"].sum(1) * (1 + timestep.to(x.dtype) / 1000)
    return torch.tanh(turned + shift.view(-1, 1, 1, 1, 1)) - 0.1 * x


def levels_of(scheduler, count):
    scheduler.set_timesteps(count)
    return scheduler.sigmas.double().tolist(), scheduler.timesteps.double().tolist()


def euler(x, kept, count, conditions=CONDITIONS, function=field):
    """Euler over the levels ``kept`` of a schedule of ``count`` steps."""
    sigmas, times = levels_of(FlowEuler(), count)
    for here, there in zip(kept, kept[1:], strict=False):
        t = torch.full((len(x),), times[here], dtype=x.dtype)
        x = x + (sigmas[there] - sigmas[here]) * function(x, t, conditions)
    return x


def unipc(x, kept, count, corrected=True):
    """UniPC of order 2 over uneven levels, as its paper writes it, for σ-schedules (α = 1-σ).

    "UniPC", arXiv 2302.04867, algorithms 5 to 8: the corrector that has seen the velocity at a
    level, then the predictor from there; orders 1 at the first and last step.
    """
    every, times = levels_of(FlowUniPC(), count)
    s, t = [every[i] for i in kept], [times[i] for i in kept[:-1]]
    lam = [math.log((1 - sigma) / sigma) if sigma else math.inf for sigma in s]
    x0s, last = [], None
    for i, time in enumerate(t):
        v = field(x, torch.full((len(x),), time, dtype=x.dtype), CONDITIONS)
        here = x - s[i] * v
        if i > 0 and corrected:
            h = lam[i] - lam[i - 1]
            e = math.expm1(-h)
            slope = 0.5 * (here - x0s[-1])
            if i > 1:
                r = (lam[i - 2] - lam[i - 1]) / h
                phi2 = -e / h - 1
                phi3 = -phi2 / h - 0.5
                matrix = torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64)
                right = torch.tensor([phi2 / e, 2 * phi3 / e], dtype=torch.float64)
                a, b = torch.linalg.solve(matrix, right).tolist()
                slope = a * (x0s[-2] - x0s[-1]) / r + b * (here - x0s[-1])
            x = s[i] / s[i - 1] * last - (1 - s[i]) * e * (x0s[-1] + slope)
        h = lam[i + 1] - lam[i]
        e = math.expm1(-h)
        after = s[i + 1] / s[i] * x - (1 - s[i + 1]) * e * here
        if 0 < i < len(t) - 1:
            r = (lam[i - 1] - lam[i]) / h
            after = after - (1 - s[i + 1]) * e * 0.5 * (x0s[-1] - here) / r
        x0s.append(here)
        last, x = x, after
    return x


def strided(stride, scheduler=None, visit=(), count=12, start=0, **kwargs):
    engine = RolloutEngine(field, RolloutConfig(stride=stride, check_every=1000))
    engine.trajectories = 1  # the first would be checked
    return Trajectory(
        Sampler(field, FlowEuler() if scheduler is None else scheduler, count),
        NOISE,
        CONDITIONS,
        engine=engine,
        visit=visit,
        start=start,
        **kwargs,
    )


@pytest.mark.filterwarnings("error")
def test_strided_euler_is_euler_on_the_coarser_schedule():
    trajectory = strided(4)
    assert trajectory.steps_to(12) == 3
    steps = []
    trajectory.run(12, lambda: steps.append(trajectory.index))
    assert steps == [4, 8, 12]
    torch.testing.assert_close(
        trajectory.x, euler(NOISE, [0, 4, 8, 12], 12), rtol=1e-13, atol=1e-13
    )
    assert not torch.allclose(trajectory.x, euler(NOISE, list(range(13)), 12), rtol=1e-3)


@pytest.mark.parametrize(
    "kept",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8],
        [0, 3, 4, 7, 8],
        [0, 2, 5, 8],
        [1, 3, 4, 6, 7, 8],
        [0, 8],
        [0, 5, 8],
    ],
)
def test_restricted_unipc_is_unipc_over_those_levels(kept):
    scheduler = FlowUniPC()
    scheduler.set_timesteps(8)
    scheduler.restrict(kept[:-1])
    assert len(scheduler.timesteps) == len(kept) - 1 and len(scheduler.sigmas) == len(kept)
    x = NOISE
    with torch.no_grad():
        for time in scheduler.timesteps:
            v = field(x, torch.full((2,), float(time), dtype=x.dtype), CONDITIONS)
            (x,) = scheduler.step(v, time, x)
        torch.testing.assert_close(x, unipc(NOISE, kept, 8), rtol=1e-10, atol=1e-12)
        # The last step leads to x0, whatever the corrector made of x.
        plain = unipc(NOISE, kept, 8, corrected=False)
        assert torch.allclose(x, plain, rtol=1e-6) == (len(kept) <= 3)
    scheduler.set_timesteps(8)  # forgets what was left out
    assert len(scheduler.timesteps) == 8


@pytest.mark.parametrize(
    "start,visit,expected",
    [
        (0, (), [0, 5, 10, 12]),
        (0, (7,), [0, 5, 7, 8, 12]),
        (0, (0, 11), [0, 1, 6, 11, 12]),
        (3, (7, 8), [3, 7, 8, 9, 12]),
        (0, (4, 5, 6), [0, 4, 5, 6, 7, 12]),
    ],
)
def test_fewer_steps_land_on_what_is_visited_and_on_the_step_after(start, visit, expected):
    assert strided_steps(start, 12, 5, visit) == expected
    trajectory = strided(5, visit=visit, start=start)
    seen = [trajectory.index]
    with torch.no_grad():
        for step in visit:
            trajectory.run(step, lambda: seen.append(trajectory.index))
            trajectory.move_to(trajectory.solve(trajectory.velocity()))
            seen.append(trajectory.index)
        trajectory.run(12, lambda: seen.append(trajectory.index))
        assert seen == expected
        reference = euler(NOISE, expected, 12)
    torch.testing.assert_close(trajectory.x, reference, rtol=1e-13, atol=1e-13)


def test_fewer_steps_refuse_what_they_cannot_do():
    trajectory = strided(5, visit=(7,))
    with pytest.raises(ValueError, match="stop is 3.*visit"):
        trajectory.run(3)
    with pytest.raises(ValueError, match="next step is 5, expected step 1.*visit"):
        trajectory.solve(NOISE)
    assert trajectory.index == 0
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler.*stride"):
        strided(2, FlowMatchEulerDiscreteScheduler(shift=5.0))
    scheduler = FlowEuler()
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.restrict([0])
    scheduler.set_timesteps(4)
    for indices in ([], [2, 1], [0, 0], [-1, 2], [3, 4]):
        with pytest.raises(ValueError, match="indices is"):
            scheduler.restrict(indices)
    for begin in (-1, 4):
        with pytest.raises(ValueError, match="begin_index is"):
            scheduler.set_begin_index(begin)


def diffusers_unipc():
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


@pytest.mark.parametrize(
    "make",
    [FlowEuler, FlowUniPC, lambda: FlowMatchEulerDiscreteScheduler(shift=5.0), diffusers_unipc],
)
def test_noise_levels_and_a_start_inside_the_schedule(make):
    sigmas, times = levels_of(make(), 9)
    trajectory = Trajectory(Sampler(field, make(), 9), NOISE, CONDITIONS, start=4)
    assert [trajectory.sigma(i) for i in range(10)] == sigmas and trajectory.sigma(9) == 0
    assert trajectory.index == 4
    assert trajectory.model_timestep(4).tolist() == [times[4]] * 2
    trajectory.run(9)
    solver, x = make(), NOISE
    solver.set_timesteps(9)
    with torch.no_grad():
        for t in solver.timesteps[4:]:
            v = field(x, torch.full((2,), float(t), dtype=x.dtype), CONDITIONS)
            x = solver.step(v, t, x, return_dict=False)[0]
    assert torch.equal(trajectory.x, x)


def test_a_start_is_found_where_truncated_timesteps_repeat():
    """At 800 steps of UniPC many timesteps are the same integer."""
    scheduler = FlowUniPC()
    scheduler.set_timesteps(800)
    times = scheduler.timesteps.tolist()
    start = next(i for i in range(1, 800) if times[i] == times[i - 1])
    trajectory = Trajectory(Sampler(field, FlowUniPC(), 800), NOISE, CONDITIONS, start=start)
    trajectory.run(start + 1)
    assert trajectory.scheduler.step_index == start + 1


def test_noise_levels_of_a_scheduler_that_names_none():
    class Bare:
        config = {"num_train_timesteps": 10}

    times = [torch.tensor(9.0), torch.tensor(4.0)]
    assert schedule_sigmas(Bare(), times) == (0.9, 0.4, 0.0)
    assert schedule_sigmas(object(), times) == (0.009, 0.004, 0.0)


@pytest.mark.parametrize("steps", [{"start": -1}, {"start": 9}, {"visit": (9,)}, {"start": True}])
def test_starts_and_visits_outside_the_schedule_are_refused(steps):
    with pytest.raises(ValueError, match=next(iter(steps))):
        Trajectory(Sampler(field, FlowEuler(), 9), NOISE, CONDITIONS, **steps)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_is_its_formula_in_rollout_and_gradient(batched):
    guidance = Guidance(3.5, {"text": NEGATIVE}, batched=batched)

    def guided(x, t, conditions):
        negative = field(x, t, {"text": NEGATIVE})
        return negative + 3.5 * (field(x, t, conditions) - negative)

    trajectory = Trajectory(Sampler(field, FlowEuler(), 6, guidance=guidance), NOISE, CONDITIONS)
    trajectory.run(3)
    with torch.no_grad():
        expected = euler(NOISE, [0, 1, 2, 3], 6, function=guided)
    torch.testing.assert_close(trajectory.x, expected, rtol=1e-12, atol=1e-12)
    x = trajectory.x.clone().requires_grad_()
    ours = torch.autograd.grad(trajectory.velocity(x).square().sum(), [x, WEIGHT])
    y = x.detach().requires_grad_()
    v = guided(y, trajectory.model_timestep(3), CONDITIONS)
    theirs = torch.autograd.grad(v.square().sum(), [y, WEIGHT])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    sampled = rollout(field, NOISE, CONDITIONS, FlowEuler(), 6, guidance=guidance, stop=3)
    assert torch.equal(sampled, trajectory.x)


def test_a_negative_of_one_serves_the_batch_and_other_conditions_are_shared():
    seen = []

    def record(x, t, conditions):
        seen.append(conditions)
        return field(x, t, conditions)

    conditions = {"text": TEXT, "image": randn(2, 5, seed=8)}
    for batched in (True, False):
        seen.clear()
        guidance = Guidance(2.0, {"text": NEGATIVE[:1]}, batched=batched)
        rollout(record, NOISE, conditions, FlowEuler(), 3, stop=1, guidance=guidance)
        negative = {k: v[2:] for k, v in seen[0].items()} if batched else seen[1]
        assert len(seen) == (1 if batched else 2)
        assert torch.equal(negative["text"], NEGATIVE[:1].expand(2, 3))
        assert torch.equal(negative["image"], conditions["image"])


def test_sequential_guidance_takes_prompts_of_different_lengths():
    long = {"text": randn(2, 5, seed=9)}
    x = rollout(
        field, NOISE, CONDITIONS, FlowEuler(), 3, guidance=Guidance(2.0, long, batched=False)
    )
    assert x.isfinite().all()
    with pytest.raises(ValueError, match=r"negative\['text'\].*batched=False"):
        rollout(field, NOISE, CONDITIONS, FlowEuler(), 3, guidance=Guidance(2.0, long))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((math.nan, {"text": NEGATIVE}), "guidance_scale is nan"),
        (("7", {"text": NEGATIVE}), "guidance_scale is '7'"),
        ((2.0, {}), "negative is"),
        ((2.0, NEGATIVE), "negative is"),
        ((2.0, {"text": "blurry"}), r"negative\['text'\]"),
    ],
)
def test_bad_guidance_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(*arguments)


def test_guidance_that_does_not_fit_the_conditions_is_refused():
    for negative, message in (
        ({"prompt": NEGATIVE}, r"negative is \['prompt'\], expected keys of"),
        ({"text": randn(3, 3)}, "expected batch 2 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Trajectory(
                Sampler(field, FlowEuler(), 3, guidance=Guidance(2.0, negative)), NOISE, CONDITIONS
            )


@pytest.mark.parametrize("make", [FlowEuler, FlowUniPC, diffusers_unipc])
def test_a_chain_carries_the_gradient_through_latents_and_history(make):
    trajectory = Trajectory(Sampler(field, make(), 8), NOISE, CONDITIONS)
    trajectory.run(2)
    before = trajectory.x
    for _ in range(3):
        trajectory.follow(trajectory.solve(trajectory.velocity()))
    assert trajectory.index == 5 and trajectory.x.requires_grad
    (ours,) = torch.autograd.grad(trajectory.x.square().sum(), WEIGHT)
    trajectory.cut()
    assert not trajectory.x.requires_grad

    solver, x = make(), NOISE
    solver.set_timesteps(8)
    for i, t in enumerate(solver.timesteps[:5]):
        with torch.set_grad_enabled(i >= 2):
            v = field(x, torch.full((2,), float(t), dtype=x.dtype), CONDITIONS)
            x = solver.step(v, t, x, return_dict=False)[0]
        if i == 1:
            assert torch.equal(x, before)
    (theirs,) = torch.autograd.grad(x.square().sum(), WEIGHT)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert torch.equal(trajectory.x, x.detach())
    # After the cut nothing of the graph is left: the next gradient is of one step alone.
    held = trajectory.x
    trajectory.move_to(trajectory.solve(trajectory.velocity()))
    assert not trajectory.x.requires_grad and trajectory.index == 6 and held.grad_fn is None


def test_velocity_and_solve_differentiate_latents_that_are_given():
    trajectory = Trajectory(Sampler(field, FlowEuler(), 8), NOISE, CONDITIONS, start=3)
    x = (2 * NOISE).requires_grad_()
    out = trajectory.solve(trajectory.velocity(x, 5), x)
    (ours,) = torch.autograd.grad(out.sum(), x)
    y = x.detach().requires_grad_()
    delta = trajectory.sigma(4) - trajectory.sigma(3)
    expected = y + delta * field(y, trajectory.model_timestep(5), CONDITIONS)
    (theirs,) = torch.autograd.grad(expected.sum(), y)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert trajectory.index == 3 and torch.equal(trajectory.x, NOISE)


def test_an_adjusted_velocity_is_the_one_that_is_taken():
    calls = []

    def adjust(index, v):
        calls.append((index, trajectory.index, trajectory.x))
        return v + index * NOISE

    trajectory = Trajectory(Sampler(field, FlowEuler(), 4), NOISE, CONDITIONS, start=1)
    trajectory.run(3, adjust=adjust)
    x, sigma = NOISE, trajectory.sigma
    with torch.no_grad():
        for index in (1, 2):
            assert calls[index - 1][:2] == (index, index)
            torch.testing.assert_close(calls[index - 1][2], x, rtol=1e-13, atol=1e-13)
            v = field(x, trajectory.model_timestep(index), CONDITIONS) + index * NOISE
            x = x + (sigma(index + 1) - sigma(index)) * v
    torch.testing.assert_close(trajectory.x, x, rtol=1e-13, atol=1e-13)


def test_samples_of_a_batch_do_not_meet():
    both = rollout(field, NOISE, CONDITIONS, FlowUniPC(), 5)
    for b in range(2):
        one = rollout(field, NOISE[b : b + 1], {"text": TEXT[b : b + 1]}, FlowUniPC(), 5)
        torch.testing.assert_close(both[b : b + 1], one, rtol=1e-12, atol=1e-12)


def test_progress_counts_the_steps_that_are_taken(capsys):
    settings = RolloutConfig(stride=4)
    rollout(field, NOISE, CONDITIONS, FlowEuler(), 12, rollout_config=settings, progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_model_call_is_the_model_under_autocast():
    model = tiny_wan()
    x, timestep, conditions = inputs()
    call = ModelCall(model, "bf16")
    assert model_of(call) is model and model_of(model) is model and model_of(field) is None
    out = call(x, timestep, conditions)
    with torch.autocast("cpu", torch.bfloat16):
        (theirs,) = model(x, timestep, conditions["encoder_hidden_states"], return_dict=False)
    assert torch.equal(out, theirs.to(x.dtype))
    plain = ModelCall(model, "fp32")(x, timestep, conditions)
    assert not torch.equal(out, plain)
    (theirs,) = model(x, timestep, conditions["encoder_hidden_states"], return_dict=False)
    assert torch.equal(plain, theirs)


def test_a_model_call_is_checked_like_its_model():
    x, _, conditions = inputs()
    call = ModelCall(tiny_wan())
    with pytest.raises(ValueError, match="channels are 15 of x, expected 16"):
        Trajectory(Sampler(call, FlowEuler(), 3), x[:, :15], conditions)
    with pytest.raises(ValueError, match="precision is 'fp16'"):
        ModelCall(tiny_wan(), "fp16")
    with pytest.raises(TypeError, match="supported"):
        ModelCall(nn.Linear(2, 2))


def test_a_config_or_guidance_of_another_type_is_refused():
    x = torch.zeros(1, 2, 1, 2, 2)
    with pytest.raises(TypeError, match="guidance is 3.0, expected Guidance or None"):
        rollout(field, x, {}, FlowEuler(), 2, guidance=3.0)
    with pytest.raises(TypeError, match="rollout_config is 3, expected RolloutConfig or"):
        rollout(field, x, {}, FlowEuler(), 2, rollout_config=3)
    with pytest.raises(TypeError, match="rollout is 3, expected RolloutConfig or None"):
        Sampler(field, FlowEuler(), 2, rollout=3)
