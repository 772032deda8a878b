"""What cannot be saved is refused before training; of several adapters the trained one is saved."""

import pytest
import torch
from commands import refused
from prfl_world import NOISE, TEXT, make_wan, prfl
from runs import linear, make_world, trainer
from safetensors.torch import load_file
from torch import nn
from wan import inputs, tiny_wan

from prfl_fast.models.registry import find_adapter
from prfl_fast.training.model_files import load_model, save_model
from prfl_fast.utils import optional

peft = pytest.importorskip("peft", reason="adapters need peft")
pytest.importorskip("diffusers")


def add(model, name="default", *, alpha=4, train=True, rank=4, **options):
    """Add an adapter that is not zero and freeze all other parameters, or all with it."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=["to_q", "to_v"],
        init_lora_weights=False, **options,
    )  # fmt: skip
    model.requires_grad_(False)
    model.add_adapter(config, adapter_name=name)
    model.set_adapters(list(model.peft_config))
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(train and f".{name}." in parameter_name)
    return model


def call(model):
    return find_adapter(model).velocity(model, *inputs()).detach()


def both():
    return add(add(tiny_wan(), "distill", train=False), "mine")


def test_the_adapter_that_trains_is_saved_under_a_frozen_one(tmp_path):
    first, second = both(), both()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    save_model(first, tmp_path)
    load_model(second, tmp_path)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if "lora_" in name:
            assert torch.equal(a, b) == (".mine." in name), name


def test_two_adapters_that_train_and_a_norm_beside_one_are_refused(tmp_path):
    model = both()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with pytest.raises(ValueError, match=r"is \['distill', 'mine'\], expected one. Freeze"):
        trainer(model, tmp_path / "a")
    model = add(tiny_wan())
    model.blocks[0].norm2.requires_grad_(True)
    with pytest.raises(ValueError, match="norm2.weight is trained beside adapter 'default'"):
        trainer(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    trainer(model, None)  # nothing is saved


def test_torchao_weights_are_refused_but_an_adapter_over_them_is_not(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_wan(head_dim=32).requires_grad_(False)
    linear = lambda module, name: type(module) is nn.Linear  # noqa: E731
    torchao.quantize_(model.blocks, torchao.Int8WeightOnlyConfig(), filter_fn=linear)
    model.scale_shift_table.requires_grad_(True)
    with pytest.raises(ValueError, match="expected a plain tensor, as safetensors cannot hold it"):
        trainer(model, tmp_path)
    trainer(add(model), tmp_path)


def test_missing_safetensors_is_named_before_training(tmp_path, monkeypatch):
    def missing(module):
        raise ModuleNotFoundError(name="safetensors")

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(optional.MissingExtraError, match="safetensors is not installed"):
        trainer(folder=tmp_path)


@pytest.mark.parametrize("name", ["step-00000003", "tensorboard"])
def test_a_foreign_file_in_the_folder_is_refused(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"expected one without a foreign {name}. Move it away"):
        trainer(folder=tmp_path)


def test_check_of_train_reward_looks_at_the_place_of_the_reward(tmp_path, capsys):
    make_world(tmp_path / "world")
    out = tmp_path / "out"
    (out / "reward").mkdir(parents=True)
    (out / "reward" / "notes.txt").write_text("mine")
    said = refused(capsys, "train-reward", tmp_path / "world", out, None, "--check")
    assert "holds notes.txt, which saving would remove" in said
    assert [p.name for p in out.iterdir()] == ["reward"]


PATTERNS = {"alpha_pattern": {"attn1.to_q": 32}}
CASES = {
    "alpha_pattern": (PATTERNS, {}),
    "rank_pattern": ({"rank_pattern": {"attn1.to_q": 2}}, {}),
    "weight": ({}, {"weights": 0.5}),
    "weight over a pattern": (PATTERNS, {"weights": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_scales_are_saved_and_another_scale_is_refused(tmp_path, case):
    options, weights = CASES[case]

    def make(seed):
        torch.manual_seed(seed)
        model = add(tiny_wan(), **options)
        if weights:
            model.set_adapters(["default"], **weights)
        return model

    torch.manual_seed(5)
    plain, first, second = add(tiny_wan()), make(6), make(7)
    base = {name: p for name, p in first.state_dict().items() if "lora_" not in name}
    for model in (plain, second):
        model.load_state_dict(base, strict=False)
    save_model(first, tmp_path)
    load_model(second, tmp_path)
    assert torch.equal(call(second), call(first))
    with pytest.raises(ValueError, match="adapter in .* expected this model's|do not fit"):
        load_model(plain, tmp_path)


def test_the_weight_of_a_loha_adapter_is_saved(tmp_path):
    def make(alpha, weight):
        model = tiny_wan().requires_grad_(False)
        model.add_adapter(peft.LoHaConfig(r=4, alpha=alpha, target_modules=["to_q"]))
        model.set_adapters(["default"], weights=weight)
        return model

    save_model(make(4, 0.5), tmp_path)
    load_model(make(2, 1.0), tmp_path)
    with pytest.raises(ValueError, match=r"^alpha of the adapter in .* is 2.0, expected"):
        load_model(make(4, 1.0), tmp_path)


def test_a_layer_scaled_by_hand_is_saved_with_its_scale(tmp_path):
    torch.manual_seed(0)
    model = add(tiny_wan())
    model.blocks[1].attn1.to_q.set_scale("default", 0.25)
    save_model(model, tmp_path)
    plain = add(tiny_wan())
    with pytest.raises(ValueError, match=r"scale of blocks.1.attn1.to_q .* is 0.25, expected"):
        load_model(plain, tmp_path)
    plain.blocks[1].attn1.to_q.set_scale("default", 0.25)
    load_model(plain, tmp_path)


def test_divergence_leaves_a_frozen_adapter_on():
    torch.manual_seed(0)
    model = add(make_wan(), "distill", train=False)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])  # zero at first
    model.add_adapter(config, adapter_name="mine")
    model.set_adapters(["distill", "mine"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mine." in name)
    step = prfl(model, steps=4, divergence=0.1)
    assert step(NOISE, TEXT).divergence == 0
    with torch.no_grad():
        model.blocks[0].attn1.to_q.lora_B["mine"].weight.add_(0.1)
    active = [m.active_adapters for m in model.modules() if hasattr(m, "lora_A")]
    assert step(NOISE, TEXT).divergence > 0
    assert [m.active_adapters for m in model.modules() if hasattr(m, "lora_A")] == active


def linear_with(buffer):
    model = nn.Linear(3, 2)
    model.register_buffer("x", buffer)
    return model


@pytest.mark.parametrize(
    "buffer",
    [
        torch.arange(3.0)[:, None].expand(3, 4),
        torch._neg_view(torch.arange(3.0)),
        torch.full((2,), 1j).conj(),
        torch.arange(6.0).view(2, 3).t(),
    ],
)
def test_views_are_saved_and_loaded(tmp_path, buffer):
    save_model(linear_with(buffer), tmp_path)
    zeros = torch.zeros_like(buffer)
    model = linear_with(zeros[:, :1].expand(3, 4) if 0 in buffer.stride() else zeros)
    load_model(model, tmp_path)
    assert torch.equal(model.x, buffer)


@pytest.mark.parametrize(
    "buffer",
    [torch.eye(2).to_sparse(), torch.ones(2).to(torch.complex128), torch.ones(2, device="meta")],
)
def test_tensors_that_safetensors_cannot_hold_are_refused(tmp_path, buffer):
    with pytest.raises(ValueError, match="x is .*, expected a plain tensor"):
        trainer(linear_with(buffer), tmp_path)


def test_wrappers_are_not_saved(tmp_path):
    """DataParallel and torch.compile would add a prefix to names, and hide the adapter."""
    model = linear()
    for number, wrap in enumerate((nn.DataParallel, torch.compile)):
        save_model(wrap(model), tmp_path / str(number))
        assert load_file(tmp_path / str(number) / "model.safetensors").keys() == {"weight", "bias"}
        load_model(wrap(linear(1)), tmp_path / str(number))
