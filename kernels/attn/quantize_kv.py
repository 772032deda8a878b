"""Quantize keys and values to 8 bits for ``rollout_attention``.

Keys have a scale for each sample, head and block of N tokens. m is the channel's mean over all
tokens; it shifts all scores of a query alike, so softmax does not depend on it (SageAttention,
arXiv 2410.02367):

    a = max |k - m|,    k8 = round((k - m)·(Q / a)),    s_k = a / Q,    Q = 127 (int8), 448 (e4m3)

Values (e4m3 only) have a scale for each channel of a sample. Softmax weights add up to one, so the
kernel adds the mean to the output once (SageAttention2, arXiv 2411.10958):

    a = max |v - m| over all tokens,    v8 = e4m3((v - m) / s_v),    s_v = a / 448

e4m3 keeps three bits of mantissa at any scale, so scales of blocks would not make values more
accurate. A channel's scale costs one multiplication of the output, a block's scale one for every
block.

Shapes: k, v ``[B, L, D]`` with D = heads · d, rows may be strided; k8 ``[B, heads, blocks, N,
BLOCK_D]``, s_k ``[B, heads, blocks]``, v8 ``[B, heads, blocks, BLOCK_D, N]``: transposed, as Hopper
multiplies e4m3 only by operands whose rows run along the sum. Both are zero beyond L and d, so the
kernel that reads them needs no mask and whole tiles are contiguous. m, s_v ``[B, D]``.
Dtypes: everything but k, v and the results is float32.
Bytes: k and v are read twice and written once at 1 byte an element. The sums over tokens have two
stages, chunks of 256 and then all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from prfl_fast.kernels.common.fp8 import FLOOR, FP8, LARGEST, encode, encode_block
from prfl_fast.kernels.runtime.triton import INTERPRETING, tl, triton

INT8_LARGEST = 127.0
CHUNK = 256  # tokens of one program of the statistics
STATISTICS_TILE = {"BLOCK_T": 16, "BLOCK_C": 128}  # tokens and channels, 4 warps
MERGE_CONSTANTS = {"LARGEST": LARGEST, "BLOCK_R": 16, "BLOCK_C": 64}


class Quantized(NamedTuple):
    """Quantized keys and values; the last three are None where values stay in 16 bits."""

    keys: torch.Tensor
    key_scale: torch.Tensor
    values: torch.Tensor | None
    value_scale: torch.Tensor | None
    value_mean: torch.Tensor | None


def padded(head_dim: int) -> int:
    """Return BLOCK_D, the power of two that holds a head; 8-bit products need at least 32."""
    return max(32, 1 << (head_dim - 1).bit_length())


# Reference: the same arithmetic in PyTorch, with codes in float32.
def quantize_blocks(x: torch.Tensor, block: int, int8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes ``[..., L, d]`` and scales ``[..., L, 1]`` of float32 x, a scale per block."""
    length = x.shape[-2]
    blocks = torch.nn.functional.pad(x, (0, 0, 0, -length % block)).unflatten(-2, (-1, block))
    amax = blocks.abs().amax((-2, -1), keepdim=True).clamp(min=FLOOR)
    largest = torch.full_like(amax, INT8_LARGEST if int8 else LARGEST)
    scaled = blocks * (largest / amax)
    codes = scaled.round() if int8 else encode(scaled).float()
    scale = (amax / largest).expand(*blocks.shape[:-1], 1)
    return codes.flatten(-3, -2)[..., :length, :], scale.flatten(-3, -2)[..., :length, :]


