"""Run the stages block, step and memory on models of diffusers, patched and not."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from harness import Preset, UnavailableError, relative_error
from suites import block, wan

import prfl_fast
from prfl_fast import PRFL, FlowUniPC, RolloutConfig
from prfl_fast.feedback import PRFLOutput
from prfl_fast.memory import activation_checkpointing
from prfl_fast.memory.checkpointing import offload_bytes
from prfl_fast.planning import Workload
from prfl_fast.training import add_lora
from quick.measure import REAL, TINY, peak_gib, sizes, timed, wall
from quick.worker import Worker

# Most valuable first: a run that is cut short has these.
POLICIES = [(policy, None) for policy in ("none", "full", "attention")]
POLICIES += [(policy, "cpu") for policy in ("full", "attention", "none")]


@functools.cache
def no_diffusers() -> str:
    """Return why diffusers has no Wan here; an empty string if it has."""
    try:
        from diffusers import WanTransformer3DModel  # noqa: F401
    except Exception as error:  # a version that does not fit the others can raise anything
        last = (str(error).strip().splitlines() or [""])[-1]
        return f"{type(error).__name__}: {last}"[:300]
    return ""


def build(worker: Worker, preset: Preset, layers: int) -> Any:
    """Return diffusers' Wan with random weights in its mixed layout."""
    if no_diffusers():
        raise UnavailableError(f"needs diffusers: {no_diffusers()}")
    return wan.build(preset, worker.context(preset), layers=layers)


def block_and_inputs(worker: Worker, preset: Preset, way: str) -> tuple[Any, list[Any]]:
    """Return one block and tokens, text, modulation and the output's gradient."""
    model, context = build(worker, preset, 1), worker.context(preset)
    if way == "prfl_fast":
        prfl_fast.patch(model)
    run = block.block_run(model, preset, context, way == "torch.compile")
    return run, list(block.block_inputs(context))


def output_and_gradient(run: Any, x: torch.Tensor, rest: list[Any]) -> list[torch.Tensor]:
    """Return a block's output and the gradient of its mean square, on the host."""
    y = run(x, *rest)
    gradient = torch.autograd.grad(y.float().square().mean(), x)[0]
    return [y.detach().cpu(), gradient.cpu()]


@functools.cache
def eager_results(worker: Worker, preset: Preset) -> list[torch.Tensor]:
    """Return output and gradient of the unpatched block."""
    run, (x, *rest, _) = block_and_inputs(worker, preset, "eager")
    return output_and_gradient(run, x, rest)


def time_block(worker: Worker, preset: Preset, way: str, part: str) -> dict[str, Any]:
    """Time a block and compare it with the unpatched one."""
    run, (x, *rest, cotangent) = block_and_inputs(worker, preset, way)

    def forward() -> Any:
        with torch.no_grad():
            return run(x, *rest)

    def train() -> Any:
        return torch.autograd.grad(run(x, *rest), [x, *run.parameters], cotangent)

    thunk = forward if part == "forward" else train
    record = timed(worker, [thunk], 0.6, 15)
    record["peak_gib"] = peak_gib(worker, thunk)
    if way != "eager" and part != "forward" and preset.dim < 4000:
        pairs = zip(output_and_gradient(run, x, rest), eager_results(worker, preset), strict=True)
        record["off"], record["gradient_off"] = (relative_error(a, b) for a, b in pairs)
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
        build(worker, preset, layers),
        frames=4 * frames - 3,
        height=8 * height,
        width=8 * width,
        text_tokens=preset.text_tokens,
        num_inference_steps=steps,
        reward_blocks=1,
        sft=False,
    )
    found = prfl_fast.plan_memory(workload, budget="130GiB")
    record = {"predicted_gib": found.peak / 2**30, "plan_s": time.perf_counter() - begin}
    record |= {n: asdict(getattr(found, n)) for n in ("memory", "reward_memory")}
    return record | {"categories_gib": {k: v / 2**30 for k, v in found.categories.items()}}


def make_reward(model: Any) -> prfl_fast.LatentRewardModel:
    """Return a frozen reward of the model's first block."""
    torch.manual_seed(0)
    return prfl_fast.LatentRewardModel.from_backbone(model, num_blocks=1).freeze()


def make_step(
    worker: Worker, model: Any, reward: Any, rollout: RolloutConfig
) -> Callable[[], PRFLOutput]:
    """Return a function that runs the PRFL step of the step stage."""
    preset, _, steps, at = step_size(worker.dry)
    context = worker.context(preset)
    noise, conditions = wan.latents(preset, context), wan.conditions(preset, context)
    step = PRFL(model, reward, FlowUniPC(), num_inference_steps=steps, rollout=rollout)
    return lambda: step(noise, conditions, indices=at)


