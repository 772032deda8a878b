"""Check and time the operations of prfl_fast.kernels; the cases are those of the kernels suite."""

import functools
from dataclasses import replace
from typing import Any

import harness
import torch
from harness import PRESETS, Preset
from suites.kernel_cases import CASES, POOL, Case

from quick.measure import error_of, reference, timed
from quick.worker import Worker

REAL = tuple(
    replace(PRESETS[f"wan{name}"], name=name) for name in ("14b-480p", "1.3b-480p", "14b-720p")
)
TINY = Preset("tiny", 96, 2, 192, 2, (3, 8, 10), 16, 32)
# Most valuable first: a run that is cut short has these.
FIRST = ("bias_gelu", "residual_norm_modulate", "qk_norm_rope", "norm_modulate", "gated_residual")
HALF_ONLY = ("fp8_linear", "rollout_attention")


@functools.cache
def operations() -> dict[str, Case]:
    """Return the cases by name, the most valuable first."""
    cases = sorted([*CASES, POOL], key=lambda case: case.name not in FIRST)
    return {case.name.partition(" (")[0]: case for case in cases}


def sizes(worker: Worker) -> tuple[Preset, ...]:
    """Return the sizes that are measured; tiny ones of the same names in a dry run."""
    return tuple(replace(TINY, name=p.name) for p in REAL[:2]) if worker.dry else REAL


def with_grid(preset: Preset, frames: int, height: int, width: int) -> Preset:
    """Return a preset with another grid of tokens."""
    return replace(preset, latent=(frames, 2 * height, 2 * width))


def listed(outputs: Any) -> list[torch.Tensor]:
    """Return one or several outputs as a list."""
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def inputs(
    worker: Worker, case: Case, preset: Preset, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    """Draw inputs; leaves require gradients."""
    generator = torch.Generator(worker.device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=worker.device, dtype=dtype)

    with torch.no_grad():
        made = case.make(preset, randn, worker.device, dtype)
    return {n: t.requires_grad_() if n in case.leaves else t for n, t in made.items()}


def results(
    case: Case, tensors: dict[str, Any], run: Any, cotangents: list[torch.Tensor] | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return outputs and gradients, and the outputs' gradients that were used."""
    outputs = listed(case.decode(run(tensors)))
    if not case.leaves:
        return [o.detach() for o in outputs], []
    if cotangents is None:
        generator = torch.Generator(outputs[0].device).manual_seed(99)
        cotangents = [
            torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs
        ]
    given = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, [tensors[n] for n in case.leaves], given)
    return [*(o.detach() for o in outputs), *gradients], cotangents


def widened(case: Case, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs in float64."""
    wide = {n: t.detach().double() if t.is_floating_point() else t for n, t in tensors.items()}
    return {n: t.requires_grad_() if n in case.leaves else t for n, t in wide.items()}


def verify(worker: Worker, case: Case, preset: Preset, dtype: torch.dtype) -> dict[str, Any]:
    """Compare outputs and gradients with float64, beside those of plain PyTorch in the dtype."""
    tensors = inputs(worker, case, preset, dtype)
    ours, cotangents = results(case, tensors, case.ours, None)
    again, _ = results(case, tensors, case.ours, cotangents)
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    del again
    with reference():
        plain, _ = results(case, tensors, lambda t: case.naive(t, torch.float32), cotangents)
        wide = widened(case, tensors)
        exact, _ = results(case, wide, lambda t: case.naive(t, torch.float64), cotangents)
    names = [f"out{i}" for i in range(len(ours) - len(case.leaves))]
    names += [f"d_{n}" for n in case.leaves]
    slack, worst, errors = 4 * torch.finfo(dtype).eps, (0.0, ""), {}
    for name, a, b, e in zip(names, ours, plain, exact, strict=True):
        error, base = error_of(a, e), error_of(b, e)
        allowed = 2 * base + slack if case.tolerance is None else case.tolerance
        errors[name] = [error, base]
        worst = max(worst, (error / allowed, f"{name} {error:.1e}, allowed {allowed:.1e}"))
    record = {"ok": worst[0] <= 1, "worst": worst[1], "of_allowed": worst[0]}
    return record | {"same_bits": same, "errors": errors}


def input_sets(worker: Worker, case: Case, preset: Preset, dtype: torch.dtype) -> list[Any]:
    """Draw enough sets of inputs that none is in the L2 cache when its turn comes."""
    sets = [inputs(worker, case, preset, dtype)]
    if worker.cuda:
        count = harness.input_sets(sum(t.nbytes for t in sets[0].values()), worker.device, 8)
        sets += [inputs(worker, case, preset, dtype, seed) for seed in range(1, count)]
    return sets


def time_operation(
    worker: Worker, case: Case, preset: Preset, part: str, run: Any = None, seconds: float = 0.15
) -> dict[str, Any]:
    """Time a forward without gradient, or a backward alone, in bf16 on inputs out of the cache."""
    half = worker.cuda or case.op in HALF_ONLY
    sets = input_sets(worker, case, preset, torch.bfloat16 if half else torch.float32)
    run = run or case.ours

    def forward(tensors: dict[str, Any]) -> Any:
        with torch.no_grad():
            return run(tensors)

    outputs = listed(forward(sets[0]))
    moved = sum(sets[0][n].nbytes for n in case.reads) + sum(o.nbytes for o in outputs)
    thunks = [functools.partial(forward, t) for t in sets]
    if part == "backward":
        leaves = [[t[n] for n in case.leaves] for t in sets]
        graphs = [listed(run(t)) for t in sets]
        given = [torch.randn_like(o) for o in graphs[0]]
        backward = functools.partial(torch.autograd.grad, retain_graph=True)
        thunks = [
            functools.partial(backward, o, x, given) for o, x in zip(graphs, leaves, strict=True)
        ]
        written = case.leaves if case.writes is None else case.writes
        kept = [outputs[0] if n == "out0" else sets[0][n] for n in case.kept]
        moved = sum(t.nbytes for t in (*kept, *given, *(sets[0][n] for n in written)))
    del outputs
    record = timed(worker, thunks, seconds)
    if case.forward_flops is not None:
        flops = case.forward_flops(preset) * (2.5 if part == "backward" else 1)
        return record | {"tflops": flops / record["ms"] / 1e9}
    rate, copied = moved / record["ms"] / 1e6, worker.found("env", "copy").get("gbs")
    percent = 100 * rate / copied if copied else None
    return record | {"bytes": moved, "gbs": rate, "percent": percent}


def smoke_cases(dry: bool) -> list[tuple[str, str, Preset, torch.dtype]]:
    """Return (label, operation, size, dtype): bf16 at two widths, an odd length, then float32."""
    ops, found = operations(), []
    for dtype in (torch.bfloat16, torch.float32):
        for base in REAL[:2]:
            # 3000 tokens: a multiple of 8 and not of 16, like the 32760 of 480p, so that Triton
            # compiles the kernels that the timing stage needs.
            preset = replace(TINY, name=base.name) if dry else with_grid(base, 5, 20, 30)
            found += [(f"{op}, D {base.dim}, {str(dtype)[6:]}", op, preset, dtype) for op in ops]
        if dtype == torch.bfloat16:
            preset = with_grid(TINY, 1, 3, 7) if dry else with_grid(REAL[1], 3, 7, 59)
            found += [(f"{op}, odd L, bfloat16", op, preset, dtype) for op in ops]
    return [c for c in found if not (ops[c[1]].op in HALF_ONLY and c[3] == torch.float32)]
