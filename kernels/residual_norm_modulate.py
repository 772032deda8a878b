"""Gated residual sum, and the next norm with its modulation.

    x_out = x + y·γ_r,  γ_r = gate_table + gate[r]
    h = norm_modulate(x_out, …)                          of the rounded x_out; see norm_modulate.py

r is the row of a token (see _rows.py); gate may have another number of rows than scale and shift.
With t = d_x_out + (the d_x of norm_modulate at x_out for d_h):

    d_x = t,  d_y = t·γ_r,  d_gate_r = Σ t·y over the tokens of row r,  d_gate_table = Σ_r d_gate_r

Shapes: x, y, x_out, h ``[B, L, D]`` or ``[N, D]``; gate ``[R, D]``, gate_table ``[D]``; the rest as
norm_modulate. Dtypes: any mix; sums and products are float32 (float64 for float64 x); x_out and h
are rounded once each, to x's dtype; t is not rounded between the two paths that form it.
Saved for backward: x_out (which the model keeps anyway) and the rows; y only if the gate needs a
gradient. gated_residual saves no x at all.
Bytes: forward reads x and y and writes x_out and h; backward reads x_out, y and both gradients and
writes d_x and d_y.
"""

import torch

from prfl_fast.kernels import _rows
from prfl_fast.kernels._checks import compute_dtype, require, require_same_device
from prfl_fast.kernels._norm import parameter_gradients
from prfl_fast.kernels._registry import register
from prfl_fast.kernels.norm_modulate import KINDS
from prfl_fast.kernels.norm_modulate import reference as norm_reference
from prfl_fast.kernels.norm_modulate import reference_backward as norm_reference_backward


# Reference.
def gated_reference(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """x_out in plain PyTorch; ``upcast`` names the dtype computed in and returned."""
    dtype = compute_dtype(x, upcast)
    rows = _rows.table_plus_rows(gate_table, gate, dtype)
    if rows is None:
        # Two tensors of one dtype add with a single rounding in ATen already.
        x_out = x + y if upcast is None else x.to(dtype) + y.to(dtype)
        return x_out.to(upcast or x.dtype).contiguous()
    row_index = row_index if gate is not None else None
    wide_x, wide_y = (_rows.by_row(t.to(dtype), len(rows), row_index) for t in (x, y))
    x_out = torch.addcmul(wide_x, wide_y, _rows.per_token(rows, row_index))
    return x_out.to(upcast or x.dtype).reshape(x.shape).contiguous()


def gated_reference_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    y_dtype: torch.dtype,
    need_y: bool,
    need_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_y, d_gate [R, D])``, the latter in the wide dtype; an empty tensor for each not needed.

    ``y`` may be absent if the gate needs no gradient.
    """
    dtype = compute_dtype(grad)
    d_y, d_gate = grad.new_empty(0, dtype=y_dtype), grad.new_empty(0, dtype=dtype)
    rows = _rows.table_plus_rows(gate_table, gate, dtype)
    if rows is None:
        return (grad.to(y_dtype, copy=True).contiguous() if need_y else d_y), d_gate
    row_index = row_index if gate is not None else None
    wide = _rows.by_row(grad.to(dtype), len(rows), row_index)
    if need_gate and y is not None:
        product = wide * _rows.by_row(y.to(dtype), len(rows), row_index)
        d_gate = _rows.sum_by_row(product, len(rows), row_index)
    if need_y:
        d_y = (wide * _rows.per_token(rows, row_index)).to(y_dtype).reshape(grad.shape)
    return d_y.contiguous(), d_gate


def reference(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    kind: str,
    eps: float,
    upcast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x_out, h)`` in plain PyTorch; ``upcast`` names the dtype computed in and returned."""
    x_out = gated_reference(x, y, gate, gate_table, row_index, upcast)
    row_index = _norm_index(row_index, scale, shift)
    modulation = (scale, shift, scale_table, shift_table, row_index)
    return x_out, norm_reference(x_out, weight, bias, *modulation, kind, eps, upcast)


