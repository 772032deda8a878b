"""Patched against unpatched diffusers Wan: outputs, every gradient, wrappers, refusals."""

import copy
import math
import types

import numerics
import pytest
import torch
import wan
from rollouts import add_lora, fused, lay_out
from tiers import slow_except
from torch import nn

import prfl_fast

pytest.importorskip("diffusers")


def three_runs(plain, model, arguments):
    """Return outputs and gradients of ``plain`` in float64, of it, of a patched equal model."""
    oracle, theirs = (wan.run(plain, *arguments, double=double) for double in (True, False))
    return oracle, theirs, wan.run(prfl_fast.patch(model), *arguments)


@pytest.mark.cases(3)
@pytest.mark.parametrize("layout", ["fp32", "bf16", "mixed"])
@pytest.mark.parametrize("case", (*wan.CASES, "first-frame"))
def test_outputs_and_gradients_within_twice(case, layout):
    errors = numerics.PooledErrors()
    for seed in range(4):
        model = lay_out(wan.tiny_wan(case, seed=seed), layout)
        arguments = wan.inputs(case, seed=seed + 10, text_tokens=24)
        runs = three_runs(model, model, arguments)
        errors.add(*({"output": out} | gradients for out, gradients in runs))
    errors.assert_within_twice()


@pytest.mark.slow
@pytest.mark.cases(1)
@pytest.mark.triton
@pytest.mark.parametrize("case", slow_except(wan.CASES, ("t2v", "per-token")))
def test_triton_kernels_through_a_whole_model(case, triton_backend):
    """Every kernel of a block, forward and backward, as the adapter calls it.

    One seed: a single gradient's error ratio scatters (up to 5.1 on baseline
    x86), their geometric mean does not.
    """
    size = {"size": (1, 4, 4), "batch": 1, "text_tokens": 3}
    model = wan.tiny_wan(case, layers=1)
    runs = three_runs(model, model, wan.inputs(case, **size))
    (oracle_out, oracle), (plain_out, plain), (out, gradients) = runs
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
    assert mean <= 1.5 and ratios[worst] <= 6


def test_patch_is_reversible_idempotent_and_per_instance():
    model, other = wan.tiny_wan(), wan.tiny_wan()
    before, _ = wan.run(model, *wan.inputs())
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    assert prfl_fast.patch(model) is model
    first = model.blocks[0].__dict__["forward"]
    prfl_fast.patch(model)
    assert model.blocks[0].__dict__["forward"] is first
    assert "forward" not in other.blocks[0].__dict__
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    prfl_fast.unpatch(prfl_fast.unpatch(model))
    assert "forward" not in model.blocks[0].__dict__ and "forward" not in model.rope.__dict__
    after, _ = wan.run(model, *wan.inputs())
    assert torch.equal(before, after)


def test_importing_changes_nothing():
    from diffusers.models.transformers import transformer_wan

    assert transformer_wan.WanTransformerBlock.forward.__module__.startswith("diffusers")


def test_deepcopy_of_a_patched_model_is_independent():
    model = prfl_fast.patch(wan.tiny_wan())
    twin = copy.deepcopy(model)
    assert twin.blocks[0].forward.args[0] is twin.blocks[0]
    with torch.no_grad():
        twin.blocks[0].ffn.net[2].weight.zero_()
    assert not torch.equal(wan.run(model, *wan.inputs())[0], wan.run(twin, *wan.inputs())[0])


@pytest.mark.parametrize("case", wan.CASES)
def test_gradient_checkpointing_gives_the_same_gradients(case):
    model = prfl_fast.patch(wan.tiny_wan(case)).train()
    out, plain = wan.run(model, *wan.inputs(case))
    model.enable_gradient_checkpointing()
    again, checkpointed = wan.run(model, *wan.inputs(case))
    assert torch.equal(out, again)
    for name, gradient in plain.items():
        assert gradient is None or torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("patch_first", [True, False])
def test_lora_layers_are_respected(patch_first):
    plain, model = wan.tiny_wan(), wan.tiny_wan()
    for m in (plain, prfl_fast.patch(model) if patch_first else model):
        add_lora(m)
    (oracle_out, oracle), (plain_out, theirs), (out, ours) = three_runs(plain, model, wan.inputs())
    numerics.assert_within_twice(out, plain_out, oracle_out)
    lora = [name for name in oracle if "lora_" in name]
    assert len(lora) == 2 * 2 * (2 * 4 + 2)
    for name in lora:
        numerics.assert_within_twice(ours[name], theirs[name], oracle[name], name, rounding=4)
    assert ours["blocks.0.attn1.to_q.base_layer.weight"] is None


