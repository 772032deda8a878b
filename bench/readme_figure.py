"""Draw the README's figure from the newest record that has the table ``split``.

The bars are FLOPs of one gradient point of Wan2.1 14B at 720p, by part. They are counted on fake
tensors, so they hold on every device. The picture carries a digest of its numbers; ``--check``
exits with status 1 if the record has other numbers.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import report
from harness import ROOT
from results_tables import newest

FIGURE = ROOT / "docs" / "images" / "gradient_point.png"
SIZE = "wan14b-720p"
PARTS = ("rollout", "gradient", "reward", "SFT")
COLORS = ("#9ecae1", "#3182bd", "#fd8d3c", "#969696")
PREFIXES = {"GFLOP": 1e-6, "TFLOP": 1e-3, "PFLOP": 1.0}


def bars_of(table: dict) -> dict[str, list[float]]:
    """Return PFLOP by part of each way to compute a gradient point, from the rows of ``SIZE``."""
    names = [c["name"] if isinstance(c, dict) else c for c in table["columns"]]
    found, size = {}, ""
    for row in table["rows"]:
        cells = dict(zip(names, row, strict=True))
        size = cells["size"] or size
        if size == SIZE:
            found[cells["way"]] = [pflop(cells[part]) for part in PARTS]
    return found


def pflop(text: str) -> float:
    """Return ``"5.71 PFLOP"`` as a number of PFLOP."""
    number, unit = text.split()
    return float(number) * PREFIXES[unit]


def digest(bars: dict[str, list[float]]) -> str:
    return hashlib.sha256(json.dumps(bars).encode()).hexdigest()


def draw(bars: dict[str, list[float]], path: Path) -> None:
    """Write the figure: one stacked bar for each way, from zero."""
    figure, axes = report.new_figure(8, 2.4)
    ways = list(bars)[::-1]
    left = [0.0] * len(ways)
    for number, (part, color) in enumerate(zip(PARTS, COLORS, strict=True)):
        widths = [bars[way][number] for way in ways]
        axes.barh(ways, widths, left=left, label=part, color=color)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for way, total in zip(ways, left, strict=True):
        axes.text(total + 1, way, f"{total:.0f}", va="center")
    axes.set(xlabel="PFLOP per gradient point, counted (Wan2.1 14B, 81 frames at 720p)")
    axes.set_xlim(0, max(left) * 1.08)
    axes.set_title("Five gradient points on one trajectory halve the work of each", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=4, loc="outside lower right", frameon=False)
    figure.savefig(path, dpi=130, metadata={"Description": digest(bars)})


def main(argv: list[str] | None = None) -> int:
    """Draw the figure, or with ``--check`` compare its digest with the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="report drift, write nothing")
    options = parser.parse_args(argv)
    bars = bars_of(newest(ROOT / "bench" / "results", "split")[1])
    if not options.check:
        draw(bars, FIGURE)
    elif digest(bars).encode() not in FIGURE.read_bytes():
        print(f"{FIGURE}: drawn from other numbers; run python bench/readme_figure.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
