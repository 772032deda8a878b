"""query_pool: reference and Triton against plain PyTorch and attention."""

import re

import pytest
import torch
from compiled import compile_in_process
from cuda_cases import attention as low
from dtypes import BF16, FP16, FP32, FP64
from numerics import assert_within_twice, errors
from op_checks import check, check_compiled, run, saved_by
from op_tests import OperationTests
from plain_torch import wide
from properties import property_test, st
from torch.utils.flop_counter import FlopCounterMode

from prfl_fast.kernels import query_pool
from prfl_fast.kernels.attn import pool as module
from prfl_fast.kernels.runtime.triton import INTERPRETING


def naive(x, queries):
    """Return attention whose keys and values are the tokens, as one writes it."""
    scores = wide(x) @ wide(queries).t()
    weights = torch.softmax(scores, dim=1)
    return weights.transpose(1, 2) @ wide(x), torch.logsumexp(scores, dim=1)


def make(batch, tokens, dim, heads, dtype=FP32, queries=None):
    return {
        "x": torch.randn(batch, tokens, dim).to(dtype),
        "queries": (2 * torch.randn(heads, dim) / dim**0.5).to(queries or dtype),
    }


class TestQueryPool(OperationTests):
    op = "query_pool"
    function, naive, reference = query_pool, naive, module.reference
    flags = {"x": "+-", "queries": "-+"}

    def examples(self, dtype):
        yield make(2, 9, 8, 3, dtype), {}

    def layouts(self, dtype):
        yield make(2, 150, 40, 4), {}

    at_length = staticmethod(lambda length: make(2, length, 32, 4))
    good = staticmethod(lambda: make(2, 9, 16, 4))
    far = staticmethod(lambda shape: (make(*shape, 4, FP16, FP32), {}))

    @pytest.mark.gpu_smoke
    def test_bfloat16(self, smoke_backend):
        check(query_pool, low, make(2, 70, 96, 8, BF16), rounding=4)

    @pytest.mark.slow  # test_compiled_reference.py compiles it in the default tier
    def test_compiles_without_a_graph_break(self, backend):
        check_compiled(query_pool, make(2, 17, 32, 4))

    bad_arguments = [
        ({"x": torch.zeros(9, 16)}, r"x is float32\[9, 16\] on cpu"),
        ({"x": torch.zeros(2, 0, 16)}, r"x is .*expected \[B, L, D\] without an empty"),
        ({"x": [1.0]}, "x is .*floating-point tensor"),
        ({"x": torch.zeros(2, 16, 9).mT}, "x is .*a last dimension of stride 1"),
        ({"queries": torch.zeros(4, 15)}, r"queries .*expected \[H, 16\]"),
        ({"queries": torch.zeros(0, 16)}, r"queries is float32\[0, 16\].*expected \[H, 16\]"),
        ({"queries": torch.zeros(1, 4, 16)}, r"queries is .*4, 16\].*expected \[H, 16\]"),
        ({"queries": torch.zeros(4, 16).double()}, "queries .*expected float32 or"),
    ]


