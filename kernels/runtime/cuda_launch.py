"""Launch the CUDA C++ kernels of ``csrc/``.

A wrapper returns None for arguments that its kernel does not take; :func:`with_fallback` then runs
the Triton implementation. All kernels take bfloat16 or float16, in contiguous rows of a multiple of
eight elements, aligned to 16 bytes, and need compute capability 8.0 or newer.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch

from prfl_fast.kernels.runtime.triton import HAS_TRITON, capability, multiprocessors

REGISTERS = 65536  # of 32 bits, on a multiprocessor


def with_fallback(
    kernel: Callable[..., Any], triton: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """Return ``kernel`` with Triton, or the reference, as the fallback where it returns None."""

    def run(*args: Any) -> Any:
        result = kernel(*args)
        if result is None:
            result = triton(*args) if HAS_TRITON else reference(*args)
        return result

    return run


def _fits(x: torch.Tensor) -> bool:
    """Return True if every row of ``[B, L, D]`` can be read 16 bytes at a time."""
    rows = x.stride(2) == 1 and x.shape[2] % 8 == 0 and x.stride(1) % 8 == 0
    return rows and (x.shape[0] == 1 or x.stride(0) % 8 == 0) and x.data_ptr() % 16 == 0


def _shared_limit(capability: tuple[int, ...]) -> int:
    """Return the bytes of shared memory that a block can have."""
    kilobytes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
    return 1024 * kilobytes.get((capability[0], capability[1]), 99)


# GPCs of a chip and the multiprocessors of each, by major compute capability. A cluster runs in one
# GPC; some GPCs are larger, and smaller boards have fewer. These are the numbers of a full board on
# all boards, so that PRFL_FAST_MULTIPROCESSORS alone decides the order of a sum, and so its bits.
_GPCS = {9: (8, 16), 10: (8, 18), 12: (10, 16)}


def _blocks_at_once(capability: tuple[int, ...], cluster: int, resident: int) -> int:
    """Return the blocks that run at once, in whole clusters, ``resident`` on a multiprocessor."""
    blocks = resident * multiprocessors(capability)
    if cluster == 1:
        return blocks
    gpcs, processors = _GPCS.get(capability[0], (8, 16))
    return min(blocks, gpcs * (resident * processors // cluster) * cluster)


@dataclass(frozen=True)
class PoolLaunch:
    """Columns of a warp, warps of a block, blocks that share D (a cluster), ranges of tokens."""

    width: int
    warps: int
    cluster: int
    splits: int


POOL_MAX_WARPS = {64: 8, 128: 12, 256: 12, 320: 8}  # max_warps() of csrc/query_pool.cu
POOL_BACKWARD_MAX_WARPS = {64: 12, 128: 12, 256: 8}  # that of csrc/query_pool_backward.cu
POOL_BACKWARD_REGISTERS = {64: 144, 128: 168, 256: 256}  # of a thread, at most
POOL_BACKWARD_HEADS = 8


def pool_shared_bytes(width: int, warps: int, cluster: int) -> int:
    """Return a block's dynamic shared memory: ``shared_bytes()`` of csrc/query_pool.cu."""
    return warps * width * 64 + cluster * warps * 1280 + 416


def pool_backward_shared_bytes(width: int, warps: int, cluster: int) -> int:
    """Return a block's dynamic shared memory, as ``shared_bytes()`` of query_pool_backward.cu."""
    exchange = cluster * 2048 if cluster > 1 else 0
    return 64 * (warps * width + 2) + warps * (1280 + 32 * width) + exchange + 1536


