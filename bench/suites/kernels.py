"""Measure every operation of prfl_fast.kernels against plain PyTorch.

An operation whose result is off gets no speed-up: outputs and every gradient are compared with
float64 on a small grid (error at most twice the naive one's, plus rounding), and with the naive
result at the timed size. On a GPU all Wan sizes are measured unless one is named; on a CPU, small
shapes, with what the compiled kernels would use of each architecture (resources.py).
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import harness
import report
import torch
from harness import PRESETS, Context, Preset, SuiteResult, Table, Timing, UnavailableError

from prfl_fast.kernels.runtime import registry
from prfl_fast.memory.offload import host_memory
from suites import kernel_checks, resources
from suites.kernel_cases import CASES, POOL
from suites.kernel_checks import PASSES, Case, Tensors

__all__ = ["CASES", "PASSES"]  # also for pytest bench

POOL_TARGET = 8  # times faster than nn.MultiheadAttention on a CPU at 1.3B-480p
CPU_FLOPS = 2e12  # a case above this would take a CPU the better part of a minute
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def make_tensors(case: Case, preset: Preset, context: Context, offset: int = 0) -> Tensors:
    return kernel_checks.draw_inputs(
        case, preset, context.device, context.dtype, context.seed + offset
    )


def verify(case: Case, context: Context) -> float:
    """Return the worst relative error of outputs and gradients against float64, on a small grid.

    Assert that each is at most twice that of the naive formula, plus rounding.
    """
    preset = context.preset.with_grid(*map(min, context.preset.grid, (3, 6, 10)))
    tensors = make_tensors(case, preset, context)
    found, _ = kernel_checks.compare(case, tensors, context.dtype, context.seed + 1)
    for name, (error, plain, limit) in found.items():
        assert error <= limit, f"{name}: error {error:.1e}, naive {plain:.1e}"
    return max(error for error, *_ in found.values())


def backends(case: Case, context: Context) -> list[str]:
    """Return the backends that have this operation, the automatic choice last."""
    available = []
    # Triton's interpreter is for tests, not for timing; the reference is there for the CPU.
    names = ("reference",) if context.device.type == "cpu" else ("triton", "cuda")
    for name in names:
        with contextlib.suppress(UnavailableError), harness.backend(name):
            if registry.report(context.device, context.dtype)[case.op].backend == name:
                available.append(name)
    chosen = registry.report(context.device, context.dtype)[case.op].backend
    return sorted({*available, chosen}, key=lambda name: (name == chosen, name))


class Variant:
    """Run one implementation on its inputs and make thunks of each pass."""

    def __init__(
        self, case: Case, run: Callable[[Tensors], Any], sets: list[Tensors], context: Context
    ) -> None:
        self.case, self.run, self.sets, self.context = case, run, sets, context
        start, first = time.perf_counter(), sets[0]
        parameters = [first[n] for n in case.leaves if n not in (*case.reads, *case.kept)]
        self.outputs: list[tuple[torch.Tensor, ...]] = []
        self.kept = harness.saved_bytes(
            lambda: self.outputs.append(self._forward(first)), exclude=parameters
        )
        (output,) = self.outputs
        self.cotangents = kernel_checks.cotangents(output, context.seed + 1) if case.leaves else []
        self.gradients = self._backward(output, first)
        harness.synchronize(context.device)
        self.first = time.perf_counter() - start

    def results(self) -> list[torch.Tensor]:
        first = self.outputs[0]
        outputs = kernel_checks.as_tuple(self.case.decode(first if len(first) > 1 else first[0]))
        return [*outputs, *self.gradients]

    def forget(self) -> None:
        """Free the tensors that only the comparison needed."""
        del self.gradients
        if "backward" not in self.case.passes:
            self.outputs.clear()

    def thunks(self, part: str) -> list[Callable[[], object]]:
        """Return one function per set of inputs that runs ``forward``, ``backward`` or ``both``."""
        if part == "forward":
            return [partial(self.run, t) for t in self.sets]
        if part == "both":
            return [lambda t=t: self._backward(self._forward(t), t) for t in self.sets]
        self.outputs += [self._forward(t) for t in self.sets[len(self.outputs) :]]
        return [
            partial(self._backward, *pair) for pair in zip(self.outputs, self.sets, strict=True)
        ]

    def _forward(self, tensors: Tensors) -> tuple[torch.Tensor, ...]:
        return kernel_checks.as_tuple(self.run(tensors))

    def _backward(self, outputs: Sequence[torch.Tensor], tensors: Tensors) -> Any:
        return kernel_checks.gradients(self.case, outputs, tensors, self.cotangents)


def _compiled(case: Case) -> Callable[[Tensors], Any]:
    run = torch.compile(lambda t: case.naive(t, torch.float32), dynamic=False)

    def call(tensors: Tensors) -> Any:
        # The timed backward keeps its graph, which buffers donated to it would not survive.
        with torch._functorch.config.patch(donated_buffer=False):
            return run(tensors)

    return call


def _free_bytes(context: Context) -> int:
    if context.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(context.device)[0]
    return host_memory()[0]


def _check_fits(case: Case, preset: Preset, context: Context) -> None:
    """Raise ``UnavailableError`` for a case that this machine cannot hold or finish."""
    widest = preset.ffn_dim if case.op in ("bias_gelu", "gelu_fp8") else preset.dim
    # Inputs, outputs, cotangents, gradients and the naive formula's fp32 temporaries, twice.
    need = 24 * preset.tokens * widest * 4
    free = _free_bytes(context)
    if need > free:
        raise UnavailableError(f"needs about {report.size(need)}, {report.size(free)} are free")
    work = case.naive_flops(preset)
    if context.device.type == "cpu" and work > CPU_FLOPS:
        raise UnavailableError(f"{report.flops(work)} for the baseline, minutes on a CPU")


def _variants(
    case: Case, sets: list[Tensors], context: Context, record: dict[str, Any]
) -> dict[str, Variant]:
    """Run every implementation once, and assert that ours agree with the naive one."""
    runs: dict[str, Callable[[Tensors], Any]] = {"naive": lambda t: case.naive(t, torch.float32)}
    if context.compile_ops:
        runs["compiled"] = _compiled(case)
    runs |= {f"prfl_fast {n}": partial(run_on, n, case) for n in backends(case, context)}
    variants: dict[str, Variant] = {}
    for name, run in runs.items():
        try:
            variants[name] = Variant(case, run, sets, context)
        except Exception as error:
            if name != "compiled":
                raise
            record["compiled_error"] = harness.first_line(error)
    limit = TOLERANCE[context.dtype] if case.tolerance is None else case.tolerance
    for name in (n for n in variants if n.startswith("prfl_fast")):
        pairs = zip(variants[name].results(), variants["naive"].results(), strict=True)
        for i, (value, want) in enumerate(pairs):
            off = harness.relative_error(value, want)
            what = f"{off:.1e} off the naive one at the timed size"
            assert off <= limit, f"{name}, result {i}: {what}"
    return variants


def measure(
    case: Case, preset: Preset, context: Context, ceiling: float, seconds: float = 0.1
) -> dict[str, Any]:
    """Check and time one case, and return a record of plain values.

    Raise ``UnavailableError`` if it does not fit this machine, ``AssertionError`` if it is wrong.
    """
    _check_fits(case, preset, context)
    record: dict[str, Any] = {"case": case.name, "op": case.op, "preset": preset.name}
    record["leaves"] = list(case.leaves)
    record["error"] = verify(case, context)
    sets = [make_tensors(case, preset, context)]
    touched = [t for t in sets[0].values() if t.dim() > 1]
    record["shape"] = list(touched[0].shape)
    count = harness.input_sets(sum(t.nbytes for t in touched), context.device)
    if context.device.type == "cpu" and case.naive_flops(preset) > 1e10:
        count = 1  # arithmetic dominates, cold inputs would only cost memory
    sets += [make_tensors(case, preset, context, offset) for offset in range(1, count)]

    variants = _variants(case, sets, context, record)
    moved = kernel_checks.moved_bytes(case, preset, context.dtype)
    if case.leaves:
        moved["both"] = moved["forward"] + moved["backward"]
    record["bytes"] = moved
    elements = sets[0][case.reads[0]].numel()
    forward, backward = (operations * elements for operations in case.arithmetic)
    record["arithmetic"] = {"forward": forward, "backward": backward, "both": forward + backward}
    record["kept_bytes"] = {name: variant.kept for name, variant in variants.items()}
    for variant in variants.values():
        variant.forget()
    if context.device.type == "cuda":
        record["peak_bytes"] = {
            name: harness.peak_bytes(variant.thunks(case.passes[-1])[0], context.device)
            for name, variant in variants.items()
        }
    record["times"] = {}
    for part in case.passes:
        slow = {n: v for n, v in variants.items() if part == "both" and v.first > 2}
        timings = {n: Timing.of([v.first]) for n, v in slow.items()}
        thunks = {n: v.thunks(part) for n, v in variants.items() if n not in slow}
        timings |= harness.time_side_by_side(thunks, context.device, seconds=seconds)
        record["times"][part] = {name: timing.record() for name, timing in timings.items()}
    if case.forward_flops is not None:
        work = case.forward_flops(preset)
        record["flops"] = {"forward": work, "backward": 2.5 * work, "both": 3.5 * work}
    record["copy_ceiling"] = ceiling
    return record


def run_on(name: str, case: Case, tensors: Tensors) -> Any:
    """Return the case's outputs by one backend.

    An operation without own kernels, as fp8_linear, is listed as "reference": it runs on "auto".
    """
    with harness.backend("auto" if name == "reference" else name):
        return case.ours(tensors)


def _ours(times: dict[str, Any]) -> str:
    """Return the variant reported as prfl_fast: the automatic choice, which is measured last."""
    return [name for name in times if name.startswith("prfl_fast")][-1]


def _columns(measured: list[dict[str, Any]]) -> list[str]:
    """Return the implementations that have a column: naive first, prfl_fast's last."""
    found = {name for c in measured for times in c["times"].values() for name in times}
    order = ["naive", "compiled", "prfl_fast reference", "prfl_fast triton", "prfl_fast cuda"]
    return [name for name in order if name in found]


