"""The planner: its plan of a small model, its arguments, the 14B plans."""

import dataclasses
import json
import math

import pytest
import torch
from plans import SMALL, small_workload

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning import planner
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.presets import MODELS, model_config
from prfl_fast.planning.report import table
from prfl_fast.planning.search import CHUNK, MODES, TIE, Candidate, Tier, memory_of
from prfl_fast.planning.workload import Workload
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.utils.units import GIB

diffusers = pytest.importorskip("diffusers")


def test_nothing_fits(calls):
    plan = planner.plan_memory(small_workload(), budget=plan_search.CONTEXT + (20 << 20))
    assert not plan.feasible and plan.missing == plan.peak + plan.reserve - plan.budget > 0
    leanest = memory_of(Tier("nf4", stream_weights=1), MODES[-1], MODES[-1], CHUNK)
    assert (plan.memory, plan.reward_memory) == leanest
    assert len(plan.candidates) == 6  # the leanest of each kind of weights, on device and host
    text = table(plan)
    assert "no plan fits" in text and "MiB" not in text
    assert f"{plan.missing / GIB:.2f} GiB of device memory" in text


def test_plan_of_a_small_model(real):
    assert real.feasible and real.memory.weight_dtype == "bf16" and real.missing == 0
    assert real.peak == sum(real.categories.values())
    assert real.peak == max(sum(live.values()) for _, live in real.timeline)
    chosen = next(c for c in real.candidates if c.reason == "chosen")
    assert (chosen.memory, chosen.reward_memory) == (real.memory, real.reward_memory)
    assert chosen.peak == real.peak
    assert chosen.seconds == pytest.approx(real.step_seconds)
    faster = [c for c in real.candidates if (1 + TIE) * c.seconds < chosen.seconds]
    assert faster and all("over" in c.reason for c in faster)
    smaller = real.smaller(real.memory, real.reward_memory)
    assert smaller is None or smaller.peak < real.peak
    assert real.smaller(MemoryConfig("fp32", "full"), MemoryConfig()) is None


def test_what_to_try_next_has_room_on_the_host(real):
    reward = MemoryConfig()
    now = Candidate(MemoryConfig(), reward, 3, 0, 1.0, "chosen")
    lean = MemoryConfig("fp32", "full", "cpu")
    offloaded = Candidate(lean, reward, 1, 9, 2.0, "over on the host")
    full = Candidate(MemoryConfig("fp32", "full"), reward, 2, 0, 3.0, "fits")
    plan = dataclasses.replace(real, candidates=[now, offloaded, full], host_budget=5)
    assert plan.smaller(now.memory, reward) == full
    assert dataclasses.replace(plan, host_budget=None).smaller(now.memory, reward) == offloaded


# Arguments.
def test_a_budget_is_a_size_or_a_card():
    assert planner.budget_of("rtx4090", "budget") == int(23.5 * GIB)
    assert planner.budget_of("24GB", "budget") == 24 * 10**9 < planner.budget_of("24GiB", "budget")
    with pytest.raises(ValueError, match="budget is 'rtx9', expected bytes or a size"):
        planner.budget_of("rtx9", "budget")


def test_models(tmp_path):
    assert model_config("WAN2.1-T2V-14B")["num_layers"] == 40
    assert model_config("wan2.1-i2v-14b")["in_channels"] == 36
    assert model_config({"_diffusers_version": "x", "a": 1}) == {"a": 1}
    with torch.device("meta"):
        model = diffusers.WanTransformer3DModel(**SMALL)
        for name, config in MODELS.items():
            own = {k: v for k, v in config.items() if k not in ("boundary_ratio", "class_name")}
            kind = getattr(diffusers, config.get("class_name", "WanTransformer3DModel"))
            assert kind(**{**own, "num_layers": 1}), name
    assert model_config(model)["ffn_dim"] == 512
    path = tmp_path / "transformer" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(SMALL))
    assert model_config(tmp_path) == SMALL
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a configuration"):
        model_config(tmp_path)
    with pytest.raises(ValueError, match="expected one of wan2.1-t2v-1.3b"):
        model_config("wan9")
    with pytest.raises(TypeError, match="a supported class: diffusers WanTransformer3DModel"):
        model_config(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    "train, options, message",
    [
        ("lora", {"weight_dtype": "int4"}, "weight_dtype is 'int4', expected one of 'auto'"),
        ("lora", {"optimizer": "sgd"}, "optimizer is 'sgd'"),
        ("full", {"weight_dtype": "nf4"}, "weight_dtype is 'nf4', .* cannot train"),
        ("lora", {"gpu": "tpu"}, "gpu is 'tpu', expected one of 'h200'"),
        ("lora", {"host_budget": "some"}, "host_budget is 'some'"),
    ],
)
def test_bad_arguments(calls, train, options, message):
    with pytest.raises(ValueError, match=message):
        planner.plan_memory(small_workload(train=train), **options)
    assert not calls


def test_fp8_linears_have_plain_weights(calls):
    work = small_workload(fp8_linears=True)
    with pytest.raises(ValueError, match="is 'fp8', .* with fp8_linears.* quantizes the weights"):
        planner.plan_memory(work, weight_dtype="fp8")
    tried = {tier.weight_dtype for tier in planner._tiers(work, "auto", "auto")}
    assert tried == {"bf16"} and not calls


def test_a_gradient_plan_trains_the_model():
    message = r"gradient_plan is .*RolloutConfig.*, expected GradientPlan"
    with pytest.raises(TypeError, match=message):
        small_workload(gradient_plan=RolloutConfig())
    with pytest.raises(ValueError, match="gradient_plan.to is 'noise', expected 'parameters'"):
        small_workload(gradient_plan=GradientPlan.reno())


# The plans this was made for, minutes of simulation.
@pytest.mark.slow
@pytest.mark.parametrize(
    "workload, options, weights, optimizer",
    [
        ({}, {"budget": "48GiB"}, "bf16", "adamw"),
        ({}, {"budget": "24GiB", "weight_dtype": "nf4"}, "nf4", "adamw"),
        ({"train": "full", "height": 480, "width": 832}, {"budget": "141GiB"}, "bf16", "adamw8bit"),
    ],
    ids=["48 GiB exact", "24 GiB NF4", "141 GiB, all parameters"],
)
def test_14b_fits(workload, options, weights, optimizer):
    plan = planner.plan_memory(Workload("wan2.1-t2v-14b", **workload), **options)
    print(table(plan))
    assert plan.feasible
    assert (plan.memory.weight_dtype, plan.memory.optimizer) == (weights, optimizer)
    assert plan.peak + plan.reserve <= plan.budget
    assert math.isfinite(plan.step_seconds)
