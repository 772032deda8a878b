"""Search with a reward and without gradient: candidate pruning and diffusion latent beam search."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from prfl_fast.models.adapter import Conditions
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.rewards.functions import Reward
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.sampling.candidates import Candidates, SearchResult
from prfl_fast.utils.checks import check, check_choice, check_count, is_count, is_number, plain


@torch.no_grad()
@exact_linears()
def prune(
    sampler: Sampler,
    reward: nn.Module | Reward,
    noise: torch.Tensor,
    conditions: Conditions,
    *,
    candidates: int,
    keep: Mapping[int, int | float],
    reward_at: Literal["next", "clean"] = "next",
    batch: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SearchResult:
    """Sample several candidates, drop the worst at some steps, and return the best.

    Every prompt starts from ``candidates`` noises. After each step named in ``keep`` the remaining
    candidates are scored, and the best of each prompt continue; the result is the one whose clean
    sample scores best. With an empty ``keep`` this is best of N. TTSnap (arXiv 2511.22242) prunes
    with a reward trained on one-step estimates of x0; a latent reward model scores the noisy
    latents themselves.

    Args:
        sampler: the generator and its schedule; with an exact rollout configuration.
        reward: ``(x, timestep [B], conditions) -> [B]``, higher is better.
        noise: ε, ``[B, C, F, H, W]``: the first candidate of each of B prompts.
        conditions: tensors of batch B.
        candidates: noises of each prompt.
        keep: by step, the candidates of a prompt that continue after it: an integer, or a fraction
            in (0, 1) of the remaining ones, rounded, at least 1. TTSnap has ``{2: 0.4, 6: 0.4, 11:
            0.5}`` for 20 steps.
        reward_at: ``next`` scores x_{m+1} at its noise level, ``clean`` the one-step estimate x̂0 =
            x_m - σ_m·v at timestep 0. Both cost the same.
        batch: samples that go through the generator or the reward at once; all if None.
        generator: draws the other noises, ``[B, candidates - 1, C, F, H, W]`` at once.
        progress: show a tqdm bar.

    Returns:
        See :class:`SearchResult`; ``history`` is indexed by the number of the noise.

    Raises:
        TypeError: if the model, reward or scheduler is unsupported.
        ValueError: if noise or conditions have a wrong shape or are not finite, a number is out of
            range, the reward has a wrong shape or no finite score for a prompt, or a scheduler's
            state cannot be split by candidate.
    """
    # Pruning 8 candidates in the small world takes 54 forwards and reaches a reward of 0.887; best
    # of 8 takes 80 and reaches 0.911 (bench/RESULTS.md).
    check_count("candidates", candidates)
    check_choice("reward_at", reward_at, ("next", "clean"))
    left = survivors(keep, candidates, sampler.num_inference_steps)
    search = Candidates(sampler, reward, noise, conditions, batch)
    search.begin(noise, candidates, generator)
    stops = [*(step + 1 for step in left), sampler.num_inference_steps]
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
@exact_linears()
def beam_search(  # noqa: PLR0913 - the method's own hyperparameters
    sampler: Sampler,
    reward: nn.Module | Reward,
    noise: torch.Tensor,
    conditions: Conditions,
    *,
    beams: int = 4,
    candidates: int = 2,
    eta: float = 1.0,
    lookahead: int = 1,
    branch_at: Sequence[int] | None = None,
    batch: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SearchResult:
    """Search with beams of stochastic steps, scored by the x0 that they would lead to.

    This is diffusion latent beam search (arXiv 2501.19252) for flow models. Every prompt keeps
    ``beams`` latents. At a branching step each takes ``candidates`` stochastic steps from one
    velocity. ``lookahead`` Euler steps over evenly spaced levels estimate the x0 of each result,
    the reward scores it, and the best ``beams`` of a prompt continue.

    A stochastic step from σ to σ' goes through the predicted x̂0 = x - σ·v and noise n̂ = x +
    (1-σ)·v, with a part of the noise replaced by fresh z ~ N(0, I)::

        x' = (1-σ')·x̂0 + sqrt(σ'² - s²)·n̂ + s·z,   s² = eta²·(σ'/σ)²·(σ² - ((1-σ)/(1-σ'))²·σ'²)

    For every eta the marginals are the flow's, as in DDIM (arXiv 2010.02502); eta = 0 is Euler's
    step, and eta = 1 from pure noise replaces all noise. The step is first order and drops a
    multistep sampler's history, which lacks the fresh noise. All other steps are the scheduler's.

    Args:
        sampler, reward, conditions, batch, progress: as in :func:`prune`.
        noise: ε, ``[B, C, F, H, W]``: the first beam of each of B prompts.
        beams: latents of each prompt; the paper has 4.
        candidates: stochastic steps from each; the paper has 2.
        eta: fraction of the noise that is replaced, 0 … 1; the paper has 1.
        lookahead: Euler steps from a candidate to the rewarded x0, each a forward; the paper has 6,
            and 1 for the plain search. 0 scores the noisy candidates themselves, for a latent
            reward model.
        branch_at: the branching steps; None is all but the last, which leads to x0.
        generator: draws the other beams' noises, ``[B, beams - 1, C, F, H, W]`` at once, and at
            each branching step all z at once, by prompt, beam and candidate.

    Returns:
        See :class:`SearchResult`; ``history`` is indexed by ``beam·candidates + candidate`` at a
        branching step, and by beam at the end.

    Raises:
        TypeError, ValueError: as :func:`prune`, or if ``eta`` 0 makes several candidates equal.
    """
    # 4 beams of 2 candidates reach a reward of 0.982 in the small world, with 112 generator
    # forwards and 76 of the reward (bench/RESULTS.md).
    check_count("beams", beams)
    check_count("candidates", candidates)
    check_count("lookahead", lookahead, least=0)
    check(is_number(eta) and 0 <= eta <= 1, "eta", eta, "a number in [0, 1]")
    hint = "Without fresh noise they would be the same."
    check(eta > 0 or candidates == 1, "candidates", candidates, "1 with eta 0", hint=hint)
    branching = _branching(branch_at, sampler.num_inference_steps)
    search = Candidates(sampler, reward, noise, conditions, batch)
    search.begin(noise, beams, generator)
    total = beams * (sampler.num_inference_steps + len(branching) * candidates * lookahead)
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


def survivors(
    keep: Mapping[int, int | float], candidates: int, num_inference_steps: int
) -> dict[int, int]:
    """Return the number of candidates that continue after each step, by increasing step."""
    check(isinstance(keep, Mapping), "keep", keep, "{step: number or fraction}")
    steps = list(keep)
    expected = f"steps in 0 … {num_inference_steps - 2}"
    check(_are_steps(steps, num_inference_steps - 1), "the steps of keep", steps, expected)
    left, survivors = candidates, {}
    for step in sorted(steps):
        value = keep[step]
        fraction = isinstance(plain(value), float) and 0 < value < 1
        whole = is_count(value) and value <= left
        expected = f"a fraction in (0, 1), or one of the 1 … {left} that are left"
        check(fraction or whole, f"keep[{step}]", value, expected)
        left = max(1, round(left * value)) if fraction else int(value)
        survivors[step] = left
    return survivors


def _branching(branch_at: Sequence[int] | None, num_inference_steps: int) -> list[int]:
    steps = list(range(num_inference_steps - 1)) if branch_at is None else list(branch_at)
    ok = _are_steps(steps, num_inference_steps - 1) and steps == sorted(set(steps))
    check(ok, "branch_at", branch_at, f"increasing steps in 0 … {num_inference_steps - 2}")
    return steps


def _are_steps(steps: Sequence[object], count: int) -> bool:
    return all(is_count(step, 0) and step < count for step in steps)  # type: ignore[operator]


def _places(prompts: Sequence[int]) -> list[int]:
    """Return the position of each candidate among those of its prompt."""
    return [prompts[:row].count(prompt) for row, prompt in enumerate(prompts)]
