"""The one rule for numerics: the error against float64 is at most twice that of plain PyTorch."""

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
