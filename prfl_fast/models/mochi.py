"""Adapter of diffusers' ``MochiTransformer3DModel``, whose time runs from noise to data."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.kernels import gated_residual, norm_modulate, residual_norm_modulate, rms_norm
from prfl_fast.models.block_adapter import Replacements
from prfl_fast.models.blocks import Rope, project_out
from prfl_fast.models.family_adapter import Expected, FamilyAdapter, warn_not_fused, why_not_fused
from prfl_fast.models.joint_blocks import Tokens, joint_attention, valid_tokens_first

_ATTENTION_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_KINDS = {
    "norm1": "MochiRMSNormZero",
    "norm1.norm": "RMSNorm",
    **{f"norm{i}": "MochiModulatedRMSNorm" for i in (2, 3, 4)},
    **{f"norm{i}.norm": "RMSNorm" for i in (2, 3, 4)},
    "attn1": "MochiAttention",
    **{f"attn1.{name}": "MochiRMSNorm" for name in _ATTENTION_NORMS},
}
_TEXT = {f"norm{i}_context{s}": _KINDS[f"norm{i}{s}"] for i in (1, 2, 3, 4) for s in ("", ".norm")}
_LAST_TEXT = {
    "norm1_context": "MochiLayerNormContinuous",
    "norm1_context.norm": "MochiModulatedRMSNorm",
}


def _why_not_fused(block: Any) -> str:
    if type(block).__name__ not in ("MochiTransformerBlock", "FSDPMochiTransformerBlock"):
        return f"forward is that of {type(block).__module__}.{type(block).__name__}"
    kinds = {**_KINDS, **(_LAST_TEXT if block.context_pre_only else _TEXT)}
    if reason := why_not_fused(block, kinds, ("MochiAttnProcessor2_0",)):
        return reason
    norms = [block.attn1._modules[name] for name in _ATTENTION_NORMS]
    same = all(norm.weight is not None and norm.eps == norms[0].eps for norm in norms)
    return "" if same else "attn1 has norms without weight, or of different eps"


def _finish(
    block: Any, stream: str, x: torch.Tensor, y: torch.Tensor, rows: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Return a stream after its attention's output y; ``rows`` are gate, scale and gate."""
    norm2, norm3, norm4, feed_forward = (
        getattr(block, f"{name}{stream}") for name in ("norm2", "norm3", "norm4", "ff")
    )
    gate, scale, ff_gate = rows
    y = rms_norm(y, eps=norm2.eps)
    x, h = residual_norm_modulate(x, y, torch.tanh(gate), scale=scale, kind="rms", eps=norm3.eps)
    return gated_residual(x, rms_norm(feed_forward(h), eps=norm4.eps), torch.tanh(ff_gate))


def block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    encoder_attention_mask: torch.Tensor,
    image_rotary_emb: Any = None,
) -> Tokens:
    """Replace ``MochiTransformerBlock.forward``."""
    x, text, rope = hidden_states, encoder_hidden_states, image_rotary_emb
    reason = _why_not_fused(self)
    if reason or rope is None:
        warn_not_fused(reason or "there are no rotary tables")
        return type(self).forward(self, x, text, temb, encoder_attention_mask, rope)
    attn, norm, text_norm, last = self.attn1, self.norm1, self.norm1_context, self.context_pre_only
    scale, *rows = norm.linear(norm.silu(temb)).chunk(4, dim=1)
    text_linear = text_norm.linear_1 if last else text_norm.linear
    text_scale, *text_rows = text_linear(text_norm.silu(temb)).chunk(1 if last else 4, dim=1)
    h = norm_modulate(x.contiguous(), scale=scale, kind="rms", eps=norm.norm.eps)
    c = norm_modulate(text.contiguous(), scale=text_scale, kind="rms", eps=text_norm.norm.eps)
    # As in diffusers, outputs of valid text tokens go to the first rows, and the others are 0.
    c, lengths = valid_tokens_first(c, encoder_attention_mask != 0)
    cos, sin = (table.flatten(1) for table in rope)  # [L, H, d/2] each
    y, text_y = joint_attention(attn, h, c, Rope(cos, sin, None), lengths + x.shape[1])
    if not last:
        rest = torch.arange(text.shape[1], device=text.device) >= lengths[:, None]
        text_y = attn.to_add_out(text_y.masked_fill(rest[..., None], 0))
        text = _finish(self, "_context", text, text_y, text_rows)
    return _finish(self, "", x, project_out(attn.to_out, y), rows), text


class MochiAdapter(FamilyAdapter):
    """Adapter of ``MochiTransformer3DModel``.

    The model predicts x0 - ε at time 1000·(1 - σ): the velocity is v(x, t) = -model(x, 1000 - t).
    """

    class_name = "MochiTransformer3DModel"
    name = f"diffusers {class_name}"
    embeddings = ("patch_embed", "time_embed")
    runs_on_meta = False  # the forward turns autocast off, which the meta device does not support
    # True for a backbone of all blocks, whose last one has no text output.
    attributes = ("context_pre_only",)
    block_forward = staticmethod(block_forward)
    why_not_fused = staticmethod(_why_not_fused)

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of the blocks; rotary tables come with each call."""
        return [(block, block_forward) for block in self.blocks(base)]

    def expected_conditions(self, base: Any) -> Expected:
        """Return text and its mask."""
        return {
            "encoder_hidden_states": (True, ("T", base.config.text_embed_dim)),
            "encoder_attention_mask": (True, ("T",)),
        }

    def patch_sizes(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return frames, rows and columns of a patch."""
        return 1, config["patch_size"], config["patch_size"]

    def timestep(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the model's time, which is 0 for noise and 1000 for data."""
        return 1000 - timestep

    def unpack(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return the velocity, whose sign is not the model's."""
        return -out

    def remove_head(self, base: Any, num_blocks: int) -> None:
        """Remove norm and projection after the last block."""
        super().remove_head(base, num_blocks)
        base.context_pre_only = self.blocks(base)[-1].context_pre_only

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """Build a randomly initialized headless backbone of that configuration.

        Raise ``ValueError`` if diffusers does not take the configuration.
        """
        if config.get("context_pre_only", False):
            return super().backbone_from_config(config)
        # The class builds its last block without a text output.
        base: Any = super().backbone_from_config(config | {"num_layers": config["num_layers"] + 1})
        base.transformer_blocks = base.transformer_blocks[:-1]
        return self._headless(base, config["num_layers"])
