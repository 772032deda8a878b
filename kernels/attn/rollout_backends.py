"""Call the low-bit attention kernels of other packages for ``rollout_attention``.

A backend is a function of q ``[B, Lq, heads, d]``, k and v ``[B, Lk, heads, d]`` in 16 bits, whose
last axis is dense, and of a positive scale; it returns ``[B, Lq, heads, d]`` in q's dtype.

backend           version read         q k    p v    numbers of q and k that share a scale
sage_2            SageAttention 2.2.0  int8   e4m3   4 and 16 rows on 8.0 (p v: fp16) and 8.9,
                                                     2 and 32 on 9.0, 32 and 64 on 12.x
sage_3            SageAttention3 1.0   e2m1   e2m1   16 channels, by scales in e4m3
flash_attn_3_fp8  flash-attn 3.0.0     e4m3   e4m3   a head of a sample
flash_attn_4_fp8  flash-attn 4 (8/26)  e4m3   e4m3   a head of a sample
cudnn_fp8         frontend 1.23        e4m3   e4m3   all

SageAttention subtracts the mean of k itself; for the others we do, and from v too.
PyTorch's quantized flash attention is left out: in PyTorch 2.13 it calls flash-attn 3, as we do.
No GPU has run these calls: tests/kernels/attn/test_rollout_backends.py runs them on stand-ins.
"""

import functools
import math
from typing import Any

import torch

from prfl_fast.kernels.attn.backends import find_package, import_package
from prfl_fast.kernels.common.fp8 import FLOOR, FP8, LARGEST

# Backend → module of its package, and functions with a parameter that old versions lack.
# SageAttention 1 has sageattn too, but not the kernel of Hopper.
PACKAGES: dict[str, tuple[str, dict[str, str]]] = {
    "sage_2": (
        "sageattention",
        {"sageattn": "sm_scale", "sageattn_qk_int8_pv_fp8_cuda_sm90": "sm_scale"},
    ),
    "flash_attn_3_fp8": ("flash_attn_interface", {"_flash_attn_forward": "q_descale"}),
    "flash_attn_4_fp8": ("flash_attn.cute.interface", {"_flash_attn_fwd": "q_descale"}),
    "cudnn_fp8": ("cudnn", {}),
    "sage_3": ("sageattn3", {"sageattn3_blackwell": "per_block_mean"}),
}
HEAD, TENSOR = (1, 3), (0, 1, 2, 3)  # axes of [B, L, heads, d] that share a scale


@functools.cache
def absent(name: str) -> str | None:
    """Return a message if the package of a backend is not installed, without importing it."""
    return find_package(PACKAGES[name][0])


@functools.cache
def load(name: str) -> tuple[Any, str | None]:
    """Return the module of a backend's package, or None and the reason why it is unusable."""
    return import_package(*PACKAGES[name])


def missing_part(name: str, capability: tuple[int, int]) -> str | None:
    """Return the reason if a package does not import or was built without a chip's kernel."""
    module, reason = load(name)
    if reason is not None:
        return reason
    if name == "sage_2":
        built = {(8, 0): "SM80", (9, 0): "SM90"}.get(capability, "SM89")
        if not getattr(module.core, f"{built}_ENABLED", True):
            return f"package sageattention was built without its kernels of {built}"
    if name == "flash_attn_3_fp8":
        config = import_package("flash_attn_config", {})[0]  # its build writes this module
        flags = getattr(config, "CONFIG", {}).get("build_flags", {})
        if flags.get("FLASHATTENTION_DISABLE_FP8"):
            return "package flash_attn_interface was built without FP8"
    if name == "cudnn_fp8":
        if not hasattr(getattr(module, "pygraph", None), "sdpa_fp8"):
            return "package cudnn has no pygraph.sdpa_fp8: update it"
        if module.backend_version() < 91300:
            return f"cuDNN {module.backend_version()} < 91300 writes no 16-bit output"
    return None


