"""Reports of a plan: a printed table, a figure of live bytes, JSON values, the trainer's YAML."""

import contextlib
import dataclasses
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prfl_fast.memory.ledger import CATEGORIES
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.plan import Plan
from prfl_fast.planning.search import CHOSEN, Candidate, budget_for
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.allocator_settings import EXPANDABLE
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.optional import need
from prfl_fast.utils.units import GIB, plural, seconds

_GPUS = 8  # GPUs of one machine; each has a process with its own host memory
_COLUMNS = 100  # of a terminal
_FASTER, _SLOWER = 12, 2  # candidates in the table before and after the chosen one
# Okabe and Ito's palette, which color-blind readers can tell apart; bottom of the stack first.
_COLORS = {
    "weights": "#0072b2",
    "reference": "#f0e442",
    "reward": "#56b4e9",
    "optimizer": "#cc79a7",
    "gradients": "#d55e00",
    "checkpoints": "#009e73",
    "rollout": "#8c8c8c",
    "workspace": "#e69f00",
}
_LIMIT = "#d00000"
_NARROWEST = 0.06  # width of a phase in the figure, as a fraction of all points
_RECEIVED = {
    "gathered": "weights received from the other GPUs in a step",
    "reduced": "sums of gradients received in a step",
    "exchanged": "heads and tokens received in a step",
}
_MEANING = {
    "weights": "of the trained model, adapters included",
    "reference": "frozen copy of the model, for dpo",
    "reward": "weights of the reward model",
    "optimizer": "states and fp32 masters",
    "gradients": "of the trained parameters",
    "checkpoints": "saved for the backward",
    "rollout": "latents, conditions, activations of forwards without gradient",
    "workspace": "all else: temporary activations, their gradients, kernels' scratch",
}


def gib(value: float) -> str:
    """Format bytes as ``12.34 GiB``."""
    return f"{value / GIB:.2f} GiB"


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return candidates that need less device memory than every faster one, and the chosen one."""
    shown: list[Candidate] = []
    for candidate in candidates:
        if candidate.reason == CHOSEN or all(candidate.peak < c.peak for c in shown):
            shown.append(candidate)
    return shown


def table(plan: Plan) -> str:
    """Return ledger, times and candidates as text for a terminal of 100 columns."""
    lines = [*_headline(plan), "", *_ledger(plan), "", *_times(plan), "", *_candidates(plan)]
    return "\n".join([*lines, *plan.notes])


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values for JSON, sizes in bytes and times in seconds."""
    values = dataclasses.asdict(plan)
    values |= {name: getattr(plan, name) for name in ("missing", "reserve", "step_seconds")}
    work = plan.workload
    values["workload"] |= {"points": work.points, "tokens": work.tokens}
    return values | {"gpu": plan.gpu.name, "rollout_forwards": work.rollout_forwards}


def _headline(plan: Plan) -> list[str]:
    work = plan.workload
    kind = f"LoRA rank {work.lora_rank}" if work.train == "lora" else "all parameters"
    step = "PRFL step" if work.reward_loss is None else f"Reward model, loss {work.reward_loss}"
    given = ", first frame given" if work.first_frame else ""
    size = f"{work.frames} x {work.height} x {work.width}, "
    size += f"{plural(work.tokens, 'token')}{given}, "
    size += f"batch {work.batch_size}"
    micro_batches = f"{plural(work.gradient_accumulation_steps, 'micro-batch')} per step"
    lines = [
        f"{step}: {plural(plan.workload.blocks, 'block')}, {kind}, {size}",
        *_ranks(work),
        *textwrap.wrap(", ".join([*_trajectory(work), micro_batches, *_rewards(work)]), _COLUMNS),
    ]
    room = f"{gib(plan.peak)} + {gib(plan.reserve)} reserve of {gib(plan.budget)}"
    setting = f"with {EXPANDABLE}" if plan.expandable_segments else "without expandable segments"
    reserve = f"reserve: CUDA's context, fragmentation {setting}"
    if plan.feasible:
        lines.append(f"fits: {room}; {seconds(plan.step_seconds)} per step on {plan.gpu.name}")
    else:
        short = [f"{gib(plan.missing)} of device memory"] if plan.missing else []
        larger = (
            f", or a budget of {gib(budget_for(plan.peak + plan.fragmentation))}"
            if plan.missing
            else ""
        )
        if plan.host_budget is not None and plan.host > plan.host_budget:
            short.append(f"{gib(plan.host - plan.host_budget)} of host memory")
        lines.append(f"no plan fits: the nearest takes {room}")
        lines.append(f"short of {' and '.join(short)}: fewer frames or pixels{larger}")
    lines.append(reserve)
    memory, reward = plan.memory, plan.reward_memory
    own, chunk = memory.gradient_dtype == "parameter", memory.feed_forward_chunk
    dtype = "the parameter's dtype" if own else memory.gradient_dtype
    feed_forward = "whole" if chunk is None else f"in chunks of {chunk} tokens"
    models = {"generator": memory, "reward model": reward}
    if work.reward_loss is not None:
        models = {"reward model": memory}
    lines += [
        "",
        *(f"  {name}: {_policy(policy)}" for name, policy in models.items()),
        f"  optimizer {memory.optimizer}, gradients in {dtype}, feed-forward {feed_forward}",
    ]
    return lines


