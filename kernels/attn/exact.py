"""Dense multi-head attention that also returns the log-sum-exp of its scores.

    s = scale · q kᵀ,  lse_i = log Σ_j exp(s_ij),  p_ij = exp(s_ij - lse_i),  out = p v
    d_v = pᵀ d_out
    d_s = p ⊙ (d_out vᵀ - δ),  δ_i = d_out_i · out_i
    d_q = scale · d_s k,  d_k = scale · d_sᵀ q

The kernels are those of other packages. This file makes them one operation that returns ``lse``, so
that checkpointing can keep (out, lse) and recompute everything else. ``backend_choice.py`` lists
the kernels, ``backends.py`` calls them. A second key set (the image tokens of Wan I2V) is a second
call whose output is added.

Shapes: q ``[B, Lq, D]``, k and v ``[B, Lk, D]`` with D = heads · d, rows may be strided; out ``[B,
Lq, D]``; lse ``[B, heads, Lq]``; key_lengths ``[B]``: j above stops at ``key_lengths[b]``, and the
gradient of the keys and values past it is zero.
Dtypes: scores, softmax and sums in float32 (float64 for float64), out rounded once to q's dtype;
lse natural, float32 (float64 for float64), for every kernel, so that the backward of one kernel
takes the lse of another.
Saved for backward: q, k, v, out, lse. No L×L matrix is stored on any path.
FLOPs: 4·B·heads·Lq·Lk·d forward, 2.5 times that backward (the scores are computed again). The
formula counts every key, because only the device knows key_lengths.
Buffers of the backward: its kernels sum d_q in float32, 1.4 GiB at 14B and 720p. Heads are
independent, so the backward runs on as few groups of heads as keep this buffer at ``GROUP_BYTES``;
see :func:`heads_of_call`.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from prfl_fast.kernels.attn.backend_choice import (
    choose,
    choose_fast,
    describe_case,
    explain,
    get_attention_backend,
)
from prfl_fast.kernels.attn.backends import CALLS
from prfl_fast.kernels.runtime.checks import (
    cast,
    compute_dtype,
    require,
    require_float,
    require_same_device,
)
from prfl_fast.kernels.runtime.registry import register

CHUNK = 1 << 26  # scores that the plain path holds at once: 256 MB of float32
# Largest float32 d_q of one call of a backward. Calls of this size fill a GPU: with heads of 128
# channels they have 4096 tiles of 128 queries, for at most 148 multiprocessors.
GROUP_BYTES = 256 << 20


# Plain PyTorch: the fallback, and with upcast the exact result that tests compare with.
def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """View ``[B, L, D]`` as ``[B, L, heads, d]``; Tensor.unflatten takes four times as long."""
    batch, tokens, dim = x.shape
    return x.view(batch, tokens, heads, dim // heads)


def _heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """View ``[B, L, D]`` as ``[B, heads, L, d]``."""
    return _split(x, heads).transpose(1, 2)


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """Return ``[B, heads, L, d]`` as a contiguous ``[B, L, D]``; no copy if it has that layout."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _query_chunks(q: torch.Tensor, k: torch.Tensor) -> list[slice]:
    rows = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(start, start + rows) for start in range(0, q.shape[2], rows)]


def _beyond(k: torch.Tensor, key_lengths: torch.Tensor) -> torch.Tensor:
    """Return the mask ``[B, Lk]`` of the keys past ``key_lengths``."""
    return torch.arange(k.shape[1], device=k.device) >= key_lengths[:, None]


def plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    upcast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the softmax in chunks of queries; ``upcast``: dtype computed in and returned."""
    dtype = compute_dtype(q, upcast)
    beyond = None if key_lengths is None else _beyond(k, key_lengths)[:, None, None]
    q, k, v = (_heads(t, heads) for t in (q, k, v))
    k, v = k.to(dtype), v.to(dtype)
    outs, lses = [], []
    for rows in _query_chunks(q, k):
        scores = (q[:, :, rows].to(dtype) * scale) @ k.transpose(-1, -2)
        if beyond is not None:
            scores.masked_fill_(beyond, -torch.inf)
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
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``(d_q, d_k, d_v)`` of :func:`plain` as ``[B, L, D]``, in the dtype computed in."""
    dtype = compute_dtype(q)
    beyond = None if key_lengths is None else _beyond(k, key_lengths)[:, None, None]
    grad, q, k, v, out = (_heads(t, heads) for t in (grad, q, k, v, out))
    k, v = k.to(dtype), v.to(dtype)
    d_q, d_k, d_v = [], torch.zeros_like(k), torch.zeros_like(v)
    for rows in _query_chunks(q, k):
        g, queries = grad[:, :, rows].to(dtype), q[:, :, rows].to(dtype) * scale
        p = (queries @ k.transpose(-1, -2)).sub_(lse[:, :, rows, None]).exp_()
        if beyond is not None:
            p.masked_fill_(beyond, 0)
        d_v += p.transpose(-1, -2) @ g
        delta = (g * out[:, :, rows]).sum(-1, keepdim=True)
        d_s = (g @ v.transpose(-1, -2)).sub_(delta).mul_(p)
        d_q.append(d_s @ k * scale)
        d_k += d_s.transpose(-1, -2) @ queries
    return _tokens(torch.cat(d_q, 2)), _tokens(d_k), _tokens(d_v)


