"""residual_norm_modulate: reference and Triton against plain PyTorch, the sum and its norm."""

import itertools

import pytest
import token_cases as cases
import torch
from dtypes import BF16, FLOATS, FP16, FP32, FP64
from op_checks import RecordedCalls, run, saved_by
from op_tests import OperationTests
from plain_torch import expand_rows, naive_norm, wide
from properties import property_test, st

from prfl_fast.kernels import gated_residual, norm_modulate, residual_norm_modulate
from prfl_fast.kernels.common.split_row import split_token
from prfl_fast.kernels.norm import residual_modulate as module
from prfl_fast.kernels.norm.modulate import KINDS
from prfl_fast.kernels.runtime.registry import get_backend
from prfl_fast.kernels.runtime.triton import INTERPRETING


def rounded(value, dtype):
    """Return ``value.to(dtype)``, truncated as in the interpreter: gradients see x_out as it is."""
    if dtype == BF16 and INTERPRETING and get_backend() == "triton":
        cut = (value.detach().view(torch.int32) & -65536).view(FP32)
        value = value + (cut - value).detach()
    return value.to(dtype)


def naive(
    x, y, gate=None, weight=None, bias=None, gate_table=None, scale=None, shift=None,
    scale_table=None, shift_table=None, row_index=None, kind="layer", eps=1e-6,
):  # fmt: skip
    vector = expand_rows(gate, gate_table, x, row_index)
    x_out = rounded(wide(x) + (wide(y) if vector is None else wide(y) * vector), x.dtype)
    h = naive_norm(x_out, weight, bias, kind, eps)
    scale = expand_rows(scale, scale_table, x, row_index)
    shift = expand_rows(shift, shift_table, x, row_index)
    h = h if scale is None else h * (1 + scale)
    return x_out, (h if shift is None else h + shift).to(x.dtype)


def make(shape, dtype=FP32, y_dtype=None, small=FP32, **parts):
    """Return x, y and the ``parts``: a number of rows for gate, scale, shift; True for vectors."""
    tensors = {"x": torch.randn(shape) + 0.5, "y": torch.randn(shape).to(y_dtype or dtype)}
    tensors["x"] = tensors["x"].to(dtype)
    for name, value in parts.items():
        part = 0.5 * torch.randn(shape[-1] if value is True else (value, shape[-1]))
        tensors[name] = (part + (name == "weight")).to(small)
    return tensors


AFFINE = {"weight": True, "bias": True}
TABLES = {"gate_table": True, "scale_table": True, "shift_table": True}
# The joints of a Wan block: after the self-attention, and after the cross-attention.
FIRST = {"gate": 2, "gate_table": True} | AFFINE
SECOND = {"scale": 2, "shift": 2, "scale_table": True, "shift_table": True}
ALL = {"gate": 2, "scale": 2, "shift": 2} | AFFINE | TABLES
PARTS = [
    {}, AFFINE, {"gate": 2}, {"gate_table": True, "weight": True}, FIRST, SECOND, ALL,
    {"gate": 2, "scale": 2}, {"gate": 2, "shift": 2, "bias": True},
    {"scale_table": True, "shift_table": True, "weight": True},
]  # fmt: skip
INDEXED = ALL | {"gate": 3, "scale": 3, "shift": 3}


class TestResidualNormModulate(OperationTests):
    op = "residual_norm_modulate"
    function, naive, reference = residual_norm_modulate, naive, module.reference
    flags = {  # of d_x, d_y, d_gate, A, B
        "x": "+----", "y": "-+---", "gate": "--+--", "gate_table": "--+--", "weight": "---+-",
        "bias": "----+", "scale": "---++", "scale_table": "---++", "shift_table": "----+",
    }  # fmt: skip

    def examples(self, dtype):
        small = FP64 if dtype == FP64 else FP32
        yield make((2, 2, 8), dtype, None, small, **ALL), {}
        row_index = torch.tensor([[2, 0], [2, 1]])
        yield make((2, 2, 8), dtype, None, small, **INDEXED), {"row_index": row_index}
        yield make((2, 2, 8), dtype, None, small, **ALL), {"kind": "rms", "eps": 1e-2}

    def layouts(self, dtype):
        yield make((2, 2, 48), dtype, **ALL), {}
        yield make((4, 48), **ALL), {}
        row_index = torch.randint(0, 3, (2, 3))
        yield make((2, 3, 48), gate=3, scale=3, shift=3), {"row_index": row_index}

    at_length = staticmethod(lambda length: make((2, length, 16), gate=2, scale=2))
    good = staticmethod(lambda: make((2, 6, 8), gate=2, scale=2))
    far = staticmethod(lambda shape: (make(shape, FP16, gate=1), {}))

    bad_arguments = [
        *cases.BAD_RESIDUALS,
        ({"shift": torch.ones(3, 8)}, "shift is .*R the same for scale and shift"),
        ({"scale": [1.0]}, r"scale is \[1.0\]"),
        ({"weight": torch.ones(4)}, r"weight is float32\[4\].*\[8\]"),
        ({"kind": "batch"}, "kind is 'batch'"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"gate": None, "scale": None, "row_index": torch.zeros(2, 6).long()}, "row_index is"),
    ]


