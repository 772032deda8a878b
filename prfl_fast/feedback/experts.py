"""Gradient points of a generator with two experts, drawn among the steps of trained experts."""

from collections.abc import Sequence
from dataclasses import replace

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.models.experts import Experts
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import start_trajectory
from prfl_fast.utils.checks import check


def expert_steps(sampler: Sampler, experts: Experts) -> list[str]:
    """Return the name of the expert that runs each step of a sampler."""
    _, timesteps = start_trajectory(sampler.scheduler, sampler.num_inference_steps, 0)
    return [experts.name_at(float(timestep)) for timestep in timesteps]


def trained_plan(plan: GradientPlan, names: Sequence[str], trained: Sequence[str]) -> GradientPlan:
    """Return the plan with points drawn among the steps of the trained experts.

    ``names`` holds the expert of each step. The gradient of a point goes to the parameters of one
    expert, because only one is on the device.

    Raises:
        ValueError: if the window has no step of a trained expert, or a point may have steps of both
            experts.
    """
    if plan.to != "parameters":
        return plan
    steps = plan.steps(len(names))
    own = [step for step in steps if names[step] in trained]
    for name in trained:
        ok = any(names[step] == name for step in own)
        expected = f"one with a step of the expert {name}, which trains"
        hint = "Freeze that expert, or change the window, the shift or the number of steps"
        check(ok, "window", plan.window, expected, hint=hint)
    plan = plan if len(own) == len(steps) else replace(plan, window=(own[0], own[-1] + 1))
    plan.steps(len(names))  # raises if there are too few for the points
    for step in own:
        _check_one(names, Point(step, plan.depths(step, len(names))[-1]))
    return plan


def check_points(points: Sequence[Point], names: Sequence[str], trained: Sequence[str]) -> None:
    """Raise ``ValueError`` unless all steps of each point are of one trained expert."""
    for point in points:
        expected = f"steps of an expert that trains: {', '.join(trained)}"
        check(names[point.step] in trained, "indices", point.step, expected)
        _check_one(names, point)


def _check_one(names: Sequence[str], point: Point) -> None:
    if names[point.first] != names[point.step]:
        most = point.step + 1 - names.index("low")
        expected = f"at most {most} at step {point.step}, so that one expert runs all its steps"
        hint = "A point's gradient goes to one expert, because only one is on the device"
        check(False, "depth", point.depth, expected, hint=hint)
