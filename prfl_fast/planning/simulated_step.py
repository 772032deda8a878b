"""One training step on fake or real tensors, phase by phase, under a ledger."""

import contextlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from prfl_fast.kernels import flow_loss
from prfl_fast.memory.experts import host_bytes, moved_tensors
from prfl_fast.memory.ledger import HOST, Ledger, mark
from prfl_fast.memory.optimizers import state_bytes, step_bytes
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.memory.stream import BlockWeights, waiting_weights
from prfl_fast.models.adapter import FIRST_FRAME, generated_frames
from prfl_fast.models.conditions import OF_PROMPT
from prfl_fast.models.family_adapter import FamilyAdapter
from prfl_fast.models.registry import find_adapter
from prfl_fast.models.velocity import ModelCall, Precision, autocast, values_checked
from prfl_fast.planning.built_models import transformer_of
from prfl_fast.planning.costs import CostLedger
from prfl_fast.planning.presets import adapter_of
from prfl_fast.planning.simulated_feedback import run_feedback
from prfl_fast.planning.trace import TraceLedger
from prfl_fast.planning.workload import IMAGE_TOKENS, Workload
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.training.noising import TIMESTEPS_PER_SIGMA
from prfl_fast.training.objectives import RewardCall
from prfl_fast.training.preferences import dpo_margin, mean_loss
from prfl_fast.training.reward_losses import bt_loss, ce_loss
from prfl_fast.utils.modules import unwrap
from prfl_fast.utils.sharded import is_dtensor, local_part

PHASES = (
    "rollout",
    "forward",
    "reward",
    "reward backward",
    "backward",
    "optimizer",
    "sft forward",
    "sft backward",
    "dpo reference",
    "dpo forward",
    "dpo backward",
)
SWAP_PHASES = ("swap out", "swap in")  # of two experts; the copies are queued on one stream


class PairCall(ModelCall):
    """Call a model on a video of a pair, in phase ``dpo forward`` if it keeps a graph."""

    def __init__(self, model: nn.Module, precision: Precision, ledger: Ledger) -> None:
        super().__init__(model, precision)
        self.ledger = ledger

    def __call__(self, *inputs: Any) -> torch.Tensor:
        phase = "dpo forward" if torch.is_grad_enabled() else "dpo reference"
        if phase != self.ledger.phase:
            self.ledger.start_phase(phase)
        return super().__call__(*inputs)


