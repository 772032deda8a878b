"""Count the cost of a gradient point at Wan's sizes: the reference's way, exact, by rollout option.

FLOPs and bytes of every part are counted on fake tensors. The steps that a rollout takes follow
from its configuration and the plan's draws; the share of reused residuals and the drift are
those of the small world. Each inexact option of :mod:`experiments.rollout_options` is a row.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import report
import torch
from experiments.rollout_options import Option
from harness import Preset, Table
from method_specs import POINTS, SOLVER_STEPS

from prfl_fast import FlowUniPC, GradientPlan, RolloutConfig
from prfl_fast.planning.built_models import fake_models
from prfl_fast.planning.costs import Cost
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.kept_steps import strided_steps
from prfl_fast.rollout.schedulers import schedule_sigmas, start_trajectory
from suites import split
from suites.memory_step import DEPTHS, Case, uniform
from suites.rollout_counts import EightBits

SIZES = ("wan1.3b-480p", "wan14b-720p")
REFERENCE, EXACT = split.WAYS[:2]
DRIFT_LIMIT = 0.02
GOALS = {"with SFT": 3.0, "without SFT": 4.0}
# Of a bfloat16 product's time, that of an 8-bit one: the data sheets of sm_89 and later promise
# twice the rate. Not measured.
EIGHT_BIT_WEIGHT = 0.5
NOTHING = Cost()
CACHES = ("teacache", "first_block_cache")
CHECK = "drift check"
CHECK_EVERY = RolloutConfig().check_every  # trajectories
EXACT_CONFIG = RolloutConfig(compile="off")


@dataclass(frozen=True)
class Work:
    """Hold FLOPs of matrix products and of attention, those in 8 bits apart, and bytes moved."""

    products: float = 0.0
    attention: float = 0.0
    products_8_bit: float = 0.0
    attention_8_bit: float = 0.0
    moved_bytes: float = 0.0

    @classmethod
    def of(cls, cost: Cost, eight_bits: Cost = NOTHING) -> "Work":
        """Return the work of a counted phase; its 8-bit FLOPs are part of ``cost.flops``."""
        eight = eight_bits.matmul_flops, eight_bits.attention_flops
        attention = cost.attention_flops + cost.attention_backward_flops - eight[1]
        return cls(cost.matmul_flops - eight[0], attention, *eight, cost.moved_bytes)

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * value for value in self.values()))

    def values(self) -> tuple[float, ...]:
        return tuple(vars(self).values())

    @property
    def flops(self) -> float:
        return sum(self.values()) - self.moved_bytes

    @property
    def weighted(self) -> float:
        """Return the FLOPs with those in 8 bits at their weight."""
        eight_bits = self.products_8_bit + self.attention_8_bit
        return self.flops - (1 - EIGHT_BIT_WEIGHT) * eight_bits


class Forward(NamedTuple):
    """Hold the work of a rollout's forward by the number of blocks that run: all, one, none."""

    whole: Work
    one: Work
    none: Work


# What costs the same: the precisions of a step, and the options that all steps share.
Key = tuple[tuple[tuple[str, Any], ...], RolloutConfig]


@dataclass(frozen=True)
class Counts:
    """Hold the counted work at a size.

    Attributes:
        reference, exact: of each part of :data:`split.PARTS` once, and of a rollout's caches.
        forwards: of a rollout with caches.
    """

    preset: str
    reference: dict[str, Work]
    exact: dict[str, Work]
    forwards: dict[Key, Forward] = field(default_factory=dict)


def _no_velocity(x: torch.Tensor, timestep: torch.Tensor, conditions: Any) -> torch.Tensor:
    raise NotImplementedError


def noise_levels() -> tuple[float, ...]:
    """Return σ before every step of the schedule, and after the last."""
    return schedule_sigmas(*start_trajectory(FlowUniPC(), SOLVER_STEPS))


def rollout_steps(config: RolloutConfig, plan: GradientPlan) -> dict[int, float]:
    """Return how often a trajectory takes each step without gradient, averaged over the draws."""
    strides = [config.stride_at(sigma) for sigma in noise_levels()]
    found: dict[int, float] = {}
    for probability, points in plan.outcomes(SOLVER_STEPS):
        visit = [point.step for point in points]
        for step in strided_steps(0, SOLVER_STEPS, strides, visit):
            if step < visit[-1] and step not in visit:
                found[step] = found.get(step, 0.0) + float(probability)
    return found


