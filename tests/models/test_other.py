"""Models without an adapter: memory policies, and velocity, reward and training by a function."""

import contextlib
import copy

import prfl_world
import pytest
import textbook
import torch
from other_models import FAMILIES, HandMade, hand_made_inputs, hand_made_velocity, tiny
from torch import nn

import prfl_fast
from prfl_fast.data.dataset import Batch
from prfl_fast.memory import offload as offload_module
from prfl_fast.memory.checkpointing import activation_checkpointing, offload_bytes
from prfl_fast.memory.quantized import quantize
from prfl_fast.models import VelocityModel, find_adapter
from prfl_fast.models.registry import find_blocks
from prfl_fast.rewards import LatentRewardModel
from prfl_fast.training import SupervisedFlow, sft_loss
from prfl_fast.training.lora import add_lora
from prfl_fast.training.model_files import load_model, save_model


def hand_made():
    """Return a hand-made model whose weights do not depend on earlier tests."""
    torch.manual_seed(0)
    return HandMade()


def gradients(model, tensors, options):
    """Return the output and every gradient of one forward and backward."""
    leaves = {key: value.clone().requires_grad_() for key, value in tensors.items()}
    out = model(**leaves, **options)
    out = out if isinstance(out, torch.Tensor) else out[0]
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator))
    found = {"output": out.detach()} | {key: value.grad for key, value in leaves.items()}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def saved_bytes(function):
    """Return the bytes of the distinct tensors that a function saves for its backward."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(seen.values())


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (value is None) == (ours[name] is None), name
        assert value is None or torch.equal(ours[name], value), name


@pytest.mark.cases(1)
@pytest.mark.parametrize("family", [*FAMILIES, "hand-made"])
def test_memory_policies_change_no_bit(family, monkeypatch):
    monkeypatch.setattr(offload_module, "SMALLEST", 0)
    if family == "hand-made":
        model, (x, timestep, conditions) = hand_made(), hand_made_inputs()
        tensors, options = {"x": x, "text": conditions["text"]}, {"sigma": timestep / 1000}
    else:
        model, tensors, options = tiny(family)
        options |= {"return_dict": False}
    plain = gradients(model, tensors, options)
    before = saved_bytes(lambda: model(**tensors, **options))
    keys = list(model.state_dict())
    for mode, offload in (("full", None), ("none", "cpu"), ("full", "cpu")):
        activation_checkpointing(model, mode, offload)
        assert_equal(gradients(model, tensors, options), plain)
        assert (offload_bytes(model)["transferred"] > 0) == (offload == "cpu")
    activation_checkpointing(model, "full")
    assert saved_bytes(lambda: model(**tensors, **options)) < 0.8 * before
    assert list(model.state_dict()) == keys
    activation_checkpointing(model, "none")
    blocks = list(find_blocks(model).blocks(model))
    assert not any("forward" in block.__dict__ for block in blocks)
    assert len(blocks) == 3 if family in ("hunyuan", "cogvideox", "hand-made") else 2


@pytest.mark.parametrize("mode", ["full", "attention"])
def test_checkpointed_copies_are_independent(mode):
    model, (x, timestep, conditions) = hand_made(), hand_made_inputs()
    activation_checkpointing(model, mode)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.layers[0].down.bias.add_(1)
    arguments = {"x": x, "text": conditions["text"]}, {"sigma": timestep / 1000}
    warning = pytest.warns(UserWarning, match="no known attention")
    with warning if mode == "attention" else contextlib.nullcontext():
        assert not torch.equal(
            gradients(model, *arguments)["output"], gradients(twin, *arguments)["output"]
        )


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(2, 2)])
        self.second = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])


def test_errors_say_how_to_choose_blocks():
    several = r"blocks of Two is \['first', 'second'\], expected one .*ModuleList.*blocks=\["
    for function in (activation_checkpointing, lambda m: quantize(m, "fp8")):
        with pytest.raises(ValueError, match=several):
            function(Two())
    for nothing in (nn.Linear(2, 2), VelocityModel(nn.Linear(2, 2), hand_made_velocity), "wan"):
        with pytest.raises(TypeError, match="model is a .*expected a supported class"):
            activation_checkpointing(nothing)
    with pytest.raises(ValueError, match=r"blocks is \['third'\].*\['first', 'second'\]"):
        activation_checkpointing(VelocityModel(Two(), hand_made_velocity, blocks=["third"]))
    chosen = VelocityModel(Two(), hand_made_velocity, blocks=["second", "first"])
    assert list(find_blocks(chosen).blocks(chosen)) == [*chosen.model.second, *chosen.model.first]
    model = hand_made()
    model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient_checkpointing of the model is True"):
        activation_checkpointing(model)
    activation_checkpointing(model, "none")
    model = hand_made()
    model.layers[1].forward = lambda **_: None
    with pytest.raises(ValueError, match="a replaced forward"):
        activation_checkpointing(model)
    assert "forward" not in model.layers[0].__dict__, "nothing may be half set"


def test_what_needs_an_adapter_says_what_works_without():
    message = "HandMade, expected a supported class: diffusers Wan.*VelocityModel"
    for function in (
        prfl_fast.patch,
        find_adapter,
        lambda model: prfl_fast.PRFL(model, find_adapter, prfl_fast.FlowEuler()),
        LatentRewardModel.from_backbone,
        lambda model: prfl_fast.patch(VelocityModel(model, hand_made_velocity)),
    ):
        with pytest.raises(TypeError, match=message):
            function(hand_made())


def reward_of(model, num_blocks=2):
    torch.manual_seed(5)
    return LatentRewardModel.from_backbone(model, num_blocks, num_heads=2)


def velocity_model():
    return VelocityModel(hand_made(), hand_made_velocity, hidden_size=16)


def by_hand(reward, x, timestep, conditions):
    """Return the reward's score by a loop over the copied blocks."""
    model = reward.backbone.model
    stream, text = model.embed(x.flatten(2).transpose(1, 2)), model.text(conditions["text"])
    for layer in list(model.layers):
        sigma = (timestep / 1000).view(-1, 1, 1)
        stream, text = layer(scale=1 + sigma, stream=stream, text=text)
    return torch.sigmoid(reward.head(reward.pool(stream)))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_latent_reward_equals_a_loop_over_its_blocks(mode, tmp_path):
    model, (x, timestep, conditions) = velocity_model(), hand_made_inputs()
    reward = reward_of(model)
    assert reward.num_blocks == 2 and len(model.model.layers) == 3
    trained = {n for n, p in reward.backbone.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in reward.backbone.named_parameters() if "layers" in n}
    twin = copy.deepcopy(reward)
    activation_checkpointing(reward.backbone, mode)
    runs = []
    for function, of in ((reward, reward), (lambda *a: by_hand(twin, *a), twin)):
        optimizer = torch.optim.SGD([p for p in of.parameters() if p.requires_grad], lr=0.1)
        leaf = x.clone().requires_grad_()
        score = function(leaf, timestep, conditions)
        (score - 0.3).square().sum().backward()
        optimizer.step()
        runs.append({"score": score, "x": leaf.grad} | dict(of.named_parameters()))
    assert_equal(*runs)
    assert runs[0]["x"].abs().sum() > 0
    reward.save(tmp_path / "reward")
    with pytest.raises(ValueError, match=r"VelocityModel of other_models.HandMade.*transformer="):
        LatentRewardModel.load(tmp_path / "reward")
    loaded = LatentRewardModel.load(tmp_path / "reward", velocity_model())
    assert torch.equal(loaded(x, timestep, conditions), reward(x, timestep, conditions))
    quantize(loaded.backbone, "fp8")
    with pytest.raises(ValueError, match="quantized layers is .*model.layers.0.*before quantizing"):
        loaded.save(tmp_path / "quantized")
    assert not (tmp_path / "quantized").exists()


