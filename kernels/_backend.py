"""The backend in force: ``auto``, ``reference``, ``triton`` or ``cuda``."""

import os

from prfl_fast.kernels import _extension
from prfl_fast.kernels._triton import HAS_TRITON

BACKENDS = ("auto", "reference", "triton", "cuda")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError(f"{source} is 'triton', but triton is not installed: pip install triton")
    if name == "cuda" and not _extension.loaded():
        raise ValueError(
            f"{source} is 'cuda', but the extension is not loaded: {_extension.reason()}"
        )
    return name


def set_backend(name: str) -> None:
    """Choose the implementation every operation prefers from now on, in this process.

    ``auto`` takes Triton on CUDA tensors and the reference on CPU tensors; ``reference`` is plain
    PyTorch;
    ``triton`` and ``cuda`` ask for that kernel wherever the operation has one. An operation without
    one
    keeps its ``auto`` choice; ``prfl-fast doctor`` lists what each will use and why.

    Raises:
        ValueError: an unknown name, or a backend whose package or extension is missing.
    """
    global _current
    _current = _checked(name, "backend")


def get_backend() -> str:
    """The name given to :func:`set_backend`, or ``PRFL_FAST_BACKEND``, or ``auto``."""
    return _current


_current = _checked(os.environ.get("PRFL_FAST_BACKEND", "auto"), "PRFL_FAST_BACKEND")
