"""RMSNorm and 3-D rotation of queries or keys in plain PyTorch."""

import functools
import math

import torch
from dtypes import FP64
from plain_torch import naive_norm, wide

EPS = 1e-6


@functools.cache
def angles(grid, head_dim, offset=(0, 0, 0), theta=10000.0):
    """Return float64 ``[L, d/2]`` from the definition, one token and one pair at a time."""
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    frequencies = [[theta ** (-i / n) for i in range(n)] for n in counts]
    rows = []
    for token in range(math.prod(grid)):
        place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        rows.append(
            [(p + o) * w for p, o, ws in zip(place, offset, frequencies, strict=True) for w in ws]
        )
    return torch.tensor(rows, dtype=FP64, device="cpu")


def naive_qk(
    q, k, q_weight=None, k_weight=None, *, heads, cos=None, sin=None, grid=None, offset=(0, 0, 0),
    per_head=False, eps=EPS,
):  # fmt: skip
    """Return what ``qk_norm_rope`` returns, by angles of its own in place of a grid's tables."""
    turn, pairs = None, q.shape[-1] // heads // 2
    if grid is not None:
        phi = angles(tuple(grid), 2 * pairs, tuple(offset))
        turn = [phi.cos()[:, None], phi.sin()[:, None]]
    elif cos is not None:
        turn = [cos.unflatten(1, (-1, pairs)), sin.unflatten(1, (-1, pairs))]
    return tuple(
        naive_one(x, weight, heads, turn, per_head) for x, weight in ((q, q_weight), (k, k_weight))
    )


def naive_one(x, weight, heads, turn, per_head):
    """Return RMSNorm and rotation the way models write them: rounded in between, float32 inside."""
    if weight is not None:
        groups = wide(x.unflatten(-1, (heads, -1)) if per_head else x)
        x = naive_norm(groups, weight, None, "rms", EPS).reshape(x.shape).to(x.dtype)
    if turn is not None:
        cos, sin = (t.float().to(wide(x)) for t in turn)
        even, odd = wide(x).unflatten(-1, (heads, -1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        x = turned.flatten(-3).to(x.dtype)
    return x
