"""Encode and decode videos by the autoencoders of other families than Wan."""

from collections.abc import Iterator
from typing import Any

import torch

from prfl_fast.data.codec_base import Codec


class FamilyCodec(Codec):
    """Encode and decode by an autoencoder of diffusers, normalized as its pipeline does.

    Latents are ``(z - mean) · scaling_factor / std``; autoencoders without mean and std have 0 and
    1. Those of LTX that take a timestep get 0, the default of the pipeline.

    Args:
        vae: see :class:`Codec`.
        patch: see :class:`Codec`.
        budget: see :class:`Codec`.
    """

    def __init__(
        self, vae: Any, patch: tuple[int, int, int] = (1, 1, 1), budget: int | None = None
    ) -> None:
        super().__init__(vae, budget)
        config = vae.config
        self.channels, self.patch = config.latent_channels, patch
        # CogVideoX has no attributes, and one of the two in its configuration.
        time, spatial = (
            vars(vae).get(name, config.get(name))
            for name in ("temporal_compression_ratio", "spatial_compression_ratio")
        )
        spatial = spatial or 2 ** (len(config.block_out_channels) - 1)
        self.strides = (int(time), spatial, spatial)
        self._mean, self._std = (
            self._statistic(name, default)
            for name, default in (("latents_mean", 0.0), ("latents_std", 1.0))
        )
        self._std = self._std / config.scaling_factor

    def _statistic(self, name: str, default: float) -> torch.Tensor:
        """Return a statistic of the latents ``[1, C, 1, 1, 1]``: LTX has buffers."""
        value = self.vae._buffers.get(name)
        value = self.vae.config.get(name) if value is None else value
        value = [default] * self.channels if value is None else value
        found = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return found.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Return the normalized latents of a video: the posterior's mode.

        Args:
            video: ``[B, 3, F, H, W]`` in [-1, 1].

        Returns:
            float32 ``[B, C, F, H, W]`` on the codec's device.

        Raises:
            ValueError: for another shape, or if not even a tile fits the budget.
        """
        self.check_video(video)
        self.set_encoder_tiles(tuple(video.shape))
        mode = self.vae.encode(video.to(self.device, self.vae.dtype)).latent_dist.mode()
        return (mode.float() - self._mean) / self._std

    @torch.no_grad()
    def decode_parts(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the video of :meth:`decode` as one part."""
        self.check_latents(latents)
        z = latents.to(self.device, torch.float32) * self._std + self._mean
        z = z.to(self.vae.dtype)
        times = []
        if self.vae.config.get("timestep_conditioning"):
            times = [torch.zeros(len(z), dtype=z.dtype, device=z.device)]
        yield self.vae.decode(z, *times, return_dict=False)[0].clamp_(-1.0, 1.0)

    def set_encoder_tiles(self, shape: tuple[int, ...]) -> None:
        """Choose the tiles in which a video is encoded; see :class:`Codec`."""
