"""Activation checkpointing: the same bits in each mode, what is kept, what the recompute runs."""

import copy
import itertools
import warnings

import pytest
import torch
import wan
from offload_models import assert_same, fill_adapters, gradients, gradients_of_loss, held, loss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import prfl_fast
from prfl_fast.kernels import attention
from prfl_fast.memory.checkpointing import (
    MODES,
    activation_checkpointing,
    is_attention,
    offload_bytes,
)
from prfl_fast.memory.ledger import Ledger
from prfl_fast.models.registry import find_adapter
from prfl_fast.planning.built_models import materialize
from prfl_fast.training.lora import add_lora

pytest.importorskip("diffusers")

# All but ("none", None), which is what they are compared with.
SETTINGS = list(itertools.product(MODES, (None, "cpu")))[1:]
LAYERS = 4


PATCHED = pytest.mark.parametrize("patched", [True, False], ids=["patched", "unpatched"])
EACH_SETTING = pytest.mark.parametrize("setting", SETTINGS, ids=str)
LAYOUTS = {"fp32": torch.nn.Module.float, "mixed": wan.mixed_layout, "fp64": torch.nn.Module.double}


def build(case="t2v", patched=True, layout="fp32", layers=LAYERS):
    model = LAYOUTS[layout](wan.tiny_wan(case, layers=layers))
    return prfl_fast.patch(model) if patched else model


def run(model, case="t2v"):
    """Return the output and the gradients of inputs and parameters."""
    return wan.run(model, *wan.inputs(case, size=(2, 4, 4)))


def check_settings(model, case="t2v"):
    """Check that every setting gives the bits of none and holds nothing after a step."""
    plain = run(model, case)
    for mode, offload in SETTINGS:
        assert activation_checkpointing(model, mode, offload) is model
        assert_same(run(model, case), plain)
        assert (offload_bytes(model)["transferred"] > 0) == (offload is not None)
        assert held(model) == (0, 0)
    return plain


class Count(TorchDispatchMode):
    """Attention forwards that were run."""

    def __init__(self):
        super().__init__()
        self.attention = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += is_attention(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.cases(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@PATCHED
@pytest.mark.parametrize("case", wan.CASES)
def test_gradients_are_bit_identical(case, patched, layout):
    check_settings(build(case, patched, layout), case)


@pytest.mark.cases(1)
@PATCHED
def test_lora(patched):
    pytest.importorskip("peft")
    model = build(patched=patched)
    add_lora(model, lora_rank=2)
    _, gradients = check_settings(fill_adapters(model))
    assert sum(gradient is not None for gradient in gradients.values()) > 4 * LAYERS


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        check_settings(build())


def test_works_around_chunked_feed_forward():
    model = build()
    find_adapter(model).chunk_feed_forward(model, 5)
    check_settings(model)


def compiled_case(backend, patched, trains):
    model = build(patched=patched, layers=2).requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains in name)
    # The input needs no gradient: the first block's attention then carries none with trains="ffn".
    x, timestep, conditions = wan.inputs()
    text = conditions["encoder_hidden_states"]

    def step():
        out = model(x, timestep, text, return_dict=False)[0]
        out.square().sum().backward()
        return out.detach(), gradients(model)

    for block in model.blocks:
        block.compile(backend=backend)
    plain = step()
    for mode, offload in SETTINGS:
        activation_checkpointing(model, mode, offload)
        with Count() as count:
            ours = step()
        assert_same(ours, plain)
        assert held(model) == (0, 0)
        assert count.attention == (8 if mode == "full" else 4), (mode, offload)


@pytest.mark.slow
def test_compiled_blocks():
    torch.compiler.reset()
    compiled_case("aot_eager", True, "")


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["", "ffn"])
@PATCHED
def test_compiled_blocks_by_inductor(patched, trains):
    """Unpatched, only the feed-forward layers trained: the compiled block writes over the
    attention output, so that an alias of it would be wrong.
    """
    torch.compiler.reset()
    compiled_case("inductor", patched, trains)