def key_of(config: RolloutConfig, sigma: float) -> Key:
    """Return the key under which the forward at a noise level is counted."""
    precisions = RolloutEngine(_no_velocity, config).precisions(sigma)
    others = dict.fromkeys(CACHES, 0.0) | {"fp8_linears": None, "fp8_attention": None}
    # Neither a stride nor the solver's order changes a forward.
    return tuple(sorted(precisions.items())), replace(config, stride=1, solver_order=None, **others)


def _forward(preset: Preset, config: RolloutConfig, sigma: float, depth: int) -> tuple[Cost, Cost]:
    """Return the cost of a forward at a noise level with ``depth`` blocks, and its 8-bit FLOPs."""
    memory = uniform("none")
    workload = Case(preset, memory, True, "full").workload()
    # A reused residual depends on values, which fake tensors lack.
    config = replace(config, stride=1, compile="off", **dict.fromkeys(CACHES, 0.0))
    models = fake_models(workload, memory, memory, layers=depth, reward_layers=1)
    with models as (generator, _), torch.no_grad():
        x = torch.zeros(workload.latent_shape)
        text = torch.zeros(1, workload.text_tokens, preset.text_dim)
        engine, timesteps = RolloutEngine(generator, config), {0: torch.full((1,), 1000.0)}
        density = dict(engine.precisions(sigma)).get("density", 1.0)
        ledger = EightBits(float(density))
        with ledger, engine.open(x, timesteps, ({"encoder_hidden_states": text},)) as session:
            assert session is not None
            ledger.start_phase("forward")
            session.velocity(x, 0, sigma)
        return ledger.costs()["forward"], ledger.eight_bits.get("forward", NOTHING)


def forward(preset: Preset, config: RolloutConfig, sigma: float) -> Forward:
    """Return the work of a forward at a noise level, by the line through two small depths."""
    depths = DEPTHS[False]
    few, more = (_forward(preset, config, sigma, depth) for depth in depths)

    def at(depth: int) -> Work:
        lines = (split.line(a, b, depths, depth) for a, b in zip(few, more, strict=True))
        return Work.of(*lines)

    return Forward(at(preset.layers), at(1), at(0))


def count(preset: Preset, configs: Iterable[RolloutConfig]) -> Counts:
    """Count the parts of a step both ways, and every kind of forward of the rollouts."""
    parts = [
        {part: Work.of(cost) for part, cost in split.parts(preset, way).items()}
        for way in (REFERENCE, EXACT)
    ]
    counts, levels = Counts(preset.name, *parts), noise_levels()
    for config in (EXACT_CONFIG, *configs):
        for step in rollout_steps(config, GradientPlan.prfl(POINTS)):
            key = key_of(config, levels[step])
            if key not in counts.forwards:
                counts.forwards[key] = forward(preset, config, levels[step])
    return counts


def reused_share(config: RolloutConfig, drift: Mapping[str, Any]) -> float:
    """Return the share of forwards that reuse a residual, by the small world's record."""
    if not config.reuses:
        return 0.0
    # The record counts blocks. First-block caching always runs one.
    blocks = drift["blocks"]
    skipped = blocks - 1 if config.first_block_cache else blocks
    return drift["saved"] / drift["forwards"] * blocks / skipped


def rollout(
    counts: Counts, config: RolloutConfig, points: int, reused: float = 0.0
) -> tuple[Work, float]:
    """Return the work of a rollout for one point, and its forwards that run all blocks."""
    levels, work, whole = noise_levels(), counts.exact["caches"], 0.0
    for step, times in rollout_steps(config, GradientPlan.prfl(points)).items():
        found = counts.forwards[key_of(config, levels[step])]
        rest = found.one if config.first_block_cache else found.none
        work += (found.whole * (1 - reused) + rest * reused) * times
        whole += (1 - reused) * times
    return work * (1 / points), whole / points


def drift_check(counts: Counts, points: int) -> Work:
    """Return the work of drift checks for one point: exact rollouts to the last point."""
    outcomes = GradientPlan.prfl(points).outcomes(SOLVER_STEPS)
    steps = sum(float(probability) * drawn[-1].step for probability, drawn in outcomes)
    exact = counts.forwards[key_of(EXACT_CONFIG, noise_levels()[0])].whole
    return exact * (steps / points / CHECK_EVERY)


