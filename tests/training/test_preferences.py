"""Flow-DPO and Flow-RWR against their formulas written here, in float64."""

import copy
import math

import pytest
import torch
from runs import samples
from toy_flow import gaussian
from velocity_nets import Net, seeded
from wan import tiny_wan

from prfl_fast.data.dataset import Batches, Winners
from prfl_fast.data.manifest import Pair
from prfl_fast.models.experts import Experts
from prfl_fast.training import FlowDPO, FlowRWR, TrainConfig, Trainer, add_lora, dpo_loss, rwr_loss

SHAPE = (3, 2, 2, 4, 4)
WIN, LOSE, NOISE = (gaussian(*SHAPE, seed=seed) for seed in (1, 2, 3))
TEXTS = [{"text": gaussian(3, 5, seed=seed)} for seed in (4, 5)]
FIRST = [{"first_frame": gaussian(3, 2, 1, 4, 4, seed=seed)} for seed in (6, 7)]
SIGMA = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)


def error(net, latents, conditions, i):
    """Return ``mean((v - (ε - x0))²)`` of sample i, without a given first frame."""
    x = (1 - SIGMA[i]) * latents[i] + SIGMA[i] * NOISE[i]
    if "first_frame" in conditions:
        x = torch.cat([conditions["first_frame"][i], x[:, 1:]], dim=1)
    time = (1000 * SIGMA[i : i + 1].float()).floor().double()
    v = net(x[None], time, {"text": conditions["text"][i : i + 1]})[0]
    start = 1 if "first_frame" in conditions else 0
    return (v - (NOISE[i] - latents[i]))[:, start:].square().mean()


def textbook_dpo(net, reference, win, lose, beta):
    """Return the Flow-DPO loss of arXiv 2501.13918 with constant β and means, by its formula."""
    total = 0.0
    for i in range(3):
        of_win = error(net, WIN, win, i) - error(reference, WIN, win, i).detach()
        of_lose = error(net, LOSE, lose, i) - error(reference, LOSE, lose, i).detach()
        total = total - torch.log(torch.sigmoid(-beta / 2 * (of_win - of_lose)))
    return total / 3


def gradients(loss, net):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("given_frame", [False, True])
@pytest.mark.parametrize("beta", [0.5, 8.0])
def test_dpo_and_its_gradients_equal_the_textbook(beta, given_frame):
    net, reference = Net(10), Net(11)
    win, lose = ({**t, **f} if given_frame else t for t, f in zip(TEXTS, FIRST, strict=True))
    given = {"noise": NOISE, "sigma": SIGMA, "beta": beta, "reference": reference.forward}
    loss = dpo_loss(net.forward, WIN, LOSE, win, lose, **given)
    expected = textbook_dpo(net, reference, win, lose, beta)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, net), gradients(expected, net))
    assert all(p.grad is None for p in reference.parameters())
    # Of two equal videos neither is preferred, and a model that is its reference prefers none.
    for same in (
        dpo_loss(net.forward, WIN, WIN, win, **given),
        dpo_loss(net.forward, WIN, LOSE, win, lose, **{**given, "reference": net.forward}),
    ):
        assert same.item() == pytest.approx(math.log(2), rel=1e-15)


def test_rwr_and_its_gradients_equal_the_textbook():
    net, rewards = Net(10), torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    given = {"noise": NOISE, "sigma": SIGMA, "temperature": 0.7}
    conditions = {**TEXTS[0], **FIRST[0]}
    loss = rwr_loss(net.forward, WIN, conditions, rewards, **given)
    errors = [error(net, WIN, conditions, i) for i in range(3)]
    expected = sum(math.exp(r / 0.7) * e for r, e in zip(rewards.tolist(), errors, strict=True)) / 3
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, net), gradients(expected, net))
    assert rewards.grad is None


def perturb(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=seeded(8), std=0.3)
    return model


def pair_inputs(count=1):
    win, lose = (torch.randn(count, 16, 2, 4, 4, generator=seeded(s)) for s in (1, 2))
    return win, lose, {"encoder_hidden_states": torch.randn(count, 3, 20, generator=seeded(3))}


def test_the_model_without_its_adapters_is_the_reference():
    model = tiny_wan(layers=1, heads=1)
    initial = copy.deepcopy(model)
    add_lora(model, 2)
    assert dpo_loss(model, *pair_inputs(), generator=seeded(4)).item() == float(
        torch.tensor(2.0).log()
    )
    perturb(model)
    found = [
        dpo_loss(model, *pair_inputs(), generator=seeded(4), beta=3.0, reference=reference)
        for reference in (None, initial)
    ]
    assert torch.equal(*found) and abs(found[0].item() - math.log(2)) > 1e-3
    grads = []
    for loss in found:
        model.zero_grad()
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0] and all(map(torch.equal, *grads))
    assert all(p.grad is None for p in initial.parameters())


