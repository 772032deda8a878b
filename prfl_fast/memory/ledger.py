"""Count live bytes of tensor storages by category and phase while a program runs.

Fake tensors count as well: they have sizes but no data, so the memory of any size can be predicted.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_fast.kernels.runtime.registry import OPERATIONS
from prfl_fast.utils.checks import check_choice
from prfl_fast.utils.sharded import local_part

# Categories of device memory. Unmarked storages are workspace, or rollout in the phase "rollout".
CATEGORIES = (
    "weights", "reference", "reward", "optimizer", "gradients", "checkpoints", "rollout",
    "workspace",
)  # fmt: skip
HOST = "host"
_POINTS = 2048  # a timeline is thinned when it has twice as many points

_active: "list[Ledger]" = []
_resize_storage = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, size: int) -> None:
    """Resize a storage and tell the ledgers; FSDP2 frees weights this way, which no mode sees."""
    _resize_storage(storage, size)
    for ledger in _active:
        ledger.on_resize(storage)


def mark(tensor: torch.Tensor, category: str) -> None:
    """Enter a tensor's storage under one of ``CATEGORIES`` or ``"host"`` in all active ledgers."""
    for ledger in _active:
        ledger.mark(tensor, category)


def mark_saved(tensor: torch.Tensor) -> None:
    """Move workspace that autograd saves for the backward to ``"checkpoints"``."""
    for ledger in _active:
        if ledger.category_of(tensor) == "workspace":
            ledger.mark(tensor, "checkpoints")


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operation's arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """Return a tensor's storage; None for sparse tensors, which have none."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


class _Entry(weakref.ref):
    """Storage in the ledger: a weak reference whose callback removes it when it is freed."""

    __slots__ = ("key", "bytes", "category")
    key: int
    bytes: int
    category: str


