"""Encode videos, prompts and images as Wan's pipelines do: autoencoder, umT5 and CLIP.

Each part is frozen, in eval mode, and loaded alone: from the folder of a diffusers pipeline, from
that of official Wan, or from one of its files (:mod:`prfl_fast.data.codec_files`).
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from prfl_fast.data import codec_files
from prfl_fast.data.codec_base import Codec
from prfl_fast.data.codec_files import Device
from prfl_fast.data.families import FamilyPrompts, find_family
from prfl_fast.data.family_codec import FamilyCodec
from prfl_fast.data.video import to_uint8
from prfl_fast.models.adapter import FIRST_FRAME, Conditions
from prfl_fast.models.conditions import LATENT, TEXT
from prfl_fast.models.loading import transformer_class
from prfl_fast.models.registry import adapter_by_name
from prfl_fast.utils.checks import check
from prfl_fast.utils.optional import need

MAX_TOKENS = 512
# Peak bytes of a step of the autoencoder over those of an activation at full size. Live tensors
# have 9.2 to 13.2 of them (Wan2.1) and 11.5 to 21.1 (Wan2.2), counted with fake tensors at 480p and
# 704p; a quarter more is for workspaces of convolutions.
_PEAK = {"Wan2.1": 17, "Wan2.2": 27}


class VideoCodec(Codec):
    """Encode videos to normalized latents, and decode them, by Wan's autoencoder.

    Its strides are ``(4, 8, 8)``, or ``(4, 16, 16)`` for Wan2.2 TI2V.

    Args:
        vae: an ``AutoencoderKLWan``.
        budget: bytes of device memory that a call may use beside the weights. A larger video is
            cut into overlapping tiles, which changes values near their borders. None never tiles.
    """

    patch = (1, 2, 2)  # of all Wan transformers

    def __init__(self, vae: Any, budget: int | None = None) -> None:
        super().__init__(vae, budget)
        config = vae.config
        self.channels: int = config.z_dim
        self.is_ti2v = self.channels == 48
        spatial = config.scale_factor_spatial
        self.strides: tuple[int, int, int] = (config.scale_factor_temporal, spatial, spatial)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        self._mean, self._std = mean, std

    @torch.no_grad()
    def encode(self, video: torch.Tensor) -> torch.Tensor:
        """Return the normalized latents of a video: the posterior's mode, ``(z - mean) / std``.

        Args:
            video: ``[B, 3, F, H, W]`` in [-1, 1]; F is 4n + 1.

        Returns:
            float32 ``[B, C, (F - 1) / 4 + 1, H / stride, W / stride]`` on the codec's device.

        Raises:
            ValueError: for another shape, or if not even a tile fits the budget.
        """
        self.check_video(video)
        video = video.to(self._mean.device, self.vae.dtype)
        self.set_encoder_tiles(video.shape)
        mode = self.vae.encode(video).latent_dist.mode()
        return (mode.float() - self._mean) / self._std

    @torch.no_grad()
    def decode_parts(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the parts ``[B, 3, 1 or 4, H, W]`` of :meth:`decode`, one latent frame at a time.

        Memory does not depend on the number of frames, unless the budget asks for tiles: then the
        first part is decoded with all others.
        """
        self.check_latents(latents)
        z = latents.to(self._mean.device, torch.float32) * self._std + self._mean
        z = z.to(self.vae.dtype)
        time, stride, _ = self.strides
        config = self.vae.config
        shape = (z.shape[0], 3, time * (z.shape[2] - 1) + 1, *(n * stride for n in z.shape[3:]))
        channels = config.decoder_base_dim or config.base_dim
        if self._set_tiles(shape, channels, 1):
            video = self.vae.decode(z, return_dict=False)[0]
            yield from video.split([1] + [time] * (z.shape[2] - 1), 2)
            return
        # As AutoencoderKLWan._decode, which keeps all frames and copies them for each new one.
        self.vae.clear_cache()
        cache = self.vae._feat_map
        x = self.vae.post_quant_conv(z)
        for i in range(z.shape[2]):
            out = self.vae.decoder(
                x[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0
            )
            if config.patch_size is not None:
                out = need("diffusers.models.autoencoders.autoencoder_kl_wan").unpatchify(
                    out, patch_size=config.patch_size
                )
            yield out.clamp_(-1.0, 1.0)
        self.vae.clear_cache()

    def set_encoder_tiles(self, shape: tuple[int, ...]) -> None:
        """Choose the tiles in which a video ``(B, 3, F, H, W)`` is encoded within the budget.

        Raises:
            ValueError: if not even a tile fits.
        """
        self._set_tiles(shape, self.vae.config.base_dim, self.vae.config.patch_size or 1)

    def _set_tiles(self, shape: tuple[int, ...], channels: int, unit: int) -> bool:
        """Choose the largest tiles that fit the budget; return False if a whole frame fits.

        Args:
            shape: of the video, ``(B, 3, F, H, W)``.
            channels: of the autoencoder's activations at full size.
            unit: divides the tile, which diffusers counts in patches for its encoder.
        """
        self.vae.use_tiling = False
        if self.budget is None:
            return False
        batch, _, frames, height, width = shape
        time, stride, _ = self.strides
        size = next(self.vae.parameters()).element_size()
        patch = self.vae.config.patch_size or 1
        peak = _PEAK["Wan2.2" if self.vae.config.is_residual else "Wan2.1"]
        per_pixel = peak * batch * time * channels * size / patch**2
        if per_pixel * height * width <= self.budget:
            return False
        version = need("diffusers").__version__
        # Older ones do not cut the tiles of this autoencoder into its patches of pixels.
        ok = patch == 1 or tuple(map(int, version.split(".")[:2])) >= (0, 36)
        check(ok, "diffusers", version, "0.36 or newer, to tile Wan2.2's autoencoder in a budget")
        step = 4 * stride  # a quarter of a tile overlaps
        # The tiles, and the video that they are blended into.
        rest = self.budget - 3 * batch * 3 * frames * height * width * size
        side = int((max(rest, 0) / per_pixel) ** 0.5) // step * step
        least = self.budget - rest + per_pixel * step**2
        expected = f"at least {least / 2**30:.2g} GiB for {frames} x {height} x {width} in tiles"
        check(side > 0, "budget beside the weights", f"{self.budget / 2**30:.2g} GiB", expected)
        tile, move = side // unit, side * 3 // 4 // unit
        self.vae.enable_tiling(tile, tile, move, move)
        return True

    def latent_condition(
        self, first: torch.Tensor, frames: int, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the condition of image-to-video models: a mask and the latents of given frames.

        Args:
            first: first frame ``[B, 3, H, W]`` in [-1, 1].
            frames: frames of the video, 4n + 1.
            last: last frame, for first-last-frame models.

        Returns:
            float32 ``[B, 4 + C, F, H, W]``: channels 0 to 3 are 1 for the four frames of a latent
            that are given, the others are latents of the video with zeros for frames to generate.
        """
        last = None if last is None else last[:, :, None].to(first)
        zeros = first.new_zeros(*first.shape[:2], frames - 1 - (last is not None), *first.shape[2:])
        given = [first[:, :, None], zeros, *([] if last is None else [last])]
        latents = self.encode(torch.cat(given, 2))
        time = self.strides[0]
        mask = torch.zeros_like(latents[:, :1]).repeat(1, time, 1, 1, 1)
        mask[:, :, 0] = 1  # the first frame stands for all four of its latent
        if last is not None:
            mask[:, -1, -1] = 1
        return torch.cat([mask, latents], 1)

    def first_frame(self, image: torch.Tensor) -> torch.Tensor:
        """Return latents ``[B, C, 1, H, W]`` of images ``[B, 3, H, W]``, for Wan2.2 TI2V."""
        return self.encode(image[:, :, None])

    def image_condition(
        self, first: torch.Tensor, frames: int, last: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the condition of given frames by its name, without batch dimension.

        It is ``first_frame`` of :meth:`first_frame` for Wan2.2 TI2V, none for a video of one frame;
        for other models ``latent_condition`` of :meth:`latent_condition`. Frames are ``[3, H, W]``
        in [-1, 1].
        """
        if self.is_ti2v:
            return {FIRST_FRAME: self.first_frame(first[None])[0]} if frames > 1 else {}
        given = (first[None], frames, None if last is None else last[None])
        return {LATENT: self.latent_condition(*given)[0]}


class TextEncoder:
    """Encode prompts to umT5 states, cleaned and tokenized as Wan's pipeline does."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        need("ftfy", "video")  # diffusers skips a step of the cleaning without it
        self._clean = need("diffusers.pipelines.wan.pipeline_wan").prompt_clean

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """Return the states ``[T, D]`` of each prompt without padding, T at most 512.

        Tensors have the dtype and device of the model. A longer prompt is cut.
        """
        check(not isinstance(prompts, str), "prompts", prompts, "a list of strings")
        tokens = self.tokenizer(
            [self._clean(prompt) for prompt in prompts],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.model.device)
        states = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        lengths = tokens.attention_mask.sum(1).tolist()
        return [state[:n].clone() for state, n in zip(states, lengths, strict=True)]

    def conditions(self, prompts: Sequence[str]) -> list[Conditions]:
        """Return the states of each prompt by the name of the condition, on the CPU."""
        return [{TEXT: states.cpu()} for states in self(prompts)]

    def is_cut(self, prompt: str) -> bool:
        """Return True if a prompt has more than 512 tokens."""
        return len(self.tokenizer(self._clean(prompt)).input_ids) > MAX_TOKENS


class ImageEncoder:
    """Encode images to CLIP's penultimate states, as Wan's image-to-video pipeline does."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the states ``[N, D]`` of one image, or ``[2 N, D]`` of the first and last frame.

        Args:
            images: each ``[3, H, W]`` in [-1, 1].
        """
        make = need("PIL.Image", "video").fromarray
        pictures = [make(to_uint8(image[:, None])[0].numpy()) for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.model(pixels, output_hidden_states=True).hidden_states[-2].flatten(0, 1)


def load_codec(
    path: str | os.PathLike[str],
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    budget: int | None = None,
) -> Codec:
    """Load the autoencoder of a pipeline.

    Args:
        path: the folder of a diffusers pipeline of any family, of diffusers' Wan autoencoder, or of
            official Wan; or the file ``Wan2.1_VAE.pth`` or ``Wan2.2_VAE.pth``.
        device: of the weights and of all results.
        dtype: of the weights.
        budget: see :class:`VideoCodec`.

    Raises:
        ValueError: if there is none, or its tensors do not fit.
        MissingExtraError: if diffusers is not installed.
    """
    path = Path(path)
    family = find_family(path)
    vae = codec_files.read_vae(path, dtype, family is not None).to(device)
    if family is None:
        return VideoCodec(vae, budget)
    kind, config = transformer_class(path)
    adapter: Any = adapter_by_name(f"diffusers {kind.__name__}")
    return FamilyCodec(vae, adapter.patch_sizes(config), budget)


def load_prompt_encoder(
    path: str | os.PathLike[str],
    device: Device = "cpu",
    dtype: torch.dtype = torch.float32,
    fps: float | None = None,
) -> TextEncoder | FamilyPrompts:
    """Load the text encoders of a pipeline; ``conditions(prompts)`` of the result encodes prompts.

    Args:
        path: as in :func:`load_text_encoder`, or the folder of a pipeline of another family.
        device, dtype: of the text encoders.
        fps: frames per second, a condition of LTX; None is the default of its pipeline.

    Raises:
        ValueError, MissingExtraError: as :func:`load_codec`.
    """
    family = find_family(Path(path))
    if family is None:
        return load_text_encoder(path, device, dtype)
    return FamilyPrompts(Path(path), family, device, dtype, fps)


def load_text_encoder(
    path: str | os.PathLike[str], device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Load umT5 and its tokenizer.

    ``path`` is the folder of a diffusers pipeline, that of official Wan, or
    ``models_t5_umt5-xxl-enc-bf16.pth`` beside the folder ``google/umt5-xxl`` of its tokenizer.
    Other arguments and errors are those of :func:`load_codec`.
    """
    model, tokenizer = codec_files.read_text_encoder(Path(path), dtype)
    return TextEncoder(model.to(device), tokenizer)


def load_image_encoder(
    path: str | os.PathLike[str], device: Device = "cpu", dtype: torch.dtype = torch.float32
) -> ImageEncoder:
    """Load CLIP's vision model.

    ``path`` is the folder of a diffusers pipeline, that of official Wan, or
    ``models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth``. Other arguments and errors are
    those of :func:`load_codec`.
    """
    model, processor = codec_files.read_image_encoder(Path(path), dtype)
    return ImageEncoder(model.to(device), processor)
