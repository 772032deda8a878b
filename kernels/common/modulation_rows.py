"""Map tokens to compact rows of modulation; sum over the tokens of a row; check arguments.

A modulation (scale, shift, gate) is ``table [D] + rows [R, D]``, either part optional, added in
float32. Token n of N uses row n // (N / R), or ``row_index[n]``. Rows are never expanded to N.
"""

import math
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from prfl_fast.kernels.runtime.checks import (
    cast,
    describe,
    require,
    require_float,
    require_same_device,
)
from prfl_fast.kernels.runtime.triton import tl, triton


def count_rows(*rows: torch.Tensor | None) -> int:
    """Return R of the first ``[R, D]`` tensor that is given; one if none is."""
    for t in rows:
        if t is not None:
            return t.shape[0]
    return 1


def table_plus_rows(
    table: torch.Tensor | None, rows: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return table + rows as ``[R, D]``; ``[1, D]`` for a table alone, None for neither."""
    if rows is None:
        return None if table is None else cast(table, dtype)[None]
    rows = cast(rows, dtype)
    return rows if table is None else cast(rows + table, dtype)  # a float64 table is wider


def by_row(tokens: torch.Tensor, rows: int, row_index: torch.Tensor | None) -> torch.Tensor:
    """Return ``[..., D]`` as ``[R, N / R, D]``; unchanged if an index names the rows."""
    if row_index is not None or (tokens.dim() == 3 and tokens.shape[0] == rows):
        return tokens
    dim = tokens.shape[-1]
    return tokens.reshape(rows, tokens.numel() // (rows * dim), dim)


def per_token(rows: torch.Tensor, row_index: torch.Tensor | None) -> torch.Tensor:
    """Return ``[R, D]`` in a shape that broadcasts against the result of :func:`by_row`.

    Raises:
        ValueError: if a value of ``row_index`` is outside [0, R), on the CPU.
    """
    if row_index is None:
        return rows if rows.shape[0] == 1 else rows.unsqueeze(1)
    try:
        return torch.embedding(rows, row_index)
    except IndexError as error:
        low, high = (int(value) for value in torch.aminmax(row_index))
        expected = f"values in [0, {rows.shape[0]}), not from {low} to {high}"
        raise ValueError(
            f"prfl_fast.kernels: row_index is {describe(row_index)}, expected {expected}"
        ) from error


def sum_by_row(tokens: torch.Tensor, rows: int, row_index: torch.Tensor | None) -> torch.Tensor:
    """Sum :func:`by_row`'s result over the tokens of each row to ``[R, D]``, deterministically."""
    if row_index is None:
        return tokens.sum(1)
    if tokens.is_cpu:  # the gradient of a lookup adds in order, 20 times as fast as segment_reduce
        return torch.ops.aten.embedding_dense_backward.default(tokens, row_index, rows, -1, False)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    order, offsets = segments(row_index, rows)
    return torch.segment_reduce(tokens[order], "sum", offsets=offsets, axis=0)


# Not attributes of the tensors, which copies and files would have too.
_segments: Any = WeakTensorKeyDictionary()


def segments(row_index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens sorted by row ``[N]`` and starts of rows ``[R + 1]``, int64; no sync.

    The result is stored on ``row_index``, which all backwards of a forward share, until it changes.
    """
    on_gpu = row_index.is_cuda and torch.cuda.is_initialized()  # not a fake tensor
    # A CUDA graph sorts at each replay, because its inputs change in place between replays.
    if row_index.is_inference() or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return _sorted(row_index, rows)
    # Kernels on another stream would not wait for the sort.
    stream = torch.cuda.current_stream(row_index.device) if on_gpu else None
    place = row_index.untyped_storage()._cdata  # assigning .data does not change the version
    key = (rows, row_index._version, place, stream)
    known = _segments.get(row_index)
    if known is None or known[0] != key:
        known = _segments[row_index] = key, _sorted(row_index, rows)
    return known[1]  # type: ignore[no-any-return]


def _sorted(row_index: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    by_row, order = torch.sort(row_index.reshape(-1), stable=True)
    bounds = torch.arange(rows + 1, device=row_index.device, dtype=row_index.dtype)
    return order, torch.searchsorted(by_row, bounds)


def common_rows(first: int, second: int, row_index: torch.Tensor | None) -> int:
    """Return R such that all tokens of one of R rows share one row of each of two tensors.

    ``first`` and ``second`` are the numbers of rows of the tensors. Row r of R is row
    ``r // row_group(R, first)`` of the first. Both numbers divide the tokens, hence so does their
    least common multiple. An index names rows that both tensors have.
    """
    if row_index is None:
        return math.lcm(first, second)
    return min((rows for rows in (first, second) if rows > 1), default=1)


def row_group(common: int, rows: int) -> int:
    """Return the number of rows of :func:`common_rows` that make one of ``rows``."""
    return max(1, common // rows)


def fold_rows(partial: torch.Tensor, rows: int) -> torch.Tensor:
    """Sum the partials ``[R, programs, D]`` of :func:`common_rows` to ``[rows, D]``.

    Rows past R, which no index can name, are zero.
    """
    common, _, dim = partial.shape
    if rows > common:
        return torch.cat((partial.sum(1), partial.new_zeros(rows - common, dim)))
    parts = partial.view(rows, -1, dim)
    return parts[:, 0] if parts.shape[1] == 1 else parts.sum(1)


def token_strides(x: torch.Tensor) -> tuple[int, int, int | None]:
    """Return the stride of a batch, the stride of a token, and the tokens in a batch."""
    if x.dim() == 2:
        return 0, x.stride(0), None
    # Without a length, token n is at n times its stride, and the kernel needs no division.
    stride_b, stride_l, length = x.stride(0), x.stride(1), x.shape[1]
    return stride_b, stride_l, None if x.shape[0] == 1 or stride_b == length * stride_l else length


@triton.jit
def token_offset(i_token, stride_b, stride_l, length):
    """Return the offset of token ``i_token`` (int64), in elements (int64)."""
    if length is None:
        offset = i_token * stride_l
    else:
        i_b = (i_token.to(tl.int32) // length).to(tl.int64)  # 64-bit division is far slower
        offset = i_b * stride_b + (i_token - i_b * length) * stride_l
    return offset


@triton.jit
def load_token(ptr, i_token, stride_b, stride_l, length, o_d, m_d):
    """Load token ``i_token`` in float32 ``[BLOCK_D]``, zero beyond D."""
    p_token = ptr + token_offset(i_token, stride_b, stride_l, length)
    return tl.load(p_token + o_d, mask=m_d, other=0.0).to(tl.float32)


@triton.jit
def row_share(i_row, i_part, parts, tokens_per_row, bounds_ptr):
    """Return first token and end of part ``i_part`` of ``parts`` of a row, in sorted order."""
    if bounds_ptr is not None:
        start = tl.load(bounds_ptr + i_row)
        end = tl.load(bounds_ptr + i_row + 1)
    else:
        start = i_row * tokens_per_row
        end = start + tokens_per_row
    share = tl.cdiv((end - start).to(tl.int32), parts)
    start += i_part * share
    return start, tl.minimum(start + share, end)


@triton.jit
def load_index(index_ptr, i, end):
    """Load number ``i`` of an index as int64; 0 from ``end`` on."""
    return tl.load(index_ptr + i, mask=i < end, other=0).to(tl.int64)


@triton.jit
def coarse_row(i_row, group):
    """Return the row that holds common row ``i_row`` (int64), of ``group`` common rows each."""
    return (i_row.to(tl.int32) // group).to(tl.int64)


@triton.jit
def load_sum(rows_ptr, table_ptr, i_row, stride_row, o_d, m_d, BLOCK_D: tl.constexpr):
    """Load table + rows[i_row] in float32 ``[BLOCK_D]``; zero if neither is given."""
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    if table_ptr is not None:
        b_sum += tl.load(table_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    if rows_ptr is not None:
        p_row = rows_ptr + i_row * stride_row + o_d
        b_sum += tl.load(p_row, mask=m_d, other=0.0).to(tl.float32)
    return b_sum


def check_tokens(op: str, argument: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless x is a float ``[B, L, D]`` or ``[N, D]``, axis D contiguous."""
    require_float(op, argument, x)
    require(x.dim() in (2, 3), op, argument, x, "a shape [B, L, D] or [N, D]")
    require(x.shape[-1] > 0, op, argument, x, "a last axis of at least one element")
    require(
        x.stride(-1) == 1 or x.shape[-1] == 1, op, argument, x,
        "a contiguous last axis: call .contiguous() where it is made",
    )  # fmt: skip


def check_rows(
    op: str,
    x: torch.Tensor,
    vectors: dict[str, torch.Tensor | None],
    rows: dict[str, torch.Tensor | None],
    row_index: torch.Tensor | None,
) -> None:
    """Raise ``ValueError`` unless vectors are ``[D]``, rows ``[R, D]``, row_index fits x."""
    dim, tokens = x.shape[-1], x.numel() // x.shape[-1]
    for name, value in vectors.items():
        if value is not None:
            require_float(op, name, value)
            require(value.shape == (dim,), op, name, value, f"shape [{dim}], the last axis of x")
    given = {name: value for name, value in rows.items() if value is not None}
    for name, value in given.items():
        require_float(op, name, value)
        # The first of them is a matrix by now, so it has a number of rows.
        ok = value.dim() == 2 and value.shape[1] == dim
        ok = ok and value.shape[0] == count_rows(*given.values()) > 0
        require(ok, op, name, value, f"shape [R, {dim}], R the same for {' and '.join(rows)}")
        require(value.stride(1) == 1 or dim == 1, op, name, value, "a contiguous last axis")
        # The text is made only on failure, because it would fix the token count in a trace.
        if row_index is None and tokens % value.shape[0]:
            expected = f"a divisor of the {tokens} tokens of x as number of rows, or row_index"
            require(False, op, name, value, expected)
    if row_index is not None:
        require(bool(given), op, "row_index", row_index, f"None without {' or '.join(rows)}")
        ok = isinstance(row_index, torch.Tensor) and row_index.dtype in (torch.int32, torch.int64)
        ok = ok and row_index.shape == x.shape[:-1]
        expected = "int32 or int64 of x's shape without its last axis, one row for each token"
        require(ok, op, "row_index", row_index, expected)
    require_same_device(op, x=x, **vectors, **rows, row_index=row_index)