@pytest.mark.slow
@EACH_SETTING
def test_model_compiled_whole(setting):
    torch.compiler.reset()
    model = build(layers=2)
    plain = run(model)
    out, gradients = run(torch.compile(activation_checkpointing(model, *setting)))
    torch.testing.assert_close(out, plain[0])
    for name, gradient in plain[1].items():
        if gradient is not None:
            key = name if name in gradients else f"_orig_mod.{name}"
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.cases(1)
@pytest.mark.parametrize("case,per_block", [("t2v", 2), ("i2v", 3)])
@PATCHED
def test_attention_recompute_runs_no_attention(case, per_block, patched):
    model = build(case, patched)
    image = patched and case == "i2v"  # the backward runs its attention to a few keys again
    for mode, offload in [("none", None), *SETTINGS]:
        activation_checkpointing(model, mode, offload)
        with Count() as count:
            run(model, case)
        twice = 2 if mode == "full" else 1
        again = image + (patched and mode == "attention")  # attention to a short text
        assert count.attention == (twice * per_block + again) * LAYERS, (mode, offload)


class Attends(nn.Module):
    def forward(self, q, k):
        return 2 * attention(q, k, k, heads=2)[0]


@pytest.mark.parametrize("keys, kept", [(64, True), (63, True), (17, True), (16, False)])
def test_attention_to_few_keys_is_not_kept(keys, kept):
    model = nn.Sequential(Attends())
    model.blocks = nn.ModuleList([model[0]])
    q, k = torch.randn(1, 64, 32, requires_grad=True), torch.randn(1, keys, 32)
    (expected,) = torch.autograd.grad(model.blocks[0](q, k).square().sum(), q)
    activation_checkpointing(model, "attention")
    with Count() as count, warnings.catch_warnings(action="error"):
        with Ledger() as ledger:
            out = model.blocks[0](q, k)
            held = ledger.live - q.nbytes - out.nbytes
        (found,) = torch.autograd.grad(out.square().sum(), q)
    assert torch.equal(found, expected) and count.attention == (1 if kept else 2)
    assert held == kept * (out.nbytes + 4 * 2 * 64)  # the output and lse of two heads


def test_frozen_reward_gets_the_same_input_gradient():
    reward = prfl_fast.LatentRewardModel.from_backbone(wan.tiny_wan(layers=3), 3, num_heads=2)
    reward.freeze()
    x, timestep, conditions = wan.inputs()
    found = []
    for setting in [("none", None), *SETTINGS]:
        activation_checkpointing(reward.backbone, *setting)
        leaf = x.clone().requires_grad_()
        reward(leaf, timestep, conditions).sum().backward()
        found.append(leaf.grad)
        assert held(reward.backbone) == (0, 0)
    assert_same(found, found[:1] * len(found))


def test_last_call_wins_and_none_restores():
    model, other = build(), build()
    before = run(model)
    activation_checkpointing(model, "attention", "cpu")
    activation_checkpointing(model, "full")
    with Count() as count:
        run(model)
    assert count.attention == 4 * LAYERS
    assert set(offload_bytes(model).values()) == {0}
    with Count() as count:
        run(other)
    assert count.attention == 2 * LAYERS
    activation_checkpointing(model, "attention", "cpu")
    activation_checkpointing(model, "none")
    assert not model.gradient_checkpointing
    assert_same(run(model), before)
    assert set(offload_bytes(model).values()) == {0}


@EACH_SETTING
def test_without_gradients_nothing_is_kept(setting):
    model = activation_checkpointing(build(), *setting)
    x, timestep, conditions = wan.inputs()
    with torch.no_grad(), Count() as count:
        model(x, timestep, conditions["encoder_hidden_states"])
    assert count.attention == 2 * LAYERS
    assert offload_bytes(model)["device_peak"] == 0


def test_deep_copy_works_on_its_own():
    model = activation_checkpointing(build(), "attention", "cpu")
    twin = copy.deepcopy(model)
    plain = run(model)
    del model
    assert_same(run(twin), plain)