def _ranks(work: Workload) -> list[str]:
    """Return a line on the GPUs that hold one copy of the weights, or one video, together."""
    if work.ranks == 1:
        return []
    shard, sequence = work.shard, work.sequence
    weights = "whole weights on each" if shard == 1 else f"weights sharded over {shard}"
    video = "a video on each" if sequence == 1 else f"a video on every {sequence}"
    kept = ", weights gathered through a rollout" if work.parallel.keep_gathered is True else ""
    return [f"one of {work.ranks} GPUs: {weights}, {video}{kept}"]


def _trajectory(work: Workload) -> list[str]:
    """Return the words for the steps of a trajectory; none if there is no trajectory."""
    if work.reward_loss is not None:
        return []
    words = [plural(work.num_inference_steps, "step"), plural(work.evaluations, "gradient point")]
    if work.earlier_steps:
        words.append(f"gradient through {1 + work.earlier_steps:g} steps")
    if work.guidance is not None:
        words.append(f"guidance {work.guidance}")
    return words


def _rewards(work: Workload) -> list[str]:
    """Return the words for the frozen reward models and the steps of other objectives."""
    counts = [str(count) for count in work.reward_models]
    words = [f"reward of {plural(int(counts[0]), 'block')}"] if len(counts) == 1 else []
    if len(counts) > 1:
        words = [f"{len(counts)} reward models of {', '.join(counts[:-1])} and {counts[-1]} blocks"]
    words += ["then a supervised step"] * work.sft + ["then a Flow-DPO step"] * work.dpo
    return words


def _policy(memory: MemoryConfig) -> str:
    mode, offload = memory.activation_checkpointing, memory.offload or "none"
    where = "" if memory.stream_weights is None else " in host memory"
    weights = f"{memory.weight_dtype} weights{where}"
    return f"{weights}, activation checkpointing {mode}, offload {offload}"


def _ledger(plan: Plan) -> list[str]:
    lines = [f"Ledger at the peak, in the {plan.peak_phase} phase"]
    rows = [(name, plan.categories.get(name, 0), _MEANING[name]) for name in CATEGORIES]
    rows.append(("total", plan.peak, "live bytes of tensors on the device"))
    work = plan.workload
    gpus = work.ranks if work.ranks > 1 else _GPUS
    several = f"; {gpus} GPUs take {gib(gpus * plan.host).strip()}" if plan.host else ""
    rows.append(("host", plan.host, f"pinned host memory per GPU, at its peak{several}"))
    if work.ranks > 1:
        rows += [(n, int(plan.received[f"{n}_bytes"]), _RECEIVED[n]) for n in _RECEIVED]
    for name, value, meaning in rows:
        if value or name in ("total", "host"):
            lines.append(f"  {name:<12}{gib(value):>12}  {meaning}")
    return lines


def _times(plan: Plan) -> list[str]:
    lines = [f"Time of a step, predicted for {plan.gpu.name}"]
    for phase, value in plan.seconds.items():
        share = value / (plan.step_seconds or 1)
        forwards = plan.workload.rollout_forwards * plan.workload.gradient_accumulation_steps
        what = f"  {forwards:g} forwards expected" if phase == "rollout" else ""
        lines.append(f"  {phase:<16}{seconds(value):>14}{share:>7.0%}{what}")
    return lines


