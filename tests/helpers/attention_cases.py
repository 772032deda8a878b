"""Attention in plain PyTorch, and the tensors of its tests."""

import math

import torch
from torch.nn import functional as F


def make_qkv(batch, lq, lk, dim, dtype, device="cpu"):
    """Return random q ``[B, Lq, D]``, k and v ``[B, Lk, D]``."""
    sizes = {"q": lq, "k": lk, "v": lk}
    return {n: torch.randn(batch, s, dim, device=device).to(dtype) for n, s in sizes.items()}


def int32(*values):
    """Return an int32 tensor of key lengths."""
    return torch.tensor(values, dtype=torch.int32)


def _split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _beyond(k, lengths):
    """Return the mask of keys past the lengths, for ``[B, heads, Lq, Lk]``."""
    past = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
    return past[:, None, None]


def sdpa(q, k, v, heads, scale=None, lengths=None):
    """Return PyTorch's own attention."""
    mask = None if lengths is None else ~_beyond(k, lengths)
    q, k, v = (_split(t, heads) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(2)


def softmax_attention(q, k, v, heads, scale=None, lengths=None):
    """Return out and log-sum-exp by the formula; float64 tensors make it the oracle."""
    past = None if lengths is None else _beyond(k, lengths)
    q, k, v = (_split(t, heads) for t in (q, k, v))
    scores = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    if past is not None:
        scores = scores.masked_fill(past, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), scores.logsumexp(-1)


def assert_no_gradient_past(lengths, grads):
    """Assert that keys and values past the lengths got a gradient of zero."""
    for b, n in enumerate(lengths.tolist()):
        assert not grads["k"][b, n:].any() and not grads["v"][b, n:].any()


def video(tokens, heads, head_dim, queries=128, sharpness=1.0, v_mean=0.3):
    """Return activations as of a video: tokens resemble their neighbors, queries and values keys.

    Six channels of k a head are offset by up to twelve times its spread.
    """

    def head():
        shared = torch.randn(-(-tokens // 64), head_dim).repeat_interleave(64, 0)[:tokens]
        base, mix = 0.7 * shared, torch.randn(head_dim, head_dim) / math.sqrt(head_dim)
        q, k = (sharpness * (base + 0.7 * torch.randn(tokens, head_dim)) for _ in range(2))
        v = base @ mix + 0.7 * torch.randn(tokens, head_dim) + v_mean * torch.randn(head_dim)
        offset = torch.zeros(head_dim)
        offset[torch.randperm(head_dim)[:6]] = torch.tensor([4.0, -4.0, 6.0, 8.0, -8.0, 12.0])
        return q[:: max(1, tokens // queries)], k + sharpness * offset, v

    per_head = zip(*(head() for _ in range(heads)), strict=True)
    return {n: torch.cat(t, -1)[None].bfloat16() for n, t in zip("qkv", per_head, strict=True)}


def relative(out, oracle):
    """Return the error relative to the norm of a float64 oracle."""
    return ((out.double() - oracle).norm() / oracle.norm()).item()
