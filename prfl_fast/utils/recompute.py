"""Recompute a forward in its backward instead of keeping its activations.

Each function saves only the input of the recomputed part:

* :func:`recomputed`: one call, ``torch.utils.checkpoint`` with safe exceptions.
* :func:`in_chunks`: one chunk of tokens at a time.
* :func:`recomputed_step`: one solver step of a gradient through several. Parameters receive their
  gradients while the backward runs, so that only one step's activations exist at a time.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

NO_GRADIENT = (
    "The transformer's velocity needs no gradient, because no parameter requires one. Call "
    "requires_grad_(True) on the parameters to train, or add LoRA layers"
)
# x → velocity, and further terms of the loss at x.
Evaluation = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
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


class _RecomputedStep(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, evaluate: Evaluation, context: Context, x: torch.Tensor, anchor: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.evaluate, ctx.context = evaluate, context
        ctx.save_for_backward(x)
        with context():
            return evaluate(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with ctx.context():
            with torch.enable_grad():
                outputs = ctx.evaluate(x)
            pairs = [pair for pair in zip(outputs, grads, strict=True) if pair[0].requires_grad]
            if not pairs:
                raise ValueError(NO_GRADIENT)
            # backward, not autograd.grad: parameters are not inputs of this Function, and each
            # gradient is accumulated into .grad as soon as it is computed.
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return None, None, x.grad, None


def recomputed_step(
    evaluate: Evaluation, x: torch.Tensor, context: Context = contextlib.nullcontext
) -> tuple[torch.Tensor, ...]:
    """Return ``evaluate(x)``, computed without a graph and recomputed with one in the backward.

    Only ``x`` is saved. The model's own activation checkpointing applies in the recomputed forward.

    Args:
        evaluate: function that returns the same values on each call. Its parameters receive their
            gradients in ``.grad`` during the backward.
        x: latents at the start of the step, ``[B, C, F, H, W]``.
        context: entered around each call of ``evaluate`` and around its backward.

    Raises:
        ValueError: in the backward, if no output of ``evaluate`` requires a gradient.
    """
    # The anchor makes the outputs require a gradient even if x does not.
    anchor = torch.zeros(0, dtype=torch.float32, device=x.device, requires_grad=True)
    return _RecomputedStep.apply(evaluate, context, x, anchor)
