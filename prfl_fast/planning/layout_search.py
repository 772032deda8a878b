"""Choose how the GPUs of a run share weights and videos: search each layout that is left open."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.search import TIE, Found, Search, Tier
from prfl_fast.planning.workload import Workload

# GPUs of a machine, whose links are the fastest: videos are shared within it, weights if they fit.
MACHINE = 8


def layouts(workload: Workload) -> list[ParallelConfig]:
    """Return the layouts of a run, those that communicate least first.

    ``"auto"`` for ``sequence`` stands for the sizes up to :data:`MACHINE` that the model takes, and
    for ``shard`` for 1, a machine and all ranks.
    """
    parallel, ranks = workload.parallel, workload.ranks
    if ranks == 1 or "auto" not in (parallel.shard, parallel.sequence):
        return [parallel]
    sizes = [n for n in range(1, MACHINE + 1) if ranks % n == 0 and _takes(workload, n)]
    sequences = sizes if parallel.sequence == "auto" else [parallel.sequence]
    sizes = [n for n in sorted({1, MACHINE, ranks}) if ranks % n == 0]
    shards = sizes if parallel.shard == "auto" else [parallel.shard]
    found = []
    for sequence in sequences:
        for shard in shards:
            if shard == 1 or shard % sequence == 0:
                found.append(dataclasses.replace(parallel, shard=shard, sequence=sequence))
    return found


def _takes(workload: Workload, sequence: int) -> bool:
    """Return True if so many ranks can share a video of the model."""
    if sequence == 1:
        return True
    heads = adapter_of(workload.config).shared_heads(workload.config)
    # Each rank needs tokens: all parts but the last have as many as the first.
    filled = (sequence - 1) * math.ceil(workload.tokens / sequence) < workload.tokens
    return workload.patched and heads % sequence == 0 and filled


class LayoutSearch:
    """Search layouts until no other can be faster by more than ``TIE``; keep the best.

    Attributes:
        make: returns the search of a workload whose layout is given.
        show: receives a description before each simulation.
        notes: a line on each layout that was searched, if there were several.
    """

    def __init__(self, make: Callable[[Workload], Search]) -> None:
        self.make = make
        self.show: Callable[[str], object] = lambda text: None
        self.notes: list[str] = []

    def best(self, workload: Workload, tiers: Sequence[Tier]) -> tuple[Search, Found]:
        """Return the search of the best layout with its result.

        Weights and optimizer of an earlier tier come first, then the fewest seconds of a GPU per
        video, then less communication. If nothing fits, the smallest excess decides.
        """
        several, kept, tiers = layouts(workload), None, list(tiers)
        bound, lowest = 0.0, math.inf
        for parallel in several:
            search = self.make(dataclasses.replace(workload, parallel=parallel))
            largest = kept is None and parallel is several[-1]  # one is searched in any case
            if len(several) > 1 and not largest and not any(map(search.may_hold, tiers)):
                self.notes.append(f"{_name(search.workload)}: the weights do not fit")
                continue
            search.show = self._shown(search.workload) if len(several) > 1 else self.show
            found = search.run(tiers)
            found = search.keep_gathered(found) or found
            if len(several) == 1:
                return search, found
            own = found.chosen.seconds * search.workload.sequence
            self.notes.append(_note(search.workload, found))
            tier = len(tiers) - len(found.unused)
            if not found.feasible:
                if kept is None or not kept[1].feasible and found.chosen.peak < kept[1].chosen.peak:
                    kept = search, found
                continue
            better = kept is None or not kept[1].feasible or tier < len(tiers)
            if better or (1 + TIE) * own < lowest:
                kept, lowest, tiers = (search, found), own, tiers[:tier]
            bound = bound or search.fewest_seconds(tiers[0]) * search.workload.sequence
            if len(tiers) == 1 and lowest <= (1 + TIE) * bound:
                break
        assert kept is not None
        return kept

    def _shown(self, workload: Workload) -> Callable[[str], object]:
        return lambda text: self.show(f"{_name(workload)}, {text}")


def _name(workload: Workload) -> str:
    return f"shard {workload.shard}, sequence {workload.sequence}"


def _note(workload: Workload, found: Found) -> str:
    """Return a line on a layout that was searched."""
    result = f"{found.chosen.seconds:.1f} s per step" if found.feasible else "does not fit"
    memory = found.chosen.memory
    return f"{_name(workload)}: {result}, {memory.weight_dtype} with {memory.optimizer}"
