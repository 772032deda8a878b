"""RMSNorm over the last axis, for rows of any strides; saves its inputs alone.

    y = x̂·w,    x̂ = x·ρ,    ρ = 1/√(mean x² + ε)
    d_x = ρ·(w·dy - x̂·mean(w·dy·x̂))        d_w = Σ_rows dy·x̂

Shapes: x, y ``[..., D]``, w ``[D]`` or absent. The last axis is dense and the others have any
strides, so the heads ``[B, L, H, d]`` of a packed qkv are read without a copy.
Dtypes: any mix of float32, bfloat16, float16. Statistics, products and d_w are float32 (float64 for
float64 x); y and both gradients are rounded once, to their tensor's dtype.
Saved for backward: x and w. The backward computes ρ again from the row of x that d_x needs anyway.
Bytes: forward reads x and writes y; backward reads x and dy and writes d_x.
"""

from dataclasses import dataclass

import torch

from prfl_fast.kernels.common.norm_math import normalize, operand, rms_gradients, rstd
from prfl_fast.kernels.common.strided_rows import as_tokens, gradient_rows, row_axes, row_offset
from prfl_fast.kernels.norm import modulate
from prfl_fast.kernels.runtime.checks import (
    compute_dtype,
    require,
    require_float,
    require_same_device,
)
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import COUNTS, capability, multiprocessors, tl, triton


# Reference.
def reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, upcast: torch.dtype | None = None
) -> torch.Tensor:
    """Return y from differentiable PyTorch; ``upcast``: dtype computed in and returned."""
    dtype = compute_dtype(x, upcast)
    y, _, _ = normalize(x.to(dtype), "rms", eps)
    y = y if weight is None else y * weight.to(dtype)
    return y.to(upcast or x.dtype).contiguous()


