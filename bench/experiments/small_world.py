"""Build, train and judge the models of the small world, for all suites that train there.

A tiny Wan learns flow matching on clips of which half have a defect; a latent reward model made
from its first blocks learns to tell them apart on noisy latents; a video classifier learns it from
pixels. All experiments start from these three. No training sees the motion metric of
``experiments.world``, which tracks bodies in decoded frames.
"""

import contextlib
import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Context
from torch import nn

import prfl_fast
from experiments import world
from prfl_fast import FlowEuler, LatentRewardModel, TrainConfig, Trainer
from prfl_fast.data import Sample
from prfl_fast.rollout import Sampler, Trajectory
from prfl_fast.training import SupervisedFlow
from prfl_fast.utils.digests import DIGESTS, check_digests
from prfl_fast.utils.io import load_tensors, read_json
from prfl_fast.utils.optional import need
from prfl_fast.utils.quiet import quiet_libraries

LABEL = "motion_quality"
CHANCE = 0.5  # half of the clips have a defect
FOLDER = Path(world.__file__).parent
WEIGHTS = "weights.safetensors"
RETRAIN = "Check the file out again, or train it: python bench/experiments/train_world.py"
REWARD_BLOCKS = 2
TEXT_TOKENS = 5  # the count, and four words for the only body; the world's other tokens are padding
# The experiments sample by FlowEuler, at 1000σ not rounded down, and train there too.
Supervised = partial(SupervisedFlow, integer_timesteps=False)


@dataclass(frozen=True)
class Settings:
    """Set the numbers of clips, of held-out prompts and of solver steps."""

    clips: int = 4096
    held_out: int = 1024
    prompts: int = 128
    solver_steps: int = 10


@dataclass(frozen=True)
class ArmSettings(Settings):
    """Set the sizes of each arm of an experiment."""

    updates: int = 45
    checkpoints: int = 4
    feedback_batch: int = 16
    feedback_rate: float = 2e-4


def build() -> nn.Module:
    """Return the tiny generator: 4 blocks of D = 160 on 24×5×2×2 latents, 5 tokens."""
    model = need("diffusers", "bench").WanTransformer3DModel(
        in_channels=world.CHANNELS,
        out_channels=world.CHANNELS,
        num_attention_heads=5,
        attention_head_dim=32,  # FP8 attention takes no fewer
        ffn_dim=512,
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
            text = clips.text[:, :TEXT_TOKENS]
            parts.append((world.encode(clips.frames), text, clips.labels[LABEL]))
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


def build_reward(generator: nn.Module) -> LatentRewardModel:
    """Return a latent reward model from the generator's first blocks, not trained yet."""
    return LatentRewardModel.from_backbone(generator, num_blocks=REWARD_BLOCKS)


def read_models(
    device: torch.device, folder: Path = FOLDER
) -> tuple[nn.Module, LatentRewardModel, PixelClassifier]:
    """Return the generator and the frozen latent reward model and pixel classifier.

    Raises:
        ValueError: if the file of weights is missing, damaged or of other models.
    """
    check_digests(folder, read_json(folder / DIGESTS), RETRAIN)
    generator = build()
    models = {"generator": generator, "reward": build_reward(generator), "pixel": PixelClassifier()}
    state = load_tensors(folder / WEIGHTS)
    for name, model in models.items():
        found = {
            k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")
        }
        model.load_state_dict({key: value.float() for key, value in found.items()})
        model.requires_grad_(False).to(device)
    return generator, models["reward"].freeze(), models["pixel"].eval()


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


class Assessed(NamedTuple):
    """Hold the clips of the held-out prompts: frames uint8 ``[B, 3, F, H, W]``, motion ``[B]``."""

    frames: torch.Tensor
    motion: torch.Tensor


def assess(
    model: nn.Module, start: "Start", steps: int, seed: int
) -> tuple[dict[str, float], Assessed]:
    """Sample the held-out prompts: reward along the sampler, motion metric, and the clips."""
    noise = held_out_noise(start, seed)
    latents, scores = sample(model, start.reward, start.conditions, noise, steps)
    frames = world.decode(latents)
    motion = world.motion_score(frames).cpu()
    sem = float(motion.std() / len(motion) ** 0.5)
    found = {"reward": float(scores.mean()), "motion": float(motion.mean()), "motion_sem": sem}
    colors = ((frames.clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8)
    return found, Assessed(colors, motion)


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


def prepare(s: Settings, context: Context, pool: Executor) -> tuple[Start, Clips]:
    """Read the trained models and make clips; return the start and the held-out clips."""
    half = s.clips // 2
    halves = [submit(pool, Clips.make, half, 1000 + i * half) for i in range(2)]
    held_out = Clips.make(s.held_out, 999_000)
    parts = [job.result() for job in halves]
    clips = Clips(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    text = held_out.text[: s.prompts].to(context.device)
    start = Start(*read_models(context.device), clips, {"encoder_hidden_states": text})
    return start, held_out


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
