"""attention: PyTorch's kernels behind one op that returns and saves the log-sum-exp."""

import pytest
import torch
from attention_cases import assert_no_gradient_past, int32, make_qkv, sdpa, softmax_attention
from dtypes import BF16, FLOATS, FP32, FP64
from numerics import assert_within_twice
from op_checks import bind, check_compiled_once, run, saved_by
from op_tests import OperationTests
from properties import property_test, st
from torch.utils.flop_counter import FlopCounterMode

from prfl_fast import kernels
from prfl_fast.kernels import attention
from prfl_fast.kernels.attn import backend_choice as choice
from prfl_fast.kernels.attn import exact as module


@pytest.fixture(autouse=True)
def _backend_as_before(monkeypatch):
    monkeypatch.setattr(choice, "_current", choice._current)


@pytest.fixture(params=["cpu", "plain"])
def backend(request):
    kernels.set_attention_backend(request.param)
    return request.param


def ours(q, k, v, extra_k=None, extra_v=None, *, heads, scale=None, lengths=None):
    extra = {} if extra_k is None else {"extra_k": extra_k, "extra_v": extra_v}
    return attention(q, k, v, heads=heads, scale=scale, key_lengths=lengths, **extra)[0]


def summed(one):
    """Return ``ours`` by a plain attention: a second key set adds its own attention."""

    def call(q, k, v, extra_k=None, extra_v=None, *, heads, scale=None, lengths=None):
        out = one(q, k, v, heads, scale, lengths)
        return out if extra_k is None else out + one(q, extra_k, extra_v, heads, scale)

    return call


FUNCTIONS = (ours, summed(sdpa), summed(lambda *a: softmax_attention(*a)[0]))


def results(tensors, grad, wrap=lambda function: function, **fixed):
    """Return outputs and gradients of ours, of PyTorch's attention and of the float64 formula."""
    return [run(wrap(bind(f, fixed)), tensors, [grad], double=f is FUNCTIONS[2]) for f in FUNCTIONS]


def compare(tensors, rounding=1.0, grad=None, **more):
    """Assert the 2× rule with plain and oracle of different make."""
    grad = torch.randn_like(tensors["q"]) if grad is None else grad
    found = results(tensors, grad, **more)
    assert_within_twice(*(outputs[0] for outputs, _ in found), rounding=rounding)
    for name in tensors:
        assert_within_twice(*(grads[name] for _, grads in found), f"d_{name}", rounding)


def exact_lse(tensors, *args, **fixed):
    return softmax_attention(*(t.double() for t in tensors.values()), *args, **fixed)[1]


class TestAttention(OperationTests):
    op = "attention"
    function, public = ours, attention
    flags = {"q": "+--", "k": "-+-", "v": "--+"}
    test_bfloat16 = test_float64_is_computed_in_float64 = test_reference_is_an_oracle = None
    test_offsets_past_int32 = None

    def examples(self, dtype):
        tensors = make_qkv(2, 3, 4, 8, dtype)
        yield tensors, {"heads": 2}
        extra = {f"extra_{n}": torch.randn(2, 2, 8).to(dtype) for n in "kv"}
        yield tensors | extra, {"heads": 2, "scale": 0.3, "lengths": int32(4, 1)}

    def layouts(self, dtype):
        yield make_qkv(2, 37, 29, 48, dtype), {"heads": 2}
        yield make_qkv(2, 37, 29, 48, dtype), {"heads": 2, "lengths": int32(29, 8)}

    def test_gradcheck_in_float64(self, backend):
        super().test_gradcheck_in_float64()

    @pytest.mark.slow  # as those that operations share
    def test_compiles_once_for_all_lengths(self):
        function = lambda n, **t: attention(**t, heads=2, key_lengths=n)  # noqa: E731
        calls = [
            make_qkv(2, queries, keys, 16, FP32) | {"n": int32(2, keys)}
            for queries, keys in ((6, 5), (8, 12), (34, 7))
        ]
        check_compiled_once(function, calls)

    good = staticmethod(lambda: make_qkv(2, 4, 5, 8, FP32) | {"heads": 2})

    bad_arguments = [
        ({"q": torch.ones(4, 8)}, r"q is float32\[4, 8\].*\[B, Lq, D\]"),
        ({"k": torch.ones(2, 5, 12)}, r"k is float32\[2, 5, 12\].*\[2, Lk, 8\]"),
        ({"v": torch.ones(2, 6, 8)}, r"v is float32\[2, 6, 8\].*k's shape \[2, 5, 8\]"),
        ({"v": torch.ones(2, 5, 8).bfloat16()}, "v is bfloat16.*float32"),
        ({"k": torch.ones(2, 0, 8), "v": torch.ones(2, 0, 8)}, "k is .*at least one key"),
        ({"heads": 3}, "heads is 3.*divisor of D = 8"),
        ({"heads": 0}, "heads is 0.*divisor of D = 8"),
        ({"q": torch.ones(2, 8, 4).transpose(1, 2)}, "q is .*last"),
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
        (dict(extra_k=torch.ones(2, 3, 8), extra_v=torch.ones(2, 4, 8)), "extra_v is .*extra_k's"),
    ]