def reference_backward(
    grad: torch.Tensor | None,
    grad_h: torch.Tensor,
    x_out: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    weight: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    gate_rows: int,
    rows: int,
    kind: str,
    eps: float,
    y_dtype: torch.dtype,
    need_x: bool,
    need_y: bool,
    need_gate: bool,
    need_dot: bool,
    need_total: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_x, d_y, d_gate [R, D], A [R', D], B [R', D])``; A and B as in norm_modulate.py.

    An empty tensor for each not needed; the last three are in the wide dtype. ``grad`` is absent if
    x_out is not used except through h; ``rows`` is R', one where scale and shift are absent and
    ``row_index`` names the rows of gate alone.
    """
    dtype = compute_dtype(x_out)
    need_sum = need_x or need_y or need_gate
    norm_index = row_index if scale is not None or rows > 1 else None
    # A widened x_out gives a widened d_x: the two paths are added before anything is rounded.
    d_sum, dot, total = norm_reference_backward(
        grad_h, x_out.to(dtype), weight, scale, scale_table, norm_index, rows, kind, eps,
        need_sum, need_dot, need_total,
    )  # fmt: skip
    d_x, d_y = x_out.new_empty(0), x_out.new_empty(0, dtype=y_dtype)
    d_gate = x_out.new_empty(0, dtype=dtype)
    if need_sum and grad is not None:
        d_sum.add_(grad)
    if need_y or need_gate:
        d_y, d_gate = gated_reference_backward(
            d_sum, y, gate, gate_table, row_index, y_dtype, need_y, need_gate
        )
    if need_x:
        d_x = d_sum.to(x_out.dtype).contiguous()
    return d_x, d_y, d_gate, dot, total


def _norm_index(
    row_index: torch.Tensor | None, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> torch.Tensor | None:
    """The index as far as it concerns the norm: it may name the rows of the gate alone."""
    return row_index if scale is not None or shift is not None else None


# Registration.
def _fake(x, y, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_gated_backward(grad, y, gate, gate_table, row_index, y_dtype, need_y, need_gate):
    d_y = grad.new_empty(grad.shape if need_y else 0, dtype=y_dtype)
    has_gate = need_gate and not (gate is None and gate_table is None)
    sums = (_rows.count_rows(gate), grad.shape[-1]) if has_gate else 0
    return d_y, grad.new_empty(sums, dtype=compute_dtype(grad))


def _fake_backward(
    grad, grad_h, x_out, y, gate, weight, gate_table, scale, scale_table, row_index, gate_rows,
    rows, kind, eps, y_dtype, need_x, need_y, need_gate, need_dot, need_total,
):  # fmt: skip
    dtype, dim = compute_dtype(x_out), x_out.shape[-1]
    return (
        x_out.new_empty(x_out.shape if need_x else 0),
        x_out.new_empty(x_out.shape if need_y else 0, dtype=y_dtype),
        x_out.new_empty((gate_rows, dim) if need_gate else 0, dtype=dtype),
        x_out.new_empty((rows, dim) if need_dot else 0, dtype=dtype),
        x_out.new_empty((rows, dim) if need_total else 0, dtype=dtype),
    )


_gated_op = register("gated_residual", gated_reference, fake=lambda x, *_: x.new_empty(x.shape))
_gated_backward_op = register(
    "gated_residual_backward", gated_reference_backward, fake=_fake_gated_backward
)
_forward_op = register("residual_norm_modulate", reference, fake=_fake)
_backward_op = register("residual_norm_modulate_backward", reference_backward, fake=_fake_backward)


def _gate_gradients(d_gate, needs, dtypes):
    """Gradients of gate and gate_table (or None) from the sums over the tokens of each row."""
    sums = (d_gate, d_gate.sum(0) if needs[1] else None)
    return [s.to(d) if need else None for s, need, d in zip(sums, needs, dtypes, strict=True)]


def _dtypes(*tensors):
    return [None if t is None else t.dtype for t in tensors]


def _setup_gated_context(ctx, inputs, output):
    _, y, gate, gate_table, row_index = inputs
    ctx.y_dtype, ctx.dtypes = y.dtype, _dtypes(gate, gate_table)
    need_gate = any(ctx.needs_input_grad[2:4])
    ctx.save_for_backward(y if need_gate else None, gate, gate_table, row_index)


def _gated_backward(ctx, grad):
    y, gate, gate_table, row_index = ctx.saved_tensors
    return *_gated_gradients(ctx, grad, y, gate, gate_table, row_index, ctx.needs_input_grad), None


def _gated_gradients(ctx, grad, y, gate, gate_table, row_index, needs_input_grad):
    """Gradients of x, y, gate, gate_table of the gated sum alone."""
    need_x, need_y, *needs = needs_input_grad[:4]
    if gate is None and gate_table is None:
        return grad if need_x else None, grad.to(ctx.y_dtype) if need_y else None, None, None
    d_y = d_gate = None
    if need_y or any(needs):
        d_y, d_gate = _gated_backward_op(
            grad, y, gate, gate_table, row_index, ctx.y_dtype, need_y, any(needs)
        )
    return (
        grad if need_x else None,
        d_y if need_y else None,
        *_gate_gradients(d_gate, needs, ctx.dtypes[:2]),
    )


_gated_op.register_autograd(_gated_backward, setup_context=_setup_gated_context)


def _setup_context(ctx, inputs, output):
    _, y, gate, weight, bias, gate_table, scale, shift, scale_table, shift_table = inputs[:10]
    row_index, ctx.kind, ctx.eps = inputs[10:]
    ctx.set_materialize_grads(False)
    ctx.y_dtype = y.dtype
    ctx.dtypes = _dtypes(gate, gate_table, weight, bias, scale, shift, scale_table, shift_table)
    ctx.rows = _rows.count_rows(scale, shift)
    need_gate = ctx.needs_input_grad[2] or ctx.needs_input_grad[5]
    kept_y = y if need_gate else None
    ctx.save_for_backward(
        output[0], kept_y, gate, weight, bias, gate_table, scale, scale_table, row_index
    )


def _backward(ctx, grad, grad_h):
    x_out, y, gate, weight, bias, gate_table, scale, scale_table, row_index = ctx.saved_tensors
    need_x, need_y, need_gate, need_weight, need_bias, need_table, *modulation = (
        ctx.needs_input_grad[:10]
    )
    gate_needs, needs = (need_gate, need_table), (need_weight, need_bias, *modulation)
    if grad is None and grad_h is None:
        return (None,) * 13
    if grad_h is None:
        flags = (need_x, need_y, *gate_needs)
        d_x, d_y, d_gate, d_table = _gated_gradients(
            ctx, grad, y, gate, gate_table, row_index, flags
        )
        return d_x, d_y, d_gate, None, None, d_table, *(None,) * 7
    need_scale, need_shift, need_scale_table, need_shift_table = modulation
    need_scale = need_scale or need_scale_table
    gated = gate is not None or gate_table is not None
    same = not gated and ctx.y_dtype == x_out.dtype  # then d_y is d_x
    d_x, d_y, d_rows, dot, total = _backward_op(
        grad, grad_h, x_out, y, gate, weight, gate_table, scale, scale_table, row_index,
        _rows.count_rows(gate), ctx.rows, ctx.kind, ctx.eps, ctx.y_dtype,
        need_x or (same and need_y), need_y and not same, any(gate_needs),
        need_weight or need_scale,
        need_bias or need_shift or need_shift_table or (need_scale and bias is not None),
    )  # fmt: skip
    d_gate, d_table = _gate_gradients(d_rows, gate_needs, ctx.dtypes[:2])
    d_weight, d_bias, *rest = parameter_gradients(
        dot, total, weight, bias, scale, scale_table, needs, ctx.dtypes[2:]
    )
    d_y = (d_x if same else d_y) if need_y else None
    return (
        d_x if need_x else None, d_y, d_gate, d_weight, d_bias, d_table, *rest, None, None, None
    )  # fmt: skip


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# Public functions.
def _check_residual(
    op: str,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> None:
    _rows.check_tokens(op, "x", x)
    _rows.check_tokens(op, "y", y)
    require(y.shape == x.shape, op, "y", y, f"x's shape {list(x.shape)}")
    require_same_device(op, x=x, y=y)
    _rows.check_rows(op, x, {"gate_table": gate_table}, {"gate": gate}, row_index)


def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_table: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x + y·(gate_table + gate[row])``, or ``x + y`` without a gate, rounded once to x's dtype.

    Args:
        x, y: ``[B, L, D]`` or ``[N, D]``; the last axis is contiguous, the others have any stride.
        gate: ``[R, D]``; R divides the tokens, and token n of N uses row n // (N / R).
        gate_table: ``[D]``, added to every row of gate in float32, or the whole gate.
        row_index: int32 or int64, x's shape without D: names the row of each token instead.

    Returns:
        x_out, of x's shape and dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above.
    """
    _check_residual("gated_residual", x, y, gate, gate_table, row_index)
    return _gated_op(x, y, gate, gate_table, row_index)


