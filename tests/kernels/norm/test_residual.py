"""gated_residual: reference and Triton against plain PyTorch, every argument, every gradient."""

import importlib

import pytest
import torch
from dtypes import BF16, FLOATS, FP16, FP32
from op_checks import assert_same_bits, bind, check, far_rows, saved_by, slack
from op_tests import OperationTests
from plain_torch import expand_rows, wide
from properties import property_test, st

from prfl_fast.kernels import gated_residual
from prfl_fast.kernels.common.modulation_rows import common_rows, fold_rows, row_group

module = importlib.import_module("prfl_fast.kernels.norm.residual")
GATES = ((), ("gate",), ("gate_table",), ("gate", "gate_table"))
FLOAT_SLACK = 4.0  # half-ulps, for other orders of summation


def naive(x, y, gate=None, gate_table=None, row_index=None):
    vector = expand_rows(gate, gate_table, x, row_index)
    return (wide(x) + (wide(y) if vector is None else wide(y) * vector)).to(x.dtype)


def make(shape, names=GATES[-1], rows=1, dtype=FP32, y_dtype=None, small=FP32):
    """Return x and y of ``shape`` and the named tensors of dtype ``small``."""
    tensors = {"x": torch.randn(shape).to(dtype), "y": torch.randn(shape).to(y_dtype or dtype)}
    for name in names:
        size = (rows, shape[-1]) if name == "gate" else shape[-1:]
        tensors[name] = (0.5 * torch.randn(size)).to(small)
    return tensors


def compare(tensors, rounding=FLOAT_SLACK, **fixed):
    check(bind(gated_residual, fixed), bind(naive, fixed), tensors, rounding=rounding)


class TestGatedResidual(OperationTests):
    op = "gated_residual"
    function, naive = staticmethod(gated_residual), staticmethod(naive)
    reference = staticmethod(module.reference)
    flags = {"x": "", "y": "+-", "gate": "-+", "gate_table": "-+"}

    @staticmethod
    def examples(dtype):
        small = torch.float64 if dtype == torch.float64 else FP32
        yield make((2, 2, 8), GATES[-1], 2, dtype, None, small), {}
        row_index = torch.tensor([[2, 0], [2, 1]])
        yield make((2, 2, 8), GATES[-1], 3, dtype, None, small), {"row_index": row_index}
        yield make((2, 2, 8), (), 1, dtype), {}

    @staticmethod
    def layouts(dtype):
        for shape in ((2, 2, 48), (4, 48)):
            yield make(shape, rows=2, dtype=dtype), {}
            row_index = torch.randint(0, 2, shape[:-1])
            yield make(shape, rows=2, dtype=dtype), {"row_index": row_index}

    at_length = staticmethod(lambda length: make((2, length, 16), ("gate",), 2))
    good = staticmethod(lambda: make((2, 6, 8), ("gate",), 2))

    bad_arguments = [
        ({"x": torch.ones(2, 6, 8, dtype=torch.int64)}, "x is int64"),
        ({"y": torch.ones(2, 3, 8)}, r"y is float32\[2, 3, 8\].*\[2, 6, 8\]"),
        ({"y": torch.ones(2, 8, 6).transpose(1, 2)}, "y is .*contiguous last axis"),
        ({"y": torch.ones(2, 6, 8, device="meta")}, "y is .*meta.*on cpu"),
        ({"gate": torch.ones(5, 8)}, r"gate is float32\[5, 8\].*12 tokens"),
        ({"gate": torch.ones(2, 1, 8)}, r"gate is float32\[2, 1, 8\].*\[R, 8\]"),
        ({"gate_table": torch.ones(1, 8)}, r"gate_table is float32\[1, 8\].*\[8\]"),
        ({"row_index": torch.zeros(12, dtype=torch.int64)}, r"row_index is int64\[12\]"),
        ({"row_index": torch.zeros(2, 6)}, "row_index is .*int32 or int64"),
        ({"gate": None, "row_index": torch.zeros(2, 6).long()}, "row_index is .*None without gate"),
        ({"row_index": torch.full((2, 6), 2)}, r"row_index is .*\[0, 2\)"),
    ]


@pytest.mark.parametrize("names", GATES, ids="+".join)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 64), (2, 3, 33), (1, 2, 1536), (1, 2, 5120), (2, 0, 64)]
)
def test_shapes(backend, shape, dtype, names):
    compare(make(shape, names, 1, dtype), slack(backend, dtype))


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 12])
def test_rows_are_samples_frames_or_tokens(backend, rows):
    for shape in ((2, 6, 40), (12, 40)):
        compare(make(shape, rows=rows))


@pytest.mark.parametrize(
    "shape, rows, dtype",
    [((2, 4, 40), 5, torch.int64), ((8, 40), 12, torch.int32), ((2, 2, 40), 1, torch.int32)],
)
def test_row_index(backend, shape, rows, dtype):
    """Name rows in any order, some without a token."""
    row_index = torch.randint(0, rows, shape[:-1]).to(dtype)
    for names in GATES[1::2]:
        compare(make(shape, names, rows), row_index=row_index)


