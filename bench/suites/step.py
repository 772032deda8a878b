"""Time a whole PRFL step by part: reference, diffusers eager and compiled, prfl_fast.

Every way takes the same trajectories: the same weights, noise, conditions and gradient steps. What
is timed is one call, an SFT step and two optimizer updates.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import harness
import report
import torch
from experiments.rollout_options import EVERYWHERE, FEW_LAYERS, NO_ENGINE, WHOLE_UP_TO, inexact
from harness import Context, Preset, SuiteResult, Table
from method_specs import MANY, ONE, POINTS, SOLVER_STEPS, TINY, one_thread
from torch import nn

import prfl_fast
from prfl_fast import PRFL, FlowUniPC, GradientPlan, LatentRewardModel, RolloutConfig
from prfl_fast.rollout import Trajectory
from prfl_fast.training import sft_loss
from suites import split, wan

# The reference's time over prfl_fast's with 1 point.
TARGETS = {"wan1.3b-480p": 1.25, "wan14b-480p": 1.15, "wan14b-720p": 1.15}
FP8 = inexact(fp8_linears=EVERYWHERE, fp8_attention=EVERYWHERE)
# To eager on the same trajectory: of a reward in (0, 1), and relative of the rewarded latents.
TOLERANCES = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


class Parts:
    """Sum the seconds of each part of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(split.PARTS, 0.0)

    def now(self) -> float:
        """Return the time after all queued work of the device."""
        harness.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the seconds of the context to a part."""
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def reward(self, function: Any) -> Callable[..., torch.Tensor]:
        """Wrap the reward to time it, from its call to the gradient of the latents."""

        def timed(x: torch.Tensor, timestep: torch.Tensor, conditions: Any) -> torch.Tensor:
            start = self.now()

            def reached(gradient: torch.Tensor) -> None:
                self.seconds["reward"] += self.now() - start

            x.register_hook(reached)
            return function(x, timestep, conditions)

        return timed

    @contextlib.contextmanager
    def rollouts(self) -> Iterator[None]:
        """Attribute ``Trajectory.run`` to the part ``rollout`` within the context."""
        run = Trajectory.run

        def timed(trajectory: Trajectory, *arguments: Any, **options: Any) -> None:
            with self.part("rollout"):
                run(trajectory, *arguments, **options)

        Trajectory.run = timed
        try:
            yield
        finally:
            Trajectory.run = run


@dataclass(frozen=True)
class Way:
    """Describe one way to run the step.

    Attributes:
        model: which models: ``reference``, ``eager``, ``compiled`` or ``prfl_fast``.
        indices: the gradient steps. config: of the rollout engine; None runs without caches.
    """

    name: str
    model: str
    indices: tuple[int, ...] = ONE
    config: RolloutConfig | None = None

    def record(self) -> dict[str, Any]:
        """Return the fields that all records of this way share."""
        return {"case": "step", "way": self.name, "points": len(self.indices)}

    def per_point(self, seconds: dict[str, float]) -> dict[str, float]:
        """Return the seconds of a call by part for each of its points."""
        shared = {part: value / len(self.indices) for part, value in seconds.items()}
        # The supervised step was run once, and is done for each point.
        update = seconds["optimizer"] / split.ACCUMULATION
        return shared | {"SFT": seconds["SFT"], "optimizer": update}


_EXACT = RolloutConfig()


def ways(context: Context) -> tuple[Way, ...]:
    """Return the requested baselines, then prfl_fast's ways."""
    slow = context.device.type == "cpu" and not context.compile_ops  # minutes, unless asked for
    found = [
        Way(name, name, ONE, NO_ENGINE)
        for name in ("reference", "eager", "compiled")
        if name in context.baselines and not (slow and name == "compiled")
    ]
    found += [
        Way("prfl_fast, 1 point", "prfl_fast", ONE, _EXACT),
        Way(f"prfl_fast, {POINTS} points", "prfl_fast", MANY, _EXACT),
    ]
    if context.device.type == "cuda":  # a CPU emulates FP8
        found.append(Way(f"prfl_fast, {POINTS} points, FP8 rollout", "prfl_fast", MANY, FP8))
    return tuple(found)


