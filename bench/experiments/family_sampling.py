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
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.sampling.candidates import Forwards
from prfl_fast.sampling.gradient import guide, optimize_noise
from prfl_fast.sampling.search import beam_search, prune

Conditions = dict[str, torch.Tensor]
Found = tuple[torch.Tensor, Forwards]


@dataclass(frozen=True)
class User:
    """A way to sample: ``call(start, s, noise, conditions, generator)`` → latents and forwards.

    Attributes:
        group: those of one group differ in their budget only, and are one line in the plot.
        iterations: of a way that repeats one thing; ``call`` then takes them by keyword.
    """

    label: str
    group: str
    call: Callable[..., Found]
    iterations: int | None = None


def _plain(
    start: Start,
    s: Settings,
    noise: torch.Tensor,
    conditions: Conditions,
    generator: torch.Generator,
) -> Found:
    latents = rollout(start.generator, noise, conditions, FlowEuler(), s.solver_steps)
    return latents, Forwards(len(noise) * s.solver_steps, 0)


def _search(
    start: Start,
    s: Settings,
    noise: torch.Tensor,
    conditions: Conditions,
    generator: torch.Generator,
    *,
    search: Callable[..., Any],
    **options: Any,
) -> Found:
    found = search(
        Sampler(start.generator, FlowEuler(), s.solver_steps),
        start.reward,
        noise,
        conditions,
        generator=generator,
        **options,
    )
    return found.latents, found.forwards


def _best_of(count: int) -> User:
    call = partial(_search, search=prune, candidates=count, keep={})
    return User(f"best of {count}", "best of N", call)


def _pruned(count: int, keep: dict[int, float]) -> User:
    call = partial(_search, search=prune, candidates=count, keep=keep)
    return User(f"pruned from {count} (TTSnap)", "pruning", call)


def _beams(beams: int, candidates: int, lookahead: int) -> User:
    call = partial(
        _search, search=beam_search, beams=beams, candidates=candidates, lookahead=lookahead
    )
    return User(f"beam search {beams}×{candidates}, lookahead {lookahead}", "beam search", call)


def _climbed(
    start: Start,
    s: Settings,
    noise: torch.Tensor,
    conditions: Conditions,
    generator: torch.Generator,
    *,
    iterations: int,
) -> Found:
    model, reward = start.generator, start.reward
    found = optimize_noise(
        Sampler(model, FlowEuler(), s.solver_steps),
        reward,
        noise,
        conditions,
        iterations=iterations,
    )
    return found.latents, found.forwards


def _bent(
    start: Start,
    s: Settings,
    noise: torch.Tensor,
    conditions: Conditions,
    generator: torch.Generator,
    *,
    weight: float,
) -> Found:
    model, reward = start.generator, start.reward
    found = guide(
        Sampler(model, FlowEuler(), s.solver_steps), reward, noise, conditions, weight=weight
    )
    return found.latents, found.forwards


def _noise(iterations: int) -> User:
    return User(f"ReNO, {iterations} iterations", "ReNO", _climbed, iterations)


def _guided(weight: float) -> User:
    label = f"Flow-NRG guidance, weight {weight:g}"
    return User(label, "guidance, by weight", partial(_bent, weight=weight))


# Where the latent reward sees something: after these steps σ is 0.80 and 0.59; near 1 it is blind.
PRUNE_AT = {4: 0.5, 6: 0.5}
USERS = {
    "plain": User("plain", "plain", _plain),
    "best4": _best_of(4),
    "best8": _best_of(8),
    "prune8": _pruned(8, PRUNE_AT),
    "prune16": _pruned(16, PRUNE_AT),
    "beam2": _beams(2, 2, 1),
    "beam4": _beams(4, 2, 1),
    "reno5": _noise(5),
    "reno15": _noise(15),
    "guide10": _guided(10.0),
    "guide50": _guided(50.0),
    "guide500": _guided(500.0),
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
    cost = {
        "seconds": seconds,
        "forwards": forwards.generator / len(noise),
        "reward_forwards": forwards.reward / len(noise),
        "flops": flops,
        "peak_bytes": harness.peak_bytes(partial(sample, 1, shortest), device),
    }
    scores = small_world.judge(start, latents, conditions)
    return {"user": name, "seed": seed, "scores": scores, "cost": cost}
