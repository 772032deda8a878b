"""The rollout engine: how the steps without gradient are computed.

Most of a reward-feedback step is its rollout (in PRFL with 40 steps and one gradient point, about
19 of 24 forwards). What all its steps share, such as keys and values of the text, is computed once
and dropped before the gradient step. That is exact. Inexact ways, 8-bit arithmetic and fewer steps,
are chosen with :class:`RolloutPrecision` and watched: on a sample of trajectories an exact rollout
runs beside, and past a limit the engine becomes exact for good.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast._checks import check_count, check_positive, is_number
from prfl_fast.adapters import Conditions, find_adapter
from prfl_fast.model_call import ModelCall, Velocity, check_transformer, model_of
from prfl_fast.rollout_block import How, RolloutModel, Unsupported

logger = logging.getLogger(__name__)

# Positions · width above which a block is large enough to keep a GPU busy between launches: a
# quarter as many numbers of two bytes, 16 MiB, take about 10 µs to pass through at 3 TB/s, and a
# launch takes as long. An assumption, not a measurement.
LARGE_BLOCK = 2**25

Interval = tuple[float, float]


@dataclass(frozen=True)
class RolloutPrecision:
    """Where a rollout may be inexact, and how that is watched. Steps with gradient stay exact.

    Attributes:
        linears: noise levels (lowest, highest) between which linear layers run in FP8 (e4m3, 8
            bits); None: nowhere. ``(0, 1)`` is everywhere.
        attention: the same for self-attention.
        stride: solver steps of the schedule that one step of the rollout covers; the schedule stays
            whole around gradient steps.
        drift_limit: the relative L2 distance from an exact rollout that is allowed; past it, the
            engine becomes exact for good. None: any.
        check_every: trajectories from one check to the next; the first is always checked. A check
            costs an exact rollout. Of a model with dropout at work it sees other masks, too.

    Raises:
        ValueError: an interval outside 0 … 1, a stride or check_every that is no positive integer,
            or a limit that is no positive number.
    """

    linears: Interval | None = None
    attention: Interval | None = None
    stride: int = 1
    drift_limit: float | None = None
    check_every: int = 10

    def __post_init__(self) -> None:
        for name in ("linears", "attention"):
            value = getattr(self, name)
            if value is None:
                continue
            pair = isinstance(value, (tuple, list)) and len(value) == 2
            if not pair or not all(map(is_number, value)) or not 0 <= value[0] <= value[1] <= 1:
                raise ValueError(
                    f"{name} is {value!r}, expected noise levels (lowest, highest) in "
                    "0 … 1, or None"
                )
            object.__setattr__(self, name, (float(value[0]), float(value[1])))
        check_count("stride", self.stride)
        check_count("check_every", self.check_every)
        if self.drift_limit is not None:
            check_positive("drift_limit", self.drift_limit)

    @property
    def fp8(self) -> bool:
        """Whether anything runs in FP8."""
        return self.linears is not None or self.attention is not None


@dataclass(frozen=True)
class RolloutSettings:
    """How the steps without gradient are computed.

    Attributes:
        cache: compute once what all steps of a rollout share. Changes no bit.
        merge_lora: add low-rank adapters to the weights, block by block as they run; stored weights
            are not touched. Equals the unmerged result to rounding: of a bfloat16 weight a change
            below half a unit in its last place is rounded away, so young adapters may have less
            effect on the rollout than on the gradient step.
        compile: ``torch.compile`` of the blocks; ``"auto"`` where :func:`why_not_compiled` finds
            nothing against it.
        precision: what may be inexact; None: nothing.

    Raises:
        ValueError: another value of ``compile`` or ``precision``; without ``cache`` what needs it.
    """

    cache: bool = True
    merge_lora: bool = False
    compile: Literal["auto", "on", "off"] = "auto"
    precision: RolloutPrecision | None = None

    def __post_init__(self) -> None:
        if self.compile not in ("auto", "on", "off"):
            raise ValueError(f"compile is {self.compile!r}, expected 'auto', 'on' or 'off'")
        if not isinstance(self.precision, RolloutPrecision | None):
            raise ValueError(
                f"precision is {self.precision!r}, expected a RolloutPrecision or None"
            )
        if not self.cache and self.needs_model:
            raise ValueError(
                "cache is False, expected True with merge_lora, compile='on' or FP8: they are "
                "parts of the same way to run the model"
            )

    @property
    def needs_model(self) -> bool:
        """Whether something was asked for that the model's own forward cannot do."""
        fp8 = self.precision is not None and self.precision.fp8
        return self.merge_lora or self.compile == "on" or fp8


