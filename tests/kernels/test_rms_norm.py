"""rms_norm: reference and Triton against plain PyTorch, rows wherever they lie."""

import importlib

import pytest
import torch
import torch.nn.functional as F
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
from prfl_fast.kernels import rms_norm
from prfl_fast.kernels._triton import INTERPRETING

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")
module = importlib.import_module("prfl_fast.kernels.rms_norm")
HALF, BRAIN = torch.float16, torch.bfloat16
FLOATS = [torch.float32, BRAIN, HALF]
EPS = 1e-6


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def naive(x, weight=None, eps=EPS):
    y = F.rms_norm(wide(x), x.shape[-1:], None if weight is None else wide(weight), eps)
    return y.to(x.dtype)


def make(shape, dtype=torch.float32, small=None, weight=True):
    """x of ``shape`` and a weight of dtype ``small``, x's unless given."""
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    if weight:
        tensors["weight"] = (1 + 0.5 * torch.randn(shape[-1])).to(small or dtype)
    return tensors


# Half-ulps of slack: sums run in another order than PyTorch's, which shows in float32; the
# interpreter truncates to bfloat16.
FLOAT_SLACK = 4.0


def slack(backend, dtype):
    interpreted = backend == "triton" and INTERPRETING
    return {torch.float32: FLOAT_SLACK, BRAIN: 3.0 if interpreted else 1.0, HALF: 1.0}[dtype]


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(7,), (1, 1), (1, 64), (3, 65), (2, 5, 96), (2, 3, 4, 128), (2, 0, 64), (40, 33), (3, 1536),
     (1, 2, 5120), (2, 8192)],
)  # fmt: skip
def test_shapes(backend, shape, dtype, weight):
    tensors = make(shape, dtype, weight=weight)
    check(rms_norm, naive, tensors, rounding=slack(backend, dtype))


@pytest.mark.parametrize(
    "dtype, small", [(BRAIN, torch.float32), (HALF, BRAIN), (torch.float32, BRAIN)]
)
def test_mixed_dtypes(backend, dtype, small):
    check(rms_norm, naive, make((2, 4, 72), dtype, small), rounding=FLOAT_SLACK)


