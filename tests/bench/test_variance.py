"""The variance of reward gradients: its arithmetic, records and problems."""

import itertools

import pytest
import torch
from bench_runs import SMALL, make_context
from experiments import variance
from suites import wan

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import FlowUniPC

pytest.importorskip("diffusers")


def by_hand(plan, num_inference_steps):
    """E[w wᵀ] over every ordered draw."""
    count = num_inference_steps - 1
    found = torch.zeros(count, count, dtype=torch.float64)
    if plan.draws == "independent":
        draws = [(1 / count**plan.points, d) for d in itertools.product(range(count), repeat=3)]
    else:
        draws = [
            (float(p), [q.step for q in points]) for p, points in plan.outcomes(num_inference_steps)
        ]
    for probability, steps in draws:
        w = torch.zeros(count, dtype=torch.float64)
        for m in steps:
            w[m] += 1 / len(steps)
        found += probability * w.outer(w)
    return found


@pytest.mark.parametrize("draws", variance.DRAWS)
def test_second_moment_of_the_draws(draws):
    plan = GradientPlan.prfl(3, draws)
    torch.testing.assert_close(variance.second_moment(plan, 6), by_hand(plan, 6))


def test_variance_of_a_hand_case():
    # Two steps; g_1 = 3 and g_2 = 1 on every trajectory: only the draw is random.
    g = torch.tensor([3.0, 1.0], dtype=torch.float64)
    w = c = g.outer(g)
    one, two = (variance.second_moment(GradientPlan.prfl(k), 3) for k in (1, 2))
    for batch in (1, 7):  # which share the draw
        assert variance.variance(one, w, c, batch) == pytest.approx(1 / 4)  # mean 2, 3 or 1
        assert variance.variance(two, w, c, batch) == pytest.approx(0)
    # Gradients of ±1 around a mean of 1 by trajectory, the same at both steps.
    w, c = torch.full((2, 2), 2.0), torch.ones(2, 2)
    assert variance.variance(one.float(), w, c, 1) == pytest.approx(1)
    assert variance.variance(one.float(), w, c, 4) == pytest.approx(1 / 4)


def products_of(groups):
    """Return the products of groups of trajectories, ``[groups, 2, steps, parameters]``."""
    within = [sum(b @ b.T for b in group) for group in groups]
    return variance.Products([group.sum(0) for group in groups], within, 2)


def test_moments_are_means_over_trajectories_and_over_pairs_of_them():
    rows = torch.randn(6, 3, 5, dtype=torch.float64)  # trajectories, steps, parameters
    groups = rows.unflatten(0, (3, 2))
    products = products_of(groups)
    for leave, kept in ((None, rows), (1, torch.cat([groups[0], groups[2]]))):
        w, c = products.moments(leave)
        torch.testing.assert_close(w, torch.stack([b @ b.T for b in kept]).mean(0))
        pairs = [a @ b.T for a, b in itertools.permutations(kept, 2)]
        torch.testing.assert_close(c, torch.stack(pairs).mean(0))


@pytest.mark.parametrize("draws", variance.DRAWS)
def test_flops_expected_of_a_plan(draws):
    plan, num_inference_steps = GradientPlan.prfl(3, draws), 7
    found = []
    for probability, points in plan.outcomes(num_inference_steps):
        distinct = len(points)
        found.append(float(probability) * (10 * (points[-1].step + 1 - distinct) + 100 * distinct))
    assert variance.expected_flops(plan, num_inference_steps, 10, 100) == pytest.approx(sum(found))


def test_gradients_by_step_are_prfls():
    model = wan.build(SMALL, make_context())
    reward = LatentRewardModel.from_backbone(model, num_blocks=1).freeze()
    noise, conditions = wan.latents(SMALL, make_context()), wan.conditions(SMALL, make_context())
    rows = variance.gradients_by_step(model, reward, noise, conditions, 4)
    assert rows.shape[0] == 3
    prfl = PRFL(model, reward, FlowUniPC(), num_inference_steps=4, weight=1.0)
    for index, row in enumerate(rows):
        prfl(noise, conditions, indices=(index,))
        expected = variance.flat_gradient(list(model.parameters()))
        assert expected.norm() > 0
        torch.testing.assert_close(row, expected)


def test_variance_of_samples():
    # Mean 2, sum of squared distances 2 over 2: spread 1, squared mean 4 - 1/3.
    found = variance.sample_variance(torch.tensor([[1.0], [2.0], [3.0]]))
    assert found.value == pytest.approx(1 / (4 - 1 / 3))
    # Without a row: spreads 1/2, 2 and 1/2 around 2.5, 2 and 1.5.
    left = torch.tensor([0.5 / 6, 2 / 3, 0.5 / 2])
    squares = (left - left.mean()).square().sum().item()
    assert found.error == pytest.approx((2 / 3 * squares) ** 0.5)
    assert str(found) == "0.3 ± 0.3"
    assert variance.sample_variance(torch.tensor([[1.0], [-1.0]])) is None
    # The mean is there, but not without the first row.
    assert variance.sample_variance(torch.tensor([[9.0], [1.0], [-1.0]])) is None


def test_records_of_points_relate_to_one_point():
    products = products_of(torch.randn(4, 2, 6, 40, dtype=torch.float64) + 1)
    sizes = {"groups": 4, "trajectories": 2, "num_inference_steps": 7}
    s = variance.Settings(**sizes, points=(1, 5), batches=(1,))
    records = variance.point_records(products, s, (10, 100))
    found = {(r["draws"], r["points"]): r for r in records}
    one, five = found["systematic", 1], found["systematic", 5]
    assert one["per_flop"] == 1 and one["per_flop_error"] == 0 < five["per_flop_error"]
    assert five["per_flop"] == pytest.approx(
        five["variance"] * five["flops"] / (one["variance"] * one["flops"])
    )
    table, _ = variance._table(records, s)
    assert len(table.rows) == 2 and all(len(r) == len(table.columns) for r in table.rows)
    assert table.rows[0][3] == "1.00"
    assert five["variance_error"] > 0

    def problems_of(value, error):
        other = {"per_flop": value, "per_flop_error": error}
        changed = [{**r, **other} if r["points"] == 5 else r for r in records]
        return variance._table(changed, s)[1]

    assert problems_of(0.75, 0.12) == []
    assert problems_of(0.75, 0.13) == [
        "batch 1: at equal FLOPs 5 points have 0.75 ± 0.13 times the variance of 1 point, "
        "expected below 1 by two standard errors"
    ]
