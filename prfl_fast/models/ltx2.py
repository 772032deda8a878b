"""Adapter of diffusers' ``LTX2VideoTransformer3DModel``: blocks have a video and an audio stream.

Attention from one stream to the other runs in PyTorch, because its queries and keys have different
rotary tables, and its gates do, too.
"""

from typing import Any, NamedTuple

import torch

from prfl_fast.kernels import gated_residual, norm_modulate, residual_norm_modulate
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.block_adapter import Replacements
from prfl_fast.models.block_autograd import norm_attention, project
from prfl_fast.models.blocks import Modulation, Rope, feed_forward, project_out
from prfl_fast.models.family_adapter import Expected, warn_not_fused, why_not_fused
from prfl_fast.models.ltx import LTXVideoAdapter, valid_first
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import customization, unwrap

_STREAMS = ("", "audio_")  # prefixes of the modules of video and audio
_FEED_FORWARD = {"": "FeedForward", ".net.0": "GELU", ".net.1": "Dropout"}
_NORMS = [f"{s}norm{i}" for s in _STREAMS for i in (1, 2, 3)]
_NORMS += ["audio_to_video_norm", "video_to_audio_norm"]
_ATTENTIONS = [f"{s}attn{i}" for s in _STREAMS for i in (1, 2)]
_KINDS = {
    **dict.fromkeys(_NORMS, "RMSNorm"),
    **dict.fromkeys(_ATTENTIONS, "LTX2Attention"),
    **{f"{attn}.norm_{x}": "RMSNorm" for attn in _ATTENTIONS for x in "qk"},
    **{f"{s}ff{path}": kind for s in _STREAMS for path, kind in _FEED_FORWARD.items()},
}
_PROCESSORS = ("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")
# The arguments of a block, in order; the first 18 are of video and audio in turn.
_ARGUMENTS = (
    "hidden_states audio_hidden_states encoder_hidden_states audio_encoder_hidden_states temb "
    "temb_audio temb_ca_scale_shift temb_ca_audio_scale_shift temb_ca_gate temb_ca_audio_gate "
    "temb_prompt temb_prompt_audio video_rotary_emb audio_rotary_emb ca_video_rotary_emb "
    "ca_audio_rotary_emb encoder_attention_mask audio_encoder_attention_mask self_attention_mask "
    "audio_self_attention_mask a2v_cross_attention_mask v2a_cross_attention_mask "
    "use_a2v_cross_attention use_v2a_cross_attention perturbation_mask all_perturbed"
).split()


def _why_not_fused(block: Any) -> str:
    if type(block).__name__ not in ("LTX2VideoTransformerBlock", "FSDPLTX2VideoTransformerBlock"):
        return f"forward is that of {type(block).__module__}.{type(block).__name__}"
    if reason := why_not_fused(block, _KINDS, _PROCESSORS):
        return reason
    if any(getattr(block, norm).weight is not None for norm in _NORMS):
        return "a norm has a weight"
    return ""


def _check_version(base: Any) -> None:
    # In 0.37 a block's arguments have another order, and the audio cannot be left out.
    expected = "the class of diffusers 0.38 or later. Update diffusers"
    check(hasattr(base, "prompt_modulation"), "model", type(base).__name__, expected)


def rope_forward(self: Any, coords: torch.Tensor, device: Any = None) -> Any:
    """Replace the forward of a rotary embedding: angles ``[1, L, D/2]`` of samples that are alike.

    Samples whose coordinates may differ have angles of their own, ``[B, L, D/2]``.
    """
    if customization(self, rope_forward):
        return type(self).forward(self, coords, device)
    coords = coords[:1] if coords.stride(0) == 0 else coords  # expanded from one sample
    tables = type(self).forward(self, coords, device)
    if self.rope_type == "split":  # [B, heads, L, head_dim / 2]
        cos, sin = (table.transpose(1, 2).flatten(2) for table in tables)
    else:
        cos, sin = (table[..., ::2].contiguous() for table in tables)
    return Rope(cos, sin, None)


