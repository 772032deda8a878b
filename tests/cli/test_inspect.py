"""What inspect says of each kind of path."""

import json

import pytest
import torch
from commands import one_line, train
from list_files import OTHER_NAMES, TEMPLATE, write
from runs import samples

pytest.importorskip("pydantic")

from prfl_fast.cli import main as cli
from prfl_fast.data import write_dataset


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Train an adapter of rank 2 for two steps, with a checkpoint of each."""
    out = tmp_path_factory.mktemp("run") / "out"
    steps = {"run.steps": 2, "run.save_every": 1, "run.keep_last": 2, "objectives": ["sft"]}
    train(root, out, {"lora.lora_rank": 2, "reward": ..., **steps})
    return out


def said(capsys, path):
    """Return the words of each line that inspect prints of a path."""
    capsys.readouterr()
    assert cli.main(["inspect", str(path)]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_a_dataset(tmp_path, capsys):
    items = [*samples(3), *samples(5, 1, size=(3, 4, 6), rows=2)]
    items = [s._replace(latents=s.latents + 0.5) for s in items]
    write_dataset(tmp_path, items)
    lines = said(capsys, tmp_path)
    assert ["videos:", "8"] in lines
    assert ["16×3×4×6", "9×32×48", "5", "62%"] in lines
    assert ["16×2×4×4", "5×32×32", "3", "38%"] in lines
    assert ["motion_quality", "0:", "5", "(62%),", "1:", "3", "(38%)", "0"] in lines
    means = torch.stack([torch.cat([s.latents[c].flatten() for s in items]) for c in range(16)])
    for c, (mean, std) in enumerate(zip(means.mean(1), means.std(1, correction=0), strict=True)):
        assert [str(c), f"{mean:.3f}", f"{std:.3f}"] in lines
    assert "latents are scaled as normalized latents are".split() == lines[-1][:7]
    write_dataset(tmp_path / "raw", [s._replace(latents=s.latents * 2) for s in items])
    assert "(z - mean) / std" in " ".join(said(capsys, tmp_path / "raw")[-1])


def test_a_list_of_the_reference(tmp_path, capsys):
    videos = [(TEMPLATE, {"physics_quality": 1, "human_quality": None})]
    videos += [(OTHER_NAMES, {"physics_quality": "good", "human_quality": "good"})]
    lines = said(capsys, write(tmp_path, *videos)[0])
    assert ["videos:", "2"] in lines and ["human_quality", "good:", "1", "(100%)", "1"] in lines
    assert ["motion_quality", "(both)", "1.0:", "1", "(100%)", "1"] in lines
    assert "latent_condition" in " ".join(" ".join(line) for line in lines)


def test_a_run_its_checkpoint_and_its_adapter(run, capsys):
    lines = said(capsys, run)
    assert [line[0::2] for line in lines if line[-1:] == ["whole"]] == [["1", "whole"]] + [
        ["2", "whole"]
    ]
    lines = said(capsys, run / "step-00000002")
    assert ["step:", "2"] in lines
    assert "digests of all files are as written".split() in lines
    assert any(line[:1] == ["train.lora"] or "lora.lora_rank" in line for line in lines)
    for path in (run / "final", run / "final" / "pytorch_lora_weights.safetensors"):
        text = "\n".join(" ".join(line) for line in said(capsys, path))
        assert "ranks: 2 (" in text and "alpha: 2 (" in text


def test_models(root, capsys):
    text = "\n".join(" ".join(line) for line in said(capsys, root / "reward"))
    assert "num blocks: 1" in text and "digests: of all files as written" in text
    text = "\n".join(" ".join(line) for line in said(capsys, root / "model"))
    assert "class: WanTransformer3DModel" in text and "in channels: 16" in text


def test_damage_and_other_files_are_one_line(world, run, tmp_path, capsys):
    weights = world / "reward" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.list").write_text("no.json\n")
    for path, message in (
        (world / "reward", "SHA-256 of"),
        (tmp_path / "none", "expected a file or folder that exists"),
        (tmp_path / "notes.txt", "expected a dataset folder (manifest.jsonl), a list"),
        (tmp_path, "expected a dataset folder (manifest.jsonl), a list"),
        (tmp_path / "bad.list", "bad.list:1: no.json: not a readable JSON file"),
    ):
        capsys.readouterr()
        assert cli.main(["inspect", str(path)]) == 2
        assert message in one_line(capsys, "inspect")
    manifest = run / "step-00000001" / "checkpoint.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "step": 7}))
    try:
        assert sum("SHA-256" in line for line in said(capsys, run)) >= 1
    finally:
        manifest.write_text(text)
