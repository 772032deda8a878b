"""The benchmark's suites on rollouts, methods and steps: the variance study's arithmetic, drift,
counts on fake tensors, tables, and each suite end to end at a minimal size.
"""

import functools
import itertools
import json
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import harness  # noqa: E402
import run as bench_run  # noqa: E402
from harness import Preset, Unavailable  # noqa: E402
from suites import (  # noqa: E402
    methods,
    plans,
    rollout,
    rollout_counts,
    rollout_options,
    small_world,
    split,
    step,
    variance,
    wan,
)

from prfl_fast.costs import Cost  # noqa: E402
from prfl_fast.gradient_plan import GradientPlan, Point  # noqa: E402
from prfl_fast.modules import QueryAttentionPool  # noqa: E402
from prfl_fast.reward import LatentRewardModel  # noqa: E402
from prfl_fast.rollout_engine import RolloutEngine  # noqa: E402
from prfl_fast.schedulers import FlowUniPC  # noqa: E402
from prfl_fast.step import PRFL  # noqa: E402

pytest.importorskip("diffusers")

CPU = torch.device("cpu")
SMALL = Preset("small", 32, 2, 64, 4, (3, 4, 4), text_tokens=5, text_dim=16)
# The reward on this model is a fixed half of it.
WORLD = small_world.Settings(
    clips=64,
    held_out=4,
    prompts=2,
    generator_steps=2,
    generator_batch=2,
    reward_steps=2,
    reward_batch=2,
    pixel_steps=1,
)


def context(**changes):
    return harness.Context(**({"device": CPU, "preset": replace(SMALL, name="tiny")} | changes))


@pytest.fixture
def inline(monkeypatch):
    """Everything in this process, two rounds of timing."""

    @contextmanager
    def workers(context):
        yield small_world.Inline()

    monkeypatch.setattr(small_world, "workers", workers)
    rounds = harness.time_side_by_side
    monkeypatch.setattr(
        harness, "time_side_by_side", lambda *a, **k: rounds(*a, **{**k, "at_most": 1})
    )


# Variance of gradients.


def by_hand(plan, num_steps):
    """E[w wᵀ] over every ordered draw."""
    count = num_steps - 1
    found = torch.zeros(count, count, dtype=torch.float64)
    if plan.draws == "independent":
        draws = [(1 / count**plan.points, d) for d in itertools.product(range(count), repeat=3)]
    else:
        draws = [(float(p), [q.step for q in points]) for p, points in plan.outcomes(num_steps)]
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


def test_moments_are_means_over_trajectories_and_over_pairs_of_them():
    rows = torch.randn(6, 3, 5, dtype=torch.float64)  # trajectories, steps, parameters
    groups = rows.unflatten(0, (3, 2))
    sums = [g.sum(0) for g in groups]
    within = [sum(b @ b.T for b in g) for g in groups]
    products = variance.Products(sums, within, 2)
    for leave, kept in ((None, rows), (1, torch.cat([groups[0], groups[2]]))):
        w, c = products.moments(leave)
        torch.testing.assert_close(w, torch.stack([b @ b.T for b in kept]).mean(0))
        pairs = [a @ b.T for a, b in itertools.permutations(kept, 2)]
        torch.testing.assert_close(c, torch.stack(pairs).mean(0))


@pytest.mark.parametrize("draws", variance.DRAWS)
def test_flops_expected_of_a_plan(draws):
    plan, num_steps = GradientPlan.prfl(3, draws), 7
    found = []
    for probability, points in plan.outcomes(num_steps):
        distinct = len(points)
        found.append(float(probability) * (10 * (points[-1].step + 1 - distinct) + 100 * distinct))
    assert variance.expected_flops(plan, num_steps, 10, 100) == pytest.approx(sum(found))


def test_gradients_by_step_are_prfls():
    model = wan.build(SMALL, context())
    reward = LatentRewardModel.from_backbone(model, num_blocks=1).freeze()
    noise, conditions = wan.latents(SMALL, context()), wan.conditions(SMALL, context())
    rows = variance.gradients_by_step(model, reward, noise, conditions, 4)
    assert rows.shape[0] == 3
    prfl = PRFL(model, reward, FlowUniPC(), num_steps=4, weight=1.0)
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
    unsure = variance.sample_variance(torch.tensor([[9.0], [1.0], [-1.0]]))
    assert unsure is None or unsure.error is None


