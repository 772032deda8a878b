"""Build generator and reward model of a workload: without data, then with zeros or fake tensors."""

import contextlib
import dataclasses
from collections.abc import Iterator
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
    """Return the configuration entries that set the depths of generator and reward model."""
    adapter = adapter_of(workload.config)
    return [
        adapter.depth(workload.config, workload.blocks if layers is None else layers),
        adapter.depth(
            workload.config, workload.reward_blocks if reward_layers is None else reward_layers
        ),
    ]


def build(
    workload: Workload,
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
    *,
    layers: int | None = None,
    reward_layers: int | None = None,
    most: int | None = None,
) -> tuple[nn.Module, LatentRewardModel]:
    """Return generator and frozen reward model on the ``meta`` device, not patched yet.

    ``most`` limits the number of blocks in each list of both models.
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
        backbone = adapter.backbone_from_config({**config, **depths[1]})
        dim = adapter.hidden_size(backbone)
        reward = LatentRewardModel(backbone, QueryAttentionPool(dim), RewardHead(dim)).freeze()
    both: tuple[Any, ...] = (generator, backbone)
    for model in both:
        model.text_tokens = workload.text_tokens
    # Weights of the meta device cannot wait: stream_models lets them wait later.
    apply_memory(generator, dataclasses.replace(memory, stream_weights=None))
    apply_memory(reward, dataclasses.replace(reward_memory, stream_weights=None))
    if workload.train == "lora":
        with WithoutInitialization():
            add_lora(generator, workload.lora_rank, target_modules=workload.target_modules)
    return generator, reward


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
    reward: LatentRewardModel,
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
) -> None:
    """Let the weights of materialized models wait in host memory where the policies say so."""
    for model, config in ((generator, memory), (reward.backbone, reward_memory)):
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
) -> Iterator[tuple[nn.Module, LatentRewardModel]]:
    """Yield both models as fake tensors inside an active ``FakeTensorMode``; see :func:`build`."""
    depths = {"layers": layers, "reward_layers": reward_layers, "most": most}
    generator, reward = build(workload, memory, reward_memory, **depths)
    with FastFakeTensorMode():
        for model in (generator, reward):
            materialize(model)
        if workload.patched:
            patch(generator)
            patch(reward.backbone)
        stream_models(generator, reward, memory, reward_memory)
        yield generator, reward
