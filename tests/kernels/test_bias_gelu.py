"""bias_gelu: reference and Triton against plain PyTorch, keeping the pre-activation only."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import (
    check,
    check_compiled,
    check_deterministic,
    check_expanded_gradient,
    saved_bytes,
    wide,
)
from torch.nn import functional as F

import prfl_fast.kernels as kernels
from prfl_fast.kernels import bias_gelu
from prfl_fast.kernels._row_axes import gradient_rows, row_axes
from prfl_fast.kernels._triton import INTERPRETING

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
module = importlib.import_module("prfl_fast.kernels.bias_gelu")
CHUNK, reference = module.CHUNK, module.reference
HALF, BRAIN = torch.float16, torch.bfloat16
FLOATS = [torch.float32, BRAIN, HALF]


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def naive(x, bias=None):
    h = wide(x) if bias is None else wide(x) + wide(bias)
    return F.gelu(h, approximate="tanh").to(x.dtype)


def make(shape, dtype, bias_dtype=None):
    tensors = {"x": (2 * torch.randn(shape)).to(dtype)}
    if bias_dtype is not None:
        tensors["bias"] = torch.randn(shape[-1]).to(bias_dtype)
    return tensors


def slack(backend, *dtypes):
    """Half-ulps: float64 is as exact as its oracle, the interpreter truncates to bfloat16."""
    if torch.float64 in dtypes:
        return 16
    return 3 if backend == "triton" and INTERPRETING and BRAIN in dtypes else 1


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 5, 33), (1, 1, 7), (3, 64), (17,), (1, 3, 8960), (2, 13824), (70, 65)],
)
@pytest.mark.parametrize(
    "dtype, bias",
    [
        (torch.float32, None),
        (torch.float32, torch.float32),
        (BRAIN, None),
        (BRAIN, BRAIN),
        (BRAIN, torch.float32),
        (HALF, BRAIN),
    ],
)
def test_forward_and_gradients(backend, shape, dtype, bias):
    check(bias_gelu, naive, make(shape, dtype, bias), rounding=slack(backend, dtype))


@pytest.mark.parametrize("bias", [None, torch.float64])
def test_float64(backend, bias):
    check(bias_gelu, naive, make((2, 5, 33), torch.float64, bias), rounding=16)


def test_pieces_of_the_reference():
    check(bias_gelu, naive, make((CHUNK // 4 + 3, 4), BRAIN, BRAIN))


def test_without_bias_the_bits_are_those_of_pytorch():
    x = torch.randn(3, 65, dtype=torch.bfloat16)
    assert torch.equal(bias_gelu(x), F.gelu(x, approximate="tanh"))


def test_the_bias_is_added_before_rounding():
    x = torch.full((1, 64), 256.0, dtype=torch.bfloat16)
    bias = torch.full((64,), 1.0)
    rounded = F.gelu(x + bias.bfloat16(), approximate="tanh")
    assert rounded[0, 0] == 256 and reference(x, bias, torch.float64)[0, 0] == 257


def test_extreme_values_stay_finite(backend):
    x = torch.tensor([[-1e4, -50.0, -1e-30, 0.0, 1e-30, 50.0, 1e4]])
    check(bias_gelu, naive, {"x": x, "bias": torch.zeros(7)})


@pytest.mark.triton
def test_every_bfloat16_number(triton_backend):
    """y = h and slope one far above zero, both zero far below, up to the last finite number."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    numbers = bits.view(BRAIN).float().reshape(256, 256)
    for bias in (None, torch.zeros(256, device=device)):
        x = torch.where(numbers.isfinite(), numbers, 0.0).requires_grad_()
        y = bias_gelu(x, bias)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
        top, bottom = (x > 20).detach(), (x < -20).detach()
        assert torch.equal(y[top], x[top]) and (x.grad[top] == 1).all()
        assert (y[bottom] == 0).all() and (x.grad[bottom] == 0).all()
    x = torch.full((1, 4), float("nan"), device=device).requires_grad_()
    y = bias_gelu(x)
    y.sum().backward()
    assert y.isnan().all() and x.grad.isnan().all()


def spread(x, axes):
    """x with its axes in the order ``axes`` in memory and gaps between rows."""
    shape = [x.shape[a] for a in axes]
    wider = x.new_zeros(*shape[:-1], 3 * shape[-1])
    view = wider[..., shape[-1] : 2 * shape[-1]].permute(*(axes.index(i) for i in range(x.dim())))
    view.copy_(x)
    return view


STRIDED = {  # the order of the axes in memory, and the shape
    (1, 0, 2): (3, 4, 24),
    (0, 2, 1, 3): (2, 3, 4, 24),
    (2, 1, 0, 3): (2, 3, 4, 24),
    (3, 2, 1, 0, 4): (2, 2, 3, 2, 24),  # more than the kernels address: the reference runs
}


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
@pytest.mark.parametrize("axes", STRIDED)
def test_strided_inputs(backend, axes, bias_dtype):
    """Rows of a wider buffer and axes in any order give the bits of dense ones."""
    tensors = make(STRIDED[axes], BRAIN, bias_dtype)
    bias = tensors.get("bias")
    grad = torch.randn(STRIDED[axes]).to(BRAIN)
    x = spread(tensors["x"], axes)
    assert not x.is_contiguous()
    y, dense = bias_gelu(x, bias), bias_gelu(tensors["x"], bias)
    assert y.is_contiguous()
    torch.testing.assert_close(y, dense)
    flags = (True, bias is not None)
    for g in (grad, spread(grad, axes), spread(grad, range(len(axes)))):
        left = module._backward_op(g, x, bias, *flags)
        right = module._backward_op(grad, tensors["x"], bias, *flags)
        torch.testing.assert_close(left, right)


