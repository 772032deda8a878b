"""A memory policy put into effect: weights, checkpoints and feed-forward chunks of both models."""

import torch

from prfl_fast._extras import need
from prfl_fast.adapters import find_adapter
from prfl_fast.checkpointing import checkpoint
from prfl_fast.config import Memory, RewardMemory
from prfl_fast.quantised import cast_weights
from prfl_fast.reward import LatentRewardModel


def apply_memory(
    transformer: torch.nn.Module | None,
    reward: LatentRewardModel | None,
    memory: Memory,
    *,
    device: torch.device | str | None = None,
) -> None:
    """Give a generator and a frozen reward model the weights, checkpoints and chunks of ``memory``.

    In place, before :func:`prfl_fast.trainer.add_lora` and the optimizer: both take the parameters
    as they are then. The reward's pool and head stay in float32. Policy, offload and chunks can be
    changed by a second call; weights that were narrowed stay as they are, or become narrower.

    Args:
        device: where the models go, one layer at a time, each in its new dtype; None leaves them.

    Raises:
        TypeError: a model is not supported.
        MissingExtra: ``nf4`` without bitsandbytes.
    """
    chunk = memory.feed_forward_chunk
    if transformer is not None:
        cast_weights(transformer, memory.weights, device=device)
        checkpoint(transformer, memory.policy, memory.offload)
        find_adapter(transformer).chunk_feed_forward(transformer, chunk)
    if reward is not None:
        cast_weights(reward.backbone, memory.reward_weights, device=device)
        checkpoint(reward.backbone, memory.reward_policy, memory.reward_offload)
        find_adapter(reward.backbone).chunk_feed_forward(reward.backbone, chunk)
        if device is not None:
            reward.pool.to(device)
            reward.head.to(device)


def check_available(memory: Memory | RewardMemory, device: torch.device) -> None:
    """Refuse, before a model is read, what this machine cannot do.

    Raises:
        ValueError: an optimizer that needs a CUDA device, on another.
        MissingExtra: weights or an optimizer of a package that is not installed.
    """
    if memory.optimizer == "paged-adamw8bit" and device.type != "cuda":
        raise ValueError(
            "memory.optimizer is paged-adamw8bit, which needs a CUDA device, but hardware.device "
            f"is {device}; adamw8bit needs none"
        )
    weights = (memory.weights, getattr(memory, "reward_weights", "fp32"))
    if "nf4" in weights or memory.optimizer == "paged-adamw8bit":
        need("bitsandbytes", "nf4")
    if memory.optimizer in ("adamw-sr", "adamw8bit"):
        need("torchao", "optim")
