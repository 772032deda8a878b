"""Parse values of options that several commands have."""

import argparse


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
