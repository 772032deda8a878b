"""Workload of the planner from a trainer's YAML, its dataset, and command line options."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.loading import check_model_keys, open_dataset
from prfl_fast.cli.plan_options import DEFAULT_MODEL
from prfl_fast.cli.reward_sections import ReferenceReward
from prfl_fast.cli.sections import GuidanceSection
from prfl_fast.cli.yaml_config import Config, parse_config, read_yaml
from prfl_fast.data.manifest import MANIFEST, LatentDataset
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.models.adapter import FIRST_FRAME
from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.planning.presets import Model, adapter_of, first_blocks, model_config, vae_stride
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.io import read_json

_SHARES = ("shard", "sequence")  # fields of ParallelConfig that are options
# Fields of Workload that a section of the file decides, with their keys; "points" stands for the
# gradient plan.
_KEYS = {
    "expert": ("train", "train"),
    "lora_rank": ("lora", "lora.lora_rank"),
    "batch_size": ("run", "run.batch_size"),
    "gradient_accumulation_steps": ("run", "run.gradient_accumulation_steps"),
    "points": ("prfl", "prfl.points"),
    "num_inference_steps": ("prfl", "prfl.num_inference_steps"),
    "shift": ("prfl", "prfl.shift"),
    "guidance": ("prfl", "prfl.guidance"),
}


def fields_of_run(config: TrainFile) -> dict[str, Any]:
    """Return the Workload fields that a training configuration decides, sizes excepted."""
    lora, feedback = config.lora, "prfl" in config.objectives
    plan = config.prfl.plan() if feedback else GradientPlan()
    fields: dict[str, Any] = {
        "model": _model_of(config),
        "expert": config.train or "both",
        "shift": config.prfl.shift,
        "train": "full" if lora is None else "lora",
        "batch_size": config.run.batch_size,
        "gradient_accumulation_steps": config.run.gradient_accumulation_steps,
        "gradient_plan": plan,
        "divergence": feedback and config.prfl.divergence > 0,
        "guidance": _guidance(config.prfl.guidance) if feedback else None,
        "num_inference_steps": config.prfl.num_inference_steps,
        "sft": not {"sft", "rwr"}.isdisjoint(config.objectives),  # one forward of clean latents
        "dpo": "dpo" in config.objectives,
        "ema": config.run.ema_decay is not None,
        "patched": config.hardware.patch,
        "fp8_linears": config.hardware.fp8_linears,
    }
    if lora is not None:
        fields |= {"lora_rank": lora.lora_rank, "target_modules": lora.target_modules}
    return fields | _reward_blocks(config)


def layout_of(config: TrainFile | TrainRewardFile) -> ParallelConfig:
    """Return the layout of a run's GPUs; no GPUs share a video where that makes rollouts slower.

    Reused residuals and sparse attention need all tokens, see :mod:`prfl_fast.models.inference`.
    """
    layout = config.parallel.build()
    if layout.sequence == "auto" and isinstance(config, TrainFile) and "prfl" in config.objectives:
        rollout = config.rollout.build()
        if config.rollout.drift is not None or rollout.needs_all_tokens:
            return dataclasses.replace(layout, sequence=1)
    return layout


def _guidance(section: GuidanceSection | None) -> str | None:
    """Return the field guidance of Workload."""
    if section is None:
        return None
    return "batched" if section.batched else "separate"


def _model_of(config: TrainFile) -> Any:
    """Return the file's model in the form that Workload takes."""
    if isinstance(config.model, str):
        return config.model
    return model_config(config.model.high) | {"boundary_ratio": config.model.boundary}


def fields_of_reward_run(config: TrainRewardFile, dataset: LatentDataset | None) -> dict[str, Any]:
    """Return the Workload fields that the training of a reward model decides."""
    lora = config.lora
    fields: dict[str, Any] = {
        "batch_size": config.run.batch_size,
        "gradient_accumulation_steps": config.run.gradient_accumulation_steps,
        "train": "full" if lora is None else "lora",
        "reward_loss": config.loss,
        "sft": False,
        "ema": config.run.ema_decay is not None,
        "patched": config.hardware.patch,
        "fp8_linears": config.hardware.fp8_linears,
    }
    if lora is not None:
        fields |= {"lora_rank": lora.lora_rank, "target_modules": lora.target_modules}
    if dataset is not None:
        fields["text_tokens"] = dataset.shapes["encoder_hidden_states"][0]
        fields |= sizes_of(dataset)
    return fields


