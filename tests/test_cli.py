"""The command line: what it prints and writes, and how it refuses bad input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from runs import SIZE, config, log, make_world, samples, write_config

from prfl_fast import cli
from prfl_fast.config import Memory, TrainConfig
from prfl_fast.config_file import load_config
from prfl_fast.data import write_dataset
from prfl_fast.gradient_plan import GradientPlan
from prfl_fast.planner import Candidate
from prfl_fast.reward import LatentRewardModel
from prfl_fast.training_state import load_tensors, save_tensors


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(root, tmp_path):
    """A private copy, to be damaged."""
    return shutil.copytree(root, tmp_path / "world")


def call(command, root, out, changes=None, *arguments):
    path = write_config(out.parent / f"{command}.yaml", config(command, root, out, changes))
    return cli.main([command, str(path), *arguments])


def test_doctor_says_which_backend_and_why(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__}" in text and "CUDA C++ extension: " in text
    assert (
        any(line.split()[:2] == ["norm_modulate", "reference"] for line in text.splitlines())
        or torch.cuda.is_available()
    )
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["operations"]["query_pool"]) == {"backend", "reason"}
    assert report["packages"]["diffusers"] and "flash_attn" in report["attention"]


def test_doctor_lists_every_attention_backend(capsys, monkeypatch):
    from prfl_fast.kernels import _attention_choice

    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.partition("attention backend: auto; ")[2].splitlines()
    listed = {line.split()[0]: " ".join(line.split()[1:]) for line in lines[1:]}
    assert set(listed) == set(_attention_choice.BACKENDS)
    assert listed["plain"] == "usable"
    assert all(v == "usable" or v.startswith("refused: ") for v in listed.values())
    if not torch.cuda.is_available():
        assert lines[1].split() == ["cpu", "usable"]
        assert listed["cudnn"] == "refused: it takes cuda tensors, these are on cpu"
    monkeypatch.setattr(_attention_choice, "_current", "plain")
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["attention_backend"] == "plain"
    assert report["attention_backends"]["plain"] == {"usable": True, "reason": None}
    assert "attention backend plain" in report["operations"]["attention"]["reason"]


def test_doctor_needs_torch_alone(tmp_path):
    names = (
        "diffusers",
        "peft",
        "yaml",
        "safetensors",
        "tqdm",
        "triton",
        "tensorboard",
        "transformers",
    )
    path = tmp_path / "c.yaml"
    script = (
        f"import sys\nfor n in {names}: sys.modules[n] = None\nfrom prfl_fast.cli import main\n"
        f"assert main(['doctor']) == 0\nsys.exit(main(['train', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "diffusers not installed" in done.stdout and "triton is not installed" not in done.stderr
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1]
        == "prfl-fast train: yaml is not installed: pip install 'prfl_fast[train]'"
    )


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
    assert call("train", root, out, {**changes, "run.steps": 3}) == 0
    records = log(out)
    assert [r["step"] for r in records] == [1, 2, 3] and all(
        0 < r["prfl/reward"] < 1 for r in records
    )
    names = {p.name for p in out.iterdir()}
    assert names == {"config.yaml", "log.jsonl", "step-00000003", "tensorboard"}


def test_train_reward_then_score(root, tmp_path, capsys):
    out = tmp_path / "out"
    changes = {"run.steps": 2, "eval_data": str(root / "data"), "timesteps": [400, 1000]}
    assert call("train-reward", root, out, changes) == 0
    assert set(json.loads((out / "evaluation.json").read_text())) == {"400", "1000"}
    assert "t = 400: accuracy" in capsys.readouterr().out
    trained = LatentRewardModel.load(out / "reward").state_dict()
    saved = load_tensors(out / "step-00000002" / "model" / "model.safetensors")
    assert saved.keys() == trained.keys() and all(torch.equal(saved[n], trained[n]) for n in saved)
    scores = {"reward": str(out / "reward")}
    assert call("score", root, tmp_path / "one", scores) == 0
    assert (
        call(
            "score",
            root,
            tmp_path / "three",
            {**scores, "batch_size": 3, "out": str(tmp_path / "three.csv")},
        )
        == 0
    )
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    three = list(csv.DictReader((tmp_path / "three.csv").open()))
    assert (
        [row["id"] for row in one] == [row["id"] for row in three] == [f"{i:06d}" for i in range(4)]
    )
    for a, b in zip(one, three, strict=True):
        assert set(a) == {"id", "t201", "t800"} and 0 < a["t201"] < 1
        assert all(float(b[key]) == pytest.approx(a[key], rel=1e-5) for key in ("t201", "t800"))


def test_preference_pairs_and_the_reference_layout(root, tmp_path):
    changes = {
        "run.steps": 1,
        "data": str(root / "pairs"),
        "loss": "bt",
        "hardware.precision": "bf16",
    }
    assert call("train-reward", root, tmp_path / "out", changes) == 0
    reward = LatentRewardModel.load(root / "reward")
    folder, mlp, pool = reward.save_reference(tmp_path / "reference")
    layout = {"transformer": str(folder), "mlp": str(mlp), "pool": str(pool), "num_heads": 2}
    assert call("score", root, tmp_path / "ours") == 0
    assert (
        call("score", root, tmp_path / "theirs", {"reward": layout, "model": str(root / "model")})
        == 0
    )
    assert (tmp_path / "ours.jsonl").read_text() == (tmp_path / "theirs.jsonl").read_text()


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
    changes = {"run.steps": 2, "objectives": ["prfl"], "prfl": {"num_steps": 4, **method}}
    assert call("train", root, tmp_path / "out", changes) == 0
    for record in log(tmp_path / "out"):
        assert 0 < record["prfl/reward"] < 1 and record["prfl/grad_norm"] > 0
    stored = load_config(TrainConfig, tmp_path / "out" / "config.yaml")
    assert stored.prfl.method == method["method"] and stored.prfl.num_steps == 4


def test_instructvideo_may_reward_the_whole_video(root, tmp_path, monkeypatch, capsys):
    feedback = {"num_steps": 4, "method": "instructvideo", "segments": "all"}
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
    assert call("train", root, tmp_path / "out", changes) == 0
    for record in log(tmp_path / "out"):
        scores = {name: record[f"prfl/reward/{name}"] for name in ("motion", "look", "worst")}
        total = scores["motion"] + 0.5 * scores["look"] + 2 * scores["worst"]
        assert record["prfl/reward"] == pytest.approx(total, rel=1e-5)
        assert scores["worst"] <= scores["look"] + 1e-6 and scores["motion"] != scores["look"]


def test_a_policy_of_the_rewards_changes_no_bit_of_an_ensemble(root, tmp_path):
    paths = [other_reward(root, tmp_path / f"r{i}", i) for i in range(2)]
    reward = [{"name": "a", "path": paths, "ensemble": "uncertainty", "coefficient": 0.3}]
    base = {"run.steps": 2, "objectives": ["prfl"], "reward": reward}
    policy = {"memory.reward_policy": "attention", "memory.reward_offload": "cpu"}
    assert call("train", root, tmp_path / "plain", base) == 0
    assert call("train", root, tmp_path / "kept", {**base, **policy}) == 0
    assert log(tmp_path / "plain") == log(tmp_path / "kept")
    assert all(record["prfl/grad_norm"] > 0 for record in log(tmp_path / "plain"))


def test_check_prints_methods_rewards_and_rollouts(root, tmp_path, capsys):
    changes = {
        "lora.rank": 2,
        "prfl": {"num_steps": 5, "method": "draft", "depth": "all", "divergence": 0.1},
        "reward": [{"name": "a", "path": str(root / "reward"), "weight": 2}],
        "rollout": {"merge_lora": True, "precision": {"linears": [0.2, 1]}},
    }
    assert call("train", root, tmp_path / "out", changes, "--check") == 0
    printed = load_config(TrainConfig, write_config(tmp_path / "p.yaml", capsys.readouterr().out))
    assert printed == load_config(TrainConfig, tmp_path / "train.yaml")
    assert printed.prfl.depth == "all" and printed.rollout.precision.linears == (0.2, 1.0)


def test_divergence_is_zero_before_the_first_update_and_logged(root, tmp_path):
    changes = {
        "run.steps": 3,
        "objectives": ["prfl"],
        "lora.rank": 2,
        "rollout.merge_lora": True,
        "prfl.divergence": 0.5,
    }
    assert call("train", root, tmp_path / "out", changes) == 0
    moved = [record["prfl/divergence"] for record in log(tmp_path / "out")]
    assert moved[0] == 0 and moved[1] > 0 and moved[2] > 0


def negative_file(path, *shape, name="encoder_hidden_states", value=None):
    generator = torch.Generator().manual_seed(5)
    tensor = torch.randn(*shape, generator=generator)
    save_tensors({name: tensor if value is None else tensor + value}, path)
    return str(path)


def test_guidance_is_read_from_a_file_and_changes_the_trajectory(root, tmp_path):
    same = negative_file(tmp_path / "n.safetensors", 3, 20)
    longer = negative_file(tmp_path / "l.safetensors", 5, 20)
    first = {}
    for name, guidance in {
        "none": None,
        "batched": {"scale": 4, "negative": same},
        "in turn": {"scale": 4, "negative": same, "batched": False},
        "longer": {"scale": 4, "negative": longer, "batched": False},
    }.items():
        changes = {"run.steps": 1, "objectives": ["prfl"], "prfl.guidance": guidance}
        assert call("train", root, tmp_path / name, changes) == 0
        first[name] = log(tmp_path / name)[0]["prfl/reward"]
    assert first["batched"] == pytest.approx(first["in turn"], rel=1e-5)
    assert len({round(value, 7) for value in first.values()}) >= 3


def test_a_run_with_a_drift_guard_resumes_as_it_would_have_gone_on(root, tmp_path):
    """Fewer steps with a limit: the guard's counts and its fall back are part of the run."""
    changes = {
        "objectives": ["prfl"],
        "prfl": {"num_steps": 9, "points": 2},
        "rollout.precision": {"stride": 3, "check_every": 3, "drift_limit": 1e-3},
    }
    for limit, fallen in ((1e-9, True), (1e3, False)):
        changes["rollout.precision"]["drift_limit"] = limit
        whole, halves = tmp_path / f"whole{fallen}", tmp_path / f"halves{fallen}"
        with (
            pytest.warns(RuntimeWarning, match="past drift_limit 1e-09")
            if fallen
            else nullcontext()
        ):
            assert call("train", root, whole, {**changes, "run.steps": 5}) == 0
            assert call("train", root, halves, {**changes, "run.steps": 2}) == 0
        assert call("train", root, halves, {**changes, "run.steps": 5}) == 0
        records = log(whole)
        assert records == log(halves)
        name = "step-00000005/model/diffusion_pytorch_model.safetensors"
        assert (whole / name).read_bytes() == (halves / name).read_bytes()
        checked = [record["step"] for record in records if "prfl/drift" in record]
        assert checked == ([1] if fallen else [1, 4])


