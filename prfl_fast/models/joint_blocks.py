"""Blocks with joint attention of video and text tokens, on prfl_fast's kernels.

Sources: diffusers' ``transformer_hunyuan_video.py`` and ``transformer_hunyuan_video15.py``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from prfl_fast.kernels import gated_residual, norm_modulate, residual_norm_modulate
from prfl_fast.models.block_autograd import JointAttention, project
from prfl_fast.models.blocks import Rope, feed_forward, project_out

Tokens = tuple[torch.Tensor, torch.Tensor]
_IDENTITY = torch.nn.Identity()


class TimeRows(NamedTuple):
    """Timestep conditioning of a block, before the block's linear layer.

    Attributes:
        embedding: ``[R, D']``.
        row_index: int32 ``[B, L]``, the row of each token; None if each row belongs to B·L/R
            consecutive tokens.
    """

    embedding: torch.Tensor
    row_index: torch.Tensor | None = None

    def triples(self, norm: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return (shift and scale, gate) as kernel arguments for each triple of ``norm``.

        ``norm`` has ``silu``, ``linear`` with a multiple of 3·D outputs, and a ``norm`` of width D.
        """
        width, index = norm.norm.normalized_shape[-1], {"row_index": self.row_index}
        rows = norm.linear(norm.silu(self.embedding)).unflatten(-1, (-1, width)).unbind(-2)
        return [
            ({"shift": rows[i], "scale": rows[i + 1], **index}, {"gate": rows[i + 2], **index})
            for i in range(0, len(rows), 3)
        ]


def _attend(
    attn: Any, video: Sequence[Any], text: Sequence[Any], rope: Rope, lengths: torch.Tensor | None
) -> torch.Tensor:
    """Return the joint attention ``[B, L + T, D]`` of q, k, v of both streams."""
    q, k = attn.norm_q, attn.norm_k
    shared = attn.add_q_proj is None
    text_norms = (q, k) if shared else (attn.norm_added_q, attn.norm_added_k)
    weights = [norm.weight for norm in (q, k, *text_norms)]
    if shared:  # Dynamo refuses the same tensor twice
        weights[2:] = [weight.view_as(weight) for weight in weights[2:]]
    return JointAttention.apply(
        *video, *text, *weights, rope.cos, rope.sin, lengths, attn.heads, q.eps
    )


def valid_tokens_first(
    context: torch.Tensor, valid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens ``[B, T, D]`` with those of the mask ``[B, T]`` first, and their number."""
    order = valid.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    context = context.gather(1, order[..., None].expand_as(context))
    return context, valid.sum(1, dtype=torch.int32)


def joint_attention(
    attn: Any, x: torch.Tensor, text: torch.Tensor, rope: Rope, key_lengths: torch.Tensor | None
) -> Sequence[torch.Tensor]:
    """Return the attention of both streams, normalized and modulated, before ``to_out``."""
    video = project(x, attn.to_q, attn.to_k, attn.to_v)
    added = project(text, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    out = _attend(attn, list(video), list(added), rope, key_lengths)
    return out.split([x.shape[1], text.shape[1]], dim=1)


def double_stream_block(
    block: Any,
    x: torch.Tensor,
    text: torch.Tensor,
    time: TimeRows,
    text_time: TimeRows,
    rope: Rope,
    key_lengths: torch.Tensor | None,
) -> Tokens:
    """Run a block with separate weights for video and text, and joint attention.

    Args:
        block: module with ``norm1, attn, norm2, ff`` and ``norm1_context, norm2_context,
            ff_context``, like diffusers' ``HunyuanVideoTransformerBlock``.
        x, text: ``[B, L, D]`` and ``[B, T, D]``.
        time, text_time: conditioning of each stream.
        rope: table with a row for each video token.
        key_lengths: int32 ``[B]``, number of [video, text] tokens that sample b attends to; None
            for all.

    Returns:
        Both streams, ``[B, L, D]`` and ``[B, T, D]``.
    """
    attn = block.attn
    (norm, gate), (ff_norm, ff_gate) = time.triples(block.norm1)
    (text_norm, text_gate), (text_ff_norm, text_ff_gate) = text_time.triples(block.norm1_context)
    x, text = x.contiguous(), text.contiguous()
    h = norm_modulate(x, **norm, eps=block.norm1.norm.eps)
    c = norm_modulate(text, **text_norm, eps=block.norm1_context.norm.eps)
    y, text_y = joint_attention(attn, h, c, rope, key_lengths)
    y, text_y = project_out(attn.to_out, y), attn.to_add_out(text_y)
    x, h = residual_norm_modulate(x, y, **{**gate, **ff_norm}, eps=block.norm2.eps)
    rows = {**text_gate, **text_ff_norm}
    text, c = residual_norm_modulate(text, text_y, **rows, eps=block.norm2_context.eps)
    return (
        gated_residual(x, _feed(block.ff, h), **ff_gate),
        gated_residual(text, _feed(block.ff_context, c), **text_ff_gate),
    )


def _feed(ff: Any, h: torch.Tensor) -> torch.Tensor:
    """Run a diffusers ``FeedForward`` with tanh GELU."""
    gelu, _, down = ff.net
    return feed_forward(gelu.proj, down, h, ff.__dict__.get("chunk"))


def single_stream_block(
    block: Any,
    x: torch.Tensor,
    text: torch.Tensor,
    time: TimeRows,
    rope: Rope,
    key_lengths: torch.Tensor | None,
) -> Tokens:
    """Run a block that shares weights between video and text, with an MLP parallel to attention.

    Arguments and result are those of :func:`double_stream_block`. ``block`` has ``norm, attn,
    proj_mlp, proj_out``, and ``time`` has the rows of [video, text].
    """
    attn, sizes = block.attn, [x.shape[1], text.shape[1]]
    ((norm, gate),) = time.triples(block.norm)
    joint = torch.cat([x, text], dim=1)
    h = norm_modulate(joint, **norm, eps=block.norm.norm.eps)
    qkv = [t.split(sizes, dim=1) for t in project(h, attn.to_q, attn.to_k, attn.to_v)]
    out = _attend(attn, [t[0] for t in qkv], [t[1] for t in qkv], rope, key_lengths)
    mlp = feed_forward(block.proj_mlp, _IDENTITY, h)
    joint = gated_residual(joint, block.proj_out(torch.cat([out, mlp], dim=2)), **gate)
    x, text = joint.split(sizes, dim=1)
    return x, text
