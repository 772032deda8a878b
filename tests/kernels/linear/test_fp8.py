"""fp8_linear and quantize_fp8: bits of e4m3, bits of the emulated product, errors of both."""

import math

import e4m3
import numpy as np
import pytest
import torch
from compiled import compile_in_process
from dtypes import BF16, FP8, FP16, FP32, FP64
from numerics import assert_within_twice
from op_checks import assert_same_bits, check_compiled_once
from op_tests import NoGradientTests, QuantizingTests
from properties import property_test, st
from token_cases import draw_strided_rows

import prfl_fast.kernels as kernels
from prfl_fast.kernels import fp8_linear, norm_modulate, quantize_fp8
from prfl_fast.kernels.common import fp8 as _fp8
from prfl_fast.kernels.linear import fp8 as module
from prfl_fast.kernels.runtime.triton import tl, triton

X = torch.zeros(2, 3, 32)
Q, ROWS, SCALE = X.to(FP8), torch.zeros(16, 32).to(FP8), torch.ones(16, 1)


@pytest.fixture(params=[BF16, FP16])
def half(request):
    return request.param


@triton.jit
def _encode_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, CONVERTS: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(x_ptr + o, mask=o < n, other=0.0)
    tl.store(y_ptr + o, _fp8.encode_block(b_x, CONVERTS), mask=o < n)


def encoded(backend, x):
    """Return float32 encoded by PyTorch, or by Triton in all the ways that this device has."""
    if backend == "reference":
        return [_fp8.encode(x)]
    found = []
    for converts in {False, x.is_cuda and _fp8.converts(torch.cuda.get_device_capability())}:
        y = torch.empty(x.shape, dtype=torch.uint8)
        _encode_kernel[(triton.cdiv(x.numel(), 4096),)](x, y, x.numel(), 4096, converts)
        found.append(y.view(FP8))
    return found


def test_every_bfloat16_is_encoded_to_the_nearest(backend):
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(BF16).float()
    assert x.isnan().sum() == 254 and x.isinf().sum() == 2
    wanted = e4m3.encode(x.cpu().double().numpy())
    wanted = np.where(wanted & 127 == 127, 127, wanted)
    for q in encoded(backend, x):
        assert (e4m3.codes(q) == wanted).all()


def test_ties_go_to_even_and_their_neighbors_do_not(backend):
    """Take midpoints, 448 and beyond, subnormals, and one float32 either side of each."""
    middle = (e4m3.TABLE[1:] + e4m3.TABLE[:-1]) / 2
    values = np.concatenate([middle, e4m3.TABLE, [447.99, 464.0, 480.0, 1e4, 3e38, 2.0**-149]])
    values = values.astype(np.float32)
    values = np.concatenate([values, *(np.nextafter(values, np.float32(t)) for t in (0, 1e30))])
    values = np.concatenate([values, -values])
    for q in encoded(backend, torch.tensor(values)):
        assert (e4m3.codes(q) == e4m3.encode(values.astype(np.float64))).all()


@pytest.mark.slow
@pytest.mark.aot
def test_chips_with_an_instruction_use_it():
    """Find the instruction where there is one: without a GPU only the integers above run."""
    script = """
        import json
        import aot

        found = {}
        for capability in (80, 90):
            for name in ("fp8_linear", "gelu_fp8", "norm_modulate_fp8"):
                case = aot.OPERATIONS[name](divmod(capability, 10), False)[0]
                ptx = aot.compile_case(case, capability).asm["ptx"]
                found[f"{name} {capability}"] = "cvt.rn.satfinite.e4m3x2.f32" in ptx
        print(json.dumps(found))
        """
    found = compile_in_process(script)
    assert len(found) == 6 and all(used == name.endswith("90") for name, used in found.items())


def test_the_table_is_that_of_pytorch():
    q = torch.arange(127, dtype=torch.uint8).view(FP8)
    assert q.double().tolist() == e4m3.TABLE.tolist()


