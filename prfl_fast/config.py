"""Configuration of the command line: frozen dataclasses, read by :mod:`prfl_fast.config_file`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prfl_fast.config_file import ConfigError, ranged
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.rewards import EnsembleMode
from prfl_fast.rollout_engine import RolloutSettings

Policy = Literal["none", "full", "attention"]
Offload = Literal["cpu"]
Weights = Literal["fp32", "bf16", "fp8", "nf4"]
OptimizerKind = Literal["adamw", "adamw-sr", "adamw8bit", "paged-adamw8bit", "adamw-cpu"]
Gradients = Literal["parameter", "fp32"]


@dataclass(frozen=True)
class Optimizer:
    """AdamW. The learning rate rises linearly over ``warmup_steps``, then stays."""

    learning_rate: float = ranged(5e-6, above=0)
    betas: tuple[float, float] = ranged((0.9, 0.999), least=0, below=1)
    eps: float = ranged(1e-8, above=0)
    weight_decay: float = ranged(0.01, least=0)
    clip_norm: float | None = ranged(1.0, above=0)
    warmup_steps: int = ranged(0, least=0)


@dataclass(frozen=True)
class RewardOptimizer(Optimizer):
    """AdamW at the reward model's rate."""

    learning_rate: float = ranged(1e-6, above=0)


@dataclass(frozen=True)
class Run:
    """Length, batches, checkpoints and logs of a training run."""

    steps: int = ranged(least=1)
    batch_size: int = ranged(1, least=1)
    accumulation: int = ranged(5, least=1)
    save_every: int = ranged(100, least=1)
    keep_last: int = ranged(2, least=1)
    ema_decay: float | None = ranged(None, above=0, below=1)
    seed: int = ranged(0, least=0)
    tensorboard: bool = True
    resume: str | None = "auto"


@dataclass(frozen=True)
class GuidanceFile:
    """Classifier-free guidance of the trajectories.

    Attributes:
        scale: of the difference between the velocity with the prompt and the one without, above 0.
        negative: a safetensors file of the negative prompt's conditions, as a sample of the dataset
            without latents: ``encoder_hidden_states [T, D]``. What it lacks is the sample's own.
        batched: both in one forward of twice the batch, or one after the other.
    """

    scale: float = ranged(above=0)
    negative: str = ranged()
    batched: bool = True


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
        {
            "strength": "strength",
            "depth": "steps",
            "segments": "segments",
            "attenuation": "attenuation",
        },
    ),
    "rg-lcd": (GradientPlan.rg_lcd, {}),
}
_METHOD_KEYS = sorted({key for _, keys in _METHODS.values() for key in keys})


@dataclass(frozen=True)
class Feedback:
    """The reward's step: which steps of a trajectory carry gradient, and its loss.

    Attributes:
        method: a constructor of :class:`prfl_fast.GradientPlan`. Its arguments are ``points``
            (with more than 1, lower ``run.accumulation`` by as much), ``draws``, ``window``,
            ``depth`` (steps of the chain; the most of them for ``alignprop``; ``all``),
            ``renoised``, ``strength``, ``segments`` (``all`` rewards the video as a whole) and
            ``attenuation``; null is the method's own.
        target: rewards at or above it give no gradient; null maximises the reward without end.
        divergence: weight of the squared distance to the velocity without adapters; needs ``lora``.
    """

    method: Literal[
        "prfl",
        "refl",
        "draft",
        "draft-lv",
        "alignprop",
        "controlnet++",
        "instructvideo",
        "rg-lcd",
    ] = "prfl"
    num_steps: int = ranged(40, least=2)
    points: int = ranged(1, least=1)
    draws: Literal["systematic", "independent"] | None = None
    window: float | None = ranged(None, above=0, most=1)
    depth: int | Literal["all"] | None = ranged(None, least=1)
    renoised: int | None = ranged(None, least=0)
    strength: float | None = ranged(None, above=0, most=1)
    segments: int | Literal["all"] | None = ranged(None, least=1)
    attenuation: float | None = ranged(None, least=0)
    solver: Literal["unipc", "euler"] = "unipc"
    shift: float = ranged(5.0, above=0)
    target: float | None = 2.0
    weight: float = ranged(0.1, above=0)
    divergence: float = ranged(0.0, least=0)
    guidance: GuidanceFile | None = None

    def __post_init__(self) -> None:
        _, taken = _METHODS[self.method]
        given = {name: getattr(self, name) for name in _METHOD_KEYS}
        default = {f.name: f.default for f in dataclasses.fields(self)}
        for name, value in given.items():
            if value != default[name] and name not in taken:
                raise ConfigError(
                    f"prfl.{name} is {value}, but prfl.method is {self.method}, which takes "
                    f"{', '.join(taken) or 'none of these'}"
                )
        if self.depth == "all" and self.method == "instructvideo":
            raise ConfigError("prfl.depth is all, expected a whole number for instructvideo")
        if self.segments == "all" and self.attenuation:
            raise ConfigError(
                f"prfl.attenuation is {self.attenuation:g}, but prfl.segments is all, which has no "
                "single frames to weigh: leave it out"
            )
        try:
            plan = self.plan()
            run = self.num_steps - plan.begin(self.num_steps)
            if isinstance(self.depth, int) and self.depth > run:
                raise ValueError(
                    f"depth is {self.depth}, expected at most {run}, the steps of a trajectory"
                )
            plan.steps(self.num_steps)
        except ValueError as error:
            raise ConfigError(f"prfl.{error}") from error

    def plan(self) -> GradientPlan:
        """What the method and its keys stand for."""
        make, taken = _METHODS[self.method]
        values = {argument: getattr(self, key) for key, argument in taken.items()}
        given = {key: value for key, value in values.items() if value is not None}
        return make(**{key: None if value == "all" else value for key, value in given.items()})


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of full training."""

    rank: int = ranged(least=1)
    alpha: float | None = ranged(None, above=0)
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ReferenceReward:
    """A reward model in HY-Video-PRFL's layout: a transformer folder, an MLP and a pooling file."""

    transformer: str
    mlp: str
    pool: str
    num_heads: int = ranged(8, least=1)


