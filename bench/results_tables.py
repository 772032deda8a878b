"""Fill the tables of ``bench/RESULTS.md`` from the records under ``bench/results``.

A marker pair ``<!-- bench:DEVICE/TABLE -->`` … ``<!-- /bench -->`` is filled with the table of that
name from the newest record in ``bench/results/DEVICE/*.json`` that has it, and with a line on where
the record comes from. ``--check`` writes nothing and exits with status 1 if a table in
``RESULTS.md`` differs from its record.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import report
from harness import ROOT, Table

from prfl_fast.utils.io import write_atomic

_MARKED = re.compile(
    r"(<!-- bench:(?P<device>[\w.-]+)/(?P<table>[\w.-]+) -->\n)(?P<body>.*?)(<!-- /bench -->)", re.S
)
_OPENING = re.compile(r"<!-- bench:.*?-->")


def newest(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the run and the table of the newest record below ``folder`` that has a table."""
    found = []
    for path in sorted(folder.rglob("*.json")):
        try:
            record = json.loads(path.read_text())
            tables = [t for s in record["suites"].values() for t in s.get("tables", [])]
            run = record["run"]
            found += [(run["date"], run, table) for table in tables if table["name"] == name]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: not a record of bench/run.py ({why})") from error
    if not found:
        raise ValueError(f"no record under {folder} has a table {name!r}")
    _, run, table = max(found, key=lambda each: each[0])
    return run, table


def find(results: Path, device: str, name: str) -> str:
    run, table = newest(results / device, name)
    text = report.to_markdown(Table(**table))
    return f"{text}\n\n<sub>{report.describe_run(run)}</sub>\n"


def regenerate(text: str, results: Path) -> str:
    """Return ``text`` with every marked table filled from its record."""
    if len(_OPENING.findall(text)) != len(_MARKED.findall(text)):
        raise ValueError(
            "a <!-- bench:DEVICE/TABLE --> marker is malformed or lacks its <!-- /bench -->"
        )
    return _MARKED.sub(lambda m: f"{m[1]}{find(results, m['device'], m['table'])}{m[5]}", text)


def main(argv: list[str] | None = None) -> int:
    """Return 0 if the file agrees with the records or was rewritten, 1 on drift or error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="report drift, write nothing")
    parser.add_argument("--file", type=Path, default=ROOT / "bench" / "RESULTS.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args(argv)
    try:
        text = args.file.read_text()
        wanted = regenerate(text, args.results)
    except (OSError, ValueError) as error:
        print(f"{args.file}: {error}", file=sys.stderr)
        return 1
    if wanted == text:
        return 0
    if args.check:
        print(
            f"{args.file}: tables differ from the records; run python bench/results_tables.py",
            file=sys.stderr,
        )
        return 1
    with write_atomic(args.file) as temporary:
        temporary.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
