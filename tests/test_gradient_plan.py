"""The draw of gradient steps: exact probabilities, marginals, agreement of draw and enumeration."""

from collections import Counter
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch

from prfl_fast.gradient_plan import GradientPlan

CASES = [
    (points, steps)
    for steps in (2, 3, 6, 7, 13, 40)
    for points in range(1, steps)
    if points <= 8 or points == steps - 1
]


@pytest.mark.parametrize("points,num_steps", CASES)
def test_outcomes_are_a_distribution_with_equal_marginals(points, num_steps):
    outcomes = GradientPlan.prfl(points).outcomes(num_steps)
    assert sum(p for p, _ in outcomes) == 1 and all(
        isinstance(p, Fraction) and p > 0 for p, _ in outcomes
    )
    assert len({indices for _, indices in outcomes}) == len(outcomes)
    chosen = Counter()
    for probability, indices in outcomes:
        assert len(indices) == points and list(indices) == sorted(set(indices))
        for index in indices:
            chosen[index] += probability
    # Equal inclusion probabilities are what makes the mean over the points unbiased.
    assert chosen == {m: Fraction(points, num_steps - 1) for m in range(num_steps - 1)}


def test_one_point_is_uniform_and_all_points_are_certain():
    assert GradientPlan.prfl().outcomes(6) == [(Fraction(1, 5), (m,)) for m in range(5)]
    assert GradientPlan.prfl(5).outcomes(6) == [(Fraction(1), (0, 1, 2, 3, 4))]


@pytest.mark.parametrize("points,num_steps", [(1, 6), (2, 6), (3, 8), (5, 40), (5, 6)])
def test_draws_follow_the_enumerated_distribution(points, num_steps):
    plan, generator, draws = GradientPlan.prfl(points), torch.Generator().manual_seed(1), 4000
    counts = Counter(plan.draw(num_steps, generator) for _ in range(draws))
    expected = {indices: float(p) for p, indices in plan.outcomes(num_steps)}
    assert set(counts) == set(expected)
    for indices, probability in expected.items():
        # Five standard deviations of a binomial share.
        slack = 5 * (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[indices] / draws - probability) <= slack


def test_the_draw_is_the_systematic_sample_of_one_uniform_number():
    plan = GradientPlan.prfl(5)
    uniform = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(7)).item()
    drawn = plan.draw(40, torch.Generator().manual_seed(7))
    assert drawn == tuple(int((i + uniform) * 39 / 5) for i in range(5))


def test_the_largest_uniform_number_stays_in_range(monkeypatch):
    """In floating point (4 + u)·39/5 rounds up to 39, one past the last index."""
    largest = 1 - 2**-53
    assert int((4 + largest) * 39 / 5) == 39
    monkeypatch.setattr(
        torch, "rand", lambda *args, **kwargs: torch.tensor(largest, dtype=torch.float64)
    )
    assert GradientPlan.prfl(5).draw(40) == (7, 15, 23, 31, 38)
    assert GradientPlan.prfl(1).draw(40) == (38,)


def test_draws_use_only_the_given_generator():
    plan, generator = GradientPlan.prfl(3), torch.Generator().manual_seed(2)
    state = torch.get_rng_state()
    first = [plan.draw(40, generator) for _ in range(5)]
    assert torch.equal(state, torch.get_rng_state())
    assert first == [
        plan.draw(40, generator.manual_seed(2) if i == 0 else generator) for i in range(5)
    ]
    torch.manual_seed(3)
    from_global = plan.draw(40)
    torch.manual_seed(3)
    assert from_global == plan.draw(40)


def test_plans_are_values():
    plan = GradientPlan.prfl(5)
    assert (
        plan == GradientPlan(points=5)
        and hash(plan) == hash(GradientPlan(5))
        and GradientPlan() == GradientPlan.prfl()
    )
    with pytest.raises(FrozenInstanceError):
        plan.points = 3


@pytest.mark.parametrize("points", [0, -1, 1.0, True, "5", None])
def test_wrong_points_are_refused(points):
    with pytest.raises(ValueError, match="points is"):
        GradientPlan.prfl(points)


@pytest.mark.parametrize("method", ["draw", "outcomes"])
def test_wrong_schedules_are_refused(method):
    with pytest.raises(ValueError, match="points is 6, but 6 steps have only 5"):
        getattr(GradientPlan.prfl(6), method)(6)
    for num_steps in (1, 0, 2.0, True):
        with pytest.raises(ValueError, match="num_steps is"):
            getattr(GradientPlan.prfl(), method)(num_steps)