@dataclass(frozen=True)
class NamedReward:
    """One of several rewards, whose weighted sum trains.

    Attributes:
        name: of its scores in the log.
        path: a saved reward model, one in the reference's layout, or a list of saved models, which
            form an ensemble.
        ensemble, coefficient: see :class:`prfl_fast.RewardEnsemble`; for a list.
    """

    name: str
    path: str | ReferenceReward | tuple[str, ...]
    weight: float = ranged(1.0, above=0)
    ensemble: EnsembleMode | None = None
    coefficient: float | None = ranged(None, least=0)


@dataclass(frozen=True)
class Hardware:
    """Device and precision. ``bf16`` runs float32 weights under autocast; see :class:`Memory`."""

    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    patch: bool = True


@dataclass(frozen=True)
class Memory:
    """What is kept where during training: the explicit form of ``memory``, and what a plan chooses.

    Attributes:
        weights: of the generator's linear layers in the blocks; ``fp32`` trains under autocast if
            ``hardware.precision`` is bf16, the others run in bfloat16 without it. ``fp8`` and
            ``nf4`` need LoRA.
        policy, offload: of the generator, see :func:`prfl_fast.checkpoint`.
        reward_weights, reward_policy, reward_offload: the same of the frozen reward model.
        feed_forward_chunk: tokens at a time in the feed-forward layers of both; None is all.
        optimizer: see :mod:`prfl_fast.optimizers`.
        gradients: accumulated in the parameter's dtype, or in float32.
    """

    weights: Weights = "fp32"
    policy: Policy = "none"
    offload: Offload | None = None
    reward_weights: Weights = "fp32"
    reward_policy: Policy = "none"
    reward_offload: Offload | None = None
    feed_forward_chunk: int | None = ranged(None, least=1)
    optimizer: OptimizerKind = "adamw"
    gradients: Gradients = "parameter"

    # Another of these gives the same numbers (but chunks add up gradients of weights in another
    # order); another of the rest makes it another run.
    FREE = ("policy", "offload", "reward_policy", "reward_offload", "feed_forward_chunk")


@dataclass(frozen=True)
class RewardMemory:
    """The keys of :class:`Memory` that apply to a reward model in training, whose blocks train."""

    weights: Literal["fp32", "bf16"] = "fp32"
    policy: Policy = "none"
    offload: Offload | None = None
    feed_forward_chunk: int | None = ranged(None, least=1)
    optimizer: OptimizerKind = "adamw"
    gradients: Gradients = "parameter"

    FREE = ("policy", "offload", "feed_forward_chunk")


def _check_memory(memory: Memory | RewardMemory, precision: str, lora: bool) -> None:
    """Refuse weights and optimizers that do not go together."""
    for name in ("weights", "reward_weights"):
        kind = getattr(memory, name, "fp32")
        if kind != "fp32" and precision != "bf16":
            raise ConfigError(
                f"memory.{name} is {kind}, which computes in bfloat16: set hardware.precision: "
                "bf16, or leave the weights in fp32"
            )
    if memory.weights in ("fp8", "nf4") and not lora:
        raise ConfigError(
            f"memory.weights is {memory.weights}, which cannot be trained: add lora: {{rank: 16}}, "
            "or choose bf16"
        )
    if memory.optimizer == "paged-adamw8bit" and memory.weights != "fp32":
        raise ConfigError(
            f"memory.optimizer is paged-adamw8bit, which needs memory.weights: fp32, not "
            f"{memory.weights}; adamw8bit takes every kind"
        )


