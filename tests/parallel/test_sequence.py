"""Ranks that share a sample: their updates equal those of one process."""

import pytest
from sharded_world import Case, equal_to_one_process

from prfl_fast.feedback.gradient_plan import GradientPlan as Plan
from prfl_fast.rollout.config import RolloutConfig

pytest.importorskip("diffusers")
pytest.importorskip("peft")

FIVE = {"plan": Plan.prfl(4), "indices": (0, 1, 2, 3)}
DRAFT = {"plan": Plan.draft(3), "indices": None}
ODD = {"size": (3, 2, 6)}  # 9 tokens
TWO = {"sequence": 2, "shard": None}

TWO_RANKS = [
    Case("PRFL", **TWO),
    Case("points", **FIVE, **TWO),
    Case("odd tokens", **FIVE, **ODD, **TWO),
    Case("DRaFT of LoRA", **DRAFT, **ODD, lora=True, divergence=1.0, **TWO),
    Case("image-to-video", i2v=True, **ODD, **TWO),
    Case("first frame", **FIVE, **ODD, first_frame=True, **TWO),
    Case("checkpointing, offload", **DRAFT, mode="full", offload="cpu", **TWO),
    Case("attention kept", **FIVE, mode="attention", **TWO),
    Case("merged LoRA", lora=True, rollout=RolloutConfig(merge_lora=True), **TWO),
    Case("sharded", **FIVE, **ODD, sequence=2),
    Case("sharded, gathered", **DRAFT, sequence=2, options={"keep_gathered": True}),
    Case("experts", **FIVE, experts=True, **TWO),
]
FOUR_RANKS = [
    Case("four parts", **FIVE, size=(3, 2, 10), sequence=4, shard=None),
    Case("sharded, two samples", **FIVE, **ODD, sequence=2, accumulation=2),
    Case("copies of halves", **DRAFT, sequence=2, shard=2),
]
LONG = [
    Case("ReFL", plan=Plan.refl(), indices=None, **TWO),
    Case("AlignProp", plan=Plan.alignprop(), indices=None, **TWO),
    Case("DRaFT", **DRAFT, **TWO),
    Case("LoRA", **FIVE, lora=True, **TWO),
    Case("sharded LoRA", **FIVE, lora=True, sequence=2),
    Case("sharded image-to-video", **DRAFT, i2v=True, sequence=2),
    Case("sharded, attention kept", **FIVE, mode="attention", sequence=2),
]


def test_two_ranks_equal_one_process():
    equal_to_one_process(2, TWO_RANKS)


def test_four_ranks_equal_one_process():
    equal_to_one_process(4, FOUR_RANKS)


@pytest.mark.slow
def test_more_runs_equal_one_process():
    equal_to_one_process(2, LONG)
