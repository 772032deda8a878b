"""Read prompts, alone or with the images that a video begins and ends with."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prfl_fast.utils.checks import check

KEYS = ("prompt", "image", "last_image")


class Prompt(NamedTuple):
    """Hold a prompt, and the paths of the first and the last frame if they are given."""

    text: str
    image: Path | None = None
    last_image: Path | None = None


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read a file of prompts.

    Args:
        path: ``.txt`` with a prompt on each line, or ``.csv`` or ``.jsonl`` with the keys
            ``prompt``, ``image`` and ``last_image``, of which images are optional and relative to
            the file. Empty lines are skipped.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of another kind or has no prompts, or a line has no prompt, other keys
            or an image that does not exist; the message names the line.
    """
    path = Path(path)
    kinds = (".txt", ".csv", ".jsonl")
    check(path.suffix in kinds, "prompts", str(path), f"a file of {', '.join(kinds)}")
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path}: no such file")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path}: not UTF-8 text ({error.reason})") from error
    prompts = [_prompt(row, where, path.parent) for where, row in _rows(path, content)]
    check(bool(prompts), f"prompts: {path}", "empty", "at least one prompt")
    return prompts


def _rows(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Yield the place and the record of each line."""
    lines = content.split("\n")
    if path.suffix == ".csv":
        reader = csv.DictReader(lines)
        for row in reader:
            given = {key: value for key, value in row.items() if value}
            yield f"{path}:{reader.line_num}", given
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if path.suffix == ".txt":
            yield where, {"prompt": line.strip()}
            continue
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error})") from error


def _prompt(row: Any, where: str, folder: Path) -> Prompt:
    ok = isinstance(row, Mapping) and "prompt" in row and set(row) <= set(KEYS)
    ok = ok and all(isinstance(value, str) for value in row.values())
    check(ok, where, row, f"strings under prompt and, of others, only {', '.join(KEYS[1:])}")
    images = {key: folder / row[key] for key in KEYS[1:] if row.get(key)}
    for key, file in images.items():
        check(file.is_file(), f"{where}: {key}", str(file), "a file that exists")
    check("image" in images or not images, f"{where}: image", None, "one beside last_image")
    return Prompt(row["prompt"], **images)
