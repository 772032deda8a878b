"""Scores, gradients, dtypes and argument checks of LatentRewardModel."""

import copy

import pytest
import torch
from latent_reward import HEADS, build, doubled, textbook_batch
from torch import nn
from wan import float_means_double, inputs, tiny_wan

from prfl_fast.models.registry import find_adapter, patch
from prfl_fast.rewards.latent import LatentRewardModel


@pytest.mark.cases(6)
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
@pytest.mark.parametrize("batch, num_queries", [(1, 1), (3, 1), (2, 3)])
def test_score_and_latent_gradient_equal_the_textbook_in_float64(case, batch, num_queries, patched):
    reward, transformer = build(case, num_queries=num_queries)
    if patched:
        patch(reward.backbone)
    reward.double().freeze()
    transformer.double()
    x, timestep, conditions = doubled(*inputs(case, batch=batch))
    x.requires_grad_()
    with float_means_double():
        score = reward(x, timestep, conditions)
        (gradient,) = torch.autograd.grad(score.sum(), x)
        pool, head = reward.pool.state_dict(), reward.head.state_dict()
        expected = textbook_batch(transformer, pool, head, x, timestep, conditions, 2)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    assert score.shape == (batch,) and ((score > 0) & (score < 1)).all()
    # The patched backbone's rotary table is float32 of its own rounding.
    assert (score - expected).abs().max() <= (1e-9 if patched else 1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-6 * expected_gradient.norm()


def test_scores_of_a_batch_are_those_of_its_samples():
    reward, _ = build()
    x, timestep, conditions = inputs(batch=3)
    together = reward.logits(x, timestep, conditions)
    for i in range(3):
        text = {k: v[i : i + 1] for k, v in conditions.items()}
        alone = reward.logits(x[i : i + 1], timestep[i], text)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-5, atol=1e-5)
    assert len(set(together.tolist())) == 3


def test_from_backbone_copies_and_leaves_the_generator_alone():
    transformer = tiny_wan(layers=3)
    transformer.blocks[1].requires_grad_(False)
    before = copy.deepcopy(transformer.state_dict())
    config, flags = dict(transformer.config), [p.requires_grad for p in transformer.parameters()]
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    own = {p.data_ptr() for p in transformer.parameters()}
    assert not own & {p.data_ptr() for p in reward.parameters()}
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in transformer.state_dict().items())
    assert dict(transformer.config) == config and len(transformer.blocks) == 3
    assert flags == [p.requires_grad for p in transformer.parameters()]
    assert reward.num_blocks == 2 and not any("proj_out" in n for n, _ in reward.named_parameters())


def test_a_patched_generator_gives_a_patched_reward():
    transformer = patch(tiny_wan(layers=2))
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    assert all(block.forward.args[0] is block for block in reward.backbone.blocks)
    plain, _ = build(layers=2)
    plain.load_state_dict(reward.state_dict())
    ours, theirs = (model.logits(*inputs()) for model in (reward, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_embeddings_are_frozen_and_the_rest_trains():
    transformer = tiny_wan("i2v").requires_grad_(False)
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    frozen = {n for n, p in reward.named_parameters() if not p.requires_grad}
    embeddings = ("backbone.patch_embedding.", "backbone.condition_embedder.")
    assert frozen and all(name.startswith(embeddings) for name in frozen)
    assert any("image_embedder" in n for n in frozen)
    trained = {n for n, p in reward.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"backbone", "pool", "head"}
    assert all(n.startswith("backbone.blocks.") for n in trained if n.startswith("backbone."))
    reward.logits(*inputs("i2v")).sum().backward()
    assert {n for n, p in reward.named_parameters() if p.grad is None} == frozen


def test_backward_of_a_frozen_reward_gives_the_latent_gradient_only():
    reward, _ = build()
    assert reward.freeze() is reward and not reward.training
    assert not any(p.requires_grad for p in reward.parameters())
    x, timestep, conditions = inputs()
    reward(x.requires_grad_(), timestep, conditions).sum().backward()
    assert x.grad is not None and x.grad.abs().min() >= 0 and x.grad.abs().max() > 0
    assert all(p.grad is None for p in reward.parameters())


def head_dtypes(reward):
    return {p.dtype for p in [*reward.pool.parameters(), *reward.head.parameters()]}


def test_pool_and_head_stay_wide_when_the_model_is_narrowed():
    transformer = tiny_wan(layers=2).to(torch.bfloat16)
    reward = LatentRewardModel.from_backbone(transformer, 2, HEADS)
    assert {p.dtype for p in reward.backbone.parameters()} == {torch.bfloat16}
    head = copy.deepcopy(reward.head.state_dict())
    for narrow in (reward.to(torch.bfloat16), reward.half(), reward.bfloat16()):
        assert head_dtypes(narrow) == {torch.float32}
        assert all(torch.equal(v, head[k]) for k, v in narrow.head.state_dict().items())
    assert {p.dtype for p in reward.double().parameters()} == {torch.float64}
    reward.float().to(torch.bfloat16)
    x, timestep, conditions = inputs()
    x = x.to(torch.bfloat16).requires_grad_()
    score = reward(x, timestep, conditions)
    assert score.dtype == torch.float32
    score.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and torch.isfinite(x.grad).all()


def test_pool_and_head_stay_wide_under_autocast():
    reward, _ = build()
    arguments = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        logits = reward.logits(*arguments)
        features = find_adapter(reward.backbone).features(reward.backbone, *arguments, 2)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, reward.head(reward.pool(features)))


def test_pool_and_head_of_a_narrow_checkpoint_are_widened():
    reward, _ = build()
    again = LatentRewardModel(reward.backbone, reward.pool.bfloat16(), reward.head.bfloat16())
    assert head_dtypes(again) == {torch.float32}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_blocks": 3}, "num_blocks is 3, expected 1 to 2"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": 1, "num_heads": 7}, "num_heads is 7, expected a divisor"),
        ({"num_blocks": 1, "num_heads": 0}, "num_heads is 0"),
        ({"num_blocks": 1, "num_queries": 0}, "num_queries is 0"),
    ],
)
def test_from_backbone_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LatentRewardModel.from_backbone(tiny_wan(layers=2), **arguments)


