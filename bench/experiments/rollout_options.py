"""Define the options of a rollout and the models they run on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from harness import Context, Preset
from method_specs import MANY, SOLVER_STEPS, TINY
from suites import wan
from torch import nn

import prfl_fast
from experiments import small_world, variance
from prfl_fast import PRFL, FlowUniPC, GradientPlan, Guidance, LatentRewardModel, RolloutConfig
from prfl_fast.models import use_fp8_linears
from prfl_fast.rollout import RolloutEngine, Sampler, Trajectory
from prfl_fast.training import add_lora

LORA_RANK = 16
GUIDANCE = 5.0
SAMPLES = 4  # of the model whose drift is measured
REWARD_BLOCKS = 2  # of the reward whose gradient is
EVERYWHERE = (0.0, 1.0)
NOISY, CLEAN = (0.8, 1.0), (0.0, 0.8)  # of 40 UniPC steps 23 lie in the first
# On a GPU, whose forwards take seconds: fewer steps, and a part of deep models. All steps
# cost the same, but for options that choose by σ.
FEW_STEPS, FEW_LAYERS, WHOLE_UP_TO = 4, 8, 30
TEACACHE = (0.05, 0.1, 0.2, 0.4)  # thresholds, without coefficients
FIRST_BLOCK = (0.02, 0.05, 0.1, 0.2)
DENSITIES = (0.5, 0.25)  # of the attention
STRIDES = ((0.9, 1.0, 8), (0.7, 0.9, 4), (0.0, 0.7, 2))
PLAIN = "no engine"
NO_ENGINE = RolloutConfig(cache=False, compile="off")  # for a step, which always has one


@dataclass(frozen=True)
class Option:
    """Describe a way to run the rollout.

    Attributes:
        config: of the engine; None runs without one.
        against: the option that it is compared with.
        lora: the model has adapters. guidance: True batches both branches, False
            calls the model twice, None has no guidance.
        cuda: measured on CUDA only.
        fp8_steps: the steps with gradient run their linear layers in FP8.
    """

    config: RolloutConfig | None
    against: str = PLAIN
    lora: bool = False
    guidance: bool | None = None
    cuda: bool = False
    fp8_steps: bool = False

    @property
    def eight_bits(self) -> bool:
        """Return True if a layer runs in FP8."""
        return self.config is not None and self.config.fp8

    @property
    def by_level(self) -> bool:
        """Return True if the cost of a step depends on its noise level."""
        if self.config is None:
            return False
        uneven = not isinstance(self.config.stride, int) or self.config.guidance_interval
        if self.config.reuses or uneven:
            return True
        return not {self.config.fp8_linears, self.config.fp8_attention} <= {None, EVERYWHERE}


def inexact(**options: Any) -> RolloutConfig:
    """Return an inexact configuration; its drift is checked in the first, untimed rollout only."""
    return RolloutConfig(**options, check_every=1 << 30)


CACHES = RolloutConfig(compile="off")
OPTIONS = {
    PLAIN: Option(None),
    "caches": Option(CACHES),
    "caches, compiled blocks": Option(RolloutConfig(compile="on"), cuda=True),
    "FP8 linears": Option(inexact(fp8_linears=EVERYWHERE)),
    "FP8 attention": Option(inexact(fp8_attention=EVERYWHERE)),
    "FP8 both": Option(inexact(fp8_linears=EVERYWHERE, fp8_attention=EVERYWHERE)),
    f"FP8 both, σ ≥ {NOISY[0]}": Option(inexact(fp8_linears=NOISY, fp8_attention=NOISY)),
    f"FP8 both, σ ≤ {CLEAN[1]}": Option(inexact(fp8_linears=CLEAN, fp8_attention=CLEAN)),
    **{f"sparse, {d:.0%}": Option(inexact(sparse_attention=d)) for d in DENSITIES},
    "every second step": Option(inexact(stride=2)),
    "every fourth step": Option(inexact(stride=4)),
    **{
        f"every {word} step, order {order}": Option(inexact(stride=stride, solver_order=order))
        for word, stride in (("second", 2), ("fourth", 4))
        for order in (1, 3)
    },
    "strides by σ": Option(inexact(stride=STRIDES)),
    "strides by σ, FP8 attention": Option(inexact(stride=STRIDES, fp8_attention=EVERYWHERE)),
    "strides by σ, FP8 both": Option(
        inexact(stride=STRIDES, fp8_linears=EVERYWHERE, fp8_attention=EVERYWHERE)
    ),
    **{f"TeaCache {limit:g}": Option(inexact(teacache=limit)) for limit in TEACACHE},
    **{f"first block {limit:g}": Option(inexact(first_block_cache=limit)) for limit in FIRST_BLOCK},
    "LoRA, no engine": Option(None, "LoRA, no engine", lora=True),
    "LoRA, caches": Option(CACHES, "LoRA, no engine", lora=True),
    "LoRA merged": Option(replace(CACHES, merge_lora=True), "LoRA, no engine", lora=True),
    "FP8 gradient steps": Option(None, fp8_steps=True),
    "LoRA, FP8 gradient steps": Option(None, "LoRA, no engine", lora=True, fp8_steps=True),
    "guidance in one batch": Option(CACHES, "guidance in one batch", guidance=True),
    "guidance, two calls": Option(CACHES, "guidance in one batch", guidance=False),
    "guidance, σ ≤ 0.97": Option(
        inexact(guidance_interval=(0.0, 0.97)), "guidance in one batch", guidance=True
    ),
}


def options(context: Context) -> dict[str, Option]:
    cuda = context.device.type == "cuda"
    return {name: option for name, option in OPTIONS.items() if cuda or not option.cuda}


@dataclass
class Subject:
    """Hold a patched model with and without adapters, rollout inputs, and perhaps a reward."""

    model: nn.Module
    adapted: nn.Module
    noise: torch.Tensor
    conditions: dict[str, torch.Tensor]
    num_inference_steps: int
    reward: LatentRewardModel | None = None
    engines: dict[str, RolloutEngine] = field(default_factory=dict)
    checked: dict[tuple[str, Sequence[int]], RolloutEngine] = field(default_factory=dict)

    @cached_property
    def negative(self) -> dict[str, torch.Tensor]:
        """Return the conditions of guidance, made once: not part of a rollout's peak."""
        return {k: torch.zeros_like(v) for k, v in self.conditions.items()}

    def run(self, name: str, on_step: Callable[[Trajectory], object] | None = None) -> Trajectory:
        """Run a whole rollout of an option; keep the engine, so that only its first is checked."""
        option = OPTIONS[name]
        model = self.adapted if option.lora else self.model
        if option.config is not None and name not in self.engines:
            self.engines[name] = RolloutEngine(model, option.config)
        guidance = self._guidance(option)
        sampler = Sampler(model, FlowUniPC(), self.num_inference_steps, guidance=guidance)
        engine = self.engines.get(name)
        trajectory = Trajectory(sampler, self.noise, self.conditions, engine=engine)
        with torch.no_grad():
            show = on_step or (lambda trajectory: None)
            trajectory.run(self.num_inference_steps, lambda: show(trajectory))
        return trajectory

    def _guidance(self, option: Option) -> Guidance | None:
        if option.guidance is None:
            return None
        return Guidance(GUIDANCE, self.negative, batched=option.guidance)

    def gradient(self, name: str) -> torch.Tensor:
        """Return PRFL's gradient ``[P]`` after an option's rollout, at the same steps for all."""
        self.feedback(name, MANY)
        model = self.adapted if OPTIONS[name].lora else self.model
        return variance.flat_gradient([p for p in model.parameters() if p.requires_grad])

    def feedback(self, name: str, steps: Sequence[int]) -> None:
        """Run a PRFL step with gradient at some steps, and keep the engine of its rollouts."""
        assert self.reward is not None
        option = OPTIONS[name]
        model = self.adapted if option.lora else self.model
        options: Any = {"guidance": self._guidance(option), "weight": 1.0}
        options |= {"num_inference_steps": self.num_inference_steps}
        options["rollout"] = option.config or NO_ENGINE
        step = PRFL(model, self.reward, FlowUniPC(), GradientPlan.prfl(len(steps)), **options)
        use_fp8_linears(model, option.fp8_steps)
        step(self.noise, self.conditions, indices=steps)
        use_fp8_linears(model, False)
        self.checked[name, steps] = step.engine

    def in_prfl(self, name: str) -> dict[str, Any]:
        """Return the drift of PRFL's rollouts with an option, and the forwards that it reused.

        Of the plan's draws the first, the typical and the last run. The drift is what the engine's
        check finds, the largest of all steps.
        """
        outcomes = GradientPlan.prfl(len(MANY)).outcomes(self.num_inference_steps)
        first, last = (
            tuple(point.step for point in points) for _, points in (outcomes[0], outcomes[-1])
        )
        draws = dict.fromkeys((first, MANY, last))
        for steps in draws:
            if (name, steps) not in self.checked:
                self.feedback(name, steps)
        self.model.zero_grad()
        engines = [self.checked[name, steps] for steps in draws]
        drifts = [max((engine.drift or {0: 0.0}).values()) for engine in engines]
        return {
            "drift": max(drifts),
            "forwards": sum(engine.reuse.forwards for engine in engines),
            "saved": sum(engine.reuse.saved for engine in engines),
            "blocks": len(self.model.blocks),
        }

    def latents(self, name: str) -> dict[int, torch.Tensor]:
        """Return the latents of a whole rollout by the step they lie before."""
        found: dict[int, torch.Tensor] = {}
        self.run(name, lambda t: found.__setitem__(t.index, t.x))
        return found


