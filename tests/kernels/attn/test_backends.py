"""The backends of attention on stand-ins, the choice among them, and on a GPU the real ones."""

import importlib.util
import itertools
import sys
import types

import attention_standins as standins
import pytest
import torch
from attention_cases import assert_no_gradient_past, int32, make_qkv, softmax_attention
from dtypes import BF16, FP16, FP32, FP64
from numerics import assert_within_twice
from op_checks import assert_same_bits, run
from properties import given, settings, st

from prfl_fast import kernels
from prfl_fast.kernels import attention
from prfl_fast.kernels.attn import backend_choice as choice
from prfl_fast.kernels.attn import backends
from prfl_fast.kernels.attn import exact as module
from prfl_fast.kernels.runtime.registry import report

ATEN = ("flash", "cudnn", "efficient")
AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER = (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)
CHIPS = {"flash_attn_3": HOPPER, "flash_attn_4": BLACKWELL}
WITH_LENGTHS = [n for n, limits in choice.LIMITS.items() if limits.lengths and n != "cpu"]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    """Restore the choice after each test, and forget what is remembered of packages."""
    monkeypatch.setattr(choice, "_current", choice._current)
    backends.absent.cache_clear()
    backends.load.cache_clear()
    yield
    backends.absent.cache_clear()
    backends.load.cache_clear()


@pytest.fixture
def pretend(monkeypatch):
    """Let a backend run on CPU tensors as on its GPU: packages and operators are stand-ins."""

    def use(name, capability=None):
        real = choice.describe_case
        chip = capability or CHIPS.get(name, AMPERE)

        def on_gpu(heads, lengths, *tensors):
            aligned = all(choice._aligned(t) for t in tensors)
            case = real(heads, lengths, *tensors)
            return case._replace(device="cuda", capability=chip, aligned=aligned)

        monkeypatch.setattr(module, "describe_case", on_gpu)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        stand_in = standins.Aten()
        if name in ATEN:
            monkeypatch.setattr(backends, "_aten", stand_in)
        elif name in standins.PACKAGES:
            stand_in = standins.install(monkeypatch, name)
        kernels.set_attention_backend(name)
        return stand_in

    return use


def compare(tensors, heads, scale=0.2, lengths=None, rounding=2.0):
    """Assert the 2× rule for out and gradients, lse against float64, no gradient past lengths."""
    ours = lambda q, k, v: attention(q, k, v, heads=heads, scale=scale, key_lengths=lengths)  # noqa: E731
    naive = lambda q, k, v: softmax_attention(q, k, v, heads, scale, lengths)  # noqa: E731
    grads = [torch.randn_like(tensors["q"]), None]
    (out, lse), found = run(ours, tensors, grads)
    (plain, _), expected = run(naive, tensors, grads)
    (oracle, exact), exact_grads = run(naive, tensors, grads, double=True)
    assert_within_twice(out, plain, oracle, rounding=rounding)
    for name in "qkv":
        triple = found[name], expected[name], exact_grads[name]
        if triple[2].any():
            assert_within_twice(*triple, f"d_{name}", rounding=rounding)
        else:  # one key: d_q is the difference of two equal sums
            assert found[name].abs().max() < 1e-4
    assert lse.shape == exact.shape and lse.dtype == FP32 and lse.is_contiguous()
    torch.testing.assert_close(lse.double(), exact, rtol=1e-3, atol=1e-3)
    if lengths is not None:
        assert_no_gradient_past(lengths, found)


NAMES = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "flash", "cudnn", "efficient", "xformers")


CALLS = [
    *itertools.product(NAMES, [(1, 5, 7, 32, 2), (2, 33, 20, 48, 3), (2, 64, 40, 128, 1)], [BF16]),
    *itertools.product(["efficient", "xformers"], [(2, 9, 20, 24, 2)], [FP32]),
]


@pytest.mark.parametrize("name, shape, dtype", CALLS)
def test_calls_and_conversions(name, shape, dtype, pretend):
    *sizes, heads = shape
    pretend(name)
    compare(make_qkv(*sizes, dtype), heads)


