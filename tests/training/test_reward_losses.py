"""Losses and evaluation of reward training: values, draws, determinism, rejected arguments."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from wan import inputs, tiny_wan

from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.reward_losses import LABELS, bt_loss, ce_loss, evaluate, label_of

SIZE = (2, 4, 4)


class Recorder(nn.Module):
    """Score latents by their mean, in place of a reward model, and keep the calls."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.part = nn.Dropout()
        self.calls = []

    def logits(self, x, timestep, conditions):
        self.calls.append((x, timestep, conditions, self.training))
        return self.gain * x.flatten(1).mean(1)


def build(num_blocks=2):
    return LatentRewardModel.from_backbone(tiny_wan(layers=num_blocks), num_blocks, 4)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def batch(size=4, seed=1):
    x, _, conditions = inputs(batch=size, size=SIZE, seed=seed)
    return x, conditions, torch.arange(size) % 2


@pytest.mark.parametrize("key", LABELS)
@pytest.mark.parametrize("value", [0, 1, 1.0, True, False, "good", "poor"])
def test_label_of_reads_every_spelling(key, value):
    assert label_of({"id": "a", key: value}, key) == (1.0 if value in (1, "good") else 0.0)


@pytest.mark.parametrize("physics", [0, 1])
@pytest.mark.parametrize("human", ["poor", "good"])
def test_motion_is_physics_and_human_unless_given(physics, human):
    record = {"physics_quality": physics, "human_quality": human}
    assert label_of(record, "motion_quality") == float(physics and human == "good")
    assert label_of(record | {"motion_quality": 1 - physics}, "motion_quality") == 1 - physics


@pytest.mark.parametrize(
    "record, key, message",
    [
        ({"motion_quality": 1}, "motion", r"motion is None, .* has \['motion_quality'\]"),
        ({"blur_quality": 1}, "motion_quality", r"is None, .* The record has \['blur_quality'\]"),
        ({"physics_quality": 1}, "motion_quality", "motion_quality is None, expected 0, 1"),
        ({"physics_quality": 1, "human_quality": 0.5}, "motion_quality", "human_quality is 0.5"),
        ({"blur_quality": 0.5}, "blur_quality", "blur_quality is 0.5, expected 0, 1"),
        ({"blur_quality": "fair"}, "blur_quality", "is 'fair'"),
        ({"blur_quality": math.nan}, "blur_quality", "is nan"),
        ({"blur_quality": [1]}, "blur_quality", r"is \[1\]"),
    ],
)
def test_label_of_refuses(record, key, message):
    with pytest.raises(ValueError, match=message):
        label_of(record, key)


def test_a_missing_label_counts_as_zero_if_asked():
    assert label_of({}, "blur_quality", 0) == 0 and label_of({}, "motion_quality", 0) == 0
    record = {"physics_quality": 1}
    assert label_of(record, "motion_quality", 0) == 0
    assert label_of(record, "physics_quality", 0) == 1
    with pytest.raises(ValueError, match="is 0.5"):
        label_of({"blur_quality": 0.5}, "blur_quality", 0)


def test_ce_is_the_cross_entropy_of_the_scores_of_noised_latents():
    reward = build().double()
    x, conditions, labels = batch()
    x, noise = x.double(), torch.randn(x.shape, dtype=torch.float64)
    sigma = torch.tensor([0.0, 0.25, 0.6, 1.0], dtype=torch.float64)
    loss = ce_loss(reward, x, conditions, labels, sigma=sigma, noise=noise)
    noisy = torch.stack([(1 - s) * a + s * e for s, a, e in zip(sigma, x, noise, strict=True)])
    scores = reward(noisy, 1000 * sigma, conditions)
    expected = -torch.where(labels == 1, scores, 1 - scores).log().mean()
    assert abs(loss - expected) <= 1e-12
    expanded = ce_loss(reward, x, conditions, labels, sigma=0.25, noise=noise)
    each = ce_loss(reward, x, conditions, labels, sigma=torch.full((4,), 0.25), noise=noise)
    assert torch.equal(expanded, each)


