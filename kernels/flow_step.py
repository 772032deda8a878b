"""Solver update of a flow-matching sampler: a weighted sum of tensors, rounded once.

    x_next = Σ_i c_i · t_i          d_t_i = c_i · d_x_next

Euler is ``[x, v], [1, σ_next - σ]``; UniPC's predictor and corrector and classifier-free guidance
are the same sum with more terms, so a whole step with guidance costs one pass.

Shapes: every tensor the same shape, any number of them. Coefficients are Python floats.
Dtypes: the sum is kept in float32 (float64 if any tensor is float64) and rounded once to the first
tensor's dtype.
Saved for backward: nothing.
Bytes: every tensor is read once and the result is written once.
"""

import math

import torch

from prfl_fast.kernels._checks import require, require_float, require_same_device
from prfl_fast.kernels._registry import register


def _sum_dtype(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def reference(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    """Σ c_i·t_i in float32 (float64 if any tensor is); contiguous, in the first tensor's dtype."""
    first, dtype = tensors[0], _sum_dtype(tensors)
    total = (first.to(dtype) * coefficients[0]).contiguous()
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor, alpha=coefficient)
    return total.to(first.dtype)


def _fake(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    return tensors[0].new_empty(tensors[0].shape)


def reference_backward(grad: torch.Tensor, coefficient: float, dtype: torch.dtype) -> torch.Tensor:
    """Gradient to one tensor, ``coefficient · grad``, in that tensor's ``dtype``."""
    wide = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
    return (grad.to(wide) * coefficient).to(dtype).contiguous()


def _fake_backward(grad: torch.Tensor, coefficient: float, dtype: torch.dtype) -> torch.Tensor:
    return grad.new_empty(grad.shape, dtype=dtype)


_forward_op = register("flow_step", reference, fake=_fake)
_backward_op = register("flow_step_backward", reference_backward, fake=_fake_backward)


def _setup_context(ctx, inputs, output):
    tensors, ctx.coefficients = inputs
    ctx.dtypes = [t.dtype for t in tensors]


def _backward(ctx, grad):
    terms = zip(ctx.coefficients, ctx.dtypes, ctx.needs_input_grad[0], strict=True)
    return [_backward_op(grad, c, dtype) if needed else None for c, dtype, needed in terms], None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def flow_step(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    """The weighted sum ``Σ coefficients[i] · tensors[i]``.

    Args:
        tensors: one or more floating-point tensors of one shape and device; dtypes may differ.
        coefficients: as many finite Python floats.

    Returns:
        The sum, contiguous, in ``tensors[0].dtype``; accumulated in float32 (float64 if any tensor
        is float64).

    Raises:
        ValueError: no tensors, lengths, shapes or devices that differ, or a coefficient that is not
            finite.
    """
    tensors = list(tensors)
    require(len(tensors) > 0, "flow_step", "tensors", tensors, "at least one tensor")
    require(
        len(coefficients) == len(tensors),
        "flow_step",
        "coefficients",
        coefficients,
        f"{len(tensors)} floats, one per tensor",
    )
    for i, tensor in enumerate(tensors):
        require_float("flow_step", f"tensors[{i}]", tensor)
        require(
            tensor.shape == tensors[0].shape,
            "flow_step",
            f"tensors[{i}]",
            tensor,
            f"the shape {list(tensors[0].shape)} of tensors[0]",
        )
    require_same_device(
        "flow_step", **{f"tensors[{i}]": tensor for i, tensor in enumerate(tensors)}
    )
    numbers = [float(c) for c in coefficients]
    for i, number in enumerate(numbers):
        require(math.isfinite(number), "flow_step", f"coefficients[{i}]", number, "a finite float")
    return _forward_op(tensors, numbers)
