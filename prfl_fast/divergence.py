"""How far low-rank adapters have moved a model: its velocity with and without them.

The guard against reward hacking that needs no second model: with adapters, the initial model is the
same one with them switched off.
"""

import contextlib
from collections.abc import Iterator

from torch import nn

# Of every peft layer, and of its modules_to_save.
_SWITCH = "_disable_adapters"


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has peft layers."""
    return any(hasattr(module, _SWITCH) for module in model.modules())


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
