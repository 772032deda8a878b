"""Interface of a model family, through which all other packages use a model."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import pad

from prfl_fast.models.inference import RolloutModel, RolloutOptions
from prfl_fast.utils.checks import check

Conditions = dict[str, torch.Tensor]

# Condition with the clean latents [B, C, 1, H, W] of the first frame (Wan2.2 TI2V). Its tokens have
# time 0. The frame is given, so its velocity is 0 and losses exclude it.
FIRST_FRAME = "first_frame"


class Adapter(Protocol):
    """Declare the methods of a model family; :mod:`prfl_fast.models.wan` is the example.

    Every ``model`` may be wrapped (peft, torch.compile, DistributedDataParallel).
    """

    name: str

    # ``check_<method>`` raises the errors of the method, and changes nothing.
    def matches(self, model: nn.Module) -> bool: ...
    def check_patchable(self, base: Any) -> None: ...
    def patch(self, model: nn.Module) -> None: ...
    def unpatch(self, model: nn.Module) -> None: ...
    def is_patched(self, model: nn.Module) -> bool: ...
    def check_checkpoint_blocks(self, model: nn.Module, on: bool) -> None: ...
    def checkpoint_blocks(
        self, model: nn.Module, run: Callable[..., torch.Tensor] | None
    ) -> None: ...
    def check_chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None: ...
    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None: ...
    def check_shard_sequence(self, model: nn.Module, group: Any) -> None: ...
    def shard_sequence(self, model: nn.Module, group: Any) -> None: ...
    def blocks(self, model: nn.Module) -> nn.ModuleList: ...
    def hidden_size(self, model: nn.Module) -> int: ...
    def embedding_modules(self, model: nn.Module) -> list[nn.Module]: ...
    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = ...
    ) -> None: ...
    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor: ...
    def open_rollout(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        options: RolloutOptions = ...,
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
    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]: ...
    def reference_config(self, model: nn.Module) -> dict[str, Any]: ...


def check_inputs(name: str, x: Any, conditions: Any) -> None:
    """Raise ``ValueError`` unless latents and conditions have the form of every model family.

    ``x`` must be floating-point ``[B, C, F, H, W]``, called ``name`` in error messages, and
    ``conditions`` a dict of tensors ``[B, ...]``.
    """
    ok = isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 5 and x.numel() > 0
    # For other objects the message shows the type, because the repr of a long list fills pages.
    shown = x if isinstance(x, torch.Tensor) else type(x).__name__
    check(ok, name, shown, "a floating-point tensor [B, C, F, H, W]")
    if not isinstance(conditions, dict):
        kind = type(conditions).__name__
        raise ValueError(f"conditions is {kind}, expected a dict of tensors [B, ...]")
    expected = f"a tensor whose first dimension is the batch of {name}, {len(x)}"
    for key, value in conditions.items():
        ok = isinstance(value, torch.Tensor) and value.shape[:1] == x.shape[:1]
        check(ok, f"conditions[{key!r}]", value, expected)
    first = conditions.get(FIRST_FRAME)
    if first is not None:
        batch, channels, frames, height, width = x.shape
        ok = frames > 1 and first.shape == (batch, channels, 1, height, width)
        expected = f"[B, C, 1, H, W] for {name} {list(x.shape)}, which needs two frames or more"
        check(ok, f"conditions[{FIRST_FRAME!r}]", first, expected)


def set_first_frame(x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Return ``x`` with the first frame of ``conditions`` in place of its own, if there is one."""
    first = conditions.get(FIRST_FRAME)
    return x if first is None else torch.cat([first.to(x), x[:, :, 1:]], dim=2)


def zero_first_frame(v: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Return a velocity that is 0 in the first frame, if ``conditions`` give that frame."""
    return pad(v[:, :, 1:], (0, 0, 0, 0, 1, 0)) if FIRST_FRAME in conditions else v


def generated_frames(x: torch.Tensor, conditions: Conditions) -> torch.Tensor:
    """Return the frames of ``x`` that ``conditions`` do not give, as a view."""
    return x[:, :, 1:] if FIRST_FRAME in conditions else x


def not_inference(value: Any) -> Any:
    """Copy a tensor, or the tensors of a dict, if inference mode made them; return other objects.

    Autograd cannot save a tensor of inference mode for the backward.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return value
    if isinstance(value, dict):
        return {key: not_inference(item) for key, item in value.items()}
    inference = isinstance(value, torch.Tensor) and value.is_inference()
    return value.clone() if inference else value


def check_timesteps(timesteps: Sequence[torch.Tensor], batch: int) -> None:
    """Raise ``ValueError`` unless there is a timestep ``[B]`` for every step."""
    check(len(timesteps) > 0, "timesteps", timesteps, "one tensor for each step")
    for index, timestep in enumerate(timesteps):
        matches = isinstance(timestep, torch.Tensor) and timestep.shape == (batch,)
        check(matches, f"timesteps[{index}]", timestep, f"shape [{batch}], the latents' batch")
