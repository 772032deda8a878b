"""Recognize errors of torch.compile, and let ranks that share weights agree on them."""

from collections.abc import Callable
from typing import Any

import torch

from prfl_fast.utils.sharded import holds_on_all_ranks


def is_compiler_error(error: BaseException) -> bool:
    """Return True if an error comes from torch.compile, not from the compiled code."""
    modules = [kind.__module__ for kind in type(error).__mro__]
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules)


class SharedCall:
    """Call a compiled block, or its eager function if the compiler fails on any rank.

    A rank that started a forward again on its own would gather other weights than the ranks that go
    on. ``report`` is called with the error, a RuntimeError on ranks whose compiler works.
    """

    def __init__(
        self,
        compiled: Callable[..., torch.Tensor],
        eager: Callable[..., torch.Tensor],
        report: Callable[[RuntimeError], object],
    ) -> None:
        self._run, self._eager, self._report = compiled, eager, report
        self._agreed = False

    def __call__(self, x: torch.Tensor, *args: Any) -> torch.Tensor:
        """Return the block's output; the first call decides for all later ones."""
        if self._agreed:
            return self._run(x, *args)
        failure: RuntimeError | None = None
        try:
            out = self._run(x, *args)
        except RuntimeError as error:
            if not is_compiler_error(error):
                raise
            failure = error
        self._agreed = True
        if holds_on_all_ranks(torch.tensor(failure is None, device=x.device)):
            return out
        self._run = self._eager
        self._report(failure or RuntimeError("the compiler failed on another rank"))
        return self._eager(x, *args)
