"""norm_modulate_fp8: reference and Triton against float64, and each other to the e4m3 step."""

import importlib
import itertools

import e4m3
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import prfl_fast.kernels as kernels
from prfl_fast.kernels import norm_modulate, norm_modulate_fp8
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.norm_modulate_fp8")
HALF, BRAIN = torch.float16, torch.bfloat16
AFFINE = ((), ("weight",), ("bias",), ("weight", "bias"))
MODULATION = (
    (),
    ("scale",),
    ("shift",),
    ("scale", "shift"),
    ("scale_table", "shift_table"),
    ("scale", "shift_table"),
    ("scale", "shift", "scale_table", "shift_table"),
)


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def oracle(x, weight=None, bias=None, kind="layer", row_index=None, eps=1e-6, **modulation):
    """y in float64, the rows expanded to tokens."""
    y, dim = x.double(), x.shape[-1:]
    if kind == "layer":
        y = F.layer_norm(y, dim, eps=eps)
    elif kind == "rms":
        y = F.rms_norm(y, dim, eps=eps)
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    total = {"scale": 0.0, "shift": 0.0}
    for name, value in modulation.items():
        rows = value.double()
        if not name.endswith("table"):
            tokens = x.numel() // x.shape[-1]
            index = torch.arange(tokens, device=x.device) // max(1, tokens // len(rows))
            index = index if row_index is None else row_index.reshape(-1)
            rows = rows[index].reshape(x.shape)
        total[name.removesuffix("_table")] = total[name.removesuffix("_table")] + rows
    return y * (1 + total["scale"]) + total["shift"]


def reference(x, kind="layer", eps=1e-6, **given):
    names = "weight bias scale shift scale_table shift_table row_index".split()
    return module.reference(x, *map(given.get, names), kind, eps)


def check(**arguments):
    """Within half a step of float64, and one step at most from the reference."""
    pair = norm_modulate_fp8(**arguments)
    e4m3.assert_quantises(pair, oracle(**arguments))
    e4m3.assert_one_step(pair, reference(**arguments))


def make(shape, names=MODULATION[-1], rows=1, dtype=torch.float32, small=None):
    """x of ``shape`` and the named tensors; ``small``: their dtype, x's unless given."""
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    for name in names:
        size = (rows, shape[-1]) if name in ("scale", "shift") else shape[-1:]
        tensors[name] = (torch.randn(size) * 0.5).to(small or dtype)
    return tensors