compare = TestResidualNormModulate.compare


@pytest.mark.cases(4)
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_with_any_arguments(backend, kind, parts):
    compare(make((2, 2, 33), **parts), kind=kind)


@pytest.mark.parametrize("shape", cases.SHAPES)
def test_shapes(backend, shape, dtype):
    parts = {n: 1 if n in ("gate", "scale", "shift") else v for n, v in ALL.items()}
    compare(make(shape, dtype, **parts))


@pytest.mark.slow
def test_a_token_too_wide_for_one_pass(backend):
    """Run the backward in three passes past 12 elements a thread."""
    compare(make((2, 8000), **ALL))
    compare(make((2, 8000), **AFFINE))


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "gate, rows", [(1, 2), (2, 1), (6, 12), (12, 6), (4, 6), (3, 4), (1, 12), (12, 1), (12, 12)]
)
def test_numbers_of_rows(backend, gate, rows):
    """Count rows by sample, frame or token, the gate's other than the norm's."""
    compare(make((2, 6, 40), gate=gate, scale=rows, shift=rows, gate_table=True))


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "shape, dtype, parts",
    [
        ((2, 4, 40), torch.int64, {"gate": 5, "scale": 5, "shift": 5} | AFFINE),
        ((8, 40), torch.int32, {"gate": 12, "scale_table": True}),
        ((8, 40), torch.int32, {"gate_table": True, "scale": 5}),
        ((8, 40), torch.int64, {"gate": 5, "scale": 7} | TABLES),
        ((8, 40), torch.int64, {"gate": 7, "shift": 5}),
        ((2, 2, 40), torch.int32, {"gate": 1, "scale": 1}),
    ],
)
def test_row_index(backend, shape, dtype, parts):
    """Name rows in any order, some without a token, some that only one tensor has."""
    rows = min(n for n in parts.values() if n is not True)
    row_index = torch.randint(0, rows, shape[:-1]).to(dtype)
    compare(make(shape, **parts), row_index=row_index)


@pytest.mark.cases(4)
@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32, FP32), (FP32, BF16, FP32), (FP16, FP32, BF16), (BF16, BF16, BF16)]
)
def test_mixed_dtypes(backend, dtypes):
    for parts in (ALL, {}):
        compare(make((2, 3, 72), *dtypes, **parts))


def test_h_is_the_norm_of_the_rounded_sum(backend):
    tensors = make((2, 3, 64), BF16, gate=2, scale=2, shift=2)
    x_out, h = residual_norm_modulate(**tensors)
    gate = tensors.pop("gate")
    assert torch.equal(x_out, gated_residual(tensors["x"], tensors["y"], gate))
    norm = norm_modulate(x_out, scale=tensors["scale"], shift=tensors["shift"])
    torch.testing.assert_close(h, norm, rtol=2**-7, atol=1e-6)  # one ulp: the sums' order differs


def test_large_offset_does_not_cancel(backend):
    """Take the variance of centered values: a mean of 1000 leaves it exact to float32."""
    tensors = make((2, 256), gate=2, scale=2)
    tensors["x"] += 1000
    compare(tensors)


def one_gradient(used, shape):
    """Return the gradients of both outputs, one of them None."""
    return [torch.randn(shape) if i == used else None for i in range(2)]


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("parts", [AFFINE, ALL, {}], ids=["affine", "all", "none"])
def test_an_unused_output(backend, parts, used):
    compare(make((2, 2, 24), BF16, **parts), grads=one_gradient(used, (2, 2, 24)))


