"""Which rows a scheduler remembers: multistep samplers keep tensors of the latents' batch."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from prfl_fast.kernels._checks import describe


def take_rows(
    schedulers: Sequence[Any], rows: list[int], sizes: Sequence[int], shape: torch.Size
) -> Any:
    """A scheduler that remembers these rows of what several remember of their latents.

    Args:
        schedulers: of one kind, at the same step; ``sizes[i]`` latents of ``shape`` went through
            the i-th.
        rows: counted through all of them.

    Raises:
        ValueError: a tensor in their state that is neither like the latents nor one-dimensional.
    """
    scheduler = copy.copy(schedulers[0])
    for name in vars(scheduler):
        parts = [vars(each)[name] for each in schedulers]
        vars(scheduler)[name] = _gathered(parts, rows, sizes, shape, name)
    return scheduler


def _gathered(
    parts: list[Any], rows: list[int], sizes: Sequence[int], shape: torch.Size, name: str
) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if first.ndim < 2:
            return first  # levels and timesteps, the same for all
        if any(part.shape != (n, *shape) for part, n in zip(parts, sizes, strict=True)):
            raise ValueError(
                f"the scheduler's {name} holds {describe(first)}, expected latents {list(shape)} "
                "of each candidate: what it remembers cannot be told apart; use FlowUniPC or "
                "FlowEuler"
            )
        return torch.cat(parts)[rows]
    if type(first) is dict:
        return {
            key: _gathered([part[key] for part in parts], rows, sizes, shape, name) for key in first
        }
    if type(first) in (list, tuple):
        return type(first)(
            _gathered(list(items), rows, sizes, shape, name) for items in zip(*parts, strict=True)
        )
    if hasattr(first, "set_timesteps") and hasattr(first, "step"):
        return take_rows(parts, rows, sizes, shape)
    return first
