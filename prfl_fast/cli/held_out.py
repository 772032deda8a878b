"""Build the evaluations of training runs from the ``eval`` section of their files."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prfl_fast.cli import loading
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.evaluate import print_metrics
from prfl_fast.data.codec import load_codec
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.models.velocity import Precision
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.rewards.functions import Reward
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.training.evaluation import GeneratorEvaluator, PeriodicEvaluation, RewardEvaluator
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import write_json
from prfl_fast.utils.optional import need

_DECODE_BUDGET = 2 << 30  # bytes beside those of the training; larger videos decode in tiles


def load_held_out(config: TrainFile, device: torch.device) -> tuple[LatentDataset, Codec | None]:
    """Return the prompts of an evaluation, and the autoencoder that decodes its samples.

    Raise ``ValueError`` if one of them cannot be read, or they do not fit each other.
    """
    assert config.eval is not None
    prompts = loading.open_dataset(config, "eval.prompts")
    if config.eval.codec is None:
        return prompts, None
    need("PIL.Image", "video")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    try:
        codec = load_codec(config.eval.codec, device, dtype, _DECODE_BUDGET)
    except (ValueError, OSError) as error:
        raise ValueError(f"eval.codec: {error}") from error
    channels = prompts.shapes["latents"][0]
    expected = f"{channels}, those of eval.prompts"
    check(codec.channels == channels, "channels of eval.codec", codec.channels, expected)
    return prompts, codec


def generator_evaluation(
    config: TrainFile,
    prompts: LatentDataset,
    codec: Codec | None,
    sampler: Sampler,
    rewards: Mapping[str, Reward],
    device: torch.device,
) -> PeriodicEvaluation:
    """Return the evaluation of a generator."""
    assert config.eval is not None
    options: Any = {"seeds": config.eval.seeds, "codec": codec, "device": device}
    evaluator = GeneratorEvaluator(sampler, rewards, prompts, **options)
    return PeriodicEvaluation(evaluator, config.eval.every)


def reward_evaluation(
    config: TrainRewardFile,
    held_out: LatentDataset | None,
    reward: LatentRewardModel,
    precision: Precision,
) -> tuple[RewardEvaluator | None, PeriodicEvaluation | None]:
    """Return the evaluator of a reward model, and when it runs; None without an evaluation."""
    if config.eval is None or held_out is None:
        return None, None
    options = config.eval.model_dump(include={"timesteps", "batch_size"})
    keys = {"label", "missing_label", "shift", "integer_timesteps"}
    options |= config.model_dump(include=keys)
    evaluator = RewardEvaluator(held_out, precision=precision, seed=config.run.seed, **options)
    evaluate = partial(evaluator, reward)
    return evaluator, PeriodicEvaluation(evaluate, config.eval.every, patience=config.eval.patience)


def write_evaluation(
    evaluator: RewardEvaluator, reward: LatentRewardModel, out: Path, ranks: Ranks
) -> None:
    """Write the figures of a trained reward model to ``evaluation.json``, and print them."""
    if ranks.main or ranks.sharded:  # whose forward waits for all ranks
        metrics = evaluator.metrics(evaluator.logits(reward))
    if ranks.main:
        write_json(out / "evaluation.json", metrics)
        print_metrics(metrics)
