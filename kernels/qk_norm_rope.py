"""RMSNorm of queries and keys and 3-D rotary positions, both in one operation.

    n = x · rstd,  rstd = 1/√(mean(x²) + eps),  z = n · w          mean over D, or over each head
    y = z · e^{iφ}   on the interleaved pairs (x_{2j}, x_{2j+1}) of every head, as complex numbers
    d_z = d_y · e^{-iφ}
    d_w = Σ_rows d_z · n,  d_x = rstd · (d_z·w - n · mean(d_z·w · n))

Token l of the grid (F, H, W) is (f, h, w), frame-major. Of a head's P = d/2 pairs the first P -
2·(P//3) turn with f, the next P//3 with h, the last P//3 with w (22/21/21 for Wan's d = 128); pair
i of an axis with n pairs turns by φ = position · theta^(-i/n). This is the rotary embedding of
Wan2.1's ``rope_apply``; the norm is its ``WanRMSNorm``.

Shapes: q ``[B, Lq, D]``, k ``[B, Lk, D]``, weights ``[D]`` or ``[d]``, cos and sin ``[positions,
d/2]``.
Dtypes: everything between x and y is float32 (float64 for float64 x), rounded once to x's dtype.
Weights may have another dtype. The tables are computed in float64 and stored in float32.
Saved for backward: q and k where they were normalised (a rotation alone keeps neither), weights and
tables.
Bytes: forward reads and writes q and k once; backward reads q, k and both gradients and writes d_q
and d_k.
"""

import math
from collections.abc import Sequence

import torch

from prfl_fast.kernels._checks import compute_dtype, require, require_float, require_same_device
from prfl_fast.kernels._registry import register

AXES = ("frame", "height", "width")


def _split(pairs: int) -> list[int]:
    """Pairs of a head given to frame, height and width."""
    third = pairs // 3
    return [pairs - 2 * third, third, third]


