"""Rows of a ``[..., D]`` tensor of any strides, addressed without a copy."""

from typing import NamedTuple

import torch

from prfl_fast.kernels.runtime.triton import tl, triton


class RowAxes(NamedTuple):
    """Strides and lengths of at most three axes of rows, the last one innermost.

    Row n is at ``n·stride_2`` without lengths, at ``(n // length_2)·stride_1 + (n % length_2)·
    stride_2`` with one, and so on. For a length of None the kernel needs no division.
    """

    stride_0: int
    stride_1: int
    stride_2: int
    length_1: int | None
    length_2: int | None


def row_axes(x: torch.Tensor) -> RowAxes | None:
    """Return the axes of x's rows, with neighbors merged where their strides allow.

    Return None if the kernels cannot address x: if its last axis is not dense, or it has rows on
    more than three axes, or 2³¹ rows on more than one.
    """
    if x.shape[-1] != 1 and x.stride(-1) != 1:
        return None
    axes: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        elif size != 1:
            axes.append((size, stride))
    if len(axes) > 3 or (len(axes) > 1 and x.numel() // x.shape[-1] >= 2**31):
        return None
    axes = [(0, 0)] * (3 - len(axes)) + axes
    (_, stride_0), (length_1, stride_1), (length_2, stride_2) = axes
    count = sum(size > 0 for size, _ in axes)
    lengths = (length_1 if count > 2 else None, length_2 if count > 1 else None)
    return RowAxes(stride_0, stride_1, stride_2, *lengths)


def as_tokens(x: torch.Tensor, axes: RowAxes) -> torch.Tensor | None:
    """View x's rows as ``[N, D]`` or ``[B, L, D]``; None if they have three axes."""
    count, dim = x.numel() // x.shape[-1], x.shape[-1]
    if axes.length_1 is not None:
        return None
    if axes.length_2 is None:
        return x.as_strided((count, dim), (axes.stride_2, 1))
    sizes = count // axes.length_2, axes.length_2, dim
    return x.as_strided(sizes, (axes.stride_1, axes.stride_2, 1))


def gradient_rows(grad: torch.Tensor) -> tuple[torch.Tensor, RowAxes]:
    """Return a gradient and its axes; a dense copy of it if kernels cannot address it."""
    axes = row_axes(grad)
    if axes is None:
        grad = grad.contiguous()
        axes = row_axes(grad)
        assert axes is not None, "the rows of a contiguous tensor merge into one axis"
    return grad, axes


@triton.jit
def row_offset(i_row, stride_0, stride_1, stride_2, length_1, length_2):
    """Return the offsets of rows ``i_row`` (int64, of any shape), in elements (int64)."""
    if length_2 is None:
        offset = i_row * stride_2
    else:
        i_outer = (i_row.to(tl.int32) // length_2).to(tl.int64)  # 64-bit division is far slower
        offset = (i_row - i_outer * length_2) * stride_2
        if length_1 is None:
            offset += i_outer * stride_1
        else:
            i_first = (i_outer.to(tl.int32) // length_1).to(tl.int64)
            offset += (i_outer - i_first * length_1) * stride_1 + i_first * stride_0
    return offset
