"""query_pool and merge_pooled: reference and Triton against plain PyTorch and attention."""

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_twice, errors
from op_checks import (
    check,
    check_compiled,
    check_deterministic,
    check_expanded_gradient,
    run,
    saved_bytes,
    wide,
)
from torch.utils.flop_counter import FlopCounterMode

import prfl_fast.kernels as kernels
from prfl_fast.kernels import merge_pooled, query_pool
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.query_pool")
HALF, BRAIN = torch.float16, torch.bfloat16


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def naive(x, queries):
    """Attention whose keys and values are the tokens, as one writes it."""
    scores = wide(x) @ wide(queries).t()
    weights = torch.softmax(scores, dim=1)
    return weights.transpose(1, 2) @ wide(x), torch.logsumexp(scores, dim=1)


def low(x, queries):
    """The same with the queries and the weights in x's dtype, as attention in 16 bits has them."""
    scores = x @ queries.to(x.dtype).t()
    weights = torch.softmax(scores, dim=1)
    pooled = weights.transpose(1, 2) @ x
    return pooled.to(wide(x).dtype), torch.logsumexp(scores, dim=1).to(wide(x).dtype)


def make(batch, tokens, dim, heads, dtype=torch.float32, queries=None):
    return {
        "x": torch.randn(batch, tokens, dim).to(dtype),
        "queries": (2 * torch.randn(heads, dim) / dim**0.5).to(queries or dtype),
    }


