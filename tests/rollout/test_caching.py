"""Residuals of blocks that steps of a rollout reuse, against a loop with hooks on the blocks."""

import copy
import logging

import numpy as np
import pytest
import torch
from engine_world import assert_same, make_wan, walk, wan_inputs
from wan import float_means_double, tiny_wan

from prfl_fast.models.experts import Experts
from prfl_fast.models.registry import patch
from prfl_fast.models.step_cache import COEFFICIENTS, StepCache, StepCacheOptions
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.rollout.trajectory import Trajectory

STEPS, LAYERS = 10, 3
TINY = 1e-30  # runs the caches, which then reuse nothing


def guidance_of(batched):
    negative = {"encoder_hidden_states": wan_inputs(seed=7)[1]["encoder_hidden_states"]}
    return None if batched is None else Guidance(4.0, negative, batched=batched)


def config_of(**options):
    return RolloutConfig(compile="off", check_every=1000, **options)


def engine_of(model, **options):
    engine = RolloutEngine(model, config_of(**options))
    engine.trajectories = 1  # the first would be checked
    return engine


def mean_change(x, before):
    pairs = zip(x, before, strict=True)  # sample by sample
    return max(((a - b).abs().mean() / b.abs().mean()).item() for a, b in pairs)


class Loop:
    """Textbook caching: hooks replace the outputs of the plain model's blocks."""

    def __init__(self, model, kind, threshold, name=None):
        self.kind, self.threshold = kind, threshold
        self.poly = np.poly1d(COEFFICIENTS[name] if name else [1.0, 0.0])
        self.reset()
        self.exact, self.skipped = False, []
        blocks = model.blocks
        blocks[0].register_forward_pre_hook(self.begin)
        blocks[0].register_forward_hook(self.first)
        blocks[-1].register_forward_hook(self.last)

    def reset(self):
        self.time = self.residual = self.block = None
        self.sum = 0.0

    def begin(self, module, args):
        self.x, time = args[0], args[2]
        self.skip = False
        if self.kind == "first" or self.exact:
            return
        if self.time is not None:
            self.sum += self.poly(mean_change(time, self.time))
            self.skip = self.residual is not None and self.sum < self.threshold
            if not self.skip:
                self.sum = 0.0
        self.time = time

    def first(self, module, args, out):
        if self.kind == "tea" or self.exact:
            return
        self.base = out
        moved = out - self.x
        if self.residual is not None:
            self.skip = mean_change(moved, self.block) < self.threshold
        if not self.skip:
            self.block = moved

    def last(self, module, args, out):
        if self.exact:
            return None
        self.skipped.append(self.skip)
        base = self.x if self.kind == "tea" else self.base
        if self.skip:
            return base + self.residual
        self.residual = out - base
        return None


@pytest.mark.cases(2)
@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler])
@pytest.mark.parametrize("batched", [None, True, False])
def test_a_threshold_of_zero_changes_no_bit(scheduler, batched):
    x, conditions = wan_inputs()
    model = make_wan(lora=True)
    options = {"visit": (2, 3, 6), "steps": STEPS, "guidance": guidance_of(batched)}
    plain, _ = walk(model, x, conditions, None, scheduler=scheduler(), **options)
    for given in ({}, {"teacache": TINY}, {"first_block_cache": TINY}):
        engine = engine_of(model, **given)
        ours, _ = walk(model, x, conditions, engine, scheduler=scheduler(), **options)
        assert_same(ours, plain)
        calls = 2 if batched is False else 1
        rollout_steps = 2 + 2 if given else 0  # 0, 1, 4, 5
        assert (engine.reuse.forwards, engine.reuse.saved) == (calls * rollout_steps, 0)
        assert engine.inexact == bool(given)


@pytest.mark.cases(3)
@pytest.mark.parametrize("visit", [(), (4,), (3, 4, 7)])
@pytest.mark.parametrize(
    "kind,threshold,name",
    [("tea", 0.3, None), ("tea", 8.0, "wan2.1-i2v-14b-720p"), ("first", 0.1, None)],
)
def test_skipped_steps_are_those_of_a_textbook_loop(kind, threshold, name, visit):
    x, conditions = wan_inputs()
    x, conditions = x.double(), {k: v.double() for k, v in conditions.items()}
    model = make_wan(layers=LAYERS).double()
    twin = copy.deepcopy(model)
    given = {"teacache": threshold, "teacache_model": name}
    engine = engine_of(model, **(given if kind == "tea" else {"first_block_cache": threshold}))
    loop = Loop(twin, kind, threshold, name)
    with float_means_double(), torch.no_grad():
        sampler = Sampler(model, FlowEuler(), STEPS)
        ours = Trajectory(sampler, x, conditions, engine=engine, visit=visit)
        seen = {}
        for stop in (*visit, STEPS):
            ours.run(stop, lambda: seen.__setitem__(ours.index, ours.x))
            if stop < STEPS:
                ours.move_to(ours.solve(ours.velocity()))
        plain = Trajectory(Sampler(twin, FlowEuler(), STEPS), x, conditions)
        for index in range(STEPS):
            loop.exact = index in visit
            if loop.exact:
                loop.reset()
            plain.move_to(plain.solve(plain.velocity()))
            if index not in visit:
                torch.testing.assert_close(seen[index + 1], plain.x, rtol=1e-12, atol=1e-12)
    share = 1 if kind == "tea" else (LAYERS - 1) / LAYERS
    assert engine.reuse.forwards == len(loop.skipped) == STEPS - len(visit)
    assert engine.reuse.saved == pytest.approx(share * sum(loop.skipped))
    assert any(loop.skipped) and not all(loop.skipped)


