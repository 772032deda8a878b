"""Mesh of the ranks of a run: copies of the weights, shards of them, parts of the sequence.

The ranks form a :class:`torch.distributed.device_mesh.DeviceMesh` of three dimensions, in this
order, so that neighboring ranks, which have the fastest links, share a sample:

* ``dp_replicate``: copies of the sharded weights;
* ``dp_shard``: ranks with samples of their own that hold one copy of the weights together;
* ``sp``: ranks that share a sample, each with a part of its tokens. Each of them holds a part of
  the copy too.

Every rank's loss is the mean over its own sample, and ranks of one sample compute the same loss.
All collectives of :mod:`prfl_fast.utils.collectives` have their true adjoint as backward, so the
mean of the gradients over all ranks, which FSDP2 takes, is the gradient of the mean loss.
"""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from prfl_fast.utils.checks import check, check_count
from prfl_fast.utils.interrupts import signals_end_process

DIMENSIONS = ("dp_replicate", "dp_shard", "sp")


@dataclass(frozen=True)
class ParallelConfig:
    """Configure how weights and samples are split over the ranks of a run.

    Attributes:
        shard: ranks that hold one copy of the weights together, those that share a sample included;
            1 keeps the whole model on every rank.
        sequence: ranks that share a sample, each with a part of its tokens.
        keep_gathered: keep sharded weights gathered through a rollout, see
            :func:`prfl_fast.parallel.shard`.

    The planner chooses what is ``"auto"`` (:func:`prfl_fast.planning.plan_memory`). Without a plan
    it stands for all ranks, 1 and False.

    Raises:
        ValueError: if a number is below 1, or ``shard`` is neither 1 nor a multiple of
            ``sequence``.
    """

    shard: int | Literal["auto"] = "auto"
    sequence: int | Literal["auto"] = "auto"
    keep_gathered: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, size in (("sequence", self.sequence), ("shard", self.shard)):
            if size != "auto":
                check_count(name, size)
        if self.shard == "auto" or self.sequence == "auto":
            return
        whole = self.shard == 1 or self.shard % self.sequence == 0
        expected = f"1, or a multiple of sequence = {self.sequence}"
        check(whole, "shard", self.shard, expected, hint="Ranks that share a sample share weights")

    def sizes(self, ranks: int) -> tuple[int, int]:
        """Return ``shard`` and ``sequence`` of a run of ``ranks``, without ``"auto"``.

        Raise ``ValueError`` if one of them does not divide ``ranks``.
        """
        shard = ranks if self.shard == "auto" else self.shard
        sequence = 1 if self.sequence == "auto" else self.sequence
        for name, size in (("shard", shard), ("sequence", sequence)):
            check(ranks % size == 0, name, size, f"a divisor of {ranks}, the number of ranks")
        return shard, sequence


def make_mesh(config: ParallelConfig | None = None, device_type: str | None = None) -> DeviceMesh:
    """Return the mesh of all ranks, with the dimensions ``dp_replicate``, ``dp_shard``, ``sp``.

    With ``shard`` 1, ``dp_shard`` has size 1 and the ranks of ``dp_replicate`` have whole models.

    Args:
        config: sizes; the default shards the weights over all ranks.
        device_type: ``"cuda"`` or ``"cpu"``; None takes that of the process group's backend.

    Raises:
        ValueError: if the sizes do not divide the number of ranks.
        RuntimeError: if no process group is initialized.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "no process group is initialized. Start the program with torchrun, and make the mesh "
            "within `with join_ranks(device_type):`"
        )
    config = ParallelConfig() if config is None else config
    ranks = dist.get_world_size()
    shard, sequence = config.sizes(ranks)
    shard = max(shard, sequence)
    if device_type is None:
        device_type = "cuda" if "nccl" in dist.get_backend() else "cpu"
    sizes = (ranks // shard, shard // sequence, sequence)
    with signals_end_process():
        return init_device_mesh(device_type, sizes, mesh_dim_names=DIMENSIONS)
