"""Folded query attention pooling: H queries attend over tokens that are their own keys and values.

    s_lh = x_l · u_h      p_h = softmax over l of s_lh      pooled_h = Σ_l p_lh x_l
    lse_h = log Σ_l exp s_lh

The u_h are queries folded through a key projection, W_k,hᵀ q_h / √d_h: the key bias cancels in
the softmax and the value projection commutes with the weighted mean, so attention pooling needs
neither keys nor values. Gradient, with g = d pooled, c = d lse and p recomputed from lse:

    ds_lh = p_lh (g_h · x_l − g_h · pooled_h + c_h)
    dx_l  = Σ_h p_lh g_h + ds_lh u_h                du_h = Σ_b,l ds_lh x_l

Shapes: x ``[B, L, D]``, u ``[H, D]``, pooled and g ``[B, H, D]``, lse ``[B, H]``.
Dtypes: scores, weights, sums, pooled and lse are float32 (float64 for float64 x); dx and du are
rounded once, to the dtypes of x and u. Triton multiplies 16-bit x in TF32, in which x is exact and
u, g, p keep 11 bits; CUDA C++ (``csrc/query_pool*.cu``) splits u, and g in g · x, in two halves,
and rounds p to the dtype of x in the forward. Sums over tokens have two stages, chunks and then
all: no atomics. Saved for backward: x, u, pooled, lse.
Bytes: the forward reads x, the backward reads x and writes dx; Triton reads x twice, because
neither registers nor L2 hold the chunks of all programs. A chunk leaves 4·H·D bytes of partials.
Triton's backward of float32 x runs the forward's first kernel again, for the exact sum of weights.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import register_flop_formula

from prfl_fast.kernels.runtime import cuda_launch as _cuda
from prfl_fast.kernels.runtime.checks import (
    cast,
    compute_dtype,
    require,
    require_float,
    require_same_device,
)
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import COUNTS, tl, triton

# Reference.
PRODUCT_ROWS = 4096  # tokens widened at a time: 168 MB at the 14B model's width


def _products(tokens: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return ``tokens @ vectors.T``, in float64 for float32.

    A score of 100 that is off by its last bit changes p by 8e-6 of it, and two orders of summation
    differ by more. The caller sums 2·H numbers a token, so float64 is small beside x.
    """
    if tokens.dtype != torch.float32:
        return tokens.mm(vectors.t())
    wide = vectors.double().t()
    if tokens.shape[0] <= PRODUCT_ROWS:
        return tokens.double().mm(wide)
    return torch.cat([part.double().mm(wide) for part in tokens.split(PRODUCT_ROWS)])


def reference(
    x: torch.Tensor, queries: torch.Tensor, upcast: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pooled and lse from plain PyTorch; ``upcast``: dtype computed in and returned."""
    dtype = compute_dtype(x, upcast)
    u = cast(queries, dtype)
    results = []
    for sample in x.unbind(0):  # a matmul over a strided batch would copy x
        tokens = cast(sample, dtype)
        scores = _products(tokens, u)  # [L, H]
        # exp(scores - lse) would not add up to one, because lse is rounded.
        weights = cast(torch.softmax(scores, 0), dtype)
        results.append((weights.t().mm(tokens), cast(scores.logsumexp(0), dtype)))
    pooled, lse = map(_stacked, zip(*results, strict=True))
    return pooled, lse


def _stacked(parts: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the results of all samples in one tensor, without a copy if there is one sample."""
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)


