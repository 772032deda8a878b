"""Find the adapter of a model, and run a model on the fused kernels.

Functions that need an adapter raise ``TypeError`` if none supports the model.
"""

from typing import Any, TypeVar

from torch import nn

from prfl_fast.models.adapter import Adapter
from prfl_fast.models.cogvideox import CogVideoXAdapter
from prfl_fast.models.experts import Experts, ExpertsAdapter
from prfl_fast.models.hunyuan import HunyuanVideo15Adapter, HunyuanVideoAdapter
from prfl_fast.models.ltx import LTXVideoAdapter
from prfl_fast.models.ltx2 import LTX2VideoAdapter
from prfl_fast.models.mochi import MochiAdapter
from prfl_fast.models.official import WanOfficialAdapter
from prfl_fast.models.other import BlocksAdapter, VelocityAdapter
from prfl_fast.models.wan import WanDiffusersAdapter
from prfl_fast.models.wan_relatives import RELATIVES
from prfl_fast.utils.checks import check_choice
from prfl_fast.utils.modules import unwrap

Model = TypeVar("Model", bound=nn.Module)


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a model.

    Raise ``TypeError`` for an unsupported class; the message lists the functions that take it.
    """
    if isinstance(model, Experts):
        pair: Any = ExpertsAdapter(find_adapter(model.high))
        return pair
    if isinstance(model, nn.Module) and isinstance(unwrap(model), Experts):
        raise TypeError(
            f"model is a {type(model).__qualname__} of two experts, expected an Experts. Wrap each "
            "expert by itself: Experts(wrap(high), wrap(low), boundary)"
        )
    for adapter in ADAPTERS:
        if isinstance(model, nn.Module) and adapter.matches(model):
            return adapter
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    known = ", ".join(adapter.name for adapter in ADAPTERS if adapter is not ADAPTERS[-1])
    text = f"model is a {kind}, expected a supported class: {known}"
    if isinstance(model, nn.Module):
        text += (
            ". Other models with a ModuleList of blocks work with activation_checkpointing, "
            "offload, quantize and add_lora. PRFL, SupervisedFlow and LatentRewardModel take "
            "prfl_fast.models.VelocityModel(model, function). patch and plan do not take them"
        )
    raise TypeError(text)


def find_blocks(model: nn.Module) -> Adapter | BlocksAdapter:
    """Return the object that finds the blocks of any model, for memory policies.

    Its methods raise ``ValueError`` if the model has several lists and no names of those with
    blocks.

    Raises:
        TypeError: if ``model`` has neither an adapter nor a ``ModuleList``.
    """
    blocks = BlocksAdapter()
    known = any(isinstance(model, nn.Module) and a.matches(model) for a in ADAPTERS)
    return blocks if not known and blocks.matches(model) else find_adapter(model)


ADAPTERS: tuple[Adapter, ...] = (
    WanDiffusersAdapter(),
    WanOfficialAdapter(),
    *RELATIVES,
    HunyuanVideoAdapter(),
    HunyuanVideo15Adapter(),
    LTXVideoAdapter(),
    LTX2VideoAdapter(),
    CogVideoXAdapter(),
    MochiAdapter(),
    VelocityAdapter(find_adapter, find_blocks),
)


def adapter_by_name(name: str) -> Adapter:
    """Return the adapter with this name; raise ``ValueError`` for an unknown name."""
    adapters = {adapter.name: adapter for adapter in ADAPTERS}
    check_choice("adapter", name, adapters)
    return adapters[name]


def patch(model: Model) -> Model:
    """Run this model on fused kernels, with the same parameters and ``state_dict``.

    Outputs are equal up to rounding. Only this instance changes, and a second call has no effect.
    LoRA of peft may be added before or after, and diffusers' ``enable_gradient_checkpointing``
    works as before. :func:`unpatch` restores the model.

    Args:
        model: a supported transformer, possibly wrapped by peft, torch.compile or
            DistributedDataParallel.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: if the class is not supported; the message lists the functions that take it.
        ValueError: if patching would change the model's behavior (another attention processor,
            context parallelism, replaced forwards); the message names the call that fixes it.
    """
    find_adapter(model).patch(model)
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch` and return ``model``. An unpatched model does not change."""
    find_adapter(model).unpatch(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Return True if every block of this model runs on the fused kernels, see :func:`patch`."""
    return find_adapter(model).is_patched(model)
