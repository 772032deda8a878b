"""A block as one autograd function gives the bits of its parts, and keeps what they keep."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
import wan
from torch.multiprocessing.reductions import StorageWeakRef

import prfl_fast
from prfl_fast.kernels.runtime import calls
from prfl_fast.memory.quantized import quantize
from prfl_fast.models import block_passes
from prfl_fast.models.block_node import BlockNode
from prfl_fast.models.block_passes import Layer
from prfl_fast.training.lora import add_lora

pytest.importorskip("diffusers")
TOKENS, DIM = 18, 48


def build(kind="trained", dtype=torch.float32):
    model = wan.tiny_wan(layers=1).to(dtype)
    if kind == "lora":
        pytest.importorskip("peft")
        add_lora(model, 4)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and so would be the gradient of A
                torch.nn.init.normal_(parameter, std=0.1)
    if kind == "frozen":
        model.requires_grad_(False)
    return prfl_fast.patch(model)


def inputs(model, needs=("x",), rows=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    sizes = {"x": (2, TOKENS, DIM), "text": (2, 9, DIM), "time": (rows, 6, DIM)}
    tensors = {n: torch.randn(size, generator=generator) for n, size in sizes.items()}
    tensors = {n: t if n == "time" else t.to(dtype) for n, t in tensors.items()}
    for name in needs:
        tensors[name].requires_grad_()
    return [*tensors.values(), model.rope(torch.zeros(1, 16, 3, 4, 6))]


@contextlib.contextmanager
def parts_only(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(BlockNode, "prepare", lambda *args: None)
        yield


@pytest.fixture
def ran(monkeypatch):
    """Return a list with an entry for each call of a node: True if it ran the block."""
    calls, call = [], BlockNode.prepare

    def counted(*args):
        out = call(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(BlockNode, "prepare", counted)
    return calls


def gradients(model, arguments, seed=0):
    """Return the output, and the gradients of arguments and parameters."""
    out = model.blocks[0](*arguments)
    torch.manual_seed(seed)
    leaves = [t for t in (*arguments[:3], *model.parameters()) if t.requires_grad]
    found = torch.autograd.grad(out, leaves, torch.randn_like(out), allow_unused=True)
    return [out.detach(), *found]


def assert_same_bits(found, expected):
    assert [t is None for t in found] == [t is None for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)


@pytest.mark.cases(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["trained", "frozen", "lora"])
@pytest.mark.parametrize("needs", [("x",), ("x", "time"), ("x", "text"), ("time",)], ids="+".join)
@pytest.mark.parametrize("rows", [2, 6])
def test_same_bits_as_its_parts(kind, dtype, needs, rows, ran, monkeypatch):
    model = build(kind, dtype)
    arguments = inputs(model, needs, rows, dtype)
    # The first call checks the arguments of each operation, the second calls implementations.
    found = [gradients(model, arguments) for _ in range(2)]
    # Text's gradient is summed over the blocks: with LoRA in autograd's order.
    assert ran == [kind != "lora" or "text" not in needs] * 2
    with parts_only(monkeypatch):
        expected = gradients(model, arguments)
        with torch.no_grad():
            expected_out = model.blocks[0](*arguments)
    for each in found:
        assert_same_bits(each, expected)
    with torch.no_grad():
        assert torch.equal(model.blocks[0](*arguments), expected_out)


def test_a_torch_without_guards(ran, monkeypatch):
    """Arguments are recognized by keys alone."""
    monkeypatch.setattr(calls, "TensorGuards", None)
    model = build("trained", torch.float32)
    arguments = inputs(model, ("x",), 6, torch.float32)
    first, *others = [gradients(model, arguments) for _ in range(3)]
    for found in others:
        assert_same_bits(found, first)
    assert ran == [True] * 3


def test_the_bias_in_the_gelu_kernel(monkeypatch):
    """On a GPU the kernel adds the bias, on a CPU the product: here as on a GPU."""
    model = build()
    arguments = inputs(model, ("x", "text", "time"))
    expected = gradients(model, arguments)
    monkeypatch.setattr(Layer, "bias_in_gelu", lambda self, x: self.bias >= 0)
    for found, other in zip(gradients(model, arguments), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)


def kept(model, arguments):
    """Return the storages that autograd saves, parameters aside, as address → bytes."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.blocks[0](*arguments)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return out, sum(n for address, n in storages.items() if address not in own)


@pytest.mark.parametrize("kind", ["trained", "frozen", "lora"])
@pytest.mark.parametrize("needs", [("x",), ("time",)], ids="+".join)
def test_keeps_what_its_parts_keep(kind, needs, ran, monkeypatch):
    model = build(kind)
    arguments = inputs(model, needs)
    out, found = kept(model, arguments)
    with parts_only(monkeypatch):
        other, expected = kept(model, arguments)
    # PyTorch records gated_residual of few tokens, and keeps gate + table of each row.
    assert ran == [True] and found == expected - arguments[2].shape[0] * DIM * 4 > 0
    assert out.grad_fn is not None and other.grad_fn is not None


