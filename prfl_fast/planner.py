"""The fastest memory policy of a PRFL step that fits a budget, found without a GPU.

The step is simulated at the real sizes (:mod:`prfl_fast.simulation`), candidates are compared by
predicted time (:mod:`prfl_fast.plan_search`), and :mod:`prfl_fast.plan_report` shows and writes the
plan.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from prfl_fast import machines, plan_report
from prfl_fast._extras import need
from prfl_fast.adapters import adapter_by_name, find_adapter
from prfl_fast.config import Lora, Memory
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.machines import Machine
from prfl_fast.plan_search import GIB, Candidate, Search, reserve_of, step_seconds
from prfl_fast.simulation import Workload

# In order of faithfulness: the first with which anything fits is taken.
WEIGHTS = ("bf16", "fp8", "nf4")
OPTIMIZERS = ("adamw", "adamw-sr", "adamw8bit", "adamw-cpu")

_WAN_14B: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}
MODELS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": _WAN_14B | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    "wan2.1-t2v-14b": _WAN_14B,
    "wan2.1-i2v-14b": _WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
}


@dataclass(frozen=True)
class Plan:
    """A memory policy with its prediction; if nothing fits, the one that misses by least.

    One step is the trainer's: ``workload.accumulation`` trajectories with their gradient points, as
    many supervised batches if ``workload.sft``, and the optimizer's step after each kind.

    Attributes:
        memory: what the trainer's ``memory:`` takes.
        feasible: the peak and the reserve stay within the budget, and the host's bytes within its.
        peak, peak_phase, categories: device bytes at the highest moment, and what they are.
        host: the most bytes of offloaded tensors and optimizer states in host memory.
        seconds: by phase, for the whole step.
        timeline: (phase, device bytes by category) through one step, with one rollout forward.
        candidates: what was considered, by weights and optimizer, fastest first in each.
        notes: what was not considered, and why.
        rollout_forwards: forwards without gradient per trajectory, expected.
    """

    memory: Memory
    feasible: bool
    peak: int
    peak_phase: str
    categories: dict[str, int]
    host: int
    seconds: dict[str, float]
    timeline: list[tuple[str, dict[str, int]]]
    candidates: list[Candidate]
    notes: list[str]
    workload: Workload
    machine: Machine
    budget: int
    host_budget: int | None
    rollout_forwards: float

    @property
    def reserve(self) -> int:
        """Bytes of the budget that are left to the CUDA context and the allocator."""
        return reserve_of(self.budget)

    @property
    def missing(self) -> int:
        """Bytes by which the budget is too small; 0 if the plan fits."""
        return max(0, self.peak + self.reserve - self.budget)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of the whole step."""
        return sum(self.seconds.values())

    def table(self) -> str:
        """The ledger at the peak, time by phase and candidates, for a terminal of 100 columns."""
        return plan_report.table(self)

    __str__ = table

    def timeline_figure(self) -> Any:
        """A matplotlib figure: live bytes by category through one step, with the budget.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        return plan_report.timeline_figure(self)

    def to_yaml(self) -> str:
        """The trainer's configuration keys that this plan decides, as YAML."""
        return plan_report.to_yaml(self)

    def apply(self, path: str | os.PathLike[str]) -> None:
        """Write those keys into a trainer's YAML; its other keys and comments stay.

        Raises:
            ValueError: the plan is not feasible, or the file is not YAML with keys and values.
            OSError: the file cannot be read or written.
        """
        plan_report.apply(self, path)

    def smaller(self, memory: Memory) -> Candidate | None:
        """The fastest candidate whose predicted peak is below that of ``memory``, to try next.

        One that the host has room for. None if ``memory`` was not considered or nothing is smaller.
        """
        now = next((c for c in self.candidates if c.memory == memory), None)
        if now is None:
            return None
        room = math.inf if self.host_budget is None else self.host_budget
        return next((c for c in self.candidates if c.peak < now.peak and c.host <= room), None)


