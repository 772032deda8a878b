"""Gradients of every published plan against the paper's formula, in float64."""

import copy

import pytest
import textbook
import torch
from plan_world import (
    LIMIT,
    METHODS,
    NOISE,
    REWARD,
    SEEDS,
    STEPS,
    TEXT,
    data_of,
    diffusers,
    gradients,
    make_wan,
    normal,
    pair,
    prfl,
    run,
    score_of,
    seeded,
    velocity_of,
    with_lora,
    world_of,
    worst_error,
)

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.registry import patch
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC

SOLVERS = {"euler": (FlowEuler, textbook.Euler), "unipc": (FlowUniPC, textbook.UniPC)}


MODELS = {
    "full": (make_wan, copy.deepcopy),
    "full-patched": (make_wan, lambda model: patch(copy.deepcopy(model))),
    "lora": (lambda: with_lora(make_wan()), copy.deepcopy),
    "lora-patched": (lambda: with_lora(make_wan()), lambda model: patch(copy.deepcopy(model))),
}


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("start", [0, 2])
def test_the_textbooks_samplers_are_diffusers(name, start):
    if name == "euler":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)
    else:
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
    scheduler.set_timesteps(7)
    scheduler.sigmas = scheduler.sigmas.double()
    scheduler.set_begin_index(start)
    solver = SOLVERS[name][1](7)
    ours = theirs = NOISE
    for i in range(start, 7):
        t = scheduler.timesteps[i]
        assert float(t) == solver.timesteps[i]
        assert abs(float(scheduler.sigmas[i]) - solver.sigmas[i]) < 1e-7
        ours = solver.step(i, torch.sin(ours) * (1 + i), ours)
        theirs = scheduler.step(torch.sin(theirs) * (1 + i), t, theirs, return_dict=False)[0]
        # FlowMatchEuler rounds to float32 on the way.
        tolerance = 1e-5 if name == "euler" else 1e-9
        torch.testing.assert_close(ours, theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "method,name,kind",
    [
        (method, name, kind)
        for method in METHODS
        for name in SOLVERS
        for kind in MODELS
        # Every method on two of the kinds, one of each sort on all four.
        if kind in ("full", "lora-patched") or method in ("prfl-3", "draft-3", "controlnet++")
    ],
)
def test_gradient_equals_the_papers(method, name, kind):
    """Two draws of each plan, shared with the textbook through the generator's state."""
    plan, estimator = METHODS[method]
    scheduler, solver = SOLVERS[name]
    make, copied = MODELS[kind]
    theirs = make()
    ours = copied(theirs)
    step = prfl(ours, plan, scheduler())
    random = len(plan.outcomes(STEPS)) > 1
    for seed in SEEDS if random else SEEDS[:1]:
        points = plan.draw(STEPS, seeded(seed))
        output, found = run(step, ours, NOISE, TEXT, generator=seeded(seed), **data_of(plan))
        assert output.indices == tuple(p.step for p in points)
        assert output.depths == tuple(p.depth for p in points)
        world = world_of(theirs)
        loss = sum(p.weight * estimator(world, solver(STEPS), p) for p in points)
        assert worst_error(found, gradients(loss, theirs)) <= LIMIT
        torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-9, atol=0)


def test_the_draws_of_the_comparison_differ():
    """What the seeds above draw: different steps and depths, and a repeated step."""
    for plan, _ in METHODS.values():
        if len(plan.outcomes(STEPS)) > 1:
            first, second = (plan.draw(STEPS, seeded(seed)) for seed in SEEDS)
            assert first != second
    plan = METHODS["prfl-independent"][0]
    assert any(len(plan.draw(STEPS, seeded(seed))) < 4 for seed in SEEDS)


@pytest.mark.parametrize("plan,depth", [(GradientPlan.prfl(), 1), (GradientPlan.draft(3), 3)])
def test_diffusers_own_sampler(plan, depth):
    """Its history carries the gradient through the chain as well; the levels are its float32."""
    theirs, ours = pair()
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    (point,) = plan.draw(STEPS, seeded())
    _, found = run(prfl(ours, plan, scheduler), ours, NOISE, TEXT, indices=(point,))
    scheduler.set_timesteps(STEPS)
    world = world_of(theirs)

    class Solver:
        timesteps = [*scheduler.timesteps.tolist(), 0.0]

        def step(self, i, v, x):
            return scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]

    first = point.step + 1 - depth
    x = textbook.sample(world, Solver(), NOISE, 0, first)
    x = textbook.advance(world, Solver(), x, first, point.step + 1)
    loss = world.loss(x, Solver.timesteps[point.step + 1])
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT


@pytest.mark.parametrize("name", SOLVERS)
def test_draft_lv(name):
    """The re-noised latents are learned from what the model is given at the last level."""
    scheduler, solver = SOLVERS[name]
    theirs, ours = pair()
    seen = []
    hook = ours.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].detach()),
        with_kwargs=True,
    )
    step = prfl(ours, GradientPlan.draft_lv(2), scheduler())
    output, found = run(step, ours, NOISE, TEXT, generator=seeded(0))
    hook.remove()
    assert len(seen) == STEPS + 2
    sigma = solver(STEPS).sigmas[STEPS - 1]
    result = textbook.sample(world_of(theirs), solver(STEPS), NOISE, 0, STEPS)
    renoise = [(x - (1 - sigma) * result) / sigma for x in seen[STEPS:]]
    for epsilon in renoise:  # fresh standard normal noise, of the latents' size
        assert abs(epsilon.mean()) < 0.1 and abs(epsilon.std() - 1) < 0.1
    assert (renoise[0] - renoise[1]).abs().mean() > 0.5
    assert all((epsilon - NOISE).abs().mean() > 0.5 for epsilon in renoise)
    loss = textbook.draft_lv(world_of(theirs), solver(STEPS), NOISE, renoise)
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-9, atol=0)
    again, same = run(step, ours, NOISE, TEXT, generator=seeded(0))
    assert torch.equal(again.loss, output.loss)
    other, _ = run(step, ours, NOISE, TEXT, generator=seeded(1))
    assert not torch.equal(other.loss, output.loss)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("frames,segments", [(4, 4), (4, 2), (5, 3)])
