"""``prfl-fast``: doctor, plan, train-reward, train, score.

Everything a run needs is read, checked and loaded before the first file is written. A problem is
one line on stderr and exit code 2. Others are 1 if no plan fits, 3 if training stopped over
non-finite losses, 4 if a device was full, 128 + the signal's number if a signal ended the run.
Optional packages are imported by the command that needs them, so ``doctor`` works with torch alone.
"""

import argparse
import csv
import dataclasses
import importlib.util
import io
import json
import logging
import os
import platform
import random
import sys
from collections.abc import Mapping, Sequence
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
    from torch import nn

    from prfl_fast.config import (
        Hardware,
        ReferenceReward,
        ScoreConfig,
        TrainConfig,
        TrainRewardConfig,
    )
    from prfl_fast.data import LatentDataset
    from prfl_fast.reward import LatentRewardModel
    from prfl_fast.trainer import Precision, Trainer, TrainSettings

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
    from prfl_fast import config

    if options.command == "train":
        return _train(config.load_config(config.TrainConfig, options.config), options.check)
    if options.command == "train-reward":
        return _train_reward(
            config.load_config(config.TrainRewardConfig, options.config), options.check
        )
    return _score(config.load_config(config.ScoreConfig, options.config), options.check)


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


# What the commands share


def _device(hardware: "Hardware") -> torch.device:
    if hardware.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(hardware.device)
    except RuntimeError as error:
        raise ValueError(
            f"hardware.device is {hardware.device!r}, expected auto, cpu, cuda or cuda:<number>"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"hardware.device is {hardware.device!r}, but there are {torch.cuda.device_count()} "
            "CUDA devices"
        )
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"hardware.device is {hardware.device!r}, expected auto, cpu, cuda or cuda:<number>"
        )
    return device


def _writable(path: Path, key: str) -> None:
    """Refuse an output path before the work, not after it."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if existing != path and not existing.is_dir():
        raise ValueError(f"{key} is {str(path)!r}, but {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{key} is {str(path)!r}, but {existing} is not writable")


def _transformer_class(folder: str) -> tuple[Any, Mapping[str, Any]]:
    """The diffusers class and configuration of a model folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model: {folder} has no config.json; expected the folder of a diffusers transformer"
        )
    try:
        config = json.loads(path.read_text())
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model: {path} is not the configuration of a diffusers transformer"
        ) from error
    found = getattr(need("diffusers"), str(name), None)
    if found is None:
        raise ValueError(f"model: {path} names {name!r}, which this diffusers does not have")
    return found, config


def _check_data(dataset: "LatentDataset", model: "nn.Module", name: str) -> None:
    """Check the dataset's shapes against a model or reward backbone, on tensors without memory."""
    from prfl_fast.adapters import find_adapter

    shapes = dict(dataset.shapes)
    x = torch.empty(1, *shapes.pop("latents"), device="meta")
    conditions = {key: torch.empty(1, *shape, device="meta") for key, shape in shapes.items()}
    adapter = find_adapter(model)
    try:
        adapter.check_latents(model, x, conditions)
        if next(model.parameters()).is_meta:
            with torch.no_grad():
                adapter.velocity(model, x, torch.zeros(1, device="meta"), conditions)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{dataset.folder}: does not fit {name}: {error}") from error


def _check_model(folder: str, dataset: "LatentDataset") -> None:
    found, config = _transformer_class(folder)
    try:
        with torch.device("meta"):
            model = found.from_config(config)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ValueError(
            f"model: {folder}/config.json does not build a {found.__name__}: {error}"
        ) from error
    _check_data(dataset, model, folder)


