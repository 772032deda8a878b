"""Noise optimization and reward guidance against plain loops written here, in float64."""

import math

import pytest
import textbook
import torch
from prfl_world import diffusers_euler
from search_loops import SOLVERS, Counted, guided, level
from torch import nn
from toy_flow import CONDITIONS, NEGATIVE, NOISE, reward, velocity
from wan import inputs, tiny_wan

from prfl_fast import sampling
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.sampling import search
from prfl_fast.sampling.candidates import Forwards
from prfl_fast.sampling.gradient import guide, optimize_noise

STEPS = 4
EULER = Sampler(velocity, FlowEuler(), STEPS)


def smooth(x, timestep, conditions):
    return -(x[:, :, 1:] - x[:, :, :-1]).square().mean((1, 2, 3, 4)) * (1 + timestep / 500)


BOTH = {"taste": reward, "calm": smooth}


def optimized(sampler=EULER, judge=reward, noise=NOISE, **options):
    return optimize_noise(sampler, judge, noise, CONDITIONS, **options)


def steered(sampler=EULER, judge=reward, *, weight=0.1, **options):
    return guide(sampler, judge, NOISE, CONDITIONS, weight=weight, **options)


def assert_history(found, expected):
    """Compare with the textbook's scores, best noises and latents."""
    history = torch.tensor([scores for scores, *_ in expected], dtype=torch.float64).T
    torch.testing.assert_close(found.history, history)
    torch.testing.assert_close(found.noise, torch.cat([noise for _, _, noise, _ in expected]))
    torch.testing.assert_close(found.latents, torch.cat([x for *_, x in expected]))


def functions_of(b, scale, weights):
    """Return velocity and score of prompt b, for the textbook."""
    text = CONDITIONS["text"][b : b + 1]

    def score(x, t):
        given = x, level(t), {"text": text}
        return weights[0] * reward(*given) + weights[1] * smooth(*given)

    return lambda x, t: guided(x, level(t), text, scale), score


def textbook_reno(
    hand,
    iterations,
    learning_rate,
    momentum,
    max_grad_norm,
    prior,
    *,
    scale=None,
    weights=(1.0, 0.0),
):
    """Prompt by prompt, with the whole graph and torch's own optimizer."""
    results = []
    for b in range(2):
        velocity_of_b, score_of = functions_of(b, scale, weights)
        noise = NOISE[b : b + 1].clone().requires_grad_()
        optimizer = torch.optim.SGD(
            [noise], lr=learning_rate, momentum=momentum, nesterov=momentum > 0
        )
        scores, best = [], (-math.inf, None, None)
        for _ in range(iterations):
            world = textbook.World(velocity_of_b, None)
            x = textbook.advance(world, hand(STEPS), noise, 0, STEPS)
            score = score_of(x, 0.0)
            scores.append(score.item())
            if score.item() > best[0]:
                best = (score.item(), noise.detach().clone(), x.detach())
            norm = noise.norm()
            density = 0.5 * norm**2 - (noise.numel() - 1) * norm.log()
            optimizer.zero_grad()
            (-score.sum() + prior * density).backward()
            nn.utils.clip_grad_norm_(noise, max_grad_norm)
            optimizer.step()
        results.append((scores, *best))
    return results


@pytest.mark.cases(1)
@SOLVERS
@pytest.mark.parametrize(
    ("momentum", "clip", "prior"), [(0.9, 0.1, 0.01), (0.0, 100.0, 0.01), (0.5, 0.03, 0.0)]
)
def test_optimize_noise_equals_the_textbook(ours, hand, momentum, clip, prior):
    model, judge = Counted(velocity, graph=True), Counted(reward, graph=True)
    options = {"learning_rate": 2.0, "momentum": momentum, "max_grad_norm": clip, "prior": prior}
    found = optimized(Sampler(model, ours, STEPS), judge, iterations=6, **options)
    assert_history(found, textbook_reno(hand, 6, **options))
    torch.testing.assert_close(found.scores, found.history.amax(0))
    assert (found.scores > found.history[0]).all()  # it does climb
    # 6 samples; 5 backwards, each with the forwards of all steps but the last once more.
    assert found.forwards == Forwards(2 * (6 * STEPS + 5 * (STEPS - 1)), 12, 2 * 5 * STEPS, 10)
    assert found.forwards[:2] == (model.samples, judge.samples)
    assert not found.latents.requires_grad and not found.noise.requires_grad


