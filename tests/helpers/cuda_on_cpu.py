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
    flags = ["-O1"]  # -O2 takes half as long again to compile, and saves the tests nothing
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