def test_instruct_video_with_attenuated_frames(name, frames, segments):
    """The drawn frames are found in the sampled latents, by value."""
    scheduler, solver = SOLVERS[name]
    shape = (2, 16, frames, 4, 4)
    noise, data, rate = normal(1, shape), normal(2, shape), 0.7
    theirs, ours = pair()
    seen = []

    def reward(x, timestep, conditions):
        seen.append(x.detach())
        return REWARD(x, timestep, conditions)

    plan = GradientPlan.instruct_video(0.6, 2, segments=segments, attenuation=rate)
    step = prfl(ours, plan, scheduler(), reward)
    drawn = set()
    for seed in range(3):
        seen.clear()
        output, found = run(step, ours, noise, TEXT, latents=data, generator=seeded(seed))
        given = torch.cat([x.unflatten(0, (-1, 2)) for x in seen])  # [S, B, C, 1, H, W]
        assert given.shape == (segments, 2, 16, 1, 4, 4)
        # [S, B, F]: which frame of its sample's result each one is
        match = (given == output.latents[None]).all(2).all(-1).all(-1)
        assert (match.sum(-1) == 1).all()
        chosen = match.int().argmax(-1).T  # [B, S]
        for s in range(segments):
            # In the paper's code a segment is ⌊F/S⌋ frames; what is left over at the end is out.
            assert (chosen[:, s] // (frames // segments) == s).all()
        drawn.add(tuple(chosen.flatten().tolist()))

        def of_frame(x, timestep, b):
            conditions = {key: value[b : b + 1] for key, value in TEXT.items()}
            return score_of(REWARD, conditions)(x, timestep)

        loss = textbook.hinge(
            {"frames": textbook.attenuated(of_frame, chosen, rate)}, {"frames": 1.0}, 2.0, 0.1
        )
        world = textbook.World(velocity_of(theirs), loss)
        expected = textbook.instruct_video(world, solver(STEPS), data, noise, 2, 2)
        assert worst_error(found, gradients(expected, theirs)) <= LIMIT
        torch.testing.assert_close(output.loss.double(), expected.detach(), rtol=1e-9, atol=0)
    assert (len(drawn) > 1) == (frames // segments > 1)


@pytest.mark.parametrize("kind,name", [*zip(MODELS, [*SOLVERS] * 2, strict=True)])
def test_reno(name, kind):
    scheduler, solver = SOLVERS[name]
    make, copied = MODELS[kind]
    theirs = make()
    ours = copied(theirs)
    step = prfl(ours, GradientPlan.reno(), scheduler())
    output = step(NOISE, TEXT)
    noise = NOISE.clone().requires_grad_()
    loss = textbook.reno(world_of(theirs), solver(STEPS), noise)
    (expected,) = torch.autograd.grad(loss, noise)
    assert worst_error([output.gradient], [expected]) <= LIMIT
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-9, atol=0)
    assert all(p.grad is None for p in ours.parameters())
    assert not output.gradient.requires_grad and NOISE.grad is None


@pytest.mark.parametrize("name", SOLVERS)
def test_reno_needs_no_trainable_model(name):
    scheduler, solver = SOLVERS[name]
    theirs = make_wan()
    frozen = patch(copy.deepcopy(theirs)).requires_grad_(False)
    output = PRFL(frozen, REWARD, scheduler(), GradientPlan.reno(), num_inference_steps=4)(
        NOISE, TEXT
    )
    noise = NOISE.clone().requires_grad_()
    (expected,) = torch.autograd.grad(textbook.reno(world_of(theirs), solver(4), noise), noise)
    assert worst_error([output.gradient], [expected]) <= LIMIT


@pytest.mark.parametrize("window", [(1, None), (2, 4)])
@pytest.mark.parametrize("name", SOLVERS)
def test_flow_nrg(name, window):
    """A batch is guided sample by sample, each as if it were alone."""
    scheduler, solver = SOLVERS[name]
    theirs, ours = pair()
    weight = 100.0
    plan = GradientPlan.flow_nrg(window)
    step = prfl(ours, plan, scheduler(), target=None, weight=weight)
    output = step(NOISE, TEXT)
    steps = range(STEPS)[slice(*window)]
    expected = textbook.flow_nrg(
        velocity_of(theirs), score_of(REWARD), solver(STEPS), NOISE, steps, weight
    )
    plain = textbook.sample(world_of(theirs), solver(STEPS), NOISE, 0, STEPS)
    assert (expected - plain).abs().max() > 0.01  # the guidance counts
    torch.testing.assert_close(output.latents, expected, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in ours.parameters())
    alone = step(NOISE[:1], {key: value[:1] for key, value in TEXT.items()})
    torch.testing.assert_close(alone.latents, expected[:1], rtol=1e-10, atol=1e-10)
