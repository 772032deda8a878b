"""A memory policy put into effect: the same step under every one, and weights where they belong."""

import copy
import dataclasses
import sys

import pytest
import torch
from wan import inputs, tiny_wan

import prfl_fast.memory
from prfl_fast._extras import MissingExtra
from prfl_fast.config import Memory, RewardMemory
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.memory import apply_memory, check_available
from prfl_fast.patching import patch
from prfl_fast.quantised import QuantisedLinear
from prfl_fast.reward import LatentRewardModel
from prfl_fast.schedulers import FlowUniPC
from prfl_fast.step import PRFL
from prfl_fast.trainer import add_lora

# Every value of what may change between runs, in few combinations.
SAME_NUMBERS = {
    "full": {"policy": "full", "reward_policy": "attention"},
    "attention": {"policy": "attention", "reward_policy": "full"},
    "offload": {"offload": "cpu", "reward_offload": "cpu"},
    "full, offload": {"policy": "full", "offload": "cpu", "reward_policy": "full"},
    "attention, offload": {
        "policy": "attention",
        "offload": "cpu",
        "reward_policy": "attention",
        "reward_offload": "cpu",
    },
}


def models(layers=3, **options):
    torch.manual_seed(0)
    transformer = tiny_wan(layers=layers, **options)
    reward = LatentRewardModel.from_backbone(transformer, num_blocks=2, num_heads=2).freeze()
    return transformer, reward


def gradients(transformer, reward):
    """Gradients of a PRFL step at the second of three solver steps, and its reward."""
    noise, _, conditions = inputs("t2v", batch=1)
    step = PRFL(transformer, reward, FlowUniPC(shift=5.0), GradientPlan.prfl(), num_steps=3)
    out = step(noise, conditions, generator=torch.Generator().manual_seed(0))
    found = {n: p.grad for n, p in transformer.named_parameters() if p.grad is not None}
    transformer.zero_grad(set_to_none=True)
    return out.rewards, found


@pytest.mark.parametrize("patched", [True, False])
def test_what_may_change_between_runs_gives_the_same_bits(patched):
    transformer, reward = models()
    if patched:
        patch(transformer), patch(reward.backbone)
    expected = gradients(transformer, reward)
    assert len(expected[1]) > 50
    for changes in SAME_NUMBERS.values():
        apply_memory(transformer, reward, Memory(**changes))
        score, found = gradients(transformer, reward)
        assert torch.equal(score, expected[0])
        assert found.keys() == expected[1].keys()
        assert all(torch.equal(found[name], expected[1][name]) for name in found), changes
    apply_memory(transformer, reward, Memory(policy="full", feed_forward_chunk=5))
    _, found = gradients(transformer, reward)
    for name, gradient in found.items():  # another order of sums in the chunks' products
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-6)
    apply_memory(transformer, reward, Memory())
    _, found = gradients(transformer, reward)
    assert all(torch.equal(found[name], expected[1][name]) for name in found)


def test_policies_are_each_models_own():
    transformer, reward = models()
    both = (*transformer.parameters(), *reward.parameters())
    weights = {p.untyped_storage().data_ptr() for p in both}

    def kept(call):
        """Numbers that a forward keeps for its backward, weights not counted."""
        sizes = []

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            call()
        return sum(sizes)

    x, timestep, conditions = inputs("t2v", batch=1)
    x.requires_grad_()
    found = {}
    for name, memory in {
        "none": Memory(),
        "generator": Memory(policy="full"),
        "reward": Memory(reward_policy="full"),
        "both": Memory(policy="full", reward_policy="full"),
    }.items():
        apply_memory(transformer, reward, memory)
        found[name] = [
            kept(lambda: transformer(x, timestep, **conditions)),
            kept(lambda: reward(x, timestep, conditions)),
        ]
    assert found["generator"][0] < found["none"][0] / 4
    assert found["reward"][1] < found["none"][1] / 2
    assert found["generator"][1] == found["none"][1] and found["reward"][0] == found["none"][0]
    assert found["both"] == [found["generator"][0], found["reward"][1]]


