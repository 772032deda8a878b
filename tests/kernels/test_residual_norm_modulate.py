"""residual_norm_modulate and gated_residual: the gated sum, and the next norm of it."""

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
from torch.nn import functional as F

from prfl_fast.kernels import gated_residual, norm_modulate, residual_norm_modulate
from prfl_fast.kernels.residual_norm_modulate import reference

EPS = 1e-6


def expand(rows, table, x, row_index):
    """table + rows, one vector for every token: what the operation never builds."""
    if rows is None and table is None:
        return None
    tokens = x.numel() // x.shape[-1]
    total = torch.zeros(tokens, x.shape[-1], dtype=wide(x).dtype)
    if table is not None:
        total = total + wide(table)
    if rows is not None:
        repeated = (
            wide(rows).repeat_interleave(tokens // len(rows), 0) if row_index is None else None
        )
        total = total + (wide(rows)[row_index.flatten()] if repeated is None else repeated)
    return total.view(x.shape)


def naive_gated(x, y, gate=None, gate_table=None, row_index=None):
    vector = expand(gate, gate_table, x, row_index)
    product = wide(y) if vector is None else wide(y) * vector
    return (wide(x) + product).to(x.dtype)


def naive(
    x, y, gate=None, weight=None, bias=None, gate_table=None, scale=None, shift=None,
    scale_table=None, shift_table=None, row_index=None, kind="layer",
):  # fmt: skip
    x_out = naive_gated(x, y, gate, gate_table, row_index)
    h, dim = wide(x_out), x.shape[-1:]
    weight, bias = (None if t is None else wide(t) for t in (weight, bias))
    if kind == "layer":
        h = F.layer_norm(h, dim, weight, bias, EPS)
    else:
        h = (
            F.rms_norm(h, dim, weight, EPS)
            if kind == "rms"
            else h * (1 if weight is None else weight)
        )
        h = h if bias is None else h + bias
    scale, shift = (
        expand(scale, scale_table, x, row_index),
        expand(shift, shift_table, x, row_index),
    )
    h = h if scale is None else h * (1 + scale)
    h = h if shift is None else h + shift
    return x_out, h.to(x.dtype)


def make(batch, length, dim, dtype, y_dtype=None, **parts):
    """x, y and what ``parts`` names: a number of rows for gate, scale, shift; True for vectors."""
    tensors = {
        "x": torch.randn(batch, length, dim).to(dtype),
        "y": torch.randn(batch, length, dim).to(y_dtype or dtype),
    }
    for name, value in parts.items():
        shape = (dim,) if value is True else (value, dim)
        part = 0.5 * torch.randn(shape) + (name == "weight")
        tensors[name] = part.to(dtype if name in ("weight", "bias") else torch.float32)
    return tensors


def index(batch, length, rows):
    return torch.randint(0, rows, (batch, length))


GATED = [
    # batch, length, dim, parts, rows named by an index
    (1, 1, 1, {}, 0),
    (2, 5, 33, {}, 0),
    (2, 5, 33, {"gate": 1}, 0),
    (2, 6, 24, {"gate": 2, "gate_table": True}, 0),
    (2, 6, 24, {"gate": 6, "gate_table": True}, 0),
    (2, 6, 24, {"gate": 12}, 0),
    (4, 3, 16, {"gate": 2}, 0),
    (2, 3, 8, {"gate": 3}, 0),
    (1, 7, 130, {"gate_table": True}, 0),
    (2, 9, 24, {"gate": 5, "gate_table": True}, 5),
    (1, 20, 1536, {"gate": 1, "gate_table": True}, 0),
]
ROWS = ("gate", "scale", "shift")
FULL = [
    (1, 1, 8, {}, 0),
    (2, 5, 33, {"weight": True, "bias": True}, 0),
    (2, 6, 24, {"gate": 2, "gate_table": True, "weight": True, "bias": True}, 0),
    (2, 6, 24, {"gate": 2, "gate_table": True, "scale": 2, "shift": 2}, 0),
    (2, 6, 24, {n: 6 for n in ROWS} | {n + "_table": True for n in ROWS}, 0),
    (2, 6, 24, {"gate": 12, "scale": 4, "weight": True, "bias": True}, 0),
    (2, 6, 24, {"scale_table": True, "shift_table": True, "weight": True}, 0),
    (2, 9, 24, {"gate": 5, "scale": 5, "shift": 5, "weight": True, "bias": True}, 5),
    (2, 9, 24, {"gate": 5, "scale_table": True}, 5),
    (2, 9, 24, {"gate_table": True, "scale": 5}, 5),
    (1, 20, 1536, {"gate": 1, "gate_table": True, "scale": 1, "shift": 1}, 0),
]  # fmt: skip


def case(ours, plain, size, **fixed):
    """Both functions with the keywords that are not tensors bound, and the tensors."""
    batch, length, _, parts, rows = size
    if rows:
        fixed["row_index"] = index(batch, length, rows)
    return (lambda **t: ours(**t, **fixed)), (lambda **t: plain(**t, **fixed)), parts


@pytest.mark.parametrize("size", GATED)
@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float16,)])
def test_gated_residual(size, dtypes):
    ours, plain, parts = case(gated_residual, naive_gated, size)
    check(ours, plain, make(*size[:3], *dtypes, **parts))


