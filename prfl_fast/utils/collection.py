"""Turn off Python's cyclic garbage collector for a block of code."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Turn the cyclic garbage collector off inside the context.

    A simulation and an import create many objects, so the collector would visit those of torch
    again and again. Reference counts still free objects.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
