"""Work counted by phase, against hand-computed cases."""

import pytest
import torch
from plans import SMALL
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_fast.kernels import attention, query_pool
from prfl_fast.kernels.attn import exact
from prfl_fast.memory.ledger import mark
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.costs import Cost, CostLedger
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.flops import flop_counter

BYTES = 4096  # of x


def cost_of(work):
    """Return the cost of ``work(x, y)`` on two float32 tensors of 1024 elements."""
    with FakeTensorMode():
        x, y = torch.zeros(1024), torch.zeros(1024)
        with CostLedger() as ledger:
            work(x, y)  # no phase yet: not counted
            ledger.start_phase("forward")
            work(x, y)
    return ledger.costs().get("forward", Cost())


def moved(work):
    cost = cost_of(work)
    assert cost.matmul_flops == cost.attention_flops == 0
    return cost.moved_bytes


def test_bytes_that_elementwise_operations_move():
    assert moved(lambda x, y: x + y) == 3 * BYTES
    assert moved(lambda x, y: x.add_(y)) == 3 * BYTES
    assert moved(lambda x, y: x.to(torch.bfloat16)) == BYTES + BYTES // 2
    assert moved(lambda x, y: torch.zeros(1024)) == BYTES
    assert moved(lambda x, y: x[:256] + y[0].expand(256)) == 1024 + 4 + 1024
    assert moved(lambda x, y: x.copy_(y)) >= 2 * BYTES


def test_views_and_empty_tensors_move_nothing():
    assert moved(lambda x, y: x.view(2, -1)[0].t()) == 0
    assert moved(lambda x, y: (torch.empty(1024), x.new_empty(7), torch.empty_like(y))) == 0


def test_every_operation_that_computes_is_a_launch():
    assert cost_of(lambda x, y: (x + y).mul_(y).view(2, -1)).launches == 2
    assert cost_of(lambda x, y: x.new_empty(7)).launches == 0


def test_copies_to_and_from_the_host_cross_the_bus():
    def out_and_back(x, y):
        buffer = torch.empty(1024)
        mark(buffer, "host")
        buffer.copy_(x)
        y.copy_(buffer)

    assert cost_of(out_and_back) == Cost(to_host_bytes=BYTES, to_device_bytes=BYTES)


def test_matrix_products_count_operations_and_no_bytes():
    cost = cost_of(lambda x, y: x.view(32, 32) @ y.view(32, 32))
    assert cost == Cost(matmul_flops=2 * 32**3, launches=1)


PRODUCTS = {
    "addmm": lambda x, a: torch.addmm(x, a, a.mT),
    "addmm_": lambda x, a: x.addmm_(a, a.mT),
    "addmm out": lambda x, a: torch.addmm(x, a, a.mT, out=torch.empty_like(x)),
    "mm out": lambda x, a: torch.mm(a, a.mT, out=torch.empty_like(x)),
    "baddbmm": lambda x, a: torch.baddbmm(x[None], a[None], a.mT[None]),
    "baddbmm_": lambda x, a: x[None].baddbmm_(a[None], a.mT[None], beta=2.0),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_count_in_every_form(name):
    def work(x, y):
        PRODUCTS[name](x.view(32, 32), y[:256].view(32, 8))

    flops = 2 * 32 * 8 * 32
    assert cost_of(work) == Cost(matmul_flops=flops, launches=1)
    with flop_counter() as counter:
        work(torch.zeros(1024), torch.zeros(1024))
    assert counter.get_total_flops() == flops


def test_a_full_training_step_counts_as_by_hand():
    """Count the products of forward and backward of all linear layers, without attention."""
    width, ffn, text_dim, freq_dim, layers, tokens, text_tokens = 128, 512, 64, 64, 2, 768, 32
    config = {**SMALL, "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": layers}
    size = {"frames": 9, "height": 256, "width": 256, "text_tokens": text_tokens}
    workload = Workload(config, **size, reward_blocks=1, precision="fp32", train="full")
    costs = simulate(workload, MemoryConfig(), MemoryConfig()).costs

    # q, k, v and output of the self-attention, q and output of the cross-attention; its k and v.
    block = 2 * (6 * tokens + 2 * text_tokens) * width**2 + 2 * 2 * tokens * width * ffn
    patches = 16 * 2 * 2  # values of a token in the latents
    # Their inputs need no gradient: patches, text states and frequencies of the timestep.
    first = 2 * width * (tokens * patches + text_tokens * text_dim + freq_dim)
    # Second layers of the text's and the timestep's embeddings, the modulation's, and the head.
    others = 2 * width**2 * (text_tokens + 1 + 6) + 2 * tokens * width * patches
    assert costs["forward"].matmul_flops == layers * block + first + others
    assert costs["backward"].matmul_flops == 2 * (layers * block + others) + first


@pytest.mark.parametrize("plain", [False, True])
def test_attention_and_its_backward_count_apart(plain):
    batch, length, keys, heads, size = 2, 24, 40, 4, 8
    forward = 4 * batch * length * keys * heads * size
    scratch = 4 * batch * 128 * (heads * size + 2 * heads)
    with FakeTensorMode():
        q = torch.zeros(batch, length, heads * size, requires_grad=True)
        k = torch.zeros(batch, keys, heads * size, requires_grad=True)
        with CostLedger() as ledger:
            ledger.start_phase("forward")
            if plain:
                split = [t.unflatten(2, (heads, size)).transpose(1, 2) for t in (q, k, k)]
                out = torch.nn.functional.scaled_dot_product_attention(*split)
            else:
                out = attention(q, k, k, heads=heads)[0]
            loss = out.sum()
            ledger.start_phase("backward")
            live = ledger.live
            loss.backward()
    costs = ledger.costs()
    assert costs["forward"].attention_flops == forward
    assert costs["backward"].attention_backward_flops == 5 * forward // 2
    assert costs["backward"].attention_flops == costs["forward"].attention_backward_flops == 0
    assert costs["backward"].matmul_flops == 0
    # What the kernel allocates inside itself is in the peak, and gone after.
    assert ledger.peak >= live + scratch + q.nbytes + 2 * k.nbytes
    assert ledger.live < live + scratch + q.nbytes


def test_a_backward_in_groups_of_heads_needs_the_buffers_of_one(monkeypatch):
    heads, size, length, keys = 5, 8, 200, 40
    monkeypatch.setattr(exact, "GROUP_BYTES", 2 * 4 * length * size)  # d_q of two heads
    with FakeTensorMode():
        q, k = (torch.zeros(1, n, heads * size).bfloat16().requires_grad_() for n in (length, keys))
        with CostLedger() as ledger:
            out = attention(q, k, k, heads=heads)[0]
            grad = torch.zeros_like(out)
            live, before = ledger.live, ledger.peak
            torch.autograd.grad(out, (q, k), grad)
    # d_q, δ and lse in float32, padded to 256 queries; d_q, d_k, d_v and copies of grad and out.
    group = 2 * (4 * 256 * (size + 2) + 2 * (3 * length + 2 * keys) * size)
    whole = q.nbytes + 2 * k.nbytes
    assert before <= ledger.peak == live + whole + group


def test_the_query_pool_counts_both_its_products_and_what_it_reads():
    with FakeTensorMode():
        x, queries = torch.zeros(1, 512, 16), torch.zeros(4, 16)
        with CostLedger() as ledger:
            ledger.start_phase("reward")
            query_pool(x, queries)
    cost = ledger.costs()["reward"]
    assert cost.matmul_flops == 4 * 512 * 16 * 4
    assert x.nbytes <= cost.moved_bytes <= 1.1 * x.nbytes
