"""Objectives: reward feedback, supervised flow matching, reward fitting; full and LoRA."""

import math

import pytest
import torch
from device_reads import DeviceReads
from runs import log, samples
from wan import tiny_wan

from prfl_fast.data.dataset import Batches
from prfl_fast.data.manifest import Pair
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.models.registry import patch
from prfl_fast.models.velocity import autocast
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.training import TrainConfig, Trainer, add_lora
from prfl_fast.training.objectives import (
    FlowDPO,
    FlowRWR,
    RewardFeedback,
    RewardFit,
    SupervisedFlow,
    reward_call,
    velocity_call,
)
from prfl_fast.utils.io import load_tensors


def tiny():
    return tiny_wan(layers=1, heads=1)


def patched():
    return patch(tiny())


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", ["adamw", "adamw-sr", "adamw8bit", "adamw-cpu"])
def test_a_bfloat16_generator_trains(kind):
    transformer = patched().bfloat16()
    before = {n: p.detach().clone() for n, p in transformer.named_parameters()}
    history = fit(transformer, 2, steps=8, optimizer=kind, gradient_dtype="fp32")
    losses = [record["sft/loss"] for record in history]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not any(torch.equal(before[n], p) for n, p in transformer.named_parameters())
    assert {p.dtype for p in transformer.parameters()} == {torch.bfloat16}


def fit(transformer, batch_size=1, folder=None, learning_rate=3e-3, **settings):
    """Train on supervised flow matching and return the history."""
    objectives = {"sft": SupervisedFlow(transformer, Batches(samples(4), batch_size))}
    settings = TrainConfig(learning_rate=learning_rate, **settings)
    return Trainer(transformer, objectives, settings, folder=folder).run().history


def feedback(transformer, precision="fp32", plan=None, rewards=("reward",), **options):
    torch.manual_seed(4)
    calls = {}
    for name in rewards:
        model = LatentRewardModel.from_backbone(transformer, num_blocks=1, num_heads=2)
        calls[name] = reward_call(model, precision)
    velocity, options = velocity_call(transformer, precision), {"num_inference_steps": 4, **options}
    step = PRFL(velocity, calls, FlowEuler(), plan, **options)
    return RewardFeedback(step, Batches(samples(4)))


def test_feedback_from_data_takes_the_batchs_latents():
    transformer = patched()
    objective = feedback(transformer, plan=GradientPlan.rg_lcd())
    metrics = objective(3, seeded(0), 0.5)
    gradients = [p.grad.clone() for p in transformer.parameters()]
    transformer.zero_grad()
    batch, generator = objective.batches[3], seeded(0)
    noise = torch.randn(batch.latents.shape, generator=generator)
    given = {"latents": batch.latents, "generator": generator, "loss_scale": 0.5}
    out = objective.step(noise, batch.conditions, **given)
    assert torch.equal(out.loss, metrics["loss"]) and set(metrics) == {"loss", "reward"}
    assert all(map(torch.equal, gradients, (p.grad for p in transformer.parameters())))


def test_feedback_reports_every_reward_the_divergence_and_the_largest_drift():
    transformer = patched()
    add_lora(transformer, 2)
    options = {"rewards": ("a", "b"), "num_inference_steps": 9, "divergence": 0.1}
    options["rollout"] = RolloutConfig(stride=3, check_every=2)
    objective = feedback(transformer, plan=GradientPlan.prfl(points=2), **options)
    first, second = (objective(0, seeded(i), 1.0) for i in range(2))
    assert set(second) == {"loss", "reward", "reward/a", "reward/b", "divergence"}
    assert set(first) == {*second, "drift"}
    assert first["drift"] == max(objective.step.engine.drift.values()) > 0
    assert first["divergence"] == 0  # adapters start at zero
    torch.testing.assert_close(first["reward"], first["reward/a"] + first["reward/b"])
    assert objective.step.engine.trajectories == 2
    again = feedback(transformer, num_inference_steps=9)
    again.load_state_dict(objective.state_dict())
    assert again.state_dict() == objective.state_dict()


