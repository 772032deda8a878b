"""Forwards that replace those of diffusers' Wan modules, and the inputs of the whole model."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from prfl_fast.kernels.common.rope import rotations
from prfl_fast.models.adapter import not_inference
from prfl_fast.models.block_adapter import feed_forward_in_chunks
from prfl_fast.models.blocks import TEXT_TOKENS, BlockParts, Modulation, Rope, transformer_block
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import customization

PROCESSOR = "WanAttnProcessor"
# Modules of these packages have the forwards that the kernels replace.
_LIBRARIES = ("diffusers", "torch")
_IMAGE_NORMS = ("norm_q", "norm_k", "norm_added_k")


def block_parts(block: Any) -> BlockParts:
    """Return the submodules of a ``WanTransformerBlock`` as :class:`BlockParts`."""
    parts = block._modules
    ffn = parts["ffn"]
    gelu, _, down = ffn.net
    return BlockParts(
        attn=parts["attn1"],
        cross=parts["attn2"],
        cross_norm=parts["norm2"],
        up=gelu.proj,
        down=down,
        eps=(parts["norm1"].eps, parts["norm3"].eps),
        chunk=ffn.__dict__.get("chunk"),
    )


def block_modulation(block: Any, temb: torch.Tensor) -> Modulation:
    """Return a block's modulation; ``temb`` is ``[B, 6, D]``, or ``[B, L, 6, D]`` per token."""
    return Modulation(block.scale_shift_table[0], temb.flatten(0, 1) if temb.ndim == 4 else temb)


def _is_library(function: Any) -> bool:
    """Return True for a function of diffusers or torch; dynamo cannot read its module."""
    return torch.compiler.is_compiling() or function.__module__.split(".")[0] in _LIBRARIES


def _customized(name: str, module: Any, kinds: tuple[str, ...], own: object = None) -> str:
    """Return why a module is not one that the kernels can replace; ``""`` if it is."""
    kind = type(module)
    # FSDP2 changes a module's class, peft and users replace the module. A user's class may have the
    # name of diffusers', and a class may have a user's forward.
    if kind.__name__ not in kinds or not _is_library(kind.forward):
        return f"{name} is a {kind.__module__}.{kind.__name__}, expected the library's {kinds[0]}"
    found = customization(module, own)
    return found and f"{name} has {found}"


def _customized_attention(name: str, attn: Any) -> str:
    if reason := _customized(name, attn, ("WanAttention",)):
        return reason
    kind = type(attn.processor)
    if kind.__name__ != PROCESSOR or not _is_library(kind.__call__):
        return f"{name}.processor is a {kind.__module__}.{kind.__name__}"
    if getattr(attn.processor, "_parallel_config", None) is not None:
        raise ValueError(
            f"context parallelism is on for {name} of a patched block, expected off. Call "
            "prfl_fast.unpatch(model) before enable_parallelism"
        )
    norms = ("norm_q", "norm_k") if attn.add_k_proj is None else _IMAGE_NORMS
    parts = attn._modules
    for part in norms:
        norm = parts.get(part)
        if reason := _customized(f"{name}.{part}", norm, ("RMSNorm",)):
            return reason
        if getattr(norm, "weight", None) is None or norm.eps != parts["norm_q"].eps:
            return f"{name}.{part} has no weight, or another eps than norm_q"
    return ""


def why_not_fused(block: Any) -> str:
    """Return why a block must run its own forward, ``""`` if it can run on the kernels.

    The kernels replace norms, attention processors and the feed-forward. What users, peft,
    accelerate or FSDP2 put on these submodules works only if they are called. Raise
    ``ValueError`` if context parallelism was enabled after patching.
    """
    # FSDP2 derives a class that keeps diffusers' forward; a user's subclass may have another.
    kind = type(block)
    known = kind.__name__ in ("WanTransformerBlock", "FSDPWanTransformerBlock")
    if not known or not _is_library(kind.forward):
        return f"forward is that of {kind.__module__}.{kind.__name__}"
    # Every block call pays for this check, and a module's attributes go through __getattr__.
    parts = block._modules
    if reason := _customized("norm2", parts.get("norm2"), ("FP32LayerNorm", "Identity")):
        return reason
    for name in ("norm1", "norm3"):
        norm = parts.get(name)
        if reason := _customized(name, norm, ("FP32LayerNorm",)):
            return reason
        if norm._parameters["weight"] is not None:
            return f"{name} has a weight"
    for name in ("attn1", "attn2"):
        if reason := _customized_attention(name, parts.get(name)):
            return reason
    ffn = parts.get("ffn")
    if reason := _customized("ffn", ffn, ("FeedForward",), feed_forward_in_chunks):
        return reason
    layers = list(ffn.net)
    if len(layers) != 3:
        return f"ffn.net has {len(layers)} layers, expected 3"
    gelu, dropout, _ = layers
    if reason := _customized("ffn.net.0", gelu, ("GELU",)):
        return reason
    if gelu.approximate != "tanh":
        return f"ffn.net.0 has approximate={gelu.approximate!r}"
    reason = _customized("ffn.net.1", dropout, ("Dropout", "Identity"))
    if not reason and dropout.training and getattr(dropout, "p", 0) > 0:
        return f"ffn.net.1 has dropout p={dropout.p} in train mode"
    return reason


