"""The small world's suites: what they share, alignment, and the family of methods side by side."""

import json
import math
import types
from fractions import Fraction

import harness
import pytest
import report
import suites
import torch
from bench_runs import CPU, assert_rectangular, make_context
from experiments import alignment, family, family_sampling, family_training, small_world

from prfl_fast.data.dataset import Batch
from prfl_fast.feedback.gradient_plan import GradientPlan

WORLD = {"clips": 64, "held_out": 16, "prompts": 3, "solver_steps": 8}
WORLD |= {"updates": 1, "checkpoints": 2, "feedback_batch": 2}


@pytest.fixture(autouse=True)
def needs_diffusers():
    pytest.importorskip("diffusers")


def context(out, **changes):
    return make_context(harness.PRESETS["tiny"], out=out, **changes)


@pytest.fixture(scope="module")
def start():
    """Return the models of the repository and a few clips."""
    pytest.importorskip("diffusers")
    settings = small_world.Settings(clips=64, held_out=16, prompts=3)
    return small_world.prepare(settings, context(None), small_world.Inline())[0]


# What the suites share.


@pytest.mark.slow
def test_alignment_runs_its_arms_and_draws_its_figures(tmp_path):
    settings = alignment.Settings(**WORLD, strips=1)
    result = alignment._run(settings, context(tmp_path), small_world.Inline())
    arms = [case for case in result.cases if "arm" in case]
    assert [a["arm"] for a in arms] == list(alignment.ARMS)
    json.dumps(result.cases)  # a record has no clips
    for arm in arms:
        assert [p["update"] for p in arm["points"]] == [0, 1] and arm["skipped"] == 0
        assert arm["points"][0] == arms[0]["points"][0]  # the same generator and noise
        assert arm["points"][0]["reward"] != arm["points"][1]["reward"]
    assert {t.name for t in result.tables} == {"pavrm", "alignment"}
    assert_rectangular(*result.tables)
    for file, figure in result.figures.items():
        report.save_figure(tmp_path / file, figure)
        assert (tmp_path / file).stat().st_size > 10_000
    names = {"alignment_curves.png", "alignment_strips.png", "pavrm_accuracy.png"}
    assert set(result.figures) == names


def test_share_of_the_gap_that_an_arm_closes():
    arm = {"points": [{"motion": 0.7}, {"motion": 0.1}, {"motion": 0.8}]}
    assert alignment.gap_closed(arm, 0.9) == pytest.approx(0.5)


def test_strips_show_the_first_clips_below_the_threshold():
    """The rule is on the clips before training, so nobody chooses by what training did."""
    motion = torch.tensor([0.9, 0.3, 0.5, 0.2])
    frames = torch.zeros(4, 3, 17, 32, 32, dtype=torch.uint8)
    for index, each in enumerate(frames):
        each += 10 * (index + 1)
    clips = [small_world.Assessed(frames, motion), small_world.Assessed(frames, motion + 0.1)]
    settings = alignment.Settings(strips=2)
    figure = alignment.strips_figure([{"arm": "prfl", "clips": clips}], settings, 0.6)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [int(image[0, 0, 0]) for image in shown] == [20, 20, 30, 30]
    assert shown[0].shape == (32, 9 * 33, 3)
    assert "rose for 3, on average by 0.10" in figure.get_suptitle()


# The family.


def test_the_suite_is_offered_but_runs_only_when_asked_for():
    assert "family" in suites.DESCRIPTIONS and "family" not in suites.DEFAULT
    assert suites.load("family") is family.run


# One of each kind; all of them take minutes.
FEW_METHODS = ("sft", "prfl5", "divergence", "rglcd", "dpo", "prfl_rwr")
FEW_USERS = ("plain", "best4", "prune8")


@pytest.fixture
def few(monkeypatch):
    for module, names in ((family_training, FEW_METHODS), (family_sampling, FEW_USERS)):
        table = "METHODS" if module is family_training else "USERS"
        chosen = {name: getattr(module, table)[name] for name in names}
        monkeypatch.setattr(module, table, chosen)
        monkeypatch.setattr(family, table, chosen)


