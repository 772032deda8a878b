"""``prfl-fast``: doctor, plan, train-reward, train, score.

Everything a run needs is read, checked and loaded before the first file is written. A problem is
one line on stderr and exit code 2. Others are 1 if no plan fits, 3 if training stopped over
non-finite losses, 4 if a device was full, 128 + the signal's number if a signal ended the run.
Optional packages are imported by the command that needs them, so ``doctor`` works with torch alone.
"""

import argparse
import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prfl_fast import kernels
from prfl_fast._extras import MissingExtra, need
from prfl_fast._version import __version__
from prfl_fast.cli_plan import add_options, run_plan
from prfl_fast.kernels._attention_choice import report as attention_report
from prfl_fast.kernels._registry import extension_report

if TYPE_CHECKING:
    from prfl_fast.config import ScoreConfig

BAD_INPUT, NON_FINITE, OUT_OF_MEMORY = 2, 3, 4
_PACKAGES = (
    "triton",
    "diffusers",
    "peft",
    "safetensors",
    "tqdm",
    "yaml",
    "tensorboard",
    "bitsandbytes",
    "torchao",
)
_ATTENTION = ("flash_attn", "flash_attn_interface", "xformers")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="prfl-fast", description="Reward feedback learning of video models."
    )
    parser.add_argument("--version", action="version", version=f"prfl_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what is installed, and which backend each operation uses and why"
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(
        commands.add_parser(
            "plan",
            usage="prfl-fast plan [options]",
            help="choose what training keeps where, so that it fits a GPU; needs none",
        )
    )
    for name, text in (
        ("train-reward", "train a latent reward model"),
        ("train", "train a generator with reward feedback and supervised steps"),
        ("score", "score the videos of a dataset"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("config", help="YAML file; see prfl_fast/config.py for the keys")
        command.add_argument(
            "--check",
            action="store_true",
            help="load and check everything, print the configuration, write nothing",
        )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, MissingExtra) as error:
        problem = str(error)
    except RuntimeError as error:
        from prfl_fast.live_bytes import is_out_of_memory
        from prfl_fast.trainer import NonFiniteTraining, OutOfMemory

        if isinstance(error, OutOfMemory):  # its message has lines: what held the memory
            print(f"prfl-fast {options.command}: {error}", file=sys.stderr)
            return OUT_OF_MEMORY
        if is_out_of_memory(error):  # before or after the training loop
            _complain(options.command, str(error).splitlines()[0])
            return OUT_OF_MEMORY
        if not isinstance(error, NonFiniteTraining):
            raise
        _complain(options.command, str(error))
        return NON_FINITE
    _complain(options.command, problem)
    return BAD_INPUT


def _complain(command: str, problem: str) -> None:
    print(f"prfl-fast {command}: {' '.join(problem.split())}", file=sys.stderr)


def _run(options: argparse.Namespace) -> int:
    if options.command == "doctor":
        return _doctor(options.json)
    _quiet_libraries()
    if options.command == "plan":
        return run_plan(options)
    from prfl_fast.cli_train import train, train_reward
    from prfl_fast.config import ScoreConfig, TrainConfig, TrainRewardConfig
    from prfl_fast.config_file import load_config

    if options.command == "train":
        with _reasons_shown():
            return train(load_config(TrainConfig, options.config), options.check)
    if options.command == "train-reward":
        return train_reward(load_config(TrainRewardConfig, options.config), options.check)
    return _score(load_config(ScoreConfig, options.config), options.check)


@contextlib.contextmanager
def _reasons_shown() -> Iterator[None]:
    """Within, stderr shows what the package logs: why rollouts are not compiled or not cached."""
    logger, handler = logging.getLogger("prfl_fast"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("prfl-fast: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _quiet_libraries() -> None:
    """Keep what other packages say about themselves when imported off the terminal."""
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")


# doctor


def _version_of(module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except ValueError:  # an entry in sys.modules without a spec
        return None
    names = {"yaml": "pyyaml", "flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3"}
    try:
        return metadata.version(names.get(module, module))
    except metadata.PackageNotFoundError:
        return "unknown version"


def report() -> dict[str, Any]:
    """What ``prfl-fast doctor`` prints, as plain values."""
    cuda = torch.cuda.is_available()
    devices = []
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    operations = kernels.report("cuda" if cuda else "cpu", torch.bfloat16)
    return {
        "prfl_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version_of(name) for name in _PACKAGES},
        "attention": {name: _version_of(name) for name in _ATTENTION},
        "devices": devices,
        "cpu_threads": torch.get_num_threads(),
        "backend": kernels.get_backend(),
        "extension": extension_report(),
        "operations": {name: choice._asdict() for name, choice in operations.items()},
        "attention_backend": kernels.get_attention_backend(),
        "attention_backends": {
            name: {"usable": reason is None, "reason": reason}
            for name, reason in attention_report("cuda" if cuda else "cpu").items()
        },
    }


def _doctor(as_json: bool) -> int:
    found = report()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print(
        f"prfl_fast {found['prfl_fast']}, Python {found['python']}, torch {found['torch']}, "
        f"{found['platform']}"
    )
    for group in ("packages", "attention"):
        listed = ", ".join(
            f"{name} {version or 'not installed'}" for name, version in found[group].items()
        )
        print(f"{group}: {listed}")
    for device in found["devices"]:
        gib = device["memory_bytes"] / 2**30
        print(f"device: {device['name']}, capability {device['capability']}, {gib:.1f} GiB")
    if not found["devices"]:
        print(f"device: no CUDA device; CPU with {found['cpu_threads']} threads")
    print(f"CUDA C++ extension: {found['extension']}")
    print(f"backend: {found['backend']}; for bfloat16 tensors on the device above:")
    width = max(map(len, found["operations"]), default=0)
    for name, choice in found["operations"].items():
        print(f"  {name:<{width}}  {choice['backend']:<9}  {choice['reason']}")
    print(
        f"attention backend: {found['attention_backend']}; for bfloat16 heads of 128 on the device "
        "above, best first:"
    )
    width = max(map(len, found["attention_backends"]))
    for name, backend in found["attention_backends"].items():
        verdict = "usable" if backend["usable"] else f"refused: {backend['reason']}"
        print(f"  {name:<{width}}  {verdict}")
    return 0


# score


def _score(config: "ScoreConfig", check: bool) -> int:
    from prfl_fast.cli_models import (
        check_data,
        check_writable,
        device_of,
        load_reward,
        load_transformer,
    )
    from prfl_fast.config_file import to_yaml
    from prfl_fast.data import Batch, LatentDataset, collate
    from prfl_fast.model_call import autocast
    from prfl_fast.patching import patch
    from prfl_fast.training_state import write_atomic

    device, out = device_of(config.hardware), Path(config.out)
    if out.is_dir():
        raise ValueError(f"out is {config.out!r}, which is a folder, expected a file")
    check_writable(out, "out")
    dataset = LatentDataset(config.data)
    if dataset.pairs:
        raise ValueError(f"data: {config.data} holds preference pairs; score takes single videos")
    transformer = None
    if not isinstance(config.reward, str):
        assert config.model is not None
        transformer = load_transformer(config.model)
    reward = load_reward(config.reward, transformer).float().to(device).freeze()
    check_data(dataset, reward.backbone, "the reward model")
    if config.hardware.patch:
        patch(reward.backbone)
    if check:
        print(to_yaml(config), end="")
        return 0
    generator = torch.Generator().manual_seed(config.seed)
    rows: list[dict[str, Any]] = []
    with need("tqdm").tqdm(total=len(dataset), unit="video", desc="score", disable=None) as bar:
        for start in range(0, len(dataset), config.batch_size):
            indices = range(start, min(start + config.batch_size, len(dataset)))
            batch = collate([dataset[i] for i in indices])
            assert isinstance(batch, Batch)
            # One draw per video, the same at every timestep: scores do not depend on the batch
            # size.
            noise = torch.stack([torch.randn(x.shape, generator=generator) for x in batch.latents])
            scores = []
            for t in config.timesteps:
                x = ((1 - t / 1000) * batch.latents + t / 1000 * noise).to(device)
                with torch.no_grad(), autocast(device, config.hardware.precision):
                    score = reward(
                        x,
                        torch.full((len(x),), float(t), device=device),
                        batch.to(device).conditions,
                    )
                scores.append(score.float().tolist())
            for row, index in enumerate(indices):
                values = {f"t{t}": scores[i][row] for i, t in enumerate(config.timesteps)}
                rows.append({"id": dataset.ids()[index], **values})
            bar.update(len(indices))
    out.parent.mkdir(parents=True, exist_ok=True)
    with write_atomic(out) as temporary:
        temporary.write_text(_table(rows, out.suffix), encoding="utf-8")
    print(f"{len(rows)} videos scored: {out}")
    return 0


def _table(rows: list[dict[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    sys.exit(main())
