"""Gradient points of a trajectory, and the bounds of the window from which they are drawn."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from prfl_fast.utils.checks import is_count, is_number, plain

Bound = int | float | None  # a step, or a fraction of a schedule


class Point(NamedTuple):
    """Describe one gradient point of a trajectory.

    Attributes:
        step: the last solver step with gradient, m. The reward reads x_{m+1}, or the estimate of x0
            made at step m.
        depth: steps the gradient flows through, m-depth+1 … m.
        weight: factor of its loss; the weights of a draw add up to 1.
    """

    step: int
    depth: int = 1
    weight: float = 1.0

    @property
    def first(self) -> int:
        """Return the first step with gradient."""
        return self.step - self.depth + 1


def as_points(
    indices: Sequence[int | Point], depth: int | None, begin: int
) -> tuple[Point, ...] | None:
    """Return points for step numbers, with equal weights; None if an item is not a valid point.

    A step number gets ``depth``; None reaches back to ``begin``.
    """
    points = []
    for item in indices:
        if not isinstance(item, Point):
            if not is_count(item, 0):
                return None
            reach = item + 1 - begin if depth is None else depth
            item = Point(item, reach, 1 / len(indices))
        item = Point(*map(plain, item))
        if not (is_count(item.step, 0) and is_count(item.depth) and is_number(item.weight)):
            return None
        points.append(item)
    return tuple(points)


def in_order(points: Sequence[Point], begin: int, end: int) -> bool:
    """Return True if points lie in ``begin`` … ``end - 1`` in order and do not overlap."""
    firsts = [point.first for point in points]
    before = [begin - 1, *(point.step for point in points)]
    return before[-1] < end and all(a > b for a, b in zip(firsts, before, strict=False))


def is_bound(bound: object) -> bool:
    """Return True for an integer, a fraction in [0, 1], or None."""
    bound = plain(bound)
    if isinstance(bound, float):
        return 0 <= bound <= 1
    return bound is None or isinstance(bound, int) and not isinstance(bound, bool)


def resolve(bound: Bound, num_inference_steps: int, default: int) -> int:
    """Convert a bound to a step of the schedule; None becomes ``default``."""
    if bound is None:
        return default
    if isinstance(bound, float):
        # 1 - 0.2 is a little more than 0.8, and 0.8·1000 must not become 801 or 799.
        return math.floor(round(bound * num_inference_steps, 6))
    return max(0, min(num_inference_steps, bound + num_inference_steps if bound < 0 else bound))
