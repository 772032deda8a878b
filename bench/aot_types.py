"""Describe a specialization of a Triton kernel for ahead-of-time compilation."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = {f"{name}_ptr" for name in ("x", "y", "out", "h", "grad", "grad_h", "dx", "dy")}
INDICES = ("row_index_ptr", "order_ptr", "bounds_ptr")


@dataclass(frozen=True)
class AotCase:
    """Describe one specialization of a kernel, which ``aot.py`` compiles.

    ``types`` maps parameters to Triton's types: ``*bf16:16``, ``i32:16``, ``i32``, ``fp32``. The
    suffix ``:16`` says that the address or number is divisible by 16. ``constexprs`` has the values
    of the ``tl.constexpr`` parameters. A parameter in neither mapping is None.
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
    """Return the types of a kernel's arguments by the naming rules of ``prfl_fast.kernels``.

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


def element_types(dtype: str, *names: str) -> dict[str, str]:
    """Return pointers' types: activations have ``dtype``, indices i64, all others fp32."""
    kinds = {name: "i64" if name in INDICES else "fp32" for name in names}
    return {name: dtype if name in ACTIVATIONS else kind for name, kind in kinds.items()}


def part_of(kernel: Any) -> str:
    """Return ``forward`` or ``backward``, by the kernel's name."""
    return kernel.__name__.split("_")[0]


def flags_of(kernel: Any, names: Iterable[str]) -> str:
    """Return those of some pointers that the kernel takes, for a label."""
    return "+".join(name.removesuffix("_ptr") for name in names if name in kernel.arg_names)
