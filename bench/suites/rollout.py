"""Measure the cost and drift of each option of the rollout engine.

Costs are of whole rollouts at the size that suits the machine, with random weights; drift is that
of a tiny model trained in the small world, whose velocities point somewhere. At Wan's sizes FLOPs,
bytes moved and caches are counted on fake tensors. Beside it, the work of a whole step by part, and
the cost of a gradient point with each option over that of the reference's way.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import harness
import report
import torch
from experiments import rollout_options, small_world
from harness import PRESETS, Context, SuiteResult, Table, UnavailableError
from method_specs import MANY, SOLVER_STEPS, one_thread

from prfl_fast import RolloutConfig
from prfl_fast.rollout.trajectory import relative_distance
from suites import gradient_point, rollout_counts, split

SHOWN = (10, 20, 30, SOLVER_STEPS)  # steps whose drift the table has


def drift_curve(
    latents: dict[int, torch.Tensor], exact: dict[int, torch.Tensor]
) -> dict[int, float]:
    """Return the relative L2 distance by step, the largest of the batch, at the common steps."""
    steps = sorted(set(latents) & set(exact))
    return {step: float(relative_distance(latents[step], exact[step])) for step in steps}


def drift_records(trained: rollout_options.Subject, context: Context) -> list[dict[str, Any]]:
    """Return each option's drift from its exact form, and the error of PRFL's gradient."""
    # Options with which several others are compared run once.
    latents, gradient = functools.cache(trained.latents), functools.cache(trained.gradient)
    records, options = [], rollout_options.options(context)
    for name in context.each(options, "drift"):
        against = options[name].against
        curve = drift_curve(latents(name), latents(against))
        record = {"case": "drift", "option": name, "against": against, "by_step": curve}
        config = options[name].config
        if config is not None and config.reuses:
            done = trained.engines[name].reuse
            record["reuse"] = {"forwards": done.forwards, "saved": done.saved}
        if name != against:
            record["gradient"] = compared(gradient(name), gradient(against))
        if name in gradient_point.inexact(options):
            record["in_prfl"] = trained.in_prfl(name)
        records.append(record)
    return records


def compared(gradient: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Return the relative L2 distance of a gradient to the exact one, and their cosine."""
    a, b = gradient.double(), exact.double()
    cosine = (a @ b / (a.norm() * b.norm())).item()
    return {"relative_l2": harness.relative_error(a, b), "cosine": cosine}


def cost_records(timed: rollout_options.Subject, context: Context) -> list[dict[str, Any]]:
    """Return FLOPs, peak bytes and seconds of a whole rollout with each option.

    Emulated options on a CPU have FLOPs only; options that depend on σ have no seconds on a GPU.
    """
    on_cpu = context.device.type == "cpu"
    records: dict[str, dict[str, Any]] = {}
    thunks: dict[str, Callable[[], object]] = {}
    options = rollout_options.options(context)
    for name in context.each(options, "rollouts"):
        option = options[name]
        run = functools.partial(timed.run, name)
        record: dict[str, Any] = {"case": "rollout", "option": name}
        try:
            run()  # compiles, and has the engine's check
            record["flops"] = harness.count_flops(run)
            if not (on_cpu and option.eight_bits):
                record["peak_bytes"] = harness.peak_bytes(run, context.device)
                if on_cpu or not option.by_level:
                    thunks[name] = run
        except (UnavailableError, torch.OutOfMemoryError) as error:
            record["skipped"] = str(error).splitlines()[0]
            thunks.pop(name, None)
        if name in timed.engines:
            record["notes"] = list(timed.engines[name].notes)
        records[name] = record
    seconds = 0.8 if on_cpu else 2.0
    timings = harness.time_side_by_side(thunks, context.device, seconds=seconds, at_least=3)
    for name, timing in timings.items():
        records[name]["times"] = timing.record()
    return list(records.values())


def table(
    costs: list[dict[str, Any]], drifts: list[dict[str, Any]], context: Context, about: str
) -> Table:
    """Return the table of costs and drift by option."""
    by_name = {r["option"]: r for r in costs}
    body = []
    for drift in drifts:
        name, curve = drift["option"], drift["by_step"]
        cost, base = by_name[name], by_name[drift["against"]]
        if "skipped" in cost:
            time_cells = [cost["skipped"], report.BLANK]
        else:
            mine, theirs = (r.get("times", {}).get("median_s") for r in (cost, base))
            over = mine / theirs if mine and theirs else None
            time_cells = [report.seconds(mine), report.ratio(over)]
        same = name == drift["against"]
        drift_cells = [report.BLANK if same else _drift(curve.get(step)) for step in SHOWN]
        line = [name, *time_cells, report.flops(cost.get("flops"))]
        line += [report.size(cost.get("peak_bytes")), *drift_cells]
        off = drift.get("gradient", {"relative_l2": None, "cosine": None})
        line += [_drift(off["relative_l2"]), report.number(off["cosine"], 5)]
        reuse = drift.get("reuse")
        line.append(f"{reuse['saved'] / reuse['forwards']:.0%}" if reuse else report.BLANK)
        body.append([*line, report.BLANK if same else drift["against"]])
    notes = [
        about,
        "drift: relative L2 distance of the latents before a step to those of the option named "
        f"last, largest of {rollout_options.SAMPLES} samples. Drift, gradient and saved forwards "
        f"are of the small world's tiny generator; {SOLVER_STEPS} UniPC steps, guidance "
        f"{rollout_options.GUIDANCE:g}, adapters of rank {rollout_options.LORA_RANK} with random "
        "values. 0: no bit differs.",
        "gradient off: relative L2 distance of PRFL's gradient after such a rollout to the one of "
        f"the option named last, at steps {', '.join(map(str, MANY))} with the same noise, and "
        "their cosine: of all parameters, with LoRA of the adapters; the reward reads "
        f"{rollout_options.REWARD_BLOCKS} blocks of the generator, its head is not trained. FP8 "
        "gradient steps (hardware.fp8_linears) follow an exact rollout.",
    ]
    notes.append(
        "sparse: self-attention at this density, by pooled queries and keys. The small world has 5 "
        "tokens, one for each frame: at 50 % each attends to 3 of them, at 25 % to 2."
    )
    if context.device.type == "cpu":
        notes.append(
            "FP8 is emulated on a CPU: its drift is real, its time and bytes mean nothing and are "
            "left out. FLOPs count its products like any other."
        )
    else:
        notes.append(
            f"By σ: no time, as few steps have other shares above and below than {SOLVER_STEPS} do."
        )
    columns = ["rollout", "time", "of compared", "FLOPs", "peak"]
    columns += [f"drift, step {step}" for step in SHOWN]
    columns += ["gradient off", "cosine", "forwards saved", "compared with"]
    return Table("rollout", "A rollout, by option", columns, body, notes)


