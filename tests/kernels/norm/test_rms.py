"""rms_norm: reference and Triton against plain PyTorch, rows wherever they lie."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from dtypes import BF16, FLOATS, FP16, FP32
from op_checks import assert_same_bits, bind, check, far_rows, saved_by, slack
from op_tests import OperationTests
from plain_torch import spread, wide
from properties import property_test, st

from prfl_fast.kernels import rms_norm

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")
module = importlib.import_module("prfl_fast.kernels.norm.rms")
EPS = 1e-6
FLOAT_SLACK = 4.0  # half-ulps: sums run in another order than PyTorch's, which shows in float32


def naive(x, weight=None, eps=EPS):
    y = F.rms_norm(wide(x), x.shape[-1:], None if weight is None else wide(weight), eps)
    return y.to(x.dtype)


def make(shape, dtype=FP32, small=None, weight=True):
    """Return x of ``shape`` and a weight of dtype ``small``, x's unless given."""
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    if weight:
        tensors["weight"] = (1 + 0.5 * torch.randn(shape[-1])).to(small or dtype)
    return tensors


def compare(tensors, rounding=FLOAT_SLACK, **fixed):
    check(bind(rms_norm, fixed), bind(naive, fixed), tensors, rounding=rounding)


class TestRmsNorm(OperationTests):
    op = "rms_norm"
    function, naive = staticmethod(rms_norm), staticmethod(naive)
    reference = staticmethod(module.reference)
    flags = {"x": "+-", "weight": "-+"}

    @staticmethod
    def examples(dtype):
        yield make((2, 3, 2, 8), dtype), {}
        yield make((2, 3, 8), dtype, weight=False), {"eps": EPS}

    @staticmethod
    def layouts(dtype):
        for shape in ((2, 3, 48), (3, 1100), (2, 3, 4, 16)):
            yield make(shape, dtype, FP32), {}

    at_length = staticmethod(lambda length: make((2, length, 4, 16)))
    good = staticmethod(lambda: {"x": torch.zeros(2, 6, 8)})

    bad_arguments = [
        (dict(x=torch.zeros(2, 6, 8).long()), "x is int64"),
        (dict(x=torch.zeros(())), r"x is float32\[\]"),
        (dict(x=torch.zeros(2, 6, 0)), r"x is float32\[2, 6, 0\]"),
        (dict(x=torch.zeros(2, 8, 6).transpose(1, 2)), "x is .*contiguous"),
        (dict(x=[1.0]), r"x is \[1.0\]"),
        (dict(weight=torch.ones(7)), r"weight is float32\[7\].*\[8\]"),
        (dict(weight=torch.ones(1, 8)), r"weight is float32\[1, 8\].*\[8\]"),
        (dict(weight=torch.ones(8, dtype=torch.int32)), "weight is int32"),
        (dict(weight=torch.ones(8, device="meta")), "weight is .*meta.*on cpu"),
        (dict(eps=-1.0), "eps is -1.0"),
    ]


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape",
    [(7,), (1, 1), (1, 64), (3, 65), (2, 5, 96), (2, 3, 4, 128), (2, 0, 64), (40, 33), (3, 1536),
     (1, 2, 5120), (2, 8192)],
)  # fmt: skip
def test_shapes(backend, shape, dtype, weight):
    compare(make(shape, dtype, weight=weight), slack(backend, dtype, fp32=FLOAT_SLACK))


@pytest.mark.parametrize("dtype, small", [(BF16, FP32), (FP16, BF16), (FP32, BF16)])
def test_mixed_dtypes(backend, dtype, small):
    compare(make((2, 4, 72), dtype, small))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_stands_in_for_the_module(backend, dtype, affine):
    norm = torch.nn.RMSNorm(48, eps=1e-5, elementwise_affine=affine, dtype=dtype)
    x = torch.randn(3, 7, 48).to(dtype)
    torch.testing.assert_close(rms_norm(x, norm.weight, eps=norm.eps), norm(x))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0])
def test_eps(backend, eps):
    tensors = make((3, 24))
    tensors["x"] *= 0.1
    compare(tensors, eps=eps)
    tensors["x"].zero_()
    if eps:
        assert torch.equal(rms_norm(**tensors, eps=eps), tensors["x"])


