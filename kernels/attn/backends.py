"""Call each of the attention kernels that ``attention`` wraps.

A backend is two functions on tensors ``[B, L, heads, d]`` whose last axis is dense:

    forward(q, k, v, scale, lengths)                     -> (out [B, Lq, heads, d], lse)
    backward(grad, q, k, v, out, lse, scale, lengths)    -> (d_q, d_k, d_v) like q, k, v

lse is the natural logarithm, float32 ``[B, heads, Lq]``, for every backend. The functions convert
from the layout of each backend, so the backward of one takes the lse of another. Gradients of keys
past ``lengths`` (int32 ``[B]`` or None) are undefined: ``attention`` sets them to zero.

A package is imported when a call first considers its backend. Most backends sum d_q by atomics;
``torch.use_deterministic_algorithms(True)`` requests the fixed order where a backend has one, which
is slower, and excludes the others.
"""

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Sequence
from typing import Any

import torch

from prfl_fast.kernels.runtime.checks import compute_dtype

_aten = torch.ops.aten

# Backend → module of its package, and functions with a parameter that old versions lack.
PACKAGES: dict[str, tuple[str, dict[str, str]]] = {
    "flash_attn_2": (
        "flash_attn.flash_attn_interface",
        {
            "_flash_attn_forward": "window_size_left",
            "_flash_attn_backward": "window_size_left",
            "_flash_attn_varlen_forward": "window_size_left",
            "_flash_attn_varlen_backward": "window_size_left",
        },
    ),
    "flash_attn_3": (
        "flash_attn_interface",
        {"_flash_attn_forward": "window_size_left", "_flash_attn_backward": "is_causal"},
    ),
    "flash_attn_4": (
        "flash_attn.cute.interface",
        {"_flash_attn_fwd": "return_lse", "_flash_attn_bwd": "seqused_k"},
    ),
    "xformers": (
        "xformers.ops",
        {
            "memory_efficient_attention_forward_requires_grad": "scale",
            "memory_efficient_attention_backward": "scale",
        },
    ),
}


@functools.cache
def absent(name: str) -> str | None:
    """Return a message if the package of a backend is not installed, without importing it."""
    return find_package(PACKAGES[name][0])


@functools.cache
def load(name: str) -> tuple[Any, str | None]:
    """Return the module of a backend's package, or None and the reason why it is unusable."""
    return import_package(*PACKAGES[name])


def find_package(module: str) -> str | None:
    """Return a message if the package of a module is not installed, without importing it."""
    root = module.partition(".")[0]
    try:
        found = importlib.util.find_spec(root) is not None
    except ValueError:  # sys.modules has an entry without a spec
        return None
    return None if found else f"package {root} is not installed"


def import_package(module: str, needs: dict[str, str]) -> tuple[Any, str | None]:
    """Return a module whose functions have the parameters ``needs``, or None and the reason."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return None, f"package {error.name} is not installed"
    except Exception as error:  # a binary built for another PyTorch fails in many ways
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        return None, f"package {module} does not import: {reason}"
    for function, parameter in needs.items():
        call = getattr(found, function, None)
        if call is None:
            return None, f"package {module} has no {function}: update it"
        # A custom op hides the signature of the function it wraps.
        parameters = inspect.signature(getattr(call, "_init_fn", call)).parameters
        if parameter not in parameters and "kwargs" not in parameters:
            return None, f"package {module}: {function} takes no {parameter}: update it"
    return found, None


def deterministic() -> bool:
    """Return True if PyTorch refuses nondeterministic algorithms."""
    warn = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled() and not warn


def _swap(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return ``[B, L, heads, d]`` as ``[B, heads, L, d]``, or the reverse."""
    return [t.transpose(1, 2) for t in tensors]


