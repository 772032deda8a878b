"""Adapters of diffusers' VACE, Animate, SkyReels-V2 and ChronoEdit, which have Wan's blocks.

Blocks and rotary embedding are replaced. The model's forward is kept, because it does more between
the blocks than Wan's. Rollouts run without caches.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from prfl_fast.models.adapter import FIRST_FRAME, Conditions, check_inputs
from prfl_fast.models.block_adapter import BlockAdapter, NoReference, Replacements
from prfl_fast.models.blocks import Rope, transformer_block
from prfl_fast.models.inference import RolloutModel, UnsupportedError
from prfl_fast.models.wan import WanDiffusersAdapter
from prfl_fast.models.wan_checks import check_wan_inputs
from prfl_fast.models.wan_forward import (
    block_forward,
    block_modulation,
    fused_parts,
    rope_forward,
)
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import customization, stopped_at, unwrap


def vace_block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    control_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Replace ``WanVACETransformerBlock.forward``."""
    x, text, control = hidden_states, encoder_hidden_states, control_hidden_states
    parts, rotary = fused_parts(self, rotary_emb)
    if parts is None:
        out: Any = type(self).forward(self, x, text, control, temb, rotary)
        return out  # type: ignore[no-any-return]
    if self.proj_in is not None:
        control = self.proj_in(control) + x
    modulation = block_modulation(self, temb)
    control = transformer_block(control, text, modulation, rotary, parts)
    return None if self.proj_out is None else self.proj_out(control), control


def skyreels_block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """Replace ``SkyReelsV2TransformerBlock.forward``."""
    x, text = hidden_states, encoder_hidden_states
    if attention_mask is not None:
        raise ValueError(
            "the blocks of a patched SkyReelsV2Transformer3DModel got a causal mask, expected none "
            "(num_frame_per_block 1). Call prfl_fast.unpatch(model) for causal attention"
        )
    parts, rotary = fused_parts(self, rotary_emb)
    if parts is None:
        out: torch.Tensor = type(self).forward(self, x, text, temb, rotary, None)
        return out
    if temb.ndim == 4:
        # [B, 6, L, D] to [B, F, 6, D]: the model's forward repeats rows over a frame's tokens.
        temb = temb[:, :, :: rotary.grid[1] * rotary.grid[2]].transpose(1, 2)
    modulation = block_modulation(self, temb)
    return transformer_block(x, text, modulation, rotary, parts)


