"""Predict each memory-bound Triton kernel's share of the copy rate from its machine code.

It needs no GPU: kernels are compiled ahead of time, and their machine code is replayed
(``bench/machine_code``). The newest record is the baseline of ``tests/bench/test_predictions.py``,
and kernels whose machine code it already holds are not replayed again.
"""

import dataclasses
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import aot
import predict
import report
from attention_speed import ARCH, KEYS, LoopCost
from harness import ROOT, Context, SuiteResult, Table, UnavailableError
from machine_code.chips import DRAM_LATENCIES
from machine_code.predict import Prediction

from prfl_fast.kernels.runtime.triton import HAS_TRITON

SHOWN = 90  # architecture of the columns in detail
TARGET = 90  # percent of the copy rate
SHARES = (1.0, 0.5, 0.25)  # densities


def run(context: Context) -> SuiteResult:
    """Return the table ``predictions`` and a case for every kernel and architecture."""
    if not HAS_TRITON:
        raise UnavailableError("compiling kernels needs triton: pip install triton")
    record = predict.newest_record(ROOT / "bench" / "results")
    processes = min(len(aot.CAPABILITIES), len(os.sched_getaffinity(0)))
    with context.bar(len(aot.CAPABILITIES), "compiling and replaying kernels") as bar:

        def of(arch: int) -> list[Prediction]:
            found = predict.find(arch, record=record)
            bar.update()
            return found

        with ThreadPoolExecutor(processes) as pool:
            found = [p for each in pool.map(of, aot.CAPABILITIES) for p in each]
    cases = [
        {"case": f"{p.name}, sm_{p.arch}", **dataclasses.asdict(p), "listing": None} for p in found
    ]
    spilled = [case["case"] for case in cases if case["spilled_bytes"]]
    problems = [f"registers are spilled: {', '.join(spilled)}"] if spilled else []
    tables = [_table(found), attention_table(predict.find_attention())]
    return SuiteResult(tables=tables, cases=cases, problems=problems)


def attention_table(costs: Sequence[LoopCost]) -> Table:
    """Return the speeds of sparse attention over dense attention of the same precision."""
    rows = []
    for cost in costs:
        base = costs[0 if "bf16" in cost.label and " exact " in cost.label else 1]
        dense = cost in costs[:2]
        speeds = [report.BLANK if dense else f"{base.clocks / cost.clocks / d:.2f}" for d in SHARES]
        count = f"{cost.instructions:.0f}" if cost.instructions else report.BLANK
        rows.append([cost.label, count, f"{cost.clocks:.0f}", *speeds])
    notes = [
        f"Predictions, not measurements, from the machine code for sm_{ARCH}: a trip of the loop "
        "takes the clocks of its products at the peak rate and those of its instructions, without "
        "overlap. Speeds are over dense attention: the first row for 16 bits, the second for 8.",
        "Left out: prologue, quantization, the time of the mask, lists of unequal length.",
    ]
    columns = ["kernel", f"instructions for {KEYS} keys", "clocks"]
    columns += [f"speed at density {share:g}" for share in SHARES]
    return Table("attention", "Predicted speed of sparse attention", columns, rows, notes)


def _table(found: Iterable[Prediction]) -> Table:
    by_kernel: dict[tuple[str, str], dict[int, Prediction]] = {}
    for p in found:
        by_kernel.setdefault((p.op, p.label), {})[p.arch] = p
    others = [arch for arch in aot.CAPABILITIES if arch != SHOWN]
    rows = []
    for (op, label), each in sorted(by_kernel.items()):
        p = each.get(SHOWN)
        shown = [report.BLANK] * 3
        if p is not None:
            shares = " / ".join(map(str, p.shares))
            shown = [shares, f"{p.resident_warps} / {p.flying_kb}", p.limits]
        rest = [str(each[arch].share) if arch in each else report.BLANK for arch in others]
        rows.append([op, label, *shown[:2], *rest, shown[2]])
    main = [each[SHOWN].share for each in by_kernel.values() if SHOWN in each]
    latencies = " / ".join(map(str, DRAM_LATENCIES))
    notes = [
        f"Predictions, not measurements: percent of the copy rate. sm_{SHOWN} at DRAM latencies of "
        f"{latencies} clocks, the others at {DRAM_LATENCIES[1]}; ±10 points until calibrated on a "
        "GPU.",
        "warps / kB: resident on a multiprocessor, and DRAM loads in flight at the middle latency.",
        f"sm_{SHOWN}, middle latency: {sum(share >= TARGET for share in main)} of {len(main)} "
        f"kernels reach {TARGET} %.",
        "32 760 tokens, Wan's widths; rates of an A100, H200, B200 and RTX 5090.",
    ]
    columns = ["operation", "kernel", f"sm_{SHOWN}", "warps / kB"]
    columns += [*(f"sm_{arch}" for arch in others), f"limit on sm_{SHOWN}"]
    return Table("predictions", "Predicted share of the copy rate", columns, rows, notes)
