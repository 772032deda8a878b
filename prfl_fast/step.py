"""The PRFL step, the rollout it is built on, and the supervised loss it alternates with.

Source: "Video Generation Models Are Good Latent Reward Models" (PRFL, arXiv 2511.21541).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prfl_fast._extras import need
from prfl_fast.adapters import Conditions, find_adapter
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.kernels import flow_loss
from prfl_fast.kernels._checks import describe
from prfl_fast.schedulers import detach_state, fresh_copy, start_trajectory, training_sigmas

TIMESTEPS_PER_SIGMA = 1000

# (x [B, C, F, H, W], timestep [B], conditions) → velocity like x, or reward [B].
Velocity = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
Reward = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]


@dataclass(frozen=True)
class PRFLOutput:
    """What one reward-feedback step did; no tensor carries a graph.

    Attributes:
        loss: scalar, mean over the gradient points of ``weight · relu(target - r)``, without
            ``loss_scale``.
        rewards: ``[K, B]``, float32 (float64 for float64 rewards); NaN at points that were not
            reached.
        indices: the K solver steps that carried gradient, increasing.
        timesteps: the K timesteps (1000·σ) at which the latents were rewarded.
        latents: ``[B, C, F, H, W]``, the last latents that were rewarded.
        finite: False if a reward or loss was NaN or infinite. That point was not differentiated and
            the trajectory ended there, but gradients of earlier points are already in ``.grad``:
            zero them and skip the update.
    """

    loss: torch.Tensor
    rewards: torch.Tensor
    indices: tuple[int, ...]
    timesteps: tuple[float, ...]
    latents: torch.Tensor
    finite: bool


def check_transformer(transformer: object) -> None:
    """Raise ``TypeError`` unless an adapter knows it, or it is a function rather than a module."""
    if isinstance(transformer, nn.Module):
        find_adapter(transformer)
    elif not callable(transformer):
        raise TypeError(
            f"transformer is {type(transformer).__name__}, expected a supported model or a "
            "function (x, timestep, conditions) -> velocity"
        )


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` if a tensor has NaN or infinite values."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{name} has {bad} NaN or infinite values of {x.numel()}")


def bind_velocity(
    transformer: nn.Module | Velocity, x: torch.Tensor, conditions: Conditions, name: str
) -> Velocity:
    """The function ``(x, timestep, conditions) → velocity`` of a model, after checking its inputs.

    Args:
        transformer: a supported model, or that function itself for any other (one that is not an
            ``nn.Module``).
        x: latents ``[B, C, F, H, W]``, called ``name`` in messages.
        conditions: tensors whose first dimension is B.

    Raises:
        TypeError: a module of an unsupported class, or something that cannot be called.
        ValueError: latents or conditions of the wrong type, shape or batch, or latents that are not
            finite.
    """
    if not (
        isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim == 5 and x.numel() > 0
    ):
        raise ValueError(
            f"{name} is {describe(x)}, expected a floating-point tensor [B, C, F, H, W]"
        )
    check_finite(name, x)
    if not isinstance(conditions, dict):
        raise ValueError(
            f"conditions is {type(conditions).__name__}, expected a dict of tensors [B, ...]"
        )
    for key, value in conditions.items():
        if not isinstance(value, torch.Tensor) or value.ndim == 0 or value.shape[0] != x.shape[0]:
            raise ValueError(
                f"conditions[{key!r}] is {describe(value)}, expected a tensor whose first "
                f"dimension is {name}'s batch, {x.shape[0]}"
            )
    check_transformer(transformer)
    if not isinstance(transformer, nn.Module):
        return transformer
    model, adapter = transformer, find_adapter(transformer)
    adapter.check_latents(model, x, conditions)
    return lambda x, timestep, conditions: adapter.velocity(model, x, timestep, conditions)


class Trajectory:
    """One run of a sampler from noise, which can stop at a step, take it with gradient, and go on.

    The latents ``x`` keep the noise's dtype and never carry a graph. The scheduler is a private
    copy.

    Raises:
        TypeError, ValueError: as :func:`bind_velocity` and :func:`prfl_fast.schedulers.fresh_copy`.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        noise: torch.Tensor,
        conditions: Conditions,
        scheduler: Any,
        num_steps: int,
    ) -> None:
        self._velocity = bind_velocity(transformer, noise, conditions, "noise")
        self.conditions = conditions
        self.scheduler, self.timesteps = start_trajectory(scheduler, num_steps)
        dtype = torch.float64 if noise.dtype == torch.float64 else torch.float32
        self._model_timesteps = torch.stack(list(self.timesteps)).to(noise.device, dtype)
        self.x = noise.detach()
        self.index = 0

    def model_timestep(self, index: int) -> torch.Tensor:
        """Timestep of step ``index`` as models take it: ``[B]`` on the latents' device."""
        return self._model_timesteps[index].expand(self.x.shape[0])

    def velocity(self) -> torch.Tensor:
        """The model's velocity at the current latents, which are a constant.

        Raises:
            ValueError: the model returned another shape.
        """
        v = self._velocity(self.x, self.model_timestep(self.index), self.conditions)
        if not isinstance(v, torch.Tensor) or v.shape != self.x.shape:
            raise ValueError(
                f"the transformer returned {describe(v)}, expected a velocity of shape "
                f"{list(self.x.shape)}"
            )
        return v

    def solve(self, v: torch.Tensor) -> torch.Tensor:
        """The next latents, differentiable in ``v``; follow with :meth:`move_to`."""
        (x,) = self.scheduler.step(v, self.timesteps[self.index], self.x, return_dict=False)
        return x.to(self.x.dtype)

    def move_to(self, x: torch.Tensor) -> None:
        """Go on from ``x``, the result of :meth:`solve`, leaving its graph behind."""
        self.x = x.detach()
        detach_state(self.scheduler)
        self.index += 1

    @torch.no_grad()
    def run(self, stop: int, on_step: Callable[[], object] = lambda: None) -> None:
        """Take steps without gradient until step ``stop`` is the next one."""
        while self.index < stop:
            self.move_to(self.solve(self.velocity()))
            on_step()


