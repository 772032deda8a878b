"""Stages block, step and memory: models of diffusers, patched and not."""

import functools
import math
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from harness import Preset

import prfl_fast
from prfl_fast.memory import activation_checkpointing
from prfl_fast.memory.checkpointing import offload_bytes
from prfl_fast.planning import Workload
from prfl_fast.training import add_lora
from quick.measure import error_of, peak_gib, sync, timed
from quick.operations import REAL, TINY, sizes
from quick.worker import SkipError, Worker

POLICIES = (
    ("none", None),
    ("full", None),
    ("attention", None),
    ("full", "cpu"),
    ("attention", "cpu"),
    ("none", "cpu"),
)


@functools.cache
def no_diffusers() -> str:
    """Return why diffusers has no Wan here; an empty string if it has."""
    try:
        from diffusers import WanTransformer3DModel  # noqa: F401
    except Exception as error:  # a version that does not fit the others can raise anything
        last = (str(error).strip().splitlines() or [""])[-1]
        return f"{type(error).__name__}: {last}"[:300]
    return ""


def wan(worker: Worker, preset: Preset, layers: int) -> Any:
    """Return diffusers' Wan with random weights in its mixed layout."""
    if no_diffusers():
        raise SkipError(f"needs diffusers: {no_diffusers()}")
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    dtype = torch.bfloat16 if worker.cuda else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(worker.device):
            model = WanTransformer3DModel(
                num_attention_heads=preset.heads,
                attention_head_dim=preset.dim // preset.heads,
                ffn_dim=preset.ffn_dim,
                num_layers=layers,
                text_dim=preset.text_dim,
            )
    finally:
        torch.set_default_dtype(before)
    keep = model._keep_in_fp32_modules or []
    for name, parameter in model.named_parameters():
        wide = any(part in keep for part in name.split("."))
        parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    return model


def draw(worker: Worker, seed: int, *shape: int, wide: bool = False) -> torch.Tensor:
    """Draw a tensor from a seed, in float32 or in the dtype of activations."""
    generator = torch.Generator(worker.device).manual_seed(seed)
    found = torch.randn(shape, generator=generator, device=worker.device)
    return found if wide or not worker.cuda else found.bfloat16()


def block_and_inputs(worker: Worker, preset: Preset, way: str) -> tuple[Any, list[Any]]:
    """Return one block and its inputs: tokens, text, modulation, rotary table."""
    model = wan(worker, preset, 1)
    if way == "prfl_fast":
        prfl_fast.patch(model)
    # The table is made once per forward for all blocks, so it is not part of what is timed.
    rope = model.rope(torch.empty((1, 16, *preset.latent), device=worker.device))
    block = model.blocks[0]
    x = draw(worker, 7, 1, preset.tokens, preset.dim).requires_grad_()
    text = draw(worker, 8, 1, preset.text_tokens, preset.dim)
    modulation = draw(worker, 9, 1, 6, preset.dim)
    compiled = torch.compile(block, dynamic=False) if way == "torch.compile" else block
    return compiled, [x, text, modulation, rope]


def output_and_gradient(block: Any, x: torch.Tensor, rest: list[Any]) -> list[torch.Tensor]:
    """Return a block's output and the gradient of its mean square, on the host."""
    y = block(x, *rest)
    gradient = torch.autograd.grad(y.float().square().mean(), x)[0]
    return [y.detach().cpu(), gradient.cpu()]


@functools.cache
def eager_results(worker: Worker, preset: Preset) -> list[torch.Tensor]:
    """Return what the unpatched block gives, for comparison."""
    block, (x, *rest) = block_and_inputs(worker, preset, "eager")
    return output_and_gradient(block, x, rest)


def time_block(worker: Worker, preset: Preset, way: str, part: str) -> dict[str, Any]:
    """Time a block and compare it with the unpatched one."""
    block, (x, *rest) = block_and_inputs(worker, preset, way)
    cotangent, leaves = torch.randn_like(x), [x, *block.parameters()]

    def forward() -> Any:
        with torch.no_grad():
            return block(x, *rest)

    def train() -> Any:
        return torch.autograd.grad(block(x, *rest), leaves, cotangent, allow_unused=True)

    thunk = forward if part == "forward" else train
    record = timed(worker, [thunk], 0.6, 15)
    record["peak_gib"] = peak_gib(worker, thunk)
    if way != "eager" and part != "forward" and preset.dim < 4000:
        pairs = zip(output_and_gradient(block, x, rest), eager_results(worker, preset), strict=True)
        record["off"], record["gradient_off"] = (error_of(a, b) for a, b in pairs)
    return record


