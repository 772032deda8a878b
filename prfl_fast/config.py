"""Configuration of the command line: frozen dataclasses read from YAML, every key checked.

A field's annotation is its type, its ``metadata`` its range. Unknown keys are refused with the
nearest known spelling, and every error names the dotted key, what came, and what is expected.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from prfl_fast._extras import need

Config = TypeVar("Config")
Policy = Literal["none", "full", "attention"]
Offload = Literal["cpu"]
Weights = Literal["fp32", "bf16", "fp8", "nf4"]
OptimizerKind = Literal["adamw", "adamw-sr", "adamw8bit", "paged-adamw8bit", "adamw-cpu"]
Gradients = Literal["parameter", "fp32"]
# YAML 1.1 takes 5e-6 and 1e3 for strings; people write learning rates that way.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ConfigError(ValueError):
    """A file cannot be read, or a key is unknown, missing, of the wrong type or out of range."""


def _ranged(default: Any = MISSING, **limits: float) -> Any:
    """A field with limits: ``least`` ≤ value ≤ ``most``, ``above`` < value < ``below``."""
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class Optimizer:
    """AdamW. The learning rate rises linearly over ``warmup_steps``, then stays."""

    learning_rate: float = _ranged(5e-6, above=0)
    betas: tuple[float, float] = _ranged((0.9, 0.999), least=0, below=1)
    eps: float = _ranged(1e-8, above=0)
    weight_decay: float = _ranged(0.01, least=0)
    clip_norm: float | None = _ranged(1.0, above=0)
    warmup_steps: int = _ranged(0, least=0)


@dataclass(frozen=True)
class RewardOptimizer(Optimizer):
    """AdamW at the reward model's rate."""

    learning_rate: float = _ranged(1e-6, above=0)


@dataclass(frozen=True)
class Run:
    """Length, batches, checkpoints and logs of a training run."""

    steps: int = _ranged(least=1)
    batch_size: int = _ranged(1, least=1)
    accumulation: int = _ranged(5, least=1)
    save_every: int = _ranged(100, least=1)
    keep_last: int = _ranged(2, least=1)
    ema_decay: float | None = _ranged(None, above=0, below=1)
    seed: int = _ranged(0, least=0)
    tensorboard: bool = True
    resume: str | None = "auto"


@dataclass(frozen=True)
class Feedback:
    """The PRFL step; with ``points`` above 1, lower ``run.accumulation`` by as much."""

    num_steps: int = _ranged(40, least=2)
    points: int = _ranged(1, least=1)
    solver: Literal["unipc", "euler"] = "unipc"
    shift: float = _ranged(5.0, above=0)
    target: float = 2.0
    weight: float = _ranged(0.1, above=0)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters instead of full training."""

    rank: int = _ranged(least=1)
    alpha: float | None = _ranged(None, above=0)
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class ReferenceReward:
    """A reward model in HY-Video-PRFL's layout: a transformer folder, an MLP and a pooling file."""

    transformer: str
    mlp: str
    pool: str
    num_heads: int = _ranged(8, least=1)


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
    feed_forward_chunk: int | None = _ranged(None, least=1)
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
    feed_forward_chunk: int | None = _ranged(None, least=1)
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


