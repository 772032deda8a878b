"""gated_residual: reference and Triton against plain PyTorch, every argument, every gradient."""

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
    run,
    saved_bytes,
    wide,
)

import prfl_fast.kernels as kernels
from prfl_fast.kernels import _rows, gated_residual
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.gated_residual")
HALF, BRAIN = torch.float16, torch.bfloat16
GATES = ((), ("gate",), ("gate_table",), ("gate", "gate_table"))


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def expand(rows, table, x, row_index):
    """table + rows, one vector for every token: what the operation never builds."""
    tokens, dim = x.numel() // x.shape[-1], x.shape[-1]
    total = torch.zeros(tokens, dim, dtype=wide(x).dtype, device=x.device)
    total = total if table is None else total + wide(table)
    if rows is not None:
        if row_index is None:
            named = torch.arange(tokens, device=x.device) // max(1, tokens // len(rows))
        else:
            named = row_index.flatten()
        total = total + wide(rows)[named]
    return total.view(x.shape)


def naive(x, y, gate=None, gate_table=None, row_index=None):
    product = wide(y)
    if gate is not None or gate_table is not None:
        product = product * expand(gate, gate_table, x, row_index)
    return (wide(x) + product).to(x.dtype)


def make(shape, names=GATES[-1], rows=1, dtype=torch.float32, y_dtype=None, small=torch.float32):
    """x and y of ``shape`` and the named tensors of dtype ``small``."""
    tensors = {"x": torch.randn(shape).to(dtype), "y": torch.randn(shape).to(y_dtype or dtype)}
    for name in names:
        size = (rows, shape[-1]) if name == "gate" else shape[-1:]
        tensors[name] = (0.5 * torch.randn(size)).to(small)
    return tensors


# Half-ulps of slack: in float32 for other orders of summation, in bfloat16 because the interpreter
# truncates.
FLOAT_SLACK = 4.0


def rounding(backend, *dtypes):
    return 3.0 if backend == "triton" and INTERPRETING and BRAIN in dtypes else 1.0


def both(**fixed):
    return (lambda **t: gated_residual(**t, **fixed)), (lambda **t: naive(**t, **fixed))


@pytest.mark.parametrize("names", GATES, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 64), (2, 3, 33), (1, 2, 1536), (1, 2, 5120), (2, 0, 64)]
)
def test_shapes(backend, shape, dtype, names):
    check(*both(), make(shape, names, 1, dtype), rounding=rounding(backend, dtype))


@pytest.mark.parametrize("rows", [1, 2, 4, 6, 12])
def test_rows_are_samples_frames_or_tokens(backend, rows):
    for shape in ((2, 6, 40), (12, 40)):
        check(*both(), make(shape, rows=rows), rounding=FLOAT_SLACK)


@pytest.mark.parametrize(
    "shape, rows, dtype",
    [((2, 4, 40), 5, torch.int64), ((8, 40), 12, torch.int32), ((2, 2, 40), 1, torch.int32)],
)
def test_row_index(backend, shape, rows, dtype):
    """Rows in any order, some without a token."""
    row_index = torch.randint(0, rows, shape[:-1]).to(dtype)
    for names in GATES[1::2]:
        check(*both(row_index=row_index), make(shape, names, rows), rounding=FLOAT_SLACK)


@pytest.mark.parametrize(
    "dtype, y_dtype, small",
    [
        (BRAIN, torch.float32, torch.float32),
        (torch.float32, BRAIN, BRAIN),
        (HALF, BRAIN, HALF),
        (BRAIN, BRAIN, BRAIN),
    ],
)
def test_mixed_dtypes(backend, dtype, y_dtype, small):
    for names in (GATES[0], GATES[-1]):
        tensors = make((2, 4, 72), names, 2, dtype, y_dtype, small)
        check(*both(), tensors, rounding=rounding(backend, dtype, y_dtype, small) + 1)


