"""Training with sparse attention in rollouts: gradient points, memory policies, resumed runs."""

import pytest
import torch
from engine_world import make_wan, wan_inputs
from offload_models import (
    assert_same,
    gradients,
    offload_small_tensors,  # noqa: F401 - a fixture
)
from op_checks import RecordedCalls
from runs import log, samples

from prfl_fast.data.dataset import Batches
from prfl_fast.feedback import PRFL, GradientPlan
from prfl_fast.memory.checkpointing import offload_bytes
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.objectives import RewardFeedback

SPARSE = RolloutConfig(sparse_attention=0.5, compile="off", check_every=3, drift_limit=10.0)
PLANS = {
    "prfl": GradientPlan.prfl(points=2),
    "draft": GradientPlan.draft(2),
    "alignprop": GradientPlan.alignprop(),
}


def make_step(plan="prfl", rollout=SPARSE, memory=None, **config):
    model = make_wan(**config)
    reward = LatentRewardModel.from_backbone(model, num_blocks=1, num_heads=2).freeze()
    if memory is not None:
        apply_memory(model, memory)
    return model, PRFL(
        model, reward, FlowEuler(), PLANS[plan], num_inference_steps=6, rollout=rollout
    )


def run(model, step):
    """Return latents, rewards and gradients of a step whose drift is not checked."""
    step.engine.trajectories = 1
    out = step(*wan_inputs(), generator=torch.Generator().manual_seed(0))
    assert out.finite
    return out.latents, out.rewards, gradients(model)


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_are_the_exact_ones_at_the_latents_of_a_sparse_rollout(plan):
    latents, steps = {}, []

    class Recorded(Trajectory):
        def run(self, stop, *args, **options):
            steps.append(self.steps_to(stop))
            super().run(stop, *args, **options)
            latents[stop] = self.x

    class Replayed(Trajectory):
        def run(self, stop, *args, **options):
            super().run(stop, *args, **options)
            self.x = latents[stop]

    model, step = make_step(plan)
    step.trajectory_type = Recorded
    with RecordedCalls() as recorded:
        found = run(model, step)
    # Those of rollouts alone: gradient steps, and their second runs in the backward, are dense.
    assert len(recorded.of("sparse_attention")) == sum(steps) * len(model.blocks) > 0
    exact_model, exact = make_step(plan, RolloutConfig(compile="off"))
    dense = run(exact_model, exact)
    exact.trajectory_type = Replayed
    assert_same(run(exact_model, exact), found)
    assert not torch.equal(found[0], dense[0])


POLICIES = {
    "attention": MemoryConfig("fp32", "attention", "cpu"),
    "full": MemoryConfig("fp32", "full", "cpu"),
    "streamed": MemoryConfig("fp32", "full", "cpu", stream_weights=1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_offload_and_streamed_weights_change_no_bit(name):
    wanted = run(*make_step(layers=3))
    model, step = make_step(memory=POLICIES[name], layers=3)
    with RecordedCalls() as recorded:
        found = run(model, step)
    assert recorded.of("sparse_attention") and offload_bytes(model)["transferred"] > 0
    assert_same(found, wanted)


def trainer_of(folder, steps):
    model, step = make_step(layers=1, text_tokens=512)
    config = TrainConfig(steps=steps, learning_rate=1e-2, gradient_accumulation_steps=1)
    objective = RewardFeedback(step, Batches(samples(4)))
    return Trainer(model, {"prfl": objective}, config, folder=folder), step.engine


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, engine = trainer_of(tmp_path / "whole", 5)
    whole.run()
    checked = [record["step"] for record in log(tmp_path / "whole") if "prfl/drift" in record]
    assert checked == [1, 4]
    trainer_of(tmp_path / "parts", 2)[0].run()
    again, resumed = trainer_of(tmp_path / "parts", 5)
    again.run()
    assert log(tmp_path / "parts") == log(tmp_path / "whole")
    assert_same(dict(again.model.named_parameters()), dict(whole.model.named_parameters()))
    assert resumed.state_dict() == engine.state_dict() and resumed.drift == engine.drift
