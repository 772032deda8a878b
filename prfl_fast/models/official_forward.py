"""Forwards that replace those of Wan models in the official layout.

Wan2.1, Wan2.2, HY-Video-PRFL, VideoX-Fun, DiffSynth-Studio and musubi-tuner have this layout. Their
blocks differ in their arguments and in the form of rotary factors.
"""

import inspect
import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from prfl_fast.models.block_adapter import (
    BlockCall,
    call_block,
    feed_forward_in_chunks,
    unwrap_block,
)
from prfl_fast.models.blocks import BlockParts, Modulation, Rope, transformer_block
from prfl_fast.models.wan_forward import is_readable
from prfl_fast.utils.modules import customization
from prfl_fast.utils.recompute import recomputed

CHILDREN = ("norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn")
_GRID_ARGUMENTS = ("x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens")
_FLAT_ARGUMENTS = ("x", "context", "t_mod", "freqs")  # DiffSynth-Studio
_LINEARS = ("q", "k", "v", "o", "k_img", "v_img")
# Tokens of one CLIP image, which come first in the context.
_IMAGE_TOKENS = 257

# Float32 tables by the tensor of rotary factors, which a model makes once for all blocks.
_tables: Any = WeakIdKeyDictionary()


class Attention(NamedTuple):
    """Hold the parts of an attention, under the names of :mod:`prfl_fast.models.blocks`."""

    heads: int
    to_q: Any
    to_k: Any
    to_v: Any
    to_out: Any
    norm_q: Any
    norm_k: Any
    add_k_proj: Any = None
    add_v_proj: Any = None
    norm_added_k: Any = None
    image_tokens: int | None = None


def _attention(module: Any) -> Attention:
    parts = module._modules.get
    # Wan2.1 and HY-Video-PRFL take the last 512 tokens as text, the others the first 257 as image.
    text_last = "T5_CONTEXT_TOKEN_NUMBER" in type(module).forward.__globals__
    return Attention(
        heads=module.num_heads,
        to_q=parts("q"),
        to_k=parts("k"),
        to_v=parts("v"),
        to_out=parts("o"),
        norm_q=parts("norm_q"),
        norm_k=parts("norm_k"),
        add_k_proj=parts("k_img"),
        add_v_proj=parts("v_img"),
        norm_added_k=parts("norm_k_img"),
        image_tokens=None if text_last else _IMAGE_TOKENS,
    )


def block_parts(block: Any) -> BlockParts:
    """Return the submodules of a block as :class:`BlockParts`."""
    parts = block._modules
    up, _, down = parts["ffn"]
    return BlockParts(
        attn=_attention(parts["self_attn"]),
        cross=_attention(parts["cross_attn"]),
        cross_norm=parts["norm3"],
        up=up,
        down=down,
        eps=(parts["norm1"].eps, parts["norm2"].eps),
        chunk=parts["ffn"].__dict__.get("chunk"),
    )


def block_modulation(block: Any, e: torch.Tensor) -> Modulation:
    """Return a block's modulation; ``e`` is ``[B, 6, D]``, or ``[B, R, 6, D]`` for R rows each."""
    return Modulation(block.modulation[0], e.flatten(0, 1) if e.ndim == 4 else e)


def is_known_block(block: Any) -> bool:
    """Return True if the forward of a block's class takes the arguments of the layout's."""
    # A class that overrides the forward of another block does more than that block.
    owners = _owners(block)
    if len(owners) != 1 or type(block).forward.__module__ != owners[0].__module__:
        return False
    names = tuple(inspect.signature(type(block).forward).parameters)[1:]
    known = (_GRID_ARGUMENTS, (*_GRID_ARGUMENTS, "dtype", "t"), _FLAT_ARGUMENTS)
    return names in known


def _owners(block: Any) -> list[type]:
    return [c for c in type(block).__mro__ if c is not nn.Module and "forward" in vars(c)]


def _customized(block: Any, part: Any, own: object = None) -> str:
    """Return what a part of a block has that is not of the block's repository, ``""`` if nothing.

    A part of a user's class, or of a class with a user's forward, may compute something else.
    """
    if not torch.compiler.is_compiling():  # Dynamo cannot read a function's module
        where = type(part).forward.__module__
        repository = {base.__module__ for base in _owners(block)[0].__mro__}
        if where not in repository and not where.startswith("torch.nn."):
            return f"the forward of {where}.{type(part).__name__}"
    return customization(part, own)


def is_sequence_parallel(attn: Any) -> bool:
    """Return True if HY-Video-PRFL's attention splits tokens over ranks inside its forward."""
    state = type(attn).forward.__globals__.get("get_sequence_parallel_state")
    return state is not None and bool(state())


