"""One training loop for reward feedback, supervised and reward-model training.

A step of the loop visits every objective in turn, and each visit ends with an optimizer step of its
own: reward feedback alternated with supervised flow matching (arXiv 2511.21541) is two
objectives; either alone, or the training of a reward model, is one. With a folder, the loop logs,
saves and resumes; a run killed at any moment and resumed computes what the uninterrupted run
computes, bit for bit on CPU.
"""

import contextlib
import copy
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from prfl_fast._extras import need
from prfl_fast.adapters import Conditions
from prfl_fast.config import Gradients, OptimizerKind
from prfl_fast.data import Batch, PairBatch
from prfl_fast.live_bytes import is_out_of_memory, live_bytes, memory_report, phase_of
from prfl_fast.losses import sft_loss
from prfl_fast.model_call import ModelCall, Precision, autocast
from prfl_fast.optimizers import (
    GRADIENTS,
    KINDS,
    check_dtypes,
    gradient_norm,
    make_optimizer,
    set_learning_rate,
)
from prfl_fast.reward import LatentRewardModel
from prfl_fast.reward_training import bt_loss, ce_loss, label_of
from prfl_fast.step import PRFL
from prfl_fast.training_state import (
    adapter_name,
    clean_temporaries,
    copy_into,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
    write_atomic,
)

NON_FINITE_LIMIT = 5
LOG = "log.jsonl"
Metrics = Mapping[str, torch.Tensor | float]


class NonFiniteTraining(RuntimeError):
    """Training stopped over NaN or infinity; the message says what is on disk."""


class OutOfMemory(RuntimeError):
    """A device is full; the message says where, what holds its memory, and what to try next."""


class Objective(Protocol):
    """What a step of the loop optimizes.

    One that carries something from call to call also has ``state_dict()``, of tensors and plain
    values, and ``load_state_dict(state)``: it is saved with the run.
    """

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        """Forward and backward of one micro-batch; add ``loss_scale`` · gradient to ``.grad``.

        Args:
            draw: how many micro-batches this objective has had before; decides which data it takes.
            generator: on the CPU; the only source of randomness.

        Returns:
            ``"loss"`` (unscaled; NaN or infinite if the update must be skipped) and anything else
            worth logging, scalars; logged is the mean over the micro-batches that returned it.
        """
        ...


def velocity_call(transformer: nn.Module, precision: Precision) -> nn.Module | ModelCall:
    """The transformer as :class:`prfl_fast.step.PRFL` takes it, its forward under autocast."""
    return transformer if precision == "fp32" else ModelCall(transformer, precision)


class RewardCall:
    """A latent reward model as a reward, its forward under autocast."""

    def __init__(self, model: LatentRewardModel, precision: Precision) -> None:
        self.model, self.precision = model, precision

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        with autocast(x.device, self.precision):
            score: torch.Tensor = self.model(x, timestep, conditions)
        return score


def reward_call(reward: LatentRewardModel, precision: Precision) -> LatentRewardModel | RewardCall:
    """The reward, frozen, as :class:`prfl_fast.step.PRFL` takes it, its forward under autocast."""
    reward.freeze()
    return reward if precision == "fp32" else RewardCall(reward, precision)


class RewardFeedback:
    """Reward feedback: the objective of a :class:`prfl_fast.step.PRFL` step.

    Logged are the loss, the rewards' weighted sum as ``reward``, each of several as
    ``reward/<name>``, the ``divergence``, and the largest ``drift`` of the rollouts that the engine
    checked.

    Args:
        step: one whose gradient goes to the parameters.
        batches: ``batches[n]`` gives the conditions of micro-batch n. Its latents are what plans
            that start from data corrupt; of others, they give the shape of the noise only.

    Raises:
        ValueError: the step's gradient goes elsewhere.
    """

    def __init__(self, step: PRFL, batches: Any, device: torch.device | str = "cpu") -> None:
        if step.plan.to != "parameters":
            raise ValueError(
                f"the step's plan sends its gradient to the {step.plan.to}, expected 'parameters': "
                "nothing would train; see prfl_fast.sampling"
            )
        self.step, self.batches, self.device = step, batches, device

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        batch: Batch = self.batches[draw]
        noise = torch.randn(batch.latents.shape, generator=generator).to(self.device)
        batch = batch.to(self.device)
        from_data = self.step.plan.start == "data"
        out = self.step(
            noise,
            batch.conditions,
            latents=batch.latents if from_data else None,
            generator=generator,
            loss_scale=loss_scale,
        )
        metrics = {"loss": out.loss if out.finite else math.nan, "reward": out.rewards.mean()}
        if len(out.by_reward) > 1:
            metrics |= {f"reward/{name}": r.mean() for name, r in out.by_reward.items()}
        if out.divergence is not None:
            metrics["divergence"] = out.divergence
        if out.drift:
            metrics["drift"] = max(out.drift.values())
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What the rollout engine knows of the trajectories so far."""
        return self.step.engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`."""
        self.step.engine.load_state_dict(state)


