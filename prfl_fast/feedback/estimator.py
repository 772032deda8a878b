"""Gradient of one trajectory's reward loss, estimated at its gradient points."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from prfl_fast.feedback.divergence import adapters_off
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.kernels import flow_step
from prfl_fast.models.adapter import Conditions, generated_frames, set_first_frame
from prfl_fast.models.velocity import model_of
from prfl_fast.rewards.functions import Reward, reward_modules
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.utils.checks import check
from prfl_fast.utils.recompute import SeparateCalls
from prfl_fast.utils.sharded import holds_on_all_ranks, shares_weights
from prfl_fast.utils.transfers import to_device


@dataclass(frozen=True, eq=False)
class FeedbackSpec:
    """The loss of a PRFL step; see :class:`prfl_fast.feedback.step.PRFL` for the fields."""

    sampler: Sampler
    plan: GradientPlan
    rewards: Mapping[str, Reward]
    reward_weights: Mapping[str, float]
    target: float | None
    weight: float
    divergence: float

    def models(self) -> list[nn.Module | None]:
        """Return the model, None for a function, and the modules of the rewards."""
        rewards = [part for reward in self.rewards.values() for part in reward_modules(reward)]
        return [model_of(self.sampler.transformer), *rewards]

    def shares_weights(self) -> bool:
        """Return True if weights of the model or a reward are sharded over ranks."""
        return shares_weights(*self.models())


class StepLoss(torch.Tensor):
    """Hold a loss whose gradients are in ``.grad`` already; ``backward()`` raises an error.

    Results of its arithmetic are of this class too, except that of ``detach()``.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Raise ``RuntimeError`` for ``backward()``, unless a loss with a graph was added."""
        if func is torch.Tensor.backward and not args[0].requires_grad:
            raise RuntimeError(
                "the loss of a PRFL step has no graph: the call of the step ran the backward, and "
                "the gradients are in .grad. Remove backward() and call optimizer.step(); factors "
                "of the loss go into the call as loss_scale"
            )
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if func is torch.Tensor.detach else result

    def __reduce_ex__(self, proto: Any) -> Any:
        """Pickle a plain tensor, which ``torch.load`` reads without this package."""
        return self.detach().__reduce_ex__(proto)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        """Return a plain tensor: torch copies no subclass by itself."""
        return self.detach().clone()


@dataclass(frozen=True)
class PRFLOutput:
    """Hold the result of one reward-feedback step; no tensor carries a graph.

    K counts the rewarded latents: one per gradient point, then one per renoised sample.

    Attributes:
        loss: scalar, reward loss plus divergence loss, without ``loss_scale``; its ``backward()``
            raises, because the step has run the backward.
        rewards: ``[K, B]``, float32 (float64 for float64 rewards), the weighted sum of several; NaN
            at points that were not reached.
        by_reward: the same for each reward by name; a single reward is called ``reward``.
        indices: the K solver steps, increasing.
        depths: steps that each point's gradient went through.
        timesteps: the K timesteps (1000·σ) at which latents were rewarded.
        latents: ``[B, C, F, H, W]``, the last rewarded latents; the result of a guided trajectory.
        finite: False if a reward or loss was NaN or infinite, on any rank if weights are sharded:
            skip the update. A step that trains a model then has dropped the gradients of all its
            parameters, also those of earlier calls. With a velocity function, whose parameters are
            unknown, or a gradient to noise or latents, the trajectory ended there, and gradients of
            earlier points remain. After a call with ``wait=False`` that trains a model, a 0-d bool
            tensor on the device.
        divergence: scalar, mean squared difference of the velocities with and without adapters over
            the gradient steps; None if it is off.
        gradient: ``[B, C, F, H, W]``, gradient of the loss with respect to the noise for plans with
            ``to="noise"``; else None.
        drift: relative L2 distance of the latents from the exact rollout's, by solver step, if this
            trajectory was checked; else None.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    by_reward: dict[str, torch.Tensor]
    indices: tuple[int, ...]
    depths: tuple[int, ...]
    timesteps: tuple[float, ...]
    latents: torch.Tensor = field(repr=False)
    finite: bool | torch.Tensor
    divergence: torch.Tensor | None = None
    gradient: torch.Tensor | None = field(default=None, repr=False)
    drift: dict[int, float] | None = None


class GradientSteps(NamedTuple):
    """Latents ``x`` before step ``next_step``, with the graph of the steps that led to them.

    ``weight`` is the factor of their loss, ``calls`` the model's calls in these steps,
    ``penalties`` the divergence of each step with its graph, and ``divergence`` the mean of these
    without graph (None if there are none).
    """

    x: torch.Tensor
    next_step: int
    weight: float
    calls: SeparateCalls
    penalties: Sequence[torch.Tensor] = ()
    divergence: torch.Tensor | None = None


