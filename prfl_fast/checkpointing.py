"""Checkpoint policies: what a transformer block keeps for its backward.

``none`` keeps every tensor that the backward reads. ``full`` keeps the block's input alone and runs
the block again in the backward. ``attention`` keeps the input and what attention operations return
(the output and the log-sum-exp of its scores), so that the second run leaves out the operation
whose cost grows with the square of the tokens. No policy changes a bit of a gradient: the same
operations run in the same order.
"""

import contextlib
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prfl_fast.adapters import find_adapter
from prfl_fast.ledger import mark
from prfl_fast.offload import Handle, Offloader
from prfl_fast.recompute import recomputed

Model = TypeVar("Model", bound=nn.Module)
Run = Callable[..., torch.Tensor]

POLICIES = ("none", "full", "attention")

# By name: those of packages exist once the package is imported, and only then can they run.
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
    """Whether an operator is the forward of fused attention."""
    return isinstance(op, torch._ops.OpOverload) and op._schema.name in ATTENTION_OPS


def checkpoint(
    model: Model,
    policy: Literal["none", "full", "attention"] = "full",
    offload: Literal["cpu"] | None = None,
    *,
    host_limit: int | None = None,
) -> Model:
    """Choose what each transformer block of this instance keeps for its backward, and where.

    The last call wins; ``("none", None)`` takes everything back. Works with patched and unpatched
    models, adapters (peft) and compiled blocks; calls without gradients are not touched. A graph
    under ``attention`` can be run backward once.

    Args:
        model: a supported transformer, wrapped or not; of a reward model, its backbone.
        policy: see the head of this file.
        offload: ``"cpu"`` keeps it in host memory, and at most two blocks' worth on the device.
        host_limit: bytes of host memory that offloading may take; None is what is available when it
            asks, less a tenth of the machine's memory.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: the model is not supported.
        ValueError: an unknown policy or place, or a limit without offloading.
        RuntimeError: (from a later forward) the host memory does not suffice.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if offload not in (None, "cpu"):
        raise ValueError(f"offload is {offload!r}, expected 'cpu' or None")
    if host_limit is not None and (offload is None or host_limit < 0):
        raise ValueError(f"host_limit is {host_limit}, expected bytes, with offload='cpu' only")
    adapter = find_adapter(model)
    offloader = None if offload is None else Offloader(host_limit)
    blocks = adapter.blocks(model)
    _offloaders.pop(blocks, None)
    if offloader is not None:
        _offloaders[blocks] = offloader
    run: Run | None = _runner(policy, offloader)
    if offloader is None and policy != "attention":
        run = None if policy == "none" else _run_full
    adapter.checkpoint_blocks(model, run)
    return model


def offload_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of what :func:`checkpoint` offloads for this model, since it was called.

    Returns:
        ``device_now, device_peak``: kept on the device, copies on their way included;
        ``host_now, host_peak``: in host buffers of live graphs; ``host_pool``: in these and in
        buffers that wait for the next graph; ``transferred``: in both directions. All 0 without
        offloading.

    Raises:
        TypeError: the model is not supported.
    """
    offloader = _offloaders.get(find_adapter(model).blocks(model))
    return dict((offloader or Offloader()).bytes)


# Closures, not objects: a deep copy of the model shares them, as it shares its class.
def _run_full(block: nn.Module, *args: Any) -> torch.Tensor:
    mark(args[0], "checkpoints")
    return recomputed(block, *args)


def _runner(policy: str, offloader: Offloader | None) -> Run:
    """What calls a block, for the policies that PyTorch has no function for."""
    warned = False

    # In a model compiled whole, blocks then run eagerly, or compiled themselves.
    @torch.compiler.disable
    def run(block: nn.Module, *args: Any) -> torch.Tensor:
        nonlocal warned
        pack: Callable[[torch.Tensor], Handle] = _stay
        hooks: Any = contextlib.nullcontext()
        if offloader is None:
            mark(args[0], "checkpoints")
        else:
            pack = offloader.open(block, args[0], tree_leaves(args[1:])).pack
            hooks = saved_tensors_hooks(pack, Handle.unpack)
        with hooks:
            if policy == "none":
                return block(*args)
            if policy == "full":
                return recomputed(block, *args)
            kept: deque[Any] = deque()
            out = recomputed(block, *args, context_fn=lambda: (_Keep(pack, kept), _Replay(kept)))
        if not (kept or warned):
            warned = True
            warnings.warn(
                "policy 'attention' saw no attention operation that it knows in "
                f"{type(block).__name__}: all of the block is recomputed, as with policy 'full'",
                stacklevel=2,
            )
        return out

    return run


def _stay(tensor: torch.Tensor) -> Handle:
    """Keep a tensor where it is."""
    mark(tensor, "checkpoints")
    return Handle(tensor)


# PyTorch's own modes for this (create_selective_checkpoint_contexts) hold their tensors where no
# hook sees them.
class _Keep(TorchDispatchMode):
    """The forward: packs what attention operations return."""

    def __init__(self, pack: Callable[[torch.Tensor], Handle], kept: deque[Any]) -> None:
        super().__init__()
        self._pack, self._kept = pack, kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: a compiled block runs compiled inside."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_attention(func):
            own = out
            if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
                # Compiled code, which writes over an output that its backward does not need.
                own = tree_map_only(torch.Tensor, torch.clone, out)
            self._kept.append((func, tree_map_only(torch.Tensor, self._pack, own)))
        return out


class _Replay(TorchDispatchMode):
    """The recompute: attention operations return what they returned, and are not run."""

    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self._kept = kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: as in the forward."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_attention(func):
            return func(*args, **(kwargs or {}))
        if not self._kept:
            raise RuntimeError(
                f"the recompute runs {func} once more than the forward did; under policy "
                "'attention' a graph runs backward once, choose 'full' for retain_graph"
            )
        expected, out = self._kept.popleft()
        if func is not expected:
            raise RuntimeError(f"the recompute runs {func} where the forward ran {expected}")
        return tree_map_only(Handle, Handle.unpack, out)
