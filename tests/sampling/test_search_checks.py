"""Searches with rewards or latents that are not finite, and with wrong arguments."""

import math
from dataclasses import replace

import pytest
import torch
from search_loops import EULER, STEPS, UNIPC, beamed, drawn, pruned, seeded
from torch import nn
from toy_flow import CONDITIONS, NEGATIVE, NOISE, SIZE, reward, velocity
from wan import inputs, tiny_wan

from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.sampling.candidates import Forwards
from prfl_fast.sampling.search import beam_search, prune

NONE_OF = "no candidate of prompt {} has a finite score after step {}"


def spoiled(bad, value=math.nan):
    """Return the reward, with ``bad(x)`` [B] saying whose score is lost."""

    def judge(x, timestep, conditions):
        score = reward(x, timestep, conditions)
        return torch.where(bad(x), torch.full_like(score, value), score)

    return judge


@pytest.mark.cases(1)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_not_finite_never_win(value):
    plain = pruned(EULER, candidates=4, keep={})
    winner = plain.latents
    judge = spoiled(lambda x: (x[:, None] == winner[None]).flatten(2).all(2).any(1), value=value)
    found = pruned(EULER, judge, candidates=4, keep={})
    second = plain.history[STEPS - 1].topk(2).values[:, 1]
    torch.testing.assert_close(found.scores, second)
    assert found.history[STEPS - 1].isnan().sum() == 2


def test_prompts_go_on_with_fewer_candidates_if_fewer_scores_are_finite():
    plain = pruned(UNIPC, candidates=4, keep={1: 3})
    ranked = plain.history[1].sort(1, descending=True).values
    limits = torch.stack([ranked[0, 0], ranked[1, 1]])  # one of the first prompt, two of the other
    left = (plain.history[1] >= limits[:, None]).sum(1)
    assert left.tolist() == [1, 2]

    def judge(x, timestep, conditions):
        score = reward(x, timestep, conditions)
        first = conditions["text"][:, 0] == CONDITIONS["text"][0, 0]
        limit = torch.where(first, *limits)
        return torch.where((timestep > 0) & (score < limit), math.nan, score)

    found = pruned(UNIPC, judge, candidates=4, keep={1: 3})
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

    lost = torch.cat([NOISE[:, None], drawn(seeded(), 2, 5, *SIZE)], 1)[:, :, 0, 0, 0, 0] > 0.8
    assert lost.any() and not lost.all(1).any()
    sampler = Sampler(breaks, FlowEuler(), STEPS)
    found = pruned(sampler, strict, candidates=6, keep={0: 6})
    assert torch.equal(found.history[0].isnan(), lost)
    assert found.latents.isfinite().all()
    assert beamed(sampler, strict, beams=6, candidates=2, lookahead=2).latents.isfinite().all()
    with pytest.raises(ValueError, match=NONE_OF.format(0, 0)):
        beamed(Sampler(lambda x, t, c: x * math.nan, FlowEuler(), STEPS), strict, lookahead=1)


def test_prompts_without_any_finite_score_are_an_error():
    judge = spoiled(lambda x: (x[:, None] != x[:, None]).flatten(1).any(1))

    def second_lost(x, timestep, conditions):
        lost = conditions["text"][:, 0] == CONDITIONS["text"][1, 0]
        return torch.where(lost, math.nan, judge(x, timestep, conditions))

    for keep, step in (({2: 1}, 2), ({}, 5)):
        with pytest.raises(ValueError, match=NONE_OF.format(1, step)):
            pruned(EULER, second_lost, candidates=3, keep=keep)
    with pytest.raises(ValueError, match=NONE_OF.format(1, 0)):
        beamed(EULER, second_lost)


@pytest.mark.slow
def test_a_wan_model_a_latent_reward_and_the_rollouts_caches():
    model, (noise, _, conditions) = tiny_wan(), inputs(size=(2, 4, 4))
    judge = LatentRewardModel.from_backbone(model, num_blocks=1).freeze()

    def found(cache):
        sampler = Sampler(model, FlowUniPC(), 4, rollout=RolloutConfig(cache=cache))
        return pruned(sampler, judge, noise, conditions, candidates=3, keep={1: 2}, batch=2)

    with_caches, without = found(True), found(False)
    assert torch.equal(with_caches.latents, without.latents)
    assert with_caches.scores.dtype == torch.float32
    scores = judge(with_caches.latents, torch.zeros(2), conditions).detach()
    torch.testing.assert_close(with_caches.scores, scores, rtol=1e-6, atol=0)  # other batches
    sampler = Sampler(model, FlowUniPC(), 3)
    beams = beamed(sampler, judge, noise, conditions, beams=2, lookahead=2)
    assert beams.latents.shape == noise.shape and not beams.latents.requires_grad


