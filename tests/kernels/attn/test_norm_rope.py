"""qk_norm_rope: against diffusers' own modules, Wan's complex128 form, and plain PyTorch."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from compiled import compile_in_process
from dtypes import BF16, FLOATS, FP16, FP32, FP64
from numerics import assert_within_twice
from op_checks import assert_same_bits, bind, check, check_compiled_once, saved_by, slack
from op_tests import OperationTests
from properties import property_test, st
from rope_reference import EPS, angles, naive_qk

from prfl_fast.kernels import qk_norm_rope, rope_table
from prfl_fast.kernels.attn import norm_rope as module
from prfl_fast.kernels.runtime.registry import get_backend
from prfl_fast.kernels.runtime.triton import INTERPRETING


def rounding(backend, *dtypes, added=0):
    """Return the half-ulps of slack; the backward adds ``added`` squares of a token."""
    # ρ squares the root that vector_norm takes, so it has another rounding than the naive formula.
    fp32 = 3.0
    if backend == "triton" and INTERPRETING:
        # The interpreter adds the squares one after another, √n / 4 half-ulps in the root mean
        # square of 300 draws, so half as much of ρ. Four times that are enough.
        fp32 = max(fp32, added**0.5 / 2)
    return slack(backend, *dtypes, fp32=fp32, truncated=4.0)


@pytest.fixture(params=[False, True])
def per_head(request):
    return request.param


def arguments_for(heads, grid=None, offset=(0, 0, 0), head_dim=None, per_head=False):
    """Return what is not a tensor to be differentiated, the tables of ``grid`` among it."""
    fixed = {"heads": heads, "per_head": per_head, "eps": EPS}
    if grid is None:
        return fixed
    cos, sin = rope_table(max(n + o for n, o in zip(grid, offset, strict=True)), head_dim)
    return fixed | {"cos": cos, "sin": sin, "grid": grid, "offset": offset}


def by_token(heads, length, columns, per_head=False):
    """Return arguments with random angles for every token, ``[L, columns]``."""
    phi = 6 * torch.rand(length, columns)
    return {"heads": heads, "per_head": per_head, "eps": EPS, "cos": phi.cos(), "sin": phi.sin()}


def functions(*args):
    """Return the operation and its plain counterpart with these ``arguments_for``."""
    fixed = arguments_for(*args)
    return bind(qk_norm_rope, fixed), bind(naive_qk, fixed)


def make(batch, lq, lk, dim, dtype, weight_dtype=None, weight_dim=None):
    tensors = {n: torch.randn(batch, length, dim).to(dtype) for n, length in (("q", lq), ("k", lk))}
    if weight_dtype is not None:
        for name in ("q_weight", "k_weight"):
            tensors[name] = (1 + 0.2 * torch.randn(weight_dim or dim)).to(weight_dtype)
    return tensors


def check_case(case, dtype, weight_dtype, per_head, rounding, offset=(0, 0, 0)):
    """Check a ``(batch, grid, heads, head_dim)``."""
    batch, grid, heads, head_dim = case
    length, dim = math.prod(grid), heads * head_dim
    weight_dim = head_dim if per_head else dim
    tensors = make(batch, length, length, dim, dtype, weight_dtype, weight_dim)
    check(*functions(heads, grid, offset, head_dim, per_head), tensors, rounding=rounding)


class TestQkNormRope(OperationTests):
    op = "qk_norm_rope"
    function, naive, reference = qk_norm_rope, naive_qk, module.reference
    flags = {"q": "+---", "k": "-+--", "q_weight": "--+-", "k_weight": "---+"}

    def examples(self, dtype):
        small = FP64 if dtype == FP64 else FP32
        for per_head in (False, True):
            tensors = make(1, 2, 2, 8, dtype, small, 4 if per_head else 8)
            yield tensors, arguments_for(2, (1, 1, 2), (0, 0, 0), 4, per_head)
            yield tensors, by_token(2, 2, 4 if per_head else 2, per_head)
        yield make(1, 2, 2, 8, dtype), arguments_for(2, (1, 1, 2), (0, 0, 0), 4)
        del tensors["k_weight"]
        yield tensors, arguments_for(2, None, None, None, True)

    def layouts(self, dtype):
        grid = (3, 2, 2) if get_backend() == "reference" else (1, 1, 1)
        length = math.prod(grid)
        for per_head in (False, True):
            tensors = make(2, length, length, 48, dtype, FP32, 24 if per_head else 48)
            yield tensors, arguments_for(2, grid, (0, 0, 0), 24, per_head)

    def good(self):
        return make(2, 6, 6, 24, FP32, FP32) | arguments_for(2, (1, 2, 3), (0, 0, 0), 12)

    def far(self, shape):
        batch, length, dim = shape
        tensors = make(batch, length, length, dim, FP16, FP32, 32)
        return tensors, arguments_for(2, (length, 1, 1), (0, 0, 0), 32, True)

    @pytest.mark.slow
    def test_compiles_without_a_graph_break(self, backend):
        super().test_compiles_without_a_graph_break()

    def test_compiles_once_for_all_lengths(self):
        """Serve clips and prompts: q of the grid, then a norm of q and k of other lengths."""

        def both(q, k, weight, cos, sin, frames):
            grid = (frames, 2, 3)
            q, _ = qk_norm_rope(q, q, weight, weight, heads=2, cos=cos, sin=sin, grid=grid)
            return qk_norm_rope(q, k, weight, weight, heads=2)

        cos, sin = rope_table(8, 12)
        calls = [
            {"q": torch.randn(2, frames * 6, 24), "k": torch.randn(2, words, 24),
             "weight": torch.randn(24), "cos": cos, "sin": sin, "frames": frames}
            for frames, words in ((3, 5), (4, 9), (7, 6))
        ]  # fmt: skip
        check_compiled_once(both, calls)

    bad_arguments = [
        ({"q": torch.ones(6, 24)}, r"q is float32\[6, 24\].*\[B, L, D\]"),
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
        ({"grid": None}, r"cos is float32\[3, 6\].*\[L, 6\] or \[L, 12\] without a grid"),
        ({"grid": None, "cos": torch.ones(6, 6)}, r"sin is float32\[3, 6\].*\[L, 6\]"),
        ({"grid": None, "cos": torch.ones(6, 6), "sin": torch.ones(6, 12)}, "sin is .*of cos"),
        ({"grid": None, "k": torch.ones(2, 5, 24)}, "k is .*6 tokens"),
        (dict.fromkeys(("grid", "cos", "sin", "q_weight", "k_weight")), "q_weight is .*nothing to"),
    ]


CASES = [
    # batch, grid, heads, head_dim
    (1, (1, 1, 1), 1, 2), (2, (2, 3, 5), 2, 24), (1, (3, 1, 7), 3, 32), (2, (1, 4, 3), 1, 48),
    (1, (2, 3, 4), 12, 128), (1, (5, 1, 1), 2, 4),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [*FLOATS, FP64])
@pytest.mark.parametrize("weights", ["none", "same", "float32"])
def test_norm_and_rope(case, dtype, weights, per_head):
    weight_dtype = {"none": None, "same": dtype, "float32": FP32}[weights]
    # In float64 the oracle is no more exact than what it judges: 1e-12 is asked for.
    check_case(case, dtype, weight_dtype, per_head, 1e4 if dtype == FP64 else 1)


# A token takes the interpreter 70 ms: few of them, and one dtype for each combination. A head of 10
# has five pairs: 3, 1 and 1.
SMALL_CASES = [
    (1, (1, 1, 1), 1, 2), (2, (1, 2, 1), 3, 10), (1, (2, 1, 1), 5, 40), (1, (1, 1, 2), 3, 96)
]  # fmt: skip


COMBINATIONS = itertools.product(SMALL_CASES, ["none", "same", "other"], [False, True])
DTYPES = itertools.cycle([FP32, BF16, FP16, FP32, FP16])


@pytest.mark.triton
@pytest.mark.parametrize("combination, dtype", zip(COMBINATIONS, DTYPES, strict=False))
def test_norm_and_rope_in_triton(triton_device, dtype, combination):
    case, weights, per_head = combination
    other = BF16 if dtype == FP32 else FP32
    weight_dtype = {"none": None, "same": dtype, "other": other}[weights]
    check_case(case, dtype, weight_dtype, per_head, rounding("triton", dtype), (1, 0, 2))


# HunyuanVideo: heads share the angles and have a norm each. LTX: each head has its own angles.
TABLE_CASES = [
    # batch, tokens, heads, head_dim, a norm of each head, angles of each head
    (1, 1, 1, 2, True, False), (2, 3, 3, 10, True, False), (1, 2, 5, 40, False, False),
    (2, 2, 3, 12, False, True), (1, 2, 5, 40, True, True), (1, 3, 3, 96, False, True),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE_CASES)
@pytest.mark.parametrize("weights", ["none", "float32"])
def test_tables_by_token(backend, dtype, case, weights):
    batch, length, heads, head_dim, per_head, own = case
    dim = heads * head_dim
    weight_dtype = None if weights == "none" else FP32
    tensors = make(batch, length, length, dim, dtype, weight_dtype, head_dim if per_head else dim)
    fixed = by_token(heads, length, (dim if own else head_dim) // 2, per_head)
    both = bind(qk_norm_rope, fixed), bind(naive_qk, fixed)
    check(*both, tensors, rounding=rounding(backend, dtype))


def test_tables_by_token_equal_those_of_a_grid(backend):
    grid, tensors = (1, 2, 1), make(2, 2, 2, 36, FP32, FP32)
    by_grid = functions(3, grid, (0, 0, 0), 12)[0](**tensors)
    phi = angles(grid, 12).float()
    for copies in (1, 3):
        tables = {"cos": phi.cos().repeat(1, copies), "sin": phi.sin().repeat(1, copies)}
        out = qk_norm_rope(**tensors, **tables, heads=3, eps=EPS)
        torch.testing.assert_close(out, by_grid, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "heads, head_dim, per_head", [(12, 128, False), (40, 128, False), (24, 128, True), (32, 96, 0)]
)
def test_wide_tokens(backend, dtype, heads, head_dim, per_head):
    tensors = make(1, 1, 1, heads * head_dim, dtype, dtype, head_dim if per_head else None)
    tensors["k"] = tensors["k"] * 100
    fixed = heads, (1, 1, 1), (3, 17, 31), head_dim, per_head
    added = 0 if per_head else heads * head_dim
    check(*functions(*fixed), tensors, rounding=rounding(backend, dtype, added=added))


@pytest.mark.parametrize("dtype, dim", [(FP32, 36), (BF16, 36), (BF16, 5121)])
def test_norm_only_with_different_lengths(backend, dtype, dim, per_head):
    tensors = make(2, 1, 3, dim, dtype, dtype, dim // 3 if per_head else dim)
    check(*functions(3, None, None, None, per_head), tensors, rounding=rounding(backend, dtype))


@pytest.mark.parametrize("length", [0, 1])
def test_without_tokens(backend, length, per_head):
    """Return no output and a sum of zero; an odd head needs no pairs without a grid."""
    tensors = make(2, 0, length, 15, FP32, FP32, 5 if per_head else 15)
    check(*functions(3, None, None, None, per_head), tensors, rounding=2)


@pytest.mark.parametrize("given", ["q_weight", "k_weight"])
def test_one_side_normalized(backend, given):
    tensors = make(1, 2, 2, 24, FP32, FP32)
    tensors = {n: t for n, t in tensors.items() if n in ("q", "k", given)}
    check(*functions(2, (1, 1, 2), (0, 0, 0), 12), tensors, rounding=2)
    check(*functions(2), tensors)
    other = {"q_weight": 1, "k_weight": 0}[given]
    out, source = functions(2)[0](**tensors)[other], tensors["k" if other else "q"]
    assert torch.equal(out, source) and out.data_ptr() != source.data_ptr()


def test_offset_of_a_shard():
    whole = make(1, 4 * 2 * 3, 4 * 2 * 3, 24, FP32)
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
    assert cos.dtype == sin.dtype == FP32 and cos.shape == (64, head_dim // 2)
    assert torch.equal(cos, rope.freqs_cos[:, ::2]) and torch.equal(sin, rope.freqs_sin[:, 1::2])


@pytest.mark.parametrize("head_dim", [24, 32, 48, 128])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_against_the_diffusers_attention(head_dim, dtype, monkeypatch):
    """Run the RMSNorm modules, the rotary module and the rotation inside the processor."""
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    heads, dim, grid = 2, 2 * head_dim, (3, 4, 2)
    tables = wan.WanRotaryPosEmbed(head_dim, (1, 2, 2), 64)(torch.empty(1, 1, 3, 8, 4))

    def diffusers(q, k, q_weight, k_weight):
        attn = wan.WanAttention(dim, heads, head_dim, EPS, processor=wan.WanAttnProcessor())
        attn.to_out = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        attn.norm_q.weight, attn.norm_k.weight = map(torch.nn.Parameter, (q_weight, k_weight))
        # The values are queries and keys in place of the attention of both.
        both = lambda query, key, value, **_: torch.cat([query, key], -1)  # noqa: E731
        monkeypatch.setattr(wan, "_get_qkv_projections", lambda *_: (q, k, k))
        monkeypatch.setattr(wan, "dispatch_attention_fn", both)
        out = attn(q, None, None, tables).unflatten(2, (heads, -1))
        return [t.flatten(2) for t in out.chunk(2, -1)]

    tensors = make(2, 24, 24, dim, dtype, dtype)
    cos, sin = rope_table(8, head_dim)
    with torch.no_grad():
        out = qk_norm_rope(**tensors, heads=heads, cos=cos, sin=sin, grid=grid, eps=EPS)
        plain = diffusers(**tensors)
        oracle = diffusers(**{n: t.double() for n, t in tensors.items()})
    for name, *triple in zip("qk", out, plain, oracle, strict=True):
        assert_within_twice(*triple, name=name)


def test_against_the_complex128_form():
    """Multiply pairs as complex128 by polar(1, position · frequency), as Wan's code does."""
    grid, heads, head_dim = (2, 3, 4), 3, 128
    tensors = make(2, 24, 24, heads * head_dim, FP32)
    turns = torch.polar(torch.ones(24, 64, dtype=FP64), angles(grid, head_dim))
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