def test_what_of_the_rollout_may_change_between_runs(root, tmp_path, capsys):
    base = {"lora.rank": 2, "objectives": ["prfl"]}
    out = tmp_path / "out"
    assert call("train", root, out, {**base, "run.steps": 1}) == 0
    free = {"rollout.cache": False, "rollout.compile": "off"}
    assert call("train", root, out, {**base, **free, "run.steps": 2}) == 0
    capsys.readouterr()
    for changes, message in (
        ({"rollout.merge_lora": True}, "made with rollout.merge_lora = False, this run has True"),
        ({"rollout.precision": {"stride": 2}}, "made with rollout.precision = None, this run has"),
        ({"prfl.method": "refl"}, "made with prfl.method = 'prfl', this run has 'refl'"),
        ({"prfl.divergence": 0.1}, "made with prfl.divergence = 0.0, this run has 0.1"),
    ):
        assert call("train", root, out, {**base, **changes, "run.steps": 3}) == 2
        assert message in one_line(capsys, "train")


QLORA = {"hardware.precision": "bf16", "lora.rank": 2}
EVERY_KEY = {
    "weights": "nf4",
    "policy": "attention",
    "offload": "cpu",
    "reward_weights": "fp8",
    "reward_policy": "full",
    "reward_offload": "cpu",
    "feed_forward_chunk": 3,
    "optimizer": "adamw8bit",
    "gradients": "fp32",
}


