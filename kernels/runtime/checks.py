"""Checks of the arguments that the public functions take, and the dtype they compute in."""

import torch
from torch.compiler import is_compiling


def describe(value: object) -> str:
    """Return a tensor as ``float32[2, 16, 64] on cpu``, others as a short ``repr``."""
    if isinstance(value, torch.Tensor):
        layout = "" if value.layout is torch.strided else f"{value.layout} ".removeprefix("torch.")
        kind = str(value.dtype).removeprefix("torch.")
        return f"{layout}{kind}{list(value.shape)} on {value.device}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
        text = f"[{', '.join(map(describe, value))}]"  # no numbers, which a GPU would have to send
    else:
        text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def require(ok: bool, op: str, argument: str, got: object, expected: str) -> None:
    """Raise ``ValueError`` unless ``ok``."""
    if not ok:
        raise ValueError(f"{op}: {argument} is {describe(got)}, expected {expected}")


def require_float(op: str, argument: str, value: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``value`` is a dense floating-point tensor."""
    ok = isinstance(value, torch.Tensor) and value.is_floating_point()
    # A compiler cannot trace layouts in a backward.
    ok = ok and (is_compiling() or value.layout is torch.strided)
    require(ok, op, argument, value, "a dense floating-point tensor")


def require_same_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise ``ValueError`` unless all given tensors are on the device of the first of them."""
    given = {argument: t for argument, t in tensors.items() if t is not None}
    device = next((t.device for t in given.values()), None)
    for argument, tensor in given.items():
        require(tensor.device == device, op, argument, tensor, f"a tensor on {device}")


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in ``dtype``; where nothing changes, ``Tensor.to`` takes as long as an addition."""
    return x if x.dtype == dtype else x.to(dtype)


def compute_dtype(x: torch.Tensor, upcast: torch.dtype | None = None) -> torch.dtype:
    """Return the dtype to compute in: ``upcast``, else float64 for float64 x, else float32."""
    if upcast is not None:
        return upcast
    return torch.float64 if x.dtype == torch.float64 else torch.float32