@pytest.mark.parametrize("name", WITH_LENGTHS)
@pytest.mark.parametrize("lengths", [[1, 20, 7], [20, 20, 20], [1, 1, 1]])
def test_key_lengths(name, lengths, pretend):
    pretend(name)
    compare(make_qkv(3, 33, 20, 48, BF16), 3, lengths=int32(*lengths))


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_a_packed_projection(name, pretend):
    pretend(name)
    qkv = torch.randn(2, 11, 3 * 48).to(BF16).requires_grad_()
    heads, grad = 3, torch.randn(2, 11, 48).to(BF16)
    (found,) = torch.autograd.grad(attention(*qkv.chunk(3, -1), heads=heads)[0], qkv, grad)
    dense = [t.detach().clone().requires_grad_() for t in qkv.chunk(3, -1)]
    expected = torch.autograd.grad(attention(*dense, heads=heads)[0], dense, grad)
    assert torch.equal(found, torch.cat(expected, -1))


@pytest.mark.parametrize("lengths", [None, int32(3, 20)])
@pytest.mark.parametrize("name", [*NAMES, "cpu"])
def test_groups_of_heads_have_the_bits_of_one_call(name, lengths, pretend, monkeypatch):
    if lengths is not None and name not in (*WITH_LENGTHS, "cpu"):
        return
    if name == "cpu":
        kernels.set_attention_backend(name)
    else:
        pretend(name)
    tensors = {n: t.requires_grad_() for n, t in make_qkv(2, 9, 20, 5 * 16, BF16).items()}
    heads, leaves, grad = 5, list(tensors.values()), torch.randn(2, 9, 5 * 16).to(BF16)
    out = attention(**tensors, heads=heads, key_lengths=lengths)[0]
    (_, backward), counts = backends.CALLS[name], []

    def counted(grad, *args):
        counts.append(grad.shape[2])
        return backward(grad, *args)

    monkeypatch.setitem(backends.CALLS, name, (None, counted))
    whole = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    monkeypatch.setattr(module, "GROUP_BYTES", 4 * 2 * 9 * 16 * 2)  # of d_q of two heads
    assert_same_bits(whole, torch.autograd.grad(out, leaves, grad, retain_graph=True))
    (d_k,) = torch.autograd.grad(out, tensors["k"], grad)
    assert torch.equal(d_k, whole[1])
    assert counts == [5, 2, 2, 1, 2, 2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_the_gradient_and_only_what_is_needed(name, pretend):
    pretend(name)
    tensors = make_qkv(2, 8, 12, 32, BF16)
    tensors["k"].requires_grad_()
    out = attention(**tensors, heads=2)[0]
    ones = torch.ones_like(out)
    expanded = torch.autograd.grad(out, tensors["k"], ones[0, 0, 0].expand_as(ones), True)
    assert_same_bits(expanded, torch.autograd.grad(out, tensors["k"], ones))
    tensors["q"].requires_grad_()
    out = attention(**tensors, heads=2)[0]
    grad = torch.randn(2, 32, 8).to(BF16).transpose(1, 2)
    for gradient in torch.autograd.grad(out, (tensors["q"], tensors["k"]), grad):
        assert gradient.is_contiguous()


@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("second", ["flash_attn_2", "efficient", "plain"])
def test_one_backend_differentiates_what_another_computed(first, second, pretend):
    tensors = {n: t.requires_grad_() for n, t in make_qkv(2, 33, 20, 32, BF16).items()}
    leaves, grad = list(tensors.values()), torch.randn(2, 33, 32).to(BF16)
    pretend(first)
    out = attention(**tensors, heads=2)[0]
    pretend(second)
    found = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(attention(**tensors, heads=2)[0], leaves, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_two_key_sets_are_two_calls(pretend):
    aten = pretend("efficient")
    tensors = make_qkv(2, 9, 20, 24, BF16)
    more = {f"extra_{n}": torch.randn(2, 5, 24).to(BF16) for n in "kv"}
    lengths = int32(3, 20)
    out, lse = attention(**tensors, **more, heads=3, key_lengths=lengths)
    assert len(aten.called) == 2
    first = attention(**tensors, heads=3, key_lengths=lengths)
    second = attention(tensors["q"], *more.values(), heads=3)[0]
    assert torch.equal(out, first[0] + second) and torch.equal(lse, first[1])


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_deterministic_is_passed_on(name, pretend, monkeypatch):
    package = pretend(name)
    for wanted in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda w=wanted: w)
        tensors = {n: t.requires_grad_() for n, t in make_qkv(1, 8, 8, 16, BF16).items()}
        attention(**tensors, heads=1)[0].sum().backward()
    assert package.deterministic == [False, True]


def test_segments_cover_queries_and_keys():
    cu_q, cu_k = backends._segments(int32(1, 5, 3), 7, 5)
    assert cu_q.tolist() == [0, 7, 7, 14, 14, 21, 21]
    assert cu_k.tolist() == [0, 1, 5, 10, 10, 13, 15]
    assert cu_q.dtype == cu_k.dtype == torch.int32


# The choice.
def case(capability=HOPPER, dtype=BF16, head_dim=128, **more):
    return choice.Case("cuda", capability, dtype, head_dim, **more)


@pytest.fixture
def packages(monkeypatch):
    """Install exactly these packages, as far as the choice can see."""

    def install(*names):
        missing = lambda name: None if name in names else f"package {name} is not installed"  # noqa: E731
        monkeypatch.setattr(choice, "absent", missing)
        monkeypatch.setattr(choice, "load", lambda name: (object(), None))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)

    return install


