"""Compare three ways to train a generator further in the small world.

A tiny Wan learns flow matching on clips of which half have a defect; a latent reward model made
from its first blocks learns to tell them apart on noisy latents; then, from the same generator and
with the same number of optimizer updates, SFT alone, RGB ReFL + SFT and PRFL + SFT. The figure
shows the latent reward along the sampler and the motion metric of ``experiments.world``, which
tracks bodies in decoded frames and which no training sees.
"""

import os
import time
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any

import report
import torch
from harness import Context, SuiteResult, Table

from experiments import small_world, world
from experiments.small_world import CHANCE, Start, assess, submit
from prfl_fast import PRFL, FlowEuler, GradientPlan
from prfl_fast.data import Batches
from prfl_fast.rewards import PixelReward
from prfl_fast.training import RewardFeedback
from prfl_fast.training.reward_losses import EVALUATION_TIMESTEPS, evaluate

PATCHED = os.environ.get("PRFL_FAST_BENCH_PATCHED") == "1"  # also on a CPU
ARMS = {"sft": "SFT only", "rgb_refl": "RGB ReFL + SFT", "prfl": "PRFL + SFT"}


@dataclass(frozen=True)
class Settings(small_world.ArmSettings):
    """Set the sizes of the experiment; the defaults fit a few minutes of two CPU cores."""

    updates: int = 60
    points: int = 5
    # The latent reward's gradient is a tenth of the flow loss's here; at the paper's 0.1 AdamW's
    # shared second moments are SFT's and the reward moves little. The pixel reward's is larger: at
    # 1.0 the motion metric falls from 0.37 to 0.28, so it keeps 0.1.
    prfl_weight: float = 1.0
    rgb_weight: float = 0.1


