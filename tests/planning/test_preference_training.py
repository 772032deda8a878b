"""The planner's simulation of Flow-DPO, against the real objective."""

from dataclasses import replace

import pytest
import torch
from plans import RATES, SMALL, ledger_of, prepared, small_workload
from tiers import slow_except

from prfl_fast.data.dataset import Batch, PairBatch
from prfl_fast.memory import stream as streaming
from prfl_fast.memory.ledger import Ledger
from prfl_fast.memory.optimizers import make_optimizer, state_bytes
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning import planner
from prfl_fast.planning import search as plan_search
from prfl_fast.planning.built_models import build, frozen_copy, stream_models
from prfl_fast.planning.report import table
from prfl_fast.planning.search import MODES, Search, Tier, step_seconds
from prfl_fast.planning.simulation import simulate
from prfl_fast.planning.workload import Workload
from prfl_fast.training.objectives import FlowDPO

CONFIG = {**SMALL, "num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}
SIZE = {"frames": 9, "height": 256, "width": 256, "text_tokens": 32, "reward_blocks": 2}
WORK = Workload(CONFIG, **SIZE, precision="fp32", sft=False, dpo=True, num_inference_steps=6)
FROZEN = {
    f"{dtype} {mode} {offload}{' streamed' * bool(ahead)}": MemoryConfig(
        dtype, mode, offload, 256 if offload else None, stream_weights=ahead
    )
    for dtype, mode, offload, ahead in (
        ("fp32", "none", None, None),
        ("fp32", "none", "cpu", None),
        ("fp32", "attention", None, None),
        ("fp32", "attention", "cpu", None),
        ("fp32", "full", None, None),
        ("fp32", "full", "cpu", None),
        ("bf16", "full", None, None),
        ("bf16", "none", None, 1),
        ("fp32", "attention", "cpu", 1),
        ("bf16", "full", None, 1),
    )
}
CASES = {f"lora, {name}": (replace(WORK, train="lora"), 2 * (m,)) for name, m in FROZEN.items()}
for name, frozen in FROZEN.items():
    own = replace(frozen, optimizer="adamw-cpu" if frozen.stream_weights else "adamw8bit")
    CASES[f"full, {name}"] = replace(WORK, train="full"), (own, frozen)
QUICK = ("lora, fp32 full None", "full, fp32 attention cpu streamed")


def counted(work, memory, frozen):
    """Return the device bytes at the peak of real micro-batches, without the optimizer's step."""
    generator, rewards = prepared(*build(work, memory, frozen))
    stream_models(generator, rewards, memory, frozen)
    reference, kind = frozen_copy(work, memory), memory.optimizer
    parameters = [p for p in generator.parameters() if p.requires_grad]
    make_optimizer(kind, parameters, learning_rate=1e-5)

    def batch():
        text = torch.randn(work.batch_size, work.text_tokens, CONFIG["text_dim"])
        labels = [{}] * work.batch_size
        return Batch(torch.randn(work.latent_shape), {"encoder_hidden_states": text}, labels)

    pair, models = PairBatch(batch(), batch()), [generator, *rewards]
    models += [] if reference is None else [reference]
    dpo = FlowDPO(generator, [pair] * 2, reference=reference)
    held = [tensor for side in pair for tensor in (side.latents, *side.conditions.values())]
    for model in models:
        held += [*model.parameters(), *model.buffers()]
    waiting = set()
    if memory.stream_weights is not None:
        bases = (generator, *(reward.backbone for reward in rewards))
        streamed = [weights for base in bases for weights in streaming.waiting_weights(base)]
        waiting = {id(p) for weights in streamed for p in weights.parameters()}
        held += [slot.memory for slot in streamed[0].slots.order]
    before = sum(state_bytes(kind, p.shape, p.dtype)[0] for p in parameters)
    before += sum(tensor.nbytes for tensor in held if id(tensor) not in waiting)
    with Ledger(open_operations=True) as ledger:
        for draw in range(work.gradient_accumulation_steps):
            dpo(draw, torch.Generator().manual_seed(0), 1.0)
    return before + ledger.peak


@pytest.mark.parametrize("name", slow_except(CASES, QUICK))
def test_predicted_bytes_are_those_counted(name):
    several = {"gradient_accumulation_steps": 2, "batch_size": 2}
    work, memory = CASES[name]
    work = replace(work, **(several if memory[0].activation_checkpointing == "full" else {}))
    predicted = ledger_of(work, memory, fake=True)
    peak = max(sum(live.values()) for phase, live in predicted.timeline if phase[:3] == "dpo")
    real = counted(work, *memory)
    print(f"{name}: predicted {peak}, counted {real}, {peak / real - 1:+.2%}")
    assert abs(peak - real) <= 0.01 * real


@pytest.mark.parametrize("name", slow_except(CASES, QUICK[1:]))
def test_repeated_blocks_are_those_of_the_whole_model(name):
    work, memory = CASES[name]
    deep = replace(work, model={**CONFIG, "num_layers": 8})
    found, expected = (simulate(deep, *memory, whole=whole) for whole in (False, True))
    assert found == expected

    def sizes(run):
        return [(phase, kind, *rest) for phase, e in run.events for kind, _, *rest in e]

    assert sizes(found) == sizes(expected)


def test_work_and_weights_of_a_pair():
    frozen = MemoryConfig("bf16", "full")
    in_full = replace(WORK, train="full")
    runs = {
        train: simulate(replace(WORK, train=train), frozen, frozen) for train in ("lora", "full")
    }
    for run in runs.values():
        costs = run.costs
        assert costs["dpo forward"].flops == 2 * costs["forward"].flops
        assert costs["dpo backward"].flops == 2 * costs["backward"].flops
    assert runs["full"].costs["dpo reference"].flops == 2 * runs["full"].costs["rollout"].flops
    lora = runs["lora"].costs  # whose adapters are off in the reference
    assert 0 < lora["dpo reference"].flops < 2 * lora["rollout"].flops
    assert runs["lora"].categories["reference"] == 0
    copy = frozen_copy(in_full, frozen)
    tensors = [*copy.parameters(), *copy.buffers()]
    size = sum(tensor.nbytes for tensor in tensors)
    assert {live["reference"] for _, live in runs["full"].timeline} == {size}
    assert not any(parameter.requires_grad for parameter in copy.parameters())


def test_simulated_supervised_steps_have_the_same_time():
    """A search leaves them out of its simulations."""
    memory = 2 * (MemoryConfig("bf16", "full"),)
    work = replace(WORK, sft=True)
    whole, short = (
        step_seconds(simulate(each, *memory).costs, RATES, work)
        for each in (work, replace(work, sft=False))
    )
    alone = replace(work, sft=False, dpo=False)
    once = step_seconds(simulate(alone, *memory).costs, RATES, alone)
    assert whole == pytest.approx(short, rel=0.02)
    assert whole["optimizer"] == pytest.approx(3 * once["optimizer"])
    twice = replace(work, gradient_accumulation_steps=2)
    several = step_seconds(simulate(work, *memory).costs, RATES, twice)
    for phase in ("dpo reference", "dpo forward", "dpo backward"):
        assert several[phase] == 2 * whole[phase] > 0


@pytest.mark.slow
@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("ahead", [None, 1])
@pytest.mark.parametrize("reward", [MODES[0], MODES[-1]], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_every_prediction_is_what_full_depth_says(mode, reward, ahead, train):
    work = small_workload(sft=False, dpo=True, train=train)
    optimizer = "adamw" if train == "lora" else "adamw-cpu" if ahead else "adamw8bit"
    search = Search(work, RATES, budget=1 << 40, host_budget=None)
    predicted = search._candidate(Tier("bf16", optimizer, ahead), mode, reward, None)
    run = simulate(work, predicted.memory, predicted.reward_memory)
    # The gradients of all weights grow while blocks come back, at other moments than predicted.
    rel = 2e-3 if train == "lora" else 0.015
    assert predicted.peak == pytest.approx(run.peak, rel=rel)
    assert predicted.seconds == pytest.approx(search._seconds(run.costs), rel=2e-3)
    assert predicted.host == pytest.approx(run.host, rel=max(rel, 0.01))


@pytest.mark.slow
def test_a_copy_of_two_experts_waits_in_host_memory_too():
    config = CONFIG | {"boundary_ratio": 0.875}
    frozen = MemoryConfig("bf16", "full")
    work = replace(WORK, model=config, train="full", expert="low")
    with_copy, without = (
        simulate(each, frozen, frozen) for each in (work, replace(work, dpo=False))
    )
    copy = with_copy.categories["reference"]
    assert copy <= with_copy.host - without.host <= 1.5 * copy
    assert with_copy.costs["swap in"] == without.costs["swap in"]


def test_a_plan_of_preferences(monkeypatch):
    monkeypatch.setattr(plan_search, "MODES", plan_search.MODES[::4])
    work = replace(WORK, precision="bf16", train="full")
    plan = planner.plan_memory(work, budget="8GiB", optimizer="adamw8bit")
    assert plan.feasible and plan.peak_phase == "dpo backward"
    text = table(plan)
    assert "reward of 2 blocks, then a Flow-DPO step" in text
    assert "frozen copy of the model, for dpo" in text and "  dpo reference " in text
    # Without checkpointing the pair does not fit, but the same step without it does.
    other = planner.plan_memory(replace(work, dpo=False), budget="8GiB", optimizer="adamw8bit")
    budget = plan_search.CONTEXT + (plan.peak + other.peak) // 2
    less = planner.plan_memory(work, budget=budget, optimizer="adamw8bit")
    assert other.memory.activation_checkpointing == "none" and less.feasible
    assert less.memory.activation_checkpointing == "full"


def test_a_reward_model_has_no_preferences_of_a_generator():
    with pytest.raises(ValueError, match="dpo is True, expected False with reward_loss"):
        replace(WORK, reward_loss="bt")
