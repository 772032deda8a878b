"""Recompute a forward in its backward instead of keeping its activations.

Each function saves only the input of the recomputed part:

* :func:`recomputed`: one call, ``torch.utils.checkpoint`` with safe exceptions.
* :func:`in_chunks`: one chunk of tokens at a time.
* :class:`SeparateCalls`: a model's calls in a gradient through several solver steps. Parameters
  receive their gradients call by call, so that only one call's activations exist at a time.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import checkpoint

NO_GRADIENT = (
    "The transformer's velocity needs no gradient, because no parameter requires one. Call "
    "requires_grad_(True) on the parameters to train, or add LoRA layers"
)
Function = Callable[[torch.Tensor], torch.Tensor]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def recomputed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Return ``checkpoint(function, *args, use_reentrant=False, **options)``."""
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False, **options)
    # An error of the function leaves the checkpoint only after its hooks and modes have ended.
    # PyTorch before 2.13 keeps them until the traceback is freed, and would record later operations
    # as part of this call.
    in_forward, failures = True, []

    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except BaseException as error:
            if not in_forward:
                raise
            failures.append(error)
            return None

    out = checkpoint(run, *args, use_reentrant=False, **options)
    in_forward = False
    if failures:
        # pop, because a list that holds the error forms a reference cycle with its traceback.
        raise failures.pop()
    return out


class _TakeChunk(torch.autograd.Function):
    """Return x and its tokens ``start`` to ``stop``."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.shape, ctx.tokens = x.shape, slice(start, stop)
        ctx.set_materialize_grads(False)
        return x.view_as(x), x[:, start:stop]

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_x: torch.Tensor | None, d_chunk: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        # All chunks write into one tensor; torch.split would keep their gradients separately and
        # then concatenate them. No other code reads d_x: the next chunk's backward allocated it.
        d_x = d_chunk.new_empty(ctx.shape) if d_x is None else d_x
        d_x[:, ctx.tokens] = d_chunk
        return d_x, None, None


class _PutChunk(torch.autograd.Function):
    """Write a chunk into ``out`` in place, from token ``start``; each token is written once."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, out: torch.Tensor, chunk: torch.Tensor, start: int
    ) -> torch.Tensor:
        ctx.tokens = slice(start, start + chunk.shape[1])
        out[:, ctx.tokens] = chunk
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, d_out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        # The true gradient of ``out`` has zeros at these tokens. A copy with zeros is not needed,
        # because earlier chunks read only their own tokens.
        return d_out, d_out[:, ctx.tokens], None


def in_chunks(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, chunk: int | None
) -> torch.Tensor:
    """Compute ``function(x)``, ``chunk`` tokens at a time; the backward recomputes each chunk.

    Only ``x`` is saved for the backward, and the hidden layer exists for one chunk at a time.
    Gradients of weights are summed over the chunks in the weight's dtype.

    Args:
        function: ``[B, n, D]`` → ``[B, n, E]``, independent for each token.
        x: ``[B, L, D]``.
        chunk: number of tokens; None computes all tokens at once and recomputes nothing.
    """
    length = x.shape[1]
    if chunk is None or chunk >= length:
        return function(x)
    if torch.compiler.is_compiling():  # Dynamo traces no autograd.Function with views or writes
        return torch.cat([recomputed(function, p) for p in x.split(chunk, dim=1)], dim=1)
    out: torch.Tensor | None = None
    for start in range(0, length, chunk):
        x, part = _TakeChunk.apply(x, start, min(start + chunk, length))
        part = recomputed(function, part)
        if out is None:
            out = part.new_empty(*x.shape[:2], part.shape[-1])
        out = _PutChunk.apply(out, part, start)
    assert out is not None
    return out