@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (1, 64), (5, 65), (2, 3, 96), (4, 1536), (1, 2, 5120), (2, 13824)]
)
def test_rows_are_quantized_to_the_bit(backend, shape, dtype):
    """Round once each: IEEE divisions for the scale and its inverse, a product, e4m3."""
    x = (torch.randn(shape) * torch.rand(*shape[:-1], 1) * 3).to(dtype)
    q, scale = quantize_fp8(x)
    wide = x.float().cpu().numpy()
    amax = np.abs(wide).max(-1, keepdims=True)
    assert (scale.cpu().numpy() == amax / np.float32(448)).all()
    wanted = e4m3.encode((wide * (np.float32(448) / amax)).astype(np.float64))
    assert (e4m3.codes(q) == wanted).all()
    e4m3.assert_quantizes((q, scale), x.double())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's numpy
def test_rows_without_a_usable_largest_element(backend):
    """Take zeros, values below 2⁻¹⁰⁰, the largest float32, an infinity, a NaN."""
    x = torch.zeros(5, 48)
    x[1] = 1e-38
    x[2, ::2], x[2, 1::2] = 3.4e38, -1e38
    x[3, 5], x[3, 6] = float("inf"), 1.0
    x[4, 7] = float("nan")
    q, scale = quantize_fp8(x)
    value, scale = q.float(), scale[:, 0]
    assert (value[:2] == 0).all() and (scale[:2] == 2.0**-100 / 448).all()
    assert (value[2, ::2] == 448).all() and scale[2].isfinite() and value[2].isfinite().all()
    assert value[3].isnan().nonzero().tolist() == [[5]] and scale[3].isinf()
    assert value[4].isnan().all() and scale[4].isnan()


class TestQuantizeFp8(QuantizingTests):
    op = "quantize_fp8"
    function, naive, reference = quantize_fp8, lambda x: x, module.quantize_reference
    bad_arguments = [
        (dict(x=X[0, 0]), r"x is float32\[32\]"),
        (dict(x=X[None]), r"x is float32\[1, 2, 3, 32\]"),
        (dict(x=X[..., :0]), r"x is float32\[2, 3, 0\]"),
        (dict(x=torch.zeros(8, 6).t()), "x is .*contiguous"),
        (dict(x=[1.0]), r"x is \[1.0\]"),
    ]

    good = staticmethod(lambda: {})
    at_length = staticmethod(lambda length: {"x": torch.randn(2, length, 48)})

    def examples(self, dtype):
        yield {"x": torch.randn(2, 3, 40).to(dtype)}

    def test_float64(self):
        """Quantize float64 as float32."""
        x = torch.randn(3, 40, dtype=FP64)
        assert_same_bits(quantize_fp8(x), quantize_fp8(x.float()))

    def test_strided_rows_and_none_at_all(self, backend):
        packed = torch.randn(2, 6, 3 * 40)
        for part in (packed[..., 40:80], packed[:, ::2, :40], packed.transpose(0, 1)[..., :40]):
            pair = quantize_fp8(part)
            assert_same_bits(pair, quantize_fp8(part.contiguous()))
            assert all(t.is_contiguous() for t in pair)
        q, scale = quantize_fp8(torch.empty(2, 0, 40))
        assert q.shape == (2, 0, 40) and scale.shape == (2, 0, 1)


# The product.
def make(shape, n, dtype=BF16, bias=True):
    x, weight = torch.randn(shape) + 0.1, torch.randn(n, shape[-1]) * 0.02
    return {
        **dict(zip(("x_q", "x_scale"), quantize_fp8(x), strict=True)),
        **dict(zip(("weight_q", "weight_scale"), quantize_fp8(weight), strict=True)),
        "bias": torch.randn(n).to(dtype) if bias else None,
        "out_dtype": dtype,
    }


def naive(x_q, x_scale, weight_q, weight_scale, bias, out_dtype, wide=FP32):
    """Return a linear of the dequantized; a float64 one stays float64."""
    x, w = (q.to(wide) * s.to(wide) for q, s in ((x_q, x_scale), (weight_q, weight_scale)))
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.to(wide))
    return y if wide == FP64 else y.to(out_dtype)


