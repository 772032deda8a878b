"""Define the training methods of the family suite and run any of them.

All train the same tiny generator with the same frozen rewards (``experiments.small_world``) for the
same number of reward updates; where a paper pairs its reward with a loss on real data, each reward
update is followed by one of that.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import harness
import torch
from torch import nn

from experiments import small_world, world
from experiments.small_world import Start
from prfl_fast import PRFL, FlowEuler, GradientPlan
from prfl_fast.data import Batch, Batches, Pair
from prfl_fast.feedback import Point
from prfl_fast.models.velocity import bind_velocity
from prfl_fast.rewards import PixelReward
from prfl_fast.rollout import Sampler, Trajectory
from prfl_fast.training import FlowDPO, FlowRWR, RewardFeedback, add_lora, consistency_loss
from prfl_fast.training.losses import ConsistencyConfig

# What a method's gradient raises: rewards along the sampler, of its result, or of its pixels.
Goal = Literal["along", "end", "pixel"]
# Losses on clips: supervised flow matching, Flow-DPO on pairs of a good and a defective one, and
# Flow-RWR, supervised flow matching weighted by the latent reward.
DataLoss = Literal["sft", "dpo", "rwr"]


@dataclass(frozen=True)
class Settings(small_world.ArmSettings):
    """Set the sizes of the experiment; the defaults fit about six minutes of two CPU cores."""

    sft_batch: int = 32
    lora_rank: int = 8
    lora_rate: float = 2e-3
    # As in experiments.alignment: at the paper's 0.1 SFT's gradient hides the latent reward's, and
    # the pixel reward's is larger.
    latent_weight: float = 3.0
    pixel_weight: float = 0.1
    few_steps: int = 4
    rwr_temperature: float = 0.25
    # Prompts that every sampling user takes, see experiments.family_sampling.
    users: int = 128


@dataclass(frozen=True)
class Method:
    """Describe a way to train on from the common generator.

    Attributes:
        label: for tables. plan: None is the loss on clips alone.
        group: the panel its curve is drawn in.
        sft: each reward update is followed by one of the loss on clips. data: that loss.
        goal: which measured reward its gradient raises.
        rewards: which are asked. levels: steps of the plan's schedule, those of the sampler unless
            given. shift: of that schedule.
        lora: adapters train instead of the weights; divergence: from the weights without them.
        distilled: a consistency loss in the same update; sampled in few steps.
    """

    label: str
    plan: GradientPlan | None
    group: str
    sft: bool = False
    goal: Goal = "end"
    rewards: tuple[str, ...] = ("latent",)
    levels: int | None = None
    shift: float = 5.0
    lora: bool = False
    divergence: float = 0.0
    distilled: bool = False
    data: DataLoss = "sft"

    @property
    def rewarded(self) -> bool:
        """Return True if the method sees a reward or labels."""
        return self.plan is not None or self.data != "sft"


PROCESS, LATE, DATA = "Along the sampler", "Its last steps", "From real data"
PREFERRED = "Preferences"
# Formatted by hand as a table: ruff would put each argument on a line of its own.
# fmt: off
METHODS = {
    "sft": Method("SFT only", None, ""),
    "prfl1": Method("PRFL, 1 point + SFT", GradientPlan.prfl(), PROCESS, True, "along"),
    "prfl5": Method("PRFL, 5 points + SFT", GradientPlan.prfl(5), PROCESS, True, "along"),
    "lora": Method(
        "PRFL, 5 points, LoRA + SFT", GradientPlan.prfl(5), PROCESS, True, "along", lora=True
    ),
    "divergence": Method(
        "PRFL, 5 points, LoRA, divergence penalty + SFT", GradientPlan.prfl(5), PROCESS, True,
        "along", lora=True, divergence=1.0,
    ),
    # A pixel reward reads clean frames, so both rewards read the estimate of x0.
    "two": Method(
        "PRFL, 5 points at x̂0, latent and pixel reward + SFT",
        GradientPlan(points=5, window=(0, None), reward_at="clean"), PROCESS, True,
        rewards=("latent", "pixel"),
    ),
    "refl": Method(
        "ReFL, pixel reward + SFT", GradientPlan.refl(), LATE, True, "pixel", ("pixel",),
    ),
    "draft1": Method("DRaFT-1", GradientPlan.draft(), LATE),
    "draftk": Method("DRaFT-4", GradientPlan.draft(4), LATE),
    "draftlv": Method("DRaFT-LV", GradientPlan.draft_lv(), LATE),
    "alignprop": Method("AlignProp", GradientPlan.alignprop(), LATE),
    "controlnet": Method(
        "ControlNet++ reward + SFT", GradientPlan.controlnet_plus_plus(), DATA, True,
        levels=1000, shift=1.0,
    ),
    # One latent frame shows no motion: this world's reward reads the clip as a whole.
    "instruct": Method("InstructVideo", GradientPlan.instruct_video(segments=None), DATA),
    "rglcd": Method("RG-LCD", GradientPlan.rg_lcd(), DATA, levels=50, distilled=True),
    "dpo": Method("Flow-DPO", None, PREFERRED, data="dpo"),
    "rwr": Method("Flow-RWR", None, PREFERRED, data="rwr"),
    "prfl_dpo": Method(
        "PRFL, 5 points + Flow-DPO", GradientPlan.prfl(5), PREFERRED, True, "along", data="dpo"
    ),
    "prfl_rwr": Method(
        "PRFL, 5 points + Flow-RWR", GradientPlan.prfl(5), PREFERRED, True, "along", data="rwr"
    ),
}
# fmt: on


class RewardedDistillation:
    """Run RG-LCD's update: the reward of the student's one-step output, and a consistency loss.

    The target is a running average of the student, which starts as the teacher, taken at the start
    of each update (arXiv 2403.11027: 0.95).
    """

    def __init__(
        self, feedback: RewardFeedback, student: nn.Module, teacher: nn.Module, batches: Batches
    ) -> None:
        self.feedback, self.batches = feedback, batches
        self.student, self.teacher = student, teacher
        self.target = copy.deepcopy(teacher).requires_grad_(False)

    def __call__(self, draw: int, generator: torch.Generator, loss_scale: float) -> Any:
        with torch.no_grad():
            pairs = zip(self.target.parameters(), self.student.parameters(), strict=True)
            for average, value in pairs:
                average.lerp_(value, 0.05)
        metrics = dict(self.feedback(draw, generator, loss_scale))
        loss = self.distill(self.batches[draw].to(self.feedback.device), generator)
        (loss * loss_scale).backward()
        return {**metrics, "loss": metrics["loss"] + loss.detach(), "distill": loss.detach()}

    def distill(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        models = (self.student, self.target, self.teacher)
        given = {"generator": generator, "config": ConsistencyConfig(integer_timesteps=False)}
        return consistency_loss(*models, batch.latents, batch.conditions, **given)


def make_step(method: Method, start: Start, model: nn.Module, s: Settings) -> PRFL:
    known = {"latent": start.reward, "pixel": PixelReward(world.decode, start.pixel)}
    weights = {"latent": s.latent_weight, "pixel": s.pixel_weight}
    return PRFL(
        model,
        {name: known[name] for name in method.rewards},
        FlowEuler(shift=method.shift),
        method.plan,
        num_inference_steps=method.levels or s.solver_steps,
        weight=1.0,
        reward_weights={name: weights[name] for name in method.rewards},
        divergence=method.divergence,
    )


@torch.no_grad()
def sample_few(
    model: nn.Module,
    start: Start,
    conditions: dict[str, torch.Tensor],
    noise: torch.Tensor,
    steps: int,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample by consistency in few steps: an estimate of x0 per level, noised anew for the next.

    Returns latents, and rewards of the noised ones, ``[steps - 1, B]``.
    """
    generator = torch.Generator().manual_seed(seed)
    levels = Trajectory(Sampler(model, FlowEuler(), steps), noise, conditions)
    scores, clean = [], noise
    for index in range(steps):
        if index:
            sigma = levels.sigma(index)
            fresh = torch.randn(noise.shape, generator=generator).to(noise.device)
            levels.x = (1 - sigma) * clean + sigma * fresh
            levels.index = index
            scores.append(start.reward(levels.x, levels.model_timestep(index), conditions))
        clean = levels.x - levels.sigma(index) * levels.velocity()
    return clean, torch.stack(scores)