# Kernels whose backward has no length argument take packed sequences. Each sample becomes two of
# them: its first n keys with all its queries, and the rest of its keys with no query. So no key is
# copied, and the host does not need the value of n.
def _segments(lengths: torch.Tensor, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the starts of the 2·B sequences of queries and of keys, and the end: int32."""
    sample = torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    start = sample * keys
    starts = torch.stack((start[:-1], start[:-1] + lengths), 1).flatten()
    return (sample * queries).repeat_interleave(2)[1:], torch.cat((starts, start[-1:]))


def _packed(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.flatten(0, 1) for t in tensors]  # [B·L, heads, d]


def _pack_lse(lse: torch.Tensor) -> torch.Tensor:
    return lse.transpose(0, 1).flatten(1)  # [heads, B·Lq]


def _unpacked(tensors: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
    return [t.unflatten(0, (batch, -1)) for t in tensors]


def _unpack_lse(lse: torch.Tensor, batch: int) -> torch.Tensor:
    return lse.unflatten(1, (batch, -1)).transpose(0, 1)


# flash-attn 2, 3, 4.
_NO_EXTRAS_2 = dict(
    dropout_p=0.0, causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    alibi_slopes=None,
)  # fmt: skip


def _lengths_2(lengths, q, k):
    queries, keys = q.shape[1], k.shape[1]
    cu_q, cu_k = _segments(lengths, queries, keys)
    return dict(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=queries, max_seqlen_k=keys)


def _flash_attn_2(q, k, v, scale, lengths):
    module = load("flash_attn_2")[0]
    if lengths is None:
        out, lse, *_ = module._flash_attn_forward(
            q=q, k=k, v=v, softmax_scale=scale, return_softmax=False, **_NO_EXTRAS_2
        )
        return out, lse
    batch, (flat_q, flat_k, flat_v) = len(q), _packed(q, k, v)
    out, lse, *_ = module._flash_attn_varlen_forward(
        q=flat_q, k=flat_k, v=flat_v, softmax_scale=scale, return_softmax=False,
        **_lengths_2(lengths, q, k), **_NO_EXTRAS_2,
    )  # fmt: skip
    return _unpacked([out], batch)[0], _unpack_lse(lse, batch)


def _flash_attn_2_backward(grad, q, k, v, out, lse, scale, lengths):
    module, names = load("flash_attn_2")[0], ("dout", "q", "k", "v", "out", "dq", "dk", "dv")
    gradients = [t.new_empty(t.shape) for t in (q, k, v)]
    tensors = [grad, q, k, v, out, *gradients]
    fixed = dict(softmax_scale=scale, deterministic=deterministic(), **_NO_EXTRAS_2)
    if lengths is None:
        named = dict(zip(names, tensors, strict=True))
        module._flash_attn_backward(softmax_lse=lse, **named, **fixed)
    else:
        named = dict(zip(names, _packed(*tensors), strict=True))
        module._flash_attn_varlen_backward(
            softmax_lse=_pack_lse(lse), **named, **_lengths_2(lengths, q, k), **fixed
        )
    return gradients


def _flash_attn_3(q, k, v, scale, lengths):
    out, lse, *_ = load("flash_attn_3")[0]._flash_attn_forward(
        q=q, k=k, v=v, seqused_k=lengths, softmax_scale=scale
    )
    return out, lse


def _flash_attn_3_backward(grad, q, k, v, out, lse, scale, lengths):
    d_q, d_k, d_v = (t.new_empty(t.shape) for t in (q, k, v))
    load("flash_attn_3")[0]._flash_attn_backward(
        dout=grad, q=q, k=k, v=v, out=out, softmax_lse=lse,
        sequed_k=lengths,  # the package spells it so
        dq=d_q, dk=d_k, dv=d_v, softmax_scale=scale, is_causal=False,
        deterministic=deterministic(),
    )  # fmt: skip
    return d_q, d_k, d_v


def _flash_attn_4(q, k, v, scale, lengths):
    out, lse, *_ = load("flash_attn_4")[0]._flash_attn_fwd(
        q, k, v, seqused_k=lengths, softmax_scale=scale, return_lse=True
    )
    return out, lse


def _flash_attn_4_backward(grad, q, k, v, out, lse, scale, lengths):
    gradients = load("flash_attn_4")[0]._flash_attn_bwd(
        q, k, v, out, grad, lse, softmax_scale=scale, seqused_k=lengths,
        deterministic=deterministic(),
    )  # fmt: skip
    return gradients[:3]


# PyTorch's own kernels. Without dropout their backward does not read the random state.
def _flash(q, k, v, scale, lengths):
    queries, keys, fixed = q.shape[1], k.shape[1], (0.0, False, False)
    if lengths is None:
        return _aten._flash_attention_forward(
            q, k, v, None, None, queries, keys, *fixed, scale=scale
        )[:2]
    segments = _segments(lengths, queries, keys)
    out, lse = _aten._flash_attention_forward(
        *_packed(q, k, v), *segments, queries, keys, *fixed, scale=scale
    )[:2]
    return _unpacked([out], len(q))[0], _unpack_lse(lse, len(q))


def _flash_backward(grad, q, k, v, out, lse, scale, lengths):
    state = q.new_empty(0, dtype=torch.int64)
    fixed = (q.shape[1], k.shape[1], 0.0, False, state, state)
    if lengths is None:
        return _aten._flash_attention_backward(
            grad, q, k, v, out, lse, None, None, *fixed, scale=scale
        )
    segments = _segments(lengths, q.shape[1], k.shape[1])
    gradients = _aten._flash_attention_backward(
        *_packed(grad, q, k, v, out), _pack_lse(lse), *segments, *fixed, scale=scale
    )
    return _unpacked(gradients, len(q))


def _cudnn(q, k, v, scale, lengths):
    out, lse = _aten._scaled_dot_product_cudnn_attention(*_swap(q, k, v), None, True, scale=scale)[
        :2
    ]
    return out.transpose(1, 2), lse.flatten(2)  # [B, heads, Lq, 1]


def _cudnn_backward(grad, q, k, v, out, lse, scale, lengths):
    # cuDNN asserts that grad and out have the same strides: both are dense [B, L, D] here.
    state = q.new_zeros((), dtype=torch.int64)
    return _swap(
        *_aten._scaled_dot_product_cudnn_attention_backward(
            *_swap(grad, q, k, v, out), lse.unsqueeze(-1), state, state, None, None, None,
            q.shape[1], k.shape[1], 0.0, False, scale=scale,
        )
    )  # fmt: skip


def _bias(lengths: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Return a mask of 0 and -∞, ``[B, heads, Lq, Lk]`` expanded from aligned rows ``[B, Lk]``."""
    if lengths is None:
        return None
    keys = k.shape[1]
    column = torch.arange(-(-keys // 16) * 16, device=k.device)
    bias = q.new_zeros(len(q), len(column)).masked_fill_(column >= lengths[:, None], -torch.inf)
    return bias[:, None, None, :keys].expand(len(q), q.shape[2], q.shape[1], keys)


def _efficient(q, k, v, scale, lengths):
    out, lse = _aten._scaled_dot_product_efficient_attention(
        *_swap(q, k, v), _bias(lengths, q, k), True, scale=scale
    )[:2]
    return out.transpose(1, 2), lse[..., : q.shape[1]]  # padded to 32 queries


def _efficient_backward(grad, q, k, v, out, lse, scale, lengths):
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)
    state = q.new_zeros((), dtype=torch.int64)
    gradients = _aten._scaled_dot_product_efficient_attention_backward(
        *_swap(grad, q, k, v), _bias(lengths, q, k), *_swap(out), lse, state, state, 0.0,
        [True, True, True, False], scale=scale,
    )  # fmt: skip
    return _swap(*gradients[:3])


def _mask(lengths: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    beyond = torch.arange(k.shape[1], device=k.device) >= lengths[:, None]
    return k.new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None]


def _cpu(q, k, v, scale, lengths):
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=None if lengths is None else _mask(lengths, k), scale=scale,
    )  # fmt: skip
    return out.transpose(1, 2), lse


def _cpu_backward(grad, q, k, v, out, lse, scale, lengths):
    # Without matrix units float32 is 13 times faster than bfloat16 (L 3120, D 1536).
    args = _swap(grad, q, k, v, out)
    if q.dtype != compute_dtype(q):
        args = [t.float() for t in args]
    mask = None if lengths is None else _mask(lengths, args[2].transpose(1, 2))
    gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *args, lse, 0.0, False, attn_mask=mask, scale=scale
    )
    return _swap(*gradients)


def _xformers(q, k, v, scale, lengths):
    module = load("xformers")[0]
    out, lse = module.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return out, lse[..., : q.shape[1]]  # some of its kernels pad lse


def _xformers_backward(grad, q, k, v, out, lse, scale, lengths):
    return load("xformers")[0].memory_efficient_attention_backward(
        grad, out, lse, q, k, v, scale=scale
    )


# Backend → (forward, backward).
CALLS = {
    "flash_attn_2": (_flash_attn_2, _flash_attn_2_backward),
    "flash_attn_3": (_flash_attn_3, _flash_attn_3_backward),
    "flash_attn_4": (_flash_attn_4, _flash_attn_4_backward),
    "flash": (_flash, _flash_backward),
    "cudnn": (_cudnn, _cudnn_backward),
    "efficient": (_efficient, _efficient_backward),
    "xformers": (_xformers, _xformers_backward),
    "cpu": (_cpu, _cpu_backward),
}
