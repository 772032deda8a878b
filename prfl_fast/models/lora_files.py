"""Read and write LoRA files of Wan trainers, told apart by their keys."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from prfl_fast.models.loading import COMFYUI, WAN
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.models.wan_weights import find_layer, rename_layer
from prfl_fast.utils.adapters import ADAPTER_METADATA, PIPELINE_PART, pattern_value
from prfl_fast.utils.checks import check, reason_of
from prfl_fast.utils.io import open_tensors, read_json
from prfl_fast.utils.optional import need
from prfl_fast.utils.shards import read_state, write_tensors

LoraLayout = Literal["diffusers", "official", "comfyui", "kohya"]

KOHYA = "lora_unet_"
# Longer ones first: VideoX-Fun writes two underscores, HY-Video-PRFL no "unet_".
_PREFIXES = (
    *("base_model.model.", f"model.{COMFYUI}", COMFYUI, PIPELINE_PART, "pipe.dit."),
    *(f"{KOHYA}_", KOHYA, "lora_"),
)
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?P<bias>lora_B(?:\.default)?\.bias)|(?:(?P<down>lora_A|lora_down)"
    r"|(?P<up>lora_B|lora_up)|(?P<magnitude>lora_magnitude_vector)|alpha)"
    r"(?:\.default)?(?:\.weight)?)"
)
# Keys of what a pair of matrices with a scale, and peft's DoRA and bias, cannot express.
_OTHERS = {
    # ComfyUI divides by the norm of the unchanged weight, LyCORIS by that of the changed one and
    # along either axis.
    r"\.dora_scale": "DoRA of another trainer than peft",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid": "LoCon",
    r"\.diff(_b|_m)?$": "weight differences",
}
# Initial values that peft adds without changing the weights below.
_INITIAL = (True, False, None, "gaussian", "eva")
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


Lora = dict[str, LoraLayer]  # by diffusers' name of the layer


def lora_file(path: Path) -> Path | None:
    """Return the file of an adapter, which may be given as its folder; None if there is none."""
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        return found[0] if found else None
    if not path.is_file():
        return None
    names: Iterable[str]
    if path.suffix == ".safetensors":
        with open_tensors(path) as file:
            names = list(file.keys())
    else:
        names = read_state(path)
    marks = "|".join(("lora_", *_OTHERS))
    return path if any(re.search(marks, name) for name in names) else None


def read_lora(path: Path) -> Lora:
    """Read a LoRA of a Wan model; its bytes are read when a tensor is used.

    It may be of diffusers (``transformer.``, with metadata), peft (``base_model.model.``, with
    ``adapter_config.json``), both also with DoRA, rsLoRA and bias, ComfyUI, DiffSynth-Studio
    (``.lora_A.default.``), kohya's tools, VideoX-Fun and HY-Video-PRFL (``lora_…lora_down``).
    Without alpha, alpha is the rank. The alpha of rsLoRA is that of the same scale without it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no LoRA (LoHa, LoKr) or incomplete, or names a layer that Wan
            does not have.
    """
    file = lora_file(path)
    if file is None:
        raise FileNotFoundError(f"{path}: no such file, or no LoRA in it")
    return parse_lora(read_state(file), file)


def without_prefix(name: str) -> str:
    """Return the name of a layer in a LoRA file without the prefix of the file's writer."""
    return name.removeprefix(next((p for p in _PREFIXES if name.startswith(p)), ""))


