"""Offloading: what transformer blocks keep for their backward waits on the host.

One group of storages per block call. While block k runs forward, what block k-1 keeps is copied to
the host; before block k+1 begins, what block k-1 kept leaves the device. In the backward the first
tensor that block k asks for frees what block k+1 had and starts the copies of block k-1 back. So
the device holds at most two blocks' worth, whatever the depth, of all models on it together: the
blocks of a reward model follow those of the generator, forward and backward.

Ownership: the graph owns handles, a handle its storage, a storage its memory on either side. What
ends a graph, its backward, an exception or the last reference to it, thus gives everything back;
window and pool hold no tensor of a graph.

On CUDA, copies run on a stream of their own. Device memory belongs to the compute stream, which
waits for the last copy from or to it before it is freed. Host memory is page-locked and touched by
the copy stream alone, in order, so that a buffer may serve again at once. On the CPU the same code
runs, and every copy is made at once. The models on a device are expected to train on one thread.
"""

import contextlib
import functools
import mmap
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from prfl_fast.ledger import mark

SMALLEST = 64 << 10  # bytes; below, a copy costs more than the memory is worth
RESERVE = 0.1  # of the host's memory stays free unless a limit is given


class HostMemoryError(RuntimeError):
    """The host has no memory left for what a device should be relieved of."""


