"""Sampler: a model, its schedule, guidance and rollout configuration."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from prfl_fast.models.velocity import ModelCall, Velocity, check_transformer
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.kept_steps import check_orders
from prfl_fast.rollout.schedulers import check_deterministic, fresh_copy
from prfl_fast.utils.checks import check, check_count, check_type, make_fields_plain


@dataclass(frozen=True, eq=False)
class Sampler:
    """Hold a generator and its sampling settings.

    Attributes:
        transformer: a supported model (patched or not, with or without LoRA), a
            :class:`prfl_fast.models.velocity.ModelCall` of one, or a function ``(x, timestep [B],
            conditions) -> velocity`` for any other.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler. It is copied, so the
            caller's object never changes.
        num_inference_steps: solver steps of the schedule.
        guidance: classifier-free guidance of every velocity.
        rollout: configuration of the steps without gradient. With None, a ``Trajectory`` calls the
            model's own forward, and searches and reward guidance use ``RolloutConfig()``.

    Raises:
        TypeError: if the model is unsupported, or an attribute has the wrong type.
        ValueError: if ``num_inference_steps`` is not a positive integer; ``rollout`` has an
            interval of guidance without ``guidance``, or a solver order without ``FlowUniPC``; or a
            diffusers scheduler predicts something other than the velocity or draws random numbers.
    """

    transformer: nn.Module | ModelCall | Velocity
    scheduler: Any
    num_inference_steps: int = 40
    guidance: Guidance | None = None
    rollout: RolloutConfig | None = None

    def __post_init__(self) -> None:
        make_fields_plain(self)
        check_transformer(self.transformer)
        check_count("num_inference_steps", self.num_inference_steps)
        check_type("guidance", self.guidance, (Guidance, type(None)))
        check_type("rollout", self.rollout, (RolloutConfig, type(None)))
        if self.rollout is not None and self.guidance is None:
            interval = self.rollout.guidance_interval
            check(interval is None, "guidance_interval", interval, "None without guidance")
        if self.rollout is not None and self.rollout.solver_order is not None:
            check_orders(self.scheduler)
        object.__setattr__(self, "scheduler", fresh_copy(self.scheduler))
        check_deterministic(self.scheduler, self.num_inference_steps)
