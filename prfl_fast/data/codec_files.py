"""Read the autoencoder, umT5 and CLIP from the files of diffusers' and official Wan's pipelines."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prfl_fast.utils.checks import check, reason_of
from prfl_fast.utils.io import check_fit, read_json
from prfl_fast.utils.optional import need
from prfl_fast.utils.shards import read_state

Device = torch.device | str


# Patterns of official Wan's files by the subfolder of diffusers' pipelines.
FILES = {
    "vae": "Wan2.*_VAE.pth",
    "text_encoder": "models_t5_*.pth",
    "image_encoder": "models_clip_*.pth",
}


def find_part(path: Path, part: str) -> Path:
    """Return the folder of a part of a diffusers pipeline, or the file of official Wan.

    Args:
        path: of a pipeline, or of the part.
        part: ``vae``, ``text_encoder`` or ``image_encoder``.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder, expected a pipeline with {part}")
    if (path / part / "config.json").is_file():
        return path / part
    files = sorted(path.glob(FILES[part]))
    whole = files or (path / "model_index.json").is_file() or any(path.glob("*.pth"))
    if not whole and (path / "config.json").is_file():  # the part's own folder
        return path
    if not files:
        raise ValueError(f"{path}: has no {part}, expected {part}/config.json or {FILES[part]}")
    return files[0]


def has_part(path: Path, part: str) -> bool:
    """Return True if a pipeline has a part."""
    return (path / part / "config.json").is_file() or any(path.glob(FILES[part]))


def find_processor(place: Path, part: str) -> Path:
    """Return the folder of umT5's tokenizer or CLIP's image processor beside the part.

    Args:
        place: of the part, see :func:`find_part`.
        part: ``text_encoder`` or ``image_encoder``.

    Raises:
        ValueError: if there is none.
    """
    name = "tokenizer" if part == "text_encoder" else "image_processor"
    folder = place.parent / (name if place.is_dir() else "google/umt5-xxl")
    check(folder.is_dir(), f"{name} of {place}", None, f"the folder {folder}")
    return folder


def check_parts(model: Path, images: bool) -> None:
    """Raise ``ValueError`` if umT5, its tokenizer or, with ``images``, CLIP is missing."""
    find_processor(find_part(model, "text_encoder"), "text_encoder")
    if images:
        place = find_part(model, "image_encoder")
        if place.is_dir():
            find_processor(place, "image_encoder")


