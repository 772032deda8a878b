"""Every named plan's gradient against its paper's estimator, ``tests/textbook.py``, in float64."""

import copy
from fractions import Fraction

import pytest
import textbook
import torch
from torch import nn

from prfl_fast.gradient_plan import GradientPlan, Point
from prfl_fast.model_call import Guidance
from prfl_fast.patching import patch
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.step import PRFL

diffusers = pytest.importorskip("diffusers")

STEPS = 6
SHAPE = (2, 16, 3, 4, 4)
SOLVERS = {"euler": (FlowEuler, textbook.Euler), "unipc": (FlowUniPC, textbook.UniPC)}
SEEDS = (0, 1)  # of draws; they give different steps and depths for every random plan
LIMIT = 1e-12  # of every parameter's gradient, relative; 2e-14 was seen, 1e-6 is promised


@pytest.fixture(autouse=True)
def exact_wan(monkeypatch):
    """Keep diffusers' ``.float()`` sites in float64, or their rounding hides errors below 1e-7."""
    original = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else original(x)
    )


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


NOISE, DATA = normal(1), normal(2)
TEXT = {"encoder_hidden_states": normal(3, (2, 3, 12))}
NEGATIVE = {"encoder_hidden_states": normal(4, (2, 3, 12))}


def make_wan(seed=0):
    torch.manual_seed(seed)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=12,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).double()
    for parameter in model.parameters():  # biases start at zero, which would hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def with_lora(model):
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v", "to_k"]))
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B starts at zero, which would leave A without gradient
            parameter.data = 0.3 * torch.randn_like(parameter, dtype=torch.float64)
    return model