# torch's MemTracker (torch 2.13) cannot replace this class. A PRFL step makes it raise: it
# registers gradient hooks on frozen parameters and supports one call of a module per step. It also
# has no phases, timeline or host bytes. On a fully trained 3-block Wan its peak is equal to the
# byte without checkpointing (33 151 752) and 2.2 % higher in mode full.
class Ledger(TorchDispatchMode):
    """Count live and peak bytes of storages allocated inside the context, on any device.

    The ledger enters the new storages of an operation when the operation returns and removes them
    when they are freed. Storages older than the context count after they are marked.
    :meth:`add_transient` adds memory that a kernel frees before it returns. Enter a ledger inside a
    ``FakeTensorMode``, not around it.

    Args:
        open_operations: count the temporaries of prfl_fast's own operations, run as their PyTorch
            reference, as on the CPU; otherwise each operation is one kernel, as on CUDA.

    Attributes:
        live, host: current bytes on the device, and in storages marked ``"host"``.
        peak, host_peak: their maxima so far.
        peak_phase, peak_categories: phase and bytes by category at the first peak.
        categories: current device bytes by category.
        phase: name of the current phase.
    """

    def __init__(self, *, open_operations: bool = False) -> None:
        super().__init__()
        self.open_operations = open_operations
        self.live = self.peak = self.host = self.host_peak = 0
        self.categories = dict.fromkeys(CATEGORIES, 0)
        self.peak_phase, self.peak_categories = "", dict(self.categories)
        self._entries: dict[int, _Entry] = {}
        self.phase, self._default = "", "workspace"
        self._depth = 0
        self._points: list[tuple[str, dict[str, int]]] = []
        self._high = (-1, dict(self.categories))  # highest commit since the last point
        self._commits, self._window = 0, 1

    def start_phase(self, name: str) -> None:
        """Attribute all later allocations to phase ``name``."""
        self._commit()
        self._close_point()
        self.phase = name
        self._default = "rollout" if name == "rollout" else "workspace"

    @property
    def timeline(self) -> list[tuple[str, dict[str, int]]]:
        """Return (phase, bytes by category) in order of time: the peak of each time window."""
        return list(self._points)

    def mark(self, tensor: torch.Tensor, category: str) -> None:
        """Enter a storage under a category, or move it there."""
        check_choice("category", category, (HOST, *CATEGORIES))
        storage = storage_of(local_part(tensor))
        if storage is None:
            return
        entry = self._entry(storage)
        self._add(entry, -entry.bytes)
        entry.bytes, entry.category = storage.nbytes(), category
        self._add(entry, entry.bytes)

    def category_of(self, tensor: torch.Tensor) -> str | None:
        """Return the category of a storage; None if it is not in the ledger."""
        storage = storage_of(tensor)
        entry = None if storage is None else self._entries.get(storage._cdata)
        return None if entry is None else entry.category or None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Move workspace that autograd saves for the backward to ``"checkpoints"``."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if self.category_of(tensor) == "workspace":
                self.mark(tensor, "checkpoints")
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def add_transient(self, size: int) -> None:
        """Count ``size`` bytes of temporary workspace on top of all live bytes."""
        self.live += size
        self.categories["workspace"] += size
        self._commit()
        self.live -= size
        self.categories["workspace"] -= size

    def _entry(self, storage: torch.UntypedStorage) -> _Entry:
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(storage, self._remove_freed)
            entry.key, entry.bytes, entry.category = key, 0, ""
        return entry

    def _remove_freed(self, entry: Any) -> None:
        if self._depth:
            self._commit()
        self._add(entry, -entry.bytes)
        del self._entries[entry.key]

    def _add(self, entry: _Entry, size: int) -> None:
        if entry.category == HOST:
            self.host += size
        elif entry.category:
            self.live += size
            self.categories[entry.category] += size

    def _commit(self) -> None:
        """Update the peaks before bytes fall."""
        # An update at each rise would count a host buffer as device memory until it is marked.
        self.host_peak = max(self.host_peak, self.host)
        if self.live > self._high[0]:
            self._high = (self.live, dict(self.categories))
            if self.live > self.peak:
                self.peak, self.peak_phase = self.live, self.phase
                self.peak_categories = self._high[1]
        self._commits += 1
        if self._commits >= self._window:
            self._close_point()

    def _close_point(self) -> None:
        if self._high[0] >= 0:
            self._points.append((self.phase, self._high[1]))
        self._high, self._commits = (-1, self.categories), 0
        if len(self._points) >= 2 * _POINTS:
            self._points = _thinned(self._points)
            self._window *= 2

    def __enter__(self) -> "Ledger":
        self._depth += 1  # `with self` below enters again, for the parts of an opened operation
        if self._depth == 1:
            _active.append(self)
            torch.UntypedStorage.resize_ = _resize  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            _active.remove(self)
            if not _active:
                torch.UntypedStorage.resize_ = _resize_storage  # type: ignore[method-assign]
            self._commit()
            self._close_point()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and enter its new storages."""
        if func is torch.ops.prim.device.default:  # fake tensors ask it constantly
            return args[0].device
        if func is torch.ops.aten._unsafe_view.default:
            func = torch.ops.aten.view.default  # same memory, faster with fake tensors
        if func.is_view:  # two of three operations; a view has no storage of its own
            return self.call(func, args, kwargs)
        self._commit()
        given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        for tensor in given:  # so that an argument that is returned does not count as fresh
            storage = storage_of(tensor)
            if storage is not None:
                self._entry(storage)
        operation = None
        if self.open_operations and func.namespace == "prfl_fast" and not kwargs:
            operation = OPERATIONS.get(func._opname)
        if operation is not None:
            with self:
                out = operation(*args)
        else:
            out = self.call(func, args, kwargs)
        fresh = []
        for tensor in tensors_in(out):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in self._entries:
                entry = self._entry(storage)
                entry.bytes, entry.category = storage.nbytes(), self._default
                self._add(entry, entry.bytes)
                fresh.append(tensor)
        if func._schema.is_mutable:
            for tensor in given:  # it may have been resized in place
                storage, category = storage_of(tensor), self.category_of(tensor)
                if storage is not None and category is not None:
                    if self._entries[storage._cdata].bytes != storage.nbytes():
                        self.mark(tensor, category)
        self.on_operation(func, args, kwargs, given, fresh, out)
        return out

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operation; a subclass may know a faster way."""
        return func(*args, **kwargs)

    def on_resize(self, storage: torch.UntypedStorage) -> None:
        """Enter the new size of a storage; one that is emptied is of gathered weights."""
        entry = self._entries.get(storage._cdata)
        if entry is None or not entry.category or entry.bytes == storage.nbytes():
            return
        self._commit()
        self._add(entry, -entry.bytes)
        entry.bytes = storage.nbytes()
        if not entry.bytes and entry.category != HOST:
            entry.category = "weights"
        self._add(entry, entry.bytes)

    def on_operation(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        fresh: list[torch.Tensor],
        out: Any,
    ) -> None:
        """Handle an operation in a subclass; ``fresh`` are its results with a new storage."""


def _thinned(points: list[tuple[str, dict[str, int]]]) -> list[tuple[str, dict[str, int]]]:
    """Keep the higher point of each pair of neighbors in the same phase."""
    thin: list[tuple[str, dict[str, int]]] = []
    index = 0
    while index < len(points):
        point = points[index]
        after = points[index + 1] if index + 1 < len(points) else ("", {})
        if after[0] == point[0] and after[1]:
            point = max(point, after, key=lambda p: sum(p[1].values()))
            index += 1
        thin.append(point)
        index += 1
    return thin
