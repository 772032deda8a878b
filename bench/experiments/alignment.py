"""Compare ways to train a generator further in the small world.

From the same generator and latent reward model (``experiments.train_world``), with the same number
of optimizer updates: SFT alone, RGB ReFL + SFT and PRFL + SFT; and PRFL without SFT, at a higher
learning rate, which exploits its reward. The figures show the latent reward along the sampler and
the motion metric of ``experiments.world``, which tracks bodies in decoded frames and which no
training sees.
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


@dataclass(frozen=True)
class Arm:
    """Describe a way to train on from the common generator.

    Attributes:
        label: for tables and figures. color: of its curve.
        reward: ``latent`` for PRFL, ``pixel`` for RGB ReFL, None for supervised updates only.
        sft: each reward update is followed by a supervised one.
    """

    label: str
    color: str
    reward: str | None
    sft: bool = True


ARMS = {
    "prfl": Arm("PRFL + SFT", "#0072b2", "latent"),
    "alone": Arm("PRFL without SFT", "#d55e00", "latent", sft=False),
    "rgb_refl": Arm("RGB ReFL + SFT", "#e69f00", "pixel"),
    "sft": Arm("SFT only", "#8c8c8c", None),
}


@dataclass(frozen=True)
class Settings(small_world.ArmSettings):
    """Set the sizes of the experiment; the defaults fit two minutes of two CPU cores."""

    updates: int = 32
    checkpoints: int = 5
    points: int = 5
    feedback_rate: float = 3e-4
    # The latent reward's gradient is a tenth of the flow loss's here; at the paper's 0.1 AdamW's
    # shared second moments are SFT's and the reward moves little. After 30 rounds the motion metric
    # of one seed was 0.890 with a weight of 1, 0.917 with 3, 0.916 with 6; of another 0.916 with 3,
    # 0.921 with 6. The pixel reward's gradient is larger.
    prfl_weight: float = 6.0
    rgb_weight: float = 0.1
    alone_rate: float = 1e-3
    strips: int = 4


def run_arm(start: Start, s: Settings, name: str, seed: int) -> dict[str, Any]:
    """Train one arm from the common start; return metrics at each checkpoint, and last clips."""
    arm = ARMS[name]
    # At the CPU's sizes dispatching dominates and the fused operations have nothing to gain.
    model, device = small_world.copy_generator(start, PATCHED)
    # An arm has one thread of a CPU, which it may share with other work.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    batches = partial(Batches, start.clips.samples())

    def supervised(seed: int) -> Any:
        return small_world.Supervised(model, batches(32, seed))

    def rewarded(seed: int) -> RewardFeedback:
        reward: Any = start.reward
        plan, weight = GradientPlan.prfl(s.points), s.prfl_weight
        if arm.reward == "pixel":
            reward = PixelReward(world.decode, start.pixel)
            plan, weight = GradientPlan.refl(), s.rgb_weight
        options: Any = {"num_inference_steps": s.solver_steps, "weight": weight}
        step = PRFL(model, reward, FlowEuler(), plan, **options)
        return RewardFeedback(step, batches(s.feedback_batch, seed), device)

    # As many optimizer updates for every arm: one alone takes two of its own.
    objectives = {
        "first": (rewarded if arm.reward else supervised)(10 * seed + 2),
        "second": (supervised if arm.sft else rewarded)(10 * seed + 1),
    }
    points: list[dict[str, Any]] = []
    clips: list[small_world.Assessed] = []

    def measure(update: int) -> None:
        found, judged = assess(model, start, s.solver_steps, 1000 + seed)
        points.append({"update": update, **found})
        clips[1:] = [judged]

    measure(0)
    rate = None if arm.sft else s.alone_rate
    skipped, _ = small_world.train_arm(model, objectives, s, seed, measure, rate)
    record = {"arm": name, "seed": seed, "points": points, "skipped": skipped}
    return record | {"seconds": clock() - began, "clips": clips}


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


def gap_closed(arm: dict[str, Any], good: float) -> float:
    """Return the share of the gap between an arm's first clips and defect-free ones it closed."""
    before, after = (arm["points"][at]["motion"] for at in (0, -1))
    return float((after - before) / (good - before))


