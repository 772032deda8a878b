"""3-D rotary positions: the tables, the angle of every token, the rotation of a block of heads."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from prfl_fast.kernels.runtime.checks import require, require_float
from prfl_fast.kernels.runtime.triton import tl, triton

AXES = ("frame", "height", "width")


def split_pairs(pairs: int) -> list[int]:
    """Return the pairs of a head that turn with frame, height and width."""
    third = pairs // 3
    return [pairs - 2 * third, third, third]


def rope_table(
    positions: int,
    head_dim: int,
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of the rotary angles of positions 0 … ``positions - 1``.

    Args:
        positions: rows of the table: at least the largest grid side plus its offset.
        head_dim: d; even.
        theta: base of the frequencies.
        device: device of the tables; None is the CPU.

    Returns:
        ``(cos, sin)``, each float32 ``[positions, d/2]``, computed in float64: columns of the frame
        axis, then height, then width, each axis with its own frequencies theta^(-i/n).

    Raises:
        ValueError: if ``head_dim`` is odd or not positive, or ``positions`` is not positive.
    """
    require(positions > 0, "rope_table", "positions", positions, "a positive integer")
    ok = head_dim > 0 and head_dim % 2 == 0
    require(ok, "rope_table", "head_dim", head_dim, "a positive even integer")
    like: Any = {"dtype": torch.float64, "device": "cpu"}  # not the default device
    rows = torch.arange(positions, **like)
    angles = torch.cat(
        [
            torch.outer(rows, 1.0 / theta ** (torch.arange(n, **like) / max(n, 1)))
            for n in split_pairs(head_dim // 2)
        ],
        dim=1,
    )
    return angles.cos().float().to(device), angles.sin().float().to(device)


def rotations(
    cos: torch.Tensor, sin: torch.Tensor, grid: list[int], offset: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return e^{iφ} of every token of the grid: complex ``[F·H·W, 1, d/2]``."""
    return by_token(torch.complex(cos.to(dtype), sin.to(dtype)), grid, offset)


def by_token(table: torch.Tensor, grid: list[int], offset: list[int]) -> torch.Tensor:
    """Return the values of a table ``[positions, d/2]`` of every token: ``[F·H·W, 1, d/2]``."""
    columns = table.split(split_pairs(table.shape[1]), dim=1)
    turns = []
    for axis, (column, size, start) in enumerate(zip(columns, grid, offset, strict=True)):
        shape = [1, 1, 1, column.shape[1]]
        shape[axis] = size
        turns.append(column[start : start + size].reshape(shape).expand(*grid, -1))
    return torch.cat(turns, dim=-1).flatten(0, 2).unsqueeze(1)


@triton.jit
def place(i_token, sizes):
    """Return (f, h, w) of token ``i_token`` of a batch of grids (F, H, W), in 32 bits."""
    frames, height, width = sizes
    i_row = i_token.to(tl.int32) // width
    i_plane = i_row // height
    return i_plane % frames, i_row - i_plane * height, i_token.to(tl.int32) - i_row * width


@triton.jit
def next_place(i_place, sizes):
    """Return the place of the next token, without a division."""
    i_f, i_h, i_w = i_place
    frames, height, width = sizes
    i_w += 1
    i_h += (i_w == width).to(tl.int32)
    i_f += (i_h == height).to(tl.int32)
    i_w = tl.where(i_w == width, 0, i_w)
    i_h = tl.where(i_h == height, 0, i_h)
    return tl.where(i_f == frames, 0, i_f), i_h, i_w


@triton.jit
def _load_turn(cos_ptr, sin_ptr, i_place, starts, o_p, HEAD: tl.constexpr, TABLE: tl.constexpr):
    """Load cos φ and sin φ of pairs ``o_p``."""
    PAIRS: tl.constexpr = HEAD // 2
    WIDTH: tl.constexpr = PAIRS - PAIRS // 3  # first pair that turns with w
    HEIGHT: tl.constexpr = WIDTH - PAIRS // 3  # first pair that turns with h
    i_f, i_h, i_w = i_place
    start_f, start_h, start_w = starts
    if TABLE:
        o_table = i_f.to(tl.int64) * PAIRS + o_p
    else:
        i_position = tl.where(o_p < WIDTH, start_h + i_h, start_w + i_w)
        i_position = tl.where(o_p < HEIGHT, start_f + i_f, i_position)
        o_table = i_position * PAIRS + o_p
    b_cos = tl.load(cos_ptr + o_table, mask=o_p < PAIRS, other=0.0).to(tl.float32)
    return b_cos, tl.load(sin_ptr + o_table, mask=o_p < PAIRS, other=0.0).to(tl.float32)


@triton.jit
def load_turn(
    cos_ptr, sin_ptr, i_place, starts, HEAD: tl.constexpr, BLOCK_D: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Load cos φ and sin φ of a place in float32, ``[1, BLOCK_D / 2]``.

    If ``TABLE`` is not 0, the table has a row for every token of a grid (L, 1, 1).
    """
    # Load even and odd pairs apart. A load of fewer elements than threads has the layout of x; a
    # larger one would pass through shared memory.
    o_p = 2 * tl.arange(0, BLOCK_D // 4)
    even_cos, even_sin = _load_turn(cos_ptr, sin_ptr, i_place, starts, o_p, HEAD, TABLE)
    odd_cos, odd_sin = _load_turn(cos_ptr, sin_ptr, i_place, starts, o_p + 1, HEAD, TABLE)
    b_cos = tl.reshape(tl.join(even_cos, odd_cos), (1, BLOCK_D // 2))
    return b_cos, tl.reshape(tl.join(even_sin, odd_sin), (1, BLOCK_D // 2))


@triton.jit
def rotate(b_z, b_cos, b_sin, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return z · (cos + i sin) on interleaved pairs ``[BH, BD]``."""
    # A thread holds eight neighbors, so splitting and joining pairs moves no data.
    b_even, b_odd = tl.split(tl.reshape(b_z, (BLOCK_H, BLOCK_D // 2, 2)))  # [BH, P]
    b_turned = tl.join(b_even * b_cos - b_odd * b_sin, b_even * b_sin + b_odd * b_cos)
    return tl.reshape(b_turned, (BLOCK_H, BLOCK_D))


def check_grid(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    heads: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    grid: Sequence[int],
    offset: Sequence[int],
) -> None:
    """Raise ``ValueError`` unless the grid, the offset and the tables fit q and k."""
    head_dim, tokens = q.shape[2] // heads, math.prod(grid)
    require(head_dim % 2 == 0, op, "heads", heads, f"a number giving even heads, not {head_dim}")
    require(len(grid) == 3 and min(grid) > 0, op, "grid", grid, "(F, H, W), each at least 1")
    require(len(offset) == 3 and min(offset) >= 0, op, "offset", offset, "three numbers ≥ 0")
    # Texts with a grid or a length are made only on failure, because they would fix it in a trace.
    for name, x in (("q", q), ("k", k)):
        if x.shape[1] != tokens:
            require(False, op, name, x, f"{tokens} tokens for the grid {tuple(grid)}")
    for name, table in (("cos", cos), ("sin", sin)):
        expected = f"[positions, {head_dim // 2}] from rope_table(positions, {head_dim})"
        if table is None:
            raise ValueError(f"{op}: {name} is None, expected {expected}")
        require_float(op, name, table)
        require(table.shape[1:] == (head_dim // 2,), op, name, table, expected)
        for axis, size, start in zip(AXES, grid, offset, strict=True):
            end = start + size
            if end > table.shape[0]:
                table_call = f"rope_table({end}, {head_dim})"
                expected = f"at least {end} positions for the {axis} axis: {table_call}"
                require(False, op, name, table, expected)


def check_tables(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    heads: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
) -> None:
    """Raise ``ValueError`` unless both tables have a row for every token of q and k."""
    head_dim, tokens = q.shape[2] // heads, q.shape[1]
    require(head_dim % 2 == 0, op, "heads", heads, f"a number giving even heads, not {head_dim}")
    columns = (head_dim // 2, q.shape[2] // 2)
    if k.shape[1] != tokens:
        require(False, op, "k", k, f"{tokens} tokens, as q has: the tables rotate both")
    for name, table in (("cos", cos), ("sin", sin)):
        expected = f"[L, {columns[0]}] or [L, {columns[1]}] without a grid, L the tokens of q"
        if table is None:
            raise ValueError(f"{op}: {name} is None, expected {expected}")
        require_float(op, name, table)
        ok = table.ndim == 2 and table.shape[0] == tokens and table.shape[1] in columns
        require(ok, op, name, table, expected)
    if cos is not None and sin is not None:
        require(sin.shape == cos.shape, op, "sin", sin, "the shape of cos")
