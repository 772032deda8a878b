"""Train on several GPUs: mesh, sharded weights, sharded sequences."""

from prfl_fast.parallel.mesh import ParallelConfig, make_mesh
from prfl_fast.parallel.sharding import average_gradients, shard
from prfl_fast.utils.sharded import delayed_reduction, gathered

__all__ = [
    "ParallelConfig",
    "average_gradients",
    "delayed_reduction",
    "gathered",
    "make_mesh",
    "shard",
]
