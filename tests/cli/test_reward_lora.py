"""Reward models that train adapters: what trains, what is saved, how runs go on."""

import pytest
import torch
import yaml
from commands import call, refused
from offload_models import assert_same
from runs import log, samples
from wan import tiny_wan

from prfl_fast.models.registry import patch
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training import add_lora, merge_lora
from prfl_fast.utils.io import load_tensors

LORA = {"lora": {"lora_rank": 2, "target_modules": ["to_q", "to_v"]}, "run.steps": 4}


def reward_with_lora(dtype):
    torch.manual_seed(0)
    reward = LatentRewardModel.from_backbone(tiny_wan(layers=1), 1, num_heads=2).to(dtype)
    add_lora(reward.backbone, 4, 6.0)
    with torch.no_grad():
        for name, parameter in reward.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return reward


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_merged_adapters_give_the_same_scores(dtype, tmp_path):
    reward = reward_with_lora(dtype)
    layer = reward.backbone.blocks[0].attn1.to_q
    wide = [p.detach().float() for p in (layer.lora_B.default.weight, layer.lora_A.default.weight)]
    summed = (layer.base_layer.weight.detach().float() + 1.5 * (wide[0] @ wide[1])).to(dtype)
    x = torch.stack([s.latents for s in samples(2)])
    text = torch.stack([s.conditions["encoder_hidden_states"] for s in samples(2)])
    inputs = (x, torch.tensor([300.0, 700.0]), {"encoder_hidden_states": text})
    with torch.no_grad():
        expected = reward.logits(*inputs)
        plain = LatentRewardModel.from_backbone(tiny_wan(layers=1), 1, num_heads=2)
        with pytest.raises(ValueError, match="this reward model cannot be saved"):
            reward.save(tmp_path / "reward")
        merge_lora(reward.backbone)
        assert torch.equal(reward.backbone.blocks[0].attn1.to_q.weight, summed)
        found = reward.logits(*inputs)
    assert {n: t.shape for n, t in reward.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    assert {p.dtype for p in reward.backbone.blocks.parameters()} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    reward.save(tmp_path / "reward")
    loaded = LatentRewardModel.load(tmp_path / "reward")
    assert_same(dict(loaded.state_dict()), dict(reward.state_dict()))
    add_lora(loaded.backbone, 2)  # a merged one takes new adapters
    add_lora(reward.backbone, 2)
    patch(reward.backbone)


@pytest.mark.slow
def test_a_run_trains_adapters_pooling_and_head_and_resumes(root, tmp_path, capsys):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert call("train-reward", root, whole, LORA) == 0
    assert "learning_rate is 0.0001, for adapters" in capsys.readouterr().err
    assert yaml.safe_load((whole / "config.yaml").read_text())["optimizer"]["learning_rate"] == 1e-4
    for steps in (2, 4):
        assert call("train-reward", root, half, {**LORA, "run.steps": steps}) == 0
    assert log(half) == log(whole)
    tensors = [load_tensors(out / "reward" / "model.safetensors") for out in (whole, half)]
    assert_same(*tensors)
    (trained, _), base = tensors, load_tensors(next((root / "model").glob("*.safetensors")))
    changed = [n for n, t in base.items() if not torch.equal(trained.get(f"backbone.{n}", t), t)]
    assert changed == [f"blocks.0.attn{i}.to_{x}.weight" for i in (1, 2) for x in "qv"]
    exact = load_tensors(whole / "step-00000004" / "model" / "model.safetensors")
    assert "backbone.blocks.0.attn1.to_q.lora_A.default.weight" in exact
    assert call("score", root, tmp_path / "scores", {"reward": str(whole / "reward")}) == 0


def test_bad_input_is_one_line(root, tmp_path, capsys):
    changes = {**LORA, "lora": {"lora_rank": 2, "target_modules": ["zzz"]}}
    assert "zzz" in refused(capsys, "train-reward", root, tmp_path / "out", changes)
    changes = {**LORA, "memory.weight_dtype": "nf4", "hardware.precision": "bf16"}
    line = refused(capsys, "train-reward", root, tmp_path / "out", changes)
    assert "memory.weight_dtype is 'nf4', expected one of fp32, bf16" in line
    assert not (tmp_path / "out").exists()
