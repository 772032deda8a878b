"""Record the allocations and the work of a model of few blocks, and repeat these to any depth.

All blocks of a list but the first two and the last two allocate and free the same sizes in the same
order, because offload holds the tensors of two blocks. So five blocks of each list run, and the
events of the third are repeated. Four are enough for LoRA without offload. If blocks pass on a text
stream and are offloaded, their tensors are freed one block later: seven run, the fourth repeats.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from prfl_fast.memory.ledger import CATEGORIES, HOST, storage_of
from prfl_fast.planning.costs import Cost, CostLedger
from prfl_fast.planning.fake_mode import FastFakeTensorMode
from prfl_fast.utils.sharded import local_part

DEPTH = 5  # blocks that run by default
ALLOCATE, FREE, MOVE, SCRATCH = "allocate", "free", "move", "scratch"
_POINTS = 4096  # of a timeline, at most

Place = tuple[str, int]  # list of blocks ("" outside), index of the block
Key = tuple[str, int, str, int]  # phase, running number of phases and forwards, place
Moment = tuple[str, dict[str, int]]  # phase, live bytes by category
# Kind, number of the storage, bytes, category. Storages have other numbers in each repeated block.
Event = tuple[str, Any, int, str]


class UnlikeError(Exception):
    """Error for a model whose blocks do not repeat."""


@dataclass
class Segment:
    """Hold the events and the work of one block, or of the code outside, in one phase."""

    events: list[Event] = field(default_factory=list)
    storages: int = 0
    work: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Simulation:
    """Memory and work of one step.

    Attributes:
        peak, peak_phase, categories: device bytes at the peak, its phase, and bytes by category.
        host: peak bytes of host buffers.
        timeline: (phase, live bytes by category) in order of time. The first moment of a phase is
            its start.
        costs: work by phase. ``rollout`` is one forward without gradient; ``forward``, ``reward``,
            ``reward backward`` and ``backward`` are of one gradient point, ``sft …`` of one
            micro-batch, ``optimizer`` of one update for each objective. ``swap out`` and
            ``swap in`` are one exchange of two experts.
        events: allocations and releases by phase, in order.
    """

    peak: int
    peak_phase: str
    categories: dict[str, int]
    host: int
    timeline: list[Moment]
    costs: dict[str, Cost] = field(repr=False)
    events: list[tuple[str, list[Event]]] = field(default_factory=list, repr=False, compare=False)


class TraceLedger(CostLedger):
    """Ledger that also records each allocation, release and unit of work in segments.

    ``lists`` has the lists of blocks by name; the segments of a block are entered by hooks.
    ``mode`` is the mode of the fake tensors.
    """

    def __init__(self, lists: Mapping[str, nn.ModuleList], mode: FastFakeTensorMode) -> None:
        super().__init__()
        self.mode = mode
        self.segments: dict[Key, Segment] = {}
        self._names: dict[int, tuple[Key, int]] = {}  # entry → segment and number of its storage
        self._owners: dict[int, Place] = {}
        self._run = 0
        self._forward_run = -1  # of the forward whose backward runs
        for name, blocks in lists.items():
            for index, block in enumerate(blocks):
                self._watch(block, (name, index))
        self._enter(("", 0))

    def _watch(self, block: nn.Module, place: Place) -> None:
        for tensor in (*block.parameters(), *block.buffers()):
            self._owners[id(tensor)] = place

        def start(*_: object) -> None:
            if "backward" not in self.phase:  # there, blocks are run again
                if (self.phase, self._run, *place) in self.segments:
                    self._run += 1  # a second forward in this phase
                self._enter(place)

        def finish(block: nn.Module, args: Any, out: Any) -> None:
            last = out if isinstance(out, torch.Tensor) else out[0]
            if last.requires_grad and "backward" not in self.phase:
                forward_run = self._run
                last.register_hook(lambda grad: self._enter_backward(place, forward_run))

        block.register_forward_pre_hook(start)
        block.register_forward_hook(finish)

    def _enter_backward(self, place: Place, forward_run: int) -> None:
        if forward_run != self._forward_run:  # one phase may have the backwards of two forwards
            self._forward_run = forward_run
            self._run += 1
        self._enter(place)

    def _enter(self, place: Place) -> None:
        self._key = (self.phase, self._run, *place)
        self._segment = self.segments.setdefault(self._key, Segment())

    def leave_blocks(self) -> None:
        """Attribute later events to no block, after a forward without a backward."""
        self._run += 1
        self._enter(("", 0))

    @contextlib.contextmanager
    def at(self, parameter: torch.Tensor) -> Iterator[None]:
        """Attribute events to the block of a parameter."""
        key, segment = self._key, self._segment
        self._enter(self._owners.get(id(parameter), ("", 0)))
        yield
        self._key, self._segment = key, segment

    def start_phase(self, name: str) -> None:
        """Attribute all later allocations to phase ``name``."""
        super().start_phase(name)
        self._run += 1
        self._enter(("", 0))

    def count(self, **work: int) -> None:
        """Add work to the current phase and segment."""
        super().count(**work)
        total = self._segment.work
        for name, amount in work.items() if self.counts else ():
            total[name] = total.get(name, 0) + amount

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation."""
        out = self.mode.known(func, args, kwargs)
        return func(*args, **kwargs) if out is NotImplemented else out

    def mark(self, tensor: torch.Tensor, category: str) -> None:
        """Enter a storage under a category, or move it there."""
        storage = storage_of(local_part(tensor))
        if storage is None:
            return
        entry = self._entry(storage)
        nbytes, before = entry.bytes, entry.category
        if before and nbytes != storage.nbytes():
            self._write_free(entry)
            before = ""
        super().mark(tensor, category)
        if not before:
            self._write_allocation(entry, self._owners.get(id(tensor)))
        elif before != category:
            self._write_move(entry)

    def on_resize(self, storage: torch.UntypedStorage) -> None:
        """Record the release of the old size and the allocation of the new one."""
        entry = self._entries.get(storage._cdata)
        if entry is None or not entry.category or entry.bytes == storage.nbytes():
            return
        if entry.bytes:
            self._write_free(entry)
        super().on_resize(storage)
        self._write_allocation(entry, None)

    def add_transient(self, size: int) -> None:
        """Count ``size`` bytes of temporary workspace on top of all live bytes."""
        super().add_transient(size)
        if size:
            self._segment.events.append((SCRATCH, None, size, "workspace"))

    def on_operation(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        fresh: list[torch.Tensor],
        out: Any,
    ) -> None:
        """Record the new storages of an operation before its scratch memory."""
        for tensor in fresh:
            self._write_allocation(self._entry(tensor.untyped_storage()), None)
        super().on_operation(func, args, kwargs, given, fresh, out)

    def _write_allocation(self, entry: Any, place: Place | None) -> None:
        if not entry.bytes:
            return
        key, segment = self._key, self._segment
        if place is not None:
            key = (self.phase, self._run, *place)
            segment = self.segments.setdefault(key, Segment())
        name = (key, segment.storages)
        segment.storages += 1
        self._names[entry.key] = name
        segment.events.append((ALLOCATE, name, entry.bytes, entry.category))

    def _write_move(self, entry: Any) -> None:
        name, events = self._names.get(entry.key), self._segment.events
        if name is None:
            return
        if events and events[-1][:2] == (ALLOCATE, name):  # no other event since the allocation
            events[-1] = (ALLOCATE, name, entry.bytes, entry.category)
        else:
            events.append((MOVE, name, entry.bytes, entry.category))

    def _write_free(self, entry: Any) -> None:
        name = self._names.pop(entry.key, None)
        if name is not None:
            self._segment.events.append((FREE, name, entry.bytes, entry.category))

    def _remove_freed(self, entry: Any) -> None:
        if self._depth and entry.category:
            self._write_free(entry)
        super()._remove_freed(entry)


