"""Training the latent reward model: losses, labels, evaluation by timestep (arXiv 2511.21541).

A labelled video's clean latents are noised, x_σ = (1 - σ)·x_0 + σ·ε with σ uniform over the
training schedule, and scored at model time t = 1000·σ. The optimizer loop is in
:mod:`prfl_fast.trainer`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from prfl_fast.reward import LatentRewardModel
from prfl_fast.schedulers import training_sigmas

LABELS = ("motion_quality", "physics_quality", "human_quality", "text_alignment", "blur_quality")
EVALUATION_TIMESTEPS = (201, 400, 600, 800, 1000)

_LABEL_VALUES = {"good": 1.0, "poor": 0.0}


def label_of(record: Mapping[str, Any], key: str) -> float:
    """The 0/1 label ``key`` of a data record.

    A label is 0, 1, a bool, or the reference data's ``"good"`` and ``"poor"``. A record without
    ``motion_quality`` but with ``physics_quality`` and ``human_quality`` has good motion if both
    are good, as in the reference.

    Raises:
        ValueError: an unknown key, a record that lacks it, or any other value.
    """
    if key not in LABELS:
        raise ValueError(f"label is {key!r}, expected one of {', '.join(LABELS)}")
    value = record.get(key)
    if value is None and key == "motion_quality":
        parts = ("physics_quality", "human_quality")
        if all(record.get(part) is not None for part in parts):
            return min(label_of(record, part) for part in parts)
    if isinstance(value, str):
        value = _LABEL_VALUES.get(value, value)
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return float(value)
    found = f"is {value!r}" if value is not None else f"is missing (there are: {sorted(record)})"
    raise ValueError(f"label {key} {found}, expected 0, 1, 'good' or 'poor'")


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
) -> torch.Tensor:
    """Binary cross-entropy of the score of noised latents against 0/1 labels.

    Mean over the batch, float32 scalar. Computed from the logits, which gives the same value and
    stays finite where the sigmoid saturates.

    Args:
        latents: ``[B, C, F, H, W]`` clean; ``labels``: ``[B]`` of zeros and ones, any dtype.
        conditions: as for :meth:`LatentRewardModel.logits`.
        sigma: ``[B]`` or one number in [0, 1]; drawn per sample from the schedule of ``shift``
            unless given.
        noise: ``[B, C, F, H, W]``; drawn unless given. Draws happen on the generator's device.

    Raises:
        ValueError: labels other than 0 and 1, sigma outside [0, 1], shapes that do not match.
    """
    labels = _checked_labels(labels, latents)
    sigma = _sigma(sigma, latents, generator, shift)
    x = _noised(latents, sigma, _noise(noise, latents, generator))
    logits = reward.logits(x, 1000 * sigma, conditions)
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
) -> torch.Tensor:
    """Bradley-Terry loss of preference pairs: cross-entropy of sigmoid(s_win - s_lose).

    Mean over pairs, float32 scalar. The scores are logits. Both videos of a pair are noised with
    the same sigma and noise. A fair coin per pair decides which comes first and so which label is
    asked for; cross-entropy is symmetric under that exchange, so the coin decides the labels seen
    and never the value.

    Args:
        win, lose: ``[B, C, F, H, W]`` clean latents, the preferred and the other video of each
            pair.
        conditions: of both videos, or of ``win`` alone if ``lose_conditions`` is given.
        sigma, noise, generator, shift: as in :func:`ce_loss`.

    Raises:
        ValueError: win and lose differ in shape; sigma or noise as in :func:`ce_loss`.
    """
    if win.shape != lose.shape:
        raise ValueError(
            f"win is {list(win.shape)}, lose is {list(lose.shape)}: a pair shares its noise, "
            "so both videos need the same shape"
        )
    sigma = _sigma(sigma, win, generator, shift)
    noise = _noise(noise, win, generator)
    if lose_conditions is None:
        lose_conditions = conditions
    first = reward.logits(_noised(win, sigma, noise), 1000 * sigma, conditions)
    second = reward.logits(_noised(lose, sigma, noise), 1000 * sigma, lose_conditions)
    device = generator.device if generator is not None else win.device
    label = torch.randint(2, first.shape, generator=generator, device=device).to(first)
    return functional.binary_cross_entropy_with_logits((first - second) * (2 * label - 1), label)


@torch.no_grad()
def evaluate(
    reward: LatentRewardModel,
    batches: Iterable[tuple[torch.Tensor, Mapping[str, torch.Tensor], torch.Tensor]],
    timesteps: Sequence[int] = EVALUATION_TIMESTEPS,
    *,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Accuracy, AUC and cross-entropy of the reward at each timestep.

    One pass over the batches. Each sample's noise is drawn on the CPU from ``seed`` and its
    position alone and is the same at every timestep, so the result does not depend on the batch
    size and draws no global random number. Modules return to the mode, training or not, in which
    they came.

    Args:
        batches: tuples of latents ``[B, C, F, H, W]``, conditions, and 0/1 labels ``[B]``.
        timesteps: model times in [0, 1000]; sigma is t / 1000.

    Returns:
        ``{t: {"accuracy", "loss", "count"}}``, plus ``"auc"`` (area under the ROC curve, ties count
        half) if both labels occur. A score above 0.5 predicts 1.

    Raises:
        ValueError: no batches, no timesteps, timesteps out of range, and what :func:`ce_loss`
            raises.
    """
    if not timesteps or not all(0 <= t <= 1000 for t in timesteps):
        raise ValueError(
            f"timesteps are {list(timesteps)}, expected at least one, each in [0, 1000]"
        )
    generator = torch.Generator().manual_seed(seed)
    scores: dict[int, list[torch.Tensor]] = {t: [] for t in timesteps}
    truth: list[torch.Tensor] = []
    modes = [(module, module.training) for module in reward.modules()]
    reward.eval()
    try:
        for latents, conditions, labels in batches:
            truth.append(_checked_labels(labels, latents).double().cpu())
            # One draw per sample: a single draw for the batch would depend on where the batch was
            # cut.
            drawn = [
                torch.randn(latents.shape[1:], generator=generator) for _ in range(latents.shape[0])
            ]
            noise = torch.stack(drawn).to(latents.device)
            for t in timesteps:
                sigma = _sigma(t / 1000, latents, None, 1.0)
                logits = reward.logits(_noised(latents, sigma, noise), 1000 * sigma, conditions)
                scores[t].append(logits.double().cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    if not truth:
        raise ValueError("batches is empty: there is nothing to evaluate")
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
        # Mann-Whitney: the mean rank of the positives; equal scores share the middle of their
        # ranks.
        _, inverse, counts = logits.unique(return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
        above = ranks[labels > 0].sum().item() - positives * (positives + 1) / 2
        metrics["auc"] = above / (positives * negatives)
    return metrics


def _checked_labels(labels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    if not isinstance(labels, torch.Tensor) or labels.shape != latents.shape[:1]:
        got = list(labels.shape) if isinstance(labels, torch.Tensor) else repr(labels)
        raise ValueError(f"labels is {got}, expected a tensor [{latents.shape[0]}], one per sample")
    if not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"labels holds {labels.unique().tolist()[:5]}, expected only 0 and 1")
    return labels.to(latents.device)


def _sigma(
    sigma: torch.Tensor | float | None,
    latents: torch.Tensor,
    generator: torch.Generator | None,
    shift: float,
) -> torch.Tensor:
    """``[B]`` float32 (float64 for float64 latents) on the latents' device."""
    batch = latents.shape[0]
    dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
    if sigma is None:
        device = generator.device if generator is not None else torch.device("cpu")
        index = torch.randint(1000, (batch,), generator=generator, device=device)
        return training_sigmas(shift).to(device)[index].to(latents.device, dtype)
    sigma = torch.as_tensor(sigma, dtype=dtype)
    if sigma.shape not in ((), (batch,)):
        raise ValueError(f"sigma is {list(sigma.shape)}, expected one number or [{batch}]")
    if not ((sigma >= 0) & (sigma <= 1)).all():
        values = sigma.flatten().tolist()[:5]
        raise ValueError(f"sigma holds {values}, expected [0, 1]; timesteps are 1000 sigma")
    return sigma.to(latents.device).expand(batch)


def _noise(
    noise: torch.Tensor | None, latents: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    if noise is None:
        device = generator.device if generator is not None else latents.device
        dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        return torch.randn(latents.shape, generator=generator, device=device, dtype=dtype).to(
            latents.device
        )
    if noise.shape != latents.shape:
        raise ValueError(
            f"noise is {list(noise.shape)}, expected the latents' shape {list(latents.shape)}"
        )
    return noise


def _noised(latents: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_σ in float32 at least: sigma is never half precision; the backbone casts to its dtype."""
    sigma = sigma.view(-1, *[1] * (latents.dim() - 1))
    return (1 - sigma) * latents + sigma * noise
