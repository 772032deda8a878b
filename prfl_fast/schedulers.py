"""Flow-matching samplers: Euler and UniPC, and the noise schedule of supervised training.

A latent at noise level σ is ``x_σ = (1-σ)·x0 + σ·ε``, the model predicts the velocity ``v = ε -
x0``, and its timestep is ``1000·σ``. Both samplers speak the diffusers protocol (``set_timesteps``,
``timesteps``, ``sigmas``, ``step``) and follow the conventions of
``FlowMatchEulerDiscreteScheduler`` and ``UniPCMultistepScheduler(prediction_type="flow_prediction",
use_flow_sigmas=True)``, so one may replace the other.

What differs is the arithmetic. An update is linear in the latents, the velocity and the history, so
its coefficients are known before the rollout starts: they are Python floats (float64), and each
update is one ``flow_step``, rounded once to the latents' dtype and differentiable in every tensor.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from prfl_fast._checks import check_count
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._checks import describe
from prfl_fast.unipc import unipc_updates

# UniPC's log-SNR is infinite at σ = 1; diffusers starts this much below, and so do we.
_UNIPC_SIGMA_GAP = 1e-6


class StepOutput(NamedTuple):
    """What ``step`` returns: a 1-tuple that also answers to ``.prev_sample``."""

    prev_sample: torch.Tensor


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _linspace(first: float, last: float, count: int) -> list[float]:
    """``count`` evenly spaced floats, ends included; numpy's rounding, as truncation follows."""
    if count == 1:
        return [first]
    spacing = (last - first) / (count - 1)
    return [first + i * spacing for i in range(count - 1)] + [last]


def training_sigmas(shift: float = 5.0, num: int = 1000) -> torch.Tensor:
    """The noise levels of supervised training, from 1 down: float32 ``[num]``, timestep ``1000·σ``.

    Evenly spaced from 1 to 0 with the 0 left out, then shifted by ``σ ← shift·σ / (1 +
    (shift-1)·σ)``: the schedule from which HY-Video-PRFL draws σ uniformly, for the generator's SFT
    loss and for the reward model.

    Raises:
        ValueError: ``shift`` is not positive, or ``num`` is not a positive integer.
    """
    _check_shift(shift)
    check_count("num", num)
    sigmas = [_shifted(1 - i / num, shift) for i in range(num)]
    return torch.tensor(sigmas, dtype=torch.float64).to(torch.float32)


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(
            f"shift is {shift!r}, expected a positive number (Wan uses 5.0, or 3.0 at 480p)"
        )


