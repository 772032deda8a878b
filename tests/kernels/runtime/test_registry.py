"""Backend choice, its reasons and its errors; registration; life without triton."""

import os

import pytest
import torch
from compiled import run_python
from op_checks import saved_by

import prfl_fast.kernels as kernels
from prfl_fast.kernels.attn import backend_choice as choice
from prfl_fast.kernels.runtime import calls, registry
from prfl_fast.kernels.runtime.checks import require_float

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def implementation(name):
    def function(x: torch.Tensor, upcast: torch.dtype | None = None) -> torch.Tensor:
        return torch.full_like(x, name)

    return function


@pytest.fixture
def operation():
    """Return an operation that returns 0 from its reference, 1 from Triton, 2 from CUDA C++."""
    return registry.Operation("probe", *(implementation(i) for i in range(3)))


@pytest.fixture
def anything_goes(monkeypatch):
    """Let any backend be chosen, be triton, an extension or the interpreter here or not."""
    monkeypatch.setattr(registry, "HAS_TRITON", True)
    monkeypatch.setattr(registry, "extension_loaded", lambda: True)
    monkeypatch.setattr(registry, "INTERPRETING", False)


CHOICES = [
    ("auto", CPU, torch.float32, "reference", "cpu tensors"),
    ("auto", CUDA, torch.bfloat16, "cuda", "reads inputs once"),
    ("auto", CUDA, torch.float32, "triton", "CUDA tensors"),
    ("auto", CUDA, torch.float64, "reference", "float64 runs in PyTorch"),
    ("reference", CUDA, torch.bfloat16, "reference", "backend set to reference"),
    ("triton", CUDA, torch.float16, "triton", "backend set to triton"),
    ("triton", CPU, torch.float64, "reference", "float64 runs in PyTorch"),
    ("cuda", CUDA, torch.bfloat16, "cuda", "backend set to cuda"),
]


@pytest.mark.parametrize("backend, device, dtype, chosen, reason", CHOICES)
def test_choice_and_reason(anything_goes, operation, backend, device, dtype, chosen, reason):
    kernels.set_backend(backend)
    choice = operation.choose(device, dtype)
    assert choice.backend == chosen and reason in choice.reason


def test_triton_runs_where_no_extension_is_built(anything_goes, operation, monkeypatch):
    monkeypatch.setattr(registry, "extension_loaded", lambda: False)
    assert operation.choose(CUDA, torch.bfloat16).backend == "triton"


def test_backwards_of_meta_tensors_run_no_implementation():
    x, weight = (torch.empty(size, device="meta", requires_grad=True) for size in ((1, 6, 8), 8))
    out, _ = kernels.qk_norm_rope(kernels.bias_gelu(x, weight), x, weight, weight, heads=2)
    out.sum().backward()
    assert x.grad.is_meta and x.grad.shape == x.shape


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("device", [CPU, CUDA])
def test_an_operation_without_kernels_runs_its_reference(anything_goes, backend, device):
    kernels.set_backend(backend)
    bare = registry.Operation("bare", implementation(0), None, None)
    assert bare.choose(device, torch.bfloat16).backend == "reference"


def test_without_triton_cuda_tensors_run_the_reference(monkeypatch, operation):
    kernels.set_backend("auto")
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    choice = operation.choose(CUDA, torch.bfloat16)
    assert choice == ("reference", "triton is not installed")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_forced_backend_refuses_cpu_tensors(anything_goes, operation, backend):
    kernels.set_backend(backend)
    with pytest.raises(ValueError, match=f"probe: backend '{backend}' .* on cpu. Move them"):
        operation(torch.zeros(2))


@pytest.mark.triton
def test_the_interpreter_runs_cpu_tensors(monkeypatch, operation):
    monkeypatch.setattr(registry, "INTERPRETING", True)
    kernels.set_backend("triton")
    assert operation.choose(CPU, torch.float32) == ("triton", "interpreted")
    assert operation(torch.zeros(2)).tolist() == [1, 1]


def test_the_first_tensor_decides_also_inside_a_list():
    kernels.set_backend("auto")
    operation = registry.Operation("listed", lambda tensors, c: tensors[0] * c, None, None)
    assert operation([torch.ones(2)], 3.0).tolist() == [3, 3]


