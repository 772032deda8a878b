"""Choose the blocks of keys of ``sparse_attention``: by mean-pooled scores, tiles or frames.

``pooled_blocks`` (SpargeAttn, arXiv 2502.18137) predicts from q and k: the mean of each block of
queries and keys gives scores of pairs of blocks, whose softmax is P. A list keeps the largest P up
to a cumulative probability, or a fixed number. A mean says nothing about a block of unlike tokens:
such a block of queries keeps every block of keys, such a block of keys is in every list.

``tile_blocks`` (sliding tile attention, arXiv 2502.04507) divides the grid of tokens into tiles; a
tile attends to a window of tiles around it, moved inside the grid at its borders. Tokens must be in
the order of ``tile_order``: those of a tile follow each other. A block may hold parts of several
tiles, and then keeps what any of them needs.

``radial_blocks`` (after radial attention, arXiv 2506.19852) keeps pairs of tokens by distance: for
frames t apart, positions that differ by less than width · S / 2^⌊log₂ max(t, 1)⌋, with S tokens a
frame; and all of the first frame. A pair of blocks is kept if any of its pairs of tokens is.

The grid is (frames, height, width) in tokens. All masks keep at least one block for each list.
"""

import math

import torch

from prfl_fast.kernels.attn.exact import check_heads
from prfl_fast.kernels.attn.sparse import BLOCK_K, BLOCK_Q, KeyBlocks, sparse_attention
from prfl_fast.kernels.runtime.checks import require

Grid = tuple[int, int, int]