class _FlowScheduler:
    """Schedule, step counter and argument checks shared by the samplers."""

    def __init__(self, shift: float, num_train_timesteps: int) -> None:
        _check_shift(shift)
        check_count("num_train_timesteps", num_train_timesteps)
        self.shift = float(shift)
        self.num_train_timesteps = num_train_timesteps
        self.timesteps = torch.empty(0)
        self.sigmas = torch.empty(0)
        self._sigmas: tuple[float, ...] = ()
        self._times: tuple[float, ...] = ()
        self._step_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Index of the step that comes next; ``None`` before the first, if none was named."""
        return self._step_index

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Start a trajectory of ``num_inference_steps`` steps.

        Sets ``timesteps`` ``[num_inference_steps]`` on ``device`` and ``sigmas``
        ``[num_inference_steps + 1]``, float32 on the CPU, the last one 0; forgets all history.

        Raises:
            ValueError: ``num_inference_steps`` is not a positive integer.
        """
        check_count("num_inference_steps", num_inference_steps)
        sigmas, timesteps = self._schedule(num_inference_steps)
        self.sigmas = torch.tensor([*sigmas, 0.0], dtype=torch.float64).to(torch.float32)
        self.timesteps = timesteps.to(device) if device is not None else timesteps
        # The update coefficients start from the float32 levels that diffusers uses, not from their
        # unrounded values: near σ = 1 the rounding moves 1-σ by 1 %, and with it the log-SNR.
        self._sigmas = tuple(self.sigmas.double().tolist())
        self._times = tuple(float(t) for t in timesteps.tolist())
        self._step_index = None
        self._reset()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Let the trajectory that :meth:`set_timesteps` started begin at step ``begin_index``.

        Raises:
            ValueError: called before ``set_timesteps``, or no step of the schedule.
        """
        if not 0 <= begin_index < len(self._times):
            raise ValueError(
                f"begin_index is {begin_index!r}, expected a step of the schedule, which has "
                f"{len(self._times)}; set_timesteps makes one"
            )
        self._step_index = begin_index

    def restrict(self, indices: Sequence[int]) -> None:
        """Take fewer steps: of the schedule, only the steps ``indices`` and their noise levels.

        Each then leads to the next one's level, the last to 0, with the coefficients of that
        distance. Starts the trajectory anew.

        Raises:
            ValueError: called before ``set_timesteps``, or indices that are not increasing steps of
                the schedule.
        """
        kept, count = list(indices), len(self._times)
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < count:
            raise ValueError(
                f"indices is {kept}, expected increasing steps of the schedule, which has {count}; "
                "set_timesteps makes one"
            )
        self.sigmas = self.sigmas[[*kept, count]]
        self.timesteps = self.timesteps[kept]
        self._sigmas = tuple(self._sigmas[i] for i in (*kept, count))
        self._times = tuple(self._times[i] for i in kept)
        self._step_index = None
        self._reset()

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        return_dict: bool = False,
    ) -> StepOutput:
        """Move ``sample`` from ``timestep`` to the next noise level.

        Args:
            model_output: the velocity at ``sample``, of the same shape, any floating dtype.
            timestep: the entry of ``timesteps`` at which the velocity was computed, a number or a
                one-element tensor. The first call may start anywhere on the schedule; after it they
                follow in order.
            sample: the latents, e.g. ``[B, C, F, H, W]``.
            return_dict: accepted for diffusers' sake; the output unpacks as a tuple and has
                ``prev_sample`` either way.

        Returns:
            ``(prev_sample,)`` in ``sample``'s dtype, differentiable in ``model_output``, ``sample``
            and the history.

        Raises:
            ValueError: called before ``set_timesteps`` or past the last step, a timestep that is
                not the next one, tensors that do not match each other or the trajectory so far.
        """
        name = type(self).__name__
        if not self._sigmas:
            raise ValueError(f"{name}.step was called before set_timesteps(num_inference_steps)")
        for argument, tensor in (("model_output", model_output), ("sample", sample)):
            if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
                raise ValueError(
                    f"{name}.step: {argument} is {describe(tensor)}, expected a floating-point "
                    "tensor"
                )
        if model_output.shape != sample.shape or model_output.device != sample.device:
            raise ValueError(
                f"{name}.step: model_output is {describe(model_output)}, expected the shape and "
                f"device of sample, {describe(sample)}"
            )
        index = self._index(timestep)
        prev_sample = self._advance(index, model_output, sample)
        self._step_index = index + 1
        return StepOutput(prev_sample)

    def _index(self, timestep: float | torch.Tensor) -> int:
        name = type(self).__name__
        if isinstance(timestep, torch.Tensor) and timestep.numel() != 1:
            raise ValueError(
                f"{name}.step: timestep is {describe(timestep)}, expected one number for the "
                "whole batch"
            )
        time = float(timestep)
        if self._step_index is None:
            if time not in self._times:
                raise ValueError(
                    f"{name}.step: timestep {time} is not in the schedule; pass an entry of "
                    "timesteps"
                )
            return self._times.index(time)
        if self._step_index == len(self._times):
            raise ValueError(
                f"{name}.step was called after the last of {len(self._times)} steps; "
                "set_timesteps starts a new trajectory"
            )
        if time != self._times[self._step_index]:
            raise ValueError(
                f"{name}.step: timestep is {time}, expected {self._times[self._step_index]}, step "
                f"{self._step_index} of {len(self._times)}; set_timesteps starts a new trajectory"
            )
        return self._step_index

    def _schedule(self, count: int) -> tuple[list[float], torch.Tensor]:
        """The ``count`` noise levels before the final 0, and the timesteps given to the model."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Forget the history of the last trajectory."""

    def _advance(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class FlowEuler(_FlowScheduler):
    """First-order sampler, ``x_{i+1} = x_i + (σ_{i+1} - σ_i)·v_i``.

    Schedule and updates equal diffusers' ``FlowMatchEulerDiscreteScheduler(num_train_timesteps,
    shift)``, whose levels are spaced evenly between the shifted ends of the training schedule and
    then shifted once more. ``timesteps`` are float32, ``1000·σ``. Unlike diffusers, float64 latents
    are not rounded to float32 on the way.

    Args:
        shift: moves the steps towards high noise; 1 leaves them even.
        num_train_timesteps: timesteps per unit of σ.
    """

    def __init__(self, shift: float = 5.0, num_train_timesteps: int = 1000) -> None:
        super().__init__(shift, num_train_timesteps)
        # In float32, as diffusers derives the ends: the last timesteps depend on that rounding.
        ends = torch.tensor([num_train_timesteps, 1], dtype=torch.float32) / num_train_timesteps
        ends = self.shift * ends / (1 + (self.shift - 1) * ends)
        self._ends: tuple[float, float] = (ends[0].item(), ends[1].item())

    def _schedule(self, count: int) -> tuple[list[float], torch.Tensor]:
        scale = self.num_train_timesteps
        even = _linspace(self._ends[0] * scale, self._ends[1] * scale, count)
        sigmas = [_shifted(t / scale, self.shift) for t in even]
        return sigmas, torch.tensor(sigmas, dtype=torch.float64).to(torch.float32) * scale

    def _advance(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return flow_step([sample, velocity], [1.0, self._sigmas[index + 1] - self._sigmas[index]])


class FlowUniPC(_FlowScheduler):
    """UniPC, multistep predictor and corrector of order 1, 2 or 3 (Zhao et al., arXiv 2302.04867).

    Its variant with ``B(h) = e^h - 1`` ("bh2"). Equals diffusers'
    ``UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
    flow_shift=shift, solver_order=order)``: data prediction, lower orders at both ends of the
    trajectory. ``timesteps`` are ``1000·σ`` truncated to int64, as there.

    Step ``i`` first corrects ``x_i`` with the velocity found there and then predicts ``x_{i+1}``.
    Both are linear, so ``x_{i+1}`` is one combination of ``x_i``, ``v_i``, the previous corrected
    latents and the earlier predictions of x0; ``v_i`` enters it through the corrector and through
    the predictor. ``order + 1`` tensors of ``sample``'s size are kept between steps, in its dtype.

    Args:
        shift: moves the steps towards high noise; 1 leaves them even.
        order: order of the predictor.
        num_train_timesteps: timesteps per unit of σ.
    """

    def __init__(self, shift: float = 5.0, order: int = 2, num_train_timesteps: int = 1000) -> None:
        super().__init__(shift, num_train_timesteps)
        if order not in (1, 2, 3):
            raise ValueError(f"order is {order!r}, expected 1, 2 or 3")
        self.order = order
        self._reset()

    def _schedule(self, count: int) -> tuple[list[float], torch.Tensor]:
        scale = self.num_train_timesteps
        sigmas = [_shifted(s, self.shift) for s in _linspace(1, 1 / scale, count + 1)[:-1]]
        if abs(sigmas[0] - 1) < _UNIPC_SIGMA_GAP:
            sigmas[0] -= _UNIPC_SIGMA_GAP
        return sigmas, torch.tensor([int(s * scale) for s in sigmas], dtype=torch.int64)

    def _reset(self) -> None:
        self._previous: torch.Tensor | None = None
        self._predictions: list[torch.Tensor] = []
        self._updates = unipc_updates(self._sigmas, self.order) if self._sigmas else ()

    def _advance(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        tensors = [sample, velocity]
        if self._previous is not None:
            if self._previous.shape != sample.shape or self._previous.device != sample.device:
                raise ValueError(
                    f"{type(self).__name__}.step: sample is {describe(sample)}, but this "
                    f"trajectory began with {describe(self._previous)}; set_timesteps starts a "
                    "new one"
                )
            tensors += [self._previous, *self._predictions]
        update = self._updates[index][len(self._predictions)]
        prev_sample = flow_step(tensors, list(update.advance))
        if index + 1 < len(self._updates):
            if update.correct is not None:
                self._previous = flow_step(tensors, list(update.correct))
            else:
                self._previous = sample
            prediction = flow_step([sample, velocity], [1.0, -self._sigmas[index]])
            self._predictions = [prediction, *self._predictions][: self.order]
        return prev_sample


def detach_state(scheduler: Any) -> None:
    """Replace every tensor in a scheduler's state that carries a graph by its detached self.

    A multistep sampler keeps what earlier steps computed. After a step with gradient, this lets the
    trajectory go on from the same numbers without the graph. Works on the samplers here and on
    diffusers': attributes, and what lists, tuples, dicts and nested schedulers among them hold.
    Tensors, containers and nested schedulers are replaced, not changed.
    """
    state = vars(scheduler)
    for name, value in list(state.items()):
        state[name] = _detached(value)


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) is dict:
        return {key: _detached(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_detached(item) for item in value)
    if hasattr(value, "set_timesteps") and hasattr(value, "step"):
        value = copy.copy(value)
        detach_state(value)
    return value


def fresh_copy(scheduler: Any) -> Any:
    """A deep copy of a scheduler, without graph, for a rollout to step instead of the caller's.

    Raises:
        TypeError: no ``set_timesteps`` or ``step``.
        ValueError: a diffusers scheduler set up for another kind of prediction than the velocity.
    """
    if not (
        callable(getattr(scheduler, "set_timesteps", None))
        and callable(getattr(scheduler, "step", None))
    ):
        raise TypeError(
            f"scheduler is {type(scheduler).__name__}, expected FlowUniPC, FlowEuler or a "
            "diffusers flow scheduler (an object with set_timesteps and step)"
        )
    config = getattr(scheduler, "config", None)
    prediction = config.get("prediction_type") if isinstance(config, Mapping) else None
    if prediction not in (None, "flow_prediction"):
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has prediction_type={prediction!r}, but the "
            "model predicts a velocity; build it with prediction_type='flow_prediction' and "
            "use_flow_sigmas=True"
        )
    clone = copy.copy(scheduler)
    detach_state(clone)
    return copy.deepcopy(clone)


def start_trajectory(
    scheduler: Any, num_steps: int, start: int = 0
) -> tuple[Any, Sequence[torch.Tensor]]:
    """A fresh copy of ``scheduler`` set to ``num_steps``, and its timesteps, to pass to ``step``.

    The timesteps are 0-d tensors on the CPU, so that neither this package's samplers nor diffusers'
    wait for the device at every step. The first step will be step ``start``.

    Raises:
        ValueError: the scheduler takes more or fewer model calls than ``num_steps``.
    """
    scheduler = fresh_copy(scheduler)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.cpu()
    if len(timesteps) != num_steps:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} makes {len(timesteps)} model calls for "
            f"{num_steps} steps; one call per step is expected"
        )
    # Truncated timesteps may repeat, so a start inside the schedule is better said than searched.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler, list(timesteps.unbind())


