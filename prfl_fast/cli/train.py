"""Run ``prfl-fast train`` and ``prfl-fast train-reward`` from a checked configuration."""

import dataclasses
import itertools
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from prfl_fast.cli import loading
from prfl_fast.cli.calibrate import Found, calibrated, find_calibration, print_calibration
from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.held_out import (
    generator_evaluation,
    load_held_out,
    reward_evaluation,
    write_evaluation,
)
from prfl_fast.cli.inputs import PATHS, inputs_of
from prfl_fast.cli.objectives import (
    LEVELS,
    autocast_of,
    batches_of,
    build_objectives,
    first_batches,
    open_data,
    read_ahead,
    rewards_of,
    sampler_of,
)
from prfl_fast.cli.plan import choose_memory, choose_reward_memory, next_policy, note
from prfl_fast.cli.ranks import Job, join, reads_parts
from prfl_fast.cli.reward_sections import NamedReward, ReferenceReward
from prfl_fast.cli.sections import (
    MemorySection,
    RewardMemorySection,
    TrainedRewardMemorySection,
)
from prfl_fast.cli.yaml_config import to_yaml
from prfl_fast.data.dataset import Batches, DrawnPairs
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.data.values import check_values
from prfl_fast.memory.policy import MemoryConfig, apply_memory, check_available
from prfl_fast.models.adapter import FIRST_FRAME
from prfl_fast.models.compiled_blocks import compile_blocks
from prfl_fast.models.experts import NAMES, Experts
from prfl_fast.models.fp8_blocks import use_fp8_linears
from prfl_fast.models.registry import patch, unpatch
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.checkpoint import FINAL, rank_seed
from prfl_fast.training.config import RunIdentity, TrainConfig
from prfl_fast.training.evaluation import labels_of
from prfl_fast.training.logging import check_loggers
from prfl_fast.training.lora import add_lora, merge_lora
from prfl_fast.training.model_files import load_model, save_reward
from prfl_fast.training.objectives import Objective, RewardFeedback, RewardFit
from prfl_fast.training.trainer import Trainer
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.units import plural

# 5e-6, the paper's rate for all weights, hardly moves a new adapter in a thousand steps: its matrix
# B begins at 0, and AdamW moves each element by at most the rate per step.
FULL_LEARNING_RATE, REWARD_LEARNING_RATE, LORA_LEARNING_RATE = 5e-6, 1e-6, 1e-4
# A resumed run may change these keys of the rollout: cache changes no bit, compile only rounding.
# The same holds for hardware.compile_blocks.
_FREE = ("cache", "compile")
# Keys of the rollout that are no part of a run's identity at their defaults.
_LATER = ("adapter_scale", "sparse_attention", "sparse_predictor", "sparse_dense_layers")