HEAD_VIEWS = {
    "a head view of a packed qkv": lambda qkv: qkv[:, :, 1],
    "its heads before its tokens": lambda qkv: qkv[:, :, 1].transpose(1, 2),
    "every other token": lambda qkv: qkv[:, ::2, 0],
    "tokens first": lambda qkv: qkv[:, :, 2].transpose(0, 1),
    "q and k": lambda qkv: qkv[:, :, :2],
    "in no order the kernels address": lambda qkv: qkv[:, :, :2].permute(3, 2, 1, 0, 4),
    "one token expanded": lambda qkv: qkv[:, :1, 0].expand(2, 5, 4, 24),
}


@pytest.mark.parametrize("view", HEAD_VIEWS)
def test_strided_rows(backend, view):
    def viewed(function):
        return lambda x, weight: function(HEAD_VIEWS[view](x.unflatten(-1, (3, 4, 24))), weight)

    tensors = {"x": torch.randn(2, 5, 3 * 4 * 24), "weight": torch.randn(24)}
    check(viewed(rms_norm), viewed(naive), tensors, rounding=FLOAT_SLACK)
    assert viewed(rms_norm)(**tensors).is_contiguous()


@pytest.mark.triton
def test_the_activation_is_not_copied(triton_device, monkeypatch):
    qkv = torch.randn(2, 5, 3, 4, 24)
    x, grad = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    monkeypatch.setattr(torch.Tensor, "reshape", None)
    module._triton_forward(x, None, EPS)
    module._triton_backward(grad, x, None, EPS, True, False)


def test_many_rows_of_the_sum(backend, monkeypatch):
    """Sum several tiles in each program of a small chip, the last one part of a tile."""
    monkeypatch.setattr(module, "processors", lambda capability: 1)
    tensors = make((603, 24))
    launch = module.backward_launch(603, 24, (8, 0))
    assert launch.programs > 1 and launch.rows_per_program > launch.block_r
    compare(tensors)


def test_only_the_inputs_are_saved(backend):
    assert saved_by(rms_norm, make((64, 128), BF16)) == 64 * 128 * 2 + 128 * 2


@pytest.mark.triton
def test_offsets_past_int32(sparse_file):
    storage, values, grad = sparse_file(), torch.randn(3, 64).half(), torch.randn(3, 64).half()
    x, weight = far_rows(storage, values), torch.ones(64)
    assert torch.equal(rms_norm(x, weight), rms_norm(values, weight))
    # Two and three axes of rows: the last 64 of two rows side by side, turned every way.
    heads = storage.as_strided((3, 2, 64), (2**30, 64, 1), 2**31 - 2 * 64)
    for view in (heads, heads.transpose(0, 1), heads[:, :, None].expand(3, 2, 2, 64)):
        assert torch.equal(rms_norm(view, weight), rms_norm(view.contiguous(), weight))
    backward = torch.ops.prfl_fast.rms_norm_backward
    for pair in ((grad, x), (x, values), (x, x)):
        dense, rest = (t.contiguous() for t in pair), (weight, EPS, True, True)
        assert_same_bits(backward(*pair, *rest), backward(*dense, *rest))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0), (13, 0)])
@pytest.mark.parametrize("dim", [1, 7, 64, 128, 1024, 1536, 3072, 5120, 8192])
def test_launches_are_sane(dim, capability):
    for rows in (1, 2, 1000, 32760, 75600 * 40, 2**31):
        forward = module.forward_launch(rows, dim, capability)
        backward = module.backward_launch(rows, dim, capability)
        for launch in (forward, backward):
            assert dim <= launch.block_d < 2 * dim + 1
            assert launch.num_warps in (4, 8, 16)
            elements = launch.block_r * launch.block_d
            assert 8 * 32 * launch.num_warps <= max(elements, 1024)
            assert elements <= 16 * 32 * launch.num_warps  # what keeps registers from spilling
            assert launch.rows_per_program % launch.block_r == 0
            assert (launch.programs - 1) * launch.rows_per_program < rows
            assert launch.programs * launch.rows_per_program >= rows
        assert backward.programs <= 8 * 170  # partial rows
        assert forward.rows_per_program <= 8 * forward.block_r


@st.composite
def arguments(draw):
    lead = draw(st.lists(st.integers(1, 5), max_size=4))
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    dtype, small = (draw(st.sampled_from(FLOATS)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make((*lead, dim), dtype, small, draw(st.booleans()))
    axes = (*draw(st.permutations(range(len(lead)))), len(lead))
    return tensors, axes, draw(st.sampled_from([1e-6, 1e-3]))


@property_test(arguments())
def test_any_arguments(case):
    tensors, axes, eps = case

    def strided(function):
        return lambda x, weight=None: function(spread(x, axes), weight, eps=eps)

    check(strided(rms_norm), strided(naive), tensors, rounding=FLOAT_SLACK)
