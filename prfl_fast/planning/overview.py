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

SHOWN = (
    "wan2.1-t2v-1.3b",
    "wan2.1-t2v-14b",
    "wan2.1-i2v-14b",
    "wan2.2-t2v-a14b",
    "wan2.2-ti2v-5b",
)
CARDS = ("rtx4090", "rtx5090", "l40s", "h100", "h200")
# Frames, height and width, the largest first; rounded down to sizes of the model.
SIZES = ((161, 720, 1280), (81, 720, 1280), (81, 480, 832), (33, 480, 832))
HEAD = ("model", "GPU", "largest video", "generator", "reward model", "device", "host", "per step")


def sized(fields: Mapping[str, Any], size: Sequence[int]) -> Workload:
    """Return the workload with the largest frames, height and width of its model within a size."""
    # Any size that all families take, to learn the multiples of this one.
    workload = Workload(**{**fields, "frames": 25, "height": 1024, "width": 1024})
    stride = vae_stride(workload.latent_channels)
    patch = adapter_of(workload.config).patch_sizes(workload.config)
    frames = (size[0] - 1) // stride[0] * stride[0] + 1
    height, width = (size[i] - size[i] % (stride[i] * patch[i]) for i in (1, 2))
    return dataclasses.replace(workload, frames=frames, height=height, width=width)


def row(fields: Mapping[str, Any], card: str, host_budget: str) -> list[str]:
    """Return a row after the model's name; ``fields`` of a Workload decide all but the size."""
    for size in SIZES:
        work = sized(fields, size)
        plan = plan_memory(work, budget=card, gpu=card, host_budget=host_budget)
        if plan.feasible:
            return [card, f"{work.frames} × {work.height} × {work.width}", *_cells(plan)]
    return [card, "none of these sizes", *[""] * (len(HEAD) - 3)]


def _cells(plan: Plan) -> list[str]:
    policies = (_policy(memory) for memory in (plan.memory, plan.reward_memory))
    sizes = (f"{size / GIB:.0f} GiB" for size in (plan.peak + plan.reserve, plan.host))
    return [*policies, *sizes, seconds(plan.step_seconds)]


def _policy(memory: MemoryConfig) -> str:
    words: list[str] = [memory.weight_dtype, memory.activation_checkpointing]
    words += ["offload"] * (memory.offload is not None)
    words += ["stream"] * (memory.stream_weights is not None)
    words += ["chunks"] * (memory.feed_forward_chunk is not None)
    return " ".join(words)


def rows(
    fields: Mapping[str, Any],
    models: Sequence[str],
    cards: Sequence[str],
    host_budget: str,
    show: Callable[[str], object],
) -> Iterator[list[str]]:
    """Yield the rows of models and cards; ``show`` receives a line before each."""
    for model in models:
        for card in cards:
            show(f"{model} on {card}")
            yield [model, *row({**fields, "model": model}, card, host_budget)]


def markdown(found: Sequence[Sequence[str]]) -> str:
    """Return rows below their heads as a Markdown table."""
    lines = [HEAD, ["---"] * len(HEAD), *found]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