def _pretrained(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Read a model of diffusers or transformers; any missing or unexpected tensor is an error."""
    try:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # readers of both packages raise errors of any type
        reason = reason_of(error)
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {reason}") from error
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(name) or ()))
        check(not keys, f"{folder}: {name.replace('_', ' ')}", keys[:3], "none")
    return model


def _loaded(load: Callable[..., Any], folder: Path) -> Any:
    """Read a tokenizer or image processor."""
    try:
        return load(folder, local_files_only=True)
    except Exception as error:
        reason = reason_of(error)
        raise ValueError(f"{folder} cannot be loaded: {reason}") from error


def read_vae(path: Path, dtype: torch.dtype, any_class: bool = False) -> Any:
    """Return the autoencoder of a path; see :func:`prfl_fast.data.codec.load_codec`.

    Its class is ``AutoencoderKLWan``, or with ``any_class`` the one that its folder names.
    """
    place, diffusers = find_part(path, "vae"), need("diffusers")
    kind = diffusers.AutoencoderKLWan
    if any_class:
        name = str(read_json(place / "config.json").get("_class_name"))
        kind = getattr(diffusers, name, None)
        check(kind is not None, f"autoencoder of {path}", name, "a class of this diffusers")
    if place.is_dir():
        return _pretrained(kind, place, dtype)
    state = read_state(place)
    first, last = state.get("encoder.conv1.weight"), state.get("decoder.head.0.gamma")
    expected = "those of Wan2.1_VAE.pth or Wan2.2_VAE.pth, such as encoder.conv1.weight"
    check(first is not None and last is not None, f"{place}: names", sorted(state)[:3], expected)
    assert first is not None and last is not None
    config = {"base_dim": first.shape[0], "decoder_base_dim": last.shape[0]}
    nested = first.shape[1] == 12  # Wan2.2 takes patches of 2x2 pixels, and nests its blocks
    if nested:
        config |= _WAN22 | {"latents_mean": _MEAN22, "latents_std": _STD22}
    with torch.device("meta"):
        model = kind(**config)
    return _assigned(model, {vae_name(n, nested): t for n, t in state.items()}, dtype, place)


def vae_name(name: str, nested: bool) -> str:
    """Return diffusers' name of a tensor of Wan's autoencoder; ``nested`` is that of Wan2.2."""
    for pattern, new in _VAE_NAMES:
        name = re.sub(pattern, new, name)
    if nested:
        sampler = r"samples\.(\d+)\.(?:up|down)samples\.\d+\.(?=resample|time_conv)"
        name = re.sub(r"(up|down)" + sampler, r"\1_blocks.\2.\1sampler.", name)
        inner = r"(up|down)samples\.(\d+)\.(?:up|down)samples\."
        return re.sub(inner, r"\1_blocks.\2.resnets.", name)

    def group(match: re.Match[str]) -> str:
        block, index = divmod(int(match[1]), 4)  # three residual blocks and an upsampler
        return f"up_blocks.{block}." + ("upsamplers.0." if index == 3 else f"resnets.{index}.")

    name = re.sub(r"upsamples\.(\d+)\.", group, name)
    return name.replace("downsamples.", "down_blocks.")


def read_text_encoder(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return umT5 and its tokenizer; see :func:`prfl_fast.data.codec.load_text_encoder`."""
    place = find_part(path, "text_encoder")
    tokenizer = find_processor(place, "text_encoder")
    transformers = need("transformers", "video")
    if place.is_dir():
        model = _pretrained(transformers.UMT5EncoderModel, place, dtype)
    else:
        model = _official_umt5(transformers, place, dtype)
    return model, _loaded(transformers.AutoTokenizer.from_pretrained, tokenizer)


def _official_umt5(transformers: Any, file: Path, dtype: torch.dtype) -> Any:
    state = read_state(file)
    expected = "those of models_t5_umt5-xxl-enc-bf16.pth, such as blocks.0.attn.q.weight"
    fits = {"token_embedding.weight", "blocks.0.attn.q.weight", "blocks.0.ffn.gate.0.weight"}
    fits |= {"blocks.0.pos_embedding.embedding.weight"}
    check(fits <= state.keys(), f"{file}: names", sorted(state)[:3], expected)
    vocabulary, width = state["token_embedding.weight"].shape
    buckets, heads = state["blocks.0.pos_embedding.embedding.weight"].shape
    config = transformers.UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=state["blocks.0.attn.q.weight"].shape[0] // heads,
        d_ff=state["blocks.0.ffn.gate.0.weight"].shape[0],
        num_layers=len({n.split(".")[1] for n in state if n.startswith("blocks.")}),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )
    with torch.device("meta"):
        model = transformers.UMT5EncoderModel(config)
    named = {umt5_name(name): tensor for name, tensor in state.items()}
    named["encoder.embed_tokens.weight"] = named["shared.weight"]
    return _assigned(model, named, dtype, file)


def umt5_name(name: str) -> str:
    """Return transformers' name of a tensor of official Wan's umT5."""
    for pattern, new in _UMT5_NAMES:
        name = re.sub(pattern, new, name)
    return name


