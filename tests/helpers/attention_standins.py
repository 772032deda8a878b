"""Stand-ins for attention packages and for PyTorch's CUDA operators, computed in plain PyTorch.

Each has the signature of the real function, checks layouts and dtypes as the real one does, and
returns lse in the same layout. A backward uses the out and lse it is given, so that a wrong
conversion of either shows. Elements that a kernel may leave unwritten stay NaN.
"""

import math
import sys
import types

import torch
from rollout_emulation import softmax_average
from torch.utils._pytree import tree_map_only


def forward(q, k, v, scale, bias=None):
    """Return out in q's dtype and lse of ``[…, L, d]``, computed in float32."""
    scores = q.float() @ k.float().mT * scale
    scores = scores if bias is None else scores + bias.float()
    return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1)


def backward(grad, q, k, v, out, lse, scale, bias=None):
    """Return d_q, d_k, d_v from lse and out, without computing the softmax again."""
    dtype = q.dtype
    grad, q, k, v, out = (t.float() for t in (grad, q, k, v, out))
    scores = q @ k.mT * scale
    p = torch.exp((scores if bias is None else scores + bias.float()) - lse[..., None])
    d_s = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    gradients = d_s @ k * scale, d_s.mT @ q * scale, p.mT @ grad
    return [g.to(dtype) for g in gradients]


def nan(*shape, like, dtype=None):
    return torch.full(shape, math.nan, dtype=dtype or like.dtype)


def check(*tensors, ndim=4, half=True):
    for t in tensors:
        assert t.dim() == ndim and t.stride(-1) == 1 and t.dtype == tensors[0].dtype
        assert not half or t.dtype in (torch.float16, torch.bfloat16)
        assert all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])


def check_lse(lse, *shape):
    assert lse.dtype == torch.float32 and tuple(lse.shape) == shape and lse.is_contiguous()


def cut(t, n=None):
    """Return the first n tokens of ``[L, heads, d]`` as ``[heads, n, d]``."""
    return t[:n].transpose(0, 1)


def dense(q, k, v, scale, lengths=None):
    """Attend in ``[B, L, heads, d]`` to the first keys of each sample: lse ``[B, heads, Lq]``."""
    outs, lses = [], []
    for b in range(len(q)):
        n = k.shape[1] if lengths is None else int(lengths[b])
        out, lse = forward(cut(q[b]), cut(k[b], n), cut(v[b], n), scale)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def dense_backward(grad, q, k, v, out, lse, scale, lengths=None):
    check_lse(lse, len(q), q.shape[2], q.shape[1])
    gradients = [nan(*t.shape, like=t) for t in (q, k, v)]
    for b in range(len(q)):
        n = k.shape[1] if lengths is None else int(lengths[b])
        tensors = cut(grad[b]), cut(q[b]), cut(k[b], n), cut(v[b], n), cut(out[b]), lse[b]
        for whole, g in zip(gradients, backward(*tensors, scale), strict=True):
            part = whole[b] if whole is gradients[0] else whole[b, :n]
            part.copy_(g.transpose(0, 1))
    return gradients


def sequences(cu_q, cu_k, total_q, total_k, max_q, max_k):
    """Yield the slices of each sequence; check what every kernel of that kind checks."""
    for cu, total, longest in ((cu_q, total_q, max_q), (cu_k, total_k, max_k)):
        assert cu.dtype == torch.int32 and cu.dim() == 1 and cu.is_contiguous()
        assert cu[0] == 0 and cu[-1] == total
        assert (cu.diff() >= 0).all() and cu.diff().max() <= longest
    assert len(cu_q) == len(cu_k)
    cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(cu_q) - 1):
        yield slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])


def packed(q, k, v, cu_q, cu_k, max_q, max_k, scale):
    """Attend in ``[tokens, heads, d]``; lse is ``[heads, tokens]``, NaN for empty sequences."""
    out, lse = nan(*q.shape, like=q), nan(q.shape[1], len(q), like=q, dtype=torch.float32)
    for rows, keys in sequences(cu_q, cu_k, len(q), len(k), max_q, max_k):
        if rows.stop > rows.start:
            o, s = forward(cut(q[rows]), cut(k[keys]), cut(v[keys]), scale)
            out[rows], lse[:, rows] = o.transpose(0, 1), s
    return out, lse


def packed_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale):
    check_lse(lse, q.shape[1], len(q))
    gradients = [nan(*t.shape, like=t) for t in (q, k, v)]
    for rows, keys in sequences(cu_q, cu_k, len(q), len(k), max_q, max_k):
        if rows.stop > rows.start:
            tensors = cut(grad[rows]), cut(q[rows]), cut(k[keys]), cut(v[keys]), cut(out[rows])
            parts = backward(*tensors, lse[:, rows], scale)
            for whole, part, where in zip(gradients, parts, (rows, keys, keys), strict=True):
                whole[where] = part.transpose(0, 1)
    return gradients


