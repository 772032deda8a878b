"""Save and load the state of a run as a checkpoint folder, which is either absent or complete.

A checkpoint is a folder ``step-00000012``::

    checkpoint.json     format, step, settings, inputs, the size in bytes and the SHA-256 digest of
                        every other file, and the digest of this content
    model/              config.json + diffusion_pytorch_model.safetensors (diffusers models),
                        pytorch_lora_weights.safetensors (models with an adapter: the adapter only,
                        in the format of diffusers' load_lora_weights),
                        or model.safetensors (all other modules); of two experts, those that train
                        in transformer/ and transformer_2/
    ema.safetensors     the averaged trainable parameters, if averaging is on
    sharded/            of sharded weights: each rank's parts of the optimizer's states, and of
                        weights and averages in place of model/ and ema.safetensors, except in the
                        checkpoints of the best and the last step
    state.pt            optimizer, counters, random number generators: tensors and plain values

Files are written under a temporary name, flushed to disk, and renamed. A process killed at any
moment leaves the previous files and at most a ``*.tmp-*`` that the next run removes. ``state.pt``
is read with ``torch.load(weights_only=True)``, which runs no code.
"""

import contextlib
import copy
import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from prfl_fast.parallel.ranks import Ranks
from prfl_fast.training.model_files import load_model, model_parts, save_model
from prfl_fast.training.saving import Saving, call
from prfl_fast.training.sharded_checkpoint import (
    EMA,
    any_sharded,
    plan_parts,
    read_parts,
    split_optimizer,
    write_gathered,
)
from prfl_fast.training.sharded_checkpoint import FOLDER as PARTS
from prfl_fast.utils.checks import check, torch_seed
from prfl_fast.utils.digests import check_digests, file_digests
from prfl_fast.utils.io import (
    link_atomic,
    load_pickled,
    load_tensors,
    read_json,
    remove_atomic,
    save_checkpoint_dir,
    save_tensors,
)

FORMAT = "prfl_fast checkpoint 3"
_UNDIGESTED = "prfl_fast checkpoint 2"  # without digests, still read
FINAL = "final"
# Values of ``resume``: the newest checkpoint, and the newest one that is not damaged.
AUTO, LAST_GOOD = "auto", "last-good"
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger("prfl_fast")


def check_free(folder: Path) -> None:
    """Raise ``ValueError`` if a foreign file is where a run writes its checkpoints or its log."""
    hint = "Move it away, or choose a new folder"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            wrong = path.name in ("log.jsonl", "config.yaml")
        else:
            wrong = path.name == "tensorboard" or _STEP.fullmatch(path.name) is not None
        check(not wrong, "folder", str(folder), f"one without a foreign {path.name}", hint=hint)


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


def rank_seed(seed: int, data_rank: int, step: int = 0) -> int:
    """Return the seed of a data rank's random numbers from ``step`` on; rank 0 has ``seed``."""
    if data_rank == 0 and step == 0:
        return torch_seed(seed)
    text = f"seed {seed}, data rank {data_rank}, step {step}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def random_states(generator: torch.Generator, ranks: Ranks) -> dict[str, Any]:
    """Return the random states of rank 0 as ``random``, and those of several ranks as ``ranks``."""
    own = random_state(generator)
    if not ranks.several:
        return {"random": own}
    found = ranks.gather(own)
    return {"random": found[0], "ranks": {"data_ranks": ranks.data_ranks, "random": found}}