def measure(
    model: nn.Module, start: Start, method: Method, s: Settings, seed: int
) -> dict[str, torch.Tensor]:
    """Return rewards and motion of the held-out prompts' clips, ``[B]`` each."""
    noise = small_world.held_out_noise(start, 1000 + seed)
    text = start.conditions
    if method.distilled:
        latents, along = sample_few(model, start, text, noise, s.few_steps, 2000 + seed)
    else:
        latents, along = small_world.sample(model, start.reward, text, noise, s.solver_steps)
    return {"along": along.mean(0).cpu(), **small_world.judge(start, latents, text)}


@torch.no_grad()
def moved(model: nn.Module, start: Start) -> float:
    """Return ‖v - v₀‖ / ‖v₀‖ of a model's velocity against the start's, on noised real clips."""
    generator = torch.Generator().manual_seed(0)
    latents, text = start.clips.latents[:64], start.clips.text[:64]
    sigma = (torch.arange(len(latents)) + 0.5).view(-1, 1, 1, 1, 1) / len(latents)
    noise = torch.randn(latents.shape, generator=generator)
    x = ((1 - sigma) * latents + sigma * noise).to(next(model.parameters()).device)
    timestep = 1000 * sigma.flatten().to(x.device)
    conditions = {"encoder_hidden_states": text.to(x.device)}
    velocities = (bind_velocity(net, x, conditions, "x") for net in (model, start.generator))
    return harness.relative_error(*(velocity(x, timestep, conditions) for velocity in velocities))


