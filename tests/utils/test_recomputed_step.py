"""Gradients through several steps: bytes they keep, exceptions, and the cost of gradient points."""

import contextlib
import functools
import gc
import itertools
from fractions import Fraction

import latent_reward
import pytest
import torch
import wan
from experiments import variance
from harness import count_flops
from offload_models import assert_same, build, fill_adapters, gradients, held

import prfl_fast
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.checkpointing import MODES, activation_checkpointing, offload_bytes
from prfl_fast.memory.ledger import Ledger
from prfl_fast.models.registry import find_adapter
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.training.lora import add_lora

pytest.importorskip("diffusers")

SCHEDULERS = {"euler": FlowEuler, "unipc": FlowUniPC}
LONG_PLANS = {"draft": GradientPlan.draft(None), "reno": GradientPlan.reno()}
X, _, TEXT = wan.inputs()
LATENT = X.untyped_storage().nbytes()
NUMBERS = 64  # bytes a step may keep beside its latents: its timestep, one number per sample


def score(x, timestep, conditions):
    """Score nonlinearly, so that the backward reads latents, timestep and text."""
    text = conditions["encoder_hidden_states"].mean((1, 2))
    return torch.tanh(x.square().mean((1, 2, 3, 4)) * (1 + timestep / 1000) + text)


def take_gradients(model, output):
    found = gradients(model)
    if output.gradient is not None:
        found["noise"] = output.gradient
    assert output.finite and found
    return found


# Bytes.
def bytes_of(call):
    """Return the most bytes alive, and those at the call of the reward, device and host together.

    The ledger counts each storage from its creation until it is freed, whichever object holds it.
    """
    at_reward = []

    def reward(x, timestep, conditions):
        at_reward.append(ledger.live + ledger.host)
        return score(x, timestep, conditions)

    with Ledger() as ledger:
        call(reward)
    return ledger.peak + ledger.host_peak, at_reward[0]


def growth(call):
    """Return bytes per step, of the peak and at the reward, from 4 steps to 6 and from 6 to 8."""
    call(score, 4)  # makes the tables and host buffers that stay
    found = [bytes_of(lambda reward, n=n: call(reward, n)) for n in (4, 6, 8)]
    growths = itertools.pairwise(found)
    return [(b - a) / 2 for old, new in growths for a, b in zip(old, new, strict=True)]


def calls_of(model, plan, scheduler=FlowUniPC, **options):
    """Return a function that runs a step of the plan with a reward and a number of steps."""

    def call(reward, steps):
        step = PRFL(model, reward, scheduler(), plan, num_inference_steps=steps, **options)
        take_gradients(model, step(X, TEXT))

    return call


MEMORY = {
    "patched": {"offload": None},
    "unpatched": {"offload": None, "patched": False},
    "full": {"offload": None, "mode": "full"},
    "attention": {"offload": None, "mode": "attention"},
    "offload": {},
    "offload-unpatched": {"patched": False},
    "offload-full": {"mode": "full"},
}


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


SLOW_DRAFT = ("unpatched", "full", "attention", "offload-unpatched", "offload-full")


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "plan_name,scheduler,memory",
    [
        *(("draft", "unipc", memory) for memory in ("patched", "offload")),
        *(("draft", "euler", "unpatched"), ("reno", "unipc", "attention")),
        *slow(*(("draft", "unipc", memory) for memory in SLOW_DRAFT)),
        *slow(*(("reno", "euler", memory) for memory in ("patched", "full", "offload-full"))),
    ],
)
def test_a_trajectory_keeps_one_latent_per_step(plan_name, scheduler, memory):
    model = build(layers=2 if "offload" in memory else 1, **MEMORY[memory])
    found = growth(calls_of(model, LONG_PLANS[plan_name], SCHEDULERS[scheduler]))
    print(plan_name, scheduler, memory, "latents per step", [g / LATENT for g in found])
    assert max(found) <= LATENT + NUMBERS


@pytest.mark.cases(1)
@pytest.mark.parametrize("batched", [True, False])
def test_a_guided_trajectory_keeps_one_latent_per_step(batched):
    model = build(layers=1, offload=None)
    guidance = Guidance(3.0, {name: -value for name, value in TEXT.items()}, batched=batched)
    found = growth(calls_of(model, GradientPlan.draft(None), guidance=guidance))
    assert max(found) <= LATENT + NUMBERS


def test_a_partial_trajectory_keeps_nothing_of_the_steps_before():
    assert max(growth(calls_of(build(layers=1, offload=None), GradientPlan.draft(3)))) <= NUMBERS


