"""A rank is killed at random moments: the others end, and the run goes on from whole files."""

import importlib
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from rank_training import full, objectives
from ranks import join_group, run_ranks

from prfl_fast.parallel import ParallelConfig, make_mesh, shard
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.checkpoint import list_checkpoints, read_checkpoint

RANKS, STEPS = 2, 5
# Rank that dies, the function in which it does, and the call of it. Each run goes on from the one
# before it.
MOMENTS = [
    (1, "prfl_fast.rollout.trajectory.Trajectory.run", 2),
    (0, "prfl_fast.training.trainer.load_checkpoint", 1),
    (1, "torch.autograd.backward", 2),
    (0, "prfl_fast.training.checkpoint.plan_parts", 1),
    (1, "prfl_fast.training.checkpoint.plan_parts", 1),
    (1, "prfl_fast.training.trainer.load_checkpoint", 1),
]


def run(folder, parallel, steps, ready=None):
    """Train a tiny Wan with PRFL and SFT in turn, and save every step."""
    mesh = make_mesh(parallel) if dist.is_initialized() else None
    model = full()
    if mesh is not None and parallel.shard != 1:
        shard(model, mesh)
    config = TrainConfig(steps, learning_rate=1e-3, save_every=1)
    trainer = Trainer(model, objectives(model), config, folder=folder, mesh=mesh)
    if ready is not None:
        ready.touch()
    return trainer.run().step


def die_in(name, call, delay):
    """Kill this process some seconds after a function is called for the ``call``-th time."""
    parent, _, last = name.rpartition(".")
    owner, _, inner = parent.rpartition(".")
    place = getattr(importlib.import_module(owner), inner) if inner[0].isupper() else None
    place = place or importlib.import_module(parent)
    function, calls = getattr(place, last), []

    def dying(*args, **options):
        calls.append(None)
        if len(calls) == call:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return function(*args, **options)

    setattr(place, last, dying)


def child(rank, store, folder, parallel, death=None):
    code = 1
    try:
        join_group(rank, RANKS, store)
        if death is not None and death[0] == rank:
            die_in(*death[1:])
        run(folder, parallel, STEPS, Path(f"{store}.{rank}"))
        code = 0
    finally:
        os._exit(code)


def start(folder, parallel, store="store", death=None):
    context = multiprocessing.get_context("fork")
    given = [(rank, f"{folder}.{store}", folder, parallel, death) for rank in range(RANKS)]
    started = [context.Process(target=child, args=each, daemon=True) for each in given]
    for process in started:
        process.start()
    return started


def kill_at(folder, parallel, delay, victim):
    """Kill a rank after some seconds; return how many the others needed to end."""
    processes = start(folder, parallel)
    # While groups are formed, only torchrun knows of a death.
    while not all(Path(f"{folder}.store.{rank}").exists() for rank in range(RANKS)):
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(processes[victim].pid, signal.SIGKILL)
    begun = time.monotonic()
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "a rank waits for the one that was killed"
    return time.monotonic() - begun


def check_and_resume(folder, parallel, ranks):
    """Every checkpoint is whole, and the run ends on another number of ranks."""
    found = list_checkpoints(folder) if folder.is_dir() else []
    assert all(read_checkpoint(path)["step"] == step for step, path in found)
    if ranks == 1:
        assert run(folder, parallel, STEPS) == STEPS
    else:
        assert run_ranks(ranks, lambda: run(folder, parallel, STEPS)) == [STEPS] * ranks
    assert list_checkpoints(folder)[-1][0] == STEPS
    return len(found)


def kills(tmp_path, parallel, count, seed):
    draw = random.Random(seed)
    run(tmp_path / "one", parallel, 1)  # forked processes have its imports
    begun = time.monotonic()
    for process in start(tmp_path / "whole", parallel):
        process.join(120)
    seconds = time.monotonic() - begun
    results = []
    for number in range(count):
        folder = tmp_path / f"run{number}"
        waited = kill_at(folder, parallel, draw.uniform(0, seconds), draw.randrange(RANKS))
        ranks = draw.choice((1, 2, 4))
        results.append((round(waited, 2), check_and_resume(folder, parallel, ranks), ranks))
    print("seconds until the others ended, checkpoints found, ranks that resumed:", results)


def test_a_moment(tmp_path):
    kills(tmp_path, ParallelConfig(shard=1), 1, seed=0)


@pytest.mark.slow
def test_twenty_moments(tmp_path):
    kills(tmp_path, ParallelConfig(shard=1), 20, seed=1)


@pytest.mark.slow
def test_a_rank_dies_in_load_rollout_backward_and_save(tmp_path):
    draw, parallel, folder = random.Random(2), ParallelConfig(), tmp_path / "run"
    run(tmp_path / "one", parallel, 1)  # forked processes have its imports
    found = []
    for number, (victim, function, call) in enumerate(MOMENTS):
        death = (victim, function, call, draw.uniform(0, 0.05))
        processes = start(folder, parallel, f"store{number}", death)
        for process in processes:
            process.join(120)
            assert process.exitcode is not None, "a rank waits for the one that was killed"
        assert processes[victim].exitcode == -signal.SIGKILL, f"{function} was not called"
        checkpoints = list_checkpoints(folder) if folder.is_dir() else []
        assert all(read_checkpoint(path)["step"] == step for step, path in checkpoints)
        found.append([step for step, _ in checkpoints])
    print("checkpoints after each death:", found)
    check_and_resume(folder, parallel, 4)
