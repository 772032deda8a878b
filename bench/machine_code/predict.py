"""Predict the share of the copy rate that a compiled kernel reaches, and what limits it."""

import ast
import functools
import hashlib
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import aot
from aot_types import AotCase

from machine_code.chips import CHIPS, DRAM_LATENCIES, MEMORY, PARAMETERS_AT, pipe_of
from machine_code.chips import resident_blocks as blocks_that_fit
from machine_code.flow import WarpPath, name_tensors, trace
from machine_code.grids import GRIDS, Grid, element_sizes
from machine_code.replay import replay
from machine_code.sass import Instruction, disassemble


@dataclass(frozen=True)
class Prediction:
    """Hold the prediction for one case on one architecture.

    Attributes:
        shares: percent of the copy rate at each of ``DRAM_LATENCIES``.
        registers, spilled_bytes: of a thread.
        resident_blocks, resident_warps: of a multiprocessor.
        flying_kb: mean kB of DRAM loads in flight on a multiprocessor, at the middle latency.
        waves: blocks of the grid over blocks resident on the chip.
        pressure: percent of a pipe's time used if the kernel ran at the copy rate, by pipe.
        barriers: number of barriers in one trip of the token loop.
        ideal_us: streamed bytes over the copy rate.
        limits: reasons, in words.
        listing: global accesses, barriers and waits for loads of the token loop.
        code: digest of machine code, grid and model, which determine all of the above; empty for
            CUDA C++.
    """

    op: str
    label: str
    arch: int
    shares: tuple[int, ...]
    registers: int
    spilled_bytes: int
    resident_blocks: int
    resident_warps: int
    flying_kb: float
    waves: float
    pressure: dict[str, int]
    barriers: int
    ideal_us: float
    limits: str
    listing: tuple[str, ...]
    code: str = ""

    @property
    def share(self) -> int:
        """Return the percentage at the middle latency."""
        return self.shares[1]

    @property
    def name(self) -> str:
        return f"{self.op} {self.label}"