class Offloader:
    """Host buffers and counts of one model's blocks.

    Args:
        host_limit: bytes of host memory it may hold; None is what the machine has available at the
            time, less a tenth of its memory.
    """

    def __init__(self, host_limit: int | None = None) -> None:
        self.host_limit = host_limit
        self.bytes = dict.fromkeys(
            ("device_now", "device_peak", "host_now", "host_peak", "host_pool", "transferred"), 0
        )
        # By size and copy stream: a stream's own order is what makes a buffer free at once.
        self._free: defaultdict[tuple[int, torch.cuda.Stream | None], list[torch.Tensor]] = (
            defaultdict(list)
        )

    def open(self, block: nn.Module, x: torch.Tensor, shared: Iterable[Any]) -> "Group":
        """The group of one call of a block.

        Args:
            x: ``[B, L, D]``, the block's own argument. shared: arguments that all blocks share, of
                which tensors stay where they are, as the block's parameters and buffers do.
        """
        stay = {
            t.untyped_storage()._cdata
            for t in (*shared, *block.parameters(), *block.buffers())
            if _is_plain(t)
        }
        return _window(x.device).open(self, stay)

    def count(self, place: str, nbytes: int) -> None:
        """Add to the bytes held at ``place``."""
        now, peak = f"{place}_now", f"{place}_peak"
        self.bytes[now] += nbytes
        self.bytes[peak] = max(self.bytes[peak], self.bytes[now])

    def take(self, source: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """A host buffer of the source's size.

        Raises:
            HostMemoryError: it would exceed the limit.
        """
        nbytes = source.nbytes
        if self._free[nbytes, stream]:
            buffer = self._free[nbytes, stream].pop()
        else:
            if not isinstance(source, FakeTensor) or self.host_limit is not None:
                self._make_room(nbytes)
            if stream is None:
                buffer = torch.empty(nbytes, dtype=torch.uint8)
            else:
                buffer = _page_locked(nbytes, stream)
            self.bytes["host_pool"] += nbytes
        mark(buffer, "host")
        self.count("host", nbytes)
        return buffer

    def give(self, buffer: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """Take a buffer back."""
        self._free[buffer.nbytes, stream].append(buffer)
        self.count("host", -buffer.nbytes)

    def _limit(self) -> int:
        if self.host_limit is not None:
            return self.host_limit
        available, total = host_memory()
        return self.bytes["host_pool"] + max(0, int(available - RESERVE * total))

    def _make_room(self, nbytes: int) -> None:
        """Let go of buffers of other sizes if it takes that, or raise."""
        if self.bytes["host_pool"] + nbytes <= self._limit():
            return
        self.bytes["host_pool"] -= sum(
            nbytes * len(free) for (nbytes, _), free in self._free.items()
        )
        self._free.clear()
        held, limit = self.bytes["host_pool"], self._limit()
        if held + nbytes > limit:
            raise HostMemoryError(
                f"offloading asks for {nbytes} bytes of host memory with {held} bytes in use, "
                f"expected at most {limit} together (host_limit, or what is available less a tenth "
                "of the machine's memory): raise host_limit or free host memory, choose policy "
                "'full', which keeps least, or offload=None"
            )


class Group:
    """The storages that one call of a block keeps; its handles hold them, not the group."""

    def __init__(self, offloader: Offloader, window: "_Window", stay: set[int]) -> None:
        self.offloader, self.window = offloader, window
        self.previous = window.newest
        self._stay = stay
        self._saved: weakref.WeakValueDictionary[tuple[int, int], _Saved] = (
            weakref.WeakValueDictionary()
        )

    def pack(self, tensor: torch.Tensor) -> "Handle":
        """Keep a tensor: its whole storage, once, unless it is small or not the block's own."""
        return Handle(tensor, self._store(tensor))

    def _store(self, tensor: torch.Tensor) -> "_Saved | None":
        if (
            not _is_plain(tensor)
            or isinstance(tensor, nn.Parameter)
            or isinstance(tensor._base, nn.Parameter)
            or tensor.device != self.window.device
            or tensor.is_conj()
            or tensor.is_neg()
        ):
            return None
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes < SMALLEST or nbytes % tensor.itemsize or storage._cdata in self._stay:
            return None
        key = (storage._cdata, tensor._version)
        saved = self._saved.get(key)
        if saved is None:
            saved = self._saved[key] = _Saved(self, tensor)
        return saved

    def copy_to_host(self) -> None:
        """Start the copies of what is on the device only."""
        for saved in list(self._saved.values()):
            saved.copy_to_host()

    def leave_device(self) -> None:
        """Free the device memory of what is saved."""
        for saved in list(self._saved.values()):
            saved.leave_device()

    def fetch(self) -> None:
        """Start the copies of what is on the host only."""
        for saved in list(self._saved.values()):
            saved.fetch()


class Handle:
    """What the graph holds in place of a tensor: what was saved of it, or the tensor itself."""

    def __init__(self, tensor: torch.Tensor, saved: "_Saved | None" = None) -> None:
        self._saved, self._version = saved, tensor._version
        self._layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._dtype = tensor.dtype
        if isinstance(tensor, nn.Parameter):
            self._alias: torch.Tensor = tensor
            return
        # An alias shares the version counter. Below autograd, in a dispatch mode, it does so only
        # without this key.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self._alias = tensor.detach()
        if saved is not None:  # the counter without the memory
            self._alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def unpack(self) -> torch.Tensor:
        """The tensor as it was kept.

        Raises:
            RuntimeError: it was modified in place since.
        """
        if self._alias._version != self._version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: {self._dtype} {list(self._layout[0])} is at version "
                f"{self._alias._version}, expected version {self._version}"
            )
        if self._saved is None:
            return self._alias
        return self._saved.storage().view(self._dtype).as_strided(*self._layout)


class _Saved:
    """One storage, as bytes on the device, on the host, or both."""

    _device: torch.Tensor | None = None
    _host: torch.Tensor | None = None
    _copied: torch.cuda.Event | None = None  # the last copy from or to the device

    def __init__(self, group: Group, tensor: torch.Tensor) -> None:
        self._group = group
        count = tensor.untyped_storage().nbytes() // tensor.itemsize
        self._hold(tensor.detach().as_strided((count,), (1,), 0).view(torch.uint8))

    def _hold(self, memory: torch.Tensor) -> None:
        self._stream = self._group.window.compute_stream()
        self._device = memory
        mark(memory, "checkpoints")
        self._group.offloader.count("device", memory.nbytes)

    def copy_to_host(self) -> None:
        if self._host is not None or self._device is None:
            return
        window, offloader = self._group.window, self._group.offloader
        buffer = offloader.take(self._device, window.stream)
        try:
            self._copied = window.copy(buffer, self._device, self._stream)
        except BaseException:
            offloader.give(buffer, window.stream)
            raise
        self._host = buffer
        offloader.bytes["transferred"] += buffer.nbytes

    def fetch(self) -> None:
        if self._device is not None or self._host is None:
            return
        window = self._group.window
        memory = torch.empty(self._host.nbytes, dtype=torch.uint8, device=window.device)
        self._copied = window.copy(memory, self._host, window.compute_stream())
        self._hold(memory)
        self._group.offloader.bytes["transferred"] += memory.nbytes

    def leave_device(self) -> None:
        self.copy_to_host()
        self._drop()

    def _drop(self) -> None:
        if self._device is None:
            return
        if self._copied is not None and self._stream is not None:
            self._stream.wait_event(self._copied)
        self._group.offloader.count("device", -self._device.nbytes)
        self._device = None

    def storage(self) -> torch.Tensor:
        """The bytes on the device, for the current stream; the previous group's follow."""
        window = self._group.window
        window.move_to(self._group)
        assert self._device is not None
        stream = window.compute_stream()
        if stream is not None:
            if self._copied is not None:
                stream.wait_event(self._copied)
            if stream != self._stream:
                self._device.record_stream(stream)
        return self._device

    def __del__(self) -> None:
        self._drop()
        if self._host is not None:
            self._group.offloader.give(self._host, self._group.window.stream)


class _Window:
    """Which groups may have tensors on a device: two at most, of all models."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.newest: Callable[[], Group | None] = lambda: None
        self._resident: list[weakref.ref[Group]] = []

    def compute_stream(self) -> torch.cuda.Stream | None:
        """The stream that the caller computes on; None on the CPU."""
        return None if self.stream is None else torch.cuda.current_stream(self.device)

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Stream | None
    ) -> torch.cuda.Event | None:
        """Copy behind what the stream ``after`` has been given; the event marks the end."""
        if self.stream is None or after is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(after)
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def open(self, offloader: Offloader, stay: set[int]) -> Group:
        """A new group, forward: the one before starts for the host, others leave the device."""
        previous, group = self.newest(), Group(offloader, self, stay)
        self._keep(previous, group)
        if previous is not None:
            previous.copy_to_host()
        self.newest = weakref.ref(group)
        return group

    def move_to(self, group: Group) -> None:
        """Backward has come to ``group``: it and the one before are fetched, others leave."""
        previous = group.previous()
        self._keep(previous, group)
        group.fetch()
        if previous is not None:
            previous.fetch()

    def _keep(self, *groups: Group | None) -> None:
        for reference in self._resident:
            resident = reference()
            if resident is not None and resident not in groups:
                resident.leave_device()
        self._resident = [weakref.ref(group) for group in groups if group is not None]


@functools.cache
def _window(device: torch.device) -> _Window:
    return _Window(device)


def _is_plain(value: Any) -> bool:
    """A tensor with memory of its own, not a subclass that wraps others (DTensor, torchao's)."""
    return isinstance(value, torch.Tensor) and not (
        torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)
    )


def host_memory() -> tuple[int, int]:
    """Bytes of host memory (available, in all): of the machine, or of its control group if less.

    Without Linux's files, both are as good as unlimited.
    """
    available = total = 1 << 62
    with contextlib.suppress(OSError, KeyError):
        sizes = _fields("/proc/meminfo")
        available, total = sizes["MemAvailable"] << 10, sizes["MemTotal"] << 10
    for group, most, now in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max": no limit
            limit, used = (int(Path(group, name).read_text()) for name in (most, now))
            stat = _fields(f"{group}/memory.stat")
            used -= stat["inactive_file"] + stat["active_file"]  # given up before others are
            available, total = min(available, limit - used), min(total, limit)
    return available, total


def _fields(path: str) -> dict[str, int]:
    """Name and number of each line."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {name.rstrip(":"): int(number) for name, number, *_ in lines}


def _page_locked(nbytes: int, stream: torch.cuda.Stream) -> torch.Tensor:
    """Page-locked memory of that size; ``pin_memory=True`` would round it up to a power of two."""
    # Whole pages of its own: no page can be locked twice.
    memory = torch.empty(nbytes + 2 * mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    buffer = memory[start : start + nbytes]
    address, runtime = buffer.data_ptr(), torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(address, nbytes + -nbytes % mmap.PAGESIZE, 0))
    if code != 0:
        # CUDA remembers the error, and the next kernel would report it as its own.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=stream.device)
        raise HostMemoryError(
            f"CUDA could not lock {nbytes} bytes of host memory (error {code}); lower host_limit, "
            "or use offload=None"
        )

    def unlock() -> None:
        stream.synchronize()
        runtime.cudaHostUnregister(address)

    # At the process's end the CUDA context may be gone, and the memory goes with the process.
    weakref.finalize(buffer, unlock).atexit = False
    return buffer
