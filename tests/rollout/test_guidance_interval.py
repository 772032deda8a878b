"""Rollouts with guidance in an interval of noise levels, against a loop over the plain model."""

import pytest
import torch
from engine_world import make_wan, wan_inputs

from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import Trajectory, relative_distance, rollout

STEPS, SCALE, INTERVAL = 6, 4.0, (0.6, 0.95)


def loop(velocity, x, conditions, negative, interval, exact=()):
    """Sample with Euler steps; return the latents after each, and the calls of the model."""
    levels = Trajectory(Sampler(velocity, FlowEuler(), STEPS), x, conditions)
    seen, calls = [], 0
    for index in range(STEPS):
        sigma, timestep = levels.sigma(index), levels.model_timestep(index)
        v = velocity(x, timestep, conditions)
        calls += 1
        if index in exact or interval[0] <= sigma <= interval[1]:
            v_negative = velocity(x, timestep, {**conditions, **negative})
            v, calls = v_negative + SCALE * (v - v_negative), calls + 1
        x = x + (levels.sigma(index + 1) - sigma) * v
        seen.append(x)
    return seen, calls


@pytest.mark.cases(1)
@pytest.mark.parametrize("options", [{}, {"cache": False}, {"teacache": 1e-30}])
@pytest.mark.parametrize("batched", [True, False])
def test_steps_outside_the_interval_have_no_guidance(batched, options):
    x, conditions = wan_inputs()
    negative = {"encoder_hidden_states": wan_inputs(seed=7)[1]["encoder_hidden_states"]}
    model = make_wan()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    plain = lambda x, t, c: model(x, t, **c, return_dict=False)[0]  # noqa: E731
    config = RolloutConfig(guidance_interval=INTERVAL, compile="off", **options)
    engine = RolloutEngine(model, config)
    sampler = Sampler(model, FlowEuler(), STEPS, Guidance(SCALE, negative, batched), config)
    trajectory = Trajectory(sampler, x, conditions, engine=engine, visit=(1,))
    seen = []
    with torch.no_grad():
        trajectory.run(1, lambda: seen.append(trajectory.x))
        trajectory.move_to(trajectory.solve(trajectory.velocity()))  # a gradient step has guidance
        seen.append(trajectory.x)
        trajectory.run(STEPS, lambda: seen.append(trajectory.x))
        expected, _ = loop(plain, x, conditions, negative, INTERVAL, exact=(1,))
        exact, _ = loop(plain, x, conditions, negative, (0.0, 1.0))
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    assert engine.inexact
    distance = float(relative_distance(expected[-1], exact[-1]))
    assert trajectory.drift[STEPS] == pytest.approx(distance, rel=1e-3) and distance > 1e-3


def test_steps_outside_the_interval_run_one_branch():
    calls = []

    def velocity(x, timestep, conditions):
        calls.append(len(x))
        return x * conditions["scale"].view(-1, 1, 1, 1, 1)

    x, _ = wan_inputs()
    conditions, negative = {"scale": torch.ones(2)}, {"scale": torch.zeros(2)}
    guidance = Guidance(SCALE, negative)
    config = RolloutConfig(guidance_interval=INTERVAL)
    engine = RolloutEngine(velocity, config)
    engine.trajectories = 1  # the first would be checked
    rollout(velocity, x, conditions, FlowEuler(), STEPS, guidance=guidance, rollout_config=engine)
    levels = Trajectory(Sampler(velocity, FlowEuler(), STEPS), x, conditions)
    inside = [INTERVAL[0] <= levels.sigma(i) <= INTERVAL[1] for i in range(STEPS)]
    assert calls == [4 if guided else 2 for guided in inside] and 0 < sum(inside) < STEPS


def test_an_interval_that_holds_all_levels_changes_no_bit():
    x, conditions = wan_inputs()
    negative = {"encoder_hidden_states": wan_inputs(seed=7)[1]["encoder_hidden_states"]}
    model = make_wan()
    found = [
        rollout(
            model,
            x,
            conditions,
            FlowEuler(),
            STEPS,
            guidance=Guidance(SCALE, negative),
            rollout_config=RolloutConfig(guidance_interval=interval),
        )
        for interval in (None, (0.0, 1.0))
    ]
    assert torch.equal(*found)


def test_an_interval_without_guidance_is_refused():
    config = RolloutConfig(guidance_interval=INTERVAL)
    with pytest.raises(ValueError, match="guidance_interval is .*None without guidance"):
        Sampler(make_wan(), FlowEuler(), STEPS, rollout=config)
