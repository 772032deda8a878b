"""Kill a run anywhere: no visible file is truncated, and resuming repeats it bit for bit."""

import json
import os
import signal

import killable
import pytest
import torch
from runs import config, log, make_world, write_config

from prfl_fast.training.checkpoint import latest_checkpoint, list_checkpoints, read_checkpoint
from prfl_fast.utils.io import load_tensors

STEPS = 5
WEIGHTS = ("model/diffusion_pytorch_model.safetensors", "ema.safetensors")


class Runner:
    """Send commands to a forked process that runs ``killable.serve``."""

    def __init__(self, output):
        theirs, jobs = os.pipe()
        reports, written = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(jobs)
                killable.serve(os.fdopen(theirs), written)
            finally:
                os._exit(0)
        os.close(theirs)
        os.close(written)
        self.jobs, self.reports = os.fdopen(jobs, "w"), os.fdopen(reports)
        self.output = output

    def expect(self, word):
        line = self.reports.readline().split()
        assert line and line[0] == word, (
            f"expected {word!r}, got {line}: {self.output.read_text()[-2000:]}"
        )
        return int(line[1]) if len(line) > 1 else None

    def run(self, *arguments, place=None, count=1, sends=signal.SIGKILL, here=False):
        """Return the exit status of a command; with a place, of one that got a signal there."""
        job = {"arguments": arguments, "output": str(self.output), "place": place, "count": count}
        self.jobs.write(json.dumps({**job, "here": here}) + "\n")
        self.jobs.flush()
        if here:
            return self.expect("exit")
        pid = self.expect("pid")
        if place is not None:
            self.expect("paused")
            os.kill(pid, sends)
        return self.expect("exit")

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.jobs.close()
        self.reports.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def runner(root):
    runner = Runner(root / "output.txt")
    yield runner
    runner.close()


def train(runner, root, out, changes=None, **options):
    content = config("train", root, out, {"run.steps": STEPS, **(changes or {})})
    return runner.run("train", str(write_config(root / "train.yaml", content)), **options)


@pytest.fixture(scope="module")
def whole(root, runner):
    assert train(runner, root, root / "whole", here=True) == 0
    assert [r["step"] for r in log(root / "whole")] == list(range(1, STEPS + 1))
    return root / "whole"


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def assert_equal_runs(a, b):
    assert log(a) == log(b)
    paths = [folder / f"step-{STEPS:08d}" for folder in (a, b)]
    for file in WEIGHTS:
        assert (paths[0] / file).read_bytes() == (paths[1] / file).read_bytes()
    states = [torch.load(path / "state.pt", weights_only=True) for path in paths]
    assert same(*states)


def assert_nothing_truncated(folder):
    """Check that each file under a final name loads; return their number."""
    checked = 0
    for path in folder.rglob("*"):
        lock = path.name == "run.lock"  # a killed run leaves it, and the next one takes it over
        if ".tmp-" in str(path.relative_to(folder)) or lock or not path.is_file():
            continue
        checked += 1
        if path.suffix == ".safetensors":
            assert load_tensors(path)
        elif path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["step"] > 0
        elif path.suffix in (".json", ".yaml"):
            assert path.read_text().endswith("\n")
        else:
            assert path.name == "log.jsonl"
            assert all(json.loads(line)["step"] for line in path.read_text().splitlines())
    for step, path in list_checkpoints(folder):
        assert read_checkpoint(path)["step"] == step
    return checked


# Each step makes two optimizer steps, and runs one or two forwards. Every second step saves:
# weights, then the average. Counts lie after the first checkpoint, or at the second.
KILLS = [
    ("a forward", 5, 2),
    ("a weights file", 1, None),
    ("a weights file", 4, 2),
    ("the rename", 2, 2),
    pytest.param("two optimizer steps", 7, 2, marks=pytest.mark.slow),
    pytest.param("a weights file", 3, 2, marks=pytest.mark.slow),
    pytest.param("a state file", 2, 2, marks=pytest.mark.slow),
    pytest.param("the pruning", 1, 4, marks=pytest.mark.slow),
]


