"""Functions that change a model in place check all of it first, and both of two experts."""

from typing import Any, NamedTuple

import pytest
import torch
from official_wan import tiny_official
from torch import nn
from wan import tiny_wan

from prfl_fast.memory import MemoryConfig, activation_checkpointing, apply_memory, quantize
from prfl_fast.memory.checkpointing import offload_bytes
from prfl_fast.models import Experts, patch, use_fp8_linears
from prfl_fast.models.compiled_blocks import compile_blocks
from prfl_fast.models.experts import members
from prfl_fast.parallel import ParallelConfig, shard, shard_sequence
from prfl_fast.parallel.distribution import distribute
from prfl_fast.planning.fake_ranks import fake_mesh
from prfl_fast.training.lora import add_lora, merge_lora

pytest.importorskip("diffusers")
pytest.importorskip("peft")

LAYOUT = ParallelConfig(sequence=2, shard=2)


class Weight(nn.Parameter):
    """A weight of another class than ``nn.Parameter``."""


class Case(NamedTuple):
    """A change that is refused once ``spoil`` has run on the model, or on the expert low."""

    spoil: Any
    change: Any  # called with the model and a mesh
    message: str
    prepare: Any = lambda model, mesh: None  # called before, with each model
    build: Any = tiny_wan


def official(seed):
    return tiny_official("wan21", seed=seed)


def hooked(model):
    model.blocks[1].ffn.net[2].register_forward_hook(print)


def replaced(name):
    """Return a function that replaces a forward inside the last block, or outside of the blocks."""

    def replace(model):
        model.get_submodule(name).forward = print

    return replace


def identity(model):
    model.blocks[1].attn2.to_q = nn.Identity()


def another_weight(model):
    layer = model.blocks[1].ffn.net[2]
    layer.weight = Weight(layer.weight.detach().clone())


def repeated(model):
    model.blocks[1] = model.blocks[0]


def off(model):
    model._supports_gradient_checkpointing = False


def on_kernels(model, mesh):
    patch(model)


def shared(model, mesh):
    shard_sequence(patch(model), mesh)


def streamed(model, mesh):
    apply_memory(model, MemoryConfig("fp32", "full", stream_weights=1))


def offloaded(model, mesh):
    activation_checkpointing(model, "attention", "cpu")


def with_lora(model, mesh):
    add_lora(model, 2, target_modules=("time_proj", "to_q"))


def under(**options):
    """Return a change by :func:`apply_memory`, whose other parts all differ from before."""
    config = MemoryConfig("bf16", "attention", "cpu", **options)
    return lambda model, mesh: apply_memory(model, config, device="cpu")


CASES = {
    "fp8 layers": Case(
        hooked,
        lambda model, mesh: use_fp8_linears(model),
        "blocks.1.ffn.net.2 is a Linear with hooks",
    ),
    "quantize": Case(
        hooked, lambda model, mesh: quantize(model, "fp8"), "blocks.1.ffn.net.2 has hooks"
    ),
    "patch": Case(replaced("blocks.1"), on_kernels, "replaced forward"),
    "second lora": Case(
        lambda model: with_lora(model, None), with_lora, "model's adapter is 'default'"
    ),
    "lora of no layer": Case(
        identity,
        lambda model, mesh: add_lora(model, 2),
        "blocks.1.attn2.to_q of target_modules is 'Identity', expected a linear layer",
    ),
    "merge": Case(
        lambda model: quantize(model, "fp8"),
        lambda model, mesh: merge_lora(model),
        "the weight of blocks.0.attn1.to_q is quantized, expected a plain matrix",
        prepare=with_lora,
    ),
    "checkpointing": Case(
        off,
        lambda model, mesh: activation_checkpointing(model, "full"),
        "expected a class that supports gradient checkpointing",
        prepare=offloaded,
    ),
    "checkpointing, official": Case(
        replaced("blocks.1"),
        lambda model, mesh: activation_checkpointing(model, "full"),
        "replaced forward",
        prepare=offloaded,
        build=official,
    ),
    "policy: weights": Case(
        hooked,
        lambda model, mesh: apply_memory(model, MemoryConfig("fp8"), device="cpu"),
        "blocks.1.ffn.net.2 has hooks",
        prepare=streamed,
    ),
    "policy: streams": Case(
        another_weight,
        under(stream_weights=2),
        "weight of a Linear is 'Weight', expected a plain parameter",
        prepare=streamed,
    ),
    "policy: blocks": Case(
        replaced("blocks.1"), under(), "replaced forward", prepare=streamed, build=official
    ),
    "policy: feed-forward": Case(
        replaced("blocks.1.ffn"),
        under(feed_forward_chunk=4),
        "replaced forward",
        prepare=streamed,
    ),
    "sequence": Case(
        replaced("proj_out"), shard_sequence, "Linear has a replaced forward", prepare=shared
    ),
    "shard": Case(repeated, shard, "the number of blocks to shard is 1, expected 2"),
    "sequence and shard": Case(
        repeated,
        lambda model, mesh: distribute(model, mesh, LAYOUT, MemoryConfig(), "fp32"),
        "the number of blocks to shard is 1, expected 2",
        prepare=on_kernels,
    ),
}


