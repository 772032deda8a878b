"""Autograd functions of a block. They save or move fewer bytes than autograd's own graph."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from prfl_fast.kernels import qk_norm_rope
from prfl_fast.kernels.attn.norm_rope import reference as norm_reference
from prfl_fast.kernels.runtime.registry import OPERATORS
from prfl_fast.models.fp8_linear import shared_rows
from prfl_fast.utils.modules import is_plain_linear


def scale_of(q: torch.Tensor, heads: int) -> float:
    """Return the factor of the scores."""
    return 1 / math.sqrt(q.shape[-1] // heads)


def norm_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *norm_and_rope: Any, ctx: Any = None
) -> torch.Tensor:
    """Compute RMSNorm, RoPE and attention: ``attention(*qk_norm_rope(q, k, ...), v)[0]``.

    Arguments are ``q, k, v, q_weight, k_weight, cos, sin, grid, offset, heads, eps``, and
    optionally ``key_lengths, extra_k, extra_v``. They and errors are those of
    :func:`prfl_fast.kernels.qk_norm_rope` and :func:`prfl_fast.kernels.attention`; ``cos``, ``sin``
    and ``grid`` are None without RoPE. The result is ``[B, Lq, D]``. The backward recomputes the
    normed q and k, and the output of the second key set, which should be short. ``ctx`` saves
    tensors for it.
    """
    # An autograd function that records nothing takes as much host time as an operation.
    if ctx is None and torch.is_grad_enabled():
        return _NormAttention.apply(q, k, v, *norm_and_rope)  # type: ignore[no-any-return]
    q_weight, k_weight, cos, sin, grid, offset, heads, eps, *more = norm_and_rope
    key_lengths, extra_k, extra_v = (*more, None, None, None)[:3]
    rope = {"cos": cos, "sin": sin, "grid": grid, "offset": offset}
    normed = qk_norm_rope(q, k, q_weight, k_weight, heads=heads, eps=eps, **rope)
    # The operator, because kernels.attention reads the lengths to check them.
    scale, attend = scale_of(q, heads), OPERATORS["attention"]
    out, lse = attend(*normed, v, heads, scale, key_lengths)
    if ctx is not None:
        # The normed q and k are not saved: a trained 14B block at 720p keeps 14.3 GB instead of
        # 16.6 GB, for one more qk_norm_rope in its backward (bench/NOTES.md).
        tensors = (q, k, v, q_weight, k_weight, cos, sin, key_lengths, out, lse)
        ctx.save_for_backward(*tensors, extra_k, extra_v)
        # The operators' last arguments are (grid, offset, heads, per_head, eps); [] is no grid.
        ctx.numbers = (*(([], []) if grid is None else (grid, offset)), heads, False, eps)
    if extra_k is not None:
        out = out + attend(normed[0], extra_k, extra_v, heads, scale, None)[0]
    return out  # type: ignore[no-any-return]


class _NormAttention(torch.autograd.Function):
    """:func:`norm_attention` with its backward."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:  # type: ignore[override]
        """Return ``[B, Lq, D]``."""
        return norm_attention(*args, ctx=ctx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Recompute the normed q and k, then differentiate attention, RoPE and norms."""
        *saved, extra_k, extra_v = ctx.saved_tensors
        needed = ctx.needs_input_grad
        extra = None if extra_k is None else (extra_k, extra_v, needed[12:])
        found = attention_gradients(OPERATORS, grad, saved, ctx.numbers, needed[:5], extra)
        gradients = (*found[:5], *(None,) * 7, *found[5:])
        return *gradients, *(None,) * (len(needed) - len(gradients))


def attention_gradients(
    ops: Mapping[str, Callable[..., Any]],
    grad: torch.Tensor,
    saved: list[Any],
    numbers: Sequence[Any],
    needed: Sequence[bool],
    extra: Any = None,
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of q, k, v and the norms' weights, None where not ``needed``.

    ``saved`` holds the tensors that :func:`norm_attention` saves for one key set, and is emptied.
    ``numbers`` are the last arguments of ``qk_norm_rope``; ``ops`` has the operations by name.
    ``extra`` has keys and values of a second set, and a pair of flags for their gradients, which
    are returned last.
    """
    q, k, v, *weights, cos, sin, key_lengths, out, lse = saved
    saved.clear()
    need_q, need_k, need_v, *need_weights = needed
    # q and the weight of its norm both need the gradient of the normed q; the same holds for k.
    through = [need_q or need_weights[0], need_k or need_weights[1]]
    heads = numbers[2]
    norm, norm_backward = ops["qk_norm_rope"], ops["qk_norm_rope_backward"]
    # The reference's norms of the recomputed forward serve the backward too.
    shared: dict[str, Any] = {"rhos": []} if norm is norm_reference else {}
    normed = norm(q, k, *weights, cos, sin, *numbers, **shared)
    fixed = heads, scale_of(q, heads)
    d_q, d_k, d_v = ops["attention_backward"](
        grad, *normed, v, out, lse, *fixed, [*through, need_v], key_lengths
    )
    del out, v
    d_extra: list[Any] = []
    if extra is not None:
        # The image has 257 keys in Wan: at 14B and 720p this second forward takes 0.4 TFLOP, and
        # two activations of 0.77 GB are not kept.
        second, wanted = (normed[0], *extra[:2]), [through[0], *extra[2]]
        results = ops["attention"](*second, *fixed, None)
        d_more, *found = ops["attention_backward"](grad, *second, *results, *fixed, wanted, None)
        d_extra = [d if need else None for d, need in zip(found, wanted[1:], strict=True)]
        d_q = d_q.add_(d_more)
        del second, results, d_more
    del normed, grad  # 0.77 GB each at 14B and 720p, not needed below
    gradients: Sequence[torch.Tensor | None] = (None,) * 4
    wanted = [need_q, need_k, *need_weights]
    if any(through):
        upstream = d_q if through[0] else None, d_k if through[1] else None
        gradients = norm_backward(*upstream, q, k, *weights, cos, sin, *numbers, wanted, **shared)
    pairs = zip(gradients, wanted, strict=True)
    d_q, d_k, *d_weights = [d if need else None for d, need in pairs]
    return d_q, d_k, d_v if need_v else None, *d_weights, *d_extra


class JointAttention(torch.autograd.Function):
    """Joint attention of a sample's video and text tokens, ``[B, L + T, D]``.

    Call ``JointAttention.apply(q, k, v, text_q, text_k, text_v, q_weight, k_weight, text_q_weight,
    text_k_weight, cos, sin, key_lengths, heads, eps)``: ``[B, L, D]`` of the video, ``[B, T, D]``
    of the text, weights ``[d]`` of each head's RMSNorm, cos and sin ``[L, d/2]`` or ``[L, D/2]`` of
    the video's tokens. ``key_lengths`` is int32 ``[B]`` or None: sample b attends to its first
    ``key_lengths[b]`` tokens. The backward recomputes the normed q and k. Gradients of cos and sin
    are those for which their angles get the right gradient.
    """

    @staticmethod
    def _joined(tensors: Any, weights: Any, tables: Any, heads: int, eps: float) -> Any:
        """Return q, k and v of all tokens, ``[B, L + T, D]``, q and k normed."""
        numbers: Any = [], [], heads, True, eps
        q, k, v, text_q, text_k, text_v = tensors
        norm = OPERATORS["qk_norm_rope"]
        video = norm(q, k, *weights[:2], *tables, *numbers)
        text = norm(text_q, text_k, *weights[2:], None, None, *numbers)
        pairs = zip((*video, v), (*text, text_v), strict=True)
        return [torch.cat(pair, dim=1) for pair in pairs]

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> torch.Tensor:  # type: ignore[override]
        """Return ``[B, L + T, D]``; save q and k before their norm."""
        *tensors, key_lengths, ctx.heads, ctx.eps = inputs
        scale = scale_of(tensors[0], ctx.heads)
        parts = tensors[:6], tensors[6:10], tensors[10:]
        joined = JointAttention._joined(*parts, ctx.heads, ctx.eps)
        out, lse = OPERATORS["attention"](*joined, ctx.heads, scale, key_lengths)
        ctx.save_for_backward(*tensors, key_lengths, out, lse)
        return out

    @staticmethod
    def _table_gradients(turned: Any, grads: Any, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """Return gradients of cos φ and sin φ from q and k after their turn, and their gradients.

        y = z·e^{iφ} has ∂y/∂φ = i·y. The results are -sin φ and cos φ times the gradient of φ.
        """
        d_angle = torch.zeros_like(cos)
        for y, d_y in zip(turned, grads, strict=True):
            pairs = (t[:, : len(cos)].to(cos.dtype).unflatten(2, (-1, 2)) for t in (y, d_y))
            (even, odd), (d_even, d_odd) = (t.unbind(-1) for t in pairs)
            each = (even * d_odd - odd * d_even).sum(0)
            d_angle += each.unflatten(1, (-1, cos.shape[1])).sum(1)
        return -sin * d_angle, cos * d_angle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Recompute the normed q and k, then differentiate attention, RoPE and norms."""
        *tensors, key_lengths, out, lse = ctx.saved_tensors
        weights, tables, length = tensors[6:10], tensors[10:], tensors[0].shape[1]
        needs = ctx.needs_input_grad[:10]
        needed = [
            any(needs[i] for i in (j, j + 3, j + 6, j + 8)[: 4 if j < 2 else 2]) for j in range(3)
        ]
        need_tables = ctx.needs_input_grad[10]
        needed = [need or (need_tables and j < 2) for j, need in enumerate(needed)]
        scale = scale_of(tensors[0], ctx.heads)
        joined = JointAttention._joined(tensors[:6], weights, tables, ctx.heads, ctx.eps)
        d_joined = OPERATORS["attention_backward"](
            grad, *joined, out, lse, ctx.heads, scale, needed, key_lengths
        )
        d_tables = (None, None)
        if need_tables:
            d_tables = JointAttention._table_gradients(joined[:2], d_joined[:2], *tables)
        del joined, out, grad
        gradients: list[Any] = [None] * 10
        for i, rows in enumerate((slice(0, length), slice(length, None))):
            j, w = 3 * i, 6 + 2 * i  # first of this stream's q, k, v, and of its weights
            d_q, d_k, d_v = (
                d[:, rows] if n else None for d, n in zip(d_joined, needed, strict=True)
            )
            wanted = [needs[j], needs[j + 1], needs[w], needs[w + 1]]
            if d_q is not None or d_k is not None:
                found = OPERATORS["qk_norm_rope_backward"](
                    d_q, d_k, *tensors[j : j + 2], *weights[2 * i : 2 * i + 2],
                    *(tables if i == 0 else (None, None)), [], [], ctx.heads, True, ctx.eps, wanted,
                )  # fmt: skip
                gradients[j : j + 2], gradients[w : w + 2] = found[:2], found[2:]
            gradients[j + 2] = d_v
        kept = [g if need else None for g, need in zip(gradients, needs, strict=True)]
        return *kept, *d_tables, *(None,) * 3


class Projections(torch.autograd.Function):
    """Apply several linear layers to one input: ``apply(x, weight, bias, weight, bias, ...)``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, *parameters: Any
    ) -> tuple[torch.Tensor, ...]:
        """Return one ``[..., N]`` for each pair of weight ``[N, K]`` and bias."""
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None, *weights)
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:  # type: ignore[override]
        """Accumulate the gradient of x in place, one ``addmm_`` for each layer."""
        kind = next(grad.device.type for grad in grads if grad is not None)
        if torch.is_autocast_enabled(kind):  # project() ran without it
            with torch.autocast(kind, enabled=False):
                return Projections.backward(ctx, *grads)
        x, *weights = ctx.saved_tensors
        d_x: torch.Tensor | None = None
        d_parameters: list[torch.Tensor | None] = []
        for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
            need_weight, need_bias = ctx.needs_input_grad[1 + 2 * i : 3 + 2 * i]
            if grad is None:
                d_parameters += [None, None]
                continue
            grad = grad.flatten(0, -2)
            # Autograd would form one [B, L, D] gradient for each layer and add them in separate
            # passes: 4.6 GB of memory traffic for three layers at 14B and 720p.
            if ctx.needs_input_grad[0]:
                d_x = grad @ weight if d_x is None else d_x.addmm_(grad, weight)
            d_parameters.append(grad.t() @ x.flatten(0, -2) if need_weight else None)
            d_parameters.append(grad.sum(0) if need_bias else None)
        return d_x if d_x is None else d_x.view(ctx.shape), *d_parameters


def project(x: torch.Tensor, *layers: nn.Module) -> Iterable[torch.Tensor]:
    """Return the output of each layer for x, with :class:`Projections` where it applies."""
    # Autocast would cast the products of the forward but not those of the backward.
    separate = not all(map(is_plain_linear, layers)) or torch.is_autocast_enabled(x.device.type)
    # A compiler for CPUs fuses the sum of the gradients, but copies the tensor that addmm_ adds to.
    if separate or (x.device.type == "cpu" and torch.compiler.is_compiling()):
        rows = shared_rows(x, layers)
        return [layer(x) if rows is None else layer(x, rows) for layer in layers]
    return Projections.apply(x, *(p for layer in layers for p in (layer.weight, layer.bias)))
