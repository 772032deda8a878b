"""rollout_attention by other packages on stand-ins, their errors, and the choice among them."""

import importlib.util
import itertools
import sys
import types

import pytest
import rollout_standins as standins
import torch
from attention_cases import relative, sdpa, video
from dtypes import BF16, FP16, FP32

from prfl_fast import kernels
from prfl_fast.kernels import rollout_attention
from prfl_fast.kernels.attn import rollout_backends as backends
from prfl_fast.kernels.attn import rollout_choice as choice
from prfl_fast.kernels.attn import rollout_variants
from prfl_fast.kernels.runtime.registry import report

RUNS = [
    *(("sage_2", chip) for chip in standins.SAGE_2),
    ("flash_attn_3_fp8", (9, 0)), ("flash_attn_4_fp8", (10, 0)), ("cudnn_fp8", (10, 3)),
]  # fmt: skip
EVERY = [*RUNS, ("sage_3", (12, 0))]


def forget():
    for cached in (backends.absent, backends.load, backends._cudnn_handle, backends._cudnn_graph):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Hide installed packages, and forget what is remembered of them."""
    for module, _ in backends.PACKAGES.values():
        for path in {module, module.partition(".")[0]}:
            monkeypatch.setitem(sys.modules, path, None)
    kernels.set_backend("auto")
    forget()
    yield
    forget()


@pytest.fixture
def pretend(monkeypatch):
    """Let packages run on CPU tensors as on a chip; return the stand-in of the last one."""

    def use(chip, *names):
        monkeypatch.setattr(rollout_variants, "chip_of", lambda device: chip)
        stream = types.SimpleNamespace(cuda_stream=7)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        module = None
        for name in names:
            root = backends.PACKAGES[name][0].partition(".")[0]
            monkeypatch.delitem(sys.modules, root, raising=False)
            module = standins.install_rollout(monkeypatch, name, chip)
        forget()
        return module

    return use


def exact(q, k, v, heads, scale=None):
    return sdpa(q.double(), k.double(), v.double(), heads, scale)


def error(name, heads=1, scale=None, **tensors):
    """Return the relative error of ``rollout_attention``, which must run ``name``."""
    ran, real = [], backends.CALLS[name]
    try:
        backends.CALLS[name] = lambda *args: ran.append(name) or real(*args)
        variant = name if name in choice.BY_NAME else "auto"
        before = {n: t.clone() for n, t in tensors.items()}
        out = rollout_attention(**tensors, heads=heads, scale=scale, variant=variant)
    finally:
        backends.CALLS[name] = real
    assert ran == [name] and all(torch.equal(t, tensors[n]) for n, t in before.items())
    assert out.shape == tensors["q"].shape and out.dtype == tensors["q"].dtype
    assert out.is_contiguous()
    return relative(out, exact(**tensors, heads=heads, scale=scale))


@pytest.mark.parametrize("name, chip", EVERY)
@pytest.mark.parametrize("heads, head_dim", [(2, 128), (2, 64)])
def test_error_on_activations_like_a_video_model(pretend, name, chip, heads, head_dim):
    pretend(chip, name)
    found = error(name, heads, **video(1024, heads, head_dim))
    assert found <= 5e-2
    if name == "sage_2":
        assert found <= 1e-2


@pytest.mark.parametrize("name, chip", EVERY)
def test_error_where_attention_is_sharp(pretend, name, chip):
    """FP4 is past the limit of the others, so it runs only if it is named."""
    pretend(chip, name)
    found = error(name, **video(1024, 1, 128, sharpness=1.7))
    assert 5e-2 < found <= 0.15 if name == "sage_3" else found <= 5e-2


@pytest.mark.parametrize("name, chip", RUNS[-3:])
def test_keys_and_values_far_from_zero_cost_nothing(pretend, name, chip):
    """Subtract means for packages that do not: offsets of 100 would leave e4m3 few bits."""
    pretend(chip, name)
    tensors = {n: t.half() for n, t in video(512, 1, 64, v_mean=0).items()}
    tensors["k"] = (tensors["k"] + 100 * (torch.arange(64) % 9 == 0)).half()
    tensors["v"] = tensors["v"] + 10
    out = rollout_attention(**tensors, heads=1) - 10
    tensors["v"] = tensors["v"] - 10
    assert relative(out, exact(**tensors, heads=1)) <= 5e-2


SHAPES = [(1, 1, 1, 1, 64), (2, 7, 130, 2, 64), (1, 129, 65, 2, 128)]


@pytest.mark.parametrize("name, chip", EVERY)
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_shapes_strides_and_scales(pretend, name, chip, dtype):
    pretend(chip, name)
    limit = 0.3 if name == "sage_3" else 0.1
    for batch, queries, keys, heads, head_dim in SHAPES:
        dim = heads * head_dim
        packed = torch.randn(batch, 2 * max(queries, keys), 3 * dim).to(dtype)
        q, k, v = packed[:, ::2].chunk(3, -1)  # strided rows
        tensors = {"q": q[:, :queries], "k": k[:, :keys], "v": v[:, :keys] + 1}
        for scale in (None, 0.2):
            assert error(name, heads, scale=scale, **tensors) <= limit


@pytest.mark.parametrize("name, chip", [RUNS[0], RUNS[2], ("flash_attn_3_fp8", (9, 0)), RUNS[-1]])
def test_head_sizes_that_packages_pad(pretend, name, chip):
    pretend(chip, name)
    for head_dim in (16, 80):
        tensors = {n: torch.randn(1, 40, 2 * head_dim).to(BF16) for n in "qkv"}
        assert error(name, 2, **tensors) <= 0.1


@pytest.mark.parametrize("name, chip", EVERY)
def test_constants_and_second_key_set(pretend, name, chip):
    pretend(chip, name)
    q, k, v = (torch.randn(1, n, 64).to(BF16) for n in (5, 40, 40))
    zero, variant = torch.zeros_like(k), name
    assert not rollout_attention(q, zero, zero, heads=1, variant=variant).any()
    more = {"extra_k": k[:, :7], "extra_v": v[:, :7]}
    both = rollout_attention(q, k, v, heads=1, variant=variant, **more)
    parts = [rollout_attention(q, *kv, heads=1, variant=variant) for kv in ((k, v), more.values())]
    assert torch.equal(both, parts[0] + parts[1])
    v = v.clone()
    v[0, 2, 3] = float("nan")
    if name not in ("sage_2", "sage_3"):  # what they do with NaN is theirs
        assert rollout_attention(q, k, v, heads=1, variant=variant)[..., 3].isnan().all()


def test_a_scale_for_each_head(pretend):
    """Give heads and samples of very different size codes that use all of e4m3."""
    x = torch.randn(2, 9, 3, 16).to(BF16) * 10.0 ** torch.arange(-3, 3).view(2, 1, 3, 1)
    for axes, shape in ((backends.HEAD, (2, 1, 3, 1)), (backends.TENSOR, (1, 1, 1, 1))):
        codes, factor = backends.encode(x.to(BF16), axes)
        assert factor.shape == shape and factor.dtype == FP32
        assert codes.float().abs().amax(axes).min() >= 416
        assert relative(codes.float() * factor, x.double()) <= 0.04
    tiny = torch.full((1, 2, 1, 16), 1e-7, dtype=FP16)
    codes, factor = backends.encode(tiny, backends.HEAD)
    assert codes.float().isfinite().all() and factor.isfinite().all()


def test_cudnn_compiles_a_graph_once_for_a_layout(pretend):
    module = pretend((10, 0), "cudnn_fp8")
    q, k, v = (torch.randn(1, 40, 64).to(BF16) for _ in range(3))
    for scale in (0.1, 0.1, 0.2):
        rollout_attention(q, k, v, heads=1, scale=scale)
    rollout_attention(q[:, :8], k, v, heads=1, scale=0.1)
    assert module.pygraph.built == 3 and module.streams == [7] * 4


# The choice.
ALL = tuple(choice.LIMITS)
CHOICES = [
    ((8, 0), ALL, 128, "sage_2"), ((8, 6), ALL, 128, "auto"), ((8, 9), ALL, 64, "sage_2"),
    ((9, 0), ALL, 128, "sage_2"), ((9, 0), ALL[1:], 128, "flash_attn_3_fp8"),
    ((9, 0), ALL, 256, "flash_attn_3_fp8"), ((9, 0), ALL[2:], 128, "auto"),
    ((10, 0), ALL, 128, "flash_attn_4_fp8"), ((10, 0), ALL, 80, "cudnn_fp8"),
    ((10, 3), ALL[3:], 128, "cudnn_fp8"), ((10, 0), ALL, 256, "auto"), ((11, 0), ALL, 128, "auto"),
    ((12, 0), ALL, 128, "sage_2"), ((12, 1), ("sage_3",), 128, "auto"), ((9, 0), (), 128, "auto"),
    ((7, 5), ALL, 128, "auto"), ((0, 0), ALL, 128, "auto"), (None, ALL, 128, "auto"),
]  # fmt: skip


@pytest.mark.parametrize("chip, installed, head_dim, expected", CHOICES)
def test_the_best_that_takes_the_tensors(pretend, chip, installed, head_dim, expected):
    pretend(chip, *installed)
    q = torch.zeros(1, 8, head_dim, dtype=BF16)
    assert choice.choose(q, q, q, 1, 0.1, "auto") == expected
    assert choice.choose(q, q, q, 1, 0.1, "int8") == "int8"


def test_tensors_that_packages_do_not_take(pretend):
    pretend((9, 0), "sage_2", "flash_attn_3_fp8")
    q = torch.zeros(1, 8, 128, dtype=BF16)
    wide = torch.zeros(1, 8, 192, dtype=BF16)[..., 4:132]
    cases = [
        ((q.float(),) * 3, 0.1, "it takes bfloat16, float16, not float32"),
        ((q, wide, q), 0.1, "rows of a tensor do not start at multiples of 16 bytes"),
        ((q, q, q), -0.1, "it takes a positive scale, not -0.1"),
        ((q[..., :24],) * 3, 0.1, "head dim 24 is none of 16, 32"),
    ]
    for tensors, scale, reason in cases:
        assert choice.choose(*tensors, 1, scale, "auto") == "auto"
        with pytest.raises(ValueError, match=f"variant 'sage_2' was refused: {reason}"):
            choice.choose(*tensors, 1, scale, "sage_2")
    kernels.set_backend("reference")
    assert choice.choose(q, q, q, 1, 0.1, "auto") == "auto"


def test_refusals_name_the_reason(pretend, monkeypatch):
    def reason(name, chip):
        forget()
        return choice.why_not(name, chip, BF16, 128)

    assert reason("sage_2", (9, 0)) == "package sageattention is not installed"
    module = pretend((9, 0), "sage_2")
    assert reason("sage_2", (9, 0)) is None
    assert reason("sage_2", None) == reason("sage_2", (0, 0)) == "it needs an NVIDIA GPU"
    assert reason("sage_2", (10, 0)) == "capability 10.0, it runs on 8.0, 8.9, 9.0, 12.0, 12.1"
    for part, chips in (("SM80", [(8, 0)]), ("SM89", [(8, 9), (12, 0)]), ("SM90", [(9, 0)])):
        monkeypatch.setattr(module.core, f"{part}_ENABLED", False)
        for chip in chips:
            assert reason("sage_2", chip).endswith(f"was built without its kernels of {part}")
    del module.sageattn_qk_int8_pv_fp8_cuda_sm90  # SageAttention 1
    assert "has no sageattn_qk_int8_pv_fp8_cuda_sm90: update it" in reason("sage_2", (9, 0))
    module = pretend((9, 0), "flash_attn_3_fp8")
    config = types.ModuleType("flash_attn_config")
    config.CONFIG = {"build_flags": {"FLASHATTENTION_DISABLE_FP8": False}}
    monkeypatch.setitem(sys.modules, "flash_attn_config", config)
    assert reason("flash_attn_3_fp8", (9, 0)) is None
    config.CONFIG["build_flags"]["FLASHATTENTION_DISABLE_FP8"] = True
    assert reason("flash_attn_3_fp8", (9, 0)).endswith("was built without FP8")
    module._flash_attn_forward = lambda q, k, v: None
    assert "takes no q_descale: update it" in reason("flash_attn_3_fp8", (9, 0))
    module = pretend((10, 0), "cudnn_fp8")
    module.backend_version = lambda: 91200
    assert reason("cudnn_fp8", (10, 0)) == "cuDNN 91200 < 91300 writes no 16-bit output"
    del module.pygraph
    assert reason("cudnn_fp8", (10, 0)) == "package cudnn has no pygraph.sdpa_fp8: update it"


def test_a_package_that_does_not_run_here():
    q = torch.zeros(1, 4, 64, dtype=BF16)
    for name in choice.LIMITS:
        with pytest.raises(ValueError, match=f"variant '{name}' was refused: package .* is not in"):
            rollout_attention(q, q, q, heads=1, variant=name)


def test_the_environment_variable(pretend, monkeypatch):
    """Read the variable in a second copy of the module: it is read once, at import."""
    spec = importlib.util.spec_from_file_location("a_copy_of_the_choice", choice.__file__)
    copy = importlib.util.module_from_spec(spec)
    pretend((9, 0), "sage_2", "flash_attn_3_fp8")
    q = torch.zeros(1, 4, 64, dtype=BF16)
    for name in ("flash_attn_3_fp8", "int8"):
        monkeypatch.setenv("PRFL_FAST_ROLLOUT_ATTENTION", name)
        spec.loader.exec_module(copy)
        assert copy.choose(q, q, q, 1, 0.1, "auto") == name
        assert copy.choose(q, q, q, 1, 0.1, "sage_2") == "sage_2"
        shown = copy.explain(copy.Choice("triton", "CUDA tensors"), torch.device("cpu"), BF16)
        assert shown.reason.endswith(f"{name} set by PRFL_FAST_ROLLOUT_ATTENTION")
    monkeypatch.setenv("PRFL_FAST_ROLLOUT_ATTENTION", "sage_3")
    spec.loader.exec_module(copy)
    shown = copy.explain(copy.Choice("triton", "CUDA tensors"), torch.device("cpu"), BF16).reason
    assert "sage_3 set by" in shown and "package sageattn3 is not installed: rollouts" in shown
    monkeypatch.setenv("PRFL_FAST_ROLLOUT_ATTENTION", "sage")
    with pytest.raises(ValueError, match="PRFL_FAST_ROLLOUT_ATTENTION is 'sage', expected one of"):
        spec.loader.exec_module(copy)


def test_reports(pretend, monkeypatch):
    found = choice.report()
    assert list(found) == [*choice.AUTOMATIC, "int8_fp8", *choice.BY_NAME]
    assert found["int8_fp8"] is None and found["sage_2"].endswith("is not installed")
    assert found["sage_3"].startswith("it runs only if it is named; package sageattn3 is not")
    assert report("cpu", BF16)["rollout_attention"].reason.startswith("cpu tensors; int8")
    pretend((12, 0), "sage_2", "sage_3")
    found = choice.report()
    assert found["sage_2"] is None and found["sage_3"] == "it runs only if it is named"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = choice.Choice("triton", "CUDA tensors")
    shown = choice.explain(given, torch.device("cpu"), BF16)
    assert shown == ("triton", "sage_2, best for heads of 128")
    pretend((8, 6))
    shown = choice.explain(given, torch.device("cpu"), BF16)
    assert shown.reason == "CUDA tensors; capability 8.6: int8 q·k, 16-bit p·v"


def test_names_and_tables():
    assert set(choice.LIMITS) == set(backends.CALLS) == set(backends.PACKAGES)
    assert set(choice.BY_NAME) < set(choice.LIMITS)
    for limits, chip in itertools.product(choice.LIMITS.values(), standins.SAGE_2):
        assert all(len(c) == 2 for c in (*limits.chips, chip))
        assert all(d % 16 == 0 and d <= 256 for d in limits.head_dims)
