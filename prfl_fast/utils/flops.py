"""Count the FLOPs of real computations."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _attention_flops(query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    batch, heads, length, size = query
    return 4 * batch * heads * length * key[2] * size


def _attention_backward_flops(grad: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> int:
    return 5 * _attention_flops(query, key) // 2  # five products, as in the CUDA kernels


def _product_flops(total: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


# PyTorch counts the FLOPs of attention on CUDA but not on the CPU, and those of addmm and baddbmm
# but not in place, as projections of one input sum its gradients: 0.14 of the 5.48 PFLOP of a full
# backward of 14B at 480p.
CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
UNCOUNTED_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    CPU_ATTENTION_BACKWARD: _attention_backward_flops,
    torch.ops.aten.addmm_: _product_flops,
    torch.ops.aten.baddbmm_: _product_flops,
}


def flop_counter() -> FlopCounterMode:
    """Return a context that counts products of matrices, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping=UNCOUNTED_FLOPS)
