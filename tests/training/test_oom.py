"""The out-of-memory report: the part that failed, and bytes by category."""

import functools

import pytest
import torch
from runs import samples
from torch import nn
from wan import tiny_wan

from prfl_fast.data.dataset import Batches
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.offload import HostMemoryError
from prfl_fast.memory.optimizers import make_optimizer, state_bytes
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.training.objectives import RewardFeedback, SupervisedFlow, reward_call, velocity_call
from prfl_fast.training.oom import is_out_of_memory, live_bytes, memory_report, modules_in, phase_of

CPU = torch.device("cpu")


def full(*_):
    raise torch.OutOfMemoryError("full")


@pytest.fixture(scope="module")
def objective():
    transformer = tiny_wan(layers=1, heads=1)
    reward = LatentRewardModel.from_backbone(transformer, num_blocks=1, num_heads=2)
    calls = velocity_call(transformer, "bf16"), reward_call(reward, "bf16")
    step = PRFL(*calls, FlowEuler(), GradientPlan.prfl(points=1), num_inference_steps=4)
    return RewardFeedback(step, Batches(samples(4))), transformer, reward


@pytest.mark.parametrize("phase", ["rollout", "forward", "reward", "backward"])
def test_the_phase_is_the_part_that_raised(objective, phase):
    feedback, transformer, reward = objective

    def with_gradient(*_):
        if torch.is_grad_enabled():
            full()

    def at_output(module, args, out):
        out.register_hook(full)

    hook = {
        "rollout": lambda: transformer.register_forward_pre_hook(full),
        "forward": lambda: transformer.register_forward_pre_hook(with_gradient),
        "reward": lambda: reward.head.register_forward_pre_hook(full),
        "backward": lambda: reward.head.register_forward_hook(at_output),
    }[phase]()
    step, noise = feedback.step, torch.randn(feedback.batches[0].latents.shape)
    try:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            step(noise, feedback.batches[0].conditions, indices=(2,))
    finally:
        hook.remove()
    assert phase_of(caught.value) == phase


def test_models_are_found_behind_closures_attributes_and_bound_arguments(objective):
    feedback, transformer, reward = objective
    assert {id(m) for m in modules_in(feedback)} == {id(transformer), id(reward)}
    supervised = SupervisedFlow(transformer, Batches(samples(4)))
    extra = nn.Linear(2, 2)
    hidden = {"a": [functools.partial(lambda m, x: x, extra)], "b": (supervised.__call__,)}
    assert {id(m) for m in modules_in(hidden)} == {id(transformer), id(extra)}
    hidden["self"] = hidden
    assert len(modules_in(hidden)) == 2


def test_a_closure_over_a_variable_without_a_value_is_no_obstacle():
    def run():
        return extra, missing

    extra = nn.Linear(2, 2)
    assert modules_in(run) == [extra]
    missing = None


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_every_storage_counts_once(kind):
    model = nn.Sequential(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256)).bfloat16()
    parameters = list(model.parameters())
    optimizer = make_optimizer(kind, parameters, learning_rate=1.0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    average = {"w": torch.zeros(10)}
    other = nn.Linear(5, 5, bias=False)
    live = live_bytes(CPU, model, optimizer, average=average, others=[model, other, other])
    states = [sum(state_bytes(kind, p.shape, p.dtype)) for p in parameters]
    assert live == {
        "weights": 2 * (64 * 256 + 4 * 256) + 8,  # with running statistics and their counter
        "gradients": 2 * (64 * 256 + 2 * 256),
        "optimizer": sum(states),
        "average": 40,
        "other models": 100,
    }
    held = {"average": average, "others": [model, other]}
    assert set(live_bytes(torch.device("meta"), model, optimizer, **held).values()) == {0}


def test_the_report_is_in_units_people_read():
    (line,) = memory_report(CPU, {"weights": 28 * 2**30, "gradients": 3 * 2**20})
    assert line == "live: weights 28.00 GiB, gradients 3.00 MiB"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (HostMemoryError("offloading asks for 5 bytes of host memory with 4 bytes in use"), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_what_out_of_memory_is(error, expected):
    assert is_out_of_memory(error) is expected
