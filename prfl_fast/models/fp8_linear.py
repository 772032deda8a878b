"""Linear layer of training in FP8: products of e4m3 rows with a scale each, gradients included.

    y  = x Wᵀ + b    rows of x (tokens) and of W (output channels) are quantized
    dx = dy W        rows of dy (tokens) and columns of W (input channels) are quantized
    dW = dyᵀ x       in the dtype of x

Weights, their gradients and the names of parameters stay those of ``nn.Linear``. Scales are
computed in every call, so there is no state. A frozen weight has no third product, and x is not
saved for it.

``torchao.float8`` (0.18) has layers with the same scales, which compute dW of frozen weights too
and save x for it. Without torch.compile they quantize in 14 operations, some of which write
float32; :func:`prfl_fast.kernels.quantize_fp8` is one kernel.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from prfl_fast.kernels import fp8_linear, quantize_fp8

_exact, _lock = 0, threading.Lock()  # contexts that are open


@contextlib.contextmanager
def exact_linears() -> Iterator[None]:
    """Run every :class:`Fp8Linear` as an ``nn.Linear`` within the context."""
    # Not a thread-local variable, because autograd recomputes blocks in threads of its own.
    global _exact
    with _lock:
        _exact += 1
    try:
        yield
    finally:
        with _lock:
            _exact -= 1


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return ``x Wᵀ + b`` from quantized rows of x ``[..., K]`` and W ``[N, K]``."""
    dtype = x.dtype
    # The matrix units return 16 bits.
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    # The gradient of a sum has strides of 0.
    x = x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
    rows = x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1])
    bias = None if bias is None else bias.to(half)
    y = fp8_linear(*quantize_fp8(rows), *quantize_fp8(weight), bias, half)
    return y.view(*x.shape[:-1], len(weight)).to(dtype)


class Fp8Product(torch.autograd.Function):
    """Compute ``x Wᵀ + b``; see the formulas of this module."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Return ``[..., N]``; save x only if the weight needs a gradient."""
        need_x, need_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Return the gradients that are needed."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        d_x = d_weight = d_bias = None
        if need_x:
            d_x = _product(grad, weight.t().contiguous(), None)
        if need_weight or need_bias:
            grad = grad.flatten(0, -2)
        if need_weight:
            # In FP8 it would take rows along the tokens: transposed copies of grad and x, and a
            # number of tokens in multiples of 16.
            d_weight = grad.t() @ x.flatten(0, -2)
        if need_bias:
            d_bias = grad.sum(0)
        return d_x, d_weight, d_bias


class Fp8Linear(nn.Linear):
    """Linear layer in FP8; :func:`prfl_fast.models.use_fp8_linears` sets the class of a layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return ``[..., out_features]`` in the input's dtype (autocast's, if it is on)."""
        if _exact:
            return F.linear(input, self.weight, self.bias)
        device = input.device.type
        if torch.is_autocast_enabled(device) and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        return Fp8Product.apply(input, self.weight, self.bias)  # type: ignore[no-any-return]