def stated_cost(
    step: PRFL, call: Callable[..., object], batch: Batch, device: torch.device
) -> dict[str, float]:
    """Return the cost of a reward update.

    Args:
        call: runs the update on a batch from given gradient points.

    Returns:
        ``forwards``: of the generator, a sample, expected over the plan's draws; recomputed ones
        not counted. ``flops`` of a sample, likewise. ``peak_bytes`` of the whole batch at the
        costliest draw.
    """
    plan, levels = step.plan, step.sampler.num_inference_steps
    alone = plan.start == "data" and plan.strength is None
    kinds: dict[tuple[int, int], tuple[float, tuple[Point, ...]]] = {}
    for probability, points in plan.outcomes(levels):
        depth = sum(point.depth for point in points)
        forwards = depth if alone else points[-1].step + 1 - plan.begin(levels)
        kind = (forwards + plan.renoised, depth)
        share = kinds[kind][0] if kind in kinds else 0.0
        kinds[kind] = (share + float(probability), points)
    flops = {
        kind: harness.count_flops(partial(call, _single(batch), points))
        for kind, (_, points) in kinds.items()
    }
    _, dearest = kinds[max(kinds, key=lambda kind: flops[kind])]
    return {
        "forwards": sum(share * kind[0] for kind, (share, _) in kinds.items()),
        "flops": sum(share * flops[kind] for kind, (share, _) in kinds.items()),
        "peak_bytes": harness.peak_bytes(partial(call, batch, dearest), device),
    }


def _single(batch: Batch) -> Batch:
    return Batch(batch.latents[:1], {k: v[:1] for k, v in batch.conditions.items()}, [])


