"""Transformer blocks of a rollout: no gradient, what no step changes computed once, and on request
merged adapters, 8-bit products and a compiled block.

Nothing of the model is changed. Its own forward runs, while the forwards of its embeddings and
blocks are replaced for the length of a call. What depends on the conditions and the schedule alone
(text, image and time embeddings, rotary tables, keys and values of the cross-attention) is there
already; exact rollouts run the same operations on the same values as the model without it, so no
bit differs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from prfl_fast.chunks import in_chunks
from prfl_fast.kernels import (
    bias_gelu,
    gelu_fp8,
    norm_modulate,
    norm_modulate_fp8,
    qk_norm_rope,
    rollout_attention,
)
from prfl_fast.kernels._rollout_variant import best_variant
from prfl_fast.modules import (
    ContextKeys,
    Modulation,
    Rope,
    cross_attention,
    modulated_block,
    self_attention,
)
from prfl_fast.norm_attention import norm_attention
from prfl_fast.rollout_layers import (
    AttentionParts,
    Dense,
    Fp8Dense,
    Layer,
    Layers,
    add_note,
    half_of,
)

How = Literal["exact", "fp8"]
HOWS = ("exact", "fp8")
_REPLACED = ("forward", "_compiled_call_impl")


class Unsupported(RuntimeError):
    """This model's rollouts run without caches; the message is the reason."""


class BlockParts(NamedTuple):
    """The modules of a block by the part they play, as :func:`prfl_fast.modules.transformer_block`
    names them.
    """

    attn: Any
    cross: Any
    cross_norm: Any
    up: nn.Module
    down: nn.Module
    eps: tuple[float, float]
    chunk: int | None


class _Block(NamedTuple):
    """A block ready to run."""

    attn: AttentionParts
    cross: AttentionParts
    cross_norm: Any
    up: Layer
    down: Layer
    eps: tuple[float, float]
    chunk: int | None
    shared_fp8: bool  # all of q, k and v take the first norm's tokens in FP8
    eight_bits: bool  # the self-attention


def _eight_bit_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    *,
    heads: int,
    eps: float,
    **turn: Any,
) -> torch.Tensor:
    """``norm_attention`` with products of 8 bits, which take 16-bit tensors."""
    dtype = q.dtype
    half = half_of(dtype)
    q, k = qk_norm_rope(q, k, q_weight, k_weight, heads=heads, eps=eps, **turn)
    return rollout_attention(q.to(half), k.to(half), v.to(half), heads=heads).to(dtype)


