"""Figures of a comparison against published values and calculations by hand."""

import math

import pytest
import torch
from toy_flow import CONDITIONS, NEGATIVE, NOISE, reward, velocity

from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.sampling.compare import (
    compare_scores,
    drift_steps,
    mean_interval,
    record_velocities,
    rewards_by_timestep,
    velocity_drift,
    wilson_interval,
    win_rate,
)

pytest.importorskip("safetensors")


# Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(wins, count, low, high):
    found = wilson_interval(wins, count)
    assert found == pytest.approx((low, high), abs=5e-5)
    mirrored = wilson_interval(count - wins, count)
    assert mirrored == pytest.approx((1 - found[1], 1 - found[0]), abs=1e-12)


def test_win_rates_by_hand():
    # Seven wins, two losses and a tie: p = 0.75, z² = 3.841459.
    found = win_rate([1.0] * 7 + [0.0] * 2 + [0.5], [0.5] * 10)
    assert found[:4] == (7, 2, 1, 0.75)
    center = (0.75 + 3.841459 / 20) / 1.3841459
    half = 1.959964 * math.sqrt(0.1875 / 10 + 3.841459 / 400) / 1.3841459
    assert found[4:] == pytest.approx((center - half, center + half), abs=1e-6)
    assert wilson_interval(5, 10)[0] < 0.5 < wilson_interval(5, 10)[1]
    with pytest.raises(ValueError, match="count is 0"):
        win_rate([], [])


def test_the_interval_of_a_mean():
    value, half = mean_interval([1.0, 2.0, 3.0, 6.0])
    # variance (4 + 1 + 0 + 9) / 3, over four values
    assert value == 3 and half == pytest.approx(1.959964 * math.sqrt(14 / 3 / 4), abs=1e-6)
    assert mean_interval([2.0]) == (2.0, None)


def test_rewards_are_of_noised_latents():
    x, noise, text = NOISE[:1].float(), NOISE[1:].float(), {"text": CONDITIONS["text"][:1].float()}
    found = rewards_by_timestep(reward, x, text, noise, [(0.25, 250.0), (0.7, 700.0)])
    for score, (sigma, t) in zip(found, [(0.25, 250.0), (0.7, 700.0)], strict=True):
        wanted = reward((1 - sigma) * x + sigma * noise, torch.tensor([t]), text)
        assert score == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("guided", [False, True])
def test_drift_is_measured_at_the_latents_of_the_base(tmp_path, guided):
    guidance = Guidance(2.0, NEGATIVE, batched=False) if guided else None
    text, file = {"text": CONDITIONS["text"][:1]}, tmp_path / "drift.safetensors"
    base = Sampler(velocity, FlowUniPC(5.0), 12, guidance)
    record_velocities(base, NOISE[:1], text, file)
    assert velocity_drift(base, text, file) == dict.fromkeys(drift_steps(12), 0.0)

    def scaled(x, timestep, conditions):
        return velocity(x, timestep, conditions) * (1 + timestep.view(-1, 1, 1, 1, 1) / 4000)

    moved = Sampler(scaled, FlowUniPC(5.0), 12, guidance)
    found = velocity_drift(moved, text, file)
    scheduler = FlowUniPC(5.0)
    scheduler.set_timesteps(12)
    for step, value in found.items():
        assert value == pytest.approx(float(scheduler.timesteps[step]) / 4000, rel=1e-6)


def test_drift_steps_are_spread_over_the_schedule():
    assert drift_steps(40) == [0, 6, 11, 17, 22, 28, 33, 39]
    assert drift_steps(3) == [0, 1, 2] and drift_steps(1) == [0]


def test_a_comparison_has_every_pair_once():
    scores = {
        "motion": {
            "base": [[0.1, 0.3], [0.2, 0.4]],
            "a": [[0.2, 0.4], [0.1, 0.1]],
            "b": [[0.9, 0.1], [0.5, 0.3]],
        }
    }
    found = compare_scores(scores, {"a": [{0: 0.1, 5: 0.3}, {0: 0.3, 5: 0.5}]})
    assert found["rewards"]["motion"]["a"]["mean"] == pytest.approx([0.15, 0.25])
    wins = {(w["arm"], w["against"]): (w["wins"], w["losses"]) for w in found["wins"]}
    assert wins == {("a", "base"): (1, 1), ("b", "base"): (2, 0), ("b", "a"): (2, 0)}
    assert found["drift"]["a"] == pytest.approx({"0": 0.2, "5": 0.4})
