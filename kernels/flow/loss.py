"""Velocity loss of flow matching; the kernels make no widened copies of its inputs.

    loss = mean((velocity - (noise - latents))²)
    d_velocity = d_loss · 2/N · (velocity - (noise - latents))

The path is x_σ = (1-σ)·latents + σ·noise, so its velocity is noise - latents.

Shapes: velocity, noise, latents alike, any number of dimensions; the loss has none. N is the number
of elements.
Dtypes: each may differ; differences and the loss are float32 (float64 if any input is float64) and
the target is never rounded to the velocity's dtype. The kernel adds one square of each tile of a
program in float32, and all of these sums in float64: their error is far below the loss's rounding.
Saved for backward: the three inputs; for few elements on a CPU the velocity and its target (see
``native`` in runtime/registry.py). The caller holds noise and latents anyway, so the graph keeps
only the velocity alive; plain PyTorch saves two float32 tensors. A saved difference would be
written and read in addition, and rounded twice in bfloat16.
Bytes: forward reads the inputs once; backward reads them again and writes the gradient. Strided
inputs are gathered first: latents are small.
"""

from dataclasses import dataclass
from typing import Any

import torch

from prfl_fast.kernels.runtime.checks import cast, require, require_float, require_same_device
from prfl_fast.kernels.runtime.registry import KERNEL_DTYPES, register
from prfl_fast.kernels.runtime.triton import capability, multiprocessors, tl, triton

FEW = 4096  # elements that a float32 sum adds as exactly as a float64 one


