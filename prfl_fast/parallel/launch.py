"""Join and leave the process group of ``torchrun``, and report a failed job once."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist

from prfl_fast.utils.checks import check
from prfl_fast.utils.interrupts import signals_end_process

# Seconds that a rank waits for another in a forward, backward or reduction.
TIMEOUT = 600.0
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_STORE_SECONDS = 10.0


def under_torchrun() -> bool:
    """Return True if ``torchrun`` started this process as one of several."""
    return all(name in os.environ for name in _VARIABLES) and int(os.environ["WORLD_SIZE"]) > 1


def local_device(kind: str) -> torch.device:
    """Return the device of this rank: the CPU, or the GPU of its number on this machine.

    Raises:
        ValueError: if the machine has fewer GPUs than ranks.
    """
    if kind == "cpu":
        return torch.device("cpu")
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    hint = "Start torchrun with --nproc-per-node of at most the number of GPUs"
    check(local < there, "LOCAL_RANK", local, f"below {there}, the number of GPUs", hint=hint)
    return torch.device("cuda", local)


@contextlib.contextmanager
def join_ranks(device_type: str, timeout: float = TIMEOUT) -> Iterator[torch.device | None]:
    """Join the process group of ``torchrun``; yield this rank's device, None without torchrun.

    The backend is gloo on the CPU; on GPUs NCCL for their tensors, and gloo for those of the host.
    Ranks other than 0 print nothing in this context. An existing process group is used and not
    destroyed.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``.
        timeout: seconds that a rank waits for another before the job ends with an error.

    Raises:
        ValueError: if the machine has fewer GPUs than ranks.
        RuntimeError: if another rank ends or does not answer, as torch raises it.
    """
    if not under_torchrun():
        yield None
        return
    device = local_device(device_type)
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, options["device_id"] = "cpu:gloo,cuda:nccl", device
    joins = not dist.is_initialized()
    if joins:
        with signals_end_process():  # else torchrun waits 30 s before it kills this rank
            dist.init_process_group(backend, **options)
    with contextlib.ExitStack() as stack:
        if dist.get_rank() > 0:
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield device
        # After an error the group stays: its end could wait for ranks that have ended.
        sys.stdout.flush()
        if joins:
            dist.barrier()
            dist.destroy_process_group()


def check_same_settings(sections: Mapping[str, object]) -> None:
    """Raise ``ValueError`` on all ranks if a section differs on one; each rank calls it.

    A rank with other settings would call other collectives, and all ranks would wait forever.

    Args:
        sections: the settings of this rank, whose ``repr`` is compared.
    """
    if not dist.is_initialized():
        return
    own = {name: sha256(repr(value).encode()).digest() for name, value in sections.items()}
    found: list[dict[str, bytes]] = [{}] * dist.get_world_size()
    dist.all_gather_object(found, own)  # on the CPU, where the group has gloo
    usual = max(found, key=found.count)  # the first of the most frequent ones
    others = [str(rank) for rank, each in enumerate(found) if each != usual]
    names = {n for each in found for n in each.keys() | usual if each.get(n) != usual.get(n)}
    if others:
        more = f" and {len(others) - 8} more" if len(others) > 8 else ""
        raise ValueError(
            f"settings of rank {', '.join(others[:8])}{more} differ from those of rank "
            f"{found.index(usual)} in {', '.join(sorted(names))}, expected the same on all ranks. "
            "Start every rank with the same file and version"
        )


def is_lost_rank(error: BaseException) -> bool:
    """Return True if ``error`` reports that another rank has ended or does not answer."""
    if not under_torchrun() or not isinstance(error, RuntimeError):
        return False
    # gloo raises a plain RuntimeError that names its source file.
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def is_first_to_report() -> bool:
    """Return True for the first rank of a job that calls this function, True without torchrun.

    A rank calls it before it prints an error and ends, so that a job prints one error.
    """
    with contextlib.suppress(RuntimeError):  # without a store two errors are better than none
        return not under_torchrun() or int(_store().add(_report_key(), 1)) == 1
    return True


def wait_for_report(seconds: float = 60.0) -> None:
    """Wait until a rank has counted itself as the first to report, at most ``seconds``."""
    with contextlib.suppress(RuntimeError):
        store, key = _store(), _report_key()
        end = time.monotonic() + seconds
        while store.add(key, 0) == 0 and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(0.5)  # that rank prints only after it has counted itself


def _store() -> Any:
    """Return the store of torchrun itself, which lives longer than any rank."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=_STORE_SECONDS)
    return dist.TCPStore(*place, is_master=False, timeout=wait, wait_for_workers=False)


def _report_key() -> str:
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "/".join(["prfl_fast", *(os.environ.get(name, "") for name in names), "reported"])
