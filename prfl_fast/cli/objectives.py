"""Build the objectives of ``prfl-fast train`` from a checked configuration and loaded models."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prfl_fast.cli import loading
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.plan import note
from prfl_fast.cli.sections import FeedbackSection, MemorySection, RolloutSection
from prfl_fast.data.dataset import Batches, DrawnPairs, Winners
from prfl_fast.data.loader import LoadedBatches
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.models.fp8_blocks import use_fp8_linears
from prfl_fast.models.registry import patch
from prfl_fast.models.velocity import Precision
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.rewards.functions import Reward
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.training.checkpoint import rank_seed
from prfl_fast.training.objectives import (
    FlowDPO,
    FlowRWR,
    Objective,
    RewardFeedback,
    SupervisedFlow,
    velocity_call,
)
from prfl_fast.training.preferences import score_of
from prfl_fast.utils.checks import check

LEVELS = {"shift", "integer_timesteps"}  # keys of the noise levels, which losses take too
# Objectives draw samples in orders of their own: steps that take turns would otherwise repeat
# conditions. The number is added to the seed.
_ORDERS = {"prfl": 0, "sft": 1, "dpo": 2, "rwr": 3}
_LARGEST = 88  # exp(89) is infinite in float32

Models = Mapping[str, tuple[LatentRewardModel, ...]]


def open_data(config: TrainFile) -> LatentDataset:
    """Open the dataset of a run, and check its samples and labels for the objectives."""
    pairs = "dpo" in config.objectives
    dataset = loading.open_dataset(config, "data", "" if pairs else "single videos")
    hint = f"data: {config.data} holds single videos"
    check(dataset.pairs or not pairs, "objectives", "dpo", "a dataset of pairs for dpo", hint=hint)
    first_batches(dataset, config)  # checks batch size and texts, before models are read
    if "rwr" in config.objectives and config.rwr.label is not None:
        limit = _LARGEST * config.rwr.temperature
        wanted = f"at most {limit:g}: exp(reward / rwr.temperature) must be finite"
        largest = -math.inf
        for place, labels in dataset.labels():
            try:
                score = score_of(labels, config.rwr.label)
                check(score <= limit, f"label {config.rwr.label}", score, wanted)
                largest = max(largest, score)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        wanted = f"at least {-limit:g}: exp(reward / rwr.temperature) of all samples would be 0"
        check(largest >= -limit, f"largest label {config.rwr.label}", largest, wanted)
    return dataset


def build_objectives(
    config: TrainFile,
    dataset: LatentDataset,
    transformer: nn.Module,
    rewards: Models,
    guidance: Guidance | None,
    device: torch.device,
    *,
    ranks: Ranks | None = None,
) -> dict[str, Objective]:
    """Return the objectives by name, in the order of the file."""
    assert isinstance(config.memory, MemorySection)
    objectives: dict[str, Objective] = {}
    options: dict[str, Any] = config.prfl.model_dump(include=LEVELS)
    options["precision"] = autocast_of(config.memory.weight_dtype, config.hardware.precision)
    for name in config.objectives:
        own = read_ahead(batches_of(dataset, config, _ORDERS[name]), config, device, ranks)
        batches: Any = Winners(own) if dataset.pairs and name != "dpo" else own
        if name == "prfl":
            step = _step(config, transformer, rewards, guidance)
            points = None
            if ranks is not None and ranks.several and config.parallel.points == "shared":
                points = torch.Generator().manual_seed(rank_seed(config.run.seed, ranks.size))
            objectives[name] = RewardFeedback(step, batches, device, points)
        elif name == "sft":
            objectives[name] = SupervisedFlow(transformer, batches, **options)
        elif name == "dpo":
            reference = None if config.lora is not None else _frozen_copy(config, device)
            more: Any = {"reference": reference, "beta": config.dpo.beta, **options}
            objectives[name] = FlowDPO(transformer, batches, **more)
        else:
            reward = config.rwr.label or _weighted(*rewards_of(config, rewards))
            more = {"temperature": config.rwr.temperature, **options}
            objectives[name] = FlowRWR(transformer, batches, reward, **more)
    return objectives


def rewards_of(config: TrainFile, models: Models) -> tuple[dict[str, Reward], dict[str, float]]:
    """Return the loaded rewards in the form that a step takes, and their weights."""
    precision = autocast_of(config.reward_memory.weight_dtype, config.hardware.precision)
    return loading.rewards_of_step(config, models, precision)


def _weighted(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Reward:
    """Return the sum of the rewards, each times its weight."""
    return lambda *inputs: sum(weights[n] * r(*inputs) for n, r in rewards.items())  # type: ignore[return-value]


def _frozen_copy(config: TrainFile, device: torch.device) -> nn.Module:
    """Read the generator once more, as the reference of a model that trains in full."""
    assert isinstance(config.memory, MemorySection)
    kind = config.memory.weight_dtype
    copy = loading.load_model(config.model, torch.float32 if kind == "fp32" else torch.bfloat16)
    apply_memory(copy, MemoryConfig(weight_dtype=kind), device=device)
    copy.requires_grad_(False)
    use_fp8_linears(copy, config.hardware.fp8_linears)  # else its rounding would be a difference
    return patch(copy) if config.hardware.patch else copy


def _step(
    config: TrainFile, transformer: nn.Module, models: Models, guidance: Guidance | None
) -> PRFL:
    """Build the PRFL step of a configuration from its loaded models."""
    assert isinstance(config.memory, MemorySection)
    feedback, precision = config.prfl, config.hardware.precision
    rewards, weights = rewards_of(config, models)
    try:
        return PRFL(
            velocity_call(transformer, autocast_of(config.memory.weight_dtype, precision)),
            rewards,
            _scheduler(feedback),
            feedback.plan(),
            num_inference_steps=feedback.num_inference_steps,
            target=feedback.target,
            weight=feedback.weight,
            reward_weights=weights,
            guidance=guidance,
            rollout=config.rollout.build(),
            divergence=feedback.divergence,
        )
    except ValueError as error:
        name = str(error).partition(" ")[0]
        for section, kind in (("prfl", FeedbackSection), ("rollout", RolloutSection)):
            if name in kind.model_fields:
                raise ValueError(f"{section}.{error}") from error
        raise


def sampler_of(config: TrainFile, transformer: nn.Module, guidance: Guidance | None) -> Sampler:
    """Return the sampler of the prfl section, for prompts of any length."""
    assert isinstance(config.memory, MemorySection)
    if guidance is not None:
        guidance = dataclasses.replace(guidance, batched=False)
    precision = autocast_of(config.memory.weight_dtype, config.hardware.precision)
    call = velocity_call(transformer, precision)
    return Sampler(call, _scheduler(config.prfl), config.prfl.num_inference_steps, guidance)


def batches_of(
    dataset: LatentDataset, config: TrainFile | TrainRewardFile, offset: int = 0
) -> Batches:
    """Return the batches of a run; another ``offset`` gives another order."""
    drops = {"text_drop": config.text_drop, "short_captions": config.short_captions}
    return Batches(dataset, config.run.batch_size, config.run.seed + offset, **drops)


def first_batches(dataset: LatentDataset, config: TrainFile | TrainRewardFile) -> Batches:
    """Return the batches of the first order; print how many samples fill none."""
    batches = batches_of(dataset, config)
    if dropped := batches.dropped():
        command = "train" if isinstance(config, TrainFile) else "train-reward"
        note(f"{dataset.folder}: {dropped}", command)
    return batches


def read_ahead(
    batches: Batches | DrawnPairs,
    config: TrainFile | TrainRewardFile,
    device: torch.device,
    ranks: Ranks | None = None,
) -> Batches | DrawnPairs | LoadedBatches:
    """Return the batches, read ahead by the run's workers if it has any."""
    workers = config.run.workers
    if not workers:
        return batches
    stride = 1 if ranks is None else ranks.data_ranks
    return LoadedBatches(batches, workers, pin_memory=device.type == "cuda", stride=stride)


def _scheduler(feedback: FeedbackSection) -> FlowUniPC | FlowEuler:
    options: dict[str, Any] = {"integer_timesteps": feedback.integer_timesteps}
    if feedback.solver == "euler":
        return FlowEuler(feedback.shift, **options)
    return FlowUniPC(feedback.shift, schedule=feedback.schedule, **options)


def autocast_of(weight_dtype: str, precision: Precision) -> Precision:
    """Return the autocast precision of a model."""
    # Narrower weights compute in bfloat16 without autocast.
    return precision if weight_dtype == "fp32" else "fp32"
