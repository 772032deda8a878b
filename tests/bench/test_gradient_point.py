"""Cost per gradient point: counted forwards and steps, the record of the small world, the table."""

import math
from dataclasses import replace

import pytest
import torch
from bench_runs import SMALL
from experiments import rollout_options
from suites import gradient_point
from suites.gradient_point import Counts, Forward, Work
from suites.rollout_counts import EightBits
from torch._subclasses.fake_tensor import FakeTensorMode

from prfl_fast import FlowUniPC, GradientPlan, RolloutConfig
from prfl_fast.kernels.attn.sparse import KeyBlocks, sparse_attention
from prfl_fast.planning.costs import Cost
from prfl_fast.rollout import Sampler, Trajectory

pytest.importorskip("diffusers")
BOTH = RolloutConfig(fp8_linears=(0.8, 1), fp8_attention=(0, 1))


def test_forwards_of_a_small_model_by_hand():
    size = replace(SMALL, layers=2)
    exact, eight = (
        gradient_point.forward(size, config, 0.9)
        for config in (gradient_point.EXACT_CONFIG, replace(BOTH, stride=4, teacache=0.1))
    )
    tokens, text, dim, ffn = size.tokens, size.text_tokens, size.dim, size.ffn_dim
    # Without keys and values of the text, which are cached: six products with D×D, two with D×F.
    linears = 2 * tokens * (6 * dim * dim + 2 * dim * ffn)
    # From and to the 64 values of a patch.
    ends = 2 * 2 * tokens * dim * 64
    own, cross = 4 * tokens * tokens * dim, 4 * tokens * text * dim
    for blocks, work, in_8_bits in zip((2, 1, 0), exact, eight, strict=True):
        assert work.products == blocks * linears + ends
        assert work.attention == blocks * (own + cross)
        assert work.products_8_bit == work.attention_8_bit == 0
        assert in_8_bits.products == ends and in_8_bits.products_8_bit == blocks * linears
        assert in_8_bits.attention == blocks * cross and in_8_bits.attention_8_bit == blocks * own
        assert in_8_bits.flops == work.flops
        assert work.weighted - in_8_bits.weighted == blocks * (linears + own) / 2
        assert work.moved_bytes > 0


def test_noise_levels_choose_the_forward():
    noisy, clean = (gradient_point.key_of(BOTH, sigma) for sigma in (0.9, 0.5))
    assert noisy != clean
    assert gradient_point.key_of(replace(BOTH, stride=2, first_block_cache=0.1), 0.9) == noisy
    assert gradient_point.key_of(replace(BOTH, fp8_linears=(0, 1)), 0.9) == noisy
    assert gradient_point.key_of(replace(BOTH, fp8_linears=None), 0.9) == clean
    assert gradient_point.key_of(gradient_point.EXACT_CONFIG, 0.9) not in (noisy, clean)


def test_steps_of_rollouts_by_hand(monkeypatch):
    monkeypatch.setattr(gradient_point, "SOLVER_STEPS", 6)
    one, every = GradientPlan.prfl(1), RolloutConfig()
    # The step with gradient is drawn from 0 … 4. All before it run.
    assert gradient_point.rollout_steps(every, one) == pytest.approx(
        {0: 0.8, 1: 0.6, 2: 0.4, 3: 0.2}
    )
    # In twos: 0 before 1 and 2, also 2 before 3 and 4.
    pairs = RolloutConfig(stride=2)
    assert gradient_point.rollout_steps(pairs, one) == pytest.approx({0: 0.8, 2: 0.4})


@pytest.mark.parametrize("points", (1, 5))
def test_exact_rollouts_take_the_steps_that_the_plan_expects(points):
    plan = GradientPlan.prfl(points)
    steps = gradient_point.rollout_steps(RolloutConfig(), plan)
    assert sum(steps.values()) == pytest.approx(plan.expected_forwards(40))


