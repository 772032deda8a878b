"""Split a row of D columns into two power-of-two register tiles (5120 = 4096 + 1024).

One tile for D 5120 has 8192 columns and wastes registers: 16 elements in each of 512 threads, where
two tiles have 10. A split row is a tuple ``(head, tail)``: columns 0 to HEAD, and HEAD to
HEAD + TAIL, of which the last may be beyond D.
"""

from dataclasses import dataclass
from typing import Any

from prfl_fast.kernels.common.modulation_rows import load_sum, token_offset
from prfl_fast.kernels.runtime.triton import tl, triton


def split_token(dim: int, most: int = 16) -> tuple[int, int, int]:
    """Return HEAD, TAIL and the fewest warps (up to 16) for ``most`` elements a thread."""
    head = 1 << max(0, (dim - 1).bit_length() - 1)
    tail = 1 << max(0, dim - head - 1).bit_length()
    num_warps = 1
    while num_warps < 16 and head + tail > most * 32 * num_warps:
        num_warps *= 2
    return max(32 * num_warps, head), max(32 * num_warps, tail), num_warps


@dataclass(frozen=True)
class Launch:
    """Launch of ``programs``, in all (forward) or for each row (backward); tiles of a token."""

    head: int
    tail: int
    num_warps: int
    registers: int | None  # most of a thread; None: the compiler chooses
    programs: int

    def options(self) -> dict[str, int]:
        """Return the options of the compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, **limit}

    def constants(self, dim: int, kind: str) -> dict[str, Any]:
        """Return the ``constexpr`` parameters of a kernel."""
        threads = 32 * self.num_warps
        return {"D": dim, "HEAD": self.head, "TAIL": self.tail, "THREADS": threads, "KIND": kind}


@triton.jit
def columns(D: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr):
    """Return the column numbers and the mask of those that exist."""
    o_head = tl.arange(0, HEAD)
    o_tail = HEAD + tl.arange(0, TAIL)
    return (o_head, o_tail), (o_head < D, o_tail < D)


@triton.jit
def zeros(HEAD: tl.constexpr, TAIL: tl.constexpr):
    return tl.zeros([HEAD], tl.float32), tl.zeros([TAIL], tl.float32)


@triton.jit
def load(ptr, i_token, stride_b, stride_l, length, o_d, m_d, exists):
    """Load token ``i_token`` in its own dtype; zeros beyond D, or if it does not exist."""
    p_token = ptr + token_offset(i_token, stride_b, stride_l, length)
    b_head = tl.load(p_token + o_d[0], mask=m_d[0] & exists, other=0.0)
    return b_head, tl.load(p_token + o_d[1], mask=m_d[1] & exists, other=0.0)


@triton.jit
def store(ptr, i_token, b, o_d, m_d, D: tl.constexpr):
    """Store token ``i_token`` (int64) of a contiguous tensor, rounded to its dtype."""
    p_token = ptr + i_token * D
    tl.store(p_token + o_d[0], b[0].to(ptr.dtype.element_ty), mask=m_d[0])
    tl.store(p_token + o_d[1], b[1].to(ptr.dtype.element_ty), mask=m_d[1])


@triton.jit
def _store_tile(
    p_tile, b, exists, COLUMNS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):
    """Store a tile, of which COLUMNS exist, in the layout of its load."""
    # Columns are computed in the shape of the values: Triton does not see that reshaped ones are
    # neighbors, and would store bytes one by one. Lanes go to the first of equally dense axes, so
    # the axis of threads comes first.
    b = tl.permute(by_thread(b, THREADS, VECTOR), (1, 0, 2))  # [THREADS, loads, WIDTH]
    o_d = tl.arange(0, b.shape[1])[None, :, None] * THREADS + tl.arange(0, THREADS)[:, None, None]
    o_d = o_d * b.shape[2] + tl.arange(0, b.shape[2])[None, None, :]
    if b.numel <= COLUMNS:
        tl.store(p_tile + o_d, b, mask=exists)
    else:
        tl.store(p_tile + o_d, b, mask=(o_d < COLUMNS) & exists)


@triton.jit
def store_by_thread(
    ptr, i_token, b, exists, D: tl.constexpr, HEAD: tl.constexpr, THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Store as :func:`store`, in the layout of the load, so that no byte changes its thread.

    Nothing is stored if the token does not exist.
    """
    p_token = ptr + i_token * D
    b_head, b_tail = round_to(b, ptr)
    _store_tile(p_token, b_head, exists, D, THREADS, VECTOR)
    _store_tile(p_token + HEAD, b_tail, exists, D - HEAD, THREADS, VECTOR)