def chronoedit_rope_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    """Replace ``ChronoEditRotaryPosEmbed.forward``: of two frames, the second has the last place.

    Its position is ``temporal_skip_len - 1``.
    """
    if customization(self, chronoedit_rope_forward):  # a hook expects diffusers' tensors
        return type(self).forward(self, hidden_states)
    sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
    grid = [size // patch for size, patch in sizes]
    width, last = self.attention_head_dim, self.temporal_skip_len - 1
    if hidden_states.shape[2] != 2:
        return Rope.from_grid(grid, width, device=hidden_states.device)
    longest = [max(last + 1, *grid)] * 3
    rope = Rope.from_grid(longest, width, device=hidden_states.device)
    columns = width // 2 - 2 * (width // 6)  # the first columns are of the frame axis
    for table in (rope.cos, rope.sin):
        table[1, :columns] = table[last, :columns]
    return rope._replace(grid=tuple(grid))


class _RelativeAdapter(NoReference, WanDiffusersAdapter):
    """Adapter of a class with Wan's blocks and a forward of its own.

    ``extra`` maps each further condition, named as an argument of the forward, to a function of the
    model that returns its channels, and to its number of frames minus that of ``x`` (None: any).
    """

    planned = False
    # Their forwards do more with the tokens between the blocks than Wan's.
    check_shard_sequence = BlockAdapter.check_shard_sequence
    shard_sequence = BlockAdapter.shard_sequence
    shared_heads = BlockAdapter.shared_heads
    caches = False
    block: ClassVar[Callable[..., Any]] = block_forward
    rope: ClassVar[Callable[..., Any]] = rope_forward
    extra: ClassVar[dict[str, tuple[Callable[[Any], int], int | None]]] = {}

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of the blocks and of the rotary embedding."""
        kind = type(self)
        return [(block, kind.block) for block in base.blocks] + [(base.rope, kind.rope)]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        check_inputs(name, x, conditions)
        expected = f"no {FIRST_FRAME}, as {self.class_name} has no time of its own for it"
        check(FIRST_FRAME not in conditions, "conditions", sorted(conditions), expected)
        base: Any = unwrap(model)
        for key, (channels, frames) in self.extra.items():
            value: Any = conditions.get(key)
            wanted = [len(x), channels(base)]
            if frames is not None:
                wanted += [x.shape[2] + frames, *x.shape[3:]]
            ok = value is not None and value.ndim == 5 and value.is_floating_point()
            ok = ok and (list(value.shape[: len(wanted)]), value.device) == (wanted, x.device)
            expected = f"a floating-point tensor of 5 dimensions, the first {wanted}"
            check(ok, f"conditions[{key!r}]", value, expected)
        others = {key: value for key, value in conditions.items() if key not in self.extra}
        check_wan_inputs(base, x, others, name)

    def further_arguments(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> dict[str, Any]:
        """Return the conditions beside Wan's."""
        return {key: conditions[key].to(x.dtype) for key in self.extra}

    def open_rollout(self, *args: Any, **kwargs: Any) -> RolloutModel:
        """Raise :class:`UnsupportedError`: the model does more between blocks than Wan."""
        raise UnsupportedError(f"{self.class_name} has a forward of its own between the blocks")

    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        num_blocks: int,
    ) -> torch.Tensor:
        """Return the residual stream ``[B, L, D]`` after block ``num_blocks``.

        The forward stops after this block. Arguments are those of :meth:`velocity`.
        """
        base: Any = unwrap(model)
        with stopped_at(base.blocks[num_blocks - 1].register_forward_hook) as outputs:
            self.velocity(base, x, timestep, conditions)
        return outputs[0].contiguous()  # type: ignore[no-any-return]

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return all modules except the blocks. A reward model keeps them frozen."""
        return [m for name, m in unwrap(model).named_children() if name != "blocks"]


class _WithoutBackbone(_RelativeAdapter):
    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module:
        """Raise ``ValueError``: modules beside the blocks depend on their number."""
        raise ValueError(
            f"{self.class_name} cannot be cut to its first blocks, because other modules depend on "
            "the number of blocks. Pass VelocityModel(model, function)"
        )


class WanVACEAdapter(_WithoutBackbone):
    """Adapter of ``WanVACETransformer3DModel``; its control layers are patched as its blocks."""

    class_name = "WanVACETransformer3DModel"
    name = f"diffusers {class_name}"
    extra = {"control_hidden_states": (lambda base: base.config.vace_in_channels, 0)}

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of both kinds of blocks and of the rotary embedding."""
        pairs: Replacements = [(block, vace_block_forward) for block in base.vace_blocks]
        return super().replacements(base) + pairs

    def feed_forwards(self, base: Any) -> list[Any]:
        """Return the feed-forwards of both kinds of blocks."""
        return [block.ffn for block in [*base.blocks, *base.vace_blocks]]


class WanAnimateAdapter(_WithoutBackbone):
    """Adapter of ``WanAnimateTransformer3DModel``; its face blocks run as they are."""

    class_name = "WanAnimateTransformer3DModel"
    name = f"diffusers {class_name}"
    extra = {
        "pose_hidden_states": (lambda base: base.config.latent_channels, -1),
        "face_pixel_values": (lambda base: 3, None),
    }


class SkyReelsV2Adapter(_RelativeAdapter):
    """Adapter of ``SkyReelsV2Transformer3DModel`` without causal attention."""

    class_name = "SkyReelsV2Transformer3DModel"
    name = f"diffusers {class_name}"
    block = skyreels_block_forward
    planned = True

    def check_patchable(self, base: Any) -> None:
        """Raise ``ValueError`` for causal attention, and in the cases of Wan."""
        frames = base.config.num_frame_per_block
        hint = "The kernels have no causal mask over frames"
        check(frames == 1, f"num_frame_per_block of {self.class_name}", frames, "1", hint=hint)
        super().check_patchable(base)

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        sampled = unwrap(model).config.inject_sample_info  # type: ignore[union-attr]
        hint = "Pair it with a function that passes fps: VelocityModel(model, function)"
        check(not sampled, f"inject_sample_info of {self.class_name}", sampled, "False", hint=hint)
        super().check_latents(model, x, conditions, name)

    def further_arguments(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> dict[str, Any]:
        """Return the switch of diffusion forcing, on for timesteps ``[B, F]``."""
        return {"enable_diffusion_forcing": timestep.ndim == 2}


class ChronoEditAdapter(_RelativeAdapter):
    """Adapter of ``ChronoEditTransformer3DModel``."""

    class_name = "ChronoEditTransformer3DModel"
    name = f"diffusers {class_name}"
    rope = chronoedit_rope_forward
    planned = True


RELATIVES = (WanVACEAdapter(), WanAnimateAdapter(), SkyReelsV2Adapter(), ChronoEditAdapter())
