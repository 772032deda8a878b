"""Forward mode, torch.func and double backward: right, or refused by the operation's name."""

import pytest
import torch
from torch.autograd import forward_ad

from prfl_fast import kernels


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def operations(dtype=torch.float64):
    """Return a function of one tensor ``[2, 6, 16]`` for each differentiable operation."""
    torch.manual_seed(0)
    y, w, gate = (leaf(*shape, dtype=dtype) for shape in ((2, 6, 16), (16,), (1, 16)))
    return {
        "norm_modulate": lambda x: kernels.norm_modulate(x, w),
        "residual_norm_modulate": lambda x: kernels.residual_norm_modulate(x, y, gate)[1],
        "gated_residual": lambda x: kernels.gated_residual(y, x, gate),
        "qk_norm_rope": lambda x: kernels.qk_norm_rope(x, y, w, w, heads=2)[0],
        "rms_norm": lambda x: kernels.rms_norm(x, w),
        "bias_gelu": lambda x: kernels.bias_gelu(x, w),
        "attention": lambda x: kernels.attention(x, y, y, heads=2)[0],
        "query_pool": lambda x: kernels.query_pool(x, y[0, :3])[0],
        "flow_step": lambda x: kernels.flow_step([x, y], [1.0, 2.0]),
        "flow_loss": lambda x: kernels.flow_loss(x, y, y),
    }


NAMES = list(operations())


@pytest.fixture(params=NAMES)
def operation(request):
    return request.param, operations()[request.param]


def test_forward_mode_is_refused(operation):
    name, function = operation
    x, v = leaf(2, 6, 16), leaf(2, 6, 16)
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match=f"^{name}: a tensor is part of forward mode"):
            function(forward_ad.make_dual(x, v))
        assert torch.equal(function(x), operations()[name](x))  # no tangent, nothing to refuse


def test_gradients_of_torch_func_are_refused(operation):
    name, function = operation
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(ValueError, match=f"^{name}: a tensor is part of torch.func"):
            transform(lambda x: function(x).sum())(leaf(2, 6, 16))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_is_right_or_refused(operation):
    name, function = operation
    x = leaf(3, 2, 6, 16).requires_grad_()
    if name == "flow_step":  # its list of tensors
        with pytest.raises(RuntimeError, match="not implemented for prfl_fast::flow_step"):
            torch.func.vmap(function)(x)
        return
    expected, output = torch.stack([function(sample) for sample in x]), torch.func.vmap(function)(x)
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (output, expected)]
    torch.testing.assert_close(*grads)


# Operations whose references autograd may record itself, see ``native`` in the registry.
TWICE = {"norm_modulate", "residual_norm_modulate", "gated_residual", "bias_gelu", "flow_step"}
TWICE |= {"flow_loss"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_double_backward_is_right_or_refused(operation, dtype):
    name, x = operation[0], leaf(2, 6, 16, dtype=dtype).requires_grad_()
    function = operations(dtype)[name]
    if dtype == torch.float64 and name in TWICE:
        assert torch.autograd.gradgradcheck(lambda x: function(x).square(), x)
        return
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    refusal = f"{name} has no second derivative|^derivative for .*attention.* is not implemented"
    with pytest.raises(RuntimeError, match=refusal):
        torch.autograd.grad(first.square().sum(), x)
