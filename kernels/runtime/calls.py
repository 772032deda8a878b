"""Recognize eager calls of plain tensors, and the layouts of arguments seen before.

A layout is what a check of arguments may read: types, sizes, strides, dtypes, devices and
``requires_grad`` of tensors, and numbers. No tensor is kept.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch._C import _len_torch_dispatch_stack as _modes
from torch._C._functorch import peek_interpreter_stack as _peek
from torch.autograd import forward_ad
from torch.compiler import is_compiling

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # private to torch; without them arguments are looked up by keys alone
    TensorGuards = None  # type: ignore[assignment, misc]

# Types of plain tensors; subclasses may be fake, sharded or quantized.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_NUMBERS = frozenset((type(None), bool, int, float, str, torch.dtype))
RECENT = 4  # calls that arguments are compared with before a key is made of them


def is_plain_call() -> bool:
    """Return True in an eager call: no compilation, ``torch.func``, tangents or dispatch mode."""
    return not (is_compiling() or _modes() or _peek() is not None or forward_ad._current_level >= 0)


class Call(NamedTuple):
    """Hold the functions that run for a layout of arguments, and recognize such arguments.

    ``fits`` compares types, sizes, strides, dtypes, devices and ``requires_grad`` of all tensors in
    one call of C++. It also returns False if autocast, inference mode or a transform of
    ``torch.func`` began or ended since. It is None for lists of tensors or floats, and in a torch
    without guards.
    """

    run: Any
    record: Any  # where gradients are enabled
    arity: int = 0
    fits: Callable[..., bool] | None = None
    take_tensors: Callable[[Any], Any] = tuple
    take_others: Callable[[Any], Any] = tuple
    others: Any = None  # arguments that are not tensors

    @classmethod
    def of(cls, args: tuple[Any, ...], run: Any, record: Any) -> "Call":
        """Return the call that recognizes arguments like these."""
        lists = [a for a in args if type(a) is list and a]
        if TensorGuards is None or any(isinstance(a[0], (torch.Tensor, float)) for a in lists):
            return cls(run, record)
        args = tuple([*a] if type(a) is list else a for a in args)  # callers may change lists
        places = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
        tensors, others = _getter(places), _getter([*{*range(len(args))} - {*places}])
        guards = TensorGuards(*tensors(args), dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return cls(run, record, len(args), guards.check, tensors, others, others(args))


def _getter(places: Sequence[int]) -> Callable[[Any], Any]:
    """Return a function from a tuple to the tuple of its items at ``places``, which ascend."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def recent_call(calls: Iterable[Call], args: tuple[Any, ...]) -> Call | None:
    """Return the one of ``calls`` that these arguments fit; None in a call that is not plain."""
    # In place of is_plain_call(): inside a transform no arguments fit.
    if _modes() or forward_ad._current_level >= 0:
        return None
    for call in calls:
        _, _, arity, fits, tensors, take_others, others = call
        if len(args) == arity and fits(*tensors(args)) and take_others(args) == others:  # type: ignore[misc]
            return call
    return None


def add_recent(calls: Sequence[Call], call: Call) -> tuple[Call, ...]:
    """Return the recent calls with one more, unless it recognizes no arguments."""
    return tuple(calls) if call.fits is None else (call, *calls[: RECENT - 1])


def add_layouts(layouts: list[Any], args: Iterable[Any], exact: bool = True) -> bool:
    """Append layouts of tensors, and the numbers; return False if there is anything else.

    ``exact`` layouts tell apart all tensors that :attr:`Call.fits` does.
    """
    for arg in args:
        kind = type(arg)
        if arg is None or kind in _NUMBERS:
            layouts.append(arg)
        elif kind in PLAIN:
            # The property device takes twice the time of the others.
            layouts += arg.shape, arg.dtype, arg.is_cpu or arg.device, arg.requires_grad
            if exact:
                layouts += arg.stride(), arg.is_inference()
            else:  # strides take as long to hash as the rest
                layouts.append(arg.is_contiguous() or arg.stride())
        elif kind is list:
            # Floats are coefficients, which change with every step, and which no check reads.
            if arg and type(arg[0]) is float:
                continue
            if not add_layouts(layouts, (len(arg), *arg), exact=False):
                return False
        else:
            return False
    return True
