"""Add the options of ``prfl-fast plan`` to its parser, without torch."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from prfl_fast.cli.arguments import count, memory_size, positive
from prfl_fast.utils.choices import GPUS, PLANNED_MODELS
from prfl_fast.utils.optional import need

DEFAULT_MODEL = "wan2.1-t2v-14b"
# 80 % of the memory of a machine with 128 GiB and one GPU. A plan may be for another machine, so
# the memory of this one is no limit.
HOST_BUDGET = "102GiB"
# Fields of Workload with help, default and argparse options; "points" stands for the gradient plan,
# "gpus" for the ranks, "shard" and "sequence" for parallel.
# The defaults are Workload's, and a test compares them. A new option is a line here, and a line in
# cli/workload.py if a YAML key decides it.
_COUNT: dict[str, Any] = {"type": count, "metavar": "N"}
_MODELS = f"a transformer of diffusers or official Wan, or one of {', '.join(PLANNED_MODELS)}"
OPTIONS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "model": (_MODELS, DEFAULT_MODEL, {}),
    "frames": ("frames of a video, 4n + 1 for Wan", 81, _COUNT),
    "height": ("height of a video in pixels", 720, _COUNT),
    "width": ("width of a video in pixels", 1280, _COUNT),
    "first_frame": (
        "the first frame is given, for Wan2.2 TI2V",
        False,
        {"action": "store_true", "default": None},
    ),
    "expert": (
        "of two experts, the one that trains",
        "both",
        {"choices": ["high", "low", "both"]},
    ),
    "shift": ("timestep shift; it divides the steps between two experts", 5.0, {"type": positive}),
    "train": ("train LoRA, or all parameters", "lora", {"choices": ["lora", "full"]}),
    "lora_rank": ("rank of LoRA", 16, _COUNT),
    "batch_size": ("videos per forward", 1, _COUNT),
    "gradient_accumulation_steps": ("forwards per optimizer step", 1, _COUNT),
    "points": ("gradient points per trajectory", 1, _COUNT),
    "guidance": (
        "classifier-free guidance, with both velocities in one call or in turn",
        None,
        {"choices": ["batched", "separate"]},
    ),
    "num_inference_steps": (
        "solver steps of a trajectory",
        40,
        {**_COUNT, "type": partial(count, least=2)},
    ),
    "reward_blocks": ("blocks of the reward model", 8, _COUNT),
    "gpus": ("GPUs of the run; the plan is of one of them", 1, _COUNT),
    "shard": (
        "GPUs that hold one copy of the weights together; searched if not given",
        None,
        _COUNT,
    ),
    "sequence": ("GPUs that share a video; searched if not given", None, _COUNT),
}
WORKLOAD_OPTIONS = (*OPTIONS, "sft")


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``prfl-fast plan``."""
    text = "plan the run of this YAML file of train or train-reward, and write nothing"
    parser.add_argument("file", type=_yaml_file, metavar="FILE.yaml", nargs="?", help=text)
    group = parser.add_argument_group("training run")
    for name, (text, default, kind) in OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        shown = "" if default in (False, None) else f" (default: {default})"
        group.add_argument(option, help=text + shown, **kind)
    group.add_argument(
        "--no-sft", dest="sft", action="store_false", default=None, help="without supervised steps"
    )
    group = parser.add_argument_group("hardware")
    text = "device memory, e.g. 24GiB, 80GB or rtx4090 (default: all of this GPU, or of --gpu)"
    group.add_argument("--budget", type=_budget, metavar="SIZE", help=text)
    text = "pinned host memory per GPU (default: free memory here for a plan of this GPU, else "
    text += f"{HOST_BUDGET})"
    group.add_argument("--host-budget", type=memory_size, metavar="SIZE", help=text)
    text = f"GPU for the predicted times: {', '.join(GPUS)} (default: this GPU, else h200)"
    group.add_argument("--gpu", choices=GPUS, metavar="NAME", help=text)
    text = "dtype of both models' blocks; auto takes the first of the others that fits"
    dtypes = ["auto", "bf16", "fp8", "nf4"]
    group.add_argument("--weight-dtype", default="auto", choices=dtypes, help=text)
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    text = "print the largest video that fits each GPU; --model, --gpu select rows; takes minutes"
    group.add_argument("--table", action="store_true", help=text)
    text = "draw live bytes through one step"
    group.add_argument("--plot", type=_plot_file, metavar="FILE.png", help=text)
    text = (
        "plan the run of this YAML file, and write the plan into the file. For train: memory, "
        "reward_memory, hardware.precision, with --gpus parallel, and keys of lora, prfl and run "
        "that it lacks. For train-reward: memory, hardware.precision and parallel. Comments in "
        "other sections do not change"
    )
    group.add_argument("--apply", type=_target, metavar="FILE.yaml", help=text)


def check_plan(options: argparse.Namespace) -> None:
    """Check the options that exclude each other, and the package that ``--plot`` needs."""
    if options.apply is not None and options.file is not None:
        expected = f"none beside --apply {options.apply}"
        raise ValueError(f"FILE.yaml is '{options.file}', expected {expected}")
    fixed = ("budget", "apply", "plot", "frames", "height", "width")
    given = [] if options.file is None else ["FILE.yaml"]
    given += [f"--{name}" for name in fixed if getattr(options, name) is not None]
    given += ["--weight-dtype"] * (options.weight_dtype != "auto") + ["--json"] * options.json
    if options.table and given:
        raise ValueError(f"--table is given with {' and '.join(given)}, expected without")
    if options.plot is not None:
        need("matplotlib", "video")


def _budget(text: str) -> int | str:
    return text if text in GPUS else memory_size(text)


def _yaml_file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a YAML file")
    return Path(text)


def _plot_file(text: str) -> Path:
    if Path(text).suffix.lower() not in (".png", ".pdf", ".svg"):
        expected = "a name that ends in .png, .pdf or .svg"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return _target(text)


def _target(text: str) -> Path:
    """Return the path of a file that can be written."""
    path, folder = Path(text), Path(text).absolute().parent
    if not folder.is_dir():
        expected = f"a file in a folder: {path.parent} is not a folder"
    elif path.is_dir():
        expected = "a file, not a folder"
    elif not os.access(folder, os.W_OK):
        expected = f"{path.parent} to be writable"
    else:
        return path
    raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