def parse_lora(tensors: Mapping[str, torch.Tensor], file: Path) -> Lora:
    """Return the LoRA of some tensors of a file, with the errors of :func:`read_lora`."""
    settings = _settings(file)
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    names: dict[str, str] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        kind = next((kind for mark, kind in _OTHERS.items() if re.search(mark, key)), None)
        label = f"{file}: {key}"
        ok, kind = kind is None and match is not None, kind or "unknown"
        check(ok, label, kind, "a LoRA's down, up, alpha, peft's DoRA or bias")
        assert match is not None
        stripped = without_prefix(match["layer"])
        layer = find_layer(stripped)
        check(layer is not None, label, stripped, "a linear layer of Wan")
        assert layer is not None
        part = next((p for p in ("down", "up", "magnitude", "bias") if match[p]), "alpha")
        check(part not in parts[layer], label, "a second one", f"one {part} of a layer")
        parts[layer][part], names[layer] = tensor, stripped
    for part, key in (("magnitude", "use_dora"), ("bias", "lora_bias")):
        count = sum(part in found for found in parts.values())
        wanted = len(parts) if settings.get(key, count > 0) else 0
        expected = f"{wanted}, as {key} is of the whole adapter"
        check(count == wanted, f"{file}: number of layers with {part}", count, expected)
    return {
        layer: _layer(found, settings, names[layer], f"{file}: {names[layer]}")
        for layer, found in parts.items()
    }


def _layer(
    found: Mapping[str, torch.Tensor], settings: Mapping[str, Any], name: str, label: str
) -> LoraLayer:
    """Return a layer of the tensors ``found`` in a file; errors name its ``label``."""
    down, up = (found.get(part, torch.empty(0)) for part in ("down", "up"))
    rank, rows = len(down), len(up)
    ok = rank > 0 and down.ndim == up.ndim > 1 and up.shape == (rows, rank, *[1] * (up.ndim - 2))
    ok &= all(found[part].numel() == rows for part in ("magnitude", "bias") if part in found)
    forms = {part: list(tensor.shape) for part, tensor in found.items()}
    check(ok, label, forms, "down [rank, in] and up [out, rank], rank > 0")
    ok = down.is_floating_point() and up.is_floating_point()
    check(ok, f"{label}: dtypes", [down.dtype, up.dtype], "floating point")
    alpha = float(rank)
    if settings:
        try:
            alpha = pattern_value(settings, "alpha", name)
        except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
            raise ValueError(
                f"{label}: no alpha in its adapter's configuration: {error}"
            ) from error
        if settings.get("use_rslora"):  # exact for powers of two, else to one unit of float64
            alpha = alpha / math.sqrt(rank) * rank
    if "alpha" in found:
        alpha = float(found["alpha"]) if found["alpha"].numel() == 1 else math.nan
    check(math.isfinite(alpha), f"{label}: alpha", found.get("alpha", alpha), "a number")
    return LoraLayer(down, up, alpha, found.get("magnitude"), found.get("bias"))


