"""LayerNorm or RMSNorm, optional affine, then modulation by compact rows, in one pass over x.

    y = (x̂·w + b)·(1 + s_r) + h_r,    s_r = scale_table + scale[r],    h_r = shift_table + shift[r]
    x̂ = (x - mean x)·ρ, ρ = 1/√(var x + ε)  for kind "layer";
    x̂ = x·ρ,            ρ = 1/√(mean x² + ε)  for "rms";      x̂ = x  for "none"

Token n of N uses modulation row r = n // (N / R) of R rows (R = 1, B, B·F and B·L are this one
rule), or row ``row_index[n]``. With g_r = w·(1 + s_r), and the sums A_r = Σ dy·x̂ and B_r = Σ dy
over the tokens of row r:

    d_x = ρ·(g·dy - mean(g·dy) - x̂·mean(g·dy·x̂))  "layer";   no first mean  "rms";   g·dy  "none"
    d_scale_r = A_r·w + B_r·b        d_weight = Σ_r (1 + s_r)·A_r      d_scale_table = Σ_r d_scale_r
    d_shift_r = B_r                  d_bias = Σ_r (1 + s_r)·B_r        d_shift_table = Σ_r d_shift_r

An FP8 output has no gradient. It is y quantized token by token, as in common/fp8.py:

    y_scale = amax |y| / 448,  y_q = e4m3(y / y_scale)

Shapes: x, y, y_q ``[B, L, D]`` or ``[N, D]``; y_scale as x with 1 for D; w, b, tables ``[D]``;
scale, shift ``[R, D]``; row_index as x without D.
Dtypes: x and parameters are any mix of float32, bfloat16, float16. Statistics, rows, products, A
and B are float32 (float64 for float64 x). y and every gradient are rounded once, to their tensor's
dtype; y_q is rounded once from float32.
Saved for backward: the inputs. The backward computes mean and ρ again from the row of x that d_x
needs anyway. Of few tokens on a CPU, PyTorch saves both (see ``native`` in runtime/registry.py).
Bytes: forward reads x and writes y (FP8: one byte an element and four a token); backward reads x
and dy and writes d_x. The rows are few.
"""

from typing import Any

import torch
from torch.compiler import is_compiling

from prfl_fast.kernels.common.fp8 import FP8, converts, empty_quantized, quantize, refuse_gradients
from prfl_fast.kernels.common.modulation_rows import (
    by_row,
    check_rows,
    check_tokens,
    count_rows,
    per_token,
    segments,
    sum_by_row,
    table_plus_rows,
    token_strides,
)
from prfl_fast.kernels.common.norm_math import given, normalize, parameter_gradients, row_gain
from prfl_fast.kernels.norm.modulate_triton import (
    backward_kernel,
    backward_launch,
    forward_kernel,
    forward_launch,
)
from prfl_fast.kernels.runtime.checks import cast, compute_dtype, require
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import capability

KINDS = ("layer", "rms", "none")
layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default
# Up to this many tokens ATen's sums of the affine part are as exact as sum(): it adds in order.
FEW_TOKENS = 64


# Reference: the CPU's implementation; tests compare with it in upcast=torch.float64.
def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    kind: str,
    eps: float,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """Return y from differentiable PyTorch; ``upcast``: dtype computed in and returned."""
    dtype = compute_dtype(x, upcast)
    gain, offset, rows = weight, bias, 1
    if kind != "layer" or not scale is shift is scale_table is shift_table is None:
        modulation = table_plus_rows(scale_table, scale, dtype)
        gain = row_gain(weight, modulation, dtype)
        offset = table_plus_rows(shift_table, shift, dtype)
        if bias is not None:
            lifted = cast(bias, dtype)[None] if modulation is None else bias * (1 + modulation)
            offset = lifted if offset is None else offset + lifted
        rows = max(count_rows(gain), count_rows(offset))
    if kind == "layer" and rows == 1:
        # One row of gain and offset is ATen's affine: one pass, which widens x inside its loop.
        gain = gain if gain is None else cast(gain.view(-1), dtype)
        offset = offset if offset is None else cast(offset.view(-1), dtype)
        wide = x if upcast is None else x.to(upcast)
        return torch.layer_norm(wide, x.shape[-1:], gain, offset, eps)
    y = by_row(normalize(cast(x, dtype), kind, eps)[0], rows, row_index)
    if gain is not None:
        gain = per_token(gain, row_index if gain.shape[0] > 1 else None)
    if offset is not None:
        offset = per_token(offset, row_index if offset.shape[0] > 1 else None)
    if gain is not None and offset is not None:
        y = torch.addcmul(offset, y, gain)
    elif gain is not None:
        y = y * gain
    elif offset is not None:
        y = y + offset
    elif kind == "none":
        y = y.clone()
    y = cast(y, upcast or x.dtype)
    return (y if y.shape == x.shape else y.reshape(x.shape)).contiguous()