class SupervisedFlow:
    """Flow matching on real latents: :func:`prfl_fast.losses.sft_loss`."""

    def __init__(
        self,
        transformer: nn.Module,
        batches: Any,
        *,
        shift: float = 5.0,
        precision: Precision = "fp32",
    ) -> None:
        self.velocity, self.batches, self.shift = (
            velocity_call(transformer, precision),
            batches,
            shift,
        )
        self.device = next(transformer.parameters()).device

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        batch: Batch = self.batches[draw].to(self.device)
        loss = sft_loss(
            self.velocity, batch.latents, batch.conditions, generator=generator, shift=self.shift
        )
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}


class RewardFit:
    """Training of a latent reward model on 0/1 labels (``ce``) or preference pairs (``bt``).

    Args:
        batches: of :class:`prfl_fast.data.Batch` for ``ce``, of :class:`prfl_fast.data.PairBatch`
            for ``bt``.
        label: which label ``ce`` learns.
    """

    def __init__(
        self,
        reward: LatentRewardModel,
        batches: Any,
        *,
        loss: Literal["ce", "bt"] = "ce",
        label: str = "motion_quality",
        shift: float = 5.0,
        precision: Precision = "fp32",
    ) -> None:
        self.reward, self.batches, self.loss, self.label = reward, batches, loss, label
        self.shift, self.precision = shift, precision
        self.device = next(reward.parameters()).device

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Metrics:
        batch: Batch | PairBatch = self.batches[draw].to(self.device)
        with autocast(self.device, self.precision):
            if isinstance(batch, PairBatch):
                win, lose = batch
                loss = bt_loss(
                    self.reward,
                    win.latents,
                    lose.latents,
                    win.conditions,
                    lose.conditions,
                    generator=generator,
                    shift=self.shift,
                )
            else:
                labels = torch.tensor([label_of(record, self.label) for record in batch.labels])
                loss = ce_loss(
                    self.reward,
                    batch.latents,
                    batch.conditions,
                    labels,
                    generator=generator,
                    shift=self.shift,
                )
        (loss * loss_scale).backward()
        return {"loss": loss.detach()}


def add_lora(
    transformer: nn.Module,
    rank: int,
    *,
    alpha: float | None = None,
    targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
) -> None:
    """Freeze a transformer and add trainable low-rank adapters through peft, in place.

    They are float32 on float32 layers and bfloat16 on all others, quantised ones too.

    Args:
        rank: of the adapters; ``alpha / rank`` scales them, ``alpha`` is ``rank`` unless given.
        targets: ends of the names of the linear layers that get one.

    Raises:
        ValueError: no layer ends in one of ``targets``, or the model already has an adapter.
    """
    if adapter_name(transformer) is not None:
        raise ValueError(f"the model already has adapter {adapter_name(transformer)!r}")
    peft = need("peft")
    transformer.requires_grad_(False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets)
    )
    if hasattr(transformer, "add_adapter"):
        transformer.add_adapter(config)  # type: ignore[operator]
    else:
        peft.inject_adapter_in_model(config, transformer)
    # peft makes some of them float32, depending on how it was called.
    for layer in transformer.modules():
        base: Any = getattr(layer, "base_layer", None)
        if base is not None and base.weight.dtype.itemsize < 4:
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


