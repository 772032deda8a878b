"""Activation checkpointing of transformer blocks: modes ``none``, ``full`` and ``attention``.

``none`` keeps every tensor that the backward reads. ``full`` keeps only the block's input and runs
the block again in the backward. ``attention`` also keeps the outputs of attention operations (and
their log-sum-exp), so the second run skips the operation whose cost grows with the square of the
tokens. Cross-attention to a short text is cheap, so it runs again (:func:`is_kept`). Gradients are
bit-identical in all modes, because the order of operations is the same; only the sums of adapters'
gradients over several calls of a block may be taken in another order.
"""

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prfl_fast.memory.ledger import mark, mark_saved
from prfl_fast.memory.offload import Handle, Offloader
from prfl_fast.models.block_adapter import BlockCall, unwrap_block
from prfl_fast.models.experts import check_members
from prfl_fast.models.registry import find_blocks
from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.modules import STREAMED, unwrap
from prfl_fast.utils.recompute import recomputed

Model = TypeVar("Model", bound=nn.Module)
BlockRunner = Callable[..., torch.Tensor]

# A trained 14B block at 720p keeps 15.1 GB, 774 MB and 1.56 GB; the forward and backward of a whole
# PRFL step take 24.1, 31.9 and 26.3 PFLOP (counted, bench/NOTES.md and RESULTS.md).
MODES = ("none", "full", "attention")

# By name, because the operations of a package exist only after the package is imported.
ATTENTION_OPS = frozenset(
    (
        "prfl_fast::attention",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_fused_attention_overrideable",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "flash_attn_3::_flash_attn_forward",
        "_diffusers_flash_attn_3::_flash_attn_forward",
        "xformers_flash::flash_fwd",
        "xformers_flash3::flash_fwd",
        "xformers::efficient_attention_forward_cutlass",
    )
)

_offloaders: "weakref.WeakKeyDictionary[nn.Module, Offloader]" = weakref.WeakKeyDictionary()


def is_attention(op: Any) -> bool:
    """Return True if an operator is the forward of fused attention."""
    return isinstance(op, torch._ops.OpOverload) and op._schema.name in ATTENTION_OPS


def is_kept(op: Any, args: Sequence[Any]) -> bool:
    """Return True if mode ``attention`` keeps the results of an operation called with ``args``.

    Attention of prfl_fast is not kept if it has fewer keys than queries, and at most half as many
    keys as channels. It then costs no more than a linear layer: 4·Lk·D FLOPs per query, at most
    2·D².
    """
    if not is_attention(op):
        return False
    if op._schema.name != "prfl_fast::attention":
        return True
    q, k, *_ = args
    return bool(k.shape[1] >= q.shape[1] or 2 * k.shape[1] > q.shape[2])


def activation_checkpointing(
    model: Model,
    mode: Literal["none", "full", "attention"] = "full",
    offload: Literal["cpu"] | None = None,
    *,
    host_limit: int | None = None,
) -> Model:
    """Set the activation checkpointing mode of every transformer block in place; return the model.

    Each call replaces the settings of the previous call; ``("none", None)`` is PyTorch's own
    behavior. The model may be patched, have adapters (peft) or compiled blocks. Calls without
    gradients are not affected. A graph in mode ``attention`` supports one backward.

    Args:
        model: a transformer, wrapped or not, with an adapter or a ``ModuleList`` of blocks; for a
            reward model, its backbone.
        mode: ``none`` saves every tensor of a block, ``full`` recomputes the block in the
            backward, ``attention`` recomputes all of it except attention.
        offload: ``"cpu"`` keeps saved tensors in host memory; the device holds those of two blocks
            at most.
        host_limit: bytes of host memory for offloading; None is the available memory at the time of
            use, minus a tenth of the machine's memory.

    Raises:
        TypeError: if the model has neither an adapter nor a ``ModuleList``.
        ValueError: if a choice is unknown, ``host_limit`` is given without offload, or a model
            without an adapter has no single ``ModuleList`` of blocks, replaced forwards of blocks,
            or its own gradient checkpointing on.
        RuntimeError: from a later forward, if host memory does not suffice.
    """
    check_choice("mode", mode, MODES)
    check_choice("offload", offload, (None, "cpu"))
    ok = host_limit is None or (offload is not None and host_limit >= 0)
    check(ok, "host_limit", host_limit, "bytes, with offload='cpu' only")
    for member in check_members(model, partial(check_checkpointing, mode=mode, offload=offload)):
        _set_checkpointing(member, mode, offload, host_limit)
    return model


def check_checkpointing(
    model: nn.Module, mode: str, offload: str | None, streamed: bool | None = None
) -> None:
    """Raise the errors of :func:`activation_checkpointing` for one transformer; change nothing.

    ``streamed`` is True if the weights of blocks will wait in host memory; None asks the blocks.
    """
    adapter = find_blocks(model)
    streamed = _is_streamed(model) if streamed is None else streamed
    adapter.check_checkpoint_blocks(model, mode != "none" or offload is not None or streamed)


