"""Bias and tanh-GELU in one pass that saves the pre-activation alone.

    h = x + b,  u = √(2/π)·(h + 0.044715·h³),  y = h/2 · (1 + tanh u)
    d_x = d_y · [ (1 + tanh u)/2 + h/2 · (1 - tanh²u) · √(2/π)·(1 + 3·0.044715·h²) ]
    d_b = Σ_rows d_x

With z = 2u, (1 + tanh u)/2 is the sigmoid σ(z) and (1 - tanh²u)/4 is σ(z)·σ(-z). The kernels
compute both from an exponential: nothing cancels, and no finite h gives an infinity or NaN.
An FP8 output has no gradient. It is y quantized row by row, as in common/fp8.py:

    y_scale = amax |y| / 448,  y_q = e4m3(y / y_scale)

Shapes: x ``[..., D]``, b ``[D]`` or absent, y as x. For an FP8 output x is ``[B, L, D]`` or
``[N, D]``, y_q as x, y_scale as x with 1 for D.
Dtypes: x and b are any mix of float32, bfloat16, float16. h and y are computed in float32 (float64
for float64 x) and y is rounded once, to x's dtype or from float32 to e4m3; h is never rounded; d_b
sums the unrounded d_x.
Saved for backward: x and b; of few elements on a CPU, if both are float32 or both float64, x + b.
Bytes: forward reads x and writes y (FP8: one byte an element and four a row); backward reads x and
d_y and writes d_x.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

from prfl_fast.kernels.common.fast_math import exp2, gelu, reciprocal
from prfl_fast.kernels.common.fp8 import (
    FP8,
    empty_quantized,
    quantize,
    quantize_rows,
    refuse_gradients,
)
from prfl_fast.kernels.common.modulation_rows import check_tokens
from prfl_fast.kernels.common.norm_math import operand
from prfl_fast.kernels.common.strided_rows import gradient_rows, row_axes, row_offset
from prfl_fast.kernels.runtime.checks import (
    cast,
    compute_dtype,
    require,
    require_float,
    require_same_device,
)
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import COUNTS, capability, multiprocessors, tl, triton

gelu_backward = torch.ops.aten.gelu_backward.default
# 2u = h·(SLOPE + CUBE·h²)
SLOPE = 2 * math.sqrt(2 / math.pi)
CUBE = 0.044715 * SLOPE
# On a CPU, σ(2u) of more elements than this takes less time than ATen's tanh (bench/NOTES.md).
FEW_ELEMENTS = 1 << 13
CHUNK = 1 << 18  # elements at a time for each thread, so that float32 copies stay small


# Reference.
def _sum(x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return h = x + bias in ``dtype``, the result of :func:`compute_dtype`."""
    if bias is None:
        return cast(x, dtype)
    return x + (bias if bias.dtype == torch.float32 else cast(bias, dtype))


def _is_recorded(x: torch.Tensor, bias: torch.Tensor | None) -> bool:
    needs = x.requires_grad or (bias is not None and bias.requires_grad)
    return needs and torch.is_grad_enabled()


