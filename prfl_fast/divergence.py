"""How far low-rank adapters have moved a model: its velocity with and without them.

The guard against reward hacking that needs no second model: with adapters, the initial model is the
same one with them switched off.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

# Of every peft layer, and of its modules_to_save.
_SWITCH = "_disable_adapters"
# What they wrap.
_BASES = ("base_layer.", "original_module.")


def check_adapters(model: nn.Module) -> None:
    """Raise ``ValueError`` unless switching adapters off gives the model back that training began
    with: there are some, nothing else trains, and none is merged into the weights.
    """
    layers = [module for module in model.modules() if hasattr(module, _SWITCH)]
    if not layers:
        raise ValueError(
            "divergence needs adapters to switch off, and there are none: add LoRA layers "
            "(prfl_fast.trainer.add_lora), or set it to 0"
        )
    switched = set()
    for layer in layers:
        if getattr(layer, "merged", False):
            raise ValueError(
                "divergence needs adapters to switch off, but they are merged into the weights: "
                "unmerge them"
            )
        for name, parameter in layer.named_parameters():
            if not name.startswith(_BASES):
                switched.add(parameter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in switched:
            raise ValueError(
                f"divergence is the distance from the model without adapters, but {name} trains "
                "too and is no part of one: freeze it, or set divergence to 0"
            )


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within, peft layers compute what they computed before they were added.

    Unlike peft's own switch it leaves ``requires_grad`` alone, which a graph in the making needs.
    """
    layers = [module for module in model.modules() if hasattr(module, _SWITCH)]
    before = [getattr(layer, _SWITCH) for layer in layers]
    try:
        for layer in layers:
            setattr(layer, _SWITCH, True)
        yield
    finally:
        for layer, switch in zip(layers, before, strict=True):
            setattr(layer, _SWITCH, switch)