class _Boundary(torch.autograd.Function):
    """Return a tensor as the result of a node at which a graph begins."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, anchor: torch.Tensor, values: list[torch.Tensor]
    ) -> torch.Tensor:
        return values.pop()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError("a call of SeparateCalls has no graph. Call its backward() instead")


class _Call(NamedTuple):
    function: Function
    context: Context
    x: torch.Tensor | None  # None if the graph is kept
    start: GradientEdge | None  # of x in the connecting graph, if x requires a gradient
    end: GradientEdge  # of the result in the connecting graph
    kept: GradientEdge | None  # of the result in a graph of its own that begins at ``leaf``
    leaf: torch.Tensor | None

    def backward(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Run the backward of the call, recomputed if need be; return the gradient of ``x``."""
        kept, leaf = self.kept, self.leaf
        with self.context():
            if kept is None:
                assert self.x is not None
                leaf = self.x.detach().requires_grad_(self.start is not None)
                with torch.enable_grad():
                    result = self.function(leaf)
                if not result.requires_grad:
                    raise ValueError(NO_GRADIENT)
                kept = get_gradient_edge(result)
                del result
            # backward, not autograd.grad: each parameter's gradient is accumulated into .grad as
            # soon as it is computed.
            torch.autograd.backward([kept], [gradient])
        return None if leaf is None else leaf.grad


class SeparateCalls:
    """Calls of a model whose graphs are separate, for a gradient through several of them.

    The operations between calls, a solver's, form one connecting graph. The backward visits the
    calls in reverse order, and recomputes all those whose graph was not kept, so only one call's
    activations exist at a time. Of other calls only the input is saved. The model's own activation
    checkpointing applies in a recomputed forward.

    Every backward of the model is a top-level one. In a backward nested in another, FSDP2 does not
    free the weights of a block after its forward, and DistributedDataParallel sums no gradients.
    """

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        # Makes the results require a gradient even if x does not.
        self._anchor = torch.zeros(0, dtype=torch.float32, device="cpu", requires_grad=True)

    @torch.enable_grad()
    def call(
        self,
        function: Function,
        x: torch.Tensor,
        context: Context = contextlib.nullcontext,
        *,
        keep: bool = False,
    ) -> torch.Tensor:
        """Return ``function(x)`` as a tensor of the connecting graph.

        Args:
            function: function that returns the same values on each call. Its parameters receive
                their gradients in ``.grad`` during :meth:`backward`.
            x: latents at the start of a solver step, ``[B, C, F, H, W]``.
            context: entered around each call of ``function`` and around its backward.
            keep: keep the graph of this call instead of recomputing it. It should be the last one.

        Raises:
            ValueError: if the result of a kept call does not require a gradient.
        """
        kept = leaf = None
        if keep:
            leaf = x.detach().requires_grad_(x.requires_grad)
            with context():
                result = function(leaf)
            if not result.requires_grad:
                raise ValueError(NO_GRADIENT)
            values, kept = result.detach(), get_gradient_edge(result)
            leaf = leaf if x.requires_grad else None
        else:
            with context(), torch.no_grad():
                values = function(x.detach())
        out = _Boundary.apply(self._anchor, [values])
        start = get_gradient_edge(x) if x.requires_grad else None
        saved, end = None if keep else x.detach(), get_gradient_edge(out)
        self._calls.append(_Call(function, context, saved, start, end, kept, leaf))
        return out

    def backward(
        self,
        outputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        leaf: torch.Tensor | None = None,
        before_last: Callable[[], None] | None = None,
    ) -> None:
        """Run backward from tensors of the connecting graph through all calls, and forget these.

        Args:
            outputs: tensors, of which at least the first requires a gradient.
            gradients: gradients of a loss with respect to ``outputs``.
            leaf: a tensor at which the connecting graph begins; receives its gradient in ``.grad``.
            before_last: called before the backward of the last call that runs one.

        Raises:
            ValueError: if the result of a call does not require a gradient.
        """
        ends: list[Any] = [*outputs]
        gradients = [*gradients]
        while self._calls:
            call = self._calls.pop()
            # The solver's graph is walked once per call. That is a few operations on latents for
            # each later step.
            (gradient,) = torch.autograd.grad(
                ends, call.end, gradients, retain_graph=True, allow_unused=True
            )
            if gradient is None:
                continue
            if before_last is not None and not self._calls:
                before_last()
            d_x = call.backward(gradient)
            if call.start is not None and d_x is not None:
                ends.append(call.start)
                gradients.append(d_x)
            del call, gradient, d_x
        if leaf is not None:
            torch.autograd.backward(ends, gradients, inputs=[leaf])
