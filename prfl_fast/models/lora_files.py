"""Read and write LoRA files of Wan trainers, told apart by their keys."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from prfl_fast.models.loading import COMFYUI
from prfl_fast.models.wan_weights import find_layer, rename_layer
from prfl_fast.utils.adapters import ADAPTER_METADATA, PIPELINE_PART, pattern_value
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import open_tensors, read_json
from prfl_fast.utils.shards import read_state, write_tensors

LoraLayout = Literal["diffusers", "official", "comfyui", "kohya"]

KOHYA = "lora_unet_"
# Longer ones first: VideoX-Fun writes two underscores, HY-Video-PRFL no "unet_".
_PREFIXES = (
    *("base_model.model.", f"model.{COMFYUI}", COMFYUI, PIPELINE_PART, "pipe.dit."),
    *(f"{KOHYA}_", KOHYA, "lora_"),
)
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up)|alpha)(?:\.default)?"
    r"(?:\.weight)?"
)
# Keys of what a pair of matrices with a scale cannot express.
_OTHERS = {
    r"lora_magnitude_vector|dora_scale": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.lora_mid": "LoCon",
    r"lora_(B|up)(\.\w+)?\.bias$": "LoRA with bias",
    r"\.diff(_b)?$": "weight differences",
}
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


class LoraLayer(NamedTuple):
    """Low-rank change of one layer: ``weight + alpha / rank * up @ down``."""

    down: torch.Tensor  # [rank, in], of a convolution [rank, in, ...]
    up: torch.Tensor  # [out, rank], of a convolution [out, rank, 1, ...]
    alpha: float

    def delta(self) -> torch.Tensor:
        """Return the change of the weight, float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        product *= self.alpha / len(self.down)
        return product.view(len(self.up), *self.down.shape[1:])


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
    ``adapter_config.json``), ComfyUI, DiffSynth-Studio (``.lora_A.default.``), kohya's tools,
    VideoX-Fun and HY-Video-PRFL (``lora_…lora_down``). Without alpha, alpha is the rank.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no plain LoRA (DoRA, LoHa, LoKr, rsLoRA, bias) or incomplete, or
            names a layer that Wan does not have.
    """
    file = lora_file(path)
    if file is None:
        raise FileNotFoundError(f"{path}: no such file, or no LoRA in it")
    settings = _settings(file)
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    names: dict[str, str] = {}
    for key, tensor in read_state(file).items():
        match = _KEY.fullmatch(key)
        kind = next((kind for mark, kind in _OTHERS.items() if re.search(mark, key)), None)
        label = f"{file}: {key}"
        check(kind is None and match is not None, label, kind, "a plain LoRA's down, up or alpha")
        assert match is not None
        written = match["layer"]
        prefix = next((p for p in _PREFIXES if written.startswith(p)), "")
        stripped = written.removeprefix(prefix)
        layer = find_layer(stripped)
        check(layer is not None, label, stripped, "a linear layer of Wan")
        assert layer is not None
        part = next((p for p in ("down", "up") if match[p]), "alpha")
        check(part not in parts[layer], label, "a second one", f"one {part} of a layer")
        parts[layer][part], names[layer] = tensor, stripped
    lora = {}
    for layer, found in parts.items():
        pair = "down" in found and "up" in found and found["up"].shape[1] == len(found["down"])
        forms = {part: list(tensor.shape) for part, tensor in found.items()}
        check(pair, f"{file}: {names[layer]}", forms, "down [rank, in] and up [out, rank]")
        alpha = float(len(found["down"]))
        if settings:
            alpha = pattern_value(settings, "alpha", names[layer])
        if "alpha" in found:
            alpha = float(found["alpha"])
        lora[layer] = LoraLayer(found["down"], found["up"], alpha)
    return lora


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
    plain = {"peft_type": "LORA", "use_rslora": False, "use_dora": False, "lora_bias": False}
    for key, value in plain.items():
        given = settings.get(key, value)
        hint = "No other layout holds it"
        check(given == value, f"{file}: {key}", given, f"{value}, a plain LoRA", hint=hint)
    check(not settings or "r" in settings, f"{file}: metadata", sorted(settings)[:3], "a rank r")
    return settings


def write_lora(lora: Mapping[str, LoraLayer], path: Path, layout: LoraLayout) -> None:
    """Write a LoRA to a safetensors file, atomically.

    ``"diffusers"`` has metadata for ``load_lora_weights``, ``"kohya"`` the alpha of every layer,
    ``"official"`` (bare names) and ``"comfyui"`` (``diffusion_model.``) alpha where it is not the
    rank. Read tensors are written bit for bit.
    """
    tensors, metadata = {}, {}
    down, up = ("lora_down", "lora_up") if layout == "kohya" else ("lora_A", "lora_B")
    for name, layer in sorted(lora.items()):
        key = PIPELINE_PART + name
        if layout != "diffusers":
            key = rename_layer(name, to_reference=True)
            prefixes = {"official": "", "comfyui": COMFYUI, "kohya": KOHYA}
            key = prefixes[layout] + (key.replace(".", "_") if layout == "kohya" else key)
            if layout == "kohya" or layer.alpha != len(layer.down):
                alpha = torch.tensor(layer.alpha)
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
    values = {"rank": {n: len(v.down) for n, v in sorted(lora.items())}}
    values["alpha"] = {n: v.alpha for n, v in sorted(lora.items())}  # type: ignore[misc]
    for kind, key in (("rank", "r"), ("alpha", "lora_alpha")):
        ((common, _),) = Counter(values[kind].values()).most_common(1)
        settings[key] = common
        settings[f"{kind}_pattern"] = {n: v for n, v in values[kind].items() if v != common}
    return {PIPELINE_PART + key: value for key, value in settings.items()}
