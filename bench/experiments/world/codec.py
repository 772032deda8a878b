"""Encode videos by a fixed linear space-time codec, 4x8x8, that replaces a video VAE.

A clip of 1 + 4k frames becomes 1 + k latent frames: the first frame alone, then groups of four, as
in a causal video VAE. Each 8x8 patch of the first frame, and each 4x8x8 block of a group, is
projected on 16 products of cosines (orthonormal DCT-II over time, rows and columns) and an
orthonormal color axis (gray, red-blue, green-magenta):

* groups: gray detail in time first: all four temporal frequencies of the block mean and of its two
  spatial slopes (so every frame keeps its own brightness and center of mass), two diagonal terms,
  and the time-averaged color;
* first frame: the same spatial terms, with the temporal slots taken by finer spatial detail.

Coefficients are shifted and scaled to about zero mean and unit variance with constants measured on
the world's clips. The basis is orthonormal, so decode(encode(x)) is the orthogonal projection of x
on the retained subspace, and encode(decode(z)) = z. Both maps are affine and differentiable.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

CHANNELS = 16
TIME_STRIDE = 4
SPACE_STRIDE = 8

# (temporal, row, column frequency, color axis) of each latent channel; color 0 is gray.
GROUP_TERMS = (
    (0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (1, 0, 0, 0), (1, 0, 1, 0), (1, 1, 0, 0), (1, 1, 1, 0),
    (2, 0, 0, 0), (2, 0, 1, 0), (2, 1, 0, 0),
    (3, 0, 0, 0), (3, 0, 1, 0), (3, 1, 0, 0),
)  # fmt: skip
FIRST_TERMS = (
    (0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 1, 1, 0), (0, 0, 0, 1), (0, 0, 0, 2),
    (0, 0, 2, 0), (0, 2, 0, 0), (0, 1, 2, 0), (0, 2, 1, 0),
    (0, 2, 2, 0), (0, 0, 1, 1), (0, 1, 0, 1),
    (0, 0, 3, 0), (0, 3, 0, 0), (0, 0, 1, 2),
)  # fmt: skip
FIRST_MEAN = (-9.07, 0.0, 0.0, 0.0, 0.13, -0.12) + (0.0,) * 10
FIRST_STD = (
    5.34, 2.54, 2.46, 1.22, 1.08, 0.79, 1.05, 1.04, 0.69, 0.72, 0.51, 0.46, 0.45, 0.56, 0.54, 0.34,
)  # fmt: skip
GROUP_MEAN = (-18.15, 0.0, 0.0, 0.0, 0.26, -0.23) + (0.0,) * 10
GROUP_STD = (
    9.77, 4.40, 4.32, 1.90, 2.01, 1.47, 3.69, 2.13, 2.04, 1.20, 1.67, 1.07, 1.13, 1.05, 0.67, 0.73,
)  # fmt: skip


def encode(video: Tensor) -> Tensor:
    """Return latents [B, 16, 1 + (F-1)/4, H/8, W/8] of a video [B, 3, F, H, W].

    The video is floating point, F = 4k + 1, H and W multiples of 8. The latents have its
    dtype and device. Raise ``ValueError`` for other shapes or an integer dtype.
    """
    if video.dim() != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(
            f"video is {tuple(video.shape)} {video.dtype}; expected floating point [B, 3, F, H, W]"
        )
    batch, _, frames, height, width = video.shape
    if frames % TIME_STRIDE != 1:
        raise ValueError(f"video has {frames} frames; expected 4k + 1")
    if height % SPACE_STRIDE or width % SPACE_STRIDE or not height or not width:
        raise ValueError(
            f"video has frames of {height}x{width} pixels; expected multiples of {SPACE_STRIDE}"
        )
    rows, columns = height // SPACE_STRIDE, width // SPACE_STRIDE
    blocks = video.reshape(batch, 3, frames, rows, SPACE_STRIDE, columns, SPACE_STRIDE)
    first, rest = blocks[:, :, :1], blocks[:, :, 1:]
    rest = rest.unflatten(2, (-1, TIME_STRIDE)) if frames > 1 else rest.unsqueeze(3)
    basis, mean, std = _constants(True, video.dtype, video.device)
    z = torch.einsum("kctyx,bcthywx->bkhw", basis, first).unsqueeze(2)
    latents = [(z - mean) / std]
    if frames > 1:
        basis, mean, std = _constants(False, video.dtype, video.device)
        z = torch.einsum("kctyx,bcgthywx->bkghw", basis, rest)
        latents.append((z - mean) / std)
    return torch.cat(latents, 2)


def decode(latents: Tensor) -> Tensor:
    """Return a video [B, 3, 1 + 4(T-1), 8h, 8w] of latents [B, 16, T, h, w]; it is not clipped.

    Raise ``ValueError`` for other shapes or an integer dtype.
    """
    shaped = latents.dim() == 5 and latents.shape[1] == CHANNELS and 0 not in latents.shape
    if not shaped or not latents.is_floating_point():
        raise ValueError(
            f"latents is {tuple(latents.shape)} {latents.dtype}; "
            f"expected floating point [B, {CHANNELS}, T, h, w]"
        )
    basis, mean, std = _constants(True, latents.dtype, latents.device)
    z = (latents[:, :, :1] * std + mean).squeeze(2)
    video = [torch.einsum("kctyx,bkhw->bcthywx", basis, z).flatten(5, 6).flatten(3, 4)]
    if latents.shape[2] > 1:
        basis, mean, std = _constants(False, latents.dtype, latents.device)
        z = latents[:, :, 1:] * std + mean
        blocks = torch.einsum("kctyx,bkghw->bcgthywx", basis, z)
        video.append(blocks.flatten(6, 7).flatten(4, 5).flatten(2, 3))
    return torch.cat(video, 2)


@lru_cache(maxsize=16)
def _constants(
    first: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the basis [16, 3, frames, 8, 8], and coefficients' mean and std [16, 1, 1, 1]."""
    color = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    color = color / color.norm(dim=1, keepdim=True)
    time, space = _cosines(1 if first else TIME_STRIDE), _cosines(SPACE_STRIDE)
    terms = FIRST_TERMS if first else GROUP_TERMS
    factors = [(color[c], time[t], space[y], space[x]) for t, y, x, c in terms]
    basis = torch.stack([torch.einsum("c,t,y,x->ctyx", *each) for each in factors])
    mean, std = (FIRST_MEAN, FIRST_STD) if first else (GROUP_MEAN, GROUP_STD)
    shape = (CHANNELS, 1, 1, 1)
    as_tensor = [torch.tensor(v, dtype=torch.float64).view(shape) for v in (mean, std)]
    basis, mean, std = (v.to(device=device, dtype=dtype) for v in (basis, *as_tensor))
    return basis, mean, std


def _cosines(length: int) -> Tensor:
    """Return the orthonormal DCT-II matrix [length, length], rows by frequency."""
    k = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi / length * k[:, None] * (k[None] + 0.5)) * math.sqrt(2 / length)
    matrix[0] = math.sqrt(1 / length)
    return matrix
