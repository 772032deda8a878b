"""Encode and decode videos by the autoencoders of other families than Wan."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_fast.data.codec_base import Codec
from prfl_fast.memory.ledger import Ledger
from prfl_fast.utils.checks import check

# Peak with the workspace of convolutions over that of the live tensors, as for Wan's autoencoder.
_WORKSPACE = 1.25


class FamilyCodec(Codec):
    """Encode and decode by an autoencoder of diffusers, normalized as its pipeline does.

    Latents are ``(z - mean) · scaling_factor / std``; an autoencoder without mean and std has 0
    and 1. If LTX's decoder takes a timestep, it gets 0, the default of the pipeline.

    Args:
        vae: see :class:`Codec`.
        patch: see :class:`Codec`.
        budget: see :class:`Codec`. A larger video is cut into overlapping tiles of all its frames,
            which changes values near their borders. The memory of a call is counted with fake
            tensors, which takes seconds.
    """

    def __init__(
        self, vae: Any, patch: tuple[int, int, int] = (1, 1, 1), budget: int | None = None
    ) -> None:
        super().__init__(vae, budget)
        config = vae.config
        self.channels, self.patch = config.latent_channels, patch
        # CogVideoX has neither attribute, and only the first in its configuration.
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
        # CogVideoX decodes two latents to eight frames, and one more to a single frame at first.
        self.group = 2 if type(vae).__name__ == "AutoencoderKLCogVideoX" else 1
        self._peaks: dict[tuple[str, tuple[int, ...]], int] = {}

    def _statistic(self, name: str, default: float) -> torch.Tensor:
        """Return a statistic of the latents, ``[1, C, 1, 1, 1]``."""
        value = self.vae._buffers.get(name)  # LTX's are buffers
        value = self.vae.config.get(name) if value is None else value
        value = [default] * self.channels if value is None else value
        found = torch.as_tensor(value, dtype=torch.float32, device=self.device)
        return found.view(1, -1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Return the normalized latents of a video, from the mode of the posterior.

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
        self._set_tiles("decode", tuple(z.shape), self._pixels(z.shape))
        yield self._decode(z).clamp_(-1.0, 1.0)

    def _decode(self, z: torch.Tensor) -> torch.Tensor:
        times = []
        if self.vae.config.get("timestep_conditioning"):
            times = [torch.zeros(len(z), dtype=z.dtype, device=z.device)]
        video: torch.Tensor = self.vae.decode(z, *times, return_dict=False)[0]
        return video

    def _pixels(self, latents: torch.Size) -> tuple[int, ...]:
        """Return the shape of the video of latents."""
        (batch, _, frames, *sides), (time, stride, _) = latents, self.strides
        return batch, 3, (frames - 1) * time + 1, *(side * stride for side in sides)

    def set_encoder_tiles(self, shape: tuple[int, ...]) -> None:
        """Choose the tiles in which a video is encoded; see :class:`Codec`."""
        self._set_tiles("encode", shape, shape)

    def _set_tiles(self, name: str, given: tuple[int, ...], video: tuple[int, ...]) -> None:
        """Choose the largest tiles in which a call fits the budget.

        Args:
            name: the call, ``encode`` or ``decode``.
            given: shape of the argument of the call.
            video: shape of the video.

        Raises:
            ValueError: if not even a tile fits.
        """
        self.vae.use_tiling = False
        if self.budget is None:
            return
        call: Callable[..., Any] = self.vae.encode if name == "encode" else self._decode
        if (name, given) not in self._peaks:
            with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
                call(torch.empty(given, dtype=self.vae.dtype, device=self.device))
            self._peaks[name, given] = round(_WORKSPACE * ledger.peak)
        peak = self._peaks[name, given]
        if peak <= self.budget:
            return
        batch, _, frames, height, width = video
        size = next(self.vae.parameters()).element_size()
        # The tiles, and the video that they are blended into.
        rest = self.budget - 3 * batch * 3 * frames * height * width * size
        per_pixel, step = peak / (height * width), 4 * self.strides[1]
        side = int((max(rest, 0) / per_pixel) ** 0.5) // step * step
        least = self.budget - rest + per_pixel * step**2
        expected = f"at least {least / 2**30:.2g} GiB for {frames} x {height} x {width} in tiles"
        check(side > 0, "budget beside the weights", f"{self.budget / 2**30:.2g} GiB", expected)
        tiles: dict[str, float] = {f"tile_sample_min_{name}": side for name in ("height", "width")}
        tiles |= {f"tile_sample_stride_{name}": side * 3 // 4 for name in ("height", "width")}
        # CogVideoX takes shares of overlap instead of strides. HunyuanVideo-1.5 overlaps a quarter.
        tiles |= {f"tile_overlap_factor_{name}": 0.25 for name in ("height", "width")}
        known = inspect.signature(self.vae.enable_tiling).parameters
        self.vae.enable_tiling(**{name: n for name, n in tiles.items() if name in known})
        if hasattr(self.vae, "tile_latent_min_height"):  # HunyuanVideo-1.5 does not update them
            self.vae.tile_latent_min_height = side // self.strides[1]
            self.vae.tile_latent_min_width = side // self.strides[1]
