"""Commands on datasets of several sizes and on lists of HY-Video-PRFL."""

import json

import pytest
from commands import call, negative_file, refused, train
from runs import SIZE, log, samples, write_prompts

pytest.importorskip("pydantic")

from list_files import TEMPLATE, write

from prfl_fast.cli import main as cli
from prfl_fast.data import Pair, write_dataset

BIG = (3, 4, 6)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Write a dataset of two sizes, with texts of two lengths."""
    folder = tmp_path_factory.mktemp("mixed") / "data"
    write_dataset(folder, [*samples(3), *samples(4, 1, size=BIG, rows=2)])
    return str(folder)


@pytest.mark.slow
def test_mixed_sizes_resume_in_mid_epoch_with_workers(root, mixed, tmp_path, capfd):
    """Three batches an epoch: the run stops after the second, and in the second epoch goes on."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    changes = {"data": mixed, "run.batch_size": 2, "prfl.num_inference_steps": 2}
    records = train(root, whole, changes | {"run.steps": 5})
    left = "each epoch leaves out 1 of 7 samples, incomplete batches\n"
    assert capfd.readouterr().err == f"prfl-fast train: {mixed}: {left}"
    for steps in (2, 5):
        train(root, halves, changes | {"run.steps": steps, "run.workers": 3})
    assert log(halves) == records
    name = "step-00000005/model/diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (halves / name).read_bytes()


@pytest.mark.slow
def test_rewards_train_evaluate_and_score_mixed_sizes(root, mixed, tmp_path, capsys):
    pairs = tmp_path / "pairs"
    items = [Pair(*samples(2, i, size=(SIZE, BIG)[i % 2])) for i in range(4)]
    write_dataset(pairs, items)
    drawn = {"loss": "bt", "data": mixed, "lose_data": mixed}
    runs = {"ce": {"data": mixed}, "bt": {"loss": "bt", "data": str(pairs)}, "drawn": drawn}
    for name, changes in runs.items():
        out = tmp_path / name
        changes = {**changes, "eval.data": mixed, "run.steps": 2}
        assert call("train-reward", root, out, changes) == 0
        found = json.loads((out / "evaluation.json").read_text())
        assert {values["count"] for values in found.values()} == {7}
    for size in (1, 3):
        out = tmp_path / f"scores-{size}"
        assert call("score", root, out, {"data": mixed, "batch_size": size}) == 0
    one, three = (
        [json.loads(line) for line in (tmp_path / f"scores-{n}.jsonl").read_text().splitlines()]
        for n in (1, 3)
    )
    assert [row["id"] for row in one] == [row["id"] for row in three]
    for a, b in zip(one, three, strict=True):
        assert all(a[t] == pytest.approx(b[t], abs=1e-5) for t in ("t201", "t800"))


def test_each_size_is_checked_against_the_model(root, mixed, tmp_path, capsys):
    assert call("train", root, tmp_path / "ok", {"data": mixed}, "--check") == 0
    write_dataset(tmp_path / "odd", [*samples(2, size=(3, 4, 6)), *samples(1, size=(1, 5, 4))])
    error = refused(capsys, "train", root, tmp_path / "out", {"data": str(tmp_path / "odd")})
    assert "does not fit" in error and "H of x is 5, expected a multiple of" in error
    prfl = {"method": "instructvideo", "segments": 3, "num_inference_steps": 3}
    changes = {"data": mixed, "prfl": prfl}
    error = refused(capsys, "train", root, tmp_path / "out", changes)
    assert "prfl.segments is 3, expected at most 2" in error
    negative = negative_file(tmp_path / "n.safetensors", 3, 20)
    guidance = {"prfl.guidance": {"guidance_scale": 2.0, "negative": negative}}
    changes = {"data": mixed, "objectives": ["prfl"], **guidance}
    assert call("train", root, tmp_path / "guided", changes, "--check") == 0


def test_lists_of_the_reference(root, tmp_path, capsys):
    """Its lists have image conditions for text-to-video too, and no label for a poor video."""
    path = reference_list(tmp_path)
    for name, keys in (("train", {"eval.prompts": path}), ("drawn", {"lose_data": path})):
        changes = {"data": path, **keys, **({"loss": "bt"} if name == "drawn" else {})}
        command = "train" if name == "train" else "train-reward"
        assert call(command, root, tmp_path / name, changes, "--check", "--deep") == 0


def reference_list(folder):
    """Write a list of three videos of two sizes, with image conditions."""
    small = {key: (1, 16, 2, 4, 4) for key in ("vae_latent_path", "f1_black_path")}
    labels = [{"physics_quality": 1, "human_quality": i % 2 or None} for i in range(4)]
    videos = [(TEMPLATE | (small if i % 2 else {}), found) for i, found in enumerate(labels)]
    return str(write(folder, *videos)[0])


@pytest.mark.slow
def test_runs_on_lists_of_the_reference(root, tmp_path, capsys):
    path = reference_list(tmp_path)
    changes = {"data": path, "run.steps": 1, "eval": {"prompts": path, "every": 1}}
    assert "eval/reward" in train(root, tmp_path / "out", changes)[0]
    pairs = {"data": path, "lose_data": path, "loss": "bt", "run.workers": 2}
    pairs |= {"eval.data": path, "missing_label": 0}
    assert call("train-reward", root, tmp_path / "drawn", pairs) == 0
    assert call("score", root, tmp_path / "scores", {"data": path}) == 0
    words = ["evaluate", str(root / "reward"), path, "--missing-label", "0"]
    assert cli.main(words) == 0
    meta = tmp_path / "data" / "meta" / "0_meta_v1.json"
    meta.write_text(meta.read_text().replace('"physics_quality": 1', '"physics_quality": 0'))
    error = refused(capsys, "train", root, tmp_path / "out", changes | {"run.steps": 2})
    assert "data: manifest" in error


@pytest.mark.slow
def test_every_objective_takes_pairs_of_mixed_sizes_from_workers(root, tmp_path):
    items = [Pair(*samples(2, i, size=(SIZE, BIG)[i % 2])) for i in range(8)]
    data = str(write_dataset(tmp_path / "pairs", items).folder)
    objectives = ["prfl", "sft", "dpo", "rwr"]
    changes = {"data": data, "objectives": objectives, "run.steps": 3, "run.batch_size": 2}
    logs = [
        train(root, tmp_path / f"w{n}", changes | {"run.workers": n, "lora.lora_rank": 2})
        for n in (0, 3)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_prompts_alone(root, tmp_path, capsys):
    """They train with prfl, and are sampled by an evaluation; nothing else takes them."""
    (tmp_path / "prompts").mkdir()
    prompts = str(write_prompts(tmp_path / "prompts", 3))
    alone = {"data": prompts, "objectives": ["prfl"], "run.steps": 1}
    record = train(root, tmp_path / "out", alone | {"eval": {"prompts": prompts, "every": 1}})[-1]
    assert "prfl/loss" in record and "eval/reward" in record
    for command, changes in (
        ("train", {"data": prompts}),
        ("train-reward", {"data": prompts}),
        ("train-reward", {"eval": {"data": prompts}}),
        ("score", {"data": prompts}),
    ):
        error = refused(capsys, command, root, tmp_path / "no", changes)
        assert "holds prompts without latents, expected latents" in error
