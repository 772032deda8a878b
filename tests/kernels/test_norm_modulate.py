"""norm_modulate: reference and Triton against plain PyTorch, every argument, every gradient."""

import importlib
import itertools

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
from prfl_fast.kernels import _rows, norm_modulate
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.norm_modulate")
HALF, BRAIN = torch.float16, torch.bfloat16
AFFINE = ((), ("weight",), ("bias",), ("weight", "bias"))
MODULATION = (
    (),
    ("scale",),
    ("shift",),
    ("scale", "shift"),
    ("scale_table", "shift_table"),
    ("scale", "shift_table"),
    ("scale", "shift", "scale_table", "shift_table"),
)


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def naive(x, weight=None, bias=None, kind="layer", row_index=None, eps=1e-6, **modulation):
    """The expression models write, with the rows expanded to tokens."""
    y, dim = wide(x), x.shape[-1:]
    w, b = (None if t is None else wide(t) for t in (weight, bias))
    if kind == "layer":
        y = F.layer_norm(y, dim, w, b, eps)
    else:
        y = F.rms_norm(y, dim, w, eps) if kind == "rms" else y if w is None else y * w
        y = y if b is None else y + b

    def expanded(name):
        table, rows = modulation.get(f"{name}_table"), modulation.get(name)
        total = 0.0 if table is None else wide(table)
        if rows is None:
            return total
        tokens = x.numel() // x.shape[-1]
        if row_index is None:
            index = torch.arange(tokens, device=x.device) // (tokens // len(rows))
        else:
            index = row_index.reshape(-1)
        return total + wide(rows)[index].reshape(x.shape)

    if modulation:
        y = y * (1 + expanded("scale")) + expanded("shift")
    return y.to(x.dtype)


def make(shape, names=MODULATION[-1], rows=1, dtype=torch.float32, small=None):
    """x of ``shape`` and the named tensors; ``small``: their dtype, x's unless given."""
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    for name in names:
        size = (rows, shape[-1]) if name in ("scale", "shift") else shape[-1:]
        tensors[name] = (torch.randn(size) * 0.5).to(small or dtype)
    return tensors


# Half-ulps of slack. A·w + B·b sums in another order than autograd does, which shows in float32;
# the interpreter truncates to bfloat16.
FLOAT_SLACK = 4.0


def rounding(backend, dtype):
    interpreted = backend == "triton" and INTERPRETING
    return {torch.float32: FLOAT_SLACK, BRAIN: 3.0 if interpreted else 1.0, HALF: 1.0}[dtype]


def both(**fixed):
    """``norm_modulate`` and ``naive`` with the same fixed arguments."""
    return (lambda **t: norm_modulate(**t, **fixed)), (lambda **t: naive(**t, **fixed))


