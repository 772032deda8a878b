"""Linear layer of FP8 e4m3 rows with a scale each, and quantization of its weights.

    y_mn = (Σ_k x_q[m, k]·w_q[n, k])·x_scale[m]·w_scale[n] + bias[n]

The operations have no gradient; training in FP8 calls them in an autograd function of its own.
On chips with FP8 matrix units PyTorch computes the product (``torch._scaled_mm``, one scale for
each row of x and of w). Elsewhere it is emulated: e4m3 numbers are exact in bfloat16 and their
products are exact in float32, so the emulation differs only in the order of the float32 sums.

Shapes: x_q ``[..., K]``, x_scale ``[..., 1]``, w_q ``[N, K]``, w_scale ``[N, 1]``, bias ``[N]``,
y ``[..., N]``; the matrix units need K and N that are multiples of 16; any number of rows.
Dtypes: x_q and w_q float8_e4m3fn, scales float32, y and bias bfloat16 or float16. Sums, scaling
and the addition of the bias are float32; y is rounded once.
FLOPs: 2·M·N·K for M rows. Bytes of quantize_fp8: reads x, writes one byte an element.
"""

import functools
import warnings

import torch
from torch.utils.flop_counter import register_flop_formula

from prfl_fast.kernels.common.fp8 import (
    FP8,
    empty_quantized,
    quantize,
    quantize_rows,
    refuse_gradients,
)
from prfl_fast.kernels.common.modulation_rows import check_tokens
from prfl_fast.kernels.runtime.checks import require, require_same_device
from prfl_fast.kernels.runtime.registry import Choice, get_backend, register

CHUNK = 1 << 26  # elements that the emulation widens at once: 256 MB of float32