@dataclass(frozen=True)
class TrainSettings:
    """AdamW, schedule and bookkeeping of a run; the defaults are PRFL's but for accumulation.

    Attributes:
        steps: optimizer steps per objective, in total.
        optimizer, gradients: see :func:`prfl_fast.optimizers.make_optimizer`.
        learning_rate: reached after ``warmup_steps`` linear steps, then constant.
        clip_norm: largest norm of all gradients together; None turns clipping off.
        accumulation: micro-batches per optimizer step.
        ema_decay: of the running average of the trainable parameters; None keeps none.
        save_every: steps between checkpoints; 0 saves at the end only. keep_last: how many stay; 0
            keeps all.
    """

    steps: int
    optimizer: OptimizerKind = "adamw"
    gradients: Gradients = "parameter"
    learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0
    warmup_steps: int = 0
    accumulation: int = 1
    ema_decay: float | None = None
    seed: int = 0
    save_every: int = 0
    keep_last: int = 2

    # What a resumed run may change without changing the steps already taken.
    FREE = ("steps", "save_every", "keep_last")

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("accumulation", 1),
            ("warmup_steps", 0),
            ("save_every", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected a whole number, at least {least}")
        for name, known in (("optimizer", KINDS), ("gradients", GRADIENTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )

    def fixed(self) -> dict[str, Any]:
        """The settings a resumed run must repeat."""
        return {name: value for name, value in asdict(self).items() if name not in self.FREE}


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        step: the last step taken. history: one record per step taken by this process, as in the
            log.
        skipped: updates skipped for non-finite losses or gradients, since the run's first step.
        stopped_by: the signal that ended the run early, or None.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    stopped_by: signal.Signals | None = None


class _Log:
    """``log.jsonl`` and TensorBoard; a resume cuts the log back to the resumed step."""

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        path = folder / LOG
        kept = [line for line in self._lines(path) if json.loads(line)["step"] <= step]
        with write_atomic(path) as temporary:
            temporary.write_bytes(b"".join(kept))
        # Unbuffered: a line is one write, so a killed run leaves whole lines.
        self._file = open(path, "ab", buffering=0)
        self._board = None
        if tensorboard:
            writer = need("torch.utils.tensorboard").SummaryWriter
            self._board = writer(str(folder / "tensorboard"), purge_step=step + 1)

    @staticmethod
    def _lines(path: Path) -> Iterator[bytes]:
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                json.loads(line)["step"]
                yield line

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, record["step"])

    def flush(self) -> None:
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Trainer:
    """Trains the parameters of ``model`` that require gradients.

    Without a folder the run lives in memory and writes nothing. With one, the folder holds
    ``log.jsonl`` (one record per step), TensorBoard's files, and checkpoints
    (:mod:`prfl_fast.training_state`); SIGINT and SIGTERM end the run after the step in progress,
    saved; a second signal ends it at once.

    An update whose loss or gradient is not finite is skipped: weights, optimizer and average stay
    as they are. Five steps in a row with a skipped update end the run.

    A run that ends with :class:`OutOfMemory` in a forward or backward leaves the trainer as it was
    before that update: :meth:`run` goes on from there, under a checkpoint policy that needs less.

    Args:
        model: parameters and persistent buffers are the state that is saved; an adapter's only, if
            it has one.
        objectives: by name, in the order of a step.
        resume: ``"auto"`` goes on from the newest checkpoint in ``folder``, if there is one; a path
            goes on from that checkpoint; None starts anew and refuses a folder with checkpoints.
        identity: plain values that describe the run (batch size, number of solver steps …): they
            are stored, and a resumed run must have the same.
        progress: show a progress bar if stderr is a terminal. tensorboard: write TensorBoard's
            files; needs a folder.
        on_step: called with each step's record after the step.
        advise: called when a device is full; returns a sentence on which memory policy to try next.

    Raises:
        ValueError: no objectives, nothing to train, parameters the optimizer does not train, or a
            checkpoint that is truncated, foreign, or of other settings. Nothing is written before
            :meth:`run`.
        MissingExtra: the optimizer's library is not installed.
    """

    def __init__(
        self,
        model: nn.Module,
        objectives: Mapping[str, Objective],
        settings: TrainSettings,
        *,
        folder: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | None = "auto",
        identity: Mapping[str, Any] | None = None,
        progress: bool = False,
        tensorboard: bool = False,
        on_step: Callable[[dict[str, Any]], object] | None = None,
        advise: Callable[[], str] | None = None,
    ) -> None:
        if not objectives:
            raise ValueError("objectives is empty, expected at least one")
        if tensorboard and folder is None:
            raise ValueError("tensorboard is on, but there is no folder to write to")
        self.model, self.objectives, self.settings = model, dict(objectives), settings
        self.folder = None if folder is None else Path(folder)
        self.progress, self.tensorboard, self.on_step = progress, tensorboard, on_step
        self.advise = advise
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError(
                "the model has no parameter that requires a gradient: nothing to train"
            )
        check_dtypes(settings.optimizer, self.parameters)
        self.optimizer = make_optimizer(
            settings.optimizer,
            self.parameters.values(),
            learning_rate=settings.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            gradients=settings.gradients,
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.ema: dict[str, torch.Tensor] | None = None
        if settings.ema_decay is not None:
            # In bfloat16 an average would stand still: (1 - decay) of a difference is rounded away.
            self.ema = {
                n: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for n, p in self.parameters.items()
            }
        self.result = TrainResult()
        self._updates = self._in_a_row = 0
        self._draws = dict.fromkeys(self.objectives, 0)
        self._done: dict[str, tuple[dict[str, float], bool]] = {}  # updates of the step in progress
        self._torn = False  # an update was interrupted between two parameters
        self._identity = {
            **settings.fixed(),
            **(identity or {}),
            "objectives": list(self.objectives),
        }
        self._saved_step: int | None = None
        checkpoint = self._find_checkpoint(resume)
        if checkpoint is not None:
            self._restore(checkpoint)

    def _find_checkpoint(self, resume: str | os.PathLike[str] | None) -> Path | None:
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder}: is a file, expected a folder")
        if resume == "auto":
            return None if self.folder is None else latest_checkpoint(self.folder)
        existing = list_checkpoints(self.folder) if self.folder is not None else []
        if resume is None:
            if existing:
                raise ValueError(
                    f"{self.folder}: holds {existing[-1][1].name}; resume it, or choose a new "
                    "folder"
                )
            return None
        path = Path(resume)
        later = [
            p
            for step, p in existing
            if path.resolve() != p.resolve() and step >= self._step_of(path)
        ]
        if later:
            raise ValueError(
                f"{self.folder}: holds {later[-1].name}, which is not older than {path.name} to "
                "resume from: move it away, or choose a new folder"
            )
        return path

    @staticmethod
    def _step_of(path: Path) -> int:
        number = path.name.removeprefix("step-")
        return int(number) if number.isdigit() else 0

    def _restore(self, path: Path) -> None:
        state, ema = load_checkpoint(path, self.model, settings=self._identity)
        if state["parameters"] != list(self.parameters):
            raise ValueError(f"{path}: trained other parameters than this run does")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            copy_into(ema or {}, self.ema, path / "ema.safetensors")
        self.result.step, self.result.skipped = state["step"], state["skipped"]
        self._updates, self._in_a_row, self._draws = (
            state["updates"],
            state["in_a_row"],
            dict(state["draws"]),
        )
        self._load_objectives(state.get("objectives", {}))
        restore_random_state(state["random"], self.generator)
        if self.folder is not None and path.resolve().parent == self.folder.resolve():
            self._saved_step = self.result.step

    def _objective_states(self) -> dict[str, Any]:
        """What objectives carry from call to call; a copy."""
        return {
            name: copy.deepcopy(objective.state_dict())
            for name, objective in self.objectives.items()
            if hasattr(objective, "state_dict")
        }

    def _load_objectives(self, states: Mapping[str, Any]) -> None:
        for name, state in states.items():
            self.objectives[name].load_state_dict(state)  # type: ignore[attr-defined]

    def save(self) -> Path:
        """Write a checkpoint of the current state.

        Raises:
            ValueError: the trainer has no folder, or is in the middle of a step.
            NonFiniteTraining: a parameter is NaN or infinite; earlier checkpoints are kept.
            OSError: the folder is not writable or the disk is full; earlier checkpoints are kept.
        """
        if self.folder is None:
            raise ValueError("this trainer has no folder to save to")
        self._check_whole()
        if self._done:
            raise ValueError(
                f"step {self.result.step + 1} has had the update of {', '.join(self._done)} only: "
                "run() finishes it, then save"
            )
        for name, parameter in self.parameters.items():
            if not torch.isfinite(parameter).all():
                raise NonFiniteTraining(
                    f"{name} has NaN or infinite values at step {self.result.step}: not saved"
                )
        state = {
            "step": self.result.step,
            "skipped": self.result.skipped,
            "in_a_row": self._in_a_row,
            "updates": self._updates,
            "draws": dict(self._draws),
            "parameters": list(self.parameters),
            "optimizer": self.optimizer.state_dict(),
            "objectives": self._objective_states(),
            "random": random_state(self.generator),
        }
        path = save_checkpoint(
            self.folder,
            self.result.step,
            self.model,
            state,
            ema=self.ema,
            settings=self._identity,
            keep_last=self.settings.keep_last,
        )
        self._saved_step = self.result.step
        return path

    def run(self) -> TrainResult:
        """Train to ``settings.steps``.

        Raises:
            NonFiniteTraining: five steps in a row had a non-finite loss or gradient. The state,
                whose weights are those of the last good update, is saved first.
            OutOfMemory: a device is full. Gradients are dropped and nothing is saved.
            ValueError: an objective left no gradient; whatever the objectives raise.
            OSError: a log or checkpoint could not be written.
        """
        self._check_whole()
        log = None
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            clean_temporaries(self.folder)
            log = _Log(self.folder, self.result.step, self.tensorboard)
        try:
            with self._signals() as signals, self._bar() as bar:
                while self.result.step < self.settings.steps and not signals:
                    self._step(log, bar)
                if signals:
                    self.result.stopped_by = signals[0]
            if self.folder is not None and self._saved_step != self.result.step:
                self._save_with(log)
        finally:
            if log is not None:
                log.close()
        return self.result

    def _check_whole(self) -> None:
        if self._torn:
            raise ValueError(
                "the device was full in the middle of an optimizer step, so some weights are of "
                "the step before: start again from the last checkpoint"
            )

    def _save_with(self, log: _Log | None) -> Path:
        # The log first: a checkpoint must not know steps the log does not.
        if log is not None:
            log.flush()
        return self.save()

    def _step(self, log: _Log | None, bar: Any) -> None:
        start = time.perf_counter()
        step = self.result.step + 1
        rate = self.settings.learning_rate * min(1.0, step / max(1, self.settings.warmup_steps))
        set_learning_rate(self.optimizer, rate)
        record: dict[str, Any] = {"step": step, "lr": rate}
        bad = []
        for name, objective in self.objectives.items():
            if name not in self._done:
                self._done[name] = self._update(name, objective)
            metrics, finite = self._done[name]
            record |= {
                f"{name}/{key}": value if math.isfinite(value) else None
                for key, value in metrics.items()
            }
            if not finite:
                bad.append(name)
        self._done = {}
        self.result.step = step
        self.result.skipped += len(bad)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        record |= {"skipped": self.result.skipped, "seconds": round(time.perf_counter() - start, 6)}
        self.result.history.append(record)
        if log is not None:
            log.write(record)
        shown = {k: f"{v:.4g}" for k, v in record.items() if "/" in k and v is not None}
        bar.set_postfix({**shown, "skipped": self.result.skipped}, refresh=False)
        bar.update()
        if self._in_a_row >= NON_FINITE_LIMIT:
            where = (
                "" if self.folder is None else f"; the last good state is in {self._save_with(log)}"
            )
            raise NonFiniteTraining(
                f"{self._in_a_row} steps in a row had a non-finite loss or gradient "
                f"(last: {', '.join(bad)} at step {step}){where}"
            )
        if (
            self.folder is not None
            and self.settings.save_every
            and step % self.settings.save_every == 0
        ):
            self._save_with(log)
        if self.on_step is not None:
            self.on_step(record)

    def _update(self, name: str, objective: Objective) -> tuple[dict[str, float], bool]:
        """One optimizer step of one objective; returns its metrics and whether it was taken."""
        self.optimizer.zero_grad(set_to_none=True)
        draws, random = self._draws[name], random_state(self.generator)
        carried = self._objective_states()
        try:
            means = self._gradients(name, objective)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            place = f"{phase_of(error)} of micro-batch {self._draws[name] - draws + 1}"
            message = self._full(f"objective {name!r}, {place}", error)
            self._draws[name] = draws
            self._load_objectives(carried)
            restore_random_state(random, self.generator)
            raise OutOfMemory(message) from error
        try:
            return means, self._apply(name, means)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._torn = True
            raise OutOfMemory(
                self._full(f"the optimizer step of objective {name!r}", error)
            ) from error

    def _gradients(self, name: str, objective: Objective) -> dict[str, float]:
        """Accumulate the gradient of one update; returns the means of its metrics."""
        seen: dict[str, list[torch.Tensor]] = {}
        for _ in range(self.settings.accumulation):
            metrics = objective(self._draws[name], self.generator, 1 / self.settings.accumulation)
            self._draws[name] += 1
            for key, value in metrics.items():
                value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
                seen.setdefault(key, []).append(value)
            if not math.isfinite(metrics["loss"]):
                break
        return {key: float(sum(values)) / len(values) for key, values in seen.items()}

    def _apply(self, name: str, means: dict[str, float]) -> bool:
        """Clip, step and average, if all is finite; drops the gradients and adds their norm."""
        parameters = list(self.parameters.values())
        finite = math.isfinite(means["loss"])
        if finite:
            gradients = [p.grad for p in parameters if p.grad is not None]
            if not gradients:
                raise ValueError(f"objective {name!r} left no gradient in any trainable parameter")
            norm = gradient_norm(gradients)
            means["grad_norm"] = float(norm)
            finite = math.isfinite(means["grad_norm"])
            if finite:
                if self.settings.clip_norm is not None:
                    nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
                self.optimizer.step()
                self._updates += 1
                self._average()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    @torch.no_grad()
    def _average(self) -> None:
        if self.ema is None or self.settings.ema_decay is None:
            return
        for name, average in self.ema.items():
            parameter = self.parameters[name].detach().to(average.dtype)
            average.lerp_(parameter, 1 - self.settings.ema_decay)

    def _full(self, place: str, error: RuntimeError) -> str:
        """What to say about a full device; drops the gradients and what the error holds on to."""
        step = self.result.step + 1
        device = next(iter(self.parameters.values())).device
        live = live_bytes(
            device,
            self.model,
            self.optimizer,
            average=self.ema or {},
            others=self.objectives,
        )
        first = str(error).partition("\n")[0]
        lines = [f"out of memory in {place}, step {step}: {first}", *memory_report(device, live)]
        # The frames of the traceback hold the activations of the forward that failed.
        traceback.clear_frames(error.__traceback__)
        self.optimizer.zero_grad(set_to_none=True)
        if self.advise is not None:
            try:
                lines.append(self.advise())
            except Exception as failure:  # noqa: BLE001 - the report matters more than the advice
                lines.append(f"(no advice: {failure})")
        return "\n".join(lines)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[list[signal.Signals]]:
        """Collect SIGINT and SIGTERM instead of dying; a second one finds its usual handler."""
        received: list[signal.Signals] = []
        before: dict[signal.Signals, Any] = {}

        def restore() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def receive(number: int, frame: object) -> None:
            received.append(signal.Signals(number))
            restore()

        # An in-memory run has nothing to save, and only the main thread may install handlers.
        if self.folder is not None and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, receive)
        try:
            yield received
        finally:
            restore()

    def _bar(self) -> Any:
        if not self.progress:
            return _NoBar()
        return need("tqdm").tqdm(
            disable=None,
            initial=self.result.step,
            total=self.settings.steps,
            unit="step",
            desc="train",
        )


class _NoBar:
    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set_postfix(self, *_: object, **__: object) -> None:
        pass

    def update(self) -> None:
        pass
