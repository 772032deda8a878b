"""bias_gelu: reference and Triton against plain PyTorch, keeping the pre-activation only."""

import functools
import itertools

import pytest
import torch
from dtypes import BF16, FLOATS, FP8, FP16, FP32, FP64
from e4m3 import assert_quantizes
from op_checks import saved_by, slack
from op_tests import OperationTests, QuantizingTests
from plain_torch import spread, wide
from properties import property_test, st
from token_cases import draw_strided_rows
from torch.nn import functional as F

from prfl_fast.kernels import bias_gelu
from prfl_fast.kernels.common.strided_rows import gradient_rows, row_axes
from prfl_fast.kernels.linear import gelu as module

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")


def naive(x, bias=None):
    h = wide(x) if bias is None else wide(x) + wide(bias)
    return F.gelu(h, approximate="tanh").to(x.dtype)


def make(shape, dtype, bias_dtype=None):
    tensors = {"x": (2 * torch.randn(shape)).to(dtype)}
    if bias_dtype is not None:
        tensors["bias"] = torch.randn(shape[-1]).to(bias_dtype)
    return tensors


class TestBiasGelu(OperationTests):
    op = "bias_gelu"
    function, naive, reference = bias_gelu, naive, module.reference
    flags = {"x": "+-", "bias": "-+"}
    far_shapes = ((3, 64), (2, 3, 64))  # one and two axes of rows

    def examples(self, dtype):
        yield make((2, 3, 8), dtype, FP64 if dtype == FP64 else FP32), {}
        yield make((2, 3, 8), dtype), {}

    def layouts(self, dtype):
        yield make((3, 11, 24), dtype), {}
        yield make((3, 11, 24), dtype, FP32), {}

    at_length = staticmethod(lambda length: make((2, length, 16), FP32, FP32))
    good = staticmethod(lambda: {"x": torch.ones(2, 3)})
    far = staticmethod(lambda shape: (make(shape, FP16, FP32), {}))

    bad_arguments = [
        ({"x": torch.ones(())}, r"x is float32\[\].*D"),
        ({"x": torch.ones(2, 0)}, r"x is float32\[2, 0\].*D > 0"),
        ({"bias": torch.ones(2)}, r"bias is float32\[2\].*\[3\]"),
        ({"bias": torch.ones(1, 3)}, r"bias is float32\[1, 3\].*\[3\]"),
        ({"bias": [1.0]}, r"bias is \[1.0\].*floating-point"),
    ]


class TestBiasGeluFp8(QuantizingTests):
    op, name = "gelu_fp8", "bias_gelu"
    function = functools.partial(bias_gelu, out_dtype=FP8)
    naive, reference = naive, module.reference_fp8
    good, at_length = staticmethod(TestBiasGelu.good), staticmethod(TestBiasGelu.at_length)

    def examples(self, dtype):
        yield make((2, 3, 40), dtype, FP64 if dtype == FP64 else FP32)
        yield make((2, 3, 48), dtype)

    bad_arguments = [
        *TestBiasGelu.bad_arguments,
        ({"x": torch.ones(3)}, r"x is float32\[3\]"),
        ({"x": torch.ones(1, 2, 3, 3)}, r"x is float32\[1, 2, 3, 3\]"),
        ({"x": torch.ones(3, 2).t()}, "x is .*contiguous"),
        ({"out_dtype": FP16}, "out_dtype is torch.float16, expected None or"),
    ]

    @pytest.mark.parametrize("bias", [None, FP32, BF16])
    @pytest.mark.parametrize(
        "shape", [(1, 1, 7), (1, 64), (3, 65), (2, 5, 96), (2, 8960), (1, 2, 13824), (2, 0, 64)]
    )
    def test_shapes(self, backend, shape, dtype, bias):
        self.check(**make(shape, dtype, bias))

    def test_y_is_not_rounded_to_the_dtype_of_x(self, backend):
        """In bfloat16 256 + 1 is 256; FP8 tells 240 from 256 only, but the scale has 24 bits."""
        x, bias = torch.full((1, 64), 256.0).to(BF16), torch.ones(64)
        scale = self.function(x, bias)[1]
        assert scale.item() == torch.tensor(257.0).div(torch.tensor(448.0)).item()

    def test_extreme_values(self, backend):
        """Give zero for far negative numbers, not 0·∞, and the largest numbers themselves."""
        x = [[-3e38, -1e10, -50.0, -1e-30, 0.0, 1.0], [-1e4, 0.0, 1e-30, 3.0, 50.0, 1e4],
             [0.0, -1.0, 1e8, 1e20, -1e20, 3e38]]  # fmt: skip
        q, scale = self.function(torch.tensor(x))
        assert q.float().isfinite().all() and scale.isfinite().all()
        assert_quantizes((q, scale), naive(torch.tensor(x).double()))

    def test_zeros_and_nan(self, backend):
        x = torch.zeros(2, 40)
        x[1, 3] = float("nan")
        q, scale = self.function(x)
        assert (q[0].float() == 0).all() and 0 < scale[0] < 1e-30
        assert q[1].float().isnan().all() and scale[1].isnan()

    def test_strided_inputs(self, backend):
        packed, bias = make((2, 6, 120), BF16, FP32).values()
        for x in (packed[..., 40:80], packed[:, ::2, :40], packed.transpose(0, 1)[..., :40]):
            self.check(x=x, bias=bias[:40])
            self.check(x=x, bias=bias[::3])


