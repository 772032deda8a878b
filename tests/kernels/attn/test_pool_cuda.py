"""query_pool in CUDA C++ without a GPU: the source of the kernels, compiled for the CPU."""

import functools

import cuda_cases as cases
import cuda_on_cpu as emulated
import pytest
import torch
from cuda_cases import assert_all_within_twice, attention, make_pool, pool_backward, pool_gradients
from cuda_on_cpu import compile_kernel, needs_gxx
from dtypes import BF16, FP16
from op_checks import assert_same_bits
from properties import given, settings, st
from tiers import slow_except

from prfl_fast.kernels.runtime import cuda_launch

pytestmark = needs_gxx


@pytest.fixture(params=[BF16, FP16])
def dtype(request):
    return request.param


def check_backward(out, x, queries, grads):
    oracle = pool_gradients(x.double(), queries.double(), grads)
    assert_all_within_twice(out, pool_gradients(x, queries, grads), oracle)


POOL = {
    "one token, one head": ((1, 1, 64, 1), (8, 0), 1, (64, 4, 1, 1)),
    "batch, odd D, splits": ((2, 100, 88, 3), (8, 0), 2, (64, 4, 1, 2)),
    "1.3B, 17 tokens": ((1, 17, 1536, 8), (9, 0), 1, (256, 6, 1, 2)),
    "5B, a cluster of two": ((1, 49, 3072, 8), (9, 0), 1, (256, 6, 2, 1)),
    "the most columns of a block": ((1, 20, 2304, 8), (8, 0), 2, (256, 9, 1, 2)),
    "14B, a cluster of four": ((1, 40, 5120, 8), (9, 0), 2, (320, 4, 4, 1)),
    "three groups of heads": ((1, 130, 640, 19), (12, 0), 6, (128, 5, 1, 4)),
    "a cluster of eight": ((1, 18, 8192, 2), (10, 0), 1, (256, 4, 8, 1)),
}


@pytest.mark.cases(5)
@pytest.mark.parametrize("case", POOL)
def test_pool(device, case, dtype):
    shape, capability, multiprocessors, launch = POOL[case]
    launches, (x, queries) = device(capability, multiprocessors), make_pool(*shape, dtype)
    out = cuda_launch.query_pool(x, queries)
    assert launches == [launch]
    oracle = attention(x.double(), queries.double())
    assert_all_within_twice(out, attention(x, queries), oracle)
    # Scores take the queries as they are, so that lse is far better than that of 16-bit attention.
    assert (out[1] - oracle[1]).abs().max() <= 3e-5
    # And pooling with weights rounded to `dtype` is all that is lost of the pool.
    scale = torch.softmax(x.double() @ queries.double().t(), 1).transpose(1, 2) @ x.double().abs()
    assert ((out[0] - oracle[0]).abs() <= torch.finfo(dtype).eps * scale).all()


