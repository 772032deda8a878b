"""Forwards that replace those of diffusers' Wan modules, and the inputs of the whole model."""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from prfl_fast.kernels import norm_modulate
from prfl_fast.kernels.common.rope import rotations
from prfl_fast.models.adapter import FIRST_FRAME, not_inference, set_first_frame
from prfl_fast.models.block_adapter import feed_forward_in_chunks
from prfl_fast.models.blocks import (
    TEXT_TOKENS,
    BlockParts,
    Modulation,
    Rope,
    known_parts,
    transformer_block,
)
from prfl_fast.models.sequence import (
    SequenceShards,
    head_forward,
    latents_forward,
    own_tokens,
    shards_of,
)
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import customization, instance_forward

PROCESSORS = ("WanAttnProcessor", "SkyReelsV2AttnProcessor")
# Blocks with Wan's structure, and the classes that FSDP2 derives from them.
_BLOCKS: tuple[str, ...] = (
    "WanTransformerBlock",
    "WanVACETransformerBlock",
    "SkyReelsV2TransformerBlock",
)
_BLOCKS += tuple(f"FSDP{name}" for name in _BLOCKS)
# Modules of these packages have the forwards that the kernels replace.
_LIBRARIES = ("diffusers", "torch")
_found_in_library: dict[Any, bool] = {}
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
    """Return a block's modulation.

    ``temb`` is ``[B, 6, D]``, ``[B·F, 6, D]`` per frame, or ``[B, R, 6, D]`` for R equal parts of
    the tokens.
    """
    return Modulation(
        block.scale_shift_table.squeeze(0), temb.flatten(0, 1) if temb.ndim == 4 else temb
    )


def is_library(function: Any) -> bool:
    """Return True for a function of diffusers or torch, and under dynamo, which cannot tell."""
    if torch.compiler.is_compiling():
        return True
    found = _found_in_library.get(function)  # a block asks about 15 functions at each call
    if found is None:
        found = _found_in_library[function] = function.__module__.split(".")[0] in _LIBRARIES
    return found


def customized(name: str, module: Any, kinds: tuple[str, ...], own: object = None) -> str:
    """Return why the kernels cannot replace a module; ``""`` if they can."""
    kind = type(module)
    # FSDP2 changes a module's class; peft and users replace the module. A user's class may have the
    # name of diffusers' class, and any class may have a user's forward.
    if kind.__name__ not in kinds or not is_library(kind.forward):
        return f"{name} is a {kind.__module__}.{kind.__name__}, expected the library's {kinds[0]}"
    found = customization(module, own)
    return found and f"{name} has {found}"


def _customized_attention(name: str, attn: Any) -> str:
    if reason := customized(name, attn, ("WanAttention", "SkyReelsV2Attention")):
        return reason
    kind = type(attn.processor)
    if kind.__name__ not in PROCESSORS or not is_library(kind.__call__):
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
        if reason := customized(f"{name}.{part}", norm, ("RMSNorm",)):
            return reason
        if getattr(norm, "weight", None) is None or norm.eps != parts["norm_q"].eps:
            return f"{name}.{part} has no weight, or another eps than norm_q"
    return ""


def why_not_fused(block: Any) -> str:
    """Return why a block must run its class's forward, ``""`` if it can run on the kernels.

    The kernels do not call norms, attention processors and the feed-forward, so hooks and forwards
    that users, peft, accelerate or FSDP2 set on these submodules would not run. Raise
    ``ValueError`` if context parallelism was enabled after patching.
    """
    # FSDP2 derives a class with diffusers' forward; a user's subclass may have another forward.
    kind = type(block)
    if kind.__name__ not in _BLOCKS or not is_library(kind.forward):
        return f"forward is that of {kind.__module__}.{kind.__name__}"
    # Every block call pays for this check, and a module's attributes go through __getattr__.
    parts = block._modules
    if reason := customized("norm2", parts.get("norm2"), ("FP32LayerNorm", "Identity")):
        return reason
    for name in ("norm1", "norm3"):
        norm = parts.get(name)
        if reason := customized(name, norm, ("FP32LayerNorm",)):
            return reason
        if norm._parameters["weight"] is not None:
            return f"{name} has a weight"
    for name in ("attn1", "attn2"):
        if reason := _customized_attention(name, parts.get(name)):
            return reason
    ffn = parts.get("ffn")
    if reason := customized("ffn", ffn, ("FeedForward",), feed_forward_in_chunks):
        return reason
    layers = list(ffn.net)
    if len(layers) != 3:
        return f"ffn.net has {len(layers)} layers, expected 3"
    gelu, dropout, _ = layers
    if reason := customized("ffn.net.0", gelu, ("GELU",)):
        return reason
    if gelu.approximate != "tanh":
        return f"ffn.net.0 has approximate={gelu.approximate!r}"
    reason = customized("ffn.net.1", dropout, ("Dropout", "Identity"))
    if not reason and dropout.training and getattr(dropout, "p", 0) > 0:
        return f"ffn.net.1 has dropout p={dropout.p} in train mode"
    return reason


