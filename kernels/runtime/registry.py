"""Register operations, and choose the implementation of each: reference, Triton or CUDA C++.

Every operation is a custom operator ``torch.ops.prfl_fast.<name>`` with a reference in PyTorch and
optional Triton and CUDA C++ kernels. The backend (``auto``, ``reference``, ``triton``, ``cuda``) is
a setting of the process.
"""

import contextlib
import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._C import _is_any_autocast_enabled as _autocast
from torch._C._functorch import peek_interpreter_stack as _peek
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling, is_exporting

from prfl_fast.kernels.runtime.calls import (
    Call,
    add_layouts,
    add_recent,
    is_plain_call,
    recent_call,
)
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

    ``auto`` chooses Triton for CUDA tensors, or CUDA C++ for 16-bit ones where the operation has it
    and it is built, and the reference for CPU tensors. ``reference`` is plain PyTorch. ``triton``
    and ``cuda`` choose that kernel where the operation has one, and as ``auto`` does elsewhere.
    ``prfl-fast doctor`` prints the choice of each operation and its reason.

    Raises:
        ValueError: if the name is unknown, or the backend's package or extension is missing.
    """
    global _current
    _current = _checked(name, "backend")
    forget_calls()


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
    traceable: bool = True
    chosen: dict[Any, str] = field(default_factory=dict, compare=False)  # results of choose()

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
        if self.cuda is not None and extension_loaded() and dtype != torch.float32:
            return Choice("cuda", "16-bit CUDA tensors; reads inputs once")
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

    def implementation(self, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        """Return the implementation that :meth:`choose` names; it runs in the caller's contexts."""
        key = (_current, device, dtype)
        name = self.chosen.get(key)
        if name is None:
            name = self.choose(device, dtype).backend
            if key[0] == _current:  # no other thread has set a backend since
                self.chosen[key] = name
        return getattr(self, name)  # type: ignore[no-any-return]

    def __call__(self, *args: Any) -> Any:
        tensor = args[0] if isinstance(args[0], torch.Tensor) else next(_tensors(args))
        device, kind = tensor.device, tensor.device.type
        implementation = self.implementation(device, tensor.dtype)
        if implementation is not self.reference:
            # Kernels read memory, where a lazy negative has the wrong sign.
            args = tuple(map(_resolved, args))
        # Triton launches on the current device, which need not be that of the tensors.
        elsewhere = kind == "cuda" and device.index != torch.cuda.current_device()
        # Contexts are entered only where they change something: both cost as much as an addition.
        if not elsewhere and not (_autocast() and torch.is_autocast_enabled(kind)):
            return implementation(*args)
        # Disable autocast: inputs are already cast, and it would downcast our fp32 accumulations.
        with torch.autocast(kind, enabled=False):
            with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
                return implementation(*args)

    def traces(self, tensor: torch.Tensor) -> bool:
        """Return True if a compiler traces the reference, and False if it calls the operator."""
        if tensor.device.type != "cpu" or is_exporting() or not self.traceable:
            return False
        return self.choose(tensor.device, tensor.dtype).backend == "reference"

    def trace(self, *args: Any) -> Any:
        """Run the reference for a compiler, which fuses it like other PyTorch code."""
        if not torch.is_autocast_enabled("cpu"):
            return self.reference(*args)
        with torch.autocast("cpu", enabled=False):
            return self.reference(*args)


