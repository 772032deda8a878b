"""Time ``prfl-fast plan`` as a user runs it: processes of its own, imports included.

The runs of all workloads take turns. Plans need no GPU; their bytes are predictions.
"""

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import report
from harness import Context, SuiteResult, Table

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.overview import words_of
from prfl_fast.utils.units import GIB

ROUNDS = 3
FULL_480P = "--train full --height 480 --width 832"
# Workload → model, budget and options. Videos have 81 frames of 720 × 1280 by default.
CASES = {
    "Wan2.1-T2V-14B, RTX 4090": "wan2.1-t2v-14b rtx4090",
    "Wan2.1-T2V-14B, 16 GiB": "wan2.1-t2v-14b 16GiB",
    "Wan2.1-T2V-14B, L40S": "wan2.1-t2v-14b l40s",
    "Wan2.1-T2V-14B, H100": "wan2.1-t2v-14b h100",
    "Wan2.1-T2V-14B, H200": "wan2.1-t2v-14b h200",
    "the same, 5 points": "wan2.1-t2v-14b h200 --points 5",
    "Wan2.1-T2V-14B, all parameters, 480p, H200": f"wan2.1-t2v-14b h200 {FULL_480P}",
    "Wan2.1-I2V-14B, RTX 4090": "wan2.1-i2v-14b rtx4090",
    "Wan2.2-T2V-A14B, both experts, RTX 4090": "wan2.2-t2v-a14b rtx4090",
    "HunyuanVideo, L40S": "hunyuan-video l40s",
    "LTX-2, RTX 4090": "ltx-2 rtx4090 --height 704",
}


def planned(model: str, budget: str, *options: str) -> tuple[float, dict[str, Any]]:
    """Return the seconds that the command takes, and its plan."""
    command = [sys.executable, "-m", "prfl_fast.cli", "plan", "--json"]
    command += ["--model", model, "--budget", budget, *options]
    start = time.perf_counter()
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode > 1:  # 1: nothing fits
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    return seconds, json.loads(run.stdout)


def result(times: dict[str, list[float]], plans: dict[str, dict[str, Any]]) -> SuiteResult:
    """Return the table of times and plans by workload; a plan that does not fit is a problem."""
    body, records, problems = [], [], []
    for label, plan in plans.items():
        seconds, used = times[label], plan["peak"] + plan["reserve"]
        policies = [words_of(MemoryConfig(**plan[name])) for name in ("memory", "reward_memory")]
        room = f"{used / GIB:.1f} of {plan['budget'] / GIB:.1f} GiB"
        cells = [report.seconds(statistics.median(seconds)), report.seconds(max(seconds))]
        body.append([label, *cells, *policies, room, f"{plan['host'] / GIB:.0f} GiB"])
        kept = ("peak", "reserve", "budget", "host", "memory", "reward_memory", "feasible")
        records.append({"case": label, "seconds": seconds, **{k: plan[k] for k in kept}})
        if not plan["feasible"]:
            problems.append(f"{label}: nothing fits")
    columns = ["workload, GPU", "time", "longest", "generator", "reward model", "device", "host"]
    notes = [
        "time: of the whole command, imports included; median and longest of "
        f"{len(next(iter(times.values())))} processes. device: predicted peak with CUDA's context "
        "and the fragmentation of a modeled allocator, none of which a GPU has confirmed. "
        "LoRA of rank 16 and videos of 81 frames at 720p unless said otherwise."
    ]
    return SuiteResult(
        [Table("plan", "Time of prfl-fast plan", columns, body, notes)], records, problems=problems
    )


def run(context: Context) -> SuiteResult:
    """Plan each workload in turn, ``ROUNDS`` times; the device of the context is not used."""
    times: dict[str, list[float]] = {label: [] for label in CASES}
    plans: dict[str, dict[str, Any]] = {}
    with context.bar(ROUNDS * len(CASES), "plans") as bar:
        for _ in range(ROUNDS):
            for label, options in CASES.items():
                seconds, plans[label] = planned(*options.split())
                times[label].append(seconds)
                bar.update()
    return result(times, plans)
