"""Print tables: with rich where it is installed, else as plain columns."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

from prfl_fast.utils.optional import MissingExtraError, need


def print_facts(facts: Mapping[str, object]) -> None:
    """Print a line for each fact: its name and its value."""
    for name, value in facts.items():
        print(f"{name}: {value}")


def print_table(
    rows: Iterable[Sequence[str]], columns: Sequence[str], numbers: Sequence[str] = ()
) -> None:
    """Print rows under their column names; the columns ``numbers`` are aligned at the right."""
    cells = [list(row) for row in rows]
    try:
        box, console, table = (need(f"rich.{name}") for name in ("box", "console", "table"))
    except MissingExtraError:
        # A cell may have several lines.
        lines = [line for row in cells for line in zip_longest(*map(str.splitlines, row))]
        flat = [columns, *([part or "" for part in line] for line in lines)]
        widths = [max(map(len, column)) for column in zip(*flat, strict=True)]
        for row in flat:
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(line.rstrip())
        return
    made = table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        # Folded, as a long name of a file must not lose its end.
        made.add_column(name, justify="right" if name in numbers else "left", overflow="fold")
    for row in cells:
        made.add_row(*row)
    screen = console.Console(markup=False, highlight=False, emoji=False)
    if not screen.is_terminal:
        screen.width = 1000  # a pipe has no width, and wrapped cells would split rows
    screen.print(made, soft_wrap=not screen.is_terminal)