@pytest.mark.cases(1)
@pytest.mark.parametrize("batched", [True, False])
def test_optimize_noise_with_several_rewards_and_guidance_equals_the_textbook(batched):
    model, guidance = Counted(velocity, graph=True), Guidance(2.0, NEGATIVE, batched=batched)
    sampler = Sampler(model, FlowUniPC(), STEPS, guidance=guidance)
    options = {"learning_rate": 1.0, "max_grad_norm": 0.2, "prior": 0.02}
    weights = {"taste": 0.5, "calm": 3.0}
    found = optimized(sampler, BOTH, iterations=4, reward_weights=weights, **options)
    expected = textbook_reno(
        textbook.UniPC, 4, momentum=0.9, scale=2.0, weights=(0.5, 3.0), **options
    )
    assert_history(found, expected)
    assert found.forwards == Forwards(
        4 * (4 * STEPS + 3 * (STEPS - 1)), 2 * 2 * 4, 4 * 3 * STEPS, 2 * 2 * 3
    )
    assert found.forwards.generator == model.samples


def test_one_iteration_is_plain_sampling_and_nothing_is_drawn():
    state = torch.get_rng_state()
    found = optimized(iterations=1)
    assert torch.equal(found.noise, NOISE) and found.noise is not NOISE
    assert torch.equal(found.latents, rollout(velocity, NOISE, CONDITIONS, FlowEuler(), STEPS))
    assert found.forwards == Forwards(2 * STEPS, 2)
    optimized(iterations=2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_prior_pulls_the_norm_to_that_of_gaussian_noise_and_equal_rewards_change_nothing():
    seen = []

    def watched(x, timestep, conditions):
        if timestep[0] > 900:
            seen.append(x.detach().flatten(1).norm(dim=1))
        return velocity(x, timestep, conditions)

    def nothing(x, timestep, conditions):
        return 0.0 * x.sum((1, 2, 3, 4))

    for factor in (0.2, 3.0):
        options = {"iterations": 150, "prior": 0.1, "learning_rate": 1.0}
        found = optimized(Sampler(watched, FlowEuler(), 1), nothing, factor * NOISE, **options)
        expected = torch.full((2,), math.sqrt(23), dtype=torch.float64)
        torch.testing.assert_close(seen[-1], expected, rtol=1e-2, atol=0)
        assert torch.equal(found.noise, factor * NOISE)


def test_best_noise_is_kept_not_the_last():
    # Steps so large that the reward goes up and down.
    found = optimized(iterations=12, learning_rate=200.0)
    best = found.history.argmax(0)
    assert (best < 11).any()
    assert torch.equal(found.scores, found.history.amax(0))
    again = rollout(velocity, found.noise, CONDITIONS, FlowEuler(), STEPS)
    torch.testing.assert_close(found.latents, again)
    torch.testing.assert_close(found.scores, reward(again, torch.zeros(2), CONDITIONS))


def test_optimization_ends_at_a_reward_that_is_not_finite():
    calls = []

    def breaks(x, timestep, conditions):
        calls.append(1)
        score = reward(x, timestep, conditions)
        return score * torch.tensor([1.0, math.nan]) if len(calls) == 3 else score

    found = optimized(EULER, breaks, iterations=9)
    assert found.history.shape == (3, 2)
    assert found.history.isnan().tolist() == [[False] * 2] * 2 + [[False, True]]
    assert found.scores[1] == found.history[:2, 1].max()
    assert found.scores[0] == found.history[:, 0].max()
    assert found.forwards.generator_backward == 2 * 2 * STEPS

    def never(x, timestep, conditions):
        return reward(x, timestep, conditions) * torch.tensor([1.0, math.inf])

    for iterations in (1, 3):
        with pytest.raises(ValueError, match=r"prompts \[1\] were never finite"):
            optimized(EULER, never, iterations=iterations)


def test_gradients_that_are_not_finite_end_it_too():
    def steep(x, timestep, conditions):  # finite where its slope is not
        return (x - x.detach()).abs().sqrt().sum((1, 2, 3, 4)) + reward(x, timestep, conditions)

    found = optimized(EULER, steep, iterations=4)
    assert found.history.shape == (1, 2) and torch.equal(found.noise, NOISE)


@pytest.mark.slow
def test_a_wan_models_parameters_are_left_alone():
    model, (noise, _, conditions) = tiny_wan(), inputs(size=(2, 4, 4))
    model.patch_embedding.requires_grad_(False)
    judge = LatentRewardModel.from_backbone(model, num_blocks=1).freeze()
    trained = [p.requires_grad for p in model.parameters()]
    sampler, narrow = Sampler(model, FlowUniPC(), 2), noise.bfloat16()
    found = optimize_noise(sampler, judge, narrow.float(), conditions, iterations=3)
    assert found.history.shape == (3, 2)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert all(p.grad is None for part in (model, judge) for p in part.parameters())
    found = optimize_noise(sampler, judge, narrow, conditions, iterations=2)
    assert found.noise.dtype == found.latents.dtype == torch.bfloat16
    assert found.scores.dtype == torch.float32
    samplers = (Sampler(model, FlowUniPC(), 3, None, c) for c in (None, RolloutConfig(cache=False)))
    sample, plain = (guide(s, judge, noise, conditions, weight=1.0) for s in samplers)
    assert sample.latents.shape == noise.shape and not sample.latents.requires_grad
    assert torch.equal(sample.latents, plain.latents)
    assert all(p.grad is None for part in (model, judge) for p in part.parameters())


def textbook_guide(hand, weight, steps, *, scale=None, weights=(1.0, 0.0)):
    latents, history = [], []
    for b in range(2):
        functions = functions_of(b, scale, weights)
        x, scores = textbook.flow_nrg(*functions, hand(STEPS), NOISE[b : b + 1], steps, weight)
        latents.append(x)
        history.append(torch.cat(scores))
    return torch.cat(latents), torch.stack(history, 1)


@pytest.mark.cases(2)
@SOLVERS
@pytest.mark.parametrize(
    ("window", "steps"), [((1, None), (1, 2, 3)), ((2, -1), (2,)), ((0.5, 1.0), (2, 3))]
)
def test_guide_equals_the_textbook(ours, hand, window, steps):
    model, judge = Counted(velocity, graph=True), Counted(reward, graph=True)
    latents, history = textbook_guide(hand, 0.3, steps)
    found = steered(Sampler(model, ours, STEPS), judge, weight=0.3, window=window)
    torch.testing.assert_close(found.latents, latents)
    assert tuple(found.history) == steps
    torch.testing.assert_close(torch.stack(list(found.history.values())), history)
    assert found.forwards == Forwards(2 * STEPS, 2 * len(steps), 0, 2 * len(steps))
    assert found.forwards[:2] == (model.samples, judge.samples)


def test_guide_by_several_rewards_and_guidance_equals_the_textbook():
    latents, history = textbook_guide(textbook.UniPC, 0.2, (1, 2, 3), scale=3.0, weights=(2.0, 0.7))
    sampler = Sampler(velocity, FlowUniPC(), STEPS, guidance=Guidance(3.0, NEGATIVE))
    found = steered(sampler, BOTH, weight=0.2, reward_weights={"taste": 2.0, "calm": 0.7})
    torch.testing.assert_close(found.latents, latents)
    torch.testing.assert_close(torch.stack(list(found.history.values())), history)
    assert found.forwards == Forwards(2 * 2 * STEPS, 2 * 2 * 3, 0, 2 * 2 * 3)


@pytest.mark.slow
def test_guidance_raises_the_reward_and_takes_a_diffusers_scheduler():
    plain = rollout(velocity, NOISE, CONDITIONS, FlowEuler(), STEPS)
    found = steered(weight=1.0)
    other = steered(Sampler(velocity, diffusers_euler(), STEPS), weight=1.0)
    # diffusers' steps are rounded to float32.
    torch.testing.assert_close(other.latents, found.latents, rtol=1e-5, atol=1e-6)
    clean = torch.zeros(2, dtype=torch.float64)
    before, after = reward(plain, clean, CONDITIONS), reward(found.latents, clean, CONDITIONS)
    assert (after > before).all()


def test_guide_stops_at_a_reward_that_is_not_finite():
    def breaks(x, timestep, conditions):
        score = reward(x, timestep, conditions)
        return torch.where(timestep < 900, score * torch.tensor([math.nan, 1.0]), score)

    with pytest.raises(ValueError, match=r"prompts \[0\] at step \d are not finite"):
        steered(EULER, breaks)


def test_progress(capsys):
    optimized(iterations=3, progress=True)
    bar = capsys.readouterr().err
    assert "optimizing noise" in bar and "3/3" in bar
    steered(EULER, BOTH, progress=True)
    bar = capsys.readouterr().err
    assert "guided sampling" in bar and "3/3" in bar
    steered()
    assert capsys.readouterr().err == ""


def test_a_trainable_reward_is_refused_under_a_bar_too():
    class Judge(nn.Linear):
        def forward(self, x, timestep, conditions):
            return reward(x, timestep, conditions)

    for progress in (True, False):
        with pytest.raises(ValueError, match="trainable parameters"):
            steered(EULER, Judge(1, 1), progress=progress)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations is 0, expected a positive integer"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0, expected a positive number"),
        ({"max_grad_norm": math.inf}, "max_grad_norm is inf, expected a positive number"),
        ({"momentum": 1.0}, r"momentum is 1.0, expected a number in \[0, 1\)"),
        ({"prior": -0.1}, "prior is -0.1, expected a number of at least 0"),
        ({"noise": NOISE[0]}, "noise is"),
        ({"noise": NOISE * math.nan}, "noise has 48 NaN"),
        ({"conditions": {"text": CONDITIONS["text"][:1]}}, "conditions"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"reward_weights": {"other": 1.0}}, "reward_weights is"),
        ({"reward": lambda x, t, c: x.detach().mean((1, 2, 3, 4))}, "carry no graph"),
    ],
)
def test_bad_input_to_optimize_noise(change, message):
    arguments = {"noise": NOISE, "conditions": CONDITIONS, "reward": reward, **change}
    with pytest.raises(ValueError, match=message):
        steps = arguments.pop("num_inference_steps", STEPS)
        optimize_noise(Sampler(velocity, FlowEuler(), steps), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0.0}, "weight is 0.0, expected a positive number"),
        ({"weight": math.nan}, "weight is nan"),
        ({"window": (3, 2)}, "num_inference_steps is 4, expected enough"),
        ({"noise": NOISE * math.inf}, "noise has"),
        ({"conditions": []}, "conditions is list"),
        ({"reward": lambda x, t, c: x.mean()}, r"the reward's result is .* \[2\]"),
    ],
)
def test_bad_input_to_guide(change, message):
    arguments = {"noise": NOISE, "conditions": CONDITIONS, "reward": reward, "weight": 0.1}
    with pytest.raises(ValueError, match=message):
        guide(EULER, **{**arguments, **change})


