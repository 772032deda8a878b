"""Compare the host's time in a model's blocks with the device's."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Host time over device time from which blocks are compiled. A device that waits for each launch
# ends right after the host, at a ratio of almost 1.
WAITING = 0.9


def _event(device: torch.device | None) -> Any:
    # The current device need not be that of the model.
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class BlockTimer:
    """Compare the host's time with the device's in the second pass through a model's blocks.

    The first pass is not timed, because kernels compile in it. ``event`` records a mark on the
    device of the block's inputs, ``clock`` returns seconds of the host.
    """

    def __init__(
        self,
        event: Callable[[torch.device | None], Any] = _event,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._event, self._clock = event, clock
        self._next, self._passes = 0, 0  # block of this pass, passes that have ended
        self._start: Any = None
        self._end: Any = None
        self._begin = 0.0
        self.host = 0.0  # seconds

    def __call__(
        self, index: int, count: int, run: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Return ``run(...)``, the call of block ``index`` of ``count``."""
        if self._passes == 2:
            return run(*args, **kwargs)
        inputs = (t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        device = next((t.device for t in inputs), None)
        if index == 0:
            self._next = 0
            if self._passes == 1:
                self._start, self._begin = self._event(device), self._clock()
        out = run(*args, **kwargs)
        self._next = self._next + 1 if index == self._next else count + 1  # a pass has all blocks
        if self._next == count:
            self._passes += 1
            if self._passes == 2:
                self.host, self._end = self._clock() - self._begin, self._event(device)
        return out

    def ratio(self) -> float | None:
        """Return host time over device time; None before the second pass has ended."""
        if self._end is None:
            return None
        self._end.synchronize()
        return 1e3 * self.host / max(self._start.elapsed_time(self._end), 1e-6)


def describe_ratio(ratio: float) -> str:
    """Return a ratio of host time to device time in words."""
    return f"the host takes {100 * ratio:.0f} % of the GPU's time in them"


class TimedCall:
    """Call block ``index`` of ``blocks`` in place of its class, and time the call.

    ``decide`` is called before the first block. It returns True once it has replaced the calls of
    all blocks.
    """

    def __init__(
        self, timer: BlockTimer, decide: Callable[[], bool], blocks: Sequence[Any], index: int
    ) -> None:
        self.timer, self.decide, self.blocks, self.index = timer, decide, blocks, index

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.blocks[self.index]
        if self.index == 0 and self.decide():
            return block(*args, **kwargs)
        return self.timer(self.index, len(self.blocks), block._call_impl, *args, **kwargs)
