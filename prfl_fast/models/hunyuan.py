"""Adapters of diffusers' HunyuanVideo classes, 1.0 and 1.5."""

from collections.abc import Mapping
from typing import Any

import torch

from prfl_fast.models.blocks import Rope
from prfl_fast.models.conditions import LATENT
from prfl_fast.models.family_adapter import (
    Expected,
    FamilyAdapter,
    warn_not_fused,
    why_not_fused,
)
from prfl_fast.models.joint_blocks import (
    TimeRows,
    Tokens,
    double_stream_block,
    single_stream_block,
)
from prfl_fast.utils.modules import customization

_FEED_FORWARD = {"": "FeedForward", ".net.0": "GELU", ".net.1": "Dropout"}
_DOUBLE = {
    "norm1.norm": "LayerNorm",
    "norm1_context": "AdaLayerNormZero",
    "norm1_context.norm": "LayerNorm",
    "norm2": "LayerNorm",
    "norm2_context": "LayerNorm",
    "attn": "Attention",
    **{f"attn.norm_{name}": "RMSNorm" for name in ("q", "k", "added_q", "added_k")},
    **{f"ff{s}{path}": kind for s in ("", "_context") for path, kind in _FEED_FORWARD.items()},
}
_SINGLE = {
    "norm.norm": "LayerNorm",
    "attn": "Attention",
    "attn.norm_q": "RMSNorm",
    "attn.norm_k": "RMSNorm",
    "act_mlp": "GELU",
}
_REPLACE = "HunyuanVideoTokenReplaceAdaLayerNormZero"
_NAMED = {
    "HunyuanVideoTransformerBlock": {"norm1": "AdaLayerNormZero", **_DOUBLE},
    "HunyuanVideo15TransformerBlock": {"norm1": "AdaLayerNormZero", **_DOUBLE},
    "HunyuanVideoTokenReplaceTransformerBlock": {"norm1": _REPLACE, **_DOUBLE},
    "HunyuanVideoSingleTransformerBlock": {"norm": "AdaLayerNormZeroSingle", **_SINGLE},
    "HunyuanVideoTokenReplaceSingleTransformerBlock": {"norm": f"{_REPLACE}Single", **_SINGLE},
}
# Class of a block → classes of the submodules that the kernels replace. FSDP2 adds a prefix.
_BLOCKS = {f"{prefix}{name}": kinds for name, kinds in _NAMED.items() for prefix in ("", "FSDP")}
_PROCESSORS = ("HunyuanVideoAttnProcessor2_0", "HunyuanVideo15AttnProcessor2_0")


def _why_not_fused(block: Any) -> str:
    name = type(block).__name__
    if name not in _BLOCKS:
        return f"forward is that of {type(block).__module__}.{name}"
    if reason := why_not_fused(block, _BLOCKS[name], _PROCESSORS):
        return reason
    attn, norms = block.attn._modules, ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    found = [attn[norm] for norm in norms if attn.get(norm) is not None]
    if any(norm.weight is None or norm.eps != found[0].eps for norm in found):
        return "attn has norms without weight, or of different eps"
    return ""


def rope_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    """Replace the forward of the rotary embedding: return every second column of its tables."""
    tables = type(self).forward(self, hidden_states)
    if customization(self, rope_forward):  # a hook expects diffusers' tensors
        return tables
    cos, sin = (table[:, ::2].contiguous() for table in tables)
    return Rope(cos, sin, None)


def _diffusers_tables(rope: Any) -> Any:
    """Return our table as diffusers' cosines and sines, ``[L, head_dim]`` each."""
    if not isinstance(rope, Rope):
        return rope
    return rope.cos.repeat_interleave(2, dim=-1), rope.sin.repeat_interleave(2, dim=-1)


def _time_rows(
    temb: torch.Tensor, replaced: torch.Tensor | None, first: int | None, tokens: int
) -> TimeRows:
    """Return the conditioning of ``tokens`` tokens; the first ``first`` tokens use ``replaced``."""
    if replaced is None or first is None:
        return TimeRows(temb)
    samples = torch.arange(len(temb), dtype=torch.int32, device=temb.device)[:, None]
    later = torch.arange(tokens, device=temb.device) >= first
    both = torch.stack([replaced, temb], dim=1).flatten(0, 1)  # [2B, D]
    return TimeRows(both, 2 * samples + later.to(torch.int32))


