"""Models without an adapter of their own: their blocks, and a function as their velocity."""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.models.adapter import (
    Conditions,
    check_inputs,
    not_inference,
    set_first_frame,
    zero_first_frame,
)
from prfl_fast.models.block_adapter import (
    BlockRunner,
    NoReference,
    check_class_forward,
    class_forward,
    refuse_sequence,
)
from prfl_fast.models.inference import RolloutModel, UnsupportedError
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import instance_forward, set_forward, stopped_at, unwrap

# For a model with several lists of blocks: all blocks as one list, by the first list.
_joined: "weakref.WeakKeyDictionary[nn.Module, nn.ModuleList]" = weakref.WeakKeyDictionary()


class VelocityModel(nn.Module):
    """Pair a model with the function that computes its velocity.

    :class:`prfl_fast.PRFL`, the rollout, the objectives of the trainer and
    :meth:`prfl_fast.LatentRewardModel.from_backbone` take this pair as a transformer. Checkpoints
    hold the parameters of ``model`` under the names of ``model``.

    Args:
        model: any transformer, possibly wrapped.
        function: ``(model, x [B, C, F, H, W], timestep [B], conditions) -> velocity`` like ``x``,
            where ``x`` is ``(1-σ)·x0 + σ·ε``, ``timestep`` is 1000·σ, and the velocity is
            ``ε - x0``. It must call ``model`` once.
        blocks: names of the model's lists of blocks, in the order in which they run. None takes
            the only ``nn.ModuleList`` among the model's children, or without any the only one
            further inside (``"backbone.layers"``), or the lists whose classes are named in
            ``_repeated_blocks`` or ``_no_split_modules``, as in models of diffusers.
        hidden_size: width of a block's output; None takes ``num_attention_heads`` times
            ``attention_head_dim`` of the model's ``config``. Only a latent reward needs it.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[nn.Module, torch.Tensor, torch.Tensor, Conditions], torch.Tensor],
        *,
        blocks: Sequence[str] | None = None,
        hidden_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.function = model, function
        self.block_names, self.hidden_size = blocks, hidden_size

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the velocity, like ``x``."""
        return self.function(self.model, x, timestep, conditions)


