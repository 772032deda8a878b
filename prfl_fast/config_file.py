"""YAML files as frozen dataclasses, every key checked.

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
from dataclasses import MISSING, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from prfl_fast._extras import need

Config = TypeVar("Config")
# YAML 1.1 takes 5e-6 and 1e3 for strings; people write learning rates that way.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class ConfigError(ValueError):
    """A file cannot be read, or a key is unknown, missing, of the wrong type or out of range."""


def ranged(default: Any = MISSING, **limits: float) -> Any:
    """A field with limits: ``least`` ≤ value ≤ ``most``, ``above`` < value < ``below``."""
    return field(default=default, metadata=limits)


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
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:  # settings of the library, which do not know their key
        raise ConfigError(f"{prefix}{error}") from error


def _value(value: Any, hint: Any, key: str, limits: Mapping[str, float]) -> Any:
    """``value`` as the annotated type, or a ConfigError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = ConfigError(f"{key} is {_shown(value)}, expected {_wanted(hint)}")
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        option = next((a for a in arguments if _may_be(value, a)), None)
        if option is None:
            raise wrong
        return _value(value, option, key, limits)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise wrong
        return from_mapping(hint, value, f"{key}.")  # type: ignore[arg-type]
    if origin is Literal:
        if isinstance(value, bool) and {"on", "off"} <= set(arguments):
            return "on" if value else "off"  # YAML 1.1 takes these words for true and false
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
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list)
    return isinstance(value, dict if dataclasses.is_dataclass(hint) else hint)


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
