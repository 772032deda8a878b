"""What is trained, on videos of what size: the input of the planner and of the simulation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prfl_fast.config import Lora
from prfl_fast.modules import TEXT_TOKENS

# Wan's VAE (8 pixels, 4 frames but for the first) and the transformer's patches.
_VAE_STRIDE, _VAE_FRAMES, LATENT_CHANNELS, IMAGE_TOKENS = 8, 4, 16, 257


@dataclass(frozen=True)
class Workload:
    """What is trained, on what sizes.

    Attributes:
        config: of a diffusers Wan transformer, as ``adapter.backbone_config`` gives it.
        frames, height, width: of the videos, in pixels; frames is one more than a multiple of 4.
        batch: samples of a forward. text_tokens: rows of the text states.
        train: ``lora``, or ``full`` for all parameters. lora_rank, lora_targets: as ``add_lora``.
        reward_blocks: of the generator's, in the frozen reward model.
        sft: the supervised step is part of a step.
        num_steps: solver steps of the schedule.
        points: gradient points of a trajectory. accumulation: micro-batches of an optimizer step.
            More than one of either, and gradients are there while the next forward runs.
        average: a float32 running average of what is trained is on the device (``ema_decay``).
        patched: both models run on prfl_fast's kernels.
        precision: under which float32 weights run: autocast to ``bf16``, or ``fp32``.

    Raises:
        ValueError: names the argument, what came, and what is expected.
    """

    config: Mapping[str, Any]
    frames: int = 81
    height: int = 720
    width: int = 1280
    batch: int = 1
    text_tokens: int = 512
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = Lora(1).targets
    reward_blocks: int = 8
    sft: bool = True
    num_steps: int = 40
    points: int = 1
    accumulation: int = 1
    average: bool = False
    patched: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        least = {"num_steps": 2}
        for name in (
            "frames",
            "height",
            "width",
            "batch",
            "text_tokens",
            "lora_rank",
            "reward_blocks",
            "num_steps",
            "points",
            "accumulation",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 1):
                raise ValueError(
                    f"{name} is {value!r}, expected a whole number, at least {least.get(name, 1)}"
                )
        if self.frames % _VAE_FRAMES != 1:
            raise ValueError(f"frames is {self.frames}, expected 4n + 1, as 81")
        for name, patch_size in zip(("height", "width"), self._patch[1:], strict=True):
            multiple = _VAE_STRIDE * patch_size
            if getattr(self, name) % multiple:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a multiple of {multiple}"
                )
        longest = self.config.get("rope_max_seq_len", 1024)
        for name, size, patch_size in zip(
            ("frames", "height", "width"), self.latent_shape[2:], self._patch, strict=True
        ):
            if size // patch_size > longest:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: {size // patch_size} positions, expected at "
                    f"most {longest} (the model's rope_max_seq_len)"
                )
        for name, known in (("train", ("lora", "full")), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        if self.reward_blocks > self.config["num_layers"]:
            raise ValueError(
                f"reward_blocks is {self.reward_blocks}, expected at most the model's "
                f"{self.config['num_layers']}"
            )
        if self.points > self.num_steps - 1:
            raise ValueError(
                f"points is {self.points}, expected at most num_steps - 1 = {self.num_steps - 1}"
            )
        if self.config.get("image_dim") is not None and self.text_tokens != TEXT_TOKENS:
            raise ValueError(
                f"text_tokens is {self.text_tokens}, expected {TEXT_TOKENS}: this is an "
                "image-to-video model"
            )

    @property
    def _patch(self) -> tuple[int, int, int]:
        frames, height, width = self.config.get("patch_size", (1, 2, 2))
        return frames, height, width

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """``[B, C, F, H, W]`` of the latents."""
        return (
            self.batch,
            LATENT_CHANNELS,
            (self.frames - 1) // _VAE_FRAMES + 1,
            self.height // _VAE_STRIDE,
            self.width // _VAE_STRIDE,
        )

    @property
    def tokens(self) -> int:
        """L, of one sample."""
        return math.prod(self.latent_shape[2:]) // math.prod(self._patch)
