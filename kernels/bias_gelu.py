"""Bias and tanh-GELU in one pass; only the pre-activation is kept.

    h = x + b,  u = √(2/π)·(h + 0.044715·h³),  y = h/2 · (1 + tanh u)
    d_x = d_y · [ (1 + tanh u)/2 + h/2 · (1 - tanh²u) · √(2/π)·(1 + 3·0.044715·h²) ]
    d_b = Σ_rows d_x

With z = 2u, (1 + tanh u)/2 is the sigmoid σ(z) and (1 - tanh²u)/4 is σ(z)·σ(-z), which the kernels
take from an exponential: nothing cancels, and no finite h gives an infinity or NaN.

Shapes: x ``[..., D]``, b ``[D]`` or absent, y as x.
Dtypes: h and y are computed in float32 (float64 for float64 x) and rounded once to x's dtype; h is
never rounded; d_b sums the unrounded d_x. The bias may have another dtype than x.
Saved for backward: x and b. Autograd of ``gelu(x + b)`` keeps x + b besides x's producer.
Bytes: forward reads x and writes y; backward reads x and d_y and writes d_x.
"""

import itertools
from dataclasses import dataclass

import torch

from prfl_fast.kernels._checks import compute_dtype, require, require_float, require_same_device
from prfl_fast.kernels._registry import register
from prfl_fast.kernels._row_axes import gradient_rows, row_axes, row_offset
from prfl_fast.kernels._triton import AotCase, argument_types, capability, processors, tl, triton

CHUNK = 1 << 18  # elements widened at once on the CPU: a float32 piece stays in a 2 MB cache


# Reference.
def _pieces(x: torch.Tensor) -> list[slice]:
    """Runs of rows of ``[N, D]``: cache-sized on the CPU, everything at once elsewhere."""
    rows = max(1, CHUNK // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def reference(
    x: torch.Tensor, bias: torch.Tensor | None, upcast: torch.dtype | None = None
) -> torch.Tensor:
    """y in plain PyTorch; ``upcast`` names the dtype computed in and returned."""
    x = x if upcast is None else x.to(upcast)
    if bias is None:  # ATen widens bfloat16 and float16 inside its loop and rounds once
        return torch.nn.functional.gelu(x, approximate="tanh").contiguous()
    dtype = compute_dtype(x)
    y, bias = x.new_empty(x.shape), bias.to(dtype)
    x, out = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    for rows in _pieces(x):
        h = x[rows].to(dtype) + bias
        out[rows] = torch.ops.aten.gelu_(h, approximate="tanh")
    return y


