"""The samplers against diffusers', exactly in schedule and to rounding in trajectory."""

import math

import pytest
import torch
from prfl_world import diffusers, diffusers_euler, diffusers_unipc

from prfl_fast.rollout.schedulers import (
    FlowEuler,
    FlowUniPC,
    WithShift,
    detach_state,
    fresh_copy,
    start_trajectory,
    training_sigmas,
)

COUNTS = (1, 2, 3, 4, 7, 20, 40)
ORDERS = (1, 2, 3)


def nonlinear_field(x, t):
    return torch.tanh(1.3 * x + float(t) / 1000) - 0.5 * x.flip(-1)


def unipc(shift=5.0, order=2):
    """Return ours on the levels of diffusers."""
    return FlowUniPC(shift, order, schedule="diffusers")


def started(scheduler, count, wide=False):
    """Set the timesteps; diffusers computes its coefficients in the dtype of its sigmas."""
    scheduler.set_timesteps(count)
    if wide and isinstance(scheduler, diffusers.UniPCMultistepScheduler):
        scheduler.sigmas = scheduler.sigmas.double()
    return scheduler


def take(scheduler, x, timesteps, field=nonlinear_field):
    """Return where the steps of a scheduler lead."""
    for t in timesteps:
        x = scheduler.step(field(x, t), t, x, return_dict=False)[0]
    return x


def largest_difference(ours, theirs, count, dtype, field, *, wide=False):
    """Largest relative distance between two samplers' latents over one trajectory; random
    velocities if no field."""
    started(ours, count)
    started(theirs, count, wide)
    generator = torch.Generator().manual_seed(count)
    x = y = torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=dtype)
    worst = 0.0
    for t in ours.timesteps:
        noise = torch.randn(x.shape, generator=generator, dtype=dtype)
        (x,) = ours.step(field(x, t) if field else noise, t, x)
        (y,) = theirs.step(field(y, t) if field else noise, t, y, return_dict=False)
        assert x.dtype == dtype
        worst = max(worst, ((x - y).norm() / y.norm()).item())
    return worst


@pytest.mark.cases(2)
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.3])
def test_schedules_are_those_of_diffusers_bit_for_bit(shift):
    pairs = [(FlowEuler(shift), diffusers_euler(shift)), (unipc(shift), diffusers_unipc(shift))]
    for pair in pairs:
        for count in range(1, 65):
            ours, theirs = (started(scheduler, count) for scheduler in pair)
            for a, b in ((ours.sigmas, theirs.sigmas), (ours.timesteps, theirs.timesteps)):
                assert torch.equal(a, b) and a.dtype == b.dtype, count


