"""Train on several GPUs: mesh, sharded weights, sharded sequences."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prfl_fast.parallel.averaging import average_gradients, broadcast_weights
    from prfl_fast.parallel.launch import join_ranks
    from prfl_fast.parallel.loading import load_sharded
    from prfl_fast.parallel.mesh import ParallelConfig, make_mesh
    from prfl_fast.parallel.ranks import OtherRankError, Ranks
    from prfl_fast.parallel.sequence import shard_sequence
    from prfl_fast.parallel.sharding import shard
    from prfl_fast.utils.sharded import delayed_reduction, gathered

__all__ = [
    "OtherRankError",
    "ParallelConfig",
    "Ranks",
    "average_gradients",
    "broadcast_weights",
    "delayed_reduction",
    "gathered",
    "join_ranks",
    "load_sharded",
    "make_mesh",
    "shard",
    "shard_sequence",
]

# Imported at the first use of a name: importing FSDP2 takes 1.7 s, which a trainer on one GPU need
# not wait for.
_MODULES = ("averaging", "launch", "loading", "mesh", "ranks", "sequence", "sharding")


def __getattr__(name: str) -> Any:
    """Import a name of ``__all__`` at its first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    paths = (f"{__name__}.{module}" for module in _MODULES)
    for module in map(importlib.import_module, (*paths, "prfl_fast.utils.sharded")):
        if getattr(vars(module).get(name), "__module__", None) == module.__name__:
            globals()[name] = vars(module)[name]
            return globals()[name]
    raise AssertionError(f"no module of {__name__} has {name}")
