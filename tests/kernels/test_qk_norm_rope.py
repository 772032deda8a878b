"""qk_norm_rope: against diffusers' own modules, Wan's complex128 form, and plain PyTorch."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_within_twice
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
from prfl_fast.kernels import qk_norm_rope, rope_table
from prfl_fast.kernels._triton import INTERPRETING
from prfl_fast.kernels.qk_norm_rope import reference

module = importlib.import_module("prfl_fast.kernels.qk_norm_rope")
EPS = 1e-6
BRAIN, HALF = torch.bfloat16, torch.float16


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.triton)])
def backend(request):
    """Every test twice; Triton on the GPU where there is one, else in its interpreter."""
    kernels.set_backend(request.param)
    device = "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    yield request.param
    torch.set_default_device(None)


def rounding(backend, dtype):
    """Half-ulps of slack; the interpreter truncates to bfloat16."""
    interpreted = backend == "triton" and INTERPRETING
    return {BRAIN: 4.0 if interpreted else 1.0, torch.float32: 2.0}.get(dtype, 1.0)


def angles(grid, head_dim, offset=(0, 0, 0), theta=10000.0):
    """float64 ``[L, d/2]``, written from the definition, one token and one pair at a time."""
    pairs = head_dim // 2
    counts = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    frequencies = [[theta ** (-i / n) for i in range(n)] for n in counts]
    rows = []
    for token in range(math.prod(grid)):
        place = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
        rows.append(
            [(p + o) * w for p, o, ws in zip(place, offset, frequencies, strict=True) for w in ws]
        )
    return torch.tensor(rows, dtype=torch.float64)


def naive_one(x, weight, heads, phi, per_head):
    """RMSNorm and rotation the way models write them: rounded in between, float32 inside."""
    if weight is not None:
        groups = wide(x.unflatten(-1, (heads, -1)) if per_head else x)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + EPS)
        x = (normed * wide(weight)).reshape(x.shape).to(x.dtype)
    if phi is not None:
        cos, sin = (t.float().to(wide(x).dtype)[:, None] for t in (phi.cos(), phi.sin()))
        even, odd = wide(x).unflatten(-1, (heads, -1, 2)).unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
        x = turned.flatten(-3).to(x.dtype)
    return x


def functions(heads, grid=None, offset=(0, 0, 0), head_dim=None, per_head=False):
    """The operation and its plain counterpart, both ``(q, k, q_weight=None, k_weight=None)``."""
    tables, phi = {}, None
    if grid is not None:
        positions = max(n + o for n, o in zip(grid, offset, strict=True))
        cos, sin = rope_table(positions, head_dim)
        tables = {"cos": cos, "sin": sin, "grid": grid, "offset": offset}
        phi = angles(grid, head_dim, offset)

    def ours(q, k, q_weight=None, k_weight=None):
        return qk_norm_rope(
            q, k, q_weight, k_weight, heads=heads, per_head=per_head, eps=EPS, **tables
        )

    def naive(q, k, q_weight=None, k_weight=None):
        return (
            naive_one(q, q_weight, heads, phi, per_head),
            naive_one(k, k_weight, heads, phi, per_head),
        )

    return ours, naive


def make(batch, lq, lk, dim, dtype, weight_dtype=None, weight_dim=None):
    tensors = {
        "q": torch.randn(batch, lq, dim).to(dtype),
        "k": torch.randn(batch, lk, dim).to(dtype),
    }
    if weight_dtype is not None:
        for name in ("q_weight", "k_weight"):
            tensors[name] = (1 + 0.2 * torch.randn(weight_dim or dim)).to(weight_dtype)
    return tensors


CASES = [
    # batch, grid, heads, head_dim
    (1, (1, 1, 1), 1, 2),
    (2, (2, 3, 5), 2, 24),
    (1, (3, 1, 7), 3, 32),
    (2, (1, 4, 3), 1, 48),
    (1, (2, 3, 4), 12, 128),
    (1, (5, 1, 1), 2, 4),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", ["none", "same", "float32"])
@pytest.mark.parametrize("per_head", [False, True])
def test_norm_and_rope(case, dtype, weights, per_head):
    batch, grid, heads, head_dim = case
    weight_dtype = {"none": None, "same": dtype, "float32": torch.float32}[weights]
    length, dim = math.prod(grid), heads * head_dim
    weight_dim = head_dim if per_head else dim
    tensors = make(batch, length, length, dim, dtype, weight_dtype, weight_dim)
    ours, naive = functions(heads, grid, (0, 0, 0), head_dim, per_head)
    # In float64 the oracle is no more exact than what it judges: 1e-12 is asked for.
    check(ours, naive, tensors, rounding=1e4 if dtype == torch.float64 else 1)


# A token takes the interpreter 70 ms: few of them, and one dtype for each combination.
SMALL_CASES = [
    (1, (1, 1, 1), 1, 2),
    (2, (1, 2, 1), 3, 10),  # five pairs: 3, 1 and 1
    (1, (2, 1, 1), 5, 40),
    (1, (1, 1, 2), 3, 96),
]


@pytest.mark.triton
@pytest.mark.parametrize(
    "dtype, case, weights, per_head",
    [
        (dtype, *rest)
        for dtype, rest in zip(
            itertools.cycle([torch.float32, BRAIN, HALF, torch.float32, HALF]),
            itertools.product(SMALL_CASES, ["none", "same", "other"], [False, True]),
            strict=False,
        )
    ],
)
def test_norm_and_rope_in_triton(triton_backend, dtype, case, weights, per_head):
    batch, grid, heads, head_dim = case
    other = BRAIN if dtype == torch.float32 else torch.float32
    weight_dtype = {"none": None, "same": dtype, "other": other}[weights]
    length, dim = math.prod(grid), heads * head_dim
    tensors = make(batch, length, length, dim, dtype, weight_dtype, head_dim if per_head else dim)
    if torch.cuda.is_available():
        tensors = {n: t.cuda() for n, t in tensors.items()}
    check(
        *functions(heads, grid, (1, 0, 2), head_dim, per_head),
        tensors,
        rounding=rounding("triton", dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, BRAIN, HALF])
@pytest.mark.parametrize(
    "heads, head_dim, per_head", [(12, 128, False), (40, 128, False), (24, 128, True), (32, 96, 0)]
)
def test_wide_tokens(backend, dtype, heads, head_dim, per_head):
    tensors = make(1, 1, 1, heads * head_dim, dtype, dtype, head_dim if per_head else None)
    tensors["k"] = tensors["k"] * 100
    check(
        *functions(heads, (1, 1, 1), (3, 17, 31), head_dim, per_head),
        tensors,
        rounding=rounding(backend, dtype),
    )


@pytest.mark.parametrize("dtype, dim", [(torch.float32, 36), (BRAIN, 36), (BRAIN, 5121)])
@pytest.mark.parametrize("per_head", [False, True])
def test_norm_only_with_different_lengths(backend, dtype, dim, per_head):
    tensors = make(2, 1, 3, dim, dtype, dtype, dim // 3 if per_head else dim)
    check(*functions(3, per_head=per_head), tensors, rounding=rounding(backend, dtype))


@pytest.mark.parametrize("length", [0, 1])
def test_without_tokens(backend, length):
    """No token gives no output and a sum of zero; an odd head needs no pairs without a grid."""
    tensors = make(2, 0, length, 15, torch.float32, torch.float32)
    check(*functions(3), tensors, rounding=2)


@pytest.mark.parametrize("given", ["q_weight", "k_weight"])
def test_one_side_normalised(backend, given):
    tensors = make(1, 2, 2, 24, torch.float32, torch.float32)
    tensors = {n: t for n, t in tensors.items() if n in ("q", "k", given)}
    check(*functions(2, (1, 1, 2), (0, 0, 0), 12), tensors, rounding=2)
    check(*functions(2), tensors)
    other = {"q_weight": 1, "k_weight": 0}[given]
    out = functions(2)[0](**tensors)[other]
    source = tensors["k" if other else "q"]
    assert torch.equal(out, source) and out.data_ptr() != source.data_ptr()


def test_offset_of_a_shard():
    whole = make(1, 4 * 2 * 3, 4 * 2 * 3, 24, torch.float32)
    full, _ = functions(2, (4, 2, 3), (0, 0, 0), 12)
    shard, naive = functions(2, (2, 2, 3), (2, 0, 0), 12)
    second = {n: t[:, 12:] for n, t in whole.items()}
    for a, b in zip(full(**whole), shard(**second), strict=True):
        assert torch.equal(a[:, 12:], b)
    check(shard, naive, second)
    check(*functions(2, (2, 2, 3), (1, 4, 7), 12), second)


@pytest.mark.parametrize("head_dim", [2, 4, 24, 32, 48, 64, 128])
def test_tables_equal_diffusers(head_dim):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    rope = wan.WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)
    cos, sin = rope_table(64, head_dim)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (64, head_dim // 2)
    assert torch.equal(cos, rope.freqs_cos[:, ::2]) and torch.equal(sin, rope.freqs_sin[:, 1::2])


class _Given(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


@pytest.mark.parametrize("head_dim", [24, 32, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_diffusers_attention(head_dim, dtype, monkeypatch):
    """The real classes: RMSNorm modules, rotary module, and the rotation inside the processor."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    heads, grid = 2, (3, 4, 2)
    dim = heads * head_dim
    tables = wan.WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.empty(1, 1, 3, 8, 4))

    def diffusers(q, k, q_weight, k_weight):
        attn = wan.WanAttention(dim, heads, head_dim, EPS, processor=wan.WanAttnProcessor())
        attn.to_q, attn.to_k, attn.to_v = _Given(q), _Given(k), _Given(k)
        attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        attn.norm_q.weight, attn.norm_k.weight = map(torch.nn.Parameter, (q_weight, k_weight))
        seen = []

        def record(query, key, value, **_):
            seen.extend((query.flatten(2), key.flatten(2)))
            return value

        monkeypatch.setattr(wan, "dispatch_attention_fn", record)
        attn(q, None, None, tables)
        return seen

    tensors = make(2, 24, 24, dim, dtype, dtype)
    cos, sin = rope_table(8, head_dim)
    with torch.no_grad():
        out = qk_norm_rope(**tensors, heads=heads, cos=cos, sin=sin, grid=grid, eps=EPS)
        plain = diffusers(**tensors)
        oracle = diffusers(**{n: t.double() for n, t in tensors.items()})
    for name, *triple in zip("qk", out, plain, oracle, strict=True):
        assert_within_twice(*triple, name=name)