def block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    rope: Any = None,
    token_replace_emb: torch.Tensor | None = None,
    num_tokens: int | None = None,
) -> Tokens:
    """Replace the forward of a double-stream or single-stream block."""
    x, text = hidden_states, encoder_hidden_states
    reason = _why_not_fused(self)
    if reason or not isinstance(rope, Rope):
        if reason:
            warn_not_fused(reason)
        rest = () if token_replace_emb is None else (token_replace_emb, num_tokens)
        tables = _diffusers_tables(rope)
        return type(self).forward(self, x, text, temb, attention_mask, tables, *rest)
    lengths = None
    if attention_mask is not None:
        # Valid tokens come first. 1.0 passes [B, 1, 1, L + T], 1.5 passes [B, T] of the text.
        lengths = attention_mask.flatten(1).sum(1, dtype=torch.int32)
        if attention_mask.ndim == 2:
            lengths = lengths + x.shape[1]
    replaced = token_replace_emb
    if hasattr(self, "proj_mlp"):
        time = _time_rows(temb, replaced, num_tokens, x.shape[1] + text.shape[1])
        return single_stream_block(self, x, text, time, rope, lengths)
    time = _time_rows(temb, replaced, num_tokens, x.shape[1])
    return double_stream_block(self, x, text, time, TimeRows(temb), rope, lengths)


class _HunyuanAdapter(FamilyAdapter):
    block_forward, rope_forward = staticmethod(block_forward), staticmethod(rope_forward)
    why_not_fused = staticmethod(_why_not_fused)


class HunyuanVideoAdapter(_HunyuanAdapter):
    """Adapter of ``HunyuanVideoTransformer3DModel``: plain, latent_concat and token_replace."""

    class_name = "HunyuanVideoTransformer3DModel"
    name = f"diffusers {class_name}"
    lists = ("transformer_blocks", "single_transformer_blocks")
    embeddings = ("x_embedder", "context_embedder", "time_text_embed")

    def block_count(self, config: Mapping[str, Any]) -> int:
        """Return the number of blocks of both kinds."""
        return int(config["num_layers"] + config["num_single_layers"])

    def depth(self, config: Mapping[str, Any], num_blocks: int) -> dict[str, int]:
        """Return the numbers of double-stream and of single-stream blocks."""
        double = min(num_blocks, config["num_layers"])
        return {"num_layers": double, "num_single_layers": num_blocks - double}

    def expected_conditions(self, base: Any) -> Expected:
        """Return text, its mask, the pooled text, guidance (1000 · scale) and image latents."""
        config = base.config
        return {
            "encoder_hidden_states": (True, ("T", config.text_embed_dim)),
            "encoder_attention_mask": (True, ("T",)),
            "pooled_projections": (True, (config.pooled_projection_dim,)),
            **({"guidance": (True, ())} if config.guidance_embeds else {}),
            **({LATENT: (True, ("C", "F", "H", "W"))} if config.in_channels > 16 else {}),
        }


class HunyuanVideo15Adapter(_HunyuanAdapter):
    """Adapter of ``HunyuanVideo15Transformer3DModel``, whose text and image tokens have masks."""

    class_name = "HunyuanVideo15Transformer3DModel"
    name = f"diffusers {class_name}"
    token_counts = {"T2": 256, "N": 729}
    runs_on_meta = False  # the forward reads values, to find image tokens of zeros
    embeddings = (
        "x_embedder",
        "context_embedder",
        "context_embedder_2",
        "image_embedder",
        "time_embed",
        "cond_type_embed",
    )

    def expected_conditions(self, base: Any) -> Expected:
        """Return both texts and their masks, image tokens (zeros: none) and image latents."""
        config = base.config
        return {
            "encoder_hidden_states": (True, ("T", config.text_embed_dim)),
            "encoder_attention_mask": (True, ("T",)),
            "encoder_hidden_states_2": (True, ("T2", config.text_embed_2_dim)),
            "encoder_attention_mask_2": (True, ("T2",)),
            "image_embeds": (True, ("N", config.image_embed_dim)),
            **({"timestep_r": (False, ())} if config.use_meanflow else {}),
            LATENT: (False, ("C", "F", "H", "W")),  # zeros for text-to-video
        }

    def timestep(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the timesteps in the dtype of the weights, as this class's embedding needs."""
        return timestep.to(dtype)