SHAPES = [
    # batch, Lq, Lk, D, heads
    (1, 1, 1, 8, 1), (2, 7, 5, 24, 2), (1, 1, 40, 32, 4), (2, 65, 33, 48, 2),
    (1, 130, 130, 256, 2), (1, 66, 512, 384, 3),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [*FLOATS, FP64])
def test_forward_and_gradients(shape, dtype):
    *sizes, heads = shape
    compare(make_qkv(*sizes, dtype), 32 if dtype == FP64 else 1, heads=heads)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_pytorch(shape, dtype):
    *sizes, heads = shape
    tensors = make_qkv(*sizes, dtype)
    assert torch.equal(attention(**tensors, heads=heads)[0], sdpa(**tensors, heads=heads))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64])
def test_log_sum_exp(dtype):
    tensors = make_qkv(2, 9, 21, 32, dtype)
    lse = attention(**tensors, heads=4, scale=0.3)[1]
    assert lse.dtype == (FP64 if dtype == FP64 else FP32)
    assert lse.shape == (2, 4, 9) and lse.is_contiguous()
    exact = exact_lse(tensors, 4, 0.3)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_second_key_set(dtype):
    first = make_qkv(2, 19, 12, 48, dtype)
    tensors = first | {f"extra_{n}": torch.randn(2, 5, 48).to(dtype) for n in "kv"}
    compare(tensors, heads=2)
    with torch.no_grad():
        out, lse = attention(**tensors, heads=2)
        assert torch.equal(out, summed(sdpa)(**tensors, heads=2))
        assert torch.equal(lse, attention(**first, heads=2)[1])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_slices_of_a_packed_projection(dtype):
    tensors, grad = {"qkv": torch.randn(2, 23, 3 * 36).to(dtype)}, torch.randn(2, 23, 36).to(dtype)
    compare(tensors, grad=grad, wrap=lambda f: lambda qkv: f(*qkv.chunk(3, dim=-1)), heads=3)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_plain_path(dtype, monkeypatch):
    """Run what stands in where PyTorch has no kernel, in several pieces of queries."""
    monkeypatch.setattr(module, "CHUNK", 2 * 2 * 17 * 4)
    kernels.set_attention_backend("plain")
    compare(make_qkv(2, 13, 17, 24, dtype), heads=2, scale=0.2)
    tensors = make_qkv(1, 9, 17, 24, dtype)
    out, lse = module.plain(**tensors, heads=2, scale=0.2, upcast=FP64)
    exact = softmax_attention(*(t.double() for t in tensors.values()), 2, 0.2)
    assert out.dtype == lse.dtype == FP64
    torch.testing.assert_close((out, lse), exact)


@pytest.mark.parametrize("lengths", [int32(1, 21), int32(21, 21), int32(13, 1)])
@pytest.mark.parametrize("dtype", [*FLOATS, FP64])
def test_key_lengths(dtype, lengths, backend):
    tensors, fixed = make_qkv(2, 9, 21, 48, dtype), {"heads": 3, "lengths": lengths}
    grad = torch.randn(2, 9, 48).to(dtype)
    compare(tensors, 32 if dtype == FP64 else 1, grad, **fixed)
    lse = attention(**tensors, heads=3, key_lengths=lengths)[1]
    close = 1e-5 if dtype.itemsize > 2 else 1e-4  # with a mask ATen's exp in 16 bits is coarser
    torch.testing.assert_close(lse.double(), exact_lse(tensors, **fixed), rtol=close, atol=close)
    assert_no_gradient_past(lengths, run(bind(ours, fixed), tensors, [grad])[1])


def test_what_lies_past_the_lengths_is_not_read(backend):
    tensors, lengths, grad = make_qkv(2, 9, 21, 48, FP32), int32(4, 20), torch.randn(2, 9, 48)
    function = bind(ours, {"heads": 3, "lengths": lengths})
    first = run(function, tensors, [grad])
    for b, n in enumerate(lengths.tolist()):
        tensors["k"][b, n:] = 7.0
        tensors["v"][b, n:] = -5.0
    second = run(function, tensors, [grad])
    assert torch.equal(first[0][0], second[0][0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in "qkv")


def test_a_sample_of_length_n_is_a_sample_of_n_keys(backend):
    tensors, lengths = make_qkv(3, 6, 12, 32, FP32), int32(1, 12, 5)
    out, lse = attention(**tensors, heads=2, key_lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = {"q": tensors["q"][b : b + 1]} | {t: tensors[t][b : b + 1, :n] for t in "kv"}
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), attention(**alone, heads=2))


