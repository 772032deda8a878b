"""Ranks that share a sample: their updates equal those of one process."""

import pytest
from sharded_world import Case, equal_at_length, equal_to_one_process, few_steps

from prfl_fast.feedback.gradient_plan import GradientPlan as Plan
from prfl_fast.rollout.config import RolloutConfig

pytest.importorskip("diffusers")
pytest.importorskip("peft")

POINTS = {"plan": Plan.prfl(3), "indices": (0, 2, 3)}
DRAFT = {"plan": Plan.draft(3), "indices": None}
ODD = {"size": (3, 2, 6)}  # 9 tokens
TWO = {"sequence": 2, "shard": None}

TWO_RANKS = [
    Case("DRaFT of LoRA", **DRAFT, **ODD, lora=True, divergence=1.0, **TWO),
    Case("image-to-video", i2v=True, **ODD, **TWO),
    Case("first frame", **POINTS, **ODD, first_frame=True, **TWO),
    Case("sharded, gathered", **DRAFT, sequence=2, options={"keep_gathered": True}),
]
FOUR_RANKS = [
    Case("sharded, two samples", **POINTS, **ODD, sequence=2, accumulation=2),
    Case("four parts", **POINTS, size=(3, 2, 10), sequence=4, shard=None),
    Case("copies of halves", **DRAFT, sequence=2, shard=2),
]
LONG = [
    Case("odd tokens", **POINTS, **ODD, **TWO),
    Case("checkpointing, offload", **DRAFT, mode="full", offload="cpu", **TWO),
    Case("streamed", **POINTS, lora=True, mode="full", streamed=True, **TWO),
    Case("experts", **POINTS, experts=True, **TWO),
    Case("sharded", **POINTS, **ODD, sequence=2),
    Case("merged LoRA", lora=True, rollout=RolloutConfig(merge_lora=True), **TWO),
    Case("attention kept", **POINTS, mode="attention", **TWO),
    Case("points", **POINTS, **TWO),
    Case("PRFL", **TWO),
    Case("ReFL", plan=Plan.refl(), indices=None, **TWO),
    Case("AlignProp", plan=Plan.alignprop(), indices=None, **TWO),
    Case("DRaFT", **DRAFT, **TWO),
    Case("LoRA", **POINTS, lora=True, **TWO),
    Case("sharded LoRA", **POINTS, lora=True, sequence=2),
    Case("sharded image-to-video", **DRAFT, i2v=True, sequence=2),
    Case("sharded, attention kept", **POINTS, mode="attention", sequence=2),
]


def test_two_ranks_equal_one_process(tmp_path):
    equal_to_one_process(2, [*TWO_RANKS, few_steps(tmp_path, **TWO)])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_more_runs_equal_one_process(world):
    equal_at_length(world, [*TWO_RANKS, *LONG] if world == 2 else FOUR_RANKS)