POOL_BACKWARD = {
    "one token, one head": ((1, 1, 64, 1), (8, 0), 1, (64, 4, 1, 1)),
    "batch, odd D, splits": ((2, 100, 88, 3), (8, 0), 2, (64, 4, 1, 2)),
    "1.3B": ((1, 17, 1536, 8), (8, 0), 2, (128, 12, 1, 2)),
    "1.3B, a cluster of two": ((1, 49, 1536, 8), (9, 0), 2, (128, 6, 2, 2)),
    "1024, one block": ((1, 33, 1024, 7), (9, 0), 1, (256, 4, 1, 2)),
    "14B, a cluster of eight": ((1, 40, 5120, 8), (9, 0), 4, (128, 5, 8, 1)),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("case", POOL_BACKWARD)
def test_pool_backward(device, case, dtype):
    shape, capability, multiprocessors, launch = POOL_BACKWARD[case]
    launches, (x, queries) = device(capability, multiprocessors), make_pool(*shape, dtype)
    grads = torch.randn(shape[0], shape[3], shape[2]), torch.randn(shape[0], shape[3])
    out = pool_backward(x, queries, grads)
    assert launches == [launch] and out[0].is_contiguous() and out[0].dtype == dtype
    check_backward(out, x, queries, grads)
    assert_same_bits(out, pool_backward(x, queries, grads))


def test_pool_forward_and_backward_belong_together(device):
    device((8, 0), 2)
    x, queries = make_pool(2, 70, 256, 8, BF16)
    grads = torch.randn(2, 8, 256), torch.randn(2, 8)
    given = (*grads, x, queries, *cuda_launch.query_pool(x, queries), True, True)
    check_backward(cuda_launch.query_pool_backward(*given), x, queries, grads)


@pytest.mark.parametrize("need_x, need_queries", [(True, False), (False, True)])
def test_pool_backward_writes_what_is_needed(device, need_x, need_queries):
    device((8, 0), 2)
    x, queries = make_pool(2, 40, 72, 5, FP16)
    grads = torch.randn(2, 5, 72), None
    both = pool_backward(x, queries.half(), grads)
    out = pool_backward(x, queries.half(), grads, need_x, need_queries)
    assert out[0].numel() == x.numel() * need_x and out[1].numel() == queries.numel() * need_queries
    assert torch.equal(out[need_queries], both[need_queries]) and both[1].dtype == FP16
    check_backward(both, x, queries.half(), grads)


def test_pool_backward_takes_the_smallest_gradients(launches):
    """Powers of two pass through: fp16 would lose d_queries of gradients as small as a loss's."""
    x, queries = make_pool(1, 50, 64, 4, FP16)
    grads = torch.randn(1, 4, 64), torch.randn(1, 4)
    _, d_queries = pool_backward(x, queries, grads)
    _, small = pool_backward(x, queries, [g * 2**-40 for g in grads])
    torch.testing.assert_close(small * 2**40, d_queries, rtol=1e-4, atol=1e-5)


def backward_arguments(x, queries):
    """Return the backward operator's grad, lse, delta, x, queries and flags."""
    pooled, lse = attention(x.double(), queries.double())
    grad = torch.randn_like(pooled)
    delta = (grad * pooled).sum(-1)
    return (*(t.float() for t in (grad, lse, delta)), x, queries, True, True)


ORDERED = [
    ("query_pool", (2, 70, 96, 9), (64, 4, 1, 2)),
    ("query_pool", (1, 40, 1280, 8), (320, 4, 1, 1)),
    ("query_pool", (1, 50, 1000, 8), (64, 4, 4, 2)),
    ("query_pool_backward", (2, 70, 96, 8), (64, 4, 1, 2)),
    ("query_pool_backward", (1, 50, 1000, 8), (64, 4, 4, 2)),
    ("query_pool_backward", (1, 40, 640, 6), (128, 5, 1, 1)),
]


@pytest.mark.parametrize("name, shape, launch", ORDERED)
def test_the_order_of_threads_does_not_matter(libraries, name, shape, launch):
    given = make_pool(*shape, BF16)
    given = backward_arguments(*given) if "backward" in name else given
    run = functools.partial(getattr(emulated, name), libraries(name), *given, *launch)
    first = run()
    for order in range(1, 5):
        assert_same_bits(first, run(order=order))


# (kernel, text of its source, place among its equals, replacement, cluster)
BARRIERS = {
    "scores": ("query_pool", "      __syncthreads();\n", 0, "", 1),
    "scores of a cluster": ("query_pool", "      cluster_sync();\n", 0, "", 2),
    "weights": ("query_pool", "__syncthreads_or(moved)", 0, "moved", 1),
    "two sets of scores": ("query_pool", "((parity * cluster + rank)", 0, "(rank", 2),
    "backward, scores": ("query_pool_backward", "    __syncthreads();\n", 0, "", 1),
    "backward, weights": ("query_pool_backward", "    __syncthreads();\n", 1, "", 1),
    "backward, cluster": ("query_pool_backward", "      cluster_sync();\n", 0, "", 2),
    "backward, two sets": ("query_pool_backward", "(tile - tile_begin) & 1", 0, "0", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except(BARRIERS, ("scores", "backward, two sets")))
def test_the_emulation_notices_a_missing_barrier(tmp_path, case):
    name, before, place, after, cluster = BARRIERS[case]
    library = compile_kernel(name, tmp_path, (before, after, place))
    backward = "backward" in name
    x, queries = make_pool(1, 90, 256 * (cluster if backward else 1), 8, BF16)
    if backward:
        given = backward_arguments(x, queries)
        expected = pool_gradients(x.double(), queries.double(), (given[0], None))
    else:
        x[:, :45] *= 0.1  # so that the maximum moves on the way
        given, expected = (x, queries), attention(x.double(), queries.double())[:1]
    run = functools.partial(getattr(emulated, name), library, *given, 64, 4, cluster, 1)
    results = [run(order=order) for order in range(5)]
    cases.assert_notices(
        [(r[0], r[1].sum((0, 1))) if backward else r[:1] for r in results], expected
    )


def test_extreme_scores(launches):
    """One token takes all, first or last; and scores of the same size everywhere."""
    x, queries = make_pool(1, 60, 64, 2, FP16)
    for place in (0, 59):
        spiked = x.clone()
        spiked[:, place] = queries.half()[0] * 40
        pooled, lse = cuda_launch.query_pool(spiked, queries)
        expected = attention(spiked.double(), queries.double())
        torch.testing.assert_close(pooled.double(), expected[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
        grads = torch.randn(1, 2, 64), torch.randn(1, 2)
        out = pool_backward(spiked, queries, grads)
        oracle = pool_gradients(spiked.double(), queries.double(), grads)
        for a, b in zip(out, oracle, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)
    pooled, _ = cuda_launch.query_pool(x, torch.zeros(2, 64))
    torch.testing.assert_close(pooled[0, 0], x[0].float().mean(0), rtol=1e-5, atol=1e-5)


def test_a_nan_in_x_is_a_nan_in_the_pool(launches):
    x, queries = make_pool(1, 40, 64, 2, BF16)
    x[0, 7, 3] = float("nan")
    pooled, lse = cuda_launch.query_pool(x, queries)
    assert pooled.isnan().all() and lse.isnan().all()
    grads = torch.ones(1, 2, 64), torch.ones(1, 2)
    d_x, d_queries = cuda_launch.query_pool_backward(*grads, x, queries, pooled, lse, True, True)
    assert d_x.isnan().all() and d_queries.isnan().all()


STRIDED = {
    "columns": lambda x: x[..., 8:72],
    "tokens first": lambda x: x.transpose(0, 1)[..., :64],
    "every other token": lambda x: x[:1, ::2],
}


@pytest.mark.parametrize("view", STRIDED)
def test_strided_tokens_in_the_pool(launches, view):
    x = STRIDED[view](torch.randn(20, 19, 80).to(BF16))
    queries = torch.randn(4, x.shape[2]) / 4
    grads = torch.randn(4, x.shape[2], len(x)).permute(2, 0, 1), torch.randn(()).expand(len(x), 4)
    both = x, x.contiguous()
    assert_same_bits(*(cuda_launch.query_pool(t, queries) for t in both))
    assert_same_bits(*(pool_backward(t, queries, grads) for t in both))
    assert len(launches) == 4


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 90, 40, 8))),
    dtype=st.sampled_from([BF16, FP16]),
    gain=st.sampled_from([0.0, 0.1, 1.0]),
    multiprocessors=st.integers(1, 6),
    capability=st.sampled_from([(8, 0), (9, 0)]),
    given_lse=st.booleans(),
)
def test_any_pool(libraries, seed, shape, dtype, gain, multiprocessors, capability, given_lse):
    torch.manual_seed(seed)
    batch, tokens, eighths, heads = shape
    x, queries = make_pool(batch, tokens, 8 * eighths, heads, dtype)
    queries *= gain
    grads = torch.randn(batch, heads, 8 * eighths), torch.randn(batch, heads) if given_lse else None
    with pytest.MonkeyPatch.context() as patch:
        assert not cases.install(patch, libraries, capability, multiprocessors)
        outputs, gradients = cuda_launch.query_pool(x, queries), pool_backward(x, queries, grads)
    wide = x.double(), queries.double()
    exact = attention(*wide)
    assert_all_within_twice(outputs, attention(x, queries), exact, rounding=2, dtype=dtype)
    plain, oracle = pool_gradients(x, queries, grads), pool_gradients(*wide, grads)
    # Where one token's weight is near one its score's gradient is a difference near zero, known to
    # the rounding of g · x and g · pooled; so for the sums of such.
    largest = x.double().norm(dim=2).max() * grads[0].norm(dim=2).max() * 2.0**-19
    floors = largest * queries.abs().max() * heads, largest * x.double().abs().max() * batch
    for i, floor in enumerate(floors):
        error = (gradients[i] - oracle[i]).abs().max()
        allowed = 2 * (plain[i] - oracle[i]).abs().max() + floor
        assert error <= allowed + 2 * torch.finfo(dtype).eps * oracle[i].abs().max()
