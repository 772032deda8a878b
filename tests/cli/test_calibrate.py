"""``rollout.drift`` of train, and ``prfl-fast calibrate``."""

import json
from types import SimpleNamespace

import pytest
from commands import one_line
from runs import config, log, write_config

pytest.importorskip("pydantic")
yaml = pytest.importorskip("yaml")

from prfl_fast.cli import calibrate as calibrating
from prfl_fast.cli import train as training
from prfl_fast.cli.config import TrainFile
from prfl_fast.cli.main import main
from prfl_fast.cli.yaml_config import load_config
from prfl_fast.feedback import calibration
from prfl_fast.rollout.config import RolloutConfig

DRIFT = 5.0


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measure one stride on one batch, of UniPC's own order, and accept any gradient."""
    monkeypatch.setattr(calibrating, "SAMPLES", 1)
    monkeypatch.setattr(calibration, "LEAST_COSINE", -1.0)
    stride = {"stride": ((0.5, 1.0, 3),)}
    monkeypatch.setattr(calibration, "ladders", lambda *_: {"stride": [stride]})
    monkeypatch.setattr(calibration, "other_orders", lambda step: [])


def written(root, tmp_path, **changes):
    changes = {"rollout.drift": DRIFT, "prfl.num_inference_steps": 8, "run.steps": 1} | changes
    return write_config(tmp_path / "train.yaml", config("train", root, tmp_path / "run", changes))


