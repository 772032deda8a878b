"""A tiny generator, reward model and datasets on disk, and configurations that use them."""

import copy
import json
from pathlib import Path

import torch
from wan import tiny_wan

from prfl_fast.data import Pair, Sample, write_dataset
from prfl_fast.reward import LatentRewardModel

SIZE = (2, 4, 4)  # frames, height, width of the latents


def sample(generator, size=SIZE, width=20, **labels):
    """A random video with text of the tiny model's width."""
    text = torch.randn(3, width, generator=generator)
    return Sample(
        torch.randn(16, *size, generator=generator), {"encoder_hidden_states": text}, labels
    )


def samples(count, seed=0, **options):
    """Random videos whose ``motion_quality`` alternates between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return [sample(generator, motion_quality=i % 2, **options) for i in range(count)]


def make_world(root: Path) -> Path:
    """Write ``model``, ``reward``, ``data`` and ``pairs`` under ``root``."""
    model = tiny_wan(layers=1, heads=1)
    model.save_pretrained(root / "model")
    LatentRewardModel.from_backbone(model, num_blocks=1, num_heads=2).save(root / "reward")
    write_dataset(root / "data", samples(4))
    write_dataset(
        root / "pairs", [Pair(a, b) for a, b in zip(samples(3, 1), samples(3, 2), strict=True)]
    )
    return root


def config(command: str, root: Path, out: Path, changes: dict | None = None) -> dict:
    """A valid configuration; ``changes`` maps dotted keys to values, ``...`` removes a key."""
    hardware = {"device": "cpu"}
    common = {
        "model": str(root / "model"),
        "data": str(root / "data"),
        "out": str(out),
        "hardware": hardware,
    }
    run = {"steps": 5, "accumulation": 1, "save_every": 2, "keep_last": 1, "tensorboard": False}
    content = {
        "train": {
            **common,
            "reward": str(root / "reward"),
            "prfl": {"num_steps": 3},
            "optimizer": {"learning_rate": 1e-3},
            "run": {**run, "ema_decay": 0.9},
        },
        "train-reward": {
            **common,
            "num_blocks": 1,
            "num_heads": 2,
            "run": {**run, "batch_size": 2},
        },
        "score": {
            "reward": str(root / "reward"),
            "data": str(root / "data"),
            "out": f"{out}.jsonl",
            "timesteps": [201, 800],
            "hardware": hardware,
        },
    }[command]
    content = copy.deepcopy(content)
    for dotted, value in (changes or {}).items():
        *parents, key = dotted.split(".")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is ...:
            del place[key]
        else:
            place[key] = value
    return content


def write_config(path: Path, content: dict | str) -> Path:
    """Write a configuration; JSON is YAML."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def log(folder: Path) -> list[dict]:
    """The records of a run's log without their timings."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
