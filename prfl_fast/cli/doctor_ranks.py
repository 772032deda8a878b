"""Check the ranks of torchrun: devices by machine, backend, and the rates of two collectives."""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from prfl_fast.cli.tables import print_table

# Bytes of each rank's tensor. On GPUs enough for a link's full rate: at 14B, 720p and 8 GPUs a rank
# has 97 MB of q, k or v.
BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}
REPEATS = 5


def report_ranks(device: torch.device) -> dict[str, Any]:
    """Return backend, devices and rates of all ranks as plain values; all ranks call it.

    A rate is the bytes that a rank receives from the others, per second of the slowest rank.
    """
    own = {"host": platform.node(), "device": _name(device)}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    version = torch.cuda.nccl.version() if device.type == "cuda" else ()
    ranks = dist.get_world_size()
    count = BYTES[device.type] // 4 // ranks * ranks
    given = torch.full((count,), float(dist.get_rank()), device=device)
    parts, whole = torch.empty_like(given), given.new_empty(ranks * (count // ranks))
    part = given[: count // ranks]
    received = (ranks - 1) * part.nbytes
    rates = {
        "all_to_all": _rate(lambda: dist.all_to_all_single(parts, given), received, device),
        "all_gather": _rate(lambda: dist.all_gather_into_tensor(whole, part), received, device),
    }
    expected = torch.arange(ranks, device=device).repeat_interleave(count // ranks)
    right = {"all_to_all": parts, "all_gather": whole}
    wrong = [name for name, found in right.items() if not torch.equal(found, expected.float())]
    gathered: list[Any] = [None] * ranks
    dist.all_gather_object(gathered, wrong)
    return {
        "backend": dist.get_backend_config(),
        "nccl": ".".join(map(str, version)) or None,
        "ranks": every,
        "received_bytes": received,
        "bytes_per_second": rates,
        "wrong_results": sorted({name for names in gathered for name in names}),
    }


def _name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return f"{device}, {torch.cuda.get_device_name(device)}"


def _rate(call: Callable[[], object], received: int, device: torch.device) -> float:
    """Return bytes per second of the fastest of some calls, on the slowest rank."""
    best = float("inf")
    for _ in range(1 + REPEATS):  # the first one connects the ranks
        dist.barrier()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = torch.tensor(time.perf_counter() - began, device=device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        best = min(best, seconds.item())
    return received / best


def print_ranks(found: dict[str, Any]) -> None:
    """Print the report of :func:`report_ranks`."""
    nccl = f", NCCL {found['nccl']}" if found["nccl"] else ""
    print(f"process group: {len(found['ranks'])} ranks, backend {found['backend']}{nccl}")
    rows = [(str(n), each["host"], each["device"]) for n, each in enumerate(found["ranks"])]
    print_table(rows, ("rank", "host", "device"))
    size = f"{found['received_bytes'] / 1e6:.1f} MB received per rank"
    for name, rate in found["bytes_per_second"].items():
        verdict = "WRONG RESULT" if name in found["wrong_results"] else "right result"
        print(f"{name}: {rate / 1e9:.2f} GB/s measured here, {size}, {verdict}")
