"""Score a dataset with a reward model: ``prfl-fast score``."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from prfl_fast.cli import loading
from prfl_fast.cli.config import ScoreFile
from prfl_fast.cli.tables import print_table
from prfl_fast.cli.yaml_config import to_yaml
from prfl_fast.models.registry import patch
from prfl_fast.training.evaluation import RewardEvaluator
from prfl_fast.utils.checks import check
from prfl_fast.utils.io import clean_temporaries_of, write_atomic
from prfl_fast.utils.units import plural


def run_score(config: ScoreFile, check_only: bool) -> int:
    """Score a dataset, or only load and check everything; return the exit code."""
    device, out = loading.device_of(config.hardware), Path(config.out)
    check(not out.is_dir(), "out", config.out, "a file, but it is a folder")
    loading.check_writable(out, "out")
    dataset = loading.open_dataset(config, "data", "single videos")
    loading.check_reward(config.reward)
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
    keys = ("timesteps", "batch_size", "seed", "shift", "integer_timesteps")
    options = {name: getattr(config, name) for name in keys}
    evaluator = RewardEvaluator(dataset, precision=config.hardware.precision, **options)
    scores = {t: of[0].sigmoid().float() for t, of in evaluator.logits(reward).items()}
    rows = [
        {"id": name, **{f"t{t}": of[i].item() for t, of in scores.items()}}
        for i, name in enumerate(dataset.ids())
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    clean_temporaries_of(out)
    with write_atomic(out) as temporary:
        temporary.write_text(_text(rows, out.suffix), encoding="utf-8")
    table = []
    for t, found in scores.items():
        table.append(
            (str(t), *(f"{value:.4f}" for value in (found.mean(), found.min(), found.max())))
        )
    columns = ("timestep", "mean", "lowest", "highest")
    print_table(table, columns, numbers=columns)
    print(f"{plural(len(rows), 'video')} scored: {out}")
    return 0


def _text(rows: list[dict[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
