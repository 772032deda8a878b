"""Plans with several rewards, guidance, divergence and random draws, in float64."""

import copy
from fractions import Fraction

import pytest
import textbook
import torch
from plan_world import (
    DATA,
    LIMIT,
    METHODS,
    NOISE,
    REWARD,
    STEPS,
    TEXT,
    Score,
    data_of,
    gradients,
    loss_of,
    make_wan,
    normal,
    pair,
    prfl,
    run,
    score_of,
    seeded,
    trained,
    velocity_of,
    with_lora,
    world_of,
    worst_error,
)

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.registry import patch
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowUniPC

NEGATIVE = {"encoder_hidden_states": normal(4, (2, 3, 12))}


@pytest.mark.parametrize(
    "method,target",
    [("prfl-3", 0.97), ("prfl-3", None), ("draft-3", 0.6), ("draft-3", None), ("rg-lcd", 0.6)],
)
def test_several_rewards_with_weights(method, target):
    """Each has its own hinge: at this target some samples are past it for one reward only."""
    plan, estimator = METHODS[method]
    theirs, ours = pair()
    rewards = {"motion": REWARD, "text": Score(7), "sharp": Score(8)}
    weights = {"motion": 1.0, "text": 0.25, "sharp": -0.5}
    step = prfl(ours, plan, reward=rewards, target=target, weight=0.3, reward_weights=weights)
    points = plan.draw(STEPS, seeded())
    output, found = run(step, ours, NOISE, TEXT, generator=seeded(), **data_of(plan))
    scores = {name: score_of(reward) for name, reward in rewards.items()}
    world = textbook.World(velocity_of(theirs), textbook.hinge(scores, weights, target, 0.3))
    loss = sum(p.weight * estimator(world, textbook.UniPC(STEPS), p) for p in points)
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-9, atol=0)
    assert list(output.by_reward) == list(rewards)
    assert all(r.shape == (len(points), 2) for r in output.by_reward.values())
    total = sum(weights[name] * r for name, r in output.by_reward.items())
    torch.testing.assert_close(output.rewards, total)
    if target is not None:
        past = torch.stack([r >= target for r in output.by_reward.values()])
        assert past.any() and not past.all()


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("method", ["prfl-3", "refl", "draft-3", "instructvideo-3"])
def test_guidance_passes_the_gradient_through_both_branches(method, batched):
    plan, estimator = METHODS[method]
    theirs, ours = pair()
    step = prfl(ours, plan, guidance=Guidance(2.5, NEGATIVE, batched=batched))
    points = plan.draw(STEPS, seeded())
    output, found = run(step, ours, NOISE, TEXT, generator=seeded(), **data_of(plan))
    velocity = textbook.guided(velocity_of(theirs), velocity_of(theirs, NEGATIVE), 2.5)
    world = textbook.World(velocity, loss_of())
    loss = sum(p.weight * estimator(world, textbook.UniPC(STEPS), p) for p in points)
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_of_noise_optimization(batched):
    theirs, ours = pair()
    guidance = Guidance(2.5, NEGATIVE, batched=batched)
    step = prfl(ours, GradientPlan.reno(), guidance=guidance)
    velocity = textbook.guided(velocity_of(theirs), velocity_of(theirs, NEGATIVE), 2.5)
    noise = NOISE.clone().requires_grad_()
    loss = textbook.reno(textbook.World(velocity, loss_of()), textbook.UniPC(STEPS), noise)
    (expected,) = torch.autograd.grad(loss, noise)
    assert worst_error([step(NOISE, TEXT).gradient], [expected]) <= LIMIT


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("plan", [GradientPlan.prfl(), GradientPlan.prfl(3), GradientPlan.draft(3)])
def test_divergence_from_the_initial_model(plan, patched):
    """The initial model is another object here: the one before the adapters came."""
    base = make_wan().requires_grad_(False)
    theirs = with_lora(make_wan())
    ours = copy.deepcopy(theirs)
    if patched:
        patch(ours)
    step = prfl(ours, plan, divergence=0.7)
    points = plan.draw(STEPS, seeded())
    output, found = run(step, ours, NOISE, TEXT, generator=seeded())
    world, penalty, loss = world_of(theirs), 0.0, 0.0
    for p in points:
        solver = textbook.UniPC(STEPS)
        x = textbook.sample(world, solver, NOISE, 0, p.first)
        distances = []
        for i in range(p.first, p.step + 1):
            t = solver.timesteps[i]
            distances.append(textbook.divergence(world, velocity_of(base), x, t))
            x = solver.step(i, world.velocity(x, t), x)
        penalty = penalty + p.weight * sum(distances) / len(distances)
        loss = loss + p.weight * world.loss(x, solver.timesteps[p.step + 1])
    assert worst_error(found, gradients(loss + 0.7 * penalty, theirs)) <= LIMIT
    penalty, loss = penalty.detach(), loss.detach()
    torch.testing.assert_close(output.divergence.double(), penalty, rtol=1e-9, atol=0)
    torch.testing.assert_close(output.loss.double(), loss + 0.7 * penalty, rtol=1e-9, atol=0)