Training = TypeVar("Training", TrainFile, TrainRewardFile)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Hold the options of a training command that are not in its file.

    Attributes:
        check: load and check everything, and write nothing.
        deep: read every sample with ``check``.
        accept_changed_inputs: resume with other data or models.
        file: path of the YAML file, for errors.
        calibrate: end after the calibration of the rollout.
    """

    check: bool = False
    deep: bool = False
    accept_changed_inputs: bool = False
    file: str = "FILE.yaml"
    calibrate: bool = False


def run_train(config: TrainFile, options: RunOptions) -> int:
    """Train a generator, or only load and check everything; return the exit code."""
    if options.calibrate:
        if config.rollout.drift is None:
            advice = f"add `rollout: {{drift: 0.02}}` to {options.file}"
            raise ValueError(f"rollout.drift is null, but calibrate needs a budget: {advice}")
        objectives = config.objectives
        check("prfl" in objectives, "objectives", objectives, "prfl among them for calibrate")
    with join(config, check_only=options.check) as job:
        return _train(cast(TrainFile, job.config), options, job)


def _train(config: TrainFile, options: RunOptions, job: Job) -> int:
    given, config = config, _with_learning_rate(config)
    check_loggers(config.run.tensorboard, config.run.wandb)
    device, ranks = job.device, job.ranks
    dataset = open_data(config)
    folders, boundary = loading.folders_of(config.model)
    held_out = None if config.eval is None else load_held_out(config, device)
    datasets = [dataset, *(() if held_out is None else held_out[:1])]
    for folder, source in itertools.product(folders, datasets):
        loading.check_model(folder, source)
    blocks = min(map(loading.block_count, folders))
    loading.check_model_keys(config, boundary is not None, blocks)
    if boundary is not None and config.lora is None:
        hint = "Or add lora"
        check(config.train in NAMES, "train", config.train, "high or low without lora", hint=hint)
    job.check_sequence(folders)
    for source in datasets if options.deep else ():
        check_values(source)
    segments = config.prfl.plan().segments
    frames = min(bucket.shapes["latents"][1] for bucket in dataset.buckets)
    fits = "prfl" not in config.objectives or segments is None or segments <= frames
    check(fits, "prfl.segments", segments, f"at most {frames}, the frames of the dataset's latents")
    fits = "prfl" not in config.objectives or segments is None or FIRST_FRAME not in dataset.shapes
    expected = f"all: frames of a dataset with {FIRST_FRAME} are not rewarded one by one"
    check(fits, "prfl.segments", segments, expected)
    guidance = None
    if config.prfl.guidance is not None:  # the file is checked even without the prfl objective
        guidance = loading.load_guidance(config.prfl.guidance, dataset, device)
    memory, reward_memory, plan = choose_memory(config, dataset, device)
    memory, reward_memory = ranks.gather((memory, reward_memory))[0]
    sections: Any = {"memory": MemorySection.of(memory)}
    sections["reward_memory"] = RewardMemorySection.of(reward_memory)
    config = config.model_copy(update=sections)
    for name, policy in (("memory", memory), ("reward_memory", reward_memory)):
        check_available(policy, device)
        job.check_policy(name, policy)
    inputs = inputs_of(config, dataset)
    calibration = _find_calibration(config, inputs, job, options.file)
    _seed(config)  # adapters are initialized at random
    transformer, rewards = _load_models(config, datasets, memory, reward_memory, job)
    _seed(config, ranks)
    parts: Any = (config, dataset, transformer, rewards, guidance, device)
    objectives = build_objectives(*parts, ranks=ranks)
    advise = partial(next_policy, config, dataset, device, plan, options.file, ranks.size)
    feedback = objectives.get("prfl")
    if calibration is not None and isinstance(feedback, RewardFeedback):
        only = options.check
        config = calibrated(config, feedback.step, dataset, device, calibration, check_only=only)
    if options.calibrate:
        print_calibration(config)
        return 0
    evaluation = None
    if held_out is not None:
        calls, _ = rewards_of(config, rewards)
        sampler = sampler_of(config, transformer, guidance)
        evaluation = generator_evaluation(config, *held_out, sampler, calls, device)
    more: Any = {"advise": advise, "evaluation": evaluation, "mesh": ranks.mesh}
    trainer = _trainer(config, transformer, objectives, inputs, options, **more)
    _note_learning_rate(given, config, "train")
    return _print_check(config) if options.check else _finish(trainer, config)


def _find_calibration(
    config: TrainFile, inputs: dict[str, Any], job: Job, file: str
) -> Found | None:
    """Find the calibration of the prfl objective; other objectives have no rollout."""
    if config.rollout.drift is None or "prfl" not in config.objectives:
        return None
    # A run may go on with more data, and keeps its rollout.
    models = {k: v for k, v in inputs.items() if not k.startswith(("data", "empty"))}
    made_for = {"device": job.device.type, "settings": _identity(config), "models": models}
    return find_calibration(config, made_for, file, several=job.ranks.several)


def _load_models(
    config: TrainFile,
    datasets: Sequence[LatentDataset],
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
    job: Job,
) -> tuple[nn.Module, dict[str, tuple[LatentRewardModel, ...]]]:
    """Return the generator and the rewards, checked, under their memory policies and shared."""
    dtypes = {memory.weight_dtype}
    sources = [source for reward in config.rewards() for source in reward.paths]
    wanted = config.reads_reward or config.eval is not None
    for source in sources if wanted else ():
        loading.check_reward(source)
    if any(isinstance(source, ReferenceReward) for source in sources):
        dtypes.add(reward_memory.weight_dtype)  # such a reward is built from the generator
    # A model that is read in bfloat16 cannot be widened again without loss.
    dtype = torch.float32 if "fp32" in dtypes else torch.bfloat16

    def on_kernels(module: nn.Module) -> None:
        if config.hardware.patch:
            patch(module)

    def without_values(module: nn.Module) -> None:
        apply_memory(module, memory)
        use_fp8_linears(module, config.hardware.fp8_linears)
        on_kernels(module)

    folders, boundary = loading.folders_of(config.model)
    in_parts = reads_parts(job, config, memory, boundary is not None)
    if in_parts:
        transformer = job.load_parts(folders[0], memory, without_values)
    else:
        transformer = loading.load_model(config.model, dtype)
    rewards = loading.load_rewards(config, transformer) if wanted else {}
    models = [model for members in rewards.values() for model in members]
    for model, dataset in itertools.product(models, datasets):
        loading.check_data(dataset, model.backbone, "the reward model")
    if not in_parts:
        apply_memory(transformer, memory, device=job.device_for(memory))
        use_fp8_linears(transformer, config.hardware.fp8_linears)
    for model in models:
        apply_memory(model, reward_memory, device=job.device_for(reward_memory))
    _add_lora(config, transformer)
    for module in (*(() if in_parts else (transformer,)), *(model.backbone for model in models)):
        on_kernels(module)
    for module in (transformer, *(model.backbone for model in models)):
        compile_blocks(module, config.hardware.compile_blocks)
    if not in_parts:
        job.distribute(transformer, memory)
    for model in models:
        job.distribute(model, reward_memory)
    return transformer, rewards


def _add_lora(config: TrainFile, transformer: nn.Module) -> None:
    """Add adapters to the generator if the file asks for them, and freeze what does not train."""
    lora = None if config.lora is None else config.lora.model_dump()
    if isinstance(transformer, Experts):
        for name in NAMES:
            if config.train not in (None, "both", name):
                getattr(transformer, name).requires_grad_(False)
            elif lora is not None:
                add_lora(transformer.use(name), **lora)
    elif lora is not None:
        add_lora(transformer, **lora)


def train_reward(config: TrainRewardFile, options: RunOptions) -> int:
    """Train a latent reward model, or only load and check everything; return the exit code."""
    with join(config, check_only=options.check) as job:
        return _train_reward(cast(TrainRewardFile, job.config), options, job)


def _train_reward(config: TrainRewardFile, options: RunOptions, job: Job) -> int:
    given, config = config, _with_learning_rate(config)
    check_loggers(config.run.tensorboard, config.run.wandb)
    device, ranks, out = job.device, job.ranks, Path(config.out)
    dataset, held_out = _labeled_data(config)
    winners = first_batches(dataset, config)
    batches: Batches | DrawnPairs = winners
    loading.check_model(config.model, dataset)
    job.check_sequence([config.model])
    losers = None
    if config.lose_data is not None:
        losers = loading.open_dataset(config, "lose_data", "single videos")
        loading.check_model(config.model, losers)
        batches = DrawnPairs(winners, batches_of(losers, config, 1))
    for source in (dataset, losers, held_out) if options.deep else ():
        if source is not None:
            check_values(source)
    memory = ranks.gather(choose_reward_memory(config, dataset, device))[0]
    config = config.model_copy(update={"memory": TrainedRewardMemorySection.of(memory)})
    check_available(memory, device)
    job.check_policy("memory", memory)
    _seed(config)  # pool and head are initialized at random
    dtype = torch.float32 if memory.weight_dtype == "fp32" else torch.bfloat16
    transformer = loading.load_generator(config.model, dtype)
    reward = LatentRewardModel.from_backbone(
        transformer, config.num_blocks, num_heads=config.num_heads, num_queries=config.num_queries
    )
    del transformer  # the reward has copies, and no later step reads the generator
    for source in (d for d in (dataset, held_out) if d is not None):
        loading.check_data(source, reward.backbone, "the reward model")
    apply_memory(reward, memory, device=job.device_for(memory))
    use_fp8_linears(reward.backbone, config.hardware.fp8_linears)
    reward.check_savable(out / "reward")  # now, not after the training
    taken = (out / "evaluation.json").is_dir()
    check(not taken, "out", str(out), "one without a folder evaluation.json")
    if config.lora is not None:
        add_lora(reward.backbone, **config.lora.model_dump())
    if config.hardware.patch:
        patch(reward.backbone)
    compile_blocks(reward.backbone, config.hardware.compile_blocks)
    precision = autocast_of(memory.weight_dtype, config.hardware.precision)
    keys = config.model_dump(include={"loss", "label", "missing_label", *LEVELS})
    job.distribute(reward, memory)
    _seed(config, ranks)
    ahead = read_ahead(batches, config, device, ranks)
    fit = RewardFit(reward, ahead, precision=precision, **keys)
    inputs = inputs_of(config, dataset, losers)
    evaluator, evaluation = reward_evaluation(config, held_out, reward, precision)
    more: Any = {"evaluation": evaluation, "mesh": ranks.mesh}
    trainer = _trainer(config, reward, {"reward": fit}, inputs, options, **more)
    _note_learning_rate(given, config, "train-reward")
    if options.check:
        return _print_check(config)
    if code := _finish(trainer, config):
        return code
    if evaluation is not None and evaluation.best_step is not None:
        load_model(reward, out / f"step-{evaluation.best_step:08d}" / "model")
        print(f"best accuracy {evaluation.best:.4g}, at step {evaluation.best_step}")
    unpatch(reward.backbone)  # a saved model is plain diffusers
    if config.lora is not None:
        merge_lora(reward.backbone)
    save_reward(reward, out / "reward", ranks)
    print(f"reward model: {out / 'reward'}")
    if evaluator is not None:
        write_evaluation(evaluator, reward, out, ranks)
    return 0


def _labeled_data(config: TrainRewardFile) -> tuple[LatentDataset, LatentDataset | None]:
    """Return the datasets for training and evaluation, with every label checked."""
    drawn = config.lose_data is not None
    dataset = loading.open_dataset(config, "data", "single videos with lose_data" if drawn else "")
    held_out = None
    if config.eval is not None and config.eval.held_out is not None:
        dataset, held_out = dataset.split(config.eval.held_out)
    elif config.eval is not None:
        held_out = loading.open_dataset(config, "eval.data")
    kind = "pairs" if dataset.pairs else "single videos"
    hint = f"data: {config.data} holds {kind}; ce takes single videos, bt pairs"
    wanted = "bt" if dataset.pairs or drawn else "ce"
    check(config.loss == wanted, "loss", config.loss, f"{wanted} for this dataset", hint=hint)
    for labeled in ([dataset] if config.loss == "ce" else []) + ([held_out] if held_out else []):
        if not labeled.pairs:
            labels_of(labeled, config.label, config.missing_label)
    return dataset, held_out


def _with_learning_rate(config: Training) -> Training:
    """Fill in the learning rate if the file gives none."""
    if config.optimizer.learning_rate is not None:
        return config
    full = FULL_LEARNING_RATE if isinstance(config, TrainFile) else REWARD_LEARNING_RATE
    rate = full if config.lora is None else LORA_LEARNING_RATE
    optimizer = config.optimizer.model_copy(update={"learning_rate": rate})
    return config.model_copy(update={"optimizer": optimizer})


def _note_learning_rate(given: Training, config: Training, command: str) -> None:
    """Print the learning rate of adapters if the file gives none."""
    if config.lora is not None and given.optimizer.learning_rate is None:
        rate = config.optimizer.learning_rate
        text = f"optimizer.learning_rate is {rate:g}, for adapters; the file gives none"
        note(text, command)


def _seed(config: TrainFile | TrainRewardFile, ranks: Ranks | None = None) -> None:
    """Seed the global random numbers: the same on all ranks, or with ``ranks`` per data rank."""
    if ranks is not None and not ranks.several:
        return
    data_rank = 0 if ranks is None else ranks.data_rank
    random.seed(config.run.seed if data_rank == 0 else rank_seed(config.run.seed, data_rank))
    torch.manual_seed(rank_seed(config.run.seed, data_rank))


def _trainer(
    config: TrainFile | TrainRewardFile,
    model: nn.Module,
    objectives: dict[str, Objective],
    inputs: dict[str, Any],
    options: RunOptions,
    **more: Any,
) -> Trainer:
    assert isinstance(config.memory, MemorySection)
    every = None if config.eval is None else config.eval.every
    if every is not None and every > config.run.steps:
        command = "train" if isinstance(config, TrainFile) else "train-reward"
        text = (
            f"eval.every is {every}, more than run.steps: while training, step 0 alone is evaluated"
        )
        note(text, command)
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    values: dict[str, Any] = {}
    for part in (config.optimizer, config.run, config.memory):
        values |= part.model_dump(include=names)
    return Trainer(
        model,
        objectives,
        TrainConfig(**values),
        folder=Path(config.out),
        resume=config.run.resume,
        identity=RunIdentity(_identity(config), inputs, options.accept_changed_inputs),
        progress=True,
        tensorboard=config.run.tensorboard,
        **more,
    )


def _identity(config: TrainFile | TrainRewardFile) -> dict[str, Any]:
    """Return the keys that determine a run's numbers, without the trainer's own settings."""
    paths = {"out", "allow_outside", *PATHS}  # those that are inputs of the run
    unused = {"dpo", "rwr"} - set(getattr(config, "objectives", ()))
    values = config.model_dump(exclude={*paths, *unused, "run", "optimizer", "eval", "parallel"})
    flat: dict[str, Any] = {"run.batch_size": config.run.batch_size}
    if isinstance(config, TrainFile):  # the paths of rewards are inputs too
        values["reward"] = [_settings_of(reward) for reward in config.rewards()]
    elif config.eval is not None and config.eval.held_out is not None:
        flat["eval.held_out"] = config.eval.held_out  # these samples do not train
    for name, value in values.items():
        section = isinstance(value, dict)
        flat |= {f"{name}.{k}": v for k, v in value.items()} if section else {name: value}
    # A run may move to another device, or to one with less memory. The trainer's settings contain
    # the optimizer.
    memory = ("optimizer", "gradient_dtype", *MemoryConfig.FREE)
    free = {f"{section}.{k}" for section in ("memory", "reward_memory") for k in memory}
    free |= {"hardware.device", "hardware.compile_blocks", *(f"rollout.{k}" for k in _FREE)}
    if not config.hardware.fp8_linears:  # runs from before these keys go on
        free.add("hardware.fp8_linears")
    if isinstance(config, TrainFile):
        known = type(config.rollout).model_fields
        for name in _LATER:
            if getattr(config.rollout, name) == known[name].default:
                free.add(f"rollout.{name}")
    return {name: value for name, value in flat.items() if name not in free}


def _settings_of(reward: NamedReward) -> dict[str, Any]:
    """Return the keys of a reward without its paths."""
    settings = reward.model_dump(exclude={"path"})
    for source in reward.paths:
        if isinstance(source, ReferenceReward):
            settings |= source.model_dump(include={"num_heads", "return_type"})
    return settings


def _finish(trainer: Trainer, config: TrainFile | TrainRewardFile) -> int:
    """Save the resolved configuration beside the log, train, and print the path of the result."""
    out = Path(config.out)

    def write() -> None:
        out.mkdir(parents=True, exist_ok=True)
        with write_atomic(out / "config.yaml") as temporary:
            temporary.write_text(to_yaml(config), encoding="utf-8")

    trainer.ranks.on_main(write)
    if trainer.resumed_from is not None:
        print(f"resumed from {trainer.resumed_from}")
    began, steps = trainer.result.step, config.run.steps
    result = trainer.run()
    where = out / f"step-{result.step:08d}"
    if result.stopped_by is not None:
        how = f"stopped by {result.stopped_by.name} after step {result.step}"
        print(f"{how}; saved in {where}; run again to continue")
        return 128 + result.stopped_by
    if trainer.evaluation.exhausted:
        waited = plural(trainer.evaluation.waited, "evaluation")
        print(f"stopped early: no higher accuracy in {waited}; saved in {where}")
    elif began >= steps:
        print(f"already finished at step {began} of {steps}; saved in {where}")
    else:
        print(f"step {result.step}, {plural(result.skipped, 'update')} skipped; saved in {where}")
    final = out / FINAL if (out / FINAL).is_symlink() else where / "model"
    if isinstance(config, TrainFile):
        kind = "generator" if config.lora is None else "adapter, for load_lora_weights"
        print(f"{kind}: {final}")
    return 0


def _print_check(config: TrainFile | TrainRewardFile) -> int:
    print(to_yaml(config), end="")
    command = "train" if isinstance(config, TrainFile) else "train-reward"
    note("settings, data and models fit together; nothing was written", command)
    return 0
