"""Add low-rank adapters (LoRA, arXiv 2106.09685) to a transformer through peft, and merge them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.models.experts import NAMES, Experts
from prfl_fast.models.official import WanOfficialAdapter
from prfl_fast.training.model_files import adapter_name, without_function
from prfl_fast.utils.checks import check, plain
from prfl_fast.utils.modules import device_of
from prfl_fast.utils.optional import need
from prfl_fast.utils.sharded import whole_shapes

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
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
        ValueError: if no layer matches ``target_modules``, or the model already has an adapter.
        MissingExtraError: if peft is not installed.
    """
    if isinstance(model, Experts):
        for expert in NAMES:
            _check_bare(getattr(model, expert), f"{expert}'s adapter")
        for expert in NAMES:  # on the device, where the adapters stay
            add_lora(model.use(expert), lora_rank, lora_alpha, target_modules)
        return
    _check_bare(model, "model's adapter")
    model = without_function(model)
    if tuple(target_modules) == DEFAULT_TARGETS and WanOfficialAdapter().matches(model):
        target_modules = _OFFICIAL_TARGETS
    peft = need("peft")
    model.requires_grad_(False)
    config = peft.LoraConfig(
        r=plain(lora_rank),
        lora_alpha=plain(lora_rank if lora_alpha is None else lora_alpha),
        target_modules=list(target_modules),
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


def _check_bare(model: nn.Module, what: str) -> None:
    """Raise ``ValueError`` if a model has an adapter, called ``what`` in the message."""
    name = adapter_name(without_function(model))
    check(name is None, what, name, "a model without one", hint="Delete it first")


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapter to the weights of a transformer and remove it, in place.

    Sums are float32 and rounded once to the dtype of the weights, which must not be quantized.
    """
    bare: Any = without_function(model)
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
