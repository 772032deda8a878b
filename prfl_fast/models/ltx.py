"""Adapter of diffusers' ``LTXVideoTransformer3DModel``, whose latents are packed ``[B, L, C]``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from prfl_fast.models.adapter import Conditions
from prfl_fast.models.blocks import BlockParts, Modulation, Rope, context_keys, transformer_block
from prfl_fast.models.family_adapter import Expected, FamilyAdapter, warn_not_fused, why_not_fused
from prfl_fast.models.joint_blocks import valid_tokens_first
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import customization, unwrap

_KINDS = {
    "norm1": "RMSNorm",
    "norm2": "RMSNorm",
    **{attn: "LTXAttention" for attn in ("attn1", "attn2")},
    **{f"{attn}.norm_{x}": "RMSNorm" for attn in ("attn1", "attn2") for x in "qk"},
    "ff": "FeedForward",
    "ff.net.0": "GELU",
    "ff.net.1": "Dropout",
}
# Latents of LTX's VAE cover 8 frames of 25 a second, and 32 × 32 pixels.
_SCALE = (8 / 25, 32, 32)


def _why_not_fused(block: Any) -> str:
    if type(block).__name__ not in ("LTXVideoTransformerBlock", "FSDPLTXVideoTransformerBlock"):
        return f"forward is that of {type(block).__module__}.{type(block).__name__}"
    if reason := why_not_fused(block, _KINDS, ("LTXVideoAttnProcessor",)):
        return reason
    if block.norm1.weight is not None or block.norm2.weight is not None:
        return "norm1 or norm2 has a weight"
    return ""


def rope_forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Replace the forward of the rotary embedding: return one sample's tables, ``[L, D/2]``."""
    coordinates = args[4] if len(args) > 4 else kwargs.get("video_coords")
    if coordinates is not None or customization(self, rope_forward):
        return type(self).forward(self, hidden_states, *args, **kwargs)
    tables = type(self).forward(self, hidden_states[:1], *args, **kwargs)  # equal for all samples
    cos, sin = (table[0, :, ::2].contiguous() for table in tables)
    return Rope(cos, sin, None)


def valid_first(
    context: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return context tokens with the valid ones first, and the number of valid ones, ``[B]``.

    ``mask`` ``[B, 1, T]`` is added to the scores by diffusers: 0, or -10000 for a masked token.
    """
    if mask is None:
        return context, None
    context, lengths = valid_tokens_first(context, mask[:, 0] > -1)
    # The same addend for all tokens does not change a softmax, so all of them are valid then.
    return context, torch.where(lengths == 0, mask.shape[2], lengths)


def block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace ``LTXVideoTransformerBlock.forward``."""
    rope, mask = image_rotary_emb, encoder_attention_mask
    reason = _why_not_fused(self)
    if reason or not isinstance(rope, Rope):
        if reason:
            warn_not_fused(reason)
        if isinstance(rope, Rope):
            rope = tuple(table.repeat_interleave(2, dim=-1)[None] for table in rope[:2])
        arguments = (hidden_states, encoder_hidden_states, temb, rope, mask)
        return type(self).forward(self, *arguments)
    # Under autocast the float32 table makes the residual stream float32, as in diffusers.
    wide = torch.promote_types(hidden_states.dtype, self.scale_shift_table.dtype)
    hidden_states = hidden_states.to(wide)
    context, lengths = valid_first(encoder_hidden_states, mask)
    gelu, _, down = self.ff.net
    parts = BlockParts(
        attn=self.attn1,
        cross=self.attn2,
        cross_norm=None,
        up=gelu.proj,
        down=down,
        eps=(self.norm1.eps, self.norm2.eps),
        chunk=self.ff.__dict__.get("chunk"),
        kind="rms",
    )
    rows = temb.unflatten(-1, (len(self.scale_shift_table), -1)).flatten(0, 1)
    keys = context_keys(self.attn2, context)._replace(lengths=lengths)
    modulation = Modulation(self.scale_shift_table, rows)
    return transformer_block(hidden_states, keys, modulation, rope, parts)


class LTXVideoAdapter(FamilyAdapter):
    """Adapter of ``LTXVideoTransformer3DModel``."""

    class_name = "LTXVideoTransformer3DModel"
    name = f"diffusers {class_name}"
    embeddings: ClassVar[Sequence[str]] = ("proj_in", "caption_projection", "time_embed")
    exact_conditions: ClassVar[Sequence[str]] = ("rope_interpolation_scale",)
    block_forward, rope_forward = staticmethod(block_forward), staticmethod(rope_forward)
    why_not_fused = staticmethod(_why_not_fused)

    def expected_conditions(self, base: Any) -> Expected:
        """Return text, its mask, and seconds and pixels of a latent (default: 25 frames/s)."""
        return {
            "encoder_hidden_states": (True, ("T", base.config.caption_channels)),
            "encoder_attention_mask": (True, ("T",)),
            "rope_interpolation_scale": (False, (3,)),
        }

    def check_latents(
        self, model: torch.nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        super().check_latents(model, x, conditions, name)
        base: Any = unwrap(model)
        patch = self.patch_sizes(base.config)
        check(patch == (1, 1, 1), "patch sizes of the model", patch, "(1, 1, 1), as LTX has")
        scale = conditions.get("rope_interpolation_scale")
        if scale is not None:
            same = scale.is_meta or bool((scale == scale[:1]).all())
            hint = "Videos of other frame rates go into other batches"
            expected = "equal rows"
            check(same, "conditions['rope_interpolation_scale']", scale, expected, hint=hint)

    def arguments(self, base: Any, x: torch.Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return the model's arguments besides the latents and the timestep."""
        given = dict(conditions)
        scale = given.pop("rope_interpolation_scale", None)
        frames, height, width = x.shape[2:]
        return {
            **given,
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": _SCALE if scale is None else scale[0].unbind(),
        }

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Return latents ``[B, C, F, H, W]`` as tokens ``[B, F·H·W, C]``."""
        return x.flatten(2).transpose(1, 2)

    def unpack(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return tokens as latents ``[B, C, F, H, W]``."""
        return out.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])