def fill(targets, found, lse):
    """Write gradients where flash-attn is told to; return a tensor like the one it returns."""
    for target, value in zip(targets, found, strict=True):
        target.copy_(value)
    return lse.clone()


def attend_in_e4m3(q, k, v, scale, *descales):
    """Attend in ``[B, L, heads, d]`` as flash-attn 3 and 4 do: scales of heads, out in bfloat16."""
    for t in (q, k, v):
        assert t.dtype == torch.float8_e4m3fn and t.dim() == 4 and t.stride(-1) == 1
        assert t.shape[3] % 16 == 0 and all(s % 16 == 0 for s in t.stride()[:-1])
    for descale in descales:
        check_lse(descale, len(q), k.shape[2])
    q, k, v = (t.float() * s[:, None, :, None] for t, s in zip((q, k, v), descales, strict=True))
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * (scale / math.log(2))
    out = softmax_average(scores, v.transpose(1, 2), "e4m3", 256.0, 128)
    return out.transpose(1, 2).bfloat16()


def make_module(name, *functions):
    """Return a module of these functions, and a list for what they are told of determinism."""
    module = types.ModuleType(name)
    module.deterministic = []
    for function in functions:
        setattr(module, function.__name__, function)
    return module


# flash-attn 2.8.
def _flash_2():
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        check(q, k, v)
        assert (dropout_p, causal, softcap, alibi_slopes) == (0.0, False, 0.0, None)
        assert window_size_left == window_size_right == -1
        return *dense(q, k, v, softmax_scale), torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        check(dout, q, k, v, out, dq, dk, dv)
        module.deterministic.append(deterministic)
        found = dense_backward(dout, q, k, v, out, softmax_lse, softmax_scale)
        return fill((dq, dk, dv), found, softmax_lse)

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        check(q, k, v, ndim=3)
        segments = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        return *packed(q, k, v, *segments, softmax_scale), torch.empty(0), torch.empty(2)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        check(dout, q, k, v, out, dq, dk, dv, ndim=3)
        segments = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        found = packed_backward(dout, q, k, v, out, softmax_lse, *segments, softmax_scale)
        return fill((dq, dk, dv), found, softmax_lse)

    both = _flash_attn_forward, _flash_attn_backward
    varlen = _flash_attn_varlen_forward, _flash_attn_varlen_backward
    module = make_module("flash_attn.flash_attn_interface", *both, *varlen)
    return module


# FlashAttention 3, the module that its hopper/ folder installs.
def _flash_3():
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        if q.dtype == torch.float8_e4m3fn:
            out = attend_in_e4m3(q, k, v, softmax_scale, q_descale, k_descale, v_descale)
            return out, torch.tensor([]), torch.tensor([]), torch.tensor([])
        check(q, k, v)
        assert seqused_k is None or seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
        return *dense(q, k, v, softmax_scale, seqused_k), torch.tensor([]), torch.tensor([])

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        check(dout, q, k, v, out, dq, dk, dv)
        module.deterministic.append(deterministic)
        found = dense_backward(dout, q, k, v, out, softmax_lse, softmax_scale, sequed_k)
        return fill((dq, dk, dv), found, softmax_lse)

    wrapped = map(_CustomOp, (_flash_attn_forward, _flash_attn_backward))
    module = make_module("flash_attn_interface", *wrapped)
    return module


class _CustomOp:
    """A function as torch.library.custom_op wraps it: called like it, without its signature."""

    def __init__(self, function):
        self._init_fn, self.__name__ = function, function.__name__

    def __call__(self, *args, **kwargs):
        return self._init_fn(*args, **kwargs)


