"""Autograd functions of a block that save or move fewer bytes than autograd's own graph."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from prfl_fast.kernels import attention, qk_norm_rope
from prfl_fast.utils.modules import is_plain_linear


class NormAttention(torch.autograd.Function):
    """RMSNorm, RoPE and attention: ``attention(*qk_norm_rope(q, k, ...), v)[0]``, ``[B, Lq, D]``.

    Call ``NormAttention.apply(q, k, v, q_weight, k_weight, cos, sin, grid, offset, heads, eps)``.
    Arguments and errors are those of :func:`prfl_fast.kernels.qk_norm_rope` and
    :func:`prfl_fast.kernels.attention`; ``cos``, ``sin`` and ``grid`` are None without RoPE. The
    backward recomputes the normed q and k.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *norm_and_rope: Any
    ) -> torch.Tensor:
        """Return ``[B, Lq, D]``; save q and k before their norm."""
        q_weight, k_weight, cos, sin, grid, offset, heads, eps = norm_and_rope
        rope = {"cos": cos, "sin": sin, "grid": grid, "offset": offset}
        normed = qk_norm_rope(q, k, q_weight, k_weight, heads=heads, eps=eps, **rope)
        out, lse = attention(*normed, v, heads=heads)
        # The normed q and k are not saved: a trained 14B block at 720p keeps 14.3 GB instead of
        # 16.6 GB, for one more qk_norm_rope in its backward (bench/NOTES.md).
        ctx.save_for_backward(q, k, v, q_weight, k_weight, cos, sin, out, lse)
        ctx.heads = heads
        # The operators end in (grid, offset, heads, per_head, eps) and take [] for no grid.
        ctx.numbers = (*(([], []) if grid is None else (grid, offset)), heads, False, eps)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Recompute the normed q and k, then differentiate attention, RoPE and norms."""
        q, k, v, q_weight, k_weight, cos, sin, out, lse = ctx.saved_tensors
        weights = q_weight, k_weight
        need_q, need_k, need_v, *need_weights = ctx.needs_input_grad[:5]
        # q and the weight of its norm both need the gradient of the normed q; the same holds for k.
        through = [need_q or need_weights[0], need_k or need_weights[1]]
        needed = [need_q, need_k, *need_weights]
        ops, scale = torch.ops.prfl_fast, 1 / math.sqrt(q.shape[-1] // ctx.heads)
        normed = ops.qk_norm_rope(q, k, *weights, cos, sin, *ctx.numbers)
        d_q, d_k, d_v = ops.attention_backward(
            grad, *normed, v, out, lse, ctx.heads, scale, [*through, need_v], None
        )
        del normed, out, grad  # 0.77 GB each at 14B and 720p, not needed below
        gradients: Sequence[torch.Tensor | None] = (None,) * 4
        if any(through):
            upstream = [d if need else None for d, need in zip((d_q, d_k), through, strict=True)]
            gradients = ops.qk_norm_rope_backward(
                *upstream, q, k, *weights, cos, sin, *ctx.numbers, needed
            )
        d_q, d_k, *d_weights = (
            d if need else None for d, need in zip(gradients, needed, strict=True)
        )
        return d_q, d_k, d_v if need_v else None, *d_weights, *(None,) * 6


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
    if not all(map(is_plain_linear, layers)) or torch.is_autocast_enabled(x.device.type):
        return [layer(x) for layer in layers]
    return Projections.apply(x, *(p for layer in layers for p in (layer.weight, layer.bias)))
