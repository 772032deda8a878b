"""What scores latents: the contract of a reward, rewards on pixels, ensembles of rewards."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from prfl_fast.adapters import Conditions
from prfl_fast.kernels._checks import describe

# (x [B, C, F, H, W], timestep [B], conditions) → scores [B], higher is better.
Reward = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
EnsembleMode = Literal["mean", "worst", "uncertainty"]


def check_frozen(reward: object) -> None:
    """Raise ``ValueError`` if a reward has trainable parameters.

    Looked at are a module, the module of a bound method or of a partial call, and what an object
    lists in ``members`` (:class:`PixelReward`, :class:`RewardEnsemble`) or holds as ``model``. A
    closure is not looked into.
    """
    for module in _modules(reward):
        trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        if trainable:
            raise ValueError(
                f"{type(module).__name__} has {len(trainable)} trainable parameters (first: "
                f"{trainable[0]}), expected none: their gradients would be computed and kept; call "
                "reward.freeze(), or requires_grad_(False) on a plain module"
            )


def _modules(reward: object) -> Iterator[nn.Module]:
    if isinstance(reward, nn.Module):
        yield reward
    elif inspect.ismethod(reward):
        yield from _modules(reward.__self__)
    elif isinstance(reward, functools.partial):
        yield from _modules(reward.func)
    elif reward is not None:
        members = getattr(reward, "members", ())
        for part in (*members, getattr(reward, "model", None)):
            yield from _modules(part)


class PixelReward:
    """A reward of decoded frames, as a reward of latents.

    With ``GradientPlan.refl()`` this is RGB ReFL, the pixel-space baseline of PRFL: a late one-step
    estimate of x0 is decoded and its frames are rewarded (ReFL: ImageReward, arXiv 2304.05977).

    Args:
        decode: latents ``[B, C, F, H, W]`` → frames, differentiable, any shape the reward takes.
            Frozen.
        reward: frames → ``[B]``, differentiable. Frozen.
        frames: ``"all"`` decodes every latent frame; ``"first"`` only the first, as is done where
            all do not fit in memory.

    Raises:
        TypeError: ``decode`` or ``reward`` cannot be called.
        ValueError: ``frames`` is neither.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], torch.Tensor],
        reward: Callable[[torch.Tensor], torch.Tensor],
        frames: Literal["all", "first"] = "all",
    ) -> None:
        for name, value in (("decode", decode), ("reward", reward)):
            if not callable(value):
                raise TypeError(f"{name} is {type(value).__name__}, expected a callable")
        if frames not in ("all", "first"):
            raise ValueError(f"frames is {frames!r}, expected 'all' or 'first'")
        self.decode, self.reward, self.frames = decode, reward, frames
        self.members = (decode, reward)

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Scores ``[B]`` of the frames of ``x``; timestep and conditions are not used.

        Raises:
            ValueError: ``decode`` returned no tensor.
        """
        frames = self.decode(x if self.frames == "all" else x[:, :, :1])
        if not isinstance(frames, torch.Tensor):
            raise ValueError(f"decode returned {describe(frames)}, expected a tensor of frames")
        return self.reward(frames)


class _Alone(torch.autograd.Function):
    """A reward whose gradient is taken in the forward, so that no graph of it waits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        reward: Reward,
        timestep: torch.Tensor,
        conditions: Conditions,
    ) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            score = _checked(reward(leaf, timestep, conditions), len(x))
            if not score.requires_grad:
                raise ValueError(
                    "a member's scores carry no graph to its input; it must not detach it or run "
                    "under no_grad"
                )
            (gradient,) = torch.autograd.grad(score.sum(), leaf)
        ctx.save_for_backward(gradient)
        return score.detach()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, weight: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        factors = weight.view(-1, *[1] * (gradient.ndim - 1))
        return (gradient * factors).to(gradient.dtype), None, None, None


class RewardEnsemble:
    """Several rewards that should say the same, as one that is harder to exploit.

    From k scores per sample (Coste et al., arXiv 2310.02743): ``mean``, their average; ``worst``,
    the lowest; ``uncertainty``, the average less ``coefficient`` times their variance, ``(1/k)·Σ_i
    (r_i - mean)²``.

    Members run one after the other, and each one's gradient is taken at once: the memory is that of
    one, and of k gradients of the latents' size. So the score of a sample must depend on that
    sample alone, as it does without batch statistics.

    Args:
        members: rewards ``(x, timestep, conditions) -> [B]``, at least two. Frozen.
        mode: how their scores become one.
        coefficient: of the variance, at least 0; for ``uncertainty`` only.

    Raises:
        TypeError: a member cannot be called.
        ValueError: fewer than two members, an unknown mode, or a coefficient that is negative or
            not finite.
    """

    def __init__(
        self, members: Sequence[Reward], mode: EnsembleMode = "mean", coefficient: float = 0.1
    ) -> None:
        self.members = tuple(members)
        for i, member in enumerate(self.members):
            if not callable(member):
                raise TypeError(
                    f"members[{i}] is {type(member).__name__}, expected a callable "
                    "(x, timestep, conditions) -> [B]"
                )
        if len(self.members) < 2:
            raise ValueError(f"members has {len(self.members)} rewards, expected at least 2")
        if mode not in ("mean", "worst", "uncertainty"):
            raise ValueError(f"mode is {mode!r}, expected 'mean', 'worst' or 'uncertainty'")
        if not (math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(f"coefficient is {coefficient!r}, expected a number, at least 0")
        self.mode, self.coefficient = mode, coefficient

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Scores ``[B]``, float32 (float64 if a member's are).

        Raises:
            ValueError: a member's scores are not ``[B]``, or carry no graph to ``x`` where ``x``
                has one.
        """
        differentiated = torch.is_grad_enabled() and x.requires_grad
        scores = [
            _Alone.apply(x, member, timestep, conditions)  # type: ignore[no-untyped-call]
            if differentiated
            else _checked(member(x, timestep, conditions), len(x))
            for member in self.members
        ]
        wide = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
        stacked = torch.stack([score.to(wide) for score in scores])
        if self.mode == "worst":
            # Members that tie share the gradient, as amin does, and min does not.
            return stacked.amin(0)
        if self.mode == "mean":
            return stacked.mean(0)
        return stacked.mean(0) - self.coefficient * stacked.var(0, correction=0)


def _checked(score: object, batch: int) -> torch.Tensor:
    if not isinstance(score, torch.Tensor) or score.shape != (batch,):
        raise ValueError(
            f"a member returned {describe(score)}, expected one score per sample, [{batch}]"
        )
    return score
