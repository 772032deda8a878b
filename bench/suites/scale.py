"""Count bytes, communication and work of a rank on 1 to 64 GPUs, on fake tensors.

A rank's part of a PRFL step runs under a fake process group at the real sizes, with FSDP2 and the
exchange of heads and tokens as they are. Nothing is sent, and nothing here is measured on a GPU.
"""

import contextlib
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import report
import torch
from harness import Context, SuiteResult, Table

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.parallel import ParallelConfig, distribution
from prfl_fast.planning import Workload
from prfl_fast.planning.gpu_specs import find_gpu
from prfl_fast.planning.search import flops_in_step, received_in_step, step_seconds
from prfl_fast.planning.simulation import simulate
from prfl_fast.utils.quiet import quiet_libraries

MODEL, GPU = "wan2.1-t2v-14b", "h200"
RANKS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCE = 8  # ranks of a machine, the most that share a sample
REFERENCE = ParallelConfig(shard=8, sequence=4)  # the layout of HY-Video-PRFL's launch line
BF16, FP32 = MemoryConfig("bf16", "full"), MemoryConfig("fp32", "full")
KINDS = {"gathered_bytes": "weights", "reduced_bytes": "gradients", "exchanged_bytes": "attention"}


@dataclass(frozen=True)
class Case:
    """Hold a run: what trains, its ranks, their layout, the weights' dtype.

    Attributes:
        features: the pool gathers all features and projects keys and values, as the reference does.
    """

    train: str
    ranks: int
    parallel: ParallelConfig
    memory: MemoryConfig = BF16
    features: bool = False

    def workload(self) -> Workload:
        """Return the workload at 720p, with the supervised step that PRFL alternates with."""
        return Workload(
            MODEL,
            train=self.train,
            ranks=self.ranks,
            parallel=self.parallel,  # type: ignore[arg-type]
        )


def layout(ranks: int) -> ParallelConfig:
    """Return the layout of a run: weights over all ranks, a sample over those of one machine."""
    # No more than a machine's 8 ranks to a sample: 40 heads have no 16 equal parts.
    return ParallelConfig(shard=ranks, sequence=min(ranks, SEQUENCE), keep_gathered=False)


def cases() -> dict[str, Case]:
    """Return label → case."""
    plain, kept = (replace(REFERENCE, keep_gathered=keep) for keep in (False, True))
    found = {
        "the reference's way: fp32 weights, features gathered": Case(
            "full", 8, plain, FP32, features=True
        ),
        "bf16 weights, pools merged": Case("full", 8, plain),
        "bf16 weights, pools merged, gathered rollouts": Case("full", 8, kept),
        "LoRA": Case("lora", 8, plain),
        "LoRA, gathered rollouts": Case("lora", 8, kept),
    }
    for train in ("full", "lora"):
        for ranks in RANKS:
            found[f"{train}, {ranks}"] = Case(train, ranks, layout(ranks))
    return found


@contextlib.contextmanager
def _wide_gathers() -> Iterator[None]:
    """Gather float32 weights as they are, as the reference does, instead of in bfloat16.

    Its flat parameters are not cached by autocast, which would keep a bfloat16 copy of all weights.
    """
    own = distribution.shard
    distribution.shard = lambda model, mesh, *, param_dtype, **rest: own(model, mesh, **rest)
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        distribution.shard = own
        torch.set_autocast_cache_enabled(True)


