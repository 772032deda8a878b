"""The CUDA C++ kernels: what they decline, 64-bit offsets, and the launch choices."""

import ctypes

import pytest
import torch
from cuda_cases import pool_backward
from cuda_on_cpu import needs_gxx
from dtypes import BF16
from op_checks import assert_same_bits, far_rows

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
    for name, arguments in pool_calls(x, queries):
        operation = OPERATIONS[name]
        if operation.cuda is not None:
            assert getattr(cuda_launch, name)(*arguments) is None
            assert_same_bits(operation.cuda(*arguments), operation.reference(*arguments))


@pytest.mark.slow
@needs_gxx
def test_offsets_past_int32(launches, sparse_tensor):
    """Take far tokens, then far samples."""
    queries, grads = torch.randn(4, 64) / 8, (torch.ones(4, 64), torch.ones(4))
    for values in (torch.randn(1, 3, 64).half(), torch.randn(3, 1, 64).half()):
        both = far_rows(sparse_tensor, values), values
        many = [g.expand(len(both[0]), *g.shape) for g in grads]
        assert_same_bits(*(cuda_launch.query_pool(t, queries) for t in both))
        assert_same_bits(*(pool_backward(t, queries, many) for t in both))


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
        small = capability in ((8, 6), (8, 9))
        assert dim > {True: 800, False: 1500}[small] if capability < (9, 0) else dim > 6000
        return
    assert launch.width * launch.warps * launch.cluster >= dim
    assert 4 <= launch.warps <= max_warps[launch.width]
    assert launch.cluster == 1 or capability >= (9, 0)
    kilobytes = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99)
    assert shared_bytes(launch.width, launch.warps, launch.cluster) <= 1024 * kilobytes
    assert 1 <= launch.splits * launch.cluster * 2 <= 2 * cuda_launch.multiprocessors(capability)


def test_what_no_pool_launch_fits():
    for choose, *_ in POOL_LAUNCHES.values():
        assert choose(1, 9, 8, 64, torch.float32, (9, 0)) is None
        assert choose(1, 9, 8, 64, BF16, (7, 5)) is None
        for batch, dim in ((1, 65), (1, 32768), (65536, 64)):
            assert choose(batch, 9, 8, dim, BF16, (9, 0)) is None
    assert cuda_launch.pool_backward_launch(1, 9, 9, 64, BF16, (9, 0)) is None


@needs_gxx
def test_python_and_c_agree_on_the_limits(libraries):
    for name, (_, widths, shared) in POOL_LAUNCHES.items():
        in_c = getattr(libraries(name), f"{name}_shared_bytes")
        in_c.restype = ctypes.c_int64
        for width, warps in widths.items():
            assert getattr(libraries(name), f"{name}_max_warps")(width) == warps
            for cluster in (1, 2, 8):
                assert shared(width, warps, cluster) == in_c(width, warps, cluster)
