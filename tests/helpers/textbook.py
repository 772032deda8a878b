"""Reward gradients as their papers state them, in plain PyTorch, without prfl_fast.

Everything is written out for one reader: a sampler, then one function per estimator that returns
the loss with its whole graph, so that ``torch.autograd.grad`` of it is the paper's gradient. Steps
that a paper leaves out of the graph run under ``torch.no_grad``. A latent at noise level σ is
``x = (1-σ)·x0 + σ·ε``, the model predicts ``v = ε - x0``, and a step goes from σ_i to σ_{i+1}.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Solver:
    """Levels and timesteps, one entry more than there are steps: the result's own, 0.

    ``kept`` are the indices of the levels that a coarser trajectory visits.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor, kept: Sequence[int] | None) -> None:
        kept = range(len(sigmas) + 1) if kept is None else kept
        self.count = len(kept) - 1
        self.sigmas = [[*sigmas.tolist(), 0.0][i] for i in kept]
        self.timesteps = [[*timesteps.tolist(), 0.0][i] for i in kept]


class Euler(Solver):
    """``x ← x + (σ' - σ)·v`` on the levels of ``FlowMatchEulerDiscreteScheduler``."""

    def __init__(self, count: int, shift: float = 5.0, kept: Sequence[int] | None = None) -> None:
        low = torch.tensor(0.001, dtype=torch.float32)
        low = shift * low / (1 + (shift - 1) * low)
        even = torch.linspace(1, low.item(), count, dtype=torch.float64)
        sigmas = (shift * even / (1 + (shift - 1) * even)).to(torch.float32)
        super().__init__(sigmas, sigmas * 1000, kept)

    def step(self, i: int, v: Tensor, x: Tensor) -> Tensor:
        return x + (self.sigmas[i + 1] - self.sigmas[i]) * v


class UniPC(Solver):
    """UniPC (arXiv 2302.04867) of order 2 with B(h) = e^h - 1, on the levels of official Wan.

    Step i takes the estimate of x0 found at x_i, corrects x_i with it, and predicts x_{i+1} from
    the corrected x_i. The order is 1 at a trajectory's first step, wherever that is, and at the
    schedule's last. The estimates and corrected latents that are kept between steps carry their
    graph.
    """

    def __init__(self, count: int, shift: float = 5.0, kept: Sequence[int] | None = None) -> None:
        first = torch.tensor(0.999, dtype=torch.float32).item()  # as official Wan rounds it
        even = torch.linspace(first, 0, count + 1, dtype=torch.float64)[:-1]
        sigmas = shift * even / (1 + (shift - 1) * even)
        super().__init__(sigmas.to(torch.float32), (sigmas * 1000).long().double(), kept)
        self.estimates: list[Tensor] = []
        self.corrected: Tensor | None = None

    def log_snr(self, i: int) -> float:
        sigma = self.sigmas[i]
        return math.inf if sigma == 0 else math.log((1 - sigma) / sigma)

    def step(self, i: int, v: Tensor, x: Tensor) -> Tensor:
        estimate = x - self.sigmas[i] * v
        if self.estimates:
            x = self.correct(i, x, estimate)
        h = self.log_snr(i + 1) - self.log_snr(i)
        slope = torch.zeros_like(x)
        if self.estimates and i < self.count - 1:
            ratio = (self.log_snr(i - 1) - self.log_snr(i)) / h
            slope = 0.5 * (self.estimates[-1] - estimate) / ratio
        ahead = self.sigmas[i + 1]
        out = ahead / self.sigmas[i] * x - (1 - ahead) * math.expm1(-h) * (estimate + slope)
        self.estimates.append(estimate)
        self.corrected = x
        return out

    def correct(self, i: int, x: Tensor, estimate: Tensor) -> Tensor:
        """UniC: step i-1 again, now with the estimate at its end, in place of x."""
        last = self.estimates[-1]
        h = self.log_snr(i) - self.log_snr(i - 1)
        growth = math.expm1(-h)
        if len(self.estimates) == 1:
            slope = 0.5 * (estimate - last)
        else:
            ratio = (self.log_snr(i - 2) - self.log_snr(i - 1)) / h
            phi_2 = -growth / h - 1
            phi_3 = -phi_2 / h - 0.5
            # [1 1; ratio 1]·[a b] = [φ2 2φ3]/B
            b = (2 * phi_3 / growth - ratio * phi_2 / growth) / (1 - ratio)
            a = phi_2 / growth - b
            slope = a * (self.estimates[-2] - last) / ratio + b * (estimate - last)
        scale = self.sigmas[i] / self.sigmas[i - 1]
        return scale * self.corrected - (1 - self.sigmas[i]) * growth * (last + slope)


