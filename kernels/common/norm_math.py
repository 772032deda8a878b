"""Compute norms and their parameters' gradients in plain PyTorch; choose block sizes of rows."""

from collections.abc import Sequence

import torch

from prfl_fast.kernels.common.modulation_rows import table_plus_rows


def parameter_gradients(
    dot: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    scale_table: torch.Tensor | None,
    needs: Sequence[bool],
    dtypes: Sequence[torch.dtype | None],
) -> list[torch.Tensor | None]:
    """Return gradients of weight, bias, scale, shift, scale_table, shift_table from A and B.

    ``needs`` and ``dtypes`` are in that order; a gradient that is not needed is None.
    """
    # Plain PyTorch is fast enough, because the R rows are few.
    need_weight, need_bias, need_scale, need_shift, need_scale_table, need_shift_table = needs
    modulation = table_plus_rows(scale_table, scale, dot.dtype)
    d_scale = dot
    if need_scale or need_scale_table:
        d_scale = dot if weight is None else dot * weight.to(dot.dtype)
        d_scale = d_scale if bias is None else d_scale + total * bias.to(dot.dtype)

    def modulated_sum(rows: torch.Tensor) -> torch.Tensor:
        return (rows if modulation is None else rows * (1 + modulation)).sum(0)

    gradients = (
        modulated_sum(dot) if need_weight else None,
        modulated_sum(total) if need_bias else None,
        d_scale if need_scale else None,
        total if need_shift else None,
        d_scale.sum(0) if need_scale_table else None,
        total.sum(0) if need_shift_table else None,
    )
    return [g if g is None else g.to(d) for g, d in zip(gradients, dtypes, strict=True)]


def row_gain(
    weight: torch.Tensor | None, modulation: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return g = w·(1 + s) as ``[R, D]`` or ``[1, D]``; None if neither is given."""
    if modulation is None:
        return None if weight is None else weight.to(dtype)[None]
    return 1 + modulation if weight is None else weight.to(dtype) * (1 + modulation)


def normalize(
    x: torch.Tensor, kind: str, eps: float
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return x̂, and the mean and ρ ``[..., 1]`` if the kind has them."""
    if kind == "layer":
        return torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
    if kind == "rms":
        rho = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * rho, None, rho
    return x, None, None


def token_block(dim: int) -> tuple[int, int]:
    """Return BLOCK_D, and warps for 16 elements a thread: two 16-byte loads of bfloat16."""
    block_d = max(32, 1 << (dim - 1).bit_length())
    return block_d, min(16, max(1, block_d // 512))
