"""Define the options of a rollout and the models they run on."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from harness import Context, Preset
from method_specs import MANY, SOLVER_STEPS, TINY
from suites import wan
from torch import nn

import prfl_fast
from experiments import small_world, variance, world
from prfl_fast.data.dataset import Batches
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.engine import RolloutEngine
from prfl_fast.rollout.guidance import Guidance
from prfl_fast.rollout.sampler import Sampler
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.rollout.trajectory import Trajectory
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.lora import add_lora
from prfl_fast.training.objectives import SupervisedFlow
from prfl_fast.utils.optional import need

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
NO_ENGINE = RolloutConfig(cache=False, compile="off")  # for a step, which always has one


@dataclass(frozen=True)
class Option:
    """A way to run the rollout.

    Attributes:
        settings: of the engine; None runs without one.
        against: the option that it is compared with.
        lora: the model has adapters. guidance: sequential or batched; None has none.
        cuda: measured on CUDA only.
    """

    settings: RolloutConfig | None
    against: str = PLAIN
    lora: bool = False
    guidance: bool | None = None
    cuda: bool = False

    @property
    def eight_bits(self) -> bool:
        """Something runs in FP8, which a CPU emulates."""
        return self.settings is not None and self.settings.fp8

    @property
    def by_level(self) -> bool:
        """Steps differ in cost, by their noise level."""
        if self.settings is None:
            return False
        return not {self.settings.fp8_linears, self.settings.fp8_attention} <= {None, EVERYWHERE}


def precise(**options: Any) -> RolloutConfig:
    """Return an inexact rollout whose drift is checked in its first, untimed step only."""
    return RolloutConfig(**options, check_every=1 << 30)


OPTIONS = {
    PLAIN: Option(None),
    "caches": Option(RolloutConfig(compile="off")),
    "caches, compiled blocks": Option(RolloutConfig(compile="on"), cuda=True),
    "FP8 linears": Option(precise(fp8_linears=EVERYWHERE)),
    "FP8 attention": Option(precise(fp8_attention=EVERYWHERE)),
    "FP8 both": Option(precise(fp8_linears=EVERYWHERE, fp8_attention=EVERYWHERE)),
    f"FP8 both, σ ≥ {NOISY[0]}": Option(precise(fp8_linears=NOISY, fp8_attention=NOISY)),
    f"FP8 both, σ ≤ {CLEAN[1]}": Option(precise(fp8_linears=CLEAN, fp8_attention=CLEAN)),
    "every second step": Option(precise(stride=2)),
    "LoRA, no engine": Option(None, "LoRA, no engine", lora=True),
    "LoRA, caches": Option(RolloutConfig(compile="off"), "LoRA, no engine", lora=True),
    "LoRA merged": Option(
        RolloutConfig(merge_lora=True, compile="off"), "LoRA, no engine", lora=True
    ),
    "guidance in one batch": Option(
        RolloutConfig(compile="off"), "guidance in one batch", guidance=True
    ),
    "guidance, two calls": Option(
        RolloutConfig(compile="off"), "guidance in one batch", guidance=False
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
    num_inference_steps: int
    reward: LatentRewardModel | None = None
    engines: dict[str, RolloutEngine] = field(default_factory=dict)

    def run(self, name: str, on_step: Callable[[Trajectory], object] | None = None) -> Trajectory:
        """Run a whole rollout of an option; keep the engine, so that only its first is checked."""
        option = OPTIONS[name]
        model = self.adapted if option.lora else self.model
        if option.settings is not None and name not in self.engines:
            self.engines[name] = RolloutEngine(model, option.settings)
        trajectory = Trajectory(
            Sampler(model, FlowUniPC(), self.num_inference_steps, guidance=self._guidance(option)),
            self.noise,
            self.conditions,
            engine=self.engines.get(name),
        )
        with torch.no_grad():
            show = on_step or (lambda trajectory: None)
            trajectory.run(self.num_inference_steps, lambda: show(trajectory))
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
            num_inference_steps=self.num_inference_steps,
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
    """Sizes of the model that is timed, and the solver steps of its rollout."""
    if context.device.type == "cpu":
        return TINY, SOLVER_STEPS
    preset = context.preset
    if preset.layers > WHOLE_UP_TO:
        preset = replace(preset, layers=FEW_LAYERS)
    return preset, FEW_STEPS


def subject(context: Context) -> Subject:
    """Random weights at the size that is timed."""
    preset, num_inference_steps = timed_size(context)

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
        num_inference_steps,
    )


def train_tiny(context: Context) -> nn.Module:
    """Train the small world's generator briefly, with heads of 32 channels for FP8 attention."""
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
    settings = TrainConfig(
        TRAINING_STEPS, learning_rate=2e-3, betas=(0.9, 0.99), warmup_steps=20, seed=context.seed
    )
    with context.bar(TRAINING_STEPS, "generator") as bar:
        Trainer(
            model, {"sft": objective}, settings, on_step=small_world.progress(bar, loss="sft/loss")
        ).run()
    return model.requires_grad_(False)


def trained_subject(context: Context) -> Subject:
    """Return the trained tiny model on held-out prompts."""
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
