"""Triton kernels of residual_norm_modulate, forward and backward, and their launch choices.

A program holds the rows of gate, scale and shift in registers while it processes tokens that share
them. Each reduction of a token waits for the previous one, so a program loads later tokens before
it reduces this one: the forward to shared memory, the backward to registers.
"""

from dataclasses import dataclass
from typing import Any

from prfl_fast.kernels.common import split_row as tiles
from prfl_fast.kernels.common.modulation_rows import coarse_row, load_index, row_share
from prfl_fast.kernels.runtime.triton import COUNTS, multiprocessors, tl, triton


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x_ptr, y_ptr, out_ptr, h_ptr, gate_ptr, gate_table_ptr, weight_ptr, bias_ptr, scale_ptr,
    shift_ptr, scale_table_ptr, shift_table_ptr, row_index_ptr,
    stride_xb, stride_xl, length_x, stride_yb, stride_yl, length_y,
    stride_gate, stride_scale, stride_shift, gate_group, norm_group,
    tokens, tokens_per_row, tokens_per_program, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr,
    KIND: tl.constexpr, TRIPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    o_d, m_d = tiles.columns(D, HEAD, TAIL)
    i_first = tl.program_id(0).to(tl.int64) * tokens_per_program
    end = tl.minimum(i_first + tokens_per_program, tokens)
    i_row = i_first * 0 - 1  # no row is loaded yet
    row_end = i_first
    b_gate = tiles.zeros(HEAD, TAIL)
    b_gain = tiles.zeros(HEAD, TAIL)
    b_offset = tiles.zeros(HEAD, TAIL)
    # The compiler copies later tokens to shared memory, as in norm_modulate.
    for i_trip in tl.range(0, TRIPS, num_stages=STAGES):
        i_token = i_first + i_trip
        some = i_token < end
        if row_index_ptr is not None:
            i_next = tl.load(row_index_ptr + i_token, mask=some, other=0).to(tl.int64)
        else:
            i_next = i_row + (i_token >= row_end)
        if some & (i_next != i_row):
            i_row = i_next
            if row_index_ptr is None:
                i_row = (i_token.to(tl.int32) // tokens_per_row).to(tl.int64)
                row_end = (i_row + 1) * tokens_per_row
            i_gate = coarse_row(i_row, gate_group)
            b_gate = tiles.load_row(
                gate_ptr, gate_table_ptr, i_gate, stride_gate, o_d, m_d, HEAD, TAIL
            )
            i_norm = coarse_row(i_row, norm_group)
            b_gain, b_offset = tiles.load_modulation(
                weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
                i_norm, stride_scale, stride_shift, o_d, m_d, HEAD, TAIL,
            )  # fmt: skip
        b_x = tiles.load(x_ptr, i_token, stride_xb, stride_xl, length_x, o_d, m_d, some)
        b_y = tiles.load(y_ptr, i_token, stride_yb, stride_yl, length_y, o_d, m_d, some)
        b_x, b_y = tiles.widen(b_x), tiles.widen(b_y)
        if gate_ptr is not None or gate_table_ptr is not None:
            b_x = tiles.add_product(b_x, b_y, b_gate)
        else:
            b_x = tiles.add(b_x, b_y)
        b_out = tiles.round_to(b_x, out_ptr)
        m_now = (m_d[0] & some, m_d[1] & some)
        tiles.store(out_ptr, i_token, b_out, o_d, m_now, D)
        b_hat, rho = tiles.normalize(tiles.widen(b_out), m_d, eps, D, THREADS, VECTOR, KIND)
        tiles.store(h_ptr, i_token, tiles.add_product(b_offset, b_hat, b_gain), o_d, m_now, D)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(  # noqa: C901 (the flags are constexpr: compiled kernels have few branches)
    grad_ptr, grad_h_ptr, x_ptr, y_ptr, dx_ptr, dy_ptr, gate_sum_ptr, dot_ptr, total_ptr,
    gate_ptr, gate_table_ptr, weight_ptr, scale_ptr, scale_table_ptr, order_ptr, bounds_ptr,
    stride_gb, stride_gl, length_g, stride_hb, stride_hl, length_h,
    stride_xb, stride_xl, length_x, stride_yb, stride_yl, length_y,
    stride_gate, stride_scale, gate_group, norm_group, tokens_per_row, programs, eps,
    D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, THREADS: tl.constexpr,
    KIND: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    VECTOR: tl.constexpr = 128 // grad_h_ptr.dtype.element_ty.primitive_bitwidth
    o_d, m_d = tiles.columns(D, HEAD, TAIL)
    pid = tl.program_id(0).to(tl.int64)
    i_row = (tl.program_id(0) // programs).to(tl.int64)
    i, end = row_share(i_row, pid - i_row * programs, programs, tokens_per_row, bounds_ptr)
    i_gate = coarse_row(i_row, gate_group)
    b_gate = tiles.load_row(gate_ptr, gate_table_ptr, i_gate, stride_gate, o_d, m_d, HEAD, TAIL)
    b_gain, _ = tiles.load_modulation(
        weight_ptr, None, scale_ptr, None, scale_table_ptr, None,
        coarse_row(i_row, norm_group), stride_scale, 0, o_d, m_d, HEAD, TAIL,
    )  # fmt: skip
    b_gate_sum = tiles.zeros(HEAD, TAIL)
    b_dot = tiles.zeros(HEAD, TAIL)
    b_total = tiles.zeros(HEAD, TAIL)
    i_next = i
    if order_ptr is not None:
        i_next = load_index(order_ptr, i, end)
    if AHEAD:
        next_dh = tiles.load(grad_h_ptr, i_next, stride_hb, stride_hl, length_h, o_d, m_d, i < end)
        next_x = next_dh
        if x_ptr is not None:
            next_x = tiles.load(x_ptr, i_next, stride_xb, stride_xl, length_x, o_d, m_d, i < end)
    while i < end:
        i_token = i_next
        if not AHEAD:
            next_dh = tiles.load(
                grad_h_ptr, i_token, stride_hb, stride_hl, length_h, o_d, m_d, True
            )
            next_x = next_dh
            if x_ptr is not None:
                next_x = tiles.load(x_ptr, i_token, stride_xb, stride_xl, length_x, o_d, m_d, True)
        b_dh = tiles.widen(next_dh)
        b_x = tiles.widen(next_x)
        if AHEAD and grad_ptr is not None:
            b_grad = tiles.load(grad_ptr, i_token, stride_gb, stride_gl, length_g, o_d, m_d, True)
        if AHEAD and gate_sum_ptr is not None:
            b_y = tiles.load(y_ptr, i_token, stride_yb, stride_yl, length_y, o_d, m_d, True)
        i += 1
        i_next = i
        if order_ptr is not None:
            i_next = load_index(order_ptr, i, end)
        if AHEAD:
            next_dh = tiles.load(
                grad_h_ptr, i_next, stride_hb, stride_hl, length_h, o_d, m_d, i < end
            )
            next_x = next_dh
            if x_ptr is not None:
                next_x = tiles.load(
                    x_ptr, i_next, stride_xb, stride_xl, length_x, o_d, m_d, i < end
                )
        if total_ptr is not None:
            b_total = tiles.add(b_total, b_dh)
        b_hat, rho = tiles.normalize(b_x, m_d, eps, D, THREADS, VECTOR, KIND)
        if dot_ptr is not None:
            b_dot = tiles.add_product(b_dot, b_dh, b_hat)
        if dx_ptr is not None or dy_ptr is not None or gate_sum_ptr is not None:
            b_dh = tiles.multiply(b_dh, b_gain)
            b_t = tiles.normalize_gradient(b_dh, b_hat, rho, D, THREADS, VECTOR, KIND)
            if grad_ptr is not None:
                if not AHEAD:
                    b_grad = tiles.load(
                        grad_ptr, i_token, stride_gb, stride_gl, length_g, o_d, m_d, True
                    )
                b_t = tiles.add(b_t, tiles.widen(b_grad))
            if dx_ptr is not None:
                tiles.store(dx_ptr, i_token, b_t, o_d, m_d, D)
            if gate_sum_ptr is not None:
                if not AHEAD:
                    b_y = tiles.load(y_ptr, i_token, stride_yb, stride_yl, length_y, o_d, m_d, True)
                b_gate_sum = tiles.add_product(b_gate_sum, b_t, tiles.widen(b_y))
            if dy_ptr is not None:
                if gate_ptr is not None or gate_table_ptr is not None:
                    b_t = tiles.multiply(b_t, b_gate)
                tiles.store(dy_ptr, i_token, b_t, o_d, m_d, D)
    if gate_sum_ptr is not None:
        tiles.store(gate_sum_ptr, pid, b_gate_sum, o_d, m_d, D)
    if dot_ptr is not None:
        tiles.store(dot_ptr, pid, b_dot, o_d, m_d, D)
    if total_ptr is not None:
        tiles.store(total_ptr, pid, b_total, o_d, m_d, D)


@dataclass(frozen=True)
class ForwardLaunch(tiles.Launch):
    """Launch of the forward kernel: at most ``trips`` tokens a program, ``stages`` under way."""

    trips: int
    stages: int

    def constants(self, dim: int, kind: str) -> dict[str, Any]:
        return super().constants(dim, kind) | {"TRIPS": self.trips, "STAGES": self.stages}


def forward_launch(
    tokens: int, dim: int, itemsize: int, capability: tuple[int, ...], affine: bool, indexed: bool
) -> ForwardLaunch:
    """Choose 8 tokens a program, to load the rows once; fewer if multiprocessors would be idle.

    ``itemsize`` is that of the wider one of x and y, in bytes; ``affine``: there is an affine part
    beside a gate and rows or tables of scale or shift.
    """
    # A thread holds three rows of 40 elements and a token in 255 registers, in 16 bits or on
    # sm_100, but not what it needs to load more vectors, or the rows of float32 tokens by an index.
    indexed = indexed and itemsize > 2
    crowded = affine or indexed
    wide = itemsize > 2 and dim > 4096 and capability[0] != 10
    narrow = indexed or (dim <= 5120 and (affine or wide))
    head, tail, num_warps = tiles.split_token(dim, 24 if narrow else 40)
    halves = num_warps == 8 and not crowded and head + tail <= 5120  # two programs of 128 fit
    registers = 128 if halves or num_warps == 16 else 255
    wave = 4 * multiprocessors(capability)
    programs = max(1, min(tokens, max(wave, -(-tokens // 8))))
    trips = 1 << (-(-tokens // programs) - 1).bit_length()
    # Two tokens of x and y are copied ahead if shared memory holds them; crowded long rows leave
    # no registers for that.
    room = (224 if capability[0] in (9, 10, 11) else 96) * 1024
    ahead = 2 if dim <= 5120 or not crowded else 0 if indexed else 1
    stages = 1 + min(ahead, room // (2 * (head + tail) * itemsize))
    return ForwardLaunch(head, tail, num_warps, registers, programs, trips, stages)


@dataclass(frozen=True)
class BackwardLaunch(tiles.Launch):
    """Launch of kernels; ``ahead``: load the next token early; ``passes``: results of each one."""

    # Both are chosen so that no combination of flags spills (bench/RESULTS.md, compiled kernels).

    ahead: bool
    passes: tuple[tuple[str, ...], ...]

    def constants(self, dim: int, kind: str) -> dict[str, Any]:
        return super().constants(dim, kind) | {"AHEAD": self.ahead}


def backward_launch(
    tokens: int, rows: int, dim: int, itemsize: int, capability: tuple[int, ...], sums: bool
) -> BackwardLaunch:
    """Choose about one resident wave over all rows if programs write partial rows of ``sums``.

    ``itemsize`` is that of the widest tensor of tokens, in bytes.
    """
    head, tail, num_warps = tiles.split_token(dim)
    narrow = head + tail <= 12 * 32 * num_warps
    if narrow and sums and itemsize > 2 and capability >= (12, 0):  # 10 elements a thread spill
        head, tail, num_warps = tiles.split_token(dim, 20)
    # All sums together need up to 168 registers a thread: 12 such warps fill a processor. Without
    # a limit ptxas may spill one or two to fit one more program.
    registers = {8: 255, 16: 128}.get(num_warps, 168)
    wave = max(1, 12 // num_warps) * multiprocessors(capability)
    programs = wave if sums else max(4 * wave, -(-tokens // 8))
    programs = max(1, min(-(-programs // rows), tokens // rows))
    results: tuple[tuple[str, ...], ...] = (("dx", "dy"), ("gate_sum",), ("dot", "total"))
    if narrow or not sums:
        results = (sum(results, ()),)
    ahead = narrow and itemsize <= 2
    return BackwardLaunch(head, tail, num_warps, registers, programs, ahead, results)
