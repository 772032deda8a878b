"""The README's tables are those of the records under bench/results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import readme_tables  # noqa: E402


def test_tables_are_what_the_records_say(capsys):
    assert readme_tables.main(["--check"]) == 0, capsys.readouterr().err
