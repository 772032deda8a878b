"""Choose how the GPUs of a run share weights and videos: search each layout that is left open."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial

from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.search import TIE, Found, Search, Tier
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.units import seconds


def layouts(workload: Workload) -> list[ParallelConfig]:
    """Return the layouts of a run, those that communicate least first.

    Videos are shared within a machine, weights too if they fit it: ``"auto"`` for ``sequence``
    stands for the sizes up to a machine that the model takes, for ``shard`` for 1, a machine and
    all ranks.
    """
    parallel, ranks, machine = workload.parallel, workload.ranks, workload.gpus_per_machine
    if ranks == 1 or "auto" not in (parallel.shard, parallel.sequence):
        return [parallel]
    within = min(machine, ranks)
    sizes = [n for n in range(1, within + 1) if within % n == 0 and ranks % n == 0]
    sizes = [n for n in sizes if _takes(workload, n)]
    sequences = sizes if parallel.sequence == "auto" else [parallel.sequence]
    sizes = [n for n in sorted({1, machine, ranks}) if ranks % n == 0]
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
        video, then less communication.
        """
        parallels = layouts(workload)
        searches = [self.make(dataclasses.replace(workload, parallel=each)) for each in parallels]
        for search in searches:
            search.show = self.show
            if len(searches) > 1:
                search.show = partial(self._show_layout, search.workload)
        if len(searches) == 1:
            return searches[0], _searched(searches[0], tiers)
        for index, tier in enumerate(tiers):
            kept = self._fastest(searches, tier)
            if kept is not None:
                search, found = kept
                return search, dataclasses.replace(found, unused=[*tiers[index + 1 :]])
        self.notes.append("no layout fits; this one has the smallest parts")
        return searches[-1], searches[-1].run(tiers)

    def _fastest(self, searches: Sequence[Search], tier: Tier) -> tuple[Search, Found] | None:
        """Return the best layout with the weights and the optimizer of a tier."""
        fitting: list[tuple[float, Search, Found]] = []
        lowest, bound = math.inf, 0.0
        self.notes = []
        for search in searches:
            found = _searched(search, [tier]) if search.leanest_fits(tier) else None
            if found is None or not found.feasible:
                self._note(search.workload, "does not fit", tier)
                continue
            self._note(search.workload, f"{seconds(found.chosen.seconds)} per step", tier)
            own = found.chosen.seconds * search.workload.sequence
            fitting.append((own, search, found))
            lowest = min(lowest, own)
            bound = bound or search.fewest_seconds(tier) * search.workload.sequence
            # No layout takes fewer GPU seconds: all compute the same for a video.
            if lowest <= (1 + TIE) * bound:
                break
        # The first ones communicate least.
        return next(((s, f) for own, s, f in fitting if own <= (1 + TIE) * lowest), None)

    def _show_layout(self, workload: Workload, text: str) -> None:
        self.show(f"{_label(workload)}, {text}")

    def _note(self, workload: Workload, result: str, tier: Tier) -> None:
        self.notes.append(
            f"{_label(workload)}: {result} with {tier.weight_dtype}, {tier.optimizer}"
        )


def _label(workload: Workload) -> str:
    return f"shard {workload.shard}, sequence {workload.sequence}"


def _searched(search: Search, tiers: Sequence[Tier]) -> Found:
    """Return the result of a search, with gathered weights through rollouts where they fit."""
    found = search.run(tiers)
    return search.keep_gathered(found) or found
