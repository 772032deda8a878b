"""Configuration of the transformer that is planned for: presets, folders and models."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prfl_fast.models.block_adapter import DiffusersAdapter
from prfl_fast.models.loading import expert_folders, read_wan, transformer_class
from prfl_fast.models.official import WanOfficialAdapter, diffusers_config
from prfl_fast.models.registry import ADAPTERS, find_adapter
from prfl_fast.models.wan_weights import from_reference_config
from prfl_fast.utils.checks import check, check_choice, check_type
from prfl_fast.utils.io import read_json

_WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
# Strides of the VAEs in frames, height and width by their latent channels, those that a transformer
# predicts: Mochi's, Wan2.1's and HunyuanVideo's, HunyuanVideo-1.5's, Wan2.2 TI2V-5B's, LTX's.
# The first frame of a video has its own latent.
VAE_STRIDES = {
    12: (6, 8, 8),
    16: (4, 8, 8),
    32: (4, 16, 16),
    48: (4, 16, 16),
    128: (8, 32, 32),
}

_IMAGE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
MODELS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": _WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": _WAN_14B,
    "wan2.1-i2v-14b": _WAN_14B | _IMAGE,
    "wan2.1-flf2v-14b": _WAN_14B | _IMAGE | {"pos_embed_seq_len": 514},
    "wan2.2-t2v-a14b": _WAN_14B | {"boundary_ratio": 0.875},
    "wan2.2-i2v-a14b": _WAN_14B | {"in_channels": 36, "boundary_ratio": 0.9},
    "wan2.2-ti2v-5b": _WAN_14B
    | {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30}
    | {"in_channels": 48, "out_channels": 48},
    "hunyuan-video": {
        "class_name": "HunyuanVideoTransformer3DModel",
        "patch_size": 2,
        "patch_size_t": 1,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 20,
        "num_single_layers": 40,
    },
    "hunyuan-video-1.5": {
        "class_name": "HunyuanVideo15Transformer3DModel",
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 16,
        "attention_head_dim": 128,
        "in_channels": 65,
        "out_channels": 32,
        "num_layers": 54,
    },
    "ltx-video": {
        "class_name": "LTXVideoTransformer3DModel",
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 64,
        "in_channels": 128,
        "out_channels": 128,
        "num_layers": 28,
    },
    "ltx-2": {
        "class_name": "LTX2VideoTransformer3DModel",
        "patch_size": 1,
        "patch_size_t": 1,
        "num_attention_heads": 32,
        "attention_head_dim": 128,
        "in_channels": 128,
        "out_channels": 128,
        "num_layers": 48,
        "rope_type": "split",
    },
    "mochi": {
        "class_name": "MochiTransformer3DModel",
        "patch_size": 2,
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 12,
        "out_channels": 12,
        "num_layers": 48,
    },
}

Model = nn.Module | Mapping[str, Any] | str | os.PathLike[str]
_WAN = "WanTransformer3DModel"


def adapter_of(config: Mapping[str, Any]) -> Any:
    """Return the adapter of a configuration's ``class_name``, which is Wan's if there is none.

    Raise ``ValueError`` for a class that the planner does not simulate.
    """
    name = config.get("class_name", _WAN)
    adapters: dict[str, Any] = {
        a.class_name: a for a in ADAPTERS if isinstance(a, DiffusersAdapter)
    }
    if name not in adapters:
        planned = [n for n, adapter in adapters.items() if getattr(adapter, "planned", True)]
        check_choice("class of the model", name, planned)
    return _planned(adapters[name])


def first_blocks(config: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """Return the configuration of the first blocks of a model."""
    return config | adapter_of(config).depth(config, num_blocks)


def _planned(adapter: Any) -> Any:
    """Return the adapter; raise ``ValueError`` if the planner cannot simulate its models."""
    known = getattr(adapter, "planned", True)
    hint = "Measure a short run with prfl_fast.memory instead"
    check(known, "model", adapter.name, "a class that the planner simulates", hint=hint)
    return adapter


def model_config(model: Model) -> dict[str, Any]:
    """Return the diffusers configuration of a transformer, or of an official Wan's equal.

    That of two experts has ``boundary_ratio``.

    Args:
        model: a supported transformer, its configuration, a folder with ``config.json`` (or with
            ``transformer/config.json``), weights of official Wan, or one of ``MODELS``.

    Raises:
        ValueError: if there is no preset, folder or valid configuration of that name.
    """
    if isinstance(model, nn.Module):
        adapter = _planned(find_adapter(model))
        if isinstance(adapter, WanOfficialAdapter):
            return diffusers_config(model)
        kind = {} if adapter.class_name == _WAN else {"class_name": adapter.class_name}
        return adapter.backbone_config(model) | kind
    if isinstance(model, Mapping):
        if "dim" in model and "num_heads" in model:
            return from_reference_config(model)
        name = model.get("_class_name", _WAN)
        kind = {} if name == _WAN else {"class_name": name}
        return {key: value for key, value in model.items() if not key.startswith("_")} | kind
    check_type("model", model, (str, os.PathLike), "a transformer, its configuration or a path")
    if str(model).lower() in MODELS:
        return MODELS[str(model).lower()]
    if experts := expert_folders(model):
        return _read_config(experts[0] / "config.json") | {"boundary_ratio": experts[2]}
    paths = (Path(model) / "config.json", Path(model) / "transformer" / "config.json")
    path = next((path for path in paths if path.is_file()), None)
    if path is None and Path(model).exists():  # weights alone, whose shapes tell
        return dict(transformer_class(model)[1])
    expected = f"one of {', '.join(MODELS)}, or the folder of a diffusers transformer"
    check(path is not None, "model", str(model), expected, hint="The folder has a config.json")
    assert path is not None
    return _read_config(path)


def vae_stride(channels: int) -> tuple[int, int, int]:
    """Return frames, rows and columns of pixels per latent of the VAE with these latent channels.

    Raise ``ValueError`` if there is none in ``VAE_STRIDES``.
    """
    expected = f"one of {', '.join(map(str, VAE_STRIDES))}, as the known VAEs have"
    check(channels in VAE_STRIDES, "latent channels", channels, expected)
    return VAE_STRIDES[channels]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
        if "num_heads" in config:  # official Wan's: only weights tell Wan2.1 I2V from Wan2.2 I2V
            with contextlib.suppress(FileNotFoundError):
                return dict(read_wan(path.parent).config)
        elif "_class_name" in config:
            adapter_of({"class_name": config["_class_name"]})
        layers = config["num_layers"]
        check(isinstance(layers, int), "num_layers", layers, "an integer")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"model: {path} is not a configuration of a transformer: {reason}"
        ) from error
    return model_config(config)
