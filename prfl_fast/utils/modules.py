"""Find the bare model inside the wrappers that trainers put around it."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def layers_of(model: Any) -> Iterator[Any]:
    """Yield ``model`` and each model inside its wrappers, the bare one last.

    The known wrappers are torch.compile, DistributedDataParallel, DataParallel and peft.
    """
    while True:
        yield model
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return


def unwrap(model: Any) -> nn.Module:
    """Return the bare model inside the wrappers of :func:`layers_of`."""
    *_, bare = layers_of(model)
    return bare


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if calling ``module`` runs ``F.linear`` on its weight and nothing else."""
    return (
        type(module) is nn.Linear  # no adapter and no quantized layer, which are subclasses
        and "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
    )
