"""Start workers, end those that hang, and print the table when all is done or time is up."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from quick.journal import Journal, summary, unfinished

SCRIPT = str(Path(__file__).resolve().parents[1] / "gpu_quick.py")
# Stage → seconds of a run of nine minutes, and the least it is started with.
STAGES = {
    "env": (45, 3),  # with the first import of torch on a cold machine
    "warm": (40, 10),
    "smoke": (70, 5),
    "timing": (95, 8),
    "attention": (65, 8),
    "cuda": (20, 4),
    "block": (70, 10),
    "step": (50, 12),
    "memory": (30, 10),
    "ncu": (40, 20),
    "memcheck": (22, 12),
}


RESERVE = 8  # seconds for the table
GRACE = 12  # seconds past a stage's end after which its process is killed
RESTART = 75  # exit status: the CUDA context is lost, start again behind this case
RESTARTS = 6


def supervise(options: argparse.Namespace) -> int:
    """Run a worker, and another if it dies, until all is done; print the table."""
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "gpu_quick.jsonl")
    journal.path.write_text("")
    start = time.time()
    deadline = start + 60 * options.minutes - RESERVE
    stages = [s for s in STAGES if s in options.stages]
    scale = min(3.0, (deadline - start) / sum(STAGES[s][0] for s in stages))
    ends, end = {}, start
    for stage in stages:
        end += scale * STAGES[stage][0]
        ends[stage] = end
    seconds = {s: e - start for s, e in ends.items()}
    journal.write("result", "run", "schedule", argv=sys.argv[1:], seconds=seconds)
    stop: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, frame: stop.append(n))
    before = len(journal.read())
    command = [sys.executable, SCRIPT, "--worker", json.dumps(ends), "--device", options.device]
    command += ["--out", str(out), *["--dry"] * options.dry]
    for _ in range(RESTARTS + 1):
        process = subprocess.Popen(command, process_group=0)
        why = watch(process, journal, ends, deadline, stop)
        if why:
            kill(process)
        ended = f"ended with status {process.returncode}"
        if process.returncode != 0 and not stop:
            for stage, case in unfinished(journal.read()):
                if stage in ends:
                    journal.write("failed", stage, case, error=why or f"its process {ended}")
        progress, before = len(journal.read()) > before, len(journal.read())
        if process.returncode == 0 or stop or time.time() > deadline - 10:
            break
        if not progress:
            journal.write("failed", "run", "worker", error=f"{ended} before any case")
            break
    if stop:
        journal.write("result", "run", "stopped", signal=stop[0])
    table = summary(journal.read())
    (out / "gpu_quick.txt").write_text(table)
    print(table, flush=True)
    return 128 + stop[0] if stop else 0


def watch(
    process: Any, journal: Journal, ends: dict[str, float], deadline: float, stop: list[int]
) -> str:
    """Wait for the worker and return why it has to be killed, or an empty string."""
    while process.poll() is None:
        time.sleep(0.2)
        if stop:
            return f"stopped by signal {stop[0]}"
        if time.time() > deadline + 2:
            return "the run's time is over"
        last = [r for r in journal.read() if r["stage"] in ends][-1:]
        if last and last[0]["kind"] == "begin" and time.time() > ends[last[0]["stage"]] + GRACE:
            return "hung past its stage's time"
    return ""


def kill(process: Any) -> None:
    """End the worker and its child processes."""
    for number, wait in ((signal.SIGTERM, 1.5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
            return