def _resolved(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return arg.resolve_neg()
    return [_resolved(a) for a in arg] if isinstance(arg, list) else arg


def _tensors(args: Iterable[Any]) -> Iterator[torch.Tensor]:
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


OPERATIONS: dict[str, Operation] = {}
OPERATORS: dict[str, "Operator"] = {}

MAX_LAYOUTS = 4096
_UNCAST = ({torch.float32}, {torch.float64})  # arguments that references compute in as they are


def forget_calls() -> None:
    """Make all operators check arguments and choose implementations again."""
    for operator in OPERATORS.values():
        operator.forget()


class Operator:
    """Check and run an operation; refuse the derivatives that it does not have.

    An eager call on plain tensors is one ``autograd.Function``, or the implementation alone if no
    gradient is needed: dispatcher and custom operator cost as much as ten small additions. A
    compiler traces the reference of CPU tensors, with our backward. All other calls run the
    registered operator: those that are exported, transformed or compiled for a GPU, those under a
    dispatch mode (fake tensors, the ledger, FLOP counters), those on tensor subclasses.

    An operation has a backward and nothing else. Without a check, forward mode gives tangents of
    zero and ``torch.func.grad`` an error of torch that names no operation.
    """

    def __init__(
        self, operation: Operation, definition: Any, check: Callable[..., None] | None
    ) -> None:
        self.operation, self._definition, self._check = operation, definition, check
        # The overload itself, without the frame that its definition would add.
        self._run = getattr(torch.ops.prfl_fast, operation.name).default
        # autograd.Functions around the operation, and around the reference alone.
        self._apply = self._apply_reference = self._run
        self._function: Any = None  # for a compiler, which traces the reference
        self._native: Callable[..., bool] | None = None
        self.forget()

    def forget(self) -> None:
        """Forget the checked arguments and the implementations chosen for them."""
        self._calls: dict[tuple[Any, ...], Call] = {}
        self._recent: list[Call] = []

    def __call__(self, *args: Any) -> Any:
        call = None
        if not is_dynamo_compiling():
            call = recent_call(self._recent, args) or self._find(args)
        if call is None:
            return self._dispatch(args)
        return (call.record if torch.is_grad_enabled() else call.run)(*args)

    def _find(self, args: tuple[Any, ...]) -> Call | None:
        """Return the call for arguments that fit no recent one; None if they must be dispatched."""
        if not is_plain_call():
            return None
        # If another thread changes a setting meanwhile, this call is stored where none looks.
        calls, recent = self._calls, self._recent
        layouts = [_current, _autocast(), torch.is_inference_mode_enabled()]
        if not add_layouts(layouts, args):
            return None
        key = tuple(layouts)  # what a check may read, so each key is checked once
        call = calls.get(key)
        if call is None:
            call = self._admit(args)
            if len(calls) >= MAX_LAYOUTS:
                calls.clear()
            calls[key] = call
        recent[:] = add_recent(recent, call)
        return call

    def _admit(self, args: tuple[Any, ...]) -> Call:
        """Check arguments of a new layout, and return their call."""
        if self._check is not None:
            self._check(*args)
        tensors = list(_tensors(args))
        device, dtypes = tensors[0].device, {t.dtype for t in tensors if t.is_floating_point()}
        if device.type not in ("cpu", "cuda"):  # meta tensors run no kernel
            return Call.of(args, self._run, self._run)
        chosen = self.operation.implementation(device, tensors[0].dtype)
        run: Callable[..., Any] = self.operation
        apply, native = self._apply, False
        # A reference on a CPU needs none of the contexts that an Operation enters.
        if device.type == "cpu" and chosen is self.operation.reference and not _autocast():
            run, apply = chosen, self._apply_reference
            native = self._native is not None and dtypes in _UNCAST and self._native(*args)
        recorded = any(t.requires_grad for t in tensors) and not native
        return Call.of(args, run, apply if recorded else run)

    def _dispatch(self, args: tuple[Any, ...]) -> Any:
        if self._check is not None:
            self._check(*args)
        if is_compiling():
            tensors = list(_tensors(args))
            if self.operation.traces(tensors[0]):
                recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
                if self._function is None or not recorded:
                    return self.operation.trace(*args)
                # Dynamo takes no tensor twice as the input of an autograd function.
                if all(a is not b for a, b in itertools.combinations(tensors, 2)):
                    return self._function.apply(*args)
        # Not while compiling: graphs are traced with plain tensors, and dynamo cannot trace levels.
        elif _peek() is not None or forward_ad._current_level >= 0:
            for tensor in _tensors(args):
                _check_transform(self.operation.name, tensor)
        return self._run(*args)

    def register_autograd(
        self,
        backward: Callable[..., Any],
        *,
        setup_context: Callable[..., None],
        eager: Callable[..., Any] | None = None,
        native: Callable[..., bool] | None = None,
    ) -> None:
        """Register a backward, as ``torch.library.register_autograd``.

        ``eager`` runs eager calls of an operation that takes lists of tensors: for others this
        method makes an ``autograd.Function``, which returns no gradients of lists.

        ``native`` takes the operation's arguments on a CPU, all float32 or all float64. It returns
        True if autograd may record the reference itself, because the calls in it keep no more than
        ``setup_context`` does, except for mean and ρ of a few tokens. On small tensors an
        ``autograd.Function`` in Python costs more than these calls (bench/NOTES.md).
        """
        self._native = native
        self._definition.register_autograd(backward, setup_context=setup_context)
        if eager is not None:
            self._apply = self._apply_reference = eager
            return

        def function(run: Callable[..., Any]) -> Any:
            def forward(ctx: Any, *args: Any) -> Any:
                output = run(*args)
                setup_context(ctx, args, output)
                return output

            methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
            return type(self.operation.name, (torch.autograd.Function,), methods)

        # Function.apply would look for tensors of torch.func, which never come here.
        self._apply, self._apply_reference = (
            super(torch.autograd.Function, function(run)).apply  # type: ignore[misc]
            for run in (self.operation, self.operation.reference)
        )
        self._function = function(self.operation.trace)


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
    check: Callable[..., None] | None = None,
    traceable: bool = True,
) -> Operator:
    """Register ``prfl_fast::name`` and return its :class:`Operator`.

    Args:
        reference: plain PyTorch that returns new tensors. Its signature is fully annotated, because
            it determines the operator's schema. Parameters ``upcast`` (for tests) and ``rhos`` (for
            callers that recompute) have defaults and are not in the schema.
        fake: the same signature; returns empty tensors of the right shape, dtype and device.
        triton, cuda: the same signature; called only with CUDA tensors (Triton also with CPU
            tensors when interpreted) of float32, bfloat16 or float16.
        report: converts the result of :meth:`Operation.choose` to the choice that :func:`report`
            shows, for an operation that makes a further choice of its own.
        check: the same signature; raises ``ValueError`` for wrong arguments. It may read
            only layouts of tensors and numbers, because it runs once for each combination of them.
        traceable: False if a compiler cannot trace the reference; it then calls the operator.
    """
    operation = Operation(name, reference, triton, cuda, report, traceable)

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        return operation(*args)

    signature = inspect.signature(reference)
    schema = [p for n, p in signature.parameters.items() if n not in ("upcast", "rhos")]
    run.__signature__ = signature.replace(parameters=schema)  # type: ignore[attr-defined]
    op = torch.library.custom_op(f"prfl_fast::{name}", run, mutates_args=())
    op.register_fake(fake)
    derivative = "second derivative" if name.endswith("_backward") else "derivative"

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"{name.removesuffix('_backward')} has no {derivative}")

    # An operation with a backward registers it over this one.
    op.register_autograd(refuse)
    OPERATIONS[name] = operation
    OPERATORS[name] = Operator(operation, op, check)
    return OPERATORS[name]


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
