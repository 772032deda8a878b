"""Parse the listing of ``cuobjdump -sass`` and find its basic blocks and loops."""

import functools
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:(@!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;"
    r"\s*/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND_WORD = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


@dataclass
class Instruction:
    """Hold one instruction with its control bits (Volta and later).

    Attributes:
        at: address.
        name: opcode with modifiers.
        stall: clocks until the warp may issue again.
        wait: mask of scoreboards to wait for.
        write_bar, read_bar: scoreboard set until the result is there, or the operands are read;
            7 for none.
        tensor: kernel parameters behind a global access, joined by a slash.
        level: where a global access is served: ``DRAM``, ``L2`` or ``L1``.
    """

    at: int
    predicate: str
    name: str
    operands: str
    stall: int = 1
    write_bar: int = 7
    read_bar: int = 7
    wait: int = 0
    tensor: str = ""
    level: str = ""

    # The replay reads both a million times.
    @functools.cached_property
    def op(self) -> str:
        return self.name.partition(".")[0]

    @functools.cached_property
    def width(self) -> int:
        """Return the bytes that a lane moves by a memory instruction."""
        for bits in (256, 128, 64):
            if f".{bits}" in self.name:
                return bits // 8
        narrow = re.search(r"\.[US](16|8)\b", self.name)
        return int(narrow[1]) // 8 if narrow else 4


def parse(listing: str, entry: str | None = None) -> list[Instruction]:
    """Return the instructions of a listing, only of functions with ``entry`` in their names."""
    code: list[Instruction] = []
    wanted = entry is None
    for line in listing.splitlines():
        if "Function :" in line:
            wanted = entry is None or entry in line
        elif wanted and (m := _LINE.match(line)):
            code.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4]))
        elif wanted and code and (m := _SECOND_WORD.match(line)):
            bits, last = int(m[1], 16) >> 41, code[-1]
            last.stall, last.write_bar = bits & 15, bits >> 5 & 7
            last.read_bar, last.wait = bits >> 8 & 7, bits >> 11 & 63
    return code


def disassemble(cubin: Path, cuobjdump: str, entry: str | None = None) -> list[Instruction]:
    """Return the instructions of a cubin; raise ``RuntimeError`` if the tool fails."""
    run = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(run.stderr)
    return parse(run.stdout, entry)


@dataclass(frozen=True)
class Loop:
    """Hold the basic blocks of a natural loop: first, the one that jumps back, and all."""

    header: int
    latch: int
    body: frozenset[int]


class Graph:
    """Hold the basic blocks of a kernel, their successors and dominators.

    Blocks are numbered in the order of their addresses; ``blocks[k]`` is a range of instructions.
    """

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        targets = self._targets()
        ends = (n for n, i in enumerate(code) if n in targets or i.op in ("EXIT", "RET"))
        starts = {0, *targets.values(), *(n + 1 for n in ends)}
        bounds = [*sorted(s for s in starts if s < len(code)), len(code)]
        self.blocks = [range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        number = {b.start: k for k, b in enumerate(self.blocks)}
        self.successors: list[list[int]] = []
        for k, block in enumerate(self.blocks):
            after = [number[targets[block[-1]]]] if block[-1] in targets else []
            if not self._leaves(code[block[-1]]) and k + 1 < len(self.blocks):
                after.append(k + 1)
            self.successors.append(after)
        self.predecessors: list[list[int]] = [[] for _ in self.blocks]
        for k, after in enumerate(self.successors):
            for a in after:
                self.predecessors[a].append(k)
        self.dominators = self._dominators()

    def _targets(self) -> dict[int, int]:
        index = {i.at: n for n, i in enumerate(self.code)}
        targets = {}
        for n, i in enumerate(self.code):
            address = re.search(r"0x([0-9a-f]+)", i.operands)
            if i.op in ("BRA", "BRX", "JMP") and address and ".DIV" not in i.name:
                targets[n] = index.get(int(address[1], 16), len(self.code) - 1)
        return targets

    @staticmethod
    def _leaves(last: Instruction) -> bool:
        """Return True if control never reaches the instruction after ``last``."""
        # A warp whose lanes agree never takes BRA.DIV.
        conditional = last.predicate or ".DIV" in last.name
        conditional = conditional or re.match(r"!?U?P\d", last.operands)
        return last.op in ("BRA", "EXIT", "RET") and not conditional

    def _dominators(self) -> list[set[int]]:
        every = set(range(len(self.blocks)))  # also the result of a block that nothing reaches
        found = [{0}, *(set(every) for _ in self.blocks[1:])]
        changed = True
        while changed:
            changed = False
            for k in range(1, len(self.blocks)):
                reached = [found[p] for p in self.predecessors[k]]
                new = (set.intersection(*reached) if reached else every) | {k}
                changed |= new != found[k]
                found[k] = new
        return found

    def loops(self) -> list[Loop]:
        """Return the largest natural loop of each header.

        The jump to itself that ends every kernel is left out.
        """
        largest: dict[int, Loop] = {}
        for latch, after in enumerate(self.successors):
            for header in after:
                trap = header == latch and len(self.blocks[header]) == 1
                if header not in self.dominators[latch] or trap:
                    continue
                body, stack = {header, latch}, [latch]
                while stack:
                    k = stack.pop()
                    more = [] if k == header else [p for p in self.predecessors[k] if p not in body]
                    body.update(more)
                    stack += more
                if header not in largest or len(body) > len(largest[header].body):
                    largest[header] = Loop(header, latch, frozenset(body))
        return sorted(largest.values(), key=lambda loop: loop.header)

    def instructions(self, numbers: set[int] | frozenset[int]) -> list[Instruction]:
        """Return the instructions of some basic blocks, in order of addresses."""
        return [self.code[n] for k in sorted(numbers) for n in self.blocks[k]]
