"""Which steps of a rollout carry gradient."""

from dataclasses import dataclass
from fractions import Fraction

import torch


@dataclass(frozen=True)
class GradientPlan:
    """How many gradient steps one trajectory has, and how their indices are drawn.

    PRFL ("Video Generation Models Are Good Latent Reward Models", arXiv 2511.21541) takes the
    gradient of the reward at one step ``m`` of the sampler, uniform over the ``M = num_steps - 1``
    steps that have a next timestep. Its estimate of ``g = (1/M)·Σ_m g_m``, with ``g_m`` the
    gradient at step ``m`` of a trajectory, is ``g_m``.

    With ``points = K`` the rollout to the largest of K indices passes through the others, and the
    estimate is the mean of K gradients for the price of one rollout. The indices are a systematic
    sample: ``u ~ U[0, 1)`` once, then ``m_i = floor((i + u)·M / K)``, i = 0 … K-1. As u runs over
    [0, 1) and i over 0 … K-1, ``(i + u)·M/K`` covers [0, M) evenly, each unit interval for a length
    K/M of u in total, so every step is chosen with probability K/M; no step comes twice because the
    points lie M/K ≥ 1 apart. Hence ``E[(1/K)·Σ_i g_{m_i}] = (1/K)·Σ_m (K/M)·g_m = g`` on every
    trajectory: the estimator is unbiased for any K. K = 1 is PRFL's own draw.

    Args:
        points: gradient steps per trajectory, K.

    Raises:
        ValueError: ``points`` is not a positive integer.
    """

    points: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 1:
            raise ValueError(f"points is {self.points!r}, expected a positive integer")

    @classmethod
    def prfl(cls, points: int = 1) -> "GradientPlan":
        """PRFL with ``points`` gradient steps per trajectory; the paper has 1 and accumulates 5."""
        return cls(points)

    def draw(self, num_steps: int, generator: torch.Generator | None = None) -> tuple[int, ...]:
        """Draw the gradient steps of one trajectory, increasing, each in 0 … num_steps-2.

        Takes one number from ``generator`` (the global one of the CPU if ``None``). Ranks that
        share a trajectory must hold generators in the same state.

        Raises:
            ValueError: ``points`` exceeds ``num_steps - 1``.
        """
        steps = self._steps(num_steps)
        device = generator.device if generator is not None else torch.device("cpu")
        uniform = torch.rand((), dtype=torch.float64, device=device, generator=generator).item()
        return self._indices(steps, Fraction(uniform))

    def outcomes(self, num_steps: int) -> list[tuple[Fraction, tuple[int, ...]]]:
        """All that :meth:`draw` can return, with exact probabilities that add up to 1.

        Raises:
            ValueError: ``points`` exceeds ``num_steps - 1``.
        """
        steps = self._steps(num_steps)
        # An index changes where (i + u)·M/K is an integer j: at u = j·K/M - i, that is, at
        # fractional parts of j·K/M.
        starts = sorted({Fraction(j * self.points, steps) % 1 for j in range(steps)})
        ends = [*starts[1:], Fraction(1)]
        return [
            (end - start, self._indices(steps, start))
            for start, end in zip(starts, ends, strict=True)
        ]

    def _steps(self, num_steps: int) -> int:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 2:
            raise ValueError(f"num_steps is {num_steps!r}, expected an integer of at least 2")
        if self.points > num_steps - 1:
            raise ValueError(
                f"points is {self.points}, but {num_steps} steps have only {num_steps - 1} with a "
                "next timestep; lower points or raise num_steps"
            )
        return num_steps - 1

    def _indices(self, steps: int, uniform: Fraction) -> tuple[int, ...]:
        # Exact: in floating point (K-1+u)·M/K can round up to M.
        return tuple(int((i + uniform) * steps / self.points) for i in range(self.points))
