"""Checks that every fused operation must pass: 2× rule, determinism, compilation, memory."""

from collections.abc import Callable, Mapping, Sequence

import torch
from dtypes import BF16, FP32
from numerics import assert_within_twice
from torch.utils._python_dispatch import TorchDispatchMode

from prfl_fast.kernels.runtime.triton import INTERPRETING

Tensors = Mapping[str, torch.Tensor]


def slack(backend: str, *dtypes: torch.dtype, fp32: float = 1.0, truncated: float = 3.0) -> float:
    """Return the half-ulps of slack for a result of ``dtypes``.

    Args:
        fp32: for float32, where another order of summation than PyTorch's shows.
        truncated: for bfloat16 in Triton's interpreter, which truncates where hardware rounds.
    """
    if BF16 in dtypes and backend == "triton" and INTERPRETING:
        return truncated
    return fp32 if dtypes[0] == FP32 else 1.0


def bind(function: Callable, fixed: Mapping) -> Callable:
    """Return ``function`` of named tensors with the other arguments fixed."""
    return lambda *args, **tensors: function(*args, **tensors, **fixed)


def outputs_of(value) -> list[torch.Tensor]:
    """Return what an operation returned as a list of tensors."""
    return list(value) if isinstance(value, (tuple, list)) else [value]


def random_gradients(function: Callable, tensors: Tensors) -> list[torch.Tensor]:
    """Return one random gradient for each output of ``function(**tensors)``."""
    with torch.no_grad():
        outputs = outputs_of(function(**tensors))
    return [torch.randn(o.shape).to(o.dtype) for o in outputs]