@pytest.mark.cases(8)
@pytest.mark.parametrize("field", [None, nonlinear_field], ids=["random", "nonlinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", COUNTS)
def test_euler_trajectories_equal_diffusers(count, dtype, field):
    assert largest_difference(FlowEuler(5.0), diffusers_euler(), count, dtype, field) <= 1e-6


@pytest.mark.cases(12)
@pytest.mark.parametrize("field", [None, nonlinear_field], ids=["random", "nonlinear"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", COUNTS)
def test_unipc_trajectories_equal_diffusers(count, order, field):
    def difference(dtype, wide):
        return largest_difference(
            unipc(5.0, order), diffusers_unipc(5.0, order), count, dtype, field, wide=wide
        )

    assert difference(torch.float64, wide=True) <= 1e-12
    # The coefficients of float32 latents have diffusers' own roundings: 1e-5 at order 3.
    assert difference(torch.float32, wide=False) <= 1e-6


@pytest.mark.parametrize("shift, count", [(5.0, 40), (3.0, 50), (8.0, 20)])
def test_a_velocity_has_the_weight_that_diffusers_gives_it(shift, count):
    """From a float64 weight, the float32 one differs by up to 5e-6."""
    weights = []
    for scheduler in (unipc(shift), diffusers_unipc(shift)):
        started(scheduler, count)
        weights.append([])
        for t in scheduler.timesteps:
            v = torch.zeros(1, 1, 1, 1, 1, requires_grad=True)
            (x,) = scheduler.step(v, t, torch.zeros_like(v), return_dict=False)
            weights[-1].append(torch.autograd.grad(x.sum(), v)[0].item())
            detach_state(scheduler)
    ours, theirs = map(torch.tensor, weights)
    torch.testing.assert_close(ours, theirs, rtol=3e-7, atol=0)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_trajectory_may_start_inside_the_schedule(order, start):
    x = torch.randn(1, 2, 2, 4, 4, dtype=torch.float64)
    solvers = (started(s, 9, True) for s in (unipc(5.0, order), diffusers_unipc(5.0, order)))
    ours, theirs = (take(solver, x, solver.timesteps[start:]) for solver in solvers)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class UniPCByStep(diffusers.UniPCMultistepScheduler):
    """diffusers' UniPC with an order for each step, kept for the corrector of the next."""

    def __init__(self, orders, **options):
        super().__init__(**options)
        self.orders = orders

    def multistep_uni_p_bh_update(self, *args, order, **kwargs):
        self.this_order = min(order, self.orders[self.step_index])
        return super().multistep_uni_p_bh_update(*args, order=self.this_order, **kwargs)


@pytest.mark.parametrize(
    "orders",
    [
        *([n] * 6 for n in ORDERS),
        [2, 1, 3, 3, 1, 2],
        [3, 3, 3, 1, 1, 3],
        [1, 3, 2, 3, 3, 3],
        [1, 1, 1, 1, 1, 2],
    ],
    ids=lambda orders: "".join(map(str, orders)),
)
@pytest.mark.parametrize("field", [None, nonlinear_field], ids=["random", "nonlinear"])
def test_orders_of_kept_steps_are_those_of_diffusers_over_their_levels(orders, field):
    """Steps of several levels, each with its own order, at any time of the trajectory."""
    kept = [0, 3, 4, 7, 9, 11]
    ours = started(unipc(5.0, 2), 12)
    ours.restrict(kept, orders)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    theirs = UniPCByStep(orders, **flow, flow_shift=5.0, solver_order=3)
    started(theirs, 12, wide=True)
    theirs.sigmas, theirs.timesteps = theirs.sigmas[[*kept, 12]], theirs.timesteps[kept]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    given = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in kept]
    own = started(unipc(5.0, 2), 12)
    own.restrict(kept)
    ends = []
    for scheduler in (ours, theirs, own):
        velocities = iter(given)
        function = field or (lambda *_, velocities=velocities: next(velocities))
        ends.append(take(scheduler, x, scheduler.timesteps, function))
    torch.testing.assert_close(*ends[:2], rtol=1e-12, atol=1e-12)
    assert torch.equal(ends[0], ends[2]) == (orders == [2] * 6)


@pytest.mark.parametrize("orders", [[2] * 3, [2, 2, 4, 1], [0] * 4])
def test_orders_that_do_not_fit_are_refused(orders):
    scheduler = started(unipc(), 8)
    with pytest.raises(ValueError, match="orders is .*expected 4 of 1, 2 or 3"):
        scheduler.restrict([0, 2, 4, 6], orders)


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_of_the_whole_trajectory_equals_diffusers(order):
    """Every velocity of 5 steps, through predictor, corrector and history."""
    torch.manual_seed(3)
    x = torch.randn(1, 2, 2, 3, 3, dtype=torch.float64)
    velocities = [torch.randn_like(x).requires_grad_() for _ in range(5)]
    gradients = []
    for scheduler in (unipc(5.0, order), diffusers_unipc(5.0, order)):
        times, given = started(scheduler, 5, wide=True).timesteps, iter(velocities)
        y = take(scheduler, x, times, lambda x, t, given=given: next(given))
        gradients.append(torch.autograd.grad(y.square().sum(), velocities))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_bf16_step_is_rounded_once():
    scheduler, wide = started(FlowUniPC(), 4), started(FlowUniPC(), 4)
    x, v = torch.randn(2, 1, 2, 3, 8, 8, dtype=torch.bfloat16)
    t = scheduler.timesteps[0]
    out = scheduler.step(v, t, x).prev_sample
    assert out.dtype == torch.bfloat16
    # float32 sum, then one cast: at most the few values on a rounding boundary may differ from
    # float64's.
    exact = wide.step(v.double(), t, x.double()).prev_sample.bfloat16()
    assert (out != exact).float().mean() < 0.01


def test_training_sigmas():
    sigmas = training_sigmas()
    even = torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1]
    torch.testing.assert_close(sigmas, (5 * even / (1 + 4 * even)).float(), rtol=1e-6, atol=0)
    assert sigmas[0] == 1 and (sigmas.diff() < 0).all() and sigmas[-1] > 0
    assert sigmas.dtype == torch.float32
    torch.testing.assert_close(training_sigmas(1.0, 4), torch.tensor([1, 0.75, 0.5, 0.25]))


def graph_tensors(scheduler):
    found = []
    for value in vars(scheduler).values():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, torch.Tensor) and item.requires_grad:
                found.append(item)
    return found


