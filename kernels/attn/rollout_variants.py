"""Choose the variant of ``rollout_attention`` for a chip, or ``attention`` where it has none."""

import functools
import warnings
from typing import NamedTuple

import torch

from prfl_fast.kernels.runtime.checks import require
from prfl_fast.kernels.runtime.registry import Choice
from prfl_fast.kernels.runtime.triton import HAS_TRITON

VARIANTS = ("int8_fp8", "fp8", "int8")


class Best(NamedTuple):
    """A variant, or None for ``attention``, and the reason."""

    variant: str | None
    reason: str


def choose_variant(capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int) -> Best:
    """Return the variant for a chip; without a chip that of Hopper, which PyTorch emulates."""
    if dtype not in (torch.bfloat16, torch.float16):
        return Best(None, f"8-bit attention takes bfloat16 and float16, not {dtype}")
    if head_dim % 16 or not 16 <= head_dim <= 256:
        return Best(None, f"8-bit attention takes heads of 16, 32, … 256 channels, not {head_dim}")
    if capability is None:
        return Best("int8_fp8", "int8 q·k, e4m3 p·v as on capability 9.0")
    chip = f"capability {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return Best(None, f"8-bit attention needs an NVIDIA GPU of capability 8.0, not {chip}")
    if capability < (8, 9):
        return Best("int8", f"{chip}: int8 q·k, 16-bit p·v")
    if capability[0] in (8, 9, 12):
        return Best("int8_fp8", f"{chip}: int8 q·k, e4m3 p·v")
    return Best("fp8", f"{chip}: e4m3 q·k and p·v")


def chip_of(device: torch.device) -> tuple[int, int] | None:
    """Return the capability of a CUDA device, (0, 0) for AMD; None for other devices."""
    if device.type != "cuda":
        return None
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device)


def best_variant(device: torch.device, dtype: torch.dtype, head_dim: int) -> Best:
    """Return the variant for a device, or None if Triton is missing."""
    best = choose_variant(chip_of(device), dtype, head_dim)
    if best.variant is not None and device.type == "cuda" and not HAS_TRITON:
        return Best(None, "triton is not installed")
    return best


@functools.cache
def warn_once(reason: str) -> None:
    warnings.warn(f"rollout_attention runs attention: {reason}", stacklevel=2)


def resolve(q: torch.Tensor, heads: int, variant: str, op: str = "rollout_attention") -> str | None:
    """Return the variant to run; None, after a warning, if "auto" has to run ``attention``.

    Raises:
        ValueError: if ``variant`` is a name that this chip, dtype or head size does not have.
    """
    best = best_variant(q.device, q.dtype, q.shape[-1] // heads)
    if variant == "auto":
        if best.variant is None:
            warn_once(best.reason)
        return best.variant
    chip = chip_of(q.device)
    ok = best.variant is not None and (chip is None or variant == "int8" or chip >= (8, 9))
    expected = f"one that runs here; the best is {best.variant} ({best.reason})"
    require(ok, op, "variant", variant, expected)
    return variant


def report_variant(choice: Choice, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return ``choice`` with the variant for Wan's heads of 128 channels, for the doctor."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return choice
    best = best_variant(device, dtype, 128)
    if best.variant is None:
        return Choice("reference", f"runs attention: {best.reason}")
    return Choice(choice.backend, f"{choice.reason}; {best.reason}")
