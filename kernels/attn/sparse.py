"""Attention over lists of key blocks, for rollouts: no gradient, only the kept blocks are read.

    s_ij = scale · q_i · k_j  for keys j of the blocks kept for the block of query i,
    p_ij = exp(s_ij) / Σ_j exp(s_ij),  out_i = Σ_j p_ij v_j

The sums run over kept keys only. A block of queries that keeps no block of keys has out 0. The
last blocks of queries and of keys may be ragged, for any Lq and Lk. ``block_masks.py`` predicts
the blocks to keep.

A mask is a list of key blocks for each block of queries (:class:`KeyBlocks`): the program of a
block of queries walks along its list, and nothing of a skipped block is read.

Variants: "exact" multiplies in 16 bits. "int8_fp8", "fp8" and "int8" are those of ``rollout.py``:
q has a scale for each query, k (less its mean over *all* tokens) for each block of keys of the
mask, e4m3 values for each channel over all tokens. "auto" is the best of these on the chip, or
"exact" where it has none.

Gradient: none.
Shapes: q ``[B, Lq, D]``, k and v ``[B, Lk, D]`` with D = heads · d, rows may be strided; out ``[B,
Lq, D]``. The Triton kernel takes 16-bit tensors, d in multiples of 16 up to 128 and blocks of
several tokens; all else runs the reference.
Dtypes: scores, softmax and sums in float32 (float64 for float64), out is rounded once. Weights are
rounded to v's dtype before they multiply v, as in every 16-bit kernel.
FLOPs: 4·B·heads·Lq·Lk·d·density; of fake tensors density 1, as they have no counts.
Bytes: q is read and out written once; a block of k and v is read for each list that holds it,
mostly from L2. Lists: 4 bytes for each pair of blocks.
"""

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from prfl_fast.kernels.attn.exact import CHUNK, check_heads, default_scale
from prfl_fast.kernels.attn.rollout import NOMINAL, emulate
from prfl_fast.kernels.attn.rollout_variants import VARIANTS, best_variant, chip_of, resolve
from prfl_fast.kernels.attn.sparse_triton import run_kernel, sparse_launch
from prfl_fast.kernels.common.fp8 import refuse_gradients
from prfl_fast.kernels.runtime.checks import compute_dtype, require, require_same_device
from prfl_fast.kernels.runtime.registry import register

OP = "sparse_attention"
BLOCK_Q, BLOCK_K = 128, 64  # of SpargeAttn; 64 keys, as finer blocks follow a video's sparsity
# PyTorch computes blocks of one token, for sequences too short for others.
SIZES_Q, SIZES_K = (1, 16, 32, 64, 128), (1, 32, 64, 128)


@dataclass(frozen=True)
class KeyBlocks:
    """List the blocks of keys that each block of queries attends to.

    Attributes:
        index: int32 ``[B or 1, heads or 1, Lq / block_q, Lk / block_k]``, rounded up; the first
            ``count`` numbers of a list are blocks of keys in ascending order without repetition,
            the others are ignored. One list serves all samples or heads where the size is 1.
        count: int32 ``[B or 1, heads or 1, Lq / block_q]``.
        block_q: 1, 16, 32, 64 or 128 queries.
        block_k: 1, 32, 64 or 128 keys.
    """

    index: torch.Tensor
    count: torch.Tensor
    block_q: int = BLOCK_Q
    block_k: int = BLOCK_K

    @classmethod
    def from_mask(
        cls, mask: torch.Tensor, block_q: int = BLOCK_Q, block_k: int = BLOCK_K
    ) -> "KeyBlocks":
        """Return the lists of a bool mask ``[B or 1, heads or 1, Lq / block_q, Lk / block_k]``."""
        blocks = mask.shape[-1]
        number = torch.arange(blocks, dtype=torch.int32, device=mask.device)
        index = torch.where(mask, number, blocks).sort(-1).values.to(torch.int32)
        return cls(index, mask.sum(-1, dtype=torch.int32), block_q, block_k)

    def mask(self) -> torch.Tensor:
        """Return the bool mask of these lists."""
        return _mask_of(self.index, self.count)

    def density(self) -> float:
        """Return the share of pairs of blocks that are kept."""
        return self.count.double().mean().item() / self.index.shape[-1]


