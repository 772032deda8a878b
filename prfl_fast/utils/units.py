"""Units of printed numbers, and sizes of memory with a unit."""

import re

GIB = 1 << 30


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def short_number(value: float) -> str:
    """Return a number with two significant digits, so that a small one is not shown as zero."""
    return f"{value:.2g}"


def seconds(value: float) -> str:
    """Return seconds as ``12.3 ms``, ``1.2 s`` or ``3 min 20 s``."""
    if value < 0.9995:  # else it would be 1e+03 ms
        return f"{1e3 * value:.3g} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{int(value) // 60} min {int(value) % 60:02} s"


def size_of(value: int | str, name: str = "") -> int:
    """Return the bytes of ``24GiB`` (powers of two), ``24GB`` (powers of ten) or a whole number.

    Raise ``ValueError`` for other values; the message begins with ``name``, if given.
    """
    units = {"": 1, "MIB": 1 << 20, "GIB": GIB, "TIB": 1 << 40, "MB": 10**6, "GB": 10**9}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(value).strip())
    unit = units.get(match[2].upper()) if match else None
    number = 0.0 if match is None or unit is None or isinstance(value, bool) else float(match[1])
    start = f"{name} is " if name else ""
    if number <= 0:
        raise ValueError(f"{start}{value!r}, expected bytes or a size like 24GiB or 24GB")
    # A text without unit is in bytes, so a small one probably lacks its unit.
    if isinstance(value, str) and unit == 1 and number < 1 << 20:
        raise ValueError(f"{start}'{value} bytes', expected a size like {value}GiB")
    return int(number * (unit or 0))
