"""Pruning against the same search written as a plain loop, in float64."""

import math

import pytest
import torch
from prfl_world import diffusers_unipc
from search_loops import (
    EULER,
    SOLVERS,
    STEPS,
    UNIPC,
    Counted,
    assert_same,
    best,
    drawn,
    guided,
    judged,
    level,
    pruned,
    seeded,
)
from textbook import UniPC
from toy_flow import CONDITIONS, NEGATIVE, NOISE, SIZE, reward, velocity

from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.sampling.candidates import Forwards


def textbook_prune(solver, candidates, keep, generator, *, clean=False, scale=None):
    """One candidate at a time, each with a solver of its own; keep: {step: number}."""
    others = drawn(generator, 2, candidates - 1, *SIZE)
    results = []
    history = {m: torch.full((2, candidates), math.nan).double() for m in [*keep, STEPS - 1]}
    for b in range(2):
        text = CONDITIONS["text"][b : b + 1]
        noises = [NOISE[b], *others[b]]
        alive = [(0.0, i, noises[i][None], solver(STEPS)) for i in range(candidates)]
        for m in range(STEPS):
            after = []
            for _, i, x, own in alive:
                v = guided(x, level(own.timesteps[m]), text, scale)
                x0 = x - own.sigmas[m] * v
                x = own.step(m, v, x)
                score = judged(x, own.timesteps[m + 1], text)
                if clean and m < STEPS - 1:
                    score = judged(x0, 0.0, text)
                after.append((score, i, x, own))
            if m in history:
                for score, i, *_ in after:
                    history[m][b, i] = score
            alive = best(after, keep.get(m, len(after))) if m < STEPS - 1 else best(after, 1)
        results.append(alive[0])
    return results, history


@pytest.mark.parametrize("batch", [None, 1, 4, 5])
@SOLVERS
def test_prune_equals_the_textbook(ours, hand, batch):
    expected, history = textbook_prune(hand, 7, {1: 4, 3: 2}, seeded())
    assert any(i for _, i, *_ in expected)  # not merely the caller's noise
    model, judge = Counted(velocity), Counted(reward)
    sampler = Sampler(model, ours, STEPS)
    found = pruned(sampler, judge, candidates=7, keep={1: 4, 3: 0.5}, batch=batch)
    assert_same(found, expected, history)
    # 2 steps of 7, 2 of 4, 2 of 2, for 2 prompts; scores of 7, 4 and 2.
    assert found.forwards == Forwards(2 * 26, 2 * 13) == Forwards(model.samples, judge.samples)
    assert model.largest == (14 if batch is None else batch)
    times = [round(t, 2) for t in hand(STEPS).timesteps]
    assert set(judge.timesteps) == {times[2], times[4], 0.0}


@pytest.mark.parametrize("batched", [True, False])
def test_prune_by_clean_estimates_and_with_guidance_equals_the_textbook(batched):
    expected, history = textbook_prune(UniPC, 5, {2: 2}, seeded(), clean=True, scale=3.0)
    model, judge = Counted(velocity), Counted(reward)
    guidance = Guidance(3.0, NEGATIVE, batched=batched)
    sampler = Sampler(model, FlowUniPC(), STEPS, guidance=guidance)
    found = pruned(sampler, judge, candidates=5, keep={2: 2}, reward_at="clean", batch=3)
    assert_same(found, expected, history)
    assert found.forwards == Forwards(2 * 2 * (5 * 3 + 2 * 3), 2 * 7)
    assert found.forwards == Forwards(model.samples, judge.samples)
    assert set(judge.timesteps) == {0.0}


def test_pruning_is_by_prompt_and_history_says_why():
    found = pruned(EULER, candidates=4, keep={0: 3, 2: 1})
    assert list(found.history) == [0, 2, STEPS - 1]
    first, second, last = found.history.values()
    assert first.shape == second.shape == last.shape == (2, 4)
    assert first.isfinite().all()
    # At each round the worst are gone, in every prompt its own.
    assert (second.isnan().sum(1) == 1).all() and (last.isnan().sum(1) == 3).all()
    assert (second.isnan().int().argmax(1) == first.argmin(1)).all()
    assert (last.nan_to_num(-9).argmax(1) == second.nan_to_num(-9).argmax(1)).all()
    assert (found.chosen == second.nan_to_num(-9).argmax(1)).all()
    assert (found.scores == last.nan_to_num(-9).amax(1)).all()


def test_prune_without_pruning_is_best_of_n():
    found = pruned(UNIPC, candidates=3, keep={})
    noises = torch.cat([NOISE[:, None], drawn(seeded(), 2, 2, *SIZE)], 1)
    finished = [
        rollout(velocity, noises[:, i].contiguous(), CONDITIONS, FlowUniPC(), STEPS)
        for i in range(3)
    ]
    scores = torch.stack([reward(x, torch.zeros(2), CONDITIONS) for x in finished], 1)
    torch.testing.assert_close(found.history[STEPS - 1], scores)
    assert found.chosen.tolist() == scores.argmax(1).tolist()
    assert (found.scores >= scores[:, 0]).all()  # never worse than the caller's noise
    for b, i in enumerate(found.chosen.tolist()):
        torch.testing.assert_close(found.latents[b], finished[i][b])


def test_a_foreign_multistep_scheduler_is_selected_along_with_its_candidates():
    foreign, options = Sampler(velocity, diffusers_unipc(), STEPS), {"keep": {1: 3, 2: 2}}
    ours, theirs = (pruned(sampler, candidates=5, **options) for sampler in (UNIPC, foreign))
    cut = pruned(foreign, candidates=5, batch=2, **options)
    assert ours.chosen.tolist() == theirs.chosen.tolist() == cut.chosen.tolist()
    torch.testing.assert_close(theirs.latents, ours.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut.latents, theirs.latents)


def test_a_scheduler_that_remembers_something_else_is_refused():
    class Odd(FlowEuler):
        def step(self, v, t, x, return_dict=False):
            self.energies = {"all": [x.flatten(1) ** 2]}
            return super().step(v, t, x)

    with pytest.raises(ValueError, match=r"scheduler's energies .* of each candidate"):
        pruned(Sampler(velocity, Odd(), STEPS), candidates=2, keep={1: 1})
