"""Trajectories against the textbook: guidance, chains, starts inside, fewer steps."""

import math

import pytest
import textbook
import torch
from prfl_world import diffusers_euler, diffusers_unipc
from torch import nn
from toy_flow import CONDITIONS, NOISE, gaussian
from wan import inputs, tiny_wan

from prfl_fast.models.registry import find_adapter, patch
from prfl_fast.models.velocity import ModelCall, model_of
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.kept_steps import strided_steps
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC, schedule_sigmas
from prfl_fast.rollout.trajectory import Trajectory, rollout

TEXT, NEGATIVE = CONDITIONS["text"], gaussian(2, 4, seed=3)
WEIGHT = gaussian(3, 3, seed=4).requires_grad_()


def field(x, timestep, conditions):
    """Return a velocity that mixes channels and depends on all its arguments, sample by sample."""
    turned = torch.einsum("oc,bcfhw->bofhw", WEIGHT, x)
    shift = conditions["text"].sum(1) * (1 + timestep.to(x.dtype) / 1000)
    return torch.tanh(turned + shift.view(-1, 1, 1, 1, 1)) - 0.1 * x


def velocity(x, timestep):
    return field(x, torch.full((len(x),), float(timestep), dtype=x.dtype), CONDITIONS)


def walk(solver, function=velocity):
    """Return where all steps of a textbook's solver lead, without gradient."""
    return textbook.sample(textbook.World(function, None), solver, NOISE, 0, solver.count)


def follow(scheduler, x, timesteps):
    """Take the steps of a scheduler one by one."""
    for t in timesteps:
        x = scheduler.step(velocity(x, t), t, x, return_dict=False)[0]
    return x


def trajectory_of(scheduler, count, **options):
    guidance = options.pop("guidance", None)
    return Trajectory(Sampler(field, scheduler, count, guidance), NOISE, CONDITIONS, **options)


def strided(stride, scheduler=None, **options):
    engine = RolloutEngine(field, RolloutConfig(stride=stride, check_every=1000))
    engine.trajectories = 1  # the first would be checked
    return trajectory_of(scheduler or FlowEuler(), 12, engine=engine, **options)


@pytest.mark.filterwarnings("error")
def test_strided_euler_is_euler_on_the_coarser_schedule():
    trajectory = strided(4)
    assert trajectory.steps_to(12) == 3
    steps = []
    trajectory.run(12, lambda: steps.append(trajectory.index))
    assert steps == [4, 8, 12]
    coarse = walk(textbook.Euler(12, kept=(0, 4, 8, 12)))
    torch.testing.assert_close(trajectory.x, coarse, rtol=1e-13, atol=1e-13)
    assert not torch.allclose(trajectory.x, walk(textbook.Euler(12)), rtol=1e-3)


class Predictor(textbook.UniPC):
    """UniPC without its corrector."""

    def correct(self, i, x, estimate):
        return x


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
    x = follow(scheduler, NOISE, scheduler.timesteps).detach()
    torch.testing.assert_close(x, walk(textbook.UniPC(8, kept=kept)), rtol=1e-10, atol=1e-12)
    # The last step leads to x0, whatever the corrector made of x.
    plain = walk(Predictor(8, kept=kept))
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
    assert strided_steps(start, 12, [5] * 13, visit) == expected
    trajectory = strided(5, visit=visit, start=start)
    seen = [trajectory.index]
    with torch.no_grad():
        for step in visit:
            trajectory.run(step, lambda: seen.append(trajectory.index))
            trajectory.move_to(trajectory.solve(trajectory.velocity()))
            seen.append(trajectory.index)
        trajectory.run(12, lambda: seen.append(trajectory.index))
    assert seen == expected
    reference = walk(textbook.Euler(12, kept=expected))
    torch.testing.assert_close(trajectory.x, reference, rtol=1e-13, atol=1e-13)