def test_float64_is_computed_in_float64(backend):
    tensors = make((2, 4, 24), torch.float64)
    torch.testing.assert_close(rms_norm(**tensors), naive(**tensors), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_stands_in_for_the_module(backend, dtype, affine):
    norm = torch.nn.RMSNorm(48, eps=1e-5, elementwise_affine=affine, dtype=dtype)
    x = torch.randn(3, 7, 48).to(dtype)
    torch.testing.assert_close(rms_norm(x, norm.weight, eps=norm.eps), norm(x))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_eps(backend, eps):
    tensors = make((3, 24))
    tensors["x"] *= 0.1
    check(
        lambda **t: rms_norm(**t, eps=eps), lambda **t: naive(**t, eps=eps), tensors,
        rounding=FLOAT_SLACK,
    )  # fmt: skip
    tensors["x"].zero_()
    if eps:
        assert torch.equal(rms_norm(**tensors, eps=eps), tensors["x"])


HEAD_VIEWS = {
    "a head view of a packed qkv": lambda qkv: qkv[:, :, 1],
    "its heads before its tokens": lambda qkv: qkv[:, :, 1].transpose(1, 2),
    "every other token": lambda qkv: qkv[:, ::2, 0],
    "tokens first": lambda qkv: qkv[:, :, 2].transpose(0, 1),
    "q and k": lambda qkv: qkv[:, :, :2],
    "in no order the kernels address": lambda qkv: qkv[:, :, :2].permute(3, 2, 1, 0, 4),
    "one token expanded": lambda qkv: qkv[:, :1, 0].expand(2, 5, 4, 24),
}


@pytest.mark.parametrize("view", HEAD_VIEWS)
def test_strided_rows(backend, view):
    def viewed(function):
        return lambda x, weight: function(HEAD_VIEWS[view](x.unflatten(-1, (3, 4, 24))), weight)

    tensors = {"x": torch.randn(2, 5, 3 * 4 * 24), "weight": torch.randn(24)}
    check(viewed(rms_norm), viewed(naive), tensors, rounding=FLOAT_SLACK)
    assert viewed(rms_norm)(**tensors).is_contiguous()


@pytest.mark.triton
def test_the_activation_is_not_copied(triton_backend, monkeypatch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = torch.randn(2, 5, 3, 4, 24, device=device)
    x, grad = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    module._triton_forward(x, None, EPS)
    module._triton_backward(grad, x, None, EPS, True, False)


@pytest.mark.parametrize("shape", [(2, 3, 48), (3, 1100), (2, 3, 4, 16)])
def test_gradient_of_any_strides(backend, shape):
    tensors = make(shape, BRAIN, torch.float32)
    check_deterministic(rms_norm, tensors)
    check_expanded_gradient(rms_norm, tensors)
    row = torch.randn(shape[-1])
    wider = torch.randn(*shape[:-1], 3 * shape[-1])[..., : shape[-1]]
    for grad in (row.expand(shape), wider, wider.transpose(0, 1).contiguous().transpose(0, 1)):
        left = run(rms_norm, tensors, [grad])[1]
        right = run(rms_norm, tensors, [grad.contiguous()])[1]
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_many_rows_of_the_sum(backend, monkeypatch):
    """Each program of a small chip sums several tiles, the last one part of a tile."""
    monkeypatch.setattr(module, "processors", lambda capability: 1)
    tensors = make((603, 24))
    launch = module.backward_launch(603, 24, (8, 0))
    assert launch.programs > 1 and launch.rows_per_program > launch.block_r
    check(rms_norm, naive, tensors, rounding=FLOAT_SLACK)


def test_inputs_stay_and_the_output_is_new(backend):
    x = torch.randn(2, 3, 16)
    before = x.clone()
    rms_norm(x).fill_(7)
    assert torch.equal(x, before)


def test_only_the_gradients_that_are_needed(backend, monkeypatch):
    asked = []
    original = module._backward_op

    def spy(*args):
        asked.append(args[-2:])
        return original(*args)

    monkeypatch.setattr(module, "_backward_op", spy)
    tensors = make((2, 3, 16))
    for name, flags in {"x": (True, False), "weight": (False, True)}.items():
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        rms_norm(**leaves).sum().backward()
        assert asked.pop() == flags
        assert [n for n, t in leaves.items() if t.grad is not None] == [name]
        x, weight = tensors.values()
        results = original(torch.ones_like(x), x, weight, EPS, *flags)
        assert tuple(r.numel() > 0 for r in results) == flags


def test_only_the_inputs_are_saved(backend):
    leaves = {n: t.requires_grad_() for n, t in make((64, 128), BRAIN).items()}
    assert saved_bytes(lambda: rms_norm(**leaves)) == 64 * 128 * 2 + 128 * 2


def test_gradcheck_in_float64():
    tensors = make((2, 3, 5), torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(rms_norm, leaves)
    assert torch.autograd.gradcheck(rms_norm, leaves[:1])


def test_reference_is_an_oracle():
    x, weight = make((2, 4, 24), BRAIN).values()
    wanted = naive(x.double(), weight.double())
    torch.testing.assert_close(module.reference(x, weight, EPS, torch.float64), wanted)


@pytest.mark.parametrize("with_weight", [False, True])
def test_opcheck(backend, with_weight):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    x = torch.randn(2, 3, 4, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True) if with_weight else None
    torch.library.opcheck(module._forward_op, (x, weight, EPS), test_utils=tests)
    x, grad = x.detach().transpose(1, 2), torch.randn(2, 4, 3, 16)
    weight = None if weight is None else weight.detach()
    for flags in ((True, with_weight), (False, with_weight)):
        torch.library.opcheck(module._backward_op, (grad, x, weight, EPS, *flags), test_utils=tests)


def test_compiles_without_a_graph_break():
    check_compiled(rms_norm, make((2, 6, 16), BRAIN, torch.float32))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            x = torch.randn(2, length, 4, 16)
            torch.testing.assert_close(compiled(x, weight), rms_norm(x, weight))


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
    values, grad, weight = torch.randn(3, dim).half(), torch.randn(3, dim).half(), torch.ones(dim)
    x.copy_(values)
    assert torch.equal(rms_norm(x, weight), rms_norm(values, weight))
    # Two and three axes of rows: the last 64 of two rows side by side, turned every way.
    heads = storage.as_strided((3, 2, dim), (stride, dim, 1), 2**31 - 2 * dim)
    for view in (heads, heads.transpose(0, 1), heads[:, :, None].expand(3, 2, 2, dim)):
        assert torch.equal(rms_norm(view, weight), rms_norm(view.contiguous(), weight))
    for g, a in ((grad, x), (x, values), (x, x)):
        left = module._backward_op(g, a, weight, EPS, True, True)
        right = module._backward_op(g.contiguous(), a.contiguous(), weight, EPS, True, True)
        assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dim", [1, 7, 64, 128, 1024, 1536, 3072, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for rows in (1, 2, 1000, 32760, 75600 * 40, 2**31):
        forward = module.forward_launch(rows, dim, capability)
        backward = module.backward_launch(rows, dim, capability)
        for launch in (forward, backward):
            assert dim <= launch.block_d < 2 * dim + 1
            assert launch.num_warps in (4, 8, 16)
            elements = launch.block_r * launch.block_d
            assert 8 * 32 * launch.num_warps <= max(elements, 1024)
            assert elements <= 16 * 32 * launch.num_warps  # what keeps registers from spilling
            assert launch.rows_per_program % launch.block_r == 0
            assert (launch.programs - 1) * launch.rows_per_program < rows
            assert launch.programs * launch.rows_per_program >= rows
        assert backward.programs <= 8 * 170  # partial rows
        assert forward.rows_per_program <= 8 * forward.block_r


X = torch.zeros(2, 6, 8)
BAD = {
    "x is int64": dict(x=X.long()),
    "x has no axis": dict(x=torch.zeros(())),
    "x has D = 0": dict(x=X[..., :0]),
    "x is transposed": dict(x=torch.zeros(2, 8, 6).transpose(1, 2)),
    "x is a list": dict(x=[1.0]),
    "weight has another D": dict(weight=torch.ones(7)),
    "weight is [1, D]": dict(weight=torch.ones(1, 8)),
    "weight is int": dict(weight=torch.ones(8, dtype=torch.int32)),
    "weight is elsewhere": dict(weight=torch.ones(8, device="meta")),
    "eps is negative": dict(eps=-1.0),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    with pytest.raises(ValueError, match=rf"rms_norm: {case.split()[0]} is "):
        rms_norm(**({"x": X} | BAD[case]))


@st.composite
def arguments(draw):
    lead = draw(st.lists(st.integers(1, 5), max_size=4))
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    dtype, small = (draw(st.sampled_from(FLOATS)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make((*lead, dim), dtype, small, draw(st.booleans()))
    axes = (*draw(st.permutations(range(len(lead)))), len(lead))
    return tensors, axes, draw(st.sampled_from([1e-6, 1e-3]))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    tensors, axes, eps = case

    def strided(function):
        """Of rows with gaps between them and the axes in another order in memory."""

        def call(x, weight=None):
            wider = torch.cat([x, x, x], -1).permute(axes).contiguous()
            view = wider[..., : x.shape[-1]].permute(*(axes.index(i) for i in range(x.dim())))
            return function(view, weight, eps=eps)

        return call

    check(strided(rms_norm), strided(naive), tensors, rounding=FLOAT_SLACK)
