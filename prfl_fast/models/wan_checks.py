"""Checks of latents, conditions and modules against a diffusers Wan model."""

from typing import Any

import torch

from prfl_fast.models.adapter import FIRST_FRAME, Conditions, check_inputs
from prfl_fast.models.conditions import IMAGE, LATENT, TEXT
from prfl_fast.models.inference import UnsupportedError
from prfl_fast.models.wan_forward import (
    PROCESSORS,
    image_rows,
    replacements,
    text_rows,
    why_not_fused,
)
from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.modules import instance_forward


def check_wan_inputs(base: Any, x: torch.Tensor, conditions: Conditions, name: str = "x") -> None:
    """Raise ``ValueError`` unless the model takes the latents and conditions."""
    config, rows = base.config, image_rows(base)
    if rows is not None:
        conditions = _joined_images(x, conditions, rows)
    check_inputs(name, x, conditions)
    check(TEXT in conditions, "conditions", sorted(conditions), f"a dict with {TEXT!r} [B, T, C]")
    for key, value in conditions.items():
        check_choice("a key of conditions", key, (TEXT, IMAGE, LATENT, FIRST_FRAME))
        ok = value.is_floating_point() and value.device == x.device
        check(ok, f"conditions[{key!r}]", value, f"a floating-point tensor on {x.device}")
    _check_latents(config, x, conditions.get(LATENT))
    _check_tokens(TEXT, conditions[TEXT], config.text_dim, "T")
    text_rows(base, conditions[TEXT])
    image = conditions.get(IMAGE)
    if config.image_dim is None:
        check(image is None, f"conditions[{IMAGE!r}]", image, "none: the model takes no image")
    else:
        hint = "This is an image-to-video model"
        _check_tokens(IMAGE, image, config.image_dim, "N", hint=hint)
        if rows is not None:
            ok = image is not None and image.shape[1] == rows
            hint = "This model takes the tokens of the first and the last frame"
            expected = f"[B, {rows}, {config.image_dim}] or [2B, {rows // 2}, {config.image_dim}]"
            check(ok, f"conditions[{IMAGE!r}]", image, expected, hint=hint)


def _joined_images(x: Any, conditions: Any, rows: int) -> Any:
    """Return conditions with image tokens ``[2B, N, C]`` of two images as ``[B, 2N, C]``."""
    image = conditions.get(IMAGE) if isinstance(conditions, dict) else None
    if not (isinstance(image, torch.Tensor) and isinstance(x, torch.Tensor) and x.ndim > 0):
        return conditions
    if image.ndim != 3 or image.shape[:2] != (2 * len(x), rows // 2):
        return conditions
    return {**conditions, IMAGE: image.reshape(len(x), rows, -1)}


def _check_tokens(
    key: str, tokens: torch.Tensor | None, dim: int, count: str, hint: str = ""
) -> None:
    ok = tokens is not None and tokens.ndim == 3 and tokens.shape[-1] == dim
    check(ok, f"conditions[{key!r}]", tokens, f"[B, {count}, {dim}]", hint=hint)


def _check_latents(config: Any, x: torch.Tensor, extra: torch.Tensor | None) -> None:
    channels, size = x.shape[1], list(x.shape[2:])
    came = f"{channels} of x"
    if extra is not None:
        ok = extra.ndim == 5 and extra.shape[2:] == x.shape[2:]
        check(ok, f"conditions[{LATENT!r}]", extra, f"[B, C, *{size}]")
        channels += extra.shape[1]
        came += f" and {extra.shape[1]} of {LATENT}"
    if channels != config.in_channels:
        text = f"channels are {came}, expected {config.in_channels} (the model's in_channels)"
        if extra is None and config.image_dim is not None:
            text += f". {LATENT} is missing: 4 mask channels and the latents of the given frames"
        raise ValueError(text)
    for axis, length, patch in zip("FHW", size, config.patch_size, strict=True):
        check(length % patch == 0, f"{axis} of x", length, f"a multiple of the patch size {patch}")
        limit = patch * config.rope_max_seq_len
        check(length <= limit, f"{axis} of x", length, f"at most {limit} (rope_max_seq_len)")


def check_processors(base: Any) -> None:
    """Raise ``ValueError`` for attention processors that our forwards do not implement."""
    for index, block in enumerate([*base.blocks, *getattr(base, "vace_blocks", ())]):
        for name in ("attn1", "attn2"):
            processor = getattr(getattr(block, name), "processor", None)
            if processor is None:  # the block runs its own forward
                continue
            kind, label = type(processor).__name__, f"attention processor of blocks.{index}.{name}"
            hint = "Call model.set_attn_processor(WanAttnProcessor()) first"
            check(kind in PROCESSORS, label, kind, PROCESSORS[0], hint=hint)
            parallel = getattr(processor, "_parallel_config", None)
            hint = "Call prfl_fast.patch without enable_parallelism"
            label = f"context parallelism of blocks.{index}.{name}"
            check(parallel is None, label, type(parallel), "none", hint=hint)


def check_rollout_forwards(base: Any) -> None:
    """Raise :class:`UnsupportedError` unless diffusers' model forward calls our block forwards."""
    for module, forward in replacements(base):
        if "forward" not in module.__dict__:
            raise UnsupportedError("the model is not patched. Call prfl_fast.patch(model)")
        if instance_forward(module) is not forward:
            raise UnsupportedError(
                f"{type(module).__name__} has a replaced forward over prfl_fast's (a hook of "
                "accelerate or of diffusers?). Remove the hook"
            )
    for index, block in enumerate(base.blocks):
        if reason := why_not_fused(block):
            raise UnsupportedError(f"blocks.{index}.{reason}, so the block runs its own forward")
    if not type(base).forward.__module__.startswith("diffusers."):
        raise UnsupportedError(
            f"{type(base).__name__} has a forward that is not diffusers', which may use cached "
            "embeddings in another way"
        )
