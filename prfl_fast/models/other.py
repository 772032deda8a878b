"""Models of other libraries without an adapter: their blocks, and a function as their velocity."""

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
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
from prfl_fast.models.block_adapter import BlockRunner, check_class_forward
from prfl_fast.models.inference import RolloutModel, UnsupportedError
from prfl_fast.utils.checks import check
from prfl_fast.utils.modules import instance_forward, set_forward, unwrap

# The blocks of a model with several lists of them, as one list.
_joined: "weakref.WeakKeyDictionary[nn.Module, nn.ModuleList]" = weakref.WeakKeyDictionary()


class VelocityModel(nn.Module):
    """Pair a model with the function that computes its velocity.

    :class:`prfl_fast.PRFL`, the rollout, the objectives of the trainer and
    :meth:`prfl_fast.LatentRewardModel.from_backbone` take it as a transformer. Checkpoints hold the
    parameters of ``model`` under its own names.

    Args:
        model: any transformer, possibly wrapped.
        function: ``(model, x [B, C, F, H, W], timestep [B], conditions) -> velocity`` like ``x``,
            where ``x`` is ``(1-σ)·x0 + σ·ε``, ``timestep`` is 1000·σ, and the velocity is
            ``ε - x0``. It must call ``model`` once.
        blocks: names of the model's lists of blocks, in the order in which they run. None finds
            them: the only ``nn.ModuleList`` of the model, or those whose classes the model names in
            ``_repeated_blocks`` or ``_no_split_modules``, as models of diffusers do.
        hidden_size: width of a block's output; None reads ``num_attention_heads`` and
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


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of blocks of a model by name; see :class:`VelocityModel`.

    Raise ``ValueError`` if there is none, or several of which none is said to hold its blocks.
    """
    base: Any = unwrap(model)
    names = None
    if isinstance(base, VelocityModel):
        base, names = unwrap(base.model), base.block_names
    lists = {k: m for k, m in base.named_children() if isinstance(m, nn.ModuleList)}
    lists = {k: m for k, m in lists.items() if len(m)}
    kind = type(base).__name__
    if names is not None:
        missing = [name for name in names if name not in lists]
        ok = len(names) > 0 and not missing
        check(ok, "blocks", missing or names, f"names of lists of {kind}, of {[*lists]}")
        return {name: lists[name] for name in names}
    for attribute in ("_repeated_blocks", "_no_split_modules"):
        classes = getattr(base, attribute, None) or ()
        named = {k: m for k, m in lists.items() if type(unwrap(m[0])).__name__ in classes}
        if named:
            return named
    hint = "Say which hold its blocks: VelocityModel(model, function, blocks=[...])"
    expected = "one torch.nn.ModuleList of blocks, a direct child of the model"
    check(len(lists) == 1, f"blocks of {kind}", sorted(lists), expected, hint=hint)
    return lists


class _Call(nn.Module):
    """Call a block's own forward with its keyword arguments, as a block of positional ones."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.block, self.names = block, names

    def forward(self, *args: Any) -> Any:
        """Split ``args`` into positional and keyword arguments, and call the block's class."""
        split = len(args) - len(self.names)
        keywords = dict(zip(self.names, args[split:], strict=True))
        return type(self.block).forward(self.block, *args[:split], **keywords)


def _run_block(block: Any, *args: Any, **kwargs: Any) -> Any:
    """Replace a block's forward by a call of ``block.block_runner``."""
    if not torch.is_grad_enabled():
        return type(block).forward(block, *args, **kwargs)
    # A runner keeps its first argument, the residual stream, for the backward.
    names = sorted(kwargs, key=lambda name: not isinstance(kwargs[name], torch.Tensor))
    return block.block_runner(_Call(block, names), *args, *(kwargs[name] for name in names))


class BlocksAdapter:
    """Serve the memory policies of any model with lists of transformer blocks."""

    name = "blocks of any model"

    def matches(self, model: nn.Module) -> bool:
        """Return True for a model with a ``ModuleList`` as a direct child."""
        lists = unwrap(model).children() if isinstance(model, nn.Module) else ()
        return any(isinstance(child, nn.ModuleList) for child in lists)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return all blocks of the model, in order."""
        lists = list(block_lists(model).values())
        if len(lists) == 1:
            return lists[0]
        blocks = [block for part in lists for block in part]
        joined = _joined.get(lists[0])
        if joined is None or list(joined) != blocks:
            # One object for each model, because callers keep their state by it.
            joined = _joined[lists[0]] = nn.ModuleList(blocks)
        return joined

    def checkpoint_blocks(self, model: nn.Module, run: BlockRunner | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it.

        Raise ``ValueError`` if the model's own gradient checkpointing is on, or a block has another
        replaced forward.
        """
        blocks = self.blocks(model)
        check_class_forward(blocks, _run_block)
        for name, module in unwrap(model).named_modules():
            on = getattr(module, "gradient_checkpointing", False) is True and run is not None
            hint = "Call model.disable_gradient_checkpointing(); it would recompute a second time"
            check(not on, f"gradient_checkpointing of {name or 'the model'}", on, "off", hint=hint)
        for block in blocks:
            if run is not None:
                block.block_runner = run  # type: ignore[assignment]
                set_forward(block, _run_block)
            elif instance_forward(block) is _run_block:
                del block.block_runner, block.forward

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Raise ``ValueError`` unless ``tokens`` is None: the blocks' structure is unknown."""
        kind = type(unwrap(model)).__name__
        check(tokens is None, f"feed_forward_chunk of {kind}", tokens, "None without an adapter")


def _inner(model: nn.Module) -> Any:
    """Return the bare model inside a :class:`VelocityModel`."""
    base: Any = unwrap(model)
    return unwrap(base.model)


