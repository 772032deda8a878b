"""Tables and plots: text for the terminal, Markdown for report.md and the README, PNG,
results.json.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import SuiteResult, Table

from prfl_fast._extras import need
from prfl_fast.training_state import write_atomic

# One colour per role in every plot (Okabe and Ito's set, told apart by colour-blind readers too).
COLOURS = {
    "eager": "#8c8c8c",
    "naive": "#8c8c8c",
    "compiled": "#e69f00",
    "reference": "#56b4e9",
    "prfl_fast": "#0072b2",
    "triton": "#0072b2",
    "cuda": "#009e73",
    "without": "#0072b2",
    "with": "#56b4e9",
}
BLANK = "–"


def seconds(value: float | None) -> str:
    """``1.23 s``, ``45.6 ms``, ``7.89 µs``."""
    if value is None or not math.isfinite(value):
        return BLANK
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value * 1e6)} µs"


def size(value: float | None) -> str:
    """``12.3 MB``, in powers of ten as the memory makers count."""
    if value is None:
        return BLANK
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


def flops(value: float | None) -> str:
    """``1.23 TFLOP``."""
    if value is None:
        return BLANK
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{_three(value / 1e6)} MFLOP"


def ratio(value: float | None) -> str:
    """``1.23×``."""
    return BLANK if value is None or not math.isfinite(value) else f"{_three(value)}×"


def number(value: float | None, digits: int = 3) -> str:
    """Plain decimals, or the exponent form for what they would round away."""
    if value is None:
        return BLANK
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _three(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def to_text(table: Table) -> str:
    """The table with aligned columns: the first to the left, the others to the right."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.columns))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [table.title, line(table.columns), "  ".join("-" * width for width in widths)]
    lines += [line(row) for row in table.rows]
    lines += [f"  {note}" for note in table.notes]
    return "\n".join(lines)


def to_markdown(table: Table, *, title: bool = True) -> str:
    """The table in GitHub's Markdown, its notes below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"**{table.title}**", ""] if title else []
    lines += [line(table.columns), line([":--", *["--:"] * (len(table.columns) - 1)])]
    lines += [line(row) for row in table.rows]
    if table.notes:
        lines += ["", *(f"{note}  " for note in table.notes[:-1]), table.notes[-1]]
    return "\n".join(lines)


def table_from_record(record: Mapping[str, Any]) -> Table:
    """A table read back from results.json."""
    return Table(**{key: record[key] for key in ("name", "title", "columns", "rows", "notes")})


def suite_record(result: SuiteResult, wall: float) -> dict[str, Any]:
    """A suite's part of results.json."""
    return {
        "wall_s": round(wall, 1),
        "tables": [vars(table) for table in result.tables],
        "cases": result.cases,
        "figures": sorted(result.figures),
        "problems": result.problems,
    }


def describe_run(run: Mapping[str, Any]) -> str:
    """One line on where, when and from what commit a record comes."""
    commit = run["git"]["sha"][:9] + (" with local changes" if run["git"]["dirty"] else "")
    device, versions = run["device"], run["versions"]
    cores = f", {device['cores']} cores" if device["type"] == "cpu" else ""
    return (
        f"{device['name']}{cores}; preset {run['preset']}, {run['dtype']}, seed {run['seed']}; "
        f"torch "
        f"{versions['torch']}; commit {commit}; {run['date'][:10]}; `{run['command']}`"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all. Numbers that are not finite become null, which JSON has."""
    with write_atomic(path) as temporary:
        temporary.write_text(
            json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_markdown(path: Path, record: Mapping[str, Any]) -> None:
    """report.md: the run, then each suite's tables and plots."""
    lines = ["# prfl_fast benchmark", "", describe_run(record["run"]), ""]
    for name, suite in record["suites"].items():
        lines += [f"## {name}", ""]
        if "error" in suite:
            lines += [f"Did not finish: {suite['error']}", ""]
            continue
        for table in suite["tables"]:
            lines += [to_markdown(table_from_record(table)), ""]
        for problem in suite["problems"]:
            lines += [f"Check failed: {problem}", ""]
        for figure in suite["figures"]:
            lines += [f"![{Path(figure).stem}]({figure})", ""]
    with write_atomic(path) as temporary:
        temporary.write_text("\n".join(lines))


def new_figure(width: float = 8.0, height: float = 4.5, **grid: Any) -> tuple[Any, Any]:
    """A figure without a display and its axes, ``grid`` as ``Figure.subplots`` takes it."""
    need("matplotlib", "bench")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**grid)


def grouped_bars(
    axes: Any,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    unit: str,
    log: bool = False,
    labels: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Horizontal bars, one group per row from the top; a value that is missing leaves a gap."""
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [row + (i - (len(series) - 1) / 2) * height for row in range(len(groups))]
        shown = [math.nan if value is None else value for value in values]
        bars = axes.barh(
            at, shown, height * 0.92, label=name, color=COLOURS.get(name.split()[0], None)
        )
        if labels is not None:
            axes.bar_label(bars, labels=list(labels[name]), padding=3, fontsize=7)
    axes.set_yticks(range(len(groups)), groups)
    axes.tick_params(labelsize=8)
    if not axes.yaxis_inverted():  # panels that share the axis are inverted together
        axes.invert_yaxis()
    axes.set_xlabel(unit, fontsize=9)
    axes.set_title(title, fontsize=10)
    if log:
        axes.set_xscale("log")
    axes.margins(x=0.14)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_figure(path: Path, figure: Any) -> None:
    """Write a PNG, whole or not at all."""
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
