"""Memory that PyTorch's CPU allocator hands out while a function runs."""

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

CPU_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"  # and its backward


def allocator_peak(work: Callable[[], object]) -> int:
    """Return the peak of live bytes that ``work()`` allocates, by the allocator's own reports.

    Buffers inside PyTorch's attention for CPUs do not count: kernels for GPUs have others.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    assert sizes, "the profiler reports no allocation"
    attention = [e for e in events if e.name().startswith(CPU_ATTENTION)]
    inside = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in attention]
    return max(itertools.accumulate(without_buffers(sizes, inside)))


def without_buffers(sizes: list[tuple[int, int]], inside: list[tuple[int, int]]) -> list[int]:
    """Return allocations and frees, by ``(time, bytes)``, except those within one interval."""
    kept: list[int] = []
    within = [next((i for i, (a, b) in enumerate(inside) if a <= t <= b), None) for t, _ in sizes]
    for _, group in itertools.groupby(zip(within, sizes, strict=True), key=lambda item: item[0]):
        entries = list(group)
        found = [size for _, (_, size) in entries]
        if entries[0][0] is not None:
            for size in [size for size in found if size < 0]:
                if -size in found:
                    found.remove(-size)
                    found.remove(size)
        kept += found
    return kept