def count(case: Case) -> dict[str, Any]:
    """Return the counts of a rank's part of a step as plain values."""
    work = case.workload()
    with _wide_gathers() if case.features else contextlib.nullcontext():
        run = simulate(replace(work, sft=False), case.memory, case.memory)
    received = received_in_step(run.costs, work)
    pooling, width = 0.0, work.config["num_attention_heads"] * work.config["attention_head_dim"]
    if case.features:  # not run, but by formula: bf16 features of all other ranks, and their sum
        sequence = work.sequence
        elements = work.tokens * width * work.batch_size * (sequence - 1) / sequence
        pooling = 2 * 2 * elements * work.evaluations
    elif work.sequence > 1:
        # An all-reduce of H·D and an all-gather of H float32 numbers; counted with the gradients.
        pooling = 4.0 * 8 * width * 2 * work.evaluations
    seconds = step_seconds(run.costs, find_gpu(GPU), work)
    return {
        "train": case.train,
        "ranks": case.ranks,
        "shard": work.shard,
        "sequence": work.sequence,
        "samples_per_step": case.ranks // work.sequence,
        "keep_gathered": work.parallel.keep_gathered is True,
        "weight_dtype": case.memory.weight_dtype,
        "peak_bytes": run.peak,
        "peak_phase": run.peak_phase,
        **received,
        "pooling_bytes": pooling,
        "flops": flops_in_step(run.costs, work),
        "predicted_seconds": sum(seconds.values()),
    }


def _start_process() -> None:
    quiet_libraries()


def _counted(context: Context) -> dict[str, dict[str, Any]]:
    named = cases()
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(2, spawn, initializer=_start_process) as pool,
        context.bar(len(named), "simulating") as bar,
    ):
        found = {}
        for label, record in zip(named, pool.map(count, named.values()), strict=True):
            found[label] = record
            bar.update(1)
    return found


def _layouts(found: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for label, record in found.items():
        if label[-1].isdigit():
            continue
        cells = [f"{record['peak_bytes'] / 2**30:.1f} GiB"]
        cells += [report.size(record[kind]) for kind in KINDS]
        rows.append([label, *cells, report.size(record["pooling_bytes"])])
    return Table(
        "scale-layouts",
        "A rank of 8 with sharded weights, 4 to a sample",
        ["14B, 720p, 81 frames", "peak", *(f"received: {name}" for name in KINDS.values()), "pool"],
        rows,
        [
            "Counted on shapes under a fake process group, not run on GPUs: a whole step of 19 "
            "rollout forwards, one gradient point and a supervised step; every block checkpointed. "
            "Peaks are of live tensors, without CUDA's context and fragmentation. The first row "
            "has the reference's dtypes and pooling on our blocks; its own elementwise passes "
            "would add activations, and its pool's bytes are by formula.",
        ],
    )


def _scaling(found: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for train in ("full", "lora"):
        for ranks in RANKS:
            record = found[f"{train}, {ranks}"]
            per_sample = record["predicted_seconds"] / record["samples_per_step"]
            alone = found[f"{train}, 1"]["predicted_seconds"]
            cells = [f"{record['peak_bytes'] / 2**30:.1f} GiB"]
            cells += [report.size(record[kind]) for kind in KINDS]
            share = f"{alone / per_sample / ranks:.0%}" if ranks <= SEQUENCE else "–"
            cells += [report.flops(record["flops"]), share]
            rows.append([train, str(ranks), str(record["sequence"]), *cells])
    return Table(
        "scale",
        "A rank of 1 to 64",
        [
            "trains",
            "GPUs",
            "to a sample",
            "peak",
            *(f"received: {name}" for name in KINDS.values()),
            "FLOPs",
            "predicted efficiency",
        ],
        rows,
        [
            "As above, per step; weights are sharded over all GPUs, and gathered for every "
            "forward. Predicted efficiency: samples per second and GPU against one GPU, at the "
            f"rates of an {GPU} and 0.8 of its NVLink, none of which a run has confirmed; of "
            "several machines it depends on the network between them.",
        ],
    )


def run(context: Context) -> SuiteResult:
    """Count all cases; the suite needs no GPU and uses none."""
    return result(_counted(context))


def result(found: dict[str, dict[str, Any]]) -> SuiteResult:
    """Return tables and checks of the counts by label."""
    records = [{"label": label, **record} for label, record in found.items()]
    problems = []
    for train in ("full", "lora"):
        peaks = [found[f"{train}, {ranks}"]["peak_bytes"] for ranks in RANKS]
        if sorted(peaks, reverse=True) != peaks:
            problems.append(f"{train}: a rank of more GPUs needs more memory: {peaks}")
    return SuiteResult([_layouts(found), _scaling(found)], records, problems=problems)
