"""Models whose blocks train in FP8: layers, gradients, memory policies, rollouts, refusals."""

import copy

import prfl_world
import pytest
import tiny_families
import torch
import wan
from offload_models import assert_same, fill_adapters
from op_checks import RecordedCalls
from runs import samples
from torch import nn

from prfl_fast import FlowUniPC, MemoryConfig, RolloutConfig, apply_memory, patch
from prfl_fast.data.manifest import write_dataset
from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.memory.quantized import quantize
from prfl_fast.models import block_autograd, fp8_blocks, use_fp8_linears
from prfl_fast.models.experts import Experts
from prfl_fast.models.fp8_linear import Fp8Linear
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout import Sampler, Trajectory
from prfl_fast.sampling.compare import record_velocities, rewards_by_timestep, velocity_drift
from prfl_fast.sampling.methods import make_method
from prfl_fast.training.evaluation import GeneratorEvaluator
from prfl_fast.training.lora import add_lora, merge_lora
from prfl_fast.utils.io import load_tensors

FAMILIES = ("hunyuan", "ltx", "mochi", "wan")
LAYERS = 3


def build(lora=False, patched=True, fp8=True, case="t2v"):
    model = wan.tiny_wan(case, layers=LAYERS)
    if lora:
        torch.manual_seed(0)
        add_lora(model, 2)
        fill_adapters(model)
    if patched:
        patch(model)
    return use_fp8_linears(model, fp8)


def run(model, case="t2v"):
    """Return the output, and the gradients of inputs and parameters as one vector."""
    out, gradients = wan.run(model, *wan.inputs(case, size=(2, 4, 4)))
    found = [g.flatten() for _, g in sorted(gradients.items()) if g is not None]
    return out, torch.cat(found)


def distance(out, wanted):
    return float((out - wanted).norm() / wanted.norm())


def converted(model):
    return {name for name, m in model.named_modules() if type(m) is Fp8Linear}


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_of_attention_and_feed_forward_are_converted(family):
    model = wan.tiny_wan("i2v") if family == "wan" else tiny_families.tiny(family)
    before = {name: type(m) for name, m in model.named_modules()}
    names, values = list(model.state_dict()), list(model.parameters())
    assert use_fp8_linears(model) is model
    found = converted(model)
    # Layers of norms make the modulation.
    blocks = ("blocks.", "transformer_blocks.", "single_transformer_blocks.")
    expected = {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
        and name.startswith(blocks)
        and ".norm" not in name
        and m.in_features % 16 == m.out_features % 16 == 0
    }
    assert found == expected
    assert {name.rpartition("blocks.")[2].split(".")[1] for name in found} >= {
        "hunyuan": {"attn", "ff", "ff_context", "proj_mlp", "proj_out"},
        "wan": {"attn1", "attn2", "ffn"},
        "ltx": {"attn1", "attn2", "ff"},
        "mochi": {"attn1", "ff"},
    }[family]
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), values, strict=True))
    use_fp8_linears(model, False)
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_layers_of_modulation_and_gates_stay_exact():
    names = ("adaLN_modulation", "img_mod", "to_gate_logits", "norm1_context", "fc1")
    block = nn.ModuleDict({name: nn.Linear(16, 16) for name in names})
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    assert converted(use_fp8_linears(model)) == {"blocks.0.fc1"}


@pytest.mark.cases(2)
@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_gradients_are_near_the_exact_ones(lora, patched):
    model = build(lora, patched)
    out, gradient = run(model)
    exact_out, exact = run(build(lora, patched, fp8=False))
    assert 1e-4 < distance(out, exact_out) < 0.05
    assert 1e-3 < distance(gradient, exact) < 0.06
    assert torch.cosine_similarity(gradient, exact, 0) > 0.998
    assert_same(run(use_fp8_linears(model, False)), (exact_out, exact))  # nothing is left


