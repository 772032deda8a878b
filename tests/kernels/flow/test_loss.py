"""flow_loss, reference and Triton: mean squared error against noise - latents, nothing widened."""

import pytest
import torch
from dtypes import BF16, FLOATS, FP32, FP64
from op_checks import saved_bytes, slack
from op_tests import OperationTests
from properties import property_test, st

from prfl_fast.kernels import flow_loss
from prfl_fast.kernels.flow import loss as module
from prfl_fast.kernels.runtime.registry import get_backend
from prfl_fast.kernels.runtime.triton import INTERPRETING

FEW = module.FEW


def naive(velocity, noise, latents):
    double = FP64 in (velocity.dtype, noise.dtype, latents.dtype)
    velocity, noise, latents = (t.to(FP64 if double else FP32) for t in (velocity, noise, latents))
    return torch.nn.functional.mse_loss(velocity, noise - latents)


def make(shape, *dtypes):
    names = ("velocity", "noise", "latents")
    return {n: torch.randn(shape).to(d) for n, d in zip(names, dtypes, strict=True)}


def example(shape, *dtypes):
    """Return the velocity, which gets a gradient, and the target, which gets none."""
    tensors = make(shape, *dtypes)
    return {"velocity": tensors.pop("velocity")}, tensors


def compare(tensors, rounding=1.0):
    target = dict(tensors)
    velocity = {"velocity": target.pop("velocity")}
    # In float64 the oracle itself is one of the two roundings compared.
    rounding = max(rounding, 8.0) if velocity["velocity"].dtype == FP64 else rounding
    TestFlowLoss.compare(velocity, rounding, grads=[torch.tensor(3.0)], **target)


class TestFlowLoss(OperationTests):
    op = "flow_loss"
    function, naive = flow_loss, naive
    flags = {"velocity": None}
    test_reference_is_an_oracle = test_offsets_past_int32 = None

    def examples(self, dtype):
        target = FP64 if dtype == FP64 else FP32
        yield example((3, 5), dtype, target, target)
        yield example((3, 5), FP64 if dtype == FP64 else BF16, target, target)

    def layouts(self, dtype):
        size = 5000 if get_backend() == "triton" else FEW + 17
        yield example((size,), dtype, FP32, FP32)

    at_length = staticmethod(lambda length: make((2, length, 3), BF16, FP32, FP32))
    good = staticmethod(lambda: make((2, 3), FP32, FP32, FP32))

    bad_arguments = [
        ({"noise": torch.ones(3, 2)}, r"noise is float32\[3, 2\].*\[2, 3\]"),
        ({"latents": torch.ones(2)}, r"latents is float32\[2\]"),
        (make((0, 3), FP32, FP32, FP32), "velocity is .*at least one element"),
        ({"noise": torch.ones(2, 3, requires_grad=True)}, r"noise is .*no gradient.*\.detach"),
        ({"latents": torch.ones(2, 3, requires_grad=True)}, r"latents is .*no gradient.*\.detach"),
    ]


@pytest.mark.parametrize("shape", [(), (1,), (7, 13), (2, 16, 3, 8, 12), (1025,), (3, 2000)])
@pytest.mark.parametrize("dtype", [*FLOATS, FP64])
@pytest.mark.parametrize("target", ["same", FP32])
def test_value_and_gradient(backend, shape, dtype, target):
    target = dtype if target == "same" else target
    compare(make(shape, dtype, target, target), slack(backend, dtype))


@pytest.mark.parametrize("shape", [(FEW,), (FEW + 5,), (3, FEW // 2)])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_few_and_many_elements(shape, dtype):
    compare(make(shape, dtype, FP32, FP32))


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_the_sum_is_exact_but_for_its_rounding(backend, monkeypatch, offset):
    """Sum any number of elements: ten million, or as many for each of fewer multiprocessors."""
    on_gpu = backend == "triton" and not INTERPRETING
    elements = 10**7 if on_gpu else 3 * 10**5 if backend == "triton" else 2 * 10**6
    tensors = make((elements,), BF16, FP32, FP32)
    tensors["velocity"] += offset
    if not on_gpu:
        monkeypatch.setattr(module, "multiprocessors", lambda capability: 3)
    exact = naive(*(t.double() for t in tensors.values())).item()
    assert abs(flow_loss(**tensors).item() - exact) <= 1.01 * 2**-24 * exact


def test_float64_target_makes_the_loss_float64(backend):
    tensors = make((40,), FP32, FP64, FP32)
    out = flow_loss(**tensors)
    assert out.dtype == FP64
    torch.testing.assert_close(out, naive(*(t.double() for t in tensors.values())))


def test_strided_velocity(backend):
    moved = {n: t.permute(0, 3, 1, 2) for n, t in make((2, 6, 4, 10), FP32, FP32, FP32).items()}
    assert not moved["velocity"].is_contiguous()
    compare(moved, rounding=4)


def test_saves_its_inputs_only(backend):
    """Keep the velocity; noise and latents are the caller's anyway."""
    tensors = make((128, 64), BF16, FP32, FP32)
    tensors["velocity"].requires_grad_()
    kept, inputs = [], {t.data_ptr() for t in tensors.values()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        flow_loss(**tensors)
    assert {t.data_ptr() for t in kept} == inputs and len(kept) == 3
    new = tensors["velocity"].nbytes
    assert saved_bytes(lambda: flow_loss(**tensors)) == new + 128 * 64 * 8
    assert saved_bytes(lambda: naive(**tensors)) >= 128 * 64 * 8 >= 4 * new


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_launches_are_sane(capability):
    for elements in (1, 1023, 1024, 1025, 16 * 21 * 90 * 160, 10**7, 2**32 + 1):
        for launch in (module.sum_launch(elements, capability), module.map_launch(elements)):
            assert launch.share % launch.block == 0 and launch.block == 8 * 32 * launch.num_warps
            assert launch.programs * launch.share >= elements
            assert (launch.programs - 1) * launch.share < elements
    most = 12 * 170  # partial sums, however many the elements
    assert module.sum_launch(2**40, capability).programs <= most


def test_a_gradient_that_nobody_records_is_no_error():
    noise = torch.ones(2, 3, requires_grad=True)
    with torch.no_grad():
        assert flow_loss(torch.zeros(2, 3), noise, torch.zeros(2, 3)) == 1.0


@property_test()
def test_any_arguments(draw):
    shape = draw(st.lists(st.integers(1, 9), max_size=5))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make(shape, *(draw(st.sampled_from(FLOATS)) for _ in range(3)))
    offset = draw(st.sampled_from([0.0, 0.0, 30.0]))
    order = draw(st.permutations(range(len(shape))))
    for name in draw(st.sets(st.sampled_from(sorted(tensors)))):
        inverse = [order.index(i) for i in range(len(shape))]
        tensors[name] = tensors[name].permute(order).contiguous().permute(inverse)
    tensors["velocity"] = tensors["velocity"] + offset
    compare(tensors, rounding=8)  # of a few elements PyTorch may hit the exact mean
