"""Save and load the state of a run as a checkpoint folder, which is either absent or complete.

A checkpoint is a folder ``step-00000012``::

    checkpoint.json     format, step, settings, and the size in bytes of every other file
    model/              config.json + diffusion_pytorch_model.safetensors (diffusers models),
                        pytorch_lora_weights.safetensors (models with an adapter: the adapter only,
                        in the format of diffusers' load_lora_weights),
                        or model.safetensors (all other modules)
    ema.safetensors     the averaged trainable parameters, if averaging is on
    state.pt            optimizer, counters, random number generators: tensors and plain values

Files are written under a temporary name, flushed to disk, and renamed. A process killed at any
moment leaves the previous files and at most a ``*.tmp-*`` that the next run removes. ``state.pt``
is read with ``torch.load(weights_only=True)``, which runs no code.
"""

import json
import math
import os
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prfl_fast.utils.adapters import adapter_scales, trained_adapters
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import (
    check_fit,
    load_pickled,
    load_tensors,
    open_tensors,
    remove_atomic,
    save_checkpoint_dir,
    save_tensors,
)
from prfl_fast.utils.optional import need

FORMAT = "prfl_fast checkpoint 2"
_STEP = re.compile(r"step-(\d{8,})")
# Kinds of adapters whose scale in a layer is alpha / rank.
_SCALED = ("LORA", "LOHA", "LOKR")
# Prefix in the file of an adapter: the name of the model inside a diffusers pipeline.
_PIPELINE_PART = "transformer."
_ADAPTER_METADATA = "lora_adapter_metadata"


def copy_into(
    tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], source: object
) -> None:
    """Copy ``tensors`` into ``targets`` in place; errors name their ``source``.

    Raises:
        ValueError: if names, shapes or dtypes differ. No target is changed then.
    """
    check_fit(targets, tensors, source, dtypes=True)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def adapter_name(model: torch.nn.Module) -> str | None:
    """Return the name of the peft adapter that is saved, or None if ``model`` has no adapter.

    It is the only adapter, or of several the one that trains; frozen ones are part of the model.

    Raises:
        ValueError: if the model has several adapters, and not exactly one of them trains.
    """
    names = list(getattr(model, "peft_config", None) or ())
    if len(names) < 2:
        return names[0] if names else None
    trained = trained_adapters(model)
    hint = "Freeze or delete the others: one adapter is saved"
    check(len(trained) == 1, f"adapters that train, of {names},", trained, "one", hint=hint)
    return trained[0]


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the tensors to save, not copied: those of the adapter, or the whole state dict.

    Raises:
        ValueError: if the model has an adapter and also trains parameters outside it.
    """
    name = adapter_name(model)
    if name is None:
        return dict(model.state_dict())
    read = need("peft").get_peft_model_state_dict
    tensors: dict[str, torch.Tensor] = read(model, adapter_name=name)
    stored = {t.data_ptr() for t in tensors.values()}
    for other, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in stored:
            raise ValueError(
                f"{other} is trained beside adapter {name!r}, but only the adapter is saved. "
                "Freeze it, or list it in peft's modules_to_save"
            )
    return tensors


def _model_file(model: torch.nn.Module) -> str:
    if adapter_name(model) is not None:
        return "pytorch_lora_weights.safetensors"
    prefix = "diffusion_pytorch_" if hasattr(model, "save_config") else ""
    return f"{prefix}model.safetensors"


def _adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors, not copied, by the names that ``load_lora_weights`` reads."""
    stored = stored_tensors(model).items()
    return {_PIPELINE_PART + n.removeprefix("base_model.model."): t for n, t in stored}


def _adapter_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Return the adapter's configuration as plain values, for diffusers to read rank and alpha.

    Alpha includes the weight that ``set_adapters`` gave the adapter, in each layer.
    """
    name = adapter_name(model)
    config = model.peft_config[name].to_dict()  # type: ignore[union-attr, index, operator]
    plain: dict[str, Any] = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    if name is not None and plain.get("peft_type") in _SCALED:
        scales, expected, alpha = adapter_scales(model, name), _scales_of(plain), _alpha_key(plain)
        weights = {layer: scale / (expected(layer) or 1.0) for layer, scale in scales.items()}
        first = next(iter(weights.values()), 1.0)
        if all(math.isclose(weight, first, rel_tol=1e-9) for weight in weights.values()):
            if not math.isclose(first, 1.0, rel_tol=1e-9):
                plain[alpha] *= first
                patterns = plain.get("alpha_pattern") or {}
                plain["alpha_pattern"] = {k: v * first for k, v in patterns.items()}
        else:
            alphas = {k: _pattern_value(plain, "alpha", k) * w for k, w in weights.items()}
            plain["alpha_pattern"] = alphas
    return {_PIPELINE_PART + key: value for key, value in plain.items()}


def _pattern_value(settings: Mapping[str, Any], kind: str, layer: str) -> float:
    """Return rank or alpha of one layer, as peft reads ``rank_pattern`` and ``alpha_pattern``."""
    for pattern, value in (settings.get(f"{kind}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(settings["r" if kind == "rank" else _alpha_key(settings)])


def _alpha_key(settings: Mapping[str, Any]) -> str:
    return "lora_alpha" if "lora_alpha" in settings else "alpha"


def _scales_of(settings: Mapping[str, Any]) -> Callable[[str], float]:
    """Return the function that gives a layer's scale by the settings of a LoRA adapter."""

    def scale(layer: str) -> float:
        rank = _pattern_value(settings, "rank", layer)
        divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
        return _pattern_value(settings, "alpha", layer) / divisor

    return scale