def _layer_norm_backward(dy, x, gain, eps, mask):
    """Return ``(d_x, A, B)`` of a few tokens with one row of gain ``[1, D]``, from ATen alone."""
    wide, shape, row = cast(x, dy.dtype), x.shape[-1:], gain.view(-1)
    # Only mean and ρ are used. Without an affine part ATen takes longer.
    _, mean, rho = torch.native_layer_norm(wide, shape, row, row, eps)
    d_x, dot, total = layer_norm_backward(dy, wide, shape, mean, rho, row, row, mask)
    sums = (
        t[None] if need else gain.new_empty(0) for t, need in ((dot, mask[1]), (total, mask[2]))
    )
    return cast(d_x, x.dtype).contiguous(), *sums


def reference_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    rows: int,
    kind: str,
    eps: float,
    need_x: bool,
    need_dot: bool,
    need_total: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``(d_x, A [R, D], B [R, D])`` of the formulas above; empty tensors if not needed."""
    dtype = compute_dtype(x)
    gain = row_gain(weight, table_plus_rows(scale_table, scale, dtype), dtype) if need_x else None
    one_row = gain is not None and gain.shape[0] == 1
    if one_row and kind == "layer" and rows == 1 and x.numel() <= FEW_TOKENS * x.shape[-1]:
        return _layer_norm_backward(cast(grad, dtype), x, gain, eps, [True, need_dot, need_total])
    dy = by_row(cast(grad, dtype), rows, row_index)
    dot = total = None
    if need_total:
        total = sum_by_row(dy, rows, row_index)
    wide = by_row(cast(x, dtype), rows, row_index)
    x_hat, mean, rho = normalize(wide, kind, eps) if need_x or need_dot else (wide, None, None)
    if need_dot:
        # ATen's LayerNorm needs x̂ no more; in place where it is ours and no compiler fuses it.
        spare = kind == "layer" and not is_compiling()
        dot = sum_by_row(x_hat.mul_(dy) if spare else dy * x_hat, rows, row_index)
    d_x = None
    if need_x:
        d_hat = dy
        if gain is not None and not (one_row and kind == "layer"):
            d_hat = dy * per_token(gain, None if one_row else row_index)
        if kind == "layer":  # ATen has the same formula, and takes one row of gain
            row = gain.view(-1) if gain is not None and one_row else None
            shape, mask = wide.shape[-1:], [True, False, False]
            d_x, _, _ = layer_norm_backward(d_hat, wide, shape, mean, rho, row, row, mask)
        elif kind == "rms":
            d_x = (d_hat - x_hat * (d_hat * x_hat).mean(-1, keepdim=True)).mul_(rho)
        else:
            d_x = d_hat.clone()
        d_x = cast(d_x, x.dtype)
        d_x = (d_x if d_x.shape == x.shape else d_x.reshape(x.shape)).contiguous()
    return given(x, d_x, x.dtype), given(x, dot, dtype), given(x, total, dtype)


def reference_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    shift_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    kind: str,
    eps: float,
    upcast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(y_q, y_scale)`` from plain PyTorch; ``upcast`` is the dtype y is computed in."""
    dtype = compute_dtype(x, upcast)
    y = reference(
        x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps, upcast=dtype
    )
    return quantize(y)


