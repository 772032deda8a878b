"""Sample latents by a diffusers pipeline itself, from the same noise as the rollout engine."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from prfl_fast.data.codec import MAX_TOKENS
from prfl_fast.data.families import Family, call_options, guidance_options, load_pipeline
from prfl_fast.data.prompts import Prompt
from prfl_fast.data.video import read_clip, to_uint8
from prfl_fast.models.conditions import takes_guidance
from prfl_fast.models.experts import Experts
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.utils.checks import reason_of, torch_seed
from prfl_fast.utils.optional import need


class WanPipelineSampler:
    """Run Wan's pipeline of diffusers: its prompt encoding, guidance, loop and forward.

    The solver is :class:`FlowUniPC` in place of the pipeline's own, so that the result differs from
    that of the rollout engine by rounding only.

    Args:
        folder: of the pipeline.
        transformer: the generator, not patched.
        shift: timestep shift of the noise schedule.
        images: True if the prompts have images.
        device: device of the pipeline; a GPU holds one part at a time.
        dtype: of the text and image encoders.

    Raises:
        ValueError: if a part of the pipeline cannot be loaded.
        MissingExtraError: if diffusers is not installed.
    """

    def __init__(
        self,
        folder: Path,
        transformer: nn.Module,
        shift: float,
        *,
        images: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        diffusers = need("diffusers")
        need("diffusers.utils.logging").disable_progress_bar()
        kind = diffusers.WanImageToVideoPipeline if images else diffusers.WanPipeline
        parts = {"transformer": transformer}
        if isinstance(transformer, Experts):
            parts = {"transformer": transformer.high, "transformer_2": transformer.low}
        dtypes = {"vae": torch.float32, "default": dtype}
        try:
            pipe = kind.from_pretrained(folder, torch_dtype=dtypes, local_files_only=True, **parts)
        except Exception as error:  # its readers raise errors of any type
            reason = reason_of(error)
            raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {reason}") from error
        scheduler: Any = FlowUniPC(shift, integer_timesteps=True)
        scheduler.config = SimpleNamespace(num_train_timesteps=1000)  # for the experts' boundary
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        if device.type == "cuda":
            pipe.enable_model_cpu_offload(device=device)
        self._pipe = pipe

    @torch.no_grad()
    @exact_linears()
    def __call__(
        self,
        prompt: Prompt,
        negative: str,
        noise: torch.Tensor,
        frames: int,
        size: tuple[int, int],
        num_inference_steps: int,
        guidance_scale: float | tuple[float, ...],
        tick: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        """Return the normalized latents ``[1, C, F, H, W]`` of a video.

        Args:
            prompt: its text and images, which are scaled and cropped to ``size``.
            negative: negative prompt of guidance.
            noise: ε, ``[1, C, F, H, W]``.
            frames, size: of the video, size as height and width in pixels.
            num_inference_steps: solver steps.
            guidance_scale: one, or those of the experts ``high`` and ``low``.
            tick: called after every step.
        """

        def on_step(*arguments: Any) -> dict[str, Any]:
            tick()
            return {}

        options: dict[str, Any] = {}
        make = need("PIL.Image", "video").fromarray
        for name in ("image", "last_image"):
            path = getattr(prompt, name)
            if path is not None:
                options[name] = make(to_uint8(read_clip(path, 1, size))[0].numpy())
        if isinstance(guidance_scale, tuple):
            options["guidance_scale_2"] = guidance_scale[1]
            guidance_scale = guidance_scale[0]
        found: torch.Tensor = self._pipe(
            prompt=prompt.text,
            negative_prompt=negative,
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            latents=noise,
            output_type="latent",
            max_sequence_length=MAX_TOKENS,
            callback_on_step_end=on_step,
            **options,
        ).frames
        return found


class FamilyPipelineSampler:
    """Run the pipeline of another family than Wan: its encoding, guidance, scheduler and forward.

    Args:
        folder: of the pipeline.
        transformer: the generator, not patched.
        family: see :func:`prfl_fast.data.families.find_family`.
        fps: frames per second, a condition of LTX.
        device: device of the pipeline; a GPU holds one part at a time.
        dtype: of the text encoders.

    Raises:
        ValueError: if a part of the pipeline cannot be loaded.
        MissingExtraError: if diffusers or transformers is not installed.
    """

    def __init__(
        self,
        folder: Path,
        transformer: nn.Module,
        family: Family,
        fps: float,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        pipe = self.pipe = load_pipeline(folder, family, dtype, transformer)
        if device.type == "cuda":
            pipe.enable_model_cpu_offload(device=device)
        self._family, self._options = family, call_options(pipe, family, fps)
        self._embedded = takes_guidance(transformer)

    @torch.no_grad()
    @exact_linears()
    def __call__(
        self,
        prompt: Prompt,
        negative: str,
        noise: torch.Tensor,
        frames: int,
        size: tuple[int, int],
        num_inference_steps: int,
        guidance_scale: float,
        tick: Callable[[], object] = lambda: None,
    ) -> torch.Tensor:
        """Return the normalized latents of a video; see :class:`WanPipelineSampler`."""
        options, layout = dict(self._options), self._family.layout
        if not self._embedded:
            options["negative_prompt"] = negative
        if self._family.guidance == "guider":
            self.pipe.guider = self.pipe.guider.new(guidance_scale=guidance_scale)
        elif self._family.guidance == "true_cfg_scale" and not self._embedded:
            options["true_cfg_scale"] = guidance_scale
        else:
            options |= guidance_options(self.pipe, guidance_scale)
        # LTX-2 draws noise for its audio; this seed makes it depend on the video's noise only.
        seed = int(noise.flatten()[0].view(torch.int32))
        options["generator"] = torch.Generator().manual_seed(torch_seed(seed))
        given = to_layout(noise, layout)
        last: list[torch.Tensor] = []
        if layout == "frames":  # CogVideoX alone does not cast its noise
            given = given.to(self.pipe.transformer.dtype)

        def on_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            last[:] = [tensors["latents"]]
            tick()
            return {}

        calls = "callback_on_step_end" in inspect.signature(self.pipe.__call__).parameters
        if calls:
            options["callback_on_step_end"] = on_step
        found = self.pipe(
            prompt=prompt.text,
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=num_inference_steps,
            latents=given,
            **options,
        ).frames
        if not calls:
            for _ in range(num_inference_steps):
                tick()
        # Take the latents of the last step, because LTX-2 returns latents that are not normalized.
        return from_layout(last[0] if last else found, layout, noise)


def to_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Return latents ``[B, C, F, H, W]`` in a layout of :class:`Family`."""
    if layout == "tokens":
        return x.flatten(2).transpose(1, 2)
    return x.transpose(1, 2) if layout == "frames" else x


def from_layout(found: torch.Tensor, layout: str, like: torch.Tensor) -> torch.Tensor:
    """Return latents of a layout as ``[B, C, F, H, W]``, the shape of ``like``, in float32."""
    if layout == "video":
        return found.float()
    found = found.transpose(1, 2).float()
    return found.reshape(like.shape) if layout == "tokens" else found