def _by_sigmoid(x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return h·σ(2u), computed in ``dtype``."""
    slope, rows = operand(SLOPE, dtype, x.device), CHUNK * torch.get_num_threads() // x.shape[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = (t.reshape(-1, x.shape[-1]).split(max(1, rows)) for t in (x, y))
    for x_part, y_part in zip(*parts, strict=True):
        h, same = _sum(x_part, bias, dtype), y.dtype == dtype
        z = torch.addcmul(slope, h, h, value=CUBE, out=y_part if same else torch.empty_like(h))
        z.mul_(h).sigmoid_().mul_(h)
        if not same:
            y_part.copy_(z)
    return y


def reference(
    x: torch.Tensor, bias: torch.Tensor | None, upcast: torch.dtype | None = None
) -> torch.Tensor:
    """Return y from plain PyTorch; ``upcast`` is the dtype computed in and returned."""
    x = x if upcast is None else x.to(upcast)
    if is_compiling():  # a compiler fuses the exponential, which has a faster loop than tanh
        h = _sum(x, bias, compute_dtype(x))
        return cast(h * torch.sigmoid(h * (SLOPE + CUBE * h * h)), x.dtype).contiguous()
    if x.numel() > FEW_ELEMENTS and x.is_cpu and not _is_recorded(x, bias):
        return _by_sigmoid(x, bias, compute_dtype(x))
    # Without a bias ATen widens bfloat16 and float16 inside its loop and rounds once.
    h = x if bias is None else _sum(x, bias, compute_dtype(x))
    # In place, unless h is x or autograd keeps it.
    keep = bias is None or h.requires_grad
    run = torch._C._nn.gelu if keep else torch._C._nn.gelu_  # type: ignore[attr-defined]
    return cast(run(h, approximate="tanh"), x.dtype).contiguous()


def reference_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, need_x: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(d_x, d_bias)``; an empty tensor for each not needed."""
    dtype = compute_dtype(x)
    if is_compiling():
        h = _sum(x, bias, dtype)
        z = h * (SLOPE + CUBE * h * h)
        s = torch.sigmoid(z)
        slope = s + s * torch.sigmoid(-z) * h * (SLOPE + 3 * CUBE * h * h)
        d_h = (cast(grad, dtype) * slope).contiguous()
    else:
        h = x if bias is None else _sum(x, bias, dtype)
        # Contiguous: the bits must not depend on the gradient's strides.
        d_h = gelu_backward(cast(grad, h.dtype).contiguous(), h, approximate="tanh").contiguous()
    d_x = cast(d_h, x.dtype) if need_x or bias is None else x.new_empty(0)
    if bias is None:
        return d_x, x.new_empty(0)
    d_bias = cast(d_h.view(-1, x.shape[-1]).sum(0), bias.dtype) if need_bias else bias.new_empty(0)
    return d_x, d_bias


def reference_fp8(
    x: torch.Tensor, bias: torch.Tensor | None, upcast: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(y_q, y_scale)`` from plain PyTorch; ``upcast`` is the dtype y is computed in."""
    dtype = compute_dtype(x, upcast)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return quantize(torch.nn.functional.gelu(h, approximate="tanh"))


# Triton: a program takes a block of columns, so that it loads the bias once.
@triton.jit
def _tile(i, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return row and first column (int64) of tile ``i``; tiles run along a row first."""
    columns = (D + BLOCK_D - 1) // BLOCK_D
    return (i // columns).to(tl.int64), (i % columns).to(tl.int64) * BLOCK_D


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, bias_ptr, y_ptr, stride_x0, stride_x1, stride_x2, length_x1, length_x2, rows,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_tile, i_d = _tile(tl.program_id(0), D, BLOCK_D)
    o_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)  # [BR]
    o_d = i_d + tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < D
    m_rd = (o_r < rows)[:, None] & m_d[None, :]
    o_x = row_offset(o_r, stride_x0, stride_x1, stride_x2, length_x1, length_x2)
    b_h = tl.load(x_ptr + o_x[:, None] + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        b_h += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]  # [BR, BD]
    b_y = gelu(b_h)  # [BR, BD]
    p_y = y_ptr + o_r[:, None] * D + o_d[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_rd)


@triton.jit
def _load_both(
    x_ptr, grad_ptr, i_row, end, o_d, m_d, stride_x0, stride_x1, stride_x2, length_x1, length_x2,
    stride_g0, stride_g1, stride_g2, length_g1, length_g2, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Load the tiles of x and d_y that start at row ``i_row``; zeros from row ``end`` on."""
    o_r = i_row + tl.arange(0, BLOCK_R)  # [BR]
    m_rd = (o_r < end)[:, None] & m_d[None, :]
    o_x = row_offset(o_r, stride_x0, stride_x1, stride_x2, length_x1, length_x2)
    o_g = row_offset(o_r, stride_g0, stride_g1, stride_g2, length_g1, length_g2)
    b_x = tl.load(x_ptr + o_x[:, None] + o_d[None, :], mask=m_rd, other=0.0)
    return b_x, tl.load(grad_ptr + o_g[:, None] + o_d[None, :], mask=m_rd, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr,
    stride_g0, stride_g1, stride_g2, length_g1, length_g2,
    stride_x0, stride_x1, stride_x2, length_x1, length_x2, rows, rows_per_program,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_chunk, i_d = _tile(tl.program_id(0), D, BLOCK_D)
    o_d = i_d + tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < D
    b_bias = tl.zeros([BLOCK_D], tl.float32)
    if bias_ptr is not None:
        b_bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    i_row = i_chunk * rows_per_program
    end = tl.minimum(i_row + rows_per_program, rows)
    next_x, next_dy = _load_both(
        x_ptr, grad_ptr, i_row, end, o_d, m_d, stride_x0, stride_x1, stride_x2, length_x1,
        length_x2, stride_g0, stride_g1, stride_g2, length_g1, length_g2, BLOCK_R,
    )  # fmt: skip
    while i_row < end:  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
        o_r = i_row + tl.arange(0, BLOCK_R)  # [BR]
        m_rd = (o_r < end)[:, None] & m_d[None, :]
        b_h = next_x.to(tl.float32) + b_bias[None, :]  # [BR, BD]
        b_dy = next_dy.to(tl.float32)
        i_row += BLOCK_R
        # Load the next tiles here: otherwise ptxas waits for each of four loads before it issues
        # the next, and the predicted share of the copy rate is 60 %, not 86 %.
        next_x, next_dy = _load_both(
            x_ptr, grad_ptr, i_row, end, o_d, m_d, stride_x0, stride_x1, stride_x2, length_x1,
            length_x2, stride_g0, stride_g1, stride_g2, length_g1, length_g2, BLOCK_R,
        )  # fmt: skip
        # From |h| = 16 on e is zero. The minimum keeps the slope finite and propagates a NaN.
        b_a = tl.minimum(tl.abs(b_h), 16.0, propagate_nan=tl.PropagateNan.ALL)
        b_a2 = b_a * b_a
        b_e = exp2(b_a * (-2.302208198144325 - 2.302208198144325 * 0.044715 * b_a2))  # exp(-|z|)
        b_s = reciprocal(1.0 + b_e)  # σ(|z|), and e·s = σ(-|z|)
        b_slope = 1.5957691216057308 + 3 * 1.5957691216057308 * 0.044715 * b_a2  # dz/dh
        b_slope *= b_e * b_s * b_s
        b_dh = b_dy * (tl.where(b_h >= 0.0, b_s, b_e * b_s) + b_h * b_slope)  # [BR, BD]
        if partial_ptr is not None:
            b_sum += b_dh
        if dx_ptr is not None:
            p_dx = dx_ptr + o_r[:, None] * D + o_d[None, :]
            tl.store(p_dx, b_dh.to(dx_ptr.dtype.element_ty), mask=m_rd)
    if partial_ptr is not None:
        tl.store(partial_ptr + i_chunk * D + o_d, tl.sum(b_sum, 0), mask=m_d)


# Launch.
TILE = 2048  # elements, on 4 warps: 16 a thread, two 16-byte loads of bfloat16


@dataclass(frozen=True)
class Launch:
    """A tile, the rows of a program (whole tiles), and the programs that share the rows."""

    block_r: int
    block_d: int
    rows_per_program: int
    chunks: int
    num_warps: int = 4


def _tile_shape(dim: int) -> tuple[int, int]:
    """Return rows and columns of a tile: the widest of those with the fewest columns beyond D."""
    widths = [min(width, 1 << (dim - 1).bit_length()) for width in (1024, 512, 256, 128, 64)]
    width = min(widths, key=lambda width: -(-dim // width) * width)
    return TILE // width, width


def forward_launch(rows: int, dim: int) -> Launch:
    """Choose one tile a program."""
    block_r, block_d = _tile_shape(dim)
    return Launch(block_r, block_d, block_r, -(-rows // block_r))


def backward_launch(rows: int, dim: int, capability: tuple[int, ...]) -> Launch:
    """Choose one resident wave, 6 programs a processor; each writes a partial row of d_bias."""
    block_r, block_d = _tile_shape(dim)
    tiles = -(-rows // block_r)
    chunks = max(1, min(tiles, 6 * multiprocessors(capability) // -(-dim // block_d)))
    share = -(-tiles // chunks)
    return Launch(block_r, block_d, share * block_r, -(-tiles // share))


def _grid(launch: Launch, dim: int) -> tuple[int]:
    return (launch.chunks * -(-dim // launch.block_d),)


def _triton_forward(x, bias):
    axes, dim = row_axes(x), x.shape[-1]
    if axes is None:
        return reference(x, bias)
    y = x.new_empty(x.shape)
    rows = x.numel() // dim
    if rows > 0:
        launch = forward_launch(rows, dim)
        forward_kernel[_grid(launch, dim)](
            x, None if bias is None else bias.contiguous(), y, *axes, rows,
            D=dim, BLOCK_R=launch.block_r, BLOCK_D=launch.block_d, num_warps=launch.num_warps,
        )  # fmt: skip
    return y


def _triton_backward(grad, x, bias, need_x, need_bias):
    axes, dim = row_axes(x), x.shape[-1]
    rows, need_bias = x.numel() // dim, need_bias and bias is not None
    if axes is None or rows == 0:
        return reference_backward(grad, x, bias, need_x, need_bias)
    grad, grad_axes = gradient_rows(grad)
    launch = backward_launch(rows, dim, capability(x.device))
    d_x = x.new_empty(x.shape) if need_x else None
    partials = x.new_empty(launch.chunks, dim, dtype=torch.float32) if need_bias else None
    backward_kernel[_grid(launch, dim)](
        grad, x, None if bias is None else bias.contiguous(), d_x, partials,
        *grad_axes, *axes, rows, launch.rows_per_program,
        D=dim, BLOCK_R=launch.block_r, BLOCK_D=launch.block_d, num_warps=launch.num_warps,
    )  # fmt: skip
    d_bias = None if partials is None else partials.sum(0).to(bias.dtype)
    empty = x.new_empty(0) if bias is None else bias.new_empty(0)
    return x.new_empty(0) if d_x is None else d_x, empty if d_bias is None else d_bias


def _triton_fp8(x, bias):
    return quantize_rows(x, bias, gelu=True)  # h, y and the row's largest |y| stay in registers


# Registration.
def _fake(x, bias):
    return x.new_empty(x.shape)


def _fake_backward(grad, x, bias, need_x, need_bias):
    d_x = x.new_empty(x.shape if need_x else (0,))
    if bias is None:
        return d_x, x.new_empty(0)
    return d_x, bias.new_empty(bias.shape if need_bias else (0,))


def _check(x, bias):
    op = "bias_gelu"
    require_float(op, "x", x)
    require(x.ndim > 0 and x.shape[-1] > 0, op, "x", x, "[..., D] with D > 0")
    if bias is not None:
        require_float(op, "bias", bias)
        # The text is made only on failure, because it would fix D in a trace.
        if bias.shape != x.shape[-1:]:
            require(False, op, "bias", bias, f"[{x.shape[-1]}] to match x's last dimension")
        require_same_device(op, x=x, bias=bias)


def _check_fp8(x, bias):
    _check(x, bias)
    check_tokens("bias_gelu", "x", x)


_forward_op = register("bias_gelu", reference, fake=_fake, triton=_triton_forward, check=_check)
_backward_op = register(
    "bias_gelu_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)
_fp8_op = register(
    "gelu_fp8", reference_fp8, fake=lambda x, bias: empty_quantized(x), triton=_triton_fp8,
    check=_check_fp8,
)  # fmt: skip


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    need_x, need_bias = ctx.needs_input_grad
    d_x, d_bias = _backward_op(grad, *ctx.saved_tensors, need_x, need_bias)
    return d_x if need_x else None, d_bias if need_bias else None


_forward_op.register_autograd(
    _backward, setup_context=_setup_context, native=lambda x, bias: x.numel() <= FEW_ELEMENTS
)


# Public function.
def bias_gelu(
    x: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Any:
    """Compute ``gelu(x + bias)`` with the tanh form of GELU.

    Args:
        x: ``[..., D]``, any strides; usually a linear layer's output without its bias. For an FP8
            output ``[B, L, D]`` or ``[N, D]`` with a contiguous last axis.
        bias: ``[D]``, any floating dtype.
        out_dtype: None for x's dtype, or torch.float8_e4m3fn for the input of :func:`fp8_linear`.

    Returns:
        The activation, contiguous, in x's shape and dtype, rounded once from float32 (float64 for
        float64 x). With an FP8 ``out_dtype`` the pair ``(y_q, y_scale)``: y_q float8_e4m3fn of x's
        shape, y_scale float32 of x's shape with 1 for D, both contiguous. ``y_q.float() * y_scale``
        is within 1/16 of each element of y or within 2⁻¹⁰·y_scale.

    Raises:
        ValueError: if a shape, dtype, stride, device or ``out_dtype`` is not as above; or if the
            output is FP8 and an input requires a gradient while gradients are recorded.
    """
    if out_dtype is None:
        return _forward_op(x, bias)
    require(out_dtype == FP8, "bias_gelu", "out_dtype", out_dtype, f"None or {FP8}")
    refuse_gradients("bias_gelu", x=x, bias=bias)
    return _fp8_op(x, bias)
