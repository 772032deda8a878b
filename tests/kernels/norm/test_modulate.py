"""norm_modulate: reference and Triton against plain PyTorch, every argument, every gradient."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from dtypes import BF16, FLOATS, FP8, FP16, FP32, FP64
from e4m3 import assert_one_step, assert_quantizes
from op_checks import assert_same_bits, check, run, saved_by, slack
from op_tests import OperationTests, QuantizingTests
from plain_torch import expand_rows, naive_norm, wide
from properties import property_test, st
from token_cases import LAUNCHED, ROW_INDICES, SHAPES, assert_few_partial_rows, draw_tokens

from prfl_fast.kernels import norm_modulate, quantize_fp8
from prfl_fast.kernels.common.modulation_rows import token_strides
from prfl_fast.kernels.norm import modulate as module

AFFINE = ((), ("weight",), ("bias",), ("weight", "bias"))
MODULATION = (
    (), ("scale",), ("shift",), ("scale", "shift"), ("scale_table", "shift_table"),
    ("scale", "shift_table"), ("scale", "shift", "scale_table", "shift_table"),
)  # fmt: skip
ALL = AFFINE[-1] + MODULATION[-1]


def naive(
    x, weight=None, bias=None, kind="layer", row_index=None, eps=1e-6,
    scale=None, shift=None, scale_table=None, shift_table=None,
):  # fmt: skip
    y = naive_norm(x, weight, bias, kind, eps)
    scale = expand_rows(scale, scale_table, x, row_index)
    shift = expand_rows(shift, shift_table, x, row_index)
    y = y if scale is None else y * (1 + scale)
    return (y if shift is None else y + shift).to(x.dtype)


def make(shape, names=MODULATION[-1], rows=1, dtype=FP32, small=None):
    """Return x of ``shape`` and the named tensors of dtype ``small``, x's unless given."""
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    for name in names:
        size = (rows, shape[-1]) if name in ("scale", "shift") else shape[-1:]
        tensors[name] = (torch.randn(size) * 0.5).to(small or dtype)
    return tensors


X, ROW, ROWS = torch.zeros(2, 6, 8), torch.ones(8), torch.ones(2, 8)
INDEX = torch.zeros(2, 6).long()


class TestNormModulate(OperationTests):
    op = "norm_modulate"
    function, naive, reference = norm_modulate, naive, module.reference
    flags = {  # the bias is scaled too
        "x": "+--", "weight": "-+-", "bias": "--+", "scale": "-++", "shift": "--+",
        "scale_table": "-++", "shift_table": "--+",
    }  # fmt: skip

    def examples(self, dtype):
        yield make((2, 2, 8), ALL, 2, dtype), {}
        yield make((2, 2, 8), ALL, 3, dtype), {"row_index": torch.tensor([[2, 0], [2, 1]])}
        yield make((2, 2, 8), ALL, 2, dtype), {"kind": "rms"}

    def layouts(self, dtype):
        yield make((2, 2, 48), ALL, 2, dtype), {}
        yield make((4, 48), ALL, 2, FP32), {}
        yield make((2, 3, 48), rows=3), {"row_index": torch.randint(0, 3, (2, 3))}

    at_length = staticmethod(lambda length: make((2, length, 16), ("scale",), 2))
    good = staticmethod(lambda: {"x": X})
    far = staticmethod(lambda shape: (make(shape, ("scale", "weight"), dtype=FP16), {}))

    bad_arguments = [
        (dict(x=X[0, 0]), r"x is float32\[8\]"),
        (dict(x=X[None]), r"x is float32\[1, 2, 6, 8\]"),
        (dict(x=X[..., :0]), r"x is float32\[2, 6, 0\]"),
        (dict(x=X.view(2, 8, 6).transpose(1, 2)), r"x is .*contiguous"),
        (dict(x=[1.0]), r"x is \[1.0\]"),
        (dict(weight=torch.ones(7)), r"weight is float32\[7\].*\[8\]"),
        (dict(bias=torch.ones(1, 8)), r"bias is float32\[1, 8\].*\[8\]"),
        (dict(shift_table=ROWS), r"shift_table is float32\[2, 8\].*\[8\]"),
        (dict(scale=ROW), r"scale is float32\[8\]"),
        (dict(scale=[1.0]), r"scale is \[1.0\]"),
        (dict(shift=torch.tensor(1.0)), r"shift is float32\[\]"),
        (dict(scale=ROWS, shift=[1.0]), r"shift is \[1.0\]"),
        (dict(scale=torch.ones(2, 9)), r"scale is float32\[2, 9\]"),
        (dict(scale=torch.ones(8, 2).t()), "scale is .*contiguous"),
        (dict(scale=torch.ones(0, 8)), r"scale is float32\[0, 8\]"),
        (dict(scale=torch.ones(5, 8)), r"scale is float32\[5, 8\].*12 tokens"),
        (dict(scale=ROWS, shift=torch.ones(4, 8)), r"shift is float32\[4, 8\]"),
        (dict(scale=ROWS, row_index=INDEX.float()), "row_index is float32"),
        (dict(scale=ROWS, row_index=INDEX.flatten()), r"row_index is int64\[12\]"),
        (dict(row_index=INDEX), "row_index is .*None without"),
        (dict(scale=ROWS, row_index=INDEX + 2), r"row_index is .*\[0, 2\)"),
        (dict(shift=ROWS, row_index=INDEX - 1), r"row_index is .*\[0, 2\)"),
        (dict(kind="batch"), "kind is 'batch'"),
        (dict(eps=-1.0), "eps is -1.0"),
    ]