@pytest.mark.parametrize(
    "changes",
    [
        {**QLORA, "memory.policy": "full", "hardware.patch": False},
        {**QLORA, "memory": EVERY_KEY},
        {"hardware.precision": "bf16", "memory": {"weights": "bf16", "optimizer": "adamw-sr"}},
        {"hardware.precision": "bf16", "memory": {"weights": "bf16", "gradients": "fp32"}},
        {"hardware.precision": "bf16", "memory": {"reward_weights": "nf4"}},
    ],
)
def test_train_under_a_memory_policy(root, tmp_path, changes):
    assert call("train", root, tmp_path / "out", {"run.steps": 2, **changes}) == 0
    saved = tmp_path / "out/step-00000002/model"
    name = "pytorch_lora_weights" if "lora.rank" in changes else "diffusion_pytorch_model"
    tensors = load_tensors(saved / f"{name}.safetensors")
    narrow = changes.get("memory", {}).get("weights", "fp32") != "fp32"
    dtypes = {tensor.dtype for tensor in tensors.values()}
    assert torch.bfloat16 in dtypes if narrow else dtypes == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all(record["sft/grad_norm"] > 0 for record in log(tmp_path / "out"))


def test_the_weights_that_train_start_as_the_file_has_them(root, tmp_path, monkeypatch):
    """bf16 is read from float32 and rounded once; what diffusers keeps in float32 is not."""
    from prfl_fast import memory

    seen = {}
    cast = memory.cast_weights
    monkeypatch.setattr(
        memory,
        "cast_weights",
        lambda model, kind, **options: seen.setdefault(kind, cast(model, kind, **options)),
    )
    monkeypatch.setattr(
        "prfl_fast.trainer.Trainer.run", lambda self: (_ for _ in ()).throw(OSError)
    )
    file = load_tensors(root / "model/diffusion_pytorch_model.safetensors")
    changes = {"hardware.precision": "bf16", "memory": {"weights": "bf16"}}
    assert call("train", root, tmp_path / "out", changes) == 2
    state = seen["bf16"].state_dict()
    assert state.keys() == file.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, file[name].to(tensor.dtype))
        kept = any(part in name for part in ("time_embedder", "scale_shift_table", "norm2"))
        assert (tensor.dtype == torch.float32) == kept, name


