"""Forwards that replace those of diffusers' Wan modules, and the inputs of the whole model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prfl_fast.models.blocks import TEXT_TOKENS, BlockParts, Modulation, Rope, transformer_block
from prfl_fast.utils.checks import check
from prfl_fast.utils.recompute import in_chunks


def block_parts(block: Any) -> BlockParts:
    """Return the submodules of a ``WanTransformerBlock`` as :class:`BlockParts`."""
    return BlockParts(
        attn=block.attn1,
        cross=block.attn2,
        cross_norm=block.norm2,
        up=block.ffn.net[0].proj,
        down=block.ffn.net[2],
        eps=(block.norm1.eps, block.norm3.eps),
        chunk=getattr(block.ffn, "chunk", None),
    )


def block_modulation(block: Any, temb: torch.Tensor) -> Modulation:
    """Return a block's modulation; ``temb`` is ``[B, 6, D]``, or ``[B, L, 6, D]`` per token."""
    return Modulation(block.scale_shift_table[0], temb.flatten(0, 1) if temb.ndim == 4 else temb)


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
    modulation = block_modulation(self, temb)
    # Submodules are looked up at each call: LoRA may be added after patching.
    parts = block_parts(self)
    return transformer_block(hidden_states, encoder_hidden_states, modulation, rotary_emb, parts)


def feed_forward_in_chunks(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Replace ``FeedForward.forward`` of an unpatched block, ``self.chunk`` tokens at a time."""
    return in_chunks(lambda x: type(self).forward(self, x), hidden_states, self.chunk)


def rope_forward(self: Any, hidden_states: torch.Tensor) -> Rope:
    """Replace ``WanRotaryPosEmbed.forward``: a compact table, not ``[L, head_dim]`` tensors."""
    sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
    grid = [size // patch for size, patch in sizes]
    return Rope.from_grid(grid, self.attention_head_dim, device=hidden_states.device)


OWN_FORWARDS = (block_forward, rope_forward, feed_forward_in_chunks)


def replacements(base: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Return the pairs (module, forward) that :func:`prfl_fast.patch` sets."""
    return [(block, block_forward) for block in base.blocks] + [(base.rope, rope_forward)]


def instance_forward(module: nn.Module) -> object:
    """Return the function behind a module's instance forward; None if there is none."""
    return getattr(module.__dict__.get("forward"), "__func__", None)


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
        torch.cat([part.to(dtype) for part in latents], dim=1),  # [B, C + C', F, H, W]
        timestep.expand(x.shape[0]) if timestep.ndim == 0 else timestep,  # [B] or [B, L]
        text,
        None if image is None else image.to(dtype),
    )