# Launch. The kernels are in modulate_triton.py.
def _run_forward(y, y_scale, x, weight, bias, scale, shift, scale_table, shift_table, row_index,
                 kind, eps):  # fmt: skip
    """Launch the forward kernel; it writes FP8 rows where ``y_scale`` is given."""
    dim = x.shape[-1]
    tokens = x.numel() // dim
    if tokens == 0:
        return
    chip, fp8 = capability(x.device), y_scale is not None
    affine, rows = weight is not None or bias is not None, scale is not None or shift is not None
    launch = forward_launch(tokens, dim, kind, chip, row_index is not None or affine and rows)
    vectors = [t if t is None else t.contiguous() for t in (weight, bias, scale_table, shift_table)]
    forward_kernel[(launch.programs,)](
        x, y, y_scale, *vectors[:2], scale, shift, *vectors[2:],
        None if row_index is None else row_index.contiguous(),
        *token_strides(x),
        0 if scale is None else scale.stride(0), 0 if shift is None else shift.stride(0),
        tokens, tokens // count_rows(scale, shift), -(-tokens // launch.programs), eps,
        **launch.constants(dim, kind), CONVERTS=fp8 and converts(chip), **launch.options(),
    )  # fmt: skip


def triton_forward(x, *parameters):
    y = x.new_empty(x.shape)
    _run_forward(y, None, x, *parameters)
    return y


def _triton_fp8(x, *parameters):
    y, y_scale = empty_quantized(x)
    _run_forward(y.view(torch.uint8), y_scale, x, *parameters)
    return y, y_scale


def triton_backward(
    grad, x, weight, scale, scale_table, row_index, rows, kind, eps, need_x, need_dot, need_total
):  # fmt: skip
    dim = x.shape[-1]
    tokens = x.numel() // dim
    if tokens == 0:
        needs = (need_x, need_dot, need_total)
        return reference_backward(
            grad, x, weight, scale, scale_table, None, rows, kind, eps, *needs
        )
    itemsize, sums = max(grad.itemsize, x.itemsize), need_dot or need_total
    launch = backward_launch(tokens, rows, dim, itemsize, capability(x.device), sums)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    order, bounds = (None, None) if row_index is None else segments(row_index, rows)
    d_x = x.new_empty(x.shape) if need_x else None
    dot, total = (
        x.new_empty(rows, launch.programs, dim, dtype=torch.float32) if need else None
        for need in (need_dot, need_total)
    )
    vectors = [t if t is None else t.contiguous() for t in (weight, scale_table)]
    needed = x if need_dot or (need_x and kind != "none") else None
    backward_kernel[(rows * launch.programs,)](
        grad, needed, d_x, dot, total, vectors[0], scale, vectors[1], order, bounds,
        *token_strides(grad), *token_strides(x), 0 if scale is None else scale.stride(0),
        tokens // rows, launch.programs, eps,
        **launch.constants(dim, kind), **launch.options(),
    )  # fmt: skip
    empty = x.new_empty(0, dtype=torch.float32)
    sums = [empty.clone() if t is None else t.sum(1) for t in (dot, total)]
    return x.new_empty(0) if d_x is None else d_x, *sums


# Registration.
def _check(x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps):
    op = "norm_modulate"
    check_tokens(op, "x", x)
    check_norm(op, x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps)


def check_norm(op, x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps):
    """Raise ``ValueError`` unless the arguments of a norm and its modulation fit x."""
    vectors = {"weight": weight, "bias": bias}
    vectors |= {"scale_table": scale_table, "shift_table": shift_table}
    check_rows(op, x, vectors, {"scale": scale, "shift": shift}, row_index)
    require(kind in KINDS, op, "kind", kind, f"one of {', '.join(KINDS)}")
    require(eps >= 0, op, "eps", eps, "a number ≥ 0")


def _fake_backward(
    grad, x, weight, scale, scale_table, row_index, rows, kind, eps, need_x, need_dot, need_total
):  # fmt: skip
    sums, dtype = (rows, x.shape[-1]), compute_dtype(x)
    return (
        x.new_empty(x.shape if need_x else 0),
        x.new_empty(sums if need_dot else 0, dtype=dtype),
        x.new_empty(sums if need_total else 0, dtype=dtype),
    )