ALL = tuple(backends.PACKAGES)


@pytest.mark.parametrize(
    "given_case, installed, expected",
    [
        (case(HOPPER), ALL, "flash_attn_3"), (case(HOPPER), ("flash_attn_2",), "cudnn"),
        (case(HOPPER, single=True), ("flash_attn_2",), "flash_attn_2"),
        (case(HOPPER, lengths=True), (), "flash"), (case(HOPPER, head_dim=256), (), "flash"),
        (case(HOPPER, deterministic=True), (), "flash"),
        (case(HOPPER, dtype=FP32), (), "efficient"), (case(HOPPER, dtype=FP32), ALL, "xformers"),
        (case(HOPPER, dtype=FP64), ALL, "plain"), (case(HOPPER, head_dim=12), ALL, "plain"),
        (case(HOPPER, aligned=False), ALL, "plain"), (case(HOPPER, head_dim=320), ALL, "plain"),
        (case(BLACKWELL), ALL, "flash_attn_4"), (case(BLACKWELL), (), "cudnn"),
        (case(BLACKWELL, head_dim=192), ("flash_attn_4",), "flash"),
        (case((10, 3)), ALL, "flash_attn_4"),
        (case(AMPERE), ALL, "flash_attn_2"),
        (case(AMPERE), ("flash_attn_3", "flash_attn_4"), "flash"),
        (case(ADA, head_dim=208), ALL, "xformers"),
        (case(ADA, head_dim=208, lengths=True), (), "efficient"),
        (case(CONSUMER), ALL, "flash_attn_2"), (case(CONSUMER), ("flash_attn_4",), "flash"),
        (case((7, 5), dtype=FP16), ALL, "xformers"), (case((7, 5), dtype=FP16), (), "efficient"),
        (case((6, 1), dtype=FP16), ALL, "plain"),
        (choice.Case("cpu", None, BF16, 12, lengths=True), ALL, "cpu"),
        (choice.Case("mps", None, BF16, 12), ALL, "plain"),
    ],
)  # fmt: skip
def test_the_best_that_takes_the_tensors(packages, given_case, installed, expected):
    packages(*installed)
    assert choice.choose(given_case) == expected


REFUSALS = [
    ("flash_attn_3", case(head_dim=320), "head dim 320 > 256"),
    ("flash_attn_3", case(AMPERE), "capability 8.0, it runs on 9.x"),
    ("flash_attn_3", case(head_dim=256, deterministic=True), "use_deterministic_algorithms"),
    ("flash_attn_4", case(BLACKWELL, head_dim=256), "head dim 256 > 128"),
    ("flash_attn_4", case(CONSUMER, deterministic=True), "use_deterministic_algorithms"),
    ("flash_attn_2", case(head_dim=20), "head dim 20 is not a multiple of 8"),
    ("flash_attn_2", case(dtype=FP32), "it takes bfloat16, float16, not float32"),
    ("flash_attn_2", case((7, 5)), "capability 7.5, it runs on 8.x, 9.x, 10.x, 11.x, 12.x"),
    ("flash", case(ADA, head_dim=224), "head dim 224 has no backward on capability 8.9"),
    ("cudnn", case(lengths=True), "it takes no key_lengths"),
    ("cudnn", case(single=True), "a single query or a single key"),
    ("cudnn", case(deterministic=True), "use_deterministic_algorithms"),
    ("efficient", case(dtype=FP32, head_dim=6), "head dim 6 is not a multiple of 4"),
    ("efficient", case(aligned=False), "rows of a tensor do not start at multiples of 16 bytes"),
    ("xformers", case(lengths=True), "it takes no key_lengths"),
    ("cpu", case(), "it takes cpu tensors, these are on cuda"),
]


