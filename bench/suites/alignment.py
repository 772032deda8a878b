"""Alignment end to end in the small world: generator, latent reward model, then three ways to train
on.

A tiny Wan learns flow matching on clips of which half have a defect; a latent reward model made
from its first blocks learns to tell them apart on noisy latents; then, from the same generator and
with the same number of optimizer updates, SFT alone, RGB ReFL + SFT and PRFL + SFT. What is plotted
against updates is the latent reward along the sampler and the motion metric of ``bench/world``,
which tracks bodies in decoded frames and which no training sees.
"""

import copy
import multiprocessing
import os
import pickle
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import report
import torch
import world
from harness import Context, SuiteResult, Table
from torch import nn

import prfl_fast
from prfl_fast._extras import need
from prfl_fast.data import Batches, Sample
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.reward import LatentRewardModel
from prfl_fast.reward_training import EVALUATION_TIMESTEPS, evaluate
from prfl_fast.rgb_refl import RGBReFL
from prfl_fast.schedulers import FlowEuler
from prfl_fast.step import PRFL
from prfl_fast.trainer import RewardFeedback, RewardFit, SupervisedFlow, Trainer, TrainSettings
from prfl_fast.trajectory import Trajectory

LABEL = "motion_quality"
CHANCE = 0.5  # half of the clips have a defect
PATCHED = os.environ.get("PRFL_FAST_BENCH_PATCHED") == "1"  # also on a CPU
ARMS = {"sft": "SFT only", "rgb_refl": "RGB ReFL + SFT", "prfl": "PRFL + SFT"}


@dataclass(frozen=True)
class Settings:
    """Sizes of the experiment; the defaults fit a few minutes of two CPU cores."""

    clips: int = 8192
    held_out: int = 1024
    prompts: int = 128
    generator_steps: int = 700
    generator_batch: int = 32
    reward_blocks: int = 2
    reward_steps: int = 450
    reward_batch: int = 64
    pixel_steps: int = 120
    updates: int = 60
    checkpoints: int = 4
    solver_steps: int = 10
    points: int = 5
    feedback_batch: int = 16
    # The latent reward's gradient is a tenth of the flow loss's here; at the paper's 0.1 AdamW's
    # shared second moments are SFT's and the reward moves little. The pixel reward's is larger: at
    # 1.0 the motion metric falls from 0.37 to 0.28, so it keeps 0.1.
    prfl_weight: float = 1.0
    rgb_weight: float = 0.1
    feedback_rate: float = 2e-4


def build() -> nn.Module:
    """The tiny generator: 4 blocks of D = 96 on 5×4×4 latents, 20 tokens."""
    return need("diffusers", "bench").WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        ffn_dim=256,
        num_layers=4,
        text_dim=world.TEXT_DIM,
        freq_dim=64,
        rope_max_seq_len=32,
    )