def run(
    function: Callable, tensors: Tensors, grads: Sequence | None = None, double: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    """Return the outputs of ``function(**tensors)`` and the gradient of every float tensor.

    Args:
        grads: one incoming gradient per output; None leaves that output out of the backward pass.
        double: run on float64 copies.
    """
    leaves = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            dtype = torch.float64 if double else tensor.dtype
            tensor = _copy(tensor.detach(), dtype).requires_grad_()
        leaves[name] = tensor
    outputs = outputs_of(function(**leaves))
    if grads is not None:
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return outputs, {n: t.grad for n, t in leaves.items() if t.is_floating_point()}


def _copy(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a copy with the strides of x, which ``clone`` keeps only of tensors without gaps."""
    if 0 in x.stride():  # expanded
        return x.to(dtype or x.dtype, copy=True)
    kept = torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)
    return kept.copy_(x)


def check(
    ours: Callable,
    naive: Callable,
    tensors: Tensors,
    *,
    grads: Sequence | None = None,
    rounding: float = 1.0,
    intermediate: torch.dtype | None = None,
    of: Callable[..., Mapping] | None = None,
) -> None:
    """Assert the 2× rule for ``ours`` and all its gradients, ``naive`` in float64 being the oracle.

    ``naive`` is ordinary PyTorch of the same signature, written without the package. A gradient
    that ``naive`` does not produce must not be produced by ``ours``.

    Args:
        intermediate: dtype of an output that other results are computed from, once it is rounded:
            the slack of a finer result is in units of its ulp.
        of: gives the arguments of both functions from ``tensors``, as slices of them.
    """
    if of is not None:
        ours, naive = (lambda f=f, **given: f(**of(**given)) for f in (ours, naive))
    grads = random_gradients(naive, tensors) if grads is None else grads
    results = _results(ours, naive, tensors, grads)
    for name, (result, plain, exact) in results.items():
        assert (result is None) == (exact is None), (
            f"{name}: only one of ours and PyTorch's is None"
        )
        if result is not None:
            dtypes = (result.dtype, intermediate or result.dtype)
            unit = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

            def nearby(name=name):
                for _ in range(15):
                    close = {n: _close_to(t) for n, t in tensors.items()}
                    again = [g if g is None else _close_to(g) for g in grads]
                    yield _results(ours, naive, close, again)[name]

            assert_within_twice(result, plain, exact, name, rounding, unit, nearby)


def _results(ours: Callable, naive: Callable, tensors: Tensors, grads: Sequence) -> dict:
    """Return outputs and gradients by name: of ``ours``, of ``naive``, and of it in float64."""
    runs = run(ours, tensors, grads), run(naive, tensors, grads), run(naive, tensors, grads, True)
    found, plain, oracle = (
        {f"output {i}": o for i, o in enumerate(outputs)} | {f"d_{n}": g for n, g in leaves.items()}
        for outputs, leaves in runs
    )
    assert found.keys() == oracle.keys()
    return {name: (found[name], plain[name], exact) for name, exact in oracle.items()}


def _close_to(x: torch.Tensor) -> torch.Tensor:
    """Return a copy with floats changed by about 1 %, whose results have other roundings."""
    if not x.is_floating_point():
        return x
    factors = 1 + 0.01 * torch.randn(x.shape, dtype=torch.float64)
    return _copy(x).mul_(factors) if x.dtype.itemsize > 1 else x


def assert_same_bits(left, right) -> None:
    """Assert that two sequences of tensors are equal bit for bit, FP8 by value."""
    for pair in zip(left, right, strict=True):
        a, b = (t.float() if t.dtype.itemsize == 1 else t for t in pair)
        assert torch.equal(a, b)


def check_deterministic(ours: Callable, tensors: Tensors) -> None:
    """Assert the same bits of a second and third run, whose gradients lie in memory otherwise."""
    grads = random_gradients(ours, tensors)
    first = run(ours, tensors, grads)
    for layout in (_every_other, _swapped_slice):
        again = run(ours, tensors, [layout(g) for g in grads])
        assert_same_bits(first[0], again[0])
        for name, grad in first[1].items():
            assert torch.equal(grad, again[1][name]), f"d_{name} differs for {layout.__name__}"


def check_expanded_gradient(ours: Callable, tensors: Tensors) -> None:
    """Assert that an expanded gradient, a number or a row, gives the gradients of a dense one."""
    with torch.no_grad():
        outputs = outputs_of(ours(**tensors))
    rows = [torch.randn(o.shape[-1:]).to(o.dtype).expand(o.shape) for o in outputs]
    ones = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
    for expanded in (ones, rows):
        left = run(ours, tensors, expanded)[1]
        right = run(ours, tensors, [g.contiguous() for g in expanded])[1]
        for name, grad in left.items():
            assert torch.equal(grad, right[name]), f"d_{name} depends on the gradient's strides"


def _every_other(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 0 else torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]


def _swapped_slice(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` as a slice of wider rows, its first axes swapped in memory."""
    wider = x if x.dim() == 0 else torch.cat([x, x, x], dim=-1)
    wider = wider if x.dim() < 3 else wider.transpose(0, 1).contiguous().transpose(0, 1)
    return x if x.dim() == 0 else wider[..., : x.shape[-1]]


def check_compiled(ours: Callable, tensors: Tensors) -> None:
    """Assert that the function traces without a graph break and that nothing changes by it."""
    torch._dynamo.reset()
    grads = random_gradients(ours, tensors)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, traced = run(ours, tensors, grads), run(compiled, tensors, grads)
    torch.testing.assert_close(eager[0], traced[0])
    for name, grad in eager[1].items():
        torch.testing.assert_close(grad, traced[1][name], msg=lambda m, n=name: f"d_{n}: {m}")


def check_compiled_once(
    function: Callable, calls: Sequence[Mapping], same: Callable = torch.testing.assert_close
) -> None:
    """Assert that one dynamic graph serves all ``calls`` (keyword arguments of other lengths)."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for arguments in calls:
            same(compiled(**arguments), function(**arguments))


class RecordedCalls(TorchDispatchMode):
    """Record the calls of operators in ``torch.ops.prfl_fast`` as ``(operator, arguments)``."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "prfl_fast":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> list[tuple]:
        """Return the arguments of each call of operator ``name``."""
        return [args for func, args in self.calls if func._schema.name == f"prfl_fast::{name}"]


def saved_bytes(function: Callable[[], object]) -> int:
    """Return the bytes of the distinct storages autograd keeps for the backward of a call."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(kept.values())


def saved_by(function: Callable, tensors: Tensors, frozen: Sequence[str] = ()) -> int:
    """Return ``saved_bytes`` of ``function(**tensors)``, where ``frozen`` ones need no gradient."""
    leaves = {n: t.detach().requires_grad_(n not in frozen) for n, t in tensors.items()}
    return saved_bytes(lambda: function(**leaves))


def far_rows(storage: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``values`` with steps of 2³⁰ elements along their axis of 3, so past 2³¹ elements."""
    axis = values.shape.index(3)
    parts = values.detach().transpose(0, axis)
    size = parts[0].numel()
    far = storage.as_strided((3, size), (2**30, 1), 2**31 - size)
    return far.copy_(parts.reshape(3, size)).view(parts.shape).transpose(0, axis)


@torch.no_grad()
def check_far_tensors(
    calls: Sequence[tuple[Callable, tuple]], shape: Sequence[int], storage: torch.Tensor
) -> None:
    """Assert the same bits of recorded calls when one tensor of ``shape`` lies far apart."""
    for operator, args in calls:
        places = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor) and t.shape == shape]
        near = outputs_of(operator(*args))
        assert places, "no tensor of the shape is given"
        for i in places:
            far = (*args[:i], far_rows(storage, args[i]), *args[i + 1 :])
            assert_same_bits(outputs_of(operator(*far)), near)