def reference_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, need_x: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_x, d_bias)``; an empty tensor where none is needed."""
    if bias is None:
        d_x = torch.ops.aten.gelu_backward(grad, x, approximate="tanh").contiguous()
        return d_x, x.new_empty(0)
    dtype, dim = compute_dtype(x), x.shape[-1]
    d_x = x.new_empty(x.shape if need_x else (0,))
    d_bias = torch.zeros(dim, dtype=dtype, device=x.device)
    x, grad, wide_bias = x.reshape(-1, dim), grad.reshape(-1, dim), bias.to(dtype)
    out = d_x.view(-1, dim) if need_x else d_x
    for rows in _pieces(x):
        h = x[rows].to(dtype) + wide_bias
        d_h = torch.ops.aten.gelu_backward(grad[rows].to(dtype), h, approximate="tanh")
        if need_x:
            out[rows] = d_h
        if need_bias:
            d_bias += d_h.sum(0)
    return d_x, d_bias.to(bias.dtype) if need_bias else bias.new_empty(0)


# Triton: a program takes a block of columns, so that it loads the bias once.
@triton.jit
def _tile(i, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Row number and first column (int64) of tile ``i``: tiles go along a row first."""
    columns = (D + BLOCK_D - 1) // BLOCK_D
    return (i // columns).to(tl.int64), (i % columns).to(tl.int64) * BLOCK_D


@triton.jit
def _forward_kernel(
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
    b_z = b_h * (1.5957691216057308 + 1.5957691216057308 * 0.044715 * b_h * b_h)
    b_y = b_h / (1.0 + tl.exp(-b_z))  # [BR, BD]; where the exponential is infinite, -0
    p_y = y_ptr + o_r[:, None] * D + o_d[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_rd)


@triton.jit
def _backward_kernel(
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
    while i_row < end:  # with numpy ≥ 2.4 the interpreter takes no tensors as bounds of range()
        o_r = i_row + tl.arange(0, BLOCK_R)  # [BR]
        m_rd = (o_r < end)[:, None] & m_d[None, :]
        o_x = row_offset(o_r, stride_x0, stride_x1, stride_x2, length_x1, length_x2)
        o_g = row_offset(o_r, stride_g0, stride_g1, stride_g2, length_g1, length_g2)
        p_g = grad_ptr + o_g[:, None] + o_d[None, :]
        b_h = tl.load(x_ptr + o_x[:, None] + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
        b_dy = tl.load(p_g, mask=m_rd, other=0.0).to(tl.float32)  # [BR, BD]
        b_h += b_bias[None, :]  # [BR, BD]
        b_h2 = b_h * b_h
        b_z = b_h * (1.5957691216057308 + 1.5957691216057308 * 0.044715 * b_h2)
        b_slope = b_h * (1.5957691216057308 + 3 * 1.5957691216057308 * 0.044715 * b_h2)  # h·dz/dh
        b_e = tl.exp(-tl.abs(b_z))
        b_s = 1.0 / (1.0 + b_e)  # σ(|z|)
        # From |h| = 16 on e is zero in float32, and the slope may be infinite.
        b_slope = tl.where(tl.abs(b_h) < 16.0, b_slope * b_e * b_s * b_s, 0.0)
        b_dh = b_dy * (tl.where(b_z >= 0.0, b_s, b_e * b_s) + b_slope)  # [BR, BD]
        if partial_ptr is not None:
            b_sum += b_dh
        if dx_ptr is not None:
            p_dx = dx_ptr + o_r[:, None] * D + o_d[None, :]
            tl.store(p_dx, b_dh.to(dx_ptr.dtype.element_ty), mask=m_rd)
        i_row += BLOCK_R
    if partial_ptr is not None:
        tl.store(partial_ptr + i_chunk * D + o_d, tl.sum(b_sum, 0), mask=m_d)


# Launch.
TILE = 2048  # elements, on 4 warps: 16 a thread, two 16-byte loads of bfloat16


@dataclass(frozen=True)
class Launch:
    """A tile, the rows of a program (a multiple of the tile's), and how many share the rows."""

    block_r: int
    block_d: int
    rows_per_program: int
    chunks: int
    num_warps: int = 4


def _tile_shape(dim: int) -> tuple[int, int]:
    """Rows and columns of a tile: the widest of those that reach least far beyond D."""
    widths = [min(width, 1 << (dim - 1).bit_length()) for width in (1024, 512, 256, 128, 64)]
    width = min(widths, key=lambda width: -(-dim // width) * width)
    return TILE // width, width


def map_launch(rows: int, dim: int) -> Launch:
    """One tile a program: the forward, and the backward without a sum over rows."""
    block_r, block_d = _tile_shape(dim)
    return Launch(block_r, block_d, block_r, -(-rows // block_r))


def sum_launch(rows: int, dim: int, capability: tuple[int, int]) -> Launch:
    """One resident wave, 6 programs of some 80 registers; each writes a partial row of d_bias."""
    block_r, block_d = _tile_shape(dim)
    tiles = -(-rows // block_r)
    chunks = max(1, min(tiles, 6 * processors(capability) // -(-dim // block_d)))
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
        launch = map_launch(rows, dim)
        _forward_kernel[_grid(launch, dim)](
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
    launch = sum_launch(rows, dim, capability(x.device)) if need_bias else map_launch(rows, dim)
    d_x = x.new_empty(x.shape) if need_x else None
    partials = x.new_empty(launch.chunks, dim, dtype=torch.float32) if need_bias else None
    _backward_kernel[_grid(launch, dim)](
        grad, x, None if bias is None else bias.contiguous(), d_x, partials,
        *grad_axes, *axes, rows, launch.rows_per_program,
        D=dim, BLOCK_R=launch.block_r, BLOCK_D=launch.block_d, num_warps=launch.num_warps,
    )  # fmt: skip
    d_bias = None if partials is None else partials.sum(0).to(bias.dtype)
    empty = x.new_empty(0) if bias is None else bias.new_empty(0)
    return x.new_empty(0) if d_x is None else d_x, empty if d_bias is None else d_bias


def aot_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """What Wan compiles, the widths of its feed-forward; ``every``: all flags and more widths."""
    both, only_x, only_bias = ("dx_ptr", "partial_ptr"), ("dx_ptr",), ("partial_ptr",)
    chosen = [
        (8960, "bf16", "bf16", both),
        (13824, "bf16", "bf16", both),
        (13824, "bf16", "", only_x),
        (13824, "fp32", "fp32", both),
    ]
    if every:
        dims = (100, 5120, 8192, 8960, 13824)
        chosen = [
            (dim, dtype, bias, results)
            for dim, dtype, bias in itertools.product(dims, ("bf16", "fp32"), ("", "bf16", "fp32"))
            for results in ((both, only_x, only_bias) if bias else (only_x,))
        ]
    cases = {}
    for dim, dtype, bias, results in chosen:
        pointers = dict.fromkeys(("x_ptr", "y_ptr", "grad_ptr", *results), dtype)
        pointers |= {"bias_ptr": bias} if bias else {}
        pointers |= {"partial_ptr": "fp32"} if "partial_ptr" in results else {}
        for kernel in (_forward_kernel, _backward_kernel):
            flags = "+".join(n.removesuffix("_ptr") for n in results if n in kernel.arg_names)
            name = f"{kernel.__name__.split('_')[1]} {flags}".strip()
            label = f"{name} {dtype} D={dim} bias {bias or 'none'}"
            one_axis = dict.fromkeys(n for n in kernel.arg_names if n.startswith("length"))
            types = argument_types(kernel, pointers, one_axis)
            launch = map_launch(32760, dim)
            constexprs = {"D": dim, "BLOCK_R": launch.block_r, "BLOCK_D": launch.block_d}
            cases[label] = AotCase(label, kernel, types, constexprs, launch.num_warps)
    return list(cases.values())


# Registration.
def _fake(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, need_x: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    d_x = x.new_empty(x.shape if need_x else (0,))
    if bias is None:
        return d_x, x.new_empty(0)
    return d_x, bias.new_empty(bias.shape if need_bias else (0,))


_forward_op = register("bias_gelu", reference, fake=_fake, triton=_triton_forward)
_backward_op = register(
    "bias_gelu_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    need_x, need_bias = ctx.needs_input_grad
    d_x, d_bias = _backward_op(grad, *ctx.saved_tensors, need_x, need_bias)
    return d_x if need_x else None, d_bias if need_bias else None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# Public function.
def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``gelu(x + bias)`` with the tanh form of GELU.

    Args:
        x: ``[..., D]``, any strides; usually a linear layer's output without (or with) its bias.
        bias: ``[D]``, any floating dtype.

    Returns:
        The activation, contiguous, in x's shape and dtype, rounded once from float32 (float64 for
        float64 x).

    Raises:
        ValueError: a bias that is not ``[D]``, integer tensors, or different devices.
    """
    require_float("bias_gelu", "x", x)
    require(x.ndim > 0 and x.shape[-1] > 0, "bias_gelu", "x", x, "[..., D] with D > 0")
    if bias is not None:
        require_float("bias_gelu", "bias", bias)
        require(
            bias.shape == x.shape[-1:],
            "bias_gelu",
            "bias",
            bias,
            f"[{x.shape[-1]}] to match x's last dimension",
        )
        require_same_device("bias_gelu", x=x, bias=bias)
    return _forward_op(x, bias)
