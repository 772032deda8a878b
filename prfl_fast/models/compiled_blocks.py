"""Compile transformer blocks one by one where the GPU waits for the host.

Compiled blocks launch fewer kernels and skip most Python code, and round differently. They save
time with small models and short clips, so ``auto`` measures the second call of the model: if the
GPU takes hardly longer than the host, it waits for launches. No GPU has run this yet; on a CPU the
tests run it with injected times. CUDA graphs are not used: they copy every input that is not at the
same address as before, and keep the memory of each recorded shape.
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from prfl_fast.models.block_adapter import unwrap_block
from prfl_fast.models.block_timer import (
    WAITING,
    BlockTimer,
    TimedCall,
    describe_ratio,
)
from prfl_fast.models.compiler_errors import is_compiler_error
from prfl_fast.models.experts import Experts, check_members
from prfl_fast.models.registry import find_blocks
from prfl_fast.utils.checks import check_choice, reason_of
from prfl_fast.utils.modules import STREAMED, device_of, unwrap

Model = TypeVar("Model", bound=nn.Module)
Mode = Literal["auto", "on", "off"]
MODES = ("auto", "on", "off")
# A graph made by eager blocks must not recompute them compiled: they would save other tensors.
_RECOMPUTED = "activation checkpointing or offload runs them"
_log = logging.getLogger(__name__)


class _CompiledCall:
    """Call a compiled block, or its class if the compiler fails."""

    def __init__(self, choice: "_Choice", block: nn.Module) -> None:
        self.choice, self.block = choice, block
        self.compiled = torch.compile(block._call_impl, backend=choice.backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.compiled(*args, **kwargs)
        except RuntimeError as error:
            if not self.choice.optional or not is_compiler_error(error):
                raise
            _log.warning("blocks are not compiled: %s: %s", type(error).__name__, reason_of(error))
            _clear(self.choice.blocks)
            return self.block(*args, **kwargs)


def _clear(blocks: Sequence[Any]) -> None:
    for block in blocks:
        if isinstance(block._compiled_call_impl, (TimedCall, _CompiledCall)):
            block._compiled_call_impl = None


class _Choice:
    """Hold the blocks of one model, and compile them or not."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[Any], mode: Mode, backend: Any, timer: BlockTimer
    ) -> None:
        self.model, self.blocks, self.backend, self.timer = model, blocks, backend, timer
        self.optional = mode == "auto"
        if mode == "on":
            self.compile()
            return
        for index, block in enumerate(blocks):
            block._compiled_call_impl = TimedCall(timer, self.decide, blocks, index)

    def compile(self) -> None:
        calls = [_CompiledCall(self, block) for block in self.blocks]  # all, or an error
        for block, call in zip(self.blocks, calls, strict=True):
            block._compiled_call_impl = call

    def decide(self) -> bool:
        """Return True if the times are known; then the blocks are compiled or called as before."""
        if torch._C._current_graph_task_id() != -1:  # a recompute of blocks that ran eagerly
            return False
        ratio = self.timer.ratio()
        if ratio is None:
            return False
        _clear(self.blocks)
        reason = _why_not(self.model, self.blocks)  # the model may have changed since it was asked
        if reason is None and ratio >= WAITING:
            self.compile()
            _log.info("blocks are compiled: %s", describe_ratio(ratio))
        else:
            _log.info("blocks are not compiled: %s", reason or describe_ratio(ratio))
        return True


def are_compiled(model: nn.Module) -> bool:
    """Return True if :func:`compile_blocks` has compiled the blocks of a model."""
    return any(isinstance(m._compiled_call_impl, _CompiledCall) for m in model.modules())


def _why_not(model: nn.Module, blocks: Sequence[Any]) -> str | None:
    """Return the reason against compiling blocks that needs no times; None if there is none.

    Compiled code has hooks built in, and cannot follow weights that are moved or dequantized.
    """
    device = device_of(model)
    if device.type != "cuda":
        return f"the model is on {device}, where launches cost little"
    if getattr(unwrap(model), "gradient_checkpointing", False) is True:
        return _RECOMPUTED
    reasons = (_why_not_block(block) for block in blocks)
    return next((reason for reason in reasons if reason), None)


def _why_not_block(block: Any) -> str | None:
    bare, runner = unwrap_block(block), block.__dict__.get("block_runner")
    if block._compiled_call_impl is not None or hasattr(block, "_orig_mod"):
        return "they are compiled already"
    if bare is not block:
        return "they are wrapped by FSDP or checkpointing"
    if STREAMED in bare.__dict__:
        return "their weights are streamed from host memory"
    if runner is not None:
        return _RECOMPUTED
    for name, module in block.named_modules():
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return f"{name or 'a block'} has hooks"
        if hasattr(module, "qweight"):
            return "their weights are quantized"
    if any(type(p) is not nn.Parameter for p in block.parameters()):
        return "their weights are sharded or quantized"
    return None


def compile_blocks(
    model: Model,
    mode: Mode = "auto",
    *,
    backend: Any = "inductor",
    timer: BlockTimer | None = None,
) -> Model:
    """Compile each transformer block with ``torch.compile`` in place; return the model.

    Call this function last, after memory policy, LoRA and patching. Each call replaces the setting
    of the previous call. Rollouts compile their own function of a block, see
    :class:`prfl_fast.rollout.RolloutConfig`.

    Args:
        model: a transformer, wrapped or not, with an adapter or a ``ModuleList`` of blocks.
        mode: ``auto`` compiles on a CUDA device if the device waits for the host, and logs the
            ratio of their times, or the reason against it; ``on`` compiles; ``off`` does not.
        backend: backend of ``torch.compile``.
        timer: measures the times for ``auto``.

    Raises:
        TypeError: if the model has neither an adapter nor a ``ModuleList``.
        ValueError: if ``mode`` or a backend's name is unknown.
    """
    check_choice("mode", mode, MODES)
    if backend != "inductor" and not callable(backend):  # the list imports the compiler
        check_choice("backend", backend, torch.compiler.list_backends(exclude_tags=()))
    if isinstance(model, Experts):
        for expert in check_members(model, lambda each: find_blocks(each).blocks(each)):
            compile_blocks(expert, mode, backend=backend)
        return model
    blocks = list(find_blocks(model).blocks(model))
    _clear(blocks)
    reason = _why_not(model, blocks) if mode == "auto" else None
    if reason is not None:
        level = logging.DEBUG if device_of(model).type == "cpu" else logging.INFO
        _log.log(level, "blocks are not compiled: %s", reason)
    elif mode != "off":
        _Choice(model, blocks, mode, backend, timer or BlockTimer())
    return model
