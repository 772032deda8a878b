"""Search of the planner: candidates from shallow simulations, the best one simulated in full.

A candidate combines checkpointing and offload of generator and reward model with feed-forward
chunks. Bytes and FLOPs of a phase are affine in the depth, so each pair of mode and offload is
simulated at two small depths, for both models. The generator's saved bytes add to the bytes of a
reward phase, so sums of two simulations give every combination for both models.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.costs import Cost
from prfl_fast.planning.gpu_specs import GpuSpecs
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.simulation import SWAP_PHASES, Simulation, simulate
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.units import GIB

# Memory outside the ledger: the CUDA context with its kernels, and the allocator's rounding and
# splits. Both figures are assumptions that no GPU has confirmed yet.
RESERVE_LEAST, RESERVE_SHARE = int(0.6 * GIB), 0.025
# Tokens of a chunk: so few that the feed-forward no longer sets the peak, enough for large matrix
# products. At 14B and 720p they lower the peak of mode full, offloaded, from 49.0 to 46.1 GiB.
CHUNK = 8192
# Modes of activation checkpointing with offload. none with offload is left out: it takes hundreds
# of GiB of host memory (455 at 14B, 720p, in the bench's memory table). The last pair needs the
# least device memory.
MODES: tuple[tuple[Any, Any], ...] = (
    ("none", None),
    ("attention", None),
    ("attention", "cpu"),
    ("full", None),
    ("full", "cpu"),
)
# Offload keeps two blocks on the device, so bytes are affine in the depth from three blocks on.
REWARD_PHASES = ("reward", "reward backward")
CHOSEN, SLOWER = "chosen", "fits, slower"

Bytes = Mapping[str, float]
Tier = tuple[str, str]  # weight dtype of both models, optimizer


@dataclass(frozen=True)
class Candidate:
    """Two memory policies with predicted bytes, seconds per step, and the verdict."""

    memory: MemoryConfig
    reward_memory: MemoryConfig
    peak: int
    host: int
    seconds: float
    reason: str


@dataclass(frozen=True)
class Found:
    """Result of a search: the chosen candidate, its simulation at full depth, all candidates."""

    chosen: Candidate
    simulation: Simulation
    feasible: bool
    candidates: list[Candidate]
    unused: list[Tier]


def reserve_of(budget: int) -> int:
    """Return the bytes of a budget that a plan leaves free."""
    return max(RESERVE_LEAST, int(RESERVE_SHARE * budget))


def budget_for(peak: int) -> int:
    """Return the smallest budget, in hundredths of a GiB, that holds a peak and its reserve."""
    least = max(peak + RESERVE_LEAST, peak / (1 - RESERVE_SHARE))
    return math.ceil(100 * least / GIB) * GIB // 100


def phase_seconds(cost: Cost, rates: GpuSpecs) -> float:
    """Return the seconds of a phase: compute or the slower transfer direction, which overlap."""
    # One stream computes, so its times add up; copies run on a stream of their own.
    compute = cost.matmul_flops / rates.matmul + cost.attention_flops / rates.attention
    compute += cost.moved_bytes / rates.copy
    return max(compute, cost.to_host_bytes / rates.to_host, cost.to_device_bytes / rates.to_device)


def step_seconds(
    costs: Mapping[str, Cost], rates: GpuSpecs, workload: Workload
) -> dict[str, float]:
    """Return the seconds of a whole step by phase, over all runs of each phase."""
    once = {phase: phase_seconds(cost, rates) for phase, cost in costs.items() if phase}
    if workload.sft and "sft forward" not in once:
        once |= {f"sft {phase}": once[phase] for phase in ("forward", "backward")}
    times = {"rollout": workload.rollout_forwards, "optimizer": 1.0 + workload.sft}
    per_point = ("forward", *REWARD_PHASES, "backward")
    times |= dict.fromkeys(per_point, float(workload.points))
    times |= dict.fromkeys(SWAP_PHASES, workload.swaps)
    found = {phase: times.get(phase, 1.0) * value for phase, value in once.items()}
    return {
        phase: value if phase == "optimizer" else workload.gradient_accumulation_steps * value
        for phase, value in found.items()
    }


class Shallow:
    """Simulations of both models in one mode at two depths, extrapolated to any depth."""

    def __init__(self, runs: Sequence[Simulation], depths: Sequence[int] = (3, 4)) -> None:
        self._runs, self._depths = runs, depths
        self._highs = [_highs(run) for run in runs]
        self._starts, self._middles = (
            [next(live for name, live in run.timeline if name == phase) for run in runs]
            for phase in REWARD_PHASES
        )

    def moments(self, layers: int, reward_layers: int) -> list[dict[str, float]]:
        """Return bytes by category at the peak of each of the generator's phases."""
        return [
            self._mixed([high[phase] for high in self._highs], layers, reward_layers)
            for phase in self._highs[0]
            if phase not in REWARD_PHASES
        ]

    @property
    def window(self) -> Bytes:
        """Return the bytes of the last two offloaded blocks, held until another model runs."""
        return {"checkpoints": 2 * self.sent_by_block("forward")}

    def sent_by_block(self, phase: str) -> float:
        """Return the bytes that one block sends to the host, in ``forward`` or ``reward``."""
        few, more = (run.costs[phase].to_host_bytes for run in self._runs)
        return (more - few) / (self._depths[1] - self._depths[0])

    def start_of_reward(self, layers: int, reward_layers: int) -> dict[str, float]:
        """Return the live bytes when the reward model begins."""
        return self._mixed(self._starts, layers, reward_layers)

    def added_by_reward(self, reward_layers: int) -> list[dict[str, float]]:
        """Return the bytes that the peak of each reward phase adds to its start."""
        return [
            self._added([high[phase] for high in self._highs], reward_layers)
            for phase in REWARD_PHASES
        ]

    def kept_by_reward(self, reward_layers: int) -> dict[str, float]:
        """Return the bytes that the reward model adds until its backward begins."""
        return self._added(self._middles, reward_layers)

    def _added(self, moments: Sequence[Bytes], reward_layers: int) -> dict[str, float]:
        few, more = (
            _sum((1, moment), (-1, start), (1, self.window))
            for moment, start in zip(moments, self._starts, strict=True)
        )
        return self._at(few, more, reward_layers)

    def costs(self, layers: int, *, reward: bool) -> dict[str, Cost]:
        """Return the costs of the reward's phases, or of the others, at a depth."""
        few, more = ({p: dataclasses.asdict(c) for p, c in r.costs.items()} for r in self._runs)
        return {
            phase: Cost(**{k: int(v) for k, v in self._at(few[phase], more[phase], layers).items()})
            for phase in few
            if (phase in REWARD_PHASES) == reward
        }

    def other_host(self, layers: int) -> float:
        """Return host bytes apart from offloaded activations, that is optimizer states."""
        few, more = (
            {"": run.host - sum(run.costs[p].to_host_bytes for p in ("forward", "reward"))}
            for run in self._runs
        )
        return max(0.0, self._at(few, more, layers)[""])

    def _at(self, few: Bytes, more: Bytes, depth: int) -> dict[str, float]:
        first, second = self._depths
        factor = (depth - first) / (second - first)
        return _sum((1 - factor, few), (factor, more))

    def _mixed(self, pair: Sequence[Bytes], layers: int, reward_layers: int) -> dict[str, float]:
        # In the generator's phases only the reward's weights depend on the reward's depth.
        mixed = self._at(pair[0], pair[1], layers)
        return mixed | {"reward": self._at(pair[0], pair[1], reward_layers)["reward"]}


