"""``prfl-fast encode``: clips and captions to a dataset."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import call as call_command
from commands import one_line, refused
from diffusers import WanTransformer3DModel
from runs import log
from tiny_pipeline import make_clips, make_pipeline

from prfl_fast.cli import main as cli
from prfl_fast.data import codec, encode, video
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.data.values import check_values
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.digests import check_folder
from prfl_fast.utils.io import save_tensors

SIZE = ("--size", "32x64", "--frames", "9", "--device", "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with two pipelines, text and image to video, and three clips; read only."""
    root = tmp_path_factory.mktemp("world")
    for name, kind in (("t2v", "t2v"), ("pipeline", "i2v")):  # as docs/data.md names it
        make_pipeline(kind).save_pretrained(root / name)
    make_clips(root / "clips")
    return root


def call(world, out, *options, kind="t2v", clips="clips/clips.csv", size=SIZE):
    """Return the exit code of the command."""
    arguments = ["encode", str(world / clips), str(out), "--model", str(world / kind)]
    return cli.main([*arguments, *size, *options])


def contents(folder):
    """Return the bytes of all files of a folder by name."""
    files = (p for p in sorted(Path(folder).rglob("*")) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def rows(world):
    with open(world / "clips" / "clips.csv", newline="") as file:
        return list(csv.DictReader(file))


class Interrupted(BaseException):
    """Stand for a kill: nothing catches it."""


def interrupt(monkeypatch, moment, world, out, *options, **changes):
    """Stop the command before its ``moment``-th rename of a file."""
    original, calls = os.replace, []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == moment:
            raise Interrupted
        original(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Interrupted):
            call(world, out, *options, **changes)
    assert not (out / "manifest.jsonl").exists()


def test_inspect_says_how_far_an_unfinished_dataset_is(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "000000.safetensors").touch()
    (tmp_path / "encode.json").write_text('{"clips": [["a"], ["b"]]}')
    assert cli.main(["inspect", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "clips: 2\nsamples so far: 1\nthe same call of prfl-fast encode continues\n" in shown


def test_a_dataset_has_what_the_pipeline_would_encode(world, tmp_path, capsys):
    out = tmp_path / "data"
    negative = ("--negative", "blurred, static")
    assert call(world, out, *negative, kind="pipeline") == 0
    assert "3 samples, 0 clips skipped" in capsys.readouterr().out
    dataset = LatentDataset(out)
    assert dataset.ids() == ["disc", "square", "ring"] and dataset.short
    assert [labels["motion_quality"] for _, labels in dataset.labels()] == [1, 1, 0]
    assert dataset.captions() == [row["long_caption"] for row in rows(world)]
    vae, text = codec.load_codec(world / "pipeline"), codec.load_text_encoder(world / "pipeline")
    image = codec.load_image_encoder(world / "pipeline")
    for sample, row in ((dataset[i], rows(world)[i]) for i in (0, 2)):
        clip = video.read_clip(world / "clips" / row["video_path"], 9, (32, 64), fps=16)
        assert (sample.latents - vae.encode(clip[None])[0]).abs().max() <= 1e-5
        found = dict(sample.conditions)
        states = found.pop("encoder_hidden_states")
        long, short = (text([row[key]])[0] for key in ("long_caption", "short_caption"))
        assert (states[: len(long)] - long).abs().max() <= 1e-5 and not states[len(long) :].any()
        assert (sample.short - short).abs().max() <= 1e-5
        condition = vae.latent_condition(clip[None, :, 0], 9)[0]
        assert (found.pop("latent_condition") - condition).abs().max() <= 1e-5
        clip_states = image([clip[:, 0]])
        assert (found.pop("encoder_hidden_states_image") - clip_states).abs().max() <= 1e-5
        assert not found
    assert dataset.empty_prompt()["encoder_hidden_states"].shape == (1, 32)
    with encode.open_tensors(out / "negative.safetensors") as file:
        assert file.get_tensor("encoder_hidden_states").shape == (len("blurred, static") + 1, 32)
    check_values(dataset)
    files = tuple(name for name in contents(out) if name.endswith(".safetensors"))
    check_folder(out, files, "dataset")
    assert sorted(p.name for p in out.iterdir()) == [
        *("digests.json", "empty_prompt.safetensors", "encode.json", "manifest.jsonl"),
        *("negative.safetensors", "samples"),
    ]
    # A second call has nothing to do, and loads no model.
    before = contents(out)
    assert call(world, out, *negative, kind="pipeline") == 0
    assert contents(out) == before


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Return the bytes of a dataset that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "data"
    assert call(world, out) == 0
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(1, 8))
def test_an_interrupted_run_continues_to_the_same_bytes(
    world, whole, tmp_path, monkeypatch, moment
):
    interrupt(monkeypatch, moment, world, tmp_path / "data")
    written = {
        name: (tmp_path / "data" / name).stat().st_mtime_ns for name in contents(tmp_path / "data")
    }
    assert call(world, tmp_path / "data") == 0
    assert contents(tmp_path / "data") == whole
    for name in (n for n in written if n.startswith("samples/")):
        assert (tmp_path / "data" / name).stat().st_mtime_ns == written[name]


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_continues_to_the_same_bytes(world, tmp_path):
    script = Path(__file__).resolve().parents[1] / "helpers" / "encode_killed.py"
    options = [str(world / "clips/clips.csv"), "--model", str(world / "pipeline"), *SIZE]
    command = [sys.executable, str(script), str(tmp_path), "22", *options, "--negative", "bad"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0 and result.stdout.endswith("done\n"), result.stderr[-3000:]
    whole = contents(tmp_path / "whole")
    assert len(whole) == 8
    for number in range(22):
        assert contents(tmp_path / str(number)) == whole, number


@pytest.mark.slow
def test_other_settings_and_clips_are_refused(world, tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(world / "clips", clips)
    shutil.copytree(world / "t2v", tmp_path / "t2v")
    assert call(tmp_path, tmp_path / "data") == 0
    before = contents(tmp_path / "data")

    def refused(*options):
        capsys.readouterr()
        assert call(tmp_path, tmp_path / "data", *options) == 2
        assert contents(tmp_path / "data") == before and not (tmp_path / "data/parts").exists()
        return one_line(capsys, "encode")

    assert "encode.json: settings.fps is 16.0, expected 8.0 of this call" in refused("--fps", "8")
    text = (clips / "clips.csv").read_text()
    (clips / "clips.csv").write_text(text.replace("A square glides", "A box glides"))
    assert "encode.json: clips.1.3 is 'A square glides.', expected 'A box" in refused()
    (clips / "clips.csv").write_text(text)
    shutil.copy(clips / "ring.mp4", clips / "disc.mp4")
    assert "encode.json: clips.0.1 is" in refused()
    shutil.copy(world / "clips" / "disc.mp4", clips / "disc.mp4")
    (clips / "clips.csv").write_text("".join(text.splitlines(True)[:3]))
    assert "encode.json: clips.2.0 is 'ring', expected None of this" in refused()


@pytest.mark.slow
def test_broken_and_short_clips_are_skipped_with_a_reason(world, tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(world / "clips", clips)
    shutil.copytree(world / "t2v", tmp_path / "t2v")
    (clips / "clips.csv").unlink()
    for path in clips.glob("*.mp4"):
        path.with_suffix(".txt").write_text(f"A {path.stem}.")
    for name, data in (("empty.mp4", b""), ("text.mov", b"no video" * 99)):
        (clips / name).write_bytes(data)
        (clips / name).with_suffix(".txt").write_text("Bad.")
    video.write_video(clips / "short.webm", torch.zeros(3, 4, 32, 32), 16)
    (clips / "short.txt").write_text("Short.")
    assert call(tmp_path, tmp_path / "data", clips="clips") == 0
    printed = capsys.readouterr()
    assert "3 samples, 3 clips skipped" in printed.out
    lines = [line for line in printed.err.splitlines() if "skipped" in line]
    assert len(lines) == 3 and all(line.startswith("prfl-fast encode: skipped ") for line in lines)
    assert "empty.mp4: has 0 bytes" in lines[0] and "short.webm: has 4 frames" in lines[1]
    assert LatentDataset(tmp_path / "data").ids() == ["disc", "ring", "square"]
    for path in [*clips.glob("[drs]*.mp4"), *clips.glob("[drs]*.webm")]:
        path.write_bytes(b"")
    assert call(tmp_path, tmp_path / "none", clips="clips") == 2
    assert "expected at least one" in one_line(capsys, "encode")
    assert not (tmp_path / "none").exists()


def test_a_dry_run_counts_and_writes_nothing(world, tmp_path, capsys):
    options = ("--buckets", "auto", "--crops", "2", "--dry-run", "--frames", "9,17")
    assert (
        call(world, tmp_path / "data", *options, size=("--size", "64x96", "--device", "cpu")) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "64x96, 17 frames: 2 samples, 120 tokens each"
    assert any(line.startswith("96x64, 17 frames: 2 samples") for line in lines)
    assert lines[-1].startswith("6 samples of 3 clips, 0 skipped")
    assert not (tmp_path / "data").exists()


BAD = {
    "clips": ([], {"clips": "nowhere.csv"}, "CLIPS is .*nowhere.csv"),
    "frames": (["--frames", "8"], {}, r"frames is 8, expected 4n \+ 1"),
    "size": (["--size", "40x64"], {}, "height is 40, expected a multiple of 16"),
    "model": ([], {"kind": "clips"}, "has no vae, expected vae/config.json or Wan2"),
    "missing": ([], {"kind": "nowhere"}, "--model is .*nowhere', expected a folder that exists"),
    "crops": (["--crops", "2", "--crop", "center"], {}, "--crops is 2, expected 1 with --crop"),
    "inside": (["--dry-run"], {"clips": ".."}, "OUT is .*data', expected a folder outside of the"),
    "small": (["--budget", "1MiB"], {}, "weights is '0 GiB', expected at least .* for 9 x"),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(world, tmp_path, capsys, name):
    options, changes, reason = BAD[name]
    assert call(world, tmp_path / "data", *options, **changes) == 2
    line = one_line(capsys, "encode")
    assert re.search(reason, line), line
    assert not (tmp_path / "data").exists()


PARTS = ("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named_before_the_work(world, tmp_path, capsys, part):
    shutil.copytree(world / "pipeline", tmp_path / "pipeline", ignore=lambda *_: [part])
    (tmp_path / "clips").symlink_to(world / "clips")
    assert call(tmp_path, tmp_path / "data", kind="pipeline") == 2
    assert part in one_line(capsys, "encode") and not (tmp_path / "data").exists()


@pytest.mark.slow
def test_long_captions_are_counted(world, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("A disc.\n" + "long " * 200)
    (tmp_path / "t2v").symlink_to(world / "t2v")
    assert call(tmp_path, tmp_path / "data", clips="prompts.txt") == 0
    assert "1 text is cut at 512 tokens, such as 'long long" in capsys.readouterr().err


def test_a_folder_with_another_dataset_is_refused(world, tmp_path, capsys):
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    assert call(world, tmp_path) == 2
    assert "OUT is" in one_line(capsys, "encode")
    assert contents(tmp_path) == {"manifest.jsonl": b"{}\n"}


@pytest.mark.slow
def test_the_record_says_what_was_encoded(world, tmp_path):
    assert call(world, tmp_path / "data", "--dtype", "bf16", "--workers", "3") == 0
    record = json.loads((tmp_path / "data" / "encode.json").read_text())
    assert record["settings"]["size"] == [32, 64] and record["settings"]["dtype"] == "bf16"
    assert set(record["model"]) == {"vae", "text_encoder"} and len(record["clips"]) == 3
    sample = LatentDataset(tmp_path / "data")[0]
    assert sample.latents.dtype == torch.bfloat16


@pytest.mark.slow
def test_the_guide_runs(world, tmp_path, monkeypatch, capsys):
    (tmp_path / "world").mkdir()
    for name in ("pipeline", "clips"):
        shutil.copytree(world / name, tmp_path / "world" / name)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    (shell,) = re.findall(r"^```bash\n(.*?)^```$", text, re.S | re.M)
    lines = [shlex.split(line) for line in shell.splitlines()]
    assert [words[0] for words in lines] == ["python", "prfl-fast", "prfl-fast"]
    for words in lines[1:]:
        assert cli.main(words[1:]) == 0, words
    *_, python = re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
    names = {}
    exec(compile(python, "docs/data.md", "exec"), names)
    sheet = next(iter(video.read_frames("world/data/preview/000000.png")))
    assert sheet.shape == (2 * 36, 8 * 52, 3)
    sample = LatentDataset("world/data")[0]
    found = dict(sample.conditions, latents=sample.latents)
    assert found["latents"].shape == (16, 5, 4, 6)
    assert names["latents"].shape == (1, 16, 3, 4, 6) and names["text"].shape[1] == 32
    assert names["image"].shape == found["encoder_hidden_states_image"].shape
    assert Path("world/disc.mp4").is_file() and Path("world/disc.png").is_file()


PROMPTS = "A disc.\n\nA ring moves.\nA square.\n"


def prompts(world, tmp_path, *options):
    """Encode three prompts and return the dataset."""
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    arguments = [str(tmp_path / "prompts.txt"), str(tmp_path / "data"), "--model"]
    assert cli.main(["encode", *arguments, str(world / "t2v"), *SIZE, *options]) == 0
    return LatentDataset(tmp_path / "data")


def test_prompts_alone_are_a_dataset_without_latents(world, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    interrupt(monkeypatch, 4, world, tmp_path / "data", clips=tmp_path / "prompts.txt")
    dataset = prompts(world, tmp_path)
    assert dataset.prompts_only and dataset.ids() == ["000000", "000001", "000002"]
    assert dataset.shapes["latents"] == (16, 3, 4, 8)
    sample = dataset[1]
    assert sample.latents.shape == (16, 3, 4, 8) and sample.latents.isnan().all()
    assert sample.conditions["encoder_hidden_states"].shape == (len("A ring moves.") + 1, 32)
    check_values(dataset)
    arguments = [str(tmp_path / "prompts.txt"), str(tmp_path / "new"), "--model"]
    for model, option, reason in (
        ("pipeline", [], "--condition is 'first', expected none for prompts alone"),
        ("t2v", ["--preview"], "--preview is True, expected none for prompts alone"),
        ("t2v", ["--crops", "2"], "--crops is 2, expected none for prompts alone"),
    ):
        capsys.readouterr()
        assert cli.main(["encode", *arguments, str(world / model), *SIZE, *option]) == 2
        assert reason in one_line(capsys, "encode")
    # A file with latents among them would train on NaN.
    save_tensors(
        {"latents": torch.zeros(16, 3, 4, 8), "encoder_hidden_states": torch.zeros(2, 32)},
        tmp_path / "data/samples/9.safetensors",
    )
    with open(tmp_path / "data/manifest.jsonl", "a") as file:
        file.write('{"id": "9", "latents": "samples/9.safetensors"}\n')
    with pytest.raises(ValueError, match="files without latents is 3, expected none, or all"):
        LatentDataset(tmp_path / "data")


@pytest.mark.slow
def test_prompts_alone_train_with_prfl_and_with_nothing_else(world, tmp_path, capsys):
    prompts(world, tmp_path)
    model = WanTransformer3DModel.from_pretrained(world / "t2v" / "transformer")
    LatentRewardModel.from_backbone(model, num_blocks=1, num_heads=2).save(tmp_path / "reward")
    changes = {"model": str(world / "t2v"), "run.steps": 2, "objectives": ["prfl"]}
    assert call_command("train", tmp_path, tmp_path / "run", changes) == 0
    assert all(math.isfinite(record["prfl/loss"]) for record in log(tmp_path / "run"))
    for command, change in (
        ("train", {**changes, "objectives": ["prfl", "sft"]}),
        ("train", {**changes, "prfl.method": "instructvideo"}),
        ("train-reward", {"model": str(world / "t2v")}),
        ("score", {}),
    ):
        line = refused(capsys, command, tmp_path, tmp_path / "other", change)
        assert "holds prompts without latents, expected latents" in line
