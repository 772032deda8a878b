"""Weights of other model families that wait in host memory."""

import official_wan
import pytest
import tiny_families
import torch
import wan
from offload_models import assert_same, fill_adapters, gradients_of_loss
from other_models import tiny
from streamed_models import poison_released_slots  # noqa: F401 - a fixture

import prfl_fast
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.memory.stream import waiting_weights
from prfl_fast.models.registry import find_blocks
from prfl_fast.training.lora import add_lora

pytest.importorskip("diffusers")

POLICIES = {
    "none": MemoryConfig("fp32", stream_weights=1),
    "full": MemoryConfig("fp32", "full", stream_weights=2),
    "attention": MemoryConfig("fp32", "attention", "cpu", stream_weights=1),
}


def check_policies(model, run):
    """Check that every policy gives the bits of resident weights, twice, and none is left over."""
    plain = run(model)
    for config in POLICIES.values():
        apply_memory(model, config)
        assert len(waiting_weights(model)) == len(find_blocks(model).blocks(model))
        for _ in range(2):
            assert_same(run(model), plain)
        assert all(weights.depth == 0 for weights in waiting_weights(model))
    apply_memory(model, MemoryConfig("fp32"))
    assert_same(run(model), plain)


def present(found):
    """Return the tensors among outputs and gradients."""
    out, gradients = found
    return out, {name: g for name, g in gradients.items() if g is not None}


FAMILIES = [case for case in tiny_families.CASES if case != "hunyuan-replace"]


@pytest.mark.cases(1)
@pytest.mark.parametrize("case", FAMILIES)
def test_families(case):
    arguments = tiny_families.inputs(case)
    model = prfl_fast.patch(tiny_families.tiny(case))
    check_policies(model, lambda model: present(tiny_families.run(model, *arguments)))


def test_cogvideox():
    model, arguments = tiny_families.cogvideox(0, 2, "fp32")

    def run(model):
        found = tiny_families.run_cogvideox(model, arguments)
        return {name: value for name, value in found.items() if value is not None}

    check_policies(model, run)


@pytest.mark.cases(2)
@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("variant", official_wan.VARIANTS)
def test_official_wan(variant, patched):
    model = official_wan.tiny_official(variant, layers=3)
    if patched:
        prfl_fast.patch(model)
    # Wan 2.2 takes one time of each sample for a batch of one only.
    arguments = official_wan.official_inputs(variant, per_token=variant == "wan22")

    def run(model):
        out = official_wan.call_official(model, **arguments)
        out.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return out.detach(), found

    check_policies(model, run)


@pytest.mark.cases(1)
@pytest.mark.parametrize("family", ["cosmos", "allegro"])
def test_models_without_adapter(family):
    model, tensors, options = tiny(family)

    def run(model):
        out = model(**tensors, **options, return_dict=False)[0]
        out.square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return out.detach(), found

    check_policies(model, run)


def torchao_model(kind, ahead, mode, patched):
    torchao = pytest.importorskip("torchao.quantization")
    model = wan.tiny_wan(layers=3).requires_grad_(False)
    config = getattr(torchao, kind)()
    torchao.quantize_(model.blocks, config)
    if patched:
        prfl_fast.patch(model)
    apply_memory(model, MemoryConfig("fp32", *mode, stream_weights=ahead))
    torch.manual_seed(0)
    add_lora(model, 2, target_modules=("to_q", "ffn.net.2"))
    fill_adapters(model)
    return model


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
@pytest.mark.parametrize("mode", [("none", None), ("full", None), ("attention", "cpu")], ids=str)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
def test_weights_of_torchao(kind, mode, patched):
    plain, model = (torchao_model(kind, ahead, mode, patched) for ahead in (None, 1))
    expected = gradients_of_loss(plain)
    assert len(expected) > 6
    weight = model.blocks[0].ffn.net[2].base_layer.weight
    host = waiting_weights(model)[0].host
    for _ in range(2):
        assert_same(gradients_of_loss(model), expected)
        assert weight.qdata.untyped_storage().data_ptr() == host.untyped_storage().data_ptr()
    assert host.nbytes < 0.7 * sum(p.nbytes for p in wan.tiny_wan(layers=1).blocks.parameters())
    apply_memory(model, MemoryConfig("fp32", *mode))
    assert_same(gradients_of_loss(model), expected)


def test_layers_of_other_libraries_are_refused():
    class Weight(torch.nn.Parameter):
        pass

    model, _, _ = tiny("cosmos")
    block = find_blocks(model).blocks(model)[-1]
    layer = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = Weight(layer.weight.data)
    with pytest.raises(ValueError, match="is '.*Weight', expected a plain parameter or a frozen"):
        apply_memory(model, POLICIES["full"])
    assert waiting_weights(model) == []
