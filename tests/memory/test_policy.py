"""A memory policy put into effect: the same step under every one, and weights where they belong."""

import copy
import sys

import pytest
import torch
from harness import saved_bytes
from offload_models import assert_same, fill_adapters
from offload_models import gradients as gradients_left
from wan import inputs, tiny_wan

import prfl_fast.memory.policy
from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory.policy import MemoryConfig, apply_memory, check_available, check_compatible
from prfl_fast.memory.quantized import QuantizedLinear
from prfl_fast.models.registry import patch
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.training.lora import add_lora
from prfl_fast.utils.optional import MissingExtraError

# Every value of what may change between runs, in few combinations.
SAME_NUMBERS = {  # (checkpointing, offload) of generator and reward
    "full": (("full", None), ("attention", None)),
    "attention": (("attention", None), ("full", None)),
    "offload": (("none", "cpu"), ("none", "cpu")),
    "full, offload": (("full", "cpu"), ("full", None)),
    "attention, offload": (("attention", "cpu"), ("attention", "cpu")),
}


def models(layers=3, **options):
    torch.manual_seed(0)
    transformer = tiny_wan(layers=layers, **options)
    reward = LatentRewardModel.from_backbone(transformer, num_blocks=2, num_heads=2).freeze()
    return transformer, reward


def gradients(transformer, reward):
    """Gradients of a PRFL step at the second of three solver steps, and its reward."""
    noise, _, conditions = inputs("t2v", batch=1)
    step = PRFL(
        transformer, reward, FlowUniPC(shift=5.0), GradientPlan.prfl(), num_inference_steps=3
    )
    out = step(noise, conditions, generator=torch.Generator().manual_seed(0))
    return out.rewards, gradients_left(transformer)


def apply_both(transformer, reward, config, reward_config=None):
    apply_memory(transformer, config)
    apply_memory(reward, reward_config or config)


@pytest.mark.cases(1)
@pytest.mark.parametrize("patched", [True, False])
def test_what_may_change_between_runs_gives_the_same_bits(patched):
    transformer, reward = models()
    if patched:
        patch(transformer), patch(reward.backbone)
    expected = gradients(transformer, reward)
    assert len(expected[1]) > 50
    for changes in SAME_NUMBERS.values():
        apply_both(transformer, reward, *(MemoryConfig("fp32", *policy) for policy in changes))
        assert_same(gradients(transformer, reward), expected)
    apply_both(transformer, reward, MemoryConfig("fp32", "full", feed_forward_chunk=5))
    _, found = gradients(transformer, reward)
    # Another order of sums in the chunks' products.
    torch.testing.assert_close(found, expected[1], rtol=1e-4, atol=1e-6)
    apply_both(transformer, reward, MemoryConfig())
    assert_same(gradients(transformer, reward), expected)


def test_policies_are_each_models_own():
    transformer, reward = models()
    weights = [*transformer.parameters(), *reward.parameters()]
    x, timestep, conditions = inputs("t2v", batch=1)
    x.requires_grad_()
    found = {}
    for name, policies in {
        "none": ("none", "none"),
        "generator": ("full", "none"),
        "reward": ("none", "full"),
        "both": ("full", "full"),
    }.items():
        apply_both(transformer, reward, *(MemoryConfig("fp32", policy) for policy in policies))
        found[name] = [
            saved_bytes(lambda: transformer(x, timestep, **conditions), weights),
            saved_bytes(lambda: reward(x, timestep, conditions), weights),
        ]
    assert found["generator"][0] < found["none"][0] / 4
    assert found["reward"][1] < found["none"][1] / 2
    assert found["generator"][1] == found["none"][1] and found["reward"][0] == found["none"][0]
    assert found["both"] == [found["generator"][0], found["reward"][1]]


