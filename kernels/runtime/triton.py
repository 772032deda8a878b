"""Import Triton, or a substitute that lets kernel files import; describe chips for launches."""

import os
from typing import Any

import torch


class _Absent:
    """Substitute for the modules of Triton: it accepts the decorators of kernel files."""

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

# Triton reads the variable when it decorates a kernel, so at the import of a kernel file.
INTERPRETING = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


# Arguments that change with every clip. Kernels are not specialized on them: otherwise a multiple
# of 16, or a 1, would compile a kernel again. Strides stay specialized, because multiples of 16
# allow loads of 16 bytes.
COUNTS = (
    "tokens", "tokens_per_row", "tokens_per_program", "rows", "rows_per_program", "programs",
    "chunks", "length_x", "length_y", "length_g", "length_h",
    *(f"length_{x}{axis}" for x in "xg" for axis in "12"),
)  # fmt: skip


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device; (8, 0) for the interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


# Multiprocessors by major compute capability. Not the device's own count: with a constant the order
# of summation, and so every bit of a gradient, is the same on all boards of a generation.
_PROCESSORS = {8: 108, 9: 132, 10: 148, 12: 170}


def multiprocessors(capability: tuple[int, int]) -> int:
    """Return the number of multiprocessors that launches assume for a compute capability."""
    return _PROCESSORS.get(capability[0], 132)


__all__ = [
    "COUNTS", "HAS_TRITON", "INTERPRETING", "capability", "multiprocessors", "tl", "triton",
]  # fmt: skip