@pytest.mark.parametrize("name, given_case, reason", REFUSALS)
def test_a_refusal_names_the_backend_and_the_reason(packages, name, given_case, reason):
    packages(*ALL)
    kernels.set_attention_backend(name)
    with pytest.raises(ValueError) as error:
        choice.choose(given_case)
    text = str(error.value)
    assert text.startswith(f"attention: backend {name!r} was refused: ") and reason in text
    assert "set_attention_backend('auto')" in text


def test_refused_by_the_switches_of_pytorch(packages, monkeypatch):
    packages()
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert choice.unsupported_reason("cudnn", case()) == "it is switched off in torch.backends.cuda"
    assert choice.choose(case()) == "flash"
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert choice.choose(case()) == "efficient"
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choice.unsupported_reason("flash", case()) == "it needs an NVIDIA GPU"
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "TORCH_CUDNN_SDPA_AVOID_RECOMPILE" in choice.unsupported_reason("cudnn", case())


def test_a_backend_that_does_not_run_here():
    kernels.set_attention_backend("flash")
    with pytest.raises(ValueError, match="'flash' was refused: it takes cuda tensors.* on cpu"):
        attention(**make_qkv(1, 4, 4, 16, BF16), heads=2)


def block(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize("name", ALL)
def test_a_package_that_is_not_there(name, monkeypatch):
    path = backends.PACKAGES[name][0]
    block(monkeypatch, path, path.partition(".")[0])
    with pytest.raises(ValueError, match=rf"{name}' was refused: package \S+ is not installed"):
        kernels.set_attention_backend(name)
    assert choice.get_attention_backend() == "auto"
    assert "is not installed" in choice.unsupported_reason(name, case(CHIPS.get(name, AMPERE)))


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn_interface") is not None, reason="the package is installed"
)
def test_the_name_of_a_missing_package():
    with pytest.raises(ValueError, match="package flash_attn_interface is not installed"):
        kernels.set_attention_backend("flash_attn_3")


def test_a_package_that_does_not_import(monkeypatch, tmp_path):
    broken = tmp_path / "flash_attn_interface.py"
    broken.write_text("raise ImportError('undefined symbol: _ZN3c10\\nsecond line')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    text = r"flash_attn_interface does not import: undefined symbol: _ZN3c10. Call"
    with pytest.raises(ValueError, match=text):
        kernels.set_attention_backend("flash_attn_3")


def test_a_package_that_is_too_old(monkeypatch):
    def _flash_attn_forward(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap):
        raise AssertionError("never called")

    old = types.ModuleType("flash_attn.flash_attn_interface")
    old._flash_attn_forward = _flash_attn_forward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, old.__name__, old)
    text = "_flash_attn_forward takes no window_size_left: update it"
    with pytest.raises(ValueError, match=text):
        kernels.set_attention_backend("flash_attn_2")
    backends.load.cache_clear()
    del old._flash_attn_forward
    with pytest.raises(ValueError, match="has no _flash_attn_forward: update it"):
        kernels.set_attention_backend("flash_attn_2")


def test_names():
    with pytest.raises(ValueError, match="attention: backend is 'flash3', expected one of auto, "):
        kernels.set_attention_backend("flash3")
    assert set(choice.LIMITS) == set(backends.CALLS) and set(backends.PACKAGES) < set(choice.LIMITS)
    for chip in (AMPERE, ADA, HOPPER, BLACKWELL, CONSUMER):
        order = choice.preference(case(chip))
        assert order[-1] == "plain" and len(set(order)) == len(order)
        assert set(order) <= set(choice.BACKENDS)


