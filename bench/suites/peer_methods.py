"""Apply memory methods of other libraries to a diffusers model on a CPU.

A move to the device ``cpu:0`` copies a tensor on a CPU, while a move to ``cpu`` returns the tensor
itself. So diffusers runs its own code with ``cpu:0`` as both devices. Two methods whose code needs
CUDA streams follow their sources without them: :class:`BlockSwap`, the algorithm of musubi-tuner's
``ModelOffloader`` with pinned memory, and :class:`OffloadedActivations`, that of TRL's
``OffloadActivations``. Both copy with ``Tensor.copy_``, so that a ledger sees the copies.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from harness import UnavailableError
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from prfl_fast.memory.checkpointing import is_attention
from prfl_fast.memory.ledger import HOST, mark
from prfl_fast.utils.adapters import adapter_parameters
from prfl_fast.utils.optional import need
from prfl_fast.utils.recompute import recomputed

Running = Callable[[], contextlib.AbstractContextManager[None]]  # entered for each step
COPYING = torch.device("cpu:0")
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty_like(tensor)
    mark(host, HOST)
    return host


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hide the warning that the first block's input needs no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        yield


def _weights(block: nn.Module, without: set[int]) -> list[torch.Tensor]:
    """Return the tensors of a block's modules that are named ``weight``."""
    found = (getattr(module, "weight", None) for module in block.modules())
    unique = {id(weight): weight for weight in found if weight is not None}
    return [weight for key, weight in unique.items() if key not in without]


class BlockSwap:
    """Keep the weights of ``swapped`` of N blocks on the host; two blocks at a time exchange them.

    Before a step, the device has the first N - swapped blocks. In the forward, block i < swapped
    gives its device memory to block N - swapped + i when it has run; the backward undoes this in
    reverse order. Only tensors named ``weight`` move, and not those of adapters, which musubi-tuner
    keeps outside the model. Blocks are recomputed in the backward.
    """

    def __init__(self, model: Any, swapped: int) -> None:
        self._blocks, self._swapped = list(model.blocks), swapped
        depth = len(self._blocks)
        adapters = {id(p) for _, p in adapter_parameters(model)}
        self._weights = [_weights(block, adapters) for block in self._blocks]
        for weights in self._weights[depth - swapped :]:
            for weight in weights:
                weight.data = _host_like(weight.data).copy_(weight.data)
        self._free = [_host_like(weight.data) for weight in self._weights[0]]
        for index, block in enumerate(self._blocks):
            block.register_full_backward_hook(self._after_backward(index))
        model.enable_gradient_checkpointing(self._run)

    def _run(self, block: nn.Module, *args: Any) -> Any:
        out = recomputed(block, *args)
        index = self._blocks.index(block)
        if index < self._swapped:
            self._exchange(index, len(self._blocks) - self._swapped + index)
        return out

    def _after_backward(self, index: int) -> Callable[..., None]:
        done = len(self._blocks) - 1 - index

        def hook(*_: Any) -> None:
            if 0 < done <= self._swapped:
                self._exchange(index + 1, self._swapped - done)

        return hook

    def _exchange(self, leaves: int, enters: int) -> None:
        """Give the device memory of block ``leaves`` to block ``enters``."""
        pairs = list(zip(self._weights[leaves], self._weights[enters], strict=True))
        for buffer, (old, _) in zip(self._free, pairs, strict=True):
            buffer.copy_(old.data)
        for place, (old, new) in enumerate(pairs):
            device, host = old.data, new.data
            device.copy_(host)
            new.data, old.data = device, self._free[place]
            self._free[place] = host


