"""Shapes, dtypes, strides and devices of CUDA paths, on fake CUDA tensors.

A CUDA build of PyTorch describes its kernels without running them. An argument that one of its
operators does not take, or a tensor left on the host, shows without a GPU. Its autograd engine asks
for a real device: operators, among them those of a backward, are called one by one.
"""

import pytest
import torch
from harness import PRESETS
from op_checks import RecordedCalls
from suites.kernel_cases import CASES
from suites.kernel_checks import draw_inputs, results
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from wan import inputs, tiny_wan

from prfl_fast import patch
from prfl_fast.kernels.attn import backend_choice, backends
from prfl_fast.kernels.linear import fp8
from prfl_fast.kernels.runtime.registry import OPERATIONS
from prfl_fast.memory.offload import Offloader
from prfl_fast.models.velocity import ModelCall

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a CUDA build of PyTorch: make newest"
)


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    """Answer for the chip."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def on_cuda(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def layouts(outputs):
    return [(t.shape, t.stride(), t.dtype) for t in tree_leaves(outputs)]


def devices(*outputs):
    return {t.device.type for t in tree_leaves(outputs)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_and_backward_describe_what_they_return(case):
    tensors = draw_inputs(case, PRESETS["tiny"], torch.device("cpu"), torch.bfloat16)
    with RecordedCalls() as recorded:
        results(case, tensors, case.ours, 0)
    assert recorded.calls
    for operator, arguments in recorded.calls:
        real = operator(*arguments)
        name = operator._schema.name.removeprefix("prfl_fast::")
        with FakeTensorMode():
            fakes = tree_map_only(torch.Tensor, on_cuda, arguments)
            described = operator(*fakes)
            assert layouts(described) == layouts(real)
            assert devices(described) == {"cuda"}
            if not name.startswith(("attention", "fp8_linear")):  # these have tests of their own
                computed = OPERATIONS[name].reference(*fakes)
                assert layouts(computed) == layouts(real)
                assert devices(computed) == {"cuda"}


ATTENTION = [
    (name, lengths)
    for name, limits in backend_choice.LIMITS.items()
    for lengths in (False, True)
    if name in ("flash", "efficient", "cudnn") and (limits.lengths or not lengths)
]


@pytest.mark.parametrize("name, lengths", ATTENTION)
def test_attention_of_pytorch_takes_our_arguments(name, lengths):
    forward, backward = backends.CALLS[name]
    with FakeTensorMode():
        q, k, v = (
            torch.empty(2, tokens, 4, 64, dtype=torch.bfloat16, device="cuda")
            for tokens in (40, 72, 72)
        )
        keys = torch.empty(2, dtype=torch.int32, device="cuda") if lengths else None
        out, lse = forward(q, k, v, 0.125, keys)
        grads = backward(torch.empty_like(q), q, k, v, out.contiguous(), lse, 0.125, keys)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((2, 4, 40), torch.float32)
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]
    assert devices(out, lse, grads) == {"cuda"}


@pytest.mark.parametrize("product", [fp8.reference, fp8.emulated])
def test_fp8_products(product, monkeypatch):
    monkeypatch.setattr(fp8, "unsupported_reason", lambda device: "")
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = (torch.empty(*shape, dtype=fp8.FP8) for shape in ((2, 48, 64), (96, 64)))
        scales, bias = (torch.empty(2, 48, 1), torch.empty(96, 1)), torch.empty(96).bfloat16()
        more = (True,) if product is fp8.reference else ()
        y = product(x, scales[0], weight, scales[1], bias, torch.bfloat16, *more)
    assert (y.shape, y.dtype, y.device.type) == ((2, 48, 96), torch.bfloat16, "cuda")


def test_offloaded_storages_leave_the_device_and_return(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)  # needs a driver
    with FakeTensorMode():
        block, x = torch.nn.Linear(2, 2, device="cuda"), torch.empty(64, 1024, device="cuda")
        offloader = Offloader(host_limit=1 << 30)
        group = offloader.open(block, x, ())
        handles = [group.pack(t) for t in (x, x[1:], torch.empty_like(x, dtype=torch.bfloat16))]
        group.leave_device()
        assert offloader.bytes["device_now"] == 0
        assert offloader.bytes["host_now"] == x.nbytes + x.nbytes // 2
        returned = [handle.unpack() for handle in handles]
    assert layouts(returned) == layouts([x, x[1:], torch.empty(64, 1024, dtype=torch.bfloat16)])
    assert devices(returned) == {"cuda"}


@pytest.mark.parametrize("case", ["t2v", "i2v", "flf"])
def test_a_patched_model_stays_on_the_device(case):
    with FakeTensorMode():
        with torch.device("cuda"):
            model = patch(tiny_wan(case))
        x, timestep, conditions = tree_map_only(torch.Tensor, on_cuda, inputs(case))
        with torch.no_grad():
            velocity = ModelCall(model, "fp32")(x, timestep, conditions)
    assert (velocity.shape, velocity.device.type) == (x.shape, "cuda")
