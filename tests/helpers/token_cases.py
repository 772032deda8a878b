"""Cases that the operations on rows of D, and on tokens with modulation rows, share."""

import torch
from dtypes import FLOATS
from properties import st

SHAPES = [(1, 1, 7), (1, 64), (3, 65), (1, 5, 96), (2, 3, 1536), (1, 2, 5120), (2, 0, 64)]
ROW_INDICES = [  # shape, rows, dtype of the index
    ((2, 4, 40), 5, torch.int64), ((8, 40), 12, torch.int32), ((2, 2, 40), 1, torch.int32)
]  # fmt: skip
# Tokens and rows of launches: of one token, of Wan's clips by sample, frame and token, of others.
LAUNCHED = ((1, 1), (2, 2), (32760, 1), (32760, 21), (75600, 75600), (10**6, 3))
# Refusals of x and y ``[2, 6, 8]``, a gate ``[2, 8]`` and a row index.
BAD_RESIDUALS = [
    ({"y": torch.ones(2, 3, 8)}, r"y is float32\[2, 3, 8\].*\[2, 6, 8\]"),
    ({"y": torch.ones(2, 8, 6).transpose(1, 2)}, "y is .*contiguous last axis"),
    ({"gate": torch.ones(5, 8)}, r"gate is float32\[5, 8\].*12 tokens"),
    ({"gate": [1.0]}, r"gate is \[1.0\]"),
    ({"gate_table": torch.ones(1, 8)}, r"gate_table is float32\[1, 8\].*\[8\]"),
    ({"row_index": torch.zeros(12, dtype=torch.int64)}, r"row_index is int64\[12\]"),
    ({"row_index": torch.zeros(2, 6)}, "row_index is .*int32 or int64"),
]


def assert_few_partial_rows(backward_launch, *arguments):
    """Assert that a million tokens write no more partial rows than thirty thousand."""
    many, few = (backward_launch(tokens, *arguments) for tokens in (10**6, 32760))
    assert many == few


def packed_residuals(rows, dim):
    """Return x and y in one projection, and Wan's six vectors as ``rows`` rows and as a table."""
    sizes = {"xy": (2, 6, 2 * dim), "modulation": (rows, 6, dim), "table": (6, dim)}
    return {name: torch.randn(size) for name, size in sizes.items()}


def unpack_residuals(xy):
    """Return every other token of x and of y."""
    x, y = xy.unflatten(-1, (2, -1))[:, ::2].unbind(2)
    assert not x.is_contiguous()
    return {"x": x, "y": y}


def strided(tensors, names="xy"):
    """Return the tensors with gaps between the rows of some."""
    return tensors | {n: torch.stack([tensors[n]] * 2, -2)[..., 0, :] for n in names}


def draw_strided_rows(draw, exponents):
    """Draw rows out of wider and more rows, their size a power of ten."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dim, step = draw(st.integers(1, 200)), draw(st.integers(1, 2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    size = (*shape[:-1], shape[-1] * step, dim + draw(st.integers(0, 9)))
    x = torch.randn(size) * 10.0 ** draw(exponents)
    return x.to(draw(st.sampled_from(FLOATS)))[..., ::step, :dim]


def draw_tokens(draw, dim, has_rows, count=1):
    """Draw a shape of tokens, ``count`` numbers of rows, and maybe an index that names rows."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    tokens = batch * length
    shape = draw(st.sampled_from([(tokens, dim), (batch, length, dim)]))
    indexed = draw(st.booleans()) and has_rows
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    rows = [draw(st.integers(1, 9) if indexed else st.sampled_from(divisors)) for _ in range(count)]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    fixed = {"row_index": torch.randint(0, min(rows), shape[:-1])} if indexed else {}
    return shape, rows, fixed
