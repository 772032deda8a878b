"""Ways to run a rollout, and what they are run on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import world
from harness import Context, Preset
from torch import nn

import prfl_fast
from prfl_fast._extras import need
from prfl_fast.data import Batches
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.model_call import Guidance
from prfl_fast.reward import LatentRewardModel
from prfl_fast.rollout_engine import RolloutEngine, RolloutPrecision, RolloutSettings
from prfl_fast.schedulers import FlowUniPC
from prfl_fast.step import PRFL
from prfl_fast.trainer import SupervisedFlow, Trainer, TrainSettings, add_lora
from prfl_fast.trajectory import Trajectory
from suites import small_world, variance, wan
from suites.plans import MANY, SOLVER_STEPS, TINY

LORA_RANK = 16
GUIDANCE = 5.0
TRAINING_CLIPS, TRAINING_STEPS, SAMPLES = 1024, 150, 4  # of the model whose drift is measured
REWARD_BLOCKS = 2  # of the reward whose gradient is
EVERYWHERE = (0.0, 1.0)
NOISY, CLEAN = (0.8, 1.0), (0.0, 0.8)  # of 40 UniPC steps 23 lie in the first
# On a GPU, whose forwards take seconds: fewer steps, and a part of deep models. All steps
# cost the same, but for options that choose by σ.
FEW_STEPS, FEW_LAYERS, WHOLE_UP_TO = 4, 8, 30
PLAIN = "no engine"
NO_ENGINE = RolloutSettings(cache=False, compile="off")  # for a step, which always has one


@dataclass(frozen=True)
class Option:
    """A way to run the rollout.

    Attributes:
        settings: of the engine; None runs without one.
        against: the option that it is compared with.
        lora: the model has adapters. guidance: sequential or batched; None has none.
        cuda: measured on CUDA only.
    """

    settings: RolloutSettings | None
    against: str = PLAIN
    lora: bool = False
    guidance: bool | None = None
    cuda: bool = False

    @property
    def eight_bits(self) -> bool:
        """Something runs in FP8, which a CPU emulates."""
        precision = self.settings.precision if self.settings else None
        return precision is not None and precision.fp8

    @property
    def by_level(self) -> bool:
        """Steps differ in cost, by their noise level."""
        precision = self.settings.precision if self.settings else None
        if precision is None:
            return False
        return not {precision.linears, precision.attention} <= {None, EVERYWHERE}


def precise(**precision: Any) -> RolloutSettings:
    """An inexact rollout; the check runs an exact one beside the first, which is not timed."""
    return RolloutSettings(precision=RolloutPrecision(**precision, check_every=1 << 30))


OPTIONS = {
    PLAIN: Option(None),
    "caches": Option(RolloutSettings(compile="off")),
    "caches, compiled blocks": Option(RolloutSettings(compile="on"), cuda=True),
    "FP8 linears": Option(precise(linears=EVERYWHERE)),
    "FP8 attention": Option(precise(attention=EVERYWHERE)),
    "FP8 both": Option(precise(linears=EVERYWHERE, attention=EVERYWHERE)),
    f"FP8 both, σ ≥ {NOISY[0]}": Option(precise(linears=NOISY, attention=NOISY)),
    f"FP8 both, σ ≤ {CLEAN[1]}": Option(precise(linears=CLEAN, attention=CLEAN)),
    "every second step": Option(precise(stride=2)),
    "LoRA, no engine": Option(None, "LoRA, no engine", lora=True),
    "LoRA, caches": Option(RolloutSettings(compile="off"), "LoRA, no engine", lora=True),
    "LoRA merged": Option(
        RolloutSettings(merge_lora=True, compile="off"), "LoRA, no engine", lora=True
    ),
    "guidance in one batch": Option(
        RolloutSettings(compile="off"), "guidance in one batch", guidance=True
    ),
    "guidance, two calls": Option(
        RolloutSettings(compile="off"), "guidance in one batch", guidance=False
    ),
}


def options(context: Context) -> dict[str, Option]:
    """Those that the device runs."""
    cuda = context.device.type == "cuda"
    return {name: option for name, option in OPTIONS.items() if cuda or not option.cuda}


@dataclass
class Subject:
    """A patched model with and without adapters, what a rollout of it starts from, and a reward if
    gradients are asked for.
    """

    model: nn.Module
    adapted: nn.Module
    noise: torch.Tensor
    conditions: dict[str, torch.Tensor]
    negative: dict[str, torch.Tensor]
    num_steps: int
    reward: LatentRewardModel | None = None
    engines: dict[str, RolloutEngine] = field(default_factory=dict)

    def run(self, name: str, on_step: Callable[[Trajectory], object] | None = None) -> Trajectory:
        """A whole rollout of an option. The engine stays, so that only its first is checked."""
        option = OPTIONS[name]
        model = self.adapted if option.lora else self.model
        if option.settings is not None and name not in self.engines:
            self.engines[name] = RolloutEngine(model, option.settings)
        trajectory = Trajectory(
            model,
            self.noise,
            self.conditions,
            FlowUniPC(),
            self.num_steps,
            guidance=self._guidance(option),
            engine=self.engines.get(name),
        )
        with torch.no_grad():
            show = on_step or (lambda trajectory: None)
            trajectory.run(self.num_steps, lambda: show(trajectory))
        return trajectory

    def _guidance(self, option: Option) -> Guidance | None:
        if option.guidance is None:
            return None
        return Guidance(GUIDANCE, self.negative, batched=option.guidance)

    def gradient(self, name: str) -> torch.Tensor:
        """PRFL's gradient ``[P]`` after an option's rollout, at the same steps for all options: of
        all parameters, or of the adapters.
        """
        assert self.reward is not None
        option = OPTIONS[name]
        model = self.adapted if option.lora else self.model
        step = PRFL(
            model,
            self.reward,
            FlowUniPC(),
            GradientPlan.prfl(len(MANY)),
            num_steps=self.num_steps,
            weight=1.0,
            guidance=self._guidance(option),
            rollout=option.settings or NO_ENGINE,
        )
        step(self.noise, self.conditions, indices=MANY)
        return variance.flat_gradient([p for p in model.parameters() if p.requires_grad])

    def latents(self, name: str) -> dict[int, torch.Tensor]:
        """Latents by the step they lie before, of a whole rollout."""
        found: dict[int, torch.Tensor] = {}
        self.run(name, lambda t: found.__setitem__(t.index, t.x))
        return found


def with_adapters(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A patched model with low-rank adapters that are not zero."""
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
    """Sizes of the model that is timed, and the solver steps of its rollout."""
    if context.device.type == "cpu":
        return TINY, SOLVER_STEPS
    preset = context.preset
    if preset.layers > WHOLE_UP_TO:
        preset = replace(preset, layers=FEW_LAYERS)
    return preset, FEW_STEPS