class World(NamedTuple):
    """A generator and an objective, both bound to their conditions.

    Attributes:
        velocity: ``(x, timestep) → v``.
        loss: ``(x, timestep) → scalar``, what a gradient step lowers.
    """

    velocity: Callable[[Tensor, float], Tensor]
    loss: Callable[[Tensor, float], Tensor]


def hinge(
    scores: dict[str, Callable[[Tensor, float], Tensor]],
    weights: dict[str, float],
    target: float | None,
    weight: float,
) -> Callable[[Tensor, float], Tensor]:
    """``weight·mean_b Σ_k w_k·max(target - r_k, 0)``; without a target ``-r_k`` takes its place."""

    def loss(x: Tensor, timestep: float) -> Tensor:
        total = torch.zeros(x.shape[0], dtype=x.dtype)
        for name, score in scores.items():
            r = score(x, timestep)
            missing = -r if target is None else torch.where(r < target, target - r, 0.0)
            total = total + weights[name] * missing
        return weight * total.sum() / x.shape[0]

    return loss


def guided(
    velocity: Callable[[Tensor, float], Tensor],
    negative: Callable[[Tensor, float], Tensor],
    scale: float,
) -> Callable[[Tensor, float], Tensor]:
    """Classifier-free guidance (arXiv 2207.12598); the gradient takes both branches."""

    def combined(x: Tensor, timestep: float) -> Tensor:
        conditional, unconditional = velocity(x, timestep), negative(x, timestep)
        return (1 - scale) * unconditional + scale * conditional

    return combined


def advance(world: World, solver, x: Tensor, start: int, stop: int) -> Tensor:
    """Take steps start … stop-1, with gradient if it is enabled."""
    for i in range(start, stop):
        x = solver.step(i, world.velocity(x, solver.timesteps[i]), x)
    return x


def sample(world: World, solver, x: Tensor, start: int, stop: int) -> Tensor:
    """Take the same steps without gradient."""
    with torch.no_grad():
        return advance(world, solver, x, start, stop)