@pytest.mark.parametrize("lora", [True, False])
def test_projections_of_one_input_quantize_it_once_with_the_same_bits(lora, monkeypatch):
    def counted(precision):
        model = build(lora)
        context = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with RecordedCalls() as recorded, torch.no_grad(), context:
            out = model(*inputs, return_dict=False)[0]
        return out, len(recorded.of("quantize_fp8"))

    x, timestep, conditions = wan.inputs(size=(2, 4, 4))
    inputs = x, timestep, conditions["encoder_hidden_states"]
    for precision in ("fp32", "bf16"):
        found, count = counted(precision)
        with monkeypatch.context() as patched:
            patched.setattr(block_autograd, "shared_rows", lambda x, layers: None)
            wanted, separate = counted(precision)
        assert torch.equal(found, wanted)
        # Inputs and weights of 10 layers: q, k and v share an input, and k and v of the text.
        assert (count, separate) == (LAYERS * (10 + 7), LAYERS * (10 + 10))


def test_lora_is_the_same_before_and_after_and_its_base_stays_frozen():
    before = build(lora=True)
    after = build()
    torch.manual_seed(0)
    add_lora(after, 2)
    fill_adapters(after)
    assert_same(run(before), run(after))
    bases = [m.base_layer for m in before.modules() if hasattr(m, "base_layer")]
    assert bases and all(type(base) is Fp8Linear for base in bases)
    assert all(base.weight.grad is None and base.bias.grad is None for base in bases)
    assert not [name for name in converted(before) if "lora_" in name]
    plain = build(lora=True, fp8=False)
    for model in (before, plain):
        merge_lora(model)
    assert_same(before.state_dict(), plain.state_dict())
    assert list(before.state_dict()) == list(plain.state_dict())


@pytest.mark.cases(1)
@pytest.mark.parametrize("lora", [True, False])
def test_memory_policies_change_no_bit(lora):
    wanted = run(build(lora))
    for mode, offload in (("full", None), ("attention", "cpu"), ("none", "cpu")):
        assert_same(run(activation_checkpointing(build(lora), mode, offload)), wanted)
        model = use_fp8_linears(wan.tiny_wan(layers=LAYERS))
        apply_memory(patch(model), MemoryConfig("fp32", mode, offload, stream_weights=1))
        if lora:
            torch.manual_seed(0)
            add_lora(model, 2)
            fill_adapters(model)
        assert_same(run(model), wanted)


def test_chunks_of_the_feed_forward_change_weight_gradients_by_their_order_only():
    model = build()
    out, gradient = run(model)
    apply_memory(model, MemoryConfig(feed_forward_chunk=3))
    again, chunked = run(model)
    assert_same(again, out)
    torch.testing.assert_close(chunked, gradient, rtol=1e-4, atol=1e-4)


