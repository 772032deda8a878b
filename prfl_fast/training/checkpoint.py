"""Save and load the state of a run as a checkpoint folder, which is either absent or complete.

A checkpoint is a folder ``step-00000012``::

    checkpoint.json     format, step, settings, inputs, the size in bytes and the SHA-256 digest of
                        every other file, and the digest of all this
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

import contextlib
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prfl_fast.utils.checks import check
from prfl_fast.utils.digests import (
    DIGESTS,
    check_digests,
    check_folder,
    file_digests,
    write_digests,
)
from prfl_fast.utils.io import (
    check_fit,
    link_atomic,
    load_pickled,
    load_tensors,
    open_tensors,
    remove_atomic,
    save_checkpoint_dir,
    save_tensors,
)
from prfl_fast.utils.optional import need

FORMAT = "prfl_fast checkpoint 3"
# Checkpoints without digests, which are still read.
_UNDIGESTED = "prfl_fast checkpoint 2"
FINAL = "final"
# Values of ``resume``: the newest checkpoint, and the newest one that is not damaged.
AUTO, LAST_GOOD = "auto", "last-good"
_STEP = re.compile(r"step-(\d{8,})")
# Prefix in the file of an adapter: the name of the model inside a diffusers pipeline.
_PIPELINE_PART = "transformer."
_ADAPTER_METADATA = "lora_adapter_metadata"
_log = logging.getLogger("prfl_fast")


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
    """Return the name of the only peft adapter in ``model``, or None if it has none."""
    names = list(getattr(model, "peft_config", None) or ())
    check(len(names) < 2, "the model's adapters", names, "one adapter", hint="Delete the others")
    return names[0] if names else None


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
    """Return the adapter's configuration as plain values, for diffusers to read rank and alpha."""
    name = adapter_name(model)
    config = model.peft_config[name].to_dict()  # type: ignore[union-attr, index, operator]
    plain = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    return {_PIPELINE_PART + key: value for key, value in plain.items()}


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write ``model`` into ``folder`` in its library's format; see the top of this file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _model_file(model)
    if adapter_name(model) is not None:
        settings = json.dumps(_adapter_settings(model), sort_keys=True)
        save_tensors(_adapter_tensors(model), path, {"format": "pt", _ADAPTER_METADATA: settings})
        write_digests(folder, (path.name,))
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
    if (folder / DIGESTS).is_file():  # diffusers writes none
        check_folder(folder, (path.name,), "adapter")
    with open_tensors(path) as opened:
        saved = json.loads((opened.metadata() or {}).get(_ADAPTER_METADATA, "{}"))
    wanted = _adapter_settings(model)
    rank = wanted[_PIPELINE_PART + "r"]
    # As in diffusers, alpha equals the rank in a file without metadata.
    for name, default in (("r", rank), ("lora_alpha", rank), ("use_rslora", False)):
        key = _PIPELINE_PART + name
        value = saved.get(key, saved.get(name, default))
        hint, label = "Add the adapter with the file's value", f"{name} of the adapter in {path}"
        check(value == wanted[key], label, value, f"this model's {wanted[key]!r}", hint=hint)
    targets = _adapter_tensors(model)
    tensors = {_PIPELINE_PART + n.removeprefix(_PIPELINE_PART): t for n, t in tensors.items()}
    tensors = {n: t.to(targets[n].dtype) if n in targets else t for n, t in tensors.items()}
    copy_into(tensors, targets, path)


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
    if resume == AUTO:
        return existing[-1][1] if existing else None
    if resume == LAST_GOOD:
        return _last_good([path for _, path in existing])
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


