"""Compute the forward and backward of a whole block, see :mod:`prfl_fast.models.block_node`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from prfl_fast.kernels.common.norm_math import constant
from prfl_fast.kernels.runtime.calls import PLAIN, is_plain_call
from prfl_fast.kernels.runtime.checks import cast, compute_dtype
from prfl_fast.kernels.runtime.registry import OPERATIONS, OPERATORS, get_backend
from prfl_fast.models.block_autograd import attention_gradients, scale_of

_NAMES = ["norm_modulate", "residual_norm_modulate", "gated_residual", "bias_gelu"]
_NAMES += ["qk_norm_rope", "attention"]
_NAMES += [f"{name}_backward" for name in _NAMES]
Operations = Mapping[str, Callable[..., Any]]
_implementations: dict[Any, Operations] = {}
# Positions of tensors among the arguments of the function, and the number before the parameters.
_X, _CONTEXT, _VALUE, _TIME, _TABLE, _FIXED = 3, 4, 5, 6, 7, 12


def operations(device: torch.device, dtype: torch.dtype) -> Operations:
    """Return the implementations of all operations for these tensors, by name."""
    key = get_backend(), device, dtype
    found = _implementations.get(key)
    if found is None:
        found = {name: OPERATIONS[name].implementation(device, dtype) for name in _NAMES}
        _implementations[key] = found
    return found


class Layer(NamedTuple):
    """A linear layer: positions of its parameters, -1 for no bias, and (A, B, scaling) of LoRA."""

    weight: int
    bias: int
    adapters: Sequence[tuple[int, int, float]]

    def parameters(self) -> list[int]:
        """Return the positions of all parameters."""
        own = [self.weight, self.bias] if self.bias >= 0 else [self.weight]
        return own + [i for a, b, _ in self.adapters for i in (a, b)]

    def bias_in_gelu(self, x: torch.Tensor) -> bool:
        """Return True if ``bias_gelu`` adds the bias, see ``models.blocks.feed_forward``."""
        return self.bias >= 0 and not self.adapters and x.device.type != "cpu"


class _Rows:
    """Hold the modulation rows of a block in the form that operations take.

    On a CPU a single row for all tokens is added to the table here, once for all six vectors. The
    references would form the same sums. Operations then take the sum as the gate's table, 1 + scale
    as weight and shift as bias.
    """

    def __init__(
        self, x: torch.Tensor, time: torch.Tensor, table: torch.Tensor, index: Any
    ) -> None:
        self.index, self.rows = index, time.shape[0]
        self.single = self.rows == 1 and index is None and x.device.type == "cpu"
        if self.single:
            dtype = compute_dtype(x)
            vectors = (cast(time, dtype) + table).flatten(0, 1)
            self.time = vectors.unbind(0)
            one = constant(1.0, dtype, x.device)
            self.gains = {i: self.time[i] + one for i in (1, 4)}
        else:
            self.time, self.table = time.unbind(1), table.unbind(0)

    def gate(self, i: int) -> Any:
        """Return row, table and index of the gate at position ``i``."""
        if self.single:
            return None, self.time[i], None
        return self.time[i], self.table[i], self.index

    def norm(self, i: int) -> Any:
        """Return weight, bias, scale, shift, their tables and the index; the shift is at ``i``."""
        if self.single:
            return self.gains[i + 1], self.time[i], None, None, None, None, None
        time, table = self.time, self.table
        return None, None, time[i + 1], time[i], table[i + 1], table[i], self.index

    def gain(self, i: int) -> Any:
        """Return weight, scale, its table and the index, for the norm's backward."""
        if self.single:
            return self.gains[i + 1], None, None, None
        return None, self.time[i + 1], self.table[i + 1], self.index


