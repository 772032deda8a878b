"""Adapter of diffusers' ``CogVideoXTransformer3DModel``: kernels and memory policies, no PRFL."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from prfl_fast.kernels import (
    attention,
    gated_residual,
    norm_modulate,
    qk_norm_rope,
    residual_norm_modulate,
)
from prfl_fast.models.block_adapter import Replacements
from prfl_fast.models.block_autograd import project
from prfl_fast.models.blocks import feed_forward, project_out
from prfl_fast.models.family_adapter import Expected, FamilyAdapter, warn_not_fused, why_not_fused
from prfl_fast.models.joint_blocks import TimeRows, Tokens

_NORMS = {f"norm{i}": "CogVideoXLayerNormZero" for i in (1, 2)}
_KINDS = {
    **_NORMS,
    **{f"{name}.norm": "LayerNorm" for name in _NORMS},
    "attn1": "Attention",
    "ff": "FeedForward",
    "ff.net.0": "GELU",
    "ff.net.1": "Dropout",
}


def _why_not_fused(block: Any) -> str:
    if type(block).__name__ not in ("CogVideoXBlock", "FSDPCogVideoXBlock"):
        return f"forward is that of {type(block).__module__}.{type(block).__name__}"
    if reason := why_not_fused(block, _KINDS, ("CogVideoXAttnProcessor2_0",)):
        return reason
    return "" if len(block.ff.net) == 4 else "ff.net has another number of layers than 4"


def _affine(norm: Any) -> dict[str, Any]:
    return {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}


def _attend(attn: Any, h: torch.Tensor, rope: Any, text: int) -> torch.Tensor:
    """Return the attention of [text, video] tokens h, with a LayerNorm per head on q and k."""
    q, k, v = project(h, attn.to_q, attn.to_k, attn.to_v)
    if attn.norm_q is not None:
        q, k = (
            norm(x.unflatten(2, (attn.heads, -1))).flatten(2)
            for norm, x in ((attn.norm_q, q), (attn.norm_k, k))
        )
    q, k = q.to(v.dtype), k.to(v.dtype)  # autocast computes LayerNorm in float32
    if rope is not None:
        # RoPE leaves text tokens unchanged (cos 1, sin 0). diffusers' tables hold columns twice.
        cos, sin = (
            F.pad(table[:, ::2].float(), (0, 0, text, 0), value=value)
            for table, value in zip(rope, (1.0, 0.0), strict=True)
        )
        q, k = qk_norm_rope(q, k, heads=attn.heads, cos=cos, sin=sin)
    return project_out(attn.to_out, attention(q, k, v, heads=attn.heads)[0])


def block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> Tokens:
    """Replace ``CogVideoXBlock.forward``."""
    x, text = hidden_states, encoder_hidden_states
    reason = _why_not_fused(self)
    if reason or attention_kwargs:
        warn_not_fused(reason or "attention_kwargs are given")
        return type(self).forward(self, x, text, temb, image_rotary_emb, attention_kwargs)
    time, sizes = TimeRows(temb), [text.shape[1], x.shape[1]]
    (norm, gate), (text_norm, text_gate) = time.triples(self.norm1)
    (ff_norm, ff_gate), (text_ff_norm, text_ff_gate) = time.triples(self.norm2)
    x, text = x.contiguous(), text.contiguous()
    affine = _affine(self.norm1.norm)
    h = torch.cat(
        [norm_modulate(text, **affine, **text_norm), norm_modulate(x, **affine, **norm)], dim=1
    )
    text_y, y = _attend(self.attn1, h, image_rotary_emb, sizes[0]).split(sizes, dim=1)
    affine = _affine(self.norm2.norm)
    x, h = residual_norm_modulate(x, y, **affine, **{**gate, **ff_norm})
    text, c = residual_norm_modulate(text, text_y, **affine, **{**text_gate, **text_ff_norm})
    gelu, _, down, dropout = self.ff.net
    y = feed_forward(gelu.proj, down, torch.cat([c, h], dim=1), self.ff.__dict__.get("chunk"))
    text_y, y = dropout(y).split(sizes, dim=1)
    return gated_residual(x, y, **ff_gate), gated_residual(text, text_y, **text_ff_gate)


class CogVideoXAdapter(FamilyAdapter):
    """Adapter of ``CogVideoXTransformer3DModel``.

    Its blocks run on the kernels and take memory policies. It does not predict the velocity of a
    flow, so PRFL, rewards and rollouts refuse it.
    """

    class_name = "CogVideoXTransformer3DModel"
    name = f"diffusers {class_name}"
    planned = False
    embeddings = ("patch_embed", "time_embedding")
    block_forward = staticmethod(block_forward)
    why_not_fused = staticmethod(_why_not_fused)

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of the blocks. Each call passes rotary tables."""
        return [(block, block_forward) for block in self.blocks(base)]

    def expected_conditions(self, base: Any) -> Expected:
        """Return the text."""
        return {"encoder_hidden_states": (True, ("T", base.config.text_embed_dim))}

    def patch_sizes(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return frames, rows and columns of a patch."""
        return config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]

    def check_latents(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ``ValueError``: the model predicts no velocity."""
        raise ValueError(
            f"{self.class_name} predicts v of a DDIM or DPM schedule, expected the velocity of a "
            "flow. It gets kernels (prfl_fast.patch) and memory policies only"
        )

    velocity = backbone = check_latents
