"""Reward functions of latents: the type, rewards of decoded frames, ensembles of rewards."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from prfl_fast.models.adapter import Conditions
from prfl_fast.utils.checks import check, check_choice, check_count, is_number

# (x [B, C, F, H, W], timestep [B], conditions) → scores [B], higher is better.
Reward = Callable[[torch.Tensor, torch.Tensor, Conditions], torch.Tensor]
EnsembleMode = Literal["mean", "worst", "uncertainty"]


def check_autograd(name: str, module: nn.Module) -> None:
    """Raise ``ValueError`` if autograd cannot save a parameter for a backward."""
    bad = next((n for n, p in module.named_parameters() if p.is_inference()), None)
    hint = "Load the weights outside torch.inference_mode()"
    check(bad is None, f"{name}'s {bad}", "an inference tensor", "a plain one", hint=hint)


def check_frozen(reward: object) -> None:
    """Raise ``ValueError`` if a reward has trainable parameters, or ones of inference mode."""
    for module in reward_modules(reward):
        check_autograd(type(module).__name__, module)
        trainable = [name for name, p in module.named_parameters() if p.requires_grad]
        if trainable:
            raise ValueError(
                f"{type(module).__name__} has {len(trainable)} trainable parameters (first: "
                f"{trainable[0]}), expected none. Call reward.freeze(), or requires_grad_(False) "
                "on a plain module"
            )


def reward_modules(reward: object) -> Iterator[nn.Module]:
    """Yield the modules of a reward: itself, or those that a method, partial or wrapper calls."""
    if isinstance(reward, nn.Module):
        yield reward
    elif inspect.ismethod(reward):
        yield from reward_modules(reward.__self__)
    elif isinstance(reward, functools.partial):
        yield from reward_modules(reward.func)
    elif reward is not None:  # variables of a closure are not searched
        members = getattr(reward, "members", ())
        for part in (*members, getattr(reward, "model", None)):
            yield from reward_modules(part)


def check_callable(name: str, value: object, form: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is callable."""
    if not callable(value):
        raise TypeError(f"{name} is {type(value).__name__}, expected a callable{form}")


class PixelReward:
    """Score latents by a reward of their decoded frames.

    With ``GradientPlan.refl()`` this is RGB ReFL, the pixel-space baseline of PRFL (ReFL:
    ImageReward, arXiv 2304.05977).

    Args:
        decode: latents ``[B, C, F, H, W]`` → frames, differentiable, without trainable parameters.
        reward: frames → ``[B]``, differentiable, without trainable parameters.
        frames: ``"all"`` decodes every latent frame, ``"first"`` only the first, to save memory.

    Raises:
        TypeError: if ``decode`` or ``reward`` is not callable.
        ValueError: if ``frames`` is unknown.
    """

    def __init__(
        self,
        decode: Callable[[torch.Tensor], torch.Tensor],
        reward: Callable[[torch.Tensor], torch.Tensor],
        frames: Literal["all", "first"] = "all",
    ) -> None:
        check_callable("decode", decode)
        check_callable("reward", reward)
        check_choice("frames", frames, ("all", "first"))
        self.decode, self.reward, self.frames = decode, reward, frames
        self.members = (decode, reward)

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return scores ``[B]`` of the frames of ``x``; timestep and conditions are not used.

        Raise ``ValueError`` if ``decode`` does not return a tensor.
        """
        frames = self.decode(x if self.frames == "all" else x[:, :, :1])
        ok = isinstance(frames, torch.Tensor)
        check(ok, "output of decode", frames, "a tensor of frames")
        return self.reward(frames)


class _GradientInForward(torch.autograd.Function):
    """Compute a reward and its gradient in the forward, so that its graph is freed at once."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: torch.Tensor, reward: Reward, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            score = _checked(reward(leaf, timestep, conditions), len(x))
            if not score.requires_grad:
                raise ValueError(
                    "A member's scores have no graph to its input. Do not detach the input or run "
                    "the member under no_grad"
                )
            # The sum gives each sample the gradient of its own score.
            (gradient,) = torch.autograd.grad(score.sum(), leaf)
        ctx.save_for_backward(gradient)
        return score.detach()

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, weight: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        factors = weight.view(-1, *[1] * (gradient.ndim - 1))  # [B, 1, 1, 1, 1]
        return (gradient * factors).to(gradient.dtype), None, None, None


class RewardEnsemble:
    """Combine several rewards of the same property into one that is harder to exploit.

    Formulas for the k scores r_i of a sample (Coste et al., arXiv 2310.02743):

    * ``mean``: the average of r_i;
    * ``worst``: the lowest r_i;
    * ``uncertainty``: the average minus ``coefficient`` times the variance ``(1/k)·Σ_i (r_i -
      mean)²``.

    Each member computes its gradient directly after its score, so the peak memory is that of one
    member plus k gradients of the latents' size. A sample's score must therefore not depend on
    other samples (no batch statistics).

    Args:
        members: rewards ``(x, timestep, conditions) -> [B]``, at least two, without trainable
            parameters.
        mode: formula of the score.
        coefficient: weight of the variance in ``uncertainty``, at least 0.

    Raises:
        TypeError: if a member is not callable.
        ValueError: if there are fewer than two members, the mode is unknown, or the coefficient is
            negative or not finite.
    """

    def __init__(
        self, members: Sequence[Reward], mode: EnsembleMode = "mean", coefficient: float = 0.1
    ) -> None:
        self.members = tuple(members)
        for i, member in enumerate(self.members):
            check_callable(f"members[{i}]", member, " (x, timestep, conditions) -> [B]")
        check_count("number of members", len(self.members), least=2)
        check_choice("mode", mode, ("mean", "worst", "uncertainty"))
        ok = is_number(coefficient) and coefficient >= 0
        check(ok, "coefficient", coefficient, "a finite number of at least 0")
        self.mode, self.coefficient = mode, coefficient

    def __call__(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """Return scores ``[B]``, float32 (float64 if a member's are).

        Raise ``ValueError`` if a member's scores are not ``[B]``, or have no graph to an ``x`` that
        requires a gradient.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            scores = [_GradientInForward.apply(x, m, timestep, conditions) for m in self.members]
        else:
            scores = [_checked(m(x, timestep, conditions), len(x)) for m in self.members]
        wide = torch.float64 if any(s.dtype == torch.float64 for s in scores) else torch.float32
        stacked = torch.stack([score.to(wide) for score in scores])
        if self.mode == "worst":
            # amin, not min: members with equal scores share the gradient.
            return stacked.amin(0)
        if self.mode == "mean":
            return stacked.mean(0)
        return stacked.mean(0) - self.coefficient * stacked.var(0, correction=0)


def _checked(score: object, batch: int) -> torch.Tensor:
    ok = isinstance(score, torch.Tensor) and score.shape == (batch,)
    check(ok, "output of a member", score, f"one score per sample, [{batch}]")
    return score  # type: ignore[return-value]
