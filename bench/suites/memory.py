"""Measure a PRFL step under every memory policy, beside diffusers' own checkpointing.

On a CPU the real sizes are simulated on fake tensors, and a tiny model is run. On a GPU the preset
is run, the allocator's peak beside the prediction; at 14B also the plans that have to fit a budget.
"""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import harness
import report
import torch
from harness import PRESETS, Context, Preset, SuiteResult, Table, UnavailableError

from prfl_fast import MemoryConfig, plan_memory
from prfl_fast.memory.offload import host_memory
from prfl_fast.planning.gpu_specs import this_gpu
from prfl_fast.training.oom import is_out_of_memory
from prfl_fast.utils.quiet import quiet_libraries
from prfl_fast.utils.units import GIB
from suites import kept
from suites.memory_step import Case, MeasuredStep, cuda_step, predict, release, run_capped, uniform

SIZES = ("wan14b-720p", "wan1.3b-480p")  # 14B at 480p is a point of the curves
POLICIES = tuple((p, o) for p in ("none", "full", "attention") for o in (None, "cpu"))
BASELINE = "unpatched, diffusers' checkpointing"
CHUNK = 8192
CHUNKED = f"full, offloaded, feed-forward {CHUNK} tokens at a time"
NARROW = ("fp8", "nf4")

# Curves: label → what runs; pixels, with 1080 rounded up to a multiple of 16, and frames.
CURVES = {
    BASELINE: (uniform("full"), False),
    "full, offloaded": (uniform("full", "cpu"), True),
    "full, offloaded, NF4 weights": (uniform("full", "cpu", "nf4"), True),
}
COLORS = dict(zip(CURVES, ("#8c8c8c", "#0072b2", "#009e73"), strict=True))
FRAMES = (17, 81, 121)
RESOLUTIONS = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1088, 1920)}

SMALL_LATENT = (5, 8, 16)  # of what a CPU runs
# Of a GPU, at the preset's size: generator depth above which a part of the model is run.
FEW_LAYERS, WHOLE_UP_TO = 4, 30
# What has to fit: preset → (label, training, weights, budget in GiB).
PLANS: dict[str, tuple[tuple[str, str, str, int], ...]] = {
    "wan14b-720p": (
        ("14B LoRA, 720p, bf16 weights", "lora", "bf16", 48),
        ("14B LoRA, 720p, NF4 weights", "lora", "nf4", 24),
    ),
    "wan14b-480p": (("14B, all parameters, 480p", "full", "bf16", 141),),
}
HOST_SHARE = 0.8  # of the host's available memory, for plans


def label(policy: str, offload: str | None) -> str:
    return policy + (", offloaded" if offload else "")


def rows() -> dict[str, tuple[MemoryConfig, bool]]:
    """Return label → memory with bf16 weights and whether the model is patched."""
    named = {BASELINE: (uniform("full"), False)}
    named |= {label(p, o): (uniform(p, o), True) for p, o in POLICIES}
    return named | {CHUNKED: (uniform("full", "cpu", feed_forward_chunk=CHUNK), True)}


def narrowed(memory: MemoryConfig, weights: str) -> MemoryConfig:
    return replace(memory, weight_dtype=weights)


