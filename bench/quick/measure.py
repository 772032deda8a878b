"""Measure times and peaks of a case."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import harness
import torch

from prfl_fast import kernels
from prfl_fast.kernels.attn.backend_choice import get_attention_backend
from prfl_fast.kernels.runtime.registry import get_backend
from quick.worker import Worker


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


@contextlib.contextmanager
def reference() -> Iterator[None]:
    """Run every operation as plain PyTorch."""
    before = get_backend(), get_attention_backend()
    kernels.set_backend("reference")
    kernels.set_attention_backend("plain")
    try:
        yield
    finally:
        kernels.set_backend(before[0])
        kernels.set_attention_backend(before[1])


def peak_gib(worker: Worker, run: Callable[[], Any]) -> float | None:
    """Return the most GiB allocated above the start, by PyTorch's allocator."""
    if not worker.cuda:
        run()
        return None
    return harness.peak_bytes(run, worker.device) / 2**30
