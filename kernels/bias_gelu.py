"""Bias and tanh-GELU in one pass; only the pre-activation is kept.

    h = x + b,  u = √(2/π)·(h + 0.044715·h³),  y = h/2 · (1 + tanh u)
    d_x = d_y · [ (1 + tanh u)/2 + h/2 · (1 - tanh²u) · √(2/π)·(1 + 3·0.044715·h²) ]
    d_b = Σ_rows d_x

Shapes: x ``[..., D]``, b ``[D]`` or absent, y as x.
Dtypes: h and y are computed in float32 (float64 for float64 x) and rounded once to x's dtype; h is
never rounded; d_b sums the unrounded d_x. The bias may have another dtype than x.
Saved for backward: x and b. Autograd of ``gelu(x + b)`` keeps x + b besides x's producer.
Bytes: forward reads x and writes y; backward reads x and d_y and writes d_x.
"""

import torch

from prfl_fast.kernels._checks import compute_dtype, require, require_float, require_same_device
from prfl_fast.kernels._registry import register

CHUNK = 1 << 18  # elements widened at once on the CPU: a float32 piece stays in a 2 MB cache


def _pieces(x: torch.Tensor) -> list[slice]:
    """Runs of rows of ``[N, D]``: cache-sized on the CPU, everything at once elsewhere."""
    rows = max(1, CHUNK // x.shape[1]) if x.device.type == "cpu" else max(1, x.shape[0])
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def reference(
    x: torch.Tensor, bias: torch.Tensor | None, upcast: torch.dtype | None = None
) -> torch.Tensor:
    """y in plain PyTorch; ``upcast`` names the dtype computed in and returned."""
    x = x if upcast is None else x.to(upcast)
    if bias is None:  # ATen widens bfloat16 and float16 inside its loop and rounds once
        return torch.nn.functional.gelu(x, approximate="tanh").contiguous()
    dtype = compute_dtype(x)
    y, bias = x.new_empty(x.shape), bias.to(dtype)
    x, out = x.reshape(-1, x.shape[-1]), y.view(-1, x.shape[-1])
    for rows in _pieces(x):
        h = x[rows].to(dtype) + bias
        out[rows] = torch.ops.aten.gelu_(h, approximate="tanh")
    return y


def _fake(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape)


def reference_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, need_x: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(d_x, d_bias)``; an empty tensor where none is needed."""
    if bias is None:
        d_x = torch.ops.aten.gelu_backward(grad, x, approximate="tanh").contiguous()
        return d_x, x.new_empty(0)
    dtype, dim = compute_dtype(x), x.shape[-1]
    d_x = x.new_empty(x.shape if need_x else (0,))
    d_bias = torch.zeros(dim, dtype=dtype, device=x.device)
    x, grad, wide_bias = x.reshape(-1, dim), grad.reshape(-1, dim), bias.to(dtype)
    out = d_x.view(-1, dim) if need_x else d_x
    for rows in _pieces(x):
        h = x[rows].to(dtype) + wide_bias
        d_h = torch.ops.aten.gelu_backward(grad[rows].to(dtype), h, approximate="tanh")
        if need_x:
            out[rows] = d_h
        if need_bias:
            d_bias += d_h.sum(0)
    return d_x, d_bias.to(bias.dtype) if need_bias else bias.new_empty(0)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, need_x: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    d_x = x.new_empty(x.shape if need_x else (0,))
    if bias is None:
        return d_x, x.new_empty(0)
    return d_x, bias.new_empty(bias.shape if need_bias else (0,))


_forward_op = register("bias_gelu", reference, fake=_fake)
_backward_op = register("bias_gelu_backward", reference_backward, fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    need_x, need_bias = ctx.needs_input_grad
    d_x, d_bias = _backward_op(grad, *ctx.saved_tensors, need_x, need_bias)
    return d_x if need_x else None, d_bias if need_bias else None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``gelu(x + bias)`` with the tanh form of GELU.

    Args:
        x: ``[..., D]``, any strides; usually a linear layer's output without (or with) its bias.
        bias: ``[D]``, any floating dtype.

    Returns:
        The activation, contiguous, in x's shape and dtype, rounded once from float32 (float64 for
        float64 x).

    Raises:
        ValueError: a bias that is not ``[D]``, integer tensors, or different devices.
    """
    require_float("bias_gelu", "x", x)
    require(x.ndim > 0 and x.shape[-1] > 0, "bias_gelu", "x", x, "[..., D] with D > 0")
    if bias is not None:
        require_float("bias_gelu", "bias", bias)
        require(
            bias.shape == x.shape[-1:],
            "bias_gelu",
            "bias",
            bias,
            f"[{x.shape[-1]}] to match x's last dimension",
        )
        require_same_device("bias_gelu", x=x, bias=bias)
    return _forward_op(x, bias)
