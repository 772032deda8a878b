"""Two experts with a boundary: the sampler's steps, gradients, memory and training."""

import copy
import math

import pytest
import torch
from runs import samples
from wan import inputs, tiny_wan

from prfl_fast.data.dataset import Batches
from prfl_fast.data.manifest import LatentDataset, write_dataset
from prfl_fast.feedback import PRFL, GradientPlan, Point
from prfl_fast.memory import MemoryConfig, activation_checkpointing, apply_memory, quantize
from prfl_fast.memory.experts import ExpertSwap
from prfl_fast.memory.ledger import Ledger
from prfl_fast.models import Experts, find_adapter, is_patched, patch, unpatch
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.rollout import FlowUniPC, Guidance, RolloutConfig, rollout
from prfl_fast.training import TrainConfig, Trainer
from prfl_fast.training.lora import add_lora
from prfl_fast.training.losses import consistency_loss, sft_loss
from prfl_fast.training.model_files import load_model
from prfl_fast.training.objectives import RewardFeedback, SupervisedFlow

STEPS, BOUNDARY = 6, 0.85  # timesteps 999, 960, 909, 832, 714, 499: three of each expert
X, _, TEXT = inputs(batch=1, size=(2, 4, 4))
HIGH, LOW = (0, 1, 2), (3, 4, 5)


def experts(*, patched=True, swapped=True, **options):
    """Return two random experts, the low one in host memory."""
    model = Experts(*(tiny_wan(seed=seed, **options) for seed in (0, 1)), BOUNDARY)
    if patched:
        patch(model)
    if swapped:
        apply_memory(model, MemoryConfig(), device="cpu")
    return model


def reward(x, timestep, conditions):
    return torch.tanh(x.square().mean((1, 2, 3, 4)) + timestep / 1000)


def prfl(model, plan=None, **options):
    return PRFL(model, reward, FlowUniPC(), plan, num_inference_steps=STEPS, **options)


def by_hand(model, stop=STEPS, scales=None):
    """Sample with one scheduler and the experts' own forwards."""
    scheduler, x = FlowUniPC(), X
    scheduler.set_timesteps(STEPS)
    text = TEXT["encoder_hidden_states"]
    for t in scheduler.timesteps[:stop]:
        high = bool(t >= 1000 * BOUNDARY)
        model.use("high" if high else "low")
        expert, scale = (model.high, 0) if high else (model.low, 1)
        calls = [text] if scales is None else [text, -text]
        with torch.no_grad():
            v, *negative = (expert(x, t.float().expand(1), c, return_dict=False)[0] for c in calls)
        if negative:
            v = (1 - scales[scale]) * negative[0] + scales[scale] * v
        (x,) = scheduler.step(v, t, x, return_dict=False)
    return x


def gradients(model):
    """Return the experts that have gradients, and drop these."""
    found = [
        n
        for n in ("high", "low")
        if any(p.grad is not None for p in getattr(model, n).parameters())
    ]
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("engine", [None, RolloutConfig()], ids=["model", "engine"])
def test_a_trajectory_is_the_hand_written_loop_bit_for_bit(engine):
    model = experts()
    swaps = model.swap.swaps
    ours = rollout(model, X, TEXT, FlowUniPC(), STEPS, rollout_config=engine)
    assert model.swap.swaps == swaps + 1
    assert ours.equal(by_hand(model))
    part = rollout(model, X, TEXT, FlowUniPC(), STEPS, rollout_config=engine, stop=4)
    assert part.equal(by_hand(model, 4))


@pytest.mark.cases(1)
@pytest.mark.parametrize("engine", [None, RolloutConfig()], ids=["model", "engine"])
def test_each_expert_has_its_own_guidance(engine):
    model, negative = experts(), {"encoder_hidden_states": -TEXT["encoder_hidden_states"]}
    guidance = Guidance((4.0, 3.0), negative, batched=False)
    ours = rollout(model, X, TEXT, FlowUniPC(), STEPS, guidance=guidance, rollout_config=engine)
    torch.testing.assert_close(ours, by_hand(model, scales=(4.0, 3.0)), rtol=2e-5, atol=2e-5)
    assert not ours.isclose(by_hand(model, scales=(4.0, 4.0)), rtol=1e-3).all()
    with pytest.raises(ValueError, match="guidance_scale is .*, expected one number"):
        rollout(model.high, X, TEXT, FlowUniPC(), STEPS, guidance=guidance)