def test_steps_of_rollouts_are_those_of_trajectories():
    config, plan = RolloutConfig(stride=rollout_options.STRIDES), GradientPlan.prfl(5)
    found: dict[int, float] = {}
    for probability, points in plan.outcomes(40):
        sampler = Sampler(lambda x, t, c: torch.zeros_like(x), FlowUniPC(), 40, rollout=config)
        visit = [point.step for point in points]
        trajectory = Trajectory(sampler, torch.ones(1, 1, 1, 1, 1), {}, visit=visit)
        for stop in visit:
            before = [trajectory.index]
            trajectory.run(stop, lambda t=trajectory, b=before: b.append(t.index))
            for step in before[:-1]:
                found[step] = found.get(step, 0.0) + float(probability)
            trajectory.move_to(trajectory.solve(trajectory.velocity()))
    assert gradient_point.rollout_steps(config, plan) == pytest.approx(found)


def test_reused_share_by_hand():
    # 12 forwards of 4 blocks; 6 of them ran one block, or 3 none.
    first = {"forwards": 12, "saved": 6 * 3 / 4, "blocks": 4}
    assert gradient_point.reused_share(RolloutConfig(first_block_cache=0.1), first) == 0.5
    none = {"forwards": 12, "saved": 3.0, "blocks": 4}
    assert gradient_point.reused_share(RolloutConfig(teacache=0.1), none) == 0.25
    assert gradient_point.reused_share(RolloutConfig(), none) == 0.0


def test_work_of_a_counted_phase():
    # FLOPs in 8 bits are part of the phase's.
    work = Work.of(Cost(100, 60, 7, attention_backward_flops=50), Cost(30, 40))
    assert work == Work(70, 70, 30, 40, 7)
    assert work.flops == 210 and work.weighted == 175
    assert work + work == work * 2 == Work(140, 140, 60, 80, 14)


@pytest.mark.parametrize("variant", ("exact", "int8_fp8"))
def test_sparse_attention_on_fake_tensors_counts_its_density(variant):
    with FakeTensorMode():
        q = torch.zeros(1, 256, 64, dtype=torch.bfloat16)
        blocks = KeyBlocks.from_mask(torch.ones(1, 2, 2, 4, dtype=torch.bool), 128, 64)
        ledger = EightBits(density=0.25)
        with ledger:
            ledger.start_phase("forward")
            sparse_attention(q, q, q, blocks, heads=2, variant=variant)
    work = Work.of(ledger.costs()["forward"], ledger.eight_bits.get("forward", Cost()))
    dense = 4 * 256 * 256 * 64
    bf16, in_8_bits = (0.25, 0) if variant == "exact" else (0, 0.25)
    assert (work.attention, work.attention_8_bit) == (bf16 * dense, in_8_bits * dense)


def hand_counts():
    """Return counts of a model whose forward has 10 FLOPs, in 8 bits if a config says so."""
    rest = {"gradient": Work(25), "reward": Work(5), "SFT": Work(20), "optimizer": Work()}
    forwards = {}
    for config, work in ((gradient_point.EXACT_CONFIG, Work(10)), (FP8, Work(0, 0, 10))):
        key = gradient_point.key_of(config, 0.5)
        forwards[key] = Forward(work, Work(1), Work())
    reference = {**rest, "rollout": Work(10), "caches": Work()}
    return Counts("size", reference, {**rest, "caches": Work(5), "rollout": Work(10)}, forwards)


FP8 = RolloutConfig(compile="off", fp8_linears=(0, 1), fp8_attention=(0, 1))
CACHE = RolloutConfig(compile="off", teacache=0.1)


def in_prfl(name, drift, saved=0.0):
    return {
        "option": name,
        "in_prfl": {"drift": drift, "forwards": 10, "saved": saved, "blocks": 4},
    }