class SimulatedStep:
    """Phases of one step, on fake or real tensors, under an active ledger."""

    def __init__(
        self,
        workload: Workload,
        memory: MemoryConfig,
        reward_memory: MemoryConfig,
        trained: nn.Module,
        rewards: Sequence[LatentRewardModel],
        ledger: Ledger,
        mesh: DeviceMesh | None = None,
        reference: nn.Module | None = None,
    ) -> None:
        self.workload, self.ledger, self.mesh = workload, ledger, mesh
        self.memory, self.reward_memory = memory, reward_memory
        self.model: Any = trained
        self.rewards = rewards
        self.generator, self.reference = transformer_of(trained), reference
        self.adapter = find_adapter(self.generator)
        named = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        unreached = adapter_of(workload.config).unreached
        self.updated = [p for n, p in named if not re.search(unreached, n)]
        self.waiting: set[int] = set()  # parameters in host memory
        self._mark_weights(trained, waiting_weights(self.generator), "weights")
        for reward in rewards:
            self._mark_weights(reward, waiting_weights(reward.backbone), "reward")
        if reference is not None:
            self._mark_weights(reference, [], "reference")
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(_mark_gradient)
            if memory.gradient_dtype == "fp32" and parameter.dtype == torch.bfloat16:
                parameter.grad_dtype = torch.float32
        self.trained = 2 if workload.experts and workload.expert == "both" else 1
        self.device_states, self.host_states = self._states()
        if workload.ema:
            self.ema = [
                self._make(self.trained * local_part(p).numel(), category="optimizer", owner=p)
                for p in self.parameters
            ]
        self.moved: list[torch.Tensor] = []
        if workload.experts:
            self._other_expert()
        self.conditions = self._conditions()
        self.guidance = self._guidance()

    def _mark_weights(self, model: nn.Module, waiting: list[BlockWeights], category: str) -> None:
        for block in waiting:
            first, *_ = parameters = block.parameters()
            self.waiting.update(map(id, parameters))
            with self._at(first):
                self.ledger.mark(block.host, HOST)
        for slot in waiting[0].slots.order if waiting else ():
            self.ledger.mark(slot.memory, "weights")
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in self.waiting:
                self.ledger.mark(tensor, category)

    def _make(
        self,
        *shape: int,
        category: str = "rollout",
        dtype: torch.dtype = torch.float32,
        owner: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return zeros that count in a category, in the block of the parameter ``owner``."""
        with self._at(owner):
            tensor = torch.zeros(shape, dtype=dtype)
            self.ledger.mark(tensor, category)
        return tensor

    def _at(self, parameter: torch.Tensor | None) -> contextlib.AbstractContextManager[Any]:
        if parameter is None or not isinstance(self.ledger, TraceLedger):
            return contextlib.nullcontext()
        return self.ledger.at(parameter)

    def _states(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the optimizer's states on the device and on the host, as bytes."""
        kind = self.memory.optimizer
        sizes = [state_bytes(kind, local_part(p).shape, p.dtype) for p in self.updated]
        device, host = (
            [
                self._make(self.trained * size, category=place, dtype=torch.uint8, owner=p)
                for p, size in zip(self.updated, column, strict=True)
            ]
            for place, column in zip(("optimizer", HOST), zip(*sizes, strict=True), strict=True)
        )
        if kind == "adamw-cpu":  # gradients and weights pass through two buffers
            buffers = 2 * max(
                local_part(p).numel() * max(p.itemsize, _grad_dtype(p).itemsize)
                for p in self.updated
            )
            self.buffers = self._make(buffers, category=HOST, dtype=torch.uint8)
        return device, host

    def _other_expert(self) -> None:
        """Allocate the expert that waits: its adapters on the device, the rest on the host."""
        adapters = self.parameters if self.workload.train == "lora" else []
        stay = {id(parameter) for parameter in adapters}
        self.moved = [t for t in moved_tensors(self.generator) if id(t) not in stay]
        local = [local_part(t) for t in self.moved]
        spare = host_bytes(local) - sum(tensor.nbytes for tensor in local)
        waiting = [(t, HOST, local_part(t).nbytes) for t in self.moved]
        if self.waiting:  # both experts share the slots, and nothing is exchanged
            places = {True: HOST, False: "weights"}
            waiting = [(t, places[id(t) in self.waiting], local_part(t).nbytes) for t in self.moved]
            self.moved, spare = [], 0
        waiting += [(p, "weights", (self.trained - 1) * local_part(p).nbytes) for p in adapters]
        if self.reference is not None:  # of which an expert waits too
            copies = moved_tensors(self.reference)
            waiting += [(t, HOST, t.nbytes) for t in copies]
            spare += host_bytes(copies) - sum(tensor.nbytes for tensor in copies)
        self.other = [
            self._make(size, category=category, dtype=torch.uint8, owner=owner)
            for owner, category, size in waiting
        ]
        self.other.append(self._make(spare, category=HOST, dtype=torch.uint8))

    def _conditions(self) -> dict[str, torch.Tensor]:
        config, batch = self.workload.config, self.workload.batch_size
        if isinstance(self.adapter, FamilyAdapter):
            channels, *size = self.workload.latent_shape[1:]
            sizes: dict[Any, Any] = {"T": self.workload.text_tokens, **self.adapter.token_counts}
            sizes |= dict(zip("FHW", size, strict=True)) | {"C": config["in_channels"] - channels}
            expected = self.adapter.expected_conditions(unwrap(self.generator))
            return {
                key: self._make(batch, *(sizes.get(n, n) for n in shape)).add_("mask" in key)
                for key, (required, shape) in expected.items()
                if required
            }
        text = self._make(batch, self.workload.text_tokens, config.get("text_dim", 4096))
        conditions = {"encoder_hidden_states": text}
        if config.get("image_dim") is not None:
            tokens = config.get("pos_embed_seq_len") or IMAGE_TOKENS  # of two images, if set
            image = self._make(batch, tokens, config["image_dim"])
            conditions["encoder_hidden_states_image"] = image
        channels, frames, *size = self.workload.latent_shape[1:]
        extra = config.get("in_channels", channels) - channels
        if extra:
            conditions["latent_condition"] = self._make(batch, extra, frames, *size)
        if self.workload.first_frame:
            conditions[FIRST_FRAME] = self._make(batch, channels, 1, *size)
        return conditions

    def _guidance(self) -> Guidance | None:
        if self.workload.guidance is None:
            return None
        negative = {
            key: self._make(1, *self.conditions[key].shape[1:]).add_("mask" in key)
            for key in OF_PROMPT & self.conditions.keys()
        }
        return Guidance(5.0, negative, self.workload.guidance == "batched")

    def cached_shape(self) -> tuple[int, ...]:
        """Return the shape of a rollout's caches: the context, and each block's keys and values."""
        if not (self.workload.patched and adapter_of(self.workload.config).caches):
            return (0,)
        text = self.conditions["encoder_hidden_states"]
        image = self.conditions.get("encoder_hidden_states_image")
        tokens = text.shape[1] + (0 if image is None else image.shape[1])
        branches = 1 if self.guidance is None else 2
        width = self.adapter.hidden_size(self.generator)
        return (branches * len(text), 1 + 2 * self.workload.blocks, tokens, width)

    def _precision(self, memory: MemoryConfig) -> Precision:
        return self.workload.precision if memory.weight_dtype == "fp32" else "fp32"

    def run(self) -> None:
        """Run reward feedback and an optimizer step, then the same for each other objective.

        Of a reward model that trains, run its loss and an optimizer step.
        """
        if self.workload.reward_loss is not None:
            self._fit(self.workload.gradient_accumulation_steps > 1)
            return self._update()
        several = max(self.workload.evaluations, self.workload.gradient_accumulation_steps) > 1
        ways = ("to_host_bytes", "to_device_bytes")
        for phase, way in zip(SWAP_PHASES, ways, strict=True) if self.moved else ():
            self.ledger.start_phase(phase)
            for tensor in self.moved:
                self._count(tensor, **{way: local_part(tensor).nbytes})
        self._feedback(several)
        self._update()
        others = [self._supervised] * self.workload.sft + [self._preferences] * self.workload.dpo
        for objective in others:
            objective(self.workload.gradient_accumulation_steps > 1)
            self._update()

    def _count(self, parameter: torch.Tensor, **work: int) -> None:
        """Add work of one parameter to the current phase."""
        if isinstance(self.ledger, CostLedger):
            with self._at(parameter):
                self.ledger.count(**work)

    def _hold_gradients(self) -> None:
        """Allocate the gradients of earlier points and micro-batches."""
        for parameter in self.updated:
            with self._at(parameter):
                parameter.grad = torch.zeros_like(parameter, dtype=_grad_dtype(parameter))
                place = HOST if id(parameter) in self.waiting else "gradients"
                self.ledger.mark(parameter.grad, place)

    def _feedback(self, several: bool) -> None:
        self.ledger.start_phase("rollout")
        if several:
            self._hold_gradients()
        noise = self._make(*self.workload.latent_shape)
        from_data = self.workload.gradient_plan.start == "data"
        latents = self._make(*self.workload.latent_shape) if from_data else None
        generator = ModelCall(self.generator, self._precision(self.memory))
        kind, models = self._precision(self.reward_memory), iter(self.rewards)
        rewards = [
            [RewardCall(next(models), kind) for _ in members] for members in self.workload.rewards
        ]
        inputs = (noise, self.conditions, latents, self.guidance)
        exact = self.workload.precision == "fp32" and self.memory.weight_dtype == "fp32"
        shape, dtype = self.cached_shape(), torch.float32 if exact else torch.bfloat16
        caches = partial(self._make, *shape, dtype=dtype)
        run_feedback(self.workload, generator, rewards, self.ledger, caches, *inputs)

    def _supervised(self, several: bool) -> None:
        self.ledger.start_phase("sft forward")
        if several:
            self._hold_gradients()
        velocity = ModelCall(self.generator, self._precision(self.memory))
        clean, noise = (self._make(*self.workload.latent_shape) for _ in range(2))
        level = torch.full((len(clean), 1, 1, 1, 1), 0.5)
        x = (1 - level) * clean + level * noise
        with self.ledger.saving():
            v = velocity(x, torch.full((len(x),), TIMESTEPS_PER_SIGMA * 0.5), self.conditions)
            parts = (generated_frames(part, self.conditions) for part in (v, noise, clean))
            loss = flow_loss(*parts)
            del v, x
        self.ledger.start_phase("sft backward")
        (loss * 1.0).backward()

    def _preferences(self, several: bool) -> None:
        self.ledger.start_phase("dpo reference")
        if several:
            self._hold_gradients()
        kind, ledger = self._precision(self.memory), self.ledger
        reference = None if self.reference is None else PairCall(self.reference, kind, ledger)
        win, lose = (self._make(*self.workload.latent_shape) for _ in range(2))
        inputs = (win, lose, self.conditions, self._conditions())
        with ledger.saving(), values_checked():
            margin = dpo_margin(
                PairCall(self.generator, kind, ledger), *inputs, reference=reference
            )
            loss = mean_loss(margin)
            del margin
        ledger.start_phase("dpo backward")
        (loss * 1.0).backward()

    def _fit(self, several: bool) -> None:
        self.ledger.start_phase("forward")
        if several:
            self._hold_gradients()
        shape, pairs = self.workload.latent_shape, self.workload.reward_loss == "bt"
        with self.ledger.saving(), autocast(torch.device("cpu"), self._precision(self.memory)):
            clean = self._make(*shape)
            if pairs:
                lose, conditions = self._make(*shape), self._conditions()
                loss = bt_loss(self.model, clean, lose, self.conditions, conditions)
            else:
                labels = torch.zeros(len(clean))
                loss = ce_loss(self.model, clean, self.conditions, labels)
        self.ledger.start_phase("backward")
        (loss * 1.0).backward()

    def _update(self) -> None:
        """Count the optimizer's step by formula."""
        self.ledger.start_phase("optimizer")
        kind, trained = self.memory.optimizer, [p for p in self.updated if p.grad is not None]
        if self.mesh is not None:
            for parameter in trained:  # FSDP2 sets sharded gradients without autograd's hooks
                _mark_gradient(parameter)
                if not is_dtensor(parameter):  # averaged in one all-reduce
                    ranks, nbytes = self.mesh.size(), parameter.grad.nbytes  # type: ignore[union-attr]
                    self._count(parameter, reduced_bytes=2 * nbytes * (ranks - 1) // ranks)
        self.ledger.add_transient(step_bytes(kind, [local_part(p) for p in trained]))
        states = zip(self.updated, self.device_states, self.host_states, strict=True)
        for parameter, device, host in states:
            read = 0 if parameter.grad is None else local_part(parameter.grad).nbytes
            norm_and_clip, weight = 3 * read, local_part(parameter).nbytes
            if id(parameter) in self.waiting:
                pass  # weight, gradient and states are all on the host
            elif kind == "adamw-cpu":
                ways = {"to_host_bytes": read, "to_device_bytes": weight}
                self._count(parameter, moved_bytes=norm_and_clip, **ways)
            else:
                moved = norm_and_clip + read + 2 * weight + 2 * device.nbytes
                paged = host.nbytes
                ways = {"to_host_bytes": paged, "to_device_bytes": paged}
                self._count(parameter, moved_bytes=moved, **ways)
        for parameter in self.updated:
            with self._at(parameter):
                parameter.grad = None


def _grad_dtype(parameter: torch.Tensor) -> torch.dtype:
    return parameter.grad_dtype or parameter.dtype


def _mark_gradient(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        mark(parameter.grad, "gradients")
