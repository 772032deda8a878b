"""One PRFL training step on tensors that have sizes and no values: its bytes and its work.

The step is run by the code that trains: the patched model, its checkpointing and offload, the
solver, the frozen reward, backward, optimizer, and the supervised step it alternates with. Weights,
activations and gradients are fake (``FakeTensorMode``), so a 14B model at 720p takes seconds and no
memory; a ledger sees every storage come and go.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from prfl_fast._extras import need
from prfl_fast.adapters import find_adapter
from prfl_fast.config import Lora, Memory
from prfl_fast.costs import CUBLAS_BYTES, Cost, CostLedger
from prfl_fast.kernels import flow_loss
from prfl_fast.ledger import HOST, Ledger, mark
from prfl_fast.memory import apply_memory
from prfl_fast.modules import TEXT_TOKENS, QueryAttentionPool, RewardHead
from prfl_fast.optimizers import state_bytes
from prfl_fast.patching import patch
from prfl_fast.reward import LatentRewardModel
from prfl_fast.schedulers import FlowUniPC, detach_state
from prfl_fast.step import TIMESTEPS_PER_SIGMA
from prfl_fast.trainer import add_lora, autocast

PHASES = (
    "rollout",
    "forward",
    "reward",
    "reward backward",
    "backward",
    "optimizer",
    "sft forward",
    "sft backward",
)
# Wan's VAE (8 pixels, 4 frames but for the first) and the transformer's patches.
_VAE_STRIDE, _VAE_FRAMES, _LATENT_CHANNELS, _IMAGE_TOKENS = 8, 4, 16, 257
# Float32 copies of the largest bfloat16 parameter's gradient or moments at once in an optimizer's
# step. Of torchao's, whose compiled step holds some of them in registers, at most.
_WIDE_COPIES = {"adamw": 1, "adamw-sr": 1, "adamw8bit": 2, "paged-adamw8bit": 0, "adamw-cpu": 0}


@dataclass(frozen=True)
class Workload:
    """What is trained, on what sizes.

    Attributes:
        config: of a diffusers Wan transformer, as ``adapter.backbone_config`` gives it.
        frames, height, width: of the videos, in pixels; frames is one more than a multiple of 4.
        batch: samples of a forward. text_tokens: rows of the text states.
        train: ``lora``, or ``full`` for all parameters. lora_rank, lora_targets: as ``add_lora``.
        reward_blocks: of the generator's, in the frozen reward model.
        sft: the supervised step is part of a step.
        num_steps: solver steps of the schedule.
        points: gradient points of a trajectory. accumulation: micro-batches of an optimizer step.
            More than one of either, and gradients are there while the next forward runs.
        patched: both models run on prfl_fast's kernels.
        precision: under which float32 weights run: autocast to ``bf16``, or ``fp32``.

    Raises:
        ValueError: names the argument, what came, and what is expected.
    """

    config: Mapping[str, Any]
    frames: int = 81
    height: int = 720
    width: int = 1280
    batch: int = 1
    text_tokens: int = 512
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = 16
    lora_targets: tuple[str, ...] = Lora(1).targets
    reward_blocks: int = 8
    sft: bool = True
    num_steps: int = 40
    points: int = 1
    accumulation: int = 1
    patched: bool = True
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        least = {"num_steps": 2}
        for name in (
            "frames",
            "height",
            "width",
            "batch",
            "text_tokens",
            "lora_rank",
            "reward_blocks",
            "num_steps",
            "points",
            "accumulation",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 1):
                raise ValueError(
                    f"{name} is {value!r}, expected a whole number, at least {least.get(name, 1)}"
                )
        if self.frames % _VAE_FRAMES != 1:
            raise ValueError(f"frames is {self.frames}, expected 4n + 1, as 81")
        for name, patch_size in zip(("height", "width"), self._patch[1:], strict=True):
            multiple = _VAE_STRIDE * patch_size
            if getattr(self, name) % multiple:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected a multiple of {multiple}"
                )
        longest = self.config.get("rope_max_seq_len", 1024)
        for name, size, patch_size in zip(
            ("frames", "height", "width"), self.latent_shape[2:], self._patch, strict=True
        ):
            if size // patch_size > longest:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: {size // patch_size} positions, expected at "
                    f"most {longest} (the model's rope_max_seq_len)"
                )
        for name, known in (("train", ("lora", "full")), ("precision", ("fp32", "bf16"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}"
                )
        if self.reward_blocks > self.config["num_layers"]:
            raise ValueError(
                f"reward_blocks is {self.reward_blocks}, expected at most the model's "
                f"{self.config['num_layers']}"
            )
        if self.points > self.num_steps - 1:
            raise ValueError(
                f"points is {self.points}, expected at most num_steps - 1 = {self.num_steps - 1}"
            )
        if self.config.get("image_dim") is not None and self.text_tokens != TEXT_TOKENS:
            raise ValueError(
                f"text_tokens is {self.text_tokens}, expected {TEXT_TOKENS}: this is an "
                "image-to-video model"
            )

    @property
    def _patch(self) -> tuple[int, int, int]:
        frames, height, width = self.config.get("patch_size", (1, 2, 2))
        return frames, height, width

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """``[B, C, F, H, W]`` of the latents."""
        return (
            self.batch,
            _LATENT_CHANNELS,
            (self.frames - 1) // _VAE_FRAMES + 1,
            self.height // _VAE_STRIDE,
            self.width // _VAE_STRIDE,
        )

    @property
    def tokens(self) -> int:
        """L, of one sample."""
        return math.prod(self.latent_shape[2:]) // math.prod(self._patch)


@dataclass(frozen=True)
class Simulation:
    """What one step holds and does.

    Attributes:
        peak: most bytes alive on the device; peak_phase: when. categories: bytes by category then.
        host: most bytes alive in host buffers.
        timeline: (phase, live bytes by category), in order of time.
        costs: by phase. ``rollout`` is one forward without gradient; ``forward``, ``reward``,
            ``reward backward`` and ``backward`` are of one gradient point, ``sft …`` of one
            micro-batch, ``optimizer`` of one optimizer step (there is one for each objective).
    """

    peak: int
    peak_phase: str
    categories: dict[str, int]
    host: int
    timeline: list[tuple[str, dict[str, int]]]
    costs: dict[str, Cost] = field(repr=False)


def build(
    workload: Workload,
    memory: Memory,
    *,
    layers: int | None = None,
    reward_layers: int | None = None,
) -> tuple[nn.Module, LatentRewardModel]:
    """Generator and frozen reward model of a workload on the ``meta`` device, not patched yet.

    Raises:
        MissingExtra: diffusers is missing, or peft for ``lora``, or what the weights need.
        ValueError: the configuration does not fit the class.
    """
    config = {k: v for k, v in workload.config.items() if not k.startswith("_")}
    cls = need("diffusers").WanTransformer3DModel
    depth = config["num_layers"] if layers is None else layers
    reward_depth = workload.reward_blocks if reward_layers is None else reward_layers
    with torch.device("meta"):
        generator = cls(**{**config, "num_layers": depth}).train()
        adapter = find_adapter(generator)
        backbone = adapter.backbone_from_config({**config, "num_layers": reward_depth})
        dim = adapter.hidden_size(backbone)
        reward = LatentRewardModel(backbone, QueryAttentionPool(dim), RewardHead(dim)).freeze()
    apply_memory(generator, reward, memory)
    if workload.train == "lora":
        add_lora(generator, workload.lora_rank, targets=workload.lora_targets)
    return generator, reward


def materialise(model: nn.Module) -> None:
    """Replace what lies on ``meta`` by zeros: fake ones under a ``FakeTensorMode``."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(zeros, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


