"""Pruning and beam search against the same searches written here as plain loops, in float64."""

import math

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from textbook import Euler, UniPC
from torch import nn
from toy_flow import CONDITIONS, NEGATIVE, NOISE, SIZE, reward, velocity
from wan import inputs, tiny_wan

from prfl_fast.candidates import Forwards
from prfl_fast.model_call import Guidance
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rollout_engine import RolloutPrecision, RolloutSettings
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.search import beam_search, prune
from prfl_fast.trajectory import rollout

STEPS = 6


class Counted:
    """Samples and calls that go through a function, the largest call, and the timesteps."""

    def __init__(self, function):
        self.function, self.samples, self.largest, self.timesteps = function, 0, 0, []

    def __call__(self, x, timestep, conditions):
        assert timestep.shape == x.shape[:1] and conditions["text"].shape[0] == len(x)
        assert not torch.is_grad_enabled()
        self.samples += len(x)
        self.largest = max(self.largest, len(x))
        self.timesteps += [round(t, 2) for t in timestep.tolist()]
        return self.function(x, timestep, conditions)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def drawn(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def guided(x, timestep, text, scale):
    v = velocity(x, timestep, {"text": text})
    if scale is None:
        return v
    negative = velocity(x, timestep, {"text": NEGATIVE["text"]})
    return negative + scale * (v - negative)


def judged(x, timestep, text):
    return reward(x, torch.tensor([timestep], dtype=torch.float64), {"text": text}).item()


def level(timestep):
    return torch.tensor([timestep], dtype=torch.float64)


def best(pool, count):
    """The ``count`` best (score, …) of a pool, in the pool's order; the earlier of equals."""
    ranked = sorted(range(len(pool)), key=lambda i: -pool[i][0])
    return [pool[i] for i in sorted(ranked[:count])]


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


def assert_same(found, expected, history):
    assert found.chosen.tolist() == [i for _, i, *_ in expected]
    torch.testing.assert_close(found.latents, torch.cat([x for _, _, x, *_ in expected]))
    torch.testing.assert_close(
        found.scores, torch.tensor([score for score, *_ in expected], dtype=torch.float64)
    )
    assert list(found.history) == list(history)
    for step, scores in history.items():
        torch.testing.assert_close(
            found.history[step], scores, equal_nan=True, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("batch", [None, 1, 4, 5])
@pytest.mark.parametrize(
    ("ours", "hand"), [(FlowEuler(), Euler), (FlowUniPC(), UniPC)], ids=["euler", "unipc"]
)
def test_prune_equals_the_textbook(ours, hand, batch):
    keep = {1: 4, 3: 0.5}
    expected, history = textbook_prune(hand, 7, {1: 4, 3: 2}, seeded())
    assert any(i for _, i, *_ in expected)  # not merely the caller's noise
    model, judge = Counted(velocity), Counted(reward)
    found = prune(
        model,
        judge,
        NOISE,
        CONDITIONS,
        ours,
        STEPS,
        candidates=7,
        keep=keep,
        batch=batch,
        generator=seeded(),
    )
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
    found = prune(
        model,
        judge,
        NOISE,
        CONDITIONS,
        FlowUniPC(),
        STEPS,
        candidates=5,
        keep={2: 2},
        reward_at="clean",
        guidance=Guidance(3.0, NEGATIVE, batched=batched),
        batch=3,
        generator=seeded(),
    )
    assert_same(found, expected, history)
    assert found.forwards == Forwards(2 * 2 * (5 * 3 + 2 * 3), 2 * 7)
    assert found.forwards == Forwards(model.samples, judge.samples)
    assert set(judge.timesteps) == {0.0}


def test_pruning_is_by_prompt_and_history_says_why():
    found = prune(
        velocity,
        reward,
        NOISE,
        CONDITIONS,
        FlowEuler(),
        STEPS,
        candidates=4,
        keep={0: 3, 2: 1},
        generator=seeded(),
    )
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
    found = prune(
        velocity,
        reward,
        NOISE,
        CONDITIONS,
        FlowUniPC(),
        STEPS,
        candidates=3,
        keep={},
        generator=seeded(),
    )
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
    def foreign():
        return UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )

    def found(scheduler, batch):
        return prune(
            velocity,
            reward,
            NOISE,
            CONDITIONS,
            scheduler,
            STEPS,
            candidates=5,
            keep={1: 3, 2: 2},
            batch=batch,
            generator=seeded(),
        )

    ours, theirs, cut = found(FlowUniPC(), None), found(foreign(), None), found(foreign(), 2)
    assert ours.chosen.tolist() == theirs.chosen.tolist() == cut.chosen.tolist()
    torch.testing.assert_close(theirs.latents, ours.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cut.latents, theirs.latents)


def test_a_scheduler_that_remembers_something_else_is_refused():
    class Odd(FlowEuler):
        def step(self, v, t, x, return_dict=False):
            self.energies = {"all": [x.flatten(1) ** 2]}
            return super().step(v, t, x)

    with pytest.raises(ValueError, match=r"scheduler's energies .* cannot be told apart"):
        prune(velocity, reward, NOISE, CONDITIONS, Odd(), STEPS, candidates=2, keep={1: 1})


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


@pytest.mark.parametrize("batch", [None, 1, 5])
@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_beam_search_equals_the_textbook(lookahead, eta, batch):
    expected, history = textbook_beams(Euler, 3, 2, eta, lookahead, range(STEPS - 1), seeded())
    model, judge = Counted(velocity), Counted(reward)
    found = beam_search(
        model,
        judge,
        NOISE,
        CONDITIONS,
        FlowEuler(),
        STEPS,
        beams=3,
        candidates=2,
        eta=eta,
        lookahead=lookahead,
        batch=batch,
        generator=seeded(),
    )
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
    found = beam_search(
        velocity,
        reward,
        NOISE,
        CONDITIONS,
        FlowUniPC(),
        STEPS,
        beams=2,
        candidates=3,
        eta=0.7,
        lookahead=2,
        branch_at=[2],
        guidance=Guidance(2.5, NEGATIVE),
        generator=seeded(),
    )
    assert_same(found, expected, history)
    assert found.forwards == Forwards(2 * 2 * 2 * (STEPS + 3 * 2), 2 * 2 * (3 + 1))
    assert list(found.history) == [2, STEPS - 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_fresh_noise_a_beam_is_eulers_trajectory(dtype):
    noise, conditions = NOISE.to(dtype), {"text": CONDITIONS["text"].to(dtype)}

    def model(x, timestep, conditions):
        return velocity(x.double(), timestep, {"text": conditions["text"].double()}).to(dtype)

    def judge(x, timestep, conditions):
        return x.float().mean((1, 2, 3, 4))

    found = beam_search(
        model, judge, noise, conditions, FlowEuler(), STEPS, beams=1, candidates=1, eta=0.0
    )
    assert torch.equal(found.latents, rollout(model, noise, conditions, FlowEuler(), STEPS))
    assert found.latents.dtype == dtype
    several = beam_search(
        model,
        judge,
        noise,
        conditions,
        FlowEuler(),
        STEPS,
        beams=4,
        candidates=1,
        eta=0.0,
        generator=seeded(),
    )
    of_n = prune(
        model,
        judge,
        noise,
        conditions,
        FlowEuler(),
        STEPS,
        candidates=4,
        keep={},
        generator=seeded(),
    )
    assert torch.equal(several.latents, of_n.latents)
    assert several.chosen.tolist() == of_n.chosen.tolist()


def test_a_stochastic_step_keeps_the_level_of_noise():
    """Against the flow of a Gaussian: data N(0, 4), whose velocity and marginals are known."""

    def exact(x, timestep, conditions):
        s = timestep.view(-1, 1, 1, 1, 1) / 1000
        data = 4 * (1 - s) * x / (4 * (1 - s) ** 2 + s**2)
        noise = s * x / (4 * (1 - s) ** 2 + s**2)
        return noise - data

    noise = torch.randn(1, 1, 1, 160, 160, generator=seeded(3))
    for eta in (0.0, 0.5, 1.0):
        found = beam_search(
            exact,
            lambda x, t, c: x.mean((1, 2, 3, 4)),
            noise,
            {},
            FlowEuler(shift=1.0),
            100,
            beams=1,
            candidates=1,
            eta=eta,
            lookahead=0,
            generator=seeded(),
        )
        assert found.latents.std().item() == pytest.approx(2.0, rel=0.03)


def test_the_same_generator_gives_the_same_search_and_the_global_one_is_left_alone():
    def search(seed):
        return beam_search(
            velocity,
            reward,
            NOISE,
            CONDITIONS,
            FlowEuler(),
            STEPS,
            generator=seeded(seed),
        )

    state = torch.get_rng_state()
    one, same, other = search(1), search(1), search(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.latents, same.latents) and torch.equal(one.scores, same.scores)
    assert not torch.equal(one.latents, other.latents)


def spoiled(bad, value=math.nan):
    """The reward, with ``bad(x)`` [B] saying whose score is lost."""

    def judge(x, timestep, conditions):
        score = reward(x, timestep, conditions)
        return torch.where(bad(x), torch.full_like(score, value), score)

    return judge


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_never_win(value):
    arguments = (NOISE, CONDITIONS, FlowEuler(), STEPS)
    plain = prune(velocity, reward, *arguments, candidates=4, keep={}, generator=seeded())
    winner = plain.latents
    judge = spoiled(lambda x: (x[:, None] == winner[None]).flatten(2).all(2).any(1), value=value)
    found = prune(velocity, judge, *arguments, candidates=4, keep={}, generator=seeded())
    second = plain.history[STEPS - 1].topk(2).values[:, 1]
    torch.testing.assert_close(found.scores, second)
    assert found.history[STEPS - 1].isnan().sum() == 2


def test_prompts_go_on_with_fewer_candidates_if_fewer_scores_are_finite():
    arguments = (NOISE, CONDITIONS, FlowUniPC(), STEPS)
    plain = prune(velocity, reward, *arguments, candidates=4, keep={1: 3}, generator=seeded())
    ranked = plain.history[1].sort(1, descending=True).values
    limits = torch.stack([ranked[0, 0], ranked[1, 1]])  # one of the first prompt, two of the other
    left = (plain.history[1] >= limits[:, None]).sum(1)
    assert left.tolist() == [1, 2]

    def judge(x, timestep, conditions):
        score = reward(x, timestep, conditions)
        first = conditions["text"][:, 0] == CONDITIONS["text"][0, 0]
        limit = torch.where(first, *limits)
        return torch.where((timestep > 0) & (score < limit), math.nan, score)

    found = prune(velocity, judge, *arguments, candidates=4, keep={1: 3}, generator=seeded())
    assert found.history[1].isfinite().sum(1).tolist() == left.tolist()
    assert found.history[STEPS - 1].isfinite().sum(1).tolist() == left.tolist()
    assert found.forwards == Forwards(8 * 2 + 3 * 4, 8 + 3)
    kept = found.history[STEPS - 1].isfinite()
    torch.testing.assert_close(found.history[STEPS - 1][kept], plain.history[STEPS - 1][kept])


def test_latents_that_are_not_finite_are_dropped():
    def breaks(x, timestep, conditions):
        v = velocity(x, timestep, conditions)
        lost = (x[:, 0, 0, 0, 0] > 0.8).view(-1, 1, 1, 1, 1)
        return torch.where(lost, math.nan, v)

    def strict(x, timestep, conditions):
        assert x.isfinite().all()
        return reward(x, timestep, conditions)

    arguments = (NOISE, CONDITIONS, FlowEuler(), STEPS)
    lost = torch.cat([NOISE[:, None], drawn(seeded(), 2, 5, *SIZE)], 1)[:, :, 0, 0, 0, 0] > 0.8
    assert lost.any() and not lost.all(1).any()
    pruned = prune(breaks, strict, *arguments, candidates=6, keep={0: 6}, generator=seeded())
    assert torch.equal(pruned.history[0].isnan(), lost)
    assert pruned.latents.isfinite().all()
    found = beam_search(
        breaks, strict, *arguments, beams=6, candidates=2, lookahead=2, generator=seeded()
    )
    assert found.latents.isfinite().all()
    with pytest.raises(
        ValueError, match="no candidate of prompt 0 has a finite score after step 0"
    ):
        beam_search(lambda x, t, c: x * math.nan, strict, *arguments, lookahead=1)


def test_prompts_without_any_finite_score_are_an_error():
    judge = spoiled(lambda x: (x[:, None] != x[:, None]).flatten(1).any(1))

    def second_lost(x, timestep, conditions):
        lost = conditions["text"][:, 0] == CONDITIONS["text"][1, 0]
        return torch.where(lost, math.nan, judge(x, timestep, conditions))

    arguments = (NOISE, CONDITIONS, FlowEuler(), STEPS)
    with pytest.raises(
        ValueError, match="no candidate of prompt 1 has a finite score after step 2"
    ):
        prune(velocity, second_lost, *arguments, candidates=3, keep={2: 1})
    with pytest.raises(
        ValueError, match="no candidate of prompt 1 has a finite score after step 5"
    ):
        prune(velocity, second_lost, *arguments, candidates=3, keep={})
    with pytest.raises(
        ValueError, match="no candidate of prompt 1 has a finite score after step 0"
    ):
        beam_search(velocity, second_lost, *arguments)


def test_a_wan_model_a_latent_reward_and_the_rollouts_caches():
    model, (noise, _, conditions) = tiny_wan(), inputs(size=(2, 4, 4))
    judge = LatentRewardModel.from_backbone(model, num_blocks=1).freeze()

    def found(cache):
        return prune(
            model,
            judge,
            noise,
            conditions,
            FlowUniPC(),
            4,
            candidates=3,
            keep={1: 2},
            settings=RolloutSettings(cache=cache),
            batch=2,
            generator=seeded(),
        )

    with_caches, without = found(True), found(False)
    assert torch.equal(with_caches.latents, without.latents)
    assert with_caches.scores.dtype == torch.float32
    assert torch.equal(
        with_caches.scores, judge(with_caches.latents, torch.zeros(2), conditions).detach()
    )
    beams = beam_search(
        model, judge, noise, conditions, FlowUniPC(), 3, beams=2, lookahead=2, generator=seeded()
    )
    assert beams.latents.shape == noise.shape and not beams.latents.requires_grad


def test_progress_counts_forwards(capsys):
    arguments = (velocity, reward, NOISE, CONDITIONS, FlowEuler(), STEPS)
    prune(*arguments, candidates=4, keep={1: 2}, progress=True)
    bar = capsys.readouterr().err
    assert "pruning" in bar and "32/32" in bar
    guidance = Guidance(2.0, NEGATIVE)
    beam_search(*arguments, beams=2, candidates=1, progress=True, guidance=guidance)
    bar = capsys.readouterr().err
    assert "beam search" in bar and "88/88" in bar
    beam_search(*arguments)
    assert capsys.readouterr().err == ""


PRUNE = {"candidates": 4, "keep": {1: 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 0}, "candidates is 0, expected a positive integer"),
        ({"candidates": True}, "candidates is True"),
        ({"num_steps": 2.0}, "num_steps is 2.0"),
        ({"keep": [1]}, r"keep is \[1\]"),
        ({"keep": {5: 1}}, r"keep has steps \[5\], expected steps in 0 … 4"),
        ({"keep": {-1: 1}}, r"keep has steps \[-1\]"),
        ({"keep": {1: 0}}, r"keep\[1\] is 0, expected a share in \(0, 1\), or one of 1 … 4"),
        ({"keep": {1: 5}}, r"keep\[1\] is 5"),
        ({"keep": {1: 1.0}}, r"keep\[1\] is 1.0"),
        ({"keep": {1: 2, 3: 3}}, r"keep\[3\] is 3, expected .* 1 … 2"),
        ({"reward_at": "current"}, "reward_at is 'current'"),
        ({"batch": 0}, "batch is 0"),
        ({"noise": NOISE[0]}, "noise is"),
        ({"noise": NOISE * math.nan}, "noise has 48 NaN"),
        ({"conditions": {"text": CONDITIONS["text"][:1]}}, "conditions"),
        ({"guidance": Guidance(2.0, {"other": NEGATIVE["text"]})}, "guidance negative has 'other'"),
        ({"settings": RolloutSettings(precision=RolloutPrecision(stride=2))}, "settings has a pre"),
        ({"reward": lambda x, t, c: x.mean()}, r"the reward returned .* \[8\]"),
    ],
)
def test_bad_input_to_prune(change, message):
    calls = []

    def model(x, timestep, conditions):
        calls.append(1)
        return velocity(x, timestep, conditions)

    arguments = {"transformer": model, "reward": reward, "noise": NOISE, "conditions": CONDITIONS}
    arguments |= {"scheduler": FlowEuler(), "num_steps": STEPS, **PRUNE, **change}
    with pytest.raises(ValueError, match=message):
        prune(**arguments)
    assert not calls or "reward" in change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"candidates": 1.5}, "candidates is 1.5"),
        ({"lookahead": -1}, "lookahead is -1, expected a whole number of at least 0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": math.nan}, "eta is nan"),
        ({"eta": 0.0}, "candidates is 2 with eta 0, expected 1"),
        ({"branch_at": [5]}, r"branch_at is \[5\], expected increasing steps in 0 … 4"),
        ({"branch_at": [2, 1]}, "branch_at"),
        ({"branch_at": [2, 2]}, "branch_at"),
        ({"conditions": []}, "conditions is list"),
    ],
)
def test_bad_input_to_beam_search(change, message):
    arguments = {"noise": NOISE, "conditions": CONDITIONS, "num_steps": STEPS, **change}
    with pytest.raises(ValueError, match=message):
        beam_search(velocity, reward, scheduler=FlowEuler(), **arguments)


def test_wrong_types():
    arguments = (NOISE, CONDITIONS, FlowEuler(), STEPS)
    with pytest.raises(TypeError, match="reward is int"):
        prune(velocity, 3, *arguments, **PRUNE)
    with pytest.raises(TypeError, match="unsupported|Linear"):
        prune(nn.Linear(2, 2), reward, *arguments, **PRUNE)
    with pytest.raises(TypeError, match="scheduler is str"):
        beam_search(velocity, reward, NOISE, CONDITIONS, "euler", STEPS)
