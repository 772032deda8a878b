"""Solver update of a flow-matching sampler: a weighted sum of tensors, rounded once.

    x_next = Σ_i c_i · t_i          d_t_i = c_i · d_x_next

Euler is ``[x, v], [1, σ_next - σ]``; UniPC's predictor and corrector and classifier-free guidance
are the same sum with more terms, so a whole step with guidance costs one pass.

Shapes: every tensor the same shape, any number of them. Coefficients are Python floats.
Dtypes: the sum is kept in float32 (float64 if any tensor is float64) and rounded once to the first
tensor's dtype.
Saved for backward: nothing.
Bytes: every tensor is read once and the result is written once; backward reads its gradient once
and writes the needed ones. Latents are small, so the number of launches dominates the time: one
each way, up to ``TERMS`` tensors. Strided latents are copied first.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from prfl_fast.kernels.runtime.checks import require, require_float, require_same_device
from prfl_fast.kernels.runtime.registry import KERNEL_DTYPES, register
from prfl_fast.kernels.runtime.triton import tl, triton

TERMS = 8  # tensors of a launch: third-order UniPC with guidance has 7


# Reference.


def _sum_dtype(tensors: list[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def reference(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    """Return Σ c_i·t_i, summed in float32 (float64 if any tensor is), in the first's dtype."""
    first, dtype = tensors[0], _sum_dtype(tensors)
    total = (first.to(dtype) * coefficients[0]).contiguous()
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor, alpha=coefficient)
    return total.to(first.dtype)


def reference_backward(
    grad: torch.Tensor, coefficients: list[float], dtypes: str
) -> list[torch.Tensor]:
    """Return ``coefficients[i] · grad`` for each i, in the i-th dtype of ``dtypes``."""
    gradients = []
    for coefficient, dtype in zip(coefficients, _dtypes(dtypes), strict=True):
        wide = torch.float64 if torch.float64 in (grad.dtype, dtype) else torch.float32
        gradients.append((grad.to(wide) * coefficient).to(dtype).contiguous())
    return gradients


def _dtypes(names: str) -> list[torch.dtype]:
    """Return the dtypes of ``"float32 bfloat16"``: a schema cannot have a list of dtypes."""
    return [getattr(torch, name) for name in names.split()]


# Triton: the coefficients are arguments, so the steps of a schedule share one compiled kernel.
@triton.jit
def _term(t_ptr, coefficient, o, m, BLOCK: tl.constexpr):
    b_term = tl.zeros([BLOCK], tl.float32)
    if t_ptr is not None:
        b_term = tl.load(t_ptr + o, mask=m, other=0.0).to(tl.float32) * coefficient
    return b_term


