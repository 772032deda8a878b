"""The PRFL step: a trajectory, and gradient where its plan asks for it.

Source: "Video Generation Models Are Good Latent Reward Models" (PRFL, arXiv 2511.21541).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prfl_fast.adapters import Conditions
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.kernels._checks import describe
from prfl_fast.rewards import Reward, check_frozen
from prfl_fast.schedulers import fresh_copy
from prfl_fast.trajectory import Trajectory, Velocity, check_transformer


@dataclass(frozen=True)
class PRFLOutput:
    """What one reward-feedback step did; no tensor carries a graph.

    Attributes:
        loss: scalar, mean over the gradient points of ``weight · relu(target - r)``, without
            ``loss_scale``.
        rewards: ``[K, B]``, float32 (float64 for float64 rewards); NaN at points that were not
            reached.
        indices: the K solver steps that carried gradient, increasing.
        timesteps: the K timesteps (1000·σ) at which the latents were rewarded.
        latents: ``[B, C, F, H, W]``, the last latents that were rewarded.
        finite: False if a reward or loss was NaN or infinite. That point was not differentiated and
            the trajectory ended there, but gradients of earlier points are already in ``.grad``:
            zero them and skip the update.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    indices: tuple[int, ...]
    timesteps: tuple[float, ...]
    latents: torch.Tensor
    finite: bool


class PRFL:
    """Process reward feedback learning on latents; a call leaves the gradients in ``.grad``.

    One call samples a trajectory from ``noise``. At each index m drawn by ``plan`` it takes the
    solver step with gradient, ``x_{m+1} = solver(x_m, v_θ(x_m, t_m, c))`` with ``x_m`` and the
    solver's history constant, scores the result where it is, ``r = r_φ(x_{m+1}, t_{m+1}, c)``, and
    runs backward on ``weight · relu(target - r)``, averaged over the batch and over the K drawn
    indices (arXiv 2511.21541). Then it goes on from the same ``x_{m+1}`` without the graph, so the
    forward of a gradient step is also a rollout step, and only one step's graph is alive at a time.
    After the last index it stops.

    The transformer's train/eval mode is left alone. Only the reward's input gets a gradient from
    the reward. Randomness comes from the given generator only, and only if ``indices`` are not
    given.

    Args:
        transformer: a supported model (patched or not, with or without LoRA), or a function
            ``(x, timestep [B], conditions) -> velocity`` for any other.
        reward: ``(x, timestep [B], conditions) -> [B]``, e.g. a frozen ``LatentRewardModel``.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler. It is copied here and
            again for every trajectory: the caller's object never moves, and nothing passes from one
            call to the next.
        plan: which steps carry gradient.
        num_steps: solver steps of the schedule, at least 2.
        target: rewards at or above it give no gradient. The default 2 lies above a sigmoid's range:
            never reached.
        weight: factor of the loss.

    Raises:
        TypeError: an unsupported model, reward or scheduler.
        ValueError: ``num_steps`` below 2 or too small for the plan's points; ``target`` or
            ``weight`` not finite.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        reward: nn.Module | Reward,
        scheduler: Any,
        plan: GradientPlan | None = None,
        *,
        num_steps: int = 40,
        target: float = 2.0,
        weight: float = 0.1,
    ) -> None:
        check_transformer(transformer)
        if not callable(reward):
            raise TypeError(
                f"reward is {type(reward).__name__}, expected a callable "
                "(x, timestep, conditions) -> [B]"
            )
        check_hinge(target, weight)
        self.transformer = transformer
        self.reward = reward
        self.plan = GradientPlan.prfl() if plan is None else plan
        self.plan.outcomes(num_steps)  # raises if the plan does not fit the schedule
        self.num_steps = num_steps
        self.target = target
        self.weight = weight
        self._scheduler = fresh_copy(scheduler)

    def __call__(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        *,
        generator: torch.Generator | None = None,
        indices: Sequence[int] | None = None,
        loss_scale: float = 1.0,
    ) -> PRFLOutput:
        """Run one trajectory and accumulate the gradient of the reward loss into ``.grad``.

        Args:
            noise: ε ~ N(0, I), ``[B, C, F, H, W]``; the latents keep its dtype along the
                trajectory.
            conditions: tensors of batch B for the transformer and the reward.
            generator: draws the plan's indices; ranks that share the trajectory need the same
                state.
            indices: the gradient steps instead of a draw: increasing, without repeats, in 0 …
                num_steps-2.
            loss_scale: factor of the gradients only, e.g. ``1 / accumulation``.

        Returns:
            See :class:`PRFLOutput`; check ``finite`` before the optimizer step.

        Raises:
            TypeError: an unsupported model.
            ValueError: noise or conditions of the wrong shape or not finite; indices out of order
                or range; a reward with trainable parameters, of the wrong shape, or without a graph
                to its input; a transformer without trainable parameters.
        """
        check_frozen(self.reward)
        chosen = self._indices(indices, generator)
        trajectory = Trajectory(
            self.transformer, noise, conditions, self._scheduler, self.num_steps
        )
        scores: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        finite = True
        for index in chosen:
            trajectory.run(index)
            score, loss, finite = self._point(trajectory, loss_scale, len(chosen))
            scores.append(score)
            losses.append(loss)
            if not finite:
                break
        missing = [torch.full_like(scores[0], math.nan)] * (len(chosen) - len(scores))
        return PRFLOutput(
            loss=torch.stack(losses).sum(),
            rewards=torch.stack(scores + missing),
            indices=chosen,
            timesteps=tuple(float(trajectory.timesteps[i + 1]) for i in chosen),
            latents=trajectory.x,
            finite=finite,
        )

    def _indices(
        self, indices: Sequence[int] | None, generator: torch.Generator | None
    ) -> tuple[int, ...]:
        if indices is None:
            return self.plan.draw(self.num_steps, generator)
        return check_indices(indices, self.num_steps - 1)

    @torch.enable_grad()
    def _point(
        self, trajectory: Trajectory, loss_scale: float, points: int
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Take the next step with gradient and run backward: rewards ``[B]``, loss, finite."""
        x = trajectory.solve(differentiable_velocity(trajectory))
        timestep = trajectory.model_timestep(trajectory.index + 1)
        score = self.reward(x, timestep, trajectory.conditions)
        trajectory.move_to(x)
        return hinge_backward(score, len(x), self.target, self.weight / points, loss_scale)


