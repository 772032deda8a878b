"""Sampling with the reward's gradient and without training."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Bound
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.adapter import Conditions, generated_frames, zero_first_frame
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.models.velocity import bind_velocity
from prfl_fast.rewards.functions import Reward
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.sampling.candidates import Candidates, Forwards
from prfl_fast.utils.checks import check, check_count, check_positive, is_number
from prfl_fast.utils.optional import progress_bar
from prfl_fast.utils.sharded import holds_on_all_ranks


@dataclass(frozen=True)
class NoiseResult:
    """The best noise of each of B prompts.

    Attributes:
        noise: ``[B, C, F, H, W]``, in the dtype of the given noise.
        latents: ``[B, C, F, H, W]``, the samples from it.
        scores: ``[B]``, their (weighted) rewards at timestep 0, on the CPU, float32 (float64 for
            float64 rewards).
        history: ``[iterations, B]``, the rewards of all samples in order. The last row is that of
            the first reward or gradient that is not finite.
        forwards: cost of the optimization.
    """

    noise: torch.Tensor
    latents: torch.Tensor
    scores: torch.Tensor
    history: torch.Tensor
    forwards: Forwards


@dataclass(frozen=True)
class GuidedResult:
    """Guided samples of B prompts.

    Attributes:
        latents: ``[B, C, F, H, W]``, clean.
        history: (weighted) rewards ``[B]`` of the latents before each guided step, by step.
        forwards: cost of the samples, without exact rollouts that check their drift.
    """

    latents: torch.Tensor
    history: dict[int, torch.Tensor]
    forwards: Forwards


@exact_linears()
def optimize_noise(  # noqa: PLR0913 - the method's own hyperparameters
    sampler: Sampler,
    reward: nn.Module | Reward | Mapping[str, Reward],
    noise: torch.Tensor,
    conditions: Conditions,
    *,
    iterations: int = 50,
    learning_rate: float = 5.0,
    momentum: float = 0.9,
    max_grad_norm: float = 0.1,
    prior: float = 0.01,
    reward_weights: Mapping[str, float] | None = None,
    progress: bool = False,
) -> NoiseResult:
    """Maximize the reward of the sample over its initial noise (ReNO, arXiv 2406.04312).

    Each iteration samples, and moves every prompt's ε against the gradient of its own loss

        -r(x0(ε), 0, c) + prior·(‖ε‖²/2 - (d-1)·log ‖ε‖),   d = C·F·H·W

    by SGD with Nesterov momentum, the gradient clipped to a norm. The second term is the negative
    log density of the norm of Gaussian noise, least at ‖ε‖² = d - 1; a first frame that the
    conditions give has no part in it, and its noise does not move. The gradient goes through all
    steps and keeps one latent of each (``GradientPlan.reno()``), at the cost of a forward, a
    recomputed one and a backward per step. The paper's generators take one step.

    The result is the sampled noise with the best reward (without the prior); the first sample is
    that of the given noise. Prompts do not influence each other.

    Args:
        sampler: the generator, its schedule and guidance. A model's parameters get no gradient; a
            function must be differentiable in x. Every step is exact; ``rollout`` is ignored.
        reward: ``(x, timestep [B], conditions) -> [B]``, differentiable, higher is better; or
            several by name.
        noise: ε, ``[B, C, F, H, W]``; optimized in float32 (float64 if it is).
        conditions: tensors of batch B.
        iterations: number of samples; no step follows the last.
        learning_rate, momentum: of SGD.
        max_grad_norm: largest norm of each prompt's gradient.
        prior: weight of the noise's log density.
        reward_weights: factors of several rewards by name; 1 unless given.
        progress: show a tqdm bar.

    Returns:
        See :class:`NoiseResult`. The first reward or gradient of any prompt that is not finite, on
        any rank if weights are sharded, ends the optimization with the best noise until then.

    Raises:
        TypeError: if the model, reward or scheduler is unsupported.
        ValueError: if noise or conditions have a wrong shape or are not finite, a number is out of
            range, or the reward has trainable parameters, a wrong shape, no graph to its input, or
            no finite value for a prompt.
    """
    check_count("iterations", iterations)
    check_positive("learning_rate", learning_rate)
    check_positive("max_grad_norm", max_grad_norm)
    ok = is_number(momentum) and 0 <= momentum < 1
    check(ok, "momentum", momentum, "a number in [0, 1)")
    check(is_number(prior) and prior >= 0, "prior", prior, "a number of at least 0")
    bind_velocity(sampler.transformer, noise, conditions, "noise")
    step = _step(replace(sampler, rollout=None), reward, GradientPlan.reno(), 1.0, reward_weights)
    epsilon = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
    velocity = torch.zeros_like(epsilon)
    best, gradients, together = _Best(noise), 0, step.spec.shares_weights()
    with progress_bar("optimizing noise", "iteration", iterations if progress else None) as tick:
        for iteration in range(iterations):
            start, gradient = epsilon.to(noise.dtype), None
            if iteration == iterations - 1:  # no step follows, so no gradient is needed
                latents, scores = _sampled(step, start, conditions)
            else:
                out = step(start, conditions, indices=[sampler.num_inference_steps - 1])
                latents, scores, gradient = out.latents, out.rewards[0].cpu(), out.gradient
                gradients += gradient is not None
            best.update(start, latents, scores)
            tick()
            if gradient is None:
                break
            finite = gradient.isfinite().all()
            if not bool(holds_on_all_ranks(finite) if together else finite):
                break
            # PRFL's loss is a mean over the batch. The factor gives each prompt its own gradient.
            slope = len(noise) * gradient.to(epsilon.dtype)
            slope = slope + _prior_slope(epsilon, prior, conditions)
            slope = slope * (max_grad_norm / (_norm(slope) + 1e-6)).clamp(max=1)
            velocity = momentum * velocity + slope  # SGD with Nesterov momentum, as torch's
            epsilon = epsilon - learning_rate * (slope + momentum * velocity)
    return best.result(_cost(step, len(noise), len(best.history), gradients))


class _Best:
    """The best noise of each prompt until now, and the scores of all samples."""

    def __init__(self, noise: torch.Tensor) -> None:
        self._noise, self._latents = noise.detach().clone(), torch.zeros_like(noise)
        self._scores = torch.zeros(0, dtype=torch.float32, device="cpu")
        self.history: list[torch.Tensor] = []

    def update(self, noise: torch.Tensor, latents: torch.Tensor, scores: torch.Tensor) -> None:
        scores = torch.where(scores.isfinite(), scores, math.nan)
        before = self._scores if self.history else torch.full_like(scores, -math.inf)
        self.history.append(scores)
        better = scores > before  # False for NaN
        self._scores = torch.where(better, scores, before)
        here = better.to(noise.device).view(-1, 1, 1, 1, 1)
        self._noise = torch.where(here, noise, self._noise)
        self._latents = torch.where(here, latents, self._latents)

    def result(self, forwards: Forwards) -> NoiseResult:
        lost = (self._scores == -math.inf).nonzero().flatten().tolist()
        if lost:
            raise ValueError(
                f"the rewards of prompts {lost} were never finite in {len(self.history)} "
                "iterations. Check the reward, and the generator's precision"
            )
        history = torch.stack(self.history)
        return NoiseResult(self._noise, self._latents, self._scores, history, forwards)


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Return the norm of each sample, ``[B, 1, 1, 1, 1]``."""
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)