class _StopForward(BaseException):
    """Leave a model's forward after a block; no handler of ``Exception`` catches it."""


@contextlib.contextmanager
def stop_after(block: nn.Module) -> Iterator[list[Any]]:
    """Leave the forward called inside after ``block``; the list receives the block's output."""
    outputs: list[Any] = []

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        raise _StopForward

    hook = block.register_forward_hook(stop)
    try:
        with contextlib.suppress(_StopForward):
            yield outputs
    finally:
        hook.remove()


class VelocityAdapter:
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

    def patch(self, model: nn.Module) -> None:
        """Patch the model inside; raise ``TypeError`` if no adapter supports it."""
        self._find(_inner(model)).patch(_inner(model))

    def unpatch(self, model: nn.Module) -> None:
        """Undo :meth:`patch`."""
        self._find(_inner(model)).unpatch(_inner(model))

    def is_patched(self, model: nn.Module) -> bool:
        """Return True if the model inside is patched."""
        return bool(self._find(_inner(model)).is_patched(_inner(model)))

    def _memory(self, model: nn.Module) -> tuple[Any, nn.Module]:
        """Return the adapter that knows the blocks, and the model to call it with."""
        adapter = self._find_blocks(_inner(model))
        return adapter, model if isinstance(adapter, BlocksAdapter) else _inner(model)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return all blocks of the model inside, in order."""
        adapter, target = self._memory(model)
        found: nn.ModuleList = adapter.blocks(target)
        return found

    def _distinct(self, model: nn.Module) -> nn.ModuleList:
        """Return the blocks; raise ``ValueError`` if one runs twice: N blocks have no end then."""
        blocks = self.blocks(model)
        count, expected = len({*blocks}), f"{len(blocks)}: each module once in its lists"
        check(count == len(blocks), "the number of blocks of a reward", count, expected)
        return blocks

    def checkpoint_blocks(self, model: nn.Module, run: BlockRunner | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it."""
        adapter, target = self._memory(model)
        adapter.checkpoint_blocks(target, run)

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Run the feed-forwards ``tokens`` tokens at a time, if an adapter knows them."""
        adapter, target = self._memory(model)
        adapter.chunk_feed_forward(target, tokens)

    def hidden_size(self, model: nn.Module) -> int:
        """Return the width of a block's output; raise ``ValueError`` if nothing tells it."""
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
        """Return everything but the blocks, which a reward model keeps frozen."""
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
        """Raise :class:`UnsupportedError`: a function has no values that its steps share."""
        raise UnsupportedError("a VelocityModel runs its function at each step")

    def features(
        self,
        model: nn.Module,
        x: torch.Tensor,
        timestep: torch.Tensor,
        conditions: Conditions,
        num_blocks: int,
    ) -> torch.Tensor:
        """Return the output of block ``num_blocks``, ``[B, L, D]``, of a tuple its first item.

        The forward is stopped there.

        Raises:
            ValueError: if the model runs under FSDP, hooks of accelerate or torch.compile as a
                whole, the function does not reach the block, or its output has another form.
        """
        inner, width = _inner(model), self.hidden_size(model)
        stoppable = not ("forward" in inner.__dict__ or type(inner).__name__.startswith("FSDP"))
        kind = f"{type(inner).__name__} of a reward"
        expected = "a model without FSDP, hooks of accelerate or torch.compile around it as a whole"
        hint = "Its forward is stopped after a block, which they do not survive; wrap the blocks"
        check(stoppable and not torch.compiler.is_compiling(), kind, kind, expected, hint=hint)
        with stop_after(self._distinct(model)[num_blocks - 1]) as outputs:
            self._call(model, x, timestep, conditions)
        check(len(outputs) > 0, "calls of the last block", 0, "one: the function calls the model")
        out = outputs[0][0] if isinstance(outputs[0], (tuple, list)) else outputs[0]
        ok = isinstance(out, torch.Tensor) and out.ndim >= 3
        ok = ok and (out.shape[0], out.shape[-1]) == (len(x), width)
        expected = f"[{len(x)}, ..., {width}], batch and hidden_size"
        check(ok, f"the output of block {num_blocks}", out, expected)
        # A stream that began as a transposed view, as HunyuanVideo's, stays one.
        return out.flatten(1, -2).contiguous()  # [B, L, D]

    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module:
        """Return a deep copy without the blocks after ``num_blocks``, paired with the function.

        What the model runs after its blocks stays in the copy, but never runs. Raise ``ValueError``
        if ``num_blocks`` is not between 1 and the model's number of blocks.
        """
        base: Any = unwrap(model)
        inner, blocks = _inner(model), self._distinct(model)
        expected = f"1 to {len(blocks)} (the model's blocks)"
        check(1 <= num_blocks <= len(blocks), "num_blocks", num_blocks, expected)
        kept = {*blocks[:num_blocks]}
        lists = [m for m in inner.children() if isinstance(m, nn.ModuleList)]
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
        """Return the name of the class inside; the rest is in the code of the user."""
        kind = type(_inner(model))
        return {"model": f"{kind.__module__}.{kind.__qualname__}"}

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """Raise ``ValueError``: a function cannot be read from a file."""
        raise ValueError(
            f"the backbone is a VelocityModel of {config.get('model')}, which a file cannot hold. "
            "Pass the generator: LatentRewardModel.load(folder, transformer=VelocityModel(...))"
        )

    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Raise ``ValueError``: the reference's layout is that of Wan."""
        raise ValueError("a VelocityModel has no layout of HY-Video-PRFL, use save and load")

    from_reference = to_reference

    def reference_config(self, model: nn.Module) -> dict[str, Any]:
        """Raise the ``ValueError`` of :meth:`to_reference`."""
        return dict(self.to_reference({}))
