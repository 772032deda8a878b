"""What inspect says of each kind of path."""

import json
import shutil

import pytest
import torch
from commands import one_line, reference_layout, train
from list_files import OTHER_NAMES, TEMPLATE, write
from runs import samples, write_prompts

pytest.importorskip("pydantic")

from prfl_fast.cli import main as cli
from prfl_fast.data import write_dataset
from prfl_fast.utils.io import save_tensors


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
    assert " ".join(lines[-1]).startswith("latents are scaled as normalized latents are")
    labels = [{"source": f"a long name of a source {i} " * 3, "sharp": True} for i in range(8)]
    raw = [
        s._replace(latents=s.latents * 2, labels=of) for s, of in zip(items, labels, strict=True)
    ]
    lines = said(capsys, write_dataset(tmp_path / "raw", raw[:7] + items[7:]).folder)
    assert "(z - mean) / std" in " ".join(lines[-1])
    (line,) = [" ".join(line) for line in lines if line[:1] == ["source"]]
    assert line.count("a long name of a source") == 4 and line.endswith(
        "(14%), and 3 more values 1"
    )
    assert ["sharp", "True:", "7", "(100%)", "1"] in lines


def test_prompts_without_latents(tmp_path, capsys):
    write_prompts(tmp_path, 3)
    text = "\n".join(" ".join(line) for line in said(capsys, tmp_path))
    assert "prompts: 3\n" in text and "16×2×4×4 5×32×32 3 100%" in text
    assert "objectives: [prfl]" in text and "nan" not in text and "(z - mean)" not in text


def test_a_list_of_the_reference(tmp_path, capsys):
    videos = [(TEMPLATE, {"physics_quality": 1, "human_quality": None})]
    videos += [(OTHER_NAMES, {"physics_quality": "good", "human_quality": "good"})]
    lines = said(capsys, write(tmp_path, *videos)[0])
    assert ["videos:", "2"] in lines and ["human_quality", "good:", "1", "(100%)", "1"] in lines
    assert ["motion_quality", "(both)", "1:", "1", "(100%)", "1"] in lines
    assert "latent_condition" in " ".join(" ".join(line) for line in lines)


def test_a_run_its_checkpoint_and_its_adapter(run, tmp_path, capsys):
    run = shutil.copytree(run, tmp_path / "run", symlinks=True)
    lines = said(capsys, run)
    steps = [line[1] for line in lines if line[-1:] == ["whole"]]
    assert steps == ["1", "2"]
    lines = said(capsys, run / "step-00000002")
    assert ["step:", "2"] in lines
    assert "digests of all files are as written".split() in lines
    assert any(line[:1] == ["train.lora"] or "lora.lora_rank" in line for line in lines)
    for path in (run / "final", run / "final" / "pytorch_lora_weights.safetensors"):
        text = "\n".join(" ".join(line) for line in said(capsys, path))
        assert "kind: LoRA\nlayers: 8, of attn1.to_k, attn1.to_out.0, " in text
        assert "\nrank: 2 (8 layers)\nalpha / rank: 1 (8 layers)\n" in text
    (run / "final").unlink()
    shutil.move(run / "step-00000001", tmp_path)
    experts = shutil.copytree(run / "step-00000002" / "model", tmp_path / "two" / "transformer")
    shutil.copytree(experts, tmp_path / "two" / "transformer_2")
    assert [line[0] for line in said(capsys, tmp_path / "two")].count("adapter:") == 2
    shutil.rmtree(run / "step-00000002")
    assert ["no", "checkpoint", "yet"] in said(capsys, run)


def test_adapters_of_other_kinds(tmp_path, capsys):
    down, up = torch.ones(2, 48), torch.ones(48, 2)
    names = {
        "blocks.0.self_attn.q.lora_down.weight": down,
        "blocks.0.self_attn.q.lora_up.weight": up,
    }
    torch.save(names, tmp_path / "lora.pt")
    text = "\n".join(" ".join(line) for line in said(capsys, tmp_path / "lora.pt"))
    assert "192 in 2 tensors, float32" in text and "layers: 1, of attn1.to_q\n" in text
    names = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": torch.ones(48)}
    names = {f"transformer.blocks.0.attn1.to_q.{n}": t for n, t in names.items()}
    save_tensors(names, tmp_path / "dora.safetensors")
    text = "\n".join(" ".join(line) for line in said(capsys, tmp_path / "dora.safetensors"))
    assert "kind: LoRA with DoRA" in text
    save_tensors({"blocks.0.attn.q.hada_w1_a": down}, tmp_path / "loha.safetensors")
    text = "\n".join(" ".join(line) for line in said(capsys, tmp_path / "loha.safetensors"))
    assert "not a LoRA of Wan: " in text and "is 'LoHa'" in text and "rank:" not in text


def test_models(root, capsys):
    text = "\n".join(" ".join(line) for line in said(capsys, root / "reward"))
    assert "num blocks: 1" in text and "digests: of all files as written" in text
    text = "\n".join(" ".join(line) for line in said(capsys, root / "model"))
    assert "class: WanTransformer3DModel" in text and "in channels: 16" in text
    assert "17,944 in 42 tensors, float32" in text


def test_a_reward_of_the_reference(root, tmp_path, capsys):
    reference_layout(root, tmp_path)
    text = "\n".join(" ".join(line) for line in said(capsys, tmp_path))
    assert "step: 0\nnum blocks: 1\n" in text and "\nmlp/mlp_step_0.ckpt " in text


def test_damage_and_other_files_are_one_line(world, run, tmp_path, capsys):
    weights = world / "reward" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "bad.list").write_text("no.json\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "clip.mp4").touch()
    (world / "model" / "config.json").write_text("{")
    for path, message in (
        (world / "reward", "SHA-256 of"),
        (world / "model", "config.json is not the configuration of"),
        (tmp_path / "none", "expected a file or folder that exists"),
        (tmp_path / "notes.txt", "expected a dataset folder (manifest.jsonl), a list"),
        (tmp_path / "other", "an adapter or a generator\n"),
        (tmp_path / "other" / "clip.mp4", "an adapter or a generator\n"),
        (tmp_path / "bad.list", "bad.list:1: no.json: not a readable JSON file"),
    ):
        capsys.readouterr()
        assert cli.main(["inspect", str(path)]) == 2
        assert message in one_line(capsys, "inspect")
    manifest = run / "step-00000001" / "checkpoint.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "step": 7}))
    try:
        lines = said(capsys, run)
        assert ["step-00000001", "1", "damaged"] in [line[:2] + line[-1:] for line in lines]
        assert any(line[:3] == ["step-00000001", "is", "damaged:"] for line in lines)
    finally:
        manifest.write_text(text)
