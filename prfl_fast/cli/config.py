"""Models of the YAML files of ``prfl-fast train``, ``train-reward`` and ``score``.

``prfl-fast init`` and docs/configuration.md show each description.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self  # noqa: UP035 - Python 3.10 has none

from prfl_fast.cli import eval_sections, sections
from prfl_fast.cli.reward_sections import NamedReward, ReferenceReward
from prfl_fast.cli.sections import RunConfig
from prfl_fast.cli.yaml_config import Count, Index, Number, Positive, Section, Text, from_list, key
from prfl_fast.memory.policy import check_compatible
from prfl_fast.utils.checks import check
from prfl_fast.utils.choices import EVALUATION_TIMESTEPS

Probability = Annotated[Number, Field(ge=0, le=1)]
Rewards = Annotated[tuple[NamedReward, ...], Field(min_length=1), from_list]
Objectives = Annotated[
    tuple[Literal["prfl", "sft", "dpo", "rwr"], ...], Field(min_length=1), from_list
]


def _check_memory(
    memory: Literal["auto"] | sections.MemorySection, train: str, hardware: sections.HardwareSection
) -> None:
    precision, fp8 = hardware.precision, hardware.fp8_linears
    ok, hint = not fp8 or precision == "bf16", "Its products return bfloat16: set precision: bf16"
    check(ok, "hardware.fp8_linears", fp8, "false with precision: fp32", hint=hint)
    if memory != "auto":
        check_compatible(memory.build(), train=train, precision=precision)
        ok, dtype = not fp8 or memory.weight_dtype in ("fp32", "bf16"), memory.weight_dtype
        hint = "It quantizes the weights of each product itself: set memory.weight_dtype: bf16"
        check(ok, "hardware.fp8_linears", fp8, f"false with {dtype} weights", hint=hint)
        return
    wanted = "bf16 with memory: auto, which plans for bfloat16"
    check(precision == "bf16", "hardware.precision", precision, wanted)


class TrainFile(Section):
    """Train a generator by objectives that take turns."""

    model: Text | sections.ExpertsSection = key(
        ...,
        "A transformer or pipeline: a folder of diffusers, or weights of official Wan or ComfyUI.",
    )
    data: Text = key(
        ...,
        "Folder of a dataset of latents, or a .list of HY-Video-PRFL: single videos; or pairs with "
        "the dpo objective, whose winners the others take.",
    )
    allow_outside: bool = key(False, "Let a manifest or list name files outside its folder.")
    out: Text = key(..., "Folder of the checkpoints and logs.")
    run: RunConfig = key(..., "Length, batches, checkpoints and logs.")
    reward: Text | ReferenceReward | Rewards | None = key(
        None,
        "Folder of a saved reward model, files of HY-Video-PRFL, or a list of several rewards. "
        "The prfl objective requires it, and rwr without a label.",
    )
    objectives: Objectives = key(("prfl", "sft"), "Objectives, which take turns: one step of each.")
    prfl: sections.FeedbackSection = key(sections.FeedbackSection(), "Reward feedback.")
    dpo: sections.DPOSection = key(sections.DPOSection(), "Flow-DPO on preference pairs.")
    rwr: sections.RWRSection = key(sections.RWRSection(), "Flow-RWR.")
    rollout: sections.RolloutSection = key(sections.RolloutSection(), "The steps without gradient.")
    eval: eval_sections.EvalSection | None = key(
        None, "Evaluation on held-out prompts while training; null is none."
    )
    optimizer: sections.OptimizerSection = key(sections.OptimizerSection(), "AdamW.")
    lora: sections.LoraSection | None = key(None, "Low-rank adapters; null trains all parameters.")
    train: Literal["high", "low", "both"] | None = key(
        None,
        "Expert that trains, of two; null is both, which needs lora. Then each step trains one.",
    )
    text_drop: Probability = key(
        0.0, "Probability of the text of empty_prompt.safetensors in data (HY-Video-PRFL: 0.1)."
    )
    short_captions: Probability = key(
        0.0, "Probability of encoder_hidden_states_short of a sample (HY-Video-PRFL: 0.3)."
    )
    hardware: sections.HardwareSection = key(sections.HardwareSection(), "Device and precision.")
    parallel: sections.ParallelSection = key(
        sections.ParallelSection(), "Several GPUs: torchrun -m prfl_fast.cli train FILE.yaml."
    )
    memory: Literal["auto"] | sections.MemorySection = key(
        sections.MemorySection(),
        "Memory policy of the generator; auto plans it and reward_memory, and needs "
        "hardware.precision: bf16.",
    )
    reward_memory: sections.RewardMemorySection = key(
        sections.RewardMemorySection(), "Memory policy of the frozen reward model."
    )

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        unique = len(set(self.objectives)) == len(self.objectives)
        check(unique, "objectives", list(self.objectives), "no repeats")
        if self.reads_reward and self.reward is None:
            reader = "prfl objective" if "prfl" in self.objectives else "rwr one, or rwr.label"
            raise ValueError(f"reward is missing, expected a reward model for the {reader}")
        if self.eval is not None and self.reward is None and self.eval.codec is None:
            raise ValueError("reward is missing, expected a reward model or eval.codec for eval")
        names = [reward.name for reward in self.rewards()]
        for i, name in enumerate(names):
            check(name not in names[:i], f"reward[{i}].name", name, "a name of its own")
        for name, value, off in (
            ("prfl.divergence", self.prfl.divergence, 0.0),
            ("rollout.merge_lora", self.rollout.merge_lora, False),
        ):
            ok, wanted = not value or self.lora is not None, f"{off} without adapters"
            check(ok, name, value, wanted, hint="Add lora: {lora_rank: 16}")
        interval = self.rollout.guidance_interval
        ok, wanted = interval is None or self.prfl.guidance is not None, "null without guidance"
        check(ok, "rollout.guidance_interval", interval, wanted, hint="Add prfl.guidance")
        order, unipc = self.rollout.solver_order, self.prfl.solver == "unipc"
        check(order is None or unipc, "rollout.solver_order", order, "null with prfl.solver euler")
        precision = self.hardware.precision
        frozen = self.reward_memory.build()
        check_compatible(frozen, train=None, precision=precision, name="reward_memory")
        _check_memory(self.memory, "full" if self.lora is None else "lora", self.hardware)
        same = self.memory != "auto" or self.reward_memory == sections.RewardMemorySection()
        hint = "Leave out reward_memory, which memory: auto plans too"
        check(same, "memory", self.memory, "a mapping beside reward_memory", hint=hint)
        return self

    @property
    def reads_reward(self) -> bool:
        """Return True if an objective needs reward models."""
        scored = "rwr" in self.objectives and self.rwr.label is None
        return scored or "prfl" in self.objectives

    def rewards(self) -> tuple[NamedReward, ...]:
        """Return the rewards by name, of which a single one is called ``reward``."""
        if self.reward is None or isinstance(self.reward, tuple):
            return self.reward or ()
        return (NamedReward(name="reward", path=self.reward),)


class TrainRewardFile(Section):
    """Train a latent reward model from a generator's first blocks."""

    model: Text = key(
        ..., "The generator: a folder of diffusers, or weights of official Wan or ComfyUI."
    )
    data: Text = key(
        ..., "Folder of a dataset of labeled videos or pairs, or a .list of HY-Video-PRFL."
    )
    allow_outside: bool = key(False, "Let a manifest or list name files outside its folder.")
    out: Text = key(..., "Folder of the checkpoints, the logs and the reward model.")
    run: RunConfig = key(..., "Length, batches, checkpoints and logs.")
    lose_data: Text | None = key(
        None, "Dataset of single videos from which bt draws the losers against the videos of data."
    )
    eval: eval_sections.RewardEvalSection | None = key(
        None, "Evaluation on held-out samples; null is none."
    )
    num_blocks: Count = key(8, "Blocks taken from the generator.")
    num_heads: Count = key(8, "Heads of the attention pooling.")
    num_queries: Count = key(1, "Queries of the attention pooling.")
    loss: Literal["ce", "bt"] = key(
        "ce", "Cross-entropy of labeled videos, or Bradley-Terry of pairs."
    )
    label: Text = key("motion_quality", "Label of the dataset to learn.")
    missing_label: Annotated[int, Field(ge=0, le=1)] | None = key(
        None, "Label of videos without one; null refuses them, HY-Video-PRFL takes 0."
    )
    shift: Positive = key(5.0, "Timestep shift of the noise schedule.")
    integer_timesteps: bool = key(
        True,
        "Call the model at 1000 sigma rounded down; evaluate at the nearest level of the schedule.",
    )
    optimizer: sections.RewardOptimizerSection = key(sections.RewardOptimizerSection(), "AdamW.")
    lora: sections.LoraSection | None = key(
        None,
        "Low-rank adapters of the blocks, which train beside pooling and head; the saved reward "
        "model has them merged. null trains the blocks.",
    )
    text_drop: Probability = key(
        0.0, "Probability of the text of empty_prompt.safetensors in data (HY-Video-PRFL: 0.1)."
    )
    short_captions: Probability = key(
        0.0, "Probability of encoder_hidden_states_short of a sample (HY-Video-PRFL: 0.3)."
    )
    hardware: sections.HardwareSection = key(sections.HardwareSection(), "Device and precision.")
    parallel: sections.ParallelSection = key(
        sections.ParallelSection(),
        "Several GPUs: torchrun -m prfl_fast.cli train-reward FILE.yaml.",
    )
    memory: Literal["auto"] | sections.TrainedRewardMemorySection = key(
        sections.TrainedRewardMemorySection(),
        "Memory policy of the reward model; auto plans it, and needs hardware.precision: bf16.",
    )

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        ok = self.lose_data is None or self.loss == "bt"
        check(ok, "lose_data", self.lose_data, "no value with loss: ce")
        if self.eval is not None:
            share, wanted = self.eval.held_out, "no value with lose_data; give eval.data"
            check(share is None or self.lose_data is None, "eval.held_out", share, wanted)
        _check_memory(self.memory, "full", self.hardware)
        return self


