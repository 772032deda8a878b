"""Define the methods that suites compare: gradient plan, typical draw and reward of each."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from harness import Preset
from torch import nn

from prfl_fast import PRFL, FlowUniPC, GradientPlan
from prfl_fast.feedback import Point, PRFLOutput
from prfl_fast.rewards.functions import PixelReward, Reward

SOLVER_STEPS = 40
POINTS = 5
ONE, MANY = (19,), (3, 11, 19, 27, 35)  # PRFL's typical draws of 1 and of 5 points
# What a CPU runs in place of a Wan model.
TINY = Preset("tiny", 128, 4, 512, 4, (5, 8, 16), text_tokens=32, text_dim=64)
RewardName = Literal["latent", "frames", "first frame"]


@dataclass(frozen=True)
class Method:
    """Describe one way to get reward gradients.

    Attributes:
        plan: where the gradient is.
        typical: the draw that is measured, in the middle of what the plan draws; None where all
            draws cost the same.
        points: gradient points of a call.
        num_inference_steps: solver steps of the schedule. shift: of its noise levels.
        reward: what it is rewarded by: the latent reward, or decoded frames.
        paired: measured together with a supervised step too, as in the paper's Table 4.
    """

    name: str
    plan: GradientPlan
    typical: tuple[int | Point, ...] | None = None
    points: int = 1
    num_inference_steps: int = SOLVER_STEPS
    shift: float = 5.0
    reward: RewardName = "latent"
    paired: bool = False

    @property
    def trains(self) -> bool:
        """Return True if the gradient goes to the parameters."""
        return self.plan.to == "parameters"


_LAST = SOLVER_STEPS - 1
METHODS = (
    # ReFL draws from the last ten steps, 34.5 on average: the earlier, cheaper one.
    Method("RGB ReFL, all frames", GradientPlan.refl(), (34,), reward="frames", paired=True),
    Method("RGB ReFL, first frame", GradientPlan.refl(), (34,), reward="first frame", paired=True),
    Method("PRFL, 1 point", GradientPlan.prfl(), ONE, paired=True),
    Method(f"PRFL, {POINTS} points", GradientPlan.prfl(POINTS), MANY, POINTS, paired=True),
    Method("DRaFT-1", GradientPlan.draft(1)),
    Method("DRaFT-10", GradientPlan.draft(10)),
    Method("DRaFT-LV", GradientPlan.draft_lv(2), points=3),
    Method("DRaFT, whole chain", GradientPlan.draft(None)),
    Method("AlignProp", GradientPlan.alignprop(), (Point(_LAST, SOLVER_STEPS // 2),)),
    Method(
        "ControlNet++", GradientPlan.controlnet_plus_plus(), num_inference_steps=1000, shift=1.0
    ),
    # A latent frame alone shows no motion, so the video is rewarded as a whole.
    Method("InstructVideo", GradientPlan.instruct_video(segments=None)),
    Method("RG-LCD", GradientPlan.rg_lcd(), num_inference_steps=50),
    Method("ReNO, one-step generator", GradientPlan.reno(), num_inference_steps=1),
    Method("Flow-NRG, a guided sample", GradientPlan.flow_nrg()),
)
Call = Callable[[torch.Tensor, dict[str, torch.Tensor]], PRFLOutput]


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Use one thread on a CPU: at these sizes a second one mostly waits."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rewards(
    latent: Reward, decode: Callable[[torch.Tensor], torch.Tensor], pixels: Any
) -> dict[str, Reward]:
    """Return the rewards by the names that methods use."""
    return {
        "latent": latent,
        "frames": PixelReward(decode, pixels),
        "first frame": PixelReward(decode, pixels, frames="first"),
    }


def call_of(
    method: Method,
    model: nn.Module,
    rewards: Mapping[str, Reward],
    *,
    latents: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    typical: bool = True,
    num_inference_steps: int | None = None,
) -> Call:
    """Return ``(noise, conditions) → PRFLOutput``, which leaves gradients in ``.grad``.

    Args:
        latents: real ones, for methods that start from data.
        typical: take the method's typical draw instead of drawing.
        num_inference_steps: of the schedule instead of 40.
    """
    steps = method.num_inference_steps
    if num_inference_steps is not None and steps == SOLVER_STEPS:
        steps = num_inference_steps
    scheduler = FlowUniPC(shift=method.shift)
    step = PRFL(model, rewards[method.reward], scheduler, method.plan, num_inference_steps=steps)
    data = latents if method.plan.start == "data" else None
    indices = method.typical if typical else None

    def call(noise: torch.Tensor, conditions: dict[str, torch.Tensor]) -> PRFLOutput:
        return step(noise, conditions, latents=data, generator=generator, indices=indices)

    return call
