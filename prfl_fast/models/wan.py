"""Adapter of diffusers' ``WanTransformer3DModel``: Wan2.1 and Wan2.2.

Models may be text-to-video or image-to-video, with one timestep per sample or per token.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from prfl_fast.models import wan_weights
from prfl_fast.models.adapter import Conditions, check_timesteps, zero_first_frame
from prfl_fast.models.block_adapter import DiffusersAdapter, Replacements, check_class_forward
from prfl_fast.models.blocks import block_keys
from prfl_fast.models.inference import (
    RolloutModel,
    RolloutOptions,
    check_rollout,
    replaced_forwards,
)
from prfl_fast.models.sequence import (
    SEQUENCE,
    SequenceShards,
    check_heads,
    head_forward,
    latents_forward,
)
from prfl_fast.models.wan_checks import (
    check_processors,
    check_rollout_forwards,
    check_wan_inputs,
)
from prfl_fast.models.wan_forward import (
    OWN_FORWARDS,
    block_modulation,
    block_parts,
    frame_timesteps,
    model_inputs,
    replacements,
)
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import instance_forward, layers_of, set_forward, unwrap


def _ends(base: Any) -> Replacements:
    """Return the modules before and after the blocks that share tokens, with their forwards."""
    ends: Replacements = [(base.patch_embedding, latents_forward)]
    if isinstance(base.proj_out, nn.Linear):  # a backbone has none
        ends.append((base.proj_out, head_forward))
    return ends


class WanDiffusersAdapter(DiffusersAdapter):
    """Adapter of diffusers' ``WanTransformer3DModel``; see :class:`prfl_fast.models.Adapter`."""

    class_name = "WanTransformer3DModel"
    name = f"diffusers {class_name}"
    attributes = ("text_tokens",)
    caches = True

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of the blocks and the embeddings."""
        return replacements(base)

    def check_patchable(self, base: Any) -> None:
        """Raise ``ValueError`` for other attention processors, context parallelism or forwards."""
        super().check_patchable(base)
        check_processors(base)

    def remove_head(self, base: Any, num_blocks: int) -> None:
        """Remove norm, projection and modulation after the last block."""
        super().remove_head(base, num_blocks)
        del base.scale_shift_table

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return patch, text, time and image embeddings, which a reward model keeps frozen."""
        base: Any = unwrap(model)
        return [base.patch_embedding, base.condition_embedder]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        check_wan_inputs(unwrap(model), x, conditions, name)

    def shared_heads(self, config: Mapping[str, Any]) -> int:
        """Return the attention heads of a configuration, which ranks that share a sample divide."""
        return int(config.get("num_attention_heads", 40))

    def check_shard_sequence(self, model: nn.Module, group: Any) -> None:
        """Raise the errors of :meth:`shard_sequence`, and change nothing."""
        base: Any = unwrap(model)
        if group is None or dist.get_world_size(group) == 1:
            return
        hint = "Call prfl_fast.patch(model) first"
        kind = type(base).__name__
        check(self.is_patched(model), "model", f"an unpatched {kind}", "a patched one", hint=hint)
        check_heads(base.config.num_attention_heads, dist.get_world_size(group))
        for module, forward in _ends(base):
            check_class_forward([module], forward)

    def shard_sequence(self, model: nn.Module, group: Any) -> None:
        """Run each sample's tokens on all ranks of a process group; None undoes it.

        Raise ``ValueError`` if the model is not patched, or the ranks do not divide its heads.
        """
        self.check_shard_sequence(model, group)
        base: Any = unwrap(model)
        ends = _ends(base)
        modules = [base, base.condition_embedder, *base.blocks, *(module for module, _ in ends)]
        for module in modules:
            vars(module).pop(SEQUENCE, None)
        for module, forward in ends:
            if instance_forward(module) is forward:
                del module.forward
        if group is None or dist.get_world_size(group) == 1:
            return
        shards = SequenceShards(group, base.blocks[0])
        for module in modules:
            vars(module)[SEQUENCE] = shards
        for module, forward in ends:
            set_forward(module, forward)

    def unpatch(self, model: nn.Module) -> None:
        """Delete our forwards; the model then runs whole samples."""
        self.shard_sequence(model, None)
        super().unpatch(model)

    def further_arguments(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> dict[str, Any]:
        """Return arguments of a class's forward beside Wan's, given latents as it takes them."""
        return {}

    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the velocity ``[B, C, F, H, W]`` in ``x.dtype``.

        Args:
            x: latents ``[B, C, F, H, W]``.
            timestep: 1000·σ, ``[]``, ``[B]``, or ``[B, L]`` per token; SkyReels-V2 takes ``[B, F]``
                for diffusion forcing.
            conditions: see :meth:`check_latents`.
        """
        latents, timestep, text, image = model_inputs(unwrap(model), x, timestep, conditions)
        given = self.further_arguments(latents, timestep, conditions)
        (out,) = model(
            latents, timestep, text, encoder_hidden_states_image=image, return_dict=False, **given
        )
        return zero_first_frame(out.to(x.dtype), conditions)

    def open_rollout(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        options: RolloutOptions = RolloutOptions(),  # noqa: B008 - frozen
    ) -> RolloutModel:
        """Return the patched model opened for one rollout, with its caches computed.

        Call this method under the autocast of the rollout. Only shape, dtype and device of ``x``
        matter. ``timesteps`` holds 1000·σ of every step, ``[B]`` each.

        Raises:
            UnsupportedError: if the model is not patched, is compiled as a whole, or has hooks.
            ValueError: if latents, timesteps or conditions have the wrong shape.
        """
        base: Any = unwrap(model)
        check_rollout_forwards(base)
        check_rollout(list(layers_of(model)), OWN_FORWARDS, options.compile)
        self.check_latents(model, x, conditions)
        check_timesteps(timesteps, len(x))
        embedder = base.condition_embedder
        timesteps = [frame_timesteps(base, x, timestep, conditions) for timestep in timesteps]
        adapter = options.open_adapter(base, base.blocks, x.device)
        with torch.no_grad(), replaced_forwards(adapter.outside()):
            latents, _, raw_text, raw_image = model_inputs(base, x, timesteps[0], conditions)
            rope = base.rope(latents)
            text = embedder.text_embedder(raw_text)
            image = None if raw_image is None else embedder.image_embedder(raw_image)
            known = [(embedder.text_embedder, lambda *_: text)]
            if image is not None:
                known.append((embedder.image_embedder, lambda *_: image))
            # The embedder's forward computes the time rows for one timestep at a time, because a
            # batched product rounds differently.
            with replaced_forwards(known):
                times = [embedder(t, raw_text, raw_image)[:2] for t in timesteps]
            context = text if image is None else torch.cat([image, text], dim=1)
            keys = block_keys(base.blocks, lambda block: block.attn2, context, adapter.within)

        def cached(step: int) -> list[tuple[nn.Module, Callable[..., Any]]]:
            return [
                (embedder, lambda *_, **__: (*times[step], text, image)),
                (base.rope, lambda _: rope),
            ]

        opened = RolloutModel(
            functools.partial(self.velocity, model, conditions=conditions),
            x,
            blocks=list(base.blocks),
            parts=block_parts,
            keys=keys,
            cached=cached,
            modulation=block_modulation,
            timesteps=timesteps,
            options=options,
        )
        opened.adapter = adapter
        return opened

    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        num_blocks: int,
    ) -> torch.Tensor:
        """Return the residual stream ``[B, L, D]`` after block ``num_blocks``.

        Later blocks and the head do not run. Arguments are those of :meth:`velocity`.
        """
        base: Any = unwrap(model)
        latents, timestep, text, image = model_inputs(base, x, timestep, conditions)
        tokens_per_sample = timestep.shape[1] if timestep.ndim == 2 else None
        _, time, text, image = base.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=tokens_per_sample
        )
        time = time.unflatten(-1, (6, -1))  # [B, 6, D], or [B, L, 6, D] per token
        context = text if image is None else torch.cat([image, text], dim=1)  # [B, N + T, D]
        rope = base.rope(latents)
        h = base.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()  # [B, L, D]
        for block in base.blocks[:num_blocks]:
            if torch.is_grad_enabled() and base.gradient_checkpointing:
                h = base._gradient_checkpointing_func(block, h, context, time, rope)
            else:
                h = block(h, context, time, rope)
        return h

    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename diffusers' parameters as official Wan's (``blocks.0.self_attn.q.weight``)."""
        return {wan_weights.rename(k, to_reference=True): v for k, v in state.items()}

    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename official Wan's parameters as diffusers'."""
        return {wan_weights.rename(k, to_reference=False): v for k, v in state.items()}

    def reference_config(self, model: nn.Module) -> dict[str, Any]:
        """Return official Wan's ``config.json`` for this model."""
        return wan_weights.reference_config(unwrap(model).config, self.hidden_size(model))
