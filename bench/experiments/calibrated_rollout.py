"""Train in the small world with exact and with calibrated rollouts: suite ``calibrated-rollout``.

Each arm is PRFL alone from the common generator, with 5 gradient points of 40 UniPC steps: enough
steps between the points that a rollout can save some.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import report
import torch
from harness import Context, SuiteResult, Table
from method_specs import SOLVER_STEPS
from torch import nn

from experiments import small_world
from experiments.small_world import Clips, Start, assess, results_of, submit
from prfl_fast import PRFL, FlowUniPC, GradientPlan, RolloutConfig
from prfl_fast.data import Batches
from prfl_fast.feedback.calibration import Calibration, Sampled, calibrate
from prfl_fast.training import RewardFeedback

DRIFTS = (0.015, 0.02)  # budgets of the calibrated arms
POINTS = 5
EXACT = "exact"
FIGURES = {"reward": "Latent reward along the sampler", "motion": "Independent motion metric"}


@dataclass(frozen=True)
class Settings(small_world.ArmSettings):
    """Set the sizes of the arms."""

    clips: int = 256
    checkpoints: int = 2
    updates: int = 20
    feedback_batch: int = 8
    feedback_rate: float = 5e-4
    samples: int = 4  # of the calibration


def prepare(s: Settings, device: torch.device | None = None) -> Start:
    """Return the common start on a device, the CPU if none is given."""
    text = Clips.make(s.prompts, 999_000).text
    models = small_world.read_models(device or torch.device("cpu"))
    return Start(*models, Clips.make(s.clips, 1000), {"encoder_hidden_states": text})


def make_step(model: nn.Module, start: Start, rollout: RolloutConfig | None) -> PRFL:
    return PRFL(
        model,
        start.reward,
        FlowUniPC(),
        GradientPlan.prfl(POINTS),
        num_inference_steps=SOLVER_STEPS,
        weight=1.0,
        rollout=rollout,
    )


def arm_of(drift: float) -> str:
    """Return the name of the arm that is calibrated within a budget."""
    return f"drift ≤ {drift:g}"


def calibrated(start: Start, s: Settings, drift: float) -> Calibration:
    """Calibrate the start's generator within a budget, on its training clips."""
    model, _ = small_world.copy_generator(start, patch=True)
    generator = torch.Generator().manual_seed(0)
    batches = Batches(start.clips.samples(), s.feedback_batch, 0)
    samples = []
    for number in range(s.samples):
        batch = batches[number]
        noise = torch.randn(batch.latents.shape, generator=generator)
        samples.append(Sampled(noise, batch.conditions))
    return calibrate(make_step(model, start, None), samples, drift)


def run_arm(
    start: Start, s: Settings, rollout: RolloutConfig | None, seed: int
) -> list[dict[str, Any]]:
    """Train an arm; return the reward and the motion metric before and after."""
    torch.manual_seed(seed)
    model, device = small_world.copy_generator(start, patch=True)
    step = make_step(model, start, rollout)
    batches = Batches(start.clips.samples(), s.feedback_batch, seed)
    objectives = {"prfl": RewardFeedback(step, batches, device)}
    points: list[dict[str, Any]] = []

    def measure(update: int) -> None:
        found, _ = assess(model, start, s.solver_steps, 1000 + seed)
        points.append({"update": update, **found, "exact": step.engine.fallen_back})

    measure(0)
    small_world.train_arm(model, objectives, s, seed, measure)
    return points


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def arms_table(found: dict[str, Calibration], runs: dict[str, list[Any]], s: Settings) -> Table:
    """Return the table of the arms: cost of a gradient point, drift, reward and motion metric.

    ``found`` has the calibration of each calibrated arm, ``runs`` the points of each arm's seeds.
    """
    exact = next(iter(found.values())).measured[0]
    rows = {EXACT: exact} | {name: each.chosen for name, each in found.items()}
    body = []
    for name, measured in rows.items():
        ends = [(points[0], points[-1]) for points in runs[name]]
        cells = [report.flops(measured.rollout_flops), report.flops(measured.flops)]
        cells += [f"{exact.rollout_flops / measured.rollout_flops:.2f}×"]
        cells += [f"{exact.flops / measured.flops:.2f}×", f"{measured.drift:.1e}"]
        cells.append(f"{measured.cosine:.4f}")
        for figure in FIGURES:
            for i in range(2):
                cells.append(_spread([pair[i][figure] for pair in ends]))
        body.append([name, *cells])
    seeds = len(runs[EXACT])
    columns = ["rollout", "its FLOPs a point", "FLOPs a point", "fewer in rollouts", "fewer in all"]
    columns += ["drift", "cosine", "reward before", "after", "motion before", "after"]
    plural, spread = ("s", ", mean ± standard deviation") if seeds > 1 else ("", "")
    notes = [
        f"PRFL alone, {POINTS} gradient points of {SOLVER_STEPS} UniPC steps, {s.updates} updates; "
        f"{seeds} seed{plural}{spread}. Rollouts with a drift were calibrated within it on "
        f"{s.samples} batches, which chose:",
        *(f"{name}: {_words(each.chosen.options)}." for name, each in found.items()),
        "FLOPs of a gradient point include its forward, reward and backward, which no rollout "
        "saves. drift, cosine: of the latents and of the gradient, against exact rollouts. Motion "
        f"is the independent metric on {s.prompts} prompts.",
    ]
    return Table("calibrated-rollout", "Training with a calibrated rollout", columns, body, notes)


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())