class TestNormModulateFp8(QuantizingTests):
    op, name = "norm_modulate_fp8", "norm_modulate"
    function = functools.partial(norm_modulate, out_dtype=FP8)
    naive, reference = naive, module.reference_fp8
    good, at_length = staticmethod(TestNormModulate.good), staticmethod(TestNormModulate.at_length)
    bad_arguments = [
        *TestNormModulate.bad_arguments,
        (dict(out_dtype=FP16), "out_dtype is torch.float16"),
    ]

    def examples(self, dtype):
        for tensors, fixed in TestNormModulate().examples(dtype):
            yield tensors | fixed

    def test_without_a_norm_the_bits_are_those_of_quantize_fp8(self, backend):
        """Compute the same number before rounding, so that q and scale are the same."""
        x = torch.randn(2, 3, 96).to(BF16)
        wanted = quantize_fp8(x)
        for call in (self.function, self.call_reference):
            assert_same_bits(call(x=x, kind="none"), wanted)

    def test_the_numbers_of_norm_modulate(self, backend):
        """Round the float32 numbers of the 16-bit operation."""
        tensors = make((2, 3, 96), ALL, 2)
        assert_one_step(self.function(**tensors), quantize_fp8(norm_modulate(**tensors)))

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
    def test_zeros_and_nan(self, backend):
        """Give zeros for a constant token, which has no variance; a NaN stays in its token."""
        x = torch.ones(3, 40)
        x[1, 3] = float("nan")
        x[2] = torch.randn(40)
        q, scale = self.function(x)
        assert (q[0].float() == 0).all() and 0 < scale[0] < 1e-30
        assert q[1].float().isnan().all() and scale[1].isnan()
        assert_quantizes((q[2:], scale[2:]), naive(x[2:].double()))

    @pytest.mark.parametrize("rows", [1, 2, 8])
    def test_strided_tokens_and_rows(self, backend, rows):
        packed, modulation = torch.randn(2, 8, 3, 40), torch.randn(rows, 6, 40)
        shift, scale, *_ = modulation.unbind(1)
        for x in (packed[:, ::2, 1], packed[:, :4, 2], packed[:, :4, 0].transpose(0, 1)):
            self.check(x=x, scale=scale, shift=shift)


compare = TestNormModulate.compare


# Both outputs.
@pytest.fixture(params=[False, True], ids=["", "fp8"])
def compare_either(request):
    """Return what compares the output in x's dtype and all gradients, or the FP8 output."""
    if not request.param:
        return compare
    return lambda tensors, rounding=None, **fixed: TestNormModulateFp8().check(**tensors, **fixed)


COMBINATIONS = [
    *itertools.product(AFFINE, MODULATION, ["layer"]),
    *itertools.product(AFFINE[::3], MODULATION[::3], ["rms", "none"]),
]


@pytest.mark.parametrize("affine, modulation, kind", COMBINATIONS, ids="".join)
def test_every_combination_of_arguments(backend, affine, modulation, kind, compare_either):
    length = 1 if backend == "triton" else 3  # a token takes the interpreter 20 ms
    compare_either(make((2, length, 33), affine + modulation, rows=2), kind=kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, dtype, compare_either):
    compare_either(make(shape, dtype=dtype), slack(backend, dtype, fp32=4.0))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_rows_are_frames_samples_or_tokens(backend, rows, compare_either):
    compare_either(make((2, 3, 40), rows=rows))
    compare_either(make((6, 40), ("weight", "scale"), rows=rows), kind="rms")


