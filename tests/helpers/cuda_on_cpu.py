"""Compile and call the kernels of csrc/ on the CPU, through cuda_emulation.hpp."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
GUARD = 64  # elements before and after an output that a kernel must leave alone

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to emulate CUDA")


def compile_kernel(name, folder, change=None):
    """Compile and load the emulated csrc/<name>.cu.

    Args:
        change: (text, replacement, place among its equals). A changed kernel has only its narrowest
            bf16 instance.
    """
    source = (ROOT / "csrc" / f"{name}.cu").read_text()
    flags = ["-O2"]
    if change is not None:
        before, after, place = change
        parts = source.split(before)
        assert len(parts) > place + 1
        source = before.join(parts[: place + 1]) + after + before.join(parts[place + 1 :])
        flags = ["-O1", "-DNARROW"]
    (folder / f"{name}.cu").write_text(source)
    library = folder / f"{name}.so"
    # Fortified longjmp takes a switch of stacks for an attack.
    flags += ["-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-fno-strict-aliasing"]
    folders = [f"-I{folder}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    command = ["g++", *flags, *folders, HERE / f"{name}_emulated.cpp", "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


class Outputs:
    """Buffers full of NaN between guards; call ``check`` after a kernel has run."""

    def __init__(self):
        self.whole = []

    def make(self, shape, dtype=torch.float32):
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * GUARD,), float("nan")).to(dtype)
        whole[:GUARD] = whole[GUARD + size :] = 7
        self.whole.append(whole)
        return whole[GUARD : GUARD + size].view(shape)

    def check(self):
        for whole in self.whole:
            assert (whole[:GUARD] == 7).all() and (whole[-GUARD:] == 7).all(), "out of bounds"


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _strides(x):
    return [ctypes.c_int64(s) for s in x.stride()[:2]]


def query_pool(library, x, queries, width, warps, cluster, splits, order=0):
    """Run ``torch.ops.prfl_fast_cuda.query_pool``, threads taking turns in the given order."""
    batch, tokens, dim = x.shape
    heads = len(queries)
    assert queries.dtype == torch.float32 and queries.is_contiguous()
    partial = (batch, splits, heads)
    outputs = Outputs()
    shapes = (partial, (*partial, 2), (*partial, dim), (batch, heads, dim), (batch, heads))
    buffers = [outputs.make(shape) for shape in shapes]
    numbers = (batch, tokens, heads, dim, int(x.dtype == torch.float16), width, warps, cluster)
    pointers = [_pointer(t) for t in (x, queries, *buffers)]
    assert library.query_pool_emulated(*pointers, *_strides(x), *numbers, splits, order) == 0
    outputs.check()
    return tuple(buffers[3:])


def query_pool_backward(
    library, grad, lse, delta, x, queries, need_x, need_queries, width, warps, cluster, splits,
    order=0,
):  # fmt: skip
    """Run ``torch.ops.prfl_fast_cuda.query_pool_backward``."""
    batch, tokens, dim = x.shape
    heads = len(queries)
    for tensor in (grad, lse, delta, queries):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
    outputs = Outputs()
    d_x = outputs.make(x.shape, x.dtype) if need_x else None
    partials = outputs.make((batch, splits, heads, dim)) if need_queries else None
    numbers = (batch, tokens, heads, dim, int(x.dtype == torch.float16), width, warps, cluster)
    pointers = [_pointer(t) for t in (x, queries, grad, lse, delta, d_x, partials)]
    run = library.query_pool_backward_emulated
    assert run(*pointers, *_strides(x), *numbers, splits, order) == 0
    outputs.check()
    empty = x.new_empty(0), queries.new_empty(0)
    return d_x if need_x else empty[0], partials if need_queries else empty[1]


class Side(ctypes.Structure):
    """The struct of the same name in csrc/rope_sides.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weight", "out", "partials")),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_token", "grad_batch", "grad_token")),
        *((name, ctypes.c_int) for name in ("rows", "length", "blocks")),
        ("wide", ctypes.c_bool),
    ]