@pytest.mark.cases(1)
@pytest.mark.parametrize("kind", ["bf16", "fp8", "nf4"])
def test_weights_of_both_models(kind):
    transformer, reward = models()
    apply_memory(transformer, MemoryConfig(kind), device="cpu")
    apply_memory(reward, MemoryConfig("bf16"), device="cpu")
    block = transformer.blocks[0]
    quantized = isinstance(block.ffn.net[2], QuantizedLinear)
    assert quantized == (kind != "bf16")
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
        apply_both(model, judge, MemoryConfig(kind))
        torch.manual_seed(1)
        add_lora(model, 2)
        _, found = gradients(fill_adapters(model, std=0.01), judge)
        flat[kind] = torch.cat([g.flatten().double() for g in found.values()])
    cosines = {kind: torch.cosine_similarity(flat[kind], flat["fp32"], 0) for kind in flat}
    assert cosines["bf16"] > 0.99 and cosines["fp8"] > 0.98 and cosines["nf4"] > 0.8


def test_either_model_alone(monkeypatch):
    transformer, reward = models(layers=2)
    apply_memory(reward, MemoryConfig("bf16", "full"))
    assert reward.backbone.patch_embedding.weight.dtype == torch.bfloat16
    assert transformer.patch_embedding.weight.dtype == torch.float32
    apply_memory(transformer, MemoryConfig("bf16"))
    assert transformer.patch_embedding.weight.dtype == torch.bfloat16
    calls = []
    monkeypatch.setattr(
        prfl_fast.memory.policy,
        "cast_weights",
        lambda *call, device, stay: calls.append((*call, device)),
    )
    apply_memory(transformer, MemoryConfig("nf4"), device="meta")
    apply_memory(reward, MemoryConfig("fp8"), device="meta")
    assert calls == [(transformer, "nf4", "meta"), (reward.backbone, "fp8", "meta")]
    assert reward.pool.queries.is_meta and reward.head.fc1.weight.is_meta


def test_a_model_of_no_known_family_is_refused():
    with pytest.raises(TypeError, match="a supported class: diffusers WanTransformer3DModel"):
        apply_memory(torch.nn.Linear(2, 2), MemoryConfig())


def test_what_this_machine_cannot_do(monkeypatch):
    cpu = torch.device("cpu")
    check_available(MemoryConfig(), cpu)
    with pytest.raises(ValueError, match="optimizer is 'paged-adamw8bit', expected .* device cpu"):
        check_available(MemoryConfig(optimizer="paged-adamw8bit"), cpu)
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"torchao is not installed.*prfl_fast\[optim\]"):
        check_available(MemoryConfig(optimizer="adamw8bit"), cpu)
    with pytest.raises(MissingExtraError, match=r"bitsandbytes is not installed.*\[nf4\]"):
        check_available(MemoryConfig("nf4"), cpu)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_dtype", "int4"),
        ("activation_checkpointing", "ful"),
        ("offload", "gpu"),
        ("feed_forward_chunk", 0),
        ("feed_forward_chunk", True),
        ("optimizer", "adam"),
        ("gradient_dtype", "bf16"),
        ("stream_weights", 0),
    ],
)
def test_a_wrong_value_names_its_field(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}, expected"):
        MemoryConfig(**{field: value})


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (("bf16",), {"train": "full", "precision": "fp32"}, "set hardware.precision: bf16"),
        (("fp8",), {"train": None, "precision": "fp32"}, "set hardware.precision: bf16"),
        (("fp8",), {"train": "full"}, "'fp8', expected fp32 or bf16 without LoRA"),
        (("bf16", "none", None, None, "paged-adamw8bit"), {"train": "lora"}, "fp32 weights only"),
        (("fp32", "none", None, None, "adamw-sr"), {"train": None}, "none: the model is frozen"),
        (
            ("bf16", "full", None, None, "adamw", "parameter", 1),
            {"train": "full"},
            "Weights in host memory train with adamw-cpu",
        ),
    ],
)
def test_what_does_not_go_together(config, options, message):
    with pytest.raises(ValueError, match=message):
        check_compatible(MemoryConfig(*config), **options)
    check_compatible(MemoryConfig("nf4", "full", "cpu", 8, "adamw8bit", "fp32"), train="lora")