def test_pairs_get_one_noise_one_level_and_one_expert():
    model = Experts(*(tiny_wan(layers=1, heads=1, seed=seed) for seed in (0, 1)), 0.9)
    add_lora(model, 2)
    seen = []
    for name in ("high", "low"):
        getattr(model, name).register_forward_hook(
            lambda m, args, out, name=name: seen.append((name, args[1]))
        )
    names = set()
    for seed in range(6):
        seen.clear()
        dpo_loss(model, *pair_inputs(2), generator=seeded(seed))
        (first, time), *rest = seen
        assert len(rest) == 3  # winner and loser, by the model and by the reference
        assert all(name == first and torch.equal(t, time) for name, t in rest)
        names.add(first)
    assert names == {"high", "low"}
    x = []

    def record(*args):
        x.append(args[0])
        return 0 * args[0]

    given = {"reference": record, "generator": seeded(5), "integer_timesteps": False}
    dpo_loss(record, WIN, LOSE, TEXTS[0], **given)
    generator = seeded(5)
    noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for win, lose in zip(x[::2], x[1::2], strict=True):
        share = (lose - win) / (LOSE - WIN)  # 1 - σ, the same in every element
        sigma = 1 - share.mean(dim=(1, 2, 3, 4), keepdim=True)
        torch.testing.assert_close(win, (1 - sigma) * WIN + sigma * noise)


def test_bad_input_is_refused():
    net = Net(10).forward
    with pytest.raises(ValueError, match="reference is None, expected the initial velocity"):
        dpo_loss(net, WIN, LOSE, TEXTS[0])
    with pytest.raises(ValueError, match="reference=None needs adapters .* pass a frozen copy"):
        dpo_loss(tiny_wan(layers=1, heads=1), *pair_inputs())
    with pytest.raises(ValueError, match="shape of lose is .* expected the shape of win"):
        dpo_loss(net, WIN, LOSE[:2], TEXTS[0], reference=net)
    with pytest.raises(ValueError, match="beta is 0, expected a positive"):
        dpo_loss(net, WIN, LOSE, TEXTS[0], reference=net, beta=0)
    with pytest.raises(ValueError, match="rewards is .* expected a tensor"):
        rwr_loss(net, WIN, TEXTS[0], torch.ones(2))
    with pytest.raises(ValueError, match="temperature is -1, expected a positive"):
        rwr_loss(net, WIN, TEXTS[0], torch.ones(3), temperature=-1)
    rwr = FlowRWR(tiny_wan(layers=1, heads=1), Batches(samples(1)), "score")
    with pytest.raises(ValueError, match=r"label score is None, expected a number\. The"):
        rwr(0, seeded(0), 1.0)


@pytest.mark.slow
def test_training_on_pairs_and_on_their_winners():
    model = tiny_wan(layers=1, heads=1)
    add_lora(model, 4)
    pairs = [Pair(*pair) for pair in zip(samples(4, 1), samples(4, 2), strict=True)]
    batches = Batches(pairs, 4)
    objectives = {
        "dpo": FlowDPO(model, batches, beta=20.0),
        "rwr": FlowRWR(model, Winners(batches), "motion_quality", temperature=0.5),
    }
    history = Trainer(model, objectives, TrainConfig(steps=12, learning_rate=1e-2)).run().history
    assert history[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["dpo/margin"] == 0 and history[0]["dpo/accuracy"] == 0.5  # ties
    last = history[-3:]
    assert sum(record["dpo/margin"] for record in last) > 0
    assert sum(record["dpo/loss"] for record in last) < 3 * math.log(2)
    assert history[-1]["rwr/reward"] == 0.5


def test_a_reward_of_clean_latents_weights_the_supervised_loss():
    model, batches = tiny_wan(layers=1, heads=1), Batches(samples(4), 2)
    seen = []

    def reward(x, timestep, conditions):
        seen.append((x, timestep, conditions))
        return x.mean((1, 2, 3, 4))

    metrics = FlowRWR(model, batches, reward, temperature=0.1)(1, seeded(3), 1.0)
    batch = batches[1]
    assert torch.equal(seen[0][0], batch.latents) and not seen[0][1].any()
    rewards = batch.latents.mean((1, 2, 3, 4))
    expected = rwr_loss(
        model, batch.latents, batch.conditions, rewards, temperature=0.1, generator=seeded(3)
    )
    assert torch.equal(metrics["loss"], expected.detach())
    assert torch.equal(metrics["reward"], rewards.mean())
