"""Run one PRFL step under a memory policy, or predict it on fake tensors at any size."""

import gc
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Context, Preset, UnavailableError
from torch import nn

import prfl_fast
from prfl_fast import PRFL, FlowUniPC, GradientPlan, MemoryConfig
from prfl_fast.memory import make_optimizer
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.quantized import QuantizedLinear
from prfl_fast.models import find_adapter
from prfl_fast.planning import Workload
from prfl_fast.planning.built_models import build, materialize
from prfl_fast.planning.costs import Cost
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.trace import Simulation
from prfl_fast.training.oom import is_out_of_memory

REWARD_BLOCKS = 8
# From where bytes are affine in the depth: two blocks are at work at a time, and offloading keeps
# two on the device.
DEPTHS = {False: (2, 3), True: (3, 4)}
INDEX = 1  # one rollout forward, one with gradient
# What a policy changes: the rollout before is the same under all.
REWARD_PHASES = ("reward", "reward backward")
TRAINING_PHASES = ("forward", *REWARD_PHASES, "backward")


@dataclass(frozen=True)
class Case:
    """Hold sizes, memory policies and trained parameters of a step.

    Attributes:
        preset: sizes; its latent gives the video.
        memory, reward_memory: policies of generator and reward; the reward's is the generator's
            unless given.
        patched: on prfl_fast's kernels; otherwise diffusers' own blocks and, for policy ``full``,
            its own checkpointing.
        train: ``lora`` or ``full``.
    """

    preset: Preset
    memory: MemoryConfig
    patched: bool = True
    train: str = "lora"
    reward_memory: MemoryConfig | None = None

    @property
    def memories(self) -> tuple[MemoryConfig, MemoryConfig]:
        return self.memory, self.reward_memory or self.memory

    def workload(self) -> Workload:
        """Return the simulated workload; the reward has at most half of the blocks."""
        preset = self.preset
        frames, height, width = preset.latent
        return Workload(
            preset.config,
            frames=4 * (frames - 1) + 1,
            height=8 * height,
            width=8 * width,
            text_tokens=preset.text_tokens,
            train=self.train,
            reward_blocks=min(REWARD_BLOCKS, max(1, preset.layers // 2)),
            sft=False,
            patched=self.patched,
        )


def uniform(
    policy: str, offload: str | None = None, weights: str = "bf16", **rest: Any
) -> MemoryConfig:
    """Return the policy that generator and reward share."""
    return MemoryConfig(weights, policy, offload, **rest)


def predict(case: Case) -> dict[str, Any]:
    """Return bytes at the peak and in host memory, and FLOPs of the training phases.

    Deep models are simulated at two small depths, as the planner does: bytes and work of a phase
    are affine in the depth.
    """
    workload = case.workload()
    layers, reward_layers = case.preset.layers, workload.reward_models[0]
    depths = DEPTHS["cpu" in (memory.offload for memory in case.memories)]
    if layers <= max(depths):
        return _record(simulate(workload, *case.memories))
    runs = [simulate(workload, *case.memories, layers=d, reward_layers=d) for d in depths]
    highest = _highest(runs, depths, layers, reward_layers)
    costs = {}
    for phase in TRAINING_PHASES:
        depth = reward_layers if phase in REWARD_PHASES else layers
        few, more = (vars(run.costs[phase]) for run in runs)
        costs[phase] = Cost(**at_depth(few, more, depths, depth))
    host = sum(costs[phase].to_host_bytes for phase in ("forward", "reward"))
    return _record(Simulation(sum(highest.values()), "", highest, host, [], costs))


def at_depth(
    few: Mapping[str, int], more: Mapping[str, int], depths: tuple[int, int], at: Any
) -> dict[str, int]:
    """Extrapolate values at two depths linearly: to one depth, or each to its own."""
    first, second = depths
    to = at if isinstance(at, Mapping) else dict.fromkeys(few, at)
    return {k: few[k] + (more[k] - few[k]) * (to[k] - first) // (second - first) for k in few}


def _highest(
    runs: list[Simulation], depths: tuple[int, int], layers: int, reward_layers: int
) -> dict[str, int]:
    """Return bytes by category at the highest moment of all phases.

    Of a generator's phase, only the reward model's weights depend on the reward's depth; of a
    reward phase, all that it adds to its start.
    """
    highs: list[dict[str, dict[str, int]]] = [{} for _ in runs]
    starts = []
    for run, high in zip(runs, highs, strict=True):
        for phase, live in run.timeline:
            if phase not in high or sum(live.values()) > sum(high[phase].values()):
                high[phase] = live
        starts.append(next(live for phase, live in run.timeline if phase == REWARD_PHASES[0]))
    categories = starts[0].keys()
    generator = {name: reward_layers if name == "reward" else layers for name in categories}
    start = at_depth(*starts, depths, generator)
    moments = []
    for phase in highs[0]:
        few, more = (high[phase] for high in highs)
        if phase in REWARD_PHASES:
            few, more = (
                {name: live[name] - begun[name] for name in categories}
                for live, begun in zip((few, more), starts, strict=True)
            )
            added = at_depth(few, more, depths, reward_layers)
            moments.append({name: start[name] + added[name] for name in categories})
        else:
            moments.append(at_depth(few, more, depths, generator))
    return max(moments, key=lambda moment: sum(moment.values()))


def _record(run: Simulation) -> dict[str, Any]:
    costs = [run.costs[phase] for phase in TRAINING_PHASES]
    return {
        "peak_bytes": run.peak,
        "categories": run.categories,
        "host_bytes": run.host,
        "flops": sum(cost.flops for cost in costs),
    }


class MeasuredStep:
    """Hold both models of a case on a device, with random weights, and the inputs of a PRFL step.

    Models are made without values and get them on the device tensor by tensor, so that the device
    never holds more than the finished models.

    Raises:
        UnavailableError: a package that the case needs is missing.
    """

    def __init__(self, case: Case, context: Context) -> None:
        try:
            self.generator, (reward,) = build(case.workload(), *case.memories)
        except ImportError as error:
            raise UnavailableError(str(error)) from error
        torch.manual_seed(context.seed)
        for model in (self.generator, reward):
            with torch.device(context.device):
                materialize(model)
            _fill(model)
        if case.patched:
            prfl_fast.patch(self.generator)
            prfl_fast.patch(reward.backbone)
        elif case.memory.activation_checkpointing == "full":
            for model in (self.generator, reward.backbone):
                model.enable_gradient_checkpointing()
        self.adapter = find_adapter(self.generator)
        self.parameters = [p for p in self.generator.parameters() if p.requires_grad]
        plan = GradientPlan.prfl()
        self._prfl = PRFL(self.generator, reward, FlowUniPC(), plan, num_inference_steps=40)
        kind, dtype = case.memory.optimizer, case.memory.gradient_dtype
        self._optimizer = make_optimizer(
            kind, self.parameters, learning_rate=5e-6, gradient_dtype=dtype
        )
        text = (1, case.preset.text_tokens, case.preset.text_dim)
        options = {"generator": context.generator(1), "device": context.device}
        self.conditions = {"encoder_hidden_states": torch.randn(text, **options)}
        self.noise = torch.randn((1, 16, *case.preset.latent), **options)

    def feedback(self, noise: torch.Tensor | None = None) -> None:
        """Run rollout, gradient step, reward and backward; drop earlier gradients first."""
        self._optimizer.zero_grad(set_to_none=True)
        latents = self.noise if noise is None else noise
        self._prfl(latents, self.conditions, indices=(INDEX,))

    def step(self, noise: torch.Tensor | None = None) -> None:
        self.feedback(noise)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def kept(self) -> tuple[int, int]:
        """Return bytes on device and host between the generator's forward and backward."""
        timestep = torch.full((1,), 500.0, device=self.noise.device)
        with Ledger(open_operations=True) as ledger:
            v = self.adapter.velocity(self.generator, self.noise, timestep, self.conditions)
            kept = ledger.live - v.untyped_storage().nbytes(), ledger.host
        del v
        return kept


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Draw random weights that keep activations finite."""
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            if tensor.ndim > 1:
                tensor.normal_(0, 0.02)
            else:
                tensor.fill_(float(name != "bias"))
        if isinstance(module, QuantizedLinear):
            sizes, options = (module.in_features, module.out_features), {"dtype": torch.bfloat16}
            wide = nn.Linear(*sizes, bias=False, device=module.qweight.device, **options)
            module.qweight.copy_(QuantizedLinear(wide, module.kind).qweight)


def run_capped(case: Case, context: Context, budget: int) -> dict[str, Any]:
    """Run a CUDA step with the process capped at ``budget`` bytes of device memory.

    A short video first compiles the kernels and makes the optimizer's states.

    Raises:
        UnavailableError: out of memory.
    """
    device = context.device
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)  # the context and libraries
    torch.cuda.set_per_process_memory_fraction(min(1.0, (budget - outside) / total), device)
    try:
        step = MeasuredStep(case, context)
        step.step(step.noise[:, :, :5])
        record = cuda_step(step, device)
        record["outside_bytes"] = outside
        return record
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UnavailableError("out of memory") from error
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        release()


def cuda_step(step: MeasuredStep, device: torch.device, runs: int = 1) -> dict[str, Any]:
    """Measure the allocator's peaks and the seconds of ``runs`` steps."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(runs):
        harness.synchronize(device)
        start = time.perf_counter()
        step.step()
        harness.synchronize(device)
        times.append(time.perf_counter() - start)
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "times": harness.Timing.of(times).record(),
    }


def release() -> None:
    """Free cached device memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