class Step:
    """The phases of one step, with fake tensors or real ones, under a ledger that is in force.

    Args:
        generator, reward: of :func:`build`, materialised and patched.
    """

    def __init__(
        self,
        workload: Workload,
        memory: Memory,
        generator: nn.Module,
        reward: LatentRewardModel,
        ledger: Ledger,
    ) -> None:
        self.workload, self.memory, self.ledger = workload, memory, ledger
        self.generator, self.reward = generator, reward
        self.adapter = find_adapter(generator)
        self.parameters = [p for p in generator.parameters() if p.requires_grad]
        for parameter in (*generator.parameters(), *generator.buffers()):
            ledger.mark(parameter, "weights")
        for parameter in (*reward.parameters(), *reward.buffers()):
            ledger.mark(parameter, "reward")
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(_mark_gradient)
            if memory.gradients == "fp32" and parameter.dtype == torch.bfloat16:
                parameter.grad_dtype = torch.float32
        sizes = [state_bytes(memory.optimizer, p.shape, p.dtype) for p in self.parameters]
        self.states = [
            self._make(sum(column), category=category, dtype=torch.uint8)
            for column, category in zip(zip(*sizes, strict=True), ("optimizer", HOST), strict=True)
        ]
        self.conditions = self._conditions()
        with unset_fake_temporarily():
            self.scheduler = FlowUniPC()
            self.scheduler.set_timesteps(workload.num_steps)
            self.times = [float(t) for t in self.scheduler.timesteps.tolist()]

    def _make(
        self, *shape: int, category: str = "rollout", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        tensor = torch.zeros(shape, dtype=dtype)
        self.ledger.mark(tensor, category)
        return tensor

    def _conditions(self) -> dict[str, torch.Tensor]:
        config, batch = self.workload.config, self.workload.batch
        text = self._make(batch, self.workload.text_tokens, config.get("text_dim", 4096))
        conditions = {"encoder_hidden_states": text}
        if config.get("image_dim") is not None:
            image = self._make(batch, _IMAGE_TOKENS, config["image_dim"])
            conditions["encoder_hidden_states_image"] = image
        extra = config.get("in_channels", _LATENT_CHANNELS) - _LATENT_CHANNELS
        if extra:
            shape = self.workload.latent_shape
            conditions["latent_condition"] = self._make(batch, extra, *shape[2:])
        return conditions

    def _precision(self, weights: str) -> contextlib.AbstractContextManager[Any]:
        kind = self.workload.precision if weights == "fp32" else "fp32"
        return autocast(torch.device("cpu"), kind)

    def _velocity(self, x: torch.Tensor, time: float) -> torch.Tensor:
        timestep = torch.full((len(x),), time)
        with self._precision(self.memory.weights):
            return self.adapter.velocity(self.generator, x, timestep, self.conditions)

    def run(self) -> None:
        """Reward feedback, optimizer, and the same for the supervised loss if it is trained."""
        several = max(self.workload.points, self.workload.accumulation) > 1
        self._feedback(several)
        self._update()
        if self.workload.sft:
            self._supervised(self.workload.accumulation > 1)
            self._update()

    def _hold_gradients(self) -> None:
        """Those of earlier points and micro-batches."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
            self.ledger.mark(parameter.grad, "gradients")

    def _feedback(self, several: bool) -> None:
        self.ledger.phase("rollout")
        if several:
            self._hold_gradients()
        noise = x = self._make(*self.workload.latent_shape)
        with torch.no_grad():
            # The solver's history is full after its order; one forward stands for all.
            v = self._velocity(x, self.times[0])
            for time in self.times[: min(2, len(self.times) - 2)]:
                (x,) = self.scheduler.step(v, time, x)
                detach_state(self.scheduler)
            del v
        self.ledger.phase("forward")
        time, after = self.times[self.scheduler.step_index or 0 :][:2]
        with self.ledger.saving():
            (x,) = self.scheduler.step(self._velocity(x, time), time, x)
        self.ledger.phase("reward")
        with self.ledger.saving(), self._precision(self.memory.reward_weights):
            score = self.reward(x, torch.full((len(x),), after), self.conditions)
        # The gradient has reached the latents: what follows is the generator's backward.
        x.register_hook(lambda grad: self.ledger.phase("backward"))
        x = x.detach()
        detach_state(self.scheduler)
        self.ledger.phase("reward backward")
        loss = 0.1 * torch.relu(2.0 - score.float()).mean()
        (loss * 1.0).backward()
        del noise

    def _supervised(self, several: bool) -> None:
        self.ledger.phase("sft forward")
        if several:
            self._hold_gradients()
        clean, noise = (self._make(*self.workload.latent_shape) for _ in range(2))
        level = torch.full((len(clean), 1, 1, 1, 1), 0.5)
        x = (1 - level) * clean + level * noise
        with self.ledger.saving():
            v = self._velocity(x, TIMESTEPS_PER_SIGMA * 0.5)
            loss = flow_loss(v, noise, clean)
            del v, x
        self.ledger.phase("sft backward")
        (loss * 1.0).backward()

    def _update(self) -> None:
        """The optimizer's step by formula: its kernels are one a parameter."""
        self.ledger.phase("optimizer")
        kind, (device, host) = self.memory.optimizer, (t.nbytes for t in self.states)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        read, weights = (sum(t.nbytes for t in ts) for ts in (gradients, self.parameters))
        if kind == "adamw-cpu":
            size = max(max(p.nbytes, g.nbytes) for p, g in zip(self.parameters, gradients))
            staging = self._make(2 * size, category=HOST, dtype=torch.uint8)
        largest = max(p.numel() for p in self.parameters)
        narrow = any(g.dtype == torch.bfloat16 for g in gradients)
        self.ledger.add_transient(_WIDE_COPIES[kind] * 4 * largest * narrow)
        if isinstance(self.ledger, CostLedger):
            moved = 3 * read  # norm, and clipping in place
            if kind == "adamw-cpu":
                self.ledger.count(to_host_bytes=read, to_device_bytes=weights)
            elif kind == "paged-adamw8bit":
                self.ledger.count(to_host_bytes=host, to_device_bytes=host)
            if kind != "adamw-cpu":
                moved += read + 2 * weights + 2 * device
            self.ledger.count(moved_bytes=moved)
        for parameter in self.parameters:
            parameter.grad = None


def _mark_gradient(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        mark(parameter.grad, "gradients")


@contextlib.contextmanager
def fake_models(
    workload: Workload, memory: Memory, layers: int | None, reward_layers: int | None
) -> Iterator[tuple[nn.Module, LatentRewardModel]]:
    """Both models as fake tensors, in a ``FakeTensorMode`` that is in force."""
    generator, reward = build(workload, memory, layers=layers, reward_layers=reward_layers)
    with FakeTensorMode():
        for model in (generator, reward):
            materialise(model)
        if workload.patched:
            patch(generator)
            patch(reward.backbone)
        yield generator, reward


def simulate(
    workload: Workload,
    memory: Memory,
    *,
    layers: int | None = None,
    reward_layers: int | None = None,
) -> Simulation:
    """Run one step of a workload under a memory policy on fake tensors, on any machine.

    Args:
        layers, reward_layers: other depths than the workload's: bytes and work are affine in them
            from a depth of 3 on.

    Returns:
        Bytes are those of storages, to the byte, plus what CUDA kernels allocate inside themselves
        by a formula; the allocator's rounding and fragmentation and CUDA's own context come on top.

    Raises:
        MissingExtra: diffusers is missing, or what the policy needs.
        ValueError: the policy does not go with the workload.
    """
    with fake_models(workload, memory, layers, reward_layers) as (generator, reward):
        with CostLedger() as ledger:
            cublas = torch.empty(CUBLAS_BYTES, dtype=torch.uint8)
            step = Step(workload, memory, generator, reward, ledger)
            step.run()
        del cublas, step
    return Simulation(
        ledger.peak,
        ledger.peak_phase,
        ledger.peak_categories,
        ledger.host_peak,
        [point for point in ledger.timeline if point[0]],
        ledger.costs(),
    )
