"""Adapter of Wan models in the official layout, found by their structure.

Wan2.1, Wan2.2, HY-Video-PRFL, VideoX-Fun, DiffSynth-Studio and musubi-tuner have this layout: their
parameters have the same names.
"""

import functools
import inspect
import json
import math
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prfl_fast.models import wan_weights
from prfl_fast.models.adapter import (
    FIRST_FRAME,
    Conditions,
    check_timesteps,
    not_inference,
    set_first_frame,
    zero_first_frame,
)
from prfl_fast.models.block_adapter import BlockAdapter, Replacements
from prfl_fast.models.blocks import block_keys
from prfl_fast.models.conditions import IMAGE, LATENT, TEXT
from prfl_fast.models.inference import (
    RolloutModel,
    RolloutOptions,
    UnsupportedError,
    check_rollout,
    replaced_forwards,
)
from prfl_fast.models.official_forward import (
    CHILDREN,
    OWN_FORWARDS,
    BlockInputs,
    block_forward,
    block_inputs,
    block_modulation,
    block_parts,
    blocks_of,
    head_forward,
    is_known_block,
    is_sequence_parallel,
    model_forward,
    time_forward,
    why_not_fused,
)
from prfl_fast.models.wan_checks import check_wan_inputs
from prfl_fast.models.wan_forward import text_rows, token_timesteps
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import (
    instance_forward,
    layers_of,
    stopped_at,
    unwrap,
)

_EMBEDDINGS = ("patch_embedding", "text_embedding", "time_embedding", "time_projection")


def _base_layer(module: Any) -> Any:
    """Return a linear layer or convolution without the adapters of peft."""
    return getattr(module, "base_layer", module)


def diffusers_config(model: nn.Module) -> dict[str, Any]:
    """Return diffusers' configuration of this transformer, with its present ``num_layers``."""
    base: Any = unwrap(model)
    block, blocks = blocks_of(base)[0], base.blocks
    patch, text = _base_layer(base.patch_embedding), _base_layer(base.text_embedding[0])
    heads, dim = block.self_attn.num_heads, patch.out_channels
    image = getattr(base, "img_emb", None)
    frames = getattr(image, "emb_pos", None)
    head = getattr(base.head, "head", None)
    out = getattr(base, "out_dim", 16)
    if head is not None:
        out = _base_layer(head).out_features // math.prod(base.patch_size)
    config = {
        "patch_size": list(base.patch_size),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "in_channels": patch.in_channels,
        "out_channels": out,
        "text_dim": text.in_features,
        "freq_dim": _base_layer(base.time_embedding[0]).in_features,
        "ffn_dim": _base_layer(block.ffn[0]).out_features,
        "num_layers": len(blocks),
        "cross_attn_norm": getattr(block.norm3, "weight", None) is not None,
        "eps": block.norm1.eps,
    }
    if image is not None:
        config |= {"image_dim": image.proj[0].normalized_shape[0], "added_kv_proj_dim": dim}
    if frames is not None:
        config["pos_embed_seq_len"] = frames.shape[1]
    return config


def _as_diffusers(base: Any) -> Any:
    """Return an object with the attributes that the checks of diffusers' Wan read."""
    optional = {"image_dim": None, "pos_embed_seq_len": None, "rope_max_seq_len": 1024}
    config = SimpleNamespace(**{**optional, **diffusers_config(base)})
    return SimpleNamespace(config=config, text_tokens=getattr(base, "text_len", 512))


