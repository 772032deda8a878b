"""The CUDA C++ kernels without a GPU: their very source on the CPU, and the launch choices."""

import ctypes
import functools
import math
from types import SimpleNamespace

import cuda_on_cpu as emulated
import pytest
import torch
from cuda_on_cpu import compile_kernel, needs_gxx
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_twice

from prfl_fast.kernels import _cuda, rope_table
from prfl_fast.kernels._registry import OPERATIONS

HALF, BRAIN = torch.float16, torch.bfloat16
SOURCES = ("query_pool", "query_pool_backward", "qk_norm_rope")
OPS = {**{name: name for name in SOURCES}, "qk_norm_rope_backward": "qk_norm_rope"}
EPS = 1e-6
BARRIER = "    if (rotates || whole) __syncthreads();\n"
FIRST = "__syncthreads();\n  }\n  int parity"


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    """The emulated kernels by name, each compiled when it is first asked for."""
    folder = tmp_path_factory.mktemp("emulation")
    return functools.cache(lambda name: compile_kernel(name, folder))


def install(patch, libraries, capability, processors, order=0):
    """``torch.ops.prfl_fast_cuda`` from the emulation; the list that launches are noted in."""
    launches = []

    def operator(name):
        def run(*arguments):
            launches.append(arguments[-3:] if "rope" in name else arguments[-4:])
            return getattr(emulated, name)(libraries(OPS[name]), *arguments, order=order)

        return run

    patch.setattr(_cuda, "capability", lambda device: capability)
    patch.setattr(_cuda, "processors", lambda capability: processors)
    namespace = SimpleNamespace(**{name: operator(name) for name in OPS})
    patch.setattr(torch.ops, "prfl_fast_cuda", namespace, raising=False)
    return launches


@pytest.fixture
def device(libraries, monkeypatch):
    """``device(capability, processors)`` makes CPU tensors run as if on such a device."""
    return functools.partial(install, monkeypatch, libraries)


def within(x):
    """``x`` with NaN on all sides, so that what is read out of bounds shows."""
    wide = torch.full((*x.shape[:1], x.shape[1] + 2, x.shape[2] + 16), float("nan")).to(x.dtype)
    wide[:, 1:-1, 8:-8] = x
    return wide[:, 1:-1, 8:-8]


def assert_all_equal(left, right):
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_notices(outcomes, expected):
    """Not every order of threads gives the right result, to a fiftieth of its largest value."""
    errors = [
        [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(out, expected, strict=True)]
        for out in outcomes
    ]
    assert not all(error < 0.02 for out in errors for error in out), errors


# query_pool.
def attention(x, queries):
    """What attention in 16 bits computes: scores, weights and sums rounded to x's dtype."""
    scores = x @ queries.to(x.dtype).t()
    pooled = torch.softmax(scores, dim=1).transpose(1, 2) @ x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return pooled.to(wide), torch.logsumexp(scores, dim=1).to(wide)


def make_pool(batch, tokens, dim, heads, dtype):
    x = torch.randn(batch, tokens, dim).to(dtype)
    return within(x), 3 * torch.randn(heads, dim) / dim**0.5


POOL = {
    "one token, one head": ((1, 1, 64, 1), (8, 0), 1, (64, 4, 1, 1)),
    "batch, odd D, splits": ((2, 100, 88, 3), (8, 0), 2, (64, 4, 1, 2)),
    "1.3B, 17 tokens": ((1, 17, 1536, 8), (9, 0), 1, (256, 6, 1, 2)),
    "5B, a cluster of two": ((1, 49, 3072, 8), (9, 0), 1, (256, 6, 2, 1)),
    "5B, no clusters": ((1, 20, 3072, 8), (8, 0), 1, (256, 12, 1, 2)),
    "14B, a cluster of four": ((1, 40, 5120, 8), (9, 0), 2, (320, 4, 4, 1)),
    "three groups of heads": ((1, 130, 640, 19), (12, 0), 6, (128, 5, 1, 4)),
    "a cluster of eight": ((1, 18, 8192, 2), (10, 0), 1, (256, 4, 8, 1)),
}


@needs_gxx
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("case", POOL)
def test_pool(device, case, dtype):
    shape, capability, processors, launch = POOL[case]
    launches = device(capability, processors)
    x, queries = make_pool(*shape, dtype)
    out = _cuda.query_pool(x, queries)
    assert launches == [launch]
    oracle = attention(x.double(), queries.double())
    for triple in zip(out, attention(x, queries), oracle, strict=True):
        assert_within_twice(*triple)
    # Scores take the queries as they are, so that lse is far better than that of 16-bit attention.
    assert (out[1] - oracle[1]).abs().max() <= 3e-5
    # And pooling with weights rounded to `dtype` is all that is lost of the pool.
    scale = torch.softmax(x.double() @ queries.double().t(), 1).transpose(1, 2) @ x.double().abs()
    assert ((out[0] - oracle[0]).abs() <= torch.finfo(dtype).eps * scale).all()