def test_against_the_complex128_form():
    """Wan's own: pairs as complex128 times polar(1, position · frequency)."""
    grid, heads, head_dim = (2, 3, 4), 3, 128
    tensors = make(2, 24, 24, heads * head_dim, torch.float32)
    turns = torch.polar(torch.ones(24, 64, dtype=torch.float64), angles(grid, head_dim))
    cos, sin = rope_table(4, head_dim)
    out = qk_norm_rope(**tensors, heads=heads, cos=cos, sin=sin, grid=grid)
    for x, y in zip(tensors.values(), out, strict=True):
        pairs = torch.view_as_complex(x.double().unflatten(-1, (heads, -1, 2)).contiguous())
        exact = torch.view_as_real(pairs * turns[:, None]).flatten(2)
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-6)


def test_split_of_wan_is_22_21_21():
    cos, _ = rope_table(3, 128)
    starts = (cos[1] - math.cos(1.0)).abs() < 1e-6  # each axis begins at frequency 1
    assert starts.nonzero().flatten().tolist() == [0, 22, 43]


def test_rotation_keeps_lengths_and_relative_angles():
    ours, _ = functions(2, (2, 3, 4), (0, 0, 0), 24)
    tensors = make(1, 24, 24, 48, torch.float64)
    q, k = ours(**tensors)
    torch.testing.assert_close(q.norm(), tensors["q"].norm())
    shifted, _ = functions(2, (2, 3, 4), (3, 1, 2), 24)
    q2, k2 = shifted(**tensors)
    # The tables hold float32 numbers, so relative angles agree to float32.
    torch.testing.assert_close(q @ k.mT, q2 @ k2.mT, rtol=1e-5, atol=1e-5)