@pytest.mark.parametrize("make", [FlowUniPC, diffusers_unipc, FlowEuler, diffusers_euler])
def test_detach_state_keeps_the_numbers_and_drops_the_graph(make):
    torch.manual_seed(5)
    x = torch.randn(1, 2, 2, 4, 4)
    velocities = torch.randn(5, *x.shape)
    ends = []
    for with_graph in (False, True):
        scheduler, y = started(make(), 5), x
        for i, t in enumerate(scheduler.timesteps):
            v = velocities[i].clone().requires_grad_(with_graph)
            y = scheduler.step(v, t, y, return_dict=False)[0]
            if with_graph:
                assert y.requires_grad
                if i in (1, 2) and "UniPC" in type(scheduler).__name__:
                    assert graph_tensors(scheduler)
                y = y.detach()
                detach_state(scheduler)
                assert not graph_tensors(scheduler)
        ends.append(y)
    assert torch.equal(*ends)


def test_detach_state_reaches_dicts_tuples_and_nested_schedulers():
    x = torch.ones(2, requires_grad=True) * 2
    outer, inner = FlowEuler(), FlowEuler()
    inner.state = (x, [x])
    outer.nested, outer.cache = inner, {"a": x, "b": 3}
    detach_state(outer)
    tensors = [outer.nested.state[0], outer.nested.state[1][0], outer.cache["a"]]
    assert not any(t.requires_grad for t in tensors) and all(torch.equal(t, x) for t in tensors)
    assert outer.cache["b"] == 3 and x.requires_grad and inner.state[0].requires_grad


@pytest.mark.parametrize("make", [FlowUniPC, diffusers_unipc])
def test_a_fresh_copy_leaves_the_original_alone(make):
    original = started(make(), 4)
    v = torch.randn(1, 1, 1, 2, 2, requires_grad=True)
    # A state with graph cannot simply be deep-copied.
    original.step(v, original.timesteps[0], v * 2, return_dict=False)
    assert original.step_index == 1
    clone, timesteps = start_trajectory(original, 3)
    take(clone, v.detach(), timesteps)
    assert original.step_index == 1 and len(original.timesteps) == 4 and graph_tensors(original)


def test_wrong_schedulers_are_refused():
    with pytest.raises(TypeError, match="expected FlowUniPC"):
        fresh_copy(object())
    with pytest.raises(ValueError, match="prediction_type is 'epsilon'"):
        fresh_copy(diffusers.UniPCMultistepScheduler())

    class TwoCalls(FlowEuler):
        def set_timesteps(self, num_inference_steps, device=None):
            super().set_timesteps(2 * num_inference_steps - 1, device)

    with pytest.raises(ValueError, match="model calls of scheduler TwoCalls is 7, expected 4"):
        start_trajectory(TwoCalls(), 4)


X = torch.zeros(1, 2, 2, 4, 4)


@pytest.mark.parametrize("make", [FlowEuler, FlowUniPC])
def test_wrong_use_is_refused(make):
    scheduler = make()

    def refused(message, timestep, v=X, x=X):
        with pytest.raises(ValueError, match=message):
            scheduler.step(v, timestep, x)

    refused("before set_timesteps", 999)
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_inference_steps is"):
            scheduler.set_timesteps(count)
    t = started(scheduler, 3).timesteps
    refused("timestep is 123.0, expected an entry of timesteps", 123)
    refused("one number for the whole batch", t[:2])
    refused("model_output is", t[0], v=X[:, :1])
    refused("sample is .*expected a dense floating-point", t[0], x=X.int())
    assert scheduler.step_index is None
    scheduler.step(X, t[0], X)
    refused("step 1 of 3", t[0])
    scheduler.step(X, t[1], X)
    scheduler.step(X, t[2], X)
    refused("after the last of 3 steps", t[2])
    started(scheduler, 3).step(X, t[0], X)


