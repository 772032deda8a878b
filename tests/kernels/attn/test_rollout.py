"""rollout_attention: kernels against their emulation, the emulation against float64, fallback."""

import functools
import itertools
import json
import math
import re
import warnings

import pytest
import torch
from attention_cases import relative, sdpa, video
from compiled import compile_in_process
from dtypes import BF16, FP16, FP32, FP64
from op_checks import RecordedCalls
from op_tests import NoGradientTests
from properties import property_test, st
from tiers import slow_except
from torch.utils.flop_counter import FlopCounterMode

import prfl_fast.kernels as kernels
from prfl_fast.kernels import attention, rollout_attention
from prfl_fast.kernels.attn import quantize_kv as producer
from prfl_fast.kernels.attn import rollout as module
from prfl_fast.kernels.attn import rollout_variants as chooser
from prfl_fast.kernels.runtime.registry import OPERATIONS, get_backend, report
from prfl_fast.kernels.runtime.triton import INTERPRETING

VARIANTS = chooser.VARIANTS


def chip_has(variant):
    """Return whether the GPU, if there is one, has the number formats of a variant."""
    old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)
    return variant not in ("int8_fp8", "fp8") or not old


@pytest.fixture(params=VARIANTS)
def variant(request):
    if not chip_has(request.param):
        pytest.skip("needs a GPU with e4m3: capability 8.9 or newer")
    return request.param


def make(batch, queries, keys, heads, head_dim, dtype=FP16):
    """Return unit q and k, some channels of k far from zero as RMSNorm's weights leave them."""
    q, k, v = (torch.randn(batch, n, heads * head_dim) for n in (queries, keys, keys))
    k = k + 3 * torch.randn(heads * head_dim) * (torch.rand(heads * head_dim) < 0.1)
    return {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}


def exact(q, k, v, heads, scale=None):
    """Return float64 attention."""
    scale = (q.shape[-1] // heads) ** -0.5 if scale is None else scale
    return module.reference(q, k, v, heads, scale, "auto", upcast=FP64)


def assert_same(out, expected):
    """Assert equality but for the rounding of sums in another order.

    In float16 it moves a result by a unit in its last place, and once in thousands a weight to the
    next e4m3 number. The interpreter truncates to bfloat16: the result, and in "int8" every weight.
    """
    assert out.dtype == expected.dtype and out.shape == expected.shape
    assert torch.isfinite(out).all()
    truncates = out.dtype == BF16 and INTERPRETING
    limit = 8e-3 if truncates else 4e-3 if out.dtype == BF16 else 3e-4
    difference = out.double() - expected.double()
    scale = expected.double().square().mean().sqrt()
    assert difference.square().mean().sqrt() <= limit * scale
    assert difference.abs().max() <= 8 * limit * max(scale, expected.abs().max().double())


X = torch.zeros(2, 4, 32, dtype=FP16)


class TestRolloutAttention(NoGradientTests):
    op, function = "rollout_attention", rollout_attention
    far_shapes = ((1, 3, 32), (3, 1, 32))
    bad_arguments = [
        (dict(q=X[0]), "q is float16"), (dict(k=[1.0]), r"k is \[1.0\]"),
        (dict(q=torch.zeros(2, 32, 32, dtype=FP16).transpose(1, 2)), "q is"),
        (dict(k=X[:1]), "k is"), (dict(k=X[..., :16]), "k is"),
        (dict(k=X[:, :0], v=X[:, :0]), "k is"), (dict(k=X.bfloat16()), "k is bfloat16"),
        (dict(v=X[:, :3]), "v is"), (dict(v=torch.cat([X, X], -1)[..., ::2]), "v is"),
        (dict(heads=3), "heads is 3"), (dict(heads=0), "heads is 0"),
        (dict(variant="int4"), "variant is 'int4'"),
        (dict(extra_k=X), "extra_v is None"), (dict(extra_v=X), "extra_k is None"),
        (dict(extra_k=X[..., :16], extra_v=X[..., :16]), "extra_k is"),
        (dict(extra_k=X, extra_v=X[:, :3]), "extra_v is"),
    ]  # fmt: skip

    def examples(self, dtype):
        dtype = BF16 if dtype == BF16 else FP16
        more = make(1, 1, 7, 2, 32, dtype)
        extra = {f"extra_{name}": more[name] for name in "kv"}
        yield make(1, 5, 70, 2, 32, dtype) | extra | {"heads": 2, "scale": 0.3}
        for variant in filter(chip_has, VARIANTS):
            yield make(1, 5, 70, 2, 32, dtype) | {"heads": 2, "variant": variant}

    good = staticmethod(lambda: {"q": X, "k": X, "v": X, "heads": 2})
    at_length = staticmethod(lambda length: make(2, length, length + 3, 2, 16) | {"heads": 2})

    def near_calls(self, shape):
        tensors = {name: torch.randn(shape).half() for name in "qkv"}
        with RecordedCalls() as recorded:
            for variant in ("int8_fp8", "int8"):
                rollout_attention(**tensors, heads=1, variant=variant)
        return recorded.calls

    @pytest.mark.gpu_smoke
    def test_bfloat16(self, smoke_backend, variant):
        tensors = make(1, 70, 64, 2, 80, BF16)
        out = rollout_attention(**tensors, heads=2, variant=variant)
        assert relative(out, exact(**tensors, heads=2)) <= 8e-2


# The choice of a variant.
CHOICES = [
    (None, "int8_fp8", "9.0"), ((7, 5), None, "not capability 7.5"),
    ((0, 0), None, "needs an NVIDIA GPU of capability 8.0, not capability 0.0"),
    ((8, 0), "int8", "capability 8.0: int8 q·k, 16-bit p·v"), ((8, 6), "int8", "8.6"),
    ((8, 9), "int8_fp8", "8.9"), ((9, 0), "int8_fp8", "capability 9.0: int8 q·k, e4m3 p·v"),
    ((10, 0), "fp8", "capability 10.0: e4m3 q·k and p·v"), ((10, 3), "fp8", "10.3"),
    ((12, 0), "int8_fp8", "12.0"), ((13, 0), "fp8", "13.0"),
]  # fmt: skip


@pytest.mark.parametrize("capability, chosen, reason", CHOICES)
def test_choice_by_capability(capability, chosen, reason):
    for dtype, head_dim in itertools.product((BF16, FP16), (16, 64, 80, 128, 256)):
        best = chooser.choose_variant(capability, dtype, head_dim)
        assert best.variant == chosen and reason in best.reason


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0)])
def test_choice_by_dtype_and_head_size(capability):
    for dtype in (FP32, FP64):
        best = chooser.choose_variant(capability, dtype, 128)
        assert best.variant is None and f"not {dtype}" in best.reason
    for head_dim in (1, 8, 24, 100, 272, 512):
        best = chooser.choose_variant(capability, BF16, head_dim)
        assert best.variant is None and f"not {head_dim}" in best.reason