class PixelReward(nn.Module):
    """What RGB ReFL is rewarded by: a small video classifier, trained on decoded clips' labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(3, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv3d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv3d(32, 64, 3, stride=(1, 2, 2), padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool3d((5, 1, 1)),
            nn.Flatten(),
            nn.Linear(5 * 64, 64),
            nn.SiLU(),
            nn.Linear(64, 1),
        )

    def logits(self, frames: torch.Tensor) -> torch.Tensor:
        """``[B, 3, F, H, W]`` → ``[B]``."""
        return self.layers(frames).squeeze(-1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """``[B, 3, F, H, W]`` → ``[B]`` in (0, 1)."""
        return torch.sigmoid(self.logits(frames))


class Clips(NamedTuple):
    """Encoded clips, half of them with a defect: latents, text states, 1 for good ones."""

    latents: torch.Tensor
    text: torch.Tensor
    good: torch.Tensor

    @classmethod
    def make(cls, count: int, seed: int) -> "Clips":
        """``count`` clips of the world."""
        parts = []
        for start in range(0, count, 512):
            clips = world.generate(min(512, count - start), seed=seed + start)
            parts.append((world.encode(clips.frames), clips.text, clips.labels[LABEL]))
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def samples(self) -> list[Sample]:
        """As :class:`prfl_fast.data.Batches` takes them."""
        labels = [{LABEL: int(good)} for good in self.good]
        return [
            Sample(latents, {"encoder_hidden_states": text}, label)
            for latents, text, label in zip(self.latents, self.text, labels, strict=True)
        ]

    def batches(self, device: torch.device, size: int = 128) -> Iterator[tuple[Any, Any, Any]]:
        """As :func:`prfl_fast.reward_training.evaluate` takes them."""
        for latents, text, good in zip(*(t.to(device).split(size) for t in self), strict=True):
            yield latents, {"encoder_hidden_states": text}, good


def _progress(bar: Any, **names: str) -> Any:
    def show(record: dict[str, Any]) -> None:
        bar.update()
        bar.set_postfix_str(", ".join(f"{k} {record[v]:.3f}" for k, v in names.items()))

    return show


def train_generator(samples: list[Sample], s: Settings, context: Context) -> nn.Module:
    """Flow matching from scratch; returns the running average of the weights."""
    model = build().to(context.device)
    objective = SupervisedFlow(model, Batches(samples, s.generator_batch, context.seed), shift=3.0)
    settings = TrainSettings(
        s.generator_steps,
        learning_rate=2e-3,
        betas=(0.9, 0.99),
        warmup_steps=30,
        ema_decay=0.98,
        seed=context.seed,
    )
    with context.bar(s.generator_steps, "generator") as bar:
        trainer = Trainer(
            model, {"sft": objective}, settings, on_step=_progress(bar, loss="sft/loss")
        )
        trainer.run()
    model.load_state_dict(trainer.ema)
    return model


def train_reward(
    generator: nn.Module, samples: list[Sample], s: Settings, context: Context
) -> LatentRewardModel:
    """PAVRM on 0/1 labels, from the generator's first blocks; frozen on return."""
    reward = LatentRewardModel.from_backbone(generator, num_blocks=s.reward_blocks)
    objective = RewardFit(reward, Batches(samples, s.reward_batch, context.seed), label=LABEL)
    settings = TrainSettings(
        s.reward_steps,
        learning_rate=6e-4,
        warmup_steps=20,
        ema_decay=0.98,
        seed=context.seed,
    )
    with context.bar(s.reward_steps, "reward model") as bar:
        trainer = Trainer(reward, {"ce": objective}, settings, on_step=_progress(bar, ce="ce/loss"))
        trainer.run()
    reward.load_state_dict(trainer.ema, strict=False)
    return reward.freeze()


def train_pixel_reward(clips: Clips, s: Settings, seed: int, device: torch.device) -> PixelReward:
    """The pixel classifier on decoded clips; frozen on return."""
    torch.manual_seed(seed)
    pixel = PixelReward().to(device)

    def objective(draw: int, generator: torch.Generator, loss_scale: float) -> dict[str, Any]:
        batch = batches[draw].to(device)
        labels = torch.tensor([float(r[LABEL]) for r in batch.labels], device=device)
        logits = pixel.logits(world.decode(batch.latents))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}

    batches = Batches(clips.samples(), 64, seed)
    settings = TrainSettings(s.pixel_steps, learning_rate=2e-3, warmup_steps=20, seed=seed)
    Trainer(pixel, {"bce": objective}, settings).run()
    return pixel.requires_grad_(False).eval()