class ScoreFile(Section):
    """Score the videos of a dataset at several timesteps."""

    reward: Text | ReferenceReward = key(
        ..., "Folder of a saved reward model, or files of HY-Video-PRFL."
    )
    data: Text = key(..., "Folder of a dataset of latents, or a .list of HY-Video-PRFL.")
    allow_outside: bool = key(False, "Let a manifest or list name files outside its folder.")
    out: Text = key(..., "File of the scores, .jsonl or .csv.")
    model: Text | None = key(
        None, "The generator, as in train; required with a reward of HY-Video-PRFL."
    )
    timesteps: eval_sections.Timesteps = key(EVALUATION_TIMESTEPS, "Timesteps of the scores.")
    shift: Positive = key(5.0, "Timestep shift of the noise schedule the reward was trained on.")
    integer_timesteps: bool = key(
        True, "Score at the nearest level of the schedule, at 1000 sigma rounded down."
    )
    batch_size: Count = key(1, "Videos in a forward pass.")
    seed: Index = key(0, "Seed of the noise.")
    hardware: sections.HardwareSection = key(sections.HardwareSection(), "Device and precision.")

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        known = Path(self.out).suffix in (".jsonl", ".csv")
        check(known, "out", self.out, "a name that ends in .jsonl or .csv")
        if isinstance(self.reward, ReferenceReward) and self.model is None:
            raise ValueError("model is missing, expected the generator's folder for this reward")
        fp8 = self.hardware.fp8_linears
        check(not fp8, "hardware.fp8_linears", fp8, "false: scores are exact")
        return self