def test_ce_stays_finite_where_the_sigmoid_saturates():
    reward = Recorder()
    x = torch.full((2, 1, 1, 2, 2), 500.0)
    loss = ce_loss(reward, x, {}, torch.tensor([0, 1]), sigma=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(500.0) and torch.isfinite(reward.gain.grad)


def test_sigma_is_drawn_uniformly_from_the_schedule():
    reward = Recorder()
    x, labels = torch.zeros(4000, 1, 1, 1, 1), torch.zeros(4000)
    options = {"shift": 5.0, "integer_timesteps": False}
    ce_loss(reward, x, {}, labels, generator=seeded(0), **options)
    noisy, timestep = reward.calls[0][0].flatten(), reward.calls[0][1]
    sigma = timestep.double() / 1000
    index = 1000 * (1 - sigma / (5 - 4 * sigma))  # the shift undone: position in the schedule
    assert (index - index.round()).abs().max() < 1e-2
    counts = torch.histc(index, bins=10, min=-0.5, max=999.5)
    assert counts.sum() == 4000 and (counts - 400).abs().max() < 5 * 400**0.5
    assert (noisy / sigma).std() == pytest.approx(1, abs=0.05)  # zeros noised by σ·ε


def test_draws_follow_the_generator_alone():
    reward = build()
    losses = []
    for seed in (3, 3, 4):
        torch.manual_seed(torch.randint(1000, ()).item())
        state = torch.get_rng_state()
        losses.append(ce_loss(reward, *batch(), generator=seeded(seed)).item())
        assert torch.equal(torch.get_rng_state(), state)
    assert losses[0] == losses[1] != losses[2]


def test_half_precision_latents_are_noised_in_float32():
    reward = Recorder()
    ce_loss(reward, torch.zeros(2, 1, 1, 2, 2, dtype=torch.bfloat16), {}, torch.zeros(2))
    assert reward.calls[0][0].dtype == reward.calls[0][1].dtype == torch.float32


def test_bt_shares_sigma_and_noise_and_ignores_the_order():
    win, lose = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    values, labels_seen = [], set()
    for seed in range(6):
        reward = Recorder()
        sigma = torch.tensor([0.2, 0.5, 0.9])
        draws = {"sigma": sigma, "noise": torch.full_like(win, 3.0), "generator": seeded(seed)}
        loss = bt_loss(reward, win, lose, {"a": 1}, {"b": 2}, **draws)
        loss.backward()
        values.append((loss.item(), reward.gain.grad.item()))
        (x_win, t_win, c_win, _), (x_lose, t_lose, c_lose, _) = reward.calls
        assert torch.equal(t_win, t_lose) and c_win == {"a": 1} and c_lose == {"b": 2}
        torch.testing.assert_close(x_win - x_lose, (1 - sigma).view(3, 1, 1, 1, 1) * (win - lose))
        labels_seen.add(tuple(torch.randint(2, (3,), generator=seeded(seed)).tolist()))
    assert len(labels_seen) > 1  # both orders occurred
    for column in zip(*values, strict=True):
        assert max(column) - min(column) <= 1e-6
    reward = Recorder()
    s_win, s_lose = (reward.logits((1 - 0.5) * v + 0.5 * 3, None, None) for v in (win, lose))
    expected = -torch.log(torch.sigmoid(s_win - s_lose)).mean()
    loss = bt_loss(reward, win, lose, {}, sigma=0.5, noise=torch.full_like(win, 3.0))
    torch.testing.assert_close(loss, expected)


def test_bt_of_exchanged_videos_is_the_loss_of_the_other_preference():
    reward = build()
    win, conditions, _ = batch(3)
    lose, _, _ = batch(3, seed=9)
    draws = {"sigma": 0.3, "noise": torch.randn_like(win)}
    forward = bt_loss(reward, win, lose, conditions, **draws)
    backward = bt_loss(reward, lose, win, conditions, **draws)
    x = [0.7 * v + 0.3 * draws["noise"] for v in (win, lose)]
    difference = torch.sub(*(reward.logits(v, torch.tensor(300.0), conditions) for v in x))
    # log(1 + e^-d) and log(1 + e^d) differ by d.
    torch.testing.assert_close(backward - forward, difference.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(forward, functional.softplus(-difference).mean())
    same = bt_loss(reward, win, win, conditions, **draws)
    assert same.item() == pytest.approx(math.log(2))


def test_ce_overfits_eight_samples():
    reward = build(1)
    x, conditions, labels = batch(8)
    noise = torch.randn_like(x)
    optimizer = torch.optim.AdamW((p for p in reward.parameters() if p.requires_grad), lr=2e-3)
    frozen = reward.backbone.patch_embedding.weight.clone()
    losses = []
    for _ in range(25):
        loss = ce_loss(reward, x, conditions, labels, sigma=0.2, noise=noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.4 and losses[-1] < 0.05
    assert torch.equal(reward.backbone.patch_embedding.weight, frozen)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 1, 2, 0])}, r"labels is \[0, 1, 2\], expected only 0 and 1"),
        ({"labels": torch.tensor([0.0, math.nan, 1.0, 1.0])}, "labels is .*expected only 0 and 1"),
        ({"labels": torch.zeros(4, 1)}, r"labels is float32\[4, 1\] .*expected a tensor \[4\]"),
        ({"labels": [0, 1, 0, 1]}, r"labels is \[0, 1, 0, 1\], expected a tensor"),
        ({"sigma": 1.5}, r"sigma is 1.5, expected a number in \[0, 1\], or 4 of them"),
        ({"sigma": 500}, "Timesteps are 1000 sigma"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"sigma": torch.zeros(3)}, r"sigma is \[0.0, 0.0, 0.0\], expected a number"),
        ({"noise": torch.zeros(4, 16, 2, 4, 2)}, r"noise is float32\[4, 16, 2, 4, 2\]"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"latents": torch.full((4, 16, *SIZE), math.nan)}, "NaN or infinite"),
        ({"conditions": {}}, "encoder_hidden_states"),
    ],
)
def test_ce_refuses(change, message):
    x, conditions, labels = batch()
    arguments = {"latents": x, "conditions": conditions, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        ce_loss(build(1), **arguments)


def test_bt_refuses_pairs_of_different_shapes():
    win, conditions, _ = batch(2)
    message = r"lose is \[2, 16, 2, 4, 2\], expected .* \[2, 16, 2, 4, 4\]"
    with pytest.raises(ValueError, match=message):
        bt_loss(build(1), win, win[..., :2], conditions)


def cut(x, conditions, labels, size):
    for i in range(0, len(labels), size):
        part = slice(i, i + size)
        yield x[part], {k: v[part] for k, v in conditions.items()}, labels[part]


def test_evaluation_depends_on_the_seed_and_not_on_the_batches():
    reward = build(1)
    data = batch(6)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    whole = evaluate(reward, [data], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(whole) == [201, 400, 600, 800, 1000]
    assert all({"accuracy", "auc", "ece", "loss"} <= m.keys() for m in whole.values())
    assert {m["count"] for m in whole.values()} == {6}
    assert evaluate(reward, [data], seed=1) == whole
    assert evaluate(reward, [data], seed=2) != whole
    for size in (1, 4):
        parts = evaluate(reward, cut(*data, size), seed=1)
        for t, metrics in whole.items():
            assert parts[t] == pytest.approx(metrics, rel=1e-5)


def test_evaluation_noises_each_sample_alike_at_every_timestep():
    reward = Recorder()
    x = torch.zeros(3, 2, 1, 2, 2)
    batches = [(x, {}, torch.tensor([0, 1, 0]))]
    evaluate(reward, batches, (200, 500), seed=4, integer_timesteps=False)
    (early, t_early, _, _), (late, t_late, _, _) = reward.calls
    assert t_early.tolist() == [200.0] * 3 and t_late.tolist() == [500.0] * 3
    torch.testing.assert_close(early / 0.2, late / 0.5)
    assert not torch.equal(early[0], early[1])


def test_evaluation_takes_the_nearest_level_of_the_schedule():
    reward, x = Recorder(), torch.ones(2, 1, 1, 2, 2)
    times = (201, 400, 600, 800, 1000)
    evaluate(reward, [(x, {}, torch.tensor([0, 1]))], times)
    levels = [5 * s / (1 + 4 * s) for s in (1 - i / 1000 for i in range(1000))]
    noise = None
    for t, (noisy, timestep, _, _) in zip(times, reward.calls, strict=True):
        sigma = min(levels, key=lambda s: abs(math.floor(1000 * s) - t))
        assert timestep.tolist() == [math.floor(1000 * sigma)] * 2
        drawn = (noisy - (1 - sigma)) / sigma
        torch.testing.assert_close(drawn, drawn if noise is None else noise, rtol=1e-4, atol=1e-4)
        noise = drawn


@pytest.mark.parametrize("loss", ["ce", "bt"])
def test_scores_are_asked_at_whole_timesteps(loss):
    reward, x, sigma = Recorder(), torch.zeros(3, 1, 1, 2, 2), torch.tensor([0.9998, 0.8333, 0.014])
    for integer in (True, False):
        options = {"sigma": sigma, "noise": x, "integer_timesteps": integer}
        if loss == "ce":
            ce_loss(reward, x, {}, torch.zeros(3), **options)
        else:
            bt_loss(reward, x, x, {}, **options)
    times = [call[1] for call in reward.calls]
    half = len(times) // 2
    assert all(t.tolist() == [999, 833, 14] for t in times[:half])
    assert all(torch.equal(t, 1000 * sigma) for t in times[half:])


def test_evaluation_measures_what_it_says():
    reward = Recorder()
    x = torch.tensor([-1.0, -0.5, -0.5, 0.2, 0.3, 2.0]).view(6, 1, 1, 1, 1)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    metrics = evaluate(reward, [(x, {}, labels)], (0,), integer_timesteps=False)[0]
    logits = 2 * x.flatten()
    pairs = [(p, n) for p in logits[labels == 1].tolist() for n in logits[labels == 0].tolist()]
    auc = sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs)
    assert metrics["auc"] == pytest.approx(auc)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    expected = functional.binary_cross_entropy(torch.sigmoid(logits), labels.float())
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    one_class = evaluate(reward, [(x[:2], {}, torch.ones(2))], (0,), integer_timesteps=False)[0]
    assert one_class["accuracy"] == 0.0 and one_class["count"] == 2.0 and "auc" not in one_class


def test_evaluation_leaves_modes_and_gradients_as_they_were():
    reward = Recorder().train()
    reward.part.eval()
    batches = [(torch.zeros(2, 1, 1, 2, 2), {}, torch.tensor([0, 1]))]
    evaluate(reward, batches, (400,))
    assert [call[3] for call in reward.calls] == [False]
    assert reward.training and not reward.part.training and reward.gain.grad is None

    def failing():
        yield batches[0]
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        evaluate(reward, failing(), (400,))
    assert reward.training and not reward.part.training


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batches": []}, r"batches is \[\], expected at least one batch"),
        ({"timesteps": ()}, r"timesteps is \[\]"),
        ({"timesteps": (400, 1001)}, r"timesteps is \[400, 1001\]"),
        ({"timesteps": (-1,)}, r"numbers in \[0, 1000\]"),
        ({"batches": [(torch.zeros(2, 16, *SIZE), {}, torch.tensor([0, 3]))]}, "labels is"),
    ],
)
def test_evaluation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Recorder(), **({"batches": [batch(2)]} | arguments))