@pytest.mark.triton
def test_programs_walk_over_tokens_and_samples(triton_backend, monkeypatch, per_head):
    """Count places on in three programs for ten tokens, over the end of a sample too."""
    for name in ("forward_launch", "backward_launch"):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, f=original: dataclasses.replace(f(*a), programs=3)
        )
    for case in ((1, (1, 1, 5), 2, 12), (2, (2, 2, 1), 1, 8)):
        check_case(case, FP32, BF16, per_head, 2, (0, 2, 1))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_slices_of_a_packed_projection(backend, dtype, per_head):
    both = functions(2, (1, 1, 2), (0, 0, 0), 12, per_head)
    tensors = make(2, 2, 2, 24, dtype, dtype, 12 if per_head else 24)
    tensors["qkv"] = torch.randn(2, 2, 72).to(dtype)
    del tensors["q"], tensors["k"]

    def sliced(qkv, **weights):
        return dict(zip("qk", qkv.chunk(3, dim=-1), strict=False)) | weights

    check(*both, tensors, rounding=rounding(backend, dtype), of=sliced)


def test_transposed_rows(backend):
    ours, _ = both = functions(2, (1, 1, 2), (0, 0, 0), 12)
    tensors = make(2, 2, 2, 24, FP32, FP32)
    tensors |= {n: tensors[n].transpose(0, 1) for n in "qk"}
    check(*both, tensors, rounding=2)
    out, dense = ours(**tensors), ours(**{n: t.contiguous() for n, t in tensors.items()})
    assert all(t.is_contiguous() for t in out)
    assert_same_bits(out, dense)