def run_step(worker: Worker, kept: dict[str, Any], way: str, fp8: bool) -> dict[str, Any]:
    """Run a PRFL step three times: loss, gradients, time, memory."""
    preset, layers, *_ = step_size(worker.dry)
    model = build(worker, preset, layers)
    reward = make_reward(model)
    if way == "prfl_fast":
        prfl_fast.patch(model)
        prfl_fast.patch(reward.backbone)
    eight_bits = dict.fromkeys(("fp8_linears", "fp8_attention"), (0.0, 1.0) if fp8 else None)
    rollout = RolloutConfig(cache=way == "prfl_fast", compile="off", **eight_bits)
    step = make_step(worker, model, reward, rollout)
    walls: list[float] = []
    found: list[Any] = []

    def whole() -> None:
        model.zero_grad(set_to_none=True)
        walls.append(1e3 * wall(lambda: found.append(step())))

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
        record["off"] = relative_error(out.latents.cpu(), kept["latents"])
        record["gradient_off"] = block.total_error([g.cpu() for g in gradients], kept["gradient"])
    return record


def predicted_peak(worker: Worker) -> dict[str, Any]:
    """Compare the planner's peak for LoRA training of this model with the allocator's."""
    preset, layers, *_ = step_size(worker.dry)
    if not worker.cuda:
        raise UnavailableError("needs CUDA")
    model = build(worker, preset, layers)
    while True:
        plans = [r for r in worker.journal.read() if r["stage"] == "plan" and r["kind"] != "begin"]
        if plans:
            break
        if worker.left() < 8 or "warm" not in worker.ends:
            raise UnavailableError("the plan, which stage warm starts, is not made yet")
        time.sleep(0.5)
    found = plans[-1]
    if found["kind"] != "result":
        raise RuntimeError(found.get("error", "no plan"))
    reward = make_reward(model)
    for each in (model, reward.backbone):
        prfl_fast.patch(each)
    prfl_fast.apply_memory(model, prfl_fast.MemoryConfig(**found["memory"]))
    prfl_fast.apply_memory(reward, prfl_fast.MemoryConfig(**found["reward_memory"]))
    add_lora(model, 16)
    step = make_step(worker, model, reward, RolloutConfig(compile="off"))
    base = torch.cuda.memory_allocated() / 2**30
    step()
    peak = peak_gib(worker, step) or 0.0
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


def hidden_share(worker: Worker, host: int, ms: float, base: float | None) -> dict[str, Any]:
    """Return host bytes, and the share of their copies' time that the step does not show."""
    record: dict[str, Any] = {"host_gib": host / 2**30}
    link = worker.found("env", "pinned")
    if link and base and host:
        copies = host / link["to_host_gbs"] / 1e6 + host / link["to_device_gbs"] / 1e6
        record |= {"copies_ms": copies, "hidden_share": 1 - (ms - base) / copies}
    return record


def stage_memory(worker: Worker) -> None:
    """Measure peak and time of checkpoint policies and offload."""
    preset, layers = (TINY, 2) if worker.dry else (REAL[0], 3)
    model = prfl_fast.patch(build(worker, preset, layers))
    context = worker.context(preset)
    inputs = {"hidden_states": wan.latents(preset, context, 3).to(context.dtype)}
    inputs |= wan.conditions(preset, context)
    inputs["timestep"] = torch.full((1,), 500.0, device=worker.device)
    walls: dict[tuple[str, str | None], float] = {}

    def train() -> None:
        model.zero_grad(set_to_none=True)
        (out,) = model(**inputs, return_dict=False)
        out.float().square().mean().backward()

    def run(policy: str, offload: str | None) -> dict[str, Any]:
        activation_checkpointing(model, policy, offload)
        try:
            train()
            peak = peak_gib(worker, train)
            ms = 1e3 * min(wall(train) for _ in range(1 if worker.dry else 3))
            walls[policy, offload] = ms
            record: dict[str, Any] = {"wall_ms": ms, "peak_gib": peak}
            if offload:
                host = offload_bytes(model)["host_peak"]
                record |= hidden_share(worker, host, ms, walls.get((policy, None)))
            return record
        finally:
            activation_checkpointing(model, "none")
            model.zero_grad(set_to_none=True)

    for policy, offload in POLICIES:
        name = policy + (", offloaded" if offload else "")
        worker.case(name, partial(run, policy, offload), need=7 if offload else 4)
