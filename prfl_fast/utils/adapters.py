"""Read the adapters that peft puts into a model: their parameters, and the scale of each layer."""

from collections.abc import Iterator
from typing import Any

from torch import nn


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
