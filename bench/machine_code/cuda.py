"""Predict the speed of the CUDA C++ kernels of ``csrc/``; needs nvcc."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aot
import torch
from aot_cases import TOKENS

from machine_code.chips import PARAMETERS_AT
from machine_code.flow import name_tensors, trace
from machine_code.grids import Grid
from machine_code.predict import Prediction, judge
from machine_code.sass import Instruction, disassemble
from prfl_fast.kernels.runtime import cuda_launch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
HEADS, TILE = 8, 16  # heads of the reward; tokens of a tile
# Source, kernel, pointers in the order of its parameters, choice of the launch, shared memory.
KERNELS = {
    "forward": (
        "query_pool.cu", "query_pool_partial", ("x", "queries", "maxima", "sums", "partials"),
        cuda_launch.pool_launch, cuda_launch.pool_shared_bytes,
    ),
    "backward": (
        "query_pool_backward.cu", "query_pool_backward_kernel",
        ("x", "queries", "grad", "lse", "delta", "dx", "partials"),
        cuda_launch.pool_backward_launch, cuda_launch.pool_backward_shared_bytes,
    ),
}  # fmt: skip


def predict_query_pool(arch: int, match: str = "") -> Iterator[Prediction]:
    """Yield the predictions of query_pool's cases with ``match`` in their label; none without nvcc.

    Warps of a block and blocks of a cluster are constants in the machine code that is read; the
    shipped kernels take them at launch.
    """
    if shutil.which("nvcc") is None:
        return
    for part in KERNELS:
        for dim in (1536, 3072, 5120):
            label = f"{part} bf16 D={dim} H={HEADS} CUDA C++"
            found = _predict(part, label, dim, arch) if match in label else None
            if found is not None:
                yield found


def _predict(part: str, label: str, dim: int, arch: int) -> Prediction | None:
    source, kernel, names, choose, shared_bytes = KERNELS[part]
    launch = choose(1, TOKENS, HEADS, dim, torch.bfloat16, divmod(arch, 10))
    if launch is None:
        return None
    entry = f"{kernel}I13__nv_bfloat16Li{launch.width}E"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        target = f"{arch}a" if arch == 90 else str(arch)
        command = f"nvcc -cubin -O3 -std=c++17 --expt-relaxed-constexpr -o {cubin} {CSRC / source}"
        command += f" -gencode arch=compute_{target},code=sm_{target}"
        command += f" -DPRFL_FAST_WARPS={launch.warps} -DPRFL_FAST_CLUSTER={launch.cluster}"
        subprocess.run(command.split(), check=True)
        code = disassemble(cubin, aot.cuobjdump(), entry)
        usage = subprocess.check_output([aot.cuobjdump(), "-res-usage", cubin], text=True)
    found = re.search(rf"{entry}.*\n.*REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{entry} is not in the output of cuobjdump -res-usage: {usage}")
    registers, *spilled = map(int, found.groups())
    shared = 1024 * (arch >= 90) + shared_bytes(launch.width, launch.warps, launch.cluster)
    used = aot.Resources("query_pool", label, arch, launch.warps, registers, sum(spilled), shared)
    offsets = {PARAMETERS_AT[arch // 10] + 8 * i: f"{n}_ptr" for i, n in enumerate(names)}

    def level(i: Instruction) -> str:
        if i.op == "LDGSTS" or i.op == "STG" and "dx_ptr" in i.tensor:
            return "DRAM"
        return "L1" if i.op == "STG" else "L2"

    name_tensors(code, offsets, level)
    streams = {name: TOKENS * dim for name in ("x_ptr", "dx_ptr") if name[:-4] in names}
    trips = [-(-TOKENS // TILE // launch.splits)]
    partials = 4 * HEADS * dim * launch.splits
    grid = Grid(launch.splits * launch.cluster, trips, streams, partials)
    return judge(used, trace(code, trips, every=True), grid, dict.fromkeys(streams, 2))