# The operation: it calls the kernel of the chosen backend.
def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    scale: float,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(out, lse)`` from the chosen backend; both contiguous."""
    if q.numel() == 0:
        return _fake(q, k, v, heads, scale)
    name = choose_fast(q) or choose(describe_case(heads, key_lengths, q, k, v))
    if name == "plain":
        return plain(q, k, v, heads, scale, key_lengths)
    forward, _ = CALLS[name]
    split = _split(q, heads), _split(k, heads), _split(v, heads)
    out, lse = forward(*split, scale, key_lengths)
    return out.flatten(2).contiguous(), lse.contiguous()


def heads_of_call(q: torch.Tensor, heads: int) -> int:
    """Return how many heads each call of a backward takes to keep d_q at ``GROUP_BYTES``.

    The last call may take fewer. A single head may exceed the limit.
    """
    most = max(1, GROUP_BYTES // max(1, 4 * q.numel() // heads))
    return -(-heads // -(-heads // most))  # groups of about equal size


def _fake(q, k, v, heads, scale, key_lengths=None):
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
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``(d_q, d_k, d_v)``, contiguous; an empty tensor for each not needed."""
    if q.numel() == 0:
        d_q, d_k, d_v = (
            t.new_zeros(t.shape if need else (0,))
            for t, need in zip((q, k, v), needed, strict=True)
        )
        return d_q, d_k, d_v
    # Kernels need a dense last dimension; the gradient of a sum, for example, is expanded.
    grad, out = cast(grad, q.dtype).contiguous(), out.contiguous()
    name = choose_fast(q) or choose(describe_case(heads, key_lengths, q, k, v, grad, out))
    if name == "plain":
        gradients = plain_backward(grad, q, k, v, out, lse, heads, scale, key_lengths)
    else:
        tensors = grad, q, k, v, out, lse
        gradients = _in_groups(CALLS[name][1], tensors, heads, scale, needed, key_lengths)
    pairs = zip(gradients, needed, strict=True)
    d_q, d_k, d_v = [cast(g, q.dtype).contiguous() if need else q.new_empty(0) for g, need in pairs]
    if key_lengths is not None:
        # Kernels may leave the memory of these keys uninitialized.
        beyond = _beyond(k, key_lengths)[..., None]
        for gradient, need in ((d_k, needed[1]), (d_v, needed[2])):
            if need:
                gradient.masked_fill_(beyond, 0)
    return d_q, d_k, d_v


def _in_groups(backward, tensors, heads, scale, needed, key_lengths):
    """Return the gradients ``[B, L, D]`` of a backend's backward, called on groups of heads."""
    *tensors, lse = tensors
    split, size = [_split(t, heads) for t in tensors], heads_of_call(tensors[1], heads)
    if size == heads:
        found = backward(*split, lse.contiguous(), scale, key_lengths)
        return [g.flatten(2) for g in found]
    pairs = zip(split[1:4], needed, strict=True)
    whole = [t.new_empty(t.shape if need else 0) for t, need in pairs]
    for start in range(0, heads, size):
        group = slice(start, start + size)
        part = [t[:, :, group] for t in split]
        found = backward(*part, lse[:, group].contiguous(), scale, key_lengths)
        for gradient, need, result in zip(whole, needed, found, strict=True):
            if need:
                gradient[:, :, group] = result
        del found, result  # free them before the next group runs
    return [g.flatten(2) if need else g for g, need in zip(whole, needed, strict=True)]


def _fake_backward(grad, q, k, v, out, lse, heads, scale, needed, key_lengths=None):
    pairs = zip((q, k, v), needed, strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in pairs)


def check_heads(op, q, k, v, heads, names=("k", "v")):
    """Raise ``ValueError`` unless q ``[B, Lq, D]``, k and v ``[B, Lk, D]`` and ``heads`` match."""
    require_float(op, "q", q)
    require(q.ndim == 3 and q.shape[2] > 0, op, "q", q, "a shape [B, Lq, D] with D > 0")
    batch, _, dim = q.shape
    require(q.stride(-1) == 1 or dim == 1, op, "q", q, "a contiguous last axis")
    require(heads > 0 and dim % heads == 0, op, "heads", heads, f"a divisor of D = {dim}")
    pair = dict(zip(names, (k, v), strict=True))
    for name, x in pair.items():
        require_float(op, name, x)
        ok = x.ndim == 3 and x.shape[::2] == q.shape[::2]
        require(ok, op, name, x, f"shape [{batch}, Lk, {dim}] to match q")
        require(x.dtype == q.dtype, op, name, x, f"q's dtype {q.dtype}")
        require(x.shape[1] > 0, op, name, x, "at least one key")
        require(x.stride(-1) == 1 or dim == 1, op, name, x, "a contiguous last axis")
    require(v.shape == k.shape, op, names[1], v, f"{names[0]}'s shape {list(k.shape)}")
    require_same_device(op, q=q, **pair)


