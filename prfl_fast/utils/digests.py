"""Write and check the SHA-256 digests of the files of a folder."""

import logging
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from prfl_fast.utils.checks import check
from prfl_fast.utils.io import digest_of, read_json, write_json

DIGESTS = "digests.json"
_log = logging.getLogger("prfl_fast")


def file_digests(folder: Path, known: Container[str] = ()) -> dict[str, str]:
    """Return the digest of every file below ``folder`` by its path, but of those in ``known``."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [(path.relative_to(folder).as_posix(), path) for path in paths]
    return {name: digest_of(path) for name, path in names if name not in known}


def check_digests(folder: Path, digests: Mapping[str, Any], hint: str) -> None:
    """Raise a ``ValueError`` that names the first file whose digest differs."""
    for name, digest in digests.items():
        found = digest_of(folder / name) if (folder / name).is_file() else None
        expected = f"{digest}, as written: the file was damaged or changed since"
        check(found == digest, f"SHA-256 of {folder / name}", found, expected, hint=hint)


def write_digests(folder: Path, names: tuple[str, ...]) -> None:
    """Write the digests of the files ``names`` of a folder into its ``digests.json``."""
    write_json(folder / DIGESTS, {name: digest_of(folder / name) for name in names})


def check_folder(folder: Path, names: tuple[str, ...], kind: str) -> None:
    """Check the files ``names`` of a folder against its ``digests.json``.

    A folder of an earlier revision has none, which is logged. Messages call the folder ``kind``.

    Raises:
        ValueError: if a file is damaged, or ``digests.json`` does not cover it.
    """
    path = folder / DIGESTS
    if not path.is_file():
        _log.warning("%s: this %s has no %s, so damage goes unnoticed", folder, kind, DIGESTS)
        return
    hint = f"Copy the {kind} again, or delete {DIGESTS} if you changed the file yourself"
    try:
        digests = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}). {hint}") from error
    check(isinstance(digests, dict), str(path), digests, "a JSON object of digests", hint=hint)
    check_digests(folder, {name: digests.get(name) for name in names}, hint)
