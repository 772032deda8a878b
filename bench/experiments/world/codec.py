"""Encode videos by a fixed linear space-time codec, 4x16x16, that replaces a video VAE.

A clip of 1 + 4k frames becomes 1 + k latent frames: the first frame alone, then groups of four, as
in a causal video VAE. Each 16x16 patch of the first frame, and each 4x16x16 block of a group, is
projected on 24 products of cosines (orthonormal DCT-II over time, rows and columns) of its
brightness, the mean of red, green and blue: decoded clips are gray. The terms are those with the
largest variance in the world's clips, after a factor of two for each temporal frequency: motion is
small in the pixels, and the motion metric needs it. With 24 terms real clips without a defect keep
a metric of 0.98; with 16 terms it is 0.92.

Coefficients are shifted and scaled to about zero mean and unit variance with constants measured on
the world's clips. The basis is orthonormal, so decode(encode(x)) is the orthogonal projection of x
on the retained subspace, and encode(decode(z)) = z. Both maps are affine and differentiable.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

CHANNELS = 24
TIME_STRIDE = 4
SPACE_STRIDE = 16
GRAY = 3**-0.5  # each color in the unit vector of brightness

# (temporal, row, column frequency) of each latent channel.
GROUP_TERMS = (
    (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 2), (0, 1, 1), (0, 2, 0), (0, 1, 2), (0, 2, 1),
    (0, 2, 2), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 0, 2), (1, 1, 1), (1, 2, 0), (1, 0, 3),
    (1, 1, 2), (1, 2, 1), (2, 0, 0), (2, 0, 1), (2, 1, 0), (2, 1, 1), (2, 2, 0), (3, 1, 0),
)  # fmt: skip
FIRST_TERMS = (
    (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 0, 2), (0, 1, 1), (0, 2, 0), (0, 0, 3), (0, 1, 2),
    (0, 2, 1), (0, 3, 0), (0, 0, 4), (0, 1, 3), (0, 2, 2), (0, 3, 1), (0, 4, 0), (0, 0, 5),
    (0, 1, 4), (0, 2, 3), (0, 3, 2), (0, 4, 1), (0, 5, 0), (0, 2, 4), (0, 3, 3), (0, 4, 2),
)  # fmt: skip
FIRST_MEAN = (
    -18.1, 0.0, -1.38, -0.44, 0.0, 0.14, 0.0, 0.06, 0.0, 0.88, -0.08, 0.0,
    0.0, 0.0, 0.06, 0.0, 0.06, 0.0, -0.05, 0.0, 0.17, 0.0, 0.0, 0.0,
)  # fmt: skip
FIRST_STD = (
    6.8, 5.36, 6.0, 3.5, 3.7, 3.35, 1.42, 2.45, 2.06, 1.36, 1.08, 1.17,
    1.49, 1.15, 1.04, 0.77, 1.0, 0.94, 1.1, 0.84, 0.79, 0.8, 0.88, 0.86,
)  # fmt: skip
GROUP_MEAN = (
    -36.23, 0.0, 1.58, -0.82, 0.0, -0.93, -0.08, 0.0, 0.07, 0.0, 0.0, -0.18,
    0.0, 0.0, 0.32, 0.0, 0.0, 0.0, 0.0, 0.0, -0.03, 0.0, -0.03, -0.03,
)  # fmt: skip
GROUP_STD = (
    13.51, 10.2, 9.89, 6.41, 5.84, 6.13, 3.63, 3.63, 2.42, 4.33, 3.95, 4.09,
    3.04, 2.92, 2.95, 1.72, 2.12, 1.97, 1.6, 1.75, 2.14, 1.59, 1.43, 1.3,
)  # fmt: skip


def encode(video: Tensor) -> Tensor:
    """Return latents [B, 24, 1 + (F-1)/4, H/16, W/16] of a video [B, 3, F, H, W].

    The video is floating point, F = 4k + 1, H and W multiples of 16. The latents have its
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
    gray = video.sum(1) * GRAY
    blocks = gray.reshape(batch, frames, rows, SPACE_STRIDE, columns, SPACE_STRIDE)
    latents = []
    for first, part in ((True, blocks[:, :1]), (False, blocks[:, 1:])):
        basis, mean, std = _constants(first, video.dtype, video.device)
        groups = part.unflatten(1, (part.shape[1] // basis.shape[1], basis.shape[1]))
        # One product for all blocks: [B, T, h, w, frames·16·16] times [frames·16·16, 24].
        z = groups.permute(0, 1, 3, 5, 2, 4, 6).flatten(4) @ basis.flatten(1).T
        latents.append((z.permute(0, 4, 1, 2, 3) - mean) / std)
    return torch.cat(latents, 2)


def decode(latents: Tensor) -> Tensor:
    """Return a gray video [B, 3, 1 + 4(T-1), 16h, 16w] of latents [B, 24, T, h, w], not clipped.

    Raise ``ValueError`` for other shapes or an integer dtype.
    """
    shaped = latents.dim() == 5 and latents.shape[1] == CHANNELS and 0 not in latents.shape
    if not shaped or not latents.is_floating_point():
        raise ValueError(
            f"latents is {tuple(latents.shape)} {latents.dtype}; "
            f"expected floating point [B, {CHANNELS}, T, h, w]"
        )
    frames = []
    for first, part in ((True, latents[:, :, :1]), (False, latents[:, :, 1:])):
        basis, mean, std = _constants(first, latents.dtype, latents.device)
        blocks = (part * std + mean).permute(0, 2, 3, 4, 1) @ basis.flatten(1)
        blocks = blocks.unflatten(4, basis.shape[1:]).permute(0, 1, 4, 2, 5, 3, 6)
        frames.append(blocks.flatten(5, 6).flatten(3, 4).flatten(1, 2))
    gray = torch.cat(frames, 1).unsqueeze(1) * GRAY
    return gray.repeat(1, 3, 1, 1, 1)


@lru_cache(maxsize=16)
def _constants(
    first: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the basis [24, frames, 16, 16], and coefficients' mean and std [24, 1, 1, 1]."""
    time, space = _cosines(1 if first else TIME_STRIDE), _cosines(SPACE_STRIDE)
    terms = FIRST_TERMS if first else GROUP_TERMS
    factors = [(time[t], space[y], space[x]) for t, y, x in terms]
    basis = torch.stack([torch.einsum("t,y,x->tyx", *each) for each in factors])
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
