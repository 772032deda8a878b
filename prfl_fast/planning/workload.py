"""Training run that is planned for: model, video size, kind of training, gradient plan."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from prfl_fast.feedback.experts import trained_plan
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.models.blocks import TEXT_TOKENS
from prfl_fast.parallel.mesh import ParallelConfig
from prfl_fast.planning.presets import Model, adapter_of, model_config, vae_stride
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.training.lora import DEFAULT_TARGETS
from prfl_fast.utils.checks import (
    check,
    check_choice,
    check_count,
    check_positive,
    check_type,
    make_fields_plain,
)

IMAGE_TOKENS = 257  # of CLIP, for one image


@dataclass(frozen=True)
class Workload:
    """Describe the training run whose memory is planned.

    Attributes:
        model: a supported transformer, its configuration, a folder with ``config.json`` or a preset
            name, see :func:`prfl_fast.planning.presets.model_config`; stored as a configuration.
        frames, height, width: of the videos, in frames and pixels; frames is 4n + 1. The model's
            latent channels decide the VAE's strides, see ``presets.VAE_STRIDES``.
        first_frame: the first frame is given (Wan2.2 TI2V), so that its tokens have time 0.
        batch_size: videos per forward.
        gradient_accumulation_steps: micro-batches per optimizer step.
        text_tokens: rows of a sample's text states after padding.
        train: ``lora`` trains adapters, ``full`` all parameters.
        lora_rank, target_modules: as in :func:`prfl_fast.training.lora.add_lora`.
        gradient_plan: steps that carry gradient, which goes to the parameters.
        divergence: the loss has the divergence from the velocity without adapters.
        guidance: classifier-free guidance of all steps of a trajectory: ``batched`` runs both
            velocities as one batch of twice the size, ``separate`` in turn; None is off.
        num_inference_steps: solver steps of a trajectory.
        expert: expert that trains, of two; ``both`` trains one per step, and needs ``lora``.
        shift: timestep shift of the schedule, which decides the steps of each expert.
        reward_blocks: blocks of the frozen reward model, a copy of the generator's first blocks.
            For several rewards, a tuple with an entry for each; an ensemble's entry is a tuple.
        reward_loss: None trains a generator. ``ce`` and ``bt`` train a reward model with all blocks
            of ``model`` (``train-reward``); ``bt`` has two videos per sample.
        sft: a supervised step follows each PRFL step.
        dpo: a Flow-DPO step follows as well. With ``full``, its reference is a frozen copy of the
            model, which each GPU holds whole.
        ema: a float32 running average of the trained parameters is kept (``ema_decay``).
        patched: both models run on prfl_fast's kernels.
        fp8_linears: the trained model has :func:`prfl_fast.models.use_fp8_linears`.
        precision: compute dtype of float32 weights: autocast to ``bf16``, or ``fp32``.
        ranks: GPUs of the run. The plan is of one of them.
        parallel: layout of weights and samples over them; the planner tries what is ``"auto"``.
        gpus_per_machine: GPUs of a machine, whose links are the fastest.

    Raises:
        TypeError: if the model or the gradient plan has the wrong type.
        ValueError: if a value is out of range, or the gradient goes to the noise or the latents.
    """

    model: Model
    frames: int = 81
    height: int = 720
    width: int = 1280
    first_frame: bool = False
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    text_tokens: int = 512
    train: Literal["lora", "full"] = "lora"
    lora_rank: int = 16
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    gradient_plan: GradientPlan = GradientPlan()
    divergence: bool = False
    guidance: Literal["batched", "separate"] | None = None
    num_inference_steps: int = 40
    expert: Literal["high", "low", "both"] = "both"
    shift: float = 5.0
    reward_blocks: int | tuple[int | tuple[int, ...], ...] = 8
    reward_loss: Literal["ce", "bt"] | None = None
    sft: bool = True
    dpo: bool = False
    ema: bool = False
    patched: bool = True
    fp8_linears: bool = False
    precision: Literal["fp32", "bf16"] = "bf16"
    ranks: int = 1
    parallel: ParallelConfig = ParallelConfig()
    gpus_per_machine: int = 8

    def __post_init__(self) -> None:
        make_fields_plain(self)
        object.__setattr__(self, "model", model_config(self.model))
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        for name in (
            "frames",
            "height",
            "width",
            "batch_size",
            "gradient_accumulation_steps",
            "text_tokens",
            "lora_rank",
            "ranks",
            "gpus_per_machine",
        ):
            check_count(name, getattr(self, name))
        check_count("num_inference_steps", self.num_inference_steps, 2)
        self.parallel.sizes(self.ranks)  # raises if the sizes do not divide the ranks
        check_choice("train", self.train, ("lora", "full"))
        check_choice("precision", self.precision, ("fp32", "bf16"))
        check_choice("reward_loss", self.reward_loss, (None, "ce", "bt"))
        for name in ("sft", "dpo"):
            ok = not getattr(self, name) or self.reward_loss is None
            check(ok, name, getattr(self, name), "False with reward_loss")
        check_choice("guidance", self.guidance, (None, "batched", "separate"))
        self._check_gradient_plan()
        self._check_size()
        self._check_model()
        check_choice("expert", self.expert, ("high", "low", "both"))
        check_positive("shift", self.shift)
        both, two = self.expert == "both", bool(self.experts)
        check(both or two, "expert", self.expert, "both for a model without two experts")
        wanted = "high or low with train full"
        check(not (both and two) or self.train == "lora", "expert", self.expert, wanted)
        _ = self.rollout_forwards  # raises if an expert that trains has no step in the window

    def _check_gradient_plan(self) -> None:
        plan = self.gradient_plan
        check_type("gradient_plan", plan, GradientPlan)
        hint = "Nothing would train"
        check(plan.to == "parameters", "gradient_plan.to", plan.to, "'parameters'", hint=hint)
        most = self.num_inference_steps - 1
        expected = f"at most num_inference_steps - 1 = {most}"
        ok = plan.points <= most or plan.draws == "independent"  # which may repeat a step
        check(ok, "points", plan.points, expected)
        plan.steps(self.num_inference_steps)

    def _check_size(self) -> None:
        stride = vae_stride(self.latent_channels)
        ok, expected = self.frames % stride[0] == 1, f"{stride[0]}n + 1"
        if self.first_frame:
            ok, expected = ok and self.frames > 1, f"{expected} above 1"
        check(ok, "frames", self.frames, f"{expected}, as 81")
        segments, latent_frames = self.gradient_plan.segments or 1, self.latent_shape[2]
        expected = f"at most {latent_frames}, the frames of the latents"
        check(segments <= latent_frames, "gradient_plan.segments", segments, expected)
        names = ("frames", "height", "width")
        sizes = zip(names, self.latent_shape[2:], self._patch, stride, strict=True)
        longest = self.config.get("rope_max_seq_len", 1024)
        for name, size, patch, pixels in sizes:
            value, multiple = getattr(self, name), pixels * patch
            if name != "frames":
                check(value % multiple == 0, name, value, f"a multiple of {multiple}")
            expected = f"at most {longest} positions (the model's rope_max_seq_len)"
            check(size // patch <= longest, name, value, f"{expected}, not {size // patch}")

    def _check_model(self) -> None:
        layers = self.blocks
        ok = self.reward_loss is not None or bool(self.rewards) and all(self.rewards)
        check(ok, "reward_blocks", self.reward_blocks, "a number of blocks for each reward")
        expected = f"at most the model's {layers} blocks"
        for count in self.reward_models:
            check_count("reward_blocks", count)
            check(count <= layers, "reward_blocks", count, expected)
        fixed = self.config.get("image_dim") is not None
        expected = f"{TEXT_TOKENS} for an image-to-video model"
        ok = not fixed or self.text_tokens == TEXT_TOKENS
        check(ok, "text_tokens", self.text_tokens, expected)

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the transformer."""
        return self.model  # type: ignore[return-value]

    @property
    def shard(self) -> int:
        """Number of GPUs that hold one copy of the weights together."""
        return self.parallel.sizes(self.ranks)[0]

    @property
    def sequence(self) -> int:
        """Number of GPUs that share a video."""
        return self.parallel.sizes(self.ranks)[1]

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return adapter_of(self.config).block_count(self.config)

    @property
    def rewards(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of the frozen models of each reward; an ensemble has several models."""
        if self.reward_loss is not None:
            return ()
        blocks = self.reward_blocks
        given = blocks if isinstance(blocks, tuple) else (blocks,)
        return tuple(part if isinstance(part, tuple) else (part,) for part in given)

    @property
    def reward_models(self) -> tuple[int, ...]:
        """Blocks of every frozen reward model."""
        return tuple(count for members in self.rewards for count in members)

    @property
    def has_reference(self) -> bool:
        """True if a frozen copy of the model is the reference of ``dpo``."""
        return self.dpo and self.train == "full"

    @property
    def _patch(self) -> tuple[int, int, int]:
        sizes: tuple[int, int, int] = adapter_of(self.config).patch_sizes(self.config)
        return sizes

    @property
    def points(self) -> int:
        """Gradient points of a trajectory."""
        return self.gradient_plan.points

    @property
    def evaluations(self) -> int:
        """Evaluations of the reward per trajectory, each with a forward and a backward."""
        return self.points + self.gradient_plan.renoised

    @property
    def rollout_forwards(self) -> float:
        """Expected forwards without gradient of a trajectory."""
        if self.reward_loss is not None:
            return 0.0
        steps = self.num_inference_steps
        return sum(share * plan.expected_forwards(steps) for plan, share in self._plans())

    @property
    def earlier_steps(self) -> float:
        """Expected steps with gradient of a trajectory before the last one of a point."""
        steps = self.num_inference_steps
        return sum(
            share * float(probability) * (points[0].depth - 1)
            for plan, share in self._plans()
            for probability, points in (plan.outcomes(steps) if plan.depth != 1 else ())
        )

    def _plans(self) -> list[tuple[GradientPlan, float]]:
        """Return the plans of the trained experts with their shares; of one model one plan."""
        if not self.experts:
            return [(self.gradient_plan, 1.0)]
        return [
            (trained_plan(self.gradient_plan, self.experts, (name,)), share)
            for name, share in self.shares.items()
        ]

    @cached_property
    def experts(self) -> list[str]:
        """Names of the experts that run the solver steps; empty for one transformer."""
        if "boundary_ratio" not in self.config or self.reward_loss is not None:
            return []
        scheduler = FlowUniPC(self.shift)
        scheduler.set_timesteps(self.num_inference_steps)
        boundary = 1000 * self.config["boundary_ratio"]
        return ["high" if t >= boundary else "low" for t in scheduler.timesteps.tolist()]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the steps that train each of the trained experts."""
        if self.expert != "both":
            return {self.expert: 1.0}
        own = [self.experts[m] for m in self.gradient_plan.steps(self.num_inference_steps)]
        return {name: own.count(name) / len(own) for name in ("high", "low")}

    @property
    def swaps(self) -> float:
        """Expected exchanges of two experts on the device per trajectory."""
        if not self.experts or self.experts[0] == "low":
            return 0.0
        # One on the way to each point of the expert low, and one back for the next trajectory.
        return 2.0 * self.shares.get("low", 0.0)

    @property
    def latent_channels(self) -> int:
        """Channels of the latents, which the transformer predicts; 16 is diffusers' default."""
        return self.config.get("out_channels", 16) or self.config.get("in_channels", 16)

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """Shape ``[B, C, F, H, W]`` of the latents."""
        frames, height, width = vae_stride(self.latent_channels)
        latent_frames = (self.frames - 1) // frames + 1
        size = (self.height // height, self.width // width)
        return (self.batch_size, self.latent_channels, latent_frames, *size)

    @property
    def tokens(self) -> int:
        """Tokens L of one video."""
        return math.prod(self.latent_shape[2:]) // math.prod(self._patch)
