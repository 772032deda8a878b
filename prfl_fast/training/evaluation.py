"""Evaluate models on held-out data, while they train and afterwards.

An evaluation changes neither the weights nor any random state, so a run trains the same weights
with and without it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import interpolate

from prfl_fast.data.codec_base import Codec
from prfl_fast.data.dataset import Batch, PairBatch, collate
from prfl_fast.data.manifest import LatentDataset, Pair
from prfl_fast.data.order import consecutive
from prfl_fast.data.video import contact_sheet
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.models.velocity import Precision, autocast, model_of
from prfl_fast.parallel.ranks import OtherRankError, Ranks
from prfl_fast.rewards.evaluation import classification_metrics, preference_metrics
from prfl_fast.rewards.functions import Reward
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.sampling.generate import noise_of
from prfl_fast.training.checkpoint import random_state, restore_random_state
from prfl_fast.training.logging import TrainingLog
from prfl_fast.training.reward_losses import (
    EVALUATION_TIMESTEPS,
    LABELS,
    VideoInputs,
    evaluation_mode,
    label_of,
    logits_by_timestep,
)
from prfl_fast.utils.checks import check, check_count
from prfl_fast.utils.modules import device_of
from prfl_fast.utils.progress import count_progress

_COLUMNS, _HEIGHT = 8, 160  # frames per sample of a contact sheet, their largest height in pixels
Tick = Callable[[], object]  # called between batches; it may raise to end an evaluation


class EvaluationInterrupted(BaseException):  # noqa: N818 - like KeyboardInterrupt, no error
    """Raised by a signal to end an evaluation, which a resumed run repeats."""


class Evaluated(NamedTuple):
    """Hold figures to log by name, and a contact sheet to write, uint8 ``[height, width, 3]``."""

    figures: dict[str, float]
    sheet: torch.Tensor | None = None


def _no_tick() -> None: ...


class PeriodicEvaluation:
    """Evaluate a model in a training, and end the training when a figure no longer rises.

    The trainer calls it before the first step and after every ``every`` steps. A run in a folder
    keeps the checkpoint of the best step.

    Args:
        evaluate: returns the figures and contact sheet of the model as it is. It calls its argument
            from time to time, which raises :class:`EvaluationInterrupted` after a signal.
        every: steps between evaluations; None evaluates never.
        patience: evaluations in a row without a higher ``figure`` that end the training; None
            trains to the end.
        figure: name of the figure.

    Attributes:
        best: highest figure after a step; None before the first.
        best_step: its step.

    Raises:
        ValueError: if ``every`` or ``patience`` is not a positive integer.
    """

    def __init__(
        self,
        evaluate: Callable[[Tick], Evaluated],
        every: int | None = None,
        *,
        patience: int | None = None,
        figure: str = "accuracy",
    ) -> None:
        for name, value in (("every", every), ("patience", patience)):
            if value is not None:
                check_count(name, value)
        self.evaluate, self.every, self.patience, self.figure = evaluate, every, patience, figure
        self.best: float | None = None
        self.best_step: int | None = None
        self.waited = 0  # evaluations since the best one

    @property
    def exhausted(self) -> bool:
        """Return True if the training must end."""
        return self.patience is not None and self.waited >= self.patience

    def run(
        self,
        step: int,
        generator: torch.Generator,
        signals: Sequence[object],
        log: TrainingLog | None = None,
        ranks: Ranks | None = None,
    ) -> dict[str, float | None]:
        """Evaluate if due after ``step``; write the contact sheet and return the figures to log.

        The random states of torch, Python and ``generator`` do not change. Raise
        :class:`EvaluationInterrupted` if a rank receives one of ``signals`` meanwhile. All
        ``ranks`` evaluate the same samples, end together, and return the figures of rank 0.
        """
        if self.every is None or step % self.every:
            return {}
        ranks = ranks or Ranks()
        before = random_state(generator)
        try:
            figures, sheet = self._evaluate(signals, ranks)
        finally:
            restore_random_state(before, generator)
        figures = ranks.gather(figures)[0]
        if self.patience is not None and step:
            value = figures[self.figure]
            self.waited += 1
            if self.best is None or value > self.best:
                self.best, self.best_step, self.waited = value, step, 0
        if log is not None and sheet is not None:
            log.write_sheet(step, sheet)
        return {f"eval/{k}": v if math.isfinite(v) else None for k, v in figures.items()}

    def _evaluate(self, signals: Sequence[object], ranks: Ranks) -> Evaluated:
        """Return the figures and contact sheet of this rank, once all ranks have theirs."""

        def tick() -> None:
            if ranks.agree(bool(signals)):
                raise EvaluationInterrupted

        error: Exception | None = None
        try:
            found = self.evaluate(tick)
        except OtherRankError:
            raise
        except Exception as raised:
            # With sharded weights the others wait for this rank in a forward, not here.
            if ranks.sharded or not ranks.several:
                raise
            error = raised
        ranks.agree(error=error)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the best figure, its step, and the number of evaluations since."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a :meth:`state_dict`."""
        self.best, self.best_step = state["best"], state["best_step"]
        self.waited = state["waited"]


