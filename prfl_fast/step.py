"""Reward feedback: a trajectory, and gradient where its plan asks for it.

Source of the step: "Video Generation Models Are Good Latent Reward Models" (PRFL, arXiv
2511.21541); of the other plans: :class:`prfl_fast.gradient_plan.GradientPlan`.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from prfl_fast._checks import check_number, is_number
from prfl_fast.adapters import Conditions
from prfl_fast.chain import NO_GRADIENT
from prfl_fast.divergence import check_adapters
from prfl_fast.feedback import PRFLOutput, Run
from prfl_fast.gradient_plan import GradientPlan, Point
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._checks import describe
from prfl_fast.model_call import (
    Guidance,
    ModelCall,
    Velocity,
    check_finite,
    check_transformer,
    model_of,
)
from prfl_fast.rewards import Reward, check_frozen
from prfl_fast.rollout_engine import RolloutEngine, RolloutSettings
from prfl_fast.schedulers import fresh_copy
from prfl_fast.trajectory import Trajectory

# Below 1 by less than this a noise level is 1 but for a solver's sake (UniPC: 1e-6).
PURE_NOISE = 1e-5


class PRFL:
    """Reward feedback learning on a trajectory; a call leaves the gradients in ``.grad``.

    With the default plan, process reward feedback learning (arXiv 2511.21541). One call samples a
    trajectory from ``noise``. At each index m drawn by ``plan`` it takes the solver step with
    gradient, ``x_{m+1} = solver(x_m, v_θ(x_m, t_m, c))`` with ``x_m`` and the solver's history
    constant, scores the result where it is, ``r = r_φ(x_{m+1}, t_{m+1}, c)``, and runs backward on
    ``weight · relu(target - r)``, averaged over the batch and over the K drawn indices. Then it
    goes on from the same ``x_{m+1}`` without the graph, so the forward of a gradient step is also a
    rollout step, and only one step's graph is alive at a time. After the last index it stops.

    Other plans send the gradient through chains of steps (each keeps its latents and nothing else,
    see :mod:`prfl_fast.chain`), reward a one-step estimate of x0, start from corrupted data, or
    send the gradient to the noise or the latents instead of the parameters.

    The transformer's train/eval mode is left alone. Only the reward's input gets a gradient from
    the reward, one reward at a time. Randomness comes from the given generator only.

    Args:
        transformer: a supported model (patched or not, with or without LoRA), a
            :class:`prfl_fast.model_call.ModelCall`, or a function ``(x, timestep [B], conditions)
            -> velocity`` for any other.
        reward: ``(x, timestep [B], conditions) -> [B]``, e.g. a frozen ``LatentRewardModel``; or
            several by name.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler. It is copied here and
            again for every trajectory: the caller's object never moves, and nothing passes from one
            call to the next.
        plan: which steps carry gradient, and where it goes.
        num_steps: solver steps of the schedule.
        target: rewards at or above it give no gradient. The default 2 lies above a sigmoid's range:
            never reached. None takes ``-r`` for the hinge.
        weight: factor of the reward loss; of a guided trajectory, the guidance's strength.
        reward_weights: factors of several rewards' losses by name; 1 unless given.
        guidance: classifier-free guidance, in gradient steps too.
        rollout: how steps without gradient are computed.
        divergence: factor of the mean squared difference between the velocities with and without
            adapters at the gradient steps.

    Raises:
        TypeError: an unsupported model, reward or scheduler; a plan, guidance or settings of
            another kind.
        ValueError: a schedule too short for the plan; numbers that are not finite; weights of
            unknown rewards; a divergence without adapters or with gradients that do not go to the
            parameters.
    """

    def __init__(
        self,
        transformer: nn.Module | ModelCall | Velocity,
        reward: nn.Module | Reward | Mapping[str, Reward],
        scheduler: Any,
        plan: GradientPlan | None = None,
        *,
        num_steps: int = 40,
        target: float | None = 2.0,
        weight: float = 0.1,
        reward_weights: Mapping[str, float] | None = None,
        guidance: Guidance | None = None,
        rollout: RolloutSettings | None = None,
        divergence: float = 0.0,
    ) -> None:
        check_transformer(transformer)
        self.rewards = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
        for name, function in self.rewards.items():
            if not callable(function):
                label = f"reward[{name!r}]" if isinstance(reward, Mapping) else "reward"
                raise TypeError(
                    f"{label} is {type(function).__name__}, expected a callable "
                    "(x, timestep, conditions) -> [B]"
                )
        weights = dict(reward_weights or {})
        if not self.rewards or set(weights) - set(self.rewards):
            raise ValueError(
                f"reward_weights names {sorted(weights)}, expected names of the rewards, "
                f"{sorted(self.rewards)}"
            )
        self.reward_weights = {name: weights.get(name, 1.0) for name in self.rewards}
        numbers = {"weight": weight, "divergence": divergence}
        numbers |= {f"reward_weights[{k!r}]": w for k, w in self.reward_weights.items()}
        for name, value in (numbers | ({} if target is None else {"target": target})).items():
            check_number(name, value)
        kinds: dict[str, tuple[object, type]] = {
            "plan": (plan, GradientPlan),
            "guidance": (guidance, Guidance),
            "rollout": (rollout, RolloutSettings),
        }
        for name, (given, kind) in kinds.items():
            if given is not None and not isinstance(given, kind):
                raise TypeError(f"{name} is {given!r}, expected a {kind.__name__} or None")
        self.plan = GradientPlan.prfl() if plan is None else plan
        self.plan.steps(num_steps)  # raises if the plan does not fit the schedule
        if divergence:
            model = model_of(transformer)
            if divergence < 0 or self.plan.to != "parameters":
                raise ValueError(
                    f"divergence is {divergence}, expected at least 0, and above 0 only where the "
                    "gradient goes to the parameters"
                )
            if model is None:
                raise ValueError(
                    f"divergence is {divergence}, but the transformer is a function: pass the "
                    "model, or a ModelCall of it"
                )
            check_adapters(model)
        self.transformer = transformer
        self.num_steps = num_steps
        self.target = target
        self.weight = weight
        self.guidance = guidance
        self.divergence = divergence
        self.engine = RolloutEngine(transformer, rollout or RolloutSettings())
        self._scheduler = fresh_copy(scheduler)

    def __call__(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        *,
        latents: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        indices: Sequence[int | Point] | None = None,
        loss_scale: float = 1.0,
    ) -> PRFLOutput:
        """Run one trajectory and accumulate the gradient of its loss.

        Args:
            noise: ε ~ N(0, I), ``[B, C, F, H, W]``; the latents keep its dtype along the
                trajectory.
            conditions: tensors of batch B for the transformer and the reward.
            latents: real x0 like ``noise``, for plans that start from data.
            generator: draws the plan's points, then frames and noise where the plan has such; ranks
                that share the trajectory need the same state.
            indices: the gradient steps instead of a draw, increasing, without repeats: points, or
                steps with equal weights and the plan's depth.
            loss_scale: factor of the gradients only, e.g. ``1 / accumulation``.

        Returns:
            See :class:`PRFLOutput`; check ``finite`` before the optimizer step.

        Raises:
            TypeError: an unsupported model.
            ValueError: for a chain of steps, dropout at work, or a sharded or DDP model; noise,
                latents or conditions of the wrong shape or not finite; indices out
                of order or range; a reward with trainable parameters, of the wrong shape, or
                without a graph to its input; a transformer without trainable parameters; fewer
                latent frames than segments.
        """
        for reward in self.rewards.values():
            check_frozen(reward)
        check_number("loss_scale", loss_scale)
        self._check_inputs(noise, latents)
        self._check_model()
        points = self._points(indices, generator)
        begin = self.plan.begin(self.num_steps)
        if self.plan.start == "data" and self.plan.strength is None:
            begin = points[0].first
        trajectory = Trajectory(
            self.transformer,
            noise,
            conditions,
            self._scheduler,
            self.num_steps,
            guidance=self.guidance,
            engine=self.engine,
            start=begin,
            visit=[step for point in points for step in range(point.first, point.step + 1)],
        )
        if latents is not None:
            sigma = trajectory.sigma(begin)
            trajectory.x = flow_step([noise, latents], [sigma, 1 - sigma])
        if self.plan.to == "latent":
            self._check_guided(trajectory, points)
            return Run(self, trajectory, generator, loss_scale).guided(points)
        if self.plan.to == "noise":
            with _frozen(self.transformer):
                return Run(self, trajectory, generator, loss_scale).feedback(points)
        return Run(self, trajectory, generator, loss_scale).feedback(points)

    def _check_model(self) -> None:
        """What only a chain, or only a gradient to the parameters, asks of the model."""
        model = model_of(self.transformer)
        if model is None:
            return
        if self.plan.to == "parameters" and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(NO_GRADIENT)
        if self.plan.depth == 1:
            return
        for name, module in model.named_modules():
            if isinstance(module, _DropoutNd) and module.training and module.p > 0:
                raise ValueError(
                    f"{name} drops out a share of {module.p}, but a chain of steps runs each "
                    "forward again in its backward, where another share would be dropped; call "
                    "model.eval() or train adapters without dropout"
                )
        if self.plan.to != "parameters":
            return
        kinds = {type(model).__name__} | {type(p).__name__ for p in model.parameters()}
        for kind in kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "DTensor"}:
            raise ValueError(
                f"the transformer is of {kind}, expected a plain model for a chain of steps: its "
                "gradients come from several backwards, which those do not add up; use a plan of "
                "depth 1"
            )

    def _check_inputs(self, noise: torch.Tensor, latents: torch.Tensor | None) -> None:
        if not isinstance(noise, torch.Tensor) or noise.ndim != 5:
            raise ValueError(
                f"noise is {describe(noise)}, expected a floating-point tensor [B, C, F, H, W]"
            )
        segments = self.plan.segments
        if segments is not None and noise.shape[2] < segments:
            raise ValueError(
                f"noise has {noise.shape[2]} latent frames, expected at least the plan's "
                f"{segments} segments"
            )
        if (latents is not None) != (self.plan.start == "data"):
            raise ValueError(
                "latents is missing: the plan starts from corrupted data"
                if latents is None
                else "latents is given, expected none: the plan starts from noise"
            )
        if latents is not None:
            like = isinstance(latents, torch.Tensor) and latents.shape == noise.shape
            if not like or latents.device != noise.device:
                raise ValueError(
                    f"latents is {describe(latents)} on {getattr(latents, 'device', None)}, "
                    f"expected the shape and device of noise, {describe(noise)} on {noise.device}"
                )
            check_finite("latents", latents)

    def _check_guided(self, trajectory: Trajectory, points: tuple[Point, ...]) -> None:
        sigma = trajectory.sigma(points[0].step)
        if sigma > 1 - PURE_NOISE:
            raise ValueError(
                f"the plan's window {self.plan.window} starts at step {points[0].step}, where "
                f"sigma is {sigma:g} and the guidance's factor sigma / (1 - sigma) has no bound; "
                "start one step later"
            )

    def _points(
        self, indices: Sequence[int | Point] | None, generator: torch.Generator | None
    ) -> tuple[Point, ...]:
        if indices is None:
            return self.plan.draw(self.num_steps, generator)
        if self.plan.to == "latent":
            raise ValueError("indices is given, expected none: the window says what is guided")
        begin = self.plan.begin(self.num_steps)
        depth = self.plan.depth
        points, good = [], isinstance(indices, Sequence)
        for item in indices if good else ():
            if isinstance(item, Point):
                points.append(item)
            elif not isinstance(item, int) or isinstance(item, bool):
                good = False
            elif isinstance(depth, tuple):
                raise ValueError(
                    f"indices is {indices!r}, expected points: the plan draws their depth"
                )
            else:
                points.append(
                    Point(item, item + 1 - begin if depth is None else depth, 1 / len(indices))
                )
        last = self.num_steps - (self.plan.window[1] == -1)
        good = good and bool(points)
        for point in points:
            for number in (point.step, point.depth):
                good = good and isinstance(number, int) and not isinstance(number, bool)
            good = good and point.depth >= 1 and is_number(point.weight)
        if good and abs(sum(point.weight for point in points) - 1) > 1e-6:
            raise ValueError(f"indices is {indices!r}, expected points whose weights add up to 1")
        if good and self.plan.renoised and points[-1].step != self.num_steps - 1:
            raise ValueError(
                f"indices is {indices!r}, expected the last step, {self.num_steps - 1}: its result "
                "is noised again"
            )
        if good:
            edges = [begin - 1] + [edge for p in points for edge in (p.first, p.step)]
            firsts, steps = edges[1::2], edges[0::2]
            good = steps[-1] < last and all(a > b for a, b in zip(firsts, steps, strict=False))
        if not good or (self.plan.depth != 1 and len(points) > 1):
            raise ValueError(
                f"indices is {indices!r}, expected increasing integers without repeats in "
                f"{begin} … {last - 1}"
            )
        return tuple(points)


@contextlib.contextmanager
def _frozen(transformer: nn.Module | ModelCall | Velocity) -> Iterator[None]:
    """Within, no parameter of a model requires a gradient, so none is computed on the way."""
    model = model_of(transformer)
    parameters = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
