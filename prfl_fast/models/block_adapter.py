"""Base classes of model adapters.

A family derives from :class:`BlockAdapter`, or from :class:`DiffusersAdapter` for a class of
diffusers, and implements its forwards, checks, inputs, features and head.
"""

import copy
import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import nn

from prfl_fast.utils.checks import check, check_count
from prfl_fast.utils.modules import (
    forget,
    instance_forward,
    set_forward,
    unwrap,
    weights_of,
    with_weights,
)
from prfl_fast.utils.optional import need
from prfl_fast.utils.recompute import in_chunks

Replacements = list[tuple[Any, Callable[..., Any]]]
# Calls run(block, *args) in place of block(*args).
BlockRunner = Callable[..., torch.Tensor]

# The patched models that share a module.
_patched_by: "weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[nn.Module]]" = (
    weakref.WeakKeyDictionary()
)


def feed_forward_in_chunks(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Replace a feed-forward's forward: run the class's forward on ``self.chunk`` tokens a time."""
    forward = functools.partial(type(self).forward, self)
    return in_chunks(with_weights(self, forward), hidden_states, self.chunk)


def check_class_forward(modules: Iterable[nn.Module], allowed: object) -> None:
    """Raise ``ValueError`` if a module has an instance forward that is not ``allowed``."""
    for module in modules:
        if "forward" in module.__dict__ and instance_forward(module) is not allowed:
            raise ValueError(
                f"{type(module).__name__} has a replaced forward (a hook of accelerate?), expected "
                "that of its class. Remove the hook, and add it again after this call"
            )


def unwrap_block(block: Any) -> Any:
    """Return a block without the wrappers of torch's checkpointing, FSDP and torch.compile."""
    for name in ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"):
        block = block._modules.get(name, block)
    return block


class BlockCall:
    """Call ``function(block, ...)`` in place of a block; the last arguments are ``names``."""

    def __init__(
        self, block: nn.Module, function: Callable[..., torch.Tensor], names: tuple[str, ...]
    ) -> None:
        self.block, self.function, self.names = block, function, names
        self.parameters, self.buffers = block.parameters, block.buffers

    def __call__(self, *args: Any) -> torch.Tensor:
        count = len(args) - len(self.names)
        named = dict(zip(self.names, args[count:], strict=True))
        with weights_of(self.block):  # a recompute does not call the block
            return self.function(self.block, *args[:count], **named)


def call_block(
    block: Any, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Return ``function(block, ...)``, called by the runner of ``checkpoint_blocks``, if any."""
    run = block.__dict__.get("block_runner")
    if run is None or not torch.is_grad_enabled():
        return function(block, *args, **kwargs)
    # A runner keeps its first argument, the residual stream, for the backward.
    names = tuple(sorted(kwargs, key=lambda name: not isinstance(kwargs[name], torch.Tensor)))
    return run(BlockCall(block, function, names), *args, *(kwargs[name] for name in names))


def class_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the class's forward of an unpatched block that has a runner."""
    return call_block(self, type(self).forward, *args, **kwargs)


def refuse_sequence(name: str, group: Any) -> None:
    """Raise ``ValueError`` for a process group, because models of this name run whole samples."""
    if group is not None:
        raise ValueError(
            f"model is a {name}, whose samples run on one rank each, expected diffusers' "
            "WanTransformer3DModel, two experts or a reward model of it. Use "
            "ParallelConfig(sequence=1), and shard the weights of this model"
        )


class BlockAdapter:
    """Implement the methods of :class:`prfl_fast.models.Adapter` that block-based families share.

    A family implements ``replacements``, ``remove_head`` and the methods of the protocol that are
    missing here, and overrides methods that differ. ``base`` is a model without its wrappers.
    """

    name: str
    lists: ClassVar[tuple[str, ...]] = ("blocks",)  # names of the lists of blocks, in order
    # Forwards that this family sets; those of blocks call call_block.
    own_forwards: ClassVar[tuple[Callable[..., Any], ...]] = ()

    def replacements(self, base: Any) -> Replacements:
        """Return the pairs (module, forward) that :meth:`patch` sets."""
        raise NotImplementedError

    def check_patchable(self, base: Any) -> None:
        """Raise ``ValueError`` if our forwards would change the model's behavior."""
        for module, forward in self.replacements(base):
            # accelerate may have wrapped the whole model's forward, which still runs.
            if module is not base and instance_forward(module) is not class_forward:
                check_class_forward([module], forward)

    def head_modules(self, base: Any) -> list[nn.Module]:
        """Return the modules after the last block."""
        raise NotImplementedError

    def remove_head(self, base: Any, num_blocks: int) -> None:
        """Remove parameters after the last block, and set ``num_blocks`` in the configuration."""
        raise NotImplementedError

    def patch(self, model: nn.Module) -> None:
        """Set our forwards on this instance; raise ``ValueError`` of :meth:`check_patchable`."""
        base = unwrap(model)
        self.check_patchable(base)
        for module, forward in self.replacements(base):
            if "forward" not in module.__dict__ or instance_forward(module) is class_forward:
                set_forward(module, forward)
        for module, _ in self.replacements(base):
            _patched_by.setdefault(unwrap_block(module), weakref.WeakSet()).add(base)

    def unpatch(self, model: nn.Module) -> None:
        """Delete our forwards. An unpatched model does not change.

        Modules that another patched model shares keep our forwards. These run the class's forward
        if an unpatched model calls them.
        """
        base = unwrap(model)
        for module, forward in self.replacements(base):
            others = {*_patched_by.get(module, ())} - {base}
            if module in _patched_by:
                _patched_by[module].discard(base)
            if instance_forward(module) is forward and not others:
                del module.forward
                forget(module)
                if "block_runner" in module.__dict__:
                    set_forward(module, class_forward)

    def is_patched(self, model: nn.Module) -> bool:
        """Return True if every module runs our forward."""
        pairs = self.replacements(unwrap(model))
        return all(instance_forward(module) is forward for module, forward in pairs)

    def feed_forwards(self, base: Any) -> list[Any]:
        """Return the feed-forward of every block, a module of one tensor ``[B, L, D]``."""
        return [block.ffn for block in self.blocks(base)]

    def check_chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Raise the errors of :meth:`chunk_feed_forward`, and change nothing."""
        if tokens is not None:
            check_count("tokens", tokens)
        check_class_forward(self.feed_forwards(unwrap(model)), feed_forward_in_chunks)

    def chunk_feed_forward(self, model: nn.Module, tokens: int | None) -> None:
        """Run the feed-forward of every block ``tokens`` tokens at a time; None undoes it.

        Raise ``ValueError`` if ``tokens`` is not positive or a feed-forward has a replaced forward.
        """
        self.check_chunk_feed_forward(model, tokens)
        for layer in self.feed_forwards(unwrap(model)):
            if tokens is not None:
                layer.chunk = tokens
                set_forward(layer, feed_forward_in_chunks)
            elif "forward" in layer.__dict__:
                del layer.chunk, layer.forward

    def check_checkpoint_blocks(self, model: nn.Module, on: bool) -> None:
        """Raise the errors of :meth:`checkpoint_blocks` with a runner or None; change nothing."""
        for block in map(unwrap_block, self.blocks(model) if on else ()):
            if instance_forward(block) not in self.own_forwards:
                check_class_forward([block], class_forward)

    def checkpoint_blocks(self, model: nn.Module, run: BlockRunner | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it.

        ``args`` are the arguments that the model passes, the residual stream first. Raise
        ``ValueError`` if a block has a forward that is not of this package.
        """
        self.check_checkpoint_blocks(model, run is not None)
        for block in map(unwrap_block, self.blocks(model)):
            block.__dict__.pop("block_runner", None)
            if instance_forward(block) is class_forward:
                del block.forward
            if run is not None:
                if "forward" not in block.__dict__:
                    set_forward(block, class_forward)
                block.__dict__["block_runner"] = run

    def shared_heads(self, config: Mapping[str, Any]) -> int:
        """Return the heads that ranks sharing a sample divide; 1 if a sample runs on one rank."""
        return 1

    def check_shard_sequence(self, model: nn.Module, group: Any) -> None:
        """Raise ``ValueError`` for a process group, unless the family supports it."""
        refuse_sequence(self.name, group)

    def shard_sequence(self, model: nn.Module, group: Any) -> None:
        """Run each sample's tokens on all ranks of a process group; None undoes it.

        Raise ``ValueError`` if the family does not support it.
        """
        self.check_shard_sequence(model, group)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """Return the transformer blocks, in order."""
        base: Any = unwrap(model)
        lists = [getattr(base, name) for name in self.lists]
        return lists[0] if len(lists) == 1 else nn.ModuleList(chain(*lists))

    def first_blocks(self, base: Any, num_blocks: int) -> dict[str, nn.ModuleList]:
        """Return the lists of a model cut to its first blocks, by name."""
        kept = {}
        for name in self.lists:
            kept[name] = getattr(base, name)[:num_blocks]
            num_blocks -= len(kept[name])
        return kept

    def backbone(self, model: nn.Module, num_blocks: int) -> nn.Module:
        """Return a deep copy of the embeddings and the first blocks, patched if the model is.

        Raise ``ValueError`` if ``num_blocks`` is not between 1 and the model's number of blocks.
        """
        base, blocks = unwrap(model), self.blocks(model)
        expected = f"1 to {len(blocks)} (the model's blocks)"
        check(1 <= num_blocks <= len(blocks), "num_blocks", num_blocks, expected)
        # deepcopy takes the memo's entries instead of copies, so unused parts need no memory.
        kept = self.first_blocks(base, num_blocks).items()
        memo: dict[int, nn.Module] = {
            id(getattr(base, name)): copy.deepcopy(first) for name, first in kept
        }
        memo |= {id(part): nn.Identity() for part in self.head_modules(base)}
        return self._headless(copy.deepcopy(base, memo), num_blocks)

    def _headless(self, base: Any, num_blocks: int) -> nn.Module:
        self.remove_head(base, num_blocks)
        for parameter in base.parameters():
            parameter.grad = None
        return base

    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``state`` under the names of the family's official checkpoints."""
        return dict(state)

    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return ``state`` of an official checkpoint under this class's names."""
        return dict(state)


class NoReference:
    """Refuse the layout of HY-Video-PRFL, which holds Wan only."""

    name: str

    def to_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Raise ``ValueError``."""
        raise ValueError(f"{self.name} has no layout of HY-Video-PRFL, use save and load")

    from_reference = to_reference

    def reference_config(self, model: nn.Module) -> dict[str, Any]:
        """Raise ``ValueError``."""
        return self.to_reference({})


class DiffusersAdapter(BlockAdapter):
    """Adapter of one transformer class of diffusers, a ``ModelMixin`` with a ``config``.

    ``attributes`` names the plain attributes of a model that are saved with its configuration,
    ``heads`` the modules after the last block. Parameters whose names match ``unreached`` get no
    gradient from the velocity. ``caches`` is True if a rollout keeps the keys and values of the
    text.
    """

    def block_count(self, config: Mapping[str, Any]) -> int:
        """Return the number of blocks of a configuration."""
        return int(config["num_layers"])

    def depth(self, config: Mapping[str, Any], num_blocks: int) -> dict[str, int]:
        """Return the entries of a configuration for a model of its first ``num_blocks`` blocks."""
        return {"num_layers": num_blocks}

    def patch_sizes(self, config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return frames, rows and columns of a patch."""
        frames, height, width = config.get("patch_size", (1, 2, 2))
        return frames, height, width

    class_name: ClassVar[str]
    attributes: ClassVar[tuple[str, ...]] = ()
    heads: ClassVar[Sequence[str]] = ("norm_out", "proj_out")
    unreached: ClassVar[str] = r"(?!)"  # matches no name
    caches: ClassVar[bool] = False

    def matches(self, model: nn.Module) -> bool:
        """Return True for the diffusers class, its subclasses, and wrappers around them."""
        return any(
            c.__name__ == self.class_name and c.__module__.startswith("diffusers.")
            for c in type(unwrap(model)).__mro__
        )

    def head_modules(self, base: Any) -> list[nn.Module]:
        """Return norms and projections after the last block, the norm of the video first."""
        return [getattr(base, name) for name in self.heads]

    def remove_head(self, base: Any, num_blocks: int) -> None:
        """Remove norms and projections after the last block."""
        for name in self.heads:
            setattr(base, name, nn.Identity())
        base.register_to_config(**self.depth(base.config, num_blocks))

    def hidden_size(self, model: nn.Module) -> int:
        """Return D, the width of the residual stream."""
        config: Any = unwrap(model).config  # embeddings may have an adapter
        return config.num_attention_heads * config.attention_head_dim

    def check_checkpoint_blocks(self, model: nn.Module, on: bool) -> None:
        """Raise ``ValueError`` if ``on`` and a subclass has switched this off."""
        base: Any = unwrap(model)
        kind, ok = type(base).__name__, not on or base._supports_gradient_checkpointing
        check(ok, "model", kind, "a class that supports gradient checkpointing")

    def checkpoint_blocks(self, model: nn.Module, run: BlockRunner | None) -> None:
        """Call every block as ``run(block, *args)`` where gradients are enabled; None undoes it.

        ``args`` are the residual stream ``[B, L, D]`` and the inputs that all blocks share.
        """
        base: Any = unwrap(model)
        if run is None:
            base.disable_gradient_checkpointing()
        else:
            base.enable_gradient_checkpointing(run)

    def backbone_config(self, model: nn.Module) -> dict[str, Any]:
        """Return the configuration for :meth:`backbone_from_config` as plain JSON values."""
        base: Any = unwrap(model)
        public = {k: v for k, v in base.config.items() if not k.startswith("_")}
        public |= {k: getattr(base, k) for k in self.attributes if hasattr(base, k)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in public.items()}

    def backbone_from_config(self, config: dict[str, Any]) -> nn.Module:
        """Build a randomly initialized headless backbone of that configuration.

        Raise ``ValueError`` if diffusers does not take the configuration.
        """
        own = {k: v for k, v in config.items() if k not in self.attributes}
        try:
            base = getattr(need("diffusers"), self.class_name)(**own)
        except TypeError as error:
            text = f"backbone config does not fit {self.class_name}: {error}"
            raise ValueError(text) from error
        for key in self.attributes:
            if key in config:
                setattr(base, key, config[key])
        return self._headless(base, len(self.blocks(base)))