# Generator forwards for one rewarded clip, by hand for 8 solver steps.
FORWARDS = {"sft": 1, "prfl1": 4, "refl": 7.5, "draft1": 8, "draftk": 8, "draftlv": 10}
FORWARDS |= {"alignprop": 8, "controlnet": 1, "instruct": 5, "rglcd": 1}


def check_run(folder):
    """Run the suite at its smallest, check its record, and return costs of methods and users."""
    settings = family_training.Settings(**WORLD, sft_batch=2, users=2, lora_rank=2, few_steps=2)
    result = family._run(settings, context(folder), small_world.Inline())
    json.dumps(report._finite(result.cases), allow_nan=False)
    arms = {c["arm"]: c for c in result.cases if "arm" in c}
    assert set(arms) == set(family.METHODS)
    for name, arm in arms.items():
        assert arm["skipped"] == 0, name
        assert [p["update"] for p in arm["points"]] == [0, 1], name
        assert all(math.isfinite(v) for p in arm["points"] for v in p.values()), name
        assert arm["points"][0]["along"] != arm["points"][1]["along"], name
        goal = family.METHODS[name].goal
        rise = arm["after"][goal] - arm["before"][goal]
        assert arm["gain"][goal]["mean"] == pytest.approx(rise, abs=1e-5), name
        assert 0 < arm["moved"] < 1, name
        assert arm["cost"]["peak_bytes"] > 0 and arm["cost"]["seconds"] > 0, name
        if name in FORWARDS:
            assert arm["cost"]["forwards"] == pytest.approx(FORWARDS[name]), name
    users = {c["user"]: c for c in result.cases if "user" in c}
    assert set(users) == set(family.USERS)
    training, sampling = result.tables
    assert len(training.rows) == 2 + len(arms) and len(sampling.rows) == len(users)
    assert_rectangular(*result.tables)
    for table in result.tables:
        assert report.to_markdown(table)
    for file, figure in result.figures.items():
        report.save_figure(folder / file, figure)
        assert (folder / file).stat().st_size > 10_000
    return {n: a["cost"] for n, a in arms.items()}, users


@pytest.mark.slow
def test_one_method_and_user_of_each_kind(few, tmp_path):
    arms, users = check_run(tmp_path)
    assert arms["rglcd"]["round_flops"] < arms["prfl5"]["round_flops"]
    assert users["plain"]["cost"]["forwards"] == 8 and users["best4"]["cost"]["forwards"] == 32
    assert users["prune8"]["cost"]["forwards"] == 8 * 5 + 4 * 2 + 2
    plain = users["plain"]["scores"]["end"]
    assert all(users[n]["scores"]["end"] >= plain for n in ("best4", "prune8"))


@pytest.mark.slow
def test_every_method_trains_and_every_user_samples(tmp_path):
    arms, users = check_run(tmp_path)
    work = {name: cost["round_flops"] for name, cost in arms.items()}
    assert work["draft1"] < work["draftlv"] and work["draft1"] < work["alignprop"]
    assert work["prfl1"] < work["prfl5"] and work["lora"] < work["divergence"]
    costs = {name: user["cost"] for name, user in users.items()}
    assert costs["reno5"]["flops"] < costs["reno15"]["flops"]
    assert costs["reno5"]["peak_bytes"] == pytest.approx(costs["reno15"]["peak_bytes"], rel=0.01)
    assert costs["guide10"]["flops"] == costs["guide500"]["flops"]


@pytest.mark.slow
def test_cost_of_repeated_iterations_is_that_of_all_of_them(start):
    """ReNO's FLOPs are counted on two iterations; here on all."""
    s = family_training.Settings(**{**WORLD, "solver_steps": 2}, users=1)
    stated = family_sampling.run_user(start, s, "reno5", 0)["cost"]["flops"]
    noise, text = small_world.held_out_noise(start, 3000)[:1], start.conditions
    text = {key: value[:1] for key, value in text.items()}
    call = family_sampling.USERS["reno5"].call
    assert stated == harness.count_flops(lambda: call(start, s, noise, text, None, iterations=5))


def scores(end, motion):
    """Results of eight prompts around the given means."""
    wobble = torch.linspace(-0.01, 0.01, 8)
    values = {"along": end, "end": end, "pixel": 0.5, "motion": motion}
    return {name: value + wobble * (1 + i) for i, (name, value) in enumerate(values.items())}


