"""PRFL and the supervised loss refuse wrong arguments."""

import math

import pytest
import torch
from prfl_world import CONDITIONS, SHAPE, Affine, TinyReward, make_noise, make_wan
from torch import nn

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.feedback.step import PRFL
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.training.losses import sft_loss


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
        (make_noise(), {"encoder_hidden_states": torch.zeros(3, 3, 12)}, "batch of noise, 2"),
        (make_noise(), {"encoder_hidden_states": "a dog"}, "expected a tensor"),
        (make_noise(), {**CONDITIONS, "prompt": torch.zeros(2)}, "prompt"),
        (make_noise(shape=(2, 15, 2, 4, 4)), CONDITIONS, "channels are 15 of x, expected 16"),
        (make_noise(shape=(2, 16, 2, 5, 4)), CONDITIONS, "H of x is 5"),
    ],
)
def test_bad_inputs_of_a_step_are_refused_before_any_work(noise, conditions, message):
    model = make_wan()
    with pytest.raises(ValueError, match=message):
        PRFL(model, TinyReward(), FlowUniPC(), num_inference_steps=3)(noise, conditions)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("indices", [(), (3, 1), (1, 1), (-1,), (4,), (1.0,), (True,)])
def test_bad_indices_are_refused(indices):
    step = PRFL(
        Affine().velocity, lambda x, t, c: x.mean((1, 2, 3, 4)), FlowUniPC(), num_inference_steps=5
    )
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
    with pytest.raises(ValueError, match="num_inference_steps is 1"):
        PRFL(velocity, reward, FlowUniPC(), num_inference_steps=1)
    with pytest.raises(ValueError, match="points is 5"):
        PRFL(velocity, reward, FlowUniPC(), GradientPlan.prfl(5), num_inference_steps=5)
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
        PRFL(Affine().velocity, reward, FlowUniPC(), num_inference_steps=3)(
            make_noise(), {"encoder_hidden_states": make_noise()}
        )


def test_bad_velocities_are_refused():
    reward = lambda x, t, c: x.mean((1, 2, 3, 4))  # noqa: E731
    with pytest.raises(ValueError, match="needs no gradient"):
        PRFL(lambda x, t, c: x, reward, FlowUniPC(), num_inference_steps=3)(make_noise(), {})
    with pytest.raises(ValueError, match="the transformer's result is"):
        PRFL(lambda x, t, c: x[:, :1], reward, FlowUniPC(), num_inference_steps=3)(make_noise(), {})


@pytest.mark.parametrize("scheduler", [FlowEuler, FlowUniPC])
def test_guidance_at_pure_noise_is_refused(scheduler):
    """Where sigma is 1 the factor sigma / (1 - sigma) has no bound."""
    plan = GradientPlan.flow_nrg(window=(0, None))
    step = PRFL(Affine().velocity, TinyReward(), scheduler(), plan, num_inference_steps=4)
    with pytest.raises(ValueError, match="later than step 0, where sigma is"):
        step(make_noise(), CONDITIONS)
    later = PRFL(
        Affine().velocity, TinyReward(), scheduler(), GradientPlan.flow_nrg(), num_inference_steps=4
    )
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
    step = PRFL(model, TinyReward(), FlowEuler(), plan, num_inference_steps=3)
    with pytest.raises(ValueError, match="dropout p=0.5 in train mode"):
        step(make_noise(), CONDITIONS)
    assert step.sampler.transformer.eval() is model and step(make_noise(), CONDITIONS).finite


@pytest.mark.parametrize(
    "plan", [GradientPlan.prfl(), GradientPlan.draft(2)], ids=["prfl", "draft"]
)
def test_a_frozen_transformer_is_refused(plan):
    model = make_wan().requires_grad_(False)
    step = PRFL(model, TinyReward(), FlowEuler(), plan, num_inference_steps=3)
    with pytest.raises(ValueError, match="no parameter requires one"):
        step(make_noise(), CONDITIONS)
    frozen = PRFL(
        lambda x, t, c: x.detach() * 0.5, TinyReward(), FlowEuler(), plan, num_inference_steps=3
    )
    with pytest.raises(ValueError, match="no parameter requires one"):
        frozen(make_noise(), CONDITIONS)