def _fitting(
    dim: int, capability: tuple[int, ...], max_warps: dict[int, int],
    shared_bytes: Callable[[int, int, int], int], pairs: Callable[[int, int], bool], wide: bool,
) -> tuple[int, int, int, int] | None:  # fmt: skip
    """Return width, warps, cluster and resident blocks of the best launch; None if none fits.

    ``pairs(width, warps)`` is True if the registers of a multiprocessor hold two blocks. Among
    equal launches, ``wide`` takes the one with the widest warps, else the narrowest.
    """
    limit, fitting = _shared_limit(capability), []
    # From 9.0 on, a cluster of blocks shares a large D.
    for cluster in (1, 2, 4, 8) if capability >= (9, 0) else (1,):
        for width, most in max_warps.items():
            warps = max(4, -(-dim // (width * cluster)))  # the softmax needs four
            shared = shared_bytes(width, warps, cluster)
            if warps <= most and shared <= limit:
                # Two blocks overlap the reductions of one with the loads of the other.
                pair = pairs(width, warps) and 2 * (shared + 1024) <= limit + 1024
                key = (not pair, width * warps * cluster - dim, cluster, -width if wide else width)
                fitting.append((key, (width, warps, cluster, 2 if pair else 1)))
    return min(fitting)[1] if fitting else None


def pool_launch(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, capability: tuple[int, ...]
) -> PoolLaunch | None:
    """Choose the launch of the forward; None if it cannot run."""
    if not _pool_takes(batch, heads, dim, dtype, capability):
        return None
    # Registers hold two blocks of up to 1536 columns each.
    sizes = POOL_MAX_WARPS, pool_shared_bytes, lambda width, warps: width * warps <= 1536
    if (found := _fitting(dim, capability, *sizes, wide=True)) is None:
        return None
    width, warps, cluster, resident = found
    blocks = cluster * batch * -(-heads // 8)
    splits = min(-(-tokens // 16), max(1, _blocks_at_once(capability, cluster, resident) // blocks))
    return PoolLaunch(width, warps, cluster, splits)


def pool_backward_launch(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, capability: tuple[int, ...]
) -> PoolLaunch | None:
    """Choose the launch of the backward; None if it cannot run."""
    # A block has all heads, because it writes the sum over them.
    if not _pool_takes(batch, heads, dim, dtype, capability) or heads > POOL_BACKWARD_HEADS:
        return None
    sizes = POOL_BACKWARD_MAX_WARPS, pool_backward_shared_bytes, _registers_for_two
    if (found := _fitting(dim, capability, *sizes, wide=False)) is None:
        return None
    width, warps, cluster, resident = found
    splits = max(1, _blocks_at_once(capability, cluster, resident) // (cluster * batch))
    return PoolLaunch(width, warps, cluster, min(-(-tokens // 16), splits))


def _registers_for_two(width: int, warps: int) -> bool:
    return 64 * warps * POOL_BACKWARD_REGISTERS[width] <= REGISTERS


def _pool_takes(
    batch: int, heads: int, dim: int, dtype: torch.dtype, capability: tuple[int, ...]
) -> bool:
    types = dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0
    return types and capability >= (8, 0) and batch <= 65535 and heads <= 65535


def query_pool(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run ``prfl_fast::query_pool``, or return None."""
    batch, tokens, dim = x.shape
    launch = pool_launch(batch, tokens, len(queries), dim, x.dtype, capability(x.device))
    if launch is None or not _fits(x):
        return None
    return torch.ops.prfl_fast_cuda.query_pool(x, queries.float().contiguous(), *astuple(launch))


def query_pool_backward(
    grad_pooled: torch.Tensor,
    grad_lse: torch.Tensor | None,
    x: torch.Tensor,
    queries: torch.Tensor,
    pooled: torch.Tensor,
    lse: torch.Tensor,
    need_x: bool,
    need_queries: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run ``prfl_fast::query_pool_backward``, or return None."""
    batch, tokens, dim = x.shape
    launch = pool_backward_launch(batch, tokens, len(queries), dim, x.dtype, capability(x.device))
    if launch is None or not _fits(x):
        return None
    delta = (grad_pooled * pooled).sum(-1)  # [B, H]
    if grad_lse is not None:
        delta = delta - grad_lse
    d_x, partials = torch.ops.prfl_fast_cuda.query_pool_backward(
        grad_pooled.contiguous(), lse.contiguous(), delta, x, queries.float().contiguous(),
        need_x, need_queries, *astuple(launch),
    )  # fmt: skip
    if not need_queries:
        return d_x, queries.new_empty(0)
    return d_x, partials.flatten(0, 1).sum(0).to(queries.dtype)
