"""The command line: bad input is one line, and nothing is written."""

import json
import shutil

import pytest
import torch
from commands import call, negative_file, one_line
from runs import config, log, samples, write_config

from prfl_fast.cli import main as cli
from prfl_fast.data.manifest import write_dataset
from prfl_fast.utils.io import load_tensors, save_tensors


def truncate(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def new_data(world, **options):
    shutil.rmtree(world / "data")
    write_dataset(world / "data", samples(4, **options))


def nan_latents(world):
    for path in (world / "data" / "samples").iterdir():
        tensors = load_tensors(path)
        tensors["latents"][0, 0, 0, 0] = torch.nan
        save_tensors(tensors, path)


def retensor(path, change):
    tensors = load_tensors(path)
    change(tensors)
    save_tensors(tensors, path)


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def relabel(world, value):
    path = world / "data" / "manifest.jsonl"
    path.write_text(path.read_text().replace('"motion_quality": 1', f'"motion_quality": {value}'))


DATA, WEIGHTS = "data/samples/000001.safetensors", "model/diffusion_pytorch_model.safetensors"
MANIFEST = "data/manifest.jsonl"
# A command, what to change in its valid configuration, and a part of the error.
BAD = [
    ("train", {"prlf": 1}, "unknown key 'prlf': did you mean 'prfl'?"),
    ("train", {"optimizer.lerning_rate": 1}, "did you mean 'learning_rate'?"),
    ("score", {"timestep": [1]}, "unknown key 'timestep': did you mean 'timesteps'?"),
    ("train", {"optimizer.learning_rate": -1e-05}, "optimizer.learning_rate is '-1e-05'"),
    ("train", {"optimizer.learning_rate": "high"}, "'high', expected a number"),
    ("train", {"run.steps": 1.5}, "run.steps is 1.5, expected a whole number"),
    ("train", {"run.steps": ...}, "run.steps is missing"),
    ("train", {"run.gradient_accumulation_steps": 0}, "run.gradient_accumulation_steps is 0, expe"),
    ("train", {"objectives": []}, "objectives is [], expected a list of one or more"),
    ("score", {"timesteps": []}, "timesteps is [], expected a list of one or more"),
    ("score", {"timesteps": [2000]}, "timesteps[0] is 2000"),
    ("train", {"prfl.points": 9}, "prfl.points is 9, expected at most 2"),
    ("train", {"hardware.precision": "fp16"}, "expected one of fp32, bf16"),
    ("train", {"hardware.device": "gpu"}, "hardware.device is 'gpu', expected auto, cpu"),
    ("train", {"hardware.device": "cuda:99"}, "hardware.device is 'cuda:99', expected auto, cpu"),
    ("train", {"memory.activation_checkpointing": "atention"}, "memory.activation_checkpointing i"),
    ("train", {"hardware.gradient_checkpointing": True}, "unknown key 'hardware.gradient_checkpoi"),
    ("train", {"memory": "24GiB"}, "memory is '24GiB', expected auto or"),
    ("train", {"memory": "auto"}, "hardware.precision is 'fp32', expected bf16 with"),
    ("train", {"memory.offload": "disk"}, "expected cpu or null"),
    ("train", {"memory.feed_forward_chunk": 0}, "memory.feed_forward_chunk is 0, expected a whole"),
    ("train", {"memory.weight_dtype": "nf4", "hardware.precision": "bf16"}, "memory.weight_dtype "),
    ("train", {"memory.weight_dtype": "nf4", "lora.lora_rank": 2}, "memory.weight_dtype is 'nf4',"),
    ("train", {"memory.optimizer": "lion"}, "expected one of adamw, "),
    ("train", {"memory.optimizer": "paged-adamw8bit"}, "optimizer is 'paged-adamw8bit', expected "),
    ("train-reward", {"memory.optimizer": "paged-adamw8bit"}, "optimizer is 'paged-adamw8bit', ex"),
    ("train-reward", {"memory": "auto"}, "memory is 'auto', expected a mapping with keys weight_d"),
    (
        "train-reward",
        {"memory.weight_dtype": "nf4", "hardware.precision": "bf16"},
        "memory.weight_dtype is 'nf4', expected one of fp32, bf16",
    ),
    ("score", {"memory.offload": "cpu"}, "unknown key 'memory'"),
    ("train", {"reward": ...}, "reward is missing, expected a reward model for the prfl"),
    ("train", {"prfl.method": "refl", "prfl.points": 2}, "prfl.points is 2, expected no value wit"),
    ("train", {"prfl.divergence": 0.1}, "prfl.divergence is 0.1, expected 0.0 without adapters. A"),
    ("train", {"prfl.method": "instructvideo"}, "prfl.segments is 4, expected at most 2, the fram"),
    (
        "train",
        {"reward": [{"name": "a", "path": "nowhere"}, {"name": "b", "path": "nowhere"}]},
        "nowhere is not a saved reward model",
    ),
    (
        "train",
        {"prfl.guidance": {"guidance_scale": 5, "negative": "nowhere"}},
        "nowhere: no such file",
    ),
    (
        "train",
        {"prfl.guidance": {"guidance_scale": 5, "negative": "nowhere"}, "objectives": ["sft"]},
        "nowhere: no such file",
    ),
    (
        "train",
        {"prfl.guidance": {"guidance_scale": 5, "negative": "NEGATIVE-5-20"}},
        "expected the dataset's [3, 20]. Pad it, or set batched: false",
    ),
    (
        "train",
        {"prfl.guidance": {"guidance_scale": 5, "negative": "NEGATIVE-3-24", "batched": False}},
        "encoder_hidden_states is float32[3, 24] on cpu, expected the dataset's [3, 20]",
    ),
    ("train", {"prfl.guidance": {"guidance_scale": 5, "negative": "SAMPLE"}}, "holds ['encoder_hi"),
    ("score", {"out": "scores.txt"}, "expected a name that ends in .jsonl or .csv"),
    ("train", {"model": "nowhere"}, "model: nowhere has no config.json"),
    ("train", {"data": "nowhere"}, "nowhere: no manifest.jsonl there"),
    ("train", {"reward": "nowhere"}, "nowhere is not a saved reward model"),
    ("train", {"run.resume": "nowhere"}, "nowhere: not a checkpoint of this library"),
    ("train", {"out": "FILE/out"}, "is a file"),
    ("score", {"out": "FOLDER.jsonl"}, "expected a file, but it is a folder"),
    ("train", {"run.batch_size": 5}, "batch_size is 5, expected at most 4, the samples"),
    ("train", {"data": "WORLD/pairs"}, "train needs single videos"),
    ("train-reward", {"loss": "bt"}, "ce takes single videos, bt pairs"),
    ("train-reward", {"label": "beauty"}, "label is 'beauty', expected one of"),
    ("train-reward", {"label": "blur_quality"}, "label blur_quality is None, expected 0, 1"),
    ("train-reward", {"num_blocks": 9}, "num_blocks is 9, expected 1 to 1"),
    ("train-reward", {"num_heads": 7}, "num_heads"),
    ("train", {"lora": {"lora_rank": 2, "target_modules": ["zzz"]}}, "zzz"),
]
# A command, how to damage the files it names, and a part of the error.
DAMAGED = [
    ("train", lambda w: truncate(w / "model/config.json"), "is not the configuration of a diffuse"),
    (
        "train",
        lambda w: edit_json(w / "model/config.json", _class_name="FluxTransformer2DModel"),
        "model/config.json",
    ),
    ("train", lambda w: edit_json(w / "model/config.json", _class_name="X"), "names 'X'"),
    ("train", lambda w: truncate(w / WEIGHTS), "model cannot be loaded"),
    (
        "train",
        lambda w: retensor(w / WEIGHTS, lambda t: t.pop("proj_out.bias")),
        "has missing keys: proj_out.bias",
    ),
    ("train", lambda w: truncate(w / "reward/model.safetensors"), "not a whole safetensors file"),
    (
        "train",
        lambda w: retensor(
            w / "reward/model.safetensors", lambda t: t.update({"head.fc3.bias": torch.ones(2)})
        ),
        "head.fc3.bias [2], expected [1]",
    ),
    ("score", lambda w: truncate(w / "reward/config.json"), "not the configuration of a reward"),
    ("train", lambda w: (w / MANIFEST).write_text(""), "manifest.jsonl is '', expected one JSON"),
    ("train", lambda w: truncate(w / MANIFEST, 0.9), "manifest.jsonl:4: not JSON"),
    ("train", lambda w: (w / DATA).unlink(), "manifest.jsonl:2: latents: "),
    ("train", lambda w: truncate(w / DATA), "not a whole safetensors file"),
    (
        "train",
        lambda w: retensor(w / DATA, lambda t: t.update(latents=t["latents"].long())),
        "dtype of latents is 'int64', expected one of float32",
    ),
    (
        "train",
        lambda w: retensor(w / DATA, lambda t: t.update(latents=t["latents"][:, 0].clone())),
        "latents is [16, 4, 4], expected 4 dimensions",
    ),
    (
        "train",
        lambda w: retensor(w / DATA, lambda t: t.update(latents=t["latents"][:, :1].clone())),
        "as on earlier lines",
    ),
    ("train", lambda w: new_data(w, size=(2, 5, 4)), "does not fit"),
    ("train", lambda w: new_data(w, width=24), "expected [B, T, 20]"),
    ("score", lambda w: new_data(w, width=24), "does not fit the reward model"),
    ("train-reward", lambda w: relabel(w, 3), "manifest.jsonl:2: label motion_quality is 3"),
]


CASES = [(command, changes, None, message) for command, changes, message in BAD]
CASES += [(command, {}, damage, message) for command, damage, message in DAMAGED]


@pytest.mark.parametrize(("command", "changes", "damage", "message"), CASES)
def test_bad_input_is_one_line_and_writes_nothing(
    root, tmp_path, monkeypatch, capsys, command, changes, damage, message
):
    world = root
    if damage is not None:
        world = shutil.copytree(root, tmp_path / "world")
        damage(world)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "FOLDER.jsonl").mkdir()
    for shape in ((5, 20), (3, 24)):
        negative_file(tmp_path / "NEGATIVE-{}-{}".format(*shape), *shape)
    # Paths that the table cannot know.
    paths = {name: tmp_path / name for name in ("FILE/out", "FOLDER.jsonl")}
    paths |= {name: tmp_path / name for name in ("NEGATIVE-5-20", "NEGATIVE-3-24")}
    paths |= {"WORLD/pairs": root / "pairs", "SAMPLE": world / DATA}
    text = json.dumps(config(command, world, place / "out", changes))
    for name, place_of in paths.items():
        text = text.replace(f'"{name}"', json.dumps(str(place_of)))
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    assert cli.main([command, str(write_config(tmp_path / "c.yaml", text))]) == 2
    assert message in one_line(capsys, command)
    assert list(place.iterdir()) == [] and (tmp_path / "FILE").read_text() == "x"
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before


