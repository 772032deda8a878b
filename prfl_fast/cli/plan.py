"""Run ``prfl-fast plan``, choose the policies of ``memory: auto``, and advise after a full GPU."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch

from prfl_fast.cli.config import TrainFile, TrainRewardFile
from prfl_fast.cli.loading import open_dataset
from prfl_fast.cli.plan_options import HOST_BUDGET, WORKLOAD_OPTIONS
from prfl_fast.cli.sections import (
    MemorySection,
    RewardMemorySection,
    TrainedRewardMemorySection,
)
from prfl_fast.cli.workload import (
    fields_of_options,
    fields_of_reward_run,
    fields_of_run,
    layout_of,
    options_named,
    sizes_of,
)
from prfl_fast.cli.yaml_config import Config, load_config
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.memory.offload import RESERVE, host_memory
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.parallel.ranks import Ranks
from prfl_fast.planning import gpu_specs, overview, planner, report
from prfl_fast.planning.plan import Plan
from prfl_fast.planning.presets import first_blocks, model_config
from prfl_fast.planning.workload import Workload
from prfl_fast.training.checkpoint import AUTO, LAST_GOOD, latest_checkpoint
from prfl_fast.utils.allocator_settings import EXPANDABLE, expandable_segments
from prfl_fast.utils.optional import MissingExtraError
from prfl_fast.utils.quiet import quiet_libraries
from prfl_fast.utils.units import GIB

NOTHING_FITS = 1
# Hints where nothing fits.
_CANDIDATES = "Run prfl-fast plan for all candidates"
_SMALLER = "Take fewer num_blocks, or smaller videos"

Training = TypeVar("Training", TrainFile, TrainRewardFile)


def _print_table(options: argparse.Namespace) -> int:
    """Print the largest video that fits each GPU, for each model."""
    values = {name: getattr(options, name) for name in WORKLOAD_OPTIONS}
    models = overview.MODELS if options.model is None else (options.model,)
    gpus = overview.GPUS if options.gpu is None else (options.gpu,)
    host = options.host_budget or HOST_BUDGET
    with options_named(values, None):
        rows = [*overview.rows(fields_of_options(values, None), models, gpus, host, note)]
    print(overview.markdown(rows))
    return 0


def run_plan(options: argparse.Namespace) -> int:
    """Run ``prfl-fast plan`` and return its exit code: 0, or 1 if nothing fits."""
    if options.table:
        return _print_table(options)
    path = options.apply or options.file
    values = {name: getattr(options, name) for name in WORKLOAD_OPTIONS}
    with options_named(values, path):
        work = Workload(**fields_of_options(values, path))
    gpu, host_budget = options.gpu or "h200", options.host_budget or HOST_BUDGET
    if options.gpu is None and torch.cuda.is_available():
        gpu = gpu_specs.this_gpu()
        host_budget = options.host_budget or _host_room()
    found = planner.plan_memory(
        work,
        budget=options.budget,
        host_budget=host_budget,
        weight_dtype=options.weight_dtype,
        gpu=gpu,
        progress=True,
    )
    print(json.dumps(report.as_dict(found), indent=1) if options.json else report.table(found))
    written = []
    if options.plot is not None:
        report.timeline_figure(found).savefig(options.plot, dpi=120)
        written.append(options.plot)
    if options.apply is not None and found.feasible:
        report.apply_to_yaml(found, path)
        written.append(path)
    elif options.apply is not None:
        note(f"no plan fits: {path} is not changed")
    for target in written:
        note(f"written: {target}")
    return 0 if found.feasible else NOTHING_FITS


def _host_room() -> int:
    """Return the bytes of host memory that offloading may use on this machine."""
    available, total = host_memory()
    return max(1, int(available - RESERVE * total))


def note(text: str, command: str = "plan") -> None:
    """Print a line to stderr: stdout has the result of plan or of --check only."""
    print(f"prfl-fast {command}: {text}", file=sys.stderr)


def choose_memory(
    config: TrainFile, dataset: LatentDataset, device: torch.device
) -> tuple[MemoryConfig, MemoryConfig, Plan | None]:
    """Return the policies of the trained and the reward model, and the plan they come from."""
    if config.memory != "auto":
        policies = config.memory.build(), config.reward_memory.build()
        _recommend_setting("train", device, *policies)
        return *policies, None
    began: Any = _stored(TrainFile, config)
    if _keeps_policies(began):
        policies = began.memory.build(), began.reward_memory.build()
        note("memory: auto takes the policies with which this run began", "train")
        return *policies, None
    found = _plan_training(config, dataset, device, _free_memory(device), **_fixed_by(began))
    chosen = _in_words(found.memory, found.reward_memory)
    _report_choice("train", chosen, found, _CANDIDATES)
    return found.memory, found.reward_memory, found


def choose_reward_memory(
    config: TrainRewardFile, dataset: LatentDataset, device: torch.device
) -> MemoryConfig:
    """Return the policy of a reward model in training."""
    if config.memory != "auto":
        policy = config.memory.build()
        _recommend_setting("train-reward", device, policy)
        return policy
    began: Any = _stored(TrainRewardFile, config)
    if _keeps_policies(began):
        note("memory: auto takes the policy with which this run began", "train-reward")
        return began.memory.build()
    found = _plan(_workload(config, dataset), device, _free_memory(device), **_fixed_by(began))
    _report_choice("train-reward", _in_words(found.memory), found, _SMALLER)
    return found.memory


def _keeps_policies(began: Any) -> bool:
    """Return True if a run on one GPU goes on with the policies with which it began.

    The policies of several GPUs that shared weights or videos may not fit one.
    """
    if began is None or began.memory == "auto":
        return False
    alone = {began.parallel.shard, began.parallel.sequence} <= {1, "auto"}
    return alone or began.memory.weight_dtype == "fp32"  # which no plan has


def _fixed_by(began: Any) -> dict[str, Any]:
    """Return the weights and the optimizer of an earlier run: others would change its numbers."""
    if began is None or began.memory == "auto":
        return {}
    return {name: getattr(began.memory, name) for name in ("weight_dtype", "optimizer")}


def planned(config: Training, ranks: Ranks, device: torch.device) -> Training:
    """Return the configuration of a run of several ranks with the plan of ``memory: auto``.

    The plan also decides what section ``parallel`` leaves as ``auto``. Rank 0 makes it, for the
    GPU and the machine with the least free memory.
    """
    found = ranks.gather((_free_memory(device), _host_room()))
    budgets = [budget for budget, _ in found if budget is not None]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))  # ranks of this machine
    room = max(1, min(room for _, room in found) // local)
    budget = min(budgets, default=None)
    return ranks.on_main(_planned, config, ranks.size, local, device, budget, room)


def _with_sizes_of(section: Any, began: Any, ranks: int) -> Any:
    """Return section ``parallel``, its auto sizes replaced by an earlier run's if they fit."""
    names = [name for name in ("shard", "sequence") if getattr(section, name) == "auto"]
    known = section.model_copy(update={name: getattr(began, name) for name in names})
    try:
        known.build().sizes(ranks)
    except ValueError:
        return section
    return known