def parameter_offsets(case: AotCase, arch: int) -> dict[int, str]:
    """Return the name of each pointer parameter by its offset in constant bank 0."""
    at, found = PARAMETERS_AT[arch // 10], {}
    for name in case.kernel.arg_names:
        kind = case.types.get(name)
        if kind is None:
            continue
        wide = 8 if kind.startswith("*") or kind.startswith(("i64", "fp64")) else 4
        at = -(-at // wide) * wide
        if kind.startswith("*"):
            found[at] = name
        at += wide
    return found


def _follow(case: AotCase, arch: int, kernel: object, grid: Grid, resident: int) -> WarpPath:
    """Return the path of a warp, with the tensor and the level of every access."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])  # type: ignore[attr-defined]
        file.flush()
        code = disassemble(Path(file.name), aot.cuobjdump())

    def level(i: Instruction) -> str:
        if not grid.elements.keys() & set(i.tensor.split("/")):
            return "L1" if i.op == "STG" else "L2"
        # The kernels give this policy to loads of a line that they have just loaded.
        return "L1" if ".EF" in i.name and i.op == "LDG" else "DRAM"

    name_tensors(code, parameter_offsets(case, arch), level)
    path = trace(code, grid.trips)
    if grid.trips and not grid.passes:  # rows of weights and tables come again for every token
        for i in path.loop:
            if i.level == "L2" and i.op == "LDG":
                i.level = "L1"
    if grid.passes and _fits_l2(grid, resident, arch):
        loops = [piece for piece, times in path.pieces if times > 1]
        for piece in loops[1:]:
            for i in piece:
                if i.op in ("LDG", "LDGSTS") and i.level == "DRAM":
                    i.level = "L2"
    return path


def _fits_l2(grid: Grid, resident: int, arch: int) -> bool:
    """Return True if bf16 tiles of all resident blocks fit L2 until their second pass."""
    chip = CHIPS[arch]
    tile = 2 * max(grid.elements.values()) / grid.blocks
    return tile * resident * chip.processors <= chip.l2_bytes


@functools.cache
def _model() -> bytes:
    """Return the sources of the model, without comments."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return "".join(ast.dump(ast.parse(file.read_text())) for file in files).encode()


def predict(
    op: str, case: AotCase, arch: int, known: Mapping[str, Prediction] | None = None
) -> Prediction | None:
    """Compile a case for ``sm_<arch>`` and predict its speed; None if it moves few bytes.

    ``known``: predictions by ``code``, which are returned without another replay.
    """
    grid = GRIDS[op](case, divmod(arch, 10)) if op in GRIDS else None
    if grid is None:
        return None
    kernel = aot.compile_case(case, arch)
    digest = hashlib.sha256(kernel.asm["cubin"] + _model())
    digest.update(
        repr((arch, case.label, kernel.metadata.shared, grid, element_sizes(case))).encode()
    )
    code = digest.hexdigest()[:16]
    if known and code in known:
        return known[code]
    used = aot.resources(op, case, arch, kernel)
    resident = blocks_that_fit(arch, used.registers, used.shared_bytes, used.num_warps)
    path = _follow(case, arch, kernel, grid, resident)
    return replace(judge(used, path, grid, element_sizes(case)), code=code)


def judge(used: aot.Resources, path: WarpPath, grid: Grid, sizes: Mapping[str, int]) -> Prediction:
    """Predict the speed of a compiled kernel; ``sizes``: bytes of an element by pointer."""
    arch, warps, chip = used.capability, used.num_warps, CHIPS[used.capability]
    resident = blocks_that_fit(arch, used.registers, used.shared_bytes, warps)
    ideal = sum(sizes[name] * count for name, count in grid.elements.items())
    lanes = warps * grid.blocks
    moved = 32 * lanes * sum(
        i.width * times for piece, times in path.pieces for i in piece if i.level == "DRAM"
    )  # fmt: skip
    again = sum(
        (times - 1) * sizes[name] * grid.elements[name]
        for name, times in (grid.passes or {}).items()
    )
    again = again if moved > 1.5 * ideal else 0  # otherwise L2 has it
    clocks = ideal / chip.copy_rate * chip.clock
    pressure = _pressure(path, path.length * lanes / chip.processors / clocks)
    per_processor = -(-grid.blocks // chip.processors)
    runs = [
        replay(
            path, warps, resident, per_processor, latency,
            chip.copy_rate / chip.processors / chip.clock,
            min(1.0, (ideal + again) / moved) if moved else 1.0,
        )
        for latency in DRAM_LATENCIES
    ]  # fmt: skip
    # Partial sums are written here and read by a second kernel, at the same rate.
    needed = ideal / (ideal + again + 2 * grid.extra)
    shares = tuple(min(100, round(100 * run.share * needed)) for run in runs)
    waves = grid.blocks / (resident * chip.processors)
    balance = grid.blocks / chip.processors / per_processor
    return Prediction(
        op=used.op,
        label=used.label,
        arch=arch,
        shares=shares,
        registers=used.registers,
        spilled_bytes=used.spilled_bytes,
        resident_blocks=resident,
        resident_warps=resident * warps,
        flying_kb=round(runs[1].mean_bytes / 1e3, 1),
        waves=round(waves, 2),
        pressure=pressure,
        barriers=sum(i.op == "BAR" for i in path.loop),
        ideal_us=round(1e6 * ideal / chip.copy_rate, 1),
        limits=_limits(shares, pressure, waves, balance, (again + 2 * grid.extra) / ideal, grid),
        listing=tuple(_listing(path.loop)),
    )


def _pressure(path: WarpPath, issues_a_clock: float) -> dict[str, int]:
    """Return the percent of their time for which issue slots and pipes are used at copy rate."""
    held: Counter[str] = Counter()
    for i in path.loop:
        pipe, clocks = pipe_of(i.name)
        held[pipe] += clocks
        if i.op in MEMORY:
            held["lsu"] += 1 if i.op == "SHFL" else max(1, i.width // 4)
    each = 100 * issues_a_clock / 4
    found = {pipe: round(each * held[pipe] / len(path.loop)) for pipe in ("alu", "mufu", "tensor")}
    lsu = round(4 * each * held["lsu"] / len(path.loop))
    return {"issue": round(each), **found, "lsu": lsu}


def _limits(
    shares: Sequence[int],
    pressure: dict[str, int],
    waves: float,
    balance: float,
    extra: float,
    grid: Grid,
) -> str:
    """Return the reasons that limit the kernel, in words."""
    reasons = []
    worst = max(pressure, key=lambda pipe: pressure[pipe])
    if pressure[worst] >= 80:
        reasons.append(f"{worst}-bound")
    if shares[0] - shares[-1] >= 12:
        reasons.append("latency: too few bytes in flight")
    if grid.trips and 1.02 < waves < 4 and 0.02 < waves % 1 < 0.5:
        reasons.append(f"tail: {waves:.2f} waves")
    if balance < 0.93:
        reasons.append(f"the grid fills {100 * balance:.0f} % of its last round")
    if extra > 0.08:
        reasons.append(f"partial sums or a second pass: +{100 * extra:.0f} % bytes")
    if shares[1] < 90 and not reasons:
        reasons.append("serial reductions and ramp")
    return "; ".join(reasons) or "bandwidth"


def _listing(loop: list[Instruction]) -> list[str]:
    """Return global accesses, barriers, and the first instruction that waits for each load."""
    lines: list[str] = []
    pending: dict[int, list[str]] = defaultdict(list)
    for n, i in enumerate(loop):
        for bar in (k for k in range(6) if i.wait >> k & 1 and pending[k]):
            loads = " ".join(pending.pop(bar))
            lines.append(f"{n:6d}   waits for {loads}: {i.name} {i.operands[:40]}")
        if i.op in ("LDG", "STG", "LDGSTS", "BAR"):
            text = f"{n:6d} {i.predicate:5s} {i.name:24s} {i.operands[:40]:40s} {i.tensor}"
            lines.append(f"{text} {i.level}")
        if i.op == "LDG" and i.write_bar < 6:
            pending[i.write_bar].append(f"load@{n}")
    return lines