ROLLOUTS = {
    "no engine": None,
    "caches": RolloutConfig(compile="off"),
    "without caches": RolloutConfig(cache=False, compile="off"),
    "merged": RolloutConfig(merge_lora=True, compile="off"),
    "FP8": RolloutConfig(fp8_linears=(0.0, 1.0), compile="off"),
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_do_not_depend_on_it(name):
    results, velocities = [], []
    for fp8 in (True, False):
        model = prfl_world.with_lora(prfl_world.make_wan()).float()
        use_fp8_linears(patch(model), fp8)
        conditions = {k: v.float() for k, v in prfl_world.TEXT.items()}
        sampler = Sampler(model, FlowUniPC(), 4, rollout=ROLLOUTS[name])
        trajectory = Trajectory(sampler, prfl_world.NOISE.float(), conditions)
        trajectory.run(3)
        results.append((trajectory.x, trajectory.drift))
        velocities.append(trajectory.velocity().detach())
    assert_same(*results)
    assert 1e-4 < distance(*velocities) < 0.05


def judged(fp8):
    """Return a sampler and a reward of the model's own blocks, with noise and text."""
    model = use_fp8_linears(patch(wan.tiny_wan(layers=1)), fp8)
    reward = LatentRewardModel.from_backbone(model, 1, num_heads=2).freeze()
    assert bool(converted(reward)) == bool(converted(model)) == fp8
    x, _, text = wan.inputs(batch=1, size=(2, 4, 4))
    return Sampler(model.requires_grad_(False), FlowUniPC(), 3), reward, x, text


SEARCHES = {
    "prune": {"candidates": 2, "keep": {0: 1}, "reward_at": "clean"},
    "beam": {"beams": 1, "candidates": 2},
    "reno": {"iterations": 2},
    "guide": {"weight": 5.0},
}


@pytest.mark.parametrize("name", SEARCHES)
def test_samples_chosen_by_a_reward_do_not_depend_on_it(name):
    method = make_method(name, SEARCHES[name], 3)
    found = [method.run(*judged(fp8), torch.Generator().manual_seed(0)) for fp8 in (True, False)]
    (latents, scores, _), (exact, exact_scores, _) = found
    # Blocks with such layers sum the gradients of reno in another order.
    torch.testing.assert_close(latents, exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, exact_scores, rtol=1e-5, atol=1e-5)


def test_measurements_of_a_generator_do_not_depend_on_it(tmp_path):
    dataset, figures = write_dataset(tmp_path / "data", samples(1, size=(2, 4, 4))), []
    for fp8 in (True, False):
        sampler, reward, x, text = judged(fp8)
        file = tmp_path / f"{fp8}.safetensors"
        record_velocities(sampler, x, text, file)
        assert set(velocity_drift(sampler, text, tmp_path / "True.safetensors").values()) == {0.0}
        scores = rewards_by_timestep(reward, x, text, 2 * x, [(0.5, 500.0)])
        evaluation = GeneratorEvaluator(sampler, {"r": reward}, dataset)().figures
        figures.append((load_tensors(file), scores, evaluation))
    assert_same(*figures)


def test_both_experts_are_converted():
    model = Experts(wan.tiny_wan(), wan.tiny_wan(), 0.5)
    names = converted(use_fp8_linears(model))
    assert {name.partition(".")[0] for name in names} == {"high", "low"}


def test_a_copy_and_a_loaded_state_keep_the_layers(tmp_path):
    model, other = build(), build()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.save(build(fp8=False).state_dict(), tmp_path / "model.pt")  # of a run without FP8
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    wanted = run(model)
    assert_same(run(other), wanted)
    assert_same(run(copy.deepcopy(model)), wanted)


@pytest.mark.slow
def test_compiled_blocks_are_near_eager_ones():
    model = build(lora=True)
    out, gradient = run(model)
    model.blocks[1].compile(backend="aot_eager", fullgraph=True)
    again, compiled = run(model)
    # Other roundings before a quantization move some numbers by one of its steps.
    assert distance(again, out) < 0.02 and distance(compiled, gradient) < 0.02


def test_quantized_weights_and_fp8_products_exclude_each_other():
    with pytest.raises(ValueError, match=r"blocks.0.attn1.to_q is a QuantizedLinear .* bf16"):
        use_fp8_linears(quantize(wan.tiny_wan(), "fp8"))
    with pytest.raises(ValueError, match=r"blocks.0.attn1.to_q has hooks, .*FP8 products"):
        quantize(use_fp8_linears(wan.tiny_wan()), "fp8")


def test_models_that_cannot_be_converted_are_unchanged():
    with pytest.raises(ValueError, match="rows and columns in multiples of 16"):
        use_fp8_linears(wan.tiny_wan(heads=1, head_dim=12))
    model = wan.tiny_wan()
    model.blocks[1].ffn.net[2].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"blocks.1.ffn.net.2 is a Linear with hooks"):
        use_fp8_linears(model)
    assert not converted(model)


def test_a_gpu_without_fp8_products_is_refused(monkeypatch):
    monkeypatch.setattr(fp8_blocks, "unsupported_reason", lambda device: "capability 8.0 has none")
    with pytest.raises(ValueError, match="hardware.device is on cuda:0: capability 8.0 .* 8.9"):
        fp8_blocks.check_fp8_linears(torch.device("cuda:0"), "hardware.device")
    fp8_blocks.check_fp8_linears(torch.device("cpu"))
    monkeypatch.setattr(fp8_blocks, "unsupported_reason", lambda device: "")
    fp8_blocks.check_fp8_linears(torch.device("cuda:0"))