def _arms_table(arms: list[dict[str, Any]], s: Settings, real: tuple[float, float]) -> Table:
    rows = []
    seeds = sorted({a["seed"] for a in arms})
    final = {(a["arm"], a["seed"]): a["points"][-1]["motion"] for a in arms}
    for name, arm in ARMS.items():
        runs = [a for a in arms if a["arm"] == name]
        wins = sum(final[name, seed] > final["sft", seed] for seed in seeds)
        line = [arm.label]
        for key in ("reward", "motion"):
            line += [_mean_std([a["points"][at][key] for a in runs]) for at in (0, -1)]
        line.append(_mean_std([gap_closed(a, real[0]) for a in runs]))
        line.append(report.BLANK if name == "sft" else f"{wins} of {len(seeds)}")
        rows.append([*line, report.seconds(sum(a["seconds"] for a in runs) / len(runs))])
    sem = max(p["motion_sem"] for a in arms for p in a["points"])
    columns = ["arm", "reward before", "after", "motion before", "after", "gap closed"]
    columns += ["above SFT", "time"]
    notes = [
        f"{2 * s.updates} optimizer updates an arm, without SFT all of the reward; "
        f"{s.solver_steps} Euler steps, {s.points} gradient points a trajectory; {len(seeds)} "
        f"seed{'s' if len(seeds) > 1 else ''}"
        f"{', mean ± standard deviation' if len(seeds) > 1 else ''}.",
        f"motion: the independent metric on {s.prompts} held-out prompts, standard error ≤ "
        f"{sem:.3f}; real clips score {real[0]:.3f} without and {real[1]:.3f} with a defect, and "
        "half of the training clips have one.",
        "gap closed: share of the distance between the start and defect-free clips. time: of one "
        "CPU core, or wall time on a GPU.",
        f"Learning rate {s.feedback_rate:g}, without SFT {s.alone_rate:g}: a run that exploits its "
        "reward, which rises while the motion metric falls.",
        "Generator and reward model are shared by all arms and seeds; arms of a seed share their "
        "sampling noise.",
    ]
    return Table("alignment", "Alignment in the small world", columns, rows, notes)


def curves_figure(arms: list[dict[str, Any]], real: tuple[float, float]) -> Any:
    """Draw reward and motion metric against updates, with the metric of real clips."""
    figure, panels = report.new_figure(10, 4.2, ncols=2)
    seeds = len({a["seed"] for a in arms})
    final: dict[str, dict[str, float]] = {"reward": {}, "motion": {}}
    begin = 0.0
    for axes, key, title in (
        (panels[0], "reward", "Latent reward along the sampler"),
        (panels[1], "motion", "Independent motion metric (never trained on)"),
    ):
        for name, arm in ARMS.items():
            runs = [a["points"] for a in arms if a["arm"] == name]
            values = torch.tensor([[p[key] for p in run] for run in runs])
            mean = values.mean(0)
            # One seed has no spread of seeds: show the standard error over prompts, where recorded.
            spread = values.std(0) if seeds > 1 else torch.zeros_like(mean)
            if seeds == 1 and key == "motion":
                spread = torch.tensor([p["motion_sem"] for p in runs[0]])
            updates = [2 * p["update"] for p in runs[0]]
            style = {"fmt": "o-", "color": arm.color, "label": arm.label, "capsize": 3, "ms": 4}
            axes.errorbar(updates, mean, spread, **style)
            final[key][name], begin = float(mean[-1]), float(mean[0])
        report.label_axes(axes, title=title, x="optimizer updates")
        axes.set_ylim(0, 1.02)
    for value, text in zip(real, ("real clips without a defect", "with a defect"), strict=True):
        panels[1].axhline(value, color="#555555", ls="--", lw=0.8)
        panels[1].annotate(text, (0, value - 0.04), fontsize=8, color="#555555")
    panels[0].legend(fontsize=8, loc="lower right")
    bars = f"{seeds} seeds, ± one standard deviation" if seeds > 1 else "one seed, ± standard error"
    motion = final["motion"]
    figure.suptitle(
        f"PRFL + SFT raises the motion metric from {begin:.2f} to {motion['prfl']:.2f}; "
        f"without SFT it ends at {motion['alone']:.2f} with a reward of "
        f"{final['reward']['alone']:.2f}\n{bars}",
        fontsize=11,
    )
    return figure