def _last_good(paths: list[Path]) -> Path | None:
    """Return the newest checkpoint that can be read; the log names the damaged ones."""
    for path in reversed(paths):
        try:
            read_checkpoint(path)
        except ValueError as error:
            _log.warning("damaged checkpoint, trying an earlier one: %s", error)
        else:
            return path
    check(not paths, "checkpoints", [p.name for p in paths], "one that is not damaged")
    return None


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    model: torch.nn.Module,
    state: Mapping[str, Any],
    *,
    ema: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    keep_last: int = 0,
) -> Path:
    """Write the checkpoint ``folder/step-<step>`` and return its path; delete old checkpoints.

    ``state`` may hold tensors, numbers, strings, and lists, tuples and dicts of them. A resumed run
    must repeat ``settings``, and ``inputs`` too unless it accepts other ones. ``keep_last`` of 0
    keeps all checkpoints.

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
        content = {
            "format": FORMAT,
            "step": step,
            "settings": dict(settings or {}),
            "inputs": dict(inputs or {}),
            "files": files,
            "sha256": file_digests(temporary),
        }
        content["digest"] = _digest(content)
        (temporary / "checkpoint.json").write_text(_text(content))
    link_final(path)
    if keep_last:
        for _, old in list_checkpoints(folder)[:-keep_last]:
            remove_atomic(old)
    return path


def link_final(checkpoint: Path) -> None:
    """Let ``final`` beside a checkpoint link to its model; a folder of that name is kept."""
    link = checkpoint.parent / FINAL
    if link.exists() and not link.is_symlink():
        return
    with contextlib.suppress(OSError):  # some file systems have no links
        link_atomic(link, Path(checkpoint.name, "model"))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    """Return the digest of ``checkpoint.json`` without that digest."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of ``checkpoint.json``, after a check of all files.

    The log has a note if the checkpoint is of an earlier revision, which wrote no digests.

    Raises:
        ValueError: if ``path`` is not a complete checkpoint of this format, a file is damaged, or
            the folder has the name of another step.
    """
    path = Path(path)
    manifest = path / "checkpoint.json"
    try:
        text = manifest.read_text(encoding="utf-8")
        content: dict[str, Any] = json.loads(text)
        found, files = content["format"], content["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{path}: not a checkpoint of this library: it has no readable checkpoint.json"
        raise ValueError(text) from error
    hint = "Another revision of prfl_fast wrote it: start in a new folder"
    check(found in (FORMAT, _UNDIGESTED), f"format of {manifest}", found, repr(FORMAT), hint=hint)
    hint = _other_checkpoint(path)
    if found == FORMAT or "digest" in content:
        wanted, there = content.get("digest"), _digest(content)
        # A flipped bit can keep the content: 1e-05 and 1E-05 are the same number.
        whole = there == wanted and text == _text(content)
        expected = f"{wanted}, as written in it: the file was damaged or changed"
        check(whole, f"SHA-256 of the content of {manifest}", there, expected, hint=hint)
    for name, size in files:
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        check(actual == size, f"size of {path / name}", actual, f"{size} bytes", hint=hint)
    if found == FORMAT:
        check_digests(path, content["sha256"], hint)
    else:
        _log.warning("%s: of an earlier revision, without digests: damage goes unnoticed", path)
    if match := _STEP.fullmatch(path.name):
        step, wanted = content.get("step"), int(match[1])
        expected = f"{wanted}, as in its folder's name"
        check(step == wanted, f"step in {manifest}", step, expected, hint=hint)
    return content


def _other_checkpoint(path: Path) -> str:
    """Return the advice for a damaged checkpoint."""
    others = [other.name for _, other in list_checkpoints(path.parent) if other != path]
    if not others:
        return "There is no other checkpoint beside it: start in a new folder"
    return f"resume: {LAST_GOOD} takes the newest one that is whole, of {', '.join(others[-3:])}"


def load_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    accept_inputs: bool = False,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Copy a checkpoint's weights into ``model``; return its state and averaged parameters.

    Raises:
        ValueError: if ``path`` is damaged, of another model, or of other ``settings`` or
            ``inputs``; the message names the first that differs. The model is unchanged then. With
            ``accept_inputs``, other inputs are only logged.
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
    _compare_inputs(path, content.get("inputs"), inputs or {}, accept_inputs)
    state = load_pickled(path / "state.pt")
    step = content.get("step")
    inner = state.get("step", step) if isinstance(state, dict) else step
    check(inner == step, f"step in {path / 'state.pt'}", inner, f"{step}, as in checkpoint.json")
    ema = load_tensors(path / "ema.safetensors") if (path / "ema.safetensors").is_file() else None
    load_model(model, path / "model")
    return state, ema


def _compare_inputs(
    path: Path, saved: Mapping[str, Any] | None, wanted: Mapping[str, Any], accept: bool
) -> None:
    """Check that a run resumes with the data and models with which it began."""
    if saved is None and wanted:
        _log.warning("%s: of an earlier revision, which did not note its data and models", path)
    if not saved or not wanted:  # a run from Python need not note any
        return
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) == wanted.get(name):
            continue
        text = f"{path}: began with {name} = {saved.get(name)!r}, now it is {wanted.get(name)!r}"
        if not accept:
            raise ValueError(
                f"{text}. Restore it, start in a new folder, or go on with --accept-changed-inputs "
                "(RunIdentity(accept_changed_inputs=True))"
            )
        _log.warning("%s; going on as asked", text)