def _curve_case(memory: MemoryConfig, patched: bool, frames: int, pixels: tuple[int, int]) -> Case:
    latent = ((frames - 1) // 4 + 1, pixels[0] // 8, pixels[1] // 8)
    return Case(replace(PRESETS["wan14b-720p"], latent=latent), memory, patched)


def table_cases() -> dict[tuple[str, str, str], Case]:
    """Return (preset, row, weights) → case of the simulated table."""
    cases = {}
    for name in SIZES:
        for row, (memory, patched) in rows().items():
            largest = name == SIZES[0]
            if row == CHUNKED and not largest:
                continue
            # Narrow weights are for the largest size, where nothing else is left to save.
            keeps_all = memory.activation_checkpointing == "none" or memory.offload is None
            lean = largest and not keeps_all
            narrow = () if not lean else NARROW if row != CHUNKED else NARROW[1:]
            for weights in ("bf16", *narrow):
                case = Case(PRESETS[name], narrowed(memory, weights), patched)
                cases[name, row, weights] = case
    return cases


def curve_cases() -> dict[tuple[str, int, str], Case]:
    """Return (curve, frames, resolution) → case."""
    cases = {}
    for name, (memory, patched) in CURVES.items():
        for frames in FRAMES:
            cases[name, frames, "720p"] = _curve_case(memory, patched, frames, RESOLUTIONS["720p"])
        for resolution, pixels in RESOLUTIONS.items():
            cases[name, 81, resolution] = _curve_case(memory, patched, 81, pixels)
    return cases


def _start_process() -> None:
    quiet_libraries()
    torch.set_num_threads(1)


def _predicted(cases: list[Case]) -> list[dict[str, Any]]:
    return [predict(case) for case in cases]


def predictions(cases: Iterable[Case], context: Context) -> dict[Case, dict[str, Any]]:
    """Simulate each case once, in as many processes as there are cores.

    A process takes all cases of a size: PyTorch remembers the shapes of results it has seen.
    """
    sizes: dict[Preset, list[Case]] = {}
    for case in dict.fromkeys(cases):
        sizes.setdefault(case.preset, []).append(case)
    cores = min(8, len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")
    found: dict[Case, dict[str, Any]] = {}
    with (
        ProcessPoolExecutor(cores, spawn, initializer=_start_process) as pool,
        context.bar(sum(map(len, sizes.values())), "simulating") as bar,
    ):
        largest_first = sorted(sizes.values(), key=len, reverse=True)
        for group, records in zip(largest_first, pool.map(_predicted, largest_first), strict=True):
            found |= zip(group, records, strict=True)
            bar.update(len(group))
    return found


def _identity(case: Case) -> dict[str, Any]:
    preset = case.preset
    sizes = {"preset": preset.name, "tokens": preset.tokens, "layers": preset.layers}
    memories = dict(zip(("memory", "reward_memory"), map(vars, case.memories), strict=True))
    return sizes | {"patched": case.patched, "train": case.train} | memories


def _simulated_table(found: dict[Case, dict[str, Any]]) -> Table:
    cases = table_cases()
    body = []
    for name in SIZES:
        for row in rows():
            if (name, row, "bf16") not in cases:
                continue
            line = [name if row == BASELINE else "", row]
            for weights in ("bf16", *NARROW):
                case = cases.get((name, row, weights))
                line.append(_gib(found[case]["peak_bytes"] if case else None))
            exact = found[cases[name, row, "bf16"]]
            body.append([*line, _gib(exact["host_bytes"]), report.flops(exact["flops"])])
    notes = [
        "Simulated, not run: one PRFL step with LoRA of rank 16 on the attention, 81 frames, "
        "reward of 8 blocks, the same policy for both models; GiB of tensors at the peak, weights, "
        "gradients and optimizer included. CUDA's context and the allocator's rounding come on "
        "top.",
        "in host memory: what is offloaded. FLOPs: of the forward with gradient, reward and "
        "backward, recomputation included, rollouts not; counted from shapes. How long that takes "
        "has not been measured.",
    ]
    columns = ["", "blocks keep", "bf16 weights", "FP8", "NF4", "in host memory", "FLOPs"]
    return Table("memory", "Memory of a PRFL step, 81 frames", columns, body, notes)


def _gib(size: float | None) -> str:
    return f"{size / GIB:.1f} GiB" if size else report.BLANK


def simulated(context: Context) -> tuple[Table, list[dict[str, Any]], Any]:
    """Return table, records and figure of the real sizes."""
    curves = curve_cases()
    found = predictions([*table_cases().values(), *curves.values()], context)
    records = [{"case": "simulated", **_identity(case), **found[case]} for case in found]
    return _simulated_table(found), records, curves_figure({k: found[c] for k, c in curves.items()})


def curves_figure(found: dict[tuple[str, int, str], dict[str, Any]]) -> Any:
    """Draw the simulated peak against frames and against resolution."""
    figure, (left, right) = report.new_figure(11, 4.4, ncols=2, sharey=True)
    peak = {key: record["peak_bytes"] / GIB for key, record in found.items()}
    pixels = [h * w / 1e6 for h, w in RESOLUTIONS.values()]
    for name in CURVES:
        style = {"label": name, "color": COLORS[name], "marker": "o", "markersize": 4}
        left.plot(FRAMES, [peak[name, f, "720p"] for f in FRAMES], **style)
        right.plot(pixels, [peak[name, 81, r] for r in RESOLUTIONS], **style)
    report.label_axes(left, title="720 × 1280 pixels", x="frames", y="GiB at the peak")
    report.label_axes(right, title="81 frames", x="resolution")
    left.set_xticks(FRAMES)
    right.set_xticks(pixels, list(RESOLUTIONS))
    left.set_ylim(bottom=0)
    for budget in (24, 48, 80, 141):
        for axes in (left, right):
            axes.axhline(budget, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
        right.annotate(
            f"{budget} GiB", (1, budget), xycoords=("axes fraction", "data"), fontsize=7,
            xytext=(3, -2), textcoords="offset points", color="#777777", annotation_clip=False,
        )  # fmt: skip
    left.legend(fontsize=8, loc="upper left")
    first, least = peak[BASELINE, 81, "720p"], min(CURVES, key=lambda n: peak[n, 81, "720p"])
    lowest = peak[least, 81, "720p"]
    figure.suptitle(
        f"{first / lowest:.1f}× less memory for a PRFL step at 81 frames, 720p: {first:.0f} GiB "
        f"unpatched, {lowest:.0f} GiB with {least}\nWan2.1 14B with LoRA, simulated",
        fontsize=11,
    )
    return figure


def small_cases(context: Context) -> dict[str, Case]:
    """Return label → case to run: all parameters in float32 on a CPU, LoRA over bf16 on a GPU."""
    preset, cpu = context.preset, context.device.type == "cpu"
    if cpu:
        preset = replace(preset, latent=SMALL_LATENT)
    if preset.layers > WHOLE_UP_TO:
        preset = replace(preset, layers=FEW_LAYERS)
    weights, train = ("fp32", "full") if cpu else ("bf16", "lora")
    policies = {
        name: (narrowed(memory, weights), patched) for name, (memory, patched) in rows().items()
    }
    policies.pop(CHUNKED, None)
    for narrow in () if cpu else NARROW:
        memory = uniform("attention", None, narrow)
        policies[f"attention, {narrow.upper()} weights"] = memory, True
    return {name: Case(preset, *policy, train) for name, policy in policies.items()}


def run_small_on_cpu(context: Context) -> tuple[list[dict[str, Any]], list[str]]:
    """Return kept and peak bytes and times of each case, and failed checks."""
    records, problems = [], []
    steps: dict[str, MeasuredStep] = {}
    expected: list[torch.Tensor] = []
    cases = small_cases(context)
    with context.bar(len(cases) + 1, "memory") as bar:
        for name, case in cases.items():
            bar.set_postfix_str(name)
            step = steps[name] = MeasuredStep(case, context)
            on_device, host = step.kept()
            peak = harness.peak_bytes(step.feedback, context.device)
            gradients = [p.grad.clone() for p in step.parameters if p.grad is not None]
            if name == label("none", None):
                expected = gradients
            elif expected and not all(map(torch.equal, gradients, expected)):
                problems.append(f"{name}: a gradient is not that of policy none, bit for bit")
            record = {"case": "run", "row": name, **_identity(case), "kept_bytes": on_device}
            records.append({**record, "host_bytes": host, "peak_bytes": peak})
            bar.update()
        thunks = {name: step.feedback for name, step in steps.items()}
        timings = harness.time_side_by_side(thunks, context.device, seconds=0.2, at_least=2)
        bar.update()
    for record in records:
        record["times"] = timings[record["row"]].record()
    return records, problems


def run_small_on_gpu(context: Context) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure peak, against its prediction, and time of one case after the other."""
    records = []
    cases = small_cases(context)
    with context.bar(len(cases), "memory") as bar:
        for name, case in cases.items():
            bar.set_postfix_str(name)
            record = {"case": "run", "row": name, **_identity(case)}
            record["predicted"] = predict(case)
            try:
                step = MeasuredStep(case, context)
                step.step()  # compiles the kernels, makes the optimizer's states
                record |= cuda_step(step, context.device, runs=2 if case.preset.dim < 5120 else 1)
                del step
            except RuntimeError as error:
                full = is_out_of_memory(error)
                if not (full or isinstance(error, UnavailableError)):
                    raise
                record["skipped"] = "out of memory" if full else str(error)
            release()
            records.append(record)
            bar.update()
    return records, []


def _small_table(records: list[dict[str, Any]], context: Context) -> Table:
    preset = next(iter(small_cases(context).values())).preset
    shape = f"{preset.layers} blocks, D = {preset.dim}, L = {preset.tokens}"
    step = "PRFL step with one rollout forward"
    if context.device.type == "cpu":
        columns = ["blocks keep", "kept on the device", "in host memory", "peak", "time"]
        body = []
        for r in records:
            sizes = (r["kept_bytes"], r["host_bytes"] or None, r["peak_bytes"])
            time = report.seconds(r["times"]["median_s"])
            body.append([r["row"], *map(report.size, sizes), time])
        notes = [
            f"Run here: {shape}, float32, all parameters train. kept: between the generator's "
            f"forward and its backward, the block inputs included. peak, time: of a {step}; bytes "
            "of tensors, weights not counted. On a CPU both sides of an offload are one memory.",
            "Gradients are those of policy none bit for bit, or the run reports a failed check.",
        ]
        return Table("memory-small", "Policies, measured", columns, body, notes)
    columns = ["blocks keep", "peak", "predicted", "off by", "in host memory", "time", "over kept"]
    times = {r["row"]: r["times"]["median_s"] for r in records if "times" in r}
    body = []
    for record in records:
        line = [record["row"]]
        predicted = record["predicted"]
        if "skipped" in record:
            line += [record["skipped"], _gib(predicted["peak_bytes"]), *[report.BLANK] * 4]
        else:
            off = predicted["peak_bytes"] / record["peak_bytes"] - 1
            base = times.get(record["row"].replace(", offloaded", ""))
            line += [_gib(record["peak_bytes"]), _gib(predicted["peak_bytes"]), f"{off:+.1%}"]
            line += [_gib(predicted["host_bytes"]), report.seconds(times[record["row"]])]
            offloaded = base is not None and ", offloaded" in record["row"]
            line.append(report.ratio(times[record["row"]] / base) if offloaded else report.BLANK)
        body.append(line)
    notes = [
        f"Run here: {shape}, bf16 weights unless named, LoRA of rank 16; {step} and the "
        "optimizer's. peak: torch.cuda.max_memory_allocated, weights included; predicted: by the "
        "simulation. over kept: time over that of the same policy without offloading."
    ]
    return Table("memory-small", "Policies, measured", columns, body, notes)


def run_plans(context: Context) -> tuple[list[Table], list[dict[str, Any]], list[str]]:
    """Search the plans of the preset's size and run each capped at its budget."""
    records: list[dict[str, Any]] = []
    problems, body = [], []
    total = torch.cuda.get_device_properties(context.device).total_memory
    for name, train, weights, gib in PLANS.get(context.preset.name, ()):
        budget = min(gib * GIB, total)
        workload = Case(context.preset, MemoryConfig(), True, train).workload()
        host, gpu = int(HOST_SHARE * host_memory()[0]), this_gpu(context.device)
        limits: Any = {"weight_dtype": weights, "budget": budget, "host_budget": host}
        found = plan_memory(workload, **limits, gpu=gpu)
        case = Case(context.preset, found.memory, True, train, found.reward_memory)
        record = {"case": "plan", "row": name, "budget_bytes": budget, **_identity(case)}
        record["predicted"] = {"peak_bytes": found.peak, "host_bytes": found.host}
        room = f"{budget / GIB:.4g} GiB"
        line = [name, room, _chosen(*case.memories), _gib(found.peak)]
        if not found.feasible:
            record["skipped"] = f"no policy fits, {_gib(found.missing)} are missing"
        else:
            try:
                record |= run_capped(case, context, budget)
            except UnavailableError as error:
                record["skipped"] = str(error)
        if "skipped" in record:
            problems.append(f"{name} in {room}: {record['skipped']}")
            line += [record["skipped"], report.BLANK, report.BLANK]
        else:
            off = found.peak / record["peak_bytes"] - 1
            seconds = report.seconds(record["times"]["median_s"])
            line += [_gib(record["peak_bytes"]), f"{off:+.1%}", seconds]
        records.append(record)
        body.append(line)
    notes = [
        "The planner's choice, run with random weights and the process held to the budget by "
        "torch.cuda.set_per_process_memory_fraction, CUDA's context included. time: one PRFL step "
        "with one rollout forward, and the optimizer's step; no supervised step."
    ]
    columns = ["plan", "budget", "chosen", "predicted", "peak", "off by", "time"]
    tables = [Table("memory-plans", "Plans, run within their budget", columns, body, notes)]
    return (tables if body else []), records, problems


def _chosen(memory: MemoryConfig, reward: MemoryConfig) -> str:
    parts = [label(memory.activation_checkpointing, memory.offload)]
    parts.append(f"reward {label(reward.activation_checkpointing, reward.offload)}")
    if memory.feed_forward_chunk is not None:
        parts.append(f"chunks of {memory.feed_forward_chunk}")
    return "; ".join([*parts, memory.optimizer])


def run(context: Context) -> SuiteResult:
    """Run the suite: simulated sizes and a small run on a CPU; runs and plans on a GPU."""
    if context.device.type == "cpu":
        context.refuse_large()
        table, records, figure = simulated(context)
        by_policy, counted = kept.policies(context)
        measured, problems = run_small_on_cpu(context)
        tables = [table, by_policy, _small_table(measured, context)]
        records += counted + measured
        return SuiteResult(tables, records, {"memory.png": figure}, problems)
    measured, problems = run_small_on_gpu(context)
    tables, records, failed = run_plans(context)
    tables.insert(0, _small_table(measured, context))
    return SuiteResult(tables, measured + records, {}, problems + failed)