def test_gradients_reach_the_expert_of_the_point_only():
    model = experts()
    step, alone = prfl(model), copy.deepcopy(model)
    for m in range(STEPS - 1):
        swaps = model.swap.swaps
        assert step(X, TEXT, indices=[m]).finite
        assert gradients(model) == ["high" if m in HIGH else "low"]
        assert model.swap.swaps - swaps <= 2  # back to the first expert, and to the second
    # The same numbers without any exchange of memory.
    apart = experts(swapped=False)
    for one in (apart, alone):
        prfl(one)(X, TEXT, indices=[4])
    pairs = zip(apart.low.parameters(), alone.low.parameters(), strict=True)
    assert all(a.grad.equal(b.grad) for a, b in pairs if a.grad is not None)


def test_points_are_drawn_where_an_expert_trains():
    model, generator = experts(), torch.Generator().manual_seed(0)
    step = prfl(model, GradientPlan.prfl(points=2))
    seen = {step(X, TEXT, generator=generator).indices for _ in range(6)}
    assert any(set(i) & set(HIGH) and set(i) & set(LOW) for i in seen)
    assert gradients(model) == ["high", "low"]
    for name, own in (("high", HIGH), ("low", LOW)):
        frozen = model.low if name == "high" else model.high
        frozen.requires_grad_(False)
        step = prfl(model)
        drawn = {step(X, TEXT, generator=generator).indices[0] for _ in range(20)}
        assert drawn == set(own) & set(range(STEPS - 1)) and gradients(model) == [name]
        with pytest.raises(ValueError, match=f"indices is .*, expected .* trains: {name}"):
            step(X, TEXT, indices=[4 if name == "high" else 0])
        frozen.requires_grad_(True)
    with model.only("high"):
        assert prfl(model)(X, TEXT, generator=generator).indices[0] in HIGH
    assert prfl(model).high_share == 3 / 5


def test_chains_stay_within_an_expert():
    model = experts()
    with pytest.raises(
        ValueError, match=r"window is \(-1, None\), expected one with a step of the expert high"
    ):
        prfl(model, GradientPlan.draft(2))
    model.high.requires_grad_(False)
    out = prfl(model, GradientPlan.draft(3))(X, TEXT)
    assert (out.indices, out.depths) == ((5,), (3,)) and gradients(model) == ["low"]
    for plan in (GradientPlan.draft(4), GradientPlan.draft(None), GradientPlan.alignprop()):
        with pytest.raises(ValueError, match="depth is [46], expected at most 3 at step 5"):
            prfl(model, plan)
    with pytest.raises(ValueError, match="depth is 2, expected at most 1 at step 3"):
        prfl(model, GradientPlan(depth=2, window=(3, 4)))
    random = prfl(model, GradientPlan.alignprop(most=3))
    with pytest.raises(ValueError, match="depth is 5, expected at most 3"):
        random(X, TEXT, indices=[Point(5, 5)])
    assert prfl(model, GradientPlan.refl(0.5))(X, TEXT).indices[0] in LOW


def test_a_gradient_to_the_noise_goes_through_both():
    found = []
    for model in (experts(), experts(swapped=False)):
        found.append(prfl(model, GradientPlan.reno())(X, TEXT).gradient)
        assert gradients(model) == []
    assert found[0].equal(found[1]) and found[0].abs().max() > 0


def test_supervised_levels_are_of_one_expert_for_the_whole_batch():
    model, seen = experts(), []
    x, _, text = inputs(batch=4, size=(2, 4, 4))

    def note(module, args, output):
        seen.append((module, args[1]))

    for expert in (model.high, model.low):
        expert.register_forward_hook(note)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        sft_loss(model, x, text, generator=generator).backward()
        gradients(model)
    assert {id(m) for m, _ in seen} == {id(model.high), id(model.low)}
    for module, timestep in seen:
        assert len(set(timestep.tolist())) > 1
        assert (timestep >= 850).all() if module is model.high else (timestep < 850).all()
    model.high.requires_grad_(False)
    seen.clear()
    for _ in range(4):
        sft_loss(model, x, text, generator=generator)
    assert all(module is model.low for module, _ in seen)
    with pytest.raises(ValueError, match="timestep is .*, expected timesteps on one side"):
        sft_loss(model, x, text, sigma=torch.tensor([0.9, 0.1, 0.9, 0.1]))


