"""Exceptions in every phase of an offloaded step leave nothing behind."""

import itertools

import pytest
from offload_models import (
    InjectedError,
    assert_same,
    build,
    fail_in_block,
    fail_in_second_run,
    gradients_of_loss,
    held,
    loss,
    raising,
)

from prfl_fast.memory import offload as offloading
from prfl_fast.memory.checkpointing import MODES, offload_bytes

pytest.importorskip("diffusers")


def inject_backward(model, index, patch):
    original = model.blocks[index].forward

    def forward(*args):
        out = original(*args)
        out.register_hook(raising)
        return out

    patch.setattr(model.blocks[index], "forward", forward)


def inject_copy(model, index, patch):
    """Fail a third and two thirds of the way through all copies, in both directions."""
    original, made = offloading._Window.copy, itertools.count()
    patch.setattr(offloading._Window, "copy", lambda *args: (next(made), original(*args))[1])
    loss(model).backward()
    left = next(made) * index // len(model.blocks)

    def copy(*args):
        nonlocal left
        left -= 1
        return raising() if left < 0 else original(*args)

    patch.setattr(offloading._Window, "copy", copy)


FAILURES = {
    "forward": fail_in_block,
    "recompute": fail_in_second_run,
    "backward": inject_backward,
    "copy": inject_copy,
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["forward", "recompute", "copy", "backward"])
def test_exceptions_leave_nothing_behind(where, mode, monkeypatch):
    """Twice at every block; counted in bytes, and by the next step's gradients."""
    if where == "recompute" and mode == "none":
        pytest.skip("mode none recomputes nothing")
    layers, inject = 3, FAILURES[where]
    model, plain = build(layers, mode), gradients_of_loss(build(layers, offload=None))
    assert_same(gradients_of_loss(model), plain)
    pool = offload_bytes(model)["host_pool"]
    for turn in range(2 * layers):
        with monkeypatch.context() as patch:
            inject(model, turn % layers, patch)
            with pytest.raises(InjectedError):
                loss(model).backward()
        model.zero_grad(set_to_none=True)
        assert held(model) == (0, 0), turn
        assert_same(gradients_of_loss(model), plain)
        assert offload_bytes(model)["host_pool"] == pool
