"""Build the models of a workload: without data, then with zeros or as fake tensors."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.memory.stream import stream_weights
from prfl_fast.models.fp8_blocks import use_fp8_linears
from prfl_fast.models.registry import patch
from prfl_fast.planning.fake_mode import FastFakeTensorMode, WithoutInitialization
from prfl_fast.planning.fake_ranks import OwnChunks
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
    """Return the trained model and frozen reward models on the ``meta`` device, not patched yet.

    ``most`` limits the number of blocks in each list of the models.
    """
    cls, config = _class_of(workload)
    adapter = adapter_of(workload.config)
    depths = [_at_most(most, depth) for depth in depths_of(workload, layers, reward_layers)]
    with torch.device("meta"), WithoutInitialization():
        if workload.reward_loss is None:
            trained = cls(**{**config, **depths[0]}).train()
        else:
            trained = _reward_model(adapter, {**config, **depths[0]})
        rewards = [_reward_model(adapter, {**config, **depth}).freeze() for depth in depths[1:]]
    for model in (trained, *rewards):
        transformer_of(model).text_tokens = workload.text_tokens
    # Weights on the meta device cannot be streamed: stream_models does it later.
    apply_memory(trained, dataclasses.replace(memory, stream_weights=None))
    use_fp8_linears(transformer_of(trained), workload.fp8_linears)
    for reward in rewards:
        apply_memory(reward, dataclasses.replace(reward_memory, stream_weights=None))
    if workload.train == "lora":
        transformer, targets = transformer_of(trained), workload.target_modules
        with WithoutInitialization():
            add_lora(transformer, workload.lora_rank, target_modules=targets)
    return trained, rewards


def frozen_copy(
    workload: Workload, memory: MemoryConfig, *, layers: int | None = None, most: int | None = None
) -> nn.Module | None:
    """Return the frozen copy that is the reference of ``dpo``, of zeros; None without a copy.

    It is whole and on the device under every policy and layout of the trained model.
    """
    if not workload.has_reference:
        return None
    cls, config = _class_of(workload)
    depth = _at_most(most, depths_of(workload, layers)[0])
    with _disable_current_modes():
        with torch.device("meta"), WithoutInitialization():
            copy: Any = cls(**{**config, **depth}).requires_grad_(False)
        copy.text_tokens = workload.text_tokens
        apply_memory(copy, MemoryConfig(weight_dtype=memory.weight_dtype))
        use_fp8_linears(copy, workload.fp8_linears)
    materialize(copy)
    return patch(copy) if workload.patched else copy


def _class_of(workload: Workload) -> tuple[Any, dict[str, Any]]:
    """Return the class of a workload's transformer and the configuration that it takes."""
    own = ("_", "text_tokens", "boundary_ratio", "class_name")  # keys that it does not take
    config = {k: v for k, v in workload.config.items() if not k.startswith(own)}
    with no_collection():
        return getattr(need("diffusers"), adapter_of(workload.config).class_name), config


def _at_most(most: int | None, depth: dict[str, int]) -> dict[str, int]:
    return {key: count if most is None else min(count, most) for key, count in depth.items()}


def _reward_model(adapter: Any, config: dict[str, Any]) -> LatentRewardModel:
    backbone = adapter.backbone_from_config(config)
    dim = adapter.hidden_size(backbone)
    return LatentRewardModel(backbone, QueryAttentionPool(dim), RewardHead(dim))


def transformer_of(model: nn.Module) -> Any:
    """Return the transformer of a generator or reward model."""
    return model.backbone if isinstance(model, LatentRewardModel) else model


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
    trained: nn.Module,
    rewards: Sequence[LatentRewardModel],
    memory: MemoryConfig,
    reward_memory: MemoryConfig,
) -> None:
    """Move block weights of materialized models to host memory where their policies stream them."""
    frozen = [(reward, reward_memory) for reward in rewards]
    for owner, config in ((trained, memory), *frozen):
        model = transformer_of(owner)
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
    mesh: DeviceMesh | None = None,
) -> Iterator[tuple[nn.Module, list[LatentRewardModel]]]:
    """Yield the models as fake tensors inside an active ``FakeTensorMode``; see :func:`build`.

    With a ``mesh`` they are the part of one rank.
    """
    depths = {"layers": layers, "reward_layers": reward_layers, "most": most}
    trained, rewards = build(workload, memory, reward_memory, **depths)
    with FastFakeTensorMode():
        for model in (trained, *rewards):
            materialize(model)
            if workload.patched:
                patch(transformer_of(model))
        stream_models(trained, rewards, memory, reward_memory)
        for model in (trained, *rewards) if mesh is not None else ():
            # Importing FSDP2 takes a second, which a plan of one GPU need not wait for.
            from prfl_fast.parallel.distribution import distribute

            policy = memory if model is trained else reward_memory
            with OwnChunks():
                distribute(model, mesh, workload.parallel, policy, workload.precision)
        yield trained, rewards
