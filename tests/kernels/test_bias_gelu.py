"""bias_gelu: bias and tanh-GELU, keeping the pre-activation only."""

import pytest
import torch
from op_checks import (
    check,
    check_compiled,
    check_deterministic,
    check_expanded_gradient,
    saved_bytes,
    wide,
)
from torch.nn import functional as F

from prfl_fast.kernels import bias_gelu
from prfl_fast.kernels.bias_gelu import CHUNK, reference


def naive(x, bias=None):
    h = wide(x) if bias is None else wide(x) + wide(bias)
    return F.gelu(h, approximate="tanh").to(x.dtype)


def make(shape, dtype, bias_dtype=None):
    tensors = {"x": (2 * torch.randn(shape)).to(dtype)}
    if bias_dtype is not None:
        tensors["bias"] = torch.randn(shape[-1]).to(bias_dtype)
    return tensors


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 5, 33), (1, 1, 7), (3, 64), (17,), (1, 30, 8960), (CHUNK // 4 + 3, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", ["none", "same", "float32"])
def test_forward_and_gradients(shape, dtype, bias):
    bias_dtype = {"none": None, "same": dtype, "float32": torch.float32}[bias]
    # In float64 the oracle is no more exact than what it judges.
    rounding = 16 if dtype == torch.float64 else 1
    check(bias_gelu, naive, make(shape, dtype, bias_dtype), rounding=rounding)


def test_without_bias_the_bits_are_those_of_pytorch():
    x = torch.randn(3, 65, dtype=torch.bfloat16)
    assert torch.equal(bias_gelu(x), F.gelu(x, approximate="tanh"))


def test_the_bias_is_added_before_rounding():
    x = torch.full((1, 64), 256.0, dtype=torch.bfloat16)
    bias = torch.full((64,), 1.0)
    rounded = F.gelu(x + bias.bfloat16(), approximate="tanh")
    assert rounded[0, 0] == 256 and reference(x, bias, torch.float64)[0, 0] == 257


def test_extreme_values_stay_finite():
    x = torch.tensor([[-1e4, -50.0, -1e-30, 0.0, 1e-30, 50.0, 1e4]])
    check(bias_gelu, naive, {"x": x, "bias": torch.zeros(7)})


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_strided_inputs(bias_dtype):
    packed = make((2, 7, 36), torch.bfloat16, bias_dtype)

    def sliced(function):
        def call(x, bias=None):
            return function(x[..., 12:24], None if bias is None else bias[12:24])

        return call

    check(sliced(bias_gelu), sliced(naive), packed)
    turned = torch.randn(5, 6, 4).transpose(0, 1)
    bias = None if bias_dtype is None else packed["bias"][:4]
    assert bias_gelu(turned, bias).is_contiguous()
    torch.testing.assert_close(bias_gelu(turned, bias), naive(turned, bias))


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_deterministic_for_any_gradient_layout(bias_dtype):
    tensors = make((3, 11, 24), torch.bfloat16, bias_dtype)
    check_deterministic(bias_gelu, tensors)
    check_expanded_gradient(bias_gelu, tensors)


@pytest.mark.parametrize("needed", ["x", "bias"])
def test_only_needed_gradients(needed):
    tensors = make((4, 9), torch.float32, torch.float32)
    full = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    bias_gelu(**full).square().sum().backward()
    tensors[needed].requires_grad_()
    bias_gelu(**tensors).square().sum().backward()
    assert torch.equal(tensors[needed].grad, full[needed].grad)
    assert all(t.grad is None for n, t in tensors.items() if n != needed)


def test_keeps_only_the_pre_activation():
    tensors = {
        n: t.requires_grad_() for n, t in make((64, 256), torch.bfloat16, torch.float32).items()
    }
    kept = saved_bytes(lambda: bias_gelu(**tensors))
    assert kept == 64 * 256 * 2 + 256 * 4
    assert saved_bytes(lambda: naive(**tensors)) >= 64 * 256 * 4


def test_gradcheck():
    tensors = make((3, 4), torch.float64, torch.float64)
    inputs = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(bias_gelu, inputs)
    assert torch.autograd.gradcheck(bias_gelu, inputs[:1])


def test_no_rows():
    tensors = {
        n: t.requires_grad_() for n, t in make((2, 0, 5), torch.float32, torch.float32).items()
    }
    bias_gelu(**tensors).sum().backward()
    assert torch.equal(tensors["bias"].grad, torch.zeros(5))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias):
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.prfl_fast.bias_gelu, (x, bias))
    grad = torch.randn(2, 8, 3).transpose(1, 2).bfloat16()
    for need_x, need_bias in ((True, True), (True, False), (False, True)):
        args = (grad, x.detach(), None if bias is None else bias.detach(), need_x, need_bias)
        if with_bias or need_x:
            torch.library.opcheck(
                torch.ops.prfl_fast.bias_gelu_backward,
                args,
                test_utils=["test_schema", "test_faketensor"],
            )


def test_compiles_without_graph_break():
    check_compiled(bias_gelu, make((2, 3, 16), torch.bfloat16, torch.float32))


@pytest.mark.parametrize(
    "x, bias, message",
    [
        (torch.ones(2, 3, dtype=torch.int32), None, "x is int32.*floating-point"),
        (torch.ones(()), None, r"x is float32\[\].*D"),
        (torch.ones(2, 3), torch.ones(2), r"bias is float32\[2\].*\[3\]"),
        (torch.ones(2, 3), torch.ones(1, 3), r"bias is float32\[1, 3\].*\[3\]"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.int64), "bias is int64.*floating-point"),
        (torch.ones(2, 3), torch.ones(3, device="meta"), "bias is .*meta.*on cpu"),
    ],
)
def test_bad_arguments(x, bias, message):
    with pytest.raises(ValueError, match="bias_gelu: " + message):
        bias_gelu(x, bias)