def simulation_of(
    segments: Mapping[Key, Segment], counts: Mapping[str, tuple[int, int]]
) -> Simulation:
    """Return the simulated step with the lists of blocks at their whole depths.

    Args:
        segments: recorded segments in order of time.
        counts: recorded and whole number of blocks by list. All lists that are recorded in part
            have as many blocks, at least four; the middle one is repeated.

    Raises:
        UnlikeError: if the repeated block frees a storage that its copy does not have.
    """
    whole = _Whole(segments, counts)
    events, work = whole.events(), whole.work()
    costs = {phase: Cost(**amounts) for phase, amounts in work.items() if phase}
    return Simulation(*_played(events), costs, events)


class _Whole:
    """Repeat the segments of the middle blocks."""

    def __init__(
        self, segments: Mapping[Key, Segment], counts: Mapping[str, tuple[int, int]]
    ) -> None:
        self.segments = segments
        self.more = {name: whole - few for name, (few, whole) in counts.items()}
        parts = [few for few, whole in counts.values() if few < whole]
        self.repeated = max(parts, default=DEPTH) // 2  # index of the block that stands for more
        self.order = {key: index for index, key in enumerate(segments)}
        # Segments with events of storages that belong to the block before the repeated one.
        self.of_all = {
            (key, *event[1][0][:3])
            for key, segment in segments.items()
            for event in segment.events
            if event[1] is not None and event[1][0][3] == self.repeated - 1
        }

    def work(self) -> dict[str, dict[str, int]]:
        """Return the work by phase."""
        total: dict[str, dict[str, int]] = {}
        for (phase, _, name, index), segment in self.segments.items():
            times = 1 + self.more.get(name, 0) * (index == self.repeated)
            into = total.setdefault(phase, {})
            for kind, amount in segment.work.items():
                into[kind] = into.get(kind, 0) + times * amount
        return total

    def events(self) -> list[tuple[str, list[Event]]]:
        """Return the events by phase, in order of time."""
        found = []
        for key, segment in self.segments.items():
            for index in self._indices(key):
                events = [
                    made for event in segment.events for made in self._made(event, key, index)
                ]
                found.append((key[0], events))
        return found

    def _indices(self, key: Key) -> Iterator[int] | range:
        """Return the blocks for which a segment stands, in order of time."""
        phase, run, name, index = key
        more = self.more.get(name, 0)
        if index < self.repeated or not more:
            return range(index, index + 1)
        if index > self.repeated:
            return range(index + more, index + more + 1)
        repeated = range(index, index + more + 1)
        after = self.order.get((phase, run, name, index + 1), math.inf)
        return repeated if after > self.order[key] else reversed(repeated)

    def _made(self, event: Event, key: Key, index: int) -> Iterator[Event]:
        """Yield the event of a segment for the block ``index``."""
        kind, name, size, category = event
        if name is None:
            yield event
            return
        (phase, run, place, block), number = name
        more = self.more.get(place, 0)
        blocks = range(block, block + 1)
        if place == key[2] and abs(block - key[3]) <= self.repeated:
            blocks = range(block + index - key[3], block + index - key[3] + 1)
        elif block > self.repeated:
            blocks = range(block + more, block + more + 1)
        elif block == self.repeated and more:
            # Code outside the list frees the storages of all blocks, or only those of the last one.
            every = (key, phase, run, place) in self.of_all
            blocks = range(block if every else block + more, block + more + 1)
        for at in blocks:
            yield kind, (phase, run, place, at, number), size, category


