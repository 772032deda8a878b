"""Gated residual sum: a branch of a block joins the residual stream.

    x_out = x + y·γ_r,  γ_r = gate_table + gate[r];  x + y where neither is given

r is the row of a token: n // (N / R) for token n of N and R rows, or ``row_index[n]``. With dx_out
the incoming gradient:

    d_x = dx_out,  d_y = dx_out·γ_r,  d_gate_r = Σ dx_out·y over the tokens of row r,
    d_gate_table = Σ_r d_gate_r

Shapes: x, y, x_out ``[B, L, D]`` or ``[N, D]``; gate ``[R, D]``, gate_table ``[D]``; row_index as x
without D. Dtypes: any mix of float32, bfloat16, float16. Gates, products and sums are float32
(float64 for float64 x); x_out and d_y are rounded once, to x's and y's dtype.
Saved for backward: the gate, and y only if the gate needs a gradient; never x.
Bytes: forward reads x and y and writes x_out; backward reads dx_out and y and writes d_y.
"""

import functools
from dataclasses import dataclass

import torch

from prfl_fast.kernels.common.modulation_rows import (
    by_row,
    check_rows,
    check_tokens,
    count_rows,
    fold_rows,
    load_sum,
    load_token,
    per_token,
    row_share,
    segments,
    sum_by_row,
    table_plus_rows,
    token_strides,
)
from prfl_fast.kernels.common.norm_math import given
from prfl_fast.kernels.runtime.checks import cast, compute_dtype, require, require_same_device
from prfl_fast.kernels.runtime.registry import register
from prfl_fast.kernels.runtime.triton import COUNTS, capability, multiprocessors, tl, triton

# Elements. PyTorch's derivative of addcmul copies y and γ, which past this takes longer than a
# function in Python.
SMALL = 1 << 16


# Reference.
def reference(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    upcast: torch.dtype | None = None,
) -> torch.Tensor:
    """Return x_out from plain PyTorch; ``upcast`` is the dtype computed in and returned."""
    dtype = compute_dtype(x, upcast)
    rows = table_plus_rows(gate_table, gate, dtype)
    if rows is None:
        # ATen adds two tensors of one dtype with a single rounding already.
        x_out = x + y if upcast is None else x.to(dtype) + y.to(dtype)
        return cast(x_out, upcast or x.dtype).contiguous()
    row_index = row_index if gate is not None else None
    wide_x, wide_y = x, y
    if row_index is not None or rows.shape[0] > 1:
        wide_x, wide_y = by_row(x, rows.shape[0], row_index), by_row(y, rows.shape[0], row_index)
        rows = per_token(rows, row_index)
    x_out = cast(torch.addcmul(wide_x, wide_y, rows), upcast or x.dtype)  # in the dtype of rows
    return (x_out if x_out.shape == x.shape else x_out.view(x.shape)).contiguous()


