"""Read a transformer from diffusers' folders, or from official Wan's and ComfyUI's files."""

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from prfl_fast.models import wan_weights
from prfl_fast.models.experts import FOLDERS
from prfl_fast.utils.checks import check, reason_of
from prfl_fast.utils.io import check_fit, read_json
from prfl_fast.utils.optional import need
from prfl_fast.utils.shards import read_weights

Layout = Literal["diffusers", "official", "comfyui"]
WAN = "WanTransformer3DModel"
COMFYUI = "diffusion_model."
_PREFIXES = (f"model.{COMFYUI}", COMFYUI)
_BOUNDARIES: dict[Any, float] = {"t2v": 0.875, "i2v": 0.9}
_KINDS = "official Wan's names, with or without ComfyUI's prefix, or diffusers'"


class WanFiles(NamedTuple):
    """Wan weights: layout of the files; configuration and tensors under diffusers' names."""

    layout: Layout
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]


def transformer_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a transformer, from that folder or the one of its pipeline.

    Raise ``ValueError`` for a pipeline with two experts.
    """
    folder = Path(path)
    if not _is_pipeline(folder):
        return folder
    high, low = (folder / name for name in FOLDERS.values())
    if low.is_dir():
        raise ValueError(
            f"{folder} has two experts, expected one: {high} (high noise) or {low} (low noise)"
        )
    return high


def expert_folders(path: str | os.PathLike[str]) -> tuple[Path, Path, float] | None:
    """Return the folders of a pipeline's two experts, high noise first, and their boundary.

    None stands for a path with one transformer. Raise ``ValueError`` if ``model_index.json`` names
    a second transformer that is missing, or no ``boundary_ratio``, or if the ``model_type`` of
    official Wan2.2's experts is unknown.
    """
    folder = Path(path)
    high, low = (folder / f"{name}_noise_model" for name in FOLDERS)
    if high.is_dir() and low.is_dir():
        return high, low, _official_boundary(high, low)
    if not _is_pipeline(folder):
        return None
    high, low = (folder / name for name in FOLDERS.values())
    index = folder / "model_index.json"
    try:
        content = dict(read_json(index))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{index} is not the configuration of a pipeline") from error
    named = content.get(low.name) or [None]
    if named[0] is None and not low.is_dir():
        return None
    check(low.is_dir(), str(low), "missing", f"the second transformer that {index} names")
    boundary: Any = content.get("boundary_ratio")
    hint = f"Give the folders: {{high: {high}, low: {low}, boundary: ...}}"
    check(boundary is not None, f"{index}: boundary_ratio", None, "a number", hint=hint)
    return high, low, boundary


def _official_boundary(high: Path, low: Path) -> float:
    """Return the boundary of official Wan2.2's experts: no file has it, wan/configs does."""
    path = high / "config.json"
    kind = dict(read_json(path)).get("model_type") if path.is_file() else None
    hint = f"Or give {{high: {high}, low: {low}, boundary: ...}}"
    check(kind in _BOUNDARIES, f"{path}: model_type", kind, "t2v or i2v", hint=hint)
    return _BOUNDARIES[kind]


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file() and not (folder / "config.json").is_file()


def read_wan(path: str | os.PathLike[str]) -> WanFiles:
    """Map the weights of a Wan model; their bytes are read when a tensor is used.

    Args:
        path: a file of safetensors, a ``.pth`` file with weights only, or a folder of shards or
            of a pipeline, in the layout of diffusers, official Wan or ComfyUI.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if names fit no layout, or tensors are missing, have another shape, or do not
            fit diffusers' class (``ref_conv``, ``control_adapter``).
    """
    weights = read_weights(transformer_folder(path))
    layout = _layout(weights)
    expected = f"a Wan transformer under {_KINDS}"
    check(layout is not None, f"{path}: names", sorted(weights)[:3], expected)
    assert layout is not None
    return named_wan(weights, layout, _settings(path), path)


def named_wan(
    weights: Mapping[str, torch.Tensor], layout: Layout, settings: Mapping[str, Any], source: object
) -> WanFiles:
    """Give weights diffusers' names, and check that they make one Wan model.

    Errors are those of :func:`read_wan`. ``settings`` is the content of a ``config.json``.
    """
    named: dict[str, torch.Tensor] = {}
    for written, tensor in weights.items():
        name = _diffusers_name(written, layout)
        check(name not in named, f"{source}: {written}", "a second one", f"one tensor {name}")
        named[name] = tensor
    config = wan_weights.diffusers_config(named, settings, source)
    check_fit(empty_wan(config, source).state_dict(), named, source)
    return WanFiles(layout, config, named)


def _diffusers_name(name: str, layout: Layout) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name if layout == "diffusers" else wan_weights.rename(name, to_reference=False)


def _layout(names: Mapping[str, object]) -> Layout | None:
    for name in names:
        path = name.removeprefix(_PREFIXES[0]).removeprefix(COMFYUI)
        # Of any block, so that half of a model is told as such.
        if re.fullmatch(r"blocks\.\d+\.self_attn\.q\.weight", path):
            return "official" if path == name else "comfyui"
        if re.fullmatch(r"blocks\.\d+\.attn1\.to_q\.weight", name):
            return "diffusers"
    return None


