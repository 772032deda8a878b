"""PRFL gradients against a textbook written in plain PyTorch, in float64."""

import pytest
import torch
from plan_world import worst_error
from prfl_world import (
    CONDITIONS,
    SOLVERS,
    TinyReward,
    diffusers_unipc,
    gradients,
    make_noise,
    make_wan,
    run,
    velocity_of,
)
from textbook import UniPC

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.registry import patch
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC


def prfl_gradient(
    model, reward, solver, noise, index, conditions=CONDITIONS, target=2.0, weight=0.1
):
    """One PRFL gradient as the paper states it: ``(gradients, rewards, loss, latents)``."""
    x = noise.clone()
    with torch.no_grad():
        for i in range(index):
            x = solver.step(i, velocity_of(model, x, solver.timesteps[i], conditions), x)
    v = velocity_of(model, x, solver.timesteps[index], conditions)
    x = solver.step(index, v, x)
    t = torch.full((x.shape[0],), float(solver.timesteps[index + 1]), dtype=torch.float64)
    r = reward(x, t, conditions)
    loss = weight * torch.clamp(target - r, min=0).mean()
    return (
        torch.autograd.grad(loss, list(model.parameters())),
        r.detach(),
        loss.detach(),
        x.detach(),
    )


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_equals_the_textbook(name, patched):
    ours, theirs = SOLVERS[name]
    model, reward, noise = make_wan(), TinyReward(), make_noise()
    ours_model = patch(make_wan()) if patched else model
    step = PRFL(ours_model, reward, ours(), num_inference_steps=7)
    for index in (0, 1, 2, 5):
        output, grads = run(step, ours_model, noise, CONDITIONS, indices=(index,))
        solver = theirs(7)
        expected, r, loss, x = prfl_gradient(model, reward, solver, noise, index)
        assert worst_error(grads, expected) <= 1e-6
        torch.testing.assert_close(output.rewards, r[None], rtol=1e-9, atol=0)
        torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(output.latents, x, rtol=1e-9, atol=1e-9)
        assert output.indices == (index,) and output.finite
        assert output.timesteps == (float(solver.timesteps[index + 1]),)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_gradient_of_the_built_in_solvers_is_exact_to_rounding(name):
    """40 steps, a late index: far below the 1e-6 that is promised."""
    ours, theirs = SOLVERS[name]
    model, reward, noise = make_wan(), TinyReward(), make_noise(2)
    _, grads = run(PRFL(model, reward, ours()), model, noise, CONDITIONS, indices=(30,))
    expected, *_ = prfl_gradient(model, reward, theirs(40), noise, 30)
    assert worst_error(grads, expected) <= 1e-8


def test_the_gradient_passes_through_the_corrector():
    model, reward, noise = make_wan(), TinyReward(), make_noise()
    _, grads = run(
        PRFL(model, reward, FlowUniPC(), num_inference_steps=7),
        model,
        noise,
        CONDITIONS,
        indices=(3,),
    )

    class PredictorAtTheGradientStep(UniPC):
        """The same latents everywhere; only the gradient ignores that the corrector sees v."""

        def _correct(self, i, estimate):
            corrected = super()._correct(i, estimate)
            return corrected.detach() if i == 3 else corrected

    expected, *_ = prfl_gradient(model, reward, PredictorAtTheGradientStep(7), noise, 3)
    assert 0.01 < worst_error(grads, expected) < 10


class SnapshotReward(TinyReward):
    """Notes the gradients present whenever it is called, that is, before each point's backward."""

    def __init__(self, model):
        super().__init__()
        self.model, self.before = [model], []

    def forward(self, x, timestep, conditions):
        self.before.append(gradients(self.model[0]))
        return super().forward(x, timestep, conditions)


@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc])
def test_every_point_of_five_has_its_own_one_point_gradient(scheduler):
    model, noise = make_wan(), make_noise(3)
    reward = SnapshotReward(model)
    plan = GradientPlan.prfl(5)
    step = PRFL(model, reward, scheduler(), plan, num_inference_steps=9)
    output, total = run(step, model, noise, CONDITIONS, generator=torch.Generator().manual_seed(0))
    assert (
        output.indices
        == tuple(point.step for point in plan.draw(9, torch.Generator().manual_seed(0)))
        and len(output.indices) == 5
    )
    after = [*reward.before[1:], total]
    for k, index in enumerate(output.indices):
        point = [5 * (a - b) for a, b in zip(after[k], reward.before[k], strict=True)]
        single, alone = run(
            PRFL(model, TinyReward(), scheduler(), num_inference_steps=9),
            model,
            noise,
            CONDITIONS,
            indices=(index,),
        )
        assert worst_error(point, alone) <= 1e-6
        torch.testing.assert_close(output.rewards[k], single.rewards[0], rtol=1e-12, atol=0)
        assert output.timesteps[k] == single.timesteps[0]


def test_the_expectation_over_all_draws_is_the_mean_over_indices():
    model, reward, noise, steps = make_wan(), TinyReward(), make_noise(4), 6
    singles = [prfl_gradient(model, reward, UniPC(steps), noise, m)[0] for m in range(steps - 1)]
    mean = [sum(g) / (steps - 1) for g in zip(*singles, strict=True)]
    for points in range(1, 6):
        plan = GradientPlan.prfl(points)
        step = PRFL(model, reward, FlowUniPC(), plan, num_inference_steps=steps)
        expectation = [torch.zeros_like(p) for p in model.parameters()]
        for probability, indices in plan.outcomes(steps):
            _, grads = run(step, model, noise, CONDITIONS, indices=indices)
            for e, g in zip(expectation, grads, strict=True):
                e += float(probability) * g
        assert worst_error(expectation, mean) <= 1e-6, points


def test_a_batch_is_the_mean_of_its_samples():
    model, reward, noise = make_wan(), TinyReward(), make_noise(5)
    step = PRFL(model, reward, FlowUniPC(), GradientPlan.prfl(2), num_inference_steps=5)
    output, both = run(step, model, noise, CONDITIONS, indices=(1, 3))
    halves = []
    for b in range(2):
        conditions = {k: v[b : b + 1] for k, v in CONDITIONS.items()}
        one, grads = run(step, model, noise[b : b + 1], conditions, indices=(1, 3))
        torch.testing.assert_close(one.rewards[:, 0], output.rewards[:, b], rtol=1e-12, atol=0)
        halves.append(grads)
    assert worst_error(both, [(a + b) / 2 for a, b in zip(*halves, strict=True)]) <= 1e-9
