"""Run simulations that a search will probably need in a second process."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.pool import AsyncResult, Pool
from typing import Any

import torch

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.trace import Simulation
from prfl_fast.planning.workload import Workload

# A simulation takes seconds. After this time the second process is taken for dead.
_LONGEST = 120.0


class Ahead:
    """Hold simulations that run in a second process, none without one."""

    def __init__(self, pool: Pool | None = None) -> None:
        self._pool = pool
        self._expected: dict[str, AsyncResult[Simulation]] = {}

    def expect(self, workload: Workload, *memory: MemoryConfig) -> None:
        """Begin a simulation in the second process, if there is one."""
        key = repr((workload, memory))
        if self._pool is not None and key not in self._expected:
            self._expected[key] = self._pool.apply_async(simulate, (workload, *memory))

    def result(self, workload: Workload, *memory: MemoryConfig) -> Simulation | None:
        """Return the result of a simulation that was begun, or None."""
        begun = self._expected.pop(repr((workload, memory)), None)
        if begun is not None:
            # What goes wrong there is raised again by the caller's own simulation, or does not
            # matter.
            with contextlib.suppress(Exception):
                return begun.get(_LONGEST)
            self._pool = None
            self._expected.clear()
        return None


def _leave_signals() -> None:
    # Ctrl-C reaches both processes. The first one ends the second.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def second_process(allowed: bool = True) -> Iterator[Ahead]:
    """Yield an :class:`Ahead` with a second process where another processor is free.

    The process is a fork, which has all imports. It begins nothing where CUDA runs, because a fork
    cannot use it.
    """
    found: Any = getattr(os, "sched_getaffinity", lambda process: ())(0)
    fork = "fork" in multiprocessing.get_all_start_methods()
    if not (allowed and fork and len(found) > 1) or torch.cuda.is_initialized():
        yield Ahead()
        return
    with multiprocessing.get_context("fork").Pool(1, _leave_signals) as pool:  # ends by terminate()
        yield Ahead(pool)
