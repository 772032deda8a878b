"""gated_residual: reference and Triton against plain PyTorch, every argument, every gradient."""

import copy

import pytest
import token_cases as cases
import torch
from dtypes import BF16, FLOATS, FP16, FP32
from op_checks import saved_by, slack
from op_tests import OperationTests
from plain_torch import expand_rows, wide
from properties import property_test, st

from prfl_fast.kernels import gated_residual
from prfl_fast.kernels.common.modulation_rows import common_rows, fold_rows, row_group, segments
from prfl_fast.kernels.norm import residual as module

GATES = ((), ("gate",), ("gate_table",), ("gate", "gate_table"))


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


class TestGatedResidual(OperationTests):
    op = "gated_residual"
    function, naive, reference = gated_residual, naive, module.reference
    flags = {"x": "", "y": "+-", "gate": "-+", "gate_table": "-+"}

    def examples(self, dtype):
        small = torch.float64 if dtype == torch.float64 else FP32
        yield make((2, 2, 8), GATES[-1], 2, dtype, None, small), {}
        row_index = torch.tensor([[2, 0], [2, 1]])
        yield make((2, 2, 8), GATES[-1], 3, dtype, None, small), {"row_index": row_index}
        yield make((2, 2, 8), (), 1, dtype), {}

    def layouts(self, dtype):
        for shape in ((2, 2, 48), (4, 48)):
            yield make(shape, rows=2, dtype=dtype), {}
            row_index = torch.randint(0, 2, shape[:-1])
            yield make(shape, rows=2, dtype=dtype), {"row_index": row_index}

    at_length = staticmethod(lambda length: make((2, length, 16), ("gate",), 2))
    good = staticmethod(lambda: make((2, 6, 8), ("gate",), 2))
    far = staticmethod(lambda shape: (make(shape, ("gate",), dtype=FP16), {}))

    bad_arguments = [
        *cases.BAD_RESIDUALS,
        ({"gate": torch.ones(2, 1, 8)}, r"gate is float32\[2, 1, 8\].*\[R, 8\]"),
        ({"gate": None, "row_index": torch.zeros(2, 6).long()}, "row_index is .*None without gate"),
        ({"row_index": torch.full((2, 6), 2)}, r"row_index is .*\[0, 2\)"),
    ]


compare = TestGatedResidual.compare


@pytest.mark.parametrize("names", GATES, ids="+".join)
@pytest.mark.parametrize("shape", [(1, 1, 1), *cases.SHAPES[1:]])
def test_shapes(backend, shape, dtype, names):
    compare(make(shape, names, 1, dtype), slack(backend, dtype))


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 12])
def test_rows_are_samples_frames_or_tokens(backend, rows):
    for shape in ((2, 6, 40), (12, 40)):
        compare(make(shape, rows=rows))


@pytest.mark.parametrize("shape, rows, index", cases.ROW_INDICES)
def test_row_index(backend, shape, rows, index):
    """Name rows in any order, some without a token."""
    row_index = torch.randint(0, rows, shape[:-1]).to(index)
    for names in GATES[1::2]:
        compare(make(shape, names, rows), row_index=row_index)


def test_an_index_is_sorted_again_only_if_it_changes():
    index = torch.tensor([2, 0, 2, 0])
    first = segments(index, 3)
    assert segments(index, 3) is first and segments(index, 4) is not first
    index[1] = 1
    order, bounds = segments(index, 3)
    assert order.tolist() == [3, 1, 0, 2] and bounds.tolist() == [0, 1, 2, 4]
    index.data = torch.tensor([0, 1, 2, 1])  # without a new version
    assert segments(index, 3)[0].tolist() == [0, 1, 3, 2]
    assert not vars(copy.deepcopy(index))


def test_an_index_of_inference_mode_is_sorted():
    with torch.inference_mode():
        index = torch.tensor([2, 0, 2, 0])
    for _ in range(2):
        assert segments(index, 3)[0].tolist() == [1, 3, 0, 2]


