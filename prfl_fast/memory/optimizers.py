"""AdamW variants that differ in the memory of their states.

A step of 5e-6 on a weight near 1 is a thousandth of bfloat16's spacing, so a bfloat16 weight or
second moment that is rounded to nearest never changes. Every kind therefore keeps a float32 master
or rounds stochastically, which is exact in expectation. Moments are float32 or quantized by blocks.

================= ================================================= ======= ======
kind              a bfloat16 parameter of n elements needs          device  host
================= ================================================= ======= ======
adamw             float32 master and moments                        12 n
adamw-sr          float32 moments, stochastic rounding              8 n
adamw8bit         8-bit moments, stochastic rounding                2.03 n
adamw-cpu         float32 master and moments, computed on the CPU           12 n
paged-adamw8bit   (float32 parameters only) 8-bit moments, paged    0.03 n  2 n
================= ================================================= ======= ======

8-bit moments share a scale per block of 256: a second moment far below its block's largest rounds
to zero, and its weight then moves too far. Float32 parameters need neither master nor rounding.
``adamw-sr`` and ``adamw8bit`` are torchao's, ``paged-adamw8bit`` is bitsandbytes' and needs CUDA.
Gradients add 2 n bytes, or 4 n in float32.
"""

import contextlib
import copy
import functools
import importlib
import logging
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.adamw import adamw

from prfl_fast.utils.checks import check, check_choice
from prfl_fast.utils.optional import need
from prfl_fast.utils.sharded import is_dtensor, like_sharded, local_part, norm_over, sharding_of

OptimizerKind = Literal["adamw", "adamw-sr", "adamw8bit", "paged-adamw8bit", "adamw-cpu"]
GradientDtype = Literal["parameter", "fp32"]

KINDS: tuple[str, ...] = typing.get_args(OptimizerKind)
GRADIENT_DTYPES: tuple[str, ...] = typing.get_args(GradientDtype)
_MASTERED = (torch.float32, torch.float64, torch.bfloat16)
_DTYPES = {
    "adamw": _MASTERED,
    "adamw-cpu": _MASTERED,
    "adamw-sr": (torch.float32, torch.bfloat16),
    "adamw8bit": (torch.float32, torch.bfloat16),
    "paged-adamw8bit": (torch.float32,),
}
# Constants of torchao and bitsandbytes: tensors with fewer elements are not quantized; elements per
# scale; bytes of a codebook.
_SMALLEST_8BIT, _BLOCK, _CODEBOOK_BYTES = 4096, 256, 256 * 4
# Elements that torchao's optimizers update at once; a multiple of _BLOCK. A step of all parameters
# of 14B makes about 1000 such calls.
STEP_ELEMENTS = 1 << 24
# Float32 copies of these elements in an eager step; a compiled one keeps some of them in registers.
_STEP_COPIES = {"adamw-sr": 10.26, "adamw8bit": 14.27}
_SMALLEST_PAGED = 100_000  # bitsandbytes pages states of at least so many elements


