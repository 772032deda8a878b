"""Layers that treat every token alike, run a piece of the tokens at a time to save memory."""

from collections.abc import Callable
from typing import Any

import torch

from prfl_fast.recompute import recomputed


class _Take(torch.autograd.Function):
    """x and its tokens start to stop; gradients of several pieces are written into one tensor,
    where ``split`` would hold them all and then join them.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shape, ctx.tokens = x.shape, slice(start, stop)
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:, start:stop]

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_x: torch.Tensor | None, d_piece: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        # d_x was made here, for the piece after this one, and nobody else has seen it.
        d_x = d_piece.new_empty(ctx.shape) if d_x is None else d_x
        d_x[:, ctx.tokens] = d_piece
        return d_x, None, None


class _Put(torch.autograd.Function):
    """Write a piece into the tokens from start of out, in place; each token is written once."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, out: torch.Tensor, piece: torch.Tensor, start: int
    ) -> torch.Tensor:
        ctx.tokens = slice(start, start + piece.shape[1])
        out[:, ctx.tokens] = piece
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        # In place of a copy with zeros: who wrote out before reads only the tokens it wrote.
        return d_out, d_out[:, ctx.tokens], None


def in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, chunk: int | None
) -> torch.Tensor:
    """``function(x)`` of a function that treats every token alike, ``chunk`` tokens at a time.

    Nothing of a piece but its input is kept for the backward, which computes the piece again: what
    is as wide as the function's hidden layer never exists for all tokens. Gradients of weights are
    summed over the pieces in the weight's dtype.

    Args:
        function: ``[B, n, D]`` → ``[B, n, E]``. x: ``[B, L, D]``.
        chunk: tokens; None for all at once, without computing anything again.

    Returns:
        ``[B, L, E]``.
    """
    length = x.shape[1]
    if chunk is None or chunk >= length:
        return function(x)
    if torch.compiler.is_compiling():  # which takes neither views nor writes from a Function
        pieces = x.split(chunk, dim=1)
        return torch.cat([recomputed(function, p) for p in pieces], dim=1)
    out: torch.Tensor | None = None
    for start in range(0, length, chunk):
        x, piece = _Take.apply(x, start, min(start + chunk, length))
        piece = recomputed(function, piece)
        if out is None:
            out = piece.new_empty(*x.shape[:2], piece.shape[-1])
        out = _Put.apply(out, piece, start)
    assert out is not None
    return out
