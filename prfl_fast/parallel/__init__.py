"""Train on several GPUs: mesh, sharded weights, sharded sequences."""

from prfl_fast.parallel.averaging import average_gradients, broadcast_weights
from prfl_fast.parallel.loading import load_sharded
from prfl_fast.parallel.mesh import ParallelConfig, make_mesh
from prfl_fast.parallel.sequence import shard_sequence
from prfl_fast.parallel.sharding import shard
from prfl_fast.utils.sharded import delayed_reduction, gathered

__all__ = [
    "ParallelConfig",
    "average_gradients",
    "broadcast_weights",
    "delayed_reduction",
    "gathered",
    "load_sharded",
    "make_mesh",
    "shard",
    "shard_sequence",
]
