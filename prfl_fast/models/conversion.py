"""Write a Wan model in another layout, or with LoRA merged into its weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from prfl_fast.models import wan_weights
from prfl_fast.models.experts import FOLDERS
from prfl_fast.models.loading import (
    COMFYUI,
    Layout,
    WanFiles,
    empty_wan,
    expert_folders,
    read_wan,
)
from prfl_fast.models.lora_files import Lora, read_lora
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import save_checkpoint_dir
from prfl_fast.utils.shards import SHARD_BYTES, Change, save_shards, write_tensors

OFFICIAL_FOLDERS = ("high_noise_model", "low_noise_model")
FILE, FOLDER = "a file *.safetensors", "a folder"
# ComfyUI reads no shards, and diffusers needs a config.json.
_FORMS = {"comfyui": FILE, "diffusers": FOLDER}
_Path = str | os.PathLike[str]
Show = Callable[[str], object]


def convert_wan(
    source: _Path, out: _Path, layout: Layout, shard_bytes: int = SHARD_BYTES, show: Show = str
) -> None:
    """Write a Wan model in another layout, with the same bits under other names.

    Args:
        source: a model as in :func:`prfl_fast.models.loading.read_wan`.
        out: a new file ``*.safetensors``, or a new folder for shards with ``config.json``. Layout
            ``"diffusers"`` is a folder, ``"comfyui"`` a file.
        layout: layout of the names in ``out``.
        shard_bytes: largest size of a file in a folder, in bytes.
        show: called with the name of each tensor before it is written.

    Raises:
        ValueError: if ``source`` is not a Wan model, or ``out`` exists or does not fit the layout.
        FileNotFoundError: if a file is missing.
    """
    check_output(out, _FORMS.get(layout))
    check_single(source)
    _write(read_wan(source), Path(out), layout, shard_bytes, _shown(show))


def merge_lora(
    source: _Path,
    adapter: _Path,
    out: _Path,
    layout: Layout | None = None,
    shard_bytes: int = SHARD_BYTES,
    show: Show = str,
) -> None:
    """Write a Wan model with a LoRA added to its weights.

    The arithmetic is that of :meth:`prfl_fast.models.lora_layer.LoraLayer.merge`. Arguments and
    errors are those of :func:`convert_wan`; None is the layout of ``source``.

    Raises:
        ValueError: if :func:`prfl_fast.models.lora_files.read_lora` cannot read the LoRA, or it
            changes a layer that the model does not have.
    """
    check_single(source)
    check_single(adapter, "LORA")
    files, lora = read_wan(source), read_lora(Path(adapter))
    check_output(out, _FORMS.get(layout or files.layout))
    for name, layer in lora.items():
        weight = files.weights.get(f"{name}.weight")
        form = None if weight is None else tuple(weight.shape)
        ok = form == (len(layer.up), *layer.down.shape[1:])
        check(ok, f"{adapter}: {name}", [len(layer.up), *layer.down.shape[1:]], f"a layer {form}")
        ok = layer.bias is None or f"{name}.bias" in files.weights
        check(ok, f"{adapter}: {name}'s bias", layer.bias, "a layer with bias")
    _write(files, Path(out), layout or files.layout, shard_bytes, _shown(show, lora))


def check_output(out: _Path, form: str | None) -> None:
    """Raise ``ValueError`` if ``out`` exists or is not of ``form``; None allows both forms."""
    path = Path(out)
    check(not (path.exists() or path.is_symlink()), "OUT", str(path), "a path that is new")
    ok = form is None or (path.suffix == ".safetensors") == (form == FILE)
    check(ok, "OUT", str(path), f"{form} for this layout and kind of weights")


def check_single(source: _Path, name: str = "model") -> None:
    """Raise ``ValueError`` if ``source`` holds the models or adapters of two experts."""
    for names in (FOLDERS.values(), OFFICIAL_FOLDERS):
        folders = [Path(source) / folder for folder in names]
        both, expected = all(folder.is_dir() for folder in folders), " or ".join(map(str, folders))
        check(not both, name, str(source), f"{expected}, one expert at a time")
    expert_folders(source)  # the second one is named, but missing


def _shown(show: Show, lora: Lora | None = None) -> Change:
    """Return the change of a tensor that is written: its layer of the LoRA, if there is one."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        show(name)
        path, _, part = name.rpartition(".")
        layer = (lora or {}).get(path)
        return tensor if layer is None else layer.merge(part, tensor)

    return change


def _write(files: WanFiles, path: Path, layout: Layout, shard_bytes: int, change: Change) -> None:
    names = {name: name for name in files.weights}  # by the name in the file
    config = files.config
    if layout != "diffusers":
        prefix = COMFYUI if layout == "comfyui" else ""
        names = {prefix + wan_weights.rename(n, to_reference=True): n for n in files.weights}
    # Nothing else holds a tensor, so that each one's file is unmapped after its last.
    state = {written: files.weights.pop(name) for written, name in names.items()}

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return change(names[name], tensor)

    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(state, path, changed)
        return
    model = empty_wan(config, path)
    with save_checkpoint_dir(path) as temporary:
        save_shards(state, temporary, shard_bytes, changed)
        if layout == "diffusers":
            model.save_config(temporary)
        else:
            dim = config["num_attention_heads"] * config["attention_head_dim"]
            settings = wan_weights.reference_config(model.config, dim)
            (temporary / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
