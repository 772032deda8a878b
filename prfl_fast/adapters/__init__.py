"""Model families: which submodule plays which part. The only place that knows foreign class
names.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from prfl_fast.adapters.wan_diffusers import WanDiffusersAdapter
from prfl_fast.rollout_block import RolloutModel

Conditions = dict[str, torch.Tensor]


class Adapter(Protocol):
    """What the rest of prfl_fast needs to know about a model family.

    ``model`` may be wrapped (peft, torch.compile, DistributedDataParallel) wherever it appears.
    """

    name: str

    def matches(self, model: nn.Module) -> bool: ...
    def patch(self, model: nn.Module) -> None: ...
    def unpatch(self, model: nn.Module) -> None: ...
    def checkpoint_blocks(
        self, model: nn.Module, run: Callable[..., torch.Tensor] | None
    ) -> None: ...
    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None: ...
    def blocks(self, model: nn.Module) -> nn.ModuleList: ...
    def hidden_size(self, model: nn.Module) -> int: ...
    def embedding_modules(self, model: nn.Module) -> list[nn.Module]: ...
    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor: ...
    def open_rollout(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        *,
        merge_lora: bool = False,
        compile: bool = False,
    ) -> RolloutModel: ...
    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        num_blocks: int,
    ) -> torch.Tensor: ...
    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module: ...
    def backbone_config(self, model: nn.Module) -> dict[str, Any]: ...
    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module: ...
    def check_latents(self, model: nn.Module, x: torch.Tensor, conditions: Conditions) -> None: ...
    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def reference_config(self, model: nn.Module) -> dict[str, Any]: ...


ADAPTERS: tuple[Adapter, ...] = (WanDiffusersAdapter(),)


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model.

    Raises:
        TypeError: no adapter knows the model; the message lists what is supported.
    """
    for adapter in ADAPTERS:
        if isinstance(model, nn.Module) and adapter.matches(model):
            return adapter
    known = ", ".join(adapter.name for adapter in ADAPTERS)
    raise TypeError(
        f"prfl_fast does not know {type(model).__module__}.{type(model).__qualname__}; "
        f"supported: {known}. For other models, build from prfl_fast.modules"
    )


def adapter_by_name(name: str) -> Adapter:
    """The adapter a saved configuration names.

    Raises:
        ValueError: an unknown name.
    """
    for adapter in ADAPTERS:
        if adapter.name == name:
            return adapter
    raise ValueError(f"adapter is {name!r}, expected one of {', '.join(a.name for a in ADAPTERS)}")
