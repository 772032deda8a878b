"""``prfl-fast train`` and ``prfl-fast train-reward``: from a checked configuration to a run."""

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prfl_fast.cli_models import (
    autocast_of,
    check_data,
    check_model,
    check_writable,
    device_of,
    load_guidance,
    load_rewards,
    load_transformer,
    rewards_of_step,
)
from prfl_fast.cli_plan import choose_memory, next_policy
from prfl_fast.config import Memory, ReferenceReward, TrainConfig, TrainRewardConfig
from prfl_fast.config_file import to_yaml
from prfl_fast.data import Batch, Batches, LatentDataset, collate
from prfl_fast.memory import apply_memory, check_available
from prfl_fast.model_call import Guidance
from prfl_fast.patching import patch, unpatch
from prfl_fast.reward import LatentRewardModel
from prfl_fast.reward_training import evaluate, label_of
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.step import PRFL
from prfl_fast.trainer import (
    Objective,
    RewardFeedback,
    RewardFit,
    SupervisedFlow,
    Trainer,
    TrainSettings,
    add_lora,
    autocast,
    velocity_call,
)
from prfl_fast.training_state import latest_checkpoint, write_atomic

SOLVERS = {"unipc": FlowUniPC, "euler": FlowEuler}
# Of the rollout: another value gives the same numbers.
_FREE = ("cache", "compile")


def train(config: TrainConfig, check: bool) -> int:
    """Train a generator, or only load and check everything; the exit code."""
    device, out = device_of(config.hardware), Path(config.out)
    check_writable(out, "out")
    dataset = LatentDataset(config.data)
    if dataset.pairs:
        raise ValueError(f"data: {config.data} holds preference pairs; train needs single videos")
    batches = Batches(dataset, config.run.batch_size, config.run.seed)
    check_model(config.model, dataset)
    feedback = "prfl" in config.objectives
    segments, frames = config.prfl.plan().segments, dataset.shapes["latents"][1]
    if feedback and segments is not None and segments > frames:
        raise ValueError(
            f"prfl.segments is {segments}, but the latents of the dataset have {frames} frames"
        )
    guidance = None
    if config.prfl.guidance is not None:  # read without the prfl objective too: a check of the file
        guidance = load_guidance(config.prfl.guidance, dataset, device)
    memory, plan = choose_memory(config, dataset, device)
    config = dataclasses.replace(config, memory=memory)
    check_available(memory, device)
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    kinds = {memory.weights}
    if _in_the_references_layout(config):
        kinds.add(memory.reward_weights)  # such a reward is built from the generator
    dtype = torch.float32 if "fp32" in kinds else torch.bfloat16
    transformer = load_transformer(config.model, dtype)
    rewards = load_rewards(config, transformer) if feedback else {}
    models = [model for members in rewards.values() for model in members]
    for model in models:
        check_data(dataset, model.backbone, "the reward model")
    apply_memory(transformer, None, memory, device=device)
    for model in models:
        apply_memory(None, model, memory, device=device)
    if config.lora is not None:
        add_lora(
            transformer, config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets
        )
    if config.hardware.patch:
        for module in (transformer, *(model.backbone for model in models)):
            patch(module)
    objectives: dict[str, Objective] = {}
    for name in config.objectives:
        if name == "prfl":
            step = _step(config, transformer, rewards, guidance)
            objectives[name] = RewardFeedback(step, batches, device)
        else:
            # Its own order: otherwise every supervised step would repeat the conditions of the PRFL
            # step before it.
            own = Batches(dataset, config.run.batch_size, config.run.seed + 1)
            objectives[name] = SupervisedFlow(
                transformer,
                own,
                shift=config.prfl.shift,
                precision=autocast_of(memory.weights, config.hardware.precision),
            )
    trainer = Trainer(
        transformer,
        objectives,
        _settings(config),
        folder=out,
        resume=config.run.resume,
        identity=_identity(config),
        progress=True,
        tensorboard=config.run.tensorboard,
        advise=lambda: next_policy(config, dataset, device, plan),
    )
    return _print_check(config) if check else _finish(trainer, config)


def _in_the_references_layout(config: TrainConfig) -> bool:
    several = config.reward if isinstance(config.reward, tuple) else ()
    sources = [config.reward, *(reward.path for reward in several)]
    return any(isinstance(source, ReferenceReward) for source in sources)


def _step(
    config: TrainConfig,
    transformer: nn.Module,
    models: dict[str, tuple[LatentRewardModel, ...]],
    guidance: Guidance | None,
) -> PRFL:
    """The reward's step of a configuration; everything is loaded and on its device."""
    assert isinstance(config.memory, Memory)
    feedback, precision = config.prfl, config.hardware.precision
    rewards, weights = rewards_of_step(
        config, models, autocast_of(config.memory.reward_weights, precision)
    )
    return PRFL(
        velocity_call(transformer, autocast_of(config.memory.weights, precision)),
        rewards,
        SOLVERS[feedback.solver](shift=feedback.shift),
        feedback.plan(),
        num_steps=feedback.num_steps,
        target=feedback.target,
        weight=feedback.weight,
        reward_weights=weights,
        guidance=guidance,
        rollout=config.rollout,
        divergence=feedback.divergence,
    )