class TestFp8Linear(NoGradientTests):
    op, function = "fp8_linear", fp8_linear
    test_offsets_past_int32 = None
    # test_schema compares inputs with allclose, which FP8 does not have.
    opcheck = NoGradientTests.opcheck[1:]
    bad_arguments = [
        (dict(x_q=X), "x_q is float32"),
        (dict(x_q=X.to(torch.float8_e5m2)), "x_q is float8_e5m2"),
        (dict(x_q=Q.transpose(0, 1)), "x_q is .*contiguous"),
        (dict(x_q=torch.zeros(()).to(FP8)), r"x_q is float8_e4m3fn\[\]"),
        (dict(weight_q=[1.0]), r"weight_q is \[1.0\]"),
        (dict(weight_q=torch.zeros(32, 16).to(FP8)), r"weight_q is float8_e4m3fn\[32, 16\]"),
        (dict(weight_q=torch.zeros(32, 16).to(FP8).t()), "weight_q is .*contiguous"),
        (dict(weight_q=ROWS[None]), r"weight_q is float8_e4m3fn\[1, 16, 32\]"),
        (dict(weight_q=ROWS[:15], weight_scale=SCALE[:15]), r"weight_q is .*\[15, 32\]"),
        (dict(weight_q=ROWS[:0], weight_scale=SCALE[:0]), r"weight_q is .*\[0, 32\]"),
        (dict(x_q=X.new_zeros(2, 3, 33).to(FP8), weight_q=X.new_zeros(16, 33).to(FP8)),
         r"weight_q is .*\[16, 33\]"),
        (dict(x_scale=torch.ones(2, 3)), r"x_scale is float32\[2, 3\]"),
        (dict(x_scale=torch.ones(2, 3, 1).to(BF16)), "x_scale is bfloat16"),
        (dict(weight_scale=torch.ones(1, 1)), r"weight_scale is float32\[1, 1\]"),
        (dict(weight_scale=torch.ones(1, 16)), r"weight_scale is float32\[1, 16\]"),
        (dict(weight_scale=torch.ones(16, 2)[:, :1]), "weight_scale is .*contiguous"),
        (dict(out_dtype=FP32), "out_dtype is torch.float32"),
        (dict(bias=torch.ones(16)), "bias is float32"),
        (dict(bias=torch.ones(1, 16).to(BF16)), r"bias is bfloat16\[1, 16\]"),
    ]  # fmt: skip

    def examples(self, dtype):
        for bias in (True, False):
            yield make((2, 3, 32), 16, BF16, bias)

    def good(self):
        return dict(x_q=Q, x_scale=torch.ones(2, 3, 1), weight_q=ROWS, weight_scale=SCALE)

    def at_length(self, length):
        return dict(x=torch.randn(2, length, 48), weight=torch.randn(32, 48))

    def check(self, **inputs):
        y, oracle = fp8_linear(**inputs), naive(**inputs, wide=FP64)
        assert y.shape == oracle.shape and y.is_contiguous() and y.dtype == inputs["out_dtype"]
        assert_within_twice(y, naive(**inputs), oracle)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape, n", [((1, 16), 16), ((2, 5, 96), 48), ((3, 1536), 80)])
    def test_no_worse_than_a_linear_of_the_dequantized(self, shape, n, bias, half):
        inputs = make(shape, n, half, bias)
        self.check(**inputs)
        wide = module.emulated(**inputs, upcast=FP64)
        torch.testing.assert_close(wide, naive(**inputs, wide=FP64), rtol=1e-12, atol=1e-12)

    @pytest.mark.slow  # the default tier has this test for qk_norm_rope
    def test_compiles_once_for_all_lengths(self):
        def layer(x, weight):
            return [fp8_linear(*quantize_fp8(x), *quantize_fp8(weight))]

        check_compiled_once(layer, map(self.at_length, (6, 8, 34)), assert_same_bits)


