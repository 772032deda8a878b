"""Loads the CUDA C++ extension ``_C`` if one was built; says why not otherwise."""

import os
from pathlib import Path

import torch

_reason = ""


def _load() -> bool:
    global _reason
    if os.environ.get("PRFL_FAST_CUDA") == "0":
        _reason = "PRFL_FAST_CUDA=0"
        return False
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        _reason = "not built (needs nvcc; reinstall with PRFL_FAST_CUDA=1 to see why)"
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        _reason = f"{libraries[0].name} does not load: {error}"
        return False
    _reason = f"loaded {libraries[0].name}"
    return True


_loaded = _load()


def loaded() -> bool:
    """True if the operators of ``csrc/`` are registered under ``torch.ops.prfl_fast_cuda``."""
    return _loaded


def reason() -> str:
    """Why the extension is or is not there, in words."""
    return _reason