def plan(
    model: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
    *,
    frames: int = 81,
    height: int = 720,
    width: int = 1280,
    batch: int = 1,
    accumulation: int = 1,
    text_tokens: int = 512,
    train: Literal["lora", "full"] = "lora",
    lora_rank: int = 16,
    lora_targets: Sequence[str] = Lora.targets,
    rollout: GradientPlan | None = None,
    num_steps: int = 40,
    reward_blocks: int = 8,
    sft: bool = True,
    average: bool = False,
    patched: bool = True,
    budget: int | str | None = None,
    host_budget: int | str | None = None,
    weights: str = "auto",
    optimizer: str = "auto",
    machine: str | Machine = "h200",
    progress: bool = False,
) -> Plan:
    """Choose the memory policy of reward feedback training by simulating it; nothing is allocated.

    Weights and optimizer are chosen by faithfulness, the rest by time: bf16 weights if anything
    fits with them, else FP8, else NF4 (LoRA only); for ``train="full"`` AdamW with fp32 masters,
    else bf16 with stochastic rounding, else 8-bit states, else states in host memory. Policy none
    with offload is not looked at: its host memory goes into the hundreds of GiB.

    Args:
        model: a supported transformer, its configuration, a folder with ``config.json``, or one of
            ``wan2.1-t2v-1.3b``, ``wan2.1-t2v-14b``, ``wan2.1-i2v-14b``.
        frames, height, width: of the video, in pixels.
        batch, accumulation: videos of a forward, forwards of an optimizer step.
        text_tokens: rows of a sample's text states.
        rollout: which steps carry gradient, of plans with one step a point; ``GradientPlan()``
            unless given.
        num_steps: of the sampler.
        reward_blocks: blocks of the reward model, a copy of the generator's first.
        sft: a supervised step follows each PRFL step.
        average: the trainer keeps a running average of what it trains.
        patched: both models run on prfl_fast's kernels.
        budget: device memory, bytes or ``"24GiB"``; the machine's unless given.
        host_budget: host memory for offloaded tensors and states; unlimited unless given.
        weights: ``"auto"``, ``"bf16"``, ``"fp8"`` or ``"nf4"``, of generator and reward.
        optimizer: ``"auto"`` or one of :class:`prfl_fast.config.Memory`'s, but not
            ``"paged-adamw8bit"``, which trains no bf16 weights.
        machine: rates for the time estimate, see :mod:`prfl_fast.machines`.
        progress: show a tqdm bar.

    Raises:
        ValueError: an argument of the wrong kind or range, naming it.
        TypeError: a model that no adapter knows, or another rollout than a plan.
        MissingExtra: diffusers or peft is not installed.
    """
    rates = machines.machine(machine)
    if not isinstance(rollout, GradientPlan | None):
        raise TypeError(f"rollout is {rollout!r}, expected a GradientPlan or None")
    points = GradientPlan.prfl() if rollout is None else rollout
    if points.depth != 1 or points.to != "parameters" or points.renoised:
        raise ValueError(
            f"rollout is {points}, expected gradient points of one step to the parameters: a chain "
            "adds a latent and a recomputed forward per step, which the simulation does not run"
        )
    workload = Workload(
        config=model_config(model),
        frames=frames,
        height=height,
        width=width,
        batch=batch,
        accumulation=accumulation,
        text_tokens=text_tokens,
        train=train,
        lora_rank=lora_rank,
        lora_targets=tuple(lora_targets),
        reward_blocks=reward_blocks,
        sft=sft,
        average=average,
        patched=patched,
        num_steps=num_steps,
        points=points.points,
    )
    tiers = _tiers(train, weights, optimizer)
    limits: dict[str, Any] = {
        "budget": rates.memory if budget is None else size_of(budget, "budget"),
        "host_budget": None if host_budget is None else size_of(host_budget, "host_budget"),
        "rollout_forwards": points.expected_forwards(num_steps),
    }
    bar = None
    if progress:
        bar = need("tqdm").tqdm(desc="plan", unit=" simulations", leave=False, disable=None)

    def shown(text: str) -> None:
        if bar is not None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

    found = Search(workload, rates, **limits, shown=shown).run(tiers)
    if bar is not None:
        bar.close()
    unused = ", ".join(f"{kind} with {rule}" for kind, rule in found.unused)
    run, forwards = found.simulation, limits["rollout_forwards"]
    return Plan(
        memory=found.memory,
        feasible=found.feasible,
        peak=run.peak,
        peak_phase=run.peak_phase,
        categories=dict(run.categories),
        host=run.host,
        seconds=step_seconds(run.costs, rates, workload, forwards),
        timeline=run.timeline,
        candidates=found.candidates,
        notes=[f"not considered, since an earlier choice fits: {unused}"] if unused else [],
        workload=workload,
        machine=rates,
        **limits,
    )


def model_config(model: nn.Module | Mapping[str, Any] | str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration of what :func:`plan` takes as a model.

    Raises:
        TypeError: a model that no adapter knows.
        ValueError: no preset, folder or file of that name.
    """
    if isinstance(model, nn.Module):
        return find_adapter(model).backbone_config(model)
    if isinstance(model, Mapping):
        return {key: value for key, value in model.items() if not key.startswith("_")}
    if str(model).lower() in MODELS:
        return MODELS[str(model).lower()]
    for path in (Path(model) / "config.json", Path(model) / "transformer" / "config.json"):
        if path.is_file():
            return _read_config(path)
    raise ValueError(
        f"model is {str(model)!r}, expected one of {', '.join(MODELS)}, or the folder of a "
        "diffusers transformer with a config.json"
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if "_class_name" in config:
            adapter_by_name(f"diffusers {config['_class_name']}")
        if not isinstance(config["num_layers"], int):
            raise ValueError(f"num_layers is {config['num_layers']!r}, expected a whole number")
    except (ValueError, KeyError, TypeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"model: {path} is not a configuration of a transformer: {what}"
        ) from error
    return model_config(config)


def size_of(value: int | str, name: str) -> int:
    """Bytes of ``24GiB`` (powers of two), ``24GB`` (powers of ten) or a whole number.

    Raises:
        ValueError: anything else, calling it ``name``.
    """
    units = {"": 1, "MIB": 1 << 20, "GIB": GIB, "TIB": 1 << 40, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    unit = units.get(match[2].upper()) if match else None
    if match is None or unit is None or isinstance(value, bool) or float(match[1]) <= 0:
        raise ValueError(f"{name} is {value!r}, expected bytes or a size like 24GiB or 24GB")
    return int(float(match[1]) * unit)


def _tiers(train: str, weights: str, optimizer: str) -> list[tuple[str, str]]:
    """Pairs of weights and optimizer in order of preference.

    Raises:
        ValueError: an unknown name, or quantised weights that should train.
    """
    for name, value, known in (
        ("weights", weights, WEIGHTS),
        ("optimizer", optimizer, OPTIMIZERS),
    ):
        if value not in ("auto", *known):
            raise ValueError(f"{name} is {value!r}, expected auto or one of {', '.join(known)}")
    if train == "full" and weights not in ("auto", "bf16"):
        raise ValueError(f"weights is {weights!r}, which cannot be trained: train 'lora', or bf16")
    automatic = {"lora": (WEIGHTS, ("adamw",)), "full": (("bf16",), OPTIMIZERS)}[train]
    kinds = automatic[0] if weights == "auto" else (weights,)
    rules = automatic[1] if optimizer == "auto" else (optimizer,)
    return list(itertools.product(kinds, rules))