@pytest.mark.parametrize("kind", ["bf16", "fp8", "nf4"])
def test_weights_of_both_models(kind):
    transformer, reward = models()
    apply_memory(transformer, reward, Memory(weights=kind, reward_weights="bf16"), device="cpu")
    block = transformer.blocks[0]
    quantised = isinstance(block.ffn.net[2], QuantisedLinear)
    assert quantised == (kind != "bf16")
    assert block.scale_shift_table.dtype == block.norm2.weight.dtype == torch.float32
    assert transformer.patch_embedding.weight.dtype == torch.bfloat16
    assert reward.backbone.blocks[0].ffn.net[2].weight.dtype == torch.bfloat16
    assert reward.pool.queries.dtype == reward.head.fc1.weight.dtype == torch.float32
    add_lora(transformer, 2)
    patch(transformer), patch(reward.backbone)
    _, found = gradients(transformer, reward)
    assert len(found) == 2 * 8 * 3 and all("lora" in name for name in found)
    assert all(torch.isfinite(g).all() for g in found.values())
    assert any(g.abs().max() > 0 for g in found.values())


def test_narrow_weights_move_the_gradient_little():
    """Against float32: bfloat16 least, 4 bits most, all of them in the same direction."""
    flat = {}
    transformer, reward = models(heads=4, head_dim=32)
    for kind in ("fp32", "bf16", "fp8", "nf4"):
        model, judge = copy.deepcopy(transformer), copy.deepcopy(reward)
        apply_memory(model, judge, Memory(weights=kind, reward_weights=kind))
        torch.manual_seed(1)
        add_lora(model, 2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        _, found = gradients(model, judge)
        flat[kind] = torch.cat([g.flatten().double() for g in found.values()])
    cosines = {kind: torch.cosine_similarity(flat[kind], flat["fp32"], 0) for kind in flat}
    assert cosines["bf16"] > 0.99 and cosines["fp8"] > 0.98 and cosines["nf4"] > 0.8


def test_either_model_alone(monkeypatch):
    transformer, reward = models(layers=2)
    apply_memory(None, reward, Memory(reward_weights="bf16", policy="full"))
    assert reward.backbone.patch_embedding.weight.dtype == torch.bfloat16
    assert transformer.patch_embedding.weight.dtype == torch.float32
    apply_memory(transformer, None, Memory(weights="bf16"))
    assert transformer.patch_embedding.weight.dtype == torch.bfloat16
    calls = []
    monkeypatch.setattr(
        prfl_fast.memory, "cast_weights", lambda *call, device: calls.append((*call, device))
    )
    memory = Memory(weights="nf4", reward_weights="fp8")
    apply_memory(transformer, reward, memory, device="meta")
    assert calls == [(transformer, "nf4", "meta"), (reward.backbone, "fp8", "meta")]
    assert reward.pool.queries.is_meta and reward.head.fc1.weight.is_meta


def test_a_model_of_no_known_family_is_refused():
    with pytest.raises(TypeError, match="prfl_fast does not know"):
        apply_memory(torch.nn.Linear(2, 2), None, Memory())


@pytest.mark.parametrize("memory", [Memory(), RewardMemory()])
def test_what_this_machine_cannot_do(memory, monkeypatch):
    check_available(memory, torch.device("cpu"))
    with pytest.raises(ValueError, match="memory.optimizer is paged-adamw8bit, which needs a CUDA"):
        changed = dataclasses.replace(memory, optimizer="paged-adamw8bit")
        check_available(changed, torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"torchao is not installed.*prfl_fast\[optim\]"):
        check_available(dataclasses.replace(memory, optimizer="adamw8bit"), torch.device("cpu"))
    if isinstance(memory, Memory):
        with pytest.raises(MissingExtra, match=r"bitsandbytes is not installed.*\[nf4\]"):
            check_available(Memory(reward_weights="nf4"), torch.device("cpu"))
