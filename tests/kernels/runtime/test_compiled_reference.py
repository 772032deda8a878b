"""A compiler traces the references on a CPU, where it fuses them, and elsewhere calls operators."""

import contextlib

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

import prfl_fast.kernels as kernels
from prfl_fast.kernels.runtime import registry


def norm(x, scale):
    return kernels.norm_modulate(x, scale=scale, shift=2 * scale)


def inputs():
    return torch.randn(2, 8, 16, requires_grad=True), torch.randn(2, 16, requires_grad=True)


@pytest.fixture
def compile_recorded():
    """Return a function that compiles another one, and the operators of prfl_fast in its graphs."""
    torch._dynamo.reset()
    names = []

    def record(graph, _):
        names.extend(str(n.target) for n in graph.graph.nodes if "prfl_fast" in str(n.target))
        return graph

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    yield lambda function: torch.compile(function, backend=backend, fullgraph=True), names
    torch._dynamo.reset()


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["", "autocast"])
def test_cpu_tensors_are_traced_into_the_reference(compile_recorded, dtype):
    compiled, names = compile_recorded
    x, scale = inputs()

    def function(x, scale):
        with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
            y = norm(x, scale)
            pooled, _ = kernels.query_pool(y, scale)
        return y.sum() + pooled.square().sum()

    results = []
    for f in (function, compiled(function)):
        loss = f(x, scale)
        results.append((loss, *torch.autograd.grad(loss, (x, scale))))
    torch.testing.assert_close(*results)
    assert names == []


def test_one_tensor_in_two_places_runs_the_operator(compile_recorded):
    """Dynamo refuses it as input of an autograd function."""
    compiled, names = compile_recorded
    x, scale = inputs()
    function = lambda x, s: kernels.norm_modulate(x, scale=s, shift=s)  # noqa: E731
    torch.testing.assert_close(compiled(function)(x, scale), function(x, scale))
    assert names == ["prfl_fast.norm_modulate.default"]


def test_a_forced_backend_runs_the_operator(compile_recorded, monkeypatch):
    compiled, names = compile_recorded
    monkeypatch.setattr(registry.Operation, "traces", lambda *_: False)
    compiled(norm)(*inputs()).sum().backward()
    stems = ["prfl_fast.norm_modulate.default", "prfl_fast.norm_modulate_backward.default"]
    assert names == stems


def test_an_export_keeps_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x, scale):
            return norm(x, scale)

    program = torch.export.export(Model(), tuple(t.detach() for t in inputs()))
    assert "torch.ops.prfl_fast.norm_modulate.default" in program.graph_module.code


def test_an_index_out_of_range_is_read_by_no_compiler(compile_recorded):
    compiled, names = compile_recorded
    x, scale = inputs()
    index = torch.randint(2, (2, 8))
    function = lambda x, s: kernels.norm_modulate(x, scale=s, row_index=index)  # noqa: E731
    torch.testing.assert_close(compiled(function)(x, scale), function(x, scale))
    assert names == []