@pytest.mark.parametrize("size", FULL)
@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual_norm_modulate(size, kind, dtype):
    ours, plain, parts = case(residual_norm_modulate, naive, size, kind=kind)
    check(ours, plain, make(*size[:3], dtype, **parts))


@pytest.mark.parametrize(
    "x_dtype, y_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_mixed_dtypes(x_dtype, y_dtype):
    for size in (GATED[1], GATED[3]):
        ours, plain, parts = case(gated_residual, naive_gated, size)
        check(ours, plain, make(*size[:3], x_dtype, y_dtype, **parts))
    for size in (FULL[1], FULL[4]):
        ours, plain, parts = case(residual_norm_modulate, naive, size)
        check(ours, plain, make(*size[:3], x_dtype, y_dtype, **parts))


def test_h_is_the_norm_of_the_rounded_sum():
    tensors = make(2, 6, 64, torch.bfloat16, gate=2, scale=2, shift=2)
    x_out, h = residual_norm_modulate(**tensors)
    gate = tensors.pop("gate")
    assert torch.equal(x_out, gated_residual(tensors["x"], tensors["y"], gate))
    assert torch.equal(h, norm_modulate(x_out, scale=tensors["scale"], shift=tensors["shift"]))


def test_two_dimensional_tokens():
    tensors = make(3, 4, 16, torch.bfloat16, gate=3, scale=3)
    flat = {n: t.flatten(0, 1) if n in "xy" else t for n, t in tensors.items()}
    for a, b in zip(residual_norm_modulate(**tensors), residual_norm_modulate(**flat), strict=True):
        assert torch.equal(a.flatten(0, 1), b)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("size", [FULL[1], FULL[4], FULL[7]])
def test_an_unused_output(size, used):
    ours, plain, parts = case(residual_norm_modulate, naive, size)
    tensors = make(*size[:3], torch.bfloat16, **parts)
    grads = [None, None]
    grads[used] = torch.randn_like(tensors["x"])
    check(ours, plain, tensors, grads=grads)


def test_slices_of_packed_tensors():
    """x, y, and rows as views into something larger, as Wan's six modulation vectors are."""
    tensors = {
        "xy": torch.randn(2, 6, 48).bfloat16(),
        "modulation": torch.randn(2, 6, 24),
        "table": torch.randn(6, 24),
    }

    def sliced(function):
        def call(xy, modulation, table):
            rows, tables = modulation.unbind(1), table.unbind(0)
            return function(
                xy[..., :24], xy[..., 24:], rows[2], gate_table=tables[2], scale=rows[3],
                shift=rows[4], scale_table=tables[3], shift_table=tables[4],
            )  # fmt: skip

        return call

    check(sliced(residual_norm_modulate), sliced(naive), tensors)


@pytest.mark.parametrize("size", [GATED[4], GATED[9]])
def test_gated_residual_is_deterministic(size):
    ours, _, parts = case(gated_residual, naive_gated, size)
    tensors = make(*size[:3], torch.bfloat16, **parts)
    check_deterministic(ours, tensors)
    check_expanded_gradient(ours, tensors)


@pytest.mark.parametrize("size", [FULL[4], FULL[7]])
def test_residual_norm_modulate_is_deterministic(size):
    ours, _, parts = case(residual_norm_modulate, naive, size)
    tensors = make(*size[:3], torch.bfloat16, **parts)
    check_deterministic(ours, tensors)
    check_expanded_gradient(ours, tensors)


@pytest.mark.parametrize("needed", ["x", "y", "gate", "gate_table", "scale", "shift_table"])
def test_only_needed_gradients(needed):
    size = FULL[4]
    tensors = make(*size[:3], torch.float32, **size[3])

    def backward(leaves):
        sum(o.square().sum() for o in residual_norm_modulate(**leaves)).backward()
        return leaves

    full = backward({n: t.clone().requires_grad_() for n, t in tensors.items()})
    some = backward({n: t.requires_grad_() if n == needed else t for n, t in tensors.items()})
    torch.testing.assert_close(some[needed].grad, full[needed].grad, rtol=1e-6, atol=1e-6)
    assert all(t.grad is None for n, t in some.items() if n != needed)


def test_saved_bytes():
    def kept(function, frozen=(), **parts):
        tensors = make(1, 256, 128, torch.bfloat16, **parts)
        leaves = {n: t if n in frozen else t.requires_grad_() for n, t in tensors.items()}
        return saved_bytes(lambda: function(**leaves))

    tokens, row = 256 * 128 * 2, 128 * 4
    assert kept(gated_residual) == 0
    assert kept(gated_residual, gate=1) == tokens + row
    assert kept(gated_residual, ("gate",), gate=1) == row
    assert kept(residual_norm_modulate) == tokens
    assert kept(residual_norm_modulate, gate=1, scale=1, shift=1) == 2 * tokens + 2 * row
    assert kept(residual_norm_modulate, ("gate",), gate=1, scale=1) == tokens + 2 * row
    assert kept(naive, gate=1, scale=1, shift=1) > 4 * tokens


@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
def test_gradcheck(kind):
    parts = {"gate": 2, "gate_table": True, "weight": True, "bias": True, "scale": 2, "shift": 2}
    parts |= {"scale_table": True, "shift_table": True}
    tensors = {
        n: t.double().requires_grad_() for n, t in make(2, 2, 5, torch.float64, **parts).items()
    }
    names = list(tensors)
    function = lambda *v: residual_norm_modulate(  # noqa: E731
        **dict(zip(names, v, strict=True)), kind=kind, eps=1e-2
    )
    assert torch.autograd.gradcheck(function, list(tensors.values()))
    names = names[:4]
    function = lambda *v: gated_residual(**dict(zip(names, v, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, [tensors[n] for n in names])


def test_reference_as_oracle():
    tensors = make(2, 4, 12, torch.bfloat16, gate=2, scale=4, shift=4)
    x, y, gate, scale, shift = tensors.values()
    args = (x, y, gate, None, None, None, scale, shift, None, None, None, "layer", EPS)
    exact = naive(**{n: t.double() for n, t in tensors.items()})
    torch.testing.assert_close(reference(*args, upcast=torch.float64), exact)


@pytest.mark.parametrize("rows", [0, 3])
def test_opcheck(rows):
    parts = {"gate": 2, "weight": True, "bias": True, "gate_table": True, "scale": 2, "shift": 2}
    parts |= {"scale_table": True, "shift_table": True}
    t = make(
        2,
        4,
        8,
        torch.bfloat16,
        **(parts | ({"gate": rows, "scale": rows, "shift": rows} if rows else {})),
    )
    row_index = index(2, 4, rows) if rows else None
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    x, y, gate, weight, bias, gate_table, *modulation = leaves.values()
    ops, light = torch.ops.prfl_fast, ["test_schema", "test_faketensor"]
    torch.library.opcheck(ops.gated_residual, (x, y, gate, gate_table, row_index))
    args = (x, y, gate, weight, bias, gate_table, *modulation, row_index, "layer", EPS)
    torch.library.opcheck(ops.residual_norm_modulate, args)
    grad = torch.randn(4, 2, 8).transpose(0, 1).bfloat16()
    for need_y, need_gate in ((True, True), (True, False), (False, True)):
        args = (
            grad,
            t["y"],
            t["gate"],
            t["gate_table"],
            row_index,
            torch.bfloat16,
            need_y,
            need_gate,
        )
        torch.library.opcheck(ops.gated_residual_backward, args, test_utils=light)
    for needs in (
        [True] * 5,
        [True, False, False, False, False],
        [False, False, False, True, True],
    ):
        args = (
            grad, grad, t["x"], t["y"], t["gate"], t["weight"], t["gate_table"], t["scale"],
            t["scale_table"], row_index, rows or 2, rows or 2, "layer", EPS, torch.bfloat16, *needs,
        )  # fmt: skip
        torch.library.opcheck(ops.residual_norm_modulate_backward, args, test_utils=light)


def test_compiles_without_graph_break():
    size = FULL[4]
    tensors = make(*size[:3], torch.bfloat16, **size[3])
    check_compiled(residual_norm_modulate, tensors)
    check_compiled(gated_residual, {n: tensors[n] for n in ("x", "y", "gate")})


def test_inputs_are_not_changed():
    tensors = make(2, 3, 8, torch.float32, gate=2, scale=2)
    before = {n: t.clone() for n, t in tensors.items()}
    run(residual_norm_modulate, tensors, [torch.ones(2, 3, 8)] * 2)
    grads = [torch.randn(2, 3, 8) for _ in range(2)]
    kept = [g.clone() for g in grads]
    run(residual_norm_modulate, tensors, grads)
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


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
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(change, message):
    arguments = make(2, 6, 8, torch.float32, gate=2) | change
    for function in (gated_residual, residual_norm_modulate):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(**arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": torch.ones(3, 8)}, "shift is .*R the same for scale and shift"),
        ({"weight": torch.ones(4)}, r"weight is float32\[4\].*\[8\]"),
        ({"kind": "batch"}, "kind is 'batch'"),
        ({"eps": -1.0}, "eps is -1.0"),
        (
            {"gate": None, "scale": None, "row_index": torch.zeros(2, 6, dtype=torch.int64)},
            "row_index is",
        ),
    ],
)
def test_bad_norm_arguments(change, message):
    arguments = make(2, 6, 8, torch.float32, gate=2, scale=2) | {"shift": None} | change
    if "scale" in change and change["scale"] is not None:
        arguments["shift"] = torch.ones(2, 8)
    with pytest.raises(ValueError, match="residual_norm_modulate: " + message):
        residual_norm_modulate(**arguments)


def test_row_index_out_of_range():
    tensors = make(2, 6, 8, torch.float32, gate=2)
    with pytest.raises(ValueError, match=r"row_index.*\[0, 2\)"):
        gated_residual(**tensors, row_index=torch.full((2, 6), 2))
