"""Figures that compare generators on the same prompts and noise: rewards, win rates, drift."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist, mean, stdev
from typing import Any, NamedTuple

import torch

from prfl_fast.kernels import flow_step
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.rewards.functions import Reward
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import load_tensors, save_tensors

CONFIDENCE = 0.95


class WinRate(NamedTuple):
    """Count the videos on which one generator scores higher, with an interval of the rate.

    ``rate`` is (wins + ties / 2) / n; ``low`` and ``high`` are Wilson's interval of it.
    """

    wins: int
    losses: int
    ties: int
    rate: float
    low: float
    high: float


def wilson_interval(
    successes: float, count: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return Wilson's score interval of a binomial proportion (Wilson, JASA 22, 1927).

    With p = successes / count and the normal quantile z of ``confidence``, the bounds are ``(p +
    z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)``. A tie may count as half a success.

    Raises:
        ValueError: if ``count`` is not positive, or there are more successes.
    """
    check(count > 0, "count", count, "a positive integer")
    check(0 <= successes <= count, "successes", successes, f"a number in [0, {count}]")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, scale = successes / count, 1 + z**2 / count
    center = (p + z**2 / (2 * count)) / scale
    half = z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def win_rate(scores: Sequence[float], others: Sequence[float]) -> WinRate:
    """Return how often ``scores`` are higher than the ``others`` of the same videos.

    Videos count as independent; several of one prompt are so only in part.
    """
    check(len(scores) == len(others), "scores", len(scores), f"{len(others)}, as many as others")
    pairs = list(zip(scores, others, strict=True))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    ties = len(pairs) - wins - losses
    successes = wins + ties / 2
    low, high = wilson_interval(successes, len(pairs))
    return WinRate(wins, losses, ties, successes / len(pairs), low, high)


def mean_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float | None]:
    """Return the mean and the half-width of its normal interval; None for a single value."""
    if len(values) < 2:
        return values[0], None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return mean(values), z * stdev(values) / math.sqrt(len(values))


@torch.no_grad()
@exact_linears()
def rewards_by_timestep(
    reward: Reward,
    latents: torch.Tensor,
    conditions: Conditions,
    noise: torch.Tensor,
    levels: Sequence[tuple[float, float]],
) -> list[float]:
    """Score a sample with noise added, at each level.

    Args:
        reward: ``(x, timestep [B], conditions) -> [B]``.
        latents: clean, ``[1, C, F, H, W]``.
        conditions: of batch 1.
        noise: ε like ``latents``.
        levels: pairs of the noise level σ and the timestep to call the reward at.
    """
    scores = []
    for sigma, timestep in levels:
        x = flow_step([latents.float(), noise.float()], [1.0 - sigma, sigma])
        scores.append(float(reward(x, torch.full((1,), timestep, device=x.device), conditions)))
    return scores


def drift_steps(num_inference_steps: int, points: int = 8) -> list[int]:
    """Return the solver steps at which drift is measured: evenly spaced, first and last in."""
    count = min(points, num_inference_steps)
    return sorted({round(i * (num_inference_steps - 1) / max(count - 1, 1)) for i in range(count)})


@torch.no_grad()
@exact_linears()
def record_velocities(
    sampler: Sampler, noise: torch.Tensor, conditions: Conditions, file: Path
) -> None:
    """Sample, and write latents ``x<i>`` and velocities ``v<i>`` at :func:`drift_steps` to a file.

    Args:
        sampler: the generator that others are compared with.
        noise: ε, ``[1, C, F, H, W]``.
        conditions: of batch 1.
        file: safetensors file.
    """
    trajectory = Trajectory(sampler, noise, conditions)
    found: dict[str, torch.Tensor] = {}
    for step in drift_steps(sampler.num_inference_steps):
        trajectory.run(step)
        found |= {f"x{step}": trajectory.x, f"v{step}": trajectory.velocity()}
    save_tensors(found, file)


@torch.no_grad()
@exact_linears()
def velocity_drift(sampler: Sampler, conditions: Conditions, file: Path) -> dict[int, float]:
    """Return ``‖v - v_base‖ / ‖v_base‖`` by solver step, at the latents of the base.

    Args:
        sampler: the generator to measure, with the base's schedule and guidance.
        conditions: of batch 1.
        file: that of :func:`record_velocities`; ``v_base`` are its guided velocities.
    """
    recorded = load_tensors(file)
    device = next(iter(conditions.values())).device
    found = {}
    trajectory: Trajectory | None = None
    for step in drift_steps(sampler.num_inference_steps):
        x, base = (recorded[f"{name}{step}"].to(device) for name in "xv")
        trajectory = trajectory or Trajectory(sampler, x, conditions)
        moved = trajectory.velocity(x, step).double() - base.double()
        found[step] = float(moved.norm() / base.double().norm())
    return found


def compare_scores(
    scores: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    drift: Mapping[str, Sequence[Mapping[int, float]]],
) -> dict[str, Any]:
    """Return the figures of a comparison as plain values.

    Args:
        scores: by reward and generator, those of each video at each timestep; all generators have
            the same videos, and the first is the base.
        drift: by generator, that of each measured video by solver step.

    Returns:
        ``rewards``: by reward and generator the ``mean`` and the half-width ``interval`` at each
        timestep. ``wins``: for each reward and each pair, :class:`WinRate` of ``arm`` ``against``
        an earlier one, by the mean of a video's scores over the timesteps. ``drift``: by generator
        the mean by step.
    """
    rewards: dict[str, Any] = {}
    wins = []
    for reward, by_arm in scores.items():
        rewards[reward] = {}
        for arm, videos in by_arm.items():
            columns = [mean_interval(column) for column in zip(*videos, strict=True)]
            rewards[reward][arm] = {
                "mean": [value for value, _ in columns],
                "interval": [half for _, half in columns],
            }
        means = {arm: [mean(video) for video in videos] for arm, videos in by_arm.items()}
        names = list(means)
        for i, arm in enumerate(names):
            for other in names[:i]:
                found = win_rate(means[arm], means[other])
                wins.append({"reward": reward, "arm": arm, "against": other, **found._asdict()})
    steps = {
        arm: {str(step): mean(video[step] for video in videos) for step in videos[0]}
        for arm, videos in drift.items()
    }
    return {"rewards": rewards, "wins": wins, "drift": steps}
