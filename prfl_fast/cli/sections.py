"""Sections of the YAML files; :mod:`prfl_fast.cli.config` has the files.

``prfl-fast init`` and docs/configuration.md show each description.
"""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self  # noqa: UP035 - Python 3.10 has none

from prfl_fast.cli.yaml_config import (
    Count,
    Fraction,
    Index,
    NonNegative,
    Number,
    Positive,
    Section,
    Text,
    from_list,
    key,
    on_or_off,
)
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.memory.optimizers import GradientDtype, OptimizerKind
from prfl_fast.memory.policy import ActivationCheckpointing, MemoryConfig, Offload
from prfl_fast.memory.quantized import WeightDtype
from prfl_fast.models.sparse_attention import Predictor
from prfl_fast.models.step_cache import TeaCacheModel
from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import Schedule
from prfl_fast.training.lora import DEFAULT_TARGETS
from prfl_fast.training.preferences import BETA
from prfl_fast.training.schedules import ScheduleName
from prfl_fast.utils.checks import check

Level = Annotated[Number, Field(ge=0, le=1)]
Interval = Annotated[tuple[Level, Level], from_list]
Strides = Annotated[
    tuple[Annotated[tuple[Level, Level, Count], from_list], ...], Field(min_length=1), from_list
]
Order = Annotated[int, Field(ge=1, le=3)]
Orders = Annotated[
    tuple[Annotated[tuple[Level, Level, Order], from_list], ...], Field(min_length=1), from_list
]
Share = Annotated[Number, Field(gt=0, le=1)]
Densities = Annotated[
    tuple[Annotated[tuple[Level, Level, Share], from_list], ...], Field(min_length=1), from_list
]
Beta = Annotated[Number, Field(ge=0, lt=1)]
Decay = Annotated[Number, Field(gt=0, lt=1)]
Method = Literal[
    "prfl", "refl", "draft", "draft-lv", "alignprop", "controlnet++", "instructvideo", "rg-lcd"
]
# Constructors of GradientPlan, and the keys of the prfl section that are their arguments.
_METHODS: dict[str, tuple[Callable[..., GradientPlan], dict[str, str]]] = {
    "prfl": (GradientPlan.prfl, {"points": "points", "draws": "draws"}),
    "refl": (GradientPlan.refl, {"window": "window"}),
    "draft": (GradientPlan.draft, {"depth": "steps"}),
    "draft-lv": (GradientPlan.draft_lv, {"renoised": "renoised"}),
    "alignprop": (GradientPlan.alignprop, {"depth": "most"}),
    "controlnet++": (GradientPlan.controlnet_plus_plus, {"window": "window"}),
    "instructvideo": (
        GradientPlan.instruct_video,
        {"depth": "steps"} | {name: name for name in ("strength", "segments", "attenuation")},
    ),
    "rg-lcd": (GradientPlan.rg_lcd, {}),
}
_METHOD_KEYS = sorted({key for _, keys in _METHODS.values() for key in keys})


class ExpertsSection(Section):
    """Two transformers for high and low noise, as Wan2.2 A14B has."""

    high: Text = key(..., "Folder or file of the transformer for high noise.")
    low: Text = key(..., "Folder or file of the transformer for low noise.")
    boundary: Annotated[Number, Field(gt=0, lt=1)] = key(
        ..., "Timestep / 1000 from which on high runs: 0.875 of T2V-A14B, 0.9 of I2V-A14B."
    )


class OptimizerSection(Section):
    """AdamW, whose implementation memory.optimizer chooses."""

    learning_rate: Positive | None = key(
        None, "Learning rate after the warmup; null is 5e-6, or 1e-4 with lora."
    )
    betas: Annotated[tuple[Beta, Beta], from_list] = key(
        (0.9, 0.999), "Decay rates of the first and second moment."
    )
    eps: Positive = key(1e-8, "Added to the root of the second moment.")
    weight_decay: NonNegative = key(0.01, "Decoupled weight decay.")
    max_grad_norm: Positive | None = key(
        1.0, "Largest L2 norm of all gradients together; null turns clipping off."
    )
    schedule: ScheduleName = key(
        "constant",
        "Learning rate after the warmup: constant, or a schedule of diffusers down to 0 at "
        "run.steps, which a resumed run must repeat. With its defaults, cosine_with_restarts has "
        "one cycle, and polynomial has power 1 and ends at 1e-7.",
    )
    warmup_steps: Index = key(0, "Optimizer steps in which the learning rate rises linearly.")


