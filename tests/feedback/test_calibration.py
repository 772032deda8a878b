"""Calibration of the rollout: figures against steps of PRFL, and the search on given figures."""

import json
import math
from dataclasses import replace

import pytest
import torch
from prfl_world import NOISE, TEXT, make_wan, prfl, run, trained, with_lora

from prfl_fast.feedback import calibration
from prfl_fast.feedback.calibration import Measured, Sampled, calibrate, ladders
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.models.registry import patch
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC

STEPS, POINTS = 8, 2
PLAN = GradientPlan.prfl(points=POINTS)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SAMPLES = [Sampled(NOISE, TEXT), Sampled(NOISE.flip(0), TEXT)]
STRIDES = (((0.0, 1.0, 2),), ((0.0, 1.0, 4),))


def make_step(model=None, **options):
    model = patch(with_lora(make_wan())) if model is None else model
    return prfl(model, PLAN, steps=STEPS, **options)


def close(ours, theirs):
    a, b = (torch.cat([g.flatten() for g in each]) for each in (ours, theirs))
    return (a @ b / (a.norm() * b.norm())).item(), ((a - b).norm() / b.norm()).item()


@pytest.fixture
def only_strides(monkeypatch):
    """Measure two strides alone, of the scheduler's order: tests are to take no longer."""
    found = {"stride": [{"stride": stride} for stride in STRIDES]}
    monkeypatch.setattr(calibration, "ladders", lambda step, device, dense: found)
    monkeypatch.setattr(calibration, "other_orders", lambda step: [])


def test_figures_are_those_of_steps_with_this_rollout(only_strides, monkeypatch):
    monkeypatch.setattr(calibration, "LEAST_COSINE", -1.0)
    step = make_step()
    model, shown = step.sampler.transformer, []
    before = torch.get_rng_state()
    found = calibrate(step, SAMPLES, 10.0, on_measured=shown.append)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in trained(model)) and step.engine.config == RolloutConfig()
    assert list(found.measured) == shown and [m.options for m in shown] == [
        {},
        *({"stride": n} for n in STRIDES),
    ]
    exact, two, four = shown
    assert exact.drift == 0 and exact.cosine == pytest.approx(1) and exact.distance == 0
    assert found.chosen == four and found.config == RolloutConfig(stride=STRIDES[1], drift_limit=10)
    assert exact.flops > two.flops > four.flops and exact.seconds is None
    # What a step does beside its rollout is the same.
    rest = [m.flops - m.rollout_flops for m in shown]
    assert rest[0] == rest[1] == rest[2] > 0
    sums, drift = {}, 0.0
    for stride in (1, STRIDES[0]):
        other = make_step(model, rollout=RolloutConfig(stride=stride, check_every=1))
        parts = []
        drawn = calibration.spread_points(other, len(SAMPLES))
        for sample, points in zip(SAMPLES, drawn, strict=True):
            out, gradients = run(other, model, *sample[:2], indices=points)
            parts.append(gradients)
            drift = max(drift, *(out.drift or {0: 0.0}).values())
        sums[stride] = [sum(each) for each in zip(*parts, strict=True)]
    cosine, distance = close(sums[STRIDES[0]], sums[1])
    assert two.cosine == pytest.approx(cosine, abs=1e-9) and 0 < distance < 2
    assert two.distance == pytest.approx(distance, rel=1e-6)
    assert two.drift == pytest.approx(drift, rel=1e-6) and drift > 0


def test_the_samples_have_gradient_points_of_the_whole_schedule():
    # Two of 12 steps are drawn as (0, 5) … (4, 9) or (5, 10).
    step = prfl(make_wan(), PLAN, steps=12)
    firsts = [points[0].step for points in calibration.spread_points(step, 4)]
    assert len({*firsts}) == 4 and min(firsts) <= 1 and firsts[0] == max(firsts) >= 4
    (middle,) = calibration.spread_points(step, 1)
    assert 1 < middle[0].step < 4


