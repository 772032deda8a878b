"""Block-sparse self-attention of a rollout's blocks, at a density chosen by noise level and layer.

A predictor of ``kernels/attn/block_masks.py`` chooses the blocks of keys: "pooled" from q and k in
each call, "tiles" and "radial" once from the grid of tokens. All of them keep the first frame's
keys, which hold the given image of an image-to-video model.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from prfl_fast.kernels import attention, qk_norm_rope, rollout_attention
from prfl_fast.kernels.attn.block_masks import (
    Grid,
    attend_in_tiles,
    pooled_blocks,
    radial_blocks,
    tile_blocks,
    tile_order,
)
from prfl_fast.kernels.attn.sparse import BLOCK_K, BLOCK_Q, KeyBlocks, sparse_attention
from prfl_fast.models.inference_linear import add_note, half_of

Predictor = Literal["pooled", "tiles", "radial"]
PREDICTORS: tuple[Predictor, ...] = ("pooled", "tiles", "radial")
# Blocks of queries and keys from a number of tokens on. Wan's videos have 32 760 and more. Blocks
# of one token run in PyTorch, so that short sequences, such as the small world's, have a density.
BLOCKS = ((1024, (BLOCK_Q, BLOCK_K)), (512, (16, 32)), (0, (1, 1)))
WIDTHS = 16  # widths of radial masks that are tried for a density


@dataclass(frozen=True)
class SparseOptions:
    """Choose the sparse layers of a rollout and their predictor.

    Attributes:
        predictor: one of :data:`PREDICTORS`.
        dense_layers: numbers of the transformer blocks whose attention stays dense.
        errors: if given, attention stays dense everywhere, and the relative L2 distance of the
            sparse output is added to the layer's entry.
    """

    predictor: Predictor = "pooled"
    dense_layers: tuple[int, ...] = ()
    errors: dict[int, float] | None = None


class _Plan(NamedTuple):
    """Hold the lists of one density; without ``blocks`` they are predicted from q and k.

    ``order`` is that of tiles. ``first_keys`` is the number of the first frame's tokens.
    """

    density: float
    first_keys: int
    sizes: tuple[int, int]
    eight_bits: bool
    blocks: KeyBlocks | None = None
    order: tuple[torch.Tensor, torch.Tensor] | None = None


class SparseAttention:
    """Choose the attention of an opened model's layers; it holds the lists of one rollout."""

    def __init__(self, options: SparseOptions, notes: list[str]) -> None:
        self._options, self._notes = options, notes
        self._plans: dict[Any, _Plan] = {}

    def attend(
        self,
        layer: int,
        x: torch.Tensor,
        grid: Grid | None,
        density: float,
        *,
        eight_bits: bool,
        sharded: bool,
    ) -> Callable[..., torch.Tensor] | None:
        """Return a function called in place of ``norm_attention``; None for dense attention.

        Args:
            layer: number of the transformer block.
            x: its input, ``[B, L, D]``.
            grid: of its tokens; None if they are not a grid.
            density: share of the pairs of blocks to keep.
            eight_bits: run the products in 8 bits.
            sharded: ranks share the tokens.
        """
        options = self._options
        if density == 1 or layer in options.dense_layers:
            return None
        reason = ""
        if sharded:
            reason = "ranks share the tokens of a sample"
        elif grid is None or math.prod(grid) != x.shape[1]:
            reason = f"its {x.shape[1]} tokens are not a grid of frames, rows and columns"
        if reason or grid is None:
            add_note(self._notes, f"attention is not sparse: {reason}")
            return None
        key = (grid, density, eight_bits, x.device)
        if key not in self._plans:
            self._plans[key] = self._plan(grid, density, eight_bits, x.device)
        if options.errors is not None:
            return functools.partial(_compare, self._plans[key], layer, options.errors)
        return functools.partial(_attend, self._plans[key])

    def _plan(self, grid: Grid, density: float, eight_bits: bool, device: torch.device) -> _Plan:
        predictor = self._options.predictor
        plan = _Plan(density, grid[1] * grid[2], block_sizes(math.prod(grid)), eight_bits)
        if predictor == "pooled":
            return plan
        # Real tensors of the host, whichever tensors the rollout has, because they are kept.
        with _disable_current_modes(), torch.device("cpu"):
            blocks, order = fixed_blocks(predictor, grid, density, *plan.sizes)
        if (found := blocks.density()) > max(1.5 * density, density + 0.1):
            text = f"{predictor} masks of {grid} tokens keep {found:.2f} of the pairs of blocks"
            add_note(self._notes, f"{text}, more than the density {density:g}")
        blocks = replace(blocks, index=blocks.index.to(device), count=blocks.count.to(device))
        if order is not None:
            order = order[0].to(device), order[1].to(device)
        return plan._replace(blocks=blocks, order=order)


