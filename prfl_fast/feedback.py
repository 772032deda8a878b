"""One call of reward feedback: what is rewarded on a trajectory, and its backward."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from prfl_fast.adapters import Conditions
from prfl_fast.chain import NO_GRADIENT, recomputed_step
from prfl_fast.divergence import adapters_off
from prfl_fast.gradient_plan import Point
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._checks import describe
from prfl_fast.model_call import model_of
from prfl_fast.rewards import Reward
from prfl_fast.trajectory import Trajectory

if TYPE_CHECKING:
    from prfl_fast.step import PRFL


@dataclass(frozen=True)
class PRFLOutput:
    """What one reward-feedback step did; no tensor carries a graph.

    K counts what was rewarded: the gradient points of the trajectory, and re-noised ones after
    them.

    Attributes:
        loss: scalar, the reward loss plus the divergence's, without ``loss_scale``.
        rewards: ``[K, B]``, float32 (float64 for float64 rewards), of several rewards the weighted
            sum; NaN at points that were not reached.
        by_reward: the same of each reward by its name; a single one is called ``reward``.
        indices: the K solver steps, increasing; depths: the steps their gradient went through.
        timesteps: the K timesteps (1000·σ) at which the latents were rewarded.
        latents: ``[B, C, F, H, W]``, the last latents that were rewarded; of a guided trajectory,
            its result.
        divergence: scalar, mean squared difference of the velocities with and without adapters,
            averaged over the points and the steps of their chains; None unless asked for.
        gradient: ``[B, C, F, H, W]``, of the loss with respect to the noise, for plans with
            ``to="noise"``; else None.
        drift: relative L2 distance of the latents to those of the exact rollout by solver step, if
            this trajectory was checked; else None.
        finite: False if a reward or loss was NaN or infinite. That point was not differentiated and
            the trajectory ended there, but gradients of earlier points are already in ``.grad``:
            zero them and skip the update.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    by_reward: dict[str, torch.Tensor]
    indices: tuple[int, ...]
    depths: tuple[int, ...]
    timesteps: tuple[float, ...]
    latents: torch.Tensor
    finite: bool
    divergence: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    drift: dict[int, float] | None = None


class _NotFinite(Exception):
    """Ends a guided trajectory."""


