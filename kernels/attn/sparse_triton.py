"""Triton kernel of ``sparse_attention``, in 16 and in 8 bits."""

import torch

from prfl_fast.kernels.attn import rollout
from prfl_fast.kernels.attn.quantize_kv import padded, quantize_keys_and_values
from prfl_fast.kernels.attn.rollout import LOG2_E, add_block, quantize_queries
from prfl_fast.kernels.runtime.triton import tl, triton


@triton.jit
def _add_exact_block(
    b_q, b_top, b_total, b_out, k_ptr, v_ptr, i_n, rest, scale, stride_kl, stride_vl,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRETED: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Add one block of 16-bit keys to the online softmax; with TAIL only its first ``rest``."""
    o_n = tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    o_l = tl.cast(i_n, tl.int64) * BLOCK_N + o_n  # [BN]
    p_k = k_ptr + o_l[:, None] * stride_kl + o_d[None, :]  # [BN, BD]
    p_v = v_ptr + o_l[:, None] * stride_vl + o_d[None, :]
    if TAIL:
        m_nd = (o_n < rest)[:, None] & (o_d < D)[None, :]
        b_k, b_v = tl.load(p_k, mask=m_nd, other=0.0), tl.load(p_v, mask=m_nd, other=0.0)
    elif D < BLOCK_D:
        m_nd = (o_d < D)[None, :]
        b_k, b_v = tl.load(p_k, mask=m_nd, other=0.0), tl.load(p_v, mask=m_nd, other=0.0)
    else:
        b_k, b_v = tl.load(p_k), tl.load(p_v)
    if INTERPRETED:  # the interpreter multiplies bfloat16 as integers
        b_k = b_k.to(tl.float32)
    b_s = tl.dot(b_q, tl.trans(b_k))  # [BM, BN]
    if TAIL:
        b_s = tl.where((o_n < rest)[None, :], b_s, float("-inf"))
    b_new = tl.maximum(b_top, tl.max(b_s, 1) * scale)  # [BM]
    b_decay = tl.exp2(b_top - b_new)
    b_p = tl.exp2(b_s * scale - b_new[:, None])  # [BM, BN]
    b_total = b_total * b_decay + tl.sum(b_p, 1)
    b_p = b_p.to(b_v.dtype)
    if INTERPRETED:
        b_p, b_v = b_p.to(tl.float32), b_v.to(tl.float32)
    b_out = tl.dot(b_p, b_v, b_out * b_decay[:, None])
    return b_new, b_total, b_out


@triton.jit
def _add(
    b_q, b_q_scale, b_top, b_total, b_out, k_ptr, k_scale_ptr, v_ptr, i_n, rest, scale,
    stride_kl, stride_vl,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr, SHIFT: tl.constexpr, INTERPRETED: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add one block of keys, in 16 bits if EXACT, else in 8."""
    if EXACT:
        b_top, b_total, b_out = _add_exact_block(
            b_q, b_top, b_total, b_out, k_ptr, v_ptr, i_n, rest, scale, stride_kl, stride_vl,
            D, BLOCK_N, BLOCK_D, INTERPRETED, TAIL,
        )  # fmt: skip
    else:
        b_top, b_total, b_out = add_block(
            b_q, b_q_scale, b_top, b_total, b_out, k_ptr, k_scale_ptr, v_ptr, i_n, rest, stride_vl,
            D, BLOCK_M, BLOCK_N, BLOCK_D, SHIFT, INTERPRETED, TAIL,
        )  # fmt: skip
    return b_top, b_total, b_out


@triton.jit(do_not_specialize=["queries", "keys"])
def sparse_kernel(
    q_ptr, k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_mean_ptr, index_ptr, count_ptr, out_ptr,
    stride_qb, stride_ql, stride_kb, stride_kl, stride_vb, stride_vl, stride_mb, stride_mh,
    queries, keys, heads, softmax_scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr, INT8: tl.constexpr, LARGEST: tl.constexpr, SHIFT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attend with a block of queries of one head to the blocks of keys in its list.

    ``stride_mb`` and ``stride_mh`` count lists of all query blocks: they do not depend on L.
    """
    i_m = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i_bh = i_b * heads + i_h
    blocks = tl.cdiv(keys, BLOCK_N)
    o_list = (i_b * stride_mb + i_h * stride_mh) * tl.num_programs(0) + i_m
    count = tl.load(count_ptr + o_list)
    p_index = index_ptr + o_list * blocks

    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < D
    m_md = (o_m < queries)[:, None] & m_d[None, :]  # [BM, BD]
    p_q = q_ptr + i_b * stride_qb + i_h * D + o_m[:, None] * stride_ql + o_d[None, :]
    b_q = tl.load(p_q, mask=m_md, other=0.0)  # [BM, BD]
    b_q_scale = 1.0
    if EXACT:
        if INTERPRETED:
            b_q = b_q.to(tl.float32)
        p_k = k_ptr + i_b * stride_kb + i_h * D
        p_scale = k_scale_ptr
    else:
        b_wide = b_q.to(tl.float32) * softmax_scale
        b_q, b_q_scale = quantize_queries(b_wide, LARGEST, INT8, INTERPRETED)
        p_k = k_ptr + i_bh * blocks * (BLOCK_N * BLOCK_D)
        p_scale = k_scale_ptr + i_bh * blocks
    if SHIFT > 0:
        p_v = v_ptr + i_bh * blocks * (BLOCK_N * BLOCK_D)
    else:
        p_v = v_ptr + i_b * stride_vb + i_h * D
    b_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_total = tl.zeros([BLOCK_M], tl.float32)
    b_out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Lists ascend, so that only the last entry can be the block that ends before BLOCK_N keys.
    full = count
    rest = keys % BLOCK_N
    if (count > 0) & (rest > 0):
        full = tl.where(tl.load(p_index + count - 1) == blocks - 1, count - 1, count)
    if full < count:  # first: after the loop it would spill 16 bytes on sm_80
        b_top, b_total, b_out = _add(
            b_q, b_q_scale, b_top, b_total, b_out, p_k, p_scale, p_v, blocks - 1, rest,
            softmax_scale, stride_kl, stride_vl,
            D, BLOCK_M, BLOCK_N, BLOCK_D, EXACT, SHIFT, INTERPRETED, True,
        )  # fmt: skip
    if INTERPRETED:  # its range() takes no tensors with numpy ≥ 2.4
        i = 0
        while i < full:
            b_top, b_total, b_out = _add(
                b_q, b_q_scale, b_top, b_total, b_out, p_k, p_scale, p_v, tl.load(p_index + i), 0,
                softmax_scale, stride_kl, stride_vl,
                D, BLOCK_M, BLOCK_N, BLOCK_D, EXACT, SHIFT, INTERPRETED, False,
            )  # fmt: skip
            i += 1
    else:
        # The next number is loaded a block early: keys whose address waits for a load of the same
        # trip are not pipelined (sm_120 spills 48 bytes; sm_90 has 2 stages in place of 3).
        i_n = tl.load(p_index, mask=full > 0, other=0)
        for i_list in range(0, full):
            i_next = tl.load(p_index + i_list + 1, mask=i_list + 1 < full, other=0)
            b_top, b_total, b_out = _add(
                b_q, b_q_scale, b_top, b_total, b_out, p_k, p_scale, p_v, i_n,
                0, softmax_scale, stride_kl, stride_vl,
                D, BLOCK_M, BLOCK_N, BLOCK_D, EXACT, SHIFT, INTERPRETED, False,
            )  # fmt: skip
            i_n = i_next
    # A list without blocks divides zero by one.
    b_out = b_out / tl.where(count > 0, b_total, 1.0)[:, None]
    if SHIFT > 0:
        o_c = i_bh * D + o_d  # [BD]
        b_scale = tl.load(v_scale_ptr + o_c, mask=m_d, other=0.0)
        b_mean = tl.load(v_mean_ptr + o_c, mask=m_d & (count > 0), other=0.0)
        b_out = b_out * b_scale[None, :] + b_mean[None, :]
    p_out = out_ptr + ((i_b * queries + o_m) * heads + i_h)[:, None] * D + o_d[None, :]
    tl.store(p_out, b_out.to(out_ptr.dtype.element_ty), mask=m_md)


class Launch(rollout.Launch):
    """Queries, keys and channels of a tile, and the options of the compiler."""

    def constants(self, head_dim: int, variant: str) -> dict[str, int | float]:
        """Return the ``constexpr`` parameters of the kernel."""
        found = super().constants(head_dim, variant)
        found["EXACT"] = variant == "exact"
        if found["EXACT"]:
            found["SHIFT"] = 0
        return found


def sparse_launch(
    head_dim: int, variant: str, block_q: int, block_k: int, capability: tuple[int, ...]
) -> Launch:
    """Choose a tile per pair of blocks of the mask; stages by the shared memory of the chip."""
    large = capability[0] in (9, 10, 11)  # 227 KiB of shared memory; others have at least 99
    block_d, num_warps = padded(head_dim), 8 if block_q > 64 else 4
    crowded = variant in ("exact", "int8") and not large and block_k * block_d > 4096
    # In int8 more stages of 32 keys of 64 channels spill; in 16 bits, two of 64 × 64 on sm_80.
    stages = 2 if crowded or (variant == "int8" and block_k < block_d == 64) else 3
    if crowded and capability[0] == 8 and variant == "exact" and block_q == block_k == 64:
        stages = 1
    return Launch(block_q, block_k, block_d, num_warps, stages)


def run_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    heads: int,
    scale: float,
    variant: str,
    launch: Launch,
) -> torch.Tensor:
    """Return out; ``index`` and ``count`` may have one list for all samples or all heads."""
    out = q.new_empty(q.shape)
    if out.numel() == 0:
        return out
    (batch, queries, dim), keys = q.shape, k.shape[1]
    key_codes, key_scale, values, value_scale, value_mean = k, None, v, None, None
    if variant != "exact":
        small = variant != "int8"
        kv = quantize_keys_and_values(k, v, heads, launch.block_n, variant != "fp8", small)
        key_codes, key_scale, value_scale, value_mean = (
            kv.keys, kv.key_scale, kv.value_scale, kv.value_mean,
        )  # fmt: skip
        values = kv.values if small else v
    lists_of_head = 1 if count.shape[1] > 1 else 0
    lists_of_sample = count.shape[1] if count.shape[0] > 1 else 0
    sparse_kernel[(-(-queries // launch.block_m), heads, batch)](
        q, key_codes, key_scale, values, value_scale, value_mean,
        index.contiguous(), count.contiguous(), out,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        lists_of_sample, lists_of_head, queries, keys, heads, scale * LOG2_E,
        **launch.constants(dim // heads, variant),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return out