def _plan_elsewhere(work: Workload, *arguments: Any, **options: Any) -> Plan:
    """Plan in a new process, since a plan makes a process group, and this process has one."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=quiet_libraries)
    try:
        return pool.submit(_plan, work, *arguments, **options).result()
    except BrokenProcessPool as error:
        raise ValueError(
            "memory is auto, but the process that plans has ended, perhaps for lack of host "
            "memory. Run prfl-fast plan --gpus N --apply FILE.yaml first"
        ) from error
    except BaseException:
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _planned(
    config: Training,
    ranks: int,
    machine: int,
    device: torch.device,
    budget: int | None,
    room: int,
) -> Training:
    began, parallel = _stored(type(config), config), config.parallel
    if began is not None:  # states of 8 bits need the mesh that saved them
        parallel = _with_sizes_of(parallel, began.parallel, ranks)
        config = config.model_copy(update={"parallel": parallel})
    fixed = _fixed_by(began)
    if began is not None and fixed.get("weight_dtype") == "fp32":  # no plan has such weights
        both = {"memory", "reward_memory"} & type(config).model_fields.keys()
        return config.model_copy(update={name: getattr(began, name) for name in both})
    work = _workload(config, open_dataset(config, "data"))
    share: Any = {"ranks": ranks, "parallel": layout_of(config), "gpus_per_machine": machine}
    work = dataclasses.replace(work, **share)
    found = _plan_elsewhere(work, device, budget, room, **fixed)
    chosen = dataclasses.asdict(found.workload.parallel)
    if chosen["keep_gathered"] == "auto":  # the plan tried it, and it does not fit
        chosen["keep_gathered"] = False
    sections: dict[str, Any] = {"parallel": parallel.model_copy(update=chosen)}
    if isinstance(config, TrainFile):
        command, policies = "train", (found.memory, found.reward_memory)
        hint = f"Run prfl-fast plan FILE.yaml --gpus {ranks} for all candidates"
        sections["memory"] = MemorySection.of(found.memory)
        sections["reward_memory"] = RewardMemorySection.of(found.reward_memory)
    else:
        command, hint, policies = "train-reward", _SMALLER, (found.memory,)
        sections["memory"] = TrainedRewardMemorySection.of(found.memory)
    layout = ", ".join(f"{name}: {str(value).lower()}" for name, value in chosen.items())
    _report_choice(command, f"{_in_words(*policies)}, parallel: {{{layout}}}", found, hint)
    return config.model_copy(update=sections)


def _recommend_setting(command: str, device: torch.device, *policies: MemoryConfig) -> None:
    """Recommend the allocator's setting on a GPU without it, if a policy saves memory."""
    saves = any(policy != MemoryConfig() for policy in policies)
    if device.type == "cuda" and saves and not expandable_segments():
        note(f"set {EXPANDABLE}, which loses less memory to fragmentation", command)


