"""Candidates of a search: many samples of a few prompts, advanced, scored and selected together.

Nothing here carries a graph.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from prfl_fast._checks import check_count
from prfl_fast._extras import need
from prfl_fast.adapters import Conditions
from prfl_fast.kernels import flow_step
from prfl_fast.kernels._checks import describe
from prfl_fast.model_call import Guidance, Velocity, bind_velocity
from prfl_fast.rewards import Reward
from prfl_fast.rollout_engine import RolloutEngine, RolloutSettings
from prfl_fast.scheduler_rows import take_rows
from prfl_fast.schedulers import FlowEuler
from prfl_fast.trajectory import Trajectory


class Forwards(NamedTuple):
    """What samples cost, in forwards and backwards of one sample each.

    Attributes:
        generator: forwards of the generator; a guided velocity takes two.
        reward: forwards of the reward.
        generator_backward, reward_backward: backwards, each of which takes about two forwards, or
            one where no parameter gets a gradient.
    """

    generator: int
    reward: int
    generator_backward: int = 0
    reward_backward: int = 0


@dataclass(frozen=True)
class SearchResult:
    """The best sample of each of B prompts.

    Attributes:
        latents: ``[B, C, F, H, W]``, clean.
        scores: ``[B]``, their rewards at timestep 0, on the CPU, float32 (float64 for float64
            rewards).
        chosen: ``[B]``, the number of the initial noise that each came from; 0 is the caller's.
        history: by step, the scores that were compared after it, ``[B, n]``; NaN where there was no
            candidate, or one without a finite score. The last entry is the choice of the result.
        forwards: what was spent.
    """

    latents: torch.Tensor
    scores: torch.Tensor
    chosen: torch.Tensor
    history: dict[int, torch.Tensor]
    forwards: Forwards


class _Batch(NamedTuple):
    """What a reward is asked about."""

    x: torch.Tensor
    timestep: torch.Tensor
    conditions: Conditions


class _Remaining(FlowEuler):
    """Euler's steps from a level to 0, evenly spaced."""

    def __init__(self, sigma: float) -> None:
        super().__init__(shift=1.0)
        self._start = sigma

    def _schedule(self, count: int) -> tuple[list[float], torch.Tensor]:
        sigmas = [self._start * (count - i) / count for i in range(count)]
        return sigmas, torch.tensor(sigmas, dtype=torch.float64).to(torch.float32) * 1000


