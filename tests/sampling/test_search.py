"""Pruning and beam search against the same searches as plain loops, in float64."""

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
    beamed,
    best,
    drawn,
    guided,
    judged,
    level,
    pruned,
    seeded,
)
from textbook import Euler, UniPC
from toy_flow import CONDITIONS, NEGATIVE, NOISE, SIZE, reward, velocity

from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.sampling.candidates import Forwards
from prfl_fast.sampling.search import beam_search


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


@pytest.mark.cases(2)
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


@pytest.mark.cases(1)
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


@pytest.mark.slow
def test_a_foreign_multistep_scheduler_is_selected_along_with_its_candidates():
    options = {"keep": {1: 3, 2: 2}}
    own, foreign = (
        Sampler(velocity, scheduler, STEPS)
        for scheduler in (FlowUniPC(schedule="diffusers"), diffusers_unipc())
    )
    ours, theirs = (pruned(sampler, candidates=5, **options) for sampler in (own, foreign))
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


def textbook_beams(solver, beams, candidates, eta, lookahead, branching, generator, scale=None):
    others = drawn(generator, 2, beams - 1, *SIZE)
    alive = [
        [(0.0, i, x[None], solver(STEPS)) for i, x in enumerate([NOISE[b], *others[b]])]
        for b in range(2)
    ]
    texts = CONDITIONS["text"][0:1], CONDITIONS["text"][1:2]
    history = {}
    for m in range(STEPS):
        sigmas, times = alive[0][0][3].sigmas, alive[0][0][3].timesteps
        s, t = sigmas[m], sigmas[m + 1]
        z = None
        if m in branching and eta > 0:
            z = drawn(generator, 2, beams, candidates, *SIZE)
        compared = []
        for b in range(2):
            pool = []
            for k, (_, i, x, own) in enumerate(alive[b]):
                v = guided(x, level(times[m]), texts[b], scale)
                if m not in branching:
                    pool.append((0.0, i, own.step(m, v, x), own))
                    continue
                x0, noise = x - s * v, x + (1 - s) * v
                fresh = eta * t / s * math.sqrt(s**2 - ((1 - s) / (1 - t)) ** 2 * t**2)
                for j in range(candidates):
                    child = (1 - t) * x0 + math.sqrt(t**2 - fresh**2) * noise
                    if z is not None:
                        child = child + fresh * z[b, k, j]
                    end, now = child, t
                    # Levels and timesteps are float32, as a sampler's are.
                    levels = [
                        torch.tensor(t * (lookahead - n) / max(lookahead, 1)).item()
                        for n in range(lookahead + 1)
                    ]
                    for here, there in zip(levels, levels[1:], strict=False):
                        time = (torch.tensor(here) * 1000).double()[None]
                        end = end + (there - here) * guided(end, time, texts[b], scale)
                        now = there
                    score = judged(end, times[m + 1] if lookahead == 0 else 1000 * now, texts[b])
                    pool.append((score, i, child, solver(STEPS)))
            compared.append([score for score, *_ in pool])
            alive[b] = best(pool, beams) if m in branching else pool
        if m in branching:
            history[m] = torch.tensor(compared, dtype=torch.float64)
    ended, compared = [], []
    for b in range(2):
        scored = [(judged(x, 0.0, texts[b]), i, x) for _, i, x, _ in alive[b]]
        ended.append(best(scored, 1)[0])
        compared.append([score for score, *_ in scored])
    history[STEPS - 1] = torch.tensor(compared, dtype=torch.float64)
    return ended, history


@pytest.mark.cases(2)
@pytest.mark.parametrize("batch", [None, 1, 5])
@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_beam_search_equals_the_textbook(lookahead, eta, batch):
    expected, history = textbook_beams(Euler, 3, 2, eta, lookahead, range(STEPS - 1), seeded())
    model, judge = Counted(velocity), Counted(reward)
    sampler, options = Sampler(model, FlowEuler(), STEPS), {"eta": eta, "lookahead": lookahead}
    found = beamed(sampler, judge, beams=3, candidates=2, batch=batch, **options)
    assert_same(found, expected, history)
    branches = STEPS - 1
    assert found.forwards == Forwards(
        2 * 3 * (STEPS + branches * 2 * lookahead), 2 * 3 * (branches * 2 + 1)
    )
    assert found.forwards == Forwards(model.samples, judge.samples)
    assert model.largest <= (12 if batch is None else batch)
    assert list(found.history) == list(range(STEPS))
    assert found.history[0].shape == (2, 6) and found.history[STEPS - 1].shape == (2, 3)


def test_beam_search_with_guidance_branches_where_told_and_steps_with_the_solver_elsewhere():
    # UniPC's own steps between the branches, beginning anew at first order after each of them.
    expected, history = textbook_beams(UniPC, 2, 3, 0.7, 2, (2,), seeded(), scale=2.5)
    sampler = Sampler(velocity, FlowUniPC(), STEPS, guidance=Guidance(2.5, NEGATIVE))
    found = beamed(sampler, beams=2, candidates=3, eta=0.7, lookahead=2, branch_at=[2])
    assert_same(found, expected, history)
    assert found.forwards == Forwards(2 * 2 * 2 * (STEPS + 3 * 2), 2 * 2 * (3 + 1))
    assert list(found.history) == [2, STEPS - 1]


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_fresh_noise_a_beam_is_eulers_trajectory(dtype):
    noise, conditions = NOISE.to(dtype), {"text": CONDITIONS["text"].to(dtype)}

    def model(x, timestep, conditions):
        return velocity(x.double(), timestep, {"text": conditions["text"].double()}).to(dtype)

    def judge(x, timestep, conditions):
        return x.float().mean((1, 2, 3, 4))

    given = (Sampler(model, FlowEuler(), STEPS), judge, noise, conditions)
    found = beam_search(*given, beams=1, candidates=1, eta=0.0)
    assert torch.equal(found.latents, rollout(model, noise, conditions, FlowEuler(), STEPS))
    assert found.latents.dtype == dtype
    several = beamed(*given, beams=4, candidates=1, eta=0.0)
    of_n = pruned(*given, candidates=4, keep={})
    assert torch.equal(several.latents, of_n.latents)
    assert several.chosen.tolist() == of_n.chosen.tolist()


@pytest.mark.slow
def test_a_stochastic_step_keeps_the_level_of_noise():
    """Against the flow of a Gaussian: data N(0, 4), whose velocity and marginals are known."""

    def exact(x, timestep, conditions):
        s = timestep.view(-1, 1, 1, 1, 1) / 1000
        data = 4 * (1 - s) * x / (4 * (1 - s) ** 2 + s**2)
        noise = s * x / (4 * (1 - s) ** 2 + s**2)
        return noise - data

    noise = torch.randn(1, 1, 1, 160, 160, generator=seeded(3))
    given = Sampler(exact, FlowEuler(shift=1.0), 100), lambda x, t, c: x.mean((1, 2, 3, 4))
    for eta in (0.0, 0.5, 1.0):
        found = beamed(*given, noise, {}, beams=1, candidates=1, eta=eta, lookahead=0)
        assert found.latents.std().item() == pytest.approx(2.0, rel=0.03)


def test_the_same_generator_gives_the_same_search_and_the_global_one_is_left_alone():
    def search(seed):
        return beam_search(EULER, reward, NOISE, CONDITIONS, generator=seeded(seed))

    state = torch.get_rng_state()
    one, same, other = search(1), search(1), search(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.latents, same.latents) and torch.equal(one.scores, same.scores)
    assert not torch.equal(one.latents, other.latents)