def strips_figure(arms: list[dict[str, Any]], s: Settings, threshold: float) -> Any:
    """Draw clips before and after PRFL + SFT from the same noise, of the first seed.

    Shown are the first held-out prompts whose clip scored below ``threshold`` before.
    """
    before, after = next(a["clips"] for a in arms if a["arm"] == "prfl")
    bad = before.motion < threshold
    shown = bad.nonzero().flatten()[: s.strips].tolist()
    rows = [(i, *clip) for i in shown for clip in (("start", before), (ARMS["prfl"].label, after))]
    size = {"nrows": max(1, len(rows)), "ncols": 2, "width_ratios": (9, 1), "squeeze": False}
    figure, panels = report.new_figure(11, 1.2 * max(1, len(rows)) + 0.6, **size)
    for (index, label, clips), (strip, path) in zip(rows, panels, strict=False):
        frames = clips.frames[index]  # [3, F, H, W]
        padded = [torch.nn.functional.pad(f, (0, 1), value=255) for f in frames[:, ::2].unbind(1)]
        strip.imshow(torch.cat(padded, -1).permute(1, 2, 0).numpy())
        text = f"{label}\n{clips.motion[index]:.2f}"
        strip.set_ylabel(text, rotation=0, ha="right", va="center")
        found = world.track(frames[None].float() / 127.5 - 1)
        # Area of a mark in points, of a body in pixels.
        x, y = found.positions[0, 0].unbind(-1)
        path.plot(x, y, color="#999999", lw=0.8)
        path.scatter(x, y, found.area[0, 0], range(len(x)), cmap="viridis", alpha=0.7, lw=0)
        path.set_xlim(0, frames.shape[-1])
        path.set_ylim(frames.shape[-2], 0)
        path.set_aspect("equal")
        for axes in (strip, path):
            axes.set_xticks([])
            axes.set_yticks([])
        strip.spines[:].set_visible(False)
    rise = (after.motion - before.motion)[bad]
    figure.suptitle(
        f"The first {len(shown)} held-out prompts whose clip scored below {threshold:.2f} at the "
        "start, the mean of real defective clips; same noise\nEvery second frame, then the body's "
        f"path as the metric tracks it. Of all {len(rise)} such prompts the metric rose for "
        f"{int((rise > 0).sum())}, on average by {float(rise.mean()):.2f}",
        fontsize=10,
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
    start, held_out = small_world.prepare(s, context, pool)
    device, seed = context.device, context.seed
    jobs = [
        submit(pool, run_arm, start, s, arm, seed + i) for i in range(context.seeds) for arm in ARMS
    ]
    held_batches = list(held_out.batches(device))
    times = EVALUATION_TIMESTEPS
    accuracy = evaluate(start.reward, held_batches, times, seed=seed, integer_timesteps=False)
    motion, good = world.motion_score(world.decode(held_out.latents)), held_out.good > 0
    real = (float(motion[good].mean()), float(motion[~good].mean()))
    arms = small_world.results_of(jobs, context, "arms")
    figures = {
        "alignment_curves.png": curves_figure(arms, real),
        "alignment_strips.png": strips_figure(arms, s, real[1]),
        "pavrm_accuracy.png": accuracy_figure(accuracy),
    }
    cases = [{"case": "pavrm", "timesteps": {f"{t:g}": a for t, a in accuracy.items()}}]
    cases += [{key: value for key, value in arm.items() if key != "clips"} for arm in arms]
    cases.append({"case": "real clips", "motion_good": real[0], "motion_defect": real[1]})
    tables = [_accuracy_table(accuracy, s), _arms_table(arms, s, real)]
    return SuiteResult(tables, cases, figures)
