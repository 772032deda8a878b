"""Run a block as one autograd function, with the operations, sums and saved tensors of its parts.

Run part by part, a block is 14 calls that check, record and wrap; each costs the host as much as a
small addition. :class:`BlockNode` calls the implementations of the same operations in the same
order, so results and gradients have the same bits. It takes plain linear layers and peft's LoRA on
them; for everything else it returns None, and the parts run one by one.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.kernels.runtime.calls import PLAIN, Call, add_recent, is_plain_call, recent_call
from prfl_fast.kernels.runtime.registry import OPERATORS
from prfl_fast.models.block_passes import Layer, operations
from prfl_fast.models.inference_linear import as_matrix
from prfl_fast.utils.modules import is_inactive_dropout

MAX_LAYOUTS = 64
_DTYPE, _DEVICE = operator.attrgetter("dtype"), operator.attrgetter("device")


class _UnsuitableError(Exception):
    """A block has a part that its node cannot run."""


class BlockNode:
    """Modules of a block as positions in one list of parameters; made by :func:`make_node`.

    Attributes:
        slots: the ``_parameters`` of a module and a name in it, for each parameter.
        norms: positions of the weights of q, k, the cross-attention's q and k, and of weight and
            bias of the norm before it; -1 for None.
        layers: the self-attention's q, k, v, out, the cross-attention's, up, down.
        heads: numbers of heads of both attentions.
        eps: those of the norms in the order of the block, norms of q and k included.
        kind: kind of the norms before the self-attention and the feed-forward.
    """

    def __init__(self, parts: Any) -> None:
        self.slots: list[tuple[dict[str, Any], str]] = []
        self.watched: list[Any] = []  # what changes in place, beside the modules' attributes
        attn, cross, norm = parts.attn, parts.cross, parts.cross_norm
        self.affine = getattr(norm, "weight", None) is not None
        normed = (attn.norm_q, attn.norm_k, cross.norm_q, cross.norm_k)
        self.norms = [self._slot(m, "weight") for m in normed]
        self.norms += [self._slot(norm, n) if self.affine else -1 for n in ("weight", "bias")]
        modules = [getattr(a, n) for a in (attn, cross) for n in ("to_q", "to_k", "to_v", "to_out")]
        self.layers = [self._layer(m) for m in (*modules, parts.up, parts.down)]
        biases = {layer.bias for layer in self.layers if layer is not self.layers[8]}
        self.saved = [i not in biases and i != self.norms[5] for i in range(len(self.slots))]
        self.heads, self.kind = (attn.heads, cross.heads), parts.kind
        cross_eps = norm.eps if self.affine else 0.0
        self.eps = (parts.eps[0], attn.norm_q.eps, cross_eps, cross.norm_q.eps, parts.eps[1])
        self.stem = [i for layer in self.layers[:3] for i in layer.parameters()]
        self.adapted_keys = any(layer.adapters for layer in self.layers[5:7])
        self.checked: set[Any] = set()
        self.recent: tuple[Call, ...] = ()  # of checked arguments

    def _slot(self, module: Any, name: str) -> int:
        if module._parameters.get(name) is None:
            return -1
        self.slots.append((module._parameters, name))
        return len(self.slots) - 1

    def _layer(self, module: Any) -> Layer:
        if isinstance(module, nn.ModuleList):  # an output projection, then dropout
            module, *others = module
            if not all(map(is_inactive_dropout, others)):
                raise _UnsuitableError
        matrix = as_matrix(module)
        if isinstance(matrix, str) or type(matrix.base) is not nn.Linear:
            raise _UnsuitableError
        if matrix.base is not module:
            if not all(map(is_inactive_dropout, module.lora_dropout.values())):
                raise _UnsuitableError
            states = (module.scaling, module.merged_adapters, module.use_dora)
            more = (getattr(module, "lora_variant", {}), module.active_adapters)
            self.watched += [*states, *more]
        adapters: list[tuple[int, int, float]] = []
        for a, b, scaling in matrix.adapters:
            if a.bias is not None or b.bias is not None:
                raise _UnsuitableError
            adapters.append((self._slot(a, "weight"), self._slot(b, "weight"), scaling))
        base = matrix.base
        return Layer(self._slot(base, "weight"), self._slot(base, "bias"), adapters)

    def prepare(self, x: torch.Tensor, context: Any, modulation: Any, rope: Any) -> Any:
        """Return the arguments of ``Block.forward``; None if the parts must run one by one.

        The arguments are those of :func:`prfl_fast.models.blocks.transformer_block`.
        """
        table, time, row_index = modulation
        value = lengths = None
        if not isinstance(context, torch.Tensor):
            context, value, extra, _, lengths = context
            if extra is not None:
                return None
        cos, sin, grid, offset = rope
        axes = ([], []) if grid is None else ([*grid], [*offset])
        tensors = (x, context, value, time, table, cos, sin, lengths, row_index)
        parameters = [owner[name] for owner, name in self.slots]
        args, key = (*tensors, *parameters, *axes), None
        call = recent_call(self.recent, args)
        if call is None:
            if not is_plain_call() or torch.is_autocast_enabled(x.device.type):
                return None
            key = self._key(tensors, parameters, axes)
            if key not in self.checked and not self._fits(tensors, parameters):
                return None
            call = Call.of(args, None, self._records(tensors, parameters))
            if key in self.checked:
                key, self.recent = None, add_recent(self.recent, call)
        if torch.is_grad_enabled() and not call.record:
            return None
        if x.is_cuda and (
            x.device.index != torch.cuda.current_device()
            or any(t.is_neg() for t in tensors if t is not None)
        ):
            return None
        if len(self.checked) >= MAX_LAYOUTS:
            self.checked.clear()
        ops = operations(x.device, x.dtype) if key is None else OPERATORS
        return self, ops, (axes, key), *tensors, *parameters

    def _key(self, tensors: Sequence[Any], parameters: Sequence[Any], axes: Any) -> Any:
        """Return a key of what the checks of operations read; they run once for each key."""
        layouts = [
            t if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors
        ]
        kinds = (*map(type, parameters), *map(_DTYPE, parameters), *map(_DEVICE, parameters))
        return (*layouts, *kinds, *axes[0], *axes[1])

    def _records(self, tensors: Sequence[Any], parameters: Sequence[Any]) -> bool:
        """Return True if one autograd node can stand for those of the parts."""
        x, context, _, time, table, *_ = tensors
        if context.requires_grad and self.adapted_keys:
            return False  # autograd adds each layer's share to those of other blocks, in order
        # Parts that need no gradient are not recorded.
        stem = (parameters[i] for i in self.stem)
        return any(t.requires_grad for t in (x, time, table, *stem))

    def _fits(self, tensors: Sequence[Any], parameters: Sequence[Any]) -> bool:
        x, context, *_ = tensors
        given = [t for t in (*tensors, *parameters) if t is not None]
        return (
            x.device.type in ("cpu", "cuda")
            and all(type(t) in PLAIN for t in given)
            and x.is_contiguous()
            and context.shape[1] > 0
            # peft casts the input of an adapter in another dtype.
            and all(parameters[i].dtype == x.dtype for n in self.layers for i in n.parameters())
        )


def make_node(parts: Any) -> BlockNode | None:
    """Return the node of a block's ``BlockParts``, or None if it has parts that no node can run.

    The caller excludes modules with hooks or replaced forwards, and parts whose functions are
    replaced.
    """
    attn, cross = parts.attn, parts.cross
    fused = any(getattr(a, "fused_projections", False) for a in (attn, cross))
    if fused or getattr(cross, "add_k_proj", None) is not None or parts.chunk is not None:
        return None
    try:
        return BlockNode(parts)
    except _UnsuitableError:
        return None
