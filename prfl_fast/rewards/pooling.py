"""Query attention pooling and the head of the latent reward model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from prfl_fast.kernels import query_pool
from prfl_fast.utils.checks import check, check_count, plain
from prfl_fast.utils.collectives import pool_over_ranks


class QueryAttentionPool(nn.Module):
    """Pool tokens by attention from learned queries, without computing keys or values.

    Let q_h be the projected query of head h, and W_k,h and W_v,h the head's slices of the
    in-projection. The score of token x is (W_k,hᵀ q_h)·x plus a constant that softmax cancels, and
    Σ_l p_l (W_v,h x_l + b) = W_v,h (Σ_l p_l x_l) + b. Parameters have the names of HY-Video-PRFL's
    pooling file (``queries``, ``multihead_attn.in_proj_weight``, ...).

    Args:
        dim: D, channels of the tokens.
        num_heads: a divisor of D.
        num_queries: number of learned queries; their outputs are averaged.

    Raises:
        ValueError: if ``num_heads`` does not divide D, or ``num_queries`` is below 1.
    """

    def __init__(self, dim: int, num_heads: int = 8, num_queries: int = 1) -> None:
        super().__init__()
        ok = num_heads >= 1 and dim % num_heads == 0
        check(ok, "num_heads", num_heads, f"a divisor of dim = {dim}")
        check_count("num_queries", num_queries)
        self.add_query = True  # False for reference checkpoints whose return_type is not query
        # This module holds and initializes the parameters; its forward is never called.
        # Scripts that load models in bfloat16 often make it the default dtype.
        wide: Any = {"dtype": torch.float32}
        self.multihead_attn = nn.MultiheadAttention(dim, plain(num_heads), batch_first=True, **wide)
        self.queries = nn.Parameter(torch.empty(num_queries, dim, **wide))
        nn.init.xavier_uniform_(self.queries)

    def forward(self, x: torch.Tensor, group: Any = None) -> torch.Tensor:
        """Return ``[B, D]`` from ``[B, L, D]``, in the pool's dtype.

        With a process ``group``, x holds this rank's tokens, and the result is that of all tokens.

        The result is the attention output plus the query, averaged over the queries; without the
        query if ``add_query`` is False. Raise ``ValueError`` for another shape.
        """
        mha = self.multihead_attn
        dim, heads = mha.embed_dim, mha.num_heads
        check(x.ndim == 3 and x.shape[-1] == dim, "x", x, f"[B, L, {dim}]")
        size = dim // heads
        queries: torch.Tensor = self.queries
        w_q, w_k, w_v = mha.in_proj_weight.view(3, heads, size, dim).unbind(0)
        b_q, _, b_v = mha.in_proj_bias.view(3, dim).unbind(0)
        # Products of [heads, ...]: einsum and matmul would take more host time than bmm.
        q = F.linear(queries, w_q.flatten(0, 1), b_q).view(-1, heads, size).transpose(0, 1)
        # One pass over x replaces two [L, D] × [D, D] projections: 2·L·D·heads multiply-adds in
        # place of 4·L·D², 1/384 at D = 1536 and 8 heads (bench/NOTES.md).
        folded = (q * size**-0.5).bmm(w_k)  # [heads, queries, D]
        pooled, lse = query_pool(x, folded.flatten(0, 1))
        if group is not None:
            pooled = pool_over_ranks(pooled, lse, group)
        if pooled.dtype != w_v.dtype:
            pooled = pooled.to(w_v.dtype)
        # The average over queries commutes with the linear value and output projections.
        if len(queries) > 1:
            pooled = pooled.view(len(x), heads, -1, dim).mean(2)  # [B, heads, D]
            queries = queries.mean(0)
        values = torch.baddbmm(b_v.view(heads, 1, size), pooled.transpose(0, 1), w_v.mT)
        out = mha.out_proj(values.transpose(0, 1).flatten(1))
        return out + queries if self.add_query else out


class RewardHead(nn.Module):
    """Map ``dim`` → 1024 → 512 → 1 channels with ReLU between the layers, without a sigmoid.

    Weights start Xavier-uniform, biases at zero, as in HY-Video-PRFL.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        sizes = ((dim, 1024), (1024, 512), (512, 1))
        self.fc1, self.fc2, self.fc3 = (nn.Linear(*n, dtype=torch.float32) for n in sizes)
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits ``[B]`` from ``[B, D]``."""
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x))))).squeeze(-1)
