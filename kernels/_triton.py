"""Triton if it is installed; otherwise a stand-in that lets kernel files import and never runs."""

import os
from typing import Any

import torch


class _Absent:
    """Accepts the decorators and annotations of a kernel file; calling a kernel is prevented by the registry."""

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


__all__ = ["HAS_TRITON", "INTERPRETING", "capability", "tl", "triton"]