# FlashAttention 4, flash_attn.cute.
def _flash_4():
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None,
        softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None,
        score_mod=None, mask_mod=None, block_sparse_tensors=None, return_lse=False, out=None,
        lse=None, aux_tensors=None, aux_scalars=None, q_descale=None, k_descale=None,
        v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False,
    ):  # fmt: skip
        if q.dtype == torch.float8_e4m3fn:
            assert q.shape[3] <= 128
            out = attend_in_e4m3(q, k, v, softmax_scale, q_descale, k_descale, v_descale)
            return out, None, None, None
        check(q, k, v)
        assert seqused_k is None or seqused_k.dtype == torch.int32 and seqused_k.stride(0) == 1
        out, lse = dense(q, k, v, softmax_scale, seqused_k)
        return out, lse if return_lse else None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0,
        window_size_left=None, window_size_right=None, m_block_size=64, n_block_size=128,
        num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
        dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2,
        V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
        score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
        block_sparse_tensors=None, dlse=None, learnable_sink=None,
    ):  # fmt: skip
        check(q, k, v, out, dout)
        module.deterministic.append(deterministic)
        return tuple(dense_backward(dout, q, k, v, out, lse, softmax_scale, seqused_k))

    module = make_module("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)
    return module


# xformers 0.0.3x: lse may come padded to 32 queries.
def _xformers():
    def memory_efficient_attention_forward_requires_grad(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        check(query, key, value, half=False)
        out, lse = dense(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)

    def memory_efficient_attention_backward(
        grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None
    ):
        check(grad, output, query, key, value, half=False)
        assert lse.dim() == 3 and lse.shape[2] >= query.shape[1]
        lse = lse[..., : query.shape[1]].contiguous()
        return tuple(dense_backward(grad, query, key, value, output, lse, scale))

    attend = memory_efficient_attention_forward_requires_grad
    return make_module("xformers.ops", attend, memory_efficient_attention_backward)


PACKAGES = {
    "flash_attn_2": _flash_2,
    "flash_attn_3": _flash_3,
    "flash_attn_4": _flash_4,
    "xformers": _xformers,
}


def install(monkeypatch, name):
    """Put a package's stand-in where ``import`` finds it, and return the module."""
    module = PACKAGES[name]()
    parts = module.__name__.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


class Aten:
    """``torch.ops.aten`` whose CUDA attention runs on CPU tensors.

    Every call also goes to the real operator on meta tensors. It checks the number, names and types
    of the arguments against the schema of this PyTorch, and the stand-in must return the shapes
    and dtypes that the real operator returns.
    """

    def __init__(self):
        self.called = []

    def __getattr__(self, name):
        function = getattr(self, f"run{name}")
        operator = getattr(torch.ops.aten, name)

        def call(*args, **kwargs):
            meta = tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, kwargs))
            expected = operator(*meta[0], **meta[1])
            self.called.append(name)
            found = function(*args, **kwargs)
            for ours, real in zip(found, expected, strict=False):
                assert ours.shape == real.shape and ours.dtype == real.dtype, name
            return (*found, *(None,) * (len(expected) - len(found)))

        return call

    @staticmethod
    def run_flash_attention_forward(
        q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, debug, *, scale
    ):
        check(q, k, v, ndim=4 if cum_seq_q is None else 3)
        if cum_seq_q is None:
            return dense(q, k, v, scale)
        return packed(q, k, v, cum_seq_q, cum_seq_k, max_q, max_k, scale)

    @staticmethod
    def run_flash_attention_backward(
        grad, q, k, v, out, lse, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
        rng_state, unused, *, scale,
    ):  # fmt: skip
        check(grad, q, k, v, out, ndim=4 if cum_seq_q is None else 3)
        if cum_seq_q is None:
            return dense_backward(grad, q, k, v, out, lse, scale)
        segments = cum_seq_q, cum_seq_k, max_q, max_k
        return packed_backward(grad, q, k, v, out, lse, *segments, scale)

    @staticmethod
    def run_scaled_dot_product_cudnn_attention(q, k, v, bias, compute_lse, *, scale):
        check(q, k, v)
        assert bias is None and compute_lse
        out, lse = forward(q, k, v, scale)
        return out, lse[..., None]

    @staticmethod
    def run_scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse, seed, offset, bias, cum_seq_q, cum_seq_k, max_q, max_k,
        dropout_p, is_causal, *, scale,
    ):  # fmt: skip
        check(grad, q, k, v, out)
        check_lse(lse, *q.shape[:3], 1)
        assert grad.stride() == out.stride(), "cuDNN asserts this"
        assert bias is cum_seq_q is cum_seq_k is None
        return backward(grad, q, k, v, out, lse[..., 0], scale)

    @staticmethod
    def _check_bias(bias, q, k):
        if bias is not None:
            assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
            assert bias.stride(3) == 1 and all(s % 8 == 0 for s in bias.stride()[:3])

    @classmethod
    def run_scaled_dot_product_efficient_attention(cls, q, k, v, bias, compute_lse, *, scale):
        check(q, k, v, half=False)
        cls._check_bias(bias, q, k)
        assert compute_lse
        out, lse = forward(q, k, v, scale, bias)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf)

    @classmethod
    def run_scaled_dot_product_efficient_attention_backward(
        cls, grad, q, k, v, bias, out, lse, seed, offset, dropout_p, mask, is_causal=False, *, scale
    ):
        check(grad, q, k, v, out, half=False)
        cls._check_bias(bias, q, k)
        queries = q.shape[2]
        check_lse(lse, *q.shape[:2], -(-queries // 32) * 32)
        assert (lse[..., queries:] == math.inf).all() and mask == [True, True, True, False]
        return backward(grad, q, k, v, out, lse[..., :queries], scale, bias)