def _settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of the ``config.json`` in a model's folder or beside its file."""
    folder = transformer_folder(path)
    file = (folder.parent if folder.is_file() else folder) / "config.json"
    if not file.is_file():
        return {}
    try:
        return dict(read_json(file))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is not the configuration of a diffusers model, or of Wan"
        ) from error


def empty_wan(config: Mapping[str, Any], source: object) -> Any:
    """Build a Wan model on the meta device; raise ``ValueError`` if ``config`` does not fit."""
    try:
        with torch.device("meta"):
            return getattr(need("diffusers"), WAN)(**config)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{source}: builds no {WAN}: {error}") from error


def _class_of_diffusers(path: str | os.PathLike[str]) -> Any:
    """Return diffusers' class for a folder; None if its tensors do not have diffusers' names."""
    found = getattr(need("diffusers"), str(_settings(path).get("_class_name")), None)
    if found is None or Path(path).is_file():
        return None
    # VideoX-Fun stores official names with diffusers' class name, so the names decide.
    with contextlib.suppress(OSError, ValueError):  # for files that only diffusers can read
        if _layout(read_weights(transformer_folder(path))) in ("official", "comfyui"):
            return None
    return found


def transformer_class(path: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """Return the diffusers class and configuration of a model, without reading its weights.

    Errors are those of :func:`load_transformer`.
    """
    if found := _class_of_diffusers(path):
        return found, _settings(path)
    name = _settings(path).get("_class_name")
    unknown = f"{path} names {name!r}, which this diffusers does not have"
    try:
        files = read_wan(path)
    except FileNotFoundError as error:
        kind = "the folder of a diffusers transformer or pipeline, or weights of official Wan"
        missing = f"{path} has no config.json, expected {kind}"
        raise ValueError(missing if name is None else unknown) from error
    if files.layout == "diffusers" and name not in (None, WAN):
        raise ValueError(unknown)
    return getattr(need("diffusers"), WAN), files.config


def load_transformer(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    """Read a transformer to the CPU, as a model of diffusers in eval mode.

    Args:
        path: the folder of a diffusers transformer or pipeline, or a Wan model as in
            :func:`prfl_fast.models.loading.read_wan`.
        dtype: dtype of the weights; modules that diffusers keeps in float32 stay float32.

    Raises:
        ValueError: if the files cannot be read, or tensors are missing, unexpected or of another
            shape.
        MissingExtraError: if diffusers is not installed.
    """
    found, _ = transformer_class(path)
    if _class_of_diffusers(path) is None:
        return build_wan(read_wan(path), dtype)
    # diffusers only warns about missing and unexpected tensors; here they are errors.
    need("diffusers").utils.logging.set_verbosity_error()
    try:
        model, info = found.from_pretrained(
            transformer_folder(path),
            local_files_only=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers' readers raise errors of any type
        reason = reason_of(error)
        raise ValueError(f"{path} cannot be loaded: {reason}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := list(info.get(kind) or ()):
            listed = ", ".join(map(str, keys[:3]))
            raise ValueError(f"{path} has {kind.replace('_', ' ')}: {listed}")
    return model


def build_wan(files: WanFiles, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a model with copies of the weights, in ``dtype`` as in :func:`load_transformer`.

    With None every tensor keeps its dtype.
    """
    model: Any = empty_wan(files.config, "model")
    wide = set(model._keep_in_fp32_modules or ())

    def cast(name: str, tensor: torch.Tensor) -> torch.Tensor:
        target = torch.float32 if wide & set(name.split(".")) else dtype
        # Tensors in a mapped file are not aligned, so they are copied even in the same dtype.
        return tensor.to(tensor.dtype if dtype is None else target, copy=True)

    model.load_state_dict({n: cast(n, t) for n, t in files.weights.items()}, assign=True)
    config = model.config
    # Rotary tables are not in the state dict, so they are still on the meta device.
    model.rope = type(model.rope)(
        config.attention_head_dim, config.patch_size, config.rope_max_seq_len
    )
    return model.eval()


def build_headless_wan(
    state: Mapping[str, torch.Tensor], settings: Mapping[str, Any], source: object
) -> nn.Module:
    """Return a model from official Wan's weights without a head; its head is zero.

    Errors are those of :func:`read_wan`. ``settings`` is the content of a ``config.json``.
    """
    patch = state.get("patch_embedding.weight")
    check(
        patch is not None and patch.ndim == 5, f"{source}: patch_embedding.weight", patch, "Wan's"
    )
    assert patch is not None
    dim, _, *size = patch.shape
    rows = settings.get("out_dim", 16) * torch.Size(size).numel()
    shapes = {"head.head.weight": (rows, dim), "head.head.bias": (rows,)}
    head = {n: patch.new_zeros(s) for n, s in (shapes | {"head.modulation": (1, 2, dim)}).items()}
    return build_wan(named_wan({**state, **head}, "official", settings, source))
