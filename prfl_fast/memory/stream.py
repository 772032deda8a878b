"""Keep the weights of transformer blocks in host memory and copy each block in when it runs.

The parameters of a block are parts of one page-locked host buffer. Before the block runs (forward,
recompute, or a backward that reads saved weights), the buffer is copied into a slot on the device,
and the parameters point there until the block has run. While block k runs, the next ``ahead``
blocks are copied: k+1 in a forward, k-1 in a backward. All models on a device share its slots, so
the weights of a reward model take no memory of their own outside its calls.

A tensor that autograd saves may be a view of a slot, which holds another block when the backward
reads it. Such a tensor is saved as its block and its place there, and found again in the slot that
holds the block then (:meth:`BlockWeights.pack`, called by :mod:`prfl_fast.memory.checkpointing`). A
checkpointed block needs no such care: nothing but its inputs is saved, and what its recompute saves
is read before another block is needed.

Frozen weights are copied in one direction only. Gradients of trained weights are copied out when
they are complete, while the backward continues, and an optimizer updates the host's weights; a
block whose weights changed is copied again. Parameters that are added to a block later, like LoRA,
stay on the device.

On CUDA, weights are copied on one stream and gradients on another. A copy of weights waits for the
last kernel that reads the slot, and the block's first kernel waits for the copy. On the CPU, copies
are ordinary ones. All models on a device must run on one thread and one stream. No GPU has run this
module yet.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from prfl_fast.memory.host_copies import Copies, HostGradients
from prfl_fast.memory.host_weights import check_can_wait, weight_parts
from prfl_fast.memory.ledger import HOST, mark
from prfl_fast.memory.offload import Handle
from prfl_fast.models.block_adapter import unwrap_block
from prfl_fast.models.registry import find_blocks
from prfl_fast.utils.checks import check_count
from prfl_fast.utils.modules import STREAMED, device_of


class _Slot:
    """Device memory for the weights of one block."""

    def __init__(self, memory: torch.Tensor, used: Any) -> None:
        self.memory = memory
        self.used, self.copied = used, None  # events: end of its last reader, of the copy into it
        self.block: BlockWeights | None = None
        self.views: weakref.WeakKeyDictionary[BlockWeights, list[torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )


class Slots:
    """Slots of a device, the least recently used first; the last one holds the block that runs."""

    def __init__(self, copies: Copies) -> None:
        self.copies = copies
        self.order: list[_Slot] = []
        self.copied_bytes = 0

    def fit(self, nbytes: int, count: int) -> None:
        """Make at least ``count`` slots of at least ``nbytes`` each."""
        size = max([nbytes, *(slot.memory.nbytes for slot in self.order)])
        for slot in [slot for slot in self.order if slot.memory.nbytes < size]:
            self._empty(slot)
            self.order.remove(slot)
            count = max(count, len(self.order) + 1)
        while len(self.order) < count:
            memory = torch.empty(size, dtype=torch.uint8, device=self.copies.device)
            if self.copies.stream is not None:  # so that freed memory waits for a copy into it
                memory.record_stream(self.copies.stream)
            mark(memory, "weights")
            self.order.append(_Slot(memory, self.copies.reached()))

    @staticmethod
    def _empty(slot: _Slot) -> None:
        if slot.block is not None:
            slot.block.slot = None
        slot.block = None

    def take(self, block: "BlockWeights") -> _Slot:
        """Return the slot with a block for the compute stream; start copies of the next blocks."""
        slot = self.order[-1]
        if slot.block is block and not block.changed():
            return slot
        slot.used = self.copies.reached()
        if block.slot is None or block.changed():
            self._load(block, set())
        assert block.slot is not None  # _load found one: only blocks that run hold their slots
        slot = block.slot
        self.copies.wait(slot.copied)
        kept = {slot}
        for other in block.next_blocks():
            if other.slot is None:
                self._load(other, kept)
            if other.slot is not None:
                kept.add(other.slot)
        self.order.remove(slot)
        self.order.append(slot)
        return slot

    def _load(self, block: "BlockWeights", kept: set[_Slot]) -> None:
        """Copy a block into the slot whose last use is longest ago; not if all are ``kept``."""
        free = [s for s in self.order if s not in kept and (s.block is None or not s.block.depth)]
        slot = block.slot or next(iter(free), None)
        if slot is None:
            return
        self._empty(slot)
        size = block.host.nbytes
        slot.copied = self.copies.copy(slot.memory[:size], block.host, slot.used)
        self.copied_bytes += size
        slot.block, block.slot = block, slot
        block.version = block.current_version()

    def release(self, block: "BlockWeights") -> None:
        """Forget a block."""
        if block.slot is not None:
            self._empty(block.slot)


class BlockWeights:
    """Weights of one block, in host memory and at times in a slot.

    Attributes:
        host: the bytes in host memory.
        slot: the slot that holds a copy, or None.
        version: versions of the parameters when they were copied.
        depth: number of open contexts of :meth:`present`.
    """

    def __init__(self, block: nn.Module, slots: Slots, ring: "_Ring") -> None:
        self.slots, self.ring, self.index = slots, ring, len(ring.blocks)
        ring.blocks.append(self)
        self.slot: _Slot | None = None
        self.version = self.depth = 0
        self.saved_by_place = False  # True if this call saves tensors by pack, or saves none
        self._parts = weight_parts(block)
        self._layouts: list[tuple[torch.dtype, int, torch.Size, tuple[int, ...]]] = []
        size = 0
        for part in self._parts:
            part.move(slots.copies.device)
            tensor = part.tensor
            self._layouts.append((tensor.dtype, size, tensor.shape, tensor.stride()))
            size += part.aligned_bytes
        self.host = slots.copies.host_buffer(size)
        mark(self.host, HOST)
        self._views = self._views_of(self.host)
        for part, view in zip(self._parts, self._views, strict=True):
            part.point(view.copy_(part.tensor.data))
        self._gradients = HostGradients(slots.copies)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that wait in host memory."""
        return list({id(part.parameter): part.parameter for part in self._parts}.values())

    def _views_of(self, memory: torch.Tensor) -> list[torch.Tensor]:
        """Return the parameters' data in a host buffer or a slot."""
        return [
            memory.view(dtype).as_strided(shape, stride, start // dtype.itemsize)
            for dtype, start, shape, stride in self._layouts
        ]

    def current_version(self) -> int:
        """Return a number that increases with each in-place change of a parameter."""
        return sum(parameter._version for parameter in self.parameters())

    def changed(self) -> bool:
        """Return True if the host's weights were changed in place since they were copied."""
        return self.version != self.current_version()

    def next_blocks(self) -> list["BlockWeights"]:
        """Return the blocks that are likely to run after this one, in order."""
        return self.ring.after(self.index)

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Point the parameters at the device within the context."""
        self.depth += 1
        try:
            if self.depth == 1:
                self._enter()
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self._point(self._views)

    def _enter(self) -> None:
        home = self.host.untyped_storage()._cdata
        for part, view in zip(self._parts, self._views, strict=True):
            parameter, tensor = part.parameter, part.tensor
            if tensor.untyped_storage()._cdata != home:
                layouts = [(t.device, t.dtype, t.shape) for t in (tensor, view)]
                if layouts[0] != layouts[1]:
                    raise RuntimeError(
                        f"{part.name} of a {type(part.module).__name__} was moved or cast, "
                        "expected to wait in host memory as apply_memory left it. Call "
                        "apply_memory again"
                    )
                self.slots.release(self)  # new data on the host, as when peft merges an adapter
                part.point(view.copy_(tensor.data))
            if parameter.requires_grad and torch.is_grad_enabled():
                self._gradients.watch(parameter)
        if self.index == 0 and torch._C._current_graph_task_id() == -1:
            # Between two forwards peft may merge adapters through .data, which changes no version.
            # So the first block forgets all copies, and waits for its own.
            self.slots.copies.finish()  # a gradient of a backward that raised
            for block in self.ring.blocks:
                self.slots.release(block)
        slot = self.slots.take(self)
        if self not in slot.views:
            with torch.inference_mode(False):  # a later graph saves tensors of these views
                slot.views[self] = self._views_of(slot.memory)
        self._point(slot.views[self])

    def _point(self, views: list[torch.Tensor]) -> None:
        for part, view in zip(self._parts, views, strict=True):
            part.point(view)

    def storage(self) -> torch.Tensor:
        """Return the bytes on the device, for a saved tensor (:class:`offload.Handle`)."""
        return self.slots.take(self).memory

    def check_saved(self, out: Any) -> None:
        """Raise ``RuntimeError`` if a graph may hold views of a slot."""
        graph = any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves(out))
        if graph and not self.saved_by_place:
            raise RuntimeError(
                "a block whose weights wait in host memory ran with gradients, but not through "
                "prfl_fast's activation checkpointing, so its backward would read weights of "
                "other blocks. Call prfl_fast.memory.activation_checkpointing after "
                "enable_gradient_checkpointing or disable_gradient_checkpointing"
            )

    def pack(self, tensor: torch.Tensor, otherwise: Callable[[torch.Tensor], Handle]) -> Handle:
        """Save a tensor by its place in the slot; call ``otherwise`` for other tensors."""
        slot = self.slot
        here = (
            slot is not None
            and tensor.device == slot.memory.device
            and not is_traceable_wrapper_subclass(tensor)
            and tensor.untyped_storage()._cdata == slot.memory.untyped_storage()._cdata
        )
        # The place is the same in every slot, and storage() returns the slot of that time.
        return Handle(tensor, self) if here else otherwise(tensor)  # type: ignore[arg-type]

    def close(self) -> None:
        """Give each parameter memory of its own again, on the host, and forget the slot."""
        self.slots.release(self)
        self._gradients.close()
        for part, view in zip(self._parts, self._views, strict=True):
            if part.tensor.untyped_storage()._cdata == self.host.untyped_storage()._cdata:
                part.point(view.clone())
        for part in self._parts:
            part.move(self.host.device)


def weight_bytes(block: nn.Module) -> int:
    """Return the bytes of a block that would wait in host memory, on the ``meta`` device too."""
    return sum(part.aligned_bytes for part in weight_parts(block))


class _Ring:
    """Blocks of one model in the order of its forward, of which ``ahead`` are copied early."""

    def __init__(self, ahead: int) -> None:
        self.blocks: list[BlockWeights] = []
        self.ahead, self._last = ahead, 0

    def after(self, index: int) -> list[BlockWeights]:
        """Return the blocks to copy when block ``index`` begins: the next ones, or those before."""
        end = len(self.blocks) - 1
        # A forward with gradient ends where its backward begins.
        step = -1 if index > 0 and (index < self._last or index == end) else 1
        self._last = index
        places = range(index + step, index + step * (self.ahead + 1), step)
        return [self.blocks[place] for place in places if 0 <= place <= end]


# Keys: device, and True for fake tensors. Models share the slots, which live as long as a model.
_slots: "weakref.WeakValueDictionary[tuple[torch.device, bool], Slots]" = (
    weakref.WeakValueDictionary()
)


def stream_weights(
    model: nn.Module, ahead: int | None, device: torch.device | str | None = None
) -> None:
    """Keep the weights of blocks in host memory, and copy ``ahead`` blocks early; None undoes it.

    All other parameters and buffers move to ``device``; None is the model's device. After an undo
    the weights are ordinary parameters in host memory. Call :func:`activation_checkpointing`
    afterwards.

    Raises:
        ValueError: if a block has a weight of a tensor subclass, except for frozen ones of torchao.
    """
    check_streaming(model, ahead)
    home = torch.empty(0, device=device_of(model) if device is None else device).device
    blocks = [unwrap_block(block) for block in find_blocks(model).blocks(model)]
    for block in blocks:
        streamed = block.__dict__.get(STREAMED)
        if streamed is not None:
            streamed.close()
            type(block).leave(block)
    if ahead is None:
        return
    key = (home, any(isinstance(p, FakeTensor) for p in model.parameters()))
    slots = _slots.get(key)
    if slots is None:
        slots = _slots[key] = Slots(Copies(home, fake=key[1]))
    ring = _Ring(ahead)
    waiting: set[int] = set()
    for block in blocks:
        weights = BlockWeights(block, slots, ring)
        waiting.update(map(id, weights.parameters()))
        before: Any = type(block)
        block.__class__ = _streamed_class(before)
        for module in block.modules():
            module.__dict__[STREAMED] = weights
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(home)
    slots.fit(max(weights.host.nbytes for weights in ring.blocks), ahead + 1)


def check_streaming(model: nn.Module, ahead: int | None) -> None:
    """Raise the errors of :func:`stream_weights`, and change nothing."""
    blocks = find_blocks(model).blocks(model)
    if ahead is not None:
        check_count("stream_weights", ahead)
        for block in blocks:
            check_can_wait(unwrap_block(block))


def waiting_weights(model: nn.Module) -> list[BlockWeights]:
    """Return the weights of each block that wait in host memory, in order."""
    blocks = map(unwrap_block, find_blocks(model).blocks(model))
    found = [block.__dict__.get(STREAMED) for block in blocks]
    return [weights for weights in found if weights is not None]


@functools.cache
def _streamed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a block's class that copies the weights in for each call."""

    # A class, because hooks of a module run for few exceptions, and replaced forwards are reserved
    # for those of prfl_fast and the user. FSDP2 changes the class of a block in the same way.
    class Streamed(kind):  # type: ignore[valid-type, misc]
        @torch._disable_dynamo
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            weights = self.__dict__[STREAMED]
            try:
                with weights.present():
                    out = super().__call__(*args, **kwargs)
                # A backward that recomputes the block reads no saved tensor of this call.
                if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                    weights.check_saved(out)
                return out
            finally:
                weights.saved_by_place = False

        def leave(self) -> None:
            for module in self.modules():
                module.__dict__.pop(STREAMED, None)
            self.__class__ = kind  # type: ignore[assignment]

        def __deepcopy__(self, memo: object) -> Any:
            raise ValueError(
                f"a {kind.__name__} whose weights wait in host memory cannot be copied or pickled. "
                "Copy the model before apply_memory with stream_weights"
            )

        __reduce_ex__ = __deepcopy__  # type: ignore[assignment]

    Streamed.__name__, Streamed.__qualname__ = kind.__name__, kind.__qualname__
    Streamed.__module__ = kind.__module__
    return Streamed
