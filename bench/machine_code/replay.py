"""Run the warps of one multiprocessor through their machine code, clock by clock.

Warps issue in order, with the stall counts and scoreboard waits that ptxas encoded. There are four
schedulers, each with its pipes, one load/store unit, block barriers, and a DRAM queue with this
multiprocessor's share of the copy rate and a fixed latency. Misses of cached rows in L2, bank
conflicts and DRAM rows are not modeled.
"""

import heapq
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from machine_code.chips import (
    BARRIER,
    CLUSTER_BARRIER,
    L1_LATENCY,
    L2_LATENCY,
    LATENCY,
    MEMORY,
    pipe_of,
)
from machine_code.flow import WarpPath
from machine_code.sass import Instruction

SCHEDULERS = 4
LSU_QUEUE = 8  # clocks of work that the load/store unit accepts ahead
MOST_ISSUES = 120_000  # replayed; longer grids are cut to whole waves, long loops to fewer trips
_DEPBAR = re.compile(r"SB(\d), 0x([0-9a-f]+)")


@dataclass(frozen=True)
class Replay:
    """Hold the share of the copy rate, and the mean and largest DRAM bytes of loads in flight."""

    share: float
    mean_bytes: float
    peak_bytes: float


class _Warp:
    """Hold the place of a warp in its stream, and the clocks at which scoreboards are released."""

    def __init__(self, number: int, block: int, scheduler: int) -> None:
        self.number, self.block, self.scheduler, self.place = number, block, scheduler, 0
        self.boards: list[list[float]] = [[] for _ in range(6)]
        self.copies: float = 0.0  # when the last of its copies to shared memory is there

    def resume(self, at: float, following: "_Step") -> float:
        """Return the clock from ``at`` on at which the scoreboards let ``following`` issue."""
        for k in following.waits:
            board = self.boards[k]
            if board:
                at = max(at, *board)
                board.clear()
        if following.depbar is not None:
            k, keep = following.depbar
            pending = sorted(self.boards[k])
            if len(pending) > keep:
                at = max(at, pending[len(pending) - keep - 1])
                self.boards[k] = pending[len(pending) - keep :]
        return at


class _Step:
    """Hold what the replay needs of an instruction, decoded once."""

    __slots__ = (
        "barrier", "depbar", "held", "instruction", "latency", "memory", "pipe", "read_bar",
        "stall", "waits", "write_bar",
    )  # fmt: skip

    def __init__(self, i: Instruction) -> None:
        self.instruction, self.memory = i, i.op in MEMORY
        self.pipe, self.held = pipe_of(i.name)
        self.latency, self.stall = LATENCY.get(i.op, 14), max(1, i.stall)
        self.write_bar, self.read_bar = i.write_bar, i.read_bar
        self.waits = [k for k in range(6) if i.wait >> k & 1]
        depbar = _DEPBAR.search(i.operands) if i.op == "DEPBAR" else None
        self.depbar = (int(depbar[1]), int(depbar[2], 16)) if depbar else None
        # Clocks; 0 if it is no barrier. All blocks of a cluster come to its barrier at one time.
        block = i.op == "BAR" and ("SYNC" in i.name or "RED" in i.name)
        cluster = i.op == "UCGABAR_WAIT"
        self.barrier = BARRIER if block else CLUSTER_BARRIER if cluster else 0