def arms_figure(found: dict[str, Calibration], runs: dict[str, list[Any]]) -> Any:
    """Draw reward and motion metric before and after training, with the spread of the seeds."""
    figure, panels = report.new_figure(9, 3.2, ncols=2, sharey=True)
    seeds = len(runs[EXACT])
    colors = ("#8c8c8c", "#0072b2", "#e69f00", "#d55e00")
    for axes, (key, title) in zip(panels, FIGURES.items(), strict=True):
        values = {"start": [points[0][key] for points in runs[EXACT]]}
        values |= {name: [points[-1][key] for points in each] for name, each in runs.items()}
        means = [statistics.mean(each) for each in values.values()]
        spreads = [statistics.stdev(each) if seeds > 1 else 0.0 for each in values.values()]
        options: dict[str, Any] = {"color": colors[: len(values)], "capsize": 3}
        axes.barh(list(values), means, 0.6, xerr=spreads, **options)
        report.label_axes(axes, title=title, x=f"mean of {seeds}, ± standard deviation", grid="x")
        axes.set_xlim(0, 1)
    panels[0].invert_yaxis()
    name, last = list(found.items())[-1]
    share = last.chosen.rollout_flops / last.measured[0].rollout_flops
    ends = [statistics.mean(points[-1]["reward"] for points in runs[arm]) for arm in (name, EXACT)]
    text = f"reward {ends[0]:.3f} after training, {ends[1]:.3f} with exact ones"
    figure.suptitle(f"Rollouts with {name}, {share:.0%} of the FLOPs: {text}", fontsize=11)
    return figure


def run(context: Context) -> SuiteResult:
    """Calibrate, then train with exact and with calibrated rollouts; ``context.seeds`` repeats."""
    s, seeds = Settings(), range(context.seed, context.seed + context.seeds)
    start = prepare(s, context.device)
    found: dict[str, Calibration] = {}
    with small_world.workers(context) as pool:
        jobs = [submit(pool, run_arm, start, s, None, seed) for seed in seeds]
        for drift in DRIFTS:
            found[arm_of(drift)] = each = calibrated(start, s, drift)
            jobs += [submit(pool, run_arm, start, s, each.config, seed) for seed in seeds]
        results = results_of(jobs, context, "arms")
    runs = {
        name: results[i * len(seeds) : (i + 1) * len(seeds)]
        for i, name in enumerate([EXACT, *found])
    }
    records: list[dict[str, Any]] = [
        {"case": "calibration", "arm": name, **each.as_dict()} for name, each in found.items()
    ]
    problems = []
    for name, arm in runs.items():
        for seed, points in zip(seeds, arm, strict=True):
            records.append({"case": "arm", "arm": name, "seed": seed, "points": points})
            if points[-1]["exact"]:
                problems.append(f"{name}, seed {seed}: drift ended the calibrated rollouts")
    figures = {"calibrated_rollout.png": arms_figure(found, runs)}
    return SuiteResult([arms_table(found, runs, s)], records, figures, problems)
