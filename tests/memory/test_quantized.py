"""Quantized linear layers: numbers, gradients, what is kept, and models made of them."""

import copy
import io

import pytest
import torch
from numerics import assert_within_twice
from offload_models import assert_same, fill_adapters
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from wan import CASES, inputs, run, tiny_wan

from prfl_fast import LatentRewardModel, patch, unpatch
from prfl_fast.memory.quantized import QuantizedLinear, cast_weights, quantize
from prfl_fast.models.registry import find_adapter
from prfl_fast.training.lora import add_lora

bnb = pytest.importorskip("bitsandbytes", reason="NF4 needs bitsandbytes")

KINDS = ("fp8", "nf4")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
# (out, in): a multiple of NF4's 64, rows that share a block of 64, an odd number of elements.
SHAPES = ((128, 192), (50, 72), (33, 35))
# Appendix E of QLoRA (arXiv 2305.14314).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def linear(shape=(128, 192), bias=True, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(shape[1], shape[0], bias=bias).requires_grad_(False)
    with torch.no_grad():  # rows of different size, and one that is zero
        layer.weight.mul_(torch.logspace(-3, 1, shape[0]).unsqueeze(1))
        layer.weight[3] = 0
    return layer


def blocks_of(weight):
    flat = weight.detach().double().flatten()
    return torch.cat([flat, flat.new_zeros(-flat.numel() % 64)]).view(-1, 64)


