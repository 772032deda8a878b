"""Write files and folders atomically; read, write and compare the tensors of safetensors files."""

import hashlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from prfl_fast.utils.checks import reason_of
from prfl_fast.utils.folder_lock import is_writing
from prfl_fast.utils.optional import need

_TEMPORARY = re.compile(r"\.tmp-(\d+)-[0-9a-f]{8}")
_writing: set[Path] = set()  # temporary paths of this process


def _temporary(path: Path) -> Path:
    # The suffix stays last, because writers of images and arrays choose the format by it.
    return path.with_name(f"{path.stem}.tmp-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")


def _open_to_group(path: Path) -> None:
    """Give a file or folder the permissions that the umask allows; some writers give 0600."""
    mask = os.umask(0o077)  # the only portable way to read it
    os.umask(mask)
    mode = path.stat().st_mode & 0o7777
    wanted = mode | ((0o777 if path.is_dir() else 0o666) & ~mask)
    if wanted != mode:
        with suppress(OSError):  # some file systems have no permissions
            os.chmod(path, wanted)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success flush the file and rename it to ``path``.

    If the body raises, the temporary file is removed and ``path`` is unchanged. This function
    raises ``OSError`` if the parent folder is missing or not writable, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary(path)
    _writing.add(temporary)
    try:
        yield temporary
        is_folder = temporary.is_dir()
        for written in (*(temporary.rglob("*") if is_folder else ()), temporary):
            _open_to_group(written)
            _flush(written)
        if is_folder and path.exists():  # os.replace cannot replace a folder that has files
            remove_atomic(path)
        os.replace(temporary, path)
        _flush(path.parent)  # after a power failure the new name could otherwise be missing
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk's error names no file
            error.filename = str(path)
        raise
    finally:
        _remove(temporary)
        _writing.discard(temporary)


@contextmanager
def save_checkpoint_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that replaces it as in :func:`write_atomic`.

    Parent folders are created. At any moment ``path`` is the old folder, absent, or the complete
    new folder.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(path) as temporary:
        temporary.mkdir()
        yield temporary


def remove_atomic(path: str | os.PathLike[str]) -> None:
    """Rename a file or folder to a temporary name, then remove it: no partial state is visible."""
    path = Path(path)
    gone = _temporary(path)
    os.rename(path, gone)
    _remove(gone)


def link_atomic(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Make or replace the symbolic link ``path`` to ``target``; it exists at any moment."""
    temporary = _temporary(Path(path))
    os.symlink(target, temporary)
    os.replace(temporary, path)


def clean_temporaries(folder: str | os.PathLike[str], prefix: str = "") -> list[Path]:
    """Remove the temporary files of killed writers directly in ``folder``; return their paths.

    Only files whose names begin with ``prefix`` are removed, and none of a process of this host
    that still runs.
    """
    found = (p for p in sorted(Path(folder).iterdir()) if p.name.startswith(prefix))
    stale = list(filter(_is_stale, found))
    for path in stale:
        _remove(path)
    return stale


def clean_temporaries_of(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files of killed writers of ``path``, and no other files beside it."""
    path = Path(path)
    if path.parent.is_dir():
        clean_temporaries(path.parent, f"{path.stem}.tmp-")


def _is_stale(path: Path) -> bool:
    match = _TEMPORARY.search(path.name)
    if match is None:
        return False
    pid = int(match[1])
    if pid == os.getpid():  # or that of an earlier process of the same number
        return path.absolute() not in {p.absolute() for p in _writing}
    try:
        return not is_writing(pid, path.lstat().st_mtime)
    except FileNotFoundError:  # its writer has just renamed it
        return False


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; raise ``ValueError`` if it is not JSON, ``OSError`` if it is unreadable."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write a JSON file atomically."""
    with write_atomic(path) as temporary:
        text = json.dumps(content, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def digest_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 digest of a file, as ``sha256sum`` prints it."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
    return digest.hexdigest()


def save_tensors(
    tensors: Mapping[str, torch.Tensor],
    path: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors to a safetensors file, atomically; errors are those of `write_atomic`."""
    safetensors, writer = need("safetensors"), need("safetensors.torch")
    seen: set[int] = set()
    owned = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        # safetensors rejects tensors that share storage, so tied weights are copied.
        address = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    with write_atomic(path) as temporary:
        try:
            writer.save_file(owned, temporary, metadata=metadata or {"format": "pt"})
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error


@contextmanager
def open_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file for reading (``safe_open``); tensors are read to the CPU.

    A missing file raises ``FileNotFoundError``, a truncated or other file ``ValueError``.
    """
    safetensors = need("safetensors")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}). Copy it again"
        ) from error


def load_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read a safetensors file into CPU tensors; errors are those of :func:`open_tensors`."""
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def load_pickled(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """Read a file of ``torch.save`` to the CPU; only tensors and plain values are unpickled.

    ``mmap`` reads the bytes of a tensor when it is used, except in files of torch before 1.6. A
    missing file raises ``FileNotFoundError``, an unreadable one ``ValueError``.
    """
    try:
        mapped = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except Exception as error:  # the type of error depends on the bytes in the file
        reason = reason_of(error)
        if reason.startswith("Weights only load failed"):  # goes on to advise an unsafe load
            reason = "it is no file of torch.save, or holds more than tensors and plain values"
        raise ValueError(f"{path}: cannot be read ({reason})") from error


def check_fit(
    expected: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    source: object,
    *,
    dtypes: bool = False,
) -> None:
    """Raise one ``ValueError`` that names the first missing, unexpected and unequal tensors.

    The message names the ``source`` of the tensors. ``dtypes`` compares dtypes as well as shapes.
    """

    def form(tensor: torch.Tensor) -> str:
        dtype = str(tensor.dtype).removeprefix("torch.") if dtypes else ""
        return f"{dtype}{list(tensor.shape)}"

    wanted, found = ({n: form(t) for n, t in group.items()} for group in (expected, tensors))
    problems = {
        "missing": [f"{n} {s}" for n, s in wanted.items() if n not in found],
        "unexpected": [f"{n} {s}" for n, s in found.items() if n not in wanted],
        "of another shape or dtype": [
            f"{n} {s}, expected {wanted[n]}" for n, s in found.items() if wanted.get(n, s) != s
        ],
    }
    parts = [
        f"{len(names)} {kind} ({'; '.join(names[:3])}{'; …' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if parts:
        raise ValueError(f"{source}: tensors do not fit the model: {', '.join(parts)}")
