"""Train generators and reward models: trainer, objectives, losses, LoRA."""

from prfl_fast.training.config import TrainConfig
from prfl_fast.training.lora import add_lora
from prfl_fast.training.losses import ConsistencyConfig, consistency_loss, sft_loss
from prfl_fast.training.objectives import RewardFeedback, RewardFit, SupervisedFlow
from prfl_fast.training.reward_losses import bt_loss, ce_loss, evaluate
from prfl_fast.training.trainer import Trainer

__all__ = [
    "ConsistencyConfig",
    "RewardFeedback",
    "RewardFit",
    "SupervisedFlow",
    "TrainConfig",
    "Trainer",
    "add_lora",
    "bt_loss",
    "ce_loss",
    "consistency_loss",
    "evaluate",
    "sft_loss",
]