def restore_rank(
    state: Mapping[str, Any], generator: torch.Generator, ranks: Ranks, seed: int
) -> None:
    """Restore the states of :func:`random_states` on as many ranks, or on others.

    On others, each data rank has the state of the saved data rank of its number, if there is one,
    else one of its own that depends on the seed and the step.
    """
    saved = state.get("ranks") or {"data_ranks": 1, "random": [state["random"]]}
    states, count = saved["random"], saved["data_ranks"]
    if (len(states), count) == (ranks.size, ranks.data_ranks):
        restore_random_state(states[ranks.rank], generator)
    elif ranks.data_rank < count:
        restore_random_state(states[ranks.data_rank * (len(states) // count)], generator)
    else:
        fresh = rank_seed(seed, ranks.data_rank, state["step"])
        random.seed(fresh)
        torch.manual_seed(fresh)
        generator.manual_seed(fresh)


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
    if resume == AUTO:
        return existing[-1][1] if existing else None
    if resume == LAST_GOOD:
        return _last_good([path for _, path in existing])
    newest = existing[-1][1].name if existing else ""
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
    **options: Any,
) -> Path:
    """Write a checkpoint with the options of :func:`begin_checkpoint`, and return its path."""
    return begin_checkpoint(folder, step, model, state, **options).finish()


def begin_checkpoint(  # noqa: PLR0913 - the public face of a checkpoint
    folder: str | os.PathLike[str],
    step: int,
    model: torch.nn.Module,
    state: Mapping[str, Any],
    *,
    ema: Mapping[str, torch.Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    keep_last: int = 0,
    best_step: int | None = None,
    whole: bool = True,
    ranks: Ranks | None = None,
    background: bool = False,
) -> Saving:
    """Write the files of the checkpoint ``folder/step-<step>``.

    Its :meth:`Saving.finish` gives it its name, and deletes old checkpoints. ``state`` may hold
    tensors, numbers, strings, and lists, tuples and dicts of them. A resumed run must repeat
    ``settings``, and ``inputs`` too unless it accepts other ones. ``keep_last`` of 0 keeps all
    checkpoints; that of ``best_step`` and that of ``final`` are always kept.

    All ``ranks`` call this function. Sharded weights and averages are gathered, or with ``whole``
    False written in parts, as the states of their optimizer are. In the ``background`` a thread
    writes copies of the parts, and of the state, so that all may change; the rest is written now.

    Raises:
        OSError: if the checkpoint cannot be written. Earlier checkpoints are kept.
    """
    path = Path(folder) / f"step-{step:08d}"
    ranks = ranks or Ranks()
    noted = {
        "format": FORMAT,
        "step": step,
        "settings": dict(settings or {}),
        "inputs": dict(inputs or {}),
    }
    kept: Any = {"keep_last": keep_last, "best_step": best_step}
    stages = _stages(path, (model, state, ema, whole), ranks, background, noted, kept)
    return Saving(step, path, stages)


def _stages(
    path: Path,
    tensors: tuple[Any, ...],
    ranks: Ranks,
    background: bool,
    content: dict[str, Any],
    kept: Mapping[str, Any],
) -> Generator["Future[dict[str, str]]", None, None]:
    """Yield the outcome of this rank's files; then put them together, and prune the folder."""
    with _written_together(path, ranks) as temporary:
        write = _plan_tensors(path, temporary, ranks, background, *tensors)
        written = call(write, background)
        del write, tensors  # and with them the copies, when the thread has ended
        yield written
        error = written.exception()
        if isinstance(error, BaseException) and not isinstance(error, Exception):
            raise error
        ranks.agree(error=error)
        digests = {n: d for found in ranks.gather(written.result()) for n, d in found.items()}
        if ranks.main:
            digests |= file_digests(temporary, digests)
            content["files"] = {name: (temporary / name).stat().st_size for name in digests}
            content["sha256"] = digests
            content["digest"] = _digest(content)
            (temporary / "checkpoint.json").write_text(_text(content))
    if ranks.main:
        link_final(path)
        _prune(path.parent, content["step"], **kept)


def _prune(folder: Path, step: int, keep_last: int, best_step: int | None) -> None:
    # Later ones do not count: they are damaged, and this run went back before them.
    earlier = [c for c in list_checkpoints(folder) if c[0] <= step] if keep_last else []
    final = (folder / FINAL).resolve().parent
    for at, old in earlier[:-keep_last]:
        if at != best_step and old.resolve() != final:
            remove_atomic(old)


def _plan_tensors(
    path: Path,
    temporary: Path,
    ranks: Ranks,
    copied: bool,
    model: torch.nn.Module,
    state: Mapping[str, Any],
    ema: Mapping[str, torch.Tensor] | None,
    whole: bool,
) -> Callable[[], dict[str, str]]:
    """Write what all ranks write together; return a function that writes this rank's other files.

    These are the parts of sharded tensors, whose digests it returns, and on rank 0 ``state.pt``.
    Errors are raised on every rank, so that none waits for another.
    """
    rest = dict(state)
    parts: dict[str, torch.Tensor] = {}
    quantized: dict[str, torch.Tensor] = {}
    if "optimizer" in state:
        rest["optimizer"], parts, quantized = split_optimizer(state["optimizer"], ranks)
    split = {} if whole else model_parts(model)
    if any_sharded(split):
        parts |= split
    else:
        save_model(model, temporary / "model", ranks)
    if ema is not None and any_sharded(ema):
        if whole:
            write_gathered(ema, temporary / "ema.safetensors", ranks)
        else:
            parts |= {f"{EMA}{name}": tensor for name, tensor in ema.items()}
    elif ema is not None:
        ranks.on_main(save_tensors, ema, temporary / "ema.safetensors")
    write_parts: Callable[[], dict[str, str]] = dict
    if parts or quantized:
        write_parts = plan_parts(temporary / PARTS, parts, quantized, ranks, copied)
    if copied and ranks.main:
        rest = copy.deepcopy(rest)

    def write() -> dict[str, str]:
        digests = write_parts()
        if ranks.main:
            _save_state(rest, path, temporary)
        return digests

    return write


@contextlib.contextmanager
def _written_together(path: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield the temporary folder of a checkpoint on every rank; rank 0 renames it at the end.

    If a rank raises in the body, the folder is removed, and every rank raises.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            return str(stack.enter_context(save_checkpoint_dir(path)))

        temporary, error = Path(ranks.on_main(begin)), None
        if not ranks.several:
            yield temporary
            return
        try:
            yield temporary
        except Exception as raised:  # noqa: BLE001 - raised on all ranks
            error = raised
        ranks.agree(error=error)
        ranks.on_main(stack.close)


def _save_state(state: Mapping[str, Any], path: Path, temporary: Path) -> None:
    try:
        torch.save(dict(state), temporary / "state.pt")
    except RuntimeError as error:  # torch's zip writer raises it if the disk is full
        raise OSError(f"{path / 'state.pt'}: cannot be written: {error}") from error


def link_final(checkpoint: Path) -> None:
    """Link ``final`` beside a checkpoint to its model; keep a folder of that name."""
    link = checkpoint.parent / FINAL
    if link.exists() and not link.is_symlink():
        return
    if not (checkpoint / "model").is_dir():  # its weights are in parts
        return
    with contextlib.suppress(OSError):  # some file systems have no links
        link_atomic(link, Path(checkpoint.name, "model"))


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    """Return the digest of the other content of ``checkpoint.json``."""
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
        content: dict[str, Any] = read_json(manifest)
        found, files = content["format"], content["files"].items()
        content.get("settings", {}).items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"{path}: not a checkpoint of this library: it has no readable checkpoint.json"
        raise ValueError(text) from error
    hint = "Another revision of prfl_fast wrote it: start in a new folder"
    check(found in (FORMAT, _UNDIGESTED), f"format of {manifest}", found, repr(FORMAT), hint=hint)
    hint = _other_checkpoint(path)
    if found == FORMAT or "digest" in content:
        wanted, there = content.get("digest"), _digest(content)
        # A flipped bit can keep the content: 1e-05 and 1E-05 are the same number.
        whole = there == wanted and manifest.read_text(encoding="utf-8") == _text(content)
        expected = f"{wanted}, as written in it: the file was damaged or changed"
        check(whole, f"SHA-256 of the content of {manifest}", there, expected, hint=hint)
    for name, size in files:
        actual = (path / name).stat().st_size if (path / name).is_file() else None
        check(actual == size, f"size of {path / name}", actual, f"{size} bytes", hint=hint)
    if found == FORMAT:
        check_digests(path, content["sha256"], hint)
    if match := _STEP.fullmatch(path.name):
        step, wanted = content.get("step"), int(match[1])
        expected = f"{wanted}, as in its folder's name"
        check(step == wanted, f"step in {manifest}", step, expected, hint=hint)
    if found != FORMAT:
        _log.warning("%s: of an earlier revision, without digests: damage goes unnoticed", path)
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
    ranks: Ranks | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None]:
    """Copy a checkpoint's weights into ``model``; return its state and averaged parameters.

    Raises:
        ValueError: if ``path`` is damaged, of another model, or of other ``settings`` or
            ``inputs``; the message names the first that differs. The model is unchanged then. With
            ``accept_inputs``, other inputs are only logged.
    """
    path = Path(path)
    ranks = ranks or Ranks()
    content = ranks.on_main(read_checkpoint, path)  # reads all files: once
    saved = content.get("settings", {})
    wanted = json.loads(json.dumps(dict(settings or {})))  # tuples become lists, as in the file
    if content["format"] == _UNDIGESTED and (new := wanted.keys() - saved.keys()):
        wanted = {name: value for name, value in wanted.items() if name in saved}
        _log.warning("%s: it does not note %s, which may differ now", path, ", ".join(sorted(new)))
    for name, before, now in _differences(saved, wanted):
        raise ValueError(
            f"{path}: made with {name} = {before!r}, this run has {now!r}. "
            "Restore the value, or start in a new folder"
        )
    _compare_inputs(path, content.get("inputs"), inputs or {}, accept_inputs)
    state = load_pickled(path / "state.pt", mmap=ranks.several)  # of which a rank uses a part
    step = content.get("step")
    inner = state.get("step", step) if isinstance(state, dict) else step
    check(inner == step, f"step in {path / 'state.pt'}", inner, f"{step}, as in checkpoint.json")
    ema = load_tensors(path / "ema.safetensors") if (path / "ema.safetensors").is_file() else None
    if (path / "model").is_dir():
        load_model(model, path / "model")
    else:
        read_parts(path / PARTS, model_parts(model), ranks)
    return state, ema


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name and both values of each entry that differs, in the order of names."""
    both = ((n, saved.get(n), wanted.get(n)) for n in sorted(saved.keys() | wanted.keys()))
    return [entry for entry in both if entry[1] != entry[2]]


def _compare_inputs(
    path: Path, saved: Mapping[str, Any] | None, wanted: Mapping[str, Any], accept: bool
) -> None:
    """Check that a run resumes with the data and models with which it began."""
    if saved is None and wanted:
        _log.warning("%s: of an earlier revision, which did not note its data and models", path)
    if not saved or not wanted:  # a run from Python need not note any
        return
    for name, before, now in _differences(saved, wanted):
        text = f"{path}: began with {name} = {before!r}, now it is {now!r}"
        if not accept:
            raise ValueError(
                f"{text}. Restore it, start in a new folder, or go on with --accept-changed-inputs "
                "(RunIdentity(accept_changed_inputs=True))"
            )
        _log.warning("%s; going on as asked", text)
