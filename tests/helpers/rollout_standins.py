"""Stand-ins for packages with low-bit attention: real signatures, checks, layouts and arithmetic.

Read in SageAttention 2.2.0 (d1a57a5), its sageattention3_blackwell 1.0.0, and cudnn-frontend 1.23
(3929da2). Those of flash-attn 3 and 4 (0251105) are in ``attention_standins.py``.
"""

import math
import sys
import types

import torch
from attention_standins import PACKAGES, install
from rollout_emulation import Arithmetic, Rows, emulate, softmax_average

HALF = (torch.float16, torch.bfloat16)
F16 = torch.float16
# SageAttention's kernels by chip: threads share scales, but on 12.x warps and blocks do.
SAGE_2 = {
    (8, 0): Arithmetic(q_rows=Rows(32, 1), k_rows=Rows(64, 2), weights=F16, p_top=1.0),
    (8, 9): Arithmetic(q_rows=Rows(32, 1), k_rows=Rows(64, 2), v_top=2.25),
    (9, 0): Arithmetic(q_rows=Rows(16, 1), k_rows=Rows(128, 2), block_n=128),
    (12, 0): Arithmetic(q_rows=Rows(32), k_rows=Rows(64), v_top=2.25),
}
SAGE_2[12, 1] = SAGE_2[12, 0]
SAGE_3 = Arithmetic(scores="e2m1", weights="e2m1", p_top=448 * 6.0, block_n=128)


def check_half(q, k, v, tokens, heads):
    for t in (q, k, v):
        assert t.dim() == 4 and t.dtype in HALF and t.dtype == q.dtype and t.stride(-1) == 1
        assert t.shape[heads] == q.shape[heads] and t.shape[3] == q.shape[3]
    assert k.shape == v.shape and k.shape[tokens] > 0


def _sage_2(chip):
    def sageattn(
        q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs
    ):
        assert tensor_layout == "NHD" and not is_causal and not return_lse and not kwargs
        assert sm_scale > 0, "the running maximum is of the products before they are scaled"
        check_half(q, k, v, 1, 2)
        head_dim = q.shape[3]
        assert head_dim <= 128
        pad = -head_dim % (64 if head_dim <= 64 else 128)
        q, k, v = (torch.nn.functional.pad(t, (0, pad)) for t in (q, k, v))
        module.calls += 1
        return emulate(q, k, v, sm_scale, SAGE_2[chip]).contiguous()[..., :head_dim]

    def sageattn_qk_int8_pv_fp8_cuda_sm90(
        q, k, v, tensor_layout="HND", is_causal=False, qk_quant_gran="per_thread", sm_scale=None,
        pv_accum_dtype="fp32+fp32", smooth_k=True, return_lse=False, **kwargs,
    ):  # fmt: skip
        raise AssertionError("sageattn chooses it")

    module = types.ModuleType("sageattention")
    module.core = types.SimpleNamespace(SM80_ENABLED=True, SM89_ENABLED=True, SM90_ENABLED=True)
    module.sageattn = sageattn
    module.sageattn_qk_int8_pv_fp8_cuda_sm90 = sageattn_qk_int8_pv_fp8_cuda_sm90
    return module


def _sage_3(chip):
    def sageattn3_blackwell(
        q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs
    ):
        assert attn_mask is None and not is_causal and per_block_mean and not kwargs
        check_half(q, k, v, 2, 1)
        assert q.shape[3] in (64, 128)
        k -= k.mean(dim=-2, keepdim=True)
        module.calls += 1
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = emulate(q, k, v, q.shape[3] ** -0.5, SAGE_3)
        return out.transpose(1, 2).contiguous()

    module = types.ModuleType("sageattn3")
    module.sageattn3_blackwell = sageattn3_blackwell
    return module


class _Tensor:
    """The description of a tensor of a cuDNN graph."""

    def __init__(self, dim=None, stride=None, data_type=None, uid=-1):
        self.dim, self.stride, self.data_type, self.uid = dim, stride, data_type, uid
        self.output = False

    def __getattr__(self, name):
        assert name in ("set_dim", "set_stride", "set_data_type", "set_uid", "set_output")

        def set_it(value):
            setattr(self, name.removeprefix("set_"), value)
            return self

        return set_it


DTYPES = {
    "FP8_E4M3": torch.float8_e4m3fn,
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BFLOAT16": torch.bfloat16,
}
STEPS = ("validate", "build_operation_graph", "create_execution_plans", "check_support")


