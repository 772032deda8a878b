"""Units of printed sizes."""

GIB = 1 << 30
