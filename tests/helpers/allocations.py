"""Memory that PyTorch's CPU allocator hands out while a function runs."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocator_peak(work: Callable[[], object]) -> int:
    """Return the peak of live bytes that ``work()`` allocates, by the allocator's own reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler reports no allocation"
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
