"""Write results: tables as text and Markdown, figures as PNG, records as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import SuiteResult, Table

from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.optional import need

# One color per role in every plot (Okabe and Ito's set, told apart by color-blind readers too).
COLORS = {
    "eager": "#8c8c8c",
    "naive": "#8c8c8c",
    "compiled": "#e69f00",
    "reference": "#56b4e9",
    "prfl_fast": "#0072b2",
    "prfl_fast cuda": "#009e73",
    "without": "#0072b2",
    "with": "#56b4e9",
}
BLANK = "–"


def seconds(value: float | None) -> str:
    """Return seconds as text: ``1.23 s``, ``45.6 ms``, ``7.89 µs``."""
    if value is None or not math.isfinite(value):
        return BLANK
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{_three(value * factor)} {unit}"
    return f"{_three(value * 1e6)} µs"


def size(value: float | None) -> str:
    """Return bytes as text in powers of ten: ``12.3 MB``."""
    if value is None:
        return BLANK
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} B"


def flops(value: float | None) -> str:
    """Return floating-point operations as text: ``1.23 TFLOP``."""
    if value is None:
        return BLANK
    for factor, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= factor:
            return f"{_three(value / factor)} {unit}"
    return f"{_three(value / 1e6)} MFLOP"


def ratio(value: float | None) -> str:
    """Return a ratio as text: ``1.23×``."""
    return BLANK if value is None or not math.isfinite(value) else f"{_three(value)}×"


def number(value: float | None, digits: int = 3) -> str:
    """Return decimals as text, in exponent form if they would round to zero."""
    if value is None:
        return BLANK
    if value != 0 and abs(value) < 10**-digits:
        return f"{value:.1e}"
    return f"{value:.{digits}f}"


def _three(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def to_text(table: Table) -> str:
    """Return the table as text: the first column aligned left, the others right."""
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


def to_markdown(table: Table) -> str:
    """Return the table in GitHub's Markdown, followed by its notes."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"**{table.title}**", "", line(table.columns)]
    lines.append(line([":--", *["--:"] * (len(table.columns) - 1)]))
    lines += [line(row) for row in table.rows]
    if table.notes:
        lines += ["", *(f"{note}  " for note in table.notes[:-1]), table.notes[-1]]
    return "\n".join(lines)


def suite_record(result: SuiteResult, wall: float) -> dict[str, Any]:
    return {
        "wall_s": round(wall, 1),
        "tables": [vars(table) for table in result.tables],
        "cases": result.cases,
        "figures": sorted(result.figures),
        "problems": result.problems,
    }


def describe_run(run: Mapping[str, Any]) -> str:
    """Return one line with device, date and commit of a record."""
    commit = run["git"]["sha"][:9] + (" with local changes" if run["git"]["dirty"] else "")
    device, versions = run["device"], run["versions"]
    cores = f", {device['cores']} cores" if device["type"] == "cpu" else ""
    return (
        f"{device['name']}{cores}; preset {run['preset']}, {run['dtype']}, seed {run['seed']}; "
        f"torch {versions['torch']}; commit {commit}; {run['date'][:10]}; `{run['command']}`"
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Infinity and NaN become null, because JSON has neither."""
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
    """Write report.md: the run, then tables and figures of each suite."""
    lines = ["# prfl_fast benchmark", "", describe_run(record["run"]), ""]
    for name, suite in record["suites"].items():
        lines += [f"## {name}", ""]
        if "error" in suite:
            lines += [f"Did not finish: {suite['error']}", ""]
            continue
        for table in suite["tables"]:
            lines += [to_markdown(Table(**table)), ""]
        for problem in suite["problems"]:
            lines += [f"Check failed: {problem}", ""]
        for figure in suite["figures"]:
            lines += [f"![{Path(figure).stem}]({figure})", ""]
    with write_atomic(path) as temporary:
        temporary.write_text("\n".join(lines))


def new_figure(width: float = 8.0, height: float = 4.5, **grid: Any) -> tuple[Any, Any]:
    """Return a figure that needs no display, and its axes; ``grid`` goes to ``Figure.subplots``."""
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
    labels: Mapping[str, Sequence[str]] | None = None,
    errors: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
) -> None:
    """Draw horizontal bars from zero, one group per row from the top.

    Args:
        series: name → one value per group; None leaves a gap.
        labels: name → text behind each bar.
        errors: name → distances from each value to its lower and upper bound; None draws none.
    """
    height = 0.8 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [row + (i - (len(series) - 1) / 2) * height for row in range(len(groups))]
        shown = [math.nan if value is None else value for value in values]
        bounds = [pair or (math.nan, math.nan) for pair in (errors or {}).get(name, ())]
        bars = axes.barh(
            at,
            shown,
            height * 0.92,
            label=name,
            color=COLORS.get(name, COLORS.get(name.split()[0])),
            xerr=list(zip(*bounds, strict=True)) or None,
            error_kw={"elinewidth": 0.8, "capsize": 2},
        )
        if labels is not None:
            axes.bar_label(bars, labels=list(labels[name]), padding=3, fontsize=7)
    axes.set_yticks(range(len(groups)), groups)
    if not axes.yaxis_inverted():  # panels that share the axis are inverted together
        axes.invert_yaxis()
    label_axes(axes, title=title, x=unit, grid="x")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)


def label_axes(axes: Any, *, title: str = "", x: str = "", y: str = "", grid: str = "both") -> None:
    """Set title and axis labels in the style of every figure: a light grid, no upper frame."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(path: Path, figure: Any) -> None:
    """Write a PNG atomically."""
    with write_atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
