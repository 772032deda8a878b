"""Parameter names and ``config.json`` of official Wan, which HY-Video-PRFL's checkpoints use."""

import re
from collections.abc import Mapping
from typing import Any

from prfl_fast.models.blocks import TEXT_TOKENS

# (diffusers, official Wan)
_RENAMES = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    ("proj_out.", "head.head."),
)
# Below "blocks.<i>.".
_BLOCK_RENAMES = (
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "o."),
    ("add_k_proj.", "k_img."),
    ("add_v_proj.", "v_img."),
    ("norm_added_k.", "norm_k_img."),
    ("norm2.", "norm3."),
    ("ffn.net.0.proj.", "ffn.0."),
    ("ffn.net.2.", "ffn.2."),
    ("scale_shift_table", "modulation"),
)


def rename(key: str, to_reference: bool) -> str:
    """Convert a diffusers parameter name to official Wan's, or back; others stay unchanged."""
    # The head's table has the name of the blocks' tables in diffusers, so it is handled by itself.
    if key in ("scale_shift_table", "head.modulation"):
        return "head.modulation" if to_reference else "scale_shift_table"
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", key)
    prefix, path = (block[1], block[2]) if block else ("", key)
    renames: tuple[tuple[str, str], ...] = _BLOCK_RENAMES if block else _RENAMES
    for ours, theirs in renames:
        old, new = (ours, theirs) if to_reference else (theirs, ours)
        # Anchored at a path component, so that "norm_q." is not taken for "q.".
        path = re.sub(rf"(^|\.){re.escape(old)}", lambda m, new=new: m[1] + new, path, count=1)
        if not block and path != key:
            break
    return prefix + path


def reference_config(config: Any, dim: int) -> dict[str, Any]:
    """Return official Wan's ``config.json`` for a diffusers config of width ``dim``."""
    # Defaults that no released Wan changes are omitted.
    kind = "t2v"
    if config.image_dim is not None:
        kind = "i2v" if config.pos_embed_seq_len is None else "flf2v"
    return {
        "_class_name": "WanModel",
        "model_type": kind,
        "patch_size": list(config.patch_size),
        "text_len": TEXT_TOKENS,
        "in_dim": config.in_channels,
        "dim": dim,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "text_dim": config.text_dim,
        "out_dim": config.out_channels,
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "cross_attn_norm": config.cross_attn_norm,
        "eps": config.eps,
    }


def from_reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the diffusers configuration for a ``config.json`` in the official layout.

    It may be that of Wan2.1, Wan2.2, HY-Video-PRFL, VideoX-Fun or DiffSynth-Studio. Raise
    ``KeyError`` if a size is missing.
    """
    kind, dim, heads = config.get("model_type"), config["dim"], config["num_heads"]
    image = config.get("has_image_input", kind in ("i2v", "flf2v"))
    found = {
        "patch_size": list(config.get("patch_size", (1, 2, 2))),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": config["in_dim"],
        "out_channels": config["out_dim"],
        "text_dim": config.get("text_dim", 4096),
        "freq_dim": config["freq_dim"],
        "ffn_dim": config["ffn_dim"],
        "num_layers": config["num_layers"],
        "cross_attn_norm": config.get("cross_attn_norm", True),
        "eps": config["eps"],
    }
    # VideoX-Fun names Wan2.2's cross-attention without image tokens; Wan2.2's own files have an
    # I2V type and no image tokens either, and only their class is named otherwise.
    if image and config.get("cross_attn_type") != "cross_attn":
        found |= {"image_dim": 1280, "added_kv_proj_dim": dim}
        if kind == "flf2v" or config.get("has_image_pos_emb"):
            found["pos_embed_seq_len"] = 514
    return found
