"""Fewer steps: drift of the rollout engine against values computed by hand."""

import math

import pytest
import torch
from engine_world import SIGMAS, assert_same, field, make_x, no_warning, walk

from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import Trajectory, rollout

# Fewer steps, with a velocity whose drift can be computed by hand.

RATE = 0.7


def linear(x, timestep, conditions):
    """v = RATE·x, so that an Euler step from σ to σ' multiplies x by 1 + (σ'-σ)·RATE."""
    return RATE * x


def euler_walk(config, visit=(3,), **options):
    options |= {"scheduler": FlowEuler(), "visit": visit, "steps": 6}
    return walk(linear, make_x(), {}, config, **options)


def factor(here, there):
    return 1 + (SIGMAS[there] - SIGMAS[here]) * RATE


def product(*kept):
    return math.prod(factor(a, b) for a, b in zip(kept, kept[1:], strict=False))


def test_drift_of_fewer_steps_is_what_one_computes_by_hand():
    engine = RolloutEngine(linear, RolloutConfig(stride=3))
    seen, trajectory = euler_walk(engine, (3, 4))
    # 0 → 3 in one step, 3 → 4 and 4 → 5 with gradient, exactly.
    torch.testing.assert_close(seen[3], make_x() * factor(0, 3))
    expected = abs(factor(0, 3) / product(0, 1, 2, 3) - 1)
    assert list(trajectory.drift) == [3, 4] and expected > 0.005
    assert trajectory.drift[3] == pytest.approx(expected, rel=1e-9)
    assert trajectory.drift[4] == pytest.approx(expected, rel=1e-9)
    assert engine.drift == trajectory.drift and not engine.fallen_back
    # To the end, 5 → 6 is a step of its own: only the distance that was there already.
    trajectory.run(6)
    assert trajectory.drift[6] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(trajectory.x, make_x() * product(0, 3, 4, 5, 6))


@pytest.mark.parametrize("start", [0, 1])
def test_a_check_begins_where_the_trajectory_did(start):
    """A gradient step came before the first step of the rollout."""
    engine = RolloutEngine(linear, RolloutConfig(stride=4))
    seen, trajectory = euler_walk(engine, (start, 4), start=start)
    first = start + 1
    torch.testing.assert_close(seen[4], make_x() * product(start, first, 4))
    expected = abs(factor(first, 4) / product(*range(first, 5)) - 1)
    assert trajectory.drift[4] == pytest.approx(expected, rel=1e-9) and expected > 0.005


def test_the_stride_of_a_step_is_that_of_the_level_where_it_begins():
    # Levels of the six steps: 1, 0.953, 0.883, 0.771, 0.562, 0.024.
    config = RolloutConfig(stride=((0.96, 1.0, 2), (0.0, 0.7, 9)))
    engine = RolloutEngine(linear, config)
    seen, trajectory = euler_walk(engine, ())
    assert engine.inexact and trajectory.steps_to(6) == 4
    trajectory.run(6)
    torch.testing.assert_close(trajectory.x, make_x() * product(0, 2, 3, 4, 6))
    exact = product(*range(7))
    assert trajectory.drift[6] == pytest.approx(abs(product(0, 2, 3, 4, 6) / exact - 1), rel=1e-9)
    assert not RolloutEngine(linear, RolloutConfig(stride=((0.0, 1.0, 1),))).inexact


def test_drift_is_the_largest_of_the_batch():
    x = make_x(3)
    rates = torch.tensor([0.0, 0.9, 0.3], dtype=torch.float64).view(3, 1, 1, 1, 1)
    engine = RolloutEngine(field, RolloutConfig(stride=6))
    rollout(lambda x, t, c: rates * x, x, {}, FlowEuler(), 6, rollout_config=engine)
    one = 1 - 0.9 * SIGMAS[0]
    several = math.prod(1 + (b - a) * 0.9 for a, b in zip(SIGMAS, SIGMAS[1:], strict=False))
    assert engine.drift == {6: pytest.approx(abs(one / several - 1), rel=1e-9)}


