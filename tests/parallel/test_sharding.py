"""Sharded weights: updates equal those of one process, for all plans and memory policies."""

import dataclasses

import pytest
from sharded_world import Case, equal_to_one_process

from prfl_fast.feedback.gradient_plan import GradientPlan as Plan
from prfl_fast.rollout.config import RolloutConfig

pytest.importorskip("diffusers")
pytest.importorskip("peft")

FIVE = {"plan": Plan.prfl(4), "indices": (0, 1, 2, 3)}
DRAFT = {"plan": Plan.draft(3), "indices": None}
MERGED = RolloutConfig(merge_lora=True)

THREE = {"updates": 3}

TWO_RANKS = [
    Case("PRFL", **THREE),
    Case("points, reduced once", **FIVE, options={"reduce_once": True}),
    Case("ReFL", plan=Plan.refl(), indices=None),
    Case("AlignProp", plan=Plan.alignprop(), indices=None),
    Case("DRaFT", **DRAFT),
    Case("DRaFT of LoRA with divergence", **THREE, **DRAFT, lora=True, divergence=1.0),
    Case("whole", **THREE, **DRAFT, shard=None),
    Case("DistributedDataParallel", **DRAFT, shard=None, ddp=True),
    Case("image-to-video, gathered", i2v=True, options={"keep_gathered": True}),
    Case("merged LoRA, gathered", lora=True, rollout=MERGED, options={"keep_gathered": True}),
    Case("experts, gathered", **FIVE, experts=True, options={"keep_gathered": True}),
]
FOUR_RANKS = [
    Case("copies of halves", **THREE, **FIVE, shard=2),
    Case("copies, reduced once", **DRAFT, lora=True, shard=2),
    Case("two ranks per sample", accumulation=2, sequence=2),
]
LONG = [
    Case("whole LoRA", **FIVE, shard=None, lora=True),
    Case("accumulation, reduced once", accumulation=2, options={"reduce_once": True}),
    Case("checkpointing, offload", **DRAFT, mode="full", offload="cpu"),
    Case("points", **FIVE),
    Case("DRaFT, reduced once", **DRAFT, options={"reduce_once": True}),
    Case("LoRA", lora=True),
    Case("LoRA of points", **FIVE, lora=True),
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
    Case("experts", **FIVE, experts=True),
    Case("points under DistributedDataParallel", **FIVE, shard=None, ddp=True),
]


def test_two_ranks_equal_one_process():
    equal_to_one_process(2, TWO_RANKS)


@pytest.mark.slow
def test_four_ranks_equal_one_process():
    equal_to_one_process(4, FOUR_RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_all_plans_and_policies_equal_one_process(world):
    cases = [*TWO_RANKS, *LONG, *(FOUR_RANKS if world == 4 else ())]
    cases = [dataclasses.replace(case, updates=3) for case in cases]
    for start in range(0, len(cases), 8):  # as ranks must answer within minutes
        equal_to_one_process(world, cases[start : start + 8])
