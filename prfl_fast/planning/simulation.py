"""Simulate one training step on fake tensors: its bytes and its work.

The training code itself runs on fake tensors (``FakeTensorMode``) while a ledger records every
allocation and release, so a 14B model at 720p takes seconds and no memory.
"""

from contextlib import nullcontext
from typing import Any

import torch

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.built_models import (
    depths_of,
    fake_models,
    frozen_copy,
    transformer_of,
)
from prfl_fast.planning.costs import CUBLAS_BYTES
from prfl_fast.planning.fake_ranks import fake_mesh
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.simulated_step import SimulatedStep
from prfl_fast.planning.trace import (
    DEPTH,
    Key,
    Segment,
    Simulation,
    TraceLedger,
    UnlikeError,
    simulation_of,
)
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.collection import no_collection
from prfl_fast.utils.modules import unwrap
from prfl_fast.utils.sharded import local_part

_MOST_REMEMBERED = 64
# By workload with depths and both policies. A search for another budget repeats most simulations.
_remembered: dict[tuple[str, MemoryConfig, MemoryConfig], Simulation] = {}


def simulate(
    workload: Workload,
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
    *,
    layers: int | None = None,
    reward_layers: int | None = None,
    whole: bool = False,
) -> Simulation:
    """Run one step of a workload under two memory policies on fake tensors, on any machine.

    Results are remembered. The allocator's rounding and fragmentation and CUDA's context are not
    included.

    Args:
        layers, reward_layers: depths in place of the workload's.
        whole: run all blocks instead of a few, of which the middle one is repeated.
    """
    # With two blocks ahead, the copies would end before the middle block, which is repeated.
    whole = whole or any((m.stream_weights or 0) > 1 for m in (memory, reward_memory))
    key = repr((workload, layers, reward_layers, whole))  # a configuration has no hash
    found = _remembered.get((key, memory, reward_memory))
    if found is None:
        depths = {"layers": layers, "reward_layers": reward_layers}
        most = None if whole else _fewest(workload, memory, reward_memory)
        with no_collection():
            segments = _recorded(workload, memory, reward_memory, **depths, most=most)
        model_depths = depths_of(workload, **depths)
        model_depths += model_depths[:1] * workload.has_reference
        counts = {}
        for model, depth in zip(_names(workload), model_depths, strict=True):
            for index, count in enumerate(depth.values()):
                counts[f"{model} {index}"] = (min(count, most or count), count)
        try:
            with no_collection():
                found = simulation_of(segments, counts)
        except UnlikeError:
            if whole:
                raise
            return simulate(workload, memory, reward_memory, **depths, whole=True)
        while len(_remembered) >= _MOST_REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key, memory, reward_memory] = found
    return found


def _names(workload: Workload) -> list[str]:
    """Return the names of the models in a trace."""
    rewards = [f"reward {n}" for n, _ in enumerate(workload.reward_models)]
    return ["generator", *rewards] + ["reference"] * workload.has_reference


def _fewest(workload: Workload, memory: MemoryConfig, reward_memory: MemoryConfig) -> int:
    """Return the number of blocks of a list that have to run."""
    # At the end of a list only the last block differs from the repeated one, or the last two: with
    # offload and streamed weights, which also hold the next block's tensors; with full training,
    # whose gradients stay; and with a text stream, which gets no gradient in the last block.
    near = any(m.offload or m.stream_weights for m in (memory, reward_memory))
    two_streams = adapter_of(workload.config).lists != ("blocks",)
    if two_streams and near:
        return DEPTH + 2
    return DEPTH if near or two_streams or workload.train == "full" else DEPTH - 1


def _recorded(
    workload: Workload, memory: MemoryConfig, reward_memory: MemoryConfig, **depths: int | None
) -> dict[Key, Segment]:
    """Return the segments of one step."""
    several = workload.ranks > 1
    with (
        fake_mesh(workload.ranks, workload.parallel) if several else nullcontext() as mesh,
        fake_models(workload, memory, reward_memory, mesh=mesh, **depths) as (trained, rewards),
    ):
        adapter: Any = adapter_of(workload.config)
        reference = frozen_copy(
            workload, memory, layers=depths.get("layers"), most=depths.get("most")
        )
        models = [trained, *rewards, *([] if reference is None else [reference])]
        named = zip(_names(workload), models, strict=True)
        fake: Any = local_part(next(trained.parameters()))
        ledger = TraceLedger(
            {
                f"{name} {index}": getattr(unwrap(transformer_of(model)), blocks)
                for name, model in named
                for index, blocks in enumerate(adapter.lists)
            },
            fake.fake_mode,
        )
        with ledger:
            # PyTorch allocates it at the first matrix product and keeps it.
            cublas = torch.empty(CUBLAS_BYTES, dtype=torch.uint8)
            parts = (trained, rewards, ledger, mesh, reference)
            step = SimulatedStep(workload, memory, reward_memory, *parts)
            step.run()
        del cublas, step
    return ledger.segments
