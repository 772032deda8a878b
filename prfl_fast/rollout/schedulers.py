"""Flow-matching samplers (Euler and UniPC) and the noise schedule of supervised training.

A latent at noise level σ is ``x_σ = (1-σ)·x0 + σ·ε``, the model predicts the velocity ``v = ε -
x0``, and its timestep is ``1000·σ``. Both samplers have the interface and conventions of their
diffusers counterparts. Each update is one ``flow_step``, rounded once to the latents' dtype and
differentiable in every tensor.
"""

import contextlib
import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch

from prfl_fast.kernels import flow_step
from prfl_fast.kernels.runtime.checks import describe, require_float
from prfl_fast.rollout.unipc_coefficients import unipc_updates
from prfl_fast.utils.checks import check, check_choice, check_count, check_type, is_number, plain

Schedule = Literal["wan", "diffusers"]

# UniPC's log-SNR is infinite at σ = 1, so that schedules start this much below, as in diffusers.
_UNIPC_SIGMA_GAP = 1e-6
# Attributes of a schedule that hold no tensors. Searching the coefficients of 1000
# steps for tensors takes 4.5 ms.
_CONSTANTS = ("_sigmas", "_times", "_updates")
_NO_SCHEDULE = "set_timesteps makes a schedule."
_NEW = "set_timesteps starts a new trajectory."


class StepOutput(NamedTuple):
    """Result of ``step``: a 1-tuple with the attribute ``prev_sample``."""

    prev_sample: torch.Tensor


