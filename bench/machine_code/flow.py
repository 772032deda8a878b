"""Follow a warp through a kernel, and kernel parameters to the accesses that they address."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from machine_code.sass import Graph, Instruction, Loop

_REGISTER = re.compile(r"(?<![A-Z0-9.])(UR|R)(\d+)")
_CONSTANT = re.compile(r"c\[0x0\]\[(?:UR\d+\+)?0x([0-9a-f]+)\]")
GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
_NO_RESULT = ("STS", "ISETP", "FSETP", "UISETP", "BRA", "EXIT", "BAR")
_NO_POINTER = ("SHFL", "LDS", "LDSM", "MUFU")  # their results never address memory here

Carried = frozenset[int]


class _Registers:
    """Map registers to the offsets of the parameters that their values come from."""

    def __init__(self) -> None:
        self.carried: dict[str, Carried] = {}

    def of(self, text: str) -> Carried:
        """Return the offsets behind the constants and registers of an operand list."""
        found = {int(offset, 16) for offset in _CONSTANT.findall(text)}
        for kind, number in _REGISTER.findall(text):
            found |= self.carried.get(kind + number, frozenset())
        return frozenset(found)

    def address(self, i: Instruction) -> Carried:
        """Return the offsets behind the address of a global access."""
        inside = re.findall(r"\[([^\[\]]*)\]", re.sub(r"desc\[UR\d+\]", "", i.operands))
        text = (inside[-1] if i.op == "LDGSTS" else inside[0]) if inside else ""
        found: set[int] = set()
        for kind, number in _REGISTER.findall(text):
            for k in range(2 if ".64" in text else 1):
                found |= self.carried.get(f"{kind}{int(number) + k}", frozenset())
        return frozenset(found)

    def write(self, i: Instruction) -> None:
        """Update the result registers of an instruction that is no global access."""
        first, _, rest = i.operands.partition(",")
        results = _REGISTER.findall(first)
        if not results or i.op in _NO_RESULT:
            return
        kind, number = results[0][0], int(results[0][1])
        carried = self.of(rest)
        wide = 2 if ".64" in i.name or "WIDE" in i.name or i.op == "CS2R" else 1
        if i.op in ("LDC", "ULDC", "LDCU"):
            for k in range(4 if ".128" in i.name else wide):
                offsets = frozenset({min(carried) + 4 * k}) if carried else frozenset()
                self.carried[f"{kind}{number + k}"] = offsets
            return
        if i.op in _NO_POINTER:
            carried = frozenset()
        for k in range(wide):
            key = f"{kind}{number + k}"
            kept = self.carried.get(key, frozenset()) if i.predicate else frozenset()
            self.carried[key] = carried | kept


def name_tensors(
    code: Sequence[Instruction],
    pointers: Mapping[int, str],
    level: Callable[[Instruction], str],
) -> None:
    """Set ``tensor`` and ``level`` of every global access.

    Parameters flow along the registers in program order, twice for values carried by loops.

    Args:
        pointers: the name of each pointer parameter by its offset in constant bank 0.
        level: returns the level of an access whose ``tensor`` is set.
    """
    registers = _Registers()
    for _ in range(2):
        for i in code:
            if i.op not in GLOBAL:
                registers.write(i)
                continue
            names = {pointers[o] for o in registers.address(i) if o in pointers}
            i.tensor = "/".join(sorted(names))
            if i.op == "LDG":
                loaded = _REGISTER.findall(i.operands)
                for k in range(max(1, i.width // 4) if loaded else 0):
                    registers.carried[f"R{int(loaded[0][1]) + k}"] = frozenset()
    for i in code:
        if i.tensor:
            i.level = level(i)


@dataclass(frozen=True)
class WarpPath:
    """Hold what a warp runs: pieces of straight code, and how often each runs.

    Attributes:
        loop: the piece that moves most bytes: one trip of the token loop; without one, everything.
        conditional: number of instructions of the loop that only some trips run.
    """

    pieces: list[tuple[list[Instruction], int]]
    loop: list[Instruction]
    conditional: int

    @property
    def length(self) -> int:
        """Return the number of instructions that a warp issues."""
        return sum(len(piece) * times for piece, times in self.pieces)


def moved_bytes(code: Iterable[Instruction]) -> int:
    """Return the bytes that a lane reads from or writes to DRAM."""
    return sum(i.width for i in code if i.level == "DRAM" or i.op in ("STG", "LDGSTS"))


def _token_loops(graph: Graph) -> list[Loop]:
    """Return the outermost loops that move bytes: the busiest, and those before and after it."""
    loops = graph.loops()
    tops = [x for x in loops if not any(x.body < y.body for y in loops)]
    tops = [x for x in tops if moved_bytes(graph.instructions(x.body))]
    if not tops:
        return []
    hot = max(tops, key=lambda x: (moved_bytes(graph.instructions(x.body)), -x.header))
    before_or_after = graph.dominators[hot.header]
    return [
        x for x in tops if x.header in before_or_after or hot.header in graph.dominators[x.header]
    ]


def _spine(graph: Graph, loops: list[Loop]) -> set[int]:
    """Return the blocks that every warp of a full tile runs, with the headers of loops."""
    ends = [
        k for k, block in enumerate(graph.blocks)
        if graph.code[block[-1]].op == "EXIT" and not graph.code[block[-1]].predicate
    ]  # fmt: skip
    if loops:
        ends = [k for k in ends if loops[-1].header in graph.dominators[k]] or ends
    last = max(ends, default=len(graph.blocks) - 1)
    spine = set(graph.dominators[last])
    for loop in loops:
        spine |= graph.dominators[loop.header]
    if not loops:  # blocks that a mask may skip run too
        inner = set().union(*(x.body for x in graph.loops()))
        spine |= set(range(last + 1)) - inner
    return spine


def trace(code: list[Instruction], trips: Sequence[int], every: bool = False) -> WarpPath:
    """Return the path of a warp of a full block.

    Every trip of a loop runs the blocks that dominate its end; the other blocks of the loop run
    once, before it.

    Args:
        trips: trips of each token loop, in order; the last counts for the rest. Empty: no loop.
        every: every trip runs all blocks of a loop, except those of one instruction (the way around
            a cluster's barrier).
    """
    graph = Graph(code)
    loops = _token_loops(graph) if trips else []
    pieces: list[tuple[list[Instruction], int]] = []
    best, conditional, seen = -1, 0, set()
    hot: list[Instruction] = []
    for k in sorted(_spine(graph, loops)):
        loop = next((x for x in loops if k in x.body), None)
        if loop is None:
            pieces.append((graph.instructions({k}), 1))
            continue
        if loop.header in seen:
            continue
        seen.add(loop.header)
        always = {
            b
            for b in loop.body
            if b in graph.dominators[loop.latch] or every and len(graph.blocks[b]) > 1
        }
        trip, rare = graph.instructions(always), graph.instructions(loop.body - always)
        count = trips[min(len(seen), len(trips)) - 1]
        pieces += [(rare, 1), (trip, count)] if count > 0 else []
        if moved_bytes(trip) > best:
            best, hot, conditional = moved_bytes(trip), trip, len(rare)
    if best < 0:
        hot = [i for piece, _ in pieces for i in piece]
    return WarpPath(pieces, hot, conditional)