def why_not_compiled(
    mode: Literal["auto", "on", "off"],
    *,
    device: str,
    positions: int,
    width: int,
    same_shape: bool,
) -> str | None:
    """Why blocks are not compiled; None if they are.

    Compiling fuses what is left between the kernels and takes the launches off a slow host. It
    costs time for each new shape, and large blocks do not wait for launches.

    Args:
        mode: of the settings; ``"on"`` compiles whatever the rest says.
        device: type of the latents' device.
        positions: latent positions of one call, B·F·H·W.
        width: D of the model.
        same_shape: whether this engine compiled for no other shapes before.
    """
    if mode == "on":
        return None
    if mode == "off":
        return "compile is 'off'"
    if device != "cuda":
        return f"the latents are on {device}, where no bit must change and launches cost little"
    if positions * width > LARGE_BLOCK:
        return (
            f"{positions} positions of width {width} keep the GPU busy without (above "
            f"{LARGE_BLOCK} together)"
        )
    if not same_shape:
        return "these latents or conditions have other shapes than those compiled for before"
    return None


class RolloutSession:
    """A model opened for one run of a trajectory: holds the caches, and goes with them.

    Args:
        open: opens the model once for each branch, its blocks compiled or not.
        steps: of the solver, by their position among the timesteps it is opened with.
    """

    def __init__(
        self,
        engine: "RolloutEngine",
        open: Callable[[bool], list[RolloutModel]],
        steps: Sequence[int],
        compiled: bool,
    ) -> None:
        self._engine, self._open, self._compiled = engine, open, compiled
        self._models = open(compiled)
        self._positions = {step: position for position, step in enumerate(steps)}

    def velocity(
        self, branch: int, x: torch.Tensor, step: int, sigma: float | None
    ) -> torch.Tensor:
        """The model's velocity at ``x`` at a step of the solver, under the conditions of a branch.

        Args:
            sigma: the noise level, by which precision is chosen; None: exact.
        """
        how: dict[str, How] = {} if sigma is None else self._engine.choices(sigma)
        try:
            with self._engine.context():
                return self._models[branch].velocity(x, self._positions[step], **how)
        except RuntimeError as error:
            if not self._compiled or not self._engine.gives_up_compiling(error):
                raise
        self._compiled = False
        self._models = self._open(False)
        return self.velocity(branch, x, step, sigma)

    def notes(self) -> list[str]:
        """What the models have to say about layers that stay as they are."""
        return [note for model in self._models for note in model.notes]


