"""Parse values of options that several commands have, without torch, whose import takes seconds."""

import argparse
import math

from prfl_fast.utils.units import size_of


def count(text: str, least: int = 1) -> int:
    """Return an integer of at least ``least``."""
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return number


def finite(text: str) -> float:
    """Return a finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number")
    return number


def positive(text: str) -> float:
    """Return a finite number above 0."""
    number = finite(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return number


def memory_size(text: str) -> int:
    """Return the bytes of ``24GiB`` or ``24GB``."""
    try:
        return size_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def video_size(text: str) -> tuple[int, int]:
    """Return height and width of ``480x832``."""
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected HEIGHTxWIDTH") from None


def whole_numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of ``17,81`` in increasing order, each once."""
    try:
        return tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers such as 17,81") from None


def timesteps(text: str) -> tuple[int, ...]:
    """Return the timesteps of ``201,800`` in increasing order, each once."""
    found = whole_numbers(text)
    if not all(0 <= t <= 1000 for t in found):
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers in 0 … 1000")
    return found