def train_reward(config: TrainRewardConfig, check: bool) -> int:
    """Train a latent reward model, or only load and check everything; the exit code."""
    device, out = device_of(config.hardware), Path(config.out)
    check_writable(out, "out")
    dataset = LatentDataset(config.data)
    held_out = LatentDataset(config.eval_data) if config.eval_data is not None else None
    if dataset.pairs != (config.loss == "bt"):
        kind = "pairs" if dataset.pairs else "single videos"
        raise ValueError(
            f"data: {config.data} holds {kind}, but loss is {config.loss!r}: ce takes single "
            "videos, bt pairs"
        )
    if held_out is not None and held_out.pairs:
        raise ValueError(
            f"eval_data: {config.eval_data} holds pairs; evaluation takes labelled single videos"
        )
    for labelled in (d for d in (dataset, held_out) if d is not None and not d.pairs):
        for place, labels in labelled.labels():
            try:
                label_of(labels, config.label)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
    batches = Batches(dataset, config.run.batch_size, config.run.seed)
    check_model(config.model, dataset)
    memory = config.memory
    check_available(memory, device)
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    dtype = torch.float32 if memory.weights == "fp32" else torch.bfloat16
    transformer = load_transformer(config.model, dtype)
    reward = LatentRewardModel.from_backbone(
        transformer, config.num_blocks, num_heads=config.num_heads, num_queries=config.num_queries
    )
    del transformer
    for source in (d for d in (dataset, held_out) if d is not None):
        check_data(source, reward.backbone, "the reward model")
    apply_memory(reward.backbone, None, Memory(**dataclasses.asdict(memory)), device=device)
    reward.to(device)
    if config.hardware.patch:
        patch(reward.backbone)
    fit = RewardFit(
        reward,
        batches,
        loss=config.loss,
        label=config.label,
        shift=config.shift,
        precision=autocast_of(memory.weights, config.hardware.precision),
    )
    trainer = Trainer(
        reward,
        {"reward": fit},
        _settings(config),
        folder=out,
        resume=config.run.resume,
        identity=_identity(config),
        progress=True,
        tensorboard=config.run.tensorboard,
    )
    if check:
        return _print_check(config)
    code = _finish(trainer, config)
    if code:
        return code
    unpatch(reward.backbone)
    reward.save(out / "reward")
    print(f"reward model: {out / 'reward'}")
    if held_out is not None:
        _evaluate(reward, held_out, config, device, out)
    return 0


def _evaluate(
    reward: LatentRewardModel,
    dataset: LatentDataset,
    config: TrainRewardConfig,
    device: torch.device,
    out: Path,
) -> None:
    def batches() -> Iterator[Any]:
        for i in range(len(dataset)):
            batch = collate([dataset[i]])
            assert isinstance(batch, Batch)
            labels = torch.tensor([label_of(record, config.label) for record in batch.labels])
            yield batch.latents.to(device), batch.to(device).conditions, labels

    with autocast(device, autocast_of(config.memory.weights, config.hardware.precision)):
        metrics = evaluate(reward, batches(), config.timesteps, seed=config.run.seed)
    with write_atomic(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    for t, values in metrics.items():
        print(f"t = {t}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def _settings(config: Any) -> TrainSettings:
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    values: dict[str, Any] = {}
    for part in (config.optimizer, config.run, config.memory):
        values |= dataclasses.asdict(part)
    return TrainSettings(**{name: value for name, value in values.items() if name in names})


def _identity(config: Any) -> dict[str, Any]:
    """What decides the numbers of a run besides the trainer's own settings."""
    values = dataclasses.asdict(config)
    for name in ("out", "run", "optimizer", "eval_data", "timesteps"):
        values.pop(name, None)
    flat: dict[str, Any] = {"run.batch_size": config.run.batch_size}
    for name, value in values.items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    # A run may move to another device, or one with less memory. The optimizer is in the settings.
    del flat["hardware.device"]
    for name in (*config.memory.FREE, "optimizer", "gradients"):
        del flat[f"memory.{name}"]
    for name in _FREE:
        flat.pop(f"rollout.{name}", None)
    return flat


def _finish(trainer: Trainer, config: Any) -> int:
    """Run with the resolved configuration beside the log; report where the result is."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with write_atomic(out / "config.yaml") as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
    result = trainer.run()
    where = latest_checkpoint(out)
    if result.stopped_by is not None:
        print(
            f"stopped by {result.stopped_by.name} after step {result.step}; saved in {where}; run "
            "again to go on"
        )
        return 128 + result.stopped_by
    print(f"step {result.step}, {result.skipped} updates skipped; saved in {where}")
    return 0


def _print_check(config: Any) -> int:
    print(to_yaml(config), end="")
    return 0
