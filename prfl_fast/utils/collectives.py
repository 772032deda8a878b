"""Collectives of ranks that share a sample, as functions of autograd.

Each rank computes the whole loss from values that are equal on all ranks, and the mean of the
gradients over the ranks is the gradient of the loss. So a function that joins the parts of n ranks
multiplies its gradient by n: its result is used n times, once by each rank, and the mean divides by
n again. Only :func:`to_heads`, :func:`to_tokens` and :func:`replicated` communicate in their
backward. Groups are process groups.

Source: "DeepSpeed Ulysses" (arXiv 2309.14509) for the exchange of heads and tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

# torch 2.13 renamed it.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Replicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total.div_(dist.get_world_size(ctx.group)), None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.group, ctx.tokens = group, x.shape[1]
        return local_tokens(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        start, stop = bounds(ctx.tokens, ctx.group)
        whole = grad.new_zeros(grad.shape[0], ctx.tokens, *grad.shape[2:])
        whole[:, start:stop] = grad[:, : stop - start]
        return whole, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, tokens: int, group: Any
    ) -> torch.Tensor:
        ctx.group = group
        return _every(x, group).transpose(0, 1).flatten(1, 2)[:, :tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return local_tokens(grad, ctx.group) * dist.get_world_size(ctx.group), None, None


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, tokens: int, group: Any
    ) -> torch.Tensor:
        ctx.group = group
        return _tokens_to_heads(x, tokens, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return _heads_to_tokens(grad, ctx.group), None, None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.group, ctx.tokens = group, x.shape[1]
        return _heads_to_tokens(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return _tokens_to_heads(grad, ctx.tokens, ctx.group), None


class _Exchange:
    """An exchange of tokens for heads, or back, that runs beside other work."""

    def __init__(self, tokens: int, group: Any) -> None:
        self.tokens, self.group = tokens, group
        self._running: Any = None

    def start(self, sent: torch.Tensor) -> torch.Tensor:
        """Return a buffer that holds what the other ranks sent, once :meth:`wait` returns."""
        received = torch.empty_like(sent)
        work = dist.all_to_all_single(received, sent, group=self.group, async_op=True)
        self._running = work, sent  # which must not be reused before
        return received

    def wait(self) -> None:
        """Let all later work, on a GPU that of the current stream, wait for the exchange."""
        (work, _), self._running = self._running, None
        work.wait()


class _BeginToHeads(torch.autograd.Function):
    """The backward of :class:`_EndToHeads` starts an exchange, for which this one's waits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, exchange: _Exchange
    ) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.start(_parts_of_heads(x, exchange.group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.exchange.wait()
        return grad.permute(1, 2, 0, 3).flatten(2), None


class _EndToHeads(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, received: torch.Tensor, exchange: _Exchange
    ) -> torch.Tensor:
        ctx.exchange = exchange
        exchange.wait()
        return received.transpose(0, 1).flatten(1, 2)[:, : exchange.tokens]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.exchange.start(_parts_of_tokens(grad, ctx.exchange.group)), None


class _PoolOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, pooled: torch.Tensor, lse: torch.Tensor, group: Any
    ) -> torch.Tensor:
        share = (lse - _every(lse, group).logsumexp(0)).exp().unsqueeze(-1)  # of this rank's tokens
        total = share * pooled
        dist.all_reduce(total, group=group)
        ctx.save_for_backward(pooled, share, total)
        ctx.ranks = dist.get_world_size(group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        pooled, share, total = ctx.saved_tensors
        d_pooled = grad * (share * ctx.ranks)
        return d_pooled, (d_pooled * (pooled - total)).sum(-1), None


def bounds(tokens: int, group: Any) -> tuple[int, int]:
    """Return ``start, stop`` of this rank's tokens, of ``tokens`` in equal parts but the last."""
    length = -(-tokens // dist.get_world_size(group))
    start = min(tokens, length * dist.get_rank(group))
    return start, min(tokens, start + length)


def local_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return this rank's tokens of ``[B, L, ...]``, padded with zeros to ``ceil(L / ranks)``."""
    start, stop = bounds(x.shape[1], group)
    missing = -(-x.shape[1] // dist.get_world_size(group)) - (stop - start)
    part = x[:, start:stop]
    if missing:
        return pad(part, (*(0, 0) * (x.ndim - 2), 0, missing))
    return part.contiguous()


def _every(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the tensors of all ranks, stacked."""
    ranks = dist.get_world_size(group)
    parts = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _gather_into(parts, x.contiguous(), group=group)
    return parts.view(ranks, *x.shape)


def _parts_of_heads(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return ``[n, B, l, D / n]``, the heads for each rank, from ``[B, l, D]``."""
    batch, length, width = x.shape
    ranks = dist.get_world_size(group)
    return x.view(batch, length, ranks, width // ranks).permute(2, 0, 1, 3).contiguous()


def _parts_of_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return ``[n, B, l, D / n]``, the tokens of each rank, from ``[B, L, D / n]``."""
    batch, tokens, width = x.shape
    ranks = dist.get_world_size(group)
    length = -(-tokens // ranks)
    x = pad(x, (0, 0, 0, length * ranks - tokens)) if length * ranks > tokens else x
    return x.view(batch, ranks, length, width).transpose(0, 1).contiguous()


def _tokens_to_heads(x: torch.Tensor, tokens: int, group: Any) -> torch.Tensor:
    """Return ``[B, L, D / n]`` of this rank's heads from ``[B, l, D]`` of its tokens."""
    sent = _parts_of_heads(x, group)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)  # by rank of the tokens
    return received.transpose(0, 1).flatten(1, 2)[:, :tokens]


def _heads_to_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return ``[B, l, D]`` of this rank's tokens from ``[B, L, D / n]`` of its heads."""
    sent = _parts_of_tokens(x, group)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)  # by rank of the heads
    return received.permute(1, 2, 0, 3).flatten(2)


def replicated(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return ``x``, which is equal on all ranks; its gradient is the mean over the ranks."""
    out: torch.Tensor = _Replicated.apply(x, group) if x.requires_grad else x
    return out


def split_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return :func:`local_tokens` of a tensor ``[B, L, ...]`` that is equal on all ranks."""
    out: torch.Tensor = _Split.apply(x, group)
    return out


def gather_tokens(x: torch.Tensor, tokens: int, group: Any) -> torch.Tensor:
    """Return all tokens ``[B, tokens, ...]`` from each rank's ``[B, l, ...]``."""
    out: torch.Tensor = _Gather.apply(x, tokens, group)
    return out


def to_heads(x: torch.Tensor, tokens: int, group: Any) -> torch.Tensor:
    """Exchange ``[B, l, D]``, all heads of this rank's tokens, for its heads of all tokens.

    The result ``[B, tokens, D / n]`` has no padding. n ranks must divide the heads.
    """
    out: torch.Tensor = _ToHeads.apply(x, tokens, group)
    return out


def begin_to_heads(x: torch.Tensor, tokens: int, group: Any) -> Callable[[], torch.Tensor]:
    """Begin :func:`to_heads`; return a function that waits for its result and returns it.

    What is computed between the two calls runs beside the exchange, and the backward of that beside
    the exchange of the gradient.
    """
    exchange = _Exchange(tokens, group)
    received = _BeginToHeads.apply(x, exchange)
    return lambda: _EndToHeads.apply(received, exchange)


def to_tokens(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Undo :func:`to_heads`: return ``[B, l, D]``, with zeros where a part is padded."""
    out: torch.Tensor = _ToTokens.apply(x, group)
    return out


def pool_over_ranks(pooled: torch.Tensor, lse: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the softmax-weighted mean over the tokens of all ranks.

    ``pooled`` ``[B, H, D]`` and ``lse`` ``[B, H]`` are those of this rank's tokens, as from
    :func:`prfl_fast.kernels.query_pool`. H·D + H floats of each sample travel, instead of L·D.
    """
    out: torch.Tensor = _PoolOverRanks.apply(pooled, lse, group)
    return out
