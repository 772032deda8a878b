"""Candidates of a search, advanced, scored and selected together, without gradient."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from prfl_fast.kernels import flow_step
from prfl_fast.models.adapter import Conditions, set_first_frame
from prfl_fast.models.velocity import bind_velocity, model_of
from prfl_fast.rewards.functions import Reward, check_callable, reward_modules
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowEuler
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.utils.checks import check, check_count
from prfl_fast.utils.optional import progress_bar
from prfl_fast.utils.sharded import holds_on_all_ranks, shares_weights


def take_rows(
    schedulers: Sequence[Any], rows: list[int], sizes: Sequence[int], shape: torch.Size
) -> Any:
    """Gather rows of the state of several schedulers into one scheduler.

    The i-th scheduler holds ``sizes[i]`` latents of ``shape``; all are at the same step. ``rows``
    index their concatenation. Raise ``ValueError`` if a tensor in their state has neither the
    latents' shape nor one dimension.
    """
    scheduler = copy.copy(schedulers[0])
    for name in vars(scheduler):
        parts = [vars(each)[name] for each in schedulers]
        vars(scheduler)[name] = _gathered(parts, rows, sizes, shape, name)
    return scheduler


def _gathered(
    parts: list[Any], rows: list[int], sizes: Sequence[int], shape: torch.Size, name: str
) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        if first.ndim < 2:
            return first  # levels and timesteps, the same for all
        ok = all(part.shape == (n, *shape) for part, n in zip(parts, sizes, strict=True))
        expected = f"latents {list(shape)} of each candidate"
        check(ok, f"the scheduler's {name}", first, expected, hint="Use FlowUniPC or FlowEuler.")
        return torch.cat(parts)[rows]
    if type(first) is dict:
        return {
            key: _gathered([part[key] for part in parts], rows, sizes, shape, name) for key in first
        }
    if type(first) in (list, tuple):
        return type(first)(
            _gathered(list(items), rows, sizes, shape, name) for items in zip(*parts, strict=True)
        )
    if hasattr(first, "set_timesteps") and hasattr(first, "step"):
        return take_rows(parts, rows, sizes, shape)
    return first


class Forwards(NamedTuple):
    """Numbers of forwards and backwards, counted per sample.

    Attributes:
        generator: forwards of the generator; a guided velocity takes two.
        reward: forwards of the reward.
        generator_backward, reward_backward: backwards; each costs about two forwards, or one if no
            parameter gets a gradient.
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
        chosen: ``[B]``, int64, the number of the initial noise of each; 0 is the caller's noise.
        history: scores that were compared after each step, ``[B, n]`` by step; NaN without a
            candidate or a finite score. The last entry decided the result.
        forwards: cost of the search.
    """

    latents: torch.Tensor
    scores: torch.Tensor
    chosen: torch.Tensor
    history: dict[int, torch.Tensor]
    forwards: Forwards


class _Batch(NamedTuple):
    """Arguments of a reward."""

    x: torch.Tensor
    timestep: torch.Tensor
    conditions: Conditions


class _Remaining(FlowEuler):
    """Take evenly spaced Euler steps from a level to 0."""

    def __init__(self, sigma: float) -> None:
        super().__init__(shift=1.0)
        self._start = sigma

    def levels(self, count: int) -> tuple[list[float], torch.Tensor]:
        sigmas = [self._start * (count - i) / count for i in range(count)]
        levels = torch.tensor(sigmas, dtype=torch.float64, device="cpu")
        return sigmas, levels.to(torch.float32) * 1000


class Candidates:
    """Advance, score and select the candidates of B prompts, which are all at one step.

    A candidate is a row of one of the trajectories, which have at most ``batch`` rows each.
    ``prompts`` holds the prompt of every candidate in increasing order, ``origins`` the number of
    its initial noise.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: nn.Module | Reward,
        noise: torch.Tensor,
        conditions: Conditions,
        batch: int | None = None,
    ) -> None:
        check_callable("reward", reward, " (x, timestep, conditions) -> [B]")
        if batch is not None:
            check_count("batch", batch)
        config = RolloutConfig() if sampler.rollout is None else sampler.rollout
        hint = "A search drops trajectories, so their drift cannot be measured."
        check(not config.inexact, "rollout", config, "an exact one", hint=hint)
        # Errors of the arguments appear here, before the first of many trajectories.
        bind_velocity(sampler.transformer, noise, conditions, "noise")
        if sampler.guidance is not None:
            sampler.guidance.branches(conditions)
        self.sampler, self.reward, self.conditions, self.batch = sampler, reward, conditions, batch
        self.engine = RolloutEngine(sampler.transformer, config)
        self.branches = 1 if sampler.guidance is None else 2
        models = (model_of(sampler.transformer), *reward_modules(reward))
        self._shares_weights = shares_weights(*models)
        self.size = len(noise)
        self.prompts: list[int] = []
        self.origins: list[int] = []
        self.trajectories: list[Trajectory] = []
        self.history: dict[int, torch.Tensor] = {}
        self._generated = self._rewarded = 0
        self._tick: Callable[..., object] = lambda count: None

    def begin(self, noise: torch.Tensor, count: int, generator: torch.Generator | None) -> None:
        """Start ``count`` candidates of each prompt: the given noise and drawn ones."""
        others = draw((self.size, count - 1, *noise.shape[1:]), noise, generator)
        # [B, count, C, F, H, W] → [B·count, C, F, H, W], the candidates of a prompt in a row.
        x = torch.cat([noise.unsqueeze(1), others.to(noise.dtype)], dim=1).flatten(0, 1)
        self.prompts = [prompt for prompt in range(self.size) for _ in range(count)]
        self.origins = [origin for _ in range(self.size) for origin in range(count)]
        self._reopen(x, 0)

    @contextlib.contextmanager
    def bar(self, name: str, total: int | None) -> Iterator[None]:
        """Show a progress bar of ``total`` generator forwards per prompt; show none for None."""
        total = None if total is None else total * self.size * self.branches
        with progress_bar(name, "forward", total) as self._tick:
            yield

    def run(self, step: int, *, clean: bool = False) -> list[_Batch]:
        """Take all steps up to ``step`` itself; return the latents to reward after it.

        With ``clean`` these are the estimates of x0 made at ``step``.
        """
        batches = []
        for trajectory in self.trajectories:
            self._run(trajectory, step if clean else step + 1)
            x, timestep = trajectory.x, _zero_timestep(trajectory.x)
            if clean:
                v = self._velocity(trajectory)
                x = flow_step([x, v], [1.0, -trajectory.sigma(step)])
                trajectory.move_to(trajectory.solve(v))
            elif trajectory.index < self.sampler.num_inference_steps:
                timestep = trajectory.model_timestep(trajectory.index)
            batches.append(_Batch(x, timestep, trajectory.conditions))
        return batches

    def branch(
        self, step: int, candidates: int, eta: float, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, list[int]]:
        """Take stochastic steps from every candidate; return the finite ones and their parents."""
        here, there = (self.trajectories[0].sigma(i) for i in (step, step + 1))
        kept = (1 - here) / (1 - there) * there
        fresh = eta * there / here * math.sqrt(max(here**2 - kept**2, 0.0))
        # Fresh noise replaces a part of Euler's predicted noise; for eta = 0 the step is Euler's.
        change = math.sqrt(max(there**2 - fresh**2, 0.0)) - there
        coefficients = [1 + change, there - here + change * (1 - here), fresh]
        x = self._latents()
        v = torch.cat([self._velocity(trajectory) for trajectory in self.trajectories])
        x, v = x.repeat_interleave(candidates, 0), v.repeat_interleave(candidates, 0)
        if fresh:
            x = flow_step([x, v, draw(x.shape, x, generator)], coefficients)
        else:
            x = flow_step([x, v], coefficients[:2])
        self._check_alike(x)
        finite = _finite_rows(x)
        return x[finite], [row // candidates for row in finite]

    def look_ahead(
        self, x: torch.Tensor, prompts: list[int], step: int, lookahead: int
    ) -> Iterable[_Batch]:
        """Yield the latents to reward: the result of ``lookahead`` Euler steps from ``step``."""
        first, short = self.trajectories[0], self.sampler
        if lookahead:
            levels = _Remaining(first.sigma(step))
            short = replace(short, scheduler=levels, num_inference_steps=lookahead)
        for rows in self._chunks(len(x)):
            chosen = [prompts[row] for row in rows]
            if lookahead:
                ahead = self._open(x[rows], chosen, short)
                self._run(ahead, lookahead)
                yield _Batch(ahead.x, _zero_timestep(ahead.x), ahead.conditions)
            else:
                timestep = first.model_timestep(step)[:1].expand(len(rows))
                conditions = _take(self.conditions, chosen)
                yield _Batch(set_first_frame(x[rows], conditions), timestep, conditions)

    def score(self, batches: Iterable[_Batch]) -> torch.Tensor:
        """Return all rewards, ``[n]`` on the CPU; NaN where latents or rewards are not finite."""
        scores = [torch.zeros(0, dtype=torch.float32, device="cpu")]
        for x, timestep, conditions in batches:
            self._check_alike(x)
            finite = _finite_rows(x)
            table = torch.full((len(x),), math.nan, dtype=torch.float32, device="cpu")
            if finite:
                # A reward model raises on latents that are not finite, so these rows are left out.
                if len(finite) < len(x):
                    x, timestep, conditions = x[finite], timestep[finite], _take(conditions, finite)
                score = self.reward(x, timestep, conditions)
                ok = isinstance(score, torch.Tensor) and score.shape == (len(finite),)
                expected = f"one score per sample, [{len(finite)}]"
                check(ok, "the reward's result", score, expected)
                self._check_alike(score)
                self._rewarded += len(finite)
                score = score.detach().cpu()
                table = table.to(torch.promote_types(table.dtype, score.dtype))
                table[finite] = torch.where(score.isfinite(), score, math.nan).to(table.dtype)
            scores.append(table)
        return torch.cat(scores)

    def _check_alike(self, found: torch.Tensor) -> None:
        """Raise ``ValueError`` on all ranks that share weights if one has values not finite."""
        # A rank that drops candidates would call the models less often than the others, which would
        # wait for it.
        if self._shares_weights and not bool(holds_on_all_ranks(found.isfinite().all())):
            raise ValueError(
                "a latent or score of a candidate is NaN or infinite on at least one rank. Ranks "
                "that share weights must keep equally many candidates, so none may be dropped. "
                "Check the reward at this noise level, and the generator's precision"
            )

    def choose(self, scores: torch.Tensor, prompts: list[int], count: int, step: int) -> list[int]:
        """Return the ``count`` best rows of each prompt, in order."""
        values, chosen = scores.tolist(), []
        for prompt in range(self.size):
            rows = [r for r, p in enumerate(prompts) if p == prompt and not math.isnan(values[r])]
            if not rows:
                raise ValueError(
                    f"no candidate of prompt {prompt} has a finite score after step {step}: the "
                    "rewards or the latents are NaN or infinite. Check the reward at this noise "
                    "level, and the generator's precision"
                )
            # The sort is stable, so that ties go to the first row.
            chosen += sorted(sorted(rows, key=lambda row: -values[row])[:count])
        return chosen

    def record(
        self, step: int, scores: torch.Tensor, prompts: list[int], places: list[int], width: int
    ) -> None:
        """Write the scores that were compared after ``step`` into the history."""
        table = torch.full((self.size, width), math.nan, dtype=scores.dtype, device="cpu")
        table[prompts, places] = scores
        self.history[step] = table

    def keep(self, chosen: list[int]) -> None:
        """Continue with these candidates, each with its sampler's history."""
        schedulers = [trajectory.scheduler for trajectory in self.trajectories]
        sizes = [len(trajectory.x) for trajectory in self.trajectories]
        self.replace(self._latents(), range(sum(sizes)), chosen, self.trajectories[0].index)
        # A multistep sampler's history must move with its candidate.
        for trajectory, rows in zip(self.trajectories, self._chunks(len(chosen)), strict=True):
            taken = [chosen[row] for row in rows]
            trajectory.scheduler = take_rows(schedulers, taken, sizes, trajectory.x.shape[1:])

    def replace(
        self, x: torch.Tensor, parents: Sequence[int], chosen: list[int], index: int
    ) -> None:
        """Continue with these children of the candidates, from step ``index``."""
        self.prompts = [self.prompts[parents[row]] for row in chosen]
        self.origins = [self.origins[parents[row]] for row in chosen]
        self._reopen(x[chosen], index)

    def finish(self, places: list[int], width: int) -> SearchResult:
        """Take the remaining steps, and choose the best of each prompt."""
        last = self.sampler.num_inference_steps - 1
        scores = self.score(self.run(last))
        chosen = self.choose(scores, self.prompts, 1, last)
        self.record(last, scores, self.prompts, places, width)
        return SearchResult(
            latents=self._latents()[chosen],
            scores=scores[chosen],
            chosen=torch.tensor([self.origins[row] for row in chosen], device="cpu"),
            history=self.history,
            forwards=Forwards(self._generated, self._rewarded),
        )

    def _latents(self) -> torch.Tensor:
        return torch.cat([trajectory.x for trajectory in self.trajectories])

    def _reopen(self, x: torch.Tensor, index: int) -> None:
        """Make the trajectories of all candidates from their latents at step ``index``."""
        chunks = [(x[rows], [self.prompts[r] for r in rows]) for rows in self._chunks(len(x))]
        self.trajectories = [self._open(*chunk, self.sampler, index) for chunk in chunks]

    def _open(
        self, x: torch.Tensor, prompts: list[int], sampler: Sampler, start: int = 0
    ) -> Trajectory:
        guidance = sampler.guidance
        if guidance is not None:
            # A condition of batch 1 belongs to every prompt.
            negative = {
                key: value if len(value) == 1 else value[prompts]
                for key, value in guidance.negative.items()
            }
            sampler = replace(sampler, guidance=replace(guidance, negative=negative))
        conditions = _take(self.conditions, prompts)
        return Trajectory(sampler, x, conditions, engine=self.engine, start=start)

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
        forwards = samples * self.branches
        self._generated += forwards
        self._tick(forwards)


def draw(
    shape: Sequence[int], like: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Draw Gaussian noise on the generator's device, in float32 or 64; move it to ``like``."""
    device = generator.device if generator is not None else like.device
    dtype = torch.promote_types(like.dtype, torch.float32)
    noise = torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    return noise.to(like.device)


def _zero_timestep(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)


def _finite_rows(x: torch.Tensor) -> list[int]:
    return x.isfinite().flatten(1).all(1).nonzero().flatten().tolist()


def _take(conditions: Conditions, rows: list[int]) -> Conditions:
    return {key: value[rows] for key, value in conditions.items()}