SHAPES = [
    (1, 1, 65, 1), (2, 17, 96, 8), (1, 257, 96, 3), (3, 65, 65, 8), (1, 17, 1536, 3),
    (2, 70, 64, 24), (1, 20, 7, 64), (1, 3, 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(backend, shape, dtype):
    # Few scores carry most of the error, so its ratio to plain PyTorch's scatters: in 40 draws of
    # each shape it is up to 7 half-ulps of the gradient past twice that.
    rounding, grads = 16, None
    if backend == "triton" and shape[1] == 1:
        # The Triton backward has g·pooled from the forward: g·x - g·pooled leaves the rounding of
        # both where plain PyTorch, with Σ p (g·x) instead, has an exact zero. One token shows it.
        # Partial sums of k products are √k large and rounded to half an ulp: 2·D half-ulps of 1 are
        # four standard deviations of the difference of two sums of D. d_queries is c·x, and 16
        # half-ulps of c are as much.
        batch, _, dim, heads = shape
        grads = [torch.randn(batch, heads, dim), torch.full((batch, heads), 2 * dim / rounding)]
    if backend == "triton" and dtype == FP16 and not INTERPRETING:
        rounding = 2**14  # on a GPU the products of a 16-bit x are TF32: 2⁻¹¹ of a score's terms
    check(query_pool, naive, make(*shape, dtype, FP32), grads=grads, rounding=rounding)


@pytest.mark.cases(8)
@pytest.mark.parametrize("scale", [0.1, 0.3, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_small_and_large_scores(shape, scale):
    """Scores of up to 60 standard deviations, where the rounding of a score shows in p."""
    for _ in range(4):
        tensors = make(*shape)
        tensors["queries"] *= scale
        check(query_pool, naive, tensors, rounding=16)


@pytest.mark.triton
def test_gradients_of_large_scores_in_triton(triton_device):
    """The backward undoes the rounding of lse, which would be a factor of all weights."""
    tensors = make(1, 70, 64, 8)
    tensors["queries"] *= 10
    check(query_pool, naive, tensors, rounding=16)


@pytest.mark.slow
def test_width_of_the_14b_model(backend):
    # √D half-ulps: as a random walk, the rounding of each partial sum of a score and of g·x. The
    # 34 scores are too few for the ratio of two errors to be near 1: it leaves up to 40 of them.
    check(query_pool, naive, make(1, 17, 5120, 2), rounding=5120**0.5)


@pytest.mark.parametrize("queries", [BF16, FP32])
@pytest.mark.parametrize("shape", [(2, 70, 96, 8), (1, 1, 64, 1)])
def test_bfloat16_is_as_good_as_attention_in_bfloat16(backend, shape, queries):
    # The interpreter truncates d_x where hardware rounds it.
    check(query_pool, low, make(*shape, BF16, queries), rounding=4)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(backend, used):
    grads = [torch.randn(2, 4, 32), torch.randn(2, 4)]
    grads[1 - used] = None
    check(query_pool, naive, make(2, 19, 32, 4), grads=grads, rounding=4)


def test_large_scores_neither_overflow_nor_vanish(backend):
    tensors = make(1, 130, 64, 4)
    tensors["queries"] *= 100
    out, plain = query_pool(**tensors), naive(**tensors)
    oracle = naive(**{name: t.double() for name, t in tensors.items()})
    assert oracle[1].max() > 200
    for triple in zip(out, plain, oracle, strict=True):
        assert_within_twice(*triple, rounding=4)


def test_strided_tokens_and_batch(backend):
    def slices(x, queries):
        return {"x": x.transpose(0, 1)[..., 16:48], "queries": queries[:, ::2]}

    tensors = {"x": torch.randn(21, 3, 96), "queries": torch.randn(5, 64) / 6}
    check(query_pool, naive, tensors, rounding=4, of=slices)


def test_expanded_batch(backend):
    x, queries = make(1, 9, 32, 4).values()
    pooled, lse = query_pool(x.expand(3, 9, 32), queries)
    torch.testing.assert_close(pooled, query_pool(x, queries)[0].expand(3, 4, 32))
    assert lse.shape == (3, 4)


def test_only_inputs_and_results_are_saved():
    tensors, small = make(1, 1000, 64, 8, BF16, FP32), 4 * (8 * 64 + 8 * 64 + 8)
    assert saved_by(query_pool, tensors, frozen=["queries"]) == tensors["x"].nbytes + small


@pytest.mark.parametrize("dtype", [FP32, FP64])
def test_equals_multihead_attention(backend, dtype):
    """Fold, pool, then project values and outputs of H vectors, not of L: PRFL.md §7."""
    dim, heads, tokens = 48, 4, 37
    attention = torch.nn.MultiheadAttention(dim, heads, batch_first=True, dtype=dtype)
    torch.nn.init.normal_(attention.in_proj_bias)
    x = torch.randn(2, tokens, dim, dtype=dtype)
    query = torch.randn(1, dim, dtype=dtype)
    expected, _ = attention(query.expand(2, 1, dim), x, x, need_weights=False)
    w_q, w_k, w_v = attention.in_proj_weight.view(3, dim, dim)
    b_q, _, b_v = attention.in_proj_bias.view(3, dim)
    q = (query @ w_q.t() + b_q).view(heads, -1) / (dim // heads) ** 0.5
    folded = torch.einsum("hc,hcd->hd", q, w_k.view(heads, -1, dim))
    pooled, _ = query_pool(x, folded)
    value = torch.einsum("bhd,hcd->bhc", pooled, w_v.view(heads, -1, dim)).flatten(1) + b_v
    out = attention.out_proj(value)[:, None]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)


def test_reference_backward_is_an_oracle():
    tensors = make(2, 40, 32, 4, BF16)
    pooled, lse = module.reference(**tensors, upcast=FP64)
    grads = torch.randn(2, 4, 32), torch.randn(2, 4)
    _, expected = run(naive, tensors, grads, double=True)
    args = (*grads, *tensors.values(), pooled, lse, True, True)
    given = module.reference_backward(*args, upcast=FP64)
    torch.testing.assert_close(given, tuple(expected.values()), rtol=1e-6, atol=1e-6)


def test_flops_are_counted():
    x, queries = make(2, 100, 32, 4).values()
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        query_pool(x, queries)[0].sum().backward()
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.prfl_fast.query_pool] == 4 * 2 * 100 * 32 * 4
    assert counted[torch.ops.prfl_fast.query_pool_backward] == 8 * 2 * 100 * 32 * 4


@pytest.mark.triton
def test_more_heads_than_a_tile_holds_fall_back(triton_backend):
    check(query_pool, naive, make(1, 20, 16, 65), rounding=4)


# Launch choices and 64-bit arithmetic.
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("heads", [1, 8, 16, 17, 64])
def test_launches_hold_every_head(heads, dtype):
    launch = module.launch_config(heads, dtype)
    assert launch == module.launch_config(heads, dtype) and hash(launch)
    assert heads <= launch.block_h <= max(16, 2 * heads)
    for size in (launch.block_t, launch.block_h, launch.block_d):
        assert size >= 16 and size & (size - 1) == 0
    assert launch.precision == ("ieee" if dtype == FP32 else "tf32")


@pytest.mark.slow
@pytest.mark.aot
def test_addresses_are_multiplied_in_64_bits():
    script = """
        import json
        import aot
        cases = aot.OPERATIONS["query_pool"]((9, 0), False)
        cases = [c for c in cases if "D=1536" in c.label or "merge" == c.label]
        print(json.dumps({c.label: aot.compile_case(c, 90).asm["ttir"] for c in cases}))
    """
    for label, ttir in compile_in_process(script).items():
        widths = re.findall(r"arith\.muli [^:]+ : (\S+)", ttir)
        wide_ones = [w for w in widths if "i64" in w]
        assert len(wide_ones) > 3 and len(wide_ones) == len(widths), f"{label}: {widths}"


# Property tests.
@property_test(examples=250)
def test_any_arguments(draw):
    batch, tokens, dim, heads = (draw(st.integers(1, most)) for most in (3, 140, 100, 20))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make(batch, tokens, dim + 5, heads, draw(st.sampled_from([FP32, FP16])), FP32)
    queries = tensors["queries"][:, :dim] * draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    x = tensors["x"][..., 2:-3]
    tensors = {"x": x if draw(st.booleans()) else x.contiguous(), "queries": queries}
    x, queries = tensors.values()
    grads = [torch.randn(len(x), len(queries), x.shape[2]), torch.randn(len(x), len(queries))]
    # A score s is known to s·ε, so a weight to s·ε of itself. In the Triton backward g·x - g·pooled
    # is known to ε·|g|·|x|, which is most of the error where it cancels: few tokens, one large p.
    largest = (x.double() @ queries.double().t()).abs().max().item()
    rounding = 32 + 4 * largest
    sharp = 4 * torch.finfo(FP32).eps * grads[0].norm(dim=2).max() * x.norm(dim=2).max()
    floor = {"x": sharp * queries.abs().max() * len(queries), "queries": sharp * x.abs().max()}
    out, out_grads = run(query_pool, tensors, grads)
    plain, plain_grads = run(naive, tensors, grads)
    oracle, oracle_grads = run(naive, tensors, grads, double=True)
    for triple in zip(out, plain, oracle, strict=True):
        assert_within_twice(*triple, rounding=rounding)
    for leaf, expected in oracle_grads.items():
        half_ulp = torch.finfo(out_grads[leaf].dtype).eps / 2
        allowed = 2 * errors(plain_grads[leaf], expected)[0] + floor[leaf].item() * len(x)
        allowed += rounding * half_ulp * expected.abs().max().item()
        assert errors(out_grads[leaf], expected)[0] <= allowed, leaf
