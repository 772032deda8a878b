"""Measure a GPU's ceilings: copies, bf16 and FP8 products, attention backends, host copies.

Other suites compare their times with these. CUDA only.
"""

import itertools
from typing import Any

import harness
import report
import torch
import torch.nn.functional as F
from harness import PRESETS, Context, Preset, SuiteResult, Table, UnavailableError
from torch.nn.attention import SDPBackend, sdpa_kernel

from prfl_fast import kernels

MATMUL = 8192
SHAPES = tuple(PRESETS[name] for name in ("wan1.3b-480p", "wan14b-480p", "wan14b-720p"))
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
HOST_BYTES = 1 << 30


def _time(thunk: harness.Thunk, device: torch.device, seconds: float = 0.3) -> harness.Timing:
    return harness.time_side_by_side({"it": thunk}, device, seconds=seconds)["it"]


def _case(name: str, timing: harness.Timing, **work: float) -> dict[str, Any]:
    return {"fact": name, "times": timing.record(), **work}


def matmul(device: torch.device, side: int = MATMUL) -> harness.Thunk:
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    return lambda: a @ b


def matmul_fp8(device: torch.device, side: int = MATMUL, fast: bool = False) -> harness.Thunk:
    """Return an FP8 product with one scale per row of the first and column of the second matrix."""
    draws = (torch.randn(side, side, device=device) for _ in range(2))
    (a, scale_a), (b, scale_b) = (kernels.quantize_fp8(x) for x in draws)
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
    return lambda: torch._scaled_mm(a, b.t(), scale_a, scale_b.t(), **options)


def host_copies(device: torch.device, count: int = HOST_BYTES) -> dict[str, harness.Thunk]:
    """Return copies of pinned host memory to the device and back."""
    host = torch.empty(count, dtype=torch.uint8).random_().pin_memory()
    there = torch.empty(count, dtype=torch.uint8, device=device)
    return {
        "host to device, pinned": lambda: there.copy_(host, non_blocking=True),
        "device to host, pinned": lambda: host.copy_(there, non_blocking=True),
    }


def _simple(device: torch.device) -> list[dict[str, Any]]:
    """Measure copies and matrix products; record the reason for those that cannot run."""
    cases = [{"fact": "device copy, read + write", "bytes_per_s": harness.copy_ceiling(device)}]
    work = 2.0 * MATMUL**3
    for name, make in (("matmul bf16", matmul), ("matmul FP8, row-wise scales", matmul_fp8)):
        name = f"{name}, {MATMUL}³"
        try:
            timing = _time(make(device), device)
            cases.append(_case(name, timing, flops_per_s=work / timing.median))
        except RuntimeError as error:
            cases.append({"fact": name, "skipped": str(error).splitlines()[0]})
    for name, thunk in host_copies(device).items():
        timing = _time(thunk, device, seconds=1.0)
        cases.append(_case(name, timing, bytes_per_s=HOST_BYTES / timing.median))
    return cases


def _attention_case(preset: Preset, name: str, device: torch.device) -> dict[str, Any]:
    """Time one backend of scaled_dot_product_attention at one size, forward and backward."""
    shape = (1, preset.heads, preset.tokens, preset.dim // preset.heads)
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
    q, k, v = (torch.randn(shape, **options) for _ in range(3))
    case: dict[str, Any] = {"fact": f"attention {name}, {preset.name}"}
    case |= {"tokens": preset.tokens, "heads": preset.heads}
    try:
        with sdpa_kernel(BACKENDS[name]):
            out = F.scaled_dot_product_attention(q, k, v)
            grad = torch.randn_like(out)
            thunks: dict[str, harness.Thunk] = {
                "forward": lambda: F.scaled_dot_product_attention(q, k, v),
                "backward": lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True),
            }
            times = {n: _time(t, device, seconds=0.5) for n, t in thunks.items()}
    except RuntimeError as error:
        return case | {"skipped": str(error).splitlines()[0]}
    work = 4.0 * preset.tokens**2 * preset.dim
    factors = {"forward": 1, "backward": 2.5}
    rates = {n: factor * work / times[n].median for n, factor in factors.items()}
    return case | {"times": {n: t.record() for n, t in times.items()}, "flops_per_s": rates}


def run(context: Context) -> SuiteResult:
    """Measure the device, which must be a CUDA device."""
    if context.device.type != "cuda":
        raise UnavailableError("the facts suite measures a GPU; run it on a machine with one")
    simple, attention = _simple(context.device), []
    for preset, name in context.each(itertools.product(SHAPES, BACKENDS), "facts"):
        attention.append(_attention_case(preset, name, context.device))
        torch.cuda.empty_cache()
    body = []
    for case in simple:
        if "skipped" in case:
            body.append([case["fact"], report.BLANK, case["skipped"]])
            continue
        if "bytes_per_s" in case:
            rate = f"{case['bytes_per_s'] / 1e9:.4g} GB/s"
        else:
            rate = f"{case['flops_per_s'] / 1e12:.4g} TFLOP/s"
        body.append([case["fact"], report.seconds(case.get("times", {}).get("median_s")), rate])
    rows = []
    for case in attention:
        if "skipped" in case:
            rows.append([case["fact"], *[report.BLANK] * 3, case["skipped"]])
            continue
        line = [case["fact"]]
        for part in ("forward", "backward"):
            line.append(report.seconds(case["times"][part]["median_s"]))
            line.append(f"{case['flops_per_s'][part] / 1e12:.3g} TFLOP/s")
        rows.append(line)
    columns = ["backend and size", "forward", "rate", "backward", "rate"]
    notes = ["Backward counted as 2.5 times the forward's FLOPs."]
    tables = [
        Table("facts", "Device facts", ["what", "time", "rate"], body, ["Random data; medians."]),
        Table("facts-attention", "Attention backends", columns, rows, notes),
    ]
    return SuiteResult(tables, [*simple, *attention])