def _played(
    phases: list[tuple[str, list[Event]]],
) -> tuple[int, str, dict[str, int], int, list[Moment]]:
    """Return the peak, its phase and bytes by category, the peak of the host, and the timeline."""
    live = dict.fromkeys(CATEGORIES, 0)
    host = host_peak = total = peak = 0
    peak_phase, peak_categories, now = "", dict(live), None
    held: dict[Any, str] = {}
    timeline: list[Moment] = []
    rising = False

    def close(phase: str) -> None:
        nonlocal peak, peak_phase, peak_categories
        timeline.append((phase, dict(live)))
        if total > peak:
            peak, peak_phase, peak_categories = total, phase, timeline[-1][1]

    for phase, events in phases:
        if phase != now:
            now, rising = phase, False
            close(phase)
        for kind, name, size, category in events:
            if kind == SCRATCH:
                live[category] += size
                total += size
                close(phase)
                live[category] -= size
                total -= size
                rising = False
                continue
            if kind != ALLOCATE:
                if rising:
                    close(phase)
                    rising = False
                before = held.pop(name, None)
                if before is None:
                    raise UnlikeError(name)
                if before == HOST:
                    host -= size
                else:
                    live[before] -= size
                    total -= size
            if kind != FREE:
                held[name] = category
                if category == HOST:
                    host += size
                    host_peak = max(host_peak, host)
                else:
                    live[category] += size
                    total += size
                    rising = rising or kind == ALLOCATE
        if rising:
            close(phase)
            rising = False
    return peak, peak_phase, peak_categories, host_peak, thinned([p for p in timeline if p[0]])


def thinned(points: list[Moment], most: int = _POINTS) -> list[Moment]:
    """Return at most ``most`` moments: the highest of each window, and the start of each phase."""
    if len(points) <= most:
        return points
    width = -(-2 * len(points) // most)
    kept: list[Moment] = []
    start = 0
    while start < len(points):
        phase = points[start][0]
        first = start == 0 or points[start - 1][0] != phase
        end = start + 1
        while not first and end < min(start + width, len(points)) and points[end][0] == phase:
            end += 1
        kept.append(max(points[start:end], key=lambda point: sum(point[1].values())))
        start = end
    return kept
