"""Reads of the device in a PRFL step, and steps with values that are not finite."""

import math

import pytest
import torch
from device_reads import DeviceReads
from prfl_world import DATA, NOISE, REWARD, TEXT, make_wan, prfl, with_lora

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.models.registry import patch

PLANS = {
    "one point": GradientPlan.prfl(1),
    "five points": GradientPlan.prfl(5),
    "from data": GradientPlan.controlnet_plus_plus(),
    "several steps": GradientPlan.draft(2),
    "renoised": GradientPlan.draft_lv(2),
}


def reads_of(step, **given):
    mode = DeviceReads(NOISE, DATA, TEXT, *step.sampler.transformer.parameters())
    with mode:
        output = step(NOISE, TEXT, generator=torch.Generator().manual_seed(0), **given)
    return mode.count, output


@pytest.mark.cases(3)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["patched", "lora"])
def test_a_step_reads_the_device_once(kind, plan):
    plan, lora = PLANS[plan], kind == "lora"
    model = with_lora(make_wan()) if lora else patch(make_wan())
    given = {"latents": DATA} if plan.start == "data" else {}
    count, output = reads_of(prfl(model, plan, divergence=0.1 if lora else 0.0), **given)
    assert count == 1 and output.finite


@pytest.mark.parametrize("bad", [False, True])
def test_a_step_that_does_not_wait_reads_nothing(bad):
    model = make_wan()
    step = prfl(model, reward=lambda *args: REWARD(*args) * (math.nan if bad else 1))
    count, output = reads_of(step, wait=False)
    assert count == 0 and output.finite.shape == () and bool(output.finite) is not bad
    assert any(p.grad is not None for p in model.parameters())  # dropped by the caller


def test_reads_of_values_are_counted_and_those_of_the_host_are_not():
    x, host = torch.ones(3), torch.ones(3)
    with DeviceReads(x) as mode:
        bool((x * 2).sum()), float(x[0]), x.exp().tolist(), x.cpu()
        host.tolist(), bool(host.sum())
    assert mode.count == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_bad_reward_drops_the_gradients_of_the_whole_update(bad, call):
    model, calls = make_wan(), []

    def reward(x, timestep, conditions):
        calls.append(None)
        return REWARD(x, timestep, conditions) + (bad if len(calls) == call else 0)

    step = prfl(model, reward=reward)
    calls.extend([None] * 3)
    assert step(NOISE, TEXT, indices=(0, 1, 2)).finite  # a micro-batch before
    assert any(p.grad is not None for p in model.parameters())
    calls.clear()
    output = step(NOISE, TEXT, indices=(0, 2, 4))
    assert not output.finite and len(calls) == 3
    assert output.rewards.isfinite().all(1).tolist() == [i + 1 != call for i in range(3)]
    assert all(p.grad is None for p in model.parameters())


def test_latents_that_become_nan_drop_the_gradients_too():
    model = make_wan()
    step = prfl(model)
    with torch.no_grad():
        model.proj_out.bias[0] = math.nan
    output = step(NOISE, TEXT, indices=(1, 3))
    assert not output.finite and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("plan", ["one point", "from data"])
def test_bad_latents_are_named(plan):
    model, plan = make_wan(), PLANS[plan]
    bad, data = NOISE.clone(), plan.start == "data"
    bad[1, 2, 0, 1, 1] = math.nan
    given = (NOISE, TEXT) if data else (bad, TEXT)
    with pytest.raises(ValueError, match=f"^{'latents' if data else 'noise'} has 1 NaN"):
        prfl(model, plan)(*given, **({"latents": bad} if data else {}))
    assert all(p.grad is None for p in model.parameters())
