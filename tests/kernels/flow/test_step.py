"""flow_step: the weighted sum of solver updates, reference and Triton."""

import pytest
import torch
from dtypes import BF16, FLOATS, FP16, FP32, FP64
from op_checks import check, run, saved_by, slack
from op_tests import OperationTests
from plain_torch import wide
from properties import property_test, st

from prfl_fast.kernels import flow_step
from prfl_fast.kernels.flow import step as module

COEFFICIENTS = [0.75, -1.5, 0.125]


def weighted_sums(coefficients, moved=list):
    """Return the operation and its plain counterpart of the ``moved`` values of named tensors."""

    def expression(**tensors):
        terms = list(zip(moved(tensors.values()), coefficients, strict=True))
        return sum(c * wide(t) for t, c in terms).to(terms[0][0].dtype)

    return lambda **tensors: flow_step(moved(tensors.values()), coefficients), expression


ours, naive = weighted_sums(COEFFICIENTS)


def make(shape, *dtypes):
    return {n: torch.randn(shape).to(d) for n, d in zip("abc", dtypes, strict=True)}


class TestFlowStep(OperationTests):
    op = "flow_step"
    function, naive, public = ours, naive, flow_step
    flags = dict.fromkeys("abc")
    test_reference_is_an_oracle = test_offsets_past_int32 = None

    def examples(self, dtype):
        yield make((3, 5), dtype, dtype, dtype), {}
        if dtype != FP64:
            yield make((3, 5), dtype, BF16, FP32), {}

    def layouts(self, dtype):
        yield make((4, 5, 6), dtype, FP32, FP32), {}

    at_length = staticmethod(lambda length: make((2, length, 3), FP32, BF16, FP32))
    good = staticmethod(lambda: {"tensors": [torch.ones(2)], "coefficients": [1.0]})

    bad_arguments = [
        ({"tensors": [], "coefficients": []}, "tensors is .*at least one tensor"),
        ({"tensors": [torch.ones(2)] * 2}, "coefficients is .*2 floats"),
        (dict(tensors=[torch.ones(2), torch.ones(3)], coefficients=[1.0, 1.0]),
         r"tensors\[1\] is float32\[3\].*\[2\]"),
        ({"coefficients": [float("nan")]}, r"coefficients\[0\] is nan.*finite"),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (1,), (1, 16, 3, 4, 6), (7, 13), (2, 0, 3), (1, 3000)])
@pytest.mark.parametrize("dtype", [*FLOATS, FP64])
def test_forward_and_gradients(backend, shape, dtype):
    check(ours, naive, make(shape, dtype, dtype, dtype), rounding=slack(backend, dtype))


def test_mixed_dtypes_round_once_to_the_first(backend):
    tensors = make((3, 33), BF16, FP32, FP16)
    assert ours(**tensors).dtype == BF16
    check(ours, naive, tensors, rounding=slack(backend, BF16))
    check(ours, naive, make((3, 33), FP32, BF16, BF16), rounding=slack(backend, BF16))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16])
def test_any_number_of_tensors(backend, count):
    """Sum more tensors than one launch takes in float32 and round once."""
    coefficients = [1.0 - 0.3 * i for i in range(count)]
    tensors = {f"t{i}": torch.randn(70).to(FLOATS[i % 3]) for i in range(count)}
    check(*weighted_sums(coefficients), tensors, rounding=slack(backend, BF16))


@pytest.mark.triton
def test_one_launch_each_way(triton_device, monkeypatch):
    launches = []
    original = module._run
    monkeypatch.setattr(module, "_run", lambda *args: launches.append(args) or original(*args))
    tensors = [torch.randn(5, 6).to(FLOATS[i % 3]) for i in range(8)]
    for i in (0, 3, 4):
        tensors[i].requires_grad_()
    out = flow_step(tensors, [0.5] * 8)
    assert len(launches) == 1
    out.sum().backward()
    assert len(launches) == 2 and len(launches[1][1]) == 3
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == [0, 3, 4]


def test_float64_anywhere_makes_the_sum_float64(backend):
    x, y = torch.randn(64), torch.randn(64, dtype=FP64)
    assert torch.equal(flow_step([x, y], [1.0, 1 / 3]), (x.double() + y / 3).float())


def test_inputs_are_neither_changed_nor_returned(backend):
    x = torch.randn(5)
    before = x.clone()
    out = flow_step([x], [1.0])
    out.fill_(7)
    assert torch.equal(x, before)


def test_strided_inputs(backend):
    x = torch.randn(2, 6, 8)
    out = flow_step([x.transpose(1, 2), x[:, :1].expand(2, 6, 8).transpose(1, 2)], [2.0, 1.0])
    assert out.is_contiguous()
    torch.testing.assert_close(out, 2 * x.transpose(1, 2) + x[:, :1].transpose(1, 2))


def test_lazy_negatives(backend):
    x = torch.arange(4.0)
    assert torch.equal(flow_step([torch._neg_view(x), x], [1.0, 0.0]), -x)


def test_float64_gradients(backend):
    """Give a float64 tensor that is not the first its gradient without rounding to float32."""
    x, y = torch.randn(40), torch.randn(40, dtype=FP64, requires_grad=True)
    flow_step([x, y], [1.0, 1 / 3]).backward(torch.ones(40))
    assert torch.equal(y.grad, torch.full((40,), 1 / 3, dtype=FP64))


def test_the_gradients_are_the_coefficients_and_nothing_is_saved(backend):
    tensors = make((4, 8), FP32, FP32, FP32)
    assert saved_by(ours, tensors, frozen=["b"]) == 0
    _, grads = run(ours, tensors, [torch.ones(4, 8)])
    for grad, coefficient in zip(grads.values(), COEFFICIENTS, strict=True):
        assert torch.equal(grad, torch.full((4, 8), coefficient))


def test_one_tensor_given_twice_gets_both_gradients(backend):
    _, grads = run(lambda a: flow_step([a, a], [1.0, 2.0]), {"a": torch.randn(3)}, [torch.ones(3)])
    assert torch.equal(grads["a"], torch.full((3,), 3.0))


def test_launches_are_sane():
    for elements in (1, 1023, 1024, 1025, 16 * 21 * 90 * 160, 2**32):
        launch = module.launch_config(elements)
        assert launch.programs * launch.block >= elements > (launch.programs - 1) * launch.block
        assert launch.block == 8 * 32 * launch.num_warps


@property_test()
def test_any_arguments(draw):
    shape = [draw(st.integers(16, 40)), *draw(st.lists(st.integers(1, 5), max_size=4))]
    count = draw(st.integers(1, 10))
    thousandths = draw(st.lists(st.integers(-4000, 4000), min_size=count, max_size=count))
    coefficients = [n / 1000 for n in thousandths]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = {f"t{i}": torch.randn(shape).to(draw(st.sampled_from(FLOATS))) for i in range(count)}
    axes = draw(st.permutations(range(len(shape))))
    inverse = [axes.index(i) for i in range(len(axes))]
    tensors = {
        n: t if i % 2 == 0 else t.permute(inverse).contiguous()
        for i, (n, t) in enumerate(tensors.items())
    }

    def moved(tensors):
        return [t.permute(axes) if i % 2 else t for i, t in enumerate(tensors)]

    # Terms cancel: an element's error is some half-ulps of the largest term, not of the sum.
    check(*weighted_sums(coefficients, moved), tensors, rounding=8)
