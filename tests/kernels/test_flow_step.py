"""flow_step: the weighted sum of solver updates, reference and Triton."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    check,
    check_compiled,
    check_deterministic,
    check_expanded_gradient,
    run,
    saved_bytes,
    wide,
)

import prfl_fast.kernels as kernels
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.flow_step")
HALF, BRAIN = torch.float16, torch.bfloat16
FLOATS = [torch.float32, BRAIN, HALF]
COEFFICIENTS = [0.75, -1.5, 0.125]


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def ours(a, b, c):
    return flow_step([a, b, c], COEFFICIENTS)


def naive(a, b, c):
    total = 0.75 * wide(a) + -1.5 * wide(b) + 0.125 * wide(c)
    return total.to(a.dtype)


def make(shape, *dtypes):
    return {n: torch.randn(shape).to(d) for n, d in zip("abc", dtypes, strict=True)}


def slack(backend):
    """Half-ulps; the interpreter truncates to bfloat16."""
    return 3 if backend == "triton" and INTERPRETING else 1


@pytest.mark.parametrize("shape", [(), (1,), (1, 16, 3, 4, 6), (7, 13), (2, 0, 3), (1, 3000)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_forward_and_gradients(backend, shape, dtype):
    rounding = slack(backend) if dtype == BRAIN else 1
    check(ours, naive, make(shape, dtype, dtype, dtype), rounding=rounding)


def test_mixed_dtypes_round_once_to_the_first(backend):
    tensors = make((3, 33), BRAIN, torch.float32, HALF)
    assert ours(**tensors).dtype == BRAIN
    check(ours, naive, tensors, rounding=slack(backend))
    check(ours, naive, make((3, 33), torch.float32, BRAIN, BRAIN), rounding=slack(backend))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 16])
def test_any_number_of_tensors(backend, count):
    """More than one launch takes are summed in float32 and still rounded once."""
    coefficients = [1.0 - 0.3 * i for i in range(count)]
    tensors = {f"t{i}": torch.randn(70).to(FLOATS[i % 3]) for i in range(count)}

    def expression(**tensors):
        terms = zip(tensors.values(), coefficients, strict=True)
        total = sum(c * wide(t) for t, c in terms)
        return total.to(tensors["t0"].dtype)

    def step(**tensors):
        return flow_step(list(tensors.values()), coefficients)

    check(step, expression, tensors, rounding=slack(backend))


@pytest.mark.triton
def test_one_launch_each_way(triton_backend, monkeypatch):
    launches = []
    original = module._run
    monkeypatch.setattr(module, "_run", lambda *args: launches.append(args) or original(*args))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.randn(5, 6, device=device).to(FLOATS[i % 3]) for i in range(8)]
    for i in (0, 3, 4):
        tensors[i].requires_grad_()
    out = flow_step(tensors, [0.5] * 8)
    assert len(launches) == 1
    out.sum().backward()
    assert len(launches) == 2 and len(launches[1][1]) == 3
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == [0, 3, 4]


def test_float64_anywhere_makes_the_sum_float64(backend):
    x, y = torch.randn(64), torch.randn(64, dtype=torch.float64)
    assert torch.equal(flow_step([x, y], [1.0, 1 / 3]), (x.double() + y / 3).float())


def test_euler_step_equals_the_usual_expression(backend):
    x, v = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 16, 3, 8, 8)
    torch.testing.assert_close(flow_step([x, v], [1.0, -0.025]), x - 0.025 * v, rtol=0, atol=1e-6)


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


def test_float64_gradients(backend):
    """A float64 tensor that is not the first gets its gradient without a stop in float32."""
    x, y = torch.randn(40), torch.randn(40, dtype=torch.float64, requires_grad=True)
    flow_step([x, y], [1.0, 1 / 3]).backward(torch.ones(40))
    assert torch.equal(y.grad, torch.full((40,), 1 / 3, dtype=torch.float64))


def test_deterministic_for_any_gradient_layout(backend):
    tensors = make((4, 5, 6), torch.bfloat16, torch.float32, torch.float32)
    check_deterministic(ours, tensors)
    check_expanded_gradient(ours, tensors)


def test_only_needed_gradients_and_nothing_saved(backend):
    tensors = make((4, 8), *[torch.float32] * 3)
    tensors["a"].requires_grad_()
    tensors["c"].requires_grad_()
    assert saved_bytes(lambda: ours(**tensors)) == 0
    ours(**tensors).sum().backward()
    assert tensors["b"].grad is None
    assert torch.equal(tensors["a"].grad, torch.full((4, 8), 0.75))
    assert torch.equal(tensors["c"].grad, torch.full((4, 8), 0.125))


def test_one_tensor_given_twice_gets_both_gradients(backend):
    _, grads = run(lambda a: flow_step([a, a], [1.0, 2.0]), {"a": torch.randn(3)}, [torch.ones(3)])
    assert torch.equal(grads["a"], torch.full((3,), 3.0))


def test_gradcheck():
    inputs = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(ours, inputs)


def test_opcheck(backend):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, dtype=BRAIN)
    torch.library.opcheck(module._forward_op, ([x, y], [0.5, 2.0]), test_utils=tests)
    for grad in (torch.randn(3, 5), torch.randn(5, 3).t(), torch.randn(3, 5).to(BRAIN)):
        for arguments in (([0.5], "bfloat16"), ([0.5, 2.0, 0.0], "float16 float32 float32")):
            torch.library.opcheck(module._backward_op, (grad, *arguments), test_utils=tests)


def test_compiles_without_graph_break():
    check_compiled(ours, make((2, 9), torch.float32, torch.bfloat16, torch.float32))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            tensors = make((2, length, 3), torch.float32, BRAIN, torch.float32)
            torch.testing.assert_close(compiled(**tensors), ours(**tensors))


def test_launches_are_sane():
    for elements in (1, 1023, 1024, 1025, 16 * 21 * 90 * 160, 2**32):
        launch = module.launch_config(elements)
        assert launch.programs * launch.block >= elements > (launch.programs - 1) * launch.block
        assert launch.block == 8 * 32 * launch.num_warps


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


@st.composite
def arguments(draw):
    shape = [draw(st.integers(16, 40)), *draw(st.lists(st.integers(1, 5), max_size=4))]
    count = draw(st.integers(1, 10))
    thousandths = draw(st.lists(st.integers(-4000, 4000), min_size=count, max_size=count))
    coefficients = [n / 1000 for n in thousandths]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = {f"t{i}": torch.randn(shape).to(draw(st.sampled_from(FLOATS))) for i in range(count)}
    return tensors, coefficients, draw(st.permutations(range(len(shape))))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    tensors, coefficients, axes = case

    def step(**tensors):
        moved = [t.permute(axes) if i % 2 else t for i, t in enumerate(tensors.values())]
        return flow_step(moved, coefficients)

    inverse = [axes.index(i) for i in range(len(axes))]
    tensors = {
        n: t if i % 2 == 0 else t.permute(inverse).contiguous()
        for i, (n, t) in enumerate(tensors.items())
    }

    def expression(**tensors):
        moved = [t.permute(axes) if i % 2 else t for i, t in enumerate(tensors.values())]
        total = sum(c * wide(t) for t, c in zip(moved, coefficients, strict=True))
        return total.to(tensors["t0"].dtype)

    # Terms cancel: an element's error is some half-ulps of the largest term, not of the sum.
    check(step, expression, tensors, rounding=8)
