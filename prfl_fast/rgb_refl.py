"""RGB ReFL, the pixel-space baseline: decode a late one-step estimate of x0, reward its pixels."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast.adapters import Conditions
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._checks import describe
from prfl_fast.rewards import check_frozen
from prfl_fast.schedulers import fresh_copy
from prfl_fast.step import (
    PRFLOutput,
    check_hinge,
    check_indices,
    differentiable_velocity,
    hinge_backward,
)
from prfl_fast.trajectory import Trajectory, Velocity, check_transformer


class RGBReFL:
    """Reward feedback learning through the decoder (ReFL: ImageReward, arXiv 2304.05977).

    The baseline that PRFL is compared with. Samples without gradient to a step m drawn uniformly
    from the last ``last_steps``, takes the velocity there with gradient, estimates the clean
    latents in one step, ``x̂0 = x_m - σ_m·v``, decodes them to frames and runs backward on ``weight
    · relu(target - r(frames))``, averaged over the batch. Called exactly as
    :class:`prfl_fast.step.PRFL`.

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        decode: latents ``[B, C, F, H, W]`` → frames, differentiable, any shape the pixel reward
            takes. Frozen.
        pixel_reward: frames → ``[B]``, differentiable. Frozen.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied, not
            changed.
        num_steps: solver steps of the schedule.
        frames: ``"all"`` decodes every latent frame; ``"first"`` only the first, as is done where
            all do not fit in memory.
        last_steps: size of the late window; a quarter of ``num_steps`` if ``None`` (10 of 40, as
            ReFL).
        target: rewards at or above it give no gradient.
        weight: factor of the loss.

    Raises:
        TypeError: an unsupported model or scheduler, or something that cannot be called.
        ValueError: ``num_steps``, ``last_steps``, ``frames``, ``target`` or ``weight`` out of
            range.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        decode: Callable[[torch.Tensor], torch.Tensor],
        pixel_reward: Callable[[torch.Tensor], torch.Tensor],
        scheduler: Any,
        *,
        num_steps: int = 40,
        frames: Literal["all", "first"] = "all",
        last_steps: int | None = None,
        target: float = 2.0,
        weight: float = 0.1,
    ) -> None:
        check_transformer(transformer)
        for name, value in (("decode", decode), ("pixel_reward", pixel_reward)):
            if not callable(value):
                raise TypeError(f"{name} is {type(value).__name__}, expected a callable")
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps!r}, expected a positive integer")
        last_steps = math.ceil(num_steps / 4) if last_steps is None else last_steps
        if (
            isinstance(last_steps, bool)
            or not isinstance(last_steps, int)
            or not 1 <= last_steps <= num_steps
        ):
            raise ValueError(
                f"last_steps is {last_steps!r}, expected an integer from 1 to num_steps = "
                f"{num_steps}"
            )
        if frames not in ("all", "first"):
            raise ValueError(f"frames is {frames!r}, expected 'all' or 'first'")
        check_hinge(target, weight)
        self.transformer = transformer
        self.decode = decode
        self.pixel_reward = pixel_reward
        self.num_steps = num_steps
        self.frames = frames
        self.last_steps = last_steps
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
        """Run one trajectory and accumulate the gradient of the pixel reward's loss into ``.grad``.

        Args:
            noise: ε ~ N(0, I), ``[B, C, F, H, W]``.
            conditions: tensors of batch B for the transformer.
            generator: draws the gradient step.
            indices: one gradient step, ``(m,)``, instead of a draw; any of 0 … num_steps-1.
            loss_scale: factor of the gradients only, e.g. ``1 / accumulation``.

        Returns:
            One gradient point: ``rewards [1, B]``, ``timesteps`` ``(0.0,)`` because a clean
            estimate is rewarded, and that estimate, of all latent frames, as ``latents``. Check
            ``finite`` before the optimizer step.

        Raises:
            TypeError: an unsupported model.
            ValueError: as :class:`prfl_fast.step.PRFL`; also trainable parameters in ``decode``, a
                scheduler without ``sigmas``, or more than one index.
        """
        check_frozen(self.decode)
        check_frozen(self.pixel_reward)
        chosen = self._indices(indices, generator)
        trajectory = Trajectory(
            self.transformer, noise, conditions, self._scheduler, self.num_steps
        )
        sigmas = getattr(trajectory.scheduler, "sigmas", None)
        if sigmas is None:
            raise ValueError(
                f"scheduler {type(trajectory.scheduler).__name__} has no sigmas, which the "
                "estimate of x0 needs"
            )
        trajectory.run(chosen[0])
        with torch.enable_grad():
            v = differentiable_velocity(trajectory)
            clean = flow_step([trajectory.x, v], [1.0, -float(sigmas[chosen[0]])])
            frames = self.decode(clean if self.frames == "all" else clean[:, :, :1])
            if not isinstance(frames, torch.Tensor):
                raise ValueError(f"decode returned {describe(frames)}, expected a tensor of frames")
            score, loss, finite = hinge_backward(
                self.pixel_reward(frames), len(clean), self.target, self.weight, loss_scale
            )
        return PRFLOutput(loss, score[None], chosen, (0.0,), clean.detach(), finite)

    def _indices(
        self, indices: Sequence[int] | None, generator: torch.Generator | None
    ) -> tuple[int, ...]:
        if indices is None:
            device = generator.device if generator is not None else torch.device("cpu")
            back = torch.randint(self.last_steps, (), generator=generator, device=device)
            return (self.num_steps - 1 - int(back),)
        chosen = check_indices(indices, self.num_steps)
        if len(chosen) != 1:
            raise ValueError(
                f"indices is {indices!r}, expected one index: RGB ReFL has one gradient step"
            )
        return chosen
