"""The PRFL step against a textbook written here in plain PyTorch, in float64."""

import math
import weakref

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import nn

from prfl_fast.gradient_plan import GradientPlan, Point
from prfl_fast.losses import sft_loss
from prfl_fast.patching import patch
from prfl_fast.schedulers import FlowEuler, FlowUniPC, training_sigmas
from prfl_fast.step import PRFL
from prfl_fast.trajectory import rollout

SHAPE = (2, 16, 2, 4, 4)
CONDITIONS = {
    "encoder_hidden_states": torch.randn(
        2, 3, 12, generator=torch.Generator().manual_seed(0)
    ).double()
}


def make_noise(seed=1, shape=SHAPE, dtype=torch.float64):
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


@pytest.fixture(autouse=True)
def exact_wan(monkeypatch):
    """Keep diffusers' ``.float()`` sites in float64, or their rounding hides errors below 1e-7."""
    original = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else original(x)
    )


def make_wan(seed=0):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=12,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    ).double()
    for parameter in model.parameters():  # biases start at zero, which would hide mistakes
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


class TinyReward(nn.Module):
    """A frozen score in (0, 1) that depends on latents, timestep and text."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.conv = nn.Conv3d(16, 8, (2, 3, 3), padding=(0, 1, 1)).double()
        self.head = nn.Linear(8, 1).double()
        for parameter in self.parameters():
            parameter.data = 0.5 * torch.randn(
                parameter.shape, generator=generator, dtype=torch.float64
            )
        self.requires_grad_(False)

    def forward(self, x, timestep, conditions):
        h = (
            self.conv(x).tanh().mean((2, 3, 4))
            + conditions["encoder_hidden_states"].mean((1, 2))[:, None]
        )
        return torch.sigmoid(self.head(h * (1 + timestep[:, None] / 1000)))[:, 0]


class HandEuler:
    def __init__(self, count, shift=5.0):
        low = torch.tensor(0.001, dtype=torch.float32)
        low = shift * low / (1 + (shift - 1) * low)
        s = torch.linspace(1, low.item(), count, dtype=torch.float64)
        s = (shift * s / (1 + (shift - 1) * s)).to(torch.float32)
        self.timesteps = list(s * 1000)
        self.sigmas = torch.cat([s, torch.zeros(1)]).double()

    def step(self, i, v, x):
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * v


class HandUniPC:
    """UniPC of order 2 as the paper's algorithms are written: corrector, then predictor."""

    def __init__(self, count, shift=5.0, corrector=True):
        s = torch.linspace(1, 0.001, count + 1, dtype=torch.float64)[:-1]
        s = shift * s / (1 + (shift - 1) * s)
        s[0] -= 1e-6
        self.timesteps = list((s * 1000).long())
        self.sigmas = torch.cat([s.to(torch.float32), torch.zeros(1)]).double()
        self.count, self.corrector = count, corrector
        self.x0s, self.last = [], None

    def lam(self, i):
        return torch.log(1 - self.sigmas[i]) - torch.log(self.sigmas[i])

    def step(self, i, v, x):
        sigma, alpha = self.sigmas, 1 - self.sigmas
        here = x - sigma[i] * v
        if i > 0 and self.corrector:
            h = self.lam(i) - self.lam(i - 1)
            e = torch.expm1(-h)
            m0 = self.x0s[-1]
            if i == 1:
                correction = 0.5 * (here - m0)
            else:
                r = (self.lam(i - 2) - self.lam(i - 1)) / h
                phi2 = e / -h - 1
                phi3 = phi2 / -h - 0.5
                right = torch.stack([phi2 / e, 2 * phi3 / e])
                a, b = torch.linalg.solve(
                    torch.stack([torch.ones(2), torch.stack([r, torch.tensor(1.0)])]).double(),
                    right,
                )
                correction = a * (self.x0s[-2] - m0) / r + b * (here - m0)
            x = sigma[i] / sigma[i - 1] * self.last - alpha[i] * e * (m0 + correction)
        h = self.lam(i + 1) - self.lam(i)
        e = torch.expm1(-h)
        out = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * e * here
        if 0 < i < self.count - 1:
            r = (self.lam(i - 1) - self.lam(i)) / h
            out = out - alpha[i + 1] * e * 0.5 * (self.x0s[-1] - here) / r
        self.x0s.append(here)
        self.last = x
        return out


