"""Files and checkpoint folders that are either absent or complete, and the state of a run in them.

A checkpoint is a folder ``step-00000012``::

    checkpoint.json     format, step, settings, and the size in bytes of every other file
    model/              config.json + diffusion_pytorch_model.safetensors (a diffusers model),
                        pytorch_lora_weights.safetensors (a model with an adapter: only that, as
                        diffusers' load_lora_weights reads it),
                        or model.safetensors (any other module)
    ema.safetensors     the averaged trainable parameters, if averaging is on
    state.pt            optimizer, counters, random number generators: tensors and plain values

Everything is written under a temporary name in the same folder, flushed to disk, and renamed: a
process killed at any moment leaves the previous files and, at worst, a ``*.tmp-*`` that the next
run removes. Nothing is unpickled but tensors and plain values (``torch.load(weights_only=True)``).
"""

import json
import os
import random
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from prfl_fast._extras import need

FORMAT = "prfl_fast checkpoint 1"
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}")
# What a diffusers pipeline calls the model that an adapter in its file belongs to.
_PIPELINE_PART = "transformer."
_ADAPTER_METADATA = "lora_adapter_metadata"


def _temporary(path: Path) -> Path:
    # The suffix stays last: writers that choose a format by it (images, arrays) work on the
    # temporary name.
    return path.with_name(f"{path.stem}.tmp-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the kernel write a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush the file and rename it to ``path``.

    If the body raises, the temporary file is removed and ``path`` is what it was. The parent folder
    must exist.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        _remove(temporary)


@contextmanager
def save_checkpoint_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success flush it to disk and rename it.

    An existing folder of that name is renamed away first and removed afterwards, so that the name
    shows the old files, nothing, or the new ones. If the body raises, the temporary folder is
    removed.

    Raises:
        OSError: the parent folder is not writable, or the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _flush(Path(folder) / name)
            _flush(Path(folder))
        if path.exists():
            remove_atomic(path)
        os.rename(temporary, path)
        _flush(path.parent)
    finally:
        _remove(temporary)


def remove_atomic(path: str | os.PathLike[str]) -> None:
    """Remove a file or folder so that its name never shows a part of it."""
    path = Path(path)
    gone = _temporary(path)
    os.rename(path, gone)
    _remove(gone)


def clean_temporaries(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed writers left in ``folder`` (not below it) and return the removed paths."""
    stale = [p for p in sorted(Path(folder).iterdir()) if _TEMPORARY.search(p.name)]
    for path in stale:
        _remove(path)
    return stale


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically; views and shared storage are copied.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full.
    """
    safetensors, writer = need("safetensors"), need("safetensors.torch")
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses tied weights; each name gets its own bytes.
        address = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    with write_atomic(path) as temporary:
        try:
            writer.save_file(owned, temporary, metadata=metadata or {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a safetensors file to CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or not a safetensors file.
    """
    safetensors, reader = need("safetensors"), need("safetensors.torch")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return reader.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def copy_into(
    tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor], source: object
) -> None:
    """Copy ``tensors`` into ``targets`` in place if names, shapes and dtypes agree.

    Raises:
        ValueError: they do not; no target was changed. ``source`` names where the tensors came
            from.
    """
    missing = [n for n in targets if n not in tensors]
    unknown = [n for n in tensors if n not in targets]
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for names, what in ((missing, "missing"), (unknown, "unexpected"))
            if names
        ]
        raise ValueError(f"{source}: does not fit this model: tensors {' and '.join(parts)}")
    for name, target in targets.items():
        tensor = tensors[name]
        if tensor.shape != target.shape or tensor.dtype != target.dtype:
            raise ValueError(
                f"{source}: does not fit this model: {name} is {tensor.dtype}{list(tensor.shape)}, "
                f"expected {target.dtype}{list(target.shape)}"
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def adapter_name(model: torch.nn.Module) -> str | None:
    """Name of the peft adapter in ``model``; None if it has none.

    Raises:
        ValueError: it has more than one.
    """
    names = list(getattr(model, "peft_config", None) or ())
    if len(names) > 1:
        raise ValueError(
            f"the model has {len(names)} adapters ({', '.join(names)}), expected one: "
            "delete the others"
        )
    return names[0] if names else None


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint stores of ``model``: its adapter's tensors, or its state dict; not copies.

    Raises:
        ValueError: the model has an adapter and trains parameters outside it, which would be lost.
    """
    name = adapter_name(model)
    if name is None:
        return dict(model.state_dict())
    tensors: dict[str, torch.Tensor] = need("peft").get_peft_model_state_dict(
        model, adapter_name=name
    )
    stored = {t.data_ptr() for t in tensors.values()}
    outside = [
        n for n, p in model.named_parameters() if p.requires_grad and p.data_ptr() not in stored
    ]
    if outside:
        raise ValueError(
            f"{outside[0]} is trained beside adapter {name!r}: "
            "freeze it or list it in modules_to_save"
        )
    return tensors


def _model_file(model: torch.nn.Module) -> str:
    if adapter_name(model) is not None:
        return "pytorch_lora_weights.safetensors"
    return (
        "diffusion_pytorch_model.safetensors"
        if hasattr(model, "save_config")
        else "model.safetensors"
    )


def _adapter_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the names of ``load_lora_weights``; not copies."""
    return {
        _PIPELINE_PART + name.removeprefix("base_model.model."): tensor
        for name, tensor in stored_tensors(model).items()
    }


def _adapter_settings(model: torch.nn.Module) -> dict[str, Any]:
    """The adapter's configuration as plain values: diffusers reads rank and alpha there."""
    name = adapter_name(model)
    config = model.peft_config[name].to_dict()  # type: ignore[union-attr, index, operator]
    return {
        _PIPELINE_PART + key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
    }


def save_model(model: torch.nn.Module, folder: Path) -> None:
    """Write ``model`` into ``folder`` in the layout its library reads; see the top of this file."""
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
    """Copy what :func:`save_model` wrote into ``model``, in place.

    An adapter may also come from diffusers (``save_lora_weights``, ``save_lora_adapter``), and is
    cast to the dtype it has in ``model``.

    Raises:
        ValueError: the file is missing, truncated, or of another model, or the adapter in it is
            scaled otherwise; the model is then unchanged.
    """
    path = folder / _model_file(model)
    if not path.is_file():
        raise ValueError(
            f"{folder}: holds no {path.name}; was it written by a run with other adapter settings?"
        )
    tensors = load_tensors(path)
    if adapter_name(model) is None:
        copy_into(tensors, stored_tensors(model), path)
        return
    with need("safetensors").safe_open(path, framework="pt") as opened:
        saved = json.loads((opened.metadata() or {}).get(_ADAPTER_METADATA, "{}"))
    wanted = _adapter_settings(model)
    rank = wanted[_PIPELINE_PART + "r"]
    # Without a word in the file, diffusers takes alpha for the rank.
    for name, default in (("r", rank), ("lora_alpha", rank), ("use_rslora", False)):
        key = _PIPELINE_PART + name
        found = saved.get(key, saved.get(name, default))
        if found != wanted[key]:
            raise ValueError(
                f"{path}: its adapter has {name} = {found!r}, this model's has {wanted[key]!r}: "
                "add the adapter with the file's value"
            )
    targets = _adapter_tensors(model)
    tensors = {_PIPELINE_PART + n.removeprefix(_PIPELINE_PART): t for n, t in tensors.items()}
    tensors = {n: t.to(targets[n].dtype) if n in targets else t for n, t in tensors.items()}
    copy_into(tensors, targets, path)


def random_state(generator: torch.Generator) -> dict[str, Any]:
    """States of Python's, torch's (every device) and ``generator``'s random numbers."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generator": generator.get_state(),
    }


def restore_random_state(state: Mapping[str, Any], generator: torch.Generator) -> None:
    """Undo what happened since :func:`random_state`."""
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    generator.set_state(state["generator"])


def list_checkpoints(folder: str | os.PathLike[str]) -> list[tuple[int, Path]]:
    """``(step, path)`` of every complete checkpoint in ``folder``, oldest first."""
    found = (
        [(_STEP.fullmatch(p.name), p) for p in Path(folder).iterdir()]
        if Path(folder).is_dir()
        else []
    )
    return sorted((int(match[1]), path) for match, path in found if match and path.is_dir())


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in ``folder``; None if there is none."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1][1] if checkpoints else None


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
    """Write ``folder/step-<step>``; keep the ``keep_last`` newest checkpoints (0 keeps all).

    Args:
        state: tensors, numbers, strings, and lists, tuples and dicts of them.
        settings: plain values a later run must repeat; see :func:`load_checkpoint`.

    Raises:
        OSError: the folder is not writable or the disk is full; earlier checkpoints are untouched.
    """
    path = Path(folder) / f"step-{step:08d}"
    with save_checkpoint_dir(path) as temporary:
        save_model(model, temporary / "model")
        if ema is not None:
            save_tensors(ema, temporary / "ema.safetensors")
        try:
            torch.save(dict(state), temporary / "state.pt")
        except RuntimeError as error:  # torch's zip writer reports a full disk this way
            raise OSError(f"{path / 'state.pt'}: cannot be written: {error}") from error
        files = {
            str(p.relative_to(temporary)): p.stat().st_size
            for p in sorted(temporary.rglob("*"))
            if p.is_file()
        }
        content = {"format": FORMAT, "step": step, "settings": dict(settings or {}), "files": files}
        (temporary / "checkpoint.json").write_text(json.dumps(content, indent=1) + "\n")
    if keep_last:
        for _, old in list_checkpoints(folder)[:-keep_last]:
            remove_atomic(old)
    return path


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read ``checkpoint.json`` and check that every file it lists has the size it lists.

    Raises:
        ValueError: ``path`` is not a checkpoint, is of another format, or has missing or truncated
            files.
    """
    path = Path(path)
    try:
        content: dict[str, Any] = json.loads((path / "checkpoint.json").read_text())
        found, files = content["format"], content["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of this library: it has no readable checkpoint.json"
        ) from error
    if found != FORMAT:
        raise ValueError(f"{path}: format is {found!r}, this version reads {FORMAT!r}")
    for name, size in files:
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        if actual != size:
            what = "is missing" if actual is None else f"has {actual} bytes, expected {size}"
            raise ValueError(f"{path}: {name} {what}; resume from another checkpoint")
    return content


def load_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    *,
    settings: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Copy a checkpoint's weights into ``model`` and return its state and averaged parameters.

    Raises:
        ValueError: it is truncated, not a checkpoint, of another model, or was made with other
            ``settings``; the message names the first setting that differs. The model is then
            unchanged.
    """
    path = Path(path)
    content = read_checkpoint(path)
    saved = content.get("settings", {})
    wanted = json.loads(json.dumps(dict(settings or {})))  # tuples become lists, as in the file
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise ValueError(
                f"{path}: made with {name} = {saved.get(name)!r}, this run has "
                f"{wanted.get(name)!r}: put it back, or start in a new folder"
            )
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path / 'state.pt'}: cannot be read ({reason})") from error
    ema = load_tensors(path / "ema.safetensors") if (path / "ema.safetensors").is_file() else None
    load_model(model, path / "model")
    return state, ema
