"""Report the resources of each compiled Triton kernel and the bytes an operation must move.

No GPU takes part: kernels are compiled ahead of time, bytes follow from shapes.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aot
import report
import torch
from harness import PRESETS, Context, Table

from prfl_fast.kernels.runtime.triton import HAS_TRITON
from suites.kernel_cases import CASES
from suites.kernel_checks import moved_bytes

SIZES = ("wan1.3b-480p", "wan14b-480p", "wan14b-720p")
# The H200's, and the one whose programs have the least shared memory. A cold compilation of all
# kernels takes 35 s of two cores for each; bench/aot.py prints the others.
CAPABILITIES = (90, 120)


def measure(context: Context) -> tuple[list[Table], list[dict[str, Any]]]:
    """Return tables ``resources``, ``resources-kernels``, ``bytes``, and their records."""
    cases: list[dict[str, Any]] = []
    body = []
    for case in CASES:
        line = [case.name]
        for name in SIZES:
            moved = moved_bytes(case, PRESETS[name], torch.bfloat16)
            cases.append({"case": f"bytes of {case.name}", "preset": name, "bytes": moved})
            line.append(" / ".join(report.size(moved[part]) for part in moved))
        body.append(line)
    notes = [
        "bfloat16 activations, one sample; forward / backward, every tensor read or written once, "
        "weights and modulation rows included."
    ]
    title = "Bytes an operation must move"
    tables = [Table("bytes", title, ["operation", *SIZES], body, notes)]
    if not HAS_TRITON:
        return tables, cases
    # One process for each core: each imports torch, and Triton hashes itself, for seconds.
    processes = min(len(CAPABILITIES), len(os.sched_getaffinity(0)))
    shares = [CAPABILITIES[i::processes] for i in range(processes)]
    with context.bar(len(shares), "compiling kernels") as bar:

        def compiled(capabilities: tuple[int, ...]) -> list[aot.Resources]:
            found = aot.measure([], capabilities)
            bar.update()
            return found

        with ThreadPoolExecutor(processes) as pool:
            used = [r for found in pool.map(compiled, shares) for r in found]
    used.sort(key=lambda r: r.capability)
    cases += [{"case": f"{r.op} {r.label}, sm_{r.capability}", **vars(r)} for r in used]
    return [*_resource_tables(used), *tables], cases


def _resource_tables(used: list[aot.Resources]) -> list[Table]:
    architectures = [f"sm_{c}" for c in CAPABILITIES]
    by_op: dict[str, list[aot.Resources]] = {}
    by_kernel: dict[tuple[str, str], dict[int, aot.Resources]] = {}
    for r in used:
        by_op.setdefault(r.op, []).append(r)
        by_kernel.setdefault((r.op, r.label), {})[r.capability] = r

    def cell(found: list[aot.Resources]) -> str:
        if not found:
            return report.BLANK
        registers = max(r.registers for r in found)
        spilled = sum(r.spilled_bytes for r in found)
        return f"{registers} / {spilled} / {max(r.shared_bytes for r in found) / 1024:.1f}"

    rows = []
    for op, found in by_op.items():
        here = [cell([r for r in found if r.capability == c]) for c in CAPABILITIES]
        rows.append([op, str(len({r.label for r in found})), *here])
    each = []
    for (op, label), found in by_kernel.items():
        here = [cell([found[c]] if c in found else []) for c in CAPABILITIES]
        each.append([op, label, str(next(iter(found.values())).num_warps), *here])
    notes = [
        "registers of a thread / spilled bytes of a thread / shared KiB of a program; the worst of "
        "the operation's kernels, the sum of their spills.",
        "Wan's widths, D = 1536 to 5120; compiled by Triton ahead of time, not run. "
        "python bench/aot.py compiles for sm_80 and sm_100 too.",
    ]
    columns, title = ["operation", "variants", *architectures], "Compiled Triton kernels"
    tables = [Table("resources", title, columns, rows, notes)]
    columns = ["operation", "kernel", "warps", *architectures]
    notes = [notes[0].partition(";")[0] + "."]
    return [*tables, Table("resources-kernels", "Every compiled variant", columns, each, notes)]