def test_latent_reward_names_what_it_cannot_read():
    x, timestep, conditions = hand_made_inputs()
    with pytest.raises(ValueError, match="hidden_size is 0, expected the width.*hidden_size="):
        reward_of(VelocityModel(hand_made(), hand_made_velocity))
    with pytest.raises(ValueError, match=r"num_blocks is 4, expected 1 to 3"):
        reward_of(velocity_model(), 4)
    wrong = VelocityModel(hand_made(), hand_made_velocity, hidden_size=8)
    with pytest.raises(ValueError, match=r"output of block 2 is .*expected \[2, ..., 8\]"):
        reward_of(wrong)(x, timestep, conditions)
    reward = reward_of(velocity_model())
    reward.backbone.function = lambda model, x, *_: x
    with pytest.raises(ValueError, match="calls of the last block is 0"):
        reward(x, timestep, conditions)
    reward = reward_of(velocity_model())
    reward.backbone.model.forward = reward.backbone.model.forward  # as accelerate's hooks do
    with pytest.raises(ValueError, match="HandMade of a reward.*hooks of accelerate"):
        reward(x, timestep, conditions)
    bad = VelocityModel(hand_made(), lambda *_: torch.zeros(1))
    with pytest.raises(ValueError, match="result of VelocityModel's function"):
        sft_loss(bad, x, conditions)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("ltx", "cogvideox")])