class RewardOptimizerSection(OptimizerSection):
    """AdamW with the learning rate of reward models."""

    learning_rate: Positive | None = key(
        None, "Learning rate after the warmup; null is 1e-6, or 1e-4 with lora."
    )
    head_learning_rate: Positive | None = key(
        None,
        "Learning rate of pooling and head; null is learning_rate. HY-Video-PRFL: 1e-5 with bt.",
    )
    clip: Literal["all", "blocks"] = key(
        "all", "Gradients that max_grad_norm limits: all, or blocks alone as in HY-Video-PRFL."
    )


class RunConfig(Section):
    """Length, batches, checkpoints and logs of a training run."""

    steps: Count = key(..., "Optimizer steps of each objective.")
    batch_size: Count = key(1, "Videos in a forward pass.")
    gradient_accumulation_steps: Count = key(5, "Forward and backward passes per optimizer step.")
    workers: Index = key(
        0, "Processes that read batches ahead, for each objective; 0 reads them between steps."
    )
    save_every: Count = key(100, "Optimizer steps between checkpoints.")
    save_async: bool = key(False, "Write checkpoints of sharded weights in the background.")
    keep_last: Count = key(2, "Number of checkpoints that stay on disk.")
    ema_decay: Decay | None = key(
        None, "Decay per step of a moving average of the trained weights; null keeps none."
    )
    seed: Index = key(0, "Seed of all random numbers.")
    tensorboard: bool = key(True, "Write TensorBoard logs beside log.jsonl.")
    wandb: bool = key(
        False,
        "Log to Weights & Biases too; its environment variables (WANDB_PROJECT, WANDB_MODE) apply.",
    )
    resume: Text | None = key(
        "auto",
        "Checkpoint to resume: auto is the latest one in out, last-good the latest one that is not "
        "damaged; null starts a new run and needs an out without checkpoints.",
    )


class GuidanceSection(Section):
    """Classifier-free guidance of the trajectories."""

    guidance_scale: Positive | Annotated[tuple[Positive, Positive], from_list] = key(
        ...,
        "Factor of the difference between velocities with and without the prompt; of two experts "
        "also [high, low].",
    )
    negative: Text = key(
        ...,
        "Safetensors file with the conditions of the negative prompt, stored as in a sample of the "
        "dataset: encoder_hidden_states [T, D]. The sample's own conditions replace missing ones.",
    )
    batched: bool = key(True, "Run both velocities as one batch of twice the size, not in turn.")


