"""Add low-rank adapters (LoRA, arXiv 2106.09685) to a transformer through peft, and merge them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.memory.host_weights import is_torchao
from prfl_fast.memory.quantized import QuantizedLinear
from prfl_fast.models.experts import NAMES, Experts, check_members
from prfl_fast.models.official import WanOfficialAdapter
from prfl_fast.training.model_files import adapter_name, without_function
from prfl_fast.utils.checks import check, check_count, check_number, plain
from prfl_fast.utils.modules import device_of
from prfl_fast.utils.optional import need
from prfl_fast.utils.sharded import whole_shapes

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
# Layers that peft adapts; quantized ones are subclasses of nn.Linear.
_LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OFFICIAL_TARGETS = ("q", "k", "v", "o")  # the same layers in the official Wan layout


def add_lora(
    model: nn.Module,
    lora_rank: int,
    lora_alpha: float | None = None,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
) -> None:
    """Freeze a transformer and add trainable low-rank adapters, in place.

    Adapters are float32 on float32 layers and bfloat16 on all others, quantized ones included.
    Those of a sharded model are whole on each rank, and start with the first rank's values after
    :func:`prfl_fast.parallel.broadcast_weights`.

    Args:
        model: a transformer without adapters, patched or not; of two experts, both get adapters.
        lora_rank: rank of each adapter's two matrices.
        lora_alpha: adapters are scaled by ``lora_alpha / lora_rank``; None means ``lora_rank``.
        target_modules: suffixes of the names of the linear layers that receive an adapter. The
            default are the attentions' layers, in the official Wan layout ``q``, ``k``, ``v``,
            ``o``.

    Raises:
        ValueError: if no layer or another kind of module matches ``target_modules``, the rank is
            not positive, or the model already has an adapter. Nothing is changed then.
        MissingExtraError: if peft is not installed.
    """
    lora_rank, lora_alpha = plain(lora_rank), plain(lora_alpha)
    check_count("lora_rank", lora_rank)
    if lora_alpha is not None:
        check_number("lora_alpha", lora_alpha)
    check_members(model, lambda each: _check_targets(each, target_modules))
    if isinstance(model, Experts):
        for expert in NAMES:  # on the device, where the adapters stay
            _add(model.use(expert), lora_rank, lora_alpha, target_modules)
    else:
        _add(model, lora_rank, lora_alpha, target_modules)


def _own_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the targets, those of the official Wan layout in place of the default."""
    official = tuple(targets) == DEFAULT_TARGETS and WanOfficialAdapter().matches(model)
    return list(_OFFICIAL_TARGETS if official else targets)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    """Raise the errors of :func:`add_lora` for one transformer, and change nothing."""
    need("peft")
    model = without_function(model)
    name = adapter_name(model)
    check(name is None, "model's adapter", name, "a model without one", hint="Delete it first")
    # Names match as in peft, which checks each layer only when it changes it.
    ends = tuple(f".{target}" for target in _own_targets(model, targets))
    found = {name: layer for name, layer in model.named_modules() if f".{name}".endswith(ends)}
    check(bool(found), "target_modules", targets, "suffixes of names of the model's linear layers")
    for name, layer in found.items():
        kind = type(layer).__name__
        check(isinstance(layer, _LAYERS), f"{name} of target_modules", kind, "a linear layer")


def _add(
    model: nn.Module, lora_rank: int, lora_alpha: float | None, target_modules: Sequence[str]
) -> None:
    model = without_function(model)
    peft = need("peft")
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=lora_rank,
        lora_alpha=lora_rank if lora_alpha is None else lora_alpha,
        target_modules=_own_targets(model, target_modules),
    )
    with whole_shapes(model):  # of sharded weights peft would read the shape of this rank's part
        if hasattr(model, "add_adapter"):
            model.add_adapter(config)  # type: ignore[operator]
        else:
            peft.inject_adapter_in_model(config, model)
    # peft creates adapters in float32 or in the layer's dtype, depending on the function called,
    # and on the layer's device, which is the host for streamed weights.
    device = device_of(model)
    for layer in model.modules():
        base: Any = getattr(layer, "base_layer", None)
        if base is not None:
            dtype = torch.bfloat16 if base.weight.dtype.itemsize < 4 else None
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device, dtype)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapter to the weights of a transformer and remove it, in place.

    Sums are float32 and rounded once to the dtype of the weights. Of two experts, both are merged.

    Raises:
        ValueError: if the model has no adapter, or one on a quantized layer.
    """
    for member in check_members(model, _check_mergeable):
        bare: Any = without_function(member)
        layers: list[tuple[str, Any]] = [*bare.named_modules()]
        for name, layer in layers:
            if hasattr(layer, "base_layer"):
                for matrix in (layer.lora_A, layer.lora_B):
                    # In bfloat16 the product would be rounded. Streamed weights are on the host.
                    matrix.to(layer.base_layer.weight.device, torch.float32)
                layer.merge()
                bare.set_submodule(name, layer.base_layer)
        del bare.peft_config
        if hasattr(bare, "_hf_peft_config_loaded"):  # of diffusers
            bare._hf_peft_config_loaded = False


def _check_mergeable(model: nn.Module) -> None:
    bare = without_function(model)
    check(bool(getattr(bare, "peft_config", None)), "model's adapter", None, "one to merge")
    for name, layer in bare.named_modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, QuantizedLinear) or is_torchao(getattr(base, "weight", None)):
            raise ValueError(
                f"the weight of {name} is quantized, expected a plain matrix to merge into. Load "
                "the model in bfloat16 with its adapter, merge there, then quantize it"
            )
