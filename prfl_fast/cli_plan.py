"""What the command line plans: ``prfl-fast plan``, ``memory: auto``, and what to try next.

A trainer's YAML and its dataset decide most of a plan's arguments. ``prfl-fast plan --apply FILE``
reads them from the file, takes the rest from options, and writes what the plan decides.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prfl_fast._extras import MissingExtra
from prfl_fast.config import Memory, TrainConfig
from prfl_fast.config_file import from_mapping, load_config, read_yaml
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.training_state import latest_checkpoint

if TYPE_CHECKING:
    from prfl_fast.data import LatentDataset
    from prfl_fast.planner import Plan

NOTHING_FITS = 1
GIB = 1 << 30
_DEFAULTS: dict[str, Any] = {
    "model": "wan2.1-t2v-14b",
    "frames": 81,
    "height": 720,
    "width": 1280,
    "train": "lora",
    "rank": 16,
    "batch": 1,
    "accumulation": 1,
    "points": 1,
    "num_steps": 40,
    "reward_blocks": 8,
}
# Options that a section of the file decides, with the key the user knows.
_DECIDED = {
    "rank": ("lora", "lora.rank"),
    "batch": ("run", "run.batch_size"),
    "accumulation": ("run", "run.accumulation"),
    "points": ("prfl", "prfl.points"),
    "num_steps": ("prfl", "prfl.num_steps"),
}


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of ``prfl-fast plan``."""

    def option(group: Any, name: str, text: str, **how: Any) -> None:
        default = _DEFAULTS.get(name.lstrip("-").replace("-", "_"))
        shown = "" if default is None else f" (default: {default})"
        group.add_argument(name, help=text + shown, **how)

    what = command.add_argument_group("what is trained")
    presets = "wan2.1-t2v-1.3b, wan2.1-t2v-14b, wan2.1-i2v-14b"
    option(what, "--model", f"the folder of a diffusers transformer, or one of {presets}")
    for name, text in (("frames", "4n + 1"), ("height", "pixels"), ("width", "pixels")):
        option(what, f"--{name}", text, type=int, metavar="N")
    option(what, "--train", "adapters, or all parameters", choices=["lora", "full"])
    option(what, "--rank", "of the adapters", type=int, metavar="N")
    option(what, "--batch", "videos in a forward", type=int, metavar="N")
    option(what, "--accumulation", "forwards in an optimizer step", type=int, metavar="N")
    option(what, "--points", "gradient points on a trajectory", type=int, metavar="N")
    option(what, "--num-steps", "solver steps of a trajectory", type=int, metavar="N")
    option(what, "--reward-blocks", "blocks of the reward model", type=int, metavar="N")
    what.add_argument("--no-sft", action="store_true", help="without supervised steps")
    where = command.add_argument_group("what it runs on")
    where.add_argument(
        "--budget",
        metavar="SIZE",
        help="device memory: 24GiB, 80GB … (default: all of the GPU here, or of --machine)",
    )
    where.add_argument(
        "--host-budget",
        metavar="SIZE",
        help="host memory for what is offloaded (default: what is free here if there is a GPU and "
        "no --machine, else any)",
    )
    where.add_argument(
        "--machine",
        metavar="NAME",
        help="whose rates give the times: h200, h100, a100, l40s, rtx4090, rtx5090 (default: the "
        "GPU here, or h200)",
    )
    where.add_argument(
        "--weights",
        default="auto",
        choices=["auto", "bf16", "fp8", "nf4"],
        help="of both models' blocks (default: the first of these that fits)",
    )
    out = command.add_argument_group("what comes out")
    out.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    out.add_argument("--plot", metavar="FILE.png", help="draw live bytes through one step")
    out.add_argument(
        "--apply",
        metavar="FILE.yaml",
        help="write the plan into a trainer's YAML: memory, hardware.precision, and which of lora, "
        "prfl and run it lacks. What the file says about the run is planned for; comments outside "
        "these sections stay",
    )