compare = TestBiasGelu.compare
SHAPES = [
    (1, 1, 1), (2, 5, 33), (1, 1, 7), (3, 64), (17,), (1, 3, 8960), (2, 13824), (70, 65), (2, 0, 5)
]  # fmt: skip
DTYPES = [(FP32, None), (FP32, FP32), (BF16, None), (BF16, BF16), (BF16, FP32), (FP16, BF16)]


@pytest.mark.cases(16)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, bias", DTYPES)
def test_forward_and_gradients(backend, shape, dtype, bias):
    compare(make(shape, dtype, bias), slack(backend, dtype))


def test_bits_of_few_elements_without_bias_are_those_of_pytorch():
    x = torch.randn(3, 65, dtype=BF16)
    assert torch.equal(bias_gelu(x), F.gelu(x, approximate="tanh"))


def test_the_bias_is_added_before_rounding():
    x = torch.full((1, 64), 256.0, dtype=BF16)
    bias = torch.full((64,), 1.0)
    rounded = F.gelu(x + bias.bfloat16(), approximate="tanh")
    assert rounded[0, 0] == 256 and module.reference(x, bias, FP64)[0, 0] == 257


EXTREMES = torch.tensor([[-1e4, -50.0, -1e-30, 0.0, 1e-30, 50.0, 1e4]])


def test_extreme_values_stay_finite(backend):
    compare({"x": EXTREMES, "bias": torch.zeros(7)}, 1)


def test_extreme_values_of_many_rows():
    """A CPU takes another formula for them."""
    y = bias_gelu(EXTREMES.repeat(module.FEW_ELEMENTS, 1))
    torch.testing.assert_close(y[5], naive(EXTREMES.double())[0].float(), rtol=1e-6, atol=0)
    assert torch.equal(y, y[:1].expand_as(y))


@pytest.mark.parametrize("dtype, bias", [(FP32, None), (BF16, FP32)])
def test_bits_do_not_depend_on_the_parts(monkeypatch, dtype, bias):
    tensors = make((2, 173, 65), dtype, bias)
    whole = bias_gelu(**tensors)
    monkeypatch.setattr(module, "CHUNK", 64 * 65)
    assert torch.equal(bias_gelu(**tensors), whole)


