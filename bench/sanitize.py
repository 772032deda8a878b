"""Run every operation on small odd shapes on the GPU, under compute-sanitizer.

First come the cases of the kernels suite on every backend, then the branches of the CUDA kernels.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import harness
import torch
from suites import kernels

from prfl_fast import kernels as ops

PRESETS = (
    harness.Preset("small", 96, 2, 160, 1, (3, 6, 10), text_tokens=7),
    harness.Preset("narrow", 1536, 12, 320, 1, (1, 2, 14), text_tokens=7),
)
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Call:
    """One call: the shapes of its leaves, and the function of them; ``frozen`` get no gradient."""

    name: str
    op: str
    shapes: dict[str, tuple[int, ...]]
    run: Callable[..., tuple[torch.Tensor, ...]]
    frozen: tuple[str, ...] = ()


def _pool(tokens: int, dim: int, heads: int, **options: tuple[str, ...]) -> Call:
    shapes = {"x": (2, tokens, dim), "queries": (heads, dim)}

    def run(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ops.query_pool(x, queries / dim**0.5)

    name = f"pool {tokens} x {dim}, {heads} heads"
    return Call(name, "query_pool", shapes, run, **options)


def _rope(
    name: str,
    heads: int,
    head_dim: int,
    lengths: tuple[int, int],
    weights: tuple[str, ...] = ("q_weight", "k_weight"),
    per_head: bool = False,
    grid: tuple[int, int, int] | None = None,
    frozen: tuple[str, ...] = (),
) -> Call:
    dim = heads * head_dim
    shapes: dict[str, tuple[int, ...]] = {"q": (2, lengths[0], dim), "k": (2, lengths[1], dim)}
    shapes |= {weight: (head_dim if per_head else dim,) for weight in weights}
    if lengths[0] == lengths[1]:  # rows of a packed projection
        shapes = {"qkv": (2, lengths[0], 3 * dim)} | {w: shapes[w] for w in weights}

    def run(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        options: dict = {"heads": heads, "per_head": per_head}
        if "qkv" in t:
            t["q"], t["k"], _ = t.pop("qkv").split(dim, 2)
        if grid is not None:
            cos, sin = ops.rope_table(9, head_dim, device=t["q"].device)
            options |= {"cos": cos, "sin": sin, "grid": grid, "offset": (1, 0, 2)}
        return ops.qk_norm_rope(**t, **options)

    return Call(f"rope {name}", "qk_norm_rope", shapes, run, frozen)


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


def _results(call: Call, tensors: Tensors, backend: str, wide: bool) -> list[torch.Tensor]:
    leaves = {
        n: (t.double() if wide else t.clone()).requires_grad_(n not in call.frozen)
        for n, t in tensors.items()
    }
    with harness.backend(backend):
        outputs = call.run(**leaves)
        loss = sum((o * o.detach().cos()).sum(dtype=torch.float64) for o in outputs)
        gradients = torch.autograd.grad(loss, [t for t in leaves.values() if t.requires_grad])
    return [*(o.detach() for o in outputs), *gradients]


def run_call(call: Call, dtype: torch.dtype, backend: str, device: torch.device) -> float:
    """Return the largest relative error of outputs and gradients against float64.

    Raises:
        AssertionError: it is above ``TOLERANCE``.
    """
    generator = torch.Generator(device).manual_seed(0)
    tensors = {
        name: torch.randn(shape, device=device, generator=generator).to(dtype)
        for name, shape in call.shapes.items()
    }
    expected = _results(call, tensors, "reference", True)
    given = _results(call, tensors, backend, False)
    error = max(harness.relative_error(a, b) for a, b in zip(given, expected, strict=True))
    assert error <= TOLERANCE[dtype], f"error {error:.1e}"
    return error


def main() -> int:
    """0 if every operation matches plain PyTorch."""
    if not torch.cuda.is_available():
        print("bench/sanitize.py: error: PyTorch sees no CUDA device", file=sys.stderr)
        return 2
    device, status = torch.device("cuda"), 0

    def attempt(name: str, run: Callable[[], float]) -> None:
        nonlocal status
        try:
            print(f"{name}: error {run():.1e}")
        except Exception as failure:  # whatever it is, the other operations are still to be watched
            print(f"{name}: {type(failure).__name__}: {failure}", file=sys.stderr)
            status = 1

    for preset in PRESETS:
        context = harness.Context(device, preset)
        for case in (
            c for c in kernels.CASES if preset.dim % kernels.POOL_HEADS == 0 or c.op != "query_pool"
        ):
            for name in kernels.backends(case, context):
                variant = replace(
                    case, ours=lambda t, name=name, case=case: kernels.run_on(name, case, t)
                )
                attempt(
                    f"{preset.name}: {case.name}, {name}",
                    lambda variant=variant, context=context: kernels.verify(variant, context),
                )
    for call in CALLS:
        case = next(c for c in kernels.CASES if c.op == call.op)
        for name in kernels.backends(case, context):
            for dtype in TOLERANCE:
                attempt(
                    f"{call.name}, {name}, {str(dtype).removeprefix('torch.')}",
                    lambda call=call, dtype=dtype, name=name: run_call(call, dtype, name, device),
                )
    torch.cuda.synchronize()
    return status


if __name__ == "__main__":
    sys.exit(main())