def block_sizes(tokens: int) -> tuple[int, int]:
    """Return the numbers of queries and keys of a block for a number of tokens."""
    return next(sizes for least, sizes in BLOCKS if tokens >= least)


@functools.lru_cache(maxsize=16)
def fixed_blocks(
    predictor: Predictor, grid: Grid, density: float, block_q: int, block_k: int
) -> tuple[KeyBlocks, tuple[torch.Tensor, torch.Tensor] | None]:
    """Return the lists of "tiles" or "radial" whose density is nearest to ``density``.

    With them the order of tokens by tile, None in the usual order.
    """
    sizes: dict[str, Any] = {"block_q": block_q, "block_k": block_k}
    if predictor == "radial":
        return _radial(grid, density, sizes), None
    # A tile is a block of keys, of one frame: the first frame then is a tile layer of its own.
    rows = 1 << (block_k.bit_length() - 1) // 2
    tile = (1, rows, block_k // rows)
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    window = [1, 1, 1]
    found = best = tile_blocks(grid, tile, (1, 1, 1), first_frame=True, **sizes)
    while found.density() < density:
        # The axis of which the window covers the smallest share grows.
        axis = min(range(3), key=lambda i: window[i] / counts[i])
        window[axis] += 2
        now = window[0], window[1], window[2]
        found = tile_blocks(grid, tile, now, first_frame=True, **sizes)
        best = min(best, found, key=lambda blocks: abs(blocks.density() - density))
    return best, tile_order(grid, tile)


def _radial(grid: Grid, density: float, sizes: dict[str, Any]) -> KeyBlocks:
    # At the largest width every pair of tokens is kept.
    low, high = 1e-3, 2.0 * grid[0]
    tried = []
    for _ in range(WIDTHS):
        width = math.sqrt(low * high)
        tried.append(radial_blocks(grid, width=width, **sizes))
        if tried[-1].density() < density:
            low = width
        else:
            high = width
    return min(tried, key=lambda blocks: abs(blocks.density() - density))


def _normed(q: Any, k: Any, norm_and_rope: tuple[Any, ...]) -> tuple[Any, Any]:
    q_weight, k_weight, cos, sin, grid, offset, heads, eps = norm_and_rope
    rope = {"cos": cos, "sin": sin, "grid": grid, "offset": offset}
    return qk_norm_rope(q, k, q_weight, k_weight, heads=heads, eps=eps, **rope)


def _attend(
    plan: _Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *norm_and_rope: Any
) -> torch.Tensor:
    """Compute ``norm_attention`` with the lists of ``plan``."""
    q, k = _normed(q, k, norm_and_rope)
    return _sparse(plan, q, k, v, norm_and_rope[-2])


def _sparse(
    plan: _Plan, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int
) -> torch.Tensor:
    dtype, variant, blocks = q.dtype, "exact", plan.blocks
    if plan.eight_bits:
        q, k, v = (t.to(half_of(dtype)) for t in (q, k, v))
        variant = "auto"
    if blocks is None:
        with torch.autocast(q.device.type, enabled=False):
            first, (block_q, block_k) = plan.first_keys, plan.sizes
            blocks = pooled_blocks(
                q, k, heads=heads, density=plan.density, first_keys=first, block_q=block_q,
                block_k=block_k,
            )  # fmt: skip
    if plan.order is not None:
        out = attend_in_tiles(q, k, v, plan.order, blocks, heads=heads, variant=variant)
    else:
        out = sparse_attention(q, k, v, blocks, heads=heads, variant=variant)
    return out.to(dtype)


def _compare(
    plan: _Plan,
    layer: int,
    errors: dict[int, float],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *norm_and_rope: Any,
) -> torch.Tensor:
    """Return dense attention, and add the distance of the sparse output to ``errors``."""
    q, k = _normed(q, k, norm_and_rope)
    heads = norm_and_rope[-2]
    dense = attention(q, k, v, heads=heads)[0]
    off = _sparse(plan, q, k, v, heads).float() - dense.float()
    error = float(off.norm() / dense.float().norm().clamp(min=1e-30))
    errors[layer] = errors.get(layer, 0.0) + error
    return dense


def eight_bit_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *norm_and_rope: Any
) -> torch.Tensor:
    """Compute ``norm_attention`` with 8-bit products, in a kernel that takes 16-bit tensors."""
    dtype, half = q.dtype, half_of(q.dtype)
    q, k = _normed(q, k, norm_and_rope)
    heads = norm_and_rope[-2]
    return rollout_attention(q.to(half), k.to(half), v.to(half), heads=heads).to(dtype)
