"""Predicted bytes of every policy and optimizer against PRFL steps on real tensors."""

import itertools
from dataclasses import replace

import pytest
from counted_steps import counted
from plans import SMALL, ledger_of

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.workload import Workload

CONFIG = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}
SIZE = {"frames": 9, "height": 256, "width": 256, "text_tokens": 32, "reward_blocks": 2}
WORK = Workload(CONFIG, **SIZE, precision="fp32", sft=False, num_inference_steps=6)
FULL = replace(WORK, train="full")
MODES = [("none", None), ("none", "cpu"), ("attention", None), ("attention", "cpu")]
MODES += [("full", None), ("full", "cpu")]
OPTIMIZERS = ("adamw", "adamw-sr", "adamw8bit", "adamw-cpu")

CASES = {
    f"{dtype} {mode} {offload} chunk {chunk}": (WORK, MemoryConfig(dtype, mode, offload, chunk))
    for dtype, (mode, offload), chunk in itertools.product(
        ("fp32", "bf16", "fp8"), MODES, (None, 256)
    )
}
CASES |= {
    f"streamed {dtype} {mode} {offload}": (
        WORK,
        MemoryConfig(dtype, mode, offload, stream_weights=1),
    )
    for dtype, (mode, offload) in itertools.product(("bf16", "fp8"), MODES)
}
CASES |= {
    f"{optimizer}, {gradients} gradients, {points} points x {batches}": (
        replace(FULL, gradient_plan=GradientPlan(points), gradient_accumulation_steps=batches),
        MemoryConfig("bf16", "full", optimizer=optimizer, gradient_dtype=gradients),
    )
    for optimizer, gradients, points, batches in itertools.product(
        OPTIMIZERS, ("parameter", "fp32"), (1, 2), (1, 2)
    )
}
CASES |= {
    f"FP8 linears {train} {mode} {offload}": (
        replace(WORK, train=train, fp8_linears=True),
        MemoryConfig("bf16", mode, offload),
    )
    for train, (mode, offload) in itertools.product(("lora", "full"), (MODES[0], MODES[3]))
}
CASES["streamed, adamw-cpu"] = (
    FULL,
    MemoryConfig("bf16", "full", optimizer="adamw-cpu", stream_weights=1),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes_are_within_one_percent_of_those_counted(name):
    workload, memory = CASES[name]
    frozen = replace(memory, optimizer="adamw", gradient_dtype="parameter")
    predicted = ledger_of(workload, (memory, frozen), fake=True)
    real = counted(workload, memory, frozen)
    # What is counted ends before the optimizer's own step.
    moments = [sum(live.values()) for phase, live in predicted.timeline if phase != "optimizer"]
    peak = max(moments)
    print(f"{name}: predicted {peak}, counted {real}, {peak / real - 1:+.2%}")
    assert abs(peak - real) <= 0.01 * real