def _candidates(plan: Plan) -> list[str]:
    alone = not plan.workload.rewards  # one model has a policy
    names = f"{'reward model':<15}" if alone else f"{'generator':<15}{'reward':<15}"
    head = f"  {names}{'chunk':<7}{'peak':>12}{'host':>12}{'per step':>13}"
    lines = ["Candidates, fastest first", f"{head}  verdict"]
    groups: dict[tuple[str, str, bool], list[Candidate]] = {}
    for candidate in plan.candidates:
        memory = candidate.memory
        kind = (memory.weight_dtype, memory.optimizer, memory.stream_weights is not None)
        groups.setdefault(kind, []).append(candidate)
    for (weights, optimizer, streams), found in groups.items():
        rows = frontier(found)
        chosen = next((i for i, c in enumerate(rows) if c.reason == CHOSEN), len(rows) - 1)
        # Show the faster candidates nearest to the chosen one.
        rows = rows[max(0, chosen - _FASTER) : chosen + 1 + _SLOWER]
        hidden = len(found) - len(rows)
        less = f", {len(rows)} of {len(found)} that matter most" if hidden else ""
        where = " in host memory" if streams else ""
        lines.append(f"  with {weights} weights{where} and {optimizer}{less}:")
        lines += [_row(candidate, alone) for candidate in rows]
    return lines


def _row(candidate: Candidate, alone: bool) -> str:
    chunk = candidate.memory.feed_forward_chunk or "all"
    policies = [candidate.memory] if alone else [candidate.memory, candidate.reward_memory]
    modes = "".join(
        f"{memory.activation_checkpointing + ('+cpu' if memory.offload else ''):<15}"
        for memory in policies
    )
    return (
        f"  {modes}{chunk:<7}{gib(candidate.peak):>12}"
        f"{gib(candidate.host):>12}{seconds(candidate.seconds):>13}  {candidate.reason}"
    )


