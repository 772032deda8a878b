"""Describe GPUs and their instructions for the replay of machine code.

Latencies and throughputs of Hopper's pipes are public microbenchmarks (arXiv 2402.13499) and the
throughput table of the CUDA programming guide; other architectures use the same numbers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Hold multiprocessors, clock in Hz, copy rate (read + written) in bytes/s and L2 in bytes."""

    processors: int
    clock: float
    copy_rate: float
    l2_bytes: float


# The GPU that stands for each architecture: A100, H200, B200, RTX 5090.
CHIPS = {
    80: Chip(108, 1.41e9, 1.7e12, 40e6),
    90: Chip(132, 1.98e9, 4.3e12, 50e6),
    100: Chip(148, 1.96e9, 7.2e12, 126e6),
    120: Chip(170, 2.4e9, 1.55e12, 96e6),
}
# Clocks of a DRAM load while DRAM is busy: the least certain number, hence three.
DRAM_LATENCIES = (800, 1200, 1600)
L1_LATENCY, L2_LATENCY = 40, 280
# Clocks from the last warp's arrival at a barrier until the others go on: of a block, of a cluster
# (a fence, a store to another multiprocessor and the barrier; about 180 for each of the last two).
BARRIER, CLUSTER_BARRIER = 12, 400
# First byte of the parameters in constant bank 0, by major version.
PARAMETERS_AT = {8: 0x160, 9: 0x210, 10: 0x380, 12: 0x380}
SHARED_KB = {80: 164, 90: 228, 100: 228, 120: 100}
MAX_WARPS = {80: 64, 90: 64, 100: 64, 120: 48}
MAX_BLOCKS = {80: 32, 90: 32, 100: 32, 120: 24}

# Clocks until a result is there, for instructions that signal it through a scoreboard.
LATENCY = {
    "SHFL": 24, "LDS": 30, "LDSM": 33, "MUFU": 22, "F2F": 22, "F2I": 22, "I2F": 22, "I2I": 22,
    "FRND": 22, "S2R": 25, "S2UR": 25, "LDC": 35, "ULDC": 30, "LDCU": 30, "VOTE": 14, "REDUX": 30,
    "CREDUX": 30, "R2UR": 14, "POPC": 14, "DADD": 40, "DMUL": 40, "DFMA": 40, "HMMA": 34,
    "IMMA": 34, "QMMA": 34, "MOVM": 30, "BREV": 14, "FLO": 14,
}  # fmt: skip
MUFU = {"MUFU", "F2F", "F2I", "I2F", "I2I", "FRND", "POPC", "FLO", "BREV"}
MEMORY = {
    "LDG", "STG", "LDGSTS", "LDS", "LDSM", "STS", "STSM", "SHFL", "ATOMG", "ATOMS", "RED", "MOVM",
    "LDL", "STL", "REDUX", "ST",
}  # fmt: skip
# Instructions that hold none of a partition's pipes: uniform datapath, control flow, constants.
PIPELESS = MEMORY | {
    "UIADD3", "UIMAD", "UMOV", "ULOP3", "USHF", "ULEA", "UISETP", "USEL", "ULDC", "LDCU", "S2UR",
    "R2UR", "UPRMT", "UPLOP3", "UP2UR", "USGXT", "UBMSK", "UFLO", "UPOPC", "UCLEA", "BAR", "BRA",
    "EXIT", "NOP", "S2R", "LDC", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "CALL", "RET",
    "YIELD", "ERRBAR", "MEMBAR", "CS2R", "VOTE", "FENCE", "ELECT", "UCGABAR_ARV", "UCGABAR_WAIT",
    "CGAERRBAR",
}  # fmt: skip
# Pipe of an operation and the clocks for which a warp holds it; the rest is "alu" for 2.
HELD = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"), ("fma", 1)),
    **dict.fromkeys(("HFMA2", "HADD2", "HMUL2"), ("fma", 2)),
    **dict.fromkeys(("HMMA", "IMMA", "QMMA", "BMMA"), ("tensor", 8)),
    **dict.fromkeys(("DADD", "DMUL", "DFMA", "DSETP"), ("fp64", 2)),
    **dict.fromkeys(MUFU, ("mufu", 8)),
    **dict.fromkeys(PIPELESS, ("", 0)),
}


def pipe_of(name: str) -> tuple[str, int]:
    """Return the pipe that an instruction (with modifiers) holds, and for how many clocks."""
    op = name.partition(".")[0]
    if op == "IMAD":  # moves, shifts and sums by IMAD are as fast as FFMA
        fast = any(m in name for m in ("MOV", "SHL", "IADD")) or "U32" in name
        return "fma", 1 if fast and "WIDE" not in name else 2
    return HELD.get(op, ("alu", 2))


def resident_blocks(arch: int, registers: int, shared: int, warps: int) -> int:
    """Return the blocks of ``warps`` warps that a multiprocessor of ``sm_<arch>`` holds.

    ``registers`` are those of a thread, ``shared`` the bytes of a block.
    """
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = SHARED_KB[arch] * 1024 // (shared + 1024)  # the system takes 1 KiB of each block
    return min(by_registers, by_shared, MAX_WARPS[arch] // warps, MAX_BLOCKS[arch])
