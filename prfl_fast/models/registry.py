"""Find the adapter of a model, and put a model on the fused kernels.

A function that takes a model raises ``TypeError`` if no adapter supports it.
"""

from typing import TypeVar

from torch import nn

from prfl_fast.models.adapter import Adapter
from prfl_fast.models.cogvideox import CogVideoXAdapter
from prfl_fast.models.hunyuan import HunyuanVideo15Adapter, HunyuanVideoAdapter
from prfl_fast.models.ltx import LTXVideoAdapter
from prfl_fast.models.official import WanOfficialAdapter
from prfl_fast.models.wan import WanDiffusersAdapter
from prfl_fast.utils.checks import check_choice

ADAPTERS: tuple[Adapter, ...] = (
    WanDiffusersAdapter(),
    WanOfficialAdapter(),
    HunyuanVideoAdapter(),
    HunyuanVideo15Adapter(),
    LTXVideoAdapter(),
    CogVideoXAdapter(),
)

Model = TypeVar("Model", bound=nn.Module)


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a model; raise ``TypeError`` that lists the supported classes."""
    for adapter in ADAPTERS:
        if isinstance(model, nn.Module) and adapter.matches(model):
            return adapter
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    known = ", ".join(adapter.name for adapter in ADAPTERS)
    raise TypeError(
        f"model is a {kind}, expected a supported class: {known}. Build other models from "
        "prfl_fast.models.blocks"
    )


def adapter_by_name(name: str) -> Adapter:
    """Return the adapter with this name; raise ``ValueError`` for an unknown name."""
    adapters = {adapter.name: adapter for adapter in ADAPTERS}
    check_choice("adapter", name, adapters)
    return adapters[name]


def patch(model: Model) -> Model:
    """Run this model on fused kernels: same outputs, same parameters, same ``state_dict``.

    Only this instance changes, and a second call changes nothing. Adapters of peft may be added
    before or after, and diffusers' ``enable_gradient_checkpointing`` still works. :func:`unpatch`
    restores the model.

    Args:
        model: a supported transformer, possibly wrapped by peft, torch.compile or
            DistributedDataParallel.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if the model is not supported; the message lists the supported classes.
        ValueError: if patching would change the model's behavior (another attention processor,
            context parallelism, replaced forwards); the message names the call that fixes it.
    """
    find_adapter(model).patch(model)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch` and return ``model``; a model that is not patched stays unchanged."""
    find_adapter(model).unpatch(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Return True if every block of this model runs on the fused kernels, see :func:`patch`."""
    return find_adapter(model).is_patched(model)