@pytest.mark.slow
def test_the_count_sees_a_trajectory_of_plain_autograd():
    """And one that is checkpointed by step but keeps the latents and the velocity."""
    model = build(layers=1, offload=None)
    adapter = find_adapter(model)

    def velocity(x, t):
        return adapter.velocity(model, x, torch.full((2,), float(t)), TEXT)

    def plain(reward, steps, run=lambda f, x, t: f(x, t)):
        x = X
        for i in range(steps):
            x = x - run(velocity, x, 1000 * (1 - i / steps)) / steps
        reward(x, torch.zeros(2), TEXT).sum().backward()
        model.zero_grad(set_to_none=True)

    def checkpointed(reward, steps):
        kept = []

        def run(f, x, t):
            v = torch.utils.checkpoint.checkpoint(f, x, t, use_reentrant=False)
            kept.append(v.detach())
            return v

        plain(reward, steps, run)

    assert min(growth(plain)) > 19 * LATENT
    assert 1.9 * LATENT < min(growth(checkpointed)) <= max(growth(checkpointed)) < 3 * LATENT


# The memory engine.
@pytest.mark.cases(1)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
@pytest.mark.parametrize("plan", [*LONG_PLANS.values(), GradientPlan.draft(2)], ids=str)
def test_checkpointing_changes_no_bit_of_a_long_gradient(plan, patched):
    model = build(2, patched=patched, offload=None)
    step = PRFL(model, score, FlowUniPC(), plan, num_inference_steps=4)
    plain = take_gradients(model, step(X, TEXT))
    assert all(g.abs().max() > 0 for g in plain.values())
    for mode in MODES:
        for offload in (None, "cpu"):
            activation_checkpointing(model, mode, offload)
            assert_same(take_gradients(model, step(X, TEXT)), plain)
            assert (offload_bytes(model)["transferred"] > 0) == (offload is not None)
            assert held(model) == (0, 0)


@pytest.mark.slow
def test_checkpointing_keeps_the_gradient_of_a_long_divergence():
    """The initial model's blocks must also be recomputed without adapters.

    An adapter's gradient is a sum over several calls of its block, in another order if these are
    recomputed.
    """

    def found(mode, offload):
        model = build(2, offload=None)
        add_lora(model, 2)
        torch.manual_seed(5)
        fill_adapters(model)
        activation_checkpointing(model, mode, offload)
        options = {"num_inference_steps": 4, "weight": 1e-3, "divergence": 1.0}
        output = PRFL(model, score, FlowUniPC(), GradientPlan.draft(3), **options)(X, TEXT)
        assert output.divergence > 1e-3
        return take_gradients(model, output)

    expected = found("none", None)
    for mode in MODES:
        for offload in (None, "cpu"):
            gradients = found(mode, offload)
            for name, gradient in gradients.items():
                error = (gradient - expected[name]).norm()
                assert error <= 2e-6 * expected[name].norm(), (name, mode, offload)


# Exceptions.
class Trap:
    """Raise at the n-th call."""

    def __init__(self):
        self.calls, self.at = 0, None

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise KeyError("injected")