class Rotation(ctypes.Structure):
    """The struct of the same name in csrc/rope_sides.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int) for name in ("height", "width")),
        *((f"{name}_offset", ctypes.c_int) for name in ("frame", "height", "width")),
    ]


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def _rope(library, sides, dtype, cos, sin, grid, offset, dim, heads, per_head, eps, backward,
          threads, order):  # fmt: skip
    rotation = Rotation(_address(cos), _address(sin), *(grid or [0] * 3)[1:], *(offset or [0] * 3))
    for table in (cos, sin):
        assert table is None or table.dtype == torch.float32 and table.is_contiguous()
    numbers = (dim, dim // heads, int(per_head), ctypes.c_float(eps), int(backward))
    half = int(dtype == torch.float16)
    pair = (Side * 2)(*sides)
    run = library.qk_norm_rope_emulated
    assert run(pair, ctypes.byref(rotation), *numbers, half, threads, order) == 0


def _set(side, prefix, x):
    setattr(side, prefix, x.data_ptr())
    setattr(side, f"{prefix}_batch", x.stride(0))
    setattr(side, f"{prefix}_token", x.stride(1))
    assert x.stride(2) == 1
    side.rows, side.length = x.shape[0] * x.shape[1], x.shape[1]


def _set_weight(side, weight, dtype):
    assert weight is None or weight.dtype in (dtype, torch.float32) and weight.is_contiguous()
    side.weight = _address(weight)
    side.wide = weight is not None and weight.dtype == torch.float32


def qk_norm_rope(
    library, q, k, q_weight, k_weight, cos, sin, grid, offset, heads, per_head, eps,
    threads, q_blocks, k_blocks, order=0,
):  # fmt: skip
    """Run ``torch.ops.prfl_fast_cuda.qk_norm_rope``."""
    outputs, sides, results = Outputs(), (Side(), Side()), []
    triples = zip(sides, (q, k), (q_weight, k_weight), (q_blocks, k_blocks), strict=True)
    for side, x, weight, blocks in triples:
        _set(side, "x", x)
        _set_weight(side, weight, q.dtype)
        results.append(outputs.make(x.shape, x.dtype))
        side.out, side.blocks = results[-1].data_ptr(), blocks
    numbers = (grid, offset, q.shape[2], heads, per_head, eps, False, threads, order)
    _rope(library, sides, q.dtype, cos, sin, *numbers)
    outputs.check()
    return tuple(results)


def qk_norm_rope_backward(
    library, q_grad, k_grad, q, k, q_weight, k_weight, cos, sin, grid, offset, heads, per_head,
    eps, need_q, need_k, need_q_weight, need_k_weight, threads, q_blocks, k_blocks, order=0,
):  # fmt: skip
    """Run ``torch.ops.prfl_fast_cuda.qk_norm_rope_backward``."""
    outputs, sides = Outputs(), (Side(), Side())
    some = q_grad if q_blocks else k_grad
    results = [some.new_empty(0) for _ in range(4)]
    given = ((q_grad, q, q_weight, q_blocks), (k_grad, k, k_weight, k_blocks))
    for i, (side, (grad, x, weight, blocks)) in enumerate(zip(sides, given, strict=True)):
        if not blocks:
            continue
        _set_weight(side, weight, some.dtype)
        if weight is not None:
            _set(side, "x", x)
        _set(side, "grad", grad)
        side.blocks = blocks
        if (need_q, need_k)[i]:
            results[i] = outputs.make(grad.shape, grad.dtype)
            side.out = results[i].data_ptr()
        if (need_q_weight, need_k_weight)[i]:
            results[i + 2] = outputs.make((blocks, grad.shape[2]))
            side.partials = results[i + 2].data_ptr()
    numbers = (grid, offset, some.shape[2], heads, per_head, eps, True, threads, order)
    _rope(library, sides, some.dtype, cos, sin, *numbers)
    outputs.check()
    return tuple(results)