@pytest.mark.slow
@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_with_a_row_index(backend, used):
    fixed = {"row_index": torch.randint(0, 3, (2, 3))}
    for parts in ({"gate_table": True, "scale": 3}, {"gate": 3, "scale_table": True}):
        compare(make((2, 3, 24), **parts), grads=one_gradient(used, (2, 3, 24)), **fixed)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_slices_of_packed_tensors(backend, rows):
    """Take x and y from one projection, every other token; rows of Wan's six vectors."""

    def slices(xy, modulation, table):
        given = cases.unpack_residuals(xy)
        for i, name in enumerate(("gate", "scale", "shift"), start=2):
            given |= {name: modulation[:, i], f"{name}_table": table[i]}
        return given

    compare(cases.packed_residuals(rows, 24), of=slices)


def test_outputs_of_transposed_tokens_are_contiguous(backend):
    x = torch.randn(3, 2, 16).transpose(0, 1)
    assert all(output.is_contiguous() for output in residual_norm_modulate(x, x))


def test_the_gradient_of_y_is_that_of_x_without_a_gate(backend):
    for y_dtype, flags in ((BF16, (True, False)), (FP32, (True, True))):
        with RecordedCalls() as recorded:
            run(residual_norm_modulate, make((2, 2, 16), BF16, y_dtype), [torch.ones(2, 2, 16)] * 2)
        ((*_, need_x, need_y, _, _, _),) = recorded.of("residual_norm_modulate_backward")
        assert (need_x, need_y) == flags


def test_saved_bytes():
    shape, tokens, row = (1, 256, 128), 256 * 128 * 2, 128 * 4
    assert saved_by(residual_norm_modulate, make(shape, BF16)) == tokens
    tensors = make(shape, BF16, gate=1, scale=1, shift=1)
    assert saved_by(residual_norm_modulate, tensors) == 2 * tokens + 2 * row
    assert saved_by(naive, tensors) > 4 * tokens
    del tensors["shift"]
    assert saved_by(residual_norm_modulate, tensors, frozen=["gate"]) == tokens + 2 * row


@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 4352, 5000, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in cases.LAUNCHED:
        forward = [
            (size, module.forward_launch(tokens, dim, size, capability, *flags))
            for size, *flags in itertools.product((2, 4), (False, True), (False, True))
        ]
        backward = [
            module.backward_launch(tokens, rows, dim, size, capability, sums)
            for size, sums in itertools.product((2, 4), (False, True))
        ]
        for launch in (*(launch for _, launch in forward), *backward):
            threads, elements = 32 * launch.num_warps, launch.head + launch.tail
            assert dim <= elements and threads <= min(launch.head, launch.tail)
            assert threads <= 512 and launch.registers <= min(255, 65536 // threads)
            # What keeps registers from spilling.
            assert elements <= (20 if launch in backward else 40) * threads
        for size, launch in forward:
            share = -(-tokens // launch.programs)
            assert launch.programs <= tokens and share <= launch.trips in (1, 2, 4, 8)
            # The tokens copied ahead fit the shared memory of the smallest GPU, or of Hopper.
            copied = (launch.stages - 1) * 2 * (launch.head + launch.tail) * size
            assert copied <= (227 if capability[0] in (9, 10) else 99) * 1024
            assert launch.stages == 3 or dim == 8192
        for launch in backward:
            assert 1 <= launch.programs <= max(1, tokens // rows)
            names = list(itertools.chain(*launch.passes))
            assert sorted(names) == ["dot", "dx", "dy", "gate_sum", "total"]
    cases.assert_few_partial_rows(module.backward_launch, 1, dim, 2, capability, True)


def test_pieces_hold_little_more_than_the_token():
    assert split_token(5120) == (4096, 1024, 16)
    assert split_token(3072) == (2048, 1024, 8)
    assert split_token(1536) == (1024, 512, 4)
    assert split_token(8192) == (4096, 4096, 16)
    assert split_token(1) == (32, 32, 1)


@property_test()
def test_any_arguments(draw):
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    parts = draw(st.sampled_from(PARTS))
    has_rows = bool(parts.keys() & {"gate", "scale", "shift"})
    shape, (gate, rows), fixed = cases.draw_tokens(draw, dim, has_rows, count=2)
    counts = {n: gate if n == "gate" else rows for n in parts if parts[n] is not True}
    tensors = make(shape, *(draw(st.sampled_from(FLOATS)) for _ in range(3)), **parts | counts)
    tensors = cases.strided(tensors) if draw(st.booleans()) else tensors
    kind, eps = draw(st.sampled_from(KINDS)), draw(st.sampled_from([1e-6, 1e-3]))
    # x_out is rounded to x's dtype, and h and all gradients follow.
    compare(tensors, intermediate=tensors["x"].dtype, kind=kind, eps=eps, **fixed)