def test_set_backend_refuses_what_is_unknown_or_missing(monkeypatch):
    before = registry.get_backend()
    monkeypatch.setattr(registry, "HAS_TRITON", False)
    monkeypatch.setattr(registry, "extension_loaded", lambda: False)
    for name, message in (
        ("tritn", "backend is 'tritn', expected one of auto, reference"),
        ("triton", "triton is not installed: pip install triton"),
        ("cuda", "the extension is not loaded: "),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.set_backend(name)
    assert registry.get_backend() == before


def test_report_names_every_operation_and_never_raises(anything_goes):
    kernels.set_backend("auto")
    report = registry.report("cuda")
    assert set(report) == set(registry.OPERATIONS) and list(report) == sorted(report)
    assert report["norm_modulate"] == ("triton", "CUDA tensors")
    assert report["norm_modulate_backward"] == ("triton", "CUDA tensors")
    assert all(choice.backend == "reference" for choice in registry.report("cpu").values())
    kernels.set_backend("triton")
    refused = registry.report("cpu")["norm_modulate"]
    assert refused.backend == "none" and "Move them to a CUDA device" in refused.reason


def test_registered_schema_leaves_upcast_out():
    for name in registry.OPERATIONS:
        overload = getattr(torch.ops.prfl_fast, name).default
        assert "upcast" not in str(overload._schema)
        assert not overload._schema.is_mutable


def test_register_builds_a_working_op(monkeypatch):
    monkeypatch.setattr(registry, "OPERATIONS", {})
    op = registry.register("test_probe", implementation(5), fake=lambda x: x.new_empty(x.shape))
    assert op(torch.zeros(3)).tolist() == [5, 5, 5]
    assert list(registry.OPERATIONS) == ["test_probe"]
    torch.library.opcheck(torch.ops.prfl_fast.test_probe.default, (torch.zeros(3),))


@pytest.mark.slow
def test_environment_variable_sets_the_backend():
    script = "from prfl_fast.kernels.runtime import registry; print(registry.get_backend())"
    run = run_python(script, environment=os.environ | {"PRFL_FAST_BACKEND": "reference"})
    assert run.stdout.strip() == "reference", run.stderr
    run = run_python(script, environment=os.environ | {"PRFL_FAST_BACKEND": "fastest"})
    assert run.returncode != 0
    assert "PRFL_FAST_BACKEND is 'fastest', expected one of auto, reference" in run.stderr


@pytest.mark.slow
def test_everything_imports_and_runs_without_triton():
    run = run_python("""
        import importlib.abc, sys

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ImportError("triton is blocked")

        sys.meta_path.insert(0, Block())
        import torch
        import prfl_fast.kernels as kernels
        from prfl_fast.kernels.runtime import calls, registry

        x = torch.randn(2, 4, 16, requires_grad=True)
        y = kernels.norm_modulate(x, scale=torch.randn(2, 16))
        y.square().sum().backward()
        assert x.grad.isfinite().all()
        try:
            kernels.set_backend("triton")
        except ValueError as error:
            print(error)
        choices = registry.report("cuda").values()
        assert {c.backend for c in choices} == {"reference"}
        print(sorted({c.reason for c in choices}))
        """)
    assert run.returncode == 0, run.stderr
    assert "triton is not installed: pip install triton" in run.stdout
    assert "triton is not installed" in run.stdout.splitlines()[1]


def test_autocast_does_not_reach_inside():
    """A caller's autocast casts what it passes on, not the sums of an operation."""
    x, queries = torch.randn(1, 40, 16), torch.randn(2, 16)
    expected, _ = kernels.query_pool(x, queries)
    with torch.autocast("cpu", torch.bfloat16):
        pooled, _ = kernels.query_pool(x, queries)
    assert torch.equal(pooled, expected)


def test_pytorch_records_a_reference_that_casts_nothing():
    """Check that the graph has our function only with a cast, autocast or many elements."""
    x, y, row = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8), (4, 8), (8,)))
    half, many = row.detach().bfloat16(), torch.randn(2**13 + 1, 8, requires_grad=True)

    def recorded(function, *args, **named):
        out = function(*args, **named)
        names, nodes = set(), [out.grad_fn]
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [n for n, _ in node.next_functions if n is not None]
        return {name.removesuffix("Backward") for name in names} & set(registry.OPERATIONS)

    for wide in (lambda t: t, torch.Tensor.double):
        assert recorded(kernels.bias_gelu, wide(x), wide(row)) == set()
        assert recorded(kernels.gated_residual, wide(x), wide(y), gate_table=wide(row)) == set()
        assert recorded(kernels.norm_modulate, wide(x), wide(row)) == set()
        assert recorded(kernels.flow_loss, wide(x), *2 * [wide(y).detach()]) == set()
    assert recorded(kernels.bias_gelu, x, half) == {"bias_gelu"}
    assert recorded(kernels.norm_modulate, many, row) == {"norm_modulate"}
    assert recorded(kernels.gated_residual, many, many, gate_table=row) == {"gated_residual"}
    with torch.autocast("cpu", torch.bfloat16):
        assert recorded(kernels.bias_gelu, x, row) == {"bias_gelu"}