def test_progress_counts_forwards(capsys):
    arguments = (reward, NOISE, CONDITIONS)
    prune(EULER, *arguments, candidates=4, keep={1: 2}, progress=True)
    bar = capsys.readouterr().err
    assert "pruning" in bar and "32/32" in bar
    guided = replace(EULER, guidance=Guidance(2.0, NEGATIVE))
    beam_search(guided, *arguments, beams=2, candidates=1, progress=True)
    bar = capsys.readouterr().err
    assert "beam search" in bar and "88/88" in bar
    beam_search(EULER, *arguments)
    assert capsys.readouterr().err == ""


PRUNE = {"candidates": 4, "keep": {1: 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": 0}, "candidates is 0, expected a positive integer"),
        ({"candidates": True}, "candidates is True"),
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0"),
        ({"keep": [1]}, r"keep is \[1\]"),
        ({"keep": {5: 1}}, r"steps of keep is \[5\], expected steps in 0 … 4"),
        ({"keep": {-1: 1}}, r"steps of keep is \[-1\]"),
        ({"keep": {1: 0}}, r"keep\[1\] is 0, expected a fraction in \(0, 1\), or one of the 1 … 4"),
        ({"keep": {1: 5}}, r"keep\[1\] is 5"),
        ({"keep": {1: 1.0}}, r"keep\[1\] is 1.0"),
        ({"keep": {1: 2, 3: 3}}, r"keep\[3\] is 3, expected .* 1 … 2"),
        ({"reward_at": "current"}, "reward_at is 'current'"),
        ({"batch": 0}, "batch is 0"),
        ({"noise": NOISE[0]}, "noise is"),
        ({"noise": NOISE * math.nan}, "noise has 48 NaN"),
        ({"conditions": {"text": CONDITIONS["text"][:1]}}, "conditions"),
        ({"guidance": Guidance(2.0, {"other": NEGATIVE["text"]})}, r"negative is \['other'\]"),
        ({"rollout": RolloutConfig(stride=2)}, "rollout is .*expected an exact one"),
        ({"reward": lambda x, t, c: x.mean()}, r"the reward's result is .* \[8\]"),
    ],
)
def test_bad_input_to_prune(change, message):
    calls = []

    def model(x, timestep, conditions):
        calls.append(1)
        return velocity(x, timestep, conditions)

    arguments = {"transformer": model, "reward": reward, "noise": NOISE, "conditions": CONDITIONS}
    arguments |= {"scheduler": FlowEuler(), "num_inference_steps": STEPS, **PRUNE, **change}
    names = ("transformer", "scheduler", "num_inference_steps", "guidance", "rollout")
    with pytest.raises(ValueError, match=message):
        sampler = Sampler(**{name: arguments.pop(name, None) for name in names})
        prune(sampler, **arguments)
    assert not calls or "reward" in change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"candidates": 1.5}, "candidates is 1.5"),
        ({"lookahead": -1}, "lookahead is -1, expected an integer of at least 0"),
        ({"eta": 1.5}, "eta is 1.5"),
        ({"eta": math.nan}, "eta is nan"),
        ({"eta": 0.0}, "candidates is 2, expected 1 with eta 0"),
        ({"branch_at": [5]}, r"branch_at is \[5\], expected increasing steps in 0 … 4"),
        ({"branch_at": [2, 1]}, "branch_at"),
        ({"branch_at": [2, 2]}, "branch_at"),
        ({"conditions": []}, "conditions is list"),
    ],
)
def test_bad_input_to_beam_search(change, message):
    with pytest.raises(ValueError, match=message):
        beamed(EULER, **change)


def test_wrong_types():
    with pytest.raises(TypeError, match="reward is int"):
        pruned(EULER, 3, **PRUNE)
    with pytest.raises(TypeError, match="unsupported|Linear"):
        pruned(Sampler(nn.Linear(2, 2), FlowEuler(), STEPS), **PRUNE)
    with pytest.raises(TypeError, match="scheduler is str"):
        beamed(Sampler(velocity, "euler", STEPS))
