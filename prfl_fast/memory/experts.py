"""Keep one of two experts on the device and the other in host memory.

Both experts have tensors of the same layouts, so they exchange memory tensor by tensor: one tensor
is copied to a spare host buffer, and the other is copied to its place on the device. The device
holds the bytes of one expert, and the host those of one expert plus one spare buffer per layout.
LoRA that is added later stays on the device, like its optimizer states.

On CUDA the host memory is page-locked, and copies run on the compute stream. On the CPU they are
ordinary copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from prfl_fast.memory.ledger import HOST, mark
from prfl_fast.memory.offload import _page_locked
from prfl_fast.memory.quantized import WeightDtype, layouts_after
from prfl_fast.models.experts import Experts, check_separate, members
from prfl_fast.utils.checks import check


class ExpertSwap:
    """Exchange two experts between device and host; set as ``swap`` of :class:`Experts`.

    Expert ``high`` is on the device first. ``prepare`` moves an expert to the device. Call
    :func:`check_exchange` before.

    Attributes:
        swaps: number of exchanges so far.
        host: bytes of host buffers.
        one: bytes of one expert. An exchange copies this number in each direction.
    """

    def __init__(self, experts: Experts, prepare: Callable[[nn.Module], object]) -> None:
        self.swaps = self.host = 0
        # Kept, because page-locked memory is unlocked when its first tensor is deleted.
        self._buffers: list[torch.Tensor] = []
        self._spare: dict[Any, torch.Tensor] = {}
        prepare(experts.low)
        low = moved_tensors(experts.low)
        for tensor in low:
            host = self._buffer(tensor)
            tensor.data = host.copy_(tensor.data)
        prepare(experts.high)
        high = moved_tensors(experts.high)
        self.one = sum(tensor.nbytes for tensor in high)
        # One entry per pair, so that an interrupted exchange can be finished.
        self._on_device = ["high"] * len(high)
        self._pairs = [{"high": h, "low": n} for h, n in zip(high, low, strict=True)]

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        """Return host memory in the layout of a tensor."""
        if like.device.type == "cuda" and not isinstance(like, FakeTensor):
            stream = torch.cuda.current_stream(like.device)
            self._buffers.append(_page_locked(like.nbytes, stream))
            host = self._buffers[-1].view(like.dtype).as_strided(like.shape, like.stride())
        else:
            host = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")
        self.host += like.nbytes
        mark(host, HOST)
        return host

    @torch.no_grad()
    def __call__(self, name: str) -> None:
        """Put the expert ``name`` on the device and the other into host memory."""
        if all(there == name for there in self._on_device):
            return
        device = None
        for index, pair in enumerate(self._pairs):
            if self._on_device[index] == name:
                continue
            comes, leaves = pair[name], pair["low" if name == "high" else "high"]
            layout, place = _layout(leaves), leaves.data
            spare = self._spare[layout] if layout in self._spare else self._buffer(leaves)
            spare.copy_(place, non_blocking=True)
            place.copy_(comes.data, non_blocking=True)
            self._spare[layout] = comes.data
            comes.data, leaves.data = place, spare
            self._on_device[index], device = name, place.device
        if device is not None and device.type == "cuda":  # the host may read its tensors after this
            torch.cuda.current_stream(device).synchronize()
        self.swaps += 1


def check_exchange(experts: Experts, kind: WeightDtype) -> None:
    """Raise ``ValueError`` if experts whose weights get this dtype cannot exchange their memory.

    They can if they share no parameter, and their tensors have equal shapes, strides and dtypes.
    """
    check_separate(experts, "one expert waits in host memory")
    high, low = (layouts_after(expert, kind) for expert in members(experts))
    hint = "Apply one memory policy to both experts before LoRA"
    check(high == low, "low", "a model of other dtypes or shapes", "the layouts of high", hint=hint)


def moved_tensors(expert: nn.Module) -> list[torch.Tensor]:
    """Return the parameters and buffers of an expert that an exchange moves."""
    return [t for t in (*expert.parameters(), *expert.buffers()) if t.numel()]


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def host_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of host memory for an expert with these tensors, spare buffers included."""
    spare = {_layout(tensor): tensor.nbytes for tensor in tensors}
    return sum(tensor.nbytes for tensor in tensors) + sum(spare.values())