def test_key_lengths_are_of_the_first_key_set():
    tensors, lengths = make_qkv(2, 9, 21, 48, FP32), int32(3, 9)
    extra = {f"extra_{n}": torch.randn(2, 30, 48) for n in "kv"}
    out, lse = attention(**tensors, **extra, heads=2, key_lengths=lengths)
    first = attention(**tensors, heads=2, key_lengths=lengths)
    second = attention(tensors["q"], *extra.values(), heads=2)[0]
    assert torch.equal(out, first[0] + second) and torch.equal(lse, first[1])


@pytest.mark.parametrize("sizes", [(0, 4, 5), (2, 0, 5), (1, 1, 1)])
def test_no_queries(sizes, backend):
    tensors = {n: t.requires_grad_() for n, t in make_qkv(*sizes, 16, FP32).items()}
    for lengths in (None, torch.ones(sizes[0], dtype=torch.int32)):
        out, lse = attention(**tensors, heads=2, key_lengths=lengths)
        assert out.shape == tensors["q"].shape and lse.shape == (sizes[0], 2, sizes[1])
        gradients = torch.autograd.grad(out.sum(), list(tensors.values()))
        for gradient, tensor in zip(gradients, tensors.values(), strict=True):
            assert gradient.shape == tensor.shape and gradient.isfinite().all()


def test_long_sequences_store_no_score_matrix():
    tensors = make_qkv(1, 2048, 2048, 64, FP32)
    kept = saved_by(bind(ours, {"heads": 2}), tensors)
    assert kept == 4 * 2048 * 64 * 4 + 2 * 2048 * 4  # q, k, v, out and lse
    run(bind(ours, {"heads": 2}), tensors, [torch.ones(1, 2048, 64)])


@pytest.mark.parametrize(
    "batch, tokens, heads, expected",
    [(1, 32760, 12, 12), (1, 75600, 40, 6), (1, 147600, 40, 3), (8, 10**6, 4, 1)],
)
def test_heads_of_a_call_of_the_backward(batch, tokens, heads, expected):
    q = torch.empty(batch, tokens, heads * 128, device="meta")
    assert module.heads_of_call(q, heads) == expected
    limited = 4 * batch * tokens * 128 * expected
    assert limited <= module.GROUP_BYTES or expected == 1


def test_no_gradient_through_the_log_sum_exp():
    tensors = {n: t.requires_grad_() for n, t in make_qkv(1, 6, 5, 16, FP32).items()}
    assert not attention(**tensors, heads=2)[1].requires_grad


@pytest.mark.parametrize("lengths", [None, int32(5, 48)])
def test_flops(lengths):
    """Count all keys: the lengths are known to the device alone."""
    tensors = {n: t.requires_grad_() for n, t in make_qkv(2, 32, 48, 64, FP32).items()}
    counter = FlopCounterMode(display=False)
    with counter:
        out = attention(**tensors, heads=4, key_lengths=lengths)[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 4 * 2 * 32 * 48 * 64
    assert counter.get_total_flops() - forward == 2.5 * forward


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_on_cuda(shape, dtype):
    *sizes, heads = shape
    tensors = make_qkv(*sizes, dtype, "cuda")
    compare(tensors, heads=heads)
    lse = attention(**tensors, heads=heads)[1]
    torch.testing.assert_close(lse.double(), exact_lse(tensors, heads), rtol=1e-3, atol=1e-3)


@property_test(backends=["cpu", "plain"], use=kernels.set_attention_backend)
def test_any_arguments(draw):
    batch, lq, lk = (draw(st.integers(1, n)) for n in (3, 20, 20))
    heads, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    dtype = draw(st.sampled_from(FLOATS))
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
        fixed["lengths"] = int32(*draw(numbers))
    layout = draw(st.sampled_from(["dense", "expanded", "transposed"]))
    grad = torch.randn_like(tensors["q"])
    if layout == "expanded":
        grad = grad[:, :1].expand_as(grad)
    elif layout == "transposed":
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    found = results(tensors, grad, **fixed)
    # A single key leaves the gradient of its query to the rounding of g · v, much larger than it.
    rounding = 32.0 if tensors["q"].dtype == FP32 else 4.0
    assert_within_twice(*(outputs[0] for outputs, _ in found), rounding=rounding)
    size = tensors["q"].double().norm() + tensors["k"].double().norm()
    for name in tensors:
        triple = [grads[name] for _, grads in found]
        if triple[2].abs().max() < 1e-12 * size:
            assert triple[0].abs().max() < 1e-2
        else:
            assert_within_twice(*triple, f"d_{name}", rounding)
