"""Train generators and reward models: trainer, objectives, losses, LoRA."""

from prfl_fast.training.config import TrainConfig
from prfl_fast.training.evaluation import (
    GeneratorEvaluator,
    PeriodicEvaluation,
    RewardEvaluator,
)
from prfl_fast.training.lora import add_lora, merge_lora
from prfl_fast.training.losses import ConsistencyConfig, consistency_loss, sft_loss
from prfl_fast.training.objectives import (
    FlowDPO,
    FlowRWR,
    RewardFeedback,
    RewardFit,
    SupervisedFlow,
)
from prfl_fast.training.preferences import dpo_loss, rwr_loss
from prfl_fast.training.reward_losses import bt_loss, ce_loss, evaluate
from prfl_fast.training.trainer import Trainer

__all__ = [
    "ConsistencyConfig",
    "FlowDPO",
    "FlowRWR",
    "GeneratorEvaluator",
    "PeriodicEvaluation",
    "RewardEvaluator",
    "RewardFeedback",
    "RewardFit",
    "SupervisedFlow",
    "TrainConfig",
    "Trainer",
    "add_lora",
    "bt_loss",
    "ce_loss",
    "consistency_loss",
    "dpo_loss",
    "evaluate",
    "merge_lora",
    "rwr_loss",
    "sft_loss",
]