def _sum(*parts: tuple[float, Bytes]) -> dict[str, float]:
    """Return the weighted sum of vectors by category."""
    total: dict[str, float] = {}
    for weight, part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + weight * value
    return total


def _start(ours: Shallow, theirs: Shallow, layers: int, reward_layers: int) -> dict[str, float]:
    """Return the generator's live bytes under ``ours`` beside a reward model under ``theirs``."""
    # An offloaded reward model frees the generator's last two blocks on the device.
    evicted = ours.window if theirs.window["checkpoints"] else {}
    return _sum((1, ours.start_of_reward(layers, reward_layers)), (-1, evicted))


def _highs(run: Simulation) -> dict[str, dict[str, int]]:
    """Return bytes by category at the peak of each phase."""
    highs: dict[str, dict[str, int]] = {}
    for phase, live in run.timeline:
        if phase not in highs or sum(live.values()) > sum(highs[phase].values()):
            highs[phase] = live
    return highs


class Search:
    """Search among the candidates of one workload on one GPU within budgets in bytes.

    A host budget of None is unlimited. ``show`` receives a description before each simulation.
    """

    def __init__(
        self, workload: Workload, rates: GpuSpecs, *, budget: int, host_budget: int | None
    ) -> None:
        self.workload, self.rates = workload, rates
        self.show: Callable[[str], object] = lambda text: None
        self.limit, self.host_budget = budget - reserve_of(budget), host_budget
        self.layers = workload.blocks
        self._seen: dict[tuple[Any, ...], Shallow] = {}

    def run(self, tiers: Sequence[Tier]) -> Found:
        """Return the fastest candidate that fits, from the first tier with one that fits."""
        considered: list[Candidate] = []
        for index, tier in enumerate(tiers):
            # If the modes with the lowest peak do not fit, no pair of this tier does.
            lean = self._candidate(tier, MODES[-1], MODES[-1], CHUNK)
            found = [lean] if lean.peak > self.limit else self._candidates(tier)
            found.sort(key=lambda c: (c.seconds, c.peak))
            considered += found
            for candidate in found:
                if candidate.reason != SLOWER:
                    continue
                run, whole = self._whole(candidate)
                considered[considered.index(candidate)] = whole
                if whole.reason == CHOSEN:
                    unused = list(tiers[index + 1 :])
                    return Found(whole, run, True, considered, unused)
        # Nothing fits: return the candidate that exceeds the limits by the fewest bytes.
        nearest = min(considered, key=self._miss)
        run, whole = self._whole(nearest)
        considered[considered.index(nearest)] = whole
        return Found(whole, run, whole.reason == CHOSEN, considered, [])

    def _whole(self, candidate: Candidate) -> tuple[Simulation, Candidate]:
        """Simulate a candidate at full depth; return the run and the candidate with its numbers."""
        run = self._simulate(candidate.memory, candidate.reward_memory)
        reason = self._refusal(run.peak, run.host) or CHOSEN
        seconds = self._seconds(run.costs)
        whole = dataclasses.replace(
            candidate, peak=run.peak, host=run.host, seconds=seconds, reason=reason
        )
        return run, whole

    def _candidates(self, tier: Tier) -> list[Candidate]:
        """Return every pair of modes, and with chunks those that may fit and be faster."""
        pairs = list(itertools.product(MODES, MODES))
        found = [self._candidate(tier, *pair, None) for pair in pairs]
        # Chunks add work and do not change the bytes that checkpointed blocks save, so most pairs
        # with chunks need no simulation.
        fits = min((c.seconds for c in found if c.reason == SLOWER), default=math.inf)
        for pair, whole in zip(pairs, list(found), strict=True):
            kept = self._kept(tier, *pair)
            if ("none", None) not in pair and whole.seconds < fits and kept <= self.limit:
                found.append(self._candidate(tier, *pair, CHUNK))
        return found

    def _kept(self, tier: Tier, generator: Any, reward: Any) -> float:
        """Return the live bytes between the forwards and the backwards."""
        depths = self.layers, self.workload.reward_blocks
        ours, theirs = (self._shallow(tier, mode, None) for mode in (generator, reward))
        start, added = _start(ours, theirs, *depths), theirs.kept_by_reward(depths[1])
        return sum(start.values()) + sum(added.values())

    def _candidate(self, tier: Tier, generator: Any, reward: Any, chunk: int | None) -> Candidate:
        ours, theirs = self._shallow(tier, generator, chunk), self._shallow(tier, reward, chunk)
        depth, reward_depth = self.layers, self.workload.reward_blocks
        start = _start(ours, theirs, depth, reward_depth)
        moments = ours.moments(depth, reward_depth)
        moments += [_sum((1, start), (1, added)) for added in theirs.added_by_reward(reward_depth)]
        costs = ours.costs(depth, reward=False) | theirs.costs(reward_depth, reward=True)
        peak = int(max(sum(moment.values()) for moment in moments))
        sent, reward_sent = ours.sent_by_block("forward"), theirs.sent_by_block("reward")
        # The very last block stays on the device, because the backward begins with it.
        host = int(depth * sent + reward_depth * reward_sent - (reward_sent or sent))
        host += int(ours.other_host(depth))
        return Candidate(
            *memory_of(tier, generator, reward, chunk),
            peak,
            host,
            self._seconds(costs),
            self._refusal(peak, host) or SLOWER,
        )

    def _shallow(self, tier: Tier, mode: Any, chunk: int | None) -> Shallow:
        key = (tier, mode, chunk)
        if key not in self._seen:
            memory = memory_of(tier, mode, mode, chunk)
            depths = adapter_of(self.workload.config).shallow_depths
            runs = [self._simulate(*memory, depth) for depth in depths]
            self._seen[key] = Shallow(runs, depths)
        return self._seen[key]

    def _simulate(
        self, memory: MemoryConfig, reward_memory: MemoryConfig, depth: int | None = None
    ) -> Simulation:
        mode = memory.activation_checkpointing
        self.show(f"{memory.weight_dtype}, {mode}, {depth or 'all'} blocks")
        # A supervised step repeats the generator's phases beside less memory: it is never the peak.
        short = dataclasses.replace(self.workload, sft=False)
        depths = {} if depth is None else {"layers": depth, "reward_layers": depth}
        return simulate(short, memory, reward_memory, **depths)

    def _seconds(self, costs: Mapping[str, Cost]) -> float:
        times = step_seconds(costs, self.rates, self.workload)
        return sum(times.values())

    def _refusal(self, peak: int, host: int) -> str:
        """Return the reason why a candidate of that size does not fit, or an empty string."""
        if peak > self.limit:
            return f"{(peak - self.limit) / GIB:.1f} GiB over"
        if self.host_budget is not None and host > self.host_budget:
            return f"{(host - self.host_budget) / GIB:.1f} GiB over on the host"
        return ""

    def _miss(self, candidate: Candidate) -> tuple[int, int]:
        host = 0 if self.host_budget is None else max(0, candidate.host - self.host_budget)
        return host + max(0, candidate.peak - self.limit), candidate.peak


def memory_of(
    tier: Tier, generator: Any, reward: Any, chunk: int | None
) -> tuple[MemoryConfig, MemoryConfig]:
    """Return the configs of generator and reward; both are given as (checkpointing, offload)."""
    weights: Any = tier[0]
    optimizer: Any = tier[1]
    return (
        MemoryConfig(weights, generator[0], generator[1], chunk, optimizer),
        MemoryConfig(weights, reward[0], reward[1], chunk),
    )