def with_adapters(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return a patched model with low-rank adapters that are not zero."""
    model = build()
    add_lora(model, LORA_RANK)
    prfl_fast.patch(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                values = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.copy_(values)
    return model


def timed_size(context: Context) -> tuple[Preset, int]:
    """Return sizes of the model that is timed, and the solver steps of its rollout."""
    if context.device.type == "cpu":
        return TINY, SOLVER_STEPS
    preset = context.preset
    if preset.layers > WHOLE_UP_TO:
        preset = replace(preset, layers=FEW_LAYERS)
    return preset, FEW_STEPS


def subject(context: Context) -> Subject:
    """Return models with random weights at the size that is timed."""
    preset, num_inference_steps = timed_size(context)

    def build() -> nn.Module:
        return wan.build(preset, context).requires_grad_(False)

    conditions = wan.conditions(preset, context)
    models = prfl_fast.patch(build()), with_adapters(build, context.seed)
    return Subject(*models, wan.latents(preset, context), conditions, num_inference_steps)


def trained_subject(context: Context) -> Subject:
    """Return the small world's generator on held-out prompts."""
    weights = small_world.read_models(context.device)[0].state_dict()

    def build() -> nn.Module:
        twin = small_world.build().to(context.device)
        twin.load_state_dict(weights)
        return wan.mixed(twin, context.dtype).requires_grad_(False)

    held_out = small_world.Clips.make(SAMPLES, 999_000)
    text = held_out.text.to(context.device, context.dtype)
    patched = prfl_fast.patch(build())
    torch.manual_seed(context.seed)
    reward = LatentRewardModel.from_backbone(patched, num_blocks=REWARD_BLOCKS).freeze()
    noise = torch.randn(held_out.latents.shape, generator=torch.Generator().manual_seed(5))
    models = patched.requires_grad_(True), with_adapters(build, context.seed)
    conditions = {"encoder_hidden_states": text}
    return Subject(*models, noise.to(context.device), conditions, SOLVER_STEPS, reward)
