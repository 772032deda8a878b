"""Memory policy of one model: weight dtype, activation checkpointing, offload, optimizer."""

import typing
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn

from prfl_fast.memory.checkpointing import activation_checkpointing, check_checkpointing
from prfl_fast.memory.experts import ExpertSwap, check_exchange
from prfl_fast.memory.optimizers import GRADIENT_DTYPES, KINDS, GradientDtype, OptimizerKind
from prfl_fast.memory.quantized import WeightDtype, cast_weights, check_cast
from prfl_fast.memory.stream import check_streaming, stream_weights
from prfl_fast.models.experts import Experts, check_members
from prfl_fast.models.registry import find_blocks
from prfl_fast.utils.checks import check, check_choice, check_count, make_fields_plain
from prfl_fast.utils.modules import device_of
from prfl_fast.utils.optional import need

ActivationCheckpointing = Literal["none", "full", "attention"]
Offload = Literal["cpu"]


@dataclass(frozen=True)
class MemoryConfig:
    """Configure the memory policy of one model, trained or frozen.

    Attributes:
        weight_dtype: dtype of the weights. ``fp32`` weights can train under autocast; the others
            compute in bfloat16. ``fp8`` and ``nf4`` quantize the linear layers of the blocks, which
            then train through LoRA only.
        activation_checkpointing: ``none``, ``full`` or ``attention``, see
            :mod:`prfl_fast.memory.checkpointing`.
        offload: ``cpu`` keeps saved activations in host memory; None keeps them on the device.
        feed_forward_chunk: tokens per pass through a feed-forward layer; None runs all at once.
        optimizer: one of :data:`prfl_fast.memory.optimizers.KINDS`; a frozen model ignores it.
        gradient_dtype: dtype in which gradients accumulate: the parameter's own, or float32.
        stream_weights: the weights of blocks wait in host memory, and this many blocks are copied
            to the device ahead of the one that runs, see :mod:`prfl_fast.memory.stream`; None keeps
            all weights on the device.

    Raises:
        ValueError: if a field is not one of its choices, or ``feed_forward_chunk`` or
            ``stream_weights`` is not a positive integer.
    """

    weight_dtype: WeightDtype = "fp32"
    activation_checkpointing: ActivationCheckpointing = "none"
    offload: Offload | None = None
    feed_forward_chunk: int | None = None
    optimizer: OptimizerKind = "adamw"
    gradient_dtype: GradientDtype = "parameter"
    stream_weights: int | None = None

    # A resumed run may change these fields. They do not change results, except that chunks sum the
    # weight gradients in another order.
    FREE: ClassVar[tuple[str, ...]] = (
        "activation_checkpointing",
        "offload",
        "feed_forward_chunk",
        "stream_weights",
    )

    def __post_init__(self) -> None:
        make_fields_plain(self)
        check_choice("weight_dtype", self.weight_dtype, typing.get_args(WeightDtype))
        check_choice(
            "activation_checkpointing",
            self.activation_checkpointing,
            typing.get_args(ActivationCheckpointing),
        )
        check_choice("offload", self.offload, (None, "cpu"))
        if self.feed_forward_chunk is not None:
            check_count("feed_forward_chunk", self.feed_forward_chunk)
        if self.stream_weights is not None:
            check_count("stream_weights", self.stream_weights)
        check_choice("optimizer", self.optimizer, KINDS)
        check_choice("gradient_dtype", self.gradient_dtype, GRADIENT_DTYPES)


def apply_memory(
    module: nn.Module, config: MemoryConfig, *, device: torch.device | str | None = None
) -> None:
    """Set weight dtype, activation checkpointing, offload and feed-forward chunks of one model.

    Call this function before :func:`prfl_fast.training.add_lora` and before the optimizer is made,
    because both read the parameters. A second call cannot restore quantized weights.

    Args:
        module: a supported transformer, or a reward model with such a transformer as its
            ``backbone``. The other children of a reward model keep their dtype. Of two experts one
            is on ``device`` at a time, see :mod:`prfl_fast.memory.experts`; with ``stream_weights``
            both are there, except for their blocks.
        config: the policy. Its ``optimizer`` and ``gradient_dtype`` are not applied here, but by
            :func:`prfl_fast.memory.make_optimizer`.
        device: target of the model, which moves layer by layer, each layer in its new dtype; None
            does not move it.

    Raises:
        TypeError: if the model has neither an adapter nor a ``ModuleList``.
        ValueError: if the weights are already quantized to another dtype, ``stream_weights``
            meets a weight of a tensor subclass that is not a frozen one of torchao, blocks or
            feed-forwards have replaced forwards, or experts that would take turns on the device
            differ in the layouts of their tensors or share parameters. Nothing is changed then.
        MissingExtraError: if ``nf4`` needs bitsandbytes and it is not installed.
    """
    if device is not None:
        torch.empty(0, device=device)  # raises if there is no such device
    experts = check_members(module, partial(_check_policy, config=config))
    if not isinstance(module, Experts):
        _apply(module, config, device)
        return
    streams = config.stream_weights is not None
    exchanged = device is not None and not streams
    if exchanged:
        check_exchange(module, config.weight_dtype)
    if device is not None or streams:
        module.swap = None  # of an earlier call
    if exchanged:
        module.swap = ExpertSwap(module, partial(_apply, config=config, device=device))
    else:
        for expert in experts:
            _apply(expert, config, device)