def _outer_lists(base: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of a model that are not in another list, by their dotted names."""
    lists = {k: m for k, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    return {k: m for k, m in lists.items() if not any(k.startswith(f"{o}.") for o in lists)}


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks of a model by name; see :class:`VelocityModel`.

    Raise ``ValueError`` if there is no list, or several lists and no names of those with blocks.
    """
    base: Any = unwrap(model)
    names = None
    if isinstance(base, VelocityModel):
        base, names = unwrap(base.model), base.block_names
    lists = _outer_lists(base)
    kind = type(base).__name__
    if names is not None:
        missing = [name for name in names if name not in lists]
        ok = len(names) > 0 and not missing
        check(ok, "blocks", missing or names, f"names of lists of {kind}, of {[*lists]}")
        return {name: lists[name] for name in names}
    lists = {k: m for k, m in lists.items() if "." not in k} or lists
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        classes = getattr(base, attribute, None) or ()
        named = {k: m for k, m in lists.items() if type(unwrap(m[0])).__name__ in classes}
        if named:
            return named
    hint = "Name the lists with blocks: VelocityModel(model, function, blocks=[...])"
    expected = "one torch.nn.ModuleList of blocks"
    check(len(lists) == 1, f"blocks of {kind}", sorted(lists), expected, hint=hint)
    return lists


class BlocksAdapter:
    """Apply memory policies to any model with lists of transformer blocks."""

    name = "blocks of any model"

    def matches(self, model: nn.Module) -> bool:
        """Return True for a model with a ``ModuleList``."""
        modules = unwrap(model).modules() if isinstance(model, nn.Module) else ()
        return any(isinstance(module, nn.ModuleList) for module in modules)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return all blocks of the model, in order."""
        lists = list(block_lists(model).values())
        if len(lists) == 1:
            return lists[0]
        blocks = [block for part in lists for block in part]
        joined = _joined.get(lists[0])
        if joined is None or list(joined) != blocks:
            # The same object at each call, because callers store their state under it.
            joined = _joined[lists[0]] = nn.ModuleList(blocks)
        return joined

    def check_checkpoint_blocks(self, model: nn.Module, on: bool) -> None:
        """Raise the errors of :meth:`checkpoint_blocks` with a runner or None; change nothing."""
        check_class_forward(self.blocks(model), class_forward)
        for name, module in unwrap(model).named_modules() if on else ():
            own = getattr(module, "gradient_checkpointing", False) is True
            hint = "Call model.disable_gradient_checkpointing(): both would recompute each block"
            label = f"gradient_checkpointing of {name or 'the model'}"
            check(not own, label, own, "off", hint=hint)

    def checkpoint_blocks(self, model: nn.Module, run: BlockRunner | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it.

        Raise ``ValueError`` if the model's own gradient checkpointing is on, or a block has another
        replaced forward.
        """
        self.check_checkpoint_blocks(model, run is not None)
        for block in self.blocks(model):
            if run is not None:
                block.block_runner = run  # type: ignore[assignment]
                set_forward(block, class_forward)
            elif instance_forward(block) is class_forward:
                del block.block_runner, block.forward

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Raise ``ValueError`` unless ``tokens`` is None: the blocks' structure is unknown."""
        kind = type(unwrap(model)).__name__
        check(tokens is None, f"feed_forward_chunk of {kind}", tokens, "None without an adapter")

    check_chunk_feed_forward = chunk_feed_forward


def _inner(model: nn.Module) -> Any:
    """Return the bare model inside a :class:`VelocityModel`."""
    base: Any = unwrap(model)
    return unwrap(base.model)


class VelocityAdapter(NoReference):
    """Adapter of :class:`VelocityModel`, which uses the adapter of the model inside, if any.

    ``find`` and ``find_blocks`` are those of :mod:`prfl_fast.models.registry`.
    """

    name = "VelocityModel"
    planned = False  # a simulation has no function

    def __init__(self, find: Callable[..., Any], find_blocks: Callable[..., Any]) -> None:
        self._find, self._find_blocks = find, find_blocks

    def matches(self, model: nn.Module) -> bool:
        """Return True for a :class:`VelocityModel`, bare or wrapped."""
        return isinstance(unwrap(model), VelocityModel)

    def check_patchable(self, base: Any) -> None:
        """Raise the errors of :meth:`patch`, and change nothing."""
        self._find(_inner(base)).check_patchable(_inner(base))

    def patch(self, model: nn.Module) -> None:
        """Patch the inner model; raise ``TypeError`` if no adapter supports it."""
        self._find(_inner(model)).patch(_inner(model))

    def unpatch(self, model: nn.Module) -> None:
        """Undo :meth:`patch`."""
        self._find(_inner(model)).unpatch(_inner(model))

    def is_patched(self, model: nn.Module) -> bool:
        """Return True if the inner model is patched."""
        return bool(self._find(_inner(model)).is_patched(_inner(model)))

    def _memory(self, model: nn.Module) -> tuple[Any, nn.Module]:
        """Return the adapter for the blocks, and the model to pass to it."""
        adapter = self._find_blocks(_inner(model))
        return adapter, model if isinstance(adapter, BlocksAdapter) else _inner(model)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return all blocks of the inner model, in order."""
        adapter, target = self._memory(model)
        found: nn.ModuleList = adapter.blocks(target)
        return found

    def _distinct(self, model: nn.Module) -> nn.ModuleList:
        """Return the blocks; raise ``ValueError`` if one runs twice: N blocks have no end then."""
        blocks = self.blocks(model)
        count, expected = len({*blocks}), f"{len(blocks)}: each module once in its lists"
        check(count == len(blocks), "the number of blocks of a reward", count, expected)
        return blocks

    def check_checkpoint_blocks(self, model: nn.Module, on: bool) -> None:
        """Raise the errors of :meth:`checkpoint_blocks` with a runner or None; change nothing."""
        adapter, target = self._memory(model)
        adapter.check_checkpoint_blocks(target, on)

    def checkpoint_blocks(self, model: nn.Module, run: BlockRunner | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it."""
        adapter, target = self._memory(model)
        adapter.checkpoint_blocks(target, run)

    def check_chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Raise the errors of :meth:`chunk_feed_forward`, and change nothing."""
        adapter, target = self._memory(model)
        adapter.check_chunk_feed_forward(target, tokens)

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Run the feed-forwards ``tokens`` tokens at a time; None undoes it.

        Raise ``ValueError`` if no adapter supports the inner model.
        """
        adapter, target = self._memory(model)
        adapter.chunk_feed_forward(target, tokens)

    def shard_sequence(self, model: nn.Module, group: Any) -> None:
        """Raise ``ValueError`` for a process group: the function may need all tokens."""
        refuse_sequence(self.name, group)

    check_shard_sequence = shard_sequence

    def hidden_size(self, model: nn.Module) -> int:
        """Return the width of a block's output; raise ``ValueError`` if it is unknown."""
        base: Any = unwrap(model)
        config = getattr(_inner(model), "config", None)
        heads, width = (
            getattr(config, key, None) for key in ("num_attention_heads", "attention_head_dim")
        )
        size = base.hidden_size or (heads or 0) * (width or 0)
        hint = "Pass VelocityModel(model, function, hidden_size=...)"
        check(bool(size), "hidden_size", size, "the width of a block's output", hint=hint)
        return int(size)

    def embedding_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return all modules except the blocks. A reward model keeps them frozen."""
        inner, blocks = _inner(model), {*self.blocks(model)}
        parts = [m for m in inner.children() if not (m in blocks or blocks & {*m.children()})]
        return [*parts, nn.ParameterList(inner.parameters(recurse=False))]

    def check_latents(
        self, model: nn.Module, x: torch.Tensor, conditions: Conditions, name: str = "x"
    ) -> None:
        """Raise ``ValueError`` unless latents and conditions have the form of every family."""
        check_inputs(name, x, conditions)

    def velocity(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return the function's velocity in ``x.dtype``; raise ``ValueError`` for another shape."""
        out = self._call(model, x, timestep, conditions)
        ok = isinstance(out, torch.Tensor) and out.shape == x.shape
        check(ok, "the result of VelocityModel's function", out, f"a tensor {list(x.shape)}")
        return zero_first_frame(out.to(x.dtype), conditions)

    def _call(
        self, model: nn.Module, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> Any:
        timestep = timestep.to(x.device)
        timestep = timestep.expand(len(x)) if timestep.ndim == 0 else timestep
        x, conditions = not_inference(x), not_inference(conditions)
        return model(set_first_frame(x, conditions), timestep, conditions)

    def open_rollout(self, *args: Any, **kwargs: Any) -> RolloutModel:
        """Raise :class:`UnsupportedError`: values of a function cannot be cached."""
        raise UnsupportedError("a VelocityModel runs its function at each step")

    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        num_blocks: int,
    ) -> torch.Tensor:
        """Return the output of block ``num_blocks`` (of a tuple, the first item), ``[B, L, D]``.

        The forward stops after this block.

        Raises:
            ValueError: if the model is wrapped as a whole by FSDP, accelerate's hooks or
                torch.compile, the function does not run the block, or the output has another shape.
        """
        inner, width = _inner(model), self.hidden_size(model)
        stoppable = not ("forward" in inner.__dict__ or type(inner).__name__.startswith("FSDP"))
        kind = f"{type(inner).__name__} of a reward"
        expected = "a model without FSDP, hooks of accelerate or torch.compile around it as a whole"
        hint = "They fail if its forward stops after a block. Wrap the blocks instead"
        check(stoppable and not torch.compiler.is_compiling(), kind, kind, expected, hint=hint)
        with stopped_at(self._distinct(model)[num_blocks - 1].register_forward_hook) as outputs:
            self._call(model, x, timestep, conditions)
        check(len(outputs) > 0, "calls of the last block", 0, "one: the function calls the model")
        out = outputs[0][0] if isinstance(outputs[0], (tuple, list)) else outputs[0]
        ok = isinstance(out, torch.Tensor) and out.ndim >= 3
        ok = ok and (out.shape[0], out.shape[-1]) == (len(x), width)
        expected = f"[{len(x)}, ..., {width}], batch and hidden_size"
        check(ok, f"the output of block {num_blocks}", out, expected)
        # The stream may be a transposed view, as in HunyuanVideo.
        return out.flatten(1, -2).contiguous()  # [B, L, D]

    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module:
        """Return a deep copy with the first ``num_blocks`` blocks, paired with the function.

        Modules after the blocks stay in the copy and never run. Raise ``ValueError`` if
        ``num_blocks`` is not between 1 and the model's number of blocks.
        """
        base: Any = unwrap(model)
        inner, blocks = _inner(model), self._distinct(model)
        expected = f"1 to {len(blocks)} (the model's blocks)"
        check(1 <= num_blocks <= len(blocks), "num_blocks", num_blocks, expected)
        kept = {*blocks[:num_blocks]}
        lists = _outer_lists(inner).values()
        memo: dict[int, Any] = {
            id(part): nn.ModuleList(copy.deepcopy(b) for b in part if b in kept)
            for part in lists
            if {*part} & {*blocks}
        }
        names = base.block_names
        if not isinstance(self._find_blocks(inner), BlocksAdapter):
            names = None
        elif names is None:
            names = [*block_lists(model)]
        copied = copy.deepcopy(inner, memo)
        for parameter in copied.parameters():
            parameter.grad = None
        size = self.hidden_size(model)
        return VelocityModel(copied, base.function, blocks=names, hidden_size=size)

    def backbone_config(self, model: nn.Module) -> dict[str, Any]:
        """Return the name of the inner class; user code must build the rest."""
        kind = type(_inner(model))
        return {"model": f"{kind.__module__}.{kind.__qualname__}"}

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """Raise ``ValueError``: a file cannot hold a function."""
        raise ValueError(
            f"the backbone is a VelocityModel of {config.get('model')}, which a file cannot hold. "
            "Pass the generator: LatentRewardModel.load(folder, transformer=VelocityModel(...))"
        )
