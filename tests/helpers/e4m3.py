"""e4m3 without the package: its table of numbers, an encoder that searches it, comparisons."""

import numpy as np
import torch

# Sign, 4 bits of exponent (bias 7), 3 of mantissa; code 127 is NaN, there is no infinity.
CODES = np.arange(127)
EXPONENT, MANTISSA = CODES >> 3, CODES & 7
TABLE = np.where(EXPONENT == 0, MANTISSA * 2.0**-9, (8 + MANTISSA) * 2.0 ** (EXPONENT - 10))


def encode(values: np.ndarray) -> np.ndarray:
    """Return the codes of float64 values: nearest, ties to even, saturated at 448."""
    magnitude = np.minimum(np.abs(values), TABLE[-1])
    magnitude = np.where(np.isnan(values), 0.0, magnitude)
    above = np.searchsorted(TABLE, magnitude)  # the first number that is not smaller
    below = np.maximum(above - 1, 0)
    up, down = TABLE[above] - magnitude, magnitude - TABLE[below]
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    codes = np.where(np.isnan(values), 127, nearest) | np.where(np.signbit(values), 128, 0)
    return codes.astype(np.uint8)


def codes(q: torch.Tensor) -> np.ndarray:
    """Return the bits of a float8_e4m3fn tensor, both NaN as one."""
    bits = q.detach().cpu().contiguous().view(torch.uint8).numpy()
    return np.where(bits & 127 == 127, 127, bits)


def dequantized(pair) -> torch.Tensor:
    """Return q·scale in float64."""
    q, scale = pair
    return q.double() * scale.double()


def assert_one_step(left, right) -> None:
    """Assert that two ``(q, scale)`` are equal but for the last bits of float32 sums before them.

    Such bits seldom move a number across the border between two e4m3 numbers, and by one step at
    most. A sum off by 2⁻²³ of the largest number of a token crosses with a chance of
    2⁻⁵ where steps are smallest (2⁻¹⁸ of it), which is below 2⁻¹⁵ of it, and of 2⁻¹⁹ at its size.
    """
    (q, scale), (other_q, other_scale) = left, right
    assert q.shape == other_q.shape and scale.shape == other_scale.shape
    torch.testing.assert_close(scale.cpu(), other_scale.cpu(), rtol=2.0**-20, atol=0.0)
    ordinals = [(c & 127).astype(int) * np.where(c & 128, -1, 1) for c in map(codes, (q, other_q))]
    steps = np.abs(ordinals[0] - ordinals[1])
    assert steps.size == 0 or steps.max() <= 1
    assert (steps > 0).sum() <= 1 + 1e-3 * steps.size


def assert_quantizes(pair, oracle: torch.Tensor) -> None:
    """Assert that ``(q, scale)`` are those of a float64 oracle, up to float32 before rounding.

    Half a step is 1/16 of a number, or 2⁻¹⁰ of the scale for the smallest; 2⁻¹⁸ of the largest
    number of a token is what float32 sums may be off by.
    """
    q, scale = pair
    assert q.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert q.shape == oracle.shape and scale.shape == (*oracle.shape[:-1], 1)
    assert q.is_contiguous() and scale.is_contiguous()
    if oracle.numel() == 0:
        return
    amax = oracle.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), amax / 448, rtol=2.0**-18, atol=0.0)
    bound = torch.maximum(oracle.abs() / 16, scale.double() / 1024) + amax * 2.0**-18
    assert ((dequantized(pair) - oracle).abs() <= bound).all()
