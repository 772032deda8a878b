"""Model of PyTorch's CUDA caching allocator: the memory it reserves for a list of allocations.

Rules of ``c10/cuda/CUDACachingAllocator.cpp`` (PyTorch 2.10 to 2.13) at its default settings:

* A request is rounded up to 512 bytes. Each stream has a small pool for requests up to 1 MiB, and a
  large pool. The smallest free block of the pool that holds the request serves it.
* Without such a block, a segment is reserved: 2 MiB for small requests, 20 MiB for those below 10
  MiB, else the request rounded up to 2 MiB.
* The rest of a block is split off if it has 512 bytes (small pool) or more than 1 MiB (large pool).
  A free block merges with its free neighbors in the same segment.
* If the device is full, segments without an allocation are released, and the request is repeated.
* With ``expandable_segments:True`` each pool is one range of addresses. Its pages, of 2 MiB (small)
  or 20 MiB (large), are mapped where they are needed. A rest of 512 bytes is split off in both
  pools, and a full device unmaps the whole pages inside of free blocks.
"""

import bisect
import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from prfl_fast.memory.ledger import HOST
from prfl_fast.planning.trace import ALLOCATE, FREE, SCRATCH, Event

_ALIGN, _SMALL, _PAGE = 512, 1 << 20, 2 << 20
_LARGE_SEGMENT, _LARGE_LEAST = 20 << 20, 10 << 20


class FullError(Exception):
    """Error for a request that does not fit the device."""


@dataclass(eq=False)
class _Block:
    """Part of a segment: used, free, or without memory (of an expandable segment)."""

    pool: "_Pool"
    address: int
    size: int
    state: str  # "used", "free" or "unmapped"
    before: "_Block | None" = None
    after: "_Block | None" = None

    def split(self, size: int) -> "_Block":
        """Cut the block after ``size`` bytes; return the rest, in the same state."""
        rest = _Block(self.pool, self.address + size, self.size - size, self.state, self)
        rest.after, self.after, self.size = self.after, rest, size
        if rest.after is not None:
            rest.after.before = rest
        return rest

    def absorb_next(self) -> None:
        """Merge the next block into this one."""
        assert self.after is not None
        self.size += self.after.size
        self.after = self.after.after
        if self.after is not None:
            self.after.before = self


class _Pool:
    """Free blocks of one size class and stream, smallest first."""

    def __init__(self, small: bool) -> None:
        self.small = small
        self.page = _PAGE if small else _LARGE_SEGMENT
        self.free: list[tuple[int, int, _Block]] = []
        self.first: _Block | None = None  # of the expandable segment

    def add(self, block: _Block) -> None:
        block.state = "free"
        bisect.insort(self.free, (block.size, block.address, block))

    def remove(self, block: _Block) -> None:
        del self.free[bisect.bisect_left(self.free, (block.size, block.address))]

    def best(self, size: int) -> _Block | None:
        index = bisect.bisect_left(self.free, (size, -1))
        return self.free[index][2] if index < len(self.free) else None