class Score(nn.Module):
    """A frozen score in (0, 1): nonlinear in latents, timestep and text, no two frames alike."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape):
            return nn.Parameter(
                torch.randn(shape, generator=generator, dtype=torch.float64), requires_grad=False
            )

        self.filters, self.head, self.text = weight(6, 16, 1, 3, 3), weight(6), weight(12)

    def forward(self, x, timestep, conditions):
        t = (timestep / 1000).to(x.dtype)
        h = nn.functional.conv3d(x, 0.1 * self.filters, padding=(0, 1, 1))
        h = torch.tanh(h + t.view(-1, 1, 1, 1, 1) * self.head.view(1, -1, 1, 1, 1))
        h = h * (1 + 0.5 * torch.cos(torch.arange(x.shape[2], dtype=x.dtype)))[:, None, None]
        text = conditions["encoder_hidden_states"].mean(1) @ self.text
        return torch.sigmoid((h + h**2).mean((2, 3, 4)) @ self.head * (1 + t) + text)


REWARD = Score(5)


def velocity_of(model, conditions=TEXT):
    def velocity(x, timestep):
        batch = torch.full((x.shape[0],), timestep, dtype=torch.float64)
        return model(x, batch, conditions["encoder_hidden_states"], return_dict=False)[0]

    return velocity


def score_of(reward, conditions=TEXT):
    def score(x, timestep):
        return reward(x, torch.full((x.shape[0],), timestep, dtype=torch.float64), conditions)

    return score


def loss_of(reward=REWARD, target=2.0, weight=0.1):
    return textbook.hinge({"reward": score_of(reward)}, {"reward": 1.0}, target, weight)


def world_of(model):
    return textbook.World(velocity_of(model), loss_of())


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def gradients(loss, model):
    return torch.autograd.grad(loss, trained(model))


def run(step, model, *args, **kwargs):
    """One call, and the gradients it left; they are cleared before and after."""
    model.zero_grad(set_to_none=True)
    output = step(*args, **kwargs)
    assert output.finite
    found = [p.grad for p in trained(model)]
    assert all(gradient is not None for gradient in found)
    model.zero_grad(set_to_none=True)
    return output, found


def worst_error(ours, theirs):
    """Largest error over the parameters, each relative to its own largest entry."""
    scale = max(t.abs().max().item() for t in theirs)
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        # A gradient that is zero in exact arithmetic (the key bias under softmax) is rounding on
        # both sides.
        size = max(b.abs().max().item(), 1e-9 * scale)
        errors.append((a - b).abs().max().item() / size)
    return max(errors)


# The constructor, and its paper's loss at one drawn point: (world, solver, point) → loss.
METHODS = {
    "prfl": (GradientPlan.prfl(), lambda w, s, p: textbook.prfl(w, s, NOISE, p.step)),
    "prfl-3": (GradientPlan.prfl(3), lambda w, s, p: textbook.prfl(w, s, NOISE, p.step)),
    "prfl-independent": (
        GradientPlan.prfl(4, "independent"),
        lambda w, s, p: textbook.prfl(w, s, NOISE, p.step),
    ),
    "refl": (GradientPlan.refl(0.5), lambda w, s, p: textbook.refl(w, s, NOISE, p.step)),
    "draft-1": (GradientPlan.draft(), lambda w, s, p: textbook.draft(w, s, NOISE, 1)),
    "draft-3": (GradientPlan.draft(3), lambda w, s, p: textbook.draft(w, s, NOISE, 3)),
    "draft": (GradientPlan.draft(None), lambda w, s, p: textbook.draft(w, s, NOISE, STEPS)),
    "alignprop": (
        GradientPlan.alignprop(2, 5),
        lambda w, s, p: textbook.alignprop(w, s, NOISE, p.depth),
    ),
    "controlnet++": (
        GradientPlan.controlnet_plus_plus(0.4),
        lambda w, s, p: textbook.one_step(w, s, DATA, NOISE, p.step),
    ),
    "rg-lcd": (
        GradientPlan.rg_lcd(),
        lambda w, s, p: textbook.one_step(w, s, DATA, NOISE, p.step),
    ),
    "instructvideo-1": (
        GradientPlan.instruct_video(0.6, 1, segments=None),
        lambda w, s, p: textbook.instruct_video(w, s, DATA, NOISE, 2, 1),
    ),
    "instructvideo-3": (
        GradientPlan.instruct_video(0.6, 3, segments=None),
        lambda w, s, p: textbook.instruct_video(w, s, DATA, NOISE, 2, 3),
    ),
}
MODELS = {
    "full": (make_wan, copy.deepcopy),
    "full-patched": (make_wan, lambda model: patch(copy.deepcopy(model))),
    "lora": (lambda: with_lora(make_wan()), copy.deepcopy),
    "lora-patched": (
        lambda: with_lora(make_wan()),
        lambda model: patch(copy.deepcopy(model)),
    ),
}


def data_of(plan):
    return {"latents": DATA} if plan.start == "data" else {}


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
    step = PRFL(ours, REWARD, scheduler(), plan, num_steps=STEPS)
    random = len(plan.outcomes(STEPS)) > 1
    for seed in SEEDS if random else SEEDS[:1]:
        points = plan.draw(STEPS, torch.Generator().manual_seed(seed))
        output, found = run(
            step,
            ours,
            NOISE,
            TEXT,
            generator=torch.Generator().manual_seed(seed),
            **data_of(plan),
        )
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
            first, second = (
                plan.draw(STEPS, torch.Generator().manual_seed(seed)) for seed in SEEDS
            )
            assert first != second
    plan = METHODS["prfl-independent"][0]
    assert any(len(plan.draw(STEPS, torch.Generator().manual_seed(seed))) < 4 for seed in SEEDS)


@pytest.mark.parametrize("plan,depth", [(GradientPlan.prfl(), 1), (GradientPlan.draft(3), 3)])
def test_diffusers_own_sampler(plan, depth):
    """Its history carries the gradient through the chain as well; the levels are its float32."""
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    (point,) = plan.draw(STEPS, torch.Generator().manual_seed(SEEDS[0]))
    _, found = run(
        PRFL(ours, REWARD, scheduler, plan, num_steps=STEPS), ours, NOISE, TEXT, indices=(point,)
    )
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
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    seen = []
    hook = ours.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].detach()),
        with_kwargs=True,
    )
    step = PRFL(ours, REWARD, scheduler(), GradientPlan.draft_lv(2), num_steps=STEPS)
    output, found = run(step, ours, NOISE, TEXT, generator=torch.Generator().manual_seed(0))
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
    again, same = run(step, ours, NOISE, TEXT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.loss, output.loss)
    other, _ = run(step, ours, NOISE, TEXT, generator=torch.Generator().manual_seed(1))
    assert not torch.equal(other.loss, output.loss)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("frames,segments", [(4, 4), (4, 2), (5, 3)])
def test_instruct_video_with_attenuated_frames(name, frames, segments):
    """The drawn frames are found in the sampled latents, by value."""
    scheduler, solver = SOLVERS[name]
    shape = (2, 16, frames, 4, 4)
    noise, data, rate = normal(1, shape), normal(2, shape), 0.7
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    seen = []

    def reward(x, timestep, conditions):
        seen.append(x.detach())
        return REWARD(x, timestep, conditions)

    plan = GradientPlan.instruct_video(0.6, 2, segments=segments, attenuation=rate)
    step = PRFL(ours, reward, scheduler(), plan, num_steps=STEPS)
    drawn = set()
    for seed in range(3):
        seen.clear()
        output, found = run(
            step, ours, noise, TEXT, latents=data, generator=torch.Generator().manual_seed(seed)
        )
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
    step = PRFL(ours, REWARD, scheduler(), GradientPlan.reno(), num_steps=STEPS)
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
    output = PRFL(frozen, REWARD, scheduler(), GradientPlan.reno(), num_steps=4)(NOISE, TEXT)
    noise = NOISE.clone().requires_grad_()
    (expected,) = torch.autograd.grad(textbook.reno(world_of(theirs), solver(4), noise), noise)
    assert worst_error([output.gradient], [expected]) <= LIMIT


@pytest.mark.parametrize("window", [(1, None), (2, 4)])
@pytest.mark.parametrize("name", SOLVERS)
def test_flow_nrg(name, window):
    """A batch is guided sample by sample, each as if it were alone."""
    scheduler, solver = SOLVERS[name]
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    weight = 100.0
    step = PRFL(
        ours,
        REWARD,
        scheduler(),
        GradientPlan.flow_nrg(window),
        num_steps=STEPS,
        target=None,
        weight=weight,
    )
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


@pytest.mark.parametrize(
    "method,target",
    [("prfl-3", 0.97), ("prfl-3", None), ("draft-3", 0.6), ("draft-3", None), ("rg-lcd", 0.6)],
)
def test_several_rewards_with_weights(method, target):
    """Each has its own hinge: at this target some samples are past it for one reward only."""
    plan, estimator = METHODS[method]
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    rewards = {"motion": REWARD, "text": Score(7), "sharp": Score(8)}
    weights = {"motion": 1.0, "text": 0.25, "sharp": -0.5}
    step = PRFL(
        ours,
        rewards,
        FlowUniPC(),
        plan,
        num_steps=STEPS,
        target=target,
        weight=0.3,
        reward_weights=weights,
    )
    points = plan.draw(STEPS, torch.Generator().manual_seed(SEEDS[0]))
    output, found = run(
        step, ours, NOISE, TEXT, generator=torch.Generator().manual_seed(SEEDS[0]), **data_of(plan)
    )
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
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    step = PRFL(
        ours,
        REWARD,
        FlowUniPC(),
        plan,
        num_steps=STEPS,
        guidance=Guidance(2.5, NEGATIVE, batched=batched),
    )
    points = plan.draw(STEPS, torch.Generator().manual_seed(SEEDS[0]))
    output, found = run(
        step, ours, NOISE, TEXT, generator=torch.Generator().manual_seed(SEEDS[0]), **data_of(plan)
    )
    velocity = textbook.guided(velocity_of(theirs), velocity_of(theirs, NEGATIVE), 2.5)
    world = textbook.World(velocity, loss_of())
    loss = sum(p.weight * estimator(world, textbook.UniPC(STEPS), p) for p in points)
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_of_noise_optimisation(batched):
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    guidance = Guidance(2.5, NEGATIVE, batched=batched)
    step = PRFL(ours, REWARD, FlowUniPC(), GradientPlan.reno(), num_steps=STEPS, guidance=guidance)
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
    step = PRFL(ours, REWARD, FlowUniPC(), plan, num_steps=STEPS, divergence=0.7)
    points = plan.draw(STEPS, torch.Generator().manual_seed(SEEDS[0]))
    output, found = run(step, ours, NOISE, TEXT, generator=torch.Generator().manual_seed(SEEDS[0]))
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
    step = PRFL(ours, REWARD, FlowUniPC(), plan, num_steps=5)
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
    generator = torch.Generator().manual_seed(0)
    counts = dict.fromkeys(outcomes, 0)
    for _ in range(draws):
        counts[plan.draw(5, generator)] += 1
    for points, probability in outcomes.items():
        spread = (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[points] / draws - probability) < 5 * spread, points


def test_points_may_be_given_instead_of_drawn():
    """Any steps, depths and weights: a plan of one's own, written out."""
    theirs = make_wan()
    ours = patch(copy.deepcopy(theirs))
    step = PRFL(ours, REWARD, FlowUniPC(), GradientPlan.draft(2), num_steps=STEPS)
    points = (Point(STEPS - 1, 4, 1.0),)
    output, found = run(step, ours, NOISE, TEXT, indices=points)
    assert output.depths == (4,)
    loss = textbook.draft(world_of(theirs), textbook.UniPC(STEPS), NOISE, 4)
    assert worst_error(found, gradients(loss, theirs)) <= LIMIT
