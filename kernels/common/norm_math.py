"""Compute norms and their parameters' gradients in plain PyTorch; choose block sizes of rows."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_compiling

from prfl_fast.kernels.common.modulation_rows import table_plus_rows
from prfl_fast.kernels.runtime.calls import is_plain_call
from prfl_fast.kernels.runtime.checks import cast


def parameter_gradients(
    dot: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return gradients of weight, bias, scale, shift, scale_table, shift_table from A and B.

    ``needs`` is in that order; a gradient that is not needed is None. Gradients are in the dtype of
    A and B; autograd casts them to those of its inputs.
    """
    # Plain PyTorch is fast enough, because the R rows are few.
    need_weight, need_bias, need_scale, need_shift, need_scale_table, need_shift_table = needs
    d_scale, d_weight, d_bias = dot, dot, total
    if need_scale or need_scale_table:
        d_scale = dot if weight is None else dot * weight.to(dot.dtype)
        d_scale = d_scale if bias is None else d_scale + total * bias.to(dot.dtype)
    if need_weight or need_bias:
        one_plus_scale = row_gain(None, table_plus_rows(scale_table, scale, dot.dtype), dot.dtype)
        if one_plus_scale is not None:
            d_weight = dot * one_plus_scale if need_weight else dot
            d_bias = total * one_plus_scale if need_bias else total
    return (
        d_weight.sum(0) if need_weight else None,
        d_bias.sum(0) if need_bias else None,
        d_scale if need_scale else None,
        total if need_shift else None,
        d_scale.sum(0) if need_scale_table else None,
        total.sum(0) if need_shift_table else None,
    )


def row_gain(
    weight: torch.Tensor | None, modulation: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return g = w·(1 + s) as ``[R, D]`` or ``[1, D]``; None if neither is given."""
    if modulation is None:
        return None if weight is None else cast(weight, dtype)[None]
    one_plus_scale = modulation + operand(1.0, modulation.dtype, modulation.device)
    return one_plus_scale if weight is None else cast(weight, dtype) * one_plus_scale


def normalize(
    x: torch.Tensor, kind: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return x̂, and the mean and ρ ``[..., 1]`` if the kind has them."""
    if kind == "layer":
        # Without an affine part ATen's loop is not vectorized (bench/NOTES.md has the times).
        layout = x.shape[-1], x.dtype, x.device
        one: torch.Tensor | None = None
        zero: torch.Tensor | None = None
        if is_plain_call():
            one, zero = _unit_affine(*layout)
        elif not is_compiling():
            one, zero = _unit_affine.__wrapped__(*layout)
        return torch.native_layer_norm(x, x.shape[-1:], one, zero, eps)
    if kind == "rms":
        rho = rstd(x, operand(eps, x.dtype, x.device), x.dtype)
        return x * rho, None, rho
    return x, None, None


def operand(number: float, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a number as it is for a compiler, else as a tensor: ATen copies numbers in each call.

    A cached real tensor cannot be mixed with fake ones, nor a cached fake one with real ones.
    """
    if is_plain_call():
        return constant(number, dtype, device)
    return number if is_compiling() else constant.__wrapped__(number, dtype, device)


def rstd(x: torch.Tensor, eps: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return 1/√(mean(x²) + eps) of the last dimension, ``[..., 1]``, without a copy of x.

    eps is the result of :func:`operand`.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
    if isinstance(eps, float):
        return (norm * norm / x.shape[-1] + eps).rsqrt()
    return torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


@functools.lru_cache
def constant(value: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return ``value`` as a tensor ``[1]`` that all calls share; only for plain calls."""
    with torch.inference_mode(False):
        return torch.full((1,), value, dtype=dtype, device=device)


@functools.lru_cache
def _unit_affine(
    dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ones and zeros ``[D]`` that all calls share; only for plain calls."""
    with torch.inference_mode(False):
        one = torch.ones(dim, dtype=dtype, device=device)
        return one, torch.zeros_like(one)


def rms_gradients(
    e: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rho: torch.Tensor,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(d_x, d_weight)`` of z = x·ρ·weight; an empty tensor for each not needed.

    With e = ρ·d_z, which this function overwrites, d_weight = Σ e·x and
    d_x = e·weight - x·ρ²·mean(e·x·weight).
    """
    product = e * x
    if not need_weight or weight is None:
        d_weight = (x if weight is None else weight).new_empty(0)
    else:
        d_weight = cast(product.reshape(-1, product.shape[-1]).sum(0), weight.dtype)
    if not need_x:
        return x.new_empty(0), d_weight
    if weight is not None:
        e, product = e.mul_(weight), product.mul_(weight)
    total = product.sum(-1, keepdim=True).mul_(rho).mul_(rho)  # see bench/NOTES.md
    return e.addcmul_(total, x, value=-1 / x.shape[-1]), d_weight


def given(like: torch.Tensor, found: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Return ``found``, or an empty tensor if it is None."""
    return like.new_empty(0, dtype=dtype) if found is None else found


def token_block(dim: int) -> tuple[int, int]:
    """Return BLOCK_D, and warps for 16 elements a thread: two 16-byte loads of bfloat16."""
    block_d = max(32, 1 << (dim - 1).bit_length())
    return block_d, min(16, max(1, block_d // 512))
