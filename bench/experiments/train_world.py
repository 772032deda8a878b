"""Train the models that every experiment in the small world starts from, and write their weights.

The generator, then the latent reward model from its first blocks, then the pixel classifier: about
20 minutes of one CPU core. The command continues after an interruption. It writes
``bench/experiments/world/weights.safetensors`` and its digest, which the suites read.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments import small_world, world
from experiments.small_world import LABEL, Clips, PixelClassifier
from prfl_fast import LatentRewardModel, TrainConfig, Trainer
from prfl_fast.data import Batches, Sample
from prfl_fast.training import RewardFit
from prfl_fast.utils.digests import write_digests
from prfl_fast.utils.io import save_tensors
from prfl_fast.utils.quiet import quiet_libraries

Samples = list[Sample]


@dataclass(frozen=True)
class Settings:
    """Set the sizes of the trainings."""

    clips: int = 16384
    generator_steps: int = 3000
    reward_steps: int = 1000
    pixel_steps: int = 300
    save_every: int = 500


def fit(
    name: str, model: nn.Module, objective: Any, seed: int, out: Path, **options: Any
) -> dict[str, torch.Tensor]:
    """Train ``model`` in the folder ``out / name``; return the running average of its weights.

    After a signal, the state is saved and the command ends with status 130.

    Args:
        options: of :class:`prfl_fast.TrainConfig`.
    """
    config = TrainConfig(**options, warmup_steps=50, seed=seed, keep_last=1)
    print(f"{name}: {config.steps} steps", flush=True)
    trainer = Trainer(model, {"train": objective}, config, folder=out / name, progress=True)
    if trainer.run().stopped_by is not None:
        print(f"{name} is saved at step {trainer.result.step}; run the command again to continue")
        sys.exit(130)
    assert trainer.ema is not None
    return trainer.ema


def train_generator(samples: Samples, s: Settings, seed: int, out: Path) -> nn.Module:
    torch.manual_seed(seed)
    model = small_world.build()
    objective = small_world.Supervised(model, Batches(samples, 64, seed))
    options: Any = {"steps": s.generator_steps, "save_every": s.save_every, "learning_rate": 2e-3}
    options |= {"betas": (0.9, 0.99), "ema_decay": 0.998}
    model.load_state_dict(fit("generator", model, objective, seed, out, **options))
    return model


def train_reward(
    generator: nn.Module, samples: Samples, s: Settings, seed: int, out: Path
) -> LatentRewardModel:
    """Train the latent reward model (PAVRM) on 0/1 labels from the generator's first blocks."""
    torch.manual_seed(seed)
    reward = small_world.build_reward(generator)
    batches = Batches(samples, 64, seed)
    objective = RewardFit(reward, batches, label=LABEL, integer_timesteps=False)
    options: Any = {"steps": s.reward_steps, "save_every": s.save_every, "learning_rate": 6e-4}
    average = fit("reward", reward, objective, seed, out, **options, ema_decay=0.99)
    reward.load_state_dict(average, strict=False)
    return reward


def train_pixel_reward(samples: Samples, s: Settings, seed: int, out: Path) -> nn.Module:
    """Train the pixel classifier on decoded clips."""
    torch.manual_seed(seed)
    pixel = PixelClassifier()
    batches = Batches(samples, 64, seed)

    def objective(draw: int, generator: torch.Generator, loss_scale: float) -> dict[str, Any]:
        batch = batches[draw]
        labels = torch.tensor([float(record[LABEL]) for record in batch.labels])
        logits = pixel.logits(world.decode(batch.latents))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}

    options: Any = {"steps": s.pixel_steps, "save_every": s.save_every, "learning_rate": 2e-3}
    average = fit("pixel", pixel, objective, seed, out, **options, ema_decay=0.99)
    pixel.load_state_dict(average)
    return pixel


def train(s: Settings, seed: int, out: Path, folder: Path) -> None:
    """Train all models with their checkpoints in ``out``; write the weights to ``folder``."""
    samples = Clips.make(s.clips, 1000).samples()
    generator = train_generator(samples, s, seed, out)
    reward = train_reward(generator, samples, s, seed, out)
    pixel = train_pixel_reward(samples, s, seed, out)
    models = {"generator": generator, "reward": reward, "pixel": pixel}
    # Half precision halves the file and moves the samples less than one step of the training.
    state = {f"{n}.{k}": v.half() for n, m in models.items() for k, v in m.state_dict().items()}
    save_tensors(state, folder / small_world.WEIGHTS)
    write_digests(folder, (small_world.WEIGHTS,))


def main(argv: list[str] | None = None) -> None:
    """Train all models and write their weights."""
    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__)
    help_out = "folder of checkpoints and logs (default: bench-out/world)"
    parser.add_argument("--out", type=Path, default=Path("bench-out/world"), help=help_out)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the models are too small for more
    train(Settings(), args.seed, args.out, small_world.FOLDER)
    print(f"wrote {small_world.FOLDER / small_world.WEIGHTS}")


if __name__ == "__main__":
    main()
