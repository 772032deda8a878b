"""Classifier-free guidance."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prfl_fast.kernels import flow_step
from prfl_fast.kernels.runtime.checks import describe
from prfl_fast.models.adapter import Conditions
from prfl_fast.utils.checks import check, check_number
from prfl_fast.utils.transfers import to_device


@dataclass(frozen=True, eq=False)
class Guidance:
    """Configure classifier-free guidance (Ho and Salimans, arXiv 2207.12598).

    The velocity is ``v_neg + guidance_scale·(v - v_neg)``.

    Attributes:
        guidance_scale: 1 gives the conditional velocity, at the cost of both branches. Of two
            experts, a pair gives each its own: (high, low).
        negative: conditions of the negative branch, of batch B or 1; all others are shared.
        batched: run both branches in one call of twice the batch. Two calls need less memory and
            take prompts of different lengths.

    Raises:
        ValueError: if ``guidance_scale`` is not a finite number or two of them, or ``negative`` is
            not a dict of tensors.
    """

    guidance_scale: float | tuple[float, float]
    negative: Conditions
    batched: bool = True

    def __post_init__(self) -> None:
        scale = self.guidance_scale
        if isinstance(scale, (tuple, list)):
            check(len(scale) == 2, "guidance_scale", scale, "one number, or two: (high, low)")
        for number in scale if isinstance(scale, (tuple, list)) else (scale,):
            check_number("guidance_scale", number)
        ok = isinstance(self.negative, dict) and bool(self.negative)
        wanted = "[B, ...] or [1, ...]"
        check(ok, "guidance negative", self.negative, f"a dict of tensors {wanted}")
        for key, value in self.negative.items():
            ok = isinstance(value, torch.Tensor) and value.ndim > 0
            check(ok, f"guidance negative[{key!r}]", value, f"a tensor {wanted}")

    def of(self, expert: str | None) -> "Guidance":
        """Return the guidance of the expert ``"high"`` or ``"low"``, or of a single model, None.

        Raise ``ValueError`` for two scales of a single model.
        """
        scale = self.guidance_scale
        if not isinstance(scale, (tuple, list)):
            return self
        check(expert is not None, "guidance_scale", scale, "one number: the model has no experts")
        return replace(self, guidance_scale=scale[expert == "low"])

    def branches(self, conditions: Conditions) -> tuple[Conditions, ...]:
        """Return the conditions of the model's calls: one of twice the batch, or two.

        Raises:
            ValueError: if a key of ``negative`` is not in ``conditions``, or its batch or shape
                differs.
        """
        negative = dict(conditions)
        for key, value in self.negative.items():
            check(key in conditions, "guidance negative", [key], f"keys of {sorted(conditions)}")
            name, own = f"guidance negative[{key!r}]", conditions[key]
            batch = len(own)
            check(value.shape[0] in (1, batch), name, value, f"batch {batch} or 1")
            negative[key] = to_device(value, own.device).expand(batch, *value.shape[1:])
            ok = not self.batched or negative[key].shape == own.shape
            hint = "Pad them alike, or use Guidance(batched=False)."
            check(ok, name, value, f"the shape of conditions[{key!r}], {describe(own)}", hint=hint)
        if not self.batched:
            return conditions, negative
        return ({key: torch.cat([conditions[key], negative[key]]) for key in conditions},)

    def combine(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combine the calls' outputs into the guided velocity, differentiable in both branches."""
        scale = self.of(None).guidance_scale
        assert not isinstance(scale, tuple)
        positive, negative = outputs[0].chunk(2) if self.batched else outputs
        return flow_step([negative, positive], [1.0 - scale, scale])