class DiffusersSolver:
    def __init__(self, scheduler, count, wide=False):
        self.scheduler = scheduler
        scheduler.set_timesteps(count)
        if wide:
            scheduler.sigmas = scheduler.sigmas.double()
        self.timesteps = list(scheduler.timesteps)

    def step(self, i, v, x):
        return self.scheduler.step(v, self.timesteps[i], x, return_dict=False)[0]


def diffusers_unipc():
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )


def diffusers_euler():
    return FlowMatchEulerDiscreteScheduler(shift=5.0)


def velocity_of(model, x, t, conditions):
    batch = torch.full((x.shape[0],), float(t), dtype=torch.float64)
    return model(x, batch, conditions["encoder_hidden_states"], return_dict=False)[0]


def textbook(model, reward, solver, noise, index, conditions=CONDITIONS, target=2.0, weight=0.1):
    """One PRFL gradient as the paper states it: ``(gradients, rewards, loss, latents)``."""
    x = noise.clone()
    with torch.no_grad():
        for i in range(index):
            x = solver.step(i, velocity_of(model, x, solver.timesteps[i], conditions), x)
    v = velocity_of(model, x, solver.timesteps[index], conditions)
    x = solver.step(index, v, x)
    t = torch.full((x.shape[0],), float(solver.timesteps[index + 1]), dtype=torch.float64)
    r = reward(x, t, conditions)
    loss = weight * torch.clamp(target - r, min=0).mean()
    return (
        torch.autograd.grad(loss, list(model.parameters())),
        r.detach(),
        loss.detach(),
        x.detach(),
    )


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def run(step, model, *args, **kwargs):
    model.zero_grad()
    return step(*args, **kwargs), gradients(model)


def worst_error(ours, theirs):
    """Largest relative error over the parameters, each against its own largest entry."""
    scale = max(t.abs().max().item() for t in theirs)
    errors = []
    for a, b in zip(ours, theirs, strict=True):
        size = b.abs().max().item()
        # A gradient that is zero in exact arithmetic (the key bias under softmax) is rounding on
        # both sides.
        errors.append((a - b).abs().max().item() / max(size, 1e-9 * scale))
    return max(errors)


SOLVERS = {
    "unipc": (FlowUniPC, HandUniPC),
    "euler": (FlowEuler, HandEuler),
    "unipc-diffusers-wide": (
        FlowUniPC,
        lambda count: DiffusersSolver(diffusers_unipc(), count, wide=True),
    ),
    "diffusers-unipc": (diffusers_unipc, lambda count: DiffusersSolver(diffusers_unipc(), count)),
    "diffusers-euler": (diffusers_euler, lambda count: DiffusersSolver(diffusers_euler(), count)),
}


@pytest.mark.parametrize("patched", [False, True], ids=["unpatched", "patched"])
@pytest.mark.parametrize("name", SOLVERS)
def test_gradient_equals_the_textbook(name, patched):
    ours, theirs = SOLVERS[name]
    model, reward, noise = make_wan(), TinyReward(), make_noise()
    ours_model = patch(make_wan()) if patched else model
    step = PRFL(ours_model, reward, ours(), num_steps=7)
    for index in (0, 1, 2, 5):
        output, grads = run(step, ours_model, noise, CONDITIONS, indices=(index,))
        solver = theirs(7)
        expected, r, loss, x = textbook(model, reward, solver, noise, index)
        assert worst_error(grads, expected) <= 1e-6
        torch.testing.assert_close(output.rewards, r[None], rtol=1e-9, atol=0)
        torch.testing.assert_close(output.loss, loss, rtol=1e-9, atol=0)
        torch.testing.assert_close(output.latents, x, rtol=1e-9, atol=1e-9)
        assert output.indices == (index,) and output.finite
        assert output.timesteps == (float(solver.timesteps[index + 1]),)


@pytest.mark.parametrize("name", ["unipc", "euler"])
def test_gradient_of_the_built_in_solvers_is_exact_to_rounding(name):
    """40 steps, a late index: far below the 1e-6 that is promised."""
    ours, theirs = SOLVERS[name]
    model, reward, noise = make_wan(), TinyReward(), make_noise(2)
    _, grads = run(PRFL(model, reward, ours()), model, noise, CONDITIONS, indices=(30,))
    expected, *_ = textbook(model, reward, theirs(40), noise, 30)
    assert worst_error(grads, expected) <= 1e-8


