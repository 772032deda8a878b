"""Sample better from an untrained generator: search, noise optimization, reward guidance.

Every way starts from the same first noise of each prompt and seeks the same latent reward.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch

import prfl_fast
from experiments import small_world
from experiments.family_training import Settings
from experiments.small_world import Start
from prfl_fast import FlowEuler
from prfl_fast.rollout import Sampler, rollout
from prfl_fast.sampling import beam_search, guide, optimize_noise, prune
from prfl_fast.sampling.candidates import Forwards

Found = tuple[torch.Tensor, Forwards]


@dataclass(frozen=True)
class User:
    """Describe a way to sample: ``call(start, s, noise, conditions, generator)`` → :data:`Found`.

    Attributes:
        group: those of one group differ in their budget only, and are one line in the plot.
        iterations: of a way that repeats one thing; ``call`` then takes them by keyword.
    """

    label: str
    group: str
    call: Callable[..., Found]
    iterations: int | None = None


def _plain(start: Start, s: Settings, noise: torch.Tensor, *rest: Any) -> Found:
    latents = rollout(start.generator, noise, rest[0], FlowEuler(), s.solver_steps)
    return latents, Forwards(len(noise) * s.solver_steps, 0)


def _sampled(search: Callable[..., Any], *task: Any, **options: Any) -> Found:
    """Run a function of ``prfl_fast.sampling``; ``task`` is what :class:`User` passes."""
    start, s, noise, conditions, generator = task
    if search in (prune, beam_search):
        options["generator"] = generator
    sampler = Sampler(start.generator, FlowEuler(), s.solver_steps)
    found = search(sampler, start.reward, noise, conditions, **options)
    return found.latents, found.forwards


def _pruned(label: str, group: str, count: int, keep: dict[int, float]) -> User:
    return User(label, group, partial(_sampled, prune, candidates=count, keep=keep))


def _beams(beams: int, candidates: int, lookahead: int) -> User:
    sizes = {"beams": beams, "candidates": candidates, "lookahead": lookahead}
    label = f"beam search {beams}×{candidates}, lookahead {lookahead}"
    return User(label, "beam search", partial(_sampled, beam_search, **sizes))


def _noise(iterations: int) -> User:
    call = partial(_sampled, optimize_noise)
    return User(f"ReNO, {iterations} iterations", "ReNO", call, iterations)


def _guided(weight: float) -> User:
    call = partial(_sampled, guide, weight=weight)
    return User(f"Flow-NRG guidance, weight {weight:g}", "guidance, by weight", call)


# Where the latent reward sees something: after these steps σ is 0.80 and 0.59; near 1 it is blind.
PRUNE_AT = {4: 0.5, 6: 0.5}
USERS = {
    "plain": User("plain", "plain", _plain),
    **{f"best{n}": _pruned(f"best of {n}", "best of N", n, {}) for n in (4, 8)},
    **{f"prune{n}": _pruned(f"pruned from {n} (TTSnap)", "pruning", n, PRUNE_AT) for n in (8, 16)},
    "beam2": _beams(2, 2, 1),
    "beam4": _beams(4, 2, 1),
    **{f"reno{iterations}": _noise(iterations) for iterations in (5, 15)},
    **{f"guide{weight}": _guided(weight) for weight in (10, 50, 500)},
}


def run_user(start: Start, s: Settings, name: str, seed: int) -> dict[str, Any]:
    """Sample the held-out prompts in one way; scores of each, and cost of a clip."""
    user = USERS[name]
    device = next(start.generator.parameters()).device
    if device.type == "cuda":
        prfl_fast.patch(start.generator)
        prfl_fast.patch(start.reward.backbone)
    noise = small_world.held_out_noise(start, 3000 + seed)[: s.users]
    conditions = {key: value[: s.users] for key, value in start.conditions.items()}

    def sample(count: int, iterations: int | None) -> Found:
        few = {key: value[:count] for key, value in conditions.items()}
        generator = torch.Generator().manual_seed(4000 + seed)
        options = {} if iterations is None else {"iterations": iterations}
        return user.call(start, s, noise[:count], few, generator, **options)

    began = time.perf_counter()
    latents, forwards = sample(len(noise), user.iterations)
    harness.synchronize(device)
    seconds = (time.perf_counter() - began) / len(noise)
    if user.iterations is None:
        flops = harness.count_flops(partial(sample, 1, None))
    else:
        # Every iteration but the last, which takes no gradient, costs the same.
        one, two = (harness.count_flops(partial(sample, 1, count)) for count in (1, 2))
        flops = one + (user.iterations - 1) * (two - one)
    shortest = None if user.iterations is None else 3
    cost = {"seconds": seconds, "flops": flops, "forwards": forwards.generator / len(noise)}
    cost["reward_forwards"] = forwards.reward / len(noise)
    cost["peak_bytes"] = harness.peak_bytes(partial(sample, 1, shortest), device)
    scores = small_world.judge(start, latents, conditions)
    return {"user": name, "seed": seed, "scores": scores, "cost": cost}