def mean_of(gradients_of_each):
    return [sum(column) / len(column) for column in zip(*gradients_of_each, strict=True)]


TARGETS = {
    # What the expectation over a plan's draws must be: the mean of its paper's losses over these.
    "prfl": (GradientPlan.prfl, lambda w, s: [textbook.prfl(w, s(5), NOISE, m) for m in range(4)]),
    "refl": (
        lambda: GradientPlan.refl(0.6),
        lambda w, s: [textbook.refl(w, s(5), NOISE, m) for m in (2, 3, 4)],
    ),
    "alignprop": (
        GradientPlan.alignprop,
        lambda w, s: [textbook.alignprop(w, s(5), NOISE, k) for k in (1, 2, 3, 4, 5)],
    ),
    "rg-lcd": (
        GradientPlan.rg_lcd,
        lambda w, s: [textbook.one_step(w, s(5), DATA, NOISE, m) for m in range(5)],
    ),
    "prfl-2": (
        lambda: GradientPlan.prfl(2),
        lambda w, s: [textbook.prfl(w, s(5), NOISE, m) for m in range(4)],
    ),
    "prfl-3": (
        lambda: GradientPlan.prfl(3),
        lambda w, s: [textbook.prfl(w, s(5), NOISE, m) for m in range(4)],
    ),
    "prfl-2-independent": (
        lambda: GradientPlan.prfl(2, "independent"),
        lambda w, s: [textbook.prfl(w, s(5), NOISE, m) for m in range(4)],
    ),
    "refl-2": (
        lambda: GradientPlan(points=2, window=(0.4, None), reward_at="clean"),
        lambda w, s: [textbook.refl(w, s(5), NOISE, m) for m in (2, 3, 4)],
    ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_expectation_over_all_draws_is_the_plans_target(name):
    make_plan, targets = TARGETS[name]
    plan, theirs = make_plan(), make_wan()
    ours = patch(copy.deepcopy(theirs))
    step = PRFL(ours, REWARD, FlowUniPC(), plan, num_inference_steps=5)
    outcomes = plan.outcomes(5)
    assert sum(probability for probability, _ in outcomes) == Fraction(1) and len(outcomes) > 1
    expectation = [torch.zeros_like(p) for p in trained(ours)]
    for probability, points in outcomes:
        assert abs(sum(p.weight for p in points) - 1) < 1e-12
        _, found = run(step, ours, NOISE, TEXT, indices=points, **data_of(plan))
        for total, gradient in zip(expectation, found, strict=True):
            total += float(probability) * gradient
    losses = targets(world_of(theirs), textbook.UniPC)
    expected = mean_of([gradients(loss, theirs) for loss in losses])
    assert worst_error(expectation, expected) <= LIMIT


@pytest.mark.parametrize("name", TARGETS)
def test_draws_have_the_probabilities_of_the_outcomes(name):
    plan, draws = TARGETS[name][0](), 4000
    outcomes = {points: float(probability) for probability, points in plan.outcomes(5)}
    generator = seeded(0)
    counts = dict.fromkeys(outcomes, 0)
    for _ in range(draws):
        counts[plan.draw(5, generator)] += 1
    for points, probability in outcomes.items():
        spread = (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[points] / draws - probability) < 5 * spread, points


def test_points_may_be_given_instead_of_drawn():
    """Any steps, depths and weights: a plan of one's own, written out."""
    theirs, ours = pair()
    step = prfl(ours, GradientPlan.draft(2))
    points = (Point(STEPS - 1, 4, 1.0),)
    output, found = run(step, ours, NOISE, TEXT, indices=points)
    assert output.depths == (4,)
    loss = textbook.draft(world_of(theirs), textbook.UniPC(STEPS), NOISE, 4)
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT
