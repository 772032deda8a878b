"""Run the linear layers of a model's blocks in FP8 in training, see :mod:`.fp8_linear`."""

import re
from typing import TypeVar

import torch
from torch import nn

from prfl_fast.kernels.linear.fp8 import unsupported_reason
from prfl_fast.models.block_adapter import unwrap_block
from prfl_fast.models.experts import check_members
from prfl_fast.models.fp8_linear import Fp8Linear
from prfl_fast.models.registry import find_blocks
from prfl_fast.utils.modules import device_of, is_plain_linear

Model = TypeVar("Model", bound=nn.Module)

MULTIPLE = 16  # torch._scaled_mm takes rows and columns in multiples of it
# Layers of a block that are not projections of tokens by attention or feed-forward: those of norms
# make modulation, and gate_logits (LTX-2.3) weighs heads.
_EXACT = re.compile(r"norm|modulation|_mod\b|adaln|gate_logits", re.IGNORECASE)
_LORA = re.compile(r"\blora_")


def check_fp8_linears(device: torch.device, name: str = "model") -> None:
    """Raise ``ValueError`` if a GPU has no FP8 products; other devices emulate them."""
    reason = unsupported_reason(device) if device.type == "cuda" else ""
    if reason:
        raise ValueError(
            f"{name} is on {device}: {reason}, expected a GPU with FP8 products, of compute "
            "capability 8.9 or newer. Train without fp8_linears on this GPU"
        )


def use_fp8_linears(model: Model, use: bool = True) -> Model:
    """Run the linear layers of the transformer blocks in FP8 in training; return the model.

    Attention and feed-forward projections of video and text tokens compute their outputs and the
    gradients of their inputs in FP8, in each call of the model, with or without gradients.
    Gradients of weights, adapters, norms, modulation, embeddings and the head do not change.
    Rollouts (:class:`prfl_fast.rollout.Trajectory`) stay exact, or follow the ``fp8_linears`` of
    their own configuration; :mod:`prfl_fast.sampling` and evaluations stay exact. A reward model
    that is built from the model has such layers too. The gradient differs by several percent, see
    docs/memory.md. A CPU emulates the products, which is slow.

    Args:
        model: a transformer with an adapter or a ``ModuleList`` of blocks, patched or not, or two
            experts; for a reward model, its backbone. It may have LoRA, added before or after.
        use: False restores ``nn.Linear``.

    Raises:
        TypeError: if the model has neither an adapter nor a ``ModuleList``.
        ValueError: if the GPU has no FP8 products, a layer has hooks, a replaced forward or a
            quantized weight, or no layer has rows and columns in multiples of 16.
    """
    for member in check_members(model, _check_usable if use else _layers):
        for layer in _layers(member).values():
            if type(layer) in (nn.Linear, Fp8Linear):
                layer.__class__ = Fp8Linear if use else nn.Linear
    return model


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Return the projections of the blocks that FP8 products can run, by name."""
    blocks = [unwrap_block(block) for block in find_blocks(model).blocks(model)]
    return {
        f"blocks.{index}.{name}": layer
        for index, block in enumerate(blocks)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
        and not (_EXACT.search(name) or _LORA.search(name))
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
    }


def _check_usable(model: nn.Module) -> None:
    """Raise ``ValueError`` if FP8 products do not run on the model's device or all its layers."""
    check_fp8_linears(device_of(model))
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "the blocks of model have no linear layer with rows and columns in multiples of 16, "
            "expected at least one: FP8 products take no other sizes"
        )
    for name, layer in layers.items():
        if not (type(layer) is Fp8Linear or is_plain_linear(layer)):
            raise ValueError(
                f"{name} is a {type(layer).__name__} with hooks, a replaced forward or a quantized "
                "weight, expected a plain nn.Linear. FP8 products quantize bf16 and fp32 weights "
                "themselves: use weight_dtype: bf16"
            )