@pytest.mark.parametrize("k, n", [(16, 16), (96, 48), (1536, 64), (5120, 32), (13824, 16)])
def test_exact_sums_are_rounded_once(half, k, n):
    """Small integers and powers of two: float64 has no error either, so the bits must agree."""
    x_q = torch.randint(-8, 9, (7, k)).float().to(FP8)
    weight_q = torch.randint(-8, 9, (n, k)).float().to(FP8)
    x_scale = 2.0 ** torch.randint(-6, 1, (7, 1))
    weight_scale = 2.0 ** torch.randint(-6, 1, (n, 1))
    for bias in (None, torch.randint(-64, 64, (n,)).to(half)):
        y = fp8_linear(x_q, x_scale, weight_q, weight_scale, bias, half)
        wanted = (x_q.double() @ weight_q.double().t()) * x_scale.double() * weight_scale.t()
        assert k < 1536 or (wanted != wanted.to(half)).any()  # so there is something to round
        wanted = (wanted if bias is None else wanted + bias.double()).to(half)
        assert y.dtype == half and torch.equal(y, wanted)


def test_pieces_do_not_change_the_bits(monkeypatch):
    inputs = make((7, 64), 32)
    y = fp8_linear(**inputs)
    monkeypatch.setattr(module, "CHUNK", 2 * 64)
    assert torch.equal(fp8_linear(**inputs), y) and torch.equal(fp8_linear(**inputs), y)


def test_no_rows():
    q, scale = quantize_fp8(torch.randn(32, 64))
    y = fp8_linear(q[:0].view(2, 0, 64), scale[:0].view(2, 0, 1), q, scale)
    assert y.shape == (2, 0, 32) and y.dtype == BF16


@pytest.mark.parametrize("bias", [False, True])
def test_the_call_of_scaled_mm_means_the_same(monkeypatch, bias):
    """PyTorch's CPU has the product too: the arguments a GPU would get, checked without one."""
    inputs = make((2, 5, 96), 48, bias=bias)
    emulated = fp8_linear(**inputs)
    monkeypatch.setattr(module, "unsupported_reason", lambda device: "")
    try:
        y = fp8_linear(**inputs, fast_accum=True)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch._scaled_mm of this CPU: {error}")
    assert y.shape == emulated.shape and y.is_contiguous()
    torch.testing.assert_close(y, emulated, rtol=2.0**-7, atol=1e-4)  # a bfloat16 step
    kernels.set_backend("reference")
    assert torch.equal(fp8_linear(**inputs), emulated)


def test_where_the_product_is_refused(monkeypatch):
    unsupported_reason = module.unsupported_reason.__wrapped__
    cuda = torch.device("cuda", 0)
    chip = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: chip[0])
    monkeypatch.setattr(torch.version, "hip", None)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size))
    calls = []
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, **kwargs: calls.append(args))
    assert "NVIDIA" in unsupported_reason(torch.device("cpu")) and not calls
    for chip[0] in ((9, 0), (10, 0), (12, 0)):
        assert unsupported_reason(cuda) == "" and calls.pop()
    chip[0] = (8, 6)
    assert "8.6 has no FP8" in unsupported_reason(cuda)
    chip[0] = (8, 9)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.11.1+cu130"))
    assert "2.12" in unsupported_reason(cuda)
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)("2.12.0"))
    assert unsupported_reason(cuda) == ""

    def broken(*args, **kwargs):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand a long trace")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    chip[0] = (12, 0)
    assert unsupported_reason(cuda) == "CUBLAS_STATUS_NOT_SUPPORTED"


