"""Fused kernels and a training engine for latent-space reward feedback learning (PRFL).

    prfl_fast.patch(transformer)
    reward = prfl_fast.LatentRewardModel.from_backbone(transformer, num_blocks=8).freeze()
    plan = prfl_fast.GradientPlan.prfl(points=5)
    step = prfl_fast.PRFL(transformer, reward, prfl_fast.FlowUniPC(), plan)
    loss = step(noise, conditions).loss  # gradients are in .grad
"""

from prfl_fast import kernels, modules
from prfl_fast._version import __version__
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.kernels import set_backend
from prfl_fast.patching import patch, unpatch
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rgb_refl import RGBReFL
from prfl_fast.schedulers import FlowEuler, FlowUniPC
from prfl_fast.step import PRFL, PRFLOutput, rollout, sft_loss
from prfl_fast.trainer import Trainer, TrainSettings

__all__ = [
    "PRFL",
    "FlowEuler",
    "FlowUniPC",
    "GradientPlan",
    "LatentRewardModel",
    "PRFLOutput",
    "RGBReFL",
    "TrainSettings",
    "Trainer",
    "__version__",
    "kernels",
    "modules",
    "patch",
    "rollout",
    "set_backend",
    "sft_loss",
    "unpatch",
]
