"""The command line: what it prints and writes, and how runs go on."""

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from commands import call, negative_file, one_line, reference_layout, refused, train
from compiled import run_python
from offload_models import assert_same
from runs import SIZE, config, samples, write_config

pytest.importorskip("pydantic")

from prfl_fast.cli import inspect as inspecting
from prfl_fast.cli import main as cli
from prfl_fast.cli import run
from prfl_fast.cli.config import TrainFile
from prfl_fast.cli.tables import print_table
from prfl_fast.cli.yaml_config import load_config
from prfl_fast.data.manifest import write_dataset
from prfl_fast.kernels.attn import backend_choice, rollout_choice
from prfl_fast.rewards.latent import LatentRewardModel
from prfl_fast.utils.io import load_tensors, save_tensors


def test_doctor_says_which_backend_and_why(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "CUDA C++ extension: " in text
    if not torch.cuda.is_available():
        assert ["norm_modulate", "reference"] in [line.split()[:2] for line in text.splitlines()]
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["operations"]["query_pool"]) == {"backend", "reason"}
    assert report["packages"]["diffusers"] and "flash_attn" in report["attention"]


def test_doctor_lists_every_attention_backend(capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    first, _, second = printed.partition("attention backend: auto; ")[2].partition("rollout att")
    table, rollouts = (text.partition("verdict")[2] for text in (first, second))
    lines = [line.split() for line in table.splitlines() if line.strip(" ─")]
    listed = {name: " ".join(words) for name, *words in lines}
    assert set(listed) == set(backend_choice.BACKENDS)
    assert listed["plain"] == "usable"
    assert all(v == "usable" or v.startswith("refused: ") for v in listed.values())
    if not torch.cuda.is_available():
        assert lines[0] == ["cpu", "usable"]
        assert listed["cudnn"] == "refused: it takes cuda tensors, these are on cpu"
        named = dict(line.split(maxsplit=1) for line in rollouts.splitlines() if line.strip(" ─"))
        assert set(named) == set(rollout_choice.report())
        assert named["int8_fp8"].strip() == "usable, emulated by PyTorch"
    monkeypatch.setattr(backend_choice, "_current", "plain")
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["attention_backend"] == "plain"
    assert report["attention_backends"]["plain"] == {"usable": True, "reason": None}
    assert set(report["rollout_attention_backends"]) == set(rollout_choice.report())
    assert "attention backend plain" in report["operations"]["attention"]["reason"]


def test_an_interrupt_before_the_command_is_read_ends_with_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert run() == 130
    assert capsys.readouterr().err == "prfl-fast: stopped by SIGINT\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_one_line(root, monkeypatch, capsys, number):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # perhaps it is ignored
    monkeypatch.setattr(inspecting, "open_latents", lambda *_, **__: os.kill(os.getpid(), number))
    try:
        assert cli.main(["inspect", str(root / "data")]) == 128 + number
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == f"prfl-fast inspect: stopped by {number.name}\n"


@pytest.mark.slow
def test_doctor_needs_torch_alone(tmp_path):
    names = "diffusers peft yaml rich safetensors tqdm triton tensorboard transformers".split()
    path = tmp_path / "c.yaml"
    script = f"""
        import sys
        sys.modules.update(dict.fromkeys({names}))
        from prfl_fast.cli.main import main
        assert main(["doctor"]) == 0
        sys.exit(main(["train", {str(path)!r}]))
    """
    done = run_python(script)
    assert "diffusers not installed" in done.stdout and "triton is not installed" not in done.stderr
    error = "prfl-fast train: yaml is not installed: pip install 'prfl_fast[train]'"
    assert done.returncode == 2 and done.stderr.splitlines() == [error]


def test_check_prints_the_configuration_and_writes_nothing(root, tmp_path, capsys):
    for command in ("train", "train-reward", "score"):
        out = tmp_path / command / "out"
        out.parent.mkdir()
        assert call(command, root, out, None, "--check") == 0
        printed = capsys.readouterr().out
        again = write_config(tmp_path / "again.yaml", printed)
        assert cli.main([command, str(again), "--check"]) == 0
        assert capsys.readouterr().out == printed and "seed: 0" in printed
        assert [p.name for p in out.parent.iterdir()] == [f"{command}.yaml"]


def test_train_then_go_on(root, tmp_path, capsys):
    out = tmp_path / "out"
    changes = {"run.steps": 2, "prfl.points": 2, "prfl.solver": "euler", "run.tensorboard": True}
    assert call("train", root, out, changes) == 0
    assert f"step 2, 0 updates skipped; saved in {out / 'step-00000002'}" in capsys.readouterr().out
    records = train(root, out, {**changes, "run.steps": 3})
    assert [r["step"] for r in records] == [1, 2, 3]
    assert all(0 < r["prfl/reward"] < 1 for r in records)
    names = {p.name for p in out.iterdir()}
    assert names == {"config.yaml", "final", "log.jsonl", "step-00000003", "tensorboard"}


def test_train_reward_then_score(root, tmp_path, capsys):
    out = tmp_path / "out"
    changes = {"run.steps": 2, "eval": {"data": str(root / "data"), "timesteps": [400, 1000]}}
    assert call("train-reward", root, out, changes) == 0
    assert set(json.loads((out / "evaluation.json").read_text())) == {"400", "1000"}
    assert "accuracy" in capsys.readouterr().out
    trained = LatentRewardModel.load(out / "reward").state_dict()
    assert_same(load_tensors(out / "step-00000002" / "model" / "model.safetensors"), dict(trained))
    scores = {"reward": str(out / "reward")}
    assert call("score", root, tmp_path / "one", scores) == 0
    scores |= {"batch_size": 3, "out": str(tmp_path / "three.csv")}
    assert call("score", root, tmp_path / "three", scores) == 0
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    three = list(csv.DictReader((tmp_path / "three.csv").open()))
    names = [f"{i:06d}" for i in range(4)]
    assert [row["id"] for row in one] == [row["id"] for row in three] == names
    for a, b in zip(one, three, strict=True):
        assert set(a) == {"id", "t201", "t800"} and 0 < a["t201"] < 1
        assert all(float(b[key]) == pytest.approx(a[key], rel=1e-5) for key in ("t201", "t800"))


def test_preference_pairs_and_the_reference_layout(root, tmp_path):
    changes = {"data": str(root / "pairs"), "loss": "bt", "hardware.precision": "bf16"}
    assert call("train-reward", root, tmp_path / "out", {**changes, "run.steps": 1}) == 0
    assert call("score", root, tmp_path / "ours") == 0
    changes = {"reward": reference_layout(root, tmp_path / "theirs"), "model": str(root / "model")}
    assert call("score", root, tmp_path / "theirs", changes) == 0
    assert (tmp_path / "ours.jsonl").read_text() == (tmp_path / "theirs.jsonl").read_text()


def test_the_references_reward_training(root, tmp_path):
    """Losers of a second list, dropped text, short captions, a rate and clipping of its parts."""
    for name, seed, rows in (("win", 3, 3), ("lose", 4, 5)):
        videos = [
            s._replace(labels={}, short=torch.ones(2, 20)) for s in samples(3, seed, rows=rows)
        ]
        write_dataset(tmp_path / name, videos)
        empty = {"encoder_hidden_states": torch.zeros(1, 20)}
        save_tensors(empty, tmp_path / name / "empty_prompt.safetensors")
    changes = {"data": str(tmp_path / "win"), "text_drop": 0.5, "short_captions": 0.5}
    changes |= {"optimizer.clip": "blocks", "run.steps": 1}
    assert call("train-reward", root, tmp_path / "ce", {**changes, "missing_label": 0}) == 0
    changes |= {"loss": "bt", "lose_data": str(tmp_path / "lose")}
    states = []
    for rate in (1e-3, 2e-3):
        changes["optimizer.head_learning_rate"] = rate
        assert call("train-reward", root, tmp_path / f"{rate}", changes) == 0
        states.append(LatentRewardModel.load(tmp_path / f"{rate}" / "reward").state_dict())
    moved = {k: float((states[0][k] - states[1][k]).abs().max()) for k in states[0]}
    # Adam's first step moves each weight by its rate.
    assert moved.pop("pool.queries") == pytest.approx(1e-3, rel=0.05)
    assert all(value == 0 for key, value in moved.items() if key.startswith("backbone."))


METHODS = [
    {"method": "prfl", "points": 3, "draws": "independent"},
    {"method": "refl", "window": 0.5},
    {"method": "draft", "depth": "all"},
    {"method": "draft-lv", "renoised": 1},
    {"method": "alignprop", "depth": 2},
    {"method": "controlnet++"},
    {"method": "instructvideo", "strength": 0.9, "depth": 2, "segments": 2, "attenuation": 0.5},
    {"method": "rg-lcd", "target": None},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["method"])
def test_train_by_every_method(root, tmp_path, method):
    changes = {"run.steps": 2, "objectives": ["prfl"], "prfl": {"num_inference_steps": 4, **method}}
    for record in train(root, tmp_path / "out", changes):
        assert 0 < record["prfl/reward"] < 1 and record["prfl/grad_norm"] > 0
    stored = load_config(TrainFile, tmp_path / "out" / "config.yaml")
    assert stored.prfl.method == method["method"] and stored.prfl.num_inference_steps == 4


def test_instructvideo_may_reward_the_whole_video(root, tmp_path, monkeypatch, capsys):
    feedback = {"num_inference_steps": 4, "method": "instructvideo", "segments": "all"}
    changes = {"run.steps": 1, "objectives": ["prfl"], "prfl": feedback}
    assert call("train", root, tmp_path / "out", changes, "--check") == 0
    assert "segments: all\n" in capsys.readouterr().out
    shapes, score = [], LatentRewardModel.forward

    def seen(self, x, *rest, **options):
        shapes.append(tuple(x.shape))
        return score(self, x, *rest, **options)

    monkeypatch.setattr(LatentRewardModel, "forward", seen)
    assert call("train", root, tmp_path / "out", changes) == 0
    assert shapes == [(1, 16, *SIZE)]  # one score of all frames
    changes["prfl.segments"] = 2
    assert call("train", root, tmp_path / "frames", changes) == 0
    assert len(shapes) > 1 and all(shape[2] == 1 for shape in shapes[1:])


def other_reward(root, folder, seed):
    torch.manual_seed(seed)
    reward = LatentRewardModel.load(root / "reward")
    with torch.no_grad():
        for parameter in reward.head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    reward.save(folder)
    return str(folder)


def test_several_rewards_are_weighted_and_logged_by_name(root, tmp_path):
    paths = [other_reward(root, tmp_path / f"r{i}", i) for i in range(2)]
    rewards = [
        {"name": "motion", "path": str(root / "reward")},
        {"name": "look", "path": paths[0], "weight": 0.5},
        {"name": "worst", "path": paths, "weight": 2.0, "ensemble": "worst"},
    ]
    changes = {"run.steps": 2, "objectives": ["prfl"], "reward": rewards}
    for record in train(root, tmp_path / "out", changes):
        scores = {name: record[f"prfl/reward/{name}"] for name in ("motion", "look", "worst")}
        total = scores["motion"] + 0.5 * scores["look"] + 2 * scores["worst"]
        assert record["prfl/reward"] == pytest.approx(total, rel=1e-5)
        assert scores["worst"] <= scores["look"] + 1e-6 and scores["motion"] != scores["look"]


def test_a_policy_of_the_rewards_changes_no_bit_of_an_ensemble(root, tmp_path):
    paths = [other_reward(root, tmp_path / f"r{i}", i) for i in range(2)]
    reward = [{"name": "a", "path": paths, "ensemble": "uncertainty", "coefficient": 0.3}]
    base = {"run.steps": 2, "objectives": ["prfl"], "reward": reward}
    policy = {"reward_memory": {"activation_checkpointing": "attention", "offload": "cpu"}}
    records = train(root, tmp_path / "plain", base)
    assert train(root, tmp_path / "kept", {**base, **policy}) == records
    assert all(record["prfl/grad_norm"] > 0 for record in records)


def test_divergence_is_zero_before_the_first_update_and_logged(root, tmp_path):
    changes = {"run.steps": 3, "objectives": ["prfl"], "lora.lora_rank": 2}
    changes |= {"rollout.merge_lora": True, "prfl.divergence": 0.5}
    moved = [record["prfl/divergence"] for record in train(root, tmp_path / "out", changes)]
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0


def test_guidance_is_read_from_a_file_and_changes_the_trajectory(root, tmp_path):
    same = negative_file(tmp_path / "n.safetensors", 3, 20)
    longer = negative_file(tmp_path / "l.safetensors", 5, 20)
    first = {}
    for name, guidance in {
        "none": None,
        "batched": {"guidance_scale": 4, "negative": same},
        "in turn": {"guidance_scale": 4, "negative": same, "batched": False},
        "longer": {"guidance_scale": 4, "negative": longer, "batched": False},
    }.items():
        changes = {"run.steps": 1, "objectives": ["prfl"], "prfl.guidance": guidance}
        first[name] = train(root, tmp_path / name, changes)[0]["prfl/reward"]
    assert first["batched"] == pytest.approx(first["in turn"], rel=1e-5)
    assert len({round(value, 7) for value in first.values()}) >= 3


def test_a_dataset_may_give_first_frames(root, tmp_path, capsys):
    given = [
        s._replace(conditions={**s.conditions, "first_frame": s.latents[:, :1].clone()})
        for s in samples(4)
    ]
    data = {"data": str(write_dataset(tmp_path / "data", given).folder)}
    plain = train(root, tmp_path / "plain", {"run.steps": 1})
    ours = train(root, tmp_path / "first", {**data, "run.steps": 1})
    assert ours[0]["prfl/loss"] != plain[0]["prfl/loss"]
    assert ours[0]["sft/loss"] != plain[0]["sft/loss"]
    assert call("train-reward", root, tmp_path / "reward", {**data, "run.steps": 1}) == 0
    for number, chosen in enumerate(({}, data)):
        assert call("score", root, tmp_path / f"scores-{number}", chosen) == 0
    scores = [(tmp_path / f"scores-{number}.jsonl").read_text() for number in range(2)]
    assert scores[0] != scores[1]
    method = {"prfl.method": "instructvideo", "prfl.segments": 2}
    error = refused(capsys, "train", root, tmp_path / "frames", {**data, **method})
    assert "prfl.segments is 2, expected all: frames of a dataset with first_frame are" in error


@pytest.mark.slow
def test_a_run_with_a_drift_guard_resumes_as_it_would_have_gone_on(root, tmp_path):
    """Fewer steps with a limit: the guard's counts and its fall back are part of the run."""
    changes = {
        "objectives": ["prfl"],
        "prfl": {"num_inference_steps": 9, "points": 2},
        "rollout": {"stride": 3, "check_every": 3, "drift_limit": 1e-3},
    }
    for limit, fallen in ((1e-9, True), (1e3, False)):
        changes["rollout"]["drift_limit"] = limit
        whole, halves = tmp_path / f"whole{fallen}", tmp_path / f"halves{fallen}"
        message = "past drift_limit 1e-09"
        with pytest.warns(RuntimeWarning, match=message) if fallen else nullcontext():
            records = train(root, whole, {**changes, "run.steps": 4})
            train(root, halves, {**changes, "run.steps": 2})
        assert train(root, halves, {**changes, "run.steps": 4}) == records
        name = "step-00000004/model/diffusion_pytorch_model.safetensors"
        assert (whole / name).read_bytes() == (halves / name).read_bytes()
        checked = [record["step"] for record in records if "prfl/drift" in record]
        assert checked == ([1] if fallen else [1, 4])


def test_what_of_the_rollout_may_change_between_runs(root, tmp_path, capsys):
    base = {"lora.lora_rank": 2, "objectives": ["prfl"]}
    out = tmp_path / "out"
    train(root, out, {**base, "run.steps": 1})
    train(root, out, {**base, "rollout": {"cache": False, "compile": "off"}, "run.steps": 2})
    for changes, message in (
        ({"rollout.merge_lora": True}, "made with rollout.merge_lora = false, this run has true"),
        ({"rollout.stride": 2}, "made with rollout.stride = 1, this run has 2"),
        ({"prfl.method": "refl"}, "made with prfl.method = 'prfl', this run has 'refl'"),
        ({"prfl.divergence": 0.1}, "made with prfl.divergence = 0.0, this run has 0.1"),
    ):
        assert message in refused(capsys, "train", root, out, {**base, **changes, "run.steps": 3})


def test_supervised_alone_loads_no_reward(root, tmp_path):
    changes = {"run.steps": 1, "objectives": ["sft"], "reward": ...}
    (record,) = train(root, tmp_path / "out", changes)
    assert not any(key.startswith("prfl") for key in record)


def test_non_finite_training_has_its_own_exit_code(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "prfl_fast.training.objectives.sft_loss",
        lambda velocity, x, *_, **__: (x.sum() * torch.nan).requires_grad_(),
    )
    out = tmp_path / "out"
    assert call("train", root, out, {"run.steps": 9, "objectives": ["sft"]}) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prfl-fast train: 5 steps in a row")
    assert (out / "step-00000005").is_dir()


def run_outside(tmp_path, *arguments):
    """Run ``python -m prfl_fast.cli`` in a process of its own."""
    # The checkout has a folder "kernels", which transformers would import from its root.
    return subprocess.run(
        [sys.executable, "-m", "prfl_fast.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_no_other_package_writes_to_the_terminal(root, tmp_path):
    changes = {"memory": {"weight_dtype": "nf4", "optimizer": "adamw8bit"}}
    changes |= {"lora.lora_rank": 2, "hardware.precision": "bf16"}
    path = write_config(tmp_path / "c.yaml", config("train", root, tmp_path / "out", changes))
    done = run_outside(tmp_path, "train", path, "--check")
    assert done.returncode == 0 and "lora_rank: 2" in done.stdout
    assert all(
        line.startswith(("prfl-fast: ", "prfl-fast train: ")) for line in done.stderr.splitlines()
    ), done.stderr


@pytest.mark.parametrize("command", ["train", "train-reward", "score"])
def test_init_prints_or_writes_a_new_file(tmp_path, capsys, command):
    path = tmp_path / "new.yaml"
    assert cli.main(["init", command]) == 0
    printed = capsys.readouterr().out
    assert cli.main(["init", command, str(path)]) == 0
    assert path.read_text() == printed and f"written: {path}" in capsys.readouterr().out
    path.write_text("mine")
    assert cli.main(["init", command, str(path)]) == 2
    assert "expected a new file" in one_line(capsys, "init") and path.read_text() == "mine"


def test_tables_are_plain_columns_without_rich(capsys, monkeypatch):
    rows = [("a", "1"), ("long name\nof two lines", "22")]
    print_table(rows, ("name", "value"), numbers=("value",))
    rich = capsys.readouterr().out
    for name in ("rich", "rich.box", "rich.console", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    print_table(rows, ("name", "value"), numbers=("value",))
    plain = capsys.readouterr().out
    expected = "name          value\na             1\nlong name     22\nof two lines\n"
    assert plain == expected
    words = [line.split() for line in rich.splitlines() if line.strip()[:1].isalnum()]
    assert words == [line.split() for line in plain.splitlines()]


@pytest.mark.parametrize("patched", [True, False])
def test_training_says_why_its_rollouts_are_as_they_are(root, tmp_path, capsys, patched):
    changes = {"hardware.patch": patched, "run.steps": 1}
    assert call("train", root, tmp_path / "out", changes) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prfl-fast:")]
    assert len(told) == len(set(told)) > 0
    reason = "are not compiled: the latents are on cpu" if patched else "the model is not patched"
    assert reason in told[-1]
