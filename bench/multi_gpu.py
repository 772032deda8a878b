"""Time a PRFL step of one layout of ranks; bench/multi_gpu.sh starts it with torchrun.

Each rank prints nothing but rank 0, which writes one JSON file with the median of the slowest rank.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanTransformer3DModel
from harness import PRESETS

import prfl_fast
from prfl_fast.memory import MemoryConfig, apply_memory, make_optimizer
from prfl_fast.parallel import ParallelConfig, average_gradients, join_ranks, make_mesh
from prfl_fast.parallel.distribution import distribute


def main() -> None:
    """Run the steps and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="wan1.3b-480p", choices=PRESETS)
    parser.add_argument("--shard", type=int, required=True)
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with join_ranks(options.device) as device:
        if device is None:
            parser.error("start it with torchrun on two or more ranks")
        found = measure(options, device)
        if dist.get_rank() == 0:
            options.out.write_text(json.dumps(found, indent=1))
            print(json.dumps(found))


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Return the layout with the seconds of each step on the slowest rank."""
    preset = PRESETS[options.preset]
    parallel = ParallelConfig(options.shard, options.sequence)
    mesh = make_mesh(parallel, device.type)
    torch.manual_seed(0)
    model = WanTransformer3DModel(**preset.config)
    reward = prfl_fast.LatentRewardModel.from_backbone(model, min(8, preset.layers)).freeze()
    memory = MemoryConfig("bf16", "full")
    for each in (model, reward):
        apply_memory(each, memory, device=device)
        prfl_fast.patch(each if each is model else reward.backbone)
        distribute(each, mesh, parallel, memory, "bf16")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer("adamw", parameters, learning_rate=1e-6)
    sampler = prfl_fast.FlowUniPC()
    step = prfl_fast.PRFL(model, reward, sampler, num_inference_steps=options.inference_steps)
    noise = torch.randn(1, 16, *preset.latent, device=device, dtype=torch.bfloat16)
    text = torch.randn(1, preset.text_tokens, preset.text_dim, device=device, dtype=torch.bfloat16)
    seconds = []
    for number in range(1 + options.steps):
        draws = torch.Generator().manual_seed(number)
        dist.barrier()
        began = time.perf_counter()
        step(noise, {"encoder_hidden_states": text}, generator=draws)
        average_gradients(parameters, mesh)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        slowest = torch.tensor(time.perf_counter() - began, device=device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "preset": options.preset,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "ranks": dist.get_world_size(),
        "shard": options.shard,
        "sequence": options.sequence,
        "num_inference_steps": options.inference_steps,
        "seconds": seconds[1:],  # the first step warms up
        "median_seconds": statistics.median(seconds[1:]),
        "peak_bytes": peak,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()
