"""Losses on real latents: supervised flow matching, and consistency distillation."""

import torch
from torch import nn

from prfl_fast._checks import check_count, check_positive
from prfl_fast.adapters import Conditions
from prfl_fast.kernels import flow_loss
from prfl_fast.kernels._checks import describe
from prfl_fast.model_call import Guidance, Velocity, bind_velocity, check_finite
from prfl_fast.schedulers import training_sigmas

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
    noise = _noise_like(latents, noise, generator)
    wide, batch = _wide(latents), latents.shape[0]
    if sigma is None:
        levels = training_sigmas(shift).to(latents.device, wide)
        sigma = levels[_drawn(len(levels), latents, generator)]
    else:
        sigma = torch.as_tensor(sigma, dtype=wide).to(latents.device)
        if sigma.shape not in ((), (batch,)) or not bool(((sigma >= 0) & (sigma <= 1)).all()):
            raise ValueError(
                f"sigma is {sigma.tolist()}, expected a number in [0, 1] or {batch} of them"
            )
        sigma = sigma.expand(batch)
    x = _noised(latents, noise, sigma)
    return flow_loss(velocity(x, TIMESTEPS_PER_SIGMA * sigma, conditions), noise, latents)


def consistency_loss(
    student: nn.Module | Velocity,
    target: nn.Module | Velocity,
    teacher: nn.Module | Velocity,
    latents: torch.Tensor,
    conditions: Conditions,
    *,
    noise: torch.Tensor | None = None,
    index: int | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    guidance: Guidance | None = None,
    num_levels: int = 50,
    shift: float = 5.0,
    huber: float = 1e-3,
) -> torch.Tensor:
    """Consistency distillation: the student's one-step estimate of x0 is that of the next level.

    The distillation term of reward guided latent consistency distillation (RG-LCD, arXiv
    2403.11027), for flow models; its reward term is ``PRFL`` with ``GradientPlan.rg_lcd()``. With
    ``f(x, σ) = x - σ·v(x, 1000σ, c)``, which is x at σ = 0 as a consistency function has to be, and
    σ' the level after σ::

        x_σ  = (1-σ)·x0 + σ·ε
        x_σ' = x_σ + (σ' - σ)·v_teacher(x_σ, 1000σ, c)      one Euler step, guided if asked for
        loss = mean(sqrt((f_student(x_σ, σ) - f_target(x_σ', σ'))² + huber²) - huber)

    Only the student has a graph. All but the models is computed in float32 (float64 for float64
    latents).

    Args:
        student: what learns; a supported model, or a function ``(x, timestep [B], conditions) ->
            velocity``.
        target: an exponential moving average of the student (RG-LCD: decay 0.95), or the student.
        teacher: the model to distil.
        latents: clean latents x0, ``[B, C, F, H, W]``.
        conditions: tensors of batch B.
        noise: ε like ``latents``; drawn if ``None``.
        index: number of the level σ, 0 (σ = 1) … num_levels-1, for all or ``[B]``; if ``None``,
            drawn per sample, uniform.
        generator: source of what is drawn, noise first; on any device.
        guidance: of the teacher, so that the student needs none.
        num_levels: levels before the final 0; the paper has 50.
        shift: of these levels, ``training_sigmas(shift, num_levels)``.
        huber: where the loss turns from quadratic to linear.

    Returns:
        A scalar with graph; backward is the caller's.

    Raises:
        TypeError: an unsupported model.
        ValueError: latents, conditions, noise or index of the wrong shape, out of range or not
            finite; ``huber`` not positive; a model that returns another shape.
    """
    check_positive("huber", huber)
    check_count("num_levels", num_levels)
    of_student = bind_velocity(student, latents, conditions, "latents")
    of_target = bind_velocity(target, latents, conditions, "latents")
    of_teacher = bind_velocity(teacher, latents, conditions, "latents")
    branches = (conditions,) if guidance is None else guidance.branches(conditions)
    noise = _noise_like(latents, noise, generator)
    levels = training_sigmas(shift, num_levels).to(latents.device, _wide(latents))
    levels = torch.cat([levels, levels.new_zeros(1)])
    if index is None:
        chosen = _drawn(num_levels, latents, generator)
    else:
        chosen = _checked_index(index, num_levels, latents)
    sigma, following = levels[chosen], levels[chosen + 1]
    x = _noised(latents, noise, sigma)
    with torch.no_grad():
        step = (following - sigma).view(-1, 1, 1, 1, 1)
        if guidance is None:
            v = _called("teacher", of_teacher, x, sigma, conditions)
        else:
            twice = (x, sigma) if not guidance.batched else (torch.cat([x, x]), sigma.repeat(2))
            v = guidance.combine([_called("teacher", of_teacher, *twice, c) for c in branches])
        x_next = x + step * v
        aim = _clean_estimate("target", of_target, x_next, following, conditions)
    off = _clean_estimate("student", of_student, x, sigma, conditions) - aim
    return ((off.square() + huber**2).sqrt() - huber).mean()


def _wide(latents: torch.Tensor) -> torch.dtype:
    return torch.float64 if latents.dtype == torch.float64 else torch.float32


def _noise_like(
    latents: torch.Tensor, noise: torch.Tensor | None, generator: torch.Generator | None
) -> torch.Tensor:
    """The given noise, checked, or drawn noise."""
    if noise is None:
        source = generator.device if generator is not None else latents.device
        drawn = torch.randn(latents.shape, generator=generator, device=source, dtype=_wide(latents))
        return drawn.to(latents.device)
    like = isinstance(noise, torch.Tensor) and noise.shape == latents.shape
    if not like or noise.device != latents.device:
        raise ValueError(
            f"noise is {describe(noise)}, expected the shape and device of latents, "
            f"{describe(latents)}"
        )
    check_finite("noise", noise)
    return noise


def _drawn(count: int, latents: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One of ``count`` numbers for each sample, ``[B]``."""
    source = generator.device if generator is not None else latents.device
    return torch.randint(count, latents.shape[:1], generator=generator, device=source).to(
        latents.device
    )


def _checked_index(index: int | torch.Tensor, count: int, latents: torch.Tensor) -> torch.Tensor:
    batch = latents.shape[0]
    chosen = torch.as_tensor(index)
    whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    if (
        not whole
        or chosen.shape not in ((), (batch,))
        or not bool(((chosen >= 0) & (chosen < count)).all())
    ):
        raise ValueError(
            f"index is {index!r}, expected a whole number in 0 … {count - 1}, or {batch} of them"
        )
    return chosen.to(latents.device).expand(batch)


def _noised(latents: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    level, wide = sigma.view(-1, 1, 1, 1, 1), _wide(latents)
    return (1 - level) * latents.to(wide) + level * noise.to(wide)


def _called(
    name: str, velocity: Velocity, x: torch.Tensor, sigma: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    v = velocity(x, TIMESTEPS_PER_SIGMA * sigma, conditions)
    if not isinstance(v, torch.Tensor) or v.shape != x.shape:
        raise ValueError(
            f"the {name} returned {describe(v)}, expected a velocity of shape {list(x.shape)}"
        )
    return v


def _clean_estimate(
    name: str, velocity: Velocity, x: torch.Tensor, sigma: torch.Tensor, conditions: Conditions
) -> torch.Tensor:
    return x - sigma.view(-1, 1, 1, 1, 1) * _called(name, velocity, x, sigma, conditions)
