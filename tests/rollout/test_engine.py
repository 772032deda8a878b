"""The rollout engine: exact options to the bit, and the reports of options that do not apply."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from engine_world import EVERYWHERE, assert_same, field, make_wan, no_warning, walk, wan_inputs
from wan import float_means_double, tiny_wan

from prfl_fast.feedback.step import PRFL
from prfl_fast.models import inference
from prfl_fast.models.block_timer import WAITING
from prfl_fast.models.registry import find_adapter, patch
from prfl_fast.models.velocity import ModelCall
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine, why_not_compiled
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.rollout.trajectory import Trajectory, rollout


@pytest.mark.cases(2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guided", [None, "batched", "sequential"])
@pytest.mark.parametrize("case", ["t2v", "i2v", "first-frame"])
def test_caches_change_no_bit(case, guided, precision):
    x, conditions = wan_inputs(case)
    model = ModelCall(make_wan(case, lora=True), precision)
    guidance = None
    if guided is not None:
        negative = {"encoder_hidden_states": wan_inputs(case, seed=7)[1]["encoder_hidden_states"]}
        if guided == "sequential" and case == "t2v":
            negative = {"encoder_hidden_states": negative["encoder_hidden_states"][:1, :4]}
        guidance = Guidance(4.0, negative, batched=guided == "batched")
    plain, _ = walk(model, x, conditions, None, guidance=guidance)
    engine = RolloutEngine(model)
    ours, trajectory = walk(model, x, conditions, engine, guidance=guidance)
    assert_same(ours, plain)
    assert trajectory.drift is None and not engine.inexact
    assert [n for n in engine.notes if "compiled" not in n] == []
    off, _ = walk(model, x, conditions, RolloutConfig(cache=False), guidance=guidance)
    assert_same(off, plain)


def test_gradients_of_a_step_are_the_same_bits_with_caches():
    def reward(x, t, c):
        return (x.square().mean((1, 2, 3, 4)) * t / 1000).sigmoid()

    x, conditions = wan_inputs()
    gradients = []
    for cache in (True, False):
        model = make_wan()
        config = RolloutConfig(cache=cache)
        step = PRFL(model, reward, FlowUniPC(), num_inference_steps=6, rollout=config)
        out = step(x, conditions, indices=(1, 4))
        gradients.append([p.grad for p in model.parameters()] + [out.rewards, out.latents])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_merged_adapters_are_close_and_leave_the_model_alone():
    x, conditions = wan_inputs()
    model = make_wan(lora=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain, _ = walk(model, x, conditions, None)
    merged, _ = walk(model, x, conditions, RolloutConfig(merge_lora=True))
    wide = copy.deepcopy(model).double()
    with float_means_double():
        text = {k: v.double() for k, v in conditions.items()}
        oracle, _ = walk(wide, x.double(), text, None)
    for step, exact in oracle.items():
        error, own = ((y[step].double() - exact).abs().max() for y in (merged, plain))
        assert error <= 2 * own + 1e-6 * exact.abs().max()
    assert not all(torch.equal(merged[step], plain[step]) for step in plain)  # it was at work
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again, _ = walk(model, x, conditions, None)
    assert_same(again, plain)


def test_caches_are_gone_when_the_gradient_step_begins(monkeypatch):
    x, conditions = wan_inputs()
    model, opened, alive = make_wan(), [], []
    gc.freeze()  # what was imported for the model too: else each collection takes seconds
    adapter = find_adapter(model)
    original = type(adapter).open_rollout

    def spy(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        opened.append((len(args[2]), weakref.ref(made)))
        return made

    monkeypatch.setattr(type(adapter), "open_rollout", spy)

    def reward(x, t, c):
        gc.collect()
        alive.append([count for count, made in opened if made() is not None])
        return x.mean((1, 2, 3, 4))

    step = PRFL(model, reward, FlowEuler(), num_inference_steps=8, rollout=RolloutConfig())
    step(x, conditions, indices=(0, 3, 4, 6))
    assert [count for count, _ in opened] == [2, 1]  # the steps each run takes, no more
    assert alive == [[], [], [], []]


def test_a_run_that_fails_leaves_no_caches_and_no_session():
    x, conditions = wan_inputs()
    model = make_wan()
    sampler, engine = Sampler(model, FlowEuler(), 6), RolloutEngine(model, RolloutConfig())
    trajectory = Trajectory(sampler, x, conditions, engine=engine)

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectory.run(4, fail)
    assert trajectory.index == 1
    trajectory.run(6)
    assert torch.equal(trajectory.x, rollout(model, x, conditions, FlowEuler(), 6))


def test_a_plain_function_is_called_as_it_is_and_that_is_said_once(caplog):
    x, _ = wan_inputs()
    engine = RolloutEngine(field)
    with caplog.at_level(logging.INFO, "prfl_fast.rollout.engine"), no_warning():
        for _ in range(3):
            out = rollout(field, x, {}, FlowEuler(), 4, rollout_config=engine)
    assert torch.equal(out, rollout(field, x, {}, FlowEuler(), 4))
    assert len(engine.notes) == 1 and "function" in engine.notes[0]
    assert [r.message for r in caplog.records] == engine.notes


def test_what_was_asked_for_and_is_not_done_is_a_warning():
    x, conditions = wan_inputs()
    model = tiny_wan()  # not patched
    config = RolloutConfig(fp8_linears=EVERYWHERE, drift_limit=0.1)
    engine = RolloutEngine(model, config)
    with pytest.warns(UserWarning, match="not patched"):
        out = rollout(model, x, conditions, FlowEuler(), 4, rollout_config=engine)
    assert torch.equal(out, rollout(model, x, conditions, FlowEuler(), 4))
    assert not engine.inexact and engine.drift is None
    with no_warning():
        rollout(model, x, conditions, FlowEuler(), 4, rollout_config=engine)
    patch(model)  # from now on it can
    rollout(model, x, conditions, FlowEuler(), 4, rollout_config=engine)
    assert engine.inexact


def test_why_blocks_are_not_compiled():
    good = {"device": "cuda", "ratio": WAITING, "same_shape": True}
    assert why_not_compiled("auto", **good) is None
    assert why_not_compiled("on", **{**good, "device": "cpu", "same_shape": False}) is None
    assert "'off'" in why_not_compiled("off", **good)
    assert "cpu" in why_not_compiled("auto", **{**good, "device": "cpu"})
    assert "shapes" in why_not_compiled("auto", **{**good, "same_shape": False})
    assert "measures" in why_not_compiled("auto", **{**good, "ratio": None})
    assert "40 % of the GPU's time" in why_not_compiled("auto", **{**good, "ratio": 0.4})
    x, conditions = wan_inputs()
    model = make_wan()
    for mode, said in (("auto", True), ("off", False)):
        engine = RolloutEngine(model, RolloutConfig(compile=mode))
        rollout(model, x, conditions, FlowEuler(), 2, rollout_config=engine)
        assert any("compiled" in note for note in engine.notes) == said


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_compiler_that_fails_is_given_up_where_nobody_asked_for_it(mode, monkeypatch):
    x, conditions = wan_inputs()
    model, tried = make_wan(), []

    def broken(*args):
        tried.append(1)
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here")

    monkeypatch.setattr(inference, "_compiled", lambda: broken)
    monkeypatch.setattr("prfl_fast.rollout.trajectory.RolloutEngine._compiles", lambda *_: True)
    engine = RolloutEngine(model, RolloutConfig(compile=mode))
    if mode == "on":
        with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError):
            rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
        return
    out = rollout(model, x, conditions, FlowEuler(), 3, rollout_config=engine)
    assert torch.equal(out, rollout(model, x, conditions, FlowEuler(), 3)) and len(tried) == 1
    assert any("no compiler here" in note for note in engine.notes)