@pytest.mark.triton
def test_the_activation_is_not_copied(triton_backend, monkeypatch):
    x, grad = (spread(torch.randn(2, 3, 4, 24), (0, 2, 1, 3)) for _ in range(2))
    if torch.cuda.is_available():
        x, grad = x.cuda(), grad.cuda()
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    module._triton_backward(grad, x, None, True, False)
    module._triton_forward(x, None)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_a_slice_and_a_transposed_tensor(backend, bias_dtype):
    packed = make((2, 7, 36), BRAIN, bias_dtype)

    def sliced(function):
        def call(x, bias=None):
            return function(x[..., 12:24], None if bias is None else bias[12:24])

        return call

    check(sliced(bias_gelu), sliced(naive), packed, rounding=slack(backend, BRAIN))
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


@pytest.mark.parametrize("bias_dtype", [None, torch.float32])
def test_deterministic_for_any_gradient_layout(backend, bias_dtype):
    tensors = make((3, 11, 24), BRAIN, bias_dtype)
    check_deterministic(bias_gelu, tensors)
    check_expanded_gradient(bias_gelu, tensors)


@pytest.mark.parametrize("needed", ["x", "bias"])
def test_only_needed_gradients(backend, needed):
    tensors = make((4, 9), torch.float32, torch.float32)
    full = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    bias_gelu(**full).square().sum().backward()
    tensors[needed].requires_grad_()
    bias_gelu(**tensors).square().sum().backward()
    assert torch.equal(tensors[needed].grad, full[needed].grad)
    assert all(t.grad is None for n, t in tensors.items() if n != needed)
    flags = (needed == "x", needed == "bias")
    x, bias = (t.detach() for t in tensors.values())
    results = module._backward_op(torch.ones_like(x), x, bias, *flags)
    assert tuple(r.numel() > 0 for r in results) == flags


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


def test_no_rows(backend):
    tensors = {
        n: t.requires_grad_() for n, t in make((2, 0, 5), torch.float32, torch.float32).items()
    }
    bias_gelu(**tensors).sum().backward()
    assert torch.equal(tensors["bias"].grad, torch.zeros(5))


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend, with_bias):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(8, requires_grad=True) if with_bias else None
    torch.library.opcheck(torch.ops.prfl_fast.bias_gelu, (x, bias), test_utils=tests)
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


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(bias_gelu, fullgraph=True, dynamic=True, backend="aot_eager")
    bias = torch.randn(16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            x = torch.randn(2, length, 16)
            torch.testing.assert_close(compiled(x, bias), bias_gelu(x, bias))


@pytest.mark.triton
def test_offsets_past_int32(triton_backend, tmp_path):
    """Row 2 at 2·2³⁰ elements: 32 bits would read the zeros at the start of this sparse file."""
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 8 GiB")
    stride, dim = 2**30, 64
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * 2**32)
    storage = torch.from_file(str(path), shared=True, size=2**32, dtype=HALF)
    x = storage.as_strided((3, dim), (stride, 1), 2**31 - dim)
    values, bias, grad = torch.randn(3, dim).half(), torch.randn(dim), torch.randn(3, dim).half()
    x.copy_(values)
    assert torch.equal(bias_gelu(x, bias), bias_gelu(values, bias))
    middle = storage.as_strided((1, 3, 2, dim), (0, stride, 64, 1), 2**31 - 128)  # two axes of rows
    assert torch.equal(bias_gelu(middle[:, :, 1]), bias_gelu(values)[None])
    for a, g in ((x, grad), (values, x), (x, x)):
        dense = (g.contiguous(), a.contiguous())
        left = module._backward_op(g, a, bias, True, True)
        right = module._backward_op(*dense, bias, True, True)
        assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.mark.parametrize("dim", [1, 7, 64, 100, 1536, 8192, 8960, 13824, 14336])
def test_launches_are_sane(dim):
    for rows, capability in itertools.product((1, 3, 32760, 10**6), ((8, 0), (9, 0), (12, 0))):
        for launch in (module.map_launch(rows, dim), module.sum_launch(rows, dim, capability)):
            assert launch.block_r * launch.block_d == module.TILE == 16 * 32 * launch.num_warps
            blocks = -(-dim // launch.block_d)
            assert dim <= blocks * launch.block_d < max(2, 1.5 * dim + 32)
            assert launch.rows_per_program % launch.block_r == 0
            assert (launch.chunks - 1) * launch.rows_per_program < rows
            assert launch.chunks * launch.rows_per_program >= rows
    # A million rows write no more partial rows than thirty thousand.
    most = {module.sum_launch(n, dim, (9, 0)).chunks * blocks for n in (32760, 10**6)}
    assert max(most) <= max(6 * 132, blocks)


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


@st.composite
def arguments(draw):
    lead = draw(st.lists(st.integers(1, 5), max_size=4))
    dim = draw(st.integers(1, 130))
    dtype, small = (draw(st.sampled_from(FLOATS)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make((*lead, dim), dtype, small if draw(st.booleans()) else None)
    return tensors, (*draw(st.permutations(range(len(lead)))), len(lead))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    tensors, axes = case

    def strided(function):
        def call(x, bias=None):
            wider = torch.cat([x, x, x], -1).permute(axes).contiguous()
            view = wider[..., : x.shape[-1]].permute(*(axes.index(i) for i in range(x.dim())))
            return function(view, bias)

        return call

    # Of a few elements PyTorch may hit the exact result, so a result may be a few half-ulps off.
    check(strided(bias_gelu), strided(naive), tensors, rounding=4)
