"""The consistency loss against its formula written here, in float64."""

import math

import pytest
import torch
from torch import nn
from wan import inputs, tiny_wan

from prfl_fast.losses import consistency_loss
from prfl_fast.model_call import Guidance
from prfl_fast.schedulers import training_sigmas

SHAPE = (3, 2, 2, 4, 4)


def gaussian(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


LATENTS, NOISE = gaussian(*SHAPE), gaussian(*SHAPE, seed=2)
CONDITIONS = {"text": gaussian(3, 5, seed=3)}
NEGATIVE = {"text": gaussian(1, 5, seed=4)}


class Net(nn.Module):
    """A velocity with parameters; called as a function, since no adapter knows its class."""

    def __init__(self, seed):
        super().__init__()
        self.mix = nn.Parameter(gaussian(2, 2, seed=seed))
        self.bias = nn.Parameter(gaussian(5, seed=seed + 50))

    def forward(self, x, timestep, conditions):
        text = (conditions["text"] @ self.bias).view(-1, 1, 1, 1, 1)
        mixed = torch.einsum("dc,bcfhw->bdfhw", self.mix, x)
        return torch.tanh(mixed + text) + x * timestep.view(-1, 1, 1, 1, 1) / 1000


def as_function(net):
    return lambda x, timestep, conditions: net(x, timestep, conditions)


def textbook(student, target, teacher, indices, *, scale=None, shift=5.0, levels=50, c=1e-3):
    grid = [shift * s / (1 + (shift - 1) * s) for s in (1 - i / levels for i in range(levels))]
    grid = [torch.tensor(s).double().item() for s in grid] + [0.0]  # rounded as float32
    total = 0.0
    for b, i in enumerate(indices):
        here, there = grid[i], grid[i + 1]
        text = {"text": CONDITIONS["text"][b : b + 1]}
        time = torch.tensor([1000 * here], dtype=torch.float64)
        x = (1 - here) * LATENTS[b : b + 1] + here * NOISE[b : b + 1]
        with torch.no_grad():
            v = teacher(x, time, text)
            if scale is not None:
                v = scale * v + (1 - scale) * teacher(x, time, NEGATIVE)
            back = x + (there - here) * v
            later = torch.tensor([1000 * there], dtype=torch.float64)
            goal = back - there * target(back, later, text)
        ours = x - here * student(x, time, text)
        total = total + (torch.sqrt((ours - goal) ** 2 + c**2) - c).sum()
    return total / LATENTS.numel()


@pytest.mark.parametrize("indices", [(0, 17, 49), (3, 3, 3)])
@pytest.mark.parametrize(("scale", "batched"), [(None, True), (6.0, True), (6.0, False)])
def test_loss_and_gradient_equal_the_textbook(indices, scale, batched):
    student, target, teacher = Net(10), Net(11), Net(12)
    expected = textbook(student, target, teacher, indices, scale=scale)
    expected.backward()
    wanted = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    loss = consistency_loss(
        *map(as_function, (student, target, teacher)),
        LATENTS,
        CONDITIONS,
        noise=NOISE,
        index=3 if len(set(indices)) == 1 else torch.tensor(indices),
        guidance=None if scale is None else Guidance(scale, NEGATIVE, batched=batched),
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for parameter, gradient in zip(student.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(p.grad is None for net in (target, teacher) for p in net.parameters())


def test_settings_reach_the_formula():
    nets = Net(10), Net(11), Net(12)
    loss = consistency_loss(
        *map(as_function, nets),
        LATENTS,
        CONDITIONS,
        noise=NOISE,
        index=1,
        num_levels=4,
        shift=1.0,
        huber=0.5,
    )
    expected = textbook(*nets, (1, 1, 1), shift=1.0, levels=4, c=0.5)
    torch.testing.assert_close(loss, expected)
    assert training_sigmas(1.0, 4).tolist() == [1, 0.75, 0.5, 0.25]


def test_a_model_that_knows_the_data_has_no_loss():
    def exact(x, timestep, conditions):  # the velocity of a world with one clean latent
        return (x - LATENTS) / (timestep.view(-1, 1, 1, 1, 1) / 1000).clamp_min(1e-12)

    generator = torch.Generator().manual_seed(5)
    loss = consistency_loss(exact, exact, exact, LATENTS, CONDITIONS, generator=generator)
    assert 0 <= loss.item() < 1e-12


def test_draws_come_from_the_generator_noise_first():
    net = as_function(Net(10))

    def loss(seed, **given):
        generator = torch.Generator().manual_seed(seed)
        return consistency_loss(
            net, net, net, LATENTS, CONDITIONS, generator=generator, **given
        ).item()

    state = torch.get_rng_state()
    assert loss(1) == loss(1) != loss(2)
    assert torch.equal(torch.get_rng_state(), state)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    index = torch.randint(50, (3,), generator=generator)
    assert loss(9, noise=noise, index=index) == loss(1)


def test_a_wan_model_in_its_own_dtype():
    student, teacher = tiny_wan(seed=0), tiny_wan(seed=1)
    latents, _, conditions = inputs(size=(2, 4, 4))
    loss = consistency_loss(
        student,
        student,
        teacher,
        latents.bfloat16(),
        conditions,
        generator=torch.Generator().manual_seed(0),
        guidance=Guidance(3.0, {"encoder_hidden_states": torch.zeros(1, 7, 20)}),
    )
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
        ({"index": 50}, "index is 50, expected a whole number in 0 … 49, or 3 of them"),
        ({"index": -1}, "index is -1"),
        ({"index": 1.0}, "index is 1.0"),
        ({"index": torch.tensor([1, 2])}, "index is"),
        ({"huber": 0.0}, "huber is 0.0, expected a positive number"),
        ({"huber": math.nan}, "huber is nan"),
        ({"num_levels": 0}, "num_levels is 0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"student": lambda x, t, c: x[:1]}, "the student returned"),
        ({"target": lambda x, t, c: x[:1]}, "the target returned"),
        ({"teacher": lambda x, t, c: x[:1]}, "the teacher returned"),
        ({"guidance": Guidance(2.0, {"image": NEGATIVE["text"]})}, "guidance negative has"),
    ],
)
def test_bad_input(change, message):
    net = as_function(Net(10))
    arguments = {"student": net, "target": net, "teacher": net, "latents": LATENTS}
    with pytest.raises(ValueError, match=message):
        consistency_loss(**{**arguments, "conditions": CONDITIONS, **change})


def test_unknown_models_are_refused():
    net = as_function(Net(10))
    for place in range(3):
        models = [net, net, net]
        models[place] = Net(10)
        with pytest.raises(TypeError, match="Net"):
            consistency_loss(*models, LATENTS, CONDITIONS)