def timeline_figure(plan: Plan) -> Any:
    """Return a matplotlib figure of live bytes by category through one step, with the budget.

    Raise ``MissingExtraError`` if matplotlib is not installed.
    """
    need("matplotlib", "video")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [n for n in CATEGORIES if any(live.get(n) for _, live in plan.timeline)]
    spans = _spans(plan.timeline)
    places, edges = _places(spans, len(plan.timeline))
    moments = [live for _, live in plan.timeline]
    axes.stackplot(
        [*places, edges[-1]],
        [[live.get(name, 0) / GIB for live in (*moments, moments[-1])] for name in names],
        labels=names,
        colors=[_COLORS[name] for name in names],
        step="post",
        linewidth=0,
    )
    budget = plan.budget / GIB
    axes.axhline(budget, color=_LIMIT, linewidth=1.5)
    axes.axhline(budget - plan.reserve / GIB, color=_LIMIT, linewidth=0.8, linestyle="--")
    axes.text(edges[-1], budget, f"budget {budget:.4g} GiB", color=_LIMIT, va="bottom", ha="right")
    top = max(budget, plan.peak / GIB) * 1.22
    for (phase, _, _), left, right in zip(spans, edges[:-1], edges[1:], strict=True):
        axes.axvline(left, color="black", linewidth=0.6, alpha=0.5)
        middle = (left + right) / 2
        axes.text(middle, top * 0.99, _label(plan, phase), va="top", ha="center", fontsize=8)
    high = max(range(len(moments)), key=lambda i: sum(moments[i].values()))
    axes.annotate(
        f"peak {plan.peak / GIB:.2f} GiB",
        (places[high], plan.peak / GIB),
        xytext=(-8, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    axes.set_xlim(0, edges[-1])
    axes.set_ylim(0, top)
    axes.set_ylabel("live device memory, GiB")
    # On a scale of seconds, the long rollout would hide the other phases.
    axes.set_xlabel("allocations and releases in order, not to the scale of time")
    axes.set_xticks([])
    axes.set_title(_headline(plan)[0], fontsize=10)
    axes.legend(*_reversed(axes), loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _reversed(axes: Any) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


def _spans(timeline: Sequence[tuple[str, Any]]) -> list[tuple[str, int, int]]:
    """Return phases with their first index and the index after their last."""
    starts = [i for i, (p, _) in enumerate(timeline) if i == 0 or timeline[i - 1][0] != p]
    return [
        (timeline[start][0], start, end)
        for start, end in zip(starts, [*starts[1:], len(timeline)], strict=True)
    ]


def _places(spans: Sequence[tuple[str, int, int]], count: int) -> tuple[list[float], list[float]]:
    """Return the position of each point and the edges of the phases, wide enough for the names."""
    places: list[float] = []
    edges = [0.0]
    for _, start, end in spans:
        width = max(end - start, _NARROWEST * count)
        places += [edges[-1] + width * i / (end - start) for i in range(end - start)]
        edges.append(edges[-1] + width)
    return places, edges


def _label(plan: Plan, phase: str) -> str:
    forwards = plan.workload.rollout_forwards * plan.workload.gradient_accumulation_steps
    times = f"\n{forwards:g} times" if phase == "rollout" else ""
    value = plan.seconds.get(phase)
    return phase.replace(" ", "\n") + times + ("" if value is None else f"\n{seconds(value)}")


def _keys(plan: Plan, present: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's keys, merged with the other keys of their sections in ``present``."""
    work = plan.workload
    reward_keys = ("weight_dtype", *MemoryConfig.FREE)
    keys: dict[str, Any] = {
        "memory": dataclasses.asdict(plan.memory),
        "reward_memory": {key: getattr(plan.reward_memory, key) for key in reward_keys},
    }
    hardware = present.get("hardware") or {}
    if hardware.get("precision") != "bf16":
        keys["hardware"] = {**hardware, "precision": "bf16"}
    if work.ranks > 1:
        shares = dataclasses.asdict(work.parallel)
        if shares["keep_gathered"] == "auto":  # the plan tried it, and it does not fit
            shares["keep_gathered"] = False
        keys["parallel"] = {**(present.get("parallel") or {}), **shares}
    if work.train == "lora" and not present.get("lora"):
        keys["lora"] = {"lora_rank": work.lora_rank, "target_modules": list(work.target_modules)}
    if "prfl" not in present:
        keys["prfl"] = {"points": work.points, "num_inference_steps": work.num_inference_steps}
    if "run" not in present:
        keys["run"] = {
            "batch_size": work.batch_size,
            "gradient_accumulation_steps": work.gradient_accumulation_steps,
        }
    return keys


def _parses_to(yaml: Any, text: str, content: Mapping[str, Any]) -> bool:
    try:
        return bool(yaml.safe_load(text) == content)
    except yaml.YAMLError:
        return False


def apply_to_yaml(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write the plan's keys into a YAML file, section by section; the rest does not change.

    Args:
        plan: a feasible plan, of ``train`` or ``train-reward`` as the file.
        path: the file, which may be missing.

    Raises:
        ValueError: if the plan is not feasible, or the file is not YAML with keys and values.
    """
    if not plan.feasible:
        hint = "Raise the budget, or plan fewer frames or pixels"
        raise ValueError(f"no plan fits {gib(plan.budget)}: {path} is not changed. {hint}")
    yaml, path = need("yaml"), Path(path)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    try:
        content = yaml.safe_load(text) or {}
        kind = type(content).__name__
        check(isinstance(content, dict), f"the content of {path}", kind, "keys and values")
        keys = _keys(plan, content)
        if plan.workload.reward_loss is not None:  # the file of train-reward has fewer sections
            own = ("memory", "hardware", "parallel")
            keys = {name: keys[name] for name in own if name in keys}
        # A file that is one {…}, as in JSON, has no lines of sections to replace.
        with contextlib.suppress(yaml.YAMLError):
            for key, value in keys.items():
                text = _with_section(yaml, text, key, value)
        if not _parses_to(yaml, text, {**content, **keys}):
            text = yaml.safe_dump({**content, **keys}, sort_keys=False)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _with_section(yaml: Any, text: str, key: str, value: Any) -> str:
    """Return ``text`` with one top-level key set; comments outside its section do not change."""
    section = yaml.safe_dump({key: value}, sort_keys=False)
    root = yaml.compose(text)
    lines = text.splitlines(keepends=True)
    for name, node in root.value if root is not None else ():
        if name.value == key:
            first, last = name.start_mark.line, node.end_mark.line
            if node.end_mark.column:  # a scalar or {…} ends within its line
                last += 1
            # A block ends where the next key starts; comments before that belong to the next key.
            while last > first + 1 and (
                not lines[last - 1].strip() or lines[last - 1].startswith("#")
            ):
                last -= 1
            return "".join([*lines[:first], section, *lines[last:]])
    return text + ("\n" if text and not text.endswith("\n") else "") + section
