"""The planner's simulation of the training of a reward model, against the real objective."""

from dataclasses import replace

import pytest
import torch
from plans import RATES, SMALL, ledger_of, prepared
from tiers import slow_except

from prfl_fast.data.dataset import Batch, PairBatch
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.optimizers import make_optimizer, state_bytes
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning import planner
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.built_models import build, stream_models
from prfl_fast.planning.report import table
from prfl_fast.planning.search import Search, Tier
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.workload import Workload
from prfl_fast.training.objectives import RewardFit

CONFIG = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}
SIZE = {"frames": 9, "height": 256, "width": 256, "text_tokens": 32}
WORK = Workload(CONFIG, **SIZE, precision="fp32", sft=False, train="full", reward_loss="ce")
POLICIES = {
    "none": MemoryConfig(),
    "full": MemoryConfig("fp32", "full"),
    "offloaded": MemoryConfig("fp32", "attention", "cpu", 256),
    "bf16": MemoryConfig("bf16", "full", optimizer="adamw8bit"),
    "on the host": MemoryConfig("bf16", "attention", optimizer="adamw-cpu"),
}


def counted(work, memory):
    """Return the device bytes at the peak of real forwards and backwards."""
    (reward, _), kind = prepared(*build(work, memory, memory)), memory.optimizer
    stream_models(reward, [], memory, memory)
    parameters = [p for p in reward.parameters() if p.requires_grad]
    make_optimizer(kind, parameters, learning_rate=1e-5, gradient_dtype=memory.gradient_dtype)
    generator = torch.Generator().manual_seed(0)

    def batch():
        text = torch.randn(work.batch_size, work.text_tokens, CONFIG["text_dim"])
        labels = [{"motion_quality": 1}] * work.batch_size
        return Batch(torch.randn(work.latent_shape), {"encoder_hidden_states": text}, labels)

    data = batch() if work.reward_loss == "ce" else PairBatch(batch(), batch())
    fit = RewardFit(reward, [data] * 2, loss=work.reward_loss)
    batches = (data,) if work.reward_loss == "ce" else data
    held = [tensor for b in batches for tensor in (b.latents, *b.conditions.values())]
    held += [*reward.parameters(), *reward.buffers()]
    before = sum(state_bytes(kind, p.shape, p.dtype)[0] for p in parameters)
    before += sum(tensor.nbytes for tensor in held)
    with Ledger(open_operations=True) as ledger:
        for draw in range(work.gradient_accumulation_steps):
            fit(draw, generator, 1.0)
    return before + ledger.peak


@pytest.mark.cases(2)
@pytest.mark.parametrize("loss", ["ce", "bt"])
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("name", slow_except(POLICIES, ("offloaded",)))
def test_predicted_bytes_are_those_counted(name, train, loss):
    memory, several = POLICIES[name], {"gradient_accumulation_steps": 2, "batch_size": 2}
    options = several if name == "full" else {}
    if name == "bf16":  # of fewer tokens, the peak would be that of the 8-bit optimizer's step
        options = {"frames": 33, "height": 384, "width": 384}
    work = replace(WORK, train=train, reward_loss=loss, **options)
    predicted = ledger_of(work, (memory, memory), fake=True)
    real = counted(work, memory)
    print(f"predicted {predicted.peak}, counted {real}, {predicted.peak / real - 1:+.2%}")
    assert predicted.peak_phase != "optimizer"
    assert abs(predicted.peak - real) <= 0.01 * real
    assert not predicted.peak_categories["reward"]


@pytest.mark.cases(1)
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("loss", slow_except(("ce", "bt"), ("bt",)))
def test_repeated_blocks_are_those_of_the_whole_model(loss, train):
    deep = replace(WORK, model={**CONFIG, "num_layers": 7}, train=train, reward_loss=loss)
    memory = 2 * (POLICIES["offloaded"],)
    found, expected = (simulate(deep, *memory, whole=whole) for whole in (False, True))
    assert found == expected
    assert {*found.costs} == {"forward", "backward", "optimizer"}


@pytest.mark.slow
def test_a_pair_takes_two_forwards():
    single, pair = (
        simulate(replace(WORK, reward_loss=loss), *2 * (POLICIES["full"],)) for loss in ("ce", "bt")
    )
    for phase in ("forward", "backward"):
        assert pair.costs[phase].flops == 2 * single.costs[phase].flops
    assert pair.peak > single.peak
    assert pair.costs["optimizer"] == single.costs["optimizer"]


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 256])
@pytest.mark.parametrize("mode", plan_search.MODES, ids=str)
def test_every_prediction_is_what_full_depth_says(mode, chunk):
    deep = replace(WORK, model={**CONFIG, "num_layers": 6})
    search = Search(deep, RATES, budget=1 << 40, host_budget=None)
    predicted = search._candidate(Tier("bf16"), mode, plan_search.MODES[-1], chunk)
    run = simulate(deep, predicted.memory, predicted.reward_memory)
    assert predicted.memory == predicted.reward_memory
    assert predicted.peak == pytest.approx(run.peak, rel=0.01)
    assert predicted.host == pytest.approx(run.host, rel=0.01)


def test_a_plan_has_one_policy(monkeypatch):
    monkeypatch.setattr(plan_search, "MODES", plan_search.MODES[::4])
    plan = planner.plan_memory(replace(WORK, train="lora"), budget="8GiB")
    assert plan.feasible and plan.memory.activation_checkpointing == "none"
    assert {(c.memory.activation_checkpointing, c.memory.offload) for c in plan.candidates} == {
        ("none", None),
        ("full", "cpu"),
    }
    text = table(plan)
    assert "Reward model, loss ce: 3 blocks, LoRA rank 16" in text
    assert "generator" not in text and "reward model: bf16" in text
    assert max(map(len, text.splitlines())) <= 100
    with pytest.raises(ValueError, match="weight_dtype is 'fp8', expected auto or bf16 .* reward"):
        planner.plan_memory(WORK, weight_dtype="fp8")


def test_bad_workloads_of_reward_training():
    with pytest.raises(ValueError, match="sft is True, expected False with reward_loss"):
        replace(WORK, sft=True)
    with pytest.raises(ValueError, match="reward_loss is 'mse', expected one of None, 'ce', 'bt'"):
        replace(WORK, reward_loss="mse")
