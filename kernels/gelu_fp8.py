"""Bias, tanh-GELU and an FP8 output: one e4m3 row and one scale a token, for fp8_linear.

    h = x + b,  y = h·σ(2u),  u = √(2/π)·(h + 0.044715·h³)         (h·σ(2u) = h/2·(1 + tanh u))
    y_scale = amax |y| / 448,  y_q = e4m3(y / y_scale)                                see _fp8.py

For rollouts: no gradient.
Shapes: x, y_q ``[B, L, D]`` or ``[N, D]``, y_scale the same with 1 for D, b ``[D]`` or absent.
Dtypes: x and b any mix of float32, bfloat16, float16; y_q float8_e4m3fn; y_scale float32. h, y,
amax and the quotients are float32 (float64 x: y in float64, then float32); y is never rounded to
x's dtype.
Bytes: reads x, writes one byte an element and four a token.
"""

import itertools

import torch

from prfl_fast.kernels._checks import compute_dtype, require, require_float, require_same_device
from prfl_fast.kernels._fp8 import (
    empty_quantised,
    quantise,
    quantise_rows,
    refuse_gradients,
    row_case,
)
from prfl_fast.kernels._registry import register
from prfl_fast.kernels._rows import check_tokens
from prfl_fast.kernels._triton import AotCase


# Reference.
def reference(
    x: torch.Tensor, bias: torch.Tensor | None, upcast: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(y_q, y_scale)`` in PyTorch; ``upcast`` names the dtype y is computed in."""
    dtype = compute_dtype(x, upcast)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return quantise(torch.nn.functional.gelu(h, approximate="tanh"))


# Triton: the row kernel of _fp8.py; h, y and the row's largest |y| stay in registers.
def _triton(x, bias):
    return quantise_rows(x, bias, gelu=True)


def aot_cases(capability: tuple[int, int], every: bool = False) -> list[AotCase]:
    """What Wan compiles, D of the 1.3B and 14B feed-forward; ``every``: all flags and more D."""
    chosen = [(8960, "bf16", "bf16"), (13824, "bf16", "bf16"), (13824, "fp32", "")]
    if every:
        dims = (1536, 5120, 8192, 8960, 13824, 14336, 16384)
        chosen = list(itertools.product(dims, ("bf16", "fp32"), ("", "bf16", "fp32")))
    return [
        row_case(f"{dtype} D={dim} bias {bias or 'none'}", dim, dtype, bias, True, capability)
        for dim, dtype, bias in chosen
    ]


# Registration.
_op = register("gelu_fp8", reference, fake=lambda x, bias: empty_quantised(x), triton=_triton)


# Public function.
def gelu_fp8(
    x: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``gelu(x + bias)``, tanh form, quantised to FP8 e4m3 with a scale for each token.

    Args:
        x: ``[B, L, D]`` or ``[N, D]``; the last axis is contiguous, the others have any stride.
        bias: ``[D]``, any floating dtype.

    Returns:
        ``(y_q, y_scale)``: y_q float8_e4m3fn of x's shape; y_scale float32, x's shape with 1 for
        the last axis; both contiguous. y is about ``y_q.float() * y_scale``, within 1/16 of each
        element and 2⁻¹⁰·y_scale.

    Raises:
        ValueError: a shape, dtype, stride or device other than the above, or a tensor that requires
            a gradient while gradients are recorded.
    """
    check_tokens("gelu_fp8", "x", x)
    if bias is not None:
        require_float("gelu_fp8", "bias", bias)
        if bias.shape != x.shape[-1:]:
            expected = f"shape [{x.shape[-1]}], the last axis of x"
            require(False, "gelu_fp8", "bias", bias, expected)
        require_same_device("gelu_fp8", x=x, bias=bias)
    refuse_gradients("gelu_fp8", x=x, bias=bias)
    return _op(x, bias)
