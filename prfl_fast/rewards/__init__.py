"""Reward models and functions of latents."""

from prfl_fast.rewards.functions import PixelReward, RewardEnsemble
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rewards.pooling import QueryAttentionPool, RewardHead

__all__ = ["LatentRewardModel", "PixelReward", "QueryAttentionPool", "RewardEnsemble", "RewardHead"]