def test_report_names_the_variant(monkeypatch):
    kernels.set_backend("auto")
    choice = report("cpu", BF16)["rollout_attention"]
    assert choice == ("reference", "cpu tensors; int8 q·k, e4m3 p·v as on capability 9.0")
    choice = report("cpu", FP32)["rollout_attention"]
    assert choice.backend == "reference" and choice.reason.startswith("runs attention: 8-bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(chooser, "HAS_TRITON", True)
    show = OPERATIONS["rollout_attention"].report
    given = chooser.Choice("triton", "CUDA tensors")
    for capability, backend, reason in (
        ((9, 0), "triton", "CUDA tensors; capability 9.0: int8 q·k, e4m3 p·v"),
        ((7, 5), "reference", "runs attention: .* not capability 7.5"),
    ):
        monkeypatch.setattr(chooser, "chip_of", lambda device, capability=capability: capability)
        choice = show(given, torch.device("cuda"), BF16)
        assert choice.backend == backend and re.fullmatch(reason, choice.reason)
    monkeypatch.setattr(chooser, "HAS_TRITON", False)
    monkeypatch.setattr(chooser, "chip_of", lambda device: (9, 0))
    choice = show(given, torch.device("cuda"), BF16)
    assert choice == ("reference", "runs attention: triton is not installed")


# The arithmetic.
@pytest.mark.parametrize("heads, head_dim, sharpness", [(2, 128, 1.0), (1, 128, 1.7), (2, 64, 1.0)])
def test_error_on_activations_like_a_video_model(variant, heads, head_dim, sharpness):
    tensors = video(1024, heads, head_dim, sharpness=sharpness)
    out = rollout_attention(**tensors, heads=heads, variant=variant)
    assert relative(out, exact(**tensors, heads=heads)) <= 5e-2


def test_error_on_white_noise(variant):
    """Average independent values, which have nothing but their errors in common."""
    q, k, v = (torch.randn(1, n, 128).to(BF16) for n in (256, 4096, 4096))
    out = rollout_attention(q, k, v, heads=1, variant=variant)
    limit = {"int8_fp8": 4.5e-2, "fp8": 6e-2, "int8": 2e-2}[variant]
    assert relative(out, exact(q, k, v, heads=1)) <= limit


@pytest.mark.parametrize("int8", [True, False])
def test_smoothing_of_keys_helps(int8):
    """Attend by 8-bit q and k with and without the mean of k over tokens."""
    tensors = video(1024, 1, 128, sharpness=1.5)
    q, k, v = (t[0].double() for t in tensors.values())
    oracle = exact(**tensors, heads=1)[0]

    def attend(keys):
        q8, q_scale = producer.quantize_blocks(q.float(), 128, int8)
        k8, k_scale = producer.quantize_blocks(keys.float(), 128, int8)
        scores = (q8 * q_scale).double() @ (k8 * k_scale).double().T / math.sqrt(128)
        return relative(torch.softmax(scores, -1) @ v, oracle)

    smoothed, plain = attend(k - k.mean(0)), attend(k)
    assert 1.3 * smoothed < plain


def test_values_lose_nothing_to_their_mean():
    """Add the mean of v exactly: an offset of 500 costs no digit but those of float16."""
    q, k, v = make(1, 16, 96, 1, 32).values()
    v = (v * 4).round() / 4  # exact to 1/4 also from 256 to 512
    low, high = (rollout_attention(q, k, t, heads=1).float() for t in (v, v + 500))
    assert (high - 500 - low).abs().max() <= 0.13


def test_reference_is_an_oracle():
    tensors = make(2, 5, 9, 3, 16)
    wanted = sdpa(*(t.double() for t in tensors.values()), heads=3)
    torch.testing.assert_close(exact(**tensors, heads=3), wanted)


SHAPES = [
    # batch, Lq, Lk, heads, d
    (1, 1, 1, 1, 16), (2, 1, 130, 2, 32), (1, 129, 1, 1, 64), (2, 3, 140, 2, 48),
    (1, 70, 64, 2, 80), (1, 130, 300, 2, 128), (1, 33, 70, 1, 208), (1, 65, 128, 1, 256),
]  # fmt: skip


@pytest.mark.triton
@pytest.mark.parametrize(
    "shape, dtype", [*((shape, FP16) for shape in SHAPES), (SHAPES[1], BF16), (SHAPES[4], BF16)]
)
def test_the_kernels_compute_what_the_reference_does(triton_device, shape, variant, dtype):
    *_, heads, head_dim = shape
    given = make(*shape, dtype) | {"heads": heads, "variant": variant}
    assert_same(rollout_attention(**given), module.reference(**given, scale=head_dim**-0.5))


@pytest.mark.triton
@pytest.mark.parametrize("int8", [True, False])
def test_producers_round_as_pytorch_does(triton_device, int8):
    """Give codes and scales bit for bit from the same means: 64 tokens are one chunk."""
    k, v = torch.randn(2, 64, 3 * 48).half(), (torch.randn(2, 64, 3 * 48) * 30 + 7).half()
    got = producer.quantize_keys_and_values(k, v, 3, 64, int8, True)
    k4, v4 = (t.float().unflatten(-1, (3, 48)).transpose(1, 2) for t in (k, v))
    codes, scale = producer.quantize_blocks(k4 - k4.mean(-2, keepdim=True), 64, int8)
    assert got.keys.shape == (2, 3, 1, 64, 64) and got.values.shape == (2, 3, 1, 64, 64)
    same = (got.keys[:, :, 0, :, :48].float() == codes).float().mean()
    assert same > 0.999 and (got.keys[..., 48:].float() == 0).all()
    torch.testing.assert_close(got.key_scale, scale[..., 0, :], rtol=1e-5, atol=0)
    codes, scale, mean = producer.quantize_channels(v4)
    same = (got.values[:, :, 0, :48].float().mT == codes).float().mean()
    assert same > 0.999 and (got.values[:, :, :, 48:].float() == 0).all()
    for mine, theirs in ((got.value_scale, scale), (got.value_mean, mean)):
        torch.testing.assert_close(mine.unflatten(-1, (3, 1, 48)), theirs, rtol=1e-5, atol=1e-5)


def test_slices_of_a_packed_projection(backend, variant):
    qkv = torch.randn(2, 9, 3 * 32).half()
    strided = qkv[:, ::2].chunk(3, dim=-1)
    dense = (t.contiguous() for t in strided)
    out, expected = (rollout_attention(*t, heads=2, variant=variant) for t in (strided, dense))
    assert torch.equal(out, expected) and out.is_contiguous()


def test_second_key_set(backend, variant):
    tensors, (_, k, v) = make(1, 5, 40, 2, 32), make(1, 1, 7, 2, 32).values()
    attend = functools.partial(rollout_attention, heads=2, variant=variant)
    both = attend(**tensors, extra_k=k, extra_v=v)
    assert torch.equal(both, attend(**tensors) + attend(tensors["q"], k, v))


@pytest.mark.parametrize("scale", [None, 0.0, -0.2, 1.5])
def test_scale(backend, scale):
    tensors = make(1, 6, 20, 1, 64)
    out = rollout_attention(**tensors, heads=1, scale=scale)
    oracle = exact(**tensors, heads=1, scale=scale)
    assert relative(out, oracle) <= 0.08
    if scale == 0:
        mean = tensors["v"].double().mean(1, keepdim=True).expand_as(oracle)
        torch.testing.assert_close(out.double(), mean, rtol=0, atol=0.02)


def test_a_large_query_does_not_change_the_others(backend, variant):
    """Each query has a scale of its own."""
    q, k, v = make(1, 6, 40, 1, 32).values()
    larger = q.clone()
    larger[:, 2] *= 100
    out, other = (rollout_attention(x, k, v, heads=1, variant=variant) for x in (q, larger))
    same = (out == other).all(-1)[0].tolist()
    assert same == [True, True, False, True, True, True]


def test_constant_tensors(backend, variant):
    """Leave no spread to take a scale from: zeros, one token, equal tokens."""
    q, k, v = make(1, 4, 12, 1, 32).values()
    attend = functools.partial(rollout_attention, heads=1, variant=variant)
    zero, row = torch.zeros_like(k), v[:, :1]
    assert not attend(q, zero, zero).any()
    out = attend(q, k, row.expand_as(v))
    torch.testing.assert_close(out, row.expand_as(out), rtol=2e-3, atol=2e-3)
    for query in (q, torch.zeros_like(q)):
        assert torch.equal(attend(query, k[:, :1], row), row.expand_as(out))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_is_not_lost(backend, variant, name):
    tensors = make(1, 3, 70, 2, 32)
    tensors[name][0, 2, 3] = float("nan")
    out = rollout_attention(**tensors, heads=2, variant=variant)
    assert out[0, 2, 3].isnan() and out[..., 32:].isfinite().all()


def test_empty_batches_and_queries(backend):
    for shape in ((0, 3, 5, 1, 16), (2, 0, 5, 1, 16)):
        tensors = make(*shape)
        assert rollout_attention(**tensors, heads=1).shape == tensors["q"].shape


def test_compiles_without_a_graph_break():
    tensors = make(1, 6, 9, 2, 16) | {f"extra_{n}": torch.randn(1, 3, 32).half() for n in "kv"}
    function = functools.partial(rollout_attention, heads=2)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wide = {n: t.float() for n, t in tensors.items()}  # the fallback, whose warning is in the op
    for given in (tensors, wide):
        torch.testing.assert_close(compiled(**given), function(**given))


def test_flops():
    counter = FlopCounterMode(display=False)
    with counter:
        rollout_attention(**make(2, 32, 48, 4, 16), heads=4)
    assert counter.get_total_flops() == 4 * 2 * 32 * 48 * 64


# The fallback.
@pytest.mark.parametrize("head_dim, dtype, reason", [(16, FP32, "torch.float32"), (24, FP16, "24")])
def test_fallback_with_one_warning_for_each_reason(head_dim, dtype, reason):
    chooser.warn_once.cache_clear()
    tensors = make(2, 3, 5, 2, head_dim, dtype)
    with pytest.warns(
        UserWarning, match=f"rollout_attention runs attention: .*not {reason}"
    ) as seen:
        first, second = (rollout_attention(**tensors, heads=2) for _ in range(2))
    assert len(seen) == 1
    assert torch.equal(first, second) and torch.equal(first, attention(**tensors, heads=2)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout_attention(**make(1, 3, 5, 2, 16), heads=2)
    with pytest.raises(ValueError, match=f"variant is 'int8', .* the best is None .*not {reason}"):
        rollout_attention(**tensors, heads=2, variant="int8")


def test_fallback_by_chip(monkeypatch):
    chooser.warn_once.cache_clear()
    tensors = make(1, 3, 5, 2, 16)
    monkeypatch.setattr(chooser, "chip_of", lambda device: (7, 5))
    with pytest.warns(UserWarning, match="needs an NVIDIA GPU of capability 8.0"):
        out = rollout_attention(**tensors, heads=2)
    assert torch.equal(out, attention(**tensors, heads=2)[0])
    monkeypatch.setattr(chooser, "chip_of", lambda device: (8, 6))
    rollout_attention(**tensors, heads=2)
    for variant in ("fp8", "int8_fp8"):
        with pytest.raises(ValueError, match="the best is int8 .capability 8.6"):
            rollout_attention(**tensors, heads=2, variant=variant)


# Launches and instructions.
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_launches_are_sane(variant, capability):
    for head_dim in range(16, 257, 16):
        launch = module.attention_launch(head_dim, variant, capability)
        assert head_dim <= launch.block_d < max(2 * head_dim, 33)
        assert launch.block_m in (32, 64, 128) and launch.block_n in (32, 64, 128)
        # Sums of a block and of all blocks, and its scores, leave room in 255 registers.
        a_thread = launch.block_m * (2 * launch.block_d + launch.block_n) / (32 * launch.num_warps)
        assert a_thread <= 192
        assert launch == module.attention_launch(head_dim, variant, capability)
        tile = producer.quantize_launch(head_dim, launch.block_n)
        assert tile.block_d == launch.block_d and tile.num_warps in (4, 8, 16)


INSTRUCTIONS = {
    # capability, variant: that of q·k and that of p·v
    (80, "int8"): (r"mma\.sync\S+\.s32\.s8\.s8\.s32", r"mma\.sync\S+\.f32\.bf16\.bf16\.f32"),
    (89, "int8_fp8"): (r"mma\.sync\S+\.s32\.s8\.s8\.s32", r"mma\.sync\S+\.f32\.e4m3\.e4m3\.f32"),
    (90, "int8_fp8"): (r"wgmma\S+\.s32\.s8\.s8", r"wgmma\S+\.f32\.e4m3\.e4m3"),
    (90, "fp8"): (r"wgmma\S+\.f32\.e4m3\.e4m3",) * 2,
    (100, "fp8"): (r"tcgen05\.mma\S+kind::f8f6f4",) * 2,
    (120, "int8_fp8"): (r"mma\.sync\S+\.s32\.s8\.s8\.s32", r"mma\.sync\S+\.f32\.e4m3\.e4m3\.f32"),
}


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.parametrize("capability", slow_except((80, 89, 90, 100, 120), (90,)))
def test_the_products_are_8_bit_instructions(capability):
    script = """
        import json, sys
        import aot
        found = {}
        for capability, variant in json.loads(sys.argv[1]):
            # Several variants of a chip are among the cases of --every.
            every = aot.OPERATIONS["rollout_attention"](divmod(capability, 10), True)
            case = next(c for c in every if c.label == f"attention {variant} bf16 d=128")
            found[f"{capability} {variant}"] = aot.compile_case(case, capability).asm["ptx"]
        print(json.dumps(found))
    """
    chosen = {key: patterns for key, patterns in INSTRUCTIONS.items() if key[0] == capability}
    texts = compile_in_process(script, json.dumps(list(chosen)))
    for (_, variant), patterns in chosen.items():
        text = texts[f"{capability} {variant}"]
        products = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S+", text))
        for pattern in patterns:
            assert re.search(pattern, text), f"{capability} {variant}: only {products}"
        unlike = [p for p in products if not any(re.search(q, p) for q in patterns)]
        assert not unlike, f"{capability} {variant}: {unlike}"


@property_test()
def test_any_arguments(draw):
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(1, 140)), draw(st.integers(1, 300))
    head_dim = 16 * draw(st.integers(1, 9))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make(batch, queries, keys, heads, head_dim, draw(st.sampled_from([FP16, BF16])))
    if draw(st.booleans()):  # strided rows
        tensors = {n: torch.cat([t, t], -1)[..., : t.shape[-1]] for n, t in tensors.items()}
    fixed = {"heads": heads, "variant": draw(st.sampled_from(VARIANTS))}
    if draw(st.booleans()):
        fixed["scale"] = draw(st.floats(-0.3, 0.3))
    out = rollout_attention(**tensors, **fixed)
    if get_backend() == "triton":
        kernels.set_backend("reference")
        assert_same(out, rollout_attention(**tensors, **fixed))
    oracle = exact(**tensors, heads=fixed["heads"], scale=fixed.get("scale"))
    # Relative to values, not to their averages, which may cancel.
    assert (out.double() - oracle).norm() <= 0.1 * max(oracle.norm(), oracle.numel() ** 0.5 * 0.3)
