"""Gated residual sum, and the next norm with its modulation.

    x_out = x + y·γ_r,  γ_r = gate_table + gate[r]       see residual.py
    h = norm_modulate(x_out, …)                          of the rounded x_out; see modulate.py

r is the row of a token (see common/modulation_rows.py); gate may have another number of rows than
scale and shift.
With t = d_x_out + (the d_x of norm_modulate at x_out for d_h):

    d_x = t,  d_y = t·γ_r,  d_gate_r = Σ t·y over the tokens of row r,  d_gate_table = Σ_r d_gate_r

Shapes: x, y, x_out, h ``[B, L, D]`` or ``[N, D]``; gate ``[R, D]``, gate_table ``[D]``; the rest as
norm_modulate. Dtypes: any mix; sums and products are float32 (float64 for float64 x); x_out and h
are rounded once each, to x's dtype; t is not rounded between the two paths that form it.
Saved for backward: x_out (which the model keeps anyway) and the rows; y only if the gate needs a
gradient.
Bytes: forward reads x and y and writes x_out and h; backward reads x_out, y and both gradients and
writes d_x and d_y. Past D 6144 the sums over tokens need further passes over their inputs.
"""

import itertools

import torch

from prfl_fast.kernels.common.modulation_rows import (
    common_rows,
    count_rows,
    fold_rows,
    row_group,
    segments,
    token_strides,
)
from prfl_fast.kernels.common.norm_math import parameter_gradients
from prfl_fast.kernels.norm.modulate import check_norm
from prfl_fast.kernels.norm.modulate import is_native as norm_is_native
from prfl_fast.kernels.norm.modulate import reference as norm_reference
from prfl_fast.kernels.norm.modulate import reference_backward as norm_reference_backward
from prfl_fast.kernels.norm.residual import check_residual, gate_gradients, gated_gradients
from prfl_fast.kernels.norm.residual import reference as gated_reference
from prfl_fast.kernels.norm.residual import reference_backward as gated_reference_backward
from prfl_fast.kernels.norm.residual_modulate_triton import (
    backward_kernel,
    backward_launch,
    forward_kernel,
    forward_launch,
)
from prfl_fast.kernels.runtime.checks import cast, compute_dtype
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import capability


# Reference.
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
    """Return ``(x_out, h)`` from plain PyTorch; ``upcast``: dtype computed in and returned."""
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
    """Return ``(d_x, d_y, d_gate [R, D], A [R', D], B [R', D])``; A and B as in modulate.py.

    An empty tensor stands for each not needed; the last three are in the dtype computed in.
    ``grad`` is absent if x_out is used only through h. ``rows`` is R': one if scale and shift are
    absent and ``row_index`` names the rows of gate alone.
    """
    dtype = compute_dtype(x_out)
    need_sum = need_x or need_y or need_gate
    norm_index = row_index if scale is not None or rows > 1 else None
    # A widened x_out gives a widened d_x, so the two paths are added before any rounding.
    d_sum, dot, total = norm_reference_backward(
        grad_h, cast(x_out, dtype), weight, scale, scale_table, norm_index, rows, kind, eps,
        need_sum, need_dot, need_total,
    )  # fmt: skip
    if need_sum and grad is not None:
        d_sum.add_(grad)
    if need_y or need_gate:
        d_y, d_gate = gated_reference_backward(
            d_sum, y, gate, gate_table, row_index, y_dtype, need_y, need_gate
        )
    else:
        d_y, d_gate = x_out.new_empty(0, dtype=y_dtype), x_out.new_empty(0, dtype=dtype)
    d_x = cast(d_sum, x_out.dtype).contiguous() if need_x else x_out.new_empty(0)
    return d_x, d_y, d_gate, dot, total


