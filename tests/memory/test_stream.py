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


@pytest.mark.cases(1)
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
    """Raise at the copy of weights or of a gradient that comes after ``2 * index`` others."""
    original, made = streaming.Copies.copy, itertools.count()

    def copy(*args, **options):
        return raising() if next(made) >= 2 * index % 7 else original(*args, **options)

    patch.setattr(streaming.Copies, "copy", copy)


FAILURES = [fail_in_block, fail_by_interrupt, fail_in_backward, fail_in_second_run, fail_in_copy]


@pytest.mark.cases(1)
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


class Moment(float):
    def synchronize(self):
        """Return at once: the host does not wait."""


class SimulatedCopies(streaming.Copies):
    """Compute stream and two copy streams with a clock each; events are moments."""

    seconds_per_copy = seconds_per_gradient = 0.75

    def __init__(self, device, *, fake=False):
        super().__init__(device, fake=fake)
        self.compute = self.waited = 0.0
        self.copied = {False: 0.0, True: 0.0}
        self.trace, self.gradients = [], []  # (start, end) of copies

    def work(self, seconds):
        self.compute += seconds

    def reached(self):
        return self.compute

    def copy(self, target, source, after, *, gradient=False):
        target.copy_(source)
        start = max(self.copied[gradient], after or 0.0)
        seconds = self.seconds_per_gradient if gradient else self.seconds_per_copy
        self.copied[gradient] = Moment(start + seconds)
        (self.gradients if gradient else self.trace).append((start, self.copied[gradient]))
        return self.copied[gradient]

    def wait(self, copied):
        stall = max(0.0, copied - self.compute)
        self.waited += stall
        self.compute += stall


def simulated(monkeypatch, policy, seconds_per_copy, ahead=1, slots=None):
    """Return a model whose blocks take 1 second forward and 2 backward, and its clock."""
    monkeypatch.setattr(SimulatedCopies, "seconds_per_copy", seconds_per_copy)
    monkeypatch.setattr(streaming, "Copies", SimulatedCopies)
    known = {} if slots is None else {(torch.device("cpu"), False): slots}
    monkeypatch.setattr(streaming, "_slots", known)
    model = build(policy, ahead)
    clock = slots_of(model).copies

    def forward(block, args, out):
        clock.work(1.0)
        if out.requires_grad and torch._C._current_graph_task_id() == -1:
            args[0].register_hook(lambda grad: clock.work(2.0))  # when the block's backward ends

    for block in model.blocks:
        block.register_forward_hook(forward)
    return model, clock


@pytest.mark.cases(1)
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


@pytest.mark.parametrize("seconds,waited", [(0.75, 0.0), (3.0, 3.0 + 134 * 2.0 - LAYERS * 2.0)])
def test_gradients_are_copied_while_the_backward_continues(seconds, waited, monkeypatch):
    """Each gradient takes a second to compute, and the start of a block two more."""
    model, clock = simulated(monkeypatch, ("full", None), 0.0)
    waiting = [block.__dict__[streaming.STREAMED] for block in model.blocks]
    parameters = [p for weights in waiting for p in weights.parameters()]
    for parameter in parameters:
        parameter.register_hook(lambda gradient: clock.work(1.0))
    value = loss(model)
    clock.seconds_per_gradient, clock.waited = seconds, 0.0
    value.backward()
    assert len(clock.gradients) == len(parameters) == 135
    # A copy that takes longer delays the next one, so that the device never holds three gradients.
    assert clock.waited == waited and clock._sent is None
    assert all(a <= start for (_, a), (start, _) in itertools.pairwise(clock.gradients))


def test_a_gradient_of_a_failed_backward_is_released(monkeypatch):
    model, clock = simulated(monkeypatch, ("full", None), 0.75)
    handle = model.blocks[2].norm2.weight.register_hook(raising)
    with pytest.raises(InjectedError):
        loss(model).backward()
    assert clock._sent is not None
    handle.remove()
    with torch.no_grad():
        loss(model)
    assert clock._sent is None


def test_the_first_block_of_the_next_model_is_copied_beside_the_last_block(monkeypatch):
    """The host is ahead of the device, so a reward's phase does not begin with a wait."""
    model, clock = simulated(monkeypatch, ("full", None), 0.75)
    reward, _ = simulated(monkeypatch, ("full", None), 0.75, slots=slots_of(model))
    reward.requires_grad_(False).patch_embedding.requires_grad_(True)
    model.requires_grad_(False).patch_embedding.requires_grad_(True)
    assert slots_of(reward) is slots_of(model)
    value = loss(model)
    assert clock.waited == 0.75  # for the very first block
    loss(reward).backward()
    value.backward()
    assert clock.waited == 0.75