def objective_of(kind):
    """Return a model and an objective that trains it."""
    transformer, batches = patched(), Batches(samples(4))
    add_lora(transformer, 2)
    if kind == "dpo":
        pairs = [Pair(*pair) for pair in zip(samples(4), samples(4, seed=1), strict=True)]
        return transformer, FlowDPO(transformer, Batches(pairs))
    if kind in ("ce", "bt"):
        reward = LatentRewardModel.from_backbone(tiny(), num_blocks=1, num_heads=2)
        data = samples(4)
        if kind == "bt":
            data = [Pair(*pair) for pair in zip(data, samples(4, seed=1), strict=True)]
        return reward, RewardFit(reward, Batches(data), loss=kind)
    if kind == "sft":
        return transformer, SupervisedFlow(transformer, batches)
    if kind == "rwr":
        return transformer, FlowRWR(transformer, batches, "motion_quality")
    plan = GradientPlan.controlnet_plus_plus() if kind == "from data" else GradientPlan.prfl(2)
    return transformer, feedback(transformer, plan=plan, rewards=("a", "b"), divergence=0.1)


@pytest.mark.cases(4)
@pytest.mark.parametrize("kind", ["prfl", "from data", "sft", "dpo", "rwr", "ce", "bt"])
def test_an_update_reads_the_device_once(kind):
    model, objective = objective_of(kind)
    settings = TrainConfig(steps=2, gradient_accumulation_steps=2, ema_decay=0.9)
    run = Trainer(model, {"a": objective}, settings)
    with DeviceReads(*model.parameters()) as mode:
        history = run.run().history
    assert mode.count == 2 and [record["skipped"] for record in history] == [0, 0]
    assert all(math.isfinite(record["a/loss"]) for record in history)


@pytest.mark.parametrize("kind", ["prfl", "sft", "ce"])
def test_a_model_with_nan_skips_the_update_of_the_same_step(kind):
    model, objective = objective_of(kind)
    run = Trainer(model, {"a": objective}, TrainConfig(steps=3))
    trained = [p for p in model.parameters() if p.requires_grad]

    def poison(record):
        with torch.no_grad():  # not a query's: with AVX-512, ATen's attention turns NaN into 0
            trained[-1].fill_(math.nan)

    run.on_step = lambda record: poison(record) if record["step"] == 1 else None
    history = run.run().history
    assert [record["skipped"] for record in history] == [0, 1, 2]
    assert [record["a/loss"] is None for record in history] == [False, True, True]
    assert all(p.grad is None for p in trained)


@pytest.mark.parametrize("kind", ["from data", "sft", "dpo", "ce"])
def test_latents_with_nan_are_named_before_they_are_copied(kind):
    model, objective = objective_of(kind)
    batch = objective.batches[0]
    side = batch if hasattr(batch, "latents") else batch.lose
    side.latents[0, 0, 0, 0, 0] = math.nan
    objective.batches = [batch]
    with pytest.raises(ValueError, match="^latents has 1 NaN or infinite values"):
        objective(0, seeded(0), 1.0)


def test_feedback_that_would_train_nothing_is_refused():
    with pytest.raises(ValueError, match="step.plan.to is 'noise', expected 'parameters'"):
        feedback(tiny(), plan=GradientPlan.reno())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_gets_its_gradient_in_either_precision(precision):
    transformer = patched()
    objective = feedback(transformer, precision, GradientPlan.prfl(points=2))
    metrics = objective(0, seeded(0), 1.0)
    assert math.isfinite(metrics["loss"]) and 0 < float(metrics["reward"]) < 1
    without = [n for n, p in transformer.named_parameters() if p.grad is None or not p.grad.any()]
    # A bias of the keys adds the same value to all scores of a softmax, which cancels.
    assert [n for n in without if not n.endswith("to_k.bias")] == []
    supervised = SupervisedFlow(transformer, Batches(samples(4)), precision=precision)
    transformer.zero_grad()
    assert math.isfinite(supervised(0, torch.Generator(), 1.0)["loss"])
    assert all(p.grad is not None for p in transformer.parameters())


def test_bf16_runs_the_linears_in_bf16_and_keeps_float32_weights():
    transformer = tiny()
    seen = set()
    transformer.blocks[0].ffn.net[2].register_forward_hook(lambda m, a, out: seen.add(out.dtype))
    SupervisedFlow(transformer, Batches(samples(4)), precision="bf16")(0, torch.Generator(), 1.0)
    assert seen == {torch.bfloat16}
    dtypes = {d for p in transformer.parameters() for d in (p.dtype, p.grad.dtype)}
    assert dtypes == {torch.float32}
    with autocast(torch.device("cpu"), "fp32"):
        assert not torch.is_autocast_enabled("cpu")