def stage_block(worker: Worker) -> None:
    """Time one transformer block, GPU time and host time side by side."""
    parts, (large, small) = ("forward", "forward+backward"), sizes(worker)[:2]
    ways = ("eager", "prfl_fast")
    order = [(p, way, part) for p in (small, large) for part in parts for way in ways]
    order += [(small, "torch.compile", part) for part in parts if worker.cuda]
    for preset, way, part in order:
        run = partial(time_block, worker, preset, way, part)
        need = 25 if way == "torch.compile" else 3
        worker.case(f"{way} {part}, {preset.name}", run, need=need)


def step_size(dry: bool) -> tuple[Preset, int, int, tuple[int, ...]]:
    """Return size, blocks, solver steps and the step with gradient."""
    return (TINY, 2, 4, (1,)) if dry else (REAL[1], 6, 8, (3,))


def make_plan(worker: Worker) -> dict[str, Any]:
    """Plan the LoRA training of the step stage's model; a process of its own makes it."""
    preset, layers, steps, _ = step_size(worker.dry)
    frames, height, width = preset.latent
    begin = time.perf_counter()
    workload = Workload(
        wan(worker, preset, layers),
        frames=4 * frames - 3,
        height=8 * height,
        width=8 * width,
        text_tokens=preset.text_tokens,
        num_inference_steps=steps,
        reward_blocks=1,
        sft=False,
    )
    found = prfl_fast.plan_memory(workload, budget="130GiB")
    return {
        "predicted_gib": found.peak / 2**30,
        "plan_s": time.perf_counter() - begin,
        "memory": asdict(found.memory),
        "reward_memory": asdict(found.reward_memory),
        "categories_gib": {k: v / 2**30 for k, v in found.categories.items()},
    }


