"""Operations as an ``autograd.Function`` with bare ATen calls: the floor of their host time.

Each keeps the same tensors for its backward as the operation, and computes one case of the host
suite: on a CPU, in float32, one sample. It has no checks, options or choice of implementation, so
an operation in Python can be faster only with other ATen calls.
"""

from collections.abc import Callable

import torch

from prfl_fast.rewards import pooling
from suites.kernel_cases import EPS, POOL
from suites.kernel_checks import Tensors

_aten = torch.ops.aten


class _NormByRow(torch.autograd.Function):
    """LayerNorm without affine part, scaled and shifted by an indexed row."""

    @staticmethod
    def forward(ctx, x, scale, shift, scale_table, shift_table, rows):
        ctx.save_for_backward(x, scale, scale_table, rows)
        gain, offset = 1 + (scale + scale_table), shift + shift_table
        y = torch.layer_norm(x, x.shape[-1:], None, None, EPS)
        return torch.addcmul(torch.embedding(offset, rows), y, torch.embedding(gain, rows))

    @staticmethod
    def backward(ctx, grad):
        x, scale, table, rows = ctx.saved_tensors
        dim, index = x.shape[-1:], rows.view(-1)
        x_hat, mean, rho = torch.native_layer_norm(x, dim, None, None, EPS)
        total = torch.zeros_like(scale).index_add_(0, index, grad[0])
        dot = torch.zeros_like(scale).index_add_(0, index, (grad * x_hat)[0])
        d_hat = grad * torch.embedding(1 + (scale + table), rows)
        d_x, _, _ = _aten.native_layer_norm_backward(
            d_hat, x, dim, mean, rho, None, None, [True, False, False]
        )
        return d_x, dot, total, dot.sum(0), total.sum(0), None


def _norm_by_row(t: Tensors) -> torch.Tensor:
    (shift, scale), (shift_table, scale_table) = t["time"].unbind(1), t["table"].unbind(0)
    return _NormByRow.apply(t["x"], scale, shift, scale_table, shift_table, t["rows"])


class _Pool(torch.autograd.Function):
    """Softmax-weighted mean of the tokens under each query, with scores in float64."""

    @staticmethod
    def forward(ctx, x, queries):
        tokens = x[0]
        scores = tokens.double().mm(queries.double().t())
        pooled = torch.softmax(scores, 0).float().t().mm(tokens)[None]
        lse = scores.logsumexp(0).float()[None]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, queries, pooled, lse)
        return pooled, lse

    @staticmethod
    def backward(ctx, grad, _):
        x, queries, *_ = ctx.saved_tensors
        tokens, both = x[0], torch.cat((queries, grad[0]))
        scores, products = tokens.double().mm(both.double().t()).chunk(2, 1)
        p = torch.softmax(scores, 0)
        ds = (products - (p * products).sum(0)).mul_(p)
        return torch.cat((ds, p), 1).float().mm(both)[None], ds.t().float().mm(tokens)


def _pool(t: Tensors) -> torch.Tensor:
    known, pooling.query_pool = pooling.query_pool, _Pool.apply
    try:
        return POOL.ours(t)
    finally:
        pooling.query_pool = known


# By the name of a case.
FLOORS: dict[str, Callable[[Tensors], torch.Tensor]] = {
    "norm_modulate, time per token": _norm_by_row,
    POOL.name: _pool,
}