def subject(context: Context) -> Subject:
    """Random weights at the size that is timed."""
    preset, num_steps = timed_size(context)

    def build() -> nn.Module:
        return wan.build(preset, context).requires_grad_(False)

    conditions = wan.conditions(preset, context)
    negative = {k: torch.zeros_like(v) for k, v in conditions.items()}
    return Subject(
        prfl_fast.patch(build()),
        with_adapters(build, context.seed),
        wan.latents(preset, context),
        conditions,
        negative,
        num_steps,
    )


def train_tiny(context: Context) -> nn.Module:
    """The small world's generator with heads of 32 channels, which FP8 attention takes, trained
    briefly by flow matching.
    """
    torch.manual_seed(context.seed)
    model = need("diffusers", "bench").WanTransformer3DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        ffn_dim=256,
        num_layers=4,
        text_dim=world.TEXT_DIM,
        freq_dim=64,
        rope_max_seq_len=32,
    )
    model.to(context.device)
    samples = small_world.Clips.make(TRAINING_CLIPS, 1000).samples()
    objective = SupervisedFlow(model, Batches(samples, 32, context.seed), shift=3.0)
    settings = TrainSettings(
        TRAINING_STEPS, learning_rate=2e-3, betas=(0.9, 0.99), warmup_steps=20, seed=context.seed
    )
    with context.bar(TRAINING_STEPS, "generator") as bar:
        Trainer(
            model, {"sft": objective}, settings, on_step=small_world.progress(bar, loss="sft/loss")
        ).run()
    return model.requires_grad_(False)


def trained_subject(context: Context) -> Subject:
    """The trained tiny model on held-out prompts."""
    model = train_tiny(context)
    weights = model.state_dict()

    def build() -> nn.Module:
        twin = type(model).from_config(model.config).to(context.device)  # type: ignore[attr-defined]
        twin.load_state_dict(weights)
        return wan.mixed(twin, context.dtype).requires_grad_(False)

    held_out = small_world.Clips.make(SAMPLES, 999_000)
    text = held_out.text.to(context.device, context.dtype)
    patched = prfl_fast.patch(build())
    torch.manual_seed(context.seed)
    reward = LatentRewardModel.from_backbone(patched, num_blocks=REWARD_BLOCKS).freeze()
    noise = torch.randn(held_out.latents.shape, generator=torch.Generator().manual_seed(5))
    return Subject(
        patched.requires_grad_(True),
        with_adapters(build, context.seed),
        noise.to(context.device),
        {"encoder_hidden_states": text},
        {"encoder_hidden_states": torch.zeros_like(text)},
        SOLVER_STEPS,
        reward,
    )
