"""Coefficients of UniPC's steps (Zhao et al., arXiv 2302.04867), as Python floats."""

from collections.abc import Sequence
from ctypes import c_float
from functools import lru_cache
from typing import NamedTuple

import torch


class Update(NamedTuple):
    """Coefficients of a UniPC step on ``[x, v, previous corrected x, *x0 predictions]``.

    The predictions are ordered newest first. A first step has only ``[x, v]`` and corrects nothing.
    """

    correct: tuple[float, ...] | None
    advance: tuple[float, ...]


class _Levels:
    """Hold noise levels, their λ = log((1-σ)/σ), and h = λ' - λ and e^{-h} - 1 between them."""

    def __init__(self, sigmas: Sequence[float], dtype: torch.dtype) -> None:
        sigma = torch.tensor(sigmas, dtype=dtype, device="cpu")
        log_snr = torch.log(1 - sigma) - torch.log(sigma)
        self.sigmas, self.wide = sigmas, dtype == torch.float64
        self.log_snr, self.h = log_snr.tolist(), log_snr.diff().tolist()
        self.growth = torch.expm1(-log_snr.diff()).tolist()

    def round(self, value: float) -> float:
        return value if self.wide else c_float(value).value


@lru_cache(maxsize=16)
def unipc_updates(
    sigmas: tuple[float, ...], orders: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[Update, ...], ...]:
    """Return the updates ``[step][steps taken before it, at most the largest order]``.

    ``sigmas`` end in 0. Entry i of ``orders`` is that of the predictor of step i, and of the
    corrector that improves its result at step i + 1. Fewer steps before or after it lower it.
    ``dtype`` is that of the arithmetic, float32 or float64. Official Wan, HY-Video-PRFL and
    diffusers use float32, which moves the weight of a velocity by up to 4e-6 (40 steps, shift 5).
    """
    levels = _Levels(sigmas, dtype)
    return tuple(
        tuple(_unipc_update(levels, orders, index, n) for n in range(min(index, max(orders)) + 1))
        for index in range(len(sigmas) - 1)
    )


def _unipc_update(levels: _Levels, orders: tuple[int, ...], index: int, taken: int) -> Update:
    count = len(levels.sigmas) - 1
    here = levels.sigmas[index]
    past = [index - 1 - k for k in range(taken)]  # newest first, as the history
    # Predictor: the data are x0 predicted here and at `ahead` earlier levels.
    ahead = min(orders[index], count - index, taken + 1) - 1
    p_x, p_here, p_past = _bh_update(levels, index, past[:ahead])
    if taken == 0:
        return Update(None, (p_x + p_here, -here * p_here))
    # Corrector, of the order the last predictor had: the data are x0 at the last level, earlier
    # ones, and here.
    behind = min(orders[index - 1], count - index + 1, taken)
    c_x, c_last, c_others = _bh_update(levels, index - 1, [*past[1:behind], index])
    c_here = c_others.pop()
    c_past = _padded([c_last, *c_others], taken)
    correct = (c_here, -here * c_here, c_x, *c_past)
    x0_here = p_x * c_here + p_here
    p_past = _padded(p_past, taken)
    advance = (
        x0_here,
        -here * x0_here,
        p_x * c_x,
        *(p_x * c + p for c, p in zip(c_past, p_past, strict=True)),
    )
    return Update(correct, advance)


def _padded(values: list[float], length: int) -> list[float]:
    return values + [0.0] * (length - len(values))


def _bh_update(levels: _Levels, start: int, others: list[int]) -> tuple[float, float, list[float]]:
    """Return the weights of ``x``, of x0 at ``start`` and of x0 at the ``others`` in one update.

    From σ at index ``start`` to the next σ', with h = λ' - λ, m the x0 predicted at ``start`` and
    m_k those at the others, r_k = (λ_k - λ)/h:

        x' = (σ'/σ)·x - (1-σ')·B·(m + Σ_k ρ_k·(m_k - m)/r_k),   B = e^{-h} - 1

    The ρ match the Taylor terms of the exact solution: Σ_k ρ_k·r_k^{i-1} = i!·φ_i/B for every i,
    where φ_1 = -B/h - 1 and φ_{i+1} = -φ_i/h - 1/(i+1)!. A single other point takes ρ = 1/2, which
    is as accurate.
    """
    h, growth, rounded = levels.h[start], levels.growth[start], levels.round
    differences = [rounded(levels.log_snr[k] - levels.log_snr[start]) for k in others]
    ratios = [rounded(difference / h) for difference in differences]
    if len(ratios) < 2:
        rhos = [0.5] * len(ratios)
    else:
        moments = []
        # Each φ cancels: float32 costs the second 1e-5, so its roundings are repeated one by one.
        phi, factorial = rounded(rounded(growth / -h) - 1), 1.0
        for i in range(1, len(ratios) + 1):
            moments.append(rounded(rounded(phi * factorial) / growth))
            factorial *= i + 1
            phi = rounded(rounded(phi / -h) - rounded(1 / factorial))
        rhos = _solve([[r**i for r in ratios] for i in range(len(ratios))], moments)
    scale = -(1 - levels.sigmas[start + 1]) * growth
    weights = [scale * rho / ratio for rho, ratio in zip(rhos, ratios, strict=True)]
    return levels.sigmas[start + 1] / levels.sigmas[start], scale - sum(weights), weights


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solve a 2×2 or 3×3 system by elimination with row pivoting."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    n = len(rows)
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    solution = [0.0] * n
    for i in reversed(range(n)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, n))
        solution[i] = (rows[i][n] - known) / rows[i][i]
    return solution
