"""The rollout engine: exact options to the bit, inexact ones against drifts computed by hand."""

import copy
import gc
import logging
import math
import warnings
import weakref

import e4m3
import numpy as np
import pytest
import torch
from torch import nn
from wan import float_means_double, inputs, tiny_wan

import prfl_fast.adapters
from prfl_fast import rollout_block
from prfl_fast.adapters import find_adapter
from prfl_fast.kernels import fp8_linear, quantise_fp8
from prfl_fast.model_call import Guidance, ModelCall
from prfl_fast.patching import patch
from prfl_fast.rollout_engine import (
    LARGE_BLOCK,
    RolloutEngine,
    RolloutPrecision,
    RolloutSettings,
    why_not_compiled,
)
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.step import PRFL
from prfl_fast.trainer import add_lora
from prfl_fast.trajectory import Trajectory, rollout

EVERYWHERE = (0.0, 1.0)


def precise(**kwargs):
    return RolloutSettings(precision=RolloutPrecision(**kwargs))


def make_wan(case="t2v", lora=False, **config):
    model = patch(tiny_wan(case, **config))
    if lora:
        add_lora(model, 4, targets=("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"))
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def wan_inputs(case="t2v", batch=2, seed=1):
    x, _, conditions = inputs(case, batch=batch, seed=seed)
    return x, conditions


def walk(model, x, conditions, settings, *, visit=(2, 5), steps=7, scheduler=None, **kwargs):
    """Latents wherever a gradient step begins and ends, and the trajectory; an engine if given."""
    engine = settings if isinstance(settings, RolloutEngine) else None
    if isinstance(settings, RolloutSettings):
        engine = RolloutEngine(model, settings)
    scheduler = FlowUniPC() if scheduler is None else scheduler
    trajectory = Trajectory(
        model, x, conditions, scheduler, steps, engine=engine, visit=visit, **kwargs
    )
    seen = {}
    for step in visit:
        trajectory.run(step)
        seen[step] = trajectory.x
        with torch.enable_grad():
            trajectory.move_to(trajectory.solve(trajectory.velocity()))
        seen[step + 1] = trajectory.x
    return seen, trajectory


def assert_same(left, right):
    assert left.keys() == right.keys()
    for step, x in left.items():
        assert torch.equal(x, right[step]), step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guided", [None, "batched", "sequential"])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
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
    off, _ = walk(model, x, conditions, RolloutSettings(cache=False), guidance=guidance)
    assert_same(off, plain)


def test_gradients_of_a_step_are_the_same_bits_with_caches():
    x, conditions = wan_inputs()
    gradients = []
    for cache in (True, False):
        model = make_wan()
        step = PRFL(
            model,
            lambda x, t, c: (x.square().mean((1, 2, 3, 4)) * t / 1000).sigmoid(),
            FlowUniPC(),
            num_steps=6,
            rollout=RolloutSettings(cache=cache),
        )
        out = step(x, conditions, indices=(1, 4))
        gradients.append([p.grad for p in model.parameters()] + [out.rewards, out.latents])
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_merged_adapters_are_close_and_leave_the_model_alone():
    x, conditions = wan_inputs()
    model = make_wan(lora=True)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plain, _ = walk(model, x, conditions, None)
    merged, _ = walk(model, x, conditions, RolloutSettings(merge_lora=True))
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
    adapter = find_adapter(model)
    original = type(adapter).open_rollout

    def spy(self, *args, **kwargs):
        opened.append((len(args[2]), original(self, *args, **kwargs)))
        count, made = opened.pop()
        opened.append((count, weakref.ref(made)))
        return made

    monkeypatch.setattr(type(adapter), "open_rollout", spy)

    def reward(x, t, c):
        gc.collect()
        alive.append([count for count, made in opened if made() is not None])
        return x.mean((1, 2, 3, 4))

    step = PRFL(model, reward, FlowEuler(), num_steps=8, rollout=RolloutSettings())
    step(x, conditions, indices=(0, 3, 4, 6))
    assert [count for count, _ in opened] == [2, 1]  # the steps each run takes, no more
    assert alive == [[], [], [], []]