class CachingAllocator:
    """Allocator of a device with ``limit`` bytes.

    Attributes:
        reserved, allocated: current bytes taken from the device, and in use, rounded.
        peak_reserved, peak_allocated: their maxima so far.
    """

    def __init__(self, limit: float = math.inf, *, expandable: bool = False) -> None:
        self.limit, self.expandable = limit, expandable
        self.reserved = self.allocated = self.peak_reserved = self.peak_allocated = 0
        self._pools: dict[tuple[bool, int], _Pool] = {}
        self._used: dict[Hashable, _Block] = {}
        self._address = 0

    def allocate(self, name: Hashable, nbytes: int, stream: int = 0) -> None:
        """Allocate ``nbytes`` under a name; raise :class:`FullError` if that is impossible."""
        size = max(_ALIGN, -(-nbytes // _ALIGN) * _ALIGN)
        small = size <= _SMALL
        pool = self._pools.setdefault((small, stream), _Pool(small))
        block = pool.best(size)
        if block is not None:
            pool.remove(block)
        else:
            block = self._grown(pool, size)
        rest = block.size - size
        if rest >= _ALIGN and (pool.small or self.expandable or rest > _SMALL):
            pool.add(block.split(size))
        block.state = "used"
        self._used[name] = block
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)

    def free(self, name: Hashable) -> None:
        """Return the block of that name to its pool."""
        block = self._used.pop(name)
        self.allocated -= block.size
        if block.after is not None and block.after.state == "free":
            block.pool.remove(block.after)
            block.absorb_next()
        if block.before is not None and block.before.state == "free":
            block = block.before
            block.pool.remove(block)
            block.absorb_next()
        block.pool.add(block)

    def _grown(self, pool: _Pool, size: int) -> _Block:
        """Return a new block of at least ``size`` bytes that is in no pool."""
        if self.expandable:
            return self._mapped(pool, size)
        segment = _PAGE if pool.small else _LARGE_SEGMENT
        if size >= _LARGE_LEAST:
            segment = -(-size // _PAGE) * _PAGE
        self._reserve(segment)
        self._address += segment
        return _Block(pool, self._address - segment, segment, "used")

    def _reserve(self, size: int) -> None:
        if self.reserved + size > self.limit:
            for pool in self._pools.values():
                self._release(pool)
        if self.reserved + size > self.limit:
            raise FullError(f"{size} bytes do not fit beside {self.reserved} of {self.limit}")
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _release(self, pool: _Pool) -> None:
        """Give the device the segments, or pages, that hold no allocation."""
        for _, _, block in list(pool.free):
            if self.expandable:
                self._unmap(block)
            elif block.before is None and block.after is None:
                pool.remove(block)
                self.reserved -= block.size

    def _unmap(self, block: _Block) -> None:
        pool = block.pool
        start = -(-block.address // pool.page) * pool.page
        end = (block.address + block.size) // pool.page * pool.page
        if start >= end:
            return
        pool.remove(block)
        self.reserved -= end - start
        middle = block
        if start > block.address:
            middle = block.split(start - block.address)
            pool.add(block)
        if end < middle.address + middle.size:
            pool.add(middle.split(end - middle.address))
        middle.state = "unmapped"
        if middle.after is not None and middle.after.state == "unmapped":
            middle.absorb_next()
        if middle.before is not None and middle.before.state == "unmapped":
            middle.before.absorb_next()

    def _mapped(self, pool: _Pool, size: int) -> _Block:
        """Return a block of an expandable segment, at the lowest address with room for it."""
        if pool.first is None:
            pool.first = _Block(pool, 0, 1 << 60, "unmapped")
        start = self._place(pool, size)
        missing = size - (start.size if start.state == "free" else 0)
        need = -(-missing // pool.page) * pool.page
        self._reserve(need)  # may unmap and change the blocks
        start = self._place(pool, size)
        while start.state != "free" or start.size < size:
            hole = start.after if start.state == "free" else start
            assert hole is not None and hole.state == "unmapped"
            have = start.size if start.state == "free" else 0
            pages = min(-(-(size - have) // pool.page) * pool.page, hole.size)
            if pages > need:  # pages that were unmapped meanwhile
                self._reserve(pages - need)
                need = pages
            need -= pages
            if pages < hole.size:
                hole.split(pages)
            if start is hole:
                start.state = "free"
            else:
                pool.remove(start)
                start.absorb_next()
            if start.after is not None and start.after.state == "free":
                pool.remove(start.after)
                start.absorb_next()
            pool.add(start)
        pool.remove(start)
        return start

    @staticmethod
    def _place(pool: _Pool, size: int) -> _Block:
        """Return the first of neighboring blocks without allocations that hold ``size`` bytes."""
        block = pool.first
        while block is not None:
            if block.state == "unmapped":
                first = block.before
                start = first if first is not None and first.state == "free" else block
                room, last = 0, start
                while last is not None and last.state != "used":
                    room, last = room + last.size, last.after  # type: ignore[assignment]
                if room >= size:
                    return start
            block = block.after
        raise FullError(f"no addresses for {size} bytes")


Request = tuple[bool, Hashable, int]  # True to allocate, name, bytes


def fits(requests: Iterable[Request], limit: float, *, expandable: bool) -> bool:
    """Return True if a device of ``limit`` bytes can serve the requests in order."""
    allocator = CachingAllocator(limit, expandable=expandable)
    try:
        for take, name, nbytes in requests:
            if take:
                allocator.allocate(name, nbytes)
            else:
                allocator.free(name)
    except FullError:
        return False
    return True


def least_limit(
    requests: list[Request], live: int, *, expandable: bool, within: int = 32 << 20
) -> int:
    """Return the least device size for requests with a peak of ``live``, to ``within`` bytes."""
    low, high = live, live + within
    while not fits(requests, high, expandable=expandable):
        low, high = high, live + 2 * (high - live)
    while high - low > within:
        middle = (low + high) // 2
        if fits(requests, middle, expandable=expandable):
            high = middle
        else:
            low = middle
    return high


def requests_of(phases: Iterable[tuple[str, Iterable[Event]]], steps: int = 2) -> list[Request]:
    """Return the device allocations of some training steps in a row, from the events of one.

    Events of the phase ``""`` come before the first step, except the optimizer's states, which its
    first update allocates.
    """
    before: list[Request] = []
    states: list[Request] = []
    step: list[Request] = []
    held: set[Hashable] = set()  # allocated by the step and not freed
    for phase, events in phases:
        requests = step if phase else before
        for kind, name, size, category in events:
            if kind == SCRATCH:
                requests += [(True, "scratch", size), (False, "scratch", 0)]
            elif kind == ALLOCATE and category != HOST:
                into = states if not phase and category == "optimizer" else requests
                into.append((True, name, size))
                if phase:
                    held.add(name)
            elif kind == FREE and category != HOST:
                requests.append((False, name, 0))
                held.discard(name)
    step += [(False, name, 0) for name in held]  # what the recorded step left to its caller
    return before + step + states + step * (steps - 1)
