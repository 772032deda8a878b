"""Run ``prfl-fast`` commands in forked children that tests kill at a chosen place.

Each job is a line of JSON, ``{"arguments", "output", "place", "count", "here"}``. For each, a
forked child reports ``pid <n>``, ``paused`` at the ``count``-th time it reaches the place, and
``exit <status>``. Forking saves the import of torch. A job with ``"here"`` runs in the server and
fills the caches of later children; with one thread, no thread pool is forked.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import safetensors.torch
import torch
from diffusers import WanTransformer3DModel  # noqa: F401 - imported once for all children

from prfl_fast.cli.main import main
from prfl_fast.rollout.engine import RolloutSession
from prfl_fast.rollout.trajectory import Trajectory

REPORT = None  # the file descriptor of the server's reports


def report(text):
    os.write(REPORT, f"{text}\n".encode())


def pause():
    report("paused")
    time.sleep(600)


def wait_for_a_signal():
    """Pause until the trainer has received SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    report("paused")
    while signal.getsignal(signal.SIGTERM) is handler:
        time.sleep(0.01)


def at(owners, name, count, *, only=lambda *a, **k: True, before=None, after=None, how=pause):
    """Pause before or after the ``count``-th accepted call of ``name`` of any owner."""
    calls = 0

    def patch(owner):
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            nonlocal calls
            here = only(*args, **kwargs)
            calls += here
            reached = here and calls == count
            if reached and before is not None:
                before(*args, **kwargs)
                how()
            result = original(*args, **kwargs)
            if reached and after is not None:
                after(*args, **kwargs)
                how()
            return result

        setattr(owner, name, patched)

    for owner in owners if isinstance(owners, tuple) else (owners,):
        patch(owner)


def nothing(*_, **__):
    pass


def halve(_, path, **__):
    os.truncate(path, os.path.getsize(path) // 2)


def remove_one_file(path, **__):
    next(p for p in Path(path).rglob("*") if p.is_file()).unlink()


def to_checkpoint(_, target):
    return Path(target).name.startswith("step-") and ".tmp-" not in Path(target).name


PLACES = {
    "a forward": lambda n: at((RolloutSession, Trajectory), "velocity", n, after=nothing),
    "a signal": lambda n: at(torch.optim.AdamW, "step", n, after=nothing, how=wait_for_a_signal),
    "two optimizer steps": lambda n: at(torch.optim.AdamW, "step", n, after=nothing),
    "a weights file": lambda n: at(safetensors.torch, "save_file", n, after=halve),
    "a state file": lambda n: at(torch, "save", n, after=halve),
    "the rename": lambda n: at(os, "replace", n, only=to_checkpoint, before=nothing),
    "the pruning": lambda n: at(
        shutil, "rmtree", n, only=lambda p, **_: "step-" in Path(p).name, before=remove_one_file
    ),
    "the rewriting of the log": lambda n: at(
        os, "replace", n, only=lambda _, t: Path(t).name == "log.jsonl", before=nothing
    ),
}


def child(job):
    log = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job.get("place"):
        PLACES[job["place"]](job["count"])
    return main(job["arguments"])


def serve(jobs, reports):
    """Run the jobs of an open file, and report to a file descriptor."""
    global REPORT
    REPORT = reports
    torch.set_num_threads(1)
    for line in jobs:
        job = json.loads(line)
        if job["here"]:
            report(f"exit {child(job)}")
            continue
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = child(job)
            finally:
                os._exit(code)
        report(f"pid {pid}")
        report(f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