@triton.jit
def load_row(
    rows_ptr, table_ptr, i_row, stride_row, o_d, m_d, HEAD: tl.constexpr, TAIL: tl.constexpr
):
    """Load table + rows[i_row] in float32; zero if neither is given."""
    b_head = load_sum(rows_ptr, table_ptr, i_row, stride_row, o_d[0], m_d[0], HEAD)
    return b_head, load_sum(rows_ptr, table_ptr, i_row, stride_row, o_d[1], m_d[1], TAIL)


@triton.jit
def load_modulation(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr,
    i_row, stride_scale, stride_shift, o_d, m_d, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Return w·(1 + s) and b·(1 + s) + h of a row: the factor of x̂, and the offset."""
    b_scale = load_row(scale_ptr, scale_table_ptr, i_row, stride_scale, o_d, m_d, HEAD, TAIL)
    b_gain = (1.0 + b_scale[0], 1.0 + b_scale[1])
    b_offset = load_row(shift_ptr, shift_table_ptr, i_row, stride_shift, o_d, m_d, HEAD, TAIL)
    if bias_ptr is not None:
        b_bias = load_row(None, bias_ptr, i_row, 0, o_d, m_d, HEAD, TAIL)
        b_offset = add_product(b_offset, b_gain, b_bias)
    if weight_ptr is not None:
        b_gain = multiply(b_gain, load_row(None, weight_ptr, i_row, 0, o_d, m_d, HEAD, TAIL))
    return b_gain, b_offset


@triton.jit
def round_to(b, ptr):
    """Round to the dtype of a tensor."""
    return b[0].to(ptr.dtype.element_ty), b[1].to(ptr.dtype.element_ty)


@triton.jit
def widen(b):
    return b[0].to(tl.float32), b[1].to(tl.float32)


@triton.jit
def add(a, b):
    return a[0] + b[0], a[1] + b[1]


@triton.jit
def multiply(a, b):
    return a[0] * b[0], a[1] * b[1]


@triton.jit
def add_product(a, b, c):
    """Return a + b·c."""
    return a[0] + b[0] * c[0], a[1] + b[1] * c[1]


@triton.jit
def by_thread(b, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """View values as ``[loads, THREADS, VECTOR]``, so that none changes its thread.

    A thread holds VECTOR neighbors of every load, 16 bytes of the loaded tensor.
    """
    WIDTH: tl.constexpr = min(VECTOR, b.shape[0] // THREADS)
    return tl.reshape(b, [b.shape[0] // (THREADS * WIDTH), THREADS, WIDTH])


@triton.jit
def thread_sums(b, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Return the sum of each thread's own values, ``[THREADS]``."""
    b_head = tl.sum(tl.sum(by_thread(b[0], THREADS, VECTOR), 2), 0)
    return b_head + tl.sum(tl.sum(by_thread(b[1], THREADS, VECTOR), 2), 0)


@triton.jit
def mean(b, D: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Return the mean of D values: each thread adds its own, then one sum over threads."""
    return tl.sum(thread_sums(b, THREADS, VECTOR), 0) * (1.0 / D)


@triton.jit
def means(b, c, D: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Return the means of D values of b and of c, by one sum over threads, not two."""
    b_both = tl.join(thread_sums(b, THREADS, VECTOR), thread_sums(c, THREADS, VECTOR))
    first, second = tl.split(tl.sum(b_both, 0))
    return first * (1.0 / D), second * (1.0 / D)


@triton.jit
def normalize(
    b_x, m_d, eps, D: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr, KIND: tl.constexpr
):
    """Return x̂ (zero beyond D) and ρ of one token."""
    b_hat = b_x
    rho = 1.0
    if KIND == "layer":
        center = mean(b_x, D, THREADS, VECTOR)
        b_hat = (tl.where(m_d[0], b_x[0] - center, 0.0), tl.where(m_d[1], b_x[1] - center, 0.0))
    if KIND != "none":
        rho = tl.rsqrt(mean(multiply(b_hat, b_hat), D, THREADS, VECTOR) + eps)
        b_hat = (b_hat[0] * rho, b_hat[1] * rho)
    return b_hat, rho


@triton.jit
def normalize_gradient(
    b_dhat,
    b_hat,
    rho,
    D: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
    KIND: tl.constexpr,
):
    """Return d_x of one token from the gradient of x̂; undefined beyond D."""
    b_dx = b_dhat
    if KIND != "none":
        center = 0.0
        if KIND == "layer":
            along, center = means(multiply(b_dhat, b_hat), b_dhat, D, THREADS, VECTOR)
        else:
            along = mean(multiply(b_dhat, b_hat), D, THREADS, VECTOR)
        b_dx = (
            (b_dhat[0] - b_hat[0] * along - center) * rho,
            (b_dhat[1] - b_hat[1] * along - center) * rho,
        )
    return b_dx
