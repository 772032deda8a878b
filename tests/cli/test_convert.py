"""``prfl-fast convert`` and ``prfl-fast merge``, and ``model:`` in every layout."""

import json
import shutil

import pytest
import torch
from commands import call, one_line, refused, train

from prfl_fast.cli import main as cli
from prfl_fast.models.loading import load_transformer, read_wan
from prfl_fast.models.lora_files import read_lora, write_lora
from prfl_fast.models.lora_layer import LoraLayer
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.io import load_tensors, save_tensors
from prfl_fast.utils.shards import read_state

pytest.importorskip("safetensors")


def convert(source, out, layout):
    """Run the command, which must succeed, and return ``out``."""
    assert cli.main(["convert", str(source), str(out), "--layout", layout]) == 0
    return out


def adapter(path):
    """Write a LoRA of the world's model in kohya's layout and return its path."""
    torch.manual_seed(0)
    layer = LoraLayer(torch.randn(2, 48), torch.randn(48, 2), 1.5)
    write_lora({"blocks.0.attn1.to_q": layer}, path, "kohya")
    return path


@pytest.mark.slow
def test_a_run_takes_every_layout_of_its_model(root, tmp_path, capsys):
    wanted = train(root, tmp_path / "a", {"run.steps": 2})
    official = convert(root / "model", tmp_path / "official", "official")
    assert f"generator: {official}" in capsys.readouterr().out
    found = train(root, tmp_path / "b", {"run.steps": 2, "model": str(official)})
    # diffusers maps weights where they lie in the file, and products of unaligned ones round
    # differently.
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(official / "config.json", other)
    file = convert(official, other / "comfyui.safetensors", "comfyui")
    for command in ("train", "train-reward"):
        assert call(command, root, tmp_path / "c", {"model": str(file)}, "--check") == 0
    sizes = ["--frames", "5", "--height", "64", "--width", "64", "--reward-blocks", "1"]
    assert cli.main(["plan", "--model", str(official), "--budget", "1GiB", *sizes]) == 0
    (other / "config.json").unlink()
    error = refused(capsys, "train", root, tmp_path / "c", {"model": str(file)}, "--check")
    assert "num_heads is 0, expected a divisor of" in error


def test_a_trained_adapter_travels_and_merges(root, tmp_path):
    train(root, tmp_path / "run", {"run.steps": 1, "lora": {"lora_rank": 2}})
    final = tmp_path / "run" / "final"
    source = final
    for i, layout in enumerate(("kohya", "comfyui", "official", "diffusers")):
        source = convert(source, tmp_path / f"{i}.safetensors", layout)
    wanted = load_tensors(final / "pytorch_lora_weights.safetensors")
    found = load_tensors(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    merged = str(tmp_path / "merged")
    assert cli.main(["merge", str(root / "model"), str(tmp_path / "0.safetensors"), merged]) == 0
    before, after = (read_wan(path).weights for path in (root / "model", merged))
    lora = read_lora(final)
    for name, tensor in before.items():
        layer = lora.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        assert torch.equal(after[name], tensor if layer is None else tensor + layer.delta())
    load_transformer(merged)


def test_a_reward_travels(root, tmp_path, capsys):
    first = convert(root / "reward", tmp_path / "files", "official")
    assert (first / "mlp" / "mlp_step_0.ckpt").is_file()
    second = convert(first, tmp_path / "reward", "diffusers")
    third = convert(second, tmp_path / "again", "official")
    assert f"reward model: {third}" in capsys.readouterr().out
    for file in (f.relative_to(first) for f in first.rglob("*") if f.is_file()):
        if file.suffix == ".ckpt":  # holds the random name of its temporary file
            one, two = (read_state(folder / file) for folder in (first, third))
            assert list(one) == list(two)
            assert all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)
        else:
            assert (first / file).read_bytes() == (third / file).read_bytes(), file
    name = "model.safetensors"
    assert (second / name).read_bytes() == (root / "reward" / name).read_bytes()
    configs = [json.loads((p / "config.json").read_text()) for p in (root / "reward", second)]
    assert configs[0]["num_heads"] == configs[1]["num_heads"] == 2
    one, two = (LatentRewardModel.load(p).state_dict() for p in (root / "reward", second))
    assert all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


BAD = [
    (["convert", "nowhere", "x", "--layout", "official"], "IN is 'nowhere', expected a file"),
    (["convert", "MODEL", "x", "--layout", "comfyui"], "OUT is 'x', expected a file *.safetensors"),
    (["convert", "MODEL", "x.safetensors", "--layout", "diffusers"], "expected a folder for this"),
    (["convert", "MODEL", "MODEL", "--layout", "official"], "expected a path that is new"),
    (["convert", "MODEL", "x", "--layout", "kohya"], "Layout kohya holds only LoRA"),
    (["convert", "REWARD", "x", "--layout", "kohya"], "--layout is 'kohya', expected diffusers or"),
    (["convert", "REWARD", "x.safetensors", "--layout", "official"], "expected a folder for"),
    (["convert", "LORA", "x", "--layout", "kohya"], "OUT is 'x', expected a file *.safetensors"),
    (["convert", "LORA", "LORA", "--layout", "kohya"], "expected a path that is new"),
    (["convert", "DATA", "x", "--layout", "official"], "no .safetensors file in it"),
    (["convert", "OTHER", "x", "--layout", "official"], "names is ['a'], expected a Wan transfor"),
    (["convert", "TORN", "x", "--layout", "official"], "not a whole safetensors file"),
    (["convert", "MODEL", "OTHER/x", "--layout", "official"], "OTHER"),
    (["convert", "a.gguf", "x", "--layout", "official"], "file is 'a.gguf', expected safetensors"),
    (["convert", "a.pth", "x", "--layout", "official"], "or holds more than tensors and plain"),
    (["merge", "MODEL", "MODEL", "x"], "no such file, or no LoRA in it"),
    (["merge", "MODEL", "OTHER", "x"], "no such file, or no LoRA in it"),
    (["merge", "LORA", "LORA", "x"], "expected a Wan transformer under"),
    (["merge", "MODEL", "LORA", "x.safetensors"], "expected a folder for this"),
    (["merge", "MODEL", "WIDE", "x"], "blocks.7.attn1.to_q is [48, 48], expected a layer None"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_errors_are_one_line_before_any_work(root, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    for name in ("model", "reward"):
        (tmp_path / name.upper()).symlink_to(root / name)
    (tmp_path / "DATA").mkdir()
    save_tensors({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    torn = (root / "model/diffusion_pytorch_model.safetensors").read_bytes()[:5000]
    (tmp_path / "torn.safetensors").write_bytes(torn)
    adapter(tmp_path / "lora.safetensors")
    layer = LoraLayer(torch.randn(2, 48), torch.randn(48, 2), 1.5)
    write_lora({"blocks.7.attn1.to_q": layer}, tmp_path / "wide.safetensors", "comfyui")
    files = {f: f"{f.lower()}.safetensors" for f in ("LORA", "OTHER", "TORN", "WIDE")}
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    torch.save({"a": torch.nn.Linear(1, 1)}, tmp_path / "a.pth")
    before = sorted(tmp_path.iterdir())
    words = [files.get(w, w.replace("OTHER/", "other.safetensors/")) for w in words]
    assert cli.main(words) == 2
    assert message.replace("OTHER", "other") in one_line(capsys, words[0])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert f"example: prfl-fast {command} " in capsys.readouterr().out
