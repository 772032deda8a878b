"""attention: PyTorch's kernels behind one op that returns and saves the log-sum-exp."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from prfl_fast import kernels
from prfl_fast.kernels import _attention_choice as choice
from prfl_fast.kernels import attention

# `prfl_fast.kernels.attention` as an attribute is the function.
module = importlib.import_module("prfl_fast.kernels.attention")


@pytest.fixture(autouse=True)
def _backend_as_before(monkeypatch):
    monkeypatch.setattr(choice, "_current", choice._current)


@pytest.fixture(params=["cpu", "plain"])
def backend(request):
    kernels.set_attention_backend(request.param)
    return request.param


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def sdpa(q, k, v, heads, scale=None, lengths=None):
    mask = None if lengths is None else ~beyond(k, lengths)
    q, k, v = (split(t, heads) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def beyond(k, lengths):
    """The keys past the lengths, to mask ``[B, heads, Lq, Lk]`` with."""
    past = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
    return past[:, None, None]


def softmax_attention(q, k, v, heads, scale=None, lengths=None):
    """The formula itself; float64 tensors make it the oracle."""
    past = None if lengths is None else beyond(k, lengths)
    q, k, v = (split(t, heads) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    if past is not None:
        scores = scores.masked_fill(past, -math.inf)
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
    kernels.set_attention_backend("plain")
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


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


LENGTHS = [int32(1, 21), int32(21, 21), int32(13, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_key_lengths(dtype, lengths, backend):
    tensors = make(2, 9, 21, 48, dtype)
    compare(
        lambda q, k, v: attention(q, k, v, heads=3, key_lengths=lengths)[0],
        lambda q, k, v: sdpa(q, k, v, 3, lengths=lengths),
        lambda q, k, v: softmax_attention(q, k, v, 3, lengths=lengths)[0],
        tensors,
        rounding=32 if dtype == torch.float64 else 1,
    )
    lse = attention(**tensors, heads=3, key_lengths=lengths)[1]
    exact = softmax_attention(*(t.double() for t in tensors.values()), 3, lengths=lengths)[1]
    close = 1e-5 if dtype.itemsize > 2 else 1e-4  # with a mask ATen's exp in 16 bits is coarser
    torch.testing.assert_close(lse.double(), exact, rtol=close, atol=close)
    grad = torch.randn(2, 9, 48).to(dtype)
    function = lambda q, k, v: attention(q, k, v, heads=3, key_lengths=lengths)[0]  # noqa: E731
    found = run(function, tensors, [grad])[1]
    for b, n in enumerate(lengths.tolist()):
        assert not found["k"][b, n:].any() and not found["v"][b, n:].any()


def test_what_lies_past_the_lengths_is_not_read(backend):
    tensors, lengths = make(2, 9, 21, 48, torch.float32), int32(4, 20)
    grad = torch.randn(2, 9, 48)
    function = lambda q, k, v: attention(q, k, v, heads=3, key_lengths=lengths)[0]  # noqa: E731
    first = run(function, tensors, [grad])
    for b, n in enumerate(lengths.tolist()):
        tensors["k"][b, n:] = 7.0
        tensors["v"][b, n:] = -5.0
    second = run(function, tensors, [grad])
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in "qkv")


def test_a_sample_of_length_n_is_a_sample_of_n_keys(backend):
    tensors, lengths = make(3, 6, 12, 32, torch.float32), int32(1, 12, 5)
    out, lse = attention(**tensors, heads=2, key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = {"q": tensors["q"][b : b + 1]} | {t: tensors[t][b : b + 1, :n] for t in "kv"}
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), attention(**alone, heads=2))


def test_key_lengths_are_of_the_first_key_set():
    tensors, lengths = make(2, 9, 21, 48, torch.float32), int32(3, 9)
    extra = {f"extra_{n}": torch.randn(2, 30, 48) for n in "kv"}
    out, lse = attention(**tensors, **extra, heads=2, key_lengths=lengths)
    first = attention(**tensors, heads=2, key_lengths=lengths)
    second = attention(tensors["q"], *extra.values(), heads=2)[0]
    assert torch.equal(out, first[0] + second) and torch.equal(lse, first[1])


@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (1, 1, 1)])
def test_no_queries(sizes, backend):
    tensors = {n: t.requires_grad_() for n, t in make(*sizes, 16, torch.float32).items()}
    for lengths in (None, torch.ones(sizes[0], dtype=torch.int32)):
        out, lse = attention(**tensors, heads=2, key_lengths=lengths)
        assert out.shape == tensors["q"].shape and lse.shape == (sizes[0], 2, sizes[1])
        gradients = torch.autograd.grad(out.sum(), list(tensors.values()))
        for gradient, tensor in zip(gradients, tensors.values(), strict=True):
            assert gradient.shape == tensor.shape and gradient.isfinite().all()


def test_long_sequences_store_no_score_matrix():
    tensors = {n: t.requires_grad_() for n, t in make(1, 2048, 2048, 64, torch.float32).items()}
    kept = saved_bytes(lambda: attention(**tensors, heads=2)[0])
    assert kept == 4 * 2048 * 64 * 4 + 2 * 2048 * 4  # q, k, v, out and lse
    attention(**tensors, heads=2)[0].square().sum().backward()


def test_deterministic_for_any_gradient_layout(backend):
    tensors = make(2, 37, 29, 48, torch.bfloat16)
    for lengths in (None, int32(29, 8)):
        function = lambda q, k, v, n=lengths: attention(  # noqa: E731
            q, k, v, heads=2, key_lengths=n
        )[0]
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


@pytest.mark.parametrize("lengths", [None, int32(4, 1)])
def test_gradcheck(lengths, backend):
    inputs = [t.requires_grad_() for t in make(2, 3, 4, 8, torch.float64).values()]
    extra = [t.requires_grad_() for t in make(2, 3, 2, 8, torch.float64).values()][1:]
    function = lambda q, k, v, ek, ev: attention(  # noqa: E731
        q, k, v, heads=2, extra_k=ek, extra_v=ev, key_lengths=lengths
    )[0]
    assert torch.autograd.gradcheck(function, inputs + extra)


@pytest.mark.parametrize("lengths", [None, int32(5, 48)])
def test_flops(lengths):
    """All keys count: the lengths are known to the device alone."""
    tensors = {n: t.requires_grad_() for n, t in make(2, 32, 48, 64, torch.float32).items()}
    counter = FlopCounterMode(display=False)
    with counter:
        out = attention(**tensors, heads=4, key_lengths=lengths)[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 32 * 48 * 64
    assert counter.get_total_flops() - forward == 2.5 * forward


@pytest.mark.parametrize("lengths", [None, int32(2, 5)])
def test_opcheck(lengths, backend):
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v = (t.requires_grad_() for t in make(2, 6, 5, 16, torch.bfloat16).values())
    forward, backward = torch.ops.prfl_fast.attention, torch.ops.prfl_fast.attention_backward
    inputs = (q, k, v, 2, 0.3, lengths)
    torch.library.opcheck(forward, inputs, test_utils=(*tests, "test_aot_dispatch_dynamic"))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = forward(q, k, v, 2, 0.3, lengths)
    grad = torch.randn_like(out)
    for needed in ([True, True, True], [True, False, False]):
        args = (grad, q, k, v, out, lse, 2, 0.3, needed, lengths)
        torch.library.opcheck(backward, args, test_utils=tests[:2])


def test_compiles_without_graph_break():
    tensors = make(2, 6, 5, 16, torch.bfloat16)
    check_compiled(lambda q, k, v: attention(q, k, v, heads=2)[0], tensors)
    extra = {f"extra_{n}": torch.randn(2, 3, 16).bfloat16() for n in "kv"}
    check_compiled(
        lambda key_lengths, **t: attention(**t, heads=2, key_lengths=key_lengths)[0],
        tensors | extra | {"key_lengths": int32(1, 4)},
    )


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    function = lambda q, k, v, n: attention(q, k, v, heads=2, key_lengths=n)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for queries, keys in ((6, 5), (8, 12), (34, 7)):
            args = (*make(2, queries, keys, 16, torch.float32).values(), int32(2, keys))
            torch.testing.assert_close(compiled(*args), function(*args))


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
        ({"q": torch.ones(2, 4, 0)}, r"q is .*with D > 0"),
        ({"key_lengths": [1, 5]}, r"key_lengths is \[1, 5\].*int32 of shape \[2\]"),
        ({"key_lengths": torch.ones(2)}, r"key_lengths is float32\[2\].*int32"),
        ({"key_lengths": torch.ones(2).long()}, r"key_lengths is int64\[2\].*int32"),
        ({"key_lengths": torch.ones(3).int()}, r"key_lengths is int32\[3\].*shape \[2\]"),
        ({"key_lengths": torch.ones(2, 1).int()}, r"key_lengths is int32\[2, 1\].*shape \[2\]"),
        ({"key_lengths": int32(0, 5)}, r"key_lengths is \[0, 5\].*from 1 to Lk = 5"),
        ({"key_lengths": int32(6, 5)}, r"key_lengths is \[6, 5\].*from 1 to Lk = 5"),
        ({"key_lengths": torch.ones(2, dtype=torch.int32, device="meta")}, "key_lengths.* on cpu"),
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


@st.composite
def arguments(draw):
    batch, lq, lk = (draw(st.integers(1, n)) for n in (3, 20, 20))
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    pad = {name: draw(st.integers(0, 3)) for name in "qkv"}  # rows further apart than D
    tensors = {}
    for name, length in zip("qkv", (lq, lk, lk), strict=True):
        wide = torch.randn(batch, length, heads * head_dim + pad[name]).to(dtype)
        tensors[name] = wide[..., pad[name] :]
    if draw(st.booleans()):
        extra = draw(st.integers(1, 9))
        for name in "kv":
            tensors[f"extra_{name}"] = torch.randn(batch, extra, heads * head_dim).to(dtype)
    fixed = {"heads": heads, "scale": draw(st.sampled_from([None, 0.05, 0.7]))}
    if draw(st.booleans()):
        numbers = st.lists(st.integers(1, lk), min_size=batch, max_size=batch)
        fixed["key_lengths"] = int32(*draw(numbers))
    return tensors, fixed, draw(st.sampled_from(["dense", "expanded", "transposed"]))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["cpu", "plain"])
def test_any_arguments(name, given_arguments):
    kernels.set_attention_backend(name)
    tensors, fixed, layout = given_arguments
    heads, scale, lengths = fixed["heads"], fixed["scale"], fixed.get("key_lengths")

    def both(one):
        def call(q, k, v, extra_k=None, extra_v=None):
            out = one(q, k, v, heads, scale, lengths)
            return out if extra_k is None else out + one(q, extra_k, extra_v, heads, scale, None)

        return call

    grad = torch.randn_like(tensors["q"])
    if layout == "expanded":
        grad = grad[:, :1].expand_as(grad)
    elif layout == "transposed":
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    functions = (
        lambda **t: attention(**t, **fixed)[0],
        both(sdpa),
        both(lambda *a: softmax_attention(*a)[0]),
    )
    results = [run(f, tensors, [grad], double=f is functions[2]) for f in functions]
    # A single key leaves the gradient of its query to the rounding of g · v, much larger than it.
    rounding = 32.0 if tensors["q"].dtype == torch.float32 else 4.0
    assert_within_twice(*(r[0][0] for r in results), rounding=rounding)
    size = tensors["q"].double().norm() + tensors["k"].double().norm()
    for name_ in tensors:
        ours, plain, oracle = (r[1][name_] for r in results)
        if oracle.abs().max() < 1e-12 * size:
            assert ours.abs().max() < 1e-2
        else:
            assert_within_twice(ours, plain, oracle, f"d_{name_}", rounding)