def test_a_run_that_fails_leaves_no_caches_and_no_session():
    x, conditions = wan_inputs()
    model = make_wan()
    trajectory = Trajectory(
        model, x, conditions, FlowEuler(), 6, engine=RolloutEngine(model, RolloutSettings())
    )

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trajectory.run(4, fail)
    assert trajectory.index == 1 and trajectory._session is None
    trajectory.run(6)
    assert torch.equal(trajectory.x, rollout(model, x, conditions, FlowEuler(), 6))


# What is not done, and how it is said.


def field(x, timestep, conditions):
    return 0.5 * x


def test_a_plain_function_is_called_as_it_is_and_that_is_said_once(caplog):
    x, _ = wan_inputs()
    engine = RolloutEngine(field)
    with caplog.at_level(logging.INFO, "prfl_fast.rollout_engine"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            out = rollout(field, x, {}, FlowEuler(), 4, settings=engine)
    assert torch.equal(out, rollout(field, x, {}, FlowEuler(), 4))
    assert len(engine.notes) == 1 and "function" in engine.notes[0]
    assert [r.message for r in caplog.records] == engine.notes


def test_what_was_asked_for_and_is_not_done_is_a_warning():
    x, conditions = wan_inputs()
    model = tiny_wan()  # not patched
    settings = precise(linears=EVERYWHERE, drift_limit=0.1)
    engine = RolloutEngine(model, settings)
    with pytest.warns(UserWarning, match="not patched"):
        out = rollout(model, x, conditions, FlowEuler(), 4, settings=engine)
    assert torch.equal(out, rollout(model, x, conditions, FlowEuler(), 4))
    assert not engine.inexact and engine.drift is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rollout(model, x, conditions, FlowEuler(), 4, settings=engine)
    patch(model)  # from now on it can
    rollout(model, x, conditions, FlowEuler(), 4, settings=engine)
    assert engine.inexact


def test_why_blocks_are_not_compiled():
    good = {"device": "cuda", "positions": 1024, "width": 1536, "same_shape": True}
    assert why_not_compiled("auto", **good) is None
    assert why_not_compiled("on", **{**good, "device": "cpu", "same_shape": False}) is None
    assert "'off'" in why_not_compiled("off", **good)
    assert "cpu" in why_not_compiled("auto", **{**good, "device": "cpu"})
    assert "shapes" in why_not_compiled("auto", **{**good, "same_shape": False})
    for positions, small in ((LARGE_BLOCK // 1536, True), (LARGE_BLOCK // 1536 + 1, False)):
        reason = why_not_compiled("auto", **{**good, "positions": positions})
        assert (reason is None) == small
    x, conditions = wan_inputs()
    model = make_wan()
    for mode, said in (("auto", True), ("off", False)):
        engine = RolloutEngine(model, RolloutSettings(compile=mode))
        rollout(model, x, conditions, FlowEuler(), 2, settings=engine)
        assert any("compiled" in note for note in engine.notes) == said


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_compiler_that_fails_is_given_up_where_nobody_asked_for_it(mode, monkeypatch):
    x, conditions = wan_inputs()
    model, tried = make_wan(), []

    def broken(*args):
        tried.append(1)
        raise torch._dynamo.exc.InternalTorchDynamoError("no compiler here")

    monkeypatch.setattr(rollout_block, "_compiled", lambda: broken)
    monkeypatch.setattr("prfl_fast.trajectory.RolloutEngine._compiles", lambda *_: True)
    engine = RolloutEngine(model, RolloutSettings(compile=mode))
    if mode == "on":
        with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError):
            rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
        return
    out = rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
    assert torch.equal(out, rollout(model, x, conditions, FlowEuler(), 3)) and len(tried) == 1
    assert any("no compiler here" in note for note in engine.notes)


# Fewer steps, with a velocity whose drift can be computed by hand.

RATE = 0.7
SIGMAS = FlowEuler()
SIGMAS.set_timesteps(6)
SIGMAS = SIGMAS.sigmas.double().tolist()


def linear(x, timestep, conditions):
    """v = RATE·x, so that an Euler step from σ to σ' multiplies x by 1 + (σ'-σ)·RATE."""
    return RATE * x


def factor(here, there):
    return 1 + (SIGMAS[there] - SIGMAS[here]) * RATE


def product(*kept):
    return math.prod(factor(a, b) for a, b in zip(kept, kept[1:], strict=False))


def make_x(batch=2, dtype=torch.float64):
    return torch.randn(
        batch, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(dtype)


def test_drift_of_fewer_steps_is_what_one_computes_by_hand():
    engine = RolloutEngine(linear, precise(stride=3))
    seen, trajectory = walk(
        linear, make_x(), {}, engine, scheduler=FlowEuler(), visit=(3, 4), steps=6
    )
    # 0 → 3 in one step, 3 → 4 and 4 → 5 with gradient, exactly.
    torch.testing.assert_close(seen[3], make_x() * factor(0, 3))
    expected = abs(factor(0, 3) / product(0, 1, 2, 3) - 1)
    assert list(trajectory.drift) == [3, 4] and expected > 0.005
    assert trajectory.drift[3] == pytest.approx(expected, rel=1e-9)
    assert trajectory.drift[4] == pytest.approx(expected, rel=1e-9)
    assert engine.drift == trajectory.drift and not engine.fallen_back
    # To the end, 5 → 6 is a step of its own: only the distance that was there already.
    trajectory.run(6)
    assert trajectory.drift[6] == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(trajectory.x, make_x() * product(0, 3, 4, 5, 6))


@pytest.mark.parametrize("start", [0, 1])
def test_a_check_begins_where_the_trajectory_did(start):
    """A gradient step came before the first step of the rollout."""
    engine = RolloutEngine(linear, precise(stride=4))
    seen, trajectory = walk(
        linear,
        make_x(),
        {},
        engine,
        scheduler=FlowEuler(),
        visit=(start, 4),
        steps=6,
        start=start,
    )
    first = start + 1
    torch.testing.assert_close(seen[4], make_x() * product(start, first, 4))
    expected = abs(factor(first, 4) / product(*range(first, 5)) - 1)
    assert trajectory.drift[4] == pytest.approx(expected, rel=1e-9) and expected > 0.005


def test_drift_is_the_largest_of_the_batch():
    x = make_x(3)
    rates = torch.tensor([0.0, 0.9, 0.3], dtype=torch.float64).view(3, 1, 1, 1, 1)
    engine = RolloutEngine(field, precise(stride=6))
    rollout(lambda x, t, c: rates * x, x, {}, FlowEuler(), 6, settings=engine)
    one = 1 - 0.9 * SIGMAS[0]
    several = math.prod(1 + (b - a) * 0.9 for a, b in zip(SIGMAS, SIGMAS[1:], strict=False))
    assert engine.drift == {6: pytest.approx(abs(one / several - 1), rel=1e-9)}


def test_past_the_limit_the_exact_latents_go_on_and_later_rollouts_are_exact():
    x = make_x()
    drift = abs(factor(0, 3) / product(0, 1, 2, 3) - 1)
    plain, _ = walk(linear, x, {}, None, steps=6, visit=(3,), scheduler=FlowEuler())
    engine = RolloutEngine(linear, precise(stride=3, drift_limit=1.01 * drift))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept, _ = walk(linear, x, {}, engine, steps=6, visit=(3,), scheduler=FlowEuler())
    assert not torch.equal(kept[3], plain[3]) and not engine.fallen_back
    engine = RolloutEngine(linear, precise(stride=3, drift_limit=0.99 * drift, check_every=1))
    with pytest.warns(RuntimeWarning) as said:
        fallen, trajectory = walk(linear, x, {}, engine, steps=6, visit=(3,), scheduler=FlowEuler())
        trajectory.run(6)
    (warning,) = [str(w.message) for w in said]
    for figure in (f"{drift:.3g} at step 3", f"{0.99 * drift:g}", f"sigma {SIGMAS[3]:.3g}"):
        assert figure in warning
    assert_same(fallen, plain)
    assert torch.equal(trajectory.x, rollout(linear, x, {}, FlowEuler(), 6))
    assert engine.fallen_back and not engine.inexact and engine.stride == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later, trajectory = walk(linear, x, {}, engine, steps=6, visit=(3,), scheduler=FlowEuler())
    assert_same(later, plain)
    assert trajectory.drift is None and trajectory.steps_to(6) == 2


def test_a_drift_that_is_not_a_number_is_past_every_limit():
    def broken(x, timestep, conditions):  # only where a step is left out
        return x * (math.nan if calls.append(1) or len(calls) == 1 else 1.0)

    calls = []
    engine = RolloutEngine(broken, precise(stride=3, drift_limit=1e9))
    with pytest.warns(RuntimeWarning, match="nan at step 3"):
        out = rollout(broken, make_x(), {}, FlowEuler(), 6, settings=engine)
    assert engine.fallen_back and out.isfinite().all()


def test_unipc_goes_on_from_the_exact_history():
    x = make_x()

    def curved(x, timestep, conditions):
        return torch.tanh(x) * timestep.view(-1, 1, 1, 1, 1) / 500

    plain, _ = walk(curved, x, {}, None, steps=9, visit=(4, 7))
    engine = RolloutEngine(curved, precise(stride=2, drift_limit=1e-9))
    with pytest.warns(RuntimeWarning):
        ours, _ = walk(curved, x, {}, engine, steps=9, visit=(4, 7))
    assert_same(ours, plain)


def test_what_guides_a_step_guides_the_exact_rollout_too():
    """Otherwise the guidance itself would count as drift."""
    x = make_x()
    engine = RolloutEngine(linear, precise(stride=3))
    trajectory = Trajectory(linear, x, {}, FlowEuler(), 6, engine=engine, visit=(3,))
    trajectory.run(6, adjust=lambda index, v: v + 5 * x if index == 3 else v)
    a, b = factor(0, 3), product(0, 1, 2, 3)
    pushed = (SIGMAS[4] - SIGMAS[3]) * 5
    a4, b4 = a * factor(3, 4) + pushed, b * factor(3, 4) + pushed
    assert trajectory.drift[4] == pytest.approx(abs(a4 / b4 - 1), rel=1e-9)


def test_which_trajectories_are_checked_survives_a_resume():
    x = make_x()

    def run(engine, count):
        for _ in range(count):
            _, trajectory = walk(linear, x, {}, engine, steps=6, visit=(3,), scheduler=FlowEuler())
            checked.append(trajectory.drift is not None)

    checked = []
    run(RolloutEngine(linear, precise(stride=3, check_every=3)), 7)
    whole, checked = checked, []
    assert whole == [True, False, False, True, False, False, True]
    first = RolloutEngine(linear, precise(stride=3, check_every=3))
    run(first, 2)
    second = RolloutEngine(linear, precise(stride=3, check_every=3))
    second.load_state_dict(first.state_dict())
    run(second, 5)
    assert checked == whole
    # A trajectory without a rollout is neither counted nor checked.
    _, trajectory = walk(linear, x, {}, second, steps=6, visit=(0,), scheduler=FlowEuler())
    assert second.trajectories == 7 and trajectory.drift is None
    second.fallen_back = True
    third = RolloutEngine(linear, precise(stride=3))
    third.load_state_dict(second.state_dict())
    assert third.fallen_back and not third.inexact
    with pytest.raises(ValueError, match="expected fallen_back"):
        third.load_state_dict({"trajectories": 1})


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

    def check_latents(self, model, x, conditions):
        assert x.shape[1] == 16

    def velocity(self, model, x, timestep, conditions):
        return torch.einsum("oc,bcfhw->bofhw", model.weight, x)

    def open_rollout(self, model, x, timesteps, conditions, *, merge_lora, compile):
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
        weight = quantise_fp8(self.model.weight.detach())
        out = fp8_linear(*quantise_fp8(tokens), *weight).to(x.dtype)
        return out.transpose(1, 2).reshape(x.shape)


@pytest.fixture
def matrices(monkeypatch):
    adapter = MatrixAdapter()
    known = prfl_fast.adapters.ADAPTERS
    monkeypatch.setattr(prfl_fast.adapters, "ADAPTERS", (*known, adapter))
    return adapter


def test_fp8_drift_is_what_one_computes_by_hand(matrices):
    """448 is the largest e4m3 number, so tokens with it have scale 1; 17 lies between 16 and 18 and
    is rounded to the even 16. With W = 1 the velocity is x; in FP8 it is 448 and fifteen times 16.
    """
    x = torch.full((2, 16, 1, 2, 2), 17.0)
    x[:, 0] = 448.0
    model = Matrix(torch.eye(16))
    # Only the first step's level is in the interval.
    engine = RolloutEngine(model, precise(linears=(0.99, 1.0)))
    rollout(model, x, {}, FlowEuler(), 6, settings=engine)
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
    engine = RolloutEngine(model, precise(linears=EVERYWHERE))
    rollout(model, x, {}, FlowEuler(), 6, settings=engine)

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
        # Sums in float32 may round one bfloat16 number of v the other way, which moves the drift
        # by 2e-4 (one of 60 seeds); without such a number the two agree to 6e-6.
        assert engine.drift[index + 1] == pytest.approx(drift, rel=1e-3) and drift > 0.001


def test_precision_follows_the_noise_level_of_each_step(matrices):
    model = Matrix(torch.eye(16))
    x = make_x(dtype=torch.float32)
    low, high = SIGMAS[3], SIGMAS[1]
    settings = precise(linears=(low, high), attention=(0.0, SIGMAS[5]), check_every=1000)
    engine = RolloutEngine(model, settings)
    engine.trajectories = 1  # not one that is checked
    rollout(model, x, {}, FlowEuler(), 6, settings=engine)
    kinds = [call[1:] for call in matrices.calls]
    assert kinds == [
        ("exact", "exact"),
        ("fp8", "exact"),
        ("fp8", "exact"),
        ("fp8", "exact"),
        ("exact", "exact"),
        ("exact", "fp8"),
    ]
    scheduler = FlowEuler()
    scheduler.set_timesteps(6)
    assert [call[0] for call in matrices.calls] == scheduler.timesteps.tolist()


def test_guided_fp8_keeps_a_model_for_each_branch(matrices):
    model = Matrix(torch.eye(16) / 3)
    x, ones = make_x(dtype=torch.float32), {"text": torch.ones(2, 1)}
    for batched in (True, False):
        matrices.calls.clear()
        engine = RolloutEngine(model, precise(linears=EVERYWHERE, check_every=1000))
        guidance = Guidance(1.5, {"text": torch.zeros(1, 1)}, batched=batched)
        rollout(model, x, ones, FlowEuler(), 3, settings=engine, guidance=guidance)
        kinds = [call[1] for call in matrices.calls]
        each = ["fp8"] * (1 if batched else 2) + ["exact"] * (1 if batched else 2)
        assert kinds == each * 3 and 0 < engine.drift[3] < 0.1


# FP8 on a Wan: what the engine runs, and what makes it stop.


def relative(x, y):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(x, y, strict=True))


def test_fp8_drift_of_a_wan_equals_two_plain_loops():
    x, conditions = wan_inputs()
    model = make_wan(lora=True, head_dim=32)
    settings = precise(linears=(0.5, 1.0), attention=(0.0, 0.9))
    seen, trajectory = walk(
        model, x, conditions, settings, scheduler=FlowEuler(), visit=(3,), steps=5
    )
    trajectory.run(5)
    scheduler = FlowEuler()
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double().tolist()
    times = [t.expand(2) for t in scheduler.timesteps]
    adapter = find_adapter(model)
    opened = adapter.open_rollout(model, x, times, conditions)
    exact = ours = x
    with torch.no_grad():
        for i, t in enumerate(times):
            delta = sigmas[i + 1] - sigmas[i]
            # alpha, as the solver has it: a sum whose last bit differs may round an FP8 number the
            # other way, and one such number moves the drift by 5e-3.
            exact = torch.add(exact, adapter.velocity(model, exact, t, conditions), alpha=delta)
            if i == 3:  # the step with gradient
                v = adapter.velocity(model, ours, t, conditions)
            else:
                v = opened.velocity(
                    ours,
                    i,
                    linears="fp8" if sigmas[i] >= 0.5 else "exact",
                    attention="fp8" if sigmas[i] <= 0.9 else "exact",
                )
            ours = torch.add(ours, v, alpha=delta)
            expected = relative(ours.double(), exact.double())
            assert trajectory.drift[i + 1] == pytest.approx(expected, rel=1e-3)
    assert 1e-4 < trajectory.drift[5] < 0.1


@pytest.mark.parametrize(
    "settings", [precise(linears=EVERYWHERE), RolloutSettings(merge_lora=True)]
)
def test_weights_are_as_fresh_as_the_last_optimizer_step(settings):
    x, conditions = wan_inputs()
    model = make_wan(lora=True)
    engine = RolloutEngine(model, settings)
    before = rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
    after = rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
    fresh = RolloutEngine(model, settings)
    assert torch.equal(after, rollout(model, x, conditions, FlowEuler(), 3, settings=fresh))
    assert not torch.allclose(after, before, rtol=1e-3)


def plant_outlier(model):
    """A channel of the first feed-forward that is huge for every token and multiplied by nothing.

    Exactly, it changes nothing; but a token's FP8 scale follows its largest number, and so all
    other channels of the token round to almost nothing.
    """
    ffn = model.blocks[0].ffn
    with torch.no_grad():
        ffn.net[0].proj.bias[5] = 1e6
        ffn.net[2].weight[:, 5] = 0.0


def test_a_planted_outlier_makes_the_guard_fall_back():
    x, conditions = wan_inputs()
    settings = precise(linears=EVERYWHERE, drift_limit=0.005)
    model = make_wan()
    engine = RolloutEngine(model, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        _, trajectory = walk(model, x, conditions, engine)
    clean = trajectory.drift
    assert list(clean) == [1, 2, 3, 4, 5] and not engine.fallen_back

    plant_outlier(model)
    plain, exact = walk(model, x, conditions, None)
    engine = RolloutEngine(model, settings)
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later, trajectory = walk(model, x, conditions, engine)
    assert_same(later, plain)
    assert trajectory.drift is None


def test_bad_settings_are_refused():
    for kwargs, message in (
        ({"linears": (0.5, 0.2)}, "linears is"),
        ({"linears": (0.5,)}, "linears is"),
        ({"linears": 0.5}, "linears is"),
        ({"attention": (-0.1, 1.0)}, "attention is"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": True}, "stride is True"),
        ({"check_every": 0}, "check_every is 0"),
        ({"drift_limit": 0.0}, "drift_limit is 0"),
        ({"drift_limit": math.nan}, "drift_limit is nan"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutPrecision(**kwargs)
    assert RolloutPrecision(linears=[0, 1]).linears == (0.0, 1.0)
    with pytest.raises(ValueError, match="compile is 'always'"):
        RolloutSettings(compile="always")
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        RolloutSettings(precision="fp8")
    for kwargs in (
        {"merge_lora": True},
        {"compile": "on"},
        {"precision": RolloutPrecision(linears=EVERYWHERE)},
    ):
        with pytest.raises(ValueError, match="cache is False"):
            RolloutSettings(cache=False, **kwargs)
    with pytest.raises(TypeError, match="supported"):
        RolloutEngine(nn.Linear(2, 2))


def test_an_engine_of_another_model_or_precision_is_refused():
    model, other = make_wan(), make_wan(seed=1)
    x, conditions = wan_inputs()
    engine = RolloutEngine(model)
    rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
    for transformer in (other, ModelCall(model, "bf16")):
        with pytest.raises(ValueError, match="engine was made for another"):
            rollout(transformer, x, conditions, FlowEuler(), 3, settings=engine)


def test_the_first_trajectory_that_runs_inexactly_is_the_first_that_is_checked():
    """One that ran exactly, as the model could not be opened, does not use the check up."""
    model = make_wan(lora=True)
    x, conditions = wan_inputs()
    engine = RolloutEngine(model, precise(linears=EVERYWHERE, drift_limit=1e-9))
    dropout = nn.Dropout(0.5)
    model.blocks[0].attn1.to_out[1] = dropout
    with pytest.warns(UserWarning, match="drops out"):
        rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
    assert engine.trajectories == 0 and engine.drift is None
    model.eval()
    rollout(model, x, conditions, FlowEuler(), 3, settings=engine)  # exact; finds it can be opened
    assert engine.trajectories == 0
    with pytest.warns(RuntimeWarning, match="past drift_limit"):
        rollout(model, x, conditions, FlowEuler(), 3, settings=engine)
    assert engine.fallen_back
