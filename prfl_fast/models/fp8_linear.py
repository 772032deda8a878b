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
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from prfl_fast.kernels import fp8_linear, quantize_fp8
from prfl_fast.utils.modules import customization

_open, _lock = 0, threading.Lock()  # number of open contexts
_exact = False  # one is open: compiled code has a guard on it, and would have one on each number


@contextlib.contextmanager
def exact_linears() -> Iterator[None]:
    """Run every :class:`Fp8Linear` as an ``nn.Linear`` within the context."""
    # Not a thread-local variable, because autograd recomputes blocks in threads of its own.
    global _open, _exact
    with _lock:
        _open, _exact = _open + 1, True
    try:
        yield
    finally:
        with _lock:
            _open -= 1
            _exact = _open > 0


class Rows(NamedTuple):
    """Hold the rows of an input ``[..., K]`` in e4m3, and a scale for each."""

    of: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor


def _cast(x: torch.Tensor) -> torch.Tensor:
    """Return x in the dtype of autocast, if it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    return x


def _quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of x ``[..., K]`` in e4m3, and a scale for each."""
    # The gradient of a sum has strides of 0.
    x = x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)
    return quantize_fp8(x if x.dim() in (2, 3) else x.reshape(-1, x.shape[-1]))


def shared_rows(x: torch.Tensor, layers: Sequence[nn.Module]) -> Rows | None:
    """Return quantized rows of x for the forwards of several layers; None if not all use them.

    Each layer is a :class:`Fp8Linear`, or one of peft, which passes them on to its base layer.
    Hooks and replaced forwards may not take them.
    """
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    if _exact or not all(type(base) is Fp8Linear for base in bases):
        return None
    for layer, base in zip(layers, bases, strict=True):
        ours = layer is base or type(layer).__module__.startswith("peft.")
        if not ours or customization(layer) or customization(base):
            return None
    # Quantization adds 24 % to the bytes that a forward of 14B moves at 720p; 29 % if q, k and v
    # quantized their input three times.
    with torch.no_grad():
        return Rows(x, *_quantize(_cast(x)))


def _product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: Rows | None = None
) -> torch.Tensor:
    """Return ``x Wᵀ + b`` from quantized rows of x ``[..., K]`` and W ``[N, K]``."""
    dtype = x.dtype
    # The matrix units return 16 bits.
    half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    codes, scale = _quantize(x) if rows is None else rows[1:]
    bias = None if bias is None else bias.to(half)
    y = fp8_linear(codes, scale, *quantize_fp8(weight), bias, half)
    return y.view(*x.shape[:-1], len(weight)).to(dtype)


class Fp8Product(torch.autograd.Function):
    """Compute ``x Wᵀ + b``; see the formulas of this module."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: Rows | None,
    ) -> torch.Tensor:
        """Return ``[..., N]``; save x only if the weight needs a gradient."""
        need_x, need_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        return _product(x, weight, bias, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        """Return the gradients that are needed."""
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
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
        return d_x, d_weight, d_bias, None


class Fp8Linear(nn.Linear):
    """Linear layer in FP8; :func:`prfl_fast.models.use_fp8_linears` sets the class of a layer."""

    def forward(self, input: torch.Tensor, rows: Rows | None = None) -> torch.Tensor:
        """Return ``[..., out_features]`` in the input's dtype (autocast's, if it is on).

        ``rows`` are :func:`shared_rows`.
        """
        if _exact:
            return F.linear(input, self.weight, self.bias)
        if rows is not None and rows.of is not input:  # an adapter of peft has changed the input
            rows = None
        return Fp8Product.apply(_cast(input), self.weight, self.bias, rows)  # type: ignore[no-any-return]