@dataclass
class Models:
    """Hold a generator that trains and a reward.

    Attributes:
        module: holds the generator's parameters. velocity: what PRFL and SFT call.
        judge: holds the reward's parameters. reward: what PRFL calls.
    """

    module: nn.Module
    velocity: Any
    judge: nn.Module
    reward: Any


def _models(name: str, base: nn.Module, blocks: int, preset: Preset, context: Context) -> Models:
    """Return the models of a way with the weights of ``base``."""
    torch.manual_seed(context.seed)  # the same head for every way
    own = LatentRewardModel.from_backbone(base, num_blocks=blocks)
    if name == "reference":
        return Models(*wan.reference_models(base, own, preset, context))
    module, reward = copy.deepcopy(base), own.freeze()
    for model in (module, reward.backbone):
        if name == "prfl_fast":
            prfl_fast.patch(model)
            prfl_fast.memory.activation_checkpointing(model, "attention")
        else:
            model.enable_gradient_checkpointing()
        for block in model.blocks if name == "compiled" else ():
            block.compile(dynamic=False)
    return Models(module, module, reward, reward)


def measure_way(way: Way, models: Models, preset: Preset, context: Context) -> dict[str, Any]:
    """Return seconds by part, peak bytes and rewards of a step; a short step compiles first."""
    device = context.device
    parameters = [p for p in models.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-12, fused=device.type == "cuda")
    noise, clean = wan.latents(preset, context), wan.latents(preset, context, 3)
    conditions = wan.conditions(preset, context)
    parts = Parts(device)
    plan = GradientPlan.prfl(len(way.indices))
    options: Any = {"num_inference_steps": SOLVER_STEPS, "rollout": way.config}
    step = PRFL(models.velocity, parts.reward(models.reward), FlowUniPC(), plan, **options)
    rewards: dict[int, float] = {}
    latents = noise

    def update() -> None:
        with parts.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def whole(indices: tuple[int, ...]) -> None:
        nonlocal latents
        with parts.rollouts(), parts.part("gradient"):
            out = step(noise, conditions, indices=indices)
        update()
        with parts.part("SFT"):
            loss = sft_loss(models.velocity, clean, conditions, generator=context.generator(4))
            loss.backward()
        update()
        # The reference's reward has weight gradients: each call's peak is to have them.
        models.judge.zero_grad(set_to_none=True)
        found = out.rewards.float().mean(1).tolist()
        rewards.update(zip(out.indices, found, strict=True))
        latents = out.latents

    # Two solver steps with the shapes, dtypes and code of the timed ones; the engine's check too.
    whole((1, *range(2, 1 + len(way.indices))))
    parts.seconds = dict.fromkeys(parts.seconds, 0.0)
    if device.type == "cuda":  # in what the short call has cached: nothing waits for the driver
        peak = harness.peak_bytes(lambda: whole(way.indices), device, empty_cache=False)
        seconds = parts.seconds
    else:  # whose ledger of bytes slows a call down
        whole(way.indices)
        seconds = dict(parts.seconds)
        peak = harness.peak_bytes(lambda: whole(way.indices), device)
    seconds["gradient"] -= seconds["rollout"] + seconds["reward"]
    record = way.record() | {"seconds_per_point": way.per_point(seconds), "peak_bytes": peak}
    record["rewards"] = {str(index): rewards[index] for index in way.indices}
    return record | {"latents": latents.cpu() if way.indices == ONE else None}


def compare_rewards(records: list[dict[str, Any]], context: Context) -> list[str]:
    """Add to each record the distance of its reward, and with 1 point of its latents, from eager's.

    The latents are removed from the records. Rewards of random weights hardly depend on the
    latents: they show a wrong reward model, the latents a wrong trajectory. Return one line for
    each way beyond the tolerance; inexact rollouts are not held to it.
    """
    shared = str(ONE[0])
    latents = {r["way"]: r.pop("latents", None) for r in records}
    rewards = {r["way"]: r["rewards"][shared] for r in records if "rewards" in r}
    inexact = {way.name for way in ways(context) if way.config is FP8}
    tolerance, problems = TOLERANCES[context.dtype], []

    def check(way: str, what: str, off: float) -> float:
        if not off <= tolerance:
            problems.append(
                f"{way}: the {what} {off:.1e} off eager's, expected at most {tolerance:.0e}"
            )
        return off

    for r in records:
        way = r["way"]
        if way not in rewards or "eager" not in rewards:
            continue
        r["reward_off"] = off = abs(rewards[way] - rewards["eager"])
        if way not in inexact:
            check(way, f"reward after step {shared} is", off)
        if latents[way] is not None:
            off = harness.relative_error(latents[way], latents["eager"])
            r["latents_off"] = check(way, f"latents after step {shared} are", off)
    return problems