def test_one_expert_is_on_the_device():
    """Peak bytes are those of a single model, plus the adapters of the second expert."""
    plan, peaks = GradientPlan.prfl(points=4), {}
    for kind in ("one", "two"):
        model = tiny_wan() if kind == "one" else experts(patched=False)
        patch(model)
        add_lora(model, 2)
        resident = [model] if kind == "one" else [model.high]
        with Ledger() as ledger:
            for part in resident:
                for tensor in (*part.parameters(), *part.buffers()):
                    ledger.mark(tensor, "weights")
            if kind == "two":
                for tensor in (*model.low.parameters(), *model.low.buffers()):
                    ledger.mark(tensor, "weights" if tensor.requires_grad else "host")
                for spare in model.swap._spare.values():
                    ledger.mark(spare, "host")
            base = ledger.live
            prfl(model, plan)(X, TEXT, generator=torch.Generator().manual_seed(0))
        peaks[kind] = ledger.peak
        if kind == "two":
            assert ledger.host_peak == model.swap.host < 1.5 * model.swap.one
            adapters = sum(p.nbytes for p in model.low.parameters() if p.requires_grad)
            gradient = adapters  # points in both experts leave the gradients of both
            assert ledger.live <= base + 2 * adapters + X.nbytes
            assert peaks["two"] <= peaks["one"] + adapters + gradient
    assert peaks["two"] < 1.2 * peaks["one"]


def test_an_exchange_that_was_interrupted_can_be_finished(monkeypatch):
    model = experts()
    before = [p.clone() for p in model.parameters()]
    original, calls = ExpertSwap._buffer, []

    def fails(self, like):
        calls.append(like)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, like)

    monkeypatch.setattr(ExpertSwap, "_buffer", fails)
    with pytest.raises(KeyboardInterrupt):
        model.use("low")
    model.use("high")
    model.use("low")
    assert all(a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    low = {id(p.untyped_storage()) for p in model.low.parameters()}
    assert not low & {id(p.untyped_storage()) for p in model.high.parameters()}


def test_policies_and_patches_reach_both_experts():
    model = experts(patched=False, swapped=False)
    patch(model)
    assert is_patched(model) and is_patched(model.low)
    activation_checkpointing(model, "full")
    assert model.high.is_gradient_checkpointing and model.low.is_gradient_checkpointing
    expected = prfl(model)(X, TEXT, indices=[4]).loss
    quantize(model, "fp8")
    assert all("Quantized" in type(e.blocks[0].attn1.to_q).__name__ for e in model.children())
    assert (
        not prfl(model, rollout=RolloutConfig(cache=False))(X, TEXT, indices=[1]).loss == expected
    )
    assert find_adapter(model).backbone_config(model)["boundary_ratio"] == BOUNDARY
    unpatch(model)
    assert not is_patched(model.high) and not is_patched(model.low)


def test_a_reward_is_built_from_either_expert():
    model = experts()
    for expert in model.children():
        scores = LatentRewardModel.from_backbone(expert, 1, 2).freeze()
        step = PRFL(model, scores, FlowUniPC(), num_inference_steps=STEPS)
        assert step(X, TEXT, indices=[2, 4]).finite and gradients(model) == ["high", "low"]
    with pytest.raises(ValueError, match="two experts, but backbone takes one"):
        LatentRewardModel.from_backbone(model, 1, 2)


def test_bad_experts():
    high, low = tiny_wan(), tiny_wan(seed=1)
    for boundary in (0, 1, 875, True, math.nan, "0.9"):
        with pytest.raises(ValueError, match="boundary is .*, expected a number between 0 and 1"):
            Experts(high, low, boundary)
    with pytest.raises(ValueError, match="low is .*, expected a model whose parameters"):
        Experts(high, tiny_wan(layers=1), 0.5)
    with pytest.raises(TypeError, match="low is 3"):
        Experts(high, 3, 0.5)
    with pytest.raises(ValueError, match="guidance_scale is .*, expected one number, or two"):
        Guidance((1.0, 2.0, 3.0), TEXT)
    other = Experts(high, low, 0.5)
    low.to(torch.bfloat16)
    with pytest.raises(TypeError, match="supported class"):
        patch(Experts(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), 0.5))
    assert other.name_at(500) == "high" and other.name_at(torch.tensor([499.9, 3])) == "low"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts") / "data"
    write_dataset(folder, samples(4))
    return LatentDataset(folder)