def test_records_of_points_relate_to_one_point():
    rows = torch.randn(8, 6, 40, dtype=torch.float64) + 1
    products = variance.Products(
        [g.sum(0) for g in rows.unflatten(0, (4, 2))],
        [sum(b @ b.T for b in g) for g in rows.unflatten(0, (4, 2))],
        2,
    )
    s = variance.Settings(groups=4, trajectories=2, num_steps=7, points=(1, 5), batches=(1,))
    records = variance.point_records(products, s, (10, 100))
    found = {(r["draws"], r["points"]): r for r in records}
    one, five = found["systematic", 1], found["systematic", 5]
    assert one["per_flop"] == 1 and one["per_flop_error"] == 0 < five["per_flop_error"]
    assert five["per_flop"] == pytest.approx(
        five["variance"] * five["flops"] / (one["variance"] * one["flops"])
    )
    table, _ = variance._table(records, s, "Trained.")
    assert len(table.rows) == 2 and all(len(r) == len(table.columns) for r in table.rows)
    assert table.rows[0][3] == "1.00"
    assert five["variance_error"] > 0

    def problems_of(value, error):
        other = {"per_flop": value, "per_flop_error": error}
        changed = [{**r, **other} if r["points"] == 5 else r for r in records]
        return variance._table(changed, s, "Trained.")[1]

    assert problems_of(0.75, 0.12) == []
    assert problems_of(0.75, 0.13) == [
        "batch 1: at equal FLOPs 5 points have 0.75 ± 0.13 times the variance of 1 point, "
        "expected below 1 by two standard errors"
    ]


# The split of a step.


def test_repeats_of_a_gradient_point():
    reference, one, many = split.WAYS
    assert split.repeats(reference)["rollout"] == split.repeats(one)["rollout"] == 19
    # The largest of 5 systematic indices of 39 steps is 34.6 on average.
    outcomes = many.plan.outcomes(40)
    largest = sum(float(p) * points[-1].step for p, points in outcomes)
    assert split.repeats(many)["rollout"] == pytest.approx((largest + 1 - 5) / 5)
    assert split.repeats(many)["caches"] == 1 / 5


def test_costs_lie_on_a_line_through_two_depths():
    few, more = Cost(10, 4, 6), Cost(15, 4, 8)
    assert split.line(few, more, (2, 3), 30) == Cost(150, 4, 62)
    assert split.total(few, more) == Cost(25, 8, 14)


@functools.cache
def parts(way):
    return split.parts(SMALL, way)


@pytest.mark.parametrize(
    "way", [pytest.param(split.WAYS[0], marks=pytest.mark.slow), split.WAYS[1]]
)
def test_parts_by_two_depths_are_those_of_the_whole_model(way):
    found, whole = parts(way), split._phases(SMALL, way, SMALL.layers)
    assert found["gradient"] == split.total(whole["forward"], whole["backward"])
    rollout = "rollout" if way.reference else "cached rollout"
    assert found["rollout"] == whole[rollout]
    if not way.reference:
        assert split.flops_of(whole[rollout]) < split.flops_of(whole["rollout"])
        assert split.flops_of(found["caches"]) > 0


def test_the_references_reward_costs_its_weight_gradients_and_projections():
    reference, ours = (parts(way)["reward"] for way in split.WAYS[:2])
    tokens, dim, ffn = SMALL.tokens, SMALL.dim, SMALL.ffn_dim
    projections = 2 * 2 * tokens * dim * dim  # keys and values, forward
    # Products of tokens with weights in the blocks' two halves: 6 D² + 2 D·F, a multiply-add each.
    weights = 2 * (2 * tokens * (6 * dim * dim + 2 * dim * ffn))
    assert split.flops_of(reference) - split.flops_of(ours) > 2 * projections + weights


def test_pooling_by_projections_is_the_folded_pooling():
    pool, x = QueryAttentionPool(16, 2, num_queries=3), torch.randn(2, 9, 16)
    torch.testing.assert_close(wan.ProjectedPool(pool)(x), pool(x))


