"""Run a function on several ranks: forked processes with a gloo process group."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist


def join_group(rank, world, store):
    """Join a gloo process group whose ranks meet in the file ``store``."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=120)}
    dist.init_process_group("gloo", init_method=f"file://{store}", **options)


def _child(function, rank, world, store, pipe, args):
    try:
        join_group(rank, world, store)
        result = function(*args)
        # Not as a tensor, whose memory a process that ends takes with it.
        pipe.send_bytes(pickle.dumps((True, result)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - sent to the test
        pipe.send_bytes(pickle.dumps((False, f"rank {rank}: {traceback.format_exc()}")))
    os._exit(0)


def run_ranks(world, function, *args):
    """Return ``function(*args)`` of each of ``world`` ranks; results must be picklable.

    Forked processes start at once, because torch and diffusers are imported already.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            given = (function, rank, world, f"{folder}/store", theirs, args)
            child = context.Process(target=_child, args=given, daemon=True)
            child.start()
            children.append((child, ours))
        try:
            results = []
            for rank, (_, pipe) in enumerate(children):
                assert pipe.poll(180), f"rank {rank} of {world} gave no result in 180 s"
                ok, result = pickle.loads(pipe.recv_bytes())
                assert ok, result
                results.append(result)
            return results
        finally:
            for child, _ in children:
                child.join(10)
                child.kill()