def quantize_channels(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes ``[..., L, d]``, scale and mean ``[..., 1, d]`` of v in float32."""
    mean = v.mean(-2, keepdim=True)
    centered = v - mean
    amax = centered.abs().amax(-2, keepdim=True).clamp(min=FLOOR)
    scale = amax / torch.full_like(amax, LARGEST)
    return encode(centered * (torch.ones_like(scale) / scale)).float(), scale, mean


# Triton.
@triton.jit
def largest_magnitude(b_x):
    """Return max |b_x| of a block ``[rows, columns]``, at least 2⁻¹⁰⁰; NaN if it holds one."""
    b_bits = b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as the floats, NaN largest
    amax = tl.maximum(tl.max(tl.max(b_bits, 1), 0), 0x0D800000)
    return amax.to(tl.float32, bitcast=True)


@triton.jit
def encode_operand(b_x, INT8: tl.constexpr, INTERPRETED: tl.constexpr):
    """Round a float32 block to an operand of an 8-bit product: to nearest, ties to even."""
    if INT8:
        # A float32 from 1.5·2²³ up has steps of 1, so the sum rounds to an integer.
        b_code = ((b_x + 12582912.0) - 12582912.0).to(tl.int8)
    elif INTERPRETED:  # the interpreter's conversion loses a carry of the mantissa
        b_code = encode_block(b_x, False).to(tl.float8e4nv, bitcast=True)
    else:
        b_code = b_x.to(tl.float8e4nv)
    return b_code


@triton.jit(do_not_specialize=["keys"])
def statistics_kernel(
    k_ptr, v_ptr, k_sum_ptr, v_sum_ptr, v_max_ptr, v_min_ptr,
    stride_kb, stride_kl, stride_vb, stride_vl, keys, dim,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute sums of k, and sums and extremes of v, over a chunk of tokens."""
    i_c = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    o_t = i_c * CHUNK + tl.arange(0, BLOCK_T)  # [BT]
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    m_c = o_c < dim
    b_k_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    b_v_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    b_v_max = tl.full([BLOCK_T, BLOCK_C], float("-inf"), tl.float32)
    b_v_min = tl.full([BLOCK_T, BLOCK_C], float("inf"), tl.float32)
    for i in range(0, CHUNK, BLOCK_T):
        m_tc = (o_t + i < keys)[:, None] & m_c[None, :]  # [BT, BC]
        p_k = k_ptr + i_b * stride_kb + (o_t + i)[:, None] * stride_kl + o_c[None, :]
        b_k_sum += tl.load(p_k, mask=m_tc, other=0.0).to(tl.float32)
        if v_ptr is not None:
            p_v = v_ptr + i_b * stride_vb + (o_t + i)[:, None] * stride_vl + o_c[None, :]
            b_v = tl.load(p_v, mask=m_tc, other=0.0).to(tl.float32)
            b_v_sum += b_v
            b_v_max = tl.maximum(b_v_max, tl.where(m_tc, b_v, float("-inf")))
            b_v_min = tl.minimum(b_v_min, tl.where(m_tc, b_v, float("inf")))
    o_p = (i_b * tl.num_programs(0) + i_c) * dim + o_c
    tl.store(k_sum_ptr + o_p, tl.sum(b_k_sum, 0), mask=m_c)
    if v_ptr is not None:
        tl.store(v_sum_ptr + o_p, tl.sum(b_v_sum, 0), mask=m_c)
        tl.store(v_max_ptr + o_p, tl.max(b_v_max, 0), mask=m_c)
        tl.store(v_min_ptr + o_p, tl.min(b_v_min, 0), mask=m_c)


@triton.jit(do_not_specialize=["keys", "chunks"])
def merge_kernel(
    k_sum_ptr, v_sum_ptr, v_max_ptr, v_min_ptr, k_mean_ptr, v_mean_ptr, v_scale_ptr,
    keys, dim, chunks,
    LARGEST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute the means of k and v and the scale of v of BLOCK_C channels from all chunks."""
    i_b = tl.program_id(1).to(tl.int64)
    o_r = tl.arange(0, BLOCK_R)  # [BR]
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BC]
    m_c = o_c < dim
    b_k_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_v_sum = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    b_v_max = tl.full([BLOCK_R, BLOCK_C], float("-inf"), tl.float32)
    b_v_min = tl.full([BLOCK_R, BLOCK_C], float("inf"), tl.float32)
    i_r = 0
    while i_r < chunks:  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
        m_rc = (i_r + o_r < chunks)[:, None] & m_c[None, :]  # [BR, BC]
        o_p = (i_b * chunks + i_r + o_r)[:, None] * dim + o_c[None, :]
        b_k_sum += tl.load(k_sum_ptr + o_p, mask=m_rc, other=0.0)
        if v_sum_ptr is not None:
            b_v_sum += tl.load(v_sum_ptr + o_p, mask=m_rc, other=0.0)
            b_max = tl.load(v_max_ptr + o_p, mask=m_rc, other=float("-inf"))
            b_min = tl.load(v_min_ptr + o_p, mask=m_rc, other=float("inf"))
            b_v_max = tl.maximum(b_v_max, b_max)
            b_v_min = tl.minimum(b_v_min, b_min)
        i_r += BLOCK_R
    o_m = i_b * dim + o_c
    tl.store(k_mean_ptr + o_m, tl.sum(b_k_sum, 0) / keys, mask=m_c)
    if v_sum_ptr is not None:
        b_mean = tl.sum(b_v_sum, 0) / keys
        b_amax = tl.maximum(tl.max(b_v_max, 0) - b_mean, b_mean - tl.min(b_v_min, 0))
        b_amax = tl.maximum(b_amax, 7.888609052210118e-31)  # 2⁻¹⁰⁰
        tl.store(v_mean_ptr + o_m, b_mean, mask=m_c)
        tl.store(v_scale_ptr + o_m, tl.div_rn(b_amax, LARGEST), mask=m_c)


@triton.jit(do_not_specialize=["keys"])
def quantize_kernel(
    k_ptr, v_ptr, k_mean_ptr, v_mean_ptr, v_scale_ptr, k8_ptr, k_scale_ptr, v8_ptr,
    stride_kb, stride_kl, stride_vb, stride_vl, keys,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    INT8: tl.constexpr, LARGEST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write k8 and its scale, and v8, of one block of tokens of one head."""
    i_n = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * tl.num_programs(1) + i_h
    blocks = tl.num_programs(0)
    dim = tl.num_programs(1).to(tl.int64) * D
    o_n = tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    o_l = i_n * BLOCK_N + o_n  # [BN]
    m_d = o_d < D
    m_ld = (o_l < keys)[:, None] & m_d[None, :]  # [BN, BD]
    o_c = i_h * D + o_d  # [BD]
    p_tile = (i_bh * blocks + i_n) * (BLOCK_N * BLOCK_D)
    p_k = k_ptr + i_b * stride_kb + o_l[:, None] * stride_kl + o_c[None, :]
    b_k = tl.load(p_k, mask=m_ld, other=0.0).to(tl.float32)  # [BN, BD]
    b_mean = tl.load(k_mean_ptr + i_b * dim + o_c, mask=m_d, other=0.0)  # [BD]
    b_k = tl.where(m_ld, b_k - b_mean[None, :], 0.0)
    amax = largest_magnitude(b_k)
    b_k8 = encode_operand(b_k * tl.div_rn(LARGEST, amax), INT8, INTERPRETED)
    tl.store(k8_ptr + p_tile + o_n[:, None] * BLOCK_D + o_d[None, :], b_k8)
    tl.store(k_scale_ptr + i_bh * blocks + i_n, tl.div_rn(amax, LARGEST))
    if v_ptr is not None:
        p_v = v_ptr + i_b * stride_vb + o_l[:, None] * stride_vl + o_c[None, :]
        b_v = tl.load(p_v, mask=m_ld, other=0.0).to(tl.float32)  # [BN, BD]
        b_mean = tl.load(v_mean_ptr + i_b * dim + o_c, mask=m_d, other=0.0)  # [BD]
        b_scale = tl.load(v_scale_ptr + i_b * dim + o_c, mask=m_d, other=1.0)  # [BD]
        b_v = tl.where(m_ld, b_v - b_mean[None, :], 0.0) * tl.div_rn(1.0, b_scale)[None, :]
        b_v8 = encode_operand(tl.trans(b_v), False, INTERPRETED)  # [BD, BN]
        tl.store(v8_ptr + p_tile + o_d[:, None] * BLOCK_N + o_n[None, :], b_v8)


# Launch.
@dataclass(frozen=True)
class Launch:
    """Launch of the kernel that quantizes: a program holds a block of one head."""

    block_n: int
    block_d: int
    num_warps: int

    def constants(self, head_dim: int, int8: bool) -> dict[str, int | float]:
        """Return the ``constexpr`` parameters of the kernel that quantizes."""
        tile = {"D": head_dim, "BLOCK_D": self.block_d, "BLOCK_N": self.block_n}
        largest = INT8_LARGEST if int8 else LARGEST
        return {**tile, "INT8": int8, "LARGEST": largest, "INTERPRETED": INTERPRETING}


def quantize_launch(head_dim: int, block_n: int) -> Launch:
    """Choose 32 elements a thread, of k and then of v: a scale needs its whole block."""
    block_d = padded(head_dim)
    return Launch(block_n, block_d, min(16, max(4, block_n * block_d // 1024)))


def quantize_keys_and_values(
    k: torch.Tensor, v: torch.Tensor, heads: int, block_n: int, int8: bool, values: bool
) -> Quantized:
    """Quantize keys in blocks of ``block_n``, and with ``values`` also v, by Triton."""
    batch, keys, dim = k.shape
    launch = quantize_launch(dim // heads, block_n)
    chunks, blocks = -(-keys // CHUNK), -(-keys // block_n)
    partial = torch.empty(
        4 if values else 1, batch, chunks, dim, dtype=torch.float32, device=k.device
    )
    final = torch.empty(3 if values else 1, batch, dim, dtype=torch.float32, device=k.device)
    partials = [*partial, None, None, None][:4]
    k_mean, v_mean, v_scale = [*final, None, None][:3]
    tile = (batch, heads, blocks, launch.block_n, launch.block_d)
    k8 = torch.empty(tile, dtype=torch.int8 if int8 else FP8, device=k.device)
    k_scale = torch.empty(tile[:3], dtype=torch.float32, device=k.device)
    v8 = torch.empty(*tile[:3], *tile[:2:-1], dtype=FP8, device=k.device) if values else None
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    statistics_kernel[(chunks, -(-dim // STATISTICS_TILE["BLOCK_C"]), batch)](
        k, v if values else None, *partials, *strides, keys, dim,
        CHUNK=CHUNK, **STATISTICS_TILE, num_warps=4,
    )  # fmt: skip
    merge_kernel[(-(-dim // MERGE_CONSTANTS["BLOCK_C"]), batch)](
        *partials, k_mean, v_mean, v_scale, keys, dim, chunks,
        **MERGE_CONSTANTS, num_warps=4,
    )  # fmt: skip
    quantize_kernel[(blocks, heads, batch)](
        k, v if values else None, k_mean, v_mean, v_scale, k8, k_scale, v8, *strides,
        keys, **launch.constants(dim // heads, int8), num_warps=launch.num_warps,
    )  # fmt: skip
    return Quantized(k8, k_scale, v8, v_scale, v_mean)
