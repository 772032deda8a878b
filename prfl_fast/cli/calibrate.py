"""Calibrate the rollout of a training run to ``rollout.drift``, or read an earlier calibration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prfl_fast.cli.config import TrainFile
from prfl_fast.cli.objectives import batches_of
from prfl_fast.cli.sections import RolloutSection
from prfl_fast.cli.tables import print_table
from prfl_fast.data.dataset import Batch, Winners
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.feedback.calibration import Sampled, calibrate
from prfl_fast.feedback.step import PRFL
from prfl_fast.training.checkpoint import latest_checkpoint
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import read_json, write_json
from prfl_fast.utils.progress import count_progress

FILE = "rollout.json"
SAMPLES = 4  # batches that are measured


def calibrated(
    config: TrainFile,
    step: PRFL,
    dataset: LatentDataset,
    device: torch.device,
    made_for: Mapping[str, Any],
    *,
    several: bool = False,
    check_only: bool = False,
) -> TrainFile:
    """Return a file whose rollout is within ``rollout.drift``, and let ``step`` use that rollout.

    The calibration is written to ``rollout.json`` in the run's folder. One that is there is used if
    it was made for the same settings and models.

    Args:
        made_for: settings and models of the run.
        several: True if the run has several ranks, which cannot calibrate.
        check_only: return ``config`` itself instead of measuring.

    Raises:
        ValueError: if there is no calibration for these settings, and the run has several ranks or
            checkpoints.
    """
    path, drift = Path(config.out) / FILE, config.rollout.drift
    own = json.loads(json.dumps({"device": device.type, **made_for}, default=str))
    record = read_json(path) if path.is_file() else None
    if record is None or record["made_for"] != own:
        if check_only:
            return config
        hint = f"Run prfl-fast calibrate on one GPU, which writes {path}"
        check(not several, "rollout.drift", drift, "null on several GPUs", hint=hint)
        begun = latest_checkpoint(path.parent) is not None
        hint = f"{path} is not of these settings. Restore them, or start in a new folder"
        check(not begun, "rollout.drift", drift, "null beside checkpoints", hint=hint)
        record = {"made_for": own, **_measure(config, step, dataset, device)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    section = RolloutSection(**_as_tuples(record["config"]))
    step.use_rollout(section.build())
    if not check_only:  # which prints the configuration alone
        print(f"rollout: {_summary(record)}; {path}")
    return config.model_copy(update={"rollout": section})


def _measure(
    config: TrainFile, step: PRFL, dataset: LatentDataset, device: torch.device
) -> dict[str, Any]:
    assert config.rollout.drift is not None
    print(f"calibrating the rollout to a drift of {config.rollout.drift:g}", flush=True)
    batches: Any = batches_of(dataset, config)
    batches = Winners(batches) if dataset.pairs else batches
    generator = torch.Generator().manual_seed(config.run.seed)
    samples = []
    for number in range(SAMPLES):
        batch: Batch = batches[number].to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        from_data = step.plan.start == "data"
        samples.append(Sampled(noise, batch.conditions, batch.latents if from_data else None))
    with count_progress("calibrate", "rollouts") as count:
        found = calibrate(
            step, samples, config.rollout.drift, on_measured=lambda m: count(_named(m.options))
        )
    return found.as_dict()


def _as_tuples(value: Any) -> Any:
    """Return plain values with tuples for lists, as the strict models of sections take them."""
    if isinstance(value, dict):
        return {name: _as_tuples(each) for name, each in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _named(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in options.items()) or "exact"


def _summary(record: Mapping[str, Any]) -> str:
    exact, chosen = record["measured"][0], record["chosen"]
    kind, word = ("flops", "FLOPs") if chosen["seconds"] is None else ("seconds", "time")
    return (
        f"{_named(chosen['options'])}: {chosen[kind] / exact[kind]:.2f} of the {word} of a "
        f"gradient point, drift {chosen['drift']:.2g}, cosine {chosen['cosine']:.4f}"
    )


def print_calibration(config: TrainFile) -> None:
    """Print all measurements of the run's calibration."""
    record = read_json(Path(config.out) / FILE)
    columns = ("flops", "rollout_flops", "seconds", "drift", "cosine")
    rows = [
        [
            _named(each["options"]),
            *("–" if each[name] is None else f"{each[name]:.4g}" for name in columns),
            "chosen" if each == record["chosen"] else "",
        ]
        for each in record["measured"]
    ]
    shown = ["FLOPs", "of the rollout", "seconds", "drift", "cosine"]
    print_table(rows, ["rollout", *shown, ""], shown)
