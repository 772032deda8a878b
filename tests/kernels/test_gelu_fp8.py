"""gelu_fp8: reference and Triton against float64, and against each other to the e4m3 step."""

import importlib

import e4m3
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import prfl_fast.kernels as kernels
from prfl_fast.kernels import gelu_fp8
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.gelu_fp8")
HALF, BRAIN = torch.float16, torch.bfloat16
# The interpreter's numpy tells of exp(+∞) and of NaN, which are meant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def make(shape, dtype=torch.float32, bias=None):
    """x of ``shape``, and a bias of dtype ``bias`` unless that is None."""
    x = (torch.randn(shape) * 2).to(dtype)
    return x, None if bias is None else torch.randn(shape[-1]).to(bias)


def check(x, bias):
    """Within half a step of float64, and one step at most from the reference."""
    pair = gelu_fp8(x, bias)
    h = x.double() if bias is None else x.double() + bias.double()
    e4m3.assert_quantises(pair, F.gelu(h, approximate="tanh"))
    e4m3.assert_one_step(pair, module.reference(x, bias))


@pytest.mark.parametrize("bias", [None, torch.float32, BRAIN])
@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
@pytest.mark.parametrize(
    "shape", [(1, 1, 7), (1, 64), (3, 65), (2, 5, 96), (2, 8960), (1, 2, 13824), (2, 0, 64)]
)
def test_shapes(backend, shape, dtype, bias):
    check(*make(shape, dtype, bias))


def test_float64_is_computed_in_float64(backend):
    x, bias = make((3, 40), torch.float64, torch.float64)
    for left, right in zip(gelu_fp8(x, bias), module.reference(x, bias), strict=True):
        assert torch.equal(left.float(), right.float())
    check(x, bias)


def test_y_is_not_rounded_to_the_dtype_of_x(backend):
    """In bfloat16, 256 + 1 is 256; FP8 tells 240 from 256 only, but the scale has 24 bits."""
    x, bias = torch.full((1, 64), 256.0).to(BRAIN), torch.ones(64)
    assert gelu_fp8(x, bias)[1].item() == torch.tensor(257.0).div(torch.tensor(448.0)).item()


def test_extreme_values(backend):
    """Far negative numbers give zero, not 0·∞; the largest give themselves."""
    x = torch.tensor([[-3e38, -1e10, -50.0, -1e-30, 0.0, 1.0], [-1e4, 0.0, 1e-30, 3.0, 50.0, 1e4]])
    x = torch.cat([x, torch.tensor([[0.0, -1.0, 1e8, 1e20, -1e20, 3e38]])])
    q, scale = gelu_fp8(x)
    assert q.float().isfinite().all() and scale.isfinite().all()
    e4m3.assert_quantises((q, scale), F.gelu(x.double(), approximate="tanh"))


def test_zeros_and_nan(backend):
    x = torch.zeros(2, 40)
    x[1, 3] = float("nan")
    q, scale = gelu_fp8(x)
    assert (q[0].float() == 0).all() and 0 < scale[0] < 1e-30
    assert q[1].float().isnan().all() and scale[1].isnan()


def test_strided_inputs(backend):
    packed, bias = make((2, 6, 120), BRAIN, torch.float32)
    for x in (packed[..., 40:80], packed[:, ::2, :40], packed.transpose(0, 1)[..., :40]):
        check(x, bias[:40])
        check(x, bias[::3])


def test_same_bits_twice_and_inputs_stay(backend):
    x, bias = make((2, 3, 48), BRAIN, BRAIN)
    before = x.clone(), bias.clone()
    first, second = gelu_fp8(x, bias), gelu_fp8(x, bias)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(first, second, strict=True))
    assert torch.equal(x, before[0]) and torch.equal(bias, before[1])


def test_gradients_are_refused():
    x, bias = make((2, 8), torch.float32, torch.float32)
    for name, tensor in (("x", x), ("bias", bias)):
        tensor.requires_grad_()
        with pytest.raises(ValueError, match=rf"gelu_fp8: {name} is .*torch\.no_grad\(\)"):
            gelu_fp8(x, bias)
        with torch.no_grad():
            assert not gelu_fp8(x, bias)[1].requires_grad
        tensor.requires_grad_(False)


def test_opcheck(backend):
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    for bias in (None, torch.float32):
        torch.library.opcheck(module._op, make((2, 3, 40), BRAIN, bias), test_utils=tests)


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(gelu_fp8, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            x, bias = make((2, length, 16), BRAIN, torch.float32)
            for left, right in zip(compiled(x, bias), gelu_fp8(x, bias), strict=True):
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
    for left, right in zip(gelu_fp8(x), gelu_fp8(x.clone()), strict=True):
        assert torch.equal(left.float(), right.float())


X = torch.zeros(2, 3, 8)
BAD = {
    "x is int64": (X.long(), None),
    "x has one axis": (X[0, 0], None),
    "x has four axes": (X[None], None),
    "x has D = 0": (X[..., :0], None),
    "x is transposed": (torch.zeros(2, 8, 6).transpose(1, 2), None),
    "bias is a list": (X, [1.0]),
    "bias is int": (X, torch.ones(8, dtype=torch.int32)),
    "bias is [1, D]": (X, torch.ones(1, 8)),
    "bias has another D": (X, torch.ones(7)),
    "bias is elsewhere": (X, torch.ones(8, device="meta")),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    with pytest.raises(ValueError, match=rf"gelu_fp8: {case.split()[0]} is "):
        gelu_fp8(*BAD[case])


@st.composite
def arguments(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dim, step = draw(st.integers(1, 200)), draw(st.integers(1, 2))
    dtypes = st.sampled_from([torch.float32, BRAIN, HALF])
    dtype, bias = draw(dtypes), draw(st.none() | dtypes)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    size = (*shape[:-1], shape[-1] * step, dim + draw(st.integers(0, 9)))
    x = torch.randn(size) * 10.0 ** draw(st.integers(-3, 2))
    # PyTorch's 1 + tanh cancels far below zero, which shows in a token that has nothing else.
    x[..., 0] = x.abs().amax(-1)
    if bias is not None:
        bias = torch.randn(dim).to(bias)
        bias[0] = bias[0].abs()
    return x.to(dtype)[..., ::step, :dim], bias


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    check(*case)
