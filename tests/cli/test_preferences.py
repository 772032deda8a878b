"""Runs of the objectives dpo and rwr: pairs, references, rewards, labels, resume."""

import pytest
import torch
from commands import refused, train
from runs import config, log, samples, write_config

from prfl_fast.cli.config import TrainFile
from prfl_fast.cli.objectives import _frozen_copy
from prfl_fast.cli.workload import fields_of_run
from prfl_fast.cli.yaml_config import load_config
from prfl_fast.data.manifest import write_dataset
from prfl_fast.memory.policy import MemoryConfig
from prfl_fast.planning.built_models import frozen_copy
from prfl_fast.planning.workload import Workload

LORA = {"lora": {"lora_rank": 2}, "run.ema_decay": ...}


def of(root, data, **changes):
    """Return changes of a configuration, with one of the world's datasets."""
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    return {"data": str(root / data), **keys}


@pytest.mark.parametrize("steps", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_dpo_takes_turns_with_prfl_and_resumes(root, tmp_path, steps):
    """The pairs' winners are the samples of the other objectives."""
    changes = of(root, "pairs", objectives=["dpo", "prfl", "rwr"], rwr__temperature=0.5) | LORA
    changes["run.steps"] = steps
    records = train(root, tmp_path / "whole", changes)
    assert records[0]["dpo/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert all(0 < record["rwr/reward"] < 1 for record in records)
    assert {"prfl/reward", "dpo/margin", "dpo/accuracy"} <= records[0].keys()
    if steps == 1:
        return
    train(root, tmp_path / "half", {**changes, "run.steps": 2})
    assert train(root, tmp_path / "half", changes) == records


@pytest.mark.slow
def test_a_model_that_trains_in_full_is_held_to_a_copy(root, tmp_path):
    """A resumed run has the initial weights as its reference too."""
    changes = of(root, "pairs", objectives=["dpo"], reward=..., run__save_every=1)
    records = train(root, tmp_path / "whole", {**changes, "run.steps": 3})
    assert records[0]["dpo/loss"] == pytest.approx(0.693147, abs=1e-6) != records[2]["dpo/loss"]
    for steps in (2, 3):
        train(root, tmp_path / "half", {**changes, "run.steps": steps})
    assert log(tmp_path / "half") == records


def test_rwr_reads_a_label(root, tmp_path):
    labeled = of(root, "data", objectives=["rwr"], reward=...) | LORA
    labeled |= {"rwr.label": "motion_quality", "optimizer.schedule": "cosine", "run.steps": 2}
    records = train(root, tmp_path / "label", labeled)
    assert all(record["rwr/reward"] in (0, 1) for record in records)
    assert [record["lr"] for record in records] == [1e-3, 5e-4]


ERRORS = [
    ("data", {"objectives": ["dpo"]}, "objectives is 'dpo', expected a dataset of pairs for dpo"),
    ("pairs", {"objectives": ["rwr"]}, "holds preference pairs, expected single videos"),
    ("data", {"objectives": ["rwr"], "reward": ...}, "expected a reward model for the rwr one, or"),
    (
        "data",
        {"objectives": ["rwr"], "reward": ..., "rwr__label": "score"},
        "manifest.jsonl:1: label score is null, expected a number. The record has ['motion_quali",
    ),
    (
        "data",
        {"objectives": ["rwr"], "rwr__label": "motion_quality", "rwr__temperature": 0.01},
        "label motion_quality is 1.0, expected at most 0.88: exp(reward / rwr.temperature) must be",
    ),
    ("pairs", {"objectives": ["dpo"], "dpo__beta": 0}, "dpo.beta is 0, expected a number above 0"),
]


@pytest.mark.parametrize(("data", "changes", "message"), ERRORS)
def test_bad_input_is_one_line(root, tmp_path, capsys, data, changes, message):
    changes = of(root, data, **changes)
    assert message in refused(capsys, "train", root, tmp_path / "out", changes)
    assert not (tmp_path / "out").exists()


def test_labels_whose_weights_are_all_zero_are_refused(root, tmp_path, capsys):
    write_dataset(tmp_path / "low", [s._replace(labels={"score": -99.0}) for s in samples(2)])
    changes = of(tmp_path, "low", objectives=["rwr"], reward=..., rwr__label="score")
    line = refused(capsys, "train", root, tmp_path / "out", changes)
    assert "largest label score is -99.0, expected at least -88: exp(reward / " in line


def run_of(root, tmp_path, changes):
    """Return the configuration of a training run."""
    content = config("train", root, tmp_path / "out", changes)
    return load_config(TrainFile, write_config(tmp_path / "a.yaml", content))


@pytest.mark.parametrize("objectives", [["dpo"], ["rwr"], ["prfl", "sft", "dpo"]])
def test_a_plan_has_the_steps_of_the_objectives(root, tmp_path, objectives):
    fields = fields_of_run(run_of(root, tmp_path, {"objectives": objectives}))
    assert fields["sft"] == ("dpo" != objectives[0]) and fields["dpo"] == ("dpo" in objectives)
    assert fields["reward_blocks"] == 1


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_planned_reference_is_the_one_of_a_run(root, tmp_path, dtype):
    changes = {"objectives": ["dpo"], "hardware.precision": "bf16", "memory.weight_dtype": dtype}
    run = run_of(root, tmp_path, changes)
    work = Workload(**fields_of_run(run), frames=5, height=32, width=32)
    assert work.has_reference
    memory = MemoryConfig(dtype, "full", "cpu", optimizer="adamw-cpu", stream_weights=1)
    made, planned = _frozen_copy(run, torch.device("cpu")), frozen_copy(work, memory)
    assert type(made) is type(planned)

    def parts(model):
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        return {n: (t.shape, t.dtype, t.requires_grad) for n, t in tensors.items()}

    assert parts(made) == parts(planned)
