"""Read the adapters that peft puts into a model: their parameters, and the scale of each layer."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# Prefix in the file of an adapter: the name of the model inside a diffusers pipeline.
PIPELINE_PART = "transformer."
ADAPTER_METADATA = "lora_adapter_metadata"


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the name of the adapter and the parameter, for each parameter of an adapter."""
    for module in model.modules():
        groups = [getattr(module, n, None) for n in getattr(module, "adapter_layer_names", ())]
        # Copies of whole modules, and of whole parameters (older peft), that train beside LoRA.
        groups.append(getattr(module, "modules_to_save", None))
        for group in groups:
            if isinstance(group, nn.ParameterDict):
                yield from group.items()
            elif isinstance(group, nn.ModuleDict):
                for name, part in group.items():
                    yield from ((name, parameter) for parameter in part.parameters())


def trained_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that have a parameter to train, sorted."""
    return sorted({name for name, p in adapter_parameters(model) if p.requires_grad})


def adapter_scales(model: nn.Module, name: str) -> dict[str, float]:
    """Return the factor of an adapter's product in each layer that has it, by the layer's name."""
    scales: dict[str, float] = {}
    for layer, module in model.named_modules():
        factors: Any = getattr(module, "scaling", None)
        if isinstance(factors, dict) and name in factors:
            scales[layer.removeprefix("base_model.model.")] = float(factors[name])
    return scales


def pattern_value(settings: Mapping[str, Any], kind: str, layer: str) -> float:
    """Return rank or alpha of one layer, as peft reads ``rank_pattern`` and ``alpha_pattern``."""
    for pattern, value in (settings.get(f"{kind}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return float(value)
    return float(settings["r" if kind == "rank" else alpha_key(settings)])


def alpha_key(settings: Mapping[str, Any]) -> str:
    """Return the key of alpha in the settings of an adapter."""
    return "lora_alpha" if "lora_alpha" in settings else "alpha"


def scale_of(settings: Mapping[str, Any], layer: str) -> float:
    """Return the scale of one layer by the settings of its adapter."""
    rank = pattern_value(settings, "rank", layer)
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    return pattern_value(settings, "alpha", layer) / divisor