@triton.jit
def forward_kernel(
    t0_ptr, t1_ptr, t2_ptr, t3_ptr, t4_ptr, t5_ptr, t6_ptr, t7_ptr,
    c0, c1, c2, c3, c4, c5, c6, c7, y_ptr, elements, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_y = _term(t0_ptr, c0, o, m, BLOCK)  # [B]
    b_y += _term(t1_ptr, c1, o, m, BLOCK)
    b_y += _term(t2_ptr, c2, o, m, BLOCK)
    b_y += _term(t3_ptr, c3, o, m, BLOCK)
    b_y += _term(t4_ptr, c4, o, m, BLOCK)
    b_y += _term(t5_ptr, c5, o, m, BLOCK)
    b_y += _term(t6_ptr, c6, o, m, BLOCK)
    b_y += _term(t7_ptr, c7, o, m, BLOCK)
    tl.store(y_ptr + o, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _store_scaled(d_ptr, b_g, coefficient, o, m):
    if d_ptr is not None:
        tl.store(d_ptr + o, (b_g * coefficient).to(d_ptr.dtype.element_ty), mask=m)


@triton.jit
def backward_kernel(
    d0_ptr, d1_ptr, d2_ptr, d3_ptr, d4_ptr, d5_ptr, d6_ptr, d7_ptr,
    c0, c1, c2, c3, c4, c5, c6, c7, grad_ptr, elements, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_g = tl.load(grad_ptr + o, mask=m, other=0.0).to(tl.float32)  # [B]
    _store_scaled(d0_ptr, b_g, c0, o, m)
    _store_scaled(d1_ptr, b_g, c1, o, m)
    _store_scaled(d2_ptr, b_g, c2, o, m)
    _store_scaled(d3_ptr, b_g, c3, o, m)
    _store_scaled(d4_ptr, b_g, c4, o, m)
    _store_scaled(d5_ptr, b_g, c5, o, m)
    _store_scaled(d6_ptr, b_g, c6, o, m)
    _store_scaled(d7_ptr, b_g, c7, o, m)


# Launch.
@dataclass(frozen=True)
class Launch:
    """Elements and warps of a program (8 elements a thread), and the number of programs."""

    block: int
    num_warps: int
    programs: int


def launch_config(elements: int) -> Launch:
    """Choose programs of 1024 elements, for any dtypes and any number of terms."""
    return Launch(1024, 4, -(-elements // 1024))


def _run(kernel, terms: list[torch.Tensor], coefficients: list[float], other: torch.Tensor) -> None:
    """Launch ``kernel`` on up to ``TERMS`` tensors and the argument ``other`` after them."""
    launch = launch_config(other.numel())
    missing = TERMS - len(terms)
    kernel[(launch.programs,)](
        *terms, *[None] * missing, *coefficients, *[None] * missing, other, other.numel(),
        BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip


def _triton_forward(tensors, coefficients):
    if any(t.dtype not in KERNEL_DTYPES for t in tensors):
        return reference(tensors, coefficients)
    y = tensors[0].new_empty(tensors[0].shape)
    terms = [t.contiguous() for t in tensors]
    while y.numel() > 0:
        last = len(terms) <= TERMS
        out = y if last else torch.empty_like(y, dtype=torch.float32)
        _run(forward_kernel, terms[:TERMS], coefficients[:TERMS], out)
        if last:
            break
        terms, coefficients = [out, *terms[TERMS:]], [1.0, *coefficients[TERMS:]]
    return y


def _triton_backward(grad, coefficients, dtypes):
    kinds = _dtypes(dtypes)
    if any(kind not in KERNEL_DTYPES for kind in kinds):
        return reference_backward(grad, coefficients, dtypes)
    gradients = [grad.new_empty(grad.shape, dtype=kind) for kind in kinds]
    grad = grad.contiguous()
    for start in range(0, len(kinds) if grad.numel() else 0, TERMS):
        group = slice(start, start + TERMS)
        _run(backward_kernel, gradients[group], coefficients[group], grad)
    return gradients


# Registration.
def _fake(tensors, coefficients):
    return tensors[0].new_empty(tensors[0].shape)


def _fake_backward(grad, coefficients, dtypes):
    return [grad.new_empty(grad.shape, dtype=dtype) for dtype in _dtypes(dtypes)]


def _check(tensors, coefficients):
    for i, tensor in enumerate(tensors):
        require_float("flow_step", f"tensors[{i}]", tensor)
        expected = f"the shape {list(tensors[0].shape)} of tensors[0]"
        require(tensor.shape == tensors[0].shape, "flow_step", f"tensors[{i}]", tensor, expected)
    require_same_device("flow_step", **{f"tensors[{i}]": t for i, t in enumerate(tensors)})


_forward_op = register("flow_step", reference, fake=_fake, triton=_triton_forward, check=_check)
_backward_op = register(
    "flow_step_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)


def _setup_context(ctx, inputs, output):
    tensors, ctx.coefficients = inputs
    ctx.dtypes = [str(t.dtype).removeprefix("torch.") for t in tensors]


def _gradients(ctx, grad, needs):
    coefficients = list(itertools.compress(ctx.coefficients, needs))
    gradients = iter(
        _backward_op(grad, coefficients, " ".join(itertools.compress(ctx.dtypes, needs)))
    )
    return [next(gradients) if needed else None for needed in needs]


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coefficients, *tensors):
        _setup_context(ctx, (tensors, coefficients), None)
        return _forward_op.operation(tensors, coefficients)

    @staticmethod
    def backward(ctx, grad):
        return None, *_gradients(ctx, grad, ctx.needs_input_grad[1:])


_forward_op.register_autograd(
    lambda ctx, grad: (_gradients(ctx, grad, ctx.needs_input_grad[0]), None),
    setup_context=_setup_context,
    eager=lambda tensors, coefficients: _Eager.apply(coefficients, *tensors),
    native=lambda tensors, coefficients: True,
)


# Public function.
def flow_step(tensors: list[torch.Tensor], coefficients: list[float]) -> torch.Tensor:
    """Compute the weighted sum ``Σ coefficients[i] · tensors[i]``.

    Args:
        tensors: one or more floating-point tensors of one shape and device; dtypes may differ.
        coefficients: as many finite Python floats.

    Returns:
        The sum, contiguous, in ``tensors[0].dtype``; accumulated in float32 (float64 if any tensor
        is float64).

    Raises:
        ValueError: if there are no tensors, lengths, shapes or devices differ, or a coefficient is
            not finite.
    """
    tensors = list(tensors)
    require(len(tensors) > 0, "flow_step", "tensors", tensors, "at least one tensor")
    expected = f"{len(tensors)} floats, one per tensor"
    require(len(coefficients) == len(tensors), "flow_step", "coefficients", coefficients, expected)
    numbers = [float(c) for c in coefficients]
    for i, number in enumerate(numbers):
        if not abs(number) < math.inf:  # torch.compile cannot trace math.isfinite()
            require(False, "flow_step", f"coefficients[{i}]", number, "a finite float")
    return _forward_op(tensors, numbers)
