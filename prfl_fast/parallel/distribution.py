"""Share a model among the ranks of a run as its configuration says."""

from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.parallel.sequence import shard_sequence
from prfl_fast.parallel.sharding import check_shardable, shard

Model = TypeVar("Model", bound=nn.Module)


def distribute(
    model: Model,
    mesh: DeviceMesh,
    config: ParallelConfig,
    memory: MemoryConfig,
    precision: Literal["fp32", "bf16"],
) -> Model:
    """Share a patched model's tokens and weights among the ranks of a mesh; return the model.

    Args:
        model: a generator, two experts, or a reward model, after LoRA and its memory policy.
        mesh, config: the mesh of :func:`prfl_fast.parallel.make_mesh`, and its configuration.
        memory: the model's policy.
        precision: compute dtype of float32 weights.

    Raises:
        TypeError, ValueError: see :func:`prfl_fast.parallel.shard_sequence` and
            :func:`prfl_fast.parallel.shard`.
    """
    if config.shard != 1:
        check_shardable(model, mesh)  # before its tokens are shared
    if mesh["sp"].size() > 1:
        shard_sequence(model, mesh)
    if config.shard != 1:
        shard(model, mesh, **shard_options(config, memory, precision))
    return model


def shard_options(
    config: ParallelConfig, memory: MemoryConfig, precision: Literal["fp32", "bf16"]
) -> dict[str, Any]:
    """Return the options of :func:`prfl_fast.parallel.shard` for a run."""
    # Autocast computes in bfloat16, so half the bytes of float32 weights need to travel.
    narrow = memory.weight_dtype == "fp32" and precision == "bf16"
    dtype = torch.bfloat16 if narrow else None
    return {"param_dtype": dtype, "keep_gathered": config.keep_gathered is True}
