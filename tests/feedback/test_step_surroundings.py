"""A step does not depend on its surroundings: default dtype and device, inference mode, numpy."""

import contextlib
import copy

import numpy as np
import pytest
import torch
import wan
from prfl_world import mean, seeded
from torch.overrides import TorchFunctionMode

import prfl_fast
from prfl_fast.data import Batch, epoch_order
from prfl_fast.data.manifest import Sample, write_dataset
from prfl_fast.feedback.points import Point
from prfl_fast.rewards.pooling import QueryAttentionPool, RewardHead
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC, training_sigmas
from prfl_fast.rollout.trajectory import rollout
from prfl_fast.training.losses import sft_loss
from prfl_fast.training.objectives import RewardFeedback, SupervisedFlow
from prfl_fast.training.reward_losses import ce_loss, evaluate


def prfl(model, reward=mean, scheduler=None, **options):
    options = {"num_inference_steps": 4} | options
    return prfl_fast.PRFL(model, reward, scheduler or FlowUniPC(), **options)


def gradients(model):
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


class One:
    """Return the same batch for each number."""

    def __init__(self, x, conditions):
        self.batch = Batch(x, conditions, [{"motion_quality": 1}, {"motion_quality": 0}])

    def __getitem__(self, number):
        return self.batch


class CudaDefault(TorchFunctionMode):
    """Simulate ``torch.set_default_device("cuda")`` for draws from a CPU generator."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        draws = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal}
        named = kwargs.get("device") is not None or kwargs.get("generator") is None
        assert function not in draws or named, f"{function.__name__} names no device"
        return function(*args, **kwargs)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def everything(model, reward, x, conditions):
    """Return numbers of every draw of a training."""
    labels = torch.tensor([1.0, 0.0], dtype=torch.float32, device="cpu")
    batches = One(x, conditions)
    numbers = [prfl(model, reward)(x, conditions, generator=seeded()).latents]
    RewardFeedback(prfl(model), batches)(0, seeded(), 1.0)
    SupervisedFlow(model, batches)(0, seeded(), 1.0)
    numbers += [*gradients(model), sft_loss(model, x, conditions, generator=seeded())]
    numbers.append(ce_loss(reward, x, conditions, labels, generator=seeded()))
    rows = evaluate(reward, [(x, conditions, labels)]).values()
    numbers.append(torch.tensor([row["loss"] for row in rows], dtype=torch.float64, device="cpu"))
    torch.manual_seed(0)
    with torch.device("cpu"):  # modules follow the default device
        for part in (QueryAttentionPool(16), RewardHead(16)):
            numbers += [p.detach() for p in part.parameters()]
    assert epoch_order(9, 1, 2) == [6, 2, 7, 4, 0, 3, 8, 1, 5]
    return [*numbers, training_sigmas()]


@pytest.mark.cases(1)
@pytest.mark.parametrize(
    "surroundings",
    [
        lambda: default_dtype(torch.bfloat16),
        lambda: default_dtype(torch.float64),
        CudaDefault,
        lambda: torch.device("meta"),
    ],
    ids=["bfloat16", "float64", "cuda", "meta"],
)
def test_default_dtype_and_device_change_nothing(surroundings):
    model = prfl_fast.patch(wan.tiny_wan())
    reward = prfl_fast.LatentRewardModel.from_backbone(model, 1, num_heads=2).freeze()
    x, _, conditions = wan.inputs()
    expected = everything(model, reward, x, conditions)
    with surroundings():
        found = everything(model, reward, x, conditions)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.cases(1)
@pytest.mark.parametrize("patched", [True, False])
def test_inputs_of_inference_mode(patched):
    model = wan.tiny_wan()
    model = prfl_fast.patch(model) if patched else model
    x, _, conditions = wan.inputs()
    with torch.inference_mode():
        made = wan.inputs()
    reward = prfl_fast.LatentRewardModel.from_backbone(model, 1, num_heads=2)
    labels = torch.tensor([1.0, 0.0])

    def run(x, conditions, labels):
        step = prfl(model, copy.deepcopy(reward).freeze())
        step(x, conditions, indices=[2])
        sft_loss(model, x, conditions, noise=x.flip(0), sigma=0.5).backward()
        plan = prfl_fast.GradientPlan.rg_lcd()
        prfl(model, plan=plan)(x, conditions, latents=x, indices=[1])
        ce_loss(reward, x, conditions, labels, sigma=0.5, noise=x).backward()
        return gradients(model) + gradients(reward)

    with torch.inference_mode():
        made_labels = labels.clone()
    found, expected = run(made[0], made[2], made_labels), run(x, conditions, labels)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_a_step_called_in_inference_mode_and_weights_made_there():
    model, (x, _, conditions) = prfl_fast.patch(wan.tiny_wan()), wan.inputs()
    prfl(model)(x, conditions, indices=[2])
    expected = gradients(model)
    with torch.inference_mode():
        prfl(model)(x, conditions, indices=[2])
        made = wan.tiny_wan()
    assert all(map(torch.equal, gradients(model), expected))
    with pytest.raises(ValueError, match="transformer's .* is 'an inference tensor'"):
        prfl(made)(x, conditions, indices=[2])


def test_numpy_numbers_are_numbers(tmp_path):
    model = prfl_fast.patch(wan.tiny_wan())
    x, _, conditions = wan.inputs()
    one, half = np.int64(1), np.float32(0.5)
    plan = prfl_fast.GradientPlan
    assert plan.prfl(np.int64(2)) == plan.prfl(2)
    assert plan.prfl().steps(np.uint8(4)) == range(3)
    assert plan.refl(half) == plan.refl(0.5)
    assert plan.alignprop(one, np.int32(2)) == plan.alignprop(1, 2)
    assert plan.instruct_video(half, one).begin(40) == plan.instruct_video(0.5, 1).begin(40)
    assert plan.flow_nrg((one, np.float32(1))) == plan.flow_nrg((1, 1.0))
    options = {"weight": half, "target": np.float64(2), "num_inference_steps": np.int64(4)}
    out = prfl(model, **options)(x, conditions, indices=[np.int64(2)], loss_scale=half)
    found = gradients(model)
    options = {"weight": 0.5, "target": 2.0}
    expected = prfl(model, **options)(x, conditions, indices=[2], loss_scale=0.5)
    assert torch.equal(out.latents, expected.latents)
    assert all(map(torch.equal, found, gradients(model)))
    prfl(model)(x, conditions, indices=[Point(np.int64(1), one, np.float32(1))])
    assert torch.equal(
        rollout(model, x, conditions, FlowEuler(np.float32(3)), np.int64(3), stop=np.int64(2)),
        rollout(model, x, conditions, FlowEuler(3), 3, stop=2),
    )
    prfl(model)(x, conditions, indices=np.array([1]))
    record = {"motion_quality": np.float32(1), "text_alignment": np.True_, "fps": np.int64(16)}
    sample = Sample(x[0], {"encoder_hidden_states": x[0, 0, 0]}, record)
    assert write_dataset(tmp_path / "data", [sample])[0].labels == record
    labels = torch.tensor([1.0, 0.0])
    made = prfl_fast.LatentRewardModel.from_backbone(model, one, num_heads=np.int64(2))
    made.save(tmp_path / "reward")
    assert [*evaluate(made, [(x, conditions, labels)], np.array([200]), seed=one)] == [200]
    assert epoch_order(9, one, np.int64(2)) == epoch_order(9, 1, 2)
    for flag in (np.True_, True):
        with pytest.raises(ValueError, match="num_inference_steps is"):
            prfl(model, num_inference_steps=flag)


def test_stochastic_schedulers_are_refused():
    import diffusers

    euler = diffusers.FlowMatchEulerDiscreteScheduler
    sde = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True
    )

    class Noisy(FlowEuler):
        def step(self, velocity, *args, **kwargs):
            return super().step(velocity + torch.randn(()), *args, **kwargs)

    state = torch.get_rng_state()
    for scheduler in (euler(stochastic_sampling=True), sde, Noisy()):
        with pytest.raises(ValueError, match="random numbers in its steps', expected a determ"):
            prfl(lambda x, timestep, conditions: x, scheduler=scheduler)
    prfl(lambda x, timestep, conditions: x, scheduler=euler())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("patched", [True, False])
def test_lora_on_the_patch_embedding(patched):
    peft = pytest.importorskip("peft")
    model = wan.tiny_wan().requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["patch_embedding", "to_q"]))
    model = prfl_fast.patch(model) if patched else model
    x, _, conditions = wan.inputs()
    prfl(model)(x, conditions, indices=[1])
    assert any("patch_embedding" in n and p.grad is not None for n, p in model.named_parameters())
