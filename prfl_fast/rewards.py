"""What scores latents: the contract of a reward, and what is checked of one."""

from collections.abc import Callable

import torch
from torch import nn

from prfl_fast.adapters import Conditions

# (x [B, C, F, H, W], timestep [B], conditions) → scores [B], higher is better.
Reward = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]


def check_frozen(reward: object) -> None:
    """Raise ``ValueError`` if a reward, a module or a module's method, has trainable parameters."""
    module = reward if isinstance(reward, nn.Module) else getattr(reward, "__self__", None)
    if isinstance(module, nn.Module):
        trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        if trainable:
            raise ValueError(
                f"{type(module).__name__} has {len(trainable)} trainable parameters (first: "
                f"{trainable[0]}), expected none: their gradients would be computed and kept; call "
                "reward.freeze(), or requires_grad_(False) on a plain module"
            )