@pytest.mark.parametrize(
    "affine, modulation, kind",
    [
        *itertools.product(AFFINE, MODULATION, ["layer"]),
        *itertools.product(AFFINE[::3], MODULATION[::3], ["rms", "none"]),
    ],
    ids=lambda part: part if isinstance(part, str) else "+".join(part),
)
def test_every_combination_of_arguments(backend, affine, modulation, kind):
    check(kind=kind, **make((2, 1, 33), affine + modulation, rows=2))


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
@pytest.mark.parametrize(
    "shape", [(1, 1, 7), (1, 64), (3, 65), (1, 5, 96), (2, 3, 1536), (1, 2, 5120), (2, 0, 64)]
)
def test_shapes(backend, shape, dtype):
    check(**make(shape, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_rows_are_frames_samples_or_tokens(backend, rows):
    check(**make((2, 3, 40), rows=rows))
    check(kind="rms", **make((6, 40), ("weight", "scale"), rows=rows))


@pytest.mark.parametrize(
    "shape, rows, index",
    [((2, 4, 40), 5, torch.int64), ((8, 40), 12, torch.int32), ((2, 2, 40), 1, torch.int32)],
)
def test_row_index(backend, shape, rows, index):
    """Rows in any order, some without a token."""
    row_index = torch.randint(0, rows, shape[:-1]).to(index)
    for names in (AFFINE[-1] + MODULATION[-1], ("shift",)):
        check(row_index=row_index, **make(shape, names, rows))


@pytest.mark.parametrize(
    "dtype, small", [(BRAIN, torch.float32), (HALF, BRAIN), (torch.float32, BRAIN)]
)
def test_mixed_dtypes(backend, dtype, small):
    check(**make((2, 4, 72), AFFINE[-1] + MODULATION[-1], 2, dtype, small))


def test_float64_is_computed_in_float64(backend):
    tensors = make((2, 4, 24), AFFINE[-1] + MODULATION[-1], 2, torch.float64)
    check(**tensors)
    for left, right in zip(norm_modulate_fp8(**tensors), reference(**tensors), strict=True):
        assert torch.equal(left.float(), right.float())


def test_without_a_norm_the_bits_are_those_of_quantise_fp8(backend):
    """The number before rounding is the same, so q and scale are, whoever computes them."""
    x = torch.randn(2, 3, 96).to(BRAIN)
    wanted = kernels.quantise_fp8(x)
    for left, right in zip(norm_modulate_fp8(x, kind="none"), wanted, strict=True):
        assert torch.equal(left.float(), right.float())
    for left, right in zip(reference(x, kind="none"), wanted, strict=True):
        assert torch.equal(left.float(), right.float())


def test_the_numbers_of_norm_modulate(backend):
    """One operation is the other, quantised: both round the same float32 numbers."""
    tensors = make((2, 3, 96), AFFINE[-1] + MODULATION[-1], 2)
    wanted = kernels.quantise_fp8(norm_modulate(**tensors))
    e4m3.assert_one_step(norm_modulate_fp8(**tensors), wanted)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_zeros_and_nan(backend):
    """A constant token has no variance; a NaN stays in its token."""
    x = torch.ones(3, 40)
    x[1, 3] = float("nan")
    x[2] = torch.randn(40)
    q, scale = norm_modulate_fp8(x)
    assert (q[0].float() == 0).all() and 0 < scale[0] < 1e-30
    assert q[1].float().isnan().all() and scale[1].isnan()
    e4m3.assert_quantises((q[2:], scale[2:]), oracle(x[2:]))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_strided_tokens_and_rows(backend, rows):
    """A slice of a packed projection, every other token of it, and rows sliced from [R, 6, D]."""
    packed, modulation = torch.randn(2, 8, 3, 40), torch.randn(rows, 6, 40)
    shift, scale, *_ = modulation.unbind(1)
    for x in (packed[:, ::2, 1], packed[:, :4, 2], packed[:, :4, 0].transpose(0, 1)):
        check(x=x, scale=scale, shift=shift)


def test_same_bits_twice_and_inputs_stay(backend):
    tensors = make((2, 5, 48), AFFINE[-1] + MODULATION[-1], rows=2)
    before = {name: t.clone() for name, t in tensors.items()}
    first, second = norm_modulate_fp8(**tensors), norm_modulate_fp8(**tensors)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())


def test_gradients_are_refused():
    tensors = make((2, 3, 16), AFFINE[-1] + MODULATION[-1])
    for name, tensor in tensors.items():
        tensor.requires_grad_()
        match = rf"norm_modulate_fp8: {name} is .*torch\.no_grad\(\)"
        with pytest.raises(ValueError, match=match):
            norm_modulate_fp8(**tensors)
        with torch.no_grad():
            assert not norm_modulate_fp8(**tensors)[1].requires_grad
        tensor.requires_grad_(False)


def test_opcheck(backend):
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    x, row_index = torch.randn(2, 2, 16), torch.randint(0, 2, (2, 2))
    w, b, s, h = (torch.randn(n) for n in ((16,), (16,), (2, 16), (2, 16)))
    for index in (None, row_index):
        inputs = (x, w, b, s, h, w, b, index, "layer", 1e-6)
        torch.library.opcheck(module._op, inputs, test_utils=tests)


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(norm_modulate_fp8, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            x, scale = torch.randn(2, length, 16), torch.randn(2, 16)
            wanted = norm_modulate_fp8(x, scale=scale)
            for left, right in zip(compiled(x, scale=scale), wanted, strict=True):
                assert torch.equal(left.float(), right.float())


@pytest.mark.triton
def test_offsets_past_int32(triton_backend, tmp_path):
    """Token 2 at 2·2³⁰ elements: 32 bits would read the zeros at the start of this sparse file."""
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 8 GiB")
    stride, dim = 2**30, 64
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * 2**32)
    storage = torch.from_file(str(path), shared=True, size=2**32, dtype=HALF)
    x = storage.as_strided((3, dim), (stride, 1), 2**31 - dim)
    x.copy_(torch.randn(3, dim))
    for strided in (x, x[None].transpose(0, 1)):
        wanted = norm_modulate_fp8(strided.clone(memory_format=torch.contiguous_format))
        for left, right in zip(norm_modulate_fp8(strided), wanted, strict=True):
            assert torch.equal(left.float(), right.float())


X = torch.zeros(2, 6, 8)
BAD = {
    "x is int64": dict(x=X.long()),
    "x has four axes": dict(x=X[None]),
    "x is transposed": dict(x=torch.zeros(2, 8, 6).transpose(1, 2)),
    "weight has another D": dict(weight=torch.ones(7)),
    "scale_table is int": dict(scale_table=torch.ones(8, dtype=torch.int32)),
    "scale does not divide": dict(scale=torch.ones(5, 8)),
    "shift has other rows": dict(scale=torch.ones(2, 8), shift=torch.ones(4, 8)),
    "scale is elsewhere": dict(scale=torch.ones(2, 8, device="meta")),
    "row_index has no rows": dict(row_index=torch.zeros(2, 6, dtype=torch.int64)),
    "kind is batch": dict(kind="batch"),
    "eps is negative": dict(eps=-1.0),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    with pytest.raises(ValueError, match=rf"norm_modulate_fp8: {case.split()[0]} is "):
        norm_modulate_fp8(**({"x": X} | BAD[case]))


@st.composite
def arguments(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    dim, step = draw(st.integers(8, 130)), draw(st.integers(1, 2))
    tokens = batch * length
    affine, modulation = draw(st.sampled_from(AFFINE)), draw(st.sampled_from(MODULATION))
    flat, indexed = draw(st.booleans()), draw(st.booleans()) and {"scale", "shift"} & {*modulation}
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    rows = draw(st.integers(1, 9)) if indexed else draw(st.sampled_from(divisors))
    dtype, small = (draw(st.sampled_from([torch.float32, BRAIN, HALF])) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (tokens, dim) if flat else (batch, length, dim)
    tensors = make(shape, affine + modulation, rows, dtype, small)
    packed = torch.randn(*shape[:-2], shape[-2] * step, dim + draw(st.integers(0, 9))) * 2 + 1
    tensors["x"] = packed.to(dtype)[..., ::step, :dim]
    if indexed:
        tensors["row_index"] = torch.randint(0, rows, shape[:-1])
    kind, eps = draw(st.sampled_from(module.KINDS)), draw(st.sampled_from([1e-6, 1e-3]))
    return tensors | {"kind": kind, "eps": eps}


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    check(**case)