class FeedbackSection(Section):
    """Reward feedback: the steps of a trajectory that carry gradient, and their loss.

    A null argument of the method is the method's own default.
    """

    method: Method = key("prfl", "Method that chooses the steps with gradient.")
    num_inference_steps: Annotated[int, Field(ge=2)] = key(40, "Solver steps of a trajectory.")
    points: Count = key(
        1,
        "Steps with gradient per trajectory (prfl). Divide run.gradient_accumulation_steps by it "
        "to keep the number of gradients per update.",
    )
    draws: Literal["systematic", "independent"] | None = key(None, "Draw of several points (prfl).")
    window: Fraction | None = key(
        None, "Fraction of the trajectory from which the step is drawn (refl, controlnet++)."
    )
    depth: Count | Literal["all"] | None = key(
        None,
        "Solver steps that the gradient goes through (draft, instructvideo), or the largest number "
        "of them (alignprop).",
    )
    renoised: Index | None = key(None, "Number of renoised copies of the last step (draft-lv).")
    strength: Fraction | None = key(
        None,
        "Fraction of the schedule that runs, from the corrupted latents to the result "
        "(instructvideo).",
    )
    segments: Count | Literal["all"] | None = key(
        None,
        "Frames to reward, one from each segment of the video; all rewards the whole video at once "
        "(instructvideo).",
    )
    attenuation: NonNegative | None = key(
        None, "Decay of a frame's weight with its distance from the center (instructvideo)."
    )
    solver: Literal["unipc", "euler"] = key("unipc", "ODE solver.")
    schedule: Schedule = key(
        "wan",
        "Noise levels of the unipc solver: those of official Wan and HY-Video-PRFL, or of newer "
        "diffusers.",
    )
    integer_timesteps: bool = key(
        True, "Call the models at 1000 sigma rounded down, in supervised steps too."
    )
    shift: Positive = key(5.0, "Timestep shift of the noise schedule, of supervised steps too.")
    target: Number | None = key(
        2.0, "Reward at and above which no gradient flows; null maximizes without a limit."
    )
    weight: Positive = key(0.1, "Weight of the reward loss.")
    divergence: NonNegative = key(
        0.0, "Weight of the squared distance to the velocity without adapters; needs lora."
    )
    guidance: GuidanceSection | None = key(None, "Classifier-free guidance; null is off.")

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        _, taken = _METHODS[self.method]
        for name in _METHOD_KEYS:
            value, default = getattr(self, name), type(self).model_fields[name].default
            wanted = f"no value with method {self.method}, which takes {', '.join(taken) or 'none'}"
            check(name in taken or value == default, name, value, wanted)
        whole_trajectory = self.depth == "all" and self.method == "instructvideo"
        check(not whole_trajectory, "depth", "all", "a whole number with method instructvideo")
        no_frames = self.segments == "all" and bool(self.attenuation)
        wanted = "no value with segments: all, which rewards no single frames"
        check(not no_frames, "attenuation", self.attenuation, wanted)
        ok = self.solver == "unipc" or self.schedule == "wan"
        check(ok, "schedule", self.schedule, "no value with solver: euler")
        plan = self.plan()
        steps = self.num_inference_steps - plan.begin(self.num_inference_steps)
        wanted = f"at most {steps}, the steps of a trajectory"
        check(not isinstance(self.depth, int) or self.depth <= steps, "depth", self.depth, wanted)
        plan.steps(self.num_inference_steps)
        return self

    def plan(self) -> GradientPlan:
        """Return the gradient plan of the method and its keys."""
        make, taken = _METHODS[self.method]
        values = {argument: getattr(self, name) for name, argument in taken.items()}
        given = {name: value for name, value in values.items() if value is not None}
        return make(**{name: None if value == "all" else value for name, value in given.items()})


class DPOSection(Section):
    """Flow-DPO on preference pairs."""

    beta: Positive = key(BETA, "Strength with which the model is held to the initial one.")


class RWRSection(Section):
    """Flow-RWR: supervised steps weighted by exp(reward / temperature)."""

    temperature: Positive = key(1.0, "A lower one weights good videos more; the paper has 1.")
    label: Text | None = key(
        None,
        "Label of the dataset that is the reward, a number; null is the weighted sum of the "
        "rewards of the clean latents.",
    )


# Keys that rollout.drift chooses.
_APPROXIMATE = (
    "fp8_linears fp8_attention sparse_attention sparse_dense_layers teacache "
    "first_block_cache stride solver_order guidance_interval"
)
_OF_DRIFT = (*_APPROXIMATE.split(), "drift_limit")