def differentiable_velocity(trajectory: Trajectory) -> torch.Tensor:
    """The velocity at the trajectory's next step, with its graph.

    Raises:
        ValueError: nothing in the transformer requires a gradient.
    """
    v = trajectory.velocity()
    if not v.requires_grad:
        raise ValueError(
            "the transformer's velocity needs no gradient: no parameter of it requires one; call "
            "requires_grad_(True) on what should train, or add LoRA layers"
        )
    return v


def hinge_backward(
    score: torch.Tensor, batch: int, target: float, weight: float, loss_scale: float
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Backward of ``weight · relu(target - score).mean() · loss_scale``, if all is finite.

    Returns:
        Detached: scores ``[B]`` in float32 (or float64), the loss without ``loss_scale``, and
        whether it was finite.

    Raises:
        ValueError: the scores are not ``[batch]``, or carry no graph.
    """
    if not isinstance(score, torch.Tensor) or score.shape != (batch,):
        raise ValueError(
            f"the reward returned {describe(score)}, expected one score per sample, [{batch}]"
        )
    if not score.requires_grad:
        raise ValueError(
            "the reward's scores carry no graph to its input; it must not detach it or run under "
            "no_grad"
        )
    score = score if score.dtype == torch.float64 else score.float()
    loss = weight * torch.relu(target - score).mean()
    # One wait for the device. The scores are looked at too: relu would hide an infinite one.
    finite = bool(torch.isfinite(score.detach()).all() & torch.isfinite(loss.detach()))
    if finite:
        (loss * loss_scale).backward()
    return score.detach(), loss.detach(), finite


def check_hinge(target: float, weight: float) -> None:
    """Raise ``ValueError`` unless both are finite numbers."""
    for name, value in (("target", target), ("weight", weight)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, expected a finite number")


def check_indices(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Gradient steps as a tuple; ``ValueError`` unless increasing, unique, in 0 … count-1."""
    chosen = tuple(indices)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in chosen)
    if (
        not chosen
        or not whole
        or list(chosen) != sorted(set(chosen))
        or not 0 <= chosen[0] <= chosen[-1] < count
    ):
        raise ValueError(
            f"indices is {indices!r}, expected increasing integers without repeats in 0 … "
            f"{count - 1}"
        )
    return chosen