def _reward_blocks(config: TrainFile) -> dict[str, Any]:
    """Return the Workload field ``reward_blocks``; empty if the only reward's depth is unknown."""
    if not config.reads_reward:
        return {"reward_blocks": 1}  # the planner has no step without a reward: take the smallest
    rewards = config.rewards()
    if len(rewards) == 1 and len(rewards[0].paths) == 1:
        found = _blocks_of(rewards[0].paths[0])
        return {} if found is None else {"reward_blocks": found}
    return {
        "reward_blocks": tuple(
            tuple(_blocks_of(path) or Workload.reward_blocks for path in reward.paths)
            for reward in rewards
        )
    }


def _blocks_of(source: str | ReferenceReward) -> int | None:
    """Return the number of blocks of a saved reward model; None if it is unknown."""
    path = Path(source if isinstance(source, str) else "") / "config.json"
    if not isinstance(source, str) or not path.is_file():
        return None
    try:
        return int(read_json(path)["num_blocks"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the configuration of a reward model") from error


def sizes_of(dataset: LatentDataset) -> dict[str, int]:
    """Return the Workload fields that the shapes of a dataset decide."""
    channels, *latents = dataset.shapes["latents"]
    frames, *size = (n * stride for n, stride in zip(latents, vae_stride(channels), strict=True))
    frames -= vae_stride(channels)[0] - 1  # the first frame has its own latent
    found = dict(zip(("frames", "height", "width"), (frames, *size), strict=True))
    return found | {"first_frame": FIRST_FRAME in dataset.shapes}


def fields_of_file(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Workload fields that a trainer's YAML decides.

    A missing file or section decides nothing. ``given`` has the options by Workload field or
    ``points``; raise ``ValueError`` if an option contradicts the file.
    """
    if not path.exists():
        return {}
    content = read_yaml(path)
    config = _parse(TrainFile, {"reward": "-"} | content, path)
    found = fields_of_run(config)
    for name, (section, key) in _KEYS.items():
        field = "gradient_plan" if name == "points" else name
        value = config.prfl.points if name == "points" else found.get(name)
        if content.get(section) is None:
            found.pop(field, None)
        elif name in given and given[name] != value:
            has = f"no {key}" if value is None else f"{key}: {value}"
            _contradicted(name, given[name], f"{path} has {has}")
    if given.get("train") == "full" and config.lora is not None:
        _contradicted("train", "full", f"{path} has a lora section")
    if given.get("sft") is False and "objectives" in content and found["sft"]:
        name = "sft" if "sft" in config.objectives else "rwr"
        raise ValueError(f"--no-sft, but {path} has {name} among its objectives. Change the file")
    undecided = {
        "sft": "objectives" in content,
        "train": config.lora is not None,
    }
    undecided |= {"model": "model" in content and "model" not in given}
    known = "reward" in content or not config.reads_reward
    undecided |= {"reward_blocks": known and "reward_blocks" not in given}
    for name, decided in undecided.items():
        if not decided:
            found.pop(name, None)
    found |= _shares(config, given, path)
    _check_model_keys(config, found.get("model") or given.get("model", DEFAULT_MODEL), path)
    return {"train": given.get("train", "full")} | found | _sizes_of_data(config, given, path)


def _check_model_keys(config: TrainFile, model: Model, path: Path) -> None:
    """Check the keys that depend on the model, which an option may name."""
    found = model_config(model)
    blocks = adapter_of(found).block_count(found)
    try:
        check_model_keys(config, "boundary_ratio" in found, blocks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def is_reward_file(path: Path) -> bool:
    """Return True if a YAML file has a key that only train-reward knows."""
    own = TrainRewardFile.model_fields.keys() - TrainFile.model_fields.keys()
    return path.exists() and bool(own & read_yaml(path).keys())


def _fields_of_reward_file(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Workload fields that the YAML of train-reward decides."""
    content = read_yaml(path)
    config = _parse(TrainRewardFile, content, path)
    found = fields_of_reward_run(config, _dataset(config))
    free = {"model", "frames", "height", "width", "first_frame"} - found.keys()
    free |= {"gpus", *_SHARES}
    for name, value in given.items():
        if name not in free and found.get(name) != value:
            _contradicted(name, value, f"{path} is of train-reward, which decides it")
    found |= _shares(config, given, path)
    model = given.get("model") or content.get("model", DEFAULT_MODEL)
    return found | {"model": first_blocks(model_config(model), config.num_blocks)}


def _parse(kind: type[Config], content: Mapping[str, Any], path: Path) -> Config:
    """Parse a file in which required keys may be missing, as the plan needs only some of them."""
    # The plan replaces the memory sections, so they may be out of date.
    planned = {"memory", "reward_memory"} & kind.model_fields.keys()
    filled: dict[str, Any] = {k: v for k, v in content.items() if k not in planned}
    filled = {"model": "-", "data": "-", "out": "-", "run": {}} | filled
    if isinstance(filled["run"], dict):
        filled["run"] = {"steps": 1} | filled["run"]
    try:
        return parse_config(kind, filled)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _dataset(config: TrainFile | TrainRewardFile) -> LatentDataset | None:
    """Return the file's dataset; None if it does not exist yet."""
    there = Path(config.data).is_file() or (Path(config.data) / MANIFEST).is_file()
    return open_dataset(config, "data") if there else None


def _sizes_of_data(config: TrainFile, given: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Return the sizes of the file's dataset, if it exists."""
    dataset = _dataset(config)
    found = {} if dataset is None else sizes_of(dataset)
    for name, value in found.items():
        if given.get(name, value) != value:
            _contradicted(name, given[name], f"the data of {path} has {value}")
    return found


def _contradicted(name: str, value: object, fact: str) -> None:
    option = name.replace("_", "-")
    raise ValueError(f"--{option} is {value}, but {fact}. Leave the option out, or change the file")


def _shares(
    config: TrainFile | TrainRewardFile, given: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Return shard and sequence of a file's section parallel, for a plan of several GPUs.

    The plan replaces ``keep_gathered``, as it does the memory sections, and what is auto.
    """
    if given.get("gpus", 1) == 1:
        return {}
    layout, known = layout_of(config), {}
    for name in _SHARES:
        value = getattr(config.parallel, name)
        if value != "auto" and given.get(name, value) != value:
            _contradicted(name, given[name], f"{path} has parallel.{name}: {value}")
        if name not in given and getattr(layout, name) != "auto":
            known[name] = getattr(layout, name)
    return known


def fields_of_options(values: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """Return the Workload fields of ``prfl-fast plan`` from options, defaults and a file."""
    # argparse gives None for an absent option, so that defaults do not contradict the file.
    given = {name: value for name, value in values.items() if value is not None}
    fields = dict(given)
    if path is not None:
        reward = is_reward_file(path)
        fields |= (_fields_of_reward_file if reward else fields_of_file)(path, given)
    points, ranks = fields.pop("points", 1), fields.pop("gpus", 1)
    shares = {name: fields.pop(name) for name in _SHARES if name in fields}
    fields = {
        "model": DEFAULT_MODEL,
        "gradient_plan": GradientPlan(points),
        "ranks": ranks,
    } | fields
    return fields | ({"parallel": ParallelConfig(**shares)} if shares else {})


@contextlib.contextmanager
def options_named(values: Mapping[str, Any], path: Path | None) -> Iterator[None]:
    """Name the option as typed, or the file's key, where a ``ValueError`` names a Workload field.

    The arguments are those of :func:`fields_of_options`.
    """
    try:
        yield
    except ValueError as error:
        field, _, problem = str(error).partition(" ")
        name = "gpus" if field == "ranks" else field
        key = f"parallel.{name}" if name in _SHARES else _KEYS.get(name, ("", ""))[1]
        if problem.startswith("is ") and values.get(name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {problem}") from error
        if problem.startswith("is ") and path is not None and key:
            raise ValueError(f"{path}: {key} {problem}") from error
        raise
