"""Write the records of a run, one JSON object a line, and make a page of text from them."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

# Seconds of a record count from the supervisor's start, also in the processes that it starts.
START = float(os.environ.setdefault("GPU_QUICK_START", repr(time.time())))


def plain(value: Any) -> Any:
    """Return a value that JSON can hold; other types become text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


class Journal:
    """Append to a file of JSON lines; each is on disk before the next case begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, stage: str, case: str, **values: Any) -> None:
        head = {"at_s": time.time() - START, "kind": kind, "stage": stage, "case": case}
        line = json.dumps(plain(head | values))
        with open(self.path, "a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        found = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                with contextlib.suppress(ValueError):  # a line cut off by a kill
                    found.append(json.loads(line))
        return found


def number(value: Any, digits: int = 3) -> str:
    """Return a number with few digits, a dash for None, other values as text."""
    if isinstance(value, (int, float)):
        return f"{value:.{digits}g}"
    return "–" if value is None else str(value)


# Columns of each stage's table, left out where no record has them.
COLUMNS = {
    "timing": "ms gbs percent tflops host_ms eager_ms off_eager exposed",
    "attention": "ms tflops backward_ms backward_tflops error lse_error gradient_error",
    "cuda": "triton_ms cuda_ms triton_percent cuda_percent ok",
    "block": "ms host_ms wall_ms peak_gib first_s off",
    "step": "wall_ms second_ms peak_gib predicted_gib loss finite off drift",
    "memory": "wall_ms peak_gib host_gib hidden_share",
    "ncu": "seconds status",
    "memcheck": "seconds status errors",
}
HIDDEN = ("at_s", "kind", "stage", "case", "operations", "text", "took_s")


def results_of(records: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Return the cases of a stage that ended with a result."""
    kept = [r for r in records if r["stage"] == stage and r["kind"] == "result"]
    return [r for r in kept if r["case"] != "stage"]


def table(found: list[dict[str, Any]], title: str, names: list[str]) -> list[str]:
    """Return a stage's results as short lines: callers may keep only the last few kB."""
    columns = [c for c in names if any(r.get(c) is not None for r in found)]
    width = max(len(r["case"]) for r in found)
    lines = ["", f"-- {title}".ljust(width) + "".join(f" {c:>8}" for c in columns)]
    for r in found:
        widths = [max(8, len(c)) for c in columns]
        cells = [number(r.get(c))[:w].rjust(w) for c, w in zip(columns, widths, strict=True)]
        lines.append(f"{r['case']:{width}} " + " ".join(cells))
    return lines


def smoke_lines(smoke: list[dict[str, Any]]) -> list[str]:
    """Return lines on operations that are wrong, or give other bits the second time."""
    bad = [r for r in smoke if not r["ok"]]
    moving = sorted({r["case"] for r in smoke if not r["same_bits"]})
    good = len(smoke) - len(bad)
    lines = ["", f"-- smoke: {good} of {len(smoke)} within 2 x the error of plain PyTorch"]
    lines += [f"  WRONG {r['case']}: {r['worst']}" for r in bad]
    return lines + ([f"  other bits the second time: {', '.join(moving)}"] if moving else [])


def unfinished(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return stage and name of the cases that began and did not end."""
    begun = {(r["stage"], r["case"]) for r in records if r["kind"] == "begin"}
    return sorted(begun - {(r["stage"], r["case"]) for r in records if r["kind"] != "begin"})


def summary(records: list[dict[str, Any]]) -> str:
    lines = ["", "== gpu_quick"]
    for r in results_of(records, "env"):
        shown = {k: v for k, v in r.items() if k not in HIDDEN and v is not None}
        text = ", ".join(f"{k} {number(v, 4)}" for k, v in shown.items())
        lines.append(f"{r['case']}: {text[:400]}")
    if smoke := results_of(records, "smoke"):
        lines += smoke_lines(smoke)
    for stage, names in COLUMNS.items():
        if found := results_of(records, stage):
            lines += table(found, stage, names.split())
    for kind in ("failed", "skipped"):
        found = [r for r in records if r["kind"] == kind]
        lines += ["", f"-- {kind}: {len(found)}"] if found else []
        for r in found[:30]:
            reason = str(r.get("error", r.get("why"))).strip().splitlines()[-1]
            lines.append(f"  {r['stage']}/{r['case']}: {reason[:110]}")
    lines += [f"-- not finished: {stage}/{case}" for stage, case in unfinished(records)]
    return "\n".join(lines) + "\n"
