"""Losses, labels and evaluation of the latent reward model (PAVRM, arXiv 2511.21541).

The clean latents of a labeled video are noised, x_σ = (1 - σ)·x_0 + σ·ε with σ uniform over the
training schedule, and scored at model time t = 1000·σ, rounded down.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from prfl_fast.models.adapter import not_inference
from prfl_fast.models.fp8_linear import exact_linears
from prfl_fast.rewards.evaluation import classification_metrics
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
from prfl_fast.utils.checks import check, check_seed, plain, torch_seed
from prfl_fast.utils.choices import EVALUATION_TIMESTEPS
from prfl_fast.utils.transfers import to_device

VideoInputs = tuple[torch.Tensor, Mapping[str, torch.Tensor]]
# Labels of HY-Video-PRFL. A dataset may have others.
LABELS = ("motion_quality", "physics_quality", "human_quality", "text_alignment", "blur_quality")


def label_of(record: Mapping[str, Any], key: str, missing: float | None = None) -> float:
    """Return the 0/1 label ``key`` of a data record.

    A label is 0, 1, a bool, or the reference data's ``"good"`` and ``"poor"``. If ``missing`` is a
    number, it stands for labels that the record lacks; HY-Video-PRFL counts them as 0.

    Raises:
        ValueError: if the record lacks the label, or it has another value.
    """
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
    drawn = torch.randint(2, first.shape, generator=generator, device=device)
    label = to_device(drawn, first.device).to(first.dtype)
    return functional.binary_cross_entropy_with_logits((first - second) * (2 * label - 1), label)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set all modules to evaluation mode, and back to their own modes at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def logits_by_timestep(
    reward: LatentRewardModel,
    batches: Iterable[Sequence[VideoInputs]],
    timesteps: Sequence[int] = EVALUATION_TIMESTEPS,
    *,
    seed: int = 0,
    shift: float = 5.0,
    integer_timesteps: bool = True,
) -> dict[int, torch.Tensor]:
    """Return the logits of noised videos at each timestep, ``{t: [V, N]}``, float64 on the CPU.

    The noise of a sample depends on ``seed`` and the sample's position only, and is the same at
    every timestep. The global random state and the modules' training modes do not change.

    Args:
        batches: V tuples ``(latents [B, C, F, H, W], conditions)`` of each batch, which share their
            noise: one of single videos, two of preference pairs.
        timesteps: model times in [0, 1000]. Each stands for the nearest of the levels
            ``training_sigmas(shift)``, on which rewards train.
        integer_timesteps: False evaluates at sigma = t / 1000 itself.

    Raises:
        ValueError: if batches or timesteps are missing or out of range.
    """
    timesteps = [plain(t) for t in timesteps]
    ok = bool(timesteps) and all(0 <= t <= 1000 for t in timesteps)
    check(ok, "timesteps", timesteps, "one or more numbers in [0, 1000]")
    check_seed(seed)
    generator = torch.Generator().manual_seed(torch_seed(plain(seed)))
    found: dict[int, list[torch.Tensor]] = {t: [] for t in timesteps}
    with evaluation_mode(reward), exact_linears():
        for videos in batches:
            noise = noise_of_samples(videos[0][0], generator)
            for t in timesteps:
                logits = []
                for latents, conditions in videos:
                    sigma = check_sigma(evaluation_sigma(t, shift, integer_timesteps), latents)
                    timestep = model_timestep(sigma, integer_timesteps)
                    x = add_noise(latents, noise, sigma)
                    logits.append(reward.logits(x, timestep, conditions).double().cpu())
                found[t].append(torch.stack(logits))
    check(bool(found[timesteps[0]]), "batches", [], "at least one batch")
    return {t: torch.cat(logits, 1) for t, logits in found.items()}


def evaluate(
    reward: LatentRewardModel,
    batches: Iterable[tuple[torch.Tensor, Mapping[str, torch.Tensor], torch.Tensor]],
    timesteps: Sequence[int] = EVALUATION_TIMESTEPS,
    **options: Any,
) -> dict[int, dict[str, float]]:
    """Return the figures of the reward as a classifier at each timestep.

    Args:
        batches: tuples of latents ``[B, C, F, H, W]``, conditions, and 0/1 labels ``[B]``.
        timesteps, options: as for :func:`logits_by_timestep`.

    Returns:
        ``{t: figures}`` of :func:`prfl_fast.rewards.evaluation.classification_metrics`.

    Raises:
        ValueError: as :func:`logits_by_timestep`, or if labels are not 0 or 1.
    """
    truth: list[torch.Tensor] = []

    def videos() -> Iterator[tuple[VideoInputs]]:
        for latents, conditions, labels in batches:
            truth.append(_checked_labels(labels, latents))
            yield ((latents, conditions),)

    found = logits_by_timestep(reward, videos(), timesteps, **options)
    return {t: classification_metrics(of[0], torch.cat(truth).cpu()) for t, of in found.items()}


def _checked_labels(labels: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    ok = isinstance(labels, torch.Tensor) and labels.shape == latents.shape[:1]
    check(ok, "labels", labels, f"a tensor [{latents.shape[0]}], one label per sample")
    if not bool(((labels == 0) | (labels == 1)).all()):
        check(False, "labels", labels.unique().tolist()[:5], "only 0 and 1")
    return to_device(labels, latents.device)
