"""Block masks against plain loops over blocks and tokens."""

import itertools
import math

import pytest
import torch
from attention_cases import sdpa

from prfl_fast.kernels.attn import block_masks as module
from prfl_fast.kernels.attn.sparse import KeyBlocks, sparse_attention

GRIDS = [(1, 4, 5), (3, 4, 6), (5, 3, 7), (4, 1, 9)]
SIZES = dict(block_q=16, block_k=32)


def any_pair(tokens, keep):
    """Return the mask of blocks, any of whose pairs of tokens ``keep`` holds for."""
    mask = torch.zeros(-(-tokens // 16), -(-tokens // 32), dtype=torch.bool)
    for i, j in itertools.product(range(tokens), repeat=2):
        mask[i // 16, j // 32] |= keep(i, j)
    return mask


def place(grid):
    return list(itertools.product(*map(range, grid)))


@pytest.mark.cases(2)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tile, window", [((2, 2, 3), (1, 3, 1)), ((1, 2, 2), (3, 1, 3))])
def test_tiles(grid, tile, window):
    order, back = module.tile_order(grid, tile)
    assert torch.equal(order[back], torch.arange(math.prod(grid)))
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    tiles = [tuple(x // t for x, t in zip(p, tile, strict=True)) for p in place(grid)]
    assert [tiles[i] for i in order] == sorted(tiles)

    def keep(i, j):
        for a, b, n, size in zip(tiles[order[i]], tiles[order[j]], counts, window, strict=True):
            start = max(0, min(a - size // 2, n - size))  # the window lies inside the grid
            if not start <= b < start + size:
                return False
        return True

    found = module.tile_blocks(grid, tile, window, **SIZES).mask()[0, 0]
    assert torch.equal(found, any_pair(math.prod(grid), keep))
    # With the first frame, and those of its tiles.
    found = module.tile_blocks(grid, tile, window, first_frame=True, **SIZES).mask()[0, 0]
    first = {n for n, i in enumerate(order) if tiles[i][0] == 0}
    assert torch.equal(found, any_pair(math.prod(grid), lambda i, j: keep(i, j) or j in first))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [0.1, 0.5, 1.0])
def test_radial(grid, width):
    size = grid[1] * grid[2]

    def keep(i, j):
        t = max(1, abs(i // size - j // size))
        near = abs(i % size - j % size) < width * size / 2 ** math.floor(math.log2(t))
        return near or j < size

    found = module.radial_blocks(grid, width=width, **SIZES).mask()[0, 0]
    assert torch.equal(found, any_pair(math.prod(grid), keep))


@pytest.mark.parametrize("given", [dict(probability=0.7), dict(density=0.4), dict(density=1.0)])
@pytest.mark.parametrize("similarity", [0.0, 0.2])
def test_pooled(given, similarity):
    shared = 1.5 * torch.randn(2, 3, 64).repeat_interleave(32, 1)[:, :90]
    q, k = (shared + torch.randn(2, 90, 64) for _ in range(2))
    # One block of unlike tokens each, of which a similarity of 0.2 keeps everything.
    q[:, 32:48], k[:, 32:64] = torch.randn(2, 16, 64), 4 * torch.randn(2, 32, 64)
    found = module.pooled_blocks(q, k, heads=2, similarity=similarity, **given, **SIZES).mask()

    def cosine(x):
        u = x / x.norm(dim=-1, keepdim=True)
        return (u @ u.T).mean()

    full = unlike = 0
    for b, h in itertools.product(range(2), range(2)):
        rows, keys = (t[b, :, 32 * h : 32 * h + 32] for t in (q, k - k.mean(1, keepdim=True)))
        q_blocks, k_blocks = rows.split(16), keys.split(32)
        alike = [bool(cosine(x) >= similarity) for x in k_blocks]
        unlike += not all(alike)
        for i, block in enumerate(q_blocks):
            weights = [math.exp((block.mean(0) @ x.mean(0)).item() / 32**0.5) * ok
                       for x, ok in zip(k_blocks, alike, strict=True)]  # fmt: skip
            kept, total = {j for j, ok in enumerate(alike) if not ok}, 0.0
            for n, j in enumerate(sorted(range(3), key=lambda j: -weights[j])):
                if total < 0.7 if "probability" in given else n < math.ceil(given["density"] * 3):
                    kept.add(j)
                total += weights[j] / sum(weights)
            if cosine(block) < similarity:
                kept, full = {0, 1, 2}, full + 1
            assert found[b, h, i].nonzero()[:, 0].tolist() == sorted(kept)
    assert found.any(-1).all()
    assert (full > 0, unlike > 0) == (similarity > 0, similarity > 0)


def test_the_first_keys_are_kept_within_the_density():
    q, k = torch.randn(2, 1, 320, 32).unbind()  # ten blocks of keys
    free, first = (
        module.pooled_blocks(q, k, heads=1, density=0.5, first_keys=n, **SIZES).mask()
        for n in (0, 40)
    )
    assert first[..., :2].all() and not free[..., :2].all()
    assert (first.sum(-1) == 5).all() and (free.sum(-1) == 5).all()
    few = module.pooled_blocks(q, k, heads=1, density=0.1, first_keys=70, **SIZES).mask()
    assert few[..., :3].all() and (few.sum(-1) == 3).all()
    likely = module.pooled_blocks(q, k, heads=1, probability=0.3, first_keys=40, **SIZES).mask()
    assert likely[..., :2].all()


def test_unlike_tokens_keep_everything():
    q, k = torch.randn(2, 1, 64, 32).unbind()
    assert module.pooled_blocks(q, k, heads=1, density=0.1, similarity=0.9, **SIZES).density() == 1


@pytest.mark.parametrize("given", [{}, dict(probability=0.5, density=0.5), dict(density=0.0)])
def test_wrong_shares(given):
    x = torch.zeros(1, 4, 16)
    with pytest.raises(ValueError, match="^pooled_blocks: density is .*, expected "):
        module.pooled_blocks(x, x, heads=1, **given)


def test_wrong_windows():
    with pytest.raises(ValueError, match=r"^tile_blocks: window is \(2, 1, 1\), expected "):
        module.tile_blocks((2, 2, 2), (1, 1, 1), (2, 1, 1))


def test_attention_in_tiles_restores_the_order():
    grid, tile = (3, 4, 6), (2, 2, 3)
    q, k, v = torch.randn(3, 2, 72, 32).unbind()
    order = module.tile_order(grid, tile)
    every = module.tile_blocks(grid, tile, (3, 3, 3), **SIZES)
    out = module.attend_in_tiles(q, k, v, order, every, heads=2)
    torch.testing.assert_close(out, sdpa(q, k, v, heads=2))
    few = module.tile_blocks(grid, tile, (1, 1, 1), **SIZES)
    tokens = KeyBlocks.from_mask(few.mask(), 16, 32)
    moved = [t[:, order[0]] for t in (q, k, v)]
    wanted = sparse_attention(*moved, tokens, heads=2)[:, order[1]]
    assert few.density() < 1
    assert torch.equal(module.attend_in_tiles(q, k, v, order, few, heads=2), wanted)