class _NonFiniteRewardError(Exception):
    """End a guided trajectory early."""


class GradientEstimator:
    """Estimate the gradient of one trajectory's loss, point by point.

    At each point call ``backward(steps, score(steps, loss_scale))`` on the steps of :meth:`take` or
    :meth:`take_again`. ``generator`` draws frames and noise for plans that need them.

    Attributes:
        deferred: True if the device collects whether values are finite, and :meth:`output` reads
            the result once. If False, each point reads it before its backward: a gradient to
            latents or noise changes the later steps, and that of a velocity function, whose
            parameters are unknown, could not be dropped.
        finite: False after a reward or loss was read that is not finite.
    """

    def __init__(
        self,
        spec: FeedbackSpec,
        trajectory: Trajectory,
        generator: torch.Generator | None,
        loss_scale: float,
    ) -> None:
        self.spec, self.trajectory = spec, trajectory
        self.generator, self.loss_scale = generator, loss_scale
        self.finite = True
        known = model_of(spec.sampler.transformer) is not None
        self.deferred = known and spec.plan.to == "parameters"
        self._ranks_agree = spec.shares_weights()
        self._good: torch.Tensor | None = None  # on the device: the values so far are finite
        self._leaf: torch.Tensor | None = None
        if spec.plan.to == "noise":
            self._leaf = trajectory.x = trajectory.x.detach().requires_grad_()
        self._rewarded: torch.Tensor  # not the initial latents, which would stay in memory
        self._scores: list[dict[str, torch.Tensor]] = []
        self._losses: list[torch.Tensor] = []
        self._divergences: list[torch.Tensor] = []
        self._timesteps: list[float] = []

    @torch.enable_grad()
    def take(self, point: Point, weight: float, *, last: bool) -> GradientSteps:
        """Take a point's steps with gradient; the trajectory must be at the first of them.

        ``last`` is True for the last point of the trajectory.
        """
        trajectory, calls, penalties = self.trajectory, SeparateCalls(), list[torch.Tensor]()
        clean = self.spec.plan.reward_at == "clean"
        for index in range(point.first, point.step + 1):
            x = trajectory.x
            # The last step's graph is used at once, so recomputing it would save nothing.
            velocity = partial(trajectory.velocity, index=index)
            v = calls.call(velocity, x, keep=index == point.step)
            penalties += self._divergence(calls, velocity, x, v)
            # After the last point nothing needs x_{m+1}, if the reward reads the estimate of x0.
            if index < point.step or not clean or not last:
                trajectory.follow(trajectory.solve(v))
        if not clean:
            return self._steps(trajectory.x, point.step + 1, calls, penalties, weight)
        x0 = flow_step([x, v], [1.0, -trajectory.sigma(point.step)])
        return self._steps(x0, self.spec.sampler.num_inference_steps, calls, penalties, weight)

    @torch.enable_grad()
    def take_again(self, point: Point, weight: float) -> GradientSteps:
        """Noise the result to the last level and repeat the last step (DRaFT-LV)."""
        index, end = point.step, self.trajectory.x
        sigma = self.trajectory.sigma(index)
        x = flow_step([end, _randn_like(end, self.generator)], [1 - sigma, sigma])
        x = set_first_frame(x, self.trajectory.conditions)
        calls, velocity = SeparateCalls(), partial(self.trajectory.velocity, index=index)
        v = calls.call(velocity, x, keep=True)
        penalties = self._divergence(calls, velocity, x, v)
        return self._steps(flow_step([x, v], [1.0, -sigma]), index + 1, calls, penalties, weight)

    def _steps(
        self,
        x: torch.Tensor,
        index: int,
        calls: SeparateCalls,
        penalties: list[torch.Tensor],
        weight: float,
    ) -> GradientSteps:
        divergence = None
        if penalties:
            divergence = torch.stack([p.detach() for p in penalties]).mean()
            self._divergences.append(divergence * weight)
            self._record(torch.isfinite(divergence))
        return GradientSteps(x, index, weight, calls, penalties, divergence)

    def _record(self, good: torch.Tensor) -> None:
        """Collect a 0-d bool tensor: True if all values that it stands for are finite."""
        self._good = good if self._good is None else self._good & good
        if not self.deferred:
            self._read()

    def _agreed(self, good: torch.Tensor) -> torch.Tensor:
        """Return True if the values are finite on all ranks that must call the models together."""
        return holds_on_all_ranks(good) if self._ranks_agree else good

    def _read(self) -> None:
        if self._good is not None:
            good, self._good = self._agreed(self._good), None
            self.finite = self.finite and bool(good)  # waits for the device

    @torch.enable_grad()
    def score(self, steps: GradientSteps, scale: float) -> torch.Tensor | None:
        """Return the gradient of ``scale ·`` reward loss at latents, or None if not ``finite``."""
        trajectory, x, index = self.trajectory, steps.x, steps.next_step
        end = index == self.spec.sampler.num_inference_steps
        timestep = trajectory.model_timestep(0 if end else index)
        timestep = torch.zeros_like(timestep) if end else timestep
        self._timesteps.append(0.0 if end else float(trajectory.timesteps[index]))
        weight = self.spec.weight * steps.weight
        on_frames = _frame_scorer(self.spec.plan, x, self.generator)
        loss = torch.zeros((), device=x.device, dtype=torch.float32)
        scores, gradients = {}, []
        for name, reward in self.spec.rewards.items():
            leaf = x.detach().requires_grad_()
            if on_frames is None:
                score = _check_score(reward(leaf, timestep, trajectory.conditions), len(x))
            else:
                score = on_frames(reward, leaf, timestep, trajectory.conditions)
            target = self.spec.target
            short = -score if target is None else torch.relu(target - score)
            part = weight * self.spec.reward_weights[name] * short.mean()
            scores[name] = score.detach()
            loss = loss + part.detach()
            # The score is checked too, because relu hides an infinite one.
            self._record(torch.isfinite(score.detach()).all() & torch.isfinite(part.detach()))
            if self.finite:
                (part * scale).backward()
                _check_graph(leaf.grad is not None, _NO_GRAPH)
                assert leaf.grad is not None
                gradients.append(leaf.grad)
        self._scores.append(scores)
        self._losses.append(loss)
        self._rewarded = x.detach()
        if not self.finite:
            return None
        return gradients[0] if len(gradients) == 1 else flow_step(gradients, [1.0] * len(gradients))

    def backward(
        self,
        steps: GradientSteps,
        gradient: torch.Tensor | None,
        before_last: Callable[[], None] | None = None,
    ) -> None:
        """Run backward through the steps and their divergences, then drop the graph.

        ``before_last`` is called before the backward of the model's last call.
        """
        if gradient is not None:
            factor, penalties = self.spec.divergence * steps.weight, steps.penalties
            if steps.divergence is not None:
                self._losses[-1] = self._losses[-1] + factor * steps.divergence
            share = factor * self.loss_scale / max(1, len(penalties))
            gradients = [gradient, *(torch.full_like(p, share) for p in penalties)]
            steps.calls.backward([steps.x, *penalties], gradients, self._leaf, before_last)
        self.trajectory.cut()

    def run_guided(self, points: tuple[Point, ...]) -> PRFLOutput:
        """Sample with the velocity changed by the gradient of the loss at each point's latents."""
        steps, guide = self.spec.sampler.num_inference_steps, partial(self._guide, points)
        with contextlib.suppress(_NonFiniteRewardError):
            self.trajectory.run(steps, adjust=guide)
        self._rewarded = self.trajectory.x
        return self.output(points[: len(self._scores)])

    def output(self, points: Sequence[Point], *, wait: bool = True) -> PRFLOutput:
        """Return the results at ``points``; NaN where the trajectory ended before.

        Without ``wait``, values that are on the device are not read.
        """
        if wait:
            self._read()
        finite = self.finite if self._good is None else self._agreed(self._good)
        rows, names = self._scores, list(self.spec.rewards)
        blank = torch.full_like(next(iter(rows[0].values())), math.nan)
        missing = [blank] * (len(points) - len(rows))
        by_reward = {
            name: torch.stack([row.get(name, blank) for row in rows] + missing) for name in names
        }
        loss = torch.stack(self._losses).sum()
        parts = [self.spec.reward_weights[name] * by_reward[name] for name in names]
        times = self._timesteps + [math.nan] * (len(points) - len(self._timesteps))
        return PRFLOutput(
            # A fake tensor of the planner cannot be of two classes.
            loss=loss.as_subclass(StepLoss) if type(loss) is torch.Tensor else loss,
            rewards=torch.stack(parts).sum(0),
            by_reward=by_reward,
            indices=tuple(point.step for point in points),
            depths=tuple(point.depth for point in points),
            timesteps=tuple(times),
            latents=self._rewarded.detach(),
            finite=finite,
            divergence=torch.stack(self._divergences).sum() if self._divergences else None,
            gradient=None if self._leaf is None else self._leaf.grad,
            drift=self.trajectory.drift,
        )

    @torch.enable_grad()
    def _guide(self, points: tuple[Point, ...], index: int, v: torch.Tensor) -> torch.Tensor:
        """Return the guided velocity of step ``index``."""
        trajectory = self.trajectory
        if index not in (point.step for point in points):
            return v
        sigma, batch = trajectory.sigma(index), len(trajectory.x)
        # The weight undoes the mean over the batch: each sample follows its own loss.
        gradient = self.score(GradientSteps(trajectory.x, index, batch, SeparateCalls()), 1.0)
        self._losses[-1] = self._losses[-1] / (batch * len(points))
        if gradient is None:
            raise _NonFiniteRewardError
        # With x_t = (1-t)·x0 + t·ε the velocity is v = -(x + t·s)/(1-t), with s the score of the
        # latents' distribution. Weighting this distribution by exp(-loss) subtracts ∇loss from s,
        # and so adds t/(1-t)·∇loss to v.
        return flow_step([v, gradient], [1.0, sigma / (1 - sigma)])

    def _divergence(
        self,
        calls: SeparateCalls,
        velocity: Callable[[torch.Tensor], torch.Tensor],
        x: torch.Tensor,
        v: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Return the mean squared distance of ``v`` from the base velocity; empty if it is off."""
        if not self.spec.divergence:
            return []
        model = model_of(self.spec.sampler.transformer)
        assert model is not None
        off = partial(adapters_off, model)
        if x.requires_grad:
            # After an earlier step with gradient the latents depend on the parameters, and the base
            # velocity depends on the latents. Its backward recomputes blocks with adapters off.
            base = calls.call(velocity, x, off)
        else:
            with torch.no_grad(), off():
                base = velocity(x)
        wide = torch.promote_types(v.dtype, torch.float32)
        difference = generated_frames(v.to(wide) - base.to(wide), self.trajectory.conditions)
        return [difference.square().mean()]


_NO_GRAPH = (
    "the reward's scores carry no graph to its input. The reward must not detach its input or run "
    "under no_grad."
)


def _frame_scorer(
    plan: GradientPlan, x: torch.Tensor, generator: torch.Generator | None
) -> Callable[[Reward, torch.Tensor, torch.Tensor, Conditions], torch.Tensor] | None:
    """Return a function that scores weighted random frames of ``x``; None to score the video."""
    if plan.segments is None:
        return None
    batch, count = x.shape[0], x.shape[2]
    span = count // plan.segments
    device = generator.device if generator is not None else torch.device("cpu")
    # The frames are drawn here, once, so that all rewards of a point score the same ones.
    drawn = torch.randint(span, (batch, plan.segments), generator=generator, device=device)
    # Segment i of a sample has the frames span·i … span·(i+1) - 1.  [B, segments]
    chosen = to_device(drawn, x.device) + span * torch.arange(plan.segments, device=x.device)
    weights = torch.exp(-plan.attenuation * (chosen - count // 2).abs().to(torch.float64))
    rows = torch.arange(batch, device=x.device)

    def pick(tensor: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
        if tensor.ndim != 5 or tensor.shape[2] != count:  # a condition without frames
            return tensor
        return tensor[rows, :, frame].unsqueeze(2)  # [B, C, 1, H, W]

    def score_frames(
        reward: Reward, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        total: Any = 0.0
        for segment in range(chosen.shape[1]):
            frame = chosen[:, segment]
            part = {key: pick(value, frame) for key, value in conditions.items()}
            score = _check_score(reward(pick(x, frame), timestep, part), batch)
            total = total + weights[:, segment].to(score.dtype) * score
        return total / chosen.shape[1]

    return score_frames


def _randn_like(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    device = generator.device if generator is not None else x.device
    wide = torch.promote_types(x.dtype, torch.float32)
    drawn = torch.randn(x.shape, generator=generator, device=device, dtype=wide)
    return to_device(drawn, x.device).to(x.dtype)


def _check_score(score: torch.Tensor, batch: int) -> torch.Tensor:
    """Return the scores ``[batch]`` in float32 (or float64) after checking shape and graph."""
    ok = isinstance(score, torch.Tensor) and score.shape == (batch,)
    check(ok, "the reward's result", score, f"one score per sample, [{batch}]")
    _check_graph(score.requires_grad, _NO_GRAPH)
    return score if score.dtype == torch.float64 else score.float()


def _check_graph(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)