SHAPES = [
    (1, 1, 65, 1),
    (2, 17, 96, 8),
    (1, 257, 96, 3),
    (3, 65, 65, 8),
    (1, 17, 1536, 3),
    (2, 70, 64, 24),
    (1, 20, 7, 64),
    (1, 3, 1, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
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
    if backend == "triton" and dtype == HALF and not INTERPRETING:
        rounding = 2**14  # on a GPU the products of a 16-bit x are TF32: 2⁻¹¹ of a score's terms
    check(query_pool, naive, make(*shape, dtype, torch.float32), grads=grads, rounding=rounding)


def test_width_of_the_14b_model(backend):
    # √D half-ulps: as a random walk, the rounding of each partial sum of a score and of g·x. The
    # 34 scores are too few for the ratio of two errors to be near 1: it leaves up to 40 of them.
    check(query_pool, naive, make(1, 17, 5120, 2), rounding=5120**0.5)


@pytest.mark.parametrize("queries", [BRAIN, torch.float32])
@pytest.mark.parametrize("shape", [(2, 70, 96, 8), (1, 1, 64, 1)])
def test_bfloat16_is_as_good_as_attention_in_bfloat16(backend, shape, queries):
    # The interpreter truncates d_x where hardware rounds it.
    check(query_pool, low, make(*shape, BRAIN, queries), rounding=4)


def test_float64_is_computed_in_float64(backend):
    tensors = make(2, 33, 24, 4, torch.float64)
    out, grads = run(query_pool, tensors, [torch.ones(2, 4, 24), torch.ones(2, 4)])
    expected, expected_grads = run(naive, tensors, [torch.ones(2, 4, 24), torch.ones(2, 4)])
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_gradient_of_one_output(backend, used):
    tensors = make(2, 19, 32, 4)
    grads = [torch.randn(2, 4, 32) if used[0] else None, torch.randn(2, 4) if used[1] else None]
    check(query_pool, naive, tensors, grads=grads, rounding=4)


def test_large_scores_neither_overflow_nor_vanish(backend):
    tensors = make(1, 130, 64, 4)
    tensors["queries"] *= 100
    out, plain = query_pool(**tensors), naive(**tensors)
    oracle = naive(**{name: t.double() for name, t in tensors.items()})
    assert oracle[1].max() > 200
    for triple in zip(out, plain, oracle, strict=True):
        assert_within_twice(*triple, rounding=4)


def test_strided_tokens_and_batch(backend):
    def sliced(function):
        return lambda x, queries: function(x.transpose(0, 1)[..., 16:48], queries[:, ::2])

    tensors = {"x": torch.randn(21, 3, 96), "queries": torch.randn(5, 64) / 6}
    check(sliced(query_pool), sliced(naive), tensors, rounding=4)


def test_expanded_batch(backend):
    x, queries = make(1, 9, 32, 4).values()
    pooled, lse = query_pool(x.expand(3, 9, 32), queries)
    torch.testing.assert_close(pooled, query_pool(x, queries)[0].expand(3, 4, 32))
    assert lse.shape == (3, 4)


def test_same_bits_twice_and_for_any_gradient_layout(backend):
    tensors = make(2, 150, 40, 4)
    check_deterministic(query_pool, tensors)
    check_expanded_gradient(query_pool, tensors)


def test_inputs_stay_and_outputs_are_new(backend):
    tensors = make(2, 9, 32, 4)
    before = {name: t.clone() for name, t in tensors.items()}
    grads = [torch.randn(2, 4, 32), torch.randn(2, 4)]
    kept = [g.clone() for g in grads]
    run(query_pool, tensors, grads)
    assert all(torch.equal(before[name], t) for name, t in tensors.items())
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


@pytest.mark.parametrize("need_x, need_queries", [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(backend, monkeypatch, need_x, need_queries):
    seen = []
    original = module._op_backward
    tensors = make(2, 9, 32, 4)
    both = run(query_pool, tensors, [torch.ones(2, 4, 32), None])[1]
    x = tensors["x"].requires_grad_(need_x)
    queries = tensors["queries"].requires_grad_(need_queries)
    pooled, _ = query_pool(x, queries)
    monkeypatch.setattr(module, "_op_backward", lambda *args: seen.append(args) or original(*args))
    pooled.backward(torch.ones_like(pooled))
    assert seen[0][-2:] == (need_x, need_queries)
    sizes = [t.numel() for t in original(*seen[0])]
    assert sizes == [x.numel() * need_x, queries.numel() * need_queries]
    assert (x.grad is None) == (not need_x) and (queries.grad is None) == (not need_queries)
    given, name = (x.grad, "x") if need_x else (queries.grad, "queries")
    assert torch.equal(given, both[name])


def test_only_inputs_and_results_are_saved():
    x, queries = make(1, 1000, 64, 8, BRAIN, torch.float32).values()
    x.requires_grad_()
    small = 4 * (8 * 64 + 8 * 64 + 8)
    assert saved_bytes(lambda: query_pool(x, queries)) == 2 * x.numel() + small


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_multihead_attention(backend, dtype):
    """PRFL.md §7: fold, pool, then the value and output projections on H vectors, not on L."""
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


# Sequence shards.
def merged(sizes):
    def function(x, queries):
        parts = [query_pool(shard, queries) for shard in x.split(sizes, dim=1)]
        return merge_pooled(torch.stack([p for p, _ in parts]), torch.stack([s for _, s in parts]))

    return function


@pytest.mark.parametrize("sizes", [(37,), (1, 36), (5, 20, 12)])
def test_merged_shards_equal_the_whole(backend, sizes):
    check(merged(sizes), naive, make(2, 37, 48, 4), rounding=4)


def test_merging_an_empty_shard_changes_nothing():
    pooled, lse = query_pool(**make(2, 37, 48, 4))
    padded = torch.stack([pooled, torch.zeros_like(pooled)])
    weights = torch.stack([lse, torch.full_like(lse, float("-inf"))]).requires_grad_()
    out = merge_pooled(padded, weights)
    torch.testing.assert_close(out, (pooled, lse))
    (out[0].sum() + out[1].sum()).backward()
    assert torch.isfinite(weights.grad).all()


def test_merge_gradcheck():
    pooled = torch.randn(3, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merge_pooled, (pooled, lse))


# Registration.
def test_gradcheck_in_float64():
    tensors = make(2, 7, 5, 3, torch.float64)
    assert torch.autograd.gradcheck(query_pool, [t.requires_grad_() for t in tensors.values()])


def test_reference_is_an_oracle():
    tensors = make(2, 40, 32, 4, BRAIN)
    oracle = naive(**{name: t.double() for name, t in tensors.items()})
    pooled, lse = module.reference(**tensors, upcast=torch.float64)
    torch.testing.assert_close((pooled, lse), oracle, rtol=1e-12, atol=1e-12)
    grads = torch.randn(2, 4, 32), torch.randn(2, 4)
    _, expected = run(naive, tensors, grads, double=True)
    given = module.reference_backward(
        grads[0], grads[1], *tensors.values(), pooled, lse, True, True, upcast=torch.float64
    )
    for a, b in zip(given, expected.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_opcheck(backend):
    x, queries = make(2, 17, 24, 3).values()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        module._op, (x.requires_grad_(), queries.requires_grad_()), test_utils=tests
    )
    pooled, lse = (t.detach() for t in query_pool(x, queries))
    given = (torch.randn_like(pooled), torch.randn_like(lse), x.detach(), queries.detach())
    for flags in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(module._op_backward, (*given, pooled, lse, *flags), test_utils=tests)
    torch.library.opcheck(
        module._op_backward, (given[0], None, *given[2:], pooled, lse, True, True), test_utils=tests
    )


def test_opcheck_traced_with_dynamic_shapes():
    x, queries = make(2, 17, 24, 3).values()
    torch.library.opcheck(module._op, (x.requires_grad_(), queries.requires_grad_()))


def test_compiles_without_a_graph_break(backend):
    check_compiled(query_pool, make(2, 17, 32, 4))
    check_compiled(merged((9, 8)), make(2, 17, 32, 4))


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
@pytest.mark.parametrize("dtype", [torch.float32, BRAIN])
@pytest.mark.parametrize("heads", [1, 8, 16, 17, 64])
def test_launches_hold_every_head(heads, dtype):
    launch = module.launch_config(heads, dtype)
    assert launch == module.launch_config(heads, dtype) and hash(launch)
    assert heads <= launch.block_h <= max(16, 2 * heads)
    for size in (launch.block_t, launch.block_h, launch.block_d):
        assert size >= 16 and size & (size - 1) == 0
    assert launch.precision == ("ieee" if dtype == torch.float32 else "tf32")


@pytest.mark.triton
def test_offsets_past_int32(triton_backend, tmp_path):
    """Token 2 at 2·2³⁰ elements: 32 bits would read the zeros at the start of this sparse file."""
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 8 GiB")
    stride, dim = 2**30, 64
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * 2**32)
    storage = torch.from_file(str(path), shared=True, size=2**32, dtype=HALF)
    x = storage.as_strided((3, dim), (stride, 1), 2**31 - dim)
    values = torch.randn(3, dim).half()
    x.copy_(values)
    queries = torch.randn(4, dim) / 8
    for strided, dense in ((x[None], values[None]), (x[:, None], values[:, None])):
        out, expected = query_pool(strided, queries), query_pool(dense, queries)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        grads = (torch.ones_like(out[0]), torch.ones_like(out[1]))
        left = module._op_backward(*grads, strided, queries, *out, True, True)
        right = module._op_backward(*grads, dense, queries, *out, True, True)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.triton
def test_addresses_are_multiplied_in_64_bits():
    script = """
        import json
        from prfl_fast.kernels import _aot
        cases = _aot.operations()["query_pool"].aot_cases((9, 0))
        cases = [c for c in cases if "D=1536" in c.label or "merge" == c.label]
        print(json.dumps({c.label: _aot.compile_case(c, 90).asm["ttir"] for c in cases}))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for label, ttir in json.loads(done.stdout).items():
        widths = re.findall(r"arith\.muli [^:]+ : (\S+)", ttir)
        wide_ones = [w for w in widths if "i64" in w]
        assert len(wide_ones) > 3 and len(wide_ones) == len(widths), f"{label}: {widths}"


# Bad arguments.
def good():
    return make(2, 9, 16, 4)


BAD = {
    "x of two dimensions": ({"x": torch.zeros(9, 16)}, r"x is float32\[9, 16\] on cpu"),
    "no tokens": ({"x": torch.zeros(2, 0, 16)}, r"x is .*expected \[B, L, D\] without an empty"),
    "integer x": ({"x": torch.zeros(2, 9, 16, dtype=torch.int64)}, "x is int64.*floating-point"),
    "x is a list": ({"x": [1.0]}, "x is .*floating-point tensor"),
    "strided columns": ({"x": torch.zeros(2, 16, 9).mT}, "x is .*a last dimension of stride 1"),
    "queries of another width": ({"queries": torch.zeros(4, 15)}, r"queries .*expected \[H, 16\]"),
    "no queries": ({"queries": torch.zeros(0, 16)}, r"queries .*expected \[H, 16\]"),
    "batched queries": ({"queries": torch.zeros(1, 4, 16)}, r"queries .*expected \[H, 16\]"),
    "double queries": ({"queries": torch.zeros(4, 16).double()}, "queries .*expected float32 or"),
    "two devices": ({"queries": torch.zeros(4, 16, device="meta")}, "queries .*on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    changed, message = BAD[case]
    with pytest.raises(ValueError, match=f"query_pool: {message}"):
        query_pool(**{**good(), **changed})


BAD_SHARDS = {
    "pooled of three dimensions": ((torch.zeros(2, 4, 16), torch.zeros(2, 4)), r"pooled .*\[S, B"),
    "lse of one shard": ((torch.zeros(2, 2, 4, 16), torch.zeros(2, 4)), r"lse .*\[2, 2, 4\]"),
    "no shards": ((torch.zeros(0, 2, 4, 16), torch.zeros(0, 2, 4)), r"pooled .*\[S, B"),
    "two dtypes": ((torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4).double()), "lse .*dtype of"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_shards(case):
    arguments, message = BAD_SHARDS[case]
    with pytest.raises(ValueError, match=f"merge_pooled: {message}"):
        merge_pooled(*arguments)


# Property tests.
cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "shape": st.tuples(*(st.integers(1, most) for most in (3, 140, 100, 20))),
        "dtype": st.sampled_from([torch.float32, HALF]),
        "gain": st.sampled_from([0.0, 0.1, 1.0, 10.0]),
        "strided": st.booleans(),
    }
)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(cases)
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    torch.manual_seed(case["seed"])
    tensors = make(*case["shape"], case["dtype"], torch.float32)
    tensors["queries"] *= case["gain"]
    if case["strided"]:
        wider = torch.randn(*tensors["x"].shape[:2], tensors["x"].shape[2] + 5)
        tensors["x"] = wider.to(case["dtype"])[..., 2:-3]
    x, queries = tensors.values()
    grads = [torch.randn(len(x), len(queries), x.shape[2]), torch.randn(len(x), len(queries))]
    # A score s is known to s·ε, so a weight to s·ε of itself. In the Triton backward g·x - g·pooled
    # is known to ε·|g|·|x|, which is most of the error where it cancels: few tokens, one large p.
    largest = (x.double() @ queries.double().t()).abs().max().item()
    rounding = 32 + 4 * largest
    sharp = 4 * torch.finfo(torch.float32).eps * grads[0].norm(dim=2).max() * x.norm(dim=2).max()
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