class WanOfficialAdapter(BlockAdapter):
    """Adapter of the official Wan layout; see :class:`prfl_fast.models.Adapter`."""

    name = "official Wan layout"
    own_forwards = OWN_FORWARDS

    def matches(self, model: nn.Module) -> bool:
        """Return True for a model with the layout's embeddings and blocks."""
        base: Any = unwrap(model)
        blocks = getattr(base, "blocks", None)
        if not (isinstance(blocks, nn.ModuleList) and len(blocks)) or not all(
            isinstance(getattr(base, name, None), nn.Module) for name in _EMBEDDINGS
        ):
            return False
        block = blocks_of(base)[0]
        return set(CHILDREN) <= set(block._modules) and "modulation" in block._parameters

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of blocks, time embedding, head and model."""
        pairs: Replacements = [(block, block_forward) for block in blocks_of(base)]
        pairs += [(base.time_embedding, time_forward), (base, model_forward)]
        # HY-Video-PRFL sets the head of its reward's transformer to None.
        head = getattr(base, "head", None)
        return pairs if head is None else [*pairs, (head, head_forward)]

    def check_patchable(self, base: Any) -> None:
        """Raise ``ValueError`` for other blocks, sequence parallelism or replaced forwards."""
        for index, block in enumerate(blocks_of(base)):
            if not is_known_block(block):
                kind = type(block)
                raise ValueError(
                    f"blocks.{index} is a {kind.__module__}.{kind.__qualname__}, expected a block "
                    "with the forward of Wan2.1, Wan2.2, VideoX-Fun, DiffSynth-Studio or "
                    "musubi-tuner"
                )
            attn = block.self_attn
            if "forward" in attn.__dict__ or is_sequence_parallel(attn):
                raise ValueError(
                    f"blocks.{index}.self_attn splits the sequence over ranks or has a replaced "
                    "forward, which a patched block would not call. Do not patch this model"
                )
        super().check_patchable(base)

    def patch(self, model: nn.Module) -> None:
        """Set our forwards on this instance; raise ``ValueError`` of :meth:`check_patchable`."""
        super().patch(model)
        unwrap(model).time_embedding.rows = None  # type: ignore[union-attr]

    def unpatch(self, model: nn.Module) -> None:
        """Delete our forwards. An unpatched model does not change."""
        super().unpatch(model)
        unwrap(model).time_embedding.__dict__.pop("rows", None)

    def is_patched(self, model: nn.Module) -> bool:
        """Return True if every block runs our forward."""
        return all(instance_forward(b) is block_forward for b in blocks_of(unwrap(model)))

    def feed_forwards(self, base: Any) -> list[Any]:
        """Return the feed-forward of every block."""
        return [block.ffn for block in blocks_of(base)]

    def head_modules(self, base: Any) -> list[nn.Module]:
        """Return the head."""
        return [base.head]

    def remove_head(self, base: Any, num_blocks: int) -> None:
        """Replace the head by a module without parameters."""
        patched = instance_forward(base) is model_forward
        base.head = nn.Identity()
        base.num_layers = num_blocks
        if patched:
            self.patch(base)

    def hidden_size(self, model: nn.Module) -> int:
        """Return D, the width of the residual stream."""
        return blocks_of(unwrap(model))[0].modulation.shape[-1]

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return patch, text, time and image embeddings, which a reward model keeps frozen."""
        base: Any = unwrap(model)
        names = (*_EMBEDDINGS, "img_emb", "ref_conv", "control_adapter")
        found = [getattr(base, name, None) for name in names]
        return [module for module in found if module is not None]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        base: Any = unwrap(model)
        check_wan_inputs(_as_diffusers(base), x, conditions, name)
        names = inspect.signature(type(base).forward).parameters
        # Wan2.1's sinusoid takes [B]; Wan2.2, VideoX-Fun and musubi-tuner's 2.2 take [B, L] too.
        ok = _is_diffsynth(base) or "y_camera" in names or "clip_fea" not in names
        ok = ok or getattr(base, "model_version", "2.1") == "2.2"
        expected = f"no {FIRST_FRAME}: this Wan takes one timestep for each sample"
        check(ok or FIRST_FRAME not in conditions, "conditions", sorted(conditions), expected)

    def _arguments(
        self, base: Any, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> dict[str, Any]:
        """Return the arguments of the model's forward."""
        x, conditions = not_inference(x), not_inference(conditions)
        x = set_first_frame(x, conditions)
        dtype = _base_layer(base.patch_embedding).weight.dtype
        like = _as_diffusers(base)
        tokens = math.prod(size // p for size, p in zip(x.shape[2:], base.patch_size, strict=True))
        text = conditions[TEXT].to(dtype)
        text = functional.pad(text, (0, 0, 0, text_rows(like, text) - text.shape[1]))
        timestep = timestep.to(x.device)
        timestep = timestep.expand(len(x)) if timestep.ndim == 0 else timestep
        if FIRST_FRAME in conditions and timestep.ndim == 1:
            timestep = token_timesteps(x, timestep, base.patch_size)
        given: dict[str, Any] = {"x": x.to(dtype), "context": text}
        if LATENT in conditions:
            given["y"] = conditions[LATENT].to(dtype)
        image = conditions.get(IMAGE)
        if _is_diffsynth(base):
            given["timestep"] = timestep
            if image is not None:
                given["clip_feature"] = image.to(dtype)
            return given
        # Wan2.2's forward takes timesteps [B] only for B = 1, so every token gets its timestep.
        names = inspect.signature(type(base).forward).parameters
        if timestep.ndim == 1 and "t" in names and "clip_fea" not in names:
            timestep = timestep[:, None].expand(-1, tokens)
        given |= {"t": timestep, "seq_len": tokens}
        if image is not None:
            if like.config.pos_embed_seq_len is not None:  # its embedding joins two images
                image = image.reshape(2 * len(x), -1, image.shape[-1])
            given["clip_fea"] = image.to(dtype)
        return given

    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the velocity ``[B, C, F, H, W]`` in ``x.dtype``.

        Args:
            x: latents ``[B, C, F, H, W]``.
            timestep: 1000·σ, ``[]``, ``[B]``, or ``[B, L]`` per token.
            conditions: see :meth:`check_latents`.
        """
        base: Any = unwrap(model)
        given = self._arguments(base, x, timestep, conditions)
        with replaced_forwards(_working_forward(base)):
            out = model(**given)
        out = out if isinstance(out, torch.Tensor) else torch.stack(out)
        return zero_first_frame(out.to(x.dtype), conditions)

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
        if hasattr(base, "cfg_skip_ratio") and len(x) > 1 and not torch.is_grad_enabled():
            # VideoX-Fun's forward takes the batch as guidance then, and runs it in halves.
            times = timestep.expand(len(x)) if timestep.ndim == 0 else timestep
            found = []
            for i in range(len(x)):
                given = {name: value[i : i + 1] for name, value in conditions.items()}
                found.append(self.features(base, x[i : i + 1], times[i : i + 1], given, num_blocks))
            return torch.cat(found)
        skipped = [(block, _same) for block in base.blocks[num_blocks:]]
        return self._head_input(base, x, timestep, conditions, skipped)

    def _head_input(
        self,
        base: Any,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        forwards: Sequence[tuple[nn.Module, Callable[..., Any]]],
    ) -> torch.Tensor:
        """Run the model's forward with other forwards up to the head; return the head's input."""
        if base.head is None:
            base.head = nn.Identity()
        with (
            replaced_forwards(forwards),
            stopped_at(base.head.register_forward_pre_hook) as found,
        ):
            self.velocity(base, x, timestep, conditions)
        return found[0][0]  # type: ignore[no-any-return]

    def open_rollout(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timesteps: Sequence[torch.Tensor],
        conditions: Conditions,
        options: RolloutOptions = RolloutOptions(),  # noqa: B008 - frozen
    ) -> RolloutModel:
        """Return the patched model opened for one rollout, with its caches computed.

        Arguments and errors are those of the adapter of diffusers' Wan.
        """
        base: Any = unwrap(model)
        self._check_rollout(base, len(x))
        check_rollout(list(layers_of(model)), OWN_FORWARDS, options.compile)
        self.check_latents(model, x, conditions)
        check_timesteps(timesteps, len(x))
        timesteps = list(timesteps)
        shared = [base.text_embedding, getattr(base, "img_emb", None)]
        times = [base.time_embedding, base.time_projection]
        values: dict[nn.Module, list[Any]] = {m: [] for m in (*shared, *times) if m is not None}
        first: list[BlockInputs] = []

        def recording(module: Any) -> tuple[nn.Module, Callable[..., Any]]:
            forward = module.forward

            def run(*args: Any) -> Any:
                values[module].append(forward(*args))
                return values[module][-1]

            return module, run

        def take(block: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            inputs = block_inputs(block, *args, **kwargs)
            if isinstance(inputs, str):
                raise UnsupportedError(f"{inputs}, so blocks run their own forward")
            first.append(inputs)
            return args[0]

        blocks = blocks_of(base)
        adapter = options.open_adapter(base, blocks, x.device)
        # The model's forward computes the time rows for one timestep at a time, because a batched
        # product rounds differently.
        with torch.no_grad(), replaced_forwards(adapter.outside()):
            forwards = [recording(module) for module in values]
            forwards.append((blocks[0], functools.partial(take, blocks[0])))
            forwards += [(block, _same) for block in blocks[1:]]
            for timestep in timesteps:
                self._head_input(base, x, timestep, conditions, forwards)
            cross = lambda block: block_parts(block).cross  # noqa: E731
            keys = block_keys(blocks, cross, first[0].context, adapter.within)

        def cached(step: int) -> list[tuple[nn.Module, Callable[..., Any]]]:
            return [
                (module, lambda *_, out=outs[step]: out) for module, outs in values.items() if outs
            ]

        opened = RolloutModel(
            functools.partial(self.velocity, model, conditions=conditions),
            x,
            blocks=blocks,
            parts=block_parts,
            keys=keys,
            cached=cached,
            modulation=block_modulation,
            timesteps=timesteps,
            options=options,
            inputs=_rollout_inputs,
        )
        opened.adapter = adapter
        return opened

    def _check_rollout(self, base: Any, batch: int) -> None:
        if not self.is_patched(base):
            raise UnsupportedError("the model is not patched. Call prfl_fast.patch(model)")
        for index, block in enumerate(blocks_of(base)):
            if reason := why_not_fused(block):
                raise UnsupportedError(
                    f"blocks.{index}: {reason}, so the block runs its own forward"
                )
        for name in ("teacache", "cfg_skip_ratio", "blocks_to_swap", "enable_teacache"):
            # VideoX-Fun has a method of the name enable_teacache.
            if (value := getattr(base, name, None)) and not callable(value):
                raise UnsupportedError(f"{name} is on, so the model skips or moves blocks itself")
        if hasattr(base, "cfg_skip_ratio") and batch > 1:
            raise UnsupportedError("VideoX-Fun runs a batch in halves if no gradient is needed")

    def backbone_config(self, model: nn.Module) -> dict[str, Any]:
        """Return the configuration for :meth:`backbone_from_config` as plain JSON values."""
        base: Any = unwrap(model)
        return {
            **diffusers_config(base),
            "module": type(base).__module__,
            "class": type(base).__qualname__,
            "arguments": _init_arguments(base),
        }

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """Build a randomly initialized headless backbone of that configuration.

        Raise ``ValueError`` if the class is not imported or does not take the configuration.
        """
        module, name = config["module"], config["class"]
        # A file must not choose which module is imported.
        kind = getattr(sys.modules.get(module), name, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ValueError(
                f"backbone is a {name} of {module}, expected an imported module. Import it"
            )
        try:
            base = kind(**{**config["arguments"], "num_layers": config["num_layers"]})
        except TypeError as error:
            raise ValueError(f"backbone config does not fit {name}: {error}") from error
        if not self.matches(base):
            raise ValueError(f"backbone is a {name} of {module}, expected the {self.name}")
        return self._headless(base, config["num_layers"])

    def reference_config(self, model: nn.Module) -> dict[str, Any]:
        """Return official Wan's ``config.json`` for this model."""
        return wan_weights.reference_config(
            _as_diffusers(unwrap(model)).config, self.hidden_size(model)
        )


def _same(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x


def _rollout_inputs(block: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
    inputs = block_inputs(block, *args, **kwargs)
    assert not isinstance(inputs, str), inputs
    return inputs.x, inputs.e, inputs.rope


def _working_forward(base: Any) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """Return a working forward of DiffSynth-Studio's model, whose own fails; else nothing."""
    return [(base, functools.partial(_diffsynth_forward, base))] if _is_diffsynth(base) else []


def _is_diffsynth(base: Any) -> bool:
    """Return True for DiffSynth-Studio's model, which has one rotary table per axis."""
    return isinstance(base.freqs, tuple)


def _diffsynth_forward(
    base: Any, x: Any, timestep: Any, context: Any, clip_feature: Any = None, y: Any = None
) -> torch.Tensor:
    """Compute DiffSynth-Studio's ``model_fn_wan_video`` of latents, text, image and ``y``."""
    half = torch.arange(base.freq_dim // 2, dtype=torch.float64, device=x.device)
    angles = timestep.double().unsqueeze(-1) * 10000.0 ** -(half / len(half))
    e = base.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=-1).to(x.dtype))
    time = base.time_projection(e).unflatten(-1, (6, -1))  # [B, 6, D] or [B, L, 6, D]
    context = base.text_embedding(context)
    if clip_feature is not None:
        context = torch.cat([base.img_emb(clip_feature), context], dim=1)
    x = base.patch_embedding(x if y is None else torch.cat([x, y], dim=1))
    grid = x.shape[2:]
    axes = [
        table[:size].reshape([-1 if i == axis else 1 for i in range(3)] + [table.shape[1]])
        for axis, (table, size) in enumerate(zip(base.freqs, grid, strict=True))
    ]
    freqs = torch.cat([part.expand(*grid, -1) for part in axes], dim=-1).flatten(0, 2)
    freqs = freqs.unsqueeze(1).to(x.device)
    x = x.flatten(2).transpose(1, 2).contiguous()
    for block in base.blocks:
        x = block(x, context, time, freqs)
    return base.unpatchify(base.head(x, e), tuple(grid))


def _init_arguments(base: Any) -> dict[str, Any]:
    """Return the arguments with which the class builds this model, as plain JSON values."""
    like, config = diffusers_config(base), dict(getattr(base, "config", {}))
    heads = like["num_attention_heads"]
    known = {name: like[name] for name in ("patch_size", "text_dim", "freq_dim", "ffn_dim", "eps")}
    known |= {"dim": heads * like["attention_head_dim"], "num_heads": heads}
    known |= {"in_dim": like["in_channels"], "out_dim": like["out_channels"]}
    known |= {"cross_attn_norm": like["cross_attn_norm"]}
    found: dict[str, Any] = {}
    parameters = inspect.signature(type(base).__init__).parameters
    for name, parameter in parameters.items():
        value = known.get(name, config.get(name, getattr(base, name, parameter.default)))
        value = list(value) if isinstance(value, tuple) else value
        try:
            json.dumps(value)
        except TypeError:
            continue
        if name not in ("self", "num_layers"):
            found[name] = value
    return found