def rotary_tables(rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return our table as diffusers' cosines and sines, float32 ``[1, L, 1, head_dim]`` each."""
    assert rope.grid is not None
    table = rotations(rope.cos, rope.sin, list(rope.grid), list(rope.offset), torch.float32)
    both = (table.real, table.imag)  # [L, 1, head_dim / 2]
    return both[0].repeat_interleave(2, -1)[None], both[1].repeat_interleave(2, -1)[None]


def fused_parts(block: Any, rotary_emb: Any) -> tuple[BlockParts | None, Any]:
    """Return a block's parts; None and diffusers' rotary tables if its class's forward must run."""
    if not isinstance(rotary_emb, Rope):  # the caller passes diffusers' own cosines and sines
        return None, rotary_emb
    # Asked at each call, because hooks, processors and LoRA may be added after patching.
    parts = known_parts(block, why_not_fused, block_parts)
    if isinstance(parts, BlockParts):
        return parts, rotary_emb
    if not torch.compiler.is_compiling():
        text = f"a patched block runs its own forward, not prfl_fast's kernels: {parts}"
        warnings.warn(text, stacklevel=3)
    return None, rotary_tables(rotary_emb)


def block_forward(
    self: Any,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: Any,
) -> torch.Tensor:
    """Replace ``WanTransformerBlock.forward``."""
    shards = shards_of(self)
    if shards is not None:
        return _part_of_block(self, shards, hidden_states, encoder_hidden_states, temb, rotary_emb)
    parts, rotary = fused_parts(self, rotary_emb)
    if parts is None:
        batch, tokens, _ = hidden_states.shape
        if temb.ndim == 3 and len(temb) != batch:
            temb = temb.unflatten(0, (batch, -1))
        if temb.ndim == 4 and temb.shape[1] != tokens:  # diffusers' forward takes a row per token
            temb = temb.repeat_interleave(tokens // temb.shape[1], 1)
        return type(self).forward(self, hidden_states, encoder_hidden_states, temb, rotary)
    modulation = block_modulation(self, temb)
    return transformer_block(hidden_states, encoder_hidden_states, modulation, rotary, parts)


def _part_of_block(
    self: Any,
    shards: SequenceShards,
    x: torch.Tensor,
    context: torch.Tensor,
    temb: torch.Tensor,
    rope: Any,
) -> torch.Tensor:
    """Run a block on this rank's tokens; the first block receives all tokens."""
    parts: Any = "the rotary embedding is replaced"
    if isinstance(rope, Rope):
        parts = known_parts(self, why_not_fused, block_parts)
    ok, name = isinstance(parts, BlockParts), "a block of a model that shares its sequence"
    check(ok, name, parts, "one that runs on the kernels, which exchange tokens")
    x = shards.enter(self, x)
    modulation = block_modulation(self, temb)
    given = shards.arguments(modulation, rope, parts, len(x), eight_bits=False)
    return transformer_block(x, context, *given)


def rope_forward(self: Any, hidden_states: torch.Tensor) -> Any:
    """Replace ``WanRotaryPosEmbed.forward``: return a compact table, not ``[L, head_dim]``."""
    if customization(self, rope_forward):  # a hook expects diffusers' tensors
        return type(self).forward(self, hidden_states)
    sizes = zip(hidden_states.shape[2:], self.patch_size, strict=True)
    grid = [size // patch for size, patch in sizes]
    return Rope.from_grid(grid, self.attention_head_dim, device=hidden_states.device)


def is_readable(tensor: torch.Tensor) -> bool:
    """Return False in a compilation, a CUDA graph, and for fake and meta tensors."""
    if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _equal_runs(times: torch.Tensor) -> int:
    """Return n such that every group of n consecutive tokens of ``times`` ``[B, L]`` has one time.

    It is 1 where values cannot be read.
    """
    if not is_readable(times):
        return 1
    changes = (times[:, 1:] != times[:, :-1]).any(0).nonzero() + 1  # waits for the device
    return math.gcd(times.shape[1], *changes.flatten().tolist())


def embedder_forward(
    self: Any,
    timestep: torch.Tensor,
    text: torch.Tensor,
    image: torch.Tensor | None = None,
    timestep_seq_len: int | None = None,
) -> tuple[torch.Tensor, ...]:
    """Replace ``WanTimeTextImageEmbedding.forward``, with fewer rows of modulation.

    ``timestep`` may also be ``[B·F]``. Blocks then get one row per latent frame. The head gets the
    row of the last frame, because its result for the first frame is not used. Timesteps per token,
    flattened from ``[B, timestep_seq_len]``, give one row per group of equal timesteps: one row per
    token takes 2 GB for the 27 280 tokens of Wan2.2 TI2V.
    """
    repeats = 1
    if timestep_seq_len is not None:
        times = timestep.unflatten(0, (-1, timestep_seq_len))
        repeats = _equal_runs(times)
        timestep, timestep_seq_len = times[:, ::repeats].flatten(), timestep_seq_len // repeats
    temb, *others = type(self).forward(self, timestep, text, image, timestep_seq_len)
    if temb.ndim == 3:
        # diffusers' head takes a row for each token of its input, which is this rank's part.
        temb = own_tokens(self, temb.repeat_interleave(repeats, 1))
    elif len(temb) != len(text):
        temb = temb.unflatten(0, (len(text), -1))[:, -1]
    return temb, *others


class _HeadNorm(NamedTuple):
    """Compute ``(norm_out(x.float()) * factor + shift).type_as(x)`` in one operation.

    The model's forward applies these operators to the result of ``norm_out``. As separate
    operations they keep x in float32 until the backward, 1.55 GB at 14B and 720p, and its norm too
    if the head is trained.
    """

    eps: float
    factor: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    def __mul__(self, factor: Any) -> "_HeadNorm":
        return self._replace(factor=factor)

    def __add__(self, shift: Any) -> "_HeadNorm":
        return self._replace(shift=shift)

    def type_as(self, x: torch.Tensor) -> torch.Tensor:
        """Return the modulated norm of the residual stream ``[B, L, D]``, in its dtype."""
        assert self.factor is not None and self.shift is not None
        # [B, 1, D], or [B, L, D] for a time per token. The kernel adds 1 to its scale.
        wide = torch.promote_types(self.factor.dtype, torch.float32)
        scale, shift = self.factor.to(wide).flatten(0, 1) - 1, self.shift.flatten(0, 1)
        out: torch.Tensor = norm_modulate(x, scale=scale, shift=shift, eps=self.eps)
        return out


def head_norm_forward(self: Any, inputs: torch.Tensor) -> Any:
    """Replace ``norm_out.forward``: leave the norm to :class:`_HeadNorm`."""
    # A hook expects a tensor, and a compiler fuses these operations itself.
    if torch.compiler.is_compiling() or customization(self, head_norm_forward):
        return type(self).forward(self, inputs)
    return _HeadNorm(self.eps)


OWN_FORWARDS = (
    block_forward,
    rope_forward,
    embedder_forward,
    head_norm_forward,
    feed_forward_in_chunks,
    latents_forward,
    head_forward,
)


def replacements(base: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Return the pairs (module, forward) that :func:`prfl_fast.patch` sets."""
    others: list[tuple[Any, Callable[..., Any]]]
    others = [(base.rope, rope_forward), (base.condition_embedder, embedder_forward)]
    norm = base.norm_out
    plain = type(norm).__name__ == "FP32LayerNorm" and norm.weight is None  # a backbone has none
    # A user's forward may do with the norm what _HeadNorm does not know.
    plain = plain and is_library(type(base).forward)
    others += [(norm, head_norm_forward)] if plain else []
    return [*((block, block_forward) for block in base.blocks), *others]


def text_rows(base: Any, text: torch.Tensor) -> int:
    """Return the number of rows to which text is padded, 512 for published Wan models.

    An attribute ``text_tokens`` of a text-to-video model overrides 512; None means no padding.
    Raise ``ValueError`` if ``text`` ``[B, T, C]`` has no row or more rows than that.
    """
    rows = TEXT_TOKENS  # fixed for image-to-video, whose blocks split text and image tokens there
    if base.config.image_dim is None:
        given = getattr(base, "text_tokens", TEXT_TOKENS)
        rows = max(text.shape[1], 1) if given is None else given
    hint = "Text is padded with zeros to that number of rows, as in training. Shorten it"
    name = "conditions['encoder_hidden_states']"
    ok = 1 <= text.shape[1] <= rows
    check(ok, name, text, f"1 to {rows} text tokens, [B, T, C]", hint=hint)
    return rows


def image_rows(base: Any) -> int | None:
    """Return the image tokens per sample of a model of first and last frame; else None."""
    return None if base.config.image_dim is None else base.config.pos_embed_seq_len


def token_timesteps(
    x: torch.Tensor, timestep: torch.Tensor, patch_size: tuple[int, int, int]
) -> torch.Tensor:
    """Return timesteps ``[B]`` as timesteps per token ``[B, L]``, with 0 for the first frame."""
    times = timestep[:, None].repeat(1, x.shape[2])
    times[:, 0] = 0
    _, height, width = patch_size
    return times.repeat_interleave((x.shape[3] // height) * (x.shape[4] // width), 1)


def frame_timesteps(
    base: Any, x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return timesteps ``[]`` or ``[B]`` as a model takes them, with 0 for a given first frame.

    With a first frame they are ``[B·F]`` for a patched model, which has one row of modulation per
    frame, and ``[B, L]`` for diffusers' forward, which has one row per token. Timesteps that have
    such a shape already do not change.
    """
    timestep = timestep.to(x.device)
    timestep = timestep.expand(len(x)) if timestep.ndim == 0 else timestep
    if FIRST_FRAME not in conditions or timestep.shape != (len(x),):
        return timestep
    if instance_forward(base.condition_embedder) is not embedder_forward:
        return token_timesteps(x, timestep, base.config.patch_size)
    times = timestep[:, None].repeat(1, x.shape[2])
    times[:, 0] = 0
    return times.flatten()


def model_inputs(
    base: Any, x: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return latents, timesteps, text and image tokens as diffusers' forward takes them.

    Text is padded with rows of zeros to :func:`text_rows`, without a mask, as in Wan's training. A
    first frame in ``conditions`` replaces that of ``x`` and has time 0.
    """
    x, conditions = not_inference(x), not_inference(conditions)
    x = set_first_frame(x, conditions)
    dtype = base.patch_embedding.weight.dtype  # diffusers does not cast its inputs
    latents = [x]
    if "latent_condition" in conditions:
        latents.append(conditions["latent_condition"])
    image = conditions.get("encoder_hidden_states_image")
    if image is not None and image_rows(base) is not None:
        # First and last frame: diffusers' embedding takes [2B, N, C] and joins both images.
        image = image.reshape(2 * len(x), -1, image.shape[-1])
    text = conditions["encoder_hidden_states"].to(dtype)
    if missing := text_rows(base, text) - text.shape[1]:
        text = functional.pad(text, (0, 0, 0, missing))
    return (
        torch.cat([part.to(dtype) for part in latents], dim=1).contiguous(),  # [B, C + C', F, H, W]
        frame_timesteps(base, x, timestep, conditions),
        text,
        None if image is None else image.to(dtype),
    )