def test_the_backward_frees_what_it_has_used(monkeypatch):
    model = build()
    arguments = inputs(model)
    operations = block_passes.operations

    out = model.blocks[0](*arguments)
    tensors = [t for t in out.grad_fn.saved_tensors if t is not None]
    held = (*arguments[:3], *arguments[3][:2], *model.parameters())
    others = {t.untyped_storage().data_ptr() for t in held}
    storages = [t.untyped_storage() for t in tensors]
    saved = [StorageWeakRef(t) for t in storages if t.data_ptr() not in others]
    left: list[StorageWeakRef] = []
    assert len(saved) > 15
    del tensors, storages

    def watched(*key):
        found = dict(operations(*key))
        last = found["norm_modulate_backward"]

        def run(*args):
            left.extend(ref for ref in saved if not ref.expired())
            return last(*args)

        return found | {"norm_modulate_backward": run}

    monkeypatch.setattr(block_passes, "operations", watched)
    out.sum().backward()
    assert not left


def once(change):
    return pytest.param(change, id=change.__name__)


def hook(block):
    return block.attn1.to_q.register_forward_hook(lambda *args: None).remove


def processor(block):
    before = block.attn1.processor

    class Other(type(before)):
        pass

    block.attn1.processor = Other()
    return lambda: setattr(block.attn1, "processor", before)


def dropout(block):
    block.ffn.net[1].p = 0.5
    return lambda: setattr(block.ffn.net[1], "p", 0.0)


def layer(block):
    before = block.attn2.to_k

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    block.attn2.to_k = Scaled(DIM, DIM)
    return lambda: setattr(block.attn2, "to_k", before)


def forward(block):
    block.ffn.net[2].forward = lambda x: torch.zeros(2, TOKENS, DIM)
    return lambda: delattr(block.ffn.net[2], "forward")


def processor_class(block):
    kind = type(block.attn1.processor)
    before = kind.__call__
    kind.__call__ = lambda *args, **kwargs: before(*args, **kwargs)
    return lambda: setattr(kind, "__call__", before)


CHANGES = (hook, processor, processor_class, dropout, layer, forward)


@pytest.mark.filterwarnings("ignore:a patched block runs its own forward")
@pytest.mark.parametrize("change", map(once, CHANGES))
def test_a_changed_submodule_runs_and_the_node_comes_back(change, ran):
    model = build().train()
    arguments = inputs(model)
    expected = model.blocks[0](*arguments)
    undo = change(model.blocks[0])
    model.blocks[0](*arguments)
    assert ran == [True]
    undo()
    assert torch.equal(model.blocks[0](*arguments), expected) and ran == [True, True]


def test_settings_that_change_between_calls(ran, monkeypatch):
    model = build("lora")
    block, arguments = model.blocks[0], inputs(model)
    model.set_adapter(["default"])  # a list, which may change in place
    before = gradients(model, arguments)[0]
    block.attn1.to_k.active_adapters.clear()
    assert not torch.equal(gradients(model, arguments)[0], before)
    block.attn1.to_k.active_adapters.append("default")
    block.attn1.to_q.scaling["default"] = 3.0
    block.norm1.eps = 0.1
    block.attn2.norm_q.weight.data.mul_(2)
    block.attn1.to_v.weight.data = torch.randn(DIM, DIM)
    found = gradients(model, arguments)
    with parts_only(monkeypatch):
        assert_same_bits(found, gradients(model, arguments))
    assert ran == [True, True, True]


def test_copies_and_pickles(ran):
    model = build()
    arguments = inputs(model)
    expected = model.blocks[0](*arguments)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.blocks[0](*arguments), expected)
        other.blocks[0].attn1.to_q.weight.data.zero_()
        assert not torch.equal(other.blocks[0](*arguments), expected)
    assert torch.equal(model.blocks[0](*arguments), expected) and all(ran) and len(ran) == 6


@pytest.mark.parametrize("replace", [prfl_fast.unpatch, lambda m: quantize(m, "fp8")])
def test_replaced_weights_are_freed(replace):
    model = build("frozen")
    model.blocks[0](*inputs(model))
    weight = weakref.ref(model.blocks[0].attn1.to_q.weight)
    gc.disable()
    try:
        replace(model)
        model.blocks[0].attn1.to_q = None
        assert weight() is None
    finally:
        gc.enable()


def test_a_backward_under_autocast(monkeypatch):
    """A forward without autocast has its own backward, as a node and in parts."""
    model = build()
    arguments = inputs(model)
    expected = gradients(model, arguments)
    for each in (contextlib.nullcontext(), parts_only(monkeypatch)):
        with each:
            out = model.blocks[0](*arguments)
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16):
                (found,) = torch.autograd.grad(out, arguments[0], torch.randn_like(out))
        torch.testing.assert_close(found, expected[1], rtol=0.02, atol=0.02)


def test_backward_twice_and_errors():
    model = build()
    arguments = inputs(model)
    x = arguments[0]
    out = model.blocks[0](*arguments).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(out, x)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, x)
    cotangent = torch.ones(x.shape, requires_grad=True)
    (d_x,) = torch.autograd.grad(model.blocks[0](*arguments), x, cotangent, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_x.sum().backward()
    with pytest.raises(ValueError, match="context is .*, expected at least one text token"):
        model.blocks[0](x, arguments[1][:, :0], *arguments[2:])
    with pytest.raises(ValueError, match="norm_modulate: scale"):
        model.blocks[0](*arguments[:2], torch.randn(5, 6, DIM), arguments[3])
