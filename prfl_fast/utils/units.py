"""Units of printed numbers."""

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
