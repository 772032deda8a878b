"""Run a model's blocks in a rollout: no gradient, cached values, optional LoRA merge and FP8.

The model's own forward runs with replaced forwards of its embeddings and blocks. Values that depend
only on the conditions and the schedule (text, image and time embeddings, rotary tables, keys and
values of the cross-attention) are computed once. Exact rollouts have the bits of the model, because
they run the same operations on the same values.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from prfl_fast.kernels import bias_gelu, norm_modulate
from prfl_fast.kernels.attn.rollout_variants import best_variant
from prfl_fast.models.block_timer import BlockTimer, TimedCall
from prfl_fast.models.blocks import BlockParts, ContextKeys, Modulation, Rope, transformer_block
from prfl_fast.models.compiler_errors import SharedCall
from prfl_fast.models.inference_linear import (
    AttentionParts,
    Dense,
    Fp8Dense,
    Layer,
    Layers,
    add_note,
    half_of,
)
from prfl_fast.models.rollout_adapter import NO_ADAPTER, RolloutAdapter, SharedAdapter
from prfl_fast.models.sequence import shards_of
from prfl_fast.models.sparse_attention import SparseAttention, SparseOptions, eight_bit_attention
from prfl_fast.models.step_cache import StepCache, StepCacheOptions
from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.modules import instance_forward
from prfl_fast.utils.recompute import in_chunks
from prfl_fast.utils.sharded import is_dtensor, is_fsdp, is_fsdp_hook

LayerPrecision = Literal["exact", "fp8"]
PRECISIONS = ("exact", "fp8")
# nn.Module.compile() stores its function in _compiled_call_impl, and __call__ then ignores forward.
_REPLACED = ("forward", "_compiled_call_impl")


class BlockPrecision(NamedTuple):
    """Say how a block runs: linear layers in FP8, attention in 8 bits, and its density."""

    fp8: bool
    eight_bits: bool
    density: float


class UnsupportedError(RuntimeError):
    """Error for a model that cannot be opened; the rollout then calls its own forward."""


@dataclass(frozen=True)
class RolloutOptions:
    """Options of an opened model's blocks; see :class:`prfl_fast.rollout.RolloutConfig`.

    ``timer`` compares the times of host and device in eager blocks. With ``stop_compiling``, ranks
    that share weights run eager blocks if the compiler fails on any, and pass it the error. A
    pair of adapters is that of two experts, (high, low).
    """

    merge_lora: bool = False
    compile: bool = False
    timer: BlockTimer | None = None
    step_cache: StepCacheOptions = StepCacheOptions()
    sparse: SparseOptions = SparseOptions()
    stop_compiling: Callable[[RuntimeError], object] | None = None
    adapter: SharedAdapter | tuple[SharedAdapter | None, SharedAdapter | None] | None = None

    def open_adapter(
        self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device
    ) -> RolloutAdapter:
        """Return the adapter of one bare Wan model, on a device; an empty one if there is none.

        Raise ``ValueError`` if it does not fit the model.
        """
        if self.adapter is None:
            return NO_ADAPTER
        assert isinstance(self.adapter, SharedAdapter)
        return self.adapter.open(model, blocks, device)


def _norm_modulate_fp8(x: torch.Tensor, **arguments: Any) -> Any:
    """Run ``norm_modulate`` with FP8 output, so that q, k and v share one quantization."""
    return norm_modulate(x, **arguments, out_dtype=torch.float8_e4m3fn)


def _feed_forward(up: Layer, down: Layer, x: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """Compute the feed-forward. GELU writes FP8 tokens if the second layer runs in FP8."""
    out = {"out_dtype": torch.float8_e4m3fn} if isinstance(down, Fp8Dense) else {}

    def run(x: torch.Tensor) -> torch.Tensor:
        # The bias is added where models.blocks.feed_forward adds it.
        if isinstance(up, Fp8Dense) or (isinstance(up, Dense) and x.device.type != "cpu"):
            return down(bias_gelu(up.product(x), up.bias, **out))
        return down(bias_gelu(up(x), None, **out))

    return run(x) if chunk is None else in_chunks(run, x, chunk)


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """Return the compiled block."""
    # There is one function, so that all blocks and rollouts share its cache.
    return torch.compile(transformer_block, dynamic=False)


@contextlib.contextmanager
def replaced_forwards(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Replace the modules' forwards within the context, then restore their attributes."""
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
    """Raise :class:`UnsupportedError` if replacing forwards would change the model's behavior.

    ``wrappers`` are ordered from the outside in, the bare model last. Submodules may have the
    forwards ``own`` of prfl_fast. ``compiles`` is True if the rollout compiles its blocks.
    """
    *_, base = wrappers
    for layer in wrappers:
        _require(
            not hasattr(layer, "_orig_mod") and layer._compiled_call_impl is None,
            "the model is compiled as a whole, so its blocks cannot be replaced. Compile them one "
            "by one: for block in model.blocks: block.compile()",
        )
        _require(
            type(layer).__name__ != "DataParallel",
            "DataParallel copies the model for each call. Use one process per GPU",
        )
    _require(
        not _foreign_hooks(base._forward_pre_hooks)
        and ("forward" not in base.__dict__ or instance_forward(base) in own),
        f"{type(base).__name__} has forward pre-hooks or a replaced forward (accelerate or "
        "diffusers?), which may change cached values. Remove them",
    )
    for name, module in base.named_modules():
        replaced = "forward" in module.__dict__ and instance_forward(module) not in own
        hooks = {**module._forward_hooks, **module._forward_pre_hooks}
        hooked = replaced or _foreign_hooks(hooks)
        _require(
            module is base or not hooked,
            f"{name} has hooks or a replaced forward (accelerate, diffusers, or yours?), which "
            "would run once instead of at every step. Remove them",
        )
        drops = isinstance(module, _DropoutNd) and module.training and module.p > 0
        _require(
            not drops,
            f"{name} has dropout p={getattr(module, 'p', 0)} in train mode, with a new mask at "
            "every step. Call model.eval() or set dropout to 0",
        )
        _require(
            module._compiled_call_impl is None
            or isinstance(module._compiled_call_impl, TimedCall)
            or compiles,
            f"{name} is compiled, and an eager rollout would round differently. Set "
            "RolloutConfig(compile='on') to let the rollout compile its block too",
        )
    sharded = next((name for name, p in base.named_parameters() if is_dtensor(p)), None)
    ok = sharded is None or any(is_fsdp(module) for module in base.modules())
    _require(ok, f"{sharded} is sharded, but not by FSDP2, expected whole parameters")