def make_optimizer(
    kind: OptimizerKind,
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    gradient_dtype: GradientDtype = "parameter",
) -> torch.optim.Optimizer:
    """Return an AdamW optimizer (arXiv 1711.05101) of one of ``KINDS``.

    ``adamw`` of float32 parameters is :class:`torch.optim.AdamW`. Change the learning rate with
    :func:`set_learning_rate`. The first step creates the states.

    Args:
        kind: see the table in the module's docstring.
        parameters: parameters to train, of the dtypes that ``kind`` takes.
        gradient_dtype: dtype in which gradients of bfloat16 parameters accumulate: the parameter's,
            or float32. This function sets ``grad_dtype`` and drops gradients of another dtype.

    Raises:
        ValueError: if the kind is unknown or cannot train these parameters on their device.
        MissingExtraError: if the kind's library is not installed.
    """
    parameters = list(parameters)
    check_choice("optimizer", kind, KINDS)
    check_choice("gradient_dtype", gradient_dtype, GRADIENT_DTYPES)
    check(bool(parameters), "parameters", [], "at least one parameter")
    check_dtypes(kind, {f"parameter {i}": p for i, p in enumerate(parameters)})
    sharded = [p for p in parameters if is_dtensor(p)]
    check_sharded(kind, sharded, gradient_dtype)
    on_cuda = all(p.is_cuda for p in parameters)
    ok = kind != "paged-adamw8bit" or on_cuda
    hint = "paged-adamw8bit needs every parameter on a CUDA device; adamw8bit does not"
    check(ok, "optimizer", kind, "another one for these devices", hint=hint)
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    options["weight_decay"] = weight_decay
    mixed = 0 < len(sharded) < len(parameters)  # torch updates no list of both kinds at once
    optimizer: torch.optim.Optimizer
    if kind == "adamw" and not mixed and all(p.dtype is not torch.bfloat16 for p in parameters):
        # Unfused, the step would allocate temporaries as large as all parameters.
        optimizer = torch.optim.AdamW(parameters, fused=True if on_cuda else None, **options)
    elif kind in ("adamw", "adamw-cpu"):
        optimizer = MasterAdamW(parameters, on_host=kind == "adamw-cpu", **options)
    elif kind == "paged-adamw8bit":
        optimizer = _paged_class()(parameters, **options)
    else:
        options["bf16_stochastic_round"] = True
        optimizer = _stochastic_class(kind == "adamw8bit")(parameters, **options)
    for p in parameters:  # last, as a library may be missing or refuse a number
        dtype = torch.promote_types(p.dtype, torch.float32) if gradient_dtype == "fp32" else p.dtype
        if p.grad_dtype != dtype:
            p.grad = None  # torch refuses to change the dtype of an existing gradient
            p.grad_dtype = dtype
    return optimizer