def test_the_gradient_passes_through_the_corrector():
    model, reward, noise = make_wan(), TinyReward(), make_noise()
    _, grads = run(
        PRFL(model, reward, FlowUniPC(), num_steps=7), model, noise, CONDITIONS, indices=(3,)
    )

    class PredictorAtTheGradientStep(HandUniPC):
        """The same latents everywhere; only the gradient ignores that the corrector sees v."""

        def step(self, i, v, x):
            if i != 3:
                return super().step(i, v, x)
            exact = super().step(i, v, x)
            self.corrector, self.x0s = False, self.x0s[:-1]
            predictor = super().step(i, v, x)
            return exact.detach() + predictor - predictor.detach()

    expected, *_ = textbook(model, reward, PredictorAtTheGradientStep(7), noise, 3)
    assert 0.01 < worst_error(grads, expected) < 10


class SnapshotReward(TinyReward):
    """Notes the gradients present whenever it is called, that is, before each point's backward."""

    def __init__(self, model):
        super().__init__()
        self.model, self.before = [model], []

    def forward(self, x, timestep, conditions):
        self.before.append(gradients(self.model[0]))
        return super().forward(x, timestep, conditions)


@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc])
def test_every_point_of_five_has_its_own_one_point_gradient(scheduler):
    model, noise = make_wan(), make_noise(3)
    reward = SnapshotReward(model)
    plan = GradientPlan.prfl(5)
    step = PRFL(model, reward, scheduler(), plan, num_steps=9)
    output, total = run(step, model, noise, CONDITIONS, generator=torch.Generator().manual_seed(0))
    assert (
        output.indices
        == tuple(point.step for point in plan.draw(9, torch.Generator().manual_seed(0)))
        and len(output.indices) == 5
    )
    after = [*reward.before[1:], total]
    for k, index in enumerate(output.indices):
        point = [5 * (a - b) for a, b in zip(after[k], reward.before[k], strict=True)]
        single, alone = run(
            PRFL(model, TinyReward(), scheduler(), num_steps=9),
            model,
            noise,
            CONDITIONS,
            indices=(index,),
        )
        assert worst_error(point, alone) <= 1e-6
        torch.testing.assert_close(output.rewards[k], single.rewards[0], rtol=1e-12, atol=0)
        assert output.timesteps[k] == single.timesteps[0]


def test_the_expectation_over_all_draws_is_the_mean_over_indices():
    model, reward, noise, steps = make_wan(), TinyReward(), make_noise(4), 6
    singles = [textbook(model, reward, HandUniPC(steps), noise, m)[0] for m in range(steps - 1)]
    mean = [sum(g) / (steps - 1) for g in zip(*singles, strict=True)]
    for points in range(1, 6):
        plan = GradientPlan.prfl(points)
        step = PRFL(model, reward, FlowUniPC(), plan, num_steps=steps)
        expectation = [torch.zeros_like(p) for p in model.parameters()]
        for probability, indices in plan.outcomes(steps):
            _, grads = run(step, model, noise, CONDITIONS, indices=indices)
            for e, g in zip(expectation, grads, strict=True):
                e += float(probability) * g
        assert worst_error(expectation, mean) <= 1e-6, points


def test_a_batch_is_the_mean_of_its_samples():
    model, reward, noise = make_wan(), TinyReward(), make_noise(5)
    step = PRFL(model, reward, FlowUniPC(), GradientPlan.prfl(2), num_steps=5)
    output, both = run(step, model, noise, CONDITIONS, indices=(1, 3))
    halves = []
    for b in range(2):
        conditions = {k: v[b : b + 1] for k, v in CONDITIONS.items()}
        one, grads = run(step, model, noise[b : b + 1], conditions, indices=(1, 3))
        torch.testing.assert_close(one.rewards[:, 0], output.rewards[:, b], rtol=1e-12, atol=0)
        halves.append(grads)
    assert worst_error(both, [(a + b) / 2 for a, b in zip(*halves, strict=True)]) <= 1e-9


def test_gradients_accumulate_and_loss_scale_scales_only_them():
    model, reward, noise = make_wan(), TinyReward(), make_noise(6)
    step = PRFL(model, reward, FlowUniPC(), num_steps=5)
    full, grads = run(step, model, noise, CONDITIONS, indices=(2,))
    model.zero_grad()
    for _ in range(4):
        part = step(noise, CONDITIONS, indices=(2,), loss_scale=0.25)
        assert torch.equal(part.loss, full.loss)
    assert worst_error(gradients(model), grads) <= 1e-12


