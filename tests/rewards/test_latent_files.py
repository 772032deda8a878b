"""LatentRewardModel.save and load: same bits, atomic, clear errors for damaged files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from latent_reward import HEADS, build, edit_tensors
from wan import inputs

import prfl_fast.rewards.latent as reward_module
from prfl_fast.models.registry import patch
from prfl_fast.rewards.latent import LatentRewardModel


@pytest.mark.cases(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["t2v", "i2v"])
def test_save_and_load_give_the_same_bits(tmp_path, case, dtype):
    reward, _ = build(case, num_queries=2)
    patch(reward.to(dtype).backbone)
    folder = tmp_path / "a" / "reward"
    reward.save(folder)
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "digests.json",
        "model.safetensors",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["num_blocks"] == 2 and config["num_heads"] == HEADS and config["num_queries"] == 2
    loaded = LatentRewardModel.load(folder)
    patch(loaded.backbone)
    before, after = reward.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    assert torch.equal(loaded.logits(*inputs(case)), reward.logits(*inputs(case)))
    flags = [[p.requires_grad for p in model.parameters()] for model in (loaded, reward)]
    assert flags[0] == flags[1]


def test_a_second_save_replaces_the_first(tmp_path):
    first, _ = build(num_blocks=1)
    second, _ = build(num_blocks=2, seed=1)
    first.save(tmp_path / "reward")
    second.save(str(tmp_path / "reward"))
    loaded = LatentRewardModel.load(str(tmp_path / "reward"))
    assert torch.equal(loaded.logits(*inputs()), second.logits(*inputs()))
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]


def test_a_failed_save_leaves_the_earlier_files(tmp_path, monkeypatch):
    first, _ = build()
    first.save(tmp_path / "reward")

    def fail(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    second, _ = build(seed=1)
    monkeypatch.setattr(reward_module, "save_tensors", fail)
    for name in ("reward", "other"):
        with pytest.raises(OSError, match="no space left"):
            second.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["reward"]
    loaded = LatentRewardModel.load(tmp_path / "reward")
    assert torch.equal(loaded.logits(*inputs()), first.logits(*inputs()))


def test_saving_never_removes_what_is_not_a_reward_model(tmp_path):
    reward, _ = build()
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds precious.txt.*Choose a new folder"):
        reward.save(tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        reward.save(tmp_path / "precious.txt")
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.md"):
        reward.save_reference(tmp_path, 3)
    for file in (tmp_path / "precious.txt", checkpoint / "notes.md"):
        assert file.read_text() == "mine"


def test_a_backbone_with_adapters_is_refused_by_save(tmp_path):
    peft = pytest.importorskip("peft")
    reward, _ = build()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), reward.backbone)
    with pytest.raises(ValueError, match="cannot be saved.*unexpected.*lora_A"):
        reward.save(tmp_path / "reward")
    assert not (tmp_path / "reward").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a reward model; tests that damage it work on a copy."""
    folder = tmp_path_factory.mktemp("saved") / "reward"
    build()[0].save(folder)
    return folder


@pytest.fixture
def damaged(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "reward"))


def test_load_of_something_missing(damaged, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a saved reward model"):
        LatentRewardModel.load(tmp_path / "nowhere")
    (damaged / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        LatentRewardModel.load(damaged)


@pytest.mark.parametrize("keep", [0, 5, 400, -1])  # -1: one byte short
def test_load_of_a_truncated_file(damaged, keep):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        LatentRewardModel.load(damaged)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "prfl_fast reward 9"}, "format is 'prfl_fast reward 9'"),
        ({"format": None}, "'format' is missing"),
        ({"class": "SomeOtherTransformer"}, "adapter is 'SomeOtherTransformer'"),
        ({"num_blocks": 5}, "num_blocks is 5, expected the backbone's 2"),
        ({"num_heads": 7}, "num_heads is 7"),
        ({"num_queries": None}, "'num_queries' is missing"),
        ({"backbone": {"no_such_key": 1}}, "no_such_key"),
        (None, ""),  # not JSON
    ],
)
def test_load_of_a_wrong_configuration(damaged, changes, message):
    file = damaged / "config.json"
    config = json.loads(file.read_text()) | (changes or {})
    text = json.dumps({k: v for k, v in config.items() if v is not None})
    file.write_text(text if changes else text[:10])
    message = f"config.json: not the configuration of a reward model: .*{message}"
    with pytest.raises(ValueError, match=message):
        LatentRewardModel.load(damaged)


def test_load_names_what_does_not_fit(damaged):
    def change(tensors):
        tensors["head.fc4.weight"] = torch.zeros(1, 2)
        tensors["pool.queries"] = torch.zeros(1, 40)
        for name in [n for n in tensors if "ffn" in n]:
            del tensors[name]

    edit_tensors(damaged / "model.safetensors", change)
    with pytest.raises(ValueError) as caught:
        LatentRewardModel.load(damaged)
    message = str(caught.value)
    assert "8 missing (backbone.blocks.0.ffn.net.0.proj" in message and "; …)" in message
    assert "1 unexpected (head.fc4.weight [1, 2])" in message
    assert "1 of another shape or dtype (pool.queries [1, 40], expected [1, 48])" in message