def test_split_table_adds_up():
    flops = dict.fromkeys(split.PARTS, 1e12)
    record = {"preset": "p", "points": 1, "rollout_forwards": 19.0, "moved_bytes": {"rollout": 1e9}}
    records = [
        {**record, "way": "reference", "flops": flops},
        {**record, "way": "ours", "flops": {**flops, "rollout": 0.0, "SFT": 2e12}},
    ]
    first, second = split.table(records).rows
    assert first[-3:] == ["1.00×", "1.00×", "1.00 GB"] and first[0] == "p" and second[0] == ""
    assert second[-3:-1] == ["1.00×", "0.750×"]  # 5 of 5, and 3 of 4 without SFT
    assert second[3] == "–"


# Rollouts.


def test_counts_of_a_rollout():
    # More tokens than channels, as everywhere: a merged adapter costs what its matrix has.
    size = replace(SMALL, layers=2, latent=(5, 32, 32))
    records = {r["option"]: r for r in rollout_counts.count(size, num_steps=3)}
    plain, caches = records["patched"], records["caches"]
    assert records["unpatched"]["flops"] == plain["flops"] > caches["flops"]
    tokens, text, dim, blocks = size.tokens, size.text_tokens, size.dim, size.layers
    keys = 2 * 2 * text * dim * dim * blocks  # of each forward; the caches hold them once
    assert plain["flops"] - caches["flops"] > 2 * keys
    assert caches["cache_bytes"] > 2 * 2 * text * dim * blocks
    assert records["LoRA merged"]["flops"] < records["LoRA, caches"]["flops"]
    assert records["LoRA merged"]["moved_bytes"] < records["LoRA, caches"]["moved_bytes"]
    # Six layers of the tokens run in 8 bits, and with the attention the sum is larger.
    layers = 2 * tokens * (6 * dim * dim + 2 * dim * size.ffn_dim) * blocks * 3
    assert records["FP8 linears"]["eight_bit_flops"] == layers
    attention = 4 * tokens * tokens * dim * blocks * 3
    assert records["FP8 both"]["eight_bit_flops"] == layers + attention
    table = rollout_counts.table(list(records.values()))
    assert [row[1] for row in table.rows] == list(rollout_counts.OPTIONS)


def test_drift_of_a_hand_case():
    exact = {1: torch.tensor([[3.0, 4.0], [1.0, 0.0]]), 2: torch.ones(2, 2), 3: torch.ones(2, 2)}
    other = {1: torch.tensor([[3.0, 4.5], [1.0, 0.0]]), 3: torch.tensor([[1.0, 1.0], [2.0, 1.0]])}
    curve = rollout.drift_curve(other, exact)
    assert curve == pytest.approx({1: 0.1, 3: 1 / 2**0.5})  # 0.5 over 5; 1 over √2


@pytest.fixture
def tiny(monkeypatch):
    """Minimal sizes for the rollout suite."""
    size = Preset("tiny", 32, 2, 64, 2, (3, 4, 4), text_tokens=5, text_dim=16)
    for module in (rollout_options, methods, step):
        monkeypatch.setattr(module, "TINY", size)
    for module in (rollout, rollout_options):
        monkeypatch.setattr(module, "SOLVER_STEPS", 4)
    for module in (rollout, rollout_options):
        monkeypatch.setattr(module, "MANY", (2,))
    monkeypatch.setattr(rollout, "SHOWN", (2, 4))
    monkeypatch.setattr(rollout_options, "TRAINING_CLIPS", 32)
    monkeypatch.setattr(rollout_options, "TRAINING_STEPS", 2)
    wanted = ("no engine", "caches", "FP8 both", "every second step", "LoRA merged")
    shown = {n: o for n, o in rollout_options.OPTIONS.items() if n in wanted or o.cuda}
    shown = {n: replace(o, against="no engine", lora=False) for n, o in shown.items()}
    monkeypatch.setattr(rollout_options, "OPTIONS", shown)
    monkeypatch.setattr(split, "SIZES", ("wan1.3b-480p",))
    monkeypatch.setattr(rollout, "PRESETS", {"wan1.3b-480p": size})
    few = {name: rollout_counts.OPTIONS[name] for name in ("unpatched", "FP8 both")}
    monkeypatch.setattr(rollout_counts, "OPTIONS", few)
    monkeypatch.setattr(split, "WAYS", split.WAYS[1:2])
    return size


