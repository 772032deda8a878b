"""Train on several GPUs: mesh, sharded weights, sharded sequences."""

from prfl_fast.parallel.mesh import ParallelConfig, make_mesh

__all__ = ["ParallelConfig", "make_mesh"]