def _norm_index(
    row_index: torch.Tensor | None, scale: torch.Tensor | None, shift: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the index if scale or shift has rows: it may name the rows of the gate alone."""
    return row_index if scale is not None or shift is not None else None


# Launch. The kernels are in residual_modulate_triton.py.
def _triton_forward(
    x, y, gate, weight, bias, gate_table, scale, shift, scale_table, shift_table, row_index, kind,
    eps,
):  # fmt: skip
    out, h = x.new_empty(x.shape), x.new_empty(x.shape)
    dim = x.shape[-1]
    tokens = x.numel() // dim
    if tokens == 0:
        return out, h
    groups = (gate, gate_table), (weight, bias), (scale, shift, scale_table, shift_table)
    affine = all(any(t is not None for t in group) for group in groups)
    gate_rows, norm_rows = count_rows(gate), count_rows(scale, shift)
    rows = common_rows(gate_rows, norm_rows, row_index)
    row_index = row_index if rows > 1 else None
    size = tokens, dim, max(x.itemsize, y.itemsize)
    launch = forward_launch(*size, capability(x.device), affine, row_index is not None)
    vectors = [
        t if t is None else t.contiguous()
        for t in (gate_table, weight, bias, scale_table, shift_table)
    ]
    forward_kernel[(launch.programs,)](
        x, y, out, h, gate, *vectors[:3], scale, shift, *vectors[3:],
        None if row_index is None else row_index.contiguous(),
        *token_strides(x), *token_strides(y),
        *(0 if t is None else t.stride(0) for t in (gate, scale, shift)),
        row_group(rows, gate_rows), row_group(rows, norm_rows),
        tokens, tokens // rows, -(-tokens // launch.programs), eps,
        **launch.constants(dim, kind), **launch.options(),
    )  # fmt: skip
    return out, h


def _triton_backward(
    grad, grad_h, x_out, y, gate, weight, gate_table, scale, scale_table, row_index, gate_rows,
    norm_rows, kind, eps, y_dtype, need_x, need_y, need_gate, need_dot, need_total,
):  # fmt: skip
    dim = x_out.shape[-1]
    tokens = x_out.numel() // dim
    rows = common_rows(gate_rows, norm_rows, row_index)
    row_index = row_index if rows > 1 else None
    itemsize = max(x_out.itemsize, y.itemsize if need_gate else 0)
    sums = need_gate or need_dot or need_total
    launch = backward_launch(tokens, rows, dim, itemsize, capability(x_out.device), sums)
    grad, grad_h = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (grad, grad_h))
    order, bounds = (None, None) if row_index is None else segments(row_index, rows)
    needs = {"dx": need_x, "dy": need_y, "gate_sum": need_gate, "dot": need_dot}
    needs |= {"total": need_total}
    results = {}
    for name, need in needs.items():
        dtype = {"dx": x_out.dtype, "dy": y_dtype}.get(name, torch.float32)
        shape = x_out.shape if name in ("dx", "dy") else (rows, launch.programs, dim)
        results[name] = x_out.new_empty(shape if need else 0, dtype=dtype)
    vectors = [t if t is None else t.contiguous() for t in (gate_table, weight, scale_table)]
    for names in launch.passes:
        written = [results[n] if needs[n] and n in names else None for n in needs]
        if all(t is None for t in written):
            continue
        x = x_out if kind != "none" or written[3] is not None else None
        tokenwise = (grad, grad_h, x, y if written[2] is not None else None)
        strides = [(0, 0, None) if t is None else token_strides(t) for t in tokenwise]
        backward_kernel[(rows * launch.programs,)](
            *tokenwise, *written, gate, *vectors[:2], scale, vectors[2], order, bounds,
            *itertools.chain(*strides), *(0 if t is None else t.stride(0) for t in (gate, scale)),
            row_group(rows, gate_rows), row_group(rows, norm_rows), tokens // rows,
            launch.programs, eps, **launch.constants(dim, kind), **launch.options(),
        )  # fmt: skip
    for name, count in (("gate_sum", gate_rows), ("dot", norm_rows), ("total", norm_rows)):
        if needs[name]:
            results[name] = fold_rows(results[name], count)
    return tuple(results.values())


# Registration.
def _fake(x, y, *_):
    return x.new_empty(x.shape), x.new_empty(x.shape)


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


def _check(x, y, gate, weight, bias, gate_table, scale, shift, scale_table, shift_table, row_index,
           kind, eps):  # fmt: skip
    op = "residual_norm_modulate"
    norm_index = _norm_index(row_index, scale, shift)
    gate_index = row_index if gate is not None or norm_index is None else None
    check_residual(op, x, y, gate, gate_table, gate_index)
    modulation = (scale, shift, scale_table, shift_table, norm_index)
    check_norm(op, x, weight, bias, *modulation, kind, eps)


_forward_op = register(
    "residual_norm_modulate", reference, fake=_fake, triton=_triton_forward, check=_check
)
_backward_op = register(
    "residual_norm_modulate_backward", reference_backward, fake=_fake_backward,
    triton=_triton_backward,
)  # fmt: skip


def _setup_context(ctx, inputs, output):
    _, y, gate, weight, bias, gate_table, scale, shift, scale_table, _ = inputs[:10]
    row_index, ctx.kind, ctx.eps = inputs[10:]
    ctx.set_materialize_grads(False)
    ctx.y_dtype = y.dtype
    ctx.rows = count_rows(scale, shift)
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
        d_x, d_y, d_gate, d_table = gated_gradients(
            ctx, grad, y, gate, gate_table, row_index, flags
        )
        return d_x, d_y, d_gate, None, None, d_table, *(None,) * 7
    need_scale, need_shift, need_scale_table, need_shift_table = modulation
    need_scale = need_scale or need_scale_table
    gated = gate is not None or gate_table is not None
    same = not gated and ctx.y_dtype == x_out.dtype  # d_y equals d_x then
    d_x, d_y, d_rows, dot, total = _backward_op(
        grad, grad_h, x_out, y, gate, weight, gate_table, scale, scale_table, row_index,
        count_rows(gate), ctx.rows, ctx.kind, ctx.eps, ctx.y_dtype,
        need_x or (same and need_y), need_y and not same, any(gate_needs),
        need_weight or need_scale,
        need_bias or need_shift or need_shift_table or (need_scale and bias is not None),
    )  # fmt: skip
    d_gate, d_table = gate_gradients(d_rows, gate_needs)
    d_weight, d_bias, *rest = parameter_gradients(
        dot, total, weight, bias, scale, scale_table, needs
    )
    d_y = (d_x if same else d_y) if need_y else None
    return (
        d_x if need_x else None, d_y, d_gate, d_weight, d_bias, d_table, *rest, None, None, None
    )  # fmt: skip


def _is_native(x, y, gate, weight, bias, gate_table, *norm):
    return count_rows(gate) == 1 and norm_is_native(x, weight, bias, *norm)


_forward_op.register_autograd(_backward, setup_context=_setup_context, native=_is_native)


# Public function.
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
    """Compute :func:`gated_residual`, then ``norm_modulate`` of the rounded sum.

    Args:
        x, y, gate, gate_table: as :func:`gated_residual`.
        weight, bias, scale, shift, scale_table, shift_table, kind, eps: as ``norm_modulate``.
        row_index: int32 or int64, x's shape without D: the row of each token in gate, scale and
            shift.

    Returns:
        ``(x_out, h)``, each of x's shape and dtype, contiguous.

    Raises:
        ValueError: if a shape, dtype, stride, device, ``kind`` or ``eps`` is not as above.
    """
    return _forward_op(
        x, y, gate, weight, bias, gate_table, scale, shift, scale_table, shift_table, row_index,
        kind, float(eps),
    )  # fmt: skip
