"""PRFL refuses wrong arguments."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
from prfl_world import NOISE, REWARD, TEXT, Affine, Score, make_wan, mean, normal, prfl

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.feedback.step import PRFL
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC

VELOCITY = Affine().velocity
DRAFT, RENO = GradientPlan.draft(2), GradientPlan.reno()


def small(model=VELOCITY, plan=None, reward=REWARD, **options):
    return prfl(model, plan, FlowEuler(), reward, steps=4, **options)


def poisoned(value):
    noise = NOISE.clone()
    noise[1, 2, 0, 1, 1] = value
    return noise


@pytest.mark.parametrize(
    "noise,conditions,message",
    [
        (poisoned(math.nan), TEXT, "noise has 1 NaN or infinite"),
        (poisoned(math.inf), TEXT, "noise has 1 NaN or infinite"),
        (NOISE[0], TEXT, r"noise is .*\[B, C, F, H, W\]"),
        (NOISE[:0], TEXT, "noise is"),
        (NOISE.long(), TEXT, "noise is"),
        (None, TEXT, "noise is None"),
        (NOISE, TEXT["encoder_hidden_states"], "conditions is Tensor"),
        (NOISE, {}, "encoder_hidden_states"),
        (NOISE, {"encoder_hidden_states": torch.zeros(3, 3, 12)}, "batch of noise, 2"),
        (NOISE, {"encoder_hidden_states": "a dog"}, "expected a tensor"),
        (NOISE, {**TEXT, "prompt": torch.zeros(2)}, "prompt"),
        (normal(shape=(2, 15, 2, 4, 4)), TEXT, "channels are 15 of x, expected 16"),
        (normal(shape=(2, 16, 2, 5, 4)), TEXT, "H of x is 5"),
    ],
)
def test_bad_inputs_of_a_step_are_refused_before_any_work(noise, conditions, message):
    model = make_wan()
    with pytest.raises(ValueError, match=message):
        prfl(model)(noise, conditions)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("indices", [(), (3, 1), (1, 1), (-1,), (4,), (1.0,), (True,)])
def test_bad_indices_are_refused(indices):
    with pytest.raises(ValueError, match="indices is"):
        prfl(VELOCITY, reward=mean, steps=5)(NOISE, {}, indices=indices)


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"transformer": Affine()}, TypeError, "supported"),
        ({"transformer": "wan"}, TypeError, "transformer is str"),
        ({"reward": None}, TypeError, "reward is"),
        ({"scheduler": "unipc"}, TypeError, "scheduler is"),
        ({"num_inference_steps": 1}, ValueError, "num_inference_steps is 1"),
        ({"plan": GradientPlan.prfl(5), "num_inference_steps": 5}, ValueError, "points is 5"),
        ({"target": math.nan}, ValueError, "target"),
        ({"weight": math.inf}, ValueError, "weight"),
        ({"plan": "prfl"}, TypeError, "plan is .*, expected "),
        ({"guidance": 3.0}, TypeError, "guidance is .*, expected "),
        ({"rollout": True}, TypeError, "rollout is .*, expected "),
        (
            {"reward": {"a": REWARD}, "reward_weights": {"b": 1.0}},
            ValueError,
            "reward_weights is .*expected names",
        ),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"transformer": VELOCITY, "reward": REWARD, "scheduler": FlowUniPC()} | change
    with pytest.raises(error, match=message):
        PRFL(**arguments)


TRAINABLE = Score(5).requires_grad_(True)


@pytest.mark.parametrize(
    "reward,message",
    [
        (TRAINABLE, r"3 trainable parameters .*reward.freeze\(\)"),
        (TRAINABLE.forward, "trainable parameters"),
        (lambda x, t, c: x.mean(), "expected one score per sample"),
        (lambda x, t, c: x.mean((2, 3, 4))[:, :1], "expected one score per sample"),
        (lambda x, t, c: x.detach().mean((1, 2, 3, 4)), "no graph"),
        (lambda x, t, c: 1.0, "expected one score per sample"),
    ],
)
def test_bad_rewards_are_refused(reward, message):
    with pytest.raises(ValueError, match=message):
        prfl(VELOCITY, reward=reward)(NOISE, TEXT)


@pytest.mark.parametrize(
    "velocity,message",
    [
        (lambda x, t, c: x, "needs no gradient"),
        (lambda x, t, c: x[:, :1], "the transformer's result is"),
    ],
)
def test_bad_velocities_are_refused(velocity, message):
    with pytest.raises(ValueError, match=message):
        prfl(velocity, reward=mean)(NOISE, {})


@pytest.mark.parametrize("scheduler", [FlowEuler, FlowUniPC])
def test_guidance_at_pure_noise_is_refused(scheduler):
    """Where sigma is 1 the factor sigma / (1 - sigma) has no bound."""
    with pytest.raises(ValueError, match="later than step 0, where sigma is"):
        prfl(VELOCITY, GradientPlan.flow_nrg(window=(0, None)), scheduler())(NOISE, TEXT)
    later = prfl(VELOCITY, GradientPlan.flow_nrg(), scheduler(), steps=4)
    assert later(NOISE, TEXT).indices == (1, 2, 3)


def lora_wan(dropout=0.0):
    peft = pytest.importorskip("peft")
    model = make_wan().requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], lora_dropout=dropout))
    return model


@pytest.mark.parametrize("plan", [DRAFT, RENO], ids=["draft", "reno"])
def test_chains_with_dropout_at_work_are_refused(plan):
    """The forward that is run again would drop out something else."""
    model = lora_wan(dropout=0.5).train()
    step = small(model, plan)
    with pytest.raises(ValueError, match="dropout p=0.5 in train mode"):
        step(NOISE, TEXT)
    assert step.sampler.transformer.eval() is model and step(NOISE, TEXT).finite


@pytest.mark.parametrize("plan", [GradientPlan.prfl(), DRAFT], ids=["prfl", "draft"])
def test_a_frozen_transformer_is_refused(plan):
    for model in (make_wan().requires_grad_(False), lambda x, t, c: x.detach() * 0.5):
        with pytest.raises(ValueError, match="no parameter requires one"):
            small(model, plan)(NOISE, TEXT)


def test_a_divergence_needs_nothing_but_adapters_to_train():
    def refused(model, message, plan=None):
        with pytest.raises(ValueError, match=message):
            small(model, plan, divergence=0.1)

    def adapted(model):
        return next(m for m in model.modules() if hasattr(m, "lora_A"))

    refused(make_wan(), "there are none: add LoRA")
    refused(VELOCITY, "expected 0 for a function")
    model = lora_wan()
    refused(model, "divergence is 0.1", RENO)
    assert small(model, divergence=0.1)(NOISE, TEXT).divergence == 0  # B starts at zero
    model.proj_out.weight.requires_grad_(True)
    refused(model, "proj_out.weight trains too")
    model.proj_out.weight.requires_grad_(False)
    adapted(model).base_layer.bias.requires_grad_(True)
    refused(model, "base_layer.bias trains too")
    merged = lora_wan()
    adapted(merged).merge()
    refused(merged, "merged into the weights")


@pytest.mark.parametrize(
    "plan,given,message",
    [
        (None, {"indices": [Point(1, 1, 5.0)]}, "weights add up to 1"),
        (None, {"indices": [Point(1, 1, math.nan)]}, "expected increasing"),
        (None, {"indices": [Point(1.5)]}, "expected increasing"),
        (None, {"indices": 3}, "expected increasing"),
        (GradientPlan.draft_lv(1), {"indices": [1]}, "the last step, 3"),
        (GradientPlan.alignprop(), {"indices": [3]}, "the plan draws their depth"),
        (GradientPlan.flow_nrg(), {"indices": [1]}, "Its window names the guided steps"),
        (GradientPlan.rg_lcd(), {}, "latents is None, expected real latents"),
        (GradientPlan.rg_lcd(), {"latents": NOISE[:1]}, "expected real latents of the shape"),
        (GradientPlan.rg_lcd(), {"latents": poisoned(math.nan)}, "latents has 1 NaN"),
        (None, {"latents": NOISE}, "latents is .*expected None"),
        (None, {"loss_scale": math.nan}, "loss_scale is nan"),
        (
            GradientPlan.instruct_video(segments=4),
            {"latents": NOISE},
            "the number of latent frames is 3, expected at least",
        ),
    ],
)
def test_wrong_points_and_data_are_refused(plan, given, message):
    with pytest.raises(ValueError, match=message):
        small(plan=plan)(NOISE, TEXT, **given)


def test_a_guided_trajectory_ends_where_a_reward_is_not_finite():
    calls = []

    def velocity(x, timestep, conditions):
        calls.append(float(timestep[0]))
        return x * 0.1

    def reward(x, timestep, conditions):
        return mean(x, timestep, conditions) * (math.nan if len(calls) > 2 else 1.0)

    output = small(velocity, GradientPlan.flow_nrg(), reward)(NOISE, TEXT)
    assert not output.finite and len(calls) == 3 and output.indices == (1, 2)


def test_backward_of_the_returned_loss_says_what_to_do():
    output = small()(NOISE, TEXT)
    message = "the gradients are in .grad. Remove backward.* loss_scale"
    for loss in (output.loss, output.loss / 4, 2 * output.loss.sum()):
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
    weight = torch.ones((), requires_grad=True)
    (output.loss + weight.square()).backward()  # a graph of the caller's own
    assert weight.grad == 2
    assert math.isfinite(output.loss)
    copies = pickle.loads(pickle.dumps(output.loss)), deepcopy(output).loss, output.loss.detach()
    assert all(type(copy) is torch.Tensor and copy == output.loss for copy in copies)


def test_an_output_prints_without_latents():
    text = repr(small()(NOISE, TEXT))
    assert len(text) < 800 and "latents" not in text and "loss=" in text and "rewards=" in text
