"""Arithmetic of other packages' low-bit attention, computed in plain PyTorch by one function.

Read in the sources named in ``rollout_standins.py``. The number formats, the tokens that share a
scale, the mean that is subtracted and the running maximum follow the packages; the order of sums
and the bits of a tensor core's accumulator do not.
"""

import math
from dataclasses import dataclass

import torch

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
LARGEST = {"int8": 127.0, "e4m3": 448.0, "e2m1": 6.0}


@dataclass(frozen=True)
class Rows:
    """Rows that share a scale: of ``block`` rows those of ``run`` neighbors in each eight."""

    block: int
    run: int = 8

    def groups(self, length):
        row = torch.arange(length)
        return row // self.block * (8 // self.run) + row % 8 // self.run


WHOLE = Rows(1 << 40)  # one scale for a head


@dataclass(frozen=True)
class Arithmetic:
    """Formats and scales; ``p_top`` is what a weight of 1 becomes before it is rounded."""

    scores: str = "int8"
    q_rows: Rows = WHOLE
    k_rows: Rows = WHOLE
    weights: str = "e4m3"
    p_top: float = 448.0
    v_top: float = 448.0
    block_n: int = 64
    smooth_k: bool = True


def round_to(x, kind):
    """Round to a format's nearest number: ties to even, but for e2m1 away from zero."""
    if kind == "int8":
        return x.round().clamp(-127, 127)
    if kind == "e4m3":
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    if kind == "e2m1":
        edges = (E2M1[1:] + E2M1[:-1]) / 2
        return E2M1[torch.bucketize(x.abs().contiguous(), edges, right=True)] * x.sign()
    return x.to(kind).float()


def quantize_rows(x, rows, kind):
    """Return ``[…, L, d]`` after rounding with a scale for each group of rows."""
    index = rows.groups(x.shape[-2])
    amax = x.abs().amax(-1)
    most = torch.zeros(*amax.shape[:-1], int(index.max()) + 1)
    most = most.scatter_reduce(-1, index.expand_as(amax), amax, "amax")
    scale = (most[..., index] / LARGEST[kind])[..., None] + 1e-7
    return round_to(x / scale, kind) * scale


def quantize_16(x):
    """Return x after rounding to e2m1 with an e4m3 scale for each 16 numbers of the last axis."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
    scale = round_to(blocks.abs().amax(-1, keepdim=True) / 6, "e4m3")
    found = round_to(blocks / scale.where(scale > 0, torch.inf), "e2m1") * scale
    return found.flatten(-2)[..., : x.shape[-1]]


def softmax_average(s, v, kind, p_top, block_n):
    """Average v by the weights 2^s, rounded in blocks of keys against the running maximum."""
    top = s.new_full((*s.shape[:-1], 1), -math.inf)
    total, out = torch.zeros_like(top), s.new_zeros(*s.shape[:-1], v.shape[-1])
    for start in range(0, s.shape[-1], block_n):
        part = s[..., start : start + block_n]
        top, before = torch.maximum(top, part.amax(-1, keepdim=True)), top
        p, decay = torch.exp2(part - top) * p_top, torch.exp2(before - top)
        total = total * decay + p.sum(-1, keepdim=True)
        if kind == "e2m1":
            sixteen = torch.nn.functional.pad(p, (0, -p.shape[-1] % 16)).unflatten(-1, (-1, 16))
            scale = sixteen.amax(-1, keepdim=True) / 6
            small = round_to(sixteen / scale.where(scale > 0, torch.inf), kind)
            p = (small * round_to(scale, "e4m3")).flatten(-2)[..., : p.shape[-1]]
        else:
            p = round_to(p, kind)
        out = out * decay + p @ v[..., start : start + block_n, :]
    return out / total


def emulate(q, k, v, scale, how):
    """Return attention of ``[B, L, heads, d]`` by ``how``, in q's dtype."""
    dtype, factor = q.dtype, scale / math.log(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if how.smooth_k:
        k = k - k.mean(-2, keepdim=True)
    q, k, v = (t.float() for t in (q, k, v))
    if how.scores == "e2m1":
        mean = torch.cat([b.mean(-2, keepdim=True).expand_as(b) for b in q.split(128, -2)], -2)
        mean = mean.to(dtype).float()
        s = quantize_16(q - mean) @ quantize_16(k).mT + (mean @ k.mT).to(dtype).float()
        v = quantize_16(v.mT).mT
    else:
        q8 = quantize_rows(q, how.q_rows, how.scores)
        s = q8 @ quantize_rows(k, how.k_rows, how.scores).mT
        if how.weights == "e4m3":
            v_scale = v.abs().amax(-2, keepdim=True).clamp(min=1e-30) / how.v_top
            v = round_to(v / v_scale, "e4m3") * v_scale
        else:
            v = v.to(how.weights).float()
    out = softmax_average(s * factor, v, how.weights, how.p_top, how.block_n)
    return out.to(dtype).transpose(1, 2)
