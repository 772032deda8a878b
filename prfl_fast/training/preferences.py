"""Losses of preferred and of scored videos: Flow-DPO and Flow-RWR (arXiv 2501.13918).

Both train on clean latents. They need no trajectory and no gradient of a reward.
"""

import contextlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from prfl_fast.feedback.divergence import adapters_off, check_adapters
from prfl_fast.models.adapter import Conditions
from prfl_fast.models.velocity import Velocity, model_of
from prfl_fast.training.losses import experts_of, sft_losses
from prfl_fast.training.noising import choose_sigma, noise_like
from prfl_fast.utils.checks import check, check_positive, is_number, plain

# The default of the authors' public trainer (github.com/yifan123/flow_grpo, config/dpo.py), which
# takes the same means.
BETA = 100.0


def dpo_loss(
    transformer: nn.Module | Velocity,
    win: torch.Tensor,
    lose: torch.Tensor,
    conditions: Conditions,
    lose_conditions: Conditions | None = None,
    **options: Any,
) -> torch.Tensor:
    """Compute the scalar Flow-DPO loss (arXiv 2501.13918), the mean of -log sigmoid over pairs of::

        margin = -β/2·((l_θ(win) - l_ref(win)) - (l_θ(lose) - l_ref(lose)))

    ``l(x0)`` is the loss of :func:`prfl_fast.training.losses.sft_loss` of one video. The paper's
    formula has squared norms, sums over elements; ``l`` is their mean, as in the authors' code, so
    that β does not depend on the size of the video. β is the same at all noise levels, which the
    paper finds better than its derived ``β·(1-σ)²``. The loss is log 2 where the model equals the
    reference.

    Args:
        transformer: a supported model, or a function ``(x, timestep [B], conditions) -> velocity``.
        win, lose: clean latents of the preferred and the other videos, ``[B, C, F, H, W]``.
        conditions: conditions of both videos, or of ``win`` only if ``lose_conditions`` is given.
        options: ``reference``, the frozen initial model; without it, ``transformer`` with its
            trained adapters off. ``beta``, the strength with which the model is held to the
            reference. ``noise``, ``sigma``, ``generator``, ``shift`` and ``integer_timesteps`` as
            in :func:`prfl_fast.training.losses.sft_loss`: both videos of a pair have the same noise
            and level, and all pairs have levels of one expert.

    Raises:
        TypeError: if a model is not supported.
        ValueError: if win and lose differ in shape, ``beta`` is not positive, ``reference`` is
            missing for a model without adapters or for a function, or another input is wrong.
    """
    margin = dpo_margin(transformer, win, lose, conditions, lose_conditions, **options)
    return mean_loss(margin)


def mean_loss(margin: torch.Tensor) -> torch.Tensor:
    """Return the loss of the margins of pairs ``[B]``, a scalar."""
    return -logsigmoid(margin).mean()


def dpo_margin(
    transformer: nn.Module | Velocity,
    win: torch.Tensor,
    lose: torch.Tensor,
    conditions: Conditions,
    lose_conditions: Conditions | None = None,
    *,
    reference: nn.Module | Velocity | None = None,
    beta: float = BETA,
    **draws: Any,
) -> torch.Tensor:
    """Return the margin of each pair ``[B]``: how much more than the reference it is preferred.

    Arguments and errors are those of :func:`dpo_loss`.
    """
    check_positive("beta", beta)
    expected = f"the shape of win, {list(win.shape)}"
    check(win.shape == lose.shape, "shape of lose", list(lose.shape), expected)
    off = check_reference(transformer, reference)
    shared = _draw(transformer, win, **draws)
    sides = ((win, conditions), (lose, conditions if lose_conditions is None else lose_conditions))
    with torch.no_grad(), off():
        base = [sft_losses(reference or transformer, *side, **shared) for side in sides]
    ours = [sft_losses(transformer, *side, **shared) for side in sides]
    return -beta / 2 * ((ours[0] - base[0]) - (ours[1] - base[1]))


def _draw(
    transformer: nn.Module | Velocity,
    win: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    sigma: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> dict[str, Any]:
    """Return the noise and the level of each pair, as arguments of ``sft_losses``."""
    noise = noise_like(win, noise, generator)
    levels = (shift, integer_timesteps)
    sigma, _ = choose_sigma(sigma, win, generator, *levels, experts=experts_of(transformer))
    return {"noise": noise, "sigma": sigma, "integer_timesteps": integer_timesteps}


def check_reference(
    transformer: nn.Module | Velocity, reference: nn.Module | Velocity | None
) -> Any:
    """Return the context in which the reference runs; raise ``ValueError`` if there is none."""
    if reference is not None:
        return contextlib.nullcontext
    model = model_of(transformer)
    check(model is not None, "reference", None, "the initial velocity, for a function")
    check_adapters(model, "reference=None", "pass a frozen copy")  # type: ignore[arg-type]
    return partial(adapters_off, model)  # type: ignore[arg-type]


def rwr_loss(
    transformer: nn.Module | Velocity,
    latents: torch.Tensor,
    conditions: Conditions,
    rewards: torch.Tensor,
    *,
    temperature: float = 1.0,
    **draws: Any,
) -> torch.Tensor:
    """Compute the scalar Flow-RWR loss (arXiv 2501.13918), ``mean(exp(r/temperature)·l)``.

    ``l`` is the loss of :func:`prfl_fast.training.losses.sft_loss` of one video. The paper has
    temperature 1. The weights are constants and are not normalized.

    Args:
        rewards: r, the reward of each clean video, ``[B]``.
        temperature: a lower one weights good videos more.
        transformer, latents, conditions, draws: arguments of
            :func:`prfl_fast.training.losses.sft_loss`.

    Raises:
        TypeError: if a model is not supported.
        ValueError: if ``rewards`` is not ``[B]``, ``temperature`` is not positive, or another input
            is wrong.
    """
    check_positive("temperature", temperature)
    ok = isinstance(rewards, torch.Tensor) and rewards.shape == latents.shape[:1]
    check(ok, "rewards", rewards, f"a tensor [{latents.shape[0]}], one reward per sample")
    losses = sft_losses(transformer, latents, conditions, **draws)
    return ((rewards.detach().to(losses) / temperature).exp() * losses).mean()


def score_of(record: Mapping[str, Any], label: str) -> float:
    """Return the number ``label`` of a data record; raise ``ValueError`` if it has none."""
    value = plain(record.get(label))
    ok, hint = is_number(value) or isinstance(value, bool), f"The record has {sorted(record)}"
    check(ok, f"label {label}", value, "a number", hint=hint)
    return float(value)