def _why_not_attention(block: Any, name: str) -> str:
    attn = block._modules[name]
    if found := _customized(block, attn):
        return f"{name} has {found}"
    for part, module in attn._modules.items():
        if module is None or part in _LINEARS:  # our forward calls them
            continue
        if found := _customized(block, module):
            return f"{name}.{part} has {found}"
        if part.startswith("norm_") and getattr(module, "weight", None) is None:
            return f"{name}.{part} has no weight"
        if part.startswith("norm_") and module.eps != attn.norm_q.eps:
            return f"{name}.{part} has another eps than norm_q"
    if tuple(getattr(attn, "window_size", (-1, -1))) != (-1, -1):
        return f"{name} has window_size {attn.window_size}"
    return ""


def why_not_fused(block: Any) -> str:
    """Return why a block must run its class's forward, ``""`` if it can run on the kernels.

    The kernels do not call norms, attention and feed-forward, so hooks and forwards that users,
    trainers, peft or FSDP set on these submodules would not run.
    """
    parts = block._modules
    for name in ("norm1", "norm2", "norm3", "gate"):
        if name in parts and (found := _customized(block, parts[name])):
            return f"{name} has {found}"
    for name in ("norm1", "norm2"):
        if getattr(parts[name], "weight", None) is not None:
            return f"{name} has a weight"
    for name in ("self_attn", "cross_attn"):
        if reason := _why_not_attention(block, name):
            return reason
    ffn = parts["ffn"]
    if found := _customized(block, ffn, feed_forward_in_chunks):
        return f"ffn has {found}"
    gelu = len(ffn) == 3 and getattr(ffn[1], "approximate", None) == "tanh"
    if not gelu or _customized(block, ffn[1]):
        return "ffn is not two layers around a GELU with approximate='tanh'"
    if getattr(block, "activation_cpu_offloading", False) and block.training:
        return "activation_cpu_offloading is on"
    if hasattr(block.modulation, "ds_id"):
        return "parameters are sharded by DeepSpeed ZeRO-3"
    if not torch.compiler.is_compiling() and is_sequence_parallel(parts["self_attn"]):
        return "self_attn splits the sequence over ranks"
    return ""