# Reference.
def _wide(*tensors: torch.Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _pair(velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> Any:
    """Return the velocity and its target, widened."""
    wide = _wide(velocity, noise, latents)
    return cast(velocity, wide), torch.sub(cast(noise, wide), latents)


def reference(velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Return the loss."""
    wide, target = _pair(velocity, noise, latents)
    if wide.numel() <= FEW:
        return torch._C._nn.mse_loss(wide, target, 1)  # type: ignore[arg-type]
    squares = torch.sub(wide, target, out=target).square_()
    return (squares.sum(dtype=torch.float64) / wide.numel()).to(wide.dtype)


def reference_backward(
    grad: torch.Tensor, velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of ``velocity``, contiguous, in its dtype."""
    pair = _pair(velocity, noise, latents)
    gradient = torch.ops.aten.mse_loss_backward(grad, *pair, 1)  # 1: of a mean
    return cast(gradient, velocity.dtype).contiguous()


# Triton.
@triton.jit
def _difference(velocity_ptr, noise_ptr, latents_ptr, o, m):
    """Return velocity - (noise - latents) at offsets ``o``, zero where masked."""
    b_noise = tl.load(noise_ptr + o, mask=m, other=0.0).to(tl.float32)
    b_target = b_noise - tl.load(latents_ptr + o, mask=m, other=0.0).to(tl.float32)
    return tl.load(velocity_ptr + o, mask=m, other=0.0).to(tl.float32) - b_target


@triton.jit
def forward_kernel(
    velocity_ptr, noise_ptr, latents_ptr, partial_ptr, elements, share, BLOCK: tl.constexpr
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float32)
    i = pid * share
    end = tl.minimum(i + share, elements)
    while i < end:  # range() takes no tensor bounds in the interpreter with numpy ≥ 2.4
        o = i + o_b  # [B]
        b_difference = _difference(velocity_ptr, noise_ptr, latents_ptr, o, o < end)
        b_sum += b_difference * b_difference
        i += BLOCK
    tl.store(partial_ptr + pid, tl.sum(b_sum.to(tl.float64), 0))


@triton.jit
def backward_kernel(
    grad_ptr, velocity_ptr, noise_ptr, latents_ptr, dv_ptr, mean_scale, elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    factor = tl.load(grad_ptr).to(tl.float32) * mean_scale
    b_dv = _difference(velocity_ptr, noise_ptr, latents_ptr, o, m) * factor  # [B]
    tl.store(dv_ptr + o, b_dv.to(dv_ptr.dtype.element_ty), mask=m)


# Launch.
@dataclass(frozen=True)
class Launch:
    """Elements of a tile, elements of a program (whole tiles), and the number of programs."""

    block: int
    share: int
    programs: int
    num_warps: int = 4


def sum_launch(elements: int, capability: tuple[int, ...]) -> Launch:
    """Choose at most one resident wave: each program writes one partial sum."""
    tiles = -(-elements // 1024)
    share = -(-tiles // (12 * multiprocessors(capability)))
    return Launch(1024, 1024 * share, -(-tiles // share))


def map_launch(elements: int) -> Launch:
    """Choose one tile a program: 8 elements a thread, a 16-byte load of bfloat16."""
    return Launch(1024, 1024, -(-elements // 1024))


def _triton_forward(velocity, noise, latents):
    inputs, elements = (velocity, noise, latents), velocity.numel()
    if any(t.dtype not in KERNEL_DTYPES for t in inputs):
        return reference(*inputs)
    launch = sum_launch(elements, capability(velocity.device))
    partials = velocity.new_empty(launch.programs, dtype=torch.float64)
    forward_kernel[(launch.programs,)](
        *(t.contiguous() for t in inputs), partials, elements, launch.share,
        BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return (partials.sum() / elements).float()


def _triton_backward(grad, velocity, noise, latents):
    inputs, elements = (velocity, noise, latents), velocity.numel()
    if any(t.dtype not in KERNEL_DTYPES for t in inputs):
        return reference_backward(grad, *inputs)
    launch = map_launch(elements)
    d_velocity = velocity.new_empty(velocity.shape)
    backward_kernel[(launch.programs,)](
        grad, *(t.contiguous() for t in inputs), d_velocity, 2 / elements, elements,
        BLOCK=launch.block, num_warps=launch.num_warps,
    )  # fmt: skip
    return d_velocity


# Registration.
def _fake(velocity, noise, latents):
    return velocity.new_empty((), dtype=_wide(velocity, noise, latents))


def _fake_backward(grad, velocity, noise, latents):
    return velocity.new_empty(velocity.shape)


def _check(velocity, noise, latents):
    require_float("flow_loss", "velocity", velocity)
    require(velocity.numel() > 0, "flow_loss", "velocity", velocity, "at least one element")
    for name, tensor in (("noise", noise), ("latents", latents)):
        require_float("flow_loss", name, tensor)
        expected = f"the velocity's shape {list(velocity.shape)}"
        require(tensor.shape == velocity.shape, "flow_loss", name, tensor, expected)
    require_same_device("flow_loss", velocity=velocity, noise=noise, latents=latents)


_forward_op = register("flow_loss", reference, fake=_fake, triton=_triton_forward, check=_check)
_backward_op = register(
    "flow_loss_backward", reference_backward, fake=_fake_backward, triton=_triton_backward
)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return _backward_op(grad, *ctx.saved_tensors), None, None


_forward_op.register_autograd(
    _backward,
    setup_context=_setup_context,
    native=lambda velocity, noise, latents: velocity.numel() <= FEW,
)


# Public function.
def flow_loss(velocity: torch.Tensor, noise: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of a predicted velocity against ``noise - latents``.

    Args:
        velocity: the model's prediction, any shape; the only input that receives a gradient.
        noise: ε of the path x_σ = (1-σ)·latents + σ·ε, the same shape.
        latents: the clean latents, the same shape.

    Returns:
        A scalar, float32 (float64 if any input is float64).

    Raises:
        ValueError: if shapes or devices differ, tensors are empty, or ``noise`` or ``latents``
            requires a gradient.
    """
    if torch.is_grad_enabled():
        for name, tensor in (("noise", noise), ("latents", latents)):
            ok = not getattr(tensor, "requires_grad", False)
            expected = "a tensor that needs no gradient: pass its .detach()"
            require(ok, "flow_loss", name, tensor, expected)
    return _forward_op(velocity, noise, latents)
