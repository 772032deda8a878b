"""Attention in 8 bits for rollouts: no gradient, a few percent of error, 8-bit matrix products.

``rollout_choice.py`` chooses the kernel of another package where one runs, else this one:

    s = q̂ k̂ᵀ,  m_i = max_j s_ij,  p_ij = 2^(s_ij - m_i),  out_i = Σ_j p̂_ij v̂_j / Σ_j p_ij + mean v

q̂ is q · scale · log₂ e in 8 bits, one scale for each query of a head, quantized by the kernel that
multiplies it, since every query belongs to one program. k̂ and v̂ come from
``quantize_kv.py``: k without its mean over tokens, v without its own. p is rounded in blocks of
keys against the running maximum, 2⁸ times as large, so that e4m3 keeps weights down to 2⁻¹⁷ of the
largest; the sum that divides is of the weights before that.

Variants:   q k     p v        chips
  int8_fp8  int8    e4m3       Ada, Hopper, consumer Blackwell
  fp8       e4m3    e4m3       data-center Blackwell, where Triton's int8 product is not tcgen05
  int8      int8    16 bits    Ampere, which has no e4m3; v is read as it is

On the chips of the first row int8 products are as fast as e4m3's or faster, and int8 has 127 steps
where e4m3 has three bits of mantissa. The relative error against float64 for white noise of unit q,
k and v is 4.0 % in int8_fp8, 5.4 % in fp8 and 1.2 % in int8 (4096 tokens, root mean squares, by the
emulation below): the average of white noise is small. For tokens that resemble each other the error
is a fifth to a half of that. With uneven tokens and outlier channels in q, 2048 of them, it is
4.4, 17.5 and 3.4 %; one scale for a block of 128 queries had 6.5, 18.5 and 5.8 %.

Gradient: none. Elsewhere (older chips, float32, float64, head sizes other than multiples of 16 up
to 256) the op is ``attention``, with one warning for each reason.
Shapes: q ``[B, Lq, D]``, k and v ``[B, Lk, D]`` with D = heads · d, rows may be strided; out ``[B,
Lq, D]``.
Dtypes: bfloat16 and float16; scales, softmax and sums over blocks of keys are float32, out is
rounded once. Tensor cores of Ada and Hopper add e4m3 products with fewer bits than float32 has
(SageAttention2, arXiv 2411.10958), so every block's product starts at zero and is added in float32.
FLOPs: 4·B·heads·Lq·Lk·d. Bytes: q is read and out written once; 8-bit k and v are read once for
each block of queries, mostly from L2.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from prfl_fast.kernels.attn.exact import attention, check_heads, default_scale
from prfl_fast.kernels.attn.quantize_kv import (
    INT8_LARGEST,
    encode_operand,
    padded,
    quantize_blocks,
    quantize_channels,
    quantize_keys_and_values,
)
from prfl_fast.kernels.attn.rollout_backends import CALLS, run_backend
from prfl_fast.kernels.attn.rollout_choice import NAMES, choose, explain
from prfl_fast.kernels.attn.rollout_variants import chip_of, resolve
from prfl_fast.kernels.common.fp8 import LARGEST, encode, refuse_gradients
from prfl_fast.kernels.runtime.checks import require
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import INTERPRETING, tl, triton

# Capability whose block sizes the reference uses without a GPU.
NOMINAL = {"int8_fp8": (9, 0), "fp8": (10, 0), "int8": (8, 0)}
LOG2_E = math.log2(math.e)
SHIFT = 8  # weights are multiplied by 2⁸ before e4m3, whose largest number is 448


# Reference: the CPU's implementation, block by block like the kernel.
def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    variant: str,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """Return out from 8-bit operands; with ``upcast`` exact attention in that dtype."""
    if upcast is not None:
        exact = [t.to(upcast).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
        weights = torch.softmax(exact[0] @ exact[1].mT * scale, -1)
        return (weights @ exact[2]).transpose(1, 2).flatten(2)
    variant = choose(q, k, v, heads, scale, variant)
    if variant in CALLS:
        return run_backend(variant, q, k, v, heads, scale)
    chosen = resolve(q, heads, variant)
    if chosen is None:
        return attention(q, k, v, heads=heads, scale=scale)[0]
    launch = attention_launch(q.shape[-1] // heads, chosen, chip_of(q.device) or NOMINAL[chosen])
    return emulate(q, k, v, heads, scale, chosen, launch.block_m, launch.block_n)


def emulate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    variant: str,
    block_m: int,
    block_n: int,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the kernels' arithmetic in PyTorch; only sums of products may round differently.

    Blocks of queries skip the blocks of keys for which ``keep [B, heads, Lq / block_m, Lk /
    block_n]`` is False. If all are skipped, out is zero.
    """
    q_, k_, v_ = (t.unflatten(-1, (heads, -1)).transpose(1, 2).float() for t in (q, k, v))
    int8, small = variant != "fp8", variant != "int8"
    q8, q_scale = quantize_blocks(q_ * (scale * LOG2_E), 1, int8)
    k8, k_scale = quantize_blocks(k_ - k_.mean(-2, keepdim=True), block_n, int8)
    v8, v_scale, v_mean = quantize_channels(v_) if small else (v_, 1.0, 0.0)
    top = q8.new_full((*q8.shape[:-1], 1), -math.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q8)
    if keep is not None:
        keep = keep.repeat_interleave(block_m, -2)[..., : q.shape[1], :, None]
    order = [*range(-(-k.shape[1] // block_n))]
    if keep is not None and k.shape[1] % block_n:  # the sparse kernel begins with a ragged block
        order = [order.pop(), *order]
    for i_n in order:
        keys = slice(i_n * block_n, (i_n + 1) * block_n)
        factor = q_scale * k_scale[..., keys, :][..., :1, :]
        s = (q8 @ k8[..., keys, :].mT) * factor
        if keep is not None:
            s = s.masked_fill(~keep[..., i_n, :], -math.inf)
        top, before = torch.maximum(top, s.amax(-1, keepdim=True)), top
        p = torch.exp2(s - (top - SHIFT if small else top))
        decay = torch.exp2(before - top)
        if keep is not None:  # -∞ less -∞, before the first block, is NaN
            p, decay = (t.masked_fill(top == -math.inf, 0) for t in (p, decay))
        total = total * decay + p.sum(-1, keepdim=True)
        p = encode(p).float() if small else p.to(v.dtype).float()
        out = out * decay + p @ v8[..., keys, :]
    out = out / total * v_scale + v_mean
    if keep is not None:
        out = out.masked_fill(~keep.any(-2), 0)
    return out.to(q.dtype).transpose(1, 2).flatten(2)


# Triton.
@triton.jit
def quantize_queries(
    b_q, LARGEST: tl.constexpr, INT8: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Return codes ``[BM, BD]`` and scales ``[BM]`` of float32 queries."""
    b_bits = b_q.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # ordered as the floats, NaN largest
    b_amax = tl.maximum(tl.max(b_bits, 1), 0x0D800000).to(tl.float32, bitcast=True)  # [BM]
    b_scaled = b_q * tl.div_rn(LARGEST, b_amax)[:, None]
    return encode_operand(b_scaled, INT8, INTERPRETED), tl.div_rn(b_amax, LARGEST)


@triton.jit
def add_block(
    b_q, b_q_scale, b_top, b_total, b_out, k8_ptr, k_scale_ptr, v_ptr, i_n, rest, stride_vl,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SHIFT: tl.constexpr, INTERPRETED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the online softmax; with TAIL only its first ``rest`` keys."""
    o_n = tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    i_tile = tl.cast(i_n, tl.int64) * (BLOCK_N * BLOCK_D)
    b_k = tl.load(k8_ptr + i_tile + o_n[:, None] * BLOCK_D + o_d[None, :])  # [BN, BD]
    b_s = tl.dot(b_q, tl.trans(b_k)).to(tl.float32)  # [BM, BN]
    if TAIL:
        b_s = tl.where((o_n < rest)[None, :], b_s, float("-inf"))
    b_largest = tl.max(b_s, 1)  # [BM]
    # Adding zero gives b_q_scale the layout of the scores before the loop. Otherwise Triton moves
    # the product of the scales through shared memory in each trip, and sm_80 spills 72 bytes.
    b_scale = tl.fma(b_largest, tl.zeros([BLOCK_M], tl.float32), b_q_scale)
    b_scale *= tl.load(k_scale_ptr + i_n)
    b_new = tl.maximum(b_top, b_largest * b_scale)  # [BM]
    b_decay = tl.exp2(b_top - b_new)
    b_p = tl.exp2(b_s * b_scale[:, None] - (b_new - SHIFT)[:, None])  # [BM, BN]
    if TAIL:  # after the scale: -∞ times the scale of a block of zeros is NaN
        b_p = tl.where((o_n < rest)[None, :], b_p, 0.0)
    b_total = b_total * b_decay + tl.sum(b_p, 1)
    if SHIFT > 0:
        b_v = tl.load(v_ptr + i_tile + o_d[:, None] * BLOCK_N + o_n[None, :])  # [BD, BN]
        b_pv = tl.dot(encode_operand(b_p, False, INTERPRETED), tl.trans(b_v))  # [BM, BD]
        # From b_out * b_decay + b_pv Triton would make b_out the product's accumulator, which adds
        # e4m3 products with fewer bits than float32 has.
        b_out = tl.fma(b_out, tl.broadcast_to(b_decay[:, None], [BLOCK_M, BLOCK_D]), b_pv)
    else:
        p_v = v_ptr + tl.cast(i_n, tl.int64) * BLOCK_N * stride_vl
        p_v += o_n.to(tl.int64)[:, None] * stride_vl + o_d[None, :]  # [BN, BD]
        if TAIL:
            b_v = tl.load(p_v, mask=(o_n < rest)[:, None] & (o_d < D)[None, :], other=0.0)
        elif D < BLOCK_D:
            b_v = tl.load(p_v, mask=(o_d < D)[None, :], other=0.0)
        else:
            b_v = tl.load(p_v)
        b_p = b_p.to(b_v.dtype)
        if INTERPRETED:  # the interpreter multiplies bfloat16 as integers
            b_p, b_v = b_p.to(tl.float32), b_v.to(tl.float32)
        b_out = tl.dot(b_p, b_v, b_out * b_decay[:, None])
    return b_new, b_total, b_out


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_kernel(
    q_ptr, k8_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_mean_ptr, out_ptr,
    stride_qb, stride_ql, stride_vb, stride_vl, queries, keys, heads, softmax_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    INT8: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr,
    FULL_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head to all keys; v is tiled e4m3 if SHIFT > 0."""
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * heads + i_h
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < D
    m_md = (o_m < queries)[:, None] & m_d[None, :]  # [BM, BD]
    p_q = q_ptr + i_b * stride_qb + i_h * D + o_m[:, None] * stride_ql + o_d[None, :]
    b_q = tl.load(p_q, mask=m_md, other=0.0).to(tl.float32) * softmax_scale  # [BM, BD]
    b_q8, b_q_scale = quantize_queries(b_q, LARGEST, INT8, INTERPRETED)

    blocks = tl.cdiv(keys, BLOCK_N)
    full = keys // BLOCK_N
    p_k = k8_ptr + i_bh * blocks * (BLOCK_N * BLOCK_D)
    p_scale = k_scale_ptr + i_bh * blocks
    if SHIFT > 0:
        p_v = v_ptr + i_bh * blocks * (BLOCK_N * BLOCK_D)
    else:
        p_v = v_ptr + i_b * stride_vb + i_h * D
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The interpreter with numpy ≥ 2.4 needs the constant FULL_BLOCKS as bound of range(). A while
    # loop would take a tensor, but Triton would not pipeline it.
    for i_n in range(0, full if FULL_BLOCKS is None else FULL_BLOCKS):
        b_top, b_total, b_out = add_block(
            b_q8, b_q_scale, b_top, b_total, b_out, p_k, p_scale, p_v, i_n, 0, stride_vl,
            D, BLOCK_M, BLOCK_N, BLOCK_D, SHIFT, INTERPRETED, False,
        )  # fmt: skip
    if full < blocks:
        b_top, b_total, b_out = add_block(
            b_q8, b_q_scale, b_top, b_total, b_out, p_k, p_scale, p_v, full, keys - full * BLOCK_N,
            stride_vl, D, BLOCK_M, BLOCK_N, BLOCK_D, SHIFT, INTERPRETED, True,
        )  # fmt: skip
    b_out = b_out / b_total[:, None]
    if SHIFT > 0:
        o_c = i_bh * D + o_d  # [BD]
        b_scale = tl.load(v_scale_ptr + o_c, mask=m_d, other=0.0)
        b_out = b_out * b_scale[None, :] + tl.load(v_mean_ptr + o_c, mask=m_d, other=0.0)[None, :]
    p_out = out_ptr + ((i_b * queries + o_m) * heads + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_md)


# Launch.
@dataclass(frozen=True)
class Launch:
    """Queries, keys and channels of a tile, and the options of the compiler."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    def constants(self, head_dim: int, variant: str) -> dict[str, int | float]:
        """Return the ``constexpr`` parameters of the kernel, FULL_BLOCKS apart."""
        int8 = variant != "fp8"
        return {
            "D": head_dim,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_D": self.block_d,
            "INT8": int8,
            "LARGEST": INT8_LARGEST if int8 else LARGEST,
            "SHIFT": 0 if variant == "int8" else SHIFT,
            "INTERPRETED": INTERPRETING,
        }


def attention_launch(head_dim: int, variant: str, capability: tuple[int, ...]) -> Launch:
    """Choose the largest tiles without spills; three stages, as two would wait for each load.

    8 warps of 128 × 128 outputs hold 64 sums of a block and 64 of all blocks a thread.
    """
    block_d = padded(head_dim)
    # wgmma multiplies int8, tcgen05 does not: there 128 keys spill.
    large = variant in {9: ("int8_fp8", "fp8"), 10: ("fp8",), 11: ("fp8",)}.get(capability[0], ())
    if block_d <= 128:
        if variant == "int8" and capability[0] == 12 and block_d == 128:  # 128 queries spill
            return Launch(64, 32, block_d, 4, 3)
        block_n = 128 if large else 32 if variant == "int8" and capability[0] == 12 else 64
        return Launch(128, block_n, block_d, 8, 3)
    return Launch(64 if large else 32, 64, block_d, 8, 2 if variant == "int8" else 3)


def _triton(q, k, v, heads, scale, variant):
    variant = choose(q, k, v, heads, scale, variant)
    if variant in CALLS:
        return run_backend(variant, q, k, v, heads, scale)
    chosen = resolve(q, heads, variant)
    if chosen is None:
        return attention(q, k, v, heads=heads, scale=scale)[0]
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    (batch, queries, dim), keys = q.shape, k.shape[1]
    head_dim, small = dim // heads, chosen != "int8"
    launch = attention_launch(head_dim, chosen, chip_of(q.device) or NOMINAL[chosen])
    kv = quantize_keys_and_values(k, v, heads, launch.block_n, chosen != "fp8", small)
    values = kv.values if small else v
    attention_kernel[(-(-queries // launch.block_m), heads, batch)](
        q, kv.keys, kv.key_scale, values, kv.value_scale, kv.value_mean, out,
        q.stride(0), q.stride(1), v.stride(0), v.stride(1), queries, keys, heads, scale * LOG2_E,
        **launch.constants(head_dim, chosen),
        FULL_BLOCKS=keys // launch.block_n if INTERPRETING else None,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out


# Registration.
def _fake(q, k, v, heads, scale, variant):
    return q.new_empty(q.shape)


def _check(q, k, v, heads, scale, variant):
    check_heads("rollout_attention", q, k, v, heads)
    require(variant in NAMES, "rollout_attention", "variant", variant, ", ".join(NAMES))


_op = register(
    "rollout_attention", reference, fake=_fake, triton=_triton, report=explain, check=_check,
    traceable=False,  # it warns, and its emulation would compile once for each length
)  # fmt: skip


@register_flop_formula(torch.ops.prfl_fast.rollout_attention)
def _flops(q, k, v, *args, out_shape=None, **kwargs):
    return 4 * q[0] * q[1] * k[1] * q[2]


# Public function.
def rollout_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    scale: float | None = None,
    variant: str = "auto",
) -> torch.Tensor:
    """Compute softmax attention of every query over every key in 8 bits, without a gradient.

    Args:
        q: ``[B, Lq, D]``, last axis contiguous, rows may be strided (a slice of a packed
            projection).
        k, v: ``[B, Lk, D]``, q's dtype, likewise.
        heads: D = heads · d, d a multiple of 16 up to 256.
        extra_k, extra_v: ``[B, Le, D]``, a second key set with its own softmax; its output, rounded
            to q's dtype, is added to the first's.
        scale: factor of the scores, 1/√d unless given.
        variant: a kernel of ours, "int8_fp8", "fp8" or "int8" (see the top of this file); one of
            another package, "sage_2", "flash_attn_3_fp8", "flash_attn_4_fp8", "cudnn_fp8" or
            "sage_3"; or "auto" for the best one that takes these tensors, unless the environment
            variable ``PRFL_FAST_ROLLOUT_ATTENTION`` names another. If there is none, "auto" runs
            ``attention`` and warns once for each reason. On the CPU "auto" is ours, and PyTorch
            computes its arithmetic.

    Returns:
        ``out [B, Lq, D]`` in q's dtype.

    Raises:
        ValueError: if an input requires a gradient while gradients are recorded; shapes, dtypes or
            devices do not match; D is not a multiple of ``heads``; there are no keys; only one of
            ``extra_k`` and ``extra_v`` is given; or the variant is unknown or does not run here.
    """
    op = "rollout_attention"
    for name, one, other in (("extra_k", extra_k, extra_v), ("extra_v", extra_v, extra_k)):
        require(one is not None or other is None, op, name, one, "a tensor, as the other is given")
    refuse_gradients(op, q=q, k=k, v=v, extra_k=extra_k, extra_v=extra_v)
    scale = default_scale(q, heads) if scale is None else float(scale)
    out = _op(q, k, v, heads, scale, variant)
    if extra_k is not None and extra_v is not None:
        check_heads(op, q, extra_k, extra_v, heads, ("extra_k", "extra_v"))
        out = out + _op(q, extra_k, extra_v, heads, scale, variant)
    return out
