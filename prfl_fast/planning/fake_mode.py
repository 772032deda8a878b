"""Cheaper dispatch of fake tensors for programs that repeat the same operations many times."""

import functools
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

_PLAIN: tuple[type, ...] = (int, float, bool, str, type(None), torch.dtype, torch.device)
_PLAIN += (torch.layout, torch.memory_format)
# (function, arguments) → recipe of the result, or _UNKNOWN. An operation's result depends on
# nothing else, so all simulations of a process share it, as they share FakeTensorMode's own cache.
_recipes: dict[Any, Any] = {}
_UNKNOWN = object()
_NOT, _INDEX = torch.ops.aten.bitwise_not.default, torch.ops.aten.index.Tensor
_INITIALIZATION = {"fill_", "kaiming_uniform_", "normal_", "uniform_", "zero_"}
_READS = (torch.ops.aten._local_scalar_dense.default, _NOT, _INDEX)


class _NoKeyError(Exception):
    """Error for arguments that are not described by shapes and plain values."""


@functools.cache
def _is_plain(func: Any) -> bool:
    """Return True if an operation is neither composed of others nor changes a tensor's layout."""
    return (
        isinstance(func, OpOverload)
        and func.namespace in ("aten", "prfl_fast")
        and torch.Tag.inplace_view not in func.tags
        and not func._can_decompose()
    )


def _key(values: Any) -> tuple[Any, ...]:
    """Return what an operation's result depends on: values, and the layout of fake tensors."""
    parts: list[Any] = []
    for value in values:
        kind = type(value)
        if kind is FakeTensor:
            if value.constant is not None:  # it has data, on which the result depends
                raise _NoKeyError
            layout = (value.shape, value.stride(), value.storage_offset())
            parts.append((value.dtype, value.fake_device, layout))
        elif kind in _PLAIN:
            parts.append((kind, value))  # 1, 1.0 and True are equal
        elif kind in (list, tuple):
            parts.append((kind, _key(value)))
        else:
            raise _NoKeyError
    return tuple(parts)


def _is_layout(value: Any) -> bool:
    """Return True if a value is a fake tensor without data."""
    return type(value) is FakeTensor and value.constant is None


def _recipe(out: Any, args: tuple[Any, ...]) -> Any:
    """Return how to make ``out`` again: a position of ``args``, or layout of a new tensor."""
    if type(out) is tuple:
        parts = [_recipe(value, args) for value in out]
        return _UNKNOWN if _UNKNOWN in parts else parts
    if out is None:
        return None
    for index, value in enumerate(args):
        if out is value:
            return index
    if type(out) is not FakeTensor or out.constant is not None or out.layout != torch.strided:
        return _UNKNOWN
    storage = out.untyped_storage()
    given = [value for value in args if isinstance(value, torch.Tensor)]
    if any(value.untyped_storage()._cdata == storage._cdata for value in given):
        return _UNKNOWN
    return out.shape, out.stride(), out.dtype, out.fake_device


class FastFakeTensorMode(FakeTensorMode):
    """``FakeTensorMode`` with less time per operation, in which a program may read booleans.

    They count as True: a mask selects all, its complement nothing, and a condition holds. Models
    that order text tokens by masks read them (HunyuanVideo-1.5). All other results are those of
    ``FakeTensorMode``.

    Views run PyTorch's C++ kernel for ``meta`` tensors at once. A new result is made from the
    layout that the same operation had before. PyTorch's own cache spends most of a hit on a key
    that also allows symbolic shapes, and has no custom operations. Written for torch 2.13, whose
    private methods it uses.
    """

    def __init__(self) -> None:
        super().__init__()
        self._attributes: dict[torch.device, dict[str, Any]] = {}  # of fake tensors, by device

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operation passes two wrappers that keep compiled code out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.dispatch(func, types, args, kwargs)

    def dispatch(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func in _READS and (out := self._read(func, *args)) is not None:
            return out
        out = self.known(func, args, kwargs)
        if out is not NotImplemented:
            return out
        out = super().dispatch(func, types, args, kwargs)
        if (key := self._key_of(func, args, kwargs)) is not None:
            _recipes[key] = _recipe(out, args)
        return out

    def known(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a view or of an operation that ran before, else NotImplemented.

        A mode above this one may call it and save a dispatch through PyTorch.
        """
        if func in _READS:
            return NotImplemented
        if _is_plain(func) and func.is_view and not kwargs and _is_layout(args[0]):
            out = self._run_for_meta(func, args)
            device = args[0].fake_device
            if isinstance(out, torch.Tensor):
                return self._fake(out, device)
            return type(out)(self._fake(part, device) for part in out)
        key = self._key_of(func, args, kwargs)
        recipe = _UNKNOWN if key is None else _recipes.get(key, _UNKNOWN)
        return NotImplemented if recipe is _UNKNOWN else self._make(recipe, args)

    def _key_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a key of all that an operation's result depends on; None if it must run anew."""
        if not _is_plain(func) or func.is_view or func in self.lift_fns or "out" in kwargs:
            return None
        try:
            return (func, _key(args), *kwargs, _key(kwargs.values()))
        except _NoKeyError:
            return None

    def _read(self, func: Any, value: Any, indices: Any = ()) -> Any:
        """Return the result of an operation that reads booleans; None for other operations."""
        mask, *others = (value,) if func is not _INDEX else indices
        if others or mask.dtype != torch.bool or mask.constant is not None:
            return None
        true = not getattr(mask, "complement", False)
        if func is _NOT:
            with self:
                out: Any = torch.empty_like(mask)
            out.complement = true
            return out
        if func is not _INDEX:
            return true
        with self:
            return value.new_empty(true * mask.numel(), *value.shape[mask.ndim :])

    def _make(self, recipe: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(recipe, list):
            return tuple(self._make(part, args) for part in recipe)
        if isinstance(recipe, int):
            return args[recipe]
        if recipe is None:
            return None
        shape, stride, dtype, device = recipe
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return self._fake(empty, device)

    def _run_for_meta(self, func: Any, args: Any) -> Any:
        """Run PyTorch's C++ kernel for ``meta`` tensors on fake ones."""
        # As fake_tensor.in_kernel_invocation_manager, but without the cost of a context manager.
        with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
            self.in_kernel_invocation = True
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                return func(*args)
            finally:
                self.in_kernel_invocation = False

    def _fake(self, meta: torch.Tensor, device: torch.device) -> FakeTensor:
        """Return a fake tensor of a ``meta`` tensor, with the attributes of the first one."""
        attributes = self._attributes.get(device)
        if attributes is None:
            first = FakeTensor(self, meta, device)
            self._attributes[device] = dict(first.__dict__)
            return first
        made: Any = torch.Tensor._make_subclass(
            FakeTensor, meta, False, dispatch_device=True, device_for_backend_keys=device
        )
        made.__dict__.update(attributes)
        return made


class WithoutInitialization(TorchFunctionMode):
    """Skip the initialization of parameters, because ``meta`` tensors hold no values."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.__name__ in _INITIALIZATION:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