def test_a_reward_in_the_reference_layout_keeps_its_float32(root, tmp_path, monkeypatch):
    """Its structure comes from the generator, which is read in bfloat16; its weights must not."""
    from prfl_fast import memory

    folder, mlp, pool = LatentRewardModel.load(root / "reward").save_reference(tmp_path / "theirs")
    layout = {"transformer": str(folder), "mlp": str(mlp), "pool": str(pool), "num_heads": 2}
    seen = []

    def note(transformer, reward, *rest, **options):
        memory.apply_memory(transformer, reward, *rest, **options)
        seen.append(reward if transformer is None else transformer)

    monkeypatch.setattr("prfl_fast.cli_train.apply_memory", note)
    changes = {"hardware.precision": "bf16", "reward": layout, "run.steps": 1}
    assert call("train", root, tmp_path / "a", {**changes, "memory": {"weights": "bf16"}}) == 0
    both = {"weights": "bf16", "reward_weights": "bf16"}
    assert call("train", root, tmp_path / "b", {**changes, "memory": both}) == 0
    file = load_tensors(root / "reward/model.safetensors")
    runs = zip(seen[::2], seen[1::2], (torch.float32, torch.bfloat16), strict=True)
    for transformer, reward, dtype in runs:
        assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
        weight = reward.backbone.blocks[0].attn1.to_q.weight
        assert weight.dtype == dtype
        assert torch.equal(weight, file["backbone.blocks.0.attn1.to_q.weight"].to(dtype))


def test_a_run_may_go_on_under_another_policy_but_not_with_other_weights(root, tmp_path, capsys):
    base = {"hardware.precision": "bf16", "lora.rank": 2, "memory.weights": "nf4"}
    policies = {
        "memory.policy": "attention",
        "memory.offload": "cpu",
        "memory.reward_policy": "full",
        "memory.reward_offload": "cpu",
    }
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert call("train", root, whole, {**base, "run.steps": 4}) == 0
    assert call("train", root, halves, {**base, "run.steps": 2}) == 0
    assert call("train", root, halves, {**base, **policies, "run.steps": 4}) == 0
    assert log(whole) == log(halves)
    name = "step-00000004/model/pytorch_lora_weights.safetensors"
    a, b = load_tensors(whole / name), load_tensors(halves / name)
    assert all(torch.equal(a[key], b[key]) for key in a)
    capsys.readouterr()
    for changes, message in (
        ({"memory.weights": "fp8"}, "made with memory.weights = 'nf4', this run has 'fp8'"),
        ({"memory.reward_weights": "bf16"}, "made with memory.reward_weights = 'fp32', this run"),
        ({"memory.optimizer": "adamw-sr"}, "made with optimizer = 'adamw', this run has"),
        ({"memory.gradients": "fp32"}, "made with gradients = 'parameter', this run has 'fp32'"),
    ):
        assert call("train", root, halves, {**base, **changes, "run.steps": 6}) == 2
        assert message in one_line(capsys, "train")


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-sr"])
def test_train_reward_under_a_memory_policy(root, tmp_path, optimizer):
    memory = {"weights": "bf16", "policy": "attention", "offload": "cpu", "optimizer": optimizer}
    changes = {"run.steps": 2, "hardware.precision": "bf16", "memory": memory}
    out = tmp_path / "out"
    changes |= {"eval_data": str(root / "data"), "timesteps": [400]}
    assert call("train-reward", root, out, changes) == 0
    reward = LatentRewardModel.load(out / "reward")
    assert reward.backbone.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert reward.head.fc1.weight.dtype == torch.float32
    assert call("score", root, tmp_path / "one", {"reward": str(out / "reward")}) == 0


class FakePlan:
    """A plan whose choice does not take a search."""

    def __init__(self, memory, less=None, feasible=True, **arguments):
        self.memory, self.less, self.feasible, self.arguments = memory, less, feasible, arguments
        self.peak, self.reserve, self.budget = 3 << 30, 1 << 30, 8 << 30

    def smaller(self, memory):
        return self.less


@pytest.fixture
def planned(monkeypatch):
    """Calls of the planner; what it finds is ``planned.plan``."""
    from prfl_fast import planner

    calls = []

    def plan(model, **arguments):
        calls.append({"model": model, **arguments})
        return calls_plan[0]

    calls_plan = [FakePlan(Memory(weights="bf16", reward_weights="bf16", policy="full"))]
    monkeypatch.setattr(planner, "plan", plan)
    monkeypatch.setattr(calls_plan[0], "calls", calls, raising=False)
    return calls_plan


AUTO = {"hardware.precision": "bf16", "memory": "auto"}


def test_memory_auto_is_planned_for_the_run_and_kept_by_its_continuation(
    root, tmp_path, planned, capsys
):
    out = tmp_path / "out"
    changes = {**AUTO, "lora.rank": 3, "run.steps": 1, "run.accumulation": 2, "prfl.points": 2}
    assert call("train", root, out, changes) == 0
    (asked,) = planned[0].calls
    assert asked["model"] == str(root / "model") and asked["rollout"].points == 2
    sizes = {"frames": 5, "height": 32, "width": 32, "text_tokens": 3}
    expected = {"train": "lora", "lora_rank": 3, "batch": 1, "accumulation": 2, "num_steps": 3}
    expected |= {**sizes, "reward_blocks": 1, "sft": True, "host_budget": 1}
    expected |= {"average": True, "patched": True}
    assert {key: asked[key] for key in expected} == expected
    assert asked["budget"] > 1 << 20
    error = capsys.readouterr().err
    assert error == (
        "prfl-fast train: memory: auto is {weights: bf16, policy: full, reward_weights: bf16}, "
        "predicted to take 4.0 of 8.0 GiB\n"
    )
    stored = load_config(TrainConfig, out / "config.yaml")
    assert stored.memory == planned[0].memory
    planned[0].memory = Memory(weights="fp8", reward_weights="fp8")
    assert call("train", root, out, {**changes, "run.steps": 2}) == 0
    assert "as this run began" in capsys.readouterr().err and len(planned[0].calls) == 1
    assert load_config(TrainConfig, out / "config.yaml").memory == stored.memory


