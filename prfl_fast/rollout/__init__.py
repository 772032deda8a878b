"""Steps of the sampler without gradient: schedulers, guidance, engine, trajectory."""

from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC, WithShift
from prfl_fast.rollout.trajectory import Trajectory, rollout

__all__ = [
    "FlowEuler",
    "FlowUniPC",
    "Guidance",
    "RolloutConfig",
    "RolloutEngine",
    "Sampler",
    "Trajectory",
    "WithShift",
    "rollout",
]