def test_drift_of_a_quantized_layer():
    """norm_modulate in FP8 into fp8_linear at 1.3B's width, against float64 without any rounding.

    e4m3 keeps 3 bits: an element is off by δ, |δ| ≤ 2⁻⁴, evenly spread, so its root mean square is
    at most 2⁻⁴/√3, and √2 of that for a product. Errors of independent signs add up as the terms of
    a random sum do: the error of y relative to y, by root mean square, is at most 2⁻⁴·√(2/3) =
    5.1 %. Any single y is off by at most 2·2⁻⁴ + 2⁻⁸ of the sum of its terms' magnitudes.
    """
    tokens, k, n = 64, 1536, 96
    x, scale, shift = torch.randn(tokens, k) * 3 + 0.5, torch.randn(1, k) * 0.3, torch.randn(1, k)
    weight, bias = torch.randn(n, k) * 0.02, torch.randn(n).to(BF16)
    rows = norm_modulate(x.to(BF16), scale=scale, shift=shift, out_dtype=FP8)
    y = fp8_linear(*rows, *quantize_fp8(weight), bias)
    h = torch.nn.functional.layer_norm(x.to(BF16).double(), (k,), eps=1e-6)
    h = h * (1 + scale.double()) + shift.double()
    products = h @ weight.double().t()
    error = y.double() - (products + bias.double())
    relative = (error.square().mean() / products.square().mean()).sqrt().item()
    assert 0.005 < relative < 2**-4 * (2 / 3) ** 0.5
    magnitudes = h.abs() @ weight.double().abs().t()
    assert (error.abs() <= (2 * 2**-4 + 2**-8) * magnitudes + y.double().abs() * 2**-8).all()


PRODUCTS = [
    pytest.param((1, 16), 16, marks=pytest.mark.gpu_smoke),
    ((300, 1536), 1536), ((2, 131, 5120), 5120), ((77, 13824), 5120),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("shape, n", PRODUCTS)
def test_matrix_units_compute_what_is_emulated(shape, n, half):
    """Float32 sums moved out of Hopper's units every 128 elements: 4 additions of 14 bits."""
    device = torch.device("cuda", torch.cuda.current_device())
    reason = module.unsupported_reason(device)
    if reason:
        pytest.skip(f"torch._scaled_mm: {reason}")
    with device:
        inputs = make(shape, n, half)
    y, emulated = fp8_linear(**inputs), module.emulated(**inputs)
    wide = {name: inputs[name].double() for name in ("x_q", "x_scale", "weight_q", "weight_scale")}
    magnitudes = wide["x_q"].abs() @ wide["weight_q"].abs().t() * wide["x_scale"]
    bound = 2.0**-11 * magnitudes * wide["weight_scale"].t()
    bound += torch.finfo(half).eps * emulated.double().abs()
    assert ((y.double() - emulated.double()).abs() <= bound).all()
    assert torch.equal(fp8_linear(**inputs), y)


def test_flops_are_counted():
    inputs = make((2, 5, 96), 48)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        fp8_linear(**inputs)
    assert counter.get_total_flops() == 2 * 10 * 96 * 48


@pytest.mark.parametrize("dim", [1, 64, 96, 1536, 5120, 8192, 8960, 13824, 16384])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_launches_are_sane(dim, capability):
    launch, few = (_fp8.row_launch(rows, dim, capability) for rows in (32760, 3))
    blocks, warps = -(-dim // launch.block_d), launch.num_warps
    assert warps in (1, 2, 4, 8) and launch.block_d == 256 * warps and blocks <= 9
    assert 1 <= launch.programs <= 16 * 170 and few.programs == 3
    assert launch.converts == (capability >= (8, 9))


@property_test()
def test_any_rows(draw):
    x = draw_strided_rows(draw, st.integers(-4, 3))
    pair = quantize_fp8(x)
    if x.abs().amax(-1).min() > 0:
        e4m3.assert_quantizes(pair, x.double())
    assert_same_bits(pair, _fp8.quantize(x))


@property_test(backends=["auto"])
def test_any_product(draw):
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    k, n = 16 * draw(st.integers(1, 12)), 16 * draw(st.integers(1, 8))
    bias, dtype = draw(st.booleans()), draw(st.sampled_from([BF16, FP16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs = make((4, k), n, dtype, bias)
    index = torch.randint(0, 4, (math.prod(lead),))
    for name in ("x_q", "x_scale"):
        part = inputs[name].float()[index].to(inputs[name].dtype)
        inputs[name] = part.view(*lead, part.shape[-1])
    TestFp8Linear().check(**inputs)