def _settings(file: Path) -> dict[str, Any]:
    """Return peft's configuration of a file; empty if there is none."""
    beside = file.parent / "adapter_config.json"
    settings: Any = {}
    try:
        if file.suffix == ".safetensors":
            with open_tensors(file) as opened:
                settings = json.loads((opened.metadata() or {}).get(ADAPTER_METADATA, "{}"))
        if not settings and file.name == _FILES[1] and beside.is_file():
            settings = read_json(beside)
        settings = {k.removeprefix(PIPELINE_PART): v for k, v in settings.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: its adapter's configuration cannot be read: {error}") from error
    for key, values in (("peft_type", ("LORA",)), ("init_lora_weights", _INITIAL)):
        given = settings.get(key, values[0])
        check(given in values, f"{file}: {key}", given, " or ".join(map(repr, values)))
    check(not settings or "r" in settings, f"{file}: metadata", sorted(settings)[:3], "a rank r")
    return settings


def add_lora_file(model: Any, path: Path) -> None:
    """Add the adapter in a file or folder to a diffusers model, frozen.

    A Wan model takes the files of :func:`read_lora`, others those of diffusers.

    Raises:
        FileNotFoundError: if there is no such file, or no adapter in it.
        ValueError: if the file is damaged, or the adapter does not fit the model.
        MissingExtraError: if peft is not installed.
    """
    need("peft")
    file = lora_file(path)
    if file is None:
        raise FileNotFoundError(f"{path}: no such file, or no adapter in it")
    source: Any = str(file)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    if type(model).__name__ == WAN:
        lora = read_lora(path)
        # diffusers and peft pass over layers that the model lacks.
        lost = sorted(lora.keys() - dict(model.named_modules()).keys())
        check(not lost, f"{file}: layers", lost[:3], "layers of the model")
        source = {}
        for name, layer in lora.items():
            source[f"{PIPELINE_PART}{name}.lora_A.weight"] = layer.down.contiguous()
            source[f"{PIPELINE_PART}{name}.lora_B.weight"] = layer.up.contiguous()
        options = {"metadata": _metadata(lora)}
    try:
        model.load_lora_adapter(source, prefix=PIPELINE_PART.removesuffix("."), **options)
    except Exception as error:  # readers of diffusers and peft raise errors of any type
        reason = reason_of(error)
        raise ValueError(f"{file}: does not fit the model: {reason}") from error
    model.requires_grad_(False)


def write_lora(lora: Mapping[str, LoraLayer], path: Path, layout: LoraLayout) -> None:
    """Write a LoRA to a safetensors file, atomically.

    ``"diffusers"`` has metadata for ``load_lora_weights``, ``"kohya"`` the alpha of every layer,
    ``"official"`` (bare names) and ``"comfyui"`` (``diffusion_model.``) alpha where it is not the
    rank. Read tensors are written bit for bit.

    Raises:
        ValueError: if the LoRA has DoRA or bias, which only ``"diffusers"`` holds.
    """
    tensors: dict[str, torch.Tensor] = {}
    metadata = {}
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    for name, layer in sorted(lora.items()):
        key = PIPELINE_PART + name
        extra = {"lora_magnitude_vector": layer.magnitude, "lora_B.bias": layer.bias}
        held = {part: value for part, value in extra.items() if value is not None}
        tensors |= {f"{key}.{part}": value for part, value in held.items()}
        if layout != "diffusers":
            hint = "Its readers ignore it or give it another meaning: use diffusers, or merge"
            check(not held, f"{name} for layout {layout}", list(held), "a plain LoRA", hint=hint)
            key = rename_layer(name, to_reference=True)
            prefixes = {"official": "", "comfyui": COMFYUI, "kohya": KOHYA}
            key = prefixes[layout] + (key.replace(".", "_") if layout == "kohya" else key)
            if layout == "kohya" or layer.alpha != len(layer.down):
                alpha = torch.tensor(layer.alpha, dtype=torch.float32, device="cpu")
                exact = float(alpha) == layer.alpha
                tensors[f"{key}.alpha"] = (
                    alpha if exact else alpha.new_tensor(layer.alpha, dtype=torch.float64)
                )
        tensors[f"{key}.{down}.weight"], tensors[f"{key}.{up}.weight"] = layer.down, layer.up
    if layout == "diffusers":
        metadata[ADAPTER_METADATA] = json.dumps(_metadata(lora), sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, path, metadata=metadata)


def _metadata(lora: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """Return peft's configuration of a LoRA, with patterns for layers unlike most."""
    settings: dict[str, Any] = {"peft_type": "LORA", "target_modules": sorted(lora)}
    settings["use_dora"] = any(layer.magnitude is not None for layer in lora.values())
    settings["lora_bias"] = any(layer.bias is not None for layer in lora.values())
    values = {"rank": {n: len(v.down) for n, v in sorted(lora.items())}}
    values["alpha"] = {n: v.alpha for n, v in sorted(lora.items())}  # type: ignore[misc]
    for kind, key in (("rank", "r"), ("alpha", "lora_alpha")):
        ((common, _),) = Counter(values[kind].values()).most_common(1)
        settings[key] = common
        settings[f"{kind}_pattern"] = {n: v for n, v in values[kind].items() if v != common}
    return {PIPELINE_PART + key: value for key, value in settings.items()}