class Run:
    """One call: a trajectory and what has been rewarded on it so far."""

    def __init__(
        self,
        step: "PRFL",
        trajectory: Trajectory,
        generator: torch.Generator | None,
        loss_scale: float,
    ) -> None:
        self.step, self.trajectory, self.generator = step, trajectory, generator
        self.plan, self.loss_scale = step.plan, loss_scale
        self.leaf: torch.Tensor | None = None
        self.scores: list[dict[str, torch.Tensor]] = []
        self.losses: list[torch.Tensor] = []
        self.penalties: list[torch.Tensor] = []
        self.timesteps: list[float] = []
        self.finite = True
        self.rewarded = trajectory.x

    def feedback(self, points: tuple[Point, ...]) -> PRFLOutput:
        """Every gradient point, in order."""
        trajectory, renoised = self.trajectory, self.plan.renoised
        if self.plan.to == "noise":
            self.leaf = trajectory.x = trajectory.x.detach().requires_grad_()
        for number, point in enumerate(points, start=1):
            trajectory.run(point.first)
            self._point(point, point.weight / (1 + renoised), last=number == len(points))
            if not self.finite:
                break
        for _ in range(renoised if self.finite else 0):
            self._renoised(points[-1], 1 / (1 + renoised))
            if not self.finite:
                break
        every = [*points, *[Point(points[-1].step)] * renoised]
        return self._output(every, None if self.leaf is None else self.leaf.grad)

    def guided(self, points: tuple[Point, ...]) -> PRFLOutput:
        """Sample with the velocity moved against the gradient of the loss at each point's latents.

        With x_t = (1-t)·x0 + t·ε the velocity is v = -(x + t·s)/(1-t), s the score of the latents'
        distribution. Weighting that distribution by exp(-loss) subtracts ∇loss from s, and so adds
        t/(1-t)·∇loss to v. The gradient is of each sample's own loss: no mean over the batch.
        """
        trajectory, chosen = self.trajectory, {point.step for point in points}
        with contextlib.suppress(_NotFinite):
            trajectory.run(self.step.num_steps, adjust=partial(self._guide, chosen))
        self.rewarded = trajectory.x
        return self._output(points[: len(self.scores)], None)

    @torch.enable_grad()
    def _guide(self, chosen: set[int], index: int, v: torch.Tensor) -> torch.Tensor:
        """The velocity of step ``index``, guided."""
        trajectory = self.trajectory
        if index not in chosen:
            return v
        sigma = trajectory.sigma(index)
        batch, count = len(trajectory.x), len(chosen)
        gradient = self._reward(trajectory.x, index, batch * self.step.weight, 1.0)
        self.losses[-1] = self.losses[-1] / (batch * count)
        if gradient is None:
            raise _NotFinite
        return flow_step([v, gradient], [1.0, sigma / (1 - sigma)])

    @torch.enable_grad()
    def _point(self, point: Point, weight: float, last: bool) -> None:
        """Take the steps of a point with gradient and run backward."""
        try:
            self._chain(point, weight, last)
        finally:
            # Also after an exception: the chain's graph knows this object, which knows the latents.
            self.trajectory.cut()

    def _chain(self, point: Point, weight: float, last: bool) -> None:
        trajectory, penalties = self.trajectory, []
        clean = self.plan.reward_at == "clean"
        for index in range(point.first, point.step + 1):
            x, evaluate = trajectory.x, partial(self._evaluate, index)
            # The last step's graph is used at once, so it is not run twice.
            v, *extra = evaluate(x) if index == point.step else recomputed_step(evaluate, x)
            _check_graph(v)
            penalties += extra
            if index < point.step or not clean or not last:
                trajectory.follow(trajectory.solve(v))
        result = trajectory.x
        if clean:
            result = flow_step([x, v], [1.0, -trajectory.sigma(point.step)])
        del x, v  # two latents less while the rewards run
        index = self.step.num_steps if clean else point.step + 1
        self._backward(result, index, penalties, weight)

    @torch.enable_grad()
    def _renoised(self, point: Point, weight: float) -> None:
        """The last step once more, from the result noised to its level (DRaFT-LV)."""
        trajectory, index = self.trajectory, point.step
        sigma, end = trajectory.sigma(index), trajectory.x
        noise = self._randn(end)
        x = flow_step([end, noise], [1 - sigma, sigma])
        v, *penalties = self._evaluate(index, x)
        _check_graph(v)
        self._backward(flow_step([x, v], [1.0, -sigma]), index + 1, penalties, weight)

    def _evaluate(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The velocity, and with a divergence its mean squared distance from the base model's."""
        v = self.trajectory.velocity(x, index)
        if not self.step.divergence:
            return (v,)
        model = model_of(self.step.transformer)
        assert model is not None

        def initial(x: torch.Tensor) -> tuple[torch.Tensor]:
            return (self.trajectory.velocity(x, index),)

        off = partial(adapters_off, model)
        if x.requires_grad and torch.is_grad_enabled():
            # In a chain the latents depend on the parameters, and the initial velocity on the
            # latents. Blocks that are run again in its backward must find the adapters off.
            (base,) = recomputed_step(initial, x, off)
        else:
            with torch.no_grad(), off():
                (base,) = initial(x)
        wide = torch.promote_types(v.dtype, torch.float32)
        return v, (v.to(wide) - base.to(wide)).square().mean()

    def _backward(
        self, result: torch.Tensor, index: int, penalties: list[torch.Tensor], weight: float
    ) -> None:
        """Reward ``result`` at timestep ``index`` and run backward through its graph."""
        self.rewarded = result.detach()
        divergence = None
        if penalties:
            divergence = torch.stack([p.detach() for p in penalties]).mean()
            self.penalties.append(divergence * weight)
            self.finite = self.finite and bool(torch.isfinite(divergence))
        gradient = self._reward(result, index, self.step.weight * weight, self.loss_scale)
        if gradient is None:
            return
        factor = self.step.divergence * weight * self.loss_scale / max(1, len(penalties))
        gradients = [gradient, *(torch.full_like(p, factor) for p in penalties)]
        if divergence is not None:
            self.losses[-1] = self.losses[-1] + self.step.divergence * weight * divergence
        torch.autograd.backward([result, *penalties], gradients)

    def _reward(
        self, x: torch.Tensor, index: int, weight: float, scale: float
    ) -> torch.Tensor | None:
        """Score latents; the gradient of ``weight · scale ·`` loss at them, or None if not finite.

        One reward at a time, so that the graph of one is alive.
        """
        trajectory, end = self.trajectory, index == self.step.num_steps
        timestep = trajectory.model_timestep(0 if end else index)
        timestep = torch.zeros_like(timestep) if end else timestep
        self.timesteps.append(0.0 if end else float(trajectory.timesteps[index]))
        conditions, frames = trajectory.conditions, self._frames(x)
        scores, loss, gradients = {}, torch.zeros((), device=x.device), []
        for name, reward in self.step.rewards.items():
            leaf = x.detach().requires_grad_()
            score = frames(reward, leaf, timestep, conditions)
            score = _check_score(score, len(x))
            target = self.step.target
            short = -score if target is None else torch.relu(target - score)
            part = weight * self.step.reward_weights[name] * short.mean()
            scores[name] = score.detach()
            loss = loss + part.detach()
            # One wait for the device. The scores are looked at too: relu would hide an infinite
            # one.
            good = torch.isfinite(score.detach()).all() & torch.isfinite(part.detach())
            self.finite = self.finite and bool(good)
            if self.finite:
                (part * scale).backward()
                if leaf.grad is None:
                    raise ValueError(_NO_GRAPH)
                gradients.append(leaf.grad)
        self.scores.append(scores)
        self.losses.append(loss)
        if not self.finite:
            return None
        if len(gradients) == 1:
            return gradients[0]
        return flow_step(gradients, [1.0] * len(gradients))

    def _frames(self, x: torch.Tensor) -> Any:
        """How a reward is called: on the video, or on weighted frames of it, the same for all."""
        plan = self.plan
        if plan.segments is None:
            return lambda reward, x, timestep, conditions: reward(x, timestep, conditions)
        batch, count = x.shape[0], x.shape[2]
        span = count // plan.segments
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        drawn = torch.randint(span, (batch, plan.segments), generator=self.generator, device=device)
        chosen = drawn.to(x.device) + span * torch.arange(plan.segments, device=x.device)
        weights = torch.exp(-plan.attenuation * (chosen - count // 2).abs().to(torch.float64))
        rows = torch.arange(batch, device=x.device)

        def call(
            reward: Reward, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
        ) -> torch.Tensor:
            total: Any = 0.0
            for segment in range(chosen.shape[1]):
                frame = chosen[:, segment]

                def pick(tensor: torch.Tensor, frame: torch.Tensor = frame) -> torch.Tensor:
                    if tensor.ndim != 5 or tensor.shape[2] != count:
                        return tensor
                    return tensor[rows, :, frame].unsqueeze(2)

                part = {key: pick(value) for key, value in conditions.items()}
                score = _check_score(reward(pick(x), timestep, part), batch)
                total = total + weights[:, segment].to(score.dtype) * score
            return total / chosen.shape[1]

        return call

    def _randn(self, like: torch.Tensor) -> torch.Tensor:
        device = self.generator.device if self.generator is not None else like.device
        wide = torch.promote_types(like.dtype, torch.float32)
        noise = torch.randn(like.shape, generator=self.generator, device=device, dtype=wide)
        return noise.to(like)

    def _output(self, points: Sequence[Point], gradient: torch.Tensor | None) -> PRFLOutput:
        rows = self.scores
        names = list(self.step.rewards)
        blank = torch.full_like(next(iter(rows[0].values())), math.nan)
        missing = [blank] * (len(points) - len(rows))
        by_reward = {
            name: torch.stack([row.get(name, blank) for row in rows] + missing) for name in names
        }
        parts = [self.step.reward_weights[name] * by_reward[name] for name in names]
        total = torch.stack(parts).sum(0)
        times = self.timesteps + [math.nan] * (len(points) - len(self.timesteps))
        return PRFLOutput(
            loss=torch.stack(self.losses).sum(),
            rewards=total,
            by_reward=by_reward,
            indices=tuple(point.step for point in points),
            depths=tuple(point.depth for point in points),
            timesteps=tuple(times),
            latents=self.rewarded.detach(),
            finite=self.finite,
            divergence=torch.stack(self.penalties).sum() if self.penalties else None,
            gradient=gradient,
            drift=self.trajectory.drift,
        )


_NO_GRAPH = (
    "the reward's scores carry no graph to its input; it must not detach it or run under no_grad"
)


def _check_score(score: torch.Tensor, batch: int) -> torch.Tensor:
    """Scores ``[batch]`` in float32 (or float64), with a graph."""
    if not isinstance(score, torch.Tensor) or score.shape != (batch,):
        raise ValueError(
            f"the reward returned {describe(score)}, expected one score per sample, [{batch}]"
        )
    if not score.requires_grad:
        raise ValueError(_NO_GRAPH)
    return score if score.dtype == torch.float64 else score.float()


def _check_graph(v: torch.Tensor) -> None:
    if not v.requires_grad:
        raise ValueError(NO_GRADIENT)
