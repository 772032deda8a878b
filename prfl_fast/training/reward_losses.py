"""Losses, labels and evaluation of the latent reward model (PAVRM, arXiv 2511.21541).

The clean latents of a labeled video are noised, x_σ = (1 - σ)·x_0 + σ·ε with σ uniform over the
training schedule, and scored at model time t = 1000·σ, rounded down.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from prfl_fast.models.adapter import not_inference
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.noising import (
    add_noise,
    check_sigma,
    choose_sigma,
    evaluation_sigma,
    model_timestep,
    noise_like,
    noise_of_samples,
)
from prfl_fast.utils.checks import check, check_choice, check_seed, plain, torch_seed

LABELS = ("motion_quality", "physics_quality", "human_quality", "text_alignment", "blur_quality")
# Accuracy falls along them, from 0.915 to 0.536 in the small world (bench/RESULTS.md).
EVALUATION_TIMESTEPS = (201, 400, 600, 800, 1000)


def label_of(record: Mapping[str, Any], key: str, missing: float | None = None) -> float:
    """Return the 0/1 label ``key`` of a data record.

    A label is 0, 1, a bool, or the reference data's ``"good"`` and ``"poor"``. If ``missing`` is a
    number, it stands for labels that the record lacks; HY-Video-PRFL counts them as 0.

    Raises:
        ValueError: if the key is unknown, the record lacks it, or the label has another value.
    """
    check_choice("label", key, LABELS)
    value = plain(record.get(key))
    if value is None and key == "motion_quality":
        # As in the reference, motion is good if physics and humans are both good.
        parts = ("physics_quality", "human_quality")
        if missing is not None or all(record.get(part) is not None for part in parts):
            return min(label_of(record, part, missing) for part in parts)
    value = missing if value is None else value
    if isinstance(value, str):
        value = {"good": 1.0, "poor": 0.0}.get(value, value)
    hint = "" if value is not None else f"The record has {sorted(record)}"
    ok = isinstance(value, (int, float)) and value in (0, 1)
    check(ok, f"label {key}", value, "0, 1, 'good' or 'poor'", hint=hint)
    return 1.0 if value else 0.0


def ce_loss(
    reward: LatentRewardModel,
    latents: torch.Tensor,
    conditions: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    *,
    sigma: torch.Tensor | float | None = None,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> torch.Tensor:
    """Return the mean binary cross-entropy of the scores of noised latents, a float32 scalar.

    Args:
        latents: clean latents, ``[B, C, F, H, W]``.
        conditions: as for :meth:`LatentRewardModel.logits`.
        labels: ``[B]`` of zeros and ones, any dtype.
        sigma: ``[B]`` or one number in [0, 1]; None draws one per sample from the schedule of
            ``shift``.
        noise: ``[B, C, F, H, W]``; drawn if None.
        generator: draws sigma, then the noise, on its own device.
        integer_timesteps: False calls the model at 1000·σ, not at that number rounded down.

    Raises:
        ValueError: if labels are not 0 or 1, sigma is outside [0, 1], or shapes do not match.
    """
    labels = not_inference(_checked_labels(labels, latents))
    sigma, timestep = choose_sigma(
        sigma, latents, generator, shift, integer_timesteps, device="cpu"
    )
    x = add_noise(latents, noise_like(latents, noise, generator), sigma)
    logits = reward.logits(x, timestep, conditions)
    # Computed from logits, the loss stays finite where the sigmoid saturates.
    return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))


def bt_loss(
    reward: LatentRewardModel,
    win: torch.Tensor,
    lose: torch.Tensor,
    conditions: Mapping[str, torch.Tensor],
    lose_conditions: Mapping[str, torch.Tensor] | None = None,
    *,
    sigma: torch.Tensor | float | None = None,
    noise: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> torch.Tensor:
    """Compute the Bradley-Terry loss of preference pairs: cross-entropy of sigmoid(s_win - s_lose).

    The result is the mean over the pairs, a float32 scalar. Scores s are logits, and both videos of
    a pair have the same sigma and noise.

    Args:
        win, lose: clean latents of the preferred and the other videos, ``[B, C, F, H, W]``.
        conditions: conditions of both videos, or of ``win`` only if ``lose_conditions`` is given.
        sigma, noise, generator, shift, integer_timesteps: as in :func:`ce_loss`.

    Raises:
        ValueError: if win and lose differ in shape, or for sigma and noise as in :func:`ce_loss`.
    """
    hint = "The videos of a pair share their noise"
    expected = f"the shape of win, {list(win.shape)}"
    check(win.shape == lose.shape, "shape of lose", list(lose.shape), expected, hint=hint)
    sigma, timestep = choose_sigma(sigma, win, generator, shift, integer_timesteps, device="cpu")
    noise = noise_like(win, noise, generator)
    if lose_conditions is None:
        lose_conditions = conditions
    first = reward.logits(add_noise(win, noise, sigma), timestep, conditions)
    second = reward.logits(add_noise(lose, noise, sigma), timestep, lose_conditions)
    device = generator.device if generator is not None else win.device
    # A random order of the videos balances the labels. It does not change the loss, because
    # cross-entropy is symmetric under the exchange.
    label = torch.randint(2, first.shape, generator=generator, device=device).to(first)
    return functional.binary_cross_entropy_with_logits((first - second) * (2 * label - 1), label)


@torch.no_grad()
def evaluate(
    reward: LatentRewardModel,
    batches: Iterable[tuple[torch.Tensor, Mapping[str, torch.Tensor], torch.Tensor]],
    timesteps: Sequence[int] = EVALUATION_TIMESTEPS,
    *,
    seed: int = 0,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> dict[int, dict[str, float]]:
    """Return accuracy, AUC and cross-entropy of the reward at each timestep.

    The noise of a sample depends on ``seed`` and the sample's position only, and is the same at
    every timestep. The global random state and the modules' training modes do not change.

    Args:
        batches: tuples of latents ``[B, C, F, H, W]``, conditions, and 0/1 labels ``[B]``.
        timesteps: model times in [0, 1000]. Each stands for the nearest of the levels
            ``training_sigmas(shift)``, on which rewards train.
        integer_timesteps: False evaluates at sigma = t / 1000 itself.

    Returns:
        ``{t: {"accuracy", "loss", "count"}}``, plus ``"auc"`` (area under the ROC curve, ties count
        half) if both labels occur. A score above 0.5 predicts 1.

    Raises:
        ValueError: if batches or timesteps are missing or out of range, or as in :func:`ce_loss`.
    """
    timesteps = [plain(t) for t in timesteps]
    ok = bool(timesteps) and all(0 <= t <= 1000 for t in timesteps)
    check(ok, "timesteps", timesteps, "one or more numbers in [0, 1000]")
    check_seed(seed)
    generator = torch.Generator().manual_seed(torch_seed(plain(seed)))
    scores: dict[int, list[torch.Tensor]] = {t: [] for t in timesteps}
    truth: list[torch.Tensor] = []
    modes = {module: module.training for module in reward.modules()}
    reward.eval()
    try:
        for latents, conditions, labels in batches:
            truth.append(_checked_labels(labels, latents).double().cpu())
            noise = noise_of_samples(latents, generator)
            for t in timesteps:
                sigma = check_sigma(evaluation_sigma(t, shift, integer_timesteps), latents)
                timestep = model_timestep(sigma, integer_timesteps)
                logits = reward.logits(add_noise(latents, noise, sigma), timestep, conditions)
                scores[t].append(logits.double().cpu())
    finally:
        for module, mode in modes.items():
            module.training = mode
    check(bool(truth), "batches", [], "at least one batch")
    return {t: _metrics(torch.cat(scores[t]), torch.cat(truth)) for t in timesteps}


def _metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    metrics = {
        "accuracy": ((logits > 0) == (labels > 0)).double().mean().item(),
        "loss": functional.binary_cross_entropy_with_logits(logits, labels).item(),
        "count": float(labels.numel()),
    }
    positives = int(labels.sum())
    negatives = labels.numel() - positives
    if positives and negatives:
        # Mann-Whitney U from the ranks of the positives; equal scores share their mean rank.
        _, inverse, counts = logits.unique(return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
        above = ranks[labels > 0].sum().item() - positives * (positives + 1) / 2
        metrics["auc"] = above / (positives * negatives)
    return metrics


def _checked_labels(labels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    ok = isinstance(labels, torch.Tensor) and labels.shape == latents.shape[:1]
    check(ok, "labels", labels, f"a tensor [{latents.shape[0]}], one label per sample")
    ok = bool(((labels == 0) | (labels == 1)).all())
    check(ok, "labels", labels.unique().tolist()[:5], "only 0 and 1")
    return labels.to(latents.device)