@pytest.fixture(scope="module")
def mesh():
    with fake_mesh(4, LAYOUT) as made:
        yield made


def state(model):
    """Return the attributes, hooks and submodules of all modules, and values that describe them."""
    objects, values = {}, [offload_bytes(each) for each in members(model)]
    for name, module in model.named_modules(remove_duplicate=False):
        values.append((name, type(module)))
        for key, value in vars(module).items():
            held = value.items() if isinstance(value, dict) else [("", value)]
            objects |= {(name, key, each): found for each, found in held}
    for tensor in (*model.parameters(), *model.buffers()):
        form = tensor.dtype, tensor.device, tensor.requires_grad, tensor.stride()
        values.append((tensor.data_ptr(), tensor._version, *form))
    return objects, values


def assert_refused(model, change, message):
    (objects, values) = state(model)
    with pytest.raises((TypeError, ValueError), match=message):
        change(model)
    after, now = state(model)
    changed = {k for k in objects.keys() | after.keys() if objects.get(k) is not after.get(k)}
    assert not changed and objects.keys() == after.keys() and values == now


@pytest.mark.parametrize("count", [1, 2], ids=["model", "experts"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_refused_model_is_unchanged(case, count, mesh):
    models = [case.build(seed=seed) for seed in range(count)]
    for model in models:
        case.prepare(model, mesh)
    pair = models[0] if count == 1 else Experts(*models, 0.85)
    case.spoil(models[-1])
    message = case.message if count == 1 else f"^expert low: .*{case.message}"
    assert_refused(pair, lambda model: case.change(model, mesh), message)


def lora_on_low(model):
    add_lora(model.low, 2)


def one_embedding(model):
    model.low.patch_embedding = model.high.patch_embedding


PAIRS = {
    "layouts": (lora_on_low, under(), "^low is .*, expected the layouts of high"),
    "held by both": (one_embedding, under(), "parameters that both experts hold is 2, expected 0"),
    "shard": (one_embedding, shard, "parameters that both experts hold is 2, expected 0: each"),
    "merge": (
        lambda model: add_lora(model.high, 2),
        lambda model, mesh: merge_lora(model),
        "^expert low: model's adapter is None, expected one to merge",
    ),
}


@pytest.mark.parametrize(("spoil", "change", "message"), PAIRS.values(), ids=PAIRS)
def test_a_refused_pair_is_unchanged(spoil, change, message, mesh):
    pair = Experts(tiny_wan(seed=0), tiny_wan(seed=1), 0.85)
    if change is not shard:
        apply_memory(pair, MemoryConfig(), device="cpu")
        pair.use("low")
    spoil(pair)
    assert_refused(pair, lambda model: change(model, mesh), message)


def test_blocks_of_an_unknown_expert():
    low = nn.ParameterList(tiny_wan(seed=1).parameters())
    pair = Experts(tiny_wan(), low, 0.85)
    with pytest.raises(TypeError, match="^expert low: model is a .*ParameterList, expected"):
        compile_blocks(pair, "on", backend="eager")
    assert all(block._compiled_call_impl is None for block in pair.high.blocks)


def test_a_missing_device_changes_no_dtype():
    model = tiny_wan()
    with pytest.raises((AssertionError, RuntimeError)):  # of torch without and with CUDA
        apply_memory(model, MemoryConfig("bf16"), device="cuda:99")
    assert all(p.dtype is torch.float32 for p in model.parameters())
