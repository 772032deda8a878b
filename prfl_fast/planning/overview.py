"""Table of plans: the largest video of each model that fits each GPU, its policy and its time."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.plan import Plan
from prfl_fast.planning.planner import plan_memory
from prfl_fast.planning.presets import adapter_of, vae_stride
from prfl_fast.planning.report import seconds
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.units import GIB

MODELS = (
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "wan2.1-i2v-14b",
    "wan2.2-t2v-a14b",
    "wan2.2-ti2v-5b",
)
GPUS = ("rtx4090", "rtx5090", "l40s", "h100", "h200")
# Frames, height and width, the largest first; rounded down to sizes of the model.
SIZES = ((161, 720, 1280), (81, 720, 1280), (81, 480, 832), (33, 480, 832))
HEAD = ("model", "GPU", "largest video", "generator", "reward model", "device", "host", "per step")


def sized(fields: Mapping[str, Any], size: Sequence[int]) -> Workload:
    """Return the workload with the largest video that its model takes within a size."""
    # All families take this size; it only serves to find the multiples that this model needs.
    workload = Workload(**{**fields, "frames": 25, "height": 1024, "width": 1024})
    stride = vae_stride(workload.latent_channels)
    patch = adapter_of(workload.config).patch_sizes(workload.config)
    frames = (size[0] - 1) // stride[0] * stride[0] + 1
    height, width = (size[i] - size[i] % (stride[i] * patch[i]) for i in (1, 2))
    return dataclasses.replace(workload, frames=frames, height=height, width=width)


def row(fields: Mapping[str, Any], gpu: str, host_budget: str) -> list[str]:
    """Return the cells after the model's name; ``fields`` are those of a Workload but its size."""
    for size in SIZES:
        work = sized(fields, size)
        plan = plan_memory(work, budget=gpu, gpu=gpu, host_budget=host_budget)
        if plan.feasible:
            return [gpu, f"{work.frames} × {work.height} × {work.width}", *_cells(plan)]
    return [gpu, "none of these sizes", *[""] * (len(HEAD) - 3)]


def _cells(plan: Plan) -> list[str]:
    policies = (words_of(memory) for memory in (plan.memory, plan.reward_memory))
    sizes = (f"{size / GIB:.0f} GiB" for size in (plan.peak + plan.reserve, plan.host))
    return [*policies, *sizes, seconds(plan.step_seconds)]


def words_of(memory: MemoryConfig) -> str:
    """Return a policy in words, such as ``bf16 full offload stream``."""
    words: list[str] = [memory.weight_dtype, memory.activation_checkpointing]
    words += ["offload"] * (memory.offload is not None)
    words += ["stream"] * (memory.stream_weights is not None)
    words += ["chunks"] * (memory.feed_forward_chunk is not None)
    return " ".join(words)


def rows(
    fields: Mapping[str, Any],
    models: Sequence[str],
    gpus: Sequence[str],
    host_budget: str,
    show: Callable[[str], object],
) -> Iterator[list[str]]:
    """Yield a row for each model and GPU; ``show`` receives a line before each."""
    for model in models:
        for gpu in gpus:
            show(f"{model} on {gpu}")
            yield [model, *row({**fields, "model": model}, gpu, host_budget)]


def markdown(found: Sequence[Sequence[str]]) -> str:
    """Return the rows below the column names as a Markdown table."""
    lines = [HEAD, ["---"] * len(HEAD), *found]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
