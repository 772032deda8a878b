"""The planner's simulation of every gradient that trains, against PRFL steps on real tensors."""

from dataclasses import replace

import pytest
from counted_steps import counted
from plans import SMALL, ledger_of
from tiers import slow_except

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.gpu_specs import find_gpu
from prfl_fast.planning.search import step_seconds
from prfl_fast.planning.simulated_feedback import EARLIER_PHASES, latest_points
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.workload import Workload

CONFIG = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}
SIZE = {"frames": 9, "height": 256, "width": 256, "text_tokens": 32, "reward_blocks": 2}
WORK = Workload(CONFIG, **SIZE, precision="fp32", sft=False, num_inference_steps=6)
PLANS = {
    "points": GradientPlan.prfl(3),
    "independent points": GradientPlan.prfl(8, "independent"),
    "refl": GradientPlan.refl(0.5),
    "draft 1": GradientPlan.draft(1),
    "draft 2": GradientPlan.draft(2),
    "draft 4": GradientPlan.draft(4),
    "draft all": GradientPlan.draft(None),
    "draft-lv": GradientPlan.draft_lv(2),
    "alignprop": GradientPlan.alignprop(),
    "controlnet++": GradientPlan.controlnet_plus_plus(0.5),
    "instructvideo": GradientPlan.instruct_video(0.6, 2, 3),
    "rg-lcd": GradientPlan.rg_lcd(),
}
FULL = MemoryConfig("fp32", "full")


