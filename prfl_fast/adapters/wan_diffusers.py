"""diffusers' ``WanTransformer3DModel``: Wan2.1/2.2 text-to-video, image-to-video and per-token
timesteps.
"""

import copy
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.adapters._unwrap import layers_of, unwrap
from prfl_fast.chunks import in_chunks
from prfl_fast.kernels._checks import describe
from prfl_fast.modules import TEXT_TOKENS, Modulation, Rope, context_keys, transformer_block
from prfl_fast.rollout_block import (
    BlockParts,
    RolloutModel,
    Unsupported,
    check_rollout,
    replaced_forwards,
)

_CLASS = "WanTransformer3DModel"

# Names of diffusers' parameters and of official Wan's (which HY-Video-PRFL's checkpoints use), in
# this order.
_RENAMES = (
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos"),
    ("condition_embedder.image_embedder.norm1.", "img_emb.proj.0."),
    ("condition_embedder.image_embedder.ff.net.0.proj.", "img_emb.proj.1."),
    ("condition_embedder.image_embedder.ff.net.2.", "img_emb.proj.3."),
    ("condition_embedder.image_embedder.norm2.", "img_emb.proj.4."),
    ("proj_out.", "head.head."),
)
_BLOCK_RENAMES = (
    ("attn1.", "self_attn."),
    ("attn2.", "cross_attn."),
    ("to_q.", "q."),
    ("to_k.", "k."),
    ("to_v.", "v."),
    ("to_out.0.", "o."),
    ("add_k_proj.", "k_img."),
    ("add_v_proj.", "v_img."),
    ("norm_added_k.", "norm_k_img."),
    ("norm2.", "norm3."),
    ("ffn.net.0.proj.", "ffn.0."),
    ("ffn.net.2.", "ffn.2."),
    ("scale_shift_table", "modulation"),
)


def _rename(key: str, to_reference: bool) -> str:
    """One parameter name in the other convention; unchanged if it has no counterpart."""
    renames: tuple[tuple[str, str], ...]
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", key)
    if block:
        path, renames = block[2], _BLOCK_RENAMES
    else:
        if key in ("scale_shift_table", "head.modulation"):
            return "head.modulation" if to_reference else "scale_shift_table"
        path, renames = key, _RENAMES
    for ours, theirs in renames:
        old, new = (ours, theirs) if to_reference else (theirs, ours)
        # Anchored at a path component, so that "norm_q." is not taken for "q.".
        path = re.sub(rf"(^|\.){re.escape(old)}", lambda m, new=new: m[1] + new, path, count=1)
        if not block and path != key:
            break
    return (block[1] if block else "") + path


def _parts(block: Any) -> BlockParts:
    return BlockParts(
        attn=block.attn1,
        cross=block.attn2,
        cross_norm=block.norm2,
        up=block.ffn.net[0].proj,
        down=block.ffn.net[2],
        eps=(block.norm1.eps, block.norm3.eps),
        chunk=getattr(block.ffn, "chunk", None),
    )


def _modulation(block: Any, temb: torch.Tensor) -> Modulation:
    return Modulation(block.scale_shift_table[0], temb.flatten(0, 1) if temb.ndim == 4 else temb)


def _block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> torch.Tensor:
    """Replaces ``WanTransformerBlock.forward``; resolves submodules at every call, so adapters
    added later count.
    """
    if not isinstance(rotary_emb, Rope):  # called by code that computed diffusers' own cos/sin
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb)
    return transformer_block(
        hidden_states,
        encoder_hidden_states,
        _modulation(self, temb),
        rotary_emb,
        **_parts(self)._asdict(),
    )


def _feed_forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Replaces the forward of a block's ``FeedForward`` where it runs in chunks."""
    return in_chunks(lambda x: type(self).forward(self, x), hidden_states, self.chunk)


