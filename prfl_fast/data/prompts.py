"""Read prompts, alone or with the images that a video begins and ends with."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prfl_fast.data.rows import read_rows, read_text
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
    rows: Iterator[tuple[str, Any]]
    if path.suffix == ".txt":
        lines = enumerate(read_text(path).split("\n"), 1)
        rows = ((f"{path}:{n}", {"prompt": line.strip()}) for n, line in lines if line.strip())
    else:
        rows = read_rows(path)
    prompts = [_prompt(row, where, path.parent) for where, row in rows]
    check(bool(prompts), f"prompts: {path}", "empty", "at least one prompt")
    return prompts


def _prompt(row: Any, where: str, folder: Path) -> Prompt:
    ok = isinstance(row, Mapping) and "prompt" in row and set(row) <= set(KEYS)
    ok = ok and all(isinstance(value, str) for value in row.values())
    check(ok, where, row, f"strings under prompt and, of others, only {', '.join(KEYS[1:])}")
    images = {key: folder / row[key] for key in KEYS[1:] if row.get(key)}
    for key, file in images.items():
        check(file.is_file(), f"{where}: {key}", str(file), "a file that exists")
    check("image" in images or not images, f"{where}: image", None, "one beside last_image")
    return Prompt(row["prompt"], **images)