def run(context: Context) -> SuiteResult:
    """Measure every way at the preset's size, one after the other."""
    context.refuse_large()
    preset, blocks = context.preset, 8
    if preset.layers > WHOLE_UP_TO:
        blocks = max(1, round(blocks * FEW_LAYERS / preset.layers))
        preset = replace(preset, layers=FEW_LAYERS)
    if context.device.type == "cpu":
        preset = TINY
    blocks = min(blocks, max(1, preset.layers // 3))
    base = wan.build(preset, context).cpu()
    records, notes = [], []
    made, models = "", None
    for way in context.each(ways(context), "steps", attrgetter("name")):
        record = way.record()
        with harness.recorded_skip(record):
            if models is None or way.model != made:
                models = None  # those of the last way are freed before the next are made
                models = _models(way.model, base.to(context.device), blocks, preset, context)
                made = way.model
                base.cpu()
            with one_thread(context.device):
                record |= measure_way(way, models, preset, context)
        if "skipped" in record:
            models = None
        records.append(record)
    notes.append(
        f"{preset.layers} blocks of {context.preset.layers}, D = {preset.dim}, L = "
        f"{preset.tokens}, reward of {blocks}; random weights, all parameters train. Seconds per "
        f"gradient point of one call with gradient at {ONE[0]} or {', '.join(map(str, MANY))} of "
        f"{SOLVER_STEPS} steps; one supervised step a point; two updates of AdamW for "
        f"{split.ACCUMULATION} points. peak: above weights and optimizer states, the reference's "
        f"unused gradients of its reward included. reward off, latents off: of the reward and, "
        f"relative, of the latents after step {ONE[0]}, to eager's on the same trajectory; with "
        "random weights the reward hardly depends on the latents."
    )
    problems = compare_rewards(records, context)
    table = _table(records, notes, context)
    seconds = {r["way"]: r["seconds_per_point"] for r in records if "skipped" not in r}
    text = {"unit": "seconds per gradient point", "title": "Time of a gradient point, by part"}
    figure = split.figure({context.preset.name: seconds}, scale=1.0, **text)
    return SuiteResult([table], records, {"step.png": figure}, problems)


def _table(records: list[dict[str, Any]], notes: list[str], context: Context) -> Table:
    measured = {r["way"]: r for r in records if "skipped" not in r}
    bases = [name for name in ("reference", "eager", "compiled") if name in measured]
    body = []
    columns = ["per gradient point", *split.PARTS, "all", "without SFT", "peak"]
    columns += ["reward off", "latents off"]
    for name in bases:
        columns += [f"{name} over it", "without SFT"]
    for r in records:
        if "skipped" in r:
            body.append([r["way"], r["skipped"], *[report.BLANK] * (len(columns) - 2)])
            continue
        seconds = r["seconds_per_point"]
        line = [r["way"], *(report.seconds(seconds[part]) for part in split.PARTS)]
        line += [report.seconds(split.sum_of(seconds, *without)) for without in ((), ("SFT",))]
        line.append(report.size(r["peak_bytes"]))
        for off in (r.get("reward_off"), r.get("latents_off")):
            line.append(report.BLANK if off is None else f"{off:.1e}")
        for name in bases:
            for without in ((), ("SFT",)):
                theirs = split.sum_of(measured[name]["seconds_per_point"], *without)
                line.append(report.ratio(theirs / split.sum_of(seconds, *without)))
        body.append(line)
    target = TARGETS.get(context.preset.name)
    if target is not None:
        notes.append(
            f"Targets over the reference: {target}× with 1 point; {POINTS} points with FP8 "
            "rollout 2.5×, without SFT 3×."
        )
    return Table("prfl-step", "A PRFL step, by part", columns, body, notes)