def with_peft(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"]))


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, with_peft, lambda m: torch.compile(m, backend="eager"), nn.DataParallel],
    ids=["bare", "peft", "compile", "data-parallel"],
)
def test_is_patched_sees_through_wrappers(wrap):
    model = wan.tiny_wan()
    wrapped = wrap(model)
    assert not prfl_fast.is_patched(wrapped)
    assert prfl_fast.patch(wrapped) is wrapped
    assert prfl_fast.is_patched(wrapped) and prfl_fast.is_patched(model)
    prfl_fast.unpatch(wrapped)
    assert not prfl_fast.is_patched(wrapped) and not prfl_fast.is_patched(model)


@pytest.mark.parametrize("part", [lambda m: m.blocks[1], lambda m: m.rope], ids=["block", "rope"])
def test_a_partly_patched_model_is_not_patched(part):
    model = prfl_fast.patch(wan.tiny_wan())
    del part(model).forward
    assert not prfl_fast.is_patched(model)
    assert prfl_fast.is_patched(prfl_fast.patch(model))
    part(model).forward = types.MethodType(lambda self, *a: None, part(model))
    assert not prfl_fast.is_patched(model)


OTHER_MODELS = {
    "fused projections": ("i2v", lambda: fused(wan.tiny_wan("i2v"))),
    "no norm of the cross-attention": ("t2v", lambda: wan.tiny_wan(cross_attn_norm=False)),
}


@pytest.mark.parametrize("kind", OTHER_MODELS)
def test_outputs_of_other_models(kind):
    case, make = OTHER_MODELS[kind]
    oracle, theirs, ours = (out for out, _ in three_runs(make(), make(), wan.inputs(case)))
    numerics.assert_within_twice(ours, theirs, oracle)


def test_forward_hooks_of_the_first_ffn_linear_still_run():
    model = prfl_fast.patch(wan.tiny_wan())
    seen = []
    model.blocks[0].ffn.net[0].proj.register_forward_hook(lambda *_: seen.append(1))
    wan.run(model, *wan.inputs())
    assert seen


def test_block_called_with_diffusers_own_rotary_tables():
    model, plain = prfl_fast.patch(wan.tiny_wan()), wan.tiny_wan()
    args = (torch.randn(1, 6, 48), torch.randn(1, 7, 48), torch.randn(1, 6, 48))
    rotary = plain.rope(torch.zeros(1, 16, 1, 4, 6))
    assert torch.equal(model.blocks[0](*args, rotary), plain.blocks[0](*args, rotary))


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend):
    model = prfl_fast.patch(wan.tiny_wan(layers=1))
    out, gradients = wan.run(model, *wan.inputs())
    model.blocks[0].compile(fullgraph=True, backend=backend)
    compiled_out, compiled = wan.run(model, *wan.inputs())
    assert torch.allclose(out, compiled_out, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        same = gradient is None or torch.allclose(gradient, compiled[name], rtol=1e-4, atol=1e-5)
        assert same, name


def test_frozen_model_gives_only_the_input_gradient():
    model = prfl_fast.patch(wan.tiny_wan()).requires_grad_(False)
    x, timestep, conditions = wan.inputs()
    x.requires_grad_()
    (out,) = model(x, timestep, conditions["encoder_hidden_states"], return_dict=False)
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def test_unknown_model_is_a_type_error_that_lists_what_is_supported():
    for function, model, message in (
        (
            prfl_fast.patch,
            nn.Linear(2, 2),
            "Linear.*a supported class: diffusers WanTransformer3DModel",
        ),
        (prfl_fast.unpatch, nn.Linear(2, 2), "supported"),
        (prfl_fast.is_patched, nn.Linear(2, 2), "supported"),
        (prfl_fast.patch, "wan", "supported"),
    ):
        with pytest.raises(TypeError, match=message):
            function(model)


def test_refuses_what_it_would_break():
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Sage(WanAttnProcessor):
        pass

    model = wan.tiny_wan()
    model.blocks[1].attn1.set_processor(Sage())
    message = r"attention processor of blocks\.1\.attn1 is 'Sage', expected WanAttn"
    with pytest.raises(ValueError, match=message):
        prfl_fast.patch(model)
    assert "forward" not in model.blocks[0].__dict__, "nothing may be half patched"
    model = wan.tiny_wan()
    model.blocks[0].forward = types.MethodType(lambda self, *a: None, model.blocks[0])
    with pytest.raises(ValueError, match="a replaced forward"):
        prfl_fast.patch(model)
