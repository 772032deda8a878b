"""Units of printed numbers."""

GIB = 1 << 30


def plural(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless the number is 1."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def short_number(value: float) -> str:
    """Return a number with two significant digits, so that a small one is not shown as zero."""
    return f"{value:.2g}"
