"""Looks through the wrappers trainers put around a model."""

from collections.abc import Iterator
from typing import Any

from torch import nn


def layers_of(model: Any) -> Iterator[Any]:
    """The model and what is inside its torch.compile, DistributedDataParallel and peft wrappers,
    the bare one last.
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
    """The model inside torch.compile, DistributedDataParallel and peft wrappers."""
    *_, bare = layers_of(model)
    return bare