def check_savable(model: torch.nn.Module, folder: Path | None = None) -> None:
    """Check that ``model`` can be saved, before a training whose result would be lost.

    Args:
        folder: folder of the checkpoints; a file where a checkpoint or the log goes is refused.

    Raises:
        ValueError: if the model trains several adapters or parameters beside an adapter, a tensor
            has no plain bytes (torchao's weights, shards, meta tensors), or a file is in the way.
        MissingExtraError: if safetensors, or the peft of an adapter, is not installed.
    """
    need("safetensors.torch")
    for name, tensor in stored_tensors(model).items():
        kind = type(tensor).__name__
        plain = isinstance(tensor, torch.Tensor) and not is_traceable_wrapper_subclass(tensor)
        if plain and tensor.is_meta:
            plain, kind = False, "a meta tensor"
        expected = "a plain tensor, as safetensors cannot hold it"
        check(plain, name, kind, expected, hint="Train an adapter, which is saved alone")
    if adapter_name(model) is not None:
        try:
            json.dumps(_adapter_settings(model))
        except TypeError as error:
            raise ValueError(f"the adapter's configuration cannot be saved: {error}") from error
    for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
        wrong = _STEP.fullmatch(path.name) and not path.is_dir()
        wrong = wrong or (path.name in ("log.jsonl", "config.yaml") and path.is_dir())
        wrong = wrong or (path.name == "tensorboard" and not path.is_dir())
        hint = "Move it away, or choose a new folder"
        check(not wrong, "folder", str(folder), f"one without a foreign {path.name}", hint=hint)


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write ``model`` into ``folder`` in its library's format; see the top of this file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _model_file(model)
    if adapter_name(model) is not None:
        settings = json.dumps(_adapter_settings(model), sort_keys=True)
        save_tensors(_adapter_tensors(model), path, {"format": "pt", _ADAPTER_METADATA: settings})
        return
    if hasattr(model, "save_config"):
        model.save_config(folder)  # type: ignore[operator]
    save_tensors(stored_tensors(model), path)


def load_model(model: torch.nn.Module, folder: Path) -> None:
    """Copy the weights in a folder of :func:`save_model` into ``model``, in place.

    The folder may hold a file of diffusers' ``save_lora_weights`` or ``save_lora_adapter``. An
    adapter is cast to the dtype of the adapter in ``model``.

    Raises:
        ValueError: if the file is missing, truncated, or of another model, or if its adapter has
            another rank or scale. The model is unchanged then.
    """
    path = folder / _model_file(model)
    found = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    hint = "A run with other adapter settings may have written the folder"
    check(path.is_file(), f"content of {folder}", found, path.name, hint=hint)
    tensors = load_tensors(path)
    if adapter_name(model) is None:
        copy_into(tensors, stored_tensors(model), path)
        return
    with open_tensors(path) as opened:
        saved = json.loads((opened.metadata() or {}).get(_ADAPTER_METADATA, "{}"))
    _check_adapter(model, saved, path)
    targets = _adapter_tensors(model)
    tensors = {_PIPELINE_PART + n.removeprefix(_PIPELINE_PART): t for n, t in tensors.items()}
    tensors = {n: t.to(targets[n].dtype) if n in targets else t for n, t in tensors.items()}
    copy_into(tensors, targets, path)


