"""Count the FLOPs and bytes of a program by phase, as on a CUDA device."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.flop_counter import flop_registry, shape_wrapper

from prfl_fast.kernels.attn.exact import heads_of_call
from prfl_fast.memory.ledger import HOST, Ledger, tensors_in
from prfl_fast.utils.flops import CPU_ATTENTION_BACKWARD, UNCOUNTED_FLOPS

# PyTorch allocates at most this much for cuBLAS: 32 MiB on sm90, less on older GPUs.
CUBLAS_BYTES = 32 << 20


@dataclass(frozen=True)
class Cost:
    """Work of a phase.

    Attributes:
        matmul_flops: FLOPs of matrix products and convolutions.
        attention_flops: FLOPs of attention forwards.
        moved_bytes: bytes read and written by all other operations.
        to_host_bytes, to_device_bytes: bytes copied between device and host.
        attention_backward_flops: FLOPs of attention backwards, which have five products.
        launches: operations that compute or write; each launches at least one kernel.
        gathered_bytes, reduced_bytes, exchanged_bytes: bytes that a rank receives in all-gathers,
            in sums over ranks (reduce-scatter, all-reduce), and in all-to-alls.
    """

    matmul_flops: int = 0
    attention_flops: int = 0
    moved_bytes: int = 0
    to_host_bytes: int = 0
    to_device_bytes: int = 0
    attention_backward_flops: int = 0
    launches: int = 0
    gathered_bytes: int = 0
    reduced_bytes: int = 0
    exchanged_bytes: int = 0

    @property
    def flops(self) -> int:
        """Return the FLOPs of matrix products, convolutions and attention."""
        return self.matmul_flops + self.attention_flops + self.attention_backward_flops


def _kind(name: str) -> str:
    """Return the field of ``Cost`` for the FLOPs of an operation."""
    if "attention" not in name:
        return "matmul_flops"
    return "attention_backward_flops" if "backward" in name else "attention_flops"


def kernel_scratch(packet: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that CUDA kernels allocate inside an operation, invisible to a ledger."""
    copied = 0
    if packet is torch.ops.prfl_fast.attention_backward:
        _, q, k, _, _, _, heads, *_ = args
        batch, length, width = q.shape
        group = heads_of_call(q, heads)
        if group < heads:
            # The three gradients of a group, and its grad and out, which PyTorch's own
            # FlashAttention copies. The package flash-attn does not copy them.
            copied = q.itemsize * batch * (3 * length + 2 * k.shape[1]) * width // heads * group
            width, heads = width // heads * group, group
    elif packet is CPU_ATTENTION_BACKWARD:
        batch, heads, length, size = args[1].shape
        width = heads * size
    else:
        return 0
    # The backward of FlashAttention 2 and 3 and of cuDNN accumulates d_q in float32, [B, L, D], and
    # keeps δ and the log-sum-exp in float32, [B, heads, L] each, with L padded to 128.
    return 4 * batch * -(-length // 128) * 128 * (width + 2 * heads) + copied


# Field of Cost, and how often a rank receives the others' parts of the largest tensor.
_COLLECTIVES = {
    "allgather": ("gathered_bytes", 1),
    "reduce_scatter": ("reduced_bytes", 1),
    "allreduce": ("reduced_bytes", 2),  # a reduce-scatter and an all-gather
    "alltoall": ("exchanged_bytes", 1),
}


def received_bytes(name: str, args: tuple[Any, ...]) -> dict[str, int]:
    """Return the bytes that a rank receives in a collective ``c10d::…``, by field of ``Cost``."""
    kind = name.removeprefix("c10d::").strip("_")
    for start, (field, times) in _COLLECTIVES.items():
        if kind.startswith(start):
            groups = [a for a in args if isinstance(a, torch.ScriptObject)]
            ranks = dist.ProcessGroup.unbox(groups[0]).size()
            largest = max(tensor.nbytes for tensor in tensors_in(args))
            return {field: times * largest * (ranks - 1) // ranks}
    return {}


class CostLedger(Ledger):
    """Ledger of a CUDA device that also sums the work of each phase.

    A fused operation counts as one kernel that reads its arguments and writes its results once.
    Memory that kernels allocate internally is counted by formula.

    Attributes:
        counts: False while work is not counted, only bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = True
        self._work: dict[str, dict[str, int]] = {}
        own = {packet: shape_wrapper(formula) for packet, formula in UNCOUNTED_FLOPS.items()}
        self._formulas = {**flop_registry, **own}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operation passes two wrappers that keep compiled code out

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return self.run(func, args, kwargs or {})

    def costs(self) -> dict[str, Cost]:
        """Return costs by phase, without the work before the first phase."""
        return {phase: Cost(**work) for phase, work in self._work.items() if phase}

    def count(self, **work: int) -> None:
        """Add work to the current phase."""
        total = self._work.setdefault(self.phase, {})
        for name, amount in work.items() if self.counts else ():
            total[name] = total.get(name, 0) + amount

    def on_operation(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[torch.Tensor],
        fresh: list[torch.Tensor],
        out: Any,
    ) -> None:
        name, packet = func._schema.name, func._overloadpacket
        if func.namespace == "c10d":
            return self.count(**received_bytes(name, args))
        formula = self._formulas.get(packet)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            self.count(**{_kind(name): flops}, launches=1)
        if formula is None or "query_pool" in name:  # the pool reads far more than it computes
            self._count_moved(func, name, given, fresh)
        scratch = kernel_scratch(packet, args)
        if scratch:
            self.add_transient(scratch)

    def _count_moved(
        self, func: Any, name: str, given: list[torch.Tensor], fresh: list[torch.Tensor]
    ) -> None:
        if name.startswith(("aten::empty", "aten::new_empty")):  # allocates and writes nothing
            return
        if name == "aten::copy_":
            to_host, from_host = (self.category_of(t) == HOST for t in given[:2])
            if to_host != from_host:
                way = "to_host_bytes" if to_host else "to_device_bytes"
                return self.count(**{way: _touched(given[1])})
        written = [*fresh]
        if func._schema.is_mutable:
            written += given[:1] if "foreach" not in name else given[: len(given) // 2]
        if written:  # a view writes nothing
            moved = sum(map(_touched, given)) + sum(map(_touched, written))
            self.count(moved_bytes=moved, launches=1)


def _touched(tensor: torch.Tensor) -> int:
    """Return the bytes of one pass over a tensor; repeated elements (stride 0) count once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride) * tensor.element_size()