def test_past_the_limit_the_exact_latents_go_on_and_later_rollouts_are_exact():
    drift = abs(factor(0, 3) / product(0, 1, 2, 3) - 1)
    plain, _ = euler_walk(None)
    engine = RolloutEngine(linear, RolloutConfig(stride=3, drift_limit=1.01 * drift))
    with no_warning():
        kept, _ = euler_walk(engine)
    assert not torch.equal(kept[3], plain[3]) and not engine.fallen_back
    engine = RolloutEngine(linear, RolloutConfig(stride=3, drift_limit=0.99 * drift, check_every=1))
    with pytest.warns(RuntimeWarning) as said:
        fallen, trajectory = euler_walk(engine)
        trajectory.run(6)
    (warning,) = [str(w.message) for w in said]
    for figure in (f"{drift:.3g} at step 3", f"{0.99 * drift:g}", f"sigma {SIGMAS[3]:.3g}"):
        assert figure in warning
    assert_same(fallen, plain)
    assert torch.equal(trajectory.x, rollout(linear, make_x(), {}, FlowEuler(), 6))
    assert engine.fallen_back and not engine.inexact and not engine.skips
    with no_warning():
        later, trajectory = euler_walk(engine)
    assert_same(later, plain)
    assert trajectory.drift is None and trajectory.steps_to(6) == 2


def test_a_drift_that_is_not_a_number_is_past_every_limit():
    def broken(x, timestep, conditions):  # only where a step is left out
        return x * (math.nan if calls.append(1) or len(calls) == 1 else 1.0)

    calls = []
    engine = RolloutEngine(broken, RolloutConfig(stride=3, drift_limit=1e9))
    with pytest.warns(RuntimeWarning, match="nan at step 3"):
        out = rollout(broken, make_x(), {}, FlowEuler(), 6, rollout_config=engine)
    assert engine.fallen_back and out.isfinite().all()


def test_unipc_goes_on_from_the_exact_history():
    x = make_x()

    def curved(x, timestep, conditions):
        return torch.tanh(x) * timestep.view(-1, 1, 1, 1, 1) / 500

    plain, _ = walk(curved, x, {}, None, steps=9, visit=(4, 7))
    engine = RolloutEngine(curved, RolloutConfig(stride=2, drift_limit=1e-9))
    with pytest.warns(RuntimeWarning):
        ours, _ = walk(curved, x, {}, engine, steps=9, visit=(4, 7))
    assert_same(ours, plain)


def test_what_guides_a_step_guides_the_exact_rollout_too():
    """Otherwise the guidance itself would count as drift."""
    x = make_x()
    engine = RolloutEngine(linear, RolloutConfig(stride=3))
    trajectory = Trajectory(Sampler(linear, FlowEuler(), 6), x, {}, engine=engine, visit=(3,))
    trajectory.run(6, adjust=lambda index, v: v + 5 * x if index == 3 else v)
    a, b = factor(0, 3), product(0, 1, 2, 3)
    pushed = (SIGMAS[4] - SIGMAS[3]) * 5
    a4, b4 = a * factor(3, 4) + pushed, b * factor(3, 4) + pushed
    assert trajectory.drift[4] == pytest.approx(abs(a4 / b4 - 1), rel=1e-9)


def test_which_trajectories_are_checked_survives_a_resume():
    config = RolloutConfig(stride=3, check_every=3)

    def checked(engine, count):
        return [euler_walk(engine)[1].drift is not None for _ in range(count)]

    whole = checked(RolloutEngine(linear, config), 7)
    assert whole == [True, False, False, True, False, False, True]
    first, second = RolloutEngine(linear, config), RolloutEngine(linear, config)
    before = checked(first, 2)
    second.load_state_dict(first.state_dict())
    assert before + checked(second, 5) == whole
    # A trajectory without a rollout is neither counted nor checked.
    _, trajectory = euler_walk(second, (0,))
    assert second.trajectories == 7 and trajectory.drift is None
    second.fallen_back = True
    third = RolloutEngine(linear, RolloutConfig(stride=3))
    with pytest.warns(RuntimeWarning, match="all rollouts are exact: before the checkpoint"):
        third.load_state_dict(second.state_dict())
    assert third.fallen_back and not third.inexact
    with pytest.raises(ValueError, match="expected fallen_back"):
        third.load_state_dict({"trajectories": 1})
