"""Checks of the arguments that users pass: one function per kind of input.

Each raises an error that names the argument, its value and the expected values.
"""

import hashlib
import math
from collections.abc import Collection
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

from prfl_fast.kernels.runtime.checks import describe


def plain(value: Any) -> Any:
    """Return a numpy scalar, alone or in a tuple, as a Python value; return others unchanged."""
    if type(value) is tuple:
        return tuple(map(plain, value))
    # Of numpy's scalars, only float64 is an instance of a Python type.
    scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0
    return value.item() if scalar else value


def make_fields_plain(config: Any) -> None:
    """Replace the numpy scalars among the fields of a dataclass, which may be frozen."""
    for field in fields(config):
        object.__setattr__(config, field.name, plain(getattr(config, field.name)))


def is_number(value: object) -> bool:
    """Return True for a finite real number; booleans are not numbers."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def is_count(value: object, least: int = 1) -> bool:
    """Return True for an integer of at least ``least``; booleans are not integers."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check(ok: bool, name: str, value: object, expected: str, *, hint: str = "") -> None:
    """Raise ``ValueError`` unless ``ok``.

    The message is ``{name} is {value}, expected {expected}``; tensors show dtype, shape and device.

    Args:
        hint: a second sentence that names the call that fixes the error.
    """
    if not ok:
        text = f"{name} is {describe(value)}, expected {expected}"
        raise ValueError(f"{text}. {hint}" if hint else text)


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least ``least``."""
    wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
    check(is_count(value, least), name, value, wanted)


def check_number(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number."""
    check(is_number(value), name, value, "a finite number")


def check_seed(seed: object) -> None:
    """Raise ``ValueError`` unless ``seed`` is an integer, of any size and sign."""
    ok = isinstance(seed, Integral) and not isinstance(seed, bool)
    check(ok, "seed", seed, "an integer")


def torch_seed(seed: int) -> int:
    """Return a seed that torch takes: ``seed`` itself in 64 bits, else 64 bits of its hash."""
    if -(1 << 63) <= seed < 1 << 64:
        return seed
    return int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "little")


def check_positive(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above 0."""
    check(is_number(value) and value > 0, name, value, "a positive number")  # type: ignore[operator]


def check_fraction(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is a number in (0, 1]."""
    ok = is_number(value) and 0 < value <= 1  # type: ignore[operator]
    check(ok, name, value, "a number in (0, 1]")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    check(value in choices, name, value, f"one of {', '.join(map(repr, choices))}")


def check_type(name: str, value: object, kind: type | tuple[type, ...], expected: str = "") -> None:
    """Raise ``TypeError`` unless ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = expected or " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise TypeError(f"{name} is {describe(value)}, expected {names}")