# Quantization for the packages that take e4m3.
def encode(x: torch.Tensor, axes: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 codes of ``[B, L, heads, d]`` and the float32 factor that restores x.

    The factor has the shape of x with 1 for each of ``axes``.
    """
    amax = torch.linalg.vector_norm(x, torch.inf, axes, keepdim=True).float().clamp(min=FLOOR)
    # In x's dtype, as float32 copies of long sequences would take gigabytes. Bits of the factor
    # that are rounded off are rounded off its inverse too. They leave at most 452, and e4m3 rounds
    # numbers below 464 to its largest. The limit is for float16.
    factor = (LARGEST / amax).clamp(max=torch.finfo(x.dtype).max / 2).to(x.dtype)
    return (x * factor).to(FP8), factor.float().reciprocal()


def encode_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, axes: tuple[int, ...]
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Return codes and factors of q, k and v, and the mean of v that is to be added to out.

    The mean of k over tokens shifts all scores of a query alike, so softmax ignores it.
    """
    v_mean = v.mean(1, keepdim=True)
    parts = q, k - k.mean(1, keepdim=True), v - v_mean
    codes, factors = zip(*(encode(t, axes) for t in parts), strict=True)
    return list(codes), list(factors), v_mean


def _sage_2(q, k, v, scale):
    return load("sage_2")[0].sageattn(
        q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, return_lse=False
    )


def _sage_3(q, k, v, scale):
    head_dim = q.shape[-1]
    if not math.isclose(scale, head_dim**-0.5):  # the package's own scale
        q = q * (scale * math.sqrt(head_dim))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    # It subtracts the mean of k in place.
    out = load("sage_3")[0].sageattn3_blackwell(
        q, k.clone(), v, is_causal=False, per_block_mean=True
    )
    return out.transpose(1, 2)


def _descales(factors):
    """Return float32 ``[B, heads]`` of each factor ``[B, 1, heads, 1]``."""
    names = ("q_descale", "k_descale", "v_descale")
    return dict(zip(names, (f[:, 0, :, 0].contiguous() for f in factors), strict=True))


def _flash_attn_3(q, k, v, scale):
    codes, factors, v_mean = encode_all(q, k, v, HEAD)
    out, *_ = load("flash_attn_3_fp8")[0]._flash_attn_forward(
        *codes, softmax_scale=scale, **_descales(factors)
    )
    return out + v_mean


def _flash_attn_4(q, k, v, scale):
    codes, factors, v_mean = encode_all(q, k, v, HEAD)
    out, *_ = load("flash_attn_4_fp8")[0]._flash_attn_fwd(
        *codes, softmax_scale=scale, **_descales(factors)
    )
    return out + v_mean


# cuDNN takes descriptions of tensors [B, heads, L, d], by number, and then their memory.
_INPUTS = ("q", "k", "v")
_SCALES = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
_OUTPUTS = ("o", "amax_s", "amax_o")
_NUMBER = {name: number for number, name in enumerate((*_INPUTS, *_SCALES, *_OUTPUTS), start=1)}


@functools.cache
def _cudnn_handle(device: torch.device) -> Any:
    return load("cudnn_fp8")[0].create_handle()


@functools.lru_cache(maxsize=64)
def _cudnn_graph(device, scale, dtype, *layouts):
    """Return the compiled graph of q, k, v and o, whose shapes and strides are ``layouts``."""
    cudnn, one = load("cudnn_fp8")[0], (1, 1, 1, 1)
    kind = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=kind.FP8_E4M3, intermediate_data_type=kind.FLOAT,
        compute_data_type=kind.FLOAT, handle=_cudnn_handle(device),
    )  # fmt: skip
    given = {
        name: graph.tensor(dim=dim, stride=stride, data_type=kind.FP8_E4M3, uid=_NUMBER[name])
        for name, (dim, stride) in zip(_INPUTS, layouts, strict=False)
    }
    for name in _SCALES:
        given[name] = graph.tensor(dim=one, stride=one, data_type=kind.FLOAT, uid=_NUMBER[name])
    out, _, amax_s, amax_o = graph.sdpa_fp8(**given, attn_scale=scale, generate_stats=False)
    for name, tensor in zip(_OUTPUTS, (out, amax_s, amax_o), strict=True):
        dim, stride = layouts[3] if name == "o" else (one, one)
        tensor.set_uid(_NUMBER[name]).set_output(True).set_dim(dim).set_stride(stride)
        tensor.set_data_type(kind.FLOAT)
    out.set_data_type(kind.BFLOAT16 if dtype == torch.bfloat16 else kind.HALF)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph


def _cudnn(q, k, v, scale):
    codes, factors, v_mean = encode_all(q, k, v, TENSOR)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tensors = [t.transpose(1, 2) for t in (*codes, out)]
    layouts = ((tuple(t.shape), t.stride()) for t in tensors)
    graph = _cudnn_graph(q.device, scale, q.dtype, *layouts)
    # Weights are at most 1: the fixed factor 448 fills e4m3.
    fixed = [q.new_full((), f, dtype=torch.float32) for f in (1 / LARGEST, LARGEST, 1, 0, 0)]
    memory = [*codes, *factors, *fixed[:3], out, *fixed[3:]]
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=q.device)
    handle, stream = _cudnn_handle(q.device), torch.cuda.current_stream(q.device).cuda_stream
    load("cudnn_fp8")[0].set_stream(handle=handle, stream=stream)
    graph.execute(dict(zip(_NUMBER.values(), memory, strict=True)), workspace, handle=handle)
    return out.add_(v_mean)


CALLS = {
    "sage_2": _sage_2,
    "flash_attn_3_fp8": _flash_attn_3,
    "flash_attn_4_fp8": _flash_attn_4,
    "cudnn_fp8": _cudnn,
    "sage_3": _sage_3,
}


def run_backend(
    name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float
) -> torch.Tensor:
    """Return the attention ``[B, Lq, D]`` of q, k and v ``[B, L, D]`` by a package's kernel."""
    q, k, v = (t.view(*t.shape[:2], heads, t.shape[2] // heads) for t in (q, k, v))
    return CALLS[name](q, k, v, scale).to(q.dtype).flatten(2).contiguous()
