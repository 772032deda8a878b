"""What the commands load, checked on the way: device, generator, reward models, guidance."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prfl_fast._extras import need
from prfl_fast.adapters import find_adapter
from prfl_fast.config import GuidanceFile, Hardware, NamedReward, ReferenceReward, TrainConfig
from prfl_fast.data import LatentDataset
from prfl_fast.kernels._checks import describe
from prfl_fast.model_call import Guidance, check_finite
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rewards import Reward, RewardEnsemble
from prfl_fast.trainer import Precision, reward_call
from prfl_fast.training_state import load_tensors


def device_of(hardware: Hardware) -> torch.device:
    """The device a configuration names; ``ValueError`` if it is not there."""
    if hardware.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(hardware.device)
    except RuntimeError as error:
        raise ValueError(
            f"hardware.device is {hardware.device!r}, expected auto, cpu, cuda or cuda:<number>"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"hardware.device is {hardware.device!r}, but there are {torch.cuda.device_count()} "
            "CUDA devices"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"hardware.device is {hardware.device!r}, expected auto, cpu, cuda or cuda:<number>"
        )
    return device


def check_writable(path: Path, key: str) -> None:
    """Refuse an output path before the work, not after it."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if existing != path and not existing.is_dir():
        raise ValueError(f"{key} is {str(path)!r}, but {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{key} is {str(path)!r}, but {existing} is not writable")


def _transformer_class(folder: str) -> tuple[Any, Mapping[str, Any]]:
    """The diffusers class and configuration of a model folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model: {folder} has no config.json; expected the folder of a diffusers transformer"
        )
    try:
        config = json.loads(path.read_text())
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {path} is not the configuration of a diffusers transformer"
        ) from error
    found = getattr(need("diffusers"), str(name), None)
    if found is None:
        raise ValueError(f"model: {path} names {name!r}, which this diffusers does not have")
    return found, config


def check_data(dataset: LatentDataset, model: nn.Module, name: str) -> None:
    """Check the dataset's shapes against a model or reward backbone, on tensors without memory."""
    shapes = dict(dataset.shapes)
    x = torch.empty(1, *shapes.pop("latents"), device="meta")
    conditions = {key: torch.empty(1, *shape, device="meta") for key, shape in shapes.items()}
    adapter = find_adapter(model)
    try:
        adapter.check_latents(model, x, conditions)
        if next(model.parameters()).is_meta:
            with torch.no_grad():
                adapter.velocity(model, x, torch.zeros(1, device="meta"), conditions)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{dataset.folder}: does not fit {name}: {error}") from error


def check_model(folder: str, dataset: LatentDataset) -> None:
    """Check the dataset's shapes against the model in a folder, before its weights are read."""
    found, config = _transformer_class(folder)
    try:
        with torch.device("meta"):
            model = found.from_config(config)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model: {folder}/config.json does not build a {found.__name__}: {error}"
        ) from error
    check_data(dataset, model, folder)


def load_transformer(folder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The transformer in a folder, on the CPU; in bfloat16, what diffusers keeps in float32 is."""
    found, _ = _transformer_class(folder)
    need(
        "diffusers"
    ).utils.logging.set_verbosity_error()  # what it would warn about is an error here
    try:
        model, info = found.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # diffusers raises whatever its readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model: {folder} cannot be loaded: {reason}") from error
    # diffusers fills missing tensors with random numbers and a warning.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = list(info.get(kind) or ())
        if keys:
            raise ValueError(
                f"model: {folder} has {kind.replace('_', ' ')}: {', '.join(map(str, keys[:3]))}"
            )
    return model


def load_reward(source: str | ReferenceReward, transformer: nn.Module | None) -> LatentRewardModel:
    """A saved reward model, on the CPU, in its own dtypes or those of ``transformer``."""
    if isinstance(source, str):
        return LatentRewardModel.load(source)
    assert transformer is not None
    return LatentRewardModel.load_reference(
        transformer, source.transformer, source.mlp, source.pool, num_heads=source.num_heads
    )


def load_rewards(
    config: TrainConfig, transformer: nn.Module
) -> dict[str, tuple[LatentRewardModel, ...]]:
    """The saved reward models by name, on the CPU; several of one name form an ensemble."""
    assert config.reward is not None
    loaded = {}
    for reward in _named(config.reward):
        paths = reward.path if isinstance(reward.path, tuple) else (reward.path,)
        loaded[reward.name] = tuple(load_reward(path, transformer) for path in paths)
    return loaded


def rewards_of_step(
    config: TrainConfig, models: Mapping[str, tuple[LatentRewardModel, ...]], precision: Precision
) -> tuple[dict[str, Reward], dict[str, float]]:
    """Loaded models as :class:`prfl_fast.PRFL` takes them, and their weights."""
    assert config.reward is not None
    rewards: dict[str, Reward] = {}
    weights = {}
    for reward in _named(config.reward):
        calls = [reward_call(model, precision) for model in models[reward.name]]
        rewards[reward.name] = calls[0]
        if reward.ensemble is not None:
            given = {} if reward.coefficient is None else {"coefficient": reward.coefficient}
            rewards[reward.name] = RewardEnsemble(calls, reward.ensemble, **given)
        weights[reward.name] = reward.weight
    return rewards, weights


def _named(
    reward: str | ReferenceReward | tuple[NamedReward, ...],
) -> tuple[NamedReward, ...]:
    return reward if isinstance(reward, tuple) else (NamedReward("reward", reward),)


def load_guidance(source: GuidanceFile, dataset: LatentDataset, device: torch.device) -> Guidance:
    """Guidance with the negative conditions of a file.

    Raises:
        ValueError: the file holds other tensors than the dataset's conditions, of other shapes (the
            text may have another length unless batched), or values that are not finite.
        FileNotFoundError: there is no such file.
    """
    key = f"prfl.guidance.negative: {source.negative}"
    shapes = {name: shape for name, shape in dataset.shapes.items() if name != "latents"}
    negative = load_tensors(source.negative)
    if not negative or set(negative) - set(shapes):
        raise ValueError(f"{key} holds {sorted(negative)}, expected some of {sorted(shapes)}")
    for name, tensor in negative.items():
        wanted = tuple(shapes[name])
        loose = name == "encoder_hidden_states" and not source.batched
        fits = tensor.shape == wanted
        if loose:
            fits = tensor.ndim == 2 and len(tensor) > 0 and tensor.shape[1] == wanted[1]
        if not (fits and tensor.is_floating_point()):
            hint = "; pad it, or set batched: false" if name == "encoder_hidden_states" else ""
            raise ValueError(
                f"{key}: {name} is {describe(tensor)}, expected the dataset's "
                f"{list(wanted)}{'' if loose else hint}"
            )
        check_finite(f"{key}: {name}", tensor)
    conditions = {name: tensor.float()[None].to(device) for name, tensor in negative.items()}
    return Guidance(source.scale, conditions, source.batched)


def autocast_of(weights: str, precision: Precision) -> Precision:
    """Autocast is for float32 weights: the others compute in bfloat16 by themselves."""
    return precision if weights == "fp32" else "fp32"
