"""Dense multi-head attention that also returns the log-sum-exp of its scores.

    s = scale · q kᵀ,  lse_i = log Σ_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  out = p v
    d_v = pᵀ d_out
    d_s = p ⊙ (d_out vᵀ - δ),  δ_i = d_out_i · out_i
    d_q = scale · d_s k,  d_k = scale · d_sᵀ q

Attention itself is PyTorch's; this file makes one op of it that returns ``lse``, so that
checkpointing can keep (out, lse) and recompute everything else. A second key set (the image tokens
of Wan I2V) is a second call whose output is added.

Shapes: q ``[B, Lq, D]``, k and v ``[B, Lk, D]`` with D = heads · d, rows may be strided; out ``[B,
Lq, D]``; lse ``[B, heads, Lq]``.
Dtypes: scores, softmax and sums in float32 (float64 for float64), out rounded once to q's dtype;
lse float32 (float64 for float64).
Saved for backward: q, k, v, out, lse. No L×L matrix is stored on any path.
FLOPs: 4·B·heads·Lq·Lk·d forward, 2.5 times that backward (the scores are computed again).
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from prfl_fast.kernels._checks import compute_dtype, require, require_float, require_same_device
from prfl_fast.kernels._registry import register

CHUNK = 1 << 26  # score elements held at once by the plain path: 256 MB of float32

_aten = torch.ops.aten


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, L, D]`` seen as ``[B, heads, L, d]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """``[B, heads, L, d]`` as a contiguous ``[B, L, D]``; free where the kernel kept the layout."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _kernel(q: torch.Tensor, heads: int) -> str:
    """Which kernel takes tensors like ``q``: ``cpu`` or ``flash`` of ATen, or ``plain`` PyTorch."""
    if q.device.type == "cpu":
        return "cpu"
    half = q.dtype in (torch.bfloat16, torch.float16)
    head_dim = q.shape[-1] // heads
    if q.device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256:
        if torch.version.hip is None and torch.cuda.get_device_capability(q.device) >= (8, 0):
            return "flash"
    return "plain"


