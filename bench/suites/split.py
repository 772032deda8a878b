"""Split the work of a reward step: rollout, gradient, reward, supervised step, optimizer.

Counted at the real sizes on fake tensors, by the code that trains: once as the reference does it,
once as prfl_fast does. Per gradient point; expected over the draws of the plan.
"""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import method_specs as plans
import report
import torch
from harness import Preset, Table

from prfl_fast import GradientPlan, LatentRewardModel
from prfl_fast.planning.built_models import fake_models
from prfl_fast.planning.costs import Cost, CostLedger
from prfl_fast.planning.simulated_step import SimulatedStep
from suites import wan
from suites.memory_step import DEPTHS, Case, at_depth, uniform

SIZES = ("wan1.3b-480p", "wan14b-480p", "wan14b-720p")
# Phases of the simulation that make up a part, of which the first depends on the generator's depth
# or on the reward's.
PARTS = {
    "rollout": ("rollout",),
    "gradient": ("forward", "backward"),
    "reward": ("reward", "reward backward"),
    "SFT": ("sft forward", "sft backward"),
    "optimizer": ("optimizer",),
}
COLORS = dict(zip(PARTS, ("#8c8c8c", "#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
ACCUMULATION = 5  # gradient points of an optimizer update, as the paper's


@dataclass(frozen=True)
class Way:
    """Describe one way to do the step.

    Attributes:
        points: gradient points of a trajectory.
        reference: as the reference's code: diffusers' unpatched blocks standing for its own, all
            checkpointed; weight gradients of the reward's blocks (not of its pooling and head)
            computed and never used; two projections of all tokens in the reward's pooling.
    """

    name: str
    points: int
    reference: bool = False

    @property
    def plan(self) -> GradientPlan:
        return GradientPlan.prfl(self.points)


WAYS = (
    Way("as the reference, 1 point", 1, reference=True),
    Way("prfl_fast, 1 point", 1),
    Way(f"prfl_fast, {plans.POINTS} points", plans.POINTS),
)


def _phases(preset: Preset, way: Way, depth: int) -> dict[str, Cost]:
    """Return costs by phase with ``depth`` blocks in both models."""
    memory = uniform("full" if way.reference else "attention")
    workload = Case(preset, memory, not way.reference, "full").workload()
    workload = replace(workload, sft=True)
    depths = {"layers": depth, "reward_layers": depth}
    with fake_models(workload, memory, memory, **depths) as (generator, rewards):
        if way.reference:
            _as_the_reference(*rewards)
        ledger = CostLedger()
        with ledger:
            step = SimulatedStep(workload, memory, memory, generator, rewards, ledger)
            step.run()
            if not way.reference:
                _cached_forward(step)
    costs = ledger.costs()
    costs.setdefault("caches", Cost())
    return costs


@torch.no_grad()
def _cached_forward(step: SimulatedStep) -> None:
    """Count a rollout's caches and its forward with them."""
    ledger = step.ledger
    ledger.start_phase("caches")
    x = torch.zeros(step.workload.latent_shape)
    count = step.workload.num_inference_steps
    times = [torch.full((len(x),), 1000.0 - index) for index in range(count)]
    rollout = step.adapter.open_rollout(step.generator, x, times, step.conditions)
    ledger.start_phase("cached rollout")
    rollout.velocity(x, 0)


def _as_the_reference(reward: LatentRewardModel) -> None:
    """Leave weight gradients to the blocks, as ``wan.reference_models``; pool by projections."""
    for name, parameter in reward.named_parameters():
        parameter.requires_grad_("blocks." in name and parameter.is_floating_point())
    reward.pool = wan.ProjectedPool(reward.pool)


def line(few: Cost, more: Cost, depths: tuple[int, int], depth: int) -> Cost:
    """Return the cost at a depth, on the line through those at two others."""
    return Cost(**at_depth(vars(few), vars(more), depths, depth))


def parts(preset: Preset, way: Way) -> dict[str, Cost]:
    """Return the cost of each part once, extrapolated from two small depths.

    The parts are one rollout forward, the caches of one rollout, one gradient point, one supervised
    step, and one update for each of both losses.
    """
    depths = DEPTHS[False]
    few, more = (_phases(preset, way, depth) for depth in depths)
    reward_blocks = Case(preset, uniform("full")).workload().reward_blocks
    phases = {**PARTS, "caches": ("caches",)}
    if not way.reference:
        phases["rollout"] = ("cached rollout",)
    found = {}
    for part, names in phases.items():
        depth = reward_blocks if part == "reward" else preset.layers
        found[part] = total(*(line(few[p], more[p], depths, depth) for p in names))
    return found


def total(*costs: Cost) -> Cost:
    return Cost(**{name: sum(getattr(c, name) for c in costs) for name in vars(costs[0])})


def repeats(way: Way) -> dict[str, float]:
    """Return the mean number of times each part runs for one gradient point."""
    return {
        "rollout": way.plan.expected_forwards(plans.SOLVER_STEPS) / way.points,
        "caches": 1 / way.points,
        "gradient": 1.0,
        "reward": 1.0,
        "SFT": 1.0,
        "optimizer": 1 / ACCUMULATION,
    }


def count(preset: Preset) -> list[dict[str, Any]]:
    """Return records: FLOPs and moved bytes by part, of each way at a size, per gradient point."""
    records = []
    counted: dict[bool, dict[str, Cost]] = {}
    for way in WAYS:
        if way.reference not in counted:
            counted[way.reference] = parts(preset, way)
        times, costs = repeats(way), counted[way.reference]
        record: dict[str, Any] = {"case": "split", "preset": preset.name, "way": way.name}
        record |= {"points": way.points, "rollout_forwards": times["rollout"]}
        for name in ("flops", "moved_bytes"):
            measure = attrgetter(name)
            found = {part: times[part] * measure(costs[part]) for part in PARTS}
            # A trajectory fills the caches of its rollout once.
            found["rollout"] += times["caches"] * measure(costs["caches"])
            record[name] = found
        records.append(record)
    return records


def sum_of(parts: dict[str, float], *without: str) -> float:
    return sum(value for part, value in parts.items() if part not in without)


def table(records: list[dict[str, Any]]) -> Table:
    """Return the table of FLOPs by part, their sums over the reference's, and moved bytes."""
    body = []
    for size in dict.fromkeys(r["preset"] for r in records):
        rows = [r for r in records if r["preset"] == size]
        base = rows[0]
        for r in rows:
            first = r is base
            line = [size if first else "", r["way"], report.number(r["rollout_forwards"], 1)]
            line += [report.flops(r["flops"][part] or None) for part in PARTS]
            for without in ((), ("SFT",)):
                mine, theirs = (sum_of(record["flops"], *without) for record in (r, base))
                line.append(report.ratio(mine / theirs))
            line.append(report.size(sum(r["moved_bytes"].values())))
            body.append(line)
    columns = ["size", "way", "rollout forwards", *PARTS]
    columns += ["all, reference = 1", "without SFT", "moved"]
    notes = [
        "FLOPs of matrix products and attention per gradient point, recomputation included, "
        f"counted on fake tensors: {plans.SOLVER_STEPS} solver steps, a reward of 8 blocks, all "
        f"parameters train, one supervised step a point, {ACCUMULATION} points an update. The "
        "optimizer has none. No time was measured.",
        "as the reference: diffusers' unpatched blocks in place of its own, every block "
        "checkpointed, weight gradients of the frozen reward's blocks alone, pooling with two "
        "projections of all tokens. prfl_fast: policy attention in both models, rollouts with "
        "caches.",
        "moved: what everything else reads and writes, fused operations once.",
    ]
    return Table("split", "Work of a gradient point, by part", columns, body, notes)


def figure(
    rows: dict[str, dict[str, dict[str, float]]], *, unit: str, scale: float, title: str
) -> Any:
    """Draw stacked bars: panel → way → part → value."""
    shown = [part for part in PARTS if any(w.get(part) for p in rows.values() for w in p.values())]
    made, panels = report.new_figure(11, 1.2 + 0.9 * len(rows), nrows=len(rows), squeeze=False)
    for axes, (panel, ways) in zip(panels[:, 0], rows.items(), strict=True):
        for i, values in enumerate(ways.values()):
            left = 0.0
            for part in shown:
                width = values.get(part, 0.0) / scale
                label = part if i == 0 and axes is panels[0, 0] else None
                axes.barh(i, width, left=left, color=COLORS[part], label=label)
                left += width
            axes.annotate(
                f"{left:.3g}", (left, i), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=8,
            )  # fmt: skip
        axes.set_yticks(range(len(ways)), list(ways))
        axes.invert_yaxis()
        axes.margins(x=0.08)
        report.label_axes(axes, title=panel, grid="x", x=unit if axes is panels[-1, 0] else "")
    made.legend(fontsize=8, loc="outside lower right", ncols=len(shown))
    made.suptitle(title, fontsize=11, x=0.01, ha="left")
    return made


def flops_figure(records: list[dict[str, Any]]) -> Any:
    """Draw the counted split; the title compares its first and last way at the largest size."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for r in records:
        rows.setdefault(r["preset"], {})[r["way"]] = r["flops"]
    size, ways = list(rows.items())[-1]
    first, last = list(ways)[0], list(ways)[-1]
    factor = sum(ways[first].values()) / sum(ways[last].values())
    title = f"{size}: a gradient point takes {factor:.1f}× fewer FLOPs with {last} than {first}"
    return figure(rows, unit="PFLOP per gradient point", scale=1e15, title=title)