class Candidates:
    """Candidates of B prompts that stand at one step.

    A candidate is a row of one of the trajectories, which have at most ``batch`` rows each.

    Attributes:
        prompts: of every candidate, in increasing order. origins: the initial noise of each.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        reward: nn.Module | Reward,
        noise: torch.Tensor,
        conditions: Conditions,
        scheduler: Any,
        num_steps: int,
        guidance: Guidance | None,
        settings: RolloutSettings | None,
        batch: int | None,
    ) -> None:
        if not callable(reward):
            raise TypeError(
                f"reward is {type(reward).__name__}, expected a callable "
                "(x, timestep, conditions) -> [B]"
            )
        if batch is not None:
            check_count("batch", batch)
        if settings is not None and not isinstance(settings, RolloutSettings):
            raise TypeError(f"settings is {settings!r}, expected RolloutSettings or None")
        if guidance is not None and not isinstance(guidance, Guidance):
            raise TypeError(f"guidance is {guidance!r}, expected a Guidance or None")
        if settings is not None and settings.precision is not None:
            raise ValueError(
                "settings has a precision, expected None: a search cuts trajectories where it "
                "chooses, so their drift could not be followed"
            )
        bind_velocity(transformer, noise, conditions, "noise")
        if guidance is not None:
            guidance.branches(conditions)
        self.transformer, self.reward, self.conditions = transformer, reward, conditions
        self.scheduler, self.num_steps = scheduler, num_steps
        self.guidance, self.batch = guidance, batch
        self.engine = RolloutEngine(transformer, settings or RolloutSettings())
        self.size = noise.shape[0]
        self.prompts: list[int] = []
        self.origins: list[int] = []
        self.trajectories: list[Trajectory] = []
        self.history: dict[int, torch.Tensor] = {}
        self._generated = self._rewarded = 0
        self._bar: Any = None

    def begin(self, noise: torch.Tensor, count: int, generator: torch.Generator | None) -> None:
        """Start ``count`` candidates of each prompt: the given noise and drawn ones."""
        others = draw((self.size, count - 1, *noise.shape[1:]), noise, generator)
        x = torch.cat([noise.unsqueeze(1), others.to(noise.dtype)], dim=1).flatten(0, 1)
        self.prompts = [prompt for prompt in range(self.size) for _ in range(count)]
        self.origins = [origin for _ in range(self.size) for origin in range(count)]
        self.trajectories = [
            self._open(x[rows], self._prompts(rows), self.scheduler, self.num_steps)
            for rows in self._chunks(len(x))
        ]

    @contextlib.contextmanager
    def bar(self, name: str, total: int | None) -> Iterator[None]:
        """Show a bar of the generator's forwards, ``total`` for each prompt; none for None."""
        if total is None:
            yield
            return
        factor = self.size * (1 if self.guidance is None else 2)
        with need("tqdm").tqdm(total=total * factor, desc=name, unit="forward") as self._bar:
            yield

    def run(self, step: int, *, clean: bool = False) -> list[_Batch]:
        """Take the steps up to and including ``step``; what there is to reward then."""
        batches = []
        for trajectory in self.trajectories:
            rows = len(trajectory.x)
            if clean:
                self._run(trajectory, step)
                v = trajectory.velocity()
                self._count(rows)
                x0 = flow_step([trajectory.x, v], [1.0, -trajectory.sigma(step)])
                trajectory.move_to(trajectory.solve(v))
                batches.append(_Batch(x0, _zero_timestep(x0), trajectory.conditions))
            else:
                self._run(trajectory, step + 1)
                batches.append(
                    _Batch(trajectory.x, self._timestep(trajectory), trajectory.conditions)
                )
        return batches

    def branch(
        self, step: int, candidates: int, eta: float, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, list[int]]:
        """Stochastic steps from every candidate: the finite ones, and which each came from."""
        here, there = (self.trajectories[0].sigma(i) for i in (step, step + 1))
        kept = (1 - here) / (1 - there) * there
        fresh = eta * there / here * math.sqrt(max(here**2 - kept**2, 0.0))
        # Euler's step with a part of the predicted noise taken out: exactly Euler's for eta = 0.
        change = math.sqrt(max(there**2 - fresh**2, 0.0)) - there
        coefficients = [1 + change, there - here + change * (1 - here), fresh]
        x = torch.cat([trajectory.x for trajectory in self.trajectories])
        v = torch.cat([self._velocity(trajectory) for trajectory in self.trajectories])
        x, v = x.repeat_interleave(candidates, 0), v.repeat_interleave(candidates, 0)
        if fresh:
            x = flow_step([x, v, draw(x.shape, x, generator)], coefficients)
        else:
            x = flow_step([x, v], coefficients[:2])
        finite = _finite_rows(x)
        return x[finite], [row // candidates for row in finite]

    def look_ahead(
        self, x: torch.Tensor, prompts: list[int], step: int, lookahead: int
    ) -> Iterable[_Batch]:
        """What is rewarded of latents at ``step``: where ``lookahead`` Euler steps lead to."""
        timestep, sigma = (
            self.trajectories[0].model_timestep(step),
            self.trajectories[0].sigma(step),
        )
        for rows in self._chunks(len(x)):
            conditions = _take(self.conditions, [prompts[row] for row in rows])
            if lookahead == 0:
                yield _Batch(x[rows], timestep[:1].expand(len(rows)), conditions)
                continue
            ahead = self._open(
                x[rows], [prompts[row] for row in rows], _Remaining(sigma), lookahead
            )
            self._run(ahead, lookahead)
            yield _Batch(ahead.x, _zero_timestep(ahead.x), conditions)

    def score(self, batches: Iterable[_Batch]) -> torch.Tensor:
        """Rewards of all, ``[n]`` on the CPU; NaN for latents or rewards that are not finite."""
        scores = [torch.zeros(0)]
        for x, timestep, conditions in batches:
            finite = _finite_rows(x)
            table = torch.full((len(x),), math.nan, dtype=torch.float32)
            if finite:
                if len(finite) < len(x):
                    x, timestep, conditions = x[finite], timestep[finite], _take(conditions, finite)
                score = self.reward(x, timestep, conditions)
                if not isinstance(score, torch.Tensor) or score.shape != (len(finite),):
                    raise ValueError(
                        f"the reward returned {describe(score)}, expected one score per sample, "
                        f"[{len(finite)}]"
                    )
                self._rewarded += len(finite)
                score = score.detach().cpu()
                table = table.to(torch.promote_types(table.dtype, score.dtype))
                table[finite] = torch.where(score.isfinite(), score, math.nan).to(table.dtype)
            scores.append(table)
        return torch.cat(scores)

    def choose(self, scores: torch.Tensor, prompts: list[int], count: int, step: int) -> list[int]:
        """Rows of the ``count`` best of each prompt, in their order; the first of equals wins."""
        values = scores.tolist()
        rows_of: dict[int, list[int]] = {prompt: [] for prompt in range(self.size)}
        for row, prompt in enumerate(prompts):
            if not math.isnan(values[row]):
                rows_of[prompt].append(row)
        for prompt, rows in rows_of.items():
            if not rows:
                raise ValueError(
                    f"no candidate of prompt {prompt} has a finite score after step {step}: the "
                    "rewards or the latents are NaN or infinite; check the reward at this noise "
                    "level, and the generator's precision"
                )
            rows.sort(key=lambda row: -values[row])
        return [row for rows in rows_of.values() for row in sorted(rows[:count])]

    def record(
        self,
        step: int,
        scores: torch.Tensor,
        prompts: list[int],
        places: list[int],
        width: int,
    ) -> None:
        """Write the scores that were compared after ``step`` into the history."""
        table = torch.full((self.size, width), math.nan, dtype=scores.dtype)
        table[prompts, places] = scores
        self.history[step] = table

    def keep(self, chosen: list[int]) -> None:
        """Go on with these candidates, each with what its sampler remembers."""
        before, index = self.trajectories, self.trajectories[0].index
        x = torch.cat([trajectory.x for trajectory in before])[chosen]
        schedulers = [trajectory.scheduler for trajectory in before]
        sizes = [len(trajectory.x) for trajectory in before]
        self.prompts = [self.prompts[row] for row in chosen]
        self.origins = [self.origins[row] for row in chosen]
        self.trajectories = []
        for rows in self._chunks(len(x)):
            trajectory = self._open(
                x[rows], self._prompts(rows), self.scheduler, self.num_steps, index
            )
            trajectory.scheduler = take_rows(
                schedulers, [chosen[row] for row in rows], sizes, x.shape[1:]
            )
            self.trajectories.append(trajectory)

    def replace(self, x: torch.Tensor, parents: list[int], chosen: list[int], index: int) -> None:
        """Go on with these children of the candidates, from step ``index``."""
        x = x[chosen]
        self.prompts = [self.prompts[parents[row]] for row in chosen]
        self.origins = [self.origins[parents[row]] for row in chosen]
        self.trajectories = [
            self._open(x[rows], self._prompts(rows), self.scheduler, self.num_steps, index)
            for rows in self._chunks(len(x))
        ]

    def finish(self, places: list[int], width: int) -> SearchResult:
        """Take the steps that are left, and choose the best of each prompt."""
        last = self.num_steps - 1
        scores = self.score(self.run(last))
        chosen = self.choose(scores, self.prompts, 1, last)
        self.record(last, scores, self.prompts, places, width)
        x = torch.cat([trajectory.x for trajectory in self.trajectories])
        return SearchResult(
            latents=x[chosen],
            scores=scores[chosen],
            chosen=torch.tensor([self.origins[row] for row in chosen]),
            history=self.history,
            forwards=Forwards(self._generated, self._rewarded),
        )

    def _open(
        self, x: torch.Tensor, prompts: list[int], scheduler: Any, num_steps: int, start: int = 0
    ) -> Trajectory:
        guidance = self.guidance
        if guidance is not None:
            # What has batch 1 belongs to every prompt.
            negative = {
                key: value if len(value) == 1 else value[prompts]
                for key, value in guidance.negative.items()
            }
            guidance = Guidance(guidance.scale, negative, guidance.batched)
        return Trajectory(
            self.transformer,
            x,
            _take(self.conditions, prompts),
            scheduler,
            num_steps,
            guidance=guidance,
            engine=self.engine,
            start=start,
        )

    def _prompts(self, rows: Sequence[int]) -> list[int]:
        return [self.prompts[row] for row in rows]

    def _chunks(self, count: int) -> list[list[int]]:
        size = max(count, 1) if self.batch is None else self.batch
        return [list(range(i, min(i + size, count))) for i in range(0, count, size)]

    def _run(self, trajectory: Trajectory, stop: int) -> None:
        trajectory.run(stop, lambda: self._count(len(trajectory.x)))

    def _velocity(self, trajectory: Trajectory) -> torch.Tensor:
        v = trajectory.velocity()
        self._count(len(trajectory.x))
        return v

    def _count(self, samples: int) -> None:
        forwards = samples * (1 if self.guidance is None else 2)
        self._generated += forwards
        if self._bar is not None:
            self._bar.update(forwards)

    def _timestep(self, trajectory: Trajectory) -> torch.Tensor:
        if trajectory.index == self.num_steps:
            return _zero_timestep(trajectory.x)
        return trajectory.model_timestep(trajectory.index)


def draw(
    shape: Sequence[int], like: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Gaussian noise on the device of ``like``, drawn where the generator is, in float32 or 64."""
    device = generator.device if generator is not None else like.device
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype).to(
        like.device
    )


def _zero_timestep(x: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.zeros(len(x), dtype=wide, device=x.device)


def _finite_rows(x: torch.Tensor) -> list[int]:
    return x.isfinite().flatten(1).all(1).nonzero().flatten().tolist()


def _take(conditions: Conditions, rows: list[int]) -> Conditions:
    return {key: value[rows] for key, value in conditions.items()}
