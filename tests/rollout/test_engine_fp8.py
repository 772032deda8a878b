"""FP8 rollouts: drift against plain loops, and the checks of the engine."""

import math

import e4m3
import numpy as np
import pytest
import torch
from engine_world import (
    EVERYWHERE,
    SIGMAS,
    assert_same,
    make_wan,
    make_x,
    no_warning,
    walk,
    wan_inputs,
)
from torch import nn

import prfl_fast.models.registry
from prfl_fast.kernels import fp8_linear, quantize_fp8
from prfl_fast.models.registry import find_adapter
from prfl_fast.models.velocity import ModelCall
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import rollout

# FP8, with a model of one matrix whose products can be computed by hand.


class Matrix(nn.Module):
    """v = W x at every position; the matrix is all there is of the model."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


class MatrixAdapter:
    name = "one matrix"

    def __init__(self):
        self.calls = []

    def matches(self, model):
        return isinstance(model, Matrix)

    def hidden_size(self, model):
        return 16

    def check_latents(self, model, x, conditions, name="x"):
        assert x.shape[1] == 16

    def velocity(self, model, x, timestep, conditions):
        return torch.einsum("oc,bcfhw->bofhw", model.weight, x)

    def open_rollout(self, model, x, timesteps, conditions, options):
        return OpenMatrix(self, model, timesteps, conditions)


class OpenMatrix:
    def __init__(self, adapter, model, timesteps, conditions):
        self.adapter, self.model = adapter, model
        self.timesteps, self.conditions, self.notes = timesteps, conditions, []

    def velocity(self, x, step, *, linears="exact", attention="exact"):
        self.adapter.calls.append((float(self.timesteps[step][0]), linears, attention))
        if linears == "exact":
            return self.adapter.velocity(self.model, x, self.timesteps[step], self.conditions)
        tokens = x.flatten(2).transpose(1, 2).contiguous()
        weight = quantize_fp8(self.model.weight.detach())
        out = fp8_linear(*quantize_fp8(tokens), *weight).to(x.dtype)
        return out.transpose(1, 2).reshape(x.shape)


@pytest.fixture
def matrices(monkeypatch):
    adapter = MatrixAdapter()
    known = prfl_fast.models.registry.ADAPTERS
    monkeypatch.setattr(prfl_fast.models.registry, "ADAPTERS", (*known, adapter))
    return adapter


def test_fp8_drift_is_what_one_computes_by_hand(matrices):
    """448 is the largest e4m3 number, so tokens with it have scale 1; 17 lies between 16 and 18 and
    is rounded to the even 16. With W = 1 the velocity is x; in FP8 it is 448 and fifteen times 16.
    """
    x = torch.full((2, 16, 1, 2, 2), 17.0)
    x[:, 0] = 448.0
    model = Matrix(torch.eye(16))
    # Only the first step's level is in the interval.
    engine = RolloutEngine(model, RolloutConfig(fp8_linears=(0.99, 1.0)))
    rollout(model, x, {}, FlowEuler(), 6, rollout_config=engine)
    delta = SIGMAS[1] - SIGMAS[0]
    norm = (1 + delta) * math.sqrt(448**2 + 15 * 17**2)
    expected = abs(delta) * math.sqrt(15) / norm
    # Later steps multiply both rollouts by the same number.
    assert list(engine.drift) == [1, 2, 3, 4, 5, 6] and expected > 4e-4
    for value in engine.drift.values():
        assert value == pytest.approx(expected, rel=1e-4)


def test_fp8_drift_equals_a_loop_in_numpy(matrices):
    generator = torch.Generator().manual_seed(3)
    model = Matrix(torch.randn(16, 16, generator=generator) / 4)
    x = torch.randn(1, 16, 2, 2, 2, generator=generator)
    engine = RolloutEngine(model, RolloutConfig(fp8_linears=EVERYWHERE))
    rollout(model, x, {}, FlowEuler(), 6, rollout_config=engine)

    def rounded(rows):
        scale = np.abs(rows).max(-1, keepdims=True) / 448
        codes = e4m3.encode(rows / scale)
        return e4m3.TABLE[codes & 127] * np.where(codes & 128, -1, 1) * scale

    weight = model.weight.detach().double().numpy()
    exact = ours = x.double().flatten(2)[0].T.numpy()  # [positions, 16]
    for index in range(6):
        delta = SIGMAS[index + 1] - SIGMAS[index]
        exact = exact + delta * exact @ weight.T
        v = torch.from_numpy(rounded(ours) @ rounded(weight).T).bfloat16().double().numpy()
        ours = ours + delta * v
        drift = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        assert engine.drift[index + 1] == pytest.approx(drift, rel=1e-4) and drift > 0.001


def test_precision_follows_the_noise_level_of_each_step(matrices):
    model = Matrix(torch.eye(16))
    x = make_x(dtype=torch.float32)
    low, high = SIGMAS[3], SIGMAS[1]
    levels = {"fp8_linears": (low, high), "fp8_attention": (0.0, SIGMAS[5])}
    engine = RolloutEngine(model, RolloutConfig(**levels, check_every=1000))
    engine.trajectories = 1  # not one that is checked
    rollout(model, x, {}, FlowEuler(), 6, rollout_config=engine)
    kinds = [call[1:] for call in matrices.calls]
    exact, linears = ("exact", "exact"), ("fp8", "exact")
    assert kinds == [exact, linears, linears, linears, exact, ("exact", "fp8")]
    scheduler = FlowEuler()
    scheduler.set_timesteps(6)
    assert [call[0] for call in matrices.calls] == scheduler.timesteps.tolist()


def test_guided_fp8_keeps_a_model_for_each_branch(matrices):
    model = Matrix(torch.eye(16) / 3)
    x, ones = make_x(dtype=torch.float32), {"text": torch.ones(2, 1)}
    for batched in (True, False):
        matrices.calls.clear()
        engine = RolloutEngine(model, RolloutConfig(fp8_linears=EVERYWHERE, check_every=1000))
        guidance = Guidance(1.5, {"text": torch.zeros(1, 1)}, batched=batched)
        rollout(model, x, ones, FlowEuler(), 3, rollout_config=engine, guidance=guidance)
        kinds = [call[1] for call in matrices.calls]
        each = ["fp8"] * (1 if batched else 2) + ["exact"] * (1 if batched else 2)
        assert kinds == each * 3 and 0 < engine.drift[3] < 0.1


# FP8 on a Wan: what the engine runs, and what makes it stop.


def relative(x, y):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(x, y, strict=True))


def test_fp8_drift_of_a_wan_equals_two_plain_loops():
    x, conditions = wan_inputs()
    model = make_wan(lora=True, head_dim=32)
    config = RolloutConfig(fp8_linears=(0.5, 1.0), fp8_attention=(0.0, 0.9))
    scheduler = FlowEuler()
    _, trajectory = walk(model, x, conditions, config, scheduler=scheduler, visit=(3,), steps=5)
    trajectory.run(5)
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double().tolist()
    times = [t.expand(2) for t in scheduler.timesteps]
    adapter = find_adapter(model)
    opened = adapter.open_rollout(model, x, times, conditions)
    exact = ours = x
    with torch.no_grad():
        for i, t in enumerate(times):
            delta = sigmas[i + 1] - sigmas[i]
            exact = exact + delta * adapter.velocity(model, exact, t, conditions)
            if i == 3:  # the step with gradient
                v = adapter.velocity(model, ours, t, conditions)
            else:
                linears = "fp8" if sigmas[i] >= 0.5 else "exact"
                attention = "fp8" if sigmas[i] <= 0.9 else "exact"
                v = opened.velocity(ours, i, linears=linears, attention=attention)
            ours = ours + delta * v
            expected = relative(ours.double(), exact.double())
            assert trajectory.drift[i + 1] == pytest.approx(expected, rel=1e-3)
    assert 1e-4 < trajectory.drift[5] < 0.1


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "config", [RolloutConfig(fp8_linears=EVERYWHERE), RolloutConfig(merge_lora=True)]
)
def test_weights_are_as_fresh_as_the_last_optimizer_step(config):
    x, conditions = wan_inputs()
    model = make_wan(lora=True)
    engine = RolloutEngine(model, config)
    before = rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
    after = rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    fresh = RolloutEngine(model, config)
    assert torch.equal(after, rollout(model, x, conditions, FlowEuler(), 3, rollout_config=fresh))
    assert not torch.allclose(after, before, rtol=1e-3)


def plant_outlier(model):
    """Plant a channel in the first feed-forward that is huge for every token and unused.

    Exactly, it changes nothing; but a token's FP8 scale follows its largest number, and so all
    other channels of the token round to almost nothing.
    """
    ffn = model.blocks[0].ffn
    with torch.no_grad():
        ffn.net[0].proj.bias[5] = 1e6
        ffn.net[2].weight[:, 5] = 0.0


def test_a_planted_outlier_makes_the_guard_fall_back():
    x, conditions = wan_inputs()
    config = RolloutConfig(fp8_linears=EVERYWHERE, drift_limit=0.005)
    model = make_wan()
    engine = RolloutEngine(model, config)
    with no_warning(RuntimeWarning):
        _, trajectory = walk(model, x, conditions, engine)
    clean = trajectory.drift
    assert list(clean) == [1, 2, 3, 4, 5] and not engine.fallen_back

    plant_outlier(model)
    plain, exact = walk(model, x, conditions, None)
    engine = RolloutEngine(model, config)
    with pytest.warns(RuntimeWarning, match="drift_limit 0.005") as said:
        ours, trajectory = walk(model, x, conditions, engine)
    assert len([w for w in said if w.category is RuntimeWarning]) == 1
    (*before, last) = trajectory.drift.items()
    assert last[0] == 4 and last[1] > 0.005 > max(value for _, value in before)
    assert all(value > 3 * clean[step] for step, value in trajectory.drift.items())
    assert f"{last[1]:.3g} at step 4" in str(said[0].message)
    # Before the fall the rollout was inexact, from there on it is the exact one, bit for bit.
    assert [torch.equal(ours[k], plain[k]) for k in (2, 3, 5, 6)] == [False, False, True, True]
    assert torch.equal(trajectory.x, exact.x) and engine.fallen_back
    with no_warning():
        later, trajectory = walk(model, x, conditions, engine)
    assert_same(later, plain)
    assert trajectory.drift is None


def test_bad_configs_are_refused():
    for kwargs, message in (
        ({"fp8_linears": (0.5, 0.2)}, "fp8_linears is"),
        ({"fp8_linears": (0.5,)}, "fp8_linears is"),
        ({"fp8_linears": 0.5}, "fp8_linears is"),
        ({"fp8_attention": (-0.1, 1.0)}, "fp8_attention is"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": True}, "stride is True"),
        ({"stride": [(0.5, 1.0)]}, r"stride\[0\] is"),
        ({"stride": [(0.9, 0.5, 2)]}, r"stride\[0\] is"),
        ({"stride": [(0.5, 1.0, 0)]}, r"stride\[0\]\[2\] is 0"),
        ({"solver_order": 2.0}, "solver_order is 2.0, expected 1, 2 or 3"),
        ({"solver_order": [(0.0, 1.0, True)]}, r"solver_order\[0\]\[2\] is True"),
        ({"guidance_interval": (0.5, 1.5)}, "guidance_interval is"),
        ({"check_every": 0}, "check_every is 0"),
        ({"drift_limit": 0.0}, "drift_limit is 0"),
        ({"drift_limit": math.nan}, "drift_limit is nan"),
        ({"compile": "always"}, "compile is 'always'"),
        ({"cache": False, "merge_lora": True}, "cache is False"),
        ({"cache": False, "compile": "on"}, "cache is False"),
        ({"cache": False, "fp8_linears": EVERYWHERE}, "cache is False"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutConfig(**kwargs)
    assert RolloutConfig(fp8_linears=[0, 1]).fp8_linears == (0.0, 1.0)
    assert not RolloutConfig(adapter=(None, None)).inexact
    assert RolloutConfig(stride=[[0, 1, 2]]).stride == ((0.0, 1.0, 2),)
    with pytest.raises(TypeError, match="supported"):
        RolloutEngine(nn.Linear(2, 2))


def test_an_engine_of_another_model_or_precision_is_refused():
    model, other = make_wan(), make_wan(seed=1)
    x, conditions = wan_inputs()
    engine = RolloutEngine(model)
    rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    for transformer in (other, ModelCall(model, "bf16")):
        with pytest.raises(ValueError, match="engine was made for another"):
            rollout(transformer, x, conditions, FlowEuler(), 3, rollout_config=engine)


def test_the_first_trajectory_that_runs_inexactly_is_the_first_that_is_checked():
    """One that ran exactly, as the model could not be opened, does not use the check up."""
    model = make_wan(lora=True)
    given = model, *wan_inputs(), FlowEuler(), 3
    engine = RolloutEngine(model, RolloutConfig(fp8_linears=EVERYWHERE, drift_limit=1e-9))
    model.blocks[0].attn1.to_out[1] = nn.Dropout(0.5)
    with pytest.warns(UserWarning, match="has dropout"):
        rollout(*given, rollout_config=engine)
    assert engine.trajectories == 0 and engine.drift is None
    model.eval()
    rollout(*given, rollout_config=engine)  # exact; finds it can be opened
    assert engine.trajectories == 0
    with pytest.warns(RuntimeWarning, match="past drift_limit"):
        rollout(*given, rollout_config=engine)
    assert engine.fallen_back