def _feed_forward(up: Layer, down: Layer, x: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """:func:`prfl_fast.modules.feed_forward`; the activation makes FP8 tokens for FP8 products."""
    bare = isinstance(up, (Dense, Fp8Dense))

    def run(x: torch.Tensor) -> torch.Tensor:
        h, bias = (up.product(x), up.bias) if bare else (up(x), None)
        return down(gelu_fp8(h, bias) if isinstance(down, Fp8Dense) else bias_gelu(h, bias))

    return in_chunks(run, x, chunk)


def run_block(
    x: torch.Tensor, keys: ContextKeys, modulation: Modulation, rope: Rope, block: _Block
) -> torch.Tensor:
    """One block, ``[B, L, D]`` → ``[B, L, D]``: a function of its arguments alone."""
    attend = _eight_bit_attention if block.eight_bits else norm_attention
    return modulated_block(
        x,
        modulation,
        lambda h: self_attention(block.attn, h, rope, attend),
        lambda h: cross_attention(block.cross, h, keys),
        lambda h: _feed_forward(block.up, block.down, h, block.chunk),
        cross_norm=block.cross_norm,
        eps=block.eps,
        norm=norm_modulate_fp8 if block.shared_fp8 else norm_modulate,
    )


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """:func:`run_block` compiled: one function, and so one cache, for all blocks and rollouts."""
    return torch.compile(run_block, dynamic=False)


@contextlib.contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Within, the modules run these forwards; then what they had, instance attributes included."""
    before: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module, forward in forwards:
            own = module.__dict__
            before.append((module, {name: own[name] for name in _REPLACED if name in own}))
            own.update(forward=forward, _compiled_call_impl=None)
        yield
    finally:
        for module, attributes in reversed(before):
            for name in _REPLACED:
                module.__dict__.pop(name, None)
            module.__dict__.update(attributes)


def check_rollout(
    wrappers: Sequence[nn.Module], own: Sequence[Callable[..., Any]], compiles: bool
) -> None:
    """Raise :class:`Unsupported` where replaced forwards would not do what the model's own do.

    Args:
        wrappers: what is around the model, the model itself last.
        own: forwards of prfl_fast's that submodules may have.
        compiles: the rollout has a compiled block of its own.
    """
    *_, base = wrappers
    for layer in wrappers:
        if hasattr(layer, "_orig_mod") or layer._compiled_call_impl is not None:
            raise Unsupported(
                "the model is compiled as a whole, and its blocks cannot be replaced; compile them "
                "one by one: for block in model.blocks: block.compile()"
            )
        if type(layer).__name__ == "DataParallel":
            raise Unsupported("DataParallel copies the model for each call; use one process a GPU")
    if base._forward_pre_hooks or "forward" in base.__dict__:
        raise Unsupported(
            f"{type(base).__name__} has forward pre-hooks or a forward of its own, which may "
            "change what is cached (hooks of accelerate or of diffusers?); remove them"
        )
    for name, module in base.named_modules():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        replaced = "forward" in module.__dict__ and forward not in own
        if module is not base and (replaced or module._forward_hooks or module._forward_pre_hooks):
            raise Unsupported(
                f"{name} has hooks or a forward of its own, which would run once in place of every "
                "step (accelerate, diffusers, or yours?); remove them"
            )
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            raise Unsupported(
                f"{name} drops out a share of {module.p}, anew at every step; call model.eval() or "
                "train adapters without dropout"
            )
        if module._compiled_call_impl is not None and not compiles:
            raise Unsupported(
                f"{name} is compiled, and what runs in its place would round otherwise; let the "
                "rollout compile its block too"
            )
    for name, parameter in base.named_parameters():
        if any(kind.__name__ == "DTensor" for kind in type(parameter).__mro__):
            raise Unsupported(
                f"{name} is sharded, and only the forward it belongs to gathers it; expected whole "
                "parameters"
            )


def _autocast(device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast in force, or None."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


class RolloutModel:
    """A model bound to one rollout's conditions and timesteps; made by ``adapter.open_rollout``.

    For as long as the weights stay as they are. Drop it to free its caches.

    Attributes:
        notes: why layers stay unmerged or exact where something else was asked for; each reason
            once, filled as layers run.
    """

    def __init__(
        self,
        call: Callable[[torch.Tensor, int], torch.Tensor],
        like: torch.Tensor,
        *,
        blocks: Sequence[nn.Module],
        parts: Callable[[Any], BlockParts],
        keys: Sequence[ContextKeys],
        cached: Callable[[int], list[tuple[nn.Module, Callable[..., Any]]]],
        modulation: Callable[[nn.Module, torch.Tensor], Modulation],
        steps: int,
        merge_lora: bool,
        compile: bool,
    ) -> None:
        """What an adapter knows.

        Args:
            call: the model's velocity at latents x and step i.
            like: latents that fix shape and device.
            blocks, parts: the blocks, and what names the parts of one.
            keys: of each block's cross-attention.
            cached: modules whose forward is replaced at step i, the blocks apart.
            modulation: of a block, from the time rows that the model passes to it.
            steps: number of timesteps.
        """
        self.notes: list[str] = []
        self._call, self._cached, self._modulation = call, cached, modulation
        self._blocks, self._parts, self._keys, self._steps = blocks, parts, keys, steps
        self._layers, self._compile = Layers(merge_lora, self.notes), compile
        self._shape, self._device = like.shape, like.device
        self._autocast = _autocast(like.device)

    @torch.no_grad()
    def velocity(
        self, x: torch.Tensor, step: int, *, linears: How = "exact", attention: How = "exact"
    ) -> torch.Tensor:
        """The model's velocity at latents x, without a graph.

        Args:
            x: ``[B, C, F, H, W]``, of the shape and on the device that the rollout was opened with.
            step: index of the timestep.
            linears: ``"fp8"`` runs the blocks' linear layers in FP8, adapters merged into them.
            attention: ``"fp8"`` runs the self-attention in 8 bits.

        Returns:
            ``[B, C, F, H, W]`` in ``x.dtype``; with both ``"exact"``, without merged adapters and
            without a compiled block, the bits of the model's own forward.

        Raises:
            ValueError: another shape or device, a step that there is not, an unknown choice, or
                another autocast than at the opening.
        """
        if x.shape != self._shape or x.device != self._device:
            raise ValueError(
                f"x is {list(x.shape)} on {x.device}, expected {list(self._shape)} on "
                f"{self._device}, with which the rollout was opened"
            )
        if not 0 <= step < self._steps:
            raise ValueError(f"step is {step}, expected 0 to {self._steps - 1}")
        for name, how in (("linears", linears), ("attention", attention)):
            if how not in HOWS:
                raise ValueError(f"{name} is {how!r}, expected one of {', '.join(HOWS)}")
        autocast = _autocast(self._device)
        if autocast != self._autocast:
            raise ValueError(
                f"autocast is {autocast}, expected {self._autocast}, under which the rollout was "
                "opened: its caches have that dtype"
            )
        forwards = self._cached(step)
        for index, block in enumerate(self._blocks):
            run = functools.partial(self._run, index, linears == "fp8", attention == "fp8")
            forwards.append((block, run))
        with replaced_forwards(forwards):
            return self._call(x, step)

    def _run(
        self,
        index: int,
        fp8: bool,
        eight_bits: bool,
        x: torch.Tensor,
        context: torch.Tensor,
        time: torch.Tensor,
        rope: Rope,
    ) -> torch.Tensor:
        block = self._blocks[index]
        ready = self._ready(index, x, fp8, eight_bits)
        arguments = x, self._keys[index], self._modulation(block, time), rope, ready
        return (_compiled() if self._compile else run_block)(*arguments)

    def _ready(self, index: int, x: torch.Tensor, fp8: bool, eight_bits: bool) -> _Block:
        parts = self._parts(self._blocks[index])
        dtype = self._autocast or x.dtype
        layer = functools.partial(self._layers, dtype=dtype, fp8=fp8)
        fused = getattr(parts.attn, "fused_projections", False)
        names = ("to_qkv",) if fused else ("to_q", "to_k", "to_v")
        attn = AttentionParts(parts.attn, names, layer)
        if eight_bits:
            best = best_variant(
                x.device, half_of(dtype), parts.attn.norm_q.weight.numel() // attn.heads
            )
            eight_bits = best.variant is not None
            if not eight_bits:
                add_note(self.notes, f"attention stays exact: {best.reason}")
        return _Block(
            attn=attn,
            cross=AttentionParts(parts.cross, ("to_q",), layer),
            cross_norm=parts.cross_norm,
            up=layer(parts.up),
            down=layer(parts.down),
            eps=parts.eps,
            chunk=parts.chunk,
            shared_fp8=all(isinstance(getattr(attn, name), Fp8Dense) for name in names),
            eight_bits=eight_bits,
        )