def pool_gradients(x, queries, grads):
    """d_x and d_queries of :func:`attention`; without the second gradient if that is None."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, queries)]
    pairs = [(o, g.to(o.dtype)) for o, g in zip(attention(*leaves), grads, strict=True)
             if g is not None]  # fmt: skip
    return torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])


def pool_backward(x, queries, grads, need_x=True, need_queries=True):
    """The kernel's backward from the exact pooled and lse, as their forward would round them."""
    exact = attention(x.double(), queries.double())
    pooled, lse = (t.to(torch.float32) for t in exact)
    return _cuda.query_pool_backward(*grads, x, queries, pooled, lse, need_x, need_queries)


POOL_BACKWARD = {
    "one token, one head": ((1, 1, 64, 1), (8, 0), 1, (64, 4, 1, 1)),
    "batch, odd D, splits": ((2, 100, 88, 3), (8, 0), 2, (64, 4, 1, 2)),
    "1.3B": ((1, 17, 1536, 8), (8, 0), 2, (128, 12, 1, 2)),
    "1.3B, a cluster of two": ((1, 49, 1536, 8), (9, 0), 2, (128, 6, 2, 2)),
    "2048, one block": ((1, 33, 2048, 7), (8, 0), 1, (256, 8, 1, 1)),
    "14B, a cluster of eight": ((1, 40, 5120, 8), (9, 0), 4, (128, 5, 8, 1)),
}


@needs_gxx
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("case", POOL_BACKWARD)
def test_pool_backward(device, case, dtype):
    shape, capability, processors, launch = POOL_BACKWARD[case]
    launches = device(capability, processors)
    x, queries = make_pool(*shape, dtype)
    grads = torch.randn(shape[0], shape[3], shape[2]), torch.randn(shape[0], shape[3])
    out = pool_backward(x, queries, grads)
    assert launches == [launch] and out[0].is_contiguous() and out[0].dtype == dtype
    oracle = pool_gradients(x.double(), queries.double(), grads)
    for triple in zip(out, pool_gradients(x, queries, grads), oracle, strict=True):
        assert_within_twice(*triple)
    again = pool_backward(x, queries, grads)
    assert_all_equal(out, again)


@needs_gxx
def test_pool_forward_and_backward_belong_together(device):
    device((8, 0), 2)
    x, queries = make_pool(2, 70, 256, 8, BRAIN)
    grads = torch.randn(2, 8, 256), torch.randn(2, 8)
    given = (*grads, x, queries, *_cuda.query_pool(x, queries), True, True)
    out, oracle = (
        _cuda.query_pool_backward(*given),
        pool_gradients(x.double(), queries.double(), grads),
    )
    for triple in zip(out, pool_gradients(x, queries, grads), oracle, strict=True):
        assert_within_twice(*triple)


@needs_gxx
@pytest.mark.parametrize("need_x, need_queries", [(True, False), (False, True)])
def test_pool_backward_writes_what_is_needed(device, need_x, need_queries):
    device((8, 0), 2)
    x, queries = make_pool(2, 40, 72, 5, HALF)
    grads = torch.randn(2, 5, 72), None
    both = pool_backward(x, queries.half(), grads)
    out = pool_backward(x, queries.half(), grads, need_x, need_queries)
    assert out[0].numel() == x.numel() * need_x and out[1].numel() == queries.numel() * need_queries
    assert torch.equal(out[need_queries], both[need_queries]) and both[1].dtype == HALF
    oracle = pool_gradients(x.double(), queries.half().double(), grads)
    for triple in zip(both, pool_gradients(x, queries.half(), grads), oracle, strict=True):
        assert_within_twice(*triple)


@needs_gxx
def test_pool_backward_takes_the_smallest_gradients(device):
    """Powers of two pass through: fp16 would lose d_queries of gradients as small as a loss's."""
    device((8, 0), 1)
    x, queries = make_pool(1, 50, 64, 4, HALF)
    grads = torch.randn(1, 4, 64), torch.randn(1, 4)
    _, d_queries = pool_backward(x, queries, grads)
    _, small = pool_backward(x, queries, [g * 2**-40 for g in grads])
    torch.testing.assert_close(small * 2**40, d_queries, rtol=1e-4, atol=1e-5)


@needs_gxx
@pytest.mark.parametrize("shape, launch", [
    ((2, 70, 96, 9), (64, 4, 1, 2)),
    ((1, 40, 1280, 8), (320, 4, 1, 1)),
    ((1, 50, 1000, 8), (64, 4, 4, 2)),
])  # fmt: skip
def test_pool_does_not_depend_on_the_order_of_threads(libraries, shape, launch):
    run = functools.partial(emulated.query_pool, libraries("query_pool"))
    x, queries = make_pool(*shape, BRAIN)
    first = run(x, queries, *launch)
    for order in range(1, 5):
        assert_all_equal(first, run(x, queries, *launch, order=order))