class RewardEvaluator:
    """Score a dataset with a reward model at several timesteps, and compare with its labels.

    Args:
        dataset: single videos, or preference pairs.
        label: name of the label of single videos; None if only scores are needed.
        missing_label: label of videos without one; None refuses them.
        timesteps, seed, shift, integer_timesteps: see
            :func:`prfl_fast.training.reward_losses.logits_by_timestep`.
        batch_size: videos, or pairs, of a forward pass.
        precision: ``"bf16"`` for autocast, else ``"fp32"``.

    Attributes:
        labels: ``[N]`` of single videos, float32, or None.

    Raises:
        ValueError: if a label is missing or not 0 or 1; the message names its line.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        *,
        label: str | None = None,
        missing_label: float | None = None,
        timesteps: Sequence[int] = EVALUATION_TIMESTEPS,
        batch_size: int = 1,
        precision: Precision = "fp32",
        seed: int = 0,
        **levels: Any,
    ) -> None:
        self.dataset, self.timesteps, self.batch_size = dataset, tuple(timesteps), batch_size
        self.precision, self.options = precision, {"seed": seed, **levels}
        self.labels: torch.Tensor | None = None
        if label is not None and not dataset.pairs:
            found = labels_of(dataset, label, missing_label)
            self.labels = torch.tensor(found, dtype=torch.float32, device="cpu")

    def logits(self, reward: LatentRewardModel, tick: Tick = _no_tick) -> dict[int, torch.Tensor]:
        """Return ``{t: [V, N]}`` in the dataset's order; V is 2 for pairs, winners first."""
        device = device_of(reward)
        groups = consecutive([b.indices for b in self.dataset.buckets], self.batch_size)

        def batches() -> Iterator[Sequence[VideoInputs]]:
            for indices in groups:
                tick()
                show("")
                batch = collate([self.dataset[i] for i in indices]).to(device)
                videos: tuple[Batch, ...] = batch if isinstance(batch, PairBatch) else (batch,)
                yield [(video.latents, video.conditions) for video in videos]

        with (
            autocast(device, self.precision),
            count_progress("evaluation", "batches", len(groups)) as show,
        ):
            return logits_by_timestep(reward, batches(), self.timesteps, **self.options)

    def metrics(self, logits: dict[int, torch.Tensor]) -> dict[int, dict[str, float]]:
        """Return the figures of :meth:`logits` by timestep.

        They are those of :func:`prfl_fast.rewards.evaluation.preference_metrics` for pairs, else of
        :func:`prfl_fast.rewards.evaluation.classification_metrics`.
        """
        if self.dataset.pairs:
            return {t: preference_metrics(*videos) for t, videos in logits.items()}
        assert self.labels is not None
        return {t: classification_metrics(of[0], self.labels) for t, of in logits.items()}

    def __call__(self, reward: LatentRewardModel, tick: Tick = _no_tick) -> Evaluated:
        """Return accuracy and loss at each timestep ``t`` and their means, to be logged.

        Names are ``accuracy``, ``accuracy/t201``, ``loss``, ``loss/t201`` and so on.
        """
        metrics = self.metrics(self.logits(reward, tick))
        figures = {}
        for name in ("accuracy", "loss"):
            figures[name] = sum(values[name] for values in metrics.values()) / len(metrics)
            figures |= {f"{name}/t{t}": values[name] for t, values in metrics.items()}
        return Evaluated(figures)


def labels_of(dataset: LatentDataset, label: str, missing: float | None) -> list[float]:
    """Return the 0/1 label of each video; ``ValueError`` names the line of a bad one."""
    records = list(dataset.labels())
    if missing is not None and label not in LABELS:
        # With a misspelled name, all videos would count as unlabeled.
        known = sorted({name for _, record in records for name in record} - {"id"})
        check(label in known, "label", label, f"a label of the dataset, which has {known}")
    found = []
    for place, record in records:
        try:
            found.append(label_of(record, label, missing))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    return found


