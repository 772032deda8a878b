"""Run the steps of PRFL itself in a simulation, with the models at a few solver steps only."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from prfl_fast.feedback.estimator import GradientEstimator, GradientSteps
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.ledger import Ledger
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.velocity import ModelCall
from prfl_fast.planning.costs import CostLedger
from prfl_fast.planning.trace import TraceLedger
from prfl_fast.planning.workload import Workload
from prfl_fast.rewards.functions import Reward, RewardEnsemble
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import Trajectory

# Phases of earlier steps: each runs without a graph, and again with one in the backward.
EARLIER_PHASES = ("earlier forward", "recompute", "earlier backward")


def latest_points(plan: GradientPlan, num_inference_steps: int) -> tuple[Point, ...]:
    """Return the latest gradient points that a plan may draw, the last one at its largest depth."""
    steps = plan.steps(num_inference_steps)
    last, count = steps[-1], min(plan.points, len(steps))
    if count == 1:
        return (Point(last, plan.depths(last, num_inference_steps)[-1]),)
    # Before the last point there is a rollout step, if there is room for one.
    others = steps[-count - 1 : -2] if len(steps) > count else steps[-count:-1]
    return tuple(Point(step, weight=1 / count) for step in (*others, last))


class StepPhases:
    """Start the phases of a PRFL step, and decide which of its calls run a model.

    Models run where most memory is in use: in the last evaluation of the reward, in the last two
    solver steps that carry its gradient, and in the rollout step before them. All other calls
    return zeros, but the trajectory keeps its latents and the solver's history.
    """

    def __init__(
        self,
        ledger: Ledger,
        plan: GradientPlan,
        points: tuple[Point, ...],
        caches: Callable[[], torch.Tensor],
    ) -> None:
        self.ledger, self.renoised, self.caches = ledger, plan.renoised, caches
        self.point: Point | None = None  # of the last evaluation, once it begins
        with_gradient = {point.step for point in points}
        before = points[-1].first - 1
        self.steps = {points[0].first - 1 if before in with_gradient else before}
        self._count(False)

    def begin(self, point: Point) -> None:
        """Run the models from here on: this is the last evaluation."""
        self.point, self.steps = point, {point.step, max(point.first, point.step - 1)}

    def _count(self, counts: bool) -> None:
        if isinstance(self.ledger, CostLedger):
            self.ledger.counts = counts

    @contextlib.contextmanager
    def evaluation(self, index: int) -> Iterator[bool]:
        """Enter the phase of an evaluation of the velocity; yield True if it runs the model."""
        again, point = "backward" in self.ledger.phase, self.point
        phase = "recompute" if again else self.ledger.phase
        if not again and point is not None:
            phase = "forward" if index == point.step else "earlier forward"
        if phase != self.ledger.phase:
            self.ledger.start_phase(phase)
        runs = index in self.steps
        self._count(runs)
        # A rollout's caches: hooks on blocks, which record where allocations belong, forbid them.
        held = self.caches() if runs and phase == "rollout" else None
        with self.ledger.saving():
            yield runs
        del held
        if phase == "rollout" and isinstance(self.ledger, TraceLedger):
            self.ledger.leave_blocks()  # weights that were kept for the rollout are freed next
        if again:
            self.ledger.start_phase("earlier backward")

    def rewards(self, members: Sequence[Reward]) -> Reward:
        """Return a reward, or an ensemble, whose calls are phases of their own."""
        parts = [self._reward(member) for member in members]
        return parts[0] if len(parts) == 1 else RewardEnsemble(parts)

    def _reward(self, reward: Reward) -> Reward:
        def score(x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions) -> torch.Tensor:
            if self.point is None:
                return x.flatten(1).mean(1)
            self.ledger.start_phase("reward")
            with self.ledger.saving():
                found = reward(x, timestep, conditions)
            found.register_hook(lambda grad: self.ledger.start_phase("reward backward"))
            return found

        return score

    def end(self) -> None:
        """Count all work again."""
        self._count(True)


class SimulatedTrajectory(Trajectory):
    """Run the model at the steps of a :class:`StepPhases` only."""

    def __init__(self, *args: Any, phases: StepPhases, **options: Any) -> None:
        super().__init__(*args, **options)
        self.phases = phases

    def velocity(self, x: torch.Tensor | None = None, index: int | None = None) -> torch.Tensor:
        """Return the model's velocity, or zeros."""
        x = self.x if x is None else x
        index = self.index if index is None else index
        with self.phases.evaluation(index) as runs:
            if runs:
                return super().velocity(x, index)
            if x.requires_grad and torch.is_grad_enabled():
                return 0 * x
            return torch.zeros_like(x, requires_grad=torch.is_grad_enabled())


class SimulatedEstimator(GradientEstimator):
    """Tell a :class:`StepPhases` when the last evaluation and its backward begin."""

    def __init__(self, *args: Any, phases: StepPhases) -> None:
        super().__init__(*args)
        self.phases = phases

    def take(self, point: Point, weight: float, *, last: bool) -> GradientSteps:
        """Take a point's steps with gradient."""
        if last and not self.phases.renoised:
            self.phases.begin(point)
        with self.phases.ledger.saving():
            return super().take(point, weight, last=last)

    def take_again(self, point: Point, weight: float) -> GradientSteps:
        """Repeat the last step from the result noised again."""
        self.phases.renoised -= 1
        if not self.phases.renoised:
            self.phases.begin(point)
        with self.phases.ledger.saving():
            return super().take_again(point, weight)

    def backward(self, steps: GradientSteps, gradient: torch.Tensor | None, *last: Any) -> None:
        """Run backward through the steps."""
        if self.phases.point is not None:
            self.phases.ledger.start_phase("backward")
        super().backward(steps, gradient, *last)


def run_feedback(
    workload: Workload,
    generator: ModelCall,
    rewards: Sequence[Sequence[Reward]],
    ledger: Ledger,
    caches: Callable[[], torch.Tensor],
    noise: torch.Tensor,
    conditions: Conditions,
    latents: torch.Tensor | None,
    guidance: Guidance | None,
) -> None:
    """Run one trajectory of a workload, from ``noise`` or corrupted ``latents``.

    Several members of a reward are an ensemble. ``caches`` allocates those of a rollout.
    """
    plan, steps = workload.gradient_plan, workload.num_inference_steps
    points = latest_points(plan, steps)
    phases = StepPhases(ledger, plan, points, caches)
    with _disable_current_modes():  # numbers of the host: real, and in no ledger
        step = PRFL(
            generator,
            {f"reward {n}": phases.rewards(members) for n, members in enumerate(rewards)},
            FlowUniPC(workload.shift),
            plan,
            num_inference_steps=steps,
            guidance=guidance,
            divergence=float(workload.divergence),
            rollout=RolloutConfig(cache=False),
        )
    step.trajectory_type = partial(SimulatedTrajectory, phases=phases)
    step.estimator_type = partial(SimulatedEstimator, phases=phases)
    step(noise, conditions, latents=latents, indices=points)
    phases.end()
