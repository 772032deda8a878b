"""Result of the planner: two memory policies with their prediction."""

import math
from dataclasses import dataclass, field

from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.gpu_specs import GpuSpecs
from prfl_fast.planning.search import CONTEXT, Candidate
from prfl_fast.planning.workload import Workload


@dataclass(frozen=True)
class Plan:
    """Hold the memory policies of both models with their prediction.

    If nothing fits, these are the policies that exceed the budget by the fewest bytes. One step has
    ``workload.gradient_accumulation_steps`` trajectories with their gradient points, as many
    supervised batches if ``workload.sft`` and batches of pairs if ``workload.dpo``, and an
    optimizer step after each kind.

    Attributes:
        memory, reward_memory: policies of the trained model and of the frozen reward model.
        feasible: True if peak, fragmentation and CUDA context fit the budget, and ``host`` the host
            budget.
        peak, peak_phase, categories: device bytes at the peak, its phase, and bytes by category.
        fragmentation: bytes that the allocator needs beside the peak, exact to 1 % of the peak; see
            :mod:`prfl_fast.planning.allocator`.
        expandable_segments: the setting of the allocator that the plan assumes.
        host: peak bytes of offloaded tensors and optimizer states in host memory.
        seconds: predicted seconds of a whole step by phase.
        received: bytes that a GPU receives from the others in a whole step: gathered weights, sums
            of gradients, exchanged heads and tokens; all 0 for one GPU.
        timeline: (phase, device bytes by category) through one step, with one rollout forward.
        candidates: policies that were considered, by weight dtype and optimizer, fastest first.
        notes: remarks on policies that were not considered.
        workload, gpu, budget, host_budget: the planner's inputs; budgets in bytes.
    """

    memory: MemoryConfig
    reward_memory: MemoryConfig
    feasible: bool
    peak: int
    peak_phase: str
    categories: dict[str, int]
    fragmentation: int
    expandable_segments: bool
    host: int
    seconds: dict[str, float]
    received: dict[str, float]
    timeline: list[tuple[str, dict[str, int]]] = field(repr=False)
    candidates: list[Candidate]
    notes: list[str]
    workload: Workload
    gpu: GpuSpecs
    budget: int
    host_budget: int | None

    @property
    def reserve(self) -> int:
        """Bytes of the budget that the CUDA context and fragmentation take."""
        # The bisection finds a size that suffices, perhaps above a budget that suffices too.
        room = self.budget - self.peak if self.feasible else math.inf
        return int(min(CONTEXT + self.fragmentation, room))

    @property
    def missing(self) -> int:
        """Bytes by which the peak exceeds the budget; 0 if the plan fits."""
        return max(0, self.peak + self.reserve - self.budget)

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a whole step."""
        return sum(self.seconds.values())

    def smaller(self, memory: MemoryConfig, reward_memory: MemoryConfig) -> Candidate | None:
        """Return the fastest candidate that fits the host and has a lower peak, or None."""
        given = (memory, reward_memory)
        now = next((c for c in self.candidates if (c.memory, c.reward_memory) == given), None)
        if now is None:  # the planner did not consider these policies
            return None
        room = math.inf if self.host_budget is None else self.host_budget
        return next((c for c in self.candidates if c.peak < now.peak and c.host <= room), None)