def reference_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    need_x: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(d_x, d_weight)``; an empty tensor for each not needed."""
    dtype = compute_dtype(x)
    rho = rstd(x, operand(eps, dtype, x.device), dtype)
    # Contiguous, so that sums have one order for gradients of any strides.
    d_x = grad.to(dtype).contiguous() * rho
    d_x, d_weight = rms_gradients(d_x, x, weight, rho, need_x, need_weight)
    return d_x.to(x.dtype).contiguous(), d_weight


# Triton: a tile is one long row or several short ones; a program walks over tiles of its rows.
@triton.jit
def _load_weight(weight_ptr, o_d, m_d, BLOCK_D: tl.constexpr):
    b_w = tl.full([BLOCK_D], 1.0, tl.float32)
    if weight_ptr is not None:
        b_w = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    return b_w[None, :]  # [1, BD]


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, weight_ptr, y_ptr, stride_x0, stride_x1, stride_x2, length_x1, length_x2,
    rows, rows_per_program, eps, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = _load_weight(weight_ptr, o_d, m_d, BLOCK_D)
    i_row = tl.program_id(0).to(tl.int64) * rows_per_program
    end = tl.minimum(i_row + rows_per_program, rows)
    while i_row < end:  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
        o_r = i_row + tl.arange(0, BLOCK_R)  # [BR]
        m_rd = (o_r < end)[:, None] & m_d[None, :]
        o_x = row_offset(o_r, stride_x0, stride_x1, stride_x2, length_x1, length_x2)
        b_x = tl.load(x_ptr + o_x[:, None] + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
        b_rho = tl.rsqrt(tl.sum(b_x * b_x, 1) * (1.0 / D) + eps)  # [BR]
        b_y = b_x * b_rho[:, None] * b_w  # [BR, BD]
        p_y = y_ptr + o_r[:, None] * D + o_d[None, :]
        tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_rd)
        i_row += BLOCK_R


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr,
    stride_g0, stride_g1, stride_g2, length_g1, length_g2,
    stride_x0, stride_x1, stride_x2, length_x1, length_x2,
    rows, rows_per_program, eps, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = _load_weight(weight_ptr, o_d, m_d, BLOCK_D)
    b_sum = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    i_row = pid * rows_per_program
    end = tl.minimum(i_row + rows_per_program, rows)
    while i_row < end:
        o_r = i_row + tl.arange(0, BLOCK_R)  # [BR]
        m_rd = (o_r < end)[:, None] & m_d[None, :]
        o_x = row_offset(o_r, stride_x0, stride_x1, stride_x2, length_x1, length_x2)
        o_g = row_offset(o_r, stride_g0, stride_g1, stride_g2, length_g1, length_g2)
        p_g = grad_ptr + o_g[:, None] + o_d[None, :]
        b_x = tl.load(x_ptr + o_x[:, None] + o_d[None, :], mask=m_rd, other=0.0).to(tl.float32)
        b_dy = tl.load(p_g, mask=m_rd, other=0.0).to(tl.float32)  # [BR, BD]
        b_rho = tl.rsqrt(tl.sum(b_x * b_x, 1) * (1.0 / D) + eps)  # [BR]
        # With ε = 0, rho is infinite past the end.
        b_rho = tl.where(o_r < end, b_rho, 0.0)[:, None]
        b_hat = b_x * b_rho  # [BR, BD]
        if partial_ptr is not None:
            b_sum += b_dy * b_hat
        if dx_ptr is not None:
            b_dy = b_dy * b_w
            b_dot = tl.sum(b_dy * b_hat, 1) * (1.0 / D)  # [BR]
            b_dx = (b_dy - b_hat * b_dot[:, None]) * b_rho  # [BR, BD]
            p_dx = dx_ptr + o_r[:, None] * D + o_d[None, :]
            tl.store(p_dx, b_dx.to(dx_ptr.dtype.element_ty), mask=m_rd)
        i_row += BLOCK_R
    if partial_ptr is not None:
        tl.store(partial_ptr + pid * D + o_d, tl.sum(b_sum, 0), mask=m_d)


# Launch. Without a limit of registers ptxas may spill one or two to fit one more program.
# Columns. Longer rows run norm_modulate's kernels: the ones of this file pad them and load them
# serially, for 71 instead of 97 % of the predicted copy rate at D 5120.
LONG = 1024


@dataclass(frozen=True)
class Launch:
    """A tile, the rows of a program (whole tiles), and the number of programs."""

    block_r: int
    block_d: int
    num_warps: int
    registers: int | None  # most of a thread; None: the compiler chooses
    rows_per_program: int
    programs: int


def forward_launch(rows: int, dim: int, capability: tuple[int, ...]) -> Launch:
    """Choose 8 tiles a program, to load the weight once; fewer if multiprocessors would be idle."""
    block_r, block_d, num_warps = tile(dim)
    tiles = -(-rows // block_r)
    share = max(1, min(8, tiles // (4 * multiprocessors(capability))))
    return Launch(block_r, block_d, num_warps, 64, share * block_r, -(-tiles // share))


def backward_launch(rows: int, dim: int, capability: tuple[int, ...]) -> Launch:
    """Choose about one resident wave: each program writes one partial row of d_weight."""
    block_r, block_d, num_warps = tile(dim)
    tiles = -(-rows // block_r)
    warps = 32 if block_d <= 1024 else 24  # resident, of at most 64 and about 80 registers a thread
    share = -(-tiles // (warps // num_warps * multiprocessors(capability)))
    registers = None if dim <= LONG else 96
    return Launch(block_r, block_d, num_warps, registers, share * block_r, -(-tiles // share))


def tile(dim: int) -> tuple[int, int, int]:
    """Return rows, columns and warps of a tile: 8 elements a thread, 16 in rows past 1024."""
    block_d = 1 << (dim - 1).bit_length()
    return max(1, 1024 // block_d), block_d, min(16, max(4, block_d // 512))


def _long(x, axes):
    """View rows longer than ``LONG`` as tokens, as norm_modulate's kernels take them; else None."""
    return as_tokens(x, axes) if x.shape[-1] > LONG and x.numel() else None


def _triton_forward(x, weight, eps):
    axes, dim = row_axes(x), x.shape[-1]
    if axes is None:
        return reference(x, weight, eps)
    if (tokens := _long(x, axes)) is not None:
        return modulate.triton_forward(tokens, weight, *(None,) * 6, "rms", eps).view(x.shape)
    y = x.new_empty(x.shape)
    rows = x.numel() // dim
    if rows > 0:
        launch = forward_launch(rows, dim, capability(x.device))
        forward_kernel[(launch.programs,)](
            x, None if weight is None else weight.contiguous(), y, *axes,
            rows, launch.rows_per_program, eps,
            D=dim, BLOCK_R=launch.block_r, BLOCK_D=launch.block_d, num_warps=launch.num_warps,
            maxnreg=launch.registers,
        )  # fmt: skip
    return y