def _drift(value: float | None) -> str:
    return report.BLANK if value is None else "0" if value == 0 else f"{value:.1e}"


def drift_figure(drifts: list[dict[str, Any]]) -> Any:
    """Draw the drift of inexact options by step."""
    figure, axes = report.new_figure(8, 4.2)
    colors = ("#0072b2", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#8c8c8c", "#56b4e9")
    shown = [r for r in drifts if any(r["by_step"].values())]
    for i, record in enumerate(shown):
        curve = {step: value for step, value in record["by_step"].items() if value > 0}
        style = {"color": colors[i % len(colors)], "marker": "o", "markersize": 2.5}
        style["linestyle"] = ("-", "--", ":", "-.")[i // len(colors) % 4]
        # FP8 linears are nearly covered by FP8 both.
        style["linewidth"], style["alpha"] = (1.2, 1.0) if i else (3.5, 0.5)
        axes.plot(list(curve), list(curve.values()), label=record["option"], **style)
    axes.set_yscale("log")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    last = {r["option"]: list(r["by_step"].values())[-1] for r in shown}
    least = min(last, key=lambda name: last[name]) if last else report.BLANK
    title = f"Of the inexact rollouts, {least} drifts least ({last.get(least, 0):.1e}), small world"
    report.label_axes(axes, title=title, x="solver step", y="relative L2 distance of the latents")
    return figure


def run(context: Context) -> SuiteResult:
    on_cpu = context.device.type == "cpu"
    context.refuse_large()
    tables, figures, counted = [], {}, Counted([], [], [])
    configs = gradient_point.inexact(rollout_options.options(context))
    if on_cpu:
        with small_world.workers(context) as pool:
            counted = _counts(context, pool, list(configs.values()))
        tables = [rollout_counts.table(counted.rollouts), split.table(counted.splits)]
        figures["split.png"] = split.flops_figure(counted.splits)
    trained = rollout_options.trained_subject(context)
    drifts = drift_records(trained, context)
    points = [r for each in counted.points for r in gradient_point.records(each, configs, drifts)]
    if on_cpu:
        tables.append(gradient_point.table(points))
    with one_thread(context.device):
        costs = cost_records(rollout_options.subject(context), context)
    preset, num_inference_steps = rollout_options.timed_size(context)
    about = (
        f"time, FLOPs, peak: of {preset.layers} blocks, D = {preset.dim}, L = {preset.tokens}, "
        f"random weights, {num_inference_steps} steps{', one thread' if on_cpu else ''}."
    )
    tables.insert(0, table(costs, drifts, context, about))
    figures["rollout_drift.png"] = drift_figure(drifts)
    records = [*costs, *drifts, *counted.rollouts, *counted.splits, *points]
    return SuiteResult(tables, records, figures, exactness(drifts) if on_cpu else [])


def exactness(drifts: list[dict[str, Any]]) -> list[str]:
    """Return failed checks: on a CPU, caches must change no bit of latents or gradient."""
    cached = [r for r in drifts if r["option"] in ("caches", "LoRA, caches")]
    problems = [
        f"{r['option']}: latents are {max(r['by_step'].values()):.1e} off, expected the same bits"
        for r in cached
        if any(r["by_step"].values())
    ]
    for r in cached:
        if off := r["gradient"]["relative_l2"]:
            problems.append(f"{r['option']}: the gradient is {off:.1e} off, expected the same bits")
    return problems


class Counted(NamedTuple):
    """Hold what is counted on fake tensors: rollouts, splits of a step, and gradient points."""

    rollouts: list[dict[str, Any]]
    splits: list[dict[str, Any]]
    points: list[gradient_point.Counts]


def _counts(context: Context, pool: Executor, configs: list[RolloutConfig]) -> Counted:
    """Count rollouts, the split of a step, and the work of a point with each configuration."""
    sizes = [PRESETS[name] for name in split.SIZES]
    work: list[tuple[Any, ...]] = [(rollout_counts.count, size) for size in sizes]
    work += [(split.count, size) for size in sizes]
    work += [(gradient_point.count, PRESETS[name], configs) for name in gradient_point.SIZES]
    jobs = [small_world.submit(pool, *each) for each in work]
    found, n = small_world.results_of(jobs, context, "counting"), len(sizes)
    return Counted(sum(found[:n], []), sum(found[n : 2 * n], []), found[2 * n :])
