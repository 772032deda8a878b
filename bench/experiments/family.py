"""Compare every method of the reward-gradient family in the small world.

From one generator and one latent reward model: each training method for the same number of reward
updates (``experiments.family_training``), then the ways of sampling better without training
(``experiments.family_sampling``), each with what it costs. All are rewarded by models that training
saw; the motion metric of ``bench/experiments/world`` is the judge that none of them saw.
"""

from concurrent.futures import Executor
from typing import Any

import report
import torch
from harness import Context, SuiteResult, Table

from experiments import small_world, world
from experiments.family_sampling import PRUNE_AT, USERS, run_user
from experiments.family_training import (
    DATA,
    LATE,
    METHODS,
    PREFERRED,
    PROCESS,
    Settings,
    run_arm,
)
from experiments.small_world import submit

SHOWN = {
    "along": "Latent reward along the sampler",
    "end": "Latent reward of the result",
    "motion": "Independent motion metric",
}
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
GREY = "#8c8c8c"
ONE_RUN = "Standard errors are over prompts; how runs of training differ is not in them."


def run(context: Context) -> SuiteResult:
    """Train with every method, then sample with every user."""
    with small_world.workers(context) as pool:
        return _run(Settings(), context, pool)


def _run(s: Settings, context: Context, pool: Executor) -> SuiteResult:
    start, held_out = small_world.prepare(s, context, pool)
    seeds = [context.seed + i for i in range(context.seeds)]
    work: list[tuple[Any, str]] = [(run_user, name) for name in USERS]
    # SFT last: it is short, so that no process waits long for the last one.
    work += [(run_arm, name) for name in sorted(METHODS, key=lambda n: METHODS[n].plan is None)]
    jobs = [
        submit(pool, function, start, s, name, seed) for seed in seeds for function, name in work
    ]
    results = small_world.results_of(jobs, context, "methods")
    arms = [r for r in results if "arm" in r]
    users = [r for r in results if "user" in r]
    good = held_out.good > 0
    real = world.motion_score(world.decode(held_out.latents))
    training, still = _training_table(arms, s)
    sampling, problems = _sampling_table(users, s)
    training.notes += [
        f"Real clips have a motion metric of {real[good].mean():.3f} without a defect and "
        f"{real[~good].mean():.3f} with one.",
    ]
    cases = [_plain(r) for r in results]
    cases.append({"case": "no rise of its own reward", "methods": still})
    figures = {"family_curves.png": _curves(arms), "family_cost.png": _cost(users)}
    return SuiteResult([training, sampling], cases, figures, problems)


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result as JSON: means instead of one number per prompt."""
    found = {k: v for k, v in result.items() if k not in ("before", "after", "scores")}
    for key in ("before", "after", "scores"):
        if key in result:
            found[key] = {name: float(value.mean()) for name, value in result[key].items()}
    if "before" in result:
        found["gain"] = {
            name: dict(zip(("mean", "sem"), _mean_sem(value - result["before"][name]), strict=True))
            for name, value in result["after"].items()
        }
    return found


def _mean_sem(values: torch.Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _signed(values: torch.Tensor) -> str:
    mean, sem = _mean_sem(values)
    return f"{mean:+.3f} ± {sem:.3f}"


def _joined(runs: list[dict[str, Any]], key: str, name: str) -> torch.Tensor:
    return torch.cat([r[key][name] for r in runs])


def _by(results: list[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Return the runs, one of each seed, by the name of what was run."""
    return {name: [r for r in results if r[key] == name] for name in {r[key] for r in results}}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_costs(runs: list[dict[str, Any]]) -> dict[str, float]:
    return {name: _mean([r["cost"][name] for r in runs]) for name in runs[0]["cost"]}


