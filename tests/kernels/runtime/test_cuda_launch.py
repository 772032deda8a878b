"""The CUDA C++ kernels: what they decline, 64-bit offsets, and the launch choices."""

import ctypes

import pytest
import torch
from cuda_cases import EPS, pool_backward, rope_calls
from cuda_on_cpu import needs_gxx
from dtypes import BF16
from op_checks import assert_same_bits, far_rows

from prfl_fast.kernels import rope_table
from prfl_fast.kernels.runtime import cuda_launch
from prfl_fast.kernels.runtime.registry import OPERATIONS


def pool_calls(x, queries):
    pooled, lse = OPERATIONS["query_pool"].reference(x, queries)
    grads = torch.ones_like(pooled), torch.ones_like(lse)
    return [
        ("query_pool", (x, queries)),
        ("query_pool_backward", (*grads, x, queries, pooled, lse, True, True)),
    ]


DECLINED = {
    "misaligned": (lambda x: x[..., 1:65], (9, 0)),
    "not a multiple of eight": (lambda x: x[..., :60], (9, 0)),
    "older than 8.0": (lambda x: x[..., :64], (7, 5)),
    "float32": (lambda x: x[..., :64].float(), (9, 0)),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_the_kernels_decline_goes_elsewhere(monkeypatch, case):
    monkeypatch.setattr(cuda_launch, "HAS_TRITON", False)
    view, capability = DECLINED[case]
    monkeypatch.setattr(cuda_launch, "capability", lambda device: capability)
    x = view(torch.randn(2, 9, 72).to(BF16))
    queries = torch.randn(4, x.shape[2])
    for name, arguments in (*pool_calls(x, queries), *rope_calls(x, 2)):
        operation = OPERATIONS[name]
        if operation.cuda is not None:
            assert getattr(cuda_launch, name)(*arguments) is None
            assert_same_bits(operation.cuda(*arguments), operation.reference(*arguments))


def test_what_else_the_rope_kernels_decline(monkeypatch):
    monkeypatch.setattr(cuda_launch, "capability", lambda device: (9, 0))
    x = torch.randn(2, 9, 72).to(BF16)
    for q, heads, per_head in ((x, 3, True), (x[:, :0], 1, False), (x.repeat(1, 1, 120), 1, False)):
        for name, arguments in rope_calls(q, heads, per_head):
            assert getattr(cuda_launch, name)(*arguments) is None
    cos, sin = rope_table(9, 12)
    arguments = (x, x, None, None, cos, sin, [1, 3, 3], [0, 0, 0], 6, False, EPS)
    assert cuda_launch.qk_norm_rope(*arguments) is None
    _, (name, arguments) = rope_calls(x, 1)
    for i in (0, 1):  # no gradient came, or none is asked for
        changed = [None if i == 0 and n < 2 else a for n, a in enumerate(arguments)]
        assert getattr(cuda_launch, name)(*changed[:-1], [i == 0] * 4) is None


@needs_gxx
def test_offsets_past_int32(launches, sparse_tensor):
    """Take far tokens, then far samples."""
    queries, grads = torch.randn(4, 64) / 8, (torch.ones(4, 64), torch.ones(4))
    for values in (torch.randn(1, 3, 64).half(), torch.randn(3, 1, 64).half()):
        both = far_rows(sparse_tensor, values), values
        many = [g.expand(len(both[0]), *g.shape) for g in grads]
        assert_same_bits(*(cuda_launch.query_pool(t, queries) for t in both))
        assert_same_bits(*(pool_backward(t, queries, many) for t in both))
        for calls in zip(*(rope_calls(t, 2) for t in both), strict=True):
            assert_same_bits(*(getattr(cuda_launch, name)(*given) for name, given in calls))


CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
FORWARD = (cuda_launch.pool_launch, cuda_launch.POOL_MAX_WARPS, cuda_launch.pool_shared_bytes)
BACKWARD = (
    cuda_launch.pool_backward_launch,
    cuda_launch.POOL_BACKWARD_MAX_WARPS,
    cuda_launch.pool_backward_shared_bytes,
)
POOL_LAUNCHES = {"query_pool": FORWARD, "query_pool_backward": BACKWARD}


@pytest.mark.parametrize("which", POOL_LAUNCHES)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [8, 64, 1000, 1536, 2048, 3072, 4096, 5120, 8192])
def test_pool_launches_fit_the_device(which, dim, capability):
    choose, max_warps, shared_bytes = POOL_LAUNCHES[which]
    launch = choose(2, 32760, 8, dim, BF16, capability)
    if launch is None:
        assert capability < (9, 0) and dim >= (1500 if "backward" in which else 2048)
        return
    assert launch.width * launch.warps * launch.cluster >= dim
    assert 4 <= launch.warps <= max_warps[launch.width]
    assert launch.cluster == 1 or capability >= (9, 0)
    small = capability in ((8, 6), (8, 9), (12, 0))
    shared = shared_bytes(launch.width, launch.warps, launch.cluster)
    assert shared <= (99 if small else 163) * 1024
    assert 1 <= launch.splits * launch.cluster * 2 <= 2 * cuda_launch.multiprocessors(capability)


