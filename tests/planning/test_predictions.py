"""Predicted bytes of every policy and optimizer against PRFL steps on real tensors."""

import itertools
from dataclasses import replace

import pytest
import torch
from plans import SMALL, ledger_of, prepared

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.optimizers import make_optimizer, state_bytes
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.memory.stream import waiting_weights
from prfl_fast.planning.built_models import build, stream_models
from prfl_fast.planning.workload import Workload
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.training.objectives import reward_call, velocity_call

CONFIG = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}
SIZE = {"frames": 9, "height": 256, "width": 256, "text_tokens": 32, "reward_blocks": 2}
WORK = Workload(CONFIG, **SIZE, precision="fp32", sft=False)
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
CASES["streamed, adamw-cpu"] = (
    FULL,
    MemoryConfig("bf16", "full", optimizer="adamw-cpu", stream_weights=1),
)


@pytest.fixture(autouse=True)
def _poison_empty():
    """Leave empty memory as it is: filling it is an operation that fake tensors do not have."""


def counted(workload, memory, reward_memory):
    """Return the device bytes at the peak of a PRFL step, before the optimizer's own step."""
    generator, reward = prepared(*build(workload, memory, reward_memory))
    stream_models(generator, reward, memory, reward_memory)
    parameters = [p for p in generator.parameters() if p.requires_grad]
    kind = memory.optimizer
    make_optimizer(kind, parameters, learning_rate=1e-5, gradient_dtype=memory.gradient_dtype)
    velocity, score = velocity_call(generator, "fp32"), reward_call(reward, "fp32")
    plan, points = workload.gradient_plan, workload.points
    prfl = PRFL(velocity, score, FlowUniPC(), plan=plan, num_inference_steps=6)
    conditions = {"encoder_hidden_states": torch.randn(1, 32, CONFIG["text_dim"])}
    held = [*conditions.values()]
    waiting = set()
    for model in (generator, reward):
        held += [*model.parameters(), *model.buffers()]
    if memory.stream_weights is not None:
        streamed = [*waiting_weights(generator), *waiting_weights(reward.backbone)]
        waiting = {id(p) for weights in streamed for p in weights.parameters()}
        held += [slot.memory for slot in streamed[0].slots.order]
    states = sum(state_bytes(kind, p.shape, p.dtype)[0] for p in parameters)
    before = states + sum(t.nbytes for t in held if id(t) not in waiting)
    with Ledger(open_operations=True) as ledger:
        for _ in range(workload.gradient_accumulation_steps):
            noise = torch.randn(workload.latent_shape)
            assert prfl(noise, conditions, indices=[3 - i for i in range(points)][::-1]).finite
            del noise
    return before + ledger.peak


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes_are_within_one_percent_of_those_counted(name):
    workload, memory = CASES[name]
    frozen = replace(memory, optimizer="adamw", gradient_dtype="parameter")
    predicted = ledger_of(workload, (memory, frozen), fake=True)
    real = counted(workload, memory, frozen)
    print(f"{name}: predicted {predicted.peak}, counted {real}, {predicted.peak / real - 1:+.2%}")
    assert predicted.peak_phase != "optimizer" and abs(predicted.peak - real) <= 0.01 * real
