"""Figures of a reward model: as a classifier of labeled videos, and on preference pairs.

A reward's score is the sigmoid of its logit, and a score above 0.5 predicts label 1. All sums are
float64.
"""

import torch
from torch.nn import functional

from prfl_fast.utils.checks import check, check_count

BINS = 10  # of a reliability diagram


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the figures of a classifier.

    Args:
        logits: ``[N]``.
        labels: ``[N]`` of zeros and ones, any dtype.

    Returns:
        ``accuracy``; ``precision``, ``recall`` and ``f1`` of label 1, 0 where their denominator is
        0; ``ece``, the expected calibration error (:func:`calibration_error`); ``loss``, the binary
        cross-entropy; ``positive_rate``, the share of label 1; ``count``. If both labels occur,
        also ``auc``, the area under the ROC curve (ties count half).

    Raises:
        ValueError: if the tensors are empty, differ in shape, or labels are not 0 or 1.
    """
    logits, labels = _checked(logits, labels)
    predicted, positive = logits > 0, labels > 0
    hits = float((predicted & positive).sum())
    positives = int(positive.sum())
    negatives = labels.numel() - positives
    metrics = {
        "accuracy": (predicted == positive).double().mean().item(),
        "precision": hits / max(1, int(predicted.sum())),
        "recall": hits / max(1, positives),
        "f1": 2 * hits / max(1, int(predicted.sum()) + positives),
        "ece": calibration_error(logits, labels),
        "loss": functional.binary_cross_entropy_with_logits(logits, labels).item(),
        "positive_rate": positives / labels.numel(),
        "count": float(labels.numel()),
    }
    if positives and negatives:
        # Mann-Whitney U from the ranks of the positives; equal scores share their mean rank.
        _, inverse, counts = logits.unique(return_inverse=True, return_counts=True)
        ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]
        above = ranks[positive].sum().item() - positives * (positives + 1) / 2
        metrics["auc"] = above / (positives * negatives)
    return metrics


def reliability_table(
    logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS
) -> list[dict[str, float]]:
    """Return the rows of a reliability diagram: scores in bins of equal width against labels.

    Args:
        logits: ``[N]``.
        labels: ``[N]`` of zeros and ones.
        bins: number of bins ``(lower, upper]`` of [0, 1]; the first one includes 0.

    Returns:
        One row per bin that has scores: ``lower``, ``upper``, ``count``, ``score`` (the mean) and
        ``positive_rate``.

    Raises:
        ValueError: as :func:`classification_metrics`, or if ``bins`` is not positive.
    """
    logits, labels = _checked(logits, labels)
    check_count("bins", bins)
    scores = logits.sigmoid()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device="cpu")
    place = torch.bucketize(scores, edges[1:-1])
    rows = []
    for i in place.unique().tolist():
        inside = place == i
        rows.append(
            {
                "lower": edges[i].item(),
                "upper": edges[i + 1].item(),
                "count": int(inside.sum()),
                "score": scores[inside].mean().item(),
                "positive_rate": labels[inside].mean().item(),
            }
        )
    return rows


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error: Σ_bins (n_bin / N) · |mean score - positive rate|.

    Source: Guo et al., arXiv 1706.04599, for the score of label 1. Arguments and errors are those
    of :func:`reliability_table`.
    """
    rows = reliability_table(logits, labels, bins)
    total = sum(row["count"] * abs(row["score"] - row["positive_rate"]) for row in rows)
    return total / sum(row["count"] for row in rows)


def preference_metrics(win: torch.Tensor, lose: torch.Tensor) -> dict[str, float]:
    """Return the figures of a reward on preference pairs.

    Args:
        win, lose: logits of the preferred and the other videos, ``[N]``.

    Returns:
        ``accuracy``, the share of pairs whose preferred video scores higher (ties count half);
        ``margin``, the mean of ``win - lose``, and its standard deviation ``margin_std``; ``loss``,
        the Bradley-Terry cross-entropy; ``count``.

    Raises:
        ValueError: if the tensors are empty or differ in shape.
    """
    ok = win.ndim == 1 and win.shape == lose.shape and win.numel() > 0
    check(ok, "shapes of win and lose", [list(win.shape), list(lose.shape)], "the same [N], N > 0")
    margin = win.double().cpu() - lose.double().cpu()
    return {
        "accuracy": ((margin > 0).double() + 0.5 * (margin == 0)).mean().item(),
        "margin": margin.mean().item(),
        "margin_std": margin.std(correction=0).item(),
        "loss": functional.softplus(-margin).mean().item(),
        "count": float(margin.numel()),
    }


def _checked(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ok = logits.ndim == 1 and logits.shape == labels.shape and logits.numel() > 0
    shapes = [list(logits.shape), list(labels.shape)]
    check(ok, "shapes of logits and labels", shapes, "the same [N], N > 0")
    ok = bool(((labels == 0) | (labels == 1)).all())
    check(ok, "labels", labels.unique().tolist()[:5], "only 0 and 1")
    return logits.double().cpu(), labels.double().cpu()
