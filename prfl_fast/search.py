"""Search with a reward and without gradient: noise-aware pruning and diffusion latent beam search.

Candidates are judged before they are finished, and the best go on: by a reward of noisy latents as
they are, by any other through an estimate of x0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast._checks import check_count, is_number
from prfl_fast.adapters import Conditions
from prfl_fast.candidates import Candidates, SearchResult
from prfl_fast.model_call import Guidance, Velocity
from prfl_fast.rewards import Reward
from prfl_fast.rollout_engine import RolloutSettings


@torch.no_grad()
def prune(
    transformer: nn.Module | Velocity,
    reward: nn.Module | Reward,
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    candidates: int,
    keep: Mapping[int, int | float],
    reward_at: Literal["next", "clean"] = "next",
    guidance: Guidance | None = None,
    settings: RolloutSettings | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SearchResult:
    """The best of several samples, the unpromising ones dropped on the way.

    Every prompt starts from ``candidates`` noises. After each step named in ``keep`` all that are
    left are scored, and the best of each prompt go on; what is left at the end is scored clean, and
    the best of each prompt is the result. With an empty ``keep`` this is best of N. TTSnap (arXiv
    2511.22242) prunes so, with a reward trained on one-step estimates of x0; a latent reward model
    scores the noisy latents themselves.

    Args:
        transformer: a supported model, a ``ModelCall`` of one, or a function ``(x, timestep [B],
            conditions) -> velocity``.
        reward: ``(x, timestep [B], conditions) -> [B]``, higher is better.
        noise: ε, ``[B, C, F, H, W]``: the first candidate of each of B prompts.
        conditions: tensors of batch B.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied, not
            changed. What a multistep sampler remembers goes on with its candidate.
        num_steps: solver steps of the schedule.
        candidates: noises of each prompt.
        keep: by step, how many of a prompt's candidates go on after it: an integer, or a share in
            (0, 1) of those that are left, rounded as Python rounds, at least 1. TTSnap has ``{2:
            0.4, 6: 0.4, 11: 0.5}`` for 20 steps.
        reward_at: ``next`` scores x_{m+1} at its noise level, ``clean`` the one-step estimate x̂0 =
            x_m - σ_m·v at timestep 0. Both cost the same.
        guidance: classifier-free guidance of the generator.
        settings: how the generator is run, by default with caches; not with a precision.
        batch: samples that go through the generator or the reward at once; all if ``None``.
        generator: draws the other noises, ``[B, candidates - 1, C, F, H, W]`` at once; on any
            device.
        progress: show a tqdm bar.

    Returns:
        See :class:`SearchResult`; ``history`` is indexed by the number of the noise.

    Raises:
        TypeError: an unsupported model, reward or scheduler.
        ValueError: noise or conditions of the wrong shape or not finite; numbers out of range; a
            reward of the wrong shape, or without a finite score for any candidate of a prompt; a
            scheduler whose memory cannot be told apart by candidate.
    """
    check_count("candidates", candidates)
    if reward_at not in ("next", "clean"):
        raise ValueError(f"reward_at is {reward_at!r}, expected 'next' or 'clean'")
    left = _survivors(keep, candidates, num_steps)
    search = Candidates(
        transformer, reward, noise, conditions, scheduler, num_steps, guidance, settings, batch
    )
    search.begin(noise, candidates, generator)
    stops = [*(step + 1 for step in left), num_steps]
    running = [candidates, *left.values()]
    total = sum(
        count * (stop - start)
        for count, start, stop in zip(running, [0, *stops[:-1]], stops, strict=True)
    )
    with search.bar("pruning", total if progress else None):
        for step, count in left.items():
            scores = search.score(search.run(step, clean=reward_at == "clean"))
            chosen = search.choose(scores, search.prompts, count, step)
            search.record(step, scores, search.prompts, search.origins, candidates)
            search.keep(chosen)
        return search.finish(search.origins, candidates)


@torch.no_grad()
def beam_search(
    transformer: nn.Module | Velocity,
    reward: nn.Module | Reward,
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    beams: int = 4,
    candidates: int = 2,
    eta: float = 1.0,
    lookahead: int = 1,
    branch_at: Sequence[int] | None = None,
    guidance: Guidance | None = None,
    settings: RolloutSettings | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SearchResult:
    """Beam search over stochastic steps, each candidate judged by where it would lead.

    Diffusion latent beam search (arXiv 2501.19252), here for flow models. Every prompt keeps
    ``beams`` latents. At a branching step each takes ``candidates`` stochastic steps from one
    velocity; each result is run to x0 by ``lookahead`` Euler steps over evenly spaced levels, and
    that estimate is rewarded; the best ``beams`` of a prompt go on, whichever beam they came from.

    A stochastic step from σ to σ' goes through the predicted x̂0 = x - σ·v and noise n̂ = x +
    (1-σ)·v, with a part of the noise replaced by fresh z ~ N(0, I)::

        x' = (1-σ')·x̂0 + sqrt(σ'² - s²)·n̂ + s·z,   s² = eta²·(σ'/σ)²·(σ² - ((1-σ)/(1-σ'))²·σ'²)

    For every eta the marginals are the flow's, as DDIM's (arXiv 2010.02502) are those of diffusion;
    eta = 0 is Euler's step, and eta = 1 from pure noise is all fresh. The step is first order
    whatever the scheduler, which gives the levels: what a multistep sampler remembers belongs to a
    path without the fresh noise, and is dropped. Steps that do not branch are the scheduler's own.

    Args:
        transformer, reward, conditions, num_steps: as in :func:`prune`.
        guidance, settings, batch, progress: likewise.
        noise: ε, ``[B, C, F, H, W]``: the first beam of each of B prompts.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied.
        beams: latents that are kept of each prompt; the paper has 4.
        candidates: stochastic steps from each; the paper has 2.
        eta: 0 … 1, how much of the noise is replaced; the paper has 1.
        lookahead: Euler steps from a candidate to the x0 that is rewarded, each a forward; the
            paper has 6, and 1 for the plain search. 0 scores the noisy candidates themselves at
            their level, for a latent reward model.
        branch_at: the branching steps; all but the last if ``None``. The last leads to x0, where no
            noise is left to replace.
        generator: draws the other beams' noises, ``[B, beams - 1, C, F, H, W]`` at once, and at
            each branching step all z at once, by prompt, beam and candidate.

    Returns:
        See :class:`SearchResult`; ``history`` is indexed by ``beam·candidates + candidate`` at a
        branching step, and by beam at the end.

    Raises:
        TypeError, ValueError: as :func:`prune`; several candidates with ``eta`` 0, which would be
            the same.
    """
    check_count("beams", beams)
    check_count("candidates", candidates)
    check_count("lookahead", lookahead, least=0)
    if not (is_number(eta) and 0 <= eta <= 1):
        raise ValueError(f"eta is {eta!r}, expected a number in [0, 1]")
    if eta == 0 and candidates > 1:
        raise ValueError(
            f"candidates is {candidates} with eta 0, expected 1: without fresh noise they would be "
            "the same"
        )
    branching = _branching(branch_at, num_steps)
    search = Candidates(
        transformer, reward, noise, conditions, scheduler, num_steps, guidance, settings, batch
    )
    search.begin(noise, beams, generator)
    total = beams * (num_steps + len(branching) * candidates * lookahead)
    with search.bar("beam search", total if progress else None):
        for step in branching:
            search.run(step - 1)
            x, parents = search.branch(step, candidates, eta, generator)
            prompts = [search.prompts[parent] for parent in parents]
            scores = search.score(search.look_ahead(x, prompts, step + 1, lookahead))
            chosen = search.choose(scores, prompts, beams, step)
            search.record(step, scores, prompts, _places(prompts), beams * candidates)
            search.replace(x, parents, chosen, step + 1)
        return search.finish(_places(search.prompts), beams)


def _survivors(keep: Mapping[int, int | float], candidates: int, num_steps: int) -> dict[int, int]:
    """Candidates that go on after each step, by increasing step."""
    check_count("num_steps", num_steps)
    if not isinstance(keep, Mapping):
        raise ValueError(f"keep is {keep!r}, expected {{step: number or share}}")
    steps = list(keep)
    if not _are_steps(steps, num_steps - 1):
        raise ValueError(
            f"keep has steps {steps}, expected steps in 0 … {num_steps - 2}; the last chooses the "
            "best anyway"
        )
    left, survivors = candidates, {}
    for step in sorted(steps):
        value = keep[step]
        share = isinstance(value, float) and 0 < value < 1
        whole = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= left
        if not (share or whole):
            raise ValueError(
                f"keep[{step}] is {value!r}, expected a share in (0, 1), or one of 1 … {left}: so "
                "many are left there"
            )
        left = max(1, round(left * value)) if share else int(value)
        survivors[step] = left
    return survivors


def _branching(branch_at: Sequence[int] | None, num_steps: int) -> list[int]:
    check_count("num_steps", num_steps)
    steps = list(range(num_steps - 1)) if branch_at is None else list(branch_at)
    if not _are_steps(steps, num_steps - 1) or steps != sorted(set(steps)):
        raise ValueError(
            f"branch_at is {branch_at!r}, expected increasing steps in 0 … {num_steps - 2}"
        )
    return steps


def _are_steps(steps: Sequence[object], count: int) -> bool:
    return all(
        isinstance(step, int) and not isinstance(step, bool) and 0 <= step < count for step in steps
    )


def _places(prompts: Sequence[int]) -> list[int]:
    """Number of each among those of its prompt."""
    return [prompts[:row].count(prompt) for row, prompt in enumerate(prompts)]