def corrupt(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    return (1 - sigma) * x0 + sigma * noise


def prfl(world: World, solver, noise: Tensor, m: int) -> Tensor:
    """PRFL (arXiv 2511.21541): one step with gradient, scored where it leads."""
    x = sample(world, solver, noise, 0, m)
    x = solver.step(m, world.velocity(x, solver.timesteps[m]), x)
    return world.loss(x, solver.timesteps[m + 1])


def refl(world: World, solver, noise: Tensor, m: int) -> Tensor:
    """ReFL (arXiv 2304.05977): stop at a late step, score its one-step estimate of x0."""
    x = sample(world, solver, noise, 0, m)
    clean = x - solver.sigmas[m] * world.velocity(x, solver.timesteps[m])
    return world.loss(clean, 0.0)


def draft(world: World, solver, noise: Tensor, k: int) -> Tensor:
    """DRaFT-K (arXiv 2309.17400): gradient through the last K steps; K = N is plain DRaFT."""
    x = sample(world, solver, noise, 0, solver.count - k)
    return world.loss(advance(world, solver, x, solver.count - k, solver.count), 0.0)


def draft_lv(world: World, solver, noise: Tensor, renoise: Sequence[Tensor]) -> Tensor:
    """DRaFT-LV (arXiv 2309.17400): DRaFT-1, and its last step again from the noised result.

    The paper adds the gradients up; this is their mean, which is the sum at another learning rate.
    """
    last = solver.count - 1
    x = sample(world, solver, noise, 0, last)
    x = solver.step(last, world.velocity(x, solver.timesteps[last]), x)
    losses, result, sigma = [world.loss(x, 0.0)], x.detach(), solver.sigmas[last]
    for epsilon in renoise:
        x = corrupt(result, epsilon, sigma)
        losses.append(world.loss(x - sigma * world.velocity(x, solver.timesteps[last]), 0.0))
    return sum(losses) / len(losses)


def alignprop(world: World, solver, noise: Tensor, k: int) -> Tensor:
    """AlignProp (arXiv 2310.03739): the model's output is cut off before the last K steps.

    As in its code, the latents are never detached and every step runs with gradient enabled.
    """
    x = noise
    for i in range(solver.count):
        v = world.velocity(x, solver.timesteps[i])
        x = solver.step(i, v.detach() if i < solver.count - k else v, x)
    return world.loss(x, 0.0)


def one_step(world: World, solver, x0: Tensor, noise: Tensor, m: int) -> Tensor:
    """Noise a real latent to level m and score the model's estimate of it.

    ControlNet++ (arXiv 2404.07987) does it at low levels with a reward on consistency; the reward
    term of reward guided latent consistency distillation (arXiv 2403.11027) at any level with the
    student, whose consistency function of a flow is this estimate.
    """
    sigma = solver.sigmas[m]
    x = corrupt(x0, noise, sigma)
    return world.loss(x - sigma * world.velocity(x, solver.timesteps[m]), 0.0)


def instruct_video(world: World, solver, x0: Tensor, noise: Tensor, start: int, k: int) -> Tensor:
    """InstructVideo (arXiv 2312.12490): a video noised part of the way and sampled again.

    Its objective on frames is :func:`attenuated`.
    """
    x = sample(world, solver, corrupt(x0, noise, solver.sigmas[start]), start, solver.count - k)
    return world.loss(advance(world, solver, x, solver.count - k, solver.count), 0.0)


def attenuated(
    score: Callable[[Tensor, float, int], Tensor], frames: Tensor, rate: float
) -> Callable[[Tensor, float], Tensor]:
    """InstructVideo's reward: ``(1/S)·Σ_s exp(-λ·|f_s - ⌊F/2⌋|)·r(frame f_s)``.

    Args:
        score: ``(one frame of one sample, timestep, which sample) → [1]``.
        frames: f, ``[B, S]``, one frame of each segment of each video.
    """

    def total(x: Tensor, timestep: float) -> Tensor:
        rewards = []
        for b, chosen in enumerate(frames.tolist()):
            terms = [
                math.exp(-rate * abs(f - x.shape[2] // 2))
                * score(x[b : b + 1, :, f : f + 1], timestep, b)[0]
                for f in chosen
            ]
            rewards.append(sum(terms) / len(terms))
        return torch.stack(rewards)

    return total


def reno(world: World, solver, noise: Tensor) -> Tensor:
    """ReNO (arXiv 2406.04312): the result's loss; its gradient is taken to ``noise``."""
    return world.loss(advance(world, solver, noise, 0, solver.count), 0.0)


def flow_nrg(
    velocity: Callable[[Tensor, float], Tensor],
    score: Callable[[Tensor, float], Tensor],
    solver,
    noise: Tensor,
    steps: Sequence[int],
    weight: float,
) -> tuple[Tensor, list[Tensor]]:
    """Flow-NRG (arXiv 2501.13918): sample with ``v - w·σ/(1-σ)·∇_x r(x, t)`` at the given steps.

    Returns the result and the scores at those steps. A sample is guided by its own gradient, so a
    batch is so many single samples.
    """
    x, scores = noise, []
    for i in range(solver.count):
        sigma, t = solver.sigmas[i], solver.timesteps[i]
        v = velocity(x, t).detach()
        if i in steps:
            x = x.detach().requires_grad_()
            scores.append(score(x, t))
            (slope,) = torch.autograd.grad(scores[-1].sum(), x)
            v = v - weight * sigma / (1 - sigma) * slope
        x = solver.step(i, v, x.detach())
    return x, [r.detach() for r in scores]


def divergence(
    world: World, base: Callable[[Tensor, float], Tensor], x: Tensor, timestep: float
) -> Tensor:
    """Mean squared distance of the velocity from the initial model's at given latents.

    Where the latents are a chain's, they depend on the parameters too, and both velocities on them.
    """
    return ((world.velocity(x, timestep) - base(x, timestep)) ** 2).mean()