def _check(q, k, v, heads, scale, key_lengths=None):
    check_heads("attention", q, k, v, heads)
    if key_lengths is not None:
        op, name = "attention", "key_lengths"
        ok = isinstance(key_lengths, torch.Tensor) and key_lengths.dtype == torch.int32
        ok = ok and key_lengths.shape == q.shape[:1]
        require(ok, op, name, key_lengths, f"int32 of shape [{len(q)}], one for each sample")
        require_same_device(op, q=q, key_lengths=key_lengths)


_forward_op = register("attention", reference, fake=_fake, report=explain, check=_check)
_backward_op = register(
    "attention_backward", reference_backward, fake=_fake_backward, report=explain
)


@register_flop_formula(torch.ops.prfl_fast.attention)
def _flops(q, k, v, *args, out_shape=None, **kwargs):
    return 4 * q[0] * q[1] * k[1] * q[2]


@register_flop_formula(torch.ops.prfl_fast.attention_backward)
def _flops_backward(grad, q, k, *args, out_shape=None, **kwargs):
    return 10 * q[0] * q[1] * k[1] * q[2]


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.heads, ctx.scale, key_lengths = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # lse would get a gradient of zeros otherwise
    ctx.save_for_backward(q, k, v, out, lse, key_lengths)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    *tensors, key_lengths = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward_op(grad, *tensors, ctx.heads, ctx.scale, needed, key_lengths)
    kept = [g if need else None for g, need in zip(gradients, needed, strict=True)]
    return (*kept, None, None, None)


def _is_native(q, k, v, heads, scale, key_lengths=None):
    small = 0 < q.numel() <= 1 << 20  # with more elements our function's host time matters little
    return small and key_lengths is None and get_attention_backend() != "plain"


_forward_op.register_autograd(_backward, setup_context=_setup_context, native=_is_native)


# Public function.
def default_scale(q: torch.Tensor, heads: int) -> float:
    """Return 1/√d; 1 for wrong arguments, which the operation refuses later."""
    try:
        return 1 / math.sqrt(q.shape[2] // heads)
    except (AttributeError, IndexError, ValueError, ZeroDivisionError):
        return 1.0


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    heads: int,
    extra_k: torch.Tensor | None = None,
    extra_v: torch.Tensor | None = None,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax attention of every query over every key; key lengths are the only mask.

    Args:
        q: ``[B, Lq, D]``, last dimension dense, rows may be strided (a slice of a packed
            projection). There is no dropout.
        k, v: ``[B, Lk, D]``, q's dtype.
        heads: D = heads · d.
        extra_k, extra_v: ``[B, Le, D]``, a second key set with its own softmax; its output, rounded
            to q's dtype, is added to the first's (text and image tokens in Wan I2V).
        scale: factor of the scores, 1/√d unless given.
        key_lengths: int32 ``[B]`` on q's device, values from 1 to Lk (not checked on a GPU). Sample
            b attends to its first ``key_lengths[b]`` keys of ``k`` and to all of ``extra_k``. Keys
            and values past this length must be finite. Not every backend takes lengths; ``auto``
            chooses one that does.

    Returns:
        ``out [B, Lq, D]`` in q's dtype and ``lse [B, heads, Lq]`` in float32 (float64 for float64):
        the log-sum-exp of the first key set's scores. No gradient flows through ``lse``.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, D is not a multiple of ``heads``,
            there are no keys, key lengths are out of range, only one of ``extra_k`` and ``extra_v``
            is given, or the backend of :func:`set_attention_backend` does not take these tensors.
    """
    if (extra_k is None) != (extra_v is None):
        name, other = ("extra_k", "extra_v") if extra_k is None else ("extra_v", "extra_k")
        require(False, "attention", name, None, f"a tensor, as {other} is given")
    # A read would stall a GPU, and would break the graph of a trace.
    if key_lengths is not None and not torch.compiler.is_compiling():
        if isinstance(key_lengths, torch.Tensor) and key_lengths.device.type == "cpu":
            values = key_lengths.flatten().tolist()
            ok = all(0 < n <= k.shape[1] for n in values)
            expected = f"numbers from 1 to Lk = {k.shape[1]}"
            require(ok, "attention", "key_lengths", values, expected)
    scale = default_scale(q, heads) if scale is None else float(scale)
    out, lse = _forward_op(q, k, v, heads, scale, key_lengths)
    if extra_k is not None and extra_v is not None:
        check_heads("attention", q, extra_k, extra_v, heads, ("extra_k", "extra_v"))
        out = out + _forward_op(q, extra_k, extra_v, heads, scale, None)[0]
    return out, lse
