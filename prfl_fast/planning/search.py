"""Search for the fastest memory policy that fits: rank candidates, then simulate the best.

A candidate combines checkpointing and offload of generator and reward model with feed-forward
chunks. Each mode is simulated once, for both models. The generator's saved bytes add to the bytes
of a reward phase, so the sum of two simulations predicts a candidate whose models have different
modes. Offload, streamed weights, and other weight dtypes and optimizers are predicted from the
simulation without them. A candidate is chosen only after it was itself simulated.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.allocator import fits, least_limit, requests_of
from prfl_fast.planning.costs import Cost
from prfl_fast.planning.derived import (
    AHEAD,
    REWARD_PHASES,
    Bytes,
    Single,
    Weights,
    count_weights,
    exchanged,
    offloaded,
    start_of,
    streamed,
    weighted_sum,
    without_recomputation,
)
from prfl_fast.planning.gpu_specs import GpuSpecs
from prfl_fast.planning.simulated_feedback import EARLIER_PHASES
from prfl_fast.planning.simulated_step import SWAP_PHASES
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.trace import Simulation
from prfl_fast.planning.workload import Workload
from prfl_fast.utils.units import GIB

# Memory outside the allocator: the CUDA context with its kernels. No GPU has confirmed it yet.
CONTEXT = int(0.6 * GIB)
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
# From a mode without offload to the mode that keeps a part of the same tensors.
LEANER = {MODES[0]: MODES[1], MODES[1]: MODES[3]}
CHOSEN, FITS, FRAGMENTED = "chosen", "fits", "over, fragmented"

# Candidates whose predicted times differ by less than this share count as equally fast.
TIE = 0.03


@dataclass(frozen=True)
class Tier:
    """Hold the settings that a group of candidates has in common: weights and optimizer.

    Attributes:
        weight_dtype: of both models.
        optimizer: of the generator.
        stream_weights: blocks copied ahead if weights wait in host memory, else None.
    """

    weight_dtype: Any
    optimizer: Any = "adamw"
    stream_weights: int | None = None


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
    """Result of a search: the chosen candidate, its simulation, all candidates."""

    chosen: Candidate
    simulation: Simulation
    fragmentation: int
    feasible: bool
    candidates: list[Candidate]
    unused: list[Tier]


def budget_for(reserved: int) -> int:
    """Return the smallest budget, in hundredths of a GiB, for these bytes and the context."""
    return math.ceil(100 * (reserved + CONTEXT) / GIB) * GIB // 100


def phase_seconds(cost: Cost, rates: GpuSpecs) -> float:
    """Return the seconds of a phase: the longest of compute, launches, copies and collectives.

    They overlap, but for the exchange of heads and tokens, whose results are needed at once.
    """
    # One stream computes, so its times add up; copies run on a stream of their own.
    compute = cost.matmul_flops / rates.matmul + cost.attention_flops / rates.attention
    compute += cost.attention_backward_flops / rates.attention_backward
    compute += cost.moved_bytes / rates.copy
    copies = cost.to_host_bytes / rates.to_host, cost.to_device_bytes / rates.to_device
    collectives = (cost.gathered_bytes + cost.reduced_bytes) / rates.peer
    compute += cost.exchanged_bytes / rates.peer
    return max(compute, cost.launches * rates.launch, collectives, *copies)


def step_seconds(
    costs: Mapping[str, Cost], rates: GpuSpecs, workload: Workload
) -> dict[str, float]:
    """Return the seconds of a whole step by phase, over all runs of each phase."""
    costs = _with_gathered_weights(costs, workload)
    seconds = {phase: phase_seconds(cost, rates) for phase, cost in costs.items()}
    return _of_step(seconds, workload)


def _with_gathered_weights(costs: Mapping[str, Cost], workload: Workload) -> Mapping[str, Cost]:
    """Return the costs, with a mean forward as rollout if a rollout gathers weights only once."""
    cost, forwards = costs.get("rollout"), workload.rollout_forwards
    if workload.parallel.keep_gathered is not True or cost is None or not forwards:
        return costs
    gathered = int(cost.gathered_bytes * min(1, workload.evaluations / forwards))
    return {**costs, "rollout": dataclasses.replace(cost, gathered_bytes=gathered)}


def received_in_step(costs: Mapping[str, Cost], workload: Workload) -> dict[str, float]:
    """Return the bytes that a GPU receives from others in a whole step, by field of ``Cost``."""
    costs = _with_gathered_weights(costs, workload)
    fields = ("gathered_bytes", "reduced_bytes", "exchanged_bytes")
    return {field: _sum_of_step(costs, field, workload) for field in fields}


def flops_in_step(costs: Mapping[str, Cost], workload: Workload) -> float:
    """Return the FLOPs of a GPU in a whole step."""
    return _sum_of_step(costs, "flops", workload)


def _sum_of_step(costs: Mapping[str, Cost], field: str, workload: Workload) -> float:
    once = {phase: float(getattr(cost, field)) for phase, cost in costs.items()}
    return sum(_of_step(once, workload).values())


def _of_step(values: Mapping[str, float], workload: Workload) -> dict[str, float]:
    """Return the values of single runs of the phases, times their runs in a whole step."""
    once = {phase: value for phase, value in values.items() if phase}
    if workload.sft and "sft forward" not in once:
        once |= {f"sft {phase}": once[phase] for phase in ("forward", "backward")}
    updates = 1.0 + workload.sft + workload.dpo
    simulated_updates = 1 + sum(f"{name} forward" in values for name in ("sft", "dpo"))
    times = {"rollout": workload.rollout_forwards, "optimizer": updates / simulated_updates}
    per_point = ("forward", *REWARD_PHASES, "backward")
    times |= dict.fromkeys(per_point, float(workload.evaluations))
    times |= dict.fromkeys(EARLIER_PHASES, workload.earlier_steps)
    times |= dict.fromkeys(SWAP_PHASES, workload.swaps)
    found = {phase: times.get(phase, 1.0) * value for phase, value in once.items()}
    return {
        phase: value if phase == "optimizer" else workload.gradient_accumulation_steps * value
        for phase, value in found.items()
    }


class Search:
    """Search among the candidates of one workload on one GPU within budgets in bytes.

    A host budget of None is unlimited. ``expandable`` is the allocator's setting
    ``expandable_segments``. ``show`` receives a description before each simulation.
    """

    def __init__(
        self,
        workload: Workload,
        rates: GpuSpecs,
        *,
        budget: int,
        host_budget: int | None,
        expandable: bool = True,
    ) -> None:
        self.workload, self.rates = workload, rates
        self.show: Callable[[str], object] = lambda text: None
        self.limit, self.host_budget = budget - CONTEXT, host_budget
        self.expandable = expandable
        self._seen: dict[tuple[Tier, Any, int | None], Single] = {}
        self._weights: dict[Tier, Weights] = {}
        self._base: Tier | None = None  # the tier that is simulated; others are derived from it

    def run(self, tiers: Sequence[Tier]) -> Found:
        """Return a candidate that fits, from the first tier that has one.

        Of the candidates within ``TIE`` of the fastest, it has the fewest bytes on device and host
        together, because offload that saves no time should take no host memory.
        """
        considered: list[Candidate] = []
        self._base = self._base or tiers[0]
        for index, tier in enumerate(tiers):
            last = index == len(tiers) - 1
            found, waiting = self._tier(tier, last=last), list[Candidate]()
            if self._streams(tier):
                ahead = dataclasses.replace(tier, stream_weights=AHEAD)
                waiting = self._tier(ahead, last=last)
            chosen = self._first_that_fits(found, waiting)
            considered += found
            if chosen is not None:
                run, whole = chosen
                unused = list(tiers[index + 1 :])
                return Found(whole, run, self._lost(run), True, considered, unused)
        # Nothing fits: return the candidate that exceeds the limits by the fewest bytes.
        nearest = min(considered, key=self._miss)
        run, whole = self._whole(nearest)
        considered[considered.index(nearest)] = whole
        return Found(whole, run, self._lost(run), whole.reason == CHOSEN, considered, [])

    def _first_that_fits(
        self, found: list[Candidate], waiting: list[Candidate]
    ) -> tuple[Simulation, Candidate] | None:
        """Simulate candidates, the best first, until one fits; update them in ``found``.

        ``waiting`` are those with weights in host memory. Copies shorten no step. They pay if the
        freed memory allows a faster policy, so the faster ones move to ``found``.
        """
        while True:
            left = [c for c in found if c.reason == FITS]
            resident = [c.seconds for c in left if c.memory.stream_weights is None]
            fastest = min(resident, default=math.inf)
            faster = [c for c in waiting if c.seconds < fastest]
            waiting = [c for c in waiting if c.seconds >= fastest]
            found += faster
            found.sort(key=lambda c: (c.seconds, c.memory.stream_weights or 0, c.peak))
            left = [c for c in found if c.reason == FITS]
            if not left:
                return None
            ties = [c for c in left if c.seconds <= (1 + TIE) * left[0].seconds]
            best = min(ties, key=lambda c: c.peak + c.host)
            run, whole = self._whole(best)
            found[found.index(best)] = whole
            if whole.reason == CHOSEN:
                return run, whole

    def _lost(self, run: Simulation) -> int:
        """Return the bytes that the allocator needs beside the live ones, exact to 1 % of them."""
        requests, live = requests_of(run.events), run.peak
        least = least_limit(requests, live, expandable=self.expandable, within=max(1, live // 100))
        return least - live

    def _tier(self, tier: Tier, *, last: bool) -> list[Candidate]:
        """Return the candidates of a tier, only the leanest if it does not fit."""
        lean = (MODES[-1], MODES[-1])
        whole = self._candidate(tier, *lean, None)
        if whole.peak <= self.limit:
            return self._candidates(tier)
        # Without chunks a simulation takes half the time, and often the weights alone are too much.
        if not (last or self._may_fit(tier, *lean)):
            return [whole]
        chunked = self._candidate(tier, *lean, CHUNK)
        return [chunked] if chunked.peak > self.limit else self._candidates(tier)

    def keep_gathered(self, found: Found) -> Found | None:
        """Return the result with weights gathered through rollouts, None if they do not fit.

        ``keep_gathered`` of ``self.workload`` is then True.
        """
        parallel = self.workload.parallel
        if parallel.keep_gathered != "auto" or self.workload.shard == 1 or not found.feasible:
            return None
        before, kept = self.workload, dataclasses.replace(parallel, keep_gathered=True)
        self.workload = dataclasses.replace(before, parallel=kept)
        run, whole = self._whole(found.chosen)
        if whole.reason != CHOSEN:
            self.workload = before
            return None
        others = [whole if c is found.chosen else c for c in found.candidates]
        return Found(whole, run, self._lost(run), True, others, found.unused)

    def leanest_fits(self, tier: Tier) -> bool:
        """Return True if the mode that takes the least memory fits the device."""
        self._base = self._base or tier
        if not self.holds(tier):
            return False
        ahead = dataclasses.replace(tier, stream_weights=AHEAD)
        places = [tier, ahead] if self._streams(tier) else [tier]
        lean = (MODES[-1], MODES[-1])
        return any(
            self._candidate(place, *lean, chunk).peak <= self.limit
            for chunk in (None, CHUNK)
            for place in places
        )

    def holds(self, tier: Tier) -> bool:
        """Return False if weights and states alone exceed the limits, wherever they wait."""
        found, host = self._weights_of(tier), self.host_budget
        blocks, rest = found.blocks + found.reward_blocks, found.rest + found.states
        streams = self._streams(tier) and (host is None or blocks + found.host_states <= host)
        held = host is None or found.host_states <= host
        return held and rest + (0 if streams else blocks) <= self.limit

    def _streams(self, tier: Tier) -> bool:
        """Return True if blocks can wait in host memory; a sharded block cannot."""
        trained = self.workload.train == "lora" or tier.optimizer == "adamw-cpu"
        return trained and self.workload.shard == 1

    def fewest_seconds(self, tier: Tier) -> float:
        """Return the seconds of a step that recomputes, offloads and communicates nothing.

        Without the optimizer, whose time falls with the share of the weights that a rank holds.
        """
        run = self._single(tier, MODES[0], None)
        costs = run.costs(reward=False) | run.costs(reward=True)
        costs.pop("optimizer", None)
        alone = {"gathered_bytes": 0, "reduced_bytes": 0, "exchanged_bytes": 0}
        return self._seconds({k: dataclasses.replace(c, **alone) for k, c in costs.items()})

    def _whole(self, candidate: Candidate) -> tuple[Simulation, Candidate]:
        """Simulate a candidate; return the run and the candidate with its numbers."""
        run = self._simulate(candidate.memory, candidate.reward_memory)
        reason = self._refusal(run.peak, run.host)
        if not (reason or fits(requests_of(run.events), self.limit, expandable=self.expandable)):
            reason = FRAGMENTED
        seconds = self._seconds(run.costs)
        whole = dataclasses.replace(
            candidate, peak=run.peak, host=run.host, seconds=seconds, reason=reason or CHOSEN
        )
        return run, whole

    def _candidates(self, tier: Tier) -> list[Candidate]:
        """Return the pairs of modes that may fit, and chunked ones that may be the fastest."""
        found: dict[tuple[Any, Any], Candidate] = {}
        # Pairs with none that are no faster by more than a tie, and the candidates in their place.
        slow: dict[tuple[Any, Any], list[Candidate]] = {}
        # From the leanest mode on, so that a mode is simulated only if its leaner one may fit.
        others = MODES if self.workload.rewards else MODES[-1:]
        for pair in sorted(itertools.product(reversed(MODES), reversed(others)), key=_steps):
            leaner: list[Any] = [(LEANER.get(pair[0]), pair[1]), (pair[0], LEANER.get(pair[1]))]
            leaner = [part for part in leaner if set(part) <= {*MODES}]
            if not all(p in slow or (p in found and self._may_fit(tier, *p)) for p in leaner):
                continue
            recomputed = [p for p in leaner if p.count(MODES[0]) < pair.count(MODES[0])]
            known = [c for p in recomputed for c in slow.get(p) or [found[p]]]
            if recomputed and not self._may_gain(tier, pair, known):
                slow[pair] = known
                continue
            found[pair] = self._candidate(tier, pair[0], pair[1], None)
        fits = min((c.seconds for c in found.values() if c.reason == FITS), default=math.inf)
        chunked = []
        # Chunks add work and do not change the bytes that checkpointed blocks save, on device and
        # host, so most pairs with chunks need no simulation.
        for pair, whole in sorted(found.items(), key=lambda item: item[1].seconds):
            if (1 + TIE) * whole.seconds >= fits or whole.peak <= self.limit:
                continue
            if fits < math.inf and self.host_budget is not None and whole.host > self.host_budget:
                continue
            if ("none", None) not in pair and self._may_fit(tier, *pair):
                chunked.append(self._candidate(tier, *pair, CHUNK))
                if chunked[-1].reason == FITS:
                    fits = min(fits, chunked[-1].seconds)
        return [*found.values(), *chunked]

    def _may_gain(self, tier: Tier, pair: tuple[Any, Any], known: Sequence[Candidate]) -> bool:
        """Return True if a pair with none may beat by more than a tie those that it replaces.

        ``known`` recompute more, in as many bytes at most: where none of them fits, none does not.
        """
        costs: dict[str, Cost] = {}
        for mode, reward in zip(pair, (False, True), strict=True):
            own = self._single(tier, LEANER[mode] if mode == MODES[0] else mode, None)
            part = own.costs(reward=reward)
            costs |= without_recomputation(part) if mode == MODES[0] else part
        least = (1 + TIE) * self._seconds(costs)
        return any(c.reason == FITS and c.seconds > least for c in known)

    def _may_fit(self, tier: Tier, generator: Any, reward: Any) -> bool:
        """Return False if the live bytes between forwards and backwards exceed the limit."""
        ours, theirs = (self._single(tier, mode, None) for mode in (generator, reward))
        theirs = theirs if self.workload.rewards else ours
        kept = weighted_sum((1, start_of(ours, theirs)), (1, theirs.kept_by_reward()))
        return max(sum(kept.values()), ours.kept_by_pair()) <= self.limit

    def _candidate(self, tier: Tier, generator: Any, reward: Any, chunk: int | None) -> Candidate:
        reward = reward if self.workload.rewards else generator
        ours, theirs = self._single(tier, generator, chunk), self._single(tier, reward, chunk)
        start = start_of(ours, theirs)
        moments: list[Bytes] = [*ours.moments()]
        moments += [weighted_sum((1, start), (1, added)) for added in theirs.added_by_reward()]
        costs = ours.costs(reward=False) | theirs.costs(reward=True)
        peak = int(max(sum(moment.values()) for moment in moments))
        # The very last block stays on the device, because the backward begins with it, unless an
        # offloaded reward model runs next.
        host = ours.host(last=theirs.window["checkpoints"] > 0)
        host += theirs.host_of_reward() + ours.other_host()
        return Candidate(
            *memory_of(tier, generator, reward, chunk),
            peak,
            int(host),
            self._seconds(costs),
            self._refusal(peak, int(host)) or FITS,
        )

    def _single(self, tier: Tier, mode: Any, chunk: int | None) -> Single:
        key = (tier, mode, chunk)
        if key not in self._seen:
            work = self.workload
            resident = dataclasses.replace(tier, stream_weights=None)
            if tier != resident:
                run = self._single(resident, mode, chunk).run
                run = streamed(run, self._weights_of(tier), full=work.train == "full")
            elif self._base not in (None, tier):
                run = self._single(self._base, mode, chunk).run
                run = exchanged(run, self._weights_of(self._base), self._weights_of(tier))
            elif mode[1] is not None:
                run = self._single(tier, (mode[0], None), chunk).run
                run = offloaded(run, work.blocks, work.reward_models)
            else:
                run = self._simulate(*memory_of(tier, mode, mode, chunk))
            self._seen[key] = Single(run, work.blocks)
        return self._seen[key]

    def _weights_of(self, tier: Tier) -> Weights:
        resident = dataclasses.replace(tier, stream_weights=None)
        if resident not in self._weights:
            memory = memory_of(resident, MODES[-1], MODES[-1], None)
            found = count_weights(self.workload, *memory)
            share = {k: v // self.workload.shard for k, v in dataclasses.asdict(found).items()}
            self._weights[resident] = Weights(**share)
        return self._weights[resident]

    def _simulate(self, memory: MemoryConfig, reward_memory: MemoryConfig) -> Simulation:
        mode = "+".join(filter(None, (memory.activation_checkpointing, memory.offload)))
        self.show(f"{memory.weight_dtype}, {memory.optimizer}, {mode}")
        # A supervised step repeats the generator's phases beside less memory: it is never the peak,
        # unlike the step of ``dpo``, which keeps two forwards.
        short = dataclasses.replace(self.workload, sft=False)
        return simulate(short, memory, reward_memory)

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


def _steps(pair: tuple[Any, Any]) -> int:
    """Return the number of steps from the modes of a pair to their leanest ones."""
    return sum((LEANER.get(mode) is not None) + (mode == MODES[0]) for mode in pair)


def memory_of(
    tier: Tier, generator: Any, reward: Any, chunk: int | None
) -> tuple[MemoryConfig, MemoryConfig]:
    """Return the configs of generator and reward; both are given as (checkpointing, offload)."""
    shared = {"feed_forward_chunk": chunk, "stream_weights": tier.stream_weights}
    configs = []
    for (mode, offload), optimizer in ((generator, tier.optimizer), (reward, "adamw")):
        options: dict[str, Any] = {"offload": offload, "optimizer": optimizer, **shared}
        configs.append(MemoryConfig(tier.weight_dtype, mode, **options))
    return configs[0], configs[1]
