"""Read batches ahead in worker processes."""

import contextlib
import itertools
import logging
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from prfl_fast.utils.checks import check_count

_log = logging.getLogger("prfl_fast")


class LoadedBatches:
    """Index ``batches`` as before, while worker processes read the next ones ahead.

    ``loaded[n]`` equals ``batches[n]`` bit for bit. Batches are read ahead from n on, so a run
    resumes at any n. If a worker ends, as in a container with little shared memory, the log says so
    and this process reads the batches itself.

    Args:
        batches: a :class:`prfl_fast.data.Batches`, a :class:`prfl_fast.data.DrawnPairs`, or any
            object whose ``batches[n]`` depends on n only and can be pickled.
        workers: number of processes; each reads two batches ahead.
        pin_memory: return tensors in pinned memory, for copies that do not wait.
        stride: number of data ranks, of which this one draws batches n, n + stride, …

    Raises:
        ValueError: if ``workers`` or ``stride`` is not a positive integer.
    """

    def __init__(
        self, batches: Any, workers: int, *, pin_memory: bool = False, stride: int = 1
    ) -> None:
        check_count("workers", workers)
        check_count("stride", stride)
        self.stride = stride
        self.batches, self.workers, self.pin_memory = batches, workers, pin_memory
        self._next = -1
        # At most one. The finalizer keeps the list out of reference cycles: an iterator that is
        # collected in one ends its queues before its workers, and torch waits 5 s for each.
        self._iterators: list[Iterator[Any]] = []
        weakref.finalize(self, self._iterators.clear).atexit = False

    def __getitem__(self, n: int) -> Any:
        """Return batch n; raise ``ValueError`` or ``OSError`` if a sample cannot be read."""
        if not self.workers:
            return self.batches[n]
        if not self._iterators or n != self._next:
            self._iterators.clear()  # ends the workers of the last iterator first
            self._iterators.append(self._start(n))
            self._next = n
        try:
            batch = next(self._iterators[0])
        except RuntimeError as error:  # torch's error for a worker that ended
            _log.warning("%s. Batches are read without workers from now on", str(error).strip())
            self.workers = 0
            self._iterators.clear()
            return self.batches[n]
        self._next += self.stride
        if isinstance(batch, Exception):
            self._iterators.clear()
            try:
                raise batch
            finally:
                del batch  # its traceback holds this frame, and a cycle would end the workers late
        return batch

    def _start(self, n: int) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _Readable(self.batches),
            batch_size=None,  # an item is a batch already
            sampler=_From(n, self.stride),
            num_workers=self.workers,
            collate_fn=_unchanged,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_group,
            # Its seed comes from a generator of its own, as the run's numbers must not change.
            generator=torch.Generator(),
        )
        with _handler_kept(signal.SIGCHLD):
            return iter(loader)


class _Readable(torch.utils.data.Dataset[Any]):
    """Return an error in place of a batch that cannot be read.

    The loader would wrap it into one of several lines.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __getitem__(self, n: int) -> Any:
        try:
            return self.batches[n]
        except (ValueError, OSError) as error:
            return error


class _From(torch.utils.data.Sampler[int]):
    """Yield n, n + stride, n + 2·stride, …"""

    def __init__(self, n: int, stride: int) -> None:
        self.n, self.stride = n, stride

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.n, self.stride)


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_group(worker: int) -> None:
    """Keep the signals of the run's process group from a worker: the run finishes its step."""
    os.setpgrp()


@contextlib.contextmanager
def _handler_kept(number: signal.Signals) -> Iterator[None]:
    """Restore the handler of a signal at the end.

    That of the loader raises an error wherever the run is, as in a step of the optimizer, if a
    worker ends. Without it, the next batch raises.
    """
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if main and before is not None:
            signal.signal(number, before)
