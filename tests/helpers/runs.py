"""Tiny models, objectives, trainers and datasets on disk, and configurations that use them."""

import json
import math
from pathlib import Path

import torch
from torch import nn
from wan import tiny_wan

from prfl_fast.data.manifest import Pair, Sample, write_dataset
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.utils.io import save_tensors

SIZE = (2, 4, 4)  # frames, height, width of the latents


def sample(generator, size=SIZE, width=20, rows=3, **labels):
    """Return a random video with text of the tiny model's width."""
    text = torch.randn(rows, width, generator=generator)
    return Sample(
        torch.randn(16, *size, generator=generator), {"encoder_hidden_states": text}, labels
    )


def samples(count, seed=0, **options):
    """Return random videos whose ``motion_quality`` alternates between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    return [sample(generator, motion_quality=i % 2, **options) for i in range(count)]


def write_prompts(folder, count, width=20, size="16,2,4,4"):
    """Write a dataset of texts of 2, 3, … rows without latents."""
    lines = []
    for i in range(count):
        text = torch.randn(2 + i, width, generator=torch.Generator().manual_seed(i))
        metadata = {"latent_size": size}
        save_tensors({"encoder_hidden_states": text}, folder / f"{i}.safetensors", metadata)
        lines.append(json.dumps({"id": f"p{i}", "latents": f"{i}.safetensors"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder


class NoisyFit:
    """Fit a linear layer to random targets; NaN or infinite on the given draws."""

    def __init__(self, model, bad=(), bad_gradient=()):
        self.model, self.bad, self.bad_gradient = model, bad, bad_gradient
        self.draws = []

    def __call__(self, draw, generator, loss_scale):
        self.draws.append(draw)
        x = torch.randn(4, 3, generator=generator)
        y = self.model(x.to(self.model.weight.dtype))
        loss = (y - torch.randn(4, 2, generator=generator)).square().mean()
        loss = loss * torch.rand(())  # the global generator counts too
        if draw in self.bad:
            loss = loss * math.nan
        (loss * loss_scale).backward()
        if draw in self.bad_gradient:
            self.model.bias.grad.fill_(math.inf)
        return {"loss": loss.detach(), "half": loss.detach() / 2}


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def trainer(model=None, folder=None, names=("a",), **options):
    """Make a trainer; ``options`` are those of ``TrainConfig`` and ``Trainer``."""
    model = model or linear()
    keys = ("resume", "identity", "on_step", "tensorboard", "objectives", "advise")
    keys += ("evaluation",)
    rest = {key: options.pop(key) for key in keys if key in options}
    objectives = rest.pop("objectives", {name: NoisyFit(model) for name in names})
    settings = TrainConfig(**{"steps": 4, "learning_rate": 0.1, **options})
    return Trainer(model, objectives, settings, folder=folder, **rest)


def make_world(root: Path, heads: int = 1) -> Path:
    """Write ``model``, ``reward``, ``data`` and ``pairs`` under ``root``."""
    model = tiny_wan(layers=1, heads=heads, text_tokens=512)
    model.save_pretrained(root / "model")
    LatentRewardModel.from_backbone(model, num_blocks=1, num_heads=2).save(root / "reward")
    write_dataset(root / "data", samples(4))
    pairs = zip(samples(3, 1), samples(3, 2), strict=True)
    write_dataset(root / "pairs", [Pair(*pair) for pair in pairs])
    return root


def config(command: str, root: Path, out: Path, changes: dict | None = None) -> dict:
    """Return a configuration; ``changes`` maps dotted keys to values, ``...`` removes a key."""
    hardware = {"device": "cpu"}
    data = {"data": str(root / "data"), "hardware": hardware}
    run = {"steps": 5, "gradient_accumulation_steps": 1, "save_every": 2, "keep_last": 1}
    content = {"model": str(root / "model"), "out": str(out), **data}
    content["run"] = {**run, "tensorboard": False}
    if command == "train":
        content |= {"reward": str(root / "reward"), "prfl": {"num_inference_steps": 3}}
        content["optimizer"] = {"learning_rate": 1e-3}
        content["run"]["ema_decay"] = 0.9
    elif command == "train-reward":
        content |= {"num_blocks": 1, "num_heads": 2}
        content["run"]["batch_size"] = 2
    else:
        content = {"reward": str(root / "reward"), "out": f"{out}.jsonl", **data}
        content["timesteps"] = [201, 800]
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
    """Return the records of a run's log without their timings."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
