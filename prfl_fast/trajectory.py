"""One run of a sampler: the steps it takes, without gradient and with."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from prfl_fast._extras import need
from prfl_fast.adapters import Conditions
from prfl_fast.kernels._checks import describe
from prfl_fast.model_call import (
    Guidance,
    Velocity,
    bind_velocity,
)
from prfl_fast.rollout_engine import RolloutEngine, RolloutSession, RolloutSettings
from prfl_fast.schedulers import (
    detach_state,
    keep_levels,
    schedule_sigmas,
    start_trajectory,
    strided_steps,
)

# (index, velocity) → velocity like it.
Adjust = Callable[[int, torch.Tensor], torch.Tensor]


class Trajectory:
    """One run of a sampler, which can stop at a step, take it with gradient, and go on.

    :meth:`run` takes steps without gradient. A step with gradient is ``x = solve(velocity())``,
    then ``move_to(x)``; a chain of them calls ``follow(x)`` after each and :meth:`cut` at its end.
    The latents ``x`` keep the noise's dtype and carry a graph only within a chain. The scheduler is
    a private copy.

    Args:
        transformer: see :func:`bind_velocity`.
        noise: latents at step ``start``, ``[B, C, F, H, W]``.
        guidance: of every velocity, with and without gradient.
        engine: runs the steps without gradient (:mod:`prfl_fast.rollout_engine`).
        start: the first step; ``noise`` then is at ``sigma(start)``.
        visit: the steps that :meth:`solve` will take. An engine that takes fewer steps lands on
            each of them and on the step after it.

    Attributes:
        x: the latents. index: the step that comes next. timesteps: of all steps, 0-d tensors.
        drift: of a rollout that the engine checked: for the steps it came to, the relative L2
            distance of the latents from those of an exact rollout, the largest of the batch; else
            None.

    Raises:
        TypeError, ValueError: as :func:`bind_velocity` and :func:`prfl_fast.schedulers.fresh_copy`;
            ``start`` or ``visit`` outside the schedule; guidance that does not fit the conditions;
            fewer steps with a foreign scheduler.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        noise: torch.Tensor,
        conditions: Conditions,
        scheduler: Any,
        num_steps: int,
        *,
        guidance: Guidance | None = None,
        engine: RolloutEngine | None = None,
        start: int = 0,
        visit: Sequence[int] = (),
    ) -> None:
        self._velocity = bind_velocity(transformer, noise, conditions, "noise")
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance is {guidance!r}, expected a Guidance or None")
        if engine is not None and not engine.runs(transformer):
            raise ValueError(
                "engine was made for another transformer, or another precision of it; expected "
                "RolloutEngine of this one"
            )
        self.conditions = conditions
        self.guidance = guidance
        self._branches = (conditions,) if guidance is None else guidance.branches(conditions)
        for name, steps in (("start", (start,)), ("visit", tuple(visit))):
            if any(isinstance(i, bool) or not 0 <= i < num_steps for i in steps):
                raise ValueError(f"{name} is {steps}, expected steps in 0 … {num_steps - 1}")
        self.scheduler, self.timesteps = start_trajectory(scheduler, num_steps, start)
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        self._model_timesteps = torch.stack(list(self.timesteps)).to(noise.device, dtype)
        self._sigmas = schedule_sigmas(self.scheduler, self.timesteps)
        self.x = noise.detach()
        self.index = start
        self._engine = engine
        self._session: RolloutSession | None = None
        self._inexact = engine is not None and engine.inexact
        self._kept = list(range(start, num_steps + 1))
        if engine is not None and engine.stride > 1:
            self._kept = strided_steps(start, num_steps, engine.stride, visit)
            keep_levels(self.scheduler, self._kept[:-1])
        # An exact rollout is made beside this one if the engine asks for it, from the same latents.
        self._again = partial(
            Trajectory,
            transformer,
            conditions=conditions,
            scheduler=scheduler,
            num_steps=num_steps,
            guidance=guidance,
            start=start,
        )
        self._first_x: torch.Tensor | None = None
        self._shadow: Trajectory | None = None
        self._counted = False
        self.drift: dict[int, float] | None = None

    def model_timestep(self, index: int) -> torch.Tensor:
        """Timestep of step ``index`` as models take it: ``[B]`` on the latents' device."""
        return self._model_timesteps[index].expand(self.x.shape[0])

    def sigma(self, index: int) -> float:
        """Noise level of the latents before step ``index``; after the last step, 0."""
        return self._sigmas[index]

    def velocity(self, x: torch.Tensor | None = None, index: int | None = None) -> torch.Tensor:
        """The model's velocity, guided; exact outside :meth:`run`, with a graph if one is recorded.

        Args:
            x: latents like the noise, to differentiate through; the current ones if None.
            index: the step at which they are; the one that comes next if None.

        Raises:
            ValueError: the model returned another shape.
        """
        x = self.x if x is None else x
        index = self.index if index is None else index
        x, timestep = self._inputs(x, index)
        outputs = []
        for number, branch in enumerate(self._branches):
            if self._session is not None and not torch.is_grad_enabled():
                sigma = self.sigma(index) if self._inexact else None
                v = self._session.velocity(number, x, index, sigma)
            else:
                v = self._velocity(x, timestep, branch)
            if not isinstance(v, torch.Tensor) or v.shape != x.shape:
                raise ValueError(
                    f"the transformer returned {describe(v)}, expected a velocity of shape "
                    f"{list(x.shape)}"
                )
            outputs.append(v)
        return outputs[0] if self.guidance is None else self.guidance.combine(outputs)

    def _inputs(self, x: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and timesteps of a model call: twice the batch for batched guidance."""
        timestep = self.model_timestep(index)
        if self.guidance is None or not self.guidance.batched:
            return x, timestep
        return torch.cat([x, x]), torch.cat([timestep, timestep])

    def solve(self, v: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """The next latents, differentiable in ``v``, ``x`` and the scheduler's history.

        Args:
            v: the velocity at ``x``. x: the latents before the step; the current ones if None.

        Raises:
            ValueError: an engine takes fewer steps, and the one after this is not among them.
        """
        if self._next() != self.index + 1:
            raise ValueError(
                f"step {self.index} would lead to step {self._next()} in this rollout of fewer "
                "steps; name the steps that solve() takes in visit"
            )
        return self._solve(v, x)

    def _solve(self, v: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        x = self.x if x is None else x
        (out,) = self.scheduler.step(v, self.timesteps[self.index], x, return_dict=False)
        return out.to(x.dtype)

    def _next(self) -> int:
        return self._kept[self._kept.index(self.index) + 1]

    def follow(self, x: torch.Tensor) -> None:
        """Go on from ``x``, the result of :meth:`solve`, with its graph."""
        if self._inexact and self._first_x is None:
            self._first_x = self.x.detach()
        self.x, self.index = x, self._next()

    def cut(self) -> None:
        """Leave the graph behind: latents and the scheduler's history become constants."""
        self.x = self.x.detach()
        detach_state(self.scheduler)

    def move_to(self, x: torch.Tensor) -> None:
        """Go on from ``x``, the result of :meth:`solve`, leaving its graph behind."""
        self.follow(x)
        self.cut()

    def steps_to(self, stop: int) -> int:
        """How many steps :meth:`run` takes to get to step ``stop``."""
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
            adjust: ``(index, velocity) → velocity`` that is taken instead, called with ``x`` at
                step ``index``.

        Raises:
            ValueError: the engine takes fewer steps, and ``stop`` is not among them.
        """
        if isinstance(stop, bool) or not isinstance(stop, int) or stop > len(self.timesteps):
            raise ValueError(f"stop is {stop!r}, expected a step in 0 … {len(self.timesteps)}")
        stop, shadow = max(stop, self.index), self._shadow
        if stop == self.index and (shadow is None or shadow.index == stop):
            return
        if stop not in self._kept:
            raise ValueError(
                f"stop is {stop}, expected one of the steps of this rollout of fewer steps; name "
                "it in visit"
            )
        with self._opened(stop):
            self._compare()
            while self.index < stop:
                v, index, shift = self.velocity(), self.index, None
                if adjust is not None:
                    before, v = v, adjust(index, v)
                    shift = v - before if self._shadow is not None else None
                self.move_to(self._solve(v))
                on_step()
                self._compare(index, shift)
        if torch.is_autocast_enabled(self.x.device.type):
            # Casts of weights made here have no graph; PyTorch has handed them to gradient steps.
            torch.clear_autocast_cache()

    @contextlib.contextmanager
    def _opened(self, stop: int) -> Iterator[None]:
        """Within, velocities without gradient come from the engine, with its caches."""
        engine = self._engine
        if engine is None:
            yield
            return
        if self._inexact and not self._counted and engine.due():
            self._shadow = self._again(self.x if self._first_x is None else self._first_x)
        needed = {index for index in self._kept if self.index <= index < stop}
        if self._shadow is not None:
            needed |= set(range(self._shadow.index, stop))
        copies = 2 if self.guidance is not None and self.guidance.batched else 1
        # Its size is what counts: no copy.
        x = self.x[:1].expand(copies * len(self.x), *self.x.shape[1:])
        timesteps = {index: self.model_timestep(index).repeat(copies) for index in sorted(needed)}
        with engine.open(x, timesteps, self._branches) as session:
            if session is None and engine.stride == 1:
                self._inexact, self._shadow = False, None
            if self._inexact and not self._counted:
                self._counted = True
                engine.trajectories += 1
            self._session = session
            try:
                yield
            finally:
                self._session = None

    def _compare(self, index: int | None = None, shift: torch.Tensor | None = None) -> None:
        """Take the exact rollout to where this one is, and see how far apart they are.

        Args:
            shift: what was added to the velocity of step ``index``, for both.
        """
        shadow = self._shadow
        if shadow is None or shadow.index == self.index:
            return
        shadow._session = self._session
        try:
            while shadow.index < self.index:
                v = shadow.velocity()
                if shift is not None and shadow.index == index:
                    v = v + shift
                shadow.move_to(shadow._solve(v))
        finally:
            shadow._session = None
        assert self._engine is not None
        self.drift = {} if self.drift is None else self.drift
        self.drift[self.index] = relative_distance(self.x, shadow.x)
        if self._engine.refuses(self.drift, self._sigmas):
            self.x, self.scheduler, self._kept = shadow.x, shadow.scheduler, shadow._kept
            self._inexact, self._shadow = False, None


def relative_distance(x: torch.Tensor, exact: torch.Tensor) -> float:
    """``‖x - exact‖ / ‖exact‖`` of a sample in float64, the largest of the batch ``[B, ...]``."""
    x, exact = x.double().flatten(1), exact.double().flatten(1)
    distance, norm = (x - exact).norm(dim=1), exact.norm(dim=1)
    return float(torch.where(distance == 0, distance, distance / norm).max())


def rollout(
    transformer: nn.Module | Velocity,
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    stop: int | None = None,
    guidance: Guidance | None = None,
    settings: RolloutSettings | RolloutEngine | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Sample latents from noise, without gradient.

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        noise: ε, ``[B, C, F, H, W]``; the trajectory keeps its dtype and device.
        conditions: the adapter's conditions, e.g. ``{"encoder_hidden_states": [B, T, C]}``.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler; it is copied, not
            changed.
        num_steps: solver steps of the whole schedule.
        stop: take only the first ``stop`` of them; all if ``None``.
        guidance: classifier-free guidance.
        settings: how steps are computed; the model's own forward if None. An engine made from
            settings keeps its checks of precision over many calls; settings alone check each call.
        progress: show a tqdm bar.

    Returns:
        The latents after ``stop`` steps, ``[B, C, F, H, W]``.

    Raises:
        TypeError: an unsupported model or scheduler.
        ValueError: noise or conditions of the wrong shape or not finite, or ``stop`` outside 0 …
            num_steps; guidance or settings that do not fit them.
    """
    if settings is not None and not isinstance(settings, (RolloutSettings, RolloutEngine)):
        raise TypeError(
            f"settings is {settings!r}, expected RolloutSettings, a RolloutEngine or None"
        )
    engine = (
        RolloutEngine(transformer, settings) if isinstance(settings, RolloutSettings) else settings
    )
    stop = num_steps if stop is None else stop
    if not 0 <= stop <= num_steps:
        raise ValueError(f"stop is {stop}, expected 0 to num_steps = {num_steps}")
    trajectory = Trajectory(
        transformer,
        noise,
        conditions,
        scheduler,
        num_steps,
        guidance=guidance,
        engine=engine,
        visit=(stop,) if stop < num_steps else (),
    )
    if not progress:
        trajectory.run(stop)
    else:
        total = trajectory.steps_to(stop)
        with need("tqdm").tqdm(total=total, desc="sampling", unit="step") as bar:
            trajectory.run(stop, bar.update)
    return trajectory.x
