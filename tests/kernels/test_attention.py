"""attention: PyTorch's kernels behind one op that returns and saves the log-sum-exp."""

import importlib
import math

import pytest
import torch
from numerics import assert_within_twice
from op_checks import (
    check_compiled,
    check_deterministic,
    check_expanded_gradient,
    run,
    saved_bytes,
)
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from prfl_fast.kernels import attention

# `prfl_fast.kernels.attention` as an attribute is the function.
module = importlib.import_module("prfl_fast.kernels.attention")


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sdpa(q, k, v, heads, scale=None):
    out = F.scaled_dot_product_attention(*(split(t, heads) for t in (q, k, v)), scale=scale)
    return out.transpose(1, 2).flatten(2)


def softmax_attention(q, k, v, heads, scale=None):
    """The formula itself; float64 tensors make it the oracle."""
    q, k, v = (split(t, heads) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    out = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    return out, scores.logsumexp(-1)


def make(batch, lq, lk, dim, dtype):
    shapes = {"q": lq, "k": lk, "v": lk}
    return {n: torch.randn(batch, length, dim).to(dtype) for n, length in shapes.items()}


def compare(ours, plain, oracle, tensors, rounding=1.0):
    """2× rule with plain and oracle of different make; all return one output."""
    grad = torch.randn_like(plain(**tensors))
    out, plain, oracle = (
        run(f, tensors, [grad], double)
        for f, double in ((ours, False), (plain, False), (oracle, True))
    )
    assert_within_twice(out[0][0], plain[0][0], oracle[0][0], rounding=rounding)
    for name, expected in oracle[1].items():
        assert_within_twice(out[1][name], plain[1][name], expected, f"d_{name}", rounding)


SHAPES = [
    # batch, Lq, Lk, D, heads
    (1, 1, 1, 8, 1),
    (2, 7, 5, 24, 2),
    (1, 1, 40, 32, 4),
    (2, 65, 33, 48, 2),
    (1, 130, 130, 256, 2),
    (1, 66, 512, 384, 3),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_gradients(shape, dtype):
    *sizes, heads = shape
    compare(
        lambda q, k, v: attention(q, k, v, heads=heads)[0],
        lambda q, k, v: sdpa(q, k, v, heads),
        lambda q, k, v: softmax_attention(q, k, v, heads)[0],
        make(*sizes, dtype),
        rounding=32 if dtype == torch.float64 else 1,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_pytorch(shape, dtype):
    *sizes, heads = shape
    tensors = make(*sizes, dtype)
    assert torch.equal(attention(**tensors, heads=heads)[0], sdpa(**tensors, heads=heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_sum_exp(dtype):
    tensors = make(2, 9, 21, 32, dtype)
    lse = attention(**tensors, heads=4, scale=0.3)[1]
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert lse.shape == (2, 4, 9) and lse.is_contiguous()
    exact = softmax_attention(*(t.double() for t in tensors.values()), 4, 0.3)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_key_set(dtype):
    tensors = make(2, 19, 12, 48, dtype)
    tensors |= {f"extra_{n}": torch.randn(2, 5, 48).to(dtype) for n in "kv"}

    def added(one):
        def call(q, k, v, extra_k, extra_v):
            return one(q, k, v) + one(q, extra_k, extra_v)

        return call

    compare(
        lambda **t: attention(**t, heads=2)[0],
        added(lambda *t: sdpa(*t, 2)),
        added(lambda *t: softmax_attention(*t, 2)[0]),
        tensors,
    )
    with torch.no_grad():
        first = {n: t for n, t in tensors.items() if not n.startswith("extra")}
        out, lse = attention(**tensors, heads=2)
        assert torch.equal(out, added(lambda *t: sdpa(*t, 2))(**tensors))
        assert torch.equal(lse, attention(**first, heads=2)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_a_packed_projection(dtype):
    def sliced(function):
        return lambda qkv: function(*qkv.chunk(3, dim=-1))

    compare(
        sliced(lambda q, k, v: attention(q, k, v, heads=3)[0]),
        sliced(lambda q, k, v: sdpa(q, k, v, 3)),
        sliced(lambda q, k, v: softmax_attention(q, k, v, 3)[0]),
        {"qkv": torch.randn(2, 23, 3 * 36).to(dtype)},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_path(dtype, monkeypatch):
    """What runs where PyTorch has no kernel, in several pieces of queries."""
    monkeypatch.setattr(module, "CHUNK", 2 * 2 * 17 * 4)
    monkeypatch.setattr(module, "_kernel", lambda q, heads: "plain")
    compare(
        lambda q, k, v: attention(q, k, v, heads=2, scale=0.2)[0],
        lambda q, k, v: sdpa(q, k, v, 2, 0.2),
        lambda q, k, v: softmax_attention(q, k, v, 2, 0.2)[0],
        make(2, 13, 17, 24, dtype),
    )
    tensors = make(1, 9, 17, 24, dtype)
    out, lse = module.plain(**tensors, heads=2, scale=0.2, upcast=torch.float64)
    exact = softmax_attention(*(t.double() for t in tensors.values()), 2, 0.2)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close((out, lse), exact)


def test_long_sequences_store_no_score_matrix():
    tensors = {n: t.requires_grad_() for n, t in make(1, 2048, 2048, 64, torch.float32).items()}
    kept = saved_bytes(lambda: attention(**tensors, heads=2)[0])
    assert kept == 4 * 2048 * 64 * 4 + 2 * 2048 * 4  # q, k, v, out and lse
    attention(**tensors, heads=2)[0].square().sum().backward()


def test_deterministic_for_any_gradient_layout():
    tensors = make(2, 37, 29, 48, torch.bfloat16)
    function = lambda q, k, v: attention(q, k, v, heads=2)[0]  # noqa: E731
    check_deterministic(function, tensors)
    check_expanded_gradient(function, tensors)


def test_only_needed_gradients_and_none_through_lse():
    tensors = make(1, 6, 5, 16, torch.float32)
    full = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    out, lse = attention(**full, heads=2)
    assert not lse.requires_grad
    out.sum().backward()
    tensors["k"].requires_grad_()
    attention(**tensors, heads=2)[0].sum().backward()
    assert torch.equal(tensors["k"].grad, full["k"].grad)
    assert tensors["q"].grad is None and tensors["v"].grad is None


def test_gradcheck():
    inputs = [t.requires_grad_() for t in make(1, 3, 4, 8, torch.float64).values()]
    extra = [t.requires_grad_() for t in make(1, 3, 2, 8, torch.float64).values()][1:]
    function = lambda q, k, v, ek, ev: attention(  # noqa: E731
        q, k, v, heads=2, extra_k=ek, extra_v=ev
    )[0]
    assert torch.autograd.gradcheck(function, inputs + extra)


def test_flops():
    tensors = {n: t.requires_grad_() for n, t in make(2, 32, 48, 64, torch.float32).items()}
    counter = FlopCounterMode(display=False)
    with counter:
        out = attention(**tensors, heads=4)[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 32 * 48 * 64
    assert counter.get_total_flops() - forward == 2.5 * forward


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in make(2, 6, 5, 16, torch.bfloat16).values())
    torch.library.opcheck(torch.ops.prfl_fast.attention, (q, k, v, 2, 0.3))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = torch.ops.prfl_fast.attention(q, k, v, 2, 0.3)
    grad = torch.randn_like(out)
    for needed in ([True, True, True], [True, False, False]):
        args = (grad, q, k, v, out, lse, 2, 0.3, needed)
        torch.library.opcheck(
            torch.ops.prfl_fast.attention_backward,
            args,
            test_utils=["test_schema", "test_faketensor"],
        )


def test_compiles_without_graph_break():
    check_compiled(
        lambda q, k, v: attention(q, k, v, heads=2)[0], make(1, 6, 5, 16, torch.bfloat16)
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(4, 8)}, r"q is float32\[4, 8\].*\[B, Lq, D\]"),
        ({"k": torch.ones(2, 5, 12)}, r"k is float32\[2, 5, 12\].*\[2, Lk, 8\]"),
        ({"v": torch.ones(2, 6, 8)}, r"v is float32\[2, 6, 8\].*k's shape \[2, 5, 8\]"),
        ({"v": torch.ones(2, 5, 8).bfloat16()}, "v is bfloat16.*float32"),
        ({"k": torch.ones(2, 0, 8), "v": torch.ones(2, 0, 8)}, "k is .*at least one key"),
        ({"heads": 3}, "heads is 3.*divisor of D = 8"),
        ({"heads": 0}, "heads is 0.*divisor of D = 8"),
        ({"q": torch.ones(2, 8, 4).transpose(1, 2)}, "q is .*last"),
        ({"k": torch.ones(2, 5, 8, dtype=torch.int64)}, "k is int64.*floating-point"),
        ({"k": torch.ones(2, 5, 8, device="meta")}, "k is .*meta.*on cpu"),
        ({"extra_k": torch.ones(2, 3, 8)}, "extra_v is None"),
        ({"extra_v": torch.ones(2, 3, 8)}, "extra_k is None"),
        (
            {"extra_k": torch.ones(2, 3, 8), "extra_v": torch.ones(2, 4, 8)},
            "extra_v is .*extra_k's",
        ),
    ],
)
def test_bad_arguments(change, message):
    arguments = make(2, 4, 5, 8, torch.float32) | {"heads": 2} | change
    with pytest.raises(ValueError, match="attention: " + message):
        attention(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cuda(shape, dtype):
    *sizes, heads = shape
    tensors = {n: t.cuda() for n, t in make(*sizes, dtype).items()}
    compare(
        lambda q, k, v: attention(q, k, v, heads=heads)[0],
        lambda q, k, v: sdpa(q, k, v, heads),
        lambda q, k, v: softmax_attention(q, k, v, heads)[0],
        tensors,
    )
    lse = attention(**tensors, heads=heads)[1]
    exact = softmax_attention(*(t.double() for t in tensors.values()), heads)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-3, atol=1e-3)
