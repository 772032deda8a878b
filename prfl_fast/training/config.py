"""Configuration and result of a training run."""

import signal
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from prfl_fast.memory.optimizers import GRADIENT_DTYPES, KINDS, GradientDtype, OptimizerKind
from prfl_fast.training.schedules import SCHEDULES, ScheduleName
from prfl_fast.utils.checks import (
    check,
    check_choice,
    check_count,
    check_positive,
    check_seed,
    is_number,
    make_fields_plain,
)


@dataclass(frozen=True)
class TrainConfig:
    """Configure optimizer, learning-rate schedule and checkpoints of a run.

    The defaults are those of PRFL (arXiv 2511.21541) except for ``gradient_accumulation_steps``.

    Attributes:
        steps: total number of optimizer steps per objective.
        optimizer, gradient_dtype: see :func:`prfl_fast.memory.optimizers.make_optimizer`.
        learning_rate: rate after a linear warmup over ``warmup_steps`` steps.
        schedule: course of the rate after the warmup, see
            :func:`prfl_fast.training.schedules.schedule_factor`. A run that resumes must repeat
            ``steps`` unless it is ``"constant"``.
        betas, eps, weight_decay: constants of AdamW.
        max_grad_norm: limit for the norm of all gradients together; None turns clipping off.
        clip: gradients whose norm is limited: ``"all"``, or ``"blocks"``, those of a reward model
            without pool and head.
        head_learning_rate: learning rate of a reward model's pool and head; None is
            ``learning_rate``.
        gradient_accumulation_steps: micro-batches per optimizer step.
        ema_decay: decay of the running average of the trainable parameters; None keeps no average.
        seed: seed of the CPU generator that all objectives draw from.
        save_every: steps between checkpoints; 0 saves at the end only.
        save_async: write the checkpoints of sharded weights, other than those of the best and the
            last step, in a thread while the training goes on.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        wandb: log to Weights & Biases as well; a run without a folder does not.

    Raises:
        ValueError: if a number is out of range, or a choice is unknown.
    """

    steps: int
    optimizer: OptimizerKind = "adamw"
    gradient_dtype: GradientDtype = "parameter"
    learning_rate: float = 5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float | None = 1.0
    clip: Literal["all", "blocks"] = "all"
    head_learning_rate: float | None = None
    warmup_steps: int = 0
    schedule: ScheduleName = "constant"
    gradient_accumulation_steps: int = 1
    ema_decay: float | None = None
    seed: int = 0
    save_every: int = 0
    save_async: bool = False
    keep_last: int = 2
    wandb: bool = False

    # A resumed run may change these fields, because they do not affect the steps already taken.
    # The number of steps does if there is a schedule.
    FREE = ("steps", "save_every", "save_async", "keep_last", "wandb")

    def __post_init__(self) -> None:
        make_fields_plain(self)  # a checkpoint is read with weights_only, which takes no numpy
        for name in ("steps", "gradient_accumulation_steps"):
            check_count(name, getattr(self, name))
        for name in ("warmup_steps", "save_every", "keep_last"):
            check_count(name, getattr(self, name), least=0)
        for name in ("learning_rate", "eps", "weight_decay"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, name, value, "a number of at least 0")
        for name in ("max_grad_norm", "ema_decay", "head_learning_rate"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check_choice("optimizer", self.optimizer, KINDS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_seed(self.seed)
        check_choice("clip", self.clip, ("all", "blocks"))
        check((self.ema_decay or 0) < 1, "ema_decay", self.ema_decay, "a number below 1")
        check_choice("gradient_dtype", self.gradient_dtype, GRADIENT_DTYPES)

    def fixed(self) -> dict[str, Any]:
        """Return the settings that a resumed run must repeat."""
        free = (*self.FREE, "schedule") if self.schedule == "constant" else self.FREE[1:]
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class RunIdentity:
    """Describe a run, so that a resumed one notices what has changed.

    Attributes:
        settings: plain values that a resumed run must repeat.
        inputs: plain values that tell the data and models apart (numbers of samples, digests). A
            run that resumes with other ones is refused.
        accept_changed_inputs: resume with other ``inputs``, and log what differs.
    """

    settings: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    accept_changed_inputs: bool = False


@dataclass
class TrainResult:
    """Outcome of a run.

    Attributes:
        step: steps taken since the run began.
        history: one record per step taken by this process, as in the log.
        skipped: updates skipped since the run's first step because of non-finite values.
        stopped_by: the signal that ended the run early, or None.
    """

    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    stopped_by: signal.Signals | None = None