def test_a_graph_of_pytorch_keeps_what_ours_does(monkeypatch):
    """Compare saved bytes; a graph of PyTorch may also save mean and ρ of each token."""
    x, row = torch.randn(2, 6, 32), torch.randn(32)
    rows = {name: row.expand(1, 32).clone() for name in ("gate", "scale", "shift")}
    tables = {f"{name}_table": row.clone() for name in rows}
    gated = {"x": x, "y": x.clone(), "gate": rows["gate"], "gate_table": tables["gate_table"]}
    loss = {n: x.clone() for n in ("velocity", "noise", "latents")}
    cases = {
        "bias_gelu": (kernels.bias_gelu, {"x": x, "bias": row}),
        "gated_residual": (kernels.gated_residual, gated),
        "norm_modulate": (kernels.norm_modulate, {"x": x, "weight": row, "bias": row.clone()}),
        "residual_norm_modulate": (kernels.residual_norm_modulate, gated | rows | tables),
        "flow_loss": (kernels.flow_loss, loss),
        "attention": (
            lambda **t: kernels.attention(**t, heads=4)[0],
            {n: x.clone() for n in "qkv"},
        ),
        "flow_step": (lambda a, b: kernels.flow_step([a, b], [1.0, 2.0]), {"a": x, "b": x.clone()}),
    }
    for name, (function, tensors) in cases.items():
        operator, frozen = registry.OPERATORS[name], ("noise", "latents")
        saved = []
        for native in (operator._native, None):
            monkeypatch.setattr(operator, "_native", native)
            operator.forget()
            saved.append(saved_by(function, tensors, frozen))
        assert saved[0] <= saved[1] + (8 * 12 if "norm" in name else 0), (name, saved)


def test_a_torch_without_guards(monkeypatch):
    """Arguments are recognized by keys alone."""
    monkeypatch.setattr(calls, "TensorGuards", None)
    registry.forget_calls()
    x, row = torch.randn(2, 4, 6), torch.randn(2, 6, requires_grad=True)
    wanted = x * row[:, None]
    for _ in range(2):
        y = kernels.gated_residual(torch.zeros_like(x), x, row)
        assert torch.equal(y, wanted) and y.requires_grad
    assert not registry.OPERATORS["gated_residual"]._recent
    registry.forget_calls()


def test_a_setting_applies_to_arguments_seen_before():
    """Check that set_backend and set_attention_backend reach a layout that was called before."""
    q, k, v = (torch.randn(1, 4, 8, requires_grad=True) for _ in range(3))
    before, names = choice.get_attention_backend(), []
    try:
        for backend in ("auto", "plain", "auto"):
            kernels.set_attention_backend(backend)
            for _ in range(2):
                names.append(kernels.attention(q, k, v, heads=2)[0].grad_fn.name())
    finally:
        kernels.set_attention_backend(before)
    assert [name == "attentionBackward" for name in names] == [False] * 2 + [True] * 2 + [False] * 2
    operator = registry.OPERATORS["attention"]
    kernels.attention(q, k, v, heads=2)
    assert operator._recent
    kernels.set_backend(registry.get_backend())
    assert not operator._recent


def test_a_setting_of_another_thread_applies_to_later_calls(monkeypatch):
    """Change the setting just after a call has read it."""
    q, k, v = (torch.randn(1, 4, 8, requires_grad=True) for _ in range(3))
    before, operator = choice.get_attention_backend(), registry.OPERATORS["attention"]
    try:
        kernels.set_attention_backend("auto")
        monkeypatch.setattr(
            operator, "_native", lambda *_: kernels.set_attention_backend("plain") or True
        )
        kernels.attention(q, k, v, heads=2)
        monkeypatch.undo()
        assert kernels.attention(q, k, v, heads=2)[0].grad_fn.name() == "attentionBackward"
    finally:
        kernels.set_attention_backend(before)


def test_a_backend_of_another_thread_is_chosen_later(anything_goes, operation, monkeypatch):
    kernels.set_backend("auto")
    monkeypatch.setattr(
        type(operation),
        "choose",
        lambda *_: kernels.set_backend("reference") or registry.Choice("triton", ""),
    )
    assert operation.implementation(CUDA, torch.float32) is operation.triton
    monkeypatch.undo()
    assert operation.implementation(CUDA, torch.float32) is operation.reference
    kernels.set_backend("auto")
    assert operation.implementation(CPU, torch.float32) is operation.reference
    assert operation.chosen.keys() == {
        (n, d, torch.float32) for n, d in (("reference", CUDA), ("auto", CPU))
    }


def test_errors_show_no_numbers_of_tensors_in_a_list():
    came = [torch.ones(2), None, torch.eye(3).to_sparse()]
    found = r"^op: x is \[float32\[2\] on cpu, None, sparse_coo float32\[3, 3\] on cpu\], expected"
    with pytest.raises(ValueError, match=found):
        require_float("op", "x", came)
