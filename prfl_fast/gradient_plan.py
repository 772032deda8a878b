"""Which steps of a trajectory carry gradient, where the gradient goes, and where it is rewarded."""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Literal, NamedTuple

import torch

from prfl_fast._checks import check_count, is_number

Bound = int | float | None


class Point(NamedTuple):
    """One gradient point of a trajectory.

    Attributes:
        step: the last solver step with gradient, m. The reward reads x_{m+1}, or the estimate of x0
            made at step m.
        depth: steps the gradient flows through, m-depth+1 … m; x_{m-depth+1} is a constant.
        weight: of its loss; those of a draw add up to 1.
    """

    step: int
    depth: int = 1
    weight: float = 1.0

    @property
    def first(self) -> int:
        """The first step with gradient."""
        return self.step - self.depth + 1


@dataclass(frozen=True)
class GradientPlan:
    """Where a reward's gradient is taken on a trajectory, and where it goes.

    The N steps of a schedule are counted from noise: step m moves x_m to x_{m+1}, x_0 is where the
    trajectory starts and x_N the result. The named constructors are the published methods; a plan
    of your own is any combination of the fields.

    PRFL takes the gradient at one step, uniform over the ``M = N - 1`` steps that have a next
    timestep. Its estimate of ``g = (1/M)·Σ_m g_m``, with ``g_m`` the gradient at step ``m`` of a
    trajectory, is ``g_m``. With ``points = K`` the rollout to the largest of K indices passes
    through the others, and the estimate is the mean of K gradients for the price of one rollout.
    The indices are a systematic sample: ``u ~ U[0, 1)`` once, then ``m_i = floor((i + u)·M / K)``,
    i = 0 … K-1. As u runs over [0, 1) and i over 0 … K-1, ``(i + u)·M/K`` covers [0, M) evenly,
    each unit interval for a length K/M of u in total, so every step is chosen with probability K/M;
    no step comes twice because the points lie M/K ≥ 1 apart. Hence ``E[(1/K)·Σ_i g_{m_i}] =
    (1/K)·Σ_m (K/M)·g_m = g`` on every trajectory: the estimator is unbiased for any K. K = 1 is
    PRFL's own draw. Independent draws have the same expectation and may repeat a step, which is
    then run once with the weight of its repeats.

    Args:
        points: gradient points of a trajectory, K.
        draws: how several points are drawn from the window: one systematic sample, or each by
            itself.
        window: the steps that may be drawn, first and last + 1. Integers as in a slice of the
            schedule, floats shares of it, rounded down; None is its end.
        depth: steps that the gradient flows through before the reward: a number, None for the whole
            trajectory, or (least, most) for a uniform draw, most = None being the whole trajectory.
            Only depth 1 goes with several points.
        reward_at: the latents that are rewarded: ``next`` is x_{m+1} at its own noise level,
            ``clean`` the one-step estimate x̂0 = x_m - σ_m·v at timestep 0, ``current`` x_m.
        to: what gets the gradient: the model's ``parameters``; the initial ``noise``, through the
            whole trajectory; or the ``latent`` x_m, which guides the sampling.
        start: the trajectory starts from ``noise``, or from corrupted real ``data``, x_σ = (1-σ)·x0
            + σ·ε.
        strength: with ``data``, the share of the schedule that is run; None starts at the first
            gradient step.
        renoised: further gradient points at the last level, each from the result noised again.
        segments: reward single latent frames instead of the whole video, a random one of each of
            this many segments of the F frames; the score is the mean of theirs.
        attenuation: λ of the frames' weights exp(-λ·|f - ⌊F/2⌋|) in it, f the frame.

    Raises:
        ValueError: a field out of range, or fields that do not go together.
    """

    points: int = 1
    draws: Literal["systematic", "independent"] = "systematic"
    window: tuple[Bound, Bound] = (0, -1)
    depth: int | tuple[int, int | None] | None = 1
    reward_at: Literal["next", "clean", "current"] = "next"
    to: Literal["parameters", "noise", "latent"] = "parameters"
    start: Literal["noise", "data"] = "noise"
    strength: float | None = None
    renoised: int = 0
    segments: int | None = None
    attenuation: float = 0.0

    def __post_init__(self) -> None:
        check_count("points", self.points)
        for name, known in (
            ("draws", ("systematic", "independent")),
            ("reward_at", ("next", "clean", "current")),
            ("to", ("parameters", "noise", "latent")),
            ("start", ("noise", "data")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        for name in ("window", "depth"):  # a list comes from a configuration
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        window = self.window
        if not (isinstance(window, tuple) and len(window) == 2 and all(map(_is_bound, window))):
            raise ValueError(
                f"window is {self.window!r}, expected (first, end): integers, shares in [0, 1], or "
                "None"
            )
        if isinstance(self.depth, tuple):
            if len(self.depth) != 2:
                raise ValueError(f"depth is {self.depth}, expected a number or (least, most)")
            least, most = self.depth
            check_count("depth[0]", least)
            if most is not None:
                check_count("depth[1]", most)
                if most < least:
                    raise ValueError(f"depth is {self.depth}, expected the smaller number first")
        elif self.depth is not None:
            check_count("depth", self.depth)
        if self.depth != 1 and self.points > 1:
            raise ValueError(
                f"points is {self.points} with depth {self.depth}, expected points=1: chains of "
                "several points would overlap"
            )
        if self.strength is not None and not (
            self.start == "data" and is_number(self.strength) and 0 < self.strength <= 1
        ):
            raise ValueError(
                f"strength is {self.strength!r}, expected a share in (0, 1], with start='data' only"
            )
        if self.start == "data" and self.strength is None and self.depth is None:
            raise ValueError("depth is None without strength: a chain from data needs one of them")
        if self.start == "data" and self.strength is None and self.points > 1:
            raise ValueError(
                f"points is {self.points}, expected 1: every point corrupts the data anew, so a "
                "call has one; raise the accumulation instead"
            )
        if (self.to == "latent") != (self.reward_at == "current"):
            raise ValueError(
                f"to is {self.to!r} with reward_at {self.reward_at!r}: 'latent' and 'current' go "
                "together"
            )
        if self.to == "latent" and (self.points, self.depth) != (1, 1):
            raise ValueError(
                f"points is {self.points} and depth {self.depth!r}, expected 1 and 1 with "
                "to='latent': every step of the window is guided"
            )
        if self.to != "parameters" and (self.start == "data" or self.renoised):
            raise ValueError(
                f"to is {self.to!r}, expected 'parameters' with data or re-noised results"
            )
        if self.to == "noise" and self.depth is not None:
            raise ValueError(
                f"depth is {self.depth!r}, expected None: the gradient reaches the noise through "
                "the whole trajectory"
            )
        check_count("renoised", self.renoised, least=0)
        of_result = (self.window, self.depth, self.reward_at) == ((-1, None), 1, "next")
        if self.renoised and not of_result:
            raise ValueError(
                f"renoised is {self.renoised}, expected 0, or window=(-1, None), depth=1 and "
                "reward_at='next', which lead to a result to noise again"
            )
        if self.segments is not None:
            check_count("segments", self.segments)
        if not (is_number(self.attenuation) and self.attenuation >= 0) or (
            self.attenuation and self.segments is None
        ):
            raise ValueError(
                f"attenuation is {self.attenuation!r}, expected at least 0, above that with "
                "segments only"
            )

    @classmethod
    def prfl(
        cls, points: int = 1, draws: Literal["systematic", "independent"] = "systematic"
    ) -> "GradientPlan":
        """PRFL (arXiv 2511.21541): any step but the last, rewarded where it leads, noisy.

        Args:
            points: gradient steps per trajectory; the paper has 1 and accumulates 5.
        """
        return cls(points, draws)

    @classmethod
    def refl(cls, window: float = 0.25) -> "GradientPlan":
        """ReFL (ImageReward, arXiv 2304.05977): one late step, rewarded at its estimate of x0.

        Args:
            window: the last share of the schedule that is drawn from; the paper has 10 of 40 steps.
        """
        _check_share("window", window)
        return cls(window=(1.0 - window, None), reward_at="clean")

    @classmethod
    def draft(cls, steps: int | None = 1) -> "GradientPlan":
        """DRaFT-K (arXiv 2309.17400): through the last ``steps`` steps, rewarded at the result.

        Args:
            steps: K; None is the whole trajectory, plain DRaFT.
        """
        return cls(window=(-1, None), depth=steps)

    @classmethod
    def draft_lv(cls, renoised: int = 2) -> "GradientPlan":
        """DRaFT-LV (arXiv 2309.17400): DRaFT-1 with further samples of its last step.

        Args:
            renoised: how many; each noises the result to the last level again and repeats the last
                step. The gradient is the mean over these and the trajectory's own.
        """
        return cls(window=(-1, None), renoised=renoised)

    @classmethod
    def alignprop(cls, least: int = 1, most: int | None = None) -> "GradientPlan":
        """AlignProp (arXiv 2310.03739): through the last K steps, K drawn anew for each trajectory.

        Args:
            least, most: K is uniform over them, both included; None is the whole trajectory.
        """
        return cls(window=(-1, None), depth=(least, most))

    @classmethod
    def controlnet_plus_plus(cls, window: float = 0.2) -> "GradientPlan":
        """ControlNet++ (arXiv 2404.07987): noise real latents a little, reward the estimate of x0.

        No rollout; set ``num_steps`` to the number of training levels (1000), which costs nothing.
        The batch shares one level, where the paper draws one per sample.

        Args:
            window: the last share of the levels that is drawn from. The paper has t ≤ 200 of 1000,
                which the default is on a schedule with shift 1; with more shift its levels are
                noisier.
        """
        _check_share("window", window)
        return cls(window=(1.0 - window, None), reward_at="clean", start="data")

    @classmethod
    def instruct_video(
        cls,
        strength: float = 0.6,
        steps: int = 1,
        segments: int | None = 4,
        attenuation: float = 1.0,
    ) -> "GradientPlan":
        """InstructVideo (arXiv 2312.12490): corrupt a video, run the rest of the sampler, reward
        frames with weights that fall off from the middle.

        Args:
            strength: share of the schedule that is run; the paper starts its 0.6 at t = 551, as a
                schedule with shift 1 does about. steps: of them, how many carry gradient.
            segments, attenuation: latent frames rewarded, and how their weights fall; None rewards
                the video as a whole.
        """
        if segments is None:
            attenuation = 0.0
        return cls(
            window=(-1, None),
            depth=steps,
            start="data",
            strength=strength,
            segments=segments,
            attenuation=attenuation,
        )

    @classmethod
    def reno(cls) -> "GradientPlan":
        """ReNO (arXiv 2406.04312): the gradient of the result's reward to the initial noise."""
        return cls(window=(-1, None), depth=None, to="noise")

    @classmethod
    def flow_nrg(cls, window: tuple[Bound, Bound] = (1, None)) -> "GradientPlan":
        """Flow-NRG (VideoAlign, arXiv 2501.13918): guide every step by the reward of its latents.

        Args:
            window: the steps that are guided. Not the first, where σ is 1 and the guidance's factor
                σ/(1-σ) infinite; with shift 5 it is large for some steps more, and a later start
                spares the weight from being small for their sake.
        """
        return cls(window=window, to="latent", reward_at="current")

    @classmethod
    def rg_lcd(cls) -> "GradientPlan":
        """Reward guided latent consistency distillation (arXiv 2403.11027): noise real latents to
        any level, reward the student's one-step output. Its distillation term is
        :func:`prfl_fast.losses.consistency_loss`.
        """
        return cls(window=(0, None), reward_at="clean", start="data")

    def steps(self, num_steps: int) -> range:
        """The steps of an ``num_steps`` schedule that may be drawn.

        Raises:
            ValueError: there is none, or too few for the points or for a fixed depth.
        """
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps!r}, expected a positive integer")
        first, end = (
            _resolve(b, num_steps, d) for b, d in zip(self.window, (0, num_steps), strict=True)
        )
        depth = self.depth if isinstance(self.depth, int) else 1
        if isinstance(self.depth, tuple):
            depth = self.depth[0]
        first = max(first, self.begin(num_steps) + depth - 1)
        if end <= first:
            raise ValueError(
                f"num_steps is {num_steps}, too few: no step lies in the window {self.window} with "
                f"{depth} step{'s' if depth > 1 else ''} for the gradient"
            )
        if self.to != "latent" and self.draws == "systematic" and self.points > end - first:
            raise ValueError(
                f"points is {self.points}, but {num_steps} steps have only {end - first} in the "
                "window; lower points or raise num_steps"
            )
        return range(first, end)

    def begin(self, num_steps: int) -> int:
        """The step at which a trajectory starts, for plans that do not start at the drawn step."""
        if self.strength is None:
            return 0
        return num_steps - max(1, math.floor(Fraction(self.strength) * num_steps + Fraction(1, 2)))

    def draw(self, num_steps: int, generator: torch.Generator | None = None) -> tuple[Point, ...]:
        """Draw the gradient points of one trajectory, increasing.

        A systematic sample takes one number from ``generator`` (the global one of the CPU if
        ``None``), independent draws one each, a random depth one more; guided sampling takes none.
        Ranks that share a trajectory must hold generators in the same state.

        Raises:
            ValueError: as :meth:`steps`.
        """
        steps = self.steps(num_steps)
        if self.to == "latent":
            return tuple(Point(m, 1, 1 / len(steps)) for m in steps)

        def uniform() -> Fraction:
            device = generator.device if generator is not None else torch.device("cpu")
            number = torch.rand((), dtype=torch.float64, device=device, generator=generator)
            return Fraction(number.item())

        if self.draws == "systematic":
            chosen = self._systematic(steps, uniform())
        else:
            chosen = tuple(steps[int(uniform() * len(steps))] for _ in range(self.points))
        if not isinstance(self.depth, tuple):
            return self._points(chosen, self._depths(chosen[0], num_steps)[0])
        depths = self._depths(chosen[0], num_steps)
        return self._points(chosen, depths[int(uniform() * len(depths))])

    def outcomes(self, num_steps: int) -> list[tuple[Fraction, tuple[Point, ...]]]:
        """All that :meth:`draw` can return, with exact probabilities that add up to 1.

        Independent draws of K points from M steps have (M+K-1)!/(K!·(M-1)!) outcomes: for short
        schedules.

        Raises:
            ValueError: as :meth:`steps`.
        """
        steps, points = self.steps(num_steps), self.points
        if self.to == "latent":
            return [(Fraction(1), self.draw(num_steps))]
        found: list[tuple[Fraction, tuple[int, ...]]] = []
        if self.draws == "systematic":
            # An index changes where (i + u)·M/K is an integer j: at u = j·K/M - i, that is, at
            # fractional parts of j·K/M.
            starts = sorted({Fraction(j * points, len(steps)) % 1 for j in range(len(steps))})
            ends = [*starts[1:], Fraction(1)]
            found = [
                (end - start, self._systematic(steps, start))
                for start, end in zip(starts, ends, strict=True)
            ]
        else:
            for chosen in combinations_with_replacement(steps, points):
                orders = math.factorial(points)
                for repeats in Counter(chosen).values():
                    orders //= math.factorial(repeats)
                found.append((Fraction(orders, len(steps) ** points), chosen))
        return [
            (probability / len(depths), self._points(chosen, depth))
            for probability, chosen in found
            for depths in (self._depths(chosen[0], num_steps),)
            for depth in depths
        ]

    def expected_forwards(self, num_steps: int) -> float:
        """Solver steps without gradient that a trajectory takes on average.

        Raises:
            ValueError: as :meth:`steps`.
        """
        steps, begin = self.steps(num_steps), self.begin(num_steps)
        count = len(steps)
        if self.to == "latent":
            return float(num_steps)
        if self.start == "data" and self.strength is None:
            return 0.0
        if self.draws == "independent" and self.points > 1:
            # P(largest ≤ j-th) = ((j+1)/M)^K; a step is among the drawn ones with 1-(1-1/M)^K.
            last = sum(1 - Fraction(j, count) ** self.points for j in range(1, count))
            distinct = count * (1 - Fraction(count - 1, count) ** self.points)
            return float(steps[0] + last + 1 - distinct - begin)
        return float(
            sum(
                p * (points[-1].step + 1 - begin - sum(point.depth for point in points))
                for p, points in self.outcomes(num_steps)
            )
        )

    def _systematic(self, steps: range, uniform: Fraction) -> tuple[int, ...]:
        # Exact: in floating point (K-1+u)·M/K can round up to M.
        return tuple(
            steps[int((i + uniform) * len(steps) / self.points)] for i in range(self.points)
        )

    def _depths(self, step: int, num_steps: int) -> range:
        """Depths that a point at ``step`` may have."""
        whole = step + 1 - self.begin(num_steps)
        if isinstance(self.depth, tuple):
            least, most = self.depth
            return range(least, min(whole, whole if most is None else most) + 1)
        depth = whole if self.depth is None else self.depth
        return range(depth, depth + 1)

    def _points(self, chosen: tuple[int, ...], depth: int) -> tuple[Point, ...]:
        repeats = Counter(chosen)
        return tuple(Point(m, depth, repeats[m] / len(chosen)) for m in sorted(repeats))


def _check_share(name: str, share: float) -> None:
    if not (is_number(share) and 0 < share <= 1):  # type: ignore[operator]
        raise ValueError(f"{name} is {share!r}, expected a share in (0, 1]")


def _is_bound(bound: object) -> bool:
    if isinstance(bound, bool):
        return False
    return bound is None or isinstance(bound, int) or isinstance(bound, float) and 0 <= bound <= 1


def _resolve(bound: Bound, num_steps: int, default: int) -> int:
    if bound is None:
        return default
    if isinstance(bound, float):
        # 1 - 0.2 is a little more than 0.8, and 0.8·1000 must not become 801 or 799.
        return math.floor(round(bound * num_steps, 6))
    return max(0, min(num_steps, bound + num_steps if bound < 0 else bound))