class RolloutEngine:
    """Runs the steps without gradient of one model's trajectories; lives as long as its training.

    Give it to :class:`prfl_fast.trajectory.Trajectory`. Between runs it holds no tensor.

    Args:
        transformer: a supported model, a :class:`prfl_fast.model_call.ModelCall`, or a function,
            for which only fewer steps can be taken.
        settings: see there.

    Attributes:
        fallen_back: a check found more drift than allowed, and rollouts are exact since.
        trajectories: how many trajectories have had steps of the inexact kind.
        drift: what the last check found, by solver step; None before the first.
        notes: why things that the settings have are not done. Each is said once: as a warning where
            the user asked for the thing, as information of this module's logger otherwise.

    Raises:
        TypeError: an unsupported model.
    """

    def __init__(
        self,
        transformer: nn.Module | ModelCall | Velocity,
        settings: RolloutSettings | None = None,
    ) -> None:
        check_transformer(transformer)
        self.settings = RolloutSettings() if settings is None else settings
        self.model = model_of(transformer)
        self.context: Callable[[], contextlib.AbstractContextManager[Any]] = (
            transformer.context if isinstance(transformer, ModelCall) else contextlib.nullcontext
        )
        self._call_precision = transformer.precision if isinstance(transformer, ModelCall) else None
        self.fallen_back = False
        self.trajectories = 0
        self.drift: dict[int, float] | None = None
        self.notes: list[str] = []
        self._supported = self.model is not None
        self._compiled_shapes: Any = None
        self._compiler_fails = False

    def runs(self, transformer: object) -> bool:
        """Whether the engine was made for this model, called in this precision."""
        precision = transformer.precision if isinstance(transformer, ModelCall) else None
        return model_of(transformer) is self.model and precision == self._call_precision

    @property
    def _precision(self) -> RolloutPrecision:
        if self.settings.precision is None or self.fallen_back:
            return RolloutPrecision()
        return self.settings.precision

    @property
    def stride(self) -> int:
        """Steps of the schedule that a step of the next rollout covers."""
        return self._precision.stride

    @property
    def inexact(self) -> bool:
        """Whether the next rollout has steps that are not exact."""
        return self.stride > 1 or (self._precision.fp8 and self._supported)

    def choices(self, sigma: float) -> dict[str, How]:
        """How linears and attention run at a noise level."""
        intervals = {"linears": self._precision.linears, "attention": self._precision.attention}
        return {
            name: "fp8" if interval and interval[0] <= sigma <= interval[1] else "exact"
            for name, interval in intervals.items()
        }

    def due(self) -> bool:
        """Whether an exact trajectory is to run beside the next one of the inexact kind."""
        return self.trajectories % self._precision.check_every == 0

    @contextlib.contextmanager
    def open(
        self,
        x: torch.Tensor,
        timesteps: Mapping[int, torch.Tensor],
        branches: Sequence[Conditions],
    ) -> Iterator[RolloutSession | None]:
        """Caches for some steps of a trajectory; within, a session, or None if there can be none.

        Args:
            x: latents of a model call, ``[B, C, F, H, W]``.
            timesteps: ``[B]`` of each step that may be taken.
            branches: conditions of the calls at each step.
        """
        session = self._session(x, timesteps, branches) if timesteps else None
        try:
            yield session
        finally:
            for note in session.notes() if session is not None else ():
                self._say(note)

    def _session(
        self,
        x: torch.Tensor,
        timesteps: Mapping[int, torch.Tensor],
        branches: Sequence[Conditions],
    ) -> RolloutSession | None:
        if self.model is None:
            self._say(
                "rollouts call the transformer as it is: it is a function, not a supported model "
                "or a ModelCall of one"
            )
            return None
        if not self.settings.cache:
            return None
        model, adapter = self.model, find_adapter(self.model)

        def open(compiled: bool) -> list[RolloutModel]:
            with self.context():
                return [
                    adapter.open_rollout(
                        model,
                        x,
                        list(timesteps.values()),
                        conditions,
                        merge_lora=self.settings.merge_lora,
                        compile=compiled,
                    )
                    for conditions in branches
                ]

        compiled = self._compiles(x, branches, adapter.hidden_size(model))
        try:
            session = RolloutSession(self, open, list(timesteps), compiled)
        except Unsupported as reason:
            self._supported = False
            self._say(f"rollouts call the model as it is: {reason}")
            return None
        self._supported = True
        return session

    def _compiles(self, x: torch.Tensor, branches: Sequence[Conditions], width: int) -> bool:
        shapes = [x.shape, *({k: v.shape for k, v in c.items()} for c in branches)]
        reason = why_not_compiled(
            self.settings.compile,
            device=x.device.type,
            positions=x.numel() // x.shape[1],
            width=width,
            same_shape=self._compiled_shapes in (None, shapes),
        )
        if reason is None and self._compiler_fails:
            return False
        if reason is None:
            self._compiled_shapes = shapes
        elif self.settings.compile != "off":
            self._say(f"the rollout's blocks are not compiled: {reason}", asked=False)
        return reason is None

    def gives_up_compiling(self, error: RuntimeError) -> bool:
        """Whether an error is the compiler's and compiling was this engine's choice alone.

        If so, it does not try again.
        """
        foreign = any(
            kind.__module__.startswith(("torch._dynamo", "torch._inductor"))
            for kind in type(error).__mro__
        )
        if self.settings.compile != "auto" or not foreign:
            return False
        self._compiler_fails = True
        first = str(error).strip().splitlines()[:1]
        self._say(f"the rollout's blocks are not compiled: {type(error).__name__}: {first}")
        return True

    def _say(self, note: str, *, asked: bool | None = None) -> None:
        if note in self.notes:
            return
        self.notes.append(note)
        if self.settings.needs_model if asked is None else asked:
            warnings.warn(note, stacklevel=2)
        else:
            logger.info(note)

    def refuses(self, drift: Mapping[int, float], sigmas: Sequence[float]) -> bool:
        """Take note of a check's drift by step; whether it is past the limit, from now on for good.

        Args:
            sigmas: noise level before every step.
        """
        self.drift = dict(drift)
        step, found = list(drift.items())[-1]
        limit = self._precision.drift_limit
        # A drift that is not finite is past every limit.
        if limit is None or found <= limit:
            return False
        self.fallen_back = True
        figures = ", ".join(f"{value:.3g} at step {step}" for step, value in drift.items())
        warnings.warn(
            f"the rollout's relative distance from an exact one is {found:.3g} at step {step} "
            f"(sigma {sigmas[step]:.3g}), past drift_limit {limit:g}: this rollout goes on from "
            f"the exact latents, and all after it are exact. Found: {figures}. Narrow the "
            "intervals of RolloutPrecision or raise its drift_limit, and start anew",
            RuntimeWarning,
            stacklevel=2,
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to check, and to be exact, where this one would."""
        return {"trajectories": self.trajectories, "fallen_back": self.fallen_back}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: other entries than those.
        """
        if set(state) != {"trajectories", "fallen_back"}:
            raise ValueError(
                f"the rollout engine's state has {sorted(state)}, expected fallen_back and "
                "trajectories"
            )
        self.trajectories = int(state["trajectories"])
        self.fallen_back = bool(state["fallen_back"])
