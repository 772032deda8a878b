"""Build the models of a workload: without data, then with zeros or as fake tensors."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.memory.stream import stream_weights
from prfl_fast.models.registry import patch
from prfl_fast.planning.fake_mode import FastFakeTensorMode, WithoutInitialization
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.workload import Workload
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rewards.pooling import QueryAttentionPool, RewardHead
from prfl_fast.training.lora import add_lora
from prfl_fast.utils.collection import no_collection
from prfl_fast.utils.optional import need


def depths_of(
    workload: Workload, layers: int | None = None, reward_layers: int | None = None
) -> list[dict[str, int]]:
    """Return the configuration entries that set the depths of generator and reward models."""
    adapter = adapter_of(workload.config)
    counts = [workload.blocks if layers is None else layers]
    counts += [n if reward_layers is None else reward_layers for n in workload.reward_models]
    return [adapter.depth(workload.config, count) for count in counts]


def build(
    workload: Workload,
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
    *,
    layers: int | None = None,
    reward_layers: int | None = None,
    most: int | None = None,
) -> tuple[nn.Module, list[LatentRewardModel]]:
    """Return generator and frozen reward models on the ``meta`` device, not patched yet.

    ``most`` limits the number of blocks in each list of the models.
    """
    # Keys that the model's class does not take.
    own = ("_", "text_tokens", "boundary_ratio", "class_name")
    config = {k: v for k, v in workload.config.items() if not k.startswith(own)}
    adapter = adapter_of(workload.config)
    with no_collection():
        cls = getattr(need("diffusers"), adapter.class_name)
    depths = [
        {key: count if most is None else min(count, most) for key, count in depth.items()}
        for depth in depths_of(workload, layers, reward_layers)
    ]
    with torch.device("meta"), WithoutInitialization():
        generator = cls(**{**config, **depths[0]}).train()
        backbones = [adapter.backbone_from_config({**config, **depth}) for depth in depths[1:]]
        dim = adapter.hidden_size(generator)
        rewards = [
            LatentRewardModel(backbone, QueryAttentionPool(dim), RewardHead(dim)).freeze()
            for backbone in backbones
        ]
    models: tuple[Any, ...] = (generator, *backbones)
    for model in models:
        model.text_tokens = workload.text_tokens
    # Weights of the meta device cannot wait: stream_models lets them wait later.
    apply_memory(generator, dataclasses.replace(memory, stream_weights=None))
    for reward in rewards:
        apply_memory(reward, dataclasses.replace(reward_memory, stream_weights=None))
    if workload.train == "lora":
        with WithoutInitialization():
            add_lora(generator, workload.lora_rank, target_modules=workload.target_modules)
    return generator, rewards


def materialize(model: nn.Module) -> None:
    """Replace ``meta`` tensors by zeros, which are fake under a ``FakeTensorMode``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(zeros, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


def stream_models(
    generator: nn.Module,
    rewards: Sequence[LatentRewardModel],
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
) -> None:
    """Let the weights of materialized models wait in host memory where the policies say so."""
    frozen = [(reward.backbone, reward_memory) for reward in rewards]
    for model, config in ((generator, memory), *frozen):
        if config.stream_weights is not None:
            stream_weights(model, config.stream_weights)
            activation_checkpointing(model, config.activation_checkpointing, config.offload)


@contextlib.contextmanager
def fake_models(
    workload: Workload,
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
    *,
    layers: int | None = None,
    reward_layers: int | None = None,
    most: int | None = None,
) -> Iterator[tuple[nn.Module, list[LatentRewardModel]]]:
    """Yield the models as fake tensors inside an active ``FakeTensorMode``; see :func:`build`."""
    depths = {"layers": layers, "reward_layers": reward_layers, "most": most}
    generator, rewards = build(workload, memory, reward_memory, **depths)
    with FastFakeTensorMode():
        for model in (generator, *rewards):
            materialize(model)
        if workload.patched:
            patch(generator)
            for reward in rewards:
                patch(reward.backbone)
        stream_models(generator, rewards, memory, reward_memory)
        yield generator, rewards