@pytest.mark.slow
def test_memory_auto_by_a_whole_search(root, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("train", root, out, {**AUTO, "lora.rank": 2, "run.steps": 1}) == 0
    memory = load_config(TrainConfig, out / "config.yaml").memory
    assert memory == Memory(weights="bf16", reward_weights="bf16")
    assert "memory: auto is {weights: bf16, reward_weights: bf16}" in capsys.readouterr().err


def test_memory_auto_that_fits_nowhere(root, tmp_path, planned, capsys):
    planned[0].feasible, planned[0].peak = False, 9 << 30
    assert call("train", root, tmp_path / "out", AUTO) == 2
    error = one_line(capsys, "train")
    assert "memory is auto, but no plan fits 8.0 GiB: the nearest, {weights: bf16" in error
    assert "takes 10.0 GiB" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("objectives", [["prfl", "sft"], ["sft"]])
def test_memory_auto_of_a_chain_is_refused_where_it_trains(
    root, tmp_path, planned, capsys, objectives
):
    changes = {**AUTO, "run.steps": 1, "objectives": objectives, "prfl.method": "draft-lv"}
    code = call("train", root, tmp_path / "out", changes)
    if objectives == ["sft"]:
        assert code == 0 and planned[0].calls[0]["rollout"] == GradientPlan.prfl()
    else:
        assert code == 2 and "so say what memory is, as {policy: full}" in one_line(capsys, "train")
        assert not planned[0].calls and not (tmp_path / "out").exists()


@pytest.mark.parametrize("batched", [True, False])
def test_guided_steps_are_not_planned(root, tmp_path, planned, monkeypatch, capsys, batched):
    negative = negative_file(tmp_path / "n.safetensors", 3, 20)
    guidance = {"scale": 5, "negative": negative, "batched": batched}
    changes = {**AUTO, "run.steps": 1, "prfl.guidance": guidance}
    assert call("train", root, tmp_path / "out", changes) == 2
    assert "prfl.guidance is set" in one_line(capsys, "train")
    assert not planned[0].calls and not (tmp_path / "out").exists()
    alone = {**changes, "objectives": ["sft"]}
    assert call("train", root, tmp_path / "sft", alone) == 0 and len(planned[0].calls) == 1

    import prfl_fast.trainer

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(prfl_fast.trainer, "sft_loss", full)
    assert call("train", root, tmp_path / "out", {**changes, "memory": {"policy": "full"}}) == 4
    error = capsys.readouterr().err
    assert "no plan: prfl.guidance is set" in error and "steps without guidance only" in error
    assert len(planned[0].calls) == 1


def test_memory_auto_of_supervised_training_alone(root, tmp_path, planned):
    changes = {**AUTO, "run.steps": 1, "objectives": ["sft"], "reward": ...}
    assert call("train", root, tmp_path / "out", changes) == 0
    assert planned[0].calls[0]["reward_blocks"] == 1


def test_check_prints_what_auto_is(root, tmp_path, planned, capsys):
    assert call("train", root, tmp_path / "out", AUTO, "--check") == 0
    printed = capsys.readouterr().out
    content = load_config(TrainConfig, write_config(tmp_path / "again.yaml", printed))
    assert content.memory == planned[0].memory and not (tmp_path / "out").exists()


@pytest.mark.parametrize("memory", ["auto", {"policy": "full"}, {"weights": "bf16"}])
def test_out_of_memory_says_what_to_try(root, tmp_path, planned, monkeypatch, capsys, memory):
    import prfl_fast.trainer

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(prfl_fast.trainer, "sft_loss", full)
    less = Memory(weights="bf16", reward_weights="bf16", policy="full", offload="cpu")
    planned[0].less = Candidate(less, 2 << 30, 0, 1.0, "fits, slower")
    changes = {"run.steps": 1, "hardware.precision": "bf16", "memory": memory}
    assert call("train", root, tmp_path / "out", changes) == 4
    error = capsys.readouterr().err
    assert "out of memory in objective 'sft', forward of micro-batch 1, step 1: CUDA out" in error
    assert "live: weights" in error and "Traceback" not in error
    assert (
        "try memory: {weights: bf16, policy: full, offload: cpu, reward_weights: bf16}, predicted "
        "to peak at 2.0 GiB" in error
    )
    assert not list((tmp_path / "out").glob("step-*")) and len(planned[0].calls) == 1
    planned[0].less, planned[0].memory = (
        None,
        load_config(TrainConfig, tmp_path / "out" / "config.yaml").memory,
    )
    assert call("train", root, tmp_path / "out", changes) == 4
    assert "no policy is known to take less: fewer frames" in capsys.readouterr().err


def test_out_of_memory_before_training_is_one_line(root, tmp_path, monkeypatch, capsys):
    from prfl_fast import memory

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore.")

    monkeypatch.setattr(memory, "cast_weights", full)
    assert call("train", root, tmp_path / "out") == 4
    assert one_line(capsys, "train") == "prfl-fast train: CUDA out of memory.\n"


def test_supervised_alone_loads_no_reward(root, tmp_path):
    assert (
        call(
            "train", root, tmp_path / "out", {"run.steps": 1, "objectives": ["sft"], "reward": ...}
        )
        == 0
    )
    assert not any(key.startswith("prfl") for key in log(tmp_path / "out")[0])


def test_non_finite_training_has_its_own_exit_code(root, tmp_path, monkeypatch, capsys):
    import prfl_fast.trainer

    monkeypatch.setattr(
        prfl_fast.trainer,
        "sft_loss",
        lambda velocity, x, *_, **__: (x.sum() * torch.nan).requires_grad_(),
    )
    out = tmp_path / "out"
    assert call("train", root, out, {"run.steps": 9, "objectives": ["sft"]}) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prfl-fast train: 5 steps in a row")
    assert (out / "step-00000005").is_dir()


# Bad input: what to change in a valid configuration or in the files it names, and a part of the
# error line.


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
BAD = {
    # configuration
    "unknown key": ("train", {"prlf": 1}, None, "unknown key 'prlf': did you mean 'prfl'?"),
    "unknown nested key": (
        "train",
        {"optimizer.lerning_rate": 1},
        None,
        "did you mean 'learning_rate'?",
    ),
    "unknown key of score": (
        "score",
        {"timestep": [1]},
        None,
        "unknown key 'timestep': did you mean 'timesteps'?",
    ),
    "negative rate": (
        "train",
        {"optimizer.learning_rate": -1e-5},
        None,
        "optimizer.learning_rate is -1e-05",
    ),
    "rate not a number": (
        "train",
        {"optimizer.learning_rate": "high"},
        None,
        "'high', expected a number",
    ),
    "steps a float": (
        "train",
        {"run.steps": 1.5},
        None,
        "run.steps is 1.5, expected a whole number",
    ),
    "steps missing": ("train", {"run.steps": ...}, None, "run.steps is missing"),
    "zero accumulation": (
        "train",
        {"run.accumulation": 0},
        None,
        "run.accumulation is 0, expected a value at least 1",
    ),
    "no objectives": (
        "train",
        {"objectives": []},
        None,
        "objectives is [], expected a list of one or more",
    ),
    "no timesteps": (
        "score",
        {"timesteps": []},
        None,
        "timesteps is [], expected a list of one or more",
    ),
    "timestep too large": ("score", {"timesteps": [2000]}, None, "timesteps[0] is 2000"),
    "too many points": ("train", {"prfl.points": 9}, None, "prfl.points is 9, but 3 steps have"),
    "unknown precision": (
        "train",
        {"hardware.precision": "fp16"},
        None,
        "expected one of fp32, bf16",
    ),
    "unknown device": (
        "train",
        {"hardware.device": "gpu"},
        None,
        "hardware.device is 'gpu', expected auto, cpu",
    ),
    "absent device": (
        "train",
        {"hardware.device": "cuda:99"},
        None,
        "hardware.device is 'cuda:99', but there are",
    ),
    "unknown policy": (
        "train",
        {"memory.policy": "atention"},
        None,
        "memory.policy is 'atention', expected one of none, full, attention; did you mean",
    ),
    "checkpointing under its old name": (
        "train",
        {"hardware.gradient_checkpointing": True},
        None,
        "unknown key 'hardware.gradient_checkpointing'",
    ),
    "memory a size": ("train", {"memory": "24GiB"}, None, "memory is '24GiB', expected auto or"),
    "auto in float32": ("train", {"memory": "auto"}, None, "set hardware.precision: bf16"),
    "offload to disk": ("train", {"memory.offload": "disk"}, None, "expected cpu or null"),
    "no tokens in a chunk": (
        "train",
        {"memory.feed_forward_chunk": 0},
        None,
        "memory.feed_forward_chunk is 0, expected a value at least 1",
    ),
    "4 bits that should train": (
        "train",
        {"memory.weights": "nf4", "hardware.precision": "bf16"},
        None,
        "memory.weights is nf4, which cannot be trained: add lora",
    ),
    "4 bits in float32": (
        "train",
        {"memory.weights": "nf4", "lora.rank": 2},
        None,
        "memory.weights is nf4, which computes in bfloat16: set hardware.precision: bf16",
    ),
    "unknown optimizer": ("train", {"memory.optimizer": "lion"}, None, "expected one of adamw, "),
    "paged states without CUDA": (
        "train",
        {"memory.optimizer": "paged-adamw8bit"},
        None,
        "memory.optimizer is paged-adamw8bit, which needs a CUDA device",
    ),
    "paged states of a reward without CUDA": (
        "train-reward",
        {"memory.optimizer": "paged-adamw8bit"},
        None,
        "memory.optimizer is paged-adamw8bit, which needs a CUDA device",
    ),
    "auto for a reward": (
        "train-reward",
        {"memory": "auto"},
        None,
        "memory is 'auto', expected a mapping with keys weights, policy",
    ),
    "a reward in 4 bits that trains": (
        "train-reward",
        {"memory.weights": "nf4"},
        None,
        "memory.weights is 'nf4', expected one of fp32, bf16",
    ),
    "memory of score": ("score", {"memory.policy": "full"}, None, "unknown key 'memory'"),
    "no reward": (
        "train",
        {"reward": ...},
        None,
        "reward is missing: the prfl objective needs a reward model",
    ),
    "a method's key for another": (
        "train",
        {"prfl.method": "refl", "prfl.points": 2},
        None,
        "prfl.points is 2, but prfl.method is refl, which takes window",
    ),
    "divergence without adapters": (
        "train",
        {"prfl.divergence": 0.1},
        None,
        "prfl.divergence is set, but there are no adapters: add lora",
    ),
    "too few frames for the segments": (
        "train",
        {"prfl.method": "instructvideo"},
        None,
        "prfl.segments is 4, but the latents of the dataset have 2 frames",
    ),
    "a second reward that is not there": (
        "train",
        {"reward": [{"name": "a", "path": "nowhere"}, {"name": "b", "path": "nowhere"}]},
        None,
        "nowhere is not a saved reward model",
    ),
    "no negative conditions": (
        "train",
        {"prfl.guidance": {"scale": 5, "negative": "nowhere"}},
        None,
        "nowhere: no such file",
    ),
    "no negative conditions, supervised alone": (
        "train",
        {"prfl.guidance": {"scale": 5, "negative": "nowhere"}, "objectives": ["sft"]},
        None,
        "nowhere: no such file",
    ),
    "negative conditions of another length": (
        "train",
        {"prfl.guidance": {"scale": 5, "negative": "NEGATIVE/5/20"}},
        None,
        "expected the dataset's [3, 20]; pad it, or set batched: false",
    ),
    "negative conditions of another width": (
        "train",
        {"prfl.guidance": {"scale": 5, "negative": "NEGATIVE/3/24", "batched": False}},
        None,
        "encoder_hidden_states is float32[3, 24] on cpu, expected the dataset's [3, 20]",
    ),
    "negative conditions that are none": (
        "train",
        {"prfl.guidance": {"scale": 5, "negative": "SAMPLE"}},
        None,
        "holds ['encoder_hidden_states', 'latents'], expected some of ['encoder_hidden_states']",
    ),
    "odd score file": (
        "score",
        {"out": "scores.txt"},
        None,
        "expected a name that ends in .jsonl or .csv",
    ),
    # files that are missing, unreadable or in the way
    "no model": ("train", {"model": "nowhere"}, None, "model: nowhere has no config.json"),
    "no data": ("train", {"data": "nowhere"}, None, "nowhere: no manifest.jsonl there"),
    "no reward folder": (
        "train",
        {"reward": "nowhere"},
        None,
        "nowhere is not a saved reward model",
    ),
    "no resume": (
        "train",
        {"run.resume": "nowhere"},
        None,
        "nowhere: not a checkpoint of this library",
    ),
    "out under a file": ("train", {"out": "FILE/out"}, None, "is a file"),
    "score to a folder": (
        "score",
        {"out": "FOLDER.jsonl"},
        None,
        "which is a folder, expected a file",
    ),
    "model not json": (
        "train",
        {},
        lambda w: truncate(w / "model/config.json"),
        "is not the configuration of a diffusers",
    ),
    "model of another class": (
        "train",
        {},
        lambda w: edit_json(w / "model/config.json", _class_name="FluxTransformer2DModel"),
        "model/config.json",
    ),
    "model of no class": (
        "train",
        {},
        lambda w: edit_json(w / "model/config.json", _class_name="X"),
        "names 'X'",
    ),
    "corrupt model": ("train", {}, lambda w: truncate(w / WEIGHTS), "model cannot be loaded"),
    "model lacks tensors": (
        "train",
        {},
        lambda w: retensor(w / WEIGHTS, lambda t: t.pop("proj_out.bias")),
        "has missing keys: proj_out.bias",
    ),
    "corrupt reward": (
        "train",
        {},
        lambda w: truncate(w / "reward/model.safetensors"),
        "not a whole safetensors file",
    ),
    "reward of another shape": (
        "train",
        {},
        lambda w: retensor(
            w / "reward/model.safetensors", lambda t: t.update({"head.fc3.bias": torch.ones(2)})
        ),
        "head.fc3.bias [2], expected [1]",
    ),
    "reward not json": (
        "score",
        {},
        lambda w: truncate(w / "reward/config.json"),
        "not the configuration of a reward",
    ),
    # data
    "empty manifest": (
        "train",
        {},
        lambda w: (w / "data/manifest.jsonl").write_text(""),
        "manifest.jsonl: empty",
    ),
    "manifest not json": (
        "train",
        {},
        lambda w: truncate(w / "data/manifest.jsonl", 0.9),
        "manifest.jsonl:4: not JSON",
    ),
    "missing sample": ("train", {}, lambda w: (w / DATA).unlink(), "manifest.jsonl:2: latents: "),
    "corrupt sample": (
        "train",
        {},
        lambda w: truncate(w / DATA),
        "is not a whole safetensors file",
    ),
    "integer latents": (
        "train",
        {},
        lambda w: retensor(w / DATA, lambda t: t.update(latents=t["latents"].long())),
        "is I64, expected one of F32",
    ),
    "latents without frames": (
        "train",
        {},
        lambda w: retensor(w / DATA, lambda t: t.update(latents=t["latents"][:, 0].clone())),
        "latents in ",
    ),
    "one sample smaller": (
        "train",
        {},
        lambda w: retensor(w / DATA, lambda t: t.update(latents=t["latents"][:, :1].clone())),
        "earlier lines have",
    ),
    "grid not a multiple of the patch": (
        "train",
        {},
        lambda w: new_data(w, size=(2, 5, 4)),
        "does not fit",
    ),
    "text of another width": ("train", {}, lambda w: new_data(w, width=24), "expected [B, T, 20]"),
    "score text of another width": (
        "score",
        {},
        lambda w: new_data(w, width=24),
        "does not fit the reward model",
    ),
    "batch larger than the data": (
        "train",
        {"run.batch_size": 5},
        None,
        "the dataset has 4 samples",
    ),
    "pairs for train": ("train", {"data": "WORLD/pairs"}, None, "train needs single videos"),
    "singles for bt": ("train-reward", {"loss": "bt"}, None, "ce takes single videos, bt pairs"),
    "unknown label": (
        "train-reward",
        {"label": "beauty"},
        None,
        "label is 'beauty', expected one of",
    ),
    "label missing": (
        "train-reward",
        {"label": "blur_quality"},
        None,
        "label blur_quality is missing",
    ),
    "label not 0 or 1": (
        "train-reward",
        {},
        lambda w: relabel(w, 3),
        "manifest.jsonl:2: label motion_quality is 3",
    ),
    "too many blocks": (
        "train-reward",
        {"num_blocks": 9},
        None,
        "num_blocks is 9, expected 1 to 1",
    ),
    "heads do not divide": ("train-reward", {"num_heads": 7}, None, "num_heads"),
    "lora on no layer": ("train", {"lora": {"rank": 2, "targets": ["zzz"]}}, None, "zzz"),
}


def one_line(capsys, command):
    error = capsys.readouterr().err
    assert error.startswith(f"prfl-fast {command}: ") and error.count("\n") == 1, error
    assert "Traceback" not in error and len(error) < 600
    return error


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(root, tmp_path, monkeypatch, capsys, case):
    command, changes, damage, message = BAD[case]
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
    replacements = {
        "FILE/out": tmp_path / "FILE/out",
        "FOLDER.jsonl": tmp_path / "FOLDER.jsonl",
        "WORLD/pairs": root / "pairs",
    }
    changes = {
        k: str(replacements[v]) if isinstance(v, str) and v in replacements else v
        for k, v in changes.items()
    }
    guidance = changes.get("prfl.guidance", {})
    for mark, file in {"NEGATIVE/5/20": "NEGATIVE-5-20", "NEGATIVE/3/24": "NEGATIVE-3-24"}.items():
        if guidance.get("negative") == mark:
            changes["prfl.guidance"] = {**guidance, "negative": str(tmp_path / file)}
    if guidance.get("negative") == "SAMPLE":
        changes["prfl.guidance"] = {**guidance, "negative": str(world / DATA)}
    before = {p: p.stat().st_mtime_ns for p in world.rglob("*")}
    path = write_config(tmp_path / "c.yaml", config(command, world, place / "out", changes))
    assert cli.main([command, str(path)]) == 2
    assert message in one_line(capsys, command)
    assert list(place.iterdir()) == [] and (tmp_path / "FILE").read_text() == "x"
    assert {p: p.stat().st_mtime_ns for p in world.rglob("*")} == before


def test_there_are_at_least_25_bad_inputs():
    assert len(BAD) >= 25


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
        ({"prfl.num_steps": 5}, "made with prfl.num_steps = 3, this run has 5"),
        ({"lora.rank": 2}, "made with lora"),
        ({"run.resume": None}, "holds step-00000001; resume it, or choose a new folder"),
    ):
        assert call("train", root, out, changes) == 2
        assert message in one_line(capsys, "train")
    truncate(out / "step-00000001" / "state.pt")
    assert call("train", root, out) == 2
    assert "state.pt has" in one_line(capsys, "train")
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


def test_the_installed_command_prints_one_line(tmp_path):
    path = write_config(tmp_path / "c.yaml", "modell: m\n")
    command = [sys.executable, "-m", "prfl_fast.cli", "train", str(path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"prfl-fast train: {path}: unknown key 'modell': did you mean 'model'?\n"


@pytest.mark.parametrize("patched", [True, False])
def test_training_says_why_its_rollouts_are_as_they_are(root, tmp_path, capsys, patched):
    changes = {"hardware.patch": patched, "run.steps": 1}
    assert call("train", root, tmp_path / "out", changes) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prfl-fast:")]
    assert len(told) == len(set(told)) > 0
    reason = "are not compiled: the latents are on cpu" if patched else "the model is not patched"
    assert reason in told[-1]