def _pool(x: torch.Tensor, heads: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means ``[B, heads, blocks, d]`` and mean cosines of all pairs of a block's tokens."""
    length = x.shape[1]
    rows = x.unflatten(-1, (heads, -1)).transpose(1, 2).float()
    sizes = torch.full((-(-length // block), 1), block, device=x.device)
    sizes[-1] = length - block * (len(sizes) - 1)

    def mean(t: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(t, (0, 0, 0, -length % block))
        return padded.unflatten(-2, (-1, block)).sum(-2) / sizes

    # The mean of u_i · u_j over all pairs is |mean u|².
    return mean(rows), mean(torch.nn.functional.normalize(rows, dim=-1)).square().sum(-1)


def pooled_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    heads: int,
    probability: float | None = None,
    density: float | None = None,
    similarity: float = 0.0,
    scale: float | None = None,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
) -> KeyBlocks:
    """Return the lists that mean-pooled scores predict.

    Args:
        q, k: ``[B, Lq, D]`` and ``[B, Lk, D]`` with D = heads · d.
        heads: number of heads.
        probability: keep the most probable blocks until their P adds up to this; or
        density: keep this share of blocks, rounded up.
        similarity: blocks whose mean cosine between tokens is smaller are kept in full. That of
            keys is measured without their mean over all tokens.
        scale: factor of the scores, 1/√d unless given.
        block_q, block_k: sizes of blocks.

    Raises:
        ValueError: unless exactly one of ``probability`` and ``density`` is given, in (0, 1].
    """
    op = "pooled_blocks"
    check_heads(op, q, k, k, heads)
    require((probability is None) != (density is None), op, "density", density,
            "a number if probability is None, and None otherwise")  # fmt: skip
    share = (probability if density is None else density) or 0.0
    name = "probability" if density is None else "density"
    require(0 < share <= 1, op, name, share, "a number above 0, at most 1")
    q_mean, q_alike = _pool(q, heads, block_q)
    k_mean, k_alike = _pool(k.float() - k.float().mean(1, keepdim=True), heads, block_k)
    unlike = (k_alike < similarity)[..., None, :]
    scores = q_mean @ k_mean.mT * (q_mean.shape[-1] ** -0.5 if scale is None else scale)
    p = torch.softmax(scores.masked_fill(unlike & ~unlike.all(-1, keepdim=True), -math.inf), -1)
    largest, order = p.sort(dim=-1, descending=True, stable=True)
    if density is not None:
        count = torch.arange(p.shape[-1], device=p.device) < math.ceil(share * p.shape[-1])
        kept = count.expand_as(p)
    else:  # the block that reaches the probability is kept, and with it the first
        kept = largest.cumsum(-1) - largest < share
    mask = torch.zeros_like(kept).scatter(-1, order, kept)
    mask = mask | unlike | (q_alike < similarity)[..., None]
    return KeyBlocks.from_mask(mask, block_q, block_k)


def _coordinates(grid: Grid, device: torch.device | str | None) -> list[torch.Tensor]:
    """Return frame, row and column of each token in the usual order."""
    axes = (torch.arange(n, device=device) for n in grid)
    return [t.flatten() for t in torch.meshgrid(*axes, indexing="ij")]


def _tiles_of(grid: Grid, tile: Grid, device: torch.device | str | None) -> torch.Tensor:
    """Return the tile of each token, tiles numbered in the usual order."""
    f, h, w = (x // t for x, t in zip(_coordinates(grid, device), tile, strict=True))
    _, rows, columns = (-(-n // t) for n, t in zip(grid, tile, strict=True))
    return (f * rows + h) * columns + w


def tile_order(
    grid: Grid, tile: Grid, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens tile by tile, and the inverse permutation; tiles at borders are smaller."""
    order = _tiles_of(grid, tile, device).sort(stable=True).indices
    return order, order.argsort()


def _any_pair(group: torch.Tensor, related: torch.Tensor, block_q: int, block_k: int) -> KeyBlocks:
    """Return lists that keep a pair of blocks if ``related`` of any groups of their tokens.

    ``group``: a number for each token; ``related``: bool ``[groups, groups]``.
    """

    def members(block: int) -> torch.Tensor:
        blocks = torch.arange(len(group), device=group.device) // block
        found = related.new_zeros((-(-len(group) // block), len(related)), dtype=torch.float32)
        found[blocks, group] = 1
        return found

    mask = members(block_q) @ related.float() @ members(block_k).T > 0
    return KeyBlocks.from_mask(mask[None, None], block_q, block_k)


def tile_blocks(
    grid: Grid,
    tile: Grid,
    window: Grid,
    *,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    device: torch.device | str | None = None,
) -> KeyBlocks:
    """Return lists for tokens in the order of :func:`tile_order`; ``window`` is odd, in tiles."""
    odd = all(n > 0 and n % 2 for n in window)
    require(odd, "tile_blocks", "window", window, "three odd numbers of tiles")
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    related = torch.ones(1, 1, dtype=torch.bool, device=device)
    for count, size in zip(counts, window, strict=True):
        at, half = torch.arange(count, device=device), size // 2
        center = at.clamp(min(half, count // 2), max(count - 1 - half, count // 2))
        near = (center[:, None] - at).abs() <= half
        related = (related[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    group = _tiles_of(grid, tile, device).sort().values
    return _any_pair(group, related, block_q, block_k)


def radial_blocks(
    grid: Grid,
    *,
    width: float = 1.0,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    device: torch.device | str | None = None,
) -> KeyBlocks:
    """Return lists for tokens in the usual order; smaller ``width`` keeps fewer."""
    require(width > 0, "radial_blocks", "width", width, "a positive number")
    size = grid[1] * grid[2]
    token = torch.arange(grid[0] * size, device=device)
    # Tokens of one frame in the same block of queries and of keys are one group.
    block = min(block_q, block_k)
    frame, position = token // size, token % size
    _, group = torch.unique_consecutive(frame * len(token) + token // block, return_inverse=True)
    first = torch.searchsorted(group, torch.arange(int(group[-1]) + 1, device=device))
    last = torch.cat([first[1:], first.new_tensor([len(token)])]) - 1
    frames, low, high = frame[first], position[first], position[last]
    gap = torch.maximum(low[:, None] - high, low - high[:, None]).clamp(min=0)
    apart = (frames[:, None] - frames).abs().clamp(min=1)
    limit = width * size / torch.exp2(apart.double().log2().floor())
    return _any_pair(group, (gap < limit) | (frames == 0), block_q, block_k)


def attend_in_tiles(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: tuple[torch.Tensor, torch.Tensor],
    blocks: KeyBlocks,
    *,
    heads: int,
    scale: float | None = None,
    variant: str = "exact",
) -> torch.Tensor:
    """Run ``sparse_attention`` on tokens in the order of :func:`tile_order`, and restore theirs.

    q and k come with RoPE applied, which depends on the usual order.
    """
    forward, back = order
    q, k, v = (t.index_select(1, forward) for t in (q, k, v))
    out = sparse_attention(q, k, v, blocks, heads=heads, scale=scale, variant=variant)
    return out.index_select(1, back)
