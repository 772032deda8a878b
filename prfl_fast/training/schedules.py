"""Learning-rate schedules: those of diffusers by name, after a linear warmup."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from prfl_fast.utils.checks import check
from prfl_fast.utils.optional import need

ScheduleName = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"]
SCHEDULES = get_args(ScheduleName)


def schedule_factor(
    name: ScheduleName, steps: int, warmup_steps: int, learning_rate: float
) -> Callable[[int], float]:
    """Return a function of the step, 1 to ``steps``, whose result multiplies ``learning_rate``.

    It is ``step / warmup_steps`` in the warmup; diffusers starts at 0, which wastes a step. Later
    steps have the factor of ``diffusers.optimization.get_scheduler`` with its defaults.

    Raises:
        ValueError: if ``learning_rate`` is not above 1e-7, the end of ``polynomial``.
        MissingExtraError: if diffusers is not installed; ``constant`` does not need it.
    """
    later: Callable[[int], float] = lambda index: 1.0  # noqa: E731
    ok, expected = name != "polynomial" or learning_rate > 1e-7, "above 1e-7, the end of polynomial"
    check(ok, "learning_rate", learning_rate, expected)
    if name != "constant":
        # Schedulers of torch change an optimizer, here of no use but to make the function.
        none = torch.optim.SGD([torch.zeros(())], lr=learning_rate)
        options: dict[str, Any] = {"num_warmup_steps": warmup_steps, "num_training_steps": steps}
        make = need("diffusers.optimization").get_scheduler
        (later,) = make(name, none, **options).lr_lambdas
    return lambda step: step / warmup_steps if step <= warmup_steps else float(later(step - 1))
