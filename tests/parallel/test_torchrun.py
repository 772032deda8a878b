"""``prfl-fast train`` under torchrun, and a job that loses a rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import call
from runs import config, log, make_world, write_config

from prfl_fast.training.checkpoint import list_checkpoints, read_checkpoint

CHANGES = {"parallel": {"shard": 1}, "run.save_every": 1, "run.steps": 40, "run.keep_last": 2}


def start(path, port):
    """Start the command on two ranks."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*run, "--master-port", str(port), "-m", "prfl_fast.cli", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_with_one_line(tmp_path):
    root = make_world(tmp_path / "world")
    out = tmp_path / "out"
    path = write_config(tmp_path / "train.yaml", config("train", root, out, CHANGES))
    job = start(path, 29617)
    end = time.monotonic() + 240
    while not (out / "step-00000002").exists():
        assert job.poll() is None and time.monotonic() < end, job.communicate()
        time.sleep(0.05)
    os.kill(children(job.pid)[1], signal.SIGKILL)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    ours = [line for line in errors.splitlines() if line.startswith("prfl-fast train: ")]
    assert len(ours) == 1 and "another process of this job has ended" in ours[0], errors
    assert errors.count("Traceback") == 1  # torchrun's own
    found = list_checkpoints(out)
    assert found and all(read_checkpoint(p)["step"] == step for step, p in found)
    last = found[-1][0]
    assert call("train", root, out, {**CHANGES, "run.steps": last + 1}) == 0  # in one process
    assert [record["step"] for record in log(out)] == list(range(1, last + 2))
