"""The supervised and the consistency loss against their formulas written here, in float64."""

import math

import pytest
import torch
from torch import nn
from toy_flow import gaussian
from velocity_nets import Net, seeded
from wan import float_means_double, inputs, tiny_wan

from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import training_sigmas
from prfl_fast.training.losses import ConsistencyConfig, consistency_loss, sft_loss

SHAPE = (3, 2, 2, 4, 4)


LATENTS, NOISE = gaussian(*SHAPE), gaussian(*SHAPE, seed=2)
CONDITIONS = {"text": gaussian(3, 5, seed=3)}
NEGATIVE = {"text": gaussian(1, 5, seed=4)}


def as_function(net):
    return lambda x, timestep, conditions: net(x, timestep, conditions)


def textbook(student, target, teacher, indices, *, scale=None, shift=5.0, levels=50, c=1e-3):
    grid = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / levels for i in range(levels))]
    grid = [torch.tensor(s).double().item() for s in grid] + [0.0]  # rounded as float32
    total = 0.0
    for b, i in enumerate(indices):
        here, there = grid[i], grid[i + 1]
        text = {"text": CONDITIONS["text"][b : b + 1]}
        time = (1000 * torch.tensor([here])).floor().double()
        x = (1 - here) * LATENTS[b : b + 1] + here * NOISE[b : b + 1]
        with torch.no_grad():
            v = teacher(x, time, text)
            if scale is not None:
                v = scale * v + (1 - scale) * teacher(x, time, NEGATIVE)
            back = x + (there - here) * v
            later = (1000 * torch.tensor([there])).floor().double()
            goal = back - there * target(back, later, text)
        ours = x - here * student(x, time, text)
        total = total + (torch.sqrt((ours - goal) ** 2 + c**2) - c).sum()
    return total / LATENTS.numel()


def test_a_given_first_frame_is_not_counted():
    """Models see it clean, and the means are over the other frames."""
    net, first = Net(10), gaussian(3, 2, 1, 4, 4, seed=9)
    conditions = {**CONDITIONS, "first_frame": first}
    sigma = torch.full((3, 1, 1, 1, 1), 0.5, dtype=torch.float64)
    x = torch.cat([first, ((1 - sigma) * LATENTS + sigma * NOISE)[:, :, 1:]], dim=2)
    error = net(x, 1000 * sigma.flatten(), conditions) - (NOISE - LATENTS)
    loss = sft_loss(as_function(net), LATENTS, conditions, noise=NOISE, sigma=0.5)
    torch.testing.assert_close(loss, error[:, :, 1:].square().mean())
    nets = [as_function(net), as_function(net), as_function(Net(12))]
    values = []
    for value in (0.0, 100.0):  # of the latents and the noise there, which nothing reads
        latents, noise = LATENTS.clone(), NOISE.clone()
        latents[:, :, 0], noise[:, :, 0] = value, -value
        loss = consistency_loss(*nets, latents, conditions, noise=noise, index=7)
        values.append(loss.item())
    assert values[0] == values[1] > 0


@pytest.mark.parametrize("indices", [(0, 17, 49), (3, 3, 3)])
@pytest.mark.parametrize(("scale", "batched"), [(None, True), (6.0, True), (6.0, False)])
def test_loss_and_gradient_equal_the_textbook(indices, scale, batched):
    student, target, teacher = Net(10), Net(11), Net(12)
    expected = textbook(student, target, teacher, indices, scale=scale)
    expected.backward()
    wanted = [p.grad for p in student.parameters()]
    student.zero_grad()
    nets = map(as_function, (student, target, teacher))
    index = torch.tensor(indices, dtype=torch.uint8)  # not a mask
    given = {"noise": NOISE, "index": 3 if len(set(indices)) == 1 else index}
    if scale is not None:
        given["guidance"] = Guidance(scale, NEGATIVE, batched=batched)
    loss = consistency_loss(*nets, LATENTS, CONDITIONS, **given)
    loss.backward()
    found = [p.grad for p in student.parameters()]
    torch.testing.assert_close([loss, *found], [expected, *wanted])
    assert all(p.grad is None for net in (target, teacher) for p in net.parameters())


