"""The draw of gradient points: exact probabilities, and agreement of draw and enumeration."""

from collections import Counter
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
import torch

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point

CASES = [
    (points, steps)
    for steps in (2, 3, 6, 7, 13, 40)
    for points in range(1, steps)
    if points <= 8 or points == steps - 1
]
NAMED = {
    "prfl": GradientPlan.prfl(),
    "prfl 3": GradientPlan.prfl(3),
    "prfl 3, independent": GradientPlan.prfl(3, draws="independent"),
    "prfl 2, independent": GradientPlan.prfl(2, draws="independent"),
    "refl": GradientPlan.refl(),
    "refl 2": GradientPlan(points=2, window=(0.4, None), reward_at="clean"),
    "draft": GradientPlan.draft(2),
    "draft full": GradientPlan.draft(None),
    "draft-lv": GradientPlan.draft_lv(),
    "alignprop": GradientPlan.alignprop(),
    "controlnet++": GradientPlan.controlnet_plus_plus(),
    "instructvideo": GradientPlan.instruct_video(steps=2),
    "reno": GradientPlan.reno(),
    "flow-nrg": GradientPlan.flow_nrg(),
    "rg-lcd": GradientPlan.rg_lcd(),
}


def steps_of(points):
    return tuple(point.step for point in points)


@pytest.mark.cases(10)
@pytest.mark.parametrize("points,steps", CASES)
def test_outcomes_are_a_distribution_with_equal_marginals(points, steps):
    outcomes = GradientPlan.prfl(points).outcomes(steps)
    assert all(isinstance(p, Fraction) and p > 0 for p, _ in outcomes)
    assert sum(p for p, _ in outcomes) == 1
    assert len({drawn for _, drawn in outcomes}) == len(outcomes)
    chosen = Counter()
    for probability, drawn in outcomes:
        indices = steps_of(drawn)
        assert len(indices) == points and list(indices) == sorted(set(indices))
        assert all(point.weight == 1 / points and point.depth == 1 for point in drawn)
        for index in indices:
            chosen[index] += probability
    # Equal inclusion probabilities are what makes the mean over the points unbiased.
    assert chosen == {m: Fraction(points, steps - 1) for m in range(steps - 1)}


def test_one_point_is_uniform_and_all_points_are_certain():
    assert GradientPlan.prfl().outcomes(6) == [(Fraction(1, 5), (Point(m),)) for m in range(5)]
    ((probability, drawn),) = GradientPlan.prfl(5).outcomes(6)
    assert probability == 1 and steps_of(drawn) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("points,steps", [(1, 5), (2, 5), (3, 6), (4, 4)])
def test_independent_draws_weigh_every_step_alike(points, steps):
    outcomes = GradientPlan.prfl(points, draws="independent").outcomes(steps)
    assert sum(p for p, _ in outcomes) == 1
    expected = Counter()
    for probability, drawn in outcomes:
        assert sum(point.weight for point in drawn) == pytest.approx(1)
        assert steps_of(drawn) == tuple(sorted(set(steps_of(drawn))))
        for point in drawn:
            expected[point.step] += float(probability) * point.weight
    assert expected == pytest.approx({m: 1 / (steps - 1) for m in range(steps - 1)})


@pytest.mark.cases(3)
@pytest.mark.parametrize("name", NAMED)
def test_draws_follow_the_enumerated_distribution(name):
    plan, generator, draws, steps = NAMED[name], torch.Generator().manual_seed(1), 4000, 7
    counts = Counter(plan.draw(steps, generator) for _ in range(draws))
    expected = {drawn: float(p) for p, drawn in plan.outcomes(steps)}
    assert set(counts) == set(expected)
    for drawn, probability in expected.items():
        # Five standard deviations of a binomial share.
        slack = 5 * (probability * (1 - probability) / draws) ** 0.5
        assert abs(counts[drawn] / draws - probability) <= slack


@pytest.mark.parametrize("name", NAMED)
def test_expected_forwards_are_the_mean_over_outcomes(name):
    plan, steps = NAMED[name], 7
    begin = plan.begin(steps)

    def forwards(points):
        if plan.to == "latent":
            return steps
        if plan.start == "data" and plan.strength is None:
            return 0
        return points[-1].step + 1 - begin - sum(point.depth for point in points)

    mean = sum(float(p) * forwards(drawn) for p, drawn in plan.outcomes(steps))
    assert plan.expected_forwards(steps) == pytest.approx(mean)


def test_expected_forwards_of_the_paper():
    assert GradientPlan.prfl().expected_forwards(40) == 19
    assert GradientPlan.draft(3).expected_forwards(40) == 37
    assert GradientPlan.draft(None).expected_forwards(40) == 0
    assert GradientPlan.instruct_video().expected_forwards(20) == 11


def test_named_plans_draw_what_their_papers_say():
    def outcomes(plan, steps=40):
        return [(p, *drawn) for p, drawn in plan.outcomes(steps)]

    assert outcomes(GradientPlan.refl()) == [(Fraction(1, 10), Point(m)) for m in range(30, 40)]
    assert outcomes(GradientPlan.refl(), 7) == [(Fraction(1, 2), Point(m)) for m in (5, 6)]
    assert outcomes(GradientPlan.draft()) == [(1, Point(39, 1))]
    assert outcomes(GradientPlan.draft(5)) == [(1, Point(39, 5))]
    whole = [(1, Point(39, 40))]
    assert outcomes(GradientPlan.draft(None)) == outcomes(GradientPlan.reno()) == whole
    assert outcomes(GradientPlan.draft_lv(3)) == [(1, Point(39, 1))]
    depths = [(Fraction(1, 40), Point(39, k)) for k in range(1, 41)]
    assert outcomes(GradientPlan.alignprop()) == depths
    depths = [(Fraction(1, 3), Point(39, k)) for k in (2, 3, 4)]
    assert outcomes(GradientPlan.alignprop(2, 4)) == depths
    late = outcomes(GradientPlan.controlnet_plus_plus(), 1000)
    assert [p.step for _, p in late] == list(range(800, 1000))
    partial = GradientPlan.instruct_video()
    assert partial.begin(20) == 8 and outcomes(partial, 20) == [(1, Point(19, 1))]
    assert [p.step for _, p in outcomes(GradientPlan.rg_lcd(), 9)] == list(range(9))
    guided = tuple(Point(m, 1, 1 / 3) for m in (1, 2, 3))
    assert GradientPlan.flow_nrg().outcomes(4) == [(1, guided)]