def rollout(
    transformer: nn.Module | Velocity,
    noise: torch.Tensor,
    conditions: Conditions,
    scheduler: Any,
    num_steps: int,
    *,
    stop: int | None = None,
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
        progress: show a tqdm bar.

    Returns:
        The latents after ``stop`` steps, ``[B, C, F, H, W]``.

    Raises:
        TypeError: an unsupported model or scheduler.
        ValueError: noise or conditions of the wrong shape or not finite, or ``stop`` outside 0 …
            num_steps.
    """
    trajectory = Trajectory(transformer, noise, conditions, scheduler, num_steps)
    stop = num_steps if stop is None else stop
    if not 0 <= stop <= num_steps:
        raise ValueError(f"stop is {stop}, expected 0 to num_steps = {num_steps}")
    if not progress:
        trajectory.run(stop)
    else:
        with need("tqdm").tqdm(total=stop, desc="sampling", unit="step") as bar:
            trajectory.run(stop, bar.update)
    return trajectory.x


class PRFL:
    """Process reward feedback learning on latents; a call leaves the gradients in ``.grad``.

    One call samples a trajectory from ``noise``. At each index m drawn by ``plan`` it takes the
    solver step with gradient, ``x_{m+1} = solver(x_m, v_θ(x_m, t_m, c))`` with ``x_m`` and the
    solver's history constant, scores the result where it is, ``r = r_φ(x_{m+1}, t_{m+1}, c)``, and
    runs backward on ``weight · relu(target - r)``, averaged over the batch and over the K drawn
    indices (arXiv 2511.21541). Then it goes on from the same ``x_{m+1}`` without the graph, so the
    forward of a gradient step is also a rollout step, and only one step's graph is alive at a time.
    After the last index it stops.

    The transformer's train/eval mode is left alone. Only the reward's input gets a gradient from
    the reward. Randomness comes from the given generator only, and only if ``indices`` are not
    given.

    Args:
        transformer: a supported model (patched or not, with or without LoRA), or a function
            ``(x, timestep [B], conditions) -> velocity`` for any other.
        reward: ``(x, timestep [B], conditions) -> [B]``, e.g. a frozen ``LatentRewardModel``.
        scheduler: ``FlowUniPC``, ``FlowEuler`` or a diffusers flow scheduler. It is copied here and
            again for every trajectory: the caller's object never moves, and nothing passes from one
            call to the next.
        plan: which steps carry gradient.
        num_steps: solver steps of the schedule, at least 2.
        target: rewards at or above it give no gradient. The default 2 lies above a sigmoid's range:
            never reached.
        weight: factor of the loss.

    Raises:
        TypeError: an unsupported model, reward or scheduler.
        ValueError: ``num_steps`` below 2 or too small for the plan's points; ``target`` or
            ``weight`` not finite.
    """

    def __init__(
        self,
        transformer: nn.Module | Velocity,
        reward: nn.Module | Reward,
        scheduler: Any,
        plan: GradientPlan | None = None,
        *,
        num_steps: int = 40,
        target: float = 2.0,
        weight: float = 0.1,
    ) -> None:
        check_transformer(transformer)
        if not callable(reward):
            raise TypeError(
                f"reward is {type(reward).__name__}, expected a callable "
                "(x, timestep, conditions) -> [B]"
            )
        check_hinge(target, weight)
        self.transformer = transformer
        self.reward = reward
        self.plan = GradientPlan.prfl() if plan is None else plan
        self.plan.outcomes(num_steps)  # raises if the plan does not fit the schedule
        self.num_steps = num_steps
        self.target = target
        self.weight = weight
        self._scheduler = fresh_copy(scheduler)

    def __call__(
        self,
        noise: torch.Tensor,
        conditions: Conditions,
        *,
        generator: torch.Generator | None = None,
        indices: Sequence[int] | None = None,
        loss_scale: float = 1.0,
    ) -> PRFLOutput:
        """Run one trajectory and accumulate the gradient of the reward loss into ``.grad``.

        Args:
            noise: ε ~ N(0, I), ``[B, C, F, H, W]``; the latents keep its dtype along the
                trajectory.
            conditions: tensors of batch B for the transformer and the reward.
            generator: draws the plan's indices; ranks that share the trajectory need the same
                state.
            indices: the gradient steps instead of a draw: increasing, without repeats, in 0 …
                num_steps-2.
            loss_scale: factor of the gradients only, e.g. ``1 / accumulation``.

        Returns:
            See :class:`PRFLOutput`; check ``finite`` before the optimizer step.

        Raises:
            TypeError: an unsupported model.
            ValueError: noise or conditions of the wrong shape or not finite; indices out of order
                or range; a reward with trainable parameters, of the wrong shape, or without a graph
                to its input; a transformer without trainable parameters.
        """
        check_frozen(self.reward)
        chosen = self._indices(indices, generator)
        trajectory = Trajectory(
            self.transformer, noise, conditions, self._scheduler, self.num_steps
        )
        scores: list[torch.Tensor] = []
        losses: list[torch.Tensor] = []
        finite = True
        for index in chosen:
            trajectory.run(index)
            score, loss, finite = self._point(trajectory, loss_scale, len(chosen))
            scores.append(score)
            losses.append(loss)
            if not finite:
                break
        missing = [torch.full_like(scores[0], math.nan)] * (len(chosen) - len(scores))
        return PRFLOutput(
            loss=torch.stack(losses).sum(),
            rewards=torch.stack(scores + missing),
            indices=chosen,
            timesteps=tuple(float(trajectory.timesteps[i + 1]) for i in chosen),
            latents=trajectory.x,
            finite=finite,
        )

    def _indices(
        self, indices: Sequence[int] | None, generator: torch.Generator | None
    ) -> tuple[int, ...]:
        if indices is None:
            return self.plan.draw(self.num_steps, generator)
        return check_indices(indices, self.num_steps - 1)

    @torch.enable_grad()
    def _point(
        self, trajectory: Trajectory, loss_scale: float, points: int
    ) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Take the next step with gradient and run backward: rewards ``[B]``, loss, finite."""
        x = trajectory.solve(differentiable_velocity(trajectory))
        timestep = trajectory.model_timestep(trajectory.index + 1)
        score = self.reward(x, timestep, trajectory.conditions)
        trajectory.move_to(x)
        return hinge_backward(score, len(x), self.target, self.weight / points, loss_scale)


def differentiable_velocity(trajectory: Trajectory) -> torch.Tensor:
    """The velocity at the trajectory's next step, with its graph.

    Raises:
        ValueError: nothing in the transformer requires a gradient.
    """
    v = trajectory.velocity()
    if not v.requires_grad:
        raise ValueError(
            "the transformer's velocity needs no gradient: no parameter of it requires one; call "
            "requires_grad_(True) on what should train, or add LoRA layers"
        )
    return v


def hinge_backward(
    score: torch.Tensor, batch: int, target: float, weight: float, loss_scale: float
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Backward of ``weight · relu(target - score).mean() · loss_scale``, if all is finite.

    Returns:
        Detached: scores ``[B]`` in float32 (or float64), the loss without ``loss_scale``, and
        whether it was finite.

    Raises:
        ValueError: the scores are not ``[batch]``, or carry no graph.
    """
    if not isinstance(score, torch.Tensor) or score.shape != (batch,):
        raise ValueError(
            f"the reward returned {describe(score)}, expected one score per sample, [{batch}]"
        )
    if not score.requires_grad:
        raise ValueError(
            "the reward's scores carry no graph to its input; it must not detach it or run under "
            "no_grad"
        )
    score = score if score.dtype == torch.float64 else score.float()
    loss = weight * torch.relu(target - score).mean()
    # One wait for the device. The scores are looked at too: relu would hide an infinite one.
    finite = bool(torch.isfinite(score.detach()).all() & torch.isfinite(loss.detach()))
    if finite:
        (loss * loss_scale).backward()
    return score.detach(), loss.detach(), finite


def check_hinge(target: float, weight: float) -> None:
    """Raise ``ValueError`` unless both are finite numbers."""
    for name, value in (("target", target), ("weight", weight)):
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value!r}, expected a finite number")


def check_indices(indices: Sequence[int], count: int) -> tuple[int, ...]:
    """Gradient steps as a tuple; ``ValueError`` unless increasing, unique, in 0 … count-1."""
    chosen = tuple(indices)
    whole = all(isinstance(i, int) and not isinstance(i, bool) for i in chosen)
    if (
        not chosen
        or not whole
        or list(chosen) != sorted(set(chosen))
        or not 0 <= chosen[0] <= chosen[-1] < count
    ):
        raise ValueError(
            f"indices is {indices!r}, expected increasing integers without repeats in 0 … "
            f"{count - 1}"
        )
    return chosen


def check_frozen(reward: object) -> None:
    """Raise ``ValueError`` if a reward, a module or a module's method, has trainable parameters."""
    module = reward if isinstance(reward, nn.Module) else getattr(reward, "__self__", None)
    if isinstance(module, nn.Module):
        trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        if trainable:
            raise ValueError(
                f"{type(module).__name__} has {len(trainable)} trainable parameters (first: "
                f"{trainable[0]}), expected none: their gradients would be computed and kept; call "
                "reward.freeze(), or requires_grad_(False) on a plain module"
            )


def sft_loss(
    transformer: nn.Module | Velocity,
    latents: torch.Tensor,
    conditions: Conditions,
    *,
    noise: torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
) -> torch.Tensor:
    """Flow-matching loss ``mean((v_θ(x_σ, 1000σ, c) - (ε - x0))²)`` with ``x_σ = (1-σ)·x0 + σ·ε``.

    ``x_σ`` is formed in float32 (float64 for float64 latents), whatever the latents' dtype.

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        latents: clean latents x0, ``[B, C, F, H, W]``.
        conditions: tensors of batch B.
        noise: ε like ``latents``; drawn if ``None``.
        sigma: noise level in [0, 1], one number or ``[B]``; if ``None``, drawn per sample, uniform
            over ``training_sigmas(shift)``.
        generator: source of what is drawn, noise first; on any device.
        shift: of the training schedule.

    Returns:
        A scalar with graph, float32 (float64 for float64 latents); backward is the caller's.

    Raises:
        TypeError: an unsupported model.
        ValueError: latents, conditions, noise or sigma of the wrong shape, out of range or not
            finite.
    """
    velocity = bind_velocity(transformer, latents, conditions, "latents")
    wide = torch.float64 if latents.dtype == torch.float64 else torch.float32
    device, batch = latents.device, latents.shape[0]
    source = generator.device if generator is not None else device
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator, device=source, dtype=wide)
        noise = noise.to(device)
    else:
        like = isinstance(noise, torch.Tensor) and noise.shape == latents.shape
        if not like or noise.device != device:
            raise ValueError(
                f"noise is {describe(noise)}, expected the shape and device of latents, "
                f"{describe(latents)}"
            )
        check_finite("noise", noise)
    if sigma is None:
        levels = training_sigmas(shift).to(source, wide)
        drawn = torch.randint(len(levels), (batch,), generator=generator, device=source)
        sigma = levels[drawn].to(device)
    else:
        sigma = torch.as_tensor(sigma, dtype=wide).to(device)
        if sigma.shape not in ((), (batch,)) or not bool(((sigma >= 0) & (sigma <= 1)).all()):
            raise ValueError(
                f"sigma is {sigma.tolist()}, expected a number in [0, 1] or {batch} of them"
            )
        sigma = sigma.expand(batch)
    level = sigma.view(-1, 1, 1, 1, 1)
    x = (1 - level) * latents.to(wide) + level * noise.to(wide)
    return flow_loss(velocity(x, TIMESTEPS_PER_SIGMA * sigma, conditions), noise, latents)