def test_drift_is_what_the_engine_reports(tiny):
    trained = rollout_options.trained_subject(context())
    exact = trained.latents(rollout_options.PLAIN)
    for name in ("FP8 both", "every second step"):
        trajectory = trained.run(name)
        engine = trained.engines[name]
        assert isinstance(engine, RolloutEngine) and trajectory.drift
        mine = rollout.drift_curve(trained.latents(name), exact)
        assert {step: mine[step] for step in trajectory.drift} == pytest.approx(trajectory.drift)
    assert min(rollout.drift_curve(trained.latents("FP8 both"), exact).values()) > 0


def test_what_a_cpu_emulates_has_no_time(inline, tiny, tmp_path, capsys):
    arguments = ["--suite", "rollout", "--device", "cpu", "--out", str(tmp_path)]
    assert bench_run.main(arguments) == 0, capsys.readouterr().err
    suite = json.loads((tmp_path / "results.json").read_text())["suites"]["rollout"]
    tables = {table["name"]: table for table in suite["tables"]}
    assert list(tables) == ["rollout", "rollout-wan", "split"]
    rows = {row[0]: row[1:] for row in tables["rollout"]["rows"]}
    assert "caches, compiled blocks" not in rows
    for name, (seconds, of_compared, flops, peak, *drift, off, cosine, against) in rows.items():
        emulated = rollout_options.OPTIONS[name].eight_bits
        assert (seconds == "–") == (of_compared == "–") == (peak == "–") == emulated, name
        assert flops != "–"
        assert (drift[0] == "–") == (off == "–") == (cosine == "–") == (against == "–")
    assert rows["caches"][4:] == ["0", "0", "0", "1.00000", rollout_options.PLAIN]
    for name in ("FP8 both", "every second step"):
        assert rows[name][5] not in ("0", "–") and rows[name][6] not in ("0", "–")
    assert suite["figures"] == ["rollout_drift.png", "split.png"]
    assert any("emulated" in note for note in tables["rollout"]["notes"])
    costs = {c["option"]: c for c in suite["cases"] if c["case"] == "rollout"}
    # Of 4 steps: the caches are those of 2, too.
    half = replace(rollout_options.subject(context()), num_steps=2)
    assert costs["every second step"]["flops"] == harness.count_flops(lambda: half.run("caches"))


def test_caches_that_change_a_bit_are_a_problem():
    records = [
        {"option": "caches", "by_step": {1: 0.0, 2: 1e-9}, "gradient": {"relative_l2": 0.0}},
        {"option": "LoRA, caches", "by_step": {1: 0.0}, "gradient": {"relative_l2": 1e-8}},
        {"option": "FP8 both", "by_step": {1: 0.1}, "gradient": {"relative_l2": 0.1}},
    ]
    assert rollout.exactness(records) == [
        "caches: latents are 1.0e-09 off, expected the same bits",
        "LoRA, caches: the gradient is 1.0e-08 off, expected the same bits",
    ]


def test_gradient_off_of_a_hand_case():
    found = rollout.compared(torch.tensor([4.0, 3.0]), torch.tensor([4.0, 0.0]))
    assert found == pytest.approx({"relative_l2": 0.75, "cosine": 0.8})


def test_gradient_of_an_option_is_prfls_after_its_rollout(tiny):
    trained = rollout_options.trained_subject(context())
    exact = trained.gradient(rollout_options.PLAIN)
    assert torch.equal(trained.gradient("caches"), exact) and exact.norm() > 0
    reward, model = trained.reward, trained.model
    prfl = PRFL(model, reward, FlowUniPC(), num_steps=4, weight=1.0)
    prfl(trained.noise, trained.conditions, indices=(2,))
    assert torch.equal(variance.flat_gradient(list(model.parameters())), exact)
    other = trained.gradient("FP8 both")
    assert 0 < harness.relative_error(other, exact) < 1


def test_options_that_choose_by_noise_level_have_no_time_on_a_gpu():
    chosen = [name for name, option in rollout_options.OPTIONS.items() if option.by_level]
    assert chosen == ["FP8 both, σ ≥ 0.8", "FP8 both, σ ≤ 0.8"]


# Methods and steps.


