"""The suite of host times: calls of a block beside the unpatched one's, of solver steps; widths."""

from functools import partial

import pytest
import torch
from bench_runs import make_context
from suites import host
from suites.floors import FLOORS
from suites.kernel_cases import CASES
from suites.kernel_checks import draw_inputs, results


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
    for gradient, limit in ((False, 400), (True, 1150)):  # 1795 and 3663 through the dispatcher
        calls = [host.count_calls(partial(work, gradient)) for work in works.values()]
        assert 0 < calls[0] and 0 < calls[1] < limit


@pytest.mark.parametrize("name", FLOORS)
def test_a_floor_computes_what_the_operation_does(name):
    (case,) = (case for case in CASES if case.name == name)
    tensors = draw_inputs(case, host.TINY, host.CPU, torch.float32)
    expected, given = results(case, tensors, case.ours, 1)
    found, _ = results(case, tensors, FLOORS[name], given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(list(r["times"]) == ["eager", "prfl_fast", "floor"] for r in host.operation(case))


@pytest.mark.slow
def test_a_block_and_a_step_by_width_and_dtype(monkeypatch, one_round):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(host, "WIDTHS", (32,))
    monkeypatch.setattr(host, "SECONDS_BY_WIDTH", 0.1)
    records, problems = host.by_width(make_context(baselines=("eager",)))
    assert problems == []
    found = [(r["case"], r["dim"], r["dtype"]) for r in records]
    cases, dtypes = ("block", "PRFL step"), ("float32", "bfloat16")
    assert found == [(case, 32, dtype) for dtype in dtypes for case in cases]
    rows = host._width_rows(records)
    assert len(rows) == 6 and all(row[4] == row[6] == "–" for row in rows), "nothing was compiled"