@dataclass(frozen=True)
class TrainConfig:
    """``prfl-fast train``: reward feedback alternated with supervised training, or either alone."""

    model: str
    data: str
    out: str
    run: Run
    reward: str | ReferenceReward | None = None
    objectives: tuple[Literal["prfl", "sft"], ...] = ("prfl", "sft")
    prfl: Feedback = Feedback()
    optimizer: Optimizer = Optimizer()
    lora: Lora | None = None
    hardware: Hardware = Hardware()
    memory: Literal["auto"] | Memory = Memory()

    def __post_init__(self) -> None:
        if len(set(self.objectives)) != len(self.objectives):
            raise ConfigError(f"objectives is {list(self.objectives)}, expected no repeats")
        if "prfl" in self.objectives and self.reward is None:
            raise ConfigError("reward is missing: the prfl objective needs a reward model")
        if self.prfl.points > self.prfl.num_steps - 1:
            raise ConfigError(
                f"prfl.points is {self.prfl.points}, expected at most prfl.num_steps - 1 = "
                f"{self.prfl.num_steps - 1}"
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
    timesteps: tuple[int, ...] = _ranged((201, 400, 600, 800, 1000), least=0, most=1000)
    num_blocks: int = _ranged(8, least=1)
    num_heads: int = _ranged(8, least=1)
    num_queries: int = _ranged(1, least=1)
    loss: Literal["ce", "bt"] = "ce"
    label: str = "motion_quality"
    shift: float = _ranged(5.0, above=0)
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
    timesteps: tuple[int, ...] = _ranged((201, 400, 600, 800, 1000), least=0, most=1000)
    batch_size: int = _ranged(1, least=1)
    seed: int = _ranged(0, least=0)
    hardware: Hardware = Hardware()

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in (".jsonl", ".csv"):
            raise ConfigError(f"out is {self.out!r}, expected a name that ends in .jsonl or .csv")
        if isinstance(self.reward, ReferenceReward) and self.model is None:
            raise ConfigError(
                "model is missing: a reward in the reference's layout needs the generator's folder"
            )


def load_config(kind: type[Config], path: str | os.PathLike[str]) -> Config:
    """Read a YAML file as ``kind``.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is unknown, repeated, missing, of the
            wrong type, or out of range.
        MissingExtra: pyyaml is not installed.
    """
    content = read_yaml(path)
    try:
        return from_mapping(kind, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: the file is missing or not YAML, or a key is repeated or not a string.
        MissingExtra: pyyaml is not installed.
    """
    yaml = need("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """Refuses a key that appears twice, of which YAML would keep the last."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = loader.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: key {name!r} is not a string")
            if name in seen:
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: key {name!r} appears twice")
            seen.add(name)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    try:
        content = yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise ConfigError(
            f"{where}: not YAML: {getattr(error, 'problem', None) or error}"
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {_shown(content)}, expected keys and values")
    return content


def from_mapping(kind: type[Config], content: Mapping[str, Any], prefix: str = "") -> Config:
    """Build a configuration dataclass from plain values.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(fields)}"
            raise ConfigError(f"unknown key {prefix + str(key)!r}: {hint}")
    values = {}
    for name, spec in fields.items():
        if name in content:
            values[name] = _value(content[name], hints[name], prefix + name, spec.metadata)
        elif spec.default is MISSING:
            raise ConfigError(f"{prefix}{name} is missing, expected {_wanted(hints[name])}")
    return kind(**values)


def _value(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    """``value`` as the annotated type, or a ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{key} is {_shown(value)}, expected {_wanted(hint)}")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        # A mapping can only be the nested dataclass, anything else only the plain type.
        options = [
            a for a in options if dataclasses.is_dataclass(a) == isinstance(value, dict)
        ] or options
        if len(options) > 1:
            raise wrong
        if not _may_be(value, options[0]):
            raise wrong
        return _value(value, options[0], key, limits)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong
        return from_mapping(hint, value, f"{key}.")  # type: ignore[arg-type]
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        near = difflib.get_close_matches(str(value), arguments, n=1)
        raise ConfigError(f"{wrong}{f'; did you mean {near[0]!r}?' if near else ''}")
    if origin is tuple:
        if not isinstance(value, list) or not value:
            raise wrong
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise wrong
        return tuple(
            _value(item, arguments[0], f"{key}[{i}]", limits) for i, item in enumerate(value)
        )
    if hint is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        value = float(value)
    if not _may_be(value, hint):
        raise wrong
    if hint is float:
        value = float(value)
        if not math.isfinite(value):
            raise ConfigError(f"{key} is {value}, expected a finite number")
    if hint in (int, float):
        _check_limits(value, key, limits)
    return value


def _may_be(value: Any, hint: Any) -> bool:
    if hint is float:
        number = isinstance(value, str) and _NUMBER.fullmatch(value)
        return bool(number) or isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and value != ""
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str) and value in typing.get_args(hint)
    return hint is not bool or isinstance(value, bool)


def _check_limits(value: float, key: str, limits: Mapping[str, float]) -> None:
    tests = {
        "least": (lambda v, limit: v >= limit, "at least"),
        "most": (lambda v, limit: v <= limit, "at most"),
        "above": (lambda v, limit: v > limit, "above"),
        "below": (lambda v, limit: v < limit, "below"),
    }
    if not all(tests[name][0](value, limit) for name, limit in limits.items()):
        expected = " and ".join(f"{tests[name][1]} {limit:g}" for name, limit in limits.items())
        raise ConfigError(f"{key} is {value:g}, expected a value {expected}")


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    return "a mapping" if isinstance(value, dict) else repr(value)


def _wanted(hint: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_wanted(a) for a in arguments)
    if origin is Literal:
        return f"one of {', '.join(arguments)}" if len(arguments) > 1 else str(arguments[0])
    if origin is tuple:
        count = "one or more" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"a list of {count}, each {_wanted(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with keys {', '.join(f.name for f in dataclasses.fields(hint))}"
    names = {
        int: "a whole number",
        float: "a number",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return names[hint]


def to_yaml(config: Any) -> str:
    """The configuration with all its defaults, as YAML that :func:`load_config` reads back."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    text: str = need("yaml").safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)
    return text
