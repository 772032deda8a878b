"""residual_norm_modulate: reference and Triton against plain PyTorch, the sum and its norm."""

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
from torch.nn import functional as F

import prfl_fast.kernels as kernels
from prfl_fast.kernels import _pieces, gated_residual, norm_modulate, residual_norm_modulate
from prfl_fast.kernels._triton import INTERPRETING

module = importlib.import_module("prfl_fast.kernels.residual_norm_modulate")
EPS = 1e-6
HALF, BRAIN = torch.float16, torch.bfloat16


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
    if rows is None and table is None:
        return None
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


def rounded(value, dtype):
    """``value.to(dtype)``, or cut off as the interpreter does it: gradients see x_out as it is."""
    if dtype == BRAIN and INTERPRETING and kernels.get_backend() == "triton":
        cut = (value.detach().view(torch.int32) & -65536).view(torch.float32)
        value = value + (cut - value).detach()
    return value.to(dtype)


def naive(
    x, y, gate=None, weight=None, bias=None, gate_table=None, scale=None, shift=None,
    scale_table=None, shift_table=None, row_index=None, kind="layer", eps=EPS,
):  # fmt: skip
    vector = expand(gate, gate_table, x, row_index)
    x_out = rounded(wide(x) + (wide(y) if vector is None else wide(y) * vector), x.dtype)
    h, dim = wide(x_out), x.shape[-1:]
    weight, bias = (None if t is None else wide(t) for t in (weight, bias))
    if kind == "layer":
        h = F.layer_norm(h, dim, weight, bias, eps)
    else:
        h = (
            F.rms_norm(h, dim, weight, eps)
            if kind == "rms"
            else h
            if weight is None
            else h * weight
        )
        h = h if bias is None else h + bias
    scale = expand(scale, scale_table, x, row_index)
    shift = expand(shift, shift_table, x, row_index)
    h = h if scale is None else h * (1 + scale)
    h = h if shift is None else h + shift
    return x_out, h.to(x.dtype)


def make(shape, dtype=torch.float32, y_dtype=None, small=torch.float32, **parts):
    """x, y and what ``parts`` names: a number of rows for gate, scale, shift; True for vectors."""
    tensors = {
        "x": (torch.randn(shape) + 0.5).to(dtype), "y": torch.randn(shape).to(y_dtype or dtype)
    }  # fmt: skip
    for name, value in parts.items():
        part = 0.5 * torch.randn(shape[-1] if value is True else (value, shape[-1]))
        tensors[name] = (part + (name == "weight")).to(small)
    return tensors


FLOAT_SLACK = 4.0  # half-ulps, for other orders of summation


def rounding(backend, *dtypes):
    """The interpreter truncates to bfloat16, x_out before h is computed from it."""
    return 4.0 if backend == "triton" and INTERPRETING and BRAIN in dtypes else FLOAT_SLACK


def both(**fixed):
    ours = lambda **t: residual_norm_modulate(**t, **fixed)  # noqa: E731
    return ours, (lambda **t: naive(**t, **fixed))


AFFINE = {"weight": True, "bias": True}
TABLES = {"gate_table": True, "scale_table": True, "shift_table": True}
# The joints of a Wan block: after the self-attention, and after the cross-attention.
FIRST = {"gate": 2, "gate_table": True} | AFFINE
SECOND = {"scale": 2, "shift": 2, "scale_table": True, "shift_table": True}
ALL = {"gate": 2, "scale": 2, "shift": 2} | AFFINE | TABLES
PARTS = [
    {}, AFFINE, {"gate": 2}, {"gate_table": True, "weight": True}, FIRST, SECOND, ALL,
    {"gate": 2, "scale": 2}, {"gate": 2, "shift": 2, "bias": True},
    {"scale_table": True, "shift_table": True, "weight": True},
]  # fmt: skip


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: "+".join(parts) or "none")
@pytest.mark.parametrize("kind", module.KINDS)
def test_every_kind_with_any_arguments(backend, kind, parts):
    check(*both(kind=kind), make((2, 2, 33), **parts), rounding=FLOAT_SLACK)


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
@pytest.mark.parametrize(
    "shape", [(1, 1, 7), (1, 64), (3, 65), (1, 3, 96), (1, 2, 1536), (1, 2, 5120), (2, 0, 64)]
)
def test_shapes(backend, shape, dtype):
    parts = {n: 1 if n in ("gate", "scale", "shift") else v for n, v in ALL.items()}
    check(*both(), make(shape, dtype, **parts), rounding=rounding(backend, dtype))