@needs_gxx
@pytest.mark.parametrize("shape, launch", [
    ((2, 70, 96, 8), (64, 4, 1, 2)),
    ((1, 50, 1000, 8), (64, 4, 4, 2)),
    ((1, 40, 640, 6), (128, 5, 1, 1)),
])  # fmt: skip
def test_pool_backward_does_not_depend_on_the_order_of_threads(libraries, shape, launch):
    run = functools.partial(emulated.query_pool_backward, libraries("query_pool_backward"))
    given = pool_arguments(*make_pool(*shape, BRAIN))
    first = run(*given, *launch)
    for order in range(1, 5):
        assert_all_equal(first, run(*given, *launch, order=order))


def pool_arguments(x, queries):
    """Of the backward's operator: grad, lse, delta, x, queries and the flags."""
    pooled, lse = attention(x.double(), queries.double())
    grad = torch.randn_like(pooled)
    delta = (grad * pooled).sum(-1)
    return (*(t.float() for t in (grad, lse, delta)), x, queries, True, True)


@needs_gxx
@pytest.mark.parametrize(
    "before, after, cluster",
    [
        ("      __syncthreads();\n", "", 1),
        pytest.param("      cluster_sync();\n", "", 2, marks=pytest.mark.slow),
        pytest.param("__syncthreads_or(moved)", "moved", 1, marks=pytest.mark.slow),
        pytest.param("((parity * cluster + rank)", "(rank", 2, marks=pytest.mark.slow),
    ],
    ids=["scores", "scores of a cluster", "weights", "two sets of scores"],
)
def test_the_emulation_notices_a_missing_barrier_of_pool(tmp_path, before, after, cluster):
    library = compile_kernel("query_pool", tmp_path, (before, after, 0))
    x, queries = make_pool(1, 90, 256, 8, BRAIN)
    x[:, :45] *= 0.1  # so that the maximum moves on the way
    run = functools.partial(emulated.query_pool, library, x, queries, 64, 4, cluster, 1)
    expected = attention(x.double(), queries.double())[:1]
    assert_notices([run(order=order)[:1] for order in range(5)], expected)


@needs_gxx
@pytest.mark.parametrize(
    "before, place, after, cluster",
    [
        pytest.param("    __syncthreads();\n", 0, "", 1, marks=pytest.mark.slow),
        pytest.param("    __syncthreads();\n", 1, "", 1, marks=pytest.mark.slow),
        pytest.param("      cluster_sync();\n", 0, "", 2, marks=pytest.mark.slow),
        ("(tile - tile_begin) & 1", 0, "0", 2),
    ],
    ids=["scores", "weights", "scores of a cluster", "two sets of scores"],
)
def test_the_emulation_notices_a_missing_barrier_of_pool_backward(
    tmp_path, before, place, after, cluster
):
    library = compile_kernel("query_pool_backward", tmp_path, (before, after, place))
    x, queries = make_pool(1, 90, 256 * cluster, 8, BRAIN)
    given = pool_arguments(x, queries)
    expected = pool_gradients(x.double(), queries.double(), (given[0], None))
    run = functools.partial(emulated.query_pool_backward, library, *given, 64, 4, cluster, 1)
    outcomes = []
    for order in range(5):
        d_x, partials = run(order=order)
        outcomes.append((d_x, partials.sum((0, 1))))
    assert_notices(outcomes, expected)