def test_a_chain_through_ddp_is_refused():
    class DistributedDataParallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    wrapped = DistributedDataParallel(make_wan())
    step = PRFL(wrapped, TinyReward(), FlowEuler(), GradientPlan.draft(2), num_inference_steps=3)
    with pytest.raises(ValueError, match="is of DistributedDataParallel"):
        step(make_noise(), CONDITIONS)


def test_a_divergence_needs_nothing_but_adapters_to_train():
    def make(model, plan=None):
        return PRFL(model, TinyReward(), FlowEuler(), plan, num_inference_steps=3, divergence=0.1)

    with pytest.raises(ValueError, match="there are none: add LoRA"):
        make(make_wan())
    with pytest.raises(ValueError, match="expected 0 for a function"):
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
        (GradientPlan.flow_nrg(), [1], "Its window names the guided steps"),
    ],
)
def test_wrong_points_are_refused(plan, indices, message):
    step = PRFL(Affine().velocity, TinyReward(), FlowEuler(), plan, num_inference_steps=4)
    with pytest.raises(ValueError, match=message):
        step(make_noise(), CONDITIONS, indices=indices)


def test_wrong_data_and_arguments_are_refused():
    velocity, reward = Affine().velocity, TinyReward()
    data = PRFL(velocity, reward, FlowEuler(), GradientPlan.rg_lcd(), num_inference_steps=4)
    with pytest.raises(ValueError, match="latents is None, expected real latents"):
        data(make_noise(), CONDITIONS)
    with pytest.raises(ValueError, match="expected real latents of the shape"):
        data(make_noise(), CONDITIONS, latents=make_noise()[:1])
    bad = make_noise()
    bad[0, 0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="latents has 1 NaN"):
        data(make_noise(), CONDITIONS, latents=bad)
    plain = PRFL(velocity, reward, FlowEuler(), num_inference_steps=4)
    with pytest.raises(ValueError, match="latents is .*expected None"):
        plain(make_noise(), CONDITIONS, latents=make_noise())
    with pytest.raises(ValueError, match="noise is None"):
        plain(None, CONDITIONS)
    with pytest.raises(ValueError, match="loss_scale is nan"):
        plain(make_noise(), CONDITIONS, loss_scale=math.nan)
    frames = PRFL(
        velocity,
        reward,
        FlowEuler(),
        GradientPlan.instruct_video(segments=4),
        num_inference_steps=4,
    )
    with pytest.raises(ValueError, match="the number of latent frames is 2, expected at least"):
        frames(make_noise(), CONDITIONS, latents=make_noise())
    for wrong in ({"plan": "prfl"}, {"guidance": 3.0}, {"rollout": True}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} is .*, expected "):
            PRFL(velocity, reward, FlowEuler(), **wrong)
    with pytest.raises(ValueError, match="reward_weights is .*expected names"):
        PRFL(velocity, {"a": reward}, FlowEuler(), reward_weights={"b": 1.0})


def test_a_guided_trajectory_ends_where_a_reward_is_not_finite():
    calls = []

    def velocity(x, timestep, conditions):
        calls.append(float(timestep[0]))
        return x * 0.1

    def reward(x, timestep, conditions):
        return x.mean((1, 2, 3, 4)) * (math.nan if len(calls) > 2 else 1.0)

    step = PRFL(velocity, reward, FlowEuler(), GradientPlan.flow_nrg(), num_inference_steps=6)
    output = step(make_noise(), CONDITIONS)
    assert not output.finite and len(calls) == 3 and output.indices == (1, 2)
