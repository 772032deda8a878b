"""The suite of host times: calls of a block beside the unpatched one's, and of solver steps."""

from functools import partial

import pytest
from bench_runs import make_context
from suites import host


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(host, "SECONDS", 0.0)
    monkeypatch.setattr(host, "ROUNDS", 3)


def test_a_solver_step_makes_as_many_calls_in_a_long_schedule():
    for record in host.solver():
        calls = record["calls"]
        assert 0 < calls["1000"] <= 1.1 * calls["40"], record["case"]


def test_a_patched_block_makes_few_calls():
    pytest.importorskip("diffusers")
    works = host._block(make_context(), "alone")
    for gradient, limit in ((False, 1000), (True, 2300)):  # 1795 and 3663 through the dispatcher
        calls = [host.count_calls(partial(work, gradient)) for work in works.values()]
        assert 0 < calls[0] and 0 < calls[1] < limit
