"""The command line: bad input is one line, and nothing is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import call, negative_file, one_line, refused
from latent_reward import edit_tensors
from runs import config, log, samples, write_config

from prfl_fast.cli import loading
from prfl_fast.cli import main as cli
from prfl_fast.data.manifest import write_dataset


def truncate(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def new_data(**options):
    def damage(path):
        shutil.rmtree(path)
        write_dataset(path, samples(4, **options))

    return damage


def tensors(change):
    return lambda path: edit_tensors(path, change)


def latents(change):
    """Replace the latents of a sample by what ``change`` makes of them."""
    return tensors(lambda t: t.update(latents=change(t["latents"]).contiguous()))


def of_class(name):
    def damage(path):
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))

    return damage


def relabel(path):
    path.write_text(path.read_text().replace('"motion_quality": 1', '"motion_quality": 3'))


def guided(negative, **options):
    return {"prfl.guidance": {"guidance_scale": 5, "negative": negative, **options}}


DATA, WEIGHTS = "data/samples/000001.safetensors", "model/diffusion_pytorch_model.safetensors"
MODEL, REWARD, MANIFEST = "model/config.json", "reward/model.safetensors", "data/manifest.jsonl"
SEVERAL = [{"name": name, "path": "nowhere"} for name in "ab"]
LOSERS = {"loss": "bt", "lose_data": "../WORLD/data"}
TWO_OUTPUTS = {"head.fc3.bias": torch.ones(2)}
# A command, what to change in its valid configuration, and a part of the error. What the file alone
# can tell is in test_config.py.
BAD = [
    ("train", {"prfl.schedule": "wam"}, "prfl.schedule is 'wam', expected one of wan, diffusers"),
    ("train", {"prfl": {"solver": "euler", "schedule": "diffusers"}}, "no value with solver: eu"),
    ("score", {"timestep": [1]}, "unknown key 'timestep': did you mean 'timesteps'?"),
    ("train", {"run.gradient_accumulation_steps": 0}, "run.gradient_accumulation_steps is 0, expe"),
    ("score", {"timesteps": []}, "timesteps is [], expected a list of one or more"),
    ("train", {"hardware.precision": "fp16"}, "expected one of fp32, bf16"),
    ("train", {"hardware.device": "gpu"}, "hardware.device is 'gpu', expected auto, cpu"),
    ("train", {"hardware.device": "cuda:99"}, "hardware.device is 'cuda:99', expected auto, cpu"),
    ("train", {"memory.optimizer": "paged-adamw8bit"}, "optimizer is 'paged-adamw8bit', expected "),
    ("train-reward", {"memory.optimizer": "paged-adamw8bit"}, "optimizer is 'paged-adamw8bit', ex"),
    ("score", {"memory.offload": "cpu"}, "unknown key 'memory'"),
    ("train", {"prfl.method": "instructvideo"}, "prfl.segments is 4, expected at most 2, the fram"),
    ("train", {"reward": SEVERAL}, "nowhere is not a saved reward model"),
    ("train", guided("nowhere"), "nowhere: no such file"),
    ("train", {**guided("nowhere"), "objectives": ["sft"]}, "nowhere: no such file"),
    ("train", guided("../NEGATIVE-5-20"), "expected the dataset's [3, 20]. Pad it, or set batche"),
    ("train", guided("../NEGATIVE-513-20", batched=False), "expected 1 to 512 text tokens"),
    ("train", guided("../NEGATIVE-3-24", batched=False), "is float32[3, 24] on cpu, expected "),
    ("train", guided(f"../WORLD/{DATA}"), "holds ['encoder_hi"),
    ("train", {"model": "nowhere"}, "model: nowhere has no config.json"),
    ("train", {"data": "nowhere"}, "nowhere: no manifest.jsonl there"),
    ("train", {"reward": "nowhere"}, "nowhere is not a saved reward model"),
    ("train", {"run.resume": "nowhere"}, "nowhere: not a checkpoint of this library"),
    ("train", {"out": "../FILE/out"}, "is a file"),
    ("score", {"out": "../FOLDER.jsonl"}, "expected a file, but it is a folder"),
    ("train", {"run.batch_size": 5}, "batch_size is 5, expected at most 4, the samples"),
    ("train", {"data": "../WORLD/pairs"}, "holds preference pairs, expected single videos"),
    ("train", {"text_drop": 0.1}, "empty_prompt.safetensors: no such file, expected encoder_hi"),
    ("train", {"short_captions": 0.3}, "short_captions is 0.3, expected 0 for "),
    ("train-reward", {"loss": "bt"}, "ce takes single videos, bt pairs"),
    ("train-reward", {"lose_data": "../WORLD/data"}, "expected no value with loss: ce"),
    ("train-reward", {**LOSERS, "data": "../WORLD/pairs"}, "expected single videos with lo"),
    ("train-reward", {**LOSERS, "lose_data": "../WORLD/pairs"}, "pairs, expected single videos"),
    ("train-reward", {"label": "beauty"}, "label beauty is null, expected 0, 1,"),
    ("train-reward", {"label": "blur_quality"}, "label blur_quality is null, expected 0, 1"),
    ("train-reward", {"num_blocks": 9}, "num_blocks is 9, expected 1 to 1"),
    ("train-reward", {"num_heads": 7}, "num_heads"),
    ("train", {"rollout.sparse_dense_layers": [0, 1]}, "rollout.sparse_dense_layers is [0, 1], ex"),
    ("train", {"lora": {"lora_rank": 2, "target_modules": ["zzz"]}}, "zzz"),
]
# A command, a file and how to damage it, and a part of the error.
DAMAGED = [
    ("train", MODEL, truncate, "is not the configuration of a diffuse"),
    ("train", MODEL, of_class("FluxTransformer2DModel"), "model/config.json"),
    ("train", MODEL, of_class("X"), "names 'X'"),
    ("train", WEIGHTS, truncate, "model cannot be loaded"),
    ("train", WEIGHTS, tensors(lambda t: t.pop("proj_out.bias")), "has missing keys: proj_out.b"),
    ("train", REWARD, truncate, "not a whole safetensors file"),
    ("train", REWARD, tensors(lambda t: t.update(TWO_OUTPUTS)), "head.fc3.bias [2], expected [1]"),
    ("score", "reward/config.json", truncate, "not the configuration of a reward"),
    ("train", MANIFEST, lambda p: p.write_text(""), "manifest.jsonl is '', expected one JSON"),
    ("train", MANIFEST, lambda p: truncate(p, 0.9), "manifest.jsonl:4: not JSON"),
    ("train", DATA, Path.unlink, "manifest.jsonl:2: latents: "),
    ("train", DATA, truncate, "not a whole safetensors file"),
    ("train", DATA, latents(lambda x: x.long()), "dtype of latents is 'int64', expected"),
    ("train", DATA, latents(lambda x: x[:, 0]), "latents is [16, 4, 4], expected 4 dimensions"),
    ("train", DATA, latents(lambda x: x[:8]), "as on earlier lines"),
    ("train", "data", new_data(size=(2, 5, 4)), "does not fit"),
    ("train", "data", new_data(width=24), "expected [B, T, 20]"),
    ("score", "data", new_data(width=24), "does not fit the reward model"),
    ("train", "data", new_data(rows=513), "expected 1 to 512 text tokens"),
    ("score", "data", new_data(rows=513), "expected 1 to 512 text tokens"),
    ("train-reward", MANIFEST, relabel, "manifest.jsonl:2: label motion_quality is 3"),
]


CASES = [(command, changes, None, None, message) for command, changes, message in BAD]
CASES += [(command, {}, file, damage, message) for command, file, damage, message in DAMAGED]


@pytest.mark.parametrize(("command", "changes", "file", "damage", "message"), CASES)
def test_bad_input_is_one_line_and_writes_nothing(
    root, tmp_path, monkeypatch, capsys, command, changes, file, damage, message
):
    world = root
    if damage is not None:
        world = shutil.copytree(root, tmp_path / "world")
        damage(world / file)
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    (tmp_path / "FILE").write_text("x")
    (tmp_path / "FOLDER.jsonl").mkdir()
    for shape in ((5, 20), (3, 24), (513, 20)):
        negative_file(tmp_path / "NEGATIVE-{}-{}".format(*shape), *shape)
    (tmp_path / "WORLD").symlink_to(world)
    content = config(command, world, place / "out", changes)
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    assert cli.main([command, str(write_config(tmp_path / "c.yaml", content))]) == 2
    assert message in one_line(capsys, command)
    assert list(place.iterdir()) == [] and (tmp_path / "FILE").read_text() == "x"
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before


PARTS = {"transformer": "nowhere", "mlp": "mlp.pt", "pool": "pool.pt"}


@pytest.mark.parametrize(
    ("command", "reward", "message"),
    [
        ("train", "nowhere", "nowhere is not a saved reward model"),
        ("train", "unfinished", "unfinished/model.safetensors: no such file"),
        ("train", PARTS, "nowhere: no such file or folder, expected the reward's transformer"),
        ("score", PARTS, "nowhere: no such file or folder, expected the reward's transformer"),
    ],
)
def test_missing_rewards_are_found_before_a_model_is_read(
    root, tmp_path, monkeypatch, capsys, command, reward, message
):
    monkeypatch.setattr(loading, "load_transformer", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    shutil.copy(root / "reward" / "config.json", "unfinished")
    changes = {"reward": reward, "model": str(root / "model")}
    assert message in refused(capsys, command, root, tmp_path / "out", changes)


def test_nan_latents_stop_the_run_and_leave_whole_files(world, tmp_path, capsys):
    for path in (world / "data" / "samples").iterdir():
        edit_tensors(path, lambda t: t["latents"][0, 0, 0, 0].fill_(torch.nan))
    out = tmp_path / "out"
    assert "1 NaN or infinite values" in refused(capsys, "train", world, out)
    assert {p.name for p in out.iterdir()} == {"config.yaml", "log.jsonl"} and log(out) == []
    assert "1 NaN or infinite values" in refused(capsys, "score", world, out)
    assert not out.with_suffix(".jsonl").exists()


def test_a_checkpoint_of_another_run_is_refused(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("train", root, out, {"run.steps": 1}) == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for changes, message in (
        ({"optimizer.learning_rate": 1.0}, "made with learning_rate = 0.001, this run has 1.0"),
        ({"prfl.num_inference_steps": 5}, "made with prfl.num_inference_steps = 3, this run has 5"),
        ({"lora.lora_rank": 2}, "made with lora"),
        ({"run.resume": None}, "expected one without step-00000001"),
    ):
        assert message in refused(capsys, "train", root, out, changes)
    truncate(out / "step-00000001" / "state.pt")
    assert "state.pt is " in refused(capsys, "train", root, out)
    before.pop(out / "step-00000001" / "state.pt")
    assert {p: p.read_bytes() for p in before} == before