@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32, FP32), (FP32, BF16, BF16), (FP16, BF16, FP16), (BF16, BF16, BF16)]
)
def test_mixed_dtypes(backend, dtypes):
    for names in (GATES[0], GATES[-1]):
        compare(make((2, 4, 72), names, 2, *dtypes), slack(backend, *dtypes) + 1)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_slices_of_packed_tensors(backend, rows):
    """Take x and y from one projection, every other token; gates sliced from Wan's [R, 6, D]."""

    def packed(function):
        def apply(xy, modulation, table):
            x, y = xy.unflatten(-1, (2, -1))[:, ::2].unbind(2)
            assert not x.is_contiguous()
            return function(x, y, modulation.unbind(1)[2], gate_table=table[2])

        return apply

    sizes = {"xy": (2, 8, 2 * 40), "modulation": (rows, 6, 40), "table": (6, 40)}
    tensors = {name: torch.randn(size) for name, size in sizes.items()}
    check(packed(gated_residual), packed(naive), tensors, rounding=FLOAT_SLACK)


def test_transposed_tokens(backend):
    def turned(function):
        return lambda x, y, gate: function(x.transpose(0, 1), y.transpose(0, 1), gate)

    tensors = {n: torch.randn(3, 2, 16) for n in "xy"} | {"gate": torch.randn(2, 16)}
    check(turned(gated_residual), turned(naive), tensors, rounding=FLOAT_SLACK)
    assert turned(gated_residual)(**tensors).is_contiguous()


def test_without_a_gate_the_backward_op_copies(backend):
    grad, backward = torch.randn(2, 3, 16), torch.ops.prfl_fast.gated_residual_backward
    d_y, d_gate = backward(grad, None, None, None, None, FP32, True, True)
    assert torch.equal(d_y, grad) and d_y.data_ptr() != grad.data_ptr() and d_gate.numel() == 0


def test_saved_bytes():
    gated, tokens, row = make((1, 256, 128), ("gate",), 1, BF16), 256 * 128 * 2, 128 * 4
    assert saved_by(gated_residual, make((1, 256, 128), (), 1, BF16)) == 0
    assert saved_by(gated_residual, gated) == tokens + row
    assert saved_by(gated_residual, gated, frozen=["gate"]) == row


@pytest.mark.triton
def test_offsets_past_int32(sparse_file):
    values, other, gate = torch.randn(3, 64).half(), torch.randn(3, 64).half(), torch.randn(3, 64)
    far, backward = far_rows(sparse_file(), values), torch.ops.prfl_fast.gated_residual_backward
    fixed = (gate, None, None, FP16, True, True)
    for strided, dense in ((far, values), (far[None].transpose(0, 1), values[:, None])):
        near = other.view(dense.shape)
        for left, right in (((strided, near), (dense, near)), ((near, strided), (near, dense))):
            assert torch.equal(gated_residual(*left, gate), gated_residual(*right, gate))
            assert_same_bits(backward(*left, *fixed), backward(*right, *fixed))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 5000, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in ((1, 1), (2, 2), (32760, 1), (32760, 21), (75600, 75600), (10**6, 3)):
        forward = module.forward_launch(tokens, dim, capability)
        backward = [module.backward_launch(tokens, rows, dim, capability, s) for s in (0, 1)]
        for launch in (forward, *backward):
            assert dim <= launch.block_d * launch.chunks < max(2 * dim, 64)
            assert launch.num_warps in (1, 2, 4) and launch.block_d <= 8 * 32 * launch.num_warps
        assert 1 <= forward.programs <= tokens <= forward.programs * -(-tokens // forward.programs)
        assert all(1 <= b.programs <= max(1, tokens // rows) for b in backward)
    # A million tokens write no more partial rows than thirty thousand.
    many, few = (module.backward_launch(n, 1, dim, capability, True) for n in (10**6, 32760))
    assert many == few


def test_common_rows():
    assert common_rows(4, 6, None) == 12
    assert common_rows(1, 5, None) == common_rows(5, 1, torch.zeros(3)) == 5
    assert common_rows(4, 6, torch.zeros(3)) == 4
    assert row_group(12, 4) == 3 and row_group(4, 6) == 1
    partial = torch.randn(4, 3, 8)
    torch.testing.assert_close(fold_rows(partial, 2)[0], partial[:2].sum((0, 1)))
    assert torch.equal(fold_rows(partial, 6)[4:], torch.zeros(2, 8))


@st.composite
def arguments(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    dim, tokens = draw(st.integers(1, 130)), batch * length
    names = draw(st.sampled_from(GATES))
    flat, indexed = draw(st.booleans()), draw(st.booleans()) and "gate" in names
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    rows = draw(st.integers(1, 9)) if indexed else draw(st.sampled_from(divisors))
    dtypes = [draw(st.sampled_from(FLOATS)) for _ in range(3)]
    strided = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (tokens, dim) if flat else (batch, length, dim)
    tensors = make(shape, names, rows, *dtypes)
    fixed = {"row_index": torch.randint(0, rows, shape[:-1])} if indexed else {}
    if strided:
        tensors |= {n: torch.stack([tensors[n]] * 2, -2)[..., 0, :] for n in "xy"}
    return tensors, fixed


@property_test(arguments())
def test_any_arguments(case):
    tensors, fixed = case
    compare(tensors, **fixed)
