"""Build, train and judge the models of the small world, for all suites that train there.

A tiny Wan learns flow matching on clips of which half have a defect; a latent reward model made
from its first blocks learns to tell them apart on noisy latents; a video classifier learns it from
pixels. All experiments start from these three. No training sees the motion metric of
``experiments.world``, which tracks bodies in decoded frames.
"""

import contextlib
import copy
import hashlib
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import report
import torch
from harness import Context
from torch import nn

import prfl_fast
from experiments import world
from prfl_fast import FlowEuler, LatentRewardModel, TrainConfig, Trainer, kernels
from prfl_fast.data import Batches, Sample
from prfl_fast.rollout import Sampler, Trajectory
from prfl_fast.training import RewardFit, SupervisedFlow
from prfl_fast.utils.io import load_tensors, save_tensors
from prfl_fast.utils.optional import need
from prfl_fast.utils.quiet import quiet_libraries

LABEL = "motion_quality"
CHANCE = 0.5  # half of the clips have a defect
# The experiments sample by FlowEuler, at 1000σ not rounded down, and train there too.
Supervised = partial(SupervisedFlow, integer_timesteps=False)


@dataclass(frozen=True)
class Settings:
    """Set the sizes of the world and its models; the defaults fit two minutes of two cores."""

    clips: int = 8192
    held_out: int = 1024
    prompts: int = 128
    generator_steps: int = 700
    generator_batch: int = 32
    reward_blocks: int = 2
    reward_steps: int = 450
    reward_batch: int = 64
    pixel_steps: int = 120
    solver_steps: int = 10


@dataclass(frozen=True)
class ArmSettings(Settings):
    """Set the sizes of each arm of an experiment."""

    updates: int = 45
    checkpoints: int = 4
    feedback_batch: int = 16
    feedback_rate: float = 2e-4


def build(heads: int = 4, channels: int = 24) -> nn.Module:
    """Return the tiny generator: 4 blocks of D = 96 on 5×4×4 latents, 20 tokens."""
    model = need("diffusers", "bench").WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=channels,
        ffn_dim=256,
        num_layers=4,
        text_dim=world.TEXT_DIM,
        freq_dim=64,
        rope_max_seq_len=32,
    )
    model.text_tokens = None  # the world's captions have one length, and no padding
    return model


class PixelClassifier(nn.Module):
    """Score a decoded clip: a small video classifier, the reward of pixel methods."""

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
        """Map ``[B, 3, F, H, W]`` to ``[B]``."""
        return self.layers(frames).squeeze(-1)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Map ``[B, 3, F, H, W]`` to ``[B]`` in (0, 1)."""
        return torch.sigmoid(self.logits(frames))


class Clips(NamedTuple):
    """Hold encoded clips, half with a defect: latents, text states, 1 for good ones."""

    latents: torch.Tensor
    text: torch.Tensor
    good: torch.Tensor

    @classmethod
    def make(cls, count: int, seed: int) -> "Clips":
        parts = []
        for start in range(0, count, 512):
            clips = world.generate(min(512, count - start), seed=seed + start)
            parts.append((world.encode(clips.frames), clips.text, clips.labels[LABEL]))
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def samples(self) -> list[Sample]:
        """Return the samples that :class:`prfl_fast.data.dataset.Batches` takes."""
        labels = [{LABEL: int(good)} for good in self.good]
        return [
            Sample(latents, {"encoder_hidden_states": text}, label)
            for latents, text, label in zip(self.latents, self.text, labels, strict=True)
        ]

    def batches(self, device: torch.device, size: int = 128) -> Iterator[tuple[Any, Any, Any]]:
        """Yield the batches that :func:`prfl_fast.training.reward_losses.evaluate` takes."""
        for latents, text, good in zip(*(t.to(device).split(size) for t in self), strict=True):
            yield latents, {"encoder_hidden_states": text}, good


def fit(
    model: nn.Module, objective: Any, context: Context, label: str, metric: str, **options: Any
) -> dict[str, torch.Tensor]:
    """Train with a bar that shows a metric; return the running average of the weights.

    Args:
        options: of :class:`prfl_fast.training.TrainConfig`, the seed aside.
    """
    settings = TrainConfig(**options, seed=context.seed)
    objectives = {metric.partition("/")[0]: objective}
    with context.bar(settings.steps, label) as bar:

        def show(record: dict[str, Any]) -> None:
            bar.update()
            bar.set_postfix_str(f"{metric} {record[metric]:.3f}")

        trainer = Trainer(model, objectives, settings, on_step=show)
        trainer.run()
    return trainer.ema


def train_generator(samples: list[Sample], s: Settings, context: Context) -> nn.Module:
    """Train a generator by flow matching and return the running average of its weights."""
    model = build().to(context.device)
    objective = Supervised(model, Batches(samples, s.generator_batch, context.seed), shift=3.0)
    options = {"learning_rate": 2e-3, "betas": (0.9, 0.99), "warmup_steps": 30, "ema_decay": 0.98}
    steps = s.generator_steps
    average = fit(model, objective, context, "generator", "sft/loss", steps=steps, **options)
    model.load_state_dict(average)
    return model


def train_reward(
    generator: nn.Module, samples: list[Sample], s: Settings, context: Context
) -> LatentRewardModel:
    """Train PAVRM on 0/1 labels from the generator's first blocks and freeze it."""
    reward = LatentRewardModel.from_backbone(generator, num_blocks=s.reward_blocks)
    batches = Batches(samples, s.reward_batch, context.seed)
    objective = RewardFit(reward, batches, label=LABEL, integer_timesteps=False)
    options = {"learning_rate": 6e-4, "warmup_steps": 20, "ema_decay": 0.98}
    steps = s.reward_steps
    average = fit(reward, objective, context, "reward model", "ce/loss", steps=steps, **options)
    reward.load_state_dict(average, strict=False)
    return reward.freeze()