def test_unipc_refuses_latents_of_another_trajectory():
    scheduler = started(FlowUniPC(), 3)
    scheduler.step(X, scheduler.timesteps[0], X)
    with pytest.raises(ValueError, match="with which this trajectory began"):
        scheduler.step(X[..., :2], scheduler.timesteps[1], X[..., :2])


@pytest.mark.parametrize("shift", [0, -1.0, math.nan, math.inf])
def test_wrong_shifts_are_refused(shift):
    for make in (FlowEuler, FlowUniPC, training_sigmas):
        with pytest.raises(ValueError, match="shift is"):
            make(shift)


def test_wrong_orders_and_counts_are_refused():
    with pytest.raises(ValueError, match="order is 4"):
        FlowUniPC(order=4)
    with pytest.raises(ValueError, match="num is 0"):
        training_sigmas(5.0, 0)
    with pytest.raises(ValueError, match="num_train_timesteps is 0"):
        FlowEuler(num_train_timesteps=0)
    with pytest.raises(ValueError, match="schedule is 'linear', expected one of 'wan'"):
        FlowUniPC(schedule="linear")
    with pytest.raises(TypeError, match="integer_timesteps is 1, expected bool"):
        FlowUniPC(integer_timesteps=1)


# 40 steps at shift 5 of official Wan's solver, which HY-Video-PRFL trains with.
WAN_TIMES = """
    999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882 870 859 846
    833 818 803 786 768 749 728 706 681 654 624 591 555 514 468 416 356 288 208 113
"""
WAN_LEVELS = """
    0.9997998 0.9946948 0.9893770 0.9838330 0.9780480 0.9720060 0.9656894 0.9590791 0.9521540
    0.9448913 0.9372655 0.9292487 0.9208101 0.9119155 0.9025269 0.8926018 0.8820933 0.8709480
    0.8591062 0.8465009 0.8330554 0.8186829 0.8032843 0.7867454 0.7689347 0.7496998 0.7288627
    0.7062144 0.6815081 0.6544499 0.6246874 0.5917935 0.5552468 0.5144030 0.4684569 0.4163888
    0.3568877 0.2882396 0.2081597 0.1135330 0
"""


def test_the_default_schedule_is_wans():
    scheduler = started(FlowUniPC(), 40)
    assert scheduler.timesteps.tolist() == [int(t) for t in WAN_TIMES.split()]
    assert scheduler.timesteps.dtype == torch.int64
    levels = torch.tensor([float(s) for s in WAN_LEVELS.split()])
    torch.testing.assert_close(scheduler.sigmas, levels, rtol=0, atol=2e-7)


@pytest.mark.parametrize("make", [FlowEuler, FlowUniPC, unipc])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_timesteps_are_whole_or_exact(make, shift):
    whole, exact = make(shift), make(shift)
    for scheduler, integer in ((whole, True), (exact, False)):
        scheduler.integer_timesteps = integer
        started(scheduler, 40)
    assert torch.equal(whole.sigmas, exact.sigmas) and whole.timesteps.dtype == torch.int64
    torch.testing.assert_close(exact.timesteps, 1000 * exact.sigmas[:-1], rtol=1e-6, atol=0)
    off = exact.timesteps - whole.timesteps
    assert off.min() >= -1e-3 and off.max() < 1


class Unshifted(FlowUniPC):
    """Take the shift where HY-Video-PRFL's solver does: in ``set_timesteps``."""

    def __init__(self, shift=1.0):
        super().__init__(shift)
        self.seen = []

    def set_timesteps(self, num_inference_steps, device=None, shift=None):
        self.shift = self.shift if shift is None else shift
        super().set_timesteps(num_inference_steps, device)


def test_a_scheduler_that_takes_a_shift_is_given_one():
    message = "shift of scheduler Unshifted is 1.0, expected a shift. Pass WithShift"
    with pytest.raises(ValueError, match=message):
        start_trajectory(Unshifted(), 4)
    start_trajectory(Unshifted(5.0), 4)
    own, foreign = (start_trajectory(s, 4) for s in (FlowUniPC(5.0), WithShift(Unshifted(), 5.0)))
    assert [t.item() for t in own[1]] == [t.item() for t in foreign[1]]
    x = torch.randn(1, 2, 2, 4, 4)
    assert torch.equal(take(own[0], x, own[1]), take(foreign[0], x, foreign[1]))
    detach_state(foreign[0])
    with pytest.raises(ValueError, match="shift is 0"):
        WithShift(Unshifted(), 0)
