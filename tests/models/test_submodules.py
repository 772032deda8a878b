"""What sits on the submodules of a patched block: hooks, forwards, processors, adapters, shards."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import wan
from tiers import slow_except

import prfl_fast
from prfl_fast.memory import activation_checkpointing
from prfl_fast.rollout import RolloutConfig
from prfl_fast.rollout.trajectory import rollout

pytest.importorskip("diffusers")


def same(model, plain):
    """Assert that outputs and gradients of two models agree to rounding; return the warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        (out, gradients), (expected, wanted) = (wan.run(m, *wan.inputs()) for m in (model, plain))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient is not None:
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-4 * scale)
    return [str(warning.message) for warning in said]


def changed(change):
    """Return a plain and a patched model after the same change of both."""
    models = wan.tiny_wan(), prfl_fast.patch(wan.tiny_wan())
    for model in models:
        change(model)
    return models


def double_output(module, args, out):
    return out * 2


def double_input(module, args):
    return (args[0] * 2, *args[1:])


def own_forward(module):
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2


def subclass(module):
    class Doubled(type(module)):
        def forward(self, *args):
            return super().forward(*args) * 2

    module.__class__ = Doubled


CHANGES = {
    "hook": lambda m: m.register_forward_hook(double_output),
    "pre-hook": lambda m: m.register_forward_pre_hook(double_input),
    "backward hook": lambda m: m.register_full_backward_hook(lambda m, d, _: (2 * d[0], *d[1:])),
    "forward": own_forward,
    "subclass": subclass,
}
PLACES = ("norm1", "norm2", "norm3", "attn1", "attn2.norm_k", "ffn", "ffn.net.0", "ffn.net.1")
ORDERS = [(change, when) for when in ("before", "after") for change in CHANGES]


# Every change in one order, so that both orders are met.
@pytest.mark.cases(2)
@pytest.mark.parametrize("order", slow_except(ORDERS, [*ORDERS[:5:2], *ORDERS[6::2]]), ids=" ".join)
def test_customized_submodules_run(order):
    change, when = order
    for place in PLACES:
        plain, model = wan.tiny_wan(), wan.tiny_wan()
        model = prfl_fast.patch(model) if when == "after" else model
        for m in (plain, model):
            CHANGES[change](m.blocks[1].get_submodule(place))
        said = same(prfl_fast.patch(model), plain)
        assert any("runs its own forward" in text and place in text for text in said), said


def same_name(module):
    subclass(module)
    type(module).__name__ = type(module).__mro__[1].__name__


def double_gain(rope, args, out):
    return out[0] * 2, out[1] * 2


OTHERS = [
    ("", subclass, ".Doubled"),
    ("", same_name, "forward is that of"),
    ("attn1", same_name, "attn1"),
    ("attn1.norm_q", lambda norm: norm.register_parameter("weight", None), "attn1.norm_q"),
    ("attn2.norm_k", lambda norm: setattr(norm, "eps", 0.1), "attn2.norm_k"),
    ("ffn", lambda ffn: ffn.net.append(torch.nn.Tanh()), "ffn.net has 4"),
    ("ffn.net.0", lambda gelu: setattr(gelu, "approximate", "none"), "approximate='none'"),
]


def test_other_classes_norms_and_activations_run():
    for place, change, message in OTHERS:
        plain, model = changed(lambda m: change(m.blocks[1].get_submodule(place)))  # noqa: B023
        (text,) = same(model, plain)
        assert message in text


def test_a_hook_of_the_rotary_embedding():
    plain, model = changed(lambda m: m.rope.register_forward_hook(double_gain))
    assert same(model, plain) == []


def test_processors_set_after_patch_run():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Half(WanAttnProcessor):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) / 2

    plain, model = changed(lambda m: m.set_attn_processor(Half()))
    assert any(".Half" in text and "attn1.processor is a" in text for text in same(model, plain))
    model.set_attn_processor(WanAttnProcessor())
    assert same(model, wan.tiny_wan()) == []


def test_context_parallelism_after_patch_is_refused():
    model = prfl_fast.patch(wan.tiny_wan())
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism is on for attn1.*unpatch"):
        wan.run(model, *wan.inputs())


def test_layer_norm_tuning_and_its_rollout():
    peft = pytest.importorskip("peft")

    def tuned():
        torch.manual_seed(0)
        model = peft.get_peft_model(wan.tiny_wan(), peft.LNTuningConfig(target_modules=["norm2"]))
        for name, parameter in model.named_parameters():
            if "ln_tuning" in name:
                parameter.data.add_(0.3)
        return model

    plain, model = tuned(), prfl_fast.patch(tuned())
    assert any("norm2 is a peft." in text for text in same(model, plain))
    x, _, conditions = wan.inputs()
    expected = rollout(plain, x, conditions, prfl_fast.FlowUniPC(), 3)
    exact = RolloutConfig()
    out = rollout(model, x, conditions, prfl_fast.FlowUniPC(), 3, rollout_config=exact)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_chunks_and_checkpointing_of_a_customized_block():
    plain, model = changed(lambda m: m.blocks[0].attn2.register_forward_hook(double_output))
    activation_checkpointing(model, "attention")
    prfl_fast.models.registry.find_adapter(model).chunk_feed_forward(model, 5)
    same(model, plain)