@contextlib.contextmanager
def only_new_garbage():
    """Exclude existing objects from collections inside, which would take most of their time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class TrapInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, trap):
        ctx.trap = trap
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.trap()
        return grad, None


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "plan_name,memory",
    [
        *(("draft", memory) for memory in ("patched", "attention", "offload")),
        ("reno", "unpatched"),
        *slow(("draft", "full"), ("reno", "patched"), ("reno", "offload-full")),
    ],
)
def test_exceptions_leave_nothing_alive_and_the_next_call_right(plan_name, memory):
    """Raise at each call of a block, of the reward and of its backward, forward and backward."""
    model, trap = build(layers=1, **MEMORY[memory]), Trap()
    for block in model.blocks:
        block.register_forward_pre_hook(trap)

    def reward(x, timestep, conditions):
        trap()
        return score(TrapInBackward.apply(x, trap), timestep, conditions)

    step = PRFL(model, reward, FlowUniPC(), LONG_PLANS[plan_name], num_inference_steps=3)
    plain = take_gradients(model, step(X, TEXT))
    calls, trap.calls = trap.calls, 0
    # Blocks of 3 steps, recomputed in 2 of them; the reward and its backward.
    assert calls >= 5 * len(model.blocks) + 2
    with Ledger() as ledger, only_new_garbage():
        take_gradients(model, step(X, TEXT))
        gc.collect()
        live, host = ledger.live, ledger.host
        for at in range(1, calls + 1):
            trap.calls, trap.at = 0, at
            with pytest.raises(KeyError, match="injected"):
                step(X, TEXT)
            model.zero_grad(set_to_none=True)
            # After an exception, autograd keeps its other ready tasks until the next backward.
            torch.zeros((), requires_grad=True).backward()
            gc.collect()
            assert ledger.live == live, at
            assert held(model) == (0, 0)
            trap.at = None
            if at % 3 == 1:
                assert_same(take_gradients(model, step(X, TEXT)), plain)
                assert ledger.live == live and ledger.host == host
    assert torch.is_grad_enabled()


# Cost.
def rollouts_of(steps):
    """Count steps without gradient before the last of these, and their unbroken stretches."""
    gaps = [b - a - 1 for a, b in zip((-1, *steps), steps, strict=False)]
    return sum(gaps), sum(gap > 0 for gap in gaps)


def expected_flops(plan, flops, num_inference_steps):
    """Return the FLOPs of a call, averaged exactly over all draws.

    A call costs its gradient points, a forward per step without gradient, and a constant per
    unbroken stretch of such steps, for which conditions are cached. One draw checks this model.
    """
    count = plan.points
    points = flops(tuple(range(count)))
    shorter, longer = (flops(tuple(range(n, n + count))) for n in (2, 6))
    forward = Fraction(longer - shorter, 4)
    stretch = shorter - points - 2 * forward

    def modeled(drawn):
        steps, stretches = rollouts_of([point.step for point in drawn])
        return points + steps * forward + stretches * stretch

    outcomes = plan.outcomes(num_inference_steps)
    _, checked = outcomes[1]
    assert rollouts_of([point.step for point in checked])[0] > 0
    assert flops(checked) == modeled(checked)
    return sum(probability * modeled(drawn) for probability, drawn in outcomes)


def flops_at(step, noise, text, indices):
    return count_flops(lambda: step(noise, text, indices=indices))


def frozen_reward():
    reward, _ = latent_reward.build(num_blocks=1, layers=4, seed=2)
    prfl_fast.patch(reward.backbone)
    return reward.freeze()


@pytest.mark.slow
def test_flops_per_gradient_point_of_five_are_less_than_half_of_one():
    """40 steps, without SFT; the reward has a quarter of the generator's blocks, as in PRFL."""
    model, reward = build(4, offload=None), frozen_reward()
    x, _, text = wan.inputs(batch=1, size=(4, 8, 12))

    def cost(plan):
        step = PRFL(model, reward, FlowUniPC(), plan)
        return expected_flops(plan, functools.partial(flops_at, step, x, text), 40)

    one, five = cost(GradientPlan.prfl()), cost(GradientPlan.prfl(5)) / 5
    print("FLOPs per point, of 1 and of 5:", float(one), float(five))
    assert five <= one / 2


@pytest.mark.slow
def test_gradient_variance_per_flop_of_five_points_is_below_one_points():
    """Of all draws of a short schedule and of a small set of noises.

    The mean of n calls has 1/n of the variance for n times the FLOPs, so methods are compared by
    the product. The variance includes that of the trajectories.
    """
    steps = 16
    model, reward = build(1, offload=None), frozen_reward()
    noise, _, text = wan.inputs(size=(2, 4, 4))
    noises = torch.randn(3, *noise.shape, generator=torch.Generator().manual_seed(0))
    rows = [variance.gradients_by_step(model, reward, x, text, steps).double() for x in noises]
    within, mean = sum(g @ g.T for g in rows) / len(rows), sum(rows) / len(rows)

    def figure(plan):
        draws = variance.second_moment(plan, steps)
        # Without bias: a row's sum is its step's mean weight, as the weights of a draw sum to one.
        torch.testing.assert_close(draws.sum(1), torch.full_like(draws[0], 1 / (steps - 1)))
        step = PRFL(model, reward, FlowUniPC(), plan, num_inference_steps=steps)
        flops = expected_flops(plan, functools.partial(flops_at, step, noise, text), steps)
        return variance.variance(draws, within, mean @ mean.T, 1) * float(flops)

    figures = {points: figure(GradientPlan.prfl(points)) for points in (1, 5)}
    print("variance × FLOPs of 5 points, of 1 point's:", figures[5] / figures[1])
    assert figures[5] < figures[1]