def test_wrong_types():
    for call in (optimized, steered):
        for progress in (True, False):
            with pytest.raises(TypeError, match="reward is int"):
                call(EULER, 3, progress=progress)
        with pytest.raises(TypeError, match="Linear"):
            call(Sampler(nn.Linear(2, 2), FlowEuler(), STEPS))


def test_one_door_to_all_ways_of_sampling():
    assert sampling.prune is search.prune and sampling.beam_search is search.beam_search
    assert all(hasattr(sampling, name) for name in sampling.__all__)


def test_the_noise_of_a_given_first_frame_has_no_part():
    """Another noise there changes nothing, and stays; a beam's reward sees the frame itself."""
    conditions, found = CONDITIONS | {"first_frame": NOISE[:, :, :1] + 1}, []
    other = torch.cat([3 * NOISE[:, :, :1], NOISE[:, :, 1:]], dim=2)
    for noise in (NOISE, other):
        options = {"iterations": 3, "prior": 0.1, "learning_rate": 1.0}
        result = optimize_noise(EULER, reward, noise, conditions, **options)
        assert torch.equal(result.noise[:, :, :1], noise[:, :, :1])
        found.append(result.latents)
    assert torch.equal(*found)

    def judge(x, timestep, conditions):
        assert torch.equal(x[:, :, :1], conditions["first_frame"])
        return reward(x, timestep, conditions)

    search.beam_search(EULER, judge, NOISE, conditions, beams=2, lookahead=0)