@pytest.mark.parametrize("shape, rows, index", ROW_INDICES)
def test_row_index(backend, shape, rows, index, compare_either):
    """Name rows in any order, some without a token."""
    row_index = torch.randint(0, rows, shape[:-1]).to(index)
    for names in (ALL, ("shift",)):
        compare_either(make(shape, names, rows), row_index=row_index)


@pytest.mark.parametrize("dtype, small", [(BF16, FP32), (FP16, BF16), (FP32, BF16)])
def test_mixed_dtypes(backend, dtype, small, compare_either):
    """Return each result in its tensor's dtype, as in a bfloat16 model with float32 norms."""
    compare_either(make((2, 4, 72), ALL, 2, dtype, small))


@pytest.mark.parametrize("name", ["scale_table", "shift_table"])
def test_a_float64_table_beside_float32_rows(backend, name):
    """Compute in float32, as x is."""
    tensors, grads = make((2, 3, 8), ALL, 2), [torch.randn(2, 3, 8)]
    out, found = run(norm_modulate, tensors | {name: tensors[name].double()}, grads)
    expected, gradients = run(norm_modulate, tensors, grads)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(found, gradients | {name: gradients[name].double()})


def test_large_offset_does_not_cancel(backend):
    """Take the variance of centered values: a mean of 1000 leaves it exact to float32."""
    tensors = make((4, 256), ("scale", "shift"))
    tensors["x"] += 1000
    compare(tensors)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_strided_tokens_and_rows(backend, rows):
    """Take every other token of a slice of a packed projection, and rows sliced from [R, 6, D]."""

    def slices(x, modulation):
        shift, scale, *_ = modulation.unbind(1)
        part = x.unflatten(-1, (3, -1))[:, ::2, 1]
        assert not part.is_contiguous() and (rows == 1 or not scale.is_contiguous())
        return {"x": part, "scale": scale, "shift": shift}

    tensors = {"x": torch.randn(2, 8, 3 * 40), "modulation": torch.randn(rows, 6, 40)}
    compare(tensors, of=slices)


def test_the_output_is_new_and_contiguous(backend):
    transposed = torch.randn(3, 2, 16).transpose(0, 1)
    for kind in ("layer", "rms", "none"):
        y = norm_modulate(transposed, kind=kind)
        assert y.is_contiguous() and y.data_ptr() != transposed.data_ptr()
        assert norm_modulate(y, kind=kind).data_ptr() != y.data_ptr()


def test_only_the_inputs_are_saved():
    tensors = make((2, 8, 64), ("scale", "shift"), 2, BF16, FP32)
    saved = saved_by(norm_modulate, tensors)
    assert saved == tensors["x"].nbytes + tensors["scale"].nbytes  # the shift is not needed again


def test_the_expression_of_diffusers():
    """(norm(x.float()) * (1 + scale) + shift).type_as(x), in a bfloat16 Wan block's layout."""
    normalization = pytest.importorskip("diffusers.models.normalization")

    def block(x, table, time):
        norm = normalization.FP32LayerNorm(x.shape[-1], 1e-6, elementwise_affine=False)
        if x.dtype == FP64:
            norm.forward = lambda t: F.layer_norm(t, t.shape[-1:], eps=1e-6)
        shift, scale, *_ = (table + wide(time)).chunk(6, dim=1)
        return (norm(wide(x)) * (1 + scale) + shift).type_as(x)

    def ours(x, table, time):
        tables = {"shift_table": table[0, 0], "scale_table": table[0, 1]}
        return norm_modulate(x, shift=time[:, 0], scale=time[:, 1], **tables)

    tensors = {n: torch.randn(2, size, 64).bfloat16() for n, size in (("x", 10), ("time", 6))}
    check(ours, block, tensors | {"table": torch.randn(1, 6, 64)})