def run_plan(options: argparse.Namespace) -> int:
    """``prfl-fast plan``: 0, or 1 if nothing fits.

    Raises:
        ValueError: an option that is wrong or contradicts the file of ``--apply``.
        MissingExtra: a package that planning or plotting needs.
        OSError: a file cannot be written.
    """
    from prfl_fast.machines import this_machine
    from prfl_fast.planner import plan

    for name in ("budget", "host_budget"):
        size = getattr(options, name)
        if size is not None and size.isdigit() and int(size) < 1 << 20:
            name = name.replace("_", "-")
            raise ValueError(f"--{name} is {size} bytes, expected a size like {size}GiB")
    arguments = _arguments(options)
    _check_plot(options.plot)
    machine, host_budget = options.machine or "h200", options.host_budget
    if options.machine is None and torch.cuda.is_available():
        machine = this_machine()
        host_budget = _host_room() if host_budget is None else host_budget
    found = plan(
        **arguments,
        budget=options.budget,
        host_budget=host_budget,
        weights=options.weights,
        machine=machine,
        progress=True,
    )
    print(json.dumps(_plain(found), indent=1) if options.json else found.table())
    written = []
    if options.plot is not None:
        found.timeline_figure().savefig(options.plot, dpi=120)
        written.append(options.plot)
    if not found.feasible:
        if options.apply is not None:
            _note(f"no plan fits: {options.apply} is left as it is")
    elif options.apply is not None:
        found.apply(options.apply)
        written.append(options.apply)
    for path in written:
        _note(f"written: {path}")
    return 0 if found.feasible else NOTHING_FITS


def _host_room() -> int:
    """Bytes that offloading may take here: it refuses more."""
    from prfl_fast.offload import RESERVE, host_memory

    available, total = host_memory()
    return max(1, int(available - RESERVE * total))


def _note(text: str) -> None:
    # Not on stdout: that is for the table, or for JSON.
    print(f"prfl-fast plan: {text}", file=sys.stderr)


def _check_plot(path: str | None) -> None:
    if path is None:
        return
    if Path(path).suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot is {path!r}, expected a name that ends in .png, .pdf or .svg")
    _check_target("--plot", Path(path))
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib is not installed: pip install 'prfl_fast[bench]'")


def _check_target(name: str, path: Path) -> None:
    """Refuse a file that could not be written, before the search."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, but {path.parent} is not a folder")
    if path.is_dir():
        raise ValueError(f"{name} is {str(path)!r}, which is a folder, expected a file")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{name} is {str(path)!r}, but {path.parent} is not writable")


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """The planner's arguments from the options and, with ``--apply``, the file."""
    given = {name: getattr(options, name) for name in _DEFAULTS}
    values = {k: _DEFAULTS[k] if v is None else v for k, v in given.items()}
    values["sft"] = not options.no_sft
    if options.apply is not None:
        values |= _from_file(Path(options.apply), given, values["sft"])
    return _named_for_plan(values)


def _named_for_plan(values: dict[str, Any]) -> dict[str, Any]:
    values = dict(values)
    points = values.pop("points")
    return {
        "lora_rank": values.pop("rank"),
        "rollout": values.pop("plan", None) or GradientPlan.prfl(points),
        **values,
    }


def _from_file(path: Path, given: Mapping[str, Any], sft: bool) -> dict[str, Any]:
    """What a trainer's YAML decides. A file that is missing, or has parts only, decides less."""
    _check_target("--apply", path)
    if not path.exists():
        return {}
    content = read_yaml(path)
    # The plan replaces the section, so it may be out of date.
    filled: dict[str, Any] = {k: v for k, v in content.items() if k != "memory"}
    filled = {"model": "-", "data": "-", "reward": "-", "out": "-", "run": {}} | filled
    if isinstance(filled["run"], dict):
        filled["run"] = {"steps": 1} | filled["run"]
    try:
        config = from_mapping(TrainConfig, filled)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    decided = planned_for(config)
    for name, (section, key) in _DECIDED.items():
        if content.get(section) is None:
            decided.pop(name)
            if name == "points":
                decided.pop("plan")
        elif given[name] not in (None, decided[name]):
            raise ValueError(
                f"--{name.replace('_', '-')} is {given[name]}, but {path} has {key}: "
                f"{decided[name]}: leave the option out, or change the file"
            )
    if config.lora is None:
        decided["train"] = given["train"] or "full"
    elif given["train"] == "full":
        raise ValueError(f"--train is full, but {path} has a lora section: leave out one of them")
    if "objectives" not in content:
        decided["sft"] = sft
    elif not sft and decided["sft"]:
        raise ValueError(f"--no-sft, but {path} has sft among its objectives: change the file")
    if given["model"] is not None or "model" not in content:
        decided.pop("model")
    known = "reward" in content or "prfl" not in config.objectives
    if not known or given["reward_blocks"] is not None:
        decided.pop("reward_blocks")
    return decided | _sizes(config, given, path)


