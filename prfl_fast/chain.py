"""A gradient through several solver steps that keeps one latent per step.

Autograd would keep every forward of the chain for its backward. Here each step's forward runs
without a graph, and the backward runs it again from the step's latents, x_m, which are all that is
kept: the solver's own operations are linear with known coefficients and keep nothing. The blocks of
the forward that is run again follow the model's checkpoint policy, as in a single step.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

NO_GRADIENT = (
    "the transformer's velocity needs no gradient: no parameter of it requires one; call "
    "requires_grad_(True) on what should train, or add LoRA layers"
)
# x → velocity, and further terms of the loss at x.
Evaluation = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


class _Recomputed(torch.autograd.Function):
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
            # Not autograd.grad: gradients of parameters go where they belong as they are made.
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        return None, None, x.grad, None


def recomputed_step(
    evaluate: Evaluation, x: torch.Tensor, context: Context = contextlib.nullcontext
) -> tuple[torch.Tensor, ...]:
    """``evaluate(x)`` now without a graph, and again with one in the backward.

    Args:
        evaluate: gives the same values each time; its parameters get their gradients in ``.grad``
            during the backward.
        x: all that is kept.
        context: in force during ``evaluate`` and its backward.
    """
    # What makes the outputs require a gradient where x is a constant.
    anchor = torch.zeros(0, requires_grad=True)
    return _Recomputed.apply(evaluate, context, x, anchor)
