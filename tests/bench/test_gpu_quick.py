"""bench/gpu_quick.py: its journal, its summary, and a dry run in which a case kills its process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_runs import ROOT
from quick.journal import Journal, plain, summary


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "gpu_quick.jsonl")


def test_records_are_read_back_without_a_line_cut_off_by_a_kill(journal):
    assert journal.read() == []
    journal.write("begin", "env", "torch")
    journal.write("result", "env", "torch", rate=float("nan"), sizes=(1, 2.0), path=Path("a"))
    with open(journal.path, "a") as file:
        file.write('{"kind": "resu')
    first, second = journal.read()
    assert (first["kind"], first["stage"], first["case"]) == ("begin", "env", "torch")
    assert second["rate"] == "nan" and second["sizes"] == [1, 2.0] and second["path"] == "a"
    assert second["at_s"] >= first["at_s"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1.23456789, 1.23457),
        (float("inf"), "inf"),
        ({1: (True, None)}, {"1": [True, None]}),
        (Path("a/b"), "a/b"),
    ],
)
def test_plain_values(value, expected):
    assert plain(value) == expected


def test_summary_names_results_failures_and_what_did_not_finish(journal):
    smoke = {"same_bits": True, "worst": "output 0: 1.0"}
    journal.write("result", "env", "torch", version="2.10", seconds=1.0)
    journal.write("result", "smoke", "rms_norm", ok=True, **smoke)
    journal.write("result", "smoke", "bias_gelu", ok=False, **(smoke | {"same_bits": False}))
    journal.write("result", "timing", "rms_norm forward", ms=0.123456, gbs=None)
    journal.write("result", "timing", "stage", seconds=3.0)
    journal.write("failed", "block", "14b", error="Traceback\nRuntimeError: no luck")
    journal.write("skipped", "ncu", "stage", why="needs CUDA and ncu")
    journal.write("begin", "step", "prfl")
    lines = summary(journal.read()).splitlines()
    assert "torch: version 2.10, seconds 1" in lines
    assert "-- smoke: 1 of 2 within 2 x the error of plain PyTorch" in lines
    assert "  WRONG bias_gelu: output 0: 1.0" in lines
    assert "  other bits the second time: bias_gelu" in lines
    head = next(i for i, line in enumerate(lines) if line.startswith("-- timing"))
    assert lines[head].split()[2:] == ["ms"]  # a column without a value is left out
    assert lines[head + 1].split() == ["rms_norm", "forward", "0.123"]
    assert "-- failed: 1" in lines and "  block/14b: RuntimeError: no luck" in lines
    assert "-- skipped: 1" in lines and "  ncu/stage: needs CUDA and ncu" in lines
    assert lines[-1] == "-- not finished: step/prfl"


def run(out, *options, **environment):
    command = [sys.executable, str(ROOT / "bench" / "gpu_quick.py"), "--out", str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    environment.pop("GPU_QUICK_START", None)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=560)


def test_an_unknown_stage_is_refused(tmp_path):
    found = run(tmp_path, "--stages", "env,speed")
    assert found.returncode == 2 and "--stages has speed, expected some of env" in found.stderr


@pytest.mark.slow
def test_a_case_that_kills_its_process_costs_no_other_case(tmp_path):
    # Far more than it takes: stages must not run out of time on a busy machine.
    options = ("--dry", "--device", "cpu", "--minutes", "9", "--stages", "env")
    found = run(tmp_path, *options, GPU_QUICK_TRY="die:env/copy")
    assert found.returncode == 0, found.stderr
    lines = (tmp_path / "gpu_quick.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    ended = {(r["stage"], r["case"]): r for r in records if r["kind"] != "begin"}
    killed = ended["env", "copy"]
    assert killed["kind"] == "failed"
    assert killed["error"] == "its process ended with status -11"
    begun = [(r["stage"], r["case"]) for r in records if r["kind"] == "begin"]
    assert set(begun) <= set(ended) and len(begun) == len(set(begun))  # none was run again
    others = {key: r["kind"] for key, r in ended.items() if key != ("env", "copy")}
    assert others["env", "stage"] in ("result", "skipped")  # importing torch twice can take it all
    assert "result" in [kind for (_, case), kind in others.items() if case != "stage"]
    assert "env/copy: its process ended with status -11" in found.stdout
    assert (tmp_path / "gpu_quick.txt").read_text() in found.stdout