def test_float64_is_computed_in_float64(backend):
    tensors = make((2, 4, 24), GATES[-1], 2, torch.float64, None, torch.float64)
    torch.testing.assert_close(gated_residual(**tensors), naive(**tensors), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_slices_of_packed_tensors(backend, rows):
    """x and y from one projection, every other token; gates sliced from Wan's [R, 6, D]."""

    def packed(function):
        def apply(xy, modulation, table):
            x, y = xy.unflatten(-1, (2, -1))[:, ::2].unbind(2)
            assert not x.is_contiguous()
            return function(x, y, modulation.unbind(1)[2], gate_table=table[2])

        return apply

    tensors = {
        "xy": torch.randn(2, 8, 2 * 40),
        "modulation": torch.randn(rows, 6, 40),
        "table": torch.randn(6, 40),
    }
    check(packed(gated_residual), packed(naive), tensors, rounding=FLOAT_SLACK)


def test_transposed_tokens(backend):
    tensors = {n: torch.randn(3, 2, 16) for n in "xy"} | {"gate": torch.randn(2, 16)}

    def turned(function):
        return lambda x, y, gate: function(x.transpose(0, 1), y.transpose(0, 1), gate)

    check(turned(gated_residual), turned(naive), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("shape", [(2, 2, 48), (4, 48)])
def test_gradient_of_any_strides(backend, shape):
    for fixed in ({}, {"row_index": torch.randint(0, 2, shape[:-1])}):
        tensors = make(shape, rows=2, dtype=BRAIN)
        check_deterministic(both(**fixed)[0], tensors)
        check_expanded_gradient(both(**fixed)[0], tensors)
    row = torch.randn(shape[-1])
    tensors = make(shape, rows=2)
    left = run(gated_residual, tensors, [row.expand(shape)])[1]
    right = run(gated_residual, tensors, [row.expand(shape).contiguous()])[1]
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_inputs_stay_and_the_output_is_new(backend):
    for names in GATES:
        tensors = make((2, 3, 16), names, 2)
        before = {n: t.clone() for n, t in tensors.items()}
        gated_residual(**tensors).fill_(7)
        grad = torch.randn(2, 3, 16)
        kept = grad.clone()
        run(gated_residual, tensors, [grad])
        assert all(torch.equal(t, before[n]) for n, t in tensors.items())
        assert torch.equal(grad, kept)
        x = torch.randn(3, 2, 16).transpose(0, 1)
        assert gated_residual(x, x).is_contiguous()


def test_only_the_gradients_that_are_needed(backend, monkeypatch):
    asked = []
    original = module._backward_op

    def spy(*args):
        asked.append(args[-2:])
        return original(*args)

    monkeypatch.setattr(module, "_backward_op", spy)
    tensors = make((2, 3, 16), rows=2)
    expected = {"x": [], "y": [(True, False)], "gate": [(False, True)]}
    for name, flags in (expected | {"gate_table": expected["gate"]}).items():
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in tensors.items()}
        gated_residual(**leaves).sum().backward()
        assert asked == flags, name
        asked.clear()
        assert [n for n, t in leaves.items() if t.grad is not None] == [name]
    grad, y, gate = torch.randn(2, 3, 16), tensors["y"], tensors["gate"]
    for flags in itertools.product((False, True), repeat=2):
        for result, needed in zip(
            original(grad, y, gate, None, None, BRAIN, *flags), flags, strict=True
        ):
            assert (result.numel() > 0) == needed


def test_without_a_gate_the_backward_op_copies(backend):
    grad = torch.randn(2, 3, 16)
    d_y, d_gate = module._backward_op(grad, None, None, None, None, torch.float32, True, True)
    assert torch.equal(d_y, grad) and d_y.data_ptr() != grad.data_ptr() and d_gate.numel() == 0


def test_saved_bytes():
    def kept(frozen=(), names=()):
        tensors = make((1, 256, 128), names, 1, BRAIN)
        leaves = {n: t.requires_grad_(n not in frozen) for n, t in tensors.items()}
        return saved_bytes(lambda: gated_residual(**leaves))

    tokens, row = 256 * 128 * 2, 128 * 4
    assert kept() == 0
    assert kept(names=("gate",)) == tokens + row
    assert kept(("gate",), ("gate",)) == row


def test_gradcheck_in_float64():
    for fixed in ({}, {"row_index": torch.randint(0, 2, (2, 2))}):
        tensors = make((2, 2, 5), GATES[-1], 2, torch.float64, None, torch.float64)
        names = list(tensors)

        def function(*values, names=names, fixed=fixed):
            return gated_residual(**dict(zip(names, values, strict=True)), **fixed)

        assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_reference_is_an_oracle():
    tensors = make((2, 4, 12), ("gate",), 2, BRAIN)
    exact = naive(**{n: t.double() for n, t in tensors.items()})
    found = module.reference(*tensors.values(), None, None, upcast=torch.float64)
    torch.testing.assert_close(found, exact)


def test_opcheck(backend):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    tensors = {n: t.requires_grad_() for n, t in make((2, 2, 16), rows=3).items()}
    row_index = torch.randint(0, 3, (2, 2))
    x, y, gate, table = tensors.values()
    torch.library.opcheck(module._forward_op, (x, y, gate, table, row_index), test_utils=tests)
    torch.library.opcheck(module._forward_op, (x, y, None, None, None), test_utils=tests)
    _, y, gate, table = (t.detach() for t in tensors.values())
    grad = torch.randn(2, 2, 16).transpose(0, 1)
    for given_gate, flags in itertools.product((gate, None), ((True, True), (True, False))):
        inputs = (grad, y, given_gate, table, row_index, BRAIN, *flags)
        torch.library.opcheck(module._backward_op, inputs, test_utils=tests)


def test_compiles_without_a_graph_break():
    check_compiled(gated_residual, make((2, 6, 16), rows=2))
    check_compiled(both(row_index=torch.randint(0, 3, (2, 6)))[0], make((2, 6, 16), rows=3))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(gated_residual, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            tensors = make((2, length, 16), ("gate",), 2)
            torch.testing.assert_close(compiled(**tensors), gated_residual(**tensors))


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
    far = storage.as_strided((3, dim), (stride, 1), 2**31 - dim)
    values, other, gate = torch.randn(3, dim).half(), torch.randn(3, dim).half(), torch.randn(3, 64)
    far.copy_(values)
    for strided, dense in ((far, values), (far[None].transpose(0, 1), values[:, None])):
        near = other.view(dense.shape)
        for left, right in (((strided, near), (dense, near)), ((near, strided), (near, dense))):
            assert torch.equal(gated_residual(*left, gate), gated_residual(*right, gate))
            fixed = (gate, None, None, HALF, True, True)
            for a, b in zip(
                module._backward_op(*left, *fixed), module._backward_op(*right, *fixed), strict=True
            ):
                assert torch.equal(a, b)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 5000, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in ((1, 1), (2, 2), (32760, 1), (32760, 21), (75600, 75600), (10**6, 3)):
        forward = module.forward_launch(tokens, dim, capability)
        backward = [module.backward_launch(tokens, rows, dim, capability, s) for s in (0, 1)]
        for launch in (forward, *backward):
            assert dim <= launch.block_d * launch.chunks < max(2 * dim, 64)
            assert launch.num_warps in (1, 2, 4) and launch.block_d <= 8 * 32 * launch.num_warps
        assert 1 <= forward.programs <= tokens <= forward.programs * -(-tokens // forward.programs)
        assert all(1 <= b.programs <= max(1, tokens // rows) for b in backward)
    # A million tokens write no more partial rows than thirty thousand.
    many, few = (module.backward_launch(n, 1, dim, capability, True) for n in (10**6, 32760))
    assert many == few


def test_common_rows():
    assert _rows.common_rows(4, 6, None) == 12
    assert _rows.common_rows(1, 5, None) == _rows.common_rows(5, 1, torch.zeros(3)) == 5
    assert _rows.common_rows(4, 6, torch.zeros(3)) == 4
    assert _rows.row_group(12, 4) == 3 and _rows.row_group(4, 6) == 1
    partial = torch.randn(4, 3, 8)
    torch.testing.assert_close(_rows.fold_rows(partial, 2)[0], partial[:2].sum((0, 1)))
    assert torch.equal(_rows.fold_rows(partial, 6)[4:], torch.zeros(2, 8))


BAD = [
    ({"x": torch.ones(2, 6, 8, dtype=torch.int64)}, "x is int64"),
    ({"y": torch.ones(2, 3, 8)}, r"y is float32\[2, 3, 8\].*\[2, 6, 8\]"),
    ({"y": torch.ones(2, 8, 6).transpose(1, 2)}, "y is .*contiguous last axis"),
    ({"y": torch.ones(2, 6, 8, device="meta")}, "y is .*meta.*on cpu"),
    ({"gate": torch.ones(5, 8)}, r"gate is float32\[5, 8\].*12 tokens"),
    ({"gate": torch.ones(2, 1, 8)}, r"gate is float32\[2, 1, 8\].*\[R, 8\]"),
    ({"gate_table": torch.ones(1, 8)}, r"gate_table is float32\[1, 8\].*\[8\]"),
    ({"row_index": torch.zeros(12, dtype=torch.int64)}, r"row_index is int64\[12\]"),
    ({"row_index": torch.zeros(2, 6)}, "row_index is .*int32 or int64"),
    ({"gate": None, "row_index": torch.zeros(2, 6).long()}, "row_index is .*None without gate"),
    ({"row_index": torch.full((2, 6), 2)}, r"row_index is .*\[0, 2\)"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        gated_residual(**(make((2, 6, 8), ("gate",), 2) | change))


@st.composite
def arguments(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    dim, tokens = draw(st.integers(1, 130)), batch * length
    names = draw(st.sampled_from(GATES))
    flat, indexed = draw(st.booleans()), draw(st.booleans()) and "gate" in names
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    rows = draw(st.integers(1, 9)) if indexed else draw(st.sampled_from(divisors))
    dtypes = [draw(st.sampled_from([torch.float32, BRAIN, HALF])) for _ in range(3)]
    strided = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (tokens, dim) if flat else (batch, length, dim)
    tensors = make(shape, names, rows, *dtypes)
    fixed = {"row_index": torch.randint(0, rows, shape[:-1])} if indexed else {}
    if strided:
        tensors |= {n: torch.stack([tensors[n]] * 2, -2)[..., 0, :] for n in "xy"}
    return tensors, fixed


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    tensors, fixed = case
    check(*both(**fixed), tensors, rounding=FLOAT_SLACK)