def rotary_tables(rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return diffusers' cosines and sines, float32 ``[1, L, 1, head_dim]`` each."""
    assert rope.grid is not None
    table = rotations(rope.cos, rope.sin, list(rope.grid), list(rope.offset), torch.float32)
    both = (table.real, table.imag)  # [L, 1, head_dim / 2]
    return both[0].repeat_interleave(2, -1)[None], both[1].repeat_interleave(2, -1)[None]


def block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> torch.Tensor:
    """Replace ``WanTransformerBlock.forward``."""
    if not isinstance(rotary_emb, Rope):  # the caller passes diffusers' own cosines and sines
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
    # At each call, because hooks, processors and adapters may be added after patching.
    if reason := why_not_fused(self):
        if not torch.compiler.is_compiling():
            text = f"a patched block runs its own forward, not prfl_fast's kernels: {reason}"
            warnings.warn(text, stacklevel=2)
        tables = rotary_tables(rotary_emb)
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, tables)
    modulation = block_modulation(self, temb)
    parts = block_parts(self)
    return transformer_block(hidden_states, encoder_hidden_states, modulation, rotary_emb, parts)


def rope_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    """Replace ``WanRotaryPosEmbed.forward``: a compact table, not ``[L, head_dim]`` tensors."""
    if customization(self, rope_forward):  # a hook expects diffusers' tensors
        return type(self).forward(self, hidden_states)
    sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
    grid = [size // patch for size, patch in sizes]
    return Rope.from_grid(grid, self.attention_head_dim, device=hidden_states.device)


OWN_FORWARDS = (block_forward, rope_forward, feed_forward_in_chunks)


def replacements(base: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Return the pairs (module, forward) that :func:`prfl_fast.patch` sets."""
    return [(block, block_forward) for block in base.blocks] + [(base.rope, rope_forward)]


def text_rows(base: Any, text: torch.Tensor) -> int:
    """Return the number of rows to which a model's text states are padded, 512 for published Wans.

    An attribute ``text_tokens`` of a text-to-video model replaces the 512; None pads nothing. Raise
    ``ValueError`` unless ``text`` ``[B, T, C]`` has 1 to that many rows.
    """
    rows = TEXT_TOKENS  # image-to-video blocks split text and image tokens there
    if base.config.image_dim is None:
        given = getattr(base, "text_tokens", TEXT_TOKENS)
        rows = max(text.shape[1], 1) if given is None else given
    hint = "Text is padded with zeros to that many rows, as in training. Shorten it"
    name = "conditions['encoder_hidden_states']"
    ok = 1 <= text.shape[1] <= rows
    check(ok, name, text, f"1 to {rows} text tokens, [B, T, C]", hint=hint)
    return rows


def image_rows(base: Any) -> int | None:
    """Return the image tokens of a sample of a first-last-frame model, both images'; else None."""
    return None if base.config.image_dim is None else base.config.pos_embed_seq_len


def model_inputs(
    base: Any, x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return latents, timesteps, text and image tokens as diffusers' forward takes them.

    Text gets rows of zeros up to :func:`text_rows`, without a mask: Wan was trained on such text.
    """
    x, conditions = not_inference(x), not_inference(conditions)
    dtype = base.patch_embedding.weight.dtype  # diffusers does not cast its inputs
    latents = [x]
    if "latent_condition" in conditions:
        latents.append(conditions["latent_condition"])
    image = conditions.get("encoder_hidden_states_image")
    timestep = timestep.to(x.device)
    if image is not None and image_rows(base) is not None:
        # First and last frame: diffusers' embedding joins the rows of two images again.
        image = image.reshape(2 * len(x), -1, image.shape[-1])
    text = conditions["encoder_hidden_states"].to(dtype)
    if missing := text_rows(base, text) - text.shape[1]:
        text = functional.pad(text, (0, 0, 0, missing))
    return (
        torch.cat([part.to(dtype) for part in latents], dim=1).contiguous(),  # [B, C + C', F, H, W]
        timestep.expand(x.shape[0]) if timestep.ndim == 0 else timestep,  # [B] or [B, L]
        text,
        None if image is None else image.to(dtype),
    )
