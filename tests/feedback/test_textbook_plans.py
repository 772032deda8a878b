"""Gradients of every published plan against the paper's formula, in float64."""

import copy
from functools import partial

import pytest
import textbook
import torch
from prfl_world import (
    DATA,
    NOISE,
    REWARD,
    STEPS,
    TEXT,
    DiffusersSolver,
    Score,
    diffusers_euler,
    diffusers_unipc,
    gradients,
    loss_of,
    make_wan,
    normal,
    pair,
    prfl,
    run,
    score_of,
    seeded,
    skip_older_unipc,
    trained,
    velocity_of,
    with_lora,
    world_of,
    worst_error,
)

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.models.registry import patch
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC

SEEDS = (0, 1)  # of draws; they give different steps and depths for every random plan
LIMIT = 1e-12  # of every parameter's gradient, relative; 2e-14 was seen, 1e-6 is promised
NEGATIVE = {"encoder_hidden_states": normal(4, (2, 3, 12))}
SOLVERS = {"euler": (FlowEuler, textbook.Euler), "unipc": (FlowUniPC, textbook.UniPC)}


def patched(model):
    return patch(copy.deepcopy(model))


def lora():
    return with_lora(make_wan())


MODELS = {
    "full": (make_wan, copy.deepcopy),
    "full-patched": (make_wan, patched),
    "lora": (lora, copy.deepcopy),
    "lora-patched": (lora, patched),
    "frozen": (make_wan, lambda model: patched(model).requires_grad_(False)),
}


def models(kind):
    """Return a model for the textbook, and the same for us."""
    make, copied = MODELS[kind]
    theirs = make()
    return theirs, copied(theirs)


def from_noise(estimator):
    return lambda world, solver, point: estimator(world, solver, NOISE, point.step)


def from_data(world, solver, point):
    return textbook.one_step(world, solver, DATA, NOISE, point.step)


def instruct(steps):
    plan = GradientPlan.instruct_video(0.6, steps, segments=None)
    return plan, lambda w, s, p: textbook.instruct_video(w, s, DATA, NOISE, 2, steps)


# The constructor, and its paper's loss at one drawn point: (world, solver, point) → loss.
METHODS = {
    "prfl": (GradientPlan.prfl(), from_noise(textbook.prfl)),
    "prfl-3": (GradientPlan.prfl(3), from_noise(textbook.prfl)),
    "prfl-independent": (GradientPlan.prfl(4, "independent"), from_noise(textbook.prfl)),
    "refl": (GradientPlan.refl(0.5), from_noise(textbook.refl)),
    "draft-1": (GradientPlan.draft(), lambda w, s, p: textbook.draft(w, s, NOISE, 1)),
    "draft-3": (GradientPlan.draft(3), lambda w, s, p: textbook.draft(w, s, NOISE, 3)),
    "draft": (GradientPlan.draft(None), lambda w, s, p: textbook.draft(w, s, NOISE, STEPS)),
    "alignprop": (
        GradientPlan.alignprop(2, 5),
        lambda w, s, p: textbook.alignprop(w, s, NOISE, p.depth),
    ),
    "controlnet++": (GradientPlan.controlnet_plus_plus(0.4), from_data),
    "rg-lcd": (GradientPlan.rg_lcd(), from_data),
    "instructvideo-1": instruct(1),
    "instructvideo-3": instruct(3),
}


def data_of(plan):
    return {"latents": DATA} if plan.start == "data" else {}


def assert_gradient(output, found, loss, theirs):
    """Assert that gradient and loss of a step are those of the textbook's loss."""
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-9, atol=0)


def assert_method(method, step, ours, theirs, world, solver=textbook.UniPC, seed=SEEDS[0]):
    """Compare a draw, shared with the textbook through the generator's state; return both."""
    plan, estimator = METHODS[method]
    points = plan.draw(STEPS, seeded(seed))
    output, found = run(step, ours, NOISE, TEXT, generator=seeded(seed), **data_of(plan))
    loss = sum(p.weight * estimator(world, solver(STEPS), p) for p in points)
    assert_gradient(output, found, loss, theirs)
    return output, points