def residual_norm_modulate(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    gate_table: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    shift_table: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gated_residual`, then ``norm_modulate`` of the rounded sum.

    Args:
        x, y, gate, gate_table: as :func:`gated_residual`.
        weight, bias, scale, shift, scale_table, shift_table, kind, eps: as ``norm_modulate``.
        row_index: int32 or int64, x's shape without D: names the row of each token in gate,
            scale and shift.

    Returns:
        ``(x_out, h)``, each of x's shape and dtype, contiguous.

    Raises:
        ValueError: a shape, dtype, stride, device, ``kind`` or ``eps`` other than the above.
    """
    op = "residual_norm_modulate"
    norm_index = _norm_index(row_index, scale, shift)
    gate_index = row_index if gate is not None or norm_index is None else None
    _check_residual(op, x, y, gate, gate_table, gate_index)
    vectors = {
        "weight": weight, "bias": bias, "scale_table": scale_table, "shift_table": shift_table,
    }  # fmt: skip
    _rows.check_rows(op, x, vectors, {"scale": scale, "shift": shift}, norm_index)
    require(kind in KINDS, op, "kind", kind, f"one of {', '.join(KINDS)}")
    require(eps >= 0, op, "eps", eps, "a number ≥ 0")
    return _forward_op(
        x, y, gate, weight, bias, gate_table, scale, shift, scale_table, shift_table, row_index,
        kind, float(eps),
    )  # fmt: skip