def run_arm(start: Start, s: Settings, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm from the common start; return metrics at each checkpoint."""
    began = time.perf_counter()
    # At the CPU's sizes dispatching dominates and the fused operations have nothing to gain.
    model, device = small_world.copy_generator(start, PATCHED)
    batches = partial(Batches, start.clips.samples())
    sft = small_world.Supervised(model, batches(32, 10 * seed + 1))
    # As many optimizer updates for every arm: SFT alone takes two of its own.
    first: Any = small_world.Supervised(model, batches(32, 10 * seed + 2))
    if arm != "sft":
        reward: Any = start.reward
        plan, weight = GradientPlan.prfl(s.points), s.prfl_weight
        if arm == "rgb_refl":
            reward = PixelReward(world.decode, start.pixel)
            plan, weight = GradientPlan.refl(), s.rgb_weight
        step = PRFL(
            model, reward, FlowEuler(), plan, num_inference_steps=s.solver_steps, weight=weight
        )
        first = RewardFeedback(step, batches(s.feedback_batch, 10 * seed + 2), device)
    points: list[dict[str, Any]] = []

    def measure(update: int) -> None:
        found, _ = assess(model, start, s.solver_steps, 1000 + seed)
        points.append({"update": update, **found})

    measure(0)
    objectives = {"first": first, "second": sft}
    skipped, _ = small_world.train_arm(model, objectives, s, seed, measure)
    wall = time.perf_counter() - began
    return {"arm": arm, "seed": seed, "points": points, "skipped": skipped, "wall_s": wall}


def _accuracy_table(accuracy: dict[float, dict[str, float]], s: Settings) -> Table:
    rows = [
        [f"{t:g}", f"{a['accuracy']:.3f}", report.number(a.get("auc")), f"{a['loss']:.3f}"]
        for t, a in accuracy.items()
    ]
    notes = [f"{s.held_out} held-out clips, half with a defect; chance is {CHANCE}."]
    columns = ["timestep", "accuracy", "AUC", "cross-entropy"]
    return Table("pavrm", "Latent reward model by timestep", columns, rows, notes)


def _mean_std(values: list[float]) -> str:
    tensor = torch.tensor(values)
    spread = f" ± {tensor.std():.3f}" if len(values) > 1 else ""
    return f"{tensor.mean():.3f}{spread}"


def _arms_table(arms: list[dict[str, Any]], s: Settings, real: tuple[float, float]) -> Table:
    rows = []
    seeds = sorted({a["seed"] for a in arms})
    final = {(a["arm"], a["seed"]): a["points"][-1]["motion"] for a in arms}
    for name, label in ARMS.items():
        runs = [a for a in arms if a["arm"] == name]
        wins = sum(final[name, seed] > final["sft", seed] for seed in seeds)
        line = [label]
        for key in ("reward", "motion"):
            line += [_mean_std([a["points"][at][key] for a in runs]) for at in (0, -1)]
        line.append(report.BLANK if name == "sft" else f"{wins} of {len(seeds)}")
        rows.append([*line, report.seconds(sum(a["wall_s"] for a in runs) / len(runs))])
    sem = max(p["motion_sem"] for a in arms for p in a["points"])
    columns = ["arm", "reward before", "after", "motion before", "after", "above SFT", "time"]
    notes = [
        f"{2 * s.updates} optimizer updates an arm, {s.solver_steps} Euler steps, {s.points} "
        f"gradient points a trajectory; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
        f"{', mean ± standard deviation' if len(seeds) > 1 else ''}.",
        f"motion: the independent metric on {s.prompts} held-out prompts, standard error ≤ "
        f"{sem:.3f}; real clips score {real[0]:.3f} without and {real[1]:.3f} with a defect.",
        "Generator and reward model are shared by all arms and seeds; arms of a seed share their "
        "sampling noise.",
    ]
    return Table("alignment", "Alignment in the small world", columns, rows, notes)


def curves_figure(arms: list[dict[str, Any]]) -> Any:
    """Draw reward and motion metric against updates; the title names the best arm on motion."""
    figure, panels = report.new_figure(10, 4, ncols=2)
    seeds = len({a["seed"] for a in arms})
    final: dict[str, float] = {}
    begin = 0.0
    for axes, key, title in (
        (panels[0], "reward", "Latent reward along the sampler"),
        (panels[1], "motion", "Independent motion metric (never trained on)"),
    ):
        for arm, color in zip(ARMS, ("#8c8c8c", "#e69f00", "#0072b2"), strict=True):
            runs = [a["points"] for a in arms if a["arm"] == arm]
            values = torch.tensor([[p[key] for p in run] for run in runs])
            mean = values.mean(0)
            # One seed has no spread of seeds: show the standard error over prompts, where recorded.
            spread = values.std(0) if seeds > 1 else torch.zeros_like(mean)
            if seeds == 1 and key == "motion":
                spread = torch.tensor([p["motion_sem"] for p in runs[0]])
            updates = [2 * p["update"] for p in runs[0]]
            style = {"fmt": "o-", "color": color, "label": ARMS[arm], "capsize": 3, "ms": 4}
            axes.errorbar(updates, mean, spread, **style)
            final[arm], begin = float(mean[-1]), float(mean[0])
        report.label_axes(axes, title=title, x="optimizer updates", y=f"{key} (0 to 1)")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=8, loc="lower right")
    best = max(final, key=lambda arm: final[arm])
    bars = f"{seeds} seeds, ± one standard deviation" if seeds > 1 else "one seed, ± standard error"
    figure.suptitle(
        f"{ARMS[best]} ends highest on the motion metric: {begin:.3f} → {final[best]:.3f}, "
        f"SFT only {final['sft']:.3f}\n{bars}",
        fontsize=11,
    )
    return figure


def accuracy_figure(accuracy: dict[float, dict[str, float]]) -> Any:
    figure, axes = report.new_figure(5.5, 3.6)
    values = {t: a["accuracy"] for t, a in accuracy.items()}
    axes.plot(list(values), list(values.values()), "o-", color="#0072b2")
    axes.axhline(CHANCE, color="#8c8c8c", ls="--", lw=1)
    axes.annotate("chance", (min(accuracy), CHANCE + 0.01), fontsize=8, color="#555555")
    low, high = min(values), max(values)
    title = f"Reward model: accuracy {values[low]:.2f} at timestep {low:g}, {values[high]:.2f} at "
    text = {"x": "timestep (1000 σ)", "y": "accuracy on held-out clips"}
    report.label_axes(axes, title=f"{title}{high:g}", **text)
    axes.set_ylim(0, 1)
    return figure


def run(context: Context) -> SuiteResult:
    """Train everything and compare the arms; ``context.seeds`` repeats the arms."""
    with small_world.workers(context) as pool:
        return _run(Settings(), context, pool)


def _run(s: Settings, context: Context, pool: Executor) -> SuiteResult:
    start, held_out, trained = small_world.prepare(s, context, pool)
    device, seed = context.device, context.seed
    jobs = [
        submit(pool, run_arm, start, s, arm, seed + i)
        for i in range(context.seeds)
        for arm in ("prfl", "rgb_refl", "sft")
    ]
    held_batches = list(held_out.batches(device))
    times = EVALUATION_TIMESTEPS
    accuracy = evaluate(start.reward, held_batches, times, seed=seed, integer_timesteps=False)
    arms = small_world.results_of(jobs, context, "arms")
    motion, good = world.motion_score(world.decode(held_out.latents)), held_out.good > 0
    real = (float(motion[good].mean()), float(motion[~good].mean()))
    figures = {
        "alignment_curves.png": curves_figure(arms),
        "pavrm_accuracy.png": accuracy_figure(accuracy),
    }
    cases = [{"case": "pavrm", "timesteps": {f"{t:g}": a for t, a in accuracy.items()}}]
    cases += arms
    cases.append({"case": "real clips", "motion_good": real[0], "motion_defect": real[1]})
    tables = [_accuracy_table(accuracy, s), _arms_table(arms, s, real)]
    tables[0].notes.append(trained)
    return SuiteResult(tables, cases, figures)
