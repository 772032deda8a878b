"""Quantize to FP8 e4m3 with one scale a token: shared by all operations with FP8 outputs.

    s = max(amax, 2⁻¹⁰⁰) / 448,    q = e4m3(y · (448 / max(amax, 2⁻¹⁰⁰))),    y ≈ q·s

amax is the largest |y| of the token, 448 the largest e4m3 number. e4m3() rounds to nearest, ties to
even, and saturates; NaN stays NaN. The floor keeps both quotients finite: a token of zeros has
zeros and a scale of about 2⁻¹⁰⁹. A token with a NaN is NaN everywhere. A token with an infinity has
an infinite scale and NaN in that place, so a product with it is also NaN.
The quotients are IEEE divisions, rounded once, and elements are multiplied, not divided: the same
float32 y gives the same bits from PyTorch and from Triton, on every device.
"""

from dataclasses import dataclass

import torch

from prfl_fast.kernels.common.fast_math import gelu
from prfl_fast.kernels.common.modulation_rows import token_offset, token_strides
from prfl_fast.kernels.runtime.checks import require
from prfl_fast.kernels.runtime.triton import COUNTS, capability, multiprocessors, tl, triton

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
FLOOR = 2.0**-100


def encode(v: torch.Tensor) -> torch.Tensor:
    """Round float32 to e4m3: to nearest, ties to even, saturating."""
    return v.clamp(-LARGEST, LARGEST).to(FP8)  # older versions of PyTorch cast without saturation


def quantize(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(q, s [..., 1])`` of the formulas above from y."""
    y = y.float().contiguous()
    amax = y.abs().amax(-1, keepdim=True).clamp_(min=FLOOR)
    largest = torch.full_like(amax, LARGEST)  # CUDA multiplies by the inverse of a Python number
    return encode(y * (largest / amax)), amax / largest


def empty_quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return uninitialized q and s for tokens of the shape of ``x [..., D]``."""
    scale = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=FP8), scale


def converts(capability: tuple[int, ...]) -> bool:
    """Return True if the chip converts float32 to e4m3 by an instruction: Ada, Hopper, newer."""
    return capability >= (8, 9)


@triton.jit
def encode_block(b_v, CONVERTS: tl.constexpr):
    """Return the bits (uint8) of :func:`encode`."""
    if CONVERTS:
        b_q = b_v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        b_bits = b_v.to(tl.int32, bitcast=True)
        b_abs = b_bits & 0x7FFFFFFF
        b_small = tl.minimum(b_abs, 0x43E00000)  # at most 448: integers order as the floats do
        # Normal e4m3 numbers, from 2⁻⁶ up: keep 3 of 23 mantissa bits, re-bias the exponent by 120.
        b_code = ((b_small + 0x7FFFF + ((b_small >> 20) & 1)) >> 20) - (120 << 3)
        # Subnormal ones are multiples of 2⁻⁹, the step of a float32 at 2¹⁴, so the sum rounds.
        b_sum = b_small.to(tl.float32, bitcast=True) + 16384.0
        b_code = tl.where(b_small < 0x3C800000, b_sum.to(tl.int32, bitcast=True) & 0xF, b_code)
        b_code = tl.where(b_abs > 0x7F800000, 0x7F, b_code)
        b_q = (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)
    return b_q


@triton.jit
def scales(bits):
    """Return 448 / amax and amax / 448 from the bits of amax."""
    amax = tl.maximum(bits, 0x0D800000).to(tl.float32, bitcast=True)  # at least 2⁻¹⁰⁰
    return tl.div_rn(448.0, amax), tl.div_rn(amax, 448.0)