def test_only_the_transformer_receives_gradients():
    model, reward = make_wan(), TinyReward()
    noise = make_noise().requires_grad_()
    output, grads = run(
        PRFL(model, reward, FlowUniPC(), GradientPlan.prfl(2), num_steps=5),
        model,
        noise,
        CONDITIONS,
    )
    assert noise.grad is None and all(p.grad is None for p in reward.parameters())
    assert any(g.abs().max() > 0 for g in grads)
    assert not any(t.requires_grad for t in (output.loss, output.rewards, output.latents))
    frozen = make_wan().requires_grad_(False)
    frozen.blocks[1].ffn.requires_grad_(True)
    PRFL(frozen, reward, FlowUniPC(), num_steps=5)(noise, CONDITIONS)
    assert [n for n, p in frozen.named_parameters() if p.grad is not None] == [
        n for n, p in frozen.named_parameters() if n.startswith("blocks.1.ffn.")
    ]


class Token:
    """Lives as long as the graph node that holds it."""


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, x, nodes):
        ctx.save_for_backward(x)
        ctx.token = Token()
        nodes.append(weakref.ref(ctx.token))
        return a.to(x.dtype) * x

    @staticmethod
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).sum().double(), None, None


class Affine(nn.Module):
    """A model no adapter knows; its bound method is the velocity."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.nodes, self.seen = [], []

    def velocity(self, x, timestep, conditions):
        assert timestep.shape == (x.shape[0],)
        v = Scale.apply(
            self.a, x * (1 + timestep.to(x.dtype).view(-1, 1, 1, 1, 1) / 1000), self.nodes
        )
        self.seen.append((v.requires_grad, x.dtype, x.requires_grad))
        return v

    def graphs_alive(self):
        return sum(node() is not None for node in self.nodes)


def test_a_plain_function_serves_as_transformer():
    model = Affine()
    step = PRFL(model.velocity, lambda x, t, c: x.mean((1, 2, 3, 4)), FlowEuler(), num_steps=4)
    output = step(make_noise(), {}, indices=(1,))
    assert (
        model.seen == [(False, torch.float64, False), (True, torch.float64, False)]
        and model.a.grad is not None
    )
    assert output.latents.shape == SHAPE


@pytest.mark.parametrize("scheduler", [FlowUniPC, diffusers_unipc])
def test_one_graph_is_alive_at_a_time_and_none_afterwards(scheduler):
    model, alive = Affine(), []

    def reward(x, t, c):
        alive.append(model.graphs_alive())
        return x.mean((1, 2, 3, 4))

    step = PRFL(model.velocity, reward, scheduler(), num_steps=6)
    output = step(make_noise(), {}, indices=(0, 2, 3, 4))
    assert alive == [1, 1, 1, 1] and model.graphs_alive() == 0
    assert (
        len(model.seen) == 5 and len(output.indices) == 4
    )  # no forward beyond the last gradient step


@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc, diffusers_euler])
def test_the_callers_scheduler_is_not_touched_and_nothing_leaks_between_calls(scheduler):
    original = scheduler()
    before = original.timesteps.clone()
    model = Affine()
    step = PRFL(
        model.velocity,
        lambda x, t, c: x.mean((1, 2, 3, 4)),
        original,
        GradientPlan.prfl(2),
        num_steps=6,
    )
    results = []
    for _ in range(2):
        model.a.grad = None
        results.append((step(make_noise(), {}, indices=(1, 3)), model.a.grad.clone()))
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(
        results[0][0].latents, results[1][0].latents
    )
    assert torch.equal(original.timesteps, before) and original.step_index is None


@pytest.mark.parametrize("scheduler", [FlowUniPC, FlowEuler, diffusers_unipc, diffusers_euler])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_latents_keep_the_noises_dtype(dtype, scheduler):
    model = Affine()
    step = PRFL(model.velocity, lambda x, t, c: x.mean((1, 2, 3, 4)), scheduler(), num_steps=4)
    output = step(make_noise(dtype=dtype), {}, indices=(1, 2))
    assert output.latents.dtype == dtype and output.finite
    assert output.rewards.dtype == output.loss.dtype == torch.float32
    assert {entry[1] for entry in model.seen} == {dtype}


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_transformer_is_left_alone(mode):
    model = make_wan().train(mode)
    PRFL(model, TinyReward(), FlowUniPC(), num_steps=3)(make_noise(), CONDITIONS)
    assert model.training == mode


def test_gradients_come_even_inside_no_grad():
    model = Affine()
    with torch.no_grad():
        PRFL(model.velocity, lambda x, t, c: x.mean((1, 2, 3, 4)), FlowUniPC(), num_steps=3)(
            make_noise(), {}
        )
    assert model.a.grad is not None


def test_rewards_above_the_target_give_no_gradient():
    model = Affine()
    step = PRFL(model.velocity, lambda x, t, c: x.mean((1, 2, 3, 4)) + 5, FlowEuler(), num_steps=3)
    output = step(make_noise(), {})
    assert output.loss == 0 and model.a.grad == 0 and output.finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_reward_is_reported_and_not_differentiated(bad):
    model, calls = Affine(), []

    def reward(x, t, c):
        calls.append(None)
        r = x.mean((1, 2, 3, 4))
        return r + (torch.tensor([0.0, bad]) if len(calls) == 2 else 0)

    step = PRFL(model.velocity, reward, FlowUniPC(), num_steps=6)
    output = step(make_noise(), {}, indices=(0, 2, 4))
    assert not output.finite and len(calls) == 2 and output.indices == (0, 2, 4)
    assert torch.isfinite(output.rewards[0]).all() and output.rewards[2].isnan().all()
    first = model.a.grad.clone()
    model.a.grad = None
    calls.clear()
    step(make_noise(), {}, indices=(0,), loss_scale=1 / 3)
    torch.testing.assert_close(model.a.grad, first, rtol=1e-12, atol=0)


def test_draws_come_from_the_generator_alone():
    step = PRFL(
        Affine().velocity,
        lambda x, t, c: x.mean((1, 2, 3, 4)),
        FlowEuler(),
        GradientPlan.prfl(3),
        num_steps=20,
    )
    state = torch.get_rng_state()
    drawn = [
        step(make_noise(), {}, generator=torch.Generator().manual_seed(s)).indices
        for s in (1, 2, 1)
    ]
    assert drawn[0] == drawn[2] != drawn[1]
    step(make_noise(), {}, indices=(0, 1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["unipc", "euler", "diffusers-unipc"])
def test_rollout_equals_the_textbook_and_stops_where_told(name, capsys):
    ours, theirs = SOLVERS[name]
    model, noise = make_wan(), make_noise()
    solver, x, states = theirs(5), noise, [noise]
    with torch.no_grad():
        for i, t in enumerate(solver.timesteps):
            x = solver.step(i, velocity_of(model, x, t, CONDITIONS), x)
            states.append(x)
    for stop in (0, 2, None):
        out = rollout(model, noise, CONDITIONS, ours(), 5, stop=stop, progress=stop is None)
        torch.testing.assert_close(out, states[5 if stop is None else stop], rtol=1e-9, atol=1e-9)
        assert not out.requires_grad
    assert "sampling" in capsys.readouterr().err


def test_rollout_refuses_a_stop_outside_the_schedule():
    for stop in (-1, 6):
        with pytest.raises(ValueError, match="stop is"):
            rollout(Affine().velocity, make_noise(), {}, FlowEuler(), 5, stop=stop)


def test_sft_loss_and_gradient_equal_the_textbook():
    model, x0, noise, sigma = (
        make_wan(),
        make_noise(7),
        make_noise(8),
        torch.tensor([0.2, 0.9], dtype=torch.float64),
    )
    loss = sft_loss(model, x0, CONDITIONS, noise=noise, sigma=sigma)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    s = sigma.view(2, 1, 1, 1, 1)
    v = model(
        (1 - s) * x0 + s * noise,
        1000 * sigma,
        CONDITIONS["encoder_hidden_states"],
        return_dict=False,
    )[0]
    plain = nn.functional.mse_loss(v, noise - x0)
    theirs = torch.autograd.grad(plain, list(model.parameters()))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    assert worst_error(ours, theirs) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sft_draws_from_the_generator_and_noises_in_float32(dtype):
    seen = []

    def velocity(x, timestep, conditions):
        seen.append((x, timestep))
        return torch.zeros_like(x)

    x0 = make_noise(9, (4, 2, 1, 4, 4), dtype)
    state = torch.get_rng_state()
    losses = [
        sft_loss(velocity, x0, {}, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[2] != losses[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for x, timestep in seen:
        assert x.dtype == losses[0].dtype == wide and timestep.shape == (4,)
        assert (
            torch.isclose(
                timestep[:, None] / 1000, training_sigmas().to(wide)[None], rtol=1e-6, atol=0
            )
            .any(1)
            .all()
        )
    assert torch.equal(seen[0][0], seen[2][0]) and len(seen[0][1].unique()) > 1


def test_sft_sigmas_are_uniform_over_the_schedule():
    seen = []

    def velocity(x, timestep, conditions):
        seen.append(timestep)
        return x

    sft_loss(
        velocity, torch.zeros(40000, 1, 1, 1, 1), {}, generator=torch.Generator().manual_seed(0)
    )
    s = seen[0] / 1000
    even = s / (5 - 4 * s)  # the shift undone
    assert even.min() >= 0.0009 and even.max() <= 1
    histogram = torch.histc(even, 10, 0, 1) / len(even)
    assert (histogram - 0.1).abs().max() < 5 * (0.09 / len(even)) ** 0.5


@pytest.mark.parametrize("sigma", [0, 0.0, 1.0, torch.tensor(0.5)])
def test_sft_takes_one_sigma_for_the_batch(sigma):
    x0, noise = make_noise(1), make_noise(2)
    out = sft_loss(lambda x, t, c: x, x0, {}, noise=noise, sigma=sigma)
    x = (1 - sigma) * x0 + sigma * noise
    torch.testing.assert_close(out, (x - (noise - x0)).square().mean())


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"noise": torch.zeros(1, 16, 2, 4, 4)}, "noise is"),
        ({"sigma": 1.5}, "sigma is"),
        ({"sigma": math.nan}, "sigma is"),
        ({"sigma": torch.tensor([0.1, 0.2, 0.3])}, "sigma is"),
        ({"shift": -1.0}, "shift is"),
    ],
)
def test_sft_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sft_loss(lambda x, t, c: x, make_noise(), {}, **kwargs)


def poisoned(value):
    noise = make_noise()
    noise[1, 2, 0, 1, 1] = value
    return noise


@pytest.mark.parametrize(
    "noise,conditions,message",
    [
        (poisoned(math.nan), CONDITIONS, "noise has 1 NaN or infinite"),
        (poisoned(math.inf), CONDITIONS, "noise has 1 NaN or infinite"),
        (torch.zeros(16, 2, 4, 4), CONDITIONS, r"noise is .*\[B, C, F, H, W\]"),
        (torch.zeros(0, 16, 2, 4, 4), CONDITIONS, "noise is"),
        (torch.zeros(SHAPE, dtype=torch.int64), CONDITIONS, "noise is"),
        (None, CONDITIONS, "noise is None"),
        (make_noise(), CONDITIONS["encoder_hidden_states"], "conditions is Tensor"),
        (make_noise(), {}, "encoder_hidden_states"),
        (make_noise(), {"encoder_hidden_states": torch.zeros(3, 3, 12)}, "batch, 2"),
        (make_noise(), {"encoder_hidden_states": "a dog"}, "expected a tensor"),
        (make_noise(), {**CONDITIONS, "prompt": torch.zeros(2)}, "prompt"),
        (make_noise(shape=(2, 15, 2, 4, 4)), CONDITIONS, "15 channels"),
        (make_noise(shape=(2, 16, 2, 5, 4)), CONDITIONS, "H = 5"),
    ],
)
def test_bad_inputs_of_a_step_are_refused_before_any_work(noise, conditions, message):
    model = make_wan()
    with pytest.raises(ValueError, match=message):
        PRFL(model, TinyReward(), FlowUniPC(), num_steps=3)(noise, conditions)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("indices", [(), (3, 1), (1, 1), (-1,), (4,), (1.0,), (True,)])
def test_bad_indices_are_refused(indices):
    step = PRFL(Affine().velocity, lambda x, t, c: x.mean((1, 2, 3, 4)), FlowUniPC(), num_steps=5)
    with pytest.raises(ValueError, match="indices is"):
        step(make_noise(), {}, indices=indices)


def test_bad_models_rewards_and_schedulers_are_refused():
    reward, velocity = TinyReward(), Affine().velocity
    with pytest.raises(TypeError, match="supported"):
        PRFL(Affine(), reward, FlowUniPC())
    with pytest.raises(TypeError, match="transformer is str"):
        PRFL("wan", reward, FlowUniPC())
    with pytest.raises(TypeError, match="reward is"):
        PRFL(velocity, None, FlowUniPC())
    with pytest.raises(TypeError, match="scheduler is"):
        PRFL(velocity, reward, "unipc")
    with pytest.raises(ValueError, match="num_steps is 1"):
        PRFL(velocity, reward, FlowUniPC(), num_steps=1)
    with pytest.raises(ValueError, match="points is 5"):
        PRFL(velocity, reward, FlowUniPC(), GradientPlan.prfl(5), num_steps=5)
    for kwargs in ({"target": math.nan}, {"weight": math.inf}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            PRFL(velocity, reward, FlowUniPC(), **kwargs)


def trainable_reward():
    return TinyReward().requires_grad_(True)


@pytest.mark.parametrize(
    "reward,message",
    [
        (trainable_reward(), r"4 trainable parameters .*reward.freeze\(\)"),
        (trainable_reward().forward, "trainable parameters"),
        (lambda x, t, c: x.mean(), "expected one score per sample"),
        (lambda x, t, c: x.mean((2, 3, 4))[:, :1], "expected one score per sample"),
        (lambda x, t, c: x.detach().mean((1, 2, 3, 4)), "no graph"),
        (lambda x, t, c: 1.0, "expected one score per sample"),
    ],
)
def test_bad_rewards_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        PRFL(Affine().velocity, reward, FlowUniPC(), num_steps=3)(
            make_noise(), {"encoder_hidden_states": make_noise()}
        )


def test_bad_velocities_are_refused():
    reward = lambda x, t, c: x.mean((1, 2, 3, 4))  # noqa: E731
    with pytest.raises(ValueError, match="needs no gradient"):
        PRFL(lambda x, t, c: x, reward, FlowUniPC(), num_steps=3)(make_noise(), {})
    with pytest.raises(ValueError, match="the transformer returned"):
        PRFL(lambda x, t, c: x[:, :1], reward, FlowUniPC(), num_steps=3)(make_noise(), {})


@pytest.mark.parametrize("scheduler", [FlowEuler, FlowUniPC])
def test_guidance_at_pure_noise_is_refused(scheduler):
    """Where sigma is 1 the factor sigma / (1 - sigma) has no bound."""
    plan = GradientPlan.flow_nrg(window=(0, None))
    step = PRFL(Affine().velocity, TinyReward(), scheduler(), plan, num_steps=4)
    with pytest.raises(ValueError, match="starts at step 0, where sigma is"):
        step(make_noise(), CONDITIONS)
    later = PRFL(Affine().velocity, TinyReward(), scheduler(), GradientPlan.flow_nrg(), num_steps=4)
    assert later(make_noise(), CONDITIONS).indices == (1, 2, 3)


def lora_wan(dropout=0.0):
    peft = pytest.importorskip("peft")
    model = make_wan().requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], lora_dropout=dropout))
    return model


@pytest.mark.parametrize(
    "plan", [GradientPlan.draft(2), GradientPlan.reno()], ids=["draft", "reno"]
)
def test_chains_with_dropout_at_work_are_refused(plan):
    """The forward that is run again would drop out something else."""
    model = lora_wan(dropout=0.5).train()
    step = PRFL(model, TinyReward(), FlowEuler(), plan, num_steps=3)
    with pytest.raises(ValueError, match="drops out a share of 0.5"):
        step(make_noise(), CONDITIONS)
    assert step.transformer.eval() is model and step(make_noise(), CONDITIONS).finite


@pytest.mark.parametrize(
    "plan", [GradientPlan.prfl(), GradientPlan.draft(2)], ids=["prfl", "draft"]
)
def test_a_frozen_transformer_is_refused(plan):
    model = make_wan().requires_grad_(False)
    step = PRFL(model, TinyReward(), FlowEuler(), plan, num_steps=3)
    with pytest.raises(ValueError, match="no parameter of it requires one"):
        step(make_noise(), CONDITIONS)
    frozen = PRFL(lambda x, t, c: x.detach() * 0.5, TinyReward(), FlowEuler(), plan, num_steps=3)
    with pytest.raises(ValueError, match="no parameter of it requires one"):
        frozen(make_noise(), CONDITIONS)


def test_a_chain_through_ddp_is_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrapped = DistributedDataParallel(make_wan())
    step = PRFL(wrapped, TinyReward(), FlowEuler(), GradientPlan.draft(2), num_steps=3)
    with pytest.raises(ValueError, match="is of DistributedDataParallel"):
        step(make_noise(), CONDITIONS)


def test_a_divergence_needs_nothing_but_adapters_to_train():
    def make(model, plan=None):
        return PRFL(model, TinyReward(), FlowEuler(), plan, num_steps=3, divergence=0.1)

    with pytest.raises(ValueError, match="there are none: add LoRA"):
        make(make_wan())
    with pytest.raises(ValueError, match="the transformer is a function"):
        make(Affine().velocity)
    model = lora_wan()
    with pytest.raises(ValueError, match="divergence is 0.1"):
        make(model, GradientPlan.reno())
    assert make(model)(make_noise(), CONDITIONS).divergence == 0  # B starts at zero
    model.proj_out.weight.requires_grad_(True)
    with pytest.raises(ValueError, match="proj_out.weight trains too"):
        make(model)
    model.proj_out.weight.requires_grad_(False)
    next(m for m in model.modules() if hasattr(m, "lora_A")).base_layer.bias.requires_grad_(True)
    with pytest.raises(ValueError, match="base_layer.bias trains too"):
        make(model)
    merged = lora_wan()
    next(m for m in merged.modules() if hasattr(m, "lora_A")).merge()
    with pytest.raises(ValueError, match="merged into the weights"):
        make(merged)


@pytest.mark.parametrize(
    "plan,indices,message",
    [
        (None, [Point(1, 1, 5.0)], "weights add up to 1"),
        (None, [Point(1, 1, math.nan)], "expected increasing"),
        (None, [Point(1.5)], "expected increasing"),
        (None, 3, "expected increasing"),
        (GradientPlan.draft_lv(1), [1], "the last step, 3"),
        (GradientPlan.alignprop(), [3], "the plan draws their depth"),
        (GradientPlan.flow_nrg(), [1], "the window says what is guided"),
    ],
)
def test_wrong_points_are_refused(plan, indices, message):
    step = PRFL(Affine().velocity, TinyReward(), FlowEuler(), plan, num_steps=4)
    with pytest.raises(ValueError, match=message):
        step(make_noise(), CONDITIONS, indices=indices)


def test_wrong_data_and_arguments_are_refused():
    velocity, reward = Affine().velocity, TinyReward()
    data = PRFL(velocity, reward, FlowEuler(), GradientPlan.rg_lcd(), num_steps=4)
    with pytest.raises(ValueError, match="latents is missing"):
        data(make_noise(), CONDITIONS)
    with pytest.raises(ValueError, match="expected the shape and device of noise"):
        data(make_noise(), CONDITIONS, latents=make_noise()[:1])
    bad = make_noise()
    bad[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="latents has 1 NaN"):
        data(make_noise(), CONDITIONS, latents=bad)
    plain = PRFL(velocity, reward, FlowEuler(), num_steps=4)
    with pytest.raises(ValueError, match="latents is given"):
        plain(make_noise(), CONDITIONS, latents=make_noise())
    with pytest.raises(ValueError, match="noise is None"):
        plain(None, CONDITIONS)
    with pytest.raises(ValueError, match="loss_scale is nan"):
        plain(make_noise(), CONDITIONS, loss_scale=math.nan)
    frames = PRFL(
        velocity, reward, FlowEuler(), GradientPlan.instruct_video(segments=4), num_steps=4
    )
    with pytest.raises(ValueError, match="noise has 2 latent frames, expected at least"):
        frames(make_noise(), CONDITIONS, latents=make_noise())
    for wrong in ({"plan": "prfl"}, {"guidance": 3.0}, {"rollout": True}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} is .*, expected a"):
            PRFL(velocity, reward, FlowEuler(), **wrong)
    with pytest.raises(ValueError, match="reward_weights names"):
        PRFL(velocity, {"a": reward}, FlowEuler(), reward_weights={"b": 1.0})


def test_a_guided_trajectory_ends_where_a_reward_is_not_finite():
    calls = []

    def velocity(x, timestep, conditions):
        calls.append(float(timestep[0]))
        return x * 0.1

    def reward(x, timestep, conditions):
        return x.mean((1, 2, 3, 4)) * (math.nan if len(calls) > 2 else 1.0)

    step = PRFL(velocity, reward, FlowEuler(), GradientPlan.flow_nrg(), num_steps=6)
    output = step(make_noise(), CONDITIONS)
    assert not output.finite and len(calls) == 3 and output.indices == (1, 2)
