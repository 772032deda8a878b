"""Noise clean latents for a training loss: ``x_σ = (1-σ)·x0 + σ·ε``."""

from typing import Any

import torch

from prfl_fast.kernels.runtime.checks import describe
from prfl_fast.models.adapter import not_inference
from prfl_fast.models.experts import Experts
from prfl_fast.models.velocity import check_finite, checks_values
from prfl_fast.rollout.schedulers import training_sigmas
from prfl_fast.utils.checks import check
from prfl_fast.utils.transfers import to_device

Device = torch.device | str
TIMESTEPS_PER_SIGMA = 1000


def wide_dtype(latents: torch.Tensor) -> torch.dtype:
    """Return the dtype of losses and noise: float64 for float64 latents, float32 for all others."""
    return torch.float64 if latents.dtype == torch.float64 else torch.float32


def draw_index(
    count: int,
    latents: torch.Tensor,
    generator: torch.Generator | None,
    device: Device | None = None,
) -> torch.Tensor:
    """Draw one of ``count`` numbers for each sample, ``[B]``, on the generator's device.

    Without a generator, draw on ``device``, or on that of ``latents`` if it is None.
    """
    source = generator.device if generator is not None else device or latents.device
    index = torch.randint(count, latents.shape[:1], generator=generator, device=source)
    return to_device(index, latents.device)


def check_sigma(sigma: torch.Tensor | float, latents: torch.Tensor) -> torch.Tensor:
    """Return ``sigma`` as ``[B]`` on the device of ``latents``; raise ``ValueError`` if invalid."""
    batch = latents.shape[0]
    sigma = torch.as_tensor(sigma, dtype=wide_dtype(latents), device=latents.device)
    ok = sigma.shape in ((), (batch,))
    if not ok or checks_values():
        ok = ok and bool(((sigma >= 0) & (sigma <= 1)).all())
        expected = f"a number in [0, 1], or {batch} of them"
        check(ok, "sigma", sigma.tolist(), expected, hint="Timesteps are 1000 sigma")
    return sigma.expand(batch)


def model_timestep(sigma: torch.Tensor, integer: bool) -> torch.Tensor:
    """Return the timestep 1000·σ, rounded down if ``integer``, in the dtype of ``sigma``."""
    if not integer:
        return TIMESTEPS_PER_SIGMA * sigma
    # In float32, as the levels are: in float64, 1000 times the float32 number 0.9 is below 900.
    return (TIMESTEPS_PER_SIGMA * sigma.float()).floor().to(sigma.dtype)


def evaluation_sigma(timestep: float, shift: float, integer: bool) -> float:
    """Return the level of ``training_sigmas(shift)`` whose whole timestep is nearest.

    If ``integer`` is False, return timestep / 1000.
    """
    if not integer:
        return timestep / TIMESTEPS_PER_SIGMA
    levels = training_sigmas(shift)
    return levels[(model_timestep(levels, True) - timestep).abs().argmin()].item()


def choose_sigma(
    sigma: torch.Tensor | float | None,
    latents: torch.Tensor,
    generator: torch.Generator | None,
    shift: float,
    integer_timesteps: bool,
    device: Device | None = None,
    experts: Experts | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the checked ``sigma`` and the model's timestep of each sample, ``[B]`` each.

    If ``sigma`` is None, draw it uniformly from ``training_sigmas(shift)`` as in
    :func:`draw_index`. Of two experts, all samples get levels of one that trains: if both do, a
    first draw from all levels chooses it.
    """
    if sigma is not None:
        sigma = check_sigma(sigma, latents)
    else:
        levels = to_device(training_sigmas(shift).to(wide_dtype(latents)), latents.device)
        if experts is not None:
            high = experts.is_high(model_timestep(levels, integer_timesteps))
            if len(experts.trained) == 1:
                chosen = torch.tensor(experts.trained == ("high",))
            else:
                chosen = high[draw_index(len(levels), latents[:1], generator, device)]
            levels = levels[high == chosen.to(high.device)]
            expected = f"a noise level of the expert that trains, {' or '.join(experts.trained)}"
            check(len(levels) > 0, "boundary", experts.boundary, expected)
        sigma = levels[draw_index(len(levels), latents, generator, device)]
    return sigma, model_timestep(sigma, integer_timesteps)


def noise_like(
    latents: torch.Tensor, noise: torch.Tensor | None, generator: torch.Generator | None
) -> torch.Tensor:
    """Return ``noise`` with its shape, device and values checked, or draw it if it is None."""
    if noise is None:
        source = generator.device if generator is not None else latents.device
        dtype = wide_dtype(latents)
        drawn = torch.randn(latents.shape, generator=generator, device=source, dtype=dtype)
        return to_device(drawn, latents.device)
    same = isinstance(noise, torch.Tensor) and noise.shape == latents.shape
    same = same and noise.device == latents.device
    check(same, "noise", noise, f"the shape and device of the latents, {describe(latents)}")
    if checks_values():
        check_finite("noise", noise)
    return not_inference(noise)


def noise_of_samples(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw float32 noise like ``latents`` that does not depend on the batch size."""
    like: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    return torch.stack([torch.randn(x.shape, **like) for x in latents]).to(latents.device)


def add_noise(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return ``x_σ`` of every sample in the wide dtype; ``sigma`` is ``[B]``."""
    # sigma as [B, 1, 1, 1, 1]
    level, wide = sigma.view(-1, *[1] * (latents.dim() - 1)), wide_dtype(latents)
    return (1 - level) * latents.to(wide) + level * noise.to(wide)