def replace_layers(model, kind, change):
    """Replace every layer that is exactly of ``kind`` by ``change(layer)``."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is kind:
                setattr(owner, name, change(child))
    return model


def dense(model, dtype=None):
    """Return the model with each quantized layer replaced by a plain one of its matrix."""

    def plain_of(child):
        plain = nn.Linear(child.in_features, child.out_features, child.bias is not None)
        width = child.bias.dtype if dtype is None else dtype
        plain.weight = nn.Parameter(child.dequantize(width), requires_grad=False)
        plain.bias = child.bias
        return plain

    return replace_layers(copy.deepcopy(model), QuantizedLinear, plain_of)


def call(model, case="t2v", dtype=torch.bfloat16, grad=False):
    x, timestep, conditions = inputs(case)
    conditions = {name: value.to(dtype) for name, value in conditions.items()}
    x = x.to(dtype).requires_grad_(grad)
    out = find_adapter(model).velocity(model, x, timestep, conditions)
    if not grad:
        return out.detach()
    out.backward(torch.ones_like(out))
    return out.detach(), x.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_takes_the_nearest_of_its_sixteen_levels(shape):
    layer = linear(shape)
    blocks = blocks_of(layer.weight)
    scale = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4, dtype=torch.float64)
    nearest = (blocks.unsqueeze(-1) - scale.unsqueeze(-1) * levels).abs().amin(-1)
    matrix = QuantizedLinear(layer, "nf4").dequantize(torch.float32)
    error = (blocks_of(matrix) - blocks).abs()
    # The scales are in 8 bits, about their mean.
    assert (error <= nearest + (scale - scale.mean()).abs().max() / 100).all()
    assert torch.equal(matrix[3], torch.zeros(shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_is_within_a_sixteenth(shape):
    layer = linear(shape)
    matrix = QuantizedLinear(layer, "fp8").dequantize(torch.float32)
    scale = layer.weight.abs().amax(1, keepdim=True) / 448
    assert ((matrix - layer.weight).abs() <= layer.weight.abs() / 16 + scale / 512).all()


def test_nf4_is_that_of_bitsandbytes():
    layer = linear((128, 192))
    weight, state = bnb.functional.quantize_4bit(
        layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = bnb.functional.dequantize_4bit(weight, state)
    ours = QuantizedLinear(layer, "nf4").dequantize(torch.float32)
    nothing = (layer.weight == 0).all(1)  # there theirs has the scale's rounding error
    assert nothing.any() and (ours[nothing] == 0).all()
    assert torch.equal(ours[~nothing], theirs[~nothing])


@EACH_KIND
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
def test_a_layer_is_the_product_with_its_widened_matrix(kind, shape, dtype):
    layer = QuantizedLinear(linear(shape), kind)
    results = []
    for width in (None, dtype, torch.float64):
        x = torch.randn(2, 5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        x = x.to(width or dtype).requires_grad_()
        if width is None:
            out = layer(x)
        else:
            # The oracle's matrix is not rounded; plain PyTorch's is, to its dtype.
            matrix = layer.dequantize(torch.float64).to(width)
            out = nn.functional.linear(x, matrix, layer.bias.to(dtype).to(width))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        out.backward(grad.to(width or dtype))
        results.append((out.detach(), x.grad))
    for name, ours, plain, oracle in zip(("output", "d_x"), *results, strict=True):
        assert_within_twice(ours, plain, oracle, name)


@EACH_KIND
def test_only_the_input_gets_a_gradient_and_nothing_is_kept(kind):
    layer = QuantizedLinear(linear(), kind)
    products, saved = [], []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                products.append(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 192, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with Count():
        with hooks:
            out = layer(x)
        out.sum().backward()
    assert len(products) == 2, products
    assert [t.data_ptr() for t in saved] == [layer.qweight.data_ptr()]
    assert layer.qweight.grad is None and layer.bias.grad is None
    assert not layer(x.detach()).requires_grad


def test_the_bias_can_train():
    layer = QuantizedLinear(linear(), "fp8")
    layer.bias.requires_grad_(True)
    layer(torch.randn(2, 3, 192)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((128,), 6.0))
    assert QuantizedLinear(linear(bias=False), "fp8").bias is None


@EACH_KIND
def test_gradcheck_and_its_second_order(kind):
    layer = QuantizedLinear(linear((6, 8)), kind).double()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    layer.bias.requires_grad_(True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@EACH_KIND
def test_no_cast_or_copy_changes_the_matrix(kind):
    layer = QuantizedLinear(linear(), kind)
    matrix = layer.dequantize(torch.float32)
    for change in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.cpu):
        layer = copy.deepcopy(change(layer))
        assert torch.equal(layer.dequantize(torch.float32), matrix)
    layer.float()
    assert layer.bias.dtype == torch.float32
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    fresh = QuantizedLinear(linear(seed=1), kind)
    fresh.load_state_dict(layer.state_dict())
    for other in (again, fresh):
        assert_same([other.dequantize(torch.float32), other.bias], [matrix, layer.bias])
    moved = layer.to("meta")
    assert moved.qweight.is_meta and moved.bias.is_meta and moved.qweight.dtype == torch.uint8


@EACH_KIND
def test_bytes(kind):
    """14B's widest matrix: one byte and 4 a row, or half a byte, 1 for each 64 and 4
    for each 16384.
    """
    layer = QuantizedLinear(nn.Linear(5120, 13824, device="meta", dtype=torch.bfloat16), kind)
    count = 5120 * 13824
    nf4 = count // 2 + count // 64 + 4 * (256 + 1 + count // 16384)
    expected = count + 4 * 13824 if kind == "fp8" else nf4 + -nf4 % 16
    assert layer.qweight.nbytes == expected and layer.qweight.is_meta


@EACH_KIND
def test_autocast_narrows_the_input_as_it_does_for_a_linear_layer(kind):
    layer = QuantizedLinear(linear(), kind)
    x = torch.randn(4, 192, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        assert layer(x.double()).dtype == torch.float64
    assert out.dtype == torch.bfloat16 and torch.equal(out, layer(x.bfloat16()))
    out.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.cases(1)
@EACH_KIND
def test_compiled_layers_keep_no_widened_matrix(kind):
    layers = nn.Sequential(QuantizedLinear(linear((64, 64)), kind), nn.Tanh(), nn.Linear(64, 64))
    layers[2] = QuantizedLinear(layers[2].requires_grad_(False), kind)
    x = torch.randn(8, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(layers(x).sum(), x)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
    with hooks:
        out = torch.compile(layers, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected)
    assert not [t for t in saved if t.shape == (64, 64)]


@EACH_KIND
def test_which_layers_of_a_model(kind):
    model = tiny_wan("i2v")
    linears = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    add_lora(model, 2)
    adapters = [n for n, m in model.named_modules() if type(m) is nn.Linear and "lora_" in n]
    assert quantize(model, kind) is model
    names = {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    inside = {n for n in linears if n.startswith("blocks.")}
    assert {n.replace(".base_layer", "") for n in names} == inside
    assert len(inside) == 2 * 12
    left = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert left == set(adapters) | (linears - inside)
    layer = model.blocks[0].attn1.to_q.base_layer
    assert quantize(model, kind).blocks[0].attn1.to_q.base_layer is layer


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", CASES)
@EACH_KIND
def test_a_patched_model_keeps_the_twice_rule(case, kind):
    model = cast_weights(tiny_wan(case), kind).requires_grad_(False)
    oracle, oracle_grads = run(model, *inputs(case), double=True)
    # The oracle's own layers against plain ones.
    wide, _ = run(dense(model, torch.float64), *inputs(case), double=True)
    torch.testing.assert_close(oracle, wide, rtol=1e-6, atol=1e-8)
    plain, plain_grads = run(dense(model), *inputs(case))
    out, grads = run(patch(model), *inputs(case))
    assert_within_twice(out, plain, oracle)
    for name, grad in grads.items():
        if oracle_grads[name] is not None:
            assert_within_twice(grad, plain_grads[name], oracle_grads[name], name)
    unpatched, _ = run(unpatch(model), *inputs(case))
    assert torch.equal(unpatched, plain)


@EACH_KIND
def test_adapters_before_and_after(kind):
    before, after = tiny_wan(), tiny_wan()
    torch.manual_seed(0)
    add_lora(before, 2)
    cast_weights(before, kind)
    cast_weights(after, kind)
    torch.manual_seed(0)
    add_lora(after, 2)
    for model in (before, after):
        torch.manual_seed(1)
        fill_adapters(model)
    adapters = {name: p for name, p in after.named_parameters() if "lora_" in name}
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in adapters.values())
    assert torch.equal(call(before), call(after))
    out, grad = call(patch(after), grad=True)
    assert out.isfinite().all() and grad.abs().max() > 0
    trained = {n for n, p in after.named_parameters() if p.grad is not None}
    assert trained == set(adapters)


@EACH_KIND
def test_checkpointing_recomputes_the_same_bits(kind):
    model = cast_weights(tiny_wan(), kind)
    add_lora(model, 2)
    fill_adapters(model)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        out, grad = call(patch(model), grad=True)
        results.append([out, grad] + [p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(results[0]) == 2 + 2 * 2 * 4 * 2
    assert_same(*results)


@EACH_KIND
@pytest.mark.parametrize("safe", (False, True))
def test_merging_an_adapter_into_a_quantized_matrix_is_an_error(kind, safe):
    model = cast_weights(tiny_wan(), kind)
    add_lora(model, 2)
    expected = call(model)
    with pytest.raises(ValueError, match=f"quantized to {kind}.*a plain matrix to merge"):
        model.fuse_lora(safe_fusing=safe)
    assert torch.equal(call(model), expected)


def test_the_layouts(tmp_path):
    from diffusers import WanTransformer3DModel

    model = tiny_wan("i2v")
    model.save_pretrained(tmp_path)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    bf16 = cast_weights(copy.deepcopy(model), "bf16")

    def tensors(model):
        return dict([*model.named_parameters(), *model.named_buffers()])

    expected = tensors(bf16)
    assert_same(expected, tensors(theirs))
    for kind in KINDS:
        small = tensors(cast_weights(copy.deepcopy(model), kind))
        dense = {name: t for name, t in small.items() if not name.endswith("qweight")}
        assert len(small) - len(dense) == 24
        assert_same(dense, {name: expected[name] for name in dense})
        straight = quantize(copy.deepcopy(model), kind).blocks[1].attn1.to_k.qweight
        assert torch.equal(small["blocks.1.attn1.to_k.qweight"], straight)
        # What a planner builds: sizes only.
        blank = tensors(cast_weights(copy.deepcopy(model).to("meta"), kind))
        moved = tensors(cast_weights(copy.deepcopy(model), kind, device="meta"))
        for other in (blank, moved):
            assert all(tensor.is_meta for tensor in other.values())
            assert {n: (t.shape, t.dtype) for n, t in other.items()} == {
                n: (t.shape, t.dtype) for n, t in small.items()
            }
    wide = cast_weights(bf16, "fp32")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_what_is_refused():
    model = tiny_wan()
    with pytest.raises(ValueError, match="kind is 'int3', expected one of 'fp8', 'nf4'"):
        quantize(model, "int3")
    message = "kind is 'fp16', expected one of 'fp32', 'bf16', 'fp8', 'nf4'"
    with pytest.raises(ValueError, match=message):
        cast_weights(model, "fp16")
    with pytest.raises(TypeError, match="a supported class: diffusers WanTransformer3DModel"):
        quantize(nn.Linear(2, 2), "fp8")
    handle = model.blocks[1].ffn.net[2].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.net\.2 has hooks"):
        quantize(model, "fp8")
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    handle.remove()
    quantize(model, "fp8")
    message = r"kind of blocks\.0\.attn1\.to_q is 'fp8', expected '(nf4|bf16)'"
    for change, kind in ((quantize, "nf4"), (cast_weights, "nf4"), (cast_weights, "bf16")):
        with pytest.raises(ValueError, match=message):
            change(model, kind)


@EACH_KIND
def test_a_frozen_reward(kind, tmp_path):
    torch.manual_seed(0)
    reward = LatentRewardModel.from_backbone(tiny_wan(), num_blocks=2, num_heads=2).freeze()
    x, timestep, conditions = inputs()
    expected = reward(x, timestep, conditions)
    patch(cast_weights(reward.backbone, kind))
    reward.freeze()
    x.requires_grad_()
    score = reward(x, timestep, conditions)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, expected, rtol=0, atol=0.05)
    score.sum().backward()
    assert x.grad.abs().max() > 0 and all(p.grad is None for p in reward.parameters())
    with pytest.raises(ValueError, match="cannot be saved.*to_q.weight.*unexpected.*qweight"):
        reward.save(tmp_path / "reward")
    assert not (tmp_path / "reward").exists()
    # A generator that is quantized already gives a quantized backbone.
    copied = LatentRewardModel.from_backbone(quantize(tiny_wan(), kind), 1, num_heads=2)
    assert isinstance(copied.backbone.blocks[0].attn1.to_q, QuantizedLinear)
    assert not copied.backbone.blocks[0].attn1.to_q.qweight.requires_grad


def test_layers_of_bitsandbytes_itself_keep_working():
    def theirs_of(child):
        layer = bnb.nn.Linear4bit(
            child.in_features,
            child.out_features,
            compute_dtype=torch.bfloat16,
            compress_statistics=False,
            quant_type="nf4",
        )
        layer.load_state_dict(child.state_dict())
        layer.bias.data = layer.bias.data.bfloat16()
        return layer.to("cpu").requires_grad_(False)

    model = cast_weights(tiny_wan(), "bf16").requires_grad_(False)
    ours = call(quantize(copy.deepcopy(model), "nf4"))
    replace_layers(model.blocks, nn.Linear, theirs_of)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.uint8
    theirs = call(model)
    layer = model.blocks[0].attn1.to_q
    assert quantize(model, "nf4").blocks[0].attn1.to_q is layer
    assert torch.equal(call(cast_weights(model, "nf4")), theirs)
    assert (theirs - ours).norm() < 0.05 * ours.norm()
    add_lora(patch(model), 2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    out, grad = call(model, grad=True)
    assert (out - theirs).norm() < 0.02 * theirs.norm() and grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EACH_KIND
def test_on_cuda(kind, shape, device="cuda"):
    """The kernels of bitsandbytes there, on slices of one vector: the matrix is that of the CPU."""
    host = QuantizedLinear(linear(shape), kind)
    expected = host.dequantize(torch.float32)
    layer = copy.deepcopy(host).to(device)
    torch.testing.assert_close(layer.dequantize(torch.float32).cpu(), expected)
    there = QuantizedLinear(linear(shape), kind, device=device)
    error = there.dequantize(torch.float32).cpu() - expected
    assert error.norm() < 0.01 * expected.norm()  # ties may round otherwise
    layer.bfloat16()
    wide = layer.dequantize(torch.bfloat16)
    x = torch.randn(5, shape[1], device=device, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, shape[0], device=device, dtype=torch.bfloat16)
    y = layer(x)
    y.backward(grad)
    assert torch.equal(y, nn.functional.linear(x, wide, layer.bias))
    assert torch.equal(x.grad, grad @ wide)