def _query_chunks(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    rows = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, start + rows) for start in range(0, q.shape[2], rows)]


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    upcast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Explicit softmax, a piece of the queries at a time; ``upcast``: the dtype of all of it."""
    dtype = compute_dtype(q, upcast)
    q, k, v = (_heads(t, heads) for t in (q, k, v))
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for rows in _query_chunks(q, k):
        scores = (q[:, :, rows].to(dtype) * scale) @ k.transpose(-1, -2)
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append(scores.sub_(lse).exp_() @ v)
        lses.append(lse.squeeze(-1))
    out = _tokens(torch.cat(outs, 2))
    return out.to(upcast or q.dtype), torch.cat(lses, 2)


def plain_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_q, d_k, d_v)`` of :func:`plain` as ``[B, heads, L, d]``, in the dtype computed in."""
    dtype = compute_dtype(q)
    grad, q, k, v, out = (_heads(t, heads) for t in (grad, q, k, v, out))
    k, v = k.to(dtype), v.to(dtype)
    d_q, d_k, d_v = [], torch.zeros_like(k), torch.zeros_like(v)
    for rows in _query_chunks(q, k):
        g, queries = grad[:, :, rows].to(dtype), q[:, :, rows].to(dtype) * scale
        p = (queries @ k.transpose(-1, -2)).sub_(lse[:, :, rows, None]).exp_()
        d_v += p.transpose(-1, -2) @ g
        delta = (g * out[:, :, rows]).sum(-1, keepdim=True)
        d_s = (g @ v.transpose(-1, -2)).sub_(delta).mul_(p)
        d_q.append(d_s @ k * scale)
        d_k += d_s.transpose(-1, -2) @ queries
    return torch.cat(d_q, 2), d_k, d_v


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` by the best kernel PyTorch has for these tensors; both contiguous."""
    kernel = _kernel(q, heads)
    if kernel == "plain":
        return plain(q, k, v, heads, scale)
    q, k, v = (_heads(t, heads) for t in (q, k, v))
    if kernel == "cpu":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    else:
        out, lse = _aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return _tokens(out), lse.contiguous()


def _fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_empty((q.shape[0], heads, q.shape[1]), dtype=compute_dtype(q))
    return q.new_empty(q.shape), lse


def reference_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    scale: float,
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(d_q, d_k, d_v)``, contiguous; an empty tensor where none is needed."""
    kernel = _kernel(q, heads)
    # The kernels want the last dimension dense; an expanded gradient (of a sum, say) is not.
    grad = grad.to(q.dtype).contiguous()
    if kernel == "plain":
        gradients = plain_backward(grad, q, k, v, out, lse, heads, scale)
    else:
        args = [_heads(t, heads) for t in (grad, q, k, v, out)]
        if kernel == "cpu":
            # 13 times faster in float32 than in bfloat16 without matrix units (L 3120, D 1536).
            args = [t.to(compute_dtype(q)) for t in args]
            gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *args, lse, 0.0, False, scale=scale
            )
        else:
            # Without dropout the random state is not read; dense batches have no lengths.
            state = torch.empty(0, dtype=torch.int64, device=q.device)
            gradients = _aten._scaled_dot_product_flash_attention_backward(
                *args,
                lse,
                None,
                None,
                q.shape[1],
                k.shape[1],
                0.0,
                False,
                state,
                state,
                scale=scale,
            )
    d_q, d_k, d_v = (
        _tokens(g).to(q.dtype) if need else q.new_empty(0)
        for g, need in zip(gradients, needed, strict=True)
    )
    return d_q, d_k, d_v


def _fake_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    heads: int,
    scale: float,
    needed: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d_q, d_k, d_v = (
        t.new_empty(t.shape if need else (0,)) for t, need in zip((q, k, v), needed, strict=True)
    )
    return d_q, d_k, d_v


_forward_op = register("attention", reference, fake=_fake)
_backward_op = register("attention_backward", reference_backward, fake=_fake_backward)


@register_flop_formula(torch.ops.prfl_fast.attention)
def _flops(q, k, v, *args, out_shape=None, **kwargs):
    return 4 * q[0] * q[1] * k[1] * q[2]


@register_flop_formula(torch.ops.prfl_fast.attention_backward)
def _flops_backward(grad, q, k, *args, out_shape=None, **kwargs):
    return 10 * q[0] * q[1] * k[1] * q[2]


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.heads, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse)


def _backward(ctx, grad, _):
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward_op(grad, *ctx.saved_tensors, ctx.heads, ctx.scale, needed)
    kept = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    return (*kept, None, None)


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# Public function.
def _check_keys(q: torch.Tensor, **pair: torch.Tensor) -> None:
    op, (batch, _, dim) = "attention", q.shape
    (first, keys), (second, values) = pair.items()
    for name, x in pair.items():
        require_float(op, name, x)
        ok = x.ndim == 3 and x.shape[::2] == q.shape[::2]
        require(ok, op, name, x, f"shape [{batch}, Lk, {dim}] to match q")
        require(x.dtype == q.dtype, op, name, x, f"q's dtype {q.dtype}")
        require(x.shape[1] > 0, op, name, x, "at least one key")
        require(x.stride(-1) == 1 or dim == 1, op, name, x, "a contiguous last axis")
    require(values.shape == keys.shape, op, second, values, f"{first}'s shape {list(keys.shape)}")
    require_same_device(op, q=q, **pair)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every query over every key, no mask, no dropout.

    Args:
        q: ``[B, Lq, D]``, last dimension dense, rows may be strided (a slice of a packed
            projection).
        k, v: ``[B, Lk, D]``, q's dtype.
        heads: D = heads · d.
        extra_k, extra_v: ``[B, Le, D]``, a second key set with its own softmax; its output, rounded
            to q's dtype, is added to the first's (Wan I2V attends to text and image tokens this
            way).
        scale: factor of the scores, 1/√d unless given.

    Returns:
        ``out [B, Lq, D]`` in q's dtype and ``lse [B, heads, Lq]`` in float32 (float64 for float64):
        the log-sum-exp of the first key set's scores. No gradient flows through ``lse``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, D not a multiple of ``heads``, no
            keys, or only one of ``extra_k`` and ``extra_v``.
    """
    op, extra = "attention", {"extra_k": extra_k, "extra_v": extra_v}
    require_float(op, "q", q)
    require(q.ndim == 3, op, "q", q, "a shape [B, Lq, D]")
    dim = q.shape[2]
    require(q.stride(-1) == 1 or dim == 1, op, "q", q, "a contiguous last axis")
    require(heads > 0 and dim % heads == 0, op, "heads", heads, f"a divisor of D = {dim}")
    _check_keys(q, k=k, v=v)
    for name, other in (("extra_k", "extra_v"), ("extra_v", "extra_k")):
        ok = extra[name] is not None or extra[other] is None
        require(ok, op, name, extra[name], f"a tensor, as {other} is given")
    scale = 1 / math.sqrt(dim // heads) if scale is None else float(scale)
    out, lse = _forward_op(q, k, v, heads, scale)
    if extra_k is not None and extra_v is not None:
        _check_keys(q, extra_k=extra_k, extra_v=extra_v)
        out = out + _forward_op(q, extra_k, extra_v, heads, scale)[0]
    return out, lse
