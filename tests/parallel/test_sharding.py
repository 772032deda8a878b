"""Sharded weights: updates equal those of one process, for all plans and memory policies."""

import pytest
from sharded_world import Case, equal_at_length, equal_to_one_process, few_steps

from prfl_fast.feedback.gradient_plan import GradientPlan as Plan
from prfl_fast.rollout.config import RolloutConfig

pytest.importorskip("diffusers")
pytest.importorskip("peft")

POINTS = {"plan": Plan.prfl(3), "indices": (0, 2, 3)}
DRAFT = {"plan": Plan.draft(3), "indices": None}
MERGED = RolloutConfig(merge_lora=True)

TWO_RANKS = [
    Case("PRFL, channels last", updates=2, channels_last=True),
    Case("DistributedDataParallel", **DRAFT, shard=None, ddp=True),
    Case(
        "DRaFT of merged LoRA with divergence, gathered",
        **DRAFT,
        lora=True,
        divergence=1.0,
        rollout=MERGED,
        options={"keep_gathered": True},
    ),
    Case(
        "experts, gathered, reduced once",
        **POINTS,
        experts=True,
        options={"keep_gathered": True, "reduce_once": True},
    ),
]
FOUR_RANKS = [
    Case("copies of halves", **POINTS, shard=2),
    Case("copies, reduced once", **DRAFT, lora=True, shard=2),
    Case("two ranks per sample", accumulation=2, sequence=2),
]
LONG = [
    Case("points, reduced once", **POINTS, options={"reduce_once": True}),
    Case("DRaFT of LoRA with divergence", **DRAFT, lora=True, divergence=1.0),
    Case("merged LoRA, gathered", lora=True, rollout=MERGED, options={"keep_gathered": True}),
    Case("experts, gathered", **POINTS, experts=True, options={"keep_gathered": True}),
    Case("whole", **DRAFT, shard=None),  # test_trainer.py has it in the default tier
    Case("whole, streamed", **DRAFT, lora=True, mode="full", streamed=True, shard=None),
    Case("image-to-video, gathered", i2v=True, options={"keep_gathered": True}),
    Case("DRaFT", **DRAFT),
    Case("AlignProp", plan=Plan.alignprop(), indices=None),
    Case("ReFL", plan=Plan.refl(), indices=None),
    Case("whole LoRA", **POINTS, shard=None, lora=True),
    Case("accumulation, reduced once", accumulation=2, options={"reduce_once": True}),
    Case("checkpointing, offload", **DRAFT, mode="full", offload="cpu"),
    Case("points", **POINTS),
    Case("DRaFT, reduced once", **DRAFT, options={"reduce_once": True}),
    Case("LoRA", lora=True),
    Case("LoRA of points", **POINTS, lora=True),
    Case("accumulation", accumulation=2),
    Case("whole accumulation", accumulation=2, shard=None),
    Case("whole image-to-video", i2v=True, shard=None),
    Case("image-to-video", **DRAFT, i2v=True),
    Case("unpatched", **DRAFT, patched=False),
    Case("unpatched, checkpointing", **DRAFT, patched=False, mode="full"),
    Case("attention checkpointing", **DRAFT, mode="attention"),
    Case("offload", **DRAFT, offload="cpu"),
    Case("kept from forward to backward", **DRAFT, options={"reshard_after_forward": False}),
    Case("merged LoRA", lora=True, rollout=MERGED),
    Case("experts", **POINTS, experts=True),
    Case("points under DistributedDataParallel", **POINTS, shard=None, ddp=True),
]


def test_two_ranks_equal_one_process(tmp_path):
    equal_to_one_process(2, [*TWO_RANKS, few_steps(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_all_plans_and_policies_equal_one_process(world):
    equal_at_length(world, [*TWO_RANKS, *LONG, *(FOUR_RANKS if world == 4 else ())])
