"""Weights that wait in host memory: the same bits, no view of a slot that another block took."""

import itertools

import pytest
import torch
from offload_models import (
    InjectedError,
    assert_same,
    fail_in_block,
    fail_in_second_run,
    gradients_of_loss,
    held,
    loss,
    raising,
)
from streamed_models import (
    LAYERS,
    POLICIES,
    build,
    check_home,
    poison_released_slots,  # noqa: F401 - a fixture
    slots_of,
)

from prfl_fast.memory import stream as streaming

pytest.importorskip("diffusers")

EACH_POLICY = pytest.mark.parametrize("policy", POLICIES, ids=str)


@pytest.mark.cases(6)
@EACH_POLICY
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_gradients_are_bit_identical(policy, lora, patched):
    plain = gradients_of_loss(build(policy, None, patched=patched, lora=lora))
    assert len(plain) > 40
    for ahead in (1, 2, 7):
        model = build(policy, ahead, patched=patched, lora=lora)
        for _ in range(2):
            assert_same(gradients_of_loss(model), plain)
            check_home(model)
        assert held(model) == (0, 0)
        assert len(slots_of(model).order) >= ahead + 1


def fail_by_interrupt(model, index, patch):
    def interrupt(*args):
        raise KeyboardInterrupt

    patch.setattr(model.blocks[index].ffn.net[2], "forward", interrupt)


def fail_in_backward(model, index, patch):
    """Raise in a hook in the middle of the block, also in a recompute, which saves its results."""
    layer = model.blocks[index].ffn.net[2]

    def forward(x):
        out = type(layer).forward(layer, x)
        out.register_hook(raising)
        return out

    patch.setattr(layer, "forward", forward)


def fail_in_copy(model, index, patch):
    """Raise at the copy to the device that comes after ``2 * index`` others."""
    original, made = streaming.Copies.copy, itertools.count()

    def copy(*args):
        return raising() if next(made) >= 2 * index % 7 else original(*args)

    patch.setattr(streaming.Copies, "copy", copy)


FAILURES = [fail_in_block, fail_by_interrupt, fail_in_backward, fail_in_second_run, fail_in_copy]


@pytest.mark.cases(5)
@pytest.mark.parametrize("policy", POLICIES[::2], ids=str)
@pytest.mark.parametrize("fail", FAILURES)
def test_failures_leave_nothing_behind(fail, policy, monkeypatch):
    """Five failures, at different blocks, of each kind under each of three policies."""
    model = build(policy)
    plain = gradients_of_loss(model)
    for index in range(LAYERS):
        with monkeypatch.context() as patch:
            fail(model, index, patch)
            with pytest.raises((InjectedError, KeyboardInterrupt)):
                for _ in range(3):
                    loss(model).backward()
                    with torch.no_grad():
                        loss(model)
        model.zero_grad(set_to_none=True)
        check_home(model)
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert not any(block._forward_hooks or block._backward_hooks for block in model.blocks)
        assert_same(gradients_of_loss(model), plain)
        check_home(model)


class SimulatedCopies(streaming.Copies):
    """Copy stream and compute stream with a clock each; events are moments."""

    seconds_per_copy = 0.75

    def __init__(self, device, *, fake=False):
        super().__init__(device, fake=fake)
        self.compute = self.copied = self.waited = 0.0
        self.trace = []  # (start, end) of copies

    def work(self, seconds):
        self.compute += seconds

    def reached(self):
        return self.compute

    def copy(self, target, source, after):
        target.copy_(source)
        start = max(self.copied, after or 0.0)
        self.copied = start + self.seconds_per_copy
        self.trace.append((start, self.copied))
        return self.copied

    def wait(self, copied):
        stall = max(0.0, copied - self.compute)
        self.waited += stall
        self.compute += stall


def simulated(monkeypatch, policy, seconds_per_copy, ahead=1):
    """Return a model whose blocks take 1 second forward and 2 backward, and its clock."""
    monkeypatch.setattr(SimulatedCopies, "seconds_per_copy", seconds_per_copy)
    monkeypatch.setattr(streaming, "Copies", SimulatedCopies)
    monkeypatch.setattr(streaming, "_slots", {})
    model = build(policy, ahead)
    clock = slots_of(model).copies

    def forward(block, args, out):
        clock.work(1.0)
        if out.requires_grad and torch._C._current_graph_task_id() == -1:
            args[0].register_hook(lambda grad: clock.work(2.0))  # when the block's backward ends

    for block in model.blocks:
        block.register_forward_hook(forward)
    return model, clock


@EACH_POLICY
def test_copies_run_beside_the_blocks(policy, monkeypatch):
    model, clock = simulated(monkeypatch, policy, 0.75)
    model.requires_grad_(False).patch_embedding.requires_grad_(True)
    for _ in range(3):
        loss(model).backward()
    with torch.no_grad():
        for _ in range(2):
            loss(model)
    # Only the first copy has nothing to run beside: a later forward's first copy runs beside the
    # block before, because the host is ahead. A backward begins with two blocks.
    assert clock.waited == 0.75
    assert len(clock.trace) == 3 * (2 * LAYERS - 2) + 2 * LAYERS
    assert all(a <= start for (_, a), (start, _) in itertools.pairwise(clock.trace))


def test_slow_copies_delay_the_blocks(monkeypatch):
    """A copy waits for the block before in its slot, and a block for its copy."""
    model, clock = simulated(monkeypatch, ("full", None), 5.0)
    with torch.no_grad():
        loss(model)
        loss(model)
    # Two forwards of five blocks. Block 1 is copied at once, block 2 when block 0 has ended.
    assert clock.trace[:3] == [(0.0, 5.0), (5.0, 10.0), (10.0, 15.0)]
    # Each copy takes five seconds and begins when the one before ends.
    assert len(clock.trace) == 2 * LAYERS and clock.compute == 2 * LAYERS * 5.0 + 1.0
    # More slots do not shorten it.
    model, other = simulated(monkeypatch, ("full", None), 5.0, ahead=3)
    with torch.no_grad():
        loss(model)
        loss(model)
    assert other.compute == clock.compute
