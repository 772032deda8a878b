"""Register operations, and choose the implementation of each: reference, Triton or CUDA C++.

Every operation is a custom operator ``torch.ops.prfl_fast.<name>`` with a reference in PyTorch and
optional Triton and CUDA C++ kernels. The backend (``auto``, ``reference``, ``triton``, ``cuda``) is
a setting of the process.
"""

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch._C._functorch import peek_interpreter_stack as _peek
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from prfl_fast.kernels.runtime.extension import extension_loaded, extension_reason
from prfl_fast.kernels.runtime.triton import HAS_TRITON, INTERPRETING

BACKENDS = ("auto", "reference", "triton", "cuda")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}, expected one of {', '.join(BACKENDS)}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError(f"{source} is 'triton', but triton is not installed: pip install triton")
    if name == "cuda" and not extension_loaded():
        raise ValueError(
            f"{source} is 'cuda', but the extension is not loaded: {extension_reason()}"
        )
    return name


def set_backend(name: str) -> None:
    """Set the backend that every operation of this process prefers.

    ``auto`` chooses Triton for CUDA tensors and the reference for CPU tensors; ``reference`` is
    plain PyTorch; ``triton`` and ``cuda`` choose that kernel wherever the operation has one. An
    operation without that kernel runs as under ``auto``. ``prfl-fast doctor`` prints the choice of
    each operation and its reason.

    Raises:
        ValueError: if the name is unknown, or the backend's package or extension is missing.
    """
    global _current
    _current = _checked(name, "backend")


def get_backend() -> str:
    """Return the name given to :func:`set_backend`, or ``PRFL_FAST_BACKEND``, or ``auto``."""
    return _current


_current = _checked(os.environ.get("PRFL_FAST_BACKEND", "auto"), "PRFL_FAST_BACKEND")


class Choice(NamedTuple):
    """The implementation that an operation runs, and the reason in words."""

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
        """Choose the implementation for tensors of this device and dtype.

        Raises:
            ValueError: if the backend that was set cannot run on this device.
        """
        wanted, on_gpu = get_backend(), device.type == "cuda"
        if wanted == "reference":
            return Choice("reference", "backend set to reference")
        if dtype not in KERNEL_DTYPES:
            return Choice(
                "reference", f"kernels take float32, bfloat16, float16; {dtype} runs in PyTorch"
            )
        if wanted == "cuda" and self.cuda is not None:
            self._require_gpu(wanted, device, "Move them to a CUDA device or call", "")
            return Choice("cuda", "backend set to cuda")
        if wanted == "triton" and self.triton is not None:
            if INTERPRETING and not on_gpu:
                return Choice("triton", "interpreted")
            advice = ", or set TRITON_INTERPRET=1 before the first import"
            self._require_gpu(wanted, device, "Move them to a CUDA device, call", advice)
            return Choice("triton", "backend set to triton")
        if not on_gpu:
            return Choice("reference", f"{device.type} tensors")
        if self.triton is None:
            return Choice("reference", "this operation has no Triton kernel yet")
        if not HAS_TRITON:
            return Choice("reference", "triton is not installed")
        return Choice("triton", "CUDA tensors")

    def _require_gpu(self, backend: str, device: torch.device, move: str, advice: str) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"{self.name}: backend {backend!r} needs CUDA tensors, these are on {device}. "
                f"{move} set_backend('auto'){advice}"
            )

    def __call__(self, *args: Any) -> Any:
        tensor = next(_tensors(args))
        implementation = getattr(self, self.choose(tensor.device, tensor.dtype).backend)
        # Disable autocast: inputs are already cast, and it would downcast our fp32 accumulations.
        with torch.autocast(tensor.device.type, enabled=False):
            if tensor.device.type != "cuda":
                return implementation(*args)
            # Triton launches on the current device, which need not be that of the tensors.
            with torch.cuda.device(tensor.device):
                return implementation(*args)


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(tuple(arg))


OPERATIONS: dict[str, Operation] = {}


class Operator:
    """Call a custom operator; refuse the derivatives that it does not have.

    An operator has a backward and nothing else. Without this check, forward mode gives tangents of
    zero and ``torch.func.grad`` an error of torch that names no operation.
    """

    def __init__(self, name: str, definition: Any) -> None:
        self.name, self.register_autograd = name, definition.register_autograd
        # The overload itself: the frame that its definition would add pays for the check.
        self._run = getattr(torch.ops.prfl_fast, name).default

    def __call__(self, *args: Any) -> Any:
        # A compiled graph is traced with plain tensors, and dynamo cannot trace the levels.
        if (_peek() is not None or forward_ad._current_level >= 0) and not is_compiling():
            for tensor in _tensors(args):
                _check_transform(self.name, tensor)
        return self._run(*args)


def _check_transform(name: str, tensor: torch.Tensor) -> None:
    problem, functorch = "", torch._C._functorch
    # Under vmap alone torch runs the operator for each sample, with the right gradient.
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor):
            problem = "torch.func.grad, jvp or vjp"
        tensor = functorch.get_unwrapped(tensor)
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        problem = problem or "forward mode"
    if problem:
        raise ValueError(
            f"{name}: a tensor is part of {problem}, expected plain tensors: this operation has a "
            "backward only. Use torch.autograd.grad, or a model without prfl_fast"
        )


def register(
    name: str,
    reference: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    report: Callable[[Choice, torch.device, torch.dtype], Choice] | None = None,
) -> Operator:
    """Register ``prfl_fast::name`` and return its :class:`Operator`.

    Args:
        reference: plain PyTorch that returns new tensors. Its signature is fully annotated, because
            it determines the operator's schema. A parameter ``upcast`` (with a default) is for the
            tests and is not in the schema.
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        triton, cuda: the same signature; called only with CUDA tensors (Triton also with CPU
            tensors when interpreted) of float32, bfloat16 or float16.
        report: converts the result of :meth:`Operation.choose` to the choice that :func:`report`
            shows, for an operation that makes a further choice of its own.
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
    derivative = "second derivative" if name.endswith("_backward") else "derivative"

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name.removesuffix('_backward')} has no {derivative}")

    # An operation with a backward registers it over this one.
    op.register_autograd(refuse)
    OPERATIONS[name] = operation
    return Operator(name, op)


def report(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.bfloat16
) -> dict[str, Choice]:
    """Return the choice of every operation for tensors of ``device`` and ``dtype``."""
    choices, device = {}, torch.device(device)
    for name, operation in sorted(OPERATIONS.items()):
        try:
            choice = operation.choose(device, dtype)
            choices[name] = operation.report(choice, device, dtype) if operation.report else choice
        except ValueError as error:
            choices[name] = Choice("none", str(error))
    return choices
