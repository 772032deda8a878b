"""The one rule for numerics: the error against float64 is at most twice that of plain PyTorch."""

import re
from collections.abc import Callable, Iterable, Sequence

import torch

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # under test, plain PyTorch, float64


def errors(out: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute and the root-mean-square error of ``out`` against float64."""
    difference = out.detach().double() - oracle.detach().double()
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def assert_within_twice(
    out: torch.Tensor,
    plain: torch.Tensor,
    oracle: torch.Tensor,
    name: str = "output",
    rounding: float = 1.0,
    dtype: torch.dtype | None = None,
    nearby: Callable[[], Iterable[Triple]] | None = None,
) -> None:
    """Assert that max and RMS error are at most twice those of plain PyTorch, plus rounding.

    Args:
        out: the result under test.
        plain: the result of ordinary PyTorch at the same dtype.
        oracle: the result in float64.
        rounding: slack in units of half an ulp at the oracle's scale (its maximum, its RMS).
        dtype: the dtype whose ulp counts; ``out.dtype`` unless given (a float32 sum of bf16
            products, say).
        nearby: gives ``(out, plain, oracle)`` of inputs close to these. If the rule does not hold,
            it must hold for the root mean squares of the errors of all of them. A single result of
            a few elements may have ten times the error of another, equally exact computation.
    """
    assert oracle.dtype == torch.float64, "the oracle must be computed in float64"
    assert out.shape == oracle.shape, (
        f"{name}: shape {tuple(out.shape)}, oracle {tuple(oracle.shape)}"
    )
    assert out.dtype == plain.dtype, f"{name}: dtype {out.dtype}, plain PyTorch gives {plain.dtype}"
    assert torch.isfinite(out).all(), (
        f"{name}: {(~torch.isfinite(out)).sum().item()} non-finite values"
    )
    if out.numel() == 0:
        return
    half_ulp = torch.finfo(dtype or out.dtype).eps / 2 * rounding
    problem = _beyond_twice([(out, plain, oracle)], half_ulp)
    if problem and nearby is not None:
        problem = _beyond_twice([(out, plain, oracle), *nearby()], half_ulp)
    assert not problem, f"{name}: {problem}"


def _beyond_twice(triples: Sequence[Triple], half_ulp: float) -> str:
    """Return how the pooled errors break the rule; an empty text if they keep it."""
    found = torch.tensor(
        [[errors(o, e), errors(p, e), errors(e, torch.zeros_like(e))] for o, p, e in triples],
        dtype=torch.float64,
        device="cpu",
    )
    pooled = found.square().mean(0).sqrt().t().tolist()
    for kind, (error, allowed, unit) in zip(("max", "rms"), pooled, strict=True):
        limit = 2 * allowed + half_ulp * unit
        if not error <= limit:
            return f"{kind} error {error:.3e} > 2 × {allowed:.3e} + rounding ({limit:.3e})"
    return ""


class PooledErrors:
    """Hold the rule for a model: errors of a kind of tensor, pooled over seeds and blocks.

    A gradient such as a cross-attention query bias's has few degrees of freedom: between two
    equally exact computations the ratio of one seed's errors reaches 3.4. That of the root mean
    squares over six seeds stays below 1.5 in all cases of the official layout.
    """

    def __init__(self):
        self.squares = {}

    def add(self, oracle, plain, out):
        """Add one seed's tensors by name: in float64, of plain PyTorch, and those under test."""
        assert out.keys() == plain.keys() == oracle.keys()
        for name, exact in oracle.items():
            ours, theirs = out[name], plain[name]
            assert (ours is None) == (theirs is None) == (exact is None), name
            if exact is None:
                continue
            assert ours.dtype == theirs.dtype and torch.isfinite(ours).all(), name
            kind = re.sub(r"(blocks|motion_network)\.\d+", r"\1", name)
            sums = self.squares.setdefault(kind, [0.0, 0.0])
            for index, found in enumerate((ours, theirs)):
                sums[index] += (found.double() - exact).square().mean().item()

    def assert_within_twice(self):
        """Assert that no kind's error is more than twice that of plain PyTorch."""
        ratios = {
            k: (ours / max(theirs, 1e-60)) ** 0.5 for k, (ours, theirs) in self.squares.items()
        }
        worst = max(ratios, key=ratios.__getitem__)
        print(f"output {ratios.get('output', 0):.2f}, worst {ratios[worst]:.2f} ({worst})")
        assert ratios[worst] <= 2, f"{worst}: {ratios[worst]:.2f} times the unpatched model's error"
