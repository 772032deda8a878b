"""Parameter names and ``config.json`` of official Wan, which HY-Video-PRFL's checkpoints use."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from prfl_fast.models.blocks import TEXT_TOKENS
from prfl_fast.utils.checks import check

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
    """Convert a parameter name of diffusers to official Wan's, or back; keep other names."""
    # In diffusers the head's table has the same name as those of blocks, so it comes first.
    if key in ("scale_shift_table", "head.modulation"):
        return "head.modulation" if to_reference else "scale_shift_table"
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", key)
    prefix, path = (block[1], block[2]) if block else ("", key)
    renames: tuple[tuple[str, str], ...] = _BLOCK_RENAMES if block else _RENAMES
    for ours, theirs in renames:
        old, new = (ours, theirs) if to_reference else (theirs, ours)
        # Matches whole parts of a path only: "norm_q." is not "q.".
        path = re.sub(rf"(^|\.){re.escape(old)}", lambda m, new=new: m[1] + new, path, count=1)
        if not block and path != key:
            break
    return prefix + path


def reference_config(config: Any, dim: int) -> dict[str, Any]:
    """Return official Wan's ``config.json`` for a diffusers config of width ``dim``."""
    # Defaults that are the same in all released Wan models are omitted.
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


# Layers of official Wan that an adapter may change; those of a block are below "blocks.<i>.".
_BLOCK_LAYERS = (
    *(f"{part}.{layer}" for part in ("self_attn", "cross_attn") for layer in "qkvo"),
    *("cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"),
)
_LAYERS = (
    *("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0"),
    *("time_embedding.2", "time_projection.1", "img_emb.proj.1", "img_emb.proj.3", "head.head"),
)


def rename_layer(name: str, to_reference: bool) -> str:
    """Convert the name of a layer as :func:`rename` converts its parameters' names."""
    return rename(f"{name}.weight", to_reference).removesuffix(".weight")


def _layer_names() -> dict[str, str]:
    """Map both names of every layer, with dots or underscores, to diffusers' name."""
    names = {}
    for layer in (*(f"blocks.0.{layer}" for layer in _BLOCK_LAYERS), *_LAYERS):
        ours = rename_layer(layer, to_reference=False)
        for name in (ours, layer):
            names[name] = names[name.replace(".", "_")] = ours
    return names


_NAMES = _layer_names()


def find_layer(name: str) -> str | None:
    """Return diffusers' name of a layer of a LoRA file; None if Wan has no such layer.

    ``name`` is diffusers' or official Wan's, with dots or underscores. Underscores are ambiguous
    (``self_attn_k_img``), so the name is looked up and not split.
    """
    block = re.match(r"blocks[._](\d+)(?=[._])", name)
    if block is None:
        return _NAMES.get(name)
    found = _NAMES.get(f"{name[:7]}0{name[block.end() :]}")
    return found and found.replace("blocks.0.", f"blocks.{block[1]}.", 1)


def diffusers_config(
    weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any], source: object
) -> dict[str, Any]:
    """Return the arguments of diffusers' class for weights under diffusers' names.

    Shapes give all arguments except the number of heads. That comes from ``settings`` (the
    ``config.json`` of official Wan or diffusers), or from heads of 128 columns, as in all released
    Wan models.

    Raises:
        ValueError: if a needed tensor is missing, or ``settings`` contradicts the shapes.
    """

    def shape(name: str) -> torch.Size:
        check(name in weights, f"{source}: {name}", None, "a tensor of Wan")
        return weights[name].shape

    dim, channels, *patch = shape("patch_embedding.weight")
    layers = {int(match[1]) for n in weights if (match := re.match(r"blocks\.(\d+)\.", n))}
    found: dict[str, Any] = {
        "in_dim": channels,
        "dim": dim,
        "num_layers": len(layers),
        "text_len": TEXT_TOKENS,  # rows of text, which the weights do not contain
        "ffn_dim": shape("blocks.0.ffn.net.0.proj.weight")[0],
        "text_dim": shape("condition_embedder.text_embedder.linear_1.weight")[1],
        "freq_dim": shape("condition_embedder.time_embedder.linear_1.weight")[1],
        "out_dim": shape("proj_out.weight")[0] // torch.Size(patch).numel(),
    }
    for key, value in found.items():
        given = settings.get(key, value)
        check(given == value, f"{source}: {key} of config.json", given, f"the weights' {value}")
    heads = settings.get("num_heads", settings.get("num_attention_heads", dim // 128))
    whole = isinstance(heads, int) and heads > 0 and dim % heads == 0
    hint = "The weights do not contain it: put the model's config.json beside them"
    check(whole, f"{source}: num_heads", heads, f"a divisor of {dim}", hint=hint)
    embedder = "condition_embedder.image_embedder"
    image, table = (weights.get(f"{embedder}.{n}") for n in ("norm1.weight", "pos_embed"))
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": channels,
        "out_channels": found["out_dim"],
        **{k: found[k] for k in ("text_dim", "freq_dim", "ffn_dim", "num_layers")},
        "cross_attn_norm": "blocks.0.norm2.weight" in weights,
        "eps": settings.get("eps", 1e-6),
        "image_dim": None if image is None else len(image),
        "added_kv_proj_dim": dim if "blocks.0.attn2.add_k_proj.weight" in weights else None,
        "pos_embed_seq_len": None if table is None else table.shape[1],
    }


def from_reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the diffusers configuration for a ``config.json`` in the official layout.

    It may come from Wan2.1, Wan2.2, HY-Video-PRFL, VideoX-Fun or DiffSynth-Studio. Raise
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
    # Wan2.2 I2V has no image tokens. VideoX-Fun marks this by cross_attn_type. Wan2.2's own files
    # also have the type i2v, and only their class has another name.
    if image and config.get("cross_attn_type") != "cross_attn":
        found |= {"image_dim": 1280, "added_kv_proj_dim": dim}
        if kind == "flf2v" or config.get("has_image_pos_emb"):
            found["pos_embed_seq_len"] = 514
    return found