@pytest.mark.cases(3)
@pytest.mark.parametrize(("place", "count", "survives"), KILLS)
def test_killed_in_the_middle_and_resumed(root, runner, whole, tmp_path, place, count, survives):
    out = tmp_path / "out"
    assert train(runner, root, out, place=place, count=count) == -signal.SIGKILL
    assert assert_nothing_truncated(out) >= 2
    newest = latest_checkpoint(out)
    if place not in ("a forward", "two optimizer steps"):
        assert list(out.glob("*.tmp-*")), "the kill came too late to test anything"
        assert (newest and newest.name) == (survives and f"step-{survives:08d}")
    assert train(runner, root, out) == 0
    assert_equal_runs(out, whole)
    assert not list(out.glob("*.tmp-*")) and assert_nothing_truncated(out) >= 6


@pytest.mark.slow
def test_killed_again_and_again(root, runner, whole, tmp_path):
    out = tmp_path / "out"
    kills = {"two optimizer steps": 5, "the rewriting of the log": 1, "a state file": 1}
    for place, count in [*kills.items(), ("a forward", 4)]:
        assert train(runner, root, out, place=place, count=count) == -signal.SIGKILL
        assert_nothing_truncated(out)
    assert train(runner, root, out) == 0
    assert_equal_runs(out, whole)


def test_sigterm_finishes_the_step_and_saves(root, runner, whole, tmp_path):
    out = tmp_path / "out"
    status = train(runner, root, out, place="a signal", count=5, sends=signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert [step for step, _ in list_checkpoints(out)] == [3]
    assert [r["step"] for r in log(out)] == [1, 2, 3]
    assert train(runner, root, out) == 0
    assert_equal_runs(out, whole)


def kill_and_resume(runner, root, tmp_path, changes):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(runner, root, whole, changes) == 0
    assert train(runner, root, out, changes, place="a state file", count=2) == -signal.SIGKILL
    assert latest_checkpoint(out).name == "step-00000002"
    assert train(runner, root, out, changes) == 0
    assert_equal_runs(out, whole)
    return out


@pytest.mark.slow
def test_bfloat16_weights_and_8bit_states_resume_too(root, runner, tmp_path):
    memory = {"weight_dtype": "bf16", "optimizer": "adamw8bit", "gradient_dtype": "fp32"}
    changes = {"hardware.precision": "bf16", "memory": memory}
    out = kill_and_resume(runner, root, tmp_path, changes)
    for file, dtype in zip(WEIGHTS, (torch.bfloat16, torch.float32), strict=True):
        tensors = load_tensors(out / f"step-{STEPS:08d}" / file)
        assert tensors["blocks.0.ffn.net.2.weight"].dtype is dtype


@pytest.mark.slow
def test_the_count_of_a_drift_guard_resumes_too(root, runner, tmp_path):
    changes = {
        "prfl": {"num_inference_steps": 9, "points": 2},
        "rollout": {"stride": 3, "check_every": 3, "drift_limit": 1e3},
    }
    out = kill_and_resume(runner, root, tmp_path, changes)
    assert [r["step"] for r in log(out) if "prfl/drift" in r] == [1, 4]


@pytest.mark.slow
def test_reward_training_resumes_too(root, runner, tmp_path):
    def fit(out, **options):
        content = config("train-reward", root, out, {"run.steps": 4})
        path = write_config(tmp_path / "r.yaml", content)
        return runner.run("train-reward", str(path), **options)

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert fit(whole) == 0
    assert fit(out, place="two optimizer steps", count=3) == -signal.SIGKILL
    assert fit(out) == 0
    assert log(out) == log(whole)
    for file in ("step-00000004/model/model.safetensors", "reward/model.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()
