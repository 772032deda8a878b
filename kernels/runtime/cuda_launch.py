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
MAX_ROWS = 2**31 - 2**16  # 32-bit row numbers, with room for one more step of the grid


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


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous copy; like every allocation it is aligned."""
    return x.clone(memory_format=torch.contiguous_format)


def _shared_limit(capability: tuple[int, int]) -> int:
    """Return the bytes of shared memory that a block can have."""
    kilobytes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
    return 1024 * kilobytes.get(capability, 99)


# query_pool.
@dataclass(frozen=True)
class PoolLaunch:
    """Columns of a warp, warps of a block, blocks that share D (a cluster), ranges of tokens."""

    width: int
    warps: int
    cluster: int
    splits: int


POOL_MAX_WARPS = {64: 8, 128: 12, 256: 12, 320: 8}  # max_warps() of csrc/query_pool.cu
POOL_BACKWARD_MAX_WARPS = {64: 12, 128: 12, 256: 8}  # that of csrc/query_pool_backward.cu
POOL_BACKWARD_REGISTERS = {64: 136, 128: 160, 256: 232}  # of a thread, at most
POOL_BACKWARD_HEADS = 8


def pool_shared_bytes(width: int, warps: int, cluster: int) -> int:
    """Return a block's dynamic shared memory: ``shared_bytes()`` of csrc/query_pool.cu."""
    return warps * width * 32 + cluster * warps * 1280 + 416


def pool_backward_shared_bytes(width: int, warps: int, cluster: int) -> int:
    """Return a block's dynamic shared memory, as ``shared_bytes()`` of query_pool_backward.cu."""
    exchange = cluster * 2048 if cluster > 1 else 0
    return 64 * (warps * width + 2) + warps * 1280 + exchange + 1536