def _free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on a GPU now: other processes may use it as well."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _report_choice(command: str, chosen: str, found: Plan, hint: str) -> None:
    """Print the policy that ``memory: auto`` chose; raise ``ValueError`` if it does not fit."""
    takes, budget = (size / GIB for size in (found.peak + found.reserve, found.budget))
    if not found.feasible:
        if not found.expandable_segments:
            hint = f"Set {EXPANDABLE}, which loses less to fragmentation. {hint}"
        raise ValueError(
            f"memory is auto, but no plan fits {budget:.1f} GiB: the nearest, {chosen}, takes "
            f"{takes:.1f} GiB. {hint}"
        )
    predicted = f"predicted to take {takes:.1f} of {budget:.1f} GiB"
    note(f"memory: auto chose {chosen}, {predicted}", command)


def next_policy(
    config: TrainFile,
    dataset: LatentDataset,
    device: torch.device,
    found: Plan | None,
    file: str = "FILE.yaml",
    gpus: int = 1,
) -> str:
    """Return advice for a run whose policies do not fit; plan the run if it has no plan yet."""
    assert config.memory != "auto"
    if gpus > 1:  # a plan of several ranks makes process groups, and those of this run exist
        return f"prfl-fast plan {file} --gpus {gpus} looks for a policy that fits"
    try:
        found = found or _plan_training(config, dataset, device)
    except (ValueError, MissingExtraError) as error:
        return f"no plan: {error}"
    given = (config.memory.build(), config.reward_memory.build())
    less = found.smaller(*given)
    if less is not None:
        policies, peak = (less.memory, less.reward_memory), less.peak
    elif found.feasible and (found.memory, found.reward_memory) != given:
        policies, peak = (found.memory, found.reward_memory), found.peak
    else:
        narrower = config.lora is not None and config.memory.weight_dtype in ("fp32", "bf16")
        narrower = narrower and not config.hardware.fp8_linears
        other = "fp8 or nf4 weights in a new run, " if narrower else ""
        return f"no policy is known to take less: {other}fewer frames or pixels, or a smaller batch"
    precision = "" if config.hardware.precision == "bf16" else " with hardware.precision: bf16"
    return f"try {_in_words(*policies)}{precision}, predicted to peak at {peak / GIB:.1f} GiB"


def _in_words(*policies: MemoryConfig) -> str:
    """Return one or both memory sections on one line, as YAML, without defaults."""
    parts = []
    for section, config in zip(("memory", "reward_memory"), policies, strict=False):
        values = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
        changed = [f"{field.name}: {value}" for field, value in values if value != field.default]
        parts.append(f"{section}: {{{', '.join(changed)}}}")
    return ", ".join(parts)


def _stored(kind: type[Config], config: TrainFile | TrainRewardFile) -> Config | None:
    """Return the configuration of the run that this one resumes, or None.

    A resumed run keeps its policies, because another weight dtype would change its numbers.
    """
    resume = config.run.resume
    checkpoint = None if resume is None else Path(resume)
    if resume in (AUTO, LAST_GOOD):
        checkpoint = latest_checkpoint(config.out)
    if checkpoint is None or not (checkpoint.parent / "config.yaml").is_file():
        return None
    return load_config(kind, checkpoint.parent / "config.yaml")


def _plan_training(
    config: TrainFile,
    dataset: LatentDataset,
    device: torch.device,
    budget: int | None = None,
    **fixed: Any,
) -> Plan:
    """Return the plan of a run on its own data; a ``budget`` of None is the whole device."""
    return _plan(_workload(config, dataset), device, budget, **fixed)


def _workload(config: TrainFile | TrainRewardFile, dataset: LatentDataset) -> Workload:
    """Return the workload of a run on its own data."""
    if isinstance(config, TrainFile):
        return Workload(**fields_of_run(config) | sizes_of(dataset))
    model = first_blocks(model_config(config.model), config.num_blocks)
    return Workload(model, **fields_of_reward_run(config, dataset))


def _plan(
    work: Workload,
    device: torch.device,
    budget: int | None,
    room: int | None = None,
    **options: Any,
) -> Plan:
    room, cuda = _host_room() if room is None else room, device.type == "cuda"
    gpu: Any = gpu_specs.this_gpu(device) if cuda else "h200"
    if not cuda:
        budget, room = budget or room, 1  # offloading from the CPU to the CPU saves nothing
    return planner.plan_memory(
        work,
        budget=budget,
        host_budget=room,
        gpu=gpu,
        expandable_segments=not cuda or expandable_segments(),
        progress=True,
        **options,
    )