def _check_rewards(rewards: tuple[NamedReward, ...]) -> None:
    names = [reward.name for reward in rewards]
    for i, reward in enumerate(rewards):
        if reward.name in names[:i]:
            raise ConfigError(f"reward[{i}].name is {reward.name!r}, which another reward has")
        several = isinstance(reward.path, tuple)
        if isinstance(reward.path, tuple) and len(reward.path) < 2:
            raise ConfigError(
                f"reward[{i}].path is a list of one, expected at least two, or a string"
            )
        if several and reward.ensemble is None:
            raise ConfigError(
                f"reward[{i}].ensemble is missing, expected mean, worst or uncertainty for a list "
                "of paths"
            )
        if not several and reward.ensemble is not None:
            raise ConfigError(
                f"reward[{i}].ensemble is {reward.ensemble}, which needs a list of paths"
            )
        if reward.coefficient is not None and reward.ensemble != "uncertainty":
            raise ConfigError(
                f"reward[{i}].coefficient is {reward.coefficient:g}, which only ensemble: "
                "uncertainty takes"
            )


@dataclass(frozen=True)
class TrainConfig:
    """``prfl-fast train``: reward feedback alternated with supervised training, or either alone."""

    model: str
    data: str
    out: str
    run: Run
    reward: str | ReferenceReward | tuple[NamedReward, ...] | None = None
    objectives: tuple[Literal["prfl", "sft"], ...] = ("prfl", "sft")
    prfl: Feedback = Feedback()
    rollout: RolloutSettings = RolloutSettings()
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    hardware: Hardware = Hardware()
    memory: Literal["auto"] | Memory = Memory()

    def __post_init__(self) -> None:
        if len(set(self.objectives)) != len(self.objectives):
            raise ConfigError(f"objectives is {list(self.objectives)}, expected no repeats")
        if "prfl" in self.objectives and self.reward is None:
            raise ConfigError("reward is missing: the prfl objective needs a reward model")
        if isinstance(self.reward, tuple):
            _check_rewards(self.reward)
        for name, wanted in (
            ("prfl.divergence", self.prfl.divergence > 0),
            ("rollout.merge_lora", self.rollout.merge_lora),
        ):
            if wanted and self.lora is None:
                raise ConfigError(
                    f"{name} is set, but there are no adapters: add lora: {{rank: 16}}, or leave "
                    "it out"
                )
        if isinstance(self.memory, Memory):
            _check_memory(self.memory, self.hardware.precision, self.lora is not None)
        elif self.hardware.precision != "bf16":
            raise ConfigError(
                "memory is auto, which plans for bfloat16: set hardware.precision: bf16"
            )


@dataclass(frozen=True)
class TrainRewardConfig:
    """``prfl-fast train-reward``: a latent reward model from a generator's first blocks."""

    model: str
    data: str
    out: str
    run: Run
    eval_data: str | None = None
    timesteps: tuple[int, ...] = ranged((201, 400, 600, 800, 1000), least=0, most=1000)
    num_blocks: int = ranged(8, least=1)
    num_heads: int = ranged(8, least=1)
    num_queries: int = ranged(1, least=1)
    loss: Literal["ce", "bt"] = "ce"
    label: str = "motion_quality"
    shift: float = ranged(5.0, above=0)
    optimizer: RewardOptimizer = RewardOptimizer()
    hardware: Hardware = Hardware()
    memory: RewardMemory = RewardMemory()

    def __post_init__(self) -> None:
        _check_memory(self.memory, self.hardware.precision, False)


@dataclass(frozen=True)
class ScoreConfig:
    """``prfl-fast score``: a dataset's scores by timestep, to a ``.jsonl`` or ``.csv`` file."""

    reward: str | ReferenceReward
    data: str
    out: str
    model: str | None = None
    timesteps: tuple[int, ...] = ranged((201, 400, 600, 800, 1000), least=0, most=1000)
    batch_size: int = ranged(1, least=1)
    seed: int = ranged(0, least=0)
    hardware: Hardware = Hardware()

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".jsonl", ".csv"):
            raise ConfigError(f"out is {self.out!r}, expected a name that ends in .jsonl or .csv")
        if isinstance(self.reward, ReferenceReward) and self.model is None:
            raise ConfigError(
                "model is missing: a reward in the reference's layout needs the generator's folder"
            )