def test_every_method_has_a_draw_of_its_plan():
    for method in plans.METHODS:
        drawn = method.plan.draw(method.num_steps, torch.Generator().manual_seed(0))
        points = 1 if method.plan.to == "latent" else len(drawn) + method.plan.renoised
        assert points == method.points, method.name
        if method.typical is None:
            continue
        outcomes = method.plan.outcomes(method.num_steps)
        typical = [Point(p, 1, 0.0) if isinstance(p, int) else p for p in method.typical]
        assert len(typical) == len(drawn), method.name
        for i, point in enumerate(typical):
            for value in ("step", "depth"):
                expected = sum(p * getattr(points[i], value) for p, points in outcomes)
                assert abs(getattr(point, value) - expected) <= 1, (method.name, value)


def test_methods_by_name(monkeypatch):
    monkeypatch.setattr(methods, "CHOSEN", ("DRaFT-1", "PRFL, 5 points"))
    assert [m.name for m in methods.chosen()] == ["PRFL, 5 points", "DRaFT-1"]
    monkeypatch.setattr(methods, "CHOSEN", ("DRaFT",))
    with pytest.raises(Unavailable, match="'DRaFT' is none of RGB ReFL, all frames"):
        methods.chosen()


def test_methods_of_the_gpu_script_exist():
    script = (ROOT / "bench" / "gpu.sh").read_text()
    names = [
        n for found in re.findall(r'(?:names|late|long)="(.+)"', script) for n in found.split(";")
    ]
    assert len(names) == 14 and set(names) <= {m.name for m in plans.METHODS}


def test_methods_table_is_per_point_and_relative_to_one():
    def case(name, points, seconds, flops, peak):
        return {
            "method": name,
            "points": points,
            "flops": flops,
            "peak_bytes": peak,
            "times": {"median_s": seconds},
        }

    cases = [
        case("PRFL, 1 point", 1, 2.0, 4e9, 1e6),
        case("PRFL, 5 points", 5, 5.0, 8e9, 2e6),
        {"method": "DRaFT-1", "points": 1, "skipped": "out of memory"},
        case("SFT", 1, 1.0, 1e9, 3e6),
    ]
    spread = {"PRFL, 1 point": variance.Estimate(2.5, 0.25)}
    table, problems = methods._table(cases, "Sizes.", spread)
    rows = {row[0]: row[1:] for row in table.rows}
    assert problems == []
    assert rows["PRFL, 1 point"] == [
        "2.00 s",
        "1.00 MB",
        "4.00 GFLOP",
        "1.00×",
        "1.00×",
        "2.5 ± 0.2",
    ]
    assert rows["PRFL, 5 points"][2:5] == ["1.60 GFLOP", "0.500×", "0.400×"]
    # One supervised step a point: (1 + 1) / (2 + 1) seconds, (1.6 + 1) / (4 + 1) GFLOP.
    assert rows["PRFL, 5 points + SFT"][1:5] == ["3.00 MB", "2.60 GFLOP", "0.667×", "0.520×"]
    assert rows["DRaFT-1"][0] == "out of memory" and "DRaFT-1 + SFT" not in rows
    assert all(len(row) == len(table.columns) for row in table.rows)
    drawn = next(note for note in table.notes if "Steps with gradient" in note)
    assert "PRFL, 5 points 3, 11, 19, 27, 35." in drawn and "RGB ReFL" not in drawn
    cases[1]["flops"] = 16e9
    table, problems = methods._table(cases, "", {})
    assert "variance" not in table.columns
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert problems == ["5 points cost 0.800 of one point's FLOPs each, target 0.5"]


