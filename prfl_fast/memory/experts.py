"""Keep one of two experts on the device and the other in host memory.

The experts have tensors of the same layouts, so they exchange memory tensor by tensor: one goes to
a spare host buffer, the other takes its place on the device. The device holds the bytes of one
expert at any time, the host those of one expert and a spare buffer of each layout. Adapters that
are added later stay on the device, where their optimizer states are.

On CUDA the host memory is page-locked, and the copies are queued on the compute stream. On the CPU
they are ordinary copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from prfl_fast.memory.ledger import HOST, mark
from prfl_fast.memory.offload import _page_locked
from prfl_fast.models.experts import Experts
from prfl_fast.utils.checks import check


class ExpertSwap:
    """Exchange of a model's experts, as its ``swap``; the expert ``high`` begins on the device.

    ``prepare`` moves an expert to the device. Each expert leaves before the other comes.

    Attributes:
        swaps: number of exchanges so far.
        host: bytes of host buffers.
        one: bytes of one expert, which an exchange copies in each direction.
    """

    def __init__(self, experts: Experts, prepare: Callable[[nn.Module], object]) -> None:
        self.swaps = self.host = 0
        # Page-locked memory is unlocked when its first tensor is deleted.
        self._buffers: list[torch.Tensor] = []
        self._spare: dict[Any, torch.Tensor] = {}
        shared = {*map(id, experts.high.parameters())} & {*map(id, experts.low.parameters())}
        check(not shared, "parameters that both experts hold", len(shared), "0: one of them waits")
        prepare(experts.low)
        low = moved_tensors(experts.low)
        for tensor in low:
            host = self._buffer(tensor)
            tensor.data = host.copy_(tensor.data)
        prepare(experts.high)
        high = moved_tensors(experts.high)
        hint = "Give both experts one memory policy, before adapters"
        same = list(map(_layout, high)) == list(map(_layout, low))
        check(same, "low", "a model of other dtypes or shapes", "the layouts of high", hint=hint)
        self.one = sum(tensor.nbytes for tensor in high)
        # By pair, so that an exchange that was interrupted can be finished.
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
        """Put an expert on the device and the other into host memory."""
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
        if device is not None and device.type == "cuda":  # the host may read its tensors now
            torch.cuda.current_stream(device).synchronize()
        self.swaps += 1


def moved_tensors(expert: nn.Module) -> list[torch.Tensor]:
    """Return the tensors of an expert that an exchange moves."""
    return [t for t in (*expert.parameters(), *expert.buffers()) if t.numel()]


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def host_bytes(tensors: list[torch.Tensor]) -> int:
    """Return the bytes of host memory in which an expert with these tensors waits."""
    spare = {_layout(tensor): tensor.nbytes for tensor in tensors}
    return sum(tensor.nbytes for tensor in tensors) + sum(spare.values())
