"""Steps that a rollout keeps of its schedule, and the solver's order at each."""

from collections.abc import Sequence
from typing import Any

from prfl_fast.rollout.schedulers import FlowEuler, FlowUniPC
from prfl_fast.utils.checks import check


def check_orders(scheduler: Any) -> None:
    """Raise ``ValueError`` unless a rollout may choose the order of each step of a scheduler."""
    kind = type(scheduler).__name__
    check(isinstance(scheduler, FlowUniPC), "scheduler", kind, "FlowUniPC with solver_order")


def keep_levels(
    scheduler: Any, indices: Sequence[int], orders: Sequence[int | None] | None = None
) -> None:
    """Keep only the steps ``indices``, and set the orders of all steps of the schedule.

    An order of None is the scheduler's own; with ``orders`` None all are. Raise ``ValueError`` for
    a foreign scheduler, or for orders of another one than ``FlowUniPC``.
    """
    if orders is not None:
        check_orders(scheduler)
        scheduler.restrict(indices, [orders[i] or scheduler.order for i in indices])
        return
    if not isinstance(scheduler, (FlowEuler, FlowUniPC)):
        raise ValueError(
            f"scheduler is {type(scheduler).__name__}, expected FlowUniPC or FlowEuler for a "
            "rollout with stride above 1: only they can skip levels of their schedule"
        )
    scheduler.restrict(indices)


def strided_steps(
    start: int, num_inference_steps: int, strides: Sequence[int], visit: Sequence[int]
) -> list[int]:
    """Return the steps of a rollout whose step ``i`` covers ``strides[i]`` of the schedule.

    Both ends and the steps ``visit`` are included.
    """
    # A step with gradient covers one level, so the step after it is included, and the stride
    # restarts there.
    landings = sorted({start, num_inference_steps, *visit, *(step + 1 for step in visit)})
    spans = zip(landings, landings[1:], strict=False)
    steps = []
    for here, there in spans:
        while start <= here < there:
            steps.append(here)
            here += strides[here]
    return [*steps, num_inference_steps]
