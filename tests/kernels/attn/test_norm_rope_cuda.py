"""qk_norm_rope in CUDA C++ without a GPU: the source of the kernel, compiled for the CPU."""

import math

import pytest
import torch
from cuda_cases import assert_notices, install, within
from cuda_on_cpu import compile_kernel, needs_gxx
from dtypes import BF16, FP16, FP32
from numerics import assert_within_twice
from op_checks import assert_same_bits, bind, run
from properties import given, settings, st
from rope_reference import EPS, naive_qk
from tiers import slow_except

from prfl_fast.kernels import rope_table
from prfl_fast.kernels.runtime import cuda_launch

pytestmark = needs_gxx


BARRIER = "    if (rotates || whole) __syncthreads();\n"
FIRST = "__syncthreads();\n  }\n  int parity"


class Rope:
    """One call: tensors, rotation, incoming gradients."""

    def __init__(
        self, batch, lengths, heads, head_dim, dtype, *, grid=None, offset=(0, 0, 0),
        weights=(FP32, FP32), per_head=False, needed=(True,) * 4,
    ):  # fmt: skip
        self.heads, self.per_head, self.grid, self.offset = heads, per_head, grid, offset
        dim = heads * head_dim
        if grid is not None:
            lengths = (math.prod(grid),) * 2
        self.tensors = [within(torch.randn(batch, n, dim).to(dtype)) for n in lengths]
        size = head_dim if per_head else dim
        for dtype_of in weights:
            weight = None if dtype_of is None else (1 + 0.2 * torch.randn(size)).to(dtype_of)
            self.tensors.append(weight)
        self.grads = [within(torch.randn(batch, n, dim).to(dtype)) for n in lengths]
        self.needed = [bool(n) and t is not None for n, t in zip(needed, self.tensors, strict=True)]
        positions = max(n + o for n, o in zip(grid or (0,) * 3, offset, strict=True))
        self.tables = (None, None) if grid is None else rope_table(positions, head_dim)

    def numbers(self):
        axes = ([], []) if self.grid is None else (list(self.grid), list(self.offset))
        return *self.tables, *axes, self.heads, self.per_head, EPS

    def naive(self, double=False):
        """Return outputs and gradients of plain PyTorch."""
        names = ("q", "k", "q_weight", "k_weight")
        given = {n: t for n, t in zip(names, self.tensors, strict=True) if t is not None}
        fixed = {n: getattr(self, n) for n in ("heads", "grid", "offset", "per_head")}
        outputs, gradients = run(bind(naive_qk, fixed), given, self.grads, double)
        return outputs, [gradients.get(name) for name in names]

    def forward(self):
        return cuda_launch.qk_norm_rope(*self.tensors, *self.numbers())

    def backward(self):
        q, k, q_weight, k_weight = self.tensors
        kept = [x if w is not None else None for x, w in ((q, q_weight), (k, k_weight))]
        given = (*self.grads, *kept, q_weight, k_weight, *self.numbers())
        return cuda_launch.qk_norm_rope_backward(*given, self.needed)

    def check(self, rounding=1.0):
        outputs, gradients = self.forward(), self.backward()
        plain, oracle = self.naive(), self.naive(double=True)
        for i, triple in enumerate(zip(outputs, plain[0], oracle[0], strict=True)):
            assert_within_twice(*triple, name=f"output {i}", rounding=rounding)
            assert outputs[i].is_contiguous()
        came = [self.needed[i] and self.grads[i % 2] is not None for i in range(4)]
        for i, (gradient, need) in enumerate(zip(gradients, came, strict=True)):
            assert gradient.numel() == (self.tensors[i].numel() if need else 0)
            if need:
                triple = gradient, plain[1][i], oracle[1][i]
                assert_within_twice(*triple, name=f"gradient {i}", rounding=rounding)
        assert_same_bits(gradients, self.backward())


ROPE = {
    "one row": dict(args=(1, None, 1, 64), grid=(1, 1, 1)),
    "odd D, shard": dict(args=(2, None, 3, 24), grid=(2, 3, 3), offset=(4, 1, 2)),
    "1.3B": dict(args=(1, None, 12, 128), grid=(2, 2, 3)),
    "14B": dict(args=(1, None, 40, 128), grid=(1, 2, 3), offset=(3, 0, 0)),
    "cross-attention": dict(args=(2, (7, 3), 12, 128)),
    "cross-attention, not a power of two": dict(args=(1, (3, 11), 1, 1000)),
    "one side normalized": dict(args=(1, None, 6, 40), grid=(1, 4, 2), weights=(None, FP32)),
    "rotation": dict(args=(2, None, 4, 72), grid=(3, 1, 5), weights=(None, None)),
    "per head": dict(args=(2, None, 5, 64), grid=(1, 3, 4), per_head=True),
    "per head, norm": dict(args=(1, (9, 4), 12, 128), per_head=True),
    "per head, one row": dict(args=(1, (1, 1), 3, 8), per_head=True),
    "8192": dict(args=(1, None, 64, 128), grid=(1, 1, 3)),
}


def rope(case, dtype, **changes):
    options = ROPE[case] | changes
    return Rope(*options.pop("args"), dtype, **options)


@pytest.mark.cases(8)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("case", ROPE)
def test_rope(device, case, dtype):
    launches = device((9, 0), 1)
    rope(case, dtype).check()
    assert len(launches) == 3


