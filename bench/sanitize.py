"""Run every operation on small odd shapes on the GPU, under compute-sanitizer.

First come the cases of the kernels suite on every backend, then calls that reach other branches.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import harness
import torch
from suites import kernels
from suites.kernel_cases import CASES, POOL_HEADS
from suites.kernel_checks import Case, Draw, Tensors, compare, draw_inputs

from prfl_fast import kernels as ops

PRESETS = (
    harness.Preset("small", 96, 2, 160, 1, (3, 6, 10), text_tokens=7),
    harness.Preset("narrow", 1536, 12, 320, 1, (1, 2, 14), text_tokens=7),
)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _call(
    name: str,
    op: str,
    shapes: dict[str, tuple[int, ...]],
    run: Callable[..., tuple[torch.Tensor, ...]],
    frozen: tuple[str, ...] = (),
) -> Case:
    """Return a case of normal inputs, of which ``frozen`` get no gradient."""

    def naive(tensors: Tensors, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        with harness.backend("reference"):
            return run(**tensors)

    def make(draw: Draw) -> Tensors:
        return {name: draw.randn(*shape) for name, shape in shapes.items()}

    leaves = tuple(name for name in shapes if name not in frozen)
    return Case(name, op, make, leaves, naive, lambda t: run(**t), reads=(), kept=())


def _pool(tokens: int, dim: int, heads: int, **options: tuple[str, ...]) -> Case:
    shapes = {"x": (2, tokens, dim), "queries": (heads, dim)}

    def run(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.query_pool(x, queries / dim**0.5)

    return _call(f"pool {tokens} x {dim}, {heads} heads", "query_pool", shapes, run, **options)


def _rope(
    name: str,
    heads: int,
    head_dim: int,
    lengths: tuple[int, int],
    weights: tuple[str, ...] = ("q_weight", "k_weight"),
    per_head: bool = False,
    grid: tuple[int, int, int] | None = None,
    frozen: tuple[str, ...] = (),
) -> Case:
    dim = heads * head_dim
    shapes = {name: (2, length, dim) for name, length in zip("qk", lengths, strict=True)}
    if lengths[0] == lengths[1]:  # rows of a packed projection
        shapes = {"qkv": (2, lengths[0], 3 * dim)}
    shapes |= dict.fromkeys(weights, (head_dim if per_head else dim,))

    def run(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options: dict = {"heads": heads, "per_head": per_head}
        if "qkv" in t:
            t["q"], t["k"], _ = t.pop("qkv").split(dim, 2)
        if grid is not None:
            cos, sin = ops.rope_table(9, head_dim, device=t["q"].device)
            options |= {"cos": cos, "sin": sin, "grid": grid, "offset": (1, 0, 2)}
        return ops.qk_norm_rope(**t, **options)

    return _call(f"rope {name}", "qk_norm_rope", shapes, run, frozen)


CALLS = (
    _pool(1, 64, 1),
    _pool(100, 88, 3),
    _pool(70, 1536, 8, frozen=("x",)),
    _pool(49, 2048, 8, frozen=("queries",)),
    _pool(40, 5120, 8),
    _pool(33, 640, 12),
    _rope("14B", 40, 128, (6, 6), grid=(1, 2, 3)),
    _rope("cross", 12, 128, (37, 5)),
    _rope("turned", 4, 72, (15, 15), weights=(), grid=(3, 1, 5)),
    _rope("one side", 6, 40, (8, 8), weights=("k_weight",), grid=(1, 4, 2)),
    _rope("per head", 5, 64, (12, 12), per_head=True, grid=(1, 3, 4)),
    _rope("per head, norm", 3, 8, (9, 4), per_head=True, frozen=("q", "k_weight")),
    _rope("8192", 64, 128, (3, 3), grid=(1, 1, 3)),
)


def verify(case: Case, dtype: torch.dtype, context: harness.Context) -> float:
    """Return the largest error of outputs and gradients against float64; hold it to TOLERANCE."""
    tensors = draw_inputs(case, context.preset, context.device, dtype)
    found, _ = compare(case, tensors, dtype, 0)
    error = max(error for error, *_ in found.values())
    assert error <= TOLERANCE[dtype], f"error {error:.1e}"
    return error


def checks(device: torch.device) -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield name and check of every case on each backend that has its operation."""
    for preset in PRESETS:
        context = harness.Context(device, preset)
        for case in CASES:
            if case.op == "query_pool" and preset.dim % POOL_HEADS:
                continue
            for name, variant in variants(case, context):
                label = f"{preset.name}: {case.name}, {name}"
                yield label, partial(kernels.verify, variant, context)
    for call in CALLS:
        for name, variant in variants(call, context):
            for dtype in TOLERANCE:
                label = f"{call.name}, {name}, {str(dtype).removeprefix('torch.')}"
                yield label, partial(verify, variant, dtype, context)


def variants(case: Case, context: harness.Context) -> Iterator[tuple[str, Case]]:
    for name in kernels.backends(case, context):
        yield name, replace(case, ours=partial(kernels.run_on, name, case))


def main() -> int:
    """Return 0 if every operation matches plain PyTorch."""
    if not torch.cuda.is_available():
        print("bench/sanitize.py: error: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    status = 0
    for name, check in checks(torch.device("cuda")):
        try:
            print(f"{name}: error {check():.1e}")
        except Exception as failure:  # whatever it is, the other operations are still to be watched
            print(f"{name}: {type(failure).__name__}: {failure}", file=sys.stderr)
            status = 1
    torch.cuda.synchronize()
    return status


if __name__ == "__main__":
    sys.exit(main())