@pytest.mark.parametrize(
    "affine, modulation, kind",
    [
        *itertools.product(AFFINE, MODULATION, ["layer"]),
        *itertools.product(AFFINE[::3], MODULATION[::3], ["rms", "none"]),
    ],
    ids=lambda part: part if isinstance(part, str) else "+".join(part),
)
def test_every_combination_of_arguments(backend, affine, modulation, kind):
    length = 1 if backend == "triton" else 3  # a token takes the interpreter 20 ms
    tensors = make((2, length, 33), affine + modulation, rows=2)
    check(*both(kind=kind), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
@pytest.mark.parametrize(
    "shape", [(1, 1, 7), (1, 64), (3, 65), (1, 5, 96), (2, 3, 1536), (1, 2, 5120), (2, 0, 64)]
)
def test_shapes(backend, shape, dtype):
    check(*both(), make(shape, dtype=dtype), rounding=rounding(backend, dtype))


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_rows_are_frames_samples_or_tokens(backend, rows):
    check(*both(), make((2, 3, 40), rows=rows), rounding=FLOAT_SLACK)
    tensors = make((6, 40), ("weight", "scale"), rows=rows)
    check(*both(kind="rms"), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize(
    "shape, rows, index",
    [((2, 4, 40), 5, torch.int64), ((8, 40), 12, torch.int32), ((2, 2, 40), 1, torch.int32)],
)
def test_row_index(backend, shape, rows, index):
    """Rows in any order, some without a token."""
    row_index = torch.randint(0, rows, shape[:-1]).to(index)
    for names in (AFFINE[-1] + MODULATION[-1], ("shift",)):
        tensors = make(shape, names, rows)
        check(*both(row_index=row_index), tensors, rounding=FLOAT_SLACK)


def test_row_index_names_what_the_rule_would(backend):
    tensors = make((2, 6, 48), rows=4)
    row_index = (torch.arange(12) // 3).reshape(2, 6)
    left, left_grads = run(norm_modulate, tensors, [torch.ones(2, 6, 48)])
    right, right_grads = run(both(row_index=row_index)[0], tensors, [torch.ones(2, 6, 48)])
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(left_grads, right_grads)


@pytest.mark.parametrize(
    "dtype, small", [(BRAIN, torch.float32), (HALF, BRAIN), (torch.float32, BRAIN)]
)
def test_mixed_dtypes(backend, dtype, small):
    """Each result has its tensor's dtype, as in a bfloat16 model with float32 norms."""
    tensors = make((2, 4, 72), AFFINE[-1] + MODULATION[-1], 2, dtype, small)
    check(*both(), tensors, rounding=FLOAT_SLACK)


def test_float64_is_computed_in_float64(backend):
    tensors = make((2, 4, 24), AFFINE[-1] + MODULATION[-1], 2, torch.float64, torch.float64)
    torch.testing.assert_close(norm_modulate(**tensors), naive(**tensors), rtol=1e-13, atol=1e-13)


def test_large_offset_does_not_cancel(backend):
    """The variance is that of centred values: a mean of 1000 leaves it exact to float32."""
    tensors = make((4, 256), ("scale", "shift"))
    tensors["x"] += 1000
    check(*both(), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_strided_tokens_and_rows(backend, rows):
    """A slice of a packed projection, every other token of it, and rows sliced from [R, 6, D]."""

    def packed(function):
        def apply(x, modulation):
            shift, scale, *_ = modulation.unbind(1)
            part = x.unflatten(-1, (3, -1))[:, ::2, 1]
            assert not part.is_contiguous() and (rows == 1 or not scale.is_contiguous())
            return function(part, scale=scale, shift=shift)

        return apply

    tensors = {"x": torch.randn(2, 8, 3 * 40), "modulation": torch.randn(rows, 6, 40)}
    check(packed(norm_modulate), packed(naive), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("shape", [(2, 2, 48), (4, 48)])
def test_gradient_of_any_strides(backend, shape):
    tensors = make(shape, AFFINE[-1] + MODULATION[-1], rows=2)
    check_deterministic(norm_modulate, tensors)
    check_expanded_gradient(norm_modulate, tensors)
    row = torch.randn(shape[-1])
    left = run(norm_modulate, tensors, [row.expand(shape)])[1]
    right = run(norm_modulate, tensors, [row.expand(shape).contiguous()])[1]
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_same_bits_twice_with_a_row_index(backend):
    row_index = torch.randint(0, 3, (2, 5))
    check_deterministic(both(row_index=row_index)[0], make((2, 5, 48), rows=3))


def test_inputs_stay_and_the_output_is_new(backend):
    x = torch.randn(2, 3, 16)
    before = x.clone()
    norm_modulate(x, kind="none").fill_(7)
    assert torch.equal(x, before)
    transposed = torch.randn(3, 2, 16).transpose(0, 1)
    for kind in ("layer", "rms", "none"):
        y = norm_modulate(transposed, kind=kind)
        assert y.is_contiguous() and y.data_ptr() != transposed.data_ptr()


def test_only_the_gradients_that_are_needed(backend, monkeypatch):
    """A frozen reward model asks for d_x alone, a frozen first block for the rows alone."""
    asked = []
    original = module._backward_op

    def spy(*args):
        asked.append(args[-3:])
        return original(*args)

    monkeypatch.setattr(module, "_backward_op", spy)
    tensors = make((2, 3, 16), ("weight", "bias", "scale", "shift"), rows=2)
    expected = {
        "x": (True, False, False),
        "weight": (False, True, False),
        "bias": (False, False, True),
        "scale": (False, True, True),  # the bias is scaled too
        "shift": (False, False, True),
    }
    for name, flags in expected.items():
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        norm_modulate(**leaves).sum().backward()
        assert asked.pop() == flags, name
        assert [n for n, t in leaves.items() if t.grad is not None] == [name]
    for flags in itertools.product((False, True), repeat=3):
        x = torch.randn(2, 3, 16)
        args = (torch.ones_like(x), x, None, None, None, None, 1, "layer", 1e-6)
        for result, needed in zip(original(*args, *flags), flags, strict=True):
            assert (result.numel() > 0) == needed


def test_only_the_inputs_are_saved():
    x, scale, shift = torch.randn(2, 8, 64).bfloat16(), torch.randn(2, 64), torch.randn(2, 64)
    leaves = [t.requires_grad_() for t in (x, scale, shift)]
    saved = saved_bytes(lambda: norm_modulate(leaves[0], scale=leaves[1], shift=leaves[2]))
    assert saved == x.nbytes + scale.nbytes  # the shift is not needed again


def test_the_expression_of_diffusers():
    """(norm(x.float()) * (1 + scale) + shift).type_as(x), in a bfloat16 Wan block's layout."""
    normalization = pytest.importorskip("diffusers.models.normalization")

    def block(x, table, time):
        norm = normalization.FP32LayerNorm(x.shape[-1], 1e-6, elementwise_affine=False)
        if x.dtype == torch.float64:
            norm.forward = lambda t: F.layer_norm(t, t.shape[-1:], eps=1e-6)
        shift, scale, *_ = (table + wide(time)).chunk(6, dim=1)
        return (norm(wide(x)) * (1 + scale) + shift).type_as(x)

    def ours(x, table, time):
        shift, scale, *_ = time.unbind(1)
        shift_table, scale_table, *_ = table[0].unbind(0)
        return norm_modulate(
            x, scale=scale, shift=shift, scale_table=scale_table, shift_table=shift_table
        )

    tensors = {
        "x": torch.randn(2, 10, 64).bfloat16(),
        "table": torch.randn(1, 6, 64),
        "time": torch.randn(2, 6, 64).bfloat16(),
    }
    check(ours, block, tensors)


def test_gradcheck_in_float64():
    names = AFFINE[-1] + MODULATION[-1]
    for kind, row_index in (("layer", None), ("rms", None), ("layer", torch.randint(0, 2, (2, 4)))):
        tensors = make((2, 4, 5), names, 2, torch.float64)
        leaves = [t.requires_grad_() for t in tensors.values()]

        def function(*values, kind=kind, row_index=row_index):
            arguments = dict(zip(("x", *names), values, strict=True))
            return norm_modulate(**arguments, kind=kind, row_index=row_index)

        torch.autograd.gradcheck(function, leaves)


def test_reference_is_an_oracle():
    tensors = make((2, 4, 24), (), 2, BRAIN)
    args = (tensors["x"], *(None,) * 7, "layer", 1e-6)
    wanted = naive(tensors["x"].double())
    torch.testing.assert_close(module.reference(*args, upcast=torch.float64), wanted)


def test_opcheck(backend):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    x, row_index = torch.randn(2, 2, 16), torch.randint(0, 2, (2, 2))
    w, b, s, h = (torch.randn(n, requires_grad=True) for n in ((16,), (16,), (2, 16), (2, 16)))
    x.requires_grad_()
    for index, flags in ((None, (True, True, True)), (row_index, (False, True, False))):
        inputs = (x, w, b, s, h, w, b, index, "layer", 1e-6)
        torch.library.opcheck(module._forward_op, inputs, test_utils=tests)
        inputs = (torch.randn(2, 2, 16), x.detach(), w.detach(), s.detach(), None, index)
        torch.library.opcheck(
            module._backward_op, (*inputs, 2, "rms", 1e-6, *flags), test_utils=tests
        )


def test_compiles_without_a_graph_break():
    check_compiled(norm_modulate, make((2, 6, 16), AFFINE[-1] + MODULATION[-1], rows=2))
    row_index = torch.randint(0, 3, (2, 6))
    check_compiled(both(row_index=row_index)[0], make((2, 6, 16), rows=3))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(norm_modulate, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            x, scale = torch.randn(2, length, 16), torch.randn(2, 16)
            torch.testing.assert_close(compiled(x, scale=scale), norm_modulate(x, scale=scale))


@pytest.mark.triton
def test_offsets_past_int32(triton_backend, tmp_path):
    """Token 2 at 2·2³⁰ elements: 32 bits would read the zeros at the start of this sparse file."""
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 8 GiB")
    stride, dim = 2**30, 64
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * 2**32)
    storage = torch.from_file(str(path), shared=True, size=2**32, dtype=HALF)
    x = storage.as_strided((3, dim), (stride, 1), 2**31 - dim)
    values = torch.randn(3, dim).half()
    x.copy_(values)
    assert torch.equal(norm_modulate(x), norm_modulate(values))
    grad = torch.randn(3, dim).half()
    flags = (None, None, None, None, 1, "layer", 1e-6, True, True, True)
    for strided, dense in ((x, values), (x[None].transpose(0, 1), values[None].transpose(0, 1))):
        left = module._backward_op(grad.view(dense.shape), strided, *flags)
        right = module._backward_op(grad.view(dense.shape), dense.contiguous(), *flags)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in ((1, 1), (2, 2), (32760, 1), (32760, 21), (75600, 75600), (10**6, 3)):
        forward, bare = (
            module.forward_launch(tokens, dim, kind, capability) for kind in ("layer", "none")
        )
        backward = [
            module.backward_launch(tokens, rows, dim, itemsize, capability, sums)
            for itemsize, sums in itertools.product((2, 4), (False, True))
        ]
        for launch in (forward, bare, *backward):
            threads, elements = 32 * launch.num_warps, launch.head + launch.tail
            assert dim <= elements < max(2 * dim, 65)
            assert launch.num_warps in (1, 2, 4, 8, 16)
            assert min(launch.head, launch.tail) >= threads  # a piece is at least one each
            assert elements <= 20 * threads  # what keeps registers from spilling
            assert 1 <= launch.programs <= max(1, tokens)
        assert tokens <= forward.programs * -(-tokens // forward.programs)
        assert all(launch.programs <= max(1, tokens // rows) for launch in backward)
        assert all(launch.head + launch.tail <= 512 * launch.num_warps for launch in backward[1::2])
    # A million tokens write no more partial rows than thirty thousand.
    many, few = (module.backward_launch(n, 1, dim, 2, capability, True) for n in (10**6, 32760))
    assert many == few
    # Two programs a processor of the forward at Wan's largest D, in the registers of 16 warps.
    wide_launch = module.forward_launch(32760, 5120, "rms", capability)
    assert (wide_launch.num_warps, wide_launch.registers) == (8, 128)


def test_token_strides_spare_the_division():
    x = torch.randn(3, 4, 5)
    assert _rows.token_strides(x[0]) == (0, 5, None)
    assert _rows.token_strides(x) == (20, 5, None)
    assert _rows.token_strides(x[:1, ::2]) == (20, 10, None)
    assert _rows.token_strides(x[:, ::2]) == (20, 10, None)
    assert _rows.token_strides(x[:, :3]) == (20, 5, 3)
    assert _rows.token_strides(x.transpose(0, 1)) == (5, 20, 3)


X = torch.zeros(2, 6, 8)
BAD = {
    "x is int64": dict(x=X.long()),
    "x has one axis": dict(x=X[0, 0]),
    "x has four axes": dict(x=X[None]),
    "x has D = 0": dict(x=X[..., :0]),
    "x is transposed": dict(x=torch.zeros(2, 8, 6).transpose(1, 2)),
    "x is a list": dict(x=[1.0]),
    "weight has another D": dict(weight=torch.ones(7)),
    "bias is [1, D]": dict(bias=torch.ones(1, 8)),
    "scale_table is int": dict(scale_table=torch.ones(8, dtype=torch.int32)),
    "shift_table is [2, D]": dict(shift_table=torch.ones(2, 8)),
    "scale is [D]": dict(scale=torch.ones(8)),
    "scale has another D": dict(scale=torch.ones(2, 9)),
    "scale is strided": dict(scale=torch.ones(8, 2).t()),
    "scale has no row": dict(scale=torch.ones(0, 8)),
    "scale does not divide": dict(scale=torch.ones(5, 8)),
    "shift has other rows": dict(scale=torch.ones(2, 8), shift=torch.ones(4, 8)),
    "scale is elsewhere": dict(scale=torch.ones(2, 8, device="meta")),
    "row_index is float": dict(scale=torch.ones(2, 8), row_index=torch.zeros(2, 6)),
    "row_index has other shape": dict(
        scale=torch.ones(2, 8), row_index=torch.zeros(12, dtype=torch.int64)
    ),
    "row_index has no rows": dict(row_index=torch.zeros(2, 6, dtype=torch.int64)),
    "row_index is past R": dict(
        scale=torch.ones(2, 8), row_index=torch.full((2, 6), 2, dtype=torch.int64)
    ),
    "row_index is negative": dict(
        shift=torch.ones(2, 8), row_index=torch.full((2, 6), -1, dtype=torch.int64)
    ),
    "kind is batch": dict(kind="batch"),
    "eps is negative": dict(eps=-1.0),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    argument = next(a for a in case.split() if a)
    with pytest.raises(ValueError, match=rf"\b{argument} is "):
        norm_modulate(**({"x": X} | BAD[case]))


@st.composite
def arguments(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    tokens = batch * length
    affine, modulation = draw(st.sampled_from(AFFINE)), draw(st.sampled_from(MODULATION))
    flat, indexed = draw(st.booleans()), draw(st.booleans()) and {"scale", "shift"} & {*modulation}
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    rows = draw(st.integers(1, 9)) if indexed else draw(st.sampled_from(divisors))
    dtype, small = (draw(st.sampled_from([torch.float32, BRAIN, HALF])) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (tokens, dim) if flat else (batch, length, dim)
    fixed = {
        "kind": draw(st.sampled_from(module.KINDS)),
        "eps": draw(st.sampled_from([1e-6, 1e-3])),
    }
    if indexed:
        fixed["row_index"] = torch.randint(0, rows, shape[:-1])
    return make(shape, affine + modulation, rows, dtype, small), fixed


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    tensors, fixed = case
    check(*both(**fixed), tensors, rounding=FLOAT_SLACK)
