"""Triton if it is installed; otherwise a stand-in that lets kernel files import and never runs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


class _Absent:
    """Accepts the decorators and annotations of kernel files; nothing ever calls a kernel."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self


try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    triton = tl = _Absent()  # type: ignore[assignment]
    HAS_TRITON = False

# Triton reads the variable when a kernel is decorated, that is, when a kernel file is imported.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (8, 0) for the interpreter, which has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


# Multiprocessors by major compute capability. A constant rather than the device's own count, so
# that the order of summation, hence every bit of a gradient, is the same on all its boards.
_PROCESSORS = {8: 108, 9: 132, 10: 148, 12: 170}


def processors(capability: tuple[int, int]) -> int:
    """Multiprocessors that launches count on for a compute capability."""
    return _PROCESSORS.get(capability[0], 132)


@dataclass(frozen=True)
class AotCase:
    """One specialisation of a kernel, to be compiled ahead of time by ``_aot.py``.

    ``types`` maps parameters to Triton's types, ``*bf16:16``, ``i32:16``, ``i32``, ``fp32``: a
    suffix
    ``:16`` says that the address or number is divisible by 16. ``constexprs`` has the values of the
    ``tl.constexpr`` parameters. A parameter in neither is None.
    """

    label: str
    kernel: Any
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 3  # Triton's default
    maxnreg: int | None = None  # registers of a thread; None: ptxas chooses


def argument_types(
    kernel: Any, pointers: Mapping[str, str], others: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """Types of a kernel's arguments, by the naming rules of this package.

    Strides are ``i32:16``, ``eps`` and ``*_scale`` are ``fp32``, other lower-case names ``i32``.

    Args:
        pointers: element type of each ``*_ptr`` that is given, aligned to 16; the others are None.
        others: types of parameters for which the rules are wrong; None for one passed as None.
    """
    types = {}
    for name in kernel.arg_names:
        if others is not None and name in others:
            chosen = others[name]
        elif name.endswith("_ptr"):
            chosen = f"*{pointers[name]}:16" if name in pointers else None
        elif name.startswith("stride"):
            chosen = "i32:16"
        elif name == "eps" or name.endswith("_scale"):
            chosen = "fp32"
        else:
            chosen = None if name.isupper() else "i32"
        if chosen is not None:
            types[name] = chosen
    return types


__all__ = [
    "HAS_TRITON",
    "INTERPRETING",
    "AotCase",
    "argument_types",
    "capability",
    "processors",
    "tl",
    "triton",
]
