"""Patched against unpatched diffusers Wan: outputs, every gradient, reversibility, checkpointing,
peft.
"""

import copy
import math
import re
import types

import numerics
import pytest
import torch
import wan
from torch import nn

import prfl_fast

pytest.importorskip("diffusers")


def build(case, layout, seed=0):
    model = wan.tiny_wan(case, seed=seed)
    if layout == "mixed":
        return wan.mixed_layout(model)
    return model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[layout])


@pytest.mark.parametrize("layout", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("case", wan.CASES)
def test_outputs_and_gradients_within_twice(case, layout):
    """Per kind of parameter, relative errors are pooled over seeds and blocks.

    A gradient like that of a cross-attention query bias is a sum whose rounding errors have few
    degrees of freedom:
    between two equally exact computations one seed's error ratio reaches 2.7, while over many seeds
    it averages 1.0. Absolute errors of one block are mostly those of one seed: their ratio over
    three seeds reaches 1.6, that of relative errors of both blocks 1.2.
    """
    squares = {}
    for seed in range(3):
        model = build(case, layout, seed)
        arguments = wan.inputs(case, seed=seed + 10, text_tokens=24)
        oracle_out, oracle = wan.run(model, *arguments, double=True)
        plain_out, plain = wan.run(model, *arguments)
        out, gradients = wan.run(prfl_fast.patch(model), *arguments)
        numerics.assert_within_twice(out, plain_out, oracle_out)
        assert gradients.keys() == oracle.keys()
        for name, exact in {"output": oracle_out, **oracle}.items():
            ours, theirs = (out, plain_out) if name == "output" else (gradients[name], plain[name])
            if exact is None:
                assert ours is None, name
                continue
            assert ours.dtype == theirs.dtype, name
            assert torch.isfinite(ours).all(), name
            kind = re.sub(r"^blocks\.\d+", "blocks", name)
            sums, size = squares.setdefault(kind, [0.0, 0.0]), exact.square().mean().item()
            sums[0] += (ours - exact).square().mean().item() / size
            sums[1] += (theirs - exact).square().mean().item() / size
    ratios = {name: (ours / theirs) ** 0.5 for name, (ours, theirs) in squares.items()}
    worst = max(ratios, key=ratios.__getitem__)
    print(
        f"output error ratio {ratios['output']:.2f}, worst gradient {ratios[worst]:.2f} ({worst})"
    )
    assert ratios[worst] <= 2, f"{worst}: {ratios[worst]:.2f} times the unpatched model's error"


@pytest.mark.triton
@pytest.mark.parametrize("case", wan.CASES)
def test_triton_kernels_through_a_whole_model(case, triton_backend):
    """Every kernel of a block, forward and backward, as the adapter calls it.

    One seed: a single gradient's error ratio scatters (see above), their geometric mean does not.
    """
    size = {"size": (1, 4, 4), "batch": 1, "text_tokens": 3}
    model = wan.tiny_wan(case, layers=1)
    arguments = wan.inputs(case, **size)
    oracle_out, oracle = wan.run(model, *arguments, double=True)
    plain_out, plain = wan.run(model, *arguments)
    out, gradients = wan.run(prfl_fast.patch(model), *arguments)
    numerics.assert_within_twice(out, plain_out, oracle_out, rounding=4)
    ratios = {}
    for name, exact in oracle.items():
        assert (gradients[name] is None) == (exact is None), name
        if exact is not None:
            assert torch.isfinite(gradients[name]).all(), name
            ours, theirs = (g[name].double() - exact for g in (gradients, plain))
            ratios[name] = (ours.norm() / theirs.norm().clamp_min(1e-12)).item()
    mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
    worst = max(ratios, key=ratios.__getitem__)
    print(f"errors over the unpatched model's: {mean:.2f}, worst {ratios[worst]:.2f} ({worst})")
    assert mean <= 1.5 and ratios[worst] <= 4


def test_patch_is_reversible_idempotent_and_per_instance():
    model, other = wan.tiny_wan(), wan.tiny_wan()
    x, timestep, conditions = wan.inputs()
    before, _ = wan.run(model, x, timestep, conditions)
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    assert prfl_fast.patch(model) is model
    first = dict(model.blocks[0].__dict__)
    prfl_fast.patch(model)
    assert model.blocks[0].__dict__["forward"] is first["forward"]
    assert "forward" not in other.blocks[0].__dict__
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    prfl_fast.unpatch(prfl_fast.unpatch(model))
    assert "forward" not in model.blocks[0].__dict__ and "forward" not in model.rope.__dict__
    after, _ = wan.run(model, x, timestep, conditions)
    assert torch.equal(before, after)


def test_importing_changes_nothing():
    from diffusers.models.transformers import transformer_wan

    assert transformer_wan.WanTransformerBlock.forward.__module__.startswith("diffusers")


def test_deepcopy_of_a_patched_model_is_independent():
    model = prfl_fast.patch(wan.tiny_wan())
    twin = copy.deepcopy(model)
    assert twin.blocks[0].forward.__self__ is twin.blocks[0]
    with torch.no_grad():
        twin.blocks[0].ffn.net[2].weight.zero_()
    x, timestep, conditions = wan.inputs()
    assert not torch.equal(
        wan.run(model, x, timestep, conditions)[0], wan.run(twin, x, timestep, conditions)[0]
    )


@pytest.mark.parametrize("case", wan.CASES)
def test_gradient_checkpointing_gives_the_same_gradients(case):
    model = prfl_fast.patch(wan.tiny_wan(case)).train()
    x, timestep, conditions = wan.inputs(case)
    out, plain = wan.run(model, x, timestep, conditions)
    model.enable_gradient_checkpointing()
    again, checkpointed = wan.run(model, x, timestep, conditions)
    assert torch.equal(out, again)
    for name, gradient in plain.items():
        assert gradient is None or torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_layers_are_respected(patch_first):
    from peft import LoraConfig

    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"]
    plain, model = wan.tiny_wan(), wan.tiny_wan()
    for m in (plain, model):
        if m is model and patch_first:
            prfl_fast.patch(m)
        torch.manual_seed(3)
        m.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    prfl_fast.patch(model)
    x, timestep, conditions = wan.inputs()
    oracle_out, oracle = wan.run(plain, x, timestep, conditions, double=True)
    plain_out, theirs = wan.run(plain, x, timestep, conditions)
    out, ours = wan.run(model, x, timestep, conditions)
    numerics.assert_within_twice(out, plain_out, oracle_out)
    lora = [name for name in oracle if "lora_" in name]
    assert len(lora) == 2 * 2 * (2 * 4 + 2)
    for name in lora:
        numerics.assert_within_twice(ours[name], theirs[name], oracle[name], name, rounding=4)
    assert ours["blocks.0.attn1.to_q.base_layer.weight"] is None


def test_peft_wrapped_model_is_found():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wan.tiny_wan(), LoraConfig(r=2, target_modules=["to_q"]))
    prfl_fast.patch(model)
    assert "forward" in model.get_base_model().blocks[0].__dict__