class Given:
    """Figures by options: the cost is a product of factors, the drift a sum."""

    FACTORS = {
        ("a", 1): (0.9, 0.01),
        ("a", 2): (0.6, 0.05),
        ("a", 3): (0.5, 0.2),
        ("b", 1): (0.8, 0.02),
        ("b", 2): (0.7, 0.06),
        ("c", 1): (0.999, 0.001),
        ("d", 1): (0.4, math.nan),
    }

    def __init__(self, limit):
        self.limit, self.step, self.device, self.calls = limit, None, None, []
        self.longest = 1
        self.exact = self.measure({})

    def measure(self, options):
        self.calls.append(options)
        parts = [self.FACTORS[item] for item in options.items()]
        cost = math.prod([100.0, *(factor for factor, _ in parts)])
        return Measured(options, cost, 0.0, None, sum(drift for _, drift in parts), 1.0, 0.0)

    def fits(self, measured):
        return measured.drift <= self.limit

    def moving_layers(self):
        return None


@pytest.mark.parametrize(
    "limit,chosen",
    [
        (0.1, {"a": 2, "b": 1}),  # b at 2 beside a would drift by 0.11
        (0.12, {"a": 2, "b": 2}),
        (1.0, {"a": 3, "b": 2}),
        (0.02, {"b": 1}),  # a at 1 beside it would drift by 0.03
        (0.0005, {}),
    ],
)
def test_the_search_adds_the_strongest_options_that_fit_together(monkeypatch, limit, chosen):
    values = {name: [{n: i} for n, i in Given.FACTORS if n == name] for name in "abcd"}
    monkeypatch.setattr(calibration, "ladders", lambda step, device, dense: values)
    bench = Given(limit)
    best, found = calibration._search(bench, lambda measured: None)
    assert dict(best.options) == chosen  # c saves too little
    assert len(bench.calls) == len(found)  # none is measured twice
    if limit < 0.05:
        assert {"a": 3} not in bench.calls  # the ladder ends at the first that does not fit


class GivenOrders:
    """Figures by stride and order: all orders of a stride cost the same."""

    DRIFT = {(2, None): 0.02, (2, 1): 0.03, (2, 3): 0.01, (4, None): 0.2, (4, 3): 0.09}

    def __init__(self):
        self.step, self.device, self.longest, self.calls = make_step(), None, 2, []
        self.exact = Measured({}, 100.0, 0.0, None, 0.0, 1.0, 0.0)

    def measure(self, options):
        self.calls.append(dict(options))
        key = options["stride"], options.get("solver_order")
        return Measured(options, 100.0 / key[0], 0.0, None, self.DRIFT[key], 1.0, 0.0)

    def fits(self, measured):
        return measured.drift <= 0.1

    def moving_layers(self):
        return None


def test_each_stride_has_the_order_that_drifts_least(monkeypatch):
    values = {"stride": [{"stride": 2}, {"stride": 4}]}
    monkeypatch.setattr(calibration, "ladders", lambda step, device, dense: values)
    bench = GivenOrders()
    best, found = calibration._search(bench, lambda measured: None)
    assert best.options == {"stride": 4, "solver_order": 3}
    # Order 1, which drifts more at the first stride, is not tried at the next.
    assert bench.calls == [
        {"stride": 2},
        {"stride": 2, "solver_order": 1},
        {"stride": 2, "solver_order": 3},
        {"stride": 4},
        {"stride": 4, "solver_order": 3},
    ]
    assert len(found) == 6
    assert calibration.other_orders(make_step(scheduler=FlowUniPC(order=3))) == [1, 2]
    assert calibration.other_orders(make_step(scheduler=FlowEuler())) == []


def test_options_depend_on_guidance_and_on_access_to_the_blocks():
    plain = make_step()
    everywhere = ["stride", "first_block_cache", "teacache", "sparse_attention"]
    assert list(ladders(plain, CPU)) == everywhere
    assert list(ladders(plain, CPU, None)) == everywhere[:-1]
    model = plain.sampler.transformer
    negative = {"encoder_hidden_states": TEXT["encoder_hidden_states"].flip(0)}
    guided = make_step(model, guidance=Guidance(3.0, negative), rollout=RolloutConfig(cache=False))
    assert list(ladders(guided, CPU)) == ["stride", "guidance_interval"]
    eight_bits = ["fp8_linears", "fp8_attention"]
    assert list(ladders(plain, GPU)) == [*ladders(plain, CPU), *eight_bits]
    for name, values in {**ladders(plain, CPU), **ladders(guided, CPU)}.items():
        beside = {"sparse_dense_layers"} if name == "sparse_attention" else set()
        assert all(set(options) == {name} | beside for options in values)
        assert all(RolloutConfig(**options).inexact for options in values)