@pytest.mark.parametrize("weight", [BF16, FP16])
def test_rope_weights_of_any_dtype(launches, weight):
    rope("odd D, shard", BF16, weights=(weight, FP32)).check()
    rope("per head", BF16, weights=(weight, weight)).check()


@pytest.mark.parametrize(
    "needed", [(1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0), (1, 1, 0, 0), (0, 0, 1, 1)]
)
def test_rope_writes_what_is_needed(launches, needed):
    for case in ("odd D, shard", "cross-attention"):
        rope(case, BF16, needed=needed).check()


@pytest.mark.parametrize("side", [0, 1])
def test_rope_gradient_of_one_output(device, side):
    launches = device((8, 0), 2)
    call = rope("odd D, shard", FP16)
    call.grads[side] = None
    call.check()
    assert launches[-1][1 + side] == 0


def test_rope_of_a_packed_projection_and_of_other_strides(launches):
    call = rope("odd D, shard", BF16)
    dense = call.forward(), call.backward()
    batch, length, dim = call.tensors[0].shape
    packed = torch.cat([*call.tensors[:2], call.tensors[0]], dim=2)
    for qkv in (packed, packed.transpose(0, 1).contiguous().transpose(0, 1)):
        call.tensors[:2] = qkv.split(dim, 2)[:2]
        assert_same_bits(call.forward(), dense[0])
        assert_same_bits(call.backward(), dense[1])
    # Gradients: dense in another order, columns that are not, misaligned, expanded.
    grads = list(call.grads)
    spread = torch.stack(grads, 3)
    shifted = torch.cat([grads[0][..., :1], grads[0]], 2)[..., 1:]
    for call.grads in ([spread[..., 0], spread[..., 1]], [shifted, grads[1].mT.contiguous().mT]):
        assert_same_bits(call.backward(), dense[1])
    call.grads = [torch.ones((), dtype=BF16).expand(batch, length, dim)] * 2
    expanded = call.backward()
    call.grads = [g.contiguous() for g in call.grads]
    assert_same_bits(expanded, call.backward())


@pytest.mark.parametrize("case", ["odd D, shard", "1.3B", "per head", "cross-attention"])
def test_rope_does_not_depend_on_the_order_of_threads(libraries, launches, monkeypatch, case):
    call = rope(case, BF16)
    first = call.forward(), call.backward()
    for order in range(1, 5):
        install(monkeypatch, libraries, (8, 0), 1, order)
        assert_same_bits(call.forward(), first[0])
        assert_same_bits(call.backward(), first[1])


# (text of the source, replacement, place among its equals)
BARRIERS = {
    "forward": (BARRIER, "", 0),
    "backward": (BARRIER, "", 1),
    "first angles": (FIRST, FIRST.partition("\n")[2], 0),
    "two sets of sums": ("    parity ^= 1;\n", "", 0),
    "two sets of angles": ("angles + (parity ^ 1) * head_dim", "angles + parity * head_dim", 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", slow_except(BARRIERS, ("two sets of angles",)))
def test_the_emulation_notices_a_missing_barrier_of_rope(tmp_path, monkeypatch, case):
    library = compile_kernel("qk_norm_rope", tmp_path, BARRIERS[case])
    call = Rope(1, None, 12, 64, BF16, grid=(2, 5, 5))
    monkeypatch.setattr(cuda_launch, "ROPE_MAX_BLOCKS", 2)
    outputs, gradients = call.naive(double=True)
    outcomes = []
    for order in range(5):
        install(monkeypatch, lambda name: library, (8, 0), 1, order)
        outcomes.append([*call.forward(), *call.backward()[:2]])
    assert_notices(outcomes, (*outputs, *gradients[:2]))


def test_a_nan_stays_in_its_row(launches):
    call = rope("1.3B", BF16)
    clean = call.forward(), call.backward()
    call.tensors[0][0, 5, 700] = float("nan")
    rows = [n for n in range(12) if n != 5]
    for results, before in zip((call.forward(), call.backward()), clean, strict=True):
        assert results[0][0, 5].isnan().all() and torch.equal(results[1], before[1])
        assert torch.equal(results[0][0, rows], before[0][0, rows])


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 2**31)))
    grid, offset = (draw(st.tuples(*[st.integers(*ends)] * 3)) for ends in ((1, 4), (0, 5)))
    head_dim = draw(st.sampled_from([8, 16, 24, 64, 72, 128, 256]))
    options = {
        "per_head": draw(st.booleans()) and head_dim not in (24, 72),
        "weights": draw(st.tuples(*(st.sampled_from([None, FP32, BF16, FP16]),) * 2)),
        "needed": draw(st.tuples(*(st.booleans(),) * 4)),
    }
    if draw(st.booleans()):
        options |= {"grid": grid, "offset": offset}
    lengths = (math.prod(grid), 1 + sum(offset))
    sizes = draw(st.integers(1, 3)), lengths, draw(st.integers(1, 6)), head_dim
    call = Rope(*sizes, draw(st.sampled_from([BF16, FP16])), **options)
    call.needed[0] = call.needed[0] or not any(call.needed)
    return call


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(call=calls(), multiprocessors=st.integers(1, 3))
def test_any_rope(libraries, call, multiprocessors):
    with pytest.MonkeyPatch.context() as patch:
        install(patch, libraries, (9, 0), multiprocessors)
        call.check(rounding=4)
