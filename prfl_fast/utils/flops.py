"""Count the FLOPs of real computations."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[2] * size


def _attention_backward_flops(grad: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    return 5 * _attention_flops(query, key) // 2  # five products, as in the CUDA kernels


# PyTorch counts the FLOPs of attention on CUDA, but not on the CPU.
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    CPU_ATTENTION_BACKWARD: _attention_backward_flops,
}


def flop_counter() -> FlopCounterMode:
    """Return a context that counts products of matrices, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping=CPU_FLOPS)
