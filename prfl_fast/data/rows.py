"""Read the rows of text files: CSV, JSON arrays and JSON lines, with their places for messages."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prfl_fast.utils.checks import check


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark; raise ``ValueError`` for another."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from error


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each row of a ``.csv``, ``.json`` or ``.jsonl`` file.

    A row of CSV is a dict of its cells that are not empty, under the names in the first line. The
    ``.json`` file is an array. Empty lines are skipped. Raise ``ValueError`` for a malformed file.
    """
    content = read_text(path)
    if path.suffix == ".csv":
        yield from _csv(path, content)
    elif path.suffix == ".json":
        rows = _parsed(str(path), content)
        check(isinstance(rows, list), str(path), rows, "an array of objects")
        yield from ((f"{path}: item {number}", row) for number, row in enumerate(rows))
    else:
        # Only "\n" ends a line: str.splitlines also splits at U+2028, which JSON leaves raw.
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _parsed(where, line)


def _csv(path: Path, content: str) -> Iterator[tuple[str, dict[str, str]]]:
    rows = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            check(None not in row, where, row.get(None), "no more cells than the first line")
            yield where, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: not CSV ({error})") from error


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