def test_sequential_offload_after_patch():
    accelerate = pytest.importorskip("accelerate")
    plain, model = wan.tiny_wan(), prfl_fast.patch(wan.tiny_wan())
    accelerate.cpu_offload(model, torch.device("cpu"))
    x, timestep, conditions = wan.inputs()
    text = conditions["encoder_hidden_states"]
    with torch.no_grad():
        out, expected = (m(x, timestep, text, return_dict=False)[0] for m in (model, plain))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["patch first", "shard first"])
def test_sharded_submodules(order, tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = wan.tiny_wan()
        if order == "patch first":
            prfl_fast.patch(model)
        for block in model.blocks:
            for part in (block.attn1, block.attn2, block.ffn, block):
                fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
        prfl_fast.patch(model)
        x, timestep, conditions = wan.inputs()
        text = conditions["encoder_hidden_states"]
        outs = [m(x, timestep, text, return_dict=False)[0] for m in (model, wan.tiny_wan())]
        torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
        outs[0].sum().backward()
    finally:
        dist.destroy_process_group()


def test_unpatching_one_of_two_models_that_share_blocks():
    plain, first, second = wan.tiny_wan(), wan.tiny_wan(), wan.tiny_wan()
    second.blocks = first.blocks
    for model in (first, second):
        prfl_fast.patch(model)
    prfl_fast.unpatch(first)
    assert prfl_fast.is_patched(second) and not prfl_fast.is_patched(first)
    for model in (first, second):
        same(model, plain)
    prfl_fast.unpatch(second)
    assert "forward" not in first.blocks[0].__dict__
    same(second, plain)


@pytest.mark.cases(2)
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("patched", [True, False])
def test_pickle_and_copies_of_patched_and_chunked_models(patched, chunk):
    model = wan.tiny_wan()
    model = prfl_fast.patch(model) if patched else model
    prfl_fast.models.registry.find_adapter(model).chunk_feed_forward(model, chunk)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    expected, _ = wan.run(model, *wan.inputs())
    for twin in [*copies, copy.deepcopy(model)]:
        assert prfl_fast.is_patched(twin) == patched
        assert torch.equal(wan.run(twin, *wan.inputs())[0], expected)
        assert twin.blocks[0].ffn.__dict__.get("chunk") == chunk
        with torch.no_grad():
            twin.blocks[0].ffn.net[2].weight.zero_()
        assert not torch.equal(wan.run(twin, *wan.inputs())[0], expected)
    prfl_fast.unpatch(copies[0])
    assert not prfl_fast.is_patched(copies[0]) and prfl_fast.is_patched(model) == patched


@pytest.mark.cases(2)
@pytest.mark.parametrize("mode", ["none", "full", "attention"])
@pytest.mark.parametrize("offload", [None, "cpu"])
def test_pickle_of_a_checkpointed_model(mode, offload):
    model = activation_checkpointing(prfl_fast.patch(wan.tiny_wan()), mode, offload)
    twins = pickle.loads(pickle.dumps(model)), copy.deepcopy(model)
    for twin in twins:
        assert same(twin, wan.tiny_wan()) == []


def transposed_stream(block, args, kwargs):
    """Give a block its stream as diffusers up to 0.39 does."""
    return (args[0].transpose(1, 2).contiguous().transpose(1, 2), *args[1:]), kwargs


@pytest.mark.parametrize("mode", ["none", "full", "attention"])
def test_a_stream_that_is_not_contiguous(mode):
    model = activation_checkpointing(prfl_fast.patch(wan.tiny_wan()), mode)
    model.blocks[0].register_forward_pre_hook(transposed_stream, with_kwargs=True)
    same(model, wan.tiny_wan())


def test_torchao_weights_are_not_plain_matrices():
    quantization = pytest.importorskip("torchao.quantization")

    def run(patched):
        model = wan.tiny_wan(head_dim=32).requires_grad_(False)
        config, linear = quantization.Int8WeightOnlyConfig(), torch.nn.Linear
        quantization.quantize_(model.blocks, config, filter_fn=lambda m, _: type(m) is linear)
        model.requires_grad_(False)
        model = prfl_fast.patch(model) if patched else model
        x, timestep, conditions = wan.inputs()
        x.requires_grad_()
        text = conditions["encoder_hidden_states"]
        model(x, timestep, text, return_dict=False)[0].square().sum().backward()
        return x.grad

    torch.testing.assert_close(run(True), run(False), rtol=1e-4, atol=1e-5)