def pool_launch(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> PoolLaunch | None:
    """Choose the launch of the forward; None if it cannot run."""
    if not _pool_takes(batch, heads, dim, dtype, capability):
        return None
    fitting = []
    for cluster in (1, 2, 4, 8) if capability >= (9, 0) else (1,):
        for width, most in POOL_MAX_WARPS.items():
            warps = max(4, -(-dim // (width * cluster)))  # the softmax needs four
            shared = pool_shared_bytes(width, warps, cluster)
            if warps <= most and shared <= _shared_limit(capability):
                # Two blocks on a multiprocessor overlap the reductions of one with the loads of the
                # other; up to 1536 columns each fit its registers. From 9.0 on, a cluster of blocks
                # shares a larger D.
                columns = width * warps
                key = (columns > 1536, columns * cluster - dim, cluster, -width)
                fitting.append((key, width, warps, cluster))
    if not fitting:
        return None
    _, width, warps, cluster = min(fitting)
    blocks = cluster * batch * -(-heads // 8)
    splits = min(-(-tokens // 16), max(1, 2 * multiprocessors(capability) // blocks))
    return PoolLaunch(width, warps, cluster, splits)


def pool_backward_launch(
    batch: int, tokens: int, heads: int, dim: int, dtype: torch.dtype, capability: tuple[int, int]
) -> PoolLaunch | None:
    """Choose the launch of the backward; None if it cannot run."""
    # A block has all heads, because it writes the sum over them.
    if not _pool_takes(batch, heads, dim, dtype, capability) or heads > POOL_BACKWARD_HEADS:
        return None
    limit = _shared_limit(capability)
    fitting = []
    for cluster in (1, 2, 4, 8) if capability >= (9, 0) else (1,):
        for width, most in POOL_BACKWARD_MAX_WARPS.items():
            warps = max(4, -(-dim // (width * cluster)))
            shared = pool_backward_shared_bytes(width, warps, cluster)
            if warps <= most and shared <= limit:
                # Two blocks if registers and shared memory allow, else one block of many warps.
                threads = 64 * warps
                pair = threads * POOL_BACKWARD_REGISTERS[width] <= REGISTERS
                pair = pair and 2 * (shared + 1024) <= limit + 1024
                key = (not pair, width * warps * cluster - dim, cluster, width)
                fitting.append((key, width, warps, cluster, 2 if pair else 1))
    if not fitting:
        return None
    _, width, warps, cluster, resident = min(fitting)
    splits = max(1, resident * multiprocessors(capability) // (cluster * batch))
    return PoolLaunch(width, warps, cluster, min(-(-tokens // 16), splits))


def _pool_takes(
    batch: int, heads: int, dim: int, dtype: torch.dtype, capability: tuple[int, int]
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


# qk_norm_rope.
@dataclass(frozen=True)
class RopeLaunch:
    """Threads that share a row, and blocks that walk the rows of q and of k."""

    threads: int
    q_blocks: int
    k_blocks: int


# Threads on a multiprocessor, by the registers of csrc/qk_norm_rope.cu: FORWARD_BOUND and
# BACKWARD_BOUND there.
ROPE_RESIDENT = {False: 1024, True: 640}
ROPE_MAX_BLOCKS = 16  # on a multiprocessor; more would only write more partial sums


def rope_shared_bytes(threads: int, head_dim: int, rotates: bool) -> int:
    """Return a block's dynamic shared memory: ``shared_bytes()`` of csrc/qk_norm_rope.cu."""
    return threads * 64 + 256 + (8 * head_dim if rotates else 0)


def rope_launch(
    q_rows: int,
    k_rows: int,
    dim: int,
    heads: int,
    rotates: bool,
    per_head: bool,
    dtype: torch.dtype,
    capability: tuple[int, int],
    backward: bool = False,
) -> RopeLaunch | None:
    """Choose the launch; None if the kernel cannot run. Rows are B·L, zero for an absent side."""
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0):
        return None
    head_dim, threads = dim // heads, 32 * -(-dim // 512)  # 16 elements a thread
    if dim % 8 or threads > 512 or max(q_rows, k_rows) >= MAX_ROWS or q_rows + k_rows == 0:
        return None
    if rotates and head_dim % 8:
        return None
    if per_head and head_dim not in (8, 16, 32, 64, 128, 256):
        return None  # shuffles add up the lanes of a head
    if rope_shared_bytes(threads, head_dim, rotates) > 48 * 1024:
        return None
    # One resident wave, shared by q and k in proportion to their rows.
    blocks = multiprocessors(capability) * min(ROPE_MAX_BLOCKS, ROPE_RESIDENT[backward] // threads)
    for_q = blocks * q_rows // (q_rows + k_rows)
    if q_rows and k_rows:
        for_q, blocks = max(1, min(for_q, blocks - 1)), max(2, blocks)
    return RopeLaunch(threads, min(q_rows, for_q), min(k_rows, blocks - for_q))


def _rope_weight(weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    if weight is None:
        return None
    weight = weight if weight.dtype == x.dtype else weight.float()
    aligned = weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return weight if aligned else _dense(weight)


def _rope_table(table: torch.Tensor | None) -> torch.Tensor | None:
    return None if table is None else table.float().contiguous()


def _rows(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.shape[0] * x.shape[1]


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    grid: list[int],
    offset: list[int],
    heads: int,
    per_head: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Run ``prfl_fast::qk_norm_rope``, or return None."""
    if q.numel() == 0 or k.numel() == 0 or not (_fits(q) and _fits(k)):
        return None
    if cos is not None and not grid:  # a table by token
        return None
    launch = rope_launch(
        _rows(q), _rows(k), q.shape[2], heads, cos is not None, per_head, q.dtype,
        capability(q.device),
    )  # fmt: skip
    if launch is None:
        return None
    return torch.ops.prfl_fast_cuda.qk_norm_rope(
        q, k, _rope_weight(q_weight, q), _rope_weight(k_weight, q), _rope_table(cos),
        _rope_table(sin), grid, offset, heads, per_head, eps, *astuple(launch),
    )  # fmt: skip


def qk_norm_rope_backward(
    q_grad: torch.Tensor | None,
    k_grad: torch.Tensor | None,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    grid: list[int],
    offset: list[int],
    heads: int,
    per_head: bool,
    eps: float,
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Run ``prfl_fast::qk_norm_rope_backward``, or return None."""
    wanted = [bool(needed[i] or needed[i + 2]) for i in range(2)]
    grads = [g if w else None for g, w in zip((q_grad, k_grad), wanted, strict=True)]
    some = next((g for g in grads if g is not None), None)
    if some is None or any(g is not None and g.numel() == 0 for g in grads):
        return None
    if cos is not None and not grid:
        return None
    normed = [
        x for x, g, w in zip((q, k), grads, (q_weight, k_weight), strict=True)
        if g is not None and w is not None and x is not None
    ]  # fmt: skip
    launch = rope_launch(
        _rows(grads[0]), _rows(grads[1]), some.shape[2], heads, cos is not None, per_head,
        some.dtype, capability(some.device), backward=True,
    )  # fmt: skip
    if launch is None or not all(_fits(x) for x in normed):
        return None
    grads = [g if g is None or _fits(g) else _dense(g) for g in grads]
    flags = [bool(n) and g is not None for n, g in zip(needed, grads * 2, strict=True)]
    d_q, d_k, *partials = torch.ops.prfl_fast_cuda.qk_norm_rope_backward(
        *grads, q, k, _rope_weight(q_weight, some), _rope_weight(k_weight, some),
        _rope_table(cos), _rope_table(sin), grid, offset, heads, per_head, eps, *flags,
        *astuple(launch),
    )  # fmt: skip
    sums = []
    for blocks, weight, flag in zip(partials, (q_weight, k_weight), flags[2:], strict=True):
        if weight is None or not flag:
            sums.append((some if weight is None else weight).new_empty(0))
        else:  # with a norm per head all heads share a weight
            sums.append(blocks.view(-1, weight.shape[0]).sum(0).to(weight.dtype))
    return d_q, d_k, sums[0], sums[1]