def test_fewer_steps_refuse_what_they_cannot_do():
    trajectory = strided(5, visit=(7,))
    with pytest.raises(ValueError, match="stop is 3.*visit"):
        trajectory.run(3)
    with pytest.raises(ValueError, match="next step is 5, expected step 1.*visit"):
        trajectory.solve(NOISE)
    assert trajectory.index == 0
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler.*stride"):
        strided(2, diffusers_euler())
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


def with_order(order, visit=(), *, stride=1, scheduler=None, x=NOISE):
    """Return the latents after each of 12 steps of which ``visit`` have gradient."""
    config = RolloutConfig(solver_order=order, stride=stride, check_every=1000)
    engine = RolloutEngine(field, config)
    engine.trajectories = 1  # the first would be checked
    sampler = Sampler(field, scheduler or FlowUniPC(), 12, rollout=config)
    trajectory = Trajectory(sampler, x, CONDITIONS, engine=engine, visit=visit)
    seen = []
    with torch.no_grad():
        for step in visit:
            trajectory.run(step, lambda: seen.append(trajectory.x))
            trajectory.move_to(trajectory.solve(trajectory.velocity()))
            seen.append(trajectory.x)
        trajectory.run(12, lambda: seen.append(trajectory.x))
    return seen


def by_hand(orders, kept=range(12)):
    scheduler = FlowUniPC()
    scheduler.set_timesteps(12)
    scheduler.restrict(list(kept), orders)
    x, seen = NOISE, []
    with torch.no_grad():
        for t in scheduler.timesteps:
            (x,) = scheduler.step(velocity(x, t), t, x)
            seen.append(x)
    return seen


def test_orders_follow_the_noise_level_and_leave_gradient_steps_alone():
    sigmas = trajectory_of(FlowUniPC(), 12)._sigmas
    levels = ((0.9, 1.0, 1), (0.5, 0.8, 3))
    orders = [1 if s >= 0.9 else 3 if 0.5 <= s <= 0.8 else 2 for s in sigmas[:12]]
    assert set(orders) == {1, 2, 3}
    for visit in ((), (2, 7, 8)):
        expected = [2 if i in visit else order for i, order in enumerate(orders)]
        assert expected != orders or not visit
        seen = with_order(levels, visit)
        assert all(map(torch.equal, seen, by_hand(expected)))
    strides = by_hand([3, 3, 3], [0, 4, 8])
    assert all(map(torch.equal, with_order(3, stride=4), strides))
    exact = with_order(None)
    assert all(map(torch.equal, exact, with_order(2))) and len(exact) == 12
    assert all(map(torch.equal, exact, with_order(((0.0, 0.0, 3),))))  # outside of it
    assert not torch.equal(exact[-1], with_order(1)[-1])


def test_drift_of_an_order_is_checked_and_past_its_limit_the_rollout_is_exact():
    exact = with_order(None)
    config = RolloutConfig(solver_order=1, drift_limit=1e-9)
    engine = RolloutEngine(field, config)
    trajectory = Trajectory(Sampler(field, FlowUniPC(), 12), NOISE, CONDITIONS, engine=engine)
    with pytest.warns(RuntimeWarning, match="past drift_limit"):
        trajectory.run(12)
    assert engine.fallen_back and not engine.sets_order and len(engine.drift) == 2
    assert torch.equal(trajectory.x, exact[-1])


@pytest.mark.parametrize("make", [FlowEuler, diffusers_euler, diffusers_unipc])
def test_other_schedulers_refuse_an_order(make):
    name = type(make()).__name__
    message = f"scheduler is '{name}', expected FlowUniPC with solver_order"
    with pytest.raises(ValueError, match=message):
        Sampler(field, make(), 12, rollout=RolloutConfig(solver_order=2))
    engine = RolloutEngine(field, RolloutConfig(solver_order=((0, 1, 1),)))
    with pytest.raises(ValueError, match=message):
        trajectory_of(make(), 12, engine=engine)