def _transformer_of(module: nn.Module) -> nn.Module:
    backbone = getattr(module, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else module


def _check_policy(module: nn.Module, config: MemoryConfig) -> None:
    """Raise the errors of :func:`apply_memory` for one model, and change nothing."""
    transformer, streams = _transformer_of(module), config.stream_weights
    check_cast(transformer, config.weight_dtype)
    check_streaming(transformer, streams)
    modes = config.activation_checkpointing, config.offload
    check_checkpointing(transformer, *modes, streamed=streams is not None)
    find_blocks(transformer).check_chunk_feed_forward(transformer, config.feed_forward_chunk)


def _apply(module: nn.Module, config: MemoryConfig, device: torch.device | str | None) -> None:
    transformer, streams = _transformer_of(module), config.stream_weights
    home = device_of(transformer) if device is None else device
    stream_weights(transformer, None)
    # Weights come first, because they move to the device layer by layer, already narrow.
    cast_weights(transformer, config.weight_dtype, device=device, stay=streams is not None)
    stream_weights(transformer, streams, home)
    activation_checkpointing(transformer, config.activation_checkpointing, config.offload)
    # 8192 tokens at a time lower the simulated peak of 14B at 720p from 49.0 to 46.1 GiB (mode
    # full, offloaded) for 1.6 % more FLOPs (bench/RESULTS.md).
    find_blocks(transformer).chunk_feed_forward(transformer, config.feed_forward_chunk)
    if device is not None:
        for child in module.children() if transformer is not module else ():
            if child is not transformer:
                child.to(device)


def check_compatible(
    config: MemoryConfig, *, train: str | None, precision: str = "bf16", name: str = "memory"
) -> None:
    """Check that weights, optimizer and kind of training (None: frozen) are compatible.

    Raises:
        ValueError: for narrow weights under ``precision="fp32"``, quantized weights that train in
            full, ``paged-adamw8bit`` of other than float32 weights, or an optimizer of a frozen
            model. The message puts ``name`` before each field.
    """
    weights = config.weight_dtype
    check(
        weights == "fp32" or precision == "bf16",
        f"{name}.weight_dtype",
        weights,
        "fp32 with hardware.precision: fp32",
        hint="These weights compute in bfloat16: set hardware.precision: bf16",
    )
    if train is None:
        default = (config.optimizer, config.gradient_dtype) == ("adamw", "parameter")
        given = f"{config.optimizer} with {config.gradient_dtype} gradients"
        check(default, f"{name}.optimizer", given, "none: the model is frozen")
        return
    check(
        train == "lora" or weights in ("fp32", "bf16"),
        f"{name}.weight_dtype",
        weights,
        "fp32 or bf16 without LoRA",
        hint="Quantized weights cannot train: add a lora section, or choose bf16",
    )
    check(
        train == "lora" or config.stream_weights is None or config.optimizer == "adamw-cpu",
        f"{name}.stream_weights",
        config.stream_weights,
        f"null without LoRA and with {name}.optimizer: {config.optimizer}",
        hint="Weights in host memory train with adamw-cpu",
    )
    check(
        config.optimizer != "paged-adamw8bit" or weights == "fp32",
        f"{name}.optimizer",
        config.optimizer,
        f"another one with {name}.weight_dtype: {weights}",
        hint="paged-adamw8bit trains fp32 weights only; adamw8bit trains all",
    )


def check_available(config: MemoryConfig, device: torch.device) -> None:
    """Check that the machine has the device and packages that a policy needs."""
    paged = config.optimizer == "paged-adamw8bit"
    check(
        not paged or device.type == "cuda",
        "optimizer",
        config.optimizer,
        f"another one on device {device}",
        hint="paged-adamw8bit needs a CUDA device; adamw8bit needs none",
    )
    if paged or config.weight_dtype == "nf4":
        need("bitsandbytes", "nf4")
    if config.optimizer in ("adamw-sr", "adamw8bit"):
        need("torchao", "optim")
