"""Keep one of two experts on the device and the other in host memory.

The experts have tensors of the same layouts, so they exchange the device's memory tensor by tensor:
one goes to a spare host buffer, the other takes its place. The device holds the bytes of one expert
at any time, the host those of one expert and one spare buffer of each layout. Adapters that are
added later stay on the device, where their optimizer is.

On CUDA the host memory is page-locked, and copies are queued on the compute stream. On the CPU they
are ordinary copies.
"""

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from prfl_fast.memory.ledger import mark
from prfl_fast.memory.offload import _page_locked
from prfl_fast.models.experts import Experts
from prfl_fast.utils.checks import check


class ExpertSwap:
    """Exchange the experts of a model; ``high`` is on the device, and ``low`` on the host, at first.

    Attributes:
        swaps: number of exchanges.
        copied: bytes copied to the device, and as many to the host.
        host: bytes of host memory.
    """

    def __init__(self, experts: Experts) -> None:
        self._pairs = list(zip(tensors_of(experts.high), tensors_of(experts.low), strict=True))
        same = all(_layout(high) == _layout(low) for high, low in self._pairs)
        hint = "Give both experts one memory policy"
        check(same, "low", "other dtypes or strides than high", "the same layouts", hint=hint)
        self.device = self._pairs[0][0].device
        self._held: dict[int, Any] = {}  # page-locked bytes stay so while they are referenced here
        for _, low in self._pairs:
            host = self._buffer(low)
            host.copy_(low.data)
            low.data = host
        self._spare: dict[Any, torch.Tensor] = {}
        self._on_device = [0] * len(self._pairs)  # by pair, so that an interrupt harms nothing
        self.swaps = self.copied = 0
        self._name = "high"

    @property
    def host(self) -> int:
        """Bytes of host buffers."""
        return sum(self._held.values())
