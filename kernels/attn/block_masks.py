"""Choose the blocks of keys of ``sparse_attention``: by mean-pooled scores, tiles or frames.

``pooled_blocks`` (SpargeAttn, arXiv 2502.18137) predicts the blocks from q and k. The means of the
blocks of queries and keys give a score for each pair of blocks; P is the softmax of a row of these.
A list keeps the blocks of largest P, up to a cumulative probability or a fixed number. The mean of
unlike tokens does not represent them: such a block of queries keeps every block of keys, and such a
block of keys is in every list.

``tile_blocks`` (sliding tile attention, arXiv 2502.04507) divides the grid of tokens into tiles. A
tile attends to a window of tiles around it, which is moved inside the grid at its borders. Tokens
must be in the order of ``tile_order``, tile by tile. A block may hold tokens of several tiles, and
then keeps the blocks that any of them needs.

``radial_blocks`` (after radial attention, arXiv 2506.19852) keeps pairs of tokens by distance: in
frames t apart, those whose positions differ by less than width · S / 2^⌊log₂ max(t, 1)⌋, with S
tokens per frame; and all keys of the first frame. A pair of blocks is kept if any of its pairs of
tokens is kept.

The grid is (frames, height, width) in tokens. All masks keep at least one block for each list.
"""

import math

import torch

from prfl_fast.kernels.attn.exact import check_heads
from prfl_fast.kernels.attn.sparse import BLOCK_K, BLOCK_Q, KeyBlocks, sparse_attention
from prfl_fast.kernels.runtime.checks import compute_dtype, require

Grid = tuple[int, int, int]


def _pool(x: torch.Tensor, heads: int, block: int) -> torch.Tensor:
    """Return the mean of each block's tokens, ``[B, heads, blocks, d]`` in float32 at least."""
    # Not of a float32 copy of x, 1.5 GB at 14B and 720p.
    wide, whole = compute_dtype(x), x.shape[1] // block * block
    means = [x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=wide)] if whole else []
    if whole < x.shape[1]:
        means.append(x[:, whole:].mean(1, keepdim=True, dtype=wide))
    return torch.cat(means, 1).unflatten(-1, (heads, -1)).transpose(1, 2)


def _cosines(x: torch.Tensor, heads: int, block: int) -> torch.Tensor:
    """Return the mean cosine of all pairs of tokens of each block, ``[B, heads, blocks]``."""
    unit = torch.nn.functional.normalize(x.float().unflatten(-1, (heads, -1)), dim=-1)
    # The mean of u_i · u_j over all pairs is |mean u|².
    return _pool(unit.flatten(2), heads, block).square().sum(-1)


def pooled_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    heads: int,
    probability: float | None = None,
    density: float | None = None,
    similarity: float = 0.0,
    first_keys: int = 0,
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
        similarity: blocks whose tokens have a smaller mean cosine are kept in full. The mean over
            all keys is subtracted from the keys before.
        first_keys: all lists hold the blocks of this many first keys; they are part of ``density``.
        scale: factor of the scores, 1/√d unless given.
        block_q, block_k: sizes of blocks.

    Raises:
        ValueError: unless exactly one of ``probability`` and ``density`` is given, in (0, 1].
    """
    op = "pooled_blocks"
    check_heads(op, q, k, k, heads)
    require((probability is None) != (density is None), op, "density", density,
            "a number if probability is None, and None otherwise")  # fmt: skip
    name, share = ("probability", probability) if density is None else ("density", density)
    assert share is not None
    require(0 < share <= 1, op, name, share, "a number above 0, at most 1")
    # The mean of all keys is not subtracted: it adds the same number to all scores of a row.
    q_mean, k_mean = _pool(q, heads, block_q), _pool(k, heads, block_k)
    scores = q_mean @ k_mean.mT * (q_mean.shape[-1] ** -0.5 if scale is None else scale)
    always = torch.arange(scores.shape[-1], device=q.device) * block_k < first_keys
    kept_keys, kept_queries = always, always.new_zeros(1)
    if similarity > 0:  # a mean cosine is never negative
        smooth = k.float() - k.float().mean(1, keepdim=True)
        unlike = (_cosines(smooth, heads, block_k) < similarity)[..., None, :]
        scores = scores.masked_fill(unlike & ~unlike.all(-1, keepdim=True), -math.inf)
        kept_keys = always | unlike
        kept_queries = (_cosines(q, heads, block_q) < similarity)[..., None]
    p = torch.softmax(scores, -1)
    # No probability exceeds 1, so the first keys precede all others.
    largest, order = (p if density is None else p + always).sort(
        dim=-1, descending=True, stable=True
    )
    if density is not None:
        least = -(-first_keys // block_k)
        count = max(math.ceil(share * p.shape[-1]), least)
        first = torch.arange(p.shape[-1], device=p.device) < count
        kept = first.expand_as(p)
    else:  # the block that reaches the probability is kept, and with it the first
        kept = largest.cumsum(-1) - largest < share
    mask = torch.zeros_like(kept).scatter(-1, order, kept)
    mask = mask | kept_keys | kept_queries
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
    """Return the numbers of the tokens tile by tile, and the inverse permutation, ``[L]`` each.

    Tiles at the grid's far borders are smaller if the tile does not divide the grid.
    """
    order = _tiles_of(grid, tile, device).sort(stable=True).indices
    return order, order.argsort()


def _any_pair(group: torch.Tensor, related: torch.Tensor, block_q: int, block_k: int) -> KeyBlocks:
    """Return lists that keep a pair of blocks if any of their groups of tokens are related.

    ``group`` is the group of each token ``[L]``; ``related`` is a bool mask ``[groups, groups]``.
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
    first_frame: bool = False,
    block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K,
    device: torch.device | str | None = None,
) -> KeyBlocks:
    """Return the lists of sliding tiles, for tokens in the order of :func:`tile_order`.

    Args:
        grid, tile: sizes in tokens.
        window: size in tiles, three odd numbers.
        first_frame: all lists hold the keys of the tiles that the first frame is in.
        block_q, block_k: sizes of blocks.
        device: device of the lists.

    Raises:
        ValueError: if a number of ``window`` is not odd and positive.
    """
    odd = all(n > 0 and n % 2 for n in window)
    require(odd, "tile_blocks", "window", window, "three odd numbers of tiles")
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    related = torch.ones(1, 1, dtype=torch.bool, device=device)
    for count, size in zip(counts, window, strict=True):
        at, half = torch.arange(count, device=device), size // 2
        center = at.clamp(min(half, count // 2), max(count - 1 - half, count // 2))
        near = (center[:, None] - at).abs() <= half
        related = (related[:, None, :, None] & near[None, :, None, :]).flatten(2).flatten(0, 1)
    if first_frame:
        related = related.clone()
        related[:, : counts[1] * counts[2]] = True
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
    """Return the lists of radial attention, for tokens in the usual order.

    Args:
        grid: size in tokens.
        width: factor of the distance; a smaller one keeps fewer blocks.
        block_q, block_k: sizes of blocks.
        device: device of the lists.

    Raises:
        ValueError: if ``width`` is not positive.
    """
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
    """Run ``sparse_attention`` in the order of :func:`tile_order`; return the usual order.

    q, k and v are in the usual order. RoPE, which depends on it, has been applied to q and k.
    """
    forward, back = order
    q, k, v = (t.index_select(1, forward) for t in (q, k, v))
    out = sparse_attention(q, k, v, blocks, heads=heads, scale=scale, variant=variant)
    return out.index_select(1, back)