def _is_streamed(model: nn.Module) -> bool:
    blocks = map(unwrap_block, find_blocks(model).blocks(model))
    return any(STREAMED in block.__dict__ for block in blocks)


def _set_checkpointing(
    model: nn.Module, mode: str, offload: str | None, host_limit: int | None
) -> None:
    offloader = None if offload is None else Offloader(host_limit)
    base = unwrap(model)  # wrapped and bare model share it
    _offloaders.pop(base, None)
    if offloader is not None:
        _offloaders[base] = offloader
    run: BlockRunner | None = _Runner(mode, offloader)
    if offloader is None and mode != "attention" and not _is_streamed(model):
        run = None if mode == "none" else _run_full
    find_blocks(model).checkpoint_blocks(model, run)


def offload_bytes(model: nn.Module) -> dict[str, int]:
    """Return bytes of tensors offloaded for a model since :func:`activation_checkpointing`.

    Returns:
        ``device_now, device_peak``: saved tensors on the device, including those being copied;
        ``host_now, host_peak``: host buffers of live graphs; ``host_pool``: these plus free buffers
        for the next graph; ``transferred``: total in both directions. All are 0 without offloading.
    """
    find_blocks(model)
    offloader = _offloaders.get(unwrap(model))
    return dict((offloader or Offloader()).bytes)


def _run_full(block: nn.Module, *args: Any) -> torch.Tensor:
    mark(args[0], "checkpoints")
    return recomputed(block, *args)


class _Runner:
    """Run a block in a mode, with or without offload. Deep copies of a model share it."""

    def __init__(self, mode: str, offloader: Offloader | None) -> None:
        self.mode, self.offloader = mode, offloader
        self.warned = False  # the warning is about the model's class, so it is given once

    def __deepcopy__(self, memo: object) -> "_Runner":
        return self

    def __reduce__(self) -> Any:  # a model read from a file has its own host buffers
        return _Runner, (self.mode, self.offloader and Offloader(self.offloader.host_limit))

    # When the whole model is compiled, blocks run eagerly or are compiled one by one. Torch's own
    # checkpoint has this decorator. torch.compiler.disable would import dynamo, which takes as long
    # as importing torch.
    @torch._disable_dynamo
    def __call__(self, block: nn.Module, *args: Any) -> torch.Tensor:
        pack: Callable[[torch.Tensor], Handle] = _stay
        hooks: Any = contextlib.nullcontext()
        weights = (block.block if isinstance(block, BlockCall) else unwrap_block(block)).__dict__
        weights = weights.get(STREAMED)
        if self.offloader is None:
            mark(args[0], "checkpoints")
        else:
            pack = self.offloader.open(block, args[0], tree_leaves(args[1:])).pack
            hooks = saved_tensors_hooks(pack, Handle.unpack)
        if weights is not None:
            weights.saved_by_place = True
            if self.mode == "none":
                hooks = saved_tensors_hooks(partial(weights.pack, otherwise=pack), Handle.unpack)
        with hooks:
            if self.mode == "none":
                return block(*args)
            if self.mode == "full":
                return recomputed(block, *args)
            kept: deque[Any] = deque()  # one per call, because several graphs may be alive
            modes = _Keep(pack, kept), _Replay(kept)
            out = recomputed(block, *args, context_fn=lambda: modes)
        if not (modes[0].found or self.warned):
            self.warned = True
            warnings.warn(
                f"mode 'attention' found no known attention operation in {type(block).__name__}; "
                "the whole block is recomputed, as in mode 'full'",
                stacklevel=2,
            )
        return out


def _stay(tensor: torch.Tensor) -> Handle:
    """Return a handle of a tensor that stays on its device."""
    mark_saved(tensor)
    return Handle(tensor)


# PyTorch's create_selective_checkpoint_contexts holds its tensors where no saved-tensor hook sees
# them, so they could not be offloaded.
class _Keep(TorchDispatchMode):
    """Pack the results of attention operations in the forward."""

    def __init__(self, pack: Callable[[torch.Tensor], Handle], kept: deque[Any]) -> None:
        super().__init__()
        self._pack, self._kept = pack, kept
        self.found = False  # True once an attention operation has run

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # A compiled block stays compiled under this mode only if this is True.
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found = self.found or is_attention(func)
        if is_kept(func, args):
            own = out
            if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
                # Without gradients this is compiled code, which reuses the memory of its outputs.
                own = tree_map_only(torch.Tensor, torch.clone, out)
            self._kept.append((func, tree_map_only(torch.Tensor, self._pack, own)))
        return out


class _Replay(TorchDispatchMode):
    """Return the packed results of attention operations in the recompute."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # as in the forward

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_kept(func, args):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError(
                f"the recompute runs {func} once more than the forward did. Mode 'attention' "
                "supports one backward per graph: choose 'full' for retain_graph"
            )
        expected, out = self._kept.popleft()
        if func is not expected:
            raise RuntimeError(f"the recompute runs {func}, expected {expected} as in the forward")
        return tree_map_only(Handle, Handle.unpack, out)