def test_a_drift_past_the_budget_ends_a_measurement(only_strides):
    found = calibrate(make_step(), SAMPLES[:1], 1e-12)
    assert found.chosen == found.measured[0] and found.config == RolloutConfig(drift_limit=1e-12)
    exact, past = found.measured  # a larger stride is not tried
    # Costs of fewer samples would be of other gradient points.
    assert math.isnan(past.flops) and math.isnan(past.rollout_flops) and past.seconds is None
    assert math.isnan(past.cosine) and past.drift > 1e-12 and exact.cosine == pytest.approx(1)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert RolloutConfig(**json.loads(text)["config"]) == found.config
    assert json.loads(text)["measured"][1]["cosine"] is None


def test_rollouts_of_single_steps_try_no_option_that_needs_two():
    step = prfl(patch(with_lora(make_wan())), PLAN, steps=4)  # points 0 or 1, and 1 or 2
    found = calibrate(step, SAMPLES[:1], 10.0)
    tried = {name for each in found.measured for name in each.options}
    assert tried == {"sparse_attention", "sparse_dense_layers"}


def test_the_layers_that_sparse_attention_moves_most_stay_dense_first():
    # Pooled scores of blocks of one token would cost as much as attention saves.
    config = RolloutConfig(sparse_predictor="tiles")
    step = make_step(rollout=config)
    bench = calibration._Bench(step, SAMPLES[:1], 10.0)
    layers = bench.moving_layers()
    assert layers is not None and len(layers) == 1  # a quarter of the two, rounded up
    assert all(p.grad is None for p in bench.parameters)
    *weak, half, quarter = ladders(step, CPU, layers)["sparse_attention"]
    assert [each["sparse_dense_layers"] for each in weak] == [layers] * 4
    assert half["sparse_dense_layers"] == quarter["sparse_dense_layers"] == ()
    measured = [bench.measure(each) for each in (weak[0], half, quarter)]
    assert bench.exact.flops > measured[0].flops > measured[1].flops > measured[2].flops
    assert all(m.drift > 0 and m.cosine > 0.9 for m in measured)
    errors = {}
    step.use_rollout(replace(config, sparse_attention=0.5, compile="off", check_every=1000))
    step.engine.trajectories, step.engine.sparse_errors = 1, errors
    step(*SAMPLES[0][:2], generator=torch.Generator().manual_seed(0), indices=bench.points[0])
    assert layers == (max(errors, key=errors.get),)
    one = prfl(patch(with_lora(make_wan())), GradientPlan.prfl(points=1), steps=8)
    assert calibration._Bench(one, SAMPLES[:1] * 4, 10.0).moving_layers()  # its rollout is long
    uncached = make_step(step.sampler.transformer, rollout=RolloutConfig(cache=False))
    for parameter in trained(step.sampler.transformer):
        parameter.grad = None
    assert calibration._Bench(uncached, SAMPLES[:1], 10.0).moving_layers() is None


def test_bad_calibrations_are_refused():
    step = make_step()
    model = step.sampler.transformer
    with pytest.raises(ValueError, match="drift is 0"):
        calibrate(step, SAMPLES, 0.0)
    with pytest.raises(ValueError, match="number of samples is 0, expected at least 1"):
        calibrate(step, [], 0.1)
    with pytest.raises(ValueError, match="rollout is .*expected an exact one"):
        calibrate(make_step(model, rollout=RolloutConfig(stride=2)), SAMPLES, 0.1)
    with pytest.raises(ValueError, match="expected one of a model"):
        calibrate(make_step(lambda x, t, c: x), SAMPLES, 0.1)
    with pytest.raises(ValueError, match="exact gradient is 'zero'.*target"):
        calibrate(make_step(model, target=-1.0), SAMPLES[:1], 0.1)
    with pytest.raises(ValueError, match="exact loss is 'not finite'"):
        broken = make_step(model, reward=lambda x, t, c: x.mean((1, 2, 3, 4)) * math.nan)
        calibrate(broken, SAMPLES[:1], 0.1)
    trained(model)[0].grad = torch.zeros_like(trained(model)[0])
    with pytest.raises(ValueError, match="expected None.*zero_grad"):
        calibrate(step, SAMPLES, 0.1)