class Forward:
    """Run a block. ``need`` is True for each input that needs a gradient; None keeps nothing.

    ``kept`` receives tensors for the backward, which pops them from the end, so that each is freed
    after its last use.
    """

    def __init__(
        self, node: Any, ops: Any, axes: Any, tensors: Any, parameters: Any, need: Any
    ) -> None:
        self.node, self.ops, self.axes, self.p, self.need = node, ops, axes, parameters, need
        self.x, self.context, self.value, time, table, *rest = tensors
        self.cos, self.sin, self.lengths, row_index = rest
        self.rows = _Rows(self.x, time, table, row_index)
        self.kept: list[Any] = []
        self.modulated = need is not None and (need[_TIME] or need[_TABLE])

    def keep(self, *tensors: Any) -> None:
        """Keep tensors for the backward, if there will be one."""
        if self.need is not None:
            self.kept += tensors

    def products(self, layers: Sequence[Layer], x: torch.Tensor) -> list[torch.Tensor]:
        """Return the output of each layer for x; keep what the gradients of ``layers`` need."""
        p, need, results, wanted = self.p, self.need, [], False
        for weight, bias, adapters in layers:
            y = F.linear(x, p[weight], p[bias] if bias >= 0 else None)
            wanted = wanted or (need is not None and need[_FIXED + weight])
            for a, b, scaling in adapters:
                hidden = F.linear(x, p[a])
                y.add_(F.linear(hidden, p[b]).mul_(scaling))
                if need is not None:
                    self.kept.append(hidden if need[_FIXED + b] else None)
                    wanted = wanted or need[_FIXED + a]
            results.append(y)
        self.keep(x if wanted else None)
        return results

    def weights(self, which: int) -> list[torch.Tensor]:
        """Return the weights of the norms of q and k, 0 for self-attention, 1 for cross."""
        return [self.p[i] for i in self.node.norms[2 * which : 2 * which + 2]]

    def self_attention(self, x: torch.Tensor) -> torch.Tensor:
        """Return the self-attention of the modulated norm of x, ``[B, L, D]``."""
        node = self.node
        self.keep(x if self.modulated or (self.need is not None and self.need[_X]) else None)
        h = self.ops["norm_modulate"](x, *self.rows.norm(0), node.kind, node.eps[0])
        q, k, v = self.products(node.layers[:3], h)
        del h
        numbers = (*self.axes, node.heads[0], False, node.eps[1])
        normed = self.ops["qk_norm_rope"](q, k, *self.weights(0), self.cos, self.sin, *numbers)
        out, lse = self.ops["attention"](
            *normed, v, node.heads[0], scale_of(q, node.heads[0]), None
        )
        del normed
        self.keep(q, k, v, out, lse)
        (y,) = self.products(node.layers[3:4], out)
        self.keep(y if self.modulated else None)
        return y

    def cross_attention(self, h: torch.Tensor) -> torch.Tensor:
        """Return the cross-attention of the normed stream, ``[B, L, D]``."""
        node, layers, k, v = self.node, self.node.layers, self.context, self.value
        (q,) = self.products(layers[4:5], h)
        if v is None:
            k, v = self.products(layers[5:7], k)
        numbers: Any = ([], [], node.heads[1], False, node.eps[3])
        normed = self.ops["qk_norm_rope"](q, k, *self.weights(1), None, None, *numbers)
        scale = scale_of(q, node.heads[1])
        out, lse = self.ops["attention"](*normed, v, node.heads[1], scale, self.lengths)
        del normed
        self.keep(q, k, v, out, lse)
        return self.products(layers[7:8], out)[0]

    def feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        """Return the feed-forward of the normed stream, ``[B, L, D]``."""
        up, bias = self.node.layers[8], None
        if up.bias_in_gelu(h):
            bias, up = self.p[up.bias], up._replace(bias=-1)
        (pre,) = self.products((up,), h)
        self.keep(pre)
        hidden = self.ops["bias_gelu"](pre, bias)
        del pre  # 2.1 GB at 14B and 720p
        (y,) = self.products(self.node.layers[9:], hidden)
        self.keep(y if self.modulated else None)
        return y