def rows(record: dict[str, Any], columns: Sequence[str]) -> list[list[str]]:
    lines = []
    for part, times in record["times"].items():
        ours = _ours(times)
        naive, fast = times["naive"]["median_s"], times[ours]["median_s"]
        line = [record["case"] if part == next(iter(record["times"])) else "", part]
        line += [report.seconds(times[n]["median_s"] if n in times else None) for n in columns]
        spread = f"{report.seconds(times[ours]['p20_s'])} … {report.seconds(times[ours]['p80_s'])}"
        line += [spread, report.ratio(naive / fast)]
        if "flops" in record:
            line += [f"{record['flops'][part] / fast / 1e12:.3g} TFLOP/s", report.BLANK]
        else:
            rate = record["bytes"][part] / fast
            line += [f"{rate / 1e9:.3g} GB/s", f"{100 * rate / record['copy_ceiling']:.0f} %"]
        last = part == list(record["times"])[-1]
        kept, peak = record["kept_bytes"], record.get("peak_bytes")
        shown = last and record["leaves"]
        line += [report.size(kept["naive"]), report.size(kept[ours])] if shown else ["", ""]
        if peak is not None:
            line += [report.size(peak["naive"]), report.size(peak[ours])] if last else ["", ""]
        line.append(f"{record['error']:.0e}" if last else "")
        lines.append(line)
    return lines