def test_fused_projections_are_used():
    model, plain = wan.tiny_wan("i2v"), wan.tiny_wan("i2v")
    for m in (model, plain):
        for block in m.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
    prfl_fast.patch(model)
    x, timestep, conditions = wan.inputs("i2v")
    oracle_out, _ = wan.run(plain, x, timestep, conditions, double=True)
    plain_out, _ = wan.run(plain, x, timestep, conditions)
    numerics.assert_within_twice(wan.run(model, x, timestep, conditions)[0], plain_out, oracle_out)


def test_forward_hooks_of_the_first_ffn_linear_still_run():
    model = prfl_fast.patch(wan.tiny_wan())
    seen = []
    model.blocks[0].ffn.net[0].proj.register_forward_hook(lambda *_: seen.append(1))
    wan.run(model, *wan.inputs())
    assert seen


def test_without_cross_attention_norm():
    plain, model = (wan.tiny_wan(cross_attn_norm=False) for _ in range(2))
    prfl_fast.patch(model)
    oracle, _ = wan.run(plain, *wan.inputs(), double=True)
    numerics.assert_within_twice(
        wan.run(model, *wan.inputs())[0], wan.run(plain, *wan.inputs())[0], oracle
    )


def test_block_called_with_diffusers_own_rotary_tables():
    model, plain = prfl_fast.patch(wan.tiny_wan()), wan.tiny_wan()
    args = (torch.randn(1, 6, 48), torch.randn(1, 7, 48), torch.randn(1, 6, 48))
    rotary = plain.rope(torch.zeros(1, 16, 1, 4, 6))
    assert torch.equal(model.blocks[0](*args, rotary), plain.blocks[0](*args, rotary))


def test_compiles_without_graph_breaks():
    model = prfl_fast.patch(wan.tiny_wan(layers=1))
    x, timestep, conditions = wan.inputs()
    out, gradients = wan.run(model, x, timestep, conditions)
    model.blocks[0].compile(fullgraph=True, backend="aot_eager")
    compiled_out, compiled = wan.run(model, x, timestep, conditions)
    assert torch.allclose(out, compiled_out, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient is None or torch.allclose(gradient, compiled[name], rtol=1e-4, atol=1e-5), (
            name
        )


def test_frozen_model_gives_only_the_input_gradient():
    model = prfl_fast.patch(wan.tiny_wan()).requires_grad_(False)
    x, timestep, conditions = wan.inputs()
    x.requires_grad_()
    model(x, timestep, conditions["encoder_hidden_states"], return_dict=False)[
        0
    ].square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_unknown_model_is_a_type_error_that_lists_what_is_supported():
    with pytest.raises(TypeError, match="Linear.*supported: diffusers WanTransformer3DModel"):
        prfl_fast.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="supported"):
        prfl_fast.unpatch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="supported"):
        prfl_fast.patch("wan")


def test_refuses_what_it_would_break():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Sage(WanAttnProcessor):
        pass

    model = wan.tiny_wan()
    model.blocks[1].attn1.set_processor(Sage())
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 has attention processor Sage"):
        prfl_fast.patch(model)
    assert "forward" not in model.blocks[0].__dict__, "nothing may be half patched"
    model = wan.tiny_wan()
    model.blocks[0].forward = types.MethodType(lambda self, *a: None, model.blocks[0])
    with pytest.raises(ValueError, match="forward of its own"):
        prfl_fast.patch(model)