def test_the_environment_variable(monkeypatch):
    """Read the variable in a second copy of the module: it is read once, at import."""
    spec = importlib.util.spec_from_file_location("a_copy_of_the_choice", choice.__file__)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("PRFL_FAST_ATTENTION", "plain")
    spec.loader.exec_module(copy)
    assert copy.get_attention_backend() == "plain"
    monkeypatch.setenv("PRFL_FAST_ATTENTION", "x")
    with pytest.raises(ValueError, match="attention: PRFL_FAST_ATTENTION is 'x', expected one of"):
        spec.loader.exec_module(copy)


def test_nothing_is_imported_before_it_is_needed(monkeypatch):
    blocked = [path for path, _ in backends.PACKAGES.values()]
    block(monkeypatch, *blocked)
    attention(**make_qkv(1, 4, 4, 16, BF16), heads=2)
    assert backends.load.cache_info().currsize == 0


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        choice.Case,
        device=st.sampled_from(["cpu", "cuda", "mps"]),
        capability=st.sampled_from([None, (6, 0), (7, 5), AMPERE, ADA, HOPPER, BLACKWELL, (11, 0)]),
        dtype=st.sampled_from([BF16, FP16, FP32, FP64]),
        head_dim=st.integers(1, 300),
        single=st.booleans(),
        lengths=st.booleans(),
        aligned=st.booleans(),
        deterministic=st.booleans(),
    )
)
def test_every_case_has_a_backend(some_case):
    name = choice.choose(some_case)
    assert name in choice.BACKENDS and choice.unsupported_reason(name, some_case) is None
    for other in choice.BACKENDS:
        reason = choice.unsupported_reason(other, some_case)
        assert reason is None or reason and "\n" not in reason


def test_alignment():
    x = torch.zeros(4, 8, 64, dtype=BF16)
    assert choice._aligned(x) and choice._aligned(x[:, ::3]) and choice._aligned(x[..., 8:24])
    assert not choice._aligned(x[..., 4:]) and not choice._aligned(torch.zeros(2, 3, 12).to(BF16))
    assert choice._aligned(torch.zeros(1, 1, 12).to(BF16)), "an axis of 1 takes no step"


def test_report_lists_every_backend():
    found = choice.report()
    assert list(found)[:2] == ["cpu", "plain"] and set(found) == set(choice.BACKENDS)
    assert found["cpu"] is None and found["plain"] is None
    kernels.set_attention_backend("plain")
    assert "backend plain, set by name" in report()["attention"].reason
    assert report()["attention_backward"].backend == "reference"


# On a GPU: every backend that is there.
def usable():
    if not torch.cuda.is_available():
        return list(choice.BACKENDS)
    return [n for n, reason in choice.report("cuda").items() if reason is None]


ON_CUDA = [
    pytest.param((1, 130, 130, 256, 2), BF16, marks=pytest.mark.gpu_smoke),
    ((1, 130, 130, 256, 2), FP16),
    *itertools.product([(2, 65, 33, 384, 3), (1, 257, 512, 256, 4)], [BF16, FP16]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape, dtype", ON_CUDA)
@pytest.mark.parametrize("name", usable())
def test_on_cuda(name, shape, dtype):
    *sizes, heads = shape
    kernels.set_attention_backend(name)
    tensors = make_qkv(*sizes, dtype, "cuda")
    compare(tensors, heads)
    if name == "plain" or choice.LIMITS[name].lengths:
        lengths = torch.randint(1, sizes[2] + 1, sizes[:1], dtype=torch.int32, device="cuda")
        for chosen in (lengths, torch.ones_like(lengths), torch.full_like(lengths, sizes[2])):
            compare(tensors, heads, lengths=chosen)


@pytest.mark.gpu
@pytest.mark.parametrize("name", usable())
def test_same_bits_on_cuda_where_asked(name, request):
    kernels.set_attention_backend(name)
    tensors = {n: t.requires_grad_() for n, t in make_qkv(1, 2048, 2048, 256, BF16, "cuda").items()}
    nominal = choice._nominal(torch.device("cuda"), BF16, 128)._replace(deterministic=True)
    if name == "plain" or choice.unsupported_reason(name, nominal) is not None:
        pytest.skip("its backward has no fixed order of summation")
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    assert_same_bits(
        *(
            torch.autograd.grad(attention(**tensors, heads=2)[0].sum(), list(tensors.values()))
            for _ in range(2)
        )
    )
