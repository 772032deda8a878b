"""Streamed weights in whole steps: PRFL, rollouts, plans of several steps, experts, optimizers."""

import copy

import pytest
import torch
import wan
from offload_models import assert_same, fill_adapters, gradients, gradients_of_loss, loss
from streamed_models import (
    build,
    check_home,
    poison_released_slots,  # noqa: F401 - a fixture
    slots_of,
)

from prfl_fast.feedback.gradient_plan import GradientPlan
from prfl_fast.feedback.step import PRFL
from prfl_fast.memory import stream as streaming
from prfl_fast.memory.checkpointing import activation_checkpointing
from prfl_fast.memory.optimizers import make_optimizer
from prfl_fast.memory.policy import MemoryConfig, apply_memory
from prfl_fast.models.experts import Experts
from prfl_fast.models.registry import find_adapter, patch
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout.config import RolloutConfig
from prfl_fast.rollout.schedulers import FlowUniPC
from prfl_fast.training.lora import add_lora, merge_lora

pytest.importorskip("diffusers")

RESIDENT, STREAMED = MemoryConfig("fp32", "full"), MemoryConfig("fp32", "full", stream_weights=1)
PLANS = {
    "prfl": GradientPlan.prfl(points=2),
    "draft": GradientPlan.draft(2),
    "refl": GradientPlan.refl(),
}


def policies(mode, offload, ahead, dtype="fp32"):
    return MemoryConfig(dtype, mode, offload, stream_weights=ahead)


def world(config, *, lora=True, experts=False, is_patched=True):
    """Return a generator and a reward, a copy of its first blocks, under one policy."""
    torch.manual_seed(0)
    pair = [wan.tiny_wan(layers=3, heads=4, head_dim=32, seed=seed) for seed in range(1 + experts)]
    reward = LatentRewardModel.from_backbone(pair[0], num_blocks=2, num_heads=2).freeze()
    model = Experts(*pair, 0.9) if experts else pair[0]
    apply_memory(model, config)
    apply_memory(reward, config)
    if lora:
        torch.manual_seed(1)
        add_lora(model, 2)
        fill_adapters(model, std=0.05)
    if is_patched:
        patch(model), patch(reward.backbone)
    return model, reward


def prfl_step(model, reward, plan="prfl", rollout=None, **options):
    noise, _, conditions = wan.inputs("t2v", batch=1, size=(2, 4, 4))
    step = PRFL(
        model, reward, FlowUniPC(shift=5.0), PLANS[plan], num_inference_steps=4, rollout=rollout,
        **options,
    )  # fmt: skip
    out = step(noise, conditions, generator=torch.Generator().manual_seed(0))
    return out.rewards, out.latents, gradients(model)


def check_same_step(resident, streamed, *args, **options):
    """Check two steps of each; the second begins with the slots as the first left them."""
    for _ in range(2):
        expected, found = (prfl_step(*models, *args, **options) for models in (resident, streamed))
        assert len(expected[2]) > 10
        assert_same(found, expected)
    for part in wan_parts(streamed[0]):
        check_home(part)
    check_home(streamed[1].backbone)


def wan_parts(model):
    return (model.high, model.low) if isinstance(model, Experts) else (model,)


MODES = [("none", None), ("attention", "cpu"), ("full", None)]


@pytest.mark.cases(1)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("kind", ["lora", "full", "bf16", "fp8", "nf4"])
def test_steps_are_bit_identical(kind, plan, mode):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    dtype = "fp32" if kind in ("lora", "full") else kind
    models = [world(policies(*mode, ahead, dtype), lora=kind != "full") for ahead in (None, 1)]
    check_same_step(*models, plan)


ROLLOUTS = {
    "plain": RolloutConfig(cache=False),
    "merged": RolloutConfig(merge_lora=True),
    "fp8": RolloutConfig(fp8_linears=(0.0, 1.0)),
}


@pytest.mark.cases(1)
@pytest.mark.parametrize("rollout", ROLLOUTS)
@pytest.mark.parametrize("is_patched", [True, False], ids=["patched", "unpatched"])
def test_rollouts(rollout, is_patched):
    models = [world(config, is_patched=is_patched) for config in (RESIDENT, STREAMED)]
    check_same_step(*models, rollout=ROLLOUTS[rollout])


@pytest.mark.cases(1)
@pytest.mark.parametrize("plan", PLANS)
def test_two_experts_share_the_slots(plan):
    models = [world(config, experts=True) for config in (RESIDENT, STREAMED)]
    for model, _ in models if plan != "prfl" else ():  # the steps of these plans run one expert
        model.high.requires_grad_(False)
    high, low = models[1][0].high, models[1][0].low
    assert models[1][0].swap is None and slots_of(high) is slots_of(low)
    check_same_step(*models, plan)


def test_the_models_share_the_memory_of_their_blocks(monkeypatch):
    monkeypatch.setattr(streaming, "_slots", {})
    model, reward = world(STREAMED)
    slots = slots_of(model)
    assert slots is slots_of(reward.backbone) and len(slots.order) == 2
    largest = max(b.__dict__[streaming.STREAMED].host.nbytes for b in model.blocks)
    assert all(slot.memory.nbytes == largest for slot in slots.order)
    prfl_step(model, reward)
    assert len(slots.order) == 2


@pytest.mark.slow
def test_divergence_runs_without_adapters_inside_the_backward():
    models = [world(config) for config in (RESIDENT, STREAMED)]
    for plan in ("prfl", "draft"):
        check_same_step(*models, plan, divergence=0.1)


