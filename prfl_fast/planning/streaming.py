"""Predict a step with streamed weights from the simulation of the step without them."""

import dataclasses
from collections.abc import Mapping

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.memory.stream import weight_bytes
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.simulation import SWAP_PHASES, build, depths_of
from prfl_fast.planning.trace import Simulation
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.modules import unwrap

REWARD_PHASES = ("reward", "reward backward")
# Blocks that are copied ahead. Two slots already make the time of a phase the longer of copies and
# compute: the next block is copied while one runs. More slots would shorten nothing.
AHEAD = 1


def block_bytes(
    workload: Workload, memory: MemoryConfig, reward_memory: MemoryConfig
) -> tuple[int, int, int]:
    """Return the bytes of the generator's and the reward's blocks, and those of the largest."""
    generator, reward = build(workload, memory, reward_memory, most=1)
    names, totals, sizes = adapter_of(workload.config).lists, [], [0]
    for model, depth in zip((generator, reward.backbone), depths_of(workload), strict=True):
        total = 0
        for name, count in zip(names, depth.values(), strict=True):
            blocks = getattr(unwrap(model), name)
            if count and len(blocks):
                sizes.append(weight_bytes(blocks[0]))
                total += count * sizes[-1]
        totals.append(total)
    return totals[0], totals[1], max(sizes)


def streamed(run: Simulation, sizes: tuple[int, int, int], *, full: bool) -> Simulation:
    """Return the approximate simulation of the same step with streamed weights.

    ``sizes`` are those of :func:`block_bytes`; ``full`` is True if all weights train.
    """
    ours, theirs, largest = sizes
    resident = max(live.get("weights", 0) for _, live in run.timeline)
    share = ours / max(1, resident) if full else 0.0

    def moved(live: Mapping[str, int]) -> dict[str, int]:
        changes = {
            "weights": (1 + AHEAD) * largest - ours,
            "reward": -theirs,
            "gradients": -int(share * live.get("gradients", 0)),
        }
        return {name: max(0, value + changes.get(name, 0)) for name, value in live.items()}

    timeline = [(phase, moved(live)) for phase, live in run.timeline]
    costs = {}
    for phase, cost in run.costs.items():
        if phase in SWAP_PHASES:  # both experts share the slots
            continue
        copied = theirs if phase in REWARD_PHASES else ours if phase != "optimizer" else 0
        to_device = cost.to_device_bytes + (copied if phase else 0)
        costs[phase] = dataclasses.replace(cost, to_device_bytes=to_device)
    phase, high = max(timeline, key=lambda moment: sum(moment[1].values()))
    gradients = max(live.get("gradients", 0) for _, live in run.timeline)
    host = run.host + ours + theirs + int(share * gradients)
    return Simulation(sum(high.values()), phase, high, host, timeline, costs)
