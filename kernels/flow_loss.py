"""Velocity loss of flow matching, without widened copies of its inputs.

    loss = mean((velocity - (noise - latents))²)
    d_velocity = d_loss · 2/N · (velocity - (noise - latents))

The path is x_σ = (1-σ)·latents + σ·noise, so its velocity is noise - latents.

Shapes: velocity, noise, latents alike, any number of dimensions; the loss has none. N is the number
of elements.
Dtypes: each may differ; differences and the loss are float32 (float64 if any input is float64) and
the target is never rounded to the velocity's dtype.
Saved for backward: the three inputs as they came. Work is done in pieces of ``CHUNK`` elements, so
at most one piece is widened at a time.
Bytes: forward reads the inputs once; backward reads them again and writes the gradient.
"""

from collections.abc import Iterator

import torch

from prfl_fast.kernels._checks import require, require_float, require_same_device
from prfl_fast.kernels._registry import register

CHUNK = 1 << 18  # elements: a float32 piece and its operands stay in a 2 MB cache


def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _differences(
    velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield ``(start, velocity - (noise - latents))`` of consecutive flat pieces, widened."""
    wide = _wide(velocity, noise, latents)
    # A view for contiguous inputs; a strided one is gathered in its own dtype.
    flat = [t.reshape(-1) for t in (velocity, noise, latents)]
    for start in range(0, velocity.numel(), CHUNK):
        v, n, x = (t[start : start + CHUNK] for t in flat)
        target = torch.sub(n.to(wide), x)
        yield start, torch.sub(v, target, out=target)


def reference(velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The loss; squares are summed piece by piece, the pieces in float64."""
    total = velocity.new_zeros((), dtype=torch.float64)
    for _, difference in _differences(velocity, noise, latents):
        total += difference.square_().sum()
    return (total / velocity.numel()).to(_wide(velocity, noise, latents))


def _fake(velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return velocity.new_empty((), dtype=_wide(velocity, noise, latents))


def reference_backward(
    grad: torch.Tensor, velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Gradient to ``velocity``, contiguous, in its dtype."""
    out = velocity.new_empty(velocity.shape)
    flat = out.view(-1)
    factor = grad.to(_wide(velocity, noise, latents)) * (2 / velocity.numel())
    for start, difference in _differences(velocity, noise, latents):
        torch.mul(difference, factor, out=flat[start : start + CHUNK])
    return out


def _fake_backward(
    grad: torch.Tensor, velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    return velocity.new_empty(velocity.shape)


_forward_op = register("flow_loss", reference, fake=_fake)
_backward_op = register("flow_loss_backward", reference_backward, fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _backward_op(grad, *ctx.saved_tensors), None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def flow_loss(velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a predicted velocity against ``noise - latents``.

    Args:
        velocity: the model's prediction, any shape; the only input that receives a gradient.
        noise: ε of the path x_σ = (1-σ)·latents + σ·ε, the same shape.
        latents: the clean latents, the same shape.

    Returns:
        A scalar, float32 (float64 if any input is float64).

    Raises:
        ValueError: shapes or devices that differ, empty tensors, or ``noise`` or ``latents``
            requiring a gradient.
    """
    require_float("flow_loss", "velocity", velocity)
    require(velocity.numel() > 0, "flow_loss", "velocity", velocity, "at least one element")
    for argument, tensor in (("noise", noise), ("latents", latents)):
        require_float("flow_loss", argument, tensor)
        require(
            tensor.shape == velocity.shape,
            "flow_loss",
            argument,
            tensor,
            f"the velocity's shape {list(velocity.shape)}",
        )
        require(
            not (tensor.requires_grad and torch.is_grad_enabled()),
            "flow_loss",
            argument,
            tensor,
            "a tensor that needs no gradient (only velocity gets one): pass its .detach()",
        )
    require_same_device("flow_loss", velocity=velocity, noise=noise, latents=latents)
    return _forward_op(velocity, noise, latents)
