"""Load and check the inputs of commands: device, generator, reward models, guidance."""

import contextlib
import os
from argparse import Namespace
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prfl_fast.cli.config import ScoreFile, TrainFile, TrainRewardFile
from prfl_fast.cli.reward_sections import ReferenceReward
from prfl_fast.cli.sections import ExpertsSection, GuidanceSection, HardwareSection
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.data.reference_lists import ReferenceList, open_latents
from prfl_fast.models.adapter import FIRST_FRAME
from prfl_fast.models.blocks import TEXT_TOKENS
from prfl_fast.models.conditions import LATENT, MASKS, OF_PROMPT, TEXT, TEXTS, stack_conditions
from prfl_fast.models.experts import Experts, members
from prfl_fast.models.fp8_blocks import check_fp8_linears
from prfl_fast.models.loading import expert_folders, load_transformer, transformer_class
from prfl_fast.models.registry import find_adapter
from prfl_fast.models.velocity import Precision, check_finite
from prfl_fast.rewards.functions import Reward, RewardEnsemble
from prfl_fast.rewards.latent import LatentRewardModel, check_saved
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.training.objectives import reward_call
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import load_tensors
from prfl_fast.utils.modules import unwrap


def device_of(hardware: HardwareSection) -> torch.device:
    """Return the device of a configuration; raise ``ValueError`` if it lacks it or FP8 products."""
    device = _device_named(hardware.device)
    if hardware.fp8_linears:
        check_fp8_linears(device, "hardware.device")
    return device


def _device_named(name: str) -> torch.device:
    device = None
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    wanted = "auto, cpu, cuda or cuda:<number>"
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"hardware.device is {name!r}, expected {wanted}")
    there = torch.cuda.device_count()
    there_is = device.type == "cpu" or (device.index or 0) < there
    check(there_is, "hardware.device", name, f"{wanted}, but there are {there} CUDA devices")
    return device


def open_dataset(
    config: TrainFile | TrainRewardFile | ScoreFile | Namespace, key: str, expected: str = ""
) -> LatentDataset:
    """Open the dataset of a key such as ``eval.data``; pairs are allowed only without ``expected``.

    Raise ``ValueError`` if the dataset is bad, or holds pairs in place of ``expected``.
    """
    folder = attrgetter(key)(config)
    dataset = open_latents(folder, allow_outside=config.allow_outside)
    if expected and dataset.pairs:
        raise ValueError(f"{key}: {folder} holds preference pairs, expected {expected}")
    alone = isinstance(config, TrainFile) and (
        key == "eval.prompts"
        or (tuple(config.objectives) == ("prfl",) and config.prfl.plan().start == "noise")
    )
    if dataset.prompts_only and not alone:
        raise ValueError(
            f"{key}: {folder} holds prompts without latents, expected latents. "
            "Prompts alone train with objectives: [prfl] and a method that starts from noise"
        )
    return dataset


def check_writable(path: Path, key: str) -> None:
    """Raise ``ValueError`` if ``path`` cannot be written; call it before the work starts."""
    check("\0" not in str(path), key, str(path), "a path without the character NUL")
    existing = path
    while not existing.exists() and existing != existing.parent:
        dangling = existing.is_symlink()
        check(not dangling, key, str(path), f"a path, but {existing} is a link to nothing")
        existing = existing.parent
    ok = existing == path or existing.is_dir()
    check(ok, key, str(path), f"a path below a folder, but {existing} is a file")
    ok = os.access(existing, os.W_OK)
    check(ok, key, str(path), f"a writable path, but {existing} is not writable")


