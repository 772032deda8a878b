"""Fake process group, under which one process simulates a rank of a run on several GPUs."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from prfl_fast.parallel.mesh import ParallelConfig, make_mesh


@contextlib.contextmanager
def fake_mesh(ranks: int, config: ParallelConfig) -> Iterator[DeviceMesh]:
    """Yield the mesh of a run on ``ranks`` GPUs, as its rank 0 sees it.

    Its collectives return at once and move nothing. Raise ``RuntimeError`` in a process that has a
    process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from prfl_fast.parallel.sharding import shard_mesh  # FSDP2 takes a second to import

    if dist.is_initialized():
        raise RuntimeError(
            "this process has joined a process group, expected one that has not: plan a run on "
            "several GPUs with prfl-fast plan, outside torchrun"
        )
    with _disable_current_modes():
        store: Any = FakeStore()
        dist.init_process_group("fake", rank=0, world_size=ranks, store=store)
    try:
        with _disable_current_modes():
            mesh = make_mesh(config, "cpu")
            shard_mesh(mesh)  # here, as the mesh that it remembers must not hold fake tensors
        yield mesh
    finally:
        dist.destroy_process_group()


class OwnChunks(TorchFunctionMode):
    """Make only the chunk of rank 0 where FSDP2 splits a parameter.

    FSDP2 makes a tensor for each rank and parameter, and keeps that of its own rank. On 256 ranks
    this took most of the time of a plan.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Return the first chunk in place of all chunks; run all other functions."""
        if func is not torch.chunk:
            return func(*args, **(kwargs or {}))

        def chunks(tensor: torch.Tensor, count: int, dim: int = 0) -> list[torch.Tensor]:
            size = tensor.shape[dim]
            return [tensor.narrow(dim, 0, min(size, -(-size // count)))] * count

        return chunks(*args, **(kwargs or {}))
