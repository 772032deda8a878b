"""Run a function again in the backward in place of keeping what its backward reads."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **options)``.

    An exception in the forward ends its hooks and modes at once. PyTorch before 2.13 leaves them in
    force for as long as the traceback lives, and what runs meanwhile is recorded as part of the
    failed call.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False, **options)
    in_forward, failures = True, []

    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:
            if not in_forward:
                raise
            failures.append(error)
            return None

    out = checkpoint(run, *args, use_reentrant=False, **options)
    in_forward = False
    if failures:
        raise failures.pop()  # a list that held it would make a cycle of it and its traceback
    return out
