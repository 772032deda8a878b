"""Linear layers of rollouts: adapters merged into them, and 8-bit products."""

import numerics
import pytest
import rollouts
import torch
import wan
from rollouts import FP8, Case, add_lora, assert_same, autocast, build, distance, opened
from torch import nn

import prfl_fast
from prfl_fast.memory.quantized import QuantizedLinear, quantize
from prfl_fast.models import inference as rollout_block
from prfl_fast.models import inference_linear as rollout_layers
from prfl_fast.models import sparse_attention

pytest.importorskip("diffusers")


# Merged adapters.
@pytest.mark.cases(1)
@pytest.mark.parametrize("layout", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("base", ["plain", "fp8", "nf4"])
def test_merged_adapters_are_within_twice_the_unmerged_error(base, layout):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    model = wan.tiny_wan(head_dim=32)
    if base != "plain":
        quantize(model, base)
    model = add_lora(rollouts.lay_out(prfl_fast.patch(model), layout), lora_alpha=2.5)
    if layout == "bf16":
        model.to(torch.bfloat16)
    add_lora(model, "other", rank=2, seed=7, lora_alpha=3.0, target_modules=["to_q", "net.2"])
    model.set_adapter(["default", "other"])
    work = Case(model)
    with autocast(layout):
        plain, rollout = work.plain(), work.open(merge_lora=True)
        merged = work.all(rollout)
    for out, theirs, oracle in zip(merged, plain, work.double(), strict=True):
        numerics.assert_within_twice(out, theirs, oracle, rounding=4)
    assert not rollout.notes
    assert distance(merged, plain) > 0, "nothing was merged"


def test_merged_matrices_run_without_the_adapters(monkeypatch):
    work = Case(add_lora(build(), lora_bias=True))
    from peft.tuners.lora.layer import Linear

    calls = rollouts.spied(monkeypatch, Linear, "forward")
    rollout = work.open(merge_lora=True)
    assert len(calls) == 2 * 2  # keys and values of two blocks, from the layers themselves
    merged = work.all(rollout)
    assert len(calls) == 4
    plain = work.plain()
    assert 0 < distance(merged, plain) < 1e-5
    numerics.assert_within_twice(merged[0], plain[0], work.double()[0], rounding=4)


def test_scaling_and_disabled_adapters_count_when_the_block_runs():
    model = add_lora(build())
    work, rollout = opened(model, merge_lora=True)
    with_adapters = work.all(rollout)
    layer = model.blocks[0].attn1.to_q
    layer.set_scale("default", 3.0)
    scaled = rollout.velocity(work.x, 0)
    assert (scaled - with_adapters[0]).norm() > 1e-3 * scaled.norm()
    model.disable_adapters()
    base = Case(model)
    assert_same(base.all(base.open(merge_lora=True)), base.plain())
    model.enable_adapters()


def test_adapters_that_peft_has_merged_are_left_alone():
    model = add_lora(build())
    for module in model.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    work = Case(model)
    state = work.state()
    assert_same(work.all(work.open(merge_lora=True)), work.plain())
    work.assert_as_before(state)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_other_adapters_stay_unmerged_with_a_note(kind):
    peft = pytest.importorskip("peft")
    model = build()
    kinds = {"dora": "adapter 'default' is not only B·A", "lokr": "lokr"}
    if kind == "dora":
        add_lora(model, use_dora=True, target_modules=["to_q"])
    else:
        torch.manual_seed(0)
        config = peft.LoKrConfig(r=2, target_modules=["to_q"], init_weights=False)
        peft.inject_adapter_in_model(config, model)
    work, rollout = opened(model, merge_lora=True)
    assert_same(work.all(rollout), work.plain())
    assert len(rollout.notes) == 1 and kinds[kind] in rollout.notes[0]
    work.all(rollout, linears="fp8")
    assert len(rollout.notes) == 2 and rollout.notes[1].startswith("exact layers")


def test_a_merged_matrix_is_the_exact_sum_rounded_once():
    model = add_lora(build(layout="bf16"), lora_alpha=2.0, rank=4)
    layer = model.blocks[0].ffn.net[2]
    made = rollout_layers.Layers(True, [])(layer, torch.bfloat16, False)
    a, b = (m["default"].weight.double() for m in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.double() + 0.5 * b @ a
    assert made.weight.dtype == torch.bfloat16
    half_ulp = torch.finfo(torch.bfloat16).eps / 2
    assert ((made.weight.double() - exact).abs() <= exact.abs() * (half_ulp + 1e-5) + 1e-7).all()


# 8 bits.
@pytest.mark.cases(3)
@pytest.mark.parametrize("layout", ["fp32", "bf16", "autocast"])
def test_errors_of_8_bits_have_their_size(case, layout):
    work = Case(build(case, layout), case)
    with autocast(layout):
        plain, rollout = work.plain(), work.open()
        linears = work.all(rollout, linears="fp8")
        attention = work.all(rollout, attention="fp8")
        both = work.all(rollout, **FP8)
        assert_same(work.all(rollout), plain)
    # e4m3 rounds to 1/16 at most, 0.03 on average.
    assert 0.003 < distance(linears, plain) < 0.05
    assert 0.0003 < distance(attention, plain) < 0.05
    assert 0.003 < distance(both, plain) < 0.06
    assert both[0].dtype == plain[0].dtype and rollout.notes == []


@pytest.mark.parametrize("fused", [False, True])
def test_operations_of_an_fp8_block(fused, monkeypatch):
    model = build(layers=1)
    if fused:
        model.blocks[0].attn1.fuse_projections()
    work, rollout = opened(model)
    calls = rollouts.spied(monkeypatch, rollout_layers, "fp8_linear", "quantize_fp8")
    calls_of_block = rollouts.spied(monkeypatch, rollout_block, "norm_modulate", "bias_gelu")
    attention = rollouts.spied(monkeypatch, sparse_attention, "rollout_attention")
    rollout.velocity(work.x, 0, **FP8)
    assert calls_of_block == ["norm_modulate", "bias_gelu"]
    assert attention == ["rollout_attention"]
    layers = 6 if fused else 8
    assert calls.count("fp8_linear") == layers
    # Weights, and what the first norm and the activation did not quantize: out, q, out, up.
    assert calls.count("quantize_fp8") == layers + 4


def test_an_fp8_layer_against_float64():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48).bfloat16(), torch.randn(2, 50, 64)
    with torch.no_grad():
        made = rollout_layers.Layers(False, [])(layer, torch.float32, True)
        out = made(x)
        exact = x.double() @ layer.weight.double().t() + layer.bias.double()
        assert torch.equal(made(prfl_fast.kernels.quantize_fp8(x)), out)
    assert out.dtype == torch.float32 and isinstance(made, rollout_layers.Fp8Dense)
    assert 0.005 < ((out - exact).norm() / exact.norm()).item() < 0.06


def test_codes_of_an_fp8_layer_are_taken_as_they_are():
    linear = nn.Linear(64, 48)
    layer = QuantizedLinear(linear, "fp8")
    made = rollout_layers.Layers(False, [])(layer, torch.bfloat16, True)
    codes, scale = prfl_fast.kernels.quantize_fp8(linear.weight.detach())
    assert torch.equal(made.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(made.scale, scale) and made.codes.data_ptr() == layer.qweight.data_ptr()
    assert torch.equal(layer.dequantize(torch.float32), codes.float() * scale)


def test_only_fp8_layers_have_fp8_rows():
    pytest.importorskip("bitsandbytes")
    layer = QuantizedLinear(nn.Linear(64, 64), "nf4")
    with pytest.raises(ValueError, match="kind is 'nf4', expected one of 'fp8'"):
        layer.fp8_rows()
    made = rollout_layers.Layers(False, [])(layer, torch.bfloat16, True)
    wide = layer.dequantize(torch.float32)
    assert ((made.codes.float() * made.scale - wide).norm() / wide.norm()).item() < 0.05


def test_8_bits_are_of_the_weights_as_they_are_now():
    work, rollout = opened(add_lora(build(), target_modules=["to_q", "net.2"]))
    before = work.all(rollout, linears="fp8")
    with torch.no_grad():
        work.model.blocks[0].attn1.to_q.lora_B["default"].weight.mul_(1.5)
        work.model.blocks[1].ffn.net[0].proj.weight.add_(0.1)
    after = work.all(rollout, linears="fp8")
    assert distance(after, before) > 0.01
    assert_same(after, work.all(work.open(), linears="fp8"))
    assert distance(after, work.plain()) < 0.05


@pytest.mark.parametrize(
    "sizes, exact, notes",
    [
        ({"head_dim": 20}, True, ["40 × 40", "40 × 120", "heads of 16, 32"]),
        ({"ffn_dim": 72}, False, ["72 × 64", "64 × 72"]),
        ({"head_dim": 24, "heads": 2}, False, ["not 24"]),
    ],
)
def test_shapes_that_8_bits_do_not_take_stay_exact_with_a_note(sizes, exact, notes):
    work = Case(build(**sizes))
    rollout, plain = work.open(), work.plain()
    ours = work.all(rollout, **FP8)
    for part in notes:
        assert any(part in note for note in rollout.notes), (part, rollout.notes)
    assert len(rollout.notes) == len(set(rollout.notes))
    if exact:
        assert_same(ours, plain)
    else:
        assert 0.001 < distance(ours, plain) < 0.05


def test_merged_and_quantized_bases_in_8_bits():
    for base in (None, "fp8"):
        model = wan.tiny_wan(head_dim=32)
        if base is not None:
            quantize(model, base)
        work, rollout = opened(add_lora(prfl_fast.patch(model)), merge_lora=True)
        assert 0.003 < distance(work.all(rollout, linears="fp8"), work.plain()) < 0.06
        assert rollout.notes == []


def test_8_bits_in_chunks_of_the_feed_forward():
    work, rollout = opened(build())
    whole = work.all(rollout, linears="fp8")
    work.adapter.chunk_feed_forward(work.model, 5)
    assert distance(work.all(rollout, linears="fp8"), whole) < 1e-3
