"""The FP8 linear layer of training: products and gradients against an independent emulation."""

import copy
from functools import partial

import e4m3
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd.graph import saved_tensors_hooks

from prfl_fast.models.fp8_linear import Fp8Linear, exact_linears, shared_rows

SHAPES = {"video": (2, 5, 32), "rows": (7, 32), "one row": (1, 1, 32), "four axes": (2, 3, 2, 32)}
N, K = 48, 32


def layer(dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    made = nn.Linear(K, N, bias=bias)
    with torch.no_grad():  # rows and columns of different size, and a row of zeros
        made.weight.mul_(torch.logspace(-2, 1, N)[:, None]).mul_(torch.logspace(0, 1, K))
        made.weight[3] = 0
    made.__class__ = Fp8Linear
    return made.to(dtype)


def inputs(shape, dtype=torch.float32):
    torch.manual_seed(1)
    x = torch.randn(shape).to(dtype).requires_grad_()
    return x, torch.randn(*shape[:-1], N).to(dtype)


def run(module, x, grad):
    """Return y and the gradients of x, weight and bias in float64."""
    y = module(x)
    y.backward(grad)
    found = [y, x.grad, *(p.grad for p in module.parameters())]
    x.grad = None
    module.zero_grad()
    return [t if t is None else t.detach().double() for t in found]


def rounded(matrix):
    """Return rows of float64 numbers after e4m3 with a scale for each, from the table of e4m3."""
    matrix = matrix.detach().double().numpy()
    scale = np.maximum(np.abs(matrix).max(-1, keepdims=True), 2.0**-100) / 448
    codes = e4m3.encode(matrix / scale)
    numbers = e4m3.TABLE[np.minimum(codes & 127, 126)] * np.where(codes & 128, -1, 1)
    return torch.from_numpy(numbers * scale)


def distance(out, wanted):
    return float((out - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_quantized_rows(shape, dtype, bias):
    module, (x, grad) = layer(dtype, bias), inputs(shape, dtype)
    y, d_x, d_weight, *d_bias = run(module, x, grad)
    tokens, g = x.detach().flatten(0, -2), grad.flatten(0, -2)
    weight = module.weight.detach()
    wanted = rounded(tokens) @ rounded(weight).T
    wanted = wanted + module.bias.detach().double() if bias else wanted
    # The results have 16 bits.
    eps = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).eps
    close = {"rtol": eps, "atol": eps * 0.1}
    torch.testing.assert_close(y.flatten(0, -2), wanted, **close)
    wanted = rounded(g) @ rounded(weight.T).T
    torch.testing.assert_close(d_x.flatten(0, -2), wanted, rtol=eps, atol=eps * wanted.abs().max())
    wanted = g.double().T @ tokens.double()
    atol = float(torch.finfo(dtype).eps * wanted.abs().max())
    torch.testing.assert_close(d_weight, wanted, rtol=0, atol=4 * atol)
    for found in d_bias:
        torch.testing.assert_close(found, g.double().sum(0), rtol=0, atol=4 * atol)


def test_the_distance_to_exact_products_is_that_of_e4m3():
    module, (x, grad) = layer(), inputs((4, 200, K))
    exact = copy.deepcopy(module).double()
    exact.__class__ = nn.Linear
    wanted = run(exact, x.detach().double().requires_grad_(), grad.double())
    found = run(module, x, grad)
    # Three bits of mantissa have a relative error of about 2.6 % RMS, and a product has two.
    for out, oracle in zip(found[:2], wanted[:2], strict=True):
        assert 0.01 < distance(out, oracle) < 0.05
    for out, oracle in zip(found[2:], wanted[2:], strict=True):
        assert distance(out, oracle) < 1e-5


def test_it_is_as_close_to_exact_products_as_torchaos():
    float8 = pytest.importorskip("torchao.float8", reason="the peer is torchao's layer")
    from torchao.float8.float8_linear import Float8Linear

    module, (x, grad) = layer(), inputs((4, 200, K))
    exact = copy.deepcopy(module).double()
    exact.__class__ = nn.Linear
    wanted = run(exact, x.detach().double().requires_grad_(), grad.double())
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    object.__setattr__(config, "emulate", True)
    plain = copy.deepcopy(module)
    plain.__class__ = nn.Linear
    peers = run(Float8Linear.from_float(plain, config), x, grad)
    for out, peer, oracle in zip(run(module, x, grad), peers, wanted, strict=True):
        assert distance(out, oracle) <= 1.1 * distance(peer, oracle) + 1e-7


@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize("need_weight", [True, False])
def test_only_what_gradients_need_is_computed_and_saved(need_x, need_weight):
    module, (x, grad) = layer(), inputs((2, 5, K))
    x.requires_grad_(need_x)
    module.weight.requires_grad_(need_weight)
    saved = []
    with saved_tensors_hooks(lambda t: (saved.append(t.data_ptr()), t)[1], lambda t: t):
        y = module(x)
    expected = {x.data_ptr()} if need_weight else set()
    assert set(saved) == expected | ({module.weight.data_ptr()} if need_x else set())
    y.backward(grad)
    assert (x.grad is not None) == need_x and (module.weight.grad is not None) == need_weight
    assert module.bias.grad is not None


def test_gradients_and_inputs_of_other_strides():
    module, (x, grad) = layer(bias=False), inputs((2, 6, K))
    wanted = run(module, x, torch.ones_like(grad))
    turned = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    found = run(module, turned, torch.ones(()).expand_as(grad))
    for out, oracle in zip(found, wanted, strict=True):
        torch.testing.assert_close(out, oracle, rtol=0, atol=0)


def test_rows_are_shared_by_layers_of_one_input_alone():
    first, second, (x, grad) = layer(), layer(seed=2), inputs((2, 3, 2, K))
    wanted = [run(module, x, grad) for module in (first, second)]
    rows = shared_rows(x, [first, second])
    for module, expected in zip((first, second), wanted, strict=True):
        shared = partial(module, rows=rows)
        shared.parameters, shared.zero_grad = module.parameters, module.zero_grad
        for out, oracle in zip(run(shared, x, grad), expected, strict=True):
            assert torch.equal(out, oracle)
    assert torch.equal(first(2 * x, rows), first(2 * x))  # rows of another input are not used
    assert shared_rows(x, [first, nn.Linear(K, N)]) is None
    handle = second.register_forward_pre_hook(lambda *_: None)
    assert shared_rows(x, [first, second]) is None  # it may not take another argument
    handle.remove()
    second.forward = lambda x: x
    assert shared_rows(x, [first, second]) is None
    with exact_linears():
        assert shared_rows(x, [first]) is None
        assert torch.equal(first(x, rows), F.linear(x, first.weight, first.bias))


def test_no_tokens():
    module = layer()
    x = torch.zeros(2, 0, K, requires_grad=True)
    y = module(x)
    y.sum().backward()
    assert y.shape == (2, 0, N) and x.grad.shape == x.shape
    assert not module.weight.grad.any()


def test_autocast_computes_in_its_dtype_from_float32_weights():
    module, (x, grad) = layer(), inputs((2, 5, K))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    wanted = rounded(x.detach().bfloat16().flatten(0, 1)) @ rounded(module.weight).T
    wanted = wanted + module.bias.detach().double()
    torch.testing.assert_close(y.detach().double().flatten(0, 1), wanted, rtol=2**-7, atol=1e-2)
    y.backward(grad.bfloat16())
    assert x.grad.dtype == module.weight.grad.dtype == torch.float32


def test_the_exact_context_has_the_bits_of_a_plain_layer():
    module, (x, _) = layer(), inputs((2, 5, K))
    plain = F.linear(x, module.weight, module.bias)
    with pytest.raises(KeyError), exact_linears(), exact_linears():
        assert torch.equal(module(x), plain)
        raise KeyError
    assert not torch.equal(module(x), plain)
    with exact_linears():
        with exact_linears():
            pass
        assert torch.equal(module(x), plain)
    one, other = exact_linears(), exact_linears()  # as two threads would
    one.__enter__(), other.__enter__(), one.__exit__(None, None, None)
    assert torch.equal(module(x), plain)
    other.__exit__(None, None, None)
    assert not torch.equal(module(x), plain)


def test_second_derivatives_are_an_error():
    module, (x, _) = layer(), inputs((2, 5, K))
    (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiled_layers_have_the_same_bits():
    module, (x, grad) = layer(torch.bfloat16), inputs((2, 5, K), torch.bfloat16)
    wanted = run(module, x, grad)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(copy.deepcopy(module), backend=graphs, fullgraph=True)
    for out, oracle in zip(run(compiled, x, grad), wanted, strict=True):
        torch.testing.assert_close(out, oracle, rtol=0, atol=0)
    with exact_linears():
        assert torch.equal(compiled(x), F.linear(x, module.weight, module.bias))
        compiled_once = graphs.frame_count
        with exact_linears():
            compiled(x)
    assert graphs.frame_count == compiled_once
