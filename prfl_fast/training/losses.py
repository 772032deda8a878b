"""Losses on clean latents: supervised flow matching and consistency distillation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prfl_fast.kernels import flow_loss
from prfl_fast.models.adapter import Conditions, generated_frames, not_inference
from prfl_fast.models.experts import Experts
from prfl_fast.models.velocity import Velocity, bind_velocity, model_of
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import training_sigmas
from prfl_fast.training.noising import (
    add_noise,
    choose_sigma,
    draw_index,
    model_timestep,
    noise_like,
    wide_dtype,
)
from prfl_fast.utils.checks import check, check_count, check_positive


def sft_loss(
    transformer: nn.Module | Velocity,
    latents: torch.Tensor,
    conditions: Conditions,
    *,
    noise: torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> torch.Tensor:
    """Compute the scalar flow-matching loss ``mean((v_θ(x_σ, t, c) - (ε - x0))²)``.

    The mean leaves out a first frame that the conditions give. The timestep t is 1000σ rounded
    down. ``x_σ = (1-σ)·x0 + σ·ε`` and the loss are float32 (float64
    for float64 latents).

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        latents: clean latents x0, ``[B, C, F, H, W]``.
        conditions: tensors of batch B.
        noise: ε, of the shape of ``latents``; drawn if None.
        sigma: noise level in [0, 1], one number or ``[B]``; None draws one per sample, uniformly
            from ``training_sigmas(shift)``. Two experts take levels on one side of their boundary;
            drawn ones are of an expert that trains.
        generator: random number generator on any device; the noise is drawn first.
        integer_timesteps: False calls the model at t = 1000σ.

    Raises:
        TypeError: if a model is not supported.
        ValueError: if an input has the wrong shape, is out of range or is not finite.
    """
    draws = (noise, sigma, generator, shift, integer_timesteps)
    return flow_loss(*noised_velocity(transformer, latents, conditions, *draws))


def sft_losses(
    transformer: nn.Module | Velocity, latents: torch.Tensor, conditions: Conditions, **draws: Any
) -> torch.Tensor:
    """Compute the loss of :func:`sft_loss` for each sample, ``[B]``; arguments are the same."""
    parts = noised_velocity(transformer, latents, conditions, **draws)
    return torch.stack([flow_loss(*sample) for sample in zip(*parts, strict=True)])


def noised_velocity(
    transformer: nn.Module | Velocity,
    latents: torch.Tensor,
    conditions: Conditions,
    noise: torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the velocity of noised latents, the noise and the latents, in the frames that count.

    Arguments are those of :func:`sft_loss`.
    """
    velocity = bind_velocity(transformer, latents, conditions, "latents")
    latents, conditions = not_inference(latents), not_inference(conditions)
    noise = noise_like(latents, noise, generator)
    levels = (shift, integer_timesteps)
    experts = experts_of(transformer)
    sigma, timestep = choose_sigma(sigma, latents, generator, *levels, experts=experts)
    x = add_noise(latents, noise, sigma)
    v = velocity(x, timestep, conditions)
    v, noise, latents = (generated_frames(part, conditions) for part in (v, noise, latents))
    return v, noise, latents


def experts_of(transformer: nn.Module | Velocity) -> Experts | None:
    """Return the two experts that a transformer is or calls; None for all others."""
    model = model_of(transformer)
    return model if isinstance(model, Experts) else None


