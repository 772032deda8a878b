"""Base class of codecs: the sizes of videos and latents, and the checks of both."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch

from prfl_fast.utils.checks import check, is_count


class Codec(ABC):
    """Encode videos to normalized latents, and decode them, by the autoencoder of a pipeline.

    Attributes:
        vae: the autoencoder of diffusers, frozen and in eval mode.
        budget: bytes of device memory that a call may use beside the weights; None is unlimited.
        channels: of the latents.
        strides: pixels per latent in time, height and width.
        patch: latents per token of the transformer in time, height and width.
        group: latent frames that are decoded together, after the first one.
        is_ti2v: True for the autoencoder of Wan2.2 TI2V.
    """

    channels: int
    strides: tuple[int, int, int]
    patch: tuple[int, int, int]
    group = 1
    is_ti2v = False

    def __init__(self, vae: Any, budget: int | None = None) -> None:
        self.vae, self.budget = vae.eval().requires_grad_(False), budget
        self.device = next(vae.parameters()).device

    def limit(self, total: int) -> None:
        """Set the budget to the part of ``total`` bytes of device memory beside the weights."""
        weights = sum(parameter.nbytes for parameter in self.vae.parameters())
        self.budget = max(0, total - weights)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape ``(C, F, H, W)`` of the latents of a video.

        Raises:
            ValueError: if ``frames`` is not a multiple of the stride in time plus 1, or the latents
                are not a whole number of patches and groups. Wan takes 4n + 1 frames, and sides
                that are multiples of 16 (TI2V: 32).
        """
        time, *spatial = self.strides
        step = time * max(self.patch[0], self.group)
        first = time * (self.patch[0] - 1) + 1
        ok, expected = is_count(frames) and frames % step == first % step, f"{step}n + {first}"
        check(ok, "frames", frames, f"{expected}, such as {80 // step * step + first}")
        sides = zip(("height", "width"), (height, width), spatial, self.patch[1:], strict=True)
        for name, value, stride, patch in sides:
            ok = is_count(value) and value % (stride * patch) == 0
            expected = f"a multiple of {stride * patch}, the stride {stride} x patch {patch}"
            check(ok, name, value, expected)
        h, w = (side // stride for side, stride in zip((height, width), spatial, strict=True))
        return self.channels, (frames - 1) // time + 1, h, w

    def check_video(self, video: torch.Tensor) -> None:
        """Raise ``ValueError`` unless a video is ``[B, 3, F, H, W]`` of a size that fits."""
        ok = video.ndim == 5 and video.shape[1] == 3 and video.is_floating_point()
        check(ok, "video", video, "a floating-point [B, 3, F, H, W]")
        self.latent_shape(*video.shape[2:])

    def check_latents(self, latents: torch.Tensor) -> None:
        """Raise ``ValueError`` unless latents are ``[B, C, F, H, W]``."""
        ok = latents.ndim == 5 and latents.shape[1] == self.channels
        check(ok, "latents", latents, f"[B, {self.channels}, F, H, W]")

    @abstractmethod
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Return the normalized latents ``[B, C, F, H, W]`` of a video ``[B, 3, F, H, W]``."""

    @abstractmethod
    def decode_parts(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the parts ``[B, 3, F, H, W]`` of :meth:`decode`."""

    @abstractmethod
    def set_encoder_tiles(self, shape: tuple[int, ...]) -> None:
        """Choose the tiles in which a video ``(B, 3, F, H, W)`` is encoded within the budget.

        Raises:
            ValueError: if not even a tile fits.
        """

    def image_condition(
        self, first: torch.Tensor, frames: int, last: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the conditions of given frames by name, without batch dimension.

        Raise ``ValueError`` for other families than Wan.
        """
        name = type(self.vae).__name__
        raise ValueError(f"{name} takes no given frames, expected AutoencoderKLWan")

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the video of normalized latents.

        Args:
            latents: ``[B, C, F, H, W]``.

        Returns:
            ``[B, 3, F, H, W]`` in [-1, 1], on the codec's device in the autoencoder's dtype.

        Raises:
            ValueError: for another shape, or if not even a tile fits the budget.
        """
        return torch.cat(list(self.decode_parts(latents)), 2)