def data_loss(method: Method, start: Start, model: nn.Module, s: Settings, seed: int) -> Any:
    """Return the objective of a method's loss on clips; a pair counts as two clips."""
    samples = start.clips.samples()
    if method.data == "dpo":
        good, bad = ([x for x in samples if x.labels[small_world.LABEL] == k] for k in (1, 0))
        pairs = [Pair(win, lose) for win, lose in zip(good, bad, strict=False)]
        batches = Batches(pairs, s.sft_batch // 2, seed)
        reference = start.generator
        return FlowDPO(model, batches, reference=reference, integer_timesteps=False)
    batches = Batches(samples, s.sft_batch, seed)
    if method.data == "rwr":
        options: Any = {"temperature": s.rwr_temperature, "integer_timesteps": False}
        return FlowRWR(model, batches, start.reward, **options)
    return small_world.Supervised(model, batches)


def run_arm(start: Start, s: Settings, name: str, seed: int) -> dict[str, Any]:
    """Train one method from the common start: its cost, and what is measured at checkpoints."""
    method = METHODS[name]
    torch.manual_seed(seed)
    model, device = small_world.copy_generator(start)
    if method.lora:
        add_lora(model, s.lora_rank)
    data = Batches(start.clips.samples(), s.feedback_batch, 10 * seed + 2)
    first: Any = data_loss(method, start, model, s, 10 * seed + 2)
    if method.plan is not None:
        first = RewardFeedback(make_step(method, start, model, s), data, device)
    if method.distilled:
        first = RewardedDistillation(first, model, start.generator, data)
    objectives = {"first": first}
    if method.sft or method.plan is None:
        objectives["second"] = data_loss(method, start, model, s, 10 * seed + 1)
    points: list[dict[str, float]] = []
    found: dict[str, torch.Tensor] = {}

    def check(update: int) -> None:
        nonlocal found
        found = measure(model, start, method, s, seed)
        points.append({"update": update, **{k: float(v.mean()) for k, v in found.items()}})

    cost = _cost(method, start, model, s, data[0].to(device), objectives)
    check(0)
    before = found
    rate = s.lora_rate if method.lora else None
    skipped, seconds = small_world.train_arm(model, objectives, s, seed, check, rate)
    record = {"arm": name, "seed": seed, "points": points, "skipped": skipped}
    record |= {"cost": {**cost, "seconds": seconds / s.updates}, "moved": moved(model, start)}
    return record | {"before": before, "after": found}


def _cost(
    method: Method,
    start: Start,
    model: nn.Module,
    s: Settings,
    batch: Batch,
    objectives: dict[str, Any],
) -> dict[str, float]:
    """Return the cost of a reward update, and the FLOPs of its round, data loss included."""
    device = batch.latents.device
    generator = torch.Generator().manual_seed(0)

    # A gradient that is not there yet is part of what an update allocates, so none is left behind.
    def supervise() -> None:
        objectives["second"](0, generator, 1.0)
        model.zero_grad(set_to_none=True)

    try:
        data_flops = harness.count_flops(supervise) if "second" in objectives else 0.0
        if method.plan is None:
            peak = harness.peak_bytes(supervise, device)
            return {"forwards": 1.0, "peak_bytes": peak, "round_flops": 2 * data_flops}
        step = make_step(method, start, model, s)
        real = method.plan.start == "data"

        def call(batch: Batch, points: tuple[Point, ...]) -> None:
            noise = torch.randn(batch.latents.shape, generator=generator).to(device)
            latents = batch.latents if real else None
            step(noise, batch.conditions, latents=latents, generator=generator, indices=points)
            if method.distilled:
                objectives["first"].distill(batch, generator).backward()
            model.zero_grad(set_to_none=True)

        cost = stated_cost(step, call, batch, device)
        cost["round_flops"] = cost.pop("flops") * s.feedback_batch + data_flops
        return cost
    finally:
        model.zero_grad(set_to_none=True)