def test_rewards_of_models_of_diffusers_stop_after_their_block(family):
    """The reward equals a hook's view of the whole model, and later modules do not run."""
    model, tensors, options = tiny(family)
    options.pop("timestep")

    def call(model, x, timestep, conditions):
        timestep = timestep.long()
        given = {**options, **conditions, "hidden_states": x, "timestep": timestep}
        return model(**given, return_dict=False)[0]

    paired = VelocityModel(model, call)
    reward = reward_of(paired, 1)
    blocks, seen = find_blocks(paired).blocks(paired), []
    hook = blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
    x = tensors.pop("hidden_states")
    call(model, x, torch.tensor([300, 700]), tensors)
    hook.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    expected = torch.sigmoid(reward.head(reward.pool(out.contiguous())))
    score = reward(x.requires_grad_(), torch.tensor([300.0, 700.0]), tensors)
    assert torch.equal(score, expected)
    score.sum().backward()
    assert x.grad.abs().sum() > 0


def test_prfl_through_a_function_equals_a_hand_written_loop():
    model, (x, _, conditions) = velocity_model(), hand_made_inputs()
    reward = reward_of(velocity_model()).freeze()
    twin = copy.deepcopy(model.model)
    step = prfl_fast.PRFL(model, reward, prfl_fast.FlowEuler(), num_inference_steps=4)
    assert step(x, conditions, indices=[2]).finite
    solver = textbook.Euler(4)

    def batch(i):
        return torch.full((2,), solver.timesteps[i])

    sample = x
    for i in range(3):
        with torch.set_grad_enabled(i == 2):
            sample = solver.step(i, hand_made_velocity(twin, sample, batch(i), conditions), sample)
    (0.1 * (2 - reward(sample, batch(3), conditions)).mean()).backward()
    ours, theirs = ([p.grad for p in m.parameters()] for m in (model, twin))
    assert prfl_world.worst_error(ours, theirs) < 1e-5


def test_supervised_flow_takes_functions_and_paired_models(tmp_path):
    model, (x, _, conditions) = velocity_model(), hand_made_inputs()
    batches = [Batch(x, conditions, [])]
    results = []
    for transformer in (model, lambda *a: hand_made_velocity(model.model, *a)):
        generator = torch.Generator().manual_seed(0)
        metrics = SupervisedFlow(transformer, batches)(0, generator, 0.5)
        results.append({n: p.grad.clone() for n, p in model.named_parameters()} | metrics)
        model.zero_grad()
    assert_equal(*results)
    with pytest.raises(ValueError, match="precision is 'bf16', expected fp32 for a function"):
        SupervisedFlow(lambda *a: None, batches, precision="bf16")
    with pytest.raises(TypeError, match="transformer is int"):
        SupervisedFlow(3, batches)
    save_model(model, tmp_path)
    fresh = HandMade()
    load_model(fresh, tmp_path)
    assert_equal(dict(fresh.named_parameters()), dict(model.model.named_parameters()))


def test_frozen_weights_are_quantized_and_adapters_train():
    model, (x, _, conditions) = hand_made(), hand_made_inputs()
    quantize(model, "fp8")
    assert {type(b.up).__name__ for b in model.layers} == {"QuantizedLinear"}
    assert type(model.embed) is nn.Linear
    paired = VelocityModel(model, hand_made_velocity)
    add_lora(paired, 2, target_modules=("up", "down"))
    activation_checkpointing(paired, "full")
    sft_loss(paired, x, conditions, noise=torch.zeros_like(x), sigma=0.5).backward()
    lora = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(lora) == 6 and all(g.abs().sum() > 0 for g in lora)


class Outer(nn.Module):
    """Hold the model one level down, as DiT classes with a ``backbone`` do."""

    def __init__(self, model):
        super().__init__()
        self.backbone = model

    def forward(self, *arguments):
        return self.backbone(*arguments)


@pytest.mark.parametrize("blocks", [None, ["backbone.layers"]])
def test_lists_of_blocks_may_be_nested(blocks):
    x, timestep, conditions = hand_made_inputs()
    plain = hand_made()
    outer = VelocityModel(
        Outer(copy.deepcopy(plain)), hand_made_velocity, blocks=blocks, hidden_size=16
    )
    expected = reward_of(VelocityModel(plain, hand_made_velocity, hidden_size=16))
    reward = reward_of(outer)
    assert len(reward.backbone.model.backbone.layers) == len(expected.backbone.model.layers) == 2
    assert torch.equal(reward(x, timestep, conditions), expected(x, timestep, conditions))
    activation_checkpointing(outer, "full")
    assert all("block_runner" in vars(block) for block in outer.model.backbone.layers)


def test_blocks_that_a_reward_cannot_count():
    model = hand_made()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    flow = VelocityModel(model, hand_made_velocity, hidden_size=16)
    with pytest.raises(ValueError, match="number of blocks of a reward is 1, expected 3"):
        reward_of(flow)
    model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="blocks is .*layers.*expected names of lists"):
        activation_checkpointing(VelocityModel(model, hand_made_velocity, blocks=["layers"]))