def test_settings_reach_the_formula():
    nets = Net(10), Net(11), Net(12)
    settings = ConsistencyConfig(num_levels=4, shift=1.0, huber=0.5)
    given = {"noise": NOISE, "index": 1, "config": settings}
    loss = consistency_loss(*map(as_function, nets), LATENTS, CONDITIONS, **given)
    expected = textbook(*nets, (1, 1, 1), shift=1.0, levels=4, c=0.5)
    torch.testing.assert_close(loss, expected)
    assert training_sigmas(1.0, 4).tolist() == [1, 0.75, 0.5, 0.25]


def test_a_model_that_knows_the_data_has_no_loss():
    def exact(x, timestep, conditions):  # the velocity of a world with one clean latent
        return (x - LATENTS) / (timestep.view(-1, 1, 1, 1, 1) / 1000).clamp_min(1e-12)

    given = {"generator": seeded(5), "config": ConsistencyConfig(integer_timesteps=False)}
    loss = consistency_loss(exact, exact, exact, LATENTS, CONDITIONS, **given)
    assert 0 <= loss.item() < 1e-12


def test_draws_come_from_the_generator_noise_first():
    net = as_function(Net(10))

    def loss(seed, **given):
        given["generator"] = seeded(seed)
        return consistency_loss(net, net, net, LATENTS, CONDITIONS, **given).item()

    state = torch.get_rng_state()
    assert loss(1) == loss(1) != loss(2)
    assert torch.equal(torch.get_rng_state(), state)
    generator = seeded(1)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    index = torch.randint(50, (3,), generator=generator)
    assert loss(9, noise=noise, index=index) == loss(1)


def test_a_wan_model_in_its_own_dtype():
    student, teacher = tiny_wan(seed=0), tiny_wan(seed=1)
    latents, _, conditions = inputs(size=(2, 4, 4))
    given = {"guidance": Guidance(3.0, {"encoder_hidden_states": torch.zeros(1, 7, 20)})}
    given["generator"] = seeded(0)
    loss = consistency_loss(student, student, teacher, latents.bfloat16(), conditions, **given)
    assert loss.dtype == torch.float32 and loss.item() > 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": LATENTS[0]}, "latents is"),
        ({"latents": LATENTS * math.inf}, "latents has"),
        ({"conditions": {"text": torch.zeros(1, 5)}}, "conditions"),
        ({"noise": NOISE[:1]}, "noise is"),
        ({"noise": NOISE * math.nan}, "noise has"),
        ({"index": 50}, "index is 50, expected an integer in 0 … 49, or 3 of them"),
        ({"index": -1}, "index is -1"),
        ({"index": 1.0}, "index is 1.0"),
        ({"index": torch.tensor([1, 2])}, "index is"),
        ({"huber": 0.0}, "huber is 0.0, expected a positive number"),
        ({"huber": math.nan}, "huber is nan"),
        ({"num_levels": 0}, "num_levels is 0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"student": lambda x, t, c: x[:1]}, "velocity of the student is"),
        ({"target": lambda x, t, c: x[:1]}, "velocity of the target is"),
        ({"teacher": lambda x, t, c: x[:1]}, "velocity of the teacher is"),
        ({"guidance": Guidance(2.0, {"image": LATENTS})}, r"negative is \['image'\], expected"),
    ],
)
def test_bad_input(change, message):
    net = as_function(Net(10))
    arguments = {"student": net, "target": net, "teacher": net, "latents": LATENTS}
    settings = {k: change[k] for k in change if k in ("huber", "num_levels", "shift")}
    change = {k: change[k] for k in change if k not in settings}
    with pytest.raises(ValueError, match=message):
        change["config"] = ConsistencyConfig(**settings)
        consistency_loss(**{**arguments, "conditions": CONDITIONS, **change})