def test_a_run_calibrates_once_and_resumes_with_its_rollout(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(calibrating, "SAMPLES", 3)  # one would not have the run's gradient points
    path = written(root, tmp_path)
    assert main(["calibrate", str(path)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "rollout.json").read_text())
    exact, chosen = record["measured"]
    assert chosen == record["chosen"] and chosen["flops"] < exact["flops"]
    assert f"{chosen['drift']:.2g}" in printed and "of the FLOPs of a gradient point" in printed
    assert f"written to {tmp_path / 'run' / 'rollout.json'}" in printed
    assert [p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")] == [
        "rollout.json"
    ]

    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(calibrating, "calibrate", never)
    # With other settings the rollout is measured again, but not by a check.
    other = written(root, tmp_path, **{"prfl.weight": 0.2})
    assert main(["train", str(other), "--check"]) == 0
    assert f"drift: {DRIFT}" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="measured again"):
        main(["calibrate", str(other)])
    written(root, tmp_path)
    for command in ("calibrate", "train"):
        assert main([command, str(path)]) == 0
        assert f"read from {tmp_path / 'run' / 'rollout.json'}" in capsys.readouterr().out
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rollout"]
    config = RolloutConfig(stride=((0.5, 1.0, 3),), drift_limit=DRIFT)
    assert resolved.pop("drift") is None and RolloutConfig(**resolved) == config
    (first,) = log(tmp_path / "run")
    assert 0 < first["prfl/drift"] < 1.5 * chosen["drift"]  # of other noise
    written(root, tmp_path, **{"run.steps": 2})
    assert main(["train", str(path)]) == 0 and len(log(tmp_path / "run")) == 2
    capsys.readouterr()
    assert main(["train", str(path), "--check"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rollout"] == {"drift": None, **resolved}
    other = written(root, tmp_path, **{"prfl.weight": 0.2})
    assert main(["train", str(other)]) == 2
    assert "null beside checkpoints" in one_line(capsys, "train")


def test_the_table_fits_100_columns(tmp_path, capsys):
    layers = {"sparse_attention": [[0.8, 1.0, 0.25], [0.3, 0.8, 0.5]]}
    layers["sparse_dense_layers"] = list(range(30, 40))
    options = {"stride": [[0.9, 1.0, 8], [0.7, 0.9, 4], [0.0, 0.7, 2]], "solver_order": 3, **layers}
    figures = {"flops": 1.2345e16, "rollout_flops": 1.2345e15, "seconds": 1.234e-05}
    exact = {"options": {}, **figures, "drift": 0.0, "cosine": 1.0}
    chosen = {"options": options, **figures, "drift": 1.2345e-05, "cosine": -0.12345}
    past = {"options": layers, **dict.fromkeys(figures), "drift": 12345.6, "cosine": None}
    record = {"measured": [exact, chosen, past], "chosen": chosen}
    (tmp_path / "rollout.json").write_text(json.dumps(record))
    calibrating.print_calibration(SimpleNamespace(out=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    words = " ".join(" ".join(lines).split())
    assert "1.23e+16 1.23e+15 1.23e-05 0 1.0000 exact" in words
    assert "1.23e+16 1.23e+15 1.23e-05 1.2e-05 -0.1235 chosen: stride [[0.9, 1.0, 8]," in words
    assert "– – – 1.2e+04 – sparse_attention [[0.8, 1.0, 0.25], [0.3, 0.8, 0.5]]" in words
    assert words.count("sparse_dense_layers [30, 31, 32, 33, 34, 35, 36, 37, 38, 39]") == 2


def test_rollouts_of_single_steps_are_exact(root, tmp_path, capsys):
    path = written(root, tmp_path, **{"prfl.num_inference_steps": 4, "prfl.points": 2})
    assert main(["calibrate", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "rollout: exact; no stride or cache was tried, because no rollout has two" in printed
    record = json.loads((tmp_path / "run" / "rollout.json").read_text())
    assert [each["options"] for each in record["measured"]] == [{}]
    assert RolloutConfig(**record["config"]) == RolloutConfig(drift_limit=DRIFT)


def test_measurements_do_not_log_the_forwards_they_save(root, tmp_path, caplog, monkeypatch):
    # Sixteen steps before one point, so that a threshold of 9 saves forwards.
    reuse = {"teacache": 9.0}
    monkeypatch.setattr(calibration, "ladders", lambda *_: {"teacache": [reuse]})
    path = written(root, tmp_path, **{"prfl.num_inference_steps": 16})
    assert main(["calibrate", str(path)]) == 0
    exact, measured = json.loads((tmp_path / "run" / "rollout.json").read_text())["measured"]
    assert measured["options"] == reuse and measured["flops"] < exact["flops"]
    assert not any("forwards saved" in record.message for record in caplog.records)


def test_several_ranks_are_refused_before_models_are_loaded(root, tmp_path, monkeypatch):
    path = str(written(root, tmp_path))
    made_for = {"settings": {"a": 1}}
    file = load_config(TrainFile, path)
    where = f"prfl-fast calibrate {path} on one GPU, which writes {tmp_path / 'run'}/rollout.json"
    with pytest.raises(ValueError, match="is 5.0, but several GPUs cannot calibrate: ") as raised:
        calibrating.find_calibration(file, made_for, path, several=True)
    assert str(raised.value).endswith(f"run {where}")
    assert calibrating.find_calibration(file, made_for, path, several=False).record is None

    def refuse(*args, **options):
        raise ValueError("refused first")

    monkeypatch.setattr(training, "find_calibration", refuse)
    monkeypatch.setattr(training, "_load_models", None)  # would be a TypeError
    assert main(["train", path]) == 2


@pytest.mark.parametrize(
    "command,changes,message",
    [
        (
            "train",
            {"rollout.stride": 2},
            "rollout.drift is 5.0, expected null beside rollout.stride,",
        ),
        (
            "train",
            {"rollout.drift_limit": 0.1, "rollout.teacache": 0.1},
            "expected null beside rollout.teacache and rollout.drift_limit, which it chooses",
        ),
        (
            "train",
            {"rollout.adapter": "few.safetensors"},
            "expected null beside rollout.adapter, which it cannot choose",
        ),
        ("train", {"rollout.drift": 0}, "rollout.drift is 0, expected a number above 0"),
        ("calibrate", {"rollout.drift": None}, "needs a budget: add `rollout: {drift: 0.02}` to"),
        ("calibrate", {"objectives": ["sft"]}, "expected prfl among them for calibrate"),
    ],
)
def test_budgets_that_cannot_be_kept_are_refused(root, tmp_path, capsys, command, changes, message):
    assert main([command, str(written(root, tmp_path, **changes))]) == 2
    assert message in one_line(capsys, command)
