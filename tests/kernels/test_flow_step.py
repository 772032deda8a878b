"""flow_step: the weighted sum of solver updates."""

import pytest
import torch
from op_checks import (
    check,
    check_compiled,
    check_deterministic,
    check_expanded_gradient,
    run,
    saved_bytes,
    wide,
)

from prfl_fast.kernels import flow_step

COEFFICIENTS = [0.75, -1.5, 0.125]


def ours(a, b, c):
    return flow_step([a, b, c], COEFFICIENTS)


def naive(a, b, c):
    total = 0.75 * wide(a) + -1.5 * wide(b) + 0.125 * wide(c)
    return total.to(a.dtype)


def make(shape, *dtypes):
    return {n: torch.randn(shape).to(d) for n, d in zip("abc", dtypes, strict=True)}


@pytest.mark.parametrize("shape", [(), (1,), (1, 16, 3, 4, 6), (7, 13), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_forward_and_gradients(shape, dtype):
    check(ours, naive, make(shape, dtype, dtype, dtype))


def test_mixed_dtypes_round_once_to_the_first():
    tensors = make((3, 33), torch.bfloat16, torch.float32, torch.float16)
    assert ours(**tensors).dtype == torch.bfloat16
    check(ours, naive, tensors)
    check(ours, naive, make((3, 33), torch.float32, torch.bfloat16, torch.bfloat16))


def test_float64_anywhere_makes_the_sum_float64():
    x, y = torch.randn(64), torch.randn(64, dtype=torch.float64)
    assert torch.equal(flow_step([x, y], [1.0, 1 / 3]), (x.double() + y / 3).float())


def test_euler_step_equals_the_usual_expression():
    x, v = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 3, 8, 8)
    torch.testing.assert_close(flow_step([x, v], [1.0, -0.025]), x - 0.025 * v, rtol=0, atol=1e-6)


def test_inputs_are_neither_changed_nor_returned():
    x = torch.randn(5)
    before = x.clone()
    out = flow_step([x], [1.0])
    out.fill_(7)
    assert torch.equal(x, before)


def test_strided_inputs():
    x = torch.randn(2, 6, 8)
    out = flow_step([x.transpose(1, 2), x[:, :1].expand(2, 6, 8).transpose(1, 2)], [2.0, 1.0])
    assert out.is_contiguous()
    torch.testing.assert_close(out, 2 * x.transpose(1, 2) + x[:, :1].transpose(1, 2))


def test_deterministic_for_any_gradient_layout():
    tensors = make((4, 5, 6), torch.bfloat16, torch.float32, torch.float32)
    check_deterministic(ours, tensors)
    check_expanded_gradient(ours, tensors)


def test_only_needed_gradients_and_nothing_saved():
    tensors = make((4, 8), *[torch.float32] * 3)
    tensors["a"].requires_grad_()
    tensors["c"].requires_grad_()
    assert saved_bytes(lambda: ours(**tensors)) == 0
    ours(**tensors).sum().backward()
    assert tensors["b"].grad is None
    assert torch.equal(tensors["a"].grad, torch.full((4, 8), 0.75))
    assert torch.equal(tensors["c"].grad, torch.full((4, 8), 0.125))


def test_one_tensor_given_twice_gets_both_gradients():
    _, grads = run(lambda a: flow_step([a, a], [1.0, 2.0]), {"a": torch.randn(3)}, [torch.ones(3)])
    assert torch.equal(grads["a"], torch.full((3,), 3.0))


def test_gradcheck():
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(ours, inputs)


def test_opcheck():
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.prfl_fast.flow_step, ([x, y], [0.5, 2.0]))
    torch.library.opcheck(
        torch.ops.prfl_fast.flow_step_backward, (torch.randn(3, 5), 0.5, torch.bfloat16)
    )


def test_compiles_without_graph_break():
    check_compiled(ours, make((2, 9), torch.float32, torch.bfloat16, torch.float32))


@pytest.mark.parametrize(
    "tensors, coefficients, message",
    [
        ([], [], "tensors is .*at least one tensor"),
        ([torch.ones(2), torch.ones(2)], [1.0], "coefficients is .*2 floats"),
        ([torch.ones(2), torch.ones(3)], [1.0, 1.0], r"tensors\[1\] is float32\[3\].*\[2\]"),
        ([torch.ones(2, dtype=torch.int64)], [1.0], r"tensors\[0\] is int64.*floating-point"),
        ([torch.ones(2)], [float("nan")], r"coefficients\[0\] is nan.*finite"),
        ([torch.ones(2), torch.ones(2, device="meta")], [1.0, 1.0], r".*meta.*on cpu"),
    ],
)
def test_bad_arguments(tensors, coefficients, message):
    with pytest.raises(ValueError, match="flow_step: " + message):
        flow_step(tensors, coefficients)