_forward_op = register(
    "norm_modulate", reference, fake=lambda x, *_: x.new_empty(x.shape), triton=triton_forward,
    check=_check,
)  # fmt: skip
_backward_op = register(
    "norm_modulate_backward", reference_backward, fake=_fake_backward, triton=triton_backward
)
_fp8_op = register(
    "norm_modulate_fp8", reference_fp8, fake=lambda x, *_: empty_quantized(x), triton=_triton_fp8,
    check=_check,
)  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, weight, bias, scale, shift, scale_table, _, row_index, ctx.kind, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, scale, scale_table, row_index)
    ctx.rows = count_rows(scale, shift)


def _backward(ctx, grad):
    x, weight, bias, scale, scale_table, row_index = ctx.saved_tensors
    need_x, *needs = ctx.needs_input_grad[:7]
    need_weight, need_bias, need_scale, need_shift, need_scale_table, need_shift_table = needs
    need_scale = need_scale or need_scale_table
    d_x, dot, total = _backward_op(
        grad, x, weight, scale, scale_table, row_index, ctx.rows, ctx.kind, ctx.eps, need_x,
        need_weight or need_scale,
        need_bias or need_shift or need_shift_table or (need_scale and bias is not None),
    )  # fmt: skip
    rest = parameter_gradients(dot, total, weight, bias, scale, scale_table, needs)
    return d_x if need_x else None, *rest, None, None, None


def is_native(x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, eps):
    """Return True if the reference is a call of ATen's LayerNorm, whose sums are exact enough."""
    few = x.numel() <= FEW_TOKENS * x.shape[-1]
    return few and kind == "layer" and row_index is None and count_rows(scale, shift) == 1


_forward_op.register_autograd(_backward, setup_context=_setup_context, native=is_native)


# Public function.
def norm_modulate(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    scale_table: torch.Tensor | None = None,
    shift_table: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Normalize each token and modulate it: ``(norm(x)·w + b)·(1 + s) + h``, rounded once.

    Args:
        x: ``[B, L, D]`` or ``[N, D]``; the last axis is contiguous, the others have any stride.
        weight, bias: ``[D]``, the affine part of the norm; one and zero where absent.
        scale, shift: ``[R, D]``; R divides the tokens, and token n of N uses row n // (N / R).
            Only the last axis has to be contiguous, so slices of ``[R, 6, D]`` are not copied.
        scale_table, shift_table: ``[D]``, added to every row of scale and shift in float32.
        row_index: int32 or int64, x's shape without D: the row of each token, in place of that
            rule. Values outside [0, R) raise ``ValueError`` on the CPU and are undefined behavior
            on CUDA, where a check would stall the stream.
        kind: "layer" (LayerNorm), "rms" (RMSNorm) or "none".
        eps: added to the variance (layer) or the mean square (rms).
        out_dtype: None for x's dtype, or torch.float8_e4m3fn for the input of :func:`fp8_linear`.

    Returns:
        y, of x's shape and dtype, contiguous. With an FP8 ``out_dtype`` the pair
        ``(y_q, y_scale)``: y_q float8_e4m3fn of x's shape, y_scale float32 of x's shape with 1 for
        D, both contiguous. ``y_q.float() * y_scale`` is within 1/16 of each element of y or within
        2⁻¹⁰·y_scale.

    Raises:
        ValueError: if a shape, dtype, stride, device, ``kind``, ``eps`` or ``out_dtype`` is not as
            above; or if the output is FP8 and an input requires a gradient while gradients are
            recorded.
    """
    args = (x, weight, bias, scale, shift, scale_table, shift_table, row_index, kind, float(eps))
    if out_dtype is None:
        return _forward_op(*args)
    require(out_dtype == FP8, "norm_modulate", "out_dtype", out_dtype, f"None or {FP8}")
    names = ("x", "weight", "bias", "scale", "shift", "scale_table", "shift_table")
    refuse_gradients("norm_modulate", **dict(zip(names, args, strict=False)))
    return _fp8_op(*args)
