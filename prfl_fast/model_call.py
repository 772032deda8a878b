"""What a trajectory calls: a model or a function for its velocity, and guidance between two
calls.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast.adapters import Conditions, find_adapter
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._checks import describe

# (x [B, C, F, H, W], timestep [B], conditions) → velocity like x.
Velocity = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]


Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 for ``"bf16"``, nothing for ``"fp32"``; weights stay float32 in both.

    For one forward at a time: backward runs outside, and the casts of a rollout without gradient
    are gone before the gradient step looks for its weights' casts.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


class ModelCall:
    """A supported model as a function ``(x, timestep [B], conditions) → velocity``, its forward
    under autocast.

    Unlike a plain function it says which model it runs, so that the rollout engine can open it.

    Args:
        model: a supported model.
        precision: ``"bf16"`` runs the forward under autocast to bfloat16, ``"fp32"`` as it is.

    Raises:
        TypeError: an unsupported model.
        ValueError: another precision.
    """

    def __init__(self, model: nn.Module, precision: Literal["fp32", "bf16"] = "bf16") -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision is {precision!r}, expected 'fp32' or 'bf16'")
        self._adapter = find_adapter(model)
        self.model, self.precision = model, precision

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """What a forward runs under."""
        return autocast(next(self.model.parameters()).device, self.precision)

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        with self.context():
            return self._adapter.velocity(self.model, x, timestep, conditions)


@dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance, ``v = v_neg + scale·(v - v_neg)`` (Ho and Salimans, 2207.12598).

    Attributes:
        scale: 1 is the conditional velocity alone, still at the price of both.
        negative: the conditions that differ in the negative branch, each of the latents' batch or
            of batch 1; the others are the positive branch's own.
        batched: both branches in one call of twice the batch; otherwise one call each, which needs
            less memory and takes prompts of different lengths.

    Raises:
        ValueError: ``scale`` is not a finite number, or ``negative`` no dict of tensors.
    """

    scale: float
    negative: Conditions
    batched: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.scale, (bool, str)) or not math.isfinite(self.scale):
            raise ValueError(f"guidance scale is {self.scale!r}, expected a finite number")
        if not isinstance(self.negative, dict) or not self.negative:
            raise ValueError(
                f"guidance negative is {describe(self.negative)}, expected a dict of tensors [B, "
                "...] or [1, ...]"
            )
        for key, value in self.negative.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                raise ValueError(
                    f"guidance negative[{key!r}] is {describe(value)}, expected a tensor [B, ...] "
                    "or [1, ...]"
                )

    def branches(self, conditions: Conditions) -> tuple[Conditions, ...]:
        """Conditions of the model's calls: one of twice the batch, or positive and negative.

        Raises:
            ValueError: a key that ``conditions`` lacks, another batch, or, batched, other shapes.
        """
        negative = dict(conditions)
        for key, value in self.negative.items():
            if key not in conditions:
                raise ValueError(
                    f"guidance negative has {key!r}, but conditions has {sorted(conditions)}"
                )
            batch, own = len(conditions[key]), conditions[key]
            if value.shape[0] not in (1, batch):
                raise ValueError(
                    f"guidance negative[{key!r}] is {describe(value)}, expected batch {batch} or 1"
                )
            negative[key] = value.to(own.device).expand(batch, *value.shape[1:])
            if self.batched and negative[key].shape != own.shape:
                raise ValueError(
                    f"guidance negative[{key!r}] is {describe(value)}, but conditions[{key!r}] is "
                    f"{describe(own)}; pad them alike, or use Guidance(batched=False)"
                )
        if not self.batched:
            return conditions, negative
        return ({key: torch.cat([conditions[key], negative[key]]) for key in conditions},)

    def combine(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """The guided velocity of the calls' outputs, differentiable in both branches."""
        positive, negative = outputs[0].chunk(2) if self.batched else outputs
        return flow_step([negative, positive], [1.0 - self.scale, self.scale])


def model_of(transformer: object) -> nn.Module | None:
    """The supported model that a transformer is or calls; None for a plain function."""
    if isinstance(transformer, ModelCall):
        return transformer.model
    return transformer if isinstance(transformer, nn.Module) else None


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
    model = model_of(transformer)
    if model is None:
        return transformer
    adapter = find_adapter(model)
    adapter.check_latents(model, x, conditions)
    if isinstance(transformer, ModelCall):
        return transformer
    return lambda x, timestep, conditions: adapter.velocity(model, x, timestep, conditions)