def _sizes(config: TrainConfig, given: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Frames, height and width of the file's dataset, where it is there."""
    from prfl_fast.data import LatentDataset

    if not (Path(config.data) / "manifest.jsonl").is_file():
        return {}
    found = sizes_of(LatentDataset(config.data))
    for name, value in found.items():
        if given[name] not in (None, value):
            raise ValueError(
                f"--{name} is {given[name]}, but the data of {path} has {value}: leave the option "
                "out, or change the file"
            )
    return found


def planned_for(config: TrainConfig) -> dict[str, Any]:
    """What a training configuration says about its run, under the names of the options.

    Raises:
        ValueError: the run has what the planner does not simulate: gradients through several
            solver steps, guidance, or several reward models.
    """
    lora = config.lora
    feedback = "prfl" in config.objectives
    plan = config.prfl.plan() if feedback else GradientPlan.prfl()
    if plan.depth != 1 or plan.renoised:
        raise ValueError(
            f"prfl.method is {config.prfl.method}, whose gradient goes through several solver "
            "steps: the planner knows one step a point only, so say what memory is, as {policy: "
            "full}"
        )
    if feedback and config.prfl.guidance is not None:
        raise ValueError(
            "prfl.guidance is set, which doubles the batch of the generator's forwards, or their "
            "number: the planner knows steps without guidance only, so say what memory is, as "
            "{policy: full}"
        )
    targets = {} if lora is None else {"lora_targets": lora.targets}
    return {
        **targets,
        "model": config.model,
        "train": "full" if lora is None else "lora",
        "rank": _DEFAULTS["rank"] if lora is None else lora.rank,
        "batch": config.run.batch_size,
        "accumulation": config.run.accumulation,
        "points": config.prfl.points,
        "plan": plan,
        "num_steps": config.prfl.num_steps,
        "sft": "sft" in config.objectives,
        "average": config.run.ema_decay is not None,
        "patched": config.hardware.patch,
        "reward_blocks": _reward_blocks(config),
    }


def sizes_of(dataset: "LatentDataset") -> dict[str, int]:
    """Frames and pixels of the videos whose latents a dataset holds (Wan's VAE: 4 × 8 × 8)."""
    _, frames, height, width = dataset.shapes["latents"]
    return {"frames": 4 * (frames - 1) + 1, "height": 8 * height, "width": 8 * width}


def _reward_blocks(config: TrainConfig) -> int:
    """Blocks of the saved reward model; the paper's eight where the file does not say."""
    if "prfl" not in config.objectives:
        return 1  # the planner has no step without a reward: the smallest
    if isinstance(config.reward, tuple):
        raise ValueError(
            f"reward lists {len(config.reward)} rewards, but the planner knows one model only: say "
            "what memory is, as {policy: full}"
        )
    if isinstance(config.reward, str):
        path = Path(config.reward) / "config.json"
        if path.is_file():
            try:
                return int(json.loads(path.read_text())["num_blocks"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not the configuration of a reward model") from error
    return int(_DEFAULTS["reward_blocks"])


def _plain(found: "Plan") -> dict[str, Any]:
    """A plan as plain values: bytes and seconds."""
    names = ("feasible", "peak", "peak_phase", "categories", "host", "missing", "reserve", "budget")
    return {
        "memory": dataclasses.asdict(found.memory),
        **{name: getattr(found, name) for name in names},
        "host_budget": found.host_budget,
        "machine": found.machine.name,
        "seconds": found.seconds,
        "step_seconds": found.step_seconds,
        "rollout_forwards": found.rollout_forwards,
        "workload": dataclasses.asdict(found.workload) | {"tokens": found.workload.tokens},
        "candidates": [dataclasses.asdict(candidate) for candidate in found.candidates],
        "notes": found.notes,
    }


def choose_memory(
    config: TrainConfig, dataset: "LatentDataset", device: torch.device
) -> tuple[Memory, "Plan | None"]:
    """What ``memory`` stands for in a run, and the plan it comes from.

    ``auto`` is planned once: a run that goes on from a checkpoint keeps the policy it began with.

    Raises:
        ValueError: ``auto``, and nothing fits; or the planner does not take the run's sizes.
        MissingExtra: a package that planning needs.
    """
    if isinstance(config.memory, Memory):
        return config.memory, None
    began = _stored_memory(config)
    if began is not None:
        _say(f"{_in_words(began)}, as this run began")
        return began, None
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    found = _plan_training(config, dataset, device, room)
    if not found.feasible:
        raise ValueError(
            f"memory is auto, but no plan fits {found.budget / GIB:.1f} GiB: the nearest, "
            f"{_in_words(found.memory)}, takes {(found.peak + found.reserve) / GIB:.1f} GiB; see "
            "prfl-fast plan"
        )
    takes = f"{(found.peak + found.reserve) / GIB:.1f} of {found.budget / GIB:.1f} GiB"
    _say(f"{_in_words(found.memory)}, predicted to take {takes}")
    return found.memory, found


def _say(chosen: str) -> None:
    # Not on stdout: --check prints the configuration there.
    print(f"prfl-fast train: memory: auto is {chosen}", file=sys.stderr)


def next_policy(
    config: TrainConfig, dataset: "LatentDataset", device: torch.device, found: "Plan | None"
) -> str:
    """What to try when a run with ``config.memory`` does not fit; ``found``: its plan, if any."""
    assert isinstance(config.memory, Memory)
    try:
        found = found or _plan_training(config, dataset, device)
    except (ValueError, MissingExtra) as error:
        return f"no plan: {error}"
    less = found.smaller(config.memory)
    if less is not None:
        memory, peak = less.memory, less.peak
    elif found.memory != config.memory and found.feasible:
        memory, peak = found.memory, found.peak
    else:
        narrower = config.lora is not None and config.memory.weights in ("fp32", "bf16")
        other = "fp8 or nf4 weights in a new run, " if narrower else ""
        return f"no policy is known to take less: {other}fewer frames or pixels, or a smaller batch"
    precision = "" if config.hardware.precision == "bf16" else " with hardware.precision: bf16"
    return f"try memory: {_in_words(memory)}{precision}, predicted to peak at {peak / GIB:.1f} GiB"


def _in_words(memory: Memory) -> str:
    """A memory section on one line, as YAML, without defaults."""
    changed = {
        field.name: getattr(memory, field.name)
        for field in dataclasses.fields(memory)
        if getattr(memory, field.name) != field.default
    }
    return "{" + ", ".join(f"{name}: {value}" for name, value in changed.items()) + "}"


def _stored_memory(config: TrainConfig) -> Memory | None:
    """The policy of the run that this one resumes, if there is one."""
    resume = config.run.resume
    if resume is None:
        return None
    checkpoint = latest_checkpoint(config.out) if resume == "auto" else Path(resume)
    if checkpoint is None or not (checkpoint.parent / "config.yaml").is_file():
        return None
    memory = load_config(TrainConfig, checkpoint.parent / "config.yaml").memory
    return memory if isinstance(memory, Memory) else None


def _plan_training(
    config: TrainConfig,
    dataset: "LatentDataset",
    device: torch.device,
    budget: int | None = None,
) -> "Plan":
    """The plan of a run on its own data. ``budget``: bytes, all of the device's unless given."""
    from prfl_fast.machines import this_machine
    from prfl_fast.planner import plan

    text = {"text_tokens": dataset.shapes["encoder_hidden_states"][0]}
    arguments = _named_for_plan(planned_for(config)) | sizes_of(dataset) | text
    room = _host_room()
    if device.type == "cuda":
        machine: Any = this_machine(device)
    else:
        # Offloading from the CPU to itself saves nothing.
        machine, budget, room = "h200", room, 1
    return plan(**arguments, budget=budget, host_budget=room, machine=machine, progress=True)
