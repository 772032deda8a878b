"""Build randomly initialized Wan models of any preset, and those of a HY-Video-PRFL checkout."""

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from harness import Context, Preset, UnavailableError
from torch import nn
from torch.utils.checkpoint import checkpoint

from prfl_fast.models import find_adapter


def build(
    preset: Preset,
    context: Context,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> nn.Module:
    """Return diffusers' ``WanTransformer3DModel``, text to video, in its own mixed layout.

    Weights are made on the context's device in its dtype unless others are given; norms, modulation
    tables and the time embedder stay in float32. Raise ``UnavailableError`` without diffusers.
    """
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as error:
        raise UnavailableError("needs diffusers: pip install 'prfl_fast[bench]'") from error
    torch.manual_seed(context.seed)
    size = preset if layers is None else replace(preset, layers=layers)
    dtype, before = dtype or context.dtype, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device or context.device):
            model = WanTransformer3DModel(**size.config)
            model.text_tokens = size.text_tokens
    finally:
        torch.set_default_dtype(before)
    return mixed(model, dtype)


def mixed(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast weights to ``dtype`` in place, except those that diffusers keeps in float32."""
    keep = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        wide = any(part in keep for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    return model


def conditions(preset: Preset, context: Context) -> dict[str, torch.Tensor]:
    """Draw text states ``[1, T, C]``."""
    shape = (1, preset.text_tokens, preset.text_dim)
    text = torch.randn(shape, generator=context.generator(1), device=context.device)
    return {"encoder_hidden_states": text.to(context.dtype)}


def latents(preset: Preset, context: Context, offset: int = 2) -> torch.Tensor:
    """Draw latents ``[1, 16, F, H, W]``, float32."""
    shape, generator = (1, 16, *preset.latent), context.generator(offset)
    return torch.randn(shape, generator=generator, device=context.device)


def _reference(context: Context) -> types.ModuleType:
    """Import the reference's ``model``; raise ``UnavailableError`` if something is missing for it.

    The ``__init__`` files of its packages do not run: they import all of its data and sampling
    code, which a block does not need.
    """
    assert context.reference is not None
    name = ""
    for part in ("diffusers_lite", "wan", "modules"):
        name = f"{name}.{part}".lstrip(".")
        package = types.ModuleType(name)
        package.__path__ = [str(context.reference.joinpath(*name.split(".")))]
        sys.modules[name] = package
    try:
        source = importlib.import_module(f"{name}.model")
    except ImportError as error:
        at = context.reference
        raise UnavailableError(f"the reference at {at} does not import: {error}") from error
    if not any(importlib.util.find_spec(n) for n in ("flash_attn", "flash_attn_interface")):
        raise UnavailableError("the reference needs flash_attn, which is not installed")
    return source


class ProjectedPool(nn.Module):
    """Pool ``[B, L, D]`` to ``[B, D]`` by the parameters of ``pool``, as nn.MultiheadAttention.

    It projects all tokens to keys and values.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        self.multihead_attn, self.queries = pool.multihead_attn, pool.queries

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.queries.dtype)
        queries = self.queries.expand(len(x), *self.queries.shape)
        attended, _ = self.multihead_attn(queries, x, x, need_weights=False)
        return (attended + queries).mean(1)


def _reference_model(
    source: Any, model: nn.Module, layers: int, preset: Preset, context: Context
) -> Any:
    """Return the reference's ``WanModel``, each block checkpointed, with a given model's weights.

    Weights have the context's dtype. Head and norms that the model lacks keep their initial values.
    """
    config: Any = model.config
    made = source.WanModel(
        "t2v",
        text_len=preset.text_tokens,
        dim=config.num_attention_heads * config.attention_head_dim,
        ffn_dim=config.ffn_dim,
        freq_dim=config.freq_dim,
        text_dim=config.text_dim,
        num_heads=config.num_attention_heads,
        num_layers=layers,
        cross_attn_norm=config.cross_attn_norm,
        eps=config.eps,
    )
    made.enable_teacache = False  # its trainer sets it on the class
    found = made.load_state_dict(find_adapter(model).to_reference(model.state_dict()), strict=False)
    if found.unexpected_keys:
        raise UnavailableError(f"the reference has no {found.unexpected_keys[0]}")
    for block in made.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    return made.to(context.device, context.dtype)


def reference_models(
    model: nn.Module, reward: Any, preset: Preset, context: Context
) -> tuple[nn.Module, Callable[..., torch.Tensor], nn.Module, Callable[..., torch.Tensor]]:
    """Return the reference's generator, its velocity, its reward's blocks and the reward.

    As its trainer runs them: bfloat16 autocast, every block checkpointed, the reward's blocks with
    weight gradients, pooling by projections of all tokens. ``model`` is a diffusers Wan and
    ``reward`` a latent reward model made from it.
    """
    source = _reference(context)
    depth = len(reward.backbone.blocks)
    generator = _reference_model(source, model, preset.layers, preset, context)
    backbone = _reference_model(source, reward.backbone, depth, preset, context)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(name.startswith("blocks."))
    pool, head = ProjectedPool(reward.pool), reward.head

    def call(which: nn.Module, x: Any, timestep: Any, conditions: Any, **rest: Any) -> Any:
        text = list(conditions["encoder_hidden_states"])
        with torch.autocast(context.device.type, dtype=torch.bfloat16):
            return which(list(x), timestep, text, preset.tokens, **rest)

    def velocity(x: torch.Tensor, timestep: torch.Tensor, conditions: Any) -> torch.Tensor:
        return torch.stack(call(generator, x, timestep, conditions))

    def score(x: torch.Tensor, timestep: torch.Tensor, conditions: Any) -> torch.Tensor:
        rest = {"output_features": True, "selected_layers": [depth]}
        (features,) = call(backbone, x, timestep, conditions, **rest)
        return torch.sigmoid(head(pool(features)))

    return generator, velocity, backbone, score


def reference_block(model: nn.Module, preset: Preset, context: Context) -> Callable[..., Any]:
    """Return the reference's ``WanAttentionBlock`` with the weights of the model's first block.

    It maps ``x, text, time [1, 6, D]`` to x as its trainer does, under bfloat16 autocast, and has
    the block's parameters as an attribute.
    """
    source = _reference(context)
    block = source.WanAttentionBlock(
        "t2v_cross_attn", preset.dim, preset.ffn_dim, preset.heads, cross_attn_norm=True, eps=1e-6
    ).to(context.device)
    state = {f"blocks.0.{n}": v for n, v in model.blocks[0].state_dict().items()}
    state = find_adapter(model).to_reference(state)
    block.load_state_dict({n.removeprefix("blocks.0."): v for n, v in state.items()})
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

    run.parameters = list(block.parameters())
    return run