@pytest.fixture
def by_hand(monkeypatch):
    monkeypatch.setattr(gradient_point, "CHECK_EVERY", 10)
    configs = {"FP8": FP8, "cache .1": CACHE, "cache .2": replace(CACHE, teacache=0.2)}
    configs["cache .3"] = replace(CACHE, teacache=0.3)
    drifts = [{"option": "caches"}, in_prfl("FP8", 0.01), in_prfl("cache .1", 0.01, 2.0)]
    drifts += [in_prfl("cache .2", 0.02, 5.0), in_prfl("cache .3", 0.03, 9.0)]
    return gradient_point.records(hand_counts(), configs, drifts)


def test_records_by_hand(by_hand):
    rows = {r["way"]: r for r in by_hand}
    reference, one, many, fp8 = by_hand[:4]
    assert gradient_point.weighted(reference) == 190 + 25 + 5 + 20
    assert gradient_point.weighted(one) == pytest.approx(190 + 5 + 25 + 5 + 20)
    steps = GradientPlan.prfl(5).expected_forwards(40) / 5
    assert many["rollout_forwards"] == pytest.approx(steps)
    assert gradient_point.weighted(many) == pytest.approx(10 * steps + 1 + 50)
    # One of ten rollouts is checked by an exact one to its last point, 34.6 steps on average.
    check = 10 * (steps + 4 / 5) / 10
    assert gradient_point.weighted(fp8) == pytest.approx(5 * steps + 1 + 50 + check)
    assert many["times_cheaper"] == pytest.approx(
        {
            "with SFT": 240 / (10 * steps + 51),
            "without SFT": 220 / (10 * steps + 31),
            "SFT once a trajectory": 240 / (10 * steps + 31 + 20 / 5),
        }
    )
    # Half of the forwards run no block.
    assert gradient_point.weighted(rows["cache .2"]) == pytest.approx(5 * steps + 51 + check)
    assert rows["cache .2"]["rollout_forwards"] == pytest.approx(steps / 2)


def test_table_has_the_cheapest_threshold_within_the_limit(by_hand):
    table = gradient_point.table(by_hand)
    ways = [row[1] for row in table.rows]
    assert ways == ["as the reference, 1 point", "exact, 1 point", "exact, 5 points", "FP8"] + [
        "cache .2"
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert [row[-1] for row in table.rows] == ["–", "–", "–", "0.0100", "0.0200"]
    assert table.rows[0][-4:-1] == ["1.00×"] * 3


def test_the_verdict_names_rows_that_reach_both_goals_within_the_limit(by_hand, monkeypatch):
    monkeypatch.setattr(gradient_point, "GOALS", {"with SFT": 2.8, "without SFT": 3.0})
    steps = GradientPlan.prfl(5).expected_forwards(40) / 5
    left = min(240 / 2.8 - 51, 220 / 3 - 31)  # for a rollout and its checks
    every = math.ceil(10 * (steps + 4 / 5) / (left - 5 * steps))
    weight = f"(never checked, 8-bit FLOPs may count up to {left / (10 * steps):.2f})"
    rarer = f"FP8 with check_every ≥ {every} {weight}; cache .2 with check_every ≥ {every}."
    assert every > gradient_point.CHECK_EVERY
    found = gradient_point.table(by_hand).notes[-1]
    assert found.endswith(f"reached by no row, and if drift is checked less often by {rarer}")
    monkeypatch.setattr(gradient_point, "GOALS", {"with SFT": 2.0, "without SFT": 2.0})
    found = gradient_point.table(by_hand).notes[-1]
    assert found.endswith("reached by exact, 5 points; FP8; cache .1; cache .2.")
    for row in by_hand:
        row["drift"] = 0.021
    found = gradient_point.table(by_hand)
    assert found.notes[-1].endswith("reached by no row.")
    assert found.rows[-1][-1] == "0.0210 (over)"
    for row in by_hand:
        row["drift"] = 0.0
    monkeypatch.setattr(gradient_point, "GOALS", {"with SFT": 2.5, "without SFT": 30.0})
    assert gradient_point.table(by_hand).notes[-1].endswith("reached by no row.")