# References. CUDA tensors run that of the product as well, because it has no kernel of ours.
def emulated(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """Return y from plain PyTorch; ``upcast`` is the dtype computed in and returned."""
    (n, k), cuda = weight_q.shape, x_q.is_cuda and upcast is None
    wide = torch.bfloat16 if cuda else upcast or torch.float32
    rows, scales, weight = x_q.view(-1, k), x_scale.view(-1, 1), weight_q.to(wide).t()
    y = torch.empty(len(rows), n, dtype=upcast or out_dtype, device=x_q.device)
    step = max(1, CHUNK // max(n, k))
    for start in range(0, len(rows), step):
        piece = slice(start, start + step)
        if cuda:  # bfloat16 in, float32 out: PyTorch has it on CUDA only
            sums = torch.mm(rows[piece].to(wide), weight, out_dtype=torch.float32)
        else:
            sums = rows[piece].to(wide) @ weight
        sums = sums.mul_(scales[piece]).mul_(weight_scale.t())
        y[piece] = sums if bias is None else sums.add_(bias)
    return y.view(*x_q.shape[:-1], n)


@functools.cache
def unsupported_reason(device: torch.device) -> str:
    """Return the reason why ``torch._scaled_mm`` takes no scales of rows; empty if it does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "it is not an NVIDIA GPU"
    chip = torch.cuda.get_device_capability(device)
    if chip < (8, 9):
        return f"compute capability {chip[0]}.{chip[1]} has no FP8 matrix units"
    if chip == (8, 9) and torch.__version__ < "2.12":
        return "before PyTorch 2.12 its kernel for Ada runs outside the current stream"
    # The answer depends on the build: PyTorch 2.10 has no kernel for 12.0, Windows has none.
    q, scale = torch.ones(16, 16, device=device).to(FP8), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(q, q.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"fp8_linear is emulated in bfloat16, which is slow: {reason}", stacklevel=2)


def reference(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    fast_accum: bool,
) -> torch.Tensor:
    """Return y from ``torch._scaled_mm`` if it takes scales of rows, else from the emulation."""
    if get_backend() != "reference":
        reason = unsupported_reason(x_q.device)
        if not reason:
            y = torch._scaled_mm(
                x_q.view(-1, x_q.shape[-1]), weight_q.t(), x_scale.view(-1, 1), weight_scale.t(),
                bias, out_dtype=out_dtype, use_fast_accum=fast_accum,
            )  # fmt: skip
            return y.view(*x_q.shape[:-1], weight_q.shape[0])
        if x_q.is_cuda:
            _warn(reason)
    return emulated(x_q, x_scale, weight_q, weight_scale, bias, out_dtype)


def quantize_reference(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(q, scale)`` of :mod:`prfl_fast.kernels.common.fp8` from plain PyTorch."""
    return quantize(x)


# Triton: the row kernel of common/fp8.py.
def _quantize_triton(x):
    return quantize_rows(x, None, gelu=False)


# Registration.
def _fake(x_q, x_scale, weight_q, weight_scale, bias, out_dtype, fast_accum):
    return x_q.new_empty((*x_q.shape[:-1], weight_q.shape[0]), dtype=out_dtype)


def _explain(choice: Choice, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return ``choice`` with the reason for or against the matrix units, for the doctor."""
    if device.type != "cuda" or not torch.cuda.is_available() or get_backend() == "reference":
        return choice
    reason = unsupported_reason(device)
    return Choice(choice.backend, f"emulated: {reason}" if reason else "torch._scaled_mm")


# Not traceable: its emulation would compile once for each length.
_op = register("fp8_linear", reference, fake=_fake, report=_explain, traceable=False)
_quantize_op = register(
    "quantize_fp8", quantize_reference, fake=empty_quantized, triton=_quantize_triton
)


@register_flop_formula(torch.ops.prfl_fast.fp8_linear)
def _flops(x_q, x_scale, weight_q, *args, out_shape=None, **kwargs):
    *rows, k = x_q
    return 2 * functools.reduce(lambda a, b: a * b, rows, 1) * k * weight_q[0]


# Public functions.
def fp8_linear(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    weight_q: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    fast_accum: bool = False,
) -> torch.Tensor:
    """Compute ``x @ weight.t() + bias`` of FP8 rows.

    Args:
        x_q, x_scale: ``[..., K]`` and ``[..., 1]``, from :func:`quantize_fp8`, or from
            ``norm_modulate`` or ``bias_gelu`` with ``out_dtype=torch.float8_e4m3fn``.
        weight_q, weight_scale: ``[N, K]`` and ``[N, 1]``, from :func:`quantize_fp8` of the weight.
        bias: ``[N]``, in ``out_dtype``.
        out_dtype: bfloat16 or float16.
        fast_accum: accumulate in the matrix units. Hopper's keep 14 bits and truncate: over the 432
            steps of K = 13824 y shrinks by about 432·2⁻¹⁴ = 2.6 %. Without it the sums move to
            float32 registers at intervals.

    Returns:
        y ``[..., N]``, contiguous.

    Raises:
        ValueError: if a shape, dtype, layout or device is not as above, or a tensor requires a
            gradient while gradients are recorded.
    """
    op = "fp8_linear"
    for name, q in (("x_q", x_q), ("weight_q", weight_q)):
        ok = isinstance(q, torch.Tensor) and q.dtype == FP8
        source = "quantize_fp8 or an operation with out_dtype=torch.float8_e4m3fn"
        require(ok, op, name, q, f"float8_e4m3fn, from {source}")
        require(q.is_contiguous(), op, name, q, "a contiguous tensor")
    require(x_q.dim() >= 1, op, "x_q", x_q, "a shape [..., K]")
    ok = weight_q.dim() == 2 and weight_q.shape[1] == x_q.shape[-1]
    require(ok, op, "weight_q", weight_q, "a shape [N, K], K the last axis of x_q")
    n, k = weight_q.shape
    ok = n > 0 and k > 0 and n % 16 == 0 and k % 16 == 0
    require(ok, op, "weight_q", weight_q, "N and K that are multiples of 16")
    for name, scale, q in (("x_scale", x_scale, x_q), ("weight_scale", weight_scale, weight_q)):
        ok = isinstance(scale, torch.Tensor) and scale.dtype == torch.float32
        ok = ok and scale.shape == (*q.shape[:-1], 1) and scale.is_contiguous()
        expected = f"contiguous float32 of the shape of {name[:-5]}q with 1 for the last axis"
        require(ok, op, name, scale, expected)
    ok = out_dtype in (torch.bfloat16, torch.float16)
    require(ok, op, "out_dtype", out_dtype, "torch.bfloat16 or torch.float16")
    if bias is not None:
        ok = isinstance(bias, torch.Tensor) and bias.shape == (n,) and bias.dtype == out_dtype
        expected = "shape [N] in out_dtype: call .to(out_dtype) where it is made"
        require(ok and bias.is_contiguous(), op, "bias", bias, expected)
    require_same_device(
        op, x_q=x_q, x_scale=x_scale, weight_q=weight_q, weight_scale=weight_scale, bias=bias
    )
    refuse_gradients(op, x_scale=x_scale, weight_scale=weight_scale, bias=bias)
    return _op(x_q, x_scale, weight_q, weight_scale, bias, out_dtype, fast_accum)


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize rows of x, weights or activations, to FP8 e4m3 with one scale each.

    Args:
        x: ``[B, L, D]`` or ``[N, D]``; the last axis is contiguous, the others have any stride.

    Returns:
        ``(q, scale)``: q float8_e4m3fn of x's shape; scale float32, x's shape with 1 for the last
        axis; both contiguous. ``q.float() * scale`` is within 1/16 of each element of x or
        within 2⁻¹⁰·scale.

    Raises:
        ValueError: if a shape, dtype or stride is not as above, or x requires a gradient while
            gradients are recorded.
    """
    check_tokens("quantize_fp8", "x", x)
    refuse_gradients("quantize_fp8", x=x)
    return _quantize_op(x)
