"""Fixtures of the planner's tests."""

from unittest.mock import Mock

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from plans import made_up, made_up_bytes, small_workload  # noqa: E402

from prfl_fast.memory import stream as streaming  # noqa: E402
from prfl_fast.planning import planner  # noqa: E402
from prfl_fast.planning import search as plan_search  # noqa: E402
from prfl_fast.planning.search import Tier, memory_of  # noqa: E402
from prfl_fast.planning.simulation import simulate  # noqa: E402


@pytest.fixture(autouse=True)
def _poison_empty():
    """Leave empty memory as it is: filling it is one operation more, which fake tensors lack."""


@pytest.fixture(autouse=True)
def no_other_slots(monkeypatch):
    """Forget slots of streamed weights: those of an earlier test may be larger."""
    monkeypatch.setattr(streaming, "_slots", {})


@pytest.fixture
def calls(monkeypatch):
    """Replace ``simulate`` by round numbers; return the list of its calls."""
    simulate = Mock(side_effect=made_up)
    monkeypatch.setattr(plan_search, "simulate", simulate)
    monkeypatch.setattr(plan_search, "count_weights", made_up_bytes)
    return simulate.mock_calls


@pytest.fixture(scope="session")
def real():
    """Return a plan of the small model that has to leave the fastest policies out."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan_search, "MODES", plan_search.MODES[::4])
        memory = memory_of(Tier("bf16"), ("none", None), ("none", None), None)
        whole = simulate(small_workload(sft=False), *memory)
        budget = plan_search.CONTEXT + int(0.8 * whole.peak)
        return planner.plan_memory(small_workload(sft=False), budget=budget, gpu="h100")
