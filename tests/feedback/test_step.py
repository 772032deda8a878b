"""PRFL against the textbook in float64; graphs, histories, dtypes and draws of a step."""

import math
from functools import partial

import pytest
import textbook
import torch
from prfl_world import (
    NOISE,
    REWARD,
    SHAPE,
    TEXT,
    Affine,
    DiffusersSolver,
    Score,
    diffusers_euler,
    diffusers_unipc,
    gradients,
    make_wan,
    mean,
    normal,
    pair,
    prfl,
    run,
    score_of,
    seeded,
    skip_older_unipc,
    velocity_of,
    world_of,
    worst_error,
)

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.rollout.trajectory import rollout

SOLVERS = {
    "unipc": (FlowUniPC, textbook.UniPC),
    "euler": (FlowEuler, textbook.Euler),
    "unipc-diffusers-wide": (
        partial(FlowUniPC, schedule="diffusers"),
        lambda n: DiffusersSolver(diffusers_unipc(), n, wide=True),
    ),
    "diffusers-unipc": (diffusers_unipc, lambda n: DiffusersSolver(diffusers_unipc(), n)),
    "diffusers-euler": (diffusers_euler, lambda n: DiffusersSolver(diffusers_euler(), n)),
}
SCHEDULERS = [FlowUniPC, FlowEuler, diffusers_unipc, diffusers_euler]


def prfl_gradient(model, solver, noise, index):
    return gradients(textbook.prfl(world_of(model), solver, noise, index), model)


@pytest.mark.cases(2)
@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_equals_the_textbook(name, patched):
    if name == "unipc-diffusers-wide":
        skip_older_unipc()
    ours, theirs = SOLVERS[name]
    model, patched_model = pair()
    world, trained = world_of(model), patched_model if patched else model
    step = prfl(trained, None, ours(), steps=7)
    for index in (0, 1, 2, 5):
        output, grads = run(step, trained, NOISE, TEXT, indices=(index,))
        assert worst_error(grads, prfl_gradient(model, theirs(7), NOISE, index)) <= 1e-6
        solver = theirs(7)
        x, t = textbook.sample(world, solver, NOISE, 0, index + 1), solver.timesteps[index + 1]
        r, loss = score_of(REWARD)(x, t), world.loss(x, t)
        torch.testing.assert_close(output.rewards, r[None], rtol=1e-9, atol=0)
        torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(output.latents, x, rtol=1e-9, atol=1e-9)
        assert output.indices == (index,) and output.timesteps == (float(t),)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_gradient_of_the_built_in_solvers_is_exact_to_rounding(name):
    """40 steps, a late index: far below the 1e-6 that is promised."""
    ours, theirs = SOLVERS[name]
    model, noise = make_wan(), normal(2)
    _, grads = run(prfl(model, None, ours(), steps=40), model, noise, TEXT, indices=(30,))
    assert worst_error(grads, prfl_gradient(model, theirs(40), noise, 30)) <= 1e-8


def test_the_gradient_passes_through_the_corrector():
    model = make_wan()
    _, grads = run(prfl(model, steps=7), model, NOISE, TEXT, indices=(3,))

    class PredictorAtTheGradientStep(textbook.UniPC):
        """The same latents everywhere; only the gradient ignores that the corrector sees v."""

        def correct(self, i, x, estimate):
            corrected = super().correct(i, x, estimate)
            return corrected.detach() if i == 3 else corrected

    expected = prfl_gradient(model, PredictorAtTheGradientStep(7), NOISE, 3)
    assert 0.01 < worst_error(grads, expected) < 10


class SnapshotReward(Score):
    """Notes the gradients present whenever it is called, that is, before each point's backward."""

    def __init__(self, model):
        super().__init__(5)
        self.model, self.before = [model], []

    def forward(self, x, timestep, conditions):
        parameters = self.model[0].parameters()
        self.before.append([0 if p.grad is None else p.grad.clone() for p in parameters])
        return super().forward(x, timestep, conditions)


