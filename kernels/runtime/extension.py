"""Load the CUDA C++ extension of ``csrc/`` where it was built."""

import os
from pathlib import Path

import torch


def load_extension(folder: Path) -> tuple[bool, str]:
    """Load ``_C*.so`` from ``folder``; return True if its operators are registered, and the reason.

    ``PRFL_FAST_CUDA=0`` in the environment prevents it.
    """
    if os.environ.get("PRFL_FAST_CUDA") == "0":
        return False, "PRFL_FAST_CUDA=0"
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        return False, "not built (needs nvcc; reinstall with PRFL_FAST_CUDA=1 to see the error)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return False, f"{libraries[0].name} does not load: {error}"
    return True, f"loaded {libraries[0].name}"


_state = load_extension(Path(__file__).parents[1])


def extension_loaded() -> bool:
    """Return True if the operators of ``csrc/`` are registered as ``torch.ops.prfl_fast_cuda``."""
    return _state[0]


def extension_reason() -> str:
    """Return one line: the name of the loaded extension, or the reason why none is loaded."""
    return _state[1]