class GeneratorEvaluator:
    """Sample held-out prompts with a generator, and reward the latents along the sampler.

    Rollouts are exact: without a stride and FP8. Noise of a seed is the same in all evaluations.

    Args:
        sampler: model, schedule and guidance.
        rewards: rewards by name.
        prompts: dataset whose conditions and sizes are sampled; its latents are not used. Of pairs,
            the winners are.
        seeds: seeds of the noise, with each of which every prompt is sampled.
        timesteps: the latents are rewarded at the steps nearest to them, and at the end.
        codec: decodes the samples for a contact sheet; None makes none.
        device: of the noise, the conditions and the models.
    """

    def __init__(
        self,
        sampler: Sampler,
        rewards: Mapping[str, Reward],
        prompts: LatentDataset,
        *,
        seeds: Sequence[int] = (0,),
        timesteps: Sequence[int] = EVALUATION_TIMESTEPS,
        codec: Codec | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sampler, self.rewards, self.prompts = sampler, dict(rewards), prompts
        self.seeds, self.timesteps, self.codec = tuple(seeds), tuple(timesteps), codec
        self.device = device
        # One engine for all evaluations, so that its messages appear once.
        self.engine = RolloutEngine(sampler.transformer, RolloutConfig())

    @torch.no_grad()
    @exact_linears()
    def __call__(self, tick: Tick = _no_tick) -> Evaluated:
        """Return the mean of each reward, and a contact sheet of the samples.

        Figures are ``<reward>`` at the end of the sampler, and ``<reward>/t803`` at timestep 803.
        """
        scores: dict[str, list[float]] = {}
        videos = []
        count = len(self.prompts) * len(self.seeds)
        model = model_of(self.sampler.transformer)
        with (
            evaluation_mode(model) if model is not None else contextlib.nullcontext(),
            count_progress("evaluation", "samples", count) as show,
        ):
            for index in range(len(self.prompts)):
                item = self.prompts[index]
                batch = collate([item.win if isinstance(item, Pair) else item])
                assert isinstance(batch, Batch)
                for seed in self.seeds:
                    show(item.win.id if isinstance(item, Pair) else item.id)
                    latents = self._sample(batch.to(self.device), seed, scores, tick)
                    if self.codec is not None:
                        videos.append(_small_frames(self.codec.decode(latents)[0]))
        figures = {name: sum(values) / len(values) for name, values in scores.items()}
        return Evaluated(figures, contact_sheet(videos, _COLUMNS) if videos else None)

    def _sample(
        self, batch: Batch, seed: int, scores: dict[str, list[float]], tick: Tick
    ) -> torch.Tensor:
        """Return the latents of one sample; append its rewards to ``scores``."""
        noise, conditions = noise_of(seed, batch.latents.shape).to(self.device), batch.conditions
        trajectory = Trajectory(self.sampler, noise, conditions, engine=self.engine)
        levels = torch.stack(list(trajectory.timesteps)).double().cpu()
        nearest: set[int] = set()
        if len(levels) > 1:  # step 0 is pure noise
            nearest = {int((levels[1:] - t).abs().argmin()) + 1 for t in self.timesteps}
        for stop in sorted({*nearest, len(levels)}):
            trajectory.run(stop, tick)
            ended = stop == len(levels)
            t = trajectory.x.new_zeros(1) if ended else trajectory.model_timestep(stop)
            for name, reward in self.rewards.items():
                score = float(reward(trajectory.x, t, conditions))
                key = name if ended else f"{name}/t{int(t)}"
                scores.setdefault(key, []).append(score)
        return trajectory.x


def _small_frames(video: torch.Tensor) -> torch.Tensor:
    """Return evenly spaced frames of ``[3, F, H, W]``, at most ``_HEIGHT`` pixels high."""
    frames, height, width = video.shape[1:]
    count = min(_COLUMNS, frames)
    chosen = torch.linspace(0, frames - 1, count, device="cpu").round().long().tolist()
    scale = min(1.0, _HEIGHT / height)
    size = (round(height * scale), round(width * scale))
    return interpolate(video[None, :, chosen].float().cpu(), (count, *size), mode="area")[0]
