"""Contexts of the benchmark's suites on a tiny model, and runs of its command."""

import json
from dataclasses import replace
from pathlib import Path

import harness
import run as bench_run
import torch
from harness import Preset

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Preset("small", 32, 2, 64, 4, (3, 4, 4), text_tokens=5, text_dim=16)
TINY = replace(SMALL, name="tiny")


def make_context(preset=TINY, **changes):
    return harness.Context(**({"device": CPU, "preset": preset} | changes))


def run_suites(folder, *names):
    """Run suites on the CPU and return the exit code and the records of the whole run."""
    status = bench_run.main(["--suite", *names, "--device", "cpu", "--out", str(folder)])
    return status, json.loads((folder / "results.json").read_text())


def assert_rectangular(*tables):
    for table in tables:
        assert all(len(row) == len(table.columns) for row in table.rows)