@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in LAUNCHED:
        forward, bare = (
            module.forward_launch(tokens, dim, kind, capability) for kind in ("layer", "none")
        )
        backward = [
            module.backward_launch(tokens, rows, dim, itemsize, capability, sums)
            for itemsize, sums in itertools.product((2, 4), (False, True))
        ]
        for launch in (forward, bare, *backward):
            threads, elements = 32 * launch.num_warps, launch.head + launch.tail
            assert dim <= elements < max(2 * dim, 65)
            assert launch.num_warps in (1, 2, 4, 8, 16)
            assert min(launch.head, launch.tail) >= threads  # a piece is at least one each
            # What keeps registers from spilling.
            assert elements <= (40 if launch in (forward, bare) else 20) * threads
            assert 1 <= launch.programs <= max(1, tokens)
        share = -(-tokens // forward.programs)
        assert share <= forward.trips in (1, 2, 4, 8, 16) and forward.trips < 2 * max(1, share)
        assert all(launch.programs <= max(1, tokens // rows) for launch in backward)
        # With sums, 20 elements a thread spill in float32, and from sm_100 on.
        narrow = backward[1::2] if capability >= (10, 0) else backward[3:]
        assert all(launch.head + launch.tail <= 512 * launch.num_warps for launch in narrow)
    assert_few_partial_rows(module.backward_launch, 1, dim, 2, capability, True)
    # Three programs a processor of the forward at Wan's largest D, two where 168 registers spill.
    wide_launch = module.forward_launch(32760, 5120, "rms", capability)
    registers = 255 if capability >= (10, 0) else 168
    assert (wide_launch.num_warps, wide_launch.registers) == (4, registers)


@pytest.mark.cases(1)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_programs_of_several_tokens_write_only_those_that_exist(monkeypatch, indexed, quantized):
    monkeypatch.setattr(module, "capability", lambda device: (8, 0, 1))
    assert module.forward_launch(13, 64, "layer", (8, 0, 1)).trips == 4  # 4, 4, 4 and 1 tokens
    x, scale = torch.randn(13, 64), torch.randn(3, 64)
    index = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 1, 1, 0, 2, 1])
    given = (None, None, scale, None, None, None, index, "layer", 1e-6)
    if not indexed:
        given = (None, None, scale[:1], None, None, None, None, "layer", 1e-6)
    if quantized:
        y, factors = torch.full((16, 64), 7, dtype=torch.uint8), torch.full((16, 1), 7.0)
        module._run_forward(y[:13], factors[:13], x, *given)
        expected, expected_factors = module.reference_fp8(x, *given)
        torch.testing.assert_close(factors[:13], expected_factors)
        found = y[:13].view(torch.float8_e4m3fn).float()
        torch.testing.assert_close(found, expected.float(), rtol=0.13, atol=0.01)
        assert (factors[13:] == 7).all()
    else:
        y = torch.full((16, 64), 7.0)
        module._run_forward(y[:13], None, x, *given)
        torch.testing.assert_close(y[:13], module.reference(x, *given))
    assert (y[13:] == 7).all()


def test_token_strides_spare_the_division():
    x = torch.randn(3, 4, 5)
    assert token_strides(x[0]) == (0, 5, None)
    assert token_strides(x) == (20, 5, None)
    assert token_strides(x[:1, ::2]) == (20, 10, None)
    assert token_strides(x[:, ::2]) == (20, 10, None)
    assert token_strides(x[:, :3]) == (20, 5, 3)
    assert token_strides(x.transpose(0, 1)) == (5, 20, 3)


def draw_arguments(draw):
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    affine, modulation = draw(st.sampled_from(AFFINE)), draw(st.sampled_from(MODULATION))
    has_rows = bool({"scale", "shift"} & {*modulation})
    shape, (rows,), fixed = draw_tokens(draw, dim, has_rows)
    dtype, small = (draw(st.sampled_from(FLOATS)) for _ in range(2))
    kind, eps = draw(st.sampled_from(module.KINDS)), draw(st.sampled_from([1e-6, 1e-3]))
    tensors = make(shape, affine + modulation, rows, dtype, small)
    return tensors, fixed | {"kind": kind, "eps": eps}


@property_test()
def test_any_arguments(draw):
    tensors, fixed = draw_arguments(draw)
    compare(tensors, **fixed)


@property_test()
def test_any_arguments_in_fp8(draw):
    tensors, fixed = draw_arguments(draw)
    step, more = draw(st.integers(1, 2)), draw(st.integers(0, 9))
    *lead, length, dim = tensors["x"].shape
    packed = (torch.randn(*lead, length * step, dim + more) * 2 + 1).to(tensors["x"].dtype)
    tensors["x"] = packed[..., ::step, :dim]
    TestNormModulateFp8().check(**tensors, **fixed)