@pytest.mark.parametrize("name", ["euler", "unipc"])
@pytest.mark.parametrize("start", [0, 2])
def test_the_textbooks_samplers_are_diffusers(name, start):
    if name == "unipc":
        skip_older_unipc()
    scheduler = diffusers_euler() if name == "euler" else diffusers_unipc()
    foreign, solver = DiffusersSolver(scheduler, 7, wide=True), SOLVERS[name][1](7)
    scheduler.set_begin_index(start)
    if name == "unipc":  # Wan's levels are not those of diffusers, but its steps are
        solver.sigmas = scheduler.sigmas.double().tolist()
        solver.timesteps = [*foreign.timesteps, 0.0]
    ours = theirs = NOISE
    for i in range(start, 7):
        assert foreign.timesteps[i] == solver.timesteps[i]
        assert abs(float(scheduler.sigmas[i]) - solver.sigmas[i]) < 1e-7
        ours = solver.step(i, torch.sin(ours) * (1 + i), ours)
        theirs = foreign.step(i, torch.sin(theirs) * (1 + i), theirs)
        # FlowMatchEuler rounds to float32 on the way.
        tolerance = 1e-5 if name == "euler" else 1e-9
        torch.testing.assert_close(ours, theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "method,name,kind",
    [
        (method, name, kind)
        for method in METHODS
        for name in SOLVERS
        for kind in ("full", "full-patched", "lora", "lora-patched")
        # Every method on two of the kinds, one of each sort on all four.
        if kind in ("full", "lora-patched") or method in ("prfl-3", "draft-3", "controlnet++")
    ],
)
def test_gradient_equals_the_papers(method, name, kind):
    """Two draws of each plan."""
    plan, _ = METHODS[method]
    scheduler, solver = SOLVERS[name]
    theirs, ours = models(kind)
    step, world = prfl(ours, plan, scheduler()), world_of(theirs)
    random = len(plan.outcomes(STEPS)) > 1
    for seed in SEEDS if random else SEEDS[:1]:
        output, points = assert_method(method, step, ours, theirs, world, solver, seed)
        assert output.indices == tuple(p.step for p in points)
        assert output.depths == tuple(p.depth for p in points)


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
    (point,) = plan.draw(STEPS, seeded())
    output, found = run(prfl(ours, plan, diffusers_unipc()), ours, NOISE, TEXT, indices=(point,))
    solver, world, first = DiffusersSolver(diffusers_unipc(), STEPS), world_of(theirs), point.first
    assert first == point.step + 1 - depth
    x = textbook.sample(world, solver, NOISE, 0, first)
    x = textbook.advance(world, solver, x, first, point.step + 1)
    assert_gradient(output, found, world.loss(x, solver.timesteps[point.step + 1]), theirs)


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", SOLVERS)
def test_draft_lv(name):
    """The renoised latents are learned from what the model is given at the last level."""
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
    assert_gradient(output, found, loss, theirs)
    for seed in (0, 1):
        again, _ = run(step, ours, NOISE, TEXT, generator=seeded(seed))
        assert torch.equal(again.loss, output.loss) == (seed == 0)


@pytest.mark.cases(1)
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

        scores = {"frames": textbook.attenuated(of_frame, chosen, rate)}
        loss = textbook.hinge(scores, {"frames": 1.0}, 2.0, 0.1)
        world = textbook.World(velocity_of(theirs), loss)
        expected = textbook.instruct_video(world, solver(STEPS), data, noise, 2, 2)
        assert_gradient(output, found, expected, theirs)
    assert (len(drawn) > 1) == (frames // segments > 1)


def assert_reno(output, world, solver=textbook.UniPC):
    noise = NOISE.clone().requires_grad_()
    loss = textbook.reno(world, solver(STEPS), noise)
    assert worst_error([output.gradient], torch.autograd.grad(loss, noise)) <= LIMIT
    torch.testing.assert_close(output.loss.double(), loss.detach(), rtol=1e-9, atol=0)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "kind,name",
    [
        *zip(["full", "full-patched", "lora", "lora-patched"], [*SOLVERS] * 2, strict=True),
        *(("frozen", name) for name in SOLVERS),  # no model needs to be trainable
    ],
)
def test_reno(name, kind):
    scheduler, solver = SOLVERS[name]
    theirs, ours = models(kind)
    output = prfl(ours, GradientPlan.reno(), scheduler())(NOISE, TEXT)
    assert_reno(output, world_of(theirs), solver)
    assert all(p.grad is None for p in ours.parameters())
    assert not output.gradient.requires_grad and NOISE.grad is None


