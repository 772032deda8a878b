"""RMSNorm of queries and keys and 3-D rotary positions, both in one operation.

    n = x · rstd,  rstd = 1/√(mean(x²) + eps),  z = n · w          mean over D, or over each head
    y = z · e^{iφ}   on the interleaved pairs (x_{2j}, x_{2j+1}) of every head, as complex numbers
    d_z = d_y · e^{-iφ}
    d_w = Σ_rows d_z · n,  d_x = rstd · (d_z·w - n · mean(d_z·w · n))

Token l of the grid (F, H, W) is (f, h, w), frame-major. Of a head's P = d/2 pairs the first P -
2·(P//3) turn with f, the next P//3 with h, the last P//3 with w (22/21/21 for Wan's d = 128); pair
i of an axis with n pairs turns by φ = position · theta^(-i/n). This is the rotary embedding of
Wan2.1's ``rope_apply``; the norm is its ``WanRMSNorm``.

Other embeddings give cos φ and sin φ of every token, in rows shared by its heads (HunyuanVideo,
CogVideoX; 1 and 0 for text tokens) or for each head (LTX). Such rows are 4 % (shared, 24 heads) and
50 % (each head) more bytes in bfloat16.

Shapes: q ``[B, Lq, D]``, k ``[B, Lk, D]``, weights ``[D]`` or ``[d]``, cos and sin ``[positions,
d/2]``; by token ``[L, d/2]`` or ``[L, D/2]``.
Dtypes: everything between x and y is float32 (float64 for float64 x), rounded once to x's dtype.
Weights may have another dtype. The tables are computed in float64 and stored in float32.
Saved for backward: q and k if they were normalized (a rotation alone saves neither), weights and
tables.
Bytes: forward reads and writes q and k once; backward reads q, k and both gradients (Triton a
second time from L1) and writes d_q and d_k. Sums over tokens: partial rows of programs, then all.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from prfl_fast.kernels.attn.norm_rope_triton import (
    backward_launch,
    backward_tokens,
    forward_launch,
    forward_tokens,
)
from prfl_fast.kernels.common.modulation_rows import token_strides
from prfl_fast.kernels.common.norm_math import operand, rms_gradients, rstd
from prfl_fast.kernels.common.rope import by_token, check_grid, check_tables, rope_table, rotations
from prfl_fast.kernels.runtime.checks import (
    cast,
    compute_dtype,
    require,
    require_float,
    require_same_device,
)
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import COUNTS, capability, tl, triton

__all__ = ["qk_norm_rope", "rope_table"]


# Reference.
def _grouped(x: torch.Tensor, heads: int, per_head: bool) -> torch.Tensor:
    """View x with the normalized dimension last: ``[B, L, heads, d]`` or ``[B, L, D]``."""
    return x.view(*x.shape[:2], heads, x.shape[2] // heads) if per_head else x


def _forward_one(x, weight, turns, heads, per_head, eps, dtype, rhos):
    if weight is None:
        z, rho = x.to(dtype, copy=True, memory_format=torch.contiguous_format), None
    else:
        groups = _grouped(x, heads, per_head)
        rho = rstd(groups, eps, dtype)
        z = (groups * rho).mul_(weight)
        z = z.reshape_as(x).contiguous() if per_head or not z.is_contiguous() else z
    if rhos is not None:
        rhos.append(rho)
    return z if turns is None else _turn(z, turns, heads, True)


def _turn(z: torch.Tensor, turns: Any, heads: int, overwrite: bool) -> torch.Tensor:
    """Return z·e^{iφ} for a contiguous z ``[B, L, D]``, which changes if ``overwrite``."""
    if isinstance(turns, torch.Tensor):
        batch, tokens, dim = z.shape
        pairs = z.view(turns.dtype).view(batch, tokens, heads, dim // heads // 2)
        if not overwrite:
            return (pairs * turns).view(z.dtype).view(batch, tokens, dim)
        pairs.mul_(turns)
        return z
    cos, sin = turns
    even, odd = z.view(*z.shape[:2], heads, z.shape[2] // (2 * heads), 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).view(z.shape)


def _turns(
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    grid: list[int],
    offset: list[int],
    pairs: int,
    dtype: torch.dtype,
) -> Any:
    """Return e^{iφ} of every token, complex ``[L, 1, pairs]``, or ``[L, heads, pairs]``.

    For a compiler, which generates no code for complex numbers, return (real, imaginary) parts.
    """
    if cos is None or sin is None:
        return None
    if torch.compiler.is_compiling():
        if grid:
            return tuple(by_token(t.to(dtype), grid, offset) for t in (cos, sin))
        return tuple(t.to(dtype).view(cos.shape[0], -1, pairs) for t in (cos, sin))
    if not grid:
        return torch.complex(cos.to(dtype), sin.to(dtype)).view(cos.shape[0], -1, pairs)
    if cos.is_inference() or sin.is_inference():  # they have no version counter
        return rotations(cos, sin, grid, offset, dtype)
    # All blocks of a forward share the tables. Without the cache, a trained block would compute the
    # rotations three times, in 20 small operations each.
    key = (*grid, *offset, dtype, sin._version, cos._version)
    known = vars(cos).get("_prfl_fast_turns", (None, None, None))
    if known[0] is not sin or known[1] != key:
        known = sin, key, rotations(cos, sin, grid, offset, dtype)
        vars(cos)["_prfl_fast_turns"] = known
    return known[2]


def reference(
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
    upcast: torch.dtype | None = None,
    rhos: list[Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(q', k')``, contiguous; ``grid`` is empty without a grid.

    ``upcast`` is the dtype computed in and returned. ``rhos`` receives 1/√(mean(x²) + eps) of q and
    k, for a backward that recomputes the forward.
    """
    dtype = compute_dtype(q, upcast)
    turns = _turns(cos, sin, grid, offset, q.shape[2] // heads // 2, dtype)
    added = operand(eps, dtype, q.device)
    q_out = _forward_one(q, q_weight, turns, heads, per_head, added, dtype, rhos)
    k_out = _forward_one(k, k_weight, turns, heads, per_head, added, dtype, rhos)
    return cast(q_out, upcast or q.dtype), cast(k_out, upcast or k.dtype)


def _backward_one(grad, x, weight, turns, heads, per_head, eps, need_x, need_weight, rho):
    dtype = compute_dtype(grad)
    d_z = cast(grad, dtype).contiguous()
    if turns is not None:
        d_z = _turn(d_z, turns, heads, d_z is not grad)
    if x is None or weight is None:
        d_z = d_z.clone() if d_z is grad else d_z
        return cast(d_z, grad.dtype) if need_x else grad.new_empty(0), grad.new_empty(0)
    groups, own = _grouped(x, heads, per_head), d_z is not grad
    d_z = _grouped(d_z, heads, per_head)
    if rho is None:
        rho = rstd(groups, operand(eps, dtype, x.device), dtype)
    e = d_z.mul_(rho) if own else d_z * rho
    d_x, d_weight = rms_gradients(e, groups, weight, rho, need_x, need_weight)
    d_x = d_x.reshape_as(x) if per_head and need_x else d_x
    return cast(d_x, x.dtype), d_weight


def reference_backward(
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
    rhos: list[Any] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``(d_q, d_k, d_q_weight, d_k_weight)``; an empty tensor for each absent gradient.

    A gradient is absent if it is not needed, or if no gradient arrived. q and k are absent if they
    were not normalized; ``needed`` is in the order of the result. ``rhos`` is as in
    :func:`reference`.
    """
    some = q_grad if q_grad is not None else k_grad
    assert some is not None
    turns = _turns(cos, sin, grid, offset, some.shape[2] // heads // 2, compute_dtype(some))
    if isinstance(turns, torch.Tensor):
        # conj() is lazy, and a custom operation under a dispatch mode loses the lazy conjugate.
        turns = turns.conj_physical()
    elif turns is not None:
        turns = turns[0], -turns[1]
    results = []
    for grad, x, weight, need_x, need_weight, rho in (
        (q_grad, q, q_weight, needed[0], needed[2], rhos and rhos[0]),
        (k_grad, k, k_weight, needed[1], needed[3], rhos and rhos[1]),
    ):
        if grad is None or not (need_x or need_weight):
            nothing = some.new_empty(0)
            results.append((nothing, nothing.clone() if weight is None else weight.new_empty(0)))
        else:
            args = (grad, x, weight, turns, heads, per_head, eps, need_x, need_weight, rho)
            results.append(_backward_one(*args))
    (d_q, d_q_weight), (d_k, d_k_weight) = results
    return d_q, d_k, d_q_weight, d_k_weight


# Triton.
@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_ql, length_q, stride_kb, stride_kl, length_k, q_tokens, k_tokens,
    frames, height, width, start_f, start_h, start_w, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PER_HEAD: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    sizes = (frames, height, width)
    starts = (start_f, start_h, start_w)
    if tl.program_id(1) == 0:
        forward_tokens(
            q_ptr, q_out_ptr, q_weight_ptr, cos_ptr, sin_ptr, stride_qb, stride_ql, length_q,
            q_tokens, sizes, starts, eps, DIM, HEAD, BLOCK_H, BLOCK_D, PER_HEAD, TABLE,
        )  # fmt: skip
    else:
        forward_tokens(
            k_ptr, k_out_ptr, k_weight_ptr, cos_ptr, sin_ptr, stride_kb, stride_kl, length_k,
            k_tokens, sizes, starts, eps, DIM, HEAD, BLOCK_H, BLOCK_D, PER_HEAD, TABLE,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    q_grad_ptr, k_grad_ptr, q_ptr, k_ptr, dq_ptr, dk_ptr, dq_weight_ptr, dk_weight_ptr,
    q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
    stride_gqb, stride_gql, length_gq, stride_gkb, stride_gkl, length_gk,
    stride_qb, stride_ql, length_q, stride_kb, stride_kl, length_k, q_tokens, k_tokens,
    frames, height, width, start_f, start_h, start_w, eps,
    DIM: tl.constexpr, HEAD: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PER_HEAD: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    sizes = (frames, height, width)
    starts = (start_f, start_h, start_w)
    if tl.program_id(1) == 0:
        if q_grad_ptr is not None:
            backward_tokens(
                q_grad_ptr, q_ptr, dq_ptr, dq_weight_ptr, q_weight_ptr, cos_ptr, sin_ptr,
                stride_gqb, stride_gql, length_gq, stride_qb, stride_ql, length_q, q_tokens,
                sizes, starts, eps, DIM, HEAD, BLOCK_H, BLOCK_D, PER_HEAD, TABLE,
            )  # fmt: skip
    else:
        if k_grad_ptr is not None:
            backward_tokens(
                k_grad_ptr, k_ptr, dk_ptr, dk_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr,
                stride_gkb, stride_gkl, length_gk, stride_kb, stride_kl, length_k, k_tokens,
                sizes, starts, eps, DIM, HEAD, BLOCK_H, BLOCK_D, PER_HEAD, TABLE,
            )  # fmt: skip


# Launch.
def _dense(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _places(
    x: torch.Tensor, cos: torch.Tensor | None, grid: list[int], offset: list[int]
) -> tuple[tuple[int, ...], int]:
    """Return grid and offset as a kernel's arguments, and the columns of a table by token or 0."""
    columns = 0 if grid or cos is None else cos.shape[1]
    return (*(grid or (x.shape[1], 1, 1)), *(offset or (0, 0, 0))), columns


def _triton_forward(q, k, q_weight, k_weight, cos, sin, grid, offset, heads, per_head, eps):
    results = q.new_empty(q.shape), k.new_empty(k.shape)
    dim = q.shape[2]
    tokens = [x.shape[0] * x.shape[1] for x in (q, k)]
    if max(tokens) == 0:
        return results
    head_dim = dim // heads if per_head or cos is not None else None
    places, table = _places(q, cos, grid, offset)
    launch = forward_launch(max(tokens), dim, head_dim, q.dtype, capability(q.device))
    forward_kernel[(launch.programs, 2)](
        q, k, *results, *map(_dense, (q_weight, k_weight, cos, sin)),
        *token_strides(q), *token_strides(k), *tokens, *places, eps,
        **launch.constants(dim, per_head, table),
        num_warps=launch.num_warps, maxnreg=launch.registers,
    )  # fmt: skip
    return results


def _triton_backward(
    q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, grid, offset, heads, per_head, eps, needed
):
    results = _fake_backward(q_grad, k_grad, q, k, q_weight, k_weight, *(None,) * 7, needed)
    grads = [
        None if g is None or not any(need) else g if g.stride(2) == 1 else g.contiguous()
        for g, need in ((q_grad, needed[::2]), (k_grad, needed[1::2]))
    ]
    tokens = [0 if g is None else g.shape[0] * g.shape[1] for g in grads]
    some = next((g for g in grads if g is not None), None)
    if some is None:
        return results
    dim = some.shape[2]
    head_dim = dim // heads if per_head or cos is not None else None
    places, table = _places(some, cos, grid, offset)
    wide = any(w is not None and w.dtype == torch.float32 for w in (q_weight, k_weight))
    size = (max(tokens), dim, head_dim, some.dtype, capability(some.device))
    launch = backward_launch(*size, wide)
    partials = [
        some.new_empty(launch.programs, d.numel(), dtype=torch.float32) if d.numel() else None
        for d in results[2:]
    ]
    strides = [(0, 0, None) if x is None else token_strides(x) for x in (*grads, q, k)]
    backward_kernel[(launch.programs, 2)](
        *grads, q, k, *(d if d.numel() else None for d in results[:2]), *partials,
        *map(_dense, (q_weight, k_weight, cos, sin)), *itertools.chain(*strides), *tokens,
        *places, eps, **launch.constants(dim, per_head, table),
        num_warps=launch.num_warps, maxnreg=launch.registers,
    )  # fmt: skip
    sums = [
        d if p is None else p.sum(0).to(d.dtype) for d, p in zip(results[2:], partials, strict=True)
    ]
    return *results[:2], *sums


# Registration.
def _fake(q, k, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(q_grad, k_grad, q, k, q_weight, k_weight, *rest):
    some = q_grad if q_grad is not None else k_grad
    came = (q_grad, k_grad, q_grad, k_grad)
    return tuple(
        some.new_empty(0) if x is None else x.new_empty(x.shape if need and g is not None else 0)
        for x, g, need in zip((q_grad, k_grad, q_weight, k_weight), came, rest[-1], strict=True)
    )


def _check(q, k, q_weight, k_weight, cos, sin, grid, offset, heads, per_head, eps):
    op = "qk_norm_rope"
    for name, x in (("q", q), ("k", k)):
        require_float(op, name, x)
        require(x.ndim == 3, op, name, x, "a shape [B, L, D]")
        ok = x.stride(-1) == 1 or x.shape[-1] == 1
        require(ok, op, name, x, "a contiguous last axis: call .contiguous() where it is made")
    batch, width, dtype = q.shape[0], q.shape[2], q.dtype
    if k.shape[::2] != q.shape[::2]:  # formatting the text would fix the batch size in a trace
        require(False, op, "k", k, f"shape [{batch}, Lk, {width}] to match q")
    require(k.dtype == dtype, op, "k", k, f"q's dtype {dtype}")
    require(heads > 0 and width % heads == 0, op, "heads", heads, f"a divisor of D = {width}")
    normed = width // heads if per_head else width
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            require_float(op, name, weight)
            require(weight.shape == (normed,), op, name, weight, f"shape [{normed}]")
    if grid:
        check_grid(op, q, k, heads, cos, sin, tuple(grid), tuple(offset))
    elif cos is not None or sin is not None:
        check_tables(op, q, k, heads, cos, sin)
    else:
        ok = q_weight is not None or k_weight is not None
        require(ok, op, "q_weight", q_weight, "a weight or tables: there is nothing to do")
    require_same_device(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)


_forward_op = register("qk_norm_rope", reference, fake=_fake, triton=_triton_forward, check=_check)
_backward_op = register(
    "qk_norm_rope_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)


def _setup_context(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    # The gradient of a rotation needs only its angle, that of a norm also its input.
    kept_q = None if q_weight is None else q
    kept_k = None if k_weight is None else k
    ctx.save_for_backward(kept_q, kept_k, q_weight, k_weight, cos, sin)


def _backward(ctx, q_grad, k_grad):
    if q_grad is None and k_grad is None:
        return (None,) * 11
    needed = list(ctx.needs_input_grad[:4])
    gradients = _backward_op(q_grad, k_grad, *ctx.saved_tensors, *ctx.numbers, needed)
    came = (q_grad, k_grad, q_grad, k_grad)
    kept = [
        g if need and c is not None else None
        for g, need, c in zip(gradients, needed, came, strict=True)
    ]
    return (*kept, *(None,) * 7)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# Public function.
def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    *,
    heads: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    grid: Sequence[int] | None = None,
    offset: Sequence[int] = (0, 0, 0),
    per_head: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize q and k (RMSNorm) if a weight is given, then rotate them if tables are given.

    Args:
        q: ``[B, Lq, D]``; the last axis is contiguous, rows may be strided (a slice of a packed
            projection).
        k: ``[B, Lk, D]``, q's dtype; Lk may differ from Lq if there are no tables.
        q_weight, k_weight: ``[D]``, or ``[d]`` if ``per_head``; any floating dtype.
        heads: D = heads · d; d is even if there are tables.
        cos, sin: the tables of :func:`rope_table`, ``[positions, d/2]``; without a grid, one row
            for every token, ``[L, d/2]`` or ``[L, D/2]`` (each head has its own angles).
            Constants, no gradient.
        grid: (F, H, W) in tokens, F·H·W = L; token l is (f, h, w), frame-major.
        offset: added to the token's index on each axis, for a shard of a larger grid.
        per_head: normalize each head by itself instead of the whole of D.
        eps: added to the mean square.

    Returns:
        ``(q', k')``, contiguous, in the inputs' dtype, each rounded once.

    Raises:
        ValueError: if shapes, dtypes or devices do not match; the grid's product is not L; a table
            is shorter than an axis of the grid plus its offset, or has no row for every token; a
            grid comes without tables; or neither a weight nor a table is given.
    """
    # [0] for an empty grid, which the check refuses: [] means that there is none.
    axes = ([], []) if grid is None else ([int(n) for n in grid] or [0], [*map(int, offset)])
    return _forward_op(q, k, q_weight, k_weight, cos, sin, *axes, heads, per_head, float(eps))