def rope_table(
    positions: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary angles for positions 0 … ``positions - 1`` of every axis.

    Args:
        positions: rows of the table; the largest grid side plus its offset that will be asked for.
        head_dim: d; even.
        theta: base of the frequencies.
        device: where the tables go.

    Returns:
        ``(cos, sin)``, each float32 ``[positions, d/2]``, computed in float64: columns of the frame
        axis, then height, then width, each axis with its own frequencies theta^(-i/n).

    Raises:
        ValueError: an odd or non-positive ``head_dim``, or no positions.
    """
    require(positions > 0, "rope_table", "positions", positions, "a positive integer")
    require(
        head_dim > 0 and head_dim % 2 == 0,
        "rope_table",
        "head_dim",
        head_dim,
        "a positive even integer",
    )
    rows = torch.arange(positions, dtype=torch.float64)
    angles = torch.cat(
        [
            torch.outer(rows, 1.0 / theta ** (torch.arange(n, dtype=torch.float64) / max(n, 1)))
            for n in _split(head_dim // 2)
        ],
        dim=1,
    )
    return angles.cos().float().to(device), angles.sin().float().to(device)


def _rotations(
    cos: torch.Tensor, sin: torch.Tensor, grid: list[int], offset: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """e^{iφ} of every token of the grid: complex ``[F·H·W, 1, d/2]``."""
    table = torch.complex(cos.to(dtype), sin.to(dtype))
    columns = table.split(_split(table.shape[1]), dim=1)
    turns = []
    for axis, (column, size, start) in enumerate(zip(columns, grid, offset, strict=True)):
        shape = [1, 1, 1, column.shape[1]]
        shape[axis] = size
        turns.append(column[start : start + size].reshape(shape).expand(*grid, -1))
    return torch.cat(turns, dim=-1).flatten(0, 2).unsqueeze(1)


def _pairs(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A contiguous ``[B, L, D]`` seen as complex ``[B, L, heads, d/2]``."""
    return torch.view_as_complex(x.view(*x.shape[:2], heads, -1, 2))


def _rstd(x: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
    """1/√(mean(x²) + eps) over the last dimension, kept, without a widened copy of x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _grouped(x: torch.Tensor, heads: int, per_head: bool) -> torch.Tensor:
    """x with the dimension the norm runs over last: ``[B, L, heads, d]`` or ``[B, L, D]``."""
    return x.unflatten(-1, (heads, -1)) if per_head else x


def _forward_one(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rotations: torch.Tensor | None,
    heads: int,
    per_head: bool,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    if weight is None:
        z = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    else:
        groups = _grouped(x, heads, per_head)
        z = (groups * _rstd(groups, eps, dtype)).mul_(weight).reshape(x.shape).contiguous()
    if rotations is not None:
        _pairs(z, heads).mul_(rotations)
    return z


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(q', k')``, contiguous; ``grid`` is empty for the norm alone.

    ``upcast`` names the dtype computed in and returned.
    """
    dtype = compute_dtype(q, upcast)
    rotations = None if cos is None or sin is None else _rotations(cos, sin, grid, offset, dtype)
    q_out = _forward_one(q, q_weight, rotations, heads, per_head, eps, dtype)
    k_out = _forward_one(k, k_weight, rotations, heads, per_head, eps, dtype)
    return q_out.to(upcast or q.dtype), k_out.to(upcast or k.dtype)


def _fake(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward_one(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    rotations: torch.Tensor | None,
    heads: int,
    per_head: bool,
    eps: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(grad)
    nothing = grad.new_empty(0)
    d_z = grad.to(dtype, copy=True, memory_format=torch.contiguous_format)
    if rotations is not None:
        _pairs(d_z, heads).mul_(rotations.conj())
    if x is None or weight is None:
        return (d_z.to(grad.dtype) if need_x else nothing), nothing
    groups, d_z = _grouped(x, heads, per_head), _grouped(d_z, heads, per_head)
    rstd = _rstd(groups, eps, dtype)
    normed = groups * rstd
    product = d_z * normed
    d_weight = weight.new_empty(0)
    if need_weight:
        d_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
    if not need_x:
        return nothing, d_weight
    mean = product.mul_(weight).mean(-1, keepdim=True)
    d_x = d_z.mul_(weight).sub_(normed.mul_(mean)).mul_(rstd)
    return d_x.reshape(x.shape).to(x.dtype).contiguous(), d_weight


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_q, d_k, d_q_weight, d_k_weight)``; an empty tensor where none is needed or none came.

    q and k are absent where they were not normalised; ``needed`` is in the order of the result.
    """
    some = q_grad if q_grad is not None else k_grad
    assert some is not None
    rotations = None
    if cos is not None and sin is not None:
        rotations = _rotations(cos, sin, grid, offset, compute_dtype(some))
    results = []
    for grad, x, weight, need_x, need_weight in (
        (q_grad, q, q_weight, needed[0], needed[2]),
        (k_grad, k, k_weight, needed[1], needed[3]),
    ):
        if grad is None or not (need_x or need_weight):
            nothing = some.new_empty(0)
            results.append((nothing, nothing.clone() if weight is None else weight.new_empty(0)))
        else:
            args = (grad, x, weight, rotations, heads, per_head, eps, need_x, need_weight)
            results.append(_backward_one(*args))
    (d_q, d_q_weight), (d_k, d_k_weight) = results
    return d_q, d_k, d_q_weight, d_k_weight


def _fake_backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    some = q_grad if q_grad is not None else k_grad
    assert some is not None

    def like(x: torch.Tensor | None, came: torch.Tensor | None, need: bool) -> torch.Tensor:
        if x is None:
            return some.new_empty(0)
        return x.new_empty(x.shape if need and came is not None else (0,))

    return (
        like(q_grad, q_grad, needed[0]),
        like(k_grad, k_grad, needed[1]),
        like(q_weight, q_grad, needed[2]),
        like(k_weight, k_grad, needed[3]),
    )


_forward_op = register("qk_norm_rope", reference, fake=_fake)
_backward_op = register("qk_norm_rope_backward", reference_backward, fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    q, k, q_weight, k_weight, cos, sin, *ctx.numbers = inputs
    ctx.set_materialize_grads(False)
    # A rotation needs only its angle; a norm needs what it normalised.
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
    """RMSNorm of q and k where a weight is given, then 3-D rotary positions where a grid is given.

    Args:
        q: ``[B, Lq, D]``; the last axis is contiguous, rows may be strided (a slice of a packed
            projection).
        k: ``[B, Lk, D]``, q's dtype; Lk may differ from Lq if there is no grid.
        q_weight, k_weight: ``[D]``, or ``[d]`` if ``per_head``; any floating dtype.
        heads: D = heads · d; d is even if there is a grid.
        cos, sin: the tables of :func:`rope_table`, ``[positions, d/2]``; constants, no gradient.
        grid: (F, H, W) in tokens, F·H·W = L; token l is (f, h, w), frame-major.
        offset: added to the token's index on each axis, for a shard of a larger grid.
        per_head: normalise each head by itself instead of the whole of D.
        eps: added to the mean square.

    Returns:
        ``(q', k')``, contiguous, in the inputs' dtype, each rounded once.

    Raises:
        ValueError: shapes, dtypes or devices that do not match; a grid whose product is not L;
            tables shorter than an axis of the grid plus its offset; a grid without tables or tables
            without a grid; neither a weight nor a grid.
    """
    op = "qk_norm_rope"
    for name, x in (("q", q), ("k", k)):
        require_float(op, name, x)
        require(x.ndim == 3, op, name, x, "a shape [B, L, D]")
        ok = x.stride(-1) == 1 or x.shape[-1] == 1
        require(ok, op, name, x, "a contiguous last axis: call .contiguous() where it is made")
    batch, width, dtype = q.shape[0], q.shape[2], q.dtype
    require(k.shape[::2] == q.shape[::2], op, "k", k, f"shape [{batch}, Lk, {width}] to match q")
    require(k.dtype == dtype, op, "k", k, f"q's dtype {dtype}")
    require(heads > 0 and width % heads == 0, op, "heads", heads, f"a divisor of D = {width}")
    normed = width // heads if per_head else width
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            require_float(op, name, weight)
            require(weight.shape == (normed,), op, name, weight, f"shape [{normed}]")
    if grid is None:
        for name, table in (("cos", cos), ("sin", sin)):
            require(
                table is None, op, name, table, "None without a grid, or grid=(F, H, W) with it"
            )
        ok = q_weight is not None or k_weight is not None
        require(ok, op, "q_weight", q_weight, "a weight or a grid: there is nothing to do")
    else:
        _check_grid(op, q, k, heads, cos, sin, grid, offset)
    require_same_device(op, q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    axes = ([], []) if grid is None else ([int(n) for n in grid], [int(n) for n in offset])
    return _forward_op(q, k, q_weight, k_weight, cos, sin, *axes, heads, per_head, float(eps))


def _check_grid(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    heads: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    grid: Sequence[int],
    offset: Sequence[int],
) -> None:
    head_dim, tokens = q.shape[2] // heads, math.prod(grid)
    require(head_dim % 2 == 0, op, "heads", heads, f"a number giving even heads, not {head_dim}")
    require(len(grid) == 3 and min(grid) > 0, op, "grid", grid, "(F, H, W), each at least 1")
    require(len(offset) == 3 and min(offset) >= 0, op, "offset", offset, "three numbers ≥ 0")
    for name, x in (("q", q), ("k", k)):
        require(x.shape[1] == tokens, op, name, x, f"{tokens} tokens for the grid {tuple(grid)}")
    for name, table in (("cos", cos), ("sin", sin)):
        expected = f"[positions, {head_dim // 2}] from rope_table(positions, {head_dim})"
        if table is None:
            raise ValueError(f"{op}: {name} is None, expected {expected}")
        require_float(op, name, table)
        require(table.shape[1:] == (head_dim // 2,), op, name, table, expected)
        for axis, size, start in zip(AXES, grid, offset, strict=True):
            end = start + size
            expected = (
                f"at least {end} positions for the {axis} axis: rope_table({end}, {head_dim})"
            )
            require(end <= table.shape[0], op, name, table, expected)
