"""Agreement among the ranks of a run: one of them reads, writes and prints for all."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.utils.interrupts import signals_end_process

Value = TypeVar("Value")

# Ranks wait for each other here while rank 0 writes a checkpoint of hundreds of gigabytes. A rank
# that dies closes its connections, which the others notice at once.
AGREEMENT_TIMEOUT = timedelta(hours=1)


class OtherRankError(RuntimeError):
    """Error for a failure of another rank, which reports it.

    Attributes:
        out_of_memory: True if that rank's device is full.
    """

    out_of_memory = False


class Ranks:
    """Hold the place of this process among the ranks of a run, and let the ranks agree.

    Without a mesh there is one rank, and all methods return at once. With a mesh every rank must
    make the same calls in the same order.

    Attributes:
        mesh: the mesh of :func:`prfl_fast.parallel.make_mesh`, or None.
        rank, size: index of this rank, and the number of ranks.
        data_rank, data_ranks: index of this rank's samples among those of an update, and the number
            of ranks with samples of their own; ranks that share a sample have one ``data_rank``.
        sharded: True if a forward or backward waits for other ranks.
    """

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.mesh, self.rank, self.size = mesh, 0, 1
        self.data_rank, self.data_ranks, self.sharded = 0, 1, False
        self._group: Any = None
        if mesh is None:
            return
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        _, shards, sequence = mesh.mesh.shape
        coordinate = mesh.get_coordinate()
        assert coordinate is not None  # a mesh of all ranks
        self.data_rank = coordinate[0] * shards + coordinate[1]
        self.data_ranks, self.sharded = self.size // sequence, shards * sequence > 1
        # A group of its own, as its messages must not meet those of a forward on another rank.
        with signals_end_process():
            self._group = dist.new_group(backend="gloo", timeout=AGREEMENT_TIMEOUT)

    @property
    def several(self) -> bool:
        """Return True if there are other ranks."""
        return self.size > 1

    @property
    def main(self) -> bool:
        """Return True on the rank that reads, writes and prints for all."""
        return self.rank == 0

    @property
    def group(self) -> Any:
        """Return the process group of the agreements; None without a mesh."""
        return self._group

    def gather(self, value: Value) -> list[Value]:
        """Return the picklable values of all ranks, in the order of the ranks."""
        if not self.several:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def by_data(self, values: Sequence[Value]) -> list[Value]:
        """Return one value for each data rank, of the values that :meth:`gather` returned."""
        return list(values[:: self.size // self.data_ranks])

    def agree(self, flag: bool = False, error: Exception | None = None) -> bool:
        """Return True if ``flag`` is True on any rank.

        If a rank has an error, raise it there, and :class:`OtherRankError` on the others.
        """
        found = self.gather((bool(flag), None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, text) in enumerate(found):
            if text is not None:
                raise OtherRankError(f"rank {rank} failed: {text}")
        return any(each for each, _ in found)

    def on_main(self, function: Callable[..., Value], *args: Any, **options: Any) -> Value:
        """Run ``function(*args, **options)`` on rank 0; return its picklable result on all ranks.

        An error of the function is raised on rank 0, and :class:`OtherRankError` on the others.
        """
        if not self.several:
            return function(*args, **options)
        outcome: list[Any] = [None, None]
        error: Exception | None = None
        if self.main:
            try:
                outcome[0] = function(*args, **options)
            except Exception as raised:  # noqa: BLE001 - raised below, when all ranks know
                error, outcome[1] = raised, str(raised)
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise OtherRankError(f"rank 0 failed: {outcome[1]}")
        result: Value = outcome[0]
        return result
