"""Divergence of a model with low-rank adapters from the same model without them.

A divergence loss limits reward hacking and needs no second model. In the small world it lowers the
relative change of the velocity by training from 0.135 to 0.116 (bench/RESULTS.md).
"""

import contextlib
from collections.abc import Iterator

from torch import nn

# Attribute of every peft layer, and of its modules_to_save.
_SWITCH = "_disable_adapters"
# Prefixes of the modules that peft layers wrap.
_BASES = ("base_layer.", "original_module.")


def check_adapters(model: nn.Module) -> None:
    """Raise ``ValueError`` unless switching the adapters off restores the initial model."""
    layers = [module for module in model.modules() if hasattr(module, _SWITCH)]
    problem = ""
    if not layers:
        problem = "there are none: add LoRA layers (prfl_fast.training.lora.add_lora)"
    if any(getattr(layer, "merged", False) for layer in layers):
        problem = "they are merged into the weights: unmerge them"
    if problem:
        raise ValueError(f"divergence needs adapters to switch off, but {problem}, or set it to 0")
    switched = {
        parameter
        for layer in layers
        for name, parameter in layer.named_parameters()
        if not name.startswith(_BASES)
    }
    # With another trainable parameter, the model without adapters would change as well.
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in switched:
            raise ValueError(
                f"divergence is the distance from the model without adapters, but {name} trains "
                "too and is not part of an adapter. Freeze it, or set divergence to 0"
            )


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch adapters off within the context, without changing ``requires_grad`` as peft does."""
    layers = [module for module in model.modules() if hasattr(module, _SWITCH)]
    before = [getattr(layer, _SWITCH) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, _SWITCH, True)
        yield
    finally:
        for layer, switch in zip(layers, before, strict=True):
            setattr(layer, _SWITCH, switch)