def forwards_saved(model, config, batched, visit=(5,)):
    engine = engine_of(model, **config)
    x, conditions = wan_inputs()
    options = {"visit": visit, "steps": STEPS, "guidance": guidance_of(batched)}
    seen, _ = walk(model, x, conditions, engine, **options)
    again, _ = walk(model, x, conditions, engine, **options)
    assert_same(again, seen)  # nothing of the first trajectory is left in the second
    return seen, engine


@pytest.mark.cases(1)
@pytest.mark.parametrize("config", [{"teacache": 0.3}, {"first_block_cache": 0.5}])
def test_branches_of_guidance_have_residuals_of_their_own(config):
    model = make_wan(layers=LAYERS)
    together, one = forwards_saved(model, config, True)
    apart, two = forwards_saved(model, config, False)
    assert one.reuse.saved > 0 and two.reuse.forwards == 2 * one.reuse.forwards
    for step, x in together.items():
        if "teacache" in config:  # the same steps: both branches have the same timesteps
            torch.testing.assert_close(apart[step], x, rtol=1e-4, atol=1e-4)


def test_experts_have_residuals_of_their_own():
    x, conditions = wan_inputs()
    model = patch(Experts(tiny_wan(seed=0), tiny_wan(seed=1), 0.875))
    options = {"visit": (1, 9), "steps": 12}
    plain, _ = walk(model, x, conditions, None, **options)
    ours, _ = walk(model, x, conditions, engine_of(model, teacache=TINY), **options)
    assert_same(ours, plain)
    engine = engine_of(model, teacache=10.0)
    walk(model, x, conditions, engine, **options)
    # Of the 8 steps without gradient, each expert runs its first after a gradient step.
    assert engine.reuse.forwards == 8 and engine.reuse.saved == pytest.approx(8 - 3)


def test_drift_is_measured_and_past_the_limit_rollouts_are_exact(caplog):
    x, conditions = wan_inputs()
    model = make_wan()
    plain, _ = walk(model, x, conditions, None, steps=STEPS)
    engine = RolloutEngine(model, config_of(teacache=10.0))
    with caplog.at_level(logging.INFO):
        _, trajectory = walk(model, x, conditions, engine, steps=STEPS)
    assert max(trajectory.drift.values()) > 1e-5
    assert any("step caching saved" in r.message for r in caplog.records)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        for _ in range(15):
            walk(model, x, conditions, engine, steps=STEPS)
    # A line each time that the number of forwards has doubled.
    assert len([r for r in caplog.records if "step caching" in r.message]) == 4
    strict = RolloutEngine(model, config_of(teacache=10.0, drift_limit=1e-9))
    with pytest.warns(RuntimeWarning, match="drift_limit"):
        fallen, _ = walk(model, x, conditions, strict, steps=STEPS)
    assert_same(fallen, plain)
    assert not strict.inexact and not strict.reuses
    again, _ = walk(model, x, conditions, strict, steps=STEPS)
    assert_same(again, plain)


def test_a_resumed_engine_gives_the_same_trajectory():
    x, conditions = wan_inputs()
    model = make_wan()
    first, second = (engine_of(model, teacache=0.3) for _ in range(2))
    walk(model, x, conditions, first, steps=STEPS)
    second.load_state_dict(first.state_dict())
    ours, _ = walk(model, x, conditions, second, steps=STEPS)
    whole, _ = walk(model, x, conditions, first, steps=STEPS)
    assert_same(ours, whole)


def test_a_first_residual_of_zero_reuses_nothing():
    cache = StepCache(StepCacheOptions(first_block=1.0), 2)
    x, time = torch.ones(1, 2, 3), torch.ones(1, 6, 3)
    for _ in range(2):
        assert torch.equal(cache.run(0, x, time, lambda: x), x)  # 0 / 0 is no small change
        assert torch.equal(cache.run(1, x, time, lambda: 2 * x), 2 * x)
    assert cache.options.counts.saved == 0


@pytest.mark.parametrize(
    "options,message",
    [
        ({"teacache": -0.1}, "teacache is"),
        ({"first_block_cache": float("nan")}, "first_block_cache is"),
        ({"teacache": 0.1, "teacache_model": "sd"}, "teacache_model is"),
        ({"teacache_model": "wan2.1-t2v-14b"}, "teacache_model is"),
        ({"teacache": 0.1, "cache": False}, "cache is"),
    ],
)
def test_unknown_thresholds_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**options)
