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
from prfl_fast.kernels.common.norm_math import token_block
from prfl_fast.kernels.runtime.checks import require
from prfl_fast.kernels.runtime.triton import capability, tl, triton

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


def converts(capability: tuple[int, int]) -> bool:
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
def largest_bits(b_y):
    """Return the bits of the largest |y|: integers order as the floats do, NaN is largest."""
    return tl.max(b_y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def scales(bits):
    """Return 448 / amax and amax / 448 from the bits of amax."""
    amax = tl.maximum(bits, 0x0D800000).to(tl.float32, bitcast=True)  # at least 2⁻¹⁰⁰
    return tl.div_rn(448.0, amax), tl.div_rn(amax, 448.0)


@triton.jit
def _load(p_x, bias_ptr, o_d, D: tl.constexpr, GELU: tl.constexpr):
    """Load columns ``o_d`` of a row, add a given bias, apply GELU if set; zero beyond D."""
    m_d = o_d < D
    b_y = tl.load(p_x + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BD]
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if GELU:
        b_y = gelu(b_y)
    return b_y


@triton.jit
def row_kernel(
    x_ptr, bias_ptr, y_ptr, y_scale_ptr, stride_xb, stride_xl, length_x,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TAIL: tl.constexpr,
    GELU: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_x = x_ptr + token_offset(i_row, stride_xb, stride_xl, length_x)
    p_y = y_ptr + i_row * D
    o_d = tl.arange(0, BLOCK_D)
    b_y = _load(p_x, bias_ptr, o_d, D, GELU)  # [BD]
    bits = largest_bits(b_y)
    if BLOCK_TAIL:
        o_t = BLOCK_D + tl.arange(0, BLOCK_TAIL)
        b_tail = _load(p_x, bias_ptr, o_t, D, GELU)  # [BT]
        inverse, scale = scales(tl.maximum(bits, largest_bits(b_tail)))
        tl.store(p_y + o_t, encode_block(b_tail * inverse, CONVERTS), mask=o_t < D)
    else:
        inverse, scale = scales(bits)
    tl.store(p_y + o_d, encode_block(b_y * inverse, CONVERTS), mask=o_d < D)
    tl.store(y_scale_ptr + i_row, scale)


@dataclass(frozen=True)
class RowLaunch:
    """Launch of one program a row; it holds the row in registers, in one or two blocks."""

    block_d: int
    block_tail: int
    num_warps: int
    converts: bool

    def constants(self, dim: int, gelu: bool) -> dict[str, int | bool]:
        """Return the ``constexpr`` parameters of the kernel."""
        blocks = {"D": dim, "BLOCK_D": self.block_d, "BLOCK_TAIL": self.block_tail}
        return {**blocks, "GELU": gelu, "CONVERTS": self.converts}


def row_launch(dim: int, capability: tuple[int, int]) -> RowLaunch:
    """Choose one or two power-of-two blocks: 8960 columns in 8192 + 1024, not in 16384."""
    block_d, _ = token_block(dim)
    half = block_d // 2
    tail = 1 << (dim - half - 1).bit_length() if dim > half > 16 else half
    if tail < half:
        return RowLaunch(half, tail, token_block(half)[1], converts(capability))
    return RowLaunch(block_d, 0, token_block(dim)[1], converts(capability))


def quantize_rows(
    x: torch.Tensor, bias: torch.Tensor | None, gelu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(q, s)`` of x, or of gelu(x + bias), from Triton."""
    y, scale = empty_quantized(x)
    dim = x.shape[-1]
    rows = x.numel() // dim
    if rows == 0:
        return y, scale
    launch = row_launch(dim, capability(x.device))
    row_kernel[(rows,)](
        x, None if bias is None else bias.contiguous(), y.view(torch.uint8), scale,
        *token_strides(x),
        **launch.constants(dim, gelu), num_warps=launch.num_warps,
    )  # fmt: skip
    return y, scale


def refuse_gradients(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ``ValueError`` if a tensor requires a gradient while gradients are recorded."""
    if not torch.is_grad_enabled():
        return
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            expected = (
                "a tensor without requires_grad. FP8 operations have no gradient: call them under "
                "torch.no_grad(), or use a 16-bit operation"
            )
            require(False, op, argument, tensor, expected)