def schedule_sigmas(scheduler: Any, timesteps: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Noise level before every step and after the last: ``len(timesteps) + 1`` floats.

    From the scheduler's ``sigmas``; of a scheduler without them, the timesteps divided by its
    ``num_train_timesteps`` (1000 if it names none), and 0 at the end.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        levels = [float(sigma) for sigma in sigmas]
    else:
        config = getattr(scheduler, "config", None)
        scale = config.get("num_train_timesteps", 1000) if isinstance(config, Mapping) else 1000
        levels = [float(t) / scale for t in timesteps]
    return tuple([*levels, 0.0][: len(timesteps) + 1])


def keep_levels(scheduler: Any, indices: Sequence[int]) -> None:
    """:meth:`FlowEuler.restrict`, or a message for schedulers that have none.

    Raises:
        ValueError: a foreign scheduler.
    """
    if not isinstance(scheduler, _FlowScheduler):
        raise ValueError(
            f"scheduler is {type(scheduler).__name__}, expected FlowUniPC or FlowEuler for a "
            "rollout with stride above 1: only they can leave out levels of their schedule"
        )
    scheduler.restrict(indices)


def strided_steps(start: int, num_steps: int, stride: int, visit: Sequence[int]) -> list[int]:
    """Steps of a rollout that takes every ``stride``-th, from ``start`` to ``num_steps``, both
    included.

    It lands on each step of ``visit`` and on the one after, and counts anew from there.
    """
    landings = sorted({start, num_steps, *visit, *(step + 1 for step in visit)})
    landings = [step for step in landings if step >= start]
    steps = [
        step
        for here, there in zip(landings, landings[1:], strict=False)
        for step in range(here, there, stride)
    ]
    return [*steps, num_steps]
