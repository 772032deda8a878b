"""Simulations in a second process."""

import multiprocessing
import os

from plans import small_workload

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning import ahead
from prfl_fast.planning.ahead import Ahead, second_process
from prfl_fast.planning.simulation import simulate

WORK, FULL = small_workload(sft=False), MemoryConfig("bf16", "full")


def test_results_of_the_second_process_are_those_of_this_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    with second_process() as other:
        other.expect(WORK, FULL, FULL)
        found = other.result(WORK, FULL, FULL)
        assert found is not None and found == simulate(WORK, FULL, FULL)
        assert other.result(WORK, FULL, FULL) is None  # each is taken once
    assert not multiprocessing.active_children()


def test_a_second_process_that_fails_or_stops_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(ahead, "simulate", lambda *given: os._exit(1))
    monkeypatch.setattr(ahead, "_LONGEST", 0.2)
    with second_process() as other:
        other.expect(WORK, FULL, FULL)
        assert other.result(WORK, FULL, FULL) is None
        other.expect(WORK, FULL, FULL)  # is not begun any more
        assert not other._expected


def test_one_processor_gets_no_second_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    with second_process() as other:
        other.expect(WORK, FULL, FULL)
        assert isinstance(other, Ahead) and other.result(WORK, FULL, FULL) is None