def _check_adapter(model: torch.nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    """Raise ``ValueError`` unless the adapter in a file has the rank and scales of the model's."""
    part, name = len(_PIPELINE_PART), adapter_name(model)
    wanted = {key[part:]: value for key, value in _adapter_settings(model).items()}
    # As in diffusers, alpha equals the rank in a file without metadata.
    rank, alpha = wanted.get("r"), _alpha_key(wanted)
    defaults = {"r": rank, alpha: rank, "use_rslora": False}
    defaults |= {"rank_pattern": wanted.get("rank_pattern"), "alpha_pattern": {}}
    found = {k: saved.get(_PIPELINE_PART + k, saved.get(k, v)) for k, v in defaults.items()}
    hint = "Add the adapter with the file's value"
    for key in ("r", alpha, "use_rslora"):
        label, value = f"{key} of the adapter in {path}", found[key]
        ok = key not in wanted or value == wanted[key]
        if not ok and key == alpha and isinstance(value, (int, float)):
            ok = math.isclose(value, wanted[key], rel_tol=1e-6)
        check(ok, label, value, f"this model's {wanted.get(key)!r}", hint=hint)
    if name is None or wanted.get("peft_type") not in _SCALED:
        return
    scale_in_file = _scales_of(found)
    for layer, scale in adapter_scales(model, name).items():
        value, label = scale_in_file(layer), f"scale of {layer} in the adapter in {path}"
        ok = math.isclose(value, scale, rel_tol=1e-6)
        check(ok, label, value, f"this model's {scale}", hint="Add it with the file's patterns")


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """Return the random states of Python, torch (every device) and ``generator``."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generator": generator.get_state(),
    }


def restore_random_state(state: Mapping[str, Any], generator: torch.Generator) -> None:
    """Restore the states of :func:`random_state`."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    torch.set_rng_state(state["torch"])
    # The states of another number of GPUs belong to none of these.
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    generator.set_state(state["generator"])


def list_checkpoints(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """Return ``(step, path)`` of each complete checkpoint in ``folder``, oldest first."""
    paths = Path(folder).iterdir() if Path(folder).is_dir() else ()
    found = ((_STEP.fullmatch(path.name), path) for path in paths if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint in ``folder``, or None if there is none."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1][1] if checkpoints else None


def find_checkpoint(folder: Path | None, resume: str | os.PathLike[str] | None) -> Path | None:
    """Return the checkpoint from which a run in ``folder`` resumes, or None for a new run.

    Raises:
        ValueError: if ``folder`` is a file, a new run would mix with the checkpoints in ``folder``,
            or ``folder`` holds a checkpoint that is not older than the one to resume from.
    """
    is_file = folder is not None and folder.is_file()
    check(not is_file, "folder", str(folder), "a folder, not a file")
    existing = [] if folder is None else list_checkpoints(folder)
    newest = existing[-1][1].name if existing else ""
    if resume == "auto":
        return existing[-1][1] if existing else None
    hint = "Resume from it, or choose a new folder"
    if resume is None:
        check(not existing, "folder", str(folder), f"one without {newest}", hint=hint)
        return None
    path = Path(resume)
    match = _STEP.fullmatch(path.name)
    step = int(match[1]) if match else 0
    later = [p for n, p in existing if n >= step and p.resolve() != path.resolve()]
    expected = f"one without {newest}, which is not older than {path.name}"
    check(not later, "folder", str(folder), expected, hint="Move it away, or choose a new folder")
    return path


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: torch.nn.Module,
    state: Mapping[str, Any],
    *,
    ema: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    keep_last: int = 0,
) -> Path:
    """Write the checkpoint ``folder/step-<step>`` and return its path; delete old checkpoints.

    ``state`` may hold tensors, numbers, strings, and lists, tuples and dicts of them. A resumed run
    must repeat ``settings``. ``keep_last`` of 0 keeps all checkpoints.

    Raises:
        OSError: if the checkpoint cannot be written. Earlier checkpoints are kept.
    """
    path = Path(folder) / f"step-{step:08d}"
    with save_checkpoint_dir(path) as temporary:
        save_model(model, temporary / "model")
        if ema is not None:
            save_tensors(ema, temporary / "ema.safetensors")
        try:
            torch.save(dict(state), temporary / "state.pt")
        except RuntimeError as error:  # torch's zip writer raises it if the disk is full
            raise OSError(f"{path / 'state.pt'}: cannot be written: {error}") from error
        paths = [p for p in sorted(temporary.rglob("*")) if p.is_file()]
        files = {str(p.relative_to(temporary)): p.stat().st_size for p in paths}
        content = {"format": FORMAT, "step": step, "settings": dict(settings or {}), "files": files}
        (temporary / "checkpoint.json").write_text(json.dumps(content, indent=1) + "\n")
    if keep_last:
        for _, old in list_checkpoints(folder)[:-keep_last]:
            remove_atomic(old)
    return path


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of ``checkpoint.json``, after a check of the sizes of all other files.

    Raises:
        ValueError: if ``path`` is not a complete checkpoint of this format.
    """
    path = Path(path)
    try:
        content: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
        found, files = content["format"], content["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{path}: not a checkpoint of this library: it has no readable checkpoint.json"
        raise ValueError(text) from error
    hint = "Another revision of prfl_fast wrote it: start in a new folder"
    check(found == FORMAT, f"format of {path}", found, repr(FORMAT), hint=hint)
    hint = "Resume from another checkpoint"
    for name, size in files:
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        check(actual == size, f"size of {path / name}", actual, f"{size} bytes", hint=hint)
    return content


def load_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Copy a checkpoint's weights into ``model``; return its state and averaged parameters.

    Raises:
        ValueError: if ``path`` is incomplete, of another model, or of other ``settings``; the
            message names the first that differs. The model is unchanged then.
    """
    path = Path(path)
    content = read_checkpoint(path)
    saved = content.get("settings", {})
    wanted = json.loads(json.dumps(dict(settings or {})))  # tuples become lists, as in the file
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: made with {name} = {saved.get(name)!r}, this run has "
                f"{wanted.get(name)!r}. Restore the value, or start in a new folder"
            )
    state = load_pickled(path / "state.pt")
    ema = load_tensors(path / "ema.safetensors") if (path / "ema.safetensors").is_file() else None
    load_model(model, path / "model")
    return state, ema