@triton.jit
def _load_row(
    x_ptr, i_row, rows, stride_xb, stride_xl, length_x, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load a row in its own dtype as a tuple of blocks, zero beyond D and past the last row."""
    p_x = x_ptr + token_offset(i_row, stride_xb, stride_xl, length_x)
    b_xs = ()
    for i in tl.static_range((D + BLOCK_D - 1) // BLOCK_D):
        o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = (o_d < D) & (i_row < rows)
        b_xs += (tl.load(p_x + o_d, mask=m_d, other=0.0),)  # type: ignore[assignment]
    return b_xs


@triton.jit(do_not_specialize=COUNTS)
def row_kernel(
    x_ptr, bias_ptr, y_ptr, y_scale_ptr, stride_xb, stride_xl, length_x, rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, GELU: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    b_next = _load_row(x_ptr, i_row, rows, stride_xb, stride_xl, length_x, D, BLOCK_D)
    while i_row < rows:
        b_xs = b_next
        i_next = i_row + tl.num_programs(0)
        b_next = _load_row(x_ptr, i_next, rows, stride_xb, stride_xl, length_x, D, BLOCK_D)
        b_ys = ()
        b_max = tl.zeros([BLOCK_D], tl.float32)
        for i in tl.static_range(len(b_xs)):
            o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            b_y = b_xs[i].to(tl.float32)
            if bias_ptr is not None:
                b_y += tl.load(bias_ptr + o_d, mask=o_d < D, other=0.0).to(tl.float32)
            if GELU:
                b_y = gelu(b_y)
            b_max = tl.maximum(b_max, tl.abs(b_y), propagate_nan=tl.PropagateNan.ALL)
            b_ys += (b_y,)  # type: ignore[assignment]
        # Integers order as the floats do, and NaN is largest.
        inverse, scale = scales(tl.max(b_max.to(tl.int32, bitcast=True), 0))
        for i in tl.static_range(len(b_ys)):
            o_d = i * BLOCK_D + tl.arange(0, BLOCK_D)
            b_q = encode_block(b_ys[i] * inverse, CONVERTS)
            tl.store(y_ptr + i_row * D + o_d, b_q, mask=o_d < D)
        tl.store(y_scale_ptr + i_row, scale)
        i_row = i_next


@dataclass(frozen=True)
class RowLaunch:
    """Launch of programs that walk over rows, each row in registers in blocks of ``block_d``."""

    block_d: int
    num_warps: int
    registers: int | None  # most of a thread; None: the compiler chooses
    programs: int
    converts: bool

    def constants(self, dim: int, gelu: bool) -> dict[str, int | bool]:
        """Return the ``constexpr`` parameters of the kernel."""
        return {"D": dim, "BLOCK_D": self.block_d, "GELU": gelu, "CONVERTS": self.converts}


def row_launch(rows: int, dim: int, capability: tuple[int, ...]) -> RowLaunch:
    """Choose the fewest warps that hold a row in 72 elements a thread, 8 of each block."""
    num_warps = 1
    while num_warps < 16 and dim > 72 * 32 * num_warps:
        num_warps *= 2
    # One resident wave: each program loads its next row while it quantizes one.
    # More than 64 elements a thread need 168 registers, which leave room for 12 warps.
    warps = 12 if dim > 64 * 32 * num_warps else 16
    # Without a limit ptxas spills four of them on sm_120, to fit 16.
    registers = 168 if warps == 12 and num_warps < 16 and capability >= (12, 0) else None
    programs = min(rows, max(1, warps // num_warps) * multiprocessors(capability))
    return RowLaunch(256 * num_warps, num_warps, registers, programs, converts(capability))


def quantize_rows(
    x: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(q, s)`` of x, or of gelu(x + bias), from Triton."""
    y, scale = empty_quantized(x)
    dim = x.shape[-1]
    rows = x.numel() // dim
    if rows == 0:
        return y, scale
    launch = row_launch(rows, dim, capability(x.device))
    row_kernel[(launch.programs,)](
        x, None if bias is None else bias.contiguous(), y.view(torch.uint8), scale,
        *token_strides(x), rows,
        **launch.constants(dim, gelu), num_warps=launch.num_warps, maxnreg=launch.registers,
    )  # fmt: skip
    return y, scale


def refuse_gradients(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ``ValueError`` if a tensor requires a gradient while gradients are recorded."""
    if not torch.is_grad_enabled():
        return
    for argument, tensor in tensors.items():
        if getattr(tensor, "requires_grad", False):
            expected = (
                "a tensor without requires_grad. 8-bit operations have no gradient: call them "
                "under torch.no_grad(), or use a 16-bit operation"
            )
            require(False, op, argument, tensor, expected)