def reference_backward(
    grad_pooled: torch.Tensor,
    grad_lse: torch.Tensor | None,
    x: torch.Tensor,
    queries: torch.Tensor,
    pooled: torch.Tensor,
    lse: torch.Tensor,
    need_x: bool,
    need_queries: bool,
    upcast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(dx, du)`` from plain PyTorch; an empty tensor for each not needed."""
    dtype = compute_dtype(x, upcast)
    u = cast(queries, dtype)
    d_tokens, d_queries = [], []
    for b, sample in enumerate(x.unbind(0)):
        tokens = cast(sample, dtype)
        both = torch.cat((u, cast(grad_pooled[b], dtype)))  # [2H, D]
        scores, products = _products(tokens, both).chunk(2, 1)
        p = torch.softmax(scores, 0)
        # Σ p g · x is g · pooled; with it both terms round alike, so one token gives exactly zero.
        ds = (products - (p * products).sum(0)).mul_(p)
        if grad_lse is not None:
            ds += p * grad_lse[b]
        if need_x:
            weights = cast(torch.cat((ds, p), dim=1), dtype)  # [L, 2H]
            d_tokens.append(cast(weights.mm(both), upcast or x.dtype))
        if need_queries:
            d_queries.append(cast(ds.t(), dtype).mm(tokens))
    dx = _stacked(d_tokens) if need_x else x.new_empty(0, dtype=upcast)
    du = sum(d_queries[1:], d_queries[0]) if need_queries else queries.new_empty(0)
    return dx, cast(du, upcast or queries.dtype)


# Kernels.
@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, u_ptr, max_ptr, sum_ptr, partial_ptr, tokens, heads, stride_xb, stride_xt,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute scores of a chunk of tokens in a pass over D, weighted sums in a second pass."""
    i_c = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_p = i_b * tl.num_programs(0) + i_c
    o_t = i_c * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    o_h = tl.arange(0, BLOCK_H).to(tl.int64)  # [BH]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_t = o_t < tokens
    m_h = o_h < heads
    p_x = x_ptr + i_b * stride_xb + o_t[:, None] * stride_xt  # [BT, 1]
    p_u = u_ptr + o_h[:, None] * DIM  # [BH, 1]

    b_s = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for i_d in range(0, DIM, BLOCK_D):
        m_d = i_d + o_d < DIM
        m_hd = m_h[:, None] & m_d[None, :]
        m_td = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_x + (i_d + o_d)[None, :], mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
        b_u = tl.load(p_u + (i_d + o_d)[None, :], mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
        b_s = tl.dot(b_x, tl.trans(b_u), b_s, input_precision=PRECISION)

    b_s = tl.where(m_t[:, None], b_s, float("-inf"))  # [BT, BH]
    b_max = tl.max(b_s, axis=0)  # [BH]
    b_p = tl.exp(b_s - b_max[None, :])  # [BT, BH]
    tl.store(max_ptr + i_p * heads + o_h, b_max, mask=m_h)
    tl.store(sum_ptr + i_p * heads + o_h, tl.sum(b_p, axis=0), mask=m_h)

    b_pt = tl.trans(b_p)  # [BH, BT]
    p_o = partial_ptr + (i_p * heads + o_h[:, None]) * DIM  # [BH, 1]
    for i_d in range(0, DIM, BLOCK_D):
        m_d = i_d + o_d < DIM
        m_td = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_x + (i_d + o_d)[None, :], mask=m_td, other=0.0)  # [BT, BD]
        b_o = tl.dot(b_pt, b_x.to(tl.float32), input_precision=PRECISION)  # [BH, BD]
        tl.store(p_o + (i_d + o_d)[None, :], b_o, mask=m_h[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=COUNTS)
def merge_kernel(  # type: ignore[no-untyped-def]
    max_ptr, sum_ptr, partial_ptr, pooled_ptr, lse_ptr, chunks, heads, dim,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the chunks of one batch row and head over one slice of D, in a fixed order."""
    i_d = tl.program_id(0).to(tl.int64)
    i_bh = tl.program_id(1).to(tl.int64)
    i_b = i_bh // heads
    i_h = i_bh % heads
    o_c = tl.arange(0, BLOCK_C)  # [BC]
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < dim

    b_max = tl.full([BLOCK_C], float("-inf"), tl.float32)
    i_c = 0  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
    while i_c < chunks:
        o_s = (i_b * chunks + i_c + o_c) * heads + i_h  # [BC]
        b_part = tl.load(max_ptr + o_s, mask=i_c + o_c < chunks, other=float("-inf"))  # [BC]
        b_max = tl.maximum(b_max, b_part)
        i_c += BLOCK_C
    top = tl.max(b_max, axis=0)

    b_sum = tl.zeros([BLOCK_C], tl.float32)
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    i_c = 0
    while i_c < chunks:
        m_c = i_c + o_c < chunks
        o_s = (i_b * chunks + i_c + o_c) * heads + i_h  # [BC]
        b_w = tl.exp(tl.load(max_ptr + o_s, mask=m_c, other=float("-inf")) - top)  # [BC]
        b_sum += b_w * tl.load(sum_ptr + o_s, mask=m_c, other=0.0)
        p_part = partial_ptr + o_s[:, None] * dim + o_d[None, :]
        b_part = tl.load(p_part, mask=m_c[:, None] & m_d[None, :], other=0.0)  # [BC, BD]
        b_acc += tl.sum(b_w[:, None] * b_part, axis=0)
        i_c += BLOCK_C
    total = tl.sum(b_sum, axis=0)
    tl.store(pooled_ptr + i_bh * dim + o_d, b_acc / total, mask=m_d)
    if i_d == 0:
        tl.store(lse_ptr + i_bh, top + tl.log(total))


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(  # type: ignore[no-untyped-def]
    x_ptr, u_ptr, g_ptr, lse_ptr, delta_ptr, dx_ptr, du_ptr, tokens, heads, stride_xb, stride_xt,
    DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, NEED_X: tl.constexpr, NEED_QUERIES: tl.constexpr,
):  # fmt: skip
    """Compute x·u and x·g of a chunk of tokens in a pass over D, dx and du in a second pass."""
    i_c = tl.program_id(0).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i_p = i_b * tl.num_programs(0) + i_c
    o_t = i_c * BLOCK_T + tl.arange(0, BLOCK_T)  # [BT]
    o_h = tl.arange(0, BLOCK_H).to(tl.int64)  # [BH]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_t = o_t < tokens
    m_h = o_h < heads
    p_x = x_ptr + i_b * stride_xb + o_t[:, None] * stride_xt  # [BT, 1]
    p_u = u_ptr + o_h[:, None] * DIM  # [BH, 1]
    p_g = g_ptr + (i_b * heads + o_h[:, None]) * DIM  # [BH, 1]

    b_s = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    b_gx = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for i_d in range(0, DIM, BLOCK_D):
        m_d = i_d + o_d < DIM
        m_hd = m_h[:, None] & m_d[None, :]
        m_td = m_t[:, None] & m_d[None, :]
        b_x = tl.load(p_x + (i_d + o_d)[None, :], mask=m_td, other=0.0).to(tl.float32)  # [BT, BD]
        b_u = tl.load(p_u + (i_d + o_d)[None, :], mask=m_hd, other=0.0).to(tl.float32)  # [BH, BD]
        b_g = tl.load(p_g + (i_d + o_d)[None, :], mask=m_hd, other=0.0)  # [BH, BD]
        b_s = tl.dot(b_x, tl.trans(b_u), b_s, input_precision=PRECISION)
        b_gx = tl.dot(b_x, tl.trans(b_g), b_gx, input_precision=PRECISION)

    b_lse = tl.load(lse_ptr + i_b * heads + o_h, mask=m_h, other=float("inf"))  # [BH]
    b_delta = tl.load(delta_ptr + i_b * heads + o_h, mask=m_h, other=0.0)  # [BH]
    b_p = tl.where(m_t[:, None], tl.exp(b_s - b_lse[None, :]), 0.0)  # [BT, BH]
    b_ds = b_p * (b_gx - b_delta[None, :])  # [BT, BH]
    b_dst = tl.trans(b_ds)  # [BH, BT]

    p_dx = dx_ptr + (i_b * tokens + o_t[:, None]) * DIM  # [BT, 1]
    p_du = du_ptr + (i_p * heads + o_h[:, None]) * DIM  # [BH, 1]
    for i_d in range(0, DIM, BLOCK_D):
        m_d = i_d + o_d < DIM
        m_hd = m_h[:, None] & m_d[None, :]
        m_td = m_t[:, None] & m_d[None, :]
        if NEED_X:
            b_u = tl.load(p_u + (i_d + o_d)[None, :], mask=m_hd, other=0.0)  # [BH, BD]
            b_g = tl.load(p_g + (i_d + o_d)[None, :], mask=m_hd, other=0.0)  # [BH, BD]
            b_dx = tl.dot(b_p, b_g, input_precision=PRECISION)  # [BT, BD]
            b_dx = tl.dot(b_ds, b_u.to(tl.float32), b_dx, input_precision=PRECISION)
            tl.store(p_dx + (i_d + o_d)[None, :], b_dx.to(dx_ptr.dtype.element_ty), mask=m_td)
        if NEED_QUERIES:
            b_x = tl.load(p_x + (i_d + o_d)[None, :], mask=m_td, other=0.0)  # [BT, BD]
            b_du = tl.dot(b_dst, b_x.to(tl.float32), input_precision=PRECISION)  # [BH, BD]
            tl.store(p_du + (i_d + o_d)[None, :], b_du, mask=m_hd)


# Launch.
@dataclass(frozen=True)
class Launch:
    """Tokens, heads and columns of a tile of the Triton kernels, and the warps that share it."""

    block_t: int
    block_h: int
    block_d: int
    precision: str
    num_warps: int
    num_stages: int = 2

    def constants(self, dim: int) -> dict[str, int | str]:
        """Return the ``constexpr`` parameters that the forward and backward kernel share."""
        tile = {"BLOCK_T": self.block_t, "BLOCK_H": self.block_h, "BLOCK_D": self.block_d}
        return {"DIM": dim, **tile, "PRECISION": self.precision}


MAX_TRITON_HEADS = 64  # a tile holds the scores of all heads
MAX_GRID = 65535  # programs on the second axis of a grid
MERGE_BLOCK = {"BLOCK_C": 16, "BLOCK_D": 64}


def launch_config(heads: int, dtype: torch.dtype) -> Launch:
    """Choose a launch of the Triton kernels that spills nothing from sm_80 to sm_120."""
    block_h = max(16, 1 << (heads - 1).bit_length())
    if dtype == torch.float32:
        return Launch(64, block_h, 32 if heads <= 16 else 16, "ieee", 8)
    return Launch(64, block_h, 64 if heads <= 32 else 32, "tf32", 8)


def _chunks(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return maxima and sums of the scores ``[B, C, H]`` and weighted sums of C chunks of x."""
    batch, tokens, dim = x.shape
    heads, launch = queries.shape[0], launch_config(queries.shape[0], x.dtype)
    chunks = triton.cdiv(tokens, launch.block_t)
    maxima = x.new_empty(batch, chunks, heads, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    partials = x.new_empty(batch, chunks, heads, dim, dtype=torch.float32)
    forward_kernel[(chunks, batch)](
        x, queries.contiguous(), maxima, sums, partials, tokens, heads, x.stride(0), x.stride(1),
        **launch.constants(dim), num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return maxima, sums, partials


def _triton(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, dim = x.shape
    heads = queries.shape[0]
    if heads > MAX_TRITON_HEADS or batch * heads > MAX_GRID:
        return reference(x, queries)
    maxima, sums, partials = _chunks(x, queries)
    chunks = maxima.shape[1]
    pooled = x.new_empty(batch, heads, dim, dtype=torch.float32)
    lse = x.new_empty(batch, heads, dtype=torch.float32)
    merge_kernel[(triton.cdiv(dim, MERGE_BLOCK["BLOCK_D"]), batch * heads)](
        maxima, sums, partials, pooled, lse, chunks, heads, dim, **MERGE_BLOCK
    )
    return pooled, lse


def _triton_backward(grad_pooled, grad_lse, x, queries, pooled, lse, need_x, need_queries):
    batch, tokens, dim = x.shape
    heads = queries.shape[0]
    if heads > MAX_TRITON_HEADS or batch * heads > MAX_GRID:
        given = (grad_pooled, grad_lse, x, queries, pooled, lse)
        return reference_backward(*given, need_x, need_queries)
    launch = launch_config(heads, x.dtype)
    chunks = triton.cdiv(tokens, launch.block_t)
    dx = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    shape = (batch * chunks, heads, dim) if need_queries else (0,)
    partials = x.new_empty(shape, dtype=torch.float32)
    delta = (grad_pooled * pooled).sum(-1)  # [B, H]
    if grad_lse is not None:
        delta = delta - grad_lse
    if x.dtype == torch.float32:
        # An lse of 100 is rounded by up to 4e-6, so the weights exp(s - lse) of a head add up to
        # 1 ± 4e-6, 30 times float32's rounding. All its gradients have that factor: undo it.
        maxima, sums, _ = _chunks(x, queries)
        top = maxima.amax(1)
        total = (sums * (maxima - top[:, None]).exp()).sum(1)
        factor = (lse - top).exp() / total  # [B, H]
        grad_pooled, delta = grad_pooled * factor[..., None], delta * factor
    backward_kernel[(chunks, batch)](
        x, queries.contiguous(), grad_pooled.contiguous(), lse.contiguous(),
        delta, dx, partials, tokens, heads, x.stride(0), x.stride(1),
        **launch.constants(dim), NEED_X=need_x, NEED_QUERIES=need_queries,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return dx, partials.sum(0).to(queries.dtype) if need_queries else queries.new_empty(0)


# Registration.
def _fake(x, queries):
    shape, dtype = (x.shape[0], *queries.shape), compute_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape[:2], dtype=dtype)


def _fake_backward(grad_pooled, grad_lse, x, queries, pooled, lse, need_x, need_queries):
    return (
        x.new_empty(x.shape if need_x else 0),
        queries.new_empty(queries.shape if need_queries else 0),
    )


def _check(x, queries):
    op = "query_pool"
    require_float(op, "x", x)
    require_float(op, "queries", queries)
    require(x.dim() == 3 and x.numel() > 0, op, "x", x, "[B, L, D] without an empty dimension")
    dim = x.shape[-1]
    require(x.stride(-1) == 1 or dim == 1, op, "x", x, "a last dimension of stride 1")
    fits = queries.dim() == 2 and queries.shape[0] > 0 and queries.shape[1] == dim
    require(fits, op, "queries", queries, f"[H, {dim}]")
    expected = f"float32 or {str(x.dtype).removeprefix('torch.')}"
    require(queries.dtype in (x.dtype, torch.float32), op, "queries", queries, expected)
    require_same_device(op, x=x, queries=queries)


_op = register(
    "query_pool", reference, fake=_fake, triton=_triton, check=_check,
    cuda=_cuda.with_fallback(_cuda.query_pool, _triton, reference),
)  # fmt: skip
_op_backward = register(
    "query_pool_backward", reference_backward, fake=_fake_backward, triton=_triton_backward,
    cuda=_cuda.with_fallback(_cuda.query_pool_backward, _triton_backward, reference_backward),
)  # fmt: skip


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx, grad_pooled, grad_lse):
    need_x, need_queries = ctx.needs_input_grad
    if grad_pooled is None and grad_lse is None:
        return None, None
    x, queries, pooled, lse = ctx.saved_tensors
    if grad_pooled is None:
        grad_pooled = torch.zeros_like(pooled)
    dx, du = _op_backward(grad_pooled, grad_lse, x, queries, pooled, lse, need_x, need_queries)
    return dx if need_x else None, du if need_queries else None


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.prfl_fast.query_pool)
def _flops(x, queries, *args, out_shape=None, **kwargs):
    batch, tokens, dim = x
    return 4 * batch * tokens * dim * queries[0]


@register_flop_formula(torch.ops.prfl_fast.query_pool_backward)
def _flops_backward(
    grad, grad_lse, x, queries, pooled, lse, need_x, need_queries, out_shape=None, **kwargs
):
    batch, tokens, dim = x
    return (4 + 4 * need_x + 2 * need_queries) * batch * tokens * dim * queries[0]


# Public functions.
def query_pool(x: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the softmax-weighted mean of the tokens under each query (PAVRM, arXiv 2511.21541).

    Args:
        x: tokens ``[B, L, D]``, floating point, the last dimension contiguous.
        queries: ``[H, D]``, folded and scaled (see the top of this file); float32 or as x.

    Returns:
        pooled ``[B, H, D]`` and the scores' log-sum-exp ``[B, H]`` (natural logarithm), float32
        (float64 for float64 ``x``).

    Raises:
        ValueError: if a tensor has a wrong shape, dtype, device or stride.
    """
    return _op(x, queries)
