"""Randomly initialised Wan models of any preset, and the block of a HY-Video-PRFL checkout."""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Context, Preset, Unavailable
from torch import nn

from prfl_fast.adapters import find_adapter


def build(
    preset: Preset,
    context: Context,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> nn.Module:
    """diffusers' ``WanTransformer3DModel``, text to video, in diffusers' own mixed layout.

    Weights are made on the context's device in its dtype unless others are given; norms, modulation
    tables and the time embedder stay in float32.

    Raises:
        Unavailable: diffusers is not installed.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise Unavailable("needs diffusers: pip install 'prfl_fast[bench]'") from error
    torch.manual_seed(context.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or context.dtype)
    try:
        with torch.device(device or context.device):
            model = WanTransformer3DModel(
                num_attention_heads=preset.heads,
                attention_head_dim=preset.dim // preset.heads,
                ffn_dim=preset.ffn_dim,
                num_layers=preset.layers if layers is None else layers,
                text_dim=preset.text_dim,
            )
    finally:
        torch.set_default_dtype(before)
    keep = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        if any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.float()
    return model


def conditions(preset: Preset, context: Context) -> dict[str, torch.Tensor]:
    """Random text states, ``[1, T, C]``."""
    shape = (1, preset.text_tokens, preset.text_dim)
    text = torch.randn(shape, generator=context.generator(1), device=context.device)
    return {"encoder_hidden_states": text.to(context.dtype)}


def latents(preset: Preset, context: Context, offset: int = 2) -> torch.Tensor:
    """Random latents ``[1, 16, F, H, W]``, float32."""
    return torch.randn(
        (1, 16, *preset.latent), generator=context.generator(offset), device=context.device
    )


def _import_block(checkout: Path) -> types.ModuleType:
    """``diffusers_lite.wan.modules.model`` of a checkout, without running its packages'
    ``__init__`` files.

    Those import the whole of its data and sampling code, which a block does not need.
    """
    name = ""
    for part in ("diffusers_lite", "wan", "modules"):
        name = f"{name}.{part}".lstrip(".")
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        return importlib.import_module("diffusers_lite.wan.modules.model")
    except ImportError as error:
        raise Unavailable(f"the reference at {checkout} does not import: {error}") from error


def reference_block(
    model: nn.Module, preset: Preset, context: Context
) -> Callable[..., torch.Tensor]:
    """The reference's ``WanAttentionBlock`` with the weights of the model's first block.

    Returns:
        ``(x, text, time [1, 6, D]) -> x``, run as its trainer does, under bfloat16 autocast; and as
        an attribute ``parameters`` the block's parameters.

    Raises:
        Unavailable: something it needs (flash_attn, diffusers) is missing, or its block is not as
            expected.
    """
    assert context.reference is not None
    source = _import_block(context.reference)
    if not any(importlib.util.find_spec(n) for n in ("flash_attn", "flash_attn_interface")):
        raise Unavailable("the reference needs flash_attn, which is not installed")
    block = source.WanAttentionBlock(
        "t2v_cross_attn", preset.dim, preset.ffn_dim, preset.heads, cross_attn_norm=True, eps=1e-6
    ).to(context.device)
    state = {f"blocks.0.{n}": v for n, v in model.blocks[0].state_dict().items()}
    state = {
        n.removeprefix("blocks.0."): v for n, v in find_adapter(model).to_reference(state).items()
    }
    block.load_state_dict(state)
    # FSDP's mixed precision hands every weight to the block in bfloat16.
    block.to(context.dtype)
    size = preset.dim // preset.heads
    parts = (size - 4 * (size // 6), 2 * (size // 6), 2 * (size // 6))
    freqs = torch.cat([source.rope_params(1024, part) for part in parts], dim=1).to(context.device)
    lengths = torch.tensor([preset.tokens], device=context.device, dtype=torch.int32)
    grid = torch.tensor([preset.grid])

    def run(x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        with torch.autocast(context.device.type, dtype=torch.bfloat16):
            return block(x, time.float(), lengths, grid, freqs, text, None)

    run.parameters = list(block.parameters())  # type: ignore[attr-defined]
    return run
