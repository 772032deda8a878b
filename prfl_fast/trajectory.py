"""One run of a sampler: the model bound to its conditions, and the steps it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prfl_fast._extras import need
from prfl_fast.adapters import Conditions, find_adapter
from prfl_fast.kernels._checks import describe
from prfl_fast.schedulers import detach_state, start_trajectory

# (x [B, C, F, H, W], timestep [B], conditions) → velocity like x.
Velocity = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]


def check_transformer(transformer: object) -> None:
    """Raise ``TypeError`` unless an adapter knows it, or it is a function rather than a module."""
    if isinstance(transformer, nn.Module):
        find_adapter(transformer)
    elif not callable(transformer):
        raise TypeError(
            f"transformer is {type(transformer).__name__}, expected a supported model or a "
            "function (x, timestep, conditions) -> velocity"
        )


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` if a tensor has NaN or infinite values."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} NaN or infinite values of {x.numel()}")


def bind_velocity(
    transformer: nn.Module | Velocity, x: torch.Tensor, conditions: Conditions, name: str
) -> Velocity:
    """The function ``(x, timestep, conditions) → velocity`` of a model, after checking its inputs.

    Args:
        transformer: a supported model, or that function itself for any other (one that is not an
            ``nn.Module``).
        x: latents ``[B, C, F, H, W]``, called ``name`` in messages.
        conditions: tensors whose first dimension is B.

    Raises:
        TypeError: a module of an unsupported class, or something that cannot be called.
        ValueError: latents or conditions of the wrong type, shape or batch, or latents that are not
            finite.
    """
    if not (
        isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 5 and x.numel() > 0
    ):
        raise ValueError(
            f"{name} is {describe(x)}, expected a floating-point tensor [B, C, F, H, W]"
        )
    check_finite(name, x)
    if not isinstance(conditions, dict):
        raise ValueError(
            f"conditions is {type(conditions).__name__}, expected a dict of tensors [B, ...]"
        )
    for key, value in conditions.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != x.shape[0]:
            raise ValueError(
                f"conditions[{key!r}] is {describe(value)}, expected a tensor whose first "
                f"dimension is {name}'s batch, {x.shape[0]}"
            )
    check_transformer(transformer)
    if not isinstance(transformer, nn.Module):
        return transformer
    model, adapter = transformer, find_adapter(transformer)
    adapter.check_latents(model, x, conditions)
    return lambda x, timestep, conditions: adapter.velocity(model, x, timestep, conditions)


class Trajectory:
    """One run of a sampler from noise, which can stop at a step, take it with gradient, and go on.

    The latents ``x`` keep the noise's dtype and never carry a graph. The scheduler is a private
    copy.

    Raises:
        TypeError, ValueError: as :func:`bind_velocity` and :func:`prfl_fast.schedulers.fresh_copy`.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        noise: torch.Tensor,
        conditions: Conditions,
        scheduler: Any,
        num_steps: int,
    ) -> None:
        self._velocity = bind_velocity(transformer, noise, conditions, "noise")
        self.conditions = conditions
        self.scheduler, self.timesteps = start_trajectory(scheduler, num_steps)
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        self._model_timesteps = torch.stack(list(self.timesteps)).to(noise.device, dtype)
        self.x = noise.detach()
        self.index = 0

    def model_timestep(self, index: int) -> torch.Tensor:
        """Timestep of step ``index`` as models take it: ``[B]`` on the latents' device."""
        return self._model_timesteps[index].expand(self.x.shape[0])

    def velocity(self) -> torch.Tensor:
        """The model's velocity at the current latents, which are a constant.

        Raises:
            ValueError: the model returned another shape.
        """
        v = self._velocity(self.x, self.model_timestep(self.index), self.conditions)
        if not isinstance(v, torch.Tensor) or v.shape != self.x.shape:
            raise ValueError(
                f"the transformer returned {describe(v)}, expected a velocity of shape "
                f"{list(self.x.shape)}"
            )
        return v

    def solve(self, v: torch.Tensor) -> torch.Tensor:
        """The next latents, differentiable in ``v``; follow with :meth:`move_to`."""
        (x,) = self.scheduler.step(v, self.timesteps[self.index], self.x, return_dict=False)
        return x.to(self.x.dtype)

    def move_to(self, x: torch.Tensor) -> None:
        """Go on from ``x``, the result of :meth:`solve`, leaving its graph behind."""
        self.x = x.detach()
        detach_state(self.scheduler)
        self.index += 1

    @torch.no_grad()
    def run(self, stop: int, on_step: Callable[[], object] = lambda: None) -> None:
        """Take steps without gradient until step ``stop`` is the next one."""
        while self.index < stop:
            self.move_to(self.solve(self.velocity()))
            on_step()


def rollout(
    transformer: nn.Module | Velocity,
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    stop: int | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Sample latents from noise, without gradient.

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        noise: ε, ``[B, C, F, H, W]``; the trajectory keeps its dtype and device.
        conditions: the adapter's conditions, e.g. ``{"encoder_hidden_states": [B, T, C]}``.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied, not
            changed.
        num_steps: solver steps of the whole schedule.
        stop: take only the first ``stop`` of them; all if ``None``.
        progress: show a tqdm bar.

    Returns:
        The latents after ``stop`` steps, ``[B, C, F, H, W]``.

    Raises:
        TypeError: an unsupported model or scheduler.
        ValueError: noise or conditions of the wrong shape or not finite, or ``stop`` outside 0 …
            num_steps.
    """
    trajectory = Trajectory(transformer, noise, conditions, scheduler, num_steps)
    stop = num_steps if stop is None else stop
    if not 0 <= stop <= num_steps:
        raise ValueError(f"stop is {stop}, expected 0 to num_steps = {num_steps}")
    if not progress:
        trajectory.run(stop)
    else:
        with need("tqdm").tqdm(total=stop, desc="sampling", unit="step") as bar:
            trajectory.run(stop, bar.update)
    return trajectory.x
