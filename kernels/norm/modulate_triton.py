"""Triton kernels of norm_modulate with any output dtype, and their launch choices.

A program holds g and the offset of one row in registers while it walks over tokens that share them.
The reductions of a token depend on one another, so a program loads tensors of later tokens before
it reduces the current one.
"""

from dataclasses import dataclass
from typing import Any

from prfl_fast.kernels.common import split_row as tiles
from prfl_fast.kernels.common.fp8 import encode_block, scales
from prfl_fast.kernels.common.modulation_rows import load_index, row_share
from prfl_fast.kernels.runtime.triton import COUNTS, multiprocessors, tl, triton


@triton.jit
def _largest(b, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Return the bits of the largest |y|: first in each thread, then over threads."""
    b_head = b[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_tail = b[1].to(tl.int32, bitcast=True) & 0x7FFFFFFF
    b_head = tl.max(tl.max(tiles.by_thread(b_head, THREADS, VECTOR), 2), 0)
    b_tail = tl.max(tl.max(tiles.by_thread(b_tail, THREADS, VECTOR), 2), 0)
    return tl.max(tl.maximum(b_head, b_tail), 0)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, y_ptr, y_scale_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_table_ptr,
    shift_table_ptr, row_index_ptr, stride_xb, stride_xl, length_x, stride_scale, stride_shift,
    tokens, tokens_per_row, tokens_per_program, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr,
    KIND: tl.constexpr, TRIPS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    o_d, m_d = tiles.columns(D, HEAD, TAIL)
    i_first = tl.program_id(0).to(tl.int64) * tokens_per_program
    end = tl.minimum(i_first + tokens_per_program, tokens)
    i_row = i_first * 0 - 1  # no row is loaded yet
    row_end = i_first
    b_gain = tiles.zeros(HEAD, TAIL)
    b_offset = tiles.zeros(HEAD, TAIL)
    # Three stages: the compiler copies two tokens ahead to shared memory; registers would hold one.
    # It does this for tl.range only. The bound is a constant, because the interpreter with numpy
    # ≥ 2.4 takes no tensor there.
    for i_trip in tl.range(0, TRIPS, num_stages=3):
        i_token = i_first + i_trip
        some = i_token < end
        b_now = tiles.load(x_ptr, i_token, stride_xb, stride_xl, length_x, o_d, m_d, some)
        if row_index_ptr is not None:
            i_next = tl.load(row_index_ptr + i_token, mask=some, other=0).to(tl.int64)
        else:
            i_next = i_row + (i_token >= row_end)
        if some & (i_next != i_row):
            i_row = i_next
            if row_index_ptr is None:
                i_row = (i_token.to(tl.int32) // tokens_per_row).to(tl.int64)
                row_end = (i_row + 1) * tokens_per_row
            b_gain, b_offset = tiles.load_modulation(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
                i_row, stride_scale, stride_shift, o_d, m_d, HEAD, TAIL,
            )  # fmt: skip
        b_hat, _ = tiles.normalize(tiles.widen(b_now), m_d, eps, D, THREADS, VECTOR, KIND)
        b_y = tiles.add_product(b_offset, b_hat, b_gain)
        if y_scale_ptr is not None:
            inverse, y_scale = scales(_largest(b_y, THREADS, VECTOR))
            b_head = encode_block(b_y[0] * inverse, CONVERTS)
            b_y = (b_head, encode_block(b_y[1] * inverse, CONVERTS))
            tl.store(y_scale_ptr + i_token, y_scale, mask=some)
            tiles.store_by_thread(y_ptr, i_token, b_y, some, D, HEAD, THREADS, VECTOR)
        else:
            tiles.store(y_ptr, i_token, b_y, o_d, (m_d[0] & some, m_d[1] & some), D)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(  # noqa: C901 (the flags are constexpr: compiled kernels have few branches)
    grad_ptr, x_ptr, dx_ptr, dot_ptr, total_ptr, weight_ptr, scale_ptr, scale_table_ptr,
    order_ptr, bounds_ptr, stride_gb, stride_gl, length_g, stride_xb, stride_xl, length_x,
    stride_scale, tokens_per_row, programs, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr,
    KIND: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // grad_ptr.dtype.element_ty.primitive_bitwidth
    o_d, m_d = tiles.columns(D, HEAD, TAIL)
    pid = tl.program_id(0).to(tl.int64)
    i_row = (tl.program_id(0) // programs).to(tl.int64)
    i, end = row_share(i_row, pid - i_row * programs, programs, tokens_per_row, bounds_ptr)
    b_gain, _ = tiles.load_modulation(
        weight_ptr, None, scale_ptr, None, scale_table_ptr, None,
        i_row, stride_scale, 0, o_d, m_d, HEAD, TAIL,
    )  # fmt: skip
    b_dot = tiles.zeros(HEAD, TAIL)
    b_total = tiles.zeros(HEAD, TAIL)
    i_now = i
    if order_ptr is not None:
        i_now = load_index(order_ptr, i, end)
        if AHEAD > 1:
            i_next = load_index(order_ptr, i + 1, end)
    if AHEAD > 0 and x_ptr is not None:
        next_x = tiles.load(x_ptr, i_now, stride_xb, stride_xl, length_x, o_d, m_d, i < end)
    if AHEAD > 1:
        next_dy = tiles.load(grad_ptr, i_now, stride_gb, stride_gl, length_g, o_d, m_d, i < end)
    while i < end:
        i_token = i_now
        i += 1
        i_now = i
        if order_ptr is not None and AHEAD > 1:  # loaded two tokens before it is an address
            i_now = i_next
            i_next = load_index(order_ptr, i + 1, end)
        elif order_ptr is not None and AHEAD > 0:
            i_now = load_index(order_ptr, i, end)
        elif order_ptr is not None:
            i_token = load_index(order_ptr, i - 1, end)
        if AHEAD > 1:
            b_dy = next_dy
            next_dy = tiles.load(grad_ptr, i_now, stride_gb, stride_gl, length_g, o_d, m_d, i < end)
        else:  # the reductions of x come first and hide this load
            b_dy = tiles.load(grad_ptr, i_token, stride_gb, stride_gl, length_g, o_d, m_d, True)
        if AHEAD > 0 and x_ptr is not None:
            b_x = next_x
            next_x = tiles.load(x_ptr, i_now, stride_xb, stride_xl, length_x, o_d, m_d, i < end)
        elif x_ptr is not None:
            b_x = tiles.load(x_ptr, i_token, stride_xb, stride_xl, length_x, o_d, m_d, True)
        if x_ptr is not None:
            b_hat, rho = tiles.normalize(tiles.widen(b_x), m_d, eps, D, THREADS, VECTOR, KIND)
        b_t = tiles.widen(b_dy)
        if total_ptr is not None:
            b_total = tiles.add(b_total, b_t)
        if dot_ptr is not None:
            b_dot = tiles.add_product(b_dot, b_t, b_hat)
        if dx_ptr is not None:
            b_t = tiles.multiply(b_t, b_gain)
            if KIND != "none":
                b_t = tiles.normalize_gradient(b_t, b_hat, rho, D, THREADS, VECTOR, KIND)
            tiles.store(dx_ptr, i_token, b_t, o_d, m_d, D)
    if dot_ptr is not None:
        tiles.store(dot_ptr, pid, b_dot, o_d, m_d, D)
    if total_ptr is not None:
        tiles.store(total_ptr, pid, b_total, o_d, m_d, D)


@dataclass(frozen=True)
class ForwardLaunch(tiles.Launch):
    """Launch of the forward kernel; no program has more than ``trips`` tokens."""

    trips: int

    def constants(self, dim: int, kind: str) -> dict[str, Any]:
        return super().constants(dim, kind) | {"TRIPS": self.trips}


@dataclass(frozen=True)
class Launch(tiles.Launch):
    """Launch of the backward kernel; ``ahead`` tensors are loaded early: 1 is x, 2 x and dy."""

    ahead: int

    def constants(self, dim: int, kind: str) -> dict[str, Any]:
        return super().constants(dim, kind) | {"AHEAD": self.ahead}


def forward_launch(
    tokens: int, dim: int, kind: str, capability: tuple[int, ...], crowded: bool = False
) -> ForwardLaunch:
    """Choose 16 tokens a program, to load rows once; fewer if multiprocessors would be idle.

    ``crowded``: there is a row index, or an affine part beside the rows of scale and shift.
    """
    # Each warp repeats the sums of a token, and FP8 outputs are bound by instructions: take few
    # warps, with up to 40 elements a thread. A multiprocessor holds 12 warps of 168 registers
    # (three programs of D 5120), or 16 warps of 128.
    head, tail, num_warps = tiles.split_token(dim, 40)
    programs = max(1, min(tokens, max(4 * multiprocessors(capability), -(-tokens // 16))))
    # A power of two, so that token counts make at most five variants of the kernel.
    trips = 1 << (-(-tokens // programs) - 1).bit_length()
    few = head + tail <= 24 * 32 * num_warps
    few = few and kind != "none"  # without a norm more values are held at once
    few = few and not (crowded and capability >= (12, 0))
    # Kernels that spill at 168.
    crowded = crowded or capability >= ((10, 0) if kind == "rms" else (12, 0))
    registers = 128 if few else 255 if crowded else 168
    return ForwardLaunch(head, tail, num_warps, registers, programs, trips)


def backward_launch(
    tokens: int, rows: int, dim: int, itemsize: int, capability: tuple[int, ...], sums: bool
) -> Launch:
    """Choose about one resident wave over all rows if programs write partial rows of ``sums``.

    ``itemsize``, the larger of dy and x in bytes, decides how much of the next token fits
    the registers.
    """
    new = capability >= (10, 0)  # where ptxas needs more registers
    wide = sums and (new or itemsize > 2)
    head, tail, num_warps = tiles.split_token(dim, 16 if wide else 20)
    wave = 16 // num_warps * multiprocessors(capability)
    programs = wave if sums else max(4 * wave, -(-tokens // 16))
    programs = max(1, min(-(-programs // rows), tokens // rows))
    elements = (head + tail) // (32 * num_warps)
    both = elements <= (10 if itemsize > 2 else 12 if new else 16)
    one = not (sums and itemsize > 2 and (new or elements > 12))
    return Launch(head, tail, num_warps, 128, programs, 2 if both else int(one))