@pytest.mark.parametrize("used", [0, 1])
def test_an_unused_output(backend, used):
    both = functions(2, (1, 1, 2), (0, 0, 0), 12)
    grads = [torch.randn(1, 2, 24) if i == used else None for i in range(2)]
    check(*both, make(1, 2, 2, 24, FP32, FP32), grads=grads, rounding=3)


def test_saved_bytes():
    ours, plain = functions(4, (4, 8, 8), (0, 0, 0), 32)
    tensors, tables = make(1, 256, 256, 128, BF16, FP32), 2 * 8 * 16 * 4
    assert saved_by(ours, tensors) == 2 * 256 * 128 * 2 + 2 * 128 * 4 + tables
    assert saved_by(ours, {n: tensors[n] for n in "qk"}) == tables
    assert saved_by(plain, tensors) > 8 * 256 * 128 * 2


def test_launches_are_sane(capability):
    sizes = itertools.product((1, 2, 40, 96, 128, 256), (1, 3, 8, 12, 40, 64))
    sizes = [(head_dim * heads, head_dim) for head_dim, heads in sizes if head_dim * heads <= 8192]
    sizes += [(dim, None) for dim in (1, 64, 96, 1536, 3072, 5120, 5121, 8192)]
    cases = itertools.product(sizes, (1, 7, 32760, 151200), (FP32, BF16))
    for (dim, head_dim), tokens, dtype in cases:
        for launch_of in (module.forward_launch, module.backward_launch):
            launch = launch_of(tokens, dim, head_dim, dtype, capability)
            assert head_dim in (None, launch.head)
            assert launch.head <= launch.block_d < max(2 * launch.head, 5)
            rows = launch.block_h * -(-dim // (launch.head * launch.block_h))
            threads = 32 * launch.num_warps
            assert rows * launch.head >= dim
            assert rows * launch.block_d <= threads * (40 if dtype == BF16 else 24)
            assert launch.block_h * launch.block_d <= threads * 8
            assert 1 <= launch.programs <= tokens
    # A token of Wan's leaves no lane idle, and many tokens write no more partial rows than few.
    for dim, dtype in ((3072, BF16), (5120, BF16), (3072, FP32)):
        launch = module.backward_launch(32760, dim, 128, dtype, capability)
        assert (launch.num_warps, dim % (launch.block_h * launch.block_d)) == (4, 0)
        assert launch == module.backward_launch(10**6, dim, 128, dtype, capability)


@pytest.mark.slow
@pytest.mark.aot
def test_memory_instructions():
    """Move 16 bytes each; only a reduction uses shared memory, and nothing for heads."""
    script = """
        import dataclasses, json
        import aot
        cases = aot.OPERATIONS["qk_norm_rope"]((9, 0), False)
        case = next(c for c in cases if c.label.startswith("forward bf16 D=5120"))
        found = []
        for per_head in (False, True):
            constexprs = case.constexprs | {"PER_HEAD": per_head}
            kernel = aot.compile_case(dataclasses.replace(case, constexprs=constexprs), 90)
            found.append((kernel.asm["ptx"], kernel.metadata.shared))
        print(json.dumps(found))
    """
    found = compile_in_process(script)
    for (ptx, shared), most, moved in zip(found, (16, 0), (8, 0), strict=True):
        assert shared == most
        assert len(re.findall(r"(?:ld|st)\.shared", ptx)) == moved
        stores = re.findall(r"st\.global\S*", ptx)
        assert stores == ["st.global.v4.b32"] * 10  # two tensors in five chunks
        loads = [load for load in re.findall(r"ld\.global\S*", ptx) if ".v4." in load]
        assert len(loads) == 20  # x and w
        assert len(re.findall(r"ld\.global\S*", ptx)) - len(loads) == 16  # four pairs' angles


@pytest.mark.parametrize("args", [(0, 4), (4, 3), (4, 0)])
def test_bad_tables(args):
    with pytest.raises(ValueError, match="rope_table: "):
        rope_table(*args)


@property_test(examples=250)
def test_any_arguments(draw):
    heads, pairs, per_head = draw(st.integers(1, 5)), draw(st.integers(2, 20)), draw(st.booleans())
    batch, dtype = draw(st.integers(1, 2)), draw(st.sampled_from(FLOATS))
    given = draw(st.sampled_from([(), ("q_weight",), ("k_weight",), ("q_weight", "k_weight")]))
    grid = draw(st.none() | st.tuples(*[st.integers(1, 2)] * 3)) if given else (1, 2, 2)
    # Without pairs a head may have any width; two values leave a norm's gradient to rounding alone.
    head_dim = 2 * pairs if grid else draw(st.integers(4, 70))
    lengths = (math.prod(grid),) * 2 if grid else [draw(st.integers(0, 3)) for _ in "qk"]
    offset = draw(st.tuples(*[st.integers(0, 5)] * 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dim = heads * head_dim
    weight_dtype = draw(st.sampled_from(FLOATS))
    tensors = make(batch, *lengths, dim, dtype, weight_dtype, head_dim if per_head else dim)
    tensors = {n: t for n, t in tensors.items() if n in ("q", "k", *given)}
    for name in "qk":
        layout = draw(st.sampled_from(["dense", "packed", "transposed"]))
        if layout == "packed":
            tensors[name] = torch.cat([tensors[name]] * 3, dim=2)[..., dim : 2 * dim]
        elif layout == "transposed":
            tensors[name] = tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    both = functions(heads, grid, offset, head_dim if grid else None, per_head)
    dtypes = {t.dtype for t in tensors.values()}  # a float32 weight's gradient has float32's slack
    first = FP32 if FP32 in dtypes else dtype
    half_ulps = rounding(get_backend(), first, *dtypes, added=0 if per_head else dim)
    check(*both, tensors, rounding=half_ulps)
