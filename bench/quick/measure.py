"""Check and time the operations of prfl_fast.kernels, and measure times and peaks of any case.

The operations and their sizes are those of the kernels suite.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import harness
import torch
from harness import PRESETS, Preset
from suites import kernel_checks
from suites.kernel_cases import CASES, POOL
from suites.kernel_checks import Case

from quick.worker import Worker

REAL = tuple(
    replace(PRESETS[f"wan{name}"], name=name) for name in ("14b-480p", "1.3b-480p", "14b-720p")
)
TINY = Preset("tiny", 96, 2, 192, 2, (3, 8, 10), 16, 32)
# Most valuable first: a run that is cut short has these.
FIRST = ("bias_gelu", "residual_norm_modulate", "qk_norm_rope", "norm_modulate", "gated_residual")
HALF_ONLY = ("fp8_linear", "rollout_attention")


def sync() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@functools.cache
def cycles_per_second() -> float:
    """Return the rate of torch.cuda._sleep at the clock of a busy GPU."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for cycles in (100_000_000, 20_000_000):  # the first wakes the clocks
        torch.cuda.synchronize()
        events[0].record()
        torch.cuda._sleep(cycles)
        events[1].record()
        torch.cuda.synchronize()
    return 20_000_000 / (events[0].elapsed_time(events[1]) / 1e3)


def timed(
    worker: Worker, thunks: Sequence[Callable[[], Any]], seconds: float = 0.4, most: int = 20
) -> dict[str, Any]:
    """Time functions that do the same work on other inputs; the first call is not counted."""
    thunks = list(thunks)
    begin = time.perf_counter()
    thunks[0]()
    sync()
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    thunks[-1]()
    host = time.perf_counter() - begin
    sync()
    whole = time.perf_counter() - begin
    least = 1 if worker.dry or whole > 1 else 2 if whole > 0.2 else 3
    count = max(least, min(2 if worker.dry else most, int(seconds / max(whole, 1e-5))))
    if not worker.cuda:
        ms = 1e3 * statistics.median(wall(thunks[i % len(thunks)]) for i in range(count))
        record = {"ms": ms, "host_ms": ms, "wall_ms": ms, "exposed": 0}
        return record | {"first_s": first, "runs": count}
    gpu, hosts, exposed, pause = [], [], 0, 1.5 * host + 2e-4
    for i in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(int(min(pause, 0.3) * cycles_per_second()))
        start.record()
        begin = time.perf_counter()
        result = thunks[i % len(thunks)]()
        hosts.append(time.perf_counter() - begin)
        end.record()
        late = start.query()  # the GPU began before the host was through
        torch.cuda.synchronize()
        del result
        exposed += late
        pause = max(pause, 2 * hosts[-1] + 2e-4) if late else pause
        gpu.append(start.elapsed_time(end))
    repeats = 0 if whole > 0.2 else min(3, count)
    walls = [wall(thunks[i % len(thunks)]) for i in range(repeats)] or [whole]
    gpu.sort()
    record = {"ms": statistics.median(gpu), "low_ms": gpu[0], "high_ms": gpu[-1]}
    record |= {"host_ms": 1e3 * statistics.median(hosts), "wall_ms": 1e3 * statistics.median(walls)}
    return record | {"first_s": first, "runs": count, "exposed": exposed}


def wall(thunk: Callable[[], Any]) -> float:
    """Return the seconds of one run, until the GPU is done."""
    sync()
    begin = time.perf_counter()
    thunk()
    sync()
    return time.perf_counter() - begin


def peak_gib(worker: Worker, run: Callable[[], Any]) -> float | None:
    """Return the most GiB allocated above the start, by PyTorch's allocator."""
    if not worker.cuda:
        run()
        return None
    return harness.peak_bytes(run, worker.device) / 2**30


@functools.cache
def operations() -> dict[str, Case]:
    """Return the cases by name, the most valuable first."""
    cases = sorted([*CASES, POOL], key=lambda case: case.name not in FIRST)
    return {case.name.partition(" (")[0]: case for case in cases}


