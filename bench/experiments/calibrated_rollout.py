"""Train in the small world with exact and with calibrated rollouts.

Each arm is PRFL alone from the common generator, with 5 gradient points of 40 UniPC steps: enough
steps between the points that a rollout can save some.
"""

from dataclasses import dataclass
from typing import Any

import torch
from method_specs import SOLVER_STEPS
from torch import nn

from experiments import small_world
from experiments.small_world import Clips, Start, assess
from prfl_fast import PRFL, FlowUniPC, GradientPlan, RolloutConfig
from prfl_fast.data import Batches
from prfl_fast.feedback.calibration import Calibration, Sampled, calibrate
from prfl_fast.training import RewardFeedback

DRIFT = 0.02  # the budget
POINTS = 5


@dataclass(frozen=True)
class Settings(small_world.ArmSettings):
    """Set the sizes of the arms."""

    clips: int = 256
    checkpoints: int = 2
    updates: int = 20
    feedback_batch: int = 8
    feedback_rate: float = 5e-4
    samples: int = 4  # of the calibration


def prepare(s: Settings) -> Start:
    """Return the common start on a CPU."""
    text = Clips.make(s.prompts, 999_000).text
    models = small_world.read_models(torch.device("cpu"))
    return Start(*models, Clips.make(s.clips, 1000), {"encoder_hidden_states": text})


def make_step(model: nn.Module, start: Start, rollout: RolloutConfig | None) -> PRFL:
    return PRFL(
        model,
        start.reward,
        FlowUniPC(),
        GradientPlan.prfl(POINTS),
        num_inference_steps=SOLVER_STEPS,
        weight=1.0,
        rollout=rollout,
    )


def calibrated(start: Start, s: Settings, drift: float = DRIFT) -> Calibration:
    """Return the calibration of the start's generator on its training clips."""
    model, _ = small_world.copy_generator(start, patch=True)
    generator = torch.Generator().manual_seed(0)
    batches = Batches(start.clips.samples(), s.feedback_batch, 0)
    samples = []
    for number in range(s.samples):
        batch = batches[number]
        noise = torch.randn(batch.latents.shape, generator=generator)
        samples.append(Sampled(noise, batch.conditions))
    return calibrate(make_step(model, start, None), samples, drift)


def run_arm(
    start: Start, s: Settings, rollout: RolloutConfig | None, seed: int
) -> list[dict[str, Any]]:
    """Train an arm; return the reward and the motion metric before and after."""
    torch.manual_seed(seed)
    model, device = small_world.copy_generator(start, patch=True)
    step = make_step(model, start, rollout)
    batches = Batches(start.clips.samples(), s.feedback_batch, seed)
    objectives = {"prfl": RewardFeedback(step, batches, device)}
    points: list[dict[str, Any]] = []

    def measure(update: int) -> None:
        found, _ = assess(model, start, s.solver_steps, 1000 + seed)
        points.append({"update": update, **found, "exact": step.engine.fallen_back})

    measure(0)
    small_world.train_arm(model, objectives, s, seed, measure)
    return points
