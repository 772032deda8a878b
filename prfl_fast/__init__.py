"""Fused kernels and a training engine for latent-space reward feedback learning (PRFL).

    prfl_fast.patch(transformer)
    reward = prfl_fast.LatentRewardModel.from_backbone(transformer, num_blocks=8).freeze()
    plan = prfl_fast.GradientPlan.prfl(points=5)
    step = prfl_fast.PRFL(transformer, reward, prfl_fast.FlowUniPC(), plan)
    loss = step(noise, conditions).loss  # gradients are in .grad

To fit a GPU, before adapters and the optimizer:

    found = prfl_fast.plan(transformer, budget="48GiB")
    prfl_fast.apply_memory(transformer, reward, found.memory)
"""

from prfl_fast import kernels, modules, sampling
from prfl_fast._version import __version__
from prfl_fast.checkpointing import checkpoint
from prfl_fast.config import Memory
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.kernels import set_backend
from prfl_fast.losses import sft_loss
from prfl_fast.memory import apply_memory
from prfl_fast.model_call import Guidance
from prfl_fast.patching import patch, unpatch
from prfl_fast.planner import plan
from prfl_fast.quantised import quantise
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rewards import PixelReward, RewardEnsemble
from prfl_fast.rollout_engine import RolloutPrecision, RolloutSettings
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.step import PRFL, PRFLOutput
from prfl_fast.trainer import Trainer, TrainSettings
from prfl_fast.trajectory import rollout

__all__ = [
    "PRFL",
    "FlowEuler",
    "FlowUniPC",
    "GradientPlan",
    "Guidance",
    "LatentRewardModel",
    "Memory",
    "PRFLOutput",
    "PixelReward",
    "RewardEnsemble",
    "RolloutPrecision",
    "RolloutSettings",
    "TrainSettings",
    "Trainer",
    "__version__",
    "apply_memory",
    "checkpoint",
    "kernels",
    "modules",
    "patch",
    "plan",
    "quantise",
    "rollout",
    "sampling",
    "set_backend",
    "sft_loss",
    "unpatch",
]
