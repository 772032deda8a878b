"""Argument checks of the public functions: one ``ValueError`` that names the argument, what came,
what is expected.
"""

import torch


def describe(value: object) -> str:
    """A tensor as ``float32[2, 16, 64] on cpu``; anything else by ``repr``."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} on {value.device}"
    return repr(value)


def require(ok: bool, op: str, argument: str, got: object, expected: str) -> None:
    """Raise ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{op}: {argument} is {describe(got)}, expected {expected}")


def require_float(op: str, argument: str, value: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` is a floating-point tensor."""
    require(
        isinstance(value, torch.Tensor) and value.is_floating_point(),
        op,
        argument,
        value,
        "a floating-point tensor",
    )


def require_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ``ValueError`` unless all given tensors are on one device; the first sets it."""
    first: torch.Tensor | None = None
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = tensor
        require(tensor.device == first.device, op, argument, tensor, f"a tensor on {first.device}")


def compute_dtype(x: torch.Tensor, upcast: torch.dtype | None = None) -> torch.dtype:
    """The dtype arithmetic is done in: ``upcast`` if given, float64 for float64 inputs, else
    float32.
    """
    if upcast is not None:
        return upcast
    return torch.float64 if x.dtype == torch.float64 else torch.float32
