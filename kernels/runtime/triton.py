"""Import Triton, or a substitute that lets kernel files import; describe chips for launches."""

import functools
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
# of 16, or a 1, would compile a kernel again. Strides stay specialized, for loads of 16 bytes.
COUNTS = (
    "tokens", "tokens_per_row", "tokens_per_program", "rows", "rows_per_program", "programs",
    "chunks", "q_tokens", "k_tokens", "frames", "height", "width", "start_f", "start_h", "start_w",
    *(f"length_{x}" for x in ("x", "y", "g", "h", "x1", "x2", "g1", "g2", "q", "k", "gq", "gk")),
)  # fmt: skip


def capability(device: torch.device) -> tuple[int, ...]:
    """Return ``(major, minor, multiprocessors)`` of a CUDA device; (8, 0) for the interpreter.

    ``PRFL_FAST_MULTIPROCESSORS`` replaces the board's number, which decides how sums over tokens
    are split among programs. Boards of one capability and number compute the same bits.
    """
    return _board(device) if device.type == "cuda" else (8, 0)


@functools.cache  # the driver takes microseconds to answer
def _board(device: torch.device) -> tuple[int, ...]:
    count = torch.cuda.get_device_properties(device).multi_processor_count
    chosen = os.environ.get("PRFL_FAST_MULTIPROCESSORS", str(count))
    if not chosen.isdecimal() or int(chosen) == 0:
        raise ValueError(f"PRFL_FAST_MULTIPROCESSORS is {chosen!r}, expected a positive integer")
    return (*torch.cuda.get_device_capability(device), int(chosen))


# Multiprocessors of an A100, H200, B200 and RTX 5090, by major compute capability.
_PROCESSORS = {8: 108, 9: 132, 10: 148, 12: 170}


def multiprocessors(capability: tuple[int, ...]) -> int:
    """Return the number of multiprocessors; that of a common board if ``capability`` has none."""
    return capability[2] if len(capability) > 2 else _PROCESSORS.get(capability[0], 132)


__all__ = ["COUNTS", "HAS_TRITON", "INTERPRETING", "capability", "multiprocessors", "tl", "triton"]
