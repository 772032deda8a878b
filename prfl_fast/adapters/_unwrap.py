"""Looks through the wrappers trainers put around a model."""

from typing import Any

from torch import nn


def unwrap(model: Any) -> nn.Module:
    """The model inside torch.compile, DistributedDataParallel and peft wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            model = model.module
        else:
            return model