@pytest.mark.cases(2)
@pytest.mark.parametrize("window", [(1, None), (2, 4)])
@pytest.mark.parametrize("name", SOLVERS)
def test_flow_nrg(name, window):
    """A batch is guided sample by sample, each as if it were alone."""
    scheduler, solver = SOLVERS[name]
    theirs, ours = pair()
    weight = 100.0
    step = prfl(ours, GradientPlan.flow_nrg(window), scheduler(), target=None, weight=weight)
    output = step(NOISE, TEXT)
    steps = range(STEPS)[slice(*window)]
    functions = velocity_of(theirs), score_of(REWARD)
    expected, _ = textbook.flow_nrg(*functions, solver(STEPS), NOISE, steps, weight)
    plain = textbook.sample(world_of(theirs), solver(STEPS), NOISE, 0, STEPS)
    assert (expected - plain).abs().max() > 0.01  # the guidance counts
    torch.testing.assert_close(output.latents, expected, rtol=1e-10, atol=1e-10)
    assert all(p.grad is None for p in ours.parameters())
    alone = step(NOISE[:1], {key: value[:1] for key, value in TEXT.items()})
    torch.testing.assert_close(alone.latents, expected[:1], rtol=1e-10, atol=1e-10)


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "method,target",
    [("prfl-3", 0.97), ("prfl-3", None), ("draft-3", 0.6), ("draft-3", None), ("rg-lcd", 0.6)],
)
def test_several_rewards_with_weights(method, target):
    """Each has its own hinge: at this target some samples are past it for one reward only."""
    theirs, ours = pair()
    rewards = {"motion": REWARD, "text": Score(7), "sharp": Score(8)}
    weights = {"motion": 1.0, "text": 0.25, "sharp": -0.5}
    options = {"target": target, "weight": 0.3, "reward_weights": weights}
    step = prfl(ours, METHODS[method][0], reward=rewards, **options)
    scores = {name: score_of(reward) for name, reward in rewards.items()}
    world = textbook.World(velocity_of(theirs), textbook.hinge(scores, weights, target, 0.3))
    output, points = assert_method(method, step, ours, theirs, world)
    assert list(output.by_reward) == list(rewards)
    assert all(r.shape == (len(points), 2) for r in output.by_reward.values())
    total = sum(weights[name] * r for name, r in output.by_reward.items())
    torch.testing.assert_close(output.rewards, total)
    if target is not None:
        past = torch.stack([r >= target for r in output.by_reward.values()])
        assert past.any() and not past.all()


def guided_world(model):
    velocity = textbook.guided(velocity_of(model), velocity_of(model, NEGATIVE), 2.5)
    return textbook.World(velocity, loss_of())


@pytest.mark.cases(1)
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("method", ["prfl-3", "refl", "draft-3", "instructvideo-3"])
def test_guidance_passes_the_gradient_through_both_branches(method, batched):
    theirs, ours = pair()
    step = prfl(ours, METHODS[method][0], guidance=Guidance(2.5, NEGATIVE, batched=batched))
    assert_method(method, step, ours, theirs, guided_world(theirs))


@pytest.mark.cases(1)
@pytest.mark.parametrize("batched", [True, False])
def test_guidance_of_noise_optimization(batched):
    theirs, ours = pair()
    step = prfl(ours, GradientPlan.reno(), guidance=Guidance(2.5, NEGATIVE, batched=batched))
    assert_reno(step(NOISE, TEXT), guided_world(theirs))


@pytest.mark.cases(1)
@pytest.mark.parametrize("copied", [copy.deepcopy, patched], ids=["unpatched", "patched"])
@pytest.mark.parametrize("plan", [GradientPlan.prfl(), GradientPlan.prfl(3), GradientPlan.draft(3)])
def test_divergence_from_the_initial_model(plan, copied):
    """The initial model is another object here: the one before the adapters came."""
    base, theirs = make_wan().requires_grad_(False), lora()
    ours = copied(theirs)
    output, found = run(prfl(ours, plan, divergence=0.7), ours, NOISE, TEXT, generator=seeded())
    world, penalty, loss = world_of(theirs), 0.0, 0.0
    for p in plan.draw(STEPS, seeded()):
        solver = textbook.UniPC(STEPS)
        x = textbook.sample(world, solver, NOISE, 0, p.first)
        distances = []
        for i in range(p.first, p.step + 1):
            t = solver.timesteps[i]
            distances.append(textbook.divergence(world, velocity_of(base), x, t))
            x = solver.step(i, world.velocity(x, t), x)
        penalty = penalty + p.weight * sum(distances) / len(distances)
        loss = loss + p.weight * world.loss(x, solver.timesteps[p.step + 1])
    assert_gradient(output, found, loss + 0.7 * penalty, theirs)
    torch.testing.assert_close(output.divergence.double(), penalty.detach(), rtol=1e-9, atol=0)


def each(estimator, *latents, over):
    """Return a paper's losses at each of some steps or depths, for a world."""
    return lambda world: [estimator(world, textbook.UniPC(5), *latents, n) for n in over]


