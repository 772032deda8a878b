"""Find the bare model inside the wrappers that trainers put around it, and free its memory."""

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from prfl_fast.utils.sharded import SHARDED

STREAMED = "streamed_weights"  # attribute of a block, and of its modules, for weights_of


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


def weights_of(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which a block, or a module in it, has its weights on the device.

    Blocks whose weights wait in host memory (:mod:`prfl_fast.memory.stream`) or are sharded enter
    it when they are called. Code that reads a module outside a call of its block, or of the model
    if it is in none, enters it too.
    """
    part: nn.Module | None = module
    while part is not None:
        weights = part.__dict__.get(STREAMED)
        weights = part.__dict__.get(SHARDED) if weights is None else weights
        if weights is not None:
            return weights.present()
        part = part._modules.get("base_layer")  # of a layer with LoRA
    return contextlib.nullcontext()


def with_weights(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` inside :func:`weights_of`, for recomputes outside of the block."""

    def run(*args: Any) -> Any:
        with weights_of(module):
            return function(*args)

    return run


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


def is_inactive_dropout(module: nn.Module) -> bool:
    """Return True if ``module`` returns its input: an identity, or a dropout that is off."""
    dropout = type(module) is nn.Dropout and (not module.training or module.p == 0)
    return dropout or type(module) is nn.Identity


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
_MEMORY = "__prfl_fast_memory__"


class _Memory:
    """Result of checks of a module, and the state of it and its submodules at that time.

    Comparing the states is shorter than the checks, which read each module.
    """

    def __init__(
        self, module: nn.Module, found: object, others: Iterable[Any], called: Iterable[Any]
    ) -> None:
        self.found = found
        vars(module)[_MEMORY] = self  # before the copies below
        self.modules = [*module.modules()]
        self.types: list[Any] = [*map(type, self.modules)]
        self.forwards = [kind.forward for kind in self.types]
        self.called = [*called]
        self.calls = [type(each).__call__ for each in self.called]
        self.hooks = [vars(m)[name] for m in self.modules[1:] for name in _HOOKS]
        self.states = [*map(vars, self.modules), *others]
        for name in ("_modules", "_parameters"):
            self.states += [vars(m)[name] for m in self.modules]
        self.before = [copy.copy(state) for state in self.states]

    def __reduce__(self) -> Any:  # copies and pickled modules have None in its place
        return type(None), ()

    def __deepcopy__(self, memo: object) -> None:
        return None

    def is_current(self) -> bool:
        """Return True if nothing has changed."""
        try:
            return (
                not any(self.hooks)
                and not any(_GLOBAL_HOOKS)
                and [*map(type, self.modules)] == self.types
                and [kind.forward for kind in self.types] == self.forwards
                and [type(each).__call__ for each in self.called] == self.calls
                and self.states == self.before
            )
        except Exception:  # an attribute is another object than before, and has no equality
            return False


def remember(
    module: nn.Module,
    found: object,
    others: Iterable[Any] = (),
    called: Iterable[Callable[..., Any]] = (),
) -> bool:
    """Store ``found``, a result of checks of a module, for :func:`remembered`; True if stored.

    The result is lost when the module or a submodule changes (attributes, parameters, submodules,
    classes and their forwards), or one of ``others``, dicts and lists of other objects, or the
    ``__call__`` of a class of ``called``. A module whose submodules have hooks stores nothing.
    """
    _forget(module)
    memory = _Memory(module, found, others, called)
    if not memory.is_current():
        _forget(module)
        return False
    return True


def remembered(module: nn.Module) -> Any:
    """Return the result that :func:`remember` stored; None if there is none or a module changed."""
    memory = vars(module).get(_MEMORY)
    return memory.found if memory is not None and memory.is_current() else None


def forget(model: nn.Module) -> None:
    """Drop what :func:`remember` stored, which keeps weights alive that are replaced later."""
    for module in model.modules():
        _forget(module)


def _forget(module: nn.Module) -> None:
    memory = vars(module).pop(_MEMORY, None)
    if memory is not None:
        memory.before.clear()  # the cycle that its copy of the module's attributes is part of