def mean_square(model, scale):
    x, timestep, conditions = wan.inputs(size=(2, 4, 4))
    return find_adapter(model).velocity(model, x * scale, timestep, conditions).square().mean()


@pytest.mark.cases(1)
@pytest.mark.parametrize("dtype,gradient_dtype", [("fp32", "parameter"), ("bf16", "fp32")])
@pytest.mark.parametrize("kind", ["adamw-cpu", "adamw"])
def test_training_all_weights(kind, dtype, gradient_dtype):
    """Three updates of two micro-batches each; gradients wait on the host between them."""
    found = []
    for ahead in (None, 1):
        config = MemoryConfig(dtype, "full", stream_weights=ahead)
        model = patch(wan.tiny_wan(layers=4))
        apply_memory(model, config)
        parameters = list(model.parameters())
        optimizer = make_optimizer(
            kind, parameters, learning_rate=1e-2, gradient_dtype=gradient_dtype
        )
        for _ in range(3):
            for scale in (1.0, 0.5):
                mean_square(model, scale).backward()
            if ahead:
                check_home(model)
                weights = model.blocks[1].__dict__[streaming.STREAMED]
                for p in weights.parameters():
                    buffer = weights._gradients._buffers[id(p)][0].untyped_storage()
                    assert p.grad.untyped_storage().data_ptr() == buffer.data_ptr()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        found.append([p.detach().clone() for p in parameters])
    assert_same(*found)
    assert not torch.equal(found[0][5], wan.tiny_wan(layers=4).state_dict().popitem()[1])


def test_a_gradient_that_is_still_read_keeps_its_memory():
    model = build(("full", None))
    first = gradients_of_loss(model)
    kept = {name: gradient.clone() for name, gradient in first.items()}
    loss(model, scale=2.0).backward()
    assert_same(first, kept)


@pytest.mark.cases(1)
@pytest.mark.parametrize("policy", MODES, ids=str)
def test_chunks_of_the_feed_forward(policy):
    for patched in (True, False):
        plain = gradients_of_loss(build(policy, None, patched=patched, feed_forward_chunk=3))
        model = build(policy, patched=patched, feed_forward_chunk=3)
        reads = watch_reads(model)
        assert_same(gradients_of_loss(model), plain)
        assert reads and all(reads)


def watch_reads(model):
    """Record whether the last linear layer of each feed-forward runs with its weights in a slot."""
    reads = []

    def check(layer, args):
        weights = layer.__dict__[streaming.STREAMED]
        here = weights.slot is not None and (
            layer.weight.untyped_storage().data_ptr()
            == weights.slot.memory.untyped_storage().data_ptr()
        )
        reads.append(here)

    for block in model.blocks:
        block.ffn.net[2].register_forward_pre_hook(check)
    return reads


def test_under_autocast_and_inference_mode():
    plain, model = build(("full", None), None), build(("none", None))
    with torch.inference_mode():
        assert_same(loss(model), loss(plain))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients_of_loss(model), gradients_of_loss(plain))
    assert_same(gradients_of_loss(model), gradients_of_loss(plain))


@pytest.mark.slow
@pytest.mark.parametrize("policy", MODES, ids=str)
def test_compiled_blocks(policy):
    torch.compiler.reset()
    plain, model = build(policy, None), build(policy)
    for each in (plain, model):
        for block in each.blocks:
            block.compile(backend="aot_eager")
    for _ in range(2):
        assert_same(gradients_of_loss(model), gradients_of_loss(plain))
    check_home(model)


@pytest.mark.slow
def test_model_compiled_whole():
    torch.compiler.reset()
    plain, model = build(("full", None), None), build(("full", None))
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients_of_loss(compiled)
    for name, gradient in gradients_of_loss(plain).items():
        torch.testing.assert_close(found[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-4)


def test_a_second_policy_replaces_the_first():
    model = build(("full", None), 2)
    plain = gradients_of_loss(build(("full", None), None))
    kind = type(model.blocks[0])
    apply_memory(model, MemoryConfig("fp32", "none", stream_weights=1))
    assert_same(gradients_of_loss(model), plain)
    activation_checkpointing(model, "full")
    assert_same(gradients_of_loss(model), plain)
    apply_memory(model, MemoryConfig())
    assert type(model.blocks[0]) is kind.__mro__[1]
    assert not any(streaming.STREAMED in module.__dict__ for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    assert_same(gradients_of_loss(model), plain)
    copy.deepcopy(model)


def test_changed_weights_are_copied_again():
    plain, model = build(("full", None), None), build(("full", None))
    with torch.no_grad():
        loss(model)
        state = {name: tensor + 0.1 for name, tensor in plain.state_dict().items()}
        for each in (plain, model):
            each.load_state_dict(state)
        assert_same(loss(model), loss(plain))


def test_adapters_are_merged_on_the_host():
    plain, model = (build(("full", None), ahead, lora=True) for ahead in (None, 1))
    with torch.no_grad():
        assert_same(loss(model), loss(plain))
        merge_lora(plain), merge_lora(model)
        assert_same(loss(model), loss(plain))
    check_home(model)


def test_what_is_refused():
    model = build()
    with pytest.raises(ValueError, match="cannot be copied or pickled. Copy the model before"):
        copy.deepcopy(model)
    model.disable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="not through prfl_fast's activation checkpointing"):
        loss(model)
    check_home(model)
    activation_checkpointing(model, "full").blocks.to("cpu", torch.float64)
    with pytest.raises(RuntimeError, match="moved or cast, .* Call apply_memory again"):
        loss(model)