def trainer_of(data, folder, trained=("high", "low"), steps=6, rank=2):
    model = experts(text_tokens=512)
    if rank:
        add_lora(model, rank)
    for name in {"high", "low"} - set(trained):
        getattr(model, name).requires_grad_(False)
    batches = Batches(data, 2, 0)
    objectives = {
        "prfl": RewardFeedback(prfl(model), batches),
        "sft": SupervisedFlow(model, batches),
    }
    config = TrainConfig(
        steps=steps, learning_rate=1e-2, gradient_accumulation_steps=2, ema_decay=0.5
    )
    return Trainer(model, objectives, config, folder=folder)


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_each_step_trains_one_expert_and_resumes(data, tmp_path):
    run = trainer_of(data, tmp_path / "whole")
    changed = ([], [])

    def copies():
        return values(run.model), {name: average.clone() for name, average in run.ema.items()}

    def note(record):
        now = copies()
        for steps, old, new in zip(changed, before, now, strict=True):
            steps.append({n.split(".")[0] for n in new if not new[n].equal(old[n])})
        before[:] = now

    before = [*copies()]
    run.on_step = note
    run.run()
    expected = [{"low"}, {"high"}, {"low"}, {"high"}, {"high"}, {"low"}]  # share 3/5
    assert changed == (expected, expected)  # the average of the other expert waits too
    trainer_of(data, tmp_path / "parts", steps=3).run()
    again = trainer_of(data, tmp_path / "parts")
    again.run()
    assert all(again.model.get_parameter(n).equal(p) for n, p in values(run.model).items())
    saved = tmp_path / "whole" / "final"
    assert sorted(p.name for p in saved.iterdir()) == ["transformer", "transformer_2"]
    fresh = experts(text_tokens=512)
    add_lora(fresh, 2)
    (saved / "transformer_2").rename(tmp_path / "away")
    before = values(fresh)
    with pytest.raises(ValueError, match="transformer_2 is .*, expected pytorch_lora"):
        load_model(fresh, saved)
    assert all(p.equal(before[n]) for n, p in values(fresh).items())  # those of high too
    (tmp_path / "away").rename(saved / "transformer_2")
    load_model(fresh, saved)
    assert all(fresh.get_parameter(n).equal(p) for n, p in values(run.model).items())


def test_one_expert_trains_in_full(data, tmp_path):
    run = trainer_of(data, tmp_path, ("low",), steps=2, rank=0)
    before = values(run.model)
    run.run()
    after = values(run.model)
    changed = {n.split(".")[0] for n in after if not after[n].equal(before[n])}
    assert changed == {"low"}
    assert [p.name for p in (tmp_path / "final").iterdir()] == ["transformer_2"]
    fresh = type(run.model.low).from_pretrained(tmp_path / "final" / "transformer_2")
    assert all(p.equal(after[f"low.{n}"]) for n, p in fresh.named_parameters())
    again = trainer_of(data, tmp_path, ("low",), steps=3, rank=0)
    assert all(again.model.get_parameter(n).equal(p) for n, p in after.items())
    again.run()


def test_what_two_experts_cannot_do():
    model = experts(swapped=False)
    with pytest.raises(ValueError, match="teacher is 'two experts', expected one model"):
        consistency_loss(model.low, model.low, model, X, TEXT)
    with pytest.raises(TypeError, match=r"DataParallel of two experts, .* Experts\(wrap"):
        sft_loss(torch.nn.DataParallel(model), X, TEXT)
    model.high.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"boundary is .*, expected a noise level of .*trains, low"
    ):
        sft_loss(Experts(model.high, model.low, 1e-9), X, TEXT)
    model.low.patch_embedding = model.high.patch_embedding
    with pytest.raises(ValueError, match="parameters that both experts hold is 2, expected 0"):
        apply_memory(model, MemoryConfig(), device="cpu")