def test_unknown_models_are_refused():
    for place in range(3):
        models = [as_function(Net(10))] * 3
        models[place] = Net(10)
        with pytest.raises(TypeError, match="Net"):
            consistency_loss(*models, LATENTS, CONDITIONS)


def test_sft_loss_and_gradient_equal_the_textbook():
    model, (x0, _, conditions) = tiny_wan().double(), inputs()
    x0, text = x0.double(), conditions["encoder_hidden_states"].double()
    noise, sigma = gaussian(*x0.shape, seed=8), torch.tensor([0.2, 0.9], dtype=torch.float64)
    s = sigma.view(2, 1, 1, 1, 1)
    with float_means_double():
        loss = sft_loss(model, x0, {"encoder_hidden_states": text}, noise=noise, sigma=sigma)
        v = model((1 - s) * x0 + s * noise, 1000 * sigma, text, return_dict=False)[0]
        plain = nn.functional.mse_loss(v, noise - x0)
        parameters = list(model.parameters())
        ours, theirs = (torch.autograd.grad(value, parameters) for value in (loss, plain))
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sft_draws_from_the_generator_and_noises_in_float32(dtype):
    seen = []

    def velocity(x, timestep, conditions):
        seen.append((x, timestep))
        return torch.zeros_like(x)

    x0 = gaussian(4, 2, 1, 4, 4, seed=9).to(dtype)
    state = torch.get_rng_state()
    losses = [sft_loss(velocity, x0, {}, generator=seeded(s)) for s in (1, 2, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert losses[0] == losses[2] != losses[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    levels = training_sigmas().to(wide)
    for x, timestep in seen:
        assert x.dtype == losses[0].dtype == wide and timestep.shape == (4,)
        assert torch.isin(timestep, (1000 * levels).floor()).all()
    assert torch.equal(seen[0][0], seen[2][0]) and len(seen[0][1].unique()) > 1


def test_sft_sigmas_are_uniform_over_the_schedule():
    seen = []

    def velocity(x, timestep, conditions):
        seen.append(timestep)
        return x

    x = torch.zeros(40000, 1, 1, 1, 1)
    sft_loss(velocity, x, {}, generator=seeded(0), integer_timesteps=False)
    s = seen[0] / 1000
    even = s / (5 - 4 * s)  # the shift undone
    assert even.min() >= 0.0009 and even.max() <= 1
    histogram = torch.histc(even, 10, 0, 1) / len(even)
    assert (histogram - 0.1).abs().max() < 5 * (0.09 / len(even)) ** 0.5


@pytest.mark.parametrize("sigma", [0, 0.0, 1.0, torch.tensor(0.5)])
def test_sft_takes_one_sigma_for_the_batch(sigma):
    out = sft_loss(lambda x, t, c: x, LATENTS, {}, noise=NOISE, sigma=sigma)
    x = (1 - sigma) * LATENTS + sigma * NOISE
    torch.testing.assert_close(out, (x - (NOISE - LATENTS)).square().mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": NOISE[:1]}, "noise is"),
        ({"sigma": 1.5}, "sigma is"),
        ({"sigma": math.nan}, "sigma is"),
        ({"sigma": torch.tensor([0.1, 0.2])}, "sigma is"),
        ({"shift": -1.0}, "shift is"),
    ],
)
def test_sft_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        sft_loss(lambda x, t, c: x, LATENTS, {}, **change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sft_calls_the_model_at_whole_timesteps(dtype):
    seen = []

    def velocity(x, timestep, conditions):
        seen.append(timestep)
        return x

    x = torch.zeros(1000, 1, 1, 1, 1, dtype=dtype)
    levels = [5 * s / (1 + 4 * s) for s in (1 - i / 1000 for i in range(1000))]
    for integer in (True, False):
        options = {"sigma": training_sigmas(), "integer_timesteps": integer}
        sft_loss(velocity, x, {}, noise=x, **options)
    whole, exact = seen
    assert whole.tolist() == [math.floor(1000 * s) for s in levels]
    torch.testing.assert_close(exact.float(), 1000 * training_sigmas())
