"""One trajectory of a sampler, with and without gradient."""

import bisect
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from prfl_fast.models.adapter import Conditions, not_inference, set_first_frame
from prfl_fast.models.experts import Experts
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.models.velocity import Velocity, bind_velocity, model_of
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine, RolloutSession
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.kept_steps import keep_levels, strided_steps
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import detach_state, schedule_sigmas, start_trajectory
from prfl_fast.utils.checks import check, check_type, is_count
from prfl_fast.utils.optional import progress_bar
from prfl_fast.utils.sharded import ending_pass, largest_of_ranks, shares_weights
from prfl_fast.utils.transfers import to_device

# (index, velocity) → velocity like it.
Adjust = Callable[[int, torch.Tensor], torch.Tensor]


class Trajectory:
    """Run a sampler once; stop at any step, take it with gradient, and continue.

    :meth:`run` takes steps without gradient. A step with gradient is ``x = solve(velocity())``,
    then ``move_to(x)``; several in a row call ``follow(x)`` after each and :meth:`cut` at the end.
    The latents ``x`` have the noise's dtype. The condition ``first_frame``, if any, replaces their
    first frame at the start and after every step. The scheduler is a private copy.

    Args:
        sampler: the model, the schedule, guidance and the rollout configuration.
        noise: latents at step ``start``, ``[B, C, F, H, W]``.
        engine: runs the steps without gradient instead of one made from ``sampler.rollout``; a
            shared engine counts its drift checks over many trajectories.
        start: the first step; ``noise`` then is at ``sigma(start)``.
        visit: steps with gradient. A rollout with a stride includes them and the step after each.
        check_values: check that ``noise`` is finite, which waits for the device.

    Attributes:
        x: the latents.
        index: the next step.
        timesteps: of all steps, 0-d tensors.
        drift: relative L2 distance of the latents from an exact rollout's, the largest of the
            batch (of those of all ranks, if weights are sharded), by step; None if the engine did
            not check this rollout.

    Raises:
        TypeError, ValueError: as :func:`bind_velocity`, or if ``start`` or ``visit`` is outside the
            schedule, guidance does not fit the conditions, or a foreign scheduler has a stride.
    """

    def __init__(
        self,
        sampler: Sampler,
        noise: torch.Tensor,
        conditions: Conditions,
        *,
        engine: RolloutEngine | None = None,
        start: int = 0,
        visit: Sequence[int] = (),
        check_values: bool = True,
    ) -> None:
        transformer, count = sampler.transformer, sampler.num_inference_steps
        noise, conditions = not_inference(noise), not_inference(conditions)
        bind = partial(bind_velocity, transformer, noise, name="noise")
        self._velocity = bind(conditions, check_values=check_values)
        if engine is None and sampler.rollout is not None:
            engine = RolloutEngine(transformer, sampler.rollout)
        ok, expected = engine is None or engine.runs(transformer), "one of this transformer"
        hint = "The engine was made for another transformer, or another precision of it."
        check(ok, "engine", engine, expected, hint=hint)
        self.conditions = conditions
        self.guidance = guidance = sampler.guidance
        self._branches = (conditions,) if guidance is None else guidance.branches(conditions)
        if guidance is not None and not guidance.batched:  # its shapes may be its own
            try:
                bind(self._branches[1], check_values=False)
            except ValueError as error:
                raise ValueError(f"guidance negative: {error}") from error
        for name, steps in (("start", (start,)), ("visit", tuple(visit))):
            bad = any(isinstance(i, bool) or not 0 <= i < count for i in steps)
            check(not bad, name, steps, f"steps in 0 … {count - 1}")
        # Outside the planner's FakeTensorMode, in which a schedule would have no values.
        with _disable_current_modes():
            self.scheduler, timesteps = start_trajectory(sampler.scheduler, count, start)
            self._sigmas = schedule_sigmas(self.scheduler, timesteps)
            numbers = [(t.item(), t.dtype) for t in timesteps]
        # One by one, because a FakeTensorMode keeps the value of a single number.
        self.timesteps = [torch.tensor(t, dtype=dtype, device="cpu") for t, dtype in numbers]
        # One copy to the device here, instead of one in every step.
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        times = [float(t) for t, _ in numbers]
        on_host = torch.tensor(times, dtype=dtype, device="cpu")
        self._model_timesteps = to_device(on_host, noise.device)
        # The guidance of each step: two experts may have two scales.
        model = model_of(transformer)
        experts = model if isinstance(model, Experts) else None
        names = [None if experts is None else experts.name_at(t) for t in times]
        self._guided = None if guidance is None else [guidance.of(name) for name in names]
        self.x = set_first_frame(noise.detach(), conditions)
        self.index = start
        self._engine = engine
        self._inexact = engine is not None and engine.inexact
        self._kept: Sequence[int] = range(start, count + 1)
        if engine is not None and (engine.skips or engine.sets_order):
            strides = [engine.stride_at(sigma) for sigma in self._sigmas]
            self._kept = strided_steps(start, count, strides, visit)
            orders = None
            if engine.sets_order:  # steps with gradient keep the scheduler's
                levels = enumerate(self._sigmas)
                orders = [None if i in visit else engine.order_at(s) for i, s in levels]
            keep_levels(self.scheduler, self._kept[:-1], orders)
        self._sampler, self._start = sampler, start
        self._first_x: torch.Tensor | None = None
        self._shadow: Trajectory | None = None
        self._counted = False
        self.drift: dict[int, float] | None = None

    def model_timestep(self, index: int) -> torch.Tensor:
        """Return the timestep of step ``index`` for a model: ``[B]`` on the latents' device."""
        return self._model_timesteps[index].expand(self.x.shape[0])

    def sigma(self, index: int) -> float:
        """Return the noise level of the latents before step ``index``; 0 after the last."""
        return self._sigmas[index]

    def velocity(self, x: torch.Tensor | None = None, index: int | None = None) -> torch.Tensor:
        """Return the model's exact velocity at ``x`` and step ``index``, guided, with its graph.

        Both default to the trajectory's current state. Raise ``ValueError`` if the model returns
        another shape.
        """
        x = self.x if x is None else x
        index = self.index if index is None else index
        timestep = self.model_timestep(index)
        if self.guidance is not None and self.guidance.batched:
            x, timestep = torch.cat([x, x]), torch.cat([timestep, timestep])
        outputs = []
        for branch in self._branches:
            outputs.append(self._velocity(x, timestep, branch))
            _check_velocity(outputs[-1], x)
        return outputs[0] if self._guided is None else self._guided[index].combine(outputs)

    def solve(self, v: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """Return the next latents, differentiable in ``v``, ``x`` and the scheduler's history.

        ``v`` is the velocity at ``x``, by default the current latents. Raise ``ValueError`` if the
        rollout's stride skips the next step.
        """
        hint = "Name the steps that solve() takes in visit."
        expected = f"step {self.index + 1}, which the stride of this rollout leaves out"
        check(self._next() == self.index + 1, "the next step", self._next(), expected, hint=hint)
        return self._solve(v, self.x if x is None else x)

    def _solve(self, v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        (out,) = self.scheduler.step(v, self.timesteps[self.index], x, return_dict=False)
        return out.to(x.dtype)

    def _next(self) -> int:
        return self._kept[bisect.bisect_right(self._kept, self.index)]

    def follow(self, x: torch.Tensor) -> None:
        """Continue from ``x``, the result of :meth:`solve`, with its graph."""
        if self._inexact and self._first_x is None:
            self._first_x = self.x.detach()
        self.x, self.index = set_first_frame(x, self.conditions), self._next()

    def cut(self) -> None:
        """Detach the latents and the scheduler's history from the graph."""
        self.x = self.x.detach()
        detach_state(self.scheduler)

    def move_to(self, x: torch.Tensor) -> None:
        """Continue from ``x``, the result of :meth:`solve`, without its graph."""
        self.follow(x)
        self.cut()

    def steps_to(self, stop: int) -> int:
        """Return the number of steps that :meth:`run` takes until step ``stop``."""
        return sum(self.index <= index < stop for index in self._kept)

    @torch.no_grad()
    def run(
        self,
        stop: int,
        on_step: Callable[[], object] = lambda: None,
        *,
        adjust: Adjust | None = None,
    ) -> None:
        """Take steps without gradient until step ``stop`` is the next one.

        Args:
            on_step: called after every step.
            adjust: returns the velocity to take for ``(index, velocity)``, while ``x`` is at step
                ``index``.

        Raises:
            ValueError: if ``stop`` is not a step, or the stride of this rollout skips it.
        """
        count = len(self.timesteps)
        ok = is_count(stop, 0) and stop <= count
        check(ok, "stop", stop, f"a step in 0 … {count}")
        stop, shadow = max(stop, self.index), self._shadow
        if stop == self.index and (shadow is None or shadow.index == stop):
            return
        expected, hint = "a step that the stride of this rollout keeps", "Name it in visit."
        check(stop in self._kept, "stop", stop, expected, hint=hint)
        model = model_of(self._sampler.transformer)
        with ending_pass(model), exact_linears(), self._opened(stop) as session:
            self._compare(session)
            while self.index < stop:
                index, shift = self.index, None
                sigma = self.sigma(index) if self._inexact else None
                if session is not None:
                    v = session.velocity(self.x, index, sigma)
                elif self._engine is None or self._engine.guides(sigma):
                    v = self.velocity()
                else:
                    v = self._velocity(self.x, self.model_timestep(index), self.conditions)
                    _check_velocity(v, self.x)
                if adjust is not None:
                    before, v = v, adjust(index, v)
                    shift = v - before if self._shadow is not None else None
                self.move_to(self._solve(v, self.x))
                on_step()
                self._compare(session, index, shift)
        if torch.is_autocast_enabled(self.x.device.type):
            # Weights cast here have no graph, and PyTorch would reuse them in gradient steps.
            torch.clear_autocast_cache()

    @contextlib.contextmanager
    def _opened(self, stop: int) -> Iterator[RolloutSession | None]:
        """Open the engine for the steps before ``stop``; yield None without one."""
        engine = self._engine
        if engine is None:
            yield None
            return
        if self._inexact and not self._counted and engine.should_check_drift():
            exact = replace(self._sampler, rollout=None)
            x = self.x if self._first_x is None else self._first_x
            self._shadow = Trajectory(exact, x, self.conditions, start=self._start)
        needed = {index for index in self._kept if self.index <= index < stop}
        if self._shadow is not None:
            needed |= set(range(self._shadow.index, stop))
        copies = 2 if self.guidance is not None and self.guidance.batched else 1
        # The engine reads shape, dtype and device only, so an expanded view is enough.
        x = self.x[:1].expand(copies * len(self.x), *self.x.shape[1:])
        timesteps = {index: self.model_timestep(index).repeat(copies) for index in sorted(needed)}
        with engine.open(x, timesteps, self._branches, self._guided) as session:
            if session is None and not engine.changes_sampler:
                self._inexact, self._shadow = False, None
            if self._inexact and not self._counted:
                self._counted = True
                engine.trajectories += 1
            yield session

    def _compare(
        self,
        session: RolloutSession | None,
        index: int | None = None,
        shift: torch.Tensor | None = None,
    ) -> None:
        """Take the exact rollout to the same step, and record the distance."""
        shadow = self._shadow
        if shadow is None or shadow.index == self.index:
            return
        while shadow.index < self.index:
            if session is None:
                v = shadow.velocity()
            else:
                v = session.velocity(shadow.x, shadow.index, None)
            # Guidance by a reward shifts both rollouts equally, and causes no drift by itself.
            if shift is not None and shadow.index == index:
                v = v + shift
            shadow.move_to(shadow._solve(v, shadow.x))
        assert self._engine is not None
        distance = relative_distance(self.x, shadow.x)
        # An exact rollout calls the model more often, so ranks with sharded weights fall back
        # together.
        if shares_weights(self._engine.model):
            distance = largest_of_ranks(distance)
        self.drift = {} if self.drift is None else self.drift
        self.drift[self.index] = float(distance)
        if self._engine.record_drift(self.drift, self._sigmas):
            self.x, self.scheduler, self._kept = shadow.x, shadow.scheduler, shadow._kept
            self._inexact, self._shadow = False, None


def _check_velocity(v: object, x: torch.Tensor) -> None:
    ok = isinstance(v, torch.Tensor) and v.shape == x.shape
    check(ok, "the transformer's result", v, f"a velocity of shape {list(x.shape)}")


def relative_distance(x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the largest ``‖x - exact‖ / ‖exact‖`` of a batch ``[B, ...]``, in float64."""
    x, exact = x.double().flatten(1), exact.double().flatten(1)
    distance, norm = (x - exact).norm(dim=1), exact.norm(dim=1)
    # Equal latents have distance 0 even if both are zero.
    return torch.where(distance == 0, distance, distance / norm).max()


def rollout(
    transformer: nn.Module | Velocity,
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_inference_steps: int,
    *,
    stop: int | None = None,
    guidance: Guidance | None = None,
    rollout_config: RolloutConfig | RolloutEngine | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Sample latents from noise, without gradient.

    Args:
        transformer, scheduler, num_inference_steps, guidance: see
            :class:`prfl_fast.rollout.sampler.Sampler`.
        noise: ε, ``[B, C, F, H, W]``; the trajectory keeps its dtype and device.
        conditions: the adapter's conditions, e.g. ``{"encoder_hidden_states": [B, T, C]}``.
        stop: take only the first ``stop`` steps; all if None.
        rollout_config: configuration of the steps; None calls the model's own forward. An engine
            counts its drift checks over many calls; a configuration alone checks each call.
        progress: show a tqdm bar.

    Returns:
        The latents after ``stop`` steps, ``[B, C, F, H, W]``.

    Raises:
        TypeError: if the model or scheduler is unsupported.
        ValueError: if noise or conditions have a wrong shape or are not finite, or ``stop``,
            guidance or configuration do not fit them.
    """
    kinds = (RolloutConfig, RolloutEngine, type(None))
    check_type("rollout_config", rollout_config, kinds)
    engine = rollout_config if isinstance(rollout_config, RolloutEngine) else None
    config = None if isinstance(rollout_config, RolloutEngine) else rollout_config
    sampler = Sampler(transformer, scheduler, num_inference_steps, guidance, config)
    stop = num_inference_steps if stop is None else stop
    expected = f"0 to num_inference_steps = {num_inference_steps}"
    check(0 <= stop <= num_inference_steps, "stop", stop, expected)
    visit = (stop,) if stop < num_inference_steps else ()
    trajectory = Trajectory(sampler, noise, conditions, engine=engine, visit=visit)
    total = trajectory.steps_to(stop) if progress else None
    with progress_bar("sampling", "step", total) as tick:
        trajectory.run(stop, tick)
    return trajectory.x