def _transformer_class(path: str) -> tuple[Any, Mapping[str, Any]]:
    """Return the diffusers class and configuration of a model; errors name the key."""
    try:
        return transformer_class(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: {error}") from error


def check_data(dataset: LatentDataset, model: nn.Module, name: str) -> None:
    """Check the dataset's shapes against a model or reward backbone, on meta tensors."""
    if isinstance(dataset, ReferenceList):
        channels = dict(getattr(unwrap(model), "config", {})).get("in_channels")
        if channels == dataset.shapes["latents"][0]:  # of a text-to-video model
            dataset.drop_images()
    for bucket in dataset.buckets:
        check_shapes(bucket.shapes, model, f"{dataset.folder}: does not fit {name}")


def check_shapes(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, problem: str) -> None:
    """Check shapes of latents and conditions against a model; errors begin with ``problem``."""
    found = {key: torch.empty(1, *shape, device="meta") for key, shape in shapes.items()}
    x, adapter = found.pop("latents"), find_adapter(model)
    try:
        adapter.check_latents(model, x, found)
        # A forward on meta tensors costs nothing and finds mismatches of widths.
        if next(model.parameters()).is_meta and getattr(adapter, "runs_on_meta", True):
            with torch.no_grad():
                adapter.velocity(model, x, torch.zeros(1, device="meta"), found)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{problem}: {error}") from error


def check_model(folder: str, dataset: LatentDataset) -> None:
    """Check the dataset's shapes against the model in a folder, before its weights are read."""
    check_data(dataset, empty_model(folder), folder)


def empty_model(folder: str) -> nn.Module:
    """Return the model of a folder on the meta device, without reading its weights."""
    found, config = _transformer_class(folder)
    try:
        with torch.device("meta"):
            return found.from_config(config)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        kind = found.__name__
        raise ValueError(f"model: {folder}/config.json builds no {kind}: {error}") from error


def folders_of(model: str | ExpertsSection) -> tuple[tuple[str, ...], float | None]:
    """Return the paths of a model's transformers, and the boundary of two experts."""
    if isinstance(model, ExpertsSection):
        return (model.high, model.low), model.boundary
    try:
        found = expert_folders(model)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: {error}") from error
    return ((model,), None) if found is None else ((str(found[0]), str(found[1])), found[2])


def check_model_keys(config: TrainFile, experts: bool, blocks: int) -> None:
    """Check the keys that depend on the model: on its transformers and on the blocks of one."""
    if not experts:
        train, guidance = config.train, config.prfl.guidance
        check(train is None, "train", train, "no value for a model with one transformer")
        scale = None if guidance is None else guidance.guidance_scale
        one = not isinstance(scale, tuple)
        check(one, "prfl.guidance.guidance_scale", scale, "one number for one transformer")
        for name in ("adapter", "adapter_scale"):
            value = getattr(config.rollout, name)
            one = not isinstance(value, tuple)
            check(one, f"rollout.{name}", value, "one value for one transformer")
    layers = config.rollout.sparse_dense_layers
    expected = f"numbers below {blocks}, the model's blocks"
    check(all(n < blocks for n in layers), "rollout.sparse_dense_layers", layers, expected)


def block_count(folder: str) -> int:
    """Return the number of transformer blocks of the model in a folder."""
    model = empty_model(folder)
    return len(find_adapter(model).blocks(model))


def load_model(model: str | ExpertsSection, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Read the generator of a run to the CPU, one transformer or two experts."""
    folders, boundary = folders_of(model)
    models = [load_generator(folder, dtype) for folder in folders]
    return models[0] if boundary is None else Experts(models[0], models[1], boundary)


def load_generator(path: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Read the transformer of the key ``model`` to the CPU."""
    try:
        return load_transformer(path, dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"model: {error}") from error


def check_reward(source: str | ReferenceReward) -> None:
    """Raise the errors of missing files and of another configuration; read no weights."""
    if isinstance(source, str):
        check_saved(source)
        return
    for name in ("transformer", "mlp", "pool"):
        path = Path(getattr(source, name))
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder, expected the reward's {name}")


def load_reward(source: str | ReferenceReward, transformer: nn.Module | None) -> LatentRewardModel:
    """Read a reward model to the CPU, in its own dtypes or those of ``transformer``."""
    if isinstance(source, str):
        return LatentRewardModel.load(source)
    assert transformer is not None
    options: dict[str, Any] = {"num_heads": source.num_heads, "return_type": source.return_type}
    return LatentRewardModel.load_reference(
        transformer, source.transformer, source.mlp, source.pool, **options
    )


def load_rewards(
    config: TrainFile, transformer: nn.Module
) -> dict[str, tuple[LatentRewardModel, ...]]:
    """Read the reward models of a run to the CPU, by name; models of one name form an ensemble."""
    return {
        # Of two experts either will do: it gives the configuration, the files the weights.
        reward.name: tuple(load_reward(path, members(transformer)[0]) for path in reward.paths)
        for reward in config.rewards()
    }


def rewards_of_step(
    config: TrainFile, models: Mapping[str, tuple[LatentRewardModel, ...]], precision: Precision
) -> tuple[dict[str, Reward], dict[str, float]]:
    """Return loaded models in the form that :class:`prfl_fast.PRFL` takes, and their weights."""
    rewards: dict[str, Reward] = {}
    weights = {}
    for reward in config.rewards():
        calls = [reward_call(model, precision) for model in models[reward.name]]
        rewards[reward.name] = calls[0]
        if reward.ensemble is not None:
            given = {} if reward.coefficient is None else {"coefficient": reward.coefficient}
            rewards[reward.name] = RewardEnsemble(calls, reward.ensemble, **given)
        weights[reward.name] = reward.weight
    return rewards, weights


def load_guidance(
    source: GuidanceSection, dataset: LatentDataset, device: torch.device
) -> Guidance:
    """Return guidance with the negative conditions of a file, whose shapes match the dataset's."""
    key = f"prfl.guidance.negative: {source.negative}"
    shapes = {name: shape for name, shape in dataset.shapes.items() if name != "latents"}
    negative = load_tensors(source.negative)
    if not negative or set(negative) - set(shapes):
        raise ValueError(f"{key} holds {sorted(negative)}, expected some of {sorted(shapes)}")
    missing = sorted((OF_PROMPT & shapes.keys()) - negative.keys()) if TEXT in negative else []
    check(not missing, f"{key}: tensors", sorted(negative), f"{', '.join(missing)} too")
    sized = sorted(set(negative) & {LATENT, FIRST_FRAME})
    one = not sized or len(dataset.buckets) == 1
    check(one, f"{key}: tensors", sized, "only text and image states for videos of several sizes")
    # Only a text with a mask is padded: without a mask, the added tokens count as the prompt's.
    padded = source.batched and MASKS[TEXT] in negative
    for name, tensor in negative.items():
        wanted, text = tuple(shapes[name]), name in TEXTS
        fits = tensor.shape == wanted
        if text and (not source.batched or padded):
            fits = tensor.ndim == len(wanted) and tensor.shape[1:] == wanted[1:]
            most = wanted[0] if source.batched else max(TEXT_TOKENS, wanted[0])
            ok = not fits or 0 < len(tensor) <= most
            check(ok, f"{key}: {name}", tensor, f"1 to {most} text tokens")
        hint = "Pad it, or set batched: false" if text and source.batched else ""
        ok = fits and (tensor.is_floating_point() or name in MASKS.values())
        check(ok, f"{key}: {name}", tensor, f"the dataset's {list(wanted)}", hint=hint)
        check_finite(f"{key}: {name}", tensor.float())
    rows = {name: shapes[name][0] for name in TEXTS & negative.keys()} if source.batched else {}
    found = stack_conditions([negative], rows)
    conditions = {name: tensor.to(device) for name, tensor in found.items()}
    return Guidance(source.guidance_scale, conditions, source.batched)
