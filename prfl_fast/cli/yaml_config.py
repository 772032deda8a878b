"""Read YAML files into the pydantic models of :mod:`prfl_fast.cli.config` and check every key.

Every error is one line that names the dotted key, the given value and the expected value.
"""

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from prfl_fast.kernels.runtime.checks import describe
from prfl_fast.utils.optional import need

# YAML 1.1 reads 5e-6 and 1e3 as strings, but learning rates are written in this form.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_VALUES = 10_000  # in a file
_LIMITS = (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))


class ConfigError(ValueError):
    """Error for a file that cannot be read, or a key that is unknown, missing or invalid."""


class Section(BaseModel):
    """Base of all models: frozen, strict types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _as_number(value: object) -> object:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def key(default: Any, description: str) -> Any:
    """Return a field with a description; the default ``...`` makes it required."""
    return Field(default=default, description=description)


Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_as_number)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(gt=0, le=1)]
from_list = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
# YAML 1.1 reads the words on and off as true and false.
on_or_off = BeforeValidator(lambda v: {True: "on", False: "off"}[v] if isinstance(v, bool) else v)

Config = TypeVar("Config", bound=Section)


def load_config(kind: type[Config], path: str | os.PathLike[str]) -> Config:
    """Read a YAML file as ``kind``.

    Raises:
        ConfigError: if the file cannot be read, or a key is unknown, repeated, missing or wrong.
    """
    content = read_yaml(path)
    try:
        return parse_config(kind, content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """Build a model from plain values; errors are as in :func:`load_config`."""
    try:
        return kind.model_validate(dict(content))
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A misspelled required key is also missing; the error about its spelling comes first.
        problems.sort(key=lambda problem: problem["type"] != "extra_forbidden")
        lines = (_explained(kind, content, problem) for problem in problems)
        raise ConfigError(next(filter(None, lines), str(error))) from error


def to_yaml(config: Section) -> str:
    """Return the configuration with all its defaults as YAML that :func:`load_config` reads."""
    text: str = need("yaml").safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the keys and values of a YAML file."""
    yaml = need("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined, misc]
        """Loader that rejects duplicate keys; YAML would use the last one."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = loader.construct_object(key, deep=True)
            known = isinstance(name, str) and name in seen
            if known or not isinstance(name, str):
                problem = "appears twice" if known else "is not a string"
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: key {name!r} {problem}")
            seen.add(name)
        return loader.construct_mapping(node, deep=True)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)  # noqa: S506 - safe
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not YAML: nested too deeply") from error
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # a date or number that Python cannot read
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        reason = str(getattr(error, "problem", None) or error)
        raise ConfigError(f"{where}: not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {_shown(content)}, expected keys and values")
    # Nested aliases can stand for a billion values, over which pydantic and repr take minutes.
    left: list[Any] = [content]
    count = 0
    while left:
        value, count = left.pop(), count + 1
        if count > _VALUES:
            raise ConfigError(
                f"{path}: holds over {_VALUES} values, with those that aliases repeat"
            )
        if isinstance(value, (dict, list)):
            left += value.values() if isinstance(value, dict) else value
    return content


def members_of(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type annotation: one, unless it is a union."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if union else (hint,)


def sections_in(hint: Any) -> Iterator[type[Section]]:
    """Yield the models that an annotation allows, directly or in a list."""
    hint, _ = _unwrapped(hint)
    if is_section(hint):
        yield hint
    elif hint is not None and not isinstance(hint, str):
        for argument in typing.get_args(hint):
            yield from sections_in(argument)


def is_section(hint: Any) -> bool:
    """Return True if an annotation is a model, not a union or a value."""
    return isinstance(hint, type) and issubclass(hint, Section)


def expected(hint: Any, metadata: Sequence[Any] = (), *, short: bool = False) -> str:
    """Return a type and its range in words, as ``a number above 0``.

    ``metadata`` has constraints outside the annotation; ``short`` omits a mapping's keys.
    """
    hint, inner = _unwrapped(hint)
    metadata = (*metadata, *inner)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if len(members_of(hint)) > 1:
        parts = [expected(part, metadata, short=short) for part in members_of(hint)]
        return " or ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))
    if origin is Literal:
        names = [str(argument) for argument in arguments]
        return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
    if origin is tuple:
        least = max((getattr(limit, "min_length", 1) for limit in _flat(metadata)), default=1)
        count = {1: "one or more", 2: "two or more"}[least]
        if arguments[-1] is not Ellipsis:
            count = str(len(arguments))
            if len(set(arguments)) > 1:
                return f"[{', '.join(expected(part, short=True) for part in arguments)}]"
        return f"a list of {count}, each {expected(arguments[0], short=True)}"
    if is_section(hint):
        return "a mapping" + ("" if short else f" with keys {', '.join(hint.model_fields)}")
    words = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    if hint not in (int, float):
        return words.get(hint, "null")
    ranges = [
        f"{relation} {getattr(limit, name):g}"
        for name, relation in _LIMITS
        for limit in _flat(metadata)
        if getattr(limit, name, None) is not None
    ]
    return " ".join(filter(None, (words[hint], " and ".join(ranges))))


def _unwrapped(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Split ``Annotated[type, constraints]``."""
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[0], typing.get_args(hint)[1:]
    return hint, ()


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    for item in metadata:
        yield from _flat(item.metadata) if isinstance(item, FieldInfo) else (item,)


def _explained(kind: type[Section], content: Any, problem: Any) -> str | None:
    """Return a pydantic error in terms of the file; None if it is about another union member."""
    *parents, last = problem["loc"] or (None,)
    if problem["type"] == "extra_forbidden":
        found = _follow(kind, content, parents)
        if found is None:
            return None
        keys = list(next(sections_in(found.hint)).model_fields)
        near = difflib.get_close_matches(str(last), keys, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(keys)}"
        return f"unknown key {found.child(last)!r}: {hint}"
    found = _follow(kind, content, problem["loc"])
    if found is None:
        return None
    if problem["type"] in ("value_error", "assertion_error"):
        text = re.sub(r"^(Value|Assertion) error, ", "", problem["msg"])
        return f"{found.key}.{text}" if found.key else text
    wanted = expected(found.hint, found.metadata)
    if problem["type"] == "missing" and found.value is None:
        return f"{found.key} is missing, expected {wanted}"
    if problem["type"] == "finite_number":
        wanted = "a finite number"
    near = difflib.get_close_matches(str(found.value), _words_in(found.hint), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{found.key} is {_shown(found.value)}, expected {wanted}{hint}"


class _Place(typing.NamedTuple):
    """A key of the file: its dotted name, its value, and the type it should have."""

    key: str
    value: Any
    hint: Any
    metadata: Sequence[Any]

    def child(self, name: object) -> str:
        return f"{self.key}.{name}" if self.key else str(name)


def _follow(kind: type[Section], content: Any, location: Sequence[Any]) -> _Place | None:
    """Return the place of a pydantic error, whose location also names members of unions."""
    place = _Place("", content, kind, ())
    for part in location:
        members = [m for m in members_of(_unwrapped(place.hint)[0]) if m is not types.NoneType]
        if len(members) > 1:  # ``part`` is the label of one of them
            fits = _member_for(place.value, members)
            if fits is None:
                return place
            name = fits.__name__ if is_section(fits) else "tuple["
            if name not in str(part):
                return None
            place = place._replace(hint=fits, metadata=())
            continue
        hint = _unwrapped(members[0])[0]
        if is_section(hint) and part in hint.model_fields:
            field = hint.model_fields[part]
            value = place.value.get(part) if isinstance(place.value, dict) else None
            place = _Place(place.child(part), value, field.annotation, field.metadata)
        elif isinstance(part, int) and part < len(place.value):
            items = typing.get_args(hint)
            item = items[0] if items[-1] is Ellipsis else items[part]
            place = _Place(f"{place.key}[{part}]", place.value[part], item, ())
    return place


def _member_for(value: Any, members: Sequence[Any]) -> Any:
    """Return the union member that a mapping or list was written for, or None."""
    for member in members:
        bare, _ = _unwrapped(member)
        if isinstance(value, dict) and is_section(bare):
            return member
        if isinstance(value, list) and typing.get_origin(bare) is tuple:
            return member
    return None


def _words_in(hint: Any) -> list[str]:
    """Return the words that an annotation allows."""
    hint, _ = _unwrapped(hint)
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    return [word for member in members_of(hint) if member is not hint for word in _words_in(member)]


def _shown(value: Any) -> str:
    if value is None:
        return "empty"
    return "a mapping" if isinstance(value, dict) else describe(value)
