"""rms_norm: reference and Triton against plain PyTorch, rows wherever they lie."""

import pytest
import torch
import torch.nn.functional as F
from dtypes import BF16, FLOATS, FP16, FP32
from op_checks import saved_by, slack
from op_tests import OperationTests
from plain_torch import spread, wide
from properties import property_test, st

from prfl_fast.kernels import rms_norm
from prfl_fast.kernels.norm import rms as module

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered")
EPS = 1e-6


def naive(x, weight=None, eps=EPS):
    y = F.rms_norm(wide(x), x.shape[-1:], None if weight is None else wide(weight), eps)
    return y.to(x.dtype)


def make(shape, dtype=FP32, small=None, weight=True):
    """Return x of ``shape`` and a weight of dtype ``small``, x's unless given."""
    tensors = {"x": (torch.randn(shape) * 2 + 1).to(dtype)}
    if weight:
        tensors["weight"] = (1 + 0.5 * torch.randn(shape[-1])).to(small or dtype)
    return tensors


class TestRmsNorm(OperationTests):
    op = "rms_norm"
    function, naive, reference = rms_norm, naive, module.reference
    flags = {"x": "+-", "weight": "-+"}
    far_shapes = ((3, 64), (3, 2, 64), (2, 3, 64), (2, 3, 2, 64))  # one to three axes of rows

    def examples(self, dtype):
        yield make((2, 3, 2, 8), dtype), {}
        yield make((2, 3, 8), dtype, weight=False), {"eps": EPS}

    def layouts(self, dtype):
        for shape in ((2, 3, 48), (3, 1100), (2, 3, 4, 16)):
            yield make(shape, dtype, FP32), {}

    at_length = staticmethod(lambda length: make((2, length, 4, 16)))
    good = staticmethod(lambda: {"x": torch.zeros(2, 6, 8)})
    far = staticmethod(lambda shape: (make(shape, FP16, FP32), {}))

    bad_arguments = [
        (dict(x=torch.zeros(())), r"x is float32\[\]"),
        (dict(x=torch.zeros(2, 6, 0)), r"x is float32\[2, 6, 0\]"),
        (dict(x=torch.zeros(2, 8, 6).transpose(1, 2)), "x is .*contiguous"),
        (dict(x=[1.0]), r"x is \[1.0\]"),
        (dict(weight=torch.ones(7)), r"weight is float32\[7\].*\[8\]"),
        (dict(weight=torch.ones(1, 8)), r"weight is float32\[1, 8\].*\[8\]"),
        (dict(eps=-1.0), "eps is -1.0"),
    ]


compare = TestRmsNorm.compare
SHAPES = [
    (7,), (1, 1), (1, 64), (3, 65), (2, 5, 96), (2, 3, 4, 128), (2, 0, 64), (40, 33), (3, 1536),
    (1, 2, 5120), (2, 8192),
]  # fmt: skip


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(backend, shape, dtype, weight):
    compare(make(shape, dtype, weight=weight), slack(backend, dtype, fp32=4.0))


@pytest.mark.parametrize("dtype, small", [(BF16, FP32), (FP16, BF16), (FP32, BF16)])
def test_mixed_dtypes(backend, dtype, small):
    compare(make((2, 4, 72), dtype, small))


@pytest.mark.parametrize("affine", [False, True])
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
    def viewed(x, weight):
        return {"x": HEAD_VIEWS[view](x.unflatten(-1, (3, 4, 24))), "weight": weight}

    tensors = {"x": torch.randn(2, 5, 3 * 4 * 24), "weight": torch.randn(24)}
    compare(tensors, of=viewed)
    assert rms_norm(**viewed(**tensors)).is_contiguous()


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
    monkeypatch.setattr(module, "multiprocessors", lambda capability: 1)
    tensors = make((603, 24))
    launch = module.backward_launch(603, 24, (8, 0))
    assert launch.programs > 1 and launch.rows_per_program > launch.block_r
    compare(tensors)


def test_only_the_inputs_are_saved(backend):
    assert saved_by(rms_norm, make((64, 128), BF16)) == 64 * 128 * 2 + 128 * 2


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


@property_test()
def test_any_arguments(draw):
    lead = draw(st.lists(st.integers(1, 5), max_size=4))
    dim = draw(st.integers(8, 130))  # two or three values leave a norm's gradient to rounding alone
    dtype, small = (draw(st.sampled_from(FLOATS)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    tensors = make((*lead, dim), dtype, small, draw(st.booleans()))
    axes = (*draw(st.permutations(range(len(lead)))), len(lead))
    eps = draw(st.sampled_from([1e-6, 1e-3]))
    compare(tensors, of=lambda x, **weight: {"x": spread(x, axes)} | weight, eps=eps)
