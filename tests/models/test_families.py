"""Families of diffusers beside Wan: patched against unpatched, and in every part of the package."""

import re

import numerics
import pytest
import tiny_families as families
import torch
from rollouts import add_lora

import prfl_fast
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory import offload
from prfl_fast.memory.checkpointing import activation_checkpointing, offload_bytes
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.memory.quantized import QuantizedLinear
from prfl_fast.models.inference import RolloutOptions
from prfl_fast.models.registry import find_adapter
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import FlowUniPC

CASES = list(families.CASES)


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("layout", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_within_twice(case, layout, batch):
    """Relative errors are pooled over seeds and blocks, as in ``test_patching.py``."""
    squares = {}
    for seed in range(6 // batch):
        model = families.tiny(case, seed=seed)
        arguments = families.inputs(case, batch=batch, seed=seed + 10)
        if layout == "bf16":
            model = model.bfloat16()
            narrow = [t.bfloat16().float() for t in arguments[:2]]
            kept = {k: v.bfloat16().to(v.dtype) for k, v in arguments[2].items()}
            arguments = (*narrow, kept)
        exact_of, exact = families.run(model, *arguments, double=True)
        theirs_of, theirs = families.run(model, *arguments, autocast=layout == "autocast")
        prfl_fast.patch(model)
        ours_of, ours = families.run(model, *arguments, autocast=layout == "autocast")
        numerics.assert_within_twice(ours_of, theirs_of, exact_of)
        for name, gradient in exact.items():
            assert (ours[name] is None) == (theirs[name] is None) == (gradient is None), name
            if gradient is None or not gradient.any():
                continue
            assert ours[name].dtype == theirs[name].dtype, name
            kind = re.sub(r"blocks\.\d+", "blocks", name)
            sums = squares.setdefault(kind, [0.0, 0.0])
            for i, found in enumerate((ours[name], theirs[name])):
                sums[i] += ((found - gradient).norm() / gradient.norm()).square().item()
    if layout == "bf16":  # one value per sample: a ratio of 5.6 over three seeds, 0.9 over twenty
        assert squares.pop("guidance", [0.0])[0] <= 0.1**2 * (6 // batch)
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in squares.items() if theirs}
    assert ratios.pop("guidance", 0) <= 4
    worst = max(ratios, key=ratios.__getitem__)
    assert ratios[worst] <= 2, f"{worst}: {ratios[worst]:.2f} times the unpatched model's error"


def test_latents_and_image_latents_are_concatenated():
    """HunyuanVideo I2V of the kind ``latent_concat``: 16 channels, 16 of the image and a mask."""
    model = families.tiny("hunyuan", in_channels=33, image_condition_type="latent_concat")
    x, timestep, conditions = families.inputs("hunyuan")
    image = torch.randn(len(x), 17, *x.shape[2:])
    whole = torch.cat([x, image], 1)
    (own,) = model(hidden_states=whole, timestep=timestep, return_dict=False, **conditions)
    prfl_fast.patch(model)
    given = conditions | {"latent_condition": image}
    torch.testing.assert_close(find_adapter(model).velocity(model, x, timestep, given), own)


@pytest.mark.cases(3)
@pytest.mark.parametrize("case", CASES)
def test_patch_is_reversible(case):
    model, arguments = families.tiny(case), families.inputs(case)
    before, _ = families.run(model, *arguments)
    keys = list(model.state_dict())
    assert prfl_fast.patch(model) is model and prfl_fast.is_patched(model)
    assert list(model.state_dict()) == keys
    out, _ = families.run(model, *arguments)
    assert not torch.equal(out, before), "the kernels must have run"
    with pytest.warns(UserWarning, match="runs its own forward.*hooks"):
        for block in find_adapter(model).blocks(model):
            next(m for n, m in block.named_modules() if n.endswith("norm_q")).register_forward_hook(
                lambda *_: None
            )
        assert torch.equal(families.run(model, *arguments)[0], before)
    prfl_fast.unpatch(model)
    assert not prfl_fast.is_patched(model)
    assert torch.equal(families.run(model, *arguments)[0], before)


@pytest.mark.cases(1)
@pytest.mark.parametrize("case", CASES)
def test_memory_policies(case, monkeypatch):
    """Give the same bits in every mode; frozen FP8 weights with LoRA run."""
    monkeypatch.setattr(offload, "SMALLEST", 1024)
    model, arguments = prfl_fast.patch(families.tiny(case)), families.inputs(case)
    out, gradients = families.run(model, *arguments)
    for mode, place in (("full", None), ("attention", "cpu")):
        activation_checkpointing(model, mode, place)
        again, found = families.run(model, *arguments)
        assert torch.equal(out, again)
        for name, gradient in gradients.items():
            assert gradient is None or torch.equal(gradient, found[name]), name
    assert offload_bytes(model)["transferred"] > 0
    apply_memory(model, MemoryConfig("fp8", "full", "cpu", feed_forward_chunk=8))
    blocks = find_adapter(model).blocks(model)
    assert all(any(isinstance(m, QuantizedLinear) for m in b.modules()) for b in blocks)
    add_lora(model)
    _, found = families.run(model, *arguments)
    lora = [gradient for name, gradient in found.items() if "lora_B" in name]
    trained = [gradient for gradient in lora if gradient is not None]
    assert all(torch.isfinite(gradient).all() for gradient in trained)
    assert len(trained) > 0.8 * len(lora)  # the last text stream of 1.5 reaches no output


@pytest.mark.cases(1)
@pytest.mark.parametrize("case", CASES)
def test_latent_reward(case, tmp_path):
    model = prfl_fast.patch(families.tiny(case))
    x, timestep, conditions = families.inputs(case)
    adapter, kept = find_adapter(model), len(find_adapter(model).blocks(model)) - 1
    seen = []
    hook = adapter.blocks(model)[kept - 1].register_forward_hook(lambda *args: seen.append(args[2]))
    adapter.velocity(model, x, timestep, conditions)
    hook.remove()
    expected = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(adapter.features(model, x, timestep, conditions, kept), expected)
    assert len(adapter.blocks(model)) == kept + 1
    reward = LatentRewardModel.from_backbone(model, kept, num_heads=2).freeze()
    assert reward.num_blocks == kept
    x.requires_grad_()
    score = reward(x, timestep, conditions)
    assert torch.isfinite(torch.autograd.grad(score.sum(), x)[0]).all()
    reward.save(tmp_path / "reward")
    again = LatentRewardModel.load(tmp_path / "reward")
    prfl_fast.patch(again.backbone)
    assert torch.equal(again(x, timestep, conditions), score)
    with pytest.raises(ValueError, match="no layout of HY-Video-PRFL"):
        reward.save_reference(tmp_path / "reference")


@pytest.mark.cases(2)
@pytest.mark.parametrize("case", CASES)
def test_rollouts(case):
    """Give the model's own bits; merged LoRA and FP8 layers stay near."""
    model = prfl_fast.patch(
        families.tiny(case, attention_head_dim=32, **families.WIDE.get(case, {}))
    )
    add_lora(model.eval())
    x, timestep, conditions = families.inputs(case)
    adapter = find_adapter(model)
    with torch.no_grad():
        own = adapter.velocity(model, x, timestep, conditions)
        exact = adapter.open_rollout(model, x, [timestep], conditions)
        assert torch.equal(exact.velocity(x, 0), own)
        merged = adapter.open_rollout(model, x, [timestep], conditions, RolloutOptions(True))
        torch.testing.assert_close(merged.velocity(x, 0), own, rtol=1e-4, atol=1e-4)
        assert not torch.equal(merged.velocity(x, 0), own)
        narrow = exact.velocity(x, 0, linears="fp8", attention="fp8")
        assert 0 < (narrow - own).norm() < 0.2 * own.norm()
        assert torch.equal(exact.velocity(x, 0), own)


@pytest.mark.cases(1)
@pytest.mark.parametrize("case", CASES)
def test_a_prfl_step(case):
    model = add_lora(prfl_fast.patch(families.tiny(case)))
    reward = LatentRewardModel.from_backbone(model, 2, num_heads=2).freeze()
    x, _, conditions = families.inputs(case, batch=1)
    prfl = PRFL(model, reward, FlowUniPC(), num_inference_steps=4, rollout=RolloutConfig())
    assert prfl(x, conditions, indices=[2]).finite
    lora = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert sum(g is not None and bool(g.any()) for g in lora) > len(lora) / 2


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    model = families.tiny(case)
    x, timestep, conditions = families.inputs(case)
    check = find_adapter(model).check_latents
    check(model, x, conditions)
    key = "encoder_hidden_states"
    bad = [
        (x[:, :-1], conditions, "channels of x and latent_condition is "),
        (x, conditions | {"pose": x}, "a key of conditions is 'pose'"),
        (x, {k: v for k, v in conditions.items() if k != key}, f"{key}.* is None.*\\[B, T, 2.\\]"),
        (x, conditions | {key: conditions[key][..., :-1]}, "\\[B, T, 2.\\]"),
        (x, conditions | {key: conditions[key][:, :0]}, "\\[B, T, 2.\\]"),
    ]
    for latents, given, message in bad:
        with pytest.raises(ValueError, match=message):
            check(model, latents, given)
    block = find_adapter(model).blocks(model)[0]
    attn = getattr(block, "attn", None) or block.attn1
    attn.processor = type("Sage", (type(attn.processor),), {})()
    with pytest.raises(ValueError, match="processor is a .*Sage"):
        prfl_fast.patch(model)
    assert "forward" not in block.__dict__


def test_image_latents_of_hunyuan15_are_zeros_if_missing():
    model = families.tiny("hunyuan15")
    x, timestep, conditions = families.inputs("hunyuan15")
    zeros = torch.zeros_like(conditions.pop("latent_condition"))
    adapter = find_adapter(model)
    adapter.check_latents(model, x, conditions)
    out = adapter.velocity(model, x, timestep, conditions)
    given = conditions | {"latent_condition": zeros}
    assert torch.equal(out, adapter.velocity(model, x, timestep, given))


@pytest.mark.cases(1)
@pytest.mark.parametrize("batch", [2, 1])
@pytest.mark.parametrize("layout", ["fp32", "bf16"])
def test_cogvideox(layout, batch):
    """Its blocks run on the kernels; as a generator of PRFL it is refused."""
    squares = {}
    for seed in range(6 // batch):
        model, arguments = families.cogvideox(seed, batch, layout)
        exact = families.run_cogvideox(model, arguments, double=True)
        theirs = families.run_cogvideox(model, arguments)
        ours = families.run_cogvideox(prfl_fast.patch(model), arguments)
        for name, gradient in exact.items():
            assert torch.isfinite(ours[name]).all() and ours[name].dtype == theirs[name].dtype
            kind = re.sub(r"blocks\.\d+", "blocks", name)
            sums = squares.setdefault(kind, [0.0, 0.0])
            for i, found in enumerate((ours[name], theirs[name])):
                sums[i] += ((found - gradient).norm() / gradient.norm()).square().item()
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in squares.items()}
    worst = max(ratios, key=ratios.__getitem__)
    print(f"output {ratios['output']:.2f} worst {ratios[worst]:.2f} {worst}")
    assert ratios[worst] <= 2, f"{worst}: {ratios[worst]:.2f} times the unpatched model's error"
    again = families.run_cogvideox(activation_checkpointing(model, "attention", "cpu"), arguments)
    assert all(torch.equal(again[name], value) for name, value in ours.items())
    prfl = PRFL(model, lambda x, t, c: x.mean((1, 2, 3, 4)), FlowUniPC(), num_inference_steps=4)
    with pytest.raises(ValueError, match="predicts v of a DDIM"):
        prfl(torch.randn(1, 16, 2, 4, 4), {})
    with pytest.raises(ValueError, match="predicts v of a DDIM"):
        LatentRewardModel.from_backbone(model, 1)


@pytest.mark.cases(1)
@pytest.mark.triton
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_triton_kernels_through_a_whole_model(case, triton_backend):
    """One seed: errors of single gradients scatter, their geometric mean does not."""
    layers = {"num_layers": 1} | ({"num_single_layers": 1} if families.single(case) else {})
    model = families.tiny(case, **layers)
    arguments = families.inputs(case, batch=1, size=(2, 2, 2), text=3)
    exact, theirs = (families.run(model, *arguments, double=double)[1] for double in (True, False))
    ours = families.run(prfl_fast.patch(model), *arguments)[1]
    ratios = [
        ((ours[name] - g).norm() / (theirs[name] - g).norm().clamp_min(1e-12)).log()
        for name, g in exact.items()
        if g is not None and g.any()
    ]
    assert torch.stack(ratios).mean().exp() <= 1.5


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_blocks_compile_without_graph_breaks(case):
    model = prfl_fast.patch(families.tiny(case))
    arguments = families.inputs(case)
    out, gradients = families.run(model, *arguments)
    blocks = find_adapter(model).blocks(model)
    for block in (blocks[0], blocks[-1]):
        block.compile(fullgraph=True, backend="aot_eager")
    again, compiled = families.run(model, *arguments)
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(compiled[name], gradient, rtol=1e-3, atol=1e-4)
