"""Update the trainable parameters of a model: learning rates, clipping, optimizer, average."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from prfl_fast.memory.optimizers import (
    check_dtypes,
    clip_gradients,
    gradient_norm,
    make_optimizer,
    set_learning_rate,
    split_group,
)
from prfl_fast.training.config import TrainConfig
from prfl_fast.training.schedules import schedule_factor
from prfl_fast.utils.checks import check
from prfl_fast.utils.sharded import like_sharded, local_part


def detached(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of metrics, without graphs, to read after later micro-batches.

    An objective may change its tensors in place by then.
    """
    return {
        key: value.detach().clone() if isinstance(value, torch.Tensor) else value
        for key, value in metrics.items()
    }


def read_means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric over the mappings that have it.

    All metrics of a device are read at once, so each device is waited for once.
    """
    seen: dict[str, list[Any]] = {}
    for each in metrics:
        for key, value in each.items():
            seen.setdefault(key, []).append(value)
    tensors: dict[torch.device, list[tuple[list[Any], int]]] = {}
    for values in seen.values():
        for i, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                tensors.setdefault(value.device, []).append((values, i))
    for places in tensors.values():
        stacked = torch.stack([v[i].detach().reshape(()).double() for v, i in places])
        for (values, i), number in zip(places, stacked.tolist(), strict=True):
            values[i] = number
    return {key: sum(map(float, values)) / len(values) for key, values in seen.items()}


class Updater:
    """Apply gradients to the parameters of ``model`` that require them.

    Attributes:
        parameters: those parameters by name.
        optimizer: the optimizer that ``config`` names.
        ema: running averages by name, or None.

    Raises:
        ValueError: if there is nothing to train, or the optimizer cannot train a parameter's dtype.
        MissingExtraError: if the package of the optimizer is not installed.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.config = config
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hint = "Call requires_grad_(True) on the parameters to train, or add_lora(model, ...)"
        count = len(self.parameters)
        check(count > 0, "the number of trainable parameters", count, "at least one", hint=hint)
        check_dtypes(config.optimizer, self.parameters)
        names = ("learning_rate", "betas", "eps", "weight_decay", "gradient_dtype")
        options = {name: getattr(config, name) for name in names}
        self.optimizer = make_optimizer(config.optimizer, self.parameters.values(), **options)
        # A reward model's pool and head may have their own rate, and may stay unclipped.
        head = {n: p for n, p in self.parameters.items() if n.startswith(("pool.", "head."))}
        unclipped = head if config.clip == "blocks" else ()
        self._clipped = [p for n, p in self.parameters.items() if n not in unclipped]
        if config.head_learning_rate is not None:
            hint = "Only a LatentRewardModel has them"
            check(bool(head), "head_learning_rate", config.head_learning_rate, "None", hint=hint)
            split_group(self.optimizer, head.values())
        rates = (config.steps, config.warmup_steps, config.learning_rate)
        self._factor = schedule_factor(config.schedule, *rates)
        self.ema: dict[str, torch.Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {}
            # In bfloat16, (1 - decay) · difference would be rounded to 0. torch's AveragedModel
            # averages in the parameter's dtype, copies the frozen weights as well, and its first
            # update copies the weights instead of averaging them with the initial ones.
            for name, p in self.parameters.items():
                wide = torch.promote_types(p.dtype, torch.float32)
                self.ema[name] = like_sharded(p, local_part(p.detach()).to(wide, copy=True))

    def set_rates(self, step: int) -> float:
        """Set the learning rates of a step; return the rate of the parameters outside the head."""
        factor = self._factor(step)
        rate, head_rate = self.config.learning_rate * factor, self.config.head_learning_rate
        heads = [] if head_rate is None else [head_rate * factor]
        set_learning_rate(self.optimizer, rate, *heads)
        return rate

    def clear(self) -> None:
        """Drop all gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> list[torch.Tensor]:
        """Return the gradients of all parameters that have one."""
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def apply(self, norm: torch.Tensor | None, finite: bool) -> None:
        """Clip, step and average if ``finite``; then drop the gradients. ``norm`` is their norm."""
        limit, clipped = self.config.max_grad_norm, [p for p in self._clipped if p.grad is not None]
        if finite:
            if limit is not None and clipped:
                if len(clipped) < len(self.gradients()):
                    norm = gradient_norm([p.grad for p in clipped if p.grad is not None])
                assert norm is not None
                clip_gradients(clipped, limit, norm)
            self.optimizer.step()
            self._average()
        self.clear()

    def _average(self) -> None:
        for name, average in (self.ema or {}).items():
            if self.parameters[name].grad is None:  # of the expert that waits
                continue
            average = local_part(average)
            parameter = local_part(self.parameters[name].detach()).to(average)
            # average ← decay·average + (1 - decay)·parameter
            average.lerp_(parameter, 1 - self.config.ema_decay)  # type: ignore[operator]