@pytest.mark.cases(1)
@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc])
def test_every_point_of_five_has_its_own_one_point_gradient(scheduler):
    model, plan = make_wan(), GradientPlan.prfl(5)
    reward = SnapshotReward(model)
    step = prfl(model, plan, scheduler(), reward, steps=9)
    output, total = run(step, model, NOISE, TEXT, generator=seeded())
    assert output.indices == tuple(point.step for point in plan.draw(9, seeded()))
    assert len(output.indices) == 5
    after = [*reward.before[1:], total]
    one_point = prfl(model, None, scheduler(), steps=9)
    for k, index in enumerate(output.indices):
        point = [5 * (a - b) for a, b in zip(after[k], reward.before[k], strict=True)]
        single, alone = run(one_point, model, NOISE, TEXT, indices=(index,))
        assert worst_error(point, alone) <= 1e-6
        torch.testing.assert_close(output.rewards[k], single.rewards[0], rtol=1e-12, atol=0)
        assert output.timesteps[k] == single.timesteps[0]


def test_a_batch_is_the_mean_of_its_samples():
    model = make_wan()
    step = prfl(model, GradientPlan.prfl(2), steps=5)
    output, both = run(step, model, NOISE, TEXT, indices=(1, 3))
    halves = []
    for b in range(2):
        conditions = {k: v[b : b + 1] for k, v in TEXT.items()}
        one, grads = run(step, model, NOISE[b : b + 1], conditions, indices=(1, 3))
        torch.testing.assert_close(one.rewards[:, 0], output.rewards[:, b], rtol=1e-12, atol=0)
        halves.append(grads)
    assert worst_error(both, [(a + b) / 2 for a, b in zip(*halves, strict=True)]) <= 1e-9


def test_gradients_accumulate_and_loss_scale_scales_only_them():
    model = make_wan()
    step = prfl(model, steps=5)
    full, grads = run(step, model, NOISE, TEXT, indices=(2,))
    for _ in range(4):
        part = step(NOISE, TEXT, indices=(2,), loss_scale=0.25)
        assert torch.equal(part.loss, full.loss)
    assert worst_error([p.grad for p in model.parameters()], grads) <= 1e-12


def test_only_the_transformer_receives_gradients():
    model, noise = make_wan(), normal().requires_grad_()
    output, grads = run(prfl(model, GradientPlan.prfl(2), steps=5), model, noise, TEXT)
    assert noise.grad is None and all(p.grad is None for p in REWARD.parameters())
    assert any(g.abs().max() > 0 for g in grads)
    assert not any(t.requires_grad for t in (output.loss, output.rewards, output.latents))
    frozen = make_wan().requires_grad_(False)
    frozen.blocks[1].ffn.requires_grad_(True)
    prfl(frozen, steps=5)(noise, TEXT)
    names = [n for n, p in frozen.named_parameters() if p.grad is not None]
    assert names == [n for n, _ in frozen.named_parameters() if n.startswith("blocks.1.ffn.")]


def test_a_plain_function_serves_as_transformer():
    model = Affine()
    output = prfl(model.velocity, None, FlowEuler(), mean)(NOISE, {}, indices=(1,))
    assert model.seen == [(False, torch.float64, False), (True, torch.float64, False)]
    assert model.a.grad is not None and output.latents.shape == SHAPE


