"""Reuse the residual of blocks in steps of a rollout that change little.

TeaCache (Liu et al., arXiv 2411.19108) sums the relative L1 changes of the modulated timestep
embedding, each rescaled by a polynomial. While the sum stays below a threshold, the residual of all
blocks is that of the last step in which they ran. First-block caching runs block 1, and reuses the
residual of the others if that of block 1 moved less than a threshold since they last ran.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from prfl_fast.utils.sharded import holds_on_all_ranks

TeaCacheModel = Literal[
    "wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"
]
# Coefficients of the polynomial, highest power first, for changes of the embedding that modulates
# the blocks ("use_ret_steps"). Source: ali-vilab/TeaCache, TeaCache4Wan2.1.
COEFFICIENTS: dict[TeaCacheModel, tuple[float, ...]] = {
    "wan2.1-t2v-1.3b": (
        -5.21862437e04,
        9.23041404e03,
        -5.28275948e02,
        1.36987616e01,
        -4.99875664e-02,
    ),
    "wan2.1-t2v-14b": (
        -3.03318725e05,
        4.90537029e04,
        -2.65530556e03,
        5.87365115e01,
        -3.15583525e-01,
    ),
    "wan2.1-i2v-14b-480p": (
        2.57151496e05,
        -3.54229917e04,
        1.40286849e03,
        -1.35890334e01,
        1.32517977e-01,
    ),
    "wan2.1-i2v-14b-720p": (
        8.10705460e03,
        2.13393892e03,
        -3.72934672e02,
        1.66203073e01,
        -4.17769401e-02,
    ),
}


@dataclass
class ReuseCounts:
    """Count forwards that may reuse residuals, and the share of their blocks that did not run."""

    forwards: int = 0
    saved: float = 0.0


@dataclass(frozen=True)
class StepCacheOptions:
    """Configure the reuse; see :class:`prfl_fast.rollout.RolloutConfig`.

    A threshold of 0 never reuses. ``model`` is a key of ``COEFFICIENTS``; None is the identity.
    All caches add to ``counts``. ``shares_weights`` is True if ranks gather weights together.
    """

    teacache: float = 0.0
    first_block: float = 0.0
    model: TeaCacheModel | None = None
    counts: ReuseCounts = field(default_factory=ReuseCounts, compare=False)
    shares_weights: bool = False

    def __bool__(self) -> bool:
        return self.teacache > 0 or self.first_block > 0


def relative_change(x: torch.Tensor, before: torch.Tensor) -> float:
    """Return ``mean|x - before| / mean|before|``, the largest of a batch ``[B, ...]``.

    It is infinite or NaN where ``before`` is zero, and so below no threshold.
    """
    x, before = x.flatten(1), before.flatten(1)
    wide = torch.promote_types(x.dtype, torch.float32)  # bfloat16 sums would lose small changes
    change = (x - before).abs().mean(1, dtype=wide) / before.abs().mean(1, dtype=wide)
    return float(change.max())


class StepCache:
    """Hold the residuals of one branch of one rollout."""

    def __init__(self, options: StepCacheOptions, count: int) -> None:
        self.options, self._count = options, count
        self._coefficients = COEFFICIENTS[options.model] if options.model else (1.0, 0.0)
        self._time: torch.Tensor | None = None
        self._change = 0.0
        self._first: torch.Tensor | None = None  # block 1's residual when the others last ran
        self._all: torch.Tensor | None = None  # the residual of all blocks
        self._rest: torch.Tensor | None = None  # the residual of all blocks but the first
        self._skips = False
        self._inputs: list[torch.Tensor] = []  # of block 1, then of block 2

    def run(
        self,
        index: int,
        x: torch.Tensor,
        time: torch.Tensor,
        block: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Return the output of block ``index`` at input ``x [B, L, D]``, or ``x`` if it is skipped.

        In a step that reuses a residual, block 0 adds it: in place of its output with TeaCache, to
        its output with first-block caching.
        """
        counts = self.options.counts
        if index == 0:
            counts.forwards += 1
            self._skips, self._inputs = self._time_moves_little(time), [x]
            if self._skips:
                assert self._all is not None
                counts.saved += 1 / self._count
                return x + self._all
        elif self._skips:
            counts.saved += 1 / self._count
            return x
        out = block()
        if index == 0 and self.options.first_block > 0 and self._count > 1:
            return self._after_first(out)
        if index == self._count - 1:
            self._keep(out)
        return out

    def _time_moves_little(self, time: torch.Tensor) -> bool:
        if self.options.teacache <= 0:
            return False
        before, self._time = self._time, time
        if before is None:
            return False
        change, value = relative_change(time, before), 0.0
        for coefficient in self._coefficients:
            value = value * change + coefficient
        self._change += value
        if self._all is not None and self._agreed(self._change < self.options.teacache, time):
            return True
        self._change = 0.0
        return False

    def _agreed(self, skips: bool, like: torch.Tensor) -> bool:
        """Return True if all ranks that share weights skip; the tensor gives the device."""
        # A rank that skips a block does not gather its weights, and the others would wait for it.
        if not self.options.shares_weights:
            return skips
        return bool(holds_on_all_ranks(torch.tensor(skips, device=like.device)))

    def _after_first(self, out: torch.Tensor) -> torch.Tensor:
        first = out - self._inputs[0]
        self._skips = (
            self._first is not None
            and self._rest is not None
            and self._agreed(relative_change(first, self._first) < self.options.first_block, first)
        )
        if self._skips:
            assert self._rest is not None
            if self.options.teacache > 0:
                self._all = first + self._rest
            return out + self._rest
        self._first = first
        self._inputs.append(out)
        return out

    def _keep(self, out: torch.Tensor) -> None:
        before = self._inputs
        if self.options.teacache > 0:
            self._all = out - before[0]
        if len(before) > 1:
            self._rest = out - before[1]
        self._inputs = []
