"""The plan of a model with two experts against a real run, counted."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from allocations import allocator_peak
from plans import SMALL

from prfl_fast.feedback import PRFL, GradientPlan
from prfl_fast.memory import MemoryConfig, apply_memory, make_optimizer
from prfl_fast.memory.ledger import Ledger
from prfl_fast.models import Experts, patch
from prfl_fast.planning.built_models import build, fake_models, materialize
from prfl_fast.planning.gpu_specs import find_gpu
from prfl_fast.planning.presets import MODELS, model_config
from prfl_fast.planning.search import step_seconds
from prfl_fast.planning.simulated_step import SimulatedStep
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.workload import Workload
from prfl_fast.rollout import FlowUniPC
from prfl_fast.training.lora import add_lora
from prfl_fast.training.objectives import reward_call

CONFIG = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 2}
KINDS = {"t2v": {"boundary_ratio": 0.875}, "i2v": {"boundary_ratio": 0.9, "in_channels": 36}}
SIZE = {"frames": 9, "height": 256, "width": 256, "text_tokens": 32, "reward_blocks": 1}
FULL = MemoryConfig("fp32", "full")
STEPS = 6


def workload(kind="t2v", **options):
    fixed = {"precision": "fp32", "sft": False, "num_inference_steps": STEPS}
    return Workload(CONFIG | KINDS[kind], **{**SIZE, **fixed, **options})


def predicted_by(work):
    with fake_models(work, FULL, FULL) as (generator, rewards):
        with Ledger(open_operations=True) as ledger:
            SimulatedStep(work, FULL, FULL, generator, rewards, ledger).run()
    return ledger


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_what_two_experts_really_take(kind):
    """PRFL with a swap in each direction and the optimizer, on PyTorch's allocator."""
    work = workload(kind)
    predicted = predicted_by(work)
    bare = replace(work, train="full", expert="low")
    models = [build(bare, MemoryConfig(), FULL) for _ in range(2)]
    (reward,) = models[0][1]
    for module in (models[0][0], models[1][0], reward):
        materialize(module)
    experts = Experts(models[0][0], models[1][0], work.config["boundary_ratio"])
    apply_memory(experts, FULL, device="cpu")
    add_lora(experts, work.lora_rank)
    for module in (experts, reward.backbone):
        patch(module)
    parameters = [p for p in experts.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", parameters, learning_rate=1e-5)
    score = reward_call(reward, "fp32")
    prfl = PRFL(experts, score, FlowUniPC(), num_inference_steps=STEPS)
    shape = work.latent_shape
    conditions = {"encoder_hidden_states": torch.randn(1, work.text_tokens, SMALL["text_dim"])}
    if kind == "i2v":
        conditions["latent_condition"] = torch.randn(1, 20, *shape[2:])

    def step(index):
        assert prfl(torch.randn(shape), conditions, indices=[index]).finite
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(4), step(0)  # the states of both experts, and the host buffers
    held = [*conditions.values(), *reward.parameters(), *reward.buffers()]
    held += [*experts.high.parameters(), *experts.high.buffers()]
    held += [p for p in experts.low.parameters() if p.requires_grad]
    held += [t for s in optimizer.state.values() for t in s.values()]
    swaps = experts.swap.swaps
    peak = sum(t.nbytes for t in held) + allocator_peak(partial(step, 4))
    assert experts.swap.swaps == swaps + 1
    print(kind, predicted.peak, peak)
    assert abs(predicted.peak - peak) <= 0.01 * peak, (predicted.peak, peak)
    assert predicted.host_peak == experts.swap.host
    costs = simulate(work, FULL, FULL).costs
    for phase, way in (("swap out", "to_host_bytes"), ("swap in", "to_device_bytes")):
        assert getattr(costs[phase], way) == experts.swap.one
    assert predicted.peak_categories["weights"] < 1.2 * experts.swap.one


def test_steps_of_the_experts():
    # Official Wan2.2: 26 steps of 40 above 875 with shift 12, 15 above 900 with shift 5.
    t2v, i2v = Workload("wan2.2-t2v-a14b", shift=12.0), Workload("wan2.2-i2v-a14b")
    assert (t2v.experts.count("high"), i2v.experts.count("high")) == (26, 15)
    assert t2v.shares == {"high": 26 / 39, "low": 13 / 39} and t2v.swaps == 2 * 13 / 39
    assert t2v.rollout_forwards == pytest.approx(19) == replace(t2v, expert="both").rollout_forwards
    high, low = (replace(t2v, expert=name) for name in ("high", "low"))
    assert (high.rollout_forwards, high.swaps) == (12.5, 0)
    assert (low.rollout_forwards, low.swaps) == (32, 2)
    points = replace(t2v, gradient_plan=GradientPlan(5))
    assert 15 < points.rollout_forwards < 25


@pytest.mark.slow
def test_one_trained_expert_takes_less_than_two():
    runs = {e: simulate(workload(expert=e), FULL, FULL) for e in ("both", "low")}
    both, low = runs["both"], runs["low"]
    assert both.categories["optimizer"] == 2 * low.categories["optimizer"] > 0
    assert both.host == low.host > 0
    seconds = step_seconds(low.costs, find_gpu("h200"), workload(expert="low"))
    assert seconds["swap in"] > 0 and seconds["swap out"] > 0


def test_bad_workloads_of_experts():
    for options, message in (
        ({"expert": "first"}, "expert is 'first', expected one of"),
        ({"train": "full"}, "expert is 'both', expected high or low with train full"),
        (
            {"gradient_plan": GradientPlan.refl()},
            "window is .* a step of the expert high",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            workload(**options)
    with pytest.raises(ValueError, match="expert is 'low', expected both for a model without"):
        Workload(CONFIG, **SIZE, expert="low")


def test_a_pipeline_gives_the_boundary(tmp_path):
    for name in ("transformer", "transformer_2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    assert model_config(tmp_path) == {**CONFIG, "boundary_ratio": 0.9}
    assert MODELS["wan2.2-i2v-a14b"]["boundary_ratio"] == 0.9
