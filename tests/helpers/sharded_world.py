"""A training run on one process or on several ranks, for tests of prfl_fast.parallel."""

import dataclasses
import functools
import math
import traceback
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from prfl_world import make_wan, normal, with_lora
from ranks import run_ranks
from torch.distributed.tensor import Replicate, Shard
from torch.nn.functional import pad
from torch.nn.parallel import DistributedDataParallel
from wan import float_means_double, tiny_wan

from prfl_fast import LatentRewardModel
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.memory.optimizers import make_optimizer
from prfl_fast.memory.stream import stream_weights
from prfl_fast.models.experts import Experts, members
from prfl_fast.models.lora_files import write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.models.registry import patch
from prfl_fast.parallel import (
    ParallelConfig,
    average_gradients,
    delayed_reduction,
    make_mesh,
    shard,
    shard_sequence,
)
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.utils.modules import unwrap

SAMPLES = 4
# One update shows the gradients, without the many calls of AdamW on sharded weights.
OPTIMIZERS = (
    functools.partial(torch.optim.SGD, lr=1e-2, foreach=False),
    functools.partial(make_optimizer, "adamw", learning_rate=1e-3),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: its plan, what it trains, and how ranks share weights (None: whole on each rank)."""

    name: str
    updates: int = 1
    plan: GradientPlan = GradientPlan.prfl()
    indices: tuple[int, ...] | None = (2,)
    lora: bool = False
    i2v: bool = False
    first_frame: bool = False
    experts: bool = False
    patched: bool = True
    accumulation: int = 1
    mode: str = "none"
    offload: str | None = None
    streamed: bool = False
    divergence: float = 0.0
    rollout: RolloutConfig = RolloutConfig()
    shard: int | None | str = "auto"
    sequence: int = 1
    steps: int = 5  # of the solver
    ddp: bool = False
    channels_last: bool = False
    size: tuple[int, int, int] = (3, 4, 4)  # of the latents
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def few_steps(folder, **options):
    """Return a case whose rollouts add an adapter of layers inside and outside the blocks."""
    shapes = {
        "blocks.0.attn1.to_q": ((2, 48), (48, 2)),
        "blocks.1.attn2.to_k": ((2, 48), (48, 2)),
        "blocks.0.ffn.net.2": ((2, 64), (48, 2)),
        "condition_embedder.time_proj": ((2, 48), (288, 2)),
        "patch_embedding": ((2, 16, 1, 2, 2), (48, 2, 1, 1, 1)),
        "proj_out": ((2, 48), (64, 2)),
    }
    lora = {
        name: LoraLayer(*(0.3 * normal(70 + n, s).float() for n, s in enumerate(pair)), 2.0)
        for name, pair in shapes.items()
    }
    path = folder / "few.safetensors"
    write_lora(lora, path, "comfyui")
    rollout = RolloutConfig(adapter=str(path), stride=2)
    return Case("few-step adapter", rollout=rollout, **{"lora": True, "indices": (3,), **options})


def at_length(case):
    """Return a case with three updates, and with five points in place of several."""
    if case.plan.points == 1:
        return dataclasses.replace(case, updates=3)
    five = {"plan": GradientPlan.prfl(5), "indices": (0, 1, 2, 3, 4), "steps": 6}
    return dataclasses.replace(case, updates=3, **five)


def build(case, mesh=None):
    torch.manual_seed(0)
    heads = {"heads": 4, "head_dim": 12} if case.sequence == 4 else {}
    kind = "i2v" if case.i2v else "t2v"
    model = tiny_wan(kind, seed=0, text_dim=12, ffn_dim=64, **heads).double()
    reward = LatentRewardModel.from_backbone(model, 1, num_heads=2).double().freeze()
    if case.experts:
        low = make_wan(seed=1)
        model = Experts(model, low, 0.9)
    if case.lora:
        for expert in members(model):
            with_lora(expert)
    if case.patched:
        patch(model)
        patch(reward.backbone)
    if case.channels_last:
        model.to(memory_format=torch.channels_last_3d)
    if case.streamed:
        stream_weights(model, 1)
        stream_weights(reward.backbone, 1)
    activation_checkpointing(model, case.mode, case.offload)
    activation_checkpointing(reward.backbone, case.mode, case.offload)
    if mesh is not None and case.sequence > 1:
        shard_sequence(model, mesh)
        shard_sequence(reward, mesh)
    if mesh is not None and case.shard is not None:
        shard(model, mesh, **case.options)
        shard(reward, mesh, **case.options)
    if mesh is not None and case.ddp:
        model = DistributedDataParallel(model)
    return model, reward


def conditions(case, samples):
    text = normal(3, (SAMPLES, 3, 12))
    found = {"encoder_hidden_states": text}
    if case.i2v:
        found["encoder_hidden_states"] = normal(3, (SAMPLES, 512, 12))
        found["encoder_hidden_states_image"] = normal(4, (SAMPLES, 5, 20))
        found["latent_condition"] = normal(5, (SAMPLES, 20, *case.size))
    if case.first_frame:
        found["first_frame"] = normal(6, (SAMPLES, 16, 1, *case.size[1:]))
    return {name: value[samples] for name, value in found.items()}


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def all_full(tensors):
    """Return the whole tensors of a dict by one collective of each mesh and dtype.

    ``full_tensor`` takes 2 ms for each, a third of the time of a tiny sharded run.
    """
    found, groups = dict.fromkeys(tensors), defaultdict(list)
    for name, tensor in tensors.items():
        *others, last = getattr(tensor, "placements", [None])
        if last == Shard(0) and all(placement == Replicate() for placement in others):
            groups[tensor.device_mesh, tensor.dtype].append(name)
        else:
            found[name] = full(tensor)
    for (mesh, _), names in groups.items():
        parts, padded = mesh.size(mesh.ndim - 1), []
        for name in names:
            own = tensors[name].detach().to_local().flatten()
            rows, *columns = tensors[name].shape
            padded.append(pad(own, (0, -(-rows // parts) * math.prod(columns) - len(own))))
        own = torch.cat(padded)
        everyone = own.new_empty(parts * len(own))
        dist.all_gather_into_tensor(everyone, own, group=mesh.get_group(mesh.ndim - 1))
        pieces = everyone.view(parts, -1).split([len(p) for p in padded], 1)
        for name, piece in zip(names, pieces, strict=True):
            shape = tensors[name].shape
            found[name] = piece.reshape(-1)[: shape.numel()].reshape(shape).clone()
    return found


def run_case(case, world=1):
    """Return loss, rewards, gradients and weights of each update, with whole tensors."""
    # Norms and image embeddings of diffusers round to float32, differently for each batch.
    with float_means_double():
        return _run_case(case, world)


def _run_case(case, world):
    rank, mesh = 0, None
    if world > 1:
        size = "auto" if case.shard is None else case.shard
        mesh = make_mesh(ParallelConfig(shard=size, sequence=case.sequence))
        rank = dist.get_rank() // case.sequence  # ranks that share a sample compute the same
    model, reward = build(case, mesh)
    step = PRFL(
        model, reward, FlowUniPC(), case.plan, num_inference_steps=case.steps,
        divergence=case.divergence, rollout=case.rollout,
    )  # fmt: skip
    trained = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[case.updates > 1](trained.values())
    share = SAMPLES * case.sequence // world
    samples = slice(rank * share, rank * share + share)
    found = []
    for update in range(case.updates):
        losses, rewards = [], []
        for micro in range(case.accumulation):
            noise = normal(10 + 10 * update + micro, (SAMPLES, 16, *case.size))[samples]
            last = micro == case.accumulation - 1
            generator = torch.Generator().manual_seed(update)
            arguments = {"indices": case.indices, "loss_scale": 1 / case.accumulation}
            arguments["generator"] = generator
            if case.options.get("reduce_once") and not last:
                with delayed_reduction(model):
                    output = step(noise, conditions(case, samples), **arguments)
            else:
                output = step(noise, conditions(case, samples), **arguments)
            assert output.finite
            losses.append(output.loss.detach())
            rewards.append(output.rewards)
        if world > 1 and not case.ddp:
            average_gradients(trained.values(), mesh)
        gradients = all_full({n: p.grad for n, p in trained.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        weights = all_full(trained)
        loss, rewards = torch.stack(losses), torch.cat(rewards, 0)
        if mesh is not None:
            loss = gather(loss).mean(0)
            rewards = torch.cat(list(gather(rewards))[:: case.sequence], -1)
        found.append(
            {
                "loss": loss,
                "rewards": rewards,
                **gradients,
                **{f"w {n}": w for n, w in weights.items()},
            }
        )
    return found


def gather(tensor):
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return torch.stack(tensors)


def worst(ours, theirs):
    """Return the largest error over updates and tensors, relative to each tensor, and its name."""
    errors = [(0.0, "")]
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        scale = max(
            v.abs().max().item() for n, v in b.items() if not n.startswith(("w ", "loss", "rew"))
        )
        for name, value in b.items():
            # A gradient that is zero in exact arithmetic is rounding on both sides.
            size = max(value.abs().max().item(), 1e-6 * scale)
            error = (a[name] - value).abs().max().item() / size
            errors.append((error if error == error else float("inf"), f"{name} of update {number}"))
    return max(errors)


def equal_at_length(world, cases):
    """Check all cases, a few at a time, because ranks must answer within minutes."""
    for start in range(0, len(cases), 8):
        equal_to_one_process(world, [at_length(case) for case in cases[start : start + 8]])


def equal_to_one_process(world, cases):
    expected = {case.name: run_case(case) for case in cases}

    def errors():
        found = {}
        for case in cases:
            try:
                found[case.name] = worst(run_case(case, world), expected[case.name])
            except Exception as error:
                raise AssertionError(f"{case.name}: {traceback.format_exc()}") from error
        return found

    found = run_ranks(world, errors)[0]
    print(world, "ranks:", found)
    assert max(error for error, _ in found.values()) <= 1e-10
