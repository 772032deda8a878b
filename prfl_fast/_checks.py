"""Checks of numbers that users pass, with messages that name them."""

import math


def is_number(value: object) -> bool:
    """Whether a finite real number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ``ValueError`` unless a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"a whole number of at least {least}"
        raise ValueError(f"{name} is {value!r}, expected {wanted}")


def check_number(name: str, value: object) -> None:
    """Raise ``ValueError`` unless a finite number."""
    if not is_number(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")


def check_positive(name: str, value: object) -> None:
    """Raise ``ValueError`` unless a finite number above 0."""
    if not (is_number(value) and value > 0):  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, expected a positive number")