class OffloadedActivations:
    """Copy each saved tensor to the host and back, except parameters and small tensors.

    A storage that is saved twice is copied once; the second tensor keeps it on the device. The last
    ``stash`` tensors of a forward stay on the device, where the first node of the backward finds
    them. A node's tensors stay until the next node has run.
    """

    def __init__(self, model: nn.Module, smallest: int = 1024, stash: int = 5) -> None:
        self._model, self._smallest, self._most = model, smallest, stash

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        stay = {p.untyped_storage()._cdata for p in self._model.parameters()}
        # The source compares addresses, also those of memory that was freed and used again.
        copied: dict[tuple[int, int, torch.dtype], weakref.ref[Any]] = {}
        stash: dict[int, torch.Tensor] = {}
        nodes: list[Any] = []
        held: list[list[torch.Tensor]] = []
        count = 0

        def pack(tensor: torch.Tensor) -> tuple[int, torch.Tensor, tuple[int, ...] | None]:
            nonlocal count
            count += 1
            storage = tensor.untyped_storage()
            key = storage._cdata, tensor.storage_offset(), tensor.dtype
            known = copied.get(key, lambda: None)() is not None
            if known or tensor.nbytes < self._smallest or storage._cdata in stay:
                return count, tensor, None
            for number in [n for n in stash if n <= count - self._most]:
                del stash[number]
            stash[count], copied[key] = tensor, weakref.ref(storage)
            return count, _host_like(tensor).copy_(tensor), tensor.stride()

        def unpack(saved: tuple[int, torch.Tensor, tuple[int, ...] | None]) -> torch.Tensor:
            number, tensor, stride = saved
            if stride is None:
                return tensor
            node = torch._C._current_autograd_node()
            if node not in nodes[-1:]:
                nodes[:], held[:] = [node], [*held[-1:], []]
                node.register_hook(lambda *_: stash.clear())
            if number in stash:
                return stash[number]
            back = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
            held[-1].append(back)
            return back

        with saved_tensors_hooks(pack, unpack):
            yield


def checkpoint_selectively(model: Any, *, every_second_product: bool) -> None:
    """Recompute blocks, but save their attention and, if asked for, every second product."""

    def contexts() -> Any:
        products = {True: 0, False: 0}

        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            save = is_attention(op)
            if every_second_product and op._schema.name in _PRODUCTS:
                products[ctx.is_recompute] += 1
                save = products[ctx.is_recompute] % 2 == 1
            return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    model.enable_gradient_checkpointing(
        lambda block, *args: recomputed(block, *args, context_fn=contexts)
    )


def offload_groups(model: nn.Module, kind: str, *, prefetch: bool) -> Running:
    """Call diffusers' group offload; return a context in which the model runs."""
    source = need("diffusers.hooks.group_offloading", "bench")
    if not hasattr(source, "TorchDeviceBackend"):
        raise UnavailableError("group offload without streams needs diffusers 0.42 or later")
    on_device: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def only_if(present: bool, move: Callable[[Any], None]) -> Callable[[Any], None]:
        """Skip moves of groups that are already in place, as ``Tensor.to`` does on a GPU."""

        def run(group: Any) -> None:
            if on_device.get(group, True) == present:
                move(group)
            on_device[group] = not present

        return run

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        return _host_like(tensor).copy_(tensor)

    group = source.ModuleGroup
    changes = [
        (group, "onload_", only_if(False, group.onload_)),
        (group, "offload_", only_if(True, group.offload_)),
        (source, "send_to_device", lambda value, *_, **__: value),  # the inputs are on the device
        (source, "TorchDeviceBackend", lambda device: mock.MagicMock()),
        (torch.Tensor, "pin_memory", pin),
        (torch.Tensor, "is_pinned", lambda tensor: True),
    ]

    @contextlib.contextmanager
    def on_cpu() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(mock.patch.object(*change))
            yield

    config = source.GroupOffloadingConfig(
        onload_device=COPYING,
        offload_device=COPYING,
        offload_type=source.GroupOffloadingType(kind),
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=False,
        num_blocks_per_group=1,
        stream=mock.Mock() if prefetch else None,
    )
    with on_cpu():
        source._apply_group_offloading(model, config)
    return on_cpu
