"""Let all ranks of a run decide alike on an update, and average its gradients."""

import itertools
import math
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prfl_fast.parallel.averaging import average_gradients
from prfl_fast.parallel.ranks import OtherRankError, Ranks
from prfl_fast.training.oom import is_out_of_memory
from prfl_fast.training.updates import Updater


class Report(NamedTuple):
    """Hold the outcome of a rank's micro-batches, as plain values."""

    means: dict[str, float]
    error: str | None
    out_of_memory: bool
    signals: list[int]
    fallen_back: bool  # the rollouts are exact from now on


class Agreement:
    """Exchange one report per update among the ranks.

    Attributes:
        signals: signals that a rank has received, known to all.
        error: the last error of a rank: its own exception there, ``OtherRankError`` on the others.
    """

    def __init__(self, ranks: Ranks, updater: Updater) -> None:
        self.ranks, self.updater = ranks, updater
        self.signals: list[signal.Signals] = []
        self.error: BaseException | None = None

    def update(
        self,
        means: Mapping[str, float],
        error: Exception | None,
        signals: Sequence[int],
        objective: Any,
    ) -> dict[str, float]:
        """Return the metrics' means over the data ranks; average gradients if the loss is finite.

        Args:
            means: means of this rank's metrics over its micro-batches, with ``loss``.
            error: exception of this rank; None if it has none.
            signals: signals that this rank has received.
            objective: told to fall back to exact rollouts if that of any rank has.

        Raises:
            Exception: ``error`` itself, if it is not None.
            OtherRankError: if another rank has an error.
        """
        text = None if error is None else str(error) or type(error).__name__
        full = error is not None and is_out_of_memory(error)
        back = bool(getattr(objective, "fallen_back", False))
        own = Report(dict(means), text, full, [int(s) for s in signals], back)
        reports = self.ranks.gather(own)
        self._learn(reports, error)
        if any(report.fallen_back for report in reports):
            objective.fallen_back = True
        found = mean_of([report.means for report in self.ranks.by_data(reports)])
        if math.isfinite(found["loss"]):
            assert self.ranks.mesh is not None
            average_gradients(self.updater.parameters.values(), self.ranks.mesh)
        return found

    def _learn(self, reports: Sequence[Report], error: Exception | None) -> None:
        """Store the signals of all ranks; raise if one has an error."""
        self._add_signals([report.signals for report in reports])
        failed = [rank for rank, report in enumerate(reports) if report.error is not None]
        if not failed:
            return
        if error is None:
            first = failed[0]
            other = OtherRankError(f"rank {first} failed: {reports[first].error}")
            other.out_of_memory = any(report.out_of_memory for report in reports)
            error = other
        self.error = error
        raise error

    def poll(self, signals: Sequence[int]) -> None:
        """Add the signals that any rank has received to those that all know."""
        self._add_signals(self.ranks.gather([int(s) for s in signals]))

    def _add_signals(self, of_ranks: Sequence[Sequence[int]]) -> None:
        for number in itertools.chain(*of_ranks):
            if number not in self.signals:
                self.signals.append(signal.Signals(number))


def mean_of(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the mappings that have it."""
    seen: dict[str, list[float]] = {}
    for each in metrics:
        for key, value in each.items():
            seen.setdefault(key, []).append(value)
    return {key: sum(values) / len(values) for key, values in seen.items()}