def read_image_encoder(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return CLIP and its processor; see :func:`prfl_fast.data.codec.load_image_encoder`."""
    place = find_part(path, "image_encoder")
    folder = find_processor(place, "image_encoder") if place.is_dir() else None
    transformers = need("transformers", "video")
    if folder is not None:
        model = _pretrained(transformers.CLIPVisionModel, place, dtype)
        return model, _loaded(transformers.CLIPImageProcessor.from_pretrained, folder)
    return _official_clip(transformers, place, dtype)


def _official_clip(transformers: Any, file: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    all_names = read_state(file)
    state = {n.removeprefix("visual."): t for n, t in all_names.items() if n.startswith("visual.")}
    expected = "those of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
    fits = {"patch_embedding.weight", "pos_embedding", "transformer.0.mlp.0.weight"}
    check(fits <= state.keys(), f"{file}: names", sorted(all_names)[:3], expected)
    width, _, patch, _ = state["patch_embedding.weight"].shape
    size = patch * round((state["pos_embedding"].shape[1] - 1) ** 0.5)
    config = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=state["transformer.0.mlp.0.weight"].shape[0],
        num_hidden_layers=len({n.split(".")[1] for n in state if n.startswith("transformer.")}),
        num_attention_heads=max(width // 80, 1),  # ViT-H has heads of 80 channels
        image_size=size,
        patch_size=patch,
        hidden_act="gelu",
    )
    with torch.device("meta"):
        model = transformers.CLIPVisionModel(config)
    prefix = next(iter(model.state_dict())).partition("embeddings.")[0]  # none in transformers 5
    named = {prefix + n: t for name, value in state.items() for n, t in clip_tensors(name, value)}
    model = _assigned(model, named, dtype, file)
    embeddings = next(m for m in model.modules() if hasattr(m, "position_ids"))
    # A buffer that no file holds, so it is still on the meta device.
    embeddings.position_ids = torch.arange(state["pos_embedding"].shape[1])[None]
    sides = {"height": size, "width": size}
    return model, transformers.CLIPImageProcessor(size=sides, do_center_crop=False)


def clip_tensors(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """Return transformers' names and values of a tensor of official Wan's vision model."""
    if name == "head":  # the projection to the text's space, which no penultimate state passes
        return []
    for pattern, new in _CLIP_NAMES:
        name = re.sub(pattern, new, name)
    if "to_qkv" in name:
        parts = zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True)
        return [(name.replace("attn.to_qkv", f"self_attn.{part}"), t) for part, t in parts]
    shaped = tensor.flatten() if name.endswith("class_embedding") else tensor
    return [(name, shaped[0] if name.endswith("position_embedding.weight") else shaped)]


def _assigned(model: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, file: Path) -> Any:
    """Give a model on the meta device its weights."""
    check_fit(model.state_dict(), state, file)
    model.load_state_dict({n: t.to(dtype, copy=True) for n, t in state.items()}, assign=True)
    return model.eval()


_VAE_NAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(en|de)coder\.conv1\.", r"\1coder.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)
_UMT5_NAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.", r"encoder.block.\1.layer."),
    (r"\.layer\.norm1\.", ".layer.0.layer_norm."),
    (r"\.layer\.norm2\.", ".layer.1.layer_norm."),
    (r"\.layer\.attn\.", ".layer.0.SelfAttention."),
    (r"\.layer\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.layer\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.layer\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.layer\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)
_CLIP_NAMES = (
    (r"^cls_embedding$", "embeddings.class_embedding"),
    (r"^pos_embedding$", "embeddings.position_embedding.weight"),
    (r"^patch_embedding\.", "embeddings.patch_embedding."),
    (r"^pre_norm\.", "pre_layrnorm."),  # as transformers spells it
    (r"^post_norm\.", "post_layernorm."),
    (r"^transformer\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.2\.", ".mlp.fc2."),
)
# Configuration of Wan2.2's autoencoder, and the statistics of its latents, which its file lacks.
_WAN22: dict[str, Any] = {
    "z_dim": 48,
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
# fmt: off
_MEAN22 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542,
    0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109,
    0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899,
    -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
_STD22 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344,
    0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804,
    0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999,
    0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on
