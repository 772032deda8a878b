"""Score a dataset with a reward model: ``prfl-fast score``."""

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from prfl_fast.cli import loading
from prfl_fast.cli.config import ScoreFile
from prfl_fast.cli.tables import print_table
from prfl_fast.cli.yaml_config import to_yaml
from prfl_fast.data.dataset import Batch, collate
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.models.registry import patch
from prfl_fast.models.velocity import autocast
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.noising import add_noise, evaluation_sigma, model_timestep, noise_of_samples
from prfl_fast.utils.checks import check, torch_seed
from prfl_fast.utils.io import write_atomic
from prfl_fast.utils.progress import count_progress


def run_score(config: ScoreFile, check_only: bool) -> int:
    """Score a dataset, or only load and check everything; return the exit code."""
    device, out = loading.device_of(config.hardware), Path(config.out)
    check(not out.is_dir(), "out", config.out, "a file, but it is a folder")
    loading.check_writable(out, "out")
    dataset = loading.open_dataset(config, "data", "single videos")
    transformer = None
    if not isinstance(config.reward, str):
        assert config.model is not None
        transformer = loading.load_generator(config.model)
    reward = loading.load_reward(config.reward, transformer).float().to(device).freeze()
    loading.check_data(dataset, reward.backbone, "the reward model")
    if config.hardware.patch:
        patch(reward.backbone)
    if check_only:
        print(to_yaml(config), end="")
        return 0
    rows = _scores(config, dataset, reward, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(out) as temporary:
        temporary.write_text(_text(rows, out.suffix), encoding="utf-8")
    table = []
    for t in config.timesteps:
        scores = [row[f"t{t}"] for row in rows]
        table.append((str(t), *(f"{of(scores):.4f}" for of in (statistics.mean, min, max))))
    columns = ("timestep", "mean", "lowest", "highest")
    print_table(table, columns, numbers=columns)
    print(f"{len(rows)} videos scored: {out}")
    return 0


def _scores(
    config: ScoreFile, dataset: LatentDataset, reward: LatentRewardModel, device: torch.device
) -> list[dict[str, Any]]:
    """Return one row per video: its id and its score at each timestep."""
    generator = torch.Generator().manual_seed(torch_seed(config.seed))
    rows: list[dict[str, Any]] = []
    starts = range(0, len(dataset), config.batch_size)
    with count_progress("score", "batches", len(starts)) as show:
        for start in starts:
            show("")
            indices = range(start, min(start + config.batch_size, len(dataset)))
            batch = collate([dataset[i] for i in indices])
            assert isinstance(batch, Batch)
            noise = noise_of_samples(batch.latents, generator)  # the same for all timesteps
            scores = []
            for t in config.timesteps:
                level = evaluation_sigma(t, config.shift, config.integer_timesteps)
                sigma = torch.full((len(noise),), level)
                x = add_noise(batch.latents, noise, sigma).to(device)
                times = model_timestep(sigma, config.integer_timesteps).to(device)
                with torch.no_grad(), autocast(device, config.hardware.precision):
                    found = reward(x, times, batch.to(device).conditions)
                scores.append(found.float().tolist())
            for row, index in enumerate(indices):
                values = {f"t{t}": scores[i][row] for i, t in enumerate(config.timesteps)}
                rows.append({"id": dataset.ids()[index], **values})
    return rows


def _text(rows: list[dict[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