def close(workload, memory=FULL):
    """Compare predicted and counted bytes."""
    predicted = ledger_of(workload, (memory, memory), fake=True)
    real = counted(workload, memory, memory)
    print(f"predicted {predicted.peak}, counted {real}, {predicted.peak / real - 1:+.2%}")
    assert predicted.peak_phase != "optimizer"
    return abs(predicted.peak - real) <= 0.01 * real


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", slow_except(PLANS, ("draft 4", "draft-lv")))
def test_predicted_bytes_are_those_counted(name):
    assert close(replace(WORK, gradient_plan=PLANS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(
    ("train", "memory"),
    [
        ("full", MemoryConfig("fp32", "none")),
        ("lora", MemoryConfig("fp32", "attention", "cpu", 256)),
        ("lora", MemoryConfig("bf16", "full", "cpu", stream_weights=1)),
    ],
    ids=str,
)
def test_predicted_bytes_under_other_policies(name, train, memory):
    assert close(replace(WORK, gradient_plan=PLANS[name], train=train), memory)


@pytest.mark.slow
def test_predicted_bytes_with_a_divergence():
    assert close(replace(WORK, gradient_plan=PLANS["draft 4"], divergence=True))


DEEP = replace(
    WORK, model={**CONFIG, "num_layers": 7}, reward_blocks=6, gradient_plan=PLANS["draft 4"]
)


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "memory",
    [
        pytest.param(FULL, marks=pytest.mark.slow),
        pytest.param(MemoryConfig("fp32", "none"), marks=pytest.mark.slow),
        MemoryConfig("fp32", "attention", "cpu", 256),
    ],
    ids=str,
)
def test_repeated_blocks_are_those_of_the_whole_model(memory):
    found, expected = (simulate(DEEP, memory, memory, whole=whole) for whole in (False, True))
    assert found == expected
    assert {*EARLIER_PHASES} < {*found.costs}


@pytest.mark.slow
def test_work_of_the_steps_before_the_last():
    work = replace(WORK, num_inference_steps=12)
    one, four, ten = (
        simulate(replace(work, gradient_plan=GradientPlan.draft(k)), FULL, FULL) for k in (1, 4, 10)
    )
    for phase in ("forward", "reward", "reward backward", "rollout"):
        assert four.costs[phase].flops == one.costs[phase].flops
    assert four.costs["earlier forward"].flops == one.costs["rollout"].flops > 0
    assert four.costs["recompute"].flops == four.costs["earlier forward"].flops
    assert four.costs["earlier backward"].flops >= four.costs["backward"].flops
    # One of the earlier steps is run; the others keep their latents.
    assert ten.costs["earlier forward"].flops == four.costs["earlier forward"].flops
    latents = 4 * 16 * 3 * 32 * 32
    assert 6 * latents <= ten.peak - four.peak <= 20 * latents


def test_steps_of_a_trajectory():
    align = replace(WORK, gradient_plan=PLANS["alignprop"])
    assert align.earlier_steps == pytest.approx(2.5) == align.rollout_forwards  # K of 1 to 6
    draft = replace(WORK, gradient_plan=PLANS["draft 4"])
    assert (draft.earlier_steps, draft.rollout_forwards, draft.evaluations) == (3, 2, 1)
    repeated = replace(WORK, gradient_plan=PLANS["draft-lv"])
    assert (repeated.earlier_steps, repeated.rollout_forwards, repeated.evaluations) == (0, 5, 3)
    run = simulate(draft, FULL, FULL)
    gpu = find_gpu("h200")
    seconds, once = (
        step_seconds(run.costs, gpu, replace(draft, gradient_plan=plan))
        for plan in (PLANS["draft 4"], PLANS["draft 2"])
    )
    for phase in EARLIER_PHASES:
        assert seconds[phase] == pytest.approx(3 * once[phase])
    assert seconds["backward"] == once["backward"]


@pytest.mark.parametrize("name", PLANS)
def test_the_latest_points_may_be_drawn(name):
    plan = PLANS[name]
    points = latest_points(plan, 6)
    drawn = [points for _, points in plan.outcomes(6)]
    assert points[-1].step == max(p[-1].step for p in drawn)
    assert points[-1].depth == max(p[-1].depth for p in drawn)
    assert len(points) == max(map(len, drawn))


def test_frames_of_a_plan():
    with pytest.raises(ValueError, match="segments is 4, expected at most 3, the frames of"):
        replace(WORK, gradient_plan=GradientPlan.instruct_video())


VARIANTS = {
    "batched": {"guidance": "batched"},
    "batched, draft 4, batch 2": {
        "guidance": "batched",
        "gradient_plan": PLANS["draft 4"],
        "batch_size": 2,
    },
    "separate": {"guidance": "separate"},
    "separate, draft 4": {"guidance": "separate", "gradient_plan": PLANS["draft 4"]},
    "rewards": {"reward_blocks": (2, 1)},
    "ensemble, separate, draft 4": {
        "reward_blocks": ((2, 3), 1),
        "guidance": "separate",
        "gradient_plan": PLANS["draft 4"],
    },
}
OTHER = (MemoryConfig("fp32", "none"), MemoryConfig("fp32", "attention", "cpu", 256))


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", slow_except(VARIANTS, ("ensemble, separate, draft 4",)))
def test_predicted_bytes_with_guidance_and_several_rewards(name):
    assert close(replace(WORK, **VARIANTS[name]))


@pytest.mark.slow
@pytest.mark.parametrize("memory", OTHER, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_predicted_bytes_of_variants_under_other_policies(name, memory):
    assert close(replace(WORK, **VARIANTS[name]), memory)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["separate", "ensemble, separate, draft 4"])
def test_repeated_blocks_of_variants_are_those_of_the_whole_model(name):
    several = "reward_blocks" in VARIANTS[name]
    blocks = {"reward_blocks": ((6, 7), 5)} if several else {}
    work = replace(DEEP, **{**VARIANTS[name], **blocks})
    found, expected = (simulate(work, *2 * OTHER[1:], whole=whole) for whole in (False, True))
    assert found == expected


@pytest.mark.slow
def test_work_of_guidance_and_of_several_rewards():
    def costs(**changes):
        return simulate(replace(WORK, **changes), FULL, FULL).costs

    plain, batched, separate = costs(), costs(guidance="batched"), costs(guidance="separate")
    for phase in ("rollout", "forward", "backward"):
        assert separate[phase].flops == batched[phase].flops == 2 * plain[phase].flops
    assert batched["reward"] == separate["reward"] == plain["reward"]
    one, both = costs(reward_blocks=1), costs(reward_blocks=(2, (1, 1)))
    assert both["reward"].flops == plain["reward"].flops + 2 * one["reward"].flops
    assert both["forward"] == plain["forward"]