def _prior_slope(epsilon: torch.Tensor, prior: float, conditions: Conditions) -> torch.Tensor:
    """Return the gradient of prior·(‖ε‖²/2 - (d-1)·log ‖ε‖) for each sample's generated frames."""
    free = generated_frames(epsilon, conditions)
    slope = prior * (1 - (free[0].numel() - 1) / _norm(free) ** 2) * epsilon
    return zero_first_frame(slope, conditions)


def _cost(step: PRFL, batch: int, samples: int, gradients: int) -> Forwards:
    """Return the cost of ``samples`` iterations, of which ``gradients`` ran a backward."""
    steps, branches = step.sampler.num_inference_steps, 1 if step.sampler.guidance is None else 2
    rewards = batch * len(step.spec.rewards)
    recomputed = steps - 1  # The last step keeps its graph, so its forward runs once.
    return Forwards(
        generator=batch * branches * (samples * steps + gradients * recomputed),
        reward=samples * rewards,
        generator_backward=gradients * batch * branches * steps,
        reward_backward=gradients * rewards,
    )


@exact_linears()
def guide(
    sampler: Sampler,
    reward: nn.Module | Reward | Mapping[str, Reward],
    noise: torch.Tensor,
    conditions: Conditions,
    *,
    weight: float,
    window: tuple[Bound, Bound] = (1, None),
    reward_weights: Mapping[str, float] | None = None,
    progress: bool = False,
) -> GuidedResult:
    """Sample with the velocity changed by the reward's gradient (Flow-NRG, arXiv 2501.13918).

    Every step of the window uses the gradient of a latent reward at the noisy latents::

        v ← v - weight·σ/(1-σ)·∇_x r(x, 1000σ, c)

    This samples from the flow's distribution weighted by exp(weight·r). The generator runs forward
    only, and each prompt follows its own gradient.

    Args:
        sampler: the generator, its schedule, guidance and rollout configuration.
        reward, noise, conditions, reward_weights, progress: as in :func:`optimize_noise`.
        weight: strength of the guidance; the paper names none.
        window: the guided steps, as in :class:`prfl_fast.GradientPlan`; the factor is infinite at
            the first step, where σ is 1.

    Raises:
        TypeError, ValueError: as :func:`optimize_noise`, or if a reward is not finite.
    """
    # In the small world, weight 50 raises the motion metric by 0.048 and weight 500 exploits the
    # reward: the metric falls by 0.066 (bench/RESULTS.md).
    check_positive("weight", weight)
    plan = GradientPlan.flow_nrg(window)
    steps = len(plan.steps(sampler.num_inference_steps))
    with progress_bar("guided sampling", "guided step", steps if progress else None) as tick:
        judge = _ticking(reward, tick) if progress else reward
        out = _step(sampler, judge, plan, weight, reward_weights)(noise, conditions)
    history = dict(zip(out.indices, out.rewards.cpu().unbind(), strict=True))
    for index, scores in history.items():
        lost = (~scores.isfinite()).nonzero().flatten().tolist()
        if lost:
            raise ValueError(
                f"the rewards of prompts {lost} at step {index} are not finite. Lower weight, or "
                "check the reward at this noise level and the generator's precision"
            )
    branches = 1 if sampler.guidance is None else 2
    generated = len(noise) * branches * sampler.num_inference_steps
    scored = len(noise) * len(history) * len(out.by_reward)
    forwards = Forwards(generated, scored, reward_backward=scored)
    return GuidedResult(out.latents, history, forwards)