def test_unknown_models_and_widths_are_refused():
    with pytest.raises(TypeError, match="supported"):
        LatentRewardModel.from_backbone(nn.Linear(2, 2))
    reward, _ = build()
    narrow = LatentRewardModel.from_backbone(tiny_wan(heads=1), 1, HEADS)
    with pytest.raises(ValueError, match="width of pool is 24, expected the backbone's 48"):
        LatentRewardModel(reward.backbone, narrow.pool, reward.head)
    with pytest.raises(ValueError, match="width of head is 24, expected the backbone's 48"):
        LatentRewardModel(reward.backbone, reward.pool, narrow.head)


def with_nan(x):
    x[1, 3, 0, 2, 2] = float("nan")
    return x


TEXT = "encoder_hidden_states"
LATENTS = {
    "not-a-tensor": (lambda x: x.tolist(), "x is 'list', expected a floating-point tensor"),
    "one-sample": (lambda x: x[0], r"x is float32\[16, 3, 4, 6\]"),
    "channels": (lambda x: x[:, :12], "channels are 12 of x"),
    "integers": (lambda x: x.long(), "int64"),
    "odd-height": (lambda x: x[:, :, :, :3], "H of x is 3"),
    "odd-width": (lambda x: x[..., :5], "W of x is 5"),
    "long": (lambda x: x[:, :, :1].expand(-1, -1, 65, -1, -1), "F of x is 65, expected at most 64"),
    "nan": (with_nan, "x has 1 NaN or infinite values"),
    "infinite": (lambda x: x / 0.0, "NaN or infinite"),
}
TIMESTEPS = {
    "batch": (lambda t: t[:1].repeat(3), r"is float32\[3\] on cpu, expected a tensor \[2\]"),
    "shape": (lambda t: t[:, None], r"timestep is float32\[2, 1\]"),
    "number": (lambda t: 500, "timestep is 500"),
    "high": (lambda t: t + 1000, r"expected 1000 times sigma, in \[0, 1000\]"),
    "negative": (lambda t: -t - 1, r"in \[0, 1000\]"),
    "nan": (lambda t: t * float("nan"), r"in \[0, 1000\]"),
}
CONDITIONS = {
    "no-text": (lambda c: {}, TEXT),
    "unknown": (lambda c: c | {"prompt": c[TEXT]}, "prompt"),
    "batch": (lambda c: {TEXT: c[TEXT][:1]}, r"float32\[1, 7, 20\].*the batch of x, 2"),
    "width": (lambda c: {TEXT: c[TEXT][..., :3]}, r"\[2, 7, 3\]"),
    "rank": (lambda c: {TEXT: c[TEXT][:, 0]}, TEXT),
    "string": (lambda c: {TEXT: "a cat"}, "is 'a cat', expected a tensor"),
    "tokens": (lambda c: {TEXT: c[TEXT].long()}, r"is int64\[.*expected a floating-point tensor"),
    "list": (lambda c: [c], "conditions is list"),
    "image": (lambda c: c | {"encoder_hidden_states_image": c[TEXT]}, "the model takes no image"),
}


@pytest.mark.parametrize(
    "position, change, message",
    [
        pytest.param(position, *case, id=f"{position}-{name}")
        for position, cases in enumerate((LATENTS, TIMESTEPS, CONDITIONS))
        for name, case in cases.items()
    ],
)
def test_bad_arguments_give_one_clear_error(position, change, message):
    reward, _ = build()
    arguments = list(inputs())
    arguments[position] = change(arguments[position])
    with pytest.raises(ValueError, match=message):
        reward(*arguments)


IMAGE, FRAMES = "encoder_hidden_states_image", "latent_condition"


@pytest.mark.parametrize(
    "name, change, message",
    [
        (IMAGE, lambda v: None, "This is an image-to-video model"),
        (IMAGE, lambda v: v[..., :7], r"is float32\[2, 5, 7\] on cpu, expected \[B, N, 20\]"),
        (IMAGE, lambda v: v[:, 0], r"is float32\[2, 20\]"),
        (FRAMES, lambda v: None, "channels are 16 of x, expected 36"),
        (FRAMES, lambda v: v[:, :4], "16 of x and 4 of latent_condition, expected 36"),
        (FRAMES, lambda v: v[:, :, :1], r"latent_condition'\] is float32\[2, 20, 1, 4, 6\]"),
        (FRAMES, lambda v: v[0], r"latent_condition'\] is float32\[20, 3, 4, 6\]"),
    ],
)
def test_bad_image_conditions_give_one_clear_error(name, change, message):
    reward, _ = build("i2v")
    x, timestep, conditions = inputs("i2v")
    conditions[name] = change(conditions[name])
    with pytest.raises(ValueError, match=message):
        reward(x, timestep, {k: v for k, v in conditions.items() if v is not None})


def test_non_finite_latents_of_a_generator_reach_the_loss():
    reward, _ = build()
    x, timestep, conditions = inputs()
    x[0, 0, 0, 0, 0] = float("nan")
    score = reward.freeze()(x.requires_grad_(), timestep, conditions)
    assert torch.isfinite(score).tolist() == [False, True]
