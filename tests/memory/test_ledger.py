"""The ledger of live bytes: hand-computed cases, and what PyTorch's own allocator says."""

import pytest
import torch
from allocations import allocator_peak
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from prfl_fast.kernels import query_pool
from prfl_fast.memory.ledger import Ledger, mark

KIB = 256  # floats


def test_ledger_of_a_hand_computed_case():
    with Ledger(open_operations=True) as ledger:
        a = torch.zeros(KIB)  # 1 KiB live
        b = torch.zeros(2 * KIB)  # 3
        view = a.view(2, -1)[0]  # a view allocates nothing
        del a  # and keeps its base alive: 3
        b.add_(1)  # in place: 3
        del view  # 2
        c = torch.zeros(4 * KIB)  # 6, the peak
        del b, c  # 0
        d = torch.zeros(KIB)  # 1
    assert (ledger.peak, ledger.live) == (6 * 1024, 1024)
    del d
    assert ledger.live == 0


def test_ledger_does_not_count_what_was_there_before():
    x = torch.zeros(64 * KIB)
    with Ledger(open_operations=True) as ledger:
        y = x.view(-1)[: 2 * KIB] + 1
    assert ledger.peak == y.numel() * 4 == 2048


def test_ledger_sees_what_backward_holds_and_frees():
    w = torch.zeros(KIB, requires_grad=True)
    with Ledger(open_operations=True) as ledger:
        h = w.exp()  # kept: 1 KiB
        loss = h.sum()  # 4 bytes
        held = ledger.live
        loss.backward()
    assert held == 1024 + 4
    # At the peak: h, the loss, the seed of ones, and the gradient exp makes; sum's is a view.
    assert ledger.peak == 2 * 1024 + 8
    del h, loss
    assert ledger.live == 1024  # w.grad


def test_ledger_looks_inside_our_operations():
    x, u = torch.randn(1, 512, 16), torch.randn(4, 16)
    with Ledger(open_operations=True) as ledger:
        query_pool(x, u)
    # The reference holds scores [512, 4] at least; the outputs are [4, 16] and [4].
    assert ledger.peak >= 512 * 4 * 4
    assert ledger.live == 0


def kib(n):
    return torch.zeros(n * KIB)


def test_categories_phases_and_the_snapshot_at_the_peak():
    weights = kib(4)
    with Ledger() as ledger:
        mark(weights, "weights")
        assert ledger.live == 4 * 1024  # what was there before counts once it is marked
        ledger.start_phase("rollout")
        x = kib(1)
        assert ledger.category_of(x) == "rollout"
        ledger.start_phase("forward")
        h = kib(2)
        mark(h.view(2, -1), "checkpoints")  # a view stands for its storage
        y = kib(8)
        del y
        ledger.start_phase("backward")
        z = kib(3)
    expected = {"weights": 4096, "rollout": 1024, "checkpoints": 2048, "workspace": 8192}
    assert ledger.peak == 15 * 1024 and ledger.peak_phase == "forward"
    assert {k: v for k, v in ledger.peak_categories.items() if v} == expected
    assert ledger.categories["workspace"] == z.nbytes
    del h
    assert ledger.categories["checkpoints"] == 0
    assert x.nbytes == ledger.categories["rollout"]


def test_host_memory_is_counted_apart_and_never_in_the_peak():
    with Ledger() as ledger:
        x = kib(2)
        buffer = kib(16)  # device memory by default, until it is marked
        mark(buffer, "host")
        del x
        assert (ledger.live, ledger.host) == (0, 16 * 1024)
        del buffer
    assert (ledger.peak, ledger.host_peak, ledger.host) == (2048, 16 * 1024, 0)


def test_mark_needs_a_known_category_and_does_nothing_without_a_ledger():
    mark(kib(1), "weights")
    with Ledger(), pytest.raises(ValueError, match="category is 'weigths', expected one of 'host'"):
        mark(kib(1), "weigths")


def test_an_exception_ends_the_ledger():
    with pytest.raises(RuntimeError, match="inside"), Ledger() as ledger:
        raise RuntimeError("inside")
    before = ledger.live
    mark(kib(1), "weights")
    assert ledger.live == before


def test_a_storage_that_is_resized():
    with Ledger() as ledger:
        x = kib(1)
        x.resize_(3 * KIB)
        assert ledger.live == 3 * 1024
        del x
    assert (ledger.live, ledger.peak) == (0, 3 * 1024)


def test_what_autograd_saves():
    x = torch.zeros(KIB, requires_grad=True)
    with Ledger() as ledger:
        with ledger.saving():
            h = x.exp()
            y = h.sin()  # saves h
            del h
        assert ledger.categories["checkpoints"] == 1024
        y.sum().backward()
        assert ledger.categories["checkpoints"] == 0


def test_the_timeline_keeps_every_phase_and_the_peak():
    with Ledger() as ledger:
        for phase in ("forward", "backward"):
            ledger.start_phase(phase)
            for i in range(9000):
                x = torch.zeros(i % 97 + 1)
                if i == 5003:
                    x = kib(7)
            del x
    totals = [sum(categories.values()) for _, categories in ledger.timeline]
    assert len(totals) <= 4097
    assert max(totals) == ledger.peak == 7 * 1024 + 4 * (5004 % 97 + 1)
    phases = [phase for phase, _ in ledger.timeline if phase]
    assert phases == sorted(phases, reverse=True)
    assert {p for p, c in ledger.timeline if sum(c.values()) == ledger.peak} == {
        "forward",
        "backward",
    }


def test_transient_bytes_count_in_the_peak_only():
    with Ledger() as ledger:
        x = kib(1)
        ledger.add_transient(4096)
    assert ledger.peak == 4096 + x.nbytes and ledger.live == x.nbytes
    assert ledger.peak_categories["workspace"] == ledger.peak


def block_of_work():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.LayerNorm(256), torch.nn.Linear(256, 64)
    )
    x = torch.randn(2, 512, 64)

    def work():
        h = checkpoint(model, x, use_reentrant=False)
        q = h.unflatten(-1, (4, 16)).transpose(1, 2)
        out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        out.square().mean().backward()

    return model, work


def test_the_peak_is_the_allocators():
    model, work = block_of_work()
    with Ledger() as ledger:
        work()
    model.zero_grad(set_to_none=True)
    peak = allocator_peak(work)
    assert abs(ledger.peak - peak) <= 0.02 * peak


def test_fake_tensors_give_the_same_ledger():
    _, work = block_of_work()
    with Ledger() as real:
        work()
    with FakeTensorMode():
        _, work = block_of_work()
        with Ledger() as fake:
            work()
    assert fake.peak == real.peak > 1 << 20
    assert fake.timeline == real.timeline


def test_marks_of_a_kind_reach_every_ledger_in_force():
    with Ledger() as outer, Ledger() as inner:
        x = kib(1)
        mark(x, "gradients")
    assert outer.categories["gradients"] == inner.categories["gradients"] == x.nbytes
