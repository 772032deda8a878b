"""Attention and feed-forward modules of a timestep-conditioned block, for models of your own.

All modules share these arguments: ``dim``, the channels D; ``heads``, the number of attention
heads, whose size D / heads must be even (else ``ValueError``); ``eps``, the epsilon of all norms.
Forwards take x ``[B, L, D]`` and return ``[B, L, D]``. Modulated modules also take ``time``
``[R, 3, D]``, rows of shift, scale and gate, and an optional ``row_index``, see
:class:`prfl_fast.models.blocks.Modulation`.
"""

from typing import Any

import torch
from torch import nn

from prfl_fast.kernels import gated_residual, norm_modulate
from prfl_fast.models.blocks import Modulation, Rope, cross_attention, feed_forward, self_attention
from prfl_fast.utils.checks import check


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        ok = heads >= 1 and dim % heads == 0 and (dim // heads) % 2 == 0
        check(ok, "heads", heads, f"a divisor of dim = {dim} with an even head size")
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def _load(self, attn: Any) -> None:
        out = attn.to_out[0] if isinstance(attn.to_out, nn.ModuleList) else attn.to_out
        for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
            getattr(self, name).load_state_dict(getattr(attn, name).state_dict())
        self.to_out.load_state_dict(out.state_dict())


class TimestepConditionedAttention(_Attention):
    """Apply modulated LayerNorm → q/k/v → RMSNorm, RoPE → attention → linear → gated residual."""

    def __init__(self, dim: int, heads: int, *, eps: float = 1e-6) -> None:
        super().__init__(dim, heads, eps)
        self.eps = eps
        # Initialized as in diffusers' Wan blocks.
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    @classmethod
    def from_wan_block(cls, block: Any) -> "TimestepConditionedAttention":
        """Copy the self-attention of a diffusers ``WanTransformerBlock``, with dtype and device."""
        module = cls(block.attn1.inner_dim, block.attn1.heads, eps=block.norm1.eps)
        module.to(block.attn1.to_q.weight)
        module._load(block.attn1)
        module.norm_q.eps = module.norm_k.eps = block.attn1.norm_q.eps
        module.scale_shift_table = nn.Parameter(block.scale_shift_table.detach()[0, :3].clone())
        return module

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, rope: Rope, row_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``[B, L, D]`` from x ``[B, L, D]``; ``rope`` is the tokens' position embedding."""
        ((norm, gate),) = Modulation(self.scale_shift_table, time, row_index).arguments()
        h = norm_modulate(x, **norm, eps=self.eps)
        return gated_residual(x, self_attention(self, h, rope), **gate)


class CrossAttention(_Attention):
    """Apply LayerNorm (affine) → attention to text and, optionally, image tokens → residual.

    ``norm=False`` omits the LayerNorm. ``image_dim`` is the number of channels of image tokens;
    None makes a text-only module. The last 512 tokens of the context are text, those before image.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        eps: float = 1e-6,
        norm: bool = True,
        image_dim: int | None = None,
    ) -> None:
        super().__init__(dim, heads, eps)
        self.norm = nn.LayerNorm(dim, eps=eps) if norm else nn.Identity()
        self.add_k_proj = self.add_v_proj = None
        if image_dim is not None:
            self.add_k_proj, self.add_v_proj = nn.Linear(image_dim, dim), nn.Linear(image_dim, dim)
            self.norm_added_k = nn.RMSNorm(dim, eps=eps)

    @classmethod
    def from_wan_block(cls, block: Any) -> "CrossAttention":
        """Copy the cross-attention of a diffusers ``WanTransformerBlock`` and its norm."""
        attn = block.attn2
        affine = getattr(block.norm2, "weight", None) is not None
        image_dim = attn.add_k_proj.in_features if attn.add_k_proj is not None else None
        module = cls(
            attn.inner_dim, attn.heads, eps=attn.norm_q.eps, norm=affine, image_dim=image_dim
        )
        module.to(attn.to_q.weight)
        module._load(attn)
        if image_dim is not None:
            for name in ("add_k_proj", "add_v_proj", "norm_added_k"):
                getattr(module, name).load_state_dict(getattr(attn, name).state_dict())
        if affine:
            module.norm = nn.LayerNorm(attn.inner_dim, eps=block.norm2.eps).to(block.norm2.weight)
            module.norm.load_state_dict(block.norm2.state_dict())
        return module

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return ``[B, L, D]`` from x ``[B, L, D]`` and context ``[B, T, D]``."""
        h = x
        if isinstance(self.norm, nn.LayerNorm):
            h = norm_modulate(x, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return gated_residual(x, cross_attention(self, h, context))


class ModulatedFeedForward(nn.Module):
    """Apply modulated LayerNorm → linear to ``hidden_dim`` → GELU → linear → gated residual."""

    def __init__(self, dim: int, hidden_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.up, self.down = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)
        self.scale_shift_table = nn.Parameter(torch.randn(3, dim) / dim**0.5)

    @classmethod
    def from_wan_block(cls, block: Any) -> "ModulatedFeedForward":
        """Copy the feed-forward of a diffusers ``WanTransformerBlock``, with dtype and device."""
        up, down = block.ffn.net[0].proj, block.ffn.net[2]
        module = cls(up.in_features, up.out_features, eps=block.norm3.eps).to(up.weight)
        module.up.load_state_dict(up.state_dict())
        module.down.load_state_dict(down.state_dict())
        module.scale_shift_table = nn.Parameter(block.scale_shift_table.detach()[0, 3:].clone())
        return module

    def forward(
        self, x: torch.Tensor, time: torch.Tensor, row_index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return ``[B, L, D]`` from x ``[B, L, D]``."""
        ((norm, gate),) = Modulation(self.scale_shift_table, time, row_index).arguments()
        h = norm_modulate(x, **norm, eps=self.eps)
        return gated_residual(x, feed_forward(self.up, self.down, h), **gate)