def _presets(context: Context) -> tuple[Preset, ...]:
    """Return the sizes to measure: all of Wan's on a GPU, unless the command line names one."""
    if context.device.type == "cuda" and not context.preset_given:
        return tuple(p for name, p in PRESETS.items() if name != "tiny")
    return (context.preset,)


def run(context: Context) -> SuiteResult:
    """Measure all cases at each size; at the tiny one also pooling at Wan2.1-1.3B's 480p size."""
    copy = harness.copy_ceiling(context.device)
    presets = _presets(context)
    todo = [(case, preset) for preset in presets for case in CASES]
    large = PRESETS["wan1.3b-480p"]
    if context.preset.name == "tiny":
        name = f"query_pool, L = {large.tokens}, D = {large.dim}"
        todo.append((replace(POOL, name=name, passes=("both",)), large))
    cases: list[dict[str, Any]] = []
    problems: list[str] = []
    for case, preset in context.each(todo, "kernels", lambda t: f"{t[1].name} {t[0].name}"):
        record: dict[str, Any] = {"case": case.name, "preset": preset.name}
        try:
            record = measure(case, preset, replace(context, preset=preset), copy)
        except UnavailableError as error:
            record["skipped"] = str(error)
        except KeyboardInterrupt:  # bench/gpu.sh's time limit: what was measured is kept
            problems.append(f"interrupted in {preset.name} {case.name}")
            break
        except Exception as error:  # one operation's failure must not cost the others' numbers
            failed = isinstance(error, AssertionError)
            record["failed"] = str(error) if failed else harness.first_line(error)
            problems.append(f"{case.name}: {record['failed']}")
        cases.append(record)
    tables, figures = [], {}
    on = harness.device_name(context.device)
    for preset in presets:
        here = [c for c in cases if c["preset"] == preset.name or preset.name == "tiny"]
        suffix = "" if preset is presets[0] else f"-{preset.name}"
        tables.append(_table(here, preset, context, copy, f"kernels{suffix}"))
        measured = [c for c in here if "times" in c and c["preset"] == preset.name]
        if measured:
            figures[f"kernels{suffix}.png"] = speed_figure(measured, preset, on)
            figures[f"kernels{suffix}-kept.png"] = kept_figure(measured, preset, on)
    pool = next((c for c in cases if c["case"].startswith("query_pool, L") and "times" in c), None)
    if pool is not None and context.device.type == "cpu":
        times = pool["times"]["both"]
        factor = times["naive"]["median_s"] / times[_ours(times)]["median_s"]
        tables[0].notes.append(
            f"Query pooling, L = {large.tokens}, D = {large.dim}, forward + backward: "
            f"{report.ratio(factor)} faster than nn.MultiheadAttention (target {POOL_TARGET}×)."
        )
    if context.device.type == "cpu" and context.preset.name == "tiny":
        found, more = resources.measure(context)
        tables += found
        cases += more
    return SuiteResult(tables, cases, figures, problems)


