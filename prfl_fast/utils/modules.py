"""Find the bare model inside the wrappers that trainers put around it, and free its memory."""

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
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


def free_memory() -> None:
    """Return the memory of deleted models, that of reference cycles too, to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model, of whose parameters some may wait in host memory."""
    devices = (p.device for p in model.parameters())
    first = next(devices)
    return first if first.type != "cpu" else next((d for d in devices if d.type != "cpu"), first)


def set_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Make ``function(module, ...)`` the forward of this instance."""
    # A bound method is pickled by its name, under which the module's class has no method.
    module.forward = functools.partial(function, module)


def instance_forward(module: nn.Module) -> object:
    """Return the function that :func:`set_forward` set; None if there is none."""
    forward = module.__dict__.get("forward")
    return forward.func if isinstance(forward, functools.partial) else None


class _StopForward(BaseException):
    """Leave a model's forward at a hook; no handler of ``Exception`` catches it."""


@contextlib.contextmanager
def stopped_at(register: Callable[..., Any]) -> Iterator[list[Any]]:
    """Leave the forward called inside at a hook; the list receives the hook's last argument.

    Args:
        register: a module's ``register_forward_hook``, for the module's output, or
            ``register_forward_pre_hook``, for the tuple of its arguments.
    """
    found: list[Any] = []

    def stop(*args: Any) -> None:
        found.append(args[-1])
        raise _StopForward

    hook = register(stop)
    try:
        with contextlib.suppress(_StopForward):
            yield found
    finally:
        hook.remove()


def customization(module: nn.Module, own: object = None) -> str:
    """Return ``"hooks"`` or ``"a replaced forward"`` if a module has them, else ``""``.

    ``own`` is a function of :func:`set_forward` that does not count.
    """
    if "forward" in module.__dict__ and (own is None or instance_forward(module) is not own):
        return "a replaced forward"
    hooked = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return "hooks" if hooked else ""


def is_plain_linear(module: nn.Module) -> bool:
    """Return True if calling ``module`` runs ``F.linear`` on its weight and nothing else."""
    return (
        type(module) is nn.Linear  # no adapter and no quantized layer, which are subclasses
        and not customization(module)
        # torchao keeps quantized weights, tensor subclasses, in plain linear layers.
        and (
            type(module.weight) is nn.Parameter or not hasattr(module.weight, "__tensor_flatten__")
        )
    )
