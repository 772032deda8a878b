"""Evaluate a reward model on labels: ``prfl-fast evaluate``."""

import argparse
import csv
import io
import math
from pathlib import Path
from typing import Any

from prfl_fast.cli import loading
from prfl_fast.cli.sections import HardwareSection
from prfl_fast.cli.tables import print_table
from prfl_fast.models.registry import patch
from prfl_fast.rewards.evaluation import reliability_table
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.evaluation import RewardEvaluator
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import clean_temporaries_of, save_checkpoint_dir, write_json
from prfl_fast.utils.optional import need
from prfl_fast.utils.units import plural

METRICS = "metrics.json"
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000")  # Okabe and Ito's
_CLASSIFIER = ("accuracy", "precision", "recall", "f1", "auc")
_NAMES = {"auc": "AUC", "f1": "F1", "ece": "calibration error", "margin_std": "margin std"}


def run_evaluate(options: argparse.Namespace) -> int:
    """Evaluate a reward model, print the table, write it and plots; return the exit code."""
    out = None if options.out is None else Path(options.out)
    if out is not None:
        check(not out.exists(), "--out", options.out, "a new folder, but it exists")
        loading.check_writable(out, "--out")
        need("matplotlib.figure", "video")
    hardware = HardwareSection(device=options.device, precision=options.precision)
    device = loading.device_of(hardware)
    dataset = loading.open_dataset(options, "data")
    evaluator = RewardEvaluator(
        dataset,
        label=options.label,
        missing_label=options.missing_label,
        timesteps=options.timesteps,
        batch_size=options.batch_size,
        precision=options.precision,
        seed=options.seed,
        shift=options.shift,
        integer_timesteps=not options.float_timesteps,
    )
    reward = LatentRewardModel.load(options.reward).float().to(device).freeze()
    loading.check_data(dataset, reward.backbone, "the reward model")
    patch(reward.backbone)
    logits = evaluator.logits(reward)
    finite = all(bool(of.isfinite().all()) for of in logits.values())
    check(finite, "scores of the reward", "NaN or infinite", "finite numbers")
    metrics = evaluator.metrics(logits)
    print_metrics(metrics)
    if out is None:
        return 0
    content: dict[str, Any] = {**vars(options), "metrics": metrics}
    for name in ("command", "out", "device"):
        content.pop(name, None)
    if evaluator.labels is None:
        figures = {"accuracy": _pairs_figure(metrics)}
    else:
        tables = {t: reliability_table(of[0], evaluator.labels) for t, of in logits.items()}
        content["reliability"] = tables
        figures = {"metrics": _metrics_figure(metrics)}
        figures["reliability"] = _reliability_figure(tables, metrics)
    clean_temporaries_of(out)
    with save_checkpoint_dir(out) as folder:
        write_json(folder / METRICS, content)
        (folder / "metrics.csv").write_text(_csv(metrics), encoding="utf-8")
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=120)
    print(f"{plural(len(dataset), 'pair' if dataset.pairs else 'video')} evaluated: {out}")
    return 0


def print_metrics(metrics: dict[int, dict[str, float]]) -> None:
    """Print the figures of each timestep as a table."""
    names = _columns(metrics)
    columns = ("timestep", *(_NAMES.get(name, name.replace("_", " ")) for name in names))
    rows = []
    for t, values in metrics.items():
        rows.append((str(t), *(_figure_text(n, values[n]) for n in names)))
    print_table(rows, columns, numbers=columns)


def _figure_text(name: str, value: float) -> str:
    """Return a figure with four decimals; a small margin, as of a new reward, keeps its sign."""
    if name == "count":
        return f"{value:.0f}"
    return f"{value:.1e}" if "margin" in name and 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _columns(metrics: dict[int, dict[str, float]]) -> list[str]:
    """Return the names of the figures, AUC behind F1 as in the plot."""
    names = list(next(iter(metrics.values())))
    return sorted(names, key=lambda n: _CLASSIFIER.index(n) if n in _CLASSIFIER else len(names))