@needs_gxx
def test_extreme_scores(device):
    """One token takes all, first or last; and scores of the same size everywhere."""
    device((8, 0), 1)
    x, queries = make_pool(1, 60, 64, 2, HALF)
    for place in (0, 59):
        spiked = x.clone()
        spiked[:, place] = queries.half()[0] * 40
        pooled, lse = _cuda.query_pool(spiked, queries)
        expected = attention(spiked.double(), queries.double())
        torch.testing.assert_close(pooled.double(), expected[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-5)
        grads = torch.randn(1, 2, 64), torch.randn(1, 2)
        out = pool_backward(spiked, queries, grads)
        oracle = pool_gradients(spiked.double(), queries.double(), grads)
        for a, b in zip(out, oracle, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-2, atol=2e-2)
    pooled, _ = _cuda.query_pool(x, torch.zeros(2, 64))
    torch.testing.assert_close(pooled[0, 0], x[0].float().mean(0), rtol=1e-5, atol=1e-5)


@needs_gxx
def test_a_nan_in_x_is_a_nan_in_the_pool(device):
    device((8, 0), 1)
    x, queries = make_pool(1, 40, 64, 2, BRAIN)
    x[0, 7, 3] = float("nan")
    pooled, lse = _cuda.query_pool(x, queries)
    assert pooled.isnan().all() and lse.isnan().all()
    grads = torch.ones(1, 2, 64), torch.ones(1, 2)
    d_x, d_queries = _cuda.query_pool_backward(*grads, x, queries, pooled, lse, True, True)
    assert d_x.isnan().all() and d_queries.isnan().all()


STRIDED = {
    "columns": lambda x: x[..., 8:72],
    "tokens first": lambda x: x.transpose(0, 1)[..., :64],
    "every other token": lambda x: x[:1, ::2],
}


@needs_gxx
@pytest.mark.parametrize("view", STRIDED)
def test_strided_tokens_in_the_pool(device, view):
    launches = device((8, 0), 1)
    x = STRIDED[view](torch.randn(20, 19, 80).to(BRAIN))
    queries = torch.randn(4, x.shape[2]) / 4
    grads = torch.randn(4, x.shape[2], len(x)).permute(2, 0, 1), torch.randn(()).expand(len(x), 4)
    out, dense = _cuda.query_pool(x, queries), _cuda.query_pool(x.contiguous(), queries)
    assert_all_equal(out, dense)
    gradients = [pool_backward(t, queries, grads) for t in (x, x.contiguous())]
    assert_all_equal(*gradients)
    assert len(launches) == 4


# qk_norm_rope.
def angles(grid, offset, head_dim):
    """float64 ``[L, d/2]`` from the definition."""
    pairs = head_dim // 2
    third = pairs // 3
    places = torch.cartesian_prod(
        *(torch.arange(o, o + n, dtype=torch.float64) for n, o in zip(grid, offset, strict=True))
    )
    columns = []
    for axis, n in enumerate((pairs - 2 * third, third, third)):
        powers = torch.arange(n, dtype=torch.float64) / max(n, 1)
        columns.append(places[:, axis, None] * 10000.0**-powers)
    return torch.cat(columns, 1)


def naive_one(x, weight, heads, phi, per_head):
    """RMSNorm and rotation the way models write them: rounded in between, float32 inside."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weight is not None:
        groups = (x.unflatten(-1, (heads, -1)) if per_head else x).to(wide)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + EPS)
        x = (normed * weight.to(wide)).reshape(x.shape).to(x.dtype)
    if phi is not None:
        cos, sin = (t.float().to(wide)[:, None] for t in (phi.cos(), phi.sin()))
        even, odd = x.to(wide).unflatten(-1, (heads, -1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        x = turned.flatten(-3).to(x.dtype)
    return x


class Rope:
    """One call: tensors by name, what they are turned by, gradients that come in."""

    def __init__(
        self, batch, lengths, heads, head_dim, dtype, *, grid=None, offset=(0, 0, 0),
        weights=(torch.float32, torch.float32), per_head=False, needed=(True,) * 4,
    ):  # fmt: skip
        self.heads, self.per_head, self.grid, self.offset = heads, per_head, grid, offset
        dim = heads * head_dim
        if grid is not None:
            lengths = (math.prod(grid),) * 2
        self.tensors = [within(torch.randn(batch, n, dim).to(dtype)) for n in lengths]
        size = head_dim if per_head else dim
        for weight in weights:
            made = None if weight is None else (1 + 0.2 * torch.randn(size)).to(weight)
            self.tensors.append(made)
        self.grads = [within(torch.randn(batch, n, dim).to(dtype)) for n in lengths]
        self.needed = [n and t is not None for n, t in zip(needed, self.tensors, strict=True)]
        positions = max(n + o for n, o in zip(grid or (0,) * 3, offset, strict=True))
        self.tables = (None, None) if grid is None else rope_table(positions, head_dim)

    def numbers(self):
        axes = ([], []) if self.grid is None else (list(self.grid), list(self.offset))
        return *self.tables, *axes, self.heads, self.per_head, EPS

    def naive(self, double=False):
        """Outputs and gradients of plain PyTorch."""
        kept = [None if t is None else t.detach().clone() for t in self.tensors]
        leaves = [t if t is None or not double else t.double() for t in kept]
        q, k, q_weight, k_weight = (t if t is None else t.requires_grad_() for t in leaves)
        phi = None
        if self.grid is not None:
            phi = angles(self.grid, self.offset, q.shape[2] // self.heads)
        outputs = [naive_one(x, w, self.heads, phi, self.per_head)
                   for x, w in ((q, q_weight), (k, k_weight))]  # fmt: skip
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, self.grads, strict=True)
                 if g is not None]  # fmt: skip
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return outputs, [None if t is None else t.grad for t in (q, k, q_weight, k_weight)]

    def forward(self):
        return _cuda.qk_norm_rope(*self.tensors, *self.numbers())

    def backward(self):
        q, k, q_weight, k_weight = self.tensors
        kept = [x if w is not None else None for x, w in ((q, q_weight), (k, k_weight))]
        given = (*self.grads, *kept, q_weight, k_weight, *self.numbers())
        return _cuda.qk_norm_rope_backward(*given, self.needed)

    def check(self, rounding=1.0):
        outputs, gradients = self.forward(), self.backward()
        plain, oracle = self.naive(), self.naive(double=True)
        for i, triple in enumerate(zip(outputs, plain[0], oracle[0], strict=True)):
            assert_within_twice(*triple, name=f"output {i}", rounding=rounding)
            assert outputs[i].is_contiguous()
        came = [self.needed[i] and self.grads[i % 2] is not None for i in range(4)]
        for i, (gradient, need) in enumerate(zip(gradients, came, strict=True)):
            assert gradient.numel() == (self.tensors[i].numel() if need else 0)
            if need:
                triple = gradient, plain[1][i], oracle[1][i]
                assert_within_twice(*triple, name=f"gradient {i}", rounding=rounding)
        assert_all_equal(gradients, self.backward())


ROPE = {
    "one row": dict(args=(1, None, 1, 64), grid=(1, 1, 1)),
    "odd D, shard": dict(args=(2, None, 3, 24), grid=(2, 3, 3), offset=(4, 1, 2)),
    "1.3B": dict(args=(1, None, 12, 128), grid=(2, 2, 3)),
    "14B": dict(args=(1, None, 40, 128), grid=(1, 2, 3), offset=(3, 0, 0)),
    "cross-attention": dict(args=(2, (7, 3), 12, 128)),
    "cross-attention, not a power of two": dict(args=(1, (3, 11), 1, 1000)),
    "one side normalised": dict(
        args=(1, None, 6, 40), grid=(1, 4, 2), weights=(None, torch.float32)
    ),
    "rotation": dict(args=(2, None, 4, 72), grid=(3, 1, 5), weights=(None, None)),
    "per head": dict(args=(2, None, 5, 64), grid=(1, 3, 4), per_head=True),
    "per head, norm": dict(args=(1, (9, 4), 12, 128), per_head=True),
    "per head, one row": dict(args=(1, (1, 1), 3, 8), per_head=True),
    "8192": dict(args=(1, None, 64, 128), grid=(1, 1, 3)),
}


def rope(case, dtype, **changes):
    options = {**ROPE[case], **changes}
    return Rope(*options.pop("args"), dtype, **options)


@needs_gxx
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize("case", ROPE)
def test_rope(device, case, dtype):
    launches = device((9, 0), 1)
    rope(case, dtype).check()
    assert len(launches) == 3


@needs_gxx
@pytest.mark.parametrize("weight", [BRAIN, HALF])
def test_rope_weights_of_any_dtype(device, weight):
    device((8, 0), 1)
    rope("odd D, shard", BRAIN, weights=(weight, torch.float32)).check()
    rope("per head", BRAIN, weights=(weight, weight)).check()


@needs_gxx
@pytest.mark.parametrize("needed", [
    (True, False, False, False), (False, True, False, True), (False, False, True, False),
    (True, True, False, False), (False, False, True, True),
])  # fmt: skip
def test_rope_writes_what_is_needed(device, needed):
    device((8, 0), 1)
    for case in ("odd D, shard", "cross-attention"):
        rope(case, BRAIN, needed=needed).check()


@needs_gxx
@pytest.mark.parametrize("side", [0, 1])
def test_rope_gradient_of_one_output(device, side):
    launches = device((8, 0), 2)
    call = rope("odd D, shard", HALF)
    call.grads[side] = None
    gradients = call.backward()
    assert launches[-1][1 + side] == 0
    plain, oracle = call.naive()[1], call.naive(double=True)[1]
    for i in range(4):
        if i % 2 == side:
            assert gradients[i].numel() == 0
        else:
            assert_within_twice(gradients[i], plain[i], oracle[i])


@needs_gxx
def test_rope_of_a_packed_projection_and_of_other_strides(device):
    device((8, 0), 1)
    call = rope("odd D, shard", BRAIN)
    dense = call.forward(), call.backward()
    batch, length, dim = call.tensors[0].shape
    packed = torch.cat([*call.tensors[:2], call.tensors[0]], dim=2)
    for qkv in (packed, packed.transpose(0, 1).contiguous().transpose(0, 1)):
        call.tensors[:2] = qkv.split(dim, 2)[:2]
        assert_all_equal(call.forward(), dense[0])
        assert_all_equal(call.backward(), dense[1])
    # Gradients: dense in another order, columns that are not, misaligned, expanded.
    grads = list(call.grads)
    spread = torch.stack(grads, 3)
    shifted = torch.cat([grads[0][..., :1], grads[0]], 2)[..., 1:]
    for call.grads in ([spread[..., 0], spread[..., 1]], [shifted, grads[1].mT.contiguous().mT]):
        assert_all_equal(call.backward(), dense[1])
    call.grads = [torch.ones((), dtype=BRAIN).expand(batch, length, dim)] * 2
    expanded = call.backward()
    call.grads = [g.contiguous() for g in call.grads]
    assert_all_equal(expanded, call.backward())


@needs_gxx
@pytest.mark.parametrize("case", ["odd D, shard", "1.3B", "per head", "cross-attention"])
def test_rope_does_not_depend_on_the_order_of_threads(libraries, device, monkeypatch, case):
    device((8, 0), 1)
    call = rope(case, BRAIN)
    first = call.forward(), call.backward()
    for order in range(1, 5):
        install(monkeypatch, libraries, (8, 0), 1, order)
        assert_all_equal(call.forward(), first[0])
        assert_all_equal(call.backward(), first[1])


@needs_gxx
@pytest.mark.parametrize(
    "before, place, after",
    [
        pytest.param(BARRIER, 0, "", marks=pytest.mark.slow),
        pytest.param(BARRIER, 1, "", marks=pytest.mark.slow),
        pytest.param(FIRST, 0, FIRST.partition("\n")[2], marks=pytest.mark.slow),
        pytest.param("    parity ^= 1;\n", 0, "", marks=pytest.mark.slow),
        ("angles + (parity ^ 1) * head_dim", 0, "angles + parity * head_dim"),
    ],
    ids=["forward", "backward", "first angles", "two sets of sums", "two sets of angles"],
)
def test_the_emulation_notices_a_missing_barrier_of_rope(
    tmp_path, monkeypatch, before, place, after
):
    library = compile_kernel("qk_norm_rope", tmp_path, (before, after, place))
    call = Rope(1, None, 12, 64, BRAIN, grid=(2, 5, 5))
    monkeypatch.setattr(_cuda, "ROPE_MAX_BLOCKS", 2)
    outputs, gradients = call.naive(double=True)
    outcomes = []
    for order in range(5):
        install(monkeypatch, lambda name: library, (8, 0), 1, order)
        outcomes.append([*call.forward(), *call.backward()[:2]])
    assert_notices(outcomes, (*outputs, *gradients[:2]))


@needs_gxx
def test_a_nan_stays_in_its_row(device):
    device((8, 0), 1)
    call = rope("1.3B", BRAIN)
    clean = call.forward(), call.backward()
    call.tensors[0][0, 5, 700] = float("nan")
    rows = [n for n in range(12) if n != 5]
    for results, before in zip((call.forward(), call.backward()), clean, strict=True):
        assert results[0][0, 5].isnan().all() and torch.equal(results[1], before[1])
        assert torch.equal(results[0][0, rows], before[0][0, rows])


# What no kernel takes.
def pool_calls(x, queries):
    pooled, lse = OPERATIONS["query_pool"].reference(x, queries)
    grads = torch.ones_like(pooled), torch.ones_like(lse)
    return [
        ("query_pool", (x, queries)),
        ("query_pool_backward", (*grads, x, queries, pooled, lse, True, True)),
    ]


def rope_calls(q, heads, per_head=False):
    weight = torch.ones(q.shape[2] // heads if per_head else q.shape[2])
    numbers = (None, None, [], [], heads, per_head, EPS)
    return [
        ("qk_norm_rope", (q, q, weight, weight, *numbers)),
        ("qk_norm_rope_backward", (q, q, q, q, weight, weight, *numbers, [True] * 4)),
    ]


DECLINED = {
    "misaligned": (lambda x: x[..., 1:65], (9, 0)),
    "not a multiple of eight": (lambda x: x[..., :60], (9, 0)),
    "older than 8.0": (lambda x: x[..., :64], (7, 5)),
    "float32": (lambda x: x[..., :64].float(), (9, 0)),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_the_kernels_decline_goes_elsewhere(monkeypatch, case):
    monkeypatch.setattr(_cuda, "HAS_TRITON", False)
    view, capability = DECLINED[case]
    monkeypatch.setattr(_cuda, "capability", lambda device: capability)
    x = view(torch.randn(2, 9, 72).to(BRAIN))
    queries = torch.randn(4, x.shape[2])
    for name, arguments in (*pool_calls(x, queries), *rope_calls(x, 2)):
        operation = OPERATIONS[name]
        if operation.cuda is not None:
            assert getattr(_cuda, name)(*arguments) is None
            assert_all_equal(operation.cuda(*arguments), operation.reference(*arguments))


def test_what_else_the_rope_kernels_decline(monkeypatch):
    monkeypatch.setattr(_cuda, "capability", lambda device: (9, 0))
    x = torch.randn(2, 9, 72).to(BRAIN)
    for q, heads, per_head in ((x, 3, True), (x[:, :0], 1, False), (x.repeat(1, 1, 120), 1, False)):
        for name, arguments in rope_calls(q, heads, per_head):
            assert getattr(_cuda, name)(*arguments) is None
    cos, sin = rope_table(9, 12)
    arguments = (x, x, None, None, cos, sin, [1, 3, 3], [0, 0, 0], 6, False, EPS)
    assert _cuda.qk_norm_rope(*arguments) is None
    _, (name, arguments) = rope_calls(x, 1)
    for i in (0, 1):  # no gradient came, or none is asked for
        changed = [None if i == 0 and n < 2 else a for n, a in enumerate(arguments)]
        assert getattr(_cuda, name)(*changed[:-1], [i == 0] * 4) is None


# 64-bit offsets.
@needs_gxx
def test_offsets_past_int32(device, tmp_path):
    """Token 2 at 2·2³⁰ elements: 32 bits would read the zeros at the start of this sparse file."""
    device((8, 0), 1)
    stride, dim = 2**30, 64
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * 2**32)
    storage = torch.from_file(str(path), shared=True, size=2**32, dtype=HALF)
    x = storage.as_strided((3, dim), (stride, 1), 2**31 - dim)
    values = torch.randn(3, dim).half()
    x.copy_(values)
    queries, grads = torch.randn(4, dim) / 8, (torch.ones(4, dim), torch.ones(4))
    for strided, dense in ((x[None], values[None]), (x[:, None], values[:, None])):
        assert_all_equal(_cuda.query_pool(strided, queries), _cuda.query_pool(dense, queries))
        many = [g.expand(len(dense), *g.shape) for g in grads]
        left, right = (pool_backward(t, queries, many) for t in (strided, dense))
        assert_all_equal(left, right)
        for (name, left), (_, right) in zip(
            rope_calls(strided, 2), rope_calls(dense, 2), strict=True
        ):
            run = getattr(_cuda, name)
            assert_all_equal(run(*left), run(*right))


# Launch choices.
CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
POOL_LAUNCHES = {
    "forward": (_cuda.pool_launch, _cuda.POOL_MAX_WARPS, _cuda.pool_shared_bytes),
    "backward": (
        _cuda.pool_backward_launch, _cuda.POOL_BACKWARD_MAX_WARPS, _cuda.pool_backward_shared_bytes,
    ),
}  # fmt: skip


@pytest.mark.parametrize("which", POOL_LAUNCHES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [8, 64, 1000, 1536, 2048, 3072, 4096, 5120, 8192])
def test_pool_launches_fit_the_device(which, dim, capability):
    choose, max_warps, shared_bytes = POOL_LAUNCHES[which]
    launch = choose(2, 32760, 8, dim, BRAIN, capability)
    if launch is None:
        assert capability < (9, 0) and dim >= (2048 if which == "forward" else 1500)
        return
    assert launch.width * launch.warps * launch.cluster >= dim
    assert 4 <= launch.warps <= max_warps[launch.width]
    assert launch.cluster == 1 or capability >= (9, 0)
    small = capability in ((8, 6), (8, 9), (12, 0))
    shared = shared_bytes(launch.width, launch.warps, launch.cluster)
    assert shared <= (99 if small else 163) * 1024
    assert 1 <= launch.splits * launch.cluster * 2 <= 2 * _cuda.processors(capability)


def test_what_no_pool_launch_fits():
    for choose, *_ in POOL_LAUNCHES.values():
        for dim, dtype, capability in ((65, BRAIN, (9, 0)), (64, torch.float32, (9, 0))):
            assert choose(1, 9, 8, dim, dtype, capability) is None
        assert choose(1, 9, 8, 64, BRAIN, (7, 5)) is None
        assert choose(1, 9, 8, 32768, BRAIN, (9, 0)) is None
        assert choose(65536, 9, 8, 64, BRAIN, (9, 0)) is None
    assert _cuda.pool_backward_launch(1, 9, 9, 64, BRAIN, (9, 0)) is None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [(1, 1), (32760, 32760), (32760, 512), (0, 9), (9, 0), (1, 10**9)])
@pytest.mark.parametrize("dim", [8, 64, 1000, 1536, 5120, 8192])
def test_rope_launches_fit_the_device(dim, rows, capability, backward):
    launch = _cuda.rope_launch(*rows, dim, 1, False, False, BRAIN, capability, backward)
    assert launch.threads % 32 == 0 and dim <= 16 * launch.threads < dim + 512
    blocks = launch.q_blocks, launch.k_blocks
    assert all((n == 0) == (b == 0) and b <= n for n, b in zip(rows, blocks, strict=True))
    assert sum(blocks) <= _cuda.processors(capability) * _cuda.ROPE_MAX_BLOCKS
    resident = sum(blocks) * launch.threads
    assert resident <= _cuda.processors(capability) * _cuda.ROPE_RESIDENT[backward]
    assert _cuda.rope_launch(*rows, dim, 1, False, False, BRAIN, (7, 5), backward) is None
    assert _cuda.rope_launch(2**31, 1, dim, 1, False, False, BRAIN, capability, backward) is None


@needs_gxx
def test_python_and_c_agree_on_the_limits(libraries):
    for name, widths, shared in (
        ("query_pool", _cuda.POOL_MAX_WARPS, _cuda.pool_shared_bytes),
        ("query_pool_backward", _cuda.POOL_BACKWARD_MAX_WARPS, _cuda.pool_backward_shared_bytes),
    ):
        in_c = getattr(libraries(name), f"{name}_shared_bytes")
        in_c.restype = ctypes.c_int64
        for width, warps in widths.items():
            assert getattr(libraries(name), f"{name}_max_warps")(width) == warps
            for cluster in (1, 2, 8):
                assert shared(width, warps, cluster) == in_c(width, warps, cluster)
    in_c = libraries("qk_norm_rope").qk_norm_rope_shared_bytes
    in_c.restype = ctypes.c_int64
    for arguments in ((96, 128, True), (320, 128, False), (512, 2000, True)):
        assert _cuda.rope_shared_bytes(*arguments) == in_c(*arguments)
    sides = libraries("qk_norm_rope")
    assert sides.qk_norm_rope_max_threads() == 512
    for backward, threads in _cuda.ROPE_RESIDENT.items():
        assert sides.qk_norm_rope_bound(int(backward)) == threads


# Property tests.
@needs_gxx
@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*(st.integers(1, most) for most in (2, 90, 40, 8))),
    dtype=st.sampled_from([BRAIN, HALF]),
    gain=st.sampled_from([0.0, 0.1, 1.0]),
    processors=st.integers(1, 6),
    capability=st.sampled_from([(8, 0), (9, 0)]),
    given_lse=st.booleans(),
)
def test_any_pool(libraries, seed, shape, dtype, gain, processors, capability, given_lse):
    torch.manual_seed(seed)
    batch, tokens, eighths, heads = shape
    x, queries = make_pool(batch, tokens, 8 * eighths, heads, dtype)
    queries *= gain
    grads = torch.randn(batch, heads, 8 * eighths), torch.randn(batch, heads) if given_lse else None
    with pytest.MonkeyPatch.context() as patch:
        assert not install(patch, libraries, capability, processors)
        outputs, gradients = _cuda.query_pool(x, queries), pool_backward(x, queries, grads)
    wide = x.double(), queries.double()
    for triple in zip(outputs, attention(x, queries), attention(*wide), strict=True):
        assert_within_twice(*triple, rounding=2, dtype=dtype)
    plain, oracle = pool_gradients(x, queries, grads), pool_gradients(*wide, grads)
    # Where one token's weight is near one its score's gradient is a difference near zero, known to
    # the rounding of g · x and g · pooled; so for the sums of such.
    largest = x.double().norm(dim=2).max() * grads[0].norm(dim=2).max() * 2.0**-19
    floors = largest * queries.abs().max() * heads, largest * x.double().abs().max() * batch
    for i, floor in enumerate(floors):
        error = (gradients[i] - oracle[i]).abs().max()
        allowed = 2 * (plain[i] - oracle[i]).abs().max() + floor
        assert error <= allowed + 2 * torch.finfo(dtype).eps * oracle[i].abs().max()


@needs_gxx
@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    grid=st.tuples(*(st.integers(1, 4),) * 3),
    offset=st.tuples(*(st.integers(0, 5),) * 3),
    heads=st.integers(1, 6),
    head_dim=st.sampled_from([8, 16, 24, 64, 72, 128, 256]),
    dtype=st.sampled_from([BRAIN, HALF]),
    weights=st.tuples(*(st.sampled_from([None, torch.float32, BRAIN, HALF]),) * 2),
    rotates=st.booleans(),
    per_head=st.booleans(),
    needed=st.tuples(*(st.booleans(),) * 4),
    processors=st.integers(1, 3),
)
def test_any_rope(libraries, seed, batch, grid, offset, heads, head_dim, dtype, weights, rotates,
                  per_head, needed, processors):  # fmt: skip
    torch.manual_seed(seed)
    per_head = per_head and head_dim not in (24, 72)
    options = {"grid": grid, "offset": offset} if rotates else {}
    lengths = None if rotates else (math.prod(grid), 1 + sum(offset))
    call = Rope(batch, lengths, heads, head_dim, dtype, weights=weights, per_head=per_head,
                needed=needed, **options)  # fmt: skip
    if not any(call.needed):
        call.needed[0] = True
    with pytest.MonkeyPatch.context() as patch:
        install(patch, libraries, (9, 0), processors)
        call.check(rounding=4)