def inexact(options: Mapping[str, Option]) -> dict[str, RolloutConfig]:
    """Return the configurations that change a rollout as the reference runs it: no guidance."""
    return {
        name: option.config
        for name, option in options.items()
        if option.config is not None
        and option.config.inexact
        and not (option.lora or option.cuda or option.guidance is not None)
    }


def records(
    counts: Counts, configs: Mapping[str, RolloutConfig], drifts: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a record of each way at a size: the work of a gradient point by part.

    Args:
        counts: at the size.
        configs: of the rollout options.
        drifts: records of the small world, of which those of the options have ``in_prfl``.
    """
    by_name = {r["option"]: r["in_prfl"] for r in drifts if "in_prfl" in r}
    first = counts.reference["rollout"], REFERENCE.plan.expected_forwards(SOLVER_STEPS)
    base = _record(counts.reference, REFERENCE.name, 1, (first[0] * first[1], first[1]))
    found = [base]
    for points in (1, POINTS):
        taken = rollout(counts, EXACT_CONFIG, points)
        name = f"exact, {points} point{'s' * (points > 1)}"
        found.append(_record(counts.exact, name, points, taken))
    for name, config in configs.items():
        drift = by_name[name]
        reused = reused_share(config, drift)
        taken = rollout(counts, config, POINTS, reused)
        record = _record(counts.exact, name, POINTS, taken)
        record |= {"reused": reused, "drift": drift["drift"]}
        record["work"][CHECK] = asdict(drift_check(counts, POINTS))
        kinds = {
            key: float(bool(getattr(config, key))) for key in ("teacache", "first_block_cache")
        }
        record["family"] = repr(replace(config, **kinds)) if config.reuses else name
        found.append(record)
    for record in found:
        record["preset"] = counts.preset
        record["times_cheaper"] = {
            "with SFT": weighted(base) / weighted(record),
            "without SFT": weighted(base, SFT=0.0) / weighted(record, SFT=0.0),
            "SFT once a trajectory": weighted(base) / weighted(record, SFT=1 / record["points"]),
        }
    return found


def _record(
    parts: Mapping[str, Work], name: str, points: int, taken: tuple[Work, float]
) -> dict[str, Any]:
    work = {part: parts[part] for part in split.PARTS} | {"rollout": taken[0]}
    work["optimizer"] *= 1 / split.ACCUMULATION
    record: dict[str, Any] = {"case": "gradient point", "way": name, "points": points}
    record |= {"rollout_forwards": taken[1]}
    return record | {"work": {part: asdict(each) for part, each in work.items()}}


def work_of(record: Mapping[str, Any], **times: float) -> Work:
    """Return the work of all parts; ``times`` are factors of some, such as ``SFT=0``."""
    parts = {part: Work(**values) for part, values in record["work"].items()}
    return sum((work * times.get(part, 1.0) for part, work in parts.items()), Work())


def weighted(record: Mapping[str, Any], **times: float) -> float:
    return work_of(record, **times).weighted


def within(record: Mapping[str, Any]) -> bool:
    """Return True if the rollout is exact or its drift in the small world within the limit."""
    return record.get("drift", 0.0) <= DRIFT_LIMIT


def chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with one threshold of each cache: the cheapest within the limit, or first."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault(row.get("family", row["way"]), []).append(row)
    return [
        min((row for row in family if within(row)), key=weighted, default=family[0])
        for family in families.values()
    ]


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Return the table by size and way, with a note on the goal for each size."""
    body, verdicts = [], []
    for size in dict.fromkeys(r["preset"] for r in records):
        rows = [r for r in records if r["preset"] == size]
        for i, r in enumerate(chosen(rows)):
            work = work_of(r)
            line = ["" if i else size, r["way"], report.number(r["rollout_forwards"], 2)]
            line += [report.flops(value or None) for value in work.values()[:-1]]
            line += [report.flops(work.weighted), report.size(work.moved_bytes)]
            line += [report.ratio(value) for value in r["times_cheaper"].values()]
            over = "" if within(r) else " (over)"
            line.append(report.number(r.get("drift"), 4) + over)
            body.append(line)
        verdicts.append(_verdict(size, rows))
    columns = ["size", "rollout and points", "rollout forwards", "bf16 products", "bf16 attention"]
    columns += ["8-bit products", "8-bit attention", "weighted FLOPs", "moved"]
    columns += ["with SFT", "without SFT", "SFT once a trajectory", "drift"]
    return Table("gradient-point", "Cost per gradient point", columns, body, [*NOTES, *verdicts])


def _verdict(size: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return which rows reach the goal as configured, and which only with rarer drift checks."""
    goal = ", ".join(f"≥ {factor:g}× {name}" for name, factor in GOALS.items())
    reached, rarer = [], []
    for row in rows:
        every = least_check_every(row, rows[0])
        if every is None or not within(row):
            continue
        if every <= CHECK_EVERY:
            reached.append(row["way"])
        else:
            rarer.append(f"{row['way']} with check_every ≥ {every}{_weight_text(row, rows[0])}")
    text = f"reached by {'; '.join(reached) or 'no row'}"
    text += f", and if drift is checked less often by {'; '.join(rarer)}" if rarer else ""
    return f"Goal ({goal}, drift ≤ {DRIFT_LIMIT:g}) at {size}: {text}."


def _weight_text(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    most = largest_weight(row, base)
    return "" if most is None else f" (never checked, 8-bit FLOPs may count up to {most:.2f})"


def _budgets(base: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return supervised steps a point and the largest weighted FLOPs of each goal."""
    given = (1.0, GOALS["with SFT"]), (0.0, GOALS["without SFT"])
    return [(sft, weighted(base, SFT=sft) / goal) for sft, goal in given]


def least_check_every(row: Mapping[str, Any], base: Mapping[str, Any]) -> int | None:
    """Return the least ``check_every`` with which a row reaches both goals; None if with none."""
    check = CHECK_EVERY * Work(**row["work"].get(CHECK, {})).weighted
    found = 1
    for sft, budget in _budgets(base):
        left = budget - weighted(row, **{"SFT": sft, CHECK: 0.0})
        if left < 0 or (check and not left):
            return None
        found = max(found, math.ceil(check / left) if check else 1)
    return found


def largest_weight(row: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Return the largest weight of 8-bit FLOPs with which a row without checks reaches the goals.

    It is None without such FLOPs.
    """
    found = []
    for sft, budget in _budgets(base):
        work = work_of(row, **{"SFT": sft, CHECK: 0.0})
        eight_bits = work.products_8_bit + work.attention_8_bit
        if not eight_bits:
            return None
        found.append((budget - (work.flops - eight_bits)) / eight_bits)
    return min(found)


NOTES = (
    "Counted on fake tensors, recomputation included; no time was measured. All parameters train; "
    f"{SOLVER_STEPS} solver steps, no guidance, as is the reference's default; a reward of 8 "
    "blocks, one sample, 512 text tokens. The first row is the reference's way of the table "
    "above: one point a trajectory. All other rows are prfl_fast's; rows with an option have "
    f"{POINTS} points a trajectory.",
    "rollout forwards: those in which all blocks run, for each point, on average over the plan's "
    "draws. FLOPs and bytes have one supervised step a point. moved: what everything but products "
    "and attention reads and writes.",
    f"weighted FLOPs count an 8-bit FLOP as {EIGHT_BIT_WEIGHT:g}, since the data sheets of GPUs "
    "with FP8 give twice the bfloat16 rate; no kernel was timed.",
    f"With an option, a drift check in one of {CHECK_EVERY} trajectories, the default of "
    "RolloutConfig, runs an exact rollout beside the other; its work is included, its forwards not "
    "in their column.",
    "with SFT, without SFT: weighted FLOPs of the reference's way over those of the row. with SFT: "
    "one supervised step for each gradient point, as in the reference; SFT once a trajectory: as "
    f"prfl_fast's trainer pairs them, 1/{POINTS} of a supervised step for each point.",
    "drift: of the small world's tiny generator, not of Wan: the largest over the steps of PRFL's "
    f"rollouts with {POINTS} points, three draws and 4 samples. The shares of forwards in which "
    "TeaCache and first-block caching reuse residuals are those of the same rollouts; such a "
    "forward counts no block or one. Of several thresholds, the table has the one that costs "
    f"least within a drift of {DRIFT_LIMIT:g}; over: the row exceeds that.",
)