def test_a_chain_is_no_longer_than_its_trajectory():
    assert [p.depth for _, (p,) in GradientPlan.alignprop(2, 9).outcomes(4)] == [2, 3, 4]
    partial = GradientPlan.instruct_video(strength=0.5, steps=3)
    assert partial.begin(6) == 3 and partial.draw(6) == (Point(5, 3),)
    with pytest.raises(ValueError, match="num_inference_steps is 4, expected enough"):
        partial.draw(4)
    with pytest.raises(ValueError, match="num_inference_steps is 2, expected enough"):
        GradientPlan.draft(3).draw(2)


def test_the_draw_is_the_systematic_sample_of_one_uniform_number():
    plan = GradientPlan.prfl(5)
    uniform = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(7)).item()
    drawn = plan.draw(40, torch.Generator().manual_seed(7))
    assert steps_of(drawn) == tuple(int((i + uniform) * 39 / 5) for i in range(5))


@pytest.mark.parametrize("draws", ["systematic", "independent"])
def test_the_largest_uniform_number_stays_in_range(monkeypatch, draws):
    """In floating point (4 + u)·39/5 rounds up to 39, one past the last index."""
    largest = 1 - 2**-53
    assert int((4 + largest) * 39 / 5) == 39
    drawn = torch.tensor(largest, dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: drawn)
    five = steps_of(GradientPlan.prfl(5, draws=draws).draw(40))
    assert five == ((7, 15, 23, 31, 38) if draws == "systematic" else (38,))
    assert steps_of(GradientPlan.prfl(1, draws=draws).draw(40)) == (38,)


def test_draws_use_only_the_given_generator():
    plan, state = GradientPlan.prfl(3), torch.get_rng_state()
    first, again = (
        [plan.draw(40, generator) for _ in range(5)]
        for generator in (torch.Generator().manual_seed(2), torch.Generator().manual_seed(2))
    )
    assert first == again and torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    from_global = plan.draw(40)
    torch.manual_seed(3)
    assert from_global == plan.draw(40)


def test_plans_are_values():
    plan = GradientPlan.prfl(5)
    assert plan == GradientPlan(points=5) and hash(plan) == hash(GradientPlan(5))
    assert GradientPlan() == GradientPlan.prfl()
    with pytest.raises(FrozenInstanceError):
        plan.points = 3


@pytest.mark.parametrize("points", [0, -1, 1.0, True, "5", None])
def test_wrong_points_are_refused(points):
    with pytest.raises(ValueError, match="points is"):
        GradientPlan.prfl(points)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"draws": "random"}, "draws is 'random'"),
        ({"to": "weights"}, "to is 'weights'"),
        ({"window": (0.5, 1.5)}, "window is"),
        ({"window": (True, None)}, "window is"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": (3, 2)}, "smaller number first"),
        ({"depth": 2, "points": 2}, "steps of several points would overlap"),
        ({"strength": 0.5}, "start is 'noise', expected 'data' with strength"),
        ({"start": "data", "depth": None}, "without strength"),
        ({"start": "data", "points": 2}, "Every point corrupts the data anew"),
        ({"to": "latent"}, "'latent' together with reward_at='current'"),
        ({"reward_at": "current"}, "'latent' together with reward_at='current'"),
        ({"to": "noise"}, "The gradient reaches the noise"),
        ({"to": "noise", "depth": None, "start": "data", "strength": 1.0}, "to is 'noise'"),
        ({"renoised": 2}, "renoised is 2"),
        ({"renoised": -1, "window": (-1, None)}, "renoised is -1"),
        ({"renoised": 1, "window": (-1, None), "reward_at": "clean"}, "renoised is 1"),
        ({"window": None}, "window is None"),
        ({"depth": (1, 2, 3)}, "depth is"),
        ({"start": "data", "strength": "a"}, "strength is 'a'"),
        ({"to": "latent", "reward_at": "current", "depth": 2}, "Every step of the window"),
        ({"segments": 2, "attenuation": True}, "attenuation is True"),
        ({"segments": 0}, "segments is 0"),
        ({"attenuation": 1.0}, "and 0 without segments"),
        ({"segments": 2, "attenuation": -1.0}, "attenuation is -1.0"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GradientPlan(**fields)


@pytest.mark.parametrize("fraction", [0, 1.5, True, "0.2"])
def test_wrong_fractions_are_refused(fraction):
    for make in (GradientPlan.refl, GradientPlan.controlnet_plus_plus):
        with pytest.raises(ValueError, match="window is"):
            make(fraction)


@pytest.mark.parametrize("method", ["draw", "outcomes", "expected_forwards"])
def test_wrong_schedules_are_refused(method):
    for points, steps, message in (
        (6, 6, "points is 6, expected at most 5"),
        (1, 1, "num_inference_steps is 1, expected enough"),
        *((1, steps, "num_inference_steps is") for steps in (0, 2.0, True)),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(GradientPlan.prfl(points), method)(steps)
