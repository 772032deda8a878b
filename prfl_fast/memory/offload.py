"""Offload tensors that transformer blocks save for their backward to host memory.

Each block call has one group of storages. While block k runs forward, the storages of block k-1 are
copied to the host; before block k+1 begins, the storages of block k-1 are freed on the device. In
the backward, the first tensor that block k reads frees the storages of block k+1 and starts the
copies of block k-1 to the device. The device thus holds the saved tensors of two blocks at most,
at any depth. The blocks of all models on a device count as one sequence.

Ownership: the graph owns handles, a handle owns its storage, a storage owns its memory on the
device and on the host. All of it is therefore freed when a graph ends, by its backward, an
exception or the last reference to it. The window and the pool hold no tensor of a graph.

On CUDA, copies run on a separate stream. Device memory belongs to the compute stream, which waits
for the last copy before it frees the memory. Only the copy stream uses the page-locked host memory,
so a buffer can be reused at once. On the CPU, copies are synchronous. All models on a device must
train on one thread.
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

from prfl_fast.memory.ledger import mark

SMALLEST = 64 << 10  # bytes; smaller storages are not worth a copy and stay on the device
RESERVE = 0.1  # fraction of the host's memory that stays free unless a limit is given


class HostMemoryError(RuntimeError):
    """Error for an offload that needs more host memory than is left."""


class Offloader:
    """Host buffers and byte counts of one model's blocks, within ``host_limit`` bytes.

    If the limit is None, it is the available memory at each use, minus a tenth of the machine's.
    """

    def __init__(self, host_limit: int | None = None) -> None:
        self.host_limit = host_limit
        self.bytes = dict.fromkeys(
            ("device_now", "device_peak", "host_now", "host_peak", "host_pool", "transferred"), 0
        )
        # By size and copy stream: a buffer can be reused at once on the stream that used it.
        self._free: defaultdict[tuple[int, torch.cuda.Stream | None], list[torch.Tensor]] = (
            defaultdict(list)
        )

    def open(self, block: nn.Module, x: torch.Tensor, shared: Iterable[Any]) -> "Group":
        """Return the group of one call of a block with input ``x``, ``[B, L, D]``.

        Tensors in ``shared``, parameters and buffers stay on the device. A stream that is a view of
        the same storage as ``x`` (HunyuanVideo's text in single-stream blocks) leaves with it.
        """
        stay = {
            t.untyped_storage()._cdata
            for t in (*shared, *block.parameters(), *block.buffers())
            if _is_plain(t)
        }
        if _is_plain(x):
            stay.discard(x.untyped_storage()._cdata)
        return _window(x.device).open(self, stay)

    def count(self, place: str, nbytes: int) -> None:
        """Add to the bytes held at ``place``."""
        now, peak = f"{place}_now", f"{place}_peak"
        self.bytes[now] += nbytes
        self.bytes[peak] = max(self.bytes[peak], self.bytes[now])

    def take(self, source: torch.Tensor, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """Return a host buffer of the source's size, or raise :class:`HostMemoryError`."""
        nbytes = source.nbytes
        if self._free[nbytes, stream]:
            buffer = self._free[nbytes, stream].pop()
        else:
            # A simulation of another machine must not depend on the memory of this one.
            if not isinstance(source, FakeTensor) or self.host_limit is not None:
                self._make_room(nbytes)
            if stream is None:
                buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            else:
                buffer = _page_locked(nbytes, stream)
            self.bytes["host_pool"] += nbytes
        mark(buffer, "host")
        self.count("host", nbytes)
        return buffer

    def give(self, buffer: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        """Return a buffer to the pool."""
        self._free[buffer.nbytes, stream].append(buffer)
        self.count("host", -buffer.nbytes)

    def _limit(self) -> int:
        if self.host_limit is not None:
            return self.host_limit
        available, total = host_memory()
        return self.bytes["host_pool"] + max(0, int(available - RESERVE * total))

    def _make_room(self, nbytes: int) -> None:
        """Free buffers of other sizes if needed, and raise if that does not suffice."""
        if self.bytes["host_pool"] + nbytes <= self._limit():
            return
        self.bytes["host_pool"] -= sum(
            nbytes * len(free) for (nbytes, _), free in self._free.items()
        )
        self._free.clear()  # buffers of the wrong size cannot be split or joined
        held, limit = self.bytes["host_pool"], self._limit()
        if held + nbytes > limit:
            raise HostMemoryError(
                f"offloading asks for {nbytes} bytes of host memory with {held} bytes in use, "
                f"expected at most {limit} together (host_limit, or the available memory minus a "
                "tenth of the machine's). Raise host_limit, free host memory, choose mode "
                "'full', which saves least, or set offload=None"
            )


class Group:
    """Storages that one call of a block saves; their handles own them."""

    def __init__(self, offloader: Offloader, window: "_Window", stay: set[int]) -> None:
        self.offloader, self.window = offloader, window
        self.previous = window.newest
        self._stay = stay
        self._saved: weakref.WeakValueDictionary[tuple[int, int], _Saved] = (
            weakref.WeakValueDictionary()
        )

    def pack(self, tensor: torch.Tensor) -> "Handle":
        """Save a tensor's whole storage once; keep small or shared ones on the device."""
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
        key = (storage._cdata, tensor._version)  # a storage written in place is saved again
        saved = self._saved.get(key)
        if saved is None:
            saved = self._saved[key] = _Saved(self, tensor)
        return saved

    def copy_to_host(self) -> None:
        """Start copies of storages that are on the device only."""
        for saved in list(self._saved.values()):
            saved.copy_to_host()

    def leave_device(self) -> None:
        """Free the device memory of all storages."""
        for saved in list(self._saved.values()):
            saved.leave_device()

    def fetch(self) -> None:
        """Start copies of storages that are on the host only."""
        for saved in list(self._saved.values()):
            saved.fetch()


class Handle:
    """Stand-in of a saved tensor in the graph: its offloaded storage, or the tensor itself."""

    def __init__(self, tensor: torch.Tensor, saved: "_Saved | None" = None) -> None:
        self._saved, self._version = saved, tensor._version
        self._layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        self._dtype = tensor.dtype
        if isinstance(tensor, nn.Parameter):
            self._alias: torch.Tensor = tensor
            return
        # An alias shares the version counter, which detects later in-place changes. In a dispatch
        # mode, below autograd, it shares the counter only while this key is excluded.
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
            self._alias = tensor.detach()
        if saved is not None:  # the counter without the memory
            self._alias.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)

    def unpack(self) -> torch.Tensor:
        """Return the saved tensor; raise ``RuntimeError`` if it was modified in place since."""
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
    """One storage as bytes on the device, on the host, or both."""

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
        """Return the bytes on the device for the current stream; prefetch the group before."""
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
    """The groups with tensors on a device: two at most, over all models."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.newest: Callable[[], Group | None] = lambda: None
        self._resident: list[weakref.ref[Group]] = []

    def compute_stream(self) -> torch.cuda.Stream | None:
        """Return the caller's compute stream; None on the CPU."""
        return None if self.stream is None else torch.cuda.current_stream(self.device)

    def copy(
        self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Stream | None
    ) -> torch.cuda.Event | None:
        """Copy after the work queued on stream ``after``; return an event for the end."""
        if self.stream is None or after is None:
            target.copy_(source)
            return None
        self.stream.wait_stream(after)
        # Attention of a 14B block at 720p moves 1.56 GB: 31 ms at 50 GB/s, beside a predicted
        # 250 ms of forward and 600 ms of backward (bench/NOTES.md; not measured on a GPU).
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def open(self, offloader: Offloader, stay: set[int]) -> Group:
        """Open a group in the forward: copy the one before to the host, free the others."""
        previous, group = self.newest(), Group(offloader, self, stay)
        self._keep(previous, group)
        if previous is not None:
            previous.copy_to_host()
        self.newest = weakref.ref(group)
        return group

    def move_to(self, group: Group) -> None:
        """Fetch the backward's ``group`` and the one before it; free the others."""
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


@functools.cache  # one window per device, so that two models share its limit of two groups
def _window(device: torch.device) -> _Window:
    return _Window(device)


def _is_plain(value: Any) -> bool:
    """Return True for a tensor with memory of its own, not a wrapper (DTensor, torchao's)."""
    return isinstance(value, torch.Tensor) and not (
        torch.utils._python_dispatch.is_traceable_wrapper_subclass(value)
    )


def host_memory() -> tuple[int, int]:
    """Return (available, total) host memory in bytes, of the machine or its smaller cgroup."""
    available = total = 1 << 62  # on a system without the files below, as if unlimited
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
            # The kernel reclaims the page cache before it refuses memory.
            used -= stat["inactive_file"] + stat["active_file"]
            available, total = min(available, limit - used), min(total, limit)
    return available, total


def _fields(path: str) -> dict[str, int]:
    """Return the number on each line of a file by the line's name."""
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {name.rstrip(":"): int(number) for name, number, *_ in lines}


def _page_locked(nbytes: int, stream: torch.cuda.Stream) -> torch.Tensor:
    """Return page-locked host memory."""
    # pin_memory=True would round the size up to a power of two. The buffer has whole pages of its
    # own, because no page can be locked twice.
    memory = torch.empty(nbytes + 2 * mmap.PAGESIZE, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % mmap.PAGESIZE
    buffer = memory[start : start + nbytes]
    address, runtime = buffer.data_ptr(), torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(address, nbytes + -nbytes % mmap.PAGESIZE, 0))
    if code != 0:
        # Clear the error that CUDA keeps, or the next kernel would report it as its own.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=stream.device)
        raise HostMemoryError(
            f"CUDA could not lock {nbytes} bytes of host memory (error {code}). Lower host_limit, "
            "or set offload=None"
        )

    def unlock() -> None:
        stream.synchronize()
        runtime.cudaHostUnregister(address)

    # At exit the CUDA context may be gone already; the memory is freed with the process.
    weakref.finalize(buffer, unlock).atexit = False
    return buffer