class RolloutSection(Section):
    """The steps without gradient.

    cache changes no bit, compile and merge_lora only rounding; adapter, FP8, sparse attention,
    teacache, first_block_cache, stride, solver_order and guidance_interval are approximate.
    """

    drift: Positive | None = key(
        None,
        "Budget: measure the approximate options before the first step, and use the cheapest "
        "combination whose drift is at most 0.75 of this and whose gradient has a cosine of 0.99 "
        "or more with the exact one. It takes the place of those options, and is the run's "
        "drift_limit; null measures none.",
    )
    cache: bool = key(True, "Compute values that all steps of a rollout share only once.")
    merge_lora: bool = key(False, "Add the adapters to the weights as each block runs; needs lora.")
    compile: Annotated[Literal["auto", "on", "off"], on_or_off] = key(
        "auto", "torch.compile of the blocks; auto compiles if the GPU waits for the host."
    )
    adapter: Text | Annotated[tuple[Text | None, Text | None], from_list] | None = key(
        None,
        "LoRA file that rollouts alone add to the weights, below lora, such as one distilled to "
        "few steps (raise stride with it); [high, low] of two experts.",
    )
    adapter_scale: Number | Annotated[tuple[Number, Number], from_list] = key(
        1.0, "Factor of adapter; [high, low] of two experts."
    )
    fp8_linears: Interval | None = key(
        None,
        "Noise levels [lowest, highest] at which linear layers run in FP8; null is no level, "
        "[0, 1] all.",
    )
    fp8_attention: Interval | None = key(
        None, "Noise levels [lowest, highest] at which self-attention runs in FP8."
    )
    sparse_attention: Share | Densities = key(
        1.0,
        "Density of the self-attention, the share of pairs of blocks of tokens that it computes; "
        "or a list of [lowest, highest, density] by noise level, of which the first that matches "
        "counts; elsewhere it is 1, dense.",
    )
    sparse_predictor: Predictor = key(
        "pooled",
        "How these pairs are chosen: pooled queries and keys, tiles around each tile of tokens, or "
        "radial masks.",
    )
    sparse_dense_layers: Annotated[tuple[Index, ...], from_list] = key(
        (), "Numbers of the transformer blocks, from 0, whose attention stays dense."
    )
    teacache: NonNegative = key(
        0.0,
        "Reuse the blocks' last residual while the summed relative changes of the time embedding "
        "stay below this; 0 never.",
    )
    teacache_model: TeaCacheModel | None = key(
        None, "Model whose published coefficients rescale each change; null rescales none."
    )
    first_block_cache: NonNegative = key(
        0.0,
        "Reuse the last residual of the blocks after the first if the first block's changed by "
        "less than this, relatively; 0 never.",
    )
    stride: Count | Strides = key(
        1,
        "Solver steps that one step far from a gradient step covers; or a list of [lowest, "
        "highest, stride] by noise level, of which the first that matches counts; elsewhere 1.",
    )
    solver_order: Order | Orders | None = key(
        None,
        "Order of UniPC in rollout steps; or a list of [lowest, highest, order] by noise level, of "
        "which the first that matches counts; elsewhere it is that of the sampler, as null is.",
    )
    guidance_interval: Interval | None = key(
        None,
        "Noise levels [lowest, highest] at which the rollout has guidance; null is all. Needs "
        "prfl.guidance.",
    )
    drift_limit: Positive | None = key(
        None,
        "Relative L2 distance from an exact rollout beyond which all later rollouts are exact; "
        "null is no limit.",
    )
    check_every: Count = key(20, "Trajectories between two measurements of the drift.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self.build()
        fields = type(self).model_fields
        given = [f"rollout.{n}" for n in _OF_DRIFT if getattr(self, n) != fields[n].default]
        expected = f"null beside {' and '.join(given)}, which it chooses"
        check(self.drift is None or not given, "drift", self.drift, expected)
        expected = "null beside rollout.adapter, which it cannot choose"
        check(self.drift is None or self.adapter is None, "drift", self.drift, expected)
        return self

    def build(self) -> RolloutConfig:
        """Return the library's configuration of these keys; ``drift`` is not part of it."""
        return RolloutConfig(**self.model_dump(exclude={"drift"}))


class LoraSection(Section):
    """Low-rank adapters, which train instead of the weights of the model."""

    lora_rank: Count = key(..., "Rank of the adapters.")
    lora_alpha: Positive | None = key(None, "Scale: lora_alpha / lora_rank; null is lora_rank.")
    target_modules: Annotated[tuple[Text, ...], Field(min_length=1), from_list] = key(
        DEFAULT_TARGETS, "Ends of the names of the linear layers that get an adapter."
    )


class ParallelSection(Section):
    """Ranks of a run that torchrun started; without torchrun these keys have no effect."""

    shard: Count | Literal["auto"] = key(
        "auto",
        "GPUs that hold one copy of the weights together, 1: each has all. A plan (memory: auto, "
        "or plan --apply) chooses for auto; without a plan these are all GPUs.",
    )
    sequence: Count | Literal["auto"] = key(
        "auto", "GPUs that share a video, each with a part of its tokens; 1 without a plan."
    )
    keep_gathered: bool | Literal["auto"] = key(
        "auto",
        "Keep shared weights whole on each GPU through a rollout, which then communicates once; "
        "a plan chooses for auto, which is false without one.",
    )
    points: Literal["shared", "own"] = key(
        "shared",
        "Steps with gradient of the prfl objective: the same on all GPUs, as published, or drawn "
        "by each, which needs shard: 1.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        self.build()
        ok = self.points == "shared" or self.shard == 1
        hint = "GPUs that share weights must run the same number of steps"
        check(ok, "points", self.points, "shared unless shard is 1", hint=hint)
        return self

    def build(self) -> ParallelConfig:
        """Return the library's configuration of these keys."""
        return ParallelConfig(self.shard, self.sequence, self.keep_gathered)


class HardwareSection(Section):
    """Device and precision."""

    device: Text = key("auto", "auto, cpu, cuda or cuda:<number>.")
    precision: Literal["fp32", "bf16"] = key(
        "fp32", "Compute dtype; bf16 runs fp32 weights under autocast."
    )
    fp8_linears: bool = key(
        False, "Train with linear layers in FP8 (approximate); rollouts stay exact. Needs bf16."
    )
    patch: bool = key(True, "Run the models on fused kernels.")
    compile_blocks: Annotated[Literal["auto", "on", "off"], on_or_off] = key(
        "auto", "torch.compile of the blocks; auto compiles if the GPU waits for the host."
    )


class RewardMemorySection(Section):
    """Memory policy of the frozen reward model."""

    weight_dtype: WeightDtype = key(
        "fp32", "Dtype of the weights; all but fp32 need hardware.precision: bf16."
    )
    activation_checkpointing: ActivationCheckpointing = key(
        "none",
        "Recomputation in the backward: nothing, whole blocks, or blocks without self-attention.",
    )
    offload: Offload | None = key(
        None, "Keep saved activations in host memory; null keeps them on the device."
    )
    feed_forward_chunk: Count | None = key(
        None, "Tokens per pass through a feed-forward layer; null is all."
    )
    stream_weights: Count | None = key(
        None,
        "Keep the weights of blocks in host memory, and copy this number of blocks ahead of the "
        "one that runs; null keeps them on the device. Full training needs adamw-cpu.",
    )

    def build(self) -> MemoryConfig:
        """Return the library's configuration of these keys."""
        return MemoryConfig(**self.model_dump())

    @classmethod
    def of(cls, config: MemoryConfig) -> Self:
        """Return the section of a library configuration."""
        return cls(**{name: getattr(config, name) for name in cls.model_fields})


class MemorySection(RewardMemorySection):
    """Memory policy of the generator."""

    weight_dtype: WeightDtype = key(
        "fp32",
        "Dtype of the weights; all but fp32 need hardware.precision: bf16. fp8 and nf4 need lora.",
    )
    optimizer: OptimizerKind = key(
        "adamw",
        "AdamW: with fp32 states and masters, with stochastic rounding, with 8-bit states, with "
        "paged 8-bit states (fp32 weights), or on the CPU.",
    )
    gradient_dtype: GradientDtype = key(
        "parameter", "Dtype in which gradients accumulate: the weight's own, or fp32."
    )


class TrainedRewardMemorySection(MemorySection):
    """Memory policy of a reward model in training."""

    weight_dtype: Literal["fp32", "bf16"] = key(
        "fp32", "Dtype of the weights; bf16 needs hardware.precision: bf16."
    )