def _training_table(arms: list[dict[str, Any]], s: Settings) -> tuple[Table, list[str]]:
    """Return the table, and the methods whose own reward did not rise."""
    rows, still, by = [], [], _by(arms, "arm")
    scores = ("along", "end", "pixel", "motion")
    for name, label in (("sft", "start"), ("rglcd", f"start, {s.few_steps} steps")):
        means = [f"{_joined(by[name], 'before', key).mean():.3f}" for key in scores]
        rows.append([label, *means, *[report.BLANK] * 6])
    for name, method in METHODS.items():
        runs = by[name]
        gain = _joined(runs, "after", method.goal) - _joined(runs, "before", method.goal)
        mean, sem = _mean_sem(gain)
        if method.rewarded and not mean > 2 * sem:
            still.append(method.label)
        line = [method.label, *(f"{_joined(runs, 'after', key).mean():.3f}" for key in scores)]
        line.append(f"{method.goal} {_signed(gain)}" if method.rewarded else report.BLANK)
        moved, cost = _mean([a["moved"] for a in runs]), _mean_costs(runs)
        line += [f"{moved:.3f}", report.seconds(cost["seconds"]), report.size(cost["peak_bytes"])]
        rows.append([*line, f"{cost['forwards']:.1f}", report.flops(cost["round_flops"])])
    columns = ["method", "along", "end", "pixel", "motion", "its own reward's rise", "moved"]
    columns += ["time", "peak", "forwards", "FLOPs"]
    notes = [
        f"{s.updates} reward updates of {s.feedback_batch} clips each, + SFT: as many supervised "
        f"ones of {s.sft_batch} between them (SFT only: {2 * s.updates}); {s.solver_steps} Euler "
        f"steps, RG-LCD is sampled in {s.few_steps}. InstructVideo's reward reads the clip as a "
        "whole: one latent frame shows no motion.",
        "along, end: latent reward along the sampler and of its result; pixel: of the video "
        f"classifier; motion: the metric no training sees. {s.prompts} held-out prompts.",
        "its own reward's rise: of what the method's gradient raises, mean ± standard error over "
        "the prompts, each against its own start from the same noise.",
        f"Flow-DPO: pairs of a good and a defective clip, {s.sft_batch // 2} an update; Flow-RWR: "
        f"weighted by exp(latent reward / {s.rwr_temperature:g}). Alone they take two updates a "
        "round, + PRFL they take SFT's place.",
        "moved: relative L2 distance of the velocity from the start's, on noised real clips.",
        "time, FLOPs: of one round, a reward update and its supervised one; peak: of the reward "
        "update; forwards: of the generator for one rewarded clip, on average; not those "
        "recomputed, of the divergence penalty's base and of RG-LCD's distillation loss, which are "
        "in the FLOPs.",
        f"Chosen for this small world: reward weights {s.latent_weight:g} (latent) and "
        f"{s.pixel_weight:g} (pixel), learning rates {s.feedback_rate:g} and {s.lora_rate:g} "
        f"(LoRA of rank {s.lora_rank}), divergence factor {METHODS['divergence'].divergence:g}.",
        ONE_RUN,
        "No rise by more than two standard errors: " + (", ".join(still) or "none") + ".",
    ]
    return Table("family", "Training methods in the small world", columns, rows, notes), still


def _sampling_table(users: list[dict[str, Any]], s: Settings) -> tuple[Table, list[str]]:
    rows, problems, unsure, fallen = [], [], [], []
    by = _by(users, "user")
    plain = by["plain"]
    plain_flops = _mean_costs(plain)["flops"]
    for name, user in USERS.items():
        runs, cost = by[name], _mean_costs(by[name])
        end, motions = (
            _joined(runs, "scores", key) - _joined(plain, "scores", key)
            for key in ("end", "motion")
        )
        mean, sem = _mean_sem(end)
        shown = [report.BLANK] * 2
        if name != "plain":
            shown = [_signed(end), _signed(motions)]
            if not mean > 2 * sem:
                problems.append(f"{user.label} does not beat plain sampling: {shown[0]}")
            motion, sem = _mean_sem(motions)
            if motion < -2 * sem:
                fallen.append(user.label)
            elif not motion > 2 * sem:
                unsure.append(user.label)
        means = [f"{_joined(runs, 'scores', key).mean():.3f}" for key in ("end", "pixel", "motion")]
        line = [user.label, means[0], shown[0], *means[1:], shown[1]]
        line += [f"{cost[n]:.0f}" for n in ("forwards", "reward_forwards")]
        line += [report.flops(cost["flops"]), report.ratio(cost["flops"] / plain_flops)]
        rows.append([*line, report.size(cost["peak_bytes"]), report.seconds(cost["seconds"])])
    columns = ["sampling", "end", "over plain", "pixel", "motion", "over plain", "forwards"]
    columns += ["rewards", "FLOPs", "plain = 1", "peak", "time"]
    notes = [
        f"The untouched generator, {s.solver_steps} Euler steps, {s.users} held-out prompts. end: "
        "latent reward of the result, which all but plain sampling seek; over plain: mean ± "
        "standard error over the prompts, each against plain sampling from the same first noise.",
        f"Chosen for this small world: pruned after steps {', '.join(map(str, PRUNE_AT))}; the "
        "guidance weights, on these very prompts. ReNO's learning rate is the default of "
        f"optimize_noise, its paper's. {ONE_RUN}",
        "Cost of one clip: generator and reward forwards, all FLOPs (backward and recomputed "
        "forwards included), peak with one prompt at a time, time with all of them.",
        "The motion metric falls by two standard errors, the reward being exploited: "
        f"{', '.join(fallen) or 'none'}. It neither rises nor falls by as much: "
        f"{', '.join(unsure) or 'none'}.",
    ]
    title = "Better samples without training"
    return Table("family-sampling", title, columns, rows, notes), problems


