"""Pieces of what models write in ordinary PyTorch, for the plain counterparts of operations."""

import torch
from dtypes import FP64


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x.float()`` as models write it, except that the float64 oracle stays float64."""
    return x if x.dtype == FP64 else x.float()


def expand_rows(rows, table, x, row_index=None):
    """Return ``table + rows`` as one vector per token, or None: what no operation ever builds."""
    if rows is None and table is None:
        return None
    tokens, dim = x.numel() // x.shape[-1], x.shape[-1]
    total = torch.zeros(tokens, dim, dtype=wide(x).dtype, device=x.device)
    total = total if table is None else total + wide(table)
    if rows is not None:
        if row_index is None:
            row_index = torch.arange(tokens, device=x.device) // max(1, tokens // len(rows))
        total = total + wide(rows)[row_index.flatten()]
    return total.view(x.shape)


def naive_norm(x, weight, bias, kind, eps):
    """Return LayerNorm, RMSNorm or no norm of ``x`` as models write it, in float32."""
    weight, bias = (None if t is None else wide(t) for t in (weight, bias))
    dim, x = x.shape[-1:], wide(x)
    if kind == "layer":
        return torch.nn.functional.layer_norm(x, dim, weight, bias, eps)
    if kind == "rms":
        x = torch.nn.functional.rms_norm(x, dim, weight, eps)
    elif weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def spread(x, axes):
    """Return ``x`` with its axes in the order ``axes`` in memory and gaps between rows."""
    wider = torch.cat([x, x, x], -1).permute(*axes).contiguous()
    return wider[..., : x.shape[-1]].permute(*(axes.index(i) for i in range(x.dim())))
