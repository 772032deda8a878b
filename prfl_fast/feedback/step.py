"""PRFL: one step of reward feedback learning on a sampled trajectory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from prfl_fast.feedback.divergence import check_adapters
from prfl_fast.feedback.estimator import FeedbackSpec, GradientEstimator, PRFLOutput
from prfl_fast.feedback.experts import check_points, expert_steps, trained_plan
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.kernels import flow_step
from prfl_fast.kernels.runtime.checks import describe
from prfl_fast.models.adapter import FIRST_FRAME, Conditions, not_inference, set_first_frame
from prfl_fast.models.experts import Experts
from prfl_fast.models.velocity import ModelCall, Velocity, check_finite, checks_values, model_of
from prfl_fast.rewards.functions import Reward, check_autograd, check_callable, check_frozen
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.utils.checks import check, check_number, check_type, plain
from prfl_fast.utils.recompute import NO_GRADIENT
from prfl_fast.utils.sharded import (
    delayed_reduction,
    discard_gradients,
    ending_pass,
    reduces_once,
)

# At Wan's first level, 0.9998 at shift 5, the factor σ/(1-σ) of guided sampling is already 5000.
PURE_NOISE = 1e-3


class PRFL:
    """Run reward feedback learning on a trajectory; a call leaves the gradients in ``.grad``.

    Source: "Video Generation Models Are Good Latent Reward Models" (PRFL, arXiv 2511.21541). One
    call samples a trajectory from ``noise``. At each index m drawn by the default plan it takes the
    solver step with gradient, ``x_{m+1} = solver(x_m, v_θ(x_m, t_m, c))`` with ``x_m`` and the
    solver's history constant, scores the result at its own noise level, ``r = r_φ(x_{m+1}, t_{m+1},
    c)``, and runs backward on ``weight · relu(target - r)``, averaged over the batch and the K
    drawn indices. The trajectory then continues from ``x_{m+1}`` without the graph, so only one
    step's graph is alive at a time, and ends after the last index.

    The transformer's train/eval mode does not change. Random numbers come from the given generator
    only.

    Args:
        transformer, scheduler, num_inference_steps, guidance, rollout: see
            :class:`prfl_fast.rollout.sampler.Sampler`; guidance includes the gradient steps.
        reward: ``(x, timestep [B], conditions) -> [B]``, e.g. a frozen ``LatentRewardModel``; or
            several by name.
        plan: gradient points and the target of the gradient; ``GradientPlan.prfl()`` by default.
        target: rewards of at least ``target`` give no gradient; a sigmoid never reaches the default
            2. None replaces the hinge with ``-r``.
        weight: factor of the reward loss; for a guided trajectory, the strength of the guidance.
        reward_weights: factors of several rewards' losses by name; 1 unless given.
        divergence: factor of the mean squared difference between the velocities with and without
            adapters at the gradient steps.

    Attributes:
        engine: runs the steps without gradient and counts drift checks over all calls.

    Raises:
        TypeError: if the model, reward or scheduler is unsupported, or an argument has the wrong
            type.
        ValueError: if the schedule is too short for the plan, a number is not finite, a weight
            names no reward, a divergence has no adapters or no gradient to the parameters, or a
            point's gradient may go through the steps of two experts.
    """

    def __init__(  # noqa: PLR0913 - the public face: one call holds every option of a step
        self,
        transformer: nn.Module | ModelCall | Velocity,
        reward: nn.Module | Reward | Mapping[str, Reward],
        scheduler: Any,
        plan: GradientPlan | None = None,
        *,
        num_inference_steps: int = 40,
        target: float | None = 2.0,
        weight: float = 0.1,
        reward_weights: Mapping[str, float] | None = None,
        guidance: Guidance | None = None,
        rollout: RolloutConfig | None = None,
        divergence: float = 0.0,
    ) -> None:
        rollout = RolloutConfig() if rollout is None else rollout
        plan = GradientPlan.prfl() if plan is None else plan
        check_type("plan", plan, GradientPlan)
        self.sampler = Sampler(transformer, scheduler, num_inference_steps, guidance, rollout)
        rewards = _named_rewards(reward)
        factors = dict.fromkeys(rewards, 1.0) | dict(reward_weights or {})
        factors = {name: plain(factor) for name, factor in factors.items()}
        target, weight, divergence = plain(target), plain(weight), plain(divergence)
        expected = f"names of the rewards, {sorted(rewards)}"
        check(bool(rewards) and len(factors) == len(rewards), "reward_weights", factors, expected)
        numbers = {"weight": weight, "divergence": divergence}
        numbers["target"] = 0.0 if target is None else target
        numbers |= {f"reward_weights[{name!r}]": factor for name, factor in factors.items()}
        for name, value in numbers.items():
            check_number(name, value)
        plan.steps(self.sampler.num_inference_steps)  # raises if the plan does not fit the schedule
        model = self._model = model_of(transformer)
        self._experts = model if isinstance(model, Experts) else None
        self._names = [] if self._experts is None else expert_steps(self.sampler, self._experts)
        if self._experts is not None and self._experts.trained:
            trained_plan(plan, self._names, self._experts.trained)
        if divergence:
            _check_divergence(divergence, transformer, plan)
        self.plan = plan
        self.spec = FeedbackSpec(
            self.sampler, plan, rewards, factors, target, weight, float(divergence)
        )
        self.engine = RolloutEngine(transformer, rollout)
        # The planner replaces these by classes that run the model at a few steps only.
        self.trajectory_type: Callable[..., Trajectory] = Trajectory
        self.estimator_type: Callable[..., GradientEstimator] = GradientEstimator

    def use_rollout(self, config: RolloutConfig) -> None:
        """Run the steps without gradient of all later calls by another configuration.

        The engine is a new one. Raise ``ValueError`` if the configuration does not fit the sampler.
        """
        self.sampler = replace(self.sampler, rollout=config)
        self.spec = replace(self.spec, sampler=self.sampler)
        self.engine = RolloutEngine(self.sampler.transformer, config)

    @torch.inference_mode(mode=False)  # whose tensors carry no graph
    def __call__(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        *,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        indices: Sequence[int | Point] | None = None,
        loss_scale: float = 1.0,
        wait: bool = True,
    ) -> PRFLOutput:
        """Run one trajectory and accumulate the gradient of its loss.

        Args:
            noise: ε ~ N(0, I), ``[B, C, F, H, W]``; all latents have its dtype.
            conditions: tensors of batch B for the transformer and the reward.
            latents: real x0 like ``noise``, for plans that start from data.
            generator: draws points, frames and noise; ranks that share a trajectory need the same
                state.
            indices: gradient steps instead of a draw, increasing: points, or steps with equal
                weights and the plan's depth.
            loss_scale: factor of the gradients only, e.g. ``1 / gradient_accumulation_steps``.
            wait: if False, a step that trains a model does not wait for the device at its end:
                ``finite`` is a bool tensor, and the caller drops the gradients if it is False.

        Returns:
            See :class:`PRFLOutput`; check ``finite`` before the optimizer step. A step that trains
            a model waits for the device once, at its end. With an approximate rollout it waits for
            the check of its inputs and for checks of drift too.

        Raises:
            TypeError: if the model is unsupported.
            ValueError: if noise, latents or conditions have a wrong shape or are not finite;
                ``indices`` are out of order or range; the reward has trainable parameters, a wrong
                shape, or no graph to its input; the transformer has no trainable parameter; or a
                plan of several steps finds active dropout.
        """
        plan = self.plan
        for reward in self.spec.rewards.values():
            check_frozen(reward)
        check_number("loss_scale", loss_scale)
        self._check_inputs(noise, latents)
        self._check_model()
        # From NaN inputs an approximate rollout would exceed its drift limit and be exact for good.
        deferred = self._model is not None and plan.to == "parameters" and not self.engine.inexact
        if not deferred and latents is not None and checks_values():
            check_finite("latents", latents)
        points = self._points(indices, generator)
        trajectory = self._open(points, noise, conditions, latents, check_values=not deferred)
        estimator = self.estimator_type(self.spec, trajectory, generator, plain(loss_scale))
        if plan.to == "latent":
            with ending_pass(*self.spec.models()):
                return estimator.run_guided(points)
        # The trajectory's own point and the renoised ones have equal weights.
        share, drawn = 1 + plan.renoised, len(points)
        points = (*points, *[Point(points[-1].step)] * plan.renoised)
        with ending_pass(*self.spec.models()), self._prepared_model() as before_last:
            try:
                for number, point in enumerate(points):
                    if not estimator.finite:
                        break
                    if number < drawn:
                        trajectory.run(point.first)
                        last = number == drawn - 1
                        taken = estimator.take(point, point.weight / share, last=last)
                    else:
                        taken = estimator.take_again(point, 1 / share)
                    gradient = estimator.score(taken, estimator.loss_scale)
                    last = number == len(points) - 1
                    estimator.backward(taken, gradient, before_last if last else None)
                    del taken  # frees its latents before the next rollout
            finally:
                # An exception's traceback would keep the graph of several steps alive.
                trajectory.cut()
        output = estimator.output(points, wait=wait)
        if output.finite is False:
            self._discard(noise, latents)
        return output

    @contextlib.contextmanager
    def _prepared_model(self) -> Iterator[Callable[[], None]]:
        """Prepare the model for the backwards of a call; yield a function to call before the last.

        If gradients are reduced once per call, the function lets the last backward reduce them.
        """
        model = self._model
        if self.plan.to == "noise" or model is None:
            with _frozen(self.sampler.transformer):
                yield lambda: None
            return
        if not reduces_once(model):
            yield lambda: None
            return
        with contextlib.ExitStack() as stack:
            stack.enter_context(delayed_reduction(model))
            try:
                yield stack.close
            except BaseException:
                discard_gradients(model)  # those that are not reduced would join the next sum
                raise

    def _discard(self, noise: torch.Tensor, latents: torch.Tensor | None) -> None:
        """Drop the gradients of a step that is not finite; raise if its input is not finite."""
        if self._model is not None and self.plan.to == "parameters":
            discard_gradients(self._model)
        check_finite("noise", noise)
        if latents is not None:
            check_finite("latents", latents)

    def draw_points(self, generator: torch.Generator | None = None) -> tuple[Point, ...]:
        """Draw gradient points as a call does, to pass to several calls as ``indices``."""
        return self._points(None, generator)

    def _points(
        self, indices: Sequence[int | Point] | None, generator: torch.Generator | None
    ) -> tuple[Point, ...]:
        """Return the given points, or draw some, of two experts where one trains."""
        plan, steps, experts = self.plan, self.sampler.num_inference_steps, self._experts
        if indices is not None:
            points = plan.points_at(indices, steps)
            if experts is not None and plan.to == "parameters":
                check_points(points, self._names, experts.trained)
            return points
        if experts is not None:
            plan = trained_plan(plan, self._names, experts.trained)
        return plan.draw(steps, generator)

    @property
    def high_share(self) -> float:
        """Share of the gradient points that the expert ``high`` of two experts gets."""
        steps = self.plan.steps(self.sampler.num_inference_steps)
        return sum(self._names[step] == "high" for step in steps) / len(steps)

    def _open(
        self,
        points: Sequence[Point],
        noise: torch.Tensor,
        conditions: Conditions,
        latents: torch.Tensor | None,
        *,
        check_values: bool,
    ) -> Trajectory:
        """Return a trajectory at its first latents, which visits the steps of the points."""
        plan = self.plan
        begin = plan.begin(self.sampler.num_inference_steps)
        if plan.start == "data" and plan.strength is None:
            begin = points[0].first
        visit = [step for point in points for step in range(point.first, point.step + 1)]
        trajectory = self.trajectory_type(
            self.sampler,
            noise,
            conditions,
            engine=self.engine,
            start=begin,
            visit=visit,
            check_values=check_values,
        )
        alone = plan.segments is not None and FIRST_FRAME in conditions
        expected = f"no {FIRST_FRAME}, because this plan rewards frames one by one"
        check(not alone, "conditions", sorted(conditions), expected)
        if latents is not None:  # the plan starts from data, corrupted to its first noise level
            sigma = trajectory.sigma(begin)
            latents = not_inference(latents)
            x = flow_step([trajectory.x, latents], [sigma, 1 - sigma])
            trajectory.x = set_first_frame(x, trajectory.conditions)
        if plan.to == "latent":
            first = points[0].step
            sigma = trajectory.sigma(first)
            hint = "The factor sigma / (1 - sigma) has no bound there."
            expected = f"a start later than step {first}, where sigma is {sigma:g}"
            check(sigma <= 1 - PURE_NOISE, "window", plan.window, expected, hint=hint)
        return trajectory

    def _check_model(self) -> None:
        """Check the model for a gradient to the parameters, or through several steps."""
        model, plan = self._model, self.plan
        if model is None:
            return
        check_autograd("transformer", model)
        if plan.to == "parameters" and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(NO_GRADIENT)
        if plan.depth == 1:
            return
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                raise ValueError(
                    f"{name} has dropout p={module.p} in train mode. This plan recomputes each "
                    "forward in the backward, so masks would differ. Call model.eval() or set "
                    "dropout to 0."
                )

    def _check_inputs(self, noise: torch.Tensor, latents: torch.Tensor | None) -> None:
        ok = isinstance(noise, torch.Tensor) and noise.ndim == 5
        check(ok, "noise", noise, "a floating-point tensor [B, C, F, H, W]")
        least = self.plan.segments or 0
        expected = f"at least the plan's {least} segments"
        check(noise.shape[2] >= least, "the number of latent frames", noise.shape[2], expected)
        if self.plan.start == "noise":
            check(latents is None, "latents", latents, "None: the plan starts from noise")
            return
        like = isinstance(latents, torch.Tensor) and latents.shape == noise.shape
        like = like and latents.device == noise.device  # type: ignore[union-attr]
        expected = f"real latents of the shape and device of noise, {describe(noise)}"
        check(like, "latents", latents, expected)


def _named_rewards(reward: nn.Module | Reward | Mapping[str, Reward]) -> dict[str, Reward]:
    rewards = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
    for name, function in rewards.items():
        label = f"reward[{name!r}]" if isinstance(reward, Mapping) else "reward"
        check_callable(label, function, " (x, timestep, conditions) -> [B]")
    return rewards


def _check_divergence(
    divergence: float, transformer: nn.Module | ModelCall | Velocity, plan: GradientPlan
) -> None:
    ok = divergence > 0 and plan.to == "parameters"
    expected = "at least 0, and 0 unless the gradient goes to the parameters"
    check(ok, "divergence", divergence, expected)
    model = model_of(transformer)
    hint = "Pass the model, or a ModelCall of it."
    check(model is not None, "divergence", divergence, "0 for a function", hint=hint)
    assert model is not None
    check_adapters(model)


@contextlib.contextmanager
def _frozen(transformer: nn.Module | ModelCall | Velocity) -> Iterator[None]:
    """Turn off the gradients of a model's parameters within the context."""
    model = model_of(transformer)
    parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