def _load_transformer(folder: str, dtype: torch.dtype = torch.float32) -> "nn.Module":
    """The transformer in a folder, on the CPU; in bfloat16, what diffusers keeps in float32 is."""
    found, _ = _transformer_class(folder)
    need(
        "diffusers"
    ).utils.logging.set_verbosity_error()  # what it would warn about is an error here
    try:
        model, info = found.from_pretrained(
            folder, local_files_only=True, torch_dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # diffusers raises whatever its readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"model: {folder} cannot be loaded: {reason}") from error
    # diffusers fills missing tensors with random numbers and a warning.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = list(info.get(kind) or ())
        if keys:
            raise ValueError(
                f"model: {folder} has {kind.replace('_', ' ')}: {', '.join(map(str, keys[:3]))}"
            )
    return model


def _load_reward(
    source: "str | ReferenceReward", transformer: "nn.Module | None"
) -> "LatentRewardModel":
    """A saved reward model, on the CPU, in its own dtypes or those of ``transformer``."""
    from prfl_fast.reward import LatentRewardModel

    if isinstance(source, str):
        return LatentRewardModel.load(source)
    assert transformer is not None
    return LatentRewardModel.load_reference(
        transformer, source.transformer, source.mlp, source.pool, num_heads=source.num_heads
    )


def _autocast_of(weights: str, precision: "Precision") -> "Precision":
    """Autocast is for float32 weights: the others compute in bfloat16 by themselves."""
    return precision if weights == "fp32" else "fp32"


def _settings(config: Any) -> "TrainSettings":
    from prfl_fast.trainer import TrainSettings

    names = {field.name for field in dataclasses.fields(TrainSettings)}
    values: dict[str, Any] = {}
    for part in (config.optimizer, config.run, config.memory):
        values |= dataclasses.asdict(part)
    return TrainSettings(**{name: value for name, value in values.items() if name in names})


def _identity(config: Any) -> dict[str, Any]:
    """What decides the numbers of a run besides the trainer's own settings."""
    values = dataclasses.asdict(config)
    for name in ("out", "run", "optimizer", "eval_data", "timesteps"):
        values.pop(name, None)
    flat: dict[str, Any] = {"run.batch_size": config.run.batch_size}
    for name, value in values.items():
        flat |= (
            {f"{name}.{k}": v for k, v in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    # A run may move to another device, or one with less memory. The optimizer is in the settings.
    del flat["hardware.device"]
    for name in (*config.memory.FREE, "optimizer", "gradients"):
        del flat[f"memory.{name}"]
    return flat


def _finish(trainer: "Trainer", config: Any) -> int:
    """Run with the resolved configuration beside the log; report where the result is."""
    from prfl_fast.config import to_yaml
    from prfl_fast.training_state import latest_checkpoint, write_atomic

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with write_atomic(out / "config.yaml") as temporary:
        temporary.write_text(to_yaml(config), encoding="utf-8")
    result = trainer.run()
    where = latest_checkpoint(out)
    if result.stopped_by is not None:
        print(
            f"stopped by {result.stopped_by.name} after step {result.step}; saved in {where}; run "
            "again to go on"
        )
        return 128 + result.stopped_by
    print(f"step {result.step}, {result.skipped} updates skipped; saved in {where}")
    return 0


def _print_check(config: Any) -> int:
    from prfl_fast.config import to_yaml

    print(to_yaml(config), end="")
    return 0


# The commands


def _train(config: "TrainConfig", check: bool) -> int:
    from prfl_fast.cli_plan import choose_memory, next_policy
    from prfl_fast.config import ReferenceReward
    from prfl_fast.data import Batches, LatentDataset
    from prfl_fast.gradient_plan import GradientPlan
    from prfl_fast.memory import apply_memory, check_available
    from prfl_fast.patching import patch
    from prfl_fast.schedulers import FlowEuler, FlowUniPC
    from prfl_fast.step import PRFL
    from prfl_fast.trainer import (
        Objective,
        RewardFeedback,
        SupervisedFlow,
        Trainer,
        add_lora,
        reward_call,
        velocity_call,
    )

    device, out = _device(config.hardware), Path(config.out)
    _writable(out, "out")
    dataset = LatentDataset(config.data)
    if dataset.pairs:
        raise ValueError(f"data: {config.data} holds preference pairs; train needs single videos")
    batches = Batches(dataset, config.run.batch_size, config.run.seed)
    _check_model(config.model, dataset)
    memory, plan = choose_memory(config, dataset, device)
    config = dataclasses.replace(config, memory=memory)
    check_available(memory, device)
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    kinds = {memory.weights}
    if isinstance(config.reward, ReferenceReward):
        kinds.add(memory.reward_weights)  # a reward in the reference's layout is built from it
    dtype = torch.float32 if "fp32" in kinds else torch.bfloat16
    transformer = _load_transformer(config.model, dtype)
    reward = None
    if config.reward is not None and "prfl" in config.objectives:
        reward = _load_reward(config.reward, transformer)
        _check_data(dataset, reward.backbone, "the reward model")
    apply_memory(transformer, reward, memory, device=device)
    if config.lora is not None:
        add_lora(
            transformer, config.lora.rank, alpha=config.lora.alpha, targets=config.lora.targets
        )
    if config.hardware.patch:
        patch(transformer)
        if reward is not None:
            patch(reward.backbone)
    precision = _autocast_of(memory.weights, config.hardware.precision)
    reward_precision = _autocast_of(memory.reward_weights, config.hardware.precision)
    feedback = config.prfl
    objectives: dict[str, Objective] = {}
    for name in config.objectives:
        if name == "prfl":
            assert reward is not None
            step = PRFL(
                velocity_call(transformer, precision),
                reward_call(reward, reward_precision),
                {"unipc": FlowUniPC, "euler": FlowEuler}[feedback.solver](shift=feedback.shift),
                GradientPlan.prfl(points=feedback.points),
                num_steps=feedback.num_steps,
                target=feedback.target,
                weight=feedback.weight,
            )
            objectives[name] = RewardFeedback(step, batches, device)
        else:
            # Its own order: otherwise every supervised step would repeat the conditions of the PRFL
            # step before it.
            own = Batches(dataset, config.run.batch_size, config.run.seed + 1)
            objectives[name] = SupervisedFlow(
                transformer, own, shift=feedback.shift, precision=precision
            )
    trainer = Trainer(
        transformer,
        objectives,
        _settings(config),
        folder=out,
        resume=config.run.resume,
        identity=_identity(config),
        progress=True,
        tensorboard=config.run.tensorboard,
        advise=lambda: next_policy(config, dataset, device, plan),
    )
    return _print_check(config) if check else _finish(trainer, config)


def _train_reward(config: "TrainRewardConfig", check: bool) -> int:
    from prfl_fast.config import Memory
    from prfl_fast.data import Batches, LatentDataset
    from prfl_fast.memory import apply_memory, check_available
    from prfl_fast.patching import patch, unpatch
    from prfl_fast.reward import LatentRewardModel
    from prfl_fast.reward_training import label_of
    from prfl_fast.trainer import RewardFit, Trainer

    device, out = _device(config.hardware), Path(config.out)
    _writable(out, "out")
    dataset = LatentDataset(config.data)
    held_out = LatentDataset(config.eval_data) if config.eval_data is not None else None
    if dataset.pairs != (config.loss == "bt"):
        kind = "pairs" if dataset.pairs else "single videos"
        raise ValueError(
            f"data: {config.data} holds {kind}, but loss is {config.loss!r}: ce takes single "
            "videos, bt pairs"
        )
    if held_out is not None and held_out.pairs:
        raise ValueError(
            f"eval_data: {config.eval_data} holds pairs; evaluation takes labelled single videos"
        )
    for labelled in (d for d in (dataset, held_out) if d is not None and not d.pairs):
        for place, labels in labelled.labels():
            try:
                label_of(labels, config.label)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
    batches = Batches(dataset, config.run.batch_size, config.run.seed)
    _check_model(config.model, dataset)
    memory = config.memory
    check_available(memory, device)
    random.seed(config.run.seed)
    torch.manual_seed(config.run.seed)
    dtype = torch.float32 if memory.weights == "fp32" else torch.bfloat16
    transformer = _load_transformer(config.model, dtype)
    reward = LatentRewardModel.from_backbone(
        transformer, config.num_blocks, num_heads=config.num_heads, num_queries=config.num_queries
    )
    del transformer
    for source in (d for d in (dataset, held_out) if d is not None):
        _check_data(source, reward.backbone, "the reward model")
    apply_memory(reward.backbone, None, Memory(**dataclasses.asdict(memory)), device=device)
    reward.to(device)
    if config.hardware.patch:
        patch(reward.backbone)
    fit = RewardFit(
        reward,
        batches,
        loss=config.loss,
        label=config.label,
        shift=config.shift,
        precision=_autocast_of(memory.weights, config.hardware.precision),
    )
    trainer = Trainer(
        reward,
        {"reward": fit},
        _settings(config),
        folder=out,
        resume=config.run.resume,
        identity=_identity(config),
        progress=True,
        tensorboard=config.run.tensorboard,
    )
    if check:
        return _print_check(config)
    code = _finish(trainer, config)
    if code:
        return code
    unpatch(reward.backbone)
    reward.save(out / "reward")
    print(f"reward model: {out / 'reward'}")
    if held_out is not None:
        _evaluate(reward, held_out, config, device, out)
    return 0


def _evaluate(
    reward: "LatentRewardModel",
    dataset: "LatentDataset",
    config: "TrainRewardConfig",
    device: torch.device,
    out: Path,
) -> None:
    from prfl_fast.data import Batch, collate
    from prfl_fast.reward_training import evaluate, label_of
    from prfl_fast.trainer import autocast
    from prfl_fast.training_state import write_atomic

    def batches() -> Any:
        for i in range(len(dataset)):
            batch = collate([dataset[i]])
            assert isinstance(batch, Batch)
            labels = torch.tensor([label_of(record, config.label) for record in batch.labels])
            yield batch.latents.to(device), batch.to(device).conditions, labels

    with autocast(device, _autocast_of(config.memory.weights, config.hardware.precision)):
        metrics = evaluate(reward, batches(), config.timesteps, seed=config.run.seed)
    with write_atomic(out / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=1) + "\n")
    for t, values in metrics.items():
        print(f"t = {t}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))


def _score(config: "ScoreConfig", check: bool) -> int:
    from prfl_fast.data import Batch, LatentDataset, collate
    from prfl_fast.patching import patch
    from prfl_fast.trainer import autocast
    from prfl_fast.training_state import write_atomic

    device, out = _device(config.hardware), Path(config.out)
    if out.is_dir():
        raise ValueError(f"out is {config.out!r}, which is a folder, expected a file")
    _writable(out, "out")
    dataset = LatentDataset(config.data)
    if dataset.pairs:
        raise ValueError(f"data: {config.data} holds preference pairs; score takes single videos")
    transformer = None
    if not isinstance(config.reward, str):
        assert config.model is not None
        transformer = _load_transformer(config.model)
    reward = _load_reward(config.reward, transformer).float().to(device).freeze()
    _check_data(dataset, reward.backbone, "the reward model")
    if config.hardware.patch:
        patch(reward.backbone)
    if check:
        return _print_check(config)
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
