"""Adapter of diffusers' ``WanTransformer3DModel``.

It supports text-to-video and image-to-video models of Wan2.1 and Wan2.2, with one timestep per
sample or per token.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.models import wan_weights
from prfl_fast.models.adapter import Conditions, check_timesteps, zero_first_frame
from prfl_fast.models.blocks import context_keys
from prfl_fast.models.inference import (
    RolloutModel,
    RolloutOptions,
    check_rollout,
    replaced_forwards,
)
from prfl_fast.models.wan_checks import (
    check_class_forward,
    check_patchable,
    check_rollout_forwards,
    check_wan_inputs,
)
from prfl_fast.models.wan_forward import (
    OWN_FORWARDS,
    block_modulation,
    block_parts,
    feed_forward_in_chunks,
    frame_timesteps,
    model_inputs,
    replacements,
)
from prfl_fast.utils.checks import check, check_count
from prfl_fast.utils.modules import instance_forward, layers_of, set_forward, unwrap
from prfl_fast.utils.optional import need

_CLASS = "WanTransformer3DModel"

# The rotary embeddings of the patched models that share a block.
_patched_by: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]" = (
    weakref.WeakKeyDictionary()
)


class WanDiffusersAdapter:
    """Adapter of diffusers' ``WanTransformer3DModel``; see :class:`prfl_fast.models.Adapter`."""

    name = f"diffusers {_CLASS}"

    def matches(self, model: nn.Module) -> bool:
        """Return True for the diffusers class, its subclasses, and wrappers around them."""
        return any(
            c.__name__ == _CLASS and c.__module__.startswith("diffusers.")
            for c in type(unwrap(model)).__mro__
        )

    def patch(self, model: nn.Module) -> None:
        """Set our forward on the blocks, rotary embedding and embedder of this instance.

        Raises:
            ValueError: for another attention processor, context parallelism or replaced forwards.
        """
        base: Any = unwrap(model)
        check_patchable(base)
        for module, forward in replacements(base):
            if "forward" not in module.__dict__:
                set_forward(module, forward)
        for block in (*base.blocks, base.condition_embedder):
            _patched_by.setdefault(block, weakref.WeakSet()).add(base.rope)

    def unpatch(self, model: nn.Module) -> None:
        """Delete our forwards; a model that is not patched stays unchanged.

        Blocks that another patched model shares keep theirs, which run diffusers' forward if the
        model that calls them is not patched.
        """
        base: Any = unwrap(model)
        for module, forward in replacements(base):
            others = {*_patched_by.get(module, ())} - {base.rope}
            if module in _patched_by:
                _patched_by[module].discard(base.rope)
            if instance_forward(module) is forward and not others:
                del module.forward

    def is_patched(self, model: nn.Module) -> bool:
        """Return True if every block and the embeddings run our forward."""
        return all(instance_forward(m) is forward for m, forward in replacements(unwrap(model)))

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Run the feed-forward of every block ``tokens`` tokens at a time; None undoes it.

        Raise ``ValueError`` if ``tokens`` is not positive, or a feed-forward has a replaced
        forward.
        """
        if tokens is not None:
            check_count("tokens", tokens)
        layers = [block.ffn for block in unwrap(model).blocks]  # type: ignore[union-attr]
        check_class_forward(layers, feed_forward_in_chunks)
        for layer in layers:
            if tokens is not None:
                layer.chunk = tokens
                set_forward(layer, feed_forward_in_chunks)
            elif "forward" in layer.__dict__:
                del layer.chunk, layer.forward

    def checkpoint_blocks(self, model: nn.Module, run: Callable[..., torch.Tensor] | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it.

        ``args`` are the residual stream ``[B, L, D]`` and the inputs that all blocks share.
        """
        base: Any = unwrap(model)
        if run is None:
            base.disable_gradient_checkpointing()
        else:
            base.enable_gradient_checkpointing(run)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the transformer blocks, in order."""
        return unwrap(model).blocks  # type: ignore[return-value]

    def hidden_size(self, model: nn.Module) -> int:
        """Return D, the width of the residual stream."""
        config: Any = unwrap(model).config  # patch_embedding may have an adapter
        return config.num_attention_heads * config.attention_head_dim

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return patch, text, time and image embeddings, which a reward model keeps frozen."""
        base: Any = unwrap(model)
        return [base.patch_embedding, base.condition_embedder]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        check_wan_inputs(unwrap(model), x, conditions, name)

    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the velocity ``[B, C, F, H, W]`` in ``x.dtype``.

        Args:
            x: latents ``[B, C, F, H, W]``.
            timestep: 1000·σ, ``[]``, ``[B]``, or ``[B, L]`` per token.
            conditions: see :meth:`check_latents`.
        """
        latents, timestep, text, image = model_inputs(unwrap(model), x, timestep, conditions)
        (out,) = model(
            latents, timestep, text, encoder_hidden_states_image=image, return_dict=False
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

        Call it under the autocast of the rollout. Only shape, dtype and device of ``x`` are used;
        ``timesteps`` are 1000·σ of every step, ``[B]`` each.

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
        with torch.no_grad():
            latents, _, raw_text, raw_image = model_inputs(base, x, timesteps[0], conditions)
            rope = base.rope(latents)
            text = embedder.text_embedder(raw_text)
            image = None if raw_image is None else embedder.image_embedder(raw_image)
            known = [(embedder.text_embedder, lambda *_: text)]
            if image is not None:
                known.append((embedder.image_embedder, lambda *_: image))
            # The embedder's own forward computes the time rows, one timestep at a time, because a
            # batched product rounds differently.
            with replaced_forwards(known):
                times = [embedder(t, raw_text, raw_image)[:2] for t in timesteps]
            context = text if image is None else torch.cat([image, text], dim=1)
            keys = [context_keys(block.attn2, context) for block in base.blocks]

        def cached(step: int) -> list[tuple[nn.Module, Callable[..., Any]]]:
            return [
                (embedder, lambda *_, **__: (*times[step], text, image)),
                (base.rope, lambda _: rope),
            ]

        return RolloutModel(
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

    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module:
        """Return a deep copy of the embeddings and the first blocks, patched if the model is.

        Raise ``ValueError`` if ``num_blocks`` is not between 1 and the model's number of blocks.
        """
        base: Any = unwrap(model)
        expected = f"1 to {len(base.blocks)} (the model's blocks)"
        check(1 <= num_blocks <= len(base.blocks), "num_blocks", num_blocks, expected)
        # deepcopy takes the memo's entries instead of copies, so unused parts need no memory.
        kept = nn.ModuleList(copy.deepcopy(block) for block in base.blocks[:num_blocks])
        memo: dict[int, nn.Module] = {id(base.blocks): kept}
        memo |= {id(part): nn.Identity() for part in (base.norm_out, base.proj_out)}
        return self._remove_head(copy.deepcopy(base, memo), num_blocks)

    def _remove_head(self, base: Any, num_blocks: int) -> nn.Module:
        base.norm_out = base.proj_out = nn.Identity()
        del base.scale_shift_table  # modulation of the head only
        base.register_to_config(num_layers=num_blocks)
        for parameter in base.parameters():
            parameter.grad = None
        return base

    def backbone_config(self, model: nn.Module) -> dict[str, Any]:
        """Return the configuration for :meth:`backbone_from_config` as plain JSON values."""
        config: Any = unwrap(model).config
        public = {k: v for k, v in config.items() if not k.startswith("_")}
        if hasattr(unwrap(model), "text_tokens"):
            public["text_tokens"] = unwrap(model).text_tokens
        return {k: list(v) if isinstance(v, tuple) else v for k, v in public.items()}

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """Build a randomly initialized headless backbone of that configuration.

        Raise ``ValueError`` if diffusers does not take the configuration.
        """
        own = {k: v for k, v in config.items() if k != "text_tokens"}
        try:
            base = getattr(need("diffusers"), _CLASS)(**own)
        except TypeError as error:
            raise ValueError(f"backbone config does not fit {_CLASS}: {error}") from error
        if "text_tokens" in config:
            base.text_tokens = config["text_tokens"]
        return self._remove_head(base, config["num_layers"])

    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename diffusers' parameters as official Wan's (``blocks.0.self_attn.q.weight``)."""
        return {wan_weights.rename(k, to_reference=True): v for k, v in state.items()}

    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Rename official Wan's parameters as diffusers'."""
        return {wan_weights.rename(k, to_reference=False): v for k, v in state.items()}

    def reference_config(self, model: nn.Module) -> dict[str, Any]:
        """Return official Wan's ``config.json`` for this model."""
        return wan_weights.reference_config(unwrap(model).config, self.hidden_size(model))
