"""What every fused operation is held to: the 2× rule both ways, determinism, saved bytes."""

from collections.abc import Callable, Mapping, Sequence

import torch
from numerics import assert_within_twice

Tensors = Mapping[str, torch.Tensor]


def wide(x: torch.Tensor) -> torch.Tensor:
    """``x.float()`` as models write it, except that the float64 oracle stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def _outputs(value) -> list[torch.Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def run(
    function: Callable, tensors: Tensors, grads: Sequence | None = None, double: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor | None]]:
    """Outputs of ``function(**tensors)`` and the gradient of every floating-point tensor.

    Args:
        grads: one incoming gradient per output; None leaves that output out of the backward pass.
        double: run on float64 copies.
    """
    leaves = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            copy = tensor.detach().clone(memory_format=torch.preserve_format)
            tensor = (copy.double() if double else copy).requires_grad_()
        leaves[name] = tensor
    outputs = _outputs(function(**leaves))
    if grads is not None:
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return outputs, {n: t.grad for n, t in leaves.items() if t.is_floating_point()}


def check(
    ours: Callable,
    naive: Callable,
    tensors: Tensors,
    *,
    grads: Sequence | None = None,
    rounding: float = 1.0,
    intermediate: torch.dtype | None = None,
) -> None:
    """Assert the 2× rule for ``ours`` and all its gradients, ``naive`` in float64 being the oracle.

    ``naive`` is ordinary PyTorch of the same signature, written without the package. A gradient
    that ``naive`` does not produce must not be produced by ``ours``.

    Args:
        intermediate: dtype of an output that other results are computed from, once it is rounded:
            the slack of a finer result is in units of its ulp.
    """
    with torch.no_grad():
        shapes = [(o.shape, o.dtype) for o in _outputs(naive(**tensors))]
    if grads is None:
        grads = [torch.randn(shape).to(dtype) for shape, dtype in shapes]
    out, out_grads = run(ours, tensors, grads)
    plain, plain_grads = run(naive, tensors, grads)
    oracle, oracle_grads = run(naive, tensors, grads, double=True)
    for i, triple in enumerate(zip(out, plain, oracle, strict=True)):
        unit = _coarser(triple[0].dtype, intermediate)
        assert_within_twice(*triple, name=f"output {i}", rounding=rounding, dtype=unit)
    for name in oracle_grads:
        if oracle_grads[name] is None:
            assert out_grads[name] is None, (
                f"{name} got a gradient that plain PyTorch does not give"
            )
            continue
        assert out_grads[name] is not None, f"{name} got no gradient"
        triple = (out_grads[name], plain_grads[name], oracle_grads[name])
        unit = _coarser(triple[0].dtype, intermediate)
        assert_within_twice(*triple, name=f"d_{name}", rounding=rounding, dtype=unit)


def _coarser(dtype: torch.dtype, other: torch.dtype | None) -> torch.dtype:
    return max((dtype, other or dtype), key=lambda candidate: torch.finfo(candidate).eps)


def check_deterministic(ours: Callable, tensors: Tensors) -> None:
    """Assert the same bits of two runs, and of a strided copy of the incoming gradients."""
    with torch.no_grad():
        grads = [torch.randn(o.shape).to(o.dtype) for o in _outputs(ours(**tensors))]
    strided = [_strided_copy(g) for g in grads]
    first = run(ours, tensors, grads)
    for again in (run(ours, tensors, grads), run(ours, tensors, strided)):
        assert all(torch.equal(a, b) for a, b in zip(first[0], again[0], strict=True))
        for name, grad in first[1].items():
            assert torch.equal(grad, again[1][name]), f"d_{name} differs between two runs"


def check_expanded_gradient(ours: Callable, tensors: Tensors) -> None:
    """Assert that the expanded gradient of a sum gives the gradients of a dense tensor of ones."""
    with torch.no_grad():
        outputs = _outputs(ours(**tensors))
    expanded = [torch.ones((), dtype=o.dtype).expand(o.shape) for o in outputs]
    left = run(ours, tensors, expanded)[1]
    right = run(ours, tensors, [g.contiguous() for g in expanded])[1]
    for name, grad in left.items():
        assert torch.equal(grad, right[name]), f"d_{name} depends on the gradient's strides"


def _strided_copy(x: torch.Tensor) -> torch.Tensor:
    if x.dim() == 0:
        return x
    return torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]


def check_compiled(ours: Callable, tensors: Tensors) -> None:
    """Assert that the function traces without a graph break and that nothing changes by it."""
    torch._dynamo.reset()
    with torch.no_grad():
        grads = [torch.randn(o.shape).to(o.dtype) for o in _outputs(ours(**tensors))]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager, traced = run(ours, tensors, grads), run(compiled, tensors, grads)
    for a, b in zip(eager[0], traced[0], strict=True):
        torch.testing.assert_close(a, b)
    for name, grad in eager[1].items():
        torch.testing.assert_close(grad, traced[1][name], msg=lambda m, n=name: f"d_{n}: {m}")


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes of the distinct storages autograd keeps for the backward of ``function()``."""
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    assert result is not None
    return sum(kept.values())