def test_a_token_too_wide_for_one_pass(backend):
    """Past 12 elements a thread the backward runs in three passes."""
    check(*both(), make((2, 8000), **ALL), rounding=FLOAT_SLACK)
    check(*both(), make((2, 8000), **AFFINE), rounding=FLOAT_SLACK)


@pytest.mark.parametrize(
    "gate, rows", [(1, 2), (2, 1), (6, 12), (12, 6), (4, 6), (3, 4), (1, 12), (12, 1), (12, 12)]
)
def test_numbers_of_rows(backend, gate, rows):
    """By sample, frame or token, the gate's other than the norm's, even if neither divides."""
    tensors = make((2, 6, 40), gate=gate, scale=rows, shift=rows, gate_table=True)
    check(*both(), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize(
    "shape, dtype, parts",
    [
        ((2, 4, 40), torch.int64, {"gate": 5, "scale": 5, "shift": 5} | AFFINE),
        ((8, 40), torch.int32, {"gate": 12, "scale_table": True}),
        ((8, 40), torch.int32, {"gate_table": True, "scale": 5}),
        ((8, 40), torch.int64, {"gate": 5, "scale": 7} | TABLES),
        ((8, 40), torch.int64, {"gate": 7, "shift": 5}),
        ((2, 2, 40), torch.int32, {"gate": 1, "scale": 1}),
    ],
)
def test_row_index(backend, shape, dtype, parts):
    """Rows in any order, some without a token, some of one tensor that the other does not have."""
    rows = min(n for n in parts.values() if n is not True)
    row_index = torch.randint(0, rows, shape[:-1]).to(dtype)
    check(*both(row_index=row_index), make(shape, **parts), rounding=FLOAT_SLACK)


@pytest.mark.parametrize(
    "dtype, y_dtype, small",
    [
        (BRAIN, torch.float32, torch.float32),
        (torch.float32, BRAIN, torch.float32),
        (HALF, torch.float32, BRAIN),
        (BRAIN, BRAIN, BRAIN),
    ],
)
def test_mixed_dtypes(backend, dtype, y_dtype, small):
    for parts in (ALL, {}):
        tensors = make((2, 3, 72), dtype, y_dtype, small, **parts)
        check(*both(), tensors, rounding=rounding(backend, dtype, y_dtype, small))


def test_float64_is_computed_in_float64(backend):
    tensors = make((2, 4, 24), torch.float64, None, torch.float64, **ALL)
    for ours, plain in zip(residual_norm_modulate(**tensors), naive(**tensors), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-13, atol=1e-13)


def test_h_is_the_norm_of_the_rounded_sum(backend):
    tensors = make((2, 3, 64), BRAIN, gate=2, scale=2, shift=2)
    x_out, h = residual_norm_modulate(**tensors)
    gate = tensors.pop("gate")
    assert torch.equal(x_out, gated_residual(tensors["x"], tensors["y"], gate))
    norm = norm_modulate(x_out, scale=tensors["scale"], shift=tensors["shift"])
    torch.testing.assert_close(h, norm, rtol=2**-7, atol=1e-6)  # one ulp: the sums' order differs


def test_large_offset_does_not_cancel(backend):
    """The variance is that of centred values: a mean of 1000 leaves it exact to float32."""
    tensors = make((2, 256), gate=2, scale=2)
    tensors["x"] += 1000
    check(*both(), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("parts", [AFFINE, ALL, {}], ids=["affine", "all", "none"])
def test_an_unused_output(backend, parts, used):
    tensors = make((2, 2, 24), BRAIN, **parts)
    grads = [None, None]
    grads[used] = torch.randn_like(tensors["x"])
    check(*both(), tensors, grads=grads, rounding=rounding(backend, BRAIN))


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output_with_a_row_index(backend, used):
    fixed = {"row_index": torch.randint(0, 3, (2, 3))}
    for parts in ({"gate_table": True, "scale": 3}, {"gate": 3, "scale_table": True}):
        tensors = make((2, 3, 24), **parts)
        grads = [None, None]
        grads[used] = torch.randn_like(tensors["x"])
        check(*both(**fixed), tensors, grads=grads, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_slices_of_packed_tensors(backend, rows):
    """x and y from one projection, every other token; rows from Wan's six modulation vectors."""

    def sliced(function):
        def call(xy, modulation, table):
            x, y = xy.unflatten(-1, (2, -1))[:, ::2].unbind(2)
            part, tables = modulation.unbind(1), table.unbind(0)
            return function(
                x, y, part[2], gate_table=tables[2], scale=part[3], shift=part[4],
                scale_table=tables[3], shift_table=tables[4],
            )  # fmt: skip

        return call

    tensors = {
        "xy": torch.randn(2, 6, 48),
        "modulation": torch.randn(rows, 6, 24),
        "table": torch.randn(6, 24),
    }
    check(sliced(residual_norm_modulate), sliced(naive), tensors, rounding=FLOAT_SLACK)


@pytest.mark.parametrize("shape", [(2, 2, 48), (4, 48)])
def test_gradient_of_any_strides(backend, shape):
    tensors = make(shape, BRAIN, **ALL)
    check_deterministic(residual_norm_modulate, tensors)
    check_expanded_gradient(residual_norm_modulate, tensors)
    rows = [torch.randn(shape[-1]) for _ in range(2)]
    tensors = make(shape, **ALL)
    left = run(residual_norm_modulate, tensors, [r.expand(shape) for r in rows])[1]
    right = run(residual_norm_modulate, tensors, [r.expand(shape).contiguous() for r in rows])[1]
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_same_bits_twice_with_a_row_index(backend):
    tensors = make((2, 5, 48), gate=3, scale=3, shift=3)
    check_deterministic(both(row_index=torch.randint(0, 3, (2, 5)))[0], tensors)


def test_inputs_stay_and_outputs_are_new(backend):
    tensors = make((2, 3, 16), gate=2, scale=2)
    before = {n: t.clone() for n, t in tensors.items()}
    grads = [torch.randn(2, 3, 16) for _ in range(2)]
    kept = [g.clone() for g in grads]
    run(residual_norm_modulate, tensors, grads)
    for output in residual_norm_modulate(**tensors):
        output.fill_(7)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
    x = torch.randn(3, 2, 16).transpose(0, 1)
    assert all(output.is_contiguous() for output in residual_norm_modulate(x, x))


def test_only_the_gradients_that_are_needed(backend, monkeypatch):
    asked = []
    original = module._backward_op

    def spy(*args):
        asked.append("".join("-+"[need] for need in args[-5:]))
        return original(*args)

    monkeypatch.setattr(module, "_backward_op", spy)
    expected = {  # of d_x, d_y, d_gate, A, B
        "x": "+----", "y": "-+---", "gate": "--+--", "gate_table": "--+--", "weight": "---+-",
        "bias": "----+", "scale": "---++", "scale_table": "---++", "shift_table": "----+",
    }  # fmt: skip
    tensors = make((2, 2, 16), **ALL)

    def backward(needed):
        leaves = {n: t.clone().requires_grad_(n in needed) for n, t in tensors.items()}
        sum(o.square().sum() for o in residual_norm_modulate(**leaves)).backward()
        return {n: t.grad for n, t in leaves.items() if t.grad is not None}

    full = backward(tensors)
    asked.clear()
    for name, flags in expected.items():
        found = backward({name})
        assert asked.pop() == flags, name
        assert list(found) == [name]
        torch.testing.assert_close(found[name], full[name], rtol=1e-6, atol=1e-6)


def test_the_gradient_of_y_is_that_of_x_without_a_gate(backend, monkeypatch):
    asked = []
    original = module._backward_op
    monkeypatch.setattr(module, "_backward_op", lambda *a: asked.append(a[-5:]) or original(*a))
    for y_dtype, flags in ((BRAIN, (True, False)), (torch.float32, (True, True))):
        run(residual_norm_modulate, make((2, 2, 16), BRAIN, y_dtype), [torch.ones(2, 2, 16)] * 2)
        assert asked.pop()[:2] == flags


def test_saved_bytes():
    def kept(function, frozen=(), **parts):
        tensors = make((1, 256, 128), BRAIN, **parts)
        leaves = {n: t if n in frozen else t.requires_grad_() for n, t in tensors.items()}
        return saved_bytes(lambda: function(**leaves))

    tokens, row = 256 * 128 * 2, 128 * 4
    assert kept(residual_norm_modulate) == tokens
    assert kept(residual_norm_modulate, gate=1, scale=1, shift=1) == 2 * tokens + 2 * row
    assert kept(residual_norm_modulate, ("gate",), gate=1, scale=1) == tokens + 2 * row
    assert kept(naive, gate=1, scale=1, shift=1) > 4 * tokens


@pytest.mark.parametrize("kind", module.KINDS)
def test_gradcheck_in_float64(kind):
    tensors = make((2, 2, 5), torch.float64, None, torch.float64, **ALL)
    names = list(tensors)

    def function(*values):
        return residual_norm_modulate(**dict(zip(names, values, strict=True)), kind=kind, eps=1e-2)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_reference_is_an_oracle():
    tensors = make((2, 4, 12), BRAIN, gate=2, scale=4, shift=4)
    x, y, gate, scale, shift = tensors.values()
    args = (x, y, gate, None, None, None, scale, shift, None, None, None, "layer", EPS)
    exact = naive(**{n: t.double() for n, t in tensors.items()})
    torch.testing.assert_close(module.reference(*args, upcast=torch.float64), exact)


@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(backend, rows):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    light = ("test_schema", "test_faketensor")
    tests = light
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    t = make((2, 2, 8), BRAIN, **(ALL | ({"gate": 3, "scale": 3, "shift": 3} if rows else {})))
    row_index = torch.randint(0, rows, (2, 2)) if rows else None
    x, y, gate, scale, shift, weight, bias, gate_table, *tables = (
        v.clone().requires_grad_() for v in t.values()
    )
    args = (x, y, gate, weight, bias, gate_table, scale, shift, *tables, row_index, "layer", EPS)
    torch.library.opcheck(module._forward_op, args, test_utils=tests)
    grad = torch.randn(2, 2, 8).transpose(0, 1).bfloat16()
    for needs in ((1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 1)):
        args = (
            grad, grad, t["x"], t["y"], t["gate"], t["weight"], t["gate_table"], t["scale"],
            t["scale_table"], row_index, rows or 2, rows or 2, "layer", EPS, torch.bfloat16,
            *map(bool, needs),
        )  # fmt: skip
        torch.library.opcheck(module._backward_op, args, test_utils=light)


def test_compiles_without_a_graph_break():
    check_compiled(residual_norm_modulate, make((2, 6, 16), BRAIN, **ALL))
    row_index = torch.randint(0, 3, (2, 6))
    check_compiled(both(row_index=row_index)[0], make((2, 6, 16), gate=3, scale=3))


def test_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    compiled = torch.compile(
        residual_norm_modulate, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (6, 8, 34):
            tensors = make((2, length, 16), gate=2, scale=2)
            for a, b in zip(compiled(**tensors), residual_norm_modulate(**tensors), strict=True):
                torch.testing.assert_close(a, b)


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
        for place in range(4):
            left, right = ([t if i == place else near for i in range(4)] for t in (strided, dense))
            if place < 2:
                outputs = (residual_norm_modulate(*t[:2], gate) for t in (left, right))
            else:
                fixed = (gate, None, None, None, None, None, 3, 1, "layer", EPS, HALF)
                outputs = (module._backward_op(*t, *fixed, *[True] * 5) for t in (left, right))
            assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 3072, 4352, 5000, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for tokens, rows in ((1, 1), (2, 2), (32760, 1), (32760, 21), (75600, 75600), (10**6, 3)):
        forward = module.forward_launch(tokens, dim, capability)
        backward = [
            module.backward_launch(tokens, rows, dim, size, capability, sums)
            for size, sums in itertools.product((2, 4), (False, True))
        ]
        for launch in (forward, *backward):
            threads = 32 * launch.num_warps
            assert dim <= launch.head + launch.tail and threads <= min(launch.head, launch.tail)
            assert launch.head + launch.tail <= 16 * threads <= 16 * 512
        assert 1 <= forward.programs <= tokens <= forward.programs * -(-tokens // forward.programs)
        for launch in backward:
            assert 1 <= launch.programs <= max(1, tokens // rows)
            names = list(itertools.chain(*launch.passes))
            assert sorted(names) == ["dot", "dx", "dy", "gate_sum", "total"]
    # A million tokens write no more partial rows than thirty thousand.
    many, few = (
        module.backward_launch(n, 1, dim, 2, capability, True) for n in (10**6, 32760)
    )  # fmt: skip
    assert many == few


def test_pieces_hold_little_more_than_the_token():
    assert _pieces.split_token(5120) == (4096, 1024, 16)
    assert _pieces.split_token(3072) == (2048, 1024, 8)
    assert _pieces.split_token(1536) == (1024, 512, 4)
    assert _pieces.split_token(8192) == (4096, 4096, 16)
    assert _pieces.split_token(1) == (32, 32, 1)


BAD = [
    ({"x": torch.ones(2, 6, 8, dtype=torch.int64)}, "x is int64"),
    ({"y": torch.ones(2, 3, 8)}, r"y is float32\[2, 3, 8\].*\[2, 6, 8\]"),
    ({"y": torch.ones(2, 8, 6).transpose(1, 2)}, "y is .*contiguous last axis"),
    ({"y": torch.ones(2, 6, 8, device="meta")}, "y is .*meta.*on cpu"),
    ({"gate": torch.ones(5, 8)}, r"gate is float32\[5, 8\].*12 tokens"),
    ({"gate_table": torch.ones(1, 8)}, r"gate_table is float32\[1, 8\].*\[8\]"),
    ({"row_index": torch.zeros(12, dtype=torch.int64)}, r"row_index is int64\[12\]"),
    ({"row_index": torch.zeros(2, 6)}, "row_index is .*int32 or int64"),
    ({"shift": torch.ones(3, 8)}, "shift is .*R the same for scale and shift"),
    ({"weight": torch.ones(4)}, r"weight is float32\[4\].*\[8\]"),
    ({"kind": "batch"}, "kind is 'batch'"),
    ({"eps": -1.0}, "eps is -1.0"),
    ({"gate": None, "scale": None, "row_index": torch.zeros(2, 6).long()}, "row_index is"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match="residual_norm_modulate: " + message):
        residual_norm_modulate(**(make((2, 6, 8), gate=2, scale=2) | change))


@st.composite
def arguments(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    tokens, parts = batch * length, dict(draw(st.sampled_from(PARTS)))
    flat = draw(st.booleans())
    indexed = draw(st.booleans()) and bool(parts.keys() & {"gate", "scale", "shift"})
    divisors = [r for r in range(1, tokens + 1) if tokens % r == 0]
    numbers = st.integers(1, 9) if indexed else st.sampled_from(divisors)
    gate, rows = draw(numbers), draw(numbers)
    parts |= {n: gate if n == "gate" else rows for n in parts if parts[n] is not True}
    dtypes = [draw(st.sampled_from([torch.float32, BRAIN, HALF])) for _ in range(3)]
    strided = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (tokens, dim) if flat else (batch, length, dim)
    tensors = make(shape, *dtypes, **parts)
    fixed = {
        "kind": draw(st.sampled_from(module.KINDS)),
        "eps": draw(st.sampled_from([1e-6, 1e-3])),
    }
    if indexed:
        named = min(n for n in parts.values() if n is not True)
        fixed["row_index"] = torch.randint(0, named, shape[:-1])
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
    x_dtype = tensors["x"].dtype  # x_out is rounded to it, and h and all gradients follow
    check(*both(**fixed), tensors, rounding=FLOAT_SLACK, intermediate=x_dtype)