def reference_backward(
    grad: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
    y_dtype: torch.dtype,
    need_y: bool,
    need_gate: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(d_y, d_gate [R, D])``; an empty tensor for each not needed.

    d_gate is in the dtype computed in. ``y`` may be absent if the gate needs no gradient.
    """
    dtype = compute_dtype(grad)
    rows = table_plus_rows(gate_table, gate, dtype)
    if rows is None:
        d_y = grad.to(y_dtype, copy=True).contiguous() if need_y else None
        return given(grad, d_y, y_dtype), given(grad, None, dtype)
    row_index, d_y, d_gate = row_index if gate is not None else None, None, None
    wide = by_row(cast(grad, dtype), rows.shape[0], row_index)
    if need_gate and y is not None:
        product = wide * by_row(y, rows.shape[0], row_index)
        d_gate = sum_by_row(product, rows.shape[0], row_index)
    if need_y:
        d_y = cast(wide * per_token(rows, row_index), y_dtype).reshape_as(grad).contiguous()
    return given(grad, d_y, y_dtype), given(grad, d_gate, dtype)


# Triton: a program holds a chunk of one gate row in registers while it walks over its tokens.
# There is no sum along D, so a row can be split: 5 chunks of 1024 for D 5120 leave no lane idle.
@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, y_ptr, out_ptr, gate_ptr, gate_table_ptr, row_index_ptr,
    stride_xb, stride_xl, length_x, stride_yb, stride_yl, length_y, stride_gate,
    tokens, tokens_per_row, tokens_per_program,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    o_d = (pid % CHUNKS * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_token = pid // CHUNKS * tokens_per_program
    end = tl.minimum(i_token + tokens_per_program, tokens)
    i_row = i_token * 0 - 1  # no row is loaded yet
    row_end = i_token
    b_gate = tl.zeros([BLOCK_D], tl.float32)
    while i_token < end:  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
        b_x = load_token(x_ptr, i_token, stride_xb, stride_xl, length_x, o_d, m_d)  # [BD]
        b_y = load_token(y_ptr, i_token, stride_yb, stride_yl, length_y, o_d, m_d)
        if gate_ptr is not None or gate_table_ptr is not None:
            if row_index_ptr is not None:
                i_next = tl.load(row_index_ptr + i_token).to(tl.int64)
            else:
                i_next = i_row + (i_token >= row_end)
            if i_next != i_row:
                i_row = i_next
                if row_index_ptr is None:
                    i_row = (i_token.to(tl.int32) // tokens_per_row).to(tl.int64)
                    row_end = (i_row + 1) * tokens_per_row
                b_gate = load_sum(gate_ptr, gate_table_ptr, i_row, stride_gate, o_d, m_d, BLOCK_D)
            b_y *= b_gate
        b_out = (b_x + b_y).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + i_token * D + o_d, b_out, mask=m_d)
        i_token += 1


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    grad_ptr, y_ptr, dy_ptr, sum_ptr, gate_ptr, gate_table_ptr, order_ptr, bounds_ptr,
    stride_gb, stride_gl, length_g, stride_yb, stride_yl, length_y, stride_gate,
    tokens_per_row, programs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    o_d = (pid % CHUNKS * BLOCK_D).to(tl.int32) + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    i_partial = pid // CHUNKS
    i_row = i_partial // programs
    i, end = row_share(i_row, i_partial - i_row * programs, programs, tokens_per_row, bounds_ptr)
    b_gate = load_sum(gate_ptr, gate_table_ptr, i_row, stride_gate, o_d, m_d, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    while i < end:
        i_token = i
        if order_ptr is not None:
            i_token = tl.load(order_ptr + i)
        b_grad = load_token(grad_ptr, i_token, stride_gb, stride_gl, length_g, o_d, m_d)  # [BD]
        if sum_ptr is not None:
            b_sum += b_grad * load_token(y_ptr, i_token, stride_yb, stride_yl, length_y, o_d, m_d)
        if dy_ptr is not None:
            b_dy = (b_grad * b_gate).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + i_token * D + o_d, b_dy, mask=m_d)
        i += 1
    if sum_ptr is not None:
        tl.store(sum_ptr + i_partial * D + o_d, b_sum, mask=m_d)


# Launch. With an index ptxas spills two registers unless they are limited; without an index a limit
# makes it spill.
INDEXED_REGISTERS = 56


@dataclass(frozen=True)
class Launch:
    """Launch of ``chunks`` × ``programs``, in all (forward) or for each gate row (backward)."""

    block_d: int
    chunks: int
    num_warps: int
    programs: int


def _chunk(dim: int) -> tuple[int, int, int]:
    """Return BLOCK_D, chunks, and warps for 8 elements a thread: a 16-byte load of bfloat16."""
    divisor = dim & -dim  # the largest power of two in it
    block_d = min(1024, divisor if divisor >= 256 else max(32, 1 << (dim - 1).bit_length()))
    return block_d, -(-dim // block_d), max(1, block_d // 256)


def forward_launch(tokens: int, dim: int, capability: tuple[int, ...]) -> Launch:
    """Choose 8 tokens a program, to load the gate once; fewer if multiprocessors would be idle."""
    block_d, chunks, num_warps = _chunk(dim)
    wave = -(-48 // num_warps) * multiprocessors(capability) // chunks
    return Launch(block_d, chunks, num_warps, max(1, min(tokens, max(wave, -(-tokens // 8)))))


def backward_launch(
    tokens: int, rows: int, dim: int, capability: tuple[int, ...], sums: bool
) -> Launch:
    """Choose about one resident wave over all rows if programs write partial rows of ``sums``."""
    block_d, chunks, num_warps = _chunk(dim)
    wave = -(-48 // num_warps) * multiprocessors(capability) // chunks
    programs = wave if sums else max(wave, -(-tokens // 8))
    return Launch(block_d, chunks, num_warps, max(1, min(-(-programs // rows), tokens // rows)))


def _triton_forward(x, y, gate, gate_table, row_index):
    out = x.new_empty(x.shape)
    dim = x.shape[-1]
    tokens = x.numel() // dim
    if tokens == 0:
        return out
    launch = forward_launch(tokens, dim, capability(x.device))
    row_index = None if row_index is None or gate is None else row_index.contiguous()
    forward_kernel[(launch.programs * launch.chunks,)](
        x, y, out, gate, None if gate_table is None else gate_table.contiguous(), row_index,
        *token_strides(x), *token_strides(y), 0 if gate is None else gate.stride(0),
        tokens, tokens // count_rows(gate), -(-tokens // launch.programs),
        D=dim, BLOCK_D=launch.block_d, CHUNKS=launch.chunks, num_warps=launch.num_warps,
    )  # fmt: skip
    return out


def _triton_backward(grad, y, gate, gate_table, row_index, y_dtype, need_y, need_gate):
    d_y = grad.new_empty(grad.shape if need_y else 0, dtype=y_dtype)
    if gate is None and gate_table is None:
        return d_y.copy_(grad) if need_y else d_y, grad.new_empty(0, dtype=torch.float32)
    dim, rows = grad.shape[-1], count_rows(gate)
    tokens = grad.numel() // dim
    launch = backward_launch(tokens, rows, dim, capability(grad.device), need_gate)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    indexed = row_index is not None and gate is not None
    order, bounds = segments(row_index, rows) if indexed else (None, None)
    partial = None
    if need_gate:
        partial = grad.new_empty(rows, launch.programs, dim, dtype=torch.float32)
    backward_kernel[(rows * launch.programs * launch.chunks,)](
        grad, y if need_gate else None, d_y if need_y else None, partial, gate,
        None if gate_table is None else gate_table.contiguous(), order, bounds,
        *token_strides(grad), *(token_strides(y) if need_gate else (0, 0, None)),
        0 if gate is None else gate.stride(0), tokens // rows, launch.programs,
        D=dim, BLOCK_D=launch.block_d, CHUNKS=launch.chunks, num_warps=launch.num_warps,
        maxnreg=None if order is None else INDEXED_REGISTERS,
    )  # fmt: skip
    if partial is None:
        return d_y, grad.new_empty(0, dtype=torch.float32)
    return d_y, fold_rows(partial, rows)


# Registration.
def check_residual(
    op: str,
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None,
    gate_table: torch.Tensor | None,
    row_index: torch.Tensor | None,
) -> None:
    """Raise ``ValueError`` unless y has x's shape, and gate, gate_table and row_index fit x."""
    check_tokens(op, "x", x)
    check_tokens(op, "y", y)
    require(y.shape == x.shape, op, "y", y, f"x's shape {list(x.shape)}")
    require_same_device(op, x=x, y=y)
    check_rows(op, x, {"gate_table": gate_table}, {"gate": gate}, row_index)


def _fake_backward(grad, y, gate, gate_table, row_index, y_dtype, need_y, need_gate):
    d_y = grad.new_empty(grad.shape if need_y else 0, dtype=y_dtype)
    has_gate = need_gate and not (gate is None and gate_table is None)
    sums = (count_rows(gate), grad.shape[-1]) if has_gate else 0
    return d_y, grad.new_empty(sums, dtype=compute_dtype(grad))


_forward_op = register(
    "gated_residual", reference, fake=lambda x, *_: x.new_empty(x.shape), triton=_triton_forward,
    check=functools.partial(check_residual, "gated_residual"),
)  # fmt: skip
_backward_op = register(
    "gated_residual_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)


def gate_gradients(d_gate, needs):
    """Return gradients of gate and gate_table (or None) from the sums of each row's tokens.

    They are in the dtype of the sums; autograd casts them to those of its inputs.
    """
    return d_gate if needs[0] else None, d_gate.sum(0) if needs[1] else None


def _setup_context(ctx, inputs, output):
    _, y, gate, gate_table, row_index = inputs
    ctx.y_dtype = y.dtype
    need_gate = any(ctx.needs_input_grad[2:4])
    ctx.save_for_backward(y if need_gate else None, gate, gate_table, row_index)


def _backward(ctx, grad):
    y, gate, gate_table, row_index = ctx.saved_tensors
    return *gated_gradients(ctx, grad, y, gate, gate_table, row_index, ctx.needs_input_grad), None


def gated_gradients(ctx, grad, y, gate, gate_table, row_index, needs_input_grad):
    """Return the gradients of x, y, gate and gate_table of the gated sum alone."""
    need_x, need_y, *needs = needs_input_grad[:4]
    if gate is None and gate_table is None:
        return grad if need_x else None, grad.to(ctx.y_dtype) if need_y else None, None, None
    d_y = d_gate = None
    if need_y or any(needs):
        d_y, d_gate = _backward_op(
            grad, y, gate, gate_table, row_index, ctx.y_dtype, need_y, any(needs)
        )
    return grad if need_x else None, d_y if need_y else None, *gate_gradients(d_gate, needs)


def is_native(x, y, gate, gate_table, row_index):
    """Return True if PyTorch's graph of the reference keeps y and the rows alone, and no copy."""
    copies = count_rows(gate) > 1 and not y.is_contiguous()
    return row_index is None and not copies and x.numel() <= SMALL


_forward_op.register_autograd(_backward, setup_context=_setup_context, native=is_native)


# Public function.
def gated_residual(
    x: torch.Tensor,
    y: torch.Tensor,
    gate: torch.Tensor | None = None,
    *,
    gate_table: torch.Tensor | None = None,
    row_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute ``x + y·(gate_table + gate[row])``, or ``x + y`` without a gate, rounded once.

    Args:
        x, y: ``[B, L, D]`` or ``[N, D]``; the last axis is contiguous, the others have any stride.
        gate: ``[R, D]``; R divides the tokens, and token n of N uses row n // (N / R).
        gate_table: ``[D]``, added to every row of gate in float32; alone, the gate of all tokens.
        row_index: int32 or int64, x's shape without D: the row of each token, in place of that
            rule.

    Returns:
        x_out, of x's shape and dtype, contiguous.

    Raises:
        ValueError: if a shape, dtype, stride or device is not as above.
    """
    return _forward_op(x, y, gate, gate_table, row_index)
