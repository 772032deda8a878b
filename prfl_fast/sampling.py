"""Better samples for more computation, from a reward and without training.

:func:`prune` and :func:`beam_search` choose among candidates, without gradient. Here are the two
that follow the reward's gradient: :func:`optimise_noise` changes the initial noise, :func:`guide`
the latents on their way.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prfl_fast._checks import check_count, check_positive, is_number
from prfl_fast._extras import need
from prfl_fast.adapters import Conditions
from prfl_fast.candidates import Candidates, Forwards, SearchResult
from prfl_fast.gradient_plan import Bound, GradientPlan
from prfl_fast.model_call import Guidance, Velocity, bind_velocity
from prfl_fast.rewards import Reward
from prfl_fast.rollout_engine import RolloutSettings
from prfl_fast.search import beam_search, prune
from prfl_fast.step import PRFL

__all__ = [
    "Forwards",
    "GuidedResult",
    "NoiseResult",
    "SearchResult",
    "beam_search",
    "guide",
    "optimise_noise",
    "prune",
]


@dataclass(frozen=True)
class NoiseResult:
    """The best noise of each of B prompts that the optimisation saw.

    Attributes:
        noise: ``[B, C, F, H, W]``, in the dtype of the noise that was given.
        latents: ``[B, C, F, H, W]``, the samples from it.
        scores: ``[B]``, their rewards at timestep 0, of several rewards the weighted sum; on the
            CPU, float32 (float64 for float64 rewards).
        history: ``[iterations, B]``, the rewards of all samples in order; fewer rows if a reward or
            gradient was not finite, the last of them its.
        forwards: what was spent.
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
        history: by guided step, the rewards of the latents before it, ``[B]``; of several rewards
            the weighted sum.
        forwards: what was spent; without the exact rollout of a checked precision.
    """

    latents: torch.Tensor
    history: dict[int, torch.Tensor]
    forwards: Forwards


def optimise_noise(
    transformer: nn.Module | Velocity,
    reward: nn.Module | Reward | Mapping[str, Reward],
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    iterations: int = 50,
    lr: float = 5.0,
    momentum: float = 0.9,
    clip: float = 0.1,
    prior: float = 0.01,
    reward_weights: Mapping[str, float] | None = None,
    guidance: Guidance | None = None,
    progress: bool = False,
) -> NoiseResult:
    """Climb the reward of the sample by changing the noise it starts from (ReNO, arXiv 2406.04312).

    Each iteration samples, and moves every prompt's ε against the gradient of its own loss

        -r(x0(ε), 0, c) + prior·(‖ε‖²/2 - (d-1)·log ‖ε‖),   d = C·F·H·W

    by SGD with Nesterov momentum, the gradient clipped to a norm. The second term is the negative
    log density of the norm of Gaussian noise, least at ‖ε‖² = d - 1. The gradient goes through all
    steps and keeps one latent of each: ``GradientPlan.reno()``. The paper has generators of one
    step; with more, each iteration costs as many forwards, recomputed ones and backwards.

    The result is the noise with the best reward alone, of all that were sampled; the first is the
    given one, so it is never worse. Prompts do not influence each other.

    Args:
        transformer: a supported model, a ``ModelCall`` of one, or a differentiable function ``(x,
            timestep [B], conditions) -> velocity``. A model's parameters get no gradient.
        reward: ``(x, timestep [B], conditions) -> [B]``, differentiable, higher is better; or
            several by name.
        noise: ε, ``[B, C, F, H, W]``; optimised in float32 (float64 if it is).
        conditions: tensors of batch B.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied.
        num_steps: solver steps of the schedule.
        iterations: samples; after the last there is no step.
        lr, momentum, clip: of the optimizer; ``clip`` is a norm for each prompt.
        prior: weight of the noise's log density.
        reward_weights: factors of several rewards by name; 1 unless given.
        guidance: classifier-free guidance.
        progress: show a tqdm bar.

    Returns:
        See :class:`NoiseResult`. A reward or gradient that is not finite, of any prompt, ends the
        optimisation; the best until then is returned.

    Raises:
        TypeError: an unsupported model, reward or scheduler.
        ValueError: noise or conditions of the wrong shape or not finite; numbers out of range; a
            reward with trainable parameters, of the wrong shape, without a graph to its input, or
            without a finite value for a prompt.
    """
    check_count("iterations", iterations)
    check_positive("lr", lr)
    check_positive("clip", clip)
    if not (is_number(momentum) and 0 <= momentum < 1):
        raise ValueError(f"momentum is {momentum!r}, expected a number in [0, 1)")
    if not (is_number(prior) and prior >= 0):
        raise ValueError(f"prior is {prior!r}, expected a number of at least 0")
    bind_velocity(transformer, noise, conditions, "noise")
    step = PRFL(
        transformer,
        reward,
        scheduler,
        GradientPlan.reno(),
        num_steps=num_steps,
        target=None,
        weight=1.0,
        reward_weights=reward_weights,
        guidance=guidance,
    )
    batch, size = len(noise), noise[0].numel()
    wide = torch.promote_types(noise.dtype, torch.float32)
    epsilon = noise.detach().to(wide)
    velocity = torch.zeros_like(epsilon)
    best_noise, best_latents = noise.detach().clone(), torch.zeros_like(noise)
    history: list[torch.Tensor] = []
    gradients = 0
    with _bar("optimising noise", "iteration", iterations if progress else None) as tick:
        for iteration in range(iterations):
            start = epsilon.to(noise.dtype)
            gradient = None
            if iteration == iterations - 1:
                latents, scores = _sampled(step, scheduler, start, conditions)
            else:
                out = step(start, conditions, indices=[num_steps - 1])
                latents, scores, gradient = out.latents, out.rewards[0].cpu(), out.gradient
                gradients += gradient is not None
            scores = torch.where(scores.isfinite(), scores, math.nan)
            history.append(scores)
            better = scores > _best(history[:-1], scores)
            here = better.to(noise.device).view(-1, 1, 1, 1, 1)
            best_noise = torch.where(here, start, best_noise)
            best_latents = torch.where(here, latents, best_latents)
            tick()
            if gradient is None or not bool(gradient.isfinite().all()):
                break
            # The loss is a mean over the batch; here each prompt has its own.
            slope = batch * gradient.to(wide)
            norm = epsilon.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
            slope = slope + prior * (1 - (size - 1) / norm**2) * epsilon
            norm = slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
            slope = slope * (clip / (norm + 1e-6)).clamp(max=1)
            velocity = momentum * velocity + slope
            epsilon = epsilon - lr * (slope + momentum * velocity)
    scores = _best(history, history[0])
    lost = (scores == -math.inf).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"the rewards of prompts {lost} were never finite in {len(history)} iterations; check "
            "the reward, and the generator's precision"
        )
    rewards, branches = len(step.rewards), 1 if guidance is None else 2
    steps = batch * branches * num_steps
    again = batch * branches * (num_steps - 1)  # forwards that the backward runs once more
    return NoiseResult(
        noise=best_noise,
        latents=best_latents,
        scores=scores,
        history=torch.stack(history),
        forwards=Forwards(
            generator=len(history) * steps + gradients * again,
            reward=len(history) * batch * rewards,
            generator_backward=gradients * steps,
            reward_backward=gradients * batch * rewards,
        ),
    )


def guide(
    transformer: nn.Module | Velocity,
    reward: nn.Module | Reward | Mapping[str, Reward],
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    weight: float,
    window: tuple[Bound, Bound] = (1, None),
    reward_weights: Mapping[str, float] | None = None,
    guidance: Guidance | None = None,
    settings: RolloutSettings | None = None,
    progress: bool = False,
) -> GuidedResult:
    """Sample with the velocity bent towards the reward (Flow-NRG, VideoAlign, arXiv 2501.13918).

    At every step of the window, with the gradient of a latent reward at the noisy latents::

        v ← v - weight·σ/(1-σ)·∇_x r(x, 1000σ, c)

    which samples from the flow's distribution weighted by exp(weight·r), as far as r is the reward
    of noisy latents. Nothing goes through the generator backwards. The gradient is each prompt's
    own.

    Args:
        transformer: a supported model, a ``ModelCall`` of one, or a function ``(x, timestep [B],
            conditions) -> velocity``.
        reward: ``(x, timestep [B], conditions) -> [B]``, differentiable, higher is better; or
            several by name, chosen among at sampling time by ``reward_weights``.
        noise: ε, ``[B, C, F, H, W]``.
        conditions: tensors of batch B.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied.
        num_steps: solver steps of the schedule.
        weight: strength of the guidance; the paper names none.
        window: the guided steps, as in :class:`prfl_fast.GradientPlan`. Not the first, where σ is 1
            and the factor infinite.
        reward_weights: factors of several rewards by name; 1 unless given.
        guidance: classifier-free guidance.
        settings: how the generator is run, by default with caches.
        progress: show a tqdm bar.

    Returns:
        See :class:`GuidedResult`.

    Raises:
        TypeError: an unsupported model, reward or scheduler.
        ValueError: noise or conditions of the wrong shape or not finite; numbers out of range; a
            reward with trainable parameters, of the wrong shape, without a graph to its input, or
            not finite.
    """
    check_positive("weight", weight)
    plan = GradientPlan.flow_nrg(window)
    steps = len(plan.steps(num_steps))
    with _bar("guided sampling", "guided step", steps if progress else None) as tick:
        out = PRFL(
            transformer,
            _ticking(reward, tick) if progress else reward,
            scheduler,
            plan,
            num_steps=num_steps,
            target=None,
            weight=weight,
            reward_weights=reward_weights,
            guidance=guidance,
            rollout=settings,
        )(noise, conditions)
    history = dict(zip(out.indices, out.rewards.cpu().unbind(), strict=True))
    for index, scores in history.items():
        lost = (~scores.isfinite()).nonzero().flatten().tolist()
        if lost:
            raise ValueError(
                f"the rewards of prompts {lost} at step {index} are not finite; lower weight, or "
                "check the reward at this noise level and the generator's precision"
            )
    scored = len(noise) * len(history) * len(out.by_reward)
    return GuidedResult(
        latents=out.latents,
        history=history,
        forwards=Forwards(
            generator=len(noise) * num_steps * (1 if guidance is None else 2),
            reward=scored,
            reward_backward=scored,
        ),
    )


def _sampled(
    step: PRFL, scheduler: Any, noise: torch.Tensor, conditions: Conditions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples without gradient, and their rewards ``[B]`` on the CPU."""

    def reward(x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        scores = [
            step.reward_weights[name] * function(x, timestep, conditions)
            for name, function in step.rewards.items()
        ]
        return torch.stack(scores).sum(0)

    last = step.num_steps - 1
    with torch.no_grad():
        one = Candidates(
            step.transformer,
            reward,
            noise,
            conditions,
            scheduler,
            step.num_steps,
            step.guidance,
            RolloutSettings(compile="off"),  # not for one trajectory, nor to round otherwise
            None,
        )
        one.begin(noise, 1, None)
        (batch,) = one.run(last)
        return batch.x, one.score([batch])


def _best(history: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The largest reward of each prompt; NaN is none."""
    best = torch.full_like(like, -math.inf)
    for scores in history:
        best = torch.where(scores > best, scores, best)
    return best


class _Ticking:
    """A reward that says each time that it was asked."""

    def __init__(self, reward: Reward, tick: Callable[[], object]) -> None:
        self.members, self._tick = (reward,), tick

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        self._tick()
        return self.members[0](x, timestep, conditions)


def _ticking(reward: Any, tick: Callable[[], object]) -> Any:
    """The reward, or the first of several, with a tick; anything else is left for later checks."""
    if isinstance(reward, Mapping):
        first = next(iter(reward), None)
        return {name: _ticking(r, tick) if name == first else r for name, r in reward.items()}
    return _Ticking(reward, tick) if callable(reward) else reward


@contextlib.contextmanager
def _bar(name: str, unit: str, total: int | None) -> Iterator[Callable[[], object]]:
    """Show a bar, none for None; gives what moves it on by one."""
    if total is None:
        yield lambda: None
        return
    with need("tqdm").tqdm(total=total, desc=name, unit=unit) as bar:
        yield bar.update
