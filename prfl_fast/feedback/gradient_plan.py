"""Gradient plan: the steps that carry gradient, the target of the gradient, the reward's input."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Literal

import torch

from prfl_fast.feedback.points import Bound, Point, as_points, in_order, is_bound, resolve
from prfl_fast.utils.checks import (
    check,
    check_choice,
    check_count,
    check_fraction,
    is_number,
    make_fields_plain,
    plain,
)


@dataclass(frozen=True)
class GradientPlan:
    """Choose the steps that carry a reward's gradient, and the target of the gradient.

    The N steps of a schedule are counted from noise: step m moves x_m to x_{m+1}. The named
    constructors are the published methods.

    PRFL estimates ``g = (1/M)·Σ_m g_m``, the mean gradient over the ``M = N - 1`` steps that have a
    next timestep, by ``g_m`` at one uniform step m. With ``points = K`` it is the mean of K steps'
    gradients on one rollout. They are a systematic sample: ``u ~ U[0, 1)`` once, then ``m_i =
    floor((i + u)·M / K)``, i = 0 … K-1. The ``(i + u)·M/K`` cover [0, M) evenly and lie M/K ≥ 1
    apart, so no step repeats and each has probability K/M. Hence ``E[(1/K)·Σ_i g_{m_i}] = (1/K)·Σ_m
    (K/M)·g_m = g``: the estimator is unbiased for any K. Independent draws have the same
    expectation and may repeat a step, which then runs once with the weight of its repeats.

    Args:
        points: gradient points of a trajectory, K.
        draws: draw the points as one systematic sample or independently.
        window: first and last + 1 of the steps that may be drawn: integers as in a slice, or
            fractions of the schedule, rounded down; None is its end.
        depth: steps that the gradient flows through before the reward: a number, None for the whole
            trajectory, or (least, most) for a uniform draw, where most = None is the whole
            trajectory. Several points require depth 1.
        reward_at: the rewarded latents: ``next`` is x_{m+1} at its own noise level, ``clean`` the
            one-step estimate x̂0 = x_m - σ_m·v at timestep 0, ``current`` x_m.
        to: the target of the gradient: the model's ``parameters``; the initial ``noise``, through
            the whole trajectory; or the ``latent`` x_m, which guides the sampling.
        start: ``noise``, or real ``data`` that are corrupted, x_σ = (1-σ)·x0 + σ·ε.
        strength: with ``data``, the fraction of the schedule that is run; None starts at the
            first gradient step.
        renoised: further gradient points at the last level, each from the result noised again.
        segments: reward one random latent frame f of each of this many segments of the F frames,
            not the whole video; the score is their weighted mean.
        attenuation: λ of the frames' weights exp(-λ·|f - ⌊F/2⌋|).

    Raises:
        ValueError: if a field is out of range, or fields contradict each other.
    """

    # 5 points take 0.43 of the FLOPs per gradient point. At equal FLOPs their gradient has 0.57 of
    # the variance, with independent draws 0.78 (small world, batch 1, bench/RESULTS.md).
    points: int = 1
    draws: Literal["systematic", "independent"] = "systematic"
    window: tuple[Bound, Bound] = (0, -1)  # the last step of a schedule has no next timestep
    depth: int | tuple[int, int | None] | None = 1
    reward_at: Literal["next", "clean", "current"] = "next"
    to: Literal["parameters", "noise", "latent"] = "parameters"
    start: Literal["noise", "data"] = "noise"
    strength: float | None = None
    renoised: int = 0
    segments: int | None = None
    attenuation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("window", "depth"):  # YAML gives lists
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        make_fields_plain(self)
        check_count("points", self.points)
        check_choice("draws", self.draws, ("systematic", "independent"))
        check_choice("reward_at", self.reward_at, ("next", "clean", "current"))
        check_choice("to", self.to, ("parameters", "noise", "latent"))
        check_choice("start", self.start, ("noise", "data"))
        window = self.window
        ok = isinstance(window, tuple) and len(window) == 2 and all(map(is_bound, window))
        expected = "(first, end): integers, fractions in [0, 1], or None"
        check(ok, "window", window, expected)
        self._check_depth()
        self._check_start()
        self._check_target()
        self._check_reward()

    def _check_depth(self) -> None:
        depth = self.depth
        if isinstance(depth, tuple):
            check(len(depth) == 2, "depth", depth, "a number or (least, most)")
            least, most = depth
            check_count("depth[0]", least)
            if most is not None:
                check_count("depth[1]", most)
                check(most >= least, "depth", depth, "the smaller number first")
        elif depth is not None:
            check_count("depth", depth)
        ok = depth == 1 or self.points == 1
        hint = "The steps of several points would overlap."
        check(ok, "points", self.points, f"1 with depth {depth}", hint=hint)

    def _check_start(self) -> None:
        if self.strength is not None:
            check_fraction("strength", self.strength)
            check(self.start == "data", "start", self.start, "'data' with strength")
        elif self.start == "data":
            hint = "A trajectory from data starts at its first gradient step, or by its strength."
            check(self.depth is not None, "depth", None, "a number without strength", hint=hint)
            hint = "Every point corrupts the data anew: raise gradient_accumulation_steps instead."
            check(self.points == 1, "points", self.points, "1 with start='data'", hint=hint)

    def _check_target(self) -> None:
        ok = (self.to == "latent") == (self.reward_at == "current")
        check(ok, "to", self.to, "'latent' together with reward_at='current' only")
        hint = "Every step of the window is guided."
        for name in ("points", "depth") if self.to == "latent" else ():
            value = getattr(self, name)
            check(value == 1, name, value, "1 with to='latent'", hint=hint)
        if self.to != "parameters":
            ok = self.start == "noise" and not self.renoised
            check(ok, "to", self.to, "'parameters' with start='data' or renoised")
        if self.to == "noise":
            hint = "The gradient reaches the noise through the whole trajectory."
            check(self.depth is None, "depth", self.depth, "None with to='noise'", hint=hint)

    def _check_reward(self) -> None:
        check_count("renoised", self.renoised, least=0)
        ok = (self.window, self.depth, self.reward_at) == ((-1, None), 1, "next")
        expected = "0, or window=(-1, None), depth=1 and reward_at='next'"
        check(ok or not self.renoised, "renoised", self.renoised, expected)
        if self.segments is not None:
            check_count("segments", self.segments)
        ok = is_number(self.attenuation) and self.attenuation >= 0
        ok = ok and (self.segments is not None or not self.attenuation)
        check(ok, "attenuation", self.attenuation, "at least 0, and 0 without segments")

    @classmethod
    def prfl(
        cls, points: int = 1, draws: Literal["systematic", "independent"] = "systematic"
    ) -> "GradientPlan":
        """Return PRFL (arXiv 2511.21541): any step but the last, rewarded at its noisy result.

        The paper has one gradient step per trajectory and accumulates 5 trajectories.
        """
        return cls(points, draws)

    @classmethod
    def refl(cls, window: float = 0.25) -> "GradientPlan":
        """Return ReFL (ImageReward, arXiv 2304.05977): one late step, rewarded at its x0 estimate.

        ``window`` is the last fraction of the schedule to draw from; the paper has 10 of 40 steps.
        """
        check_fraction("window", window)
        return cls(window=(1.0 - window, None), reward_at="clean")

    @classmethod
    def draft(cls, steps: int | None = 1) -> "GradientPlan":
        """Return DRaFT-K (arXiv 2309.17400): gradient through the last K ``steps`` (None: all)."""
        return cls(window=(-1, None), depth=steps)

    @classmethod
    def draft_lv(cls, renoised: int = 2) -> "GradientPlan":
        """Return DRaFT-LV (arXiv 2309.17400): DRaFT-1 with ``renoised`` samples of its last step.

        Each noises the result to the last level and repeats the last step. The gradient is the mean
        over these samples and the trajectory's own.
        """
        return cls(window=(-1, None), renoised=renoised)

    @classmethod
    def alignprop(cls, least: int = 1, most: int | None = None) -> "GradientPlan":
        """Return AlignProp (arXiv 2310.03739): DRaFT-K with a random K for each trajectory.

        K is uniform over ``least`` … ``most``, both included; ``most=None`` is the whole
        trajectory.
        """
        return cls(window=(-1, None), depth=(least, most))

    @classmethod
    def controlnet_plus_plus(cls, window: float = 0.2) -> "GradientPlan":
        """Return ControlNet++ (arXiv 2404.07987): slightly noised data, x0 estimate rewarded.

        There is no rollout, so ``num_inference_steps`` may be the number of training levels (1000)
        at no cost. The batch shares one level; the paper draws one per sample. ``window`` is the
        last fraction of the levels to draw from; 0.2 is the paper's t ≤ 200 of 1000 for a schedule
        with shift 1.
        """
        check_fraction("window", window)
        return cls(window=(1.0 - window, None), reward_at="clean", start="data")

    @classmethod
    def instruct_video(
        cls,
        strength: float = 0.6,
        steps: int = 1,
        segments: int | None = 4,
        attenuation: float = 1.0,
    ) -> "GradientPlan":
        """Return InstructVideo (arXiv 2312.12490): a corrupted video, sampled again from there.

        Args:
            strength: fraction of the schedule that is run; the paper starts its 0.6 at t = 551,
                close to a schedule with shift 1.
            steps: number of last steps with gradient.
            segments, attenuation: as the fields; ``segments=None`` rewards the whole video.
        """
        attenuation = 0.0 if segments is None else attenuation
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
        """Return ReNO (arXiv 2406.04312): the gradient of the result's reward to the noise."""
        return cls(window=(-1, None), depth=None, to="noise")

    @classmethod
    def flow_nrg(cls, window: tuple[Bound, Bound] = (1, None)) -> "GradientPlan":
        """Return Flow-NRG (VideoAlign, arXiv 2501.13918): guide each step by its latents' reward.

        ``window`` holds the guided steps. The factor σ/(1-σ) is infinite at the first step and,
        with shift 5, large for some more; a later start permits a larger weight.
        """
        return cls(window=window, to="latent", reward_at="current")

    @classmethod
    def rg_lcd(cls) -> "GradientPlan":
        """Return RG-LCD (arXiv 2403.11027): noise data to any level, reward the x0 estimate.

        The distillation term is :func:`prfl_fast.training.losses.consistency_loss`.
        """
        return cls(window=(0, None), reward_at="clean", start="data")

    def steps(self, num_inference_steps: int) -> range:
        """Return the steps of a schedule that may be drawn.

        Raises:
            ValueError: if there are too few for the points or the depth.
        """
        check_count("num_inference_steps", num_inference_steps)
        num_inference_steps = plain(num_inference_steps)  # an unsigned one has no -1
        first = resolve(self.window[0], num_inference_steps, 0)
        end = resolve(self.window[1], num_inference_steps, num_inference_steps)
        depth = self.depth[0] if isinstance(self.depth, tuple) else self.depth or 1
        first = max(first, self.begin(num_inference_steps) + depth - 1)
        wanted = f"enough for the window {self.window} with {depth} gradient steps"
        check(end > first, "num_inference_steps", num_inference_steps, wanted)
        distinct = self.to != "latent" and self.draws == "systematic"
        wanted = f"at most {end - first}, the steps of {num_inference_steps} in the window"
        check(not distinct or self.points <= end - first, "points", self.points, wanted)
        return range(first, end)

    def begin(self, num_inference_steps: int) -> int:
        """Return the first step of a trajectory that does not start at the drawn step."""
        if self.strength is None:
            return 0
        # Half a step rounds up; round() would take the even neighbor.
        run = math.floor(Fraction(self.strength) * num_inference_steps + Fraction(1, 2))
        return num_inference_steps - max(1, run)

    def draw(
        self, num_inference_steps: int, generator: torch.Generator | None = None
    ) -> tuple[Point, ...]:
        """Draw the gradient points of one trajectory, in increasing order.

        A systematic sample takes one number from ``generator`` (None: PyTorch's global CPU
        generator), independent draws take one for each point, a random depth one more, guided
        sampling none. Ranks that share a trajectory need generators in the same state.
        """
        steps = self.steps(num_inference_steps)
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
        depths = self.depths(chosen[0], num_inference_steps)
        random = isinstance(self.depth, tuple)
        return self._points(chosen, depths[int(uniform() * len(depths)) if random else 0])

    def points_at(
        self, indices: Sequence[int | Point], num_inference_steps: int
    ) -> tuple[Point, ...]:
        """Check given points or step numbers, and return them as points.

        Raises:
            ValueError: if they are not increasing steps of the schedule, overlap, or do not fit the
                plan.
        """
        indices = indices.tolist() if hasattr(indices, "tolist") else indices  # an array
        hint = "Its window names the guided steps."
        check(self.to != "latent", "indices", indices, "None for a guided trajectory", hint=hint)
        begin = self.begin(num_inference_steps)
        end = num_inference_steps - (self.window[1] == -1)
        expected = f"increasing integers without repeats in {begin} … {end - 1}"
        check(isinstance(indices, Sequence) and bool(indices), "indices", indices, expected)
        depth = self.depth
        if isinstance(depth, tuple):
            ok = all(isinstance(item, Point) for item in indices)
            check(ok, "indices", indices, "points, as the plan draws their depth")
            depth = None
        points = as_points(indices, depth, begin)
        ok = points is not None and in_order(points, begin, end)
        ok = ok and (self.depth == 1 or len(indices) == 1)
        check(ok, "indices", indices, expected)
        assert points is not None
        ok = abs(sum(point.weight for point in points) - 1) <= 1e-6
        check(ok, "indices", indices, "points whose weights add up to 1")
        last = num_inference_steps - 1
        ok = not self.renoised or points[-1].step == last
        check(ok, "indices", indices, f"the last step, {last}, whose result is renoised")
        return points

    def outcomes(self, num_inference_steps: int) -> list[tuple[Fraction, tuple[Point, ...]]]:
        """Return every possible result of :meth:`draw` with its exact probability.

        Independent draws of K points from M steps have (M+K-1)!/(K!·(M-1)!) outcomes.
        """
        steps, points = self.steps(num_inference_steps), self.points
        if self.to == "latent":
            return [(Fraction(1), self.draw(num_inference_steps))]
        if self.draws == "systematic":
            # An index changes where (i + u)·M/K is an integer j: at u = j·K/M - i, that is, at
            # fractional parts of j·K/M.
            starts = sorted({Fraction(j * points, len(steps)) % 1 for j in range(len(steps))})
            ends = [*starts[1:], Fraction(1)]
            spans = zip(starts, ends, strict=True)
            found = [(end - start, self._systematic(steps, start)) for start, end in spans]
        else:
            found = []
            for chosen in combinations_with_replacement(steps, points):
                orders = math.factorial(points)  # ordered draws that give this set
                for repeats in Counter(chosen).values():
                    orders //= math.factorial(repeats)
                found.append((Fraction(orders, len(steps) ** points), chosen))
        outcomes = []
        for probability, chosen in found:
            depths = self.depths(chosen[0], num_inference_steps)
            outcomes += [(probability / len(depths), self._points(chosen, d)) for d in depths]
        return outcomes

    def expected_forwards(self, num_inference_steps: int) -> float:
        """Return the average number of solver steps without gradient of a trajectory."""
        steps, begin = self.steps(num_inference_steps), self.begin(num_inference_steps)
        count = len(steps)
        if self.to == "latent":
            return float(num_inference_steps)
        if self.start == "data" and self.strength is None:
            return 0.0
        if self.draws == "independent" and self.points > 1:
            # P(largest ≤ j-th) = ((j+1)/M)^K; a step is among the drawn ones with 1-(1-1/M)^K.
            last = sum(1 - Fraction(j, count) ** self.points for j in range(1, count))
            distinct = count * (1 - Fraction(count - 1, count) ** self.points)
            return float(steps[0] + last + 1 - distinct - begin)
        mean = Fraction(0)
        for probability, points in self.outcomes(num_inference_steps):
            taken = points[-1].step + 1 - begin - sum(point.depth for point in points)
            mean += probability * taken
        return float(mean)

    def _systematic(self, steps: range, uniform: Fraction) -> tuple[int, ...]:
        # The fraction is exact; in floating point (K-1+u)·M/K can round up to M.
        return tuple(
            steps[int((i + uniform) * len(steps) / self.points)] for i in range(self.points)
        )

    def depths(self, step: int, num_inference_steps: int) -> range:
        """Return the depths that a point at ``step`` may have."""
        whole = step + 1 - self.begin(num_inference_steps)
        if isinstance(self.depth, tuple):
            least, most = self.depth
            return range(least, min(whole, whole if most is None else most) + 1)
        depth = whole if self.depth is None else self.depth
        return range(depth, depth + 1)

    def _points(self, chosen: tuple[int, ...], depth: int) -> tuple[Point, ...]:
        repeats = Counter(chosen)
        # A step that was drawn several times runs once, with the weight of its repeats.
        return tuple(Point(m, depth, repeats[m] / len(chosen)) for m in sorted(repeats))