PRFL_STEPS = each(textbook.prfl, NOISE, over=range(4))
REFL_STEPS = each(textbook.refl, NOISE, over=(2, 3, 4))
# What the expectation over a plan's draws must be: the mean of its paper's losses over these.
TARGETS = {
    "prfl": (GradientPlan.prfl(), PRFL_STEPS),
    "refl": (GradientPlan.refl(0.6), REFL_STEPS),
    "alignprop": (GradientPlan.alignprop(), each(textbook.alignprop, NOISE, over=range(1, 6))),
    "rg-lcd": (GradientPlan.rg_lcd(), each(textbook.one_step, DATA, NOISE, over=range(5))),
    "prfl-2": (GradientPlan.prfl(2), PRFL_STEPS),
    "prfl-3": (GradientPlan.prfl(3), PRFL_STEPS),
    "prfl-4": (GradientPlan.prfl(4), PRFL_STEPS),  # every step, for certain
    "prfl-2-independent": (GradientPlan.prfl(2, "independent"), PRFL_STEPS),
    "refl-2": (GradientPlan(points=2, window=(0.4, None), reward_at="clean"), REFL_STEPS),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", TARGETS)
def test_the_expectation_over_all_draws_is_the_plans_target(name):
    plan, targets = TARGETS[name]
    theirs, ours = pair()
    step = prfl(ours, plan, steps=5)
    outcomes = plan.outcomes(5)
    assert sum(p for p, _ in outcomes) == 1 and (len(outcomes) > 1) == (name != "prfl-4")
    expectation = [torch.zeros_like(p) for p in trained(ours)]
    for probability, points in outcomes:
        assert abs(sum(p.weight for p in points) - 1) < 1e-12
        _, found = run(step, ours, NOISE, TEXT, indices=points, **data_of(plan))
        for total, gradient in zip(expectation, found, strict=True):
            total += float(probability) * gradient
    losses = [gradients(loss, theirs) for loss in targets(world_of(theirs))]
    expected = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
    assert worst_error(expectation, expected) <= LIMIT


def test_points_may_be_given_instead_of_drawn():
    """Any steps, depths and weights: a plan of one's own, written out."""
    theirs, ours = pair()
    points = (Point(STEPS - 1, 4, 1.0),)
    output, found = run(prfl(ours, GradientPlan.draft(2)), ours, NOISE, TEXT, indices=points)
    assert output.depths == (4,)
    loss = textbook.draft(world_of(theirs), textbook.UniPC(STEPS), NOISE, 4)
    assert_gradient(output, found, loss, theirs)


FIRST = normal(6, (2, 16, 1, 4, 4))


def velocity_per_token(model, x, timestep):
    """Return diffusers' velocity at time 0 of the first frame's four tokens."""
    times = torch.full((len(x), x.shape[2] * 4), float(timestep), dtype=x.dtype)
    times[:, :4] = 0
    return model(x, times, TEXT["encoder_hidden_states"], return_dict=False)[0]


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_given_first_frame(method, name):
    """The model and the reward see the first frame, the model at time 0; it gets no gradient."""
    theirs, ours = pair()
    conditions = {**TEXT, "first_frame": FIRST}

    def given(function, x, timestep):
        return function(torch.cat([FIRST, x[:, :, 1:]], dim=2), timestep)

    velocity = partial(velocity_per_token, theirs)
    world = textbook.World(partial(given, velocity), partial(given, loss_of()))
    plan, estimator = METHODS[method]
    scheduler, solver = SOLVERS[name]
    points = plan.draw(STEPS, seeded())
    step = prfl(ours, plan, scheduler())
    output, found = run(step, ours, NOISE, conditions, generator=seeded(), **data_of(plan))
    loss = sum(p.weight * estimator(world, solver(STEPS), p) for p in points)
    assert_gradient(output, found, loss, theirs)
    assert torch.equal(output.latents[:, :, :1], FIRST)


def test_a_given_first_frame_to_the_noise_and_in_divergence():
    theirs, ours = lora(), patch(lora())
    conditions = {**TEXT, "first_frame": FIRST}
    step = prfl(patch(make_wan()), GradientPlan.reno(), FlowEuler())
    gradient = step(NOISE, conditions).gradient
    assert not gradient[:, :, 0].any() and gradient[:, :, 1:].all()
    output, _ = run(prfl(ours, divergence=1.0), ours, NOISE, conditions, indices=(0,))
    x = torch.cat([FIRST, NOISE[:, :, 1:]], dim=2)
    v = velocity_per_token(theirs, x, 999.0)
    theirs.disable_adapters()
    expected = (v - velocity_per_token(theirs, x, 999.0))[:, :, 1:].square().mean()
    torch.testing.assert_close(output.divergence, expected.detach(), rtol=1e-9, atol=0)
