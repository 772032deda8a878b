"""Calibrate the rollout of a training run to ``rollout.drift``, or read an earlier calibration."""

import contextlib
import json
import logging
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prfl_fast.cli.config import TrainFile
from prfl_fast.cli.objectives import batches_of
from prfl_fast.cli.sections import RolloutSection
from prfl_fast.cli.tables import print_table
from prfl_fast.data.dataset import Batch, Winners
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.feedback.calibration import (
    OF_SEVERAL_STEPS,
    Sampled,
    calibrate,
    ladders,
    other_orders,
)
from prfl_fast.feedback.step import PRFL
from prfl_fast.rollout import engine
from prfl_fast.training.checkpoint import latest_checkpoint
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import read_json, write_json
from prfl_fast.utils.progress import count_progress

FILE = "rollout.json"
SAMPLES = 4  # batches that are measured


class Found(NamedTuple):
    """Hold what a run's calibration depends on, and its folder's record if that is of the same."""

    made_for: dict[str, Any]
    record: dict[str, Any] | None


def find_calibration(
    config: TrainFile, made_for: Mapping[str, Any], file: str, *, several: bool
) -> Found:
    """Read ``rollout.json`` in the run's folder, before any model is loaded.

    Args:
        made_for: device, settings and models of the run.
        file: path of the YAML file, for errors.
        several: True if the run has several ranks, which cannot calibrate.

    Raises:
        ValueError: if there is no calibration for these settings, and the run has several ranks or
            checkpoints.
    """
    path, drift = Path(config.out) / FILE, config.rollout.drift
    own = json.loads(json.dumps(made_for, default=str))
    record = read_json(path) if path.is_file() else None
    if record is not None and record["made_for"] == own:
        return Found(own, record)
    begun = latest_checkpoint(path.parent) is not None
    hint = f"{path} is missing or of other settings. Restore it or them, or start in a new folder"
    check(not begun, "rollout.drift", drift, "null beside checkpoints", hint=hint)
    if several:
        advice = f"run prfl-fast calibrate {file} on one GPU, which writes {path}"
        raise ValueError(f"rollout.drift is {drift}, but several GPUs cannot calibrate: {advice}")
    return Found(own, None)


def calibrated(
    config: TrainFile,
    step: PRFL,
    dataset: LatentDataset,
    device: torch.device,
    found: Found,
    *,
    check_only: bool = False,
) -> TrainFile:
    """Return a file whose rollout is within ``rollout.drift``, and let ``step`` use that rollout.

    It is the rollout of ``found``, else it is measured and written to ``rollout.json`` in the run's
    folder. ``check_only`` returns ``config`` itself instead of measuring, and prints nothing.
    """
    path, record = Path(config.out) / FILE, found.record
    if record is None:
        if check_only:
            return config
        record = {"made_for": found.made_for, **_measure(config, step, dataset, device)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    section = RolloutSection(**_as_tuples(record["config"]))
    step.use_rollout(section.build())
    if not check_only:  # which prints the configuration alone
        origin = "written to" if found.record is None else "not measured again, but read from"
        print(f"rollout: {_summary(record, config)}; {origin} {path}")
    return config.model_copy(update={"rollout": section})


def _measure(
    config: TrainFile, step: PRFL, dataset: LatentDataset, device: torch.device
) -> dict[str, Any]:
    assert config.rollout.drift is not None
    # Each value of each option alone, each stride with each order, and again each value beside
    # values of other options, except those of one option.
    tried = ladders(step, device)
    values = [len(each) for each in tried.values()]
    most = 2 * sum(values) - min(values) + len(tried["stride"]) * len(other_orders(step))
    tried_at_most = f"up to {most} options on {SAMPLES} batches each"
    drift = config.rollout.drift
    print(f"calibrating the rollout to a drift of {drift:g}: {tried_at_most}", flush=True)
    batches: Any = batches_of(dataset, config)
    batches = Winners(batches) if dataset.pairs else batches
    generator = torch.Generator().manual_seed(config.run.seed)
    samples = []
    for number in range(SAMPLES):
        batch: Batch = batches[number].to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        from_data = step.plan.start == "data"
        samples.append(Sampled(noise, batch.conditions, batch.latents if from_data else None))
    # Values stronger than one past the budget are not measured, so this is an upper limit.
    counting = count_progress("calibrate", "options", most, done_word="measured", at_most=True)
    with counting as count, _savings_hidden():
        # The first one is the exact rollout, and progress shows the count before each.
        found = calibrate(step, samples, config.rollout.drift, on_measured=lambda _: count(""))
    return found.as_dict()


@contextlib.contextmanager
def _savings_hidden() -> Iterator[None]:
    """Hide the engine's lines about saved forwards, of which each measured option has its own."""

    def is_other(record: logging.LogRecord) -> bool:
        return record.msg != engine.SAVED_SO_FAR

    engine.logger.addFilter(is_other)
    try:
        yield
    finally:
        engine.logger.removeFilter(is_other)


def _as_tuples(value: Any) -> Any:
    """Return plain values with tuples for lists, as the strict models of sections take them."""
    if isinstance(value, dict):
        return {name: _as_tuples(each) for name, each in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in options.items()) or "exact"


def _summary(record: Mapping[str, Any], config: TrainFile) -> str:
    exact, chosen = record["measured"][0], record["chosen"]
    kind, word = ("flops", "FLOPs") if chosen["seconds"] is None else ("seconds", "time")
    figures = (
        f"{_named(chosen['options'])}: {chosen[kind] / exact[kind]:.2f} of the {word} of a "
        f"gradient point, drift {chosen['drift']:.2g}, cosine {chosen['cosine']:.4f}"
    )
    tried = {name for each in record["measured"] for name in each["options"]}
    if tried.intersection(OF_SEVERAL_STEPS):
        return figures
    steps = config.prfl.num_inference_steps
    return (
        f"{figures if tried else 'exact'}; no stride or cache was tried, because no rollout has "
        f"two steps between gradient points: raise prfl.num_inference_steps, which is {steps}"
    )


def print_calibration(config: TrainFile) -> None:
    """Print all measurements of the run's calibration, for a terminal of 100 columns."""
    record = read_json(Path(config.out) / FILE)
    forms = {"flops": ".3g", "rollout_flops": ".3g", "seconds": ".3g", "drift": ".2g"}
    forms["cosine"] = ".4f"
    rows = [
        [
            *(
                "–" if each[name] is None else f"{each[name]:{form}}"
                for name, form in forms.items()
            ),
            textwrap.fill("chosen: " * (each == record["chosen"]) + _named(each["options"]), 42),
        ]
        for each in record["measured"]
    ]
    shown = ["FLOPs", "of rollout", "seconds", "drift", "cosine"]
    print("FLOPs and seconds of a gradient point:")
    print_table(rows, [*shown, "rollout"], shown)