def sizes(worker: Worker) -> tuple[Preset, ...]:
    """Return the sizes that are measured; tiny ones of the same names in a dry run."""
    return tuple(replace(TINY, name=p.name) for p in REAL[:2]) if worker.dry else REAL


def inputs(
    worker: Worker, case: Case, preset: Preset, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    return kernel_checks.draw_inputs(case, preset, worker.device, dtype, seed)


def verify(worker: Worker, case: Case, preset: Preset, dtype: torch.dtype) -> dict[str, Any]:
    """Compare outputs and gradients with float64, beside those of plain PyTorch in the dtype."""
    tensors = inputs(worker, case, preset, dtype)
    found, same = kernel_checks.compare(case, tensors, dtype, 99)
    worst = max(found, key=lambda name: found[name][0] / found[name][2])
    error, _, allowed = found[worst]
    record = {"ok": error <= allowed, "worst": f"{worst} {error:.1e}, allowed {allowed:.1e}"}
    errors = {name: list(values[:2]) for name, values in found.items()}
    return record | {"of_allowed": error / allowed, "same_bits": same, "errors": errors}


def input_sets(worker: Worker, case: Case, preset: Preset, dtype: torch.dtype) -> list[Any]:
    """Draw enough sets of inputs that none is in the L2 cache when its turn comes."""
    sets = [inputs(worker, case, preset, dtype)]
    if worker.cuda:
        count = harness.input_sets(sum(t.nbytes for t in sets[0].values()), worker.device, 8)
        sets += [inputs(worker, case, preset, dtype, seed) for seed in range(1, count)]
    return sets


def time_operation(
    worker: Worker, case: Case, preset: Preset, part: str, run: Any = None, seconds: float = 0.15
) -> dict[str, Any]:
    """Time a forward without gradient, or a backward alone, in bf16 on inputs out of the cache."""
    half = worker.cuda or case.op in HALF_ONLY
    dtype = torch.bfloat16 if half else torch.float32
    sets = input_sets(worker, case, preset, dtype)
    run = run or case.ours

    def forward(tensors: dict[str, Any]) -> Any:
        with torch.no_grad():
            return run(tensors)

    thunks = [functools.partial(forward, t) for t in sets]
    if part == "backward":
        outputs = [kernel_checks.as_tuple(run(t)) for t in sets]
        given = kernel_checks.cotangents(outputs[0], 0)
        backward = functools.partial(kernel_checks.gradients, case, given=given)
        thunks = [functools.partial(backward, *pair) for pair in zip(outputs, sets, strict=True)]
    record = timed(worker, thunks, seconds)
    if case.forward_flops is not None:
        flops = case.forward_flops(preset) * (2.5 if part == "backward" else 1)
        return record | {"tflops": flops / record["ms"] / 1e9}
    moved = kernel_checks.moved_bytes(case, preset, dtype)[part]
    rate, copied = moved / record["ms"] / 1e6, worker.found("env", "copy").get("gbs")
    percent = 100 * rate / copied if copied else None
    return record | {"bytes": moved, "gbs": rate, "percent": percent}


def smoke_cases(dry: bool) -> list[tuple[str, str, Preset, torch.dtype]]:
    """Return (label, operation, size, dtype): bf16 at two widths, an odd length, then float32."""
    ops, found = operations(), []
    for dtype in (torch.bfloat16, torch.float32):
        for base in REAL[:2]:
            # 3000 tokens: a multiple of 8 and not of 16, like the 32760 of 480p, so that Triton
            # compiles the kernels that the timing stage needs.
            preset = replace(TINY, name=base.name) if dry else base.with_grid(5, 20, 30)
            found += [(f"{op}, D {base.dim}, {str(dtype)[6:]}", op, preset, dtype) for op in ops]
        if dtype == torch.bfloat16:
            preset = TINY.with_grid(1, 3, 7) if dry else REAL[1].with_grid(3, 7, 59)
            found += [(f"{op}, odd L, bfloat16", op, preset, dtype) for op in ops]
    return [c for c in found if not (ops[c[1]].op in HALF_ONLY and c[3] == torch.float32)]
