"""Time the kernels suite by pytest-benchmark: ``pytest bench --benchmark-only``.

The cases, inputs and checks are those of ``bench/suites/kernels.py``; a case whose result is off
fails before it is timed.
"""

from dataclasses import replace

import harness
import pytest
import torch
from suites import kernels

CUDA = torch.cuda.is_available()
CONTEXT = harness.Context(
    device=torch.device("cuda" if CUDA else "cpu"),
    preset=harness.PRESETS["wan1.3b-480p" if CUDA else "tiny"],
)


@pytest.mark.parametrize("part", kernels.PASSES)
@pytest.mark.parametrize("version", ["naive", "prfl_fast"])
@pytest.mark.parametrize("case", kernels.CASES, ids=lambda case: case.name)
def test_operation(benchmark, case, version, part):
    if not benchmark.enabled:
        pytest.skip("a benchmark: run pytest bench --benchmark-only")
    benchmark.group = f"{case.name}, {part}"
    error = kernels.verify(case, CONTEXT)
    tensors = kernels.make_tensors(case, CONTEXT.preset, CONTEXT)
    runs = {"naive": lambda t: case.naive(t, torch.float32), "prfl_fast": case.ours}
    variant = kernels.Variant(replace(case, passes=(part,)), runs[version], [tensors], CONTEXT)
    benchmark.extra_info.update(
        kept_bytes=variant.kept, error=error, shape=str(CONTEXT.preset.grid)
    )
    (thunk,) = variant.thunks(part)

    def timed():
        thunk()
        harness.synchronize(CONTEXT.device)

    benchmark(timed)