@pytest.mark.slow
def test_methods_run_end_to_end(inline, tiny, monkeypatch, tmp_path):
    few = variance.Settings(groups=3, trajectories=1, calls=2, points=(1, 5), batches=(1,))
    monkeypatch.setattr(variance, "SETTINGS", replace(few, num_steps=11))
    monkeypatch.setattr(variance, "WORLD", WORLD)
    short = [replace(m, num_steps=7) for m in plans.METHODS if m.name.startswith("PRFL")]
    known = [replace(short[0], typical=(3,)), replace(short[1], typical=(0, 1, 2, 3, 4))]
    known += [m for m in plans.METHODS if m.name.startswith(("ControlNet++", "ReNO"))]
    for module in (methods, plans):
        monkeypatch.setattr(module, "METHODS", tuple(known))
    status = bench_run.main(["--suite", "methods", "--device", "cpu", "--out", str(tmp_path)])
    suite = json.loads((tmp_path / "results.json").read_text())["suites"]["methods"]
    assert "error" not in suite, suite.get("traceback")
    # An untrained model may say anything of the variance, and of 7 steps 5 are no bargain.
    assert status == bool(suite["problems"])
    assert any("of one point's FLOPs each" in problem for problem in suite["problems"])
    costs, by_points = suite["tables"]
    assert costs["name"] == "methods" and by_points["name"] == "variance"
    names = ["PRFL, 1 point", "PRFL, 5 points", "ControlNet++", "ReNO, one-step generator"]
    paired = [f"{name} + SFT" for name in names[:2]]
    assert [row[0] for row in costs["rows"]] == names + paired
    assert costs["rows"][3][-1] == "–"  # no gradient of the parameters
    assert suite["figures"] == ["methods.png", "variance.png"]


def test_a_step_is_split_into_its_parts(tiny):
    found = step.run(context(baselines=("eager", "compiled")))
    table, records = found.tables[0], found.cases
    assert [r["way"] for r in records] == ["eager", "prfl_fast, 1 point", "prfl_fast, 5 points"]
    for record in records:
        seconds = record["seconds_per_point"]
        assert set(seconds) == set(split.PARTS) and min(seconds.values()) > 0
        assert record["peak_bytes"] > 0
    assert list(found.figures) == ["step.png"]
    eager, one = records[:2]
    both = [sum(r["seconds_per_point"].values()) for r in (eager, one)]
    assert table.rows[1][-2] == harness_ratio(both[0] / both[1])
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert found.problems == [] and [r["reward_off"] < 1e-6 for r in records] == [True] * 3
    assert [r.get("latents_off", -1) < 1e-4 for r in records] == [True] * 3
    assert 0 < one["latents_off"] and "latents_off" not in records[2]
    assert set(records[2]["rewards"]) == {str(index) for index in plans.MANY}


def test_steps_without_compiled_models():
    names = [way.name for way in step.ways(context(baselines=("eager",), compile_ops=True))]
    assert names == ["eager", "prfl_fast, 1 point", "prfl_fast, 5 points"]
    assert [way.name for way in step.ways(context(baselines=("eager",)))] == names
    assert [way.name for way in step.ways(context(baselines=("eager", "compiled")))] == names


def test_a_way_with_another_reward_is_a_problem():
    names = ["eager", "prfl_fast, 1 point", "prfl_fast, 5 points, FP8 rollout"]
    values = [0.5, 0.51, 0.6]
    records = [{"way": n, "rewards": {"19": v}} for n, v in zip(names, values, strict=True)]

    def add_latents(value):
        for record, latents in zip(records, (torch.ones(4), torch.full((4,), value)), strict=False):
            record["latents"] = latents

    add_latents(1.01)
    records.append({"way": "reference", "skipped": "no flash_attn"})
    on_cuda = context(device=torch.device("cuda"), baselines=("eager", "reference"))
    assert step.compare_rewards(records, on_cuda) == []
    add_latents(1.03)
    records[1]["rewards"]["19"] = 0.53
    assert step.compare_rewards(records, on_cuda) == [
        "prfl_fast, 1 point: the reward after step 19 is 3.0e-02 off eager's, expected at most "
        "2e-02",
        "prfl_fast, 1 point: the latents after step 19 are 3.0e-02 off eager's, expected at most "
        "2e-02",
    ]
    assert all("latents" not in record for record in records)
    assert records[2]["reward_off"] == pytest.approx(0.1) and "reward_off" not in records[3]
    add_latents(1.0)
    records[1]["rewards"]["19"] = float("nan")
    assert len(step.compare_rewards(records, on_cuda)) == 1


def harness_ratio(value):
    from report import ratio

    return ratio(value)


def test_sizes_that_take_a_cpu_hours_are_refused():
    for suite in (rollout, methods, step):
        with pytest.raises(Unavailable, match="use --preset tiny"):
            suite.run(context(preset=harness.PRESETS["wan14b-720p"]))
