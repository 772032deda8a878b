"""Predict the speed of attention kernels from one trip of their loop over blocks of keys.

Products and issue slots bound them, not bytes. A trip takes the clocks of its products at the peak
rate plus one clock for each instruction of a scheduler's warps, as if nothing overlapped. Prologue,
quantization, the time of a mask and lists of unequal length are left out.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import aot
from aot_cases import OPERATIONS
from aot_types import AotCase
from machine_code.flow import trace
from machine_code.replay import SCHEDULERS
from machine_code.sass import disassemble

ARCH = 90
FLOPS_A_CLOCK = 4096  # of a multiprocessor of ARCH in 16 bits; 8 bits have twice as many
KEYS = 64  # for which clocks are given
PEAK_SHARE = (
    0.75  # of the peak rate that dense 16-bit attention of another package is taken to have
)


@dataclass(frozen=True)
class LoopCost:
    """Hold the cost of ``KEYS`` keys for a block of 128 queries of 128 channels.

    Attributes:
        instructions: of a warp.
        clocks: of a multiprocessor.
    """

    label: str
    instructions: float
    clocks: float


def _cost(op: str, case: AotCase) -> LoopCost:
    kernel = aot.compile_case(case, ARCH)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = disassemble(Path(file.name), aot.cuobjdump())
    c = case.constexprs
    keys = case.types["k_ptr" if "k_ptr" in case.types else "k8_ptr"]
    rate = FLOPS_A_CLOCK * (1 if "bf16" in keys else 2)
    instructions = len(trace(code, [1]).loop) * KEYS / c["BLOCK_N"]
    products = 4 * c["BLOCK_M"] * KEYS * c["D"] / rate
    clocks = products + instructions * case.num_warps / SCHEDULERS
    return LoopCost(f"{op} {case.label}", instructions, clocks)


def loop_costs() -> list[LoopCost]:
    """Return the costs of dense 8-bit attention, and of sparse attention in 16 and in 8 bits.

    The case of 8 bits is the chip's best; the first two clocks are what the others are compared
    with: dense attention of another package in 16 bits, and ours in 8.
    """
    capability = divmod(ARCH, 10)
    dense = next(iter(OPERATIONS["rollout_attention"](capability, False)))
    sparse = list(OPERATIONS["sparse_attention"](capability, False))
    assumed = 4 * 128 * KEYS * 128 / FLOPS_A_CLOCK / PEAK_SHARE
    backend = LoopCost(f"a 16-bit backend at {PEAK_SHARE:.0%} of the peak (assumed)", 0.0, assumed)
    return [backend, _cost("rollout_attention", dense)] + [
        _cost("sparse_attention", case) for case in sparse
    ]