@torch.no_grad()
def assess(
    model: nn.Module,
    reward: LatentRewardModel,
    conditions: dict[str, torch.Tensor],
    latent: tuple[int, ...],
    s: Settings,
    seed: int,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Sample the held-out prompts: reward along the sampler, motion metric, and the frames.

    Every arm of a seed starts from the same noise.
    """
    count = len(conditions["encoder_hidden_states"])
    device = conditions["encoder_hidden_states"].device
    noise = torch.randn(count, *latent, generator=torch.Generator().manual_seed(seed)).to(device)
    trajectory = Trajectory(model, noise, conditions, FlowEuler(), s.solver_steps)
    scores = []
    for index in range(1, s.solver_steps):
        trajectory.run(index)
        scores.append(reward(trajectory.x, trajectory.model_timestep(index), conditions))
    trajectory.run(s.solver_steps)
    frames = world.decode(trajectory.x)
    motion = world.motion_score(frames)
    result = {
        "reward": float(torch.stack(scores).mean()),
        "motion": float(motion.mean()),
        "motion_sem": float(motion.std() / count**0.5),
    }
    return result, frames


@dataclass(frozen=True)
class Start:
    """What every arm starts from; picklable, so that arms can run in processes of their own."""

    generator: nn.Module
    reward: LatentRewardModel
    pixel: PixelReward
    clips: Clips
    conditions: dict[str, torch.Tensor]
    settings: Settings


def run_arm(start: Start, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm from the common start; metrics at each checkpoint, a few frames at the end."""
    s, began = start.settings, time.perf_counter()
    model = copy.deepcopy(start.generator).requires_grad_(True)
    device = next(model.parameters()).device
    if PATCHED or device.type == "cuda":
        # At the CPU's sizes dispatching dominates and the fused operations have nothing to gain.
        # Patched here, as a patched model does not pickle.
        prfl_fast.patch(model)
        prfl_fast.patch(start.reward.backbone)
    batches = partial(Batches, start.clips.samples())
    sft = SupervisedFlow(model, batches(32, 10 * seed + 1))
    if arm == "prfl":
        plan = GradientPlan.prfl(s.points)
        step: Any = PRFL(
            model,
            start.reward,
            FlowEuler(),
            plan,
            num_steps=s.solver_steps,
            weight=s.prfl_weight,
        )
    elif arm == "rgb_refl":
        step = RGBReFL(
            model,
            world.decode,
            start.pixel,
            FlowEuler(),
            num_steps=s.solver_steps,
            weight=s.rgb_weight,
        )
    # As many optimizer updates for every arm: SFT alone takes two of its own.
    first: Any = SupervisedFlow(model, batches(32, 10 * seed + 2))
    if arm != "sft":
        first = RewardFeedback(step, batches(s.feedback_batch, 10 * seed + 2), device)
    latent = tuple(start.clips.latents.shape[1:])
    every = max(1, s.updates // (s.checkpoints - 1))
    points: list[dict[str, Any]] = []

    def measure(update: int) -> torch.Tensor:
        found, frames = assess(model, start.reward, start.conditions, latent, s, 1000 + seed)
        points.append({"update": update, **found})
        return frames

    before = measure(0)
    settings = TrainSettings(
        s.updates, learning_rate=s.feedback_rate, weight_decay=0.01, warmup_steps=5, seed=seed
    )
    after = before

    def on_step(record: dict[str, Any]) -> None:
        nonlocal after
        if record["step"] % every == 0 or record["step"] == s.updates:
            after = measure(record["step"])

    result = Trainer(model, {"first": first, "second": sft}, settings, on_step=on_step).run()
    return {
        "arm": arm,
        "seed": seed,
        "points": points,
        "skipped": result.skipped,
        "wall_s": time.perf_counter() - began,
        "frames": {"before": before[:3].cpu(), "after": after[:3].cpu()},
    }


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
        rows.append(
            [
                label,
                _mean_std([a["points"][0]["reward"] for a in runs]),
                _mean_std([a["points"][-1]["reward"] for a in runs]),
                _mean_std([a["points"][0]["motion"] for a in runs]),
                _mean_std([a["points"][-1]["motion"] for a in runs]),
                report.BLANK if name == "sft" else f"{wins} of {len(seeds)}",
                report.seconds(sum(a["wall_s"] for a in runs) / len(runs)),
            ]
        )
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


def _curves(arms: list[dict[str, Any]], s: Settings) -> Any:
    figure, panels = report.new_figure(10, 4, ncols=2)
    colours = dict(zip(ARMS, ("#8c8c8c", "#e69f00", "#0072b2"), strict=True))
    for axes, key, title in (
        (panels[0], "reward", "Latent reward along the sampler"),
        (panels[1], "motion", "Independent motion metric (never trained on)"),
    ):
        for arm, label in ARMS.items():
            runs = [a["points"] for a in arms if a["arm"] == arm]
            updates = [2 * p["update"] for p in runs[0]]
            values = torch.tensor([[p[key] for p in run] for run in runs])
            mean = values.mean(0)
            spread = values.std(0) if len(runs) > 1 else torch.zeros_like(mean)
            axes.plot(updates, mean, marker="o", color=colours[arm], label=label)
            axes.fill_between(
                updates, mean - spread, mean + spread, color=colours[arm], alpha=0.15, lw=0
            )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer updates", fontsize=9)
        axes.set_ylabel(f"{key} (0 to 1)", fontsize=9)
        axes.grid(alpha=0.3)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].legend(fontsize=8)
    seeds = len({a["seed"] for a in arms})
    shade = f"{seeds} seeds, shaded: one standard deviation" if seeds > 1 else "one seed"
    figure.suptitle(f"Training on from one generator, {shade}", fontsize=11)
    return figure


def _samples(arms: list[dict[str, Any]]) -> Any:
    seed = min(a["seed"] for a in arms)
    chosen = {a["arm"]: a["frames"] for a in arms if a["seed"] == seed}
    rows = {"before": chosen["prfl"]["before"]}
    rows |= {f"after {ARMS[arm]}": chosen[arm]["after"] for arm in ARMS}
    prompts, frames = 3, next(iter(rows.values())).shape[2]
    shown = torch.linspace(0, frames - 1, 5).round().long()
    figure, panels = report.new_figure(12, 4.2, nrows=len(rows), ncols=prompts)
    for line, (label, clips) in zip(panels, rows.items(), strict=True):
        for column, axes in enumerate(line):
            strip = ((clips[column, :, shown].clamp(-1, 1) + 1) / 2).permute(1, 2, 3, 0)
            axes.imshow(torch.cat(list(nn.functional.pad(strip, (0, 0, 0, 1), value=1.0)), dim=1))
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
    for column, axes in enumerate(panels[0]):
        axes.set_title(
            f"prompt {column + 1}, frames {', '.join(map(str, shown.tolist()))}", fontsize=9
        )
    return figure


def _accuracy_figure(accuracy: dict[float, dict[str, float]]) -> Any:
    figure, axes = report.new_figure(5.5, 3.6)
    axes.plot(list(accuracy), [a["accuracy"] for a in accuracy.values()], "o-", color="#0072b2")
    axes.axhline(CHANCE, color="#8c8c8c", ls="--", lw=1)
    axes.annotate("chance", (min(accuracy), CHANCE + 0.01), fontsize=8, color="#555555")
    axes.set(xlabel="timestep (1000 σ)", ylabel="accuracy on held-out clips", ylim=(0.4, 1.0))
    axes.set_title("Latent reward model: what it still sees in noise", fontsize=10)
    axes.grid(alpha=0.3)
    return figure


class _Inline(Executor):
    """Runs what it is given at once: on a GPU the arms share the device, one after the other."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _one_thread(work: bytes) -> Any:
    torch.set_num_threads(1)
    function, args = pickle.loads(work)
    return function(*args)


def _submit(pool: Executor, function: Any, *args: Any) -> "Future[Any]":
    # Pickled here and now: left to the pool, a thread would move these very tensors to shared
    # memory while this one computes with them (seen once: a cross-entropy of 6e7).
    return pool.submit(_one_thread, pickle.dumps((function, args)))


def run(context: Context) -> SuiteResult:
    """Train everything and compare the arms; ``context.seeds`` repeats the arms.

    On a CPU each process has one thread: on 20 tokens of width 96 a second one waits more than it
    works. Arms run side by side instead.
    """
    threads = torch.get_num_threads()
    if context.device.type != "cpu":
        return _run(Settings(), context, _Inline())
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(threads, spawn)
    try:
        torch.set_num_threads(1)
        return _run(Settings(), context, pool)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _run(s: Settings, context: Context, pool: Executor) -> SuiteResult:
    began = time.perf_counter()
    half = s.clips // 2
    halves = [_submit(pool, Clips.make, half, 1000 + i * half) for i in range(2)]
    held_out = Clips.make(s.held_out, 999_000)
    parts = [job.result() for job in halves]
    clips = Clips(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    device, seed = context.device, context.seed
    pixel = _submit(pool, train_pixel_reward, clips, s, seed, device)
    samples = clips.samples()
    generator = train_generator(samples, s, context)
    reward = train_reward(generator, samples, s, context)
    text = held_out.text[: s.prompts].to(device)
    start = Start(generator, reward, pixel.result(), clips, {"encoder_hidden_states": text}, s)
    trained = time.perf_counter() - began
    jobs = [
        _submit(pool, run_arm, start, arm, seed + i)
        for i in range(context.seeds)
        for arm in ("prfl", "rgb_refl", "sft")
    ]
    accuracy = evaluate(reward, list(held_out.batches(device)), EVALUATION_TIMESTEPS, seed=seed)
    arms = []
    with context.bar(len(jobs), "arms") as bar:
        for job in jobs:
            arms.append(job.result())
            bar.update()
    motion, good = world.motion_score(world.decode(held_out.latents)), held_out.good > 0
    real = (float(motion[good].mean()), float(motion[~good].mean()))
    figures = {
        "alignment_curves.png": _curves(arms, s),
        "alignment_samples.png": _samples(arms),
        "pavrm_accuracy.png": _accuracy_figure(accuracy),
    }
    cases = [{"case": "pavrm", "timesteps": {f"{t:g}": a for t, a in accuracy.items()}}]
    cases += [{k: v for k, v in arm.items() if k != "frames"} for arm in arms]
    cases.append({"case": "real clips", "motion_good": real[0], "motion_defect": real[1]})
    tables = [_accuracy_table(accuracy, s), _arms_table(arms, s, real)]
    tables[0].notes.append(f"Generator and reward models trained in {report.seconds(trained)}.")
    return SuiteResult(tables, cases, figures)
