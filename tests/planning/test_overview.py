"""The table of plans: its rows, and the page of docs that shows it."""

import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from prfl_fast.cli.plan_options import HOST_BUDGET
from prfl_fast.planning import overview
from prfl_fast.planning.presets import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
MODEL = "wan2.1-t2v-1.3b"


def committed():
    """Return the rows of the page."""
    text = re.search(r"<!-- plans -->\n(.*?)<!-- end of plans -->", PAGE.read_text(), re.S)[1]
    rows = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
    assert tuple(rows[0]) == overview.HEAD
    return rows[2:]


def made(models, gpus):
    return [*overview.rows({}, models, gpus, HOST_BUDGET, Mock())]


def test_the_page_shows_every_model_and_gpu():
    expected = [(model, gpu) for model in overview.MODELS for gpu in overview.GPUS]
    assert [tuple(row[:2]) for row in committed()] == expected


@pytest.mark.slow
def test_the_page_is_what_the_script_writes():
    assert made(overview.MODELS, overview.GPUS) == committed()


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_those_that_a_model_takes(model):
    for size in overview.SIZES:
        work = overview.sized({"model": model, "sft": False}, size)
        found = (work.frames, work.height, work.width)
        assert all(0.9 * n < m <= n for n, m in zip(size, found, strict=True)) and not work.sft


def test_the_first_size_that_fits(monkeypatch):
    tried = []

    def plan(work, **options):
        tried.append((work.frames, work.height))
        assert options == {"budget": "l40s", "gpu": "l40s", "host_budget": "9GiB"}
        memory = overview.MemoryConfig("nf4", "full", "cpu", 8192, stream_weights=1)
        feasible = len(tried) == 2
        sizes = {"peak": 3 << 30, "reserve": 1 << 30, "host": 5 << 30, "step_seconds": 61.0}
        return Mock(feasible=feasible, memory=memory, reward_memory=memory, **sizes)

    monkeypatch.setattr(overview, "plan_memory", plan)
    policy = "nf4 full offload stream chunks"
    expected = ["l40s", "81 × 720 × 1280", policy, policy, "4 GiB", "5 GiB", "61.0 s"]
    assert overview.row({"model": MODEL}, "l40s", "9GiB") == expected
    assert tried == [(161, 720), (81, 720)]
    monkeypatch.setattr(overview, "plan_memory", lambda *_, **__: Mock(feasible=False))
    assert overview.row({"model": MODEL}, "l40s", "9GiB")[1] == "none of these sizes"