def _curves(arms: list[dict[str, Any]]) -> Any:
    groups = (PROCESS, LATE, DATA, PREFERRED)
    figure, panels = report.new_figure(15, 10, nrows=len(SHOWN), ncols=len(groups), sharey="row")

    by = _by(arms, "arm")

    def draw(axes: Any, name: str, key: str, color: str, label: str) -> None:
        runs = [a["points"] for a in by[name]]
        values = torch.tensor([[p[key] for p in run] for run in runs]).mean(0)
        axes.plot([p["update"] for p in runs[0]], values, "o-", color=color, label=label, ms=4)

    for line, (key, title) in zip(panels, SHOWN.items(), strict=True):
        for axes, group in zip(line, groups, strict=True):
            draw(axes, "sft", key, GREY, METHODS["sft"].label)
            members = [(n, m) for n, m in METHODS.items() if m.group == group]
            for color, (name, method) in zip(COLORS, members, strict=False):
                draw(axes, name, key, color, method.label)
            above = group if line is panels[0] else ""
            below = "reward updates" if line is panels[-1] else ""
            beside = title if group is groups[0] else ""
            report.label_axes(axes, title=above, x=below, y=beside)
    for axes in panels[-1]:
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    seeds = len({a["seed"] for a in arms})
    final = {name: _mean([a["points"][-1]["motion"] for a in by[name]]) for name in METHODS}
    best = max(final, key=lambda name: final[name])
    figure.suptitle(
        f"{METHODS[best].label} ends highest on the motion metric: {final[best]:.3f}, "
        f"SFT only {final['sft']:.3f} ({seeds} seed{'s' if seeds > 1 else ''})",
        fontsize=11,
    )
    return figure


def _cost(users: list[dict[str, Any]]) -> Any:
    """Draw reward and motion against cost; a line joins ways that differ in budget only."""
    figure, panels = report.new_figure(11, 4.5, ncols=2)
    by = _by(users, "user")
    plain = _mean_costs(by["plain"])["flops"]
    groups = dict.fromkeys(user.group for user in USERS.values())
    for axes, key in zip(panels, ("end", "motion"), strict=True):
        for color, group in zip((GREY, *COLORS), groups, strict=False):
            members = [by[name] for name, user in USERS.items() if user.group == group]
            at = [_mean_costs(runs)["flops"] / plain for runs in members]
            found = [_mean_sem(_joined(runs, "scores", key)) for runs in members]
            means, errors = zip(*found, strict=True)
            axes.errorbar(at, means, errors, fmt="o-", color=color, label=group, capsize=3, ms=5)
        axes.set_xscale("log")
        axes.set_xticks((1, 2, 5, 10, 20, 50), ("1", "2", "5", "10", "20", "50"))
        axes.minorticks_off()
        report.label_axes(axes, title=SHOWN[key], x="FLOPs of a clip, plain sampling = 1")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    motion = {name: _joined(by[name], "scores", "motion") for name in USERS}
    best = max(motion, key=lambda name: motion[name].mean())
    figure.suptitle(
        f"{USERS[best].label} has the highest motion metric: {motion[best].mean():.3f}, plain "
        f"sampling {motion['plain'].mean():.3f} (± standard error over prompts)",
        fontsize=11,
    )
    return figure