def _triton_backward(grad, x, weight, eps, need_x, need_weight):
    axes, dim = row_axes(x), x.shape[-1]
    rows, need_weight = x.numel() // dim, need_weight and weight is not None
    if axes is None or rows == 0:
        return reference_backward(grad, x, weight, eps, need_x, need_weight)
    grad, grad_axes = gradient_rows(grad)
    both = _long(grad, grad_axes), _long(x, axes)
    if both[0] is not None and both[1] is not None:
        fixed = weight, None, None, None, 1, "rms", eps, need_x, need_weight, False
        d_x, sums, _ = modulate.triton_backward(*both, *fixed)
        like = x if weight is None else weight
        d_weight = sums[0].to(like.dtype) if need_weight else like.new_empty(0)
        return d_x.view(x.shape if need_x else 0), d_weight
    launch = backward_launch(rows, dim, capability(x.device))
    d_x = x.new_empty(x.shape) if need_x else None
    partials = x.new_empty(launch.programs, dim, dtype=torch.float32) if need_weight else None
    backward_kernel[(launch.programs,)](
        grad, x, None if weight is None else weight.contiguous(), d_x, partials,
        *grad_axes, *axes, rows, launch.rows_per_program, eps,
        D=dim, BLOCK_R=launch.block_r, BLOCK_D=launch.block_d, num_warps=launch.num_warps,
        maxnreg=launch.registers,
    )  # fmt: skip
    d_weight = (x if weight is None else weight).new_empty(0)
    if partials is not None:
        d_weight = partials.sum(0).to(weight.dtype)
    return x.new_empty(0) if d_x is None else d_x, d_weight


# Registration.
def _check(x, weight, eps):
    op = "rms_norm"
    require_float(op, "x", x)
    require(x.dim() > 0 and x.shape[-1] > 0, op, "x", x, "[..., D] with D > 0")
    require(
        x.stride(-1) == 1 or x.shape[-1] == 1, op, "x", x,
        "a contiguous last axis: call .contiguous() where it is made",
    )  # fmt: skip
    if weight is not None:
        require_float(op, "weight", weight)
        if weight.shape != x.shape[-1:]:  # formatting the text would fix sizes in a trace
            expected = f"shape [{x.shape[-1]}], the last axis of x"
            require(False, op, "weight", weight, expected)
        require_same_device(op, x=x, weight=weight)
    require(eps >= 0, op, "eps", eps, "a number ≥ 0")


def _fake_backward(grad, x, weight, eps, need_x, need_weight):
    d_weight = (x if weight is None else weight).new_empty
    return x.new_empty(x.shape if need_x else 0), d_weight(x.shape[-1] if need_weight else 0)


_forward_op = register(
    "rms_norm", reference, fake=lambda x, *_: x.new_empty(x.shape), triton=_triton_forward,
    check=_check,
)  # fmt: skip
_backward_op = register(
    "rms_norm_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)


def _setup_context(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, grad):
    need_x, need_weight, _ = ctx.needs_input_grad
    d_x, d_weight = _backward_op(grad, *ctx.saved_tensors, ctx.eps, need_x, need_weight)
    return d_x if need_x else None, d_weight if need_weight else None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


# Public function.
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, *, eps: float = 1e-6
) -> torch.Tensor:
    """Compute ``x / sqrt(mean(x²) + eps) * weight`` over the last axis, rounded once.

    Args:
        x: ``[..., D]``; the last axis is contiguous, the others have any strides.
        weight: ``[D]``, any floating dtype; one where absent.
        eps: added to the mean square (``nn.RMSNorm`` uses ``torch.finfo(x.dtype).eps`` for None).

    Returns:
        y, of x's shape and dtype, contiguous.

    Raises:
        ValueError: if a shape, dtype, stride, device or ``eps`` is not as above.
    """
    return _forward_op(x, weight, float(eps))
