"""Live bytes of tensor storages, by category and phase, while a program runs.

Works alike for real tensors and for fake ones, which have sizes and no values: the second is how
memory at sizes that fit no machine is found.
"""

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_fast.kernels._registry import OPERATIONS

# Of device memory. What nothing was said about is workspace, or rollout in a phase of that name.
CATEGORIES = (
    "weights",
    "reward",
    "optimizer",
    "gradients",
    "checkpoints",
    "rollout",
    "workspace",
)
HOST = "host"
_POINTS = 2048  # of a timeline, at most twice as many before it is thinned

_active: "list[Ledger]" = []


def mark(tensor: torch.Tensor, category: str) -> None:
    """Enter a tensor's storage under ``category`` in the ledgers in force; nothing without one.

    Args:
        category: one of ``CATEGORIES``, or ``"host"`` for what stands in host memory.
    """
    for ledger in _active:
        ledger.mark(tensor, category)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments or results."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """A tensor's storage; None for sparse tensors, which have none."""
    try:
        return tensor.untyped_storage()
    except NotImplementedError:
        return None


class _Entry(weakref.ref):
    """A storage in the ledger, struck out by the reference's callback when it is freed."""

    __slots__ = ("key", "bytes", "category")
    key: int
    bytes: int
    category: str


class Ledger(TorchDispatchMode):
    """Live and peak bytes of the storages that are allocated inside the context, on any device.

    Every operation's new storages are entered when it returns and struck out when they are freed;
    storages from before count once they are marked. What one kernel allocates and frees inside
    itself is not seen, but for :meth:`add_transient`. Enter it after (that is, inside) a
    ``FakeTensorMode``.

    Args:
        open_operations: run prfl_fast's own operations as their plain PyTorch reference with every
            temporary counted, as the CPU does; otherwise they are one kernel each, as on CUDA.

    Attributes:
        live, host: bytes at the moment, on the device and marked ``"host"``.
        peak, host_peak: the most there were.
        peak_phase, peak_categories: the phase, and bytes by category, at the first peak.
        categories: bytes at the moment by category, device only.
    """

    def __init__(self, *, open_operations: bool = False) -> None:
        super().__init__()
        self.open_operations = open_operations
        self.live = self.peak = self.host = self.host_peak = 0
        self.categories = dict.fromkeys(CATEGORIES, 0)
        self.peak_phase, self.peak_categories = "", dict(self.categories)
        self._entries: dict[int, _Entry] = {}
        self._phase, self._default = "", "workspace"
        self._depth = 0
        self._points: list[tuple[str, dict[str, int]]] = []
        self._high = (-1, dict(self.categories))  # of the commits since the last point
        self._commits, self._window = 0, 1

    def phase(self, name: str) -> None:
        """What comes next belongs to this phase of the program."""
        self._commit()
        self._close_point()
        self._phase = name
        self._default = "rollout" if name == "rollout" else "workspace"

    @property
    def timeline(self) -> list[tuple[str, dict[str, int]]]:
        """(phase, bytes by category) in order of time: the highest moment of each stretch."""
        return list(self._points)

    def mark(self, tensor: torch.Tensor, category: str) -> None:
        """Enter a storage under a category, or move it there.

        Raises:
            ValueError: an unknown category.
        """
        if category != HOST and category not in CATEGORIES:
            raise ValueError(
                f"category is {category!r}, expected {HOST!r} or one of {', '.join(CATEGORIES)}"
            )
        storage = storage_of(tensor)
        if storage is None:
            return
        entry = self._entry(storage)
        self._add(entry, -entry.bytes)
        entry.bytes, entry.category = storage.nbytes(), category
        self._add(entry, entry.bytes)

    def category_of(self, tensor: torch.Tensor) -> str | None:
        """Where a storage stands; None if it is not in the ledger."""
        storage = storage_of(tensor)
        entry = None if storage is None else self._entries.get(storage._cdata)
        return None if entry is None else entry.category or None

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within, workspace that autograd saves for the backward goes under ``"checkpoints"``."""

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if self.category_of(tensor) == "workspace":
                self.mark(tensor, "checkpoints")
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def add_transient(self, size: int) -> None:
        """Count ``size`` bytes of workspace that were alive together with all that is alive now."""
        self.live += size
        self.categories["workspace"] += size
        self._commit()
        self.live -= size
        self.categories["workspace"] -= size

    def _entry(self, storage: torch.UntypedStorage) -> _Entry:
        key = storage._cdata
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(storage, self._strike)
            entry.key, entry.bytes, entry.category = key, 0, ""
        return entry

    def _strike(self, entry: Any) -> None:
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
        """Compare with the peaks, before anything falls.

        Not at each rise: a host buffer is a rise of the device's bytes until it is marked.
        """
        self.host_peak = max(self.host_peak, self.host)
        if self.live > self._high[0]:
            self._high = (self.live, dict(self.categories))
            if self.live > self.peak:
                self.peak, self.peak_phase = self.live, self._phase
                self.peak_categories = self._high[1]
        self._commits += 1
        if self._commits >= self._window:
            self._close_point()

    def _close_point(self) -> None:
        if self._high[0] >= 0:
            self._points.append((self._phase, self._high[1]))
        self._high, self._commits = (-1, self.categories), 0
        if len(self._points) >= 2 * _POINTS:
            self._points = _thinned(self._points)
            self._window *= 2

    def __enter__(self) -> "Ledger":
        self._depth += 1
        if self._depth == 1:
            _active.append(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            _active.remove(self)
            self._commit()
            self._close_point()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # of fake tensors, asked at every turn
            return args[0].device
        if func is torch.ops.aten._unsafe_view.default:
            func = torch.ops.aten.view.default  # the same memory, and fake tensors are quick at it
        if func.is_view:  # two operations of three; a view brings no storage
            return func(*args, **kwargs)
        self._commit()
        given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        for tensor in given:
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
            out = func(*args, **kwargs)
        fresh = []
        for tensor in tensors_in(out):
            storage = storage_of(tensor)
            if storage is not None and storage._cdata not in self._entries:
                entry = self._entry(storage)
                entry.bytes, entry.category = storage.nbytes(), self._default
                self._add(entry, entry.bytes)
                fresh.append(tensor)
        if func._schema.is_mutable:
            for tensor in given:  # resized in place
                storage, category = storage_of(tensor), self.category_of(tensor)
                if storage is not None and category is not None:
                    if self._entries[storage._cdata].bytes != storage.nbytes():
                        self.mark(tensor, category)
        self._ran(func, args, kwargs, given, fresh, out)
        return out

    def _ran(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        fresh: list[torch.Tensor],
        out: Any,
    ) -> None:
        """For subclasses: an operation was run; ``fresh`` of its results have a new storage."""


def _thinned(points: list[tuple[str, dict[str, int]]]) -> list[tuple[str, dict[str, int]]]:
    """Of two neighbours in the same phase the higher one."""
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