@pytest.mark.triton
def test_every_bfloat16_number(triton_device):
    """Give y = h and slope one far above zero, both zero far below, up to the last number."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = bits.view(BF16).float().reshape(256, 256)
    for bias in (None, torch.zeros(256)):
        x = torch.where(numbers.isfinite(), numbers, 0.0).requires_grad_()
        y = bias_gelu(x, bias)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        top, bottom = (x > 20).detach(), (x < -20).detach()
        assert torch.equal(y[top], x[top]) and (x.grad[top] == 1).all()
        assert (y[bottom] == 0).all() and (x.grad[bottom] == 0).all()
    x = torch.full((1, 4), float("nan")).requires_grad_()
    y = bias_gelu(x)
    y.sum().backward()
    assert y.isnan().all() and x.grad.isnan().all()


STRIDED = {  # the order of the axes in memory, and the shape
    (1, 0, 2): (3, 4, 24),
    (0, 2, 1, 3): (2, 3, 4, 24),
    (2, 1, 0, 3): (2, 3, 4, 24),
    (3, 2, 1, 0, 4): (2, 2, 3, 2, 24),  # more than the kernels address: the reference runs
}


@pytest.mark.parametrize("bias_dtype", [None, FP32])
@pytest.mark.parametrize("axes", STRIDED)
def test_strided_inputs(backend, axes, bias_dtype):
    """Give rows of a wider buffer and axes in any order the results of dense ones."""
    tensors = make(STRIDED[axes], BF16, bias_dtype)
    bias = tensors.get("bias")
    grad = torch.randn(STRIDED[axes]).to(BF16)
    x = spread(tensors["x"], axes)
    assert not x.is_contiguous()
    y, dense = bias_gelu(x, bias), bias_gelu(tensors["x"], bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, dense)
    backward = torch.ops.prfl_fast.bias_gelu_backward
    flags = (True, bias is not None)
    for g in (grad, spread(grad, axes), spread(grad, range(len(axes)))):
        right = backward(grad, tensors["x"], bias, *flags)
        torch.testing.assert_close(backward(g, x, bias, *flags), right)


@pytest.mark.triton
def test_the_activation_is_not_copied(triton_device, monkeypatch):
    x, grad = (spread(torch.randn(2, 3, 4, 24), (0, 2, 1, 3)) for _ in range(2))
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    module._triton_backward(grad, x, None, True, False)
    module._triton_forward(x, None)


@pytest.mark.parametrize("bias_dtype", [None, FP32])
def test_a_slice_and_a_transposed_tensor(backend, bias_dtype):
    packed = make((2, 7, 36), BF16, bias_dtype)

    def slices(**tensors):
        return {n: t[..., 12:24] for n, t in tensors.items()}

    compare(packed, slack(backend, BF16), of=slices)
    for turned in (torch.randn(5, 6, 4).transpose(0, 1), torch.randn(5, 4, 6).transpose(1, 2)):
        bias = None if bias_dtype is None else packed["bias"][:4].detach()
        assert bias_gelu(turned, bias).is_contiguous()
        torch.testing.assert_close(bias_gelu(turned, bias), naive(turned, bias))


def test_axes_of_rows():
    x = torch.zeros(2, 3, 4, 5)
    assert row_axes(x) == (0, 0, 5, None, None)
    assert row_axes(x[0, 0, 0]) == (0, 0, 0, None, None)
    assert row_axes(x[:, :, ::2]) == (0, 0, 10, None, None)
    assert row_axes(x[:, ::2]) == (60, 40, 5, 2, 4)
    assert row_axes(x[:, :2]) == (0, 60, 5, None, 8)
    assert row_axes(x[:, :, :3]) == (0, 20, 5, None, 3)
    assert row_axes(x[:, :2, :3]) == (60, 20, 5, 2, 3)
    assert row_axes(x.permute(2, 1, 0, 3)) == (5, 20, 60, 3, 2)
    assert row_axes(x.transpose(2, 3)) is None and row_axes(x.transpose(2, 3)[..., :1]) is not None
    many = torch.zeros(2, 2, 3, 2, 5).permute(3, 2, 1, 0, 4)
    assert row_axes(many) is None and row_axes(torch.zeros(1).expand(2**16, 2**16, 1)) is not None
    assert row_axes(torch.zeros(2**16, 1, 1).expand(2**16, 2**16, 1)) is None
    for grad in (many, x.transpose(2, 3), torch.ones(()).expand(4, 6)):
        dense, axes = gradient_rows(grad)
        assert torch.equal(dense, grad) and axes == row_axes(dense)
    assert gradient_rows(x[:, ::2])[0].data_ptr() == x.data_ptr()


def test_keeps_only_the_pre_activation():
    tensors = make((64, 256), BF16, FP32)
    assert saved_by(bias_gelu, tensors) == 64 * 256 * 2 + 256 * 4
    assert saved_by(naive, tensors) >= 64 * 256 * 4


@pytest.mark.parametrize("dim", [1, 7, 64, 100, 1536, 8192, 8960, 13824, 14336])
def test_launches_are_sane(dim):
    for rows, capability in itertools.product((1, 3, 32760, 10**6), ((8, 0), (9, 0), (12, 0))):
        for launch in (
            module.forward_launch(rows, dim),
            module.backward_launch(rows, dim, capability),
        ):
            assert launch.block_r * launch.block_d == module.TILE == 16 * 32 * launch.num_warps
            blocks = -(-dim // launch.block_d)
            assert dim <= blocks * launch.block_d < max(2, 1.5 * dim + 32)
            assert launch.rows_per_program % launch.block_r == 0
            assert (launch.chunks - 1) * launch.rows_per_program < rows
            assert launch.chunks * launch.rows_per_program >= rows
    # A million rows write no more partial rows than thirty thousand.
    most = {module.backward_launch(n, dim, (9, 0)).chunks * blocks for n in (32760, 10**6)}
    assert max(most) <= max(6 * 132, blocks)


@property_test()
def test_any_arguments(draw):
    lead = draw(st.lists(st.integers(1, 5), max_size=4))
    dim = draw(st.integers(1, 130))
    dtype, small = (draw(st.sampled_from(FLOATS)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make((*lead, dim), dtype, small if draw(st.booleans()) else None)
    axes = (*draw(st.permutations(range(len(lead)))), len(lead))
    # Of a few elements PyTorch may hit the exact result, so a result may be a few half-ulps off.
    compare(tensors, of=lambda x, **bias: {"x": spread(x, axes)} | bias)


@property_test()
def test_any_rows_in_fp8(draw):
    tensors = {"x": draw_strided_rows(draw, st.integers(-3, 2))}
    # PyTorch's 1 + tanh cancels far below zero, which shows in a token that has nothing else.
    tensors["x"][..., 0] = tensors["x"].abs().amax(-1)
    small = draw(st.none() | st.sampled_from(FLOATS))
    if small is not None:
        tensors["bias"] = torch.randn(tensors["x"].shape[-1]).to(small)
        tensors["bias"][0].abs_()
    TestBiasGeluFp8().check(**tensors)