def _shifted(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


def _linspace(first: float, last: float, count: int) -> list[float]:
    """Return ``count`` evenly spaced floats, ends included, rounded as numpy rounds them."""
    if count == 1:
        return [first]
    spacing = (last - first) / (count - 1)
    return [first + i * spacing for i in range(count - 1)] + [last]


def _float32(values: list[float]) -> torch.Tensor:
    """Return numbers rounded to float32, on the CPU whatever the default device."""
    return torch.tensor(values, dtype=torch.float64, device="cpu").to(torch.float32)


def training_sigmas(shift: float = 5.0, num: int = 1000) -> torch.Tensor:
    """Return the noise levels of supervised training from 1 down, float32 ``[num]``.

    The levels are ``1 - i/num``, shifted by ``σ ← shift·σ / (1 + (shift-1)·σ)``. HY-Video-PRFL
    draws σ uniformly from them for SFT and the reward model.

    Raises:
        ValueError: if ``shift`` is not positive, or ``num`` is not a positive integer.
    """
    _check_shift(shift)
    check_count("num", num)
    return _float32([_shifted(1 - i / num, shift) for i in range(num)])


def _check_shift(shift: float) -> None:
    ok = is_number(shift) and shift > 0
    check(ok, "shift", shift, "a positive number (Wan uses 5.0, or 3.0 at 480p)")


class _FlowScheduler:
    """Share the schedule, step counter and argument checks of the samplers."""

    def __init__(self, shift: float, num_train_timesteps: int, integer_timesteps: bool) -> None:
        _check_shift(shift)
        check_count("num_train_timesteps", num_train_timesteps)
        check_type("integer_timesteps", integer_timesteps, bool)
        self.integer_timesteps = integer_timesteps
        self.shift = float(shift)
        self.num_train_timesteps = plain(num_train_timesteps)
        self.timesteps = self.sigmas = _float32([])
        self._sigmas: tuple[float, ...] = ()
        self._times: tuple[float, ...] = ()
        self._step_index: int | None = None

    @property
    def step_index(self) -> int | None:
        """Return the index of the next step; None before the first step without a begin index."""
        return self._step_index

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Start a trajectory of ``num_inference_steps`` steps without history.

        Set ``timesteps`` ``[num_inference_steps]`` on ``device`` and ``sigmas``
        ``[num_inference_steps + 1]``, float32 on the CPU, the last one 0. Raise ``ValueError`` if
        ``num_inference_steps`` is not a positive integer.
        """
        check_count("num_inference_steps", num_inference_steps)
        sigmas, timesteps = self.levels(plain(num_inference_steps))
        self.sigmas = _float32([*sigmas, 0.0])
        self.timesteps = timesteps.to(device) if device is not None else timesteps
        # The update coefficients start from the float32 levels that diffusers uses, not from their
        # unrounded values: near σ = 1 the rounding moves 1-σ by 1 %, and with it the log-SNR.
        self._sigmas = tuple(self.sigmas.double().tolist())
        self._times = tuple(float(t) for t in timesteps.tolist())
        self._step_index = None
        self._reset()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the trajectory at step ``begin_index``; raise ``ValueError`` if there is none."""
        count = len(self._times)
        expected = f"one of the schedule's {count} steps"
        check(0 <= begin_index < count, "begin_index", begin_index, expected, hint=_NO_SCHEDULE)
        self._step_index = begin_index

    def restrict(self, indices: Sequence[int]) -> None:
        """Keep only the steps ``indices`` of the schedule, and restart the trajectory.

        Each step then leads to the noise level of the next kept step, the last one to 0. Raise
        ``ValueError`` if ``indices`` are not increasing steps of the schedule.
        """
        kept, count = list(indices), len(self._times)
        ok = bool(kept) and kept == sorted(set(kept)) and 0 <= kept[0] <= kept[-1] < count
        expected = f"increasing ones of the schedule's {count} steps"
        check(ok, "indices", kept, expected, hint=_NO_SCHEDULE)
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
                one-element tensor. The first call may start anywhere; later ones follow in order.
            sample: the latents, e.g. ``[B, C, F, H, W]``.
            return_dict: ignored; diffusers has it.

        Returns:
            ``(prev_sample,)`` in ``sample``'s dtype, differentiable in ``model_output``, ``sample``
            and the history.

        Raises:
            ValueError: if there is no schedule, ``timestep`` is not the next one, or tensors do not
                match each other or the trajectory so far.
        """
        name = f"{type(self).__name__}.step"
        if not self._sigmas:
            raise ValueError(f"{name} was called before set_timesteps(num_inference_steps)")
        require_float(name, "model_output", model_output)
        require_float(name, "sample", sample)
        ok = model_output.shape == sample.shape and model_output.device == sample.device
        expected = f"the shape and device of sample, {describe(sample)}"
        check(ok, f"{name}: model_output", model_output, expected)
        index = self._index(f"{name}: timestep", timestep)
        prev_sample = self._advance(index, model_output, sample)
        self._step_index = index + 1
        return StepOutput(prev_sample)

    def _index(self, name: str, timestep: float | torch.Tensor) -> int:
        one = not isinstance(timestep, torch.Tensor) or timestep.numel() == 1
        check(one, name, timestep, "one number for the whole batch")
        time, index, count = float(timestep), self._step_index, len(self._times)
        if index is None:
            check(time in self._times, name, time, "an entry of timesteps")
            return self._times.index(time)
        check(index < count, name, time, f"no call after the last of {count} steps", hint=_NEW)
        expected = f"{self._times[index]}, step {index} of {count}"
        check(time == self._times[index], name, time, expected, hint=_NEW)
        return index

    def levels(self, count: int) -> tuple[list[float], torch.Tensor]:
        """Return the ``count`` noise levels before the final 0, and the model's timesteps."""
        raise NotImplementedError

    def _reset(self) -> None:
        """Forget the history of the last trajectory."""

    def _advance(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class FlowEuler(_FlowScheduler):
    """Sample by Euler's method, ``x_{i+1} = x_i + (σ_{i+1} - σ_i)·v_i``.

    Schedule and updates equal diffusers' ``FlowMatchEulerDiscreteScheduler(num_train_timesteps,
    shift)``, which applies the shift to the ends and then to the levels. ``timesteps`` are float32,
    ``1000·σ``. Unlike diffusers, float64 latents are not rounded to float32.

    Args:
        shift: moves the steps towards high noise; 1 spaces them evenly.
        num_train_timesteps: timesteps per unit of σ.
        integer_timesteps: True truncates ``timesteps`` to int64, as official Wan, HY-Video-PRFL and
            supervised training here do; a run of the command line sets it.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        shift: float = 5.0,
        num_train_timesteps: int = 1000,
        *,
        integer_timesteps: bool = False,
    ) -> None:
        super().__init__(shift, num_train_timesteps, integer_timesteps)
        # diffusers derives the ends in float32, and the last timesteps depend on that rounding.
        ends = torch.tensor([num_train_timesteps, 1], dtype=torch.float32, device="cpu")
        ends = ends / num_train_timesteps
        ends = self.shift * ends / (1 + (self.shift - 1) * ends)
        self._ends: tuple[float, float] = (ends[0].item(), ends[1].item())

    def levels(self, count: int) -> tuple[list[float], torch.Tensor]:
        scale = self.num_train_timesteps
        even = _linspace(self._ends[0] * scale, self._ends[1] * scale, count)
        sigmas = [_shifted(t / scale, self.shift) for t in even]
        timesteps = _float32(sigmas) * scale
        # The ends are float32: a whole number may come out one rounding below itself.
        return sigmas, (timesteps + 1e-4).long() if self.integer_timesteps else timesteps

    def _advance(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return flow_step([sample, velocity], [1.0, self._sigmas[index + 1] - self._sigmas[index]])


class FlowUniPC(_FlowScheduler):
    """Sample by UniPC, a multistep predictor and corrector (Zhao et al., arXiv 2302.04867).

    The variant with ``B(h) = e^h - 1`` ("bh2"), data prediction, lower orders at both ends of the
    trajectory. ``timesteps`` are ``1000·σ`` truncated to int64. ``order + 1`` tensors of
    ``sample``'s size and dtype are kept between steps.

    Args:
        shift, num_train_timesteps: see :class:`FlowEuler`.
        order: order of the predictor, 1, 2 or 3.
        schedule: levels before the shift. ``"wan"`` spaces them evenly from 0.999 to 0, as official
            Wan and HY-Video-PRFL do; ``"diffusers"`` from 1 to 0.001, as newer diffusers'
            ``UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=shift, solver_order=order)`` do.
        integer_timesteps: False keeps ``1000·σ`` as float32.

    Raises:
        ValueError: if a number is not positive, ``order`` is above 3, or ``schedule`` is unknown.
    """

    def __init__(
        self,
        shift: float = 5.0,
        order: int = 2,
        num_train_timesteps: int = 1000,
        *,
        schedule: Schedule = "wan",
        integer_timesteps: bool = True,
    ) -> None:
        super().__init__(shift, num_train_timesteps, integer_timesteps)
        check_choice("order", order, (1, 2, 3))
        check_choice("schedule", schedule, get_args(Schedule))
        # Of one level, Wan's first would be 0.
        check_count("num_train_timesteps", num_train_timesteps, 1 + (schedule == "wan"))
        self.order, self.schedule = order, schedule
        self._reset()

    def levels(self, count: int) -> tuple[list[float], torch.Tensor]:
        scale = self.num_train_timesteps
        first, last = 1.0, 1 / scale
        if self.schedule == "wan":  # which rounds its first level before the shift, 0.999
            first, last = _float32([1 - 1 / scale]).item(), 0.0
        sigmas = [_shifted(s, self.shift) for s in _linspace(first, last, count + 1)[:-1]]
        if abs(sigmas[0] - 1) < _UNIPC_SIGMA_GAP:
            sigmas[0] -= _UNIPC_SIGMA_GAP
        times = [s * scale for s in sigmas]
        if self.integer_timesteps:
            return sigmas, torch.tensor([int(t) for t in times], dtype=torch.int64, device="cpu")
        return sigmas, _float32(times)

    def restrict(self, indices: Sequence[int], orders: Sequence[int] | None = None) -> None:
        """Keep only the steps ``indices``; ``orders`` has one for each, None leaves ``order``.

        See :meth:`_FlowScheduler.restrict`. Also raise ``ValueError`` unless ``orders`` has
        1, 2 or 3 for every index.
        """
        super().restrict(indices)
        if orders is not None:
            ok = len(orders) == len(indices) and all(order in (1, 2, 3) for order in orders)
            check(ok, "orders", list(orders), f"{len(indices)} of 1, 2 or 3")
            self._set_orders(tuple(orders))

    def _reset(self) -> None:
        self._previous: torch.Tensor | None = None
        self._predictions: list[torch.Tensor] = []
        self._set_orders((self.order,) * len(self._times))

    def _set_orders(self, orders: tuple[int, ...]) -> None:
        self._history = max(orders, default=self.order)
        # Here, because a step may run on fake tensors, which have no values.
        dtypes = (torch.float32, torch.float64) if self._sigmas else ()
        self._updates = {dtype: unipc_updates(self._sigmas, orders, dtype) for dtype in dtypes}

    def _advance(self, index: int, velocity: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        tensors = [sample, velocity]
        if self._previous is not None:
            before = self._previous
            ok = before.shape == sample.shape and before.device == sample.device
            expected = f"{describe(before)}, with which this trajectory began"
            check(ok, f"{type(self).__name__}.step: sample", sample, expected, hint=_NEW)
            tensors += [before, *self._predictions]
        # One linear combination corrects x_i with the velocity found there and predicts x_{i+1}.
        # In float32 as Wan's own solver, for latents that float32 holds.
        updates = self._updates[torch.float64 if sample.dtype == torch.float64 else torch.float32]
        update = updates[index][len(self._predictions)]
        prev_sample = flow_step(tensors, list(update.advance))
        if index + 1 < len(updates):
            correct = update.correct
            self._previous = sample if correct is None else flow_step(tensors, list(correct))
            prediction = flow_step([sample, velocity], [1.0, -self._sigmas[index]])
            self._predictions = [prediction, *self._predictions][: self._history]
        return prev_sample


def detach_state(scheduler: Any) -> None:
    """Detach every tensor in a scheduler's state, so that its graph can be freed."""
    # Tensors are replaced, not changed in place, because a graph may still use them.
    state = vars(scheduler)
    state.update(_detached({k: v for k, v in state.items() if k not in _CONSTANTS}))


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
    """Return a deep copy of a scheduler without its graph; the caller's object never steps.

    Raise ``TypeError`` for an object without ``set_timesteps`` or ``step``, and ``ValueError`` for
    a diffusers scheduler that predicts something other than the velocity or runs from σ = 0 to 1,
    or a scheduler whose ``set_timesteps`` takes a shift that it was not given.
    """
    name = type(scheduler).__name__
    if not all(callable(getattr(scheduler, method, None)) for method in ("set_timesteps", "step")):
        raise TypeError(
            f"scheduler is {name}, expected FlowUniPC, FlowEuler or a diffusers flow scheduler (an "
            "object with set_timesteps and step)"
        )
    prediction = _config(scheduler).get("prediction_type")
    hint = "Build it with that and use_flow_sigmas=True: the model predicts a velocity."
    ok, label = prediction in (None, "flow_prediction"), f"scheduler {name}: prediction_type"
    check(ok, label, prediction, "'flow_prediction'", hint=hint)
    inverted = _config(scheduler).get("invert_sigmas", False)
    hint = "The adapter of Mochi turns time and velocity, so build the scheduler without it."
    check(not inverted, f"scheduler {name}: invert_sigmas", inverted, "False", hint=hint)
    _check_shift_given(scheduler)
    clone = copy.copy(scheduler)
    detach_state(clone)
    return copy.deepcopy(clone)


def _check_shift_given(scheduler: Any) -> None:
    """Refuse a scheduler that takes its shift in ``set_timesteps``, as HY-Video-PRFL's own does."""
    try:
        parameter = inspect.signature(scheduler.set_timesteps).parameters.get("shift")
    except (TypeError, ValueError):  # a callable without a signature
        return
    if parameter is None or is_number(parameter.default):
        return
    shift = _config(scheduler).get("shift", getattr(scheduler, "shift", None))
    given = parameter.default is None and is_number(shift) and shift != 1
    hint = "Pass WithShift(scheduler, shift=5.0) of prfl_fast.rollout: it would run unshifted"
    check(given, f"shift of scheduler {type(scheduler).__name__}", shift, "a shift", hint=hint)


class WithShift:
    """Give ``set_timesteps`` of another library's scheduler its ``shift``.

    Args:
        scheduler: an object whose ``set_timesteps`` takes a number of steps and a ``shift``.
        shift: moves the steps towards high noise; 1 leaves them as they are.

    Raises:
        ValueError: if ``shift`` is not positive.
    """

    def __init__(self, scheduler: Any, shift: float) -> None:
        _check_shift(shift)
        self.scheduler, self.given_shift = scheduler, float(shift)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        """Start a trajectory with the shift."""
        options = {} if device is None else {"device": device}
        self.scheduler.set_timesteps(num_inference_steps, shift=self.given_shift, **options)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's own step."""
        return self.scheduler.step(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler" or name.startswith("__"):  # while a copy is made
            raise AttributeError(name)
        return getattr(self.scheduler, name)


def check_deterministic(scheduler: Any, num_inference_steps: int) -> None:
    """Raise ``ValueError`` if the steps of a foreign scheduler draw random numbers.

    Its ``step`` may ignore a generator (diffusers' Euler does), so no seed would fix a trajectory.
    """
    if type(scheduler).step.__module__ == __name__:  # a subclass may have a step of its own
        return
    x = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float32, device="cpu")
    before = torch.get_rng_state()
    # Errors are raised again by the trajectory, which knows the latents.
    with torch.no_grad(), contextlib.suppress(Exception):
        scheduler, timesteps = start_trajectory(scheduler, num_inference_steps)
        for timestep in timesteps:
            (x,) = scheduler.step(x, timestep, x, return_dict=False)
    random = not torch.equal(before, torch.get_rng_state())
    torch.set_rng_state(before)
    name = f"scheduler {type(scheduler).__name__}"
    hint = "Build it without stochastic sampling, or use FlowUniPC or FlowEuler."
    kind = "one that draws random numbers in its steps"
    check(not random, name, kind, "a deterministic sampler", hint=hint)


def _config(scheduler: Any) -> Mapping[str, Any]:
    config = getattr(scheduler, "config", None)
    return config if isinstance(config, Mapping) else {}


def start_trajectory(
    scheduler: Any, num_inference_steps: int, start: int = 0
) -> tuple[Any, Sequence[torch.Tensor]]:
    """Return a copy of ``scheduler`` that begins at step ``start``, and its 0-d timesteps.

    Raise ``ValueError`` if the scheduler does not make one model call per step.
    """
    scheduler = fresh_copy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    # On the CPU, because foreign samplers read a timestep's value and would wait for the device.
    timesteps = scheduler.timesteps.cpu()
    name, calls = f"model calls of scheduler {type(scheduler).__name__}", len(timesteps)
    check(calls == num_inference_steps, name, calls, f"{num_inference_steps}, one per step")
    # Truncated timesteps may repeat, so a search for the first one could find another step.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler, list(timesteps.unbind())


def schedule_sigmas(scheduler: Any, timesteps: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Return the noise level before every step and after the last: ``len(timesteps) + 1`` floats.

    They are the scheduler's ``sigmas``. A scheduler without ``sigmas`` gives its timesteps divided
    by its ``num_train_timesteps`` (default 1000), then 0.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) in (len(timesteps), len(timesteps) + 1):
        levels = [float(sigma) for sigma in sigmas]
    else:
        scale = _config(scheduler).get("num_train_timesteps", 1000)
        levels = [float(t) / scale for t in timesteps]
    return tuple([*levels, 0.0][: len(timesteps) + 1])
