"""Registration of operations, and the choice between their implementations.

Every operation is one ``torch.library.custom_op`` whose body picks an implementation for the
tensors at hand.
All implementations of an operation take the same arguments in the same order.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from prfl_fast.kernels import _backend, _extension
from prfl_fast.kernels._triton import HAS_TRITON, INTERPRETING

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Choice(NamedTuple):
    """The implementation an operation runs and the reason, in words."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Operation:
    """One registered operation and its implementations; ``triton`` and ``cuda`` may be absent."""

    name: str
    reference: Callable[..., Any]
    triton: Callable[..., Any] | None
    cuda: Callable[..., Any] | None
    report: Callable[[Choice, torch.device, torch.dtype], Choice] | None = None

    def choose(self, device: torch.device, dtype: torch.dtype) -> Choice:
        """Pick the implementation for tensors of this device and dtype.

        Raises:
            ValueError: a backend was forced that cannot run on this device.
        """
        wanted = _backend.get_backend()
        if wanted == "reference":
            return Choice("reference", "backend set to reference")
        if dtype not in KERNEL_DTYPES:
            return Choice(
                "reference", f"kernels take float32, bfloat16, float16; {dtype} runs in PyTorch"
            )
        if wanted == "cuda" and self.cuda is not None:
            if device.type != "cuda":
                raise ValueError(
                    f"{self.name}: backend 'cuda' was asked for, but the tensors are on {device}; "
                    "move them to a CUDA device or call set_backend('auto')"
                )
            return Choice("cuda", "backend set to cuda")
        if wanted == "triton" and self.triton is not None:
            if device.type != "cuda" and not INTERPRETING:
                raise ValueError(
                    f"{self.name}: backend 'triton' was asked for, but the tensors are on "
                    f"{device}; move them to a CUDA device, call set_backend('auto'), or set "
                    "TRITON_INTERPRET=1 before the first import"
                )
            return Choice(
                "triton", "interpreted" if device.type != "cuda" else "backend set to triton"
            )
        if device.type != "cuda":
            return Choice("reference", f"{device.type} tensors")
        if self.triton is None:
            return Choice("reference", "this operation has no Triton kernel yet")
        if not HAS_TRITON:
            return Choice("reference", "triton is not installed")
        return Choice("triton", "CUDA tensors")

    def __call__(self, *args: Any) -> Any:
        tensor = next(a for a in _tensors(args))
        implementation = getattr(self, self.choose(tensor.device, tensor.dtype).backend)
        # The caller's autocast has cast what comes in; inside it would round sums of ours.
        with torch.autocast(tensor.device.type, enabled=False):
            if tensor.device.type != "cuda":
                return implementation(*args)
            # Triton launches on the current device, whatever the tensors say.
            with torch.cuda.device(tensor.device):
                return implementation(*args)


def _tensors(args: tuple[Any, ...]) -> Any:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(tuple(arg))


OPERATIONS: dict[str, Operation] = {}


def register(
    name: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    report: Callable[[Choice, torch.device, torch.dtype], Choice] | None = None,
) -> Any:
    """Register ``prfl_fast::name`` and return the custom op.

    Args:
        reference: plain PyTorch, fully annotated: the schema is read from its signature. Returns
            new tensors.
            A parameter ``upcast`` (with a default) is for the tests and stays out of the schema.
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        triton, cuda: the same signature; called only with CUDA tensors (Triton also with CPU
            tensors when
            interpreted) of float32, bfloat16 or float16.
        report: what :func:`report` shows, from what :meth:`Operation.choose` says, for an operation
            that chooses once more by itself.
    """
    operation = Operation(name, reference, triton, cuda, report)

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        return operation(*args)

    signature = inspect.signature(reference)
    schema = [p for p in signature.parameters.values() if p.name != "upcast"]
    run.__signature__ = signature.replace(parameters=schema)  # type: ignore[attr-defined]
    op = torch.library.custom_op(f"prfl_fast::{name}", run, mutates_args=())
    op.register_fake(fake)
    OPERATIONS[name] = operation
    return op


def report(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Choice]:
    """For every operation: the backend it will use for tensors of ``device`` and ``dtype``, and
    why.
    """
    choices, device = {}, torch.device(device)
    for name, operation in sorted(OPERATIONS.items()):
        try:
            choice = operation.choose(device, dtype)
            choices[name] = operation.report(choice, device, dtype) if operation.report else choice
        except ValueError as error:
            choices[name] = Choice("none", str(error))
    return choices


def extension_report() -> str:
    """One line on the CUDA C++ extension."""
    return _extension.reason()
