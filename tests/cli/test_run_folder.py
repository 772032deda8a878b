"""Runs in a folder from the command line: locks, damage, changed inputs, and what a run says."""

import json
import os
import shutil

import pytest
import torch
from commands import call, refused, train
from processes import forked
from runs import log

pytest.importorskip("pydantic")

from prfl_fast.cli.inputs import fingerprint
from prfl_fast.models.lora_files import write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.folder_lock import hold_folder
from prfl_fast.utils.io import load_tensors, save_tensors

SFT = {"objectives": ["sft"], "reward": ..., "run.steps": 2, "run.save_every": 1}
SFT["run.keep_last"] = 9


def flip(path, position=0.6):
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 0x40
    path.write_bytes(data)


def test_a_folder_in_use_is_refused_and_not_changed(root, tmp_path, capsys):
    out = tmp_path / "out"
    train(root, out, SFT)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with hold_folder(out):
        changes = {**SFT, "run.steps": 3, "optimizer.learning_rate": 1e-2}
        assert forked(lambda: call("train", root, out, changes)) == 2
        assert forked(lambda: call("train", root, out, changes, "--check")) == 2  # other settings
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_damaged_checkpoint_is_refused_or_skipped(root, tmp_path, capsys):
    out = tmp_path / "out"
    train(root, out, SFT)
    flip(out / "step-00000002" / "model" / "diffusion_pytorch_model.safetensors")
    again = {**SFT, "run.steps": 3}
    error = refused(capsys, "train", root, out, again)
    assert "diffusion_pytorch_model.safetensors" in error and "resume: last-good" in error
    assert call("train", root, out, {**again, "run.resume": "last-good"}) == 0
    said = capsys.readouterr()
    assert "damaged checkpoint" in said.err and f"resumed from {out / 'step-00000001'}" in said.out


def lines(part):
    def change(world):
        path = world / "data" / "manifest.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[part]))

    return change


def other_model(world):
    path = world / "model" / "diffusion_pytorch_model.safetensors"
    save_tensors({n: t + 0.01 for n, t in load_tensors(path).items()}, path)


def other_reward(world):
    reward = LatentRewardModel.load(world / "reward")
    reward.head.fc1.weight.data.add_(0.01)
    reward.save(world / "reward")


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lines(slice(3)), "data: number of samples"),
        (lines(slice(None, None, -1)), "data: manifest"),
        (other_model, "model: fingerprint"),
        (other_reward, "reward: fingerprint"),
    ],
)
def test_changed_inputs(world, tmp_path, capsys, change, message):
    out, changes = tmp_path / "out", {"run.steps": 1}
    assert call("train", world, out, changes) == 0
    change(world)
    changes["run.steps"] = 2
    error = refused(capsys, "train", world, out, changes)
    assert "began with " in error and "--accept-changed-inputs" in error
    assert message in error or message == "data: number of samples"
    assert call("train", world, out, changes, "--accept-changed-inputs") == 0
    assert message in capsys.readouterr().err


def test_a_changed_adapter_of_the_rollouts(world, tmp_path, capsys):
    path, out = world / "few.safetensors", tmp_path / "out"

    def write(seed):
        torch.manual_seed(seed)
        layer = LoraLayer(torch.randn(2, 24), torch.randn(24, 2), 2.0)
        write_lora({"blocks.0.attn1.to_q": layer}, path, "comfyui")

    write(0)
    rollout = {"adapter": str(path), "stride": 2, "solver_order": 1, "check_every": 1}
    changes = {"run.steps": 1, "objectives": ["prfl"], "rollout": rollout}
    changes |= {"prfl.num_inference_steps": 6, "prfl.points": 2}
    assert call("train", world, out, changes) == 0
    assert log(out)[-1]["prfl/drift"] > 1e-3
    changes["run.steps"] = 2
    write(1)
    error = refused(capsys, "train", world, out, changes)
    assert "rollout.adapter: fingerprint" in error and "--accept-changed-inputs" in error
    assert call("train", world, out, changes, "--accept-changed-inputs") == 0
    rollout["adapter"] = [str(path), None]
    error = refused(capsys, "train", world, out, changes)
    assert "rollout.adapter is [" in error and "one value for one transformer" in error
    rollout["adapter"] = str(world / "gone.safetensors")
    error = refused(capsys, "train", world, tmp_path / "other", changes)
    assert "rollout.adapter is" in error and "gone.safetensors', expected a file" in error


@pytest.mark.cases(1)
@pytest.mark.parametrize("name", ["data", "reward"])
def test_an_input_that_moved(world, tmp_path, capsys, name):
    changes = {"run.steps": 1}
    assert call("train", world, tmp_path / "out", changes) == 0
    moved = (world / name).rename(world / "moved")
    changes = {"run.steps": 2, name: str(moved)}
    assert f"began with {name} = " in refused(capsys, "train", world, tmp_path / "out", changes)
    assert call("train", world, tmp_path / "out", changes, "--accept-changed-inputs") == 0


def test_deep_reads_every_sample(world, tmp_path, capsys):
    assert call("train", world, tmp_path / "out", None, "--check", "--deep") == 0
    assert "--check --deep" in refused(capsys, "train", world, tmp_path / "out", None, "--deep")
    path = sorted((world / "data" / "samples").iterdir())[3]
    tensors = load_tensors(path)
    tensors["latents"] *= 50
    save_tensors(tensors, path)
    assert call("train", world, tmp_path / "out", None, "--check") == 0
    for command in ("train", "train-reward"):
        arguments = (world, tmp_path / "out", None, "--check", "--deep")
        assert "(z - mean) / std" in refused(capsys, command, *arguments)
    assert not (tmp_path / "out").exists()


def test_a_run_says_where_it_is(root, tmp_path, capsys):
    out, changes = tmp_path / "out", {**SFT, "lora.lora_rank": 2, "optimizer": {}}
    assert call("train", root, out, changes) == 0
    said = capsys.readouterr()
    assert "optimizer.learning_rate is 0.0001, for adapters" in said.err
    assert "train: step 1 of 2, sft/loss" in said.out and "0:00:00 left" in said.out
    assert f"adapter, for load_lora_weights: {out / 'final'}" in said.out
    assert (out / "final" / "pytorch_lora_weights.safetensors").is_file()
    assert call("train", root, out, changes) == 0
    said = capsys.readouterr().out
    assert f"resumed from {out / 'step-00000002'}" in said
    assert "already finished at step 2 of 2" in said


def test_the_folder_of_a_pipeline_is_a_model(world, tmp_path):
    (world / "pipeline").mkdir()
    (world / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    shutil.move(world / "model", world / "pipeline" / "transformer")
    train(world, tmp_path / "out", {**SFT, "model": str(world / "pipeline")})


def test_seeds_of_any_size(root, tmp_path):
    train(root, tmp_path / "out", {**SFT, "run.seed": 10**30})


def test_fingerprints_see_small_changes_of_large_files(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 18))
    before = fingerprint(path)
    assert fingerprint(tmp_path) != before  # with its name
    path.write_bytes(bytes(b ^ 1 for b in path.read_bytes()))
    assert fingerprint(path) != before