def check_dtypes(kind: OptimizerKind, parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise ``ValueError`` for the first parameter whose dtype ``kind`` cannot train."""
    known = ", ".join(map(str, _DTYPES[kind]))
    for name, parameter in parameters.items():
        check(parameter.dtype in _DTYPES[kind], name, parameter.dtype, f"{known} for {kind}")


def check_sharded(
    kind: OptimizerKind, sharded: Sequence[torch.Tensor], gradient_dtype: GradientDtype
) -> None:
    """Raise ``ValueError`` if the optimizer or gradient dtype does not take sharded weights."""
    hint = "adamw8bit, adamw and adamw-cpu take sharded weights"
    ok = not sharded or kind != "paged-adamw8bit"
    check(ok, "optimizer", kind, "another one for sharded weights", hint=hint)
    narrow = gradient_dtype == "fp32" and any(p.dtype is torch.bfloat16 for p in sharded)
    hint = "FSDP2 reduces gradients of bfloat16 weights in bfloat16. Shard float32 weights with "
    hint += "param_dtype=torch.bfloat16 instead, whose gradients are summed in float32"
    check(not narrow, "gradient_dtype", gradient_dtype, "'parameter'", hint=hint)


def state_bytes(kind: OptimizerKind, shape: Sequence[int], dtype: torch.dtype) -> tuple[int, int]:
    """Return (device, host) bytes of one parameter's master, moments, scales and step counter."""
    # Not counted: two host buffers of the largest parameter (adamw-cpu), and temporaries of a step
    # (step_bytes).
    check_choice("optimizer", kind, KINDS)
    check_dtypes(kind, {f"parameter {list(shape)}": torch.empty(0, dtype=dtype)})
    n, full = math.prod(shape), torch.promote_types(dtype, torch.float32).itemsize
    step = 4  # bytes of a float32 scalar
    moments = 2 * full * n
    if kind == "adamw":
        return moments + (full * n if dtype is torch.bfloat16 else 0) + step, 0
    if kind == "adamw-cpu":
        return 0, moments + full * n + step
    if kind == "adamw-sr":
        return moments + step, 0
    if kind == "adamw8bit":
        if n < _SMALLEST_8BIT or n % _BLOCK:
            return moments + step, 0
        return 2 * (n + 4 * (n // _BLOCK) + _CODEBOOK_BYTES) + step, 0
    if n < _SMALLEST_8BIT:
        return moments, 0  # bitsandbytes counts steps in a Python int and shares its codebooks
    scales = 2 * 4 * -(-n // _BLOCK)
    # Paged states count as host memory, because they move there when the device is full.
    return (scales + 2 * n, 0) if n < _SMALLEST_PAGED else (scales, 2 * n)


def step_bytes(kind: OptimizerKind, parameters: Iterable[torch.Tensor]) -> int:
    """Return the largest device bytes of temporaries in a step of these parameters."""
    largest = widened = 0
    for p in parameters:
        largest = max(largest, p.numel())
        if (p.grad_dtype or p.dtype) is torch.bfloat16:
            widened = max(widened, p.numel())
    if kind == "adamw":  # of a bfloat16 gradient; float32 gradients are used as they are
        return 4 * widened
    return int(4 * _STEP_COPIES.get(kind, 0) * min(largest, STEP_ELEMENTS))


def split_group(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Move ``parameters`` of an optimizer's only group to a second group, before its first step."""
    (group,), moved = optimizer.param_groups, set(map(id, parameters))
    second = [p for p in group["params"] if id(p) in moved]
    group["params"] = [p for p in group["params"] if id(p) not in moved]
    options = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
    optimizer.add_param_group({**options, "params": second})


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, *others: float) -> None:
    """Set the learning rate of an optimizer of any kind, of its later groups to ``others``."""
    rates = (rate, *others)
    for number, group in enumerate(optimizer.param_groups):
        rate = rates[min(number, len(rates) - 1)]
        if isinstance(group["lr"], torch.Tensor):  # torchao would compile a number into its step
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the 2-norm of all gradients together, a float32 scalar (float64 for float64).

    With sharded gradients all ranks must call it, and get the same norm, that of all parts.
    """
    parts: dict[Any, list[torch.Tensor]] = {}
    for g in gradients:
        # Without the dtype, the norm of a bfloat16 tensor would be bfloat16, with three digits.
        wide = torch.promote_types(g.dtype, torch.float32)
        norm = torch.linalg.vector_norm(local_part(g), dtype=wide)
        parts.setdefault(sharding_of(g), []).append(norm)
    first = next(iter(parts.values()))[0]
    norms = []
    for sharding, found in parts.items():
        norm = torch.linalg.vector_norm(torch.stack([n.to(first) for n in found]))
        norms.append(norm if sharding is None else norm_over(norm, sharding))
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[torch.Tensor], max_norm: float, norm: torch.Tensor) -> None:
    """Scale gradients of a total ``norm`` to at most ``max_norm``, each rank its own parts."""
    gradients = [local_part(p.grad) for p in parameters if p.grad is not None]
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)  # as torch's clip_grad_norm_
    for device in {g.device for g in gradients}:
        torch._foreach_mul_([g for g in gradients if g.device == device], factor.to(device))


def _load_as_saved(
    optimizer: torch.optim.Optimizer,
    state_dict: Mapping[str, Any],
    home: Callable[[torch.Tensor, str], torch.device],
) -> None:
    """Load states in the dtype they were saved in, each to its home device."""
    # torch's own method would cast states to the parameter's dtype and move them to its device, so
    # it loads the groups only.
    torch.optim.Optimizer.load_state_dict(optimizer, {**state_dict, "state": {}})
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(saved, parameters, strict=True):
        if index in state_dict["state"]:
            state = state_dict["state"][index]
            optimizer.state[p] = {name: value.to(home(p, name)) for name, value in state.items()}


class MasterAdamW(torch.optim.Optimizer):
    """AdamW in float32, with float32 master copies of bfloat16 parameters.

    With ``on_host``, masters of every parameter and moments stay in host memory; gradients and
    weights are copied through two pinned buffers.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        on_host: bool = False,
    ) -> None:
        super().__init__(
            parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.home = torch.device("cpu") if on_host else None
        self._staging: _Staging | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if self.home is None:
                for p in parameters:
                    self._update(group, p, p.grad)
                    if "master" in self.state[p]:
                        local_part(p).copy_(local_part(self.state[p]["master"]))
                continue
            if self._staging is None:
                self._staging = _Staging([p for g in self.param_groups for p in g["params"]])
            for p, gradient in self._staging.gradients(parameters):
                self._update(group, p, gradient)
                self._staging.send(p, local_part(self.state[p]["master"]))

    def _update(self, group: dict[str, Any], p: torch.Tensor, gradient: torch.Tensor) -> None:
        state = self.state[p]
        if not state:  # states are created at the first step, as in torch.optim
            home, full = self.home or p.device, torch.promote_types(p.dtype, torch.float32)
            own = local_part(p.detach())
            if self.home is not None or p.dtype is not full:
                state["master"] = like_sharded(p, own.to(home, copy=True).to(full))
            state["step"] = torch.zeros((), dtype=torch.float32, device=home)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = like_sharded(p, torch.zeros_like(own, dtype=full, device=home))
        weight = local_part(state.get("master", p.detach()))
        if not weight.numel():  # ranks beyond the rows of a small weight
            state["step"] += 1
            return
        # One parameter per call, so that at most one float32 copy of a gradient exists.
        adamw(
            [weight],
            [local_part(gradient).to(weight.dtype)],
            [local_part(state["exp_avg"])],
            [local_part(state["exp_avg_sq"])],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _load_as_saved(self, state_dict, lambda p, name: self.home or p.device)


class _Staging:
    """Two host buffers through which gradients move to the host and weights to the device."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.cuda = any(p.is_cuda for p in parameters)
        device = next((p.device for p in parameters if p.is_cuda), None)
        # All copies are on one stream, so a buffer is read before the next copy writes to it.
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        size = max(
            local_part(p).numel() * max(p.itemsize, (p.grad_dtype or p.dtype).itemsize)
            for p in parameters
        )
        self.buffers = [
            torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self.cuda)
            for _ in range(2)
        ]
        self._of: dict[torch.Tensor, torch.Tensor] = {}

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.cuda else contextlib.nullcontext()

    def _view(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        own = local_part(p)
        return self._of[p][: own.numel() * dtype.itemsize].view(dtype).view(own.shape)

    def gradients(
        self, parameters: Sequence[torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each parameter with its gradient in host memory, while the next one is copied."""
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        ahead: tuple[torch.Tensor, torch.Tensor, Any] | None = None
        for i, p in enumerate(parameters):
            assert p.grad is not None
            self._of[p] = self.buffers[i % 2]
            gradient = self._view(p, p.grad.dtype)
            with self._on_stream():
                gradient.copy_(local_part(p.grad), non_blocking=True)
                event = None if self.stream is None else self.stream.record_event()
            if ahead is not None:
                yield self._arrived(*ahead)
            ahead = (p, gradient, event)
        if ahead is not None:
            yield self._arrived(*ahead)
        if self.stream is not None:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        self._of.clear()

    @staticmethod
    def _arrived(
        p: torch.Tensor, gradient: torch.Tensor, event: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if event is not None:
            event.synchronize()
        return p, gradient

    def send(self, p: torch.Tensor, weight: torch.Tensor) -> None:
        """Copy a new weight into its parameter, through the buffer of its gradient."""
        staged = self._view(p, p.dtype)
        staged.copy_(weight)
        with self._on_stream():
            local_part(p).copy_(staged, non_blocking=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence torchao's log messages about kernels that this machine cannot load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _torchao() -> ModuleType:
    with _quietly():
        return need("torchao.optim", "optim")


def _parts(*tensors: torch.Tensor) -> Iterator[Sequence[torch.Tensor]]:
    """Yield views of at most ``STEP_ELEMENTS`` elements of tensors of one shape, weight first."""
    weight, *_ = tensors
    # Parts of another layout would be copies, so that its update would be lost.
    dense = type(weight) is torch.Tensor and weight.is_contiguous()
    if weight.numel() <= STEP_ELEMENTS or not dense:
        yield tensors
        return
    flat = [t.reshape(-1) for t in tensors]
    for start in range(0, weight.numel(), STEP_ELEMENTS):
        yield [t[start : min(start + STEP_ELEMENTS, len(t))] for t in flat]


@contextlib.contextmanager
def _same_draws() -> Iterator[Callable[[int], object]]:
    """Yield a function that seeds the rounding of one weight, so that its copies stay equal."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield lambda seed: None
        return
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        yield torch.manual_seed


@functools.cache
def _stochastic_class(quantized: bool) -> Any:
    torchao = _torchao()
    base: Any = torchao.AdamW8bit if quantized else torchao._AdamW
    single_param_adam = importlib.import_module("torchao.optim.adam").single_param_adam

    class StochasticAdamW(base):
        """torchao's AdamW with float32 states in place of states in the parameter's dtype."""

        def _new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
            # For a quantized state this changes the reported dtype, not its bytes.
            return like_sharded(p, super()._new_buffer(local_part(p), signed).float())

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            """Update every parameter that has a gradient, ``STEP_ELEMENTS`` at a time."""
            devices = {p.device.type for group in self.param_groups for p in group["params"]}
            # Compiling takes up to 20 s per shape on a CPU, too long for the small models there.
            eager = devices == {"cpu"}
            stance: Any = torch.compiler.set_stance("force_eager") if eager else None
            # A model's parameters have few sizes, so each size may be compiled.
            with stance or contextlib.nullcontext(), torch._dynamo.utils.disable_cache_limit():
                with _same_draws() as draw:
                    for group in self.param_groups:
                        for number, p in enumerate(group["params"]):
                            if p.grad is not None:
                                draw(number + int(self.state[p].get("step", 0)) * 1_000_003)
                                self._update(group, p, p.grad)

        def _update(self, group: dict[str, Any], p: torch.Tensor, gradient: torch.Tensor) -> None:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = self._new_buffer(p, True)
                state["exp_avg_sq"] = self._new_buffer(p, False)
            state["step"] += 1
            update = torch.compile(single_param_adam, fullgraph=True, dynamic=False)
            rounds = self.bf16_stochastic_round and p.dtype is torch.bfloat16
            betas, decay, eps = group["betas"], group["weight_decay"], group["eps"]
            names = ("exp_avg", "exp_avg_sq")
            tensors = [local_part(t) for t in (p.detach(), gradient, *(state[n] for n in names))]
            if not tensors[0].numel():  # ranks beyond the rows of a small weight
                return
            for weight, grad, first, second in _parts(*tensors):
                moments = (state["step"], first, second, None)
                numbers = (group["lr"], *betas, decay, eps, self.is_adamw, rounds)
                update(weight, grad, *moments, *numbers)

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            cpu = torch.device("cpu")
            _load_as_saved(self, state_dict, lambda p, name: cpu if name == "step" else p.device)

    return StochasticAdamW


@functools.cache
def _paged_class() -> Any:
    base: Any = need("bitsandbytes.optim", "nf4").PagedAdamW8bit

    class PagedAdamW8bit(base):
        """bitsandbytes' paged AdamW with states that stay paged after loading."""

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            super().load_state_dict(state_dict, move_to_device=False)
            for p, state in self.state.items():
                for name, value in state.items():
                    if name in ("state1", "state2"):
                        buffer = self.get_state_buffer(p, dtype=value.dtype)
                        if p.is_cuda:  # the new buffer is still being filled with zeros
                            torch.cuda.synchronize(p.device)
                        state[name] = buffer.copy_(value)
                    elif isinstance(value, torch.Tensor):
                        state[name] = value.to(p.device)

    return PagedAdamW8bit