def _diffusers_tables(attn: Any, rope: Any, batch: int) -> Any:
    """Return diffusers' cosines and sines of our tables."""
    if not isinstance(rope, Rope):
        return rope
    tables = [table.expand(batch, -1, -1) for table in rope[:2]]
    if attn.rope_type == "split":
        return tuple(table.unflatten(2, (attn.heads, -1)).transpose(1, 2) for table in tables)
    return tuple(table.repeat_interleave(2, dim=-1) for table in tables)


def _paired(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Move columns j and j + head_dim / 2 of every head next to each other."""
    return x.unflatten(-1, (heads, 2, -1)).transpose(-1, -2).flatten(-3)


def _attend(
    attn: Any,
    h: torch.Tensor,
    context: torch.Tensor | None = None,
    rope: Rope | None = None,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of tokens h to each other, or to those of ``context``."""
    if context is None:
        q, k, v = project(h, attn.to_q, attn.to_k, attn.to_v)
    else:
        q, (k, v) = attn.to_q(h), project(context, attn.to_k, attn.to_v)
    weights = [attn.norm_q.weight, attn.norm_k.weight]
    if rope is not None and attn.rope_type == "split":
        # The same order of columns in q and k changes no product, nor a mean over all of them.
        q, k, *weights = (_paired(x, attn.heads) for x in (q, k, *weights))
    numbers = None, (0, 0, 0), attn.heads, attn.norm_q.eps, lengths
    if rope is None:
        out = norm_attention(q, k, v, *weights, None, None, *numbers)
    else:
        parts = [x.chunk(len(rope.cos)) for x in (q, k, v)]  # one, or one for each sample
        found = [
            norm_attention(*qkv, *weights, cos, sin, *numbers)
            for *qkv, cos, sin in zip(*parts, rope.cos, rope.sin, strict=True)
        ]
        out = found[0] if len(found) == 1 else torch.cat(found)
    if attn.to_gate_logits is not None:
        gates = 2 * torch.sigmoid(attn.to_gate_logits(h))[..., None]  # [B, L, heads, 1]
        out = (out.unflatten(2, (attn.heads, -1)) * gates).flatten(2)
    return project_out(attn.to_out, out)


class _Stream(NamedTuple):
    """The arguments of the video or the audio stream, in the order in which a block takes them.

    ``ca_rows``, ``ca_gate`` and ``ca_rope`` are those of the attention between the streams.
    """

    x: torch.Tensor
    text: torch.Tensor
    temb: torch.Tensor
    ca_rows: torch.Tensor
    ca_gate: torch.Tensor
    temb_prompt: torch.Tensor | None
    rope: Any
    ca_rope: Any
    mask: torch.Tensor | None


class _Sum(NamedTuple):
    """Hold tokens x and the term y that is not yet added to them.

    ``gate`` and ``feed_forward`` are arguments of y and of the feed-forward's norm and gate.
    """

    x: torch.Tensor
    y: torch.Tensor
    gate: dict[str, Any]
    feed_forward: tuple[dict[str, Any], dict[str, Any]]

    def normalized(self, norm: Any, modulation: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return the sum, and the sum normalized and modulated."""
        rows = {**self.gate, **modulation}
        return residual_norm_modulate(self.x, self.y, **rows, kind="rms", eps=norm.eps)


def _text(block: Any, prefix: str, given: _Stream) -> torch.Tensor:
    """Return the text tokens as the keys' projection takes them, modulated since LTX-2.3."""
    if not block.cross_attn_adaln:
        return given.text
    table, rows = getattr(block, f"{prefix}prompt_scale_shift_table"), given.temb_prompt
    if rows is None:
        shift, scale = table[None, None].to(given.x).unbind(dim=2)
    else:
        shift, scale = block.get_mod_params(table, rows, len(rows))
    return given.text * (1 + scale) + shift


def _attentions(block: Any, prefix: str, given: _Stream) -> _Sum:
    """Run self-attention and text attention of one stream."""
    attn1, attn2, norm1, norm2, table = (
        getattr(block, prefix + name)
        for name in ("attn1", "attn2", "norm1", "norm2", "scale_shift_table")
    )
    # Under autocast the float32 table makes the residual stream float32, as in diffusers.
    x = given.x.to(torch.promote_types(given.x.dtype, table.dtype)).contiguous()
    rows = given.temb.unflatten(-1, (len(table), -1)).flatten(0, 1)
    (norm, gate), feed, *text = Modulation(table, rows).arguments()
    text_norm, text_gate = text[0] if text else ({}, {})
    h = norm_modulate(x, **norm, kind="rms", eps=norm1.eps)
    total = _Sum(x, _attend(attn1, h, rope=given.rope), gate, feed)
    x, h = total.normalized(norm2, text_norm)
    context, lengths = valid_first(_text(block, prefix, given), given.mask)
    return _Sum(x, _attend(attn2, h, context, lengths=lengths), text_gate, feed)


def _exchange(block: Any, given: list[_Stream], sums: list[_Sum], masks: Any) -> list[_Sum]:
    """Run the attention of video to audio and of audio to video."""
    norms = block.audio_to_video_norm, block.video_to_audio_norm
    tables = (
        block.video_a2v_cross_attn_scale_shift_table,
        block.audio_a2v_cross_attn_scale_shift_table,
    )
    xs, inputs = [], []
    for stream, total, norm, table in zip(given, sums, norms, tables, strict=True):
        rows = stream.ca_rows.unflatten(-1, (4, -1)).flatten(0, 1).unbind(1)
        names = "scale", "shift"
        (to_video, to_audio) = (
            {
                **{name: rows[i + j] for j, name in enumerate(names)},
                **{f"{name}_table": table[i + j] for j, name in enumerate(names)},
            }
            for i in (0, 2)
        )
        x, h = total.normalized(norm, to_video)
        xs.append(x)
        inputs.append((h, norm_modulate(x, **to_audio, kind="rms", eps=norm.eps)))
    found = []
    for i, attn in enumerate((block.audio_to_video_attn, block.video_to_audio_attn)):
        y = attn(
            inputs[i][i],
            encoder_hidden_states=inputs[1 - i][i],
            query_rotary_emb=given[i].ca_rope,
            key_rotary_emb=given[1 - i].ca_rope,
            attention_mask=masks[i],
        )
        gate = {"gate": given[i].ca_gate.flatten(0, 1), "gate_table": tables[i][4]}
        found.append(_Sum(xs[i], y, gate, sums[i].feed_forward))
    return found


def block_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace ``LTX2VideoTransformerBlock.forward``."""
    named = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    values: list[Any] = [named.get(name) for name in _ARGUMENTS]
    given = [_Stream(*values[i:18:2]) for i in (0, 1)]
    *masks, a2v, v2a, a2v_used, v2a_used, perturbation, perturbed = values[18:]
    between = a2v_used is not False, v2a_used is not False
    reason = _why_not_fused(self)
    if any(mask is not None for mask in masks) or between[0] != between[1]:
        reason = reason or "self-attention has a mask, or one stream alone attends to the other"
    if perturbation is not None or perturbed:
        reason = reason or "perturbation_mask is given"
    if reason or not all(isinstance(stream.rope, Rope) for stream in given):
        if reason:
            warn_not_fused(reason)
        for attn, name in ((self.attn1, "video"), (self.audio_attn1, "audio")):
            rope = named[f"{name}_rotary_emb"]
            named[f"{name}_rotary_emb"] = _diffusers_tables(attn, rope, len(given[0].x))
        return type(self).forward(self, **named)
    sums = [_attentions(self, *pair) for pair in zip(_STREAMS, given, strict=True)]
    if between[0]:
        sums = _exchange(self, given, sums, (a2v, v2a))
    out = []
    for prefix, total in zip(_STREAMS, sums, strict=True):
        ff, (norm, gate) = getattr(self, f"{prefix}ff"), total.feed_forward
        x, h = total.normalized(getattr(self, f"{prefix}norm3"), norm)
        gelu, _, down = ff.net
        y = feed_forward(gelu.proj, down, h, ff.__dict__.get("chunk"))
        out.append(gated_residual(x, y, **gate))
    return tuple(out)


class LTX2VideoAdapter(LTXVideoAdapter):
    """Adapter of ``LTX2VideoTransformer3DModel``, which denoises video and audio.

    Its velocity is that of the video. The audio is a condition, or there is none.
    """

    class_name = "LTX2VideoTransformer3DModel"
    name = f"diffusers {class_name}"
    unreached = r"audio|a2v|v2a|av_cross"  # if there is no audio, as in plans
    embeddings = (
        "proj_in audio_proj_in caption_projection audio_caption_projection time_embed "
        "audio_time_embed av_cross_attn_video_scale_shift av_cross_attn_audio_scale_shift "
        "av_cross_attn_video_a2v_gate av_cross_attn_audio_v2a_gate prompt_adaln audio_prompt_adaln"
    ).split()
    heads = ("norm_out", "proj_out", "audio_norm_out", "audio_proj_out")
    exact_conditions = ("sigma", "audio_timestep", "fps")
    why_not_fused = staticmethod(_why_not_fused)

    def replacements(self, base: Any) -> Replacements:
        """Return our forwards of the blocks and of both streams' rotary embedding."""
        blocks = [(block, block_forward) for block in self.blocks(base)]
        return [*blocks, (base.rope, rope_forward), (base.audio_rope, rope_forward)]

    def check_patchable(self, base: Any) -> None:
        """Raise ``ValueError`` for diffusers 0.37, and for what would change the behavior."""
        _check_version(base)
        super().check_patchable(base)

    def expected_conditions(self, base: Any) -> Expected:
        """Return text, audio tokens, their text and timestep (default: 0), and frames a second."""
        config = base.config
        widths = [config.cross_attention_dim, config.audio_cross_attention_dim]
        if config.use_prompt_embeddings:
            widths = [config.caption_channels] * 2
        return {
            "encoder_hidden_states": (True, ("T", widths[0])),
            "encoder_attention_mask": (False, ("T",)),
            "audio_hidden_states": (False, ("N", config.audio_in_channels)),
            "audio_encoder_hidden_states": (False, ("T", widths[1])),
            "audio_encoder_attention_mask": (False, ("T",)),
            "audio_timestep": (False, ()),
            "fps": (False, ()),
        }

    def pipeline_conditions(self, base: Any) -> tuple[str, ...]:
        """Return the names of the video's conditions; the pipeline samples the audio itself."""
        names = super().pipeline_conditions(base)
        return tuple(name for name in names if not name.startswith("audio"))

    def check_latents(
        self, model: torch.nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless the model takes these latents, called ``name`` in errors."""
        _check_version(unwrap(model))
        super().check_latents(model, x, conditions, name)
        audio = [key for key in conditions if key.startswith("audio")]
        for key in ("audio_hidden_states", "audio_encoder_hidden_states"):
            expected = f"given, because {', '.join(audio)} is"
            check(not audio or key in conditions, f"conditions[{key!r}]", None, expected)

    def velocity(
        self,
        model: torch.nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
    ) -> torch.Tensor:
        """Return the velocity of the video; arguments are those of :class:`FamilyAdapter`."""
        sigma = timestep.to(x.device).expand(len(x))
        return super().velocity(model, x, timestep, {**conditions, "sigma": sigma})

    def arguments(self, base: Any, x: torch.Tensor, conditions: Conditions) -> dict[str, Any]:
        """Return the model's arguments besides the latents and the timestep."""
        given: dict[str, Any] = dict(conditions)
        alone = "audio_hidden_states" not in given
        if alone:  # the class needs tokens, which then reach nothing
            expected = self.expected_conditions(base)
            for key in ("audio_hidden_states", "audio_encoder_hidden_states"):
                given[key] = x.new_zeros(len(x), 1, int(expected[key][1][1]))
        audio_timestep = given.setdefault("audio_timestep", torch.zeros_like(given["sigma"]))
        size, fps = (*x.shape[2:], x.device), given.pop("fps", None)
        if fps is None:
            coords = base.rope.prepare_video_coords(1, *size).expand(len(x), -1, -1, -1)
        else:
            coords = base.rope.prepare_video_coords(len(x), *size, fps=fps[:, None, None])
        return {
            **given,
            "audio_sigma": audio_timestep,
            "audio_num_frames": given["audio_hidden_states"].shape[1],
            "video_coords": coords,
            "isolate_modalities": alone,
            "use_cross_timestep": base.prompt_modulation,  # as LTX-2.3 was trained
        }