COST = {"forwards": 1.0, "reward_forwards": 1.0, "flops": 1e9, "peak_bytes": 1e6, "seconds": 1.0}


def test_users_that_do_not_beat_plain_fail_and_exploited_rewards_are_named():
    ends = {"plain": 0.5, "best4": 0.501, "best8": 0.7, "guide500": 0.9}
    motions = {"best8": 0.6, "guide500": 0.4}
    found = {n: scores(ends.get(n, 0.8), motions.get(n, 0.5)) for n in family_sampling.USERS}
    users = [{"user": n, "seed": 0, "scores": s, "cost": COST} for n, s in found.items()]
    # A gain must be certain: spread the differences of one so that it is not.
    users[1]["scores"]["end"] = users[1]["scores"]["end"] + torch.linspace(-0.1, 0.1, 8)
    table, problems = family._sampling_table(users, family_training.Settings())
    label = family_sampling.USERS["best4"].label
    assert len(problems) == 1 and problems[0].startswith(f"{label} does not beat plain sampling")
    fallen, unsure = table.notes[-1].split("It neither")
    assert fallen.endswith(f"exploited: {family_sampling.USERS['guide500'].label}. ")
    assert family_sampling.USERS["prune8"].label in unsure
    assert family_sampling.USERS["best8"].label not in unsure
    row = {row[0]: row for row in table.rows}[family_sampling.USERS["best8"].label]
    assert row[2] == "+0.200 ± 0.000" and row[5] == "+0.100 ± 0.000"


def test_methods_whose_reward_does_not_rise_are_named():
    same = {"before": scores(0.5, 0.4), "moved": 0.1, "cost": {**COST, "round_flops": 1e9}}
    ends = {name: 0.5 if name in ("sft", "draft1") else 0.6 for name in family_training.METHODS}
    arms = [{"arm": name, "after": scores(end, 0.4), **same} for name, end in ends.items()]
    for arm in arms:
        arm["after"]["pixel"] = arm["after"]["pixel"] + (0.1 if arm["arm"] == "refl" else 0.0)
    table, still = family._training_table(arms, family_training.Settings())
    assert still == ["DRaFT-1"]  # SFT has no reward to raise
    assert table.notes[-1].endswith("standard errors: DRaFT-1.")
    rows = {row[0]: row for row in table.rows}
    assert rows["ReFL, pixel reward + SFT"][5] == "pixel +0.100 ± 0.000"
    assert rows["SFT only"][5] == report.BLANK


def test_cost_is_the_expectation_over_a_plan():
    """A stand-in update whose FLOPs are those of one product per generator forward."""
    plan = GradientPlan.alignprop()
    sampler = types.SimpleNamespace(num_inference_steps=5)
    step = types.SimpleNamespace(plan=plan, sampler=sampler)
    weight, calls = torch.randn(7, 7), []

    def call(batch, points):
        (point,) = points
        calls.append((len(batch.latents), point.depth))
        for _ in range(point.step + 1 + 2 * point.depth):
            batch.latents.flatten(1)[:, :7] @ weight

    batch = Batch(torch.randn(3, 7, 1, 1, 1), {"text": torch.randn(3, 2)}, [])
    cost = family_training.stated_cost(step, call, batch, CPU)
    assert cost["forwards"] == 5
    expected = sum(p * (5 + 2 * points[0].depth) for p, points in plan.outcomes(5))
    assert cost["flops"] == pytest.approx(float(expected) * 2 * 7 * 7)
    assert expected == Fraction(11)
    assert calls[-1] == (3, 5)  # the peak: the whole batch, the deepest chain


def test_few_step_sampling_ends_where_every_estimate_points(start):
    """With a velocity that leads every latent to the same x0, each of its steps says x0."""
    noise = small_world.held_out_noise(start, 0)
    aim = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))

    def velocity(x, timestep, conditions):
        return (x - aim) / (timestep.view(-1, 1, 1, 1, 1) / 1000)

    latents, along = family_training.sample_few(velocity, start, start.conditions, noise, 3, 0)
    torch.testing.assert_close(latents, aim, rtol=1e-4, atol=1e-4)
    assert along.shape == (2, len(noise))