def _mask_of(index: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    blocks = index.shape[-1]
    listed = torch.arange(blocks, device=index.device) < count[..., None]
    kept = index.new_zeros((*index.shape[:-1], blocks + 1), dtype=torch.bool)
    # Numbers past the count go to a column of their own, which is cut off.
    return kept.scatter(-1, torch.where(listed, index, blocks).long(), True)[..., :blocks]


# Reference: the CPU's implementation.
def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    heads: int,
    scale: float,
    block_q: int,
    block_k: int,
    variant: str,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """Return out; ``upcast``: dtype computed in and returned, in the variant "exact"."""
    mask = _mask_of(index, count)
    chosen = "exact" if upcast is not None else _resolve(q, heads, variant)
    if chosen != "exact":
        mask = mask.expand(len(q), heads, -1, -1)
        return emulate(q, k, v, heads, scale, chosen, block_q, block_k, mask)
    dtype = compute_dtype(q, upcast)
    q_, k_, v_ = (t.unflatten(-1, (heads, -1)).transpose(1, 2).to(dtype) for t in (q, k, v))
    outs = []
    for i_q in _chunks(q_, k_, block_q):
        queries = q_[:, :, i_q.start * block_q : i_q.stop * block_q]
        kept = mask[:, :, i_q].repeat_interleave(block_q, -2)[..., : queries.shape[2], :]
        skipped = ~kept.repeat_interleave(block_k, -1)[..., : k_.shape[2]]
        scores = (queries * scale @ k_.mT).masked_fill(skipped, -torch.inf)
        # A list without blocks has a softmax of NaN.
        outs.append(torch.softmax(scores, -1).masked_fill(skipped, 0) @ v_)
    out = torch.cat(outs, 2) if outs else q_
    return out.transpose(1, 2).flatten(2).to(upcast or q.dtype)


def _chunks(q: torch.Tensor, k: torch.Tensor, block_q: int) -> list[slice]:
    """Return slices of blocks of queries whose scores are at most ``CHUNK`` numbers."""
    step = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2] * block_q))
    blocks = -(-q.shape[2] // block_q)
    return [slice(start, min(blocks, start + step)) for start in range(0, blocks, step)]


def _resolve(q: torch.Tensor, heads: int, variant: str) -> str:
    """Return the variant that runs; "auto" becomes "exact" where no 8-bit one runs."""
    if variant == "auto":
        return best_variant(q.device, q.dtype, q.shape[-1] // heads).variant or "exact"
    return variant if variant == "exact" else resolve(q, heads, variant, OP) or "exact"


# Launch.
def _triton(q, k, v, index, count, heads, scale, block_q, block_k, variant):
    head_dim, chosen = q.shape[-1] // heads, _resolve(q, heads, variant)
    tokens = block_q == 1 or block_k == 1
    if tokens or q.dtype == torch.float32 or head_dim % 16 or head_dim > 128:
        return reference(q, k, v, index, count, heads, scale, block_q, block_k, chosen)
    capability = chip_of(q.device) or NOMINAL.get(chosen, (9, 0))
    launch = sparse_launch(head_dim, chosen, block_q, block_k, capability)
    return run_kernel(q, k, v, index, count, heads, scale, chosen, launch)


# Registration.
def _fake(q, k, v, index, count, heads, scale, block_q, block_k, variant):
    return q.new_empty(q.shape)


def _check(q, k, v, index, count, heads, scale, block_q, block_k, variant):
    check_heads(OP, q, k, v, heads)
    require(block_q in SIZES_Q, OP, "block_q", block_q, f"one of {SIZES_Q}")
    require(block_k in SIZES_K, OP, "block_k", block_k, f"one of {SIZES_K}")
    require(scale > 0, OP, "scale", scale, "a positive number")
    expected = ("auto", "exact", *VARIANTS)
    require(variant in expected, OP, "variant", variant, ", ".join(expected))
    lists, blocks = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    for name, x, shape in (("index", index, (lists, blocks)), ("count", count, (lists,))):
        ok = x.dtype == torch.int32 and x.ndim == len(shape) + 2 and x.shape[2:] == shape
        ok = ok and x.shape[0] in (1, len(q)) and x.shape[1] in (1, heads)
        ending = ", ".join(map(str, shape))
        require(ok, OP, name, x, f"int32 [{len(q)} or 1, {heads} or 1, {ending}]")
    require(index.shape[:3] == count.shape, OP, "count", count, f"{list(index.shape[:3])}")
    require_same_device(OP, q=q, index=index, count=count)


_op = register(OP, reference, fake=_fake, triton=_triton, check=_check)


@register_flop_formula(torch.ops.prfl_fast.sparse_attention, get_raw=True)
def _flops(q, k, v, index, count, *args, out_val=None, **kwargs):
    dense = 4 * q.numel() * k.shape[1]
    if isinstance(count, FakeTensor) or count.is_meta or count.numel() == 0:
        return dense
    return round(dense * KeyBlocks(index, count).density())


# Public function.
def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: KeyBlocks,
    *,
    heads: int,
    scale: float | None = None,
    variant: str = "exact",
) -> torch.Tensor:
    """Compute softmax attention over the listed blocks of keys, without a gradient.

    Args:
        q: ``[B, Lq, D]``, last axis contiguous, rows may be strided (a slice of a packed
            projection).
        k, v: ``[B, Lk, D]``, q's dtype, likewise.
        blocks: the blocks of keys of each block of queries; its numbers are not checked.
        heads: D = heads · d.
        scale: positive factor of the scores, 1/√d unless given.
        variant: "exact" for 16-bit products; one of "int8_fp8", "fp8", "int8"; or "auto" for the
            best of these on the chip, and "exact" where it has none (see the top of this file).

    Returns:
        ``out [B, Lq, D]`` in q's dtype; zero for blocks of queries whose list is empty.

    Raises:
        ValueError: if an input requires a gradient while gradients are recorded; shapes, dtypes or
            devices do not match; or the variant is unknown or does not run here.
    """
    refuse_gradients(OP, q=q, k=k, v=v)
    scale = default_scale(q, heads) if scale is None else float(scale)
    sizes = blocks.block_q, blocks.block_k
    return _op(q, k, v, blocks.index, blocks.count, heads, scale, *sizes, variant)