def train_pixel_reward(
    clips: Clips, s: Settings, seed: int, device: torch.device
) -> PixelClassifier:
    """Train the pixel classifier on decoded clips and freeze it."""
    torch.manual_seed(seed)
    pixel = PixelClassifier().to(device)

    def objective(draw: int, generator: torch.Generator, loss_scale: float) -> dict[str, Any]:
        batch = batches[draw].to(device)
        labels = torch.tensor([float(r[LABEL]) for r in batch.labels], device=device)
        logits = pixel.logits(world.decode(batch.latents))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}

    batches = Batches(clips.samples(), 64, seed)
    settings = TrainConfig(s.pixel_steps, learning_rate=2e-3, warmup_steps=20, seed=seed)
    Trainer(pixel, {"bce": objective}, settings).run()
    return pixel.requires_grad_(False).eval()


@dataclass(frozen=True)
class Start:
    """Hold the models and data that all arms start from, picklable for their processes.

    ``conditions`` are those of the held-out prompts.
    """

    generator: nn.Module
    reward: LatentRewardModel
    pixel: PixelClassifier
    clips: Clips
    conditions: dict[str, torch.Tensor]


@torch.no_grad()
def sample(
    model: nn.Module,
    reward: LatentRewardModel,
    conditions: dict[str, torch.Tensor],
    noise: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents sampled in Euler steps, and their rewards on the way, ``[steps - 1, B]``."""
    trajectory = Trajectory(Sampler(model, FlowEuler(), steps), noise, conditions)
    scores = []
    for index in range(1, steps):
        trajectory.run(index)
        scores.append(reward(trajectory.x, trajectory.model_timestep(index), conditions))
    trajectory.run(steps)
    return trajectory.x, torch.stack(scores)


def held_out_noise(start: "Start", seed: int) -> torch.Tensor:
    """Return noise for the held-out prompts, the same for every arm of a seed."""
    text = start.conditions["encoder_hidden_states"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(text), *start.clips.latents.shape[1:], generator=generator).to(
        text.device
    )


@torch.no_grad()
def judge(
    start: "Start", latents: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return scores of finished clips, ``[B]`` each: ``end`` (latent), ``pixel``, ``motion``."""
    frames = world.decode(latents)
    timestep = torch.zeros(len(latents), device=latents.device)
    found = {
        "end": start.reward(latents, timestep, conditions),
        "pixel": start.pixel(frames),
        "motion": world.motion_score(frames),
    }
    return {name: value.float().cpu() for name, value in found.items()}


def assess(
    model: nn.Module, start: "Start", steps: int, seed: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Sample the held-out prompts: reward along the sampler, motion metric, and the frames."""
    noise = held_out_noise(start, seed)
    latents, scores = sample(model, start.reward, start.conditions, noise, steps)
    frames = world.decode(latents)
    motion = world.motion_score(frames)
    sem = float(motion.std() / len(motion) ** 0.5)
    found = {"reward": float(scores.mean()), "motion": float(motion.mean()), "motion_sem": sem}
    return found, frames


def copy_generator(start: "Start", patch: bool = False) -> tuple[nn.Module, torch.device]:
    """Return a generator that trains on from the start, and its device.

    On a GPU, or if asked for, generator and reward are patched. That is done in the process that
    trains, as a patched model does not pickle.
    """
    model = copy.deepcopy(start.generator).requires_grad_(True)
    device = next(model.parameters()).device
    if patch or device.type == "cuda":
        prfl_fast.patch(model)
        prfl_fast.patch(start.reward.backbone)
    return model, device


def train_arm(
    model: nn.Module,
    objectives: dict[str, Any],
    s: ArmSettings,
    seed: int,
    check: Callable[[int], object],
    rate: float | None = None,
) -> tuple[int, float]:
    """Train one arm and ``check(update)`` it at its checkpoints.

    Returns:
        The number of skipped updates, and the seconds of all updates.
    """
    every, seconds = max(1, s.updates // (s.checkpoints - 1)), 0.0

    def on_step(record: dict[str, Any]) -> None:
        nonlocal seconds
        seconds += record["seconds"]
        if record["step"] % every == 0 or record["step"] == s.updates:
            check(record["step"])

    rate = s.feedback_rate if rate is None else rate
    settings = TrainConfig(
        s.updates, learning_rate=rate, weight_decay=0.01, warmup_steps=5, seed=seed
    )
    result = Trainer(model, objectives, settings, on_step=on_step).run()
    return result.skipped, seconds


def prepare(s: Settings, context: Context, pool: Executor) -> tuple[Start, Clips, str]:
    """Make the clips and train generator, reward and classifier.

    A run with the same settings, seed and code leaves its models in ``context.out``: read these.

    Returns:
        The start, the held-out clips, and a note that says if the models were trained or read.
    """
    began = time.perf_counter()
    half = s.clips // 2
    halves = [submit(pool, Clips.make, half, 1000 + i * half) for i in range(2)]
    held_out = Clips.make(s.held_out, 999_000)
    parts = [job.result() for job in halves]
    clips = Clips(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    device, seed = context.device, context.seed
    kept = kept_models(s, context)
    if kept.is_file():
        generator = build().to(device)
        reward = LatentRewardModel.from_backbone(generator, num_blocks=s.reward_blocks).freeze()
        pixel = PixelClassifier().to(device).requires_grad_(False).eval()
        state = load_tensors(kept)
        for name, model in (("generator", generator), ("reward", reward), ("pixel", pixel)):
            model.load_state_dict(_part(state, name))
        note = f"Generator and reward models read back from {kept.name}."
    else:
        job = submit(pool, train_pixel_reward, clips, s, seed, device)
        samples = clips.samples()
        generator = train_generator(samples, s, context)
        reward = train_reward(generator, samples, s, context)
        pixel = job.result()
        seconds = report.seconds(time.perf_counter() - began)
        note = f"Generator and reward models trained in {seconds}."
        if context.out.is_dir():
            models = {"generator": generator, "reward": reward, "pixel": pixel}
            state = {f"{n}.{k}": v for n, m in models.items() for k, v in m.state_dict().items()}
            save_tensors(state, kept)
    text = held_out.text[: s.prompts].to(device)
    start = Start(generator, reward, pixel, clips, {"encoder_hidden_states": text})
    return start, held_out, note


def _part(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    # Clones: tensors inside the file's buffer are not aligned, which changes the last bit.
    return {
        key.removeprefix(f"{name}."): value.clone()
        for key, value in state.items()
        if key.startswith(f"{name}.")
    }


def kept_models(s: Settings, context: Context) -> Path:
    """Return the file of trained models, named by sizes, seed, device, torch and code."""
    names = {field.name for field in fields(Settings)} - {"held_out", "prompts", "solver_steps"}
    sizes = [(name, getattr(s, name)) for name in sorted(names)]
    made_by = [*sizes, context.seed, context.device.type]
    digest = hashlib.sha256(repr([*made_by, torch.__version__]).encode())
    package = Path(prfl_fast.__file__).parent
    for folder in (package, Path(kernels.__file__).parent, Path(world.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    digest.update(Path(__file__).read_bytes())
    return context.out / f"small-world-{digest.hexdigest()[:12]}.safetensors"


class Inline(Executor):
    """Run submitted work at once: on a GPU the arms share the device, one after the other."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _one_thread(work: bytes) -> Any:
    torch.set_num_threads(1)
    function, args = pickle.loads(work)
    return function(*args)


def submit(pool: Executor, function: Any, *args: Any) -> "Future[Any]":
    """Give a pool work; the arguments are copied here and now."""
    # Left to the pool, a thread would move these very tensors to shared memory while this one
    # computes with them (seen once: a cross-entropy of 6e7).
    return pool.submit(_one_thread, pickle.dumps((function, args)))


def results_of(jobs: "Sequence[Future[Any]]", context: Context, label: str) -> list[Any]:
    """Return the results of submitted jobs in their order."""
    results = []
    with context.bar(len(jobs), label) as bar:
        for job in jobs:
            results.append(job.result())
            bar.update()
    return results


@contextlib.contextmanager
def workers(context: Context) -> Iterator[Executor]:
    """Return the pool in which arms run: on a CPU as many processes as there are threads.

    Each process has one thread: with 20 tokens of width 96 a second thread does not pay.
    """
    if context.device.type != "cpu":
        yield Inline()
        return
    threads = torch.get_num_threads()
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(threads, spawn, initializer=quiet_libraries)
    try:
        torch.set_num_threads(1)
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