def _table(freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines of complex factors ``[n, d/2]`` or ``[n, 1, d/2]``, float32."""
    kept = not torch.compiler.is_compiling()
    version = None if not kept or freqs.is_inference() else freqs._version
    written, found = _tables.get(freqs, (None, None)) if kept else (None, None)
    if found is None or written != version:
        flat = freqs.flatten(0, 1) if freqs.ndim == 3 else freqs
        found = flat.real.float().contiguous(), flat.imag.float().contiguous()
        if kept:
            _tables[freqs] = version, found
    return found


def _rope(freqs: Any, length: int, grids: list[list[int]] | None) -> Rope | str:
    """Return the rotary embedding of a block's arguments, or why the kernels cannot use it."""
    if grids is not None and any(grid != grids[0] for grid in grids):
        return f"samples have different grids {grids}"
    if isinstance(freqs, (list, tuple)):
        if any(other is not freqs[0] for other in freqs):
            return "samples have different rotary factors"
        freqs = freqs[0]
    if not (isinstance(freqs, torch.Tensor) and freqs.is_complex()):
        return "freqs are not complex rotary factors"
    if freqs.ndim == 3:
        return Rope(*_table(freqs), None) if len(freqs) == length else "the sequence is padded"
    if grids is None or math.prod(grids[0]) != length:
        return f"the sequence of {length} tokens is padded"
    frames, height, width = grids[0]
    return Rope(*_table(freqs), (frames, height, width))


class BlockInputs(NamedTuple):
    """Inputs of :func:`transformer_block`, from the arguments of one of the layout's blocks."""

    x: torch.Tensor
    context: torch.Tensor
    e: torch.Tensor
    rope: Rope


def block_inputs(block: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> BlockInputs | str:
    """Return the inputs of a block, or why its own forward must run on them."""
    flat = "gate" in block._modules
    names = _FLAT_ARGUMENTS if flat else (*_GRID_ARGUMENTS, "dtype", "t")
    given = dict(zip(names[1:], args, strict=False)) | kwargs
    e, context = given.get("e", given.get("t_mod")), given["context"]
    if not (isinstance(e, torch.Tensor) and e.ndim in (3, 4) and len(e) in (1, len(x))):
        return "its modulation is not one tensor [B, 6, D] or [B, L, 6, D]"
    if e.ndim == 4 and e.shape[1] > 1 and len(e) != len(x):
        e = e.expand(len(x), -1, -1, -1)
    grids = given["grid_sizes"].tolist() if "grid_sizes" in given else None
    if given.get("context_lens") is not None:
        return "context_lens is given"
    lengths = given.get("seq_lens")
    if lengths is not None and lengths.tolist() != [x.shape[1]] * len(x):
        return f"the sequence of {x.shape[1]} tokens is padded"
    rope = _rope(given["freqs"], x.shape[1], grids)
    if isinstance(rope, str):
        return rope
    # Wan's x + y·(modulation + e) has the widest dtype: from block 1 on the stream is float32
    # under autocast. DiffSynth-Studio casts its modulation to e's dtype, and musubi-tuner the
    # stream back to x's.
    if not hasattr(block, "_forward"):
        added = e.dtype if flat else torch.promote_types(e.dtype, block.modulation.dtype)
        x = x.to(torch.promote_types(x.dtype, added))
    return BlockInputs(x, context, e, rope)


def own_forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Run the class's forward, with one row of ``e`` per token if ``e`` has fewer."""
    e = kwargs.get("e")
    if isinstance(e, torch.Tensor) and e.ndim == 4 and e.shape[1] not in (1, x.shape[1]):
        kwargs["e"] = e.repeat_interleave(x.shape[1] // e.shape[1], dim=1)
    return type(self).forward(self, x, *args, **kwargs)


def _fused(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    # Checked at each call, because hooks and forwards may be added after patching.
    reason = why_not_fused(self)
    inputs = reason or block_inputs(self, x, *args, **kwargs)
    if isinstance(inputs, str):
        if not torch.compiler.is_compiling():
            text = f"a patched block runs its own forward, not prfl_fast's kernels: {inputs}"
            warnings.warn(text, stacklevel=2)
        return own_forward(self, x, *args, **kwargs)
    modulation = block_modulation(self, inputs.e)
    return transformer_block(inputs.x, inputs.context, modulation, inputs.rope, block_parts(self))


def block_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Replace the forward of a block, with the arguments of its class."""
    # musubi-tuner's activation checkpointing is inside the forward that this one replaces.
    own = self.training and getattr(self, "gradient_checkpointing", False)
    if own and torch.is_grad_enabled() and not why_not_fused(self):
        names = tuple(kwargs)
        return recomputed(BlockCall(self, _fused, names), *args, *kwargs.values())
    return call_block(self, _fused, *args, **kwargs)


def model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace the model's forward: first set the number of different time rows."""
    self.time_embedding.rows = _time_rows(self, *args[:4], **kwargs)
    try:
        return type(self).forward(self, *args, **kwargs)
    finally:
        self.time_embedding.rows = None


def _time_rows(
    base: Any, x: Any = None, t: Any = None, context: Any = None, seq_len: Any = None, **_: Any
) -> tuple[int, int] | None:
    """Return the numbers of time rows and of tokens of a sample; None for one row per token.

    Wan2.2 computes one row per token, ``[B, L, 6, D]``: 9.3 GB at 14B and 720p. Text-to-video needs
    one row, and a video with a given first frame one row per frame.
    """
    # A sequence-parallel model splits rows over ranks as it splits tokens.
    if not isinstance(t, torch.Tensor) or "forward" in blocks_of(base)[0].self_attn.__dict__:
        return None
    if t.ndim < 2 or t.shape[1] == 1 or t.stride(1) == 0:
        return 1, 0
    frames = x[0].shape[1] // base.patch_size[0]
    if t.shape[1] % frames or t.shape[1] != seq_len or not is_readable(t):
        return None
    by_frame = t.unflatten(1, (frames, -1))
    same = bool((by_frame == by_frame[..., :1]).all())  # waits for the device
    return (frames, t.shape[1]) if same else None


def time_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Replace the time embedding's forward: compute each row of equal tokens once."""
    count = getattr(self, "rows", None)
    if count is not None and x.ndim == 3:
        rows, tokens = count
        if rows == 1 or x.shape[1] == tokens:
            x = x[:, :: x.shape[1] // rows]
    return type(self).forward(self, x)


def head_forward(self: Any, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Replace the head's forward: accept time rows that several tokens share."""
    rows = e.shape[1] if e.ndim == 3 else 1
    if rows in (1, x.shape[1]):
        return type(self).forward(self, x, e)
    out = type(self).forward(
        self, x.unflatten(1, (rows, -1)).flatten(0, 1), e.reshape(-1, 1, e.shape[-1])
    )
    return out.unflatten(0, (-1, rows)).flatten(1, 2)


OWN_FORWARDS = (block_forward, model_forward, time_forward, head_forward, feed_forward_in_chunks)


def blocks_of(base: Any) -> list[Any]:
    """Return the blocks without the wrappers of checkpointing, FSDP and torch.compile."""
    return [unwrap_block(block) for block in base.blocks]
