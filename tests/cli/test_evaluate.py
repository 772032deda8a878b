"""``prfl-fast evaluate``, and the evaluation of rewards in their training."""

import csv
import json

import pytest
import torch
from commands import call, one_line, refused
from offload_models import assert_same
from runs import log

pytest.importorskip("pydantic")

from prfl_fast.cli import main as cli
from prfl_fast.cli.evaluate import print_metrics
from prfl_fast.data.manifest import LatentDataset
from prfl_fast.rewards.evaluation import classification_metrics, preference_metrics
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.training.evaluation import RewardEvaluator
from prfl_fast.utils.io import load_tensors


def run(root, data, *arguments):
    return cli.main(["evaluate", str(root / "reward"), str(root / data), *map(str, arguments)])


def test_the_table_needs_no_folder(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(root, "data", "--timesteps", "800,201", "--batch-size", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "calibration error" in lines[1]
    assert [line.split()[0] for line in lines[3:5]] == ["201", "800"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_labels(root, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    times = ("--timesteps", "800,201", "--device", "cpu")
    assert run(root, "data", *times, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "calibration error" in printed and f"4 videos evaluated: {out}" in printed
    names = {"metrics.json", "metrics.csv", "metrics.png", "reliability.png"}
    assert {path.name for path in out.iterdir()} == names
    content = json.loads((out / "metrics.json").read_text())
    assert list(content["metrics"]) == ["201", "800"] and content["label"] == "motion_quality"
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["timestep"] for row in rows] == ["201", "800"]
    evaluator = RewardEvaluator(LatentDataset(root / "data"), label="motion_quality", seed=0)
    logits = evaluator.logits(LatentRewardModel.load(root / "reward"))
    for row in rows:
        t = row.pop("timestep")
        expected = classification_metrics(logits[int(t)][0], torch.tensor([0, 1, 0, 1]))
        assert content["metrics"][t] == pytest.approx(expected, rel=1e-4)
        assert {name: float(value) for name, value in row.items()} == content["metrics"][t]
        assert sum(each["count"] for each in content["reliability"][t]) == 4
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names if "png" in name)
    assert cli.main(["inspect", str(out)]) == 0
    facts, _, table = capsys.readouterr().out.partition("precision: fp32\n")
    assert table == printed.partition("4 videos")[0]
    assert f"reward model: {root / 'reward'}\ndata: {root / 'data'}\n" in facts
    (out / "metrics.json").write_text("{}")
    assert cli.main(["inspect", str(out)]) == 2
    assert "expected one that prfl-fast has written" in one_line(capsys, "inspect")
    # The table alone, of other batches, is the same.
    assert run(root, "data", *times, "--batch-size", 3) == 0
    assert capsys.readouterr().out == printed.partition("4 videos")[0]


@pytest.mark.slow
def test_pairs(root, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(root, "pairs", "--timesteps", 400, "--out", tmp_path / "out") == 0
    assert "margin" in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"].values()
    dataset, reward = LatentDataset(root / "pairs"), LatentRewardModel.load(root / "reward")
    win, lose = RewardEvaluator(dataset, timesteps=(400,)).logits(reward)[400]
    assert found == pytest.approx(preference_metrics(win, lose), rel=1e-4)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".csv", ".png"}
    # Both videos of a pair have the same noise: without latents of their own they score alike.
    dataset._load = lambda record, key, load=dataset._load: load(record, "win")
    win, lose = RewardEvaluator(dataset, timesteps=(400,)).logits(reward)[400]
    assert torch.equal(win, lose)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ("nowhere", (), "no manifest.jsonl there"),
        ("data", ("--label", "blur_quality"), "manifest.jsonl:1: label blur_quality is None"),
        ("data", ("--device", "gpu"), "hardware.device is 'gpu'"),
        ("data", ("--out", "."), "--out is '.', expected a new folder, but it exists"),
    ],
)
def test_bad_input_is_one_line(root, tmp_path, monkeypatch, capsys, data, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert (
        run(root, data, *(arguments if "--out" in arguments else (*arguments, "--out", "o"))) == 2
    )
    assert message in one_line(capsys, "evaluate") and list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_is_no_folder(root, tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert run(root, "data", "--out", tmp_path / "out" / "new") == 2
    assert f"but {tmp_path / 'out'} is a link to nothing" in one_line(capsys, "evaluate")


def test_a_reward_that_is_not_one_is_refused(root, capsys):
    assert cli.main(["evaluate", str(root / "model"), str(root / "data")]) == 2
    assert "not the configuration of a reward model" in one_line(capsys, "evaluate")
    assert cli.main(["evaluate", str(root), str(root / "data")]) == 2  # as of a run
    assert f"not a saved reward model, but {root / 'reward'} is" in one_line(capsys, "evaluate")


@pytest.mark.slow
def test_reward_training_is_evaluated_and_goes_on_as_it_would_have(root, tmp_path):
    held_out = {"eval": {"held_out": 0.5, "every": 2, "timesteps": [201, 800], "batch_size": 2}}
    assert call("train-reward", root, tmp_path / "whole", held_out) == 0
    for steps in (3, 5):
        assert call("train-reward", root, tmp_path / "out", {**held_out, "run.steps": steps}) == 0
    records = log(tmp_path / "whole")
    assert records == log(tmp_path / "out")
    assert [r["step"] for r in records if "eval/accuracy/t800" in r] == [0, 2, 4]
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5]
    final = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert {"auc", "ece"} <= final["201"].keys() or final["201"]["positive_rate"] in (0, 1)
    assert final["800"]["count"] == 2
    # Data of its own is evaluated without effect on the training.
    own = {"eval": {"data": str(root / "pairs"), "every": 1, "timesteps": [400]}, "run.steps": 2}
    assert call("train-reward", root, tmp_path / "own", own) == 0
    assert call("train-reward", root, tmp_path / "none", {"run.steps": 2}) == 0
    names = {"reward/loss", "reward/grad_norm"}
    kept = [{k: r[k] for k in names} for r in log(tmp_path / "own") if r["step"]]
    assert kept == [{k: r[k] for k in names} for r in log(tmp_path / "none")]
    weights = [
        LatentRewardModel.load(tmp_path / n / "reward").state_dict() for n in ("own", "none")
    ]
    assert_same(*map(dict, weights))


@pytest.mark.slow
def test_early_stopping_saves_the_best_reward(root, tmp_path, capsys):
    changes = {"run.steps": 9, "eval.data": str(root / "data"), "eval.every": 1}
    changes |= {"eval.patience": 2, "eval.timesteps": [201]}
    out = tmp_path / "out"
    assert call("train-reward", root, out, changes) == 0
    told = capsys.readouterr().out
    accuracies = [r["eval/accuracy"] for r in log(out)][1:]
    best = accuracies.index(max(accuracies)) + 1
    assert len(accuracies) == best + 2 < 9
    assert "stopped early: no higher accuracy in 2 evaluations" in told
    assert f"best accuracy {max(accuracies):.4g}, at step {best}" in told
    saved = load_tensors(out / f"step-{best:08d}" / "model" / "model.safetensors")
    assert_same(saved, dict(LatentRewardModel.load(out / "reward").state_dict()))
    last = load_tensors(out / f"step-{best + 2:08d}" / "model" / "model.safetensors")
    assert any(not torch.equal(saved[name], last[name]) for name in saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval": {}}, "eval.held_out is null, expected a share if there is no data, else none"),
        ({"eval": {"held_out": 0.99}}, "held_out is 0.99, expected a share that leaves some of"),
        ({"eval": {"held_out": 0.5, "data": "d"}}, "eval.held_out is 0.5, expected a share if"),
        ({"eval": {"held_out": 0.5, "every": None, "patience": 1}}, "eval.patience is 1, expected"),
        ({"eval": {"data": "nowhere"}}, "nowhere: no manifest.jsonl there"),
        ({"eval": {"held_out": 0.5}, "loss": "bt", "lose_data": "x"}, "no value with lose_data"),
    ],
)
def test_bad_evaluations_are_refused(root, tmp_path, capsys, changes, message):
    assert message in refused(capsys, "train-reward", root, tmp_path / "out", changes)
    assert not (tmp_path / "out").exists()


def test_a_small_margin_is_not_printed_as_zero(capsys):
    print_metrics({201: {"accuracy": 1 / 3, "margin": -2e-5, "margin_std": 0.5, "count": 3}})
    assert capsys.readouterr().out.split()[-5:] == ["201", "0.3333", "-2.0e-05", "0.5000", "3"]
