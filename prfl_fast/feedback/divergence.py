"""Divergence of a model with low-rank adapters from the same model without those that train.

A divergence loss limits reward hacking and needs no second model. In the small world it lowers the
relative change of the velocity by training from 0.135 to 0.116 (bench/RESULTS.md).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from prfl_fast.utils.adapters import adapter_parameters, trained_adapters

# Attributes of every peft layer, and of its modules_to_save.
_SWITCH, _ACTIVE = "_disable_adapters", "_active_adapter"
# Prefixes of the modules that peft layers wrap.
_BASES = ("base_layer.", "original_module.")


def check_adapters(
    model: nn.Module, what: str = "divergence", instead: str = "set it to 0"
) -> None:
    """Raise ``ValueError`` unless switching the trained adapters off restores the initial model.

    In the message, ``what`` needs the adapters, and ``instead`` is another way out.
    """
    layers = [module for module in model.modules() if hasattr(module, _SWITCH)]
    problem = ""
    if not layers:
        problem = "there are none: add LoRA layers (prfl_fast.training.lora.add_lora)"
    if any(getattr(layer, "merged", False) for layer in layers):
        problem = "they are merged into the weights: unmerge them"
    if problem:
        raise ValueError(f"{what} needs adapters to switch off, but {problem}, or {instead}")
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
                f"{what} compares with the model without adapters, but {name} trains too and is "
                f"not part of an adapter. Freeze it, or {instead}"
            )


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Switch off the adapters that train, without changing ``requires_grad`` as peft does.

    A frozen adapter, such as one that distills the sampler, is part of the initial model.
    """
    frozen = {name for name, _ in adapter_parameters(model)} - set(trained_adapters(model))
    before: list[tuple[nn.Module, Any, Any]] = []
    try:
        for layer in model.modules():
            if not hasattr(layer, _SWITCH):
                continue
            active = getattr(layer, _ACTIVE, None)
            names = [active] if isinstance(active, str) else list(active or ())
            kept = [name for name in names if name in frozen]
            if len(kept) == len(names):
                continue  # no adapter of this layer trains
            before.append((layer, active, getattr(layer, _SWITCH)))
            setattr(layer, _ACTIVE, kept or active)
            setattr(layer, _SWITCH, getattr(layer, _SWITCH) or not kept)
        yield
    finally:
        for layer, active, switch in before:
            setattr(layer, _ACTIVE, active)
            setattr(layer, _SWITCH, switch)