def _rope_forward(self: Any, hidden_states: torch.Tensor) -> Rope:
    """Replaces ``WanRotaryPosEmbed.forward``: the compact table instead of [L, head_dim] cosines
    and sines.
    """
    sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
    grid = [size // patch for size, patch in sizes]
    return Rope.from_grid(grid, self.attention_head_dim, device=hidden_states.device)


def _targets(base: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """What :func:`prfl_fast.patch` replaces, and by what."""
    return [(block, _block_forward) for block in base.blocks] + [(base.rope, _rope_forward)]


class WanDiffusersAdapter:
    """Adapter of diffusers' ``WanTransformer3DModel``."""

    name = f"diffusers {_CLASS}"

    def matches(self, model: nn.Module) -> bool:
        """True for the diffusers class, its subclasses, and wrappers around them."""
        return any(
            c.__name__ == _CLASS and c.__module__.startswith("diffusers.")
            for c in type(unwrap(model)).__mro__
        )

    def patch(self, model: nn.Module) -> None:
        """Give every block and the rotary embedding our forward, per instance; parameters are not
        touched.

        Raises:
            ValueError: a block uses another attention processor, context parallelism, or a forward
                of its own.
        """
        base: Any = unwrap(model)
        todo = [
            (m, f)
            for m, f in _targets(base)
            if getattr(m.__dict__.get("forward"), "__func__", None) is not f
        ]
        for module, _ in todo:
            if "forward" in module.__dict__:
                raise ValueError(
                    f"{type(module).__name__} already has a forward of its own (a hook of "
                    "accelerate?), expected the class's; remove the hook, patch, then add it again"
                )
        for index, block in enumerate(base.blocks):
            for name in ("attn1", "attn2"):
                processor = getattr(block, name).processor
                if type(processor).__name__ != "WanAttnProcessor":
                    raise ValueError(
                        f"blocks.{index}.{name} has attention processor "
                        f"{type(processor).__name__}, expected WanAttnProcessor; call "
                        "model.set_attn_processor(WanAttnProcessor()) first"
                    )
                if getattr(processor, "_parallel_config", None) is not None:
                    raise ValueError(
                        f"blocks.{index}.{name} runs context-parallel, expected one device; call "
                        "prfl_fast.patch before enable_parallelism is used, or not at all"
                    )
        for module, forward in todo:
            module.forward = types.MethodType(forward, module)

    def unpatch(self, model: nn.Module) -> None:
        """Take our forwards away again; a model that is not patched is left alone."""
        base: Any = unwrap(model)
        for module in (*base.blocks, base.rope):
            if getattr(module.__dict__.get("forward"), "__func__", None) in (
                _block_forward,
                _rope_forward,
            ):
                del module.forward

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Run the feed-forward of every block ``tokens`` at a time, see
        :func:`prfl_fast.chunks.in_chunks`; None undoes it. The last call wins.

        Raises:
            ValueError: ``tokens`` is not positive, or a feed-forward has a forward of its own.
        """
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens is {tokens}, expected a positive number or None")
        layers = [block.ffn for block in unwrap(model).blocks]  # type: ignore[union-attr]
        for layer in layers:
            forward = layer.__dict__.get("forward")
            if forward is not None and getattr(forward, "__func__", None) is not _feed_forward:
                raise ValueError(
                    f"{type(layer).__name__} already has a forward of its own (a hook of "
                    "accelerate?), expected the class's; remove the hook first"
                )
        for layer in layers:
            if tokens is not None:
                layer.chunk, layer.forward = tokens, types.MethodType(_feed_forward, layer)
            elif "forward" in layer.__dict__:
                del layer.chunk, layer.forward

    def checkpoint_blocks(self, model: nn.Module, run: Callable[..., torch.Tensor] | None) -> None:
        """With gradients enabled, call every block as ``run(block, *args)``; None: as it was built.

        ``args`` are the residual stream ``[B, L, D]`` and what all blocks share.
        """
        base: Any = unwrap(model)
        if run is None:
            base.disable_gradient_checkpointing()
        else:
            base.enable_gradient_checkpointing(run)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The transformer blocks, in order."""
        return unwrap(model).blocks  # type: ignore[return-value]

    def hidden_size(self, model: nn.Module) -> int:
        """D, the width of the residual stream."""
        return unwrap(model).patch_embedding.out_channels  # type: ignore[return-value, union-attr]

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Patch, text, time and image embeddings: what stays frozen in a reward model."""
        base: Any = unwrap(model)
        return [base.patch_embedding, base.condition_embedder]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: dict[str, torch.Tensor]
    ) -> None:
        """Check latents and conditions against the model before any work.

        Raises:
            ValueError: names the argument, what came and what is expected.
        """
        config: Any = unwrap(model).config
        if not isinstance(conditions, dict) or "encoder_hidden_states" not in conditions:
            came = sorted(conditions) if isinstance(conditions, dict) else type(conditions).__name__
            raise ValueError(
                f"conditions is {came}, expected a dict with 'encoder_hidden_states' [B, T, C]"
            )
        known = {"encoder_hidden_states", "encoder_hidden_states_image", "latent_condition"}
        if set(conditions) - known:
            raise ValueError(
                f"conditions has {sorted(set(conditions) - known)}, expected keys {sorted(known)}"
            )
        for name, value in conditions.items():
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
                raise ValueError(
                    f"conditions[{name!r}] is {kind}, expected a floating-point tensor"
                )
        extra = conditions.get("latent_condition")
        if extra is not None and extra.ndim != 5:
            raise ValueError(
                f"conditions['latent_condition'] is {list(extra.shape)}, expected [B, C, F, H, W]"
            )
        if x.ndim != 5 or not x.is_floating_point():
            raise ValueError(
                f"latents are {x.dtype} {list(x.shape)}, expected floating-point [B, C, F, H, W]"
            )
        channels = x.shape[1] + (extra.shape[1] if extra is not None else 0)
        if channels != config.in_channels:
            raise ValueError(
                f"latents have {x.shape[1]} channels"
                + (f" and latent_condition {extra.shape[1]}" if extra is not None else "")
                + f", expected {config.in_channels} together (the model's in_channels)"
            )
        for axis, size, patch in zip("FHW", x.shape[2:], config.patch_size, strict=True):
            if size % patch or size == 0:
                raise ValueError(
                    f"latents have {axis} = {size}, expected a multiple of the patch size {patch}"
                )
            if size // patch > config.rope_max_seq_len:
                limit = patch * config.rope_max_seq_len
                raise ValueError(
                    f"latents have {axis} = {size}, expected at most {limit} (rope_max_seq_len)"
                )
        for name, value in conditions.items():
            if value.shape[0] != x.shape[0]:
                raise ValueError(
                    f"conditions[{name!r}] has batch {value.shape[0]}, expected {x.shape[0]}"
                )
            if value.device != x.device:
                raise ValueError(f"conditions[{name!r}] is on {value.device}, expected {x.device}")
        text = conditions["encoder_hidden_states"]
        if text.ndim != 3 or text.shape[-1] != config.text_dim:
            raise ValueError(
                f"conditions['encoder_hidden_states'] is {list(text.shape)}, "
                f"expected [B, T, {config.text_dim}]"
            )
        image = conditions.get("encoder_hidden_states_image")
        if (image is None) != (config.image_dim is None):
            raise ValueError(
                "conditions has no 'encoder_hidden_states_image', expected [B, N, "
                f"{config.image_dim}]: this is an image-to-video model"
                if image is None
                else "conditions has 'encoder_hidden_states_image', but the model takes no image"
            )
        if image is not None and (image.ndim != 3 or image.shape[-1] != config.image_dim):
            raise ValueError(
                f"conditions['encoder_hidden_states_image'] is {list(image.shape)}, "
                f"expected [B, N, {config.image_dim}]"
            )
        if extra is not None and extra.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"conditions['latent_condition'] is {list(extra.shape)}, "
                f"expected [B, C, *{list(x.shape[2:])}]"
            )

    def _inputs(
        self,
        base: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        dtype = base.patch_embedding.weight.dtype
        latents = [x] + (
            [conditions["latent_condition"]] if "latent_condition" in conditions else []
        )
        image = conditions.get("encoder_hidden_states_image")
        timestep = timestep.to(x.device)
        return (
            torch.cat([part.to(dtype) for part in latents], dim=1),
            timestep.expand(x.shape[0]) if timestep.ndim == 0 else timestep,
            conditions["encoder_hidden_states"].to(dtype),
            None if image is None else image.to(dtype),
        )

    def velocity(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Velocity ``[B, C, F, H, W]`` in ``x.dtype``; timestep 1000·σ: ``[]``, ``[B]`` or per
        token ``[B, L]``.
        """
        latents, timestep, text, image = self._inputs(unwrap(model), x, timestep, conditions)
        (out,) = model(
            latents, timestep, text, encoder_hidden_states_image=image, return_dict=False
        )
        return out.to(x.dtype)

    def open_rollout(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: dict[str, torch.Tensor],
        *,
        merge_lora: bool = False,
        compile: bool = False,
    ) -> RolloutModel:
        """The model for one rollout, with everything computed that no step changes.

        Call it under the autocast of the rollout; see :mod:`prfl_fast.rollout_block`.

        Args:
            x: latents ``[B, C, F, H, W]``, for their shape, dtype and device.
            timesteps: ``[B]`` each, 1000·σ of every step.
            merge_lora: run LoRA as part of the matrices it is on.
            compile: run the blocks through ``torch.compile``.

        Raises:
            Unsupported: the model is not patched, compiled as a whole, or has hooks; the message
                says which and what to do.
            ValueError: latents, timesteps or conditions of the wrong shape.
        """
        base: Any = unwrap(model)
        for module, forward in _targets(base):
            own = module.__dict__.get("forward")
            if own is None:
                raise Unsupported(
                    "the model is not patched, expected one that runs on prfl_fast's kernels; call "
                    "prfl_fast.patch(model)"
                )
            if getattr(own, "__func__", None) is not forward:
                raise Unsupported(
                    f"{type(module).__name__} has a forward of its own over prfl_fast's (a hook of "
                    "accelerate or of diffusers?); remove the hook"
                )
        if not type(base).forward.__module__.startswith("diffusers."):
            raise Unsupported(
                f"{type(base).__name__} has a forward that is not diffusers', which may use its "
                "embeddings in another way"
            )
        check_rollout(
            list(layers_of(model)), (_block_forward, _rope_forward, _feed_forward), compile
        )
        self.check_latents(model, x, conditions)
        if len(timesteps) == 0:
            raise ValueError("timesteps is empty, expected one of every step")
        for index, timestep in enumerate(timesteps):
            if not isinstance(timestep, torch.Tensor) or timestep.shape != x.shape[:1]:
                raise ValueError(
                    f"timesteps[{index}] is {describe(timestep)}, expected shape [{len(x)}], the "
                    "latents' batch"
                )
        return self._open(model, x, list(timesteps), conditions, merge_lora, compile)

    @torch.no_grad()
    def _open(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: list[torch.Tensor],
        conditions: dict[str, torch.Tensor],
        merge_lora: bool,
        compile: bool,
    ) -> RolloutModel:
        base: Any = unwrap(model)
        embedder = base.condition_embedder
        latents, _, raw_text, raw_image = self._inputs(base, x, timesteps[0], conditions)
        rope = base.rope(latents)
        text = embedder.text_embedder(raw_text)
        image = None if raw_image is None else embedder.image_embedder(raw_image)
        # The class's own forward computes the time rows, one timestep at a time: products of
        # another batch size round otherwise.
        known = [(embedder.text_embedder, lambda *_: text)]
        if image is not None:
            known.append((embedder.image_embedder, lambda *_: image))
        with replaced_forwards(known):
            times = [embedder(t.to(x.device), raw_text, raw_image)[:2] for t in timesteps]
        context = text if image is None else torch.cat([image, text], dim=1)

        def cached(step: int) -> list[tuple[nn.Module, Callable[..., Any]]]:
            return [
                (embedder, lambda *_, **__: (*times[step], text, image)),
                (base.rope, lambda _: rope),
            ]

        return RolloutModel(
            lambda x, step: self.velocity(model, x, timesteps[step], conditions),
            x,
            blocks=list(base.blocks),
            parts=_parts,
            keys=[context_keys(block.attn2, context) for block in base.blocks],
            cached=cached,
            modulation=_modulation,
            steps=len(timesteps),
            merge_lora=merge_lora,
            compile=compile,
        )

    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        num_blocks: int,
    ) -> torch.Tensor:
        """The residual stream ``[B, L, D]`` after block ``num_blocks``; later blocks and the head
        do not run.
        """
        base: Any = unwrap(model)
        latents, timestep, text, image = self._inputs(base, x, timestep, conditions)
        tokens_per_sample = timestep.shape[1] if timestep.ndim == 2 else None
        _, time, text, image = base.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=tokens_per_sample
        )
        time = time.unflatten(-1, (6, -1))
        context = text if image is None else torch.cat([image, text], dim=1)
        rope = base.rope(latents)
        h = base.patch_embedding(latents).flatten(2).transpose(1, 2).contiguous()
        for block in base.blocks[:num_blocks]:
            if torch.is_grad_enabled() and base.gradient_checkpointing:
                h = base._gradient_checkpointing_func(block, h, context, time, rope)
            else:
                h = block(h, context, time, rope)
        return h

    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module:
        """A deep copy of the embeddings and the first blocks, without the head; patched if the
        source is.

        Raises:
            ValueError: ``num_blocks`` is not between 1 and the model's number of blocks.
        """
        base: Any = unwrap(model)
        if not 1 <= num_blocks <= len(base.blocks):
            raise ValueError(
                f"num_blocks is {num_blocks}, expected 1 to {len(base.blocks)} (the model's blocks)"
            )
        # What the memo holds is taken instead of being copied: the unused blocks and the head cost
        # no memory.
        memo = {
            id(base.blocks): nn.ModuleList(
                copy.deepcopy(block) for block in base.blocks[:num_blocks]
            ),
            id(base.norm_out): nn.Identity(),
            id(base.proj_out): nn.Identity(),
        }
        return self._headless(copy.deepcopy(base, memo), num_blocks)

    def _headless(self, base: Any, num_blocks: int) -> nn.Module:
        base.norm_out = base.proj_out = nn.Identity()
        del base.scale_shift_table
        base.register_to_config(num_layers=num_blocks)
        for parameter in base.parameters():
            parameter.grad = None
        return base

    def backbone_config(self, model: nn.Module) -> dict[str, Any]:
        """What :meth:`backbone_from_config` needs, as plain JSON values."""
        base: Any = unwrap(model)
        config = dict(base.config)
        return {
            k: list(v) if isinstance(v, tuple) else v
            for k, v in config.items()
            if not k.startswith("_")
        }

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """A randomly initialised headless backbone of that configuration.

        Raises:
            ValueError: diffusers is missing or does not take the configuration.
        """
        try:
            from diffusers import WanTransformer3DModel
        except ImportError as error:
            raise ValueError(
                "reading a Wan reward model needs diffusers: pip install prfl_fast[train]"
            ) from error
        try:
            base = WanTransformer3DModel(**config)
        except TypeError as error:
            raise ValueError(f"backbone config does not fit {_CLASS}: {error}") from error
        return self._headless(base, config["num_layers"])

    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Official Wan's parameter names (``blocks.0.self_attn.q.weight``) for diffusers' ones."""
        return {_rename(key, to_reference=True): value for key, value in state.items()}

    def reference_config(self, model: nn.Module) -> dict[str, Any]:
        """Official Wan's ``config.json`` for this model, without the defaults that no released Wan
        changes.
        """
        config: Any = unwrap(model).config
        kind = (
            "t2v"
            if config.image_dim is None
            else "i2v"
            if config.pos_embed_seq_len is None
            else "flf2v"
        )
        return {
            "_class_name": "WanModel",
            "model_type": kind,
            "patch_size": list(config.patch_size),
            "text_len": TEXT_TOKENS,
            "in_dim": config.in_channels,
            "dim": self.hidden_size(model),
            "ffn_dim": config.ffn_dim,
            "freq_dim": config.freq_dim,
            "text_dim": config.text_dim,
            "out_dim": config.out_channels,
            "num_heads": config.num_attention_heads,
            "num_layers": config.num_layers,
            "cross_attn_norm": config.cross_attn_norm,
            "eps": config.eps,
        }

    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """diffusers' parameter names for official Wan's ones."""
        return {_rename(key, to_reference=False): value for key, value in state.items()}