def _step(
    sampler: Sampler,
    reward: Any,
    plan: GradientPlan,
    weight: float,
    reward_weights: Mapping[str, float] | None,
) -> PRFL:
    """Return a PRFL step of this plan that maximizes the reward without a target."""
    return PRFL(
        sampler.transformer,
        reward,
        sampler.scheduler,
        plan,
        num_inference_steps=sampler.num_inference_steps,
        target=None,
        weight=weight,
        reward_weights=reward_weights,
        guidance=sampler.guidance,
        rollout=sampler.rollout,
    )


def _sampled(
    step: PRFL, noise: torch.Tensor, conditions: Conditions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample without gradient; return latents and their rewards ``[B]`` on the CPU."""

    def reward(x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        scores = [
            step.spec.reward_weights[name] * function(x, timestep, conditions)
            for name, function in step.spec.rewards.items()
        ]
        return torch.stack(scores).sum(0)

    # A compiled block would round differently from the iterations with gradient.
    sampler = replace(step.sampler, rollout=RolloutConfig(compile="off"))
    with torch.no_grad():
        one = Candidates(sampler, reward, noise, conditions)
        one.begin(noise, 1, None)
        (batch,) = one.run(sampler.num_inference_steps - 1)
        return batch.x, one.score([batch])


class _Ticking:
    """Wrap a reward, and advance a progress bar at each call."""

    def __init__(self, reward: Reward, tick: Callable[[], object]) -> None:
        self.members, self._tick = (reward,), tick

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        self._tick()
        return self.members[0](x, timestep, conditions)


def _ticking(reward: Any, tick: Callable[[], object]) -> Any:
    """Wrap the reward, or the first of several; return any other value unchanged."""
    if isinstance(reward, Mapping):
        first = next(iter(reward), None)
        return {name: _ticking(r, tick) if name == first else r for name, r in reward.items()}
    return _Ticking(reward, tick) if callable(reward) else reward