class _Backward:
    """Compute the gradients of :class:`Forward`, last part first."""

    def __init__(self, ctx: Any, grad: torch.Tensor, saved: Sequence[Any], ops: Any) -> None:
        self.node, self.need, self.ops, self.axes = ctx.node, ctx.needs_input_grad, ops, ctx.axes
        time, table, self.cos, self.sin, self.lengths, row_index = saved[:6]
        count = 6 + len(self.node.slots)
        self.p, self.kept = saved[6:count], [*saved[count:]]
        self.rows = ctx.rows or _Rows(grad, time, table, row_index)
        self.modulated = self.need[_TIME] or self.need[_TABLE]
        self.projected = ctx.projected
        self.gradients: list[Any] = [None] * (_FIXED + len(self.p))

    def products(
        self, layers: Sequence[Layer], grads: Sequence[torch.Tensor], need_x: bool = True
    ) -> Any:
        """Return the gradient of the layers' input, ``[N, K]``; store those of their parameters."""
        p, need, found, kept = self.p, self.need, self.gradients, self.kept
        d_x: torch.Tensor | None = None
        x: Any = kept.pop()
        x = x if x is None else x.flatten(0, -2)
        plain = not any([layer.adapters for layer in layers])
        pairs = [*zip(layers, grads, strict=True)]
        # The order of sums is that of Projections, or that of autograd: the last layer first.
        for (weight, bias, adapters), grad in pairs if plain else reversed(pairs):
            if grad is None:
                del kept[len(kept) - len(adapters) :]
                continue
            grad = grad.flatten(0, -2)
            for a, b, scaling in reversed(adapters):
                hidden, d_y = kept.pop(), grad * scaling
                if need[_FIXED + b]:
                    found[_FIXED + b] = d_y.t().mm(hidden.flatten(0, -2))
                if need_x or need[_FIXED + a]:
                    d_hidden = d_y.mm(p[b])
                    if need[_FIXED + a]:
                        found[_FIXED + a] = d_hidden.t().mm(x)
                    if need_x:
                        part = d_hidden.mm(p[a])
                        d_x = part if d_x is None else d_x.add_(part)
            if need_x and d_x is not None:
                d_x = d_x.addmm_(grad, p[weight]) if plain else d_x.add_(grad.mm(p[weight]))
            elif need_x:
                d_x = grad.mm(p[weight])
            if need[_FIXED + weight]:
                found[_FIXED + weight] = grad.t().mm(x)
            if bias >= 0 and need[_FIXED + bias]:
                found[_FIXED + bias] = grad.sum(0)
        return d_x

    def attention(
        self, which: int, grad: torch.Tensor, rope: Any, needed: Any, lengths: Any
    ) -> Any:
        """Return the gradients of q, k and v; store those of the norms' weights."""
        node, kept, weights = self.node, self.kept, self.node.norms[2 * which : 2 * which + 2]
        needed = [*needed, *[self.need[_FIXED + i] for i in weights]]
        numbers = (*rope[2:], node.heads[which], False, node.eps[1 + 2 * which])
        saved = [*kept[-5:-2], *[self.p[i] for i in weights], *rope[:2], lengths, *kept[-2:]]
        del kept[-5:]
        *grads, first, second = attention_gradients(self.ops, grad, saved, numbers, needed)
        self.gradients[_FIXED + weights[0]], self.gradients[_FIXED + weights[1]] = first, second
        return grads

    def feed_forward(self, grad: torch.Tensor) -> Any:
        """Return the gradients of the normed input and of the gate's rows."""
        up, down = self.node.layers[8:]
        d_y, d_gate = self.ops["gated_residual_backward"](
            grad, self.kept.pop(), *self.rows.gate(5), grad.dtype, True, self.modulated
        )
        d_y = self.products((down,), (d_y,))
        pre, bias, need_bias = self.kept.pop(), None, False
        if up.bias_in_gelu(pre):
            bias, need_bias = self.p[up.bias], self.need[_FIXED + up.bias]
        d_pre, d_bias = self.ops["bias_gelu_backward"](
            d_y.view(pre.shape), pre, bias, True, need_bias
        )
        del pre, d_y
        if bias is not None:
            if need_bias:
                self.gradients[_FIXED + up.bias] = d_bias
            up = up._replace(bias=-1)
        return self.products((up,), (d_pre,)), d_gate

    def needs(self, layer: Layer) -> bool:
        """Return True if a parameter of the layer needs a gradient."""
        return any([self.need[_FIXED + i] for i in layer.parameters()])

    def cross_attention(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the normed input; store those of the context."""
        layers, need = self.node.layers, self.need
        shape, d_out = grad.shape, self.products(layers[7:8], (grad,))
        needed = [True, need[_CONTEXT], need[_VALUE]]
        if self.projected:
            needed[1:] = [need[_CONTEXT] or self.needs(layer) for layer in layers[5:7]]
        rope: Any = (None, None, [], [])
        d_q, *d_kv = self.attention(1, d_out.view(shape), rope, needed, self.lengths)
        if self.projected:
            d_context = self.products(layers[5:7], d_kv, need[_CONTEXT])
            if d_context is not None:
                d_context = d_context.view(*d_kv[0].shape[:2], -1)
            d_kv = [d_context, None]
        self.gradients[_CONTEXT : _VALUE + 1] = d_kv
        return self.products(layers[4:5], (d_q,)).view(grad.shape)

    def self_attention(self, grad: torch.Tensor) -> Any:
        """Return the gradient of x and the sums of the norm, all None if none is needed.

        ``grad`` is that of the attention's output.
        """
        node, layers, need = self.node, self.node.layers, self.need
        need_h, shape = need[_X] or self.modulated, grad.shape
        needed = [need_h or self.needs(layer) for layer in layers[:3]]
        rope = (self.cos, self.sin, *self.axes)
        d_qkv = self.attention(0, grad, rope, needed, None)
        d_h = self.products(layers[:3], d_qkv, need_h)
        del d_qkv
        x = self.kept.pop()
        if not need_h:
            return None, None, None
        rows = (*self.rows.gain(0), self.rows.rows)
        needs = (need[_X], self.modulated, self.modulated)
        return self.ops["norm_modulate_backward"](
            d_h.view(shape), x, *rows, node.kind, node.eps[0], *needs
        )

    def run(self, grad: torch.Tensor) -> list[Any]:
        """Return the gradient of each input of the function."""
        node, need, ops, rows = self.node, self.need, self.ops, self.rows
        found, modulated, shape = self.gradients, self.modulated, grad.shape
        d_h, d_ffn_gate = self.feed_forward(grad)
        x, (weight, *gain) = self.kept.pop(), rows.gain(3)
        d_x, _, _, d_ffn_scale, d_ffn_shift = ops["residual_norm_modulate_backward"](
            grad, d_h.view(shape), x, None, None, weight, None, *gain, 1, rows.rows,
            node.kind, node.eps[4], grad.dtype, True, False, False, modulated, modulated,
        )  # fmt: skip
        del d_h, grad, x
        d_h = self.cross_attention(d_x)
        x, y = self.kept.pop(), self.kept.pop()
        affine = node.norms[4:]
        need_affine = [i >= 0 and need[_FIXED + i] for i in affine]
        weight = None if affine[0] < 0 else self.p[affine[0]]
        gate, table, index = rows.gate(2)
        d_x, d_y, d_gate, *d_affine = ops["residual_norm_modulate_backward"](
            d_x, d_h, x, y, gate, weight, table, None, None, index, rows.rows, 1,
            "layer" if node.affine else "none", node.eps[2], d_x.dtype, need[_X], True, modulated,
            *need_affine,
        )  # fmt: skip
        del x, y, d_h
        for i, needed, sums in zip(affine, need_affine, d_affine, strict=True):
            if needed:
                found[_FIXED + i] = sums[0]  # autograd casts it to the dtype of the input
        d_y = self.products(node.layers[3:4], (d_y,)).view(shape)
        d_stream, d_scale, d_shift = self.self_attention(d_y)
        if need[_X]:
            found[_X] = d_stream.add_(d_x)
        if modulated:
            sums = [d_shift, d_scale, d_gate, d_ffn_shift, d_ffn_scale, d_ffn_gate]
            d_time = torch.stack(sums, 1)
            found[_TIME] = d_time if need[_TIME] else None
            if need[_TABLE]:
                # Each vector alone, as its operation would add the rows, so that no bit differs.
                one = len(d_time) == 1
                found[_TABLE] = d_time.sum(0) if one else torch.stack([v.sum(0) for v in sums])
        return found


class Block(torch.autograd.Function):
    """Record a block: ``apply(node, ops, axes, *tensors, *parameters)``."""

    @staticmethod
    def forward(
        ctx: Any, node: Any, ops: Any, call: tuple[Any, Any], *tensors: Any
    ) -> torch.Tensor:
        """Return the output; save what the parts of the block save. Without ctx, record nothing.

        ``call`` holds grid and offset of the tokens, and the key of their layouts, which ``node``
        remembers as checked after the forward; the key is None if it was checked before.
        """
        axes, key = call
        given, parameters = tensors[: _FIXED - _X], tensors[_FIXED - _X :]
        need = None if ctx is None else ctx.needs_input_grad
        run = Forward(node, ops, axes, given, parameters, need)
        affine = [None if i < 0 else parameters[i] for i in node.norms[4:]]
        gate, table, index = run.rows.gate(2)
        last = (*(None,) * 4, index, "layer" if node.affine else "none", node.eps[2])
        y = run.self_attention(run.x)
        x, h = ops["residual_norm_modulate"](run.x, y, gate, *affine, table, *last)
        del y
        run.keep(x)
        weight, bias, *last = run.rows.norm(3)
        y = run.cross_attention(h)
        x, h = ops["residual_norm_modulate"](
            x, y, None, weight, bias, None, *last, node.kind, node.eps[4]
        )
        del y
        run.keep(x)
        out = ops["gated_residual"](x, run.feed_forward(h), *run.rows.gate(5))
        if key is not None:
            node.checked.add(key)
        if ctx is not None:
            saved = [p if save else None for p, save in zip(parameters, node.saved, strict=True)]
            ctx.save_for_backward(*given[_TIME - _X :], *saved, *run.kept)
            ctx.node, ctx.axes, ctx.projected = node, axes, run.value is None
            # 48·D bytes, so that the backward does not add them again; a GPU's kernels do.
            ctx.rows = run.rows if run.rows.single else None
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the gradients that are needed."""
        plain = is_plain_call() and type(grad) in PLAIN and not grad.is_neg()
        ops = operations(grad.device, grad.dtype) if plain else OPERATORS
        run = _Backward(ctx, grad, ctx.saved_tensors, ops)
        ctx.maybe_clear_saved_tensors()  # so that each is freed after its last use in run
        if not torch.is_autocast_enabled(grad.device.type):
            return tuple(run.run(grad))
        # The forward ran without autocast, which would cast some of the factors here.
        with torch.autocast(grad.device.type, enabled=False):
            return tuple(run.run(grad))


# Function.apply would look for tensors of torch.func, which never come here.
apply = super(torch.autograd.Function, Block).apply  # type: ignore[misc]