def step_inputs(worker: Worker) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return noise and conditions of the step stage."""
    preset = step_size(worker.dry)[0]
    noise = draw(worker, 2, 1, 16, *preset.latent, wide=True)
    text = draw(worker, 1, 1, preset.text_tokens, preset.text_dim)
    return noise, {"encoder_hidden_states": text}


def run_step(worker: Worker, kept: dict[str, Any], way: str, fp8: bool) -> dict[str, Any]:
    """Run a PRFL step three times: loss, gradients, time, memory."""
    preset, layers, steps, at = step_size(worker.dry)
    noise, conditions = step_inputs(worker)
    model = wan(worker, preset, layers)
    torch.manual_seed(0)
    heads = 8 if preset.dim % 8 == 0 else 1
    from_backbone = prfl_fast.LatentRewardModel.from_backbone
    reward = from_backbone(model, num_blocks=1, num_heads=heads).freeze()
    if way == "prfl_fast":
        prfl_fast.patch(model)
        prfl_fast.patch(reward.backbone)
    everywhere = (0.0, 1.0) if fp8 else None
    rollout = prfl_fast.RolloutConfig(
        cache=way == "prfl_fast", compile="off", fp8_linears=everywhere, fp8_attention=everywhere
    )
    step = prfl_fast.PRFL(
        model,
        reward,
        prfl_fast.FlowUniPC(shift=5.0),
        num_inference_steps=steps,
        rollout=rollout,
    )
    walls: list[float] = []
    found: list[Any] = []

    def whole() -> None:
        model.zero_grad(set_to_none=True)
        sync()
        begin = time.perf_counter()
        found.append(step(noise, conditions, indices=at))
        sync()
        walls.append(1e3 * (time.perf_counter() - begin))

    whole()
    peak = peak_gib(worker, whole)
    whole()
    out, gradients = found[0], [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    record = {"wall_ms": walls[-1], "second_ms": walls[1], "first_ms": walls[0], "peak_gib": peak}
    record |= {"loss": out.loss.item(), "gradient_norm": norm}
    record["finite"] = bool(out.finite) and math.isfinite(norm) and norm > 0
    record["drift"] = max(out.drift.values()) if out.drift else None
    if way == "eager":
        kept["latents"], kept["gradient"] = out.latents.cpu(), [g.cpu() for g in gradients]
    elif "latents" in kept:
        record["off"] = error_of(out.latents.cpu(), kept["latents"])
        ours = torch.cat([g.cpu().double().flatten() for g in gradients])
        theirs = torch.cat([g.double().flatten() for g in kept["gradient"]])
        record["gradient_off"] = error_of(ours, theirs)
    return record


def predicted_peak(worker: Worker) -> dict[str, Any]:
    """Compare the planner's peak for LoRA training of this model with the allocator's."""
    preset, layers, steps, at = step_size(worker.dry)
    if not worker.cuda:
        raise SkipError("needs CUDA")
    model = wan(worker, preset, layers)
    while True:
        plans = [r for r in worker.journal.read() if r["stage"] == "plan" and r["kind"] != "begin"]
        if plans:
            break
        if worker.left() < 8 or "warm" not in worker.ends:
            raise SkipError("the plan, which stage warm starts, is not made yet")
        time.sleep(0.5)
    found = plans[-1]
    if found["kind"] != "result":
        raise RuntimeError(found.get("error", "no plan"))
    torch.manual_seed(0)
    reward = prfl_fast.LatentRewardModel.from_backbone(model, num_blocks=1).freeze()
    for each in (model, reward.backbone):
        prfl_fast.patch(each)
    prfl_fast.apply_memory(model, prfl_fast.MemoryConfig(**found["memory"]))
    prfl_fast.apply_memory(reward, prfl_fast.MemoryConfig(**found["reward_memory"]))
    add_lora(model, 16)
    step = prfl_fast.PRFL(
        model,
        reward,
        prfl_fast.FlowUniPC(shift=5.0),
        num_inference_steps=steps,
        rollout=prfl_fast.RolloutConfig(compile="off"),
    )
    noise, conditions = step_inputs(worker)
    base = torch.cuda.memory_allocated() / 2**30
    step(noise, conditions, indices=at)
    peak = peak_gib(worker, lambda: step(noise, conditions, indices=at)) or 0.0
    names = ("predicted_gib", "plan_s", "memory", "categories_gib")
    return {"peak_gib": base + peak} | {n: found[n] for n in names}


def stage_step(worker: Worker) -> None:
    """Run a PRFL step of a shallow 1.3B at 480p."""
    kept: dict[str, Any] = {}
    for name, way, fp8 in (
        ("eager", "eager", False),
        ("prfl_fast, exact rollout", "prfl_fast", False),
        ("prfl_fast, FP8 rollout", "prfl_fast", True),
    ):
        worker.case(name, partial(run_step, worker, kept, way, fp8), need=6)
    worker.case("planner, LoRA", partial(predicted_peak, worker), need=20)


def hidden_share(worker: Worker, host: int, wall: float, base: float | None) -> dict[str, Any]:
    """Return host bytes, and the share of their copies' time that the step does not show."""
    record: dict[str, Any] = {"host_gib": host / 2**30}
    link = worker.found("env", "pinned")
    if link and base and host:
        copies = host / link["to_host_gbs"] / 1e6 + host / link["to_device_gbs"] / 1e6
        record |= {"copies_ms": copies, "hidden_share": 1 - (wall - base) / copies}
    return record


def stage_memory(worker: Worker) -> None:
    """Measure what checkpoint policies and offload save and cost."""
    preset, layers = (TINY, 2) if worker.dry else (REAL[0], 3)
    model = prfl_fast.patch(wan(worker, preset, layers))
    x = draw(worker, 3, 1, 16, *preset.latent)
    text = draw(worker, 4, 1, preset.text_tokens, preset.text_dim)
    t = torch.full((1,), 500.0, device=worker.device)
    walls: dict[tuple[str, str | None], float] = {}

    def train() -> float:
        begin = time.perf_counter()
        model.zero_grad(set_to_none=True)
        inputs = {"hidden_states": x, "timestep": t, "encoder_hidden_states": text}
        (out,) = model(**inputs, return_dict=False)
        out.float().square().mean().backward()
        sync()
        return 1e3 * (time.perf_counter() - begin)

    def run(policy: str, offload: str | None) -> dict[str, Any]:
        activation_checkpointing(model, policy, offload)
        try:
            train()
            peak = peak_gib(worker, train)
            wall = min(train() for _ in range(1 if worker.dry else 3))
            walls[policy, offload] = wall
            record: dict[str, Any] = {"wall_ms": wall, "peak_gib": peak}
            if offload:
                host = offload_bytes(model)["host_peak"]
                record |= hidden_share(worker, host, wall, walls.get((policy, None)))
            return record
        finally:
            activation_checkpointing(model, "none")
            model.zero_grad(set_to_none=True)

    for policy, offload in POLICIES:
        name = policy + (", offloaded" if offload else "")
        worker.case(name, partial(run, policy, offload), need=7 if offload else 4)