class _Graph:
    """cudnn.pygraph: a graph of one sdpa_fp8, built in the order that cuDNN asks for."""

    built = 0

    def __init__(
        self, name="test_graph", io_data_type=None, intermediate_data_type=None,
        compute_data_type=None, handle=None,
    ):  # fmt: skip
        assert io_data_type == "FP8_E4M3" and handle == 11
        assert intermediate_data_type == compute_data_type == "FLOAT"
        self.steps, self.tensors, self.inputs = [], {}, {}

    def tensor(self, dim, stride, data_type=None, is_virtual=False, name="", uid=-1):
        assert len(dim) == len(stride) == 4 and stride[3] == 1 and uid >= 0
        return _Tensor(dim, stride, data_type, uid)

    def sdpa_fp8(
        self, q, k, v, descale_q, descale_k, descale_v, descale_s, scale_s, scale_o,
        is_inference=None, attn_scale=None, generate_stats=None,
    ):  # fmt: skip
        scales = (descale_q, descale_k, descale_v, descale_s, scale_s, scale_o)
        self.inputs, self.scale = [q, k, v, *scales], attn_scale
        assert is_inference is None and generate_stats is False
        assert all(t.dim == (1, 1, 1, 1) and t.data_type == "FLOAT" for t in scales)
        for t in (q, k, v):
            assert t.data_type == "FP8_E4M3" and t.dim[3] <= 128 and t.dim[3] % 16 == 0
        self.outputs = _Tensor(), _Tensor(), _Tensor()
        out, amax_s, amax_o = self.outputs
        return out, None, amax_s, amax_o

    def _step(self, name):
        assert len(self.steps) == STEPS.index(name)
        self.steps.append(name)

    def validate(self):
        self._step("validate")
        assert all(t.output and t.dim and t.stride and t.data_type for t in self.outputs)
        every = [*self.inputs, *self.outputs]
        assert len({t.uid for t in every}) == len(every) and min(t.uid for t in every) >= 0
        assert self.outputs[0].data_type in ("HALF", "BFLOAT16")

    def build_operation_graph(self):
        self._step("build_operation_graph")

    def create_execution_plans(self, modes):
        assert modes == ["A", "FALLBACK"]
        self._step("create_execution_plans")

    def check_support(self):
        self._step("check_support")

    def build_plans(self):
        assert len(self.steps) == len(STEPS)
        type(self).built += 1

    def get_workspace_size(self):
        return 16

    def execute(self, tensor_to_device_buffer, workspace, handle=None):
        assert handle == 11 and workspace.numel() >= 16
        given = dict(tensor_to_device_buffer)

        def memory(t):
            found = given.pop(t.uid)
            assert found.dtype == DTYPES[t.data_type], "cuDNN reads a pointer"
            return torch.as_strided(found, t.dim, t.stride)

        q, k, v, d_q, d_k, d_v, d_s, scale_s, scale_o = (memory(t) for t in self.inputs)
        out, amax_s, amax_o = (memory(t) for t in self.outputs)
        assert not given and torch.isclose(d_s * scale_s, torch.ones(()))
        scores = (q.float() @ k.float().mT) * (d_q * d_k * self.scale / math.log(2))
        found = softmax_average(scores, v.float(), "e4m3", scale_s.item(), 128)
        out.copy_(found * d_v * scale_o)
        amax_s.fill_(1)
        amax_o.fill_(out.abs().max())


def _cudnn(chip):
    module = types.ModuleType("cudnn")
    module.data_type = types.SimpleNamespace(**{name: name for name in DTYPES})
    module.heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
    module.pygraph = type("pygraph", (_Graph,), {})
    module.backend_version = lambda: 91300
    module.streams = []
    module.create_handle = lambda: 11

    def set_stream(handle, stream):
        assert handle == 11
        module.streams.append(stream)

    module.set_stream = set_stream
    return module


MODULES = {"sage_2": _sage_2, "sage_3": _sage_3, "cudnn_fp8": _cudnn}


def install_rollout(monkeypatch, name, chip):
    """Put a package's stand-in where ``import`` finds it, and return the module."""
    if name not in MODULES:
        assert name.removesuffix("_fp8") in PACKAGES
        return install(monkeypatch, name.removesuffix("_fp8"))
    module = MODULES[name](chip)
    module.calls = 0
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module
