"""The split of a step and the suite on rollouts: counts on fake tensors, drift, tables."""

import functools
from dataclasses import replace

import harness
import pytest
import torch
from bench_runs import SMALL, make_context, run_suites
from experiments import rollout_options, variance
from suites import rollout, rollout_counts, split, wan

from prfl_fast.feedback.step import PRFL
from prfl_fast.planning.costs import Cost
from prfl_fast.rewards.pooling import QueryAttentionPool
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.schedulers import FlowUniPC

pytest.importorskip("diffusers")


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


@pytest.mark.slow
@pytest.mark.parametrize("way", split.WAYS[:2])
def test_parts_by_two_depths_are_those_of_the_whole_model(way):
    found, whole = parts(way), split._phases(SMALL, way, SMALL.layers)
    assert found["gradient"] == split.total(whole["forward"], whole["backward"])
    rollout = "rollout" if way.reference else "cached rollout"
    assert found["rollout"] == whole[rollout]
    if not way.reference:
        assert whole[rollout].flops < whole["rollout"].flops
        assert found["caches"].flops > 0


@pytest.mark.slow
def test_the_references_reward_costs_its_weight_gradients_and_projections():
    reference, ours = (parts(way)["reward"] for way in split.WAYS[:2])
    tokens, dim, ffn = SMALL.tokens, SMALL.dim, SMALL.ffn_dim
    projections = 2 * 2 * tokens * dim * dim  # keys and values, forward
    # Products of tokens with weights in the blocks' two halves: 6 D² + 2 D·F, a multiply-add each.
    weights = 2 * (2 * tokens * (6 * dim * dim + 2 * dim * ffn))
    assert reference.flops - ours.flops > 2 * projections + weights


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


@pytest.mark.slow
def test_counts_of_a_rollout():
    # More tokens than channels, as everywhere: a merged adapter costs what its matrix has.
    size = replace(SMALL, layers=2, latent=(5, 32, 32))
    records = {r["option"]: r for r in rollout_counts.count(size, num_inference_steps=3)}
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


@pytest.mark.slow
def test_drift_is_what_the_engine_reports(tiny):
    trained = rollout_options.trained_subject(make_context())
    exact = trained.latents(rollout_options.PLAIN)
    for name in ("FP8 both", "every second step"):
        trajectory = trained.run(name)
        engine = trained.engines[name]
        assert isinstance(engine, RolloutEngine) and trajectory.drift
        mine = rollout.drift_curve(trained.latents(name), exact)
        assert {step: mine[step] for step in trajectory.drift} == pytest.approx(trajectory.drift)
    assert min(rollout.drift_curve(trained.latents("FP8 both"), exact).values()) > 0


@pytest.mark.slow
def test_what_a_cpu_emulates_has_no_time(inline, tiny, tmp_path, capsys):
    status, record = run_suites(tmp_path, "rollout")
    assert status == 0, capsys.readouterr().err
    suite = record["suites"]["rollout"]
    tables = {table["name"]: table for table in suite["tables"]}
    assert list(tables) == ["rollout", "rollout-wan", "split", "gradient-point"]
    rows = {row[0]: row[1:] for row in tables["rollout"]["rows"]}
    assert "caches, compiled blocks" not in rows
    for name, (seconds, of_compared, flops, peak, *drift, _, against) in rows.items():
        emulated = rollout_options.OPTIONS[name].eight_bits
        assert (seconds == "–") == (of_compared == "–") == (peak == "–") == emulated, name
        assert flops != "–"
        assert all((cell == "–") == (against == "–") for cell in drift), name
    assert rows["caches"][4:] == ["0", "0", "0", "1.00000", "–", rollout_options.PLAIN]
    for name in ("FP8 both", "every second step"):
        assert rows[name][5] not in ("0", "–") and rows[name][6] not in ("0", "–")
    assert suite["figures"] == ["rollout_drift.png", "split.png"]
    assert any("emulated" in note for note in tables["rollout"]["notes"])
    costs = {c["option"]: c for c in suite["cases"] if c["case"] == "rollout"}
    # Of 4 steps: the caches are those of 2, too.
    half = replace(rollout_options.subject(make_context()), num_inference_steps=2)
    assert costs["every second step"]["flops"] == harness.count_flops(lambda: half.run("caches"))
    points = tables["gradient-point"]["rows"]
    assert [row[1] for row in points][3:] == ["FP8 both", "every second step"]
    drift = {c["option"]: c for c in suite["cases"] if c["case"] == "drift"}["FP8 both"]
    assert float(points[3][-1].split()[0]) == pytest.approx(drift["in_prfl"]["drift"], abs=6e-5)


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
    trained = rollout_options.trained_subject(make_context())
    exact = trained.gradient(rollout_options.PLAIN)
    assert torch.equal(trained.gradient("caches"), exact) and exact.norm() > 0
    reward, model = trained.reward, trained.model
    prfl = PRFL(model, reward, FlowUniPC(), num_inference_steps=4, weight=1.0)
    prfl(trained.noise, trained.conditions, indices=(2,))
    assert torch.equal(variance.flat_gradient(list(model.parameters())), exact)
    other = trained.gradient("FP8 both")
    assert 0 < harness.relative_error(other, exact) < 1
    rollout_options.OPTIONS["FP8 steps"] = rollout_options.Option(None, fp8_steps=True)
    other = trained.gradient("FP8 steps")
    assert 0 < harness.relative_error(other, exact) < 0.2
    assert torch.equal(trained.gradient("caches"), exact)


def test_drift_in_prfl_is_what_the_engines_find_before_several_draws(tiny, monkeypatch):
    reusing = replace(rollout_options.OPTIONS["FP8 both"].config, first_block_cache=1e9)
    options = {"reusing": rollout_options.Option(reusing)} | rollout_options.OPTIONS
    monkeypatch.setattr(rollout_options, "OPTIONS", options)
    trained = rollout_options.trained_subject(make_context())
    found = trained.in_prfl("reusing")
    # One point in steps 0 … 2: no step before the first draw, then two steps, twice the same.
    assert [steps for _, steps in trained.checked] == [(0,), (2,)]
    assert found["drift"] == max(trained.checked["reusing", (2,)].drift.values()) > 0
    # The second step runs the first of 4 blocks.
    assert found["forwards"] == 2 and found["blocks"] == 4 and found["saved"] == 0.75
    assert all(p.grad is None for p in trained.model.parameters())


def test_options_whose_steps_cost_differently_have_no_time_on_a_gpu():
    chosen = [name for name, option in rollout_options.OPTIONS.items() if option.by_level]
    reusing = [n for n in rollout_options.OPTIONS if n.startswith(("TeaCache ", "first block "))]
    assert len(reusing) == 8
    fp8, guided = ["FP8 both, σ ≥ 0.8", "FP8 both, σ ≤ 0.8"], "guidance, σ ≤ 0.97"
    strides = [n for n in rollout_options.OPTIONS if n.startswith("strides by σ")]
    assert chosen == [*fp8, *strides, *reusing, guided] and len(strides) == 3