def test_warns_once_without_an_attention_operation():
    model = build(patched=False)
    with sdpa_kernel(SDPBackend.MATH):
        plain = run(model)
        activation_checkpointing(model, "attention")
        with pytest.warns(
            UserWarning, match="found no known attention operation in WanTransformerBlock"
        ):
            assert_same(run(model), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"mode": "ful"}, "mode is 'ful', expected one of 'none', 'full', 'attention'"),
        ({"offload": "disk"}, "offload is 'disk', expected one of None, 'cpu'"),
        ({"host_limit": 5}, "host_limit is 5, expected bytes, with offload='cpu' only"),
        ({"offload": "cpu", "host_limit": -1}, "host_limit is -1, expected bytes"),
    ],
)
def test_bad_arguments(arguments, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        activation_checkpointing(model, **arguments)
    assert not model.gradient_checkpointing
    with pytest.raises(TypeError, match="a supported class: diffusers WanTransformer3DModel"):
        activation_checkpointing(torch.nn.Linear(2, 2))


@pytest.mark.cases(1)
@EACH_SETTING
def test_several_graphs_alive(setting):
    """Two losses, backward in either order, and one backward through both."""
    model = build()

    def run_all():
        for order in ((0, 1), (1, 0)):
            losses = [loss(model), loss(model, scale=0.5)]
            for index in order:
                losses[index].backward()
        (loss(model) * loss(model, scale=0.5)).backward()
        return gradients(model)

    plain = run_all()
    activation_checkpointing(model, *setting)
    ours = run_all()
    assert_same(ours, plain)
    assert held(model) == (0, 0)


@pytest.mark.cases(2)
@EACH_SETTING
def test_backward_twice(setting):
    model = build()
    once = gradients_of_loss(model)
    activation_checkpointing(model, *setting)
    kept = loss(model)
    kept.backward(retain_graph=True)
    assert_same(gradients(model), once)
    if setting[0] == "attention":
        with pytest.raises(RuntimeError, match="supports one backward per graph: choose 'full'"):
            kept.backward()
        model.zero_grad(set_to_none=True)
    else:
        kept.backward()
        assert_same(gradients(model), once)
    del kept
    assert held(model) == (0, 0)


@pytest.mark.parametrize("setting", [("none", None), *SETTINGS], ids=str)
def test_block_input_changed_in_place_raises(setting):
    model = activation_checkpointing(build(patched=False), *setting)
    inputs = []
    model.blocks[1].register_forward_hook(lambda block, args, out: inputs.append(args[0]))
    value = loss(model)
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_attention_output_changed_in_place_raises(offload, monkeypatch):
    """By code after the attention operation: the kept output is not what it returned."""
    model = activation_checkpointing(build(patched=False), "attention", offload)
    original = torch.nn.functional.scaled_dot_product_attention

    def spoiling(*args, **kwargs):
        out = original(*args, **kwargs)
        with torch.no_grad():
            out.mul_(1)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spoiling)
        value = loss(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def block_bytes(kind, mode, patched):
    """Bytes that a 14B block keeps at 720p x 81 frames, its input included, as (device, host)."""
    from diffusers import WanTransformer3DModel

    tokens, dim = 21 * 45 * 80, 5120
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=40, attention_head_dim=128, ffn_dim=13824, num_layers=1
        )
    model.requires_grad_(kind == "full")
    if kind == "lora":
        add_lora(model, 16)
    model.to(torch.bfloat16)
    with FakeTensorMode():
        materialize(model)
        if patched:
            prfl_fast.patch(model)
        text = torch.empty(1, 512, dim, dtype=torch.bfloat16)
        time = torch.empty(1, 6, dim)
        rope = model.rope(torch.empty(1, 16, 21, 90, 160))
        activation_checkpointing(model, mode)
        run = model._gradient_checkpointing_func if mode != "none" else lambda f, *a: f(*a)
        with Ledger() as ledger:
            x = torch.empty(1, tokens, dim, dtype=torch.bfloat16, requires_grad=True)
            out = run(model.blocks[0], x, text, time, rope)
            return ledger.live - out.untyped_storage().nbytes()


@pytest.mark.slow
@PATCHED
def test_bytes_of_a_14b_block(patched):
    x = 75600 * 5120 * 2
    lse = 75600 * 40 * 4
    for kind in ("full", "lora", "frozen"):
        none, full, attention = (block_bytes(kind, mode, patched) for mode in MODES)
        assert full == x
        kept = 1 if patched else 2  # attention to a short text runs again
        assert attention == pytest.approx((1 + kept) * x + kept * lse, rel=1e-3)
        assert kind != "full" or attention <= none / 6
