"""Predict steps of other memory policies from the simulation of one.

The predictions rank candidates; the chosen candidate is itself simulated.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prfl_fast.memory.offload import SMALLEST
from prfl_fast.memory.optimizers import state_bytes
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.memory.stream import weight_bytes
from prfl_fast.planning.built_models import build, depths_of, transformer_of
from prfl_fast.planning.costs import Cost
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.simulated_step import SWAP_PHASES
from prfl_fast.planning.trace import FREE, Simulation
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.modules import unwrap

REWARD_PHASES = ("reward", "reward backward")
PAIR_PHASES = ("dpo reference", "dpo forward", "dpo backward")  # each has two passes
# Backward phases, and the forwards whose blocks they run again.
_FORWARDS = {
    "backward": "forward",
    "reward backward": "reward",
    "earlier backward": "recompute",
    "dpo backward": "dpo forward",
}
# Blocks that are copied ahead. Two slots already make the time of a phase the longer of copies and
# compute: the next block is copied while one runs. More slots would shorten nothing.
AHEAD = 1

Bytes = Mapping[str, float]


@dataclass(frozen=True)
class Weights:
    """Hold the bytes of the weights of both models and of the optimizer's states.

    Attributes:
        blocks, reward_blocks: weights of blocks, which can wait in host memory.
        largest: weights of the largest block.
        rest: all other weights, adapters included.
        states, host_states: optimizer states on the device and in host memory.
    """

    blocks: int
    reward_blocks: int
    largest: int
    rest: int = 0
    states: int = 0
    host_states: int = 0


def count_weights(workload: Workload, memory: MemoryConfig, reward_memory: MemoryConfig) -> Weights:
    """Return the bytes of weights and states, from models with one block in each list."""
    trained, rewards = build(workload, memory, reward_memory, most=1)
    adapter = adapter_of(workload.config)
    names, totals, sizes = adapter.lists, [], [0]
    rest = states = host_states = 0
    for whole, depth in zip((trained, *rewards), depths_of(workload), strict=True):
        model = transformer_of(whole)
        total, times = 0, dict[int, int]()
        for name, count in zip(names, depth.values(), strict=True):
            blocks = getattr(unwrap(model), name)
            if count and len(blocks):
                sizes.append(weight_bytes(blocks[0]))
                total += count * sizes[-1]
                times |= {id(p): count for p in blocks.parameters()}
        totals.append(total)
        for name, parameter in whole.named_parameters():
            count = times.get(id(parameter), 1)
            rest += count * parameter.nbytes
            if parameter.requires_grad and not re.search(adapter.unreached, name):
                device, host = state_bytes(memory.optimizer, parameter.shape, parameter.dtype)
                states, host_states = states + count * device, host_states + count * host
    rest = max(0, rest - sum(totals))
    return Weights(totals[0], sum(totals[1:]), max(sizes), rest, states, host_states)


def exchanged(run: Simulation, before: Weights, after: Weights) -> Simulation:
    """Return the approximate simulation of the same step with other weights or optimizer."""
    changes = {
        "weights": after.blocks - before.blocks + after.rest - before.rest,
        "reward": after.reward_blocks - before.reward_blocks,
        "optimizer": after.states - before.states,
    }
    timeline = [
        (phase, {name: size + changes.get(name, 0) for name, size in live.items()})
        for phase, live in run.timeline
    ]
    host = run.host + after.host_states - before.host_states
    return _with(run, timeline, run.costs, host)


def offloaded(run: Simulation, layers: int, reward_layers: Sequence[int]) -> Simulation:
    """Return the approximate simulation of the same step with activations in host memory."""
    ours, first_reward = _saved_by_blocks(run)
    block, reward_block = ours // layers, first_reward // max((1, *reward_layers[:1]))
    theirs = reward_block * max(reward_layers, default=0)
    window = 2 * max(block, reward_block)  # the device holds the tensors of two blocks

    def moved(phase: str, live: Mapping[str, int]) -> dict[str, int]:
        # Beside its blocks, a model saves a few tensors that stay.
        now, kept = live.get("checkpoints", 0), window
        blocks = min(ours, now)
        if phase in REWARD_PHASES:
            start = first["reward"].get("checkpoints", 0)
            blocks = ours + min(theirs, max(0, now - start))
        elif phase in PAIR_PHASES:
            blocks, kept = min(2 * ours, now), 2 * block
        return {**live, "checkpoints": now - max(0, blocks - kept)}

    first = {phase: live for phase, live in reversed(run.timeline)}  # the start of each phase
    timeline = [(phase, moved(phase, live)) for phase, live in run.timeline]
    # A block's tensors leave when the next block comes, whichever model it belongs to.
    rest = reward_block * (sum(reward_layers) - len(reward_layers))  # of all reward models
    sent = {"forward": ours - block, "recompute": ours - block, "reward": block + rest}
    back = {"backward": ours - block, "earlier backward": ours - block, "reward backward": rest}
    pair = 2 * ours - block
    sent["dpo forward"] = back["dpo backward"] = pair
    costs = {
        phase: dataclasses.replace(
            cost,
            to_host_bytes=cost.to_host_bytes + sent.get(phase, 0),
            to_device_bytes=cost.to_device_bytes + back.get(phase, 0),
        )
        for phase, cost in run.costs.items()
    }
    host = max(ours if theirs else ours - block, pair * ("dpo forward" in run.costs))
    return _with(run, timeline, costs, run.host + host + theirs - reward_block)


def _saved_by_blocks(run: Simulation) -> tuple[int, int]:
    """Return the bytes that blocks of generator and reward save and that offload would move."""
    held: dict[Any, int] = {}
    for phase, events in run.events:
        if phase in ("reward backward", "backward"):
            break
        for kind, name, size, category in events:
            if kind == FREE or category != "checkpoints":
                held.pop(name, None)
            elif size >= SMALLEST and name is not None and name[2]:  # the list of a block
                held[name] = size
    blocks: dict[Any, int] = defaultdict(int)
    for name, size in held.items():
        blocks[name[:4]] += size
    totals = {"forward": 0, "reward": 0}
    for (*call, index), size in blocks.items():
        # The last block's segment also has what the head saves, which stays on the device.
        last = (*call, index + 1) not in blocks
        size = min(size, blocks.get((*call, index - 1), size)) if last else size
        totals["reward" if call[0] == "reward" else "forward"] += size
    return totals["forward"], totals["reward"]


def streamed(run: Simulation, weights: Weights, *, full: bool) -> Simulation:
    """Return the approximate simulation of the same step with streamed weights.

    ``full`` is True if all weights train.
    """
    ours, theirs = weights.blocks, weights.reward_blocks
    resident = max(live.get("weights", 0) for _, live in run.timeline)
    share = ours / max(1, resident) if full else 0.0

    def moved(live: Mapping[str, int]) -> dict[str, int]:
        changes = {
            "weights": (1 + AHEAD) * weights.largest - ours,
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
        if phase in PAIR_PHASES:  # a frozen copy does not wait
            copied = 0 if full and phase == "dpo reference" else 2 * ours
        to_device = cost.to_device_bytes + (copied if phase else 0)
        costs[phase] = dataclasses.replace(cost, to_device_bytes=to_device)
    gradients = max(live.get("gradients", 0) for _, live in run.timeline)
    return _with(run, timeline, costs, run.host + ours + theirs + int(share * gradients))


def _with(run: Simulation, timeline: list, costs: dict, host: int) -> Simulation:  # type: ignore[type-arg]
    """Return a simulation with another timeline, and the peak that follows from it."""
    phase, high = max(timeline, key=lambda moment: sum(moment[1].values()))
    return Simulation(sum(high.values()), phase, high, host, timeline, costs)


def without_recomputation(costs: Mapping[str, Cost]) -> dict[str, Cost]:
    """Return a lower bound of the costs without checkpointing, from those with it."""
    least = dict(costs)
    for backward, forward in _FORWARDS.items():
        if backward in costs:
            # A backward runs each block again at most once.
            again = dataclasses.asdict(costs[forward])
            spent = dataclasses.asdict(costs[backward])
            least[backward] = Cost(**{k: max(0, v - again[k]) for k, v in spent.items()})
    return least


class Single:
    """Split a simulation of both models in one mode into the parts of each model."""

    def __init__(self, run: Simulation, layers: int) -> None:
        self.run, self._layers = run, layers
        self._highs = _highs(run)
        self._phases = [phase for phase in REWARD_PHASES if phase in self._highs]
        self.start, self._middle = (
            next(live for name, live in run.timeline if name == phase)
            for phase in self._phases or 2 * ("backward",)
        )

    def moments(self) -> list[dict[str, int]]:
        """Return bytes by category at the peak of each of the generator's phases."""
        return [live for phase, live in self._highs.items() if phase not in REWARD_PHASES]

    @property
    def last_block(self) -> float:
        """Return the bytes of the generator's last block, offloaded only after the forward."""
        return self._sent("forward") / max(1, self._layers - 1)

    @property
    def window(self) -> Bytes:
        """Return the bytes of the last two offloaded blocks, held until another model runs."""
        return {"checkpoints": 2 * self.last_block}

    def _sent(self, phase: str) -> int:
        return self.run.costs.get(phase, Cost()).to_host_bytes

    def added_by_reward(self) -> list[dict[str, float]]:
        """Return the bytes that the peak of each reward phase adds to its start."""
        return [self._added(self._highs[phase]) for phase in self._phases]

    def kept_by_reward(self) -> dict[str, float]:
        """Return the bytes that the reward model adds until its backward begins."""
        return self._added(self._middle)

    def _added(self, moment: Bytes) -> dict[str, float]:
        return weighted_sum((1, moment), (-1, self.start), (1, self.window))

    def costs(self, *, reward: bool) -> dict[str, Cost]:
        """Return the costs of the reward's phases, or of the others."""
        return {p: c for p, c in self.run.costs.items() if (p in REWARD_PHASES) == reward}

    def host(self, *, last: bool) -> float:
        """Return the host bytes of the generator's blocks, with the last one or without it.

        The buffers of one forward stay and serve for the two forwards of a pair.
        """
        return max(self._sent("forward") + last * self.last_block, self._sent("dpo forward"))

    def host_of_reward(self) -> float:
        """Return the host bytes of the reward's blocks."""
        return self._sent("reward") - self.last_block

    def other_host(self) -> float:
        """Return the host bytes of optimizer states, all but offloaded activations."""
        return max(0, self.run.host - self.host(last=True) - self.host_of_reward())

    def kept_by_pair(self) -> int:
        """Return the live bytes when the backward of a pair begins; 0 without ``dpo``."""
        moments = (sum(live.values()) for name, live in self.run.timeline if name == "dpo backward")
        return next(moments, 0)


def weighted_sum(*parts: tuple[float, Bytes]) -> dict[str, float]:
    """Return the weighted sum of vectors by category."""
    total: dict[str, float] = {}
    for weight, part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + weight * value
    return total


def start_of(ours: Single, theirs: Single) -> dict[str, float]:
    """Return the generator's live bytes under ``ours`` beside a reward model under ``theirs``."""
    # An offloaded reward model frees the generator's last two blocks on the device.
    evicted = ours.window if theirs.window["checkpoints"] else {}
    return weighted_sum((1, ours.start), (-1, evicted))


def _highs(run: Simulation) -> dict[str, dict[str, int]]:
    """Return bytes by category at the peak of each phase."""
    highs: dict[str, dict[str, int]] = {}
    for phase, live in run.timeline:
        if phase not in highs or sum(live.values()) > sum(highs[phase].values()):
            highs[phase] = live
    return highs