@pytest.mark.parametrize("make", [FlowEuler, FlowUniPC, diffusers_euler, diffusers_unipc])
def test_noise_levels_and_a_start_inside_the_schedule(make):
    solver = make()
    solver.set_timesteps(9)
    trajectory = trajectory_of(make(), 9, start=4)
    assert [trajectory.sigma(i) for i in range(10)] == solver.sigmas.tolist()
    assert trajectory.sigma(9) == 0 and trajectory.index == 4
    assert trajectory.model_timestep(4).tolist() == [solver.timesteps[4].item()] * 2
    trajectory.run(9)
    assert torch.equal(trajectory.x, follow(solver, NOISE, solver.timesteps[4:]))


def test_a_start_is_found_where_truncated_timesteps_repeat():
    """At 800 steps of UniPC many timesteps are the same integer."""
    scheduler = FlowUniPC()
    scheduler.set_timesteps(800)
    times = scheduler.timesteps.tolist()
    start = next(i for i in range(1, 800) if times[i] == times[i - 1])
    trajectory = trajectory_of(FlowUniPC(), 800, start=start)
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
        trajectory_of(FlowEuler(), 9, **steps)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_is_its_formula_in_rollout_and_gradient(batched):
    guidance = Guidance(3.5, {"text": NEGATIVE}, batched=batched)

    def negative(x, t):
        return field(x, torch.full((2,), t, dtype=x.dtype), {"text": NEGATIVE})

    guided = textbook.guided(velocity, negative, 3.5)
    trajectory = trajectory_of(FlowEuler(), 6, guidance=guidance)
    trajectory.run(3)
    solver = textbook.Euler(6, kept=range(4))
    torch.testing.assert_close(trajectory.x, walk(solver, guided), rtol=1e-12, atol=1e-12)
    x = trajectory.x.clone().requires_grad_()
    ours = torch.autograd.grad(trajectory.velocity(x).square().sum(), [x, WEIGHT])
    y = x.detach().requires_grad_()
    v = guided(y, solver.timesteps[3])
    theirs = torch.autograd.grad(v.square().sum(), [y, WEIGHT])
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    sampled = rollout(field, NOISE, CONDITIONS, FlowEuler(), 6, guidance=guidance, stop=3)
    assert torch.equal(sampled, trajectory.x)


def test_a_negative_of_one_serves_the_batch_and_other_conditions_are_shared():
    seen = []

    def record(x, t, conditions):
        seen.append(conditions)
        return field(x, t, conditions)

    conditions = {"text": TEXT, "image": gaussian(2, 5, seed=8)}
    for batched in (True, False):
        seen.clear()
        guidance = Guidance(2.0, {"text": NEGATIVE[:1]}, batched=batched)
        rollout(record, NOISE, conditions, FlowEuler(), 3, stop=1, guidance=guidance)
        negative = {k: v[2:] for k, v in seen[0].items()} if batched else seen[1]
        assert len(seen) == (1 if batched else 2)
        assert torch.equal(negative["text"], NEGATIVE[:1].expand(2, 4))
        assert torch.equal(negative["image"], conditions["image"])


def test_sequential_guidance_takes_prompts_of_different_lengths():
    long, given = {"text": gaussian(2, 5, seed=9)}, (field, NOISE, CONDITIONS, FlowEuler(), 3)
    assert rollout(*given, guidance=Guidance(2.0, long, batched=False)).isfinite().all()
    with pytest.raises(ValueError, match=r"negative\['text'\].*batched=False"):
        rollout(*given, guidance=Guidance(2.0, long))


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
        ({"text": gaussian(3, 4)}, "expected batch 2 or 1"),
    ):
        with pytest.raises(ValueError, match=message):
            trajectory_of(FlowEuler(), 3, guidance=Guidance(2.0, negative))


