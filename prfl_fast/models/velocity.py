"""Velocity functions ``(x, timestep, conditions) -> velocity`` of models, and their autocast."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast.models.adapter import (
    FIRST_FRAME,
    Conditions,
    check_inputs,
    set_first_frame,
    zero_first_frame,
)
from prfl_fast.models.registry import find_adapter
from prfl_fast.utils.checks import check_choice
from prfl_fast.utils.modules import device_of

# (x [B, C, F, H, W], timestep [B], conditions) -> velocity like x.
Velocity = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]

Precision = Literal["fp32", "bf16"]


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Return an autocast to bfloat16 for ``"bf16"``, an empty context for ``"fp32"``."""
    if precision == "fp32":
        return contextlib.nullcontext()
    # Callers enter it for one forward and run the backward outside. Autocast caches cast weights
    # until it exits; a forward with gradient must not reuse weights that were cast without a graph.
    return torch.autocast(device.type, torch.bfloat16)


class ModelCall:
    """Call a supported model as a velocity function, with its forward under autocast.

    The rollout engine finds the model inside, which it cannot do for a plain function.

    Args:
        model: a supported transformer, possibly wrapped.
        precision: ``"bf16"`` for autocast to bfloat16, ``"fp32"`` for no autocast.

    Raises:
        TypeError: if the model is not supported.
        ValueError: if ``precision`` is unknown.
    """

    def __init__(self, model: nn.Module, precision: Precision = "bf16") -> None:
        check_choice("precision", precision, ("fp32", "bf16"))
        self._adapter = find_adapter(model)
        self.model, self.precision = model, precision

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast of a forward, see :func:`autocast`."""
        return autocast(device_of(self.model), self.precision)

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        with self.context():
            return self._adapter.velocity(self.model, x, timestep, conditions)


def model_of(transformer: object) -> nn.Module | None:
    """Return the supported model of a transformer; None for a plain function."""
    if isinstance(transformer, ModelCall):
        return transformer.model
    return transformer if isinstance(transformer, nn.Module) else None


def check_transformer(transformer: object) -> None:
    """Raise ``TypeError`` unless ``transformer`` is a supported model or a plain function."""
    if isinstance(transformer, nn.Module):
        find_adapter(transformer)
    elif not callable(transformer):
        raise TypeError(
            f"transformer is {type(transformer).__name__}, expected a supported model or a "
            "function (x, timestep, conditions) -> velocity"
        )


_checked: ContextVar[bool] = ContextVar("_checked", default=False)


@contextlib.contextmanager
def values_checked() -> Iterator[None]:
    """Skip checks of values within the context, since each one waits for the device.

    The trainer's objectives check batches on the host, before they are copied to the device.
    """
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def checks_values() -> bool:
    """Return False within :func:`values_checked` and while torch.compile traces."""
    return not (_checked.get() or torch.compiler.is_compiling())


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` if a tensor has NaN or infinite values."""
    if not bool(torch.isfinite(x).all()):  # waits for the device
        bad = int((~torch.isfinite(x)).sum())
        raise ValueError(f"{name} has {bad} NaN or infinite values of {x.numel()}, expected none")


def bind_velocity(
    transformer: nn.Module | Velocity,
    x: torch.Tensor,
    conditions: Conditions,
    name: str,
    *,
    check_values: bool = True,
) -> Velocity:
    """Check latents and conditions, and return the velocity function of a transformer.

    The condition ``first_frame`` ``[B, C, 1, H, W]`` replaces the first frame of the latents, and
    the velocity of that frame is 0. A model gets time 0 for the tokens of that frame; a plain
    function gets the timestep ``[B]`` of the other frames.

    Args:
        transformer: a supported model, or a velocity function (not an ``nn.Module``).
        x: latents ``[B, C, F, H, W]``, called ``name`` in error messages.
        conditions: tensors ``[B, ...]``.
        check_values: check that latents are finite, unless :func:`values_checked`.

    Raises:
        TypeError: if a module is not supported, or ``transformer`` is not callable.
        ValueError: if latents or conditions have the wrong type, shape or batch, or latents are not
            finite.
    """
    check_transformer(transformer)
    model, check_values = model_of(transformer), check_values and checks_values()
    if model is None:
        check_inputs(name, x, conditions)
        if check_values:
            check_finite(name, x)
        given = FIRST_FRAME in conditions
        return functools.partial(_keep_first_frame, transformer) if given else transformer
    adapter = find_adapter(model)
    adapter.check_latents(model, x, conditions, name)
    if check_values:
        check_finite(name, x)
    if isinstance(transformer, ModelCall):
        return transformer
    return functools.partial(adapter.velocity, model)


def _keep_first_frame(
    function: Velocity, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    v = function(set_first_frame(x, conditions), timestep, conditions)
    return zero_first_frame(v, conditions)
