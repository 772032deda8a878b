"""Fixtures of the benchmark's tests: minimal sizes, all work in this process."""

from contextlib import contextmanager
from dataclasses import replace

import harness
import pytest
from bench_runs import TINY


@pytest.fixture
def one_round(monkeypatch):
    """Stop timing after one round."""
    rounds = harness.time_side_by_side
    monkeypatch.setattr(
        harness, "time_side_by_side", lambda *a, **k: rounds(*a, **{**k, "at_most": 1})
    )


@pytest.fixture
def inline(monkeypatch, one_round):
    """Run all work in this process, with one round of timing."""
    from experiments import small_world

    @contextmanager
    def workers(context):
        yield small_world.Inline()

    monkeypatch.setattr(small_world, "workers", workers)


@pytest.fixture
def tiny(monkeypatch):
    """Shrink the suites rollout, methods and step to minimal sizes."""
    from experiments import rollout_options
    from suites import gradient_point, methods, rollout, rollout_counts, split, step

    size = replace(TINY, layers=2)
    for module in (rollout_options, methods, step):
        monkeypatch.setattr(module, "TINY", size)
    for module in (rollout, rollout_options):
        monkeypatch.setattr(module, "SOLVER_STEPS", 4)
        monkeypatch.setattr(module, "MANY", (2,))
    monkeypatch.setattr(rollout, "SHOWN", (2, 4))
    wanted = ("no engine", "caches", "FP8 both", "every second step", "LoRA merged")
    shown = {n: o for n, o in rollout_options.OPTIONS.items() if n in wanted or o.cuda}
    shown = {n: replace(o, against="no engine", lora=False) for n, o in shown.items()}
    monkeypatch.setattr(rollout_options, "OPTIONS", shown)
    for module in (split, gradient_point):
        monkeypatch.setattr(module, "SIZES", ("wan1.3b-480p",))
    monkeypatch.setattr(rollout, "PRESETS", {"wan1.3b-480p": size})
    few = {name: rollout_counts.OPTIONS[name] for name in ("unpatched", "FP8 both")}
    monkeypatch.setattr(rollout_counts, "OPTIONS", few)
    monkeypatch.setattr(split, "WAYS", split.WAYS[1:2])
    return size
