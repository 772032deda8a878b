"""Choose the kernel of ``rollout_attention``: that of another package, or our own."""

import os
from dataclasses import dataclass

import torch

from prfl_fast.kernels.attn import rollout_variants
from prfl_fast.kernels.attn.backend_choice import ALIGNMENT, HALF, _aligned
from prfl_fast.kernels.attn.rollout_backends import absent, missing_part
from prfl_fast.kernels.attn.rollout_variants import VARIANTS, best_variant, report_variant
from prfl_fast.kernels.runtime.checks import require
from prfl_fast.kernels.runtime.registry import Choice, get_backend

OP = "rollout_attention"
MULTIPLES_OF_16 = tuple(range(16, 257, 16))


@dataclass(frozen=True)
class Limits:
    """The chips and head sizes that a backend takes; all take bfloat16 and float16."""

    chips: tuple[tuple[int, int], ...]
    head_dims: tuple[int, ...]


# Best first. Not measured by us. SageAttention's README gives its 2.x the speed of flash-attn 3 in
# FP8 on Hopper and more accuracy (emulated on activations like a video's: 0.8 to 1.8 % against 0.9
# to 3.4 %), and 2.7 times that of flash-attn 2 on an RTX 5090. The authors of flash-attn 4 and
# cuDNN publish no comparison in FP8. On capability 8.6 SageAttention's kernel is Triton with the
# arithmetic of ours, so ours runs.
LIMITS = {
    "sage_2": Limits(((8, 0), (8, 9), (9, 0), (12, 0), (12, 1)), MULTIPLES_OF_16[:8]),
    "flash_attn_3_fp8": Limits(((9, 0),), MULTIPLES_OF_16),
    "flash_attn_4_fp8": Limits(((10, 0), (10, 3)), (64, 128)),
    "cudnn_fp8": Limits(((10, 0), (10, 3)), MULTIPLES_OF_16[:8]),
    "sage_3": Limits(((12, 0), (12, 1)), (64, 128)),
}
# "auto" never chooses FP4: its emulated error is 4 %, and 12 % where attention is sharp.
BY_NAME = ("sage_3",)
AUTOMATIC = tuple(name for name in LIMITS if name not in BY_NAME)
NAMES = ("auto", *VARIANTS, *LIMITS)
VARIABLE = "PRFL_FAST_ROLLOUT_ATTENTION"  # the name that "auto" stands for in this process


def why_not(
    name: str, capability: tuple[int, int] | None, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Return the reason why a package's kernel does not run these; None if it does."""
    limits = LIMITS[name]
    if absent(name) is not None:
        return absent(name)
    if capability is None or capability == (0, 0):  # (0, 0): AMD
        return "it needs an NVIDIA GPU"
    if capability not in limits.chips:
        chips = ", ".join(f"{major}.{minor}" for major, minor in limits.chips)
        return f"capability {capability[0]}.{capability[1]}, it runs on {chips}"
    if dtype not in HALF:
        return f"it takes bfloat16, float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in limits.head_dims:
        sizes = ", ".join(map(str, limits.head_dims))
        return f"head dim {head_dim} is none of {sizes}"
    return missing_part(name, capability)


def choose(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, name: str
) -> str:
    """Return the package whose kernel runs on tensors ``[B, L, D]``, else ``name`` or its default.

    Raises:
        ValueError: if a package was named whose kernel does not take these tensors.
    """
    name = _default if name == "auto" else name
    if name in VARIANTS or q.numel() == 0:
        return name if name in VARIANTS else "auto"
    case = rollout_variants.chip_of(q.device), q.dtype, q.shape[-1] // heads
    reason = None
    if not scale > 0:
        reason = f"it takes a positive scale, not {scale}"
    elif not all(_aligned(t) for t in (q, k, v)):
        reason = f"rows of a tensor do not start at multiples of {ALIGNMENT} bytes"
    if name == "auto":
        names = AUTOMATIC if reason is None and get_backend() != "reference" else ()
        return next((n for n in names if why_not(n, *case) is None), name)
    reason = reason or why_not(name, *case)
    if reason is not None:
        advice = "Name another variant, or auto for the best one that takes these tensors"
        raise ValueError(f"{OP}: variant {name!r} was refused: {reason}. {advice}")
    return name


def report(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128
) -> dict[str, str | None]:
    """Return each package's kernel and the best variant of ours, with the reason against it."""
    device, only = torch.device(device), "it runs only if it is named"
    case = rollout_variants.chip_of(device), dtype, head_dim
    found = {name: why_not(name, *case) for name in AUTOMATIC}
    best = best_variant(device, dtype, head_dim)
    found[best.variant or "triton"] = None if best.variant else best.reason
    by_name = {name: f"{only}{_because(why_not(name, *case))}" for name in BY_NAME}
    return found | by_name


def _because(reason: str | None) -> str:
    return "" if reason is None else f"; {reason}"


def explain(choice: Choice, device: torch.device, dtype: torch.dtype) -> Choice:
    """Return ``choice`` with the kernel for heads of 128 channels, for the doctor."""
    choice = report_variant(choice, device, dtype)
    if _default != "auto":
        refused = None
        if _default in LIMITS:
            refused = why_not(_default, rollout_variants.chip_of(device), dtype, 128)
        fails = "" if refused is None else f", but {refused}: rollouts with fp8_attention fail"
        return Choice(choice.backend, f"{choice.reason}; {_default} set by {VARIABLE}{fails}")
    if choice.backend != "triton" or not torch.cuda.is_available():
        return choice
    name = next(name for name, reason in report(device, dtype).items() if reason is None)
    return choice if name in VARIANTS else Choice(choice.backend, f"{name}, best for heads of 128")


def _checked(name: str) -> str:
    require(name in NAMES, OP, VARIABLE, name, f"one of {', '.join(NAMES)}")
    return name


_default = _checked(os.environ.get(VARIABLE, "auto"))