@dataclass(frozen=True)
class ConsistencyConfig:
    """Configure the noise levels and the Huber constant of :func:`consistency_loss`.

    Attributes:
        num_levels: number of levels above 0 (50 in the paper).
        shift: the levels are ``training_sigmas(shift, num_levels)``.
        huber: error at which the loss changes from quadratic to linear.
        integer_timesteps: False calls the models at t = 1000σ, not rounded down.

    Raises:
        ValueError: if a value is not positive.
    """

    num_levels: int = 50
    shift: float = 5.0
    huber: float = 1e-3
    integer_timesteps: bool = True

    def __post_init__(self) -> None:
        check_count("num_levels", self.num_levels)
        check_positive("shift", self.shift)
        check_positive("huber", self.huber)


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
    config: ConsistencyConfig = ConsistencyConfig(),  # noqa: B008 - frozen
) -> torch.Tensor:
    """Compute the scalar consistency distillation loss between two adjacent noise levels.

    This is the distillation term of RG-LCD (arXiv 2403.11027) for flow models; the reward term is
    ``PRFL`` with ``GradientPlan.rg_lcd()``. With ``f(x, σ) = x - σ·v(x, t, c)``, t = 1000σ rounded
    down, and σ' the level after σ::

        x_σ  = (1-σ)·x0 + σ·ε
        x_σ' = x_σ + (σ' - σ)·v_teacher(x_σ, t, c)      one Euler step, with guidance if given
        loss = mean(sqrt((f_student(x_σ, σ) - f_target(x_σ', σ'))² + huber²) - huber)

    Only the student has a graph. Values outside the models are float32 (float64 for float64
    latents).

    Args:
        student: the trained model, or a function ``(x, timestep [B], conditions) -> velocity``.
        target: an exponential moving average of the student (RG-LCD: decay 0.95), or the student.
        teacher: the frozen model that is distilled.
        latents, conditions, noise, generator: as in :func:`sft_loss`.
        index: number of the level σ, 0 (σ = 1) … num_levels-1, one number or ``[B]``; None draws
            one per sample, uniformly.
        guidance: applied to the teacher; the student then needs none.

    Raises:
        TypeError: if a model is not supported.
        ValueError: if an input has the wrong shape, is out of range or is not finite, a model
            returns another shape or has two experts.
    """
    for name, model in (("student", student), ("target", target), ("teacher", teacher)):
        two, hint = isinstance(model_of(model), Experts), "A level and the next may be of both"
        check(not two, name, "two experts", "one model: high or low of them", hint=hint)
    of_student, of_target, of_teacher = (
        bind_velocity(model, latents, conditions, "latents") for model in (student, target, teacher)
    )
    latents, conditions = not_inference(latents), not_inference(conditions)
    noise = noise_like(latents, noise, generator)
    sigma, following = _levels(config, index, latents, generator)
    x = add_noise(latents, noise, sigma)

    def call(
        name: str, velocity: Velocity, x: torch.Tensor, sigma: torch.Tensor, c: Conditions
    ) -> torch.Tensor:
        v = velocity(x, model_timestep(sigma, config.integer_timesteps), c)
        ok = isinstance(v, torch.Tensor) and v.shape == x.shape
        check(ok, f"the velocity of the {name}", v, f"a tensor of shape {list(x.shape)}")
        return v

    with torch.no_grad():
        branches = (conditions,) if guidance is None else guidance.branches(conditions)
        copies = 1 if guidance is None or not guidance.batched else 2
        inputs = torch.cat([x] * copies), sigma.repeat(copies)
        outputs = [call("teacher", of_teacher, *inputs, branch) for branch in branches]
        v = outputs[0] if guidance is None else guidance.combine(outputs)
        x_next = x + (following - sigma).view(-1, 1, 1, 1, 1) * v  # x_σ', by Euler's step
        v = call("target", of_target, x_next, following, conditions)
        aim = x_next - following.view(-1, 1, 1, 1, 1) * v  # f_target(x_σ', σ')
    v = call("student", of_student, x, sigma, conditions)
    off = generated_frames(x - sigma.view(-1, 1, 1, 1, 1) * v - aim, conditions)
    return ((off.square() + config.huber**2).sqrt() - config.huber).mean()


def _levels(
    config: ConsistencyConfig,
    index: int | torch.Tensor | None,
    latents: torch.Tensor,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the chosen or drawn noise level of each sample and the level after it, ``[B]``."""
    batch, count = latents.shape[0], config.num_levels
    levels = training_sigmas(config.shift, count).to(latents.device, wide_dtype(latents))
    levels = torch.cat([levels, levels.new_zeros(1)])
    if index is None:
        chosen = draw_index(count, latents, generator)
    else:
        chosen = torch.as_tensor(index)
        floating = chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool
        ok = not floating and chosen.shape in ((), (batch,))
        ok = ok and bool(((chosen >= 0) & (chosen < count)).all())
        check(ok, "index", index, f"an integer in 0 … {count - 1}, or {batch} of them")
        chosen = chosen.to(latents.device, torch.long).expand(batch)
    return levels[chosen], levels[chosen + 1]
