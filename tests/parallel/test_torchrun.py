"""``prfl-fast train`` under torchrun, and a job that loses a rank."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from commands import call
from runs import config, log, make_world, write_config

from prfl_fast.parallel import join_ranks, make_mesh, mesh
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.training.checkpoint import list_checkpoints, read_checkpoint
from prfl_fast.utils.interrupts import termination_raised

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


def test_sigterm_ends_a_rank_that_waits_for_another(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**place, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)

    waiting = os.fork()
    if waiting == 0:
        try:
            signal.alarm(20)  # ends a process that ignores SIGTERM
            with termination_raised(), join_ranks("cpu"):
                pass
        finally:
            os._exit(99)
    end = time.monotonic() + 20
    while True:  # until rank 0 waits for rank 1 at its store
        assert time.monotonic() < end
        with socket.socket() as store:
            if store.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(waiting, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == -signal.SIGTERM


def test_sigterm_ends_a_rank_that_forms_a_group(monkeypatch):
    handlers = []

    def formed(*args, **options):
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise RuntimeError("no group")

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "new_group", formed)
    monkeypatch.setattr(mesh, "init_device_mesh", formed)
    whole = SimpleNamespace(mesh=torch.zeros(1, 1, 1), get_coordinate=lambda: (0, 0, 0))
    with termination_raised():
        for form in (lambda: make_mesh(device_type="cpu"), lambda: Ranks(whole)):
            with pytest.raises(RuntimeError, match="no group"):
                form()
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert handlers == [signal.SIG_DFL] * 2