@pytest.mark.parametrize("scheduler", [FlowUniPC, diffusers_unipc])
def test_one_graph_is_alive_at_a_time_and_none_afterwards(scheduler):
    model, alive = Affine(), []

    def reward(x, t, c):
        alive.append(model.graphs_alive())
        return mean(x, t, c)

    output = prfl(model.velocity, None, scheduler(), reward)(NOISE, {}, indices=(0, 2, 3, 4))
    assert alive == [1, 1, 1, 1] and model.graphs_alive() == 0
    # No forward beyond the last gradient step.
    assert len(model.seen) == 5 and len(output.indices) == 4


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_callers_scheduler_is_not_touched_and_nothing_leaks_between_calls(scheduler):
    original, model = scheduler(), Affine()
    before = original.timesteps.clone()
    step = prfl(model.velocity, GradientPlan.prfl(2), original, mean)
    (one, left), (two, right) = (run(step, model, NOISE, {}, indices=(1, 3)) for _ in range(2))
    assert torch.equal(*left, *right) and torch.equal(one.latents, two.latents)
    assert torch.equal(original.timesteps, before) and original.step_index is None


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_latents_keep_the_noises_dtype(dtype, scheduler):
    model = Affine()
    step = prfl(model.velocity, None, scheduler(), mean, steps=4)
    output = step(NOISE.to(dtype), {}, indices=(1, 2))
    assert output.latents.dtype == dtype and output.finite
    assert output.rewards.dtype == output.loss.dtype == torch.float32
    assert {entry[1] for entry in model.seen} == {dtype}


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_transformer_is_left_alone(mode):
    model = make_wan().train(mode)
    prfl(model, steps=3)(NOISE, TEXT)
    assert model.training == mode


def test_gradients_come_even_inside_no_grad():
    model = Affine()
    with torch.no_grad():
        prfl(model.velocity, reward=mean)(NOISE, {})
    assert model.a.grad is not None


def test_rewards_above_the_target_give_no_gradient():
    model = Affine()
    output = prfl(model.velocity, reward=lambda x, t, c: mean(x, t, c) + 5)(NOISE, {})
    assert output.loss == 0 and model.a.grad == 0 and output.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_is_reported_and_not_differentiated(bad):
    model, calls = Affine(), []

    def reward(x, t, c):
        calls.append(None)
        return mean(x, t, c) + (torch.tensor([0.0, bad]) if len(calls) == 2 else 0)

    step = prfl(model.velocity, reward=reward)
    output = step(NOISE, {}, indices=(0, 2, 4))
    assert not output.finite and len(calls) == 2 and output.indices == (0, 2, 4)
    assert torch.isfinite(output.rewards[0]).all() and output.rewards[2].isnan().all()
    first = model.a.grad.clone()
    model.a.grad = None
    calls.clear()
    step(NOISE, {}, indices=(0,), loss_scale=1 / 3)
    torch.testing.assert_close(model.a.grad, first, rtol=1e-12, atol=0)


def test_draws_come_from_the_generator_alone():
    step = prfl(Affine().velocity, GradientPlan.prfl(3), FlowEuler(), mean, steps=20)
    state = torch.get_rng_state()
    drawn = [step(NOISE, {}, generator=seeded(s)).indices for s in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    step(NOISE, {}, indices=(0, 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["unipc", "euler", "diffusers-unipc"])
def test_rollout_equals_the_textbook_and_stops_where_told(name, capsys):
    ours, theirs = SOLVERS[name]
    model = make_wan()
    world = textbook.World(velocity_of(model), None)
    for stop in (0, 2, None):
        out = rollout(model, NOISE, TEXT, ours(), 5, stop=stop, progress=stop is None)
        expected = textbook.sample(world, theirs(5), NOISE, 0, 5 if stop is None else stop)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        assert not out.requires_grad
    assert "sampling" in capsys.readouterr().err


def test_rollout_refuses_a_stop_outside_the_schedule():
    for stop in (-1, 6):
        with pytest.raises(ValueError, match="stop is"):
            rollout(Affine().velocity, NOISE, {}, FlowEuler(), 5, stop=stop)


@pytest.mark.cases(1)
@pytest.mark.parametrize("index", [0, 1, 2, 17, 38])
def test_gradient_of_the_default_schedule_equals_the_references_step(index):
    """40 steps at shift 5: noise, steps without gradient, one with, the score at its own level."""
    model = make_wan()
    output, grads = run(prfl(model, steps=40), model, NOISE, TEXT, indices=(index,))
    assert worst_error(grads, prfl_gradient(model, textbook.UniPC(40), NOISE, index)) <= 1e-6
