"""Runs of a generator with two experts: folders, YAML keys, checks, training, resume."""

import json
import shutil

import pytest
import yaml
from runs import config, log, write_config
from safetensors.torch import save_file
from torch import ones
from wan import tiny_wan

from prfl_fast.cli.main import main

LORA = {"lora__lora_rank": 2}


@pytest.fixture(scope="module")
def pipeline(root, tmp_path_factory):
    """Return the folder of a pipeline with two tiny experts."""
    folder = tmp_path_factory.mktemp("experts") / "pipeline"
    shutil.copytree(root / "model", folder / "transformer")
    tiny_wan(layers=1, heads=1, text_tokens=512, seed=3).save_pretrained(folder / "transformer_2")
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    index["transformer_2"] = index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def run(root, model, tmp_path, command="train", *, check=False, out="out", **changes):
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    content = config(command, root, tmp_path / out, {"model": model, **keys})
    path = write_config(tmp_path / "run.yaml", json.dumps(content, default=str))
    return main([command, str(path), *(["--check"] if check else [])])


def test_a_pipeline_trains_both_experts_and_resumes(root, pipeline, tmp_path, capsys):
    negative = tmp_path / "negative.safetensors"
    save_file({"encoder_hidden_states": ones(3, 20)}, negative)
    guidance = {"guidance_scale": [4.0, 3.0], "negative": str(negative)}
    changes = {**LORA, "prfl__num_inference_steps": 6, "prfl__guidance": guidance}
    assert run(root, pipeline, tmp_path, check=True, **changes) == 0
    checked = yaml.safe_load(capsys.readouterr().out)
    assert checked["model"] == str(pipeline) and checked["train"] is None
    assert run(root, pipeline, tmp_path, **changes) == 0
    saved = sorted(
        p.relative_to(tmp_path / "out" / "final").as_posix()
        for p in (tmp_path / "out" / "final").rglob("*.safetensors")
    )
    names = [f"transformer{n}/pytorch_lora_weights.safetensors" for n in ("", "_2")]
    assert saved == names
    assert run(root, pipeline, tmp_path, out="parts", run__steps=2, **changes) == 0
    assert run(root, pipeline, tmp_path, out="parts", **changes) == 0
    assert log(tmp_path / "out") == log(tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts")


def test_two_folders_train_one_expert_in_full(root, pipeline, tmp_path, capsys):
    model = {"high": str(pipeline / "transformer"), "low": str(pipeline / "transformer_2")}
    model["boundary"] = 0.9
    more = {"train": "low", "prfl__num_inference_steps": 6, "run__steps": 2}
    assert run(root, model, tmp_path, **more) == 0
    assert [p.name for p in (tmp_path / "out" / "final").iterdir()] == ["transformer_2"]
    assert "generator: " in capsys.readouterr().out


def refused(capsys, *args, **changes):
    assert run(*args, check=True, **changes) == 2
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def test_errors_are_one_line(root, pipeline, tmp_path, capsys):
    here = (root, pipeline, tmp_path)
    line = refused(capsys, *here)
    assert "train is null, expected high or low without lora" in line
    line = refused(capsys, root, root / "model", tmp_path, train="low")
    assert "train is 'low', expected no value for a model with one transformer" in line
    line = refused(capsys, *here, **LORA, prfl__method="draft")
    assert "prfl.window is" in line and "expert high" in line
    line = refused(capsys, root, {"high": "x", "low": "y", "boundary": 875}, tmp_path)
    assert "model.boundary is 875" in line
    broken = shutil.copytree(pipeline, tmp_path / "broken")
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "boundary_ratio": None}))
    line = refused(capsys, root, broken, tmp_path)
    assert "boundary_ratio is null, expected a number. Give the folders: {high: " in line
    shutil.rmtree(broken / "transformer_2")
    line = refused(capsys, root, broken, tmp_path)
    assert "transformer_2 is 'missing', expected the second transformer" in line
    for name in ("high", "low"):
        shutil.copytree(pipeline / "transformer", tmp_path / "official" / f"{name}_noise_model")
    line = refused(capsys, root, tmp_path / "official", tmp_path)
    assert "model_type is null, expected t2v or i2v. Or give {high: " in line
    line = refused(capsys, *here, "train-reward")
    assert "has two experts, expected one: " in line and "transformer_2 (low noise)" in line