def _table(
    cases: list[dict[str, Any]], preset: Preset, context: Context, ceiling: float, name: str
) -> Table:
    measured = [c for c in cases if "times" in c]
    implementations = _columns(measured)
    columns = ["operation", "pass", *implementations, "20 … 80 %", "speed-up"]
    columns += ["rate", "of copy", "kept, naive", "kept, prfl_fast"]
    if any("peak_bytes" in c for c in measured):
        columns += ["peak, naive", "peak, prfl_fast"]
    columns.append("error")
    body = [line for c in measured for line in rows(c, implementations)]
    width = len(columns)
    body += [[c["case"], "check failed", *[""] * (width - 2)] for c in cases if "failed" in c]
    dtype = str(context.dtype).removeprefix("torch.")
    notes = [
        f"L = {preset.tokens}, D = {preset.dim}, {dtype}. Medians; the range, the speed-up over "
        "naive and the rate are those of the implementation chosen by itself. Inputs come from "
        "memory, not from a cache.",
        "rate: bytes that must move (or FLOPs of matrix work) over time; of copy: against "
        f"{ceiling / 1e9:.3g} GB/s, read plus written, of a large copy in this run.",
        "kept: bytes held for the backward, each storage once, weights not counted; error: worst "
        "relative error of outputs and gradients against float64.",
        *(f"{c['case']}: skipped, {c['skipped']}." for c in cases if "skipped" in c),
    ]
    return Table(name, "Operations against plain PyTorch", columns, body, notes)


def _bars(measured: list[dict[str, Any]], series: dict[str, Any], **text: Any) -> Any:
    figure, axes = report.new_figure(8, 0.32 * len(measured) * len(series) ** 0.5 + 1.4)
    report.grouped_bars(axes, [c["case"] for c in measured], series, **text)
    axes.axvline(1, color="#8c8c8c", linewidth=1, linestyle="--")
    if len(series) > 1:
        axes.legend(fontsize=8)
    return figure


def speed_figure(measured: list[dict[str, Any]], preset: Preset, on: str) -> Any:
    """Draw the speed-up over plain PyTorch of each operation, from its longest timed pass."""
    last = [list(c["times"].values())[-1] for c in measured]
    naive = [t["naive"]["median_s"] for t in last]
    kinds = _columns(measured)[1:]
    speed = {
        k: [n / t[k]["median_s"] if k in t else None for n, t in zip(naive, last, strict=True)]
        for k in kinds
    }
    errors = {
        k: [
            (s - n / t[k]["p80_s"], n / t[k]["p20_s"] - s) if s is not None else None
            for s, n, t in zip(speed[k], naive, last, strict=True)
        ]
        for k in kinds
    }
    ours = [n / t[_ours(t)]["median_s"] for n, t in zip(naive, last, strict=True)]
    title = (
        f"{sum(s > 1 for s in ours)} of {len(ours)} operations are faster than plain PyTorch; "
        f"the median speed-up is {report.ratio(statistics.median(ours))}\n"
        f"L = {preset.tokens}, D = {preset.dim}, {on}"
    )
    unit = "speed-up over plain PyTorch, forward + backward where there is one (bars: 20 … 80 %)"
    labels = {k: [report.ratio(s) if s else "" for s in speed[k]] for k in kinds}
    return _bars(measured, speed, title=title, unit=unit, labels=labels, errors=errors)


def kept_figure(measured: list[dict[str, Any]], preset: Preset, on: str) -> Any:
    """Draw the bytes kept for the backward of each operation, plain PyTorch's = 1."""
    shown = [c for c in measured if c["leaves"] and c["kept_bytes"]["naive"]]
    share, labels = [], []
    for case in shown:
        kept = case["kept_bytes"]
        ours = kept[_ours(list(case["times"].values())[-1])]
        share.append(ours / kept["naive"])
        labels.append(f"{report.size(ours)} of {report.size(kept['naive'])}")
    title = (
        f"Fused operations keep {100 * statistics.median(share):.0f} % of plain PyTorch's bytes "
        f"for the backward (median)\nL = {preset.tokens}, D = {preset.dim}, {on}"
    )
    unit = "bytes kept for the backward, plain PyTorch = 1"
    return _bars(shown, {"prfl_fast": share}, title=title, unit=unit, labels={"prfl_fast": labels})