def _foreign_hooks(hooks: Mapping[int, object]) -> bool:
    return not all(map(is_fsdp_hook, hooks.values()))


def _require(ok: bool, reason: str) -> None:
    if not ok:
        raise UnsupportedError(reason)


def _autocast(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the active autocast, or None."""
    on = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None


def _wan_inputs(
    block: nn.Module, x: torch.Tensor, context: torch.Tensor, time: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor, Rope]:
    return x, time, rope


class RolloutModel:
    """Compute velocities of one rollout. ``adapter.open_rollout`` creates an instance.

    An instance is valid until the weights change. It holds the caches; delete it to free them.

    Args:
        call: ``(x, timestep) -> velocity``, the model's own forward.
        like: latents of the rollout's shape and device.
        blocks: the transformer blocks.
        parts: function of a block that returns its :class:`BlockParts`.
        keys: keys and values of each block's cross-attention.
        cached: function of a step's index that returns the other replaced modules, with their
            forwards for that step.
        modulation: function of a block and the time rows passed to it; returns its modulation.
        timesteps: ``[B]`` of every step.
        options: LoRA merge and compilation of the blocks.
        inputs: function of a block and its arguments that returns residual stream, time rows and
            rotary embedding; None takes the arguments of diffusers' Wan.

    Attributes:
        notes: reasons why layers stay unmerged or exact, though an option asks otherwise.
        step_cache: residuals of the last steps; None if no option asks for them.
        adapter: changes the weights of modules while they run.
    """

    step_cache: StepCache | None = None
    adapter: RolloutAdapter = NO_ADAPTER

    def __init__(
        self,
        call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        like: torch.Tensor,
        *,
        blocks: Sequence[nn.Module],
        parts: Callable[[Any], BlockParts],
        keys: Sequence[ContextKeys],
        cached: Callable[[int], list[tuple[nn.Module, Callable[..., Any]]]],
        modulation: Callable[[nn.Module, torch.Tensor], Modulation],
        timesteps: Sequence[torch.Tensor],
        options: RolloutOptions,
        inputs: Callable[..., tuple[torch.Tensor, torch.Tensor, Rope]] | None = None,
    ) -> None:
        self._inputs = _wan_inputs if inputs is None else inputs
        self.notes: list[str] = []
        self._call, self._cached, self._modulation = call, cached, modulation
        self._blocks, self._parts, self._keys, self._timesteps = blocks, parts, keys, timesteps
        self._layers = Layers(options.merge_lora, self.notes)
        self._block: Callable[..., torch.Tensor] = transformer_block
        if options.compile:
            stop, self._block = options.stop_compiling, _compiled()
            if stop is not None:
                self._block = SharedCall(self._block, transformer_block, stop)
        self._timer = options.timer
        self._sparse = SparseAttention(options.sparse, self.notes)
        if options.step_cache:
            self.step_cache = StepCache(options.step_cache, len(blocks))
        self._shape, self._device = like.shape, like.device
        self._autocast = _autocast(like.device)  # the caches were computed under this dtype

    @torch.no_grad()
    def velocity(
        self,
        x: torch.Tensor,
        step: int,
        *,
        linears: LayerPrecision = "exact",
        attention: LayerPrecision = "exact",
        density: float = 1.0,
        reuse: bool = False,
    ) -> torch.Tensor:
        """Return the model's velocity at latents x, without a graph.

        Args:
            x: ``[B, C, F, H, W]``.
            step: index of the timestep.
            linears: ``"fp8"`` runs the blocks' linear layers in FP8, with adapters merged.
            attention: ``"fp8"`` runs the self-attention in 8 bits.
            density: share of the pairs of blocks of tokens that the self-attention computes; the
                options of the rollout say by which predictor, and in which layers.
            reuse: let the step cache replace blocks, and refresh it.

        Returns:
            ``[B, C, F, H, W]`` in ``x.dtype``, bit-identical to the model's own forward if both
            precisions are ``"exact"``, the density is 1 and no option is on.

        Raises:
            ValueError: if ``x`` has a different shape or device than at open, the autocast differs,
                ``step`` is out of range, or a precision is unknown.
        """
        ok = x.shape == self._shape and x.device == self._device
        expected = f"{list(self._shape)} on {self._device}, as when the rollout was opened"
        check(ok, "x", x, expected)
        steps = len(self._timesteps)
        check(0 <= step < steps, "step", step, f"0 to {steps - 1}")
        check_choice("linears", linears, PRECISIONS)
        check_choice("attention", attention, PRECISIONS)
        autocast = _autocast(self._device)
        expected = f"{self._autocast}, the dtype of the caches"
        check(autocast == self._autocast, "autocast", autocast, expected)
        # Reused values are 0.03 to 0.13 % of a forward's FLOPs at Wan's sizes (bench/NOTES.md).
        forwards, cache = self._cached(step), self.step_cache
        if reuse and cache is not None and shards_of(self._blocks[0]) is not None:
            # Each rank would decide by its own tokens, and wait in attention for one that skips.
            add_note(self.notes, "residuals of blocks are not reused: ranks share the tokens")
            cache = None
        precision = BlockPrecision(linears == "fp8", attention == "fp8", density)
        for index, block in enumerate(self._blocks):
            run = functools.partial(self._run, index, precision)
            if reuse and cache is not None:
                run = functools.partial(self._cached_run, cache, index, run)
            elif self._timer is not None:
                run = functools.partial(self._timer, index, len(self._blocks), run)
            forwards.append((block, run))
        with replaced_forwards([*self.adapter.outside(), *forwards]):
            return self._call(x, self._timesteps[step])

    def _cached_run(
        self, cache: StepCache, index: int, run: Callable[..., torch.Tensor], *args: Any, **kw: Any
    ) -> torch.Tensor:
        x, time, _ = self._inputs(self._blocks[index], *args, **kw)
        return cache.run(index, x, time, functools.partial(run, *args, **kw))

    def _run(
        self, index: int, precision: BlockPrecision, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        block = self._blocks[index]
        x, time, rope = self._inputs(block, *args, **kwargs)
        with self.adapter.within(block, self._autocast or x.dtype):
            modulation = self._modulation(block, time)
            parts = self._prepare(index, x, rope, precision)
            shards = shards_of(block)
            if shards is not None:
                x = shards.enter(block, x)
                eight_bits = parts.attend is eight_bit_attention
                given = shards.arguments(modulation, rope, parts, len(x), eight_bits=eight_bits)
                modulation, rope, parts = given
            # Contiguous before the compiled function: other strides would compile a second graph.
            return self._block(x.contiguous(), self._keys[index], modulation, rope, parts)

    def _prepare(
        self, index: int, x: torch.Tensor, rope: Rope, precision: BlockPrecision
    ) -> BlockParts:
        """Return the parts of a block with the layers that run in its place."""
        parts = self._parts(self._blocks[index])
        dtype, (fp8, eight_bits, density) = self._autocast or x.dtype, precision
        layer = functools.partial(self._layers, dtype=dtype, fp8=fp8)
        fused = getattr(parts.attn, "fused_projections", False)
        names = ("to_qkv",) if fused else ("to_q", "to_k", "to_v")
        attn = AttentionParts(parts.attn, names, layer)
        if eight_bits:
            head_dim = parts.attn.norm_q.weight.numel() // attn.heads
            best = best_variant(x.device, half_of(dtype), head_dim)
            eight_bits = best.variant is not None
            if not eight_bits:
                add_note(self.notes, f"attention stays exact: {best.reason}")
        sharded = shards_of(self._blocks[index]) is not None
        sparse = self._sparse.attend(
            index, x, rope.grid, density, eight_bits=eight_bits, sharded=sharded
        )
        # The norm writes FP8 tokens only if all of its consumers read them.
        shared_fp8 = all(isinstance(getattr(attn, name), Fp8Dense) for name in names)
        return parts._replace(
            attn=attn,
            cross=AttentionParts(parts.cross, ("to_q",), layer),
            up=layer(parts.up),
            down=layer(parts.down),
            norm=_norm_modulate_fp8 if shared_fp8 else norm_modulate,
            attend=sparse or (eight_bit_attention if eight_bits else parts.attend),
            feed=_feed_forward,
        )