@pytest.mark.triton
def test_backwards_of_one_forward_sort_their_index_once(triton_device, monkeypatch):
    sorts, sort = [], torch.sort
    monkeypatch.setattr(torch, "sort", lambda *args, **kw: sorts.append(args) or sort(*args, **kw))
    x, y, gate, index = torch.ones(2, 3, 8), torch.ones(2, 3, 8), torch.ones(2, 8), torch.ones(2, 3)
    index, gate = index.long(), gate.requires_grad_()
    for _ in range(3):
        x = gated_residual(x, y, gate, row_index=index)
    x.sum().backward()
    assert len(sorts) == 1


@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32, FP32), (FP32, BF16, BF16), (FP16, BF16, FP16), (BF16, BF16, BF16)]
)
def test_mixed_dtypes(backend, dtypes):
    for names in (GATES[0], GATES[-1]):
        compare(make((2, 4, 72), names, 2, *dtypes), slack(backend, *dtypes) + 1)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_slices_of_packed_tensors(backend, rows):
    """Take x and y from one projection, every other token; gates sliced from Wan's [R, 6, D]."""

    def slices(xy, modulation, table):
        return cases.unpack_residuals(xy) | {"gate": modulation[:, 2], "gate_table": table[2]}

    compare(cases.packed_residuals(rows, 40), of=slices)


def test_transposed_tokens(backend):
    def turned(gate, **tokens):
        return {n: t.transpose(0, 1) for n, t in tokens.items()} | {"gate": gate}

    tensors = {n: torch.randn(3, 2, 16) for n in "xy"} | {"gate": torch.randn(2, 16)}
    compare(tensors, of=turned)
    assert gated_residual(**turned(**tensors)).is_contiguous()


def test_without_a_gate_the_backward_op_copies(backend):
    grad, backward = torch.randn(2, 3, 16), torch.ops.prfl_fast.gated_residual_backward
    d_y, d_gate = backward(grad, None, None, None, None, FP32, True, True)
    assert torch.equal(d_y, grad) and d_y.data_ptr() != grad.data_ptr() and d_gate.numel() == 0


def test_saved_bytes():
    gated, tokens, row = make((1, 256, 128), ("gate",), 1, BF16), 256 * 128 * 2, 128 * 4
    assert saved_by(gated_residual, make((1, 256, 128), (), 1, BF16)) == 0
    assert saved_by(gated_residual, gated) == tokens + row
    assert saved_by(gated_residual, gated, frozen=["gate"]) == row


@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 5000, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in cases.LAUNCHED:
        forward = module.forward_launch(tokens, dim, capability)
        backward = [module.backward_launch(tokens, rows, dim, capability, s) for s in (0, 1)]
        for launch in (forward, *backward):
            assert dim <= launch.block_d * launch.chunks < max(2 * dim, 64)
            assert launch.num_warps in (1, 2, 4) and launch.block_d <= 8 * 32 * launch.num_warps
        assert 1 <= forward.programs <= tokens <= forward.programs * -(-tokens // forward.programs)
        assert all(1 <= b.programs <= max(1, tokens // rows) for b in backward)
    cases.assert_few_partial_rows(module.backward_launch, 1, dim, capability, True)


def test_common_rows():
    assert common_rows(4, 6, None) == 12
    assert common_rows(1, 5, None) == common_rows(5, 1, torch.zeros(3)) == 5
    assert common_rows(4, 6, torch.zeros(3)) == 4
    assert row_group(12, 4) == 3 and row_group(4, 6) == 1
    partial = torch.randn(4, 3, 8)
    torch.testing.assert_close(fold_rows(partial, 2)[0], partial[:2].sum((0, 1)))
    assert torch.equal(fold_rows(partial, 6)[4:], torch.zeros(2, 8))


@property_test()
def test_any_arguments(draw):
    names = draw(st.sampled_from(GATES))
    dim = draw(st.integers(1, 130))
    shape, (rows,), fixed = cases.draw_tokens(draw, dim, has_rows="gate" in names)
    tensors = make(shape, names, rows, *(draw(st.sampled_from(FLOATS)) for _ in range(3)))
    compare(cases.strided(tensors) if draw(st.booleans()) else tensors, **fixed)
