"""The one rule for numerics: the error against float64 is at most twice that of plain PyTorch."""

import re

import torch


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
) -> None:
    """Assert that max and RMS error are at most twice those of plain PyTorch, plus rounding.

    Args:
        out: the result under test.
        plain: the result of ordinary PyTorch at the same dtype.
        oracle: the result in float64.
        rounding: slack in units of half an ulp at the oracle's scale (its maximum, its RMS).
        dtype: the dtype whose ulp counts; ``out.dtype`` unless given (a float32 sum of bf16
            products, say).
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
    scale = (oracle.abs().max().item(), oracle.square().mean().sqrt().item())
    for kind, error, allowed, unit in zip(
        ("max", "rms"), errors(out, oracle), errors(plain, oracle), scale, strict=True
    ):
        limit = 2 * allowed + half_ulp * unit
        assert error <= limit, (
            f"{name}: {kind} error {error:.3e} > 2 × {allowed:.3e} + rounding ({limit:.3e})"
        )


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