@pytest.mark.triton
@pytest.mark.parametrize("per_head", [False, True])
def test_programs_walk_over_tokens_and_samples(triton_backend, monkeypatch, per_head):
    """Three programs for ten tokens: places are counted on, over the end of a sample too."""
    for name in ("forward_launch", "backward_launch"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=original: dataclasses.replace(f(*a), programs=3)
        )
    ours, naive = functions(2, (1, 1, 5), (0, 2, 1), 12, per_head)
    check(ours, naive, make(1, 5, 5, 24, torch.float32, BRAIN, 12 if per_head else 24), rounding=2)
    ours, naive = functions(1, (2, 2, 1), (0, 2, 1), 8, per_head)
    check(ours, naive, make(2, 4, 4, 8, torch.float32, BRAIN), rounding=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_head", [False, True])
def test_slices_of_a_packed_projection(backend, dtype, per_head):
    ours, naive = functions(2, (1, 1, 2), (0, 0, 0), 12, per_head)
    weights = make(1, 1, 1, 24, dtype, dtype, 12 if per_head else 24)
    tensors = {"qkv": torch.randn(2, 2, 72).to(dtype), **dict(list(weights.items())[2:])}

    def sliced(function):
        def call(qkv, q_weight, k_weight):
            q, k, _ = qkv.chunk(3, dim=-1)
            return function(q, k, q_weight, k_weight)

        return call

    check(sliced(ours), sliced(naive), tensors, rounding=rounding(backend, dtype))


def test_transposed_rows(backend):
    ours, naive = functions(2, (1, 1, 2), (0, 0, 0), 12)
    tensors = make(2, 2, 2, 24, torch.float32, torch.float32)
    tensors |= {n: tensors[n].transpose(0, 1) for n in "qk"}
    check(ours, naive, tensors, rounding=2)
    assert all(t.is_contiguous() for t in ours(**tensors))


@pytest.mark.parametrize("per_head", [False, True])
def test_deterministic_for_any_gradient_layout(backend, per_head):
    grid = (3, 2, 2) if backend == "reference" else (1, 1, 1)
    length = math.prod(grid)
    tensors = make(2, length, length, 48, torch.bfloat16, torch.float32, 24 if per_head else 48)
    ours, _ = functions(2, grid, (0, 0, 0), 24, per_head)
    check_deterministic(ours, tensors)
    check_expanded_gradient(ours, tensors)
    rows = {n: tensors[n].transpose(0, 1).contiguous().transpose(0, 1) for n in "qk"}
    left, right = (
        run(ours, t, [torch.ones(2, length, 48)] * 2)[1] for t in (tensors, tensors | rows)
    )
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output(backend, used):
    tensors = make(1, 2, 2, 24, torch.float32, torch.float32)
    ours, naive = functions(2, (1, 1, 2), (0, 0, 0), 12)
    grads = [None, None]
    grads[used] = torch.randn(1, 2, 24)
    check(ours, naive, tensors, grads=grads, rounding=2)


@pytest.mark.parametrize("needed", ["q", "k", "q_weight", "k_weight"])
def test_only_needed_gradients(backend, needed):
    tensors = make(1, 2, 2, 24, torch.float32, torch.float32)
    ours, _ = functions(2, (1, 1, 2), (0, 0, 0), 12)
    full = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    sum(o.square().mul(o.detach()).sum() for o in ours(**full)).backward()
    tensors[needed].requires_grad_()
    sum(o.square().mul(o.detach()).sum() for o in ours(**tensors)).backward()
    assert torch.equal(tensors[needed].grad, full[needed].grad)
    assert all(t.grad is None for n, t in tensors.items() if n != needed)


def test_saved_bytes():
    ours, naive = functions(4, (4, 8, 8), (0, 0, 0), 32)
    tensors = {
        n: t.requires_grad_()
        for n, t in make(1, 256, 256, 128, torch.bfloat16, torch.float32).items()
    }
    tables = 2 * 8 * 16 * 4
    assert saved_bytes(lambda: ours(**tensors)) == 2 * 256 * 128 * 2 + 2 * 128 * 4 + tables
    rotated = {n: tensors[n] for n in "qk"}
    assert saved_bytes(lambda: ours(**rotated)) == tables
    assert saved_bytes(lambda: naive(**tensors)) > 8 * 256 * 128 * 2


def test_gradcheck():
    for per_head in (False, True):
        tensors = make(1, 4, 4, 8, torch.float64, torch.float64, 4 if per_head else 8)
        inputs = [t.requires_grad_() for t in tensors.values()]
        ours, _ = functions(2, (2, 1, 2), (0, 0, 0), 4, per_head)
        assert torch.autograd.gradcheck(ours, inputs)


def test_reference_as_oracle():
    tensors = make(1, 6, 6, 24, torch.bfloat16, torch.bfloat16)
    cos, sin = rope_table(3, 12)
    args = (*tensors.values(), cos, sin, [1, 2, 3], [0, 0, 0], 2, False, EPS)
    out = reference(*args, upcast=torch.float64)
    exact = functions(2, (1, 2, 3), (0, 0, 0), 12)[1](**{n: t.double() for n, t in tensors.items()})
    for a, b in zip(out, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_opcheck(backend):
    """All of opcheck on the reference; what depends on the implementation on Triton too."""
    tests = ("test_schema", "test_faketensor")
    if backend == "reference":
        tests += ("test_autograd_registration", "test_aot_dispatch_dynamic")
    tensors = make(2, 2, 2, 24, torch.bfloat16, torch.float32)
    cos, sin = rope_table(3, 12)
    rest = (cos, sin, [1, 1, 2], [0, 0, 0], 2, False, EPS)
    leaves = [t.clone().requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.prfl_fast.qk_norm_rope, (*leaves, *rest), test_utils=tests)
    q, k, q_weight, k_weight = tensors.values()
    grad = torch.randn(2, 2, 24).transpose(0, 1).bfloat16()
    for grads, x, weights, tail, needed in (
        ((grad, grad), (q, k), (q_weight, k_weight), rest, [True] * 4),
        ((grad, None), (q, k), (q_weight, k_weight), rest, [True, True, False, True]),
        ((None, grad), (None, k), (None, k_weight), rest, [True, False, False, True]),
        ((grad, grad), (None, None), (None, None), rest, [True, True, False, False]),
        (
            (grad, grad),
            (q, None),
            (q_weight, None),
            (None, None, [], [], *rest[4:]),
            [True, True, True, False],
        ),
    ):
        torch.library.opcheck(
            torch.ops.prfl_fast.qk_norm_rope_backward,
            (*grads, *x, *weights, *tail, needed),
            test_utils=["test_schema", "test_faketensor"],
        )


def test_compiles_without_graph_break(backend):
    ours, _ = functions(2, (1, 1, 2), (0, 0, 0), 12)
    check_compiled(ours, make(2, 2, 2, 24, torch.bfloat16, torch.float32))


def test_compiles_once_for_all_lengths():
    """Of clips and of prompts: q of the grid, then a norm of q and k of different lengths."""

    def both(q, k, weight, cos, sin, frames):
        grid = (frames, 2, 3)
        q, _ = qk_norm_rope(q, q, weight, weight, heads=2, cos=cos, sin=sin, grid=grid)
        return qk_norm_rope(q, k, weight, weight, heads=2)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    cos, sin = rope_table(8, 12)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for frames, words in ((3, 5), (4, 9), (7, 6)):
            q, k = torch.randn(2, frames * 6, 24), torch.randn(2, words, 24)
            args = (q, k, torch.randn(24), cos, sin, frames)
            torch.testing.assert_close(compiled(*args), both(*args))


@pytest.mark.triton
def test_offsets_past_int32(triton_backend, tmp_path):
    """The first and last token of two samples of a packed qkv, 75 600 × 15 360 each.

    The last is 2.3·10⁹ elements in: 32 bits would read zeros at the start of this sparse file.
    """
    if not INTERPRETING:
        pytest.skip("reads a sparse file through the interpreter; a GPU would need 9 GB")
    length, width, heads = 75600, 15360, 40
    path = tmp_path / "sparse"
    elements = 2**31 + 2 * length * width
    with open(path, "wb") as file:
        file.truncate(2 * elements)
    storage = torch.from_file(str(path), shared=True, size=elements, dtype=HALF)
    packed = storage[2**31 :].view(2, length, width)[:, :: length - 1]
    packed[..., :10240] = values = torch.randn(2, 2, 10240).half()
    dense = [t.contiguous() for t in values.chunk(2, dim=-1)]
    strided = packed.chunk(3, dim=-1)[:2]
    assert strided[0].stride() == (length * width, (length - 1) * width, 1)
    weights = [torch.randn(128), torch.randn(128)]
    rest = (*rope_table(2, 128), [1, 1, 2], [0, 0, 0], heads, True, EPS)
    for a, b in zip(
        module._forward_op(*strided, *weights, *rest),
        module._forward_op(*dense, *weights, *rest),
        strict=True,
    ):
        assert torch.equal(a, b)
    # The gradient is as far away as its token.
    for a, b in zip(
        module._backward_op(strided[1], None, strided[0], None, *weights, *rest, [True] * 4),
        module._backward_op(dense[1], None, dense[0], None, *weights, *rest, [True] * 4),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
def test_launches_are_sane(capability):
    sizes = itertools.product((1, 2, 40, 96, 128, 256), (1, 3, 8, 12, 40, 64))
    sizes = [(head_dim * heads, head_dim) for head_dim, heads in sizes if head_dim * heads <= 8192]
    sizes += [(dim, None) for dim in (1, 64, 96, 1536, 3072, 5120, 5121, 8192)]
    for (dim, head_dim), tokens, dtype in itertools.product(
        sizes, (1, 7, 32760, 151200), (torch.float32, BRAIN)
    ):
        forward = module.forward_launch(tokens, dim, head_dim, dtype, capability)
        backward = module.backward_launch(tokens, dim, head_dim, dtype, capability)
        for launch in (forward, backward):
            assert head_dim in (None, launch.head)
            assert launch.head <= launch.block_d < max(2 * launch.head, 3)
            rows = launch.block_h * -(-dim // (launch.head * launch.block_h))
            threads = 32 * launch.num_warps
            assert rows * launch.head >= dim
            assert rows * launch.block_d <= threads * (40 if dtype == BRAIN else 24)
            assert launch.block_h * launch.block_d <= threads * 8
            assert head_dim is None or launch.block_d < 2 * threads
            assert 1 <= launch.programs <= tokens
    # A token of Wan's leaves no lane idle, and many tokens write no more partial rows than few.
    for dim, dtype in ((3072, BRAIN), (5120, BRAIN), (3072, torch.float32)):
        launch = module.backward_launch(32760, dim, 128, dtype, capability)
        assert (launch.num_warps, dim % (launch.block_h * launch.block_d)) == (4, 0)
        assert launch == module.backward_launch(10**6, dim, 128, dtype, capability)


@pytest.mark.triton
def test_memory_instructions():
    """16 bytes each; a reduction is all that goes through shared memory, and nothing for heads."""
    script = """
        import dataclasses, json
        from prfl_fast.kernels import _aot
        cases = _aot.operations()["qk_norm_rope"].aot_cases((9, 0))
        case = next(c for c in cases if c.label.startswith("forward bf16 D=5120"))
        found = []
        for per_head in (False, True):
            constexprs = case.constexprs | {"PER_HEAD": per_head}
            kernel = _aot.compile_case(dataclasses.replace(case, constexprs=constexprs), 90)
            found.append((kernel.asm["ptx"], kernel.metadata.shared))
        print(json.dumps(found))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for (ptx, shared), most, moved in zip(json.loads(run.stdout), (16, 0), (8, 0), strict=True):
        assert shared == most
        assert len(re.findall(r"(?:ld|st)\.shared", ptx)) == moved
        stores = re.findall(r"st\.global\S*", ptx)
        assert stores == ["st.global.v4.b32"] * 10  # two tensors in five chunks
        loads = [load for load in re.findall(r"ld\.global\S*", ptx) if ".v4." in load]
        assert len(loads) == 20  # x and w
        assert len(re.findall(r"ld\.global\S*", ptx)) - len(loads) == 16  # four pairs' angles


def test_plain_pytorch_norm_agrees():
    tensors = make(2, 5, 9, 24, torch.float32, torch.float32)
    (q, k), _ = run(functions(2)[0], tensors)
    torch.testing.assert_close(q, F.rms_norm(tensors["q"], (24,), tensors["q_weight"], EPS))
    torch.testing.assert_close(k, F.rms_norm(tensors["k"], (24,), tensors["k_weight"], EPS))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.ones(6, 24)}, r"q is float32\[6, 24\].*\[B, L, D\]"),
        ({"q": torch.ones(2, 6, 24, dtype=torch.int64)}, "q is int64"),
        ({"k": torch.ones(2, 6, 12)}, r"k is float32\[2, 6, 12\].*\[2, Lk, 24\]"),
        ({"k": torch.ones(1, 6, 24)}, r"k is float32\[1, 6, 24\].*\[2, Lk, 24\]"),
        ({"k": torch.ones(2, 6, 24).bfloat16()}, "k is bfloat16.*q's dtype"),
        ({"q": torch.ones(2, 24, 6).transpose(1, 2)}, "q is .*contiguous last axis"),
        ({"q_weight": torch.ones(12)}, r"q_weight is float32\[12\].*\[24\]"),
        ({"per_head": True}, r"q_weight is float32\[24\].*\[12\]"),
        ({"heads": 5}, "heads is 5.*divisor of D = 24"),
        ({"heads": 8}, "heads is 8.*even heads, not 3"),
        ({"grid": (1, 2, 4)}, r"q is .*8 tokens for the grid \(1, 2, 4\)"),
        ({"grid": (6,)}, r"grid is \(6,\)"),
        ({"grid": (-1, -2, 3)}, "grid is .*at least 1"),
        ({"offset": (0, 0, -1)}, "offset is .*≥ 0"),
        ({"offset": (0, 0, 1)}, r"cos is .*4 positions for the width axis: rope_table\(4, 12\)"),
        ({"offset": (0, 2, 0)}, "cos is .*4 positions for the height axis"),
        ({"offset": (3, 0, 0)}, "cos is .*4 positions for the frame axis"),
        ({"sin": None}, "sin is None.*rope_table"),
        ({"cos": torch.ones(3, 12)}, r"cos is float32\[3, 12\].*\[positions, 6\]"),
        ({"grid": None}, "cos is .*None without a grid"),
        ({"k": torch.ones(2, 6, 24, device="meta")}, "k is .*meta.*on cpu"),
        (
            {"grid": None, "cos": None, "sin": None, "q_weight": None, "k_weight": None},
            "q_weight is None.*nothing to do",
        ),
    ],
)
def test_bad_arguments(change, message):
    arguments = make(2, 6, 6, 24, torch.float32, torch.float32)
    cos, sin = rope_table(3, 12)
    arguments |= {"heads": 2, "cos": cos, "sin": sin, "grid": (1, 2, 3)} | change
    with pytest.raises(ValueError, match="qk_norm_rope: " + message):
        qk_norm_rope(**arguments)


@pytest.mark.parametrize("args", [(0, 4), (4, 3), (4, 0)])
def test_bad_tables(args):
    with pytest.raises(ValueError, match="rope_table: "):
        rope_table(*args)


@st.composite
def arguments(draw):
    heads, pairs, per_head = draw(st.integers(1, 5)), draw(st.integers(2, 20)), draw(st.booleans())
    batch, dtype = draw(st.integers(1, 2)), draw(st.sampled_from([torch.float32, BRAIN, HALF]))
    given = draw(st.sampled_from([(), ("q_weight",), ("k_weight",), ("q_weight", "k_weight")]))
    grid = draw(st.none() | st.tuples(*[st.integers(1, 2)] * 3)) if given else (1, 2, 2)
    # Without pairs a head may have any width; two values leave a norm's gradient to rounding alone.
    head_dim = 2 * pairs if grid else draw(st.integers(4, 70))
    lengths = (math.prod(grid),) * 2 if grid else [draw(st.integers(0, 3)) for _ in "qk"]
    offset = draw(st.tuples(*[st.integers(0, 5)] * 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dim = heads * head_dim
    weight_dtype = draw(st.sampled_from([torch.float32, BRAIN, HALF]))
    tensors = make(batch, *lengths, dim, dtype, weight_dtype, head_dim if per_head else dim)
    tensors = {n: t for n, t in tensors.items() if n in ("q", "k", *given)}
    for name in "qk":
        layout = draw(st.sampled_from(["dense", "packed", "transposed"]))
        if layout == "packed":
            tensors[name] = torch.cat([tensors[name]] * 3, dim=2)[..., dim : 2 * dim]
        elif layout == "transposed":
            tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    return tensors, functions(heads, grid, offset, head_dim if grid else None, per_head)


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(arguments())
@pytest.mark.parametrize("name", ["reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_any_arguments(name, case):
    kernels.set_backend(name if not torch.cuda.is_available() else "auto")
    tensors, both = case
    check(*both, tensors, rounding=rounding("triton", tensors["q"].dtype))