def test_what_no_pool_launch_fits():
    for choose, *_ in POOL_LAUNCHES.values():
        assert choose(1, 9, 8, 64, torch.float32, (9, 0)) is None
        assert choose(1, 9, 8, 64, BF16, (7, 5)) is None
        for batch, dim in ((1, 65), (1, 32768), (65536, 64)):
            assert choose(batch, 9, 8, dim, BF16, (9, 0)) is None
    assert cuda_launch.pool_backward_launch(1, 9, 9, 64, BF16, (9, 0)) is None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("rows", [(1, 1), (32760, 32760), (32760, 512), (0, 9), (9, 0), (1, 10**9)])
@pytest.mark.parametrize("dim", [8, 64, 1000, 1536, 5120, 8192])
def test_rope_launches_fit_the_device(dim, rows, capability, backward):
    shape = dim, 1, False, False, BF16
    launch = cuda_launch.rope_launch(*rows, *shape, capability, backward)
    assert launch.threads % 32 == 0 and dim <= 16 * launch.threads < dim + 512
    blocks = launch.q_blocks, launch.k_blocks
    assert all((n == 0) == (b == 0) and b <= n for n, b in zip(rows, blocks, strict=True))
    multiprocessors = cuda_launch.multiprocessors(capability)
    assert sum(blocks) <= multiprocessors * cuda_launch.ROPE_MAX_BLOCKS
    assert sum(blocks) * launch.threads <= multiprocessors * cuda_launch.ROPE_RESIDENT[backward]
    assert cuda_launch.rope_launch(*rows, *shape, (7, 5), backward) is None
    assert cuda_launch.rope_launch(2**31, 1, *shape, capability, backward) is None


@needs_gxx
def test_python_and_c_agree_on_the_limits(libraries):
    for name, (_, widths, shared) in POOL_LAUNCHES.items():
        in_c = getattr(libraries(name), f"{name}_shared_bytes")
        in_c.restype = ctypes.c_int64
        for width, warps in widths.items():
            assert getattr(libraries(name), f"{name}_max_warps")(width) == warps
            for cluster in (1, 2, 8):
                assert shared(width, warps, cluster) == in_c(width, warps, cluster)
    sides = libraries("qk_norm_rope")
    in_c = sides.qk_norm_rope_shared_bytes
    in_c.restype = ctypes.c_int64
    for arguments in ((96, 128, True), (320, 128, False), (512, 2000, True)):
        assert cuda_launch.rope_shared_bytes(*arguments) == in_c(*arguments)
    assert sides.qk_norm_rope_max_threads() == 512
    for backward, threads in cuda_launch.ROPE_RESIDENT.items():
        assert sides.qk_norm_rope_bound(int(backward)) == threads