def test_alternation_raises_the_reward_and_lowers_the_supervised_loss():
    transformer = patched()
    sft = SupervisedFlow(transformer, Batches(samples(4), 2))
    settings = TrainConfig(steps=12, learning_rate=3e-3)
    run = Trainer(transformer, {"prfl": feedback(transformer), "sft": sft}, settings)
    history = run.run().history

    def mean(key, part):
        return sum(record[key] for record in part) / len(part)

    assert mean("sft/loss", history[-4:]) < mean("sft/loss", history[:4])
    assert mean("prfl/reward", history[-4:]) > mean("prfl/reward", history[:4])


@pytest.mark.parametrize("loss", ["ce", "bt"])
def test_a_reward_model_learns_its_data(loss):
    torch.manual_seed(0)
    reward = LatentRewardModel.from_backbone(tiny(), num_blocks=1, num_heads=2)
    frozen = [p.detach().clone() for p in reward.backbone.patch_embedding.parameters()]

    def shifted(shift, label):
        labels = {"motion_quality": label}
        found = samples(4, seed=label)
        return [s._replace(latents=s.latents + shift, labels=labels) for s in found]

    good, bad = shifted(1.0, 1), shifted(-1.0, 0)
    data = good + bad if loss == "ce" else [Pair(*pair) for pair in zip(good, bad, strict=True)]
    fit = RewardFit(reward, Batches(data, 4), loss=loss)
    settings = TrainConfig(steps=12, learning_rate=2e-3)
    history = Trainer(reward, {"reward": fit}, settings).run().history
    assert history[-1]["reward/loss"] < 0.9 * history[0]["reward/loss"]
    assert all(map(torch.equal, frozen, reward.backbone.patch_embedding.parameters()))


def test_lora_trains_saves_and_resumes_the_adapter_alone(tmp_path):
    def build():
        transformer = patched()
        torch.manual_seed(6)
        add_lora(transformer, 2, target_modules=("to_q", "to_v"))
        return transformer

    whole = build()
    base = {n: p.detach().clone() for n, p in whole.named_parameters() if not p.requires_grad}
    fit(whole, folder=tmp_path / "whole", steps=4)
    assert all(torch.equal(base[n], p) for n, p in whole.named_parameters() if n in base)
    for steps in (2, 4):
        fit(build(), folder=tmp_path / "half", steps=steps)
    assert log(tmp_path / "half") == log(tmp_path / "whole")
    weights = "step-00000004/model/pytorch_lora_weights.safetensors"
    resumed, uninterrupted = (load_tensors(tmp_path / name / weights) for name in ("half", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted.items())
    layers = [f"transformer.blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in "qv"]
    names = {f"{layer}.lora_{ab}.weight" for layer in layers for ab in "AB"}
    assert set(resumed) == set(uninterrupted) == names
    # diffusers reads back the adapter that was trained.
    fresh = tiny()
    fresh.load_lora_adapter(tmp_path / "half" / weights)
    trained = {n: p for n, p in whole.named_parameters() if "lora" in n}
    loaded = {n.replace("default_0", "default"): p for n, p in fresh.named_parameters()}
    assert {n for n in loaded if "lora" in n} == set(trained)
    assert all(torch.equal(loaded[name], parameter) for name, parameter in trained.items())


def test_a_full_checkpoint_is_a_diffusers_model(tmp_path):
    from diffusers import WanTransformer3DModel

    transformer = patched()
    fit(transformer, folder=tmp_path, steps=1)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path / "step-00000001" / "model")
    state = transformer.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items())


def test_lora_refuses_two_adapters_and_training_beside_one(tmp_path):
    transformer = tiny()
    add_lora(transformer, 2)
    with pytest.raises(ValueError, match="adapter is 'default', expected a model without one"):
        add_lora(transformer, 2)
    transformer.proj_out.requires_grad_(True)
    with pytest.raises(ValueError, match="proj_out.weight is trained beside adapter 'default'"):
        fit(transformer, folder=tmp_path, steps=1)
