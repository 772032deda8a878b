"""Run the stages ncu and memcheck, and the probes that they start in other processes."""

import argparse
import gc
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Preset, UnavailableError
from suites.kernel_checks import Case, as_tuple, gradients, results

from quick import device_stages, model_stages
from quick.device_stages import tool_path
from quick.journal import Journal
from quick.measure import REAL, inputs, operations, sizes, smoke_cases, sync
from quick.supervisor import SCRIPT, STAGES
from quick.worker import Late, Worker, tail

SECTIONS = "SpeedOfLight MemoryWorkloadAnalysis SchedulerStats WarpStateStats LaunchStats Occupancy"
FIGURE = re.compile(
    r"(Duration|DRAM Throughput|Memory Throughput|Compute \(SM\) Throughput|Achieved Occupancy"
    r"|No Eligible|Registers Per Thread)\s+(\S+)\s+([\d.,]+)"
)
DEFAULT_PROFILE = ["bias_gelu backward, 14b-480p", "query_pool forward, 14b-480p"]


def run_tool(
    worker: Worker, file: str, command: list[str], **environment: str
) -> tuple[dict[str, Any], str]:
    """Run a profiler on this program and return a record and its text, even if it is stopped."""
    begin, path = time.perf_counter(), worker.out / file
    environment = os.environ | environment
    with open(path, "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            status: Any = process.wait(max(1.0, worker.left() - 2))
        except (subprocess.TimeoutExpired, Late):
            process.terminate()
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                process.kill()
            status = "cut off by the stage's time"
    text = path.read_text(errors="replace")
    return {"seconds": time.perf_counter() - begin, "status": status}, text


def stage_ncu(worker: Worker) -> None:
    """Read counters of the kernels that are furthest from the ceiling."""
    ncu = tool_path("ncu")
    if not worker.cuda or not ncu:
        raise UnavailableError("needs CUDA and ncu")
    timing = [r for r in worker.done.values() if r["stage"] == "timing"]
    slow = sorted((r["percent"], r["case"]) for r in timing if isinstance(r.get("percent"), float))
    # Not the largest size: each pass of the profiler saves and restores what the kernel writes.
    chosen = [name for _, name in slow if "flow_" not in name and "720p" not in name][:6]
    chosen = chosen or DEFAULT_PROFILE
    command = [ncu, "--clock-control", "none", "--profile-from-start", "off"]
    command += ["--launch-count", "16", "--page", "details"]
    command += [word for name in SECTIONS.split() for word in ("--section", name)]
    command += [sys.executable, SCRIPT, "--device", "cuda", *["--dry"] * worker.dry]
    command += ["--probe", "profile:" + ";".join(chosen)]

    def run() -> dict[str, Any]:
        record, text = run_tool(worker, "ncu.txt", command)
        if "==ERROR==" in text and "Section:" not in text:
            raise RuntimeError(text[-600:])
        heads = re.findall(r"^ {2}(\S[^\n]*Context \d+[^\n]*)$", text, re.M)
        figures = [list(found) for found in FIGURE.findall(text)][:220]
        return record | {"asked": chosen, "kernels": [h[:160] for h in heads], "figures": figures}

    worker.case("six kernels", run, need=15)


def stage_memcheck(worker: Worker) -> None:
    """Run every operation once on tiny odd shapes under memcheck."""
    sanitizer = tool_path("compute-sanitizer")
    if not worker.cuda or not sanitizer:
        raise UnavailableError("needs CUDA and compute-sanitizer")
    command = [sanitizer, "--tool", "memcheck", "--print-limit", "20"]
    command += ["--kernel-name-exclude", "kernel_substring=2at6native"]
    command += [sys.executable, SCRIPT, "--device", "cuda", "--probe", "tiny:"]

    def run() -> dict[str, Any]:
        # PyTorch's allocator packs small tensors, where an overrun would not be seen.
        record, text = run_tool(worker, "memcheck.txt", command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summed = re.findall(r"ERROR SUMMARY: (\d+)", text)
        done = re.findall(r"^probe (.+) done$", text, re.M)
        errors = int(summed[-1]) if summed else None
        return record | {"errors": errors, "done": done, "end": text[-800:]}

    worker.case("every operation, tiny", run, need=10)


_DEFINED = vars(device_stages) | vars(model_stages) | globals()
STAGE_FUNCTIONS = {name: _DEFINED[f"stage_{name}"] for name in STAGES}


def attempt(name: str, run: Callable[[], Any]) -> None:
    """Run a probe and print one line about it for the process that reads this output."""
    try:
        run()
        sync()
        print(f"probe {name} done", flush=True)
    except Exception:
        print(f"probe {name} failed: {tail()}", flush=True)


def profile(worker: Worker, case: Case, preset: Preset, part: str) -> None:
    """Run a pass twice, the second time within the profiler's range."""
    tensors = inputs(worker, case, preset, torch.bfloat16)
    for profiled in (False, True):
        outputs = as_tuple(case.ours(tensors)) if part == "backward" else ()
        given = [torch.randn_like(o) for o in outputs]
        sync()
        if profiled and worker.cuda:
            torch.cuda.profiler.start()
        if part == "backward":
            gradients(case, outputs, tensors, given)
        else:
            with torch.no_grad():
                case.ours(tensors)
        sync()
        if profiled and worker.cuda:
            torch.cuda.profiler.stop()


def probe(options: argparse.Namespace) -> None:
    """Run the probe that another process requested: warm:I:N, profile:CASE;CASE…, tiny:, plan:"""
    kind, _, rest = options.probe.partition(":")
    worker = Worker(Journal(Path(os.devnull)), {}, options.device, options.dry)
    ops = operations()

    def once(op: str, preset: Preset, dtype: torch.dtype) -> None:
        results(ops[op], inputs(worker, ops[op], preset, dtype), ops[op].ours, 99)

    if kind == "warm":
        index, count = map(int, rest.split(":"))
        for label, op, preset, dtype in smoke_cases(options.dry)[index::count]:
            attempt(label, partial(once, op, preset, dtype))
    elif kind == "tiny":
        for op in ops:
            attempt(op, partial(once, op, REAL[1].with_grid(1, 3, 7), torch.bfloat16))
    elif kind == "plan":
        worker = Worker(Journal(Path(options.out) / "gpu_quick.jsonl"), {}, "cpu", options.dry)
        worker.stage, worker.end = "plan", time.time() + 300
        worker.case("planner", partial(model_stages.make_plan, worker))
    elif kind == "profile":
        for label in rest.split(";"):
            name, part, where = re.fullmatch(r"(.+) (forward|backward), (.+)", label).groups()
            preset = next(p for p in sizes(worker) if p.name == where)
            attempt(label, partial(profile, worker, ops[name], preset, part))
            gc.collect()


def follow_parent() -> None:
    """End this process when its parent is gone, so that nothing is left running."""
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()