def test_nan_latents_stop_the_run_and_leave_whole_files(world, tmp_path, capsys):
    nan_latents(world)
    out = tmp_path / "out"
    assert call("train", world, out) == 2
    assert "1 NaN or infinite values" in one_line(capsys, "train")
    assert {p.name for p in out.iterdir()} == {"config.yaml", "log.jsonl"} and log(out) == []
    assert call("score", world, out) == 2
    assert "1 NaN or infinite values" in one_line(capsys, "score")
    assert not out.with_suffix(".jsonl").exists()


def test_a_checkpoint_of_another_run_is_refused(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("train", root, out, {"run.steps": 1}) == 0
    capsys.readouterr()
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for changes, message in (
        ({"optimizer.learning_rate": 1.0}, "made with learning_rate = 0.001, this run has 1.0"),
        ({"prfl.num_inference_steps": 5}, "made with prfl.num_inference_steps = 3, this run has 5"),
        ({"lora.lora_rank": 2}, "made with lora"),
        ({"run.resume": None}, "expected one without step-00000001"),
    ):
        assert call("train", root, out, changes) == 2
        assert message in one_line(capsys, "train")
    truncate(out / "step-00000001" / "state.pt")
    assert call("train", root, out) == 2
    assert "state.pt is " in one_line(capsys, "train")
    before.pop(out / "step-00000001" / "state.pt")
    assert {p: p.read_bytes() for p in before} == before


@pytest.mark.parametrize("text", ["a: [", "", "- 1\n", "model: m\nmodel: m\n"])
def test_unreadable_yaml(tmp_path, capsys, text):
    path = write_config(tmp_path / "c.yaml", text)
    assert cli.main(["train", str(path)]) == 2
    assert str(path) in one_line(capsys, "train")


def test_yaml_that_is_not_there(tmp_path, capsys):
    assert cli.main(["score", str(tmp_path / "c.yaml")]) == 2
    assert "cannot be read: No such file" in one_line(capsys, "score")