@pytest.mark.parametrize("make", [FlowEuler, FlowUniPC, diffusers_unipc])
def test_a_chain_carries_the_gradient_through_latents_and_history(make):
    trajectory = trajectory_of(make(), 8)
    trajectory.run(2)
    before = trajectory.x
    for _ in range(3):
        trajectory.follow(trajectory.solve(trajectory.velocity()))
    assert trajectory.index == 5 and trajectory.x.requires_grad
    (ours,) = torch.autograd.grad(trajectory.x.square().sum(), WEIGHT)
    trajectory.cut()
    assert not trajectory.x.requires_grad

    solver = make()
    solver.set_timesteps(8)
    with torch.no_grad():
        x = follow(solver, NOISE, solver.timesteps[:2])
    assert torch.equal(x, before)
    x = follow(solver, x, solver.timesteps[2:5])
    (theirs,) = torch.autograd.grad(x.square().sum(), WEIGHT)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert torch.equal(trajectory.x, x.detach())
    # After the cut nothing of the graph is left: the next gradient is of one step alone.
    held = trajectory.x
    trajectory.move_to(trajectory.solve(trajectory.velocity()))
    assert not trajectory.x.requires_grad and trajectory.index == 6 and held.grad_fn is None


def test_velocity_and_solve_differentiate_latents_that_are_given():
    trajectory = trajectory_of(FlowEuler(), 8, start=3)
    x = (2 * NOISE).requires_grad_()
    out = trajectory.solve(trajectory.velocity(x, 5), x)
    (ours,) = torch.autograd.grad(out.sum(), x)
    y = x.detach().requires_grad_()
    delta = trajectory.sigma(4) - trajectory.sigma(3)
    expected = y + delta * velocity(y, textbook.Euler(8).timesteps[5])
    (theirs,) = torch.autograd.grad(expected.sum(), y)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert trajectory.index == 3 and torch.equal(trajectory.x, NOISE)


def test_an_adjusted_velocity_is_the_one_that_is_taken():
    calls = []

    def adjust(index, v):
        calls.append((index, trajectory.index, trajectory.x))
        return v + index * NOISE

    trajectory = trajectory_of(FlowEuler(), 4, start=1)
    trajectory.run(3, adjust=adjust)
    x, solver = NOISE, textbook.Euler(4)
    for index in (1, 2):
        assert calls[index - 1][:2] == (index, index)
        torch.testing.assert_close(calls[index - 1][2], x, rtol=1e-13, atol=1e-13)
        v = velocity(x, solver.timesteps[index]).detach() + index * NOISE
        x = solver.step(index, v, x)
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


def test_the_text_of_a_negative_prompt_is_checked_as_its_own():
    model, (x, _, conditions) = tiny_wan(text_tokens=9), inputs()
    negative = {"encoder_hidden_states": torch.zeros(1, 10, 20)}
    with pytest.raises(ValueError, match="guidance negative: .*expected 1 to 9 text tokens"):
        rollout(model, x, conditions, FlowUniPC(), 2, guidance=Guidance(2.0, negative, False))


@pytest.mark.cases(4)
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("reblend", [False, True], ids=["diffusers", "official"])
@pytest.mark.parametrize("make", [FlowUniPC, FlowEuler, diffusers_unipc])
def test_a_given_first_frame_as_in_the_public_loops(make, reblend, patched):
    """Diffusers blends what the model sees, and the result; official Wan2.2 every result."""
    x, _, conditions = inputs("first-frame")
    model = patch(tiny_wan()) if patched else tiny_wan()
    first, text = conditions["first_frame"], conditions["encoder_hidden_states"]
    mask = torch.ones(1, 1, *x.shape[2:])
    mask[:, :, 0] = 0

    def blend(latents):
        return (1 - mask) * first + mask * latents

    scheduler, latents = make(), x
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            per_token = (mask[0, 0, :, ::2, ::2] * t).flatten().expand(len(x), -1)
            if patched:  # the kernels round differently from diffusers' blocks
                v = find_adapter(model).velocity(model, blend(latents), t, conditions)
            else:
                v = model(blend(latents), per_token, text, return_dict=False)[0]
            latents = scheduler.step(v, t, latents, return_dict=False)[0]
            latents = blend(latents) if reblend else latents
    for config in (None, RolloutConfig()) if patched else (None,):
        ours = rollout(model, x, conditions, make(), 4, rollout_config=config)
        assert torch.equal(ours, blend(latents))
        assert torch.equal(ours[:, :, :1], first)
