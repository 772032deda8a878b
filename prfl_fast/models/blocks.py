"""Blocks of a timestep-conditioned video transformer on prfl_fast's kernels.

Source: diffusers' ``transformer_wan.py``. :func:`prfl_fast.patch` runs the submodules of diffusers'
blocks with :func:`transformer_block`. In a model of your own, call this function or its parts in
the forward of a block.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from prfl_fast.kernels import (
    bias_gelu,
    gated_residual,
    norm_modulate,
    residual_norm_modulate,
    rms_norm,
    rope_table,
)
from prfl_fast.models.block_autograd import norm_attention, project
from prfl_fast.models.block_node import BlockNode, make_node
from prfl_fast.models.block_passes import Block, apply
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import is_plain_linear, remember, remembered, weights_of, with_weights
from prfl_fast.utils.recompute import in_chunks

# Wan pads every prompt to 512 tokens. Image tokens precede the text tokens in the context.
TEXT_TOKENS = 512


class Rope(NamedTuple):
    """Rotary position embedding of the tokens, as one compact table.

    Attributes:
        cos, sin: float32 ``[positions, head_dim // 2]``, see :func:`prfl_fast.kernels.rope_table`;
            without a grid one row per token, see :func:`prfl_fast.kernels.qk_norm_rope`.
        grid: number of frames, rows and columns of tokens, in frame-major order; None for a row
            per token.
        offset: first position on each axis, for a shard of the sequence.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    grid: tuple[int, int, int] | None
    offset: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def from_grid(
        cls,
        grid: Iterable[int],
        head_dim: int,
        *,
        theta: float = 10000.0,
        device: torch.device | None = None,
    ) -> "Rope":
        """Return the embedding of a complete ``(frames, height, width)`` grid of tokens."""
        frames, height, width = grid
        cos, sin = rope_table(max(frames, height, width), head_dim, theta=theta, device=device)
        return cls(cos, sin, (frames, height, width))


class Modulation(NamedTuple):
    """Compact timestep conditioning: a learned table plus rows computed from the timesteps.

    Attributes:
        table: ``[n, D]``, one row per modulation vector; n is a multiple of 3.
        time: ``[R, n, D]``, where R divides the number B·L of tokens. Each row is for B·L/R
            consecutive tokens: R is B for one timestep per sample, B·F for one per latent frame,
            B·L for one per token.
        row_index: optional integer ``[B, L]``, the row of each token.
    """

    table: torch.Tensor
    time: torch.Tensor
    row_index: torch.Tensor | None = None

    def arguments(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return the kernels' keyword arguments for each (shift, scale, gate) triple, as views.

        The first dict of a pair is for :func:`prfl_fast.kernels.norm_modulate`, the second for
        :func:`prfl_fast.kernels.gated_residual`.
        """
        time, table = self.time.unbind(-2), self.table.unbind(-2)
        rows = {"row_index": self.row_index}
        pairs = []
        for i in range(0, len(table), 3):
            norm = {"shift": time[i], "scale": time[i + 1]}
            tables = {"shift_table": table[i], "scale_table": table[i + 1]}
            gate = {"gate": time[i + 2], "gate_table": table[i + 2]}
            pairs.append(({**norm, **tables, **rows}, {**gate, **rows}))
        return pairs


def project_out(to_out: Any, x: torch.Tensor) -> torch.Tensor:
    """Apply an output projection: one layer, or all layers of a list in order."""
    for layer in to_out if isinstance(to_out, (nn.ModuleList, tuple)) else (to_out,):
        x = layer(x)
    return x


def self_attention(
    parts: Any, x: Any, rope: Rope, attend: Callable[..., torch.Tensor] = norm_attention
) -> torch.Tensor:
    """Apply q/k/v projections, whole-D RMSNorm and RoPE on q and k, attention, output projection.

    Args:
        parts: module with ``to_q, to_k, to_v, to_out, norm_q, norm_k, heads`` (a
            :class:`prfl_fast.models.TimestepConditionedAttention` or a diffusers ``WanAttention``;
            fused q/k/v projections are used when present).
        x: ``[B, L, D]``, input of the projections, e.g. normalized and modulated.
        rope: position embedding of the tokens.
        attend: called in place of ``norm_attention``, with the same arguments.

    Returns:
        ``[B, L, D]``.
    """
    if getattr(parts, "fused_projections", False):
        q, k, v = parts.to_qkv(x).chunk(3, dim=-1)  # views with strided rows
    else:
        q, k, v = project(x, parts.to_q, parts.to_k, parts.to_v)
    norm_q, norm_k = parts.norm_q, parts.norm_k
    out = attend(q, k, v, norm_q.weight, norm_k.weight, *rope, parts.heads, norm_q.eps)
    return project_out(parts.to_out, out)


class ContextKeys(NamedTuple):
    """Keys and values of a block's cross-attention, which do not depend on the video tokens.

    Attributes:
        k, v: ``[B, T, D]`` of the text; keys are not normalized yet.
        extra_k, extra_v: ``[B, N, D]`` of the image; keys are normalized. None without image.
        lengths: int32 ``[B]``, number of valid text tokens of each sample; None if all are valid.
    """

    k: torch.Tensor
    v: torch.Tensor
    extra_k: torch.Tensor | None = None
    extra_v: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


def context_keys(parts: Any, context: torch.Tensor) -> ContextKeys:
    """Compute keys and values of the context, with the arguments of :func:`cross_attention`."""
    image = None
    if getattr(parts, "add_k_proj", None) is not None:
        count = getattr(parts, "image_tokens", None)
        count = context.shape[1] - TEXT_TOKENS if count is None else count
        image, context = context[:, :count], context[:, count:]  # [B, N, D] and [B, T, D]
    fused = getattr(parts, "fused_projections", False)
    if fused:
        k, v = parts.to_kv(context).chunk(2, dim=-1)
    else:
        k, v = project(context, parts.to_k, parts.to_v)
    if image is None:
        return ContextKeys(k, v)
    if fused:
        extra_k, extra_v = parts.to_added_kv(image).chunk(2, dim=-1)
    else:
        extra_k, extra_v = project(image, parts.add_k_proj, parts.add_v_proj)
    norm = parts.norm_added_k
    return ContextKeys(k, v, rms_norm(extra_k, norm.weight, eps=norm.eps), extra_v)


def block_keys(
    blocks: Iterable[Any],
    cross: Callable[[Any], Any],
    context: torch.Tensor,
    within: Callable[[Any, torch.dtype], AbstractContextManager[None]] = lambda *_: nullcontext(),
) -> list[ContextKeys]:
    """Return the :func:`context_keys` of each block, whose cross-attention ``cross`` returns.

    ``within`` of a block and the context's dtype returns a context that changes its weights.
    """
    keys = []
    for block in blocks:
        with weights_of(block), within(block, context.dtype):
            keys.append(context_keys(cross(block), context))
    return keys


def cross_attention(
    parts: Any, x: torch.Tensor, context: torch.Tensor | ContextKeys
) -> torch.Tensor:
    """Attend from video tokens to text tokens and, in image-to-video models, to image tokens.

    Args:
        parts: as for :func:`self_attention`. If it has ``add_k_proj, add_v_proj, norm_added_k``,
            these process the image tokens of ``context``: the first ``image_tokens`` ones, or all
            before the last 512 if that attribute is missing.
        x: ``[B, L, D]``.
        context: ``[B, T, D]``, or the result of :func:`context_keys`.

    Returns:
        ``[B, L, D]``, the sum of both attentions after the output projection.

    Raises:
        ValueError: if there is no text token.
    """
    q = parts.to_q(x)
    if not isinstance(context, ContextKeys):
        context = context_keys(parts, context)
    k, v, extra_k, extra_v, lengths = context  # [B, T, D] each, image [B, N, D]
    # PyTorch's attention on the CPU divides by the number of keys, and ends the process.
    check(k.shape[1] > 0, "context", k, "at least one text token")
    heads, eps, weights = parts.heads, parts.norm_q.eps, (parts.norm_q.weight, parts.norm_k.weight)
    rope = (None, None, None, (0, 0, 0))
    more = (lengths,) if extra_k is None else (None, extra_k, extra_v)
    out = norm_attention(q, k, v, *weights, *rope, heads, eps, *more)
    return project_out(parts.to_out, out)


def feed_forward(
    up: Any, down: nn.Module, x: torch.Tensor, chunk: int | None = None
) -> torch.Tensor:
    """Compute ``down(gelu_tanh(up(x)))``, ``[B, L, D]`` → ``[B, L, D]``.

    Args:
        up, down: linear layers. The bias of a plain ``up`` is added in the GELU kernel, on a CPU by
            the layer itself.
        x: ``[B, L, D]``.
        chunk: tokens per pass, see :func:`prfl_fast.utils.recompute.in_chunks`; None for all.
    """
    if chunk is not None:  # up and down belong to one block, so its weights include both
        return in_chunks(with_weights(up, partial(feed_forward, up, down)), x, chunk)
    # On a GPU the GELU kernel adds the bias without another pass; on a CPU the product does.
    if x.device.type != "cpu" and is_plain_linear(up):
        return down(bias_gelu(F.linear(x, up.weight), up.bias))
    return down(bias_gelu(up(x)))


class BlockParts(NamedTuple):
    """Hold the modules of one block, and the functions that run them.

    Attributes:
        attn, cross: self-attention and cross-attention, see :func:`self_attention`.
        cross_norm: LayerNorm before the cross-attention; None or a module without weight for none.
        up, down: linear layers of the feed-forward.
        eps: epsilons of the norms before the self-attention and before the feed-forward.
        chunk: tokens per pass of the feed-forward; None for all.
        kind: kind of these two norms, see :func:`prfl_fast.kernels.norm_modulate`.
        norm, attend, feed: replacements of :func:`prfl_fast.kernels.norm_modulate` before the
            self-attention, of ``norm_attention``, and of :func:`feed_forward`.
        node: the block as one function, see :func:`known_parts`; None runs the parts one by one.
    """

    attn: Any
    cross: Any
    cross_norm: Any
    up: Any
    down: Any
    eps: tuple[float, float]
    chunk: int | None = None
    kind: str = "layer"
    norm: Callable[..., Any] = norm_modulate
    attend: Callable[..., torch.Tensor] = norm_attention
    feed: Callable[..., torch.Tensor] = feed_forward
    node: BlockNode | None = None


def known_parts(
    block: nn.Module, reason: Callable[[Any], str], parts: Callable[[Any], BlockParts]
) -> BlockParts | str:
    """Return ``parts(block)`` with a node, or ``reason(block)`` if that is not empty.

    Both functions may read only the block, its submodules and their attention processors. They run
    again if one of these, or a class of them, has changed since the last call.
    """
    if torch.compiler.is_compiling():
        return reason(block) or parts(block)
    known = remembered(block)
    if known is None:
        known = reason(block) or parts(block)
        node = None if isinstance(known, str) else make_node(known)
        if isinstance(known, BlockParts):
            known = known._replace(node=node)
        processors = [vars(m)["processor"] for m in block.modules() if "processor" in vars(m)]
        states = [vars(p) for p in processors if hasattr(p, "__dict__")]
        others = [*states, *(node.watched if node else ())]
        if not remember(block, known, others, processors):
            return known._replace(node=None) if isinstance(known, BlockParts) else known
    return known  # type: ignore[no-any-return]


def transformer_block(
    x: torch.Tensor,
    context: torch.Tensor | ContextKeys,
    modulation: Modulation,
    rope: Rope,
    parts: BlockParts,
) -> torch.Tensor:
    """Run one Wan block: self-attention, cross-attention and feed-forward, each with its residual.

    Args:
        x: ``[B, L, D]``.
        context: ``[B, T, D]``, or the result of :func:`context_keys`.
        modulation: shift, scale and gate of the self-attention, then those of the feed-forward.
        rope: position embedding of the tokens.
        parts: modules of the block.

    Returns:
        ``[B, L, D]`` in ``x.dtype``. Norms, modulation and residual sums are computed in float32
        and rounded once, where Wan rounds.
    """
    if parts.node is not None:
        given = parts.node.prepare(x, context, modulation, rope)
        if given is not None:
            return apply(*given) if torch.is_grad_enabled() else Block.forward(None, *given)
    (norm, gate), (ffn_norm, ffn_gate) = modulation.arguments()
    # In diffusers before 0.40 the stream of the first block is a transposed view.
    x = x.contiguous()
    h = parts.norm(x, **norm, kind=parts.kind, eps=parts.eps[0])
    # No variable holds an attention output, so it is freed after use: 0.77 GB at 14B and 720p.
    cross_norm = parts.cross_norm
    affine = getattr(cross_norm, "weight", None) is not None
    x, h = residual_norm_modulate(
        x,
        self_attention(parts.attn, h, rope, parts.attend),
        weight=cross_norm.weight if affine else None,
        bias=cross_norm.bias if affine else None,
        kind="layer" if affine else "none",
        eps=cross_norm.eps if affine else 0.0,
        **gate,
    )
    x, h = residual_norm_modulate(
        x,
        cross_attention(parts.cross, h, context),
        **ffn_norm,
        kind=parts.kind,
        eps=parts.eps[1],
    )
    return gated_residual(x, parts.feed(parts.up, parts.down, h, parts.chunk), **ffn_gate)
