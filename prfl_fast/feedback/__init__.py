"""Reward feedback: gradient points of a trajectory, and the PRFL step that runs them."""

from prfl_fast.feedback.estimator import PRFLOutput
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.points import Point
from prfl_fast.feedback.step import PRFL

__all__ = ["GradientPlan", "PRFL", "PRFLOutput", "Point"]
