"""Workloads and simulations that the planner's tests share."""

import contextlib
import itertools

from prfl_fast.memory.ledger import Ledger
from prfl_fast.models.registry import patch
from prfl_fast.planning.built_models import (
    build,
    frozen_copy,
    materialize,
    stream_models,
    transformer_of,
)
from prfl_fast.planning.costs import Cost
from prfl_fast.planning.derived import Weights, streamed
from prfl_fast.planning.fake_mode import FastFakeTensorMode
from prfl_fast.planning.gpu_specs import GpuSpecs
from prfl_fast.planning.search import MODES
from prfl_fast.planning.simulated_step import SimulatedStep
from prfl_fast.planning.trace import ALLOCATE, Simulation
from prfl_fast.planning.workload import Workload

# Wide enough that a block's input is worth offloading, and otherwise as small as it gets.
SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "ffn_dim": 512,
    "num_layers": 6,
    "text_dim": 64,
    "freq_dim": 64,
}
SIZE = {"frames": 33, "height": 480, "width": 832, "reward_blocks": 4}
SHALLOW = {"layers": 3, "reward_layers": 3}
BOTH = list(itertools.product(MODES, MODES))
KEPT = {"none": 10, "attention": 3, "full": 1}
WEIGHTS = {"bf16": 8, "fp8": 4, "nf4": 2}
STATES = {"adamw": 12, "adamw-sr": 8, "adamw8bit": 2, "adamw-cpu": 0}
RATES = GpuSpecs("unit", 1e12, 1e12, 1e15, 1e9, 1e9, 1 << 40)


def small_workload(**options):
    """Return the workload of the small model, with changed options."""
    return Workload(SMALL, **{**SIZE, **options})


def cost(blocks, seconds, to_host=0, to_device=0):
    """Return the cost of blocks that take ``seconds`` each, and of copies in MiB."""
    return Cost(int(1e12 * blocks * seconds), 0, 0, to_host << 20, to_device << 20)


def saved(phase, model, size):
    """Return the event of a phase in which the blocks of a model save ``size`` MiB."""
    return phase, [(ALLOCATE, (phase, 0, f"{model} 0", 0, 0), size << 20, "checkpoints")]


def made_up(workload, memory, reward_memory, *, layers=None, reward_layers=None):
    """Return a simulated step in round numbers: MiB per block, seconds per block."""
    depth = layers or workload.config["num_layers"]
    reward_depth = reward_layers or workload.reward_blocks
    chunked = memory.feed_forward_chunk is not None
    work, states = 14 - 4 * chunked, STATES[memory.optimizer] * (workload.train == "full")
    kept, reward_kept = (KEPT[m.activation_checkpointing] for m in (memory, reward_memory))
    # Of an offloaded model two blocks' tensors are on the device.
    here = kept * (2 if memory.offload else depth)
    there = reward_kept * (2 if reward_memory.offload else reward_depth)
    left = 0 if memory.offload and reward_memory.offload else here
    base = {
        "weights": WEIGHTS[memory.weight_dtype] * depth + 3,
        "reward": WEIGHTS[reward_memory.weight_dtype] * reward_depth + 2,
        "optimizer": states * depth,
    }

    def moment(phase, checkpoints, workspace):
        live = base | {"checkpoints": checkpoints, "workspace": workspace}
        return phase, {name: value << 20 for name, value in live.items()}

    timeline = [
        moment("rollout", 0, 6),
        moment("forward", here, 5),
        moment("reward", here, 0),
        moment("reward", left + there, 4),
        moment("reward backward", left + there, 0),
        moment("reward backward", left + there, work - 1),
        moment("backward", here, work),
        moment("optimizer", 0, 1),
    ]
    again = {"none": 0, "attention": 1, "full": 2}
    extra = 0.25 * chunked

    out, reward_out = kept * bool(memory.offload), reward_kept * bool(reward_memory.offload)
    # A block's tensors leave when the next block comes, of either model.
    sent = (depth - 1) * out, bool(reward_out) * (out + (reward_depth - 1) * reward_out)
    repeated = again[reward_memory.activation_checkpointing] + extra
    costs = {
        "": Cost(moved_bytes=1),
        "rollout": cost(depth, 1),
        "forward": cost(depth, 1, sent[0]),
        "reward": cost(reward_depth, 1, sent[1]),
        "reward backward": cost(reward_depth, 1 + repeated, 0, (reward_depth - 1) * reward_out),
        "backward": cost(depth, 2 + again[memory.activation_checkpointing] + extra, 0, sent[0]),
        "optimizer": cost(depth, 1 + workload.sft),
    }
    if workload.sft:
        timeline += [moment(f"sft {p}", here, work - 1) for p in ("forward", "backward")]
        costs |= {f"sft {p}": costs[p] for p in ("forward", "backward")}
    phase, high = max(timeline, key=lambda m: sum(m[1].values()))
    host = (sum(sent) + (memory.optimizer == "adamw-cpu") * depth) << 20
    events = [saved("forward", "generator", depth * kept)]
    events += [saved("reward", "reward", reward_depth * reward_kept)]
    run = Simulation(sum(high.values()), phase, high, host, timeline, costs, events)
    if memory.stream_weights is None:
        return run
    sizes = made_up_bytes(workload, memory, reward_memory)
    return streamed(run, sizes, full=workload.train == "full")


def made_up_bytes(workload, memory, reward_memory):
    """Return the bytes of weights and optimizer states of the made-up models."""
    block, depth = WEIGHTS[memory.weight_dtype] << 20, workload.config["num_layers"]
    states = (STATES[memory.optimizer] * depth << 20) * (workload.train == "full")
    host = (depth << 20) * (memory.optimizer == "adamw-cpu")
    return Weights(depth * block, workload.reward_models[0] * block, block, 5 << 20, states, host)


def prepared(generator, rewards):
    """Give the built models weights, real or fake, and patch them, as the simulation does."""
    for model in (generator, *rewards):
        materialize(model)
        patch(transformer_of(model))
    return generator, rewards


def ledger_of(workload, memory, fake):
    """Return the ledger of one simulated step, with operations opened up as on the CPU."""
    built = build(workload, *memory)
    with FastFakeTensorMode() if fake else contextlib.nullcontext():
        generator, rewards = prepared(*built)
        stream_models(generator, rewards, *memory)
        with Ledger(open_operations=True) as ledger:
            parts = (generator, rewards, ledger, None, frozen_copy(workload, memory[0]))
            SimulatedStep(workload, *memory, *parts).run()
    return ledger
