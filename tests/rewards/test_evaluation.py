"""Figures of a reward model: against scikit-learn, on hand-made cases, rejected arguments."""

import math

import pytest
import torch

from prfl_fast.rewards.evaluation import (
    calibration_error,
    classification_metrics,
    preference_metrics,
    reliability_table,
)


def scored(count, seed, ties=False):
    """Return logits that say something about random labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < 0.4).double()
    logits = 2 * torch.randn(count, generator=generator, dtype=torch.float64) + 2 * labels - 0.7
    return (logits.round() if ties else logits), labels


@pytest.mark.slow
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [7, 400])
def test_figures_are_those_of_scikit_learn(count, ties):
    sklearn = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    logits, labels = scored(count, count + ties, ties)
    metrics = classification_metrics(logits.float(), labels.bool())
    truth, scores = labels.numpy(), logits.float().double().sigmoid().numpy()
    predicted = scores > 0.5
    expected = {
        "accuracy": sklearn.accuracy_score(truth, predicted),
        "precision": sklearn.precision_score(truth, predicted, zero_division=0),
        "recall": sklearn.recall_score(truth, predicted, zero_division=0),
        "f1": sklearn.f1_score(truth, predicted, zero_division=0),
        "auc": sklearn.roc_auc_score(truth, scores),
        "loss": sklearn.log_loss(truth, scores),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    rows = reliability_table(logits.float(), labels)
    rates, means = calibration.calibration_curve(truth, scores, n_bins=10, strategy="uniform")
    assert [row["positive_rate"] for row in rows] == pytest.approx(list(rates), rel=1e-12)
    assert [row["score"] for row in rows] == pytest.approx(list(means), rel=1e-12)
    assert sum(row["count"] for row in rows) == metrics["count"] == count
    share = [row["count"] / count for row in rows]
    error = sum(s * abs(a - b) for s, a, b in zip(share, rates, means, strict=True))
    assert metrics["ece"] == pytest.approx(error, rel=1e-12)


def test_calibration_error_of_cases_by_hand():
    logits = torch.tensor([0.8, 0.8, 0.8, 0.2, 0.2], dtype=torch.float64).logit()
    labels = torch.tensor([1, 1, 0, 0, 1])
    # |0.8 - 2/3| of three scores, |0.2 - 1/2| of two
    expected = (3 * (0.8 - 2 / 3) + 2 * 0.3) / 5
    assert calibration_error(logits, labels) == pytest.approx(expected, rel=1e-9)
    assert calibration_error(logits, labels, bins=1) == pytest.approx(abs(0.56 - 0.6), rel=1e-9)
    first, last = reliability_table(torch.tensor([-800.0, 800.0]), torch.tensor([0, 1]))
    assert (first["lower"], first["score"], last["upper"], last["score"]) == (0, 0, 1, 1)
    assert calibration_error(torch.tensor([-800.0, 800.0]), torch.tensor([0, 1])) == 0


def test_figures_without_one_of_the_labels():
    none = classification_metrics(torch.tensor([-1.0, -2.0]), torch.zeros(2))
    assert (none["precision"], none["recall"], none["f1"], none["accuracy"]) == (0, 0, 0, 1)
    assert "auc" not in none and none["positive_rate"] == 0
    assert classification_metrics(torch.zeros(1), torch.ones(1))["recall"] == 0  # 0.5 predicts 0


def test_preferences():
    win, lose = torch.tensor([1.0, 2.0, 0.5, -1.0]), torch.tensor([0.0, 3.0, 0.5, -3.0])
    metrics = preference_metrics(win, lose)
    margin = [1.0, -1.0, 0.0, 2.0]
    assert metrics["accuracy"] == (2 + 0.5) / 4 and metrics["count"] == 4
    assert metrics["margin"] == pytest.approx(0.5)
    assert metrics["margin_std"] == pytest.approx(
        math.sqrt(sum((m - 0.5) ** 2 for m in margin) / 4)
    )
    loss = sum(-math.log(1 / (1 + math.exp(-m))) for m in margin) / 4
    assert metrics["loss"] == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (classification_metrics, ([0.0, 1.0], [0, 2]), r"labels is \[0, 2\], expected only 0 and"),
        (classification_metrics, ([0.0], [0, 1]), r"logits and labels is \[\[1\], \[2\]\]"),
        (reliability_table, ([], []), "N > 0"),
        (reliability_table, ([0.0], [0], 0), "bins is 0, expected a positive integer"),
        (preference_metrics, ([0.0], []), r"win and lose is \[\[1\], \[0\]\]"),
    ],
)
def test_refused(function, arguments, message):
    first, second, *rest = arguments
    with pytest.raises(ValueError, match=message):
        function(torch.tensor(first), torch.tensor(second), *rest)