class _Multiprocessor:
    """Run blocks of ``warps`` warps that all run ``stream``.

    Args:
        latency: clocks of a DRAM load after its turn in the queue.
        bandwidth: DRAM bytes a clock.
        useful: share of the lanes' bytes that masks let through.
    """

    def __init__(
        self,
        stream: Sequence[Instruction],
        warps: int,
        latency: int,
        bandwidth: float,
        useful: float,
    ) -> None:
        steps = {id(i): _Step(i) for i in stream}
        self.stream, self.warps = [steps[id(i)] for i in stream], warps
        self.latency, self.bandwidth, self.useful = latency, bandwidth, useful
        self.schedulers = [0.0] * SCHEDULERS
        self.pipe_free: list[dict[str, float]] = [defaultdict(float) for _ in range(SCHEDULERS)]
        self.lsu = self.dram = self.moved = self.end = 0.0
        self.flights: list[tuple[float, float, float]] = []  # start, end, bytes of DRAM loads
        self.ready: list[tuple[float, int, _Warp]] = []
        self.at_barrier: dict[int, list[tuple[float, _Warp]]] = defaultdict(list)
        self.alive: dict[int, int] = {}
        self.pushed = 0

    def run(self, blocks: int, resident: int) -> Replay:
        """Run ``blocks`` blocks, ``resident`` at a time."""
        for _ in range(min(resident, blocks)):
            self._start_block(0.0)
        while self.ready:
            at, _, warp = heapq.heappop(self.ready)
            start = self._earliest(at, warp)
            if start > at + 1e-9 and self.ready and self.ready[0][0] < start:
                self._push(start, warp)
                continue
            resume = self._issue(start, warp)
            if warp.place == len(self.stream):
                self.alive[warp.block] -= 1
                if not self.alive[warp.block] and len(self.alive) < blocks:
                    self._start_block(start + 200)
            elif clocks := self.stream[warp.place - 1].barrier:
                self._wait_for_block(resume, warp, clocks)
            else:
                self._push(resume, warp)
        self.end = max(self.end, self.dram)
        total = sum((stop - start) * size for start, stop, size in self.flights)
        share = self.moved / self.bandwidth / self.end
        return Replay(share, total / self.end, self._peak())

    @property
    def totals(self) -> tuple[float, float]:
        """Return the DRAM bytes moved and the clocks taken."""
        return self.moved, self.end

    def _push(self, at: float, warp: _Warp) -> None:
        self.pushed += 1
        heapq.heappush(self.ready, (at, self.pushed, warp))

    def _start_block(self, at: float) -> None:
        block = len(self.alive)
        self.alive[block] = self.warps
        for w in range(self.warps):
            scheduler = (w + block * self.warps) % SCHEDULERS
            self._push(at + 30 + 2 * w, _Warp(w, block, scheduler))

    def _earliest(self, at: float, warp: _Warp) -> float:
        """Return the clock at which scheduler, pipe and load/store unit take the instruction."""
        step, s = self.stream[warp.place], warp.scheduler
        at = max(at, self.schedulers[s])
        if step.held:
            at = max(at, self.pipe_free[s][step.pipe])
        if step.memory:
            at = max(at, self.lsu - LSU_QUEUE)
        return at

    def _issue(self, at: float, warp: _Warp) -> float:
        """Issue the warp's next instruction; return when the one after it may issue."""
        step, s = self.stream[warp.place], warp.scheduler
        self.schedulers[s] = at + 1
        if step.held:
            self.pipe_free[s][step.pipe] = at + step.held
        done, read = at + step.latency, at
        if step.memory:
            i = step.instruction
            done, read = self._access(at, i), self.lsu
            if i.op == "LDGSTS":
                warp.copies = max(warp.copies, done)
        elif step.instruction.op == "LDGDEPBAR":
            done = max(done, warp.copies)
        if step.write_bar < 6:
            warp.boards[step.write_bar].append(done)
        if step.read_bar < 6:
            warp.boards[step.read_bar].append(read + 12)
        warp.place += 1
        if at > self.end:
            self.end = at
        if warp.place == len(self.stream):
            return at
        return warp.resume(at + step.stall, self.stream[warp.place])

    def _access(self, at: float, i: Instruction) -> float:
        """Return when the result of a memory instruction is there; for a store, a few clocks."""
        short = i.op in ("SHFL", "MOVM")
        self.lsu = max(self.lsu, at) + (1 if short else max(1, i.width * 32 / 128))
        if i.op not in ("LDG", "STG", "LDGSTS", "RED"):
            return self.lsu + LATENCY.get(i.op, 10)
        if i.level == "DRAM":
            size = 32 * i.width * self.useful
            self.dram = max(self.dram, at) + size / self.bandwidth
            self.moved += size
            if i.op != "STG":
                self.flights.append((at, self.dram + self.latency, size))
                return self.dram + self.latency
        if i.op == "STG":
            return at + 20
        return self.lsu + (L2_LATENCY if i.level == "L2" else L1_LATENCY)

    def _wait_for_block(self, at: float, warp: _Warp, clocks: int) -> None:
        waiting = self.at_barrier[warp.block]
        waiting.append((at, warp))
        if len(waiting) == self.warps:
            release = max(at for at, _ in waiting) + clocks
            for _, other in waiting:
                self._push(release, other)
            waiting.clear()

    def _peak(self) -> float:
        changes = [(start, size) for start, _, size in self.flights]
        changes += [(stop, -size) for _, stop, size in self.flights]
        level = peak = 0.0
        for _, size in sorted(changes):
            level += size
            peak = max(peak, level)
        return peak


def replay(
    path: WarpPath,
    warps: int,
    resident: int,
    blocks: int,
    latency: int,
    bandwidth: float,
    useful: float,
) -> Replay:
    """Run ``blocks`` blocks of ``warps`` warps, ``resident`` at a time, on one multiprocessor.

    Args:
        latency: clocks of a DRAM load.
        bandwidth: DRAM bytes a clock of this multiprocessor.
        useful: share of the lanes' bytes that masks let through.
    """
    issues = path.length * warps
    waves = max(1, MOST_ISSUES // (issues * resident))
    blocks = min(blocks, waves * resident)
    cut = min(1.0, MOST_ISSUES / (issues * blocks))
    every = [times for _, times in path.pieces]
    runs = []
    for trips in (_cut(every, cut / 2), _cut(every, cut)) if cut < 1 else (every,):
        stream = [i for (piece, _), n in zip(path.pieces, trips, strict=True) for i in piece * n]
        processor = _Multiprocessor(stream, warps, latency, bandwidth, useful)
        runs.append((sum(trips), processor, processor.run(blocks, resident)))
    (first, before, _), (last, after, found) = runs[0], runs[-1]
    if first == last:
        return found
    # Start and end of a block weigh too much in a short loop: add the trips left out at the pace of
    # those that only the longer run has.
    more = (sum(every) - last) / (last - first)
    moved, clocks = (b + more * (b - a) for a, b in zip(before.totals, after.totals, strict=True))
    return replace(found, share=moved / bandwidth / clocks)


def _cut(every: Sequence[int], share: float) -> list[int]:
    """Return the trips of each piece: of long loops only a share, at least 8."""
    return [times if times < 9 else max(8, int(times * share)) for times in every]
