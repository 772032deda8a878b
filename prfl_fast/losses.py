"""Losses on real latents: supervised flow matching."""

import torch
from torch import nn

from prfl_fast.adapters import Conditions
from prfl_fast.kernels import flow_loss
from prfl_fast.kernels._checks import describe
from prfl_fast.schedulers import training_sigmas
from prfl_fast.trajectory import Velocity, bind_velocity, check_finite

TIMESTEPS_PER_SIGMA = 1000


def sft_loss(
    transformer: nn.Module | Velocity,
    latents: torch.Tensor,
    conditions: Conditions,
    *,
    noise: torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
) -> torch.Tensor:
    """Flow-matching loss ``mean((v_θ(x_σ, 1000σ, c) - (ε - x0))²)`` with ``x_σ = (1-σ)·x0 + σ·ε``.

    ``x_σ`` is formed in float32 (float64 for float64 latents), whatever the latents' dtype.

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        latents: clean latents x0, ``[B, C, F, H, W]``.
        conditions: tensors of batch B.
        noise: ε like ``latents``; drawn if ``None``.
        sigma: noise level in [0, 1], one number or ``[B]``; if ``None``, drawn per sample, uniform
            over ``training_sigmas(shift)``.
        generator: source of what is drawn, noise first; on any device.
        shift: of the training schedule.

    Returns:
        A scalar with graph, float32 (float64 for float64 latents); backward is the caller's.

    Raises:
        TypeError: an unsupported model.
        ValueError: latents, conditions, noise or sigma of the wrong shape, out of range or not
            finite.
    """
    velocity = bind_velocity(transformer, latents, conditions, "latents")
    wide = torch.float64 if latents.dtype == torch.float64 else torch.float32
    device, batch = latents.device, latents.shape[0]
    source = generator.device if generator is not None else device
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator, device=source, dtype=wide)
        noise = noise.to(device)
    else:
        like = isinstance(noise, torch.Tensor) and noise.shape == latents.shape
        if not like or noise.device != device:
            raise ValueError(
                f"noise is {describe(noise)}, expected the shape and device of latents, "
                f"{describe(latents)}"
            )
        check_finite("noise", noise)
    if sigma is None:
        levels = training_sigmas(shift).to(source, wide)
        drawn = torch.randint(len(levels), (batch,), generator=generator, device=source)
        sigma = levels[drawn].to(device)
    else:
        sigma = torch.as_tensor(sigma, dtype=wide).to(device)
        if sigma.shape not in ((), (batch,)) or not bool(((sigma >= 0) & (sigma <= 1)).all()):
            raise ValueError(
                f"sigma is {sigma.tolist()}, expected a number in [0, 1] or {batch} of them"
            )
        sigma = sigma.expand(batch)
    level = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - level) * latents.to(wide) + level * noise.to(wide)
    return flow_loss(velocity(x, TIMESTEPS_PER_SIGMA * sigma, conditions), noise, latents)
