"""Recomputed functions: a forward that raised leaves no active hook or mode."""

import functools
import gc
import weakref

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from prfl_fast.utils.recompute import recomputed


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def in_force():
    return (
        _get_current_dispatch_mode_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def contexts():
    return Mode(), Mode()


def run(x, depth=2, fail=False):
    def function(x):
        inner = run(x, depth - 1, fail) if depth else x
        if fail and not depth:
            raise KeyError("injected")
        return inner.sin() * x

    return recomputed(function, x, context_fn=contexts)


def checkpoint_of_old(function, *args, context_fn, **kwargs):
    """Checkpoint as PyTorch before 2.13, whose generator does not see an exception."""
    function = functools.partial(function, *args)
    generator = torch_checkpoint._checkpoint_without_reentrant_generator(function, True, context_fn)
    next(generator)
    out = function()
    with pytest.raises(StopIteration):
        next(generator)
    return out


@pytest.mark.parametrize("old", [False, True], ids=["installed", "before 2.13"])
def test_an_exception_in_the_forward_ends_hooks_and_modes(monkeypatch, old):
    if old:
        monkeypatch.setattr("prfl_fast.utils.recompute.checkpoint", checkpoint_of_old)
    x = torch.randn(8, requires_grad=True)
    expected = torch.autograd.grad(((x.sin() * x).sin() * x).sin() @ x, x)[0]
    for _ in range(2):
        with pytest.raises(KeyError, match="injected") as caught:
            run(x, fail=True)
        assert in_force() == ([], None)  # while the traceback lives, in caught
        assert any(entry.name == "function" for entry in caught.traceback)
        assert torch.equal(torch.autograd.grad(run(x).sum(), x)[0], expected)


def test_an_exception_in_the_recompute_is_raised():
    calls = 0

    def function(x):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("injected")
        return x.sin()

    out = recomputed(function, torch.randn(8, requires_grad=True))
    with pytest.raises(KeyError, match="injected"):
        out.sum().backward()
    assert in_force() == ([], None)


def test_an_exception_keeps_no_tensor_when_it_is_gone():
    """On a GPU, gigabytes could wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(8, requires_grad=True) * 2
        found = weakref.ref(x)
        with pytest.raises(KeyError):
            run(x, fail=True)
        del x
        assert found() is None
    finally:
        gc.enable()