def _csv(metrics: dict[int, dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=["timestep", *_columns(metrics)])
    writer.writeheader()
    writer.writerows({"timestep": t, **values} for t, values in metrics.items())
    return text.getvalue()


def _figure(width: float, height: float, **grid: Any) -> tuple[Any, Any]:
    """Return a matplotlib figure and its axes."""
    figure = need("matplotlib.figure", "video").Figure((width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def _draw_by_timestep(axes: Any, times: list[int], title: str, chance: bool = True) -> None:
    axes.set_xlabel("timestep (1000: noise)")
    axes.set_xticks(times)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    if chance:
        axes.axhline(0.5, color="gray", linestyle="--", linewidth=1, label="0.5")
        axes.set_ylim(0, 1.02)


def _metrics_figure(metrics: dict[int, dict[str, float]]) -> Any:
    times = list(metrics)
    first = metrics[times[0]]
    figure, (left, right) = _figure(10, 4, ncols=2, gridspec_kw={"width_ratios": (3, 2)})
    share = f"{first['positive_rate']:.0%} with label 1"
    title = f"classification of {plural(round(first['count']), 'video')}, {share}"
    _draw_by_timestep(left, times, title)
    for name, color in zip(_CLASSIFIER, _COLORS, strict=True):
        values = [metrics[t].get(name, math.nan) for t in times]
        if not all(map(math.isnan, values)):
            left.plot(times, values, "o-", color=color, label=_NAMES.get(name, name))
    left.legend(fontsize=8)
    _draw_by_timestep(right, times, "expected calibration error (ECE)", chance=False)
    right.plot(times, [metrics[t]["ece"] for t in times], "o-", color=_COLORS[0])
    # The markers of a constant error would lie on the upper edge.
    right.set_ylim(0, 1.1 * max(0.05, *(metrics[t]["ece"] for t in times)))
    return figure


def _reliability_figure(
    tables: dict[int, list[dict[str, float]]], metrics: dict[int, dict[str, float]]
) -> Any:
    columns = min(5, len(tables))
    lines = -(-len(tables) // columns)
    sizes: dict[str, Any] = {"nrows": lines, "ncols": columns, "squeeze": False}
    figure, grid = _figure(2.4 * columns, 2.6 * lines + 0.8, sharex=True, sharey=True, **sizes)
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (t, rows) in zip(grid.flat, tables.items(), strict=False):
        axes.set_visible(True)
        axes.plot((0, 1), (0, 1), color="gray", linestyle="--", linewidth=1)
        count = metrics[t]["count"]
        scores, rates = ([row[name] for row in rows] for name in ("score", "positive_rate"))
        areas = [10 + 150 * row["count"] / count for row in rows]  # of a marker: the bin's share
        axes.plot(scores, rates, color=_COLORS[0], linewidth=1)
        axes.scatter(scores, rates, s=areas, color=_COLORS[0], alpha=0.7)
        axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), aspect="equal")
        axes.set_title(f"t = {t}, ECE {metrics[t]['ece']:.3f}", fontsize=9)
    figure.suptitle("reliability by timestep; a calibrated score is on the diagonal", fontsize=10)
    figure.supxlabel("mean score of a bin (area: its share of the videos)", fontsize=9)
    figure.supylabel("share of the bin with label 1", fontsize=9)
    return figure


def _pairs_figure(metrics: dict[int, dict[str, float]]) -> Any:
    times = list(metrics)
    figure, (left, right) = _figure(10, 4, ncols=2)
    count = plural(round(metrics[times[0]]["count"]), "pair")
    _draw_by_timestep(left, times, f"share of {count} whose preferred video scores higher")
    left.plot(times, [metrics[t]["accuracy"] for t in times], "o-", color=_COLORS[0])
    title = "margin of the logits: preferred minus other, mean ± std"
    _draw_by_timestep(right, times, title, chance=False)
    means, spread = ([metrics[t][name] for t in times] for name in ("margin", "margin_std"))
    right.errorbar(times, means, spread, fmt="o-", color=_COLORS[0], capsize=3)
    right.axhline(0, color="gray", linestyle="--", linewidth=1)
    return figure
